"""Examples, their folders, traces, and the data set of the miniature world."""

import dataclasses
import hashlib
import json
import random

import pytest
from PIL import Image

from clear_adapters.datasets import Example, read_examples, split_examples, write_examples
from clear_adapters.datasets.audit import audit
from clear_adapters.datasets.traces import (
    CONDITIONS,
    TraceSettings,
    build_transcript,
    choose_path,
    condition,
)
from clear_adapters.datasets.world import build
from clear_adapters.degradations import SEVERITIES, list_degradations
from clear_adapters.errors import ClearValueError, UnknownNameError
from clear_adapters.prompts import get_protocol
from clear_adapters.transcript import ImageSegment, Origin, RestorationSegment, TextSegment
from clear_adapters.world import KINDS

ROW = {"id": "a", "image": "images/a.jpg", "question": "What?", "answer": "That."}
REPLY = "<think>Dark.</think>\n<image_restore>\n<think>A cat.</think>\n<answer>cat</answer>"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / "images" / f"{name}.jpg")
    return tmp_path


def write(folder, *lines):
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    (folder / "data.jsonl").write_text(text + "\n")


# ---------------------------------------------------------------------------------------------------- examples


def test_a_row_is_read_whole(folder):
    full = ROW | {
        "clean_image": "images/b.jpg",
        "options": ["That.", "This."],
        "kind": "choice",
        "fact": "It is that.",
        "degradation": "lens_blur",
        "severity": "high",
        "intensity": 0.9,
        "psnr": 17.5,
        "group": "g",
        "extra": {"note": 1},
    }
    write(folder, full)
    (example,) = read_examples(folder)
    assert example.image == folder / "images" / "a.jpg"
    assert example.clean_image == folder / "images" / "b.jpg"
    assert example.options == ("That.", "This.")
    assert (example.degradation, example.psnr, example.split_key) == ("lens_blur", 17.5, "g")
    write_examples([example], folder)
    assert json.loads((folder / "data.jsonl").read_text()) == full


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ({k: v for k, v in ROW.items() if k != "answer"}, "'answer' is missing"),
        (ROW | {"id": "c", "answer": "  "}, "answer is empty"),
        (ROW | {"id": "c", "answer": 3}, "must be a string"),
        (ROW | {"id": "c", "image": "images/none.jpg"}, "there is no file"),
        (ROW | {"id": "c", "image": "../a.jpg"}, "neither absolute nor through a parent"),
        (ROW | {"id": "c", "image": "/etc/passwd"}, "neither absolute nor through a parent"),
        (ROW | {"id": "c", "image": "C:\\a.jpg"}, "neither absolute nor through a parent"),
        (ROW | {"id": "c", "clean_image": "../../b.jpg"}, "clean_image"),
        (ROW | {"id": "c", "options": "A"}, "list of strings"),
        (ROW | {"id": "c", "psnr": "high"}, "must be a number"),
        (ROW | {"id": "c", "colour": "red"}, "unknown key 'colour'"),
        (ROW | {"id": "c", "psnr": 10**400}, "psnr"),
        (ROW | {"id": "c", "intensity": float("nan")}, "intensity"),
        (ROW | {"id": "c", "reply": REPLY}, "restores and has no clean_image"),
        (ROW, "stands in line 1 already"),
        ({"id": "u", "conversations": [], "image": "a.jpg"}, "human's and a model's turn"),
    ],
)
def test_errors_name_file_and_line(folder, bad, message):
    write(folder, ROW, "", bad)
    with pytest.raises(ClearValueError, match=message) as caught:
        read_examples(folder)
    assert f"{folder / 'data.jsonl'}, line 3" in str(caught.value)


def test_no_file_and_no_row(folder):
    with pytest.raises(ClearValueError, match="does not exist"):
        read_examples(folder / "nowhere")
    (folder / "data.jsonl").write_bytes('{"id": "é"}'.encode("latin-1"))
    with pytest.raises(ClearValueError, match="not UTF-8"):
        read_examples(folder)
    write(folder, "")
    with pytest.raises(ClearValueError, match="holds no example"):
        read_examples(folder)


