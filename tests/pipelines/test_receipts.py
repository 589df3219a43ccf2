from __future__ import annotations

import pyarrow as pa
import pytest

from wealy_ray.errors import StoreError
from wealy_ray.pipelines.receipts import run_to_end


def _defect(_: pa.Table) -> pa.Table:
    raise TypeError("a defect")


def _fault(_: pa.Table) -> pa.Table:
    raise StoreError("a shard is gone")


@pytest.mark.usefixtures("ray_session")
def test_a_defect_is_no_lost_worker_and_a_fault_keeps_its_sentence() -> None:
    import ray.data

    rows = ray.data.from_arrow(pa.table({"x": [1, 2]}))
    received: list[pa.Table | None] = []
    with pytest.raises(Exception, match="a defect") as caught:
        run_to_end(rows.map_batches(_defect, batch_format="pyarrow"), received.append)
    assert not isinstance(caught.value, StoreError)
    with pytest.raises(StoreError, match=r"^a shard is gone$"):
        run_to_end(rows.map_batches(_fault, batch_format="pyarrow"), received.append)
    assert run_to_end(rows, received.append) is None
    assert sum(table.num_rows for table in received if table is not None) == 2
