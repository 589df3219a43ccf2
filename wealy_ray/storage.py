"""One door to all storage: local disk, S3, and whatever fsspec opens.

`Storage` is small, picklable and thread-safe. It knows four things that matter to us:

* **Atomic**: a reader sees a whole file or none (local: temporary file and rename; object stores by nature).
* **Write if absent**: of several writers of one name exactly one succeeds (local: hard link; S3: `If-None-Match`).
* **Faults are sorted**: an object's own fault (`ObjectMissingError`, `ObjectForbiddenError`), a fault of the run
  (`StorageError`: bad credentials, missing bucket), and a passing fault, which is retried with back-off and
  ends as `TransientError`.
* **Secrets stay out of URIs**: credentials come from the usual environment or profile only.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import logging
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.implementations.local

from wealy_ray.config import StorageSettings
from wealy_ray.errors import ConfigError, StorageError, TransientError

log = logging.getLogger(__name__)
T = TypeVar("T")

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
NO_HARD_LINK_ERRNO = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
NETWORK_ERRORS = {
    *("ConnectionError", "HTTPClientError", "ResponseParserError"),  # botocore
    *("ClientConnectionError", "ClientPayloadError", "ServerTimeoutError"),  # aiohttp
    *("FSTimeoutError", "IncompleteRead"),  # fsspec, http.client
}
"""Families of network errors that are no `OSError`; known by name, so that nothing need be imported for them."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0
S3_SCHEMES = ("s3", "s3a")
TEMPORARY_PREFIX = ".tmp-"


class ObjectMissingError(StorageError):
    """One object does not exist (its bucket does)."""


class ObjectForbiddenError(StorageError):
    """One object may not be read (the credentials are otherwise good)."""


@dataclass(frozen=True)
class ObjectInfo:
    """What identifies one version of an object.

    Attributes:
        uri: The object.
        size: Bytes.
        etag: The store's entity tag; on local disk the modification time and size; elsewhere, where there is
            no tag, the time.
    """

    uri: str
    size: int
    etag: str


def join(base: str, *parts: str) -> str:
    """Joins a folder URI or path and names below it."""
    return "/".join([base.rstrip("/") if base.strip("/") else base, *(p.strip("/") for p in parts)])


