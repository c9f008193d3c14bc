"""The benchmarks of MMD-Bench as data: files, prompts, units and rules; no code of its own for any of them.

Names of files are those of the authors' generators (`MMStar_LOW_LEVEL_HIGH.tsv`, `MMStar_lens_blur.tsv`); counts are
those that the published scores are multiples of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clear_adapters.degradations import SEVERITIES, list_degradations
from clear_adapters.errors import unknown_name
from clear_adapters.prompts import CHOOSE

Rule = Literal["choice", "judge", "kind"]
Unit = Literal["question", "circle", "pair", "source"]
PromptForm = Literal["options", "column", "question"]

CLEAN = "clean"
REAL = "real"
"""The condition of pictures whose distortions are their own: nothing is added to them."""

LEVELS = (CLEAN, *SEVERITIES)
CORRUPTIONS = tuple(entry.name for entry in list_degradations())


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: on the command line and in result files.
        title: in tables.
        file: stem of its TSV files.
        rule: how one answer is judged: by its option, by a judge from 0 to 1, or by the kind of its question.
        unit: what is counted. `circle`: all rotations of a question must be right. `pair`: questions one by one, and
            besides, pairs with both right. `source`: questions one by one, and besides, the mean over sources.
        prompt: how the question is written: with its options, from the column `prompt`, or as it is.
        published: units in the published scores; None for what was never published.
        columns: columns that must be there besides `index`, `image`, `question` and `answer`.
        real: whether its pictures are distorted already; it then has one set and no clean one.
    """

    name: str
    title: str
    file: str
    rule: Rule = "choice"
    unit: Unit = "question"
    prompt: PromptForm = "options"
    published: int | None = None
    columns: tuple[str, ...] = ()
    real: bool = False

    def file_name(self, condition: str) -> str:
        """The TSV file of a condition.

        Args:
            condition: `clean`, a severity, the name of a corruption (at high), or `real`.
        """
        if condition in (CLEAN, REAL):
            return f"{self.file}.tsv"
        if condition in SEVERITIES:
            return f"{self.file}_LOW_LEVEL_{condition.upper()}.tsv"
        return f"{self.file}_{condition}.tsv"

    def conditions(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Of the wanted conditions those that this task has."""
        return (REAL,) if self.real else wanted


TASKS = (
    Task("mmbench", "MMBench", "MMBench_DEV_EN_V11", unit="circle", published=1292, columns=("A", "B")),
    Task("mmvet", "MM-Vet", "MMVet", rule="judge", prompt="question", published=218),
    Task("mmvp", "MMVP", "MMVP", unit="pair", published=300, columns=("A", "B")),
    Task(
        "cvbench2d",
        "CV-Bench-2D",
        "CV-Bench-2D",
        unit="source",
        prompt="column",
        published=1438,
        columns=("A", "B", "prompt", "source"),
    ),
    Task("mmstar", "MMStar", "MMStar", published=1500, columns=("A", "B")),
    Task("realworldqa", "RealWorldQA", "RealWorldQA", published=765, columns=("A", "B")),
    Task("rbench", "R-Bench-Dis", "R-Bench-Dis", published=495, columns=("A", "B"), real=True),
    Task("miniature", "Miniature", "Miniature", rule="kind", prompt="question", columns=("category",)),
)
_BY_NAME = {task.name: task for task in TASKS}


def get_task(name: str) -> Task:
    """The task of a name.

    Raises:
        UnknownNameError: there is none; close matches are in the message.
    """
    if name not in _BY_NAME:
        raise unknown_name("task", name, _BY_NAME)
    return _BY_NAME[name]


PROMPT_VERSION = "1"
"""Changes with every change of the words below and of `prompts.CHOOSE`."""


def prompt(task: Task, values: dict[str, str], options: dict[str, str]) -> str:
    """What a model is asked.

    The order of parts is VLMEvalKit's (hint, question, options, request); the words of the request are our own.

    Args:
        task: whose form is used.
        values: the row, by column.
        options: text by letter.
    """
    if task.prompt == "column":
        return values["prompt"].strip()
    if task.prompt == "question" or not options:
        return values["question"].strip()
    hint = [f"Hint: {values['hint'].strip()}"] if values.get("hint", "").strip() else []
    listed = [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join([*hint, f"Question: {values['question'].strip()}", "Options:", *listed, CHOOSE])
