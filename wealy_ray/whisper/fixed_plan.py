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
from wealy_ray.whisper.types import WindowResult


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
    futures: list[WindowFuture] = []
    prompt = _prompt(engine)
    try:
        language = None
        if engine.detects_language and len(mels):
            futures.append(engine.submit(mels[0], prompt=prompt))
            language = (await asyncio.wrap_future(futures[0].language)).code
        futures.extend(engine.submit(mel, language, prompt=prompt) for mel in mels[len(futures) :])
        results = await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
    except BaseException:
        _cancel(futures)
        raise
    return _share_language(results)


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
    per_track: list[list[WindowFuture]] = [[] for _ in tracks]
    prompt = _prompt(engine)
    try:
        if engine.detects_language:
            per_track = [[engine.submit(mel, prompt=prompt) for mel in mels[:1]] for mels in tracks]
        for mels, futures in zip(tracks, per_track, strict=True):
            language = futures[0].language.result().code if futures else None
            futures.extend(engine.submit(mel, language, prompt=prompt) for mel in mels[len(futures) :])
        return [_share_language([future.result() for future in futures]) for futures in per_track]
    except BaseException:
        for futures in per_track:
            _cancel(futures)
        raise


def _prompt(engine: Engine) -> list[int]:
    text = engine.decode.initial_prompt
    return engine.vocabulary.prompt_tokens(text) if text is not None else []


def _cancel(futures: list[WindowFuture]) -> None:
    """Withdraw the windows that are not in the engine yet."""
    for future in futures:
        future.cancel()


def _share_language(results: Sequence[WindowResult]) -> list[WindowResult]:
    if not results:
        return []
    language, probability = results[0].language, results[0].language_probability
    return [replace(result, language=language, language_probability=probability) for result in results]
