"""The events of a reply in the making, and text that arrives token by token."""

import numpy as np
import pytest
import torch

from clear_adapters.backbones import writer as bagel
from clear_adapters.prompts import FORCED_DECLINE
from clear_adapters.reply import BlockText, Decision, DenoisingStep, TextDelta
from tests.scripted import ANSWER, ASK, Script, make_engine, picture, toy

IMAGE = picture(0)


@pytest.fixture(scope="module")
def backbone():
    return toy()


@pytest.fixture
def script(monkeypatch, backbone):
    return lambda turns: monkeypatch.setattr(bagel, "choose_token", Script(backbone, turns))


def test_decisions_of_a_stream(backbone, script):
    own = make_engine(backbone)

    def decisions(turns, **options):
        script({7: turns})
        return [
            (e.action, e.forced)
            for e in own.stream(IMAGE, "What?", seed=7, **options)
            if isinstance(e, Decision)
        ]

    assert decisions([ASK, ANSWER]) == [("restore", False), ("answer", False)]
    assert decisions([ANSWER], restore="always") == [("restore", True), ("answer", False)]
    assert decisions([ASK, ANSWER], restore="never") == [("decline", True), ("answer", False)]
    assert decisions([ASK, ASK, ASK, "x"]) == [
        ("restore", False),
        ("restore", False),
        ("limit", True),
        ("stop", False),
    ]


def test_a_refused_request_is_never_shown(backbone, script):
    script({7: [["<think>hm</think>\n<image_restore>please"], ANSWER]})
    shown = ""
    for event in make_engine(backbone).stream(IMAGE, "What?", seed=7, restore="never"):
        if isinstance(event, TextDelta):
            shown += event.text
            assert "<image" not in shown
    assert shown == f"<think>hm</think>\n{FORCED_DECLINE}\n{ANSWER}"


def test_a_dropped_stream_leaves_gradients_on(backbone, script):
    script({7: [ASK, ANSWER]})
    stream = make_engine(backbone).stream(IMAGE, "What?", seed=7)
    for event in stream:
        assert torch.is_grad_enabled()
        if isinstance(event, DenoisingStep):
            break
    assert torch.is_grad_enabled()
    stream.close()


def test_characters_are_held_back_until_they_are_whole(backbone):
    text = "aé漢🙂 b"
    block = BlockText(backbone.decode_text)
    shown = [block.feed(i) for i in backbone.encode_text(text).tolist()]
    assert "".join(shown) == text
    assert shown == ["a", "", "é", "", "", "漢", "", "", "", "🙂", " ", "b"]
    assert block.close(text) == ""


def test_invalid_bytes_come_out_as_in_the_whole_text(backbone):
    ids = np.random.default_rng(0).integers(0, 256, 400).tolist()
    block = BlockText(backbone.decode_text)
    shown = "".join(block.feed(i) for i in ids)
    whole = backbone.decode_text(ids)
    assert len(shown) > 300
    assert shown + block.close(whole) == whole


def test_what_may_become_a_request_is_held_back(backbone):
    block = BlockText(backbone.decode_text, hold_request=True)
    shown = "".join(block.feed(i) for i in backbone.encode_text("a < b <image_x <image_restore> c").tolist())
    assert shown == "a < b <image_x "
    assert block.close("a < b <image_x no") == "no"
