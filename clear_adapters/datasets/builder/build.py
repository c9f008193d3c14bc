"""The build: rows in, pictures degraded, paths chosen and balanced, traces written; killed at any time, it goes on.

Whatever is finished (a picture, an answer of the base model, a reply of a teacher) is a line of one journal at once. The
files of the data are written at the end, in the order of the source, so they are the same for any number of processes and
for any order in which replies come.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clear_adapters._version import __version__
from clear_adapters.datasets.builder import writers
from clear_adapters.datasets.builder.cost import Estimate, Prices, estimate
from clear_adapters.datasets.builder.duplicates import Clusters, near_pairs
from clear_adapters.datasets.builder.pathways import Answerer, batches, drawn, wanted
from clear_adapters.datasets.builder.pictures import PictureJob, make_picture
from clear_adapters.datasets.builder.plan import FILES, Plan
from clear_adapters.datasets.builder.sources import Found, Rejected, Row, read_rows
from clear_adapters.datasets.builder.stream import Stream, fetch
from clear_adapters.datasets.builder.summary import summarise
from clear_adapters.datasets.builder.teachers import Teacher
from clear_adapters.datasets.builder.tracing import Said, Tracer, plain, without_unpaid_ends
from clear_adapters.datasets.builder.writers import Judge, Way, template
from clear_adapters.datasets.example import Example, split_of, to_row
from clear_adapters.datasets.parts import Parts, matches
from clear_adapters.errors import ClearValueError
from clear_adapters.journal import Journal, Writer, claim, size_of, write_whole
from clear_adapters.workers import count_of, in_order, processes

SETTINGS = "build.json"
JOURNAL = "journal.jsonl"
MANIFEST = "manifest.jsonl"
REJECTED = "rejected.jsonl"
SUMMARY = "summary.json"
LOCK = "build.lock"
SOURCE = "source"


@dataclass(frozen=True)
class Helpers:
    """Who works at a build, beside the processes that make pictures.

    Attributes:
        teacher: writes traces, or decides; None where the plan needs none.
        judge: marks answers that do not match the truth; None takes no for an answer.
        base: the base model, for the pathway `backbone`.
        prices: of the teacher's service, for the estimate.
        budget: what the teacher may cost at most, in the currency of the prices.
        workers: processes that make pictures; None is one a core.
        progress: show bars.
        report: told what is about to happen.
    """

    teacher: Teacher | None = None
    judge: Judge | None = None
    base: Answerer | None = None
    prices: Prices | None = None
    budget: float | None = None
    workers: int | None = None
    progress: bool = True
    report: Callable[[str], None] = lambda text: None


def build(
    source: str | Path | Stream,
    output: str | Path,
    plan: Plan | None = None,
    *,
    pictures: str | Path | None = None,
    helpers: Helpers | None = None,
) -> dict[str, Any]:
    """Builds training data, or goes on with a build that was stopped; a finished one is left as it is.

    Args:
        source: a `.json`, `.jsonl` or `.tsv` file, or a `Stream` of the Hub.
        output: the folder of the data set: `data.jsonl` (stages 1 and 2), `rl.jsonl` (stage 3), `heldout.jsonl`, `images`,
            `manifest.jsonl` (a record a picture), `rejected.jsonl` (rows that are in none, with the reason), `summary.json`.
        plan: what it contains; None is the default.
        pictures: folder of the pictures; None is the source's own.
        helpers: who works at it; None is processes alone.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        ClearValueError: a setting cannot work, a helper is missing, no row can be used, the budget is too small, or the
            folder holds something else.
        EndpointError: the teacher's service refuses every request, or failed too often; all that is paid for is kept.
        ClearError: a process was killed from outside; what was made is kept.
    """
    plan, helpers = plan or Plan(), helpers or Helpers()
    _check_helpers(plan, helpers)
    count_of(helpers.workers)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ClearValueError(
            f"another process is at work in {folder}: wait until it is done, or choose another folder"
        ) from None
    try:
        settings = {
            "plan": asdict(plan),
            "version": __version__,
            "prompts": writers.VERSION,
            "source": source.facts() if isinstance(source, Stream) else _facts(Path(source)),
            "teacher": helpers.teacher.name if helpers.teacher else None,
            "base": helpers.base.name if helpers.base else None,
            "judge": helpers.judge is not None,
        }
        claim(folder, SETTINGS, settings)
        if (folder / SUMMARY).is_file():
            return _finished(folder)
        if isinstance(source, Stream):
            place = fetch(source, folder / SOURCE, plan, helpers.progress)
            source, pictures = place, place.parent
        return _Build(folder, plan, helpers, read_rows(source, pictures, plan), settings).run()
    finally:
        lock.release()


def foresee(
    source: str | Path, plan: Plan, *, pictures: str | Path | None = None, sample: int = 200
) -> tuple[Found, Estimate]:
    """What a build would read and ask a teacher; no picture is decoded, nothing is written or asked.

    Args:
        source: a file.
        plan: what it would contain.
        pictures: folder of the pictures.
        sample: rows of which the picture's size is looked up.

    Returns:
        What the source gives, and an estimate of the teacher's part (of all training rows before balancing, since paths
        are not known yet).

    Raises:
        ClearValueError: no row can be used.
    """
    found = read_rows(source, pictures, plan)
    ordered = {r.id: r for r in found.rows}
    sizes = [s for i in drawn(ordered, plan.seed)[:sample] if (s := _size(ordered[i])) is not None]
    side = (
        (round(sum(w for w, _ in sizes) / len(sizes)), round(sum(h for _, h in sizes) / len(sizes)))
        if sizes
        else (512, 512)
    )
    rows = [(len(r.question) + len(r.answer), side) for r in found.rows]
    return found, _expect(rows[: round(len(rows) * plan.splits.get("train", 0.0))], len(rows), plan)


def _size(row: Row) -> tuple[int, int] | None:
    import io

    try:
        with Image.open(io.BytesIO(row.picture.read())) as opened:
            return opened.size
    except (OSError, ClearValueError):
        return None


def _expect(rows: Sequence[tuple[int, tuple[int, int]]], most: int, plan: Plan) -> Estimate:
    """What a teacher is asked for some rows, first tries; nothing where the plan needs none."""
    none = Estimate(0, 0, 0, 0)
    if plan.pathway == "teacher":
        first = estimate(rows, 1, plan.tries)
        if plan.writer == "template":
            return first
        return first + estimate(rows[: len(rows) // 2], 2, 2 * plan.tries)
    return estimate(rows, 2, plan.tries) if plan.writer == "teacher" else none


def _check_helpers(plan: Plan, helpers: Helpers) -> None:
    needs = "teacher" in (plan.writer, plan.pathway)
    if needs and helpers.teacher is None:
        raise ClearValueError(
            f"pathway={plan.pathway!r} with writer={plan.writer!r} needs a teacher: name a service and a model there "
            "(--teacher-url and --teacher-model), or a local model (--teacher-model alone)"
        )
    if helpers.teacher is not None and not needs:
        raise ClearValueError(
            "a teacher was given, and neither pathway nor writer is 'teacher': it would never be asked"
        )
    if plan.pathway == "backbone" and helpers.base is None:
        raise ClearValueError("pathway='backbone' needs the base model that answers (--model)")
    if plan.pathway != "backbone" and helpers.base is not None:
        raise ClearValueError(
            "a base model was given, and the pathway is not 'backbone': it would never be asked"
        )
    if helpers.budget is not None and helpers.prices is None:
        raise ClearValueError("a budget needs the prices of the service (--price)")


def _facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"file": path.name}  # said later, with what a source may be
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def _finished(folder: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        lost = [name for name in summary["files"] if not (folder / name).is_file()]
    except (ValueError, KeyError, TypeError) as error:
        raise ClearValueError(f"{folder / SUMMARY} is damaged: delete {folder} and build again") from error
    if lost:
        raise ClearValueError(
            f"{folder} is finished, and {', '.join(lost)} is gone: delete {folder} and build again"
        )
    return summary


class _Build:
    def __init__(
        self, folder: Path, plan: Plan, helpers: Helpers, found: Found, settings: Mapping[str, Any]
    ) -> None:
        self.folder, self.plan, self.helpers = folder, plan, helpers
        self.found, self.settings = found, settings
        self.rejected = list(found.rejected)
        self.records: dict[str, dict[str, Any]] = {}
        self.said: Said = {}
        self.base: dict[str, str] = {}
        self.faults: Counter[str] = Counter()
        self.accepted: Counter[int] = Counter()

    def run(self) -> dict[str, Any]:
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
        places = {name: place for place, name in enumerate(good)}
        clusters = Clusters(len(good))
        clusters.join_equal([r["content"] for r in good.values()])
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
        return Tracer(self.plan, self.helpers.teacher, self.helpers.judge, self.said, log.write)

    def _decide(
        self, train: Sequence[Example], tracer: Tracer | None, log: Writer, bars: Progress
    ) -> dict[str, Way]:
        plan = self.plan
        if plan.pathway == "severity":
            return {e.id: "restore" if plan.restores(e.severity) else "direct" for e in train}
        if plan.pathway == "teacher":
            assert tracer is not None
            self._tell_cost([e for e in train if ("turn", e.id, 0) not in self.said], len(train))
            line = bars.add_task("the teacher decides", total=len(train))
            tracer.advance = lambda: bars.advance(line)
            ways, rejected = tracer.decide(train)
            self.rejected += rejected
            return ways
        assert self.helpers.base is not None
        todo = [e for e in train if e.id not in self.base]
        line = bars.add_task("the base model answers", total=len(train), completed=len(train) - len(todo))
        for some in batches(todo, self.helpers.base.batch):
            for example, reply in zip(some, self.helpers.base.answers(some), strict=True):
                log.write({"step": "base", "row": example.id, "reply": reply})
                bars.advance(line)
        return {
            e.id: "direct" if matches(self.base[e.id], e.answer, e.options, plan.match) else "restore"
            for e in train
        }

    def _tell_cost(self, rows: Sequence[Example], most: int) -> None:
        sizes = {
            str(self.folder / r["clean_image"]): tuple(r["size"])
            for r in self.records.values()
            if "rejected" not in r
        }
        told = [(len(e.question) + len(e.answer), sizes[str(e.clean_image)]) for e in rows]
        expected = _expect(told, most, self.plan)
        if self.plan.writer == "teacher" and self.plan.pathway != "teacher":
            # Rejects are made up for by rows that balancing left over.
            expected = replace(expected, most=max(expected.most, most * self.plan.tries))
        if not expected.requests:
            return
        self.helpers.report(f"The teacher {self.settings['teacher']}: {expected.told(self.helpers.prices)}")
        if self.helpers.judge is not None:
            self.helpers.report("The judge: one request at most for every reply whose answer does not match")
        prices, budget = self.helpers.prices, self.helpers.budget
        if prices is not None and budget is not None and expected.price(prices)[1] > budget:
            raise ClearValueError(
                f"the teacher may cost {expected.price(prices)[1]:,.2f} and the budget is {budget:,.2f}: take a larger one, "
                "fewer rows (--limit) or fewer --tries. Nothing was asked"
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
        first = True
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
                if first and plan.pathway != "teacher":
                    fresh = [e for e in some if ("trace", e.id, 0) not in self.said]
                    self._tell_cost(fresh, sum(total.values()))
                tracer.advance = lambda: bars.advance(line)
                made, rejected = tracer.write(some, ways)
                self.rejected += rejected
            first = False
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
            write_whole(
                self.folder / name, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries)
            )
        files = {name: {"lines": len(e), "bytes": size_of(self.folder / name)} for name, e in lines.items()}
        summary = {"schema_version": 1, **self.settings, **summary, "files": files}
        write_whole(self.folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        (self.folder / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.folder / SOURCE, ignore_errors=True)
        return summary
