"""The page's server, asked over loopback by Gradio's own client: many at once, two adapters, bad input, files."""

import gc
import io
import json
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from clear_adapters import attach
from clear_adapters.ui import build_demo, launch
from clear_adapters.ui.pictures import degraded
from clear_adapters.ui.samples import SEVERITY, draw_sample
from clear_adapters.ui.sessions import give_back

# Gradio's server and client leave sockets and event loops to the collector, whose warnings come at any moment.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

OUTPUTS = ("strip", "status", "base", "before", "picture", "after", "verdict", "transcript", "save")


@pytest.fixture(scope="module")
def second(toy, tmp_path_factory):
    """An adapter that answers otherwise than the toy's: it stops after two tokens."""
    from dataclasses import replace

    from clear_adapters import TextSampling

    folder = tmp_path_factory.mktemp("second") / "adapter"
    model = attach(str(toy / "model"), str(toy / "adapter"), device="cpu")
    model.config = replace(model.config, text=TextSampling(max_new_tokens=2))
    model.save_pretrained(folder)
    return str(folder)


class Page(NamedTuple):
    address: str
    files: Path
    demo: Any


@pytest.fixture(scope="module")
def page(toy, tmp_path_factory):
    """The address of a page with a toy model, and the folder that its uploads go to."""
    files = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(files))
        demo = build_demo(str(toy / "model"), str(toy / "adapter"), allow_other_models=True, device="cpu")
        _, address, _ = launch(demo, prevent_thread_lock=True, quiet=True, inbrowser=False)
        yield Page(address, files, demo)
        demo.close()
    gc.collect()  # what is left is told here, and not in another module's test


@pytest.fixture
def client(page):
    return Client(page.address, verbose=False)


def ask(client, question="What is it?", restore="auto", model="", adapter="", seed=0):
    job = client.submit(question, restore, model, adapter, seed, 0, 0, api_name="/ask")
    job.result(timeout=60)
    shown = {}
    for values in job.outputs():
        for name, value in zip(OUTPUTS, values, strict=True):
            if not (isinstance(value, dict) and value.get("__type__") == "update"):
                shown[name] = value
    return shown


def test_a_sample_is_chosen_and_both_answer(client, toy):
    client.predict(3, api_name="/choose")
    shown = ask(client, draw_sample(3).suggestions[0].text, "always")
    told = shown["transcript"]
    sample = draw_sample(3)
    assert told["picture"] == {
        "sample": 3,
        "size": [256, 256],
        "degradation": {"name": sample.degradation, "intensity": 0.9, "seed": sample.seed},
    }
    assert told["truth"] == sample.suggestions[0].truth
    assert told["as_it_is"]["plain"] is True
    assert told["clear"]["restored"] is True
    seen = degraded(sample.clean, sample, sample.degradation, SEVERITY, sample.seed).seen
    model = attach(str(toy / "model"), str(toy / "adapter"), device="cpu")
    again = model.answer(seen, sample.suggestions[0].text, restore="always")
    assert told["clear"]["transcript"] == again.to_json()["transcript"]
    assert "The restored picture" in shown["picture"]
    assert "The truth" in shown["verdict"]
    assert 'aria-current="step"' not in shown["strip"]


def test_the_damage_can_be_changed(client):
    client.predict(4, api_name="/choose")
    preview = client.predict("scan_lines", "low", 0.9, 7, "", "", api_name="/degrade")[0]
    assert "scan lines, low" in preview
    told = ask(client)["transcript"]
    assert told["picture"]["degradation"] == {"name": "scan_lines", "intensity": 0.23, "seed": 7}
    assert told["truth"] is None


def test_a_picture_that_was_forgotten_is_not_swapped_for_another(page):
    """After its time in memory a picture is gone, and the page may not answer about the first example in its place."""
    data = ["What?", "never", "", "", 0, 0, 0, 123]
    assert "forgotten" in call(page, "ask", data, "long ago")
    assert "forgotten" in call(page, "degrade", ["scan_lines", "high", 0.9, 0, "", "", 123], "long ago")
    assert "Done." in call(page, "ask", [*data[:-1], 0], "just come")


def test_a_question_about_a_picture_that_is_no_longer_there_is_dropped(page):
    call(page, "choose", [2], "hasty")
    shown = call(page, "ask", ["What?", "never", "", "", 0, 0, 0, 123], "hasty")
    assert "Stopped." in shown
    assert "Done." not in shown


