"""Model cards: text, metadata and scores in the Hub's forms, all rendered from facts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from clear_adapters.config import is_hub_id
from clear_adapters.errors import AdapterError, ClearValueError
from clear_adapters.hub.facts import CardFacts
from clear_adapters.hub.scores import COUNTED, Interval, Score

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

README = "README.md"
FIGURE = "clear-scores.png"
EVAL_RESULTS = ".eval_results/clear-adapters.yaml"
GENERATED = (README, FIGURE, EVAL_RESULTS)
"""What is rendered of the facts, by name in the folder and in the repository."""

BEGIN, END = "<!-- clear-adapters:begin -->", "<!-- clear-adapters:end -->"
"""Around what is rendered in a README; text outside is its owner's and is kept."""

TAG = "clear-adapters"
"""By which all CLEAR adapters are found."""

_TAGS = (TAG, "clear", "lora", "peft", "image-restoration")
_OWNERS = ("license", "license_name", "license_link", "language", "pipeline_tag", "model_name")
"""Keys of the metadata that stay as they are where a README has them."""

_WEIGHTS = ("base_model", "base_model_relation", "library_name", "model-index")
"""Keys that are replaced with the weights, but kept where they were there before the first card."""

_KEEPS = re.compile(r"<!-- clear-adapters:keeps ([a-z_ -]+) -->\n")
"""First line of what is rendered, where some of these are kept: the next card could not tell them from its own."""


def render_card(facts: CardFacts, existing: str | None = None) -> str:
    """The whole README.md.

    Args:
        facts: what it says.
        existing: the README that is there: its own text and metadata are kept.

    Raises:
        AdapterError: the metadata of the existing one cannot be read, or it has only one of the two marker lines.
    """
    card = None if existing is None or not existing.strip() else _parsed(existing)
    license = None if card is None else card.data.to_dict().get("license")
    if isinstance(license, str):
        facts = replace(facts, license=license)  # its owner's word
    data = card_data(facts)
    kept = () if card is None else _kept(card)
    keeps = f"<!-- clear-adapters:keeps {' '.join(kept)} -->\n" if kept else ""
    block = f"{BEGIN}\n{keeps}{render_text(facts)}{END}\n"
    if card is None:
        return f"---\n{data.to_yaml()}\n---\n\n{block}"
    text = card.text
    if (text.count(BEGIN), text.count(END)) not in ((0, 0), (1, 1)) or text.find(BEGIN) > text.find(END):
        raise AdapterError(
            f"the {README} that is there needs the lines {BEGIN} and {END} once each and in order, or neither: what stands "
            "between them is rendered, the rest is yours"
        )
    if BEGIN in text:
        before, rest = text.split(BEGIN)
        text = before + block + rest.split(END)[1].removeprefix("\n")
    else:
        text = f"{text.rstrip()}\n\n{block}" if text.strip() else f"\n{block}"
    return f"---\n{_merged(card, data, kept, metadata_of(existing or ''))}\n---\n{text}"


def _parsed(existing: str) -> ModelCard:
    from huggingface_hub import ModelCard

    try:
        # Without metadata of its own the client would warn.
        return ModelCard(existing if existing.lstrip().startswith("---") else f"---\n{{}}\n---\n\n{existing}")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise AdapterError(
            f"the {README} that is there has metadata that cannot be read ({' '.join(str(error).split())}): mend or remove it"
        ) from error


def metadata_of(text: str) -> dict[str, Any]:
    """The metadata of a README as it is written; empty where there is none that can be read."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    found = REGEX_YAML_BLOCK.search(text)
    try:
        data = None if found is None else yaml.safe_load(found[2])
    except yaml.YAMLError:
        data = None
    return data if isinstance(data, dict) else {}


def _kept(card: ModelCard) -> tuple[str, ...]:
    """Those of the keys of weights that are the owner's."""
    held = {k for k, v in card.data.to_dict().items() if v is not None}
    if BEGIN in card.text:
        told = _KEEPS.match(card.text.split(BEGIN)[1].lstrip("\r\n"))
        held &= set() if told is None else set(told[1].split())
    return tuple(k for k in _WEIGHTS if k in held)


def card_data(facts: CardFacts) -> ModelCardData:
    """The metadata, as the Hub's client checks it."""
    from huggingface_hub import EvalResult, ModelCardData

    base = facts.base_model if facts.base_model is not None and is_hub_id(facts.base_model) else None
    results = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=scores.dataset_id,
            dataset_name=f"{scores.dataset_id.rpartition('/')[2]}, {s.condition} pictures",
            dataset_config=s.condition,
            metric_type=kind,
            metric_name=f"{name} (N={s.n}, 95 % interval {shown.low * 100:.1f} to {shown.high * 100:.1f})",
            metric_value=round(shown.value * 100, 2),
        )
        for scores in facts.scores
        for s in scores.own
        for kind, name, shown in (
            (scores.metric, f"{COUNTED[scores.metric]}, %", s.right),
            ("restore_rate", "restored, %", s.restored),
        )
        if shown is not None
    ]
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        library_name="clear-adapters",
        license=facts.license,
        pipeline_tag="image-text-to-text",
        tags=[*_TAGS, facts.backbone],
        model_name=facts.name if results else None,
        eval_results=results or None,
    )


