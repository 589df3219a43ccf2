"""What the documents say and the code knows must be the same."""

from __future__ import annotations

import re
from pathlib import Path

from wealy_ray import errors

ROOT = Path(__file__).parents[1]


def test_exit_codes_are_documented_as_they_are() -> None:
    documented = dict(
        re.findall(r"^\| (\d+) \| (\w+Error) \|", (ROOT / "docs/exit-codes.md").read_text(), re.M)[::1]
    )
    classes = {
        kind.__name__: kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.WealyError)
    }
    del classes["WealyError"], classes["TrackError"]
    assert {name: int(code) for code, name in documented.items()} == classes
    assert len(set(classes.values())) == len(classes)


def test_error_types_are_documented_as_they_are() -> None:
    documented = re.findall(r"^\| `(\w+)` \| (.+) \|$", (ROOT / "docs/exit-codes.md").read_text(), re.M)
    assert dict(documented) == errors.TRACK_ERROR_TYPES


def test_links_between_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    assert len(pages) >= 6
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