def test_ten_at_once_are_all_answered(page):
    clients = [Client(page.address, verbose=False) for _ in range(10)]

    def one(number):
        clients[number].predict(number, api_name="/choose")
        return ask(clients[number], f"Question {number}?")["transcript"]

    with ThreadPoolExecutor(10) as pool:
        told = list(pool.map(one, range(10)))
    assert [t["picture"]["sample"] for t in told] == list(range(10))
    assert [t["question"] for t in told] == [f"Question {n}?" for n in range(10)]
    assert all(t["as_it_is"]["plain"] and not t["clear"]["plain"] for t in told)


def test_two_tabs_with_two_adapters_do_not_mix(page, toy, second):
    tabs = [Client(page.address, verbose=False) for _ in range(2)]
    adapters = [str(toy / "adapter"), second]

    def tokens(number):
        lengths = []
        for seed in range(3):
            told = ask(tabs[number], "Which?", "never", str(toy / "model"), adapters[number], seed)[
                "transcript"
            ]
            lengths.append(max(s["tokens"] for s in told["clear"]["transcript"][-1:] if s["kind"] == "text"))
            assert told["adapter"] == adapters[number]
        return lengths

    with ThreadPoolExecutor(2) as pool:
        first, other = pool.map(tokens, range(2))
    assert min(first) > 2
    assert max(other) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": ""}, "Write a question first"),
        ({"question": "y" * 10_000}, "10,000 characters"),
        ({"adapter": "builtin:clear-bagle-tiny"}, "Did you mean"),
        ({"adapter": "./nowhere"}, "no folder on this machine"),
        (
            {"model": "builtin:bagel-tiny", "adapter": str(Path(__file__).parent / "data" / "bagel")},
            "clear_config",
        ),
        ({"seed": None}, "seed"),
    ],
)
def test_what_cannot_be_asked_is_told_and_the_server_lives_on(client, options, message):
    shown = ask(client, **options)
    assert 'role="alert"' in shown["status"]
    assert message in shown["status"]
    assert "transcript" not in shown or shown["transcript"] is None
    assert ask(client)["transcript"]["question"] == "What is it?"


def upload(client, path):
    return client.predict(handle_file(str(path)), "none", "high", 0.9, 0, "", "", api_name="/upload")


def test_uploads_are_read_asked_about_and_kept_nowhere(client, page, tmp_path):
    path = tmp_path / "own.jpg"
    Image.new("RGB", (700, 350), "teal").save(path)
    shown = upload(client, path)
    assert "What the models see: as it is" in str(shown)
    told = ask(client, "What colour is it?")["transcript"]
    assert told["picture"] == {"sample": None, "size": [512, 256], "degradation": None}
    assert [p for p in page.files.rglob("*") if p.is_file()] == []