def render_scores(facts: CardFacts) -> str | None:
    """The file of `.eval_results`; None without scores."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries = [
        EvalResultEntry(
            dataset_id=scores.dataset_id,
            task_id=s.condition,
            value=round(s.right.value * 100, 2),
            date=scores.date,
            notes=_notes(COUNTED[scores.metric], s),
        )
        for scores in facts.scores
        for s in scores.own
    ]
    return str(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)) if entries else None


def _notes(counted: str, score: Score) -> str:
    share = "" if score.restored is None else f"; restored {percent(score.restored)} %"
    return f"{counted} in %, N={score.n}, {percent(score.right)}{share}"


def render_text(facts: CardFacts) -> str:
    """What stands between the markers."""
    import jinja2

    environment = jinja2.Environment(  # Markdown, whose values `plain` makes harmless
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=False, autoescape=False
    )
    environment.filters |= {
        "plain": plain,
        "percent": percent,
        "points": points,
        "number": lambda v: f"{v:g}",
        "quoted": _quoted,
        "yaml": _yaml,
    }
    template = (resources.files("clear_adapters.hub") / "card.md.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        f=facts,
        base=_base(facts),
        limits=limits(facts),
        counted=COUNTED,
        figure=FIGURE if facts.scores else None,
    )
    return str(text)


def _quoted(value: Any) -> str:
    """A word in Python, that ends neither the block of code nor what is rendered."""
    return json.dumps(value, ensure_ascii=False).replace("`", "\\u0060").replace("<!--", "\\u003c!--")


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=None, allow_unicode=True, width=110)
    return text.replace("```", "'''").replace("<!--", "<! --")


def _base(facts: CardFacts) -> str:
    name = facts.base_model
    if name is None:
        return "one without a public name"
    shown = f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{name}`"
    marks = [
        *([f"revision `{plain(facts.base_revision)}`"] if facts.base_revision else []),
        *([f"files' hash `{plain(facts.base_hash)}`"] if facts.base_hash else []),
    ]
    return ", ".join([shown, *marks])


def limits(facts: CardFacts) -> list[str]:
    """What the adapter cannot do or was not shown to, as far as the facts say."""
    found = []
    if facts.base_model is not None and facts.base_model.startswith("builtin:"):
        found.append(
            f"Its base, `{facts.base_model}`, is a small model of drawn scenes: it shows the mechanism, and its numbers say "
            "nothing about models of photographs."
        )
    if not facts.scores:
        found.append("No score was taken with these weights: measure before you rely on them.")
    for scores in facts.scores:
        of = "" if len(facts.scores) == 1 else f" ({scores.dataset_id.rpartition('/')[2]})"
        for first, other in dict.fromkeys((d.first, d.other) for d in scores.differences):
            mine = [d for d in scores.differences if (d.first, d.other) == (first, other)]
            worse = [d for d in mine if d.right.high < 0]
            even = [d for d in mine if d.right.low <= 0 <= d.right.high]
            for shown, words in ((worse, "Worse"), (even, "No difference that is certain")):
                if shown:
                    where = ", ".join(f"{d.condition} {points(d.right)}" for d in shown)
                    found.append(
                        f"{words}, {first} minus {other}{of}, {COUNTED[scores.metric]} in points: {where}."
                    )
        found.append(
            "Scores are of one training run on one set; another set or run gives others within about the intervals. Corruptions "
            "outside that set were not measured."
        )
    found.append("One picture a question.")
    return list(dict.fromkeys(found))  # what holds for several sets is said once


def plain(value: Any) -> str:
    """A recorded word on one line, without effect in Markdown, HTML or a table: anybody may have written it."""
    text = " ".join(str(value).split())[:200]
    for old, new in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("`", "'"),
        ("|", "\\|"),
        ("[", "\\["),
        ("]", "\\]"),
        ("!", "\\!"),
    ):
        text = text.replace(old, new)
    return text


def percent(value: Interval) -> str:
    """`71.2 [69.0, 73.3]`."""
    return f"{value.value * 100:.1f} [{value.low * 100:.1f}, {value.high * 100:.1f}]"


def points(value: Interval) -> str:
    """`+4.0 [+1.9, +6.2]`."""
    return f"{value.value * 100:+.1f} [{value.low * 100:+.1f}, {value.high * 100:+.1f}]"


def _merged(card: ModelCard, data: ModelCardData, kept: Sequence[str], written: dict[str, Any]) -> str:
    """The metadata of both: ours, but the owner's own keys and all tags are kept."""
    held = card.data.to_dict()
    found = {**held, **data.to_dict()}
    found |= {k: held[k] for k in _OWNERS if held.get(k) is not None}
    found["tags"] = list(dict.fromkeys([*_strings(held.get("tags")), *_strings(data.tags)]))
    for key in _WEIGHTS:
        # The client's reading of `model-index` drops what it does not know: as it was written, then.
        if key in kept:
            found[key] = written.get(key, held[key])
        elif key not in data.to_dict() or (key == "base_model_relation" and "base_model" in kept):
            found.pop(key, None)  # of weights that were there before, or of a base that is not named
    found = {k: found[k] for k in (*written, *found) if k in found}  # as written: the same again is no change
    return str(yaml.safe_dump(found, sort_keys=False, allow_unicode=True)).rstrip("\n")


def _strings(value: Any) -> Sequence[str]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ClearValueError(f"the {README} that is there has tags={value!r}: tags are a list of words")
    return [str(v) for v in value]
