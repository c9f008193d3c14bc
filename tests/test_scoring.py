"""Reading and matching answers: tables of what must be read, and of what must not be."""

import pytest

from clear_adapters.errors import ClearValueError, UnknownNameError
from clear_adapters.scoring import (
    exact_match,
    fuzzy_match,
    normalise,
    number_match,
    option_match,
    read_number,
    read_option,
    score,
    similarity,
)

ANIMALS = ["dog", "cat", "black cat", "Isle of Man"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Dog. ", "dog"),
        ("STOP!", "stop"),
        ("Don't", "dont"),
        ("Don\u2019t", "dont"),
        ("A", "a"),
        ("Vitamin A", "vitamin a"),
        ("1,000,000", "1000000"),
        ("1,5", "1,5"),
        ("3.50", "3.50"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("t-shirt", "t shirt"),
        ("10:30", "10:30"),
        ("C++", "c++"),
        ("C#", "c#"),
        ("50%", "50%"),
        ("\uff33\uff34\uff2f\uff30", "stop"),
        ("\u0441\u0442\u043e\u043f", "\u0441\u0442\u043e\u043f"),
        ("...", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert normalise(expected) == expected


def test_exact_match_takes_several_forms_and_never_matches_nothing():
    assert exact_match("The stop sign.", "stop sign")
    assert exact_match("colour", ["color", "Colour"])
    assert not exact_match("go", ["stop", "halt"])
    assert not exact_match("", "")
    assert not exact_match("...", "!")
    assert not exact_match("C", "C++")


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "B)", "**B**", " b \n", "[B]", "B:", '"B"'])
def test_lone_letter(answer):
    assert read_option(answer, ANIMALS) == "B"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("a", "A"),
        ("A", "A"),
        ("cat", "B"),
        ("The cat.", "B"),
        ("A dog", "A"),
        ("A cat", "B"),
        ("a black cat", "C"),
        ("Answer: B", "B"),
        ("answer: b", "B"),
        ("The answer is (C).", "C"),
        ("The answer is C because it is dark", "C"),
        ("the answer is **B**", "B"),
        ("The correct answer is option B", "B"),
        ("Answer: A. No, look again. Answer: B", "B"),
        ("The answer is A", "A"),
        ("The answer is A.", "A"),
        ("The answer is a cat", "B"),
        ("The answer is A cat", "B"),
        ("B. It purrs", "B"),
        ("(B) It purrs", "B"),
        ("B, as it purrs", "B"),
        ("I think it is B", "B"),
        ("It must be option c", "C"),
        ("It is A.", "A"),
        ("I see a cat in the picture", "B"),
        ("I see a black cat in the picture", "C"),
        ("It is not a dog, it is a cat", "B"),
        ("It is not B but C", "C"),
        ("A is wrong, so B", "B"),
        ("(B) is not right, (C) is", "C"),
        ("The answer is A because it barks", "A"),
        ("A or B, hm. The answer is (a).", "A"),
        # None of these chooses: no guess is made.
        ("", None),
        ("E", None),
        ("I cannot tell", None),
        ("A picture of something", None),
        ("A blurred animal is all I see", None),
        ("It is either A or B", None),
        ("It is a dog or a cat", None),
        ("Option A shows fur, option B shows a tail", None),
        ("Answer A shows fur, answer B shows a tail", None),
        ("The final answer (B)", "B"),
        ("**Answer:** B", "B"),
        ("It is not B", None),
        ("It isn't a dog", None),
        ("The answer is not B", None),
        ("B-movie", None),
        ("The answer is unclear", None),
    ],
)
def test_read_option(answer, expected):
    assert read_option(answer, ANIMALS) == expected


def test_an_option_that_begins_with_a_negation_is_read():
    options = ["No smoking", "Smoking"]
    assert read_option("It says no smoking", options) == "A"


def test_the_text_of_an_option_comes_before_the_letters_in_it():
    options = ["Plan B", "Plan A"]
    assert read_option("plan A", options) == "B"
    assert read_option("Plan B.", options) == "A"


def test_letters_may_be_given():
    options = {"b": "dog", "d": "cat"}
    assert read_option("D", options) == "D"
    assert read_option("A", options) is None