def test_bad_uploads_are_told_and_kept_nowhere(client, page, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("this is no picture")
    large = tmp_path / "large.png"
    Image.new("1", (10_000, 5_000)).save(large)
    assert "no picture that can be read" in str(upload(client, text))
    assert "50 megapixels" in str(upload(client, large))
    heavy = tmp_path / "heavy.png"
    heavy.write_bytes(bytes(21 * 2**20))
    with pytest.raises(Exception, match=r"413|size"):
        upload(client, heavy)
    assert [p for p in page.files.rglob("*") if p.is_file()] == []
    assert ask(client)["transcript"] is not None


def test_no_file_outside_can_be_read_through_the_page(client, page, toy, tmp_path):
    address = page.address
    secret = tmp_path / "secret.png"
    Image.new("RGB", (20, 20)).save(secret)
    here = Path(__file__)
    for path in (secret, here, "/etc/passwd", "../../../../etc/passwd", toy / "model" / "ema.safetensors"):
        found = httpx.get(f"{address}gradio_api/file={path}")
        assert found.status_code in (403, 404), path


def call(page, name, data, session=None):
    """Asks the server without Gradio's client, which would tidy up what is sent; the whole stream of answers."""
    body = {"data": data, **({"session_hash": session} if session else {})}
    made = httpx.post(
        f"{page.address}gradio_api/call/{name}",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
        timeout=30,
    )
    event = made.json().get("event_id") if made.status_code == 200 else None
    return httpx.get(f"{page.address}gradio_api/call/{name}/{event}", timeout=60).text if event else made.text


DAMAGE = ["none", "high", 0.9, 0, "", ""]
PROPER = {"_type": "gradio.FileData"}


def sent(page, content, name="own.png"):
    """The path of a file that was sent to the page."""
    return httpx.post(f"{page.address}gradio_api/upload", files={"files": (name, content)}).json()[0]


def encoded(picture, kind="PNG"):
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("session", [None, "thief"])
@pytest.mark.parametrize("kind", ["picture", "text", "in the page's folder"])
@pytest.mark.parametrize("meta", ["absent", None, {"_type": "x"}, PROPER])
def test_no_file_that_is_no_upload_is_read_or_deleted(page, tmp_path, session, kind, meta):
    victim = (page.files if kind == "in the page's folder" else tmp_path) / "victim.png"
    if kind == "text":
        victim.write_text("password = hunter2")
    else:
        Image.new("RGB", (77, 33), "purple").save(victim)
    try:
        payload = {"path": str(victim), **({} if meta == "absent" else {"meta": meta})}
        shown = call(page, "upload", [payload, *DAMAGE], session)
        assert "77/33" not in shown
        assert "What the models see" not in shown
        assert "no picture that can be read" not in shown
        assert victim.exists()
    finally:
        victim.unlink()


def test_uploads_are_told_apart_after_an_empty_one(page):
    for content in (b"this is no picture", encoded(Image.new("1", (10_000, 5_000)))):
        call(page, "upload", [None, *DAMAGE], "empty")
        shown = call(page, "upload", [{"path": sent(page, content), "meta": PROPER}, *DAMAGE], "empty")
        assert "no picture that can be read" in shown or "50 megapixels" in shown
        assert [p for p in page.files.rglob("*") if p.is_file()] == []
    path = sent(page, encoded(Image.new("RGB", (60, 40))))
    assert "What the models see" in call(page, "upload", [{"path": path, "meta": PROPER}, *DAMAGE], "empty")
    again = call(page, "upload", [{"path": path, "meta": PROPER}, *DAMAGE], "another")
    assert "Upload it again" in again  # the same file of another visitor, read in between


NONSENSE = [None, "x", float("nan"), float("inf"), -1, 10**400, [1], {}, True]


@pytest.mark.parametrize("value", NONSENSE, ids=str)
def test_what_is_no_number_is_told(page, value):
    for place, name in ((4, "seed"), (5, "number of points"), (6, "temperature")):
        data = ["What?", "never", "", "", 0, 0, 0, 0]
        data[place] = value
        shown = call(page, "ask", data)
        assert f"The {name} is" in shown, shown[-300:]
    assert "The number of the sample" in call(page, "choose", [value])
    assert "The number of questions" in call(page, "run", [value, "", ""])
    assert "The seed" in call(page, "degrade", ["none", "high", 0.9, value, "", "", 0])
    assert "The severity" in call(page, "degrade", ["scan_lines", None, value, 0, "", "", 0])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 5, "no text"),
        (0, ["a"], "no text"),
        (0, None, "Write a question first"),
        (0, "\ud800 what", "cannot be written"),
        (2, ["x"], "no name"),
        (3, {}, "no name"),
        (5, 1, "2 to 50"),
    ],
)
def test_what_is_no_text_is_told(page, place, value, message):
    data = ["What?", "never", "", "", 0, 0, 0, 0]
    data[place] = value
    assert message in call(page, "ask", data)


def traces(page, session):
    """Whether the server holds anything of a visit, and the texts in it."""
    held = page.demo.state_holder.session_data.get(session)
    return "" if held is None else str(held.config_values) + str(held.state_data)


def until(what, seconds=20):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.1)
    return what()


def test_a_visit_is_forgotten_when_its_page_is_closed(page):
    with httpx.stream("GET", f"{page.address}gradio_api/heartbeat/closing", timeout=20) as beat:
        next(beat.iter_lines())
        for session in ("closing", "open"):
            payload = {"path": sent(page, encoded(Image.new("RGB", (61, 43)))), "meta": PROPER}
            assert "61/43" in call(page, "upload", [payload, *DAMAGE], session)
            assert "61/43" in traces(page, session)
    assert until(lambda: not traces(page, "closing"))
    assert "61/43" in traces(page, "open")
    page.demo.sessions.sweep(time.time() + 3000)
    assert "61/43" in traces(page, "open")
    page.demo.sessions.sweep(time.time() + 3700)
    assert not traces(page, "open")


