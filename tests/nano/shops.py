# SPDX-License-Identifier: MIT
"""Small data folders in both layouts, written from the same rows."""

import csv
import json

# Items 3 and 9 of the original shop share a Semantic ID: a model that writes Semantic IDs cannot tell them apart.
CODES = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 1, 0), (2, 1, 1), (2, 0, 0), (1, 1, 0), (1, 0, 1)]

# (history, target): equal histories with different targets, a history longer than the rest, an item bought twice.
TRAIN = [([0], 1), ([0], 2), ([0, 1], 3), ([5, 4], 9), ([2, 2], 7), ([8, 7, 6], 5), ([1, 2, 3, 4, 5, 6, 7, 8], 0),
         ([4], 8), ([6, 5], 2), ([3, 0], 4)]
VALID = [([9], 1), ([0, 1], 2), ([7], 6)]
TEST = [([0], 3), ([0], 4), ([4, 5], 8), ([6, 1, 2], 7)]
SPLITS = {"train": TRAIN, "valid": VALID, "test": TEST}

TITLES = ['Nuts, 12"\nand bolts', "Glue", 'Tape "extra", wide', "Drill\r\nbits, 3 mm", "Saw", "File", "Lamp", "Rope",
          "Nail", "Bolt"]
COLUMNS = ["user_id", "history_item_title", "item_title", "history_item_id", "item_id", "history_item_sid", "item_sid"]


def written(item):
    return "".join(f"<{letter}_{code}>" for letter, code in zip("abc", CODES[item], strict=True))


def csv_row(history, target):
    return ["A7", repr([TITLES[item] for item in history]), TITLES[target], repr(history), target,
            repr([written(item) for item in history]), written(target)]


def write_csv(path, rows, columns=COLUMNS):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def minionerec(folder):
    """MiniOneRec's layout, with titles that hold commas, quotes and line breaks."""
    folder.mkdir()
    index = {str(item): [f"<{letter}_{code}>" for letter, code in zip("abc", CODES[item], strict=True)]
             for item in range(len(CODES))}
    (folder / "index.json").write_text(json.dumps(index))
    for name, rows in SPLITS.items():
        write_csv(folder / f"{name}.csv", [csv_row(*row) for row in rows])
    return folder


def jsonl_row(history, target):
    return json.dumps({"history": [CODES[item] for item in history], "target": CODES[target]}) + "\n"


def jsonl(folder):
    """The plain layout."""
    folder.mkdir()
    (folder / "catalogue.json").write_text(json.dumps(CODES))
    for name, rows in SPLITS.items():
        (folder / f"{name}.jsonl").write_text("".join(jsonl_row(*row) for row in rows))
    return folder
