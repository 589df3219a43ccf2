"""`make reproduce-small`: songs -> states -> models -> one evaluation -> tables and the learning curve.

Every step goes on where it was stopped. What comes out lies in runs/reproduce-small: results.md, learning-curve.png,
results.json, evaluation/ (with its report).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pyarrow as pa

from examples.reproduce_small.plan import SEEDS, Variant, variants
from examples.reproduce_small.results import plot_curve, rows_of, table_of
from examples.reproduce_small.training import slug, train_and_embed
from wealy_ray.catalog import manifest_from_rows, read_manifest, write_manifest
from wealy_ray.config import ExtractRecipe, load_recipe, load_settings
from wealy_ray.pipelines.evaluate import run_evaluate
from wealy_ray.pipelines.extract import run_extract
from wealy_ray.report.extract_summary import extract_table
from wealy_ray.report.run_page import write_report
from wealy_ray.retrieval.recipe import Embeddings, EvaluateRecipe
from wealy_ray.storage import Storage

FOLDER = Path("runs/reproduce-small")
SONGS = ("training-songs", "more-songs")
BASELINES = (
    "random",
    "same language",
    "AvgEmb",
    "AvgEmb, standardised",
    "TF-IDF, words",
    "TF-IDF, characters",
    "BM25",
    "MiniLM",
)


def main() -> None:
    """Does what is left to do."""
    parser = argparse.ArgumentParser(prog="python -m examples.reproduce_small", description=__doc__)
    parser.add_argument(
        "--songs", required=True, type=Path, help="folder that holds training-songs and more-songs"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="trainings at a time")
    arguments = parser.parse_args()
    _manifest(arguments.songs.resolve())
    recipe: ExtractRecipe = load_recipe("recipes/reproduce-small-extract.yaml", {})
    print(extract_table(run_extract(recipe)), flush=True)
    _train(variants(), arguments.processes)
    _evaluate(variants())


def _manifest(songs: Path) -> None:
    storage, path = Storage(), FOLDER / "manifest.parquet"
    columns = {"audio_uri": "path", "clique_id": "lyrics_id"}
    tables = [manifest_from_rows(storage, str(songs / name / "manifest.jsonl"), columns) for name in SONGS]
    table = pa.concat_tables(tables)
    # of the same files it is kept: a copy of them has other times, and would be extracted again
    if not path.exists() or read_manifest(storage, str(path)).table["audio_uri"] != table["audio_uri"]:
        write_manifest(storage, str(path), table)


def _train(chosen: list[Variant], processes: int) -> None:
    began_s, jobs = time.monotonic(), [(variant, seed) for variant in chosen for seed in SEEDS]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train_and_embed, variant, seed, FOLDER) for variant, seed in jobs]
        for done, future in enumerate(as_completed(futures), 1):
            spent_s = time.monotonic() - began_s
            print(f"{done}/{len(jobs)} models, {spent_s:.0f} s: {future.result()}", flush=True)


def _evaluate(chosen: list[Variant]) -> None:
    recipe = load_settings(EvaluateRecipe, "recipes/reproduce-small-evaluate.yaml", {})
    systems: dict[str, list[str]] = {name: [name] for name in BASELINES}
    vectors = []
    for variant in chosen:
        systems[variant.name] = [f"{variant.name}, seed {seed}" for seed in SEEDS]
        vectors += [
            Embeddings(
                kind="embeddings",
                name=f"{variant.name}, seed {seed}",
                uri=str(FOLDER / "vectors" / f"{slug(variant, seed)}.parquet"),
            )
            for seed in SEEDS
        ]
    found = run_evaluate(recipe.model_copy(update={"systems": (*recipe.systems, *vectors)}))
    rows = rows_of(Path(found.out), systems, reference="WEALY")
    plot_curve(rows, FOLDER / "learning-curve.png")
    (FOLDER / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    by_group = {
        group: table_of({name: rows[name] for name in names})
        for group, names in {
            "Systems": [*BASELINES, *(v.name for v in chosen if v.group == "systems")],
            "Ablations of WEALY": ["WEALY", *(v.name for v in chosen if v.group == "ablation")],
            "Fewer training works": [v.name for v in chosen if v.group == "curve"],
        }.items()
    }
    text = "\n\n".join(f"## {group}\n\n{table}" for group, table in by_group.items())
    (FOLDER / "results.md").write_text(text + "\n")
    print(text)
    print(f"report written to {write_report(Storage(), found.out)}")


if __name__ == "__main__":
    main()
