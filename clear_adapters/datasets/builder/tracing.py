"""The run of a teacher: every row up to so many tries, every reply on disk when it comes, none asked for twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from clear_adapters.datasets.builder.judging import RIGHT_ABOVE, Judge, Said, judged
from clear_adapters.datasets.builder.plan import Plan
from clear_adapters.datasets.builder.rows import Rejected
from clear_adapters.datasets.builder.teachers import Conversation, Teacher
from clear_adapters.datasets.builder.writers import (
    Fault,
    again,
    decision,
    first_turn,
    paper_conversation,
    read_trace,
    second_turn,
)
from clear_adapters.datasets.example import Example
from clear_adapters.datasets.parts import Parts, Way
from clear_adapters.endpoint import Failure
from clear_adapters.journal import Writer
from clear_adapters.scoring import matches

UNPAID = frozenset({"rate limited", "refused", "timed out", "no reply"})
"""Failures that cost nothing: a run that is taken up again tries anew where a row ended with them."""

NO_JUDGEMENT = "no judgement"
"""Of an answer that a judge left unmarked: another try of the teacher would be paid for and leave the judge as it is."""

_OUTAGE = UNPAID - {"refused"} | {NO_JUDGEMENT}
_OUTAGE_STATUS = ("HTTP 408", "HTTP 409", "HTTP 5")
"""Refusals that say nothing about the request itself."""


def without_unpaid_ends(said: Said) -> Said:
    """The entries without those failures after which nothing else was said about a row."""
    kept = dict(said)
    for step, row, number in sorted(said, key=lambda k: -k[2]):
        later = (step, row, number + 1) in kept
        if not later and said[step, row, number].get("failure") in UNPAID:
            del kept[step, row, number]
    return kept


def unanswered(rejected: Rejected) -> bool:
    """Whether a row is lost because a service did not answer, which it may another time."""
    return rejected.reason in _OUTAGE or (
        rejected.reason == "refused" and rejected.detail.startswith(_OUTAGE_STATUS)
    )


@dataclass
class Tracer:
    """A teacher at work on rows.

    Attributes:
        plan: tries and comparison.
        teacher: who is asked.
        judge: who is asked about answers that do not match; None takes no for an answer.
        said: what is on disk already; grows by what is written to the journal.
        log: the journal.
        advance: called once a finished row.
    """

    plan: Plan
    teacher: Teacher
    judge: Judge | None
    said: Said
    log: Writer
    advance: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.faults: Counter[str] = Counter()
        self.accepted: Counter[int] = Counter()

    # -- the released rule: the teacher's first turn decides

    def decide(self, rows: Sequence[Example]) -> tuple[dict[str, Way], list[Rejected]]:
        """Which path each row takes by the teacher's first turn, and rows that have none after all tries."""
        ways: dict[str, Way] = {}
        tries: dict[str, list[dict[str, Any]]] = {r.id: [] for r in rows}
        left = list(rows)
        for number in range(self.plan.tries):
            self._ask("turn", number, [(r, again(first_turn(r), tries[r.id])) for r in left])
            still = []
            for row in left:
                entry = self.said["turn", row.id, number]
                way = None if entry["reply"] is None else decision(entry["reply"])
                if way is not None:
                    ways[row.id] = way
                    self.advance()
                    continue
                fault = _failure(entry) or Fault("malformed", "it neither answers nor asks for a restoration")
                self._fail(tries[row.id], entry, fault)
                still.append(row)
            left = still
        return ways, [self._reject(row, "pathway", tries[row.id]) for row in left]

    def _turn(self, row: Example) -> str:
        replies = [self.said.get(("turn", row.id, n)) for n in range(self.plan.tries)]
        return next(e["reply"] for e in reversed(replies) if e is not None and e["reply"] is not None)

    def open_turns(self, row: Example) -> tuple[int, Way | None]:
        """How often a row's first turn may still be asked for, and the path where it is known."""
        for number in range(self.plan.tries):
            entry = self.said.get(("turn", row.id, number))
            if entry is None:
                return self.plan.tries - number, None
            way = None if entry["reply"] is None else decision(entry["reply"])
            if way is not None:
                return 0, way
        return 0, None

    # -- traces

    def open_tries(self, row: Example, way: Way) -> int:
        """How often a row's trace may still be asked for, by what is said; a judgement that is not there counts as no."""
        for number in range(self.plan.tries):
            if not (number == 0 and self._answered(row, way)) and ("trace", row.id, number) not in self.said:
                return self.plan.tries - number
            made = self._read(row, way, number)
            if isinstance(made, Parts):
                mark = self.said.get(("judge", row.id, number), {}).get("mark")
                if matches(made.answer, row.answer, row.options, self.plan.match):
                    return 0
                if self.judge is not None and mark is not None and mark > RIGHT_ABOVE:
                    return 0
        return 0

    def write(
        self, rows: Sequence[Example], ways: Mapping[str, Way]
    ) -> tuple[dict[str, Parts], list[Rejected]]:
        """The traces of some rows, and rows that have none after all tries."""
        written: dict[str, Parts] = {}
        tries: dict[str, list[dict[str, Any]]] = {r.id: [] for r in rows}
        left = list(rows)
        for number in range(self.plan.tries):
            asked = [
                (r, again(self._request(r, ways[r.id]), tries[r.id]))
                for r in left
                if number or not self._answered(r, ways[r.id])
            ]
            self._ask("trace", number, asked)
            found = {r.id: self._read(r, ways[r.id], number) for r in left}
            self._compare(left, found, number)
            still = []
            for row in left:
                made = found[row.id]
                if isinstance(made, Parts):
                    # In the words of the truth: what is trained is what will be compared with it.
                    written[row.id] = replace(made, answer=row.answer)
                    self.accepted[number + 1] += 1
                    self.advance()
                else:
                    self._fail(tries[row.id], self._entry(row, ways[row.id], number), made)
                    if made.reason != NO_JUDGEMENT:
                        still.append(row)
            left = still
        lost = [row for row in rows if row.id not in written]
        for _ in lost:
            self.advance()
        return written, [self._reject(row, "trace", tries[row.id]) for row in lost]

    def _answered(self, row: Example, way: Way) -> bool:
        """Whether the first turn, which decided, is the whole reply."""
        return self.plan.pathway == "teacher" and way == "direct"

    def _entry(self, row: Example, way: Way, number: int) -> Mapping[str, Any]:
        if number == 0 and self._answered(row, way):
            return {"reply": self._turn(row)}
        return self.said["trace", row.id, number]

    def _request(self, row: Example, way: Way) -> Conversation:
        if self.plan.pathway != "teacher":
            return paper_conversation(row, way)
        return first_turn(row) if way == "direct" else second_turn(row, self._turn(row))

    def _read(self, row: Example, way: Way, number: int) -> Parts | Fault:
        entry = self._entry(row, way, number)
        fault = _failure(entry)
        if fault is not None:
            return fault
        second = self.plan.pathway == "teacher" and way == "restore"
        return read_trace(entry["reply"], way, self._turn(row) if second else None)

    def _compare(self, rows: Sequence[Example], found: dict[str, Parts | Fault], number: int) -> None:
        """Puts a fault in the place of traces whose answer is not the truth."""
        unsure: list[tuple[Example, str]] = []
        for row in rows:
            made = found[row.id]
            if isinstance(made, Parts) and not matches(made.answer, row.answer, row.options, self.plan.match):
                found[row.id] = Fault("wrong answer", f"the answer {made.answer[:200]!r} is not the true one")
                if self.judge is not None:
                    unsure.append((row, made.answer))
                    found[row.id] = made
        if self.judge is None:
            return
        marks = judged(self.judge, "judge", number, unsure, self.said, self.log)
        for row, answer in unsure:
            mark = marks[row.id]
            if mark is None:
                found[row.id] = Fault(NO_JUDGEMENT, "the judge did not say whether the answer is right")
            elif mark <= RIGHT_ABOVE:
                found[row.id] = Fault("wrong answer", f"the answer {answer[:200]!r} is not the true one")

    # -- asking

    def _ask(self, step: str, number: int, asked: Iterable[tuple[Example, Conversation]]) -> None:
        todo = [(r, c) for r, c in asked if (step, r.id, number) not in self.said]
        for place, reply in self.teacher.replies(c for _, c in todo):
            entry: dict[str, Any] = {"step": step, "row": todo[place][0].id, "try": number}
            if isinstance(reply, Failure):
                entry |= {"reply": None, "failure": reply.kind, "reason": reply.reason}
            else:
                entry["reply"] = reply
            self.log.write(entry)

    def _fail(self, tries: list[dict[str, Any]], entry: Mapping[str, Any], fault: Fault) -> None:
        self.faults[fault.reason] += 1
        tries.append({"reply": entry["reply"], "problem": fault.detail, "reason": fault.reason})

    def _reject(self, row: Example, stage: str, tries: Sequence[Mapping[str, Any]]) -> Rejected:
        last = tries[-1]
        return Rejected(
            row.id, stage, last["reason"], last["problem"], row.extra.get("place", ""), tuple(tries)
        )


def _failure(entry: Mapping[str, Any]) -> Fault | None:
    if entry["reply"] is not None:
        return None
    return Fault(entry["failure"], entry["reason"])


def plain(rejected: Rejected) -> dict[str, Any]:
    """A reject as a row of its file; empty values are left out."""
    return {k: v for k, v in asdict(rejected).items() if v not in ("", (), None)}