def test_option_match():
    assert option_match("(b)", ANIMALS, "B") is True
    assert option_match("dog", ANIMALS, "b") is False
    assert option_match("who knows", ANIMALS, "B") is None


@pytest.mark.parametrize("truth", ["E", "cat", ""])
def test_a_truth_that_is_no_option_is_an_error(truth):
    with pytest.raises(ClearValueError, match="none of A, B, C, D"):
        option_match("B", ANIMALS, truth)


@pytest.mark.parametrize("options", [[], {"1": "dog"}, {"AB": "dog"}, ["x"] * 27])
def test_options_need_letters(options):
    with pytest.raises(ClearValueError, match="A to Z"):
        read_option("A", options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3),
        ("There are 3 cats.", 3),
        ("three", 3),
        ("Twenty!", 20),
        ("zero", 0),
        ("-5", -5),
        ("\u22125 degrees", -5),
        ("1,234", 1234),
        ("1,234.5", 1234.5),
        ("1'234", 1234),
        ("1\u202f234,5", 1234.5),
        ("1.234.567,8", 1234567.8),
        ("1,5", 1.5),
        (".5", 0.5),
        ("3.2e-5", 3.2e-5),
        ("5km", 5),
        ("$5.00", 5),
        ("50%", 50),
        ("3 and again three", 3),
        ("I see 2 dogs and 3 cats. Answer: 5", 5),
        ("Answer: 4. No. The answer is seven.", 7),
        ("Total = 12 of 20", 12),
        ("none to be seen", None),
        ("", None),
        ("2 or 3", None),
        ("3-4", None),
        ("1/2", None),
        ("Answer: 1/2", None),
        ("10:30", None),
        ("the 3rd", None),
        ("mp3", None),
        ("2024.11.23", None),
        ("12,34,56", None),
        ("someone", None),
        ("twenty-one", None),
    ],
)
def test_read_number(text, expected):
    assert read_number(text) == (expected if expected is None else pytest.approx(expected))


def test_number_match():
    assert number_match("about 3.1", 3, tolerance=0.2) is True
    assert number_match("3.1", 3) is False
    assert number_match("1.1", 1, tolerance=0.1) is True
    assert number_match("105", 100, relative=0.05) is True
    assert number_match("106", 100, relative=0.05) is False
    assert number_match("four", "4") is True
    assert number_match("many", 4) is None


def test_number_match_refuses_a_truth_without_number():
    with pytest.raises(ClearValueError, match="'some'"):
        number_match("4", "some")
    with pytest.raises(ClearValueError, match="negative"):
        number_match("4", 4, tolerance=-1)


def test_similarity_and_fuzzy_match():
    assert similarity("stop", "STOP!") == 1
    assert similarity("", "stop") == similarity("stop", "") == 0
    assert similarity("stop sign", "sign stop") == 1
    assert fuzzy_match("resturant", "restaurant")
    assert not fuzzy_match("north exit", "south gate")
    assert fuzzy_match("the big red bus", ["a car", "red bus, big"])
    with pytest.raises(ClearValueError, match=r"not 1\.5"):
        fuzzy_match("a", "b", threshold=1.5)


def test_score_chooses_how_to_compare():
    assert score("B", "b", options=ANIMALS) is True
    assert score("seven", 7) is True
    assert score("7", "seven") is True
    assert score("who knows", "7") is None
    assert score("Stop.", "stop") is True
    assert score("at 7 Main Street", "7 Main Street") is False
    assert score("stopp", "stop", kind="fuzzy") is True
    assert score("stopp", "stop", kind="exact") is False
    assert score("halt", ["stop", "halt"]) is True


@pytest.mark.parametrize(
    ("truth", "settings"),
    [("B", {"kind": "option"}), (2, {"options": ANIMALS}), (["1", "2"], {"kind": "number"})],
)
def test_score_refuses_what_does_not_fit(truth, settings):
    with pytest.raises(ClearValueError):
        score("B", truth, **settings)


def test_score_suggests_the_kind():
    with pytest.raises(UnknownNameError, match="'fuzzy'"):
        score("a", "b", kind="fuzy")
