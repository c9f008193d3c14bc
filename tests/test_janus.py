"""Janus against transformers' own forward and sampling, its picture tokens, its checkpoints, and its training."""

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clear_adapters.adapter import attach
from clear_adapters.backbones.codes import CodesBackbone
from clear_adapters.backbones.decoder import run_layers
from clear_adapters.backbones.janus.tiny import build, small_processor
from clear_adapters.backbones.packed import ImagePiece, TextPiece
from clear_adapters.backbones.pixels import standardise
from clear_adapters.engine import Engine
from clear_adapters.errors import CheckpointError, ClearTypeError, ClearValueError
from clear_adapters.sampling import LatentSampling, TextSampling
from tests.scripted import picture

QUESTION = "Which colour has the ball?"
GREEDY = LatentSampling(guidance_text=1, guidance_image=1, temperature=0)


@pytest.fixture(scope="module")
def backbone():
    return build(0)


@pytest.fixture(scope="module")
def processor():
    return small_processor(64, 16)


def test_a_prompt_is_that_of_the_chat_template(backbone, processor):
    frames, inputs = (
        backbone.frames,
        processor(text=f"<|User|>: <image_placeholder>\n{QUESTION}\n\n<|Assistant|>:", images=picture(0)),
    )
    before, _ = frames.text(own=True)
    own = [*frames.start, *frames.picture(16), *backbone.encode_text(QUESTION).tolist()]
    own += [*frames.text(own=False)[1], *before]
    expected = inputs["input_ids"][0].tolist()
    assert expected[0] != frames.bos  # this tokenizer adds none; that of the checkpoints does
    assert [258 if i < 0 else i for i in own[1:]] == expected


@pytest.mark.parametrize("size", [(64, 64), (64, 47), (20, 90)])
def test_the_positions_of_a_picture_are_told_by_its_size(backbone, size):
    start, prepared = backbone.start(1, [0]), backbone.prepare(picture(0, size))
    for how in ({}, {"as_condition": False}, {"understanding": False}):
        read = backbone.read_image(start, [prepared], **how)
        assert backbone.picture_positions(size[::-1], **how) == int(read.position - start.position)
    assert CodesBackbone.picture_grids(backbone, size[::-1]) == backbone.picture_grids(size[::-1])


def test_understanding_equals_transformers_bit_for_bit(backbone, processor):
    """Resizing, normalising, encoder, layout, positions, mask, decoder, head."""
    inputs = processor(
        text=f"<|User|>: <image_placeholder>\n{QUESTION}\n\n<|Assistant|>:", images=picture(0, (64, 47))
    )
    ids = torch.cat((torch.tensor([[backbone.frames.bos]]), inputs["input_ids"]), 1)
    answer = torch.tensor([*backbone.encode_text(" red").tolist(), backbone.end_id])
    with torch.no_grad():
        expected = backbone.model(
            input_ids=torch.cat((ids, answer[None]), 1), pixel_values=inputs["pixel_values"]
        ).logits[0, -len(answer) - 1 : -1]
        image = backbone.prepare(picture(0, (64, 47)))
        question = TextPiece(backbone.encode_text(QUESTION))
        row = [ImagePiece(image, as_condition=False), question, TextPiece(answer, scored=True)]
        found = backbone.forward(backbone.encode(backbone.pack([row]))).text_logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [2.0, 5.0])
def test_greedy_codes_equal_those_of_generate(backbone, processor, monkeypatch, scale):
    """Conditioned on text alone, which is all that `generate` can do; its other branch holds padding."""
    inputs = processor(text="<|User|>: a red ball\n\n<|Assistant|>:", generation_mode="image")
    ids = torch.cat((torch.tensor([[backbone.frames.bos]]), inputs["input_ids"]), 1)
    expected = backbone.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_mode="image",
        do_sample=False,
        guidance_scale=scale,
        max_length=ids.shape[1] + 16,
    )
    # In padding there is no speaker: here the speaker is part of the context.
    monkeypatch.setattr(backbone, "frames", replace(backbone.frames, assistant=()))
    head = ids[0, 1:-1]
    monkeypatch.setattr(type(backbone.frames), "text", lambda self, own: ([], []))
    start = replace(backbone.start(1, [0]), sizes=((64, 64),))
    context = backbone.read_text(start.fork(), [head])
    other = backbone.read_text(start, [torch.full_like(head, backbone.tokenizer.pad_token_id)])
    _, (found,) = backbone.restore(context, replace(GREEDY, guidance_text=scale), [other, None])
    assert found.codes[0].tolist() == expected[0].tolist()
    assert len(set(expected[0].tolist())) > 2


