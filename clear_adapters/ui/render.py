"""What the page shows, as HTML: pure functions from what is known to text, in which nothing foreign is left unescaped."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clear_adapters.ui.asking import Progress, Turn, answer_of, thought_of
from clear_adapters.ui.pictures import data_url

if TYPE_CHECKING:
    from PIL import Image

    from clear_adapters.reply import Decision
    from clear_adapters.ui.pictures import Subject
    from clear_adapters.ui.samples import Example, Suggestion

STEPS = (
    ("Look", "at the picture, with the question in mind"),
    ("Decide", "clear enough, or too poor for this question?"),
    ("Restore", "if too poor: denoise a cleaner picture"),
    ("Read", "what it restored, as a latent, not as pixels"),
    ("Answer", "from both"),
)
_AT = {"look": 0, "decide": 1, "restore": 2, "read": 3, "answer": 4}

_SAID = {
    "wait": "Waiting for the model …",
    "load": "Loading the model; this happens once …",
    "base": "The model as it is answers …",
    "look": "CLEAR looks at the picture …",
    "decide": "CLEAR decides …",
    "restore": "CLEAR restores the picture …",
    "read": "CLEAR reads what it restored …",
    "answer": "CLEAR answers …",
    "done": "Done.",
    "stopped": "Stopped.",
    "failed": "",
}


def escape(text: str) -> str:
    """Text as HTML; braces and dollars too, since the page's templates have a meaning for them."""
    safe = html.escape(text)
    for sign in "{}$":
        safe = safe.replace(sign, f"&#{ord(sign)};")
    return safe


def _image(picture: Image.Image, alt: str, name: str = "") -> str:
    shape = f"aspect-ratio:{picture.width}/{picture.height}"
    return f'<img class="{name}" src="{data_url(picture)}" alt="{escape(alt)}" style="{shape}">'


# ----------------------------------------------------------------------------------------------------- the frame


def strip(progress: Progress | None = None) -> str:
    """The five steps of the method, the present one marked."""
    now = _AT.get(progress.phase, -1) if progress is not None else -1
    over = progress is not None and progress.phase == "done"
    used = over and progress is not None and any(t.restored for t in progress.turns)
    items = []
    for place, (name, what) in enumerate(STEPS):
        passed = place < now or (over and (used or place not in (2, 3)))
        state = "now" if place == now else "passed" if passed else "skipped" if over else ""
        current = ' aria-current="step"' if place == now else ""
        items.append(
            f'<li class="{state}"{current}><b><i aria-hidden="true">{place + 1}</i>{name}</b><span>{what}</span></li>'
        )
    return f'<ol class="strip" aria-label="What the adapter makes of a question">{"".join(items)}</ol>'


def status(progress: Progress | None = None, message: str = "") -> str:
    """What happens now, or what went wrong."""
    if message or (progress is not None and progress.message):
        told = escape(message or (progress.message if progress is not None else ""))
        return f'<p class="problem" role="alert"><b>That did not work.</b> {told}</p>'
    said = "" if progress is None else _SAID[progress.phase]
    if progress is not None and progress.cached:
        said = "Done, from memory: this example was computed before."
    return f'<p class="status" role="status">{said}</p>'


def problem(message: str) -> str:
    """What is wrong with a picture."""
    return status(None, message)


def gallery(examples: Sequence[tuple[Example, Subject]], chosen: int | None, counts: dict[str, int]) -> str:
    """The examples as buttons, and how they were chosen.

    Args:
        examples: each with its degraded picture.
        chosen: index of the sample that is shown now.
        counts: of outcomes over the whole run that they were chosen from.
    """
    cards = []
    for example, subject in examples:
        assert subject.sample is not None
        line = " ".join(subject.sample.suggestions[0].text.split())
        pressed = "true" if example.index == chosen else "false"
        cards.append(
            f'<button type="button" data-index="{example.index}" aria-pressed="{pressed}" class="{example.outcome}">'
            f"{_image(subject.seen, f'A scene, {subject.title}')}"
            f"<b>{example.title}</b><span>{escape(line)}</span></button>"
        )
    total = sum(counts.values())
    both = counts.get("untouched", 0) + counts.get("unneeded", 0)
    note = (
        f"Not hand-picked: {total} held-out scenes were spoilt at high severity and asked about. CLEAR was right and the plain "
        f"model wrong on {counts.get('helps', 0)}, the other way round on {counts.get('harms', 0)}; both were right on {both}, "
        f"both wrong on {counts.get('fails', 0)}. Each kind is shown by the first scenes that a fixed rule admits, each with another kind of damage, so the gallery "
        "shows what can happen, not how often."
    )
    return f'<div class="gallery" role="group" aria-label="Examples">{"".join(cards)}</div><p class="small">{note}</p>'


