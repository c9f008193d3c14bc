"""`attach` and the attached model: what goes in, what is refused and how, and what one can do with it."""

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import clear_adapters
from clear_adapters import backbones, store
from clear_adapters.adapter import attach
from clear_adapters.backbones import BACKBONES, get_backbone, list_backbones, register_backbone
from clear_adapters.backbones.bagel.backbone import BagelBackbone
from clear_adapters.backbones.bagel.checkpoint import save_checkpoint
from clear_adapters.backbones.bagel.spec import SPEC
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.backbones.base import LoraGroup
from clear_adapters.bridge import BridgeConfig
from clear_adapters.config import LoraSettings
from clear_adapters.engine import Engine
from clear_adapters.errors import (
    AdapterError,
    AttachError,
    BackboneMismatchError,
    BrokenEntryError,
    CheckpointError,
    ClearError,
    ClearTypeError,
    ClearValueError,
    UnknownNameError,
)
from clear_adapters.prompts import get_protocol
from clear_adapters.sampling import LatentSampling, TextSampling
from clear_adapters.transcript import TextSegment

SMALL = LoraSettings({"understanding": 2, "generation": 2})
TEXT = TextSampling(max_new_tokens=5)
LATENT = LatentSampling(steps=3, guidance_text=1, guidance_image=1)


@pytest.fixture
def backbone():
    return build(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model folder in the official layout."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    toy = build(3)
    save_checkpoint(folder, toy.model, toy.autoencoder, toy.tokenizer)
    return folder


@pytest.fixture
def copied(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "toy"))


@pytest.fixture
def builtin(tmp_path, monkeypatch, checkpoint):
    """The toy as a built-in model, with an adapter of its own."""
    root = tmp_path / "builtin"
    root.mkdir()
    (root / "toy").symlink_to(checkpoint)
    monkeypatch.setattr(store, "_builtin_root", lambda: root)
    attach("builtin:toy", lora=SMALL).save_pretrained(root / "clear-toy")
    return root


def random_weights(attached):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in attached.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return attached


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8))


# -------------------------------------------------------------------------------------------------- what goes in


def test_every_form_of_a_model(checkpoint, builtin):
    toy = build(3)
    processor = {"autoencoder": toy.autoencoder, "tokenizer": toy.tokenizer}
    for given, back in (
        (toy, toy),
        (str(checkpoint), None),
        (checkpoint, None),
        ("builtin:toy", None),
        (toy.model, toy.model),
    ):
        attached = attach(given, lora=SMALL, processor=processor if given is toy.model else None)
        assert attached.backbone.spec is SPEC
        assert attached.backbone.dtype == torch.float32
        named = given == "builtin:toy"
        assert attached.config.base_model == ("builtin:toy" if named else None)
        out = attached.detach()
        assert out is back if back is not None else isinstance(out, BagelBackbone)


def test_the_adapter_brings_its_base(builtin):
    attached = attach(adapter="builtin:clear-toy")
    assert attached.config.base_model == "builtin:toy"
    assert attached.backbone.dtype == torch.float32
    assert attach("builtin:toy", "builtin:clear-toy").config == attached.config
    assert attach(adapter=builtin / "clear-toy", dtype="bfloat16").backbone.dtype == torch.bfloat16


