"""The commands data build, check and view, and stage 1 on what they make."""

import json
import re

import pytest
from PIL import Image
from typer.testing import CliRunner

from clear_adapters.cli import main
from clear_adapters.datasets.builder import teachers
from clear_adapters.datasets.builder.cost import Prices
from clear_adapters.datasets.builder.stream import Stream
from clear_adapters.errors import ClearValueError
from clear_adapters.transcript import RESTORE
from tests.chat_server import Reply, serve
from tests.data_files import lines, photographs, rows_of, write_rows
from tests.test_data_teacher import right

TRACE = f"<think>Dark.</think>\n{RESTORE}\n<think>Seen.</think>\n<answer>A</answer>"


def call(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    rows = rows_of(photographs(folder / "photos", 12))
    return write_rows(folder / "rows.jsonl", rows), folder / "photos"


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "mine"
    rows, photos = source
    more = ["--severities", "low=0.5,high=0.5", "--splits", "train=0.7,heldout=0.3", "--workers", 1]
    told = call("data", "build", rows, "--pictures", photos, "--output", folder, *more).output
    assert f"of 24, in {folder}" in told.replace("\n", " ")
    return folder


def test_stage_1_trains_on_what_was_built(built, toy, tmp_path):
    more = ["--set", "loop.steps=1", "--set", "loop.batch=2", "--device", "cpu"]
    call(
        *("train", "sft", "--recipe", "tiny", "--data", built, "--model", toy / "model"),
        *("--output", tmp_path / "adapter", *more),
    )
    assert (tmp_path / "adapter" / "clear_config.json").is_file()


def test_a_sound_set_passes(built):
    told = call("data", "check", built)
    assert "no problem was found" in told.output


def spoil(folder, name, change):
    rows = lines(folder / name)
    change(rows)
    write_rows(folder / name, rows)


def test_check_names_file_and_line_of_everything_that_is_wrong(tmp_path):
    names = photographs(tmp_path / "images", 4)
    Image.open(tmp_path / "images" / "3.jpg").resize((130, 110)).save(tmp_path / "images" / "near.png")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (30, 30)).save(tmp_path / "images" / "other.jpg")

    def row(name, picture, **more):
        own = {"id": name, "image": f"images/{picture}", "clean_image": f"images/{picture}"}
        return own | {"question": "Q?", "answer": "A", "reply": TRACE} | more

    train = [
        row("fine", names[0]),
        row("gone", "no.jpg"),
        row("tags", names[0], reply=TRACE.replace("</think>", "", 1)),
        {k: v for k, v in row("unrestored", names[0]).items() if k != "clean_image"},
        row("wrong", names[0], answer="B"),
        row("broken", "broken.jpg"),
        row("size", "other.jpg", clean_image=f"images/{names[0]}"),
        row("option", names[0], options=["x", "y"], answer="z", reply=None),
        "{",
        row("fine", names[0]),
        row("near", names[3]),
        row("grouped", names[1], group="g"),
    ]
    heldout = [
        row("same", names[0], reply=None),
        row("close", "near.png", reply=None),
        row("group", names[2], reply=None, group="g"),
    ]
    write_rows(tmp_path / "data.jsonl", train)
    write_rows(tmp_path / "heldout.jsonl", heldout)
    done = call("data", "check", tmp_path, code=1)
    found = {}
    for line in done.stdout.splitlines():
        told = re.fullmatch(rf"{re.escape(str(tmp_path))}/(\w+)\.jsonl:(\d+): (.*)", line)
        if told:
            found.setdefault((told[1], int(told[2])), []).append(told[3])
    expected = {
        ("data", 2): "there is no file",
        ("data", 3): "the tags do not parse",
        ("data", 4): "no clean_image",
        ("data", 5): "answers 'A', and the ground truth is 'B'",
        ("data", 6): "broken.jpg",
        ("data", 7): "differ in size",
        ("data", 8): "none of the options",
        ("data", 9): "not valid JSON",
        ("data", 10): "stands in line 1 already",
        ("heldout", 1): f"leak: its picture stands in {tmp_path}/data.jsonl:1 too",
        ("heldout", 2): f"leak: a near-duplicate of its picture stands in {tmp_path}/data.jsonl:11",
        ("heldout", 3): f"leak: its group stands in {tmp_path}/data.jsonl:12 too",
    }
    assert found.keys() == expected.keys()
    for place, problem in expected.items():
        assert len(found[place]) == 1
        assert problem in found[place][0]
    fewer = call("data", "check", "--no-pictures", tmp_path, code=1).stdout
    assert "near-duplicate" not in fewer
    assert "data.jsonl:3:" in fewer


def test_a_page_shows_rows_and_runs_nothing_of_theirs(built, tmp_path):
    rows = lines(built / "data.jsonl")
    rows[0]["question"] = "<script>alert(1)</script> & co?"
    rows[1]["reply"] = "no tags"
    path = write_rows(built / "shown.jsonl", rows)
    page = tmp_path / "pages" / "rows.html"
    call("data", "view", path, "--output", page, "--rows", 99)
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co?" in text
    assert "damaged trace" in text
    assert text.count("<article>") == len(rows)
    assert text.count("data:image/jpeg;base64,") == 2 * len(rows)
    assert "http" not in text
    path.unlink()


