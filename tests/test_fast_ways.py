"""The fast ways give what the plain ones give: on a CPU each is taken by order, on a GPU by itself."""

import contextlib
import gc
import threading
import types
import weakref

import pytest
import torch
from peft.tuners.lora.layer import Linear

from clear_adapters import attach
from clear_adapters.backbones import fast, graphs, writer
from clear_adapters.backbones.bagel import backbone as bagel
from clear_adapters.backbones.bagel import flow
from clear_adapters.backbones.bagel.model import attend_by_products
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.backbones.joined import join
from clear_adapters.backbones.rows import Rows
from clear_adapters.config import LoraSettings
from clear_adapters.engine import Engine
from clear_adapters.errors import AttachError, ClearValueError
from clear_adapters.lora import ADAPTER_NAME
from clear_adapters.lora_linear import LeanLinear
from clear_adapters.sampling import LatentSampling, TextSampling
from clear_adapters.transcript import Origin, TextSegment
from tests.scripted import picture

SIZES = [(64, 48), (48, 64), (32, 32)]
GUIDED = LatentSampling(steps=5)
SDE = LatentSampling(steps=5, guidance_text=1, guidance_image=1, sde_sigma=0.3)
TEXT = TextSampling(max_new_tokens=9, temperature=1.0)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def attached_of(device="cpu", layers=2):
    """The toy with an update that does something."""
    backbone = build(0, layers=layers)
    for part in (backbone.model, backbone.autoencoder):
        part.to(device)
    attached = attach(backbone)
    generator = torch.Generator().manual_seed(0)
    for layer in attached.lora.layers.values():
        weight = layer.lora_B[ADAPTER_NAME].weight
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return attached


@pytest.fixture(scope="module")
def attached():
    return attached_of()


def rollouts(attached, latent=GUIDED, rows=3):
    """Rows of three grids and three lengths, restored and written."""
    return Engine(attached.backbone, attached.bridge).rollout(
        [picture(i, SIZES[i]) for i in range(rows)],
        ["What is it?"[: 5 + i] for i in range(rows)],
        seeds=list(range(1, rows + 1)),
        restore="always",
        text=TEXT,
        latent=latent,
    )


def assert_same(found, expected, tolerance=1e-4):
    for a, b in zip(found, expected, strict=True):
        one, other = a.restorations[0].restoration, b.restorations[0].restoration
        torch.testing.assert_close(one.latent, other.latent, atol=tolerance, rtol=0)
        if other.trace is not None:
            torch.testing.assert_close(one.trace.logprobs, other.trace.logprobs, atol=tolerance, rtol=0)
        for x, y in zip(texts(a), texts(b), strict=True):
            assert x.ids.tolist() == y.ids.tolist()
            torch.testing.assert_close(x.logprobs, y.logprobs, atol=tolerance, rtol=0)


def texts(transcript):
    return [s for s in transcript if isinstance(s, TextSegment) and s.origin is Origin.SAMPLED]


@pytest.mark.parametrize("latent", [GUIDED, SDE], ids=["guided", "sde"])
@pytest.mark.parametrize("way", [*fast.WAYS, "all"])
def test_a_fast_way_gives_what_the_plain_one_gives(attached, way, latent):
    with fast.switched(*fast.WAYS, on=False):
        expected = rollouts(attached, latent)
    with fast.switched(*(fast.WAYS if way == "all" else [way]), on=True):
        assert_same(rollouts(attached, latent), expected)


