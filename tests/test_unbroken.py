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
import torch

from clear_adapters.backbones.bagel.checkpoint import save_checkpoint
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.datasets import read_examples
from clear_adapters.datasets.world import build as build_world
from clear_adapters.errors import ClearValueError
from clear_adapters.store import read_adapter
from clear_adapters.training import group
from clear_adapters.training.build import attach_for, trainer_for
from clear_adapters.training.objective import Order
from clear_adapters.training.recipe import STAGES, load_recipe
from clear_adapters.training.run import train
from clear_adapters.training.trainer import ClearTrainer, last_checkpoint, newest_checkpoint

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


def run_stage(*arguments, launch=(), **env):
    """A process that trains one stage, or a launcher of several; it is started and not waited for."""
    given = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        [sys.executable, *launch, str(SCRIPT), *map(str, arguments)],
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    told = process.communicate(timeout=200)[0]
    assert process.returncode == 0, told
    return told


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_together(*arguments, processes=2, **env):
    """As many processes of one run, without a launcher that would end one for another."""
    port = str(free_port())
    address = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [run_stage(*arguments, RANK=str(r), LOCAL_RANK=str(r), **address, **env) for r in range(processes)]


def finish_all(running):
    told = [p.communicate(timeout=200)[0] for p in running]
    assert [p.returncode for p in running] == [0] * len(running), told


@pytest.fixture(scope="module")
def before(data, tmp_path_factory):
    """The adapter that each stage begins with: one that a step of stage 1 with large steps has moved."""
    folder = tmp_path_factory.mktemp("before")
    options = [*COMMON, *STAGE["sft"], "steps=2", "loop.batch=4", "lr=0.02", "save_every=0"]
    finish(run_stage("sft", data, folder / "a", "-", *options))
    return {"sft": "-", "bridge": folder / "a", "grpo": folder / "a"}


def wait_for(happened, running):
    """Until something has happened while the processes run."""
    for _ in range(6000):
        if happened():
            return
        for process in running:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("it has not happened within two minutes")


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
        ("sft", True),
        *(
            pytest.param(stage, shard, marks=pytest.mark.long)
            for stage in ("bridge", "grpo")
            for shard in (False, True)
        ),
    ],
)
def test_two_processes_take_the_step_that_one_takes(stage, shard, data, before, toy, tmp_path):
    options = [*COMMON, *STAGE[stage], "steps=2", "loop.batch=4", "save_every=0", "eps=1.0", "lr=1.0"]
    options += [f"seed={seed_of_halves(data)}"]
    finish(run_stage(stage, data, tmp_path / "one", before[stage], *options, "bf16=False", MODEL=toy))
    finish_all(
        run_together(
            *(stage, data, tmp_path / "two", before[stage], *options, "bf16=False", f"shard={shard}"),
            MODEL=toy,
        )
    )
    a, b = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "two")
    assert apart(a, b) < 1e-5
    assert max(float(t.abs().max()) for n, t in a.lora.items() if "lora_B" in n) > 1e-4
    logs = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(logs[0]) == 2
    for first, second in zip(*logs, strict=True):
        assert first == pytest.approx(second, abs=1e-4)
    if stage == "grpo":
        assert 0 < logs[0][0]["restored"] < 1


@pytest.mark.long
def test_two_processes_that_share_a_question_take_the_step_that_one_takes(data, before, toy, tmp_path):
    options = [*COMMON, *STAGE["grpo"], "steps=2", "loop.batch=1", "save_every=0", "eps=1.0", "lr=1.0"]
    options += ["grpo.group=4", "step_choice=round_robin", f"seed={seed_of_halves(data)}", "bf16=False"]
    finish(run_stage("grpo", data, tmp_path / "one", before["grpo"], *options, MODEL=toy))
    finish_all(run_together("grpo", data, tmp_path / "two", before["grpo"], *options, MODEL=toy))
    a, b = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "two")
    assert apart(a, b) < 1e-5
    assert max(float(t.abs().max()) for n, t in a.lora.items() if "lora_B" in n) > 1e-4
    for first, second in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert first == pytest.approx(second, abs=1e-4)


LOST = {
    # A peer that is gone is told of by the exchange itself, one that stands still is not.
    signal.SIGKILL: (2, "cannot reach another one any more"),
    signal.SIGSTOP: (3, "no sign of life for 10 s from process 1 of 2"),
}


