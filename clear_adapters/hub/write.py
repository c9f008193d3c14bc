"""A card written to disk: into the adapter's own folder, or with its facts into another."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from clear_adapters.config import is_builtin_name, is_hub_id
from clear_adapters.errors import AdapterError, ClearValueError
from clear_adapters.hub.card import BEGIN, EVAL_RESULTS, FIGURE, GENERATED, README, render_card
from clear_adapters.hub.facts import CardFacts, collect_facts
from clear_adapters.hub.push import drawn_files
from clear_adapters.store import resolve

FACTS = "facts.json"


def write_card(
    adapter: str | Path,
    output: str | Path | None = None,
    *,
    results: Sequence[str | Path] = (),
    license: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Renders an adapter's card from what is recorded, and writes it with figure and scores.

    Text of a README's own, outside the marker lines, is kept; what stands between them is rendered anew.

    Args:
        adapter: `builtin:NAME`, a folder or a Hub id.
        output: folder of the card, which gets `facts.json` too; None is the adapter's own folder.
        results: result files whose scores of this very adapter the card shows.
        license: of the adapter, as the Hub writes it; None leaves it open.
        repo_id: that the card tells to load, where it will be pushed; None is the adapter as named.

    Returns:
        The README.

    Raises:
        ClearValueError: no `output` for an adapter that is not a folder of one's own, a result file that did not measure
            this adapter, or an id or a license that are none.
        AdapterError: the adapter cannot be read, the README that is there cannot be kept, or files that a card has lie
            there without one.
        BrokenEntryError: there are scores, and matplotlib, which draws them, is not installed.
    """
    name = str(adapter)
    is_public = is_builtin_name(name) or (is_hub_id(name) and not Path(name).exists())
    if output is None and is_public:
        raise ClearValueError(f"the card of {name} needs a folder of its own: pass output= (--output)")
    if repo_id is not None and not is_hub_id(repo_id):
        raise ClearValueError(f"repo_id={repo_id!r}: a repository of the Hub is named 'owner/name'")
    folder = resolve(adapter, "adapter")
    facts = collect_facts(folder, repo_id or (name if is_public else None), results=results, license=license)
    target = folder if output is None else Path(output)
    wanted = (FIGURE, EVAL_RESULTS, *(() if output is None else (FACTS,)))
    foreign = [n for n in wanted if (target / n).exists()]
    if foreign and BEGIN not in (_own(target) or ""):
        raise AdapterError(
            f"{target} has {', '.join(foreign)} and no {README} with a card that they are of: move them away, or pass another "
            "output= (--output)"
        )
    texts = files_of(facts, target)
    if output is not None:
        texts[FACTS] = facts.to_json().encode()
    for file, content in texts.items():
        _write(target / file, content)
    for file in GENERATED:
        if file not in texts:
            (target / file).unlink(missing_ok=True)  # of scores that the card no longer shows
    return target / README


def _write(path: Path, content: bytes) -> None:
    """Beside its place first: a full disk costs nobody their README."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def files_of(facts: CardFacts, target: Path) -> dict[str, bytes]:
    """README, figure and scores by name, the README with the own text of the one that is in the target.

    Raises:
        AdapterError: the README that is there cannot be kept.
        BrokenEntryError: matplotlib is not installed.
    """
    return {README: render_card(facts, _own(target)).encode(), **drawn_files(facts)}


def _own(target: Path) -> str | None:
    """The README that is there."""
    there = target / README
    try:
        return there.read_text(encoding="utf-8-sig") if there.is_file() else None
    except UnicodeDecodeError as error:
        raise AdapterError(f"{there} is not UTF-8 text: mend or remove it") from error