def test_the_type_of_the_weights(checkpoint):
    """On a CPU float32 unless asked: the stored bfloat16 would be slow. LoRA and bridge stay in float32."""
    for dtype, wanted in (
        (None, torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ):
        attached = attach(checkpoint, dtype=dtype, device="cpu")
        assert attached.backbone.dtype == wanted
        assert {p.dtype for _, p in attached.named_parameters()} == {torch.float32}
        assert attached.backbone.device == torch.device("cpu")


def test_half_precision_answers(checkpoint):
    attached = random_weights(attach(checkpoint, dtype=torch.bfloat16, device="cpu"))
    assert attached.answer(picture(), "What?", restore="always", text=TEXT, latent=LATENT).restored


def test_first_weights_are_drawn_from_a_seed(backbone):
    """Runs of several seeds begin elsewhere, one seed always at the same place, and nothing is changed by either."""
    attached = attach(backbone, lora=replace(SMALL, whole=("vae2llm",)))
    random = torch.get_rng_state()

    def drawn(seed):
        attached.initialise(seed)
        return {n: p.detach().clone() for n, p in attached.named_parameters()}

    first, other = drawn(1), drawn(2)
    random_weights(attached)
    again = drawn(1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    differ = {n for n in first if not torch.equal(first[n], other[n])}
    assert differ == {n for n in first if "lora_A" in n or "bridge.down" in n}
    assert all(not first[n].any() for n in first if "lora_B" in n or "bridge.up" in n)
    assert torch.equal(first["vae2llm.weight"], attached.lora.whole[0].original)
    assert torch.equal(torch.get_rng_state(), random)
    with attached.disabled():
        plain = attached.answer(picture(), "What?", text=TEXT).transcript.to_json()
    random_weights(attached)
    attached.initialise(3)
    events = [attached.engine.answer([picture()], ["What?"], plain=True, text=TEXT)[0].transcript.to_json()]
    assert events == [plain]
    attached.detach()
    with pytest.raises(AttachError, match="detached"):
        attached.initialise(1)


def test_detach_undoes_what_was_set_on_the_modules(backbone):
    """As training does."""
    decoder = backbone.model.language_model.model
    before = [dict(vars(m)) for m in backbone.model.modules()]
    attached = attach(backbone, lora=SMALL)
    decoder.checkpointing = True
    decoder.layers[0]._compiled_call_impl = print
    attached.detach()
    assert not decoder.checkpointing
    assert [dict(vars(m)) for m in backbone.model.modules()] == before


def test_parts_can_be_left_out(backbone):
    attached = attach(backbone, lora=False, bridge=False)
    assert (attached.lora, attached.bridge, attached.size().parameters) == (None, None, 0)
    assert attached.config.lora is None
    assert attached.config.bridge is None
    assert not any(p.requires_grad for p in attached.module.parameters())
    attached.detach()
    attached = attach(backbone, lora=LoraSettings((), whole=("vae2llm",)), bridge=BridgeConfig(16, 32, 5))
    assert set(attached.trainable_parameters()) == {
        "vae2llm.weight",
        "vae2llm.bias",
        *(f"bridge.{side}.{kind}" for side in ("down", "up") for kind in ("weight", "bias")),
    }
    assert attached.config.bridge["hidden"] == 5


@pytest.mark.parametrize("settings", [SMALL, LoraSettings((), whole=("vae2llm",)), False])
@pytest.mark.parametrize("bridge", [None, False])
def test_any_parts_are_saved_and_loaded(backbone, tmp_path, settings, bridge):
    attached = random_weights(attach(backbone, lora=settings, bridge=bridge))
    weights = {n: p.detach().clone() for n, p in attached.named_parameters()}
    attached.save_pretrained(tmp_path / "a")
    attached.detach()
    loaded = attach(backbone, tmp_path / "a")
    found = dict(loaded.named_parameters())
    assert found.keys() == weights.keys()
    assert all(torch.equal(p, weights[n]) for n, p in found.items())
    assert loaded.config == attached.config


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ClearValueError, "needs a model, an adapter, or both"),
        ({"model": 3}, ClearTypeError, "type int is no model of a known backbone"),
        ({"model": nn.Linear(1, 1)}, ClearTypeError, "type Linear"),
        ({"model": "builtin:toi"}, UnknownNameError, "Did you mean 'builtin:toy'"),
        ({"adapter": "builtin:clear-toi"}, UnknownNameError, "Did you mean 'builtin:clear-toy'"),
        ({"model": "toy"}, CheckpointError, "Did you mean 'builtin:toy'"),
        ({"model": "./toy"}, CheckpointError, "no folder"),
        ({"model": "builtin:toy", "adapter": "./x/y/z"}, AdapterError, "no folder"),
        ({"adapter": 5}, ClearTypeError, "adapter must be"),
        ({"model": "builtin:toy", "lora": 16}, ClearTypeError, "lora must be"),
        ({"model": "builtin:toy", "bridge": {"hidden": 3}}, ClearTypeError, "bridge must be"),
        ({"model": "builtin:toy", "lora": LoraSettings(("und",))}, BackboneMismatchError, "'und' is unknown"),
        (
            {"model": "builtin:toy", "lora": LoraSettings(whole=("lm_head",))},
            BackboneMismatchError,
            "'lm_head' cannot be trained whole",
        ),
        ({"adapter": "builtin:clear-toy", "lora": SMALL}, ClearValueError, "fresh adapter"),
        ({"adapter": "builtin:clear-toy", "lora": False}, ClearValueError, "has LoRA weights"),
        ({"adapter": "builtin:clear-toy", "bridge": False}, ClearValueError, "own bridge"),
        ({"model": "builtin:toy", "dtype": "float23"}, ClearValueError, "float23"),
        ({"model": "builtin:toy", "dtype": "int8"}, ClearValueError, "dtype='int8'.*'bfloat16'"),
        ({"model": "builtin:toy", "dtype": torch.bool}, ClearValueError, "torch.bool"),
        ({"model": "builtin:toy", "dtype": 16}, ClearTypeError, "dtype=16"),
        ({"model": "builtin:toy", "device": "gpu"}, ClearValueError, "device='gpu'.*'cuda'"),
        ({"model": "builtin:toy", "device": 1.5}, ClearValueError, "device='1.5'"),
        ({"model": "builtin:toy", "device": "meta"}, ClearValueError, "device='meta'"),
        ({"model": "builtin:toy", "device": "cuda:99"}, ClearValueError, "device='cuda:99'.*this machine"),
        ({"model": "builtin:toy", "quantization": "int3"}, ClearValueError, "int3.*'int8', 'nf4'"),
        ({"model": "builtin:toy", "processor": {}}, ClearValueError, "processor"),
    ],
)
def test_bad_arguments(builtin, arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        attach(**arguments)
    assert isinstance(caught.value, ClearError)


def test_bad_arguments_beside_a_loaded_model(backbone):
    for options in ({"dtype": torch.float32}, {"device": "cpu"}, {"quantization": "nf4"}):
        with pytest.raises(ClearValueError, match="loaded already"):
            attach(backbone, **options)
    with pytest.raises(ClearValueError, match="leave it out"):
        attach(backbone, processor=backbone.tokenizer)
    with pytest.raises(ClearValueError, match="autoencoder"):
        attach(backbone.model)
    with pytest.raises(ClearValueError, match="tokenizer"):
        attach(backbone.model, processor=backbone.tokenizer)


def test_an_adapter_without_a_named_base_needs_one(backbone, tmp_path):
    attach(backbone, lora=SMALL).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="pass that model"):
        attach(adapter=tmp_path / "a")


