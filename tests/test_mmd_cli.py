"""`clear-adapters bench` from end to end, and the built-in set."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clear_adapters.cli import main
from clear_adapters.mmd_bench import miniature
from clear_adapters.mmd_bench.questions import picture_bytes, read_questions
from clear_adapters.mmd_bench.tasks import get_task
from clear_adapters.results import read_result
from clear_adapters.store import adapter_digest, resolve
from clear_adapters.world import KINDS
from tests.bench_files import base_folder, choice, picture, write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "miniature"))

import measure  # noqa: E402

COMMITTED = ROOT / "benchmarks" / "results" / "miniature.json"


def call(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def test_build_run_report(toy, tmp_path):
    base_folder(tmp_path / "base", ["mmstar", "rbench"])
    built = call("bench", "build", "--input", tmp_path / "base", "--output", tmp_path / "sets", "--severity", "high",
                 "--no-per-corruption", "--workers", 1)  # fmt: skip
    assert "mmstar: 9 rows, 9 pictures" in built.output
    asked = [
        "--data",
        tmp_path / "base",
        "--data",
        tmp_path / "sets",
        "--model",
        toy / "model",
        "--adapter",
        toy / "adapter",
    ]
    ran = call("bench", "run", "--output", tmp_path / "r", *asked, "--device", "cpu", "--max-new-tokens", 4)
    assert "R-Bench-Dis, mixed, real" in ran.output
    assert "MMStar, mixed, high" in ran.output
    written = call("bench", "report", tmp_path / "r", "--output", tmp_path / "report", "--published").output
    assert "accuracy.svg" in written
    assert "CLEAR-RL, published" in (tmp_path / "report" / "report.md").read_text()


def test_the_built_in_set_needs_no_data(toy, tmp_path):
    asked = ["--model", toy / "model", "--adapter", toy / "adapter", "--device", "cpu", "--max-new-tokens", 4]
    ran = call(
        "bench",
        "run",
        "--output",
        tmp_path / "r",
        *asked,
        "--limit",
        7,
        "--systems",
        "base",
        "--severity",
        "high",
    )
    assert "Miniature, mixed, high" in ran.output
    p = read_result(tmp_path / "r" / "result.json").payload
    assert p["cells"]["miniature/high/base"]["rows"] == 7
    assert p["sets"]["miniature/high"]["set_seed"] == 0
    assert {f.name for f in (tmp_path / "r" / "sets").rglob("*.tsv")} == {
        "Miniature.tsv",
        "Miniature_LOW_LEVEL_HIGH.tsv",
    }


def test_the_built_in_set_can_be_built_for_later(toy, tmp_path):
    asked = [
        "--input",
        "builtin:miniature",
        "--output",
        tmp_path / "sets",
        "--questions",
        4,
        "--severity",
        "low",
    ]
    call("bench", "build", *asked, "--no-per-corruption", "--workers", 1)
    asked = ["--model", toy / "model", "--adapter", "none", "--device", "cpu", "--max-new-tokens", 4]
    call(
        "bench",
        "run",
        "--output",
        tmp_path / "r",
        "--data",
        tmp_path / "sets",
        *asked,
        "--severity",
        "clean,low",
    )
    cells = read_result(tmp_path / "r" / "result.json").payload["cells"]
    assert {name: c["rows"] for name, c in cells.items()} == {
        "miniature/clean/base": 4,
        "miniature/low/base": 4,
    }


def test_the_built_in_set_is_seeded_and_a_beginning_of_a_larger_one(tmp_path):
    small, large, other = (
        miniature.write_clean(tmp_path / name, n, seed)
        for name, n, seed in (("a", 6, 0), ("b", 12, 0), ("c", 6, 1))
    )
    assert large.read_text().startswith(small.read_text())
    assert small.read_bytes() != other.read_bytes()
    read = read_questions(large, get_task("miniature"))
    assert [q.category for q in read.questions] == list(KINDS) * 2
    items = [miniature.draw_item(0, i)[0] for i in range(12)]
    assert [(q.text, q.truth, tuple(q.options.values())) for q in read.questions] == [
        (i.text, i.truth, i.options) for i in items
    ]
    assert read.image(read.questions[0]).size == (miniature.SIDE, miniature.SIDE)
    assert picture_bytes(read.file, read.questions[0].picture)[:3] == b"\xff\xd8\xff"  # JPEG, as all others


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda rows: rows[1].__setitem__(9, picture(1)[:200]),
            "MMStar.tsv, line 3: the picture cannot be decoded",
        ),
        (lambda rows: rows[1].__setitem__(7, ""), "MMStar.tsv, line 3: the answer is empty"),
        (lambda rows: rows[1].__setitem__(0, "0"), "MMStar.tsv, line 3: index '0' stands in line 2 already"),
        (lambda rows: rows[1].__setitem__(9, "88"), "MMStar.tsv, line 3: points at the picture of row '88'"),
    ],
)
def test_a_bad_row_is_one_line_and_can_be_skipped(tmp_path, spoil, words):
    columns, rows = choice(4)
    spoil(rows)
    write(tmp_path / "in" / "MMStar.tsv", columns, rows)
    asked = ["bench", "build", "--input", tmp_path / "in", "--output", tmp_path / "out", "--severity", "low",
             "--no-per-corruption", "--workers", 1]  # fmt: skip
    refused = call(*asked, code=2)
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    assert words in refused.stderr
    done = call(*asked, "--skip-bad")
    assert "mmstar: 3 rows, 3 pictures, 1 bad rows left out" in done.output
    assert (
        json.loads((tmp_path / "out" / "manifest.json").read_text())["tasks"]["mmstar"]["skipped"][0]["line"]
        == 3
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--tasks", "mmstarr"], "Did you mean 'mmstar'"),
        (["run", "--systems", "bse"], "Did you mean 'base'"),
        (["run", "--severity", "worst"], "severity 'worst'"),
        (["run", "--protocol", "macro"], "protocol 'macro'"),
        (["run", "--judge-url", "http://127.0.0.1:1/v1"], "both --judge-url and --judge-model"),
        (["run", "--data", "no/such/folder"], "neither a folder"),
        (["run", "--adapter", "builtin:nothing", "--limit", "1"], "Unknown built-in adapter"),
        (["build", "--input", "."], "holds none of the files"),
        (["report", "no.json"], "cannot be read"),
    ],
)
def test_what_is_refused_is_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = call("bench", arguments[0], *arguments[1:], "--output", tmp_path / "o", code=2)
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert not (tmp_path / "o").exists()


def test_the_committed_answers_are_of_the_adapter_that_ships():
    adapter = read_result(COMMITTED).payload["adapter"]
    assert adapter["digest"] == adapter_digest(resolve(adapter["name"], "adapter"))


@pytest.mark.slow
def test_the_first_questions_give_the_committed_answers(tmp_path):
    """Built-in base and adapter on a CPU: `benchmarks/miniature/measure.py` writes the file anew when they change."""
    committed = read_result(COMMITTED)
    payload = measure.measure(tmp_path, questions=12)
    assert len(payload["answers"]) == 4
    for cell, answers in payload["answers"].items():
        assert answers == committed.payload["answers"][cell][:12], cell


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_miniature_subset_gives_the_committed_answers(tmp_path):
    committed = read_result(COMMITTED)
    payload = json.loads(json.dumps(measure.measure(tmp_path)))
    for cell, answers in committed.payload["answers"].items():
        assert payload["answers"][cell] == answers, cell
    assert measure.timeless(payload) == measure.timeless(committed.payload)
    assert {c["rows"] for c in payload["cells"].values()} == {measure.QUESTIONS}
    assert payload["cpu_seconds"] < 300  # of one core: what it takes where nothing else runs
