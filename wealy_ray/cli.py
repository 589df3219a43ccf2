"""`wealy`: one verb per step. Only wiring: settings come from the recipe, work is done in the rooms."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from wealy_ray import __version__
from wealy_ray.errors import ConfigError, WealyError

log = logging.getLogger("wealy_ray")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one verb and exits with its code (see `wealy_ray.errors`)."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("wealy_ray").setLevel(logging.INFO)
    # SIGTERM (a stopped job, a drained node) ends like Ctrl-C: what is finished is published first
    signal.signal(signal.SIGTERM, _interrupt)
    _leave(run(arguments))


def _leave(code: int) -> NoReturn:
    """Ends the process without taking Python down, under which threads of Arrow and Ray Data may crash (code 134)."""
    ray = sys.modules.get("ray")
    if code == 0 and ray is not None and ray.is_initialized():
        ray.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns its exit code, after one sentence where it failed."""
    args = _parser().parse_args(arguments)
    try:
        args.verb(args)
    except WealyError as e:
        if args.traceback:
            traceback.print_exc()
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted; what is finished is saved, run the same command again to go on", file=sys.stderr)
        return 130
    except Exception as e:
        if args.traceback:
            traceback.print_exc()
        lines = str(e).strip().splitlines()
        print(
            # the last line: Ray puts a worker's whole traceback into the message
            f"error: unexpected {type(e).__name__}: {lines[-1] if lines else ''} (a defect of wealy-ray; "
            "`wealy --traceback ...` shows where)",
            file=sys.stderr,
        )
        return 1
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wealy", description="Find recordings that share their lyrics.")
    parser.add_argument("--version", action="version", version=f"wealy-ray {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    manifest = verbs.add_parser(
        "manifest", help="build a manifest from a folder, bucket prefix, CSV or JSONL"
    )
    manifest.add_argument(
        "source", help="folder or prefix of audio, or a .csv or .jsonl file with one row per track"
    )
    manifest.add_argument("--out", required=True, help="the Parquet manifest to write (any URI)")
    manifest.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=THEIRS",
        help="manifest column NAME is called THEIRS in the file, e.g. audio_uri=path",
    )
    _add_storage_options(manifest)
    manifest.set_defaults(verb=_manifest)

    for name, verb, help_text in (
        ("extract", _extract, "audio -> decoder states; run again to go on where it stopped"),
        ("retry-failed", _retry_failed, "work on the tracks that failed, and on nothing else"),
        ("train", _train, "states -> a model; run again to go on where it stopped"),
        ("embed", _embed, "states -> vectors by a model; run again to go on where it stopped"),
        ("evaluate", _evaluate, "states or vectors -> exact retrieval metrics"),
    ):
        command = verbs.add_parser(name, help=help_text)
        command.add_argument("recipe", help="YAML file, see recipes/")
        command.add_argument(
            "override", nargs="*", help="settings that replace the recipe's: engine.num_slots=8"
        )
        command.set_defaults(verb=verb)

    report = verbs.add_parser("report", help="one self-contained HTML page about a training or an evaluation")
    report.add_argument("run", help="folder of the run (the recipe's `out`)")
    _add_storage_options(report)
    report.set_defaults(verb=_report)

    search = verbs.add_parser(
        "search", help="the tracks that are nearest to a track, an audio file or a text"
    )
    search.add_argument("store", help="folder or bucket prefix of the store")
    search.add_argument("query", help="a track id of the store, or an audio file (path or URI)")
    search.add_argument("--text", action="store_true", help="the query is lyrics")
    search.add_argument(
        "--by",
        help="what is compared: embedding, tfidf_characters, tfidf_words, more_like_this, bm25 or avg_embedding "
        "(default: embedding once `wealy embed` has ended, else tfidf_characters)",
    )
    search.add_argument("--top", type=int, default=10, help="how many tracks (default: %(default)s)")
    search.add_argument(
        "--model", help="Whisper weights for an audio file (else those of the store's recipe)"
    )
    search.add_argument("--extractor-id", help="which extractor of the store, where it holds several")
    search.add_argument(
        "--embedder-id", help="which embeddings (default: those of the store's newest release)"
    )
    search.add_argument(
        "--approximate", metavar="DIR", help="local folder of an approximate index; built when absent"
    )
    _add_storage_options(search)
    search.set_defaults(verb=_search)

    status = verbs.add_parser("status", help="what is in a store, now")
    status.add_argument("store", help="folder or bucket prefix of the store")
    _add_storage_options(status)
    status.set_defaults(verb=_status)
    return parser


