"""The work of a build: pictures, splits, paths, traces, files; each finished piece is a line of the journal at once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clear_adapters.datasets.builder.cost import Asked, Estimate, Prices, estimate
from clear_adapters.datasets.builder.judging import RIGHT_ABOVE, Judge, Said, judged
from clear_adapters.datasets.builder.pathways import Answerer, batches, drawn, wanted
from clear_adapters.datasets.builder.pictures import PictureJob, make_picture
from clear_adapters.datasets.builder.plan import FILES, Plan
from clear_adapters.datasets.builder.rows import Found, Rejected, Row
from clear_adapters.datasets.builder.summary import summarise
from clear_adapters.datasets.builder.teachers import MAX_TOKENS, Teacher
from clear_adapters.datasets.builder.tracing import (
    NO_JUDGEMENT,
    Tracer,
    plain,
    unanswered,
    without_unpaid_ends,
)
from clear_adapters.datasets.builder.writers import template
from clear_adapters.datasets.duplicates import Clusters, near_pairs
from clear_adapters.datasets.example import Example, split_of, to_row
from clear_adapters.datasets.parts import Parts, Way, is_text
from clear_adapters.endpoint import EndpointError
from clear_adapters.errors import ClearValueError
from clear_adapters.journal import Journal, Writer, size_of, write_whole
from clear_adapters.scoring import matches
from clear_adapters.workers import count_of, in_order, processes

JOURNAL = "journal.jsonl"
MANIFEST = "manifest.jsonl"
REJECTED = "rejected.jsonl"
SUMMARY = "summary.json"
SOURCE = "source"


@dataclass(frozen=True)
class Helpers:
    """Who works at a build, beside the processes that make pictures.

    Attributes:
        teacher: writes traces, or decides; None where the plan needs none.
        judge: marks answers that do not match the truth; None takes no for an answer.
        base: the base model, for the pathway `backbone`.
        prices: of the teacher's service, for the estimate.
        budget: what the teacher may cost at most in this run, in the currency of the prices; the judge is not counted.
        leave_unanswered: finish without rows that the teacher's service or the judge did not answer, instead of stopping.
        workers: processes that make pictures; None is one a core.
        progress: show bars.
        report: told what is about to happen.
    """

    teacher: Teacher | None = None
    judge: Judge | None = None
    base: Answerer | None = None
    prices: Prices | None = None
    budget: float | None = None
    leave_unanswered: bool = False
    workers: int | None = None
    progress: bool = True
    report: Callable[[str], None] = lambda text: None


def expect(rows: Sequence[Asked], plan: Plan, max_tokens: int) -> Estimate:
    """What a teacher is asked for some rows; nothing where the plan needs none."""
    return estimate(rows, plan.pathway == "teacher", max_tokens)


def unasked(text: str, size: tuple[int, int], plan: Plan) -> Asked:
    """A row about which nothing was asked yet."""
    turns = plan.tries if plan.pathway == "teacher" else 0
    return Asked(_bytes(text), size, turns, plan.tries if plan.writer == "teacher" else 0, not turns)


def _line(entry: Mapping[str, Any]) -> str:
    """A line of a JSONL file; what a teacher or a source wrote may hold half a character, which stays an escape."""
    text = json.dumps(entry, ensure_ascii=False)
    return (text if is_text(text) else json.dumps(entry)) + "\n"


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


class Assembly:
    """One build at work: its rows, the records of its pictures, what was said so far."""

    def __init__(
        self, folder: Path, plan: Plan, helpers: Helpers, found: Found, settings: Mapping[str, Any]
    ) -> None:
        self.folder, self.plan, self.helpers = folder, plan, helpers
        self.found, self.settings = found, settings
        self.rejected = list(found.rejected)
        self.records: dict[str, dict[str, Any]] = {}
        self.sizes: dict[str, Sequence[int]] = {}
        self.said: Said = {}
        self.base: dict[str, str] = {}
        self.faults: Counter[str] = Counter()
        self.accepted: Counter[int] = Counter()

    def run(self) -> dict[str, Any]:
        """Does what is not done yet, and gives the summary."""
        journal = Journal(self.folder / JOURNAL, seen=self._seen)
        self.said = without_unpaid_ends(self.said)
        with self._bars() as bars, journal.opened() as log:
            self._make_pictures(log, bars)
            splits = self._split()
            train = splits["train"]
            tracer = self._tracer(log)
            ways = self._decide(train, tracer, log, bars)
            splits["train"] = self._trace(train, ways, tracer, bars)
        if tracer is not None:
            self.faults, self.accepted = tracer.faults, tracer.accepted
        return self._finish(splits)

    def _seen(self, entry: Mapping[str, Any]) -> None:
        if entry["step"] == "picture":
            self.records[entry["made"]["source"]] = entry["made"]
        elif entry["step"] == "base":
            self.base[entry["row"]] = entry["reply"]
        else:
            self.said[entry["step"], entry["row"], entry["try"]] = entry

    @contextmanager
    def _bars(self) -> Iterator[Progress]:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            disable=not self.helpers.progress,
            transient=True,
        ) as bars:
            yield bars

    # -- pictures

    def _make_pictures(self, log: Writer, bars: Progress) -> None:
        pictures = {row.picture.name: row.picture for row in self.found.rows}
        todo = [p for name, p in pictures.items() if not self._is_made(name)]
        line = bars.add_task("pictures", total=len(pictures), completed=len(pictures) - len(todo))
        count = min(count_of(self.helpers.workers), max(1, len(todo)))
        jobs = [PictureJob(p, self.folder, self.plan) for p in todo]
        with processes(count) as pool:
            for record in in_order(make_picture, jobs, pool, count):
                log.write({"step": "picture", "made": record})
                bars.advance(line)
        self.records = {name: self.records[name] for name in pictures}

    def _is_made(self, name: str) -> bool:
        record = self.records.get(name)
        if record is None:
            return False
        return "rejected" in record or all(
            (self.folder / record[key]).is_file() for key in ("image", "clean_image")
        )

    # -- splits

    def _split(self) -> dict[str, list[Example]]:
        """Examples by split: what shares a picture, a near-duplicate or a group of the source stands in one."""
        good = {name: r for name, r in self.records.items() if "rejected" not in r}
        self.sizes = {str(self.folder / r["clean_image"]): r["size"] for r in good.values()}
        places = {name: place for place, name in enumerate(good)}
        clusters = Clusters(len(good))
        for a, b in near_pairs([int(r["hash"], 16) for r in good.values()], self.plan.near):
            clusters.join(a, b)
        first: dict[str, int] = {}
        for row in self.found.rows:
            if row.group and row.picture.name in places:
                place = places[row.picture.name]
                clusters.join(first.setdefault(row.group, place), place)
        contents = [r["content"] for r in good.values()]
        names: dict[int, str] = {}
        for place, content in enumerate(contents):
            root = clusters.root(place)
            names[root] = min(names.get(root, content), content)
        splits: dict[str, list[Example]] = {name: [] for name in FILES}
        for name, record in good.items():
            record["group"] = names[clusters.root(places[name])][:16]
            record["split"] = split_of(record["group"], self.plan.splits, self.plan.seed)
        for row in self.found.rows:
            record = self.records[row.picture.name]
            if "rejected" in record:
                self.rejected.append(
                    Rejected(row.id, "picture", record["rejected"], record["detail"], row.place)
                )
            else:
                splits[record["split"]].append(self._example(row, record))
        return splits

    def _example(self, row: Row, record: Mapping[str, Any]) -> Example:
        return Example(
            id=row.id,
            image=self.folder / record["image"],
            clean_image=self.folder / record["clean_image"],
            question=row.question,
            answer=row.answer,
            options=row.options,
            kind=row.kind,
            fact=row.fact,
            degradation=record.get("degradation"),
            severity=record.get("severity", ""),
            intensity=record.get("intensity", 0.0),
            psnr=record["psnr"],
            group=record["group"],
            extra={"psnr_side": self.plan.psnr_side, "place": row.place},
        )

    # -- paths

    def _tracer(self, log: Writer) -> Tracer | None:
        if self.helpers.teacher is None:
            return None
        return Tracer(self.plan, self.helpers.teacher, self.helpers.judge, self.said, log)

    def _decide(
        self, train: Sequence[Example], tracer: Tracer | None, log: Writer, bars: Progress
    ) -> dict[str, Way]:
        plan = self.plan
        if plan.pathway == "severity":
            return {e.id: "restore" if plan.restores(e.severity) else "direct" for e in train}
        if plan.pathway == "teacher":
            assert tracer is not None
            asked = [self._asked(e, tracer) for e in train]
            self._tell_cost(expect(asked, plan, self._longest()))
            line = bars.add_task("the teacher decides", total=len(train))
            tracer.advance = lambda: bars.advance(line)
            ways, rejected = tracer.decide(train)
            self._stop_where_unanswered(rejected)
            self.rejected += rejected
            return ways
        assert self.helpers.base is not None
        todo = [e for e in train if e.id not in self.base]
        line = bars.add_task("the base model answers", total=len(train), completed=len(train) - len(todo))
        for some in batches(todo, self.helpers.base.batch):
            for example, reply in zip(some, self.helpers.base.answers(some), strict=True):
                log.write({"step": "base", "row": example.id, "reply": reply})
                bars.advance(line)
        return self._compare_base(train, log)

    def _compare_base(self, train: Sequence[Example], log: Writer) -> dict[str, Way]:
        """Right is direct and wrong restores; of words that do not match a judge says which they are."""
        plan, judge = self.plan, self.helpers.judge
        right = {e.id for e in train if matches(self.base[e.id], e.answer, e.options, plan.match)}
        unclear: dict[str, Rejected] = {}
        if judge is not None:
            others = [e for e in train if e.id not in right]
            answers = [(e, self.base[e.id]) for e in others]
            marks = judged(judge, "base judge", 0, answers, self.said, log)
            for example in others:
                mark = marks[example.id]
                if mark is None:
                    told = "the judge did not say whether the base model's answer is right"
                    place = example.extra["place"]
                    unclear[example.id] = Rejected(example.id, "pathway", NO_JUDGEMENT, told, place)
                elif mark > RIGHT_ABOVE:
                    right.add(example.id)
        self._stop_where_unanswered(list(unclear.values()))
        self.rejected += unclear.values()
        return {e.id: "direct" if e.id in right else "restore" for e in train if e.id not in unclear}

    def _stop_where_unanswered(self, rejected: Sequence[Rejected]) -> None:
        """A service that is down for a while must not cost rows."""
        lost = [r for r in rejected if unanswered(r)]
        if not lost or self.helpers.leave_unanswered:
            return
        unjudged = sum(r.reason == NO_JUDGEMENT for r in lost)
        told = [f"{unjudged} rows were not judged by {self.settings['judge']}"] if unjudged else []
        if len(lost) > unjudged:
            who, tries = self.settings["teacher"], self.plan.tries
            told.append(f"{len(lost) - unjudged} rows were not answered by {who} in {tries} tries")
        raise EndpointError(
            f"{' and '.join(told)}; the last one: {lost[-1].detail}. What was answered is kept: run again to ask for the "
            "rest, or with --leave-unanswered (leave_unanswered=True) to finish without them"
        )

    def _longest(self) -> int:
        return getattr(self.helpers.teacher, "max_tokens", None) or MAX_TOKENS

    def _asked(self, row: Example, tracer: Tracer, way: Way | None = None) -> Asked:
        """What is left to ask about a row, by what was said."""
        turns = 0
        if self.plan.pathway == "teacher":
            turns, way = tracer.open_turns(row)
        traces = tracer.open_tries(row, way) if way else self.plan.tries if turns else 0
        traces = traces if self.plan.writer == "teacher" else 0
        width, height = self.sizes[str(row.clean_image)]
        return Asked(_bytes(row.question + row.answer), (width, height), turns, traces, way is not None)

    def _tell_cost(self, expected: Estimate) -> None:
        if not expected.most:
            return
        self.helpers.report(f"The teacher {self.settings['teacher']}: {expected.told(self.helpers.prices)}")
        if self.helpers.judge is not None:
            self.helpers.report(
                "The judge, not counted: one request at most for every reply whose answer does not match"
            )
        prices, budget = self.helpers.prices, self.helpers.budget
        if prices is not None and budget is not None and not expected.price(prices)[1] <= budget:
            raise ClearValueError(
                f"the teacher may cost {expected.price(prices)[1]:,.2f} and the budget is {budget:,.2f}: take a larger one, "
                "fewer rows (--limit), fewer --tries or shorter replies (--max-tokens). Nothing was asked"
            )

    # -- traces

    def _trace(
        self,
        train: Sequence[Example],
        ways: Mapping[str, Way],
        tracer: Tracer | None,
        bars: Progress,
    ) -> list[Example]:
        """The training rows with their traces, balanced; a reject is made up for by a row that was left over."""
        plan = self.plan
        queues: dict[Way, list[str]] = {
            way: drawn((i for i, w in ways.items() if w == way), plan.seed) for way in ("direct", "restore")
        }
        good: dict[Way, list[str]] = {"direct": [], "restore": []}
        written: dict[str, Parts] = {}
        line = bars.add_task("traces", total=None)
        untold = plan.pathway != "teacher"  # there the first turns came with it
        while True:
            total = {way: len(good[way]) + len(queues[way]) for way in good}
            want = dict(zip(good, wanted(total["direct"], total["restore"], plan.restore_share), strict=True))
            batch: list[str] = []
            for way, queue in queues.items():
                need = max(0, want[way] - len(good[way]))
                batch += queue[:need]
                del queue[:need]
            if not batch:
                break
            bars.update(line, total=sum(want.values()))
            chosen = set(batch)
            some = [e for e in train if e.id in chosen]
            if plan.writer == "template":
                made = {e.id: template(e, ways[e.id], plan.seed) for e in some}
                bars.advance(line, len(some))
            else:
                assert tracer is not None
                if untold:
                    now = [self._asked(e, tracer, ways[e.id]) for e in some]
                    if any(a.traces for a in now):
                        untold = False
                        # Rejects are made up for by rows that balancing left over.
                        spare = [e for e in train if want[ways[e.id]] and e.id not in written]
                        rest = [self._asked(e, tracer, ways[e.id]) for e in spare if e.id not in chosen]
                        most = expect([*now, *rest], plan, self._longest())
                        least = expect(now, plan, self._longest())
                        parts = (least.requests, most.most, least.prompt, least.completion)
                        self._tell_cost(Estimate(*parts, most.most_prompt, most.most_completion))
                tracer.advance = lambda: bars.advance(line)
                made, rejected = tracer.write(some, ways)
                self._stop_where_unanswered(rejected)
                self.rejected += rejected
            written |= made
            for i in batch:
                if i in made:
                    good[ways[i]].append(i)
        kept = {i for way in good for i in good[way][: want[way]]}
        surplus = {*queues["direct"], *queues["restore"], *written} - kept
        for example in train:
            if example.id in surplus:
                way = ways[example.id]
                detail = f"beyond the share of {plan.restore_share} of rows that restore"
                self.rejected.append(
                    Rejected(example.id, "balance", f"surplus of {way} rows", detail, example.extra["place"])
                )
        return [replace(e, reply=written[e.id].text) for e in train if e.id in kept]

    # -- the end

    def _finish(self, splits: dict[str, list[Example]]) -> dict[str, Any]:
        summary = summarise(
            self.found, splits, self.rejected, self.records.values(), self.faults, self.accepted
        )
        lines = {FILES[name]: [to_row(e, self.folder) for e in part] for name, part in splits.items()}
        lines[MANIFEST] = list(self.records.values())
        lines[REJECTED] = [plain(r) for r in self.rejected]
        for name, entries in lines.items():
            write_whole(self.folder / name, "".join(_line(e) for e in entries))
        files = {name: {"lines": len(e), "bytes": size_of(self.folder / name)} for name, e in lines.items()}
        # The folder of the pictures stays in the build's own settings: it is of this machine.
        settings = {k: v for k, v in self.settings.items() if k != "pictures"}
        summary = {"schema_version": 1, **settings, **summary, "files": files}
        write_whole(self.folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        (self.folder / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.folder / SOURCE, ignore_errors=True)
        return summary
