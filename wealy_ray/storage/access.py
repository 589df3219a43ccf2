"""`Storage`: files by URI, whatever lies behind it."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.implementations.local

from wealy_ray.config import StorageSettings
from wealy_ray.errors import StorageError, TransientError
from wealy_ray.storage import local
from wealy_ray.storage.faults import (
    CREDENTIAL_CODES,
    ObjectForbiddenError,
    ObjectMissingError,
    classify,
    code_of,
    is_transient,
    reason_of,
)
from wealy_ray.storage.info import ObjectInfo, object_info
from wealy_ray.storage.uri import S3_SCHEMES, check_uri, lower_scheme, scheme_of

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0


class Storage:
    """Access to files by URI; see the package's docstring.

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
            ObjectMissingError, ObjectForbiddenError, StorageError, TransientError: See the package.
        """

        def call(fs: Any, path: str) -> ObjectInfo:
            found = fs.info(path)
            if found.get("type") == "directory":
                raise FileNotFoundError(uri)
            return local.info_of(uri, os.stat(path)) if _is_local(fs) else object_info(uri, found)

        return self._call(uri, call)

    def exists(self, uri: str) -> bool:
        """Whether the object exists (a missing bucket is an error, not an absence)."""
        try:
            self.info(uri)
        except ObjectMissingError:
            return False
        return True

    def canonical(self, uri: str) -> str:
        """The URI as `list` spells it: local paths without a scheme, others with the scheme's usual name."""

        def call(fs: Any, path: str) -> str:
            return path if _is_local(fs) else fs.unstrip_protocol(path)

        return self._call(uri, call)

    def impatient(self, retry_for_s: float = 5.0) -> Storage:
        """The same storage for last words and courtesies: a passing fault is not waited for."""
        patience_s = min(self.settings.retry_for_s, retry_for_s)
        return type(self)(self.settings.model_copy(update={"retry_for_s": patience_s}))

    def read(self, uri: str) -> bytes:
        """The whole object."""
        return self._call(uri, lambda fs, path: fs.cat_file(path))

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; fewer at the end of the object."""
        if length <= 0:
            return b""

        return self._call(uri, lambda fs, path: _read_range(fs, path, offset, length))

    def read_into(self, uri: str, offset: int, out: memoryview) -> int:
        """Fills `out` with the bytes from `offset` on, without a copy where the file is local.

        Returns:
            How many there were; fewer than asked for at the end of the object.
        """

        def call(fs: Any, path: str) -> int:
            if _is_local(fs):
                return local.read_into(path, offset, out)
            data = _read_range(fs, path, offset, len(out))
            out[: len(data)] = data
            return len(data)

        return self._call(uri, call)

    def is_local(self, uri: str) -> bool:
        """Whether it lies on a file system of this machine."""
        return self._call(uri, lambda fs, _: _is_local(fs))

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """All objects below a folder or prefix, by name; none when it does not exist.

        Temporary files of writers at work are not listed, and links to folders are not followed.
        """

        def call(fs: Any, path: str) -> list[ObjectInfo]:
            if _is_local(fs):
                return local.list_files(path)
            found = fs.find(path, detail=True)
            if not found and scheme_of(uri) in S3_SCHEMES:  # s3fs lists a missing bucket as an empty one
                _list_one(fs, path)
            return [
                object_info(fs.unstrip_protocol(name), detail)
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
                with local.temporary_beside(path, data) as temporary:
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
                with local.temporary_beside(path, data) as temporary:
                    is_new = local.link(temporary, path, data)
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

    def delete_folder(self, uri: str) -> None:
        """Deletes all objects below a folder or prefix, in no order, and the folder; none there is no error."""

        def call(fs: Any, path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                fs.rm(path, recursive=True)

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
                fault = classify(uri, error)
                if fault is not None:
                    raise fault from e
                if not is_transient(error):
                    raise StorageError(f"cannot access {uri}: {reason_of(error)}") from e
                waited_s = time.monotonic() - began
                if waited_s + pause_s > self.settings.retry_for_s:
                    raise TransientError(
                        f"storage did not answer for {waited_s:.0f} s at {uri} ({reason_of(e)}); "
                        "run the same command again when it is back"
                    ) from e
                if not warned:
                    log.warning(
                        "storage does not answer at %s (%s); retrying for up to %.0f s",
                        uri,
                        reason_of(e),
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
        return fs, fs._strip_protocol(lower_scheme(uri))

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
        if code_of(error) not in ("400", "403") and not isinstance(error, FileNotFoundError):
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
            return e if isinstance(error, PermissionError) or code_of(e) in CREDENTIAL_CODES else error
        except FileNotFoundError as e:
            return e if code_of(e) == "NoSuchBucket" else error
        except Exception as e:
            return e
        return error


def _read_range(fs: Any, path: str, offset: int, length: int) -> bytes:
    try:
        return fs.cat_file(path, start=offset, end=offset + length)
    except OSError as e:
        if code_of(e) in ("InvalidRange", "416"):  # S3's answer to an offset behind the end
            return b""
        raise


def _list_one(fs: Any, path: str) -> None:
    """Asks S3 for one name of the path's bucket: fails when the bucket is missing or may not be listed."""
    fs.call_s3("list_objects_v2", Bucket=path.partition("/")[0], MaxKeys=1)


def _create(fs: Any, path: str, data: bytes) -> bool:
    """Writes a new object; False when it exists."""
    try:
        fs.pipe_file(path, data, mode="create")
    except OSError as e:
        if isinstance(e, FileExistsError) or code_of(e) in ("PreconditionFailed", "412"):
            return False
        raise
    return True


def _is_local(fs: Any) -> bool:
    return isinstance(fs, fsspec.implementations.local.LocalFileSystem)