def scheme_of(uri: str) -> str:
    """The URI's scheme; `file` for plain paths."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::)", uri)
    return match.group(1).lower() if match else "file"


def _lower_scheme(uri: str) -> str:
    """The URI with its scheme in lower case, as fsspec knows it."""
    scheme, sep, rest = uri.partition("://")
    return f"{scheme.lower()}{sep}{rest}" if sep else uri


def check_uri(uri: str) -> None:
    """Refuses URIs that nothing can open, and URIs that carry credentials.

    Raises:
        ConfigError: Unknown scheme, or `user:password@` in the URI (which is not repeated).
    """
    scheme = scheme_of(uri)
    if scheme != "file" and _has_credentials(uri):
        raise ConfigError(
            f"a {scheme}:// URI carries credentials; remove them and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile, instead"
        )
    if scheme not in fsspec.available_protocols():
        raise ConfigError(
            f"unknown URI scheme '{scheme}' in {uri}; use a path, s3:// or another fsspec scheme"
        )


def _has_credentials(uri: str) -> bool:
    """Whether a URI looks like `scheme://user:password@place`.

    A password may hold slashes (AWS secrets do), so a colon before the first slash counts as well, unless a
    port number follows it.
    """
    authority = re.sub(r"^[^/]+://", "", uri).split("/", 1)[0]
    if re.search(r":.*@", authority):
        return True
    return "://" in uri and re.fullmatch(r"\[.*\](:\d*)?|[^:]*(:\d*)?", authority) is None


class Storage:
    """Access to files by URI; see the module's docstring.

    Args:
        settings: Endpoint, region and patience.
    """

    def __init__(self, settings: StorageSettings | None = None) -> None:
        self.settings = settings or StorageSettings()
        self._filesystems: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["settings"])  # type: ignore[misc]

    def info(self, uri: str) -> ObjectInfo:
        """Size and version of one object.

        Raises:
            ObjectMissingError, ObjectForbiddenError, StorageError, TransientError: See the module.
        """

        def call(fs: Any, path: str) -> ObjectInfo:
            found = fs.info(path)
            if found.get("type") == "directory":
                raise FileNotFoundError(uri)
            return _local_info(uri, os.stat(path)) if _is_local(fs) else _object_info(uri, found)

        return self._call(uri, call)

    def exists(self, uri: str) -> bool:
        """Whether the object exists (a missing bucket is an error, not an absence)."""
        try:
            self.info(uri)
        except ObjectMissingError:
            return False
        return True

    def read(self, uri: str) -> bytes:
        """The whole object."""
        return self._call(uri, lambda fs, path: fs.cat_file(path))

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; fewer at the end of the object."""
        if length <= 0:
            return b""

        def call(fs: Any, path: str) -> bytes:
            try:
                return fs.cat_file(path, start=offset, end=offset + length)
            except OSError as e:
                if _code(e) in ("InvalidRange", "416"):  # S3's answer to an offset behind the end
                    return b""
                raise

        return self._call(uri, call)

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """All objects below a folder or prefix, by name; none when it does not exist.

        Temporary files of writers at work are not listed, and links to folders are not followed.
        """

        def call(fs: Any, path: str) -> list[ObjectInfo]:
            if _is_local(fs):
                return _list_local(path)
            found = fs.find(path, detail=True)
            if not found and scheme_of(uri) in S3_SCHEMES:  # s3fs lists a missing bucket as an empty one
                _list_one(fs, path)
            return [
                _object_info(fs.unstrip_protocol(name), detail)
                for name, detail in sorted(found.items())
                if detail.get("type") != "directory"
            ]

        return iter(self._call(uri, call))

    def folders(self, uri: str) -> builtins.list[str]:
        """Names of the folders directly below a folder or prefix, sorted; none when it does not exist."""

        def call(fs: Any, path: str) -> list[str]:
            return [
                d["name"].rstrip("/").rsplit("/", 1)[-1]
                for d in fs.ls(path, detail=True)
                if d["type"] == "directory"
            ]

        try:
            return sorted(self._call(uri, call))
        except ObjectMissingError:
            return []

    def write(self, uri: str, data: bytes) -> None:
        """Writes an object atomically, replacing an older one."""

        def call(fs: Any, path: str) -> None:
            if _is_local(fs):
                with _temporary_beside(path, data) as temporary:
                    os.replace(temporary, path)
            else:
                fs.pipe_file(path, data)

        self._call(uri, call)

    def write_if_absent(self, uri: str, data: bytes) -> bool:
        """Writes an object unless it exists.

        `data` should be unique to its writer: when a retried request finds the object there, its content
        tells whether the first try had already succeeded.

        Returns:
            Whether this call's data is now the object.
        """

        def call(fs: Any, path: str) -> bool:
            if _is_local(fs):
                with _temporary_beside(path, data) as temporary:
                    is_new = _link(temporary, path, data)
            else:
                is_new = _create(fs, path, data)
            return is_new or fs.cat_file(path) == data

        return self._call(uri, call)

    def delete(self, uri: str) -> None:
        """Deletes an object; one that is already gone is no error."""

        def call(fs: Any, path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(path)

        self._call(uri, call)

    def check_folder(self, uri: str) -> None:
        """Fails unless the folder's bucket (or nearest existing parent) can be used: nothing is written.

        Raises:
            ConfigError: Bad URI.
            StorageError: Missing bucket, bad credentials, no permission, not a folder, not writable.
            TransientError: The storage cannot be reached.
        """

        def call(fs: Any, path: str) -> None:
            if _is_local(fs):
                parent = Path(path)
                while not parent.exists():
                    parent = parent.parent
                if not parent.is_dir():
                    raise StorageError(f"{uri} cannot be used as a folder: {parent} is a file")
                if not os.access(parent, os.W_OK):
                    raise StorageError(f"{uri} cannot be written: no permission on {parent}")
            elif scheme_of(uri) in S3_SCHEMES:
                _list_one(fs, path)
            else:
                fs.exists(path)

        try:
            self._call(uri, call)
        except ObjectForbiddenError as e:
            raise StorageError(
                f"no permission to use {uri}; check the credentials and the bucket's policy"
            ) from e

    def _call(self, uri: str, work: Callable[[Any, str], T]) -> T:
        """Runs `work(filesystem, path)`, retries passing faults, translates the rest."""
        check_uri(uri)
        began, pause_s, warned = time.monotonic(), FIRST_PAUSE_S, False
        while True:
            try:
                fs, path = self._open(uri)
                return work(fs, path)
            except StorageError:
                raise
            except Exception as e:
                error = self._ask_again(uri, e) if scheme_of(uri) in S3_SCHEMES else e
                fault = _classify(uri, error)
                if fault is not None:
                    raise fault from e
                if not _is_transient(error):
                    raise StorageError(f"cannot access {uri}: {_reason(error)}") from e
                waited_s = time.monotonic() - began
                if waited_s + pause_s > self.settings.retry_for_s:
                    raise TransientError(
                        f"storage did not answer for {waited_s:.0f} s at {uri} ({_reason(e)}); "
                        "run the same command again when it is back"
                    ) from e
                if not warned:
                    log.warning(
                        "storage does not answer at %s (%s); retrying for up to %.0f s",
                        uri,
                        _reason(e),
                        self.settings.retry_for_s,
                    )
                    warned = True
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _open(self, uri: str) -> tuple[Any, str]:
        scheme = scheme_of(uri)
        with self._lock:
            fs = self._filesystems.get(scheme)
            if fs is None:
                try:
                    fs = fsspec.filesystem(scheme, **self._options(scheme))
                except ImportError as e:
                    raise StorageError(f"{scheme}:// needs one more package: {e}") from e
                self._filesystems[scheme] = fs
                if scheme in S3_SCHEMES:
                    fs.retries = 3  # waits below a second: the patience of minutes is ours
        return fs, fs._strip_protocol(_lower_scheme(uri))

    def _options(self, scheme: str) -> dict[str, Any]:
        if scheme not in S3_SCHEMES:
            return {"skip_instance_cache": True}
        client: dict[str, Any] = {"region_name": self.settings.s3_region} if self.settings.s3_region else {}
        return {
            "endpoint_url": self.settings.s3_endpoint_url,
            "client_kwargs": client,
            "use_listings_cache": False,
            "skip_instance_cache": True,
            # our own loop retries for as long as the recipe says; within one call a few quick tries are enough
            "config_kwargs": {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 2}},
        }

    def _ask_again(self, uri: str, error: Exception) -> Exception:
        """The error that tells most about why S3 refused.

        An answer to HEAD has no body, so bad credentials look like one forbidden object; and a missing bucket
        looks like one missing object. One more request of another kind tells them apart.
        """
        if _code(error) not in ("400", "403") and not isinstance(error, FileNotFoundError):
            return error
        try:
            fs, path = self._open(uri)
            bucket, _, key = path.partition("/")
            if isinstance(error, FileNotFoundError):
                _list_one(fs, path)
            elif key:
                fs.call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")
        except PermissionError as e:
            # no permission to list says nothing about an object that was not found
            return e if isinstance(error, PermissionError) or _code(e) in CREDENTIAL_CODES else error
        except FileNotFoundError as e:
            return e if _code(e) == "NoSuchBucket" else error
        except Exception as e:
            return e
        return error


