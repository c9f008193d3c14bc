"""Replay says what the rollout recorded (invariant 4), and `pieces` lays out recorded transcripts as training needs them."""

import copy
import dataclasses

import pytest
import torch

from clear_adapters.backbones import writer as bagel
from clear_adapters.backbones.base import Restoration
from clear_adapters.backbones.packed import ImagePiece, LatentPiece, ModelOutputs, TextPiece
from clear_adapters.bridge import BridgeConfig, LatentBridge
from clear_adapters.engine import Engine
from clear_adapters.errors import ClearValueError
from clear_adapters.replay import pieces, replay, restoration_targets
from clear_adapters.sampling import LatentSampling, TextSampling
from clear_adapters.transcript import ImageSegment, Origin, RestorationSegment, TextSegment, Transcript
from tests.scripted import ANSWER, ASK, SDE, Script, make_engine, picture, toy

TOLERANCE = 1e-4
TEMPERATURE = 0.8
TEXT = TextSampling(max_new_tokens=80, temperature=TEMPERATURE)
TURNS = {
    1: [[4, ASK], [9, ANSWER]],
    2: [[2, ANSWER]],
    3: [[5, ASK], [1, ASK], [3, ANSWER]],
    4: [[80]],
    5: [[1, ASK], [1, ASK], [2, ASK], [3, ANSWER]],
    6: [[ASK, 20]],
}
SEEDS = [1, 2, 3, 4, 5]
IMAGES = [picture(i, size) for i, size in enumerate([(64, 48), (40, 64), (64, 64), (33, 50), (64, 48)])]
QUESTIONS = ["What?", "Which colour is it?", "Who?", "How many are there, and where?", "é?"]


@pytest.fixture
def backbone():
    return toy()


@pytest.fixture
def bridge(backbone):
    torch.manual_seed(0)
    own = LatentBridge(BridgeConfig(backbone.latent_width, backbone.width))
    torch.nn.init.normal_(own.up.weight, std=0.2)
    return own.eval()


@pytest.fixture(autouse=True)
def _script(monkeypatch):
    monkeypatch.setattr(bagel, "choose_token", Script(toy(), TURNS))


def engine(backbone, bridge=None, **changes) -> Engine:
    return make_engine(backbone, bridge=bridge, **({"text": TEXT, "latent": SDE} | changes))


def recorded_text(t: Transcript) -> torch.Tensor:
    return torch.cat([s.logprobs for s in t if isinstance(s, TextSegment) and s.origin is Origin.SAMPLED])


def recorded_latent(t: Transcript) -> torch.Tensor:
    traces = [s.restoration.trace for s in t.restorations if s.origin is Origin.SAMPLED]
    return torch.cat([torch.zeros(0), *(trace.logprobs[0] for trace in traces if trace is not None)])


