"""The client of chat services, through the real `openai` package, against a server on the loopback device."""

import inspect
import json
import logging
import pickle
import socket
import sys
import time
import traceback

import pytest

from clear_adapters.endpoint import Endpoint, EndpointError, Failure
from clear_adapters.errors import BrokenEntryError, ClearTypeError, ClearValueError, UnknownNameError
from tests.chat_server import NOW, Reply, serve

KEY = "sk-secret-of-the-test"

pytest.importorskip("openai")

# Connections that a test breaks on purpose may be collected while still open, in whichever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def echo(body, _):
    return Reply(body["messages"][-1]["content"])


def endpoint(service, **settings) -> Endpoint:
    return Endpoint(service.url, "m", **{"retries": 2, "timeout": 5, **settings})


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- what is asked and read


def test_replies_come_back_in_the_order_of_the_requests():
    def later_ones_first(body, _):
        text = body["messages"][0]["content"]
        return Reply(text, delay=0.02 * (5 - int(text)))

    with serve(later_ones_first) as service:
        got = endpoint(service).ask([ask(str(i)) for i in range(5)], int)
    assert got == [0, 1, 2, 3, 4]


def test_what_is_sent():
    with serve(Reply("1")) as service:
        endpoint(service, options={"temperature": 0.5, "guided_regex": "[01]"}).ask([ask("x")], int)
    assert service.requests == [
        {"model": "m", "messages": ask("x"), "temperature": 0.5, "guided_regex": "[01]"}
    ]


def test_equal_requests_are_asked_once():
    with serve(Reply("7")) as service:
        used = endpoint(service)
        assert used.ask([ask("same")] * 6 + [ask("other")], int) == [7] * 7
    assert len(service.requests) == 2
    assert used.counts == {"asked": 2, "failed": 0, "cached": 0}


def test_no_request_needs_no_service():
    assert Endpoint("http://127.0.0.1:1/v1", "m").ask([], int) == []


def test_concurrency_is_bounded():
    with serve(lambda body, _: Reply("1", delay=0.03)) as service:
        endpoint(service, concurrency=3).ask([ask(str(i)) for i in range(12)], int)
    assert service.busiest == 3


# -- the key


def test_a_key_from_the_named_variable_is_sent_and_shown_nowhere(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with serve(echo) as service:
        used = endpoint(service, key_env="JUDGE_KEY", cache=tmp_path)
        used.ask([ask("x")], str)
    assert service.headers[0]["authorization"] == f"Bearer {KEY}"
    stored = "".join(p.read_text() for p in tmp_path.rglob("*.json"))
    assert stored
    for seen in (repr(used), str(used), caplog.text, stored, json.dumps(service.requests)):
        assert KEY not in seen
    with pytest.raises(ClearTypeError):  # so it cannot slip into a checkpoint
        pickle.dumps(used)


def test_nothing_of_the_clients_own_variables_is_sent(monkeypatch):
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", f"private-{name}")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv(
        "OPENAI_CUSTOM_HEADERS", "Authorization: Bearer private-header\nX-Other: private-other"
    )
    with serve(echo) as service:
        assert endpoint(service).ask([ask("x")], str) == ["x"]
        assert endpoint(service, key=KEY).ask([ask("x")], str) == ["x"]
    assert "private" not in str(service.headers)
    assert "authorization" not in service.headers[0]


