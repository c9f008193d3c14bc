"""The set builder: names, contents, seeds, any number of processes, kills, bad rows, the Hub."""

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clear_adapters.datasets.hub import Source, locate
from clear_adapters.datasets.tsv import TsvError, TsvFile
from clear_adapters.degradations import SEVERITIES, degrade
from clear_adapters.errors import ClearError, ClearValueError, UnknownNameError
from clear_adapters.mmd_bench import build as builder
from clear_adapters.mmd_bench.build import build, find_inputs
from clear_adapters.mmd_bench.pictures import encode, plan_picture
from clear_adapters.mmd_bench.questions import picture_bytes, read_questions
from clear_adapters.mmd_bench.tasks import CORRUPTIONS, TASKS, get_task
from tests.bench_files import base_folder, choice, picture, write
from tests.local_hub import COMMIT, serve

ROOT = Path(__file__).parents[1]
QUICK = ("hsv_saturation", "block_exchange", "scan_lines", "sharpness_change", "graffiti", "motion_blur")
FEW = ("high", "low", "lens_blur")


def inputs(folder, *names):
    return find_inputs([Source(folder)], [get_task(n) for n in names] or list(TASKS))[0]


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def built(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "sets"
    return folder, build(inputs(base, "mmbench", "mmstar"), folder, workers=1, progress=False)


def test_files_are_named_and_filled_as_upstreams(built, base):
    folder, manifest = built
    names = {
        t.file_name(c) for t in map(get_task, ("mmbench", "mmstar")) for c in (*SEVERITIES, *CORRUPTIONS)
    }
    assert set(manifest["files"]) == names
    listed = {p.name for p in folder.glob("*.tsv")}
    assert listed == names
    original = TsvFile(base / "MMBench_DEV_EN_V11.tsv")
    made = TsvFile(folder / "MMBench_DEV_EN_V11_LOW_LEVEL_HIGH.tsv")
    assert made.columns == original.columns
    for old, new in zip(original.rows(), made.rows(), strict=True):
        same = {c: v for c, v in old.values.items() if c != "image"}
        assert same == {c: v for c, v in new.values.items() if c != "image"}
        if len(old.values["image"]) <= 64:
            assert new.values["image"] == old.values["image"]  # a rotation still points at its first row
        else:
            assert new.values["image"] != old.values["image"]


def test_pictures_are_those_of_the_manifest_and_of_degrade(built, base):
    folder, manifest = built
    task = get_task("mmstar")
    facts = [json.loads(line) for line in (folder / "MMStar.manifest.jsonl").read_text().splitlines()]
    assert len(facts) == manifest["tasks"]["mmstar"]["pictures"] == 9 * 19
    clean = read_questions(base / "MMStar.tsv", task)
    poor = {c: read_questions(folder / task.file_name(c), task) for c in (*SEVERITIES, *CORRUPTIONS)}
    for fact in facts[::7]:
        at = next(i for i, q in enumerate(clean.questions) if q.index == fact["index"])
        other = poor[fact["condition"]]
        found = picture_bytes(other.file, other.questions[at].picture)
        assert hashlib.sha256(found).hexdigest() == fact["sha256"]
        assert found[:3] == b"\xff\xd8\xff"  # JPEG, as upstream
        image = degrade(
            clean.image(clean.questions[at]),
            fact["corruption"],
            severity=fact["intensity"],
            seed=fact["seed"],
        )
        assert encode(np.asarray(image)) == found


def test_one_corruption_a_picture_and_its_own_parameters_a_level():
    from clear_adapters.mmd_bench.pictures import Recipe

    recipe = Recipe(3, ())
    plans = {c: plan_picture(recipe, "MMStar", "7", c) for c in SEVERITIES}
    assert len({name for name, _, _ in plans.values()}) == 1
    assert {c: i for c, (_, i, _) in plans.items()} == SEVERITIES
    assert len({seed for _, _, seed in plans.values()}) == 3
    assert plan_picture(recipe, "MMStar", "7", "dark_illumination")[:2] == ("dark_illumination", 0.9)
    names = [plan_picture(recipe, "MMStar", str(i), "high")[0] for i in range(800)]
    assert set(names) == set(CORRUPTIONS)
    assert 0.02 < names.count("lens_blur") / 800 < 0.08  # 20 of 400
    assert 0.055 < names.count("watermark_damage") / 800 < 0.115  # 34 of 400
    other = [plan_picture(Recipe(4, ()), "MMStar", str(i), "high")[0] for i in range(50)]
    assert other != names[:50]


def test_any_number_of_processes_gives_the_same_bytes(built, base, tmp_path):
    folder, _ = built
    build(inputs(base, "mmbench", "mmstar"), tmp_path / "two", workers=2, progress=False)
    assert contents(tmp_path / "two") == contents(folder)
    build(inputs(base, "mmstar"), tmp_path / "seed", seed=1, conditions=FEW, workers=1, progress=False)
    name = "MMStar_LOW_LEVEL_HIGH.tsv"
    assert (tmp_path / "seed" / name).read_bytes() != (folder / name).read_bytes()


def test_a_stopped_build_goes_on_and_ends_the_same(base, tmp_path, monkeypatch):
    given = inputs(base, "mmstar", "cvbench2d")
    build(given, tmp_path / "whole", conditions=FEW, workers=1, progress=False)
    make, calls = builder.make, []

    def failing(job):
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make(job)

    monkeypatch.setattr(builder, "make", failing)
    folder = tmp_path / "sets"
    with pytest.raises(KeyboardInterrupt):
        build(given, folder, conditions=FEW, workers=1, progress=False)
    assert not (folder / "manifest.json").exists()
    # What a kill in the middle of writing leaves behind.
    with (folder / "MMStar_lens_blur.tsv.part").open("ab") as opened:
        opened.write(b"half a row")
    with (folder / "MMStar.journal").open("a") as opened:
        opened.write('{"chunks": 3, "si')
    build(given, folder, conditions=FEW, workers=1, progress=False)
    assert len(calls) == 3 + 7 + 8  # two rows of the first file were kept
    assert contents(folder) == contents(tmp_path / "whole")
    build(given, folder, conditions=FEW, workers=1, progress=False)
    assert len(calls) == 18  # a finished one is left as it is


def stop_at(monkeypatch, call):
    """Lets the builder be interrupted at a call."""
    make, calls = builder.make, []

    def stopping(job):
        calls.append(job)
        if len(calls) == call:
            raise KeyboardInterrupt
        return make(job)

    monkeypatch.setattr(builder, "make", stopping)
    return calls


def test_an_input_that_changed_is_not_mixed_in(tmp_path, monkeypatch):
    columns, rows = choice(20)
    write(tmp_path / "in" / "MMStar.tsv", columns, rows)
    given = inputs(tmp_path / "in", "mmstar")
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        build(given, tmp_path / "stopped", conditions=["low"], workers=1, progress=False)
    build(given, tmp_path / "done", conditions=["low"], workers=1, progress=False)
    rows[0][7] = "B"  # as long as the old one
    write(tmp_path / "in" / "MMStar.tsv", columns, rows)
    for name in ("stopped", "done"):
        with pytest.raises(ClearValueError, match=r"other contents of MMStar\.tsv"):
            build(given, tmp_path / name, conditions=["low"], workers=1, progress=False)


def test_an_input_that_changes_while_it_is_read_is_said_so(tmp_path, monkeypatch):
    columns, rows = choice(4)
    path = write(tmp_path / "in" / "MMStar.tsv", columns, rows)
    make = builder.make

    def changing(job):
        path.write_bytes(path.read_bytes().replace(b"picture 3", b"picture 4"))
        return make(job)

    monkeypatch.setattr(builder, "make", changing)
    with pytest.raises(ClearValueError, match="was changed while"):
        build(inputs(path.parent, "mmstar"), tmp_path / "x", conditions=["low"], workers=1, progress=False)
    assert not (tmp_path / "x" / "manifest.json").exists()
    assert not (tmp_path / "x" / "MMStar.journal").exists()


@pytest.mark.parametrize("damage", ["lost", "short", "pictures"])
def test_a_growing_file_that_was_lost_or_cut_off_is_built_again(tmp_path, monkeypatch, damage):
    write(tmp_path / "in" / "MMStar.tsv", *choice(20))
    given = inputs(tmp_path / "in", "mmstar")
    build(given, tmp_path / "whole", conditions=FEW, workers=1, progress=False)
    calls = stop_at(monkeypatch, 3)
    folder = tmp_path / "sets"
    with pytest.raises(KeyboardInterrupt):
        build(given, folder, conditions=FEW, workers=1, progress=False)
    part = folder / ("MMStar.manifest.jsonl.part" if damage == "pictures" else "MMStar_lens_blur.tsv.part")
    if damage == "lost":
        part.unlink()
    else:
        os.truncate(part, part.stat().st_size - 10)
    build(given, folder, conditions=FEW, workers=1, progress=False)
    assert len(calls) == 3 + (20 if damage == "lost" else 19)  # two of the twenty had been made
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["lost", "short", "pictures"])
def test_a_set_that_is_gone_from_a_finished_build_is_built_again(base, tmp_path, monkeypatch, damage):
    given = inputs(base, "mmstar", "cvbench2d")
    folder = tmp_path / "sets"
    first = build(given, folder, conditions=FEW, workers=1, progress=False)
    before = contents(folder)
    file = folder / ("MMStar.manifest.jsonl" if damage == "pictures" else "MMStar_lens_blur.tsv")
    if damage == "short":
        os.truncate(file, 100)
    else:
        file.unlink()
    calls = stop_at(monkeypatch, -1)
    assert build(given, folder, conditions=FEW, workers=1, progress=False) == first
    assert contents(folder) == before
    assert {job[1] for job in calls} == {"MMStar"}  # the other task was whole


