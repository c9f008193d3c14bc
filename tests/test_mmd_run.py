"""The runner: answers line by line, kills, baselines by name, judges, both protocols, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

from clear_adapters import attach
from clear_adapters.datasets.tsv import TsvError
from clear_adapters.endpoint import EndpointError
from clear_adapters.errors import ClearValueError, UnknownNameError
from clear_adapters.mmd_bench import job, sets, systems
from clear_adapters.mmd_bench import run as runner
from clear_adapters.mmd_bench.answers import AnswerFile
from clear_adapters.mmd_bench.build import build, find_inputs
from clear_adapters.mmd_bench.command import run_command
from clear_adapters.mmd_bench.judge import MissingMarksError
from clear_adapters.mmd_bench.systems import SYSTEMS, get_system
from clear_adapters.mmd_bench.tasks import CORRUPTIONS, get_task
from clear_adapters.results import read_result
from clear_adapters.store import adapter_digest
from tests.bench_files import base_folder, choice, mmbench, picture, write
from tests.chat_server import Reply, serve

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Base files and the sets built from them."""
    from clear_adapters.datasets.hub import Source

    folder = tmp_path_factory.mktemp("data")
    base_folder(folder / "base")
    tasks = [get_task(n) for n in ("mmbench", "mmvp", "mmstar", "mmvet")]
    inputs, _ = find_inputs([Source(folder / "base")], tasks)
    build(inputs, folder / "sets", conditions=["high", "low"], workers=1, seed=5, progress=False)
    star = [i for i in inputs if i.task.name == "mmstar"]
    build(star, folder / "types", conditions=CORRUPTIONS, workers=1, seed=5, progress=False)
    return [str(folder / name) for name in ("base", "sets", "types")]


def start(toy, data, output, **changes):
    settings = {
        "model": str(toy / "model"),
        "adapter": str(toy / "adapter"),
        "data": data,
        "tasks": ["mmstar"],
        "severities": ["clean", "high"],
        "protocols": ["mixed"],
        "systems": None,
        "limit": None,
        "batch_size": 4,
        "seed": 0,
        "max_new_tokens": 4,
        "steps": None,
        "skip_bad": False,
        "skip_missing": False,
        "judge": None,
        "device": "cpu",
        "dtype": None,
        "revision": None,
        "report": lambda text: None,
    }
    return run_command(output, **settings | changes)


def timeless(payload):
    """A payload without what a clock gave."""
    if isinstance(payload, dict):
        return {k: timeless(v) for k, v in payload.items() if k != "seconds_per_question"}
    return payload


