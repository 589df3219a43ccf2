"""The error classes: each is one sentence for the user and one exit code for the shell.

Exit codes (documented in docs/exit-codes.md):

==== ===================== ==========================================================
code class                 meaning
==== ===================== ==========================================================
0    -                     done; the counts add up
1    (any other)           a defect of ours; the traceback is shown
2    ConfigError           a recipe or an argument is wrong; nothing was written
3    ManifestError         a manifest or metadata file is wrong; nothing was written
4    StorageError          missing bucket, bad credentials, no permission for the run
5    ModelError            the Whisper weights cannot be loaded
6    StoreError            a shard or an index of the store is damaged or foreign
7    FencedError           another driver has taken over this store
8    TooManyFailuresError  more tracks failed than `max_failure_rate` allows
9    ReconciliationError   tracks in is not ok + failed, each once
10   ClusterError          Ray cannot be started, or has not the resources the recipe asks for
11   TrainingError         training cannot go on: the loss is NaN or infinite
75   TransientError        a passing fault outlasted the retries: run the same command again
130  (interrupted)         stopped by the user: run the same command again
==== ===================== ==========================================================
"""

from __future__ import annotations


class WealyError(Exception):
    """Base of all errors that a user can act on: `str(error)` is one clear sentence."""

    exit_code = 1


class ConfigError(WealyError):
    """A recipe or command-line argument is wrong."""

    exit_code = 2


class ManifestError(WealyError):
    """A manifest, or the metadata it is built from, breaks the contract."""

    exit_code = 3


class StorageError(WealyError):
    """Storage refuses the run as a whole: missing bucket, bad credentials, no permission."""

    exit_code = 4


class ModelError(WealyError):
    """Whisper weights are missing, damaged or of a foreign kind."""

    exit_code = 5


class StoreError(WealyError):
    """A shard or an index is damaged, or belongs to another extractor."""

    exit_code = 6


class FencedError(WealyError):
    """Another driver has claimed the store; this one must stop."""

    exit_code = 7


class TooManyFailuresError(WealyError):
    """The share of failed tracks is above `max_failure_rate`."""

    exit_code = 8


class ReconciliationError(WealyError):
    """The counts of a finished job do not add up."""

    exit_code = 9


class ClusterError(WealyError):
    """Ray cannot be started or lacks what the recipe asks for."""

    exit_code = 10


class TrainingError(WealyError):
    """Training cannot go on: the loss is NaN or infinite."""

    exit_code = 11


class TransientError(WealyError):
    """A passing fault (network, storage server, preemption) outlasted the retries; resume later."""

    exit_code = 75


class TrackError(WealyError):
    """One track's own fault: it becomes a `failed` row and costs no other track anything.

    Args:
        error_type: Stable snake_case name, one of `TRACK_ERROR_TYPES`.
        message: One sentence that says what is wrong with this track.
    """

    def __init__(self, error_type: str, message: str) -> None:
        assert error_type in TRACK_ERROR_TYPES, error_type
        super().__init__(error_type, message)
        self.error_type = error_type
        self.message = message

    def __str__(self) -> str:
        return self.message


TRACK_ERROR_TYPES = {
    "missing_object": "the audio object does not exist",
    "forbidden_object": "no permission for this one object",
    "empty_file": "the object has zero bytes",
    "not_audio": "the bytes are no audio or video container",
    "no_audio_stream": "a container without an audio stream",
    "zero_duration": "an audio stream without samples",
    "invalid_samples": "samples are NaN or infinite",
    "decoder_error": "the codec refuses the stream",
    "decoder_crashed": "the codec crashed its process",
    "decoder_timeout": "the codec did not finish in time",
    "decoder_out_of_memory": "the codec asked for more memory than allowed",
    "invalid_states": "states are NaN, or too large for float16",
    "too_many_windows": "more windows than a row can number (32,767)",
    "engine_crashed": "the track killed its engine process repeatedly, alone",
    "extraction_failed": "there are no states to embed: the track failed in extraction",
    "no_states": "there are no states to embed of the kinds that the model is fed",
    "invalid_embedding": "the model's vectors are NaN or infinite",
}
"""Every `error_type` a failed row can carry, with its meaning."""
