import json

import pytest
import torch

import wealy_ray
from wealy_ray.errors import StoreError
from wealy_ray.model import (
    AverageMLPSettings,
    ModelConfig,
    TransformerSettings,
    build_model,
    digest_of,
    save_model,
)
from wealy_ray.storage import Storage

SMALL = TransformerSettings(width=8, layers=1, heads=2, feed_forward=8, output_dim=4, standardise=True)


def save(uri, settings=SMALL, seed=0):
    torch.manual_seed(seed)
    network = build_model(settings, 6)
    network.set_input_statistics(torch.randn(6), torch.rand(6))
    config = ModelConfig(
        model=settings,
        input_dim=6,
        digest=digest_of(network.state_dict(), settings),
        extractor_id="abc",
        crop=40,
        metrics={"map": 0.5},
    )
    save_model(Storage(), str(uri), network, config, "# A model\n")
    return network.eval(), config


@pytest.mark.parametrize("settings", [SMALL, AverageMLPSettings(width=8, output_dim=4)], ids=lambda s: s.kind)
@pytest.mark.parametrize("place", ["folder", "memory"])
def test_a_model_comes_back(tmp_path, settings, place):
    uri = tmp_path / "model" if place == "folder" else f"memory://models/{settings.kind}"
    network, config = save(uri, settings)
    loaded = wealy_ray.load_model(str(uri))
    assert loaded.config == config
    states, lengths = torch.randn(2, 5, 6), torch.tensor([5, 3])
    assert torch.equal(loaded.network(states, lengths), network(states, lengths))
    assert not loaded.network.training
    loaded.check_extractor("abc")
    with pytest.raises(StoreError, match="trained on states of extractor abc, these are of xyz"):
        loaded.check_extractor("xyz")


def test_the_digest_names_weights_and_settings(tmp_path):
    one, config = save(tmp_path / "1")
    same, _ = save(tmp_path / "2")
    other, _ = save(tmp_path / "3", seed=1)
    first, second, third = (digest_of(network.state_dict(), SMALL) for network in (one, same, other))
    assert first == second == config.digest != third
    same.input_mean[0] += 1
    assert digest_of(same.state_dict(), SMALL) != first
    # as many weights, other vectors
    assert digest_of(one.state_dict(), SMALL.model_copy(update={"heads": 4})) != first


def test_what_cannot_be_loaded_is_one_sentence(tmp_path):
    with pytest.raises(StoreError, match="there is no model at"):
        wealy_ray.load_model(str(tmp_path / "nowhere"))
    folder = tmp_path / "model"
    save(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()
    config.write_text(good_config[:50])
    with pytest.raises(StoreError, match=r"config\.json is damaged"):
        wealy_ray.load_model(str(folder))
    config.write_text(json.dumps(json.loads(good_config) | {"input_dim": 7}))
    with pytest.raises(StoreError, match=r"does not fit its config\.json"):
        wealy_ray.load_model(str(folder))
    for changes in ({"format": 2}, {"input_dim": -3}, {"input_dim": 10**13}):
        config.write_text(json.dumps(json.loads(good_config) | changes))
        with pytest.raises(StoreError, match="of another version of wealy-ray"):
            wealy_ray.load_model(str(folder))
    config.write_text(good_config.replace('"heads": 2', '"heads": 4'))
    with pytest.raises(StoreError, match="holds other weights or settings"):
        wealy_ray.load_model(str(folder))
    config.write_text(good_config)
    weights.write_bytes(good_weights[:-8])
    with pytest.raises(StoreError, match=r"model\.safetensors is damaged"):
        wealy_ray.load_model(str(folder))
    weights.write_bytes(good_weights[:-4] + b"\0\0\0\0")
    with pytest.raises(StoreError, match="holds other weights"):
        wealy_ray.load_model(str(folder))
    weights.unlink()
    with pytest.raises(StoreError, match="there is no model at"):
        wealy_ray.load_model(str(folder))
