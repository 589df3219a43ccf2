from __future__ import annotations

import re
from pathlib import Path

import pytest

from wealy_ray.audio import IsolatedDecoder
from wealy_ray.config import (
    AudioSettings,
    ExtractRecipe,
    Settings,
    load_recipe,
    load_settings,
    parse_override,
)
from wealy_ray.errors import ConfigError
from wealy_ray.model.recipe import EmbedRecipe
from wealy_ray.retrieval.recipe import EvaluateRecipe
from wealy_ray.training.recipe import TrainRecipe

MINIMAL = "manifest: m.parquet\nstore: out\n"
RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_overrides_replace_and_nest(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL + "engine:\n  num_slots: 4\n")
    overrides = dict(map(parse_override, ["engine.num_slots=8", "decode.language=es", "model=base"]))
    recipe = load_recipe(path, overrides)
    assert (recipe.engine.num_slots, recipe.decode.language, recipe.model) == (8, "es", "base")


def test_timestamps_follow_the_window_plan_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    for overrides, expected in (
        ({}, False),
        ({"windows.plan": "reference"}, True),
        ({"decode.timestamps": True}, True),
        ({"windows.plan": "reference", "decode.timestamps": False}, False),
    ):
        assert load_recipe(path, overrides).timestamps is expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    kinds = {"evaluate": EvaluateRecipe, "train": TrainRecipe, "embed": EmbedRecipe}
    kind = kinds.get(path.stem.rsplit("-", 1)[-1], ExtractRecipe)
    assert isinstance(load_settings(kind, path), kind)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (MINIMAL + "modle: base\n", "unknown key 'modle'; valid keys here are manifest, store, model"),
        (MINIMAL + "engine:\n  slots: 3\n", "unknown key 'engine.slots'; valid keys here are device, dtype"),
        ("store: x\n", "the key 'manifest' is missing"),
        (MINIMAL + "engine:\n  num_slots: 0\n", "'engine.num_slots' is 0: input should be greater than 0"),
        (
            MINIMAL + "engine:\n  device: tpu\n",
            "'engine.device' is 'tpu': input should be 'auto', 'cpu' or 'cuda'",
        ),
        (MINIMAL + "resources:\n  engine_min: 3\n", "engine_max .1. is below engine_min .3."),
        (MINIMAL + "resources:\n  engine_cpus: 0.5\n", "must differ, else Ray fuses the stages"),
        (MINIMAL + "windows:\n  hop_s: 31\n", "'windows.hop_s' is 31"),
        (MINIMAL + "windows:\n  plan: seek\n", "the window plan must be 'fixed' or 'reference'"),
        (
            MINIMAL + "windows:\n  pad_to_s: 3\n",
            "unknown key 'windows.pad_to_s'; valid keys here are plan, hop_s",
        ),
        (
            MINIMAL + "windows:\n  plan: reference\n  hop_s: 20\n",
            "unknown key 'windows.hop_s'; valid keys here are plan, condition_on_previous_text",
        ),
        (
            MINIMAL + "windows:\n  plan: reference\n  temperatures: [-1]\n",
            "'windows.temperatures.0' is -1: input should be greater than or equal to 0",
        ),
        (MINIMAL + "decode:\n  max_repeats: 1\n", "'decode.max_repeats' is 1"),
        (MINIMAL + "max_failure_rate: .nan\n", "'max_failure_rate' is nan"),
        (
            MINIMAL + "audio:\n  decode_memory_mb: 80\n",
            "decode_memory_mb .80. must be at least 85 for max_duration_s",
        ),
        ("- a\n- b\n", "is not a mapping of settings"),
        ("a: [1\n", r"is not valid YAML \(line 2\)"),
    ],
)
def test_wrong_recipes_are_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence) as raised:
        load_recipe(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "recipe", "override", "sentence"),
    [
        (EmbedRecipe, "demo-train", "seed=0", "'model': input should be a valid string"),
        (EmbedRecipe, "demo-embed", "windows=3", "'windows' is 3: input should be"),
        (TrainRecipe, "demo-train", "loss.kind=arcface", "'loss': input tag 'arcface' found using 'kind'"),
        (TrainRecipe, "demo-train", "model.heads=3", "'model': width 128 is not a multiple of heads 3"),
        (
            TrainRecipe,
            "demo-train",
            "resources.workers=0",
            "'resources.workers' is 0: input should be greater",
        ),
        (TrainRecipe, "demo-train", "mining.near=3", "unknown key 'mining.near'; valid keys here are"),
        (
            EvaluateRecipe,
            "demo-evaluate",
            "systems=[{kind: fusion, name: f, of: [a, b], weight: high}]",
            "'systems.0.weight' is 'high': input should be a valid number",
        ),
    ],
)
def test_every_fault_names_its_key(kind: type[Settings], recipe: str, override: str, sentence: str) -> None:
    path = next(path for path in RECIPES if path.stem == recipe)
    with pytest.raises(ConfigError, match=re.escape(f"recipe {path}: {sentence}")) as raised:
        load_settings(kind, path, dict([parse_override(override)]))
    assert "\n" not in str(raised.value)


def test_missing_and_binary_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not a text file"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("text", ["engine.num_slots", "=3", "Engine Slots=3", "a=[1"])
def test_wrong_overrides(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_override(text)


def test_override_of_a_plain_value_as_a_group(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(ConfigError, match="'store' is not a group of settings"):
        load_recipe(path, {"store.x": 1})


def test_the_least_decoder_memory_is_the_decoder_s() -> None:
    for max_duration_s in (1.0, 300.0, 7200.0):
        least_mb = next(mb for mb in range(1, 10_000) if _allows(max_duration_s, mb))
        IsolatedDecoder(max_duration_s, timeout_s=1, memory_bytes=least_mb << 20)
        with pytest.raises(ValueError, match="memory_bytes must be at least"):
            IsolatedDecoder(max_duration_s, timeout_s=1, memory_bytes=(least_mb - 1) << 20)


def _allows(max_duration_s: float, decode_memory_mb: int) -> bool:
    try:
        AudioSettings(max_duration_s=max_duration_s, decode_memory_mb=decode_memory_mb)
    except ValueError:
        return False
    return True
