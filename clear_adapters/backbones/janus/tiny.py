"""Janus at small sizes: the real classes, as a random toy for tests and at the sizes of the built-in model."""

from __future__ import annotations

from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor, LlamaConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from clear_adapters.backbones.byte_tokenizer import byte_tokenizer
from clear_adapters.backbones.janus.backbone import JanusBackbone
from clear_adapters.backbones.random_weights import drawn

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
IMAGE, BOI, EOI = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
MARKS = (BOS, EOS, IMAGE, BOI, EOI, "<|User|>", "<|Assistant|>")


def small_processor(side: int, tokens: int) -> JanusProcessor:
    """A processor for pictures in a square of that side, which become so many tokens."""
    tokenizer = byte_tokenizer(
        MARKS,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        extra_special_tokens={"image_token": IMAGE, "boi_token": BOI, "eoi_token": EOI},
    )
    half = [0.5, 0.5, 0.5]
    images = JanusImageProcessorPil(size={"height": side, "width": side}, image_mean=half, image_std=half)
    return JanusProcessor(images, tokenizer, num_image_tokens=tokens)


def small_config(
    *,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    vision_width: int,
    vision_layers: int,
    vision_heads: int,
    cells: int,
    codes: int,
    vq_channels: int,
    vq_levels: tuple[int, ...] = (1, 1, 1, 1, 1),
    mlp_ratio: float = 2.0,
    positions: int = 4096,
) -> JanusConfig:
    """A Janus of chosen sizes for pictures of `cells` x `cells` tokens; each level of the tokenizer but one halves a picture."""
    patch = 2 ** (len(vq_levels) - 1)
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=256 + len(MARKS),
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=positions,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=257,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=patch * cells,
            patch_size=patch,
            projection_dim=width,
            num_image_tokens=cells * cells,
            mlp_ratio=mlp_ratio,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=codes,
            latent_channels=vq_channels,
            base_channels=vq_channels,
            channel_multiplier=list(vq_levels),
            num_res_blocks=1,
            projection_dim=width,
            image_token_embed_dim=width,
            num_patches=cells,
        ),
        image_token_id=258,
        tie_word_embeddings=False,
    )


def builtin_config() -> JanusConfig:
    """The sizes of `builtin:janus-tiny`: pictures of 128 px, 256 of 4,096 codes, 256 tokens of the understanding encoder."""
    return small_config(
        width=192,
        layers=6,
        heads=6,
        kv_heads=2,
        mlp=512,
        vision_width=128,
        vision_layers=4,
        vision_heads=4,
        cells=16,
        codes=4096,
        vq_channels=32,
        vq_levels=(1, 1, 2, 2),
        mlp_ratio=4.0,
    )


def initialise(config: JanusConfig, seed: int) -> JanusForConditionalGeneration:
    """A model with random weights from a seed; see `drawn`."""
    model: JanusForConditionalGeneration = drawn(lambda: JanusForConditionalGeneration(config), seed)
    # A checkpoint of the Hub says what opens a picture, and is not marked as made from its config.
    model.generation_config.generation_kwargs = {"boi_token_id": 259}
    model.generation_config._from_model_config = False
    return model


def build(seed: int = 0, layers: int = 2) -> JanusBackbone:
    """The real classes at toy size with random weights, for the contract tests."""
    config = small_config(
        width=32,
        layers=layers,
        heads=4,
        kv_heads=2,
        mlp=48,
        vision_width=24,
        vision_layers=1,
        vision_heads=2,
        cells=4,
        codes=50,
        vq_channels=32,
    )
    return JanusBackbone.wrap(initialise(config, seed), small_processor(64, 16))