def test_a_run_writes_a_line_a_question_and_a_result(toy, data, tmp_path):
    result = start(toy, data, tmp_path / "r", tasks=["mmbench", "mmvp", "mmstar", "rbench"])
    assert read_result(tmp_path / "r" / "result.json") == result
    p = result.payload
    assert set(p["protocols"]["mixed"]) == {"base", "clear"}
    entry = p["protocols"]["mixed"]["clear"]["high"]["mmbench"]
    assert {
        "value",
        "low",
        "high",
        "n",
        "restored",
        "seconds_per_question",
        "unreadable",
        "seed",
        "set_seed",
    } <= set(entry)
    assert (entry["n"], entry["seed"], entry["set_seed"]) == (3, 0, 5)
    assert p["protocols"]["mixed"]["base"]["high"]["mmbench"]["restored"] is None
    assert p["cells"]["mmbench/high/clear"]["rows"] == 12
    assert p["protocols"]["mixed"]["clear"]["high"]["mean"]["tasks"] == ["mmbench", "mmvp", "mmstar"]
    assert p["protocols"]["mixed"]["clear"]["high"]["mean_with_real"]["n"] == 3 + 6 + 9 + 5
    assert p["protocols"]["mixed"]["clear"]["real"]["rbench"]["n"] == 5
    assert p["sets"]["mmstar/high"]["set_seed"] == 5
    assert p["sets"]["mmstar/clean"]["set_seed"] is None
    lines = (tmp_path / "r" / "answers" / "mmstar" / "high" / "clear.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["index"] for r in records] == [str(i) for i in range(9)]
    assert {"answer", "read", "value", "truth", "restored", "answered", "seconds", "line"} <= set(records[0])
    assert str(toy) not in json.dumps(p)  # names, not paths


def test_a_run_that_was_interrupted_ends_with_the_same_result(toy, data, tmp_path, monkeypatch):
    whole = start(toy, data, tmp_path / "whole")
    ask, calls = systems.ask, []

    def failing(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return ask(*arguments, **settings)

    monkeypatch.setattr(job, "ask", failing)
    with pytest.raises(KeyboardInterrupt):
        start(toy, data, tmp_path / "r")
    path = tmp_path / "r" / "answers" / "mmstar" / "clean" / "clear.jsonl"
    assert len(path.read_text().splitlines()) == 4
    with path.open("a") as opened:  # a batch of which two lines and a half were written
        first = path.read_text().splitlines()[0]
        opened.write(f"{first}\n{first}\n{first[:40]}")
    again = start(toy, data, tmp_path / "r")
    assert (
        len(calls) == 5 + 2 + 6
    )  # the cut batch and the last one of the cell, then two cells of three batches
    assert timeless(again.payload) == timeless(whole.payload)
    assert start(toy, data, tmp_path / "r").payload == again.payload
    assert len(calls) == 13


def test_a_run_goes_on_where_a_note_was_laid_beside_the_adapter(toy, data, tmp_path):
    shutil.copytree(toy / "adapter", tmp_path / "adapter")
    first = start(toy, data, tmp_path / "r", adapter=str(tmp_path / "adapter"), limit=2)
    (tmp_path / "adapter" / "notes.json").write_text("{}")
    again = start(toy, data, tmp_path / "r", adapter=str(tmp_path / "adapter"), limit=2)
    assert again.payload["adapter"]["digest"] == adapter_digest(toy / "adapter")
    assert timeless(again.payload) == timeless(first.payload)


def test_who_watches_is_told_and_can_end_the_run_which_goes_on_where_it_was(toy, data, tmp_path):
    whole = start(toy, data, tmp_path / "whole")
    told = []

    def watch(what, done, total):
        told.append((done, total))
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(toy, data, tmp_path / "r", watch=watch)
    model = attach(str(toy / "model"), str(toy / "adapter"), device="cpu")
    result = start(toy, data, tmp_path / "r", watch=watch, load=lambda: model, progress=False)
    total = told[0][1]
    assert [t for _, t in told] == [total] * len(told)
    done = [d for d, _ in told]
    assert done == sorted(set(done))
    assert done[-1] == total == sum(c["rows"] for c in whole.payload["cells"].values())
    assert timeless(result.payload["cells"]) == timeless(whole.payload["cells"])


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_result(toy, data, tmp_path):
    whole = start(toy, data, tmp_path / "whole", batch_size=1, max_new_tokens=None)
    command = [sys.executable, "-m", "clear_adapters.cli", "bench", "run", "--output", str(tmp_path / "r")]
    command += ["--model", str(toy / "model"), "--adapter", str(toy / "adapter"), "--device", "cpu"]
    command += [a for d in data for a in ("--data", d)] + ["--tasks", "mmstar", "--batch-size", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    path = tmp_path / "r" / "answers" / "mmstar" / "clean" / "clear.jsonl"
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not (path.is_file() and path.read_text()):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert path.is_file()
    assert not (tmp_path / "r" / "result.json").exists()
    again = start(toy, data, tmp_path / "r", batch_size=1, max_new_tokens=None)
    assert timeless(again.payload) == timeless(whole.payload)


def test_a_model_is_loaded_only_where_something_is_left_to_ask(toy, data, tmp_path, monkeypatch):
    start(toy, data, tmp_path / "r")
    monkeypatch.setattr("clear_adapters.adapter.attach", lambda *a, **k: pytest.fail("a model was loaded"))
    start(toy, data, tmp_path / "r")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 3}, "holds a run with batch_size = 4, not 3"),
        ({"seed": 1}, "holds a run with seed = 0, not 1"),
        ({"dtype": "bfloat16"}, "holds a run with dtype = 'float32', not 'bfloat16'.*choose another folder"),
        ({"adapter": "none"}, "holds a run with adapter"),
    ],
)
def test_another_run_is_not_mixed_in(toy, data, tmp_path, changes, words):
    start(toy, data, tmp_path / "r", severities=["high"])
    before = (tmp_path / "r" / "result.json").read_bytes()
    with pytest.raises(ClearValueError, match=words):
        start(toy, data, tmp_path / "r", **{"severities": ["high"]} | changes)
    assert (tmp_path / "r" / "result.json").read_bytes() == before
    start(toy, data, tmp_path / "r", severities=["clean", "high"])  # but further sets may follow


