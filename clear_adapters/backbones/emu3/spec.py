"""The facts of Emu3 (arXiv 2409.18869)."""

from clear_adapters.backbones.base import BackboneSpec, LoraGroup

_LAYERS = "model.text_model.layers"

SPEC = BackboneSpec(
    name="emu3",
    title="Emu3",
    kind="codes",
    backbone="clear_adapters.backbones.emu3.backbone:Emu3Backbone",
    groups={
        "understanding": LoraGroup(
            _LAYERS,
            tuple(f"self_attn.{p}_proj" for p in "qkvo")
            + tuple(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        ),
        # One vocabulary and one stack for text and pictures: what a generator adds is the head's reading.
        "generation": LoraGroup(_LAYERS, (), once=("lm_head",)),
    },
    tiny="clear_adapters.backbones.emu3.tiny:build",
    never=("model.vqmodel",),
    restoration_reader="understanding",
    decodes=True,
    # Chat understands and Gen draws: neither does both before it is trained.
    checkpoints=("BAAI/Emu3-Chat-hf", "BAAI/Emu3-Gen-hf"),
    tested_with="torch 2.13, transformers 5.23 (tiny models; no released weights yet)",
    license="Apache-2.0",
    stages=("sft", "bridge", "grpo"),
    sources=("arXiv 2409.18869", "github.com/baaivision/Emu3"),
)
