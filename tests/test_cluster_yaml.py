from __future__ import annotations

from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[1] / "cluster.yaml"


def validate(config: dict) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


def test_cluster_yaml_is_valid_for_ray() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    validate(config)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    workers = [t for name, t in config["available_node_types"].items() if name != config["head_node_type"]]
    assert sum(t["max_workers"] for t in workers) <= config["max_workers"]
    assert all(t["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot" for t in workers)


def test_the_check_can_fail() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    config["available_nod_types"] = config.pop("available_node_types")
    with pytest.raises(Exception, match=r"available_nod|head_node_type|Unable|unexpected"):
        validate(config)
