"""Malformed adapters, each refused with its own message before anything touches the model."""

import hashlib
import json
import pickle
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from clear_adapters import store
from clear_adapters.adapter import attach
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.config import LoraSettings
from clear_adapters.errors import AdapterError, ClearError
from clear_adapters.hub.push import push_folder
from clear_adapters.safety import check_names
from tests.hub_client import DEPRECATED, turn_to
from tests.local_hub import local_hub

pytestmark = pytest.mark.filterwarnings(DEPRECATED)

CONFIG, STOCK = "clear_config.json", "lora/adapter_config.json"
WEIGHTS, BRIDGE = "lora/adapter_model.safetensors", "bridge.safetensors"


@pytest.fixture(scope="module")
def backbone():
    return build(0)


@pytest.fixture(scope="module")
def original(backbone, tmp_path_factory):
    """Contents of a sound adapter by name."""
    attached = attach(backbone, lora=LoraSettings({"understanding": 2}))
    folder = attached.save_pretrained(tmp_path_factory.mktemp("safety") / "adapter")
    attached.detach()
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edited(name, **changes):
    """A change of a JSON file; `...` takes a key away."""

    def change(files, folder):
        data = {**json.loads(files[name]), **changes}
        (folder / name).write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))

    return change


def added(name, content=b"x"):
    def change(files, folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def removed(name):
    return lambda files, folder: (folder / name).unlink()


def retensored(name, change):
    def apply(files, folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return apply


def linked(name, target):
    def change(files, folder):
        (folder.parent / "secret").write_bytes(files.get(name, b"secret"))
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def header(claim):
    """A safetensors file that claims what it does not hold."""
    text = json.dumps(claim).encode()
    return struct.pack("<Q", len(text)) + text


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


HUGE = {"down.weight": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64 - 1]}}
CASES = {
    "pickle beside": (
        added("lora/optimizer.pt", pickle.dumps(Bomb())),
        r"optimizer\.pt: pickled files can run code",
    ),
    "pickle of the trainer": (added("training_args.bin"), r"training_args\.bin: pickled"),
    "pickle in capitals": (added("Model.PKL"), r"Model\.PKL: pickled"),
    "numpy": (added("extra/latents.npy"), r"extra/latents\.npy: pickled"),
    "pickle as safetensors": (
        added(BRIDGE, pickle.dumps(Bomb())),
        r"bridge\.safetensors is damaged, or is no saf",
    ),
    "code": (
        added("modeling_clear.py", b"import os"),
        r"modeling_clear\.py: an adapter .* brings no program",
    ),
    "compiled code": (added("lora/_ops.so"), r"lora/_ops\.so: an adapter"),
    "script": (added("install.sh"), r"install\.sh: an adapter"),
    "notebook": (added("run.ipynb"), r"run\.ipynb: an adapter"),
    "control characters": (added("a\nb.txt"), r"printable text"),
    "backslash": (added("lora\\bridge.safetensors"), "a backslash separates"),
    "link to a file outside": (
        linked(WEIGHTS, "../../secret"),
        r"lora/adapter_model\.safetensors, a link to .*secret",
    ),
    "link of another file": (linked("notes.txt", "/etc/hostname"), r"notes\.txt, a link to /etc/hostname"),
    "link to a folder outside": (linked("data", "/etc"), "data, a link to /etc"),
    "link that leads in a circle": (linked("circle", "circle"), "circle, a link that leads nowhere"),
    "revision of the base leads up": (
        edited(CONFIG, base_revision="../../../../etc/passwd"),
        r"base_revision='\.\./",
    ),
    "a number without bounds": (
        edited(CONFIG, provenance={"seconds": 10**400}),
        r"not valid JSON: 10{39} is no number",
    ),
    "half a character": (edited(CONFIG, provenance={"device": "\ud800"}), "not valid JSON: .*surrogates"),
    "base is a path": (edited(CONFIG, base_model="/models/x"), r"base_model='/models/x'"),
    "base leads up": (edited(CONFIG, base_model="../other"), r"base_model='\.\./other'"),
    "base is an address": (edited(CONFIG, base_model="http://evil/x"), r"base_model='http://evil/x'"),
    "stock base is a path": (
        edited(STOCK, base_model_name_or_path="/etc"),
        r"base_model_name_or_path='/etc'",
    ),
    "stock base leads up": (
        edited(STOCK, base_model_name_or_path="a/../../b"),
        r"name_or_path='a/\.\./\.\./b'",
    ),
    "newer schema": (edited(CONFIG, schema_version=99), r"schema_version=99.*upgrade"),
    "no schema": (edited(CONFIG, schema_version=...), "lacks schema_version"),
    "schema in words": (edited(CONFIG, schema_version="1"), r"schema_version='1'"),
    "unknown family": (edited(CONFIG, backbone="bagle"), "Did you mean 'bagel'"),
    "no settings": (removed(CONFIG), r"lacks clear_config\.json"),
    "no weights": (removed(WEIGHTS), r"lacks lora/adapter_model\.safetensors"),
    "settings too long": (added(CONFIG, b" " * (17 * 2**20)), "no settings are that long"),
    "settings too deep": (added(STOCK, b"[" * 100_000), r"adapter_config\.json is not valid JSON"),
    "not UTF-8": (added(CONFIG, b"\xff\xfe"), "is not UTF-8 text"),
    "not a number": (added(CONFIG, b'{"schema_version": NaN}'), "NaN is no number"),
    "weights cut off": (
        lambda f, d: (d / WEIGHTS).write_bytes(f[WEIGHTS][:-8]),
        r"model\.safetensors is damaged",
    ),
    "claims more than it holds": (added(BRIDGE, header(HUGE)), r"bridge\.safetensors is damaged.*"),
    "wrong shape": (
        retensored(BRIDGE, lambda t: t.update({"up.bias": torch.zeros(5)})),
        r"up\.bias has shape \(5,\)",
    ),
    "missing tensor": (retensored(BRIDGE, lambda t: t.pop("up.bias")), "1 missing: up.bias"),
    "unknown tensor": (retensored(WEIGHTS, lambda t: t.update(x=torch.zeros(1))), "1 unexpected: x"),
    "whole numbers": (
        retensored(BRIDGE, lambda t: t.update({"up.bias": t["up.bias"].long()})),
        r"up\.bias is of type torch\.int64",
    ),
    "not finite": (
        retensored(BRIDGE, lambda t: t.update({"up.bias": t["up.bias"] + float("inf")})),
        r"up\.bias holds values that are not finite",
    ),
    "bridge of another width": (edited(CONFIG, bridge={"latent_width": 16, "width": 33}), "width=33"),
    "rank beyond memory": (
        edited(CONFIG, lora={"groups": {"understanding": 10**9}}),
        "rank must be from 1 to",
    ),
    "a group that is none": (edited(CONFIG, lora={"groups": {"sparkle": 2}}), "'sparkle'"),
    "a layer that is no target": (edited(STOCK, target_modules=["lm_head"]), r"target_modules=\['lm_head'\]"),
    "another method": (edited(STOCK, peft_type="IA3"), "no LoRA configuration"),
    "modules trained beside": (edited(STOCK, modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
    "weights nobody knows of": (edited(CONFIG, bridge=None), r"holds bridge\.safetensors, but"),
}


def state_of(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return [id(m) for m in model.modules()], [p.requires_grad for p in model.parameters()], digest.hexdigest()


def test_each_is_refused_with_its_own_message_and_leaves_the_model_alone(backbone, original, tmp_path):
    before = state_of(backbone.model)
    told = {}
    for number, (name, (change, message)) in enumerate(CASES.items()):
        folder = tmp_path / str(number) / "adapter"
        for file, content in original.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        change(original, folder)
        with pytest.raises(ClearError) as caught:
            attach(backbone, folder)
        told[name] = str(caught.value).replace(str(folder), "")
        assert re.search(message, told[name]), f"{name}: {told[name]}"
        assert state_of(backbone.model) == before, name
        with pytest.raises(ClearError):  # nor does it reach the Hub, where no model is at hand
            store.read_adapter(folder).check(backbone)
    assert len(CASES) > 40
    assert len(set(told.values())) == len(told)
    attach(backbone, lora=LoraSettings({"understanding": 2})).detach()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/passwd", "absolute path"),
        ("C:/x.safetensors", "absolute path"),
        ("~/x", "absolute path"),
        ("\\\\host\\x", "absolute path"),
        ("../x.safetensors", "parent folder"),
        ("lora/../../x", "parent folder"),
        ("lora\\..\\x", "parent folder"),
        ("a\0b", "printable"),
        ("", "printable"),
        ("lora/x.PT", "pickled"),
        ("deep/er/x.dll", "no program"),
    ],
)
def test_names_that_no_adapter_has(name, message):
    with pytest.raises(AdapterError, match=message):
        check_names(["clear_config.json", name], "it")


def test_names_that_adapters_have():
    check_names(
        [
            ".gitattributes",
            "README.md",
            "lora/adapter_model.safetensors",
            ".eval_results/x.yaml",
            "a..b.txt",
            "LICENSE",
        ],
        "it",
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"training_args.bin": b"x"}, r"repository user/bad holds training_args\.bin: pickled"),
        ({"modeling.py": b"x"}, r"repository user/bad holds modeling\.py: an adapter"),
        ({"../../evil.txt": b"x"}, "parent folder"),
        ({CONFIG: None}, "repository user/bad has no clear_config.json"),
        ({CONFIG: None, "adapter_config.json": b"{}"}, "plain PEFT adapter"),
        ({WEIGHTS: None}, r"lacks lora/adapter_model\.safetensors"),
        ({WEIGHTS: b"half"}, r"adapter_model\.safetensors is damaged"),
    ],
)
def test_a_repository_is_refused_as_a_folder_is(backbone, original, tmp_path, monkeypatch, extra, message):
    before = state_of(backbone.model)
    files = {k: v for k, v in {**original, **extra}.items() if v is not None}
    with local_hub() as hub:
        turn_to(hub, tmp_path / "hf", monkeypatch)
        hub.add("user/bad", files)
        for _ in range(2):  # and again from the cache
            with pytest.raises(AdapterError, match=message):
                attach(backbone, "user/bad")
        fetched = [r for r in hub.requests if r.startswith("GET") and "/resolve/" in r]
        assert not [r for r in fetched if "evil" in r or "training_args" in r or "modeling" in r]
    assert state_of(backbone.model) == before
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_malformed_folder_is_not_pushed(original, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    for file, content in {**original, "train.py": b"x"}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    with local_hub() as hub:
        turn_to(hub, tmp_path / "hf", monkeypatch)
        with pytest.raises(AdapterError, match=r"train\.py: an adapter"):
            push_folder(folder, "user/mine")
        assert hub.requests == []
