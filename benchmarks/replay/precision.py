"""How far a replay is from the rollout it replays, in float32 and in bfloat16 (invariant 4 of the design).

    python benchmarks/replay/precision.py --output benchmarks/results/replay_precision.json

Rollouts of held-out degraded scenes, sampled at temperature 1 and restored by the stochastic sampler, are replayed by
one uncached forward. The rollout decodes a token at a time from a cache, so in bfloat16 the two differ by rounding.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clear_adapters import attach, degrade
from clear_adapters.degradations import draw
from clear_adapters.results import ResultFile
from clear_adapters.sampling import LatentSampling
from clear_adapters.transcript import Origin, TextSegment, Transcript
from clear_adapters.world import ask, render, sample_scene


def recorded(transcripts: list[Transcript]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities that a rollout recorded: of all text tokens, and of all flow steps."""
    texts = [
        s.logprobs
        for t in transcripts
        for s in t
        if isinstance(s, TextSegment) and s.origin is Origin.SAMPLED
    ]
    traces = [s.restoration.trace for t in transcripts for s in t.restorations if s.restoration is not None]
    steps = [trace.logprobs[0] for trace in traces if trace is not None]
    return torch.cat([t for t in texts if t is not None]).cpu(), torch.cat(steps).cpu()


def spread(difference: torch.Tensor) -> dict[str, float]:
    """Median, 99th percentile and largest absolute difference."""
    size = difference.abs().double()
    return {
        "n": len(size),
        "median": float(size.quantile(0.5)),
        "p99": float(size.quantile(0.99)),
        "largest": float(size.max()),
    }


def measure(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Rolls out and replays in one type."""
    attached = attach(args.model, args.adapter, device=args.device, dtype=dtype)
    text = replace(attached.config.text, temperature=1.0)
    latent = LatentSampling(
        steps=args.steps, shift=1.5, guidance_text=1.0, guidance_image=1.0, sde_sigma=args.sigma
    )
    attached.config = replace(attached.config, text=text, latent=latent)
    scenes = [sample_scene(9_000_000 + i, "heldout") for i in range(args.rollouts)]
    questions = [ask(s, seed=i, n=1)[0].text for i, s in enumerate(scenes)]
    images = [degrade(render(s), draw(i), severity="high", seed=i) for i, s in enumerate(scenes)]
    seeds = list(range(args.rollouts))
    transcripts = attached.engine.rollout(images, questions, seeds=seeds, restore="always")
    with torch.no_grad():
        found = attached.engine.replay(transcripts)
    attached.detach()
    own_text, own_steps = torch.cat(found.text_logprobs).cpu(), torch.cat(found.latent_logprobs).cpu()
    text_before, steps_before = recorded(transcripts)
    return {
        "text": spread(own_text - text_before),
        "steps": spread(own_steps - steps_before),
        "mean_text_logprob": float(text_before.mean()),
    }


def main() -> None:
    """Measures both types and writes the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="builtin:bagel-tiny")
    parser.add_argument("--adapter", default="builtin:clear-bagel-tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sigma", type=float, default=0.3)
    args = parser.parse_args()
    payload = {dtype: measure(args, dtype) for dtype in ("float32", "bfloat16")}
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    result = ResultFile.collect("replay_precision", payload, device=name, seeds=(0,))
    print(payload)
    result.write(args.output)


if __name__ == "__main__":
    main()
