# SPDX-License-Identifier: MIT
"""Bad input, as a user types it: one line that says what, where and how to mend it; exit code 2; nothing touched."""

import json
import os
import re
import subprocess
import sys

import pytest

import nanoadagrpo as nano

from .helpers import QUICK
from .shops import CODES, COLUMNS, TRAIN, csv_row, jsonl, jsonl_row, minionerec, write_csv

SCRIPT = nano.__file__


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*")}


@pytest.fixture
def refused(folder, capsys):
    """refused(*arguments): the one line that the command line answers with; says so if anything else happened."""

    def call(*arguments):
        before = contents(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            nano.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        assert end.value.code == 2
        assert out == ""
        assert len(err.splitlines()) == 1 and err.endswith("\n") and err.startswith("nanoadagrpo: "), err
        assert contents(folder) == before, "something was written"
        return err.strip()

    return call


def data(path):
    return ["--data", path, "--device", "cpu", *QUICK]


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--group-size 1", ["--group-size 1", "group", "use 3 or more"]),
        ("--tau 0.01", ["--tau 0.01", "raise tau", "K >= 100"]),
        ("--tau 1.5", ["--tau 1.5", "strictly between 0 and 1"]),
        ("--rho 0", ["--rho 0", "strictly between 0 and 1"]),
        ("--method adagpro", ["--method adagpro", "did you mean adagrpo?", *nano.METHODS, "all"]),
        ("--method magic", ["--method magic", *nano.METHODS, "all"]),
        ("--method nll,adagpro", ["--method adagpro", "did you mean adagrpo?"]),
        ("--method nll,adagrpo,nll", ["--method nll,adagrpo,nll", "twice"]),
        ("--method nll,", ["--method : ", "Choose from nll"]),
        ("--method nll,grpo --group-size 1", ["--group-size 1", "use 3 or more"]),
        ("--groupsize 8", ["--groupsize"]),
        ("--group 8", ["--group"]),  # no abbreviations: they would change their meaning with the next option
        ("--seed abc", ["--seed", "'abc'", "int"]),
        ("--lr fast", ["--lr", "'fast'", "float"]),
        ("--sft-steps 1.5", ["--sft-steps", "'1.5'", "int"]),
        ("--seed", ["--seed", "expected one argument"]),
        ("extra", ["extra"]),
        ("--negatives 1000 --batch-size 4 --group-size 8", ["--negatives 1000", "at most (B-1)*k = 24", "lower m"]),
        ("--negatives 0", ["--negatives 0", "M >= 1"]),
        ("--batch-size 1", ["--batch-size 1", "2 or more"]),
        ("--lr nan", ["--lr nan", "finite"]),
        ("--lam nan", ["--lam nan", "finite"]),
        ("--lam inf", ["--lam inf", "finite"]),
        ("--tau nan", ["--tau nan", "finite"]),
        ("--floor nan", ["--floor nan", "finite"]),
        ("--floor inf", ["--floor inf", "finite"]),
        ("--bait nan", ["--bait nan"]),
        ("--bait 1.5", ["--bait 1.5", "between 0 and 1"]),
        ("--lr -1", ["--lr -1", "0 or more"]),
        ("--seed -1", ["--seed -1", "0 or more"]),
        ("--seed 99999999999999999999999", ["--seed 99999999999999999999999"]),
        ("--epsilon 0", ["--epsilon 0"]),
        ("--sft-steps 0", ["--sft-steps 0", "1 or more"]),
        ("--rl-steps 0", ["--rl-steps 0", "1 or more"]),
        ("--updates 0", ["--updates 0", "1 or more"]),
        ("--beam-width 0", ["--beam-width 0", "1 or more"]),
        ("--eval-prompts 0", ["--eval-prompts 0", "1 or more"]),
        ("--eval-every 0", ["--eval-every 0", "1 or more"]),
        ("--max-history 0", ["--max-history 0", "1 or more"]),
        ("--device abacus", ["--device abacus"]),
        ("--device cuda:99", ["--device cuda:99"]),
    ],
)
def test_a_setting_that_cannot_work_is_refused_before_anything_starts(small_shop, refused, arguments, words):
    line = refused("--toy", *QUICK, *arguments.split())
    for word in words:
        assert word in line


def test_toy_or_data_not_both_and_not_neither(refused, folder):
    shop = jsonl(folder / "shop")
    assert "--toy" in refused() and "--data" in refused()
    line = refused("--toy", "--data", shop)
    assert "--toy" in line and "--data" in line and "not both" in line


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_an_existing_out_is_refused_and_left_as_it_is(small_shop, refused, folder, kind):
    out = folder / "precious"
    if kind == "file":
        out.write_text("my thesis")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "metrics.jsonl").write_text("my results\n")
    line = refused("--toy", "--out", "precious", *QUICK)
    assert "--out precious" in line and "exists already" in line and "name a new folder" in line


def test_an_out_below_a_file_is_refused(small_shop, refused, folder):
    (folder / "notes").write_text("mine")
    assert "--out notes/run" in refused("--toy", "--out", "notes/run", "--device", "cpu", *QUICK)


