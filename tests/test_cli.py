"""The command line, through typer's runner and as a process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clear_adapters import TextSampling, __version__, attach, list_degradations
from clear_adapters.cli import main
from clear_adapters.errors import ClearValueError

ROOT = Path(__file__).parents[1]
QUESTION = "What is it?"


def call(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(path)
    return path


def with_toy(toy):
    return ["--model", toy / "model", "--adapter", toy / "adapter", "--device", "cpu"]


# ---------------------------------------------------------------------------------------------------- as a process


def process(*arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "TERM": "dumb"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=100, check=False)


def test_help_is_fast_and_loads_no_heavy_library():
    began = time.perf_counter()
    done = process("-X", "importtime", "-m", "clear_adapters.cli", "--help")
    assert time.perf_counter() - began < 15  # a second where nothing else runs
    assert done.returncode == 0
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert not loaded & {"torch", "transformers", "numpy", "PIL", "cv2", "peft", "matplotlib"}
    for name in ("quickstart", "answer", "degrade", "backbones", "train", "data", "bench"):
        assert name in done.stdout


def test_an_error_is_one_line_and_exit_code_2():
    done = process("-m", "clear_adapters.cli", "degrade", "no such.png", "out.png")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: No image file at 'no such.png'")
    assert not done.stdout


# ---------------------------------------------------------------------------------------------------- small ones


def test_version_and_lists():
    assert call("--version").output.strip() == f"clear-adapters {__version__}"
    listed = call("degrade", "--list").output
    assert all(d.name in listed and d.description in listed for d in list_degradations())
    assert "BAGEL" in call("backbones").output


@pytest.mark.parametrize(
    "command",
    [
        *(["quickstart"], ["answer"], ["degrade"], ["data", "world"], ["data", "build"]),
        *(["train", name] for name in ("sft", "bridge", "grpo", "all", "plot")),
        *(["bench", name] for name in ("build", "run", "report")),
    ],
)
def test_every_command_has_help_with_an_example(command):
    text = " ".join(call(*command, "--help").output.split())
    assert f"clear-adapters {' '.join(command)}" in text


def test_degrade_writes_what_the_function_gives(photo, tmp_path):
    from clear_adapters import degrade

    target = tmp_path / "new" / "out.png"
    options = ["--name", "gaussian_noise", "--severity", "high", "--seed", 3, "--formulas", "fixed"]
    call("degrade", photo, target, *options)
    wanted = degrade(photo, "gaussian_noise", severity="high", seed=3, formulas="fixed")
    with Image.open(target) as made:
        assert np.array_equal(np.asarray(made), np.asarray(wanted))
    assert (
        "jpeg_compression at 0.5"
        in call("degrade", photo, target, "--name", "jpeg_compression", "--severity", 0.5).output
    )


def test_degrade_leaves_its_input(photo):
    before = photo.read_bytes()
    refused = call("degrade", photo, photo, code=2)
    assert "is the input" in " ".join(refused.output.split())
    assert photo.read_bytes() == before
    missing = call("degrade", photo.with_name("none.png"), photo, code=2)
    assert "No image file" in missing.output


# ---------------------------------------------------------------------------------------------------- answers


def test_answer_prints_the_reply_of_the_library(toy, photo):
    attached = attach(str(toy / "model"), str(toy / "adapter"), device="cpu")
    reply = attached.answer(photo, QUESTION, seed=4)
    shown = json.loads(call("answer", photo, QUESTION, *with_toy(toy), "--seed", 4, "--json").stdout)
    assert shown["text"] == reply.text
    assert shown["transcript"] == reply.to_json()["transcript"]
    assert call("answer", photo, QUESTION, *with_toy(toy), "--seed", 4).stdout == f"{reply.text}\n"
    streamed = call("answer", photo, QUESTION, *with_toy(toy), "--seed", 4, "--stream").stdout
    assert streamed == f"{reply.transcript.reply}\n"


def test_answer_restores_and_saves_the_picture(toy, photo, tmp_path):
    target = tmp_path / "restored.png"
    options = [*with_toy(toy), "--restore", "always", "--save-restored", target]
    shown = json.loads(call("answer", photo, QUESTION, *options, "--json").stdout)
    assert shown["restored"]
    first = target.read_bytes()
    with Image.open(target) as restored:
        assert restored.size == (64, 48)
    target.unlink()
    assert "restoring 2/2" in call("answer", photo, QUESTION, *options, "--stream").stderr
    assert target.read_bytes() == first
    target.unlink()
    never = [*with_toy(toy), "--restore", "never", "--save-restored", target]
    assert "nothing was restored" in call("answer", photo, QUESTION, *never).stderr
    assert not target.exists()


def test_answer_without_an_adapter_is_the_plain_model(toy, photo):
    attached = attach(str(toy / "model"), lora=False, bridge=False, device="cpu")
    with attached.disabled():
        reply = attached.answer(photo, QUESTION, text=TextSampling(max_new_tokens=5))
    given = ["answer", photo, QUESTION, "--model", toy / "model", "--device", "cpu", "--max-new-tokens", 5]
    told = call(*given, "--json")
    assert json.loads(told.stdout)["text"] == reply.text
    assert "plain model" in told.stderr
    assert not call(*given, "--adapter", "none").stderr
    refused = call(*given, "--adapter", "none", "--restore", "always", code=2)
    assert "needs an adapter" in refused.stderr


def _pictures():
    values = np.random.default_rng(1).integers(0, 255, (40, 60, 4), dtype=np.uint8)
    rgb = Image.fromarray(values[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "grey.png": (Image.fromarray(values[..., 0]), {}),
        "alpha.png": (Image.fromarray(values), {}),
        "alpha.webp": (Image.fromarray(values), {}),
        "palette.png": (rgb.quantize(16), {}),
        "deep.png": (Image.fromarray(values[..., 0].astype(np.uint16) * 257), {}),
        "turned.jpg": (rgb, {"exif": exif}),
        "photo.webp": (rgb, {}),
        "large.jpg": (rgb.resize((1500, 900)), {}),
        "pixel.png": (rgb.crop((0, 0, 1, 1)), {}),
    }


@pytest.mark.parametrize("name", list(_pictures()))
def test_answer_takes_any_picture(toy, tmp_path, name):
    image, options = _pictures()[name]
    image.save(tmp_path / name, **options)
    shown = json.loads(call("answer", tmp_path / name, QUESTION, *with_toy(toy), "--json").stdout)
    assert set(shown) >= {"text", "thoughts", "restored", "transcript", "timings"}


# ---------------------------------------------------------------------------------------------------- bad input


def bad_inputs(toy, photo, folder):
    text = folder / "text.png"
    text.write_text("no picture")
    latin = folder / "latin.yaml"
    latin.write_bytes("stage: \xe9".encode("latin-1"))
    group = "lora.groups.understanding"
    given = with_toy(toy)
    return {
        "model": (
            ["answer", photo, QUESTION, "--model", "builtin:bagle-tiny", "--adapter", "none"],
            "Unknown built-in model",
        ),
        "adapter": (
            ["answer", photo, QUESTION, "--model", toy / "model", "--adapter", "builtin:clear-bagel-tinny"],
            "adapter",
        ),
        "folder": (
            ["answer", photo, QUESTION, "--model", "no/where/at all", "--adapter", "none"],
            "is no folder",
        ),
        "degradation": (
            ["degrade", photo, folder / "o.png", "--name", "lens_blurr"],
            "Did you mean 'lens_blur'",
        ),
        "severity": (["degrade", photo, folder / "o.png", "--severity", "hihg"], "'high'"),
        "ending": (["degrade", photo, folder / "o.xyz"], ".png"),
        "missing": (["answer", folder / "none.png", QUESTION, *given], "No image file"),
        "no image": (["answer", text, QUESTION, *given], "No image in"),
        "empty": (["answer", photo, " ", *given], "The question is blank"),
        "both": (["answer", photo, QUESTION, *given, "--json", "--stream"], "choose one"),
        "recipe": (["train", "sft", "--recipe", "tny", "--data", folder, "--output", folder / "a"], "'tiny'"),
        "stranger": (
            ["train", "sft", "--recipe", "paper", "--data", folder, "--output", folder / "a"],
            "'paper' is not for the built-in builtin:bagel-tiny",
        ),
        "strangers": (
            ["train", "all", "--recipe", "janus", "--data", folder, "--output", folder / "a"],
            "'janus' is not for the built-in builtin:bagel-tiny",
        ),
        "before": (["train", "grpo", "--data", folder, "--output", folder / "a"], "pass its folder"),
        "stage": (
            ["train", "all", "--data", folder, "--output", folder / "a", "--set", "gpro:steps=1"],
            "'grpo'",
        ),
        "log": (["train", "plot", folder / "log.jsonl"], "is no file"),
        "split": (["data", "world", "--output", folder / "d", "--split", "trian", "--examples", 3], "train"),
        "sheet": (["quickstart", "--output", folder / "sheet.doc"], "ending"),
        "restored": (["answer", photo, QUESTION, *given, "--save-restored", folder / "o.xyz"], "ending"),
        "device": (["answer", photo, QUESTION, *given[:-1], "gpu"], "device='gpu'"),
        "encoding": (
            ["train", "sft", "--recipe", latin, "--data", folder, "--output", folder / "a"],
            "UTF-8",
        ),
        "rank": (
            ["train", "sft", "--data", folder, "--output", folder / "a", "--set", f"{group}={10**9}"],
            "rank",
        ),
        "schedule": (
            ["train", "sft", "--data", folder, "--output", folder / "a", "--set", "schedule=cosin"],
            "'cosine'",
        ),
    }


BAD = (
    *(
        "model",
        "adapter",
        "folder",
        "degradation",
        "severity",
        "ending",
        "missing",
        "no image",
        "empty",
        "both",
    ),
    *("recipe", "split", "sheet", "restored", "device", "encoding", "rank", "schedule"),
    *("before", "stage", "log", "stranger", "strangers"),
)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(toy, photo, tmp_path, case):
    arguments, words = bad_inputs(toy, photo, tmp_path)[case]
    before = sorted(p.name for p in tmp_path.iterdir())
    result = call(*arguments, code=2)
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "question", "more"),
    [
        ("nothing.png", QUESTION, ()),
        ("photo.png", "", ()),
        ("photo.png", QUESTION, ("--save-restored", "out.xyz")),
    ],
)
def test_what_needs_no_model_is_checked_before_one_is_loaded(photo, monkeypatch, name, question, more):
    monkeypatch.setattr("clear_adapters.cli._attach", lambda *_: pytest.fail("a model was loaded"))
    call("answer", photo.with_name(name), question, *more, code=2)


def test_debug_lets_the_error_through(photo, tmp_path):
    result = CliRunner().invoke(main, ["--debug", "degrade", str(photo), str(tmp_path / "o.xyz")])
    assert isinstance(result.exception, ClearValueError)


def test_names_of_the_library_reach_training_and_data(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(
        "clear_adapters.datasets.world.build", lambda *a, **k: seen.update(data=(a, k)) or a[0]
    )
    monkeypatch.setattr("clear_adapters.training.run.train", lambda *a, **k: seen.update(sft=(a, k)) or a[2])
    monkeypatch.setattr("clear_adapters.training.run.summary", str)
    made = ["--examples", 12, "--seed", 2, "--split", "heldout", "--questions-per-scene", 2, "--workers", 3]
    looks = ["--formulas", "fixed", "--weights", "benchmark", "--psnr-side", 64]
    call("data", "world", "--output", tmp_path / "d", *made, *looks)
    trained = ["--set", "steps=3", "--seed", 7, "--no-resume", "--device", "cpu", "--model", "owner/name"]
    images = ["--clean-image-dir", tmp_path / "c", "--corrupted-image-dir", tmp_path / "b"]
    call("train", "sft", "--data", tmp_path / "d", "--output", tmp_path / "a", *trained, *images)
    assert seen["data"] == (
        (tmp_path / "d", 12),
        {
            "seed": 2,
            "split": "heldout",
            "workers": 3,
            "questions_per_scene": 2,
            "formulas": "fixed",
            "weights": "benchmark",
            "psnr_side": 64,
        },
    )
    assert seen["sft"] == (
        ("tiny", tmp_path / "d", tmp_path / "a"),
        {
            "model": "owner/name",
            "resume": False,
            "device": "cpu",
            "overrides": ["steps=3", "loop.seed=7"],
            "clean_image_dir": tmp_path / "c",
            "corrupted_image_dir": tmp_path / "b",
            "stage": "sft",
        },
    )


def test_a_run_that_is_interrupted_says_how_to_go_on(monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("clear_adapters.training.run.train", interrupted)
    stopped = call("train", "sft", "--data", tmp_path / "d", "--output", tmp_path / "a", code=130)
    assert "goes on from the last checkpoint" in stopped.output