def test_there_is_no_default_key_or_address(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    parameters = inspect.signature(Endpoint).parameters
    assert parameters["base_url"].default is parameters["model"].default is inspect.Parameter.empty
    assert parameters["key"].default is parameters["key_env"].default is None


@pytest.mark.parametrize("leak", [f"Incorrect key {KEY}", f"'{KEY}'"])
def test_a_wrong_key_stops_at_once_and_is_not_repeated(leak):
    with serve(Reply(leak, status=401)) as service:
        used = endpoint(service, key=KEY, concurrency=1)
        with pytest.raises(EndpointError, match=r"HTTP 401.*\[key\]") as caught:
            used.ask([ask(str(i)) for i in range(5)], int)
    assert len(service.requests) < 5
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_an_unknown_model_stops_at_once():
    refused = pytest.raises(
        EndpointError, match=r"refuses every request for model 'm': HTTP 404.*no such model"
    )
    with serve(Reply("no such model", status=404)) as service, refused:
        endpoint(service).ask([ask("x")], int)
    assert len(service.requests) == 1


def test_an_account_without_money_stops_at_once():
    """Few requests would not reach the limit of failures, and what they asked for would be lost."""
    stops = pytest.raises(EndpointError, match=r"HTTP 402.*Insufficient Balance.*account")
    with serve(Reply("Insufficient Balance", status=402)) as service, stops:
        endpoint(service).ask([ask("x")], int)
    assert len(service.requests) == 1


# -- trouble that passes


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_a_passing_failure_is_retried(status):
    with serve(Reply(status=status, headers=NOW), Reply(status=status, headers=NOW), Reply("3")) as service:
        used = endpoint(service)
        assert used.ask([ask("x")], int) == [3]
    assert len(service.requests) == 3
    assert used.counts == {"asked": 1, "failed": 0, "cached": 0}


def test_retry_after_is_honoured():
    with serve(Reply(status=429, headers={"retry-after": "1"}), Reply("3")) as service:
        begin = time.monotonic()
        assert endpoint(service).ask([ask("x")], int) == [3]
    assert time.monotonic() - begin >= 1


@pytest.mark.parametrize(
    "bad",
    [
        Reply(body='{"choices": [{"mess'),
        Reply(body="<html>busy</html>"),
        Reply(body="<html>busy</html>", headers={"content-type": "text/html"}),
        Reply(body="{}"),
        Reply(body='{"choices": []}'),
        Reply(body='{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}'),
        Reply(body="[]"),
        Reply(body="null"),
        Reply("  "),
        Reply("no number"),
        Reply("1", finish="length"),
        Reply("1", finish="content_filter"),
    ],
)
def test_an_unreadable_reply_is_asked_for_again_and_never_guessed(bad):
    with serve(bad, Reply("0.25")) as service:
        assert endpoint(service).ask([ask("x")], float) == [0.25]
    assert len(service.requests) == 2
    with serve(bad) as service:
        used = endpoint(service)
        (got,) = used.ask([ask("x")], float)
    assert isinstance(got, Failure)
    assert got.reason.startswith("unreadable reply")
    assert len(service.requests) == 3
    assert used.counts == {"asked": 1, "failed": 1, "cached": 0}


# -- trouble that stays


def test_one_request_that_fails_leaves_the_others():
    def one_is_refused(body, _):
        text = body["messages"][0]["content"]
        return Reply("cannot take it", status=400) if text == "2" else Reply(text)

    with serve(one_is_refused) as service:
        got = endpoint(service).ask([ask(str(i)) for i in range(4)], int)
    assert [g for g in got if not isinstance(g, Failure)] == [0, 1, 3]
    assert isinstance(got[2], Failure)
    assert "HTTP 400" in got[2].reason
    assert "cannot take it" in got[2].reason
    assert len(service.requests) == 4


def test_a_service_that_stays_broken_is_a_failure():
    with serve(Reply("overloaded", status=500, headers=NOW)) as service:
        (got,) = endpoint(service).ask([ask("x")], int)
    assert isinstance(got, Failure)
    assert "HTTP 500" in got.reason
    assert len(service.requests) == 3


def test_a_wait_that_is_too_long_is_a_failure():
    with serve(Reply(status=429, headers={"retry-after": "3600"})) as service:
        begin = time.monotonic()
        (got,) = endpoint(service).ask([ask("x")], int)
    assert isinstance(got, Failure)
    assert time.monotonic() - begin < 30


def test_a_timeout_is_a_failure():
    with serve(Reply("1", delay=0.5)) as service:
        begin = time.monotonic()
        (got,) = endpoint(service, timeout=0.1, retries=0).ask([ask("x")], int)
        assert time.monotonic() - begin < 0.5
    assert isinstance(got, Failure)
    assert "timed out" in got.reason


def test_a_reply_that_trickles_in_is_timed_out_as_a_whole():
    """Each wait for some of it is far shorter than the limit."""
    slow, later = Reply("1", pause=0.1), Reply("2")
    with serve(slow, later) as service:
        begin = time.monotonic()
        (got,) = endpoint(service, timeout=0.5, retries=0).ask([ask("x")], int)
        assert time.monotonic() - begin < 0.9
        assert isinstance(got, Failure)
        assert got.kind == "timed out"
    with serve(slow, later) as service:
        assert endpoint(service, timeout=0.5, retries=1).ask([ask("x")], int) == [2]
        assert len(service.requests) == 2
        assert endpoint(service, timeout=30).ask([ask("y")], int) == [2]


def test_a_refused_connection_is_a_failure():
    used = Endpoint(f"http://127.0.0.1:{closed_port()}/v1", "m", retries=0)
    (got,) = used.ask([ask("x")], int)
    assert isinstance(got, Failure)
    assert "refused" in got.reason


def test_a_connection_that_breaks_off_is_a_failure():
    with serve(Reply("1", headers={"content-length": "10000", "connection": "close"})) as service:
        (got,) = endpoint(service, retries=0, timeout=1).ask([ask("x")], int)
    assert isinstance(got, Failure)


# -- the limit


def test_past_the_limit_the_run_stops_with_a_message():
    with serve(Reply("down", status=500)) as service:
        used = endpoint(service, retries=0, max_failures=3, window=10, concurrency=2)
        assert all(isinstance(g, Failure) for g in used.ask([ask(str(i)) for i in range(3)], int))
        with pytest.raises(
            EndpointError, match=r"4 of the last 4 requests .* at most 3 of 10 may.*HTTP 500: .*down"
        ):
            used.ask([ask(str(i)) for i in range(50)], int)
    assert len(service.requests) < 20  # those not begun were given up


def test_failures_long_ago_are_forgotten():
    def every_fourth(_, number):
        return Reply("no", status=400) if number % 4 == 0 else Reply("1")

    with serve(every_fourth) as service:
        used = endpoint(service, max_failures=2, window=8, concurrency=1)
        got = used.ask([ask(str(i)) for i in range(40)], int)
    assert sum(isinstance(g, Failure) for g in got) == 10


# -- the cache


def test_the_cache_answers_again_and_again(tmp_path):
    with serve(echo) as service:
        assert endpoint(service, cache=tmp_path / "new" / "cache").ask([ask("1"), ask("2")], int) == [1, 2]
        again = endpoint(service, cache=tmp_path / "new" / "cache")
        assert again.ask([ask("2"), ask("3")], int) == [2, 3]
        assert again.counts == {"asked": 1, "failed": 0, "cached": 1}
        for other in ({"options": {"temperature": 1.0}}, {"options": {}}):
            assert endpoint(service, cache=tmp_path / "new" / "cache", **other).ask([ask("2")], int) == [2]
        Endpoint(service.url, "other", cache=tmp_path / "new" / "cache").ask([ask("2")], int)
    assert len(service.requests) == 6
    assert not list(tmp_path.rglob("*.part"))


def test_failures_are_not_cached(tmp_path):
    with serve(Reply("bad"), Reply("worse", status=400), Reply("5")) as service:
        used = endpoint(service, retries=0, cache=tmp_path)
        assert isinstance(used.ask([ask("x")], int)[0], Failure)
        assert isinstance(used.ask([ask("x")], int)[0], Failure)
        assert used.ask([ask("x")], int) == [5]


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"reply": "word"}', '{"reply": 5}', "null"])
def test_a_damaged_cache_file_is_asked_for_again(tmp_path, damage):
    with serve(Reply("5")) as service:
        used = endpoint(service, cache=tmp_path)
        used.ask([ask("x")], int)
        (file,) = tmp_path.rglob("*.json")
        file.write_text(damage)
        assert used.ask([ask("x")], int) == [5]
        assert used.ask([ask("x")], int) == [5]
    assert len(service.requests) == 2


