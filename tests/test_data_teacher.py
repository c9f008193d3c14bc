"""Teachers of training data: every way in which one can fail, and what it costs to go on after a kill."""

import base64
import json
import time
from collections import Counter
from dataclasses import replace

import pytest

from clear_adapters.datasets import read_examples
from clear_adapters.datasets.builder import judging
from clear_adapters.datasets.builder.assembly import Helpers
from clear_adapters.datasets.builder.build import build
from clear_adapters.datasets.builder.cost import Prices
from clear_adapters.datasets.builder.plan import Plan
from clear_adapters.datasets.builder.teachers import EndpointTeacher, LocalTeacher
from clear_adapters.datasets.parts import read_parts
from clear_adapters.endpoint import Endpoint, EndpointError, Failure
from clear_adapters.errors import CheckpointError, ClearValueError
from clear_adapters.images import load_image
from clear_adapters.rewards.judge import Judge
from clear_adapters.transcript import RESTORE
from tests.bench_files import picture
from tests.chat_server import NOW, Reply, serve
from tests.data_files import contents, lines, photographs, rows_of, write_rows

pytest.importorskip("openai")

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PLAN = {"writer": "teacher", "splits": {"train": 1.0}, "restore_share": None}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return write_rows(folder / "rows.jsonl", rows_of(photographs(folder, 6)))


def text_of(body, place=1):
    content = body["messages"][place]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def right(body):
    """The trace that a request by the paper's rule asks for."""
    asked = text_of(body)
    truth = asked.split("True answer: ")[1].split("\n")[0]
    told = f"<think>It shows.</think>\n<answer>{truth}</answer>"
    return f"<think>Poor.</think>\n{RESTORE}\n{told}" if asked.endswith("The model restores.") else told


def helpers(service, judge=None, **settings):
    settings = {"retries": 0, "timeout": 5, "max_failures": 90, **settings}
    if "budget" in settings:
        settings["options"] = {"max_tokens": 500}
    more = {k: settings.pop(k) for k in ("prices", "budget", "report") if k in settings}
    teacher = EndpointTeacher(Endpoint(service.url, "m", **settings), side=64)
    return Helpers(teacher=teacher, judge=judge, workers=1, progress=False, **more)


def test_the_papers_teacher_sees_both_pictures_the_truth_and_the_path(source, tmp_path):
    with serve(lambda body, _: Reply(right(body))) as service:
        summary = build(source, tmp_path / "out", Plan(**PLAN), helpers=helpers(service))
    assert summary["teacher"] == {"faults": {}, "accepted_at_try": {"1": 12}}
    examples = {e.question: e for e in read_examples(tmp_path / "out")}
    assert len(service.requests) == 12
    for body in service.requests:
        first, second, text = body["messages"][1]["content"]
        assert first["image_url"]["url"] != second["image_url"]["url"]
        assert first["image_url"]["url"].startswith("data:image/jpeg;base64,")
        asked = text["text"].split("\n\nTrue answer")[0].removeprefix("Question: ")
        assert asked in examples
    for example in read_examples(tmp_path / "out"):
        assert (RESTORE in example.reply) == (example.severity in ("mid", "high"))


FAULTY = {
    "0-a": ("malformed", lambda told: told.replace("</think>", "", 1)),
    "0-b": ("wrong answer", lambda told: told.replace("<answer>", "<answer>not ")),
    "1-a": ("empty", lambda told: Reply("  ")),
    "1-b": ("cut off", lambda told: Reply(told, finish="length")),
    "2-a": ("rate limited", lambda told: Reply("slow", status=429, headers=NOW)),
    "2-b": ("timed out", lambda told: Reply(told, delay=1.2)),
    "3-a": ("no reply", lambda told: Reply(told, headers={"content-length": "9999", "connection": "close"})),
    "3-b": ("refused", lambda told: Reply("too odd", status=400)),
    "4-a": ("unreadable", lambda told: Reply(body='{"choices": []}')),
}


