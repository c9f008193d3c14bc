import pytest

from clear_adapters.errors import ClearValueError, UnknownNameError
from clear_adapters.prompts import (
    FORCED_DECLINE,
    PROTOCOLS,
    Protocol,
    get_protocol,
)
from clear_adapters.transcript import ANSWER_CLOSE, ANSWER_OPEN, RESTORE, THINK_CLOSE, THINK_OPEN, parse


def test_protocols_name_the_tags_and_the_tiny_one_is_short():
    assert all(name == p.name and p.version for name, p in PROTOCOLS.items())
    for tag in (THINK_OPEN, THINK_CLOSE, RESTORE, ANSWER_OPEN, ANSWER_CLOSE):
        assert tag in get_protocol("default").system
    assert len(get_protocol("tiny").system.encode()) <= 40


def test_forced_texts_parse_as_what_they_mean():
    for protocol in PROTOCOLS.values():
        asked = parse(protocol.forced_restore)
        assert (asked.thoughts, asked.answer, asked.wants_restore) == ((), None, True)
    assert get_protocol("default").forced_restore == "<think></think>\n<image_restore>"
    assert get_protocol("tiny").forced_restore == "<think></think><image_restore>"
    refused = parse(FORCED_DECLINE)
    assert (refused.thoughts, refused.answer, refused.wants_restore) == ((), None, False)


def test_a_protocol_from_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Look — twice.\n", encoding="utf-8")
    found = get_protocol(path)
    assert (found.name, found.system) == ("mine", "Look — twice.")
    assert get_protocol(str(path)) == found
    path.write_text("Look once.", encoding="utf-8")
    assert get_protocol(path).version != found.version
    path.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(ClearValueError, match="UTF-8"):
        get_protocol(path)
    path.write_text(" \n", encoding="utf-8")
    with pytest.raises(ClearValueError, match="empty"):
        get_protocol(path)


def test_an_unknown_protocol():
    with pytest.raises(UnknownNameError, match=r"'defalt'.*Did you mean 'default'.*text file"):
        get_protocol("defalt")


def test_the_plain_question():
    assert get_protocol("default").ask_plainly("What? {x}") == "What? {x}"
    assert Protocol("a", "1", "", "Q: {question}\nA:").ask_plainly("b") == "Q: b\nA:"
    with pytest.raises(ClearValueError, match="question"):
        Protocol("a", "1", "", "no place")
    assert Protocol(**get_protocol("tiny").to_dict()) == get_protocol("tiny")


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("<image_restore>", ""),
        ("<think>dark</think>\n<image_restore>", "<think>dark</think>\n"),
        ("<think>dark</think><image_restore>", "<think>dark</think>\n"),
        ("<think>dark <image_restore> and more", "<think>dark </think>\n"),
        ("a <image_restore> b <image_restore>", "a "),
        ("<think>a</think><think>b<image_restore></think>", "<think>a</think><think>b</think>\n"),
    ],
)
def test_declined(text, head):
    for protocol in PROTOCOLS.values():
        found = protocol.declined(text)
        # What the model wrote stays; only what is put in is the protocol's own.
        own = head if head[-1:] != "\n" or "\n" in text else head[:-1] + protocol.joint
        assert found == own + FORCED_DECLINE
        assert parse(found).thoughts == parse(text[: text.index(RESTORE)]).thoughts
