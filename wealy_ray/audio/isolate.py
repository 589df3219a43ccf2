"""Decoding in a disposable process: a codec's crash, hang or greed costs one track and nothing else."""

from __future__ import annotations

import json
from types import TracebackType

import numpy as np

from wealy_ray.audio.decode import Decoded
from wealy_ray.audio.frames import RANGE
from wealy_ray.audio.process import ChildDied, ChildProcess, ChildTimeout
from wealy_ray.audio.source import BLOCK_BYTES, ByteSource, read_exactly
from wealy_ray.audio.windows import SAMPLE_RATE_HZ
from wealy_ray.errors import TRACK_ERROR_TYPES, TrackError

# not imported from `config`, which knows the same limit: the child must start fast
CODEC_BYTES = 48 << 20  # the block cache, and what a common codec takes for itself
START_TIMEOUT_S = 60.0
_JSON_BYTES = 1 << 20


class IsolatedDecoder:
    """`decode.decode` in a child process that is reused while it behaves and replaced when it does not.

    The child has no files and no network: it asks for byte ranges, and `source.read` runs here, in the
    caller's thread, with its exceptions unchanged. Use one decoder from one thread at a time; the thread that
    started the child must outlive it (the kernel kills the child with that thread; the next call then starts
    another).

    Args:
        max_duration_s: Decoding stops here.
        timeout_s: Limit per track, counted in the child only, not while `source.read` runs.
        memory_bytes: Address space per track on top of what Python and the libraries take at start (200 MiB,
            of which 50 MiB are resident). At least 48 MiB and 128 kB per second of `max_duration_s`: the
            samples and their copy.
        recycle_after: Tracks per child: what a codec leaks does not add up.
    """

    def __init__(
        self, max_duration_s: float, timeout_s: float, memory_bytes: int, *, recycle_after: int = 500
    ) -> None:
        least_bytes = CODEC_BYTES + 2 * 4 * round(max_duration_s * SAMPLE_RATE_HZ)
        if memory_bytes < least_bytes:
            raise ValueError(
                f"memory_bytes must be at least {least_bytes} for {max_duration_s:g} s, not {memory_bytes}"
            )
        self._max_duration_s = max_duration_s
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._recycle_after = recycle_after
        self._child: ChildProcess | None = None
        self._num_tracks = 0

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the child, if there is one; a later `decode` starts another."""
        if self._child is not None:
            self._child.kill()
        self._child = None

    def decode(self, source: ByteSource) -> Decoded:
        """Decode one track.

        Raises:
            TrackError: As `decode.decode`, and `decoder_crashed`, `decoder_timeout`, `decoder_out_of_memory`.
            RuntimeError: The child cannot be started: no fault of the track.
            Exception: Whatever `source.read` raises, unchanged.
        """
        if source.size == 0:
            raise TrackError("empty_file", "the object has zero bytes")
        try:
            return self._decode(source)
        except ChildDied as e:
            # A SIGKILL from outside says nothing about the track (the machine was short of memory, perhaps
            # by somebody else's doing, or the starting thread ended): one more try.
            if not e.is_foreign_kill or e.was_at_memory_limit:
                raise self._fault(e) from e
        try:
            return self._decode(source)
        except ChildDied as e:
            raise self._fault(e) from e

    def _decode(self, source: ByteSource) -> Decoded:
        child = self._ready_child()
        child.start_clock(self._timeout_s)
        try:
            decoded = self._converse(child, source)
        except TrackError as e:
            if e.error_type == "decoder_out_of_memory":
                self.close()
            raise
        except ChildTimeout as e:
            self.close()
            raise TrackError("decoder_timeout", f"decoding took longer than {self._timeout_s:g} s") from e
        except BaseException:  # the child is dead, or stuck in the middle of a track
            self.close()
            raise
        return decoded

    def _ready_child(self) -> ChildProcess:
        if self._child is not None and (self._num_tracks >= self._recycle_after or not self._child.is_alive):
            self.close()
        if self._child is None:
            self._child = ChildProcess(self._memory_bytes, start_timeout_s=START_TIMEOUT_S)
            self._num_tracks = 0
        self._num_tracks += 1
        return self._child

    def _converse(self, child: ChildProcess, source: ByteSource) -> Decoded:
        """Send the request, serve the child's reads and take its answer."""
        request = {"size": source.size, "max_duration_s": self._max_duration_s}
        child.send(b"D", json.dumps(request).encode())
        while True:
            kind, payload = child.receive(max_bytes=_JSON_BYTES)
            if kind == b"R" and len(payload) == RANGE.size:
                offset, length = RANGE.unpack(payload)
                if length > BLOCK_BYTES or offset + length > source.size:
                    raise child.died("it asked for bytes that are not there")
                child.send(b"B", read_exactly(source, offset, length))
            elif kind in (b"S", b"E"):
                break
            else:
                raise child.died("it does not speak the protocol")
        try:
            answer = json.loads(payload)
            if kind == b"E":
                error_type, message = answer["error_type"], str(answer["message"])
            else:
                warnings = tuple(str(warning) for warning in answer["warnings"])
        except (ValueError, KeyError, TypeError) as e:
            raise child.died("it does not speak the protocol") from e
        if kind == b"E":
            if error_type not in TRACK_ERROR_TYPES:
                raise child.died("it does not speak the protocol")
            raise TrackError(error_type, message)
        kind, payload = child.receive(max_bytes=4 * round(self._max_duration_s * SAMPLE_RATE_HZ))
        if kind != b"P" or len(payload) % 4:
            raise child.died("it does not speak the protocol")
        samples = np.frombuffer(payload, "<f4")
        return Decoded(samples, len(samples) / SAMPLE_RATE_HZ, warnings)

    @staticmethod
    def _fault(death: ChildDied) -> TrackError:
        if death.was_at_memory_limit:
            return TrackError(
                "decoder_out_of_memory", f"the decoder died at its memory limit ({death.cause})"
            )
        return TrackError("decoder_crashed", f"the decoder died: {death.cause}")
