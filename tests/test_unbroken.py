"""Runs of every stage over several processes, killed, or without room on the disk."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clear_adapters.backbones.bagel.checkpoint import save_checkpoint
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.datasets import read_examples
from clear_adapters.datasets.world import build as build_world
from clear_adapters.store import read_adapter
from clear_adapters.training.objective import Order
from clear_adapters.training.recipe import STAGES
from clear_adapters.training.trainer import last_checkpoint

pytestmark = pytest.mark.timeout(300)

SCRIPT = Path(__file__).with_name("stage.py")
COMMON = [
    *("log_every=1", "workers=0", "warmup=0", "save_dtype=float32", "max_grad_norm=0", "schedule=constant"),
    *("text.max_new_tokens=6", "latent.steps=3"),
]
STAGE = {
    "sft": ["lora.groups={understanding: 2, generation: 2}", "declined=0.2"],
    "bridge": ["own=0.4", "estimate=0.3", "own_steps=3", "mse_weight=0.5", "restore_below=1000"],
    "grpo": ["flow_steps=3", "group=2", "grpo.rewards={variety: 1}", "image_weight=1.0", "beta=0.1"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world") / "data", 24, workers=1, progress=False)


def only(stage):
    """All stages, of which the others are for longer runs of the tests: each starts several processes."""
    return [s if s == stage else pytest.param(s, marks=pytest.mark.long) for s in STAGES]


def run_stage(*arguments, **env):
    """A process that trains one stage; it is started and not waited for."""
    given = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    told = process.communicate(timeout=200)[0]
    assert process.returncode == 0, told
    return told


@pytest.fixture(scope="module")
def before(data, tmp_path_factory):
    """The adapter that each stage begins with: one that a step of stage 1 with large steps has moved."""
    folder = tmp_path_factory.mktemp("before")
    options = [*COMMON, *STAGE["sft"], "steps=2", "loop.batch=4", "lr=0.02", "save_every=0"]
    finish(run_stage("sft", data, folder / "a", "-", *options))
    return {"sft": "-", "bridge": folder / "a", "grpo": folder / "a"}


def log_of(folder):
    path = folder.with_name(f"{folder.name}.training") / "log.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    left = ("seconds_per_step",)
    return [{k: v for k, v in r.items() if k not in left} for r in rows if "loss" in r]


def apart(a, b):
    pairs = [(x[n], y[n]) for x, y in ((a.lora, b.lora), (a.bridge, b.bridge)) for n in x]
    return max(float((x - y).abs().max()) for x, y in pairs)


def seed_of_halves(data):
    """A seed with which, by the script's rule, the first half of a step's questions restores and the second does not."""
    examples = read_examples(data)
    for seed in range(2000):
        order = Order(examples, 4, seed)
        if [sum(map(ord, order[i].example.question)) % 2 for i in range(4)] == [1, 1, 0, 0]:
            return seed
    raise AssertionError("no such seed")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy as a folder, which every process loads for itself."""
    backbone = build(0)
    folder = tmp_path_factory.mktemp("toy")
    save_checkpoint(folder, backbone.model, backbone.autoencoder, backbone.tokenizer)
    return str(folder)


@pytest.mark.parametrize(
    ("stage", "shard"),
    [
        *[("bridge", False), ("grpo", False), ("sft", True)],
        *(pytest.param(stage, True, marks=pytest.mark.long) for stage in ("bridge", "grpo")),
    ],
)
def test_two_processes_take_the_step_that_one_takes(stage, shard, data, before, toy, tmp_path):
    options = [*COMMON, *STAGE[stage], "steps=2", "loop.batch=4", "save_every=0", "eps=1.0", "lr=1.0"]
    options += [f"seed={seed_of_halves(data)}"]
    finish(run_stage(stage, data, tmp_path / "one", before[stage], *options, "bf16=False", MODEL=toy))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        run_stage(
            stage,
            *(data, tmp_path / "two", before[stage], *options, "bf16=False", f"shard={shard}"),
            RANK=str(r),
            LOCAL_RANK=str(r),
            MODEL=toy,
            **address,
        )
        for r in range(2)
    ]
    told = [p.communicate(timeout=200)[0] for p in running]
    assert [p.returncode for p in running] == [0, 0], told
    a, b = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "two")
    assert apart(a, b) < 1e-5
    assert max(float(t.abs().max()) for n, t in a.lora.items() if "lora_B" in n) > 1e-4
    logs = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(logs[0]) == 2
    for first, second in zip(*logs, strict=True):
        assert first == pytest.approx(second, abs=1e-4)
    if stage == "grpo":
        assert 0 < logs[0][0]["restored"] < 1


@pytest.mark.parametrize("stage", only("grpo"))
def test_a_killed_process_is_followed_by_the_same_curve(stage, data, before, tmp_path):
    options = [*COMMON, *STAGE[stage], "steps=5", "loop.batch=2", "save_every=2", "lr=0.01"]
    finish(run_stage(stage, data, tmp_path / "whole", before[stage], *options))
    process = run_stage(stage, data, tmp_path / "killed", before[stage], *options)
    for _ in range(2000):
        if len(log_of(tmp_path / "killed")) >= 3:
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed").exists()
    finish(run_stage(stage, data, tmp_path / "killed", before[stage], *options))
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    assert apart(read_adapter(tmp_path / "killed"), read_adapter(tmp_path / "whole")) == 0


def test_a_disk_that_is_full_before_the_checkpoint_is_told_in_the_same_words(data, before, tmp_path):
    """The log is written first."""
    options = [*COMMON, *STAGE["sft"], "steps=4", "loop.batch=2", "save_every=1", "lr=0.01"]
    told = run_stage("sft", data, tmp_path / "full", "-", *options, NO_ROOM_AFTER="2", ROOM="300")
    text = told.communicate(timeout=200)[0]
    assert told.returncode == 2, text
    assert "step 3: no line of the log can be written" in text
    assert "goes on from checkpoint-2" in text
    assert "Traceback" not in text


@pytest.mark.long
def test_a_log_that_is_rarer_than_checkpoints_goes_on_as_unbroken(data, before, tmp_path):
    options = [*COMMON, *STAGE["grpo"], "steps=6", "loop.batch=2", "save_every=2", "lr=0.01", "log_every=3"]
    finish(run_stage("grpo", data, tmp_path / "whole", before["grpo"], *options))
    process = run_stage("grpo", data, tmp_path / "killed", before["grpo"], *options)
    for _ in range(2000):
        if last_checkpoint(tmp_path / "killed.training") is not None or process.poll() is not None:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(run_stage("grpo", data, tmp_path / "killed", before["grpo"], *options))
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("stage", only("sft"))
def test_a_full_disk_leaves_the_last_checkpoint_whole(stage, data, before, tmp_path):
    options = [*COMMON, *STAGE[stage], "steps=4", "loop.batch=2", "save_every=1", "lr=0.01"]
    told = run_stage(stage, data, tmp_path / "full", before[stage], *options, NO_ROOM_AFTER="2")
    text = told.communicate(timeout=200)[0]
    assert told.returncode == 2, text
    assert "step 3: no checkpoint can be written" in text
    assert "goes on from checkpoint-2" in text
    assert "Traceback" not in text
    assert last_checkpoint(tmp_path / "full.training").name == "checkpoint-2"
    finish(run_stage(stage, data, tmp_path / "full", before[stage], *options))
    finish(run_stage(stage, data, tmp_path / "whole", before[stage], *options))
    assert log_of(tmp_path / "full") == log_of(tmp_path / "whole")
