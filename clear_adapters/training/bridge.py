"""Stage 2: the latent representation bridge learns to be read (paper, section 3.2; METHOD.md has the released form)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from clear_adapters.datasets.traces import TraceSettings
from clear_adapters.errors import ClearValueError


@dataclass(frozen=True)
class BridgeSettings:
    """What stage 2 does.

    Attributes:
        own: share of rows that read a latent which the model itself generates.
        estimate: share of rows that read the one-step estimate `x_t - t v` of the clean latent, through which the
            answer's gradient reaches the generator. The remaining rows read the true clean latent.
        own_steps: points of the flow schedule for the rows of `own`.
        vit_drop: probability with which a row's understanding tokens of the degraded picture are left out.
        timestep_shift: as in stage 1, for the times of estimates.
        distill: `per_layer_kl` between the states of teacher and bridged tokens, place by place; `final_mse` of the mean
            last states; `none`.
        layer_stride: every so many layers, and the last, are compared.
        answer_weight: as in stage 1.
        ce_weight: of the cross-entropy of the text after the restoration.
        distill_weight: of the distillation.
        mse_weight: of the flow loss on the estimates' velocities.
        traces: how paths are chosen; every row of this stage restores that can.

    Raises:
        ClearValueError: a value out of its range.
    """

    own: float = 0.4
    estimate: float = 0.2
    own_steps: int = 10
    vit_drop: float = 0.4
    timestep_shift: float = 1.0
    distill: Literal["per_layer_kl", "final_mse", "none"] = "per_layer_kl"
    layer_stride: int = 1
    answer_weight: float = 1.0
    ce_weight: float = 1.0
    distill_weight: float = 0.1
    mse_weight: float = 0.0
    traces: TraceSettings = field(default_factory=TraceSettings)

    def __post_init__(self) -> None:
        for name in ("own", "estimate", "vit_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ClearValueError(f"{name}={getattr(self, name)}: a share in [0, 1]")
        if self.own + self.estimate > 1:
            raise ClearValueError(f"own={self.own} and estimate={self.estimate} sum to more than 1")
        if self.own_steps < 2:
            raise ClearValueError(f"own_steps={self.own_steps}: a flow needs at least 2 points")
        if self.layer_stride < 1:
            raise ClearValueError(f"layer_stride={self.layer_stride}: must be at least 1")
        if self.distill not in ("per_layer_kl", "final_mse", "none"):
            raise ClearValueError(f"distill={self.distill!r}: 'per_layer_kl', 'final_mse' or 'none'")
        for name in ("answer_weight", "ce_weight", "distill_weight", "mse_weight"):
            if not getattr(self, name) >= 0:
                raise ClearValueError(f"{name}={getattr(self, name)}: must not be negative")
        if not self.timestep_shift > 0:
            raise ClearValueError(f"timestep_shift={self.timestep_shift}: must be positive")
