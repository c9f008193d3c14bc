"""The speed benchmarks run at tiny size, and their report shows what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "speed"))

import equality  # noqa: E402
import inference  # noqa: E402
import loading  # noqa: E402
import scaling  # noqa: E402
import scaling_report  # noqa: E402
import shapes  # noqa: E402
import speed_report  # noqa: E402
import training  # noqa: E402
from readme import between  # noqa: E402

from clear_adapters.backbones.bagel import checkpoint  # noqa: E402
from clear_adapters.backbones.bagel.tiny import initialise, small_config, tokenizer  # noqa: E402
from clear_adapters.backbones.packed import TextPiece  # noqa: E402
from clear_adapters.errors import ClearValueError  # noqa: E402
from clear_adapters.results import ResultFile, read_result  # noqa: E402
from clear_adapters.training.recipe import load_recipe  # noqa: E402

TINY = ["--size", "tiny", "--device", "cpu", "--repeats", "1"]


@pytest.mark.long
def test_answering_is_measured(tmp_path):
    path = tmp_path / "inference.json"
    parts = "prefill,text,restoration,answer,group,bridge"
    assert inference.main([*TINY, "--only", parts, "--output", str(path)]) == 0
    found = read_result(path)
    assert {r["part"] for r in found.payload["rows"]} == set(parts.split(","))
    assert all(r["fastest"] <= r["seconds"] <= r["slowest"] for r in found.payload["rows"])
    assert found.payload["failed"] == []
    answer = next(r for r in found.payload["rows"] if r["part"] == "answer")
    assert set(answer["phases"]) == {"prefill", "text", "restore", "read"}


def test_a_failure_leaves_the_other_parts(tmp_path, monkeypatch):
    path = tmp_path / "inference.json"

    def fails(self):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(inference.Bench, "prefill", fails)
    assert inference.main([*TINY, "--only", "prefill,bridge", "--output", str(path)]) == 1
    payload = read_result(path).payload
    assert [f["part"] for f in payload["failed"]] == ["prefill"]
    assert "no room" in payload["failed"][0]["error"]
    assert {r["part"] for r in payload["rows"]} == {"bridge"}
    assert inference.main([*TINY, "--only", "bridge", "--seconds", "0", "--output", str(path)]) == 1
    assert {f["error"] for f in read_result(path).payload["failed"]} == {"no time was left"}


@pytest.mark.long
def test_training_is_measured(tmp_path):
    path = tmp_path / "training.json"
    assert training.main([*TINY, "--only", "rate,sft,grpo", "--output", str(path)]) == 0
    rows = {r["part"]: r for r in read_result(path).payload["rows"]}
    assert rows["sft"]["tokens_per_second"] > 0
    assert 0 < rows["sft"]["share"] < rows["sft"]["share_run"] < 1
    assert rows["grpo"]["rows"] == training.TINY.group
    assert rows["grpo"]["prepare"] > 0


@pytest.mark.long
@pytest.mark.timeout(300)
def test_two_processes_are_measured(tmp_path):
    path = tmp_path / "scaling.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, scaling.__file__, *TINY, "--output", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_result(path)
    assert found.command.startswith("torchrun --nproc_per_node 2 scaling.py")
    rows = {(r["part"], r["growth"]): r for r in found.payload["rows"] if r["part"] != "rate"}
    assert set(rows) == {(p, g) for p in ("sft", "grpo") for g in ("weak", "strong")} | {("shard", "weak")}
    assert all(r["processes"] == 2 and 0 < r["waiting"] <= r["waiting_most"] < 1 for r in rows.values())
    own = rows["grpo", "weak"]
    assert own["rollouts_per_second"] == pytest.approx(2 * inference.TINY.group / own["seconds"])
    assert rows["grpo", "strong"]["rows"] == inference.TINY.group // 2


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_limit_ends_all_processes(tmp_path):
    path = tmp_path / "scaling.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, scaling.__file__, *TINY, "--only", "sft", "--seconds", "0", "--output", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 1
    assert {f["error"] for f in read_result(path).payload["failed"]} == {"no time was left"}


@pytest.mark.long
@pytest.mark.timeout(400)
def test_two_processes_are_compared_with_one(tmp_path):
    path = tmp_path / "equality.json"
    options = [
        "--device",
        "cpu",
        "--stages",
        "sft",
        "--ways",
        "alone",
        "resumed",
        "accelerate",
        "--output",
        str(path),
    ]
    assert equality.main(options) == 0
    rows = read_result(path).payload["rows"]
    assert [row["way"] for row in rows] == ["alone", "resumed", "accelerate"]
    # In micro-batches of the same shapes nothing is rounded otherwise.
    assert all(row["beside"] < 1e-5 for row in rows[1:])
    for row in rows:
        assert row["within"]
        assert row["moved"] > 0
        assert row["curve"] == pytest.approx(row["curve_of_one"], rel=1e-4)


def event(name, start, end, device="CUDA", note=False):
    kind = getattr(torch.autograd.DeviceType, device)
    span = SimpleNamespace(start=start * 1e6, end=end * 1e6)
    return SimpleNamespace(name=name, time_range=span, device_type=kind, is_user_annotation=note)


def test_waiting_is_communication_without_computation():
    work = [event("gemm", 0, 2), event("gemm", 1, 3), event("step", 0, 100, note=True)]
    work += [event("aten::mm", 0, 100, "CPU")]
    assert scaling.waited([*work, event("ncclDevKernel_AllReduce", 2, 7)], True) == pytest.approx(4)
    hidden = [event("ncclDevKernel_AllGather", 0.5, 2.5), event("nccl:all_gather", 0, 50, note=True)]
    assert scaling.waited([*work, *hidden], True) == 0
    twice = [event("ncclDevKernel_A", 4, 6), event("ncclDevKernel_B", 5, 7), event("gemm", 6.5, 8)]
    assert scaling.waited([*work, *twice], True) == pytest.approx(2.5)
    assert scaling.waited([event("aten::mm", 0, 1, "CPU"), event("gloo:all_reduce", 0, 3, "CPU")], False) == 2
    assert scaling.waited([event("gloo:all_reduce", 0, 3, "CPU")], True) is None


def test_texts_have_their_length():
    backbone = shapes.build("tiny", torch.device("cpu"), torch.float32)
    assert len(backbone.encode_text(shapes.protocol(50).system)) == 48
    backbone.script(2)
    turns = [backbone.decode_text([1]) for _ in range(6)]
    assert turns == [shapes.REQUEST] * 2 + [shapes.ANSWER] * 2 + [shapes.REQUEST] * 2
    with pytest.raises(AssertionError, match="not of 3"):
        inference.exact([torch.zeros(3), torch.zeros(2)], 3)


def test_shapes_are_those_of_bagel_7b():
    with torch.device("meta"):
        from clear_adapters.backbones.bagel.model import BagelModel

        model = BagelModel(shapes.config_of("7b"))
    layers = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and "language" in n)
    assert layers == pytest.approx(13.05e9, rel=0.01)
    assert 14.5e9 < shapes.parameters(model) < 14.8e9


def test_counted_products_are_those_that_are_run():
    from torch.utils.flop_counter import FlopCounterMode

    backbone = shapes.build("tiny", torch.device("cpu"), torch.float32)
    batch = backbone.pack([[TextPiece(backbone.encode_text("What is it?"), scored=True)]])
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        backbone.forward(backbone.encode(batch, torch.zeros_like(batch.latents)))
    own = training.forward_products(backbone, batch, 0)
    # Of a CPU's attention the counter knows nothing.
    seen = batch.visibility()[0, 0][batch.block[0] >= 0]
    assert training.pairs(batch) == int(seen.sum())
    attention = 4 * backbone.layers * training.pairs(batch) * backbone.width
    assert own - attention == counter.get_total_flops()


# -- the report


def made(rows, kind="inference", device="Some GPU", **facts):
    payload = {"rows": rows, "failed": [], "quantization": None, **facts}
    return ResultFile.collect(kind, payload, device=device)


def test_the_table_shows_targets_that_are_met_in_bold():
    rows = [
        {"part": "text", "batch": 1, "text": 64, "seconds": 0.0065, "peak_gb": 30.0},
        {"part": "text", "batch": 8, "text": 64, "seconds": 0.0112, "peak_gb": 30.0},
        {"part": "states", "work": "text", "state": "folded", "batch": 1, "text": 64, "seconds": 0.006},
    ]
    step = {
        "part": "sft",
        "micro": 4,
        "seconds": 2.0,
        "tokens_per_second": 9000.0,
        "share": 0.34,
        "share_run": 0.5,
        "rows": 4,
        "checkpointing": True,
        "compile": False,
    }
    shown = speed_report.render([made(rows), made([step | {"peak_gb": 60.2}], "training")])
    assert "| text, batch 1 | 39 ms a token | 7 ms | 5 ms | **6.5 ms** | **6.0 ms** |" in shown
    assert "| text, batch 8 | 8 x 39 ms | 9 ms | 5 ms | 11.2 ms | – |" in shown
    assert "| 2.00 s, 9,000 tokens/s, 34% of the card's rate (50% with what is run twice), 60 GB |" in shown
    assert "Some GPU" in shown


def test_cards_have_tables_of_their_own():
    def text(seconds):
        return [{"part": "text", "batch": 1, "text": 64, "seconds": seconds, "peak_gb": 30.0}]

    shown = speed_report.render([made(text(0.006), device="Card B"), made(text(0.008), device="Card A")])
    first, second = shown.split("**Card B**")
    assert "**Card A**" in first
    assert "| 8.0 ms |" in first
    assert "| **6.0 ms** |" in second


def test_restorations_and_steps_have_tables():
    rows = [
        {"part": "restoration", "side": side, "batch": 1, "guided": guided, "seconds": 2.0, "peak_gb": 31.0}
        for side, guided in ((512, True), (512, False), (1024, True))
    ]
    step = {"seconds": 2.0, "tokens_per_second": 9000.0, "rows": 8, "row_tokens": 5120, "peak_gb": 60.0}
    steps = [step | {"part": "grid", "checkpointing": False, "compile": True}]
    shown = speed_report.render([made(rows), made(steps, "training")])
    assert "| 512 x 512 | 1 | 2.00 s | 2.00 s | 31 GB |" in shown
    assert "| 1024 x 1024 | 1 | 2.00 s | – | 31 GB |" in shown
    assert "| 8 x 5,120 tokens, compiled, no checkpointing | 2.00 s, 9,000 tokens/s, 60 GB |" in shown


def test_the_report_is_put_between_its_markers(tmp_path, monkeypatch):
    files = {name: tmp_path / f"{name}.md" for name in ("README", "MAIN")}
    for name, file in files.items():
        file.write_text("before\n{}\nstale words\n{}\nafter\n".format(*speed_report.MARKERS))
        monkeypatch.setattr(speed_report, name, file)
    rows = [{"part": "picture", "side": 512, "seconds": 2.0}, {"part": "group", "group": 8, "seconds": 5.0}]
    path = made(rows, device="Big H100").write(tmp_path / "one.json")
    assert speed_report.main([str(path)]) == 0
    texts = {name: file.read_text() for name, file in files.items()}
    for text in texts.values():
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "stale words" not in text
        assert "**5.00 s**" in text
    assert (tmp_path / speed_report.FIGURE).is_file()
    assert speed_report.FIGURE in texts["README"]
    assert speed_report.FIGURE not in texts["MAIN"]
    # Where one has no place for it, nothing is written.
    files["MAIN"].write_text("no markers")
    files["README"].write_text("{}\nstale words\n{}\n".format(*speed_report.MARKERS))
    with pytest.raises(ClearValueError):
        speed_report.main([str(path)])
    assert "stale words" in files["README"].read_text()


def test_the_readme_shows_the_committed_results():
    files = sorted((ROOT / "benchmarks" / "results" / "speed").glob("*.json"))
    text = speed_report.README.read_text(encoding="utf-8")
    shown = between(text, speed_report.MARKERS)
    assert shown.startswith(speed_report.render([read_result(f) for f in files]))
    short = between(speed_report.MAIN.read_text(encoding="utf-8"), speed_report.MARKERS)
    assert short == speed_report.short([read_result(f) for f in files])


# -- loading


def test_a_checkpoint_is_loaded_without_a_second_copy(tmp_path, monkeypatch):
    """Private memory of the process at the end of each placed tensor, against the weights themselves."""
    sizes = {"width": 256, "layers": 4, "heads": 4, "kv_heads": 2, "mlp": 3072, "vision_width": 24}
    sizes |= {"vision_layers": 1, "vision_heads": 2, "patch": 8, "side": 64}
    model, autoencoder = initialise(small_config(**sizes, ae=shapes.config_of("tiny").ae), 0)
    checkpoint.save_checkpoint(tmp_path, model, autoencoder, tokenizer())
    weights = sum(p.numel() * 2 for p in model.parameters())
    del model
    place, seen = checkpoint._place, []

    def private():
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024

    if not Path("/proc/self/status").is_file():
        pytest.skip("needs /proc")
    monkeypatch.setattr(checkpoint, "_place", lambda *given: (place(*given), seen.append(private()))[0])
    before = private()
    for dtype, factor in ((None, 1), (torch.float32, 2)):
        seen.clear()
        loaded = checkpoint.load_checkpoint(tmp_path, dtype, torch.device("cpu"))
        assert max(seen) - before < 1.3 * factor * weights + 8e6
        del loaded


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be told to forget files")
def test_loading_is_measured_beside_reading(tmp_path):
    path = tmp_path / "loading.json"
    options = (
        "--size",
        "tiny",
        "--layers",
        "3",
        "--device",
        "cpu",
        "--repeats",
        "2",
        "--folder",
        str(tmp_path),
    )
    assert loading.main(["--output", str(path), *options]) == 0
    found = read_result(path)
    assert [len(runs) for runs in found.payload["runs"].values()] == [2, 2]
    whole = shapes.build("tiny", torch.device("cpu"), torch.bfloat16, layers=3)
    weights = sum(2 * p.numel() for part in (whole.model, whole.autoencoder) for p in part.parameters())
    assert weights < found.payload["bytes"] < 1.3 * weights
    assert not list(tmp_path.glob("tmp*"))
    assert "0.0 GB, CPU" in speed_report.render([found])


def test_the_result_is_plain_json(tmp_path):
    path = tmp_path / "inference.json"
    inference.main([*TINY, "--only", "bridge", "--output", str(path), "--profile"])
    assert "Self CPU" in (tmp_path / "inference-bridge-profile.txt").read_text()
    content = json.loads(path.read_text())
    assert content["command"] == "inference.py --size tiny --only bridge"
    assert str(tmp_path) not in path.read_text()


# -- several GPUs


def of_scaling(processes, *rows):
    facts = {"processes": processes, "peak_gb": 40.0, "waiting": 0.05}
    payload = {"processes": processes, "load": {"group": 8, "text": 64, "rollout_points": 20}}
    return made([facts | row for row in rows], "scaling", **payload)


def step(part, growth, rate, seconds=1.0, **more):
    return {"part": part, "growth": growth, "tokens_per_second": rate, "seconds": seconds, **more}


FIGURES = scaling_report.Figures(
    tokens={1: 10_000.0, 4: 16_000.0},
    row=5_000.0,
    words=128,
    text={1: 0.01, 8: 0.024},
    flow={1: 0.1, 8: 0.08},
    guided={1: 0.3, 8: 0.25},
    share={1: 1.0, 2: 0.95, 4: 0.9},
    cards=dict.fromkeys(("supervised", "share", "text", "flow"), "G"),
)


def test_the_figures_of_the_plan_come_from_the_results():
    load, plain = {"load": {"text": 64}}, {"checkpointing": True, "compile": False}
    files = [
        made(
            [
                {"micro": micro, "seconds": 0.5, "tokens_per_second": rate} | facts
                for micro, rate, facts in (
                    (1, 10_000.0, {"part": "sft", **plain}),
                    (4, 16_000.0, {"part": "grid", **plain}),
                    (4, 17_000.0, {"part": "grid", **plain, "compile": True}),
                )
            ],
            "training",
            **load,
        ),
        made(
            [
                {"part": "text", "batch": 1, "text": 64, "seconds": 0.01},
                {"part": "text", "batch": 8, "text": 64, "seconds": 0.024},
                *(
                    {"part": "restoration", "side": 512, "batch": batch, "points": 30}
                    | {"guided": guided, "seconds": 29 * batch * seconds}
                    for batch, guided, seconds in (
                        (1, False, 0.1),
                        (1, True, 0.3),
                        (8, False, 0.08),
                        (8, True, 0.25),
                    )
                ),
            ]
        ),
        *(
            of_scaling(n, step("sft", "weak", n * share * 9_000.0))
            for n, share in ((1, 1.0), (2, 0.95), (4, 0.9))
        ),
    ]
    found = scaling_report.figures(files)
    assert found.flow == pytest.approx(FIGURES.flow)
    assert found.guided == pytest.approx(FIGURES.guided)
    assert found.share == pytest.approx(FIGURES.share)
    assert (found.tokens, found.row, found.words, found.text) == (FIGURES.tokens, 5_000.0, 128, FIGURES.text)
    assert scaling_report.figures(files[1:]) is None
    assert scaling_report.sections(files[1:])[scaling_report.PLAN] == scaling_report.NOTHING


def test_the_plan_is_its_arithmetic():
    sft, _, grpo = (load_recipe("paper", (), stage) for stage in ("sft", "bridge", "grpo"))
    direct, restoring = FIGURES.rows
    assert (direct, restoring) == (5_000 - 128 - 2 * 1_026 + 606, 5_000 - 128 + 1_080)
    share = 12_619 / 24_886
    one = scaling_report.step_seconds(FIGURES, sft, 1, 0)
    assert one == pytest.approx(64 * (direct + share * (restoring - direct)) / 10_000)
    # With a row each, all but surely one of 64 restores, and all wait for it.
    assert scaling_report.step_seconds(FIGURES, sft, 64, 0) == pytest.approx(restoring / 9_000, rel=1e-6)
    assert scaling_report.exchange(64, 10**9) == pytest.approx(2 * 63 / 64 * 1e9 / 50e9)
    assert scaling_report.exchange(8, 10**9) == 0
    # 128 rollouts on 64 GPUs: two side by side, and in a forward.
    sampled = 1_080 * FIGURES.step_of_text(2) + 2 * 29 * 0.1
    assert scaling_report.step_seconds(FIGURES, grpo, 64, 0) == pytest.approx(
        sampled + 4 / 3 * 2 * restoring / 9_000
    )
    assert FIGURES.step_of_text(2) == pytest.approx(0.012)
    # On 8 GPUs 16 rollouts are, and 4 rows are trained in a forward.
    sampled = 1_080 * FIGURES.step_of_text(16) + 16 * 29 * 0.08
    assert scaling_report.step_seconds(FIGURES, grpo, 8, 0) == pytest.approx(
        sampled + 4 / 3 * 16 * restoring / (16_000 * 0.9)
    )
    assert [scaling_report.most_gpus(r, 512) for r in (sft, grpo)] == [64, 128]


def test_the_largest_of_binomials():
    assert scaling_report.most_of(4, 1, 0.25) == pytest.approx(1)
    # Two GPUs with a row each: none with 1/4.
    assert scaling_report.most_of(1, 2, 0.5) == pytest.approx(0.75)


def test_gradients_are_those_of_the_adapter():
    from clear_adapters.backbones.bagel.model import BagelModel
    from clear_adapters.backbones.bagel.spec import SPEC

    with torch.device("meta"):
        model = BagelModel(shapes.config_of("7b"))
    recipe = load_recipe("paper", (), "sft")
    ends = tuple(f".{name}" for group in SPEC.groups.values() for name in group.modules)
    adapted = [m for n, m in model.named_modules() if n.startswith("language_model.") and n.endswith(ends)]
    sizes = sum(64 * sum(m.weight.shape) for m in adapted)
    assert scaling_report.adapter_bytes(recipe) == 4 * sizes


def test_the_document_shows_several_gpus(tmp_path, monkeypatch):
    document = tmp_path / "scaling.md"
    pairs = (scaling_report.MEASURED, scaling_report.EQUAL, scaling_report.PLAN)
    document.write_text("\n".join(f"{begin}\nstale\n{end}" for begin, end in pairs))
    monkeypatch.setattr(scaling_report, "DOCUMENT", document)
    files = [
        of_scaling(1, step("sft", "weak", 9_000.0), step("grpo", "weak", 1.0, rollouts_per_second=2.0)),
        of_scaling(2, step("sft", "weak", 17_100.0), step("grpo", "strong", 1.0, rollouts_per_second=3.0)),
    ]
    row = {"stage": "sft", "processes": 2, "way": "ddp", "dtype": "bfloat16", "step": 0.03}
    row |= {"curve": [2.0, 1.001], "curve_of_one": [2.0, 1.0]}
    rows = [row, {**row, "way": "shard", "step": 0.004, "beside": 5e-7, "curve": [2.0, 1.0]}]
    files.append(ResultFile.collect("equality", {"rows": rows, "tolerance": {"bfloat16": 0.02}}, device="G"))
    paths = [str(f.write(tmp_path / f"{i}.json")) for i, f in enumerate(files)]
    assert scaling_report.main(paths) == 0
    text = document.read_text()
    assert "| stage 1, 4 rows a GPU | 2 | 1.00 s | 17,100 tokens/s | 95% | 5.0% | 40.0 GB |" in text
    assert "| stage 3, a question in all | 2 | 1.00 s | 3.00 rollouts/s | 75% | 5.0% | 40.0 GB |" in text
    assert "| sft | 2 | G | bfloat16 | 0.02 | 1.0e-03 | – | **3.0e-02** | 4.0e-03 | – | – | 5.0e-07 |" in text
    assert "stale" not in text
    picture = tmp_path / scaling_report.FIGURE
    with_rollouts = picture.read_bytes()
    # Without rollouts there is no panel for them.
    scaling_report.figure([of_scaling(n, step("sft", "weak", 9_000.0)) for n in (1, 2)], picture)
    with Image.open(picture) as drawn:
        assert drawn.width > 300
    assert picture.read_bytes() != with_rollouts


def test_the_document_shows_the_committed_results():
    files = sorted((ROOT / "benchmarks" / "results" / "speed").glob("*.json"))
    text = scaling_report.DOCUMENT.read_text(encoding="utf-8")
    for where, content in scaling_report.sections([read_result(f) for f in files]).items():
        assert between(text, where) == content
