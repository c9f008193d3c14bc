"""Stage 2: who sees whom, what is compared, and which latents are read."""

import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from clear_adapters import attach
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.backbones.base import Restoration
from clear_adapters.backbones.packed import ImagePiece, LatentPiece, ModelOutputs
from clear_adapters.datasets import read_examples
from clear_adapters.datasets.world import build as build_world
from clear_adapters.errors import ClearValueError
from clear_adapters.prompts import get_protocol
from clear_adapters.replay import pieces
from clear_adapters.sampling import LatentSampling, RowRandom, flow_schedule
from clear_adapters.training import bridge
from clear_adapters.training.bridge import BridgeObjective, BridgeSettings, _Pairs, align, own_latents
from clear_adapters.training.objective import Draw
from clear_adapters.training.rows import prepared
from clear_adapters.transcript import Origin, RestorationSegment, TextSegment

SAMPLING = LatentSampling(steps=3, shift=1.0, guidance_text=1.0, guidance_image=1.0)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    found = read_examples(
        build_world(tmp_path_factory.mktemp("world") / "data", 24, workers=1, progress=False)
    )
    # Every one of them is poor enough to be restored.
    return [replace(e, psnr=1.0) for e in found if e.degradation is not None][:8]


@pytest.fixture(scope="module")
def attached():
    made = attach(build(0))
    made.config = replace(made.config, protocol=get_protocol("tiny"))
    for number, (_, parameter) in enumerate(made.named_parameters()):
        # Trained in every part, so that nothing is zero by chance.
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data = parameter.detach().float() + 0.05 * drawn
        parameter.requires_grad_(True)
    return made


def objective(attached, **settings):
    traces = settings.pop(
        "traces", replace(BridgeSettings().traces, restore_below=1000.0, explore=0.0, declined=0.0)
    )
    made = BridgeSettings(
        **{"own": 0.0, "estimate": 0.0, "own_steps": 3, "vit_drop": 0.3, **settings}, traces=traces
    )
    return BridgeObjective(attached.backbone, get_protocol("tiny"), made, SAMPLING)


def batches(own, examples, size=None, seed=0):
    draws = [Draw(e, 0, seed + i) for i, e in enumerate(examples)]
    size = size or len(draws)
    rows = [own.collate(draws[i : i + size]) for i in range(0, len(draws), size)]
    with torch.no_grad():
        return own.prepare(rows)


def losses(own, attached, made):
    counts = torch.stack([b["counts"] for b in made]).sum(0)
    return [own.loss(attached.module, b, counts) for b in made]


def test_the_teacher_sees_no_student_and_nothing_sees_the_teacher(attached, examples):
    own = objective(attached)
    (made,) = batches(own, examples[:3])
    packed, (pairs,) = made["batch"], made["pairs"]
    assert len(pairs.teacher) == 3
    with torch.no_grad():
        before = attached.module(packed)
        moved = packed.latents + packed.latent_bridged[:, None].float()
        after = attached.module(replace(packed, latents=moved))
        for layer in own._layers:
            states = [o.hidden[layer].flatten(0, 1) for o in (before, after)]
            assert torch.equal(states[0][pairs.teacher], states[1][pairs.teacher])
            assert (states[0][pairs.student] - states[1][pairs.student]).abs().amax((1, 2)).min() > 1e-3
        alone = objective(attached, distill="none")
        (bare,) = batches(alone, examples[:3])
        assert bare["batch"].ids.shape[1] < packed.ids.shape[1]
        assert not bare["pairs"]
        assert torch.allclose(before.text_logits, attached.module(bare["batch"]).text_logits, atol=1e-5)


def test_teacher_and_student_stand_at_one_position(attached, examples):
    own = objective(attached)
    (made,) = batches(own, examples[:2])
    packed, (pairs,) = made["batch"], made["pairs"]
    positions = packed.positions.flatten()
    assert torch.equal(positions[pairs.teacher][:, 0], positions[pairs.student][:, 0])
    assert (packed.branch.flatten()[pairs.teacher] > 0).all()
    assert (packed.branch.flatten()[pairs.student] == 0).all()
    assert pairs.teacher.shape[1] == pairs.teacher_grid[0] * pairs.teacher_grid[1]
    assert pairs.student.shape[1] == pairs.student_grid[0] * pairs.student_grid[1]
    assert packed.latent_bridged.sum() == pairs.student.numel()