@pytest.mark.parametrize("times", [1, 3])
def test_every_fault_is_counted_retried_and_never_in_the_data(source, tmp_path, times):
    """Each row has a fault of its own, once or for ever."""
    rows = lines(source)
    came = Counter()

    def spoiled(body, _):
        asked = text_of(body)
        row = next(
            r
            for r in rows
            if r["question"] in asked and (r["id"][-1] == "a" or picture_of(body) == pictures[r["id"]])
        )
        came[row["id"]] += 1
        told = right(body)
        if row["id"] not in FAULTY or came[row["id"]] > times:
            return Reply(told)
        made = FAULTY[row["id"]][1](told)
        return made if isinstance(made, Reply) else Reply(made)

    def picture_of(body):
        return body["messages"][1]["content"][1]["image_url"]["url"]

    # The questions with options are alike: rows are told apart by their clean picture.
    probe = {}
    with serve(
        lambda body, _: (probe.setdefault(picture_of(body), []).append(text_of(body)), Reply(right(body)))[1]
    ) as s:
        build(source, tmp_path / "probe", Plan(**PLAN), helpers=helpers(s))
    pictures = {}
    for url, texts in probe.items():
        number = next(t.split("What is thing ")[1][0] for t in texts if "What is thing" in t)
        pictures[f"{number}-b"] = url
    with serve(spoiled) as service:
        used = replace(helpers(service, timeout=0.8), leave_unanswered=times == 3)
        summary = build(source, tmp_path / "out", Plan(**PLAN), helpers=used)
    kept = {r["id"]: r for r in lines(tmp_path / "out" / "data.jsonl")}
    rejected = {r["id"]: r for r in lines(tmp_path / "out" / "rejected.jsonl")}
    assert summary["teacher"]["faults"] == {reason: times for reason, _ in FAULTY.values()}
    assert len(kept) + len(rejected) == 12 == summary["read"]
    for row in kept.values():
        assert read_parts(row["reply"]).answer == row["answer"]
    if times == 1:
        assert not rejected
        assert summary["teacher"]["accepted_at_try"] == {"1": 3, "2": 9}
    else:
        assert {name: r["reason"] for name, r in rejected.items()} == {
            n: why for n, (why, _) in FAULTY.items()
        }
        assert all(len(r["tries"]) == 3 for r in rejected.values())
        assert summary["rejected"]["trace"] == {reason: 1 for reason, _ in FAULTY.values()}


def test_a_second_try_says_what_was_wrong(source, tmp_path):
    def once_wrong(body, _):
        return Reply("no tags" if len(body["messages"]) == 2 else right(body))

    with serve(once_wrong) as service:
        build(source, tmp_path / "out", Plan(**PLAN, limit=2), helpers=helpers(service))
    later = [b for b in service.requests if len(b["messages"]) > 2]
    assert len(later) == 2
    for body in later:
        assert text_of(body, 2) == "no tags"
        assert "the tags do not parse" in text_of(body, 3)


def test_a_judge_takes_other_words_and_the_truth_is_trained(source, tmp_path):
    def other_words(body, _):
        return Reply(right(body).replace("<answer>", "<answer>roughly "))

    def judged(body, _):
        return Reply("0" if '"truth": "a kind 0"' in text_of(body) else "1")

    with serve(other_words) as service, serve(judged) as court:
        judge = Judge(Endpoint(court.url, "j", retries=0))
        plan = Plan(**{**PLAN, "tries": 1})
        summary = build(source, tmp_path / "out", plan, helpers=helpers(service, judge))
    kept = lines(tmp_path / "out" / "data.jsonl")
    assert len(court.requests) == 6  # "roughly A" is option A without a judge
    assert {r["id"] for r in lines(source)} - {r["id"] for r in kept} == {"0-a"}
    assert all(read_parts(r["reply"]).answer == r["answer"] for r in kept)
    assert summary["rejected"]["trace"] == {"wrong answer": 1}


