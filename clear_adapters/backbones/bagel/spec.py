"""The facts of BAGEL (arXiv 2505.14683)."""

from clear_adapters.backbones.base import BackboneSpec, LoraGroup

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

SPEC = BackboneSpec(
    name="bagel",
    title="BAGEL",
    kind="flow",
    backbone="clear_adapters.backbones.bagel.backbone:BagelBackbone",
    groups={
        "understanding": LoraGroup(
            "language_model.model.layers",
            tuple(f"self_attn.{p}" for p in _PROJECTIONS) + tuple(f"mlp.{p}" for p in _MLP),
        ),
        "generation": LoraGroup(
            "language_model.model.layers",
            tuple(f"self_attn.{p}_moe_gen" for p in _PROJECTIONS) + tuple(f"mlp_moe_gen.{p}" for p in _MLP),
        ),
    },
    tiny="clear_adapters.backbones.bagel.tiny:build",
    extras=("vae2llm", "llm2vae", "time_embedder", "connector"),
    never=("vit_model",),
    restoration_reader="generation",
    decodes=True,
    checkpoints=("builtin:bagel-tiny", "ByteDance-Seed/BAGEL-7B-MoT", "CUDAOUTOFMEMORY/CLEAR"),
    tested_with="torch 2.11 to 2.13, transformers 5.23, diffusers 0.42",
    license="Apache-2.0 (BAGEL-7B-MoT)",
    stages=("sft", "bridge", "grpo"),
    sources=("arXiv 2505.14683", "github.com/ByteDance-Seed/Bagel"),
)
