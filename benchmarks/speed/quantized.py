"""What 8-bit and 4-bit base weights change: bytes, and the outputs of the built-in model.

    python benchmarks/speed/quantized.py --output benchmarks/results/speed/quantized.json

Replies of the full base to held-out degraded scenes are scored by a replay under each quantized base (mean difference of a
token's log-probability), and asked anew: how many answers are the same, and how far restorations are from the full base's
from the same noise, against the spread of the latent itself. Needs bitsandbytes. Memory at BAGEL-7B's shapes is measured by
inference.py and training.py with `--quantization`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from clear_adapters import attach, degrade
from clear_adapters.attached import AttachedModel
from clear_adapters.backbones.quantized import KINDS
from clear_adapters.degradations import draw
from clear_adapters.results import ResultFile
from clear_adapters.transcript import Origin, TextSegment, Transcript
from clear_adapters.world import ask, render, sample_scene


def held(model: torch.nn.Module) -> int:
    """Bytes of a module's weights as they are held, quantization tables included."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        parts = [] if state is None else [state.absmax, state.code]
        parts += [x for x in (getattr(parameter, "SCB", None),) if x is not None]
        total += sum(x.numel() * x.element_size() for x in parts)
    return total


def replies(attached: AttachedModel, count: int) -> list[Transcript]:
    """What the model says to the first scenes of the held-out set, each degraded and restored."""
    scenes = [sample_scene(9_000_000 + i, "heldout") for i in range(count)]
    questions = [ask(s, seed=i, n=1)[0].text for i, s in enumerate(scenes)]
    images = [degrade(render(s), draw(i), severity="high", seed=i) for i, s in enumerate(scenes)]
    found: list[Transcript] = []
    for at in range(0, count, 20):
        some = slice(at, at + 20)
        found += attached.engine.rollout(
            images[some], questions[some], seeds=list(range(count))[some], restore="always"
        )
    return found


def written(transcript: Transcript) -> TextSegment:
    """The last text of a transcript."""
    return [s for s in transcript if isinstance(s, TextSegment) and s.origin is Origin.SAMPLED][-1]


def measure(args: argparse.Namespace, kind: str | None, base: list[Transcript]) -> dict[str, Any]:
    """One kind against the full base's replies."""
    attached = attach(args.model, args.adapter, device=args.device, quantization=kind)
    found: dict[str, Any] = {"bytes": held(attached.backbone.model)}
    began = time.perf_counter()
    own = replies(attached, args.scenes)
    found["seconds"] = round(time.perf_counter() - began, 2)
    base += [] if base else own
    differences = []
    with torch.no_grad():
        for at in range(0, len(base), 20):
            part = base[at : at + 20]
            scored = attached.engine.replay(part, temperature=0)
            for transcript, logprobs in zip(part, scored.text_logprobs, strict=True):
                recorded = [s.logprobs for s in transcript if isinstance(s, TextSegment)]
                before = torch.cat([x for x in recorded if x is not None])
                differences.append((logprobs.cpu() - before.cpu()).abs())
    found["token_difference"] = float(torch.cat(differences).mean())
    found["same_answers"] = sum(written(a).text == written(b).text for a, b in zip(own, base, strict=True))
    latents = [
        [t.restorations[0].restoration.tokens.float().cpu() for t in given]  # type: ignore[union-attr]
        for given in (own, base)
    ]
    apart = torch.stack([(a - b).pow(2).mean() for a, b in zip(*latents, strict=True)])
    spread = torch.stack([b.var() for b in latents[1]])
    found["latent_error"] = float((apart / spread).mean())
    attached.detach()
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="builtin:bagel-tiny")
    parser.add_argument("--adapter", default="builtin:clear-bagel-tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenes", type=int, default=100)
    args = parser.parse_args(arguments)
    base: list[Transcript] = []
    kinds: dict[str, Any] = {}
    for kind in (None, *KINDS):
        kinds[kind or "full"] = measure(args, kind, base)
        print(kind or "full", kinds[kind or "full"], flush=True)
    payload = {"scenes": args.scenes, "model": args.model, "adapter": args.adapter, "kinds": kinds}
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    command = f"quantized.py --scenes {args.scenes}"
    result = ResultFile.collect(
        "quantized", payload, device=name, seeds=(0,), command=command, packages=("bitsandbytes",)
    )
    result.write(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
