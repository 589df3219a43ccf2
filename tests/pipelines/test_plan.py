"""The plan that Ray Data makes of our stages: what fuses, what does not."""

from __future__ import annotations

import pyarrow as pa
import pytest

from wealy_ray.config import ExtractRecipe, ExtractResources
from wealy_ray.errors import ClusterError
from wealy_ray.pipelines.passes import build_dataset
from wealy_ray.pipelines.session import Cluster, check_resources, engine_gpus
from wealy_ray.pipelines.stages import WORK_SCHEMA, StageContext


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_decode_engine_and_writer_are_three_operators(gpus: float) -> None:
    from ray.data._internal.logical.optimizers import get_execution_plan

    context = StageContext(ExtractRecipe(manifest="m", store="s"), "s/x", "x", "w", 1)
    work = pa.Table.from_pylist([{"track_id": "a", "audio_uri": "a.wav", "etag": None}], schema=WORK_SCHEMA)
    dataset = build_dataset(work, context, gpus)
    plan = get_execution_plan(dataset._logical_plan)
    plan = plan[0] if isinstance(plan, tuple) else plan
    names, operator = [], plan.dag
    while operator is not None:
        names.append(operator.name)
        operator = operator.input_dependencies[0] if operator.input_dependencies else None
    stages = [name for name in reversed(names) if "MapBatches" in name]
    assert len(stages) == 3, stages
    assert "decode_tracks" in stages[0]
    assert stages[1] == "MapBatches(EngineStage)"
    assert stages[2] == "MapBatches(write_tracks)"


def test_engine_gpus_follow_the_cluster_unless_told() -> None:
    with_gpus, without = Cluster("x", 8, 2, 1), Cluster("x", 8, 0, 1)
    assert engine_gpus(ExtractResources(), with_gpus) == 1
    assert engine_gpus(ExtractResources(), without) == 0
    assert engine_gpus(ExtractResources(engine_gpus=0.5), without) == 0.5


def test_a_recipe_that_cannot_be_scheduled_locally_is_refused() -> None:
    with pytest.raises(ClusterError, match="the engines need 1 GPUs, this machine has 0"):
        check_resources(ExtractResources(engine_gpus=1), Cluster("local", 8, 0, 1))
    with pytest.raises(ClusterError, match="need 5 CPUs at least"):
        check_resources(ExtractResources(engine_min=4, engine_max=4), Cluster("local", 4, 0, 1))
    # a cluster may still grow
    check_resources(ExtractResources(engine_gpus=1), Cluster("10.0.0.1:6379", 0, 0, 1))
