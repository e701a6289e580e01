# SPDX-License-Identifier: MIT
"""docs/data.md: its example is read and trained on, its functions write what the script reads."""

import json
import os
import random
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from fences import blocks
from test_commands import shop

import nanoadagrpo as nano

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = [block for block in blocks(PAGE, "text") if block.startswith("== ")]
WRITE_PROMPTS, WRITE_LOG, MY_SHOP, WRITE_SHOP, USE_SHOP = blocks(PAGE)
TINY = shlex.split("--device cpu --sft-steps 3 --sft-batch-size 4 --rl-steps 2 --batch-size 2 --group-size 4 "
                   "--beam-width 4 --eval-every 1")
WORLD = nano.World(codes=6, items=60, users=60, impressions=8)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unpack(block, folder):
    """Write the files of an example: each begins with a line `== name`."""
    folder.mkdir()
    for name, text in re.findall(r"^== (\S+)\n(.*?)(?=^== |\Z)", block, flags=re.M | re.S):
        (folder / name).write_text(text)
    return folder


def play(block):
    exec(compile(block, "page", "exec"), names := {})
    return names


def metrics(out):
    """The rows of a run, but for the time that they took."""
    rows = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [{key: x for key, x in row.items() if key != "seconds"} for row in rows]


def small_toy(cfg, whole=nano.toy_world):
    return whole(cfg, WORLD)


def test_the_example_is_the_same_data_in_both_layouts(tmp_path):
    assert len(EXAMPLES) == 2
    cfg = nano.Settings(device="cpu", log_holdout=0.5)
    jsonl, csv = (nano.load_data(unpack(block, tmp_path / str(i)), cfg) for i, block in enumerate(EXAMPLES))
    assert jsonl.catalogue.tokens.tolist() == csv.catalogue.tokens.tolist()
    for field in ("sft", "rl", "valid", "test", "log", "holdout"):
        for x, y in zip(getattr(jsonl, field), getattr(csv, field), strict=True):
            assert torch.equal(x, y), field
    assert jsonl.log.item.tolist() == [[1, 3, 2], [2, 0, -1]], "the others are kept out"
    assert jsonl.log.history.tolist()[1] == [-1, -1], "an empty history"
    assert jsonl.holdout.order.tolist() == [[False] * 3] * 2 and jsonl.log.order[0, 0]
    assert len(jsonl.sft.target) == 3 and len(jsonl.rl.target) == 2


@pytest.mark.parametrize("block", EXAMPLES, ids=["jsonl", "csv"])
def test_the_example_is_trained_on_and_its_ranker_is_judged(block, tmp_path):
    unpack(block, tmp_path / "shop")
    results = nano.main(["--data", "shop", "--log-holdout", "0.5", "--out", "run", *TINY])
    assert set(results) == {"base", "adagrpo"}
    ranker = [row for row in metrics("run") if row["phase"] == "ranker"]
    assert len(ranker) == 1 and 0 <= ranker[0]["click_auc"] <= 1 and "order_auc" not in ranker[0], "no order kept out"
    assert "learnt from 2 of 4 rows of log" in (tmp_path / "run" / "report.md").read_text()


RULES = [  # what the page says is refused, as a change of the example's log, and a word of the line that refuses it
    ('"click": [1]', '"click": [1, 0]', "equally long"),
    ('"order": [0]}', '"order": [0, 0]}', "equally long"),
    ('"click": [1]', '"click": [2]', "click: got [2]"),
    ('"click": [1]', '"click": ["1"]', "click: got"),
    ('"click": [1], "order": [0]', '"click": [0], "order": [1]', "without a click"),
    (', "order": [0]}', "}", "in all rows or in none"),
    ('"shown": [[1, 1]], "click": [1], "order": [0]', '"shown": [], "click": [], "order": []', "log.jsonl, line 3"),
    ('"shown": [[1, 1]]', '"shown": [[1, 7]]', "not in catalogue.json"),
]


@pytest.mark.parametrize("old, new, word", RULES)
def test_what_the_page_says_is_refused_is_refused_by_its_line(old, new, word, tmp_path):
    log = unpack(EXAMPLES[0], tmp_path / "shop") / "log.jsonl"
    assert log.read_text().count(old) == 1
    log.write_text(log.read_text().replace(old, new))
    with pytest.raises(nano.UserError, match=r"log\.jsonl, line [34]") as refused:
        nano.load_data(tmp_path / "shop", nano.Settings(device="cpu"))
    assert word in str(refused.value)


