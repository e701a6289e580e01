# SPDX-License-Identifier: MIT
"""Real data: both layouts say the same, and what is read is what was written."""

import json
import warnings

import pytest
import torch
from transformers import AutoTokenizer

import nanoadagrpo as nano

from .helpers import DEVICE, QUICK, settings
from .shops import CODES, COLUMNS, SPLITS, TEST, TITLES, TRAIN, csv_row, jsonl, minionerec, write_csv

LAYOUTS = {"MiniOneRec": minionerec, "JSONL": jsonl}
both = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def load(folder):
    return nano.load_data(str(folder), settings())


def same_data(one, other):
    assert list(one.catalogue.row) == list(other.catalogue.row)
    same_rows(one, other)


def same_rows(one, other):
    """The same prompts and log."""
    for split in ("sft", "rl", "valid", "test"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(one, split), getattr(other, split), strict=True))
    assert torch.equal(one.log.item, other.log.item) and torch.equal(one.log.click, other.log.click)


def said(catalogue, items):
    """Items in the codes that they were written in; padding is left out."""
    names = list(catalogue.row)
    return [tuple(int(str(code).strip("<abc_>")) for code in names[item]) for item in items if item >= 0]


@both
def test_every_row_is_read_as_it_was_written_and_keeps_its_own_target(tmp_path, layout):
    data = nano.load_data(layout(tmp_path / "shop"), settings(rl_prompts=0))
    assert data.catalogue.N == len(set(CODES)) == 9, "items that share a Semantic ID are one item"
    for name, split in (("train", data.sft), ("valid", data.valid), ("test", data.test)):
        assert len(split.target) == len(SPLITS[name])
        for (history, target), read, truth in zip(SPLITS[name], split.history.tolist(), split.target.tolist(),
                                                  strict=True):
            assert said(data.catalogue, read) == [CODES[item] for item in history]
            assert said(data.catalogue, [truth]) == [CODES[target]]
    assert data.world is None and data.log.order is None


def test_the_fixture_has_what_makes_csv_hard_and_equal_histories_with_different_targets(tmp_path):
    text = (minionerec(tmp_path / "shop") / "train.csv").read_text()
    assert any("\n" in title for title in TITLES) and text.count("\n") > 12
    assert TEST[0][0] == TEST[1][0] and TEST[0][1] != TEST[1][1]


def test_both_layouts_give_the_same_prompts_log_and_policy_inputs(tmp_path):
    one, other = (load(make(tmp_path / name)) for name, make in LAYOUTS.items())
    same_rows(one, other)
    assert torch.equal(one.catalogue.tokens, other.catalogue.tokens)


@pytest.mark.parametrize("length", [1, 4])
def test_a_long_history_keeps_its_most_recent_items_on_the_right(tmp_path, length):
    data = nano.load_data(jsonl(tmp_path / "shop"), settings(max_history=length))
    assert data.sft.history.shape == (10, length)
    assert said(data.catalogue, data.sft.history[6].tolist()) == [CODES[item] for item in [5, 6, 7, 8][-length:]]
    assert data.sft.history[0].tolist() == [-1] * (length - 1) + [0]


def test_the_rankers_log_is_the_training_rows_and_nothing_later(tmp_path):
    data = nano.load_data(jsonl(tmp_path / "shop"), settings())
    assert torch.equal(data.log.history, data.sft.history)
    assert torch.equal(data.log.item[:, 0], data.sft.target) and data.log.item.shape == (10, 16)
    assert torch.equal(data.log.click, data.log.item == data.sft.target[:, None]), "what was bought is no negative"


def test_without_a_log_each_item_is_as_likely_to_be_the_rankers_negative(tmp_path):
    folder, drawn = jsonl(tmp_path / "shop"), []
    for seed in range(20):
        data = nano.load_data(folder, settings(seed=seed))
        drawn.append(data.log.item[:, 1:].flatten())
    counts, n, p = torch.cat(drawn).bincount(minlength=data.catalogue.N), 20 * 10 * 15, 1 / data.catalogue.N
    assert (counts - n * p).abs().max() < 5 * (n * p * (1 - p)) ** 0.5
    assert data.sft.target.bincount().float().std() > 0, "some are bought more often than others"


def test_the_rl_prompts_are_a_random_part_of_the_training_rows(tmp_path):
    folder = jsonl(tmp_path / "shop")
    few, everyone = (nano.load_data(folder, settings(rl_prompts=n)).rl for n in (4, 0))
    assert len(set(few.user.tolist())) == 4 and sorted(everyone.user.tolist()) == list(range(10))
    other = nano.load_data(folder, settings(rl_prompts=4, seed=1)).rl
    assert few.user.tolist() != other.user.tolist()


def test_a_catalogue_may_be_a_list_or_a_dictionary(tmp_path):
    folder = jsonl(tmp_path / "shop")
    as_list = nano.load_data(folder, settings()).catalogue.tokens
    (folder / "catalogue.json").write_text(json.dumps({f"item {i}": sid for i, sid in enumerate(CODES)}))
    assert torch.equal(as_list, nano.load_data(folder, settings()).catalogue.tokens)


def test_other_columns_and_files_are_ignored(tmp_path):
    folder = minionerec(tmp_path / "shop")
    (folder / "info.txt").write_text("anything")
    for name in SPLITS:
        path = folder / f"{name}.csv"
        path.write_text(path.read_text().replace("user_id", "whatever", 1))
    assert len(nano.load_data(folder, settings()).test.target) == len(TEST)


# -- files as other programs write them --------------------------------------------------------------------------------

