"""The scripts that train the built-in bases: the rows that they learn from are the rows that a family is asked with."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "builtin"))

import pool
from train_janus_tiny import Layouts

from clear_adapters.backbones.janus.tiny import build
from clear_adapters.backbones.packed import ImagePiece, LatentPiece, TextPiece


@pytest.fixture(scope="module")
def backbone():
    return build(0)


@pytest.fixture(scope="module")
def layouts(backbone):
    return Layouts(backbone, torch.device("cpu"))


@pytest.fixture(scope="module")
def prepared(backbone):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 64, 64, 3), generator=generator).to(torch.uint8)
    return pixels, [backbone.prepare(Image.fromarray(p.numpy())) for p in pixels]


def table_of(backbone, layouts, pixels, captions):
    """What the script holds on the device, for these pictures."""
    return {
        "picture": pixels,
        "after": pixels.flip(0),
        "latent": backbone.tokenise(pixels.permute(0, 3, 1, 2)).short(),
        "after_latent": backbone.tokenise(pixels.flip(0).permute(0, 3, 1, 2)).short(),
        "caption": torch.stack([torch.from_numpy(layouts.chat.block(c, pool.INSTRUCTION)) for c in captions]),
    }


def test_a_row_of_editing_is_the_row_of_a_restoration(backbone, layouts, prepared, monkeypatch):
    pixels, pictures = prepared
    texts = ["Add a box.", "Make it red, please.", "No."]
    table = table_of(backbone, layouts, pixels, texts)
    monkeypatch.setattr(
        torch, "rand", lambda *size, **_: torch.full(size, 0.999 / 256)
    )  # keeps none, jumps by 0
    index = torch.arange(3)
    made = layouts.editing(table, table, index, index[:0], backbone.tokenise)
    rows = [
        [
            ImagePiece(picture, as_condition=True, understanding=False),
            TextPiece(backbone.encode_text(text)),
            LatentPiece(image=pictures[2 - i], scored=True),
        ]
        for i, (picture, text) in enumerate(zip(pictures, texts, strict=True))
    ]
    packed = backbone.encode(backbone.pack(rows))
    assert torch.equal(made.target[made.scored_at], packed.target[packed.scored_at])
    assert torch.allclose(backbone.forward(made).scored, backbone.forward(packed).scored, atol=1e-5)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 0.999))  # keeps all, jumps far
    jumped = layouts.editing(table, table, index, index[:0], backbone.tokenise)
    rows = [[ImagePiece(p, as_condition=True), *row[1:]] for p, row in zip(pictures, rows, strict=True)]
    packed = backbone.encode(backbone.pack(rows))
    # 255 positions are left out behind the picture, which all that follows is moved by.
    near = replace(jumped, positions=jumped.positions - 255 * (jumped.positions >= 255))
    assert not torch.allclose(backbone.forward(jumped).scored, backbone.forward(packed).scored, atol=1e-3)
    assert torch.allclose(backbone.forward(near).scored, backbone.forward(packed).scored, atol=1e-5)


def test_a_row_of_questions_is_the_row_of_a_plain_answer(backbone, layouts, prepared):
    pixels, pictures = prepared
    pairs = [("What is there?", "a red box", 1), ("Which?", "B", 0)]
    row = pool.text_row(layouts.chat, pairs)
    table = table_of(backbone, layouts, pixels, ["-"] * 3)
    for name in ("ids", "offset", "block", "branch", "target", "weight", "kind"):
        table[name] = torch.from_numpy(getattr(row, name)).expand(3, 1, -1)
    index = torch.arange(3)
    made, rows_of, branches = layouts.understanding(
        table, index, torch.zeros_like(index), torch.tensor([0, 1, 2])
    )
    logits = backbone.forward(made).text_logits
    for number, (question, answer, _) in enumerate(pairs, 1):
        shown = [(True, False), (False, True), (True, True)]
        packed = backbone.encode(
            backbone.pack(
                [
                    [
                        ImagePiece(picture, understanding=seen, as_condition=coded),
                        TextPiece(backbone.encode_text(question)),
                        TextPiece(
                            torch.tensor([*backbone.encode_text(answer), backbone.end_id]), scored=True
                        ),
                    ]
                    for picture, (seen, coded) in zip(pictures, shown, strict=True)
                ]
            )
        )
        mine = (branches == number) & (made.text_targets >= 0)
        order = rows_of[mine].argsort(stable=True)
        assert torch.equal(made.text_targets[mine][order], packed.text_targets)
        assert torch.allclose(logits[mine][order], backbone.forward(packed).text_logits, atol=1e-5)


def test_blocks_are_cut_and_letters_weigh_most(layouts):
    block = layouts.chat.block("x" * 100, 16)
    assert len(block) == 16
    assert (block >= 0).all()
    assert list(block[-2:]) == list(layouts.chat.asked[1])
    row = pool.text_row(layouts.chat, [("Which?", "B", 0)])
    assert row.weight[row.target >= 0].tolist() == [5, 5]
    assert row.target[row.target >= 0].tolist() == [*pool.to_ids("B"), *layouts.chat.own[1]]
