"""Stage 3: rollouts, advantages, ratios, the reference, and the loss."""

import math
from dataclasses import replace

import pytest
import torch

from clear_adapters import attach
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.config import LoraSettings
from clear_adapters.datasets import read_examples
from clear_adapters.datasets.world import build as build_world
from clear_adapters.errors import ClearError, ClearValueError, UnknownNameError
from clear_adapters.prompts import get_protocol
from clear_adapters.sampling import LatentSampling, TextSampling
from clear_adapters.training.grpo import GrpoObjective, GrpoSettings
from clear_adapters.training.objective import Draw, row_seed
from clear_adapters.training.policy import advantages
from clear_adapters.transcript import Origin, TextSegment
from tests.scripted import ANSWER, ASK, Script

TEXT = TextSampling(max_new_tokens=6)
LATENT = LatentSampling(steps=4, shift=1.0)


def by_length(prompts, completions, **columns):
    """A reward that differs within a group."""
    return [float(sum(map(ord, c)) % 7) for c in completions]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return read_examples(
        build_world(tmp_path_factory.mktemp("world") / "data", 12, workers=1, progress=False)
    )


@pytest.fixture
def attached():
    made = attach(build(0))
    made.config = replace(made.config, protocol=get_protocol("tiny"))
    for number, (_, parameter) in enumerate(made.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data = parameter.detach().float() + 0.05 * drawn
        parameter.requires_grad_(True)
    return made


def clones(attached):
    return {n: p.detach().clone() for n, p in attached.named_parameters()}


def objective(attached, reference=None, **settings):
    given = {"group": 3, "flow_steps": 4, "rewards": {"length": {"weight": 1.0, "function": by_length}}}
    made = GrpoSettings(**{**given, **settings})
    return GrpoObjective(attached, made, clones(attached) if reference is None else reference, TEXT, LATENT)


def collated(own, examples, size=None, seed=0):
    draws = [Draw(e, 0, seed + i) for i, e in enumerate(examples)]
    size = size or len(draws)
    return [own.collate(draws[i : i + size]) for i in range(0, len(draws), size)]


def prepared(own, batches):
    with torch.no_grad():
        return own.prepare(batches)


def restoring(attached, monkeypatch, some=True):
    """Rollouts of which every second (or every) row restores; the toy would hardly ever ask for it."""
    engine = type(attached.engine)
    rollout = engine.rollout

    def forced(self, images, questions, *, seeds, group=1, **more):
        always = rollout(self, images, questions, seeds=seeds, group=group, restore="always", **more)
        auto = rollout(self, images, questions, seeds=seeds, group=group, **more)
        return [a if i % 2 or not some else b for i, (a, b) in enumerate(zip(always, auto, strict=True))]

    monkeypatch.setattr(engine, "rollout", forced)


def total(outs, name="loss"):
    return sum(float(o[name].detach()) for o in outs)


def losses(own, attached, made):
    counts = torch.stack([b["counts"] for b in made]).sum(0)
    return [own.loss(attached.module, b, counts) for b in made]


# --------------------------------------------------------------------------------------------------- advantages


def test_advantages():
    rewards = torch.tensor([[1.0, 3.0], [2.0, 2.0], [math.nan, math.nan]])
    scaled = advantages(rewards, "group")
    assert scaled[0].tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)], abs=1e-3)
    assert scaled[1:].tolist() == [[0, 0], [0, 0]]
    assert advantages(rewards, "none")[0].tolist() == [-1, 1]
    # In float32 the mean of these is not one of them.
    uneven = torch.tensor([[0.9] * 8, [0.1] * 7 + [math.nan]])
    assert (uneven[0].sum() / 8 != uneven[0, 0]) or (uneven[1].nansum() / 7 != uneven[1, 0])
    for scale in ("group", "none"):
        assert advantages(uneven, scale).abs().max() == 0
    partly = advantages(torch.tensor([[1.0, math.nan, 3.0]]), "none")
    assert partly.tolist() == [[-1, 0, 1]]


# -------------------------------------------------------------------------------------------- ratios, reference


