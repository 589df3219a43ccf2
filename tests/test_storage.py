from __future__ import annotations

import errno
import os
import pickle
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.s3_server import LIMITED_BUCKET, S3Server
from wealy_ray.config import StorageSettings
from wealy_ray.errors import ConfigError, StorageError, TransientError
from wealy_ray.storage import (
    ObjectForbiddenError,
    ObjectMissingError,
    Storage,
    access,
    check_uri,
    join,
    scheme_of,
)

Place = tuple[Storage, str]


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A storage and an empty folder of it."""
    if request.param == "local":
        return Storage(), str(tmp_path / "data")
    if request.param == "memory":
        return Storage(), f"memory://{uuid.uuid4().hex}"
    s3 = request.getfixturevalue("s3")
    return s3.storage(), f"{s3.bucket('storage')}/{uuid.uuid4().hex}"


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return f"{s3.bucket('storage')}/{uuid.uuid4().hex}"


def test_write_read_and_ranges(place: Place) -> None:
    storage, base = place
    uri, data = join(base, "a/b.bin"), os.urandom(1000)
    storage.write(uri, b"older")
    storage.write(uri, data)
    assert storage.read(uri) == data
    for offset, length in ((0, 10), (0, 1000), (990, 10), (990, 500), (1000, 5), (5000, 5), (7, 0), (500, 1)):
        assert storage.read_range(uri, offset, length) == data[offset : offset + length]
    info = storage.info(uri)
    assert (info.uri, info.size) == (uri, 1000)
    assert info.etag
    storage.write(join(base, "empty"), b"")
    assert storage.read(join(base, "empty")) == b""
    assert storage.read_range(join(base, "empty"), 0, 5) == b""
    assert storage.info(join(base, "empty")).size == 0


def test_another_content_has_another_etag(place: Place) -> None:
    storage, base = place
    uri = join(base, "a")
    storage.write(uri, b"one")
    first = storage.info(uri).etag
    assert storage.info(uri).etag == first
    storage.write(uri, b"two")
    assert storage.info(uri).etag != first


def test_missing_objects_and_folders(place: Place) -> None:
    storage, base = place
    storage.write(join(base, "folder/x"), b"1")
    for uri in (join(base, "none"), join(base, "folder"), join(base, "folder/x/y")):
        calls: list[Callable[[], Any]] = [
            lambda uri=uri: storage.info(uri),
            lambda uri=uri: storage.read(uri),
            lambda uri=uri: storage.read_range(uri, 0, 5),
        ]
        for call in calls:
            with pytest.raises(ObjectMissingError, match=r"does not exist|is a folder") as caught:
                call()
            assert uri in str(caught.value)
    assert storage.exists(join(base, "folder/x"))


def test_delete_is_quiet_about_what_is_gone(place: Place) -> None:
    storage, base = place
    storage.write(join(base, "x"), b"1")
    for _ in range(2):
        storage.delete(join(base, "x"))
        assert not storage.exists(join(base, "x"))


def test_list_and_folders(place: Place) -> None:
    storage, base = place
    assert list(storage.list(base)) == []
    assert storage.folders(base) == []
    names = ["a/2", "a/10", "a/b/c", "ab/x", "top"]
    for name in names:
        storage.write(join(base, name), name.encode())
    found = list(storage.list(base))
    folder = base.rsplit("/", 1)[-1]
    assert [i.uri.split(f"/{folder}/", 1)[1] for i in found] == sorted(names)
    assert [i.size for i in found] == [len(n) for n in sorted(names)]
    assert [i.etag for i in found] == [storage.info(i.uri).etag for i in found]
    assert [storage.read(i.uri) for i in found] == [n.encode() for n in sorted(names)]
    # a prefix is a folder, not the beginning of a name
    assert {i.uri.rsplit("/", 1)[-1] for i in storage.list(join(base, "a"))} == {"2", "10", "c"}
    assert storage.folders(base) == ["a", "ab"]
    assert storage.folders(join(base, "a")) == ["b"]


def test_write_if_absent(place: Place) -> None:
    storage, base = place
    uri = join(base, "folder/x")
    assert storage.write_if_absent(uri, b"first")
    assert not storage.write_if_absent(uri, b"second")
    assert storage.write_if_absent(uri, b"first")  # a retried request finds its own data
    assert storage.read(uri) == b"first"


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_of_sixteen_writers_of_one_name_one_wins(kind: str, tmp_path: Path, request: Any) -> None:
    if kind == "local":
        storage, base = Storage(), str(tmp_path)
    else:
        s3 = request.getfixturevalue("s3")
        storage, base = s3.storage(), f"{s3.bucket('storage')}/{uuid.uuid4().hex}"
        storage.exists(join(base, "x"))  # the connection is made before the race
    for turn in range(2):
        uri, gate = join(base, f"turn-{turn}"), threading.Barrier(16)

        def race(number: int, uri: str = uri, gate: threading.Barrier = gate) -> bool:
            gate.wait()
            return storage.write_if_absent(uri, f"writer {number}".encode() * 1000)

        with ThreadPoolExecutor(16) as pool:
            wins = list(pool.map(race, range(16)))
        assert sum(wins) == 1
        assert storage.read(uri) == f"writer {wins.index(True)}".encode() * 1000


def test_large_objects_in_parts(bucket: str, s3: S3Server) -> None:
    storage, uri, data = s3.storage(), join(bucket, "large"), os.urandom(1 << 20) * 104
    storage.write(uri, data)
    assert storage.read_range(uri, 52_428_790, 20) == data[52_428_790:52_428_810]
    assert not storage.write_if_absent(uri, data + b"x")
    assert storage.info(uri).size == len(data)
    storage.delete(uri)


def test_names_with_odd_characters(place: Place) -> None:
    storage, base = place
    uri = join(base, "a b#c?d=1%20[x]*\u00e9+&;!'.mp3")
    storage.write(uri, b"z")
    assert storage.read(uri) == b"z"
    assert storage.read_range(uri, 0, 1) == b"z"
    assert storage.info(uri).size == 1
    assert [storage.read(i.uri) for i in storage.list(base)] == [b"z"]


def test_a_storage_travels_to_workers(place: Place) -> None:
    storage, base = place
    storage.write(join(base, "x"), b"1")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.settings == storage.settings
    assert copy.read(join(base, "x")) == b"1"


def test_scheme_and_case(bucket: str, s3: S3Server) -> None:
    assert [scheme_of(u) for u in ("/a/b", "a:b/c", "S3://x", "memory://y", "c:/d")] == [
        "file",
        "file",
        "s3",
        "memory",
        "file",
    ]
    storage = s3.storage()
    storage.write(join(bucket, "x"), b"1")
    for scheme in ("S3", "s3a"):
        assert storage.read(join(bucket, "x").replace("s3", scheme, 1)) == b"1"


def test_join() -> None:
    assert join("/a/", "b", "/c/") == "/a/b/c"
    assert join("s3://x", "b/c") == "s3://x/b/c"
    assert join("/", "b") == "//b"
    assert join("rel", "b") == "rel/b"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:hunter2@bucket/x",
        "s3://AKIA:hunt/er2@bucket/x",
        "S3://AKIA:hunter2@bucket/x",
        "https://user:hunter2@host/x",
        "https://user:hunter2@host:80/x",
        "quatsch://user:hunter2@host/x",
        "simplecache::s3://AKIA:hunter2@bucket/x",
    ],
)
def test_credentials_in_uris_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError, match="carries credentials") as caught:
        Storage().read(uri)
    for secret in ("hunter2", "er2", "AKIA"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a@b:c",
        "http://host:8080/x@y:z",
        "http://[::1]:80/x",
        "hdfs://user@host/x",
        "/a:b@c/x",
        "a:b@c",
    ],
)
def test_colons_elsewhere_are_no_credentials(uri: str) -> None:
    check_uri(uri)


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown URI scheme 'quatsch' in quatsch://x"):
        Storage().read("quatsch://x")


# Local disk


def test_a_reader_sees_a_whole_file_or_none(tmp_path: Path) -> None:
    storage, uri = Storage(), str(tmp_path / "x")
    contents = [bytes([i]) * 300_000 for i in range(2)]
    storage.write(uri, contents[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for data in contents:
                storage.write(uri, data)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(200):
            assert storage.read(uri) in contents
            assert [Path(i.uri).name for i in storage.list(str(tmp_path))] == ["x"]
    finally:
        stop.set()
        thread.join()
    assert os.listdir(tmp_path) == ["x"]


def test_listing_survives_files_that_vanish(tmp_path: Path) -> None:
    storage = Storage()
    for i in range(50):
        storage.write(str(tmp_path / "stays" / f"{i}"), b"x")
    stop = threading.Event()

    def churn() -> None:
        i = 0
        while not stop.is_set():
            storage.write(str(tmp_path / "stays" / f"gone-{i % 7}"), b"y")
            storage.delete(str(tmp_path / "stays" / f"gone-{i % 7}"))
            i += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(200):
            names = {Path(i.uri).name for i in storage.list(str(tmp_path))}
            assert names >= {str(i) for i in range(50)}
    finally:
        stop.set()
        thread.join()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (Storage().write, Storage().write_if_absent):
        with pytest.raises(StorageError, match="No space left on device"):
            write(str(tmp_path / "x"), b"data")
    assert os.listdir(tmp_path) == []


def test_disks_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: str) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    storage, uri = Storage(), str(tmp_path / "x")
    assert storage.write_if_absent(uri, b"first")
    assert not storage.write_if_absent(uri, b"second")
    assert storage.read(uri) == b"first"
    assert os.listdir(tmp_path) == ["x"]


def test_names_that_no_file_can_have_are_missing_objects(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for name in ("n" * 300, "a\0b", "loop"):
        with pytest.raises(ObjectMissingError, match="does not exist"):
            Storage().read(str(tmp_path / name))


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for write in (Storage().write, Storage().write_if_absent):
        with pytest.raises(StorageError):
            write(str(tmp_path / "file" / "x"), b"data")
    with pytest.raises(StorageError, match=r"cannot be used as a folder: .*file is a file"):
        Storage().check_folder(str(tmp_path / "file" / "store"))


def test_check_folder_writes_nothing(tmp_path: Path) -> None:
    Storage().check_folder(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    (tmp_path / "x").chmod(0)
    with pytest.raises(ObjectForbiddenError, match="no permission for"):
        Storage().read(str(tmp_path / "x"))
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="no permission on"):
        Storage().check_folder(str(tmp_path / "store"))


def test_a_passing_fault_of_the_disk_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x")
    monkeypatch.setattr(access, "FIRST_PAUSE_S", 0.01)
    storage, faults = Storage(), [errno.EIO, errno.ESTALE]
    fs, _ = storage._open(str(tmp_path))
    read = fs.cat_file

    def flaky(path: str, **kwargs: Any) -> bytes:
        if faults:
            raise OSError(faults.pop(), "passing")
        return read(path, **kwargs)

    monkeypatch.setattr(fs, "cat_file", flaky)
    assert storage.read(str(tmp_path / "x")) == b"x"
    assert faults == []


# S3


def all_calls(storage: Storage, uri: str) -> list[Callable[[], Any]]:
    return [
        lambda: storage.info(uri),
        lambda: storage.exists(uri),
        lambda: storage.read(uri),
        lambda: storage.read_range(uri, 0, 5),
        lambda: list(storage.list(uri)),
        lambda: storage.folders(uri),
        lambda: storage.write(uri, b"x"),
        lambda: storage.write_if_absent(uri, b"x"),
        lambda: storage.check_folder(uri),
    ]


def test_a_missing_bucket_is_a_fault_of_the_run(s3: S3Server) -> None:
    for call in all_calls(s3.storage(), "s3://no-such-bucket/a/b"):
        with pytest.raises(StorageError, match="the bucket 'no-such-bucket' does not exist") as caught:
            call()
        assert type(caught.value) is StorageError


@pytest.mark.parametrize("wrong", ["secret", "key"])
def test_wrong_credentials_are_a_fault_of_the_run(
    s3: S3Server, bucket: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.storage().write(join(bucket, "x"), b"1")
    key, secret = s3.admin
    identity = (key, "wrong-secret") if wrong == "secret" else ("wrong-key", secret)
    for name, value in s3.env(identity).items():
        monkeypatch.setenv(name, value)
    for call in all_calls(s3.storage(), join(bucket, "x")):
        with pytest.raises(StorageError, match="the credentials are not accepted") as caught:
            call()
        assert type(caught.value) is StorageError
        assert not any(word in str(caught.value) for word in (key, *identity, secret))


def test_no_credentials_are_a_fault_of_the_run(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for call in all_calls(s3.storage(), join(bucket, "x")):
        with pytest.raises(StorageError, match="the credentials are not accepted") as caught:
            call()
        assert type(caught.value) is StorageError


def test_a_forbidden_object_is_its_own_fault(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = s3.bucket(LIMITED_BUCKET)
    s3.storage().write(join(bucket, "x"), b"1")
    s3.storage().write(join(mine, "x"), b"2")
    for name, value in s3.env(s3.limited).items():
        monkeypatch.setenv(name, value)
    storage = s3.storage()
    assert storage.read(join(mine, "x")) == b"2"
    for call in all_calls(storage, join(bucket, "x"))[:-1]:
        with pytest.raises(ObjectForbiddenError, match="no permission for s3://storage"):
            call()
    with pytest.raises(ObjectForbiddenError):
        storage.write(join(mine, "y"), b"x")
    with pytest.raises(ObjectMissingError):
        storage.read(join(mine, "none"))
    storage.check_folder(mine)
    with pytest.raises(StorageError, match="no permission to use") as caught:
        storage.check_folder(bucket)
    assert type(caught.value) is StorageError


def test_a_refused_connection_is_transient(s3: S3Server) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        endpoint = f"http://127.0.0.1:{s.getsockname()[1]}"
        storage = Storage(StorageSettings(s3_endpoint_url=endpoint, retry_for_s=2.0))
        began = time.monotonic()
        with pytest.raises(TransientError, match="run the same command again") as caught:
            storage.read("s3://bucket/x")
        assert 0.5 < time.monotonic() - began < 20
        assert caught.value.exit_code == 75
        impatient = Storage(StorageSettings(s3_endpoint_url=endpoint, retry_for_s=0.0))
        for call in all_calls(impatient, "s3://bucket/x")[:3]:
            with pytest.raises(TransientError):
                call()
    assert s3.admin[1] not in str(caught.value)


@pytest.mark.parametrize(("status", "is_transient"), [(503, True), (429, True), (400, False)])
def test_answers_of_a_failing_server(s3: S3Server, status: int, is_transient: bool) -> None:
    with _FailingServer(status) as endpoint:
        storage = Storage(StorageSettings(s3_endpoint_url=endpoint, s3_region="us-east-1", retry_for_s=0.0))
        for call in (
            lambda: storage.read_range("s3://bucket/x", 0, 5),
            lambda: storage.info("s3://bucket/x"),
        ):
            with pytest.raises(TransientError if is_transient else StorageError):
                call()
    assert s3 is not None  # its credentials are in the environment


def test_a_server_that_comes_back_in_time_is_not_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    server = S3Server().start()
    try:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        storage, base = server.storage(retry_for_s=90.0), server.bucket("bucket")
        storage.write(join(base, "x"), b"1")
        server.stop()
        with ThreadPoolExecutor(3) as pool:
            calls = [
                pool.submit(storage.read, join(base, "x")),
                pool.submit(storage.write_if_absent, join(base, "y"), b"2"),
                pool.submit(lambda: list(storage.list(base))),
            ]
            time.sleep(1.0)
            assert not any(c.done() for c in calls)
            server.start()
            read, written, listed = (c.result() for c in calls)
        assert (read, written) == (b"1", True)
        assert join(base, "x") in {i.uri for i in listed}
        assert storage.read(join(base, "y")) == b"2"
        assert "retrying for up to 90 s" in caplog.text
    finally:
        server.close()


class _FailingServer:
    """An HTTP server that answers everything with one status and no body; gives its endpoint."""

    def __init__(self, status: int) -> None:
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_PUT = do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_a_web_server_that_does_not_answer_is_not_a_missing_object() -> None:
    storage = Storage(StorageSettings(retry_for_s=0))
    with pytest.raises(TransientError, match="storage did not answer"):
        storage.info("http://127.0.0.1:9/song.mp3")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, ObjectMissingError),
        (410, ObjectMissingError),
        (403, ObjectForbiddenError),
        (503, TransientError),
    ],
)
def test_answers_of_a_web_server(status: int, kind: type[Exception]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/song.mp3"
        with pytest.raises(kind) as raised:
            Storage(StorageSettings(retry_for_s=0)).info(uri)
        assert type(raised.value) is kind
        server.shutdown()


@pytest.mark.parametrize("query", ["X-Amz-Signature=abc", "sig=abc", "a=1&token=abc"])
def test_signed_addresses_are_refused_and_not_repeated(query: str) -> None:
    with pytest.raises(ConfigError, match="carries a signature or token") as raised:
        check_uri(f"https://host/song.mp3?{query}")
    assert "abc" not in str(raised.value)


def test_canonical_is_how_list_spells_it(tmp_path: Path) -> None:
    storage = Storage()
    storage.write(f"file://{tmp_path}/a/x", b"1")
    for folder in (str(tmp_path / "a"), f"file://{tmp_path}/a"):
        (found,) = storage.list(folder)
        assert found.uri == f"{storage.canonical(folder)}/x"
    storage.write("memory://canon/x", b"1")
    (found,) = storage.list("memory://canon")
    assert found.uri == f"{storage.canonical('memory://canon')}/x"
