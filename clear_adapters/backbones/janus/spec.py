"""The facts of Janus and Janus-Pro (arXiv 2410.13848, 2501.17811)."""

from clear_adapters.backbones.base import BackboneSpec, LoraGroup

_LAYERS = "model.language_model.layers"

SPEC = BackboneSpec(
    name="janus",
    title="Janus, Janus-Pro",
    kind="codes",
    backbone="clear_adapters.backbones.janus.backbone:JanusBackbone",
    groups={
        "understanding": LoraGroup(
            _LAYERS,
            tuple(f"self_attn.{p}_proj" for p in "qkvo")
            + tuple(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        ),
        # Text and codes share the decoder; what is the generator's alone is its way in and its head.
        "generation": LoraGroup(
            _LAYERS,
            (),
            once=(
                "model.generation_aligner.fc1",
                "model.generation_aligner.hidden_layers.0",
                "model.generation_head.proj_out",
                "model.generation_head.vision_head",
            ),
        ),
    },
    tiny="clear_adapters.backbones.janus.tiny:build",
    extras=("model.aligner",),
    never=("model.vision_model", "model.vqmodel"),
    restoration_reader="generation",
    decodes=True,
    checkpoints=(
        "deepseek-community/Janus-Pro-1B",
        "deepseek-community/Janus-Pro-7B",
        "deepseek-community/Janus-1.3B",
    ),
    tested_with="torch 2.13, transformers 5.23 (tiny models; no released weights yet)",
    license="DeepSeek Model License (weights), MIT (code)",
    stages=("sft", "bridge", "grpo"),
    sources=("arXiv 2410.13848", "arXiv 2501.17811", "github.com/deepseek-ai/Janus"),
)
