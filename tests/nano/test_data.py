# SPDX-License-Identifier: MIT
"""Real data: both layouts say the same, and what is read is what was written."""

import json

import pytest
import torch

import nanoadagrpo as nano

from .helpers import QUICK, settings
from .shops import CODES, SPLITS, TEST, TITLES, jsonl, minionerec

LAYOUTS = {"MiniOneRec": minionerec, "JSONL": jsonl}
both = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


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
    one, other = (nano.load_data(make(tmp_path / name), settings()) for name, make in LAYOUTS.items())
    for split in ("sft", "rl", "valid", "test"):
        for a, b in zip(getattr(one, split), getattr(other, split), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(one.log.item, other.log.item) and torch.equal(one.log.click, other.log.click)
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
    assert set(data.log.item.flatten().tolist()) <= set(data.sft.target.tolist())


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


@both
def test_a_folder_is_trained_on_end_to_end(folder, layout, capsys):
    shop = layout(folder / "shop")
    results = nano.main(["--data", str(shop), "--device", "cpu", "--out", "here", *QUICK, "--batch-size", "4"])
    assert list(results) == ["base", "adagrpo"]
    for metrics in results.values():
        assert 0 <= metrics["hr@1"] <= metrics["hr@10"] <= metrics["hr@50"] <= 1
        assert not any(name.startswith("order") for name in metrics), "nobody recorded orders"
    assert {path.name for path in (folder / "here").iterdir()} == {
        "config.json", "metrics.jsonl", "machine.jsonl", "report.md", "dynamics.png", "policy"}
    assert "adagrpo" in capsys.readouterr().out


def test_both_layouts_lead_to_the_same_results(folder):
    one, other = (nano.main(["--data", str(make(folder / name)), "--device", "cpu", *QUICK])
                  for name, make in LAYOUTS.items())
    assert one == other
