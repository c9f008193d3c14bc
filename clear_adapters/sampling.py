"""Settings and pure tensor functions of sampling: text tokens, flow steps, and random numbers of a row.

Nothing here knows a model or a cache. Times run from 1 (noise) to 0 (picture), as in the paper (section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from clear_adapters.errors import ClearValueError

Time = TypeVar("Time", float, Tensor)
Renorm = Literal["global", "channel", "text_channel", "none"]
RENORMS: tuple[str, ...] = ("global", "channel", "text_channel", "none")

# --------------------------------------------------------------------------------------------------- settings


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ClearValueError(message)


def _require_temperature(value: float) -> None:
    _require(
        math.isfinite(value) and value >= 0, f"temperature={value}: must be 0 (greedy) or a positive number"
    )


@dataclass(frozen=True)
class TextSampling:
    """How text is sampled.

    Attributes:
        max_new_tokens: the longest turn, in tokens, its end token included.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches it; 1 keeps all.
        top_k: keep the k most likely tokens; 0 keeps all.

    Raises:
        ClearValueError: a value is out of its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        _require(
            self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens}: a turn needs at least 1 token"
        )
        _require_temperature(self.temperature)
        _require(0 < self.top_p <= 1, f"top_p={self.top_p}: a probability in (0, 1]; 1 keeps every token")
        _require(self.top_k >= 0, f"top_k={self.top_k}: 0 keeps every token, k > 0 the k most likely")


@dataclass(frozen=True)
class LatentSampling:
    """How a restoration is sampled.

    Attributes:
        steps: points of the time schedule; `steps - 1` flow steps are taken, as in the released code.
        shift: moves points towards noise, `t' = shift t / (1 + (shift - 1) t)`.
        guidance_text: scale against the context without the thought; 1 is off.
        guidance_image: scale against the context without the picture; 1 is off.
        guidance_interval: guidance acts for `low < t <= high`.
        renorm: how a guided velocity is brought back to the length of the plain one.
        renorm_min: the smallest factor that renorm applies.
        sde_sigma: noise level of the stochastic sampler; 0 takes the deterministic step.
        logprob: per-step log-probability as the `mean` over latent dimensions (released code) or their `sum`.
        temperature: for code latents, as in `TextSampling`.

    Raises:
        ClearValueError: a value is out of its range.
    """

    steps: int = 30
    shift: float = 3.0
    guidance_text: float = 4.0
    guidance_image: float = 2.0
    guidance_interval: tuple[float, float] = (0.4, 1.0)
    renorm: Renorm = "global"
    renorm_min: float = 0.0
    sde_sigma: float = 0.0
    logprob: Literal["mean", "sum"] = "mean"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _require(self.steps >= 2, f"steps={self.steps}: a schedule has at least 2 points, noise and picture")
        _require(
            math.isfinite(self.shift) and self.shift > 0,
            f"shift={self.shift}: must be a positive number; 1 leaves the schedule even",
        )
        for name in ("guidance_text", "guidance_image"):
            scale = getattr(self, name)
            _require(
                math.isfinite(scale) and scale >= 1,
                f"{name}={scale}: must be a number of at least 1, which is off",
            )
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        _require(
            len(self.guidance_interval) == 2 and self.guidance_interval[0] <= self.guidance_interval[1],
            f"guidance_interval={self.guidance_interval}: two times, the lower one first",
        )
        _require(self.renorm in RENORMS, f"renorm={self.renorm!r}: one of {', '.join(RENORMS)}")
        _require(0 <= self.renorm_min <= 1, f"renorm_min={self.renorm_min}: must lie in [0, 1]")
        _require(
            math.isfinite(self.sde_sigma) and self.sde_sigma >= 0,
            f"sde_sigma={self.sde_sigma}: must be 0 (the deterministic sampler) or a positive number",
        )
        _require(self.logprob in ("mean", "sum"), f"logprob={self.logprob!r}: 'mean' or 'sum'")
        _require_temperature(self.temperature)
        _require(
            self.sde_sigma == 0 or not self.guided,
            "guidance together with sde_sigma: a guided velocity is not the policy whose log-probability is "
            "recorded; set guidance_text and guidance_image to 1, or sde_sigma to 0",
        )

    @property
    def guided(self) -> bool:
        """Whether any guidance branch is needed."""
        return self.guidance_text > 1 or self.guidance_image > 1


