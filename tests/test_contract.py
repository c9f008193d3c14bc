"""The checks find what is wrong, and say it; a third party's package is found, validated and attached."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clear_adapters.adapter import attach
from clear_adapters.backbones import BACKBONES, get_backbone, list_backbones
from clear_adapters.backbones.base import LoraGroup
from clear_adapters.backbones.cache import Cache, Pass
from clear_adapters.backbones.codes import CodesBackbone
from clear_adapters.backbones.janus.backbone import JanusBackbone
from clear_adapters.backbones.janus.spec import SPEC
from clear_adapters.backbones.janus.tiny import build
from clear_adapters.config import LoraSettings
from clear_adapters.contract import CHECKS, ContractError, find_spec, validate
from clear_adapters.errors import BrokenEntryError, ClearTypeError, ClearValueError, UnknownNameError

ROOT = Path(__file__).parents[1]


def problem(check, spec=SPEC):
    (result,) = validate(spec, [check])
    return result.problem


# ------------------------------------------------------------------------------------------------------- faults


def wrong_width(patch):
    patch.setattr(JanusBackbone, "latent_width", 9)


def wrong_tags(patch):
    patch.setattr(JanusBackbone, "decode_text", lambda self, ids: self.tokenizer.decode(ids))


def bridge_ignored(patch):
    read = CodesBackbone.read_restoration
    patch.setattr(
        CodesBackbone,
        "read_restoration",
        lambda self, c, found, bridge, rows=None: read(self, c, found, None, rows),
    )


def global_random(patch):
    embed = JanusBackbone.embed_codes
    patch.setattr(JanusBackbone, "embed_codes", lambda self, c: embed(self, c) + torch.rand(1) * 0.01)


def padding_seen(patch):
    cached = CodesBackbone._pass
    patch.setattr(
        CodesBackbone, "_pass", lambda self, c, embeds, valid: cached(self, c, embeds, torch.ones_like(valid))
    )


def other_positions(patch):
    uncached = CodesBackbone.forward
    patch.setattr(
        CodesBackbone,
        "forward",
        lambda self, batch, bridge=None: uncached(
            self, replace(batch, positions=2 * batch.positions), bridge
        ),
    )


def always_understood(patch):
    read = CodesBackbone.read_image
    patch.setattr(
        CodesBackbone,
        "read_image",
        lambda self, c, images, as_condition=True, understanding=True, rows=None: read(
            self, c, images, as_condition, True, rows
        ),
    )


def no_gradient(patch):
    embed = JanusBackbone.embed_latents
    patch.setattr(JanusBackbone, "embed_latents", lambda self, x: embed(self, x).detach())


def not_recognised(patch):
    patch.setattr(JanusBackbone, "recognises", classmethod(lambda cls, folder: False))


def tokenizer_in_training(patch):
    from clear_adapters.backbones.emu3 import backbone as emu3

    patch.setattr(emu3, "inference", lambda module: nullcontext())


def one_storage(patch):
    def never_copies(self, length, more):
        storage = self._storage
        if storage.data.shape[4] < 2000:
            shape = list(storage.data.shape)
            shape[4] = 2000
            data = storage.data.new_zeros(shape)
            data[..., :length, :] = storage.data[..., :length, :]
            storage.data = data
        return Pass(storage, length, length + more)

    patch.setattr(Cache, "reserve", never_copies)


@pytest.mark.parametrize(
    ("fault", "check", "told"),
    [
        (wrong_width, "widths", "latent_width=9"),
        (wrong_tags, "tags", "end-of-turn token shows"),
        (bridge_ignored, "bridge", "ignores it"),
        (global_random, "detach", "same seeds give another path"),
        (padding_seen, "batch", "one by one"),
        (other_positions, "forward", "differ from the recorded"),
        (other_positions, "replay", "differs from the rollout"),
        (always_understood, "recorded", "the packed row scores the latent that row 1"),
        (no_gradient, "gradients", "get no gradient"),
        (not_recognised, "folder", "no model of a known backbone"),
        (one_storage, "forks", "fork"),
        (tokenizer_in_training, "frozen", "inference mode"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_is_found_and_named(monkeypatch, fault, check, told):
    fault(monkeypatch)
    found = problem(check, get_backbone("emu3") if fault is tokenizer_in_training else SPEC)
    assert found is not None
    assert told in found


@pytest.mark.parametrize(
    ("change", "check", "told"),
    [
        ({"license": ""}, "facts", "no license"),
        ({"never": ("model.nothing",)}, "facts", "'model.nothing'"),
        ({"extras": ("model.nothing",)}, "facts", "'model.nothing'"),
        ({"never": ("model.generation_head",)}, "targets", "forbids"),
        ({"kind": "flow"}, "widths", "kind is flow"),
        ({"decodes": False}, "widths", "decodes is False"),
        ({"stages": ("sft", "other")}, "stages", "other"),
        (
            {"groups": {**SPEC.groups, "generation": replace(SPEC.groups["generation"], once=("lm_heads",))}},
            "targets",
            "'lm_heads'",
        ),
    ],
)
def test_a_wrong_spec_is_found(monkeypatch, change, check, told):
    spec = replace(SPEC, name="other", **change)
    monkeypatch.setattr(JanusBackbone, "spec", spec)
    found = problem(check, spec)
    assert found is not None
    assert told in found
    assert "other" not in list_backbones()


def test_names_and_modules_that_are_no_backbones():
    assert find_spec("janus") is get_backbone("janus")
    assert find_spec("clear_adapters.backbones.janus.spec:SPEC") is SPEC
    with pytest.raises(UnknownNameError, match="janus"):
        find_spec("janu")
    with pytest.raises(BrokenEntryError, match="no_such"):
        find_spec("no_such_module:SPEC")
    with pytest.raises(ClearTypeError, match="not a BackboneSpec"):
        find_spec("clear_adapters.contract:CHECKS")
    with pytest.raises(UnknownNameError, match="widths"):
        validate(SPEC, ["width"])
    with pytest.raises(ClearValueError, match="taken by"):
        list(validate(replace(SPEC, title="another"), ["facts"]))
    assert BACKBONES.get("janus") is SPEC


def test_what_cannot_be_built_is_a_result_and_no_traceback():
    broken = replace(SPEC, name="broken", tiny="clear_adapters.backbones.janus.tiny:nothing")
    for check in ("facts", "tags"):
        assert "clear_adapters.backbones.janus.tiny:nothing" in problem(check, broken)
    assert next(iter(CHECKS)) == "facts"


# ------------------------------------------------------------------------------------------------- third parties


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which pip has installed the example of docs/, in a copy so that nothing is built in the tree."""
    place = tmp_path_factory.mktemp("example")
    shutil.copytree(ROOT / "docs/examples/mosaic", place / "source")
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(place / "site")]
    done = subprocess.run(
        [*command, str(place / "source")], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return place / "site"


def python(installed, *arguments):
    path = os.pathsep.join([str(ROOT), str(installed)])
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=110, check=False)