def test_an_adapter_of_other_widths_is_refused(backbone, builtin, monkeypatch):
    """A model of more layers, wider ones, and an adapter for the smaller toy."""
    from clear_adapters.backbones.bagel import tiny

    config = replace(backbone.config, llm={**backbone.config.llm, "intermediate_size": 64})
    model, autoencoder = tiny.initialise(config, 0)
    other = BagelBackbone(model, autoencoder, backbone.tokenizer)
    with pytest.raises(BackboneMismatchError, match=r"mlp.*has shape .*other widths"):
        attach(other, "builtin:clear-toy")
    config = replace(backbone.config, llm={**backbone.config.llm, "num_hidden_layers": 3})
    model, autoencoder = tiny.initialise(config, 0)
    other = BagelBackbone(model, autoencoder, backbone.tokenizer)
    with pytest.raises(AdapterError, match="other layers"):
        attach(other, "builtin:clear-toy")
    assert not any(hasattr(m, "base_layer") for m in other.model.modules())


@pytest.fixture
def second_family(monkeypatch):
    """Another backbone, which knows BAGEL's models under another name, for what only two families can show."""

    class Other(BagelBackbone):
        spec = replace(SPEC, name="other", backbone=f"{__name__}:Other")

        @classmethod
        def accepts(cls, model):
            return False

        @classmethod
        def recognises(cls, folder):
            return (folder / "other.json").is_file()

    monkeypatch.setattr(
        backbones, "resolve", lambda target, spec: Other if spec.name == "other" else BagelBackbone
    )
    register_backbone(Other.spec)
    yield Other
    BACKBONES.unregister("other")


