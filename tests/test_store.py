"""Adapter folders: written whole or not at all, read with every doubt, and names resolved to folders."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clear_adapters import store
from clear_adapters.adapter import attach
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.config import LoraSettings
from clear_adapters.errors import AdapterError, BackboneMismatchError, CheckpointError, UnknownNameError

ALL = {
    "clear_config.json",
    "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
    "bridge.safetensors",
    "extra.safetensors",
}


@pytest.fixture(scope="module")
def backbone():
    return build(0)


@pytest.fixture(scope="module")
def original(backbone, tmp_path_factory):
    settings = LoraSettings({"understanding": 2, "generation": 3}, whole=("vae2llm",))
    attached = attach(backbone, lora=settings)
    with torch.no_grad():
        for _, parameter in attached.named_parameters():
            parameter.normal_()
    folder = attached.save_pretrained(tmp_path_factory.mktemp("store") / "adapter")
    attached.detach()
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy to be damaged."""
    for file in files(original):
        (tmp_path / "adapter" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "adapter" / file).write_bytes((original / file).read_bytes())
    return tmp_path / "adapter"


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def edit(path: Path, **changes):
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def retensor(path: Path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# ----------------------------------------------------------------------------------------------------- writing


def test_the_folder_is_the_stated_one(original):
    assert files(original) == ALL
    stock = json.loads((original / "lora/adapter_config.json").read_text())
    assert stock["target_modules"] == sorted(stock["target_modules"])
    assert list(stock) == sorted(stock)
    assert set(load_file(original / "extra.safetensors")) == {"vae2llm.weight", "vae2llm.bias"}


def test_the_files_are_the_same_every_time(backbone, original, tmp_path):
    attached = attach(backbone, original)
    again = attached.save_pretrained(tmp_path / "again")
    attached.detach()
    assert {f: (again / f).read_bytes() for f in ALL} == {f: (original / f).read_bytes() for f in ALL}


def test_nothing_is_overwritten_unasked(backbone, folder):
    (folder / "README.md").write_text("mine")
    (folder / "lora" / "notes.txt").write_text("mine too")
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_text("log")
    attached = attach(backbone, lora=LoraSettings({"understanding": 2}))
    before = {f: (folder / f).read_bytes() for f in files(folder)}
    with pytest.raises(AdapterError, match=r"not empty.*overwrite=True"):
        attached.save_pretrained(folder)
    assert {f: (folder / f).read_bytes() for f in files(folder)} == before
    attached.save_pretrained(folder, overwrite=True)
    attached.detach()
    foreign = {"README.md", "lora/notes.txt", "runs/log"}
    assert files(folder) == (ALL - {"extra.safetensors"}) | foreign
    assert {(folder / f).read_bytes() for f in foreign} == {b"mine", b"mine too", b"log"}
    assert store.read_adapter(folder).config.lora.ranks == {"understanding": 2}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_an_empty_folder_is_taken_and_a_file_is_not(backbone, tmp_path):
    attached = attach(backbone, lora=LoraSettings({"understanding": 2}))
    (tmp_path / "empty").mkdir()
    attached.save_pretrained(tmp_path / "empty")
    attached.save_pretrained(str(tmp_path / "deep" / "er"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="is a file"):
        attached.save_pretrained(tmp_path / "file", overwrite=True)
    with pytest.raises(AdapterError, match="dtype"):
        attached.save_pretrained(tmp_path / "half", dtype=torch.float16)
    attached.detach()
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_failed_write_leaves_what_was_there(backbone, folder, monkeypatch, call):
    attached = attach(backbone, lora=LoraSettings({"understanding": 2}, whole=("vae2llm",)))
    before = {f: (folder / f).read_bytes() for f in files(folder)}
    calls = []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise OSError("disk full")
        return save_file(*args, **kwargs)

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        attached.save_pretrained(folder, overwrite=True)
    attached.detach()
    assert {f: (folder / f).read_bytes() for f in files(folder)} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_failed_move_puts_the_old_folder_back(backbone, folder, monkeypatch):
    attached = attach(backbone, lora=LoraSettings({"understanding": 2}))
    before = {f: (folder / f).read_bytes() for f in files(folder)}
    rename = Path.rename

    def fails(self, target):
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no"):
        attached.save_pretrained(folder, overwrite=True)
    attached.detach()
    assert {f: (folder / f).read_bytes() for f in files(folder)} == before


def test_a_link_is_written_through(backbone, folder, tmp_path):
    """An output folder on another disk, linked into place."""
    (folder / "README.md").write_text("mine")
    (tmp_path / "links").mkdir()
    attached = attach(backbone, lora=LoraSettings({"understanding": 2}))
    for name, target in (("full", folder), ("new", tmp_path / "new" / "place")):
        link = tmp_path / "links" / name
        link.symlink_to(target)
        assert attached.save_pretrained(link, overwrite=True) == link
        assert link.readlink() == target
        assert store.read_adapter(target).config.lora.ranks == {"understanding": 2}
    attached.detach()
    assert (folder / "README.md").read_text() == "mine"
    assert sorted(p.name for p in (tmp_path / "links").iterdir()) == ["full", "new"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(backbone, tmp_path, value):
    attached = attach(backbone, lora=LoraSettings({"understanding": 2}, whole=("vae2llm",)))
    for name, file in (("lora_A", "lora/"), ("vae2llm.bias", "extra."), ("bridge.up.bias", "bridge.")):
        parameter = next(p for n, p in attached.named_parameters() if name in n)
        before = parameter.detach().clone()
        parameter.data.view(-1)[0] = value
        with pytest.raises(AdapterError, match=f"{file}.*not finite"):
            attached.save_pretrained(tmp_path / "deep" / "adapter")
        parameter.data.copy_(before)
    attached.detach()
    assert not (tmp_path / "deep").exists()


def test_types_of_the_files(backbone, original, tmp_path):
    attached = attach(backbone, original)
    for dtype in (None, torch.float32, torch.bfloat16):
        saved = attached.save_pretrained(tmp_path / str(dtype), dtype=dtype)
        found = {t.dtype for f in ALL if f.endswith(".safetensors") for t in load_file(saved / f).values()}
        assert found == {dtype or torch.float32}
    attached.detach()


# ----------------------------------------------------------------------------------------------------- reading


def refused(backbone, folder, message, error=AdapterError):
    """That an attach fails, naming what is wrong, and leaves the model alone."""
    modules = [id(m) for m in backbone.model.modules()]
    flags = [p.requires_grad for p in backbone.model.parameters()]
    with pytest.raises(error, match=message):
        attach(backbone, folder)
    assert [id(m) for m in backbone.model.modules()] == modules
    assert [p.requires_grad for p in backbone.model.parameters()] == flags


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_missing_file_is_named(backbone, folder, name):
    (folder / name).unlink()
    refused(backbone, folder, f"lacks {name}")


@pytest.mark.parametrize("name", sorted(f for f in ALL if f.endswith("safetensors")))
def test_a_pickle_is_refused_by_name(backbone, folder, name):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("a pickle was loaded",)

    (folder / name).unlink()
    (folder / name).with_suffix(".bin").write_bytes(pickle.dumps(Bomb()))
    refused(backbone, folder, rf"{Path(name).stem}\.bin.*can run code")
    (folder / name).with_suffix(".bin").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refused(backbone, folder, f"{name}.*safetensors")


def test_foreign_files_are_never_read(backbone, folder):
    (folder / "other.safetensors").write_bytes(b"junk")
    (folder / "notes.txt").write_bytes(b"\xff\xfe")
    (folder / "README.md").write_bytes(b"\xff\xfe")
    attach(backbone, folder).detach()


@pytest.mark.parametrize("name", ["clear_config.json", "lora/adapter_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000])
def test_a_damaged_settings_file_is_named(backbone, folder, name, content):
    (folder / name).write_bytes(content)
    refused(backbone, folder, name)


@pytest.mark.parametrize("name", sorted(f for f in ALL if f.endswith("safetensors")))
def test_damaged_weights_are_named(backbone, folder, name):
    whole = (folder / name).read_bytes()
    for content in (b"", whole[:-4], b"\xff" * 100):
        (folder / name).write_bytes(content)
        refused(backbone, folder, name)


@pytest.mark.parametrize("name", sorted(f for f in ALL if f.endswith("safetensors")))
@pytest.mark.parametrize(
    ("change", "message", "error"),
    [
        (lambda t: t.pop(min(t)), "1 missing", BackboneMismatchError),
        (lambda t: t.update(sparkle=torch.zeros(1)), "1 unexpected: sparkle", BackboneMismatchError),
        (lambda t: t.update({min(t): torch.zeros(7, 7)}), r"shape \(7, 7\)", BackboneMismatchError),
        (lambda t: t.update({min(t): t[min(t)] * float("nan")}), "not finite", AdapterError),
        (lambda t: t.update({min(t): t[min(t)].long()}), "int64", AdapterError),
        (lambda t: t.update({min(t): t[min(t)].double()}), "float64", AdapterError),
    ],
)
def test_wrong_weights_are_named(backbone, folder, name, change, message, error):
    retensor(folder / name, change)
    refused(backbone, folder, f"{name}.*{message}", error)


@pytest.mark.parametrize(
    ("changes", "message", "error"),
    [
        ({"backbone": "show-o"}, "'show-o'", UnknownNameError),
        ({"backbone": "bagle"}, "Did you mean 'bagel'", UnknownNameError),
        ({"schema_version": 2}, "upgrade", AdapterError),
        ({"base_model": "/models/x"}, "base_model", AdapterError),
        ({"bridge": {"latent_width": 16, "width": 33}}, "width=33", BackboneMismatchError),
        ({"bridge": {"latent_width": 16, "width": "32"}}, "bridge", AdapterError),
        ({"bridge": {"size": 3}}, "bridge", AdapterError),
        ({"bridge": {"latent_width": 16, "width": 32, "hidden": 10**12}}, "shape", BackboneMismatchError),
        ({"bridge": None}, r"holds bridge\.safetensors", AdapterError),
        ({"lora": None}, r"holds extra\.safetensors", AdapterError),
        (
            {"lora": {"groups": {"understanding": 2, "sparkle": 3}, "whole": ["vae2llm"]}},
            "'sparkle'",
            BackboneMismatchError,
        ),
        (
            {"lora": {"groups": {"understanding": 2, "generation": 10**12}, "whole": ["vae2llm"]}},
            "rank must be from 1 to",
            AdapterError,
        ),
        ({"lora": {"groups": {"understanding": 2}, "whole": ["vae2llm"]}}, "lora", AdapterError),
        (
            {"lora": {"groups": {"understanding": 2, "generation": 3}, "whole": ["vit_model"]}},
            "'vit_model' cannot be trained whole",
            BackboneMismatchError,
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(backbone, folder, changes, message, error):
    edit(folder / "clear_config.json", **changes)
    refused(backbone, folder, message, error)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 4},
        {"lora_alpha": 1},
        {"target_modules": ["q_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ...},
        {"rank_pattern": {}},
        {"peft_type": "IA3"},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"use_rslora": True},
        {"exclude_modules": ["x"]},
        {"layer_replication": [[0, 2]]},
        {"something_new": True},
    ],
)
def test_a_stock_config_that_says_otherwise_is_refused(backbone, folder, changes):
    edit(folder / "lora" / "adapter_config.json", **changes)
    refused(backbone, folder, "adapter_config")


def test_a_stock_config_of_another_peft_is_taken(backbone, folder):
    """Keys that one version writes and another does not know, while they ask for nothing."""
    edit(
        folder / "lora" / "adapter_config.json",
        peft_version="0.1",
        qalora_group_size=...,
        something_new=None,
        something_sized=16,
        base_model_name_or_path="elsewhere",
        inference_mode=False,
    )
    attach(backbone, folder).detach()


def test_a_plain_peft_folder_says_so(backbone, folder):
    refused(backbone, folder / "lora", "plain PEFT adapter")


# ------------------------------------------------------------------------------------------------------- names


@pytest.fixture
def builtin(tmp_path, monkeypatch, original):
    root = tmp_path / "builtin"
    (root / "bagel-tiny").mkdir(parents=True)
    (root / "bagel-tiny" / "llm_config.json").write_text("{}")
    (root / "pictures").mkdir()
    (root / "clear-bagel-tiny").symlink_to(original)
    monkeypatch.setattr(store, "_builtin_root", lambda: root)
    return root


def test_builtin_names(builtin):
    assert store.builtin_names() == ["builtin:bagel-tiny", "builtin:clear-bagel-tiny"]
    assert store.builtin_names("model") == ["builtin:bagel-tiny"]
    assert store.builtin_names("adapter") == ["builtin:clear-bagel-tiny"]
    assert store.resolve("builtin:bagel-tiny", "model") == builtin / "bagel-tiny"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("builtin:bagel-tinny", "model", "Did you mean 'builtin:bagel-tiny'"),
        ("builtin:clear-bagel", "adapter", "Did you mean 'builtin:clear-bagel-tiny'"),
        ("builtin:bagel-tiny", "adapter", "not of that kind"),
        ("builtin:pictures", "model", "Unknown"),
        ("builtin:../builtin/bagel-tiny", "model", "Unknown"),
        ("builtin:", "model", "Unknown"),
    ],
)
def test_unknown_builtin_names(builtin, name, kind, message):
    with pytest.raises(UnknownNameError, match=message):
        store.resolve(name, kind)


@pytest.mark.parametrize(("kind", "error"), [("model", CheckpointError), ("adapter", AdapterError)])
@pytest.mark.parametrize("name", ["./runs/x", "/no/such", "runs/a/b", "~/nothing-there", "..", "x y"])
def test_a_path_that_is_none_offers_both_spellings(builtin, tmp_path, monkeypatch, kind, error, name):
    monkeypatch.chdir(tmp_path)
    if name == "..":
        assert store.resolve(name, kind).is_dir()
        return
    with pytest.raises(error, match=r"(?s)no folder.*'\./.*'owner/.*builtin:NAME"):
        store.resolve(name, kind)
    with pytest.raises(error, match="no folder"):
        store.resolve(Path("owner/name"), kind)


def test_a_forgotten_prefix_is_offered(builtin):
    with pytest.raises(CheckpointError, match="Did you mean 'builtin:bagel-tiny'"):
        store.resolve("bagel-tiny", "model")


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="is a file"):
        store.resolve(tmp_path / "a.safetensors", "adapter")


def test_reading_needs_no_model(original):
    stored = store.read_adapter(original)
    assert stored.config.backbone == "bagel"
    assert set(stored.extra) == {"vae2llm.weight", "vae2llm.bias"}
    assert replace(stored.config) == stored.config


def test_a_revision_that_leads_out_of_the_cache_is_refused():
    for revision in ("../../../outside.txt", "/tmp/outside.txt", "a b", ""):
        with pytest.raises(AdapterError, match="revision="):
            store.resolve("user/mine", "adapter", revision=revision)
