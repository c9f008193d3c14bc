"""Stage 1 trains what it should, on what it should, and the same however the work is divided."""

import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from clear_adapters.adapter import attach
from clear_adapters.backbones import get_backbone, list_backbones, resolve
from clear_adapters.backbones.bagel.checkpoint import save_checkpoint
from clear_adapters.backbones.bagel.tiny import build
from clear_adapters.backbones.packed import ImagePiece, LatentPiece, TextPiece
from clear_adapters.config import LoraSettings
from clear_adapters.datasets import read_examples
from clear_adapters.datasets.traces import choose_path
from clear_adapters.datasets.world import build as build_world
from clear_adapters.errors import ClearError, ClearValueError
from clear_adapters.prompts import get_protocol
from clear_adapters.sampling import TextSampling
from clear_adapters.store import read_adapter
from clear_adapters.training import build as build_module
from clear_adapters.training import trainer as trainer_module
from clear_adapters.training.build import attach_for, set_trainable, trainer_for
from clear_adapters.training.objective import Draw, Order
from clear_adapters.training.recipe import load_recipe
from clear_adapters.training.rows import prepared_psnr
from clear_adapters.training.run import train as train_stage
from clear_adapters.training.sft import SftObjective, SftSettings
from clear_adapters.training.shard import ddp_takes_shards
from clear_adapters.training.trainer import ClearTrainer, last_checkpoint

BASE = [
    "loop.batch=4",
    "log_every=1",
    "save_every=0",
    "workers=0",
    "warmup=0",
    # Steps in proportion to gradients: what they differ by is not blown up.
    "eps=1.0",
    "lr=1.0",
    "max_grad_norm=0",
    "schedule=constant",
    "lora.groups={understanding: 2, generation: 2}",
    "declined=0.2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world") / "data", 24, workers=1, progress=False)


@pytest.fixture(scope="module")
def examples(data):
    return read_examples(data)


def objective(backbone, **settings):
    return SftObjective(backbone, get_protocol("tiny"), SftSettings(**settings))


def train(examples, work, *overrides):
    """Trains the toy; gives the adapter's tensors."""
    attached = attach(build(0), lora=load_recipe("tiny", [*BASE, *overrides]).lora)
    attached.config = replace(attached.config, protocol=get_protocol("tiny"))
    trainer_for(attached, load_recipe("tiny", [*BASE, *overrides]), examples, work, progress=False).train()
    return {n: p.detach().clone() for n, p in attached.named_parameters()}


def distance(a, b):
    return max(float((a[n] - b[n]).detach().abs().max()) for n in a)


def seed_where(examples, wanted):
    """A seed with which the rows of the first step restore, or do not, as wanted."""
    backbone = build(0)
    traces = load_recipe("tiny", BASE).sft.traces
    psnr = {}
    for e in examples:
        psnr[e.id] = prepared_psnr(*(backbone.prepare(x) for x in (e.load(), e.load_clean())))
    for seed in range(500):
        order = Order(examples, len(wanted), seed)
        draws = [order[i] for i in range(len(wanted))]
        paths = [choose_path(d.example, traces, random.Random(d.seed), psnr[d.example.id]) for d in draws]
        if [p in ("restore", "always") for p in paths] == wanted:
            return seed
    raise AssertionError("no such seed")


# -------------------------------------------------------------------------------------------------- the batches


def test_scored_tokens_are_the_sampled_ones(examples):
    backbone = build(0)
    own = objective(backbone, vit_drop=0.0)
    seen = set()
    for seed in range(40):
        row = own.row(Draw(examples[seed % len(examples)], 0, seed))
        scored = [backbone.decode_text(p.ids) for p in row if isinstance(p, TextPiece) and p.scored]
        others = [backbone.decode_text(p.ids) for p in row if isinstance(p, TextPiece) and not p.scored]
        latents = [p for p in row if isinstance(p, LatentPiece)]
        batch = backbone.pack([row])
        said = backbone.decode_text(batch.text_targets)
        assert said == "".join(scored)
        assert int((batch.text_targets == backbone.end_id).sum()) == len(scored)
        assert scored[-1].endswith("</answer>")
        assert others[:2] == ["Look. Restore if needed. Answer.", examples[seed % len(examples)].question]
        # Two noised copies on branches of their own, then the clean one, which the text reads.
        kinds = [(p.scored, p.bridged, p.branch) for p in latents]
        assert kinds in ([], [(True, False, 1), (True, False, 2), (False, True, 0)])
        if latents:
            assert len({p.time for p in latents}) == 3
            assert latents[-1].time == 0
            assert len(batch.scored_at) == 2 * len(batch.latents) // 4
        seen.add((len(scored), len(others), bool(latents)))
    assert seen == {(1, 2, False), (2, 2, True), (1, 3, False), (1, 3, True)}