@pytest.mark.parametrize("how", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_a_lost_process_ends_the_run_which_one_process_continues(how, data, tmp_path):
    options = [*COMMON, *STAGE["sft"], "steps=300", "loop.batch=2", "save_every=2", "lr=0.01", "timeout=10"]
    running = run_together("sft", data, tmp_path / "lost", "-", *options)
    try:
        wait_for(lambda: len(log_of(tmp_path / "lost")) >= 3, running)
        running[1].send_signal(how)
        began = time.monotonic()
        told = running[0].communicate(timeout=60)[0]
        assert time.monotonic() - began < 50
    finally:
        for process in running:
            process.kill()
        running[1].communicate()
    status, words = LOST[how]
    assert words in told
    assert running[0].returncode == status
    assert "Traceback" not in told
    newest = last_checkpoint(tmp_path / "lost.training")
    assert f"goes on from {newest.name}" in told
    if how != signal.SIGKILL:
        return
    # Gone on with by one process, until two steps later.
    last = int(newest.name.rpartition("-")[2]) + 2
    for name in ("lost", "whole"):
        process = run_stage("sft", data, tmp_path / name, "-", *options)
        wait_for(lambda: any(r["step"] == last for r in log_of(tmp_path / name)), [process])  # noqa: B023
        process.kill()
        process.communicate()
    for first, second in zip(log_of(tmp_path / "lost")[:last], log_of(tmp_path / "whole"), strict=False):
        assert first == pytest.approx(second, abs=1e-4)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "how"),
    [("torchrun", signal.SIGKILL), ("torchrun", signal.SIGSTOP), ("accelerate", signal.SIGKILL)],
)
def test_a_launcher_ends_with_words_and_its_run_goes_on(launcher, how, data, tmp_path):
    options = [*COMMON, *STAGE["sft"], "steps=300", "loop.batch=2", "save_every=2", "lr=0.01", "timeout=10"]
    running = run_stage(
        *("sft", data, tmp_path / "lost", "-", *options),
        launch=["-m", *LAUNCHERS[launcher]],
        PIDS=str(tmp_path),
    )
    wait_for(lambda: len(log_of(tmp_path / "lost")) >= 3, [running])
    os.kill(int((tmp_path / "1").read_text()), how)
    began = time.monotonic()
    told = running.communicate(timeout=100)[0]
    # torchrun gives a stopped process half a minute to end before it kills it.
    assert time.monotonic() - began < (40 if how == signal.SIGKILL else 90)
    assert running.returncode != 0
    assert f"goes on from {last_checkpoint(tmp_path / 'lost.training').name}" in told
    assert ("no sign of life" in told) == (how == signal.SIGSTOP)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_stage_runs_under_a_launcher(launcher, stage, data, before, tmp_path):
    options = [*COMMON, *STAGE[stage], "steps=1", "loop.batch=2", "save_every=0"]
    launch = ["-m", *LAUNCHERS[launcher]]
    finish(run_stage(stage, data, tmp_path / "two", before[stage], *options, launch=launch))
    assert "2 process" in read_adapter(tmp_path / "two").config.provenance["device"]


@pytest.mark.long
@pytest.mark.parametrize("late", ["STUCK", "BUSY"])
def test_a_late_process_is_waited_for_unless_none_moves(late, data, tmp_path):
    options = [*COMMON, *STAGE["sft"], "steps=2", "loop.batch=2", "save_every=1", "timeout=8"]
    running = run_together("sft", data, tmp_path / "late", "-", *options, **{late: "20"})
    if late == "BUSY":
        finish_all(running)
        return
    told = [p.communicate(timeout=60)[0] for p in running]
    assert 3 in [p.returncode for p in running], told
    assert any("no process has moved for 8 s" in text and "process 1 in " in text for text in told), told
    assert any("goes on from checkpoint-1" in text for text in told)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_process_is_followed_by_the_same_curve(stage, data, before, tmp_path):
    options = [*COMMON, *STAGE[stage], "steps=5", "loop.batch=2", "save_every=2", "lr=0.01"]
    finish(run_stage(stage, data, tmp_path / "whole", before[stage], *options))
    process = run_stage(stage, data, tmp_path / "killed", before[stage], *options)
    wait_for(lambda: len(log_of(tmp_path / "killed")) >= 3, [process])
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
        if newest_checkpoint(tmp_path / "killed.training") is not None or process.poll() is not None:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(run_stage("grpo", data, tmp_path / "killed", before["grpo"], *options))
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
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


WATCHED = """
import os, signal, threading, time
from pathlib import Path
from torch.distributed import TCPStore
from clear_adapters.errors import ClearError
from clear_adapters.training import watch
from clear_adapters.training.watch import watching
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ |= {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
again = lambda: "Give the same command again."
"""


def watched(program):
    """What a process, the first of two of which the second never begins, tells and how it ends."""
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WATCHED + program]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            "RuntimeError('[gloo/transport/tcp/pair.cc] Connection closed by peer')",
            "cannot reach another one",
        ),
        ("ClearError('the reward failed. Give the same command again.')", "the reward failed"),
    ],
)
def test_a_launcher_does_not_silence_an_error_on_its_way_out(error, words):
    done = watched(f"""
try:
    with watching(60.0, again):
        raise {error}
except ClearError:
    # What would tell of it does not come to that: the launcher has seen another one's end meanwhile.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
""")
    assert words in done.stderr, done
    assert done.stderr.strip().endswith("Give the same command again.")
    assert done.returncode == 128 + signal.SIGTERM


