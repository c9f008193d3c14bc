"""Training data from pictures of a user's own: sources, pictures, splits, paths, files, kills."""

import base64
import io
import itertools
import json
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from clear_adapters import attach
from clear_adapters.datasets import read_examples
from clear_adapters.datasets.answers import says
from clear_adapters.datasets.builder import assembly, pictures
from clear_adapters.datasets.builder.assembly import Helpers
from clear_adapters.datasets.builder.build import build, foresee
from clear_adapters.datasets.builder.pathways import BaseModel, wanted
from clear_adapters.datasets.builder.plan import Plan
from clear_adapters.datasets.builder.sources import read_rows
from clear_adapters.datasets.builder.stream import Stream
from clear_adapters.datasets.duplicates import Clusters, perceptual_hash
from clear_adapters.datasets.parts import Parts, read_parts
from clear_adapters.degradations import degrade
from clear_adapters.endpoint import EndpointError
from clear_adapters.errors import ClearValueError
from clear_adapters.images import load_image
from clear_adapters.scoring import matches
from clear_adapters.transcript import RESTORE
from tests.bench_files import picture
from tests.bench_files import write as write_table
from tests.data_files import contents, lines, photographs, rows_of, write_rows

ONE = Helpers(workers=1, progress=False)
QUICK = {"severities": {"low": 0.5, "high": 0.5}, "splits": {"train": 0.7, "rl": 0.15, "heldout": 0.15}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return write_rows(folder / "rows.jsonl", rows_of(photographs(folder)))


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "set"
    return folder, build(source, folder, Plan(**QUICK), helpers=ONE)


# ------------------------------------------------------------------------------------------------------- parts

TRACE = "<think>Dark.</think>\n<image_restore>\n<think>A cat.</think>\n<answer>cat</answer>"


def test_a_trace_is_read_in_its_parts():
    assert read_parts(TRACE) == Parts("Dark.", "cat", "A cat.")
    assert read_parts(TRACE).text == TRACE
    assert read_parts("<think>Fine. </think><answer> cat</answer>") == Parts("Fine.", "cat")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no tag at all"),
        ("cat", "no tag at all"),
        (TRACE.replace("</think>", "", 1), "do not parse"),
        (TRACE.replace("<answer>cat</answer>", ""), "do not parse"),
        (TRACE + "<answer>dog</answer>", "do not parse"),
        (TRACE.replace(RESTORE, RESTORE * 2), "do not parse"),
        (TRACE.replace("</think>\n<image_restore>", f"{RESTORE}</think>"), "do not parse"),
        (TRACE.replace("Dark.", " "), "first thought is empty"),
        (TRACE.replace("A cat.", ""), "thought after the restoration is empty"),
        (TRACE.replace(">cat<", "> <"), "the answer is empty"),
        ("Sure! " + TRACE, "'Sure!' stands outside"),
        (TRACE.replace("<answer>", "so <answer>"), "'so' stands outside"),
        (TRACE + "\n```", "stands outside"),
    ],
)
def test_a_damaged_trace_is_no_trace(text, told):
    with pytest.raises(ClearValueError, match=told):
        read_parts(text)


def test_answers_match_by_letter_text_and_form():
    options = ("red", "dark blue")
    for given in ("B", "(B)", "dark blue", "B. dark blue"):
        assert matches(given, "B", options), given
        assert matches(given, " b. ", options, "fuzzy"), given
        assert matches(given, "dark blue ", options, "option"), given
    assert not matches("A", "B", options)
    assert not matches("either", "B", options)
    assert matches("The cat.", "cat")
    assert not matches("catalogue", "cat")
    assert matches("3", "three")


def test_an_answer_that_is_trained_says_the_truth_alone():
    options = ("red", "dark blue")
    for given in ("B", "(B)", "b.", "dark blue", "Dark blue.", "B. dark blue"):
        assert says(given, "B", options), given
    for given in ("dark blue", "Dark blue."):
        assert says(given, "dark blue", options), given
    assert not says("B", "dark blue", options)  # asked without letters
    for given in ("zzz B", "A", "B or A", "the answer is B", "it is dark blue", "red, B", ""):
        assert not says(given, "B", options), given
    assert not says("A", "B", ("x", "A"))  # the letter, not the text of option B
    assert says("The cat.", "cat")
    assert says("?", "?")
    assert not says("a black cat", "cat")
    assert not says("3 cats", "3")


# ----------------------------------------------------------------------------------------------------- sources


