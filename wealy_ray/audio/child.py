"""The decoder process: `python -m wealy_ray.audio.child PARENT_PID MEMORY_BYTES`, started by `isolate`.

It has no access to the track but through its parent: it asks for byte ranges and answers with samples.

Frames on stdin and stdout: kind (1 byte), payload length (uint32, little endian), payload.

==== ============== ============================================================
kind direction      payload
==== ============== ============================================================
H    child, once    JSON: `vm_bytes`, the address space before any track
D    parent         JSON: `size` (bytes of the object), `max_duration_s`
R    child          offset (uint64), length (uint32): the bytes it wants
B    parent         the bytes
S    child          JSON: `warnings`; a `P` follows
P    child          float32 samples, little endian
E    child          JSON: `error_type`, `message`; the track has failed
==== ============== ============================================================
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import BinaryIO

import av.logging

from wealy_ray.audio.decode import decode
from wealy_ray.audio.frames import HEADER, RANGE
from wealy_ray.errors import TrackError

PR_SET_PDEATHSIG = 1


class Pipe:
    """The two ends of the conversation, seen from the child, which ends with it: there is nothing to clean up."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self._incoming = incoming
        self._outgoing = outgoing

    def send(self, kind: bytes, payload: bytes | memoryview) -> None:
        """Write one frame."""
        try:
            self._outgoing.write(HEADER.pack(kind, len(payload)))
            self._outgoing.write(payload)
            self._outgoing.flush()
        except BrokenPipeError:
            os._exit(0)

    def receive(self, kind: bytes) -> bytes:
        """Read one frame, which must be of the expected kind."""
        header = self._incoming.read(HEADER.size)
        got, length = HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0)
        payload = self._incoming.read(length)
        if got != kind or len(payload) < length:
            os._exit(0)
        return payload


class PipeSource:
    """A `ByteSource` that asks the parent."""

    def __init__(self, pipe: Pipe, size: int) -> None:
        self._pipe = pipe
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """Return the `length` bytes from `offset` on."""
        self._pipe.send(b"R", RANGE.pack(offset, length))
        return self._pipe.receive(b"B")


def main() -> None:
    """Decode tracks until the parent closes the pipe."""
    parent_pid, memory_bytes = int(sys.argv[1]), int(sys.argv[2])
    _die_with(parent_pid)
    pipe = _claim_pipes()
    av.logging.set_level(None)
    vm_bytes = _limit_memory(memory_bytes)
    pipe.send(b"H", json.dumps({"vm_bytes": vm_bytes}).encode())
    while True:
        request = json.loads(pipe.receive(b"D"))
        _serve(pipe, PipeSource(pipe, request["size"]), request["max_duration_s"])


def _serve(pipe: Pipe, source: PipeSource, max_duration_s: float) -> None:
    try:
        decoded = decode(source, max_duration_s=max_duration_s)
    except TrackError as e:
        error_type, message = e.error_type, e.message
    except MemoryError:
        error_type, message = "decoder_out_of_memory", "the codec asked for more memory than allowed"
    except Exception as e:  # whatever else a broken file makes PyAV raise
        error_type, message = "decoder_error", f"{type(e).__name__}: {e}"
    else:
        pipe.send(b"S", json.dumps({"warnings": decoded.warnings}).encode())
        pipe.send(b"P", decoded.samples.astype("<f4", copy=False).data.cast("B"))
        return
    pipe.send(b"E", json.dumps({"error_type": error_type, "message": message}).encode())


def _die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, and leave no core dump."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(0)
    # 1, not 0: with 0, a kernel that pipes cores to a program (systemd-coredump) still does so.
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (min(1, hard) if hard >= 0 else 1, hard))


def _claim_pipes() -> Pipe:
    """Keep stdin and stdout for frames: whatever else prints goes to stderr."""
    incoming, outgoing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return Pipe(os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb"))


def _limit_memory(memory_bytes: int) -> int:
    """Allow `memory_bytes` of address space beyond what Python and the libraries take now."""
    with open("/proc/self/statm", encoding="ascii") as f:
        vm_bytes = int(f.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = vm_bytes + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    return vm_bytes


if __name__ == "__main__":
    main()