@pytest.mark.parametrize("latent_from", ["own", "reencode"])
def test_before_a_step_every_ratio_is_one(attached, examples, monkeypatch, latent_from):
    restoring(attached, monkeypatch)
    own = objective(attached, latent_from=latent_from, scored_steps=2)
    made = prepared(own, collated(own, examples[:4], 2))
    for batch in made:
        text, flow = own._logprobs(attached.module(batch["batch"]), batch["batch"], batch["targets"])
        assert len(text) == len(batch["text_old"]) > 0
        assert (text - batch["text_old"]).abs().max() < 1e-4
        assert len(flow) == len(batch["targets"].recorded) > 0
        assert (flow - batch["targets"].recorded).abs().max() < 1e-4
        assert torch.allclose(text, batch["text_reference"], atol=1e-5)
        assert torch.allclose(flow, batch["flow_reference"], atol=1e-5)
    outs = losses(own, attached, made)
    assert total(outs, "ratio") < 1e-4
    assert abs(total(outs, "kl")) < 1e-6
    assert total(outs, "clipped") == 0


def test_a_dropout_of_the_adapter_does_not_part_policy_and_rollout(examples, monkeypatch):
    made = attach(build(0), lora=LoraSettings({"understanding": 2, "generation": 2}, dropout=0.3))
    made.config = replace(made.config, protocol=get_protocol("tiny"))
    for _, parameter in made.named_parameters():
        parameter.data = parameter.detach().float() + 0.05
    restoring(made, monkeypatch)
    own = objective(made)
    batches = prepared(own, collated(own, examples[:2]))
    made.module.train()
    assert total(losses(own, made, batches), "ratio") < 1e-4


def test_the_reference_is_the_adapter_that_the_run_began_with(attached, examples, monkeypatch):
    restoring(attached, monkeypatch)
    reference = clones(attached)
    own = objective(attached, reference={n: t.clone() for n, t in reference.items()})
    for _, parameter in attached.named_parameters():
        parameter.data = parameter.detach() * 1.5
    trained = clones(attached)
    (batch,) = prepared(own, collated(own, examples[:3]))
    assert all(torch.equal(p, trained[n]) for n, p in attached.named_parameters())
    assert all(torch.equal(own.reference[n], reference[n]) for n in reference)
    (out,) = losses(own, attached, [batch])
    assert float(out["kl"].detach()) > 1e-5
    assert float(out["flow_kl"].detach()) > 0
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            parameter.copy_(reference[name])
        text, flow = own._logprobs(attached.module(batch["batch"]), batch["batch"], batch["targets"])
    assert torch.allclose(text, batch["text_reference"], atol=1e-5)
    assert torch.allclose(flow, batch["flow_reference"], atol=1e-5)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            parameter.copy_(trained[name])


def test_parameters_stay_the_same_objects(attached, examples):
    before = {n: id(p) for n, p in attached.named_parameters()}
    own = objective(attached)
    prepared(own, collated(own, examples[:1]))
    assert {n: id(p) for n, p in attached.named_parameters()} == before


def test_a_reference_that_lacks_something_is_refused(attached):
    reference = clones(attached)
    name = next(iter(reference))
    del reference[name]
    with pytest.raises(ClearValueError, match="lacks"):
        objective(attached, reference=reference)


# --------------------------------------------------------------------------------------------------------- loss


def by_hand(own, batch, module, reduction):
    """The loss, one rollout at a time."""
    settings = own.settings
    held = own._held
    with torch.no_grad():
        text, flow = own._logprobs(module(batch["batch"]), batch["batch"], batch["targets"])
    policy, kl, flow_policy, tokens, rows, restored = 0.0, 0.0, 0.0, 0, 0, 0
    texts = text.split([int((batch["batch"].text_row == i).sum()) for i in range(len(held.transcripts))])
    flows = flow.split(batch["targets"].per_row)
    at = step_at = 0
    for i, (new, steps) in enumerate(zip(texts, flows, strict=True)):
        old = batch["text_old"][at : at + len(new)]
        reference = batch["text_reference"][at : at + len(new)]
        at += len(new)
        advantage = float(held.text_advantage[i])
        ratio = (new - old).exp()
        terms = -torch.minimum(
            ratio * advantage, ratio.clamp(1 - settings.clip, 1 + settings.clip) * advantage
        )
        d = reference - new
        k3 = d.exp() - d - 1
        share = len(new) if reduction == "grpo" else 1
        policy += float(terms.sum()) / share
        kl += float(k3.sum()) / share
        tokens += len(new)
        rows += 1
        if len(steps):
            recorded = batch["targets"].recorded[step_at : step_at + len(steps)]
            step_at += len(steps)
            r = (steps - recorded).exp()
            c = r.clamp(1 - settings.latent_clip, 1 + settings.latent_clip)
            flow_policy += float(-torch.minimum(r * advantage, c * advantage).mean())
            restored += 1
    divide = {"grpo": rows, "bnpo": tokens, "dr_grpo": rows * TEXT.max_new_tokens}[reduction]
    return policy / divide, kl / divide, flow_policy / max(1, restored)