@pytest.mark.parametrize(
    ("distill", "centred"), [("per_layer_kl", False), ("per_layer_kl", True), ("final_mse", False)]
)
def test_the_distance_is_the_slow_one(attached, examples, distill, centred):
    own = objective(attached, distill=distill, centred=centred)
    made = batches(own, examples[:4], 2)
    found = sum(float(o["distill"].detach()) for o in losses(own, attached, made))
    expected, layers = 0.0, attached.backbone.layers
    with torch.no_grad():
        for b in made:
            hidden = attached.module(b["batch"]).hidden
            (pairs,) = b["pairs"]
            for teacher, student in zip(pairs.teacher, pairs.student, strict=True):
                for layer, states in hidden.items():
                    flat = states.flatten(0, 1)
                    (h, w), (a, c) = pairs.teacher_grid, pairs.student_grid
                    taught, seen = flat[teacher], flat[student]
                    if centred:
                        taught, seen = taught - taught.mean(0), seen - seen.mean(0)
                    grid = taught.view(h, w, -1)
                    cells = grid.view(a, h // a, c, w // c, -1).mean((1, 3)).flatten(0, 1)
                    if distill == "final_mse":
                        expected += float((cells.mean(0) - seen.mean(0)).pow(2).mean())
                        continue
                    p, q = cells.softmax(-1), seen.softmax(-1)
                    kl = float((p * (p / q).log()).sum(-1).mean())
                    expected += kl * (layer + 1) / (layers * (layers + 1) / 2)
    assert found == pytest.approx(expected / 4, rel=1e-3)
    assert found > 1e-4


def test_one_constant_for_all_tokens_brings_centred_states_no_closer(attached, examples):
    """What the bridge of the miniature model learnt from the distance as the paper has it, and what it drowned in."""
    moved = {}
    for centred in (False, True):
        own = objective(attached, centred=centred)
        (batch,) = batches(own, examples[:4])
        (pairs,) = batch["pairs"]
        with torch.no_grad():
            outputs = attached.module(batch["batch"])
            far = float(own._distance(outputs, pairs))
            for layer, states in outputs.hidden.items():
                flat = states.flatten(0, 1).clone()
                shift = flat[pairs.teacher].mean((0, 1)) - flat[pairs.student].mean((0, 1))
                flat[pairs.student.flatten()] += shift
                outputs.hidden[layer] = flat.view_as(states)
            moved[centred] = float(own._distance(outputs, pairs)) / far
    assert moved[True] == pytest.approx(1, abs=1e-4)
    assert moved[False] < 0.95


def test_states_are_averaged_over_cells():
    states = torch.arange(16.0).view(1, 16, 1)
    assert align(states, (4, 4), (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(align(states, (4, 4), (4, 4)), states)


def test_no_gradient_reaches_the_teacher(attached, examples):
    own = objective(attached, ce_weight=0.0)
    (made,) = batches(own, examples[:2])
    packed, (pairs,) = made["batch"], made["pairs"]
    outputs = attached.module(packed)
    for layer in own._layers:
        outputs.hidden[layer].retain_grad()
    own._distance(outputs, pairs).backward()
    last = own._layers[-1]
    gradient = outputs.hidden[last].grad.flatten(0, 1)
    assert gradient[pairs.student].abs().sum() > 0
    assert gradient[pairs.teacher].abs().sum() == 0
    attached.module.zero_grad()


def test_own_latents_are_what_the_engine_restores_and_do_not_depend_on_the_batch(attached, examples):
    own = objective(
        attached,
        own=1.0,
        traces=replace(BridgeSettings().traces, restore_below=1000.0, explore=0.0, always=1.0, declined=0.0),
        vit_drop=0.0,
    )
    rows = own.collate([Draw(e, 0, 5 + i) for i, e in enumerate(examples[:3])])["rows"]
    together = own_latents(attached.backbone, [r.transcript for r in rows], [r.seed for r in rows], SAMPLING)
    for row, found, example in zip(rows, together, examples, strict=False):
        (alone,) = own_latents(attached.backbone, [row.transcript], [row.seed], SAMPLING)
        assert torch.allclose(alone.latent, found.latent, atol=1e-4)
        # "always" writes the same forced request before it restores.
        (rolled,) = attached.engine.rollout(
            [example.load()], [example.question], seeds=[row.seed], restore="always", latent=SAMPLING
        )
        assert torch.allclose(rolled.restorations[0].restoration.latent, found.latent, atol=1e-4)
    assert not torch.allclose(together[0].latent, together[1].latent, atol=1e-2)


def test_own_latents_are_generated_in_portions(attached, examples, monkeypatch):
    counts = []
    real = bridge.own_latents

    def counted(backbone, transcripts, *more):
        counts.append(len(transcripts))
        return real(backbone, transcripts, *more)

    monkeypatch.setattr(bridge, "own_latents", counted)
    outs = []
    for rows in (None, 2):
        own = objective(attached, own=1.0, estimate=0.0, own_rows=rows)
        outs.append(losses(own, attached, batches(own, examples[:5])))
    whole, *parts = counts
    assert whole > 2
    assert parts == [2] * (whole // 2) + [whole % 2] * (whole % 2)
    assert float(outs[0][0]["loss"].detach()) == pytest.approx(float(outs[1][0]["loss"].detach()), abs=1e-4)


def test_rows_with_and_without_understanding_tokens_are_generated_together(attached, examples):
    own = objective(attached, own=1.0, vit_drop=0.5)
    rows = own.collate([Draw(e, 0, 40 + i) for i, e in enumerate(examples[:6])])["rows"]
    seen = [any(getattr(s, "understanding", False) for s in r.transcript) for r in rows]
    assert len(set(seen)) == 2
    together = own_latents(attached.backbone, [r.transcript for r in rows], [r.seed for r in rows], SAMPLING)
    for row, found in zip(rows, together, strict=True):
        (alone,) = own_latents(attached.backbone, [row.transcript], [row.seed], SAMPLING)
        assert torch.allclose(alone.latent, found.latent, atol=1e-4)


def test_the_teacher_of_an_own_latent_is_that_latent_decoded(attached, examples, monkeypatch):
    own = objective(attached, own=1.0)
    seen = []
    pack = type(attached.backbone).pack
    monkeypatch.setattr(
        type(attached.backbone),
        "pack",
        lambda self, rows, layers=(): seen.extend(rows) or pack(self, rows, layers),
    )
    batches(own, examples[:2])
    for row in seen:
        teacher, student = row[-3:-1]
        assert isinstance(teacher, ImagePiece)
        assert isinstance(student, LatentPiece)
        (image,) = attached.backbone.decode(
            Restoration("flow", student.grid, teacher.image.size, latent=student.latent[None])
        )
        apart = attached.backbone.prepare(image).pixels.int() - teacher.image.pixels.int()
        assert apart.abs().max() <= 1  # decoded alone and together
        assert (teacher.as_condition, teacher.watched + 1) == (False, student.watched)


def test_an_estimate_lets_the_answer_reach_the_velocity(attached, examples):
    """Only the time-dependent way out (`llm2vae`) tells the two apart: final latents use the rest of the expert too."""
    head = attached.backbone.model.llm2vae.weight
    head.requires_grad_(True)
    reached = {}
    for share in (0.0, 1.0):
        own = objective(attached, estimate=share, distill="none", mse_weight=0.0)
        made = batches(own, examples[:2])
        (out,) = losses(own, attached, made)
        assert (float(out["mse"].detach()) > 0) == (share > 0)
        (gradient,) = torch.autograd.grad(out["loss"], [head])
        reached[share] = float(gradient.abs().sum())
    head.requires_grad_(False)
    assert reached[0.0] == 0
    assert reached[1.0] > 0


def test_an_estimate_takes_the_place_of_the_final_latent(attached, examples):
    own = objective(attached, estimate=1.0, distill="none")
    (made,) = batches(own, examples[:2])
    packed = made["batch"]
    with torch.no_grad():
        changed, _ = own._estimate(attached.module, packed, made["counts"])
        velocity = attached.module(packed).scored
    at = packed.scored_at
    expected = packed.latents[at] - packed.latent_time[at][:, None] * velocity
    final = packed.latent_bridged.nonzero()[:, 0]
    assert len(final) == len(at)
    assert torch.allclose(changed.latents[final], expected, atol=1e-5)
    others = ~packed.latent_bridged
    assert torch.equal(changed.latents[others], packed.latents[others])


def test_shares_add_up_to_the_big_batch(attached, examples):
    own = objective(attached, own=0.3, estimate=0.3, mse_weight=0.5)
    parts = {}
    for size in (8, 2):
        out = losses(own, attached, batches(own, examples, size, seed=11))
        parts[size] = {n: sum(float(o[n].detach()) for o in out) for n in ("loss", "ce", "distill", "mse")}
    assert parts[2] == pytest.approx(parts[8], rel=1e-4)
    assert all(v > 0 for v in parts[8].values())


def test_rows_that_do_not_restore_are_read_as_in_stage_one(attached, examples):
    direct = [replace(e, clean_image=None, extra={}) for e in examples[:2]]
    own = objective(attached, own=0.5, estimate=0.3)
    (made,) = batches(own, direct)
    assert made["counts"][1:].tolist() == [0, 0]
    (out,) = losses(own, attached, [made])
    assert float(out["ce"].detach()) > 0
    assert (float(out["distill"].detach()), float(out["mse"].detach())) == (0, 0)


def test_every_weight_of_the_bridge_gets_a_gradient(attached, examples):
    own = objective(attached, own=0.5)
    (out,) = losses(own, attached, batches(own, examples))
    attached.module.zero_grad()
    out["loss"].backward()
    for name, parameter in attached.bridge.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    attached.module.zero_grad()


def test_training_the_bridge_brings_the_states_together(attached, examples):
    own = objective(attached, ce_weight=0.0, distill_weight=1.0)
    (made,) = batches(own, examples[:4])
    kept = [p.detach().clone() for p in attached.bridge.parameters()]
    optimizer = torch.optim.Adam(attached.bridge.parameters(), lr=3e-3)
    seen = []
    for _ in range(12):
        (out,) = losses(own, attached, [made])
        seen.append(float(out["distill"].detach()))
        attached.module.zero_grad()
        out["loss"].backward()
        optimizer.step()
    for parameter, before in zip(attached.bridge.parameters(), kept, strict=True):
        parameter.data = before
    assert seen[-1] < 0.9 * seen[0]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"own": 0.7, "estimate": 0.7}, "more than 1"),
        ({"own": -0.1}, "share"),
        ({"own_steps": 1}, "2 points"),
        ({"own_rows": 0}, "own_rows"),
        ({"distill": "final_mse", "centred": True}, "centring"),
        ({"layer_stride": 0}, "layer_stride"),
        ({"distill": "cosine"}, "final_mse"),
        ({"timestep_shift": 0}, "positive"),
        ({"distill_weight": -1}, "negative"),
    ],
)
def test_settings_that_cannot_work(settings, word):
    with pytest.raises(ClearValueError, match=word):
        BridgeSettings(**settings)


