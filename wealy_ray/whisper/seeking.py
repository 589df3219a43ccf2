"""How `whisper.transcribe` turns one window's tokens into segments, and where the next window begins.

Source: `transcribe` of openai-whisper 20250625, without word timestamps. Positions are mel frames of 10 ms; a
timestamp token counts steps of 20 ms, two frames.
"""

from __future__ import annotations

from dataclasses import dataclass

from whisper.audio import HOP_LENGTH, N_FRAMES, SAMPLE_RATE
from whisper.model import ModelDimensions

from wealy_ray.whisper.vocabulary import Vocabulary


def seconds(frames: int) -> float:
    """Length of mel frames; the same operations as in `transcribe`, so that the last digit is the same."""
    return frames * HOP_LENGTH / SAMPLE_RATE


@dataclass(frozen=True)
class Segment:
    """A stretch of a track with its text, as in the list `segments` of `whisper.transcribe`."""

    seek: int
    """First mel frame of the window that it was heard in."""
    start_s: float
    end_s: float
    text: str
    """Empty, like `tokens`, when the segment has no length or no text."""
    tokens: list[int]


@dataclass(frozen=True)
class Span:
    """Where a window lies in its track, in mel frames."""

    seek: int
    size: int
    """At most `N_FRAMES`; less at the end of the track."""


class Seeker:
    """Cuts tokens into segments for one model.

    Args:
        vocabulary: The model's token ids.
        dims: The model's sizes.
    """

    def __init__(self, vocabulary: Vocabulary, dims: ModelDimensions):
        self.vocabulary = vocabulary
        self.frames_per_step = N_FRAMES // dims.n_audio_ctx  # 2
        self.step_s = seconds(self.frames_per_step)  # 0.02

    def cut(self, span: Span, tokens: list[int]) -> tuple[list[Segment], int]:
        """Segments of a window that was not skipped.

        Args:
            span: The window.
            tokens: What was sampled, without EOT.

        Returns:
            The segments, and the frame where the next window begins.
        """
        begin = self.vocabulary.timestamp_begin
        is_timestamp = [token >= begin for token in tokens]
        ends_with_one = is_timestamp[-2:] == [False, True]
        cuts = [i for i in range(1, len(tokens)) if is_timestamp[i - 1] and is_timestamp[i]]
        offset_s = seconds(span.seek)
        if not cuts:
            steps = next((token - begin for token in reversed(tokens) if token >= begin), 0)
            duration_s = steps * self.step_s if steps else seconds(span.size)
            segments = [self._segment(span, offset_s, offset_s + duration_s, tokens)]
            return segments, span.seek + span.size
        if ends_with_one:  # nothing is said after it
            cuts.append(len(tokens))
        segments = []
        for first, last in zip([0, *cuts], cuts, strict=False):
            part = tokens[first:last]
            start_s = offset_s + (part[0] - begin) * self.step_s
            segments.append(self._segment(span, start_s, offset_s + (part[-1] - begin) * self.step_s, part))
        if ends_with_one:
            return segments, span.seek + span.size
        # The rest of the window is an unfinished segment: it is heard again.
        return segments, span.seek + (tokens[cuts[-1] - 1] - begin) * self.frames_per_step

    def _segment(self, span: Span, start_s: float, end_s: float, tokens: list[int]) -> Segment:
        tokenizer = self.vocabulary.tokenizer
        text = tokenizer.decode([token for token in tokens if token < self.vocabulary.eot])
        is_empty = start_s == end_s or not text.strip()
        return Segment(span.seek, start_s, end_s, "" if is_empty else text, [] if is_empty else tokens)