# ------------------------------------------------------------------------------------- random numbers of a row

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on signed 64-bit tensors (products wrap)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _unit(bits: Tensor) -> Tensor:
    """The low 23 bits as float32 in (0, 1): with the added half neither end can be reached by rounding."""
    return ((bits & 0x7FFFFF).float() + 0.5) / 8388608.0


class RowRandom:
    """One random stream a row, as a function of the row's seed and of how often that row has drawn.

    Counter-based (splitmix64), so that a batch draws in one tensor operation, a row's numbers do not
    depend on its neighbours, and a CPU and a GPU draw the same bits.

    Attributes:
        seeds: (B,) int64.
        counts: (B,) int64, draws taken so far.
    """

    def __init__(self, seeds: Tensor, counts: Tensor | None = None) -> None:
        self.seeds = seeds
        self.counts = torch.zeros_like(seeds) if counts is None else counts

    @classmethod
    def from_seeds(cls, seeds: list[int], device: torch.device) -> RowRandom:
        """A fresh stream for each seed."""
        masked = [((s + 2**63) % 2**64) - 2**63 for s in seeds]
        return cls(torch.tensor(masked, dtype=torch.int64, device=device))

    def clone(self) -> RowRandom:
        """The same streams, to be advanced on their own."""
        return RowRandom(self.seeds.clone(), self.counts.clone())

    def select(self, index: Tensor) -> RowRandom:
        """The streams of some rows."""
        return RowRandom(self.seeds[index], self.counts[index])

    def bits(self, size: int, active: Tensor | None = None) -> Tensor:
        """(B, size) int64 of random bits; rows where `active` (B,) is False do not advance."""
        key = _mix(_mix(self.seeds - _GOLDEN) + self.counts * _GOLDEN)
        lanes = torch.arange(1, size + 1, dtype=torch.int64, device=key.device)
        self.counts = self.counts + (1 if active is None else active.to(torch.int64))
        return _mix(key[:, None] + lanes[None] * _GOLDEN)

    def uniform(self, size: int, active: Tensor | None = None) -> Tensor:
        """(B, size) float32 in (0, 1)."""
        return _unit(self.bits(size, active) >> 41)

    def normal(self, size: int, active: Tensor | None = None) -> Tensor:
        """(B, size) float32, standard normal (Box-Muller)."""
        bits = self.bits(size, active)
        return (-2 * _unit(bits >> 41).log()).sqrt() * (2 * math.pi * _unit(bits >> 9)).cos()


