"""`wealy evaluate` over a store whose states are known."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.pipelines.support import call_wealy, run_wealy, start_wealy, wait_for, write_recipe
from tests.store.tracks import EXTRACTOR_ID, make_failed, make_track, write
from wealy_ray.catalog import write_manifest
from wealy_ray.config import load_settings
from wealy_ray.errors import ConfigError
from wealy_ray.pipelines.evaluate import run_evaluate
from wealy_ray.pipelines.session import connect
from wealy_ray.pipelines.sharing import share
from wealy_ray.report.metrics_table import metrics_table
from wealy_ray.report.run_page import write_report
from wealy_ray.retrieval.collection import Collection
from wealy_ray.retrieval.evaluation import evaluate, evaluate_tile, num_tiles
from wealy_ray.retrieval.recipe import EvaluateRecipe
from wealy_ray.retrieval.scores import VectorScores
from wealy_ray.storage import Storage, join
from wealy_ray.store import IndexWriter

CLIQUES, VERSIONS, DIM = 12, 3, 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest, and a store in which versions of a clique have near states and the same words."""
    folder = tmp_path_factory.mktemp("evaluate")
    storage, root = Storage(), join(str(folder / "store"), EXTRACTOR_ID)
    storage.write(join(root, "extractor.json"), b"{}")
    rng = np.random.default_rng(0)
    rows, tracks = [], []
    for number in range(CLIQUES * VERSIONS):
        clique = number // VERSIONS
        centre = np.random.default_rng(clique).normal(size=DIM)
        states = (centre + 0.3 * rng.normal(size=(12, DIM))).astype(np.float16)
        language = "en" if number % 2 else "es"
        words = "" if number == 4 else f"song{clique} love{clique} and the night {number}"
        tracks.append(make_track(number, states=states, language=language, text=words))
        rows.append((f"set:V-{number}", f"c{clique}", "val" if clique < 4 else "test"))
    tracks.append(make_failed(900))
    rows += [("set:V-900", "c5", "test"), ("set:V-901", None, "test")]
    writer = IndexWriter.claim(storage, root, manifest_digest="0" * 64, run_id="run")
    writer.publish(write(storage, root, tracks))
    ids, cliques, splits = zip(*rows, strict=True)
    table = pa.table(
        {"track_id": ids, "clique_id": cliques, "split": splits, "audio_uri": [f"s3://a/{i}" for i in ids]}
    )
    write_manifest(storage, str(folder / "manifest.parquet"), table)
    _leave_other_systems(folder, ids)
    return folder


