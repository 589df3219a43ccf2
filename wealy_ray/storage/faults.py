"""Faults of storage, sorted: one object's own, the run's, or passing."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

from wealy_ray.errors import StorageError

CREDENTIAL_CODES = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "AuthorizationHeaderMalformed",
    "RequestTimeTooSkewed",
}
TRANSIENT_CODES = {
    "InternalError",
    "ServiceUnavailable",
    "SlowDown",
    "RequestTimeout",
    "OperationAborted",
    "ConditionalRequestConflict",
    "Throttling",
    "ThrottlingException",
}
TRANSIENT_ERRNO = {
    errno.EIO,
    errno.EREMOTEIO,
    errno.EBUSY,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}
UNUSABLE_NAME_ERRNO = {errno.ENAMETOOLONG, errno.ELOOP}
NETWORK_ERRORS = {
    *("ConnectionError", "HTTPClientError", "ResponseParserError"),  # botocore
    *("ClientConnectionError", "ClientPayloadError", "ServerTimeoutError"),  # aiohttp
    *("FSTimeoutError", "IncompleteRead"),  # fsspec, http.client
}
"""Families of network errors that are no `OSError`; known by name, so that nothing need be imported for them."""


class ObjectMissingError(StorageError):
    """One object does not exist (its bucket does)."""


class ObjectForbiddenError(StorageError):
    """One object may not be read (the credentials are otherwise good)."""


def classify(uri: str, error: Exception) -> StorageError | None:  # noqa: PLR0911 (a list of cases)
    """The fault of one object or of the run that `error` stands for; None for anything else."""
    code = code_of(error)
    no_credentials = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
    if code in CREDENTIAL_CODES or any(type(e).__name__ in no_credentials for e in _causes(error)):
        return StorageError(
            f"the credentials are not accepted for {uri} ({code or reason_of(error)}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and the profile"
        )
    status = _http_status(error)
    if isinstance(error, FileNotFoundError) and (
        status == 429 or status >= 500 or _is_network(error.__cause__)
    ):
        return None  # fsspec says "not found" of a web server that does not answer
    if status in (401, 403):
        return ObjectForbiddenError(f"no permission for {uri}")
    if isinstance(error, IsADirectoryError):
        return ObjectMissingError(f"{uri} is a folder, not a file")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if code == "NoSuchBucket":
            bucket = uri.split("/")[2]
            return StorageError(
                f"the bucket '{bucket}' does not exist (in {uri}); create it or correct the name"
            )
        return ObjectMissingError(f"{uri} does not exist")
    if isinstance(error, PermissionError):
        return ObjectForbiddenError(f"no permission for {uri}")
    unusable = isinstance(error, OSError) and error.errno in UNUSABLE_NAME_ERRNO
    if unusable or (isinstance(error, ValueError) and "\0" in uri):
        return ObjectMissingError(f"{uri!r} does not exist: no object can have this name")
    return None


def is_transient(error: Exception) -> bool:
    """Whether trying again later may help."""
    response = _response(error)
    if response:  # a server has answered: what it says counts, not the errno that s3fs makes of it
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return code_of(error) in TRANSIENT_CODES or status == 429 or status >= 500
    status = _http_status(error)
    return status == 429 or status >= 500 or _is_network(error)


def _is_network(error: BaseException | None) -> bool:
    for e in _causes(error):
        if isinstance(e, ConnectionError | TimeoutError):
            return True
        if isinstance(e, OSError) and e.errno in TRANSIENT_ERRNO:
            return True
        if {c.__name__ for c in type(e).__mro__} & NETWORK_ERRORS:
            return True
    return False


def _http_status(error: BaseException) -> int:
    """Status of a web server's answer (aiohttp), 0 when there is none."""
    statuses = (getattr(e, "status", None) for e in _causes(error))
    return next((status for status in statuses if isinstance(status, int)), 0)


def code_of(error: BaseException) -> str:
    """The S3 error code behind an exception, or an empty string."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def _response(error: BaseException) -> dict[str, Any]:
    """The S3 server's answer behind an exception; empty when there is none."""
    for e in _causes(error):
        response = getattr(e, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    # not `__context__`: it may be an older fault that the caller was busy with when it called us
    while error is not None:
        yield error
        error = error.__cause__


def reason_of(error: Exception) -> str:
    """What happened, in the words of whoever raised it: one line."""
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip()
    return text.splitlines()[0][:200]
