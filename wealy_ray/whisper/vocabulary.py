"""Token ids of one model: the start sequence, the languages, and what may never be sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from whisper.model import Whisper
from whisper.tokenizer import Tokenizer, get_tokenizer

from wealy_ray.errors import ConfigError


@dataclass(frozen=True)
class Vocabulary:
    """The ids that decoding needs, read once from openai-whisper's tokenizer."""

    tokenizer: Tokenizer
    language_codes: tuple[str, ...]
    """Code of the language token `first_language + i`; empty on English-only models."""

    @classmethod
    def of(cls, model: Whisper) -> Vocabulary:
        """Read the vocabulary of `model`."""
        tokenizer = get_tokenizer(model.is_multilingual, num_languages=model.num_languages)
        if not model.is_multilingual:
            return cls(tokenizer, ())
        first = tokenizer.sot + 1
        # The tokenizer lists them in the order of a set, another one in each process.
        code_of = dict(zip(tokenizer.all_language_tokens, tokenizer.all_language_codes, strict=True))
        assert sorted(code_of) == list(range(first, first + len(code_of))), "languages are not contiguous"
        return cls(tokenizer, tuple(code_of[token] for token in sorted(code_of)))

    @property
    def sot(self) -> int:
        """Start of transcript."""
        return self.tokenizer.sot

    @property
    def eot(self) -> int:
        """End of text; every text token has a smaller id."""
        return self.tokenizer.eot

    @property
    def no_speech(self) -> int:
        """The token whose probability at the start of transcript says "no speech"."""
        return self.tokenizer.no_speech

    @property
    def timestamp_begin(self) -> int:
        """The token of 0.00 s; every id from here on is a timestamp."""
        return self.tokenizer.timestamp_begin

    @property
    def first_language(self) -> int:
        """The first language token; the others follow it."""
        return self.tokenizer.sot + 1

    def check_language(self, code: str) -> None:
        """Refuse a language the model has no token for.

        Raises:
            ConfigError: With the valid codes.
        """
        valid = self.language_codes or ("en",)
        if code not in valid:
            raise ConfigError(f"language {code!r} is unknown to this model; valid are {', '.join(valid)}")

    def start_sequence(self, language: str | None, *, task: str, timestamps: bool) -> list[int]:
        """Initial tokens of a window.

        Args:
            language: Forced language, or None: then a language token is put in as a place holder, to be
                overwritten by the detected one. English-only models have neither language nor task.
            task: `transcribe` or `translate`.
            timestamps: False adds `<|notimestamps|>`.

        Returns:
            Token ids, the start of transcript first.
        """
        tokens = [self.sot]
        if self.language_codes:
            index = self.language_codes.index(language) if language is not None else 0
            task_token = self.tokenizer.transcribe if task == "transcribe" else self.tokenizer.translate
            tokens += [self.first_language + index, task_token]
        return tokens if timestamps else [*tokens, self.tokenizer.no_timestamps]

    def prompt_tokens(self, text: str) -> list[int]:
        """A prompt's token ids, as whisper encodes it.

        Raises:
            ConfigError: The text spells a special token, such as `<|en|>`.
        """
        try:
            return self.tokenizer.encode(" " + text.strip())
        except ValueError as error:
            raise ConfigError(f"initial_prompt is {text!r}; it may not spell special tokens") from error

    def context(self, prompt: Sequence[int], *, at_most: int) -> list[int]:
        """What stands before the start of transcript: the last `at_most` tokens of a prompt behind their mark.

        Empty without a prompt.
        """
        return [self.tokenizer.sot_prev, *prompt[-at_most:]] if prompt else []

    def suppressed(self, *, timestamps: bool) -> list[int]:
        """Ids never sampled: non-speech symbols and control tokens (whisper's `suppress_tokens="-1"`)."""
        tokenizer = self.tokenizer
        control = {
            tokenizer.transcribe,
            tokenizer.translate,
            tokenizer.sot,
            tokenizer.sot_prev,
            tokenizer.sot_lm,
            tokenizer.no_speech,
        }
        if timestamps:
            control.add(tokenizer.no_timestamps)
        return sorted(control.union(tokenizer.non_speech_tokens))

    def blank(self) -> list[int]:
        """Ids that may not come first in a window (whisper's `suppress_blank`)."""
        return [*self.tokenizer.encode(" "), self.eot]
