import pytest
import torch
from PIL import Image

from clear_adapters.backbones.base import Restoration
from clear_adapters.transcript import (
    ImageSegment,
    Origin,
    RestorationSegment,
    TextSegment,
    Transcript,
    parse,
    strip_tags,
)


@pytest.mark.parametrize(
    ("text", "thoughts", "answer", "wants"),
    [
        ("", (), None, False),
        ("just text", (), None, False),
        ("<answer>red</answer>", (), "red", False),
        ("<think>t</think><answer> red \n</answer>", ("t",), "red", False),
        ("<think>t</think>\n<image_restore>", ("t",), None, True),
        ("<image_restore>", (), None, True),
        ("<think></think><image_restore>", (), None, True),
        ("<think> \n </think>", (), None, False),
        # An unclosed thought ends where something else begins, or with the text.
        ("<think>dark <image_restore>", ("dark",), None, True),
        ("<think>clear <answer>red</answer>", ("clear",), "red", False),
        ("<think>never closed", ("never closed",), None, False),
        ("<think>a</think><think>b</think>", ("a", "b"), None, False),
        ("<think>a\nb</think>", ("a\nb",), None, False),
        # An answer wins over a request; the last answer counts.
        ("<image_restore><answer>red</answer>", (), "red", False),
        ("<answer>red</answer><answer>blue</answer>", (), "blue", False),
        ("<answer></answer>", (), "", False),
        # What is no tag.
        ("<answer>red", (), None, False),
        ("<answer>red <image_restore>", (), None, True),
        ("<image_restore", (), None, False),
        ("<image restore>", (), None, False),
        ("<IMAGE_RESTORE>", (), None, False),
        ("</think></answer>", (), None, False),
        ("red</answer>", (), None, False),
        ("<answer><answer>x</answer>", (), "<answer>x", False),
    ],
)
def test_parse(text, thoughts, answer, wants):
    found = parse(text)
    assert (found.thoughts, found.answer, found.wants_restore) == (thoughts, answer, wants)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>t</think><answer>red</answer> tail", "red"),
        ("<think>t</think> red", "red"),
        ("plain", "plain"),
        ("<think>never closed", ""),
        ("<think>t</think><image_restore> red", "red"),
        ("<answer>red", "red"),
        ("", ""),
    ],
)
def test_strip_tags(text, answer):
    assert strip_tags(text) == answer


def make() -> Transcript:
    ids = torch.tensor([1, 2, 3])
    restoration = Restoration("flow", (2, 3), (32, 48), latent=torch.zeros(1, 6, 4))
    return Transcript(
        [
            TextSegment(ids, Origin.PROMPT, "What?"),
            ImageSegment(Image.new("RGB", (48, 32))),
            TextSegment(ids, Origin.SAMPLED, "a<image_restore>", torch.tensor([-0.5, -0.25, -0.25])),
            RestorationSegment(restoration),
            TextSegment(ids, Origin.FORCED, "b"),
        ]
    )


def test_a_transcript():
    own = make()
    assert own.reply == "a<image_restore>\nb"
    assert [s.restoration.grid for s in own.restorations] == [(2, 3)]
    own.append(RestorationSegment(target=object()))
    assert len(own.restorations) == 2
    assert len(list(own)) == 6


def test_a_transcript_as_plain_data():
    own = make()
    own.append(RestorationSegment(target=object(), origin=Origin.INJECTED))
    assert own.to_json() == [
        {"kind": "text", "origin": "prompt", "text": "What?", "tokens": 3},
        {"kind": "image", "origin": "prompt", "size": [48, 32]},
        {"kind": "text", "origin": "sampled", "text": "a<image_restore>", "tokens": 3, "logprob": -1.0},
        {"kind": "restoration", "origin": "sampled", "grid": [2, 3]},
        {"kind": "text", "origin": "forced", "text": "b", "tokens": 3},
        {"kind": "restoration", "origin": "injected"},
    ]
