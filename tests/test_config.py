"""`clear_config.json`: what is written is read back, and what is wrong is named."""

import json

import pytest

from clear_adapters._version import __version__
from clear_adapters.config import SCHEMA_VERSION, ClearConfig, LoraSettings, is_builtin_name, is_hub_id
from clear_adapters.errors import AdapterError, ClearTypeError, ClearValueError
from clear_adapters.prompts import Protocol
from clear_adapters.sampling import LatentSampling, TextSampling

FULL = ClearConfig(
    backbone="bagel",
    base_model="builtin:bagel-tiny",
    base_revision="abc",
    bridge={"latent_width": 16, "width": 32, "hidden": 64},
    lora=LoraSettings({"understanding": 8, "generation": 4}, alpha=5, dropout=0.1, whole=("vae2llm",)),
    protocol=Protocol("mine", "2", "Look.", "Asked: {question}"),
    stage="sft",
    text=TextSampling(max_new_tokens=9, temperature=0.5),
    latent=LatentSampling(steps=7, guidance_interval=(0.1, 0.9)),
    max_restores=1,
    provenance={"recipe": "tiny", "seeds": [1, 2]},
)


def test_round_trip():
    text = FULL.to_json()
    assert ClearConfig.from_json(text) == FULL
    assert ClearConfig.from_json(text).to_json() == text
    data = json.loads(text)
    assert list(data) == sorted(data)
    assert (data["schema_version"], data["library_version"]) == (SCHEMA_VERSION, __version__)
    assert data["protocol"]["system"] == "Look."


def test_what_is_left_out_has_a_default():
    config = ClearConfig.from_dict({"backbone": "bagel", "schema_version": 1, "library_version": "0.1.0"})
    assert config == ClearConfig("bagel", library_version="0.1.0")
    assert config.protocol.name == "default"
    assert config.max_restores == 2
    partial = ClearConfig.from_dict(
        {"backbone": "bagel", "schema_version": 1, "text_sampling": {"top_k": 3}, "latent_sampling": None}
    )
    assert partial.text == TextSampling(top_k=3)


@pytest.mark.parametrize("place", ["", "text_sampling", "protocol", "lora"])
def test_an_unknown_key_is_named_and_left_out(place):
    data = FULL.to_dict()
    (data[place] if place else data)["sparkle"] = 1
    with pytest.warns(UserWarning, match="'sparkle'"):
        assert ClearConfig.from_dict(data) == FULL