def test_an_adapter_for_another_backbone_is_refused(second_family, backbone, builtin, tmp_path):
    other = second_family(backbone.model, backbone.autoencoder, backbone.tokenizer)
    with pytest.raises(BackboneMismatchError, match=r"made for backbone 'bagel'.*'other'"):
        attach(other, "builtin:clear-toy")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "other.json").write_text("{}")
    with pytest.raises(BackboneMismatchError, match=r"made for backbone 'bagel'.*'other'"):
        attach(tmp_path / "m", "builtin:clear-toy")
    (tmp_path / "m" / "other.json").unlink()
    with pytest.raises(CheckpointError, match="no model of a known backbone"):
        attach(tmp_path / "m")


def test_a_spec_that_the_model_contradicts_is_refused(backbone, monkeypatch):
    before = [id(m) for m in backbone.model.modules()]
    for group, message in (
        (LoraGroup("language_model.model.layers", ("self_attn.sparkle",)), "has nothing there"),
        (LoraGroup("language_model.model.layers", ("input_layernorm",)), "has RMSNorm there"),
        (LoraGroup("vit_model.vision_model.encoder.layers", ("mlp.fc1",)), "nothing there|forbids"),
        (LoraGroup("", (), once=("vit_model.vision_model.embeddings.patch_embedding",)), "forbids"),
        (LoraGroup("", (), once=("language_model.model.layers.0.mlp.up_proj",)), "two|one rank"),
    ):
        groups = {"generation": SPEC.groups["understanding"], "understanding": group}
        monkeypatch.setattr(type(backbone), "spec", replace(SPEC, groups=groups))
        with pytest.raises(BackboneMismatchError, match=message):
            attach(backbone)
        assert [id(m) for m in backbone.model.modules()] == before


def test_a_name_that_ends_like_another_is_not_hit_twice(backbone):
    """PEFT matches by suffix: a whole copy of the network below the same path would be adapted too."""
    inner = nn.Module()
    inner.language_model = build(1).model.language_model
    backbone.model.copy = inner
    before = [id(m) for m in backbone.model.modules()]
    with pytest.raises(BackboneMismatchError, match=r"other modules.*copy\.language_model"):
        attach(backbone)
    assert [id(m) for m in backbone.model.modules()] == before
    assert not hasattr(backbone.model, "peft_config")


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "json", "no-weights"])
def test_a_damaged_checkpoint_is_named(copied, change):
    from safetensors.torch import load_file, save_file

    file = copied / "ema.safetensors"
    tensors = load_file(file)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["sparkle"] = torch.zeros(1)
        name = "sparkle"
    elif change == "shape":
        tensors[name] = torch.zeros(3, 3)
    save_file(tensors, file)
    if change == "json":
        (copied / "llm_config.json").write_text("{")
        name = "llm_config.json"
    elif change == "no-weights":
        file.unlink()
        name = "safetensors"
    with pytest.raises(CheckpointError, match=name):
        attach(copied)


# -------------------------------------------------------------------------------------------------- what one can do


def test_answers(backbone):
    attached = random_weights(attach(backbone, lora=SMALL))
    warm = TextSampling(max_new_tokens=5, temperature=1.0)
    one = attached.answer(picture(), "What?", restore="always", text=warm, latent=LATENT, seed=3)
    several = attached.answer(
        [picture(1), picture()], ["Why?", "What?"], restore="always", text=warm, latent=LATENT, seed=3
    )
    assert [type(r).__name__ for r in (one, *several)] == ["Reply"] * 3
    assert several[1].transcript.reply == one.transcript.reply
    assert several[0].transcript.reply != one.transcript.reply
    assert one.restored
    assert one.restored_image.size == (64, 48)
    events = list(attached.stream(picture(), "What?", restore="always", text=TEXT, latent=LATENT, seed=3))
    assert events
    with attached.disabled():
        plain = attached.answer(picture(), "What?", restore="always", text=TEXT)
    assert not plain.restored
    assert len(attached.answer(picture(), ["What?"], restore="never", text=TEXT)) == 1


