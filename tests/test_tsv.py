"""Tables in VLMEvalKit's form: read row by row, any row again by its place, and what is wrong named with its line."""

import csv
import tracemalloc

import pytest

from clear_adapters.datasets import tsv
from clear_adapters.datasets.tsv import TsvError, TsvFile, format_row


def table(tmp_path, text: str | bytes):
    path = tmp_path / "t.tsv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_rows_have_their_line_and_can_be_read_again(tmp_path):
    text = 'index\tquestion\timage\n1\t"two\nlines\tand ""quotes"""\tAAA\n\n2\tplain é\t\r\n3\tlast\tCCC'
    file = TsvFile(table(tmp_path, text))
    assert file.columns == ("index", "question", "image")
    rows = list(file.rows())
    assert [r.line for r in rows] == [2, 5, 6]
    assert rows[0].values == {"index": "1", "question": 'two\nlines\tand "quotes"', "image": "AAA"}
    assert rows[1].values == {"index": "2", "question": "plain é"}
    assert [file.read(r) for r in reversed(rows)] == rows[::-1]
    assert file.read((5, rows[1].offset)) == rows[1]
    assert [r.values for r in TsvFile(table(tmp_path, "\n" + text)).rows()] == [r.values for r in rows]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    assert TsvFile(table(tmp_path, "\ufeffindex\timage\n1\t\ufeffx\n")).columns == ("index", "image")


def test_what_is_written_is_read(tmp_path):
    fields = ["1", 'a "b"\tc', "two\nlines", "", "plain"]
    path = table(tmp_path, format_row(list("abcde")) + format_row(fields))
    with path.open(newline="") as opened:
        assert list(csv.reader(opened, delimiter="\t"))[1] == fields
    assert next(TsvFile(path).rows()).values == dict(zip("abce", fields[:3] + fields[4:], strict=True))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a\tb\n1\t2\n3\n", 3, r"the row is cut off or damaged \(1 fields for 2 columns\)"),
        ("a\tb\n1\t2\t3\n", 2, "3 fields for 2 columns"),
        ('a\tb\n1\t"never closed\n2\t3\n', 2, "cut off or damaged"),
        ('a\tb\n1\t"x"y\n', 2, "cut off or damaged"),
        (b"a\tb\n1\t\xff\xfe\n", 2, "not UTF-8"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, text, line, words):
    path = table(tmp_path, text)
    with pytest.raises(TsvError, match=words) as caught:
        list(TsvFile(path).rows())
    assert caught.value.line == line
    assert f"{path}, line {line}: " in str(caught.value)


def test_bad_rows_can_be_left_out(tmp_path):
    bad: list[TsvError] = []
    file = TsvFile(table(tmp_path, b"a\tb\n1\n2\tx\n3\t\xff\n4\ty\n"))
    assert [r.values["a"] for r in file.rows(bad)] == ["2", "4"]
    assert [e.line for e in bad] == [2, 4]


def forty_rows(tmp_path, five, other="{i}\tquestion\tA\n"):
    return table(
        tmp_path, "a\tb\tc\n" + "".join((five if i == 5 else other).format(i=i) for i in range(1, 41))
    )


@pytest.mark.parametrize(
    ("five", "other"),
    [
        ('{i}\t"never closed\tA\n', "{i}\tquestion\tA\n"),
        ('{i}\t"never closed\tA\n', '{i}\t"a ""quoted"" question"\tA\n'),
        ('{i}\t"never closed\tA\n', '{i}\t"two\nlines"\tA\n'),
        ('{i}\t"never closed\tA\n', '{i}\tquestion\t12"\n'),  # closes it, with other columns
    ],
)
def test_a_quote_that_is_not_closed_costs_one_row(tmp_path, five, other):
    path = forty_rows(tmp_path, five, other)
    bad: list[TsvError] = []
    rows = list(TsvFile(path).rows(bad))
    assert [int(r.values["a"]) for r in rows] == [i for i in range(1, 41) if i != 5]
    assert len(bad) == 1
    assert bad[0].line == 2 + 4 * (2 if "\n" in other[:-1] else 1)
    assert [TsvFile(path).read(r) for r in rows] == rows
    with pytest.raises(TsvError, match="the row is cut off or damaged"):
        list(TsvFile(path).rows())


@pytest.mark.parametrize("five", ['{i}\t"never closed\tA\n', "{i}\tquestion\t" + "A" * 300_000 + "\n"])
def test_a_row_takes_only_so_many_bytes(tmp_path, monkeypatch, five):
    monkeypatch.setattr(tsv, "_LONGEST_ROW", 250_000)
    path = forty_rows(tmp_path, five, "{i}\tquestion\t" + "A" * 100_000 + "\n")
    bad: list[TsvError] = []
    file = TsvFile(path)
    tracemalloc.start()
    found = [r.values["a"] for r in file.rows(bad)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [str(i) for i in range(1, 41) if i != 5]
    assert [(e.line, "more than 250,000 bytes" in e.reason) for e in bad] == [(6, True)]
    assert peak < 3_000_000  # the file has 4 MB, of which an open quote took four times as much


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), ("a\tb\ta\n", "column 'a' stands twice"), (b"\xff\n", "line 1: not UTF-8")],
)
def test_a_header_that_cannot_be_used(tmp_path, text, words):
    with pytest.raises(TsvError, match=words):
        TsvFile(table(tmp_path, text))


def test_a_missing_file_or_column_is_named(tmp_path):
    with pytest.raises(TsvError, match=r"no\.tsv: cannot be read"):
        TsvFile(tmp_path / "no.tsv")
    with pytest.raises(TsvError, match="line 1: column 'image' is missing; the columns are a, b"):
        TsvFile(table(tmp_path, "a\tb\n")).require("a", "image")


def test_memory_stays_flat(tmp_path):
    path = tmp_path / "large.tsv"
    with path.open("w") as opened:
        opened.write("index\timage\n")
        for i in range(64):
            opened.write(f"{i}\t{'A' * 500_000}\n")
    file = TsvFile(path)
    tracemalloc.start()
    count = sum(1 for _ in file.rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 64
    assert peak < 6_000_000  # the file has 32 MB


def test_a_row_that_is_gone_is_said_so(tmp_path):
    path = table(tmp_path, "a\tb\n1\t2\n")
    file = TsvFile(path)
    row = next(file.rows())
    path.write_text("a\tb\n")
    with pytest.raises(TsvError, match="has changed"):
        file.read(row)
