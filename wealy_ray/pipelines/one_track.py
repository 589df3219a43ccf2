"""Extraction and embedding of one track in this process, with a store's own settings and without Ray."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pyarrow as pa

from wealy_ray.audio import SAMPLE_RATE_HZ
from wealy_ray.config import EngineSettings, ExtractRecipe
from wealy_ray.errors import ConfigError, ModelError, StoreError, TrackError
from wealy_ray.pipelines.engine_stage import decode_options, hear, ok_track
from wealy_ray.pipelines.extract import extractor_of
from wealy_ray.pipelines.stages import PCM_SCHEMA, WORK_SCHEMA, StageContext, decode_tracks
from wealy_ray.storage import join
from wealy_ray.store import EmbeddingReader, StoreReader, TrackStates, kept_model


def recipe_of_store(reader: StoreReader, model: str | None) -> ExtractRecipe:
    """The recipe of the store's last extraction, for this machine.

    Args:
        reader: The store.
        model: Where the weights are here; None: where that extraction found them.

    Raises:
        StoreError: No run of the store left its recipe.
    """
    records = [i for i in reader.storage.list(join(reader.root, "runs")) if i.uri.endswith("/run.json")]
    for info in sorted(records, key=lambda i: i.uri, reverse=True):
        settings: dict[str, Any] = json.loads(reader.storage.read(info.uri)).get("recipe") or {}
        if settings:
            settings |= {"storage": reader.storage.settings, "engine": EngineSettings()}
            return ExtractRecipe.model_validate(settings | ({"model": model} if model else {}))
    raise StoreError(f"{reader.root}/runs holds no recipe: how the store was made is not known")


def embed_one(embeddings: EmbeddingReader, track: TrackStates) -> np.ndarray:
    """Vectors float32 [S, z] of a track that can be compared with a store's.

    Args:
        embeddings: The store's; they hold the model, and how it was used.
        track: With states, of the same extractor.

    Raises:
        ConfigError: The track has no states that the model is fed.
        StoreError: The model is gone or damaged.
    """
    import torch

    from wealy_ray.model import load_model
    from wealy_ray.model.embedder import TrackEmbedder
    from wealy_ray.model.windows import StateWindows
    from wealy_ray.training.crops import kinds_by_name

    settings = embeddings.settings
    try:
        model = load_model(kept_model(embeddings.root), embeddings.storage)
    except StoreError as e:
        raise StoreError(f"{e}; remove it if it is there, and `wealy embed` puts it there again") from e
    if model.config.digest != settings["model_digest"]:
        raise StoreError(
            f"{kept_model(embeddings.root)} is not the model that these embeddings are of: remove it, and `wealy "
            "embed` puts the right one there"
        )
    kinds = kinds_by_name(settings["kinds"])
    states = track.states if kinds is None else track.states[np.isin(track.kind, list(kinds))]
    if not len(states):
        raise ConfigError("the query has no states that the model is fed; try --by tfidf_characters")
    windows = StateWindows.model_validate(settings["windows"])
    embedder = TrackEmbedder(model.network, windows, states_per_pass=1, device=torch.device("cpu"))
    return embedder.embed([len(states)], lambda _: states)[0]


def extract_one(reader: StoreReader, recipe: ExtractRecipe, uri: str) -> TrackStates:
    """States of an audio file that can be compared with a store's.

    Args:
        reader: The store.
        recipe: How its states were computed, see `recipe_of_store`.
        uri: The audio.

    Raises:
        ConfigError: The audio cannot be used.
        ModelError: The weights cannot be loaded, or are not those of the store.
    """
    import torch

    from wealy_ray.whisper import Engine, EngineOptions, load_whisper

    storage = reader.storage
    work = pa.Table.from_pylist([{"track_id": uri, "audio_uri": uri, "etag": None}], schema=WORK_SCHEMA)
    context = StageContext(recipe, reader.root, reader.extractor_id, weights_digest="", epoch=0)
    (pcm,) = decode_tracks(work, context)
    fields = {name: pcm[name][0].as_py() for name in PCM_SCHEMA.names if name != "samples"}
    if fields["error_type"] is not None:
        raise ConfigError(f"{uri} cannot be used as a query: {fields['error_message']}")
    try:
        loaded = load_whisper(recipe.model, read_bytes=storage.read)
    except ModelError as e:  # a store outlives the place where its weights were
        raise ModelError(f"{e}; say with --model where the weights of the store are here") from e
    if extractor_of(recipe, loaded).extractor_id != reader.extractor_id:
        raise ModelError(
            f"the weights of '{recipe.model}' are not those that the store's states were computed with; name the "
            "right ones with --model"
        )
    samples = np.frombuffer(pcm["samples"][0].as_buffer(), np.float32)
    engine = Engine(
        loaded.model,
        EngineOptions(device="cuda" if torch.cuda.is_available() else "cpu"),
        decode_options(recipe),
    )
    engine.start().wait_until_ready()
    try:
        heard = asyncio.run(hear(engine, samples, recipe))
        return ok_track(fields, len(samples) / SAMPLE_RATE_HZ, heard, engine.dims.n_text_state)
    except TrackError as e:
        raise ConfigError(f"{uri} cannot be used as a query: {e.message}") from e
    finally:
        engine.close()