def _add_storage_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--s3-endpoint-url", help="S3-compatible server (else AWS_ENDPOINT_URL, else AWS)")
    parser.add_argument("--s3-region", help="region of the bucket")


def _storage(args: argparse.Namespace) -> Any:
    from wealy_ray.config import StorageSettings
    from wealy_ray.storage import Storage

    return Storage(StorageSettings(s3_endpoint_url=args.s3_endpoint_url, s3_region=args.s3_region))


def _manifest(args: argparse.Namespace) -> None:
    from wealy_ray.catalog import manifest_from_folder, manifest_from_rows, write_manifest

    columns = {}
    for pair in args.column:
        name, sep, theirs = pair.partition("=")
        if not sep:
            raise ConfigError(f"'{pair}' is not of the form NAME=THEIRS")
        columns[name] = theirs
    storage = _storage(args)
    if args.source.lower().endswith((".csv", ".jsonl")):
        table = manifest_from_rows(storage, args.source, columns)
    else:
        table = manifest_from_folder(storage, args.source)
    write_manifest(storage, args.out, table)
    print(f"{table.num_rows} tracks written to {args.out}")


def _extract(args: argparse.Namespace) -> None:
    _run_extract(args, retry_failed=False)


def _retry_failed(args: argparse.Namespace) -> None:
    _run_extract(args, retry_failed=True)


def _run_extract(args: argparse.Namespace, *, retry_failed: bool) -> None:
    from wealy_ray.config import load_recipe, parse_override
    from wealy_ray.pipelines.extract import run_extract
    from wealy_ray.report.extract_summary import extract_table

    recipe = load_recipe(args.recipe, dict(parse_override(text) for text in args.override))
    print(extract_table(run_extract(recipe, retry_failed=retry_failed)))


def _train(args: argparse.Namespace) -> None:
    from wealy_ray.config import load_settings, parse_override
    from wealy_ray.pipelines.train import run_train
    from wealy_ray.training.recipe import TrainRecipe
    from wealy_ray.training.summary import train_table

    overrides = dict(parse_override(text) for text in args.override)
    print(train_table(run_train(load_settings(TrainRecipe, args.recipe, overrides))))


def _embed(args: argparse.Namespace) -> None:
    from wealy_ray.config import load_settings, parse_override
    from wealy_ray.model.recipe import EmbedRecipe
    from wealy_ray.pipelines.embed import run_embed
    from wealy_ray.report.embed_summary import embed_table

    overrides = dict(parse_override(text) for text in args.override)
    print(embed_table(run_embed(load_settings(EmbedRecipe, args.recipe, overrides))))


def _evaluate(args: argparse.Namespace) -> None:
    from wealy_ray.config import load_settings, parse_override
    from wealy_ray.pipelines.evaluate import run_evaluate
    from wealy_ray.report.metrics_table import metrics_table
    from wealy_ray.retrieval.recipe import EvaluateRecipe

    overrides = dict(parse_override(text) for text in args.override)
    found = run_evaluate(load_settings(EvaluateRecipe, args.recipe, overrides))
    print(metrics_table(found.out, found.metrics))


def _report(args: argparse.Namespace) -> None:
    from wealy_ray.report.run_page import write_report

    print(f"report written to {write_report(_storage(args), args.run)}")


def _search(args: argparse.Namespace) -> None:
    from wealy_ray.pipelines.search import run_search, search_table

    if args.top < 1:
        raise ConfigError("--top must be at least 1")
    searched = run_search(
        _storage(args),
        args.store,
        args.query,
        by=args.by,
        top=args.top,
        is_text=args.text,
        model=args.model,
        extractor_id=args.extractor_id,
        embedder_id=args.embedder_id,
        approximate=args.approximate,
    )
    print(search_table(searched))


def _status(args: argparse.Namespace) -> None:
    from wealy_ray.report.status import store_status

    print(store_status(_storage(args), args.store))


if __name__ == "__main__":
    main()
