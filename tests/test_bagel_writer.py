"""Writing token by token in place: portions, forks, and on a GPU the captured step."""

import contextlib
import types

import pytest
import torch

from clear_adapters.backbones import graphs, writer
from clear_adapters.backbones.bagel import autoencoder
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.backbones.base import Restoration
from clear_adapters.replay import pieces
from clear_adapters.sampling import TextSampling
from tests.scripted import make_engine, picture

WARM = TextSampling(max_new_tokens=21, temperature=1.0)
SIZES = [(64, 48), (48, 64), (64, 48)]


@pytest.fixture(scope="module")
def backbone():
    return build(0)


def context_of(backbone, seeds=(3, 4, 5)):
    context = backbone.start(len(seeds), list(seeds))
    images = [backbone.prepare(picture(i, SIZES[i])) for i in range(len(seeds))]
    context = backbone.read_image(context, images)
    return backbone.read_text(
        context, [backbone.encode_text("What is it?"[: 5 + i]) for i in range(len(seeds))]
    )


def same(a, b, tolerance=1e-5):
    for x, y in zip(a, b, strict=True):
        assert x.ids.tolist() == y.ids.tolist()
        torch.testing.assert_close(x.logprobs, y.logprobs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("portion", [1, 4, 21, 64])
def test_room_is_made_in_portions_of_any_size(backbone, monkeypatch, portion):
    context = context_of(backbone)
    after, expected = backbone.write_text(context.fork(), WARM)
    monkeypatch.setattr(writer, "_PORTION", portion)
    other, found = backbone.write_text(context.fork(), WARM)
    same(found, expected)
    assert other.position.tolist() == after.position.tolist()
    assert other.random.counts.tolist() == after.random.counts.tolist()
    same(backbone.write_text(other, WARM)[1], backbone.write_text(after, WARM)[1])


def test_a_context_that_was_written_behind_stays_as_it_was(backbone):
    context = context_of(backbone)
    first = backbone.write_text(context.fork(), WARM)[1]
    held = context.valid.clone(), context.position.clone(), context.random.counts.clone()
    same(backbone.write_text(context.fork(), WARM)[1], first)
    assert torch.equal(context.valid, held[0])
    assert torch.equal(context.position, held[1])
    assert torch.equal(context.random.counts, held[2])


def test_forks_do_not_meet_while_they_write(backbone):
    """Two that write in turns, and one that reads while another writes."""
    context = context_of(backbone)
    expected = backbone.write_text(context.fork(), WARM)[1]
    first, second = (backbone.write_text_steps(context.fork(), WARM) for _ in range(2))
    found = {}
    running = {"first": first, "second": second}
    while running:
        for name, steps in list(running.items()):
            try:
                next(steps)
                if name == "first":
                    backbone.read_text(context.fork(), [backbone.encode_text("something else")] * 3)
            except StopIteration as end:
                found[name] = end.value[1]
                del running[name]
    same(found["first"], expected)
    same(found["second"], expected)


def test_rows_that_are_not_named_get_holes_and_draw_nothing(backbone):
    context = context_of(backbone)
    after, (own,) = backbone.write_text(context.fork(), WARM, rows=[1])
    same([own], [backbone.write_text(context.select([1]), WARM)[1][0]])
    assert after.position[[0, 2]].tolist() == context.position[[0, 2]].tolist()
    assert not after.valid[[0, 2], context.length :].any()
    assert after.random.counts[[0, 2]].tolist() == context.random.counts[[0, 2]].tolist()


def test_pictures_that_rows_share_are_embedded_once(backbone):
    """And every row reads what it would read alone."""
    image = picture(0)
    transcripts = make_engine(backbone).rollout([image], ["What?"], seeds=[1, 2, 3], group=3, text=WARM)
    prepared = backbone.prepare(image)

    def packed(prepare):
        batch = backbone.pack([pieces(t, prepare=prepare) for t in transcripts])
        return backbone.encode(batch, noise=torch.zeros_like(batch.latents))

    shared, apart = packed(lambda _: prepared), packed(backbone.prepare)
    assert len(shared.patches) == 1
    assert len(apart.patches) == 3
    with torch.no_grad():
        a, b = backbone.forward(shared), backbone.forward(apart)
    torch.testing.assert_close(a.text_logits, b.text_logits, atol=1e-5, rtol=0)


def test_pixels_of_restorations_stay_with_them(backbone):
    """Those of one grid are decoded together and once, and a replay re-encodes what the rollout did."""
    engine = make_engine(backbone)
    transcripts = engine.rollout(
        [picture(i, SIZES[i]) for i in range(3)], ["What?"] * 3, seeds=[1, 2, 3], restore="always", text=WARM
    )
    found = [t.restorations[0].restoration for t in transcripts]
    alone = [backbone.decode(r)[0] for r in found]
    calls, decode = [], backbone.decode
    backbone.decode = lambda restoration: calls.append(restoration.rows) or decode(restoration)
    try:
        images = backbone.decode_each(found)
        assert backbone.decode_each(found) == images
    finally:
        del backbone.decode
    assert sorted(calls) == [1, 2]
    for image, own in zip(images, alone, strict=True):
        assert image.size == own.size
        assert max(abs(a - b) for a, b in zip(image.tobytes(), own.tobytes(), strict=True)) <= 1


@pytest.mark.parametrize("tokens", [1, 8, 21])
def test_the_room_of_a_turn_ends_at_a_multiple_of_eight(backbone, monkeypatch, tokens):
    ends, opened = [], writer.Writer._open

    def opening(self, context):
        opened(self, context)
        ends.append(self._mask.shape[-1])

    monkeypatch.setattr(writer, "_PORTION", 8)
    monkeypatch.setattr(writer.Writer, "_open", opening)
    context = context_of(backbone)
    assert context.length % 8
    found = backbone.write_text(context.fork(), TextSampling(max_new_tokens=tokens, temperature=1.0))[1]
    assert all(len(s.ids) <= tokens for s in found)
    assert ends
    assert not any(end % 8 for end in ends)


def test_pictures_go_through_the_autoencoder_in_portions(backbone, monkeypatch):
    images = [backbone.prepare(picture(i)) for i in range(5)]
    whole = Restoration.joined(backbone.encode_images(images))
    drawn = backbone.decode(whole)
    seen = []
    encode = backbone.autoencoder.encode
    monkeypatch.setattr(backbone.autoencoder, "encode", lambda x: seen.append(len(x)) or encode(x))
    monkeypatch.setattr(autoencoder, "_PIXELS", 2 * images[0].size[0] * images[0].size[1])
    parts = Restoration.joined(backbone.encode_images(images))
    assert seen == [2, 2, 1]
    torch.testing.assert_close(parts.latent, whole.latent, atol=1e-5, rtol=0)
    for a, b in zip(backbone.decode(whole), drawn, strict=True):
        assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_a_captured_step_writes_what_an_uncaptured_one_does(rows, monkeypatch):
    backbone = build(0)
    for part in (backbone.model, backbone.autoencoder):
        part.to("cuda")
    context = context_of(backbone)
    monkeypatch.setitem(writer._PORTIONS, "cuda", 8)
    graphs, capture = [], writer.Writer._captured
    monkeypatch.setattr(writer.Writer, "_captured", lambda self: graphs.append(capture(self)) or graphs[-1])
    found = backbone.write_text(context.fork(), WARM, rows=rows)[1]
    assert len(graphs) == 2  # room for fifteen tokens behind 73, to a multiple of eight, then for eight more
    assert backbone._warm == {3}
    steps, step = [], writer.Writer._step
    monkeypatch.setattr(writer.Writer, "_step", lambda self: steps.append(step(self)))
    same(found, backbone.write_text(context.fork(), WARM, rows=rows)[1])
    assert len(steps) == 2  # captured, and never run as it is
    monkeypatch.setattr(writer.Writer, "_captured", lambda self: None)
    same(found, backbone.write_text(context.fork(), WARM, rows=rows)[1])


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_that_has_run_before_is_captured_at_once(backbone, monkeypatch, fails):
    """And where that fails it runs first, as a new one does."""
    context = context_of(backbone)
    expected = backbone.write_text(context.fork(), WARM)[1]
    events, step = [], writer.Writer._step

    class Graph:
        def __init__(self, owner):
            self.owner = owner

        def replay(self):
            step(self.owner)

    def captured(self):
        events.append("capture")
        if fails and len(self.feed) in self._warm:
            self._warm.clear()
            return None
        return Graph(self)

    monkeypatch.setattr("clear_adapters.backbones.bagel.backbone.can_capture", lambda model, device: True)
    monkeypatch.setattr(writer.Writer, "_captured", captured)
    monkeypatch.setattr(writer.Writer, "_step", lambda self: events.append("step") or step(self))
    monkeypatch.setattr(backbone, "_warm", set())
    same(backbone.write_text(context.fork(), WARM)[1], expected)
    assert events == ["step", "capture"]
    assert backbone._warm == {3}
    events.clear()
    same(backbone.write_text(context.fork(), WARM)[1], expected)
    assert events == (["capture", "step", "step", "capture"] if fails else ["capture"])
    assert backbone._warm == {3}


def test_a_step_that_cannot_be_captured_runs_as_it_is(backbone, monkeypatch, caplog):
    context = context_of(backbone)
    expected = backbone.write_text(context.fork(), WARM)[1]
    tries = []

    def refuse(work, device):
        tries.append(device)
        raise RuntimeError("no graph of this step")

    monkeypatch.setattr("clear_adapters.backbones.bagel.backbone.can_capture", lambda model, device: True)
    monkeypatch.setattr(writer, "capture", refuse)
    graphs.tell.cache_clear()
    monkeypatch.setattr(backbone, "_warm", {3})
    same(backbone.write_text(context.fork(), WARM)[1], expected)
    # At once, since such a step has run; then behind one that runs; then no more.
    assert len(tries) == 2
    assert backbone._warm == set()
    assert [r.getMessage().count("no graph of this step") for r in caplog.records] == [1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_capture_ends_by_whatever_error(monkeypatch, error):
    calls = []

    class Graph:
        def capture_begin(self, **more):
            calls.append("begin")

        def capture_end(self):
            calls.append("end")

        def pool(self):
            return None

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(
        graphs, "_capturing", lambda device: types.SimpleNamespace(stream=stream, keeper=Graph())
    )

    def work():
        raise error

    with pytest.raises(error):
        graphs.capture(work, torch.device("cuda"))
    assert calls == ["begin", "end"]