def test_understanding_tokens_are_dropped_per_row(examples):
    own = objective(build(0))
    rows = [own.row(Draw(examples[i % 24], 0, i)) for i in range(120)]
    pictures = [next(p for p in row if isinstance(p, ImagePiece)) for row in rows]
    assert all(p.as_condition for p in pictures)
    assert 0.25 < sum(not p.understanding for p in pictures) / 120 < 0.55


def test_the_direct_rival_sees_no_latent_and_no_protocol(examples):
    backbone = build(0)
    row = objective(backbone, mode="direct").row(Draw(examples[0], 0, 0))
    picture, question, answer = row
    assert (picture.as_condition, picture.understanding) == (False, True)
    assert backbone.decode_text(question.ids) == examples[0].question
    assert backbone.decode_text(answer.ids) == examples[0].answer
    assert (question.scored, answer.scored) == (False, True)
    assert len(backbone.pack([row]).latents) == 0


def test_a_row_depends_on_its_draw_alone(examples):
    own = objective(build(0))
    order = Order(examples, 100, 5)
    assert sorted(order[i].example.id for i in range(24)) == sorted(e.id for e in examples)
    assert [order[i].example.id for i in range(24)] != [order[24 + i].example.id for i in range(24)]
    # Jumping back, as a resumed run does, changes nothing.
    assert order[3] == Order(examples, 100, 5)[3]
    assert order[3].seed != Order(examples, 100, 6)[3].seed
    draws = [order[i] for i in range(6)]
    whole, half = own.collate(draws), own.collate(draws[3:])
    assert float(half["counts"][0]) == float(whole["batch"].text_weight[whole["batch"].text_row >= 3].sum())
    assert torch.equal(own.collate(draws)["batch"].ids, whole["batch"].ids)


def test_what_a_spawned_worker_gets_is_small_and_enough(examples):
    own = objective(build(0))
    sent = pickle.dumps(own.collate)
    weights = sum(p.numel() * p.element_size() for p in own.backbone.model.parameters())
    assert len(sent) < min(weights / 4, 100_000)
    draws = [Order(examples, 4, 0)[i] for i in range(4)]
    here, there = own.collate(draws), pickle.loads(sent)(draws)
    assert torch.equal(here["batch"].ids, there["batch"].ids)
    assert all(
        torch.equal(a, b) for a, b in zip(here["batch"].pictures, there["batch"].pictures, strict=True)
    )
    assert own.backbone.model is not None


