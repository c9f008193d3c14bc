"""The BAGEL network: a Qwen2 Mixture-of-Transformers with a SigLIP encoder and latent projections.

Parameter names are those of the official checkpoint. Hidden states are kept apart by expert: `und` holds the
text and picture tokens (U, D), `gen` the latent tokens (G, D), and they meet only in attention, where they are
laid out as (B, L). Everything outside attention so touches no padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import SiglipVisionConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from clear_adapters.backbones import fast
from clear_adapters.backbones.attention import any_shape
from clear_adapters.backbones.bagel.config import BagelConfig
from clear_adapters.backbones.bagel.images import normalise
from clear_adapters.backbones.cache import Pass, Slots
from clear_adapters.backbones.rows import Rows
from clear_adapters.backbones.spans import Span, attend_spans

if TYPE_CHECKING:
    from clear_adapters.backbones.bagel.compiled import Compiled, CompiledTraining, Expert


class KeyValues(Protocol):
    """What a layer needs of a cache."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts (B, H, L, d) behind what is read and gives all keys and values, (B, H, K, d)."""
        ...


class RMSNorm(nn.RMSNorm):
    """Sums in 32 bits and gives the input's type, on a GPU under autocast too.

    Autocast would give 32 bits, which each of the products behind it then casts back for itself. A CPU's numbers are left as
    they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape."""
        kind = x.device.type
        if kind == "cpu" or not torch.is_autocast_enabled(kind):
            return super().forward(x)
        with torch.autocast(kind, enabled=False):
            return super().forward(x)


