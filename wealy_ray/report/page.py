"""A page that needs no other file: a template, figures inline, and the same figures as PNGs beside it."""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from wealy_ray.storage import Storage, join


@dataclass(frozen=True)
class Drawing:
    """A figure of the page: `alt` says in words what it shows."""

    name: str
    title: str
    alt: str
    png: bytes

    @property
    def source(self) -> str:
        """The figure as a `data:` URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def write_page(
    storage: Storage,
    run: str,
    template: str,
    *,
    title: str,
    findings: Sequence[str],
    sections: Mapping[str, Sequence[Drawing]],
    **values: Any,
) -> str:
    """Writes `report.html` and `figures/*.png` into a run's folder.

    Args:
        storage: Access.
        run: The folder.
        template: One that extends `base.html.j2`.
        title: Of the page.
        findings: Sentences for the section on diagnostics.
        sections: Figures by the name that the template draws them under.
        values: What else the template shows.

    Returns:
        The page's URI.
    """
    for drawing in (d for drawings in sections.values() for d in drawings):
        storage.write(join(run, "figures", f"{drawing.name}.png"), drawing.png)
    page = _templates().get_template(template)
    uri = join(run, "report.html")
    text = page.render(title=title, findings=findings, sections=sections, **values)
    storage.write(uri, text.encode())
    return uri


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("wealy_ray.report", "."),
        autoescape=True,  # transcripts and names come from outside
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