# ------------------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("whole", [(), ("connector", "llm2vae", "time_embedder", "vae2llm")])
def test_exactly_what_is_listed_is_trained(examples, whole):
    base = build(0)
    before = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    attached = attach(base, lora=LoraSettings({"understanding": 2, "generation": 2}, whole=whole))
    set_trainable(attached, load_recipe("tiny"))
    trained = attached.trainable_parameters()
    assert not [n for n in trained if n.startswith("bridge.")]
    own = objective(base, vit_drop=0.0)
    for name, parameter in trained.items():
        if "lora_B" in name:  # zero at first, so that the other factor would have no gradient
            torch.nn.init.normal_(parameter, std=0.02)
    restoring = seed_where(examples, [True, False])
    order = Order(examples, 2, restoring)
    batch = own.collate([order[0], order[1]])
    own.loss(attached.module, batch, batch["counts"])["loss"].backward()
    without = [n for n, p in trained.items() if p.grad is None or not bool(p.grad.any())]
    assert without == []
    frozen = [p for p in attached.module.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)
    attached.detach()
    after = dict(base.model.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_training_changes_nothing_else(examples, tmp_path):
    base = build(0)
    before = {n: p.detach().clone() for n, p in base.model.named_parameters()}
    modes = [m.training for m in base.model.modules()]
    recipe = load_recipe("tiny", [*BASE, "steps=2"])
    attached = attach(base, lora=recipe.lora)
    first = {n: p.detach().clone() for n, p in attached.named_parameters()}
    forward = attached.module.forward
    trainer_for(attached, recipe, examples, tmp_path, progress=False).train()
    assert attached.module.forward == forward
    changed = {n for n, p in attached.named_parameters() if not torch.equal(p, first[n])}
    assert changed == {n for n in first if not n.startswith("bridge.")}
    attached.detach()
    assert all(torch.equal(before[n], p) for n, p in base.model.named_parameters())
    assert [m.training for m in base.model.modules()] == modes


def test_nothing_to_train_is_an_error(examples, tmp_path):
    attached = attach(build(0), lora=False)
    attached.module.requires_grad_(False)
    with pytest.raises(ClearValueError, match="nothing to train"):
        ClearTrainer(attached, None, Order(examples, 4, 0), None, rates={})


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch.compile's own imports
def test_flags_of_the_base_are_undone_with_the_run(examples, tmp_path):
    base = build(0)
    recipe = load_recipe("tiny", [*BASE, "compile=true", "checkpointing=true"])
    attached = attach(base, lora=recipe.lora)
    trainer_for(attached, recipe, examples, tmp_path, progress=False)
    decoder = base.model.language_model.model
    assert decoder.checkpointing
    assert decoder.compiled_training is not None
    attached.detach()
    assert not decoder.checkpointing
    assert decoder.compiled_training is None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # dynamo asks every input for one
def test_a_rollout_uses_up_nothing_of_what_the_compiler_remembers():
    """With a cache each layer is a graph of its own, and the compiler keeps eight."""
    torch._dynamo.reset()
    base = build(0, layers=10)
    attached = attach(base)
    for layer in base.model.language_model.model.layers:
        layer.compile(dynamic=True, backend="eager")
    compiled = torch._dynamo.utils.counters["frames"]
    before = compiled["ok"]
    with torch.no_grad():
        text = TextSampling(max_new_tokens=3, temperature=1.0)
        made = attached.engine.rollout(
            [Image.new("RGB", (64, 48))], ["What?"], seeds=[1], text=text, restore="always"
        )
    assert compiled["ok"] == before
    attached.engine.replay(made)
    assert compiled["ok"] > before
    torch._dynamo.reset()


def test_attention_never_takes_kernels_that_are_made_for_one_shape(examples, tmp_path, monkeypatch):
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    attached = attach(build(0), lora=load_recipe("tiny", BASE).lora)
    attached.answer(examples[0].load(), examples[0].question, restore="always").restored_image  # noqa: B018
    answered = len(seen)
    attached.detach()
    train(examples, tmp_path, "steps=1", "checkpointing=true")
    assert answered
    assert len(seen) > answered
    assert not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # elsewhere everything is as it was


def test_runs_of_two_seeds_start_from_two_adapters(toy):
    def first(seed):
        attached = attach_for(load_recipe("tiny", [f"loop.seed={seed}"]), toy / "model")
        found = {n: p.detach().clone() for n, p in attached.named_parameters() if "lora_A" in n}
        attached.detach()
        return found

    one, again, other = first(1), first(1), first(2)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one)