def test_another_kind_of_device_is_not_mixed_in(tmp_path):
    settings = job.Settings(model={"digest": "0"}, adapter=None, device_kind="cuda")
    runner.claim(tmp_path / "r", settings, [])
    with pytest.raises(ClearValueError, match="a run with device_kind = 'cuda', not 'cpu'"):
        runner.claim(tmp_path / "r", replace(settings, device_kind="cpu"), [])


def test_the_commit_of_a_repository_is_recorded(toy, data, tmp_path, monkeypatch):
    locate = sets.locate
    monkeypatch.setattr(sets, "locate", lambda *a: replace(locate(*a), revisions={"owner/name": "c0ffee"}))
    result = start(toy, data, tmp_path / "r", systems=["base"], severities=["clean"], limit=1)
    assert result.payload["revisions"] == {"owner/name": "c0ffee"}


@pytest.mark.parametrize(
    ("text", "words"), [("", r"run\.json is damaged"), ("[]", "not that of a benchmark run")]
)
def test_a_damaged_run_file_is_named(toy, data, tmp_path, text, words):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text(text)
    with pytest.raises(ClearValueError, match=f"{words}.*choose another folder"):
        start(toy, data, tmp_path / "r")


def test_two_processes_do_not_write_into_one_folder(toy, data, tmp_path):
    (tmp_path / "r").mkdir()
    with (
        FileLock(tmp_path / "r" / "run.lock"),
        pytest.raises(ClearValueError, match="another process is at work"),
    ):
        start(toy, data, tmp_path / "r", limit=1)
    assert not (tmp_path / "r" / "answers").exists()
    start(toy, data, tmp_path / "r", systems=["base"], limit=1)


def test_answers_to_another_set_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    answers = AnswerFile(path, ["1", "2", "3"], 2)
    answers.append([{"index": "1", "answer": "x\u2028y"}, {"index": "2"}])
    answers.append([{"index": "3"}])
    assert [r["index"] for r in AnswerFile(path, ["1", "2", "3"], 2).records] == ["1", "2", "3"]
    assert AnswerFile(path, ["1", "2", "3"], 2).records[0]["answer"] == "x\u2028y"
    with pytest.raises(ClearValueError, match="line 2: answers question '2' where '7' is asked"):
        AnswerFile(path, ["1", "7", "3"], 2)
    with pytest.raises(ClearValueError, match="3 answers to 2 questions"):
        AnswerFile(path, ["1", "2"], 2)


# ---------------------------------------------------------------------------------------------------- systems


def seen_by(monkeypatch, toy, data, output, names, **changes):
    """What reaches the engine under each system: arguments of `Engine.answer`, and whether the adapter is in."""
    from clear_adapters.engine import Engine

    seen = []
    answer = Engine.answer

    def noting(self, images, questions, **settings):
        seen.append({"images": images, "protocol": self.protocol, "off": self.plain, **settings})
        return answer(self, images, questions, **settings)

    monkeypatch.setattr(Engine, "answer", noting)
    result = start(toy, data, output, systems=names, limit=4, **changes)
    return seen, result


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.tobytes() == b.tobytes()


