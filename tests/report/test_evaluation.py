"""The report of an evaluation, from synthetic rankings."""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wealy_ray.errors import ConfigError
from wealy_ray.report.diagnostics import diagnose, is_repetitive, main_system
from wealy_ray.report.evaluation import eleven_points, expected_chance, hardest_cliques, write_report
from wealy_ray.storage import Storage

HOSTILE = '<script>alert("x")</script> & <b>la la</b>'
KINDS = {"WEALY": "wealy", "AvgEmb": "avg_embedding", "TF-IDF words": "tfidf_words", "random": "random"}
SKILL = {"WEALY": 5.0, "AvgEmb": 2.5, "TF-IDF words": 3.5, "random": 0.0}


def summary(aps: list[float], gap: float = 0.0) -> dict:
    mean = float(np.mean(aps))
    stat = {"mean": mean, "ci": 0.02, "low": max(mean - 0.03, 0), "high": min(mean + 0.03, 1)}
    rank = {"mean": 12.34, "ci": 1.25, "low": 10.5, "high": 14.5}
    names = ("map", "mrr", "hit_1", "hit_10", "p_10")
    bounds = {"map_optimistic": mean + gap, "map_pessimistic": mean - gap}
    return {"n": len(aps), **dict.fromkeys(names, stat), "mr1": rank, "nar": rank, **bounds}


def query_rows(skill: float, num_cliques: int, seed: int) -> list[dict]:
    """All-against-all queries of scores that are `skill` higher within a clique."""
    rng = np.random.default_rng(seed)
    sizes = [2 + i % 6 for i in range(num_cliques)]
    clique = np.repeat(np.arange(num_cliques), sizes)
    score = rng.normal(size=(len(clique), len(clique))) + skill * (clique[:, None] == clique)
    rows = []
    for q in range(len(clique)):
        order = [c for c in np.argsort(-score[q]) if c != q]
        ranks = [i + 1 for i, c in enumerate(order) if clique[c] == clique[q]]
        row = {
            "track_id": f"track-{q}",
            "clique_id": f"clique-{clique[q]}",
            "language": ("en", "es", "pt", "ja")[clique[q] % 4],
            "kind": "original" if q % 3 == 0 else "cover",
            "split": "test",
            "clique_size": sizes[clique[q]],
            "view": "all",
            "num_relevant": len(ranks),
            "num_candidates": len(order),
            "ap": float(np.mean([(j + 1) / r for j, r in enumerate(ranks)])),
            "first_rank": ranks[0],
            "nar": 0.0,
            "ranks": ranks,
        }
        rows += [row, {**row, "view": "within_language"}]
    return rows


