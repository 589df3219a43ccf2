"""Static key and value caches, and attention of one query per row over them.

Legend: L layers, B rows (slots), H heads, K width of a head, S cached positions, D = H K.

There are two layouts, because the two kinds of machine want different ones: on a CPU two matrix products per
row (torch's fused attention is slow there for one query), on a GPU one fused kernel over all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from wealy_ray.whisper.linear import Affine


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of which the same number of positions is read."""

    rows: slice
    length: int


class Cache:
    """Keys and values of every layer and row in the layout of a GPU: [B, H, S, K]."""

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        length: int,
        width: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.heads, self.length, self.width = heads, length, width
        self.keys_LBHSK = torch.zeros(layers, rows, heads, length, width, device=device, dtype=dtype)
        self.values = torch.zeros(self._values_shape(layers, rows), device=device, dtype=dtype)
        self.row_B = torch.arange(rows, device=device)

    def _values_shape(self, layers: int, rows: int) -> tuple[int, ...]:
        return (layers, rows, self.heads, self.length, self.width)

    def clear(self, row: int) -> None:
        """Zero a row: masked positions have weight zero, but zero times a former overflow would be NaN."""
        self.keys_LBHSK[:, row] = 0
        self.values[:, row] = 0

    def put(self, layer: int, row: int, keys_HPK: Tensor, values_HPK: Tensor) -> None:
        """Write the first P positions of a row."""
        count = keys_HPK.shape[1]
        self.keys_LBHSK[layer, row, :, :count] = keys_HPK
        self.values[layer, row, :, :count] = values_HPK

    def project(self, row: int, features_SD: Tensor, to_keys: Affine, to_values: Affine) -> None:
        """Write all layers of a row from the encoder's output, with maps D -> L D."""
        layers = len(self.keys_LBHSK)
        shape = (self.length, layers, self.heads, self.width)
        self.keys_LBHSK[:, row] = to_keys(features_SD).view(shape).permute(1, 2, 0, 3)
        self.values[:, row] = to_values(features_SD).view(shape).permute(1, 2, 0, 3)

    def append(self, layer: int, position_B: Tensor, key_BHK: Tensor, value_BHK: Tensor) -> None:
        """Write one position of every row."""
        dtype = self.values.dtype
        self.keys_LBHSK[layer][self.row_B, :, position_B] = key_BHK.to(dtype)
        self.values[layer][self.row_B, :, position_B] = value_BHK.to(dtype)

    def row(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one row, [H, S, K] each."""
        return self.keys_LBHSK[layer, row], self.values[layer, row]

    def attend(self, layer: int, query_BHK: Tensor, bias_BS: Tensor | None, runs: Sequence[Run]) -> Tensor:
        """Attention of one query per row.

        Args:
            layer: Whose keys and values.
            query_BHK: Scaled queries.
            bias_BS: Added to the scores, -inf forbids a position; at least as long as the longest run.
            runs: What is read; the output of other rows is zero.

        Returns:
            [B, D], heads side by side.
        """
        (run,) = runs  # all rows, so that the step keeps one shape
        keys, values = self.keys_LBHSK[layer, :, :, : run.length], self.values[layer, :, :, : run.length]
        mask = None if bias_BS is None else bias_BS[:, None, None, : run.length].to(keys.dtype)
        attended = torch.nn.functional.scaled_dot_product_attention(
            query_BHK[:, :, None].to(keys.dtype), keys, values, attn_mask=mask, scale=1.0
        )
        return attended.flatten(1).to(query_BHK.dtype)


class ColumnCache(Cache):
    """The layout of a CPU: float32, values transposed, [B, H, K, S]; both products are matrix times column.

    Attention waits for memory there, and its products are per row and head, so leaving out rows that are free
    and positions that a row has not reached changes no bits.
    """

    @override
    def _values_shape(self, layers: int, rows: int) -> tuple[int, ...]:
        return (layers, rows, self.heads, self.width, self.length)

    @override
    def put(self, layer: int, row: int, keys_HPK: Tensor, values_HPK: Tensor) -> None:
        count = keys_HPK.shape[1]
        self.keys_LBHSK[layer, row, :, :count] = keys_HPK
        self.values[layer, row, :, :, :count] = values_HPK.transpose(1, 2)

    @override
    def project(self, row: int, features_SD: Tensor, to_keys: Affine, to_values: Affine) -> None:
        layers = len(self.keys_LBHSK)
        keys = to_keys(features_SD).view(self.length, layers, self.heads, self.width)
        self.keys_LBHSK[:, row] = keys.permute(1, 2, 0, 3)
        values = to_values.columns(features_SD)
        self.values[:, row] = values.view(layers, self.heads, self.width, self.length)

    @override
    def append(self, layer: int, position_B: Tensor, key_BHK: Tensor, value_BHK: Tensor) -> None:
        dtype = self.values.dtype
        self.keys_LBHSK[layer][self.row_B, :, position_B] = key_BHK.to(dtype)
        self.values[layer][self.row_B, :, :, position_B] = value_BHK.to(dtype)

    @override
    def row(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        return self.keys_LBHSK[layer, row], self.values[layer, row].transpose(1, 2)

    @override
    def attend(self, layer: int, query_BHK: Tensor, bias_BS: Tensor | None, runs: Sequence[Run]) -> Tensor:
        attended_BHK = torch.zeros_like(query_BHK)
        for run in runs:
            keys = self.keys_LBHSK[layer, run.rows, :, : run.length]
            scores_bHS = _products(keys, query_BHK[run.rows].to(keys.dtype))
            if bias_BS is not None:
                scores_bHS += bias_BS[run.rows, None, : run.length]
            weights_bHS = scores_bHS.softmax(dim=2)
            values = self.values[layer, run.rows, :, :, : run.length]
            attended_BHK[run.rows] = _products(values, weights_bHS).to(query_BHK.dtype)
        return attended_BHK.flatten(1)


def _products(matrices: Tensor, vectors: Tensor) -> Tensor:
    """[b, H, m, n] times [b, H, n] as one batched matrix product.

    The columns are given to it as transposed rows: with these strides MKL takes a kernel that reads memory
    4 to 6 times as fast as the one it takes for a contiguous [n, 1].
    """
    columns = vectors.flatten(0, 1)[:, None].transpose(1, 2)
    product = torch.bmm(matrices.flatten(0, 1), columns)
    return product.view(matrices.shape[:3])