def test_every_baseline_asks_as_its_name_says(toy, data, tmp_path, monkeypatch):
    names = [s.name for s in SYSTEMS if s.name != "ceiling"]
    seen, result = seen_by(monkeypatch, toy, data, tmp_path / "r", names, severities=["high"])
    by_name = dict(zip(names, seen, strict=True))
    base = by_name["base"]
    assert base["plain"]
    assert base["off"]
    assert "degraded" in by_name["warned"]["protocol"].ask_plainly("?")
    assert by_name["base"]["protocol"].ask_plainly("?") == "?"
    assert not same(by_name["classical"]["images"][0], base["images"][0])
    for name in ("clear", "never", "always", "swap", "clean-latent"):
        assert not by_name[name]["plain"]
        assert not by_name[name]["off"]
        assert same(by_name[name]["images"][0], base["images"][0])
    assert [by_name[n]["restore"] for n in ("clear", "never", "always")] == ["auto", "never", "always"]
    assert by_name["swap"]["latent_from"] == "degraded"
    assert by_name["clean-latent"]["latent_from"] == "clean"
    clean = by_name["clean-latent"]["clean_images"]
    assert len(clean) == 4
    assert not same(clean[0], base["images"][0])
    cells = result.payload["cells"]
    assert cells["mmstar/high/always"]["restored"] == 1
    assert cells["mmstar/high/never"]["restored"] == 0
    assert cells["mmstar/high/warned"]["restored"] is None


def test_the_ceiling_is_the_base_on_clean_pictures(toy, data, tmp_path, monkeypatch):
    seen, result = seen_by(monkeypatch, toy, data, tmp_path / "r", ["base", "ceiling"], severities=["high"])
    assert len(seen) == 2  # base on high and on clean: the ceiling asks nothing of its own
    cells = result.payload["cells"]
    assert cells["mmstar/clean/ceiling"]["answers"] == cells["mmstar/clean/base"]["answers"]


def test_rotations_come_with_one_picture(toy, data, tmp_path, monkeypatch):
    seen, _ = seen_by(
        monkeypatch, toy, data, tmp_path / "r", ["base"], tasks=["mmbench"], severities=["high"]
    )
    pictures = [image.tobytes() for s in seen for image in s["images"]]
    assert (len(set(pictures)), len(pictures)) == (3, 12)  # rotations of a question come with one picture
    assert [seed for s in seen for seed in s["seed"]] == list(range(12))  # whatever the batches


def test_systems_need_what_they_need(toy, data, tmp_path):
    with pytest.raises(ClearValueError, match="'swap' needs an adapter"):
        start(toy, data, tmp_path / "r", adapter="none", systems=["swap"])
    with pytest.raises(UnknownNameError, match="swap"):
        get_system("swapp")
    with pytest.raises(ClearValueError, match=r"lacks MMStar\.tsv"):
        start(toy, data[1:], tmp_path / "r", systems=["clean-latent"], severities=["high"])
    result = start(
        toy, data, tmp_path / "r", tasks=["rbench", "mmstar"], systems=["clean-latent"], severities=["high"]
    )
    assert set(result.payload["cells"]) == {"mmstar/high/clean-latent"}  # R-Bench has no clean pictures


# ---------------------------------------------------------------------------------------------------- protocols


def test_macro16_is_the_mean_over_the_sixteen_types(toy, data, tmp_path):
    result = start(
        toy, data, tmp_path / "r", protocols=["macro16"], severities=["high"], systems=["base"], limit=5
    )
    p = result.payload
    assert set(p["protocols"]) == {"macro16"}
    entry = p["protocols"]["macro16"]["base"]["mmstar"]
    cells = [p["cells"][f"mmstar/{name}/base"] for name in CORRUPTIONS]
    assert entry["value"] == pytest.approx(
        sum(c["metrics"]["accuracy"]["value"] for c in cells) / 16, abs=1e-3
    )
    assert entry["n"] == 5
    assert entry["unreadable"] == sum(c["unreadable"] for c in cells)
    assert entry["low"] <= entry["value"] <= entry["high"]


