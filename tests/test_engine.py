"""The state machine, on the real classes at toy size. What the toy writes is scripted where a path needs it."""

import dataclasses

import numpy as np
import pytest
import torch

from clear_adapters import engine, images
from clear_adapters.backbones import get_backbone, list_backbones, resolve
from clear_adapters.backbones import writer as bagel
from clear_adapters.bridge import BridgeConfig, LatentBridge
from clear_adapters.errors import ClearTypeError, ClearValueError, ImageError
from clear_adapters.prompts import FORCED_DECLINE, get_protocol
from clear_adapters.reply import (
    Answer,
    DenoisingStep,
    Reply,
    Restored,
    TextDelta,
    Timing,
)
from clear_adapters.sampling import LatentSampling, TextSampling
from clear_adapters.transcript import ImageSegment, Origin, TextSegment
from tests.scripted import ANSWER, ASK, ODE, SDE, Script, make_engine, picture, toy

WARM = TextSampling(max_new_tokens=80, temperature=1.0)
IMAGES = [picture(0), picture(1, (40, 64)), picture(2)]
QUESTIONS = ["What?", "Which colour is it, and why?", "Is é there?"]


@pytest.fixture(scope="module")
def backbone():
    return toy()


@pytest.fixture
def script(monkeypatch, backbone):
    return lambda turns: monkeypatch.setattr(bagel, "choose_token", Script(backbone, turns))


def kinds(transcript) -> list[str]:
    """`P` prompt, `S` sampled, `F` forced text; `i` picture; `r` own restoration, `x` injected one."""
    letters = []
    for s in transcript:
        if isinstance(s, TextSegment):
            letters.append(s.origin.value[0].upper())
        elif isinstance(s, ImageSegment):
            letters.append("i")
        else:
            letters.append("r" if s.origin is Origin.SAMPLED else "x")
    return "".join(letters)


def same(a, b, tolerance=1e-5) -> None:
    """Two transcripts hold the same."""
    assert kinds(a) == kinds(b)
    for x, y in zip(a, b, strict=True):
        if isinstance(x, TextSegment):
            assert x.text == y.text
            assert x.ids.tolist() == y.ids.tolist()
            if x.logprobs is not None:
                torch.testing.assert_close(x.logprobs, y.logprobs, atol=tolerance, rtol=0)
        elif not isinstance(x, ImageSegment):
            torch.testing.assert_close(
                x.restoration.latent, y.restoration.latent, atol=tolerance * 10, rtol=1e-4
            )


