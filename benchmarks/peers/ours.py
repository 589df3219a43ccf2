"""The engine, kept running between rounds as in production."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from benchmarks.peers import Decoded, Setting
from wealy_ray.whisper import Engine, EngineStats


class Ours:
    """All windows are submitted at once; the engine batches them as it likes.

    Args:
        setting: What all contenders share.
        engine: Started.
    """

    def __init__(self, setting: Setting, engine: Engine):
        self.setting, self.engine = setting, engine
        self._seen = engine.stats()

    def encoder(self) -> None:
        """The encoder alone, from log-mel."""
        for future in [self.engine.encode(mel) for mel in self.setting.mels]:
            future.result()

    def decoder(self) -> Decoded:
        """From encoder features."""
        return self._decode(self.setting.features)

    def whole(self) -> Decoded:
        """From PCM."""
        return self._decode(self.setting.log_mels())

    def _decode(self, inputs: list[Tensor]) -> Decoded:
        pairs = zip(inputs, self.setting.languages, strict=True)
        futures = [self.engine.submit(window, language) for window, language in pairs]
        return [(future.result().tokens, future.result().states) for future in futures]

    def take_stats(self) -> EngineStats:
        """What the engine has counted since the last call."""
        before, self._seen = asdict(self._seen), self.engine.stats()
        return EngineStats(**{name: count - before[name] for name, count in asdict(self._seen).items()})
