"""Whether an answer says the truth, and which option either of them names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clear_adapters.scoring import Kind, exact_match, lone_letter, score


def matches(answer: str, truth: str, options: Sequence[str] = (), kind: Kind = "auto") -> bool:
    """Whether an answer says what the truth says, told without asking anybody.

    Args:
        answer: without tags.
        truth: the truth; of a question with options the letter, or the text of one of them.
        options: the options' texts in the order of their letters.
        kind: how to compare, as `scoring.score` does. With options a letter or a text that names the true one counts.
    """
    if options:
        letters = letters_of(options)
        letter = letter_of(truth, letters)
        if letter is not None:
            return score(answer, letter, "option", options=letters) is True
    if kind == "option":
        kind = "auto"
    return score(answer, truth, kind) is True


def says(answer: str, truth: str, options: Sequence[str] = ()) -> bool:
    """Whether an answer is the truth and nothing more: its words, or of options its letter, its text or both.

    Args:
        answer: without tags.
        truth: the truth; of a question with options the letter, or the text of one of them.
        options: the options' texts in the order of their letters.
    """
    letters = letters_of(options)
    letter = letter_of(truth, letters)
    if letter is None:
        return answer == truth or exact_match(answer, truth)
    lone = letter_of(answer, letters)
    if lone is not None:
        return lone == letter
    return exact_match(answer, (letters[letter], f"{letter}. {letters[letter]}"))


def letters_of(options: Sequence[str]) -> dict[str, str]:
    """Texts by letter."""
    return {chr(ord("A") + place): text for place, text in enumerate(options)}


def letter_of(truth: str, letters: Mapping[str, str]) -> str | None:
    """The letter of the true option; None where the truth names none. A lone letter is never the text of another option."""
    told = truth.strip()
    lone = lone_letter(told)
    if lone in letters:
        return lone
    same = [letter for letter, text in letters.items() if text.strip() == told]
    return same[0] if len(same) == 1 else None
