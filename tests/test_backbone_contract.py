"""What every registered backbone must do (invariants 1 to 6, 9, 11, 12), on the real classes at toy size.

Adding an entry to the registry adds its tests; its adapted modules must be stated in `ADAPTED`. LoRA and bridge are
filled with random weights wherever an update of zero would prove nothing.
"""

import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from clear_adapters import adapter as adapter_module
from clear_adapters.adapter import attach
from clear_adapters.attached import AttachedModel
from clear_adapters.backbones import backbone_class, find_for_model, get_backbone, list_backbones, resolve
from clear_adapters.backbones.bagel import backbone as bagel
from clear_adapters.backbones.packed import LatentPiece, TextPiece
from clear_adapters.bridge import BridgeConfig
from clear_adapters.config import LoraSettings
from clear_adapters.contract import CHECKS, validate
from clear_adapters.contract.paths import (
    GREEDY,
    ODE,
    SMALL,
    TOLERANCE,
    WARM,
    ask,
    describe,
    difference,
    pictures,
    randomise,
    run,
)
from clear_adapters.errors import AttachError, BackboneMismatchError, ClearValueError
from clear_adapters.lora import ADAPTER_NAME, Lora
from clear_adapters.sampling import TextSampling, choose_token

BAGEL_PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
ADAPTED = {
    "bagel": {
        "understanding": {
            f"language_model.model.layers.{i}.{m}"
            for i in (0, 1)
            for m in [*BAGEL_PROJECTIONS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        },
        "generation": {
            f"language_model.model.layers.{i}.{m}"
            for i in (0, 1)
            for m in [
                *(f"{p}_moe_gen" for p in BAGEL_PROJECTIONS),
                *(f"mlp_moe_gen.{p}" for p in ("gate_proj", "up_proj", "down_proj")),
            ]
        },
    },
    "emu3": {
        "understanding": {
            f"model.text_model.layers.{i}.{m}"
            for i in (0, 1)
            for m in [*BAGEL_PROJECTIONS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        },
        "generation": {"lm_head"},
    },
    "janus": {
        "understanding": {
            f"model.language_model.layers.{i}.{m}"
            for i in (0, 1)
            for m in [*BAGEL_PROJECTIONS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        },
        "generation": {
            "model.generation_aligner.fc1",
            "model.generation_aligner.hidden_layers.0",
            "model.generation_head.proj_out",
            "model.generation_head.vision_head",
        },
    },
}
"""Every module that each group adapts in the toy of each family, written out and not derived from its spec."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Toys are too small for threads, which only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list_backbones())
def backbone(request):
    spec = get_backbone(request.param)
    return resolve(spec.tiny, spec)(0)


@pytest.fixture
def attached(backbone):
    model = randomise(attach(backbone, lora=SMALL))
    yield model
    if backbone.model in adapter_module.ATTACHED:
        model.detach()


# ------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize("name", list_backbones())
@pytest.mark.parametrize("check", CHECKS)
def test_check(name, check):
    """The checks that `clear-adapters validate` runs."""
    for result in validate(get_backbone(name), [check]):
        assert result.problem is None, result.problem


def test_every_backbone_states_its_modules():
    assert set(ADAPTED) == set(list_backbones())


def same(a, b, *, exact=True):
    found = difference(a, b, 0 if exact else TOLERANCE)
    assert found is None, found


def differ(a, b):
    assert difference(a, b, TOLERANCE) is not None


def test_spec(backbone):
    spec = backbone.spec
    assert get_backbone(spec.name) is spec
    assert type(backbone) is backbone_class(spec)
    assert find_for_model(backbone.model) is spec
    assert find_for_model(nn.Linear(1, 1)) is None
    assert {"understanding", "generation"} <= set(spec.groups)
    assert spec.checkpoints
    assert spec.license
    assert spec.sources
    for path in (*spec.extras, *spec.never):
        backbone.model.get_submodule(path)


def test_lora_names_are_the_stated_ones(backbone):
    never = tuple(f"{p}." for p in backbone.spec.never)
    for group, names in ADAPTED[backbone.spec.name].items():
        found = backbone.lora_names([group])
        assert len(found) == len(set(found))
        assert set(found) == names
        assert not [n for n in found if n.startswith(never)]
        assert all(isinstance(backbone.model.get_submodule(n), nn.Linear) for n in found)
    assert set(ADAPTED[backbone.spec.name]) == set(backbone.spec.groups)


@pytest.mark.parametrize("groups", [("understanding",), ("generation",), ("understanding", "generation")])
def test_exactly_the_named_modules_are_adapted(backbone, groups):
    ranks = {g: i + 2 for i, g in enumerate(groups)}
    attached = attach(backbone, lora=LoraSettings(ranks, alpha={g: 3.0 * r * r for g, r in ranks.items()}))
    try:
        adapted = {n: m for n, m in backbone.model.named_modules() if isinstance(m, BaseTunerLayer)}
        expected = {n: g for g in groups for n in ADAPTED[backbone.spec.name][g]}
        assert set(adapted) == set(expected)
        for name, layer in adapted.items():
            rank = ranks[expected[name]]
            assert layer.lora_A[ADAPTER_NAME].weight.shape[0] == rank
            assert layer.scaling[ADAPTER_NAME] == 3 * rank
        trained = {id(p) for p in attached.trainable_parameters().values()}
        assert {id(p) for p in attached.module.parameters() if p.requires_grad} == trained
        assert len(trained) == 2 * len(expected) + 4
    finally:
        attached.detach()


def test_initialisation_is_seeded_and_leaves_the_global_random_numbers(backbone):
    state = torch.get_rng_state()
    first = attach(backbone)
    weights = {n: p.detach().clone() for n, p in first.named_parameters()}
    first.detach()
    second = attach(backbone)
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, weights[name]), name
        zero = "lora_B" in name or "bridge.up" in name
        assert bool((parameter == 0).all()) is zero, name
        assert zero or float(parameter.detach().std()) > 0.01
    second.detach()


# ------------------------------------------------------------------------------------------ attach and detach


def test_attach_and_detach_leave_the_model_as_it_was(backbone):
    """Invariant 1, from a state that is not the usual one: some frozen, some in training mode."""
    modules, parameters = list(backbone.model.modules()), list(backbone.model.parameters())
    flags = [(p, p.requires_grad) for p in parameters]
    modes = [(m, m.training) for m in modules]
    for i, m in enumerate(modules):
        m.training = i % 3 == 0
    for i, p in enumerate(parameters):
        p.requires_grad_(i % 2 == 0)
    try:
        before, out = describe(backbone), run(backbone, None, [0, 1])
        attached = randomise(attach(backbone, lora=replace(SMALL, dropout=0.1, whole=backbone.spec.extras)))
        differ(out, run(backbone, attached.bridge, [0, 1]))
        attached.module.train()
        attached.module.requires_grad_(True)
        assert attached.detach() is backbone
        assert describe(backbone) == before
        same(out, run(backbone, None, [0, 1]))
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for m, mode in modes:
            m.training = mode


def test_new_layers_are_in_the_mode_of_those_they_stand_for(backbone):
    backbone.model.train()
    attached = attach(backbone, lora=replace(SMALL, dropout=0.5))
    assert all(m.training for m in backbone.model.modules())
    attached.detach()
    backbone.model.eval()
    attached = attach(backbone, lora=replace(SMALL, dropout=0.5))
    assert not any(m.training for m in backbone.model.modules())
    attached.detach()


class Broken(BaseException):
    """Not an Exception: a KeyboardInterrupt must be undone too."""


def break_at(monkeypatch, owner, name, call):
    original, calls = getattr(owner, name), []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Broken
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (LoraModel, "_create_and_replace", 1),
        (LoraModel, "_create_and_replace", 5),
        (LoraModel, "set_adapter", 1),
        (Lora, "_initialise", 3),
        (Lora, "_take_over", 2),
        (Lora, "load_state_dict", 1),
        (nn.Module, "load_state_dict", 1),
        (adapter_module, "new_bridge", 1),
        (AttachedModel, "__init__", 1),
    ],
)
def test_a_failed_attach_leaves_no_trace(backbone, monkeypatch, tmp_path, owner, name, call):
    if name == "_take_over" and not backbone.spec.extras:
        pytest.skip("this family offers no module to be trained whole")
    settings = replace(SMALL, whole=backbone.spec.extras)
    first = randomise(attach(backbone, lora=settings))
    first.save_pretrained(tmp_path / "a")
    first.detach()
    before, out = describe(backbone), run(backbone, None, [0])
    with monkeypatch.context() as patch:
        break_at(patch, owner, name, call)
        with pytest.raises(Broken):
            attach(backbone, tmp_path / "a")
    assert describe(backbone) == before
    same(out, run(backbone, None, [0]))
    attach(backbone, tmp_path / "a").detach()  # and it is not taken for attached


def test_a_second_attach_is_refused(backbone, attached):
    before = describe(backbone)
    for given in (backbone, attached):
        with pytest.raises(AttachError, match="detach"):
            attach(given)
    assert describe(backbone) == before


def test_disabled_is_the_plain_model(backbone):
    """Invariant 3, and the state found is what is left: nested, after an error, with partly frozen weights."""
    plain = run(backbone, None, [0, 1])
    attached = randomise(attach(backbone, lora=replace(SMALL, whole=backbone.spec.extras)))
    try:
        adapted = run(backbone, attached.bridge, [0, 1])
        differ(plain, adapted)
        frozen = list(attached.trainable_parameters().values())[::2]
        for parameter in frozen:
            parameter.requires_grad_(False)
        before = describe(backbone)
        with attached.disabled() as same_one:
            assert same_one is attached
            same(plain, run(backbone, None, [0, 1]))
            with pytest.raises(ValueError, match="inside"), attached.disabled():
                raise ValueError("inside")
            assert not attached.enabled
            same(plain, run(backbone, None, [0, 1]))
        assert attached.enabled
        assert describe(backbone) == before
        same(adapted, run(backbone, attached.bridge, [0, 1]))
    finally:
        attached.detach()


def test_detach_inside_disabled(backbone):
    plain, before = run(backbone, None, [0]), describe(backbone)
    attached = randomise(attach(backbone))
    with attached.disabled():
        attached.detach()
    assert describe(backbone) == before
    same(plain, run(backbone, None, [0]))


def test_merge(backbone, tmp_path):
    other = resolve(backbone.spec.tiny, backbone.spec)(0)
    attached = randomise(attach(other, lora=replace(SMALL, whole=backbone.spec.extras)))
    adapted = run(other, attached.bridge, [0], latent=ODE)
    weights = [p.data_ptr() for p in backbone.model.parameters()]
    with pytest.raises(AttachError, match="keep_bridge"):
        attached.merge()
    assert attached.merge(keep_bridge=True) is other
    assert not [m for m in other.model.modules() if isinstance(m, BaseTunerLayer)]
    assert len(weights) == len(list(other.model.parameters()))
    same(adapted, run(other, attached.bridge, [0], latent=ODE), exact=False)
    again = attach(other, lora=False, bridge=attached.bridge)
    assert again.bridge is attached.bridge
    assert again.merge(keep_bridge=True) is other


# --------------------------------------------------------------------------------------------- bridge and files


def test_saved_and_loaded_it_does_the_same(backbone, tmp_path):
    """Invariant 9."""
    attached = randomise(attach(backbone, lora=replace(SMALL, whole=backbone.spec.extras)))
    out = run(backbone, attached.bridge, [0, 1])
    weights = {n: p.detach().clone() for n, p in attached.named_parameters()}
    folder = attached.save_pretrained(tmp_path / "adapter")
    attached.detach()
    loaded = attach(backbone, folder)
    try:
        assert loaded.config == attached.config
        assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: w.dtype for n, w in weights.items()}
        assert all(torch.equal(p, weights[n]) for n, p in loaded.named_parameters())
        same(out, run(backbone, loaded.bridge, [0, 1]))
        again = loaded.save_pretrained(tmp_path / "again")
        for file in (p for p in folder.rglob("*") if p.is_file()):
            assert file.read_bytes() == (again / file.relative_to(folder)).read_bytes(), file
    finally:
        loaded.detach()


def test_stock_peft_loads_the_lora_folder(backbone, tmp_path):
    attached = randomise(attach(backbone, lora=SMALL))
    out = run(backbone, None, [0, 1])
    folder = attached.save_pretrained(tmp_path / "adapter")
    attached.detach()
    other = resolve(backbone.spec.tiny, backbone.spec)(0)
    differ(out, run(other, None, [0, 1]))
    peft = PeftModel.from_pretrained(other.model, folder / "lora")
    same(out, run(other, None, [0, 1]))
    names = {n for n, m in other.model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert names == set().union(*ADAPTED[backbone.spec.name].values())
    with pytest.raises(AttachError, match="PEFT"):
        attach(other)
    peft.unload()


def test_half_precision_files_lose_only_their_rounding(backbone, attached, tmp_path):
    folder = attached.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    weights = {n: p.detach().bfloat16().float() for n, p in attached.named_parameters()}
    attached.detach()
    loaded = attach(backbone, folder)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32  # the toy's own type: nothing is computed in less
        assert torch.equal(parameter, weights[name])
    loaded.detach()


def test_a_bridge_of_other_widths_is_refused(backbone):
    before = describe(backbone)
    with pytest.raises(BackboneMismatchError, match="width"):
        attach(backbone, bridge=BridgeConfig(backbone.latent_width, backbone.width + 1))
    assert describe(backbone) == before


# ------------------------------------------------------------------------------------------------------- verbs


def test_writing_for_some_rows(backbone, attached):
    context, _ = ask(backbone, [0, 1, 2])
    all_rows, _ = backbone.write_text(context.fork(), WARM)
    context, some = backbone.write_text(context, WARM, rows=[0, 2])
    assert len(some) == 2
    _, late = backbone.write_text(context, WARM, rows=[1])
    alone = backbone.write_text(ask(backbone, [1])[0], WARM)[1]
    assert late[0].ids.tolist() == alone[0].ids.tolist()
    assert all_rows.rows == 3


def test_verbs_for_no_rows_read_nothing(backbone, attached):
    context, _ = ask(backbone, [0, 1])
    for read in (
        lambda: backbone.read_text(context, [], rows=[]),
        lambda: backbone.read_image(context, [], rows=[]),
        lambda: backbone.read_image(context, [], as_condition=False, rows=[]),
        lambda: backbone.read_image(context, [], understanding=False, rows=[]),
        lambda: backbone.read_restoration(context, [], attached.bridge, rows=[]),
    ):
        assert read() is context
    with pytest.raises(ClearValueError, match="0 blocks for 2 rows"):
        backbone.read_image(context, [])


def test_a_picture_of_several_rows_is_encoded_once(backbone, monkeypatch):
    """And is in each of them what it is where its rows hold pictures of their own."""
    encoded = Counter()

    def count(owner, name, place):
        original = getattr(owner, name)

        def counted(*given):
            encoded[name] += len(given[place])
            return original(*given)

        monkeypatch.setattr(owner, name, counted)

    if backbone.spec.kind == "codes":
        count(type(backbone), "tokenise", 1)
        count(type(backbone), "see", 1)
    else:
        count(bagel, "encode_pixels", 1)
        count(type(backbone.model), "embed_patches", 1)

    def read(images):
        encoded.clear()
        context = backbone.read_image(backbone.start(3, [1, 2, 3]), images)
        return context, set(encoded.values())

    one, other = pictures(backbone)[:2]
    shared, counts = read([one, other, one])
    single, apart = read([one, other, replace(one)])
    assert (counts, apart) == ({2}, {3})
    assert torch.equal(shared.valid, single.valid)
    data = [c.cache.read(c.length).transpose(3, 4)[:, :, c.valid] for c in (shared, single)]
    torch.testing.assert_close(*data, atol=1e-5, rtol=1e-5)
    first, _, again = backbone.encode_images([one, other, one])
    assert first is not again
    assert torch.equal(first.tokens, again.tokens)
    features = backbone.understand([one, other, one])
    assert torch.equal(features[0], features[2])


def test_pieces_that_cannot_be_laid_out_are_told_what_they_need(backbone):
    (own,) = backbone.encode_images(pictures(backbone)[:1])
    with pytest.raises(ClearValueError, match=r"needs .* or a picture to encode"):
        backbone.pack([[LatentPiece()]])
    with pytest.raises(ClearValueError, match=r"fill a grid of \(1, 1\).* pass"):
        backbone.pack([[LatentPiece(own.tokens[0], grid=(1, 1))]])


def test_reencode(backbone, attached):
    """Decoded and read again by the understanding encoder: another reading than the bridge's, rows as alone."""
    if not backbone.spec.decodes:
        pytest.skip("this family decodes no pixels")

    def path(rows):
        context, _ = ask(backbone, rows)
        context, found = backbone.restore(context, ODE)
        return backbone.write_text(backbone.reencode(context, found), GREEDY)[1], found

    (together, found), alone = path([0, 1]), [path([r])[0][0] for r in (0, 1)]
    for a, b in zip(together, alone, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        # A pixel that lies between two levels may be rounded either way (seen: 1e-4).
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-3, rtol=0)
    images = [backbone.decode(r)[0] for r in found]
    assert [i.size for i in images] == [(r.size[1], r.size[0]) for r in found]


def test_forks_do_not_see_each_other(backbone, attached):
    context, _ = ask(backbone, [0, 1])
    long, short = [backbone.encode_text("A thought of some length.")] * 2, [backbone.encode_text("No.")] * 2

    def ending(c, ids):
        return [s.logprobs for s in backbone.write_text(backbone.read_text(c, ids), WARM)[1]]

    wanted = ending(ask(backbone, [0, 1])[0], long), ending(ask(backbone, [0, 1])[0], short)
    left, right = context.fork(), context.fork()
    one = backbone.read_text(left, long)
    two = backbone.read_text(right, short)
    found = [[s.logprobs for s in backbone.write_text(c, WARM)[1]] for c in (one, two)]
    again = ending(context, long)
    for a, b in zip([*found[0], *found[1], *again], [*wanted[0], *wanted[1], *wanted[0]], strict=True):
        assert torch.equal(a, b)


def test_random_streams_advance_in_the_rows_that_draw_and_in_no_fork(backbone, attached):
    context, _ = ask(backbone, [0, 1])
    fork = context.fork()
    fork.random.uniform(3)
    assert context.random.counts.tolist() == [0, 0]
    after, first = backbone.restore(context, ODE, rows=[1])
    assert context.random.counts.tolist() == [0, 0]
    assert after.random.counts[0] == 0
    assert after.random.counts[1] > 0

    def values(restoration):
        return restoration.latent if restoration.latent is not None else restoration.codes

    again = backbone.restore(context, ODE, rows=[1])[1]
    later = backbone.restore(after, ODE, rows=[1])[1]
    assert torch.equal(values(first[0]), values(again[0]))
    assert not torch.equal(values(first[0]), values(later[0]))


def test_expand_and_select(backbone, attached):
    context, _ = ask(backbone, [0, 1])
    reference = backbone.write_text(context.fork(), WARM)[1]
    wide = backbone.write_text(context.expand(3), WARM)[1]
    assert [s.ids.tolist() for s in wide] == [reference[i // 3].ids.tolist() for i in range(6)]
    turned = backbone.write_text(context.select([1, 0, 1]), WARM)[1]
    assert [s.ids.tolist() for s in turned] == [reference[i].ids.tolist() for i in (1, 0, 1)]
    last = backbone.write_text(context, WARM)[1]
    assert [s.ids.tolist() for s in last] == [s.ids.tolist() for s in reference]


def test_the_limit_of_a_turn(backbone, attached):
    """A turn cut off has no end token, is closed, and reads on as the same ids given would."""
    context, _ = ask(backbone, [0, 1])
    one = TextSampling(max_new_tokens=1)
    cut, segments = backbone.write_text(context.fork(), one)
    assert [len(s.ids) for s in segments] == [1, 1]
    assert [len(s.logprobs) for s in segments] == [1, 1]
    given = backbone.read_text(context, [s.ids for s in segments], own=True)
    assert cut.position.tolist() == given.position.tolist()
    for a, b in zip(backbone.write_text(cut, GREEDY)[1], backbone.write_text(given, GREEDY)[1], strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=TOLERANCE, rtol=0)


def test_the_end_token_ends_a_turn(backbone, attached, monkeypatch):
    """It is sampled, scored and left out of the text; a row that ended waits for the others."""
    encoded = backbone.encode_text("ab")
    assert backbone.decode_text(torch.cat((encoded, torch.tensor([backbone.end_id])))) == "ab"
    assert backbone.end_id not in encoded.tolist()
    families = {"clear_adapters.backbones", type(backbone).__module__.rpartition(".")[0]}
    modules = [
        m for n, m in sys.modules.items() if n.startswith(tuple(families)) and hasattr(m, "choose_token")
    ]
    steps = []

    def ends_first_row_at_third(logits, *args, **kwargs):
        token, logprob = choose_token(logits, *args, **kwargs)
        steps.append(1)
        token[0] = backbone.end_id if len(steps) == 3 else int(encoded[0])
        token[1] = int(encoded[1])
        return token, logprob

    for module in modules:
        monkeypatch.setattr(module, "choose_token", ends_first_row_at_third)
    context, _ = ask(backbone, [0, 1])
    after, (first, second) = backbone.write_text(context, GREEDY)
    assert first.ids.tolist() == [int(encoded[0])] * 2 + [backbone.end_id]
    assert first.text == "aa"
    assert second.ids.tolist() == [int(encoded[1])] * GREEDY.max_new_tokens
    monkeypatch.undo()
    given = backbone.read_text(ask(backbone, [0, 1])[0], [first.ids, second.ids], own=True)
    assert after.position.tolist() == given.position.tolist()
    for a, b in zip(
        backbone.write_text(after, GREEDY)[1], backbone.write_text(given, GREEDY)[1], strict=True
    ):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=TOLERANCE, rtol=0)


# ------------------------------------------------------------------------------------------ the uncached path


def test_the_module_is_plain_while_disabled(backbone):
    """Without LoRA in the way: the bridge alone is left out, and read when the skill is on."""
    attached = randomise(attach(backbone, lora=False))
    own = backbone.encode_images(pictures(backbone)[:1])[0]
    bridged = LatentPiece(own.tokens[0], grid=own.grid, bridged=True)
    batch = backbone.encode(backbone.pack([[bridged, TextPiece(torch.tensor([5, 6]), scored=True)]]))
    with torch.no_grad():
        on = attached.module(batch).text_logits
        with attached.disabled():
            off = attached.module(batch).text_logits
        attached.detach()
        assert torch.equal(backbone.forward(batch).text_logits, off)
    assert not torch.allclose(on, off, atol=1e-3)