def _classify(uri: str, error: Exception) -> StorageError | None:
    """The fault of one object or of the run that `error` stands for; None for anything else."""
    code = _code(error)
    no_credentials = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
    if code in CREDENTIAL_CODES or any(type(e).__name__ in no_credentials for e in _causes(error)):
        return StorageError(
            f"the credentials are not accepted for {uri} ({code or _reason(error)}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and the profile"
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
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


def _is_transient(error: Exception) -> bool:
    response = _response(error)
    if response:  # a server has answered: what it says counts, not the errno that s3fs makes of it
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _code(error) in TRANSIENT_CODES or status == 429 or status >= 500
    for e in _causes(error):
        if isinstance(e, ConnectionError | TimeoutError):
            return True
        if isinstance(e, OSError) and e.errno in TRANSIENT_ERRNO:
            return True
        if {c.__name__ for c in type(e).__mro__} & NETWORK_ERRORS:
            return True
    return False


def _code(error: BaseException) -> str:
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


def _reason(error: Exception) -> str:
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip()
    return text.splitlines()[0][:200]


def _object_info(uri: str, found: dict[str, Any]) -> ObjectInfo:
    etag = next((found[k] for k in ("ETag", "etag", "mtime", "LastModified", "created") if found.get(k)), "")
    if isinstance(etag, datetime):  # memory:// gives a time in two shapes
        etag = etag.timestamp()
    return ObjectInfo(uri, int(found["size"] or 0), str(etag).strip('"'))


def _local_info(uri: str, status: os.stat_result) -> ObjectInfo:
    # nanoseconds tell two writes of one second apart, and the size tells a copy that kept its time
    return ObjectInfo(uri, status.st_size, f"mtime-{status.st_mtime_ns}-{status.st_size}")


def _list_local(path: str) -> list[ObjectInfo]:
    """All files below a folder; ones that vanish meanwhile are left out (fsspec would list nothing at all)."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    names = [
        os.path.join(folder, name)
        for folder, _, files in os.walk(path, onerror=refuse)
        for name in files
        if not name.startswith(TEMPORARY_PREFIX)
    ]
    found = []
    for name in sorted(names or [path]):
        try:
            status = os.stat(name)
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode):
            found.append(_local_info(name, status))
    return found


def _list_one(fs: Any, path: str) -> None:
    """Asks S3 for one name of the path's bucket: fails when the bucket is missing or may not be listed."""
    fs.call_s3("list_objects_v2", Bucket=path.partition("/")[0], MaxKeys=1)


def _link(temporary: str, path: str, data: bytes) -> bool:
    """Gives a temporary file its name; False when the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as e:
        if e.errno not in NO_HARD_LINK_ERRNO:
            raise
        return _write_new(path, data)
    return True


def _write_new(path: str, data: bytes) -> bool:
    """For file systems without hard links (some network and FUSE mounts): one winner, but not atomic."""
    try:
        with open(path, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
    except FileExistsError:
        return False
    return True


def _create(fs: Any, path: str, data: bytes) -> bool:
    """Writes a new object; False when it exists."""
    try:
        fs.pipe_file(path, data, mode="create")
    except OSError as e:
        if isinstance(e, FileExistsError) or _code(e) in ("PreconditionFailed", "412"):
            return False
        raise
    return True


def _is_local(fs: Any) -> bool:
    return isinstance(fs, fsspec.implementations.local.LocalFileSystem)


class _temporary_beside:  # noqa: N801 (used like a function)
    """A flushed temporary file with `data` in the folder of `path`; removed at the end if still there."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path, self.data = path, data

    def __enter__(self) -> str:
        folder = os.path.dirname(self.path)
        os.makedirs(folder, exist_ok=True)
        self.name = os.path.join(folder, f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        try:
            with open(self.name, "xb") as f:
                f.write(self.data)
                f.flush()
                os.fsync(f.fileno())
        except BaseException:  # a full disk, or an interruption: leave no rest behind
            self.__exit__()
            raise
        return self.name

    def __exit__(self, *exc: object) -> None:
        if os.path.exists(self.name):
            os.unlink(self.name)