@pytest.mark.parametrize("reduction", ["grpo", "bnpo", "dr_grpo"])
def test_the_loss_is_the_slow_one(attached, examples, monkeypatch, reduction):
    restoring(attached, monkeypatch)
    own = objective(attached, reduction=reduction, clip=0.05, latent_clip=0.0005, scored_steps=2, beta=0.1)
    (batch,) = prepared(own, collated(own, examples[:4]))
    for number, (_, parameter) in enumerate(attached.named_parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 + number))
        parameter.data = parameter.detach() + 0.05 * noise
    (out,) = losses(own, attached, [batch])
    policy, kl, flow = by_hand(own, batch, attached.module, reduction)
    assert float(out["clipped"].detach()) > 0
    assert float(out["policy"].detach()) == pytest.approx(policy, rel=1e-3, abs=1e-6)
    assert float(out["kl"].detach()) == pytest.approx(kl, rel=1e-3)
    assert float(out["flow"].detach()) == pytest.approx(flow, rel=1e-3, abs=1e-6)
    expected = policy + 0.1 * kl + 0.3 * (flow + 0.1 * float(out["flow_kl"].detach()))
    assert float(out["loss"].detach()) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_accumulation_equals_the_big_batch(attached, examples, monkeypatch):
    restoring(attached, monkeypatch)
    gradients = []
    for size in (4, 1):
        own = objective(attached, reduction="grpo")
        attached.module.zero_grad()
        for out in losses(own, attached, prepared(own, collated(own, examples[:4], size))):
            out["loss"].backward()
        gradients.append({n: p.grad.clone() for n, p in attached.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5, rtol=1e-3), name
    assert any(g.abs().max() > 1e-4 for g in gradients[0].values())


def test_every_part_of_the_adapter_gets_a_gradient(attached, examples, monkeypatch):
    restoring(attached, monkeypatch)
    own = objective(attached)
    attached.module.zero_grad()
    (out,) = losses(own, attached, prepared(own, collated(own, examples[:4])))
    out["loss"].backward()
    for name, parameter in attached.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_step_makes_what_was_rewarded_likelier(attached, examples):
    own = objective(attached, beta=0.0, rewards={"length": {"weight": 1.0, "function": by_length}})
    (batch,) = prepared(own, collated(own, examples[:3]))
    optimizer = torch.optim.SGD([p for _, p in attached.named_parameters()], lr=0.5)
    (out,) = losses(own, attached, [batch])
    out["loss"].backward()
    optimizer.step()
    with torch.no_grad():
        text, _ = own._logprobs(attached.module(batch["batch"]), batch["batch"], batch["targets"])
    gain = (
        (text - batch["text_old"]) * batch["text_advantage"][batch["batch"].text_row] * batch["text_weight"]
    )
    assert gain.sum() > 0


# ----------------------------------------------------------------------------------------------------- rollouts


def test_rollouts_depend_on_the_draw_alone(attached, examples):
    whole = objective(attached)
    prepared(whole, collated(whole, examples[:3]))
    single = objective(attached, rollout_rows=3)
    prepared(single, collated(single, examples[:3], 1))
    said = [[t.reply for t in o._held.transcripts] for o in (whole, single)]
    assert said[0] == said[1]
    assert len(set(said[0])) > 3
    other = objective(attached)
    prepared(other, collated(other, examples[:3], seed=50))
    assert [t.reply for t in other._held.transcripts] != said[0]


def test_rollouts_are_kept_for_the_same_draws(attached, examples):
    own = objective(attached, iterations=2)
    (first,) = prepared(own, collated(own, examples[:2]))
    held = own._held
    for _, parameter in attached.named_parameters():
        parameter.data = parameter.detach() * 1.1
    (second,) = prepared(own, collated(own, examples[:2]))
    assert own._held is held
    assert torch.equal(first["text_old"], second["text_old"])
    prepared(own, collated(own, examples[:2], seed=7))
    assert own._held is not held


@pytest.mark.parametrize("choice", ["random", "round_robin", "window"])
def test_the_choice_of_steps(attached, examples, monkeypatch, choice):
    restoring(attached, monkeypatch, some=False)
    own = objective(attached, step_choice=choice, flow_steps=6, scored_steps=2, group=5)
    prepared(own, collated(own, examples[:2]))
    held = own._held
    assert held.members == [*range(5), *range(5)]
    rows = zip([held.key[0]] * 5 + [held.key[1]] * 5, held.members, held.transcripts, strict=True)
    seen = [own._steps(*row)[0] for row in rows]
    assert all(len(set(s)) == 2 and min(s) >= 0 and max(s) < 5 for s in seen)
    if choice == "window":
        assert all(s[1] == s[0] + 1 for s in seen)
    if choice == "round_robin":
        counts = [sum(k in s for s in seen[:5]) for k in range(5)]
        assert counts == [2] * 5
    assert len({tuple(s) for s in seen}) > 2


# ------------------------------------------------------------------------------------------------ odd completions


def test_equal_rewards_move_nothing(attached, examples):
    same = lambda prompts, completions, **columns: [0.5] * len(completions)  # noqa: E731
    own = objective(attached, beta=0.0, rewards={"same": {"weight": 1.0, "function": same}})
    made = prepared(own, collated(own, examples[:2]))
    attached.module.zero_grad()
    (out,) = losses(own, attached, made)
    out["loss"].backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for _, p in attached.named_parameters())
    assert own.facts()["equal"] == (2.0, 2)