@pytest.mark.parametrize("name", ["log", "rl"])
@pytest.mark.parametrize("other", ["{}.JSONL", "{}.tsv", "{}.json", "{}.jsonl.gz", "{}.csv"])
def test_a_log_or_rl_with_another_ending_or_in_capitals_is_refused_as_the_page_says(tmp_path, name, other):
    """Also where the file system ignores case, and would read it."""
    folder = unpack(EXAMPLES[0], tmp_path / "shop")
    other = other.format(name.upper())
    (folder / f"{name}.jsonl").rename(folder / other)
    with pytest.raises(nano.UserError, match=rf"shop/{re.escape(other)}: .*{name}\.jsonl; convert or rename"):
        nano.load_data(folder, nano.Settings(device="cpu"))


def test_an_empty_history_is_refused_in_prompts(tmp_path):
    train = unpack(EXAMPLES[0], tmp_path / "shop") / "train.jsonl"
    train.write_text(train.read_text() + '{"history": [], "target": [0, 1]}\n')
    with pytest.raises(nano.UserError, match=r"train\.jsonl, line 4"):
        nano.load_data(tmp_path / "shop", nano.Settings(device="cpu"))


def test_fewer_than_ten_rows_are_all_learnt_from_and_without_orders_there_is_one_output(tmp_path):
    log = unpack(EXAMPLES[0], tmp_path / "shop") / "log.jsonl"
    log.write_text(re.sub(r', "order": \[[^]]*\]', "", log.read_text()))
    data = nano.load_data(tmp_path / "shop", nano.Settings(device="cpu"))
    assert data.holdout is None and len(data.log.item) == 4 and data.log.order is None


def test_without_a_log_the_ranker_learns_from_train_and_nothing_is_kept_out(tmp_path):
    (unpack(EXAMPLES[0], tmp_path / "shop") / "log.jsonl").unlink()
    data = nano.load_data(tmp_path / "shop", nano.Settings(device="cpu"))
    assert data.holdout is None and data.log.order is None and data.log.item.shape == (3, 16)
    assert data.log.item[:, 0].tolist() == data.sft.target.tolist()


SID = {10: [0, 0], 11: [0, 1], 12: [1, 0], 13: [1, 1]}


def lines(path):
    return list(map(json.loads, Path(path).read_text().splitlines()))


def test_purchases_become_prompts_split_by_time(tmp_path, capsys):
    """In no order; a basket, an item without a Semantic ID, a user with one purchase, one before the first split."""
    taken = [("b", 11, 40), ("a", 10, 5), ("a", 11, 10), ("a", 12, 10), ("a", 99, 12), ("a", 13, 20), ("b", 10, 39),
             ("a", 10, 30), ("c", 10, 50), ("a", 13, 7)]
    begins = {"train": 8, "rl": 20, "valid": 30, "test": 40}
    past = play(WRITE_PROMPTS)["write_prompts"](iter(taken), SID, tmp_path, begins, longest=3)
    a, b, c, d = SID.values()
    assert lines(tmp_path / "train.jsonl") == [{"history": [a, d], "target": x} for x in (b, c)]
    assert lines(tmp_path / "rl.jsonl") == [{"history": [d, b, c], "target": d}]
    assert lines(tmp_path / "valid.jsonl") == [{"history": [b, c, d], "target": a}]
    assert lines(tmp_path / "test.jsonl") == [{"history": [a], "target": b}]
    assert past("a", 10) == [a, d] and past("a", 11) == [d, b, c] and past("nobody", 99) == [] == past("b", 39)
    assert capsys.readouterr().out == "train: 2 rows\nrl: 1 rows\nvalid: 1 rows\ntest: 1 rows\n"


def test_items_of_another_kind_are_told(tmp_path):
    with pytest.raises(ValueError, match="12 and '12' are two different items"):
        play(WRITE_PROMPTS)["write_prompts"]([("a", "10", 5)], SID, tmp_path, {"train": 0})


HOUR = 3_600_000
SHOWINGS = [  # user, item, time, click, long view: in no order, two users, two hours, one item without a Semantic ID
    (2, 12, HOUR + 50, 1, 0), (1, 10, 10, 1, 1), (1, 11, 20, 0, 1), (2, 10, 5, 0, 0), (1, 12, HOUR + 1, 1, 1),
    (1, 99, 30, 1, 1), (1, 13, 2 * HOUR, 0, 0),
]
LOG = [
    {"history": [], "shown": [[0, 0]], "click": [0], "order": [0]},
    {"history": [], "shown": [[0, 0], [0, 1]], "click": [1, 0], "order": [1, 0]},
    {"history": [[0, 0]], "shown": [[1, 0]], "click": [1], "order": [1]},
    {"history": [], "shown": [[1, 0]], "click": [1], "order": [0]},
    {"history": [[0, 0], [1, 0]], "shown": [[1, 1]], "click": [0], "order": [0]},
]


