"""The error tree of OpenLoRA: every error a user can meet, with its code.

    OpenLoRAError
    ├── InvalidRequest        invalid_request 400
    ├── PromptTooLong         prompt_too_long 400
    ├── Unauthorized          unauthorized 401
    ├── Forbidden             forbidden 403
    ├── UnknownAdapter        unknown_adapter 404
    ├── UnknownModel          unknown_model 404
    ├── JobNotFound           job_not_found 404
    ├── FileNotFound          file_not_found 404
    ├── BatchNotFound         batch_not_found 404
    ├── PayloadTooLarge       payload_too_large 413
    ├── AdapterFailed         adapter_failed 422
    ├── RateLimited           rate_limited 429, carries retry_after_ms
    ├── Overloaded            overloaded 503, carries retry_after_ms
    ├── DeadlineExceeded      deadline_exceeded 504
    ├── InternalError         internal 500
    └── SetupError            a process cannot start; one line for the operator

A message says what was wrong, with the value, and what to do about it. Codes and statuses are
public: clients branch on them, so they never change meaning.
"""

from __future__ import annotations

from typing import ClassVar


class OpenLoRAError(Exception):
    """Base of all errors; ``code`` and ``status`` are what clients see.

    ``retriable`` says whether sending the same request again can succeed without a change by the
    client; ``retry_after_ms`` is set only where the server knows a useful delay.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retriable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        # A message may quote what a client or a file holds, and must be one that can be sent.
        message = message.encode("utf-8", "backslashreplace").decode()
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms


class InvalidRequest(OpenLoRAError):
    """The request cannot be understood or holds a value out of range."""

    code = "invalid_request"
    status = 400


class PromptTooLong(OpenLoRAError):
    """The prompt leaves no room for a single new token in the model's context."""

    code = "prompt_too_long"
    status = 400


class Unauthorized(OpenLoRAError):
    """No API key, or one that is not known."""

    code = "unauthorized"
    status = 401


class Forbidden(OpenLoRAError):
    """The key is known and may not do this."""

    code = "forbidden"
    status = 403


class UnknownAdapter(OpenLoRAError):
    """No adapter of this ID is registered (or none that this tenant may see)."""

    code = "unknown_adapter"
    status = 404


class UnknownModel(OpenLoRAError):
    """The model named is neither the base model nor an adapter."""

    code = "unknown_model"
    status = 404


class JobNotFound(OpenLoRAError):
    """No job of this ID is known: it never existed, or its log has expired."""

    code = "job_not_found"
    status = 404


class FileNotFound(OpenLoRAError):
    """No file of this ID is known (or none of this tenant)."""

    code = "file_not_found"
    status = 404


class BatchNotFound(OpenLoRAError):
    """No batch of this ID is known (or none of this tenant)."""

    code = "batch_not_found"
    status = 404


class PayloadTooLarge(OpenLoRAError):
    """A frame or body is over the size limit."""

    code = "payload_too_large"
    status = 413


class AdapterFailed(OpenLoRAError):
    """An adapter's files are unusable: wrong shape, missing tensor, other base, pickle, …"""

    code = "adapter_failed"
    status = 422


class RateLimited(OpenLoRAError):
    """The key has used up its rate."""

    code = "rate_limited"
    status = 429
    retriable = True


class Overloaded(OpenLoRAError):
    """The system cannot take the job now; it may a little later."""

    code = "overloaded"
    status = 503
    retriable = True


class DeadlineExceeded(OpenLoRAError):
    """The job's deadline passed before it ended."""

    code = "deadline_exceeded"
    status = 504


class InternalError(OpenLoRAError):
    """A fault on our side; the log of the process named in the message has the details."""

    code = "internal"
    status = 500
    retriable = True


class SetupError(OpenLoRAError):
    """A process cannot start (port in use, broker unreachable, bad setting, …).

    The command line prints ``message`` as one line and exits with status 1, without a traceback.
    """


_BY_CODE: dict[str, type[OpenLoRAError]] = {
    cls.code: cls
    for cls in (
        InvalidRequest,
        PromptTooLong,
        Unauthorized,
        Forbidden,
        UnknownAdapter,
        UnknownModel,
        JobNotFound,
        FileNotFound,
        BatchNotFound,
        PayloadTooLarge,
        AdapterFailed,
        RateLimited,
        Overloaded,
        DeadlineExceeded,
        InternalError,
    )
}


def error_from_code(code: str, message: str, *, retry_after_ms: int | None = None) -> OpenLoRAError:
    """The error object for a ``code`` read from the wire; an unknown code becomes InternalError."""
    return _BY_CODE.get(code, InternalError)(message, retry_after_ms=retry_after_ms)