def test_an_unscored_group_takes_no_part(attached, examples):
    def first_only(prompts, completions, **columns):
        return [None if i < 3 else float(i) for i in range(len(completions))]

    own = objective(attached, rewards={"some": {"weight": 1.0, "function": first_only}})
    (batch,) = prepared(own, collated(own, examples[:2]))
    rows = batch["batch"].text_row
    assert batch["text_weight"][rows < 3].abs().max() == 0
    assert batch["text_weight"][rows >= 3].min() > 0
    assert batch["counts"][0] == 3
    assert own.facts()["unscored"] == (1.0, 2)


def test_a_batch_without_any_reward_is_a_zero_that_hangs_on_the_graph(attached, examples):
    none = lambda prompts, completions, **columns: [None] * len(completions)  # noqa: E731
    own = objective(attached, rewards={"none": {"weight": 1.0, "function": none}})
    made = prepared(own, collated(own, examples[:2]))
    (out,) = losses(own, attached, made)
    assert float(out["loss"].detach()) == 0
    out["loss"].backward()
    assert "reward/total" in own.facts()


def test_empty_and_unclosed_completions_are_scored(attached, examples, monkeypatch):
    engine = type(attached.engine)
    rollout = engine.rollout
    end = attached.backbone.end_id

    def odd(self, *args, **more):
        found = rollout(self, *args, **more)
        for transcript in found[::2]:
            # Only the end token was written.
            place = next(i for i, s in enumerate(transcript.segments) if s.origin is Origin.SAMPLED)
            empty = TextSegment(torch.tensor([end]), Origin.SAMPLED, "", torch.tensor([-3.0]))
            transcript.segments = [*transcript.segments[:place], empty]
        return found

    monkeypatch.setattr(engine, "rollout", odd)
    own = objective(attached, group=2, rewards={"accuracy": 1.0, "format": 0.1})
    (batch,) = prepared(own, collated(own, examples[:2]))
    assert batch["batch"].text_row.bincount(minlength=4)[[0, 2]].tolist() == [1, 1]
    assert all(math.isfinite(float(v.detach())) for v in losses(own, attached, [batch])[0].values())