# -- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": ""}, "base_url"),
        ({"base_url": None}, "base_url"),
        ({"base_url": "host/v1"}, "https://host/v1"),
        ({"base_url": "ftp://host/v1"}, "https://host/v1"),
        ({"model": ""}, "model"),
        ({"key": KEY, "key_env": "JUDGE_KEY"}, "one of them"),
        ({"key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE is not set"),
        ({"options": {"model": "x"}}, "options must not hold model"),
        ({"retries": -1}, "retries"),
        ({"concurrency": 0}, "concurrency"),
        ({"max_failures": "5"}, "max_failures"),
        ({"max_failures": 5, "window": 5}, "window"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_settings_that_cannot_work(settings, message, monkeypatch):
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    with pytest.raises(ClearValueError, match=message):
        Endpoint(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": f"https://user:{KEY}@host/v1"},
        {"base_url": f"user:{KEY}@host/v1"},
        {"base_url": f"https://host/v1?key={KEY}"},
        {"key": f"{KEY} "},
        {"key": f"{KEY}\n"},
        {"key": f"{KEY}é"},
    ],
)
def test_a_key_in_the_wrong_form_or_place_is_not_repeated(settings):
    with pytest.raises(ClearValueError) as caught:
        Endpoint(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **settings})
    assert KEY not in str(caught.value)


def test_settings_from_plain_data():
    made = Endpoint.from_settings({"base_url": "http://127.0.0.1:1/v1/", "model": "m", "retries": 1})
    assert repr(made) == "Endpoint('http://127.0.0.1:1/v1', 'm')"
    with pytest.raises(UnknownNameError, match="retries"):
        Endpoint.from_settings({"base_url": "http://127.0.0.1:1/v1", "model": "m", "retrys": 1})
    with pytest.raises(ClearValueError, match="base_url is missing"):
        Endpoint.from_settings({"model": "m"})
    with pytest.raises(ClearValueError, match="key_env") as caught:
        Endpoint.from_settings({"base_url": "http://127.0.0.1:1/v1", "model": "m", "key": KEY})
    assert KEY not in str(caught.value)


def test_without_the_client_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(BrokenEntryError, match=r"clear-adapters\[judge\]"):
        Endpoint("http://127.0.0.1:1/v1", "m")