def preview(subject: Subject, foreign: bool = False) -> str:
    """The picture before and after it was degraded.

    Args:
        subject: what is asked about.
        foreign: whether the model has never seen pictures of this kind.
    """
    clean = subject.clean
    figures = []
    if clean is not None:
        figures.append(
            f"<figure>{_image(clean, 'The clean picture')}<figcaption>clean (not shown to the models)</figcaption></figure>"
        )
    title = escape(subject.title)
    figures.append(
        f"<figure>{_image(subject.seen, f'What the models see: {subject.title}')}"
        f"<figcaption>what both models see: <b>{title}</b></figcaption></figure>"
    )
    note = (
        '<p class="caution"><b>A picture of your own.</b> The built-in model is tiny and has only ever seen drawings like the '
        "examples: what it says about a photograph means nothing. What happens to the picture is real; for real answers "
        "give the page a real model.</p>"
        if foreign
        else ""
    )
    return f'<div class="preview">{"".join(figures)}</div>{note}'


# ---------------------------------------------------------------------------------------------------- the answers


def _mark(answer: str, truth: Suggestion | None) -> tuple[str, str]:
    if truth is None:
        return "unknown", ""
    if truth.is_right(answer):
        return "right", '<span class="mark"><span aria-hidden="true">✓</span> right</span>'
    return "wrong", '<span class="mark"><span aria-hidden="true">✗</span> wrong</span>'


def answer_box(text: str, done: bool, truth: Suggestion | None) -> str:
    """An answer, marked once it is whole."""
    if not text and not done:
        return '<div class="answer waiting"><span class="sr">no answer yet</span>…</div>'
    kind, mark = _mark(text, truth) if done else ("unknown", "")
    return f'<div class="answer {kind}"><strong>{escape(text) or "(nothing)"}</strong>{mark}</div>'


def base_card(progress: Progress | None, subject: Subject | None, truth: Suggestion | None) -> str:
    """The column of the model as it is."""
    body = '<p class="empty">Its answer appears here.</p>'
    if progress is not None:
        picture = _image(subject.seen, "The degraded picture") if subject is not None else ""
        took = f'<p class="took">{progress.base_seconds:.1f} s</p>' if progress.base_seconds else ""
        body = (
            f'<div class="moment"><h4>Looks once</h4><div class="held">{picture}</div></div>'
            f'<div class="moment"><h4>Answers</h4>{answer_box(progress.base_text, progress.base is not None, truth)}{took}</div>'
        )
    return f'<section class="card base" aria-label="The model as it is"><h3>The model as it is</h3>{body}</section>'


def _decision(decision: Decision | None, restored: bool) -> str:
    if decision is None:
        return ""
    words = {
        "restore": ("Restore it first", "restores"),
        "answer": ("No need: answer at once" if not restored else "Enough: answer now", "answers"),
        "decline": ("It wanted to restore, and was not allowed to", "declines"),
        "limit": ("It wanted to restore again, and has to answer now", "declines"),
        "stop": ("Neither asked nor answered", "declines"),
    }
    told, kind = words[decision.action]
    who = "your choice" if decision.forced else "its own decision"
    sign = {"restores": "↻", "answers": "→", "declines": "■"}[kind]
    return f'<p class="decision {kind}"><b><span aria-hidden="true">{sign}</span> {told}</b> <span>{who}</span></p>'


def _thought(turn: Turn) -> str:
    thought = thought_of(turn.text)
    return (
        f'<p class="thought">“{escape(thought)}”</p>'
        if thought
        else '<p class="thought"><span class="sr">nothing yet</span>…</p>'
    )


