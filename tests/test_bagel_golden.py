"""BAGEL against the authors' inference code (invariant 8): reference numbers of a random toy in the official layout.

The position tables are trimmed to the 4 x 4 corner that the case uses; everything else is as it was made.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clear_adapters.backbones import fast
from clear_adapters.backbones.bagel.autoencoder import decode_tokens
from clear_adapters.backbones.bagel.backbone import BagelBackbone
from clear_adapters.backbones.bagel.checkpoint import load_checkpoint
from clear_adapters.backbones.bagel.flow import flow_passes
from clear_adapters.backbones.bagel.images import to_patches
from clear_adapters.backbones.bagel.packing import Marks
from clear_adapters.backbones.base import Context, Restoration
from clear_adapters.backbones.packed import PreparedImage
from clear_adapters.backbones.writer import Writer
from clear_adapters.sampling import LatentSampling, TextSampling, flow_schedule, guide, sde_mean

FOLDER = Path(__file__).parent / "data" / "bagel"
CASE = json.loads((FOLDER / "case.json").read_text())
TOLERANCE = 1e-4  # float32 on a CPU; another order of summation moves the last digits (seen: 6e-6)


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module")
def backbone():
    model, autoencoder = load_checkpoint(FOLDER / "checkpoint", torch.float32, torch.device("cpu"))
    ids = CASE["special_ids"]
    marks = Marks(ids["bos_token_id"], ids["eos_token_id"], ids["start_of_image"], ids["end_of_image"])
    return BagelBackbone(model, autoencoder, None, marks)


@pytest.fixture(scope="module")
def image(expected, backbone):
    pixels = expected["in.vit_pixels"]
    patch = backbone.config.patch
    grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
    return PreparedImage(expected["in.vae_pixels"], to_patches(pixels, patch), grid)


@pytest.fixture(autouse=True)
def _plain_decoding(monkeypatch):
    monkeypatch.setattr(BagelBackbone, "decode_text", lambda self, ids: "")


def ids(name: str) -> list[torch.Tensor]:
    return [torch.tensor(CASE[name])]


def next_logits(backbone: BagelBackbone, context: Context) -> torch.Tensor:
    seen = []

    def step(*token):
        seen.append(backbone._token_step(*token))
        return seen[0]

    marks = (backbone.marks.start, backbone.marks.end)
    with torch.no_grad():
        Writer(step, context.fork(), TextSampling(max_new_tokens=1), range(context.rows), marks).advance()
    return seen[0]


def greedy(backbone: BagelBackbone, context: Context, n: int) -> list[int]:
    _, segments = backbone.write_text(context, TextSampling(max_new_tokens=n))
    return segments[0].ids.tolist()


@pytest.fixture(scope="module")
def contexts(backbone, image):
    """After system, image, question, thought; and the two guidance contexts."""
    system = backbone.read_text(backbone.start(1, [0]), ids("system_ids"))
    seen = backbone.read_image(system, [image])
    asked = backbone.read_text(seen, ids("question_ids"))
    thought = backbone.read_text(asked, ids("think_ids"))
    blind = backbone.read_text(backbone.read_text(system, ids("question_ids")), ids("think_ids"))
    return {"system": system, "image": seen, "question": asked, "think": thought, "no_image": blind}


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=TOLERANCE, rtol=0)


def test_autoencoder(backbone, image, expected):
    [latent] = backbone.encode_images([image])
    z = latent.latent.view(1, 4, 3, 2, 2, 16).permute(0, 5, 1, 3, 2, 4).reshape(16, 8, 6)
    close(z, expected["vae_latent"])
    close(
        decode_tokens(backbone.autoencoder, latent.latent, (4, 3), 2)[0], expected["vae_recon"].clamp(-1, 1)
    )


@pytest.mark.parametrize("stage", ["system", "image", "question"])
def test_text_logits(backbone, contexts, expected, stage):
    close(next_logits(backbone, contexts[stage])[0], expected[f"after_{stage}.next_logits"])


def test_greedy_text(backbone, contexts):
    assert greedy(backbone, contexts["question"], 8) == CASE["greedy_after_question"]


def velocities(backbone, contexts, expected, t):
    places = torch.tensor([[r * 4 + c for r in range(4) for c in range(3)]])
    valid = torch.ones(1, 12, dtype=torch.bool)
    x = expected["in.noise"][None]
    with torch.no_grad():
        own = [contexts[k] for k in ("think", "question", "no_image")]
        return flow_passes(backbone, own, places, valid, [14]).velocities(x, t, 3)


@pytest.mark.parametrize("on", [False, True], ids=["plain", "fast"])
def test_velocity_and_guidance(backbone, contexts, expected, on):
    with fast.switched(*fast.WAYS, on=on):
        plain, no_text, no_image = velocities(backbone, contexts, expected, 0.7)
    close(plain[0], expected["velocity_t0.7"])
    close(guide(plain, no_text, no_image, LatentSampling())[0], expected["velocity_t0.7_cfg4_2_global"])


def test_sde_mean(backbone, contexts, expected):
    times = flow_schedule(6, 3.0)
    plain = velocities(backbone, contexts, expected, 1.0)[0]
    mean = sde_mean(expected["in.noise"][None], plain, times[0], times[0] - times[1], 0.3)
    close(mean[0], expected["sde_first_mean_sigma0.3"])


def test_flow_sampler_and_reading_back(backbone, contexts, expected, monkeypatch):
    noise = expected["in.noise"]
    monkeypatch.setattr("clear_adapters.sampling.RowRandom.normal", lambda *a, **k: noise.reshape(1, -1))
    guidance = [contexts["question"], contexts["no_image"]]
    context, [restored] = backbone.restore(contexts["think"], LatentSampling(steps=6), guidance)
    close(restored.latent[0], expected["ode6_latent_tokens"])
    with torch.no_grad():
        places = torch.tensor([r * 4 + c for r in range(4) for c in range(3)])
        tokens = backbone.model.embed_latents(restored.latent[0], places, torch.zeros(1))
    close(tokens, expected["bridge_tokens"])
    after = backbone.read_restoration(context, [restored], None)
    close(next_logits(backbone, after)[0], expected["after_bridge.next_logits"])
    assert greedy(backbone, after, 8) == CASE["greedy_after_bridge"]


def test_uncached_forward_equals_the_cached_velocity_and_logits(backbone, image, expected):
    from clear_adapters.backbones.packed import ImagePiece, LatentPiece, TextPiece

    x = expected["in.noise"]
    row = [
        TextPiece(ids("system_ids")[0]),
        ImagePiece(image),
        TextPiece(ids("question_ids")[0]),
        TextPiece(ids("think_ids")[0]),
        LatentPiece(latent=x, grid=(4, 3), time=0.7, noised=True, scored=True, branch=1),
        LatentPiece(latent=expected["ode6_latent_tokens"], grid=(4, 3)),
        TextPiece(torch.tensor(CASE["greedy_after_bridge"]), scored=True),
    ]
    with torch.no_grad():
        out = backbone.forward(backbone.encode(backbone.pack([row, row[:-1]])))
    close(out.scored[:12], expected["velocity_t0.7"])
    close(out.scored[12:], expected["velocity_t0.7"])
    close(out.text_logits[0], expected["after_bridge.next_logits"])
    assert out.text_logits.argmax(-1).tolist() == CASE["greedy_after_bridge"]
    assert Restoration("flow", (4, 3), (64, 48), latent=x[None]).rows == 1
