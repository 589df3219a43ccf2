import math

import pytest
import torch

from wealy_ray.config import Settings
from wealy_ray.model.losses import LossSettings, build_loss


class Holder(Settings):
    loss: LossSettings


KINDS = [
    {"kind": "nt_xent"},
    {"kind": "nt_xent", "temperature": 0.5},
    {"kind": "supervised_contrastive", "temperature": 0.3},
    {"kind": "triplet"},
    {"kind": "triplet", "choice": "hardest", "margin": 0.4},
    {"kind": "clews"},
    {"kind": "clews", "gamma": 2.0, "bias": 0.0, "weight": 2.0},
]
NAMES = ["-".join(str(v) for v in k.values()) for k in KINDS]
CLIQUES = [3, 3, 7, 7, 7, 1, 5, 5, 2]


def loss_of(settings):
    return build_loss(Holder.model_validate({"loss": settings}).loss)


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(
        sum(a * a for a in x) * sum(b * b for b in y)
    )


def slow_anchor(s, i, z, cliques):
    """One anchor's loss by the formulas of the docstrings; None where it has no positive."""
    others = [j for j in range(len(z)) if j != i]
    positives = [j for j in others if cliques[j] == cliques[i]]
    negatives = [j for j in others if cliques[j] != cliques[i]]
    if not positives:
        return None
    sim = {j: cosine(z[i], z[j]) for j in others}
    if s["kind"] in {"nt_xent", "supervised_contrastive"}:
        e = {j: math.exp(sim[j] / s["temperature"]) for j in others}
        shares = [e[j] / sum(e.values()) for j in positives]
        inside = -math.log(sum(shares))
        return inside if s["kind"] == "nt_xent" else -sum(map(math.log, shares)) / len(shares)
    if s["kind"] == "triplet":
        if not negatives:
            return 0.0
        if s["choice"] == "first":
            p, n = positives[0], negatives[0]
        else:
            p, n = min(positives, key=sim.__getitem__), max(negatives, key=sim.__getitem__)
        return max(0.0, (1 - sim[p]) - (1 - sim[n]) + s["margin"])
    near = sum(1 - sim[j] for j in positives) / len(positives)
    if not negatives:
        return near
    far = sum(math.exp(s["bias"] - s["gamma"] * (1 - sim[j])) for j in negatives) / len(negatives)
    return near + s["weight"] * math.log1p(far)


def slow_loss(settings, z, cliques):
    full = Holder.model_validate({"loss": settings}).loss.model_dump()
    found = [slow_anchor(full, i, z.tolist(), cliques) for i in range(len(z))]
    counted = [value for value in found if value is not None]
    return sum(counted) / len(counted)


def vectors(seed=0, rows=9, dim=5):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("settings", KINDS, ids=NAMES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_values_equal_a_slow_loop(settings, seed):
    z, cliques = vectors(seed), torch.tensor(CLIQUES)
    assert float(loss_of(settings)(z, cliques, None)) == pytest.approx(
        slow_loss(settings, z, CLIQUES), abs=1e-10
    )
    one_clique = torch.tensor([4] * len(CLIQUES))
    found = float(loss_of(settings)(z, one_clique, None))
    assert found == pytest.approx(slow_loss(settings, z, one_clique.tolist()), abs=1e-10)


@pytest.mark.parametrize("settings", KINDS, ids=NAMES)
def test_gradients(settings):
    z, cliques = vectors(3).requires_grad_(), torch.tensor(CLIQUES)
    assert torch.autograd.gradcheck(lambda x: loss_of(settings)(x, cliques, None), (z,))


@pytest.mark.parametrize("settings", KINDS, ids=NAMES)
def test_shares_of_the_anchors_add_up_to_the_whole(settings):
    z, cliques = vectors(4), torch.tensor(CLIQUES)
    loss = loss_of(settings)
    parts = [loss(z, cliques, torch.tensor(part)) for part in ([0, 1, 5], [2, 8], [3, 4, 6, 7])]
    assert float(sum(parts)) == pytest.approx(float(loss(z, cliques, None)), abs=1e-12)


@pytest.mark.parametrize("settings", KINDS, ids=NAMES)
def test_the_order_of_rows_counts_only_for_first(settings):
    z, cliques = vectors(5), torch.tensor(CLIQUES)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(1))
    found = float(loss_of(settings)(z[order], cliques[order], None))
    if settings.get("choice", "first") != "first" or settings["kind"] != "triplet":
        assert found == pytest.approx(float(loss_of(settings)(z, cliques, None)), abs=1e-12)


@pytest.mark.parametrize("settings", KINDS, ids=NAMES)
def test_nothing_is_nan_at_the_edges(settings):
    """No positives at all, equal embeddings, huge embeddings; half precision is computed in float32."""
    cases = [
        (vectors(6), torch.arange(9)),
        (torch.ones(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])),
        (1e4 * vectors(7).float(), torch.tensor(CLIQUES)),
        (vectors(8).bfloat16(), torch.tensor(CLIQUES)),
    ]
    for case, cliques in cases:
        z = case.clone().requires_grad_()
        value = loss_of(settings)(z, cliques, None)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(z.grad).all()
    assert float(loss_of(settings)(vectors(6), torch.arange(9), None)) == 0


def test_equal_to_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning.distances import CosineSimilarity

    z, cliques = vectors(9), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3])
    theirs = losses.SupConLoss(temperature=0.2)(z, cliques)
    ours = loss_of({"kind": "supervised_contrastive", "temperature": 0.2})(z, cliques, None)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-8)
    # with one positive each, NT-Xent is theirs as well
    pairs = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    theirs = losses.NTXentLoss(temperature=0.2)(z[:8], pairs)
    assert float(loss_of({"kind": "nt_xent", "temperature": 0.2})(z[:8], pairs, None)) == pytest.approx(
        float(theirs), abs=1e-8
    )
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.reducers import MeanReducer

    distance = CosineSimilarity()
    mined = BatchHardMiner(distance=distance)(z, cliques)
    theirs = losses.TripletMarginLoss(margin=0.3, distance=distance, reducer=MeanReducer())(z, cliques, mined)
    ours = loss_of({"kind": "triplet", "choice": "hardest", "margin": 0.3})(z, cliques, None)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-8)