def test_a_request_past_the_limit_is_answered_and_scored(attached, examples, monkeypatch):
    """The model asks three times; two are granted, and the sentence that the engine writes then is no one's doing."""
    seeds = [row_seed(0, f"rollout {g}", 0) for g in range(2)]
    script = Script(attached.backbone, {seeds[0]: [ASK, ASK, ASK, ANSWER], seeds[1]: [ANSWER]})
    monkeypatch.setattr("clear_adapters.backbones.writer.choose_token", script)
    own = GrpoObjective(
        attached,
        GrpoSettings(group=2, flow_steps=4, rewards={"accuracy": 1.0, "format": 0.1}),
        clones(attached),
        TextSampling(max_new_tokens=80),
        LATENT,
    )
    (batch,) = prepared(own, collated(own, examples[:1]))
    first, second = own._held.transcripts
    assert (len(first.restorations), len(second.restorations)) == (2, 0)
    forced = [s for s in first if isinstance(s, TextSegment) and s.origin is Origin.FORCED]
    assert len(forced) == 1
    assert batch["targets"].per_row == [2, 0]
    sampled = sum(len(s.ids) for s in first if isinstance(s, TextSegment) and s.origin is Origin.SAMPLED)
    assert int((batch["batch"].text_row == 0).sum()) == sampled
    text, flow = own._logprobs(attached.module(batch["batch"]), batch["batch"], batch["targets"])
    assert (text - batch["text_old"]).abs().max() < 1e-4
    assert (flow - batch["targets"].recorded).abs().max() < 1e-4


def test_a_reward_that_fails_ends_the_run(attached, examples):
    def broken(prompts, completions, **columns):
        raise ClearError("the judge is out")

    own = objective(attached, rewards={"broken": {"weight": 1.0, "function": broken}})
    with pytest.raises(ClearError, match="the judge is out"):
        prepared(own, collated(own, examples[:1]))


# ------------------------------------------------------------------------------------------ columns and settings


@pytest.mark.parametrize("mode", ["vae", "vit", "both"])
def test_latent_quality_gets_its_columns(attached, examples, monkeypatch, mode):
    restoring(attached, monkeypatch)
    terms = {
        "length": {"weight": 1.0, "function": by_length},
        "latent_quality": {"weight": 0.5, "settings": {"mode": mode}, "absent": "neutral"},
    }
    own = objective(attached, group=4, rewards=terms, advantage="separate")
    (batch,) = prepared(own, collated(own, examples[:3]))
    total, count = own.facts()["reward/latent_quality"]
    assert 0 < total / count <= 1
    assert count == sum(bool(t.restorations) for t in own._held.transcripts) > 0
    assert not torch.equal(batch["text_advantage"], batch["flow_advantage"])
    without = [not t.restorations for t in own._held.transcripts]
    assert batch["flow_advantage"][torch.tensor(without)].abs().sum() == 0


def test_facts_are_means_that_begin_anew(attached, examples):
    own = objective(attached, rewards={"accuracy": 0.75, "format": 0.1, "decision": 0.15})
    prepared(own, collated(own, examples[:2]))
    facts = own.facts()
    assert set(facts) == {
        *("reward/accuracy", "reward/format", "reward/decision", "reward/total"),
        *("restored", "tokens", "unscored", "equal"),
    }
    assert facts["tokens"][1] == 6
    assert facts["tokens"][0] == sum(
        len(s.ids)
        for t in own._held.transcripts
        for s in t
        if isinstance(s, TextSegment) and s.origin is Origin.SAMPLED
    )
    assert own.facts() == {}


@pytest.mark.parametrize(
    ("settings", "error", "word"),
    [
        ({"group": 1}, ClearValueError, "at least 2"),
        ({"flow_steps": 4, "scored_steps": 4}, ClearValueError, "3 steps"),
        ({"clip": 0.0}, ClearValueError, "positive"),
        ({"beta": -1.0}, ClearValueError, "negative"),
        ({"rollout_rows": 2}, ClearValueError, "must fit"),
        ({"rewards": {"acuracy": 1.0}}, UnknownNameError, "accuracy"),
        ({"advantage": "separate"}, ClearValueError, "latent_quality"),
    ],
)
def test_settings_that_cannot_work(settings, error, word):
    with pytest.raises(error, match=word):
        GrpoSettings(**settings)