def _leave_other_systems(folder: Path, ids: list[str]) -> None:
    """Several vectors per track as CLEWS leaves them, and a matrix; both know the cliques."""
    (folder / "clews").mkdir()
    (folder / "model").mkdir()
    (folder / "clews" / "embedder.json").write_text(json.dumps({"model": str(folder / "model")}))
    config = {"model": {"kind": "avg_mlp"}, "extractor_id": "e", "data": {"languages": {"en": 3}}}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(1)
    for number, track_id in enumerate(ids[:-2]):
        centre = np.random.default_rng(100 + number // VERSIONS).normal(size=16)
        vectors = torch.from_numpy(centre + rng.normal(size=(3 + number % 4, 16))).float()
        torch.save(vectors, folder / "clews" / f"{track_id.replace(':', '_')}.pt")
    cliques = np.arange(len(ids)) // VERSIONS
    np.save(folder / "matrix.npy", (cliques[:, None] != cliques) + rng.random((len(ids), len(ids))))
    (folder / "ids.txt").write_text("\n".join(ids))
    (folder / "clews.json").write_text(json.dumps({f"{i.replace(':', '_')}.pt": i for i in ids[:-2]}))


def recipe(place: Path, out: Path, **changes: object) -> Path:
    settings = {
        "manifest": str(place / "manifest.parquet"),
        "store": str(place / "store"),
        "out": str(out),
        "split": "test",
        "languages": "detected",
        "systems": [
            {"kind": "avg_embedding", "name": "avg", "standardise_by": "val"},
            {"kind": "tfidf_words", "name": "words"},
            {"kind": "fusion", "name": "both", "of": ["avg", "words"], "weight": "tuned"},
            {"kind": "oracle"},
            {
                "kind": "embeddings",
                "name": "shingles",
                "uri": str(place / "clews"),
                "id_from_path": str(place / "clews.json"),
                "distance": "sqeuclidean",
                "reduction": "bpwr-3",
            },
            {
                "kind": "matrix",
                "name": "matrix",
                "uri": str(place / "matrix.npy"),
                "ids": str(place / "ids.txt"),
            },
            {"kind": "fusion", "name": "ranks", "of": ["shingles", "words"], "normalise": "rank"},
            {"kind": "fusion", "name": "learned", "of": ["matrix", "words"], "normalise": "learned"},
        ],
        "resources": {"held_gib": 0},
    }
    return write_recipe(out.with_suffix(".yaml"), settings | changes)


def evaluate_here(place: Path, out: Path, **changes: object) -> None:
    run_evaluate(load_settings(EvaluateRecipe, str(recipe(place, out, **changes)), {}))


def systems(out: Path) -> dict[str, dict]:
    return {s["name"]: s for s in json.loads((out / "metrics.json").read_text())["systems"]}


@pytest.fixture(scope="module")
def evaluated(place: Path) -> tuple[Path, str]:
    out = place / "out"
    code, output = run_wealy("evaluate", recipe(place, out))
    assert code == 0, output
    return out, output


def test_systems_stand_in_the_order_that_is_true(evaluated: tuple[Path, str]) -> None:
    out, output = evaluated
    found = {name: s["views"]["all"]["map"]["mean"] for name, s in systems(out).items()}
    plain = ["random", "same language", "avg", "words", "oracle", "shingles", "matrix"]
    assert list(found) == [*plain, "both", "ranks", "learned"]
    assert found["oracle"] == found["matrix"] == 1.0
    assert found["random"] < 0.4
    assert 0.9 < found["avg"] <= found["both"] + 1e-9
    assert 0.9 < found["shingles"] < 1
    assert found["learned"] > 0.99
    assert len(list(out.glob("vectors/*/tiles.json"))) == 1  # nothing may be held: it was streamed
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["collection"] == {
        "tracks": 26,
        "queries": 24,
        "candidates": 24,
        "cliques": 8,
        "without_states": 2,
        "policy": "drop",
        "split": "test",
    }
    (curve,) = metrics["fusion_curves"]
    assert curve["split"] == "val"
    assert curve["chosen"] in curve["weights"]
    assert max(curve["map"]) == curve["map"][curve["weights"].index(curve["chosen"])]
    (learned,) = metrics["fitted_fusions"]
    assert [name for name, _ in learned["fitted"]] == ["matrix", "words"]
    assert f"'learned': {learned['fitted'][0][1]:.3g} x matrix + " in output
    assert not metrics["tuned_on_test"]
    assert "24 queries of 8 cliques among 24 candidates; 2 of 26 tracks without states, left out" in output
    assert {"within_language", "cross_language"} < set(systems(out)["avg"]["views"])
    known = {name: s["facts"] for name, s in systems(out).items() if s["facts"]}
    assert known == {
        "shingles": {"network": "avg_mlp", "extractor_id": "e", "data": {"languages": {"en": 3}}}
    }


def test_the_metrics_can_be_recomputed(evaluated: tuple[Path, str]) -> None:
    out, _ = evaluated
    for system in systems(out).values():
        rows = [r for r in pq.read_table(out / system["per_query"]).to_pylist() if r["view"] == "all"]
        aps = [sum(j / rank for j, rank in enumerate(r["ranks"], 1)) / len(r["ranks"]) for r in rows]
        assert np.mean(aps) == pytest.approx(system["views"]["all"]["map"]["mean"], abs=1e-12)


@pytest.mark.usefixtures("ray_session")
def test_a_second_run_ranks_nothing_and_says_the_same(evaluated: tuple[Path, str]) -> None:
    out, _ = evaluated
    before = (out / "metrics.json").read_bytes()
    code, output = call_wealy("evaluate", out.with_suffix(".yaml"))
    assert code == 0, output
    assert (out / "metrics.json").read_bytes() == before
    assert set(json.loads((out / "run.json").read_text())["ranked"].values()) == {0}
    code, output = call_wealy("report", out)
    assert code == 0, output
    assert "c5" in (out / "report.html").read_text()


@pytest.mark.usefixtures("ray_session")
def test_killed_in_the_middle_it_goes_on(place: Path, evaluated: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = recipe(place, out)
    process = start_wealy("evaluate", path)
    assert wait_for(lambda: len(list(out.glob("ranks/*/*/*.parquet"))) >= 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "metrics.json").exists()
    code, output = call_wealy("evaluate", path)
    assert code == 0, output
    ranked = json.loads((out / "run.json").read_text())["ranked"]
    assert 0 < sum(ranked.values()) < len(ranked)
    expected, found = systems(evaluated[0]), systems(out)
    for name, system in expected.items():
        assert pq.read_table(out / system["per_query"]).equals(
            pq.read_table(evaluated[0] / system["per_query"])
        )
        assert found[name] == system


@pytest.mark.usefixtures("ray_session")
def test_tracks_without_states_may_rank_last(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = recipe(place, out, without_states="rank_last", systems=[{"kind": "avg_embedding", "name": "avg"}])
    code, output = call_wealy("evaluate", path)
    assert code == 0, output
    assert "2 of 26 tracks without states, ranked last" in output
    rows = pq.read_table(out / systems(out)["avg"]["per_query"]).to_pylist()
    (failed,) = [r for r in rows if r["track_id"] == "set:V-900" and r["view"] == "all"]
    assert failed["ranks"] == [23, 24, 25]
    assert systems(out)["avg"]["missing"] == 2


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"split": "train"}, 3, "has no track of split 'train'; it has test, val"),
        ({"store": "/nowhere"}, 6, "there is no store at /nowhere"),
        ({"split": None}, 2, "fusion 'both' would be tuned on tracks that it is reported on"),
        ({"systems": [{"kind": "avg"}]}, 2, "avg"),
        ({"resources": {"threads": 500}}, 10, "need 500 CPUs at least"),
        ({"resources": {"gpus": 99}}, 10, "set resources.gpus: 0 to rank on CPUs"),
        (
            {
                "systems": [
                    {"kind": "oracle"},
                    {
                        "kind": "fusion",
                        "name": "f",
                        "of": ["oracle", "random"],
                        "normalise": "rank",
                        "weight": 2,
                    },
                ]
            },
            2,
            "fusion 'f' has a weight, which normalise: rank knows nothing of",
        ),
        (
            {"systems": [{"kind": "oracle", "size": 1}]},
            2,
            "unknown key 'systems.0.size'; valid keys here are kind, name",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    place: Path, tmp_path: Path, changes: dict, code: int, sentence: str
) -> None:
    found, output = call_wealy("evaluate", recipe(place, tmp_path / "out", **changes))
    assert found == code, output
    assert sentence in output
    assert "Traceback" not in output
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("held_gib", [4, 0])
def test_ids_of_another_kind_are_no_poor_system(place: Path, tmp_path: Path, held_gib: float) -> None:
    (tmp_path / "ids.txt").write_text(
        "\n".join(f"other-{i}" for i in range(len(np.load(place / "matrix.npy"))))
    )
    matrix = {
        "kind": "matrix",
        "name": "m",
        "uri": str(place / "matrix.npy"),
        "ids": str(tmp_path / "ids.txt"),
    }
    vectors = {"kind": "embeddings", "name": "e", "uri": str(place / "clews"), "id_from_path": "(.*)[.]pt"}
    for system in (matrix, vectors):
        with pytest.raises(
            ConfigError, match=f"'{system['name']}' knows none of the 24 tracks.*like 'set:V-12'"
        ):
            evaluate_here(place, tmp_path / "out", systems=[system], resources={"held_gib": held_gib})


@pytest.mark.usefixtures("ray_session")
def test_other_ids_beside_the_same_matrix_are_ranked_anew(place: Path, tmp_path: Path) -> None:
    ids = (place / "ids.txt").read_text().splitlines()
    system = {
        "kind": "matrix",
        "name": "m",
        "uri": str(place / "matrix.npy"),
        "ids": str(tmp_path / "ids.txt"),
    }
    found = []
    for order in (ids, [*ids[1:], ids[0]]):
        (tmp_path / "ids.txt").write_text("\n".join(order))
        evaluate_here(place, tmp_path / "out", systems=[system])
        found.append(systems(tmp_path / "out")["m"]["views"]["all"]["map"]["mean"])
    assert found[0] == 1.0
    assert found[1] < 0.9


@pytest.mark.usefixtures("ray_session")
def test_one_system_more_costs_one_system(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = {str(name): {"kind": name} for name in ("tfidf_words", "bm25", "oracle")}
    fusion = {"kind": "fusion", "name": "f", "of": ["bm25", "oracle"], "weight": 2.0}
    evaluate_here(place, out, systems=[names["bm25"], names["oracle"], fusion])

    def ranked(*systems: dict) -> set[str]:
        evaluate_here(place, out, systems=systems)
        record = json.loads((out / "run.json").read_text())
        return {name for name, shards in record["ranked"].items() if shards}

    assert ranked(names["oracle"], names["tfidf_words"], names["bm25"], fusion) == {"tfidf_words"}
    assert ranked(names["oracle"], names["bm25"], fusion | {"weight": 3.0}) == {"f"}
    anew = {"kind": "avg_embedding", "name": "bm25"}
    assert ranked(names["oracle"], anew, fusion) == {"bm25", "f"}, "a fusion is made of its parts"
    assert ranked(names["bm25"], names["oracle"], fusion) == set()


@pytest.mark.usefixtures("ray_session")
def test_a_changed_recipe_leaves_no_mixture_behind(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, average = tmp_path / "out", [{"kind": "avg_embedding", "name": "avg"}]
    evaluate_here(place, out, systems=average)
    storage_write = Storage.write

    def write(self: Storage, uri: str, data: bytes) -> None:
        storage_write(self, uri, data)
        if "/per_query/" in uri:
            raise KeyboardInterrupt

    monkeypatch.setattr(Storage, "write", write)
    with pytest.raises(KeyboardInterrupt):
        evaluate_here(place, out, systems=average, split="val")
    with pytest.raises(ConfigError, match="nor a finished evaluation"):
        write_report(Storage(), str(out))
    monkeypatch.undo()
    evaluate_here(place, out, systems=average, split="val")
    assert json.loads((out / "metrics.json").read_text())["collection"]["queries"] == 12
    assert write_report(Storage(), str(out)).endswith("report.html")


@pytest.mark.usefixtures("ray_session")
def test_tuned_on_test_is_said(place: Path, tmp_path: Path) -> None:
    fused = [
        {"kind": "oracle"},
        {"kind": "avg_embedding", "name": "avg"},
        {"kind": "fusion", "name": "f", "of": ["oracle", "avg"], "normalise": "learned"},
    ]
    for tuning_split, said in (("test", True), ("val", False)):
        out = tmp_path / tuning_split
        evaluate_here(place, out, systems=fused, tuning_split=tuning_split, tune_on_test=True)
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["tuned_on_test"] is said
        assert ("chosen on tracks that are reported on" in metrics_table(str(out), metrics)) is said
        page = Path(write_report(Storage(), str(out))).read_text()
        assert ("tuned on tracks that it is reported on" in page) is said
        assert "s of audio per second" not in page  # the store names no run that worked


def _die_once(piece: int, folder: str) -> int:
    marker = Path(folder) / str(piece)
    if piece == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return piece * piece


@pytest.mark.usefixtures("ray_session")
def test_a_lost_worker_costs_its_piece_only(tmp_path: Path) -> None:
    found = [done for done in share(_die_once, [0, 1, 2, 3], str(tmp_path), cluster=connect()) if done]
    assert sorted(found) == [(0, 0), (1, 1), (2, 4), (3, 9)]


def _rank(tile: int, scores: VectorScores, collection: Collection) -> pa.Table:
    torch.set_num_threads(1)
    return evaluate_tile(scores, collection, tile)


@pytest.mark.usefixtures("ray_session")
def test_any_number_of_workers_gives_the_same_bits() -> None:
    rng = np.random.default_rng(3)
    size = 1500
    cliques = [f"c{c}" for c in rng.integers(0, 300, size)]
    collection = Collection.of(
        [f"t{i:04d}" for i in range(size)], cliques, languages=rng.choice(["en", "es"], size)
    )
    vectors = rng.normal(size=(size, 96)).astype(np.float32)
    scores = VectorScores.cosine(collection, vectors, np.zeros(size, bool))
    tables = []
    for workers in (1, 2, 5):
        parts = dict(
            done
            for done in share(
                _rank,
                range(num_tiles(collection)),
                scores,
                collection,
                cluster=connect(),
                max_workers=workers,
            )
            if done
        )
        tables.append(pa.concat_tables([parts[tile] for tile in sorted(parts)]))
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    here = evaluate(scores, collection)
    assert np.abs(here["ap"].to_numpy() - tables[0]["ap"].to_numpy()).max() < 1e-6