def clear_before(progress: Progress | None) -> str:
    """The first half of the adapter's column: look and decide."""
    title = "<h3>The same model with CLEAR</h3>"
    if progress is None or not progress.turns:
        waits = progress is not None and not progress.is_over
        told = (
            "Its turn comes next …" if waits else "You will see it look, decide, perhaps restore, and answer."
        )
        return f'<div class="card-top">{title}<p class="empty">{told}</p></div>'
    first = progress.turns[0]
    decided = first.decision
    forced_open = decided is not None and decided.forced and not thought_of(first.text)
    look = "" if forced_open else f'<div class="moment"><h4>1 Looks</h4>{_thought(first)}</div>'
    decide = (
        f'<div class="moment"><h4>2 Decides</h4>{_decision(decided, False)}</div>'
        if decided is not None
        else ""
    )
    return f'<div class="card-top">{title}{look}{decide}</div>'


def clear_picture(progress: Progress) -> str:
    """The middle: the restoration as it denoises."""
    turn = next(
        (t for t in reversed(progress.turns) if t.decision is not None and t.decision.action == "restore"),
        None,
    )
    if turn is None:
        return ""
    if turn.restored:
        told = f"done in {turn.steps} steps" if turn.steps else "done"
    else:
        told = f"step {turn.step} of {turn.steps}" if turn.steps else "…"
    bar = (
        f'<progress max="{turn.steps}" value="{turn.steps if turn.restored else turn.step}" aria-label="Restoration"></progress>'
        if turn.steps
        else ""
    )
    if turn.picture is not None:
        picture = f'<div class="held">{_image(turn.picture, "The restored picture", "restored")}</div>'
    elif turn.restored:
        picture = '<p class="empty">This family of models reads its restoration without pixels, so there are none to show.</p>'
    else:
        picture = '<div class="held"><div class="noise"></div></div>'
    return f'<div class="moment"><h4>3 Restores <small>{told}</small></h4>{bar}{picture}</div>'


def clear_after(progress: Progress, truth: Suggestion | None) -> str:
    """The second half: read and answer."""
    if not progress.turns:
        return ""
    parts = []
    for place, turn in enumerate(progress.turns[1:]):
        again = turn.decision is not None and turn.decision.action == "restore"
        parts.append(
            f'<div class="moment"><h4>4 Reads{" again" if place else ""}</h4>{_thought(turn)}{_decision(turn.decision, True) if again else ""}</div>'
        )
    last = progress.turns[-1]
    done = progress.clear is not None
    text = progress.clear.text.strip() if progress.clear is not None else answer_of(last.text)
    if text or done:
        took = f'<p class="took">{progress.clear_seconds:.1f} s</p>' if progress.clear_seconds else ""
        parts.append(f'<div class="moment"><h4>5 Answers</h4>{answer_box(text, done, truth)}{took}</div>')
    return "".join(parts)


# ---------------------------------------------------------------------------------------------------- what it comes to


def verdict(progress: Progress, subject: Subject, truth: Suggestion | None) -> str:
    """One sentence on what happened, the pictures beside each other, and the time it took; of a whole progress."""
    return (
        f'<section class="card verdict" aria-label="What happened">{_summary(progress, truth)}'
        f'<div class="two"><div>{compare(subject, progress.restored_image)}</div><div>{_times(progress)}</div></div></section>'
    )


def _summary(progress: Progress, truth: Suggestion | None) -> str:
    assert progress.clear is not None
    restored = progress.clear.restored
    did = "CLEAR restored the picture first" if restored else "CLEAR saw no need to restore"
    decision = progress.turns[0].decision if progress.turns else None
    if not restored and decision is not None and decision.forced:
        did = "CLEAR was not allowed to restore"
    if truth is None:
        return f"<h3>{did}.</h3><p>The truth of this question is not known here, so nothing is marked.</p>"
    base, clear = truth.is_right(progress.base_text), truth.is_right(progress.clear.text.strip())
    said = {
        (False, True): "and was right where the plain model was wrong",
        (True, False): "and was wrong where the plain model was right",
        (True, True): "and both models were right",
        (False, False): "and both models were wrong",
    }[base, clear]
    return f'<h3>{did}, {said}.</h3><p class="truth">The truth: <b>{escape(truth.shown_truth)}</b></p>'


