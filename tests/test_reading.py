"""How much of a latent is read: the measure tells a reader from one that looks away."""

import sys
from pathlib import Path

import pytest
import torch

from clear_adapters import attach
from clear_adapters.datasets.world import build as build_world
from clear_adapters.results import read_result

FOLDER = Path(__file__).parents[1] / "benchmarks" / "degraded_world"
sys.path.insert(0, str(FOLDER))

import reading  # noqa: E402
from readme import between  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading") / "data"
    return build_world(folder, 24, split="heldout", workers=1, progress=False, questions_per_scene=1)


@pytest.fixture(scope="module")
def model():
    return attach("builtin:bagel-tiny", "builtin:clear-bagel-tiny-sft", device="cpu", dtype="float32")


def test_a_latent_that_is_read_makes_a_difference_and_one_that_is_drowned_does_not(data, model):
    rows = reading.rows_of(data, 4)
    found = {source: reading.read(model, rows, own, 4) for source, own in reading.SOURCES.items()}
    assert found["true"]["cross_entropy"] < found["own"]["cross_entropy"]
    assert reading.bridge_lengths(model, rows)["added"] == 0
    with torch.no_grad():
        model.bridge.up.bias += 1e6
    try:
        lengths = reading.bridge_lengths(model, rows)
        drowned = [reading.read(model, rows, own, 4)["cross_entropy"] for own in reading.SOURCES.values()]
    finally:
        with torch.no_grad():
            model.bridge.up.bias -= 1e6
    assert lengths["added_to_all"] == pytest.approx(lengths["added"], rel=1e-3)
    assert lengths["added"] > 1e4 * lengths["native"]
    assert drowned[0] == pytest.approx(drowned[1], abs=1e-3)


def test_it_writes_a_result_and_refuses_too_few_rows(data, tmp_path, capsys):
    given = [
        "--data",
        str(data),
        "--adapters",
        "one=builtin:clear-bagel-tiny",
        "--output",
        str(tmp_path / "r.json"),
    ]
    assert reading.main([*given, "--limit", "2", "--batch-size", "1"]) == 0
    (facts,) = read_result(tmp_path / "r.json").payload["adapters"]
    assert (facts["label"], facts["stage"]) == ("one", "grpo")
    assert reading.main([*given, "--limit", "999"]) == 2
    assert "lower --limit" in capsys.readouterr().err


def test_the_table_in_the_readme_is_that_of_the_official_result():
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    shown = between(text, reading.MARKERS)
    assert shown == reading.render(read_result(FOLDER.parent / "results" / "reading.json"))