def test_a_newer_schema_is_refused_before_anything_else_is_read():
    with pytest.raises(AdapterError, match=r"schema_version=2.*upgrade"):
        ClearConfig.from_dict({"backbone": 3, "schema_version": 2, "sparkle": [], "library_version": "9.9"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema_version", "1", "schema_version"),
        ("schema_version", True, "schema_version"),
        ("schema_version", 0, "schema_version"),
        ("backbone", 7, "backbone"),
        ("backbone", "", "backbone"),
        ("base_model", "/etc/passwd", "base_model"),
        ("base_model", "../model", "base_model"),
        ("base_model", "a/../b", "base_model"),
        ("base_model", "../..", "base_model"),
        ("base_model", "builtin:../x", "base_model"),
        ("base_model", "https://example.org/x", "base_model"),
        ("base_model", 1, "base_model"),
        ("base_revision", [], "base_revision"),
        ("stage", 2, "stage"),
        ("bridge", [1], "bridge"),
        ("max_restores", -1, "max_restores=-1"),
        ("max_restores", True, "max_restores=True"),
        ("max_restores", 1.0, r"max_restores=1\.0"),
        ("max_restores", None, "max_restores=None"),
        ("provenance", "me", "provenance"),
        ("lora", 3, "lora"),
        ("lora", {"groups": {"a": 1.5}}, "rank"),
        ("lora", {"groups": {"a": 0}}, "from 1 to"),
        ("lora", {"groups": {"a": 10**9}}, "from 1 to"),
        ("lora", {"groups": {"a": "12"}}, "rank"),
        ("lora", {"groups": [["a"]]}, "name of a group"),
        ("lora", {"groups": {"a": 1}, "alpha": float("nan")}, "alpha"),
        ("lora", {"groups": {"a": 1}, "alpha": float("inf")}, "alpha"),
        ("lora", {"groups": {"a": 1}, "alpha": 10**400}, "alpha"),
        ("lora", {"groups": {"a": 1}, "dropout": 2}, "dropout"),
        ("lora", {"groups": {"a": 1}, "dropout": 10**400}, "dropout"),
        ("text_sampling", {"temperature": 10**400}, "temperature"),
        ("latent_sampling", {"guidance_interval": [0, 10**400]}, "guidance_interval"),
        ("latent_sampling", {"shift": float("inf")}, "shift"),
        ("lora", {"groups": "understanding"}, "groups"),
        ("lora", {"groups": {"a": 1}, "alpha": {"b": 1}}, "alpha"),
        ("lora", {"groups": {"a": 1}, "alpha": "2"}, "alpha"),
        ("lora", {"groups": {"a": 1}, "alpha": -2}, "alpha"),
        ("lora", {"groups": {"a": 1}, "dropout": 1}, "dropout"),
        ("lora", {"groups": {"a": 1}, "whole": "vae2llm"}, "whole"),
        ("lora", {"groups": {"a": 1}, "whole": 4}, "whole"),
        ("lora", {"groups": {}}, "groups"),
        ("text_sampling", {"top_k": "3"}, "top_k"),
        ("text_sampling", {"top_k": True}, "top_k"),
        ("text_sampling", {"max_new_tokens": 0}, "max_new_tokens"),
        ("text_sampling", [], "text"),
        ("latent_sampling", {"guidance_interval": ["a", 1]}, "guidance_interval"),
        ("latent_sampling", {"renorm": 3}, "renorm"),
        ("latent_sampling", {"renorm": "wild"}, "renorm"),
        ("protocol", "default", "protocol"),
        ("protocol", {"name": "x"}, "version"),
        ("protocol", {"name": "x", "version": 1, "system": ""}, "version"),
    ],
)
def test_a_wrong_value_is_named(key, value, message):
    with pytest.raises(AdapterError, match=message) as caught:
        ClearConfig.from_dict({**FULL.to_dict(), key: value}, "some/clear_config.json")
    assert "some/clear_config.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"backbone": "bagel"}', '{"schema_version": NaN}'])
def test_a_wrong_file_is_named(text):
    with pytest.raises(AdapterError, match=r"clear_config\.json"):
        ClearConfig.from_json(text)


def test_deeply_nested_json_is_an_error_and_no_crash():
    with pytest.raises(AdapterError, match="not valid JSON"):
        ClearConfig.from_json("[" * 200_000)


def test_provenance_must_be_plain_data():
    with pytest.raises(AdapterError, match="provenance"):
        ClearConfig("bagel", provenance={"x": object()}).to_json()
    with pytest.raises(AdapterError, match="provenance"):
        ClearConfig("bagel", provenance={"x": float("nan")}).to_json()


def test_objects_of_another_type_are_refused():
    with pytest.raises(AdapterError, match="text"):
        ClearConfig("bagel", text={"top_k": 1})
    with pytest.raises(AdapterError, match="lora"):
        ClearConfig("bagel", lora={"groups": {}})


def test_lora_settings():
    assert LoraSettings().ranks == {"generation": 16, "understanding": 16}
    assert LoraSettings({"b": 4, "a": 2}).alphas == {"a": 4.0, "b": 8.0}
    assert LoraSettings(("a",), alpha=3).alphas == {"a": 3.0}
    assert LoraSettings(("a",), whole=("y", "x", "y")).whole == ("x", "y")
    assert LoraSettings((), whole=("x",)).ranks == {}
    with pytest.raises(ClearTypeError, match="rank"):
        LoraSettings({"a": True})
    with pytest.raises(ClearValueError, match="groups is empty"):
        LoraSettings(())
    with pytest.raises(ClearTypeError, match="name of a group"):
        LoraSettings((["a"],))


@pytest.mark.parametrize(
    ("name", "builtin", "hub"),
    [
        ("builtin:bagel-tiny", True, False),
        ("builtin:", False, False),
        ("builtin:a/b", False, False),
        ("owner/name", False, True),
        ("owner/name.v1_x-y", False, True),
        ("owner/name/more", False, False),
        ("./name", False, False),
        ("../name", False, False),
        ("owner/..", False, False),
        ("/owner", False, False),
        ("name", False, False),
        ("owner\n/name", False, False),
    ],
)
def test_forms_of_names(name, builtin, hub):
    assert (is_builtin_name(name), is_hub_id(name)) == (builtin, hub)
