"""Files of the base benchmarks: what is read from them, what is asked, and what is refused with file and line."""

import os
from pathlib import Path

import pytest

from clear_adapters.datasets.tsv import TsvError
from clear_adapters.mmd_bench import miniature
from clear_adapters.mmd_bench.questions import read_questions
from clear_adapters.mmd_bench.tasks import CLEAN, CORRUPTIONS, TASKS, get_task
from tests.bench_files import CHOICE, TABLES, base_folder, choice, mmbench, mmvp, picture, write

PROMPTS = Path(__file__).parent / "data" / "mmd_bench" / "prompts"


def test_names_of_files_are_those_of_the_generators():
    mmstar, rbench = get_task("mmstar"), get_task("rbench")
    assert mmstar.file_name("clean") == "MMStar.tsv"
    assert mmstar.file_name("high") == "MMStar_LOW_LEVEL_HIGH.tsv"
    assert mmstar.file_name("lens_blur") == "MMStar_lens_blur.tsv"
    assert get_task("mmbench").file_name("low") == "MMBench_DEV_EN_V11_LOW_LEVEL_LOW.tsv"
    assert rbench.conditions(("clean", "high")) == ("real",)
    assert rbench.file_name("real") == "R-Bench-Dis.tsv"
    assert {t.name: t.published for t in TASKS if t.published} == {
        "mmbench": 1292,
        "mmvet": 218,
        "mmvp": 300,
        "cvbench2d": 1438,
        "mmstar": 1500,
        "realworldqa": 765,
        "rbench": 495,
    }


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_the_prompts_are_the_golden_ones(task, tmp_path):
    """CLEAR_UPDATE_GOLDEN=1 writes them anew; a change of words must raise PROMPT_VERSION."""
    if task.name == "miniature":
        path = miniature.write_clean(tmp_path, 12)
    else:
        path = base_folder(tmp_path, [task.name]) / task.file_name(CLEAN)
    questions = read_questions(path, task).questions
    text = "\n---\n".join(q.prompt for q in questions[:8]) + "\n"
    golden = PROMPTS / f"{task.name}.txt"
    if os.environ.get("CLEAR_UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_rotations_share_a_group_and_the_first_ones_picture(tmp_path):
    task = get_task("mmbench")
    read = read_questions(base_folder(tmp_path, ["mmbench"]) / task.file_name(CLEAN), task)
    assert len(read.questions) == 12
    assert {q.group for q in read.questions} == {"1", "2", "3"}
    first, rotated = (next(q for q in read.questions if q.index == i) for i in ("2", "2000002"))
    assert rotated.picture == first.picture == first.place
    assert read.image(rotated).tobytes() == read.image(first).tobytes()
    assert rotated.options != first.options
    assert rotated.options[rotated.truth] == first.options[first.truth]
    assert [q.group for q in read.first(2).questions] == ["1", "2"] * 4


def test_a_column_g_index_names_the_group(tmp_path):
    columns, rows = mmbench(2)
    for row in rows:
        row[0], row[9] = (
            str(int(row[0]) + 7_000_000),
            row[9] if len(row[9]) > 9 else str(int(row[9]) + 7_000_000),
        )
        row.append(str((int(row[0]) - 1) % 1_000_000 + 7_000_001))
    path = write(tmp_path / "t.tsv", [*columns, "g_index"], rows)
    assert {q.group for q in read_questions(path, get_task("mmbench")).questions} == {"7000001", "7000002"}


def test_halves_of_a_pair_are_neighbours_by_index(tmp_path):
    columns, rows = mmvp()
    path = write(tmp_path / "t.tsv", columns, rows[::-1])
    read = read_questions(path, get_task("mmvp"))
    assert {q.index: q.group for q in read.questions} == {str(i): str(i - 1 + i % 2) for i in range(1, 7)}
    assert sorted(q.index for q in read.first(4).questions) == ["3", "4", "5", "6"]


def test_letters_in_brackets_and_rows_without_options_or_pictures(tmp_path):
    columns, rows = choice(4)
    rows[0][7] = "(a)"
    rows[1][3:7] = [""] * 4
    rows[1][7] = "Downhill"
    rows[2][9] = ""
    read = read_questions(write(tmp_path / "t.tsv", columns, rows), get_task("realworldqa"))
    assert [q.truth for q in read.questions] == ["A", "Downhill", "B"]
    assert read.questions[1].options == {}
    assert read.questions[1].prompt == read.questions[1].text
    assert read.without_picture == 1


def broken(case: str) -> tuple[str, list[str], list[list[str]]]:
    columns, rows = choice(5)
    task = "mmstar"
    if case == "duplicate":
        rows[3][0] = "1"
    elif case == "empty answer":
        rows[3][7] = ""
    elif case == "no such option":
        rows[3][7] = "E"
    elif case == "points nowhere":
        rows[3][9] = "77"
    elif case == "points at a pointer":
        rows[3][9], rows[1][9] = "1", "0"
    elif case == "points at itself":
        rows[3][9] = "3"
    elif case == "no index":
        rows[3][0] = ""
    elif case == "empty question":
        rows[3][1] = ""
    elif case == "several pictures":
        rows[3][9] = f"['{picture(1)}', '{picture(2)}']"
    elif case == "lone rotation":
        task, (columns, rows) = "mmbench", mmbench(2)
        rows = [*rows[:3], ["3000009", *rows[3][1:]]]
    elif case == "half a pair":
        task, (columns, rows) = "mmvp", mmvp()
        rows[3][1] = "Is the window open?"
    elif case == "no number":
        task, (columns, rows) = "mmbench", mmbench(2)
        rows[3][0] = "three"
    return task, columns, rows


CASES = {
    "duplicate": "line 5: index '1' stands in line 3 already",
    "empty answer": "line 5: the answer is empty",
    "no such option": "line 5: the answer 'E' is none of the options A, B, C, D",
    "points nowhere": "line 5: points at the picture of row '77', which is not there",
    "points at a pointer": "line 5: points at the picture of row '1', which holds no picture of its own",
    "points at itself": "line 5: the picture is said to be that of row '3', which is this row",
    "no index": "line 5: the row has no index",
    "empty question": "line 5: the question is empty",
    "several pictures": "line 5: several pictures in one row",
    "lone rotation": "a rotation of row '9', which is not there",
    "half a pair": "line 4: row '3' has no other half that asks the same",
    "no number": "index 'three' is no whole number, which a circle is told by",
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_row_is_named_or_left_out_with_its_group(tmp_path, case):
    task, columns, rows = broken(case)
    path = write(tmp_path / "t.tsv", columns, rows)
    with pytest.raises(TsvError) as caught:
        read_questions(path, get_task(task))
    assert f"{path}, line " in str(caught.value)
    assert CASES[case] in str(caught.value)
    read = read_questions(path, get_task(task), skip_bad=True)
    assert any(CASES[case].split(": ", 1)[-1] in e.reason for e in read.skipped)
    sizes = {g: sum(q.group == g for q in read.questions) for g in {q.group for q in read.questions}}
    # Of a row without a usable index nobody can say which group it is missing from.
    assert len(set(sizes.values())) == 1 or case in ("lone rotation", "no number")
    assert len(read.questions) + len(read.skipped) + read.left_with_group == len(rows)


def test_groups_are_left_out_whole(tmp_path):
    columns, rows = mmbench(3)
    rows[7][7] = ""  # a rotation of question 2
    path = write(tmp_path / "t.tsv", columns, rows)
    read = read_questions(path, get_task("mmbench"), skip_bad=True)
    assert {q.group for q in read.questions} == {"1", "3"}
    assert (len(read.skipped), read.left_with_group) == (1, 3)
    columns, rows = mmvp()
    rows[2][4] = ""
    read = read_questions(write(tmp_path / "p.tsv", columns, rows), get_task("mmvp"), skip_bad=True)
    assert [q.index for q in read.questions] == ["1", "2", "5", "6"]  # pairs do not shift
    assert (len(read.skipped), read.left_with_group) == (1, 1)


def test_columns_that_a_task_needs(tmp_path):
    for name, lost in (("cvbench2d", "prompt"), ("mmstar", "answer"), ("mmbench", "image")):
        columns, rows = TABLES[name]()
        at = columns.index(lost)
        path = write(
            tmp_path / "t.tsv", [c for c in columns if c != lost], [r[:at] + r[at + 1 :] for r in rows]
        )
        with pytest.raises(TsvError, match=f"line 1: column '{lost}' is missing"):
            read_questions(path, get_task(name))
    path = write(tmp_path / "t.tsv", ["index", "image_path", "question", "answer"], [])
    with pytest.raises(TsvError, match="named by path"):
        read_questions(path, get_task("mmstar"))
    with pytest.raises(TsvError, match="no question"):
        read_questions(write(tmp_path / "t.tsv", CHOICE, []), get_task("mmstar"))


@pytest.mark.parametrize("image", ["!" * 80, "QUJD" * 30, picture(0)[:200]])
def test_a_picture_that_cannot_be_decoded_is_named(tmp_path, image):
    columns, rows = choice(3)
    rows[1][9] = image
    path = write(tmp_path / "t.tsv", columns, rows)
    read = read_questions(path, get_task("mmstar"))
    with pytest.raises(TsvError, match=r"t\.tsv, line 3: the picture (is no base64|cannot be decoded)"):
        read.image(read.questions[1])


def test_the_digest_tells_questions_apart(tmp_path):
    task = get_task("mmstar")
    columns, rows = choice(3)
    first = read_questions(write(tmp_path / "a.tsv", columns, rows), task)
    rows[2][7] = "B" if rows[2][7] == "A" else "A"
    second = read_questions(write(tmp_path / "b.tsv", columns, rows), task)
    assert first.digest() != second.digest()
    assert len(CORRUPTIONS) == 16
