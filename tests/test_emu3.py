"""Emu3 against transformers' own forward and sampling, its picture grammar, its checkpoints."""

import json
from dataclasses import replace

import pytest
import torch
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

from clear_adapters.adapter import attach
from clear_adapters.backbones.codes import CodesBackbone
from clear_adapters.backbones.emu3.backbone import Emu3Backbone
from clear_adapters.backbones.emu3.tiny import build, small_processor
from clear_adapters.backbones.packed import ImagePiece, TextPiece
from clear_adapters.config import LoraSettings
from clear_adapters.engine import Engine
from clear_adapters.errors import CheckpointError, ClearTypeError, ClearValueError
from clear_adapters.images import pair_images
from clear_adapters.sampling import LatentSampling, TextSampling
from tests.scripted import picture

QUESTION = "Which colour has the ball?"
PROMPT = f"USER: <image>{QUESTION} ASSISTANT:"
GREEDY = LatentSampling(guidance_text=1, guidance_image=1, temperature=0)
SIZES = [(32, 32), (64, 30), (30, 64), (200, 40), (25, 33)]


@pytest.fixture(scope="module")
def backbone():
    return build(0)


@pytest.fixture(scope="module")
def processor():
    return small_processor(24 * 24, 32 * 32)


@pytest.mark.parametrize("size", SIZES)
def test_a_prompt_is_that_of_the_chat_template(backbone, processor, size):
    """The header's size and an end of line behind each row, for any aspect ratio."""
    inputs = processor(text=PROMPT, images=picture(0, size), return_tensors="pt")
    (found,) = backbone.encode_images([backbone.prepare(picture(0, size))])
    frame = backbone.frames.condition(found.grid)
    codes = iter(backbone._ids.host[found.codes[0]].tolist())
    block = [next(codes) if i < 0 else i for i in frame]
    own = [*backbone.frames.start, *block, *backbone.encode_text(QUESTION).tolist()]
    own += [*backbone.frames.text(own=False)[1], *backbone.frames.text(own=True)[0]]
    expected = inputs["input_ids"].clone()
    expected[expected == backbone.tokenizer.image_token_id] = backbone.model.model.get_image_tokens(
        inputs["pixel_values"], inputs["image_sizes"]
    ).long()
    assert own == expected[0].tolist()
    assert found.grid == tuple(s // 8 for s in inputs["image_sizes"][0].tolist())
    assert frame.count(backbone.frames.line) == found.grid[0]


@pytest.mark.parametrize("size", SIZES)
def test_the_positions_of_a_picture_are_told_by_its_size(backbone, size):
    start, prepared = backbone.start(1, [0]), backbone.prepare(picture(0, size))
    for how in ({}, {"as_condition": False}, {"understanding": False}):
        read = backbone.read_image(start, [prepared], **how)
        assert backbone.picture_positions(size[::-1], **how) == int(read.position - start.position)
    assert CodesBackbone.picture_grids(backbone, size[::-1]) == backbone.picture_grids(size[::-1])


def test_a_picture_counts_for_what_it_takes_and_not_for_the_largest(backbone):
    own = Emu3Backbone.wrap(backbone.model, small_processor(16, Emu3ImageProcessor().max_pixels))
    text = TextSampling(max_new_tokens=4)
    engine = Engine(own, protocol="tiny", text=text, latent=GREEDY)
    assert own.max_positions == 4096
    (reply,) = engine.answer(picture(0, (32, 32)), "What?", restore="always")
    assert reply.transcript.restorations[0].restoration.grid == (4, 4)
    with pytest.raises(ClearValueError, match=r"question 1 needs 4\d\d\d positions \(of these 4\d\d\d for"):
        engine.answer([picture(0, (32, 32)), picture(0, (512, 512))], ["What?"] * 2, batch_size=1)
    wide = picture(0, (512, 256))
    engine._call(*pair_images(wide, "What?")[:2], [0], "auto", None, None, "own", None, 1, None)
    with pytest.raises(ClearValueError, match=r"question 0 needs 4\d\d\d positions"):
        engine.answer(wide, "What?", restore="always")


def test_understanding_equals_transformers_bit_for_bit(backbone, processor):
    inputs = processor(text=PROMPT, images=picture(0, (40, 33)), return_tensors="pt")
    answer = torch.tensor([*backbone.encode_text(" red").tolist(), backbone.end_id])
    with torch.no_grad():
        expected = backbone.model(
            input_ids=torch.cat((inputs["input_ids"], answer[None]), 1),
            pixel_values=inputs["pixel_values"],
            image_sizes=inputs["image_sizes"],
        ).logits[0, -len(answer) - 1 : -1]
        image = backbone.prepare(picture(0, (40, 33)))
        question = TextPiece(backbone.encode_text(QUESTION))
        row = [ImagePiece(image, as_condition=False), question, TextPiece(answer, scored=True)]
        found = backbone.forward(backbone.encode(backbone.pack([row]))).text_logits
    allowed = torch.ones(expected.shape[-1], dtype=torch.bool)
    allowed[backbone._banned.host] = False
    assert torch.equal(found[:, allowed], expected[:, allowed])
    assert bool((found[:, ~allowed] == -torch.inf).all())


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("size", SIZES)
def test_greedy_codes_equal_those_of_generate(backbone, processor, size, scale):
    """Conditioned on the picture in one stream of tokens, with the grid forced by a rule as the documentation has it."""
    tokenizer, frames = backbone.tokenizer, backbone.frames
    prepared = backbone.prepare(picture(0, size))
    (own,) = backbone.encode_images([prepared])
    height, width = own.grid
    codes = backbone._ids.host.tolist()

    def prompt(block):
        head = [*frames.start, *block, *backbone.encode_text("clean").tolist(), *frames.text(own=False)[1]]
        lead = frames.restoration(own.grid)
        return torch.tensor([[*head, *lead[: lead.index(-1)]]])

    given = iter(backbone._ids.host[own.codes[0]].tolist())
    with_picture = prompt([next(given) if i < 0 else i for i in frames.condition(own.grid)])
    without = prompt([])

    def allowed(_, ids):
        at = len(ids) - with_picture.shape[1]
        return [frames.line] if at % (width + 1) == width else codes

    more = {}
    if scale > 1:
        more = {
            "guidance_scale": scale,
            "negative_prompt_ids": without,
            "negative_prompt_attention_mask": torch.ones_like(without),
        }
    expected = backbone.model.generate(
        input_ids=with_picture,
        attention_mask=torch.ones_like(with_picture),
        max_new_tokens=height * (width + 1) - 1,
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )[0, with_picture.shape[1] :]
    expected = [codes.index(i) for i in expected.tolist() if i != frames.line]

    context = backbone.read_image(backbone.start(1, [0]), [prepared], as_condition=False)
    context = backbone.read_text(context, [backbone.encode_text("clean")])
    blind = backbone.read_text(backbone.start(1, [0]), [backbone.encode_text("clean")])
    _, (found,) = backbone.restore(context, replace(GREEDY, guidance_image=scale), [None, blind])
    assert found.codes[0].tolist() == expected
    assert len(set(expected)) > 1


def test_grids_of_a_batch_end_where_each_does(backbone):
    """Rows of different grids: every row has its own ends of line, as alone; its draws too."""
    warm = replace(GREEDY, temperature=1.0)

    def restored(sizes):
        images = [backbone.prepare(picture(i, SIZES[i])) for i in sizes]
        context = backbone.read_image(backbone.start(len(sizes), list(sizes)), images)
        return backbone.restore(context, warm)

    after, together = restored(range(5))
    assert len({r.grid for r in together}) > 2
    for i, row in enumerate(together):
        own, (alone,) = restored([i])
        assert row.grid == alone.grid
        assert torch.equal(row.codes, alone.codes)
        torch.testing.assert_close(row.code_logprobs, alone.code_logprobs, atol=1e-4, rtol=0)
        assert int(after.random.counts[i]) == int(own.random.counts[0]) == row.grid[0] * row.grid[1]
        (drawn,) = backbone.decode(row)
        assert drawn.size == (row.grid[1] * 8, row.grid[0] * 8)


def test_text_never_holds_picture_tokens(backbone):
    """Though their logits are the highest."""
    own = build(0)
    with torch.no_grad():
        own.model.lm_head.weight[own._banned.host] *= 50
    context = own.read_image(own.start(8, list(range(8))), [own.prepare(picture(i)) for i in range(8)])
    _, segments = own.write_text(context, TextSampling(max_new_tokens=40, temperature=3.0))
    written = {int(i) for s in segments for i in s.ids}
    assert len(written) > 50
    assert not written & set(own._banned.host.tolist())
    assert all(bool(s.logprobs.isfinite().all()) for s in segments)


def test_the_head_of_codes_is_the_head_of_the_vocabulary(backbone):
    """Its rows of codes, with LoRA in place and switched off, whether they stand in a row or not."""
    states = torch.randn(5, backbone.width)
    attached = attach(backbone, lora=LoraSettings({"understanding": 2, "generation": 3}), bridge=False)
    try:
        for _, parameter in attached.named_parameters():
            parameter.data.normal_()
        for kept in (backbone._range, None):
            backbone._range = kept
            for _ in range(2):
                full = backbone.model.lm_head(states)[:, backbone._ids.host]
                torch.testing.assert_close(backbone.code_logits(states), full, atol=1e-5, rtol=1e-5)
                with attached.disabled():
                    plain = backbone.model.lm_head(states)[:, backbone._ids.host]
                    torch.testing.assert_close(backbone.code_logits(states), plain, atol=1e-5, rtol=1e-5)
                assert not torch.allclose(full, plain, atol=1e-2)
    finally:
        attached.detach()
        backbone._range = slice(int(backbone._ids.host[0]), int(backbone._ids.host[-1]) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_written_by_save_pretrained_loads(backbone, processor, tmp_path, dtype):
    backbone.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    attached = attach(str(tmp_path), dtype=dtype)
    assert attached.backbone.dtype == dtype
    assert attached.config.backbone == "emu3"
    text = TextSampling(max_new_tokens=4)
    reply = attached.answer(picture(0), QUESTION, restore="always", text=text)
    assert reply.restored_image is not None
    if dtype == torch.float32:
        direct = attach(backbone)
        try:
            assert direct.answer(picture(0), QUESTION, restore="always", text=text).text == reply.text
        finally:
            direct.detach()


def test_what_is_no_whole_emu3_is_told_what_to_load(backbone, processor, tmp_path):
    whole = "Emu3ForConditionalGeneration"
    for part in (backbone.model.model, backbone.model.model.text_model, backbone.model.model.vqmodel):
        with pytest.raises(ClearTypeError, match=f"part of an Emu3.*{whole}"):
            attach(part)
    with pytest.raises(ClearValueError, match="needs its processor"):
        attach(backbone.model)
    other = small_processor(24 * 24, 32 * 32)
    other.image_processor.spatial_factor = 16
    with pytest.raises(ClearValueError, match="spatial_factor is 16"):
        attach(backbone.model, processor=other)
    for kind, hint in (("Emu3", "Emu3-Chat-hf"), ("emu3_text_model", whole)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(CheckpointError, match=hint):
            attach(str(tmp_path))
    damaged = build(0)
    damaged.model.config.vocabulary_map.pop("<|visual token 000003|>")
    with pytest.raises(CheckpointError, match="39 visual tokens"):
        attach(damaged.model, processor=processor)