def test_the_teacher_of_the_command_line_is_the_service(source, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MY_KEY", "sk-mine")
    rows, photos = source
    out = tmp_path / "out"
    with serve(lambda body, _: Reply(right(body))) as service:
        common = ["data", "build", rows, "--pictures", photos, "--output", out, "--limit", 6, "--workers", 1]
        teacher = ["--writer", "teacher", "--teacher-url", service.url, "--teacher-model", "m"]
        teacher += ["--price", "2,8", "--teacher-key-env", "MY_KEY"]
        dry = call(*common, *teacher, "--dry-run").output
        assert not out.exists()
        assert "teacher, before balancing: about 5 requests (15 at most)" in dry
        assert not service.requests
        told = call(*common, *teacher, "--balance", "none").output
        assert "The teacher m: about" in told
        assert "taken at try 1" in told
        assert service.headers[0]["authorization"] == "Bearer sk-mine"
        assert service.requests[0]["temperature"] == 0.3
    assert "sk-mine" not in "".join(p.read_text() for p in out.glob("*.json*"))
    assert json.loads((out / "summary.json").read_text())["teacher"]["accepted_at_try"]


def test_the_settings_of_the_command_line_are_handed_on(source, tmp_path, monkeypatch):
    taken = []

    def taking(*given, **more):
        taken.append((*given, more))
        raise ClearValueError("taken")

    monkeypatch.setattr("clear_adapters.datasets.builder.build.build", taking)
    rows, photos = source
    common = ["data", "build", rows, "--pictures", photos, "--output", tmp_path / "out"]
    common += ["--writer", "teacher"]
    service = ["--teacher-url", "http://127.0.0.1:1/v1", "--teacher-model", "m", "--price", "2,8"]
    service += ["--budget", 7, "--per-minute", 120, "--teacher-cache", tmp_path / "kept", "--timeout", 9]
    service += ["--concurrency", 3, "--max-tokens", 77, "--temperature", 0.5]
    service += ["--judge-url", "http://127.0.0.1:2/v1", "--judge-model", "j"]
    call(*common, *service, code=2)
    origin, output, plan, more = taken.pop()
    assert (origin, output, more["pictures"]) == (rows, tmp_path / "out", photos)
    assert (plan.writer, plan.pathway) == ("teacher", "severity")
    assert (more["helpers"].prices, more["helpers"].budget) == (Prices(2, 8), 7)
    used = more["helpers"].teacher.endpoint
    assert (used.base_url, used.model, used.max_tokens) == ("http://127.0.0.1:1/v1", "m", 77)
    assert (used._cache, used._interval, used._timeout) == (tmp_path / "kept", 0.5, 9)
    assert (used._concurrency, used._options) == (3, {"temperature": 0.5, "max_tokens": 77})
    court = more["helpers"].judge.endpoint
    assert (court.base_url, court.model, court._cache) == (
        "http://127.0.0.1:2/v1",
        "j",
        tmp_path / "out" / "marks",
    )
    assert (court._interval, court._timeout, court._concurrency) == (0.5, 9, 3)
    # Without a place of its own the cache is the build's.
    call(*common, *service[:4], code=2)
    assert taken.pop()[-1]["helpers"].teacher.endpoint._cache == tmp_path / "out" / "replies"
    # A model without a service is one on this machine.
    monkeypatch.setattr(teachers, "LocalTeacher", lambda *given, **more: (given, more))
    call(*common, "--teacher-model", "mine", "--device", "cpu", "--max-tokens", 88, code=2)
    assert taken.pop()[-1]["helpers"].teacher == (("mine",), {"device": "cpu", "max_new_tokens": 88})
    # A folder is a dataset, as a name of the Hub is.
    hub = ["--config", "c", "--hub-split", "s", "--revision", "r"]
    for name in (photos, "owner/name", "owner/name-1.5-mid"):
        call("data", "build", name, "--output", tmp_path / "out", *hub, code=2)
        assert taken.pop()[0] == Stream(str(name), "c", "s", "r")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--balance", "two"], "--balance 'two'"),
        (["--splits", "train"], "--splits 'train'"),
        (["--price", "cheap"], "--price 'cheap'"),
        (["--writer", "teacher"], "needs a teacher"),
        (["--teacher-url", "http://127.0.0.1:1/v1"], "--teacher-model"),
        (["--judge-model", "x"], "--judge-url"),
        (["--model", "builtin:bagel-tiny"], "never be asked"),
        (["--judge-url", "http://127.0.0.1:1/v1", "--judge-model", "x"], "never be asked"),
        (["--splits", "train=nan"], "sum to 1"),
        (["--pictures", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_work_is_one_line(source, tmp_path, more, told):
    rows, photos = source
    more = more if "--pictures" in more else [*more, "--pictures", photos]
    result = call("data", "build", rows, "--output", tmp_path / "out", *more, code=2)
    assert told in " ".join(result.stderr.split())
    assert result.stderr.count("\n") == 1


def test_a_mistyped_source_is_mended_and_built_in_the_same_folder(source, tmp_path):
    rows, photos = source
    pytest.importorskip("datasets")
    common = ["--output", tmp_path / "out", "--workers", 1, "--limit", 3]
    (tmp_path / "empty").mkdir()
    for given in (["gone.jsonl"], [rows, "--pictures", "nowhere"], [tmp_path / "empty"], ["own/gone.csv"]):
        told = call("data", "build", *given, *common, code=2).stderr
        assert "other settings" not in told
        assert str(given[-1]) in told
    call("data", "build", rows, "--pictures", photos, *common)
    other = call("data", "build", rows, "--pictures", photos, *common[:-1], 4, code=2).stderr
    assert "(plan limit 3 there and 4 here; see" in " ".join(other.split())
