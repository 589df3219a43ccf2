"""Results as short plain-text tables for a terminal or a job log."""

from __future__ import annotations

from collections.abc import Iterable


def two_columns(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A title and aligned name-value rows; rows without a value are left out."""
    kept = [(name, value) for name, value in rows if value]
    width = max((len(name) for name, _ in kept), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in kept)])


def counts_in_words(counts: dict[str, int]) -> str:
    """`en 9, es 7`; empty for no counts."""
    return ", ".join(f"{name} {n}" for name, n in counts.items())