def choose_token(
    logits: Tensor, sampling: TextSampling, random: RowRandom, active: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Takes one token a row.

    Args:
        logits: (B, V).
        sampling: temperature, top_p, top_k.
        random: the rows' streams; not advanced when greedy.
        active: (B,) bool, rows that draw; the others' result is to be ignored.

    Returns:
        Token ids (B,) int64, and (B,) float32 their log-probability at the sampling temperature before
        top_p and top_k (temperature 1 when greedy), which is what GRPO scores.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    logprobs = (logits / sampling.temperature).log_softmax(-1)
    # Inverse CDF: one uniform number a row, whatever the vocabulary.
    probs, order = logprobs.exp(), None
    if sampling.top_k or sampling.top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        if sampling.top_k:
            probs[:, sampling.top_k :] = 0
        if sampling.top_p < 1:
            probs = torch.where(probs.cumsum(-1) - probs >= sampling.top_p, 0.0, probs)
    cdf = probs.cumsum(-1)
    # Below the sum even where rounding is not: a token of probability 0 is never taken.
    below = torch.nextafter(cdf[:, -1:], torch.zeros_like(cdf[:, -1:]))
    u = torch.minimum(random.uniform(1, active) * cdf[:, -1:], below)
    place = torch.searchsorted(cdf, u, right=True)
    token = place[:, 0] if order is None else order.gather(-1, place)[:, 0]
    return token, logprobs.gather(-1, token[:, None])[:, 0]


# -------------------------------------------------------------------------------------------- the flow sampler


def flow_schedule(steps: int, shift: float) -> list[float]:
    """Times from 1 to 0: `steps` points, moved by `t' = shift t / (1 + (shift - 1) t)`."""
    even = [1 - i / (steps - 1) for i in range(steps)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


def shift_time(t: Time, shift: float) -> Time:
    """The same movement of training times."""
    return shift * t / (1 + (shift - 1) * t)


def ode_step(x: Tensor, velocity: Tensor, dt: float | Tensor) -> Tensor:
    """One Euler step from t to t - dt, `x - v dt`, with v = noise - picture."""
    return x - velocity * dt


def sde_mean(
    x: Tensor, velocity: Tensor, t: Tensor | float, dt: Tensor | float, sigma: Tensor | float
) -> Tensor:
    """Mean of the stochastic step from t to t - dt (paper, the SDE of section 3.3).

    `mu = x - [v + sigma^2 / 2 * s] dt`, `s = (x + (1 - t) v) / t`, clamped to +-100 against t near 0.
    """
    score = ((x + (1 - t) * velocity) / t).clamp(-100, 100)
    return x - (velocity + 0.5 * sigma**2 * score) * dt


def sde_logprob(
    x_next: Tensor, mean: Tensor, dt: Tensor | float, sigma: float, reduce: Literal["mean", "sum"]
) -> Tensor:
    """Log-probability of a stochastic step without its constant, `-(x' - mu)^2 / (2 sigma^2 dt)`.

    Args:
        x_next: (..., N, C), where the step went.
        mean: (..., N, C).
        dt: step length; broadcastable to x_next.
        sigma: noise level.
        reduce: over N and C.

    Returns:
        (...,) float32.
    """
    terms = sde_terms(x_next, mean, dt, sigma)
    return terms.mean((-2, -1)) if reduce == "mean" else terms.sum((-2, -1))


def sde_terms(x_next: Tensor, mean: Tensor, dt: Tensor | float, sigma: Tensor | float) -> Tensor:
    """What `sde_logprob` reduces: float32, of x_next's shape."""
    return -((x_next.float() - mean.float()) ** 2) / (2 * sigma**2 * dt)


def guide(
    velocity: Tensor, without_text: Tensor | None, without_image: Tensor | None, sampling: LatentSampling
) -> Tensor:
    """Classifier-free guidance with two branches, then renorm (as released with BAGEL).

    `u = v_T + a (v - v_T)`, `w = v_I + b (u - v_I)`; a scale of 1 or a missing branch leaves its step out.
    `global` rescales w by |v| / |w| over a row (never up), `channel` token by token, `text_channel` rescales u
    token by token before the image step.

    Args:
        velocity: (B, N, C) of the whole context.
        without_text: (B, N, C) of the context without the thought.
        without_image: (B, N, C) of the context without the picture.
        sampling: scales and renorm.
    """

    def rescale(guided: Tensor, dims: tuple[int, ...]) -> Tensor:
        length = velocity.norm(dim=dims, keepdim=True)
        factor = length / (guided.norm(dim=dims, keepdim=True) + 1e-8)
        return guided * factor.clamp(sampling.renorm_min, 1.0)

    guided = velocity
    if without_text is not None and sampling.guidance_text > 1:
        guided = without_text + sampling.guidance_text * (velocity - without_text)
        if sampling.renorm == "text_channel":
            guided = rescale(guided, (-1,))
    if without_image is not None and sampling.guidance_image > 1:
        guided = without_image + sampling.guidance_image * (guided - without_image)
    if sampling.renorm == "global":
        return rescale(guided, (-2, -1))
    if sampling.renorm == "channel":
        return rescale(guided, (-1,))
    return guided
