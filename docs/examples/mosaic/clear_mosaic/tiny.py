"""The family at toy size with random weights, which `clear-adapters validate mosaic` runs on."""

import torch
from transformers import LlamaConfig

from clear_adapters.backbones.byte_tokenizer import byte_tokenizer
from clear_mosaic.backbone import MosaicBackbone
from clear_mosaic.model import MosaicModel

MARKS = ("<s>", "</s>", "<n>", "<p>", "<t>", "</t>")


def build(seed: int = 0) -> MosaicBackbone:
    """A model from a seed; the global random numbers stay as they are."""
    config = LlamaConfig(
        vocab_size=256 + len(MARKS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MosaicModel(config, colours=40, tile=16, side=64)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return MosaicBackbone(model.eval(), byte_tokenizer(MARKS, eos_token="</s>"))
