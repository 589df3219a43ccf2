from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.support import (
    contents,
    make_manifest,
    make_tracks,
    recipe_settings,
    run_wealy,
    write_recipe,
)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray session with enough logical CPUs for every stage."""
    from wealy_ray.pipelines.session import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        connect()
        yield
        import ray

        ray.shutdown()


NUM_TRACKS = 40


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Manifest, and the contents of the store of a run that nobody disturbed (recipe.yaml, store/ beside it)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_tracks(folder / "audio", NUM_TRACKS)
    manifest = make_manifest(folder / "audio", folder / "manifest.parquet")
    recipe = write_recipe(folder / "recipe.yaml", recipe_settings(manifest, folder / "store"))
    code, output = run_wealy("extract", recipe)
    assert code == 0, output
    expected = contents(folder / "store")
    assert len(expected) == NUM_TRACKS
    assert {row[0] for row in expected.values()} == {"ok"}
    return manifest, expected