def test_codes_of_a_picture_are_the_nearest_by_angle(backbone):
    """Whatever the lengths in the codebook; what transformers' own encode finds is others."""
    own = build(1)
    vq = own.model.model.vqmodel
    with torch.no_grad():
        lengths = torch.linspace(0.2, 3.0, vq.quantize.num_embeddings)[:, None]
        vq.quantize.embedding.weight.mul_(lengths)
        (found,) = own.encode_images([own.prepare(picture(0, (64, 64)))])
        pixels = own.prepare(picture(0, (64, 64))).pixels[None].float() / 127.5 - 1
        z = F.normalize(vq.quant_conv(vq.encoder(pixels))[0].flatten(1).T, dim=-1)
        table = F.normalize(vq.quantize.embedding.weight, dim=-1)
        nearest = torch.cdist(z, table).argmin(-1)
        raw = vq.encode(pixels).image_tokens
    assert torch.equal(found.codes[0], nearest)
    assert not torch.equal(raw, nearest)


@pytest.mark.parametrize("size", [(64, 48), (30, 64), (200, 100), (64, 64), (640, 20)])
def test_a_picture_stands_in_a_square_and_comes_out_of_it(backbone, processor, size):
    image = picture(0, size)
    prepared = backbone.prepare(image)
    assert torch.equal(
        standardise(prepared.patches[None], processor.image_processor),
        processor.image_processor(image, return_tensors="pt")["pixel_values"],
    )
    assert max(prepared.size) == 64
    assert prepared.picture.shape[1:] == prepared.size
    (own,) = backbone.encode_images([prepared])
    (drawn,) = backbone.decode(own)
    assert drawn.size == prepared.size[::-1]
    again = backbone.prepare(drawn)
    assert again.size == prepared.size
    assert np.array_equal(again.picture.permute(1, 2, 0).numpy(), np.asarray(drawn))


def test_guidance_takes_all_branches_as_one_batch(backbone, monkeypatch):
    """One pass of the decoder a code, whatever the branches; and the branches matter."""
    from clear_adapters.backbones import codes as module

    images = [backbone.prepare(picture(i)) for i in range(2)]
    context = backbone.read_image(backbone.start(2, [1, 2]), images)
    blind = backbone.read_text(backbone.start(2, [0, 0]), [backbone.encode_text("What?")] * 2)
    unthought = context.fork()
    context = backbone.read_text(context, [backbone.encode_text("What?")] * 2)
    calls, run = [], module.run_layers

    def counted(decoder, embeds, *more, **named):
        calls.append(tuple(embeds.shape[:2]))
        return run(decoder, embeds, *more, **named)

    monkeypatch.setattr(module, "run_layers", counted)
    found = {}
    for scales in ((1.0, 1.0), (4.0, 1.0), (4.0, 2.0)):
        calls.clear()
        sampling = replace(GREEDY, guidance_text=scales[0], guidance_image=scales[1])
        _, made = backbone.restore(context.fork(), sampling, [unthought, blind])
        branches = 1 + sum(s > 1 for s in scales)
        assert [c for c in calls if c[1] == 1 and c[0] == 2 * branches][-16:] == [(2 * branches, 1)] * 16
        assert (made[0].code_logprobs is None) == (branches > 1)
        found[scales] = made[0].codes.tolist()
    assert len({str(v) for v in found.values()}) == 3


def test_the_degraded_picture_conditions_the_codes(backbone):
    def codes(image, **how):
        context = backbone.read_image(backbone.start(1, [0]), [backbone.prepare(image)], **how)
        return backbone.restore(context, GREEDY)[1][0].codes.tolist()

    for how in ({}, {"as_condition": False}, {"understanding": False}):
        assert codes(picture(0), **how) != codes(picture(5), **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_written_by_save_pretrained_loads(backbone, processor, tmp_path, dtype):
    backbone.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    attached = attach(str(tmp_path), dtype=dtype)
    assert attached.backbone.dtype == dtype
    assert attached.config.backbone == "janus"
    reply = attached.answer(picture(0), QUESTION, restore="always", text=TextSampling(max_new_tokens=4))
    assert reply.restored_image.size == (64, 48)
    if dtype == torch.float32:
        direct = attach(backbone)
        try:
            text = TextSampling(max_new_tokens=4)
            assert direct.answer(picture(0), QUESTION, restore="always", text=text).text == reply.text
        finally:
            direct.detach()


def test_what_is_no_whole_janus_is_told_what_to_load(backbone, tmp_path):
    whole = "JanusForConditionalGeneration"
    for part in (backbone.model.model, backbone.model.model.vision_model, backbone.model.model.vqmodel):
        with pytest.raises(ClearTypeError, match=f"part of a Janus.*{whole}"):
            attach(part)
    with pytest.raises(ClearTypeError, match=f"LlamaModel reads text only.*{whole}"):
        attach(backbone.model.model.language_model)
    with pytest.raises(ClearTypeError, match=r"bagel, .*janus.*register_backbone"):
        attach(torch.nn.Linear(1, 1))
    with pytest.raises(ClearValueError, match="needs its processor"):
        attach(backbone.model)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "multi_modality"}))
    with pytest.raises(CheckpointError, match="deepseek-community/Janus-Pro-1B"):
        attach(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(CheckpointError, match="bagel, "):
        attach(str(tmp_path))
    small_processor(64, 16).save_pretrained(tmp_path / "part")
    backbone.model.model.save_pretrained(tmp_path / "part")
    with pytest.raises(CheckpointError, match=r"lacks .* lm_head"):
        attach(str(tmp_path / "part"))


def test_a_model_without_explicit_masks_is_refused():
    own = build(0)
    own.model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ClearValueError, match="sdpa"):
        attach(own.model, processor=small_processor(64, 16))
    with pytest.raises(ClearValueError, match="32 px"):
        attach(build(0).model, processor=small_processor(32, 4))