def write_run(root: Path, names: list[str], num_cliques: int, *, optional: bool) -> dict:
    """An evaluation's folder as the contract has it; returns its metrics."""
    (root / "per_query").mkdir(parents=True)
    systems = []
    for i, name in enumerate(names):
        rows = query_rows(SKILL[name], num_cliques, seed=i)
        pq.write_table(pa.Table.from_pylist(rows), root / "per_query" / f"{i}.parquet")
        rows = [r for r in rows if r["view"] == "all"]
        groups = {
            group: {
                str(value): summary([r["ap"] for r in rows if r[group] == value])
                for value in sorted({r[group] for r in rows}, reverse=True)
            }
            for group in ("language", "kind", "clique_size", "split")
        }
        aps = [r["ap"] for r in rows]
        views = {"all": summary(aps, gap=0.03 if name == "TF-IDF words" else 0.0)}
        if optional:
            views |= {"within_language": summary(aps), "cross_language": summary(aps[:5])}
        per_query = f"per_query/{i}.parquet"
        entry = {"name": name, "kind": KINDS[name], "missing": 3 * i, "per_query": per_query}
        systems.append({**entry, "views": views, "groups": groups})
    num = len(rows)
    collection = {"tracks": num, "queries": num, "candidates": num, "cliques": num_cliques}
    metrics: dict = {
        "title": "Synthetic <test>",
        "collection": {**collection, "without_states": 4, "policy": "drop", "split": "test"},
        "extraction": None,
        "systems": systems,
        "fusion_curves": [],
    }
    if optional:
        rng = np.random.default_rng(9)
        metrics["extraction"] = {
            "tracks": 1240,
            "ok": 1200,
            "failed": 40,
            "audio_s": 250_000.0,
            "audio_s_per_s": 1234.5,
            "states": 600_000,
            "languages": {"en": 800, "es": 200, "pt": 110, "ja": 60, "": 30},
            "failures": {"decoder_error": 28, "missing_object": 12},
            "states_per_track": [int(n) for n in rng.gamma(6, 80, 1200)],
            "no_speech": [float(p) for p in rng.beta(0.6, 3, 5000)],
        }
        weights = [0.0, 0.25, 0.5, 0.75, 1.0]
        curve = {"name": "WEALY + CLEWS", "split": "validation", "weights": weights}
        fitted = [["WEALY", 3.21], ["TF-IDF words", 0.5]]
        metrics["fitted_fusions"] = [{"name": "learned", "split": "validation", "fitted": fitted}]
        metrics["fusion_curves"] = [{**curve, "map": [0.5, 0.62, 0.68, 0.66, 0.6], "chosen": 0.5}]
        clique = np.repeat(np.arange(12), 4)[rng.permutation(48)]
        similarity = rng.normal(0.2, 0.1, (48, 48)) + 0.5 * (clique[:, None] == clique)
        ids = {"track_ids": [f"t{i}" for i in range(48)], "clique_ids": [f"c{c:02d}" for c in clique]}
        names_ = {**ids, "system": "AvgEmb"}
        np.savez(root / "sample.npz", similarity=similarity.astype(np.float32), **names_)
        text = [
            HOSTILE + " under the same moon we sing until the morning comes again\n" * (i % 2)
            for i in range(num)
        ]
        text[0] = "la " * 4000
        table = pa.table({"track_id": [f"track-{i}" for i in range(num)], "text": text})
        pq.write_table(table, root / "transcripts.parquet")
    (root / "metrics.json").write_text(json.dumps(metrics))
    return metrics


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    root = tmp_path_factory.mktemp("evaluation") / "run"
    metrics = write_run(root, list(KINDS), num_cliques=20, optional=True)
    uri = write_report(Storage(), str(root))
    assert uri == f"{root}/report.html"
    return root, metrics, Path(uri).read_text()


def section(page: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">.*?</section>', page, re.S)
    assert found, name
    return found.group()


def test_every_figure_shows_something_and_stands_in_the_page(full: tuple[Path, dict, str]) -> None:
    root, _, page = full
    files = sorted((root / "figures").glob("*.png"))
    names = "first_ranks fusion languages map map_by_clique_size map_by_kind map_by_language no_speech"
    assert [f.stem for f in files] == [*names.split(), "precision_recall", "similarity", "states"]
    for file in files:
        pixels = matplotlib.image.imread(io.BytesIO(file.read_bytes()))[..., :3]
        drawn = (np.abs(pixels - 1) > 0.05).any(axis=2)
        assert drawn.mean() > 0.005, file
        assert min(pixels.shape[:2]) > 150, file
    assert page.count("<img ") == len(files)
    assert all(len(alt) > 10 for alt in re.findall(r'<img [^>]*alt="([^"]*)"', page))
    assert len(re.findall(r'<img [^>]*alt="', page)) == len(files)


def test_needs_no_other_file(full: tuple[Path, dict, str]) -> None:
    page = full[2]
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)', page))
    assert not re.search(r"https?://|<link|<script|@import|url\(", page)


def test_tables_hold_the_numbers(full: tuple[Path, dict, str]) -> None:
    _, metrics, page = full
    results = section(page, "results")
    for system in metrics["systems"]:
        found = system["views"]["all"]["map"]
        assert f"<td>{found['mean']:.3f} " in results
        assert f"[{found['low']:.3f}, {found['high']:.3f}]" in results
    assert "<td>12.3 " in results  # MR1
    assert "<td>12.34 " in results  # NAR
    tfidf = metrics["systems"][2]["views"]["all"]
    assert f"ties: {tfidf['map_pessimistic']:.3f} to {tfidf['map_optimistic']:.3f}" in results
    assert results.count("ties:") == 1  # only where the bounds differ
    assert "Candidates in other languages" in results
    published = section(page, "published")
    assert ".692" in published
    assert ".692" not in results
    assert "the paper's own corpora" in published
    extraction = section(page, "extraction")
    assert "the codec refuses the stream" in extraction
    assert "69.4 hours" in extraction
    assert "learned: score = 3.21 &times; WEALY + 0.5 &times; TF-IDF words, fitted" in section(page, "fusion")
    assert "1,234.5 s of audio per second" in extraction
    assert "Similarity of a sample&#39;s tracks by AvgEmb" in section(page, "sample")
    assert f"MAP {expected_chance(pa.Table.from_pylist(query_rows(0, 20, 0))):.4f}" in page