ENDINGS = {
    "a byte-order mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "blank last lines": lambda raw: raw + b"\n\r\n\n",
    "no last line break": lambda raw: raw.rstrip(b"\r\n"),
    "all of it": lambda raw: b"\xef\xbb\xbf" + raw.rstrip(b"\r\n") + b"\r\n\r\n",
}


@both
@pytest.mark.parametrize("change", ENDINGS.values(), ids=ENDINGS)
def test_how_a_file_begins_and_ends_says_nothing(tmp_path, layout, change):
    plain, folder = layout(tmp_path / "plain"), layout(tmp_path / "shop")
    for path in folder.iterdir():
        path.write_bytes(change(path.read_bytes()))
    same_data(load(folder), load(plain))


@both
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_lines_may_end_as_on_any_system(tmp_path, layout, ending):
    plain, folder = layout(tmp_path / "plain"), layout(tmp_path / "shop")
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", ending))
    same_data(load(folder), load(plain))


# What str.splitlines takes for the end of a line, but JSON allows in a string.
@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x7f", "\ufeff", "\\n", "\\u0000", "\\ud800"])
def test_a_string_that_nobody_reads_may_hold_any_mark_that_json_allows(tmp_path, mark):
    plain, folder = jsonl(tmp_path / "plain"), jsonl(tmp_path / "shop")
    path = folder / "train.jsonl"
    path.write_text(path.read_text().replace("{", f'{{"title": "two{mark}lines", ', 3), encoding="utf-8")
    same_data(load(folder), load(plain))


def test_cells_may_be_longer_than_the_csv_module_thinks(tmp_path):
    """131,072 characters are its limit: a column that nobody reads, and a history of 12,000 items."""
    folder = minionerec(tmp_path / "shop")
    rows = [csv_row(*row) for row in [*TRAIN, ([1, 2, 3, 0] * 3000, 5)]]
    rows[0][COLUMNS.index("item_title")] = "x" * 140_000
    assert len(rows[-1][COLUMNS.index("history_item_sid")]) > 140_000
    write_csv(folder / "train.csv", rows)
    data = load(folder)
    assert len(data.sft.target) == len(TRAIN) + 1
    assert said(data.catalogue, data.sft.history[-1].tolist()) == [CODES[i] for i in [3, 0, 1, 2, 3, 0, 1, 2, 3, 0]]


@pytest.mark.parametrize("cell", [
    '["<a_0><b_0><c_0>", "<a_0><b_0><c_1>"]',  # as JSON
    "[ '<a_0><b_0><c_0>','<a_0><b_0><c_1>', ] ",
    "['<a_0><b_0><c_0>',\n '<a_0><b_0><c_1>']",
])
def test_a_history_may_be_any_spelling_of_a_list(tmp_path, cell):
    folder = minionerec(tmp_path / "shop")
    rows = [csv_row([0, 1], 2), csv_row([0, 1], 2)]
    rows[1][COLUMNS.index("history_item_sid")] = cell
    write_csv(folder / "train.csv", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = load(folder).sft.history
    assert torch.equal(history[0], history[1])


# -- words of any sort -------------------------------------------------------------------------------------------------

WORDS = {
    "numbers": [[-1, 10**30], [0, 5]],
    "words of other models": [["<pad>", "<unk>"], ["<s>", "<|endoftext|>"]],
    "the script's own without brackets": [["next", "start"], ["start", "next"]],
    "one word at two levels": [["<a>", "<a>"], ["<b>", "<b>"]],
    "one word that holds others": [["<a>", "<b>"], ["<a><b>", "<c>"]],
    "one word that begins another": [["<a", "b>"], ["<ab", "c>"]],
    "spaces and nothing": [["a b", " "], ["", "a  b"]],
    "letters of all the world": [["<é>", "<😀>"], ["<ش>", "<İ>"], ["<ñ>", "<i>"]],
    "templates": [["$A", "[CLS]"], ["$A:0", "##a"]],
    "forty levels": [list(range(40))],
    "one item": [[0]],
}


@pytest.mark.parametrize("sids", WORDS.values(), ids=WORDS)
def test_every_token_of_a_catalogue_is_one_word_of_the_policy_and_no_other(tmp_path, sids):
    """<next> and <start> are the script's own, and refused; any other spelling must not be taken for something else."""
    (tmp_path / "catalogue.json").write_text(json.dumps(sids))
    catalogue = nano.Catalogue(nano.read_catalogue(tmp_path / "catalogue.json"))
    assert sum(len(set(level)) for level in zip(*sids, strict=True)) == catalogue.S
    policy = nano.tiny_policy(catalogue, settings())
    nano.save_policy(policy, tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    for item in catalogue.tokens.tolist():
        text = "".join(catalogue.words[token] for token in item)
        assert tokenizer(text)["input_ids"] == [*item, policy.query]
        assert tokenizer.decode(item) == text


# -- whole runs --------------------------------------------------------------------------------------------------------


@both
def test_a_folder_is_trained_on_end_to_end(folder, layout, capsys):
    shop = layout(folder / "shop")
    results = nano.main(["--data", str(shop), "--device", DEVICE, "--out", "here", *QUICK, "--batch-size", "4"])
    assert list(results) == ["base", "adagrpo"]
    for metrics in results.values():
        assert 0 <= metrics["hr@1"] <= metrics["hr@10"] <= 1
        assert not any(name.startswith("order") for name in metrics), "nobody recorded orders"
    assert {path.name for path in (folder / "here").iterdir()} == {
        "config.json", "metrics.jsonl", "report.md", "policy", "ranker.safetensors"}
    assert "adagrpo" in capsys.readouterr().out


def test_both_layouts_lead_to_the_same_results(folder, brief):
    one, other = (nano.main(["--data", str(make(folder / name)), "--device", DEVICE, *QUICK])
                  for name, make in LAYOUTS.items())
    assert one == other