def test_flow_steps_alone_take_kernels_that_are_made_for_one_shape(attached, monkeypatch):
    seen, attention = set(), torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **more):
        seen.add(
            (
                more.get("attn_mask") is None and k.shape[2] > q.shape[2],
                torch.backends.cuda.cudnn_sdp_enabled(),
            )
        )
        return attention(q, k, v, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with fast.switched("rows", on=True):
        rollouts(attached)
    # A block behind a context without a mask is one of a flow.
    assert seen == {(True, True), (False, False)}


def test_which_ways_a_device_takes():
    for way in fast.WAYS:
        assert fast.takes(way, torch.device("cuda")) == (way in fast.PROVEN)
        assert not fast.takes(way, torch.device("cpu"))
        with fast.switched(way, on=True):
            assert fast.takes(way, torch.device("cpu"))
        with contextlib.suppress(RuntimeError), fast.switched(way, on=False):
            assert not fast.takes(way, torch.device("cuda"))
            raise RuntimeError
        assert fast.takes(way, torch.device("cuda")) == (way in fast.PROVEN)


# -- LoRA


def test_lora_adds_into_the_output_with_the_same_gradients(attached):
    layer = next(iter(attached.lora.layers.values()))
    assert type(layer) is LeanLinear
    given = torch.randn(7, layer.in_features, requires_grad=True)
    parameters = [layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight, given]

    def run(x):
        out = layer(x)
        return out.detach(), torch.autograd.grad(out.square().sum(), parameters)

    plain, plain_gradients = run(given)
    with fast.switched("lora", on=True):
        lean, gradients = run(given)
        torch.testing.assert_close(layer(given[None, None]), lean[None, None])
        with torch.no_grad():
            torch.testing.assert_close(layer(given), plain)
            # In 16 bits the update is not rounded on its own.
            torch.testing.assert_close(layer(given).bfloat16(), plain.bfloat16())
    torch.testing.assert_close(lean, plain)
    for a, b in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_lora_that_is_off_or_drops_its_input_goes_its_own_way():
    attached = attached_of()
    layer = next(iter(attached.lora.layers.values()))
    x = torch.randn(3, layer.in_features)
    with fast.switched("lora", on=True):
        with attached.disabled():
            assert torch.equal(layer(x), layer.get_base_layer()(x))
        layer.lora_dropout[ADAPTER_NAME] = torch.nn.Dropout(0.9)
        held = layer.eval()(x)
        assert not torch.equal(layer.train()(x), held)


def test_folded_weights_answer_alike_and_come_back(attached):
    layers = [layer.get_base_layer() for layer in attached.lora.layers.values()]
    held, values = [x.weight for x in layers], [x.weight.clone() for x in layers]
    expected = rollouts(attached)
    with attached.folded():
        assert all(x.weight is not w for x, w in zip(layers, held, strict=True))
        assert_same(rollouts(attached), expected)
    assert all(x.weight is w and torch.equal(w, v) for x, w, v in zip(layers, held, values, strict=True))
    assert_same(rollouts(attached), expected, tolerance=0)
    with attached.disabled():
        before = attached.engine.rollout([picture(0)], ["What?"], seeds=[1], text=TEXT)
        with attached.folded():
            after = attached.engine.rollout([picture(0)], ["What?"], seeds=[1], text=TEXT)
    assert texts(after[0])[0].ids.tolist() == texts(before[0])[0].ids.tolist()


def test_folding_goes_together_with_switching_off_and_folding_again(attached):
    layers = [layer.get_base_layer() for layer in attached.lora.layers.values()]
    held = [x.weight for x in layers]
    expected = rollouts(attached)
    with attached.disabled():
        plain = rollouts(attached)
    with attached.folded():
        with attached.disabled():
            assert_same(rollouts(attached), plain, tolerance=0)
        assert_same(rollouts(attached), expected)
        with attached.folded():
            assert_same(rollouts(attached), expected)
        assert_same(rollouts(attached), expected)
        with pytest.raises(AttachError, match="folded"):
            attached.merge(keep_bridge=True)
    assert all(x.weight is w for x, w in zip(layers, held, strict=True))
    assert_same(rollouts(attached), expected, tolerance=0)
    # Left in another order.
    with contextlib.ExitStack() as off:
        with attached.folded():
            off.enter_context(attached.disabled())
        assert_same(rollouts(attached), plain, tolerance=0)
    assert_same(rollouts(attached), expected, tolerance=0)


def test_folding_refuses_what_would_ruin_the_weights():
    attached = attached_of()
    layer = next(iter(attached.lora.layers.values()))
    weight = layer.get_base_layer().weight
    layer.lora_A[ADAPTER_NAME].weight.data[0, 0] = float("nan")
    with pytest.raises(ClearValueError, match="not finite"), attached.folded():
        pass
    assert layer.get_base_layer().weight is weight
    assert not layer.disable_adapters


# -- attention


@pytest.mark.parametrize("rows", [1, 3])
def test_products_are_attention(rows):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, 2, 7, 16, generator=generator)
    store = torch.randn(2, rows, 2, 60, 16, generator=generator)
    k, v = store[..., :50, :]
    mask = torch.rand(rows, 1, 1, 50, generator=generator) > 0.3
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attend_by_products(q, k, v, bias), expected, atol=1e-5, rtol=0)
    half = [x.bfloat16() for x in (q, k, v)]
    found = attend_by_products(*half, bias).float()
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_text_in_16_bits_takes_products_and_is_close():
    backbone = build(0)
    backbone.model.bfloat16()
    context = backbone.start(2, [1, 2])
    context = backbone.read_text(context, [backbone.encode_text("What is it?")] * 2)
    expected = backbone.write_text(context.fork(), TextSampling(max_new_tokens=1))[1]
    with fast.switched("products", on=True):
        found = backbone.write_text(context.fork(), TextSampling(max_new_tokens=1))[1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=0.05, rtol=0)


