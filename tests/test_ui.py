"""The page without a browser: samples, uploads, the progress of a question, what is shown, and its models."""

import io
import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from clear_adapters import attach, store
from clear_adapters.cli import main
from clear_adapters.errors import ClearError, ClearValueError, ImageError
from clear_adapters.reply import TextDelta
from clear_adapters.results import read_result
from clear_adapters.ui import build_demo, render
from clear_adapters.ui.asking import MAX_QUESTION, Asking, Progress, Query, Turn, answer_of, thought_of
from clear_adapters.ui.benchmark import SmallRun
from clear_adapters.ui.models import ModelPool, Names, Stopped
from clear_adapters.ui.pictures import AS_IT_IS, RANDOM, data_url, degraded, read_upload
from clear_adapters.ui.samples import (
    OUTCOMES,
    PAGE_DATA,
    SEVERITY,
    Suggestion,
    choose,
    draw_sample,
    gallery,
    outcome,
    recorded,
)

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks" / name) for name in ("degraded_world", "demo")]

import report  # noqa: E402
import visits  # noqa: E402
from readme import between  # noqa: E402


@pytest.fixture
def names(toy):
    return Names(str(toy / "model"), str(toy / "adapter"))


@pytest.fixture
def pool(names):
    return ModelPool(names, allow_others=True, device="cpu", capacity=2)


def query(**options):
    picture = draw_sample(0).clean
    return Query(picture, options.pop("question", "What is it?"), **options)


# ------------------------------------------------------------------------------------------------------- samples


def test_the_gallery_is_what_the_rule_chooses_from_the_recorded_run():
    payload = recorded().payload
    rows = payload["rows"]
    assert [r["outcome"] for r in rows] == [outcome(r["base"], r["clear"], r["restored"]) for r in rows]
    for name, count in payload["counts"].items():
        assert count == sum(r["outcome"] == name for r in rows)
    assert [r["index"] for r in rows] == list(range(len(rows)))
    for row in rows[:12]:
        sample = draw_sample(row["index"])
        assert (sample.suggestions[0].kind, sample.degradation) == (row["kind"], row["degradation"])
    shown = gallery()
    assert [e.outcome for e in shown] == list(OUTCOMES)
    assert (
        len({e.index for e in shown}) == len({rows[e.index]["degradation"] for e in shown}) == len(OUTCOMES)
    )
    assert rows[shown[0].index]["kind"] == "reading"
    model = {"model": payload["model"], "adapter": payload["adapter"]}
    assert model == {"model": "builtin:bagel-tiny", "adapter": "builtin:clear-bagel-tiny"}


def test_the_rule_takes_the_first_that_fits():
    def row(index, what, kind="reading", damage="a", restored=True):
        return {"index": index, "outcome": what, "kind": kind, "degradation": damage, "restored": restored}

    rows = [
        row(0, "helps", kind="open", damage="b"),
        row(1, "helps"),
        row(2, "helps", kind="reading", damage="c"),
        row(3, "harms", damage="a"),
        row(4, "harms", damage="d", restored=False),
        row(5, "harms", damage="e"),
        row(6, "untouched", damage="f", restored=False),
    ]
    assert [r["index"] for r in choose(rows)] == [1, 0, 6, 5]
    words = [outcome(b, c, r) for b, c, r in ((0, 1, 1), (1, 0, 1), (1, 1, 1), (1, 1, 0), (0, 0, 0))]
    assert words == ["helps", "harms", "unneeded", "untouched", "fails"]


def test_the_recorded_outcomes_are_those_of_the_built_in_model():
    model = attach("builtin:bagel-tiny", "builtin:clear-bagel-tiny", device="cpu")
    for example in (gallery()[0], gallery()[-1]):  # the first that helps, and the one that does harm
        sample = draw_sample(example.index)
        own = sample.suggestions[0]
        seen = degraded(sample.clean, sample, sample.degradation, SEVERITY, sample.seed).seen
        with model.disabled():
            base = model.answer(seen, own.text)
        clear = model.answer(seen, own.text)
        found = outcome(own.is_right(base.text.strip()), own.is_right(clear.text.strip()), clear.restored)
        assert found == example.outcome, "run benchmarks/demo/choose.py"


