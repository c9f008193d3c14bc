"""Settings and fixtures of every test."""

from dataclasses import replace

import pytest
import torch

# Toy models on shared cores: threads of several test processes only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with a toy `model` in the official layout and an untrained `adapter` for it. Nothing writes there."""
    from clear_adapters import LatentSampling, TextSampling, attach
    from clear_adapters.backbones.bagel.checkpoint import save_checkpoint
    from clear_adapters.backbones.bagel.tiny import build
    from clear_adapters.prompts import get_protocol

    folder = tmp_path_factory.mktemp("toy")
    backbone = build(0)
    save_checkpoint(folder / "model", backbone.model, backbone.autoencoder, backbone.tokenizer)
    attached = attach(str(folder / "model"))
    attached.config = replace(
        attached.config,
        protocol=get_protocol("tiny"),
        text=TextSampling(max_new_tokens=6),
        latent=LatentSampling(steps=3, guidance_text=1, guidance_image=1),
    )
    attached.save_pretrained(folder / "adapter")
    attached.detach()
    return folder