def test_a_judge_that_is_down_ends_no_row_and_the_teacher_is_not_asked_again(source, tmp_path):
    def other_words(body, _):
        return Reply(right(body).replace("<answer>", "<answer>roughly "))

    plan = Plan(**{**PLAN, "limit": 4})
    with serve(other_words) as service:

        def go_on(court, **more):
            judge = Judge(Endpoint(court.url, "j", retries=0))
            return build(source, tmp_path / "out", plan, helpers=replace(helpers(service, judge), **more))

        with serve(Reply("down", status=503, headers=NOW)) as court:
            with pytest.raises(EndpointError, match=r"(\d) rows were not judged by j; .*run again") as told:
                go_on(court)
            unsure = len(court.requests)
            assert str(told.value).startswith(f"{unsure} rows")
            assert unsure > 0
        assert not (tmp_path / "out" / "summary.json").exists()
        with serve(Reply("1")) as court:
            summary = go_on(court)
            assert len(court.requests) == unsure
        assert len(service.requests) == 4
    assert summary["teacher"] == {"faults": {}, "accepted_at_try": {"1": 4}}
    with serve(other_words) as service, serve(Reply("down", status=503, headers=NOW)) as court:
        judge = Judge(Endpoint(court.url, "j", retries=0))
        used = replace(helpers(service, judge), leave_unanswered=True)
        summary = build(source, tmp_path / "without", plan, helpers=used)
        assert len(service.requests) == 4
    assert summary["rejected"] == {"trace": {"no judgement": unsure}}
    assert summary["rows"]["train"] == 4 - unsure


def test_every_mark_is_on_disk_before_the_next_portion_is_marked(source, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "PORTION", 2)

    class Court:
        name = "j"
        marked = 0

        def mark(self, questions, truths, answers):
            if self.marked == 4:
                raise KeyboardInterrupt
            self.marked += len(answers)
            return [1.0] * len(answers)

    with serve(lambda body, _: Reply(right(body).replace("<answer>", "<answer>roughly "))) as service:
        first, second = Court(), Court()
        with pytest.raises(KeyboardInterrupt):
            build(source, tmp_path / "out", Plan(**PLAN), helpers=helpers(service, first))
        second.marked = -(10**6)
        build(source, tmp_path / "out", Plan(**PLAN), helpers=helpers(service, second))
    assert first.marked + second.marked + 10**6 == 6  # the other six name their option


def test_the_released_rule_lets_the_teacher_decide_without_the_truth(source, tmp_path):
    """It sees the degraded picture alone, and the clean one only after it asked for it."""

    def deciding(body, _):
        asked = text_of(body)
        first = len(body["messages"]) == 2
        if first and "What is thing" in asked:
            return Reply(f"<think>Poor.</think>\n{RESTORE}\nI wait.")
        number = asked.split("What is thing ")[1][0] if "What is thing" in asked else None
        return Reply(
            f"<think>Seen.</think>\n<answer>{'A' if number is None else f'a kind {number}'}</answer>"
        )

    with serve(deciding) as service:
        plan = Plan(**{**PLAN, "pathway": "teacher", "tries": 2})
        summary = build(source, tmp_path / "out", plan, helpers=helpers(service))
    kept = {r["id"]: r["reply"] for r in lines(tmp_path / "out" / "data.jsonl")}
    restored = f"<think>Poor.</think>\n{RESTORE}\n<think>Seen.</think>\n<answer>a kind 2</answer>"
    assert kept["2-a"] == restored
    assert kept["0-b"] == "<think>Seen.</think>\n<answer>A</answer>"  # the right one for the first picture
    assert "1-b" not in kept
    assert summary["pathways"] == {"direct": 2, "restore": 6}
    for body in service.requests:
        pictures = [
            c
            for m in body["messages"]
            for c in m["content"]
            if isinstance(c, dict) and c["type"] == "image_url"
        ]
        assert len(pictures) == (
            1 if len(body["messages"]) < 4 or "cannot be used" in text_of(body, 3) else 2
        )
        assert "True answer" not in json.dumps(body)