def test_files_that_are_missing_are_named(toy, data, tmp_path):
    with pytest.raises(
        ClearValueError, match=r"lacks MMVP_lens_blur\.tsv, .*MMVP_watermark_damage\.tsv: build the sets"
    ):
        start(toy, data, tmp_path / "r", tasks=["mmvp"], protocols=["macro16"], severities=["high"])
    assert not (tmp_path / "r").exists()
    said = []
    result = start(
        toy, data, tmp_path / "r", tasks=["mmstar", "mmvp"], protocols=["mixed", "macro16"], severities=["high"],
        systems=["base"], skip_missing=True, limit=2, report=said.append,
    )  # fmt: skip
    assert "MMVP_lens_blur.tsv" in said[0]
    assert len(result.payload["missing"]) == 16
    assert list(result.payload["protocols"]["macro16"]["base"]) == ["mmstar", "mean"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"severities": ["worst"]}, "severity 'worst'"),
        ({"protocols": ["macro"]}, "protocol 'macro'"),
        ({"tasks": ["mmvet"]}, "MM-Vet is marked by a judge"),
        ({"limit": 0}, "limit=0"),
        ({"data": ["/no/such"]}, "neither a folder"),
    ],
)
def test_what_it_refuses(toy, data, tmp_path, changes, words):
    with pytest.raises(ClearValueError, match=words):
        start(
            toy,
            changes.get("data", data),
            tmp_path / "r",
            **{k: v for k, v in changes.items() if k != "data"},
        )
    assert not (tmp_path / "r" / "answers").exists()


def test_every_task_of_the_sources_is_taken_where_none_is_named(toy, data, tmp_path):
    result = start(
        toy,
        data[2:],
        tmp_path / "r",
        tasks=None,
        limit=1,
        systems=["base"],
        protocols=["macro16"],
        severities=["high"],
    )
    assert {c["task"] for c in result.payload["cells"].values()} == {"mmstar"}


def test_pictures_that_cannot_be_decoded_are_named_or_left_out(toy, tmp_path, monkeypatch):
    columns, rows = mmbench(3)
    rows[1][9] = picture(1)[:200]
    write(tmp_path / "in" / "MMBench_DEV_EN_V11.tsv", columns, rows)
    asked = {"tasks": ["mmbench"], "severities": ["clean"], "systems": ["base"]}
    with monkeypatch.context() as patched:
        patched.setattr("clear_adapters.adapter.attach", lambda *a, **k: pytest.fail("a model was loaded"))
        with pytest.raises(TsvError, match=r"line 4: the picture cannot be decoded: .*; --skip-bad leaves"):
            start(toy, [str(tmp_path / "in")], tmp_path / "r", **asked)
    said = []
    result = start(toy, [str(tmp_path / "in")], tmp_path / "r", skip_bad=True, report=said.append, **asked)
    facts = result.payload["sets"]["mmbench/clean"]
    assert (facts["units"], facts["rows"], facts["skipped"], facts["left_with_group"]) == (2, 8, 1, 3)
    assert "line 4" in said[0]


def test_a_clean_picture_that_cannot_be_decoded_is_named_or_left_out(toy, tmp_path):
    columns, rows = choice(4)
    write(tmp_path / "in" / "MMStar_LOW_LEVEL_HIGH.tsv", columns, rows)
    rows[1][9] = picture(1)[:200]
    write(tmp_path / "in" / "MMStar.tsv", columns, rows)
    asked = {"tasks": ["mmstar"], "severities": ["high"]}
    where = [str(tmp_path / "in")]
    with pytest.raises(TsvError, match=r"MMStar\.tsv, line 3: the picture cannot be decoded: .*; --skip-bad"):
        start(toy, where, tmp_path / "r", systems=["clean-latent"], **asked)
    said = []
    result = start(
        toy, where, tmp_path / "r", systems=["clean-latent"], skip_bad=True, report=said.append, **asked
    )
    assert result.payload["cells"]["mmstar/high/clean-latent"]["rows"] == 3
    assert said == [
        f"left out: {where[0]}/MMStar_LOW_LEVEL_HIGH.tsv, line 3: row '1' has no good counterpart in MMStar.tsv"
    ]
    with pytest.raises(
        ClearValueError, match=r"another set mmstar/high: .*--skip-bad.*choose another folder"
    ):
        start(toy, where, tmp_path / "r", systems=["base"], skip_bad=True, **asked)


