"""The quick start on a random toy: rows, table, sheet and JSON."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from clear_adapters import list_degradations
from clear_adapters.engine import Engine
from clear_adapters.errors import ClearValueError
from clear_adapters.quickstart import draw_sheet, render_table, run, sample_rows, save_image

KEYS = ["question", "truth", "degradation", "severity", "base_answer", "clear_answer", "restored"]


def test_rows_are_seeded_held_out_and_various():
    rows = sample_rows(8, 0)
    assert [r.to_json() for r in rows] == [r.to_json() for r in sample_rows(8, 0)]
    assert [r.question.text for r in rows] != [r.question.text for r in sample_rows(8, 1)]
    assert {r.severity for r in rows} == {"clean", "low", "mid", "high"}
    assert {r.question.kind for r in rows} == {"choice", "open", "pair", "spatial", "options", "reading"}
    known = {d.name for d in list_degradations()}
    assert len({r.degradation for r in rows}) == 8
    for row in rows:
        same = np.array_equal(np.asarray(row.clean), np.asarray(row.degraded))
        assert same == (row.severity == "clean")
        assert (row.degradation == "none") == same
        assert same or row.degradation in known
        assert row.is_right(row.question.answer)
        assert not row.is_right("nonsense")


def test_counts_are_compared_as_numbers_and_signs_as_texts():
    rows = {r.question.kind: r for r in sample_rows(8, 0)}
    count, sign = rows["spatial"], rows["reading"]
    count.question = replace(count.question, answer="3", options=())
    sign.question = replace(sign.question, answer="07")
    assert count.is_right("three")
    assert sign.is_right("07")
    assert not sign.is_right("7")


def test_pictures_are_degraded_as_their_row_says(monkeypatch):
    seen = []

    def spy(image, name, *, severity, seed):
        seen.append((name, severity, seed))
        return image

    monkeypatch.setattr("clear_adapters.quickstart.degrade", spy)
    rows = sample_rows(8, 0)
    assert [(n, s) for n, s, _ in seen] == [
        (r.degradation, r.severity) for r in rows if r.severity != "clean"
    ]
    assert len({seed for _, _, seed in seen}) == 7


def test_a_whole_quick_start(toy, tmp_path):
    out = Console(file=io.StringIO(), width=120)
    sheet, rows_file = tmp_path / "new" / "sheet.png", tmp_path / "rows.json"
    rows = run(str(toy / "model"), str(toy / "adapter"), output=sheet, json_file=rows_file, console=out)
    listed = json.loads(rows_file.read_text())
    assert len(listed) == len(rows) == 8
    assert all(list(r) == KEYS for r in listed)
    assert [r["question"] for r in listed] == [r.question.text for r in sample_rows(8, 0)]
    assert all(isinstance(r["restored"], bool) for r in listed)
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert image.width > 1000
    text = out.file.getvalue()
    assert "right: base" in text
    assert all(
        word in text
        for word in ("question", "truth", "base", "CLEAR", "degradation", "restored", "lens_blur")
    )


def test_one_batched_pass_each_the_base_without_the_skill(toy, tmp_path, monkeypatch):
    calls = []
    answer = Engine.answer

    def spy(self, images, questions, **options):
        calls.append((len(images), options.get("plain", False), _enabled(self)))
        return answer(self, images, questions, **options)

    def _enabled(engine):
        layers = [m for m in engine.backbone.model.modules() if hasattr(m, "lora_A")]
        return any(not m.disable_adapters for m in layers)

    monkeypatch.setattr(Engine, "answer", spy)
    run(
        str(toy / "model"),
        str(toy / "adapter"),
        scenes=3,
        output=tmp_path / "s.png",
        console=Console(file=io.StringIO()),
    )
    assert calls == [(3, True, False), (3, False, True)]


def test_the_sheet_shows_restored_pictures_and_marks_answers():
    rows = sample_rows(3, 0)
    without = np.asarray(draw_sheet(rows))
    rows[0].restored, rows[0].restored_image = True, Image.new("RGB", (128, 128), (1, 2, 250))
    rows[0].clear_answer = rows[0].question.answer
    rows[1].clear_answer = "long " * 50
    shown = np.asarray(draw_sheet(rows))
    assert shown.shape == without.shape
    assert (shown == (1, 2, 250)).all(-1).sum() == 200 * 200
    assert not (without == (1, 2, 250)).all(-1).any()
    out = Console(file=io.StringIO(), width=120)
    out.print(render_table(rows))
    assert "✓" in out.file.getvalue()
    assert "✗" in out.file.getvalue()


@pytest.mark.parametrize("count", [1, 2, 17])
def test_any_number_of_scenes_fits_the_sheet(count):
    assert draw_sheet(sample_rows(count, 3)).width == (624 + 24) * min(2, count)


def test_a_file_name_without_a_format_is_refused_before_any_work(toy, tmp_path):
    with pytest.raises(ClearValueError, match="ending"):
        run("nowhere", "nowhere", output=tmp_path / "sheet.txt")
    with pytest.raises(ClearValueError, match="at least one"):
        sample_rows(0, 0)
    save_image(Image.new("RGB", (4, 4)), tmp_path / "deep" / "a.webp")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.webp"]