class Attention(nn.Module):
    """Grouped-query attention with a projection set for each expert, over both kinds of tokens together."""

    o_proj: nn.Linear
    o_proj_moe_gen: nn.Linear

    def __init__(self, config: BagelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = int(config.llm["num_attention_heads"])
        self.kv_heads = int(config.llm.get("num_key_value_heads", self.heads))
        self.head_dim = config.head_dim
        eps = float(config.llm.get("rms_norm_eps", 1e-6))
        width, q, kv = config.width, self.heads * self.head_dim, self.kv_heads * self.head_dim
        for suffix in ("", "_moe_gen"):
            setattr(self, f"q_proj{suffix}", nn.Linear(width, q))
            setattr(self, f"k_proj{suffix}", nn.Linear(width, kv))
            setattr(self, f"v_proj{suffix}", nn.Linear(width, kv))
            setattr(self, f"o_proj{suffix}", nn.Linear(q, width, bias=False))
            setattr(self, f"q_norm{suffix}", RMSNorm(self.head_dim, eps=eps))
            setattr(self, f"k_norm{suffix}", RMSNorm(self.head_dim, eps=eps))

    def _project(self, x: Tensor, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        def get(name: str) -> nn.Module:
            return getattr(self, name + suffix)

        q = get("q_norm")(get("q_proj")(x).view(-1, self.heads, self.head_dim))
        k = get("k_norm")(get("k_proj")(x).view(-1, self.kv_heads, self.head_dim))
        return q, k, get("v_proj")(x).view(-1, self.kv_heads, self.head_dim)

    def project(
        self,
        und: Tensor,
        gen: Tensor,
        b: int,
        length: int,
        und_index: Tensor,
        gen_index: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, L, d) of both experts' tokens in one layout; places of neither stay zero."""
        parts: tuple[Tensor, ...] = self._project(und, "")
        if gen.shape[0]:
            parts = tuple(
                # In place: a copy for each expert would be read and written for nothing.
                x.new_zeros(b * length, *x.shape[1:])
                .index_copy_(0, und_index, x)
                .index_copy_(0, gen_index, y)
                for x, y in zip(parts, self._project(gen, "_moe_gen"), strict=True)
            )
        elif und.shape[0] != b * length:
            parts = tuple(x.new_zeros(b * length, *x.shape[1:]).index_copy_(0, und_index, x) for x in parts)
        q, k, v = (x.view(b, length, -1, self.head_dim).transpose(1, 2) for x in parts)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, frame: Frame, cache: KeyValues | Rows | None) -> Tensor:
        """(B L, heads d) of queries, keys and values of the new tokens, behind what the cache holds."""
        b, length = frame.shape
        if isinstance(cache, Rows):
            return torch.cat(cache.attend(self.layer, q, k, v)).view(b * length, -1)
        if frame.spans is not None:
            return attend_spans(q, k, v, frame.spans).reshape(b * length, -1)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
            q = q.to(k.dtype)  # norms under autocast give 32 bits
        if length == 1 and cache is not None:
            return self.attend_one(q, k, v, frame)
        if self.kv_heads != self.heads:
            # Explicit, since SDPA's fused kernels take no mask together with grouped heads on every device.
            k = k.repeat_interleave(self.heads // self.kv_heads, 1)
            v = v.repeat_interleave(self.heads // self.kv_heads, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=frame.mask)
        return out.reshape(b, self.heads, length, -1).transpose(1, 2).reshape(b * length, -1)

    def attend_one(self, q: Tensor, k: Tensor, v: Tensor, frame: Frame, weigh: Weigh | None = None) -> Tensor:
        """(B, heads d) of one new token's queries (B, heads, 1, d) and all keys and values."""
        # Heads that share keys are queries of one head: no copy of the cache for each token that is written.
        q = q.reshape(len(q), self.kv_heads, -1, self.head_dim)
        if q.element_size() == 2 and fast.takes("products", q.device):
            return attend_by_products(q, k, v, frame.bias, weigh or weigh_scores).reshape(len(q), -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=frame.mask).reshape(len(q), -1)

    def leave(
        self,
        out: Tensor,
        und: Tensor,
        gen: Tensor,
        b: int,
        length: int,
        und_index: Tensor,
        gen_index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What attention gives each expert's tokens, (U, D) and (G, D)."""
        if und.shape[0] == b * length:
            return self.o_proj(out), gen
        # index_select, not indexing: its backward adds without sorting.
        u = self.o_proj(out.index_select(0, und_index))
        return u, self.o_proj_moe_gen(out.index_select(0, gen_index)) if gen.shape[0] else gen


Weigh = Callable[[Tensor, Tensor, float, torch.dtype], Tensor]
"""`weigh_scores`, as it is or compiled."""


def weigh_scores(scores: Tensor, bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Weights of attention (B, H, G, K) of products of queries and keys; the bias is (B, 1, 1, K)."""
    return torch.add(bias, scores, alpha=scale).softmax(-1).to(dtype)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, weigh: Weigh = weigh_scores) -> Tensor:
    """Attention of a few queries over a long context as two matrix products, with the scores in float32.

    A fused kernel gives each head of each row one block of the GPU, which then reads the whole context alone: with 4 heads
    of keys and one row, 4 blocks of 132. Products are spread over the context.

    Args:
        q: (B, H, G, d).
        k: (B, H, K, d).
        v: (B, H, K, d).
        bias: (B, 1, 1, K) float32, 0 where seen and minus infinity elsewhere.
        weigh: how scores become weights.

    Returns:
        (B, H, G, d).
    """
    b, heads, queries, width = q.shape
    flat, keys = q.reshape(b * heads, queries, width), k.reshape(b * heads, -1, width).transpose(1, 2)
    # A CPU has no product of 16-bit numbers with a result in 32.
    scores = torch.bmm(flat, keys, out_dtype=torch.float32) if q.is_cuda else flat.float() @ keys.float()
    weights = weigh(scores.view(b, heads, queries, -1), bias, width**-0.5, v.dtype)
    return torch.bmm(weights.view(b * heads, queries, -1), v.reshape(b * heads, -1, width)).view(q.shape)


class Frame:
    """The layout of one pass, shared by all layers.

    Attributes:
        shape: (B, L).
        und_index: (U,) flat places of the understanding tokens.
        gen_index: (G,) flat places of the generation tokens.
        cos, sin: (B, 1, L, d) rotary tables at the tokens' positions; (B, 1, 1, d) where those of a row share one.
        mask: (B, 1, L, K) bool, True where seen; None where nothing is hidden, or `spans` say what is.
        spans: the blocks of each row, of a pass without a cache.
        experts: of each layer, for compiled passes.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        und_index: Tensor,
        gen_index: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        spans: Sequence[Sequence[Span]] | None = None,
        experts: Sequence[Sequence[Expert]] | None = None,
    ) -> None:
        self.shape = shape
        self.und_index = und_index
        self.gen_index = gen_index
        self.cos = cos
        self.sin = sin
        self.mask = mask
        self.spans = spans
        self.experts = experts
        self._bias: Tensor | None = None

    @property
    def layout(self) -> tuple[int, int, Tensor, Tensor, Tensor, Tensor]:
        """All but what is hidden: B, L, the places of both experts' tokens, and the rotary tables."""
        return *self.shape, self.und_index, self.gen_index, self.cos, self.sin

    @property
    def bias(self) -> Tensor:
        """The mask as what is added to scores, float32; made once for all layers."""
        if self._bias is None:
            assert self.mask is not None
            seen = torch.zeros(self.mask.shape, dtype=torch.float32, device=self.mask.device)
            self._bias = seen.masked_fill(~self.mask, -torch.inf)
        return self._bias


def _twice_any_shape() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For a layer's forward and for the one that is repeated in the backward pass."""
    return any_shape(), any_shape()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split as in Qwen2."""
    a, b = x.chunk(2, dim=-1)
    in_place = fast.takes("place", x.device) and not torch.compiler.is_compiling()
    if in_place and not torch.is_grad_enabled():
        half = a.shape[-1]
        out = x * cos
        out[..., :half].addcmul_(b, sin[..., :half], value=-1)
        out[..., half:].addcmul_(a, sin[..., half:])
        return out
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Layer(nn.Module):
    """A transformer layer with norms, attention projections and MLP for each expert."""

    def __init__(self, config: BagelConfig, index: int) -> None:
        super().__init__()
        llm = Qwen2Config(
            **{k: v for k, v in config.llm.items() if k in ("hidden_size", "intermediate_size")}
        )
        eps = float(config.llm.get("rms_norm_eps", 1e-6))
        self.self_attn = Attention(config, index)
        self.mlp = Qwen2MLP(llm)
        self.mlp_moe_gen = Qwen2MLP(llm)
        self.input_layernorm = RMSNorm(config.width, eps=eps)
        self.input_layernorm_moe_gen = RMSNorm(config.width, eps=eps)
        self.post_attention_layernorm = RMSNorm(config.width, eps=eps)
        self.post_attention_layernorm_moe_gen = RMSNorm(config.width, eps=eps)

    def forward(
        self, und: Tensor, gen: Tensor, frame: Frame, cache: KeyValues | Rows | None = None
    ) -> tuple[Tensor, Tensor]:
        """Args: und (U, D), gen (G, D). Returns: the same shapes."""
        q, k, v = self.enter(und, gen, *frame.layout)
        out = self.self_attn.attend(q, k, v, frame, cache)
        return self.leave(out, und, gen, *frame.layout[:4])

    def enter(self, und: Tensor, gen: Tensor, *layout: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Up to the attention; `layout` is that of its frame."""
        seen = self.input_layernorm_moe_gen(gen) if gen.shape[0] else gen
        return self.self_attn.project(self.input_layernorm(und), seen, *layout)

    def leave(self, out: Tensor, und: Tensor, gen: Tensor, *layout: Any) -> tuple[Tensor, Tensor]:
        """From the attention on; of the frame's layout, shape and places."""
        x, y = self.self_attn.leave(out, und, gen, *layout)
        und = und + x
        und = und + self.mlp(self.post_attention_layernorm(und))
        if gen.shape[0]:
            gen = gen + y
            gen = gen + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(gen))
        return und, gen


class Decoder(nn.Module):
    """The stack of layers with token embeddings and final norms (`language_model.model` in the checkpoint)."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        eps = float(config.llm.get("rms_norm_eps", 1e-6))
        self.embed_tokens = nn.Embedding(int(config.llm["vocab_size"]), config.width)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(int(config.llm["num_hidden_layers"])))
        self.norm = RMSNorm(config.width, eps=eps)
        self.norm_moe_gen = RMSNorm(config.width, eps=eps)
        self.theta = float(config.llm.get("rope_theta", 1000000.0))
        self.head_dim = config.head_dim
        self.checkpointing = False
        self.compiled: Compiled | None = None
        self.compiled_training: CompiledTraining | None = None

    def experts(self, both: bool, bare: bool = False) -> list[list[Expert]] | None:
        """For compiled passes, the first of each layer or both, as they are now; None where passes are not compiled.

        They are not with shards, nor under autocast, where sums and products have types of their own; of `bare` ones not with
        LoRA beside the weights either.
        """
        if self.compiled is None or torch.is_autocast_enabled(self.embed_tokens.weight.device.type):
            return None
        if any(isinstance(layer, FSDPModule) for layer in self.layers):
            return None
        return self.compiled.experts(list(self.layers), both, bare)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, 1, L, d) at positions (B, L), computed in float32."""
        exponent = (
            torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32) / self.head_dim
        )
        angles = positions[:, None, :, None].float() * self.theta**-exponent
        angles = torch.cat((angles, angles), dim=-1)
        dtype = self.embed_tokens.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    @any_shape()
    def forward(
        self,
        und: Tensor,
        gen: Tensor,
        frame: Frame,
        cache: KeyValues | Rows | None = None,
        hidden_layers: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Runs all layers; returns the states before the final norms, and those after the layers asked for."""
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        plain = frame.experts is None or torch.is_autocast_enabled(und.device.type)
        if self.compiled is not None and not plain and isinstance(cache, Slots | Rows | Pass):
            return *self.compiled.run(list(self.layers), und, gen, frame, cache), kept
        for i, layer in enumerate(self.layers):
            if cache is None:
                run: Callable[..., tuple[Tensor, Tensor]] = layer
                if self.compiled_training is not None:
                    run = partial(self.compiled_training, layer)
                if self.checkpointing and self.training:
                    und, gen = torch.utils.checkpoint.checkpoint(
                        *(run, und, gen, frame), use_reentrant=False, context_fn=_twice_any_shape
                    )
                else:
                    und, gen = run(und, gen, frame)
            else:
                # Not what `compile` made of it: with a cache each layer is a shape of its own, and few of them would use up
                # what the compiler remembers, so that training ran uncompiled.
                und, gen = layer.forward(und, gen, frame, cache)
            if i in hidden_layers:
                kept[i] = (und, gen)
        return und, gen, kept


class LanguageModel(nn.Module):
    """Decoder and head, nested as the checkpoint names them."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.width, int(config.llm["vocab_size"]), bias=False)


class VisionEncoder(nn.Module):
    """SigLIP over padded patch sequences of any grid (`vit_model.vision_model`): position table, no head."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        vit = SiglipVisionConfig(
            hidden_size=config.vit["hidden_size"],
            intermediate_size=config.vit["intermediate_size"],
            num_attention_heads=config.vit["num_attention_heads"],
            num_hidden_layers=config.vit_layers,
            hidden_act=config.vit.get("hidden_act", "gelu_pytorch_tanh"),
            layer_norm_eps=config.vit.get("layer_norm_eps", 1e-6),
        )
        vit._attn_implementation = "sdpa"
        width = int(config.vit["hidden_size"])
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Linear(3 * config.patch**2, width),
                "position_embedding": nn.Embedding(config.vit_side**2, width),
            }
        )
        self.encoder = SiglipEncoder(vit)
        self.post_layernorm = nn.LayerNorm(width, eps=vit.layer_norm_eps)

    @any_shape()
    def forward(self, patches: Tensor, positions: Tensor, valid: Tensor | None) -> Tensor:
        """Args: patches (I, P, patch_dim), positions (I, P), valid (I, P) or None. Returns: (I, P, width)."""
        x = self.embeddings["patch_embedding"](patches) + self.embeddings["position_embedding"](positions)
        mask = None
        if valid is not None:
            # A padding patch sees itself, so that its row of the softmax is not empty.
            eye = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
            mask = torch.zeros(eye.shape, dtype=x.dtype, device=x.device).expand(valid.shape[0], 1, -1, -1)
            mask = mask.masked_fill(~(valid[:, None, None, :] | eye), torch.finfo(x.dtype).min)
        return self.post_layernorm(self.encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state)


class Connector(nn.Module):
    """Two-layer MLP from the understanding encoder to the language model."""

    def __init__(self, vision: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., vision) to (..., width)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PositionTable(nn.Module):
    """A fixed table over a square grid, row by row (two-dimensional sines in the official weights)."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(side * side, width), requires_grad=False)

    def forward(self, index: Tensor) -> Tensor:
        """Rows of the table."""
        return self.pos_embed[index]


class TimeEmbedder(nn.Module):
    """Sinusoidal embedding of a time in [0, 1] through an MLP."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(N,) float32 to (N, width)."""
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * rates
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class BagelModel(nn.Module):
    """All weights of BAGEL but the autoencoder, under the official names."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = LanguageModel(config)
        self.vit_model = nn.ModuleDict({"vision_model": VisionEncoder(config)})
        self.connector = Connector(int(config.vit["hidden_size"]), config.width)
        self.vit_pos_embed = PositionTable(config.vit_side, config.width)
        self.time_embedder = TimeEmbedder(config.width)
        self.vae2llm = nn.Linear(config.latent_width, config.width)
        self.llm2vae = nn.Linear(config.width, config.latent_width)
        self.latent_pos_embed = PositionTable(config.latent_side, config.width)

    def embed_patches(self, patches: Tensor, positions: Tensor, valid: Tensor | None) -> Tensor:
        """Understanding tokens (I, P, D) of patches; `valid` is None where there is no padding."""
        seen = self.vit_model["vision_model"](
            normalise(patches).to(self.vae2llm.weight.dtype), positions, valid
        )
        return self.connector(seen) + self.vit_pos_embed(positions)

    def embed_latents(self, latents: Tensor, positions: Tensor, time: Tensor) -> Tensor:
        """Latent tokens (G, D) of (G, C) at grid places (G,) and times (G,); time 0 is the way back in."""
        x = self.vae2llm(latents.to(self.vae2llm.weight.dtype))
        return x + self.time_embedder(time) + self.latent_pos_embed(positions)

    def velocity(self, gen: Tensor) -> Tensor:
        """Velocity (G, C) float32 from the generation expert's last states."""
        return self.llm2vae(self.language_model.model.norm_moe_gen(gen)).float()

    def logits(self, und: Tensor) -> Tensor:
        """Next-token logits of the understanding expert's last states."""
        return self.language_model.lm_head(self.language_model.model.norm(und))


def sincos_table(side: int, width: int) -> Tensor:
    """The two-dimensional sine table (side * side, width) that BAGEL's position tables hold."""
    quarter = width // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat((angles.sin(), angles.cos()), dim=1)
    column = line[None, :, :].expand(side, side, -1)
    row = line[:, None, :].expand(side, side, -1)
    return torch.cat((column, row), dim=-1).reshape(side * side, width).float()