def test_a_first_turn_that_asks_and_goes_on_by_itself_restores(source, tmp_path):
    """It answers for a picture that it was not shown: the request counts, and what stands behind it does not."""

    def hasty(body, _):
        if len(body["messages"]) == 2:
            made_up = "<think>I see it.</think>\n<answer>wrong</answer>"
            return Reply(f"<think>Poor.</think>\n{RESTORE}\n{made_up}")
        assert text_of(body, 2) == f"<think>Poor.</think>\n{RESTORE}"
        return Reply("<think>Seen.</think>\n<answer>A</answer>")

    with serve(hasty) as service:
        plan = Plan(**{**PLAN, "pathway": "teacher", "tries": 1})
        summary = build(source, tmp_path / "out", plan, helpers=helpers(service))
    assert summary["pathways"] == {"restore": 2}  # those whose answer is A
    assert summary["rejected"] == {"trace": {"wrong answer": 10}}
    reply = lines(tmp_path / "out" / "data.jsonl")[0]["reply"]
    assert reply == f"<think>Poor.</think>\n{RESTORE}\n<think>Seen.</think>\n<answer>A</answer>"


class Stopping:
    """A teacher that is killed after so many replies."""

    def __init__(self, teacher, after):
        self.teacher, self.after, self.name = teacher, after, teacher.name

    def replies(self, conversations):
        for reply in self.teacher.replies(conversations):
            if self.after == 0:
                raise KeyboardInterrupt
            self.after -= 1
            yield reply


@pytest.mark.parametrize("cached", [True, False])
def test_a_killed_run_goes_on_without_paying_twice(source, tmp_path, cached):
    def once_wrong(body, _):
        if len(body["messages"]) == 2 and "Which?" in text_of(body):
            return Reply("no tags")
        return Reply(right(body))

    with serve(once_wrong) as service:
        build(source, tmp_path / "whole", Plan(**PLAN), helpers=helpers(service))
        whole = len(service.requests)
    with serve(once_wrong) as service:
        for after in (5, 4, 100):
            used = helpers(service, concurrency=1, cache=tmp_path / "cache" if cached else None)
            stopped = Helpers(teacher=Stopping(used.teacher, after), workers=1, progress=False)
            try:
                build(source, tmp_path / "out", Plan(**PLAN), helpers=stopped)
            except KeyboardInterrupt:
                time.sleep(0.2)
    assert whole == 18
    asked = Counter(json.dumps(b, sort_keys=True) for b in service.requests)
    assert len(asked) == whole
    # Of each kill the reply that was not taken and the requests under way; those the cache keeps.
    assert asked.total() - whole <= (0 if cached else 2 * 3)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_outage_stops_the_run_and_leaves_no_mark(source, tmp_path):
    with (
        serve(Reply("down", status=503, headers=NOW)) as service,
        pytest.raises(EndpointError, match="failed"),
    ):
        build(source, tmp_path / "out", Plan(**PLAN), helpers=helpers(service, max_failures=3))
    with serve(lambda body, _: Reply(right(body))) as service:
        summary = build(source, tmp_path / "out", Plan(**PLAN), helpers=helpers(service))
    assert summary["teacher"] == {"faults": {}, "accepted_at_try": {"1": 12}}


