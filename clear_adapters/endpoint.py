"""The one client of OpenAI-compatible chat services: bounded, retried, cached on disk, and explicit about failure.

    service = Endpoint("http://127.0.0.1:8000/v1", "my-model")
    replies = service.ask([[{"role": "user", "content": "Say 1."}]], read=float)

There is no default address and no default key. What is asked, and what a reply means, is the caller's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from clear_adapters.errors import BrokenEntryError, ClearError, ClearTypeError, ClearValueError, unknown_name

T = TypeVar("T")

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation in the form of the chat-completions protocol: `{"role": ..., "content": ...}`."""

_LOG = logging.getLogger(__name__)

_SENT = frozenset(
    ("host", "user-agent", "accept", "accept-encoding", "connection", "content-type", "content-length")
)
"""Headers that leave, beside our own key. The client would add more from variables such as OPENAI_ORG_ID, which
concern another service than the one that was named."""

_HOPELESS = (401, 402, 404)
"""Statuses that no later request can escape: a key that is not accepted, an account without money, an address or a model
that is not there."""

_KEY = re.compile(r"[!-~]+")
"""What a header can hold: of another key, the client's error would repeat it."""

_QUOTED = 300
"""Characters of a service's words that are repeated in a message."""


class EndpointError(ClearError, RuntimeError):
    """A service that cannot be used, or that failed more often than allowed."""


@dataclass(frozen=True)
class Failure:
    """What stands in place of a reply that could not be had.

    Attributes:
        reason: why, for people; never holds the key.
        kind: why, for counting: `empty`, `cut off`, `unreadable`, `rate limited`, `refused`, `timed out` or `no reply`.
    """

    reason: str
    kind: str = "no reply"


