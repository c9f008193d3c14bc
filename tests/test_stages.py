"""The three stages by recipes: what each trains, how they follow each other, and what tells runs apart."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clear_adapters.adapter import attach
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.cli import main
from clear_adapters.config import LoraSettings
from clear_adapters.datasets import read_examples
from clear_adapters.datasets.world import build as build_world
from clear_adapters.errors import ClearError, ClearValueError, UnknownNameError
from clear_adapters.rewards import REWARDS, register_reward
from clear_adapters.store import adapter_digest, read_adapter
from clear_adapters.training.build import attach_for, objective_for, set_trainable, trainer_for
from clear_adapters.training.objective import Order
from clear_adapters.training.plot import plot_log
from clear_adapters.training.recipe import (
    STAGES,
    divide_overrides,
    list_recipes,
    load_recipe,
    recipe_from_dict,
)
from clear_adapters.training.run import summary, train, train_all
from clear_adapters.training.trainer import ClearTrainer

SMALL = [
    "loop.steps=2",
    "loop.batch=2",
    "log_every=1",
    "save_every=1",
    "workers=0",
    "warmup=0",
    "max_new_tokens=12",
    "latent.steps=3",
    "save_dtype=float32",
    "lora.groups={understanding: 2, generation: 2}",
    "bridge:own_steps=3",
    "grpo:flow_steps=3",
    "grpo:group=2",
    "grpo.rewards={accuracy: 1, variety: 1}",
]
GIVEN = {"device": "cpu", "progress": False}


def small(stage):
    return divide_overrides(SMALL, STAGES)[stage]


def variety(prompts, completions, **columns):
    """A reward that replies of an untrained toy differ in."""
    return [len(set(text)) / 10 for text in completions]


@pytest.fixture(scope="module", autouse=True)
def reward():
    register_reward("variety", variety)
    yield
    REWARDS.unregister("variety")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world") / "data", 12, workers=1, progress=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data, toy):
    """All three stages, two steps each."""
    output = tmp_path_factory.mktemp("trained")
    told = []
    made = train_all(
        *("tiny", data, output),
        model=toy / "model",
        overrides=SMALL,
        report=lambda stage, folder: told.append((stage, folder)),
        **GIVEN,
    )
    assert told == list(zip(STAGES, made, strict=True))
    return made


def log_of(folder):
    lines = folder.with_name(f"{folder.name}.training").joinpath("log.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


# ------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_has_every_stage(name, stage):
    recipe = load_recipe(name, stage=stage)
    assert recipe.stage == stage
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert {"sft", "bridge", "grpo"} & set(recipe.to_dict()) == {stage}
    sft = load_recipe(name)
    assert (recipe.text, recipe.latent) == (sft.text, sft.latent) or (name, stage) == ("release", "grpo")


def test_values_of_the_later_stages():
    paper, release = (load_recipe(n, stage="grpo") for n in ("paper", "release"))
    assert (paper.grpo.group, paper.optim.lr, paper.grpo.clip) == (4, 1e-6, 0.2)
    assert (paper.grpo.image_weight, paper.grpo.flow_steps, paper.grpo.scale) == (0.3, 30, "group")
    assert paper.grpo.rewards["decision"] == {"weight": 0.15, "settings": {"table": "paper"}}
    assert (release.grpo.group, release.optim.lr, release.grpo.beta) == (8, 5e-6, 0.04)
    assert (release.grpo.reduction, release.grpo.scale, release.grpo.sigma) == ("dr_grpo", "none", 0.3)
    assert (release.grpo.flow_steps, release.grpo.image_weight, release.loop.batch) == (20, 0.5, 32)
    assert release.grpo.step_choice == "round_robin"
    assert list(release.grpo.rewards) == ["accuracy", "format_graded"]
    assert [load_recipe(n, stage="bridge").bridge.distill_weight for n in ("paper", "release")] == [0.1, 0.4]


def test_how_often_a_reply_may_restore_is_the_recipes(toy):
    assert load_recipe("tiny").max_restores == 2
    with pytest.raises(ClearValueError, match="max_restores=-1"):
        load_recipe("tiny", ["max_restores=-1"])
    attached = attach_for(load_recipe("tiny", ["max_restores=1"]), toy / "model", device="cpu")
    assert (attached.config.max_restores, attached.engine.max_restores) == (1, 1)
    attached.detach()


def test_rewards_and_names_are_open_in_overrides():
    def rewards(*overrides, name="tiny"):
        return load_recipe(name, overrides, "grpo").grpo.rewards

    assert rewards("grpo.rewards.accuracy=1")["accuracy"] == 1
    assert rewards("grpo.rewards={accuracy: 1}") == {"accuracy": 1}
    assert rewards("rewards={accuracy: 1}") == {"accuracy": 1}
    released = rewards("grpo.rewards.decision.settings.table=release", name="paper")
    assert released["decision"] == {"weight": 0.15, "settings": {"table": "release"}}
    separate = [
        "advantage=separate",
        "grpo.rewards.latent_quality=0.1",
        "latent_rewards=[latent_quality, accuracy]",
    ]
    assert load_recipe("tiny", separate, "grpo").grpo.latent_rewards == ("latent_quality", "accuracy")
    for override, message in (
        ("grpo.rewards.acuracy=1", "'accuracy'"),
        ("grpo.rewards=3", "mapping"),
        ("grpo.rewards.accuracy=much", "number"),
        ("latent_rewards=accuracy", "list"),
        ("grpo.rewards.format.weight=1", "format is no mapping"),
        ("grpo.rewards.decision.settings.table=release", "'decision' has no weight"),
    ):
        with pytest.raises(ClearError, match=message):
            rewards(override)


def test_a_file_or_folder_is_of_the_stage_that_is_asked_for(tmp_path):
    file = tmp_path / "grpo.yaml"
    file.write_text("stage: grpo\ngrpo: {beta: 0.5}\n")
    assert load_recipe(file, stage="grpo").grpo.beta == load_recipe(tmp_path, stage="grpo").grpo.beta == 0.5
    with pytest.raises(ClearValueError, match=r"stage: grpo, but stage sft"):
        load_recipe(file)
    with pytest.raises(ClearValueError, match=r"no bridge\.yaml"):
        load_recipe(tmp_path, stage="bridge")
    file.write_text("grpo: {beta: 0.25}\n")
    assert load_recipe(file, stage="grpo").grpo.beta == 0.25
    with pytest.raises(UnknownNameError, match="'grpo'"):
        load_recipe("tiny", stage="grpoo")
    with pytest.raises(ClearValueError, match=r"'bridge'.*'sft'"):
        train(load_recipe("tiny"), tmp_path, tmp_path / "out", stage="bridge", adapter="x")


def test_settings_of_another_stage_are_refused():
    for key, stage, message in (
        ("grpo", "sft", "setting of stage grpo and has no effect on stage sft"),
        ("sft", "bridge", "setting of stage sft"),
        ("lora", "grpo", "later stages take it from their adapter"),
        ("protocol", "bridge", "later stages take it from their adapter"),
    ):
        with pytest.raises(ClearValueError, match=message):
            recipe_from_dict({"stage": stage, key: {}})
    with pytest.raises(ClearValueError, match=r"grpo\.beta is a setting of stage grpo"):
        load_recipe("tiny", ["beta=1"])


def test_overrides_go_to_the_stages_that_have_the_key():
    divided = divide_overrides(["steps=5", "grpo:steps=10", "vit_drop=0", "lora.alpha.generation=3"], STAGES)
    assert divided["sft"] == ["steps=5", "vit_drop=0", "lora.alpha.generation=3"]
    assert divided["bridge"] == ["steps=5", "vit_drop=0"]
    assert divided["grpo"] == ["steps=5", "steps=10"]
    assert load_recipe("tiny", ["grpo:loop.steps=7"], "grpo").loop.steps == 7
    for override, message in (
        ("grpo:betta=1", r"grpo\.beta"),
        ("stepz=1", r"loop\.steps"),
        ("gpro:steps=1", "'grpo'"),
        ("stage=grpo", "stage"),
        ("steps", "key=value"),
    ):
        with pytest.raises((ClearValueError, UnknownNameError), match=message):
            divide_overrides([override], STAGES)
    with pytest.raises(ClearValueError, match="for stage grpo, but sft is trained"):
        load_recipe("tiny", ["grpo:steps=10"])


def test_a_checkpoint_between_the_steps_of_one_rollout_is_refused():
    assert load_recipe("tiny", ["iterations=5", "save_every=10"], "grpo").repeat == 5
    with pytest.raises(ClearValueError, match=r"save_every=25 with iterations=2.*multiple"):
        load_recipe("tiny", ["iterations=2"], "grpo")


def test_order_repeats_whole_steps(data):
    examples = read_examples(data)
    plain, repeated = Order(examples, 30, 3), Order(examples, 30, 3, batch=5, repeat=3)
    steps = [[repeated[5 * s + i] for i in range(5)] for s in range(6)]
    assert steps[0] == steps[1] == steps[2] == [plain[i] for i in range(5)]
    assert steps[3] == steps[4] == steps[5] == [plain[5 + i] for i in range(5)]
    once = Order(examples, 30, 3, batch=5)
    assert [once[i] for i in range(30)] == [plain[i] for i in range(30)]
    shared = Order(examples, 30, 3, batch=5, repeat=3, parts=2)
    assert len(shared) == 60
    assert [shared[i] for i in range(60)] == [replace(repeated[i // 2], part=i % 2) for i in range(60)]


# ------------------------------------------------------------------------------------------------ what is trained

ALL = {"understanding", "generation", "bridge", "extra"}
DEFAULTS = {
    "sft": {"understanding", "generation", "extra"},
    "bridge": {"understanding", "bridge"},
    "grpo": {"understanding", "generation", "bridge"},
}


def fresh(whole=("vae2llm",), groups=("understanding", "generation"), **more):
    return attach(build(0), lora=LoraSettings(dict.fromkeys(groups, 2), whole=whole), **more)


def names_by_part(attached):
    """Names of parameters, listed here by what the family calls its modules."""
    found = {part: set() for part in ALL}
    for name, _ in attached.named_parameters():
        if name.startswith("bridge."):
            found["bridge"].add(name)
        elif ".lora_" in name:
            found["generation" if "_moe_gen" in name else "understanding"].add(name)
        else:
            found["extra"].add(name)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_exactly_its_parts(stage):
    attached = fresh()
    parts = names_by_part(attached)
    assert all(parts.values())
    recipe = replace(load_recipe("tiny", stage=stage), trains=None)
    set_trainable(attached, recipe)
    wanted = set().union(*(parts[p] for p in DEFAULTS[stage]))
    assert set(attached.trainable_parameters()) == wanted
    assert {
        n for n, p in attached.module.named_parameters() if p.requires_grad and n.startswith("bridge.")
    } == (parts["bridge"] if "bridge" in DEFAULTS[stage] else set())
    for part in ALL:
        set_trainable(attached, load_recipe("tiny", [f"trains=[{part}]"], stage))
        assert set(attached.trainable_parameters()) == parts[part]


def test_parts_that_do_not_exist():
    with pytest.raises(UnknownNameError, match="'bridge'"):
        load_recipe("tiny", ["trains=[brigde]"])
    with pytest.raises(ClearValueError, match="trains is empty"):
        load_recipe("tiny", ["trains=[]"])
    plain = fresh(whole=(), groups=("understanding",))
    set_trainable(plain, load_recipe("tiny"))
    with pytest.raises(
        ClearValueError, match=r"train extra and generation, but this adapter has only understanding"
    ):
        set_trainable(plain, load_recipe("tiny", ["trains=[generation, extra]"]))
    without = fresh(bridge=False)
    set_trainable(without, load_recipe("tiny", stage="grpo"))
    with pytest.raises(ClearValueError, match="is to train bridge, but this adapter"):
        set_trainable(without, load_recipe("tiny", stage="bridge"))


# ----------------------------------------------------------------------------------------------------- the chain


def test_each_stage_goes_on_from_the_one_before(trained, toy):
    stored = [read_adapter(folder) for folder in trained]
    assert [s.config.stage for s in stored] == list(STAGES)
    assert [f.name for f in trained] == ["1-sft", "2-bridge", "3-grpo"]
    sft, bridge, grpo = stored
    for s in stored[1:]:
        assert (s.config.lora, s.config.bridge, s.config.protocol) == (
            *(sft.config.lora, sft.config.bridge, sft.config.protocol),
        )

    def moved(a, b):
        return {n for n in a.lora if not torch.equal(a.lora[n], b.lora[n])}

    assert moved(sft, bridge)
    trains = load_recipe("tiny", stage="bridge").trains or DEFAULTS["bridge"]
    assert any("_moe_gen" in n for n in moved(sft, bridge)) == ("generation" in trains)
    assert moved(bridge, grpo)
    assert any(not torch.equal(sft.bridge[n], bridge.bridge[n]) for n in sft.bridge)
    for folder, before in zip(trained[1:], trained, strict=False):
        made = read_adapter(folder).config.provenance
        assert made["adapter"] == {"name": before.name, "hash": adapter_digest(before)}
        assert made["before"]["recipe"]["stage"] == read_adapter(before).config.stage
        assert set(made["recipe"]).isdisjoint({"lora", "protocol", "sft"})
    assert grpo.config.provenance["before"]["before"]["data_hash"] == sft.config.provenance["data_hash"]
    for folder in trained:
        assert [row["step"] for row in log_of(folder)] == [1, 2]
        assert "loss" in read_adapter(folder).config.provenance["final"]
        assert "2 steps in 0:0" in summary(folder)
    assert {"reward/total", "reward/accuracy", "restored", "kl", "tokens"} <= set(log_of(trained[2])[0])


def test_what_is_finished_is_left_as_it_is(trained, data, toy, tmp_path):
    stamps = [(f / "clear_config.json").stat().st_mtime_ns for f in trained]
    again = train_all("tiny", data, trained[0].parent, model=toy / "model", overrides=SMALL, **GIVEN)
    assert again == trained
    assert [(f / "clear_config.json").stat().st_mtime_ns for f in trained] == stamps


class KilledError(Exception):
    pass


@pytest.mark.parametrize("stage", ["bridge", "grpo"])
def test_all_goes_on_where_it_was_killed(trained, stage, data, toy, tmp_path, monkeypatch):
    def run():
        return train_all("tiny", data, tmp_path, model=toy / "model", overrides=SMALL, **GIVEN)

    real = ClearTrainer.compute_loss

    def dies(self, *args, **kwargs):
        if self.state.global_step == 1 and stage in str(self.args.output_dir):
            raise KilledError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ClearTrainer, "compute_loss", dies)
    with pytest.raises(KilledError):
        run()
    monkeypatch.setattr(ClearTrainer, "compute_loss", real)
    done = sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".training"))
    assert done == [f.name for f in trained[: STAGES.index(stage)]]
    for mine, whole in zip(run(), trained, strict=True):
        a, b = read_adapter(mine), read_adapter(whole)
        assert all(torch.equal(a.lora[n], b.lora[n]) for n in a.lora)
        assert all(torch.equal(a.bridge[n], b.bridge[n]) for n in a.bridge)
        keys = ("step", "loss", "reward/total", "kl")
        rows = [[{k: r.get(k) for k in keys} for r in log_of(f)] for f in (mine, whole)]
        assert rows[0] == rows[1]


def test_the_reference_is_the_adapter_and_not_the_checkpoint(trained, data, toy, tmp_path):
    recipe = load_recipe("tiny", small("grpo"), "grpo")
    attached = attach(toy / "model", trained[1], device="cpu")
    trainer = trainer_for(attached, recipe, read_examples(data), tmp_path, progress=False)
    checkpoint = trained[2].with_name("3-grpo.training") / "checkpoint-2"
    trainer._load_from_checkpoint(str(checkpoint))
    start = read_adapter(trained[1])
    held = {**start.lora, **{f"bridge.{n}": t for n, t in start.bridge.items()}}
    reference = trainer.objective.reference
    assert set(reference) == set(held)
    assert all(torch.equal(reference[n], held[n]) and not reference[n].requires_grad for n in held)
    assert any(not torch.equal(p, held[n]) for n, p in attached.named_parameters())


def test_a_changed_adapter_is_another_run(trained, data, toy, tmp_path):
    before = tmp_path / "before"
    shutil.copytree(trained[1], before)
    run = tmp_path / "out"

    def go():
        return train(
            *("tiny", data, run),
            stage="grpo",
            model=toy / "model",
            adapter=before,
            overrides=[*small("grpo"), "steps=1"],
            **GIVEN,
        )

    assert go() == run
    attached = attach(toy / "model", before, device="cpu")
    with torch.no_grad():
        attached.trainable_parameters()["bridge.up.bias"].add_(0.01)
    attached.save_pretrained(before, overwrite=True)
    with pytest.raises(ClearValueError, match=r"\(adapter differ\)"):
        go()
    (before / "README.md").write_text("A card is no part of it.")
    assert adapter_digest(before) != adapter_digest(trained[1])
    shutil.rmtree(before)
    shutil.copytree(trained[1], before)
    (before / "README.md").write_text("A card is no part of it.")
    assert go() == run


def test_a_missing_or_unwanted_adapter_is_told_in_words(data, tmp_path, trained):
    for stage, before in (("bridge", "sft"), ("grpo", "bridge")):
        with pytest.raises(ClearValueError, match=rf"stage {stage} .* adapter of stage {before}.*--adapter"):
            train("tiny", data, tmp_path / "out", stage=stage)
    with pytest.raises(ClearValueError, match="stage sft makes a new adapter"):
        train("tiny", data, tmp_path / "out", adapter=trained[0])
    with pytest.raises(ClearValueError, match=r"does not say which model.*--model"):
        train("tiny", data, tmp_path / "out", stage="bridge", adapter=trained[0])
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_stage_is_told_and_taken(trained, data, toy, tmp_path, caplog):
    caplog.set_level(logging.INFO, "clear_adapters.training")
    given = {"model": toy / "model", "overrides": [*small("grpo"), "steps=1"], **GIVEN}
    train("tiny", data, tmp_path / "a", stage="grpo", adapter=trained[1], **given)
    assert not caplog.messages
    train("tiny", data, tmp_path / "b", stage="grpo", adapter=trained[0], **given)
    [told] = caplog.messages
    assert "stage grpo follows bridge" in told
    assert "of stage sft" in told


def test_the_objective_of_each_stage():
    attached = fresh(whole=())
    for stage in STAGES:
        made = objective_for(attached, load_recipe("tiny", stage=stage))
        assert type(made).__name__ == f"{stage.capitalize()}Objective"


# ---------------------------------------------------------------------------------------------- the command line


def call(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def test_the_commands_share_their_options(monkeypatch, tmp_path):
    seen, left = [], []
    monkeypatch.setattr("clear_adapters.training.group.leave_group", lambda: left.append(1))
    monkeypatch.setattr("clear_adapters.training.run.train", lambda *a, **k: seen.append((a, k)) or a[2])
    monkeypatch.setattr("clear_adapters.training.run.train_all", lambda *a, **k: seen.append((a, k)))
    monkeypatch.setattr("clear_adapters.training.run.summary", lambda folder: f"done: {folder}")
    common = ["--data", tmp_path / "d", "--output", tmp_path / "o", "--set", "steps=3", "--seed", 7]
    common += ["--recipe", "paper", "--no-resume", "--device", "cpu", "--model", "owner/name"]
    assert call("train", "grpo", *common, "--adapter", "a/b").stdout == f"done: {tmp_path / 'o'}\n"
    call("train", "all", *common)
    places = ("paper", tmp_path / "d", tmp_path / "o")
    given = {
        "model": "owner/name",
        "resume": False,
        "device": "cpu",
        "overrides": ["steps=3", "loop.seed=7"],
        "clean_image_dir": None,
        "corrupted_image_dir": None,
    }
    assert seen[0] == (places, {**given, "adapter": "a/b", "stage": "grpo"})
    assert seen[1][0] == places
    assert seen[1][1].pop("report") is not None
    assert seen[1][1] == given
    assert left == [1, 1]


def test_estimates_without_a_generator_to_train_are_told(caplog):
    for trains, told in (("[understanding, bridge]", True), ("[understanding, generation, bridge]", False)):
        caplog.clear()
        objective_for(fresh(), load_recipe("tiny", [f"trains={trains}", "estimate=0.3"], "bridge"))
        assert ("leaves the generator as it is" in caplog.text) == told


def test_train_all_by_command(trained, data, toy):
    sets = [x for s in SMALL for x in ("--set", s)]
    given = ["--data", data, "--output", trained[0].parent, "--model", toy / "model", "--device", "cpu"]
    told = call("train", "all", *given, *sets).stdout.splitlines()
    assert [line.split(":")[0] for line in told] == list(STAGES)
    refused = call("train", "all", *given, *sets, "--set", "grpo:stepz=1", code=2).stderr
    assert "loop.steps" in refused
    assert refused.count("\n") == 1


@pytest.mark.timeout(180)
def test_train_all_of_the_built_in_model_from_end_to_end(data, tmp_path):
    """The command with its own recipe, its numbers of steps and rows cut down, in processes as a user starts it."""
    sets = ["steps=2", "loop.batch=2", "group=2", "warmup=1", "save_every=1", "log_every=1", "workers=0"]
    sets += ["text.max_new_tokens=16", "flow_steps=3"]
    command = [sys.executable, "-m", "clear_adapters.cli", "train", "all", "--recipe", "tiny"]
    command += ["--data", str(data), "--output", str(tmp_path / "run"), "--device", "cpu"]
    for value in sets:
        command += ["--set", value]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line.split(":")[0] in STAGES] == list(STAGES)
    for number, stage in enumerate(STAGES, 1):
        folder = tmp_path / "run" / f"{number}-{stage}"
        config = read_adapter(folder).config
        assert (config.stage, config.provenance["steps"]) == (stage, 2)
        assert [row["step"] for row in log_of(folder)] == [1, 2]
    attached = attach(adapter=tmp_path / "run" / "3-grpo", device="cpu")
    (reply,) = attached.answer([Image.new("RGB", (64, 64))], ["What is it?"], restore="always")
    assert reply.restored


# ------------------------------------------------------------------------------------------------------- the plot


def test_a_plot_of_every_stage(trained, tmp_path):
    for folder in trained:
        log = folder.with_name(f"{folder.name}.training") / "log.jsonl"
        call("train", "plot", log, "--output", tmp_path / "new" / f"{folder.name}.png")
        with Image.open(tmp_path / "new" / f"{folder.name}.png") as image:
            assert image.width > 600
            assert len(set(image.convert("L").tobytes())) > 20


def test_logs_that_cannot_be_drawn(tmp_path):
    log = tmp_path / "log.jsonl"
    with pytest.raises(ClearValueError, match="is no file"):
        plot_log(log, tmp_path / "a.png")
    log.write_text('{"step": 2, "train_loss": 1}\n{"step": 3, "lo')
    with pytest.raises(ClearValueError, match="no logged step"):
        plot_log(log, tmp_path / "a.png")
    log.write_text('{"step": 1, "loss": 1}\nloss\n')
    with pytest.raises(ClearValueError, match=r"log\.jsonl:2"):
        plot_log(log, tmp_path / "a.png")
    log.write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo')
    with pytest.raises(ClearValueError, match=r"ending '\.doc'.*\.png"):
        plot_log(log, tmp_path / "a.doc")
    assert plot_log(log, tmp_path / "a.svg").read_text().startswith("<?xml")