def test_the_authors_rows_are_recorded_traces(folder):
    for name in ("clean", "bad"):
        (folder / name).mkdir()
        Image.new("RGB", (64, 64)).save(folder / name / "1.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": REPLY}]
    write(folder, {"id": 7, "subset": "x", "image": "1.jpg", "conversations": turns, "tool_used": True})
    (example,) = read_examples(
        folder / "data.jsonl", clean_image_dir=folder / "clean", corrupted_image_dir=folder / "bad"
    )
    assert (example.id, example.question, example.answer) == ("7", "What is it?", "cat")
    assert example.image == folder / "bad" / "1.jpg"
    assert choose_path(example, TraceSettings(), random.Random(0), None) == "recorded"
    trace = build_transcript(example, get_protocol("tiny"), "recorded", image="i", clean="c")
    told = [(s.text, s.origin) if isinstance(s, TextSegment) else s for s in trace][3:]
    assert told[0] == ("<think>Dark.</think><image_restore>", Origin.SAMPLED)
    assert isinstance(told[1], RestorationSegment)
    # As that protocol joins them, whatever stands in the file.
    assert told[2] == ("<think>A cat.</think><answer>cat</answer>", Origin.SAMPLED)
    joined = build_transcript(example, get_protocol("default"), "recorded", image="i", clean="c")
    assert joined.segments[-1].text == "<think>A cat.</think>\n<answer>cat</answer>"


def test_groups_stay_together(folder):
    examples = [Example(str(i), folder, "q", "a", group=f"g{i // 3}") for i in range(300)]
    parts = split_examples(examples, {"train": 0.8, "test": 0.2}, seed=1)
    groups = [{e.group for e in part} for part in parts.values()]
    assert not groups[0] & groups[1]
    assert sum(map(len, parts.values())) == 300
    assert 150 < len(parts["train"]) < 285
    # What stands beside an example does not move it.
    assert split_examples(examples[:30], {"train": 0.8, "test": 0.2}, seed=1)["test"] == [
        e for e in parts["test"] if int(e.id) < 30
    ]
    with pytest.raises(ClearValueError, match="sum to 1"):
        split_examples(examples, {"train": 0.8})


# ------------------------------------------------------------------------------------------------------ traces

EXAMPLE = Example(
    "e", "i", "Which?", "B", "c", fact="The sign reads 7.", degradation="gaussian_noise", intensity=0.9
)
SYSTEM = ("Look. Restore if needed. Answer.", Origin.PROMPT)
QUESTION = ("Which?", Origin.PROMPT)
SECOND = ("<think>The sign reads 7.</think><answer>B</answer>", Origin.SAMPLED)


@pytest.mark.parametrize(
    ("path", "reply"),
    [
        (
            "direct",
            [("<think>Badly noisy. The sign reads 7.</think><answer>B</answer>", Origin.SAMPLED)],
        ),
        (
            "restore",
            [("<think>Badly noisy.</think><image_restore>", Origin.SAMPLED), "restoration", SECOND],
        ),
        ("always", [("<think></think><image_restore>", Origin.FORCED), "restoration", SECOND]),
        (
            "declined",
            [("<think>Badly noisy.</think>I will answer from what I see.", Origin.FORCED), SECOND],
        ),
    ],
)
def test_the_layout_of_every_path(path, reply):
    trace = build_transcript(EXAMPLE, get_protocol("tiny"), path, image="i", clean="c", understanding=False)
    told = []
    for segment in trace:
        if isinstance(segment, TextSegment):
            told.append((segment.text, segment.origin))
        elif isinstance(segment, ImageSegment):
            assert (segment.image, segment.as_condition, segment.understanding) == ("i", True, False)
            told.append("picture")
        else:
            assert (segment.target, segment.origin, segment.reencoded) == ("c", Origin.SAMPLED, False)
            told.append("restoration")
    assert told == [SYSTEM, "picture", QUESTION, *reply]


def test_the_plain_layout():
    system, *rest = build_transcript(EXAMPLE, get_protocol("tiny"), "plain", image="i")
    assert isinstance(system, ImageSegment)
    assert not system.as_condition
    assert [(s.text, s.origin) for s in rest] == [QUESTION, ("B", Origin.SAMPLED)]


def test_every_corruption_has_short_words():
    assert set(CONDITIONS) == {d.name for d in list_degradations()}
    for name in CONDITIONS:
        said = [
            condition(dataclasses.replace(EXAMPLE, degradation=name, intensity=i))
            for i in SEVERITIES.values()
        ]
        assert len(set(said)) == 3
        assert all(len(text.encode()) <= 30 for text in said)
    assert condition(dataclasses.replace(EXAMPLE, degradation=None)) == "Clear."