def test_a_disabled_answer_is_that_of_a_model_without_an_adapter(backbone):
    bare = attach(backbone, lora=False, bridge=False)
    with bare.disabled():
        wanted = bare.answer(picture(), "What?", text=TEXT).transcript.to_json()
    bare.detach()
    attached = random_weights(attach(backbone, lora=replace(SMALL, whole=SPEC.extras)))
    with attached.disabled():
        assert attached.answer(picture(), "What?", text=TEXT).transcript.to_json() == wanted
    assert attached.answer(picture(), "What?", restore="never", text=TEXT).transcript.to_json() != wanted


def test_a_stream_does_not_change_models_half_way(backbone):
    attached = attach(backbone, lora=SMALL)
    with attached.disabled():
        events = attached.stream(picture(), "What?", text=TEXT)
    with pytest.raises(AttachError, match="while stream"):
        list(events)
    events = attached.stream(picture(), "What?", text=TEXT)
    attached.detach()
    with pytest.raises(AttachError, match="detached"):
        list(events)


def test_an_answer_does_not_change_models_half_way(backbone, monkeypatch):
    """Another thread that switches the adapter off meanwhile."""
    attached = attach(backbone, lora=SMALL)
    answered = Engine.answer

    def slow(self, *args, **kwargs):
        with attached.disabled():
            pass
        return answered(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "answer", slow)
    with pytest.raises(AttachError, match="while answer"):
        attached.answer(picture(), "What?", text=TEXT)


def test_the_adapter_is_off_until_the_last_disabled_is_left(backbone):
    attached = attach(backbone, lora=SMALL)
    first, second = attached.disabled(), attached.disabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not attached.enabled
    second.__exit__(None, None, None)
    assert attached.enabled


def test_a_model_that_is_dropped_is_freed_at_once():
    """Not when circles are looked for: the next model would be loaded beside it."""
    attached = attach(build(0), lora=SMALL)
    attached.answer(picture(), "What?", text=TEXT)
    network = weakref.ref(attached.backbone.model)
    gc.collect()
    gc.disable()
    try:
        del attached
        assert network() is None
    finally:
        gc.enable()


def test_a_bridge_on_another_device_is_refused(backbone):
    bridge = attach(backbone).bridge.to("meta")
    backbone = build(0)
    with pytest.raises(ClearValueError, match="bridge is on meta"):
        attach(backbone, bridge=bridge)


def test_a_detached_model_does_nothing_more(backbone, tmp_path):
    attached = attach(backbone)
    attached.detach()
    for use in (
        lambda: attached.engine,
        lambda: attached.answer(picture(), "What?"),
        lambda: attached.stream(picture(), "What?"),
        lambda: attached.save_pretrained(tmp_path / "a"),
        lambda: attached.push_to_hub("owner/name"),
        attached.merge,
        attached.detach,
        lambda: attached.disabled().__enter__(),
    ):
        with pytest.raises(AttachError, match="detached"):
            use()
    assert "detached" in repr(attached)
    attach(backbone)


def test_merging_what_cannot_be_merged(backbone):
    attached = random_weights(attach(backbone, lora=SMALL))
    name, parameter = next(iter(attached.named_parameters()))
    with torch.no_grad():
        parameter[0, 0] = float("inf")
    before = [p.detach().clone() for p in backbone.model.parameters()]
    with pytest.raises(ClearValueError, match=f"{name}.*not finite"):
        attached.merge(keep_bridge=True)
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.model.parameters(), strict=True))
    attached.detach()


def test_merge_with_an_untrained_bridge_asks_nothing(backbone):
    attached = attach(backbone, lora=SMALL)
    assert attached.merge() is backbone


def test_a_merged_model_answers_as_it_did_with_its_config(backbone):
    attached = random_weights(attach(backbone, lora=SMALL))
    attached.config = replace(
        attached.config, protocol=get_protocol("tiny"), text=TEXT, latent=LATENT, max_restores=1
    )
    own, bridge = attached.answer(picture(), "What?", restore="always"), attached.bridge
    config = attached.config
    again = attach(attached.merge(keep_bridge=True), lora=False, bridge=bridge, config=config)
    reply = again.answer(picture(), "What?", restore="always")
    assert reply.transcript.reply == own.transcript.reply
    assert again.config == replace(config, lora=None)
    with pytest.raises(ClearValueError, match="fresh adapter"):
        attach(again.detach(), "builtin:clear-bagel-tiny", config=config)


