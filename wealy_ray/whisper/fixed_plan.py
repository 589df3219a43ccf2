"""The `fixed` window plan: independent windows, one language per track, no fallback, the same prompt or none.

The language is detected on a track's first window and forced on the others, which are submitted as soon as it
is known, while the first window still decodes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from wealy_ray.whisper.engine import Engine
from wealy_ray.whisper.request import WindowFuture
from wealy_ray.whisper.types import Language, WindowResult


async def decode_track(engine: Engine, mels: Tensor) -> list[WindowResult]:
    """Decode one track's windows.

    Args:
        engine: A started engine, shared with other tracks.
        mels: Log-mel windows in order, [W, n_mels, 3000], or features [W, 1500, d].

    Returns:
        One result per window, in order; all carry the first window's language and its probability.

    Raises:
        RuntimeError: When the engine is closed or fails.
    """
    windows = list(mels)
    futures: list[WindowFuture] = []
    language: Language | None = None
    try:
        if windows and engine.detects_language:
            if engine.prompt:  # whisper asks for the language without a prompt
                if windows[0].shape[0] != engine.dims.n_audio_ctx:
                    windows[0] = await asyncio.wrap_future(engine.encode(windows[0]))
                language = await asyncio.wrap_future(engine.detect_language(windows[0]))
            else:
                futures.append(engine.submit(windows[0]))
                language = await asyncio.wrap_future(futures[0].language)
        code = language.code if language else None
        futures.extend(engine.submit(mel, code, prompt=engine.prompt) for mel in windows[len(futures) :])
        results = await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
    except BaseException:
        for future in futures:
            future.cancel()  # withdraws the windows that are not in the engine yet
        raise
    if language is None and results:
        language = Language(results[0].language, results[0].language_probability)
    return [
        replace(result, language=language.code, language_probability=language.probability)
        for result in results
        if language
    ]


def decode_tracks(engine: Engine, tracks: Sequence[Tensor]) -> list[list[WindowResult]]:
    """Decode several tracks at once, without asyncio.

    Args:
        engine: A started engine.
        tracks: Windows of each track, as for `decode_track`.

    Returns:
        The results of each track, in order.

    Raises:
        RuntimeError: When the engine is closed or fails.
    """

    async def all_of_them() -> list[list[WindowResult]]:
        return await asyncio.gather(*(decode_track(engine, mels) for mels in tracks))

    return asyncio.run(all_of_them())
