"""A data set of the miniature world, drawn and degraded by several processes.

Every scene follows from the seed and its number alone, so the files are the same for any number of workers. A build
that was stopped goes on where it was: finished chunks leave a part file behind.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clear_adapters.datasets.example import DATA, decibels, psnr
from clear_adapters.degradations import SEVERITIES, degrade, draw
from clear_adapters.degradations.catalogue import Weights
from clear_adapters.degradations.corruption import Formulas
from clear_adapters.errors import ClearValueError
from clear_adapters.journal import claim, write_whole
from clear_adapters.workers import count_of, in_order, processes
from clear_adapters.world import KINDS, Question, Scene, ask, pair_scenes, render, sample_scene
from clear_adapters.world.scene import check_seed, check_split

SIDE = 256
"""Pixels at which scenes are drawn and degraded."""

SHARES = {"clean": 0.15, "low": 0.15, "mid": 0.25, "high": 0.45}
"""How often each severity is drawn."""

BUILD = "build.json"
_CHUNK = 48
_PAIRS_EVERY = 6
_QUALITY = 95


@dataclass(frozen=True)
class Plan:
    """What decides the contents of a build.

    Attributes:
        examples: rows in all.
        seed: of everything.
        split: `train` or `heldout`.
        questions_per_scene: rows that share a picture.
        severities: share of each severity; `clean` leaves the picture as it is.
        formulas: of the degradations.
        weights: how often each degradation is drawn.
        psnr_side: side in pixels at which the PSNR is taken: that of the model.

    Raises:
        ClearValueError: a number out of its range, or an unknown severity.
        UnknownNameError: there is no such split.
    """

    examples: int
    seed: int = 0
    split: str = "train"
    questions_per_scene: int = 3
    severities: Mapping[str, float] = field(default_factory=lambda: dict(SHARES))
    formulas: Formulas = "legacy"
    weights: Weights = "training"
    psnr_side: int = 128

    def __post_init__(self) -> None:
        check_split(self.split)
        check_seed(self.seed)
        for name, low, high in (
            ("examples", 1, 10**8),
            ("questions_per_scene", 1, len(KINDS)),
            ("psnr_side", 16, SIDE),
        ):
            if not low <= getattr(self, name) <= high:
                raise ClearValueError(f"{name}={getattr(self, name)}: must be from {low} to {high}")
        unknown = set(self.severities) - {"clean", *SEVERITIES}
        if unknown or abs(sum(self.severities.values()) - 1) > 1e-6:
            raise ClearValueError(
                f"severities={dict(self.severities)!r}: shares of clean, low, mid and high that sum to 1"
            )
        if self.formulas not in ("legacy", "fixed") or self.weights not in ("training", "benchmark"):
            raise ClearValueError(
                f"formulas={self.formulas!r}, weights={self.weights!r}: 'legacy' or 'fixed', and 'training' or 'benchmark'"
            )

    @property
    def scenes(self) -> int:
        """Pictures to draw."""
        return math.ceil(self.examples / self.questions_per_scene)


def build(
    folder: str | Path,
    examples: int,
    seed: int = 0,
    split: str = "train",
    workers: int | None = None,
    questions_per_scene: int = 3,
    severities: Mapping[str, float] | None = None,
    formulas: Formulas = "legacy",
    weights: Weights = "training",
    psnr_side: int = 128,
    progress: bool = True,
) -> Path:
    """Builds a data set, or goes on with one that was stopped; a finished one is left as it is.

    Args:
        folder: where it goes.
        examples: rows in all.
        seed: the same seed gives the same files.
        split: of the world.
        workers: processes; None is one a core.
        questions_per_scene: rows that share a picture.
        severities: share of each; None is `SHARES`.
        formulas: of the degradations.
        weights: how often each degradation is drawn.
        psnr_side: side in pixels at which the PSNR is taken.
        progress: show a bar.

    Returns:
        The folder.

    Raises:
        ClearValueError: a setting cannot work, or the folder holds another data set.
        UnknownNameError: there is no such split.
    """
    plan = Plan(
        examples,
        seed,
        split,
        questions_per_scene,
        dict(severities or SHARES),
        formulas,
        weights,
        psnr_side,
    )
    folder = Path(folder)
    claim(folder, BUILD, asdict(plan))
    if (folder / DATA).is_file():
        return folder
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    chunks = math.ceil(plan.scenes / _CHUNK)
    todo = [i for i in range(chunks) if not _part(folder, i).is_file()]
    count = min(count_of(workers or None), max(1, len(todo)))
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        disable=not progress,
        transient=True,
    ) as bar:
        task = bar.add_task("scenes", total=plan.scenes, completed=(chunks - len(todo)) * _CHUNK)
        jobs = [(folder, plan, i) for i in todo]
        with processes(count) as pool:
            for _ in in_order(_chunk, jobs, pool, count):
                bar.advance(task, _CHUNK)
    _finish(folder, chunks, plan.examples)
    return folder


def _part(folder: Path, chunk: int) -> Path:
    return folder / "parts" / f"{chunk:06d}.jsonl"


def _finish(folder: Path, chunks: int, examples: int) -> None:
    left = examples
    temporary = folder / (DATA + ".part")
    with temporary.open("w", encoding="utf-8") as out:
        for i in range(chunks):
            lines = _part(folder, i).read_text(encoding="utf-8").splitlines(keepends=True)[:left]
            out.writelines(lines)
            left -= len(lines)
    if left:
        raise ClearValueError(f"{folder / 'parts'} lacks {left} rows: delete it and build again")
    temporary.replace(folder / DATA)
    shutil.rmtree(folder / "parts")


# --------------------------------------------------------------------------------------------------- one scene


def _chunk(job: tuple[Path, Plan, int]) -> None:
    folder, plan, chunk = job
    place = folder / "images" / f"{chunk:06d}"
    place.mkdir(parents=True, exist_ok=True)
    rows: list[str] = []
    for number in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, plan.scenes)):
        made = _scene_rows(folder, place, plan, number)
        rows += [json.dumps(row, ensure_ascii=False) + "\n" for row in made]
    write_whole(_part(folder, chunk), "".join(rows))


def _scene_rows(folder: Path, place: Path, plan: Plan, number: int) -> list[dict[str, Any]]:
    rng = random.Random(f"{plan.seed}/{plan.split}/{number}")
    scene, questions, group = _questions(plan, number, rng)
    shares = plan.severities
    severity = rng.choices(list(shares), list(shares.values()))[0]
    damage = rng.getrandbits(31)
    name = draw(damage, plan.weights)
    clean = render(scene, SIDE)
    clean_file = place / f"{number:08d}.jpg"
    clean.save(clean_file, quality=_QUALITY)
    row: dict[str, Any] = {"image": clean_file.relative_to(folder).as_posix()}
    row["clean_image"] = row["image"]
    extra: dict[str, Any] = {"psnr_side": plan.psnr_side}
    if severity != "clean":
        degraded = degrade(clean, name, severity=SEVERITIES[severity], seed=damage, formulas=plan.formulas)
        file = place / f"{number:08d}_degraded.jpg"
        degraded.save(file, quality=_QUALITY)
        row["image"] = file.relative_to(folder).as_posix()
        row |= {"degradation": name, "severity": severity, "intensity": SEVERITIES[severity]}
        row["psnr"] = round(psnr(clean, degraded, plan.psnr_side), 2)
    else:
        row["psnr"] = decibels(0)
    rows = []
    for i, question in enumerate(questions):
        own = {
            "id": f"world-{plan.split}-{plan.seed}-{number}-{i}",
            "question": question.text,
            "answer": question.answer,
            "options": list(question.options),
            "kind": question.kind,
            "fact": question.fact,
            "group": group,
            "extra": {**extra, "template": question.template, "chance": round(question.chance, 4)},
        }
        rows.append(own | row)
    return rows


def _questions(plan: Plan, number: int, rng: random.Random) -> tuple[Scene, list[Question], str]:
    """A scene, its questions and its group; two neighbours share the kinds between them, so that all come equally often."""
    pair = number // 2
    shared = random.Random(f"{plan.seed}/{plan.split}/pair/{pair}")
    kinds = shared.sample(KINDS, len(KINDS))
    if number % 2:
        kinds = kinds[len(kinds) // 2 :] + kinds[: len(kinds) // 2]
    base = int.from_bytes(
        hashlib.blake2b(f"{plan.seed}/{plan.split}".encode(), digest_size=4).digest(), "big"
    )
    asked: list[Question] = []
    group = f"scene-{number}"
    if pair % _PAIRS_EVERY == 0:
        drawn = pair_scenes(base * 64 + pair, plan.split)  # type: ignore[arg-type]  # checked by Plan
        scene, question = drawn[:2] if number % 2 == 0 else drawn[2:]
        asked = [question]
        group = f"pair-{pair}"  # nearly one picture twice: never in two splits
        kinds = [k for k in kinds if k != "pair"]
    else:
        scene = sample_scene(base * 64 + number, plan.split)  # type: ignore[arg-type]
    seed = rng.getrandbits(31)
    for kind in kinds:
        if len(asked) == plan.questions_per_scene:
            break
        asked += ask(scene, seed, [kind], 1)
    more = seed
    while len(asked) < plan.questions_per_scene:
        more += 1
        fresh = ask(scene, more, KINDS, 1)
        known = {q.text for q in asked}
        asked += [q for q in fresh if q.text not in known][: plan.questions_per_scene - len(asked)]
    return scene, asked, group