def test_only_the_first_of_several_restorations_would_be_own(attached, examples):
    reply = "<think>a</think>\n<image_restore>\n<think>b</think>\n<image_restore>\n<answer>c</answer>"
    recorded = replace(examples[0], reply=reply)
    own = objective(attached, own=1.0)
    (row,) = own.collate([Draw(recorded, 0, 0)])["rows"]
    assert sum(isinstance(s, RestorationSegment) for s in row.transcript) == 2
    assert row.source == "true"
    (made,) = batches(own, [recorded])
    assert made["counts"][1] == 2
    assert F.relu(losses(own, attached, [made])[0]["distill"]) > 0


def test_own_latents_are_those_of_the_layout_that_is_trained(attached, examples):
    """Flow steps by uncached forwards over the row's own pieces: asked for or requested, with and without ViT tokens."""
    traces = replace(BridgeSettings().traces, restore_below=1000.0, explore=0.0, declined=0.0, always=0.5)
    own, backbone, kinds = objective(attached, own=1.0, vit_drop=0.5, traces=traces), attached.backbone, set()
    rows = own.collate([Draw(e, 0, 70 + i) for i, e in enumerate(examples * 2)])["rows"]
    found = own_latents(backbone, [r.transcript for r in rows], [r.seed for r in rows], SAMPLING)
    for row, restoration in zip(rows, found, strict=True):
        built = pieces(
            row.transcript, prepare=prepared, encode_text=backbone.encode_text, end_id=backbone.end_id
        )
        [place] = [i for i, p in enumerate(built) if isinstance(p, LatentPiece)]
        x = (
            RowRandom(torch.tensor([row.seed]))
            .normal(restoration.latent.numel())
            .view_as(restoration.latent[0])
        )
        for t, after in pairwise(flow_schedule(SAMPLING.steps, SAMPLING.shift)):
            copy = LatentPiece(x, grid=restoration.grid, time=t, noised=True, scored=True, branch=1)
            packed = backbone.encode(backbone.pack([[*built[:place], copy]]))
            with torch.no_grad():
                x = x - (t - after) * attached.module(packed).scored
        assert torch.allclose(x, restoration.latent[0], atol=1e-4)
        request = [s for s in row.transcript if isinstance(s, TextSegment)][2]
        seen = next(p for p in built if isinstance(p, ImagePiece)).understanding
        kinds.add((request.origin, seen))
    assert kinds == {(o, s) for o in (Origin.SAMPLED, Origin.FORCED) for s in (True, False)}


