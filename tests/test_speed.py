"""The speed benchmarks run at tiny size, and their report shows what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "speed"))

import equality  # noqa: E402
import inference  # noqa: E402
import scaling  # noqa: E402
import shapes  # noqa: E402
import speed_report  # noqa: E402
import training  # noqa: E402
from readme import between  # noqa: E402

from clear_adapters.backbones.bagel import checkpoint  # noqa: E402
from clear_adapters.backbones.bagel.tiny import initialise, small_config, tokenizer  # noqa: E402
from clear_adapters.backbones.packed import TextPiece  # noqa: E402
from clear_adapters.results import ResultFile, read_result  # noqa: E402

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
    assert found.payload["command"].startswith("torchrun --nproc_per_node 2 scaling.py")
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
@pytest.mark.timeout(300)
def test_two_processes_are_compared_with_one(tmp_path):
    path = tmp_path / "equality.json"
    options = ["--device", "cpu", "--stages", "sft", "--ways", "resumed", "--output", str(path)]
    assert equality.main(options) == 0
    (row,) = read_result(path).payload["rows"]
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


def made(rows, kind="inference", **facts):
    payload = {"rows": rows, "failed": [], "quantization": None, **facts}
    return ResultFile.collect(kind, payload, device="Some GPU")


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
    }
    shown = speed_report.render([made(rows), made([step | {"peak_gb": 60.2}], "training")])
    assert "| text, batch 1 | 39 ms a token | 7 ms | 5 ms | **6.5 ms** | **6.0 ms** |" in shown
    assert "| text, batch 8 | 8 x 39 ms | 9 ms | 5 ms | 11.2 ms | – |" in shown
    assert "| 2.00 s, 9,000 tokens/s, 34% of the card's rate (50% with what is run twice), 60 GB |" in shown
    assert "Some GPU" in shown


def test_the_report_is_put_between_its_markers(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text("before\n{}\nstale words\n{}\nafter\n".format(*speed_report.MARKERS))
    monkeypatch.setattr(speed_report, "README", readme)
    path = made([{"part": "picture", "side": 512, "seconds": 2.0}]).write(tmp_path / "one.json")
    assert speed_report.main([str(path)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale words" not in text
    assert (tmp_path / speed_report.FIGURE).is_file()


def test_the_readme_shows_the_committed_results():
    files = sorted((ROOT / "benchmarks" / "results" / "speed").glob("*.json"))
    text = speed_report.README.read_text(encoding="utf-8")
    shown = between(text, speed_report.MARKERS)
    if not files:
        assert shown == "Not measured yet."
        return
    assert shown.startswith(speed_report.render([read_result(f) for f in files]))


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


def test_the_result_is_plain_json(tmp_path):
    path = tmp_path / "inference.json"
    inference.main([*TINY, "--only", "bridge", "--output", str(path), "--profile"])
    assert "Self CPU" in (tmp_path / "inference-bridge-profile.txt").read_text()
    content = json.loads(path.read_text())
    assert content["command"] == "inference.py --size tiny --only bridge"
    assert str(tmp_path) not in path.read_text()