# ------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("turns", "options", "expected", "text"),
    [
        ([ANSWER], {}, "PiPS", "red"),
        ([ASK, ANSWER], {}, "PiPSrS", "red"),
        ([ASK, ASK, ANSWER], {}, "PiPSrSrS", "red"),
        ([ASK, ASK, ASK, ANSWER], {}, "PiPSrSrSFS", "red"),
        ([ASK, ASK, ASK, ASK], {}, "PiPSrSrSFS", ""),
        (["no tags at all"], {}, "PiPS", "no tags at all"),
        (["<think>I never close"], {}, "PiPS", ""),
        ([ASK + "<answer>blue</answer>"], {}, "PiPS", "blue"),
        (["<image_restore", ANSWER], {}, "PiPS", "<image_restore"),
        ([""], {}, "PiPS", ""),
        ([ASK, ANSWER], {"restore": "never"}, "PiPFS", "red"),
        ([ASK, ASK, ANSWER], {"restore": "never"}, "PiPFFS", "red"),
        ([ASK, ASK, ASK], {"restore": "never"}, "PiPFFS", ""),
        ([ANSWER], {"restore": "never"}, "PiPS", "red"),
        ([ANSWER], {"restore": "always"}, "PiPFrS", "red"),
        ([ASK, ANSWER], {"restore": "always"}, "PiPFrSrS", "red"),
        ([ASK, ASK, ANSWER], {"restore": "always"}, "PiPFrSrSFS", "red"),
        ([ASK, ANSWER], {"latent_from": "degraded"}, "PiPSxS", "red"),
        ([ASK, ANSWER], {"latent_from": "clean", "clean_images": [picture(9)]}, "PiPSxS", "red"),
        ([ASK, ANSWER], {"latent_from": "reencode"}, "PiPSrS", "red"),
        ([ANSWER], {"plain": True}, "iPS", ANSWER),
        ([ASK], {"plain": True}, "iPS", ASK),
        ([ANSWER], {"plain": True, "restore": "always"}, "iPS", ANSWER),
    ],
)
def test_a_path_and_its_stream(backbone, script, turns, options, expected, text):
    own = make_engine(backbone)
    script({7: turns})
    reply = own.answer(IMAGES[:1], ["What?"], seed=7, **options)[0]
    assert kinds(reply.transcript) == expected
    assert reply.text == text
    assert reply.restored == ("r" in expected or "x" in expected)
    assert reply.timings["text"] > 0
    assert (reply.timings["restore"] > 0) == reply.restored

    script({7: turns})
    one = {("clean_image" if k == "clean_images" else k): v for k, v in options.items()}
    one["clean_image"] = one["clean_image"][0] if "clean_image" in one else None
    events = list(own.stream(IMAGES[0], "What?", seed=7, **one))
    same(events[-2].reply.transcript, reply.transcript)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == reply.transcript.reply
    assert isinstance(events[-2], Answer)
    assert events[-2].text == reply.text
    assert isinstance(events[-1], Timing)
    assert sum(isinstance(e, Restored) for e in events) == expected.count("r") + expected.count("x")
    assert sum(isinstance(e, DenoisingStep) for e in events) == 3 * expected.count("r")


def test_no_restoration_granted_at_all(backbone, script):
    script({7: [ASK, ANSWER]})
    reply = make_engine(backbone, max_restores=0).answer(IMAGES[0], "What?", seed=7)[0]
    assert kinds(reply.transcript) == "PiPSFS"
    assert reply.thoughts == ("dark", "red")


def test_forced_texts(backbone, script):
    own = make_engine(backbone)
    script({7: [["<think>so ", 3, " dark <image_restore> and on"], ANSWER]})
    forced = own.answer(IMAGES[0], "What?", seed=7, restore="never")[0].transcript.segments[3]
    assert forced.origin is Origin.FORCED
    assert forced.text.startswith("<think>so ")
    assert forced.text.endswith(f" dark </think>{FORCED_DECLINE}")
    assert forced.logprobs is None
    assert backbone.decode_text(forced.ids) == forced.text
    script({7: [ANSWER]})
    always = own.answer(IMAGES[0], "What?", seed=7, restore="always")[0].transcript.segments[3]
    assert (always.text, always.origin) == (get_protocol("tiny").forced_restore, Origin.FORCED)


# --------------------------------------------------------------------------------------------- batch and seeds

MIXED = {
    1: [[4, ASK], [9, ANSWER]],
    2: [[2, ANSWER]],
    3: [[ASK, 3], [1, ASK], [3, ANSWER]],
    4: [[11]],
    5: [[1, ASK], [ASK], [2, ASK], [3, ANSWER]],
    6: [[5, ANSWER]],
}


