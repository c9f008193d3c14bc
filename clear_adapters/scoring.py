"""Matching an answer with the truth: exact, option letter, number, fuzzy.

Pure functions of plain text; tags such as `<answer>` are taken off before. Nothing is ever guessed: an answer from
which no option or number can be read is None, which is neither right nor wrong, and the caller decides what it counts.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

from clear_adapters.errors import ClearValueError, unknown_name

Kind: TypeAlias = Literal["auto", "exact", "option", "number", "fuzzy"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""How an answer can be compared with the truth."""

_APOSTROPHES = str.maketrans("", "", "'\u2018\u2019\u02bc")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def normalise(text: str) -> str:
    """Bring a text to the form in which texts are compared.

    Compatibility forms, case, surrounding space, punctuation and a leading article do not count; digits with their
    decimal point, a sign before a number, symbols (`+`, `€`) and `% & @ #` do, so that "C", "C#" and "C++" differ.

    Args:
        text: Any text.

    Returns:
        Words separated by single spaces; empty if nothing counts.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-").translate(_APOSTROPHES)
    text = _THOUSANDS.sub("", text)
    kept = "".join(character if _counts(text, place) else " " for place, character in enumerate(text))
    words = kept.split()
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words)


def _counts(text: str, place: int) -> bool:
    character = text[place]
    if character.isalnum() or character in "#%&@" or unicodedata.category(character)[0] in "MS":
        return True
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    if character == "-" and after.isdigit() and (not before or before.isspace()):
        return True
    return character in ".,:/-" and before.isdigit() and after.isdigit()


def exact_match(answer: str, truth: str | Sequence[str]) -> bool:
    """Tell whether an answer is the truth, after `normalise`.

    Args:
        answer: What was answered.
        truth: The truth, or several forms of it.

    Returns:
        Whether they are the same; an answer that holds nothing that counts is False.
    """
    given = normalise(answer)
    return bool(given) and any(given == normalise(form) for form in _forms(truth))


def similarity(answer: str, truth: str) -> float:
    """Return how alike two texts are, from 0 to 1, after `normalise`.

    The larger of the share of matching characters (`difflib`: forgiving towards spelling) and the F1 of their words as
    bags (forgiving towards order and a few words more).

    Args:
        answer: One text.
        truth: The other.

    Returns:
        1 for equal texts, 0 where one of them is empty.
    """
    given, wanted = normalise(answer), normalise(truth)
    if not given or not wanted:
        return 0.0
    characters = difflib.SequenceMatcher(None, given, wanted, autojunk=False).ratio()
    ours, theirs = Counter(given.split()), Counter(wanted.split())
    shared = (ours & theirs).total()
    return max(characters, 2 * shared / (ours.total() + theirs.total()))


def fuzzy_match(answer: str, truth: str | Sequence[str], threshold: float = 0.8) -> bool:
    """Tell whether an answer is nearly the truth: `similarity` of at least `threshold`.

    Args:
        answer: What was answered.
        truth: The truth, or several forms of it.
        threshold: From 0 to 1.

    Returns:
        Whether any form is that near; an empty answer is False.

    Raises:
        ClearValueError: The threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ClearValueError(f"A threshold must be above 0 and at most 1, not {threshold}.")
    return any(similarity(answer, form) >= threshold for form in _forms(truth))


def _forms(truth: str | Sequence[str]) -> Sequence[str]:
    return [truth] if isinstance(truth, str) else truth


def lone_letter(text: str) -> str:
    """Return a text without round brackets, points and spaces around it, in upper case: "(b)." as "B".

    Whether that is the letter of an option is for the caller, who knows the options.

    Args:
        text: A stored truth; what a model answered is for `read_option`.
    """
    return text.strip("() .").upper()


def letters_of(options: Sequence[str]) -> dict[str, str]:
    """Return the options' texts by letter.

    Args:
        options: Their texts in the order of their letters (A, B, ...).
    """
    return {chr(ord("A") + place): text for place, text in enumerate(options)}