# ---------------------------------------------------------------------------------------------------- judge


def settings_of(service, tmp_path):
    return {
        "base_url": service.url,
        "model": "m",
        "cache": str(tmp_path / "cache"),
        "retries": 0,
        "max_failures": 90,
    }


def test_a_judge_marks_free_answers_once(toy, data, tmp_path):
    def reply(body, number):
        asked = json.loads(body["messages"][1]["content"])
        return Reply("1.0" if "AND" in asked["truth"] else "0.44")

    with serve(reply) as service:
        judge = settings_of(service, tmp_path)
        changes = {"tasks": ["mmvet"], "severities": ["high"], "systems": ["base"], "judge": judge}
        result = start(toy, data, tmp_path / "r", **changes)
        asked = len(service.requests)
        again = start(toy, data, tmp_path / "r", **changes)
        assert len(service.requests) == asked <= 5
    cell = result.payload["cells"]["mmvet/high/base"]
    records = [json.loads(t) for t in (tmp_path / "r/answers/mmvet/high/base.jsonl").read_text().splitlines()]
    marks = [0.0 if r["read"] is None else 1.0 if "AND" in r["truth"] else 0.4 for r in records]
    assert cell["metrics"]["score"]["value"] == pytest.approx(100 * sum(marks) / 5)
    assert result.payload["judge"] == {"model": "m", "prompt": "1"}
    assert again.payload == result.payload
    assert service.url not in json.dumps(result.payload)


def test_a_mark_that_cannot_be_had_is_an_error_and_never_a_number(toy, data, tmp_path):
    def reply(body, number):
        return Reply("0.5") if number % 2 else Reply("no", status=400)

    with serve(reply) as service:
        changes = {
            "tasks": ["mmvet"],
            "severities": ["high"],
            "systems": ["base"],
            "judge": settings_of(service, tmp_path),
        }
        with pytest.raises(
            MissingMarksError, match=r"2 of \d answers to MM-Vet .* have no mark, so there is no score"
        ):
            start(toy, data, tmp_path / "r", **changes)
        assert not (tmp_path / "r" / "result.json").exists()
        first = len(service.requests)
        service.answer = lambda body, number: Reply("0.5")
        result = start(toy, data, tmp_path / "r", **changes)
        assert len(service.requests) == first + 2  # only those that failed
    assert result.payload["cells"]["mmvet/high/base"]["metrics"]["score"]["n"] == 5


@pytest.mark.parametrize("status", [400, 401])
def test_a_judge_that_fails_withholds_no_other_score(toy, data, tmp_path, status):
    with serve(lambda body, number: Reply("no", status=status)) as service:
        changes = {
            "tasks": ["mmvet", "mmstar"],
            "severities": ["clean", "high"],
            "systems": ["base"],
            "judge": settings_of(service, tmp_path),
        }
        with pytest.raises(EndpointError, match=r"result\.json holds the other sets"):
            start(toy, data, tmp_path / "r", **changes)
        payload = read_result(tmp_path / "r" / "result.json").payload
        assert set(payload["cells"]) == {"mmstar/clean/base", "mmstar/high/base"}
        assert payload["without_marks"] == ["mmvet/clean/base", "mmvet/high/base"]
        service.answer = lambda body, number: Reply("0.5")
        again = start(toy, data, tmp_path / "r", **changes)
    assert again.payload["without_marks"] == []
    assert "mmvet/high/base" in again.payload["cells"]