def test_rows_of_showings_become_a_log(tmp_path):
    folder, names = unpack(EXAMPLES[0], tmp_path / "shop"), play(WRITE_PROMPTS + WRITE_LOG)
    past = names["write_prompts"]([row[:3] for row in SHOWINGS if row[3]], SID, folder, {})
    names["write_log"](iter(SHOWINGS), SID, folder / "log.jsonl", past)
    assert lines(folder / "log.jsonl") == LOG
    assert len(nano.load_data(folder, nano.Settings(device="cpu")).log.item) == 5
    names["write_log"]([row[:4] for row in SHOWINGS], SID, folder / "log.jsonl", past)  # clicks alone
    assert [row.keys() for row in lines(folder / "log.jsonl")] == [{"history", "shown", "click"}] * 5
    assert nano.load_data(folder, nano.Settings(device="cpu")).log.order is None


def test_pandas_tables_are_taken_as_the_page_says(tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(SHOWINGS, columns=["user_id", "video_id", "time_ms", "is_click", "long_view"])
    frame["is_click"] = frame.is_click.astype(bool)
    rows = frame[["user_id", "video_id", "time_ms", "is_click", "long_view"]].itertuples(index=False)
    assert '`frame[["user_id", "video_id", "time_ms", "is_click", "long_view"]].itertuples(index=False)`' in PAGE
    names = play(WRITE_PROMPTS + WRITE_LOG)
    past = names["write_prompts"]([row[:3] for row in SHOWINGS if row[3]], SID, tmp_path, {})
    names["write_log"](rows, SID, tmp_path / "log.jsonl", past)
    assert lines(tmp_path / "log.jsonl") == LOG


def test_two_files_become_a_folder_on_which_the_script_trains():
    """As the page does it. Nothing that is learnt from is of the future."""
    g, day = random.Random(0), 24 * HOUR
    sid = {str(item): tokens for item, tokens in SID.items()}
    bought = [(f"u{g.randrange(9)}", g.choice([*sid, "99"]), g.randrange(99 * day)) for _ in range(200)]
    shown = [(f"u{g.randrange(9)}", g.choice([*sid, "99"]), g.randrange(99 * day), g.randrange(2)) for _ in range(500)]
    for name, rows in (("bought", bought), ("shown", shown)):
        Path(f"{name}.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    names = {"sid": sid}
    exec(compile(WRITE_PROMPTS + WRITE_LOG + MY_SHOP, "page", "exec"), names)
    assert names["bought"] == bought and names["shown"] == shown
    rows = {name: len(lines(f"my-shop/{name}.jsonl")) for name in ("train", "rl", "valid", "test")}
    known = sum(item in sid for _, item, _ in bought)
    assert 0.05 < rows["test"] / known < 0.15 and 0.15 < rows["rl"] / known < 0.25 and rows["train"] > rows["rl"]
    logged = sum(len(row["shown"]) for row in lines("my-shop/log.jsonl"))
    assert logged == sum(item in sid and time < names["begins"]["valid"] for _, item, time, _ in shown) < len(shown)
    nano.main(["--data", "my-shop", "--out", "run", *TINY])
    assert "rows of log.jsonl" in Path("run/report.md").read_text()


@pytest.mark.skipif(os.name != "posix", reason="a shell's loop")
def test_minionerecs_folders_are_brought_into_one_as_the_page_says(tmp_path):
    shop(tmp_path / "flat")
    theirs = {f"{part}.csv": f"{part}/Industrial_and_Scientific_5_2016-10-2018-11.csv"
              for part in ("train", "valid", "test")}
    for name, there in {"index.json": "index/Industrial_and_Scientific.index.json", **theirs}.items():
        path = tmp_path / "data" / "Amazon" / there
        path.parent.mkdir(parents=True)
        (tmp_path / "flat" / name).rename(path)
    lines = re.findall(r"^    ((?:mkdir DIR|for part in).*)$", PAGE, flags=re.M)
    assert len(lines) == 2
    subprocess.run(["bash", "-euc", "\n".join(lines)], cwd=tmp_path, check=True)
    assert nano.load_data(tmp_path / "DIR", nano.Settings(device="cpu")).catalogue.N == 12


def test_the_toy_written_to_a_folder_gives_the_toys_own_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(nano, "toy_world", small_toy)
    (tmp_path / "shop").mkdir()  # of who has followed the tutorial in this folder
    play(WRITE_SHOP + USE_SHOP)
    flags = [*TINY, "--batch-size", "8", "--method", "adagrpo,grpo", "--eval-prompts", "40"]
    nano.main(["--toy", "--out", "toy", *flags])
    nano.main(["--data", "toy-shop", "--log-holdout", "0", "--out", "folder", *flags])
    assert metrics("toy") == metrics("folder") and len(metrics("toy")) > 10