def test_a_signal_long_after_an_error_is_not_taken_for_the_launchers():
    done = watched("""
watch._ON_ITS_WAY = 0.2
try:
    with watching(60.0, again):
        raise ClearError("the reward failed")
except ClearError:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
""")
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


@pytest.mark.parametrize("advice", ["lambda: time.sleep(60)", "lambda: int('best')"])
def test_a_disk_that_does_not_answer_does_not_keep_a_process(advice):
    done = watched(f"""
watch._PATIENCE = 1.0
with watching(2.0, {advice}):
    threading.Event().wait()
""")
    assert "no sign of life for 2 s from process 1 of 2" in done.stderr, done
    assert "cannot be read now" in done.stderr
    assert done.returncode == 3


@pytest.mark.long
def test_waiting_for_data_workers_that_give_nothing_is_no_move():
    done = watched("""
from torch.utils.data import DataLoader

class Stuck(list):
    def __getitem__(self, index):
        threading.Event().wait()

def other():  # the second process lives, and stands still
    mine = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    for beat in range(1000):
        mine.set("clear_adapters/0/1/1", f"{beat}\t1\tsome host, pid 1\tits place")
        time.sleep(0.1)

threading.Thread(target=other, daemon=True).start()
with watching(8.0, again):
    next(iter(DataLoader(Stuck([1]), num_workers=1)))
""")
    assert "no process has moved for 8 s" in done.stderr, done
    assert done.returncode == 3


def test_a_lost_process_is_no_full_disk(data, tmp_path, monkeypatch):
    def lost(self):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:538] Read error: Connection reset by peer")

    monkeypatch.setattr(ClearTrainer, "store_flos", lost)
    with pytest.raises(RuntimeError, match="Connection reset"):
        train(
            *("tiny", data, tmp_path / "lost"),
            stage="sft",
            model=build(0),
            device="cpu",
            overrides=[*COMMON, *STAGE["sft"], "steps=1", "loop.batch=2", "save_every=1"],
            progress=False,
        )


def test_folders_that_are_named_like_checkpoints_are_left_alone(tmp_path):
    for name in ("checkpoint-best", "checkpoint-2", "checkpoint-10"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-best", "checkpoint-2"):
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-best", "checkpoint-2"}


@pytest.mark.long
def test_a_checkpoint_is_whole_only_behind_the_files_of_all_processes(data, tmp_path):
    """The second process is stopped before it has written its file."""
    options = [*COMMON, *STAGE["sft"], "steps=3", "loop.batch=2", "save_every=2", "timeout=10"]
    running = run_together("sft", data, tmp_path / "late", "-", *options, NO_STATE="1")
    told = [p.communicate(timeout=100)[0] for p in running]
    assert 3 in [p.returncode for p in running], told
    assert (tmp_path / "late.training" / "checkpoint-2" / "optimizer.pt").is_file()
    assert newest_checkpoint(tmp_path / "late.training") is None
    assert any("No checkpoint was written yet" in text for text in told)


@pytest.mark.long
def test_a_group_whose_other_process_never_comes_is_told_in_words():
    done = watched(
        """
from clear_adapters.training.group import join_group
del store
os.environ["MASTER_PORT"] = PORT
try:
    join_group("cpu", 60.0, 2.0)
except ClearError as error:
    print(error)
""".replace("PORT", repr(str(free_port())))
    )
    assert "process 0 of 2 has waited 2 s for the others" in done.stdout, done


def test_multicast_is_off_unless_asked_for(monkeypatch):
    """It can put the GPUs of a host out of service."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    monkeypatch.setattr(group, "_meet", lambda *args: None)
    group.join_group("cpu", 60.0, 2.0)
    assert os.environ["NCCL_NVLS_ENABLE"] == "0"
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    group.join_group("cpu", 60.0, 2.0)
    assert os.environ["NCCL_NVLS_ENABLE"] == "1"


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ClearValueError, match=r"4 GPUs.*nproc_per_node 4"):
        group.join_group("cuda", 60.0, 2.0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_USE_FSDP", "true", "loop.shard=true"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "loop.shard=true"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "loop.compile=true"),
    ],
)
def test_what_accelerate_was_configured_for_is_refused_where_the_recipe_has_it(
    name, value, words, monkeypatch
):
    monkeypatch.setenv(name, value)
    with pytest.raises(ClearValueError, match=words):
        train("tiny", "nowhere", "nowhere", device="cpu")


def test_the_precision_is_the_recipes(data, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    attached = attach_for(load_recipe("tiny", STAGE["sft"], "sft"), build(0), device="cpu")
    recipe = load_recipe("tiny", [*COMMON, *STAGE["sft"], "steps=1", "loop.batch=2"], "sft")
    trainer = trainer_for(attached, recipe, read_examples(data), tmp_path / "run", progress=False)
    assert trainer.accelerator.mixed_precision == "no"
    assert "mixed precision" in caplog.text
