"""Clean scenes, questions, descriptions and edits as arrays, made by all cores, for training the built-in bases."""

from __future__ import annotations

import multiprocessing as mp
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clear_adapters.world import Scene, ask, describe, render, sample_edit, sample_scene
from clear_adapters.world.questions import KINDS, pair_scenes

SIDE = 128
TEXT = 320  # text tokens in an understanding row
VERSIONS = 3  # text rows of a scene, the first with its description
CAPTION = 240  # ... in a drawing row
INSTRUCTION = 64  # ... in an editing row
DESCRIBE = "Describe the picture."
WORDS = "\nIn words."
WHY = "\nWhy?"
COPY = "Copy: "
COMPLETE = "Complete the picture."
LETTER = len(KINDS) + 1  # kind of an answer in words and letter


def to_ids(text: str) -> list[int]:
    """Token ids of the byte-level tokenizer."""
    return [_ID[b] for b in text.encode()]


def _byte_ids() -> list[int]:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    symbol = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    place = {c: i for i, c in enumerate(alphabet)}
    return [place[symbol[b]] for b in range(256)]


_ID = _byte_ids()


def picture(scene: Scene) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8: drawn at 256 px and brought to the model's size as its own transform does."""
    return np.asarray(render(scene).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Chat:
    """What a family puts around a text: ids before and behind it.

    Attributes:
        asked: around what is said to the model.
        own: around what it says; before it stands at least one token, and those behind it are learnt too.
    """

    asked: tuple[tuple[int, ...], tuple[int, ...]]
    own: tuple[tuple[int, ...], tuple[int, ...]]

    def block(self, text: str, length: int) -> np.ndarray:
        """(length,) int16: what is said to the model, cut where it is too long, and -1 behind it."""
        before, behind = self.asked
        ids = [*before, *to_ids(text)[: length - len(before) - len(behind)], *behind]
        block = np.full(length, -1, np.int16)
        block[: len(ids)] = ids
        return block


@dataclass
class TextRow:
    """Question and answer branches of one picture, side by side in one row."""

    ids: np.ndarray  # (TEXT,) int16
    offset: np.ndarray  # (TEXT,) int16, position after the picture
    block: np.ndarray  # (TEXT,) int8, -1 at padding
    branch: np.ndarray  # (TEXT,) int8
    target: np.ndarray  # (TEXT,) int16, the next token where it is scored, else -1
    weight: np.ndarray  # (TEXT,) uint8, its weight in the loss
    kind: np.ndarray  # (32,) int8, kind of a branch's answer: index in KINDS, len(KINDS) else


def text_row(chat: Chat, pairs: list[tuple[str, str, int]]) -> TextRow:
    """Lays (question, answer, kind) pairs out until the row is full.

    Answers weigh 3 (letters 5) and descriptions 1, but for the text of a sign in them, which weighs 4: one in two
    hundred of a description's bytes is a sign's, and without the weight reading hardly starts.
    """
    row = TextRow(
        np.zeros(TEXT, np.int16),
        np.zeros(TEXT, np.int16),
        np.full(TEXT, -1, np.int8),
        np.zeros(TEXT, np.int8),
        np.full(TEXT, -1, np.int16),
        np.zeros(TEXT, np.uint8),
        np.full(32, len(KINDS), np.int8),
    )
    at = branch = 0
    for question, answer, kind in pairs:
        q = [*chat.asked[0], *to_ids(question), *chat.asked[1]]
        lead, said = chat.own[0], [*to_ids(answer), *chat.own[1]]
        a = [*lead, *said]
        n = len(q) + len(a)
        if at + n > TEXT or branch >= 31:
            continue
        branch += 1
        row.ids[at : at + n] = q + a
        row.offset[at : at + n] = np.arange(n)
        row.block[at : at + len(q)] = 2 * branch
        row.block[at + len(q) : at + n] = 2 * branch + 1
        row.branch[at : at + n] = branch
        scored = slice(at + n - len(said) - 1, at + n - 1)
        row.target[scored] = said
        weights = np.full(len(said), 3 if kind < len(KINDS) or kind == LETTER else 1, np.uint8)
        if kind < len(KINDS) and len(answer) == 1:
            weights[:] = 5  # a letter: two bytes against the dozens of the other answers
        sign = re.search(r"[Ss]ign [^:.]*(?::|reads) ([A-Z0-9]+)", answer)
        if sign and kind == len(KINDS):
            weights[sign.start(1) : sign.end(1)] = 4
        row.weight[scored] = weights
        row.kind[branch] = min(kind, len(KINDS))
        at += n
    return row


def questions_of(scene: Scene, seed: int, aids: bool) -> list[tuple[str, str, int]]:
    """Some questions of every kind, shuffled.

    With aids, half of the lettered ones also ask for the option's words and then its letter, and some ask for the
    evidence: choosing a letter is two steps, finding the answer and finding its letter, and each is learnt sooner alone.
    """
    other = len(KINDS)
    rng = np.random.default_rng([seed, 5])
    pairs = []
    for q in ask(scene, seed=seed, n=1 if aids else 2):
        pairs.append((q.text, q.answer, KINDS.index(q.kind)))
        if aids and q.is_lettered and rng.random() < 0.6:
            words = q.options["ABCD".index(q.answer)]
            pairs.append((q.text + WORDS, f"{words}, {q.answer}", LETTER))
        if aids and rng.random() < 0.25:
            pairs.append((q.text + WHY, q.fact, other))
    return [pairs[i] for i in rng.permutation(len(pairs))]


def train_item(chat: Chat, index: int) -> tuple[np.ndarray, list[TextRow], np.ndarray]:
    """One training scene: picture, its text rows, description ids."""
    scene = sample_scene(index, "train") if index % 8 else pair_scenes(index, "train")[index // 8 % 2 * 2]
    caption = describe(scene)
    other = len(KINDS)
    firsts = [(DESCRIBE, caption, other)] + [copy_task(VERSIONS * index + i) for i in range(1, VERSIONS)]
    rows = [
        text_row(chat, [first, *questions_of(scene, VERSIONS * index + i, True)])
        for i, first in enumerate(firsts)
    ]
    return picture(scene), rows, chat.block(caption, CAPTION)


def copy_task(index: int) -> tuple[str, str, int]:
    """Random printable text to be repeated: no byte, those of the protocol's tags too, should be foreign."""
    rng = np.random.default_rng([index, 9])
    text = "".join(chr(c) for c in rng.integers(32, 127, int(rng.integers(4, 14))))
    return COPY + text, text, len(KINDS)


def edit_item(chat: Chat, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One edit: instruction ids, picture before, picture after."""
    scene = sample_scene(10_000_000 + index, "train")
    edit = sample_edit(scene, index)
    return picture(edit.before), picture(edit.after), chat.block(edit.instruction, INSTRUCTION)


def heldout_item(chat: Chat, index: int) -> tuple[np.ndarray, list[TextRow], np.ndarray]:
    """One held-out scene with questions only."""
    scene = sample_scene(index, "heldout")
    return (
        picture(scene),
        [text_row(chat, questions_of(scene, index, False))],
        chat.block(describe(scene), CAPTION),
    )


class Pool:
    """Arrays that fill up in the background; `ready` says how many rows may be read."""

    def __init__(self, function: object, size: int, start: int = 0) -> None:
        self.function = function
        self.size = size
        self.start = start
        self.ready = 0
        self.arrays: dict[str, np.ndarray] = {}

    def fill(self, pool: mp.pool.Pool) -> None:
        """Makes every row (runs in a thread)."""
        for i, item in enumerate(pool.imap(self.function, range(self.start, self.start + self.size), 64)):
            for name, value in _flatten(item).items():
                if name not in self.arrays:
                    self.arrays[name] = np.zeros((self.size, *value.shape), value.dtype)
                self.arrays[name][i] = value
            self.ready = i + 1


def _flatten(item: tuple) -> dict[str, np.ndarray]:
    if isinstance(item[1], list):
        found = {"picture": item[0], "caption": item[2]}
        for name in TextRow.__dataclass_fields__:
            found[name] = np.stack([getattr(r, name) for r in item[1]])
        return found
    return {"picture": item[0], "after": item[1], "caption": item[2]}