def test_the_text_reads_the_own_latents_of_its_row_and_of_the_settings(attached, examples):
    own = objective(attached, own=1.0, own_steps=4)
    rows = own.collate([Draw(e, 0, i) for i, e in enumerate(examples[:3])])["rows"]
    packed = batches(own, examples[:3])[0]["batch"]
    sampling = replace(SAMPLING, steps=4)
    found = own_latents(attached.backbone, [r.transcript for r in rows], [r.seed for r in rows], sampling)
    expected = torch.cat([r.latent[0] for r in found])
    assert torch.allclose(packed.latents[packed.latent_bridged], expected, atol=1e-5)


def test_cells_keep_their_rows_and_columns():
    states = torch.arange(8.0).view(1, 8, 1)  # two rows of four
    assert align(states, (2, 4), (1, 2)).flatten().tolist() == [2.5, 4.5]
    assert align(states, (2, 4), (2, 2)).flatten().tolist() == [0.5, 2.5, 4.5, 6.5]


def test_every_teacher_token_weighs_the_same_in_the_mean(attached):
    """Also where the grids do not divide, as BAGEL's 37 x 37 and 32 x 32."""
    own = objective(attached, distill="final_mse")
    states = torch.randn(1, 25 + 16, 8, generator=torch.Generator().manual_seed(0))
    pairs = _Pairs(torch.arange(25)[None], torch.arange(25, 41)[None], (5, 5), (4, 4))
    outputs = ModelOutputs(torch.zeros(1, 1), torch.zeros(0, 1), {own._layers[-1]: states})
    expected = (states[0, :25].mean(0) - states[0, 25:].mean(0)).pow(2).mean()
    assert torch.allclose(own._distance(outputs, pairs), expected)