@pytest.mark.parametrize("pathway", ["severity", "teacher"])
def test_an_outage_of_a_small_build_ends_nothing(source, tmp_path, pathway):
    """Too few requests for the limit of failures."""
    plan = Plan(**{**PLAN, "pathway": pathway, "limit": 4})
    with (
        serve(Reply("down", status=503, headers=NOW)) as service,
        pytest.raises(EndpointError, match=r"4 rows were not answered.*503.*run again"),
    ):
        build(source, tmp_path / "out", plan, helpers=helpers(service, max_failures=20))
    assert not (tmp_path / "out" / "summary.json").exists()
    assert (tmp_path / "out" / "journal.jsonl").is_file()
    if pathway == "teacher":
        return
    with serve(lambda body, _: Reply(right(body))) as service:
        summary = build(source, tmp_path / "out", plan, helpers=helpers(service))
    assert summary["teacher"] == {"faults": {}, "accepted_at_try": {"1": 4}}
    with serve(Reply("odd", status=400)) as service:  # what the service will never answer is a reject
        summary = build(source, tmp_path / "other", plan, helpers=helpers(service))
    assert summary["rejected"] == {"trace": {"refused": 4}}


@pytest.mark.parametrize("pathway", ["severity", "teacher"])
def test_half_a_character_ends_no_build(tmp_path, pathway):
    """In a reply it is a malformed trace, in a source a row that cannot be used."""
    names = photographs(tmp_path, 3)
    rows = [{"id": n, "image": n, "question": "Q?", "answer": "yes"} for n in names]
    bad = [
        rows[0] | {"id": "x\ud83d"},
        rows[0] | {"id": "a", "question": "Q\ud83d?"},
        rows[0] | {"id": "b", "fact": "\ud83d"},
        rows[0] | {"id": "c", "image": "\ud83d.jpg"},
        rows[0] | {"id": "d", "options": ["\ud83d", "yes"]},
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows + bad)
    told = "<think>It \ud83d shows.</think>\n<answer>yes</answer>"

    def spoiled(body, _):
        if len(body["messages"]) > 2:
            return Reply("no")
        return Reply(told)

    with serve(spoiled) as service:
        plan = Plan(**{**PLAN, "pathway": pathway, "tries": 2})
        summary = build(source, tmp_path / "out", plan, helpers=helpers(service))
    stage = "trace" if pathway == "severity" else "pathway"
    assert summary["rejected"] == {"source": {"no text": 5}, stage: {"malformed": 3}}
    kept = [r for r in lines(tmp_path / "out" / "rejected.jsonl") if r["stage"] == stage]
    assert all([t["reply"] for t in r["tries"]] == [told, "no"] for r in kept)
    assert len(service.requests) == 6


@pytest.mark.parametrize("spoiled", ["low", "high"])
def test_rejects_are_made_up_for_and_the_ratio_holds(tmp_path, spoiled):
    """The first two pictures of one severity are never written: where others of it are left over, they step in."""
    names = photographs(tmp_path, 16)
    rows = [{"id": n, "image": n, "question": f"Q {n}?", "answer": "yes"} for n in names]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    plan = Plan(
        writer="teacher",
        splits={"train": 1.0},
        severities={"low": 0.7, "high": 0.3},
        tries=1,
        restore_share=0.5,
    )
    never: list[str] = []

    def sometimes(body, _):
        told = right(body)
        if (RESTORE in told) == (spoiled == "high") and len(never) < 2:
            never.append(text_of(body).split("Q ")[1].split("?")[0])
            return Reply("no")
        return Reply(told)

    with serve(sometimes) as service:
        summary = build(path, tmp_path / "out", plan, helpers=helpers(service, concurrency=1))
    severities = {r["source"]: r["severity"] for r in lines(tmp_path / "out" / "manifest.jsonl")}
    assert {severities[n] for n in never} == {spoiled}
    there = Counter(severities.values())
    assert there["low"] >= there["high"] + 2  # enough of the one are left over to make up for two
    good = Counter(severities[n] for n in names if n not in never)
    fewer = min(good["low"], good["high"])
    assert fewer == there["high"] - (2 if spoiled == "high" else 0) > 0
    assert summary["pathways"] == {"direct": fewer, "restore": fewer}
    kept = lines(tmp_path / "out" / "data.jsonl")
    assert Counter((severities[r["id"]], RESTORE in r["reply"]) for r in kept) == {
        ("low", False): fewer,
        ("high", True): fewer,
    }
    surplus = {
        f"surplus of {way} rows": good[s] - fewer for way, s in (("direct", "low"), ("restore", "high"))
    }
    assert summary["rejected"]["trace"] == {"malformed": 2}
    assert summary["rejected"].get("balance", {}) == {why: n for why, n in surplus.items() if n}
    lost = sum(sum(r.values()) for r in summary["rejected"].values())
    assert summary["read"] == 16 == lost + summary["rows"]["train"]
    # Nobody is asked about more than is needed: as many of both as the fewer, and once more for each made up for.
    assert len(service.requests) == 2 * there["high"] + (2 if spoiled == "low" else 0)