def letter_of(truth: str, letters: Mapping[str, str], *, by_text: bool = True) -> str | None:
    """Return the letter of the option that a truth names. A lone letter is never the text of another option.

    Args:
        truth: A stored truth: the letter of an option, or its text.
        letters: The options' texts by letter.
        by_text: Whether the text names the option too. A question whose truth is a text was asked without letters:
            where answers are compared, "B" must not count for the second text.

    Returns:
        The letter; None where the truth names no option.
    """
    told = truth.strip()
    lone = lone_letter(told)
    if lone in letters:
        return lone
    same = [letter for letter, text in letters.items() if text.strip() == told] if by_text else []
    return same[0] if len(same) == 1 else None


_LONE = re.compile(r"[\s(\[{*_\"'`]*([A-Za-z])[\s)\]}.,:;!*_\"'`]*")
_FINAL = re.compile(
    r"\banswer(?:\s*[:=]|\s+(?:is|would be|should be|must be)\b\s*:?)\s*(?:option\s+|choice\s+)?"
    r"(?P<open>[\s(\[*\"'`]*)(?P<letter>[A-Za-z])(?P<close>[)\]*\"'`]*)(?!\w)",
    re.IGNORECASE,
)
_LEADING = re.compile(r"\s*(?:[(\[]([A-Za-z])[)\]]|([A-Z])[).:,])(?:\s|$)")
_ASIDE = re.compile(r"(?:\s*\([^()]*\))?")
_EXPLAINED = re.compile(rf"\s*([A-Z])(?=\s*\(){_ASIDE.pattern}")
_BRACKETED = re.compile(r"[(\[]([A-Za-z])[)\]]")
_NAMED = re.compile(r"\b(?:option|choice|answer)\s+([A-Za-z])(?![\w'])", re.IGNORECASE)
_BARE = re.compile(r"(?<![\w'\u2019(\[.&-])([A-Z])(?![\w'\u2019)\]&-])")
_SENTENCE_GOES_ON = re.compile(r"\s+(?!(?:or|and|is|was|because|since|as|for)\b)\w")
_DENIED_BEFORE = re.compile(
    r"(?:\bnot|n['\u2019]t|\bneither|\bnor|\bnever|\bthan)(?:\s+(?:be|option|choice))?\s*$", re.IGNORECASE
)
_DENIED_AFTER = re.compile(
    r"[)\]]?\s+(?:is|was|seems|looks|can)(?:n['\u2019]t|\s*not|\s+wrong|\s+incorrect)", re.IGNORECASE
)
_NEGATIONS = frozenset(
    {"not", "no", "never", "neither", "nor", "isnt", "wasnt", "arent", "cannot", "without", "than"}
)


def read_option(answer: str, options: Sequence[str] | Mapping[str, str]) -> str | None:
    """Read which option an answer chooses.

    In this order, the first that speaks decides: the answer is a lone letter ("b", "(B)", "B."); it is the text of an
    option; it says "answer: B" or "the answer is B" (the last time counts); its first or last line is a lone letter; it
    begins with "B.", "(B)" or "B (because ...)"; it names exactly one option, by letter or by text, without denying it;
    it names none, all options are numbers, and it states one of them ("three" for "3"). "A" and "I" as words of a
    sentence are no letters.

    Args:
        answer: What was answered.
        options: The options' texts in the order of their letters (A, B, ...), or texts by letter.

    Returns:
        The letter in upper case; None if none can be read, or if several are named.

    Raises:
        ClearValueError: There are no options, or a letter is not one of A to Z.
    """
    texts = _lettered(options)
    if lone := _LONE.fullmatch(answer):
        letter = lone[1].upper()
        return letter if letter in texts else None
    given = normalise(answer)
    same = [letter for letter, text in texts.items() if given and given == normalise(text)]
    if len(same) == 1:
        return same[0]
    final = [letter for found in _FINAL.finditer(answer) if (letter := _final_letter(found)) in texts]
    if final:
        return final[-1]
    if lined := _on_a_line(answer, texts):
        return lined
    letters = _letters_named(answer, texts)
    leading = _LEADING.match(answer)
    if leading and not _denied(leading) and (letter := (leading[1] or leading[2]).upper()) in texts:
        listed = leading[0].rstrip().endswith(",") and len(letters) > 1  # "A, B and C" chooses none
        if not listed:
            return letter
    if (explained := _EXPLAINED.match(answer)) and letters == {explained[1]}:
        return explained[1]
    named = letters | _texts_named(given, texts)
    if not named:
        return _number_named(answer, texts)
    return named.pop() if len(named) == 1 else None


