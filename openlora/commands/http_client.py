"""HTTP calls of the command line to a running system; its errors come back as the error tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from openlora.commands.config import ClientConfig
from openlora.errors import OpenLoRAError, SetupError, error_from_code

_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 20.0
ADD_TIMEOUT_S = 1200.0
"""Adding an adapter fetches its files, which may take ten minutes, and stores them."""


class HttpClient:
    """JSON over HTTP to ``config.url``.

    Raises (all calls):
        SetupError: nothing answers there, or not in time, or something that is no OpenLoRA gateway.
        OpenLoRAError: what the gateway answered, as its own class.
    """

    def __init__(self, config: ClientConfig) -> None:
        self._config = config

    def get(self, path: str) -> Any:
        """The JSON that ``GET path`` answers with."""
        return self._call("GET", path)

    def post(self, path: str, body: object, timeout_s: float = _TIMEOUT_S) -> Any:
        """The JSON that ``POST path`` answers with."""
        return self._call("POST", path, body, timeout_s)

    def delete(self, path: str) -> Any:
        """What ``DELETE path`` answers with; None for an empty body."""
        return self._call("DELETE", path)

    def upload(self, path: str, source: Any, name: str, fields: Mapping[str, str]) -> Any:
        """The JSON that ``POST path`` answers to a form with a file; ``source`` has ``read``.

        What ``source`` raises ends the request: the gateway drops what it got of it.
        """
        return self._call("POST", path, data=fields, files={"file": (name, source)})

    def download(self, path: str) -> Iterator[bytes]:
        """The body that ``GET path`` answers with, as it comes."""
        url = self._config.url + path
        try:
            with httpx.stream(
                "GET", url, headers=self._config.headers, timeout=_TIMEOUT_S
            ) as response:
                if not response.is_success:
                    response.read()
                    raise _error_of(url, response, _json_of(url, response))
                yield from response.iter_bytes()
        except httpx.HTTPError as error:
            raise unreachable(self._config.url, str(error)) from error

    def _call(
        self,
        method: str,
        path: str,
        body: object = None,
        timeout_s: float = _TIMEOUT_S,
        **form: Any,
    ) -> Any:
        url = self._config.url + path
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
        try:
            response = httpx.request(
                method, url, json=body, headers=self._config.headers, timeout=timeout, **form
            )
        except httpx.ReadTimeout as error:
            raise SetupError(
                f"{self._config.url} has not answered {method} {path} within {timeout_s:g} s; it "
                "may still do what it was asked for: look before you ask again"
            ) from error
        except httpx.HTTPError as error:
            raise unreachable(self._config.url, str(error)) from error
        content = _json_of(url, response)
        if response.is_success:
            return content
        raise _error_of(url, response, content)


def _json_of(url: str, response: httpx.Response) -> Any:
    try:
        return response.json() if response.content else None
    except ValueError as error:
        raise _foreign(url, response) from error


def unreachable(url: str, reason: str) -> SetupError:
    """Nothing answers at ``url``."""
    return SetupError(
        f"no OpenLoRA answers at {url} ({reason or 'no connection'}); start one with "
        "`openlora up`, or name it with --url or OPENLORA_URL"
    )


def _error_of(url: str, response: httpx.Response, content: Any) -> OpenLoRAError:
    try:
        error = content["error"]
        return error_from_code(
            error["code"], error["message"], retry_after_ms=error.get("retry_after_ms")
        )
    except (KeyError, TypeError):
        return _foreign(url, response)


def _foreign(url: str, response: httpx.Response) -> SetupError:
    return SetupError(f"{url} answered {response.status_code}, but not as an OpenLoRA gateway does")