def test_foreign_text_is_escaped(full: tuple[Path, dict, str]) -> None:
    page = full[2]
    assert "<b>la la</b>" not in page
    assert html.escape(HOSTILE).replace("&quot;", "&#34;") in section(page, "hardest")
    assert "<title>Synthetic &lt;test&gt;</title>" in page


def test_hardest_cliques_are_the_worst_ones() -> None:
    rows = query_rows(2.0, 20, seed=5)
    by_clique: dict[str, list[float]] = {}
    for row in rows:
        by_clique.setdefault(row["clique_id"], []).append(row["ap"])
    expected = sorted(by_clique, key=lambda c: np.mean(by_clique[c]))[:5]
    found = hardest_cliques(pa.Table.from_pylist(rows))
    assert [c["id"] for c in found] == expected
    aps = [v["ap"] for v in found[0]["versions"]]
    assert aps == sorted(aps)


@pytest.mark.parametrize(("names", "num_cliques"), [(["WEALY"], 1), (["random"], 2)])
def test_absent_parts_are_left_out(tmp_path: Path, names: list[str], num_cliques: int) -> None:
    write_run(tmp_path / "run", names, num_cliques, optional=False)
    page = Path(write_report(Storage(), str(tmp_path / "run"))).read_text()
    for name in ("fusion", "sample", "extraction"):
        assert f'<section id="{name}"' not in page
        assert not (tmp_path / "run" / "figures" / f"{name}.png").exists()
    assert "other languages</h3>" not in page
    assert "transcript is empty" not in page
    assert "<h3>clique-0" in section(page, "hardest")


def test_an_evaluation_without_queries_still_has_a_page(tmp_path: Path) -> None:
    metrics = write_run(tmp_path, ["WEALY"], 1, optional=False)
    metrics["systems"][0] |= {"views": {}, "groups": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    empty = pq.read_table(tmp_path / "per_query" / "0.parquet").slice(0, 0)
    pq.write_table(empty, tmp_path / "per_query" / "0.parquet")
    page = Path(write_report(Storage(), str(tmp_path))).read_text()
    assert "<img" not in page
    assert "published" in page


def test_more_systems_than_colours(tmp_path: Path) -> None:
    metrics = write_run(tmp_path, ["WEALY"], 3, optional=False)
    groups = {"clique_size": {name: summary([0.4]) for name in ("11-20", "2", "21+", "3-5")}}
    entry = {**metrics["systems"][0], "groups": groups}
    metrics["systems"] = [{**entry, "name": f"$system {i}$"} for i in range(11)]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = Path(write_report(Storage(), str(tmp_path))).read_text()
    assert "$system 10$" in section(page, "results")
    assert "$system 10$" in section(page, "groups")
    assert "show 7 of the 11 systems" in page
    assert re.findall(r'<th scope="col">([^<]*)<br>', section(page, "groups")) == ["2", "3-5", "11-20", "21+"]


def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metrics\.json.*`wealy evaluate`"):
        write_report(Storage(), str(tmp_path))
    write_run(tmp_path / "run", ["WEALY"], 1, optional=False)
    (tmp_path / "run" / "per_query" / "0.parquet").unlink()
    with pytest.raises(ConfigError, match=r"0\.parquet is missing.*`wealy evaluate` again"):
        write_report(Storage(), str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["metrics.json", "per_query/0.parquet", "sample.npz", "transcripts.parquet"])
@pytest.mark.parametrize("how", ["cut", "other", "flipped"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, how: str) -> None:
    write_run(tmp_path, ["WEALY"], 4, optional=True)
    data = (tmp_path / name).read_bytes()
    middle = len(data) // 3
    flipped = data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 40]) + data[middle + 40 :]
    damaged = {"cut": data[: 2 * middle], "other": b"[]", "flipped": flipped}[how]
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(ConfigError, match=rf"{name} is .*run `wealy evaluate` again"):
        write_report(Storage(), str(tmp_path))