def option_match(answer: str, options: Sequence[str] | Mapping[str, str], truth_letter: str) -> bool | None:
    """Tell whether an answer chooses the true option.

    Args:
        answer: What was answered.
        options: The options, as for `read_option`.
        truth_letter: The letter of the true one, in either case.

    Returns:
        Whether it does; None if the answer cannot be read.

    Raises:
        ClearValueError: The true letter is none of the options'.
    """
    texts = _lettered(options)
    truth = truth_letter.strip().upper()
    if truth not in texts:
        raise ClearValueError(
            f"The true option {truth_letter!r} is none of {', '.join(texts)}: give its letter, not its text."
        )
    chosen = read_option(answer, texts)
    return None if chosen is None else chosen == truth


def _lettered(options: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(options, Mapping):
        texts = {letter.strip().upper(): text for letter, text in options.items()}
    else:
        texts = letters_of(options)
    if not texts or any(not re.fullmatch("[A-Z]", letter) for letter in texts):
        raise ClearValueError(f"Options need letters from A to Z, at least one; got {list(texts)}.")
    return texts


def _final_letter(found: re.Match[str]) -> str | None:
    """Return the letter after "answer is", unless it is the word "a" or "I" of a sentence."""
    letter = found["letter"]
    bracketed = bool(found["open"].strip() or found["close"])
    if not bracketed and (letter.islower() or letter in "AI"):
        return None if _SENTENCE_GOES_ON.match(found.string, found.end()) else letter.upper()
    return letter.upper()


def _on_a_line(answer: str, texts: Mapping[str, str]) -> str | None:
    """Return the letter that stands alone on the first or the last line; None where both do and differ."""
    lines = [line for line in answer.splitlines() if line.strip()]
    ends = {lone[1].upper() for line in (lines[:1] + lines[-1:]) if (lone := _LONE.fullmatch(line))}
    return ends.pop() if len(ends) == 1 and ends <= texts.keys() else None


def _letters_named(answer: str, texts: Mapping[str, str]) -> set[str]:
    spots = [found for pattern in (_BRACKETED, _NAMED) for found in pattern.finditer(answer)]
    for found in _BARE.finditer(answer):
        if found[1] not in "AI" or not _SENTENCE_GOES_ON.match(answer, _after_aside(answer, found.end())):
            spots.append(found)
    return {found[1].upper() for found in spots if found[1].upper() in texts and not _denied(found)}


def _denied(found: re.Match[str]) -> bool:
    text, end = found.string, found.end(found.lastindex or 0)
    denied_after = any(_DENIED_AFTER.match(text, place) for place in (end, _after_aside(text, end)))
    return bool(_DENIED_BEFORE.search(text[: found.start()]) or denied_after)


def _after_aside(text: str, end: int) -> int:
    """Return where words in round brackets that follow end: "A (the dog)" is a letter, "A (black) dog" is none."""
    aside = _ASIDE.match(text, end)
    return aside.end() if aside else end


def _texts_named(given: str, texts: Mapping[str, str]) -> set[str]:
    """Return the letters of the options whose text stands in the answer, not denied and not within a longer one."""
    words = given.split()
    spans = []
    for letter, text in texts.items():
        wanted = normalise(text).split()
        for start in range(len(words) - len(wanted) + 1) if wanted else ():
            if words[start : start + len(wanted)] == wanted:
                spans.append((start, start + len(wanted), letter))
    named = set()
    for start, end, letter in spans:
        inside = any(a <= start and end <= b and (b - a) > (end - start) for a, b, _ in spans)
        if not inside and not _NEGATIONS & set(words[max(0, start - 2) : start]):
            named.add(letter)
    return named


def _number_named(answer: str, texts: Mapping[str, str]) -> str | None:
    """Return the letter of the number that the answer states, where every option is a number and nothing is denied."""
    if not all(_NUMERAL.fullmatch(normalise(text)) for text in texts.values()):
        return None
    stated = read_number(answer)
    if stated is None or _NEGATIONS & set(normalise(answer).split()):
        return None
    same = [letter for letter, text in texts.items() if read_number(text) == stated]
    return same[0] if len(same) == 1 else None


_NUMBER_NAMES = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|"
    "seventeen|eighteen|nineteen|twenty"
)
_NUMBER_WORD = re.compile(rf"(?<![\w-])(?:{_NUMBER_NAMES})(?![\w-])", re.IGNORECASE)
_NUMERAL = re.compile(rf"-?\d+(?:[.,]\d+)*|{_NUMBER_NAMES}")
_SEPARATORS = r".,'\u2019\u00a0\u2009\u202f"
_DIGITS = re.compile(
    rf"(?<![\w.])(?P<sign>(?<!\d)[-\u2212+])?(?P<digits>\.?\d(?:[\d{_SEPARATORS}]*\d)?)(?P<power>[eE][-+]?\d+)?"
    r"(?!\d)(?!(?:st|nd|rd|th)\b)"
)
_ENGLISH = re.compile(r"(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d+)?")
_SPACED = re.compile(r"\d{1,3}(?:['\u2019\u00a0\u2009\u202f]\d{3})+(?:[.,]\d+)?")
_CONTINENTAL = re.compile(r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}|\d+,\d+")
_STATED = re.compile(r"\b(?:answer|total|result)\b(?:\s+is)?\s*[:=]?\s*", re.IGNORECASE)