class _UnreadableError(ValueError):
    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Endpoint:
    """One model behind one address.

    Attributes:
        base_url: address of the service.
        model: name of the model there.
        counts: requests so far: `asked` of the service, `failed` of those, `cached` ones that needed no asking.
        max_tokens: longest reply that is asked for, in tokens; None where the options do not say.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key: str | None = None,
        key_env: str | None = None,
        options: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
        cache: str | Path | None = None,
        max_failures: int = 20,
        window: int = 100,
        per_minute: float | None = None,
    ) -> None:
        """Checks the settings; nothing is sent.

        Args:
            base_url: address, as in `https://host/v1`.
            model: name of the model.
            key: the key; kept in memory alone.
            key_env: environment variable that holds the key. Without either, no key is sent (local servers).
            options: further fields of every request; None is `{"temperature": 0.0}`.
            timeout: seconds a request may take, from its sending to the last byte of the reply; one that falls silent is
                given up at twice as many.
            retries: how often a request is repeated: by the client after a timeout, a broken connection or a status of
                408, 409, 429 or 5xx (it waits as `Retry-After` says, where that is not minutes), and after an unreadable reply.
            concurrency: requests under way at once.
            cache: folder in which readable replies are kept, under a hash of address, model, options and messages.
            max_failures: more failures than this among the last `window` requests that were asked stop the run.
            window: how many requests back failures count.
            per_minute: requests that are begun within a minute at most, repeated ones included; None sets no limit.

        Raises:
            ClearValueError: a setting cannot work, or the variable is not set.
            BrokenEntryError: the client is not installed.
        """
        for name, text in (("base_url", base_url), ("model", model)):
            if not isinstance(text, str) or not text:
                raise ClearValueError(f"{name}={text!r}: must be a text, and there is no default for it")
        if "@" in base_url or "?" in base_url:
            # Not repeated: it may hold a password.
            raise ClearValueError("base_url must hold neither a user nor a query: a key goes by key_env")
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ClearValueError(f"base_url={base_url!r}: must be an address such as 'https://host/v1'")
        if key is not None and key_env is not None:
            raise ClearValueError(f"a key was given, and key_env={key_env!r} as well: give one of them")
        if key_env is not None:
            key = os.environ.get(key_env)
            if not key:
                raise ClearValueError(
                    f"the environment variable {key_env} is not set: it should hold the key"
                )
        if key is not None and not _KEY.fullmatch(key):
            raise ClearValueError(
                f"{key_env or 'the key'} holds no key: it must be printable ASCII without spaces"
            )
        if reserved := {"model", "messages", "stream"} & set(options or ()):
            raise ClearValueError(f"options must not hold {', '.join(sorted(reserved))}: they are set here")
        for name, value, low in (
            ("retries", retries, 0),
            ("concurrency", concurrency, 1),
            ("max_failures", max_failures, 0),
            ("window", window, 1),
        ):
            if not isinstance(value, int) or value < low:
                raise ClearValueError(f"{name}={value!r}: must be a whole number, at least {low}")
        if window <= max_failures:
            raise ClearValueError(
                f"window={window}: {max_failures} failures are allowed (max_failures), so more must be counted"
            )
        if not isinstance(timeout, int | float) or not timeout > 0:
            raise ClearValueError(f"timeout={timeout!r}: must be positive, in seconds")
        if per_minute is not None and (not isinstance(per_minute, int | float) or not per_minute > 0):
            raise ClearValueError(f"per_minute={per_minute!r}: must be positive, or None for no limit")
        if (
            importlib.util.find_spec("openai") is None
        ):  # said before a run begins, and not at its first question
            raise BrokenEntryError(
                "Asking a service needs the openai client: pip install 'clear-adapters[judge]'"
            )
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.counts = {"asked": 0, "failed": 0, "cached": 0}
        self._key = key
        self._key_name = key_env or "the key"
        self._options = {"temperature": 0.0} if options is None else dict(options)
        told = self._options.get("max_tokens", self._options.get("max_completion_tokens"))
        self.max_tokens = told if isinstance(told, int) else None
        self._timeout = timeout
        self._retries = retries
        self._concurrency = concurrency
        self._cache = None if cache is None else Path(cache)
        self._max_failures = max_failures
        self._recent: deque[bool] = deque(maxlen=window)
        self._interval = 0.0 if per_minute is None else 60 / per_minute
        self._next = 0.0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, {self.model!r})"

    def __getstate__(self) -> Any:
        raise ClearTypeError(
            "an endpoint may hold a key, which must not be stored: make another one of its settings"
        )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Endpoint:
        """Makes one from plain data, such as a part of a recipe.

        Raises:
            UnknownNameError: an unknown setting.
            ClearValueError: a setting is missing or cannot work, or the key itself stands among them.
        """
        known = set(inspect.signature(cls).parameters) - {"key"}
        if "key" in settings:
            raise ClearValueError(
                "a key must not stand among settings, which are stored: name the environment variable that holds "
                "it with key_env"
            )
        for name in settings:
            if name not in known:
                raise unknown_name("setting of an endpoint", name, known)
        for name in ("base_url", "model"):
            if name not in settings:
                raise ClearValueError(f"{name} is missing: there is no default for it")
        return cls(**settings)

    def ask(self, requests: Sequence[Messages], read: Callable[[str], T]) -> list[T | Failure]:
        """Asks the service; equal requests are asked once.

        Args:
            requests: conversations.
            read: takes a reply's text and gives its meaning; raises `ValueError` for one that is unreadable, which is
                then asked for again. Called from several threads.

        Returns:
            For each request what was read, or why there is nothing.

        Raises:
            EndpointError: the service refuses every request, or failed too often.
        """
        found = dict(self.stream(requests, read))
        return [found[place] for place in range(len(requests))]

    def stream(
        self, requests: Iterable[Messages], read: Callable[[str], T], *, repeats: int | None = None
    ) -> Iterator[tuple[int, T | Failure]]:
        """Asks the service, and gives each reply as soon as it is there; equal requests are asked once.

        Conversations are taken one by one as there is room for them, so that they need not all be in memory.

        Args:
            requests: conversations.
            read: as for `ask`.
            repeats: how often an unreadable reply is asked for again; None is `retries`.

        Yields:
            The place of a request, and what was read or why there is nothing; in the order of replies.

        Raises:
            EndpointError: the service refuses every request, or failed too often.
        """
        found: dict[str, T | Failure] = {}
        places: dict[str, list[int]] = {}
        under_way: dict[Future[T | Failure], str] = {}
        client: Any = None
        pool = ThreadPoolExecutor(self._concurrency)
        left = enumerate(requests)
        more = True

        def close(_: object = None) -> None:
            # Not before: a request on its way would open another connection, which nobody closes.
            if client is not None and all(future.done() for future in under_way):
                client.close()

        try:
            while more or under_way:
                while more and len(under_way) < 2 * self._concurrency:
                    place, messages = next(left, (-1, None))
                    if messages is None:
                        more = False
                        break
                    digest = self._digest(messages)
                    if digest not in found and (kept := self._recall(digest, read)) is not None:
                        self.counts["cached"] += 1
                        found[digest] = kept[0]
                    if digest in found:
                        yield place, found[digest]
                    elif digest in places:
                        places[digest].append(place)
                    else:
                        client = client or self._connect()
                        create = client.chat.completions.create
                        future = pool.submit(self._ask_one, create, digest, messages, read, repeats)
                        under_way[future] = digest
                        places[digest] = [place]
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    answer = future.result()
                    digest = under_way.pop(future)
                    self._count(answer)
                    found[digest] = answer
                    for place in places.pop(digest):
                        yield place, answer
        finally:
            # A run that stops does not wait for requests whose replies nobody will read.
            pool.shutdown(wait=False, cancel_futures=True)
            for future in list(under_way):
                future.add_done_callback(close)
            close()

    def _recall(self, digest: str, read: Callable[[str], T]) -> tuple[T] | None:
        text = self._load(digest)
        try:
            return None if text is None else (read(text),)
        except ValueError:  # the caller's reading has changed
            return None

    def _ask_one(
        self,
        create: Callable[..., Any],
        digest: str,
        messages: Messages,
        read: Callable[[str], T],
        repeats: int | None,
    ) -> T | Failure:
        import openai

        for _ in range((self._retries if repeats is None else repeats) + 1):
            try:
                # As a body, so that fields that only some services know can be sent.
                completion = create(model=self.model, messages=list(messages), extra_body=self._options)
                text = _text(completion)
                meaning = read(text)
                self._save(digest, text)  # at once: a run that is killed has not paid for nothing
                return meaning
            except ValueError as error:
                kind = error.kind if isinstance(error, _UnreadableError) else "unreadable"
                failure = Failure(self._safe(f"unreadable reply: {error}"), kind)
            except openai.APIStatusError as error:
                kind = "rate limited" if error.status_code == 429 else "refused"
                failure = Failure(self._safe(f"HTTP {error.status_code}: {error.message}"), kind)
                if error.status_code not in _HOPELESS:
                    return failure
                # From None: the service's own words, in the error behind this one, may repeat the key.
                raise EndpointError(
                    f"{self.base_url} refuses every request for model {self.model!r}: {failure.reason}. Check the "
                    f"address, the model, {self._key_name} and its account; asking again cannot help."
                ) from None
            except openai.APIError as error:
                kind = "timed out" if isinstance(error, openai.APITimeoutError) else "no reply"
                return Failure(self._safe(f"{error.message} {error.__cause__ or ''}"), kind)
        return failure

    def _wait_for_turn(self) -> None:
        if not self._interval:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
        time.sleep(turn - now)

    def _count(self, answer: object) -> None:
        failed = isinstance(answer, Failure)
        self.counts["asked"] += 1
        self.counts["failed"] += failed
        self._recent.append(failed)
        if not isinstance(answer, Failure):
            return
        _LOG.warning("A request to %s failed: %s", self.base_url, answer.reason)
        failures = sum(self._recent)
        if failures > self._max_failures:
            raise EndpointError(
                f"{failures} of the last {len(self._recent)} requests to {self.base_url} (model {self.model!r}) "
                f"failed, and at most {self._max_failures} of {self._recent.maxlen} may. The last one: {answer.reason}"
            )

    def _safe(self, text: str) -> str:
        text = " ".join(text.split())
        text = text.replace(self._key, "[key]") if self._key else text
        return text if len(text) <= _QUOTED else text[:_QUOTED] + " ..."

    # -- the client

    def _connect(self) -> Any:
        import openai

        ours = f"Bearer {self._key}" if self._key else None
        # What the client itself sends with: httpx, or httpx2 since its third version.
        http: Any = importlib.import_module(openai.DefaultHttpxClient.__base__.__module__.partition(".")[0])

        class InTime(http.SyncByteStream):
            """The bytes of a reply. The client limits each wait for some of them, so that a trickle would never end."""

            def __init__(self, stream: Any, end: float) -> None:
                self._stream, self._end = stream, end

            def __iter__(self) -> Iterator[bytes]:
                for part in self._stream:
                    if time.monotonic() > self._end:
                        raise http.ReadTimeout("the reply was not whole in time")
                    yield part

            def close(self) -> None:
                self._stream.close()

        def in_time(response: Any) -> None:
            response.stream = InTime(response.stream, response.request.extensions["sent"] + self._timeout)

        def only_ours(request: Any) -> None:
            self._wait_for_turn()  # here, since the client repeats requests by itself
            request.extensions["sent"] = time.monotonic()
            for name in list(request.headers):
                if name.lower() == "authorization" and request.headers[name] == ours:
                    continue
                if name.lower() not in _SENT:
                    del request.headers[name]

        return openai.OpenAI(
            base_url=self.base_url,
            api_key=self._key or "none",
            timeout=self._timeout,
            max_retries=self._retries,
            http_client=openai.DefaultHttpxClient(
                event_hooks={"request": [only_ours], "response": [in_time]}
            ),
        )

    # -- the cache

    def _digest(self, messages: Messages) -> str:
        asked = [self.base_url, self.model, self._options, list(messages)]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _file(self, digest: str) -> Path | None:
        return None if self._cache is None else self._cache / digest[:2] / f"{digest}.json"

    def _load(self, digest: str) -> str | None:
        file = self._file(digest)
        try:
            kept = None if file is None else json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or damaged
            return None
        text = kept.get("reply") if isinstance(kept, dict) else None
        return text if isinstance(text, str) else None

    def _save(self, digest: str, text: str) -> None:
        file = self._file(digest)
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may share a cache: a file appears whole, and the last one wins.
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        part.write_text(json.dumps({"model": self.model, "reply": text}), encoding="utf-8")
        part.replace(file)


def _text(completion: Any) -> str:
    """The text of a completion.

    Raises:
        ValueError: there is none, or it is cut off: the half of a reply may say something else than the whole.
    """
    try:
        choice = completion.choices[0]
        text, end = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError):
        raise _UnreadableError("unreadable", f"no completion: {str(completion)!r}") from None
    if end in ("length", "content_filter"):
        raise _UnreadableError("cut off", f"cut off ({end}): {text!r}")
    if not isinstance(text, str) or not text.strip():
        raise _UnreadableError("empty", f"no text: {text!r}")
    return text
