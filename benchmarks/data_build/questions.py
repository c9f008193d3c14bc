"""Questions about photographs of garments, made from the columns of their labels.

The folder is that of the clothing dataset (CC0 1.0, https://github.com/alexeygrigorev/clothing-dataset): `images/` and
`labels.csv` with `image`, `label`, `sender`, `kids`.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

ASKED = ("What garment is this?", "Which kind of clothing does the photograph show?", "Name the garment.")
FOR_A_CHILD = ("Is this a child's garment?", "Is it for a child?")


def make_rows(folder: Path, seed: int = 0) -> list[dict[str, object]]:
    """Two questions a photograph: what it is (in words, or among four options), and whether it is for a child."""
    rows: list[dict[str, object]] = []
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as opened:
        labels = list(csv.DictReader(opened))
    names = sorted({r["label"] for r in labels})
    for number, entry in enumerate(labels):
        draw = random.Random(f"{seed}/{entry['image']}")
        shared = {"image": f"{entry['image']}.jpg", "group": f"sender-{entry['sender']}"}
        what = f"The garment is of the kind {entry['label']}."
        row: dict[str, object] = {"id": f"{number}-garment", **shared, "kind": "garment", "fact": what}
        if draw.random() < 0.5:
            options = [*draw.sample([n for n in names if n != entry["label"]], 3), entry["label"]]
            draw.shuffle(options)
            letter = "ABCD"[options.index(entry["label"])]
            row |= {"question": "Which garment is this?", "answer": letter, "options": options}
        else:
            row |= {"question": draw.choice(ASKED), "answer": entry["label"]}
        rows.append(row)
        child = "yes" if entry["kids"] == "true" else "no"
        rows.append(
            {
                "id": f"{number}-child",
                **shared,
                "kind": "child",
                "question": draw.choice(FOR_A_CHILD),
                "answer": child,
                "fact": "It is sized for a child." if child == "yes" else "It is sized for an adult.",
            }
        )
    return rows


def write_rows(folder: Path, path: Path, seed: int = 0) -> int:
    """Writes them as JSONL; gives how many there are."""
    rows = make_rows(folder, seed)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return len(rows)