def test_a_visit_that_ends_in_the_middle_of_an_answer_is_forgotten_too(page):
    with httpx.stream("GET", f"{page.address}gradio_api/heartbeat/middle", timeout=20) as beat:
        next(beat.iter_lines())
        body = {"data": ["What?", "always", "", "", 0, 50, 0, 0], "session_hash": "middle"}
        event = httpx.post(f"{page.address}gradio_api/call/ask", json=body).json()["event_id"]
        with httpx.stream("GET", f"{page.address}gradio_api/call/ask/{event}", timeout=60) as answer:
            for number, _ in enumerate(answer.iter_lines()):
                if number > 6:
                    break
    assert until(lambda: not [t for t in threading.enumerate() if t.name == "clear-demo-ask"])
    assert until(lambda: page.demo.sessions.sweep() or not traces(page, "middle"))


def test_what_is_noted_down_after_a_page_was_closed_is_forgotten(page):
    page.demo.sessions.leave(SimpleNamespace(session_hash="late"))
    call(page, "choose", [2], "late")
    assert traces(page, "late")
    page.demo.sessions.sweep()
    assert not traces(page, "late")


def test_a_visit_that_stays_does_not_grow(page):
    def sizes():
        held = page.demo.state_holder.session_data["stays"]
        return len(held.blocks_config.blocks), len(held.config_values)

    for number in range(3):
        call(page, "choose", [number], "stays")
        assert "event: complete" in call(page, "ask", ["What?", "never", "", "", 0, 50, 0, 0], "stays")
    page.demo.sessions.sweep()
    assert max(sizes()) == len(page.demo.blocks)
    assert "event: complete" in call(page, "ask", ["What?", "never", "", "", 0, 50, 0, 0], "stays")


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_memory_that_was_freed_is_given_back():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # Small pieces below one that stays: freeing them alone gives nothing back.
    pieces = [bytes(4000) for _ in range(20_000)]
    last = bytes(4000)
    before = resident()
    pieces.clear()
    give_back()
    assert resident() < before - 40e6
    assert len(last) == 4000


def test_forgetting_goes_on_while_the_page_is_served(page, monkeypatch):
    swept = threading.Event()
    monkeypatch.setattr(page.demo.sessions, "sweep", swept.set)
    monkeypatch.setattr("clear_adapters.ui.sessions._EVERY", 0.1)
    with page.demo.sessions.watch():
        assert swept.wait(5)
    monkeypatch.setattr(page.demo, "is_running", False)
    assert until(lambda: sum(t.name == "clear-demo-forget" for t in threading.enumerate()) <= 1)


def test_many_files_in_one_request_are_refused(page):
    many = [("files", (f"{n}.png", bytes(3 * 2**20))) for n in range(8)]
    assert httpx.post(f"{page.address}gradio_api/upload", files=many, timeout=60).status_code == 413
    request = httpx.Request("POST", f"{page.address}gradio_api/upload", files=many)
    content = request.read()

    def pieces():
        for start in range(0, len(content), 2**20):
            yield content[start : start + 2**20]

    kind = {"content-type": request.headers["content-type"]}
    with suppress(httpx.WriteError):
        found = httpx.post(f"{page.address}gradio_api/upload", content=pieces(), headers=kind, timeout=60)
        assert found.status_code == 413
    assert [p for p in page.files.rglob("*") if p.is_file()] == []


def test_the_page_asks_nobody_else(page):
    text = httpx.get(page.address).text
    loaded = re.findall(r'(?:src|href)="(https?://[^"]+)"', text)
    assert [a for a in loaded if not a.startswith(page.address)] == []


def test_a_small_run_of_the_page(client):
    job = client.submit(6, "", "", api_name="/run")
    job.result(timeout=100)
    told = [o[0] for o in job.outputs()]
    assert sum("<progress" in str(t) for t in told) > 3
    assert "Done: 6 questions" in told[-1]
    assert "| CLEAR |" in job.outputs()[-1][1]
