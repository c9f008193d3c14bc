"""Recipes: files that are checked value by value, and that all of them train."""

import json

import pytest
import torch
from transformers import get_scheduler

from clear_adapters.backbones.bagel.tiny import build, builtin_config, initialise
from clear_adapters.backbones.emu3.tiny import build as build_emu3
from clear_adapters.backbones.janus.spec import SPEC as JANUS
from clear_adapters.backbones.janus.tiny import build as build_janus
from clear_adapters.backbones.janus.tiny import builtin_config as janus_config
from clear_adapters.backbones.janus.tiny import initialise as initialise_janus
from clear_adapters.config import LoraSettings
from clear_adapters.datasets.world import build as build_world
from clear_adapters.errors import ClearValueError, UnknownNameError
from clear_adapters.store import read_adapter
from clear_adapters.training.recipe import SCHEDULES, STAGES, list_recipes, load_recipe, recipe_from_dict
from clear_adapters.training.run import train_all

SMALL = [
    "loop.steps=2",
    "loop.batch=2",
    "micro_batch=1",
    "log_every=1",
    "save_every=0",
    "workers=0",
    "lora.groups={understanding: 2, generation: 2}",
    "max_new_tokens=12",
    "latent.steps=3",
    *("grpo:group=2", "grpo:flow_steps=3"),
    "bridge:own_steps=3",
]


FAMILY = {"tiny-janus": build_janus, "janus": build_janus, "emu3": build_emu3}
"""What a recipe is for, where it is not BAGEL."""


def test_all_recipes_are_listed():
    assert list_recipes() == ["emu3", "janus", "paper", "release", "tiny", "tiny-janus"]


def test_values_of_the_paper_and_the_release():
    paper, release = load_recipe("paper"), load_recipe("release")
    assert (paper.optim.lr, paper.sft.mse_weight, paper.sft.vit_drop) == (2e-5, 0.5, 0.4)
    assert (release.optim.lr, release.sft.mse_weight, release.loop.steps) == (1e-5, 1.0, 8000)
    assert release.lora.whole == ("connector", "llm2vae", "time_embedder", "vae2llm")
    assert paper.lora.whole == ()


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_takes_two_steps_of_every_stage(name, tmp_path):
    data = build_world(tmp_path / "data", 8, workers=1, progress=False)
    made = train_all(
        name, data, tmp_path, model=FAMILY.get(name, build)(0), overrides=SMALL, device="cpu", progress=False
    )
    for stage, folder in zip(STAGES, made, strict=True):
        stored = read_adapter(folder)
        assert stored.config.stage == stage
        assert stored.config.provenance["steps"] == 2
        assert stored.config.provenance["recipe"]["stage"] == stage
        assert bool(stored.extra) == (name == "release")
        assert all(t.dtype == torch.bfloat16 for t in stored.lora.values())
        log = folder.with_name(f"{folder.name}.training") / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2]


def test_the_adapter_of_the_built_in_janus_is_below_a_megabyte():
    model, recipe = initialise_janus(janus_config(), 0), load_recipe("tiny-janus")
    count = sum(
        recipe.lora.ranks[group] * (module.in_features + module.out_features)
        for group, names in JANUS.groups.items()
        for name, module in model.named_modules()
        if name in names.names(6)
    )
    assert count > 4e5
    assert 2 * count + 4 * 8 * (64 + 2 * 192) < 0.98e6


def test_the_tiny_adapter_is_below_a_megabyte():
    config, recipe = builtin_config(), load_recipe("tiny")
    model, _ = initialise(config, 0)
    count = 0
    for name, module in model.language_model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers." in name:
            count += recipe.lora.ranks["understanding"] * (module.in_features + module.out_features)
    assert len(set(recipe.lora.ranks.values())) == 1
    assert 2 * count + 4 * 64 * (64 + 2 * 192) < 1e6


def test_overrides_have_types_and_close_matches():
    recipe = load_recipe(
        "tiny", ["optim.lr=3e-4", "steps=7", "betas=[0.8, 0.9]", "lora.groups.understanding=4", "mode=direct"]
    )
    assert (recipe.optim.lr, recipe.loop.steps, recipe.optim.betas) == (3e-4, 7, (0.8, 0.9))
    assert recipe.lora == LoraSettings({"understanding": 4, "generation": 12})
    assert recipe.sft.mode == "direct"
    for override, message in (
        ("optim.lrr=1", "optim.lr"),
        ("stepz=1", "loop.steps"),
        ("steps=many", "must be of type int"),
        ("bf16=3", "must be of type bool"),
        ("steps=0", "from 1 to"),
        ("mode=other", "'clear', 'direct'"),
        ("steps", "key=value"),
        ("steps=1e400", "must be of type int"),
        (f"steps={10**30}", "steps"),
        (f"batch={10**12}", "batch"),
        ("workers=-1", "workers"),
        ("loop.seed=-1", "seed"),
        (f"loop.seed={2**32}", "seed"),
        ("lr=.nan", "lr"),
        ("lr=inf", "lr"),
        (f"lr={10**400}", "lr"),
        ("betas=[0.9, 1]", "betas"),
        ("weight_decay=.inf", "weight_decay"),
        ("restore_below=.nan", "restore_below"),
        (f"noised_copies={10**6}", "noised_copies"),
        ("lora.groups={understanding: 1000000000}", "rank must be from 1 to"),
        ("lora.groups={understanding: '12'}", "rank must be a whole number"),
        ("lora.groups=[[1]]", "name of a group"),
        ("lora.alpha=.nan", "alpha"),
        ("lora.dropout=2", "dropout"),
        ("schedule=cosin", "Did you mean 'cosine'"),
        ("schedule=reduce_lr_on_plateau", "schedule"),
        ("min_lr=2", "min_lr"),
    ):
        with pytest.raises((ClearValueError, UnknownNameError), match=message):
            load_recipe("tiny", [override])


def test_unknown_keys_and_names():
    with pytest.raises(UnknownNameError, match="'vit_drop'"):
        recipe_from_dict({"sft": {"vit_dropp": 0.4}})
    with pytest.raises(UnknownNameError, match="'tiny'"):
        load_recipe("tinny")
    with pytest.raises(UnknownNameError, match="training stage"):
        recipe_from_dict({"stage": "stf"})
    with pytest.raises(UnknownNameError, match="protocol"):
        recipe_from_dict({"protocol": "deflaut"})


def test_a_recipe_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("stage: sft\nloop:\n  steps: 5\n")
    assert load_recipe(file).loop.steps == 5
    file.write_text("stage: [")
    with pytest.raises(ClearValueError, match="not valid YAML"):
        load_recipe(file)
    file.write_bytes("stage: é".encode("latin-1"))
    with pytest.raises(ClearValueError, match="not UTF-8"):
        load_recipe(file)
    file.write_text("[" * 100_000)
    with pytest.raises(ClearValueError, match="not valid YAML"):
        load_recipe(file)
    file.write_text("3")
    with pytest.raises(ClearValueError, match="mapping"):
        load_recipe(file)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_one_of_trainer_that_needs_nothing_more(name):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)
    optimizer.step()
    scheduler.step()


def test_plain_data_gives_the_recipe_back():
    for name in list_recipes():
        recipe = load_recipe(name)
        assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
