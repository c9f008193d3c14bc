"""Stage 3: Interleaved GRPO over text tokens and restoration steps (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from clear_adapters.errors import ClearValueError
from clear_adapters.rewards import read_terms


@dataclass(frozen=True)
class GrpoSettings:
    """What stage 3 does.

    Attributes:
        group: rollouts of one question, G.
        rewards: terms of the reward, as `read_terms` takes them.
        temperature: of the rollouts' text; top-p is 1.
        flow_steps: points of the flow schedule in rollouts; the released code has 20.
        sigma: noise level of the stochastic steps.
        scored_steps: steps of a restoration that are trained on, of those that were sampled.
        step_choice: `random` steps, `round_robin` over training steps, or a random `window` of neighbours.
        latent_from: what the text reads: the model's `own` latent, or it decoded and encoded again (`reencode`).
        clip: of the text's ratios, 1 +- clip.
        latent_clip: of the steps' ratios.
        image_weight: lambda, of the restoration's part of the loss.
        beta: of the KL to the frozen stage-2 adapter, in k3 form.
        scale: advantages divided by the `group`'s standard deviation, or not (`none`).
        advantage: `shared` by text and restoration, or `separate`: restorations get the one of `latent_rewards`.
        latent_rewards: names of the terms that make the restorations' advantage when it is separate.
        reduction: `grpo` averages tokens in a rollout and then rollouts, `bnpo` all tokens of the step, `dr_grpo`
            divides by rollouts times the longest reply allowed.
        iterations: optimizer steps on the same rollouts.
        rollout_rows: rollouts sampled side by side; None is all of a step.

    Raises:
        ClearValueError: a value out of its range, or rewards that cannot work.
        UnknownNameError: an unknown reward.
    """

    group: int = 4
    rewards: Mapping[str, Any] = field(
        default_factory=lambda: {"accuracy": 0.75, "format": 0.10, "decision": 0.15}
    )
    temperature: float = 1.0
    flow_steps: int = 20
    sigma: float = 0.3
    scored_steps: int = 1
    step_choice: Literal["random", "round_robin", "window"] = "random"
    latent_from: Literal["own", "reencode"] = "own"
    clip: float = 0.2
    latent_clip: float = 0.2
    image_weight: float = 0.3
    beta: float = 0.04
    scale: Literal["group", "none"] = "group"
    advantage: Literal["shared", "separate"] = "shared"
    latent_rewards: tuple[str, ...] = ("latent_quality",)
    reduction: Literal["grpo", "bnpo", "dr_grpo"] = "grpo"
    iterations: int = 1
    rollout_rows: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("group", 2), ("flow_steps", 3), ("scored_steps", 1), ("iterations", 1)):
            if getattr(self, name) < low:
                raise ClearValueError(f"{name}={getattr(self, name)}: must be at least {low}")
        if self.scored_steps > self.flow_steps - 1:
            raise ClearValueError(
                f"scored_steps={self.scored_steps}: {self.flow_steps} points make {self.flow_steps - 1} steps"
            )
        for name in ("temperature", "sigma", "clip", "latent_clip"):
            if not getattr(self, name) > 0:
                raise ClearValueError(f"{name}={getattr(self, name)}: must be positive")
        for name in ("image_weight", "beta"):
            if not getattr(self, name) >= 0:
                raise ClearValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.rollout_rows is not None and self.rollout_rows < self.group:
            raise ClearValueError(f"rollout_rows={self.rollout_rows}: a group of {self.group} must fit")
        terms = read_terms(self.rewards)
        if self.advantage == "separate":
            missing = [n for n in self.latent_rewards if n not in terms]
            if missing or not self.latent_rewards:
                raise ClearValueError(
                    f"advantage='separate' needs latent_rewards among the rewards; {missing} are not"
                )