def test_an_installed_backbone_is_listed_with_its_distribution(installed):
    done = python(installed, "-m", "clear_adapters.cli", "backbones")
    assert done.returncode == 0, done.stderr
    for told in ("mosaic", "clear-mosaic 0.1.0", "restore (codes)", "train grpo", "janus", "licence"):
        assert told in done.stdout


@pytest.mark.slow
def test_an_installed_backbone_is_validated(installed):
    done = python(installed, "-m", "clear_adapters.cli", "validate", "mosaic")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == len(CHECKS)
    assert "All checks passed." in done.stdout


def test_a_broken_backbone_fails_the_validation_with_exit_code_1(installed, tmp_path):
    shutil.copytree(installed, tmp_path / "site")
    spec = tmp_path / "site/clear_mosaic/spec.py"
    spec.write_text(spec.read_text().replace('"tile_in"', '"tile_inn"'))
    done = python(
        tmp_path / "site",
        *("-m", "clear_adapters.cli", "validate", "mosaic", "--check", "targets", "--check", "tags"),
    )
    assert done.returncode == 1
    assert "FAIL targets" in done.stdout
    assert "'tile_inn'" in done.stdout
    assert "ok   tags" in done.stdout


def test_an_installed_backbone_is_attached(installed, tmp_path):
    """As a model with its tokenizer: the family is found by the entry point alone."""
    script = """
import sys
from PIL import Image
from clear_adapters import TextSampling, attach
from clear_mosaic.tiny import build
backbone = build()
text = TextSampling(max_new_tokens=8)
attached = attach(backbone.model, processor=backbone.tokenizer)
picture = Image.new("RGB", (64, 48), (200, 30, 30))
reply = attached.answer(picture, "Which colour?", restore="always", text=text)
attached.save_pretrained(sys.argv[1])
attached.detach()
again = attach(backbone, sys.argv[1]).answer(picture, "Which colour?", restore="always", text=text)
assert again.text == reply.text
print(attached.config.backbone, reply.restored_image.size)
"""
    done = python(installed, "-c", script, str(tmp_path / "adapter"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "mosaic (64, 48)"


# ------------------------------------------------------------------------------------------ more than one module


class _TwoRoots(JanusBackbone):
    """A Janus whose picture head stands beside it as a root of its own, three layers deep."""

    def __init__(self, janus, generator):
        self.__dict__.update(vars(janus))
        self.whole = janus.model
        self.model = torch.nn.ModuleDict({"reasoner": janus.model, "generator": generator})

    @property
    def decoder(self):
        return self.whole.model.language_model

    @classmethod
    def accepts(cls, model):
        return isinstance(model, dict) and set(model) == {"reasoner", "generator"}


def test_a_family_of_two_root_modules(monkeypatch):
    """Paths begin with the root's name, and each root's layers are counted by themselves."""
    layers = torch.nn.ModuleList(torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4)}) for _ in range(3))
    generator = torch.nn.ModuleDict({"layers": layers})
    understanding = SPEC.groups["understanding"]
    spec = replace(
        SPEC,
        name="two",
        roots=("reasoner", "generator"),
        groups={
            "understanding": replace(understanding, prefix=f"reasoner.{understanding.prefix}"),
            "generation": LoraGroup("generator.layers", ("proj",)),
        },
        extras=("reasoner.model.aligner",),
        never=("reasoner.model.vision_model", "reasoner.model.vqmodel"),
    )
    monkeypatch.setattr(_TwoRoots, "spec", spec)
    backbone = _TwoRoots(build(0), generator)
    assert backbone.lora_names(["generation"]) == [f"generator.layers.{i}.proj" for i in range(3)]
    assert len(backbone.lora_names(["understanding"])) == 7 * 2
    for check in ("facts", "targets"):
        CHECKS[check](backbone)
    attached = attach(backbone, lora=LoraSettings({"understanding": 2, "generation": 2}))
    adapted = {n for n, m in backbone.model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(backbone.lora_names(["understanding", "generation"]))
    attached.detach()
    monkeypatch.setattr(_TwoRoots, "spec", replace(spec, roots=("reasoner", "dit")))
    with pytest.raises(ContractError, match="dit"):
        CHECKS["facts"](backbone)