@pytest.mark.parametrize("options", [{}, {"restore": "never"}, {"restore": "always"}])
@pytest.mark.parametrize("latent", [SDE, LatentSampling(steps=4)], ids=["sde", "guided"])
def test_rows_do_not_depend_on_their_batch(backbone, script, options, latent):
    own = make_engine(backbone, text=WARM, latent=latent)
    script(MIXED)
    together = own.rollout(IMAGES, QUESTIONS, seeds=[1, 2, 3, 4, 5, 6], group=2, **options)
    for i, (a, seed) in enumerate(zip(together, MIXED, strict=True)):
        script(MIXED)
        alone = own.rollout(IMAGES[i // 2], QUESTIONS[i // 2], seeds=[seed], **options)[0]
        same(a, alone)
    order = [5, 0, 3, 2]
    script(MIXED)
    turned = own.rollout(
        [IMAGES[i // 2] for i in order],
        [QUESTIONS[i // 2] for i in order],
        seeds=[i + 1 for i in order],
        **options,
    )
    for a, i in zip(turned, order, strict=True):
        same(a, together[i])


def test_free_rows_do_not_depend_on_their_batch(backbone):
    own = make_engine(backbone, text=dataclasses.replace(WARM, max_new_tokens=12), latent=SDE)
    together = own.rollout(IMAGES, QUESTIONS, seeds=[3, 4, 5], restore="always")
    for i, t in enumerate(together):
        same(t, own.rollout(IMAGES[i], QUESTIONS[i], seeds=[3 + i], restore="always")[0])
    greedy = make_engine(backbone, text=TextSampling(max_new_tokens=12))
    together = greedy.rollout(IMAGES, QUESTIONS, seeds=[0, 0, 0])
    for i, t in enumerate(together):
        same(t, greedy.rollout(IMAGES[i], QUESTIONS[i], seeds=[0])[0])


def test_same_seed_same_rollout_and_another_seed_another(backbone):
    own = make_engine(backbone, text=dataclasses.replace(WARM, max_new_tokens=10), latent=SDE)
    first, again = (
        own.rollout(IMAGES[:1], QUESTIONS[:1], seeds=[3, 4], group=2, restore="always") for _ in range(2)
    )
    for a, b in zip(first, again, strict=True):
        same(a, b, tolerance=0)
    assert first[0].reply != first[1].reply
    latents = [t.restorations[0].restoration.latent for t in first]
    assert (latents[0] - latents[1]).abs().max() > 0.1


def test_answer_by_chunks(backbone, script):
    own = make_engine(backbone, text=WARM)
    whole = own.answer(IMAGES, QUESTIONS, seed=[11, 12, 13])
    for size in (1, 2):
        for a, b in zip(
            own.answer(IMAGES, QUESTIONS, seed=[11, 12, 13], batch_size=size), whole, strict=True
        ):
            same(a.transcript, b.transcript)
    same_seed = own.answer(IMAGES, QUESTIONS, seed=11)
    same(same_seed[0].transcript, whole[0].transcript)
    same(own.answer(IMAGES[2], QUESTIONS[2], seed=11)[0].transcript, same_seed[2].transcript)


def test_pictures_are_decoded_once_and_batch_by_batch(backbone, monkeypatch, tmp_path):
    told, load, run = [], images.load_image, engine.Rollout
    monkeypatch.setattr(images, "load_image", lambda image: told.append(image) or load(image))
    monkeypatch.setattr(engine, "Rollout", lambda *given: told.append("run") or run(*given))
    own = make_engine(backbone, text=TextSampling(max_new_tokens=2))
    files = [tmp_path / f"{n}.png" for n in range(3)]
    for n, file in enumerate(files):
        IMAGES[n].save(file)
    asked = ["What?"] * 3
    found = own.answer(files, asked, batch_size=2, clean_images=files)
    assert told == [*files[:2], *files[:2], "run", files[2], files[2], "run"]
    assert [r.transcript.segments[1].image.size for r in found] == [i.size for i in IMAGES]

    told.clear()
    own.answer(files[0], asked, batch_size=1)
    assert told == [files[0], "run", "run", "run"]

    for wrong in (tmp_path / "nowhere.png", np.zeros((2, 2)), [IMAGES[0]]):
        told.clear()
        with pytest.raises(ImageError, match=r"images\[2\]"):
            own.answer([*files[:2], wrong], asked, batch_size=1)
        with pytest.raises(ImageError, match=r"clean_images\[2\]"):
            own.answer(files, asked, batch_size=1, clean_images=[*files[:2], wrong])
        assert not told

    files[2].write_bytes(files[2].read_bytes()[:-4000])
    with pytest.raises(ImageError, match=r"images\[2\]: .*2\.png.* cannot be decoded"):
        own.answer(files, asked, batch_size=2)
    assert told == [*files[:2], "run", files[2]]


def test_seeds_may_be_whole_numbers_of_other_libraries(backbone):
    own = make_engine(backbone, text=dataclasses.replace(WARM, max_new_tokens=8))
    expected = [own.answer(IMAGES[0], "What?", seed=seed)[0].transcript for seed in (3, 4)]
    for given in (np.int64(3), torch.tensor(3)):
        same(own.answer(IMAGES[0], "What?", seed=given)[0].transcript, expected[0])
    for given in (np.arange(3, 5), torch.arange(3, 5), [np.uint8(3), np.uint8(4)], range(3, 5)):
        for found, wanted in zip(own.answer(IMAGES[0], ["What?"] * 2, seed=given), expected, strict=True):
            same(found.transcript, wanted)
        for found, wanted in zip(
            own.rollout(IMAGES[0], "What?", seeds=given, group=2), expected, strict=True
        ):
            same(found, wanted)
    streamed = list(own.stream(IMAGES[0], "What?", seed=np.int64(3)))
    same(streamed[-2].reply.transcript, expected[0])
    with pytest.raises(ClearTypeError, match=r"seed=0\.5"):
        own.answer(IMAGES[0], "What?", seed=0.5)
    with pytest.raises(ClearTypeError, match=r"seed 1 is 0\.5"):
        own.answer(IMAGES[0], ["What?"] * 2, seed=[1, 0.5])
    with pytest.raises(ClearTypeError, match="'1'"):
        own.stream(IMAGES[0], "What?", seed="1")


def test_a_row_is_cut_off_where_the_models_positions_end(backbone, script, monkeypatch):
    """And closed there, as in a replay; its neighbours go on."""
    turns = {1: [[3, ASK], [45]], 2: [[2, ASK], [3, ANSWER]], 3: [[2, ANSWER]]}
    own = make_engine(backbone, text=dataclasses.replace(WARM, max_new_tokens=46))
    script(turns)
    whole = own.rollout(IMAGES, ["What?"] * 3, seeds=[1, 2, 3])
    texts = [s for s in whole[0] if isinstance(s, TextSegment)]
    # Two marks stand around a text, of which a turn holds its end already; three pictures take one position each.
    before = sum(len(s.ids) + 2 for s in texts[:2]) + len(texts[2].ids) + 1 + 3
    monkeypatch.setattr(type(backbone), "max_positions", before + 12)
    script(turns)
    cut, *others = own.rollout(IMAGES, ["What?"] * 3, seeds=[1, 2, 3])
    assert cut.segments[-1].ids.tolist() == texts[3].ids[:10].tolist()
    same(others[1], whole[2])
    scores = own.replay([cut]).text_logprobs[0]
    recorded = torch.cat([s.logprobs for s in cut if isinstance(s, TextSegment) and s.logprobs is not None])
    torch.testing.assert_close(scores, recorded, atol=1e-4, rtol=0)
    end = backbone.end_id
    monkeypatch.setattr(type(backbone), "max_positions", 40)
    start = backbone.read_text(backbone.start(2, [8, 8]), [torch.arange(28), torch.arange(8)])
    context, segments = backbone.write_text(start, WARM)
    assert [len(s.ids) for s in segments] == [8, 28]
    assert context.position.tolist() == [40, 40]
    assert not any(end in s.ids.tolist() for s in segments)


# ---------------------------------------------------------------------------------------------------- guidance


def test_guidance_contexts(backbone, script, monkeypatch):
    """Both branches equal contexts that are built on their own, at the first restoration and at the second."""
    seen, read_ids = [], []
    original, read_text = type(backbone).restore_steps, type(backbone).read_text

    def spy_text(self, context, ids, *given, **named):
        read_ids.append([x.tolist() for x in ids])
        return read_text(self, context, ids, *given, **named)

    def spy(self, context, sampling, guidance=(), rows=None):
        seen.append((context, guidance))
        return original(self, context, sampling, guidance, rows)

    monkeypatch.setattr(type(backbone), "restore_steps", spy)
    monkeypatch.setattr(type(backbone), "read_text", spy_text)
    turns = {1: [[3, ASK], [2, ASK], ANSWER], 2: [ANSWER], 3: [[6, ASK], [4, ASK], [ANSWER]]}
    script(turns)
    own = make_engine(backbone, text=WARM, latent=LatentSampling(steps=3))
    transcripts = own.rollout(IMAGES, QUESTIONS, seeds=[1, 2, 3])
    assert [kinds(t) for t in transcripts] == ["PiPSrSrS", "PiPS", "PiPSrSrS"]
    system = transcripts[0].segments[0].ids.tolist()
    assert sum(ids.count(system) for ids in read_ids) == 1  # for all rows and branches

    def read(segments):
        context = backbone.start(1, [0])
        for s in segments:
            if isinstance(s, TextSegment):
                context = backbone.read_text(context, [s.ids])
            elif isinstance(s, ImageSegment):
                context = backbone.read_image(context, [backbone.prepare(s.image)])
            else:
                context = backbone.read_restoration(context, [s.restoration], None)
        return context

    def compare(context, place, expected):
        one = context.select([place])
        data = one.cache.read(one.length)[:, :, 0][:, :, :, one.valid[0]]
        own_data = expected.cache.read(expected.length)[:, :, 0]
        torch.testing.assert_close(data, own_data, atol=1e-4, rtol=1e-4)
        assert int(one.position[0]) == int(expected.position[0])

    assert len(seen) == 2
    for number, (context, (text, image)) in enumerate(seen):
        end = 4 + 2 * number  # system, picture, question, thought; then restoration, thought
        for place, row in enumerate((0, 2)):
            before = transcripts[row].segments[:end]
            compare(context, place, read(before))
            compare(text, place, read(before[:-1]))
            compare(image, place, read([s for s in before if isinstance(s, TextSegment)]))


@pytest.mark.parametrize("system", ["Look.", ""])
@pytest.mark.parametrize("name", list_backbones())
def test_guidance_without_the_picture_keeps_the_question(name, system, monkeypatch):
    """Also where a row begins with a token of its own and has no system prompt."""
    spec = get_backbone(name)
    family = resolve(spec.tiny, spec)(0)
    seen = []
    original = type(family).restore_steps

    def spy(self, context, sampling, guidance=(), rows=None):
        seen.append(guidance[1])
        return original(self, context, sampling, guidance, rows)

    monkeypatch.setattr(type(family), "restore_steps", spy)
    protocol = dataclasses.replace(get_protocol("tiny"), system=system)
    own = make_engine(family, protocol=protocol, latent=LatentSampling(steps=3), max_restores=1)
    transcripts = own.rollout(IMAGES[:2], QUESTIONS[:2], seeds=[1, 2], restore="always")
    expected = family.start(2, [1, 2])
    blocks = zip(*([s for s in t if isinstance(s, TextSegment)] for t in transcripts), strict=True)
    for block in list(blocks)[:-1]:
        origin = block[0].origin
        expected = family.read_text(expected, [s.ids for s in block], own=origin is not Origin.PROMPT)
    (found,) = seen
    assert torch.equal(found.valid, expected.valid)
    read, wanted = (c.cache.read(c.length)[..., c.valid[1], :] for c in (found, expected))
    torch.testing.assert_close(read[:, :, 1], wanted[:, :, 1], atol=1e-4, rtol=1e-4)


def test_no_guidance_contexts_without_guidance(backbone, script, monkeypatch):
    seen = []
    original = type(backbone).restore_steps

    def spy(self, context, sampling, guidance=(), rows=None):
        seen.append(guidance)
        return original(self, context, sampling, guidance, rows)

    monkeypatch.setattr(type(backbone), "restore_steps", spy)
    for latent in (ODE, SDE, dataclasses.replace(ODE, guidance_image=2.0)):
        script({1: [ASK, ANSWER]})
        make_engine(backbone, latent=latent).rollout(IMAGES[0], "What?", seeds=[1])
    assert seen[:2] == [(None, None), (None, None)]
    assert seen[2][0] is None
    assert seen[2][1] is not None


# ---------------------------------------------------------------------------------------------- controls, reply


def test_controls_read_what_they_say(backbone, script):
    own = make_engine(backbone)
    clean = picture(9)

    def run(**options):
        script({1: [ASK, [6, ANSWER]]})
        return own.rollout(IMAGES[0], "What?", seeds=[1], text=WARM, **options)[0]

    degraded = backbone.encode_images([backbone.prepare(IMAGES[0])])[0].latent
    true = backbone.encode_images([backbone.prepare(clean)])[0].latent
    torch.testing.assert_close(run(latent_from="degraded").restorations[0].restoration.latent, degraded)
    torch.testing.assert_close(
        run(latent_from="clean", clean_images=clean).restorations[0].restoration.latent, true
    )
    base, again = run(), run(latent_from="reencode")
    assert again.restorations[0].reencoded
    # The same restoration, read in another way: the text after it differs.
    torch.testing.assert_close(
        base.restorations[0].restoration.latent, again.restorations[0].restoration.latent
    )
    difference = base.segments[-1].logprobs[:1] - again.segments[-1].logprobs[:1]
    assert base.segments[-1].ids[0] != again.segments[-1].ids[0] or difference.abs() > 1e-4


def test_controls_of_groups_read_their_own_picture(backbone, script):
    clean = [picture(20 + i, image.size) for i, image in enumerate(IMAGES)]
    for latent_from, own in (("degraded", IMAGES), ("clean", clean)):
        script({1: [ANSWER], **{seed: [ASK, ANSWER] for seed in range(2, 7)}})
        found = make_engine(backbone).rollout(
            IMAGES, QUESTIONS, seeds=range(1, 7), group=2, latent_from=latent_from, clean_images=clean
        )
        assert not found[0].restorations
        for row, transcript in enumerate(found[1:], start=1):
            expected = backbone.encode_images([backbone.prepare(own[row // 2])])[0]
            torch.testing.assert_close(transcript.restorations[0].restoration.latent, expected.latent)


def test_a_picture_of_several_rows_is_prepared_once(backbone, monkeypatch):
    made, prepare = [], backbone.prepare
    monkeypatch.setattr(backbone, "prepare", lambda image: made.append(image) or prepare(image))
    own, clean = make_engine(backbone, max_restores=1), picture(9)
    own.rollout(
        IMAGES[0], "What?", seeds=[1, 2], group=2, restore="always", latent_from="clean", clean_images=clean
    )
    assert len(made) == 2  # the given picture and the clean one
    made.clear()
    for given, count in ((IMAGES[:2], 2), (IMAGES[0], 1)):
        own.rollout(given, QUESTIONS[:2], seeds=[1, 2], restore="always")
        assert len(made) == count
        made.clear()


def test_the_bridge_is_read_through(backbone, script):
    bridge = LatentBridge(BridgeConfig(backbone.latent_width, backbone.width))
    results = []
    for own in (None, bridge):
        script({1: [ASK, ANSWER]})
        results.append(make_engine(backbone, bridge=own).rollout(IMAGES[0], "What?", seeds=[1])[0])
    same(*results, tolerance=0)  # invariant 6: an untrained bridge changes nothing
    torch.nn.init.normal_(bridge.up.weight)
    script({1: [ASK, ANSWER]})
    trained = make_engine(backbone, bridge=bridge).rollout(IMAGES[0], "What?", seeds=[1])[0]
    assert (trained.segments[-1].logprobs - results[0].segments[-1].logprobs).abs().max() > 1e-3


def test_reply(backbone, script, monkeypatch):
    decoded = []
    original = type(backbone).decode
    monkeypatch.setattr(type(backbone), "decode", lambda self, r: decoded.append(1) or original(self, r))
    script({1: [ASK, ANSWER], 2: [ANSWER]})
    restored, direct = make_engine(backbone).answer(IMAGES[:2], QUESTIONS[:2], seed=[1, 2])
    assert repr(restored) == f"Reply({restored.text!r}, restored=True, thoughts={len(restored.thoughts)})"
    assert not decoded
    assert restored.restored_image.size == IMAGES[0].size
    assert restored.restored_image is restored.restored_image
    assert len(decoded) == 1
    assert direct.restored_image is None
    assert restored.answered
    assert restored.thoughts == ("dark", "red")
    data = restored.to_json()
    assert data["text"] == "red"
    assert [s["kind"] for s in data["transcript"]] == ["text", "image", "text", "text", "restoration", "text"]
    assert Reply(direct.transcript).restored_image is None


def test_the_restored_image_is_the_one_that_was_read(backbone, script, monkeypatch):
    """Pixels depend on the batch by a rounding: those that were encoded again are not decoded anew."""
    decoded = []
    original = type(backbone).decode
    monkeypatch.setattr(type(backbone), "decode", lambda self, r: decoded.append(1) or original(self, r))
    script({1: [ASK, ANSWER]})
    (reply,) = make_engine(backbone).answer(IMAGES[0], "What?", seed=[1], latent_from="reencode")
    assert len(decoded) == 1
    assert reply.restored_image is reply.transcript.restorations[-1].restoration.image
    assert len(decoded) == 1
    assert Reply(reply.transcript).restored_image is reply.restored_image


def test_a_written_turn_keeps_its_ids(backbone):
    own = make_engine(backbone, text=dataclasses.replace(WARM, max_new_tokens=30))
    segment = own.rollout(IMAGES[0], "What?", seeds=[5])[0].segments[-1]
    # Random bytes are no valid text: encoding the text again would give other ids.
    assert backbone.encode_text(segment.text).tolist() != segment.ids.tolist()
    assert len(segment.ids) == len(segment.logprobs) > 10


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restore": "sometimes"}, "'auto', 'always', 'never'"),
        ({"latent_from": "mine"}, "'own', 'degraded', 'clean', 'reencode'"),
        ({"latent_from": "clean"}, "pass clean_images"),
        ({"latent_from": "clean", "clean_images": IMAGES[:2]}, "2 clean images for 1 questions"),
        ({"seeds": [1, 2]}, "2 seeds for 1 questions in groups of 1"),
        ({"seeds": [1], "group": 2}, "each of the 2 rows"),
        ({"group": 0}, "group=0"),
        ({"questions": " "}, "blank"),
        ({"questions": ["a", "b"], "images": IMAGES}, "3 images came with 2 questions"),
    ],
)
def test_errors(backbone, options, message):
    arguments = {"images": IMAGES[0], "questions": "What?", "seeds": [1]} | options
    with pytest.raises(ClearValueError, match=message):
        make_engine(backbone).rollout(arguments.pop("images"), arguments.pop("questions"), **arguments)


def test_other_errors(backbone, monkeypatch):
    own = make_engine(backbone)
    with pytest.raises(ImageError):
        own.answer("nowhere.png", "What?")
    with pytest.raises(ClearValueError, match="batch_size=0"):
        own.answer(IMAGES[0], "What?", batch_size=0)
    with pytest.raises(ClearValueError, match="2 seeds for 1"):
        own.answer(IMAGES[0], "What?", seed=[1, 2])
    with pytest.raises(ClearTypeError, match="one question"):
        own.stream(IMAGES[0], ["What?"])
    with pytest.raises(ClearValueError, match="restore='x'"):
        own.stream(IMAGES[0], "What?", restore="x")  # at the call, not at the first event
    with pytest.raises(ClearValueError, match="max_restores=-1"):
        make_engine(backbone, max_restores=-1)
    with pytest.raises(ClearValueError, match="max_restores=0"):
        make_engine(backbone, max_restores=0).answer(IMAGES[0], "What?", restore="always")
    monkeypatch.setattr(type(backbone), "max_positions", 100)
    with pytest.raises(ClearValueError, match=r"question 1 needs .* has 100"):
        make_engine(backbone, text=TextSampling(max_new_tokens=20)).answer(IMAGES[:2], ["a", "b" * 90])
