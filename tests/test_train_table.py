"""The script that trains every adapter of the table: order, commands, and what a failed run takes with it."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "degraded_world"
sys.path.insert(0, str(FOLDER))

import evaluate  # noqa: E402
import train_table  # noqa: E402
from systems import SYSTEMS  # noqa: E402
from train_table import Job  # noqa: E402

from clear_adapters.errors import ClearValueError  # noqa: E402
from clear_adapters.results import read_result  # noqa: E402
from clear_adapters.training.recipe import load_recipe  # noqa: E402


def arguments(tmp_path, *more):
    return ["--data", "a", "--rl-data", "b", "--output", str(tmp_path / "table"), *more]


def commands(tmp_path, capsys, *more):
    assert train_table.main(arguments(tmp_path, "--dry-run", *more)) == 0
    return [line.split(" train ")[1] for line in capsys.readouterr().out.splitlines()]


def test_every_family_is_trained_after_the_one_before(tmp_path, capsys):
    told = commands(tmp_path, capsys)
    names = [line.split("--output ")[1].split()[0].rpartition("/")[2] for line in told]
    assert len(names) == 5 * 3 + 6
    assert names.index("bridge1") > names.index("sft1")
    (bridge,) = [line for line in told if "/bridge1 " in line and line.startswith("bridge")]
    assert f"--adapter {tmp_path}/table/sft1" in bridge
    assert "--data a" in bridge
    (clear,) = [line for line in told if line.startswith("grpo") and "/clear2 " in line]
    assert f"--adapter {tmp_path}/table/bridge2" in clear
    assert "--data b" in clear
    assert "seed=2" in clear


def test_what_a_family_goes_on_from_is_trained_too(tmp_path, capsys):
    told = commands(tmp_path, capsys, "--families", "image0", "--seeds", "4", "--set", "loop.batch=2")
    assert [line.split()[0] for line in told] == ["sft", "bridge", "grpo"]
    assert all("loop.batch=2" in line and "seed=4" in line for line in told)


def test_the_overrides_are_values_of_the_recipe():
    for family in train_table.FAMILIES.values():
        load_recipe("tiny", family.overrides, stage=family.stage)


def test_direct_tuning_sees_as_many_samples_as_the_stages_together(tmp_path, capsys):
    def steps_of(*more):
        told = commands(tmp_path, capsys, "--seeds", "0", "--families", "direct", "clear", *more)
        (direct,) = [line for line in told if "/direct0 " in line]
        return load_recipe("tiny", [w for w in direct.split() if "=" in w]).loop.steps

    assert steps_of() == 4900  # 1.025 * (4,000 * 64 + 300 * 64 + 120 * 32 * 8) / 64
    assert steps_of("--set", "sft:loop.steps=1000", "--set", "grpo:loop.steps=20") == 1415


def test_a_failed_run_takes_what_needs_it_along_and_nothing_else(tmp_path, capsys):
    def job(name, needs, code):
        return Job(
            name,
            () if needs is None else (needs,),
            (sys.executable, "-c", f"print('{name}'); raise SystemExit({code})"),
        )

    jobs = [job("a", None, 0), job("b", "a", 3), job("c", "b", 0), job("d", "a", 0), job("e", "elsewhere", 0)]
    assert train_table.run(jobs, tmp_path, 2) == ["b", "c"]
    told = capsys.readouterr().out
    assert [name for name in "abcde" if f"  {name}: exit" in told] == ["a", "b", "d", "e"]
    assert (tmp_path / "d.log").read_text() == "d\n"


@pytest.mark.parametrize("more", [["--families", "clera"]])
def test_an_unknown_family_is_refused(tmp_path, capsys, more):
    assert train_table.main(arguments(tmp_path, *more)) == 2
    assert "clear" in capsys.readouterr().err


def test_runs_are_spread_over_gpus(tmp_path):
    tells = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(1)"
    jobs = [Job(name, (), (sys.executable, "-c", tells)) for name in "abcd"]
    assert train_table.run(jobs, tmp_path, 4, gpus=2) == []
    assert sorted((tmp_path / f"{name}.log").read_text().strip() for name in "abcd") == ["0", "0", "1", "1"]


def test_adapters_are_shipped_whole_or_not_at_all(tmp_path):
    table, builtin = tmp_path / "table", tmp_path / "builtin"
    for family in ("sft", "bridge"):
        (table / f"{family}4").mkdir(parents=True)
        (table / f"{family}4" / "clear_config.json").write_text(family)
    (builtin / "clear-bagel-tiny").mkdir(parents=True)
    (builtin / "clear-bagel-tiny" / "old").write_text("")
    with pytest.raises(ClearValueError, match="clear4"):
        train_table.ship(table, 4, builtin, "builtin:bagel-tiny")
    assert [p.name for p in builtin.rglob("*") if p.is_file()] == ["old"]
    (table / "clear4").mkdir()
    (table / "clear4" / "clear_config.json").write_text("clear")
    assert set(train_table.ship(table, 4, builtin, "builtin:bagel-tiny")) == {
        p.name for p in builtin.iterdir()
    }
    assert (builtin / "clear-bagel-tiny" / "clear_config.json").read_text() == "clear"
    assert not (builtin / "clear-bagel-tiny" / "old").exists()


def test_every_system_is_measured_once_when_its_adapter_is_there(tmp_path):
    args = train_table.parse(arguments(tmp_path, "--results", "r.json", "--measure=--limit 20"))
    jobs = train_table.plan(args)
    position = {job.name: i for i, job in enumerate(jobs)}
    assert all(position[need] < position[job.name] for job in jobs for need in job.needs)
    seen = []
    for job in (j for j in jobs if j.name.startswith("measure-")):
        own = evaluate.parse(list(job.command[2:]))
        cells = evaluate.plan(own)
        assert own.limit == 20
        assert {Path(c.adapter).name for c in cells if c.adapter} <= set(job.needs)
        seen += [c.key for c in cells]
    everything = {
        f"{s.name}/{c}/{run}"
        for s in SYSTEMS
        for c in s.conditions
        for run in range(3 if s.every_seed else 1)
    }
    assert sorted(seen) == sorted(everything)


@pytest.mark.long
def test_what_was_measured_is_merged_also_where_something_failed(tmp_path, monkeypatch, capfd):
    """The base is measured for real; the adapter that should be there is not."""
    results = tmp_path / "r.json"
    more = [
        "--families",
        "direct",
        "--seeds",
        "0",
        "--results",
        str(results),
        "--measure=--limit 2 --device cpu",
    ]
    assert train_table.main(arguments(tmp_path, *more)) == 1
    told = capfd.readouterr()
    assert "direct0 failed" in told.err
    assert {k.split("/")[0] for k in read_result(results).payload["cells"]} == {"base", "base-warned"}