def agree(own, transcripts) -> None:
    with torch.no_grad():
        found = own.replay(transcripts)
    for t, text, latent in zip(transcripts, found.text_logprobs, found.latent_logprobs, strict=True):
        torch.testing.assert_close(text, recorded_text(t), atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(latent, recorded_latent(t), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("restore", ["auto", "always", "never"])
def test_replay_equals_the_rollout(backbone, bridge, restore):
    own = engine(backbone, bridge)
    transcripts = own.rollout(IMAGES, QUESTIONS, seeds=SEEDS, restore=restore)
    agree(own, transcripts)
    counts = [len(t.restorations) for t in transcripts]
    assert counts == {"auto": [1, 0, 2, 0, 2], "always": [2, 1, 2, 1, 2], "never": [0] * 5}[restore]
    for t in transcripts:  # and row by row
        agree(own, [t])


def test_replay_after_a_change_of_weights(backbone, bridge):
    """As an adapter changes them: every adapted weight moves, in both experts."""
    generator = torch.Generator().manual_seed(1)
    modules = dict(backbone.model.named_modules())
    for name in backbone.lora_names(["understanding", "generation"]):
        weight = modules[name].weight
        low = torch.randn(weight.shape[0], 2, generator=generator) @ torch.randn(
            2, weight.shape[1], generator=generator
        )
        weight.data += 0.05 * low
    own = engine(backbone, bridge)
    transcripts = own.rollout(IMAGES, QUESTIONS, seeds=SEEDS)
    agree(own, transcripts)
    other = engine(toy(), bridge).replay(transcripts)
    assert any(
        (a - recorded_text(t)).abs().max() > 1e-2
        for a, t in zip(other.text_logprobs, transcripts, strict=True)
    )
    assert any(
        len(a) and (a - recorded_latent(t)).abs().max() > 1e-3
        for a, t in zip(other.latent_logprobs, transcripts, strict=True)
    )


@pytest.mark.parametrize("latent_from", ["degraded", "clean", "reencode"])
def test_controls_replay(backbone, bridge, latent_from):
    own = engine(backbone, bridge)
    clean = [picture(20 + i, image.size) for i, image in enumerate(IMAGES)]
    transcripts = own.rollout(IMAGES, QUESTIONS, seeds=SEEDS, latent_from=latent_from, clean_images=clean)
    agree(own, transcripts)
    scored = [len(x) for x in own.replay(transcripts).latent_logprobs]
    assert scored == ([4, 0, 8, 0, 8] if latent_from == "reencode" else [0] * 5)


def test_greedy_groups_and_the_sum_over_dimensions(backbone, bridge):
    latent = dataclasses.replace(SDE, logprob="sum")
    greedy = dataclasses.replace(TEXT, temperature=0.0)
    own = engine(backbone, bridge, text=greedy, latent=latent)
    transcripts = own.rollout(IMAGES[:2], QUESTIONS[:2], seeds=SEEDS[:4], group=2)
    with torch.no_grad():
        found = own.replay(transcripts)
    for t, text, steps in zip(transcripts, found.text_logprobs, found.latent_logprobs, strict=True):
        torch.testing.assert_close(text, recorded_text(t), atol=TOLERANCE, rtol=0)
        # Within the tolerance for each of the N x C dimensions that the sum runs over.
        size = IMAGES[0].size[0] * IMAGES[0].size[1] // 256 * backbone.latent_width
        torch.testing.assert_close(steps / size, recorded_latent(t) / size, atol=TOLERANCE, rtol=0)


def test_a_turn_that_was_cut_off_is_closed(backbone, bridge):
    """The limit falls behind a request: the block is closed unscored, and what follows stands behind that."""
    own = engine(backbone, bridge, text=dataclasses.replace(TEXT, max_new_tokens=len(ASK) + 4))
    transcripts = own.rollout(IMAGES[:2], QUESTIONS[:2], seeds=[6, 2])
    cut = transcripts[0].segments[3]
    assert len(cut.ids) == len(cut.logprobs) == len(ASK) + 4
    assert cut.ids[-1] != backbone.end_id
    assert len(transcripts[0].restorations) == 1
    agree(own, transcripts)


def test_without_the_bridge_or_at_another_temperature_it_differs(backbone, bridge):
    own = engine(backbone, bridge)
    transcripts = own.rollout(IMAGES, QUESTIONS, seeds=SEEDS)
    bare = replay(backbone, None, transcripts, temperature=TEMPERATURE)
    first = len(transcripts[0].segments[3].ids)
    difference = (bare.text_logprobs[0] - recorded_text(transcripts[0])).abs()
    assert difference[:first].max() < TOLERANCE
    assert difference[first:].max() > 1e-2
    hot = own.replay(transcripts, temperature=2.0)
    assert (hot.text_logprobs[0] - recorded_text(transcripts[0])).abs().max() > 1e-2


def test_nothing_later_sees_a_noised_copy(backbone, bridge):
    own = engine(backbone, bridge)
    transcripts = own.rollout(IMAGES[2], QUESTIONS[2], seeds=[3])
    changed = copy.deepcopy(transcripts)
    for s in changed[0].restorations:
        s.restoration.trace.x += 5
    a, b = own.replay(transcripts), own.replay(changed)
    assert torch.equal(a.text_logprobs[0], b.text_logprobs[0])
    assert (a.latent_logprobs[0] - b.latent_logprobs[0]).abs().max() > 1e-3


def test_chosen_steps(backbone, bridge):
    own = engine(backbone, bridge)
    transcripts = own.rollout(IMAGES[1:3], QUESTIONS[1:3], seeds=[2, 3])
    whole = own.replay(transcripts)
    some = own.replay(transcripts, steps=[[], [[2], [3, 0]]])
    assert len(some.latent_logprobs[0]) == 0
    torch.testing.assert_close(
        some.latent_logprobs[1], whole.latent_logprobs[1][[2, 7, 4]], atol=1e-5, rtol=0
    )
    assert some.batch.ids.shape[1] < whole.batch.ids.shape[1]
    none = own.replay(transcripts, steps=[[], []])
    assert len(none.latent_logprobs[1]) == 0


def test_gradients_and_hidden_states(backbone, bridge):
    own = engine(backbone, bridge)
    transcripts = own.rollout(IMAGES[:2], QUESTIONS[:2], seeds=[1, 2])
    before = torch.random.get_rng_state()
    found = own.replay(transcripts, with_hidden=(0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert set(found.hidden) == {0, 1}
    assert found.hidden[1].shape == (*found.batch.ids.shape, backbone.width)
    assert own.replay(transcripts).hidden is None
    (sum(x.sum() for x in found.text_logprobs) + found.latent_logprobs[0].sum()).backward()
    modules = dict(backbone.model.named_modules())
    assert all(
        modules[n].weight.grad is not None for n in backbone.lora_names(["understanding", "generation"])
    )
    assert bridge.up.weight.grad.abs().max() > 0


def test_a_picture_of_several_transcripts_is_prepared_and_encoded_once(backbone, bridge, monkeypatch):
    own = engine(backbone, bridge)
    transcripts = own.rollout(IMAGES[:2], QUESTIONS[:2], seeds=SEEDS[:4], group=2)
    apart = [
        Transcript(
            [dataclasses.replace(s, image=s.image.copy()) if isinstance(s, ImageSegment) else s for s in t]
        )
        for t in transcripts
    ]
    made, prepare = [], backbone.prepare
    monkeypatch.setattr(backbone, "prepare", lambda image: made.append(image) or prepare(image))
    shared, counts = own.replay(transcripts), [len(made)]
    single = own.replay(apart)
    assert [*counts, len(made)] == [2, 2 + 4]
    assert (len(shared.batch.patches), len(single.batch.patches)) == (2, 4)
    for a, b in zip(
        shared.text_logprobs + shared.latent_logprobs,
        single.text_logprobs + single.latent_logprobs,
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_replay_errors(backbone):
    own = engine(backbone)
    transcripts = own.rollout(IMAGES[1], QUESTIONS[1], seeds=[2])
    with pytest.raises(ClearValueError, match="at least one"):
        own.replay([])
    with pytest.raises(ClearValueError, match="steps has 2 entries for 1"):
        own.replay(transcripts, steps=[[], []])
    with pytest.raises(ClearValueError, match="temperature"):
        own.replay(transcripts, temperature=-1)


# ------------------------------------------------------------------------------------------ recorded transcripts


def text(backbone, words: str, origin: Origin) -> TextSegment:
    ids = backbone.encode_text(words)
    if origin is Origin.SAMPLED:
        ids = torch.cat((ids, torch.tensor([backbone.end_id])))
    return TextSegment(ids, origin, words)


def recorded(backbone) -> Transcript:
    return Transcript(
        [
            text(backbone, "Look.", Origin.PROMPT),
            ImageSegment(IMAGES[0], understanding=False),
            text(backbone, "What?", Origin.PROMPT),
            text(backbone, ASK, Origin.SAMPLED),
            RestorationSegment(target=picture(9, (64, 48))),
            text(backbone, ASK, Origin.FORCED),
            RestorationSegment(target=picture(8, (64, 48))),
            text(backbone, ANSWER, Origin.SAMPLED),
        ]
    )


def test_pieces_of_a_recorded_transcript(backbone):
    found = pieces(recorded(backbone), prepare=backbone.prepare, times=[0.25, 0.75])
    shape = [(type(p).__name__[:-5], p.branch) for p in found]
    assert shape == [
        *[("Text", 0), ("Image", 0), ("Text", 0), ("Text", 0)],
        *[("Latent", 1), ("Latent", 0), ("Text", 0), ("Latent", 2), ("Latent", 0), ("Text", 0)],
    ]
    assert [p.scored for p in found if isinstance(p, TextPiece)] == [False, False, True, False, True]
    image = found[1]
    assert isinstance(image, ImagePiece)
    assert (image.as_condition, image.understanding) == (True, False)
    latents = [p for p in found if isinstance(p, LatentPiece)]
    assert [(p.time, p.scored, p.bridged, p.noised) for p in latents] == [
        (0.25, True, False, False),
        (0.0, False, True, False),
        (0.75, True, False, False),
        (0.0, False, True, False),
    ]
    assert latents[0].image is latents[1].image  # so that it is encoded once
    assert not any(
        p.scored for p in pieces(recorded(backbone), prepare=backbone.prepare) if isinstance(p, LatentPiece)
    )


def test_recorded_text_without_ids_is_encoded(backbone):
    bare = Transcript(
        [
            dataclasses.replace(s, ids=torch.zeros(0, dtype=torch.int64)) if isinstance(s, TextSegment) else s
            for s in recorded(backbone)
        ]
    )
    made = pieces(bare, prepare=backbone.prepare, encode_text=backbone.encode_text, end_id=backbone.end_id)
    given = pieces(recorded(backbone), prepare=backbone.prepare)
    for a, b in zip(made, given, strict=True):
        if isinstance(a, TextPiece):
            assert a.ids.tolist() == b.ids.tolist()
    with pytest.raises(ClearValueError, match="encode_text"):
        pieces(bare, prepare=backbone.prepare)


def test_what_is_trained_is_what_is_sampled(backbone, bridge):
    """A clean picture's latent that a control put in gives the text the same scores as the recorded clean picture."""
    own = engine(backbone, bridge)
    clean = picture(9, IMAGES[0].size)
    rollout = own.rollout(IMAGES[0], QUESTIONS[0], seeds=[1], latent_from="clean", clean_images=clean)[0]
    as_data = Transcript(
        [RestorationSegment(target=clean) if isinstance(s, RestorationSegment) else s for s in rollout]
    )
    for times in (None, [0.4]):
        batch = backbone.pack([pieces(as_data, prepare=backbone.prepare, times=times)])
        batch = backbone.encode(batch)
        with torch.no_grad():
            outputs = backbone.forward(batch, bridge)
        logprobs = (outputs.text_logits / TEMPERATURE).log_softmax(-1)
        scored = logprobs.gather(-1, batch.text_targets[:, None])[:, 0]
        torch.testing.assert_close(scored, recorded_text(rollout), atol=TOLERANCE, rtol=0)
        assert len(outputs.scored) == (0 if times is None else 12)


def test_pieces_errors(backbone):
    with pytest.raises(ClearValueError, match="fewer entries"):
        pieces(recorded(backbone), prepare=backbone.prepare, times=[0.5])
    with pytest.raises(ClearValueError, match="target"):
        pieces([RestorationSegment()], prepare=backbone.prepare)
    restoration = backbone.encode_images([backbone.prepare(IMAGES[0])])[0]
    with pytest.raises(ClearValueError, match="decode"):
        pieces([RestorationSegment(restoration, reencoded=True)], prepare=backbone.prepare)


def test_codes_are_scored_one_by_one():
    """A family that restores codes is scored by the same names: every code is a step."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=generator)
    codes = torch.randint(0, 5, (7,), generator=generator)
    expected = (logits / 0.5).log_softmax(-1)[range(7), codes]

    def restored(start, stop, logprobs=True):
        found = Restoration(
            "codes",
            (1, stop - start),
            (8, 8),
            codes=codes[None, start:stop],
            code_logprobs=expected[None, start:stop] if logprobs else None,
        )
        return RestorationSegment(found)

    rows = [Transcript([restored(0, 4)]), Transcript([]), Transcript([restored(4, 7)])]
    targets = restoration_targets("codes", rows, [None] * 3, torch.device("cpu"))
    assert targets.per_row == [4, 0, 3]
    outputs = ModelOutputs(torch.zeros(0, 3), logits)
    found = targets.score(outputs, LatentSampling(temperature=0.5))
    assert torch.allclose(found, expected)
    assert torch.equal(targets.recorded, expected)
    guided = restoration_targets("codes", [Transcript([restored(0, 4, False)])], [None], torch.device("cpu"))
    assert guided.per_row == [0]