def seen_by(context, row, tokens, k, v):
    """Keys and values (2, kv_heads, entries, d) of the second layer that a row's block attends to."""
    held = context.cache.read(context.length)[1, :, row, :, context.valid[row]]
    return torch.cat([held, torch.stack([k, v])[:, :, :tokens]], 2)


def test_a_block_attends_to_its_rows_context_and_to_itself(attached):
    b = attached.backbone
    context = b.read_text(b.start(3, [1, 2, 3]), [b.encode_text("abcdefg"[:n]) for n in (3, 7, 3)])
    holes = b.read_text(context.hide([1], 5), [b.encode_text("xy")] * 3)
    contexts, tokens = [context, holes], [4, 6, 5]
    rows = Rows(contexts, tokens)
    decoder = b.model.language_model.model.layers[1].self_attn
    q = torch.randn(6, decoder.heads, 6, decoder.head_dim)
    k, v = torch.randn(2, 6, decoder.kv_heads, 6, decoder.head_dim)
    for some, count in ((rows, 6), (rows.first(1), 3), (rows, 6)):
        found = some.attend(1, *(x[:count] for x in (q, k, v)))
        assert sum(len(x) for x in found) == count
        for row, out in enumerate(torch.cat(found)):
            own, length = contexts[row // 3], tokens[row % 3]
            keys, values = (
                x.repeat_interleave(decoder.heads // decoder.kv_heads, 0)
                for x in seen_by(own, row % 3, length, k[row], v[row])
            )
            expected = torch.nn.functional.scaled_dot_product_attention(q[row], keys, values)
            torch.testing.assert_close(out[:length].transpose(0, 1), expected[:, :length])


def test_rows_that_see_the_same_places_attend_together(attached):
    b = attached.backbone
    context = b.read_text(b.start(4, range(4)), [b.encode_text("abcdefg"[:n]) for n in (3, 3, 5, 5)])
    attention = b.model.language_model.model.layers[0].self_attn
    q = torch.zeros(4, attention.heads, 6, attention.head_dim)
    kv = torch.zeros(2, 4, attention.kv_heads, 6, attention.head_dim)
    found = [
        [len(x) for x in Rows([context], tokens).attend(0, q, *kv)] for tokens in ([6] * 4, [6, 6, 6, 4])
    ]
    assert found == [[2, 2], [2, 1, 1]]


# -- the end of a turn


class Replayed:
    """A captured step, as far as a CPU has one."""

    def __init__(self, step):
        self.replay = step


@pytest.mark.parametrize("portion", [4, 9, 64])
@pytest.mark.parametrize("limit", [1, 8, 9])
def test_the_captured_step_reads_the_end_of_a_turn(attached, monkeypatch, portion, limit):
    """Cut off or not, the context is the one that reading token by token gives."""
    b, sampling = attached.backbone, TextSampling(max_new_tokens=limit, temperature=1.5)
    context = b.read_text(b.start(3, [1, 2, 3]), [b.encode_text("abcdefg"[:n]) for n in (3, 7, 3)])

    def choose(logits, settings, random, active=None):
        token, logprob = real(logits, settings, random, active)
        ends = (random.counts == 5) & (random.seeds == 2)
        return torch.where(ends, b.end_id, token), logprob

    real = writer.choose_token
    monkeypatch.setattr(writer, "choose_token", choose)
    monkeypatch.setattr(writer, "_PORTION", portion)
    after, expected = b.write_text(context.fork(), sampling, rows=[0, 1])
    monkeypatch.setattr("clear_adapters.backbones.bagel.backbone.can_capture", lambda model, device: True)
    monkeypatch.setattr(writer.Writer, "_captured", lambda self: Replayed(self._step))
    finished, finish = [], writer.Writer.finish
    monkeypatch.setattr(writer.Writer, "finish", lambda self: finished.append(finish(self)) or finished[-1])
    with fast.switched("last", on=True):
        other, found = b.write_text(context.fork(), sampling, rows=[0, 1])
    assert finished == [True]
    for x, y in zip(found, expected, strict=True):
        assert x.ids.tolist() == y.ids.tolist()
        torch.testing.assert_close(x.logprobs, y.logprobs, atol=1e-5, rtol=0)
    assert other.position.tolist() == after.position.tolist()
    assert other.random.counts.tolist() == after.random.counts.tolist()
    assert other.valid.sum(1).tolist() == after.valid.sum(1).tolist()
    more, less = (b.write_text(c, sampling)[1] for c in (other, after))
    for x, y in zip(more, less, strict=True):
        assert x.ids.tolist() == y.ids.tolist()
        torch.testing.assert_close(x.logprobs, y.logprobs, atol=1e-5, rtol=0)


# -- layers of one input as one product


def parts_of(attached, index=0):
    layer = attached.backbone.model.language_model.model.layers[index]
    return [getattr(layer.self_attn, f"{n}_proj") for n in "qkv"]


def test_joined_layers_give_what_each_gives():
    attached = attached_of()
    layers = parts_of(attached)
    held = [x.base_layer.weight for x in layers]
    values = [w.clone() for w in held]
    x = torch.randn(5, layers[0].in_features)
    with torch.no_grad(), fast.switched("lora", on=True):
        apart = [layer(x) for layer in layers]
        joined = join(layers)
        torch.testing.assert_close(joined(x), torch.cat(apart, -1))
        with attached.disabled():
            plain = join(layers)
            assert plain.first is None
            torch.testing.assert_close(plain(x), torch.cat([layer.base_layer(x) for layer in layers], -1))
        # The same parameters with the same values, of which the joined tensor is no copy; joined again they stay in place.
        assert all(layer.base_layer.weight is w for layer, w in zip(layers, held, strict=True))
        assert all(torch.equal(w, v) for w, v in zip(held, values, strict=True))
        assert join(layers).weight.data_ptr() == joined.weight.data_ptr() == held[0].data_ptr()
        held[1].add_(1)
        layers[2].lora_B[ADAPTER_NAME].weight.add_(1)
        assert torch.equal(joined.weight[len(held[0]) :][: len(held[1])], held[1])
        torch.testing.assert_close(join(layers)(x), torch.cat([layer(x) for layer in layers], -1))


def test_layers_that_differ_stay_apart():
    attached = attached_of()
    layers = parts_of(attached)
    held = [x.base_layer.weight for x in layers]
    assert join([layers[0].base_layer, layers[1]]) is None
    assert join([layers[0], torch.nn.Identity()]) is None
    layers[1].lora_dropout[ADAPTER_NAME] = torch.nn.Dropout(0.5)
    layers[1].train()
    assert join(layers) is None
    layers[1].eval()
    layers[2].base_layer.weight = torch.nn.Parameter(held[2].detach().double())
    assert join(layers) is None
    layers[2].base_layer.weight = held[2]
    layers[1].__class__ = Linear  # of stock PEFT
    assert join(layers) is None
    layers[1].__class__ = LeanLinear
    layers[0].merge()
    with attached.disabled():
        assert join(layers) is None  # PEFT takes the update out before it computes
    layers[0].unmerge()
    assert all(layer.base_layer.weight is w for layer, w in zip(layers, held, strict=True))
    assert join(layers) is not None


def test_a_layer_that_is_not_made_of_plain_products_goes_the_plain_way(caplog):
    attached = attached_of()
    expected = rollouts(attached)
    decoder = attached.backbone.model.language_model.model
    decoder.layers[1].mlp.down_proj.__class__ = Linear
    attached.backbone.set_compiled(True, "eager")
    with fast.switched("rows", on=True):
        assert decoder.experts(both=False) is None
        assert "are not compiled" in caplog.text
        assert_same(rollouts(attached), expected)
    decoder.layers[1].mlp.down_proj.__class__ = LeanLinear
    assert decoder.experts(both=False) is not None
    attached.detach()


def test_joining_in_inference_mode_leaves_parameters_that_can_be_trained():
    attached = attached_of()
    layers = parts_of(attached)
    with torch.inference_mode():
        join(layers)
    assert not layers[0].base_layer.weight.is_inference()
    x = torch.randn(5, layers[0].in_features, requires_grad=True)
    layers[0](x).sum().backward()
    assert layers[0].lora_B[ADAPTER_NAME].weight.grad is not None
    attached.detach()


def test_nothing_of_folded_weights_stays():
    attached = attached_of()
    attached.backbone.set_compiled(True, "eager")
    with fast.switched("rows", on=True):
        with attached.folded():
            rollouts(attached, rows=1)
            folded = [weakref.ref(layer.base_layer.weight) for layer in parts_of(attached)]
            held = parts_of(attached)[0].base_layer.weight.untyped_storage()._weak_ref()
        gc.collect()
        assert not any(weight() is not None for weight in folded)
        assert torch.UntypedStorage._expired(held)


def test_a_flow_that_is_done_leaves_nothing(attached, monkeypatch):
    made, passes = [], bagel.flow_passes
    monkeypatch.setattr(
        bagel, "flow_passes", lambda *given: made.append(weakref.ref(own := passes(*given))) or own
    )
    monkeypatch.setattr(flow, "can_capture", lambda model, device: True)
    monkeypatch.setattr(writer.Writer, "_captured", lambda self: None)
    monkeypatch.setattr(graphs, "capture", lambda work, device: types.SimpleNamespace(replay=lambda: None))
    gc.disable()
    try:
        with fast.switched("rows", on=True):
            rollouts(attached, rows=1)
        assert [own() for own in made] == [None]
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_autocast_that_begins_within_a_turn_takes_the_plain_way(attached):
    b = attached.backbone
    context = b.read_text(b.start(1, [1]), [b.encode_text("What is it?")])
    sampling = TextSampling(max_new_tokens=3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = b.write_text(context.fork(), sampling)[1]
    b.set_compiled(True, "eager")
    ends, begun = [], b.write_text_steps(context.fork(), sampling)

    def watched():
        ends.append((yield from begun))

    with torch.autocast("cpu", torch.bfloat16):
        for _ in watched():
            pass
    assert ends[0][1][0].ids.tolist() == expected[0].ids.tolist()
    b.set_compiled(False)


# -- work that is done again and again


def test_repeated_work_is_captured_when_it_comes_again(monkeypatch, caplog):
    done = []

    class Graph:
        def replay(self):
            done.append("replayed")

    monkeypatch.setattr(graphs, "capture", lambda work, device: done.append("captured") or Graph())
    repeated = graphs.Repeated(torch.device("cpu"), "a step")

    def fail():
        raise KeyError

    with pytest.raises(KeyError):
        repeated(fail)
    for _ in range(3):
        repeated(lambda: done.append("done"))
    assert done == ["done", "captured", "replayed", "replayed"]

    def refuse(work, device):
        done.append("refused")
        raise RuntimeError("no graph of this kind")

    done.clear()
    monkeypatch.setattr(graphs, "capture", refuse)
    graphs.tell.cache_clear()
    repeated = graphs.Repeated(torch.device("cpu"), "a step")
    for _ in range(3):
        repeated(lambda: done.append("done"))
    assert done == ["done", "refused", "done", "done"]
    assert [r.getMessage().count("no graph of this kind") for r in caplog.records] == [1]


@pytest.mark.parametrize("latent", [GUIDED, SDE], ids=["guided", "sde"])
def test_captured_steps_of_a_flow_give_what_others_do(attached, monkeypatch, latent):
    """As far as a CPU can tell: everything they read and write stays in place."""
    with fast.switched("rows", on=True):
        expected = rollouts(attached, latent)
        replayed = []

        class Graph:
            def __init__(self, work):
                self.work = work

            def replay(self):
                replayed.append(self.work())

        monkeypatch.setattr(graphs, "capture", lambda work, device: Graph(work))
        monkeypatch.setattr(flow, "can_capture", lambda model, device: True)
        monkeypatch.setattr(writer.Writer, "_captured", lambda self: None)
        assert_same(rollouts(attached, latent), expected, tolerance=0)
        assert len(replayed) == 3  # of four passes
        monkeypatch.setattr(flow, "_CAPTURED", 8)
        replayed.clear()
        rollouts(attached, latent)
    assert not replayed


# -- compiled


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_compiled_model_answers_alike_and_is_compiled_a_few_times():
    from torch._dynamo.testing import CompileCounterWithBackend

    attached = attached_of(layers=3)
    expected, alone = rollouts(attached), rollouts(attached, rows=1)
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    attached.backbone.set_compiled(True, counter)
    try:
        with fast.switched(*fast.WAYS, on=True):
            assert_same(rollouts(attached), expected)
            assert_same(rollouts(attached, rows=1), alone)
            count = counter.frame_count
            # Of text for one row and for several, what enters a layer and what leaves it; of flows one of each.
            assert count == 6
            rollouts(attached, rows=2)
            with attached.folded():
                assert_same(rollouts(attached), expected)
                assert_same(rollouts(attached, rows=1), alone)
            assert_same(rollouts(attached), expected)
            # Once more without LoRA, and what is read: two of text, and latents of one row.
            assert counter.frame_count == 2 * count + 3
    finally:
        torch._dynamo.reset()
    attached.detach()
    assert attached.backbone.model.language_model.model.compiled is None


def test_every_adapter_is_compiled():
    """A setting of few forms in a process, which the compiler has too, is not the end of it."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    backbone, counted = build(0, layers=2), []
    context = backbone.read_text(backbone.start(1, [1]), [backbone.encode_text("What?")])
    try:
        for rank in (1, 2, 3):
            counter = CompileCounterWithBackend("eager")
            attached = attach(backbone, lora=LoraSettings({"understanding": rank}))
            backbone.set_compiled(True, counter)
            with torch._dynamo.config.patch(recompile_limit=1):
                backbone.write_text(context.fork(), TextSampling(max_new_tokens=1))
            counted.append(counter.frame_count)
            attached.detach()
    finally:
        torch._dynamo.reset()
    assert counted == [2, 2, 2]  # what enters a layer, and what leaves it


def test_a_compiled_model_is_folded_in_inference_mode():
    attached = attached_of()
    expected = rollouts(attached)
    attached.backbone.set_compiled(True, "eager")
    with fast.switched(*fast.WAYS, on=True), torch.inference_mode(), attached.folded():
        assert_same(rollouts(attached), expected)
    attached.detach()


def test_compiled_text_in_16_bits_is_close():
    """Where attention is two products with compiled weights between them."""
    backbone = build(0)
    backbone.model.bfloat16()
    context = backbone.start(2, [1, 2])
    context = backbone.read_text(context, [backbone.encode_text(t) for t in ("What is it?", "What?")])
    sampling = TextSampling(max_new_tokens=1)
    with fast.switched("products", on=True):
        expected = backbone.write_text(context.fork(), sampling)[1]
        backbone.set_compiled(True, "eager")
        weighed, weigh = [], backbone.model.language_model.model.compiled._weights
        backbone.model.language_model.model.compiled._weights = lambda *a: (
            weighed.append(weigh(*a)) or weighed[-1]
        )
        found = backbone.write_text(context.fork(), sampling)[1]
    assert len(weighed) >= backbone.layers
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=0.05, rtol=0)


def test_a_family_that_compiles_nothing_says_so():
    from clear_adapters.backbones.janus.tiny import build as janus

    attached = attach(janus(0))
    with pytest.raises(ClearValueError, match="does not compile"):
        attached.compile()
    attached.compile(False)
    attached.detach()


def test_nothing_is_compiled_in_a_capture():
    try:
        double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
        assert double(torch.ones(2)).sum() == 4
        with graphs.without_compiling():
            assert double(torch.ones(2)).sum() == 4
            with pytest.raises(RuntimeError, match="recompile"):
                double(torch.ones(3))
        assert double(torch.ones(3)).sum() == 6
    finally:
        torch._dynamo.reset()


def test_the_compiler_goes_on_after_captures_that_meet():
    """It is told for the whole process: one that came in between would put back what the other had set."""
    inside, leave, met, left = (threading.Event() for _ in range(4))
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)

    def first():
        with graphs.without_compiling():
            inside.set()
            leave.wait(60)

    def second():
        with graphs.without_compiling():
            met.set()
            left.wait(60)

    threads = [threading.Thread(target=work) for work in (first, second)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    assert not met.wait(0.3)
    leave.set()
    threads[0].join(60)
    assert met.wait(60)
    left.set()
    threads[1].join(60)
    try:
        assert double(torch.ones(2)).sum() == 4
    finally:
        torch._dynamo.reset()


# -- on a GPU


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("latent", [GUIDED, SDE], ids=["guided", "sde"])
@pytest.mark.parametrize("way", [*fast.WAYS, "all"])
def test_a_fast_way_on_a_gpu(way, latent):
    attached = attached_of("cuda")
    with fast.switched(*fast.WAYS, on=False):
        expected = rollouts(attached, latent)
    with fast.switched(*(fast.WAYS if way == "all" else [way]), on=True):
        assert_same(rollouts(attached, latent), expected, tolerance=1e-3)


@pytest.mark.gpu
@GPU
def test_products_on_a_gpu():
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, 4, n, 128, device="cuda", generator=generator).bfloat16() for n in (7, 900, 900)
    )
    mask = torch.rand(2, 1, 1, 900, device="cuda", generator=generator) > 0.3
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=mask
    )
    bias = torch.zeros(mask.shape, device="cuda").masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attend_by_products(q, k, v, bias).float(), expected, atol=0.02, rtol=0)


@pytest.mark.gpu
@GPU
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_model_on_a_gpu():
    attached = attached_of("cuda")
    expected = rollouts(attached)
    attached.compile()
    try:
        for _ in range(2):  # the second time what was compiled is captured at once
            assert_same(rollouts(attached), expected, tolerance=1e-3)
        with attached.folded():  # what is compiled now is another form, and it is met in a capture
            for _ in range(2):
                assert_same(rollouts(attached), expected, tolerance=1e-3)
        assert_same(rollouts(attached), expected, tolerance=1e-3)
    finally:
        torch._dynamo.reset()


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_capture_that_fails_leaves_the_device_as_it_was(error):
    x = torch.zeros(3, device="cuda")

    def fail():
        x.add_(1)
        raise error

    with pytest.raises(error):
        graphs.capture(fail, x.device)
    assert float(x.sum()) == 0
    graphs.capture(lambda: x.add_(1), x.device).replay()
    assert float(x.sum()) == 3


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("latent", [GUIDED, SDE], ids=["guided", "sde"])
def test_captured_steps_of_a_flow_on_a_gpu(monkeypatch, latent):
    attached = attached_of("cuda")
    captured, capture = [], graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda *given: captured.append(capture(*given)) or captured[-1])
    found = rollouts(attached, latent)
    assert len(captured) == 1
    again = rollouts(attached, latent)
    monkeypatch.setattr(flow, "_CAPTURED", 0)
    expected = rollouts(attached, latent)
    assert_same(found, expected)
    assert_same(again, expected)
    assert len(captured) == 2
