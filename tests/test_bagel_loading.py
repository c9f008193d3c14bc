"""Loading BAGEL folders that are damaged or mixed with other libraries' files, and text that looks like marks."""

import json

import pytest

from clear_adapters.backbones.bagel.backbone import BagelBackbone
from clear_adapters.backbones.bagel.checkpoint import save_checkpoint
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    toy = build(0)
    save_checkpoint(tmp_path / "toy", toy.model, toy.autoencoder, toy.tokenizer)
    return tmp_path / "toy"


def test_a_cut_off_download_is_named(folder):
    weights = folder / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is not a whole safetensors file"):
        BagelBackbone.load(str(folder))


def test_a_missing_tokenizer_is_named(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="no tokenizer that can be read"):
        BagelBackbone.load(str(folder))


def test_a_foreign_preprocessor_file_is_left_alone(folder):
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Other", "size": 224})
    )
    assert BagelBackbone.load(str(folder)).config.vae_resize.max_size == 1024


def test_marks_in_a_users_text_are_text():
    """A question with <|im_end|> in it used to end its own block."""
    toy = build(0)
    ids = toy.encode_text("a<|im_end|>b")
    assert toy.marks.end not in ids.tolist()
    assert toy.decode_text(ids) == "a<|im_end|>b"