# -- folders and catalogues --------------------------------------------------------------------------------------------


def test_a_missing_folder_is_refused(refused):
    line = refused(*data("nowhere"))
    assert "nowhere" in line and "index.json" in line and "catalogue.json" in line


def test_a_folder_without_the_files_is_refused(refused, folder):
    (folder / "empty").mkdir()
    line = refused(*data("empty"))
    assert "empty" in line and "index.json" in line and "catalogue.json" in line and "docs/data.md" in line


@pytest.mark.parametrize("make, ending", [(minionerec, "csv"), (jsonl, "jsonl")])
@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_a_folder_that_lacks_one_split_is_refused(refused, folder, make, ending, name):
    (make(folder / "shop") / f"{name}.{ending}").unlink()
    line = refused(*data("shop"))
    assert f"shop/{name}.{ending}" in line and "no such file" in line and f"test.{ending}" in line


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["not valid JSON"]),
        ("[[0, 0, 0], [0, 0", ["not valid JSON"]),
        ("[]", ["no items", "item -> list of tokens"]),
        ("{}", ["no items"]),
        ("7", ["no items"]),
        ('{"hammer": "<a_1><b_2>"}', ["item hammer", "expected a list of tokens", "'<a_1><b_2>'"]),
        ("[[0, 0, 0], []]", ["item 1", "expected a list of tokens"]),
        ("[[0, 0, 0], [0, 0.5, 1]]", ["item 1", "expected a list of tokens", "[0, 0.5, 1]"]),
        ("[[0, 0, 0], [0, 0, 1], [0, 1]]", ["item 2", "[0, 1]", "[0, 0, 0]", "same number of tokens"]),
        ('[[0, 0, 0], [0, 0, "1"]]', ["item 1", "[0, 0, 0]"]),
    ],
)
def test_a_catalogue_that_cannot_be_used_is_refused(refused, folder, text, words):
    (jsonl(folder / "shop") / "catalogue.json").write_text(text)
    line = refused(*data("shop"))
    for word in ["shop/catalogue.json", *words]:
        assert word in line


def test_a_catalogue_that_is_not_text_is_refused(refused, folder):
    (jsonl(folder / "shop") / "catalogue.json").write_bytes(b"\xff\xfe\x00[")
    assert "shop/catalogue.json" in refused(*data("shop"))


# -- csv ---------------------------------------------------------------------------------------------------------------


def csv_with(folder, *, columns=COLUMNS, rows=None, **cells):
    """MiniOneRec's layout whose train.csv has some cells of its third row, on line 4 of the file, overwritten."""
    shop = minionerec(folder / "shop")
    rows = [csv_row(*row) for row in [([1], 2), ([2], 1), ([4], 5), ([5], 4)]] if rows is None else rows
    for column, value in cells.items():
        rows[2][COLUMNS.index(column)] = value
    write_csv(shop / "train.csv", rows, columns)
    return shop


def test_the_unchanged_rows_are_accepted(folder):
    nano.load_data(csv_with(folder), nano.Settings(device="cpu"))


@pytest.mark.parametrize("missing, typed", [("item_sid", "itemsid"), ("history_item_sid", "history_items_sid")])
def test_a_misspelt_column_is_refused_and_the_right_name_offered(refused, folder, missing, typed):
    csv_with(folder, columns=[typed if column == missing else column for column in COLUMNS])
    line = refused(*data("shop"))
    assert f"no column {missing}" in line and f"rename {typed}?" in line and "shop/train.csv, line 1" in line


def test_a_missing_column_is_refused_and_those_that_are_there_listed(refused, folder):
    csv_with(folder, columns=["a", "b"], rows=[["1", "2"]])
    line = refused(*data("shop"))
    assert "shop/train.csv, line 1: no column history_item_sid" in line and "['a', 'b']" in line