def test_eleven_points_against_a_slow_loop() -> None:
    rng = np.random.default_rng(3)
    ranks = [np.sort(rng.choice(60, rng.integers(1, 24), replace=False)) + 1 for _ in range(40)]
    slow = np.zeros((len(ranks), 11))
    for q, found in enumerate(ranks):
        for tenth in range(11):
            reached = [(j + 1) / r for j, r in enumerate(found) if 10 * (j + 1) >= tenth * len(found)]
            slow[q, tenth] = max(reached)
    np.testing.assert_allclose(eleven_points(ranks), slow.mean(axis=0), rtol=1e-12)


def test_chance_against_random_orders() -> None:
    rng = np.random.default_rng(4)
    relevant, candidates = 3, 17
    aps = []
    for _ in range(20_000):
        ranks = np.sort(rng.permutation(candidates)[:relevant]) + 1
        aps.append(np.mean(np.arange(1, relevant + 1) / ranks))
    rows = pa.table({"num_candidates": [candidates], "ranks": [list(range(1, relevant + 1))]})
    assert expected_chance(rows) == pytest.approx(np.mean(aps), abs=0.005)


def system(kind: str, mean: float, gap: float = 0.0, missing: int = 0) -> dict:
    return {
        "name": kind,
        "kind": kind,
        "missing": missing,
        "views": {"all": summary([mean], gap)},
        "groups": {},
    }


@pytest.mark.parametrize(
    ("systems", "said"),
    [
        ([system("avg_embedding", 0.015), system("random", 0.01)], "check the extraction"),
        ([system("wealy", 0.4), system("language", 0.33)], "learned languages"),
        ([system("wealy", 0.2), system("avg_embedding", 0.3)], "no better than the mean"),
        ([system("wealy", 0.4), system("tfidf_words", 0.5)], "TF-IDF on the transcripts"),
        ([system("wealy", 0.4, gap=0.05)], "how ties are broken"),
        ([system("wealy", 0.4, missing=50)], "knows nothing of 50"),
        ([system("wealy", 0.4) | {"outdated": 3}], "wealy has no vectors of the present states of 3 tracks"),
        (
            [system("tfidf_words", 0.4, missing=50), system("bm25", 0.3, missing=50)],
            "tfidf_words, bm25 know nothing of 50 of 1,000 tracks, which rank last: their figures",
        ),
    ],
)
def test_each_cause_is_named_alone(systems: list[dict], said: str) -> None:
    metrics = {"collection": {"tracks": 1000, "queries": 900}, "systems": systems}
    found = diagnose(metrics)
    assert len(found) == 1
    assert said in found[0]


def network(name: str, kind: str, mean: float, languages: dict[str, int], manifest: str = "m") -> dict:
    train = {"tracks": 300, "cliques": 100, "dropped": 0}
    data = {"manifest": manifest, "index": 1, "train": train, "languages": languages}
    facts = {"network": kind, "extractor_id": "e", "data": data}
    return {**system("embeddings", mean), "name": name, "facts": facts}


@pytest.mark.parametrize(
    ("low", "languages", "manifest", "said"),
    [
        (-0.02, {"es": 100, "en": 200}, "m", "no temporal modelling"),
        (0.01, {"es": 100, "en": 200}, "m", None),
        (-0.02, {"es": 100, "en": 200}, "other", None),  # not of the same data: nothing can be said
        (-0.02, {"en": 300}, "other", None),
    ],
)
def test_a_network_without_time(low: float, languages: dict, manifest: str, said: str | None) -> None:
    gains = {("deep", "plain"): (0.005, low, 0.03)}
    systems = [
        network("plain", "avg_mlp", 0.5, {"es": 100, "en": 200}),
        network("worse", "transformer", 0.4, {"es": 100, "en": 200}),  # of several the best is compared
        network("deep", "transformer", 0.51, languages, manifest),
    ]
    metrics = {"collection": {"tracks": 1000, "queries": 900}, "systems": systems}
    found = diagnose(metrics, gain=lambda a, b: gains.get((a, b)))
    assert len(found) == (said is not None), found
    if said is not None:
        assert said in found[0]
        assert "deep, a Transformer, gains +0.005 MAP (95 % interval -0.020 to +0.030) on plain" in found[0]
    assert main_system(systems)["name"] == "worse"  # type: ignore[index]


