import math

import pytest
import torch

from wealy_ray.config import Settings
from wealy_ray.model.networks import EncoderLayer, build_model
from wealy_ray.model.pooling import build_pooling
from wealy_ray.model.positions import rotate, sinusoids
from wealy_ray.model.settings import AverageMLPSettings, ModelSettings, TransformerSettings

INPUT, SMALL = 6, {"width": 16, "layers": 2, "heads": 4, "feed_forward": 20, "output_dim": 5}
SETTINGS = [
    TransformerSettings(**SMALL, positions=positions, pooling=pooling, standardise=True)
    for positions, pooling in (
        ("none", "gem"),
        ("sinusoidal", "mean"),
        ("rotary", "cls"),
        ("none", "attention"),
        ("rotary", "gem"),
    )
] + [AverageMLPSettings(width=16, output_dim=5)]
NAMES = [f"{s.kind}-{getattr(s, 'positions', '')}-{getattr(s, 'pooling', '')}" for s in SETTINGS]


def a_network(settings, seed=0):
    torch.manual_seed(seed)
    return build_model(settings, INPUT).eval()


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_padding_never_reaches_a_result(settings):
    network = a_network(settings)
    network.set_input_statistics(torch.randn(INPUT), torch.rand(INPUT) + 0.5)
    lengths = torch.tensor([7, 1, 4])
    states = torch.randn(3, 7, INPUT)
    expected = network(states, lengths)
    assert expected.shape == (3, 5)
    for filler in (0.0, 1e30, math.nan, math.inf):
        padded = torch.full((3, 40, INPUT), filler)
        for i, length in enumerate(lengths):
            padded[i, :length] = states[i, :length]
        assert torch.allclose(network(padded, lengths), expected, atol=1e-6)
    alone = torch.cat(
        [network(states[i : i + 1, :length], lengths[i : i + 1]) for i, length in enumerate(lengths)]
    )
    assert torch.allclose(alone, expected, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_every_parameter_learns(settings):
    network = a_network(settings).train()
    network(torch.randn(3, 9, INPUT), torch.tensor([9, 2, 5])).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    assert (
        sum(bool(p.grad.abs().sum() > 0) for p in network.parameters()) >= len(list(network.parameters())) - 1
    )


def test_the_papers_network_has_the_papers_sizes():
    network = build_model(TransformerSettings(), 1280)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes["project.weight"] == (768, 1280)
    assert shapes["out.weight"] == (512, 768)
    assert "out.bias" not in shapes
    per_layer = 4 * 768 * 768 + 4 * 768 + 2 * 768 * 1024 + 768 + 1024 + 4 * 768
    assert sum(p.numel() for p in network.parameters()) == (
        1280 * 768 + 768 + 4 * per_layer + 768 + 768 * 512  # the exponents of GeM are the lone 768
    )
    exponents = 1 + torch.nn.functional.softplus(network.pooling.raw_exponent)
    assert torch.allclose(exponents, torch.tensor(3.0))


def test_a_layer_equals_a_slow_loop():
    settings = TransformerSettings(width=8, layers=1, heads=2, feed_forward=12, dropout=0)
    torch.manual_seed(1)
    layer = EncoderLayer(settings).double()
    x, length = torch.randn(1, 5, 8, dtype=torch.float64), 4
    is_real = torch.arange(5)[None] < length
    found = layer(x, is_real)[0]
    normed = layer.norm_attention(x[0])
    q, k, v = layer.qkv(normed).chunk(3, dim=1)
    mixed = torch.zeros(5, 8, dtype=torch.float64)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        for i in range(5):
            weights = [math.exp(float(q[i, part] @ k[j, part]) / 2) for j in range(length)]
            for j in range(length):
                mixed[i, part] += weights[j] / sum(weights) * v[j, part]
    y = x[0] + layer.merge(mixed)
    y = y + layer.narrow(layer.widen(layer.norm_feed_forward(y)).clamp(min=0))
    assert torch.allclose(found, y, atol=1e-12)


def test_without_positions_order_is_not_seen_and_with_them_it_is():
    states, lengths = torch.randn(1, 8, INPUT), torch.tensor([8])
    turned = states.flip(1)
    for positions in ("none", "sinusoidal", "rotary"):
        network = a_network(TransformerSettings(**SMALL, positions=positions, pooling="mean"))
        same = torch.allclose(network(states, lengths), network(turned, lengths), atol=1e-5)
        assert same == (positions == "none")


def test_rotation_is_a_product_of_complex_numbers():
    x = torch.randn(1, 1, 6, 4, dtype=torch.float64)
    found = rotate(x)
    for t in range(6):
        for pair in range(2):
            angle = t * 10_000 ** (-pair / 2)
            z = complex(x[0, 0, t, 2 * pair], x[0, 0, t, 2 * pair + 1]) * complex(
                math.cos(angle), math.sin(angle)
            )
            assert complex(*found[0, 0, t, 2 * pair : 2 * pair + 2]) == pytest.approx(z, abs=1e-5)
    q, k = torch.randn(4), torch.randn(4)
    rows = rotate(torch.stack([q] * 9)[None, None])[0, 0] @ rotate(torch.stack([k] * 9)[None, None])[0, 0].T
    assert float(rows[5, 2]) == pytest.approx(float(rows[8, 5]), abs=1e-4)


def test_sinusoids_follow_the_formula():
    table = sinusoids(7, 6, torch.device("cpu"))
    for t in range(7):
        for d in range(6):
            angle = t / 10_000 ** (2 * (d // 2) / 6)
            assert float(table[t, d]) == pytest.approx((math.cos if d % 2 else math.sin)(angle), abs=1e-5)


def test_gem_equals_a_loop():
    pooling = build_pooling("gem", 3)
    pooling.raw_exponent.data = torch.tensor([0.1, 1.0, 4.0])
    x, is_real = torch.randn(2, 5, 3), torch.tensor([[True] * 5, [True, True, False, False, False]])
    found = pooling(x, is_real)
    for b, length in enumerate((5, 2)):
        for d in range(3):
            exponent = 1 + math.log1p(math.exp(float(pooling.raw_exponent[d])))
            mean = sum(max(float(x[b, t, d]), 1e-6) ** exponent for t in range(length)) / length
            assert float(found[b, d]) == pytest.approx(mean ** (1 / exponent), rel=1e-4)


class Holder(Settings):
    model: ModelSettings


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kind": "transformer", "width": 10, "heads": 4}, "width 10 is not a multiple of heads 4"),
        (
            {"kind": "transformer", "width": 12, "heads": 4, "positions": "rotary"},
            "an even width per head; it is 3",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        Holder.model_validate({"model": model})