def test_rows_that_cannot_be_used_are_kept_with_the_reason(tmp_path):
    (name, other) = photographs(tmp_path, 2)
    good = {"id": "g", "image": name, "question": "Q?", "answer": "A"}
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    rows = [
        good,
        {"id": 7, "image": other, "conversations": [*turns, *turns]},
        "{",
        "[1]",
        good,
        good | {"id": "a", "image": "no.jpg"},
        good | {"id": "b", "image": "../x.jpg"},
        good | {"id": "c", "answer": " "},
        good | {"id": "d", "question": "\u8fd9\u662f\u4ec0\u4e48?"},
        good | {"id": "e", "options": ["x", "y"], "answer": "z"},
        good | {"id": "f", "image": [name, other]},
        good | {"id": "h", "answer": "<answer>A</answer>"},
        good | {"id": "i", "image": None},
        good | {"id": "j", "conversations": turns[:1]},
        {"id": "k", "image": name, "question": "Q?"},
        good | {"id": "l", "question": "<image>\nWhose?"},
        good | {"id": "m", "question": "<image>"},
    ]
    found = read_rows(write_rows(tmp_path / "rows.jsonl", rows), None, Plan())
    assert [(r.id, r.question, r.answer, r.place) for r in found.rows] == [
        ("g", "Q?", "A", "line 1"),
        ("7", "What?", "That.", "line 2"),
        ("l", "Whose?", "A", "line 16"),
    ]
    assert [(r.reason, r.place) for r in found.rejected] == [
        ("bad row", "line 3"),
        ("bad row", "line 4"),
        ("repeated row", "line 5"),
        ("missing picture", "line 6"),
        ("bad row", "line 7"),
        ("empty text", "line 8"),
        ("language", "line 9"),
        ("answer is no option", "line 10"),
        ("several pictures", "line 11"),
        ("tags in the text", "line 12"),
        ("no picture", "line 13"),
        ("bad row", "line 14"),
        ("bad row", "line 15"),
        ("empty text", "line 17"),
    ]
    assert found.read == len(rows)
    assert len(read_rows(tmp_path / "rows.jsonl", None, Plan(any_language=True)).rows) == 4


def test_a_json_list_and_a_table_give_the_same_rows(tmp_path):
    photographs(tmp_path / "p", 1)
    entry = {"id": "1", "image": "0.jpg", "question": "Which?", "answer": "B", "options": ["red", "blue"]}
    (tmp_path / "rows.json").write_text(json.dumps([entry]))
    columns = ["index", "question", "A", "B", "answer", "category", "image"]
    table = [
        ["1", "Which?", "red", "blue", "B", "colour", picture(0)],
        ["2", "Which?", "red", "blue", "A", "colour", "1"],
        ["3", "Which?", "red", "blue", "A", "colour", "9"],
    ]
    write_table(tmp_path / "rows.tsv", columns, table)
    (listed,) = read_rows(tmp_path / "rows.json", tmp_path / "p", Plan()).rows
    first, second = (found := read_rows(tmp_path / "rows.tsv", None, Plan())).rows
    assert (
        listed.question
        == first.question
        == "Which?\nA. red\nB. blue\nChoose one option and answer with its letter."
    )
    assert (listed.answer, listed.options) == (first.answer, first.options) == ("B", ("red", "blue"))
    assert listed.place == "entry 1"
    assert first.picture == second.picture  # the second row points at the first one's picture
    assert first.picture.read() == base64.b64decode(picture(0))
    assert [(r.id, r.reason) for r in found.rejected] == [("3", "missing picture")]


def test_every_question_about_a_picture_is_kept_under_an_id_of_its_own(tmp_path):
    (name, other) = photographs(tmp_path, 2)
    row = {"id": "7", "image": name, "question": "Q1?", "answer": "A"}
    rows = [row, row | {"question": "Q2?"}, row | {"image": other}, row | {"id": "7@line-6"}, row]
    rows += [row | {"question": "Q3?"}]
    found = read_rows(write_rows(tmp_path / "rows.jsonl", rows), None, Plan())
    assert [r.id for r in found.rows] == ["7", "7@line-2", "7@line-3", "7@line-6", "7@line-6'"]
    assert [(r.reason, r.place) for r in found.rejected] == [("repeated row", "line 5")]
    plan = Plan(splits={"train": 1.0}, restore_share=None)
    assert build(tmp_path / "rows.jsonl", tmp_path / "out", plan, helpers=ONE)["rows"]["train"] == 5


