"""Clean scenes, questions, descriptions and edits as arrays, made by all cores, for training the built-in base."""

from __future__ import annotations

import multiprocessing as mp
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clear_adapters.world import Scene, ask, describe, facts, render, sample_edit, sample_scene
from clear_adapters.world.questions import KINDS, pair_scenes

SIDE = 128
TEXT = 380  # text tokens in an understanding row
CAPTION = 224  # ... in a drawing row
INSTRUCTION = 64  # ... in an editing row
DESCRIBE = "Describe the picture."
FACT = "State a fact."
COMPLETE = "Complete the picture."
START, END = 256, 257


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


@dataclass
class TextRow:
    """Question and answer branches of one picture, side by side in one row."""

    ids: np.ndarray  # (TEXT,) int16
    offset: np.ndarray  # (TEXT,) int16, position after the picture
    block: np.ndarray  # (TEXT,) int8, -1 at padding
    branch: np.ndarray  # (TEXT,) int8
    target: np.ndarray  # (TEXT,) int16, the next token where it is scored, else -1
    kind: np.ndarray  # (32,) int8, kind of a branch's answer: index in KINDS, len(KINDS) else


def text_row(pairs: list[tuple[str, str, int]]) -> TextRow:
    """Lays (question, answer, kind) pairs out until the row is full."""
    row = TextRow(
        np.zeros(TEXT, np.int16),
        np.zeros(TEXT, np.int16),
        np.full(TEXT, -1, np.int8),
        np.zeros(TEXT, np.int8),
        np.full(TEXT, -1, np.int16),
        np.full(32, len(KINDS), np.int8),
    )
    at = branch = 0
    for question, answer, kind in pairs:
        q = [START, *to_ids(question), END]
        a = [START, *to_ids(answer), END]
        n = len(q) + len(a)
        if at + n > TEXT or branch >= 31:
            continue
        branch += 1
        row.ids[at : at + n] = q + a
        row.offset[at : at + n] = np.arange(n)
        row.block[at : at + len(q)] = 2 * branch
        row.block[at + len(q) : at + n] = 2 * branch + 1
        row.branch[at : at + n] = branch
        row.target[at + len(q) : at + n - 1] = a[1:]
        row.kind[branch] = kind
        at += n
    return row


def questions_of(scene: Scene, seed: int, each: int = 2) -> list[tuple[str, str, int]]:
    """Some questions of every kind, shuffled."""
    pairs = [(q.text, q.answer, KINDS.index(q.kind)) for q in ask(scene, seed=seed, n=each)]
    order = np.random.default_rng([seed, 5]).permutation(len(pairs))
    return [pairs[i] for i in order]


def train_item(index: int) -> tuple[np.ndarray, list[TextRow], np.ndarray]:
    """One training scene: picture, two text rows, description ids."""
    scene = sample_scene(index, "train") if index % 8 else pair_scenes(index, "train")[index // 8 % 2 * 2]
    caption = describe(scene)
    other = len(KINDS)
    rows = []
    for k in range(2):
        seed = 2 * index + k
        about = [(DESCRIBE, caption, other)] + [(FACT, f, other) for f in facts(scene, seed, 2)]
        qa = questions_of(scene, seed)
        rows.append(text_row(about[: 1 + k] + qa if k == 0 else qa[:6] + about + qa[6:]))
    ids = to_ids(caption)[: CAPTION - 2]
    block = np.full(CAPTION, -1, np.int16)
    block[: len(ids) + 2] = [START, *ids, END]
    return picture(scene), rows, block


def edit_item(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One edit: instruction ids, picture before, picture after."""
    scene = sample_scene(10_000_000 + index, "train")
    edit = sample_edit(scene, index)
    ids = to_ids(edit.instruction)[: INSTRUCTION - 2]
    block = np.full(INSTRUCTION, -1, np.int16)
    block[: len(ids) + 2] = [START, *ids, END]
    return picture(edit.before), picture(edit.after), block


def heldout_item(index: int) -> tuple[np.ndarray, list[TextRow], np.ndarray]:
    """One held-out scene with questions only."""
    scene = sample_scene(index, "heldout")
    row = text_row(questions_of(scene, index))
    ids = to_ids(describe(scene))[: CAPTION - 2]
    block = np.full(CAPTION, -1, np.int16)
    block[: len(ids) + 2] = [START, *ids, END]
    return picture(scene), [row], block


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
