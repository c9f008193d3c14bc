"""Whether an answer may be trained: the truth and nothing more."""

from __future__ import annotations

from collections.abc import Sequence

from clear_adapters.scoring import exact_match, letter_of, letters_of


def says(answer: str, truth: str, options: Sequence[str] = ()) -> bool:
    """Whether an answer is the truth and nothing more: its words, or of a lettered option its letter, its text or both.

    Args:
        answer: without tags.
        truth: the truth; of a question with options the letter, or the text of one of them where none were given letters.
        options: the options' texts in the order of their letters.
    """
    letters = letters_of(options)
    letter = letter_of(truth, letters, by_text=False)
    if letter is None:
        return answer == truth or exact_match(answer, truth)
    lone = letter_of(answer, letters)
    if lone is not None:
        return lone == letter
    return exact_match(answer, (letters[letter], f"{letter}. {letters[letter]}"))
