"""Intervals against known values, and result files: provenance, schema, atomic writing."""

import json
import subprocess
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest

from clear_adapters import __version__, results
from clear_adapters.errors import ClearTypeError, ClearValueError
from clear_adapters.results import (
    ResultFile,
    bootstrap_interval,
    git_state,
    installed_versions,
    mean_of_seeds_interval,
    proportion_interval,
    read_result,
)


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (20, 20, (0.8389, 1.0)),
        (0, 0, (0.0, 1.0)),
    ],
)
def test_proportion_interval_gives_published_values(successes, n, expected):
    assert proportion_interval(successes, n) == pytest.approx(expected, abs=5e-5)


def test_proportion_interval_ends_at_certainty_without_rounding():
    for n in range(1, 60):
        assert proportion_interval(0, n)[0] == 0.0
        assert proportion_interval(n, n)[1] == 1.0


def test_proportion_interval_widens_with_confidence():
    assert proportion_interval(5, 10, 0.99)[0] < proportion_interval(5, 10, 0.9)[0]


@pytest.mark.parametrize(
    "arguments", [(3, 2), (-1, 2), (1, 2, 95), (1, 2, 0), (1, 2, 1)], ids=lambda arguments: str(arguments)
)
def test_proportion_interval_refuses_nonsense(arguments):
    with pytest.raises(ClearValueError):
        proportion_interval(*arguments)


def test_bootstrap_interval_is_near_the_normal_one_and_repeats():
    values = np.random.default_rng(3).normal(5, 2, 400).tolist()
    low, high = bootstrap_interval(values)
    half = 1.96 * np.std(values) / 20
    # The quantiles of 2000 resamples are themselves good to a few per cent of the half width.
    assert low == pytest.approx(np.mean(values) - half, abs=0.1 * half)
    assert high == pytest.approx(np.mean(values) + half, abs=0.1 * half)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)


def test_bootstrap_interval_of_another_statistic():
    assert bootstrap_interval([1.0, 1.0, 1.0, 9.0, 9.0], statistic=np.max, samples=500) == (1.0, 9.0)


def test_seeds_interval_covers_questions_and_seeds():
    random = np.random.default_rng(0)
    questions = random.random(200)
    alike = np.stack([questions, questions, questions])
    apart = alike + np.array([[-0.3], [0.0], [0.3]])

    def width(values):
        low, high = mean_of_seeds_interval(values.tolist())
        assert low < values.mean() < high
        return high - low

    one = width(alike[:1])
    plain = bootstrap_interval(questions.tolist())
    assert one == pytest.approx(plain[1] - plain[0], rel=0.1)
    # Seeds that agree add no information about the questions; seeds that differ add doubt.
    assert width(alike) == pytest.approx(one, rel=0.1)
    assert width(apart) > 3 * one
    assert mean_of_seeds_interval(apart.tolist()) == mean_of_seeds_interval(apart.tolist())


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "shape"), ([[]], "shape"), ([[1, 2], [1]], r"\[1, 2\] values"), ([[1, float("nan")]], "1 missing")],
)
def test_seeds_interval_refuses_nonsense(values, message):
    with pytest.raises(ClearValueError, match=message):
        mean_of_seeds_interval(values)


@pytest.mark.parametrize("values", [[], [1.0, float("inf")], [1.0, None], ["x"], [[1.0]]])
def test_bootstrap_interval_refuses_nonsense(values):
    with pytest.raises(ClearValueError):
        bootstrap_interval(values)
    with pytest.raises(ClearValueError, match="not 0"):
        bootstrap_interval([1.0], samples=0)


@pytest.fixture
def result():
    return ResultFile.collect("speed", {"b": [1, None], "a": {"ä": 0.5}}, device="one CPU core", seeds=[0, 1])


def test_a_result_reads_back_equal(result, tmp_path):
    path = result.write(tmp_path / "new" / "speed.json")
    assert read_result(path) == result
    assert [file.name for file in path.parent.iterdir()] == ["speed.json"]
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    assert list(content) == sorted(content)
    assert list(content["payload"]) == ["a", "b"]
    assert "ä" in text
    assert text.endswith("}\n")


def test_provenance_is_collected(result, monkeypatch):
    assert result.project_version == __version__
    assert result.schema_version == 1
    assert result.date.endswith("+00:00")
    assert result.versions["torch"] == metadata.version("torch")
    assert set(result.versions) >= {"python", "transformers", "numpy"}
    assert "not-a-package" not in installed_versions(["not-a-package"])
    monkeypatch.setattr("sys.argv", ["/some/where/run.py", "--name", "a b"])
    assert ResultFile.collect("x", {}, device="").command == "run.py --name 'a b'"
    assert ResultFile.collect("x", {}, device="", command="by hand").command == "by hand"


def test_a_result_that_is_no_json_leaves_the_old_file(result, tmp_path):
    path = result.write(tmp_path / "speed.json")
    before = path.read_bytes()
    with pytest.raises(ClearValueError, match="None where there is no number"):
        replace(result, payload={"x": float("nan")}).write(path)
    with pytest.raises(ClearTypeError, match="plain numbers"):
        replace(result, payload={"x": np.zeros(2)}).write(path)
    assert path.read_bytes() == before


def test_an_interrupted_write_leaves_the_old_file(result, tmp_path, monkeypatch):
    path = result.write(tmp_path / "speed.json")
    before = path.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        replace(result, kind="other").write(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["speed.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema version 2; this library reads 1"),
        ({"schema_version": None}, "schema version none"),
        ({"kind": ...}, "lacks kind"),
        ({"seeds": ..., "device": ...}, "lacks device, seeds"),
        ({"sneeds": 1}, "unknown keys: sneeds"),
        ({"payload": [1]}, r"payload = \[1\], a list"),
        ({"seeds": 3}, "seeds = 3, a int"),
        ({"dirty": "no"}, "dirty = 'no'"),
    ],
)
def test_a_file_of_another_form_is_refused(result, tmp_path, change, message):
    path = result.write(tmp_path / "speed.json")
    content = json.loads(path.read_text(encoding="utf-8")) | change
    kept = {key: value for key, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(ClearValueError, match=message) as caught:
        read_result(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "no JSON"), ("[]", "holds a list"), (None, "cannot be read")]
)
def test_a_file_that_is_no_result_is_refused(tmp_path, text, message):
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ClearValueError, match=message):
        read_result(path)


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_git_state(tmp_path):
    assert git_state(tmp_path) == (None, None)
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == (None, None)
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == (commit, False)

    written = tmp_path / "benchmarks" / "results" / "a b.json"
    written.parent.mkdir(parents=True)
    written.write_text("{}")
    assert git_state(tmp_path) == (commit, False)

    (tmp_path / "other.py").write_text("")
    assert git_state(tmp_path) == (commit, True)
    (tmp_path / "other.py").unlink()
    (tmp_path / "code.py").write_text("x = 2\n")
    assert git_state(tmp_path) == (commit, True)

    # A package installed somewhere inside another project's checkout is not that project.
    assert git_state(tmp_path / "benchmarks") == (None, None)


def test_git_state_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results.git_state() == (None, None)
