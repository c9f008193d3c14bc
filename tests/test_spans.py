"""Rows that attend block by block, or compiled, give what rows with a mask give, gradients included."""

import pytest
import torch

from clear_adapters.backbones import fast
from clear_adapters.backbones import spans as module
from clear_adapters.backbones.bagel import backbone as bagel
from clear_adapters.backbones.packed import ImagePiece, LatentPiece, TextPiece
from clear_adapters.backbones.spans import Span, attend_spans, spans_of
from tests.scripted import picture
from tests.test_fast_ways import GPU, attached_of


@pytest.fixture(scope="module")
def attached():
    return attached_of()


def packed(backbone):
    """Two rows of different lengths, one with a restoration that stands in all its ways, and a teacher."""
    image = backbone.prepare(picture(0))
    clean = backbone.prepare(picture(1))
    ids = [backbone.encode_text(t) for t in ("Look.", "What is it?", "<think>dark</think>", "red")]
    first = [
        TextPiece(ids[0]),
        ImagePiece(image),
        TextPiece(ids[1]),
        TextPiece(ids[2], scored=True),
        LatentPiece(image=clean, time=0.5, scored=True, branch=1),
        LatentPiece(image=clean, time=0.8, scored=True, branch=2),
        ImagePiece(clean, as_condition=False, branch=3, watched=0),
        LatentPiece(image=clean, bridged=True),
        TextPiece(ids[3], scored=True),
    ]
    second = [TextPiece(ids[0]), ImagePiece(image, as_condition=False), TextPiece(ids[3], scored=True)]
    batch = backbone.pack([first, second], (0, 1)).to(backbone.device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch.latents.shape, generator=generator).to(backbone.device)
    return backbone.encode(batch, noise)


def outcome(attached, batch):
    """Outputs, and the gradients of all that is trained."""
    parameters = attached.trainable_parameters()
    outputs = attached.module(batch)
    seen = batch.block.flatten() >= 0
    hidden = [h.flatten(0, 1)[seen] for h in outputs.hidden.values()]
    loss = outputs.text_logits.float().log_softmax(-1)[:, 65].sum() + outputs.scored.square().sum()
    loss = loss + sum(h.float().square().mean() for h in hidden)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return [outputs.text_logits, outputs.scored, *hidden, *(g for g in gradients if g is not None)]


def assert_same(found, expected, tolerance=1e-4):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_blocks_of_a_row_and_what_they_see():
    spans = spans_of(
        [0, 0, 1, 1, 2, 3, 3], [False, False, True, True, True, False, False], [0, 0, 1, 1, 2, 0, 0]
    )
    assert spans == (
        *(Span(2, False, ()), Span(2, True, (0,)), Span(1, True, (0,))),
        Span(2, False, (0,)),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_block_by_block_is_with_a_mask(attached, monkeypatch, checkpointing):
    batch = packed(attached.backbone)
    attached.backbone.set_checkpointing(checkpointing)
    attached.module.train()
    try:
        expected = outcome(attached, batch)
        monkeypatch.setattr(bagel, "LONG", 0)
        calls, attend = [], bagel.Frame.__init__

        def watched(self, *args):
            calls.append(args[5] is None)
            attend(self, *args)

        monkeypatch.setattr(bagel.Frame, "__init__", watched)
        with fast.switched("spans", on=True):
            assert_same(outcome(attached, batch), expected)
        assert calls == [True]
    finally:
        attached.backbone.set_checkpointing(False)
        attached.module.eval()


def test_short_rows_take_the_mask(attached, monkeypatch):
    batch = packed(attached.backbone)
    monkeypatch.setattr("clear_adapters.backbones.bagel.model.attend_spans", None)
    with fast.switched("spans", on=True):
        outcome(attached, batch)


def test_grouped_heads_in_16_bits():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 12, 16, generator=generator) for h in (6, 2, 2))
    rows = [(Span(3, False, ()), Span(5, True, (0,)), Span(2, False, (0, 1)))]
    whole = attend_spans(q, k, v, rows)
    assert not whole[:, 10:].any()
    half = attend_spans(*(x.bfloat16() for x in (q, k, v)), rows)
    torch.testing.assert_close(half.float(), whole, atol=0.03, rtol=0)


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch's compiler, of an activation
def test_compiled_training_is_training(attached, monkeypatch):
    """In few parts, which all layers share, also where blocks are attended to one by one and activations recomputed."""
    from torch._dynamo.testing import CompileCounterWithBackend

    batch = packed(attached.backbone)
    expected = outcome(attached, batch)
    monkeypatch.setattr(bagel, "LONG", 0)
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    attached.backbone.set_compiled(True, counter, training=True)
    attached.backbone.set_checkpointing(True)
    attached.module.train()
    try:
        with fast.switched("spans", "lora", on=True):
            assert_same(outcome(attached, batch), expected)
            assert (
                counter.frame_count <= 8
            )  # the first layer, whose input has no gradient yet, and the others
    finally:
        attached.backbone.set_compiled(False, training=True)
        attached.backbone.set_checkpointing(False)
        attached.module.eval()
        torch._dynamo.reset()


@pytest.mark.gpu
@GPU
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_long_rows_on_a_gpu(monkeypatch, compiled):
    attached = attached_of("cuda")
    batch = packed(attached.backbone)
    with fast.switched(*fast.WAYS, on=False):
        expected = outcome(attached, batch)
    monkeypatch.setattr(bagel, "LONG", 0)
    if compiled:
        attached.backbone.set_compiled(True, training=True)
    try:
        assert_same(outcome(attached, batch), expected, tolerance=1e-3)
    finally:
        torch._dynamo.reset()


@pytest.mark.gpu
@GPU
def test_text_behind_other_blocks_takes_no_mask_on_a_gpu(monkeypatch):
    generator = torch.Generator("cuda").manual_seed(0)
    spans = [(Span(70, False, ()), Span(300, True, (0,)), Span(40, False, (0, 1)))]
    q, k, v = (
        torch.randn(1, heads, 420, 128, device="cuda", generator=generator).bfloat16() for heads in (8, 2, 2)
    )
    wide = [x.float() for x in (q, k, v)]
    given = [x.requires_grad_() for x in (q, k, v)]
    full = [x.requires_grad_() for x in wide]
    expected = attend_spans(*full, spans)
    ends, ending = [], module.causal_lower_right
    monkeypatch.setattr(module, "causal_lower_right", lambda *sizes: ends.append(sizes) or ending(*sizes))
    found = attend_spans(*given, spans)
    assert ends == [(40, 410)]
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0)
    weight = torch.randn(expected.shape, device="cuda", generator=generator)
    mine = torch.autograd.grad((found.float() * weight).sum(), given)
    theirs = torch.autograd.grad((expected * weight).sum(), full)
    for a, b in zip(mine, theirs, strict=True):
        assert (a.float() - b).norm() < 0.02 * b.norm()
