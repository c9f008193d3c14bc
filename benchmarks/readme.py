"""Tables of results inside a README, between two marker lines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from clear_adapters.errors import ClearValueError
from clear_adapters.results import ResultFile, read_result

Markers = tuple[str, str]


def markers(name: str) -> Markers:
    """The lines before and behind a table."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def asked(words: str | None, arguments: Sequence[str] | None) -> tuple[list[Path], list[ResultFile], bool]:
    """The command line of a report on several result files: their paths, what is in them, and whether it is only shown.

    Args:
        words: what `--help` says.
        arguments: of the command line; None is this process's own.
    """
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--print", action="store_true", help="show the tables and write nothing")
    args = parser.parse_args(arguments)
    return args.results, [read_result(path) for path in args.results], args.print


def inserted(text: str, content: str, source: str, where: Markers) -> str:
    """A README with the content between its markers.

    Raises:
        ClearValueError: it does not have each marker once, in order.
    """
    begin, end = where
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ClearValueError(
            f"{source} needs the lines {begin} and {end}, each once: add them where the table goes"
        )
    return f"{text[: text.index(begin)]}{begin}\n{content}\n{text[text.index(end) :]}"


def between(text: str, where: Markers) -> str | None:
    """What stands between the markers; None without them."""
    begin, end = where
    if begin not in text or end not in text:
        return None
    return text[text.index(begin) + len(begin) : text.index(end)].strip()
