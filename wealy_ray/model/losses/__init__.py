"""Contrastive losses over embeddings of a global batch.

Every loss is `loss(z_NZ, cliques_N, anchors_A) -> scalar`:

- `z_NZ` are the embeddings of the whole batch (gathered from all ranks), `cliques_N` int64; rows of one clique are
  versions of one song. Cosine is taken inside.
- `anchors_A` int64 are the rows that this rank answers for; None: all. The value is the sum over these anchors,
  divided by the number of anchors *of the whole batch*: values of all ranks add up to that of one process.
- An anchor without a positive is not counted.
"""

from wealy_ray.model.losses.build import Loss, LossSettings, build_loss

__all__ = ["Loss", "LossSettings", "build_loss"]
