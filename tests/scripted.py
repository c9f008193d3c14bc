"""A toy model that writes what a test wants it to, with log-probabilities of its own."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.backbones.base import Backbone
from clear_adapters.engine import Engine
from clear_adapters.sampling import LatentSampling, TextSampling, choose_token

ASK = "<think>dark</think>\n<image_restore>"
ANSWER = "<think>red</think><answer>red</answer>"
ODE = LatentSampling(steps=4, guidance_text=1, guidance_image=1)
SDE = LatentSampling(steps=5, guidance_text=1, guidance_image=1, sde_sigma=0.3)

Turn = str | Sequence[str | int]


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


class Script:
    """Stands in for `choose_token`: a turn is text to be written, with numbers for that many tokens of its own.

    A row is known by its seed, so that scripts hold in any batch. Rows without a script write freely.
    """

    def __init__(self, backbone: Backbone, turns: Mapping[int, Sequence[Turn]]) -> None:
        self.backbone = backbone
        self.turns = {seed: [self._plan(t) for t in own] for seed, own in turns.items()}
        self.place: dict[int, list[int]] = defaultdict(lambda: [0, 0])

    def _plan(self, turn: Turn) -> list[int]:
        plan: list[int] = []
        for part in [turn] if isinstance(turn, str) else turn:
            plan += [-1] * part if isinstance(part, int) else self.backbone.encode_text(part).tolist()
        return [*plan, self.backbone.end_id]

    def __call__(self, logits, sampling, random, active=None):
        token, logprob = choose_token(logits, sampling, random, active)
        logprobs = (logits.float() / (sampling.temperature or 1)).log_softmax(-1)
        for i, seed in enumerate(random.seeds.tolist()):
            if seed not in self.turns or not bool(active[i]):
                continue
            turn, at = self.place[seed]
            plan = self.turns[seed][turn]
            if plan[at] >= 0:
                token[i] = plan[at]
            elif int(token[i]) == self.backbone.end_id:
                token[i] = 65  # a free token must not end the turn
            logprob[i] = logprobs[i, token[i]]
            self.place[seed] = [turn, at + 1] if at + 1 < len(plan) else [turn + 1, 0]
        return token, logprob


def toy() -> Backbone:
    return build(0)


def make_engine(backbone: Backbone, **changes) -> Engine:
    return Engine(
        backbone, **({"protocol": "tiny", "text": TextSampling(max_new_tokens=80), "latent": ODE} | changes)
    )