def test_what_could_never_be_trained_or_matched_is_rejected_at_the_source(tmp_path):
    (name,) = photographs(tmp_path, 1)
    good = {"image": name, "question": "Q?", "answer": "dark blue"}
    turns = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "-"}]
    rows = [
        good | {"id": "letter", "options": ["red", "dark blue"]},
        good | {"id": "sign", "options": ["-", "+"], "answer": "-"},
        good | {"id": "degrees", "answer": "\u00b0"},
        good | {"id": "many", "options": [f"dark {i}" for i in range(29)] + ["dark blue"]},
        good | {"id": "fact", "fact": "It is </think> blue."},
        good | {"id": "option", "options": ["dark blue", "<answer>"]},
        good | {"id": "dash", "answer": "-"},
        good | {"id": "mark", "answer": "?"},
        {"id": "turns", "image": name, "conversations": turns, "options": ["-", "+"]},
    ]
    found = read_rows(write_rows(tmp_path / "rows.jsonl", rows), None, Plan())
    assert [(r.id, r.answer) for r in found.rows] == [("letter", "B"), ("sign", "A"), ("degrees", "\u00b0")]
    assert {r.id: r.reason for r in found.rejected} == {
        "many": "too many options",
        "fact": "tags in the text",
        "option": "tags in the text",
        "dash": "answer cannot match",
        "mark": "answer cannot match",
        "turns": "answer cannot match",
    }


def test_a_table_trains_the_option_that_its_answer_names(tmp_path):
    columns = ["index", "question", "A", "B", "C", "D", "answer", "image"]
    table = [
        ["1", "Which?", "B", "D", "A", "C", "A", picture(0, (96, 80))],  # options that are letters themselves
        [
            "2",
            "Which?",
            "",
            "red",
            "green",
            "",
            "B",
            picture(1, (96, 80)),
        ],  # an empty column before the true one
        ["3", "Which?", "", "red", "green", "", "green", picture(2, (96, 80))],
        ["4", "Which?", "", "A", "green", "", "A", picture(3, (96, 80))],  # names the empty column
        ["5", "Which?", "x", "red", "", "blue", "(d).", picture(4, (96, 80))],
    ]
    write_table(tmp_path / "rows.tsv", columns, table)
    found = read_rows(tmp_path / "rows.tsv", None, Plan())
    assert [(r.id, r.answer, r.options[ord(r.answer) - 65]) for r in found.rows] == [
        ("1", "A", "B"),
        ("2", "A", "red"),
        ("3", "B", "green"),
        ("5", "C", "blue"),
    ]
    assert [(r.id, r.reason) for r in found.rejected] == [("4", "answer is no option")]
    plan = Plan(splits={"train": 1.0}, restore_share=None)
    build(tmp_path / "rows.tsv", tmp_path / "out", plan, helpers=ONE)
    rows = {r["id"]: r for r in lines(tmp_path / "out" / "data.jsonl")}
    assert read_parts(rows["1"]["reply"]).answer == "A"
    assert "B" in rows["1"]["reply"].split("</think>")[-2]  # the text of option A
    assert matches("A", "A", ("B", "D", "A", "C"))
    assert not matches("C", "A", ("B", "D", "A", "C"))


def test_sampling_follows_from_the_seed_and_not_from_the_order(tmp_path):
    names = photographs(tmp_path, 2)
    rows = [{"id": str(i), "image": names[0], "question": "Q?", "answer": "A"} for i in range(40)]
    forward = read_rows(write_rows(tmp_path / "a.jsonl", rows), None, Plan(limit=10))
    backward = read_rows(write_rows(tmp_path / "b.jsonl", rows[::-1]), None, Plan(limit=10))
    assert {r.id for r in forward.rows} == {r.id for r in backward.rows}
    assert [int(r.id) for r in forward.rows] == sorted(int(r.id) for r in forward.rows)
    assert forward.not_sampled == 30
    other = read_rows(tmp_path / "a.jsonl", None, Plan(limit=10, seed=1))
    assert {r.id for r in other.rows} != {r.id for r in forward.rows}