def read_number(text: str) -> float | None:
    """Read the one number that a text states.

    Digits with thousands separators ("1,234.5", "1'234", "1.234.567,8"), a decimal comma where it can be nothing else
    ("1,5", but "1,234" is 1234), an exponent, a unit written behind; the words zero to twenty. After "answer", "total"
    or "result" only the number that follows counts, the last time. Ordinals ("3rd") are no numbers.

    Args:
        text: Any text.

    Returns:
        The number; None if there is none, or if the text holds several different ones, such as "1/2" or "10:30".
    """
    for stated in reversed(list(_STATED.finditer(text))):
        rest = text[stated.end() :]
        found = _DIGITS.match(rest) or _NUMBER_WORD.match(rest)
        if found:
            values = _numbers(rest[: _end_of_number(rest, found.end())])
            return values.pop() if len(values) == 1 else None
    values = _numbers(text)
    return values.pop() if len(values) == 1 else None


def _end_of_number(text: str, end: int) -> int:
    """Return where "1/2" or "10:30" ends, given where its first number does."""
    further = re.match(r"(?:\s*[/:-]\s*\d+)*", text[end:])
    return end + (further.end() if further else 0)


def _numbers(text: str) -> set[float | None]:
    """Return the different numbers in a text; None stands for digits that form no number, such as a date's."""
    found: set[float | None] = {
        float(_NUMBER_NAMES.split("|").index(word.casefold())) for word in _NUMBER_WORD.findall(text)
    }
    for match in _DIGITS.finditer(text):
        value = _value(match["digits"])
        if value is not None:
            value = (-value if match["sign"] in ("-", "\u2212") else value) * float(
                f"1{match['power'] or 'e0'}"
            )
        found.add(value)
    return found


def _value(digits: str) -> float | None:
    if _ENGLISH.fullmatch(digits):
        return float(digits.replace(",", ""))
    if _SPACED.fullmatch(digits):
        return float(re.sub(r"['\u2019\u00a0\u2009\u202f]", "", digits).replace(",", "."))
    if _CONTINENTAL.fullmatch(digits):
        return float(digits.replace(".", "").replace(",", "."))
    return None


