"""CTranslate2 files: every truncation and every foreign model is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from whisper.model import Whisper

from tests.whisper.support import write_ct2
from wealy_ray.errors import ModelError
from wealy_ray.whisper import load_whisper
from wealy_ray.whisper.ct2 import CT2FormatError, read_tensors, to_checkpoint


@pytest.fixture
def model_bin(tiny: Whisper, tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    write_ct2(tiny, path)
    return path


def test_every_truncation_is_noticed(model_bin: Path) -> None:
    data = model_bin.read_bytes()
    cuts = [*range(0, 40), *np.linspace(40, len(data) - 1, 60, dtype=int).tolist()]
    for cut in cuts:
        with pytest.raises(CT2FormatError, match=r"truncated|no CTranslate2 model"):
            read_tensors(data[:cut])


def test_damage_is_a_model_error_that_names_the_file(model_bin: Path) -> None:
    data = model_bin.read_bytes()
    for damaged in (data[:-5], data + b"more", b"hello" * 100, b""):
        model_bin.write_bytes(damaged)
        with pytest.raises(ModelError) as caught:
            load_whisper(str(model_bin.parent))
        assert str(caught.value).startswith(str(model_bin))


def test_another_kind_of_model_is_named(tiny: Whisper, model_bin: Path) -> None:
    write_ct2(tiny, model_bin, spec="TransformerSpec")
    with pytest.raises(ModelError, match="kind 'TransformerSpec'"):
        load_whisper(str(model_bin.parent))


def test_missing_tensors_are_named(model_bin: Path) -> None:
    tensors = read_tensors(model_bin.read_bytes())
    for name in ("encoder/conv1/weight", "decoder/layer_1/ffn/linear_0/bias", "decoder/projection/weight"):
        rest = {key: array for key, array in tensors.items() if key != name}
        with pytest.raises(CT2FormatError, match=name):
            to_checkpoint(rest)


def test_a_model_that_is_not_whisper_inside_is_refused(model_bin: Path) -> None:
    tensors = read_tensors(model_bin.read_bytes())
    bias = tensors["decoder/layer_0/self_attention/linear_0/bias"].copy()
    bias[64] = 1.0  # the first key bias
    with pytest.raises(CT2FormatError, match="key bias"):
        to_checkpoint({**tensors, "decoder/layer_0/self_attention/linear_0/bias": bias})
    untied = tensors["decoder/embeddings/weight"].copy()
    with pytest.raises(CT2FormatError, match="not tied"):
        to_checkpoint({**tensors, "decoder/projection/weight": untied})
