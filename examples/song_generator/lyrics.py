"""Lyrics: lines without a language, drawn from templates and nouns, and their words in a language.

The same line has words in every language, so a translation is a version with the same lines.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

LANGUAGES = ("en", "es", "it", "de")
SECTIONS = {"V1": 4, "C": 2, "V2": 4}
"""Sections of a song and their lines: two verses and a chorus."""

Words = dict[str, str]
"""A phrase by language."""


def _phrases(rows: Iterable[str]) -> list[Words]:
    return [dict(zip(LANGUAGES, re.split(r" *\| *", row), strict=True)) for row in rows]


_LEXICON = yaml.safe_load(Path(__file__).with_name("lexicon.yaml").read_text(encoding="utf-8"))
_COMMON = _phrases(_LEXICON["common"])
_THEMES = {name: _phrases(rows) for name, rows in _LEXICON["themes"].items()}
_VERBS = {form: _phrases(rows) for form, rows in _LEXICON["verbs"].items()}
TEMPLATES: dict[str, Words] = _LEXICON["templates"]
NOUNS = {noun["en"]: noun for nouns in (_COMMON, *_THEMES.values()) for noun in nouns}
THEMES = {name: [noun["en"] for noun in nouns] for name, nouns in _THEMES.items()}


def rng_of(*key: object) -> random.Random:
    """Random numbers that depend on the given names alone: no song depends on another one's draws."""
    return random.Random(zlib.crc32("|".join(map(str, key)).encode()))


@dataclass(frozen=True)
class Line:
    """One line without a language: a template, three nouns by their English name, and verbs by number."""

    template: str
    nouns: tuple[str, str, str]
    third: int
    past: int
    imperative: int
    infinitive: int

    def words(self, language: str) -> str:
        """The line in a language."""
        subject, other, thing = (NOUNS[noun][language] for noun in self.nouns)
        verb = _VERBS["third"][self.third][language]
        template = TEMPLATES[self.template][language]
        if language == "it" and verb[0] in "aeiou":
            template = template.replace("mi {V}", "m'{V}")
        line = template.format(
            S=subject,
            T=other,
            O=_accusative(thing, language),
            A=_accusative(other, language),
            V=verb,
            P=_VERBS["past"][self.past][language],
            I=_VERBS["imperative"][self.imperative][language],
            W=_VERBS["infinitive"][self.infinitive][language],
        )
        return line[0].upper() + line[1:]


Lyrics = dict[str, list[Line]]
"""Lines by section."""


def make_lyrics(rng: random.Random, themes: Iterable[str]) -> Lyrics:
    """Lyrics about the themes; no section uses a template twice."""
    nouns = [noun for theme in themes for noun in THEMES[theme]]
    return {section: _make_section(rng, nouns, num_lines) for section, num_lines in SECTIONS.items()}


def _make_section(rng: random.Random, nouns: list[str], num_lines: int) -> list[Line]:
    lines: dict[str, Line] = {}
    while len(lines) < num_lines:
        line = _make_line(rng, nouns)
        lines.setdefault(line.template, line)
    return list(lines.values())


def _make_line(rng: random.Random, nouns: list[str]) -> Line:
    with_common = nouns + 2 * [noun["en"] for noun in _COMMON]

    def pick() -> str:
        return rng.sample(nouns if rng.random() > 0.3 else with_common, 1)[0]

    drawn = (pick(), pick(), pick())
    while len(set(drawn)) < 3:
        drawn = (pick(), pick(), pick())
    return Line(
        template=rng.choice(list(TEMPLATES)),
        nouns=drawn,
        third=rng.randrange(len(_VERBS["third"])),
        past=rng.randrange(len(_VERBS["past"])),
        imperative=rng.randrange(len(_VERBS["imperative"])),
        infinitive=rng.randrange(len(_VERBS["infinitive"])),
    )


def _accusative(noun: str, language: str) -> str:
    return "den " + noun[4:] if language == "de" and noun.startswith("der ") else noun
