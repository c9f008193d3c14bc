"""The facts of the family. Importing them loads no model code."""

from clear_adapters.backbones.base import BackboneSpec, LoraGroup

SPEC = BackboneSpec(
    name="mosaic",
    title="Mosaic",
    kind="codes",
    backbone="clear_mosaic.backbone:MosaicBackbone",
    groups={
        "understanding": LoraGroup(
            "decoder.layers", ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
        ),
        "generation": LoraGroup("decoder.layers", (), once=("tile_in", "tile_head")),
    },
    tiny="clear_mosaic.tiny:build",
    checkpoints=("clear_mosaic.tiny:build",),
    tested_with="transformers 5.23",
    license="Apache-2.0",
    stages=("sft", "bridge", "grpo"),
    sources=("docs/examples/mosaic",),
)
