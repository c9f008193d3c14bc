"""What ships: sizes, provenance, and that the built-in model and adapter do on a CPU what they are there for."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from clear_adapters import attach, degrade
from clear_adapters.degradations import draw
from clear_adapters.scoring import score
from clear_adapters.world import KINDS, ask, render, sample_scene

ROOT = Path(__file__).parents[1]
BUILTIN = ROOT / "clear_adapters" / "builtin"
BASE, ADAPTER = BUILTIN / "bagel-tiny", BUILTIN / "clear-bagel-tiny"


@pytest.fixture(scope="module")
def attached():
    return attach("builtin:bagel-tiny", adapter="builtin:clear-bagel-tiny", device="cpu")


def held_out(count: int):
    """(picture, question) pairs of every kind from held-out scenes."""
    found, seed = [], 7_000_000
    while len(found) < count:
        scene = sample_scene(seed, "heldout")
        wanted = KINDS[len(found) % len(KINDS)]
        found += [(render(scene), q) for q in ask(scene, seed=seed, kinds=(wanted,), n=1)][:1]
        seed += 1
    return found


def test_sizes():
    weights = list(BASE.glob("*.safetensors"))
    assert len(weights) == 1
    assert weights[0].stat().st_size <= 12_000_000
    assert sum(f.stat().st_size for f in ADAPTER.rglob("*") if f.is_file()) <= 1_000_000


def test_tracked_files_stay_small():
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.decode().split("\0") if name]
    assert sum(f.stat().st_size for f in files if f.is_file()) <= 36 * 2**20


@pytest.mark.parametrize("folder", [BASE, ADAPTER], ids=lambda f: f.name)
def test_provenance_is_recorded(folder):
    if folder is BASE:
        record = json.loads((folder / "provenance.json").read_text())
    else:
        record = json.loads((folder / "clear_config.json").read_text())["provenance"]
    assert {"seed", "commit", "device", "steps"} <= set(record)


def test_no_pickles_ship():
    assert not [f for f in BUILTIN.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_the_base_sees(attached):
    """Far above what guessing gives (0.31 over the kinds), on pictures that no training run has seen."""
    rows = held_out(48)
    with attached.disabled():
        replies = attached.answer([p for p, _ in rows], [q.text for _, q in rows], batch_size=48)
    right = [
        bool(score(r.text, q.answer, options=q.options if q.is_lettered else None))
        for r, (_, q) in zip(replies, rows, strict=True)
    ]
    assert np.mean(right) > 0.85


def test_the_adapter_sees_and_leaves_clean_pictures_alone(attached):
    rows = held_out(48)
    replies = attached.answer([p for p, _ in rows], [q.text for _, q in rows], batch_size=48)
    right = [
        bool(score(r.text, q.answer, options=q.options if q.is_lettered else None))
        for r, (_, q) in zip(replies, rows, strict=True)
    ]
    assert np.mean(right) > 0.8
    assert np.mean([r.restored for r in replies]) < 0.1


def test_the_adapter_keeps_to_the_protocol(attached):
    rows = held_out(12)
    bad = [degrade(p, draw(i), severity="high", seed=i) for i, (p, _) in enumerate(rows)]
    replies = attached.answer(bad, [q.text for _, q in rows])
    assert np.mean([r.answered for r in replies]) > 0.95
    restored = attached.answer(bad[:4], [q.text for _, q in rows[:4]], restore="always")
    assert all(r.restored for r in restored)
    assert all(r.restored_image.size == (128, 128) for r in restored)