def test_the_cost_is_told_before_the_first_call_and_a_budget_holds(source, tmp_path):
    told = []
    with serve(lambda body, _: Reply(right(body))) as service:
        used = helpers(service, prices=Prices(2.0, 8.0), budget=0.001, report=told.append)
        with pytest.raises(ClearValueError, match=r"budget is 0\.00.*Nothing was asked"):
            build(source, tmp_path / "out", Plan(**PLAN), helpers=used)
        assert not service.requests
        used = helpers(service, prices=Prices(2.0, 8.0), budget=5.0, report=told.append)
        build(source, tmp_path / "out", Plan(**PLAN), helpers=used)
    assert "about 12 requests (36 at most)" in told[-1]
    assert "at most" in told[-1]


@pytest.mark.parametrize("pathway", ["severity", "teacher"])
def test_a_budget_holds_for_a_run_that_goes_on(source, tmp_path, pathway):
    plan = Plan(**{**PLAN, "pathway": pathway})

    def never(body, _):
        return Reply(f"<think>Poor.</think>\n{RESTORE}" if len(body["messages"]) == 2 else "no")

    told = []
    with serve(never) as service:
        used = helpers(service)
        stopped = Helpers(teacher=Stopping(used.teacher, 12), workers=1, progress=False)
        with pytest.raises(KeyboardInterrupt):
            build(source, tmp_path / "out", plan, helpers=stopped)
        time.sleep(0.2)
        asked = len(service.requests)
        used = helpers(service, prices=Prices(2.0, 8.0), budget=0.001, report=told.append)
        with pytest.raises(ClearValueError, match="Nothing was asked"):
            build(source, tmp_path / "out", plan, helpers=used)
        assert len(service.requests) == asked
    # All first replies are there: two more tries of each trace, or three of each second turn.
    assert f"({24 if pathway == 'severity' else 36} at most)" in told[0]


@pytest.mark.parametrize("counted", ["prompt", "completion"])
def test_what_a_teacher_may_cost_is_a_bound(source, tmp_path, counted):
    """Every try is taken, each reply is as long as it may be; tokens are counted as four letters and 750 pixels."""
    size, longest = (960, 800), 4000  # either is more than the bound allows for all else
    names = ["0.jpg", "1.jpg"]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(base64.b64decode(picture(i, size)))
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(names))
    told = []
    spent = Counter()

    def endless(body, _):
        for message in body["messages"]:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts = [p["text"] for p in parts if p["type"] == "text"]
            urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
            shown = [load_image(base64.b64decode(url.partition(",")[2])).size for url in urls]
            assert shown == [size] * (2 if urls else 0)
            spent["pictures"] += len(shown)
            spent["prompt"] += sum(map(len, texts)) // 4 + sum(-(-w * h // 750) for w, h in shown)
        spent["completion"] += longest
        return Reply("word" * longest)

    with serve(endless) as service:
        options = {"max_tokens": longest}
        endpoint = Endpoint(
            service.url, "m", retries=0, timeout=5, max_failures=90, concurrency=1, options=options
        )
        used = Helpers(
            teacher=EndpointTeacher(endpoint),
            prices=Prices(**{"prompt": 0, "completion": 0, counted: 1e6}),
            budget=1e9,
            report=told.append,
            workers=1,
            progress=False,
        )
        build(rows, tmp_path / "out", Plan(**PLAN), helpers=used)
    assert "(12 at most)" in told[0]
    assert len(service.requests) == 12
    assert spent["pictures"] == 24
    most = float(told[0].split("about ")[2].split(" at most")[0].split(", ")[1].replace(",", ""))
    assert spent[counted] <= most
    teacher = EndpointTeacher(Endpoint("http://127.0.0.1:1/v1", "m"))
    more = Helpers(teacher=teacher, prices=Prices(1, 1), budget=1.0)
    with pytest.raises(ClearValueError, match="max_tokens"):
        build(source, tmp_path / "none", Plan(**PLAN), helpers=more)