def test_the_tables_of_the_page_are_those_of_the_official_result_and_the_readme_shows_its_figure():
    again = "run benchmarks/degraded_world/report.py with --page"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = between(text, report.MARKERS)  # held to the result by its own test
    assert (PAGE_DATA / "results.md").read_text(encoding="utf-8") == f"{shown}\n", again
    assert f"({(PAGE_DATA / 'results.png').relative_to(ROOT).as_posix()})" in text
    assert sum(p.stat().st_size for p in PAGE_DATA.iterdir()) < 300_000
    assert store.builtin_names() == [n for n in store.builtin_names() if "page" not in n]


def test_the_times_in_the_readme_are_those_of_the_result():
    text = visits.README.read_text(encoding="utf-8")
    shown = between(text, visits.MARKERS)
    official = ROOT / "benchmarks" / "results" / "demo.json"
    assert official.is_file(), "run benchmarks/demo/visits.py with --output and --readme"
    found = visits.render(read_result(official))
    assert shown == found, "run benchmarks/demo/visits.py with --output and --readme"


def test_a_question_is_known_however_it_is_spaced():
    sample = draw_sample(0)
    assert len(sample.suggestions) > 2
    lettered = next(s for s in sample.suggestions if s.options)
    assert "\n" in lettered.text
    assert sample.find(" ".join(lettered.text.split())) is lettered
    assert sample.find("What is it?") is None
    assert lettered.is_right(lettered.truth)
    assert not lettered.is_right("nothing of it")
    assert lettered.options["ABCDEFGH".index(lettered.truth)] in lettered.shown_truth
    assert Suggestion("?", "07", kind="reading").is_right("07")
    assert not Suggestion("?", "07", kind="reading").is_right("7")


# ------------------------------------------------------------------------------------------------------ pictures


def saved(image, path, **options):
    image.save(path, **options)
    return path


def test_an_upload_is_read_bounded_and_deleted(tmp_path):
    path = saved(Image.new("RGB", (900, 300), "red"), tmp_path / "a.jpg")
    picture = read_upload(path, 512)
    assert picture.size == (512, 171)
    assert picture.mode == "RGB"
    assert not path.exists()
    assert read_upload(saved(Image.new("L", (40, 30)), tmp_path / "b.png"), 512).size == (40, 30)