@pytest.mark.parametrize(
    "cells, words",
    [
        ({"item_sid": "<a_0><b_0>"}, ["2 tokens", "have 3"]),
        ({"item_sid": "<a_0><b_0><c_0><d_0>"}, ["4 tokens", "have 3"]),
        ({"item_sid": "<a_7><b_7><c_7>"}, ["<a_7>", "not in index.json", "drop the row"]),
        ({"item_sid": ""}, ["not a Semantic ID", "<a_1><b_2><c_3>"]),
        ({"item_sid": "<a_0><b_0><c_0"}, ["'<a_0><b_0><c_0'", "not a Semantic ID", "<a_1><b_2><c_3>"]),
        ({"item_sid": "the hammer"}, ["'the hammer'", "not a Semantic ID"]),
        ({"history_item_sid": "[]"}, ["history is empty", "drop the row"]),
        ({"history_item_sid": ""}, ["history_item_sid", "expected a list"]),
        ({"history_item_sid": "['<a_9><b_9><c_9>']"}, ["<a_9>", "not in index.json"]),
        ({"history_item_sid": "['<a_0><b_0><c_0>', '<a_0><b_0>']"}, ["2 tokens", "have 3"]),
        ({"history_item_sid": "<a_0><b_0><c_0>"}, ["history_item_sid", "expected a list"]),
        ({"history_item_sid": "['<a_0><b_0><c_0>'"}, ["history_item_sid", "expected a list"]),
        ({"history_item_sid": "[1, 2]"}, ["[1, 2]", "expected a list such as"]),
        ({"history_item_sid": "('<a_0><b_0><c_0>',)"}, ["expected a list such as"]),
        ({"history_item_sid": "[" * 500 + "]" * 500}, ["expected a list such as"]),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_by_file_and_line(refused, folder, cells, words):
    csv_with(folder, **cells)
    line = refused(*data("shop"))
    for word in ["shop/train.csv, line 4", *words]:
        assert word in line


def test_a_history_is_never_run_as_a_program(refused, folder, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    csv_with(folder, history_item_sid="__import__('os').system('touch broken-in')")
    line = refused(*data("shop"))
    assert "shop/train.csv, line 4" in line and "expected a list" in line
    assert not ran and not (folder / "broken-in").exists()


@pytest.mark.parametrize("text, word", [("", "empty"), (",".join(COLUMNS) + "\n", "holds no rows")])
def test_an_empty_csv_is_refused(refused, folder, text, word):
    (minionerec(folder / "shop") / "valid.csv").write_text(text)
    line = refused(*data("shop"))
    assert "shop/valid.csv" in line and word in line


def test_a_row_that_ends_too_soon_is_refused(refused, folder):
    shop = minionerec(folder / "shop")
    with (shop / "test.csv").open("a") as file:
        file.write("A7,x\n")
    lines = (shop / "test.csv").read_bytes().count(b"\n")
    assert f"shop/test.csv, line {lines}" in refused(*data("shop"))


@pytest.mark.parametrize("make, name", [(minionerec, "train.csv"), (jsonl, "train.jsonl")])
def test_a_file_in_another_encoding_is_refused(refused, folder, make, name):
    path = make(folder / "shop") / name
    path.write_bytes(path.read_bytes() + "Größe\n".encode("latin-1"))
    line = refused(*data("shop"))
    assert f"shop/{name}" in line and "utf-8" in line.lower()


# -- jsonl -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, words",
    [
        ("{'history': [[0, 0, 0]], 'target': [0, 0, 1]}", ["expected", '"history"', '"target"']),
        ('{"history": [[0, 0, 0]]', ["expected", '"history"', '"target"']),
        ("", ["expected", '"history"', '"target"']),
        ('{"history": [[0, 0, 0]]}', ["expected", '"target"']),
        ('{"histroy": [[0, 0, 0]], "target": [0, 0, 1]}', ["expected", '"history"']),
        ('{"history": [0, 0, 0], "target": [0, 0, 1]}', ["expected", "[[12, 3, 4], ...]"]),
        ('{"history": [[0, 0, 0]], "target": 5}', ["expected", '"target": [5, 0, 1]']),
        ('{"history": [[0, 0, 0]], "target": [[0], [0], [1]]}', ["[0]"]),
        ("[1, 2]", ["expected"]),
        ('{"history": [], "target": [0, 0, 1]}', ["history is empty", "drop the row"]),
        ('{"history": [[0, 0]], "target": [0, 0, 1]}', ["2 tokens", "have 3"]),
        ('{"history": [[0, 0, 0]], "target": [0, 0, 1, 1]}', ["4 tokens", "have 3"]),
        ('{"history": [[0, 0, 0]], "target": [9, 9, 9]}', ["[9, 9, 9]", "not in catalogue.json", "drop the row"]),
        ('{"history": [[9, 9, 9]], "target": [0, 0, 0]}', ["[9, 9, 9]", "not in catalogue.json", "drop the row"]),
        ('{"history": [["0", "0", "0"]], "target": [0, 0, 0]}', ["['0', '0', '0']", "not in catalogue.json"]),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_by_file_and_line(refused, folder, row, words):
    shop = jsonl(folder / "shop")
    (shop / "train.jsonl").write_text(jsonl_row(*TRAIN[0]) + row + "\n" + jsonl_row(*TRAIN[1]))
    line = refused(*data("shop"))
    for word in ["shop/train.jsonl, line 2", *words]:
        assert word in line


def test_an_empty_jsonl_is_refused(refused, folder):
    (jsonl(folder / "shop") / "test.jsonl").write_text("")
    line = refused(*data("shop"))
    assert "shop/test.jsonl" in line and "holds no rows" in line


def test_equal_words_of_another_type_are_not_the_same_item(refused, folder):
    shop = jsonl(folder / "shop")
    (shop / "catalogue.json").write_text(json.dumps([[str(code) for code in sid] for sid in CODES]))
    assert "shop/train.jsonl, line 1" in refused(*data("shop"))


# -- as a user sees it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ["--data nowhere", "--toy --grop-size 8"])
def test_the_program_itself_answers_in_one_line_with_code_2(folder, arguments):
    done = subprocess.run([sys.executable, SCRIPT, *arguments.split()], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert re.match(r"nanoadagrpo: .*(nowhere|--grop-size)", done.stderr)
    assert not list(folder.iterdir())