def compare(subject: Subject, restored: Image.Image | None) -> str:
    """Clean, degraded and restored picture in one place, any two of them under a slider."""
    found = {"clean": subject.clean, "degraded": subject.seen, "restored": restored}
    there = {name: p for name, p in found.items() if p is not None}
    pairs = [
        p
        for p in (("degraded", "restored"), ("clean", "restored"), ("clean", "degraded"))
        if set(p) <= set(there)
    ]
    shape = f"aspect-ratio:{subject.seen.width}/{subject.seen.height}"
    if not pairs:
        return f'<div class="compare"><div class="stage" style="{shape}">{_image(subject.seen, "What the models saw", "alone")}</div></div>'
    radios = "".join(
        f'<label><input type="radio" name="pair" value="{left}-{right}"{" checked" if n == 0 else ""}> {left} | {right}</label>'
        for n, (left, right) in enumerate(pairs)
    )
    images = "".join(_image(p, f"The {name} picture", name) for name, p in there.items())
    captions = "".join(
        f'<span class="cap {left}-{right} left">{left}</span><span class="cap {left}-{right} right">{right}</span>'
        for left, right in pairs
    )
    return (
        f'<div class="compare"><fieldset><legend>Compare</legend>{radios}</fieldset><div class="stage" style="{shape}">{images}'
        f'{captions}<span class="cut" aria-hidden="true"></span><input type="range" min="0" max="100" value="50" '
        "aria-label=\"How much of the left picture is shown\" oninput=\"this.parentElement.style.setProperty('--cut', this.value + '%')\">"
        "</div></div>"
    )


_PARTS = {
    "prefill": "reads picture and question",
    "text": "writes",
    "restore": "restores",
    "read": "reads what it restored",
}


def _times(progress: Progress) -> str:
    assert progress.base is not None
    assert progress.clear is not None
    most = max(progress.base_seconds, progress.clear_seconds, 0.01)
    rows = []
    for title, reply, seconds in (
        ("as it is", progress.base, progress.base_seconds),
        ("with CLEAR", progress.clear, progress.clear_seconds),
    ):
        bars = "".join(
            f'<i class="{name}" style="width:{100 * reply.timings.get(name, 0.0) / most:.1f}%"></i>'
            for name in _PARTS
        )
        rows.append(
            f'<tr class="bars"><th scope="row">{title}</th><td><div class="bar" aria-hidden="true">{bars}</div></td><td>{seconds:.2f} s</td></tr>'
        )
    parts = []
    for name, what in _PARTS.items():
        base, clear = progress.base.timings.get(name, 0.0), progress.clear.timings.get(name, 0.0)
        shown = f"{base:.2f} s" if base else "–"
        parts.append(
            f'<tr><th scope="row"><i class="{name}" aria-hidden="true"></i>{what}</th><td>{shown}</td><td>{f"{clear:.2f} s" if clear else "–"}</td></tr>'
        )
    extra = (
        f'<p class="small">Turning latents into the pictures of this page took {progress.shown_seconds:.2f} s more; the model does not need them.</p>'
        if progress.shown_seconds
        else ""
    )
    return (
        f'<table class="times"><caption>Time</caption>{"".join(rows)}</table><table class="times"><thead><tr><th scope="col">part</th>'
        f'<th scope="col">as it is</th><th scope="col">CLEAR</th></tr></thead>{"".join(parts)}</table>{extra}'
    )


def download(transcript: dict[str, Any] | None) -> str:
    """A link that saves the transcript; it holds the file itself, so that the server keeps none."""
    if transcript is None:
        return '<p class="empty">There is a transcript once both have answered.</p>'
    content = base64.b64encode(json.dumps(transcript, ensure_ascii=False, indent=2).encode()).decode("ascii")
    return f'<a class="save" download="clear-transcript.json" href="data:application/json;base64,{content}">Download the transcript (JSON)</a>'


def bar(done: int, total: int, what: str) -> str:
    """A bar of a run."""
    return (
        f'<div class="run" role="status"><label>{escape(what)}: {done} of {total}'
        f'<progress max="{max(total, 1)}" value="{done}"></progress></label></div>'
    )