def test_bad_uploads_are_refused_in_words_and_deleted(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no picture at all")
    with pytest.raises(ImageError, match="no picture that can be read"):
        read_upload(text, 512)
    large = saved(Image.new("1", (10_000, 5_000)), tmp_path / "large.png")
    with pytest.raises(ImageError, match="50 megapixels"):
        read_upload(large, 512)
    half = tmp_path / "half.png"
    buffer = io.BytesIO()
    Image.effect_noise((300, 300), 90).save(buffer, "PNG")
    half.write_bytes(buffer.getvalue()[:4000])
    with pytest.raises(ImageError, match="truncated"):
        read_upload(half, 512)
    heavy = tmp_path / "heavy.png"
    heavy.write_bytes(bytes(21 * 2**20))
    with pytest.raises(ImageError, match="more than 20 MB"):
        read_upload(heavy, 512)
    with pytest.raises(ImageError, match="Upload it again"):
        read_upload(tmp_path / "gone.png", 512)
    assert list(tmp_path.iterdir()) == []


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PPM", "TGA"])
def test_only_formats_that_visitors_need_are_opened(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    buffer = io.BytesIO(EPS)
    if kind != "EPS":
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(buffer, kind)
    path = tmp_path / "named.png"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ImageError, match="no picture that can be read"):
        read_upload(path, 512)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF"])
def test_formats_of_phones_and_browsers_are_opened(tmp_path, kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    path = tmp_path / "named.bin"
    Image.new("RGB", (32, 24), "red").save(path, kind)
    assert read_upload(path, 512).size == (32, 24)


def test_what_is_clean_depends_on_what_is_known():
    sample = draw_sample(1)
    spoilt = degraded(sample.clean, sample, "lens_blur", "high", 3)
    assert spoilt.clean is sample.clean
    assert spoilt.seen.tobytes() != sample.clean.tobytes()
    assert spoilt.title == "lens blur, high"
    assert degraded(sample.clean, sample, "lens_blur", 0.3, 3).title == "lens blur, 0.30"
    drawn = degraded(sample.clean, None, RANDOM, "low", 5)
    assert drawn.title.endswith("low (drawn)")
    own = degraded(sample.clean, None, AS_IT_IS, "high", 0)
    assert own.clean is None
    assert own.seen is sample.clean
    assert degraded(sample.clean, sample, AS_IT_IS, "high", 0).clean is None
    assert data_url(own.seen).startswith("data:image/webp;base64,")


# ------------------------------------------------------------------------------------------------------- a question


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": ""}, "Write a question first"),
        ({"question": " \n"}, "Write a question first"),
        ({"question": "x" * 10_000}, "10,000 characters, and at most 2,000"),
        ({"question": "\U0001f600" * 2_000}, "8,000 bytes .* at most 4,000"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_query_that_cannot_work_says_why(options, message):
    with pytest.raises(ClearValueError, match=message):
        query(**options)
    assert query(question="x" * MAX_QUESTION).restore == "auto"
    assert query(question="\u00fc" * MAX_QUESTION).restore == "auto"


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("", "", ""),
        ("<thi", "", ""),
        ("<think>", "", ""),
        ("<think>Badly bl", "Badly bl", ""),
        ("<think>Badly blurred.</th", "Badly blurred.", ""),
        ("<think>Blurred.</think><image_rest", "Blurred.", ""),
        ("<think>Is a < b</think><answer>K7", "Is a < b", "K7"),
        ("<think>x</think><answer>K7Q</answer", "x", "K7Q"),
        ("<think>x</think><answer>K7Q</answer>", "x", "K7Q"),
    ],
)
def test_half_written_turns_are_shown_without_tags(text, thought, answer):
    assert thought_of(text) == thought
    assert answer_of(text) == answer


def test_the_progress_equals_what_the_model_answers(pool, names):
    asking = Asking(pool, names, query(restore="always", seed=3))
    phases, pictures = [], []
    for progress in asking.follow():
        phases.append(progress.phase)
        pictures += [t.picture for t in progress.turns if t.picture is not None]
    assert phases[-1] == "done"
    assert progress.is_whole
    assert phases[0] in ("load", "base")
    with pool.use(names) as model:
        with model.disabled():
            base = model.answer(query().picture, "What is it?", seed=3)
        clear = model.answer(query().picture, "What is it?", restore="always", seed=3)
    assert progress.base_text == base.text
    assert progress.base.plain
    assert progress.clear.transcript.reply == clear.transcript.reply
    assert progress.restored_image.tobytes() == clear.restored_image.tobytes()
    assert progress.turns[0].decision.forced
    assert "\n".join(t.text.strip("\n") for t in progress.turns) == clear.transcript.reply
    assert progress.base_seconds > 0 < progress.clear_seconds


def test_who_leaves_in_the_middle_leaves_the_model_as_it_was(pool, names):
    for kind in ("close", "stop"):
        asking = Asking(pool, names, query(restore="always"))
        follow = asking.follow()
        for progress in follow:
            if progress.phase != "load":
                break
        if kind == "close":
            follow.close()
        else:
            asking.stop.set()
            assert list(follow)[-1].phase in ("stopped", "done")
        with pool.use(names) as model:
            assert model.enabled
    assert not [
        t for t in threading.enumerate() if t.name == "clear-demo-ask" and t.is_alive() and not _ends(t)
    ]


def _ends(thread):
    thread.join(10)
    return not thread.is_alive()


def test_a_question_that_takes_too_long_ends_with_a_message(pool, names, monkeypatch):
    release = threading.Event()

    def endless(*args, **options):
        while True:
            time.sleep(0.05)
            yield TextDelta("la ")

    def stuck(*args, **options):
        release.wait(30)
        yield TextDelta("late")

    for stream in (endless, stuck):
        monkeypatch.setattr("clear_adapters.attached.AttachedModel.stream", stream)
        start = time.monotonic()
        progress = list(Asking(pool, names, query(), seconds=0.5).follow())[-1]
        assert progress.phase == "failed"
        assert "longer than 0.5 seconds" in progress.message
        assert time.monotonic() - start < 2.5
    release.set()
    monkeypatch.undo()
    assert list(Asking(pool, names, query()).follow())[-1].phase == "done"  # whoever waits gets the model


def test_who_waits_can_give_up_and_errors_become_words(pool, names, monkeypatch, caplog):
    with pool.use(names):
        asking = Asking(pool, names, query())
        follow = asking.follow()
        threading.Timer(0.05, asking.stop.set).start()
        assert [c.phase for c in follow][-1] == "stopped"
    progress = list(Asking(pool, Names(None, "builtin:nothing"), query()).follow())[-1]
    assert progress.phase == "failed"
    assert "builtin:nothing" in progress.message
    monkeypatch.setattr("clear_adapters.attached.AttachedModel.stream", lambda *a, **k: 1 / 0)
    progress = list(Asking(pool, names, query()).follow())[-1]
    assert (progress.phase, "log says what" in progress.message) == ("failed", True)
    assert "ZeroDivisionError" in caplog.text
    assert "ZeroDivision" not in progress.message


def counting(monkeypatch, names, capacity):
    """A pool of models that are none, and the list of what was loaded."""
    loaded = []
    monkeypatch.setattr(
        "clear_adapters.ui.models.attach", lambda m, a, device: loaded.append((m, a)) or object()
    )
    return ModelPool(names, allow_others=True, device="cpu", capacity=capacity), loaded


ADAPTERS = ["builtin:clear-bagel-tiny", "builtin:clear-bagel-tiny-sft", "builtin:clear-bagel-tiny-bridge"]


def test_one_at_a_time_has_a_model_and_few_are_kept(names, monkeypatch):
    pool, loaded = counting(monkeypatch, names, 2)
    others = [Names(None, a) for a in ADAPTERS]
    for n in (*others[:2], others[0], others[2], others[0], others[1]):
        with pool.use(n):
            pass
    assert [ADAPTERS.index(a) for _, a in loaded] == [0, 1, 2, 1]
    assert not pool.holds(others[2])
    entered = threading.Event()

    def second():
        with pool.use(others[0]):
            entered.set()

    with pool.use(others[1]):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.3)
        until(entered.is_set, pool.give_way)
        stop = threading.Event()
        stop.set()
        with pytest.raises(Stopped), pool.use(others[1], stop):
            pass
    thread.join()


