"""The loop without Ray: ranks are processes that meet over gloo."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from wealy_ray.catalog import read_manifest
from wealy_ray.errors import ManifestError, StoreError, TrainingError
from wealy_ray.model import ModelConfig, digest_of, load_model
from wealy_ray.storage import Storage
from wealy_ray.store import StoreReader
from wealy_ray.training.alone import train_alone
from wealy_ray.training.checkpoint import Checkpoints, DamagedError, check_facts
from wealy_ray.training.crops import CropReader, kinds_by_name
from wealy_ray.training.data import Batches, Tracks
from wealy_ray.training.job import Job
from wealy_ray.training.loop import Loop, Rank, Splits
from wealy_ray.training.recipe import TrainRecipe
from wealy_ray.training.sampler import CliqueSampler

MODEL = {
    "kind": "transformer",
    "width": 16,
    "layers": 1,
    "heads": 2,
    "feed_forward": 16,
    "output_dim": 8,
    "standardise": True,
}


def a_recipe(place: Path, **changes: Any) -> TrainRecipe:
    settings: dict[str, Any] = {
        "manifest": str(place / "manifest.parquet"),
        "store": str(place / "store"),
        "out": str(place / "out"),
        "model": MODEL,
        "data": {"crop": 40, "cliques_per_batch": 6},
        "optimiser": {"learning_rate": 3e-3, "epochs": 6, "warmup_epochs": 1},
        "validation": {"every_epochs": 2},
        "resources": {"passes": 4, "loaders": 0},
    }
    return TrainRecipe.model_validate(settings | changes)


def splits_of(recipe: TrainRecipe) -> Splits:
    storage = Storage()
    reader = StoreReader.open(storage, recipe.store)
    crops = CropReader(reader, recipe.data.crop, kinds_by_name(recipe.data.kinds))
    manifest = read_manifest(storage, recipe.manifest).table
    parts = (recipe.data.train_split, recipe.data.validation_split)
    return Splits(*(Tracks.of_split(manifest, recipe.manifest, split, crops) for split in parts), crops)


def train(
    recipe: TrainRecipe, rank: Rank | None = None, stops: tuple[int, ...] = (), folder: Path | None = None
) -> Loop:
    """Trains; after each number of steps in `stops` everything is thrown away but a checkpoint."""
    rank = rank or Rank(0, 1, torch.device("cpu"))
    done = [0]

    class Stopper:
        def wants(self, _: Loop) -> tuple[bool, bool]:
            done[0] += 1
            return False, done[0] in stops

        def save(self, _: Loop, *, is_wanted: bool) -> None:
            pass

    for _ in range(len(stops) + 1):
        loop = Loop(recipe, splits_of(recipe), rank, Stopper())
        if folder is not None:
            checkpoints = checkpoints_of(folder / str(rank.number))
            found = checkpoints.read_latest()
            if found is not None:
                loop.load(*found)
        loop.run()
        if folder is not None:
            config = ModelConfig(
                model=recipe.model,
                input_dim=loop.input_dim,
                digest=digest_of(loop.network.state_dict(), recipe.model),
                extractor_id="e",
                crop=recipe.data.crop,
            )
            checkpoints.write(loop.network, *loop.state(), config, "# A card")
    return loop


def checkpoints_of(folder: Path, recipe: str = "r") -> Checkpoints:
    return Checkpoints(Storage(), str(folder), {"recipe": recipe, "crops": (1, 2)})


def weights_of(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loop.network.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=0, atol=atol), name


def test_it_learns_what_versions_share(song_store: Path) -> None:
    recipe = a_recipe(song_store, optimiser={"learning_rate": 5e-3, "epochs": 30, "warmup_epochs": 2})
    loop = train(recipe)
    history = loop.progression.history
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    maps = [entry["map"] for entry in history if "map" in entry]
    assert len(maps) == 15
    assert max(maps) == loop.progression.best_map > 0.6
    assert all(0 <= entry["padded_share"] < 0.5 for entry in history)


OTHER_LOSSES = [{"kind": "triplet"}, {"kind": "clews"}, {"kind": "supervised_contrastive"}]


@pytest.mark.parametrize("loss", OTHER_LOSSES)
def test_other_losses_go_down(song_store: Path, loss: dict) -> None:
    history = train(a_recipe(song_store, loss=loss)).progression.history
    assert history[-1]["loss"] < history[0]["loss"]


def test_stopped_runs_end_with_the_same_bits(song_store: Path, tmp_path: Path) -> None:
    mining = {"every_epochs": 2, "neighbours": 4}
    recipe = a_recipe(song_store, mining=mining, data={"crop": 40, "cliques_per_batch": 4, "kinds": ["text"]})
    whole = train(recipe)
    pieces = train(recipe, stops=(1, 5, 9), folder=tmp_path)
    assert_equal(weights_of(whole), weights_of(pieces))
    assert whole.progression.history == pieces.progression.history
    other = train(recipe.model_copy(update={"seed": 1}))
    assert not torch.equal(other.network.project.weight, whole.network.project.weight)


def test_loader_processes_change_nothing(song_store: Path) -> None:
    alone = train(a_recipe(song_store, optimiser={"learning_rate": 3e-3, "epochs": 1, "warmup_epochs": 0}))
    recipe = a_recipe(
        song_store,
        optimiser={"learning_rate": 3e-3, "epochs": 1, "warmup_epochs": 0},
        resources={"passes": 4, "loaders": 2},
    )
    assert_equal(weights_of(alone), weights_of(train(recipe)))


def _rank(number: int, world_size: int, recipe: TrainRecipe, stops: tuple[int, ...], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=world_size)
    loop = train(recipe, Rank(number, world_size, torch.device("cpu")), stops, folder)
    torch.save((weights_of(loop), loop.progression.history), folder / f"{number}.pt")
    dist.destroy_process_group()


def ranks(world_size: int, recipe: TrainRecipe, folder: Path, stops: tuple[int, ...] = ()) -> list[Any]:
    folder.mkdir()
    mp.spawn(_rank, (world_size, recipe, stops, folder), nprocs=world_size)
    return [torch.load(folder / f"{number}.pt") for number in range(world_size)]


def test_any_number_of_ranks_trains_the_same_model(song_store: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = train(a_recipe(song_store))
    torch.set_num_threads(threads)
    two = ranks(2, a_recipe(song_store), tmp_path / "two")
    again = ranks(2, a_recipe(song_store), tmp_path / "again", stops=(3,))
    assert_equal(two[0][0], two[1][0])
    assert_equal(two[0][0], again[0][0])  # bit-equal after a stop
    assert two[0][1] == again[0][1]
    # dropout included: another number of ranks differs by rounding only
    expected = weights_of(alone)
    for weights in (two[0][0], expected):
        # a bias of keys changes no attention: its gradient is rounding alone, which AdamW blows up
        weights["layers.0.qkv.bias"][16:32] = 0
    assert_equal(two[0][0], expected, atol=2e-4)
    for ours, theirs in zip(two[0][1], alone.progression.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_a_rank_without_a_pass_takes_part(song_store: Path, tmp_path: Path) -> None:
    """Six rows of like length make three passes; four ranks share them."""
    recipes: list[TrainRecipe] = []
    for loss in [{"kind": "nt_xent"}, *OTHER_LOSSES]:
        recipe = a_recipe(
            song_store,
            loss=loss,
            data={"crop": 10, "cliques_per_batch": 3},
            optimiser={"learning_rate": 3e-3, "epochs": 1, "warmup_epochs": 0},
            validation={"every_epochs": 1},
        )
        if not recipes:
            batches = Batches(splits_of(recipe).train, *_sampler_and_crops(recipe), 3, 4, 4)
            with ThreadPoolExecutor(1) as pool:
                step = batches.read((0, 0), memoryview(bytearray(batches.most_bytes)), pool)
            assert (step.passes, step.sizes) == ([], [2, 2, 2, 0])
        recipes.append(recipe)
    mp.spawn(_each, (recipes, tmp_path), nprocs=4)
    for number, recipe in enumerate(recipes):
        alone = train(recipe).progression.history
        four = [torch.load(tmp_path / f"{number}-{rank}.pt") for rank in range(4)]
        for weights, history in four:
            assert_equal(weights, four[0][0])
            assert history[0]["loss"] == pytest.approx(alone[0]["loss"], abs=1e-4)
            assert history[0]["gradient_norm"] == pytest.approx(alone[0]["gradient_norm"], abs=1e-3)


def _each(number: int, recipes: list[TrainRecipe], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=4)
    for i, recipe in enumerate(recipes):
        loop = train(recipe, Rank(number, 4, torch.device("cpu")))
        torch.save((weights_of(loop), loop.progression.history), folder / f"{i}-{number}.pt")
    dist.destroy_process_group()


def _sampler_and_crops(recipe: TrainRecipe) -> tuple[CliqueSampler, CropReader]:
    splits = splits_of(recipe)
    return CliqueSampler(splits.train.cliques, cliques_per_batch=3, seed=recipe.seed), splits.crops


def test_without_gathering_ranks_see_their_own_negatives(song_store: Path, tmp_path: Path) -> None:
    found = ranks(2, a_recipe(song_store, gather="none"), tmp_path / "none")
    assert_equal(found[0][0], found[1][0])
    gathered = train(a_recipe(song_store))
    assert (
        found[0][1][0]["loss"] < gathered.progression.history[0]["loss"] - 0.1
    )  # fewer negatives, lower loss


def test_training_ends_when_nothing_gets_better(song_store: Path) -> None:
    recipe = a_recipe(
        song_store,
        optimiser={"learning_rate": 1e-9, "epochs": 50, "warmup_epochs": 0},
        validation={"every_epochs": 1, "patience": 3},
    )
    loop = train(recipe)
    assert loop.is_over
    assert loop.progression.epoch == loop.progression.best_epoch + 3 < 50


def test_a_loss_that_is_nan_names_the_tracks(song_store: Path) -> None:
    recipe = a_recipe(song_store, optimiser={"learning_rate": 1e30, "epochs": 9, "warmup_epochs": 0})
    with pytest.raises(
        TrainingError, match=r"the loss is nan in epoch \d, step \d, with tracks set:V-\d+, set:V-"
    ):
        train(recipe)


@pytest.mark.parametrize(
    ("track", "standardise", "words"),
    [
        ("set:V-20", True, "states of set:V-20 are not finite: extract it again"),
        ("set:V-20", False, "the loss is nan in epoch 1, step 1, with tracks set:V-20 (all"),
        ("set:V-50", True, "embeddings are not finite of set:V-50: look at their states"),
    ],
)
def test_states_that_are_nan_are_named(
    song_store: Path, monkeypatch: pytest.MonkeyPatch, track: str, standardise: bool, words: str
) -> None:
    read = CropReader.read

    def damaged(crops: CropReader, row: int, start: int, out: np.ndarray) -> None:
        read(crops, row, start, out)
        if row == crops.rows([track])[0]:
            out[0, 3] = np.nan

    monkeypatch.setattr(CropReader, "read", damaged)
    recipe = a_recipe(
        song_store,
        model=MODEL | {"standardise": standardise},
        data={"crop": 40, "cliques_per_batch": 14, "versions_per_clique": 3},
    )
    with pytest.raises(TrainingError, match=re.escape(words)):
        train(recipe)


def test_a_foreign_checkpoint_is_refused(song_store: Path, tmp_path: Path) -> None:
    train(a_recipe(song_store), stops=(1,), folder=tmp_path)
    with pytest.raises(StoreError, match="is of another training: recipe differs"):
        checkpoints_of(tmp_path / "0", recipe="another").read_latest()


def test_a_setting_that_was_not_known_yet_changes_nothing() -> None:
    known = {"data": {"crop": 5, "kinds": ["text"]}, "seed": 0}
    check_facts(known, {"data": {"crop": 5, "kinds": ("text",), "later": None}, "seed": 0}, "out")
    with pytest.raises(StoreError, match="out is of another training: data differs"):
        check_facts(known, {"data": {"crop": 5, "kinds": ("text",), "later": 1}, "seed": 0}, "out")


def test_damaged_and_unfinished_checkpoints_give_way_to_the_one_before(
    song_store: Path, tmp_path: Path
) -> None:
    train(a_recipe(song_store), stops=(3, 6), folder=tmp_path)
    checkpoints = checkpoints_of(tmp_path / "0")
    places = [(p.epoch, p.step) for p in checkpoints.places()]
    assert len(places) == 2, "of three, the last two are left: the best was not among them"
    newest = tmp_path / "0" / "checkpoints" / checkpoints.places()[-1].name
    (newest / "state.pt").write_bytes(b"PK")
    _, _, progression = checkpoints.read_latest()
    assert (progression.epoch, progression.step) == places[0]
    (newest / "facts.json").unlink()  # as when it was being written
    assert [(p.epoch, p.step) for p in checkpoints.places()] == places[:1]
    (tmp_path / "0" / "checkpoints" / checkpoints.places()[0].name / "model.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match=r"all checkpoints in .* are damaged"):
        checkpoints.read_latest()


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "config.json"])
def test_a_changed_byte_is_noticed(song_store: Path, tmp_path: Path, name: str) -> None:
    train(a_recipe(song_store), stops=(3,), folder=tmp_path)
    checkpoints = checkpoints_of(tmp_path / "0")
    place = checkpoints.places()[0]
    file = tmp_path / "0" / "checkpoints" / place.name / name
    data = bytearray(file.read_bytes())
    if name == "config.json":
        data = data.replace(b'"heads": 2', b'"heads": 4')
    else:
        data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=f"{place.name} is damaged"):
        checkpoints.read(place)


def test_splits_that_cannot_be_used_are_one_sentence(song_store: Path) -> None:
    recipe = a_recipe(song_store)
    splits = splits_of(recipe)
    assert len(splits.train) == 14 * 3
    assert splits.train.num_dropped == 2
    for name in ("nothing",):
        data = {"train_split": name}
        with pytest.raises(ManifestError, match="has no track of split 'nothing'; it has train, val"):
            splits_of(a_recipe(song_store, data=data))


def test_the_best_checkpoint_is_found_again(song_store: Path, tmp_path: Path) -> None:
    """Damaged, its twin counts; without one, the sentence names another that can be used."""
    recipe = a_recipe(
        song_store,
        out=str(tmp_path / "out"),
        optimiser={"learning_rate": 3e-3, "epochs": 1, "warmup_epochs": 0},
        tracking=[],
    )
    job = train_alone(recipe)
    model = digest_of(load_model(job.model_uri).network.state_dict())
    place = job.checkpoints.places()[-1]
    folder = tmp_path / "out" / "checkpoints"
    shutil.copytree(folder / place.name, folder / f"{place.name[:13]}ffffffff")
    (folder / place.name / "model.safetensors").write_bytes(b"")
    shutil.rmtree(tmp_path / "out" / "model")
    assert digest_of(load_model(train_alone(recipe).model_uri).network.state_dict()) == model
    shutil.rmtree(tmp_path / "out" / "model")
    best = folder / f"{place.name[:13]}ffffffff"
    best.rename(folder / "00000-000001-aaaaaaaa")
    words = (
        r"the checkpoint of the best epoch, 1, is gone.*; 00000-000001-aaaaaaaa there is the last good one"
    )
    with pytest.raises(StoreError, match=words):
        job._read_best(1)
    shutil.rmtree(folder)
    with pytest.raises(StoreError, match="or damaged; train anew with another `out`"):
        job._read_best(1)


def test_a_checkpoint_says_only_what_was_measured_of_it(song_store: Path, tmp_path: Path) -> None:
    recipe = a_recipe(
        song_store,
        out=str(tmp_path / "out"),
        optimiser={"learning_rate": 3e-3, "epochs": 4, "warmup_epochs": 0},
        validation={"every_epochs": 2},
        checkpoint_every_s=1e-9,  # after each step
        tracking=[],
    )
    job = train_alone(recipe)
    maps = {int(entry["epoch"]): entry.get("map") for entry in job.history()}
    assert [epoch for epoch, found in maps.items() if found is not None] == [2, 4]
    for place in job.checkpoints.places():
        config = load_model(str(tmp_path / "out" / "checkpoints" / place.name)).config
        assert config.metrics["validation_map"] == (None if place.step else maps[place.epoch])
    assert any(place.step for place in job.checkpoints.places())


def test_an_out_that_does_not_say_what_it_holds_is_refused(song_store: Path, tmp_path: Path) -> None:
    recipe = a_recipe(
        song_store,
        out=str(tmp_path / "out"),
        optimiser={"learning_rate": 3e-3, "epochs": 1, "warmup_epochs": 0},
        tracking=[],
    )
    train_alone(recipe)
    file = tmp_path / "out" / "training.json"
    file.write_text("[1]")
    with pytest.raises(StoreError, match=r"training.json is damaged: give this training another `out`"):
        train_alone(recipe)
    file.unlink()
    with pytest.raises(StoreError, match=r"holds a model, but no training\.json"):
        train_alone(recipe)


def test_what_was_trained_alone_without_gathering_is_no_training_of_two_workers(
    song_store: Path, tmp_path: Path
) -> None:
    recipe = a_recipe(
        song_store,
        out=str(tmp_path / "out"),
        gather="none",
        resources={"workers": 2, "passes": 4, "loaders": 0},
        optimiser={"learning_rate": 3e-3, "epochs": 1, "warmup_epochs": 0},
        tracking=[],
    )
    assert train_alone(recipe).is_done
    assert train_alone(recipe).is_done
    with pytest.raises(StoreError, match=r"is of another training: workers differs"):
        Job.open(recipe)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": 2**70}, "less than"),
        ({"data": {"cliques_per_batch": 1}}, "greater than or equal to 2"),
        ({"data": {"kinds": []}}, "at least 1 item"),
        ({"resources": {"workers": [2, 1]}}, "the smaller of the two numbers comes first: [1, 2]"),
        ({"gather": "none", "resources": {"workers": [1, 4]}}, "give one number"),
    ],
)
def test_settings_under_which_nothing_is_learnt_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        a_recipe(Path(), **changes)