def test_a_source_of_which_nothing_can_be_used_says_why(tmp_path):
    rows = [{"id": "1", "image": "0.jpg", "question": "Q?", "answer": "A"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ClearValueError, match=r"none of 1 rows.*line 1: there is no file .*0\.jpg"):
        build(path, tmp_path / "out", helpers=ONE)
    with pytest.raises(ClearValueError, match=r"\.json, \.jsonl or \.tsv"):
        read_rows(tmp_path / "rows.csv", None, Plan())
    with pytest.raises(ClearValueError, match="no folder"):
        read_rows(path, tmp_path / "nowhere", Plan())


@pytest.mark.parametrize(
    "bad",
    [
        {"splits": {"train": 0.5}},
        {"severities": {"huge": 1.0}},
        {"limit": 0},
        {"tries": 0},
        {"pathway": "luck"},
        {"restore_share": 1.5},
        {"restore_from": "worst"},
        {"seed": -1},
    ],
)
def test_settings_are_checked(bad):
    with pytest.raises(ClearValueError, match=next(iter(bad))):
        Plan(**bad)


# ------------------------------------------------------------------------------------------- pictures and files


def test_what_is_built_is_what_training_reads(built, source):
    folder, summary = built
    train, rl = read_examples(folder), read_examples(folder / "rl.jsonl")
    clean = {row["id"]: source.with_name(row["image"]).read_bytes() for row in lines(source)}
    for example in train + rl:
        assert example.clean_image.read_bytes() == clean[example.id]  # the file as it was
    made = {r["source"]: r for r in lines(folder / "manifest.jsonl")}
    assert len(made) == 12
    for record in made.values():
        again = degrade(
            load_image(folder / record["clean_image"]),
            record["degradation"],
            severity=record["severity"],
            seed=record["seed"],
        )
        buffer = io.BytesIO()
        again.save(buffer, "JPEG", quality=95)
        assert buffer.getvalue() == (folder / record["image"]).read_bytes()
    for example in train:
        parts = read_parts(example.reply)
        assert parts.answer == example.answer
        assert (parts.reading is not None) == (example.severity == "high")
    ways = [RESTORE in e.reply for e in train]
    assert ways.count(True) == ways.count(False) == summary["pathways"]["restore"] > 0
    assert all(e.reply is None for e in rl)
    lost = sum(sum(reasons.values()) for reasons in summary["rejected"].values())
    assert summary["read"] == 24 == sum(summary["rows"].values()) + lost
    assert lost == len(lines(folder / "rejected.jsonl"))
    assert not (folder / "journal.jsonl").exists()


def test_the_files_depend_on_no_workers_and_a_finished_set_is_left_alone(
    built, source, tmp_path, monkeypatch
):
    folder, summary = built
    build(source, tmp_path / "two", Plan(**QUICK), helpers=Helpers(workers=2, progress=False))
    assert contents(tmp_path / "two") == contents(folder)
    monkeypatch.setattr(assembly, "make_picture", lambda job: pytest.fail("made again"))
    assert build(source, folder, Plan(**QUICK), helpers=ONE) == summary
    with pytest.raises(ClearValueError, match=r"other settings.*plan"):
        build(source, folder, Plan(**QUICK, seed=1), helpers=ONE)


def test_a_stopped_build_goes_on_where_it_was(built, source, tmp_path, monkeypatch):
    calls = []
    make = assembly.make_picture

    def stopping(job):
        calls.append(job.picture.name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return make(job)

    monkeypatch.setattr(assembly, "make_picture", stopping)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "set", Plan(**QUICK), helpers=ONE)
    with (tmp_path / "set" / "journal.jsonl").open("a") as opened:
        opened.write('{"sizes": {}, "ma')  # as a kill in the middle of a line leaves it
    lost = json.loads((tmp_path / "set" / "journal.jsonl").read_text().splitlines()[0])["made"]["made"]
    (tmp_path / "set" / lost["image"]).unlink()
    build(source, tmp_path / "set", Plan(**QUICK), helpers=ONE)
    assert contents(tmp_path / "set") == contents(built[0])
    assert len(calls) == 6 + 8  # of the five that were done one was lost


def test_pictures_that_are_not_taken_say_why(tmp_path, monkeypatch):
    photographs(tmp_path, 2)
    Image.new("RGB", (40, 200)).save(tmp_path / "small.png")
    Image.new("RGB", (70, 400)).save(tmp_path / "narrow.png")
    Image.new("RGB", (80, 80), (90, 90, 90)).save(tmp_path / "flat.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    load_image(tmp_path / "1.jpg").save(tmp_path / "bitmap.bmp")
    Image.new("RGB", (90, 90)).save(tmp_path / "refused.png")
    names = ["0.jpg", "small.png", "narrow.png", "flat.png", "broken.jpg", "bitmap.bmp", "refused.png"]

    def refusing(image, *given, **more):
        if image.size == (90, 90):
            raise ClearValueError("not this one")
        return degrade(image, *given, **more)

    # This one leaves a flat picture as it is.
    monkeypatch.setattr(pictures, "draw", lambda seed, weights: "motion_blur")
    monkeypatch.setattr(pictures, "degrade", refusing)
    rows = [{"id": n, "image": n, "question": "Q?", "answer": "A"} for n in names]
    plan = Plan(severities={"low": 1.0}, splits={"train": 1.0}, restore_share=None)
    summary = build(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", plan, helpers=ONE)
    reasons = {r["id"]: (r["stage"], r["reason"]) for r in lines(tmp_path / "out" / "rejected.jsonl")}
    assert reasons == {
        "small.png": ("picture", "small picture"),
        "narrow.png": ("picture", "narrow picture"),
        "flat.png": ("picture", "unchanged by its degradation"),
        "broken.jpg": ("picture", "unreadable picture"),
        "refused.png": ("picture", "cannot be degraded"),
    }
    assert summary["read"] == 7 == len(reasons) + summary["rows"]["train"]
    (kept,) = (r for r in lines(tmp_path / "out" / "manifest.jsonl") if r["source"] == "bitmap.bmp")
    assert kept["clean_image"].endswith(".png")  # no reader of training data needs to know such a format
    clean = load_image(tmp_path / "out" / kept["clean_image"])
    assert clean.tobytes() == load_image(tmp_path / "bitmap.bmp").tobytes()


def test_a_name_or_a_header_that_cannot_be_is_one_bad_row(tmp_path):
    (name,) = photographs(tmp_path, 1)
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk + (0).to_bytes(4, "big") + b"IDAT" + bytes(4)
    )
    rows = [
        {"id": i, "image": image, "question": "Q?", "answer": "A"}
        for i, image in (("good", name), ("long", "x" * 300 + ".jpg"), ("bomb", "bomb.png"))
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    plan = Plan(splits={"train": 1.0}, restore_share=None)
    found, _ = foresee(source, plan)
    assert [r.id for r in found.rows] == ["good", "bomb"]
    summary = build(source, tmp_path / "out", plan, helpers=ONE)
    assert summary["rejected"] == {"picture": {"unreadable picture": 1}, "source": {"missing picture": 1}}


def test_another_folder_of_pictures_or_another_judge_is_another_build(tmp_path):
    pytest.importorskip("openai")
    from clear_adapters.endpoint import Endpoint
    from clear_adapters.rewards.judge import Judge

    names = photographs(tmp_path / "one", 2)
    photographs(tmp_path / "two", 2)
    source = write_rows(tmp_path / "rows.jsonl", rows_of(names))
    judges = [Judge(Endpoint("http://127.0.0.1:1/v1", name)) for name in ("j", "k")]
    plan = Plan(pathway="backbone")
    used = replace(ONE, judge=judges[0], base=Knowing(set()))
    build(source, tmp_path / "out", plan, pictures=tmp_path / "one", helpers=used)
    build(source, tmp_path / "out", plan, pictures=tmp_path / "two" / ".." / "one", helpers=used)
    with pytest.raises(ClearValueError, match=r"other settings.*pictures"):
        build(source, tmp_path / "out", plan, pictures=tmp_path / "two", helpers=used)
    other = replace(used, judge=judges[1])
    with pytest.raises(ClearValueError, match="judge 'j' there and 'k' here"):
        build(source, tmp_path / "out", plan, pictures=tmp_path / "one", helpers=other)
    assert str(tmp_path) not in (tmp_path / "out" / "summary.json").read_text()


def test_large_pictures_are_scaled_before_they_are_degraded(tmp_path):
    photographs(tmp_path, 2)
    rows = rows_of(["0.jpg", "1.jpg"])
    plan = Plan(max_side=64, splits={"train": 1.0}, restore_share=None)
    build(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", plan, helpers=ONE)
    for example in read_examples(tmp_path / "out"):
        assert example.load().size == example.load_clean().size == (64, 53)


def test_near_duplicates_and_groups_share_a_split(tmp_path):
    names = photographs(tmp_path, 10)
    rows = []
    for i, name in enumerate(names):
        image = load_image(tmp_path / name)
        image.resize((140, 118)).save(tmp_path / f"large-{i}.jpg", quality=60)
        image.save(tmp_path / f"same-{i}.png")
        for kind in (name, f"large-{i}.jpg", f"same-{i}.png"):
            row = {"id": kind, "image": kind, "question": "Q?", "answer": "A"}
            rows.append(row | ({"group": f"g{i // 2}"} if kind == name else {}))
    plan = Plan(
        severities={"clean": 1.0}, splits={"train": 0.4, "rl": 0.3, "heldout": 0.3}, restore_share=None
    )
    build(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", plan, helpers=ONE)
    splits = {r["source"]: (r["split"], r["group"]) for r in lines(tmp_path / "out" / "manifest.jsonl")}
    for i in range(0, 10, 2):
        names = [
            f"{kind}{j}.{end}"
            for j in (i, i + 1)
            for kind, end in (("", "jpg"), ("large-", "jpg"), ("same-", "png"))
        ]
        assert len({splits[name] for name in names}) == 1
    assert len({group for _, group in splits.values()}) == 5
    assert len({split for split, _ in splits.values()}) > 1


def test_hashes_tell_pictures_apart():
    images = [
        Image.open(io.BytesIO(base64.b64decode(picture(i, (96, 80))))).convert("RGB") for i in range(12)
    ]
    hashes = [perceptual_hash(i) for i in images]
    assert min((a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2)) > Plan.near
    for image, known in zip(images, hashes, strict=True):
        bright = Image.fromarray(np.minimum(np.asarray(image) * 1.1, 255).astype(np.uint8))
        assert (perceptual_hash(bright) ^ known).bit_count() <= Plan.near
    joined = Clusters(4)
    joined.join(3, 1)
    joined.join(1, 2)
    assert [joined.root(i) for i in range(4)] == [0, 1, 1, 1]


# ------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("direct", "restore", "share", "expected"),
    [
        (10, 30, 0.5, (10, 10)),
        (30, 10, 0.5, (10, 10)),
        (10, 30, None, (10, 30)),
        (30, 30, 0.75, (10, 30)),
        (5, 5, 0, (5, 0)),
        (5, 5, 1, (0, 5)),
        (0, 9, 0.5, (0, 0)),
    ],
)
def test_how_many_rows_balance(direct, restore, share, expected):
    assert wanted(direct, restore, share) == expected


class Knowing:
    """A base model that knows some answers."""

    name, batch = "knowing", 4

    def __init__(self, wrong, fail_at=None):
        self.wrong, self.fail_at, self.asked = wrong, fail_at, []

    def answers(self, examples):
        if self.fail_at is not None and len(self.asked) >= self.fail_at:
            raise KeyboardInterrupt
        self.asked += [e.id for e in examples]
        return ["something else" if e.id in self.wrong else f"{e.answer.capitalize()}." for e in examples]


def test_the_papers_rule_follows_the_base_model_and_asks_it_once(source, tmp_path):
    plan = Plan(pathway="backbone", splits={"train": 1.0}, restore_share=None)
    wrong = {f"{i}-a" for i in range(0, 12, 2)}
    stopped = Knowing(wrong, fail_at=8)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "out", plan, helpers=Helpers(base=stopped, workers=1, progress=False))
    rest = Knowing(wrong)
    build(source, tmp_path / "out", plan, helpers=Helpers(base=rest, workers=1, progress=False))
    assert len(stopped.asked) == 8
    assert not set(stopped.asked) & set(rest.asked)
    assert len(stopped.asked + rest.asked) == 24
    restored = {r["id"] for r in lines(tmp_path / "out" / "data.jsonl") if RESTORE in r["reply"]}
    assert restored == wrong
    with pytest.raises(ClearValueError, match="needs the base model"):
        build(source, tmp_path / "no", plan, helpers=ONE)


def test_the_base_model_is_the_plain_one(built, toy):
    examples = read_examples(built[0])[:2]
    base = BaseModel(str(toy / "model"), device="cpu", max_new_tokens=4)
    together = base.answers(examples)
    assert together == [base.answers([e])[0] for e in examples]
    attached = attach(str(toy / "model"), lora=False, bridge=False, device="cpu")
    with attached.disabled():
        text = replace(attached.config.text, max_new_tokens=4)
        assert attached.answer(examples[0].load(), examples[0].question, text=text).text == together[0]


def test_a_judge_decides_where_the_base_models_words_differ(source, tmp_path):
    class Lenient:
        name = "lenient"

        def mark(self, questions, truths, answers):
            assert set(answers) == {"something else"}
            return [{"a kind 0": 1.0, "a kind 1": None}.get(t, 0.0) for t in truths]

    plan = Plan(pathway="backbone", splits={"train": 1.0}, restore_share=None)
    base = Knowing({"0-a", "1-a", "2-a"})
    used = Helpers(base=base, judge=Lenient(), workers=1, progress=False)
    with pytest.raises(EndpointError, match="1 rows were not judged by lenient"):
        build(source, tmp_path / "out", plan, helpers=used)
    used = replace(used, leave_unanswered=True)
    summary = build(source, tmp_path / "out", plan, helpers=used)
    restored = {r["id"] for r in lines(tmp_path / "out" / "data.jsonl") if RESTORE in r["reply"]}
    assert restored == {"2-a"}
    assert summary["rejected"] == {"pathway": {"no judgement": 1}}


# ------------------------------------------------------------------------------------------------------ streams


def test_a_stream_of_datasets_is_drawn_by_seed_and_goes_on(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    # It waits five seconds whenever the reading of a table ends.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    rows = [{"id": str(i), "question": f"Q{i}?", "answer": f"A{i}", "image": None} for i in range(8)]
    for i, row in enumerate(rows):
        row["image"] = {"bytes": base64.b64decode(picture(i, (96, 80))), "path": None}
    features = datasets.Features(
        {**dict.fromkeys(("id", "question", "answer"), datasets.Value("string")), "image": datasets.Image()}
    )
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "set" / "train.parquet"))
    plan = Plan(limit=5, splits={"train": 1.0}, restore_share=None)
    stream = Stream(str(tmp_path / "set"))
    summary = build(stream, tmp_path / "out", plan, helpers=ONE)
    assert (summary["read"], summary["rows"]["train"]) == (5, 5)
    found = {e.id: e for e in read_examples(tmp_path / "out")}
    for name, example in found.items():
        assert (example.question, example.answer) == (f"Q{name}?", f"A{name}")
        assert example.clean_image.read_bytes() == rows[int(name)]["image"]["bytes"]
    assert not (tmp_path / "out" / "source").exists()
    # Stopped while rows were drawn: the same ones come again.
    from clear_adapters.datasets.builder import stream as streams

    entry = streams._entry
    monkeypatch.setattr(streams, "_entry", lambda row, n, *more: entry(row, n, *more) if n < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(stream, tmp_path / "again", plan, helpers=ONE)
    monkeypatch.setattr(streams, "_entry", lambda row, n, *more: entry(row, n, *more) if n >= 2 else 1 / 0)
    build(stream, tmp_path / "again", plan, helpers=ONE)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    with pytest.raises(ClearValueError, match="cannot be read as a stream"):
        build(Stream(str(tmp_path / "set"), split="no"), tmp_path / "bad", Plan(limit=1), helpers=ONE)


def test_a_build_of_the_hub_reads_one_commit_and_names_it(tmp_path, monkeypatch):
    """The branch moves between two runs of a build."""
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import HfApi

    from clear_adapters.datasets.builder import stream as streams

    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    names = photographs(tmp_path / "set", 3)
    rows = [{"file_name": n, "id": n, "question": "Q?", "answer": "A"} for n in names]
    write_rows(tmp_path / "set" / "metadata.jsonl", rows)
    load, commits, read = datasets.load_dataset, iter(["1" * 40, "2" * 40]), []

    def load_here(name, config, *, revision, **more):
        read.append((name, revision))
        return load(str(tmp_path / "set"), config, **more)

    def dataset_info(self, name, *, revision):
        return SimpleNamespace(sha=next(commits))

    monkeypatch.setattr(datasets, "load_dataset", load_here)
    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(streams, "lies_below", lambda *_: True)
    entry = streams._entry
    monkeypatch.setattr(streams, "_entry", lambda row, n, *more: entry(row, n, *more) if n < 2 else 1 / 0)
    plan = Plan(splits={"train": 1.0}, restore_share=None)
    with pytest.raises(ZeroDivisionError):
        build(Stream("o/n", revision="main"), tmp_path / "out", plan, helpers=ONE)
    monkeypatch.setattr(streams, "_entry", entry)
    summary = build(Stream("o/n", revision="main"), tmp_path / "out", plan, helpers=ONE)
    assert read == [("o/n", "1" * 40)] * 2
    assert summary["rows"]["train"] == 3
    assert (summary["source"]["revision"], summary["source"]["commit"]) == ("main", "1" * 40)
    assert build(Stream("o/n", revision="main"), tmp_path / "out", plan, helpers=ONE) == summary


@pytest.mark.parametrize("error", [ConnectionError("reset"), RuntimeError("closed"), FileNotFoundError()])
def test_a_picture_that_the_hub_does_not_give_costs_no_row(tmp_path, monkeypatch, error):
    file_utils = pytest.importorskip("datasets.utils.file_utils")
    from clear_adapters.datasets.builder.stream import _entry

    def broken(*_):
        raise error

    monkeypatch.setattr(file_utils, "xopen", broken)
    row = {"image": {"path": "hf://datasets/o/n@a/0.jpg", "bytes": None}, "question": "Q?"}
    if isinstance(error, FileNotFoundError):
        assert "image" not in _entry(row, 0, tmp_path, lambda path: True)
        return
    with pytest.raises(ClearValueError, match=f"0.jpg' could not be read: {error}.*run again"):
        _entry(row, 0, tmp_path, lambda path: True)


def test_a_stream_reads_pictures_that_are_named(tmp_path):
    from clear_adapters.datasets.builder.stream import _entry

    (name,) = photographs(tmp_path / "in", 1)
    path = tmp_path / "in" / name
    (tmp_path / "out").mkdir()
    for given in ({"path": str(path), "bytes": None}, {"path": None, "bytes": path.read_bytes()}):
        entry = _entry(
            {"image": given, "question": "Q?", "answers": ["A", "B"]}, 3, tmp_path / "out", lambda path: True
        )
        assert (tmp_path / "out" / entry.pop("image")).read_bytes() == path.read_bytes()
        assert entry == {"id": "row-3", "question": "Q?", "answer": "A", "answers": ["A", "B"]}
    gone = {"image": {"path": "gone.jpg", "bytes": None}}
    assert "image" not in _entry(gone, 0, tmp_path / "out", lambda path: True)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_a_stream_reads_no_file_outside_its_dataset(tmp_path, monkeypatch, declared, several):
    """Neither by a struct that looks like a picture nor by a column that is declared as pictures."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    photographs(tmp_path / "private", 1)
    photographs(tmp_path / "set" / "images", 1)
    own = str(tmp_path / "set" / "images" / "0.jpg")
    (tmp_path / "set" / "link.jpg").symlink_to(tmp_path / "private" / "0.jpg")
    outside = [
        str(tmp_path / "private" / "0.jpg"),
        str(tmp_path / "set" / ".." / "private" / "0.jpg"),
        str(tmp_path / "set" / "link.jpg"),
        f"{tmp_path}/private/0.jpg::{own}",
    ]
    column = "images" if several else "image"
    rows = []
    for i, path in enumerate([own, *outside]):
        shown = {"path": path, "bytes": None}
        rows.append({"id": str(i), column: [shown] if several else shown, "question": "Q?", "answer": "A"})
    write_rows(tmp_path / "set" / "train.jsonl", rows)
    if declared:
        kind = f"\n    {'list' if several else 'dtype'}: image"
        texts = "".join(f"\n  - name: {n}\n    dtype: string" for n in ("id", "question", "answer"))
        card = f"---\ndataset_info:\n  features:\n  - name: {column}{kind}{texts}\n---\n"
        (tmp_path / "set" / "README.md").write_text(card)
    plan = Plan(splits={"train": 1.0}, restore_share=None)
    stream = Stream(str(tmp_path / "set"))
    if declared:
        summary = build(stream, tmp_path / "out", plan, helpers=ONE)
        assert summary["rejected"] == {"source": {"no picture": 4}}
        assert [r["id"] for r in lines(tmp_path / "out" / "data.jsonl")] == ["0"]
    else:
        with pytest.raises(ClearValueError, match="names no picture"):
            build(stream, tmp_path / "out", plan, helpers=ONE)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf://datasets/o/n@abc/train/0.jpg", True),
        ("zip://0.jpg::hf://datasets/o/n@abc/a.zip", True),
        ("zip://0.jpg::https://hub/datasets/o/n/resolve/abc/a.zip", True),
        ("hf://datasets/o/n@abc/../../x/0.jpg", False),
        ("hf://datasets/o/other@abc/0.jpg", False),
        ("hf://datasets/o/nn/0.jpg", False),
        ("https://hub.evil/datasets/o/n/resolve/abc/a.jpg", False),
        ("/private/0.jpg::hf://datasets/o/n@abc/a.zip", False),
        ("file:///private/0.jpg::hf://datasets/o/n@abc/a.zip", False),
        ("zip://0.jpg::/private/a.zip", False),
        ("http://169.254.169.254/latest", False),
        ("/private/0.jpg", False),
        ("", False),
    ],
)
def test_a_picture_of_the_hub_lies_below_its_dataset(path, expected):
    from clear_adapters.datasets.builder.stream import lies_below

    assert lies_below(path, "o/n", "https://hub") is expected


def test_what_a_teacher_would_cost_is_foreseen(source):
    found, expected = foresee(source, Plan(writer="teacher"))
    assert (expected.requests, expected.most) == (19, 57)  # 80 % of 24
    assert len(found.rows) == 24
    assert foresee(source, Plan())[1].requests == 0