def until(what, otherwise, seconds=10):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        otherwise()


def test_a_model_in_use_is_not_dropped_for_another(names, monkeypatch):
    pool, loaded = counting(monkeypatch, names, 1)
    first, second = (Names(None, a) for a in ADAPTERS[:2])
    entered = threading.Event()

    def wait():
        with pool.use(second):
            entered.set()

    thread = threading.Thread(target=wait)
    with pool.use(first):
        thread.start()
        for _ in range(4):
            pool.give_way()
        assert not entered.is_set()
        assert pool.holds(first)
    thread.join(10)
    assert entered.is_set()
    assert len(loaded) == 2
    assert not pool.holds(first)


def test_a_model_is_held_once_however_it_is_named(names, monkeypatch):
    pool, loaded = counting(monkeypatch, names, 2)
    for model in (None, "builtin:bagel-tiny", None):
        with pool.use(Names(model, ADAPTERS[0])):
            pass
    assert loaded == [(None, ADAPTERS[0])]


def test_a_choice_that_cannot_work_drops_nothing(names, monkeypatch, tmp_path):
    pool, loaded = counting(monkeypatch, names, 1)
    held = Names(None, ADAPTERS[0])
    with pool.use(held):
        pass
    for wrong, message in (
        (Names("builtin:janus-tiny", ADAPTERS[0]), "made for models of kind 'bagel'"),
        (Names(None, "builtin:nothing"), "builtin:nothing"),
        (Names(str(tmp_path), ADAPTERS[0]), "no model of a known kind"),
        (Names(None, str(tmp_path)), "clear_config"),
    ):
        with pytest.raises(ClearError, match=message), pool.use(wrong):
            pass
        assert pool.holds(held)
    assert len(loaded) == 1


