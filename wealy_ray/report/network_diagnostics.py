"""Sentences about trained networks that are evaluated side by side; what they are is in their systems' `facts`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from wealy_ray.report.tables import counts_in_words

NETWORKS = {"transformer": "Transformer", "avg_mlp": "Avg+MLP"}
MAX_LANGUAGES = 6

System = Mapping[str, Any]
Gain = Callable[[str, str], tuple[float, float, float] | None]


def about_networks(systems: Sequence[System], gain: Gain) -> Iterator[str]:
    """Networks of which one should be better and is not; of several of a kind the best is compared.

    Args:
        systems: As in `metrics.json`.
        gain: See `diagnostics.diagnose`.
    """
    trained = [s for s in systems if s.get("facts") and "all" in s["views"]]
    for same in _grouped(trained, lambda facts: repr(_trained_on(facts))):
        ours = _best(same, lambda facts: facts["network"] == "transformer")
        theirs = _best(same, lambda facts: facts["network"] == "avg_mlp")
        if (said := _missing_gain(ours, theirs, gain)) is not None:
            yield (
                f"{said[0]}, a Transformer, {said[1]}, an Avg+MLP of the same training data: no temporal modelling, "
                "the mean of the states tells as much. Look at the number of training works first, then at "
                "regularisation, positions and pooling."
            )
    for same in _grouped(trained, lambda facts: facts["network"]):
        ours = _best(same, lambda facts: bool(_languages_of(facts) - {"en"}))
        theirs = _best(same, lambda facts: _languages_of(facts) == {"en"})
        if ours is not None and (said := _missing_gain(ours, theirs, gain)) is not None:
            yield (
                f"{said[0]}, trained on several languages ({_in_words(ours['facts'])}), {said[1]}, trained on English "
                "alone: the data lack languages. Look at the number of works in others than English, in training and "
                "in this collection."
            )


def network_in_words(facts: Mapping[str, Any]) -> str:
    """`Transformer trained on 4,000 tracks of 1,000 cliques (en 3100, es 900)`."""
    network = NETWORKS.get(facts["network"], facts["network"])
    train = facts["data"].get("train")
    if not train:
        return network
    languages = f" ({_in_words(facts)})" if _languages_of(facts) else ""
    return f"{network} trained on {train['tracks']:,} tracks of {train['cliques']:,} cliques{languages}"


def _missing_gain(ours: System | None, theirs: System | None, gain: Gain) -> tuple[str, str] | None:
    """Both in words, unless one is better than the other for sure: the interval of its gain begins above 0."""
    found = gain(ours["name"], theirs["name"]) if ours is not None and theirs is not None else None
    if found is None or found[1] > 0:
        return None
    assert ours is not None
    assert theirs is not None
    mean, low, high = found
    gains = f"gains {mean:+.3f} MAP (95 % interval {low:+.3f} to {high:+.3f}) on {theirs['name']}"
    return ours["name"], gains


def _grouped(systems: Sequence[System], key: Callable[[Any], str]) -> list[list[System]]:
    groups: dict[str, list[System]] = {}
    for system in systems:
        groups.setdefault(key(system["facts"]), []).append(system)
    return list(groups.values())


def _best(systems: Sequence[System], wanted: Callable[[Any], bool]) -> System | None:
    found = [s for s in systems if wanted(s["facts"])]
    return max(found, key=lambda s: s["views"]["all"]["map"]["mean"], default=None)


def _trained_on(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    return facts["extractor_id"], *(facts["data"].get(name) for name in ("manifest", "index", "train"))


def _languages_of(facts: Mapping[str, Any]) -> set[str]:
    return set(facts["data"].get("languages") or ()) - {""}


def _in_words(facts: Mapping[str, Any]) -> str:
    languages = facts["data"].get("languages") or {}
    shown = sorted(languages, key=lambda name: (-languages[name], name))[:MAX_LANGUAGES]
    more = f" and {len(languages) - len(shown)} more" if len(languages) > len(shown) else ""
    return counts_in_words({name or "unknown": languages[name] for name in shown}) + more