def test_an_estimate_has_no_teacher(attached, examples):
    (made,) = batches(objective(attached, estimate=1.0), examples[:3])
    assert (made["counts"][1], made["pairs"], made["batch"].watch_index) == (0, [], None)
    assert made["counts"][2] == len(made["batch"].scored_at) > 0


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 2)])
def test_every_batch_takes_the_same_forwards(attached, examples, share, expected):
    """Processes wait for each other in each: one whose batch has no estimate must not leave one out."""
    own = objective(attached, estimate=share)
    direct = [replace(e, clean_image=None, extra={}) for e in examples[:2]]
    for rows in (direct, examples[:4]):
        calls = []
        (made,) = batches(own, rows)
        own.loss(lambda b, seen=calls: seen.append(1) or attached.module(b), made, made["counts"])
        assert len(calls) == expected


def test_the_loss_reads_nothing_back_to_the_host(attached, examples):
    """Tensors without values: whatever asks for one, or for a size that depends on one, raises."""
    own = objective(attached, estimate=0.5, own=0.2, mse_weight=0.5)
    (made,) = batches(own, examples[:4])
    assert min(made["counts"].tolist()) > 0
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:

        def blank(held):
            moved = {
                k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in vars(held).items()
            }
            return type(held)(**moved)

        batch = {"batch": blank(made["batch"]), "pairs": [blank(p) for p in made["pairs"]]}
        out = own.loss(attached.module, batch, fake.from_tensor(made["counts"]))
    assert out["loss"].shape == ()


def test_what_a_spawned_worker_gets_holds_no_weights(attached, examples):
    own = objective(attached, own=0.5)
    sent = pickle.loads(pickle.dumps(own.collate))
    assert sent.__self__.backbone.model is None
    draws = [Draw(e, 0, i) for i, e in enumerate(examples[:4])]
    here, there = own.collate(draws)["rows"], sent(draws)["rows"]
    assert [(r.source, r.seed, r.time) for r in here] == [(r.source, r.seed, r.time) for r in there]


def test_layers_that_are_compared(attached, monkeypatch):
    monkeypatch.setattr(type(attached.backbone), "layers", property(lambda _: 6))
    found = {n: objective(attached, layer_stride=n)._layers for n in (1, 2, 5, 9)}
    assert found == {1: (0, 1, 2, 3, 4, 5), 2: (0, 2, 4, 5), 5: (0, 5), 9: (0, 5)}
    assert objective(attached, distill="final_mse")._layers == (5,)
    assert objective(attached, distill="none")._layers == ()
