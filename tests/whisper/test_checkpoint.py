"""Loading weights: every container gives the same model, every damage gives one clear sentence."""

from __future__ import annotations

import io
import urllib.error
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import whisper
from whisper.model import Whisper

from tests.whisper.support import write_ct2
from wealy_ray.errors import ModelError
from wealy_ray.whisper import load_whisper
from wealy_ray.whisper.checkpoint import weights_digest


def save(model: Whisper, path: Path, **changes: object) -> Path:
    torch.save({"dims": asdict(model.dims), "model_state_dict": model.state_dict(), **changes}, path)
    return path


@pytest.fixture
def pt(tiny: Whisper, tmp_path: Path) -> Path:
    return save(tiny, tmp_path / "tiny.pt")


def test_containers_of_the_same_weights_have_the_same_digest(tiny: Whisper, pt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ct2"
    folder.mkdir()
    write_ct2(tiny, folder / "model.bin")
    expected = weights_digest(tiny.state_dict())
    uri = "s3://bucket/tiny.pt"
    loaded = [
        load_whisper("random-tiny"),
        load_whisper(str(pt)),
        load_whisper(str(folder)),
        load_whisper(uri, read_bytes={uri: pt.read_bytes()}.__getitem__),
    ]
    assert {item.digest for item in loaded} == {expected}
    assert [item.source for item in loaded] == ["random-tiny", str(pt), str(folder), uri]
    assert not any(item.model.training for item in loaded)


def test_half_precision_files_load_in_float32(tiny: Whisper, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in tiny.state_dict().items()}
    loaded = load_whisper(str(save(tiny, tmp_path / "half.pt", model_state_dict=half)))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert loaded.digest == weights_digest(half)


def test_any_changed_weight_changes_the_digest(tiny: Whisper) -> None:
    state = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    before = weights_digest(state)
    state["decoder.ln.bias"][3] += 1e-6
    assert weights_digest(state) != before
    state["decoder.ln.bias"][3] -= 1e-6
    state["decoder.ln.other"] = state.pop("decoder.ln.bias")
    assert weights_digest(state) != before


def test_int8_weights_are_dequantised(tiny: Whisper, tmp_path: Path) -> None:
    write_ct2(tiny, tmp_path / "model.bin", int8=True)
    loaded = load_whisper(str(tmp_path)).model
    ours, expected = loaded.decoder.blocks[0].mlp[0].weight, tiny.decoder.blocks[0].mlp[0].weight
    assert not torch.equal(ours, expected)
    torch.testing.assert_close(ours, expected, rtol=0, atol=float(expected.abs().max()) / 127)


def truncated(pt: Path) -> None:
    pt.write_bytes(pt.read_bytes()[:-1000])


def renamed_text(pt: Path) -> None:
    pt.write_text("these are no weights\n" * 100)


def empty(pt: Path) -> None:
    pt.write_bytes(b"")


def malicious_pickle(pt: Path) -> None:
    torch.save(io.StringIO("a pickled object of another class"), pt)


def other_model(pt: Path) -> None:
    torch.save({"state_dict": torch.nn.Linear(3, 3).state_dict()}, pt)


def bare_tensor(pt: Path) -> None:
    torch.save(torch.zeros(3), pt)


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(pt: Path) -> None:
        checkpoint = torch.load(pt)
        change(checkpoint)
        torch.save(checkpoint, pt)

    return apply


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (truncated, "damaged"),
    (renamed_text, "no torch checkpoint"),
    (empty, "no torch checkpoint"),
    (malicious_pickle, "no torch checkpoint"),
    (other_model, "not openai-whisper's"),
    (bare_tensor, "not openai-whisper's"),
    (edit(lambda c: c["model_state_dict"].pop("decoder.ln.weight")), "decoder.ln.weight"),
    (edit(lambda c: c["model_state_dict"].update(x=torch.zeros(1))), "Unexpected"),
    (edit(lambda c: c["dims"].update(n_text_state=32)), "not the weights of a Whisper model"),
    (edit(lambda c: c["dims"].update(n_text_head=0)), "not the weights of a Whisper model"),
    (edit(lambda c: c["dims"].pop("n_mels")), "'dims' has other fields"),
    (edit(lambda c: c.update(dims=[1, 2])), "'dims' has other fields"),
    (edit(lambda c: c["dims"].update(n_vocab=32000)), "vocabulary of 32000"),
    (edit(lambda c: c.update(model_state_dict=None)), "not the weights of a Whisper model"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damaged_and_foreign_checkpoints(pt: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(pt)
    with pytest.raises(ModelError) as caught:
        load_whisper(str(pt))
    message = str(caught.value)
    assert message.startswith(str(pt))
    assert words in message
    assert "\n" not in message


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(ModelError, match=r"turbo.*random-tiny"):
        load_whisper("turbot")


def test_a_uri_needs_a_reader_and_an_object(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="URIs cannot be read here"):
        load_whisper("s3://bucket/base.pt")
    with pytest.raises(ModelError, match="no such object"):
        load_whisper("s3://bucket/base.pt", read_bytes=lambda _uri: (tmp_path / "none").read_bytes())


def test_a_folder_without_a_model() -> None:
    with pytest.raises(ModelError, match=r"no model\.bin"):
        load_whisper(str(Path(__file__).parent))


def test_no_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_args: object, **_kwargs: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(whisper.urllib.request, "urlopen", unreachable)
    with pytest.raises(ModelError, match=r"tiny: the weights cannot be downloaded .*give the path"):
        load_whisper("tiny")