def test_a_restricted_page_takes_no_other_names_and_tells_no_places(names, toy):
    pool = ModelPool(Names("builtin:bagel-tiny", ADAPTERS[0]), allow_others=False, device="cpu", capacity=1)
    assert pool.choices("model") == ["builtin:bagel-tiny", "builtin:janus-tiny"]
    assert pool.names("", ADAPTERS[1]) == Names(None, ADAPTERS[1])
    assert pool.names(None, None) == pool.default
    for model, adapter in (
        ("/etc", ""),
        ("", "owner/other"),
        ("builtin:bagel-tiny", str(ROOT)),
        ("builtin:emu3-tiny", ""),
    ):
        with pytest.raises(ClearValueError, match="its own models alone"):
            pool.names(model, adapter)
    own = ModelPool(names, allow_others=False, device="cpu", capacity=1)
    assert own.choices("model")[0] == "model"
    assert own.choices("adapter")[0] == "adapter"
    assert own.names("model", "adapter") == own.names("", "") == names
    assert own.names("", "adapter") == names
    with pytest.raises(ClearValueError, match="was not made for model") as caught:
        own.names("model", ADAPTERS[0])
    assert str(toy) not in str(caught.value)
    with pytest.raises(ClearValueError, match="its own models alone") as caught:
        own.names(names.model, names.adapter)
    assert str(toy) not in str(caught.value)
    for error in (OSError(2, "gone", "/srv/model"), ClearError("the folder /srv/model is empty")):
        assert "/srv" not in own.explain(error)
        assert "/srv" in ModelPool(names, allow_others=True, device="cpu", capacity=1).explain(error)
    assert own.explain(ClearError("too long: 1/2")) == "too long: 1/2"


def test_a_restricted_page_holds_no_places(toy):
    demo = build_demo(str(toy / "model"), str(toy / "adapter"), device="cpu")
    assert str(toy) not in json.dumps(demo.get_config_file(), default=str)


# ------------------------------------------------------------------------------------------------------- what is shown


def test_nothing_foreign_reaches_the_page_unescaped():
    bad = '<img src=x onerror="1"> {{value}} ${1+1}'
    progress = Progress("done", bad, turns=[Turn(f"<think>{bad}</think><answer>{bad}")])
    sample = draw_sample(0)
    subject = degraded(sample.clean, sample, AS_IT_IS, 0.5, 0)
    shown = [
        render.base_card(progress, subject, None),
        render.clear_before(progress),
        render.clear_after(progress, None),
        render.status(None, bad),
        render.problem(bad),
        render.bar(1, 2, bad),
    ]
    for text in shown:
        assert "onerror" in text
        assert "<img src=x" not in text
        assert "{" not in text
        assert "$" not in text


def test_right_and_wrong_are_words_and_only_where_the_truth_is_known():
    truth = Suggestion("?", "red", kind="open")
    assert "✓" in render.answer_box("red", True, truth)
    assert "</span> right</span>" in render.answer_box("red", True, truth)
    for box in (render.answer_box("blue", True, None), render.answer_box("blue", False, truth)):
        assert "right" not in box
        assert "wrong" not in box
    assert "</span> wrong</span>" in render.answer_box("blue", True, truth)