def test_the_path_follows_the_decibels():
    settings = TraceSettings(restore_below=20, explore=0, declined=0, always=0)
    rng = random.Random(0)
    assert choose_path(EXAMPLE, settings, rng, 19.9) == "restore"
    assert choose_path(EXAMPLE, settings, rng, 20.0) == "direct"
    assert choose_path(dataclasses.replace(EXAMPLE, clean_image=None), settings, rng, 3.0) == "direct"
    drawn = [choose_path(EXAMPLE, TraceSettings(), random.Random(i), 10.0) for i in range(2000)]
    shares = {p: drawn.count(p) / 2000 for p in set(drawn)}
    assert shares == pytest.approx(
        {"direct": 0.1, "restore": 0.72, "declined": 0.09, "always": 0.09}, abs=0.025
    )
    assert drawn == [choose_path(EXAMPLE, TraceSettings(), random.Random(i), 10.0) for i in range(2000)]


@pytest.mark.parametrize("bad", [{"explore": 1.5}, {"declined": -0.1}, {"declined": 0.6, "always": 0.6}])
def test_shares_are_checked(bad):
    with pytest.raises(ClearValueError, match=next(iter(bad))):
        TraceSettings(**bad)


# ------------------------------------------------------------------------------------------------- the world


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_build_depends_on_no_workers_and_goes_on(tmp_path):
    one, two, stopped = (tmp_path / n for n in ("one", "two", "stopped"))
    for folder, workers in ((one, 1), (two, 2)):
        build(folder, 150, seed=3, workers=workers, progress=False)
    assert digest(one) == digest(two)
    # As a killed build leaves it: some chunks are done.
    build(stopped, 150, seed=3, workers=1, progress=False)
    rows = (stopped / "data.jsonl").read_text().splitlines(keepends=True)
    (stopped / "data.jsonl").unlink()
    (stopped / "parts").mkdir()
    (stopped / "parts" / "000000.jsonl").write_text("".join(rows[: 48 * 3]))
    build(stopped, 150, seed=3, workers=1, progress=False)
    assert digest(stopped) == digest(one)
    with pytest.raises(ClearValueError, match="other settings"):
        build(one, 150, seed=4, progress=False)
    (two / "build.json").write_bytes(b"\xff")
    with pytest.raises(ClearValueError, match="other settings"):
        build(two, 150, seed=3, progress=False)
    examples = read_examples(one)
    assert len(examples) == 150
    assert audit(one).findings == []
    assert {e.kind for e in examples} == set(KINDS)
    assert all((e.degradation is None) == (e.image == e.clean_image) == (e.psnr == 99) for e in examples)
    # Of fifty scenes five pairs are nearly one picture twice: each is one group.
    groups = [e.split_key for e in examples]
    assert len(set(groups)) == 45
    paired = {e.group for e in examples if (e.group or "").startswith("pair-")}
    assert len(paired) == 5
    assert all(groups.count(g) == (6 if g in paired else 3) for g in groups)


def test_the_build_checks_its_settings(tmp_path):
    with pytest.raises(UnknownNameError, match="heldout"):
        build(tmp_path / "a", 10, split="held_out")
    with pytest.raises(ClearValueError, match="sum to 1"):
        build(tmp_path / "a", 10, severities={"clean": 0.5})
    with pytest.raises(ClearValueError, match="examples=0"):
        build(tmp_path / "a", 0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(ClearValueError, match="not empty"):
        build(tmp_path / "b", 10)


def test_no_trace_restores_what_it_calls_clear():
    """Rows without a named degradation used to say that the picture is clear and then restore it."""
    example = dataclasses.replace(EXAMPLE, degradation=None, psnr=12.0)
    for path in ("restore", "declined"):
        transcript = build_transcript(example, get_protocol("tiny"), path, image="i", clean="c")
        assert "Clear." not in transcript.reply


def test_a_protocol_says_what_stands_between_thought_and_answer():
    restore = build_transcript(EXAMPLE, get_protocol("default"), "restore", image="i", clean="c")
    texts = [s.text for s in restore if isinstance(s, TextSegment) and s.origin is Origin.SAMPLED]
    assert texts == [
        "<think>Badly noisy.</think>\n<image_restore>",
        "<think>The sign reads 7.</think>\n<answer>B</answer>",
    ]