# -------------------------------------------------------------------------------------------------- the endpoint


def test_a_rate_limit_holds_for_repeated_requests_too():
    came = []

    def answer(_, number):
        came.append(time.monotonic())
        return Reply(status=429, headers=NOW) if number == 1 else Reply("1")

    with serve(answer) as service:
        used = Endpoint(service.url, "m", per_minute=600, concurrency=4)
        assert used.ask([[{"role": "user", "content": str(i)}] for i in range(3)], int) == [1, 1, 1]
    assert len(came) == 4
    assert came[-1] - came[0] >= 0.25  # three times a tenth of a second, less what the way takes
    with pytest.raises(ClearValueError, match="per_minute"):
        Endpoint("http://127.0.0.1:1/v1", "m", per_minute=0)


def test_conversations_are_taken_only_as_there_is_room():
    taken = []

    def conversations():
        for i in range(40):
            taken.append(i)
            yield [{"role": "user", "content": str(i)}]

    with serve(lambda body, _: Reply(body["messages"][0]["content"])) as service:
        stream = Endpoint(service.url, "m", concurrency=2).stream(conversations(), int)
        first = next(stream)
        assert len(taken) <= 5
        assert sorted([first, *stream]) == [(i, i) for i in range(40)]


# ------------------------------------------------------------------------------------------------ a local model


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A tiny random LLaVA on disk, of transformers' own classes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("llava")
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *"abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %} {% endfor %}{% endfor %}"
    )
    pictures = CLIPImageProcessor(
        size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}, do_center_crop=False
    )
    processor = LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8).to_dict(),
        text_config=LlamaConfig(**sizes, vocab_size=len(words), num_key_value_heads=2).to_dict(),
        image_token_index=4,
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_a_local_model_is_asked_and_held_to_the_same(local, source, tmp_path):
    teacher = LocalTeacher(str(local), device="cpu", max_new_tokens=4)
    plan = Plan(**{**PLAN, "tries": 1, "limit": 3})
    summary = build(
        source, tmp_path / "out", plan, helpers=Helpers(teacher=teacher, workers=1, progress=False)
    )
    assert summary["rows"]["train"] == 0
    assert sum(summary["teacher"]["faults"].values()) == 3
    assert set(summary["teacher"]["faults"]) <= {"malformed", "cut off", "empty"}
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        LocalTeacher(str(tmp_path))


def test_who_is_needed_is_said_at_once(source, tmp_path):
    with pytest.raises(ClearValueError, match="needs a teacher"):
        build(source, tmp_path / "out", Plan(**PLAN))
    teacher = EndpointTeacher(Endpoint("http://127.0.0.1:1/v1", "m"))
    with pytest.raises(ClearValueError, match="never be asked"):
        build(source, tmp_path / "out", Plan(), helpers=Helpers(teacher=teacher))
    assert Failure("x").kind == "no reply"