def test_pictures_are_named_and_any_two_of_them_compared():
    sample = draw_sample(0)
    spoilt = degraded(sample.clean, sample, "lens_blur", "high", 0)
    both = render.compare(spoilt, sample.clean)
    assert re.findall(r'value="([a-z]+-[a-z]+)"', both) == [
        "degraded-restored",
        "clean-restored",
        "clean-degraded",
    ]
    assert re.findall(r'alt="([^"]+)"', both) == [
        f"The {n} picture" for n in ("clean", "degraded", "restored")
    ]
    assert re.findall(r'value="([a-z]+-[a-z]+)"', render.compare(spoilt, None)) == ["clean-degraded"]
    own = degraded(sample.clean, None, AS_IT_IS, "high", 0)
    assert 'type="range"' not in render.compare(own, None)
    assert re.findall(r'value="([a-z]+-[a-z]+)"', render.compare(own, sample.clean)) == ["degraded-restored"]
    assert "means nothing" in render.preview(own, foreign=True)
    assert "means nothing" not in render.preview(own)


def test_a_family_without_steps_or_pixels_is_shown_too(pool, names):
    progress = list(Asking(pool, names, query(restore="always")).follow())[-1]
    turn = progress.turns[0]
    turn.steps, turn.step, turn.picture = 0, 0, None
    text = render.clear_picture(progress)
    assert "without pixels" in text
    assert "<progress" not in text
    assert "Restores" in text


# ------------------------------------------------------------------------------------------------------- a small run


def test_a_small_run_counts_up_and_can_be_cancelled(pool, names, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # the page's extra does without
    events = list(SmallRun(pool, names, 2).follow())
    done = [e[1:] for kind, e in events if kind == "progress"]
    assert done == [(2, 8), (4, 8), (6, 8), (8, 8)]
    kind, table = events[-1]
    assert kind == "done"
    assert "| CLEAR |" in table
    run = SmallRun(pool, names, 12)
    seen = []
    for kind, _ in run.follow():
        seen.append(kind)
        if kind == "progress":
            run.stop.set()
    assert seen[-1] == "stopped"
    assert "done" not in seen
    assert len(seen) < 12
    with pool.use(names) as model:
        assert model.enabled
    assert [k for k, _ in SmallRun(pool, Names(None, "builtin:nothing"), 2).follow()] == ["failed"]


# ------------------------------------------------------------------------------------------------------- the command


def test_arguments_are_checked_before_anything_is_served():
    for options, message in (
        ({"model": "some/model"}, "name the adapter too"),
        ({"adapter": "builtin:clear-bagel"}, "Did you mean"),
        ({"max_side": 3}, "max_side"),
        ({"keep_models": 0}, "keep_models"),
        ({"max_seconds": 0}, "max_seconds"),
    ):
        with pytest.raises(ClearError, match=message):
            build_demo(**options)


def test_the_command_restricts_a_page_that_others_can_reach(monkeypatch):
    calls = []
    monkeypatch.setattr("clear_adapters.ui.build_demo", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr("clear_adapters.ui.launch", lambda page, **k: calls.append(k))
    for arguments, other in (
        ([], True),
        (["--share"], False),
        (["--host", "0.0.0.0"], False),
        (["--host", "0.0.0.0", "--any-model"], True),
        (["--restricted"], False),
    ):
        done = CliRunner().invoke(main, ["demo", "--no-browser", "--port", "7999", *arguments])
        assert done.exit_code == 0, done.output
        (_, built), served = calls[-2:]
        assert built["allow_other_models"] is other
        assert (served["server_port"], served["inbrowser"]) == (7999, False)


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(main, ["demo"])
    assert done.exit_code == 2
    assert "clear-adapters[demo]" in done.output


def test_the_space_serves_the_restricted_page(monkeypatch):
    calls = []
    monkeypatch.setattr("clear_adapters.ui.build_demo", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr("clear_adapters.ui.launch", lambda page, **k: calls.append("served"))
    source = (ROOT / "demo" / "app.py").read_text()
    exec(compile(source, "app.py", "exec"), {"__name__": "__main__"})
    assert calls == [((), {}), "served"]
    head = (ROOT / "demo" / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in head
    assert "app_file: app.py" in head
    assert "clear-adapters[demo]" in (ROOT / "demo" / "requirements.txt").read_text()
