"""Base weights in 8 and 4 bits: loaded, adapted, trained, refused where they cannot be."""

import importlib.util

import pytest
import torch

from clear_adapters import attach
from clear_adapters.backbones.bagel.tiny import build as bagel
from clear_adapters.backbones.emu3.tiny import build as emu3
from clear_adapters.backbones.janus.tiny import build as janus
from clear_adapters.backbones.quantized import check_quantization, quantized_layers
from clear_adapters.errors import ClearValueError
from clear_adapters.sampling import LatentSampling, TextSampling
from tests.scripted import picture

FAMILIES = {"bagel": bagel, "janus": janus, "emu3": emu3}
TEXT = TextSampling(max_new_tokens=4)
LATENT = LatentSampling(steps=3)
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, build in FAMILIES.items():
        made[name] = tmp_path_factory.mktemp(name)
        build(0).save(made[name])
    return made


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClearValueError, match=r"needs bitsandbytes.*clear-adapters\[quant\]"):
        check_quantization("nf4")
    check_quantization(None)
    with pytest.raises(ClearValueError, match="'int8', 'nf4'"):
        check_quantization("int4")


@needs_library
@pytest.mark.parametrize(
    ("family", "kind"), [("bagel", "int8"), ("bagel", "nf4"), ("janus", "int8"), ("emu3", "nf4")]
)
def test_every_family_answers_and_trains(folders, family, kind):
    """The layers that the spec adapts in the decoder are quantized, and no others; LoRA on them gets gradients."""
    attached = attach(str(folders[family]), device="cpu", quantization=kind)
    backbone = attached.backbone
    names = [n for n, m in backbone.model.named_modules() if m in set(quantized_layers(backbone.model))]
    assert names
    stack = {p.prefix for p in backbone.spec.groups.values() if any("q_proj" in m for m in p.modules)}
    assert all(any(n.startswith(f"{prefix}.") for prefix in stack) for n in names)
    reply = attached.answer(picture(0), "What?", restore="always", text=TEXT, latent=LATENT)
    assert reply.restored

    transcripts = attached.engine.rollout(
        [picture(0)], ["What?"], seeds=[1], text=TextSampling(max_new_tokens=4, temperature=1.0)
    )
    found = attached.engine.replay(transcripts)
    found.text_logprobs[0].sum().backward()
    trained = attached.trainable_parameters()
    assert all(p.grad is not None for n, p in trained.items() if ".lora_B" in n and "q_proj.lora" in n)
    with pytest.raises(ClearValueError, match="quantized"):
        attached.merge()
    with pytest.raises(ClearValueError, match="quantized"), attached.folded():
        pass
    attached.detach()
    with torch.no_grad():
        context = backbone.read_text(backbone.start(1, [0]), [backbone.encode_text("What?")])
        assert backbone.write_text(context, TEXT)[1][0].ids.tolist()


@needs_library
@pytest.mark.parametrize(("kind", "distance"), [("int8", 0.15), ("nf4", 0.6)])
def test_outputs_stay_close(folders, kind, distance):
    plain = attach(str(folders["bagel"]), device="cpu")
    fewer = attach(str(folders["bagel"]), device="cpu", quantization=kind)
    scores = []
    for attached in (plain, fewer):
        b = attached.backbone
        context = b.read_text(b.start(1, [0]), [b.encode_text("What is it?")])
        scores.append(b.write_text(context, TextSampling(max_new_tokens=1))[1][0].logprobs)
    torch.testing.assert_close(scores[1], scores[0], atol=distance, rtol=0)
    assert not torch.equal(scores[1], scores[0])
    with pytest.raises(ClearValueError, match="its first weights are gone"):
        fewer.backbone.save(folders["bagel"] / "again")


@needs_library
def test_detach_leaves_the_quantized_base(folders):
    attached = attach(str(folders["bagel"]), device="cpu", quantization="nf4")
    backbone = attached.backbone

    def written():
        context = backbone.read_text(backbone.start(1, [0]), [backbone.encode_text("What is it?")])
        return backbone.write_text(context, TEXT)[1][0].logprobs

    with attached.disabled():
        before = written()
    attached.detach()
    assert torch.equal(written(), before)


def test_recipes_refuse_what_does_not_go_together():
    from clear_adapters.training.build import attach_for
    from clear_adapters.training.recipe import LoopSettings, Recipe, load_recipe

    assert load_recipe("tiny", ["quantization=nf4"]).loop.quantization == "nf4"
    with pytest.raises(ClearValueError, match="quantization"):
        load_recipe("tiny", ["quantization=int3"])
    with pytest.raises(ClearValueError, match="leave one of them out"):
        LoopSettings(shard=True, quantization="int8")
    with pytest.raises(ClearValueError, match="passed loaded"):
        attach_for(Recipe(loop=LoopSettings(quantization="nf4")), bagel(0))


@needs_library
def test_a_recipe_trains_on_a_quantized_base(folders):
    from clear_adapters.training.build import attach_for
    from clear_adapters.training.recipe import LoopSettings, Recipe

    recipe = Recipe(loop=LoopSettings(quantization="nf4", bf16=False))
    attached = attach_for(recipe, str(folders["bagel"]), device="cpu")
    assert next(quantized_layers(attached.backbone.model)).weight.dtype == torch.uint8
    attached.detach()
