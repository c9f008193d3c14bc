"""The benchmark on the miniature world: its set, a whole run on a toy, and its report."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "degraded_world"
sys.path.insert(0, str(FOLDER))

import evaluate  # noqa: E402
import heldout  # noqa: E402
import report  # noqa: E402
import restorers  # noqa: E402
import summary  # noqa: E402
from readme import between  # noqa: E402

from clear_adapters import LatentSampling, TextSampling, attach  # noqa: E402
from clear_adapters.backbones.bagel.checkpoint import save_checkpoint  # noqa: E402
from clear_adapters.backbones.bagel.tiny import build as build_toy  # noqa: E402
from clear_adapters.prompts import get_protocol  # noqa: E402
from clear_adapters.results import ResultFile, read_result  # noqa: E402
from clear_adapters.world import KINDS  # noqa: E402

pytestmark = pytest.mark.timeout(300)

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    backbone = build_toy(0)
    save_checkpoint(folder / "model", backbone.model, backbone.autoencoder, backbone.tokenizer)
    attached = attach(str(folder / "model"))
    attached.config = replace(
        attached.config,
        protocol=get_protocol("tiny"),
        text=TextSampling(max_new_tokens=6),
        latent=LatentSampling(steps=3, guidance_text=1, guidance_image=1),
        provenance={"seed": 5},
    )
    for name in ("clear-0", "clear-1", "direct-0"):
        attached.save_pretrained(folder / name)
    attached.detach()
    return folder


def arguments(toy, output, *more):
    return [
        *("--model", str(toy / "model"), "--adapters", f"clear={toy / 'clear-0'},{toy / 'clear-1'}"),
        *(f"direct={toy / 'direct-0'}", f"sft={toy / 'clear-0'}", "--limit", "12", "--output", str(output)),
        *(
            "--device",
            "cpu",
            "--plain-tokens",
            "4",
            "--batch-size",
            "12",
            "--cache",
            str(toy / "cache"),
            *more,
        ),
    ]


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "result.json"
    assert evaluate.main(arguments(toy, output)) == 0
    return output


def test_the_set_is_balanced_seeded_and_held_out():
    items = [heldout.draw_item(0, i) for i in range(36)]
    assert [i.kind for i, _ in items] == list(KINDS) * 6
    assert all(scene.split == "heldout" for _, scene in items)
    assert items[:12] == [heldout.draw_item(0, i) for i in range(12)]
    assert (
        items[0][0].text != heldout.draw_item(1, 0)[0].text
        or items[0][0].seed != heldout.draw_item(1, 0)[0].seed
    )
    assert all(i.score(i.truth) is True for i, _ in items)
    pairs = [i for i, _ in items if i.kind == "pair"]
    assert pairs[0].text == pairs[1].text
    assert pairs[0].truth != pairs[1].truth
    assert len({i.degradation for i, _ in items}) >= 8


def test_pictures_have_one_corruption_at_growing_severity_and_come_from_the_cache(tmp_path):
    data = heldout.build(6, cache=tmp_path, workers=1)
    assert set(data.pictures) == {"clean", "low", "mid", "high"}
    assert data.pictures["high"].shape == (6, 256, 256, 3)
    assert (data.pictures["clean"][0] != data.pictures["high"][0]).any()
    saved = tmp_path / "heldout-v1-s0-n6-high.npy"
    np.save(saved, np.zeros_like(data.pictures["high"]))
    assert not np.asarray(heldout.build(6, cache=tmp_path, conditions=["high"]).pictures["high"]).any()
    with heldout.mp.get_context("spawn").Pool(1) as pool:  # what a worker makes is what this process makes
        assert (pool.apply(heldout.draw_pictures, (0, ("high",), 0))[0] == data.pictures["high"][0]).all()


@pytest.mark.parametrize(
    ("kind", "truth", "options", "answer", "expected"),
    [
        ("choice", "B", ("red", "blue"), "B.", True),
        ("choice", "B", ("red", "blue"), "A", False),
        ("choice", "B", ("red", "blue"), "??", None),
        ("spatial", "3", (), "three", True),
        ("spatial", "3", (), "4", False),
        ("spatial", "3", (), "many", None),
        ("spatial", "left", (), "Left.", True),
        ("reading", "07", (), "7", False),
        ("reading", "07", (), "07", True),
        ("open", "red star", (), "the red star", True),
    ],
)
def test_answers_are_compared_by_kind(kind, truth, options, answer, expected):
    item = heldout.Item(0, kind, "?", truth, options, "", "lens_blur", 0)
    assert item.score(answer) is expected


def test_restorers_repair_what_they_are_made_for():
    clean = heldout.draw_pictures(0, ("clean",), 4)[0]
    mean, deviation = clean.mean((0, 1)), clean.std((0, 1))
    dark = (clean * 0.3).astype(np.uint8)
    assert (
        restorers.psnr(restorers.gain_offset(dark, mean, deviation), clean) > restorers.psnr(dark, clean) + 15
    )
    noisy = np.clip(clean + np.random.default_rng(0).normal(0, 8, clean.shape), 0, 255).astype(np.uint8)
    assert restorers.classical(noisy).shape == clean.shape
    assert restorers.psnr(clean, clean) == 60
    assert restorers.ssim(clean, clean) == pytest.approx(1)
    assert restorers.ssim(noisy, clean) < 0.99
    soft = cv2.GaussianBlur(clean, (0, 0), 3)
    assert 0 < restorers.blur(clean) + 0.1 < restorers.blur(soft) < 1
    assert restorers.psnr(np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 16, np.uint8)) == pytest.approx(
        24.05, abs=0.01
    )


@pytest.mark.long
def test_what_is_restored_and_degraded_again_gives_the_input():
    data = heldout.build(24, conditions=("clean", "high"))
    chosen = [
        i for i, item in enumerate(data.items) if item.degradation in ("dark", "lens_blur", "jpeg")
    ] or [0]
    size = (128, 128)
    clean = [restorers.reduced(p, size) for p in data.pictures["clean"]]
    statistics = heldout.training_statistics(4)
    ways = restorers.measure(data, clean, statistics, 1)
    assert ways["restored"] == ways["clean"]
    poor = [restorers.reduced(p, size) for p in data.pictures["high"]]
    before = ways | {"classical": {"psnr": [1.0]}}  # it is not measured again
    beside = restorers.measure(data, poor, statistics, 1, known=before)
    assert beside == before | {"restored": ways["input"]}
    again = {w: np.median(np.array(ways[w]["again"])[chosen]) for w in ways}
    assert again["clean"] > again["input"] + 3


def test_a_whole_run_on_a_toy(finished, toy):
    result = read_result(finished)
    cells = result.payload["cells"]
    assert set(cells) == {
        *(f"{s}/{c}/0" for s in ("base", "direct", "sft", "clear") for c in ("clean", "low", "mid", "high")),
        *(f"clear/{c}/1" for c in ("clean", "low", "mid", "high")),
        *(f"base-warned/{c}/0" for c in ("clean", "high")),
        *(
            f"{family}-{mode}/{c}/0"
            for family in ("sft", "clear")
            for mode in ("always", "never", "degraded", "clean")
            for c in ("clean", "high")
        ),
    }
    assert all(len(c["correct"]) == 12 and c["seconds_per_question"] > 0 for c in cells.values())
    assert cells["clear-always/high/0"]["restored"] == "1" * 12
    assert cells["clear-never/high/0"]["restored"] == "0" * 12
    assert "restored" not in cells["base/high/0"]
    assert result.seeds == (5,)
    assert result.payload["set"]["n"] == 12
    assert str(toy) not in finished.read_text()
    ways = result.payload["restorations"]["ways"]
    assert set(ways) == {"clean", "input", "gain_offset", "classical", "sft-always", "clear-always"}
    assert all(len(v[m]) == 12 for v in ways.values() for m in ("psnr", "ssim", "blur", "again"))
    assert set(ways["clean"]["psnr"]) == {60}
    signs = result.payload["restorations"]["signs"]
    assert set(signs) == {"asked", "clean", "high", "sft-always", "clear-always"}
    assert len(signs["clean"]) == len(signs["clear-always"]) == signs["asked"].count("1") > 0
    assert finished.with_name("result_clear-always.jpg").is_file()
    assert finished.with_name("result_sft-always.jpg").is_file()
    text = report.render(result, full=True)
    assert "| SFT | GRPO |" in text
    assert "above SFT" in text


def test_a_run_goes_on_where_it_was(finished, toy, capsys, tmp_path):
    cut = tmp_path / "cut.json"
    content = json.loads(finished.read_text())
    gone = content["payload"]["cells"].pop("base/high/0")
    content["payload"]["cells"]["base/clean/0"]["correct"] = "111111111111"  # must be kept
    cut.write_text(json.dumps(content))
    more = ["--systems", "base", "--answers", str(tmp_path / "answers")]
    assert evaluate.main(arguments(toy, cut, *more)) == 0
    assert capsys.readouterr().out.count("is there already") == 3
    cells = read_result(cut).payload["cells"]
    assert cells["base/clean/0"]["correct"] == "1" * 12
    assert cells["base/high/0"]["correct"] == gone["correct"]
    assert len(json.loads((tmp_path / "answers" / "base_high_0.json").read_text())) == 12
    content["payload"]["cells"]["clear/low/0"]["adapter"]["digest"] = "another"
    cut.write_text(json.dumps(content))
    assert evaluate.main(arguments(toy, cut, "--systems", "clear", "--conditions", "low")) == 0
    assert capsys.readouterr().out.count("is there already") == 1


@pytest.mark.long
def test_parts_measured_side_by_side_are_merged(finished, toy, tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    high = ("--conditions", "high")
    assert evaluate.main(arguments(toy, first, *high, "--runs", "1")) == 0
    assert set(read_result(first).payload["cells"]) == {"clear/high/1"}
    assert evaluate.main(arguments(toy, second, *high, "--systems", "base,direct,sft-always")) == 0
    third = tmp_path / "third.json"
    assert evaluate.main(arguments(toy, third, *high, "--systems", "clear-always")) == 0
    capsys.readouterr()
    whole = tmp_path / "whole.json"
    more = ("--merge", str(first), str(second), str(third), "--systems", "base,direct,clear")
    assert evaluate.main(arguments(toy, whole, *high, *more)) == 0
    assert capsys.readouterr().out.count("is there already") == 3
    cells = read_result(whole).payload["cells"]
    assert set(cells) == {
        *("base/high/0", "direct/high/0", "sft-always/high/0"),
        *("clear-always/high/0", "clear/high/0", "clear/high/1"),
    }
    assert cells["clear/high/1"] == read_result(first).payload["cells"]["clear/high/1"]
    pictures = read_result(whole).payload["restorations"]
    assert {"sft-always", "clear-always"} < set(pictures["ways"])
    assert {"sft-always", "clear-always"} < set(pictures["signs"])
    elsewhere = json.loads(third.read_text()) | {"device": "another device"}
    third.write_text(json.dumps(elsewhere))
    both = tmp_path / "both.json"
    merged = ("--only-merge", "--merge", str(first), str(third))
    assert evaluate.main(arguments(toy, both, *merged)) == 0
    assert read_result(both).device == f"{read_result(first).device}, another device"
    another = json.loads(first.read_text())
    another["payload"]["model"]["digest"] = "another"
    second.write_text(json.dumps(another))
    before = whole.read_bytes()
    assert evaluate.main(arguments(toy, whole, "--merge", str(second))) == 2
    assert str(second) in capsys.readouterr().err
    assert whole.read_bytes() == before


def test_what_is_said_of_stage_3_is_what_its_logs_say():
    folder = FOLDER.parent / "results" / "grpo"

    def logged(name, key):
        lines = (folder / f"{name}.training" / "log.jsonl").read_text().splitlines()
        return [row[key] for row in map(json.loads, lines) if key in row]

    runs = [logged(f"clear{seed}", "reward/accuracy") for seed in range(3)]
    first, last = (
        100 * sum(map(sum, part)) / 60 for part in ([r[:20] for r in runs], [r[-20:] for r in runs])
    )
    decisions = logged("decision0", "reward/decision")
    early, later = sum(decisions[:3]) / 3, sum(decisions[17:20]) / 3
    text = " ".join((FOLDER.parent / "README.md").read_text().split())
    assert f"goes from {first:.0f} to {last:.0f} %" in text
    assert f"rises from {early:.2f} to {later:.2f} within 20 steps" in text


def test_a_time_limit_loses_nothing(toy, tmp_path, capsys):
    output = tmp_path / "r.json"
    assert (
        evaluate.main(arguments(toy, output, "--systems", "base", "--conditions", "clean", "--seconds", "0"))
        == 0
    )
    assert "stopped before base/clean/0" in capsys.readouterr().out
    assert not output.exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--systems", "clear-alway"], "clear-always"),
        (["--conditions", "hihg"], "high"),
        (["--runs", "2"], "'2'"),
        (["--plain-tokens", "5", "--systems", "base"], "--fresh"),
        (["--limit", "6", "--systems", "base"], "--fresh"),
        (["--adapters", "clear=nowhere/at all"], "no folder"),
        (["--adapters", "claer=somewhere"], "'clear'"),
        (["--adapters", "clear"], "FAMILY=ADAPTER"),
        (["--adapters", "clear="], "FAMILY=ADAPTER"),
        (["--adapters", "clear=a", "clear=b"], "each family once"),
        (["--systems", "bridge"], "nothing to measure"),
    ],
)
def test_what_it_refuses(finished, toy, capsys, more, words):
    before = finished.read_bytes()
    assert evaluate.main(arguments(toy, finished, *more)) == 2
    assert words in capsys.readouterr().err
    assert finished.read_bytes() == before


# ------------------------------------------------------------------------------------------------------- report


def result_of(cells, **more):
    payload = {
        "set": {"n": 6, "kinds": list(KINDS), "degradations": ["lens_blur"] * 3 + ["scan_lines"] * 3},
        "model": {"name": "builtin:bagel-tiny"},
        "cells": {
            f"{s}/{c}/{r}": {"system": s, "condition": c, "run": r, "correct": bits, "adapter": None} | extra
            for (s, c, r), (bits, extra) in cells.items()
        },
        **more,
    }
    return ResultFile("degraded_world", payload, "a device", "c", "2026-01-02T00:00:00+00:00", None, None, {})


SMALL = {
    ("base", "clean", 0): ("111110", {}),
    ("base", "high", 0): ("110000", {}),
    ("direct", "high", 0): ("111000", {}),
    ("direct", "high", 1): ("100000", {}),
    ("sft", "high", 0): ("110000", {"restored": "111100"}),
    ("clear", "high", 0): ("111000", {"restored": "111111"}),
    ("clear", "high", 1): ("111100", {"restored": "111110"}),
    ("clear-always", "high", 0): ("111000", {"restored": "111111"}),
    ("clear-clean", "high", 0): ("111111", {"restored": "111111"}),
}


def test_the_main_table_word_for_word():
    head = (
        "Right answers in % of 6 held-out questions [95 % interval]; model `builtin:bagel-tiny`, a device, 2026-01-02.\n\n"
        "| system | seeds | clean | low | mid | high |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| base | 1 | 83.3 [43.6, 97.0] | – | – | 33.3 [9.7, 70.0] |\n"
        "| direct LoRA | 2 | – | – | – | 33.3 [0.0, 75.2] |\n"
        "| CLEAR: SFT | 1 | – | – | – | 33.3 [9.7, 70.0] |\n"
        "| CLEAR: SFT + bridge + GRPO | 2 | – | – | – | 58.3 [16.7, 100.0] |\n"
    )
    modes = (
        "| GRPO, always restoring | 1 | – | – | – | 50.0 [18.8, 81.2] |\n"
        "| GRPO, reading the true clean latent | 1 | – | – | – | 100.0 [61.0, 100.0] |\n"
    )
    first = "| *CLEAR: SFT: restores* | 1 | – | – | – | 66.7 [30.0, 90.3] |\n"
    last = "| *CLEAR: SFT + bridge + GRPO: restores* | 2 | – | – | – | 91.7 [66.7, 100.0] |"
    assert report.main_table(result_of(SMALL), full=True) == head + modes + first + last
    assert report.main_table(result_of(SMALL), full=False) == head + last


def test_differences_are_paired_and_the_share_won_back_is_of_the_loss():
    p = result_of(SMALL).payload
    gate = summary.difference(p, ("clear-clean", "high"), ("clear-always", "high"))
    assert (gate.mean, gate.runs) == (0.5, 1)
    assert 0 < gate.low < 0.5 < gate.high <= 1
    against = summary.difference(p, ("clear", "high"), ("base", "high"))
    assert (against.mean, against.runs) == (pytest.approx(0.25), 2)
    assert summary.difference(p, ("clear-never", "high"), ("base", "high")) is None
    assert summary.won_back(p, "clear").mean == pytest.approx(0.5)
    assert summary.won_back(p, "bridge") is None
    same = summary.difference(p, ("base", "high"), ("base", "high"))
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    # Seed by seed: what was trained once stands against the same seed of the other, not against all.
    trained = summary.difference(p, ("clear", "high"), ("sft", "high"))
    assert (trained.mean, trained.runs) == (pytest.approx(1 / 6), 1)
    assert summary.difference(p, ("clear", "high"), ("direct", "high")).runs == 2


def test_restorations_are_medians_by_corruption():
    def way(psnr, ssim):
        return {"psnr": psnr, "ssim": [ssim] * 6, "blur": [0.2] * 6, "again": [22.0] * 6}

    ways = {
        "clean": way([60] * 6, 1.0),
        "input": way([10, 11, 12, 20, 20, 20], 0.5),
        "sft-always": way([14, 14, 13, 21, 22, 23], 0.6),
        "clear-always": way([15, 15, 14, 22, 23, 24], 0.6),
        "gain_offset": way([9] * 6, 0.4),
        "classical": way([8] * 6, 0.3),
    }
    signs = {"asked": "110000", "clean": "11", "high": "00", "sft-always": "10", "clear-always": "11"}
    result = result_of(SMALL, restorations={"ways": ways, "signs": signs})
    rows = summary.restorations(result.payload)
    assert [(name, n) for name, n, _ in rows] == [("lens_blur", 3), ("scan_lines", 3), ("all", 6)]
    assert rows[0][2]["sft-always"] == 14
    assert summary.restorations(result.payload, "ssim")[0][2]["sft-always"] == 0.6
    assert summary.gain(result.payload, "sft-always").mean == 2.5
    text = report.render(result, full=True)
    assert "| lens_blur | 3 | 11.0 / 0.50 | 9.0 / 0.40 | 8.0 / 0.30 | 14.0 / 0.60 | 15.0 / 0.60 |" in text
    assert "| PSNR, dB | 60.0 | 16.0 | 9.0 | 8.0 | 17.5 | 18.5 |" in text
    assert "| blur, 0 to 1 | 0.20 |" in text
    assert (
        "| the plain base reads the sign, % | 100.0 [34.2, 100.0] | 0.0 [0.0, 65.8] | – | – | 50.0 [" in text
    )
    assert "GRPO +1.0 dB [+1.0, +1.0] above SFT" in text
    assert "lens_blur" not in report.render(result)


def test_a_readme_gets_the_text_between_its_markers_and_keeps_the_rest(tmp_path, capsys):
    path = result_of(SMALL).write(tmp_path / "r.json")
    readme, full = tmp_path / "a.md", tmp_path / "b.md"
    full.write_text(f"x\n{report.MARKERS[0]}\n{report.MARKERS[1]}\n")
    readme.write_text("no markers")
    call = [str(path), "--readme", str(readme), "--full", str(full)]
    assert report.main(call) == 2
    assert report.MARKERS[0] in capsys.readouterr().err
    assert full.read_text() == f"x\n{report.MARKERS[0]}\n{report.MARKERS[1]}\n"
    readme.write_text(f"before\n{report.MARKERS[0]}\nold\n{report.MARKERS[1]}\nafter\n")
    assert report.main(call) == 0
    text = readme.read_text()
    assert report.main(call) == 0
    assert readme.read_text() == text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert between(text, report.MARKERS) == report.render(result_of(SMALL))
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_table_of_what_was_tried_is_that_of_its_results():
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert between(text, report.TRIED_MARKERS) == report.tried_table(report.TRIED)


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("README.md", "degraded_world"),
        ("benchmarks/README.md", "degraded_world"),
        ("benchmarks/README.md", "degraded_world_janus"),
    ],
)
def test_the_tables_in_the_readmes_are_those_of_the_official_results(name, result):
    official = read_result(RESULTS / f"{result}.json")
    shown = between((ROOT / name).read_text(encoding="utf-8"), report.section_of(official))
    assert shown == report.render(official, full=name != "README.md"), (
        f"run {FOLDER.name}/report.py {result}.json"
    )


def test_only_the_first_model_stands_in_the_main_readme(tmp_path):
    path = result_of(SMALL, model={"name": "builtin:janus-tiny", "digest": ""}).write(tmp_path / "r.json")
    full = tmp_path / "b.md"
    begin, end = report.SECTIONS["builtin:janus-tiny"]
    full.write_text(f"{begin}\n{end}\n")
    assert report.main([str(path), "--readme", str(tmp_path / "no such file"), "--full", str(full)]) == 0
    assert "| base |" in full.read_text()