def test_a_loss_that_is_not_finite_ends_the_run_at_the_next_logged_step(data, tmp_path, monkeypatch):
    real = SftObjective.loss
    calls = []

    def spoilt(self, *args):
        calls.append(1)
        out = real(self, *args)
        return out if len(calls) < 2 else {n: t * float("nan") for n, t in out.items()}

    monkeypatch.setattr(SftObjective, "loss", spoilt)
    overrides = [*BASE, "steps=9", "log_every=4"]
    with pytest.raises(ClearValueError, match=r"step 4.*loss=nan.*lr"):
        train_stage("tiny", data, tmp_path / "out", model=build(0), overrides=overrides, progress=False)
    assert len(calls) == 4
    assert not (tmp_path / "out").exists()
    rows = [json.loads(line) for line in (tmp_path / "out.training" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1]


def test_weights_that_are_not_finite_are_not_told_as_a_full_disk(data, tmp_path, monkeypatch):
    """Met by a checkpoint, before a log line that would show the loss."""
    monkeypatch.setattr("clear_adapters.training.trainer.math.isfinite", lambda value: True)
    overrides = [*BASE, "steps=3", "log_every=1", "save_every=1", "lr=1e30", "eps=1e-30", "batch=1"]
    with pytest.raises(ClearValueError, match=r"weights that are not finite.*Lower optim.lr") as caught:
        train_stage("tiny", data, tmp_path / "out", model=build(0), overrides=overrides, progress=False)
    assert "Make room" not in str(caught.value)


def test_a_place_that_cannot_be_written_to_is_told_before_training(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ClearValueError, match=r"nothing can be written to.*another output"):
        train_stage(
            "tiny",
            data,
            tmp_path / "file" / "out",
            model=build(0),
            overrides=[*BASE, "steps=1"],
            progress=False,
        )


def test_weights_that_are_not_finite_are_never_an_adapter(data, tmp_path):
    """The last steps are not logged, and one of them ruins the weights."""
    overrides = [*BASE, "steps=2", "log_every=5", "lr=1e30", "eps=1e-30", "batch=1"]
    with pytest.raises(ClearError, match=r"not finite|loss="):
        train_stage("tiny", data, tmp_path / "out", model=build(0), overrides=overrides, progress=False)
    assert not (tmp_path / "out").exists()


def test_the_base_is_loaded_in_the_type_that_is_computed_in(toy, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(build_module, "attach", lambda *a, **k: asked.append(k["dtype"]) or attach(*a, **k))
    for bf16, wanted in (("true", None), ("false", torch.float32)):
        attach_for(load_recipe("tiny", [f"bf16={bf16}"]), toy / "model").detach()
        assert asked.pop() == wanted
    recipe = load_recipe("tiny", ["bf16=false"])
    half = attach(toy / "model", lora=recipe.lora, dtype="bfloat16", device="cpu")
    with pytest.raises(ClearValueError, match=r"bf16=False.*bfloat16"):
        trainer_for(half, recipe, [], tmp_path)


def test_a_loaded_model_is_trained_where_it_is(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # what the default would choose
    train_stage("tiny", data, tmp_path / "a", model=build(0), overrides=[*BASE, "steps=1"], progress=False)
    monkeypatch.setattr(build_module, "choose_device", lambda _: torch.device("cuda:1"))
    with pytest.raises(ClearValueError, match=r"device='cuda:1'.*is on cpu"):
        train_stage("tiny", data, tmp_path / "b", model=build(0), device="cuda:1", overrides=BASE)
    assert not (tmp_path / "b.training").exists()


def test_a_device_without_a_number_is_any_of_its_type(data, tmp_path):
    overrides = [*BASE, "steps=1"]
    train_stage(
        "tiny", data, tmp_path / "a", model=build(0), device="cpu:0", overrides=overrides, progress=False
    )


def test_a_gpu_that_this_process_does_not_train_on_is_refused(examples, tmp_path, monkeypatch):
    """Trainer would move the network there, and leave the autoencoder behind."""
    arguments = types.SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(build_module, "training_arguments", lambda *_, **__: arguments)
    recipe = load_recipe("tiny", BASE)
    with pytest.raises(ClearValueError, match=r"on cpu.*on cuda:0.*CUDA_VISIBLE_DEVICES"):
        trainer_for(attach(build(0), lora=recipe.lora), recipe, examples, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_eight_examples_are_learnt(examples, tmp_path):
    overrides = [
        "steps=30",
        "batch=8",
        "lr=2e-2",
        "eps=1e-8",
        "explore=0",
        "declined=0",
        "restore_below=98",
        "max_grad_norm=1",
        "lora.groups.understanding=8",
    ]
    train(examples[:8], tmp_path, *overrides)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    ce = [line["ce"] for line in lines if "ce" in line]
    mse = [line["mse"] for line in lines if "mse" in line]
    assert ce[-1] < 0.6 * ce[0]
    assert sum(mse[-5:]) < 0.97 * sum(mse[:5])


# --------------------------------------------------------------------------------------- dividing the same work


def test_accumulation_equals_the_big_batch(examples, tmp_path):
    seed = f"seed={seed_where(examples, [True, False, True, False])}"
    big = train(examples, tmp_path / "a", "steps=2", seed)
    for micro in (1, 2):
        small = train(examples, tmp_path / f"b{micro}", "steps=2", seed, f"micro_batch={micro}")
        assert distance(big, small) < 1e-5
    start = dict(attach(build(0), lora=load_recipe("tiny", BASE).lora).named_parameters())
    assert distance(big, start) > 1e-3


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from clear_adapters.backbones import get_backbone, resolve
from clear_adapters.training.run import train
family, data, out, *overrides = sys.argv[1:]
spec = get_backbone(family)
model = resolve(spec.tiny, spec)(0)
train("tiny", data, out, model=model, device="cpu", overrides=overrides, progress=False)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    "family", ["bagel", *(pytest.param(n, marks=pytest.mark.long) for n in list_backbones() if n != "bagel")]
)
def test_two_processes_equal_one(data, examples, tmp_path, family):
    # The second process has no restoration in its half of the first step.
    seed = seed_where(examples, [True, True, False, False])
    overrides = [*BASE, "steps=2", f"seed={seed}", "save_dtype=float32"]
    spec = get_backbone(family)
    model = resolve(spec.tiny, spec)(0)
    one = train_stage(
        "tiny", data, tmp_path / "one", model=model, device="cpu", overrides=overrides, progress=False
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", SCRIPT, family, str(data), str(tmp_path / "two"), *overrides]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    told = [process.communicate(timeout=100)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    a, b = read_adapter(one), read_adapter(tmp_path / "two")
    assert distance(a.lora, b.lora) < 1e-5
    lines = [
        [json.loads(line) for line in (tmp_path / f"{n}.training" / "log.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    for first, second in zip(*lines, strict=True):
        for key in ("loss", "ce", spec.loss):
            assert first.get(key) == pytest.approx(second.get(key), abs=1e-4)


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_as_if_nothing_had_been(data, tmp_path, monkeypatch):
    overrides = [
        *BASE,
        "steps=5",
        "save_every=2",
        "save_dtype=float32",
        "eps=1e-8",
        "lr=1e-2",
        "schedule=cosine",
    ]

    def run(name):
        return train_stage(
            "tiny", data, tmp_path / name, model=build(0), device="cpu", overrides=overrides, progress=False
        )

    whole = run("whole")
    steps = []
    real = ClearTrainer.compute_loss

    def dies(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            raise KilledError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ClearTrainer, "compute_loss", dies)
    with pytest.raises(KilledError):
        run("killed")
    monkeypatch.setattr(ClearTrainer, "compute_loss", real)
    assert not (tmp_path / "killed").exists()
    # A checkpoint that was being written: left out and taken away.
    work = tmp_path / "killed.training"
    shutil.copytree(work / "checkpoint-2", work / "checkpoint-3")
    (work / "checkpoint-3" / "trainer_state.json").unlink()
    assert last_checkpoint(work) == work / "checkpoint-2"
    assert not (work / "checkpoint-3").exists()
    again = run("killed")
    a, b = read_adapter(whole), read_adapter(again)
    assert all(torch.equal(a.lora[n], b.lora[n]) for n in a.lora)
    curves = []
    for name in ("whole", "killed"):
        rows = [
            json.loads(line)
            for line in (tmp_path / f"{name}.training" / "log.jsonl").read_text().splitlines()
        ]
        curves.append([(r["step"], r["ce"], r["mse"], r["learning_rate"]) for r in rows if "ce" in r])
    assert curves[0] == curves[1]
    assert [step for step, *_ in curves[0]] == [1, 2, 3, 4, 5]
    # Finished: left as it is. Other settings, or no resuming: refused.
    stamp = (again / "clear_config.json").stat().st_mtime_ns
    assert run("killed") == again
    assert (again / "clear_config.json").stat().st_mtime_ns == stamp
    with pytest.raises(ClearValueError, match=r"\(optim.lr is 0.01 there and 1.0 here\)"):
        train_stage("tiny", data, again, model=build(0), overrides=[*overrides, "lr=1"])
    with pytest.raises(ClearValueError, match="resume=True"):
        train_stage("tiny", data, again, model=build(0), overrides=overrides, resume=False)
    facts = b.config.provenance
    assert facts["steps"] == 5
    assert set(facts) >= {"seed", "commit", "data_hash", "seconds", "device", "recipe", "versions"}


def test_a_stage_that_prepares_nothing_gathers_no_shards(examples, tmp_path, monkeypatch):
    gathers = []
    monkeypatch.setattr(trainer_module, "gathered", lambda module: gathers.append(1))
    train(examples, tmp_path / "run", "steps=1")
    assert gathers == []


def test_a_run_goes_on_where_it_is_computed_otherwise(toy, data, tmp_path):
    given = {"model": toy / "model", "device": "cpu", "progress": False}
    options = [*BASE, "steps=4", "save_every=2"]
    train_stage("tiny", data, tmp_path / "out", overrides=options, **given)
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out.training" / "checkpoint-4")
    how = ["micro_batch=1", "timeout=50", "workers=0", "shard=false"]
    made = train_stage("tiny", data, tmp_path / "out", overrides=[*options, *how], **given)
    assert read_adapter(made).config.provenance["recipe"]["loop"]["micro_batch"] == 1
    lines = (tmp_path / "out.training" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps.count(1) == 1


@pytest.mark.parametrize(
    ("stage", "world", "options", "message"),
    [
        ("sft", 8, ["loop.batch=4"], "leaves some of them without an example"),
        ("sft", 2, ["loop.batch=4", "micro_batch=3"], "micro-batches of 3 on 2 processes"),
        ("grpo", 8, ["loop.batch=3"], "a divisor or a multiple of the processes"),
        ("grpo", 8, ["loop.batch=2", "grpo.group=6"], "group=6 does not divide among the 4 processes"),
    ],
)
def test_a_batch_that_does_not_divide_among_processes(
    stage, world, options, message, examples, tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    recipe = load_recipe("tiny", [*options, "workers=0"], stage)
    attached = attach(build(0), lora=LoraSettings({"understanding": 2, "generation": 2}))
    try:
        with pytest.raises(ClearValueError, match=message):
            trainer_for(attached, recipe, examples, tmp_path / "run")
    finally:
        attached.detach()
    assert not (tmp_path / "run").exists()


def test_another_model_protocol_or_picture_folder_is_another_run(toy, data, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Look.")
    shutil.copytree(toy / "model", tmp_path / "model")
    given = {"overrides": [*BASE, "steps=1", f"protocol={prompt}"], "device": "cpu", "progress": False}

    def run(model=tmp_path / "model", **more):
        return train_stage("tiny", data, tmp_path / "out", model=model, **{**given, **more})

    made = read_adapter(run()).config.provenance
    assert made["model"]["name"] == "model"
    assert str(tmp_path) not in json.dumps({k: v for k, v in made.items() if k != "recipe"})
    assert run() == tmp_path / "out"
    with pytest.raises(ClearValueError, match=r"\(images differ\)"):
        run(clean_image_dir=tmp_path)
    with pytest.raises(ClearValueError, match=r"\(model differ\)"):
        run(model=build(0))
    other = build(1)
    save_checkpoint(tmp_path / "model", other.model, other.autoencoder, other.tokenizer)
    with pytest.raises(ClearValueError, match=r"\(model differ\)"):
        run()
    shutil.copytree(toy / "model", tmp_path / "model", dirs_exist_ok=True)
    prompt.write_text("Look twice.")
    with pytest.raises(ClearValueError, match=r"\(protocol differ\)"):
        run()
    for damaged in (b"\xff", b"[3]", b"{"):
        (tmp_path / "out.training" / "run.json").write_bytes(damaged)
        with pytest.raises(ClearValueError, match=r"run\.json is damaged"):
            run()


@pytest.mark.parametrize("wrong", ["lora.groups={sparkle: 2}", "micro_batch=3"])
def test_a_refused_run_leaves_nothing_that_blocks_the_corrected_one(data, tmp_path, wrong):
    given = {"model": build(0), "progress": False}
    with pytest.raises(ClearError):
        train_stage("tiny", data, tmp_path / "out", overrides=[*BASE, "steps=1", wrong], **given)
    assert list(tmp_path.iterdir()) == []
    train_stage("tiny", data, tmp_path / "out", overrides=[*BASE, "steps=1"], **given)


def test_an_output_of_something_else_is_left_alone(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(ClearValueError, match="not trained by this run"):
        train_stage("tiny", data, tmp_path / "out", model=build(0))


def test_the_batch_must_divide(examples, tmp_path):
    recipe = load_recipe("tiny", [*BASE, "micro_batch=3"])
    attached = attach(build(0), lora=recipe.lora)
    with pytest.raises(ClearValueError, match="does not divide"):
        trainer_for(attached, recipe, examples, tmp_path)


def test_the_rival_trains_the_understanding_group_alone(data, tmp_path):
    folder = train_stage(
        "tiny",
        data,
        tmp_path / "out",
        model=build(0),
        device="cpu",
        overrides=[*BASE, "steps=1", "mode=direct"],
        progress=False,
    )
    assert read_adapter(folder).config.lora.ranks == {"understanding": 2}


def test_accelerate_lets_ddp_around_shards_and_refuses_again_afterwards():
    from accelerate import Accelerator, accelerator

    # What is replaced is what accelerate asks: GPUs alone take this way.
    assert "model_has_dtensor" in Accelerator.prepare_model.__code__.co_names
    check = accelerator.model_has_dtensor
    with ddp_takes_shards():
        assert not accelerator.model_has_dtensor(object())
    assert accelerator.model_has_dtensor is check