def killed(job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_was_killed_is_said_so_and_the_build_goes_on(tmp_path, monkeypatch):
    write(tmp_path / "in" / "MMStar.tsv", *choice(4))
    given = inputs(tmp_path / "in", "mmstar")
    with monkeypatch.context() as patch:
        patch.setattr(builder, "make", killed)
        with pytest.raises(
            ClearError, match=r"one of 2 processes .*fewer --workers; the same command goes on"
        ):
            build(given, tmp_path / "sets", conditions=["low"], workers=2, progress=False)
    manifest = build(given, tmp_path / "sets", conditions=["low"], workers=1, progress=False)
    assert manifest["tasks"]["mmstar"]["rows"] == 4


def test_after_a_picture_that_cannot_be_decoded_the_build_goes_on(tmp_path, monkeypatch):
    columns, rows = choice(12)
    rows[9][9] = picture(2)[:200]
    write(tmp_path / "in" / "MMStar.tsv", columns, rows)
    given = inputs(tmp_path / "in", "mmstar")
    calls = stop_at(monkeypatch, -1)
    with pytest.raises(TsvError, match=r"MMStar\.tsv, line 11: the picture cannot be decoded"):
        build(given, tmp_path / "sets", conditions=FEW, workers=1, progress=False)
    assert len(calls) == 10
    build(given, tmp_path / "sets", conditions=FEW, workers=1, skip_bad=True, progress=False)
    assert len(calls) == 10 + 3  # the nine before it were kept
    build(given, tmp_path / "whole", conditions=FEW, workers=1, skip_bad=True, progress=False)
    assert contents(tmp_path / "sets") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
@pytest.mark.parametrize("text", ['{"seed', "[]"])
def test_a_damaged_record_is_said_so(base, tmp_path, name, text):
    given = inputs(base, "mmvp")
    build(given, tmp_path / "sets", conditions=["low"], workers=1, progress=False)
    (tmp_path / "sets" / name).write_text(text)
    with pytest.raises(ClearValueError, match=rf"{name} is damaged .*delete the folder"):
        build(given, tmp_path / "sets", conditions=["low"], workers=1, progress=False)


MEMORY = """
import resource, sys
from pathlib import Path
from clear_adapters.mmd_bench.build import Input, build
from clear_adapters.mmd_bench.tasks import get_task

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in ("small", "large"):
        given = [Input(get_task("mmstar"), folder / name / "MMStar.tsv")]
        build(given, folder / f"{name}-sets", conditions=CONDITIONS, workers=2, progress=False)
        print(peak())
"""


@pytest.mark.long
def test_memory_does_not_grow_with_rows_or_pictures(tmp_path):
    write(tmp_path / "small" / "MMStar.tsv", *choice(4))
    columns, rows = choice(16)
    rng = np.random.default_rng(0)
    noise = base64.b64encode(encode(rng.integers(0, 255, (1080, 1920, 3), dtype=np.uint8))).decode()
    for row in rows:
        row[9] = noise
    write(tmp_path / "large" / "MMStar.tsv", columns, rows)
    script = tmp_path / "memory.py"
    script.write_text(MEMORY.replace("CONDITIONS", repr(QUICK)))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    small, large = map(float, done.stdout.split())
    made = sum(p.stat().st_size for p in (tmp_path / "large-sets").glob("*.tsv")) / 2**20
    assert made > 240
    assert large - small < 120, (small, large)  # MB


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on(base, tmp_path):
    write(tmp_path / "in" / "MMStar.tsv", *choice(32))
    command = [sys.executable, "-m", "clear_adapters.cli", "bench", "build", "--input", str(tmp_path / "in")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "sets"
    command += ["--output", str(folder), "--workers", "1"]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        journal = folder / "MMStar.journal"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (journal.is_file() and "\n" in journal.read_text()):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (folder / "manifest.json").exists()
    assert journal.read_text()
    for output in (folder, tmp_path / "whole"):
        build(inputs(tmp_path / "in", "mmstar"), output, workers=1, progress=False)
    assert contents(folder) == contents(tmp_path / "whole")


def test_another_build_is_not_mixed_in(base, built, tmp_path):
    folder, _ = built
    before = contents(folder)
    with pytest.raises(ClearValueError, match="other settings"):
        build(inputs(base, "mmbench", "mmstar"), folder, seed=1, progress=False)
    with pytest.raises(ClearValueError, match="not empty"):
        build(inputs(base, "mmstar"), base, progress=False)
    with pytest.raises(UnknownNameError, match="lens_blur"):
        build(inputs(base, "mmstar"), tmp_path / "x", conditions=["lens_blurr"])
    for settings, words in (
        ({"conditions": []}, "nothing to build"),
        ({"workers": 0}, "workers=0"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(ClearValueError, match=words):
            build(inputs(base, "mmstar"), tmp_path / "x", **settings)
    assert not (tmp_path / "x").exists()
    assert contents(folder) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_picture_that_cannot_be_decoded_is_named_or_left_out(tmp_path, workers):
    columns, rows = choice(5)
    rows[2][9] = picture(2)[:200]
    write(tmp_path / "in" / "MMStar.tsv", columns, rows)
    given = inputs(tmp_path / "in", "mmstar")
    folder = tmp_path / "sets"
    with pytest.raises(TsvError, match=r"MMStar\.tsv, line 4: the picture cannot be decoded"):
        build(given, folder, conditions=["low"], workers=workers, progress=False)
    manifest = build(given, folder, conditions=["low"], workers=workers, skip_bad=True, progress=False)
    facts = manifest["tasks"]["mmstar"]
    assert (facts["rows"], [s["line"] for s in facts["skipped"]]) == (4, [4])
    assert [r.values["index"] for r in TsvFile(folder / "MMStar_LOW_LEVEL_LOW.tsv").rows()] == [
        "0",
        "1",
        "3",
        "4",
    ]


def test_rotations_of_a_bad_picture_are_left_out_with_it(tmp_path):
    from tests.bench_files import mmbench

    columns, rows = mmbench(3)
    rows[1][9] = picture(1)[:200]
    write(tmp_path / "in" / "MMBench_DEV_EN_V11.tsv", columns, rows)
    given = inputs(tmp_path / "in", "mmbench")
    manifest = build(given, tmp_path / "sets", conditions=["low"], workers=1, skip_bad=True, progress=False)
    facts = manifest["tasks"]["mmbench"]
    assert (facts["rows"], facts["left_with_group"], len(facts["skipped"])) == (8, 3, 1)
    made = read_questions(tmp_path / "sets" / "MMBench_DEV_EN_V11_LOW_LEVEL_LOW.tsv", get_task("mmbench"))
    assert {q.group for q in made.questions} == {"1", "3"}


def test_the_whole_input_is_checked_before_anything_is_built(tmp_path):
    columns, rows = choice(5)
    rows[4][7] = ""
    write(tmp_path / "in" / "MMStar.tsv", columns, rows)
    with pytest.raises(TsvError, match="line 6: the answer is empty"):
        build(inputs(tmp_path / "in", "mmstar"), tmp_path / "sets", progress=False)
    assert not (tmp_path / "sets").exists()


# ---------------------------------------------------------------------------------------------------- sources


def test_a_source_is_a_folder_with_files_below_it(base, tmp_path):
    write(tmp_path / "a" / "deep" / "MMStar.tsv", *choice(2))
    found = locate([Source(tmp_path), Source(base)], ["MMStar.tsv", "MMVP.tsv", "nothing.tsv", "MMVP.tsv"])
    assert found.files == {
        "MMStar.tsv": tmp_path / "a" / "deep" / "MMStar.tsv",
        "MMVP.tsv": base / "MMVP.tsv",
    }
    assert found.missing == ("nothing.tsv",)
    write(tmp_path / "b" / "MMStar.tsv", *choice(2))
    with pytest.raises(ClearValueError, match=r"holds MMStar\.tsv twice"):
        Source(tmp_path)
    with pytest.raises(ClearValueError, match="neither a folder nor a dataset repository"):
        Source("./no/such/folder")
    with pytest.raises(ClearValueError, match="no file to build from"):
        find_inputs([Source(base)], [])
    with pytest.raises(ClearValueError, match=r"none of the files that were looked for: MMStar\.tsv"):
        find_inputs([Source(write(tmp_path / "c" / "x.tsv", ["a"], []).parent)], [get_task("mmstar")])


CLIENT = """
import json, os, sys, urllib.error, urllib.request
from clear_adapters.cli import main
from typer.testing import CliRunner
from clear_adapters.datasets.hub import Source, locate
from clear_adapters.mmd_bench.sets import built_with
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, arguments)
    print(json.dumps([result.exit_code, " ".join(result.output.split())]))
    try:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/done")
    except urllib.error.HTTPError:
        pass  # the server counts it, and has no such page
found = locate([Source("someone/MMD")], sys.argv[2:])
print(json.dumps([found.missing, [built_with(found.files[n]) for n in found.files]]))
"""


def client(url, home, *commands, names):
    """Commands, and then files, in a process of its own: the client reads its address when it is imported.

    Returns:
        Exit status and output of each command; which files are missing, and with which seeds the others were built.
    """
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    asked = json.dumps([list(map(str, arguments)) for arguments in commands])
    command = [sys.executable, "-c", CLIENT, asked, *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_files_come_from_a_repository_of_the_hub(built, base, tmp_path):
    folder, _ = built
    files = {f"sets/{p.name}": p.read_bytes() for p in folder.glob("MMStar*LEVEL*.tsv")}
    files["sets/manifest.json"] = (folder / "manifest.json").read_bytes()
    files |= {"base/MMStar.tsv": (base / "MMStar.tsv").read_bytes(), "train.tar.gz.part.0": b"x"}
    with serve("someone/MMD", files) as (url, requests):
        asked = ["bench", "run", "--output", tmp_path / "r", "--device", "cpu", "--data"]
        (built_code, told), (missing_code, missing), (unknown_code, unknown), found = client(
            url,
            tmp_path / "hf",
            *(["bench", "build", "--input", "someone/MMD", "--output", tmp_path / "sets",
               "--severity", "low", "--no-per-corruption", "--workers", "1"],
              [*asked, "someone/MMD", "--tasks", "mmstar,mmvp", "--severity", "high"],
              [*asked, "someone/else", "--tasks", "mmstar"]),
            names=["MMStar_LOW_LEVEL_MID.tsv", "MMVP.tsv"],
        )  # fmt: skip
        assert built_code == 0, told
        assert (tmp_path / "sets" / "MMStar_LOW_LEVEL_LOW.tsv").read_bytes() == files[
            "sets/MMStar_LOW_LEVEL_LOW.tsv"
        ]
        assert (missing_code, unknown_code) == (2, 2)
        assert "someone/MMD lacks MMVP_LOW_LEVEL_HIGH.tsv" in missing
        assert "the Hub gives no dataset repository" in unknown
        assert found == [["MMVP.tsv"], [0]]  # the manifest comes along
        fetched = [set()]
        for request in requests:
            if request == "GET /done":
                fetched.append(set())
            elif request.startswith("GET /datasets"):
                fetched[-1].add(request.rsplit("/", 1)[-1])
        # By what is built, by what is refused, and by what is asked for at the end.
        assert fetched == [{"MMStar.tsv"}, set(), set(), {"manifest.json", "MMStar_LOW_LEVEL_MID.tsv"}]
        assert any(COMMIT in r for r in requests)