def number_match(
    answer: str, truth: float | str, *, tolerance: float = 0.0, relative: float = 0.0
) -> bool | None:
    """Tell whether an answer states the true number.

    Args:
        answer: What was answered.
        truth: The true number, or a text that states one.
        tolerance: Difference that still counts as equal, in the number's own unit.
        relative: The same as a share of the truth; the larger of the two holds.

    Returns:
        Whether it does; None if `read_number` cannot read the answer.

    Raises:
        ClearValueError: The truth states no number, or a tolerance is negative.
    """
    if tolerance < 0 or relative < 0:
        raise ClearValueError(f"Tolerances cannot be negative: tolerance={tolerance}, relative={relative}.")
    wanted = read_number(truth) if isinstance(truth, str) else float(truth)
    if wanted is None:
        raise ClearValueError(
            f"The truth {truth!r} does not state one number, so no answer can be compared with it."
        )
    given = read_number(answer)
    if given is None:
        return None
    rounding = 1e-9 * max(1.0, abs(wanted))
    return abs(given - wanted) <= max(tolerance, relative * abs(wanted)) + rounding


def score(
    answer: str,
    truth: str | float | Sequence[str],
    kind: Kind = "auto",
    *,
    options: Sequence[str] | Mapping[str, str] | None = None,
    tolerance: float = 0.0,
    threshold: float = 0.8,
) -> bool | None:
    """Compare an answer with the truth.

    Args:
        answer: What was answered, without tags.
        truth: The letter of an option, a number, a text, or several forms of a text.
        kind: How to compare. `"auto"` takes `"option"` if there are options, else `"number"` if the truth is a number
            and nothing else, else `"exact"`.
        options: The options, for `"option"`.
        tolerance: For `"number"`.
        threshold: For `"fuzzy"`.

    Returns:
        Right or wrong; None if an option or number was asked for and the answer cannot be read.

    Raises:
        ClearValueError: The truth or the settings do not fit the kind.
        UnknownNameError: The kind is none of `KINDS`.
    """
    if kind not in KINDS:
        raise unknown_name("kind of comparison", kind, KINDS)
    if kind == "auto":
        kind = "option" if options is not None else "number" if _is_number(truth) else "exact"
    if kind == "option":
        if options is None or not isinstance(truth, str):
            raise ClearValueError(
                f"Comparing options needs the options and a letter; got truth={truth!r}, {options=}."
            )
        return option_match(answer, options, truth)
    if kind == "number":
        if not isinstance(truth, str | int | float):
            raise ClearValueError(f"Comparing numbers needs one number as the truth, not {truth!r}.")
        return number_match(answer, truth, tolerance=tolerance)
    forms = [str(truth)] if isinstance(truth, int | float) else truth
    return exact_match(answer, forms) if kind == "exact" else fuzzy_match(answer, forms, threshold)


def matches(
    answer: str,
    truth: str | float | Sequence[str],
    options: Sequence[str] = (),
    kind: Kind = "auto",
    *,
    tolerance: float = 0.0,
    threshold: float = 0.8,
) -> bool:
    """Tell whether an answer is right: the one rule of rewards and data, so that neither punishes what the other took.

    Where the truth is the letter of an option, the answer must choose that option, whatever the kind. Where it is the
    text of one, the question was asked without letters and the texts are compared by the kind; the text of another
    option is then wrong, however near.

    Args:
        answer: What was answered, without tags.
        truth: The letter or text of an option, a number, a text, or several forms of a text.
        options: The options' texts in the order of their letters; empty where the question is open.
        kind: How to compare, of `KINDS`; `"option"` reads letters too where the truth is the text of an option.
        tolerance: For `"number"`.
        threshold: For `"fuzzy"`.

    Returns:
        Whether it is right; an answer in which no option or number can be read is not.

    Raises:
        ClearValueError: The truth or the settings do not fit the kind.
        UnknownNameError: The kind is none of `KINDS`.
    """
    if options and isinstance(truth, str):
        letters = letters_of(options)
        letter = letter_of(truth, letters, by_text=kind == "option")
        if letter is not None:
            return score(answer, letter, "option", options=letters) is True
        if kind != "option" and exact_match(
            answer, [text for text in options if not exact_match(text, truth)]
        ):
            return False
    return score(answer, truth, kind, tolerance=tolerance, threshold=threshold) is True


def _is_number(truth: str | float | Sequence[str]) -> bool:
    if not isinstance(truth, str):
        return isinstance(truth, int | float)
    text = truth.strip()
    if _NUMBER_WORD.fullmatch(text):
        return True
    whole = _DIGITS.fullmatch(text)
    return whole is not None and _value(whole["digits"]) is not None