def test_data_that_lack_languages() -> None:
    many, english = {"en": 290, "es": 6, "": 4}, {"en": 200, "": 3}
    gains = {("many", "english"): (-0.01, -0.03, 0.01), ("mlp", "english"): (-0.5, -0.6, -0.4)}
    systems = [
        network("english", "transformer", 0.5, english, "one"),
        network("many", "transformer", 0.49, many, "two"),
        network("mlp", "avg_mlp", 0.1, many, "three"),
        network("silent", "transformer", 0.6, {}, "four"),
    ]
    metrics = {"collection": {"tracks": 1000, "queries": 900}, "systems": systems}
    (found,) = diagnose(metrics, gain=lambda a, b: gains.get((a, b)))
    assert "many, trained on several languages (en 290, es 6, unknown 4), gains -0.010" in found
    assert "the data lack languages" in found
    assert diagnose(metrics, gain=lambda *_: (0.04, 0.02, 0.06)) == []
    assert diagnose(metrics) == []  # nothing to compare with


def test_networks_are_told_apart_in_the_page(tmp_path: Path) -> None:
    metrics = write_run(tmp_path, ["WEALY", "AvgEmb", "random"], 12, optional=False)
    for entry, kind in zip(metrics["systems"], ("avg_mlp", "transformer", None), strict=True):
        if kind is not None:
            entry |= {"kind": "embeddings", "facts": network("", kind, 0, {"en": 200, "es": 100})["facts"]}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = Path(write_report(Storage(), str(tmp_path))).read_text()
    rows = query_rows(SKILL["AvgEmb"], 12, seed=1), query_rows(SKILL["WEALY"], 12, seed=0)
    gain = np.mean([a["ap"] - b["ap"] for a, b in zip(*rows, strict=True)])
    assert f"AvgEmb, a Transformer, gains {gain:+.3f} MAP" in section(page, "diagnostics")
    assert "Transformer trained on 300 tracks of 100 cliques (en 200, es 100)" in section(page, "results")
    assert "<h2>Hardest cliques of AvgEmb</h2>" in page


def test_a_healthy_evaluation_has_no_findings() -> None:
    kinds = {"wealy": 0.6, "avg_embedding": 0.3, "tfidf_words": 0.5, "language": 0.02, "random": 0.004}
    systems = [system(kind, mean) for kind, mean in kinds.items()]
    metrics = {"collection": {"tracks": 1000, "queries": 900}, "systems": systems}
    assert diagnose(metrics, chance=0.004, repetitive=0.01) == []
    extraction = {"tracks": 100, "failed": 5, "failures": {"not_audio": 5}, "no_speech": [0.9, 0.8, 0.1]}
    curve = {"name": "both", "weights": [0, 1, 2], "map": [0.1, 0.2, 0.3], "chosen": 2}
    ill = diagnose(
        {**metrics, "extraction": extraction, "fusion_curves": [curve], "tuned_on_test": True}, 0.004, 0.4
    )
    said = ("not_audio", "silent", "hallucinates", "larger", "too good")
    assert [word for word in said if any(word in s for s in ill)] == list(said)


def test_repetition_and_main_system() -> None:
    assert is_repetitive("thank you for watching " * 40)
    assert not is_repetitive(
        "Every line here tells something else, as most verses of most songs happen to do."
    )
    assert not is_repetitive("")
    assert main_system([system("oracle", 0.9), system("wealy", 0.1)])["kind"] == "wealy"  # type: ignore[index]
    assert main_system([system("oracle", 0.9), system("bm25", 0.1)])["kind"] == "bm25"  # type: ignore[index]
    assert main_system([]) is None