def test_size_and_repr(backbone):
    attached = attach(backbone, lora=LoraSettings({"understanding": 1}), bridge=False)
    # seven modules in two layers of width 32, 8-wide heads (4, of which 2 for keys and values) and an MLP of 48
    expected = 2 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 2 * (32 + 48) + (48 + 32))
    assert attached.size().parameters == expected
    assert attached.size().bytes == 4 * expected
    assert f"{expected:,} parameters" in repr(attached)
    assert "on)" in repr(attached)
    with attached.disabled():
        assert "off)" in repr(attached)


def test_the_config_can_be_changed_where_it_describes_no_weights(backbone):
    attached = attach(backbone, lora=SMALL)
    engine = attached.engine
    assert attached.engine is engine
    attached.config = replace(attached.config, protocol=get_protocol("tiny"), stage="sft", text=TEXT)
    assert attached.engine.protocol.name == "tiny"
    assert attached.engine.text == TEXT
    assert attached.engine.max_restores == 2
    attached.config = replace(attached.config, max_restores=1)
    assert attached.engine.max_restores == 1
    for change in ({"backbone": "other"}, {"lora": None}, {"bridge": None}):
        with pytest.raises(AdapterError, match="in place"):
            attached.config = replace(attached.config, **change)


# ---------------------------------------------------------------------------------------------------- the registry


def test_the_registry():
    assert list_backbones() == ["bagel", "emu3", "janus"]
    assert get_backbone("bagel") is SPEC
    assert clear_adapters.list_backbones() == ["bagel", "emu3", "janus"]
    with pytest.raises(UnknownNameError, match="Did you mean 'bagel'"):
        get_backbone("bagle")
    with pytest.raises(ClearValueError, match="already registered"):
        register_backbone(SPEC)
    with pytest.raises(ClearTypeError, match="BackboneSpec"):
        register_backbone("bagel")


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("no.such.module:X", BrokenEntryError, "No module"),
        ("clear_adapters.backbones.bagel.spec:Nothing", BrokenEntryError, "Nothing"),
        ("clear_adapters.backbones.bagel.spec:SPEC", ClearTypeError, "no subclass of Backbone"),
    ],
)
def test_a_broken_family_is_only_its_own_trouble(backbone, target, error, message):
    spec = replace(SPEC, name="abroken", backbone=target)
    with pytest.raises(error, match=message):
        backbones.backbone_class(spec)
    register_backbone(spec)
    try:
        with pytest.warns(UserWarning, match="'abroken' was not asked"):
            assert backbones.find_for_model(backbone.model) is SPEC
    finally:
        BACKBONES.unregister("abroken")


def test_inside_disabled_the_engine_is_the_plain_model(toy):
    """Rollouts and replays too: no protocol, no bridge."""
    attached = attach(toy / "model", toy / "adapter", device="cpu")
    torch.nn.init.normal_(attached.bridge.up.weight)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    engine = attached.engine  # the same object before, inside and after
    own = engine.rollout(picture, "What?", seeds=[1], restore="always")
    with_bridge = engine.replay(own).text_logprobs[0]
    with attached.disabled():
        assert engine is attached.engine
        plain = attached.engine.rollout(picture, "What?", seeds=[1])
        reply = attached.answer(picture, "What?", seed=1)
        without = attached.engine.replay(own).text_logprobs[0]
    assert plain[0].reply == reply.text
    assert not any(isinstance(s, TextSegment) and s.text == engine.protocol.system for s in plain[0])
    assert any(isinstance(s, TextSegment) and s.text == engine.protocol.system for s in own[0])
    torch.testing.assert_close(engine.replay(own).text_logprobs[0], with_bridge)
    bare = Engine(attached.detach(), None, "tiny").replay(own).text_logprobs[0]
    torch.testing.assert_close(without, bare)
    assert (with_bridge - bare).abs().max() > 1e-3