def test_eager_attention_gives_the_same(backbone):
    own = build(0)
    text = TextSampling(max_new_tokens=6)
    expected = own.write_text(own.read_image(own.start(1, [0]), [own.prepare(picture(0))]), text)[1][0]
    own.model.set_attn_implementation("eager")
    found = own.write_text(own.read_image(own.start(1, [0]), [own.prepare(picture(0))]), text)[1][0]
    assert found.ids.tolist() == expected.ids.tolist()
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)


def test_a_prompt_that_does_not_fit_is_refused(backbone, monkeypatch):
    """Pictures take positions here: two blocks for the prompt's, one for a restoration that is forced."""
    text = TextSampling(max_new_tokens=20)
    engine = Engine(backbone, protocol="tiny", text=text, latent=GREEDY)
    words = [engine.protocol.system, "x" * 60]
    needed = sum(len(backbone.encode_text(w)) for w in words) + 8 + 20
    needed += backbone.picture_positions((48, 64))
    monkeypatch.setattr(type(backbone), "max_positions", needed)
    assert engine.answer(picture(0), words[1])
    with pytest.raises(ClearValueError, match=f"needs {needed + 1} positions"):
        engine.answer(picture(0), words[1] + "x")
    with pytest.raises(ClearValueError, match=f"has {needed}"):
        engine.answer(picture(0), words[1], restore="always")


def test_no_block_reaches_behind_the_last_position(backbone, monkeypatch):
    image = backbone.prepare(picture(0))
    context = backbone.read_image(backbone.start(2, [0, 1]), [image] * 2)
    context = backbone.read_text(context, [backbone.encode_text("x" * n) for n in (9, 2)])
    (own, _) = backbone.restore(context, GREEDY)[1]
    frame, turn = len(backbone.frames.restoration(own.grid)), len(backbone.frames.text(own=True)[0]) + 2
    end = int(context.position[0]) + frame
    monkeypatch.setattr(type(backbone), "max_positions", end + turn - 1)
    with pytest.raises(ClearValueError, match=r"allow fewer restorations"):
        backbone.restore(context, GREEDY)
    backbone.restore(context, GREEDY, rows=[1])
    backbone.read_restoration(context, [own], None, rows=[0])
    monkeypatch.setattr(type(backbone), "max_positions", end - 1)
    with pytest.raises(ClearValueError, match=f"has {end - 1}: allow fewer"):
        backbone.read_restoration(context, [own], None, rows=[0])
    backbone.read_restoration(context, [own], None, rows=[1])


def test_a_turn_is_cut_off_at_the_last_position(backbone, monkeypatch):
    image, text = backbone.prepare(picture(0)), TextSampling(max_new_tokens=12)
    start = backbone.read_image(backbone.start(2, [0, 1]), [image] * 2)
    start = backbone.read_text(start, [backbone.encode_text("x" * n) for n in (9, 2)])
    full = backbone.write_text(start, text)[1]
    assert [len(s.ids) for s in full] == [12, 12]
    end = int(start.position[0]) + len(backbone.frames.text(own=True)[0]) + 6
    for limit, written in ((end, [5, 12]), (end - 5, [0, 7])):
        monkeypatch.setattr(type(backbone), "max_positions", limit)
        context, found = backbone.write_text(start, text)
        assert [len(s.ids) for s in found] == written
        assert int(context.position.max()) <= limit
        for a, b in zip(found, full, strict=True):
            assert a.ids.tolist() == b.ids[: len(a.ids)].tolist()


def older(self, states, past_key_values=None, **more):
    return past_key_values.update(states[:, None], states[:, None], 0)[0][:, 0]


def newer(self, states, cache=None, **more):
    return older(self, states, cache)


@pytest.mark.parametrize("forward", [older, newer])
def test_layers_get_the_cache_by_the_name_they_know(forward):
    """transformers renamed it after 5.23, and what it puts around a layer's forward may drop it."""

    @functools.wraps(forward)
    def losing(self, states, **more):
        return forward(self, states)

    decoder = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation="sdpa"),
        layers=[type("Layer", (nn.Module,), {"forward": losing})()],
        norm=nn.Identity(),
        rotary_emb=lambda embeds, position_ids: None,
    )
    held = SimpleNamespace(append=lambda layer, keys, values: (2 * keys, values))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    states, _ = run_layers(decoder, torch.ones(1, 3, 4), torch.arange(3)[None], mask, held)
    assert states.eq(2).all()
