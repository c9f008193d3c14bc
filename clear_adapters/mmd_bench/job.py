"""One system on one set: how it is asked, and its answers, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_adapters.errors import ClearError, ClearValueError
from clear_adapters.mmd_bench.score import mark
from clear_adapters.mmd_bench.sets import BenchSet
from clear_adapters.mmd_bench.systems import System, ask

if TYPE_CHECKING:
    from PIL.Image import Image

    from clear_adapters.attached import AttachedModel
    from clear_adapters.mmd_bench.questions import Question


@dataclass(frozen=True)
class Settings:
    """How a model is asked.

    Attributes:
        model: facts about the base: name and digest.
        adapter: facts about the adapter; None without one.
        batch_size: rows at a time. Part of the settings since batches of another size may round differently.
        seed: of sampling; question i of a set is asked with seed + i.
        max_new_tokens: longest turn; None is the adapter's own.
        steps: points of the flow schedule; None is the adapter's own.
        limit: first units of every set; None is all.
        dtype: in which the model computes, in words: other types give other answers.
        device_kind: `cpu`, `cuda`, ...: the same holds for it.

    Raises:
        ClearValueError: a number out of its range.
    """

    model: Mapping[str, Any]
    adapter: Mapping[str, Any] | None
    batch_size: int = 16
    seed: int = 0
    max_new_tokens: int | None = None
    steps: int | None = None
    limit: int | None = None
    dtype: str | None = None
    device_kind: str | None = None

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("seed", 0), ("max_new_tokens", 1), ("steps", 2), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ClearValueError(f"{name}={value}: must be at least {low}")


@dataclass(frozen=True)
class Job:
    """One system on one set.

    Attributes:
        system: which.
        asked: the system that is asked: of the ceiling, the base.
        data: the set.
        path: of the answers.
    """

    system: System
    asked: System
    data: BenchSet
    path: Path


@dataclass(frozen=True)
class _Batch:
    first: int
    questions: Sequence[Question]
    images: list[Image]
    clean: list[Image] | None


def _batches(job: Job, size: int, start: int) -> Iterator[_Batch]:
    """The batches from a question on; the next one's pictures are decoded while the model is at work."""
    questions = job.data.questions.questions
    clean_rows = job.data.clean_rows() if job.asked.latent_from == "clean" else {}
    clean_set = job.data.clean

    def load(first: int) -> _Batch:
        rows = questions[first : first + size]
        images = [job.data.questions.image(q) for q in rows]
        clean = None
        if clean_rows and clean_set is not None:
            clean = [clean_set.image(clean_rows[q.index]) for q in rows]
        return _Batch(first, rows, images, clean)

    places = range(start, len(questions), size)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, places[0])
        for following in places[1:]:
            batch = ahead.result()
            ahead = pool.submit(load, following)
            yield batch
        yield ahead.result()


def answer(model: AttachedModel, job: Job, settings: Settings, start: int) -> Iterator[list[dict[str, Any]]]:
    """The lines of the answers file from a question on, a batch at a time."""
    text, latent = model.config.text, model.config.latent
    if settings.max_new_tokens is not None:
        text = replace(text, max_new_tokens=settings.max_new_tokens)
    if settings.steps is not None:
        latent = replace(latent, steps=settings.steps)
    for batch in _batches(job, settings.batch_size, start):
        began = time.perf_counter()
        try:
            replies = ask(
                model,
                job.asked,
                batch.images,
                [q.prompt for q in batch.questions],
                seeds=[settings.seed + batch.first + i for i in range(len(batch.questions))],
                clean=batch.clean,
                text=text,
                latent=latent,
            )
        except ClearError as error:
            lines = f"{batch.questions[0].place[0]} to {batch.questions[-1].place[0]}"
            raise ClearValueError(f"{job.data.questions.file.path}, lines {lines}: {error}") from error
        seconds = (time.perf_counter() - began) / len(replies)
        records = []
        for question, reply in zip(batch.questions, replies, strict=True):
            found = mark(job.data.task, question, reply.text)
            record: dict[str, Any] = {
                "index": question.index,
                "line": question.place[0],
                "group": question.group,
                "category": question.category,
                "source": question.source,
                "question": question.text,
                "truth": question.truth,
                "answer": reply.text,
                "read": found.read,
                "value": found.value,
                "seconds": round(seconds, 5),
            }
            if not job.asked.plain:
                record |= {
                    "restored": reply.restored,
                    "answered": reply.answered,
                    "thoughts": list(reply.thoughts),
                }
            records.append(record)
        yield records
