"""API keys and origins."""

from __future__ import annotations

import pytest

from gateway.auth import ApiKeys, check_host, check_origin, key_of
from gateway.config import GatewayConfig
from openlora.errors import Forbidden, SetupError, Unauthorized


def test_without_keys_everybody_is_the_default_tenant() -> None:
    keys = ApiKeys.parse("")
    assert not keys.required
    assert keys.tenant_of(None) == "default"
    assert keys.tenant_of("whatever") == "default"


def test_keys_name_their_tenants() -> None:
    keys = ApiKeys.parse("plain, acme:one ,acme:two")
    assert keys.tenant_of("plain") == "default"
    assert keys.tenant_of("one") == keys.tenant_of("two") == "acme"


@pytest.mark.parametrize("key", [None, "", "On", "one ", "acme:one", "ünknown", "\udcff"])
def test_other_keys_are_refused_without_being_shown(key: str | None) -> None:
    keys = ApiKeys.parse("acme:one")
    with pytest.raises(Unauthorized) as caught:
        keys.tenant_of(key)
    assert "one" not in caught.value.message.replace("one that", "")


def test_keys_are_not_kept_in_clear() -> None:
    assert "s3cret" not in repr(ApiKeys.parse("acme:s3cret"))


@pytest.mark.parametrize("text", ["acme:", ":qwe", "a b:qwe", "../x:qwe", "qw%65", "schlüssel"])
def test_a_bad_entry_is_a_setup_error_that_names_its_place_only(text: str) -> None:
    with pytest.raises(SetupError) as caught:
        ApiKeys.parse(f"fine,{text}")
    assert "entry 2" in caught.value.message
    assert text not in caught.value.message


@pytest.mark.parametrize("text", [",", " ", " , ,"])
def test_a_setting_without_a_key_does_not_let_everybody_in(text: str) -> None:
    with pytest.raises(SetupError, match="OPENLORA_API_KEYS names no key"):
        ApiKeys.parse(text)


def test_a_key_comes_from_the_header_or_a_subprotocol() -> None:
    assert key_of("Bearer abc") == "abc"
    assert key_of("bearer  abc ") == "abc"
    assert key_of("Basic abc") is None
    assert key_of(None, ["openlora.v1", "openlora.key.a%3Db"]) == "a=b"
    assert key_of("Bearer header", ["openlora.key.other"]) == "header"
    assert key_of(None) is None


def test_pages_of_sites_that_the_operator_named_may_call() -> None:
    allowed = ("https://chat.example", "http://localhost:3000")
    check_origin("https://Chat.Example", "127.0.0.1:8000", allowed)
    check_origin("http://localhost:3000", "127.0.0.1:8000", allowed)
    check_origin("http://127.0.0.1:8000", "127.0.0.1:8000", allowed)
    for origin in ("http://chat.example", "https://chat.example:1", "https://a.chat.example"):
        with pytest.raises(Forbidden, match="OPENLORA_ORIGINS"):
            check_origin(origin, "127.0.0.1:8000", allowed)


def test_pages_of_other_hosts_are_refused() -> None:
    check_origin(None, "127.0.0.1:8000")
    check_origin("http://127.0.0.1:8000", "127.0.0.1:8000")
    check_origin("https://Chat.Example", "chat.example")
    for origin in ("http://evil.example", "http://127.0.0.1:9000", "null", "", "http://["):
        with pytest.raises(Forbidden):
            check_origin(origin, "127.0.0.1:8000")


@pytest.mark.parametrize(
    "host",
    [None, "localhost:8000", "LOCALHOST", "app.localhost", "127.0.0.1:8000", "[::1]:8000",
     "chat.example", "chat.example:8443"],
)  # fmt: skip
def test_a_local_gateway_answers_to_names_of_its_machine(host: str | None) -> None:
    check_host(host, ("https://chat.example",))


@pytest.mark.parametrize(
    "host", ["evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evil@x", "["]
)
def test_a_page_whose_name_was_made_to_lead_here_is_refused(host: str) -> None:
    with pytest.raises(Forbidden, match="is not this machine"):
        check_host(host, ("https://chat.example",))


def test_only_a_gateway_without_keys_on_a_loopback_address_asks_for_the_name() -> None:
    rebound = ("http://evil.example:8000", "evil.example:8000")
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        with pytest.raises(Forbidden):
            GatewayConfig(host=host).check_page(*rebound)
        with pytest.raises(Forbidden):  # a page's own GET has no Origin
            GatewayConfig(host=host).check_page(None, rebound[1])
    GatewayConfig(host="0.0.0.0").check_page(*rebound)
    GatewayConfig(api_keys=ApiKeys.parse("key")).check_page(*rebound)
