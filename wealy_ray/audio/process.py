"""The parent's end of the decoder process: frames with a deadline, and the cause of its death."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

from wealy_ray.audio.frames import HEADER

_SLICE_S = 0.02  # how often a working child's memory is looked at
_STDERR_BYTES = 4096
_NEAR_LIMIT = 0.9


class ChildDied(Exception):  # noqa: N818 - an event to be told apart, not an error to be shown
    """The child ended, or talked nonsense and was killed.

    Args:
        cause: e.g. `"signal SIGSEGV"`.
        is_foreign_kill: It died of a SIGKILL that was not ours, e.g. of the kernel's out-of-memory killer.
        was_at_memory_limit: Its address space had reached the limit.
    """

    def __init__(self, cause: str, *, is_foreign_kill: bool, was_at_memory_limit: bool) -> None:
        super().__init__(cause)
        self.cause = cause
        self.is_foreign_kill = is_foreign_kill
        self.was_at_memory_limit = was_at_memory_limit


class ChildTimeout(Exception):  # noqa: N818
    """The child did not answer before its time was used up."""


class ChildProcess:
    """One decoder process and the pipes to it.

    Args:
        memory_bytes: Address space it may take beyond its own start.
        start_timeout_s: Limit for importing PyAV, in seconds.

    Raises:
        RuntimeError: It cannot be started; with the end of its stderr.
    """

    def __init__(self, memory_bytes: int, *, start_timeout_s: float) -> None:
        self._memory_bytes = memory_bytes
        self._vm_start_bytes = 0
        self._vm_most_bytes = 0
        self._stderr = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "wealy_ray.audio.child", str(os.getpid()), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=_environment(),
            start_new_session=True,
        )
        # Runs once: on `kill`, when this object is dropped, or when Python ends.
        self._finalizer = weakref.finalize(self, _end, self._process)
        self._stdin, self._stdout, self._stderr_fd = (
            stream.fileno()
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr)
            if stream is not None
        )
        for fd in (self._stdin, self._stdout, self._stderr_fd):
            os.set_blocking(fd, False)
        self._left_s = start_timeout_s
        try:
            kind, payload = self.receive(max_bytes=1024)
            if kind != b"H":
                raise self.died("it does not speak the protocol")
            self._vm_start_bytes = json.loads(payload)["vm_bytes"]
        except (ChildDied, ChildTimeout, ValueError) as e:
            self.kill()
            tail = self._stderr.decode(errors="replace").strip()
            raise RuntimeError(f"the decoder process cannot be started ({e or 'timeout'}): {tail}") from e
        except BaseException:
            self.kill()
            raise

    @property
    def is_alive(self) -> bool:
        """Whether the process is still running."""
        return self._process.poll() is None

    def start_clock(self, timeout_s: float) -> None:
        """Give the child `timeout_s` for its next track; only time spent waiting for it counts."""
        self._left_s = timeout_s
        self._vm_most_bytes = 0

    def send(self, kind: bytes, payload: bytes) -> None:
        """Write one frame.

        Raises:
            ChildDied: The child has gone.
            ChildTimeout: its time is used up.
        """
        view = memoryview(HEADER.pack(kind, len(payload)) + payload)
        while view:
            self._wait(self._stdin, select.POLLOUT)
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self.died() from None

    def receive(self, *, max_bytes: int) -> tuple[bytes, bytearray]:
        """Read one frame: its kind and its payload of at most `max_bytes`.

        Raises:
            ChildDied: The child has gone, or announces more than `max_bytes`.
            ChildTimeout: its time is used up.
        """
        kind, length = HEADER.unpack(self._read(HEADER.size))
        if length > max_bytes:
            raise self.died("it does not speak the protocol")
        return kind, self._read(length)

    def died(self, cause: str | None = None) -> ChildDied:
        """Kill what is left of the process and say what ended it."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may have closed its pipe only
            self._process.wait(timeout=0.0 if cause else 1.0)
        code = self._process.returncode
        self._drain_stderr()
        self.kill()
        limit_bytes = self._vm_start_bytes + _NEAR_LIMIT * self._memory_bytes
        if cause is None and code is not None and code < 0:
            cause = f"signal {signal.Signals(-code).name}"
        elif cause is None:
            cause = "it closed its pipe" if code is None else f"exit status {code}"
        return ChildDied(
            cause,
            is_foreign_kill=code == -signal.SIGKILL,
            was_at_memory_limit=bool(self._vm_start_bytes) and self._vm_most_bytes >= limit_bytes,
        )

    def kill(self) -> None:
        """Kill the process and whatever it started, reap it and close the pipes; can be called twice."""
        self._finalizer()

    def _read(self, length: int) -> bytearray:
        data = bytearray()
        while len(data) < length:
            self._wait(self._stdout, select.POLLIN)
            try:
                part = os.read(self._stdout, min(length - len(data), 1 << 20))
            except BlockingIOError:
                continue
            if not part:
                raise self.died()
            data += part
        return data

    def _wait(self, fd: int, event: int) -> None:
        """Wait until `fd` is ready; meanwhile drain stderr, watch the memory and count the time."""
        poll = select.poll()
        poll.register(fd, event)
        poll.register(self._stderr_fd, select.POLLIN)
        now_s = time.monotonic()
        while True:
            ready = dict(poll.poll(max(0.0, min(_SLICE_S, self._left_s)) * 1000))
            if self._stderr_fd in ready and not self._drain_stderr():
                poll.unregister(self._stderr_fd)
            before_s, now_s = now_s, time.monotonic()
            self._left_s -= now_s - before_s
            if fd in ready:
                return
            if self._left_s <= 0:
                raise ChildTimeout
            self._note_memory()

    def _drain_stderr(self) -> bool:
        """Keep the end of what stderr holds; return whether more can come."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):  # then look at the clock: it may never end
                part = os.read(self._stderr_fd, 1 << 16)
                if not part:
                    return False
                self._stderr = (self._stderr + part)[-_STDERR_BYTES:]
        return True

    def _note_memory(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
                if line.startswith("VmSize:"):
                    self._vm_most_bytes = max(self._vm_most_bytes, int(line.split()[1]) * 1024)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:  # not reaped yet, so the number is still its own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _environment() -> dict[str, str]:
    """The parent's environment, one thread, and this package where it is not installed."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = "1"
    root = Path(__file__).resolve().parents[2]
    if root.name not in ("site-packages", "dist-packages"):  # those must not come before the standard library
        environment["PYTHONPATH"] = os.pathsep.join(
            part for part in (environment.get("PYTHONPATH"), str(root)) if part
        )
    return environment
