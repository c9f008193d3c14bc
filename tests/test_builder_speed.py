"""The speed benchmark of the set builder: it runs, and the table in the README is that of its result."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "speed"))

import builder  # noqa: E402
from readme import between  # noqa: E402

from clear_adapters.degradations import list_degradations  # noqa: E402
from clear_adapters.results import read_result  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "builder_speed.json"


def test_the_table_in_the_readme_is_that_of_the_result():
    result = read_result(RESULT)
    assert set(result.payload["rates"]) == {d.name for d in list_degradations()}
    text = builder.README.read_text(encoding="utf-8")
    shown = between(text, builder.MARKERS)
    assert shown == builder.render(result)


def test_peers_stand_beside_the_corruption_that_they_have():
    peers = {"rates": {"motion_blur": {"albumentations": {"name": "MotionBlur", "rate": 71.2}}}}
    rates = {name: {"formula": 60.4, "builder": 0.42} for name in ("motion_blur", "mean_shift")}
    lines = builder.rates({"rates": rates, "peers": peers}).splitlines()
    assert lines[2:] == [
        "| motion_blur | 60 | 0.4 | – | 71 (`MotionBlur`) |",
        "| mean_shift | 60 | 0.4 | – | – |",
    ]


def test_the_builder_makes_the_pictures_that_are_timed(tmp_path):
    pictures = np.load(builder.write_pictures(tmp_path / "p.npz"))["pictures"]
    assert pictures.shape == (builder.COUNT, builder.SIDE, builder.SIDE, 3)
    assert not np.array_equal(builder.formula("hsv_saturation", pictures[0]), pictures[0])
    builder.write_table(tmp_path, pictures[:2])
    made = builder.whole_way(str(tmp_path), "hsv_saturation", pictures[0])
    assert (made.written, len(made.pictures)) == (1, 1)


@pytest.mark.long
def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    output = tmp_path / "speed.json"
    monkeypatch.setattr(
        sys, "argv", ["builder.py", "--names", "graffiti", "--processes", "1", "--output", str(output)]
    )
    assert builder.main() == 0
    rates = json.loads(output.read_text())["payload"]["rates"]
    assert rates["graffiti"]["formula"] > rates["graffiti"]["builder"] > 1
    assert "| graffiti |" in capsys.readouterr().out
