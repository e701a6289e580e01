# SPDX-License-Identifier: MIT
"""Bad input, as a user types it: one line that says what, where and how to mend it; exit code 2; nothing touched."""

import json
import os
import pathlib
import re
import runpy
import sys

import pytest
import torch

import nanoadagrpo as nano

from .helpers import DEVICE, QUICK, save_model
from .shops import CODES, COLUMNS, TRAIN, csv_row, jsonl, jsonl_row, minionerec, write_csv


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
        assert len(err) <= 301 and err.strip().isprintable(), err
        assert contents(folder) == before, "something was written"
        return err.strip()

    return call


def data(path):
    return ["--data", path, "--device", DEVICE, *QUICK]


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--group-size 1", ["--group-size 1", "2 or more"]),
        ("--group-size 0", ["--group-size 0"]),
        ("--group-size 2", ["--group-size 2", "K >= 3"]),
        ("--tau 0.01", ["--tau 0.01", "raise tau", "K >= 100"]),
        ("--tau 1.5", ["--tau 1.5", "1e-06 or more", "at most 0.999999"]),
        ("--tau 0.9999999999999999", ["--tau", "0.9999999999999999", "1e-06 or more", "at most 0.999999"]),
        ("--tau 1e-300", ["--tau 1e-300", "1e-06 or more", "at most 0.999999"]),
        ("--rho 0", ["--rho 0", "1e-06 or more", "at most 0.999999"]),
        ("--rho 0.9999999999999999", ["--rho", "0.9999999999999999", "1e-06 or more", "at most 0.999999"]),
        ("--floor 1e38", ["--floor", "at most 1e+30"]),  # a sum of them would not be finite
        ("--floor -1e38", ["--floor", "-1e+30 or more"]),
        ("--method nll --rho 0", ["--rho 0", "1e-06 or more"]),  # its run judges the ranker too
        ("--method nll --tau 1", ["--tau 1", "at most 0.999999"]),
        ("--method magic", ["--method magic", *nano.METHODS, "all"]),
        ("--method nll,adagpro", ["--method adagpro", *nano.METHODS, "all"]),
        ("--method nll,adagrpo,nll", ["--method nll", "once"]),
        ("--method nll,", ["--method ", "choose from nll"]),
        ("--method ,", ["--method ", "choose from nll"]),
        ("--method nll,grpo --group-size 1", ["--group-size 1", "2 or more"]),
        ("--dtype float16", ["--dtype", "float16", "bfloat16"]),
        ("--ties median", ["--ties", "median", "average"]),
        ("--groupsize 8", ["--groupsize"]),
        ("--group 8", ["--group"]),  # no abbreviations: they would change their meaning with the next option
        ("--config mine.json", ["--config"]),  # these were options once
        ("--negatives-from catalogue", ["--negatives-from"]),
        ("--log-to wandb", ["--log-to"]),
        ("--sft-eval-every 2", ["--sft-eval-every"]),
        ("--seed abc", ["--seed", "'abc'", "int"]),
        ("--lr fast", ["--lr", "'fast'", "float"]),
        ("--sft-steps 1.5", ["--sft-steps", "'1.5'", "int"]),
        ("--seed", ["--seed", "expected one argument"]),
        ("extra", ["extra"]),
        ("--negatives 1000 --batch-size 4 --group-size 8", ["--negatives 1000", "at most (B-1)*K = 24", "lower"]),
        ("--negatives 999999", ["--negatives 999999", "at most (B-1)*K", "lower --negatives"]),
        ("--negatives 99999999999", ["--negatives 99999999999", "at most"]),
        ("--negatives 0", ["--negatives 0", "M >= 1"]),
        ("--batch-size 1", ["--batch-size 1", "2 or more"]),
        ("--batch-size 0", ["--batch-size 0", "1 or more"]),
        ("--batch-size 99999999", ["--batch-size 99999999", "at most"]),
        ("--sft-batch-size 99999999", ["--sft-batch-size 99999999", "at most"]),
        (f"--eval-batch-size {2**63}", [f"--eval-batch-size {2**63}", "at most"]),
        (f"--max-history 1{'0' * 30}", [f"--max-history 1{'0' * 30}", "at most"]),
        ("--max-history 10**30", ["--max-history", "'10**30'", "int"]),
        (f"--beam-width {2**31}", ["--beam-width", "at most"]),
        (f"--group-size {2**64}", ["--group-size", "at most"]),
        (f"--sft-steps {2**63}", ["--sft-steps", "at most"]),
        ("--floor 1e39", ["--floor 1e", "at most"]),
        ("--floor -1e39", ["--floor -1e", "or more"]),
        ("--epsilon 1e300", ["--epsilon 1e", "at most"]),
        ("--lam 1e39", ["--lam 1e", "at most"]),
        ("--lr 1e39", ["--lr 1e", "at most"]),
        ("--lr nan", ["--lr nan", "finite"]),
        ("--lam nan", ["--lam nan", "finite"]),
        ("--lam inf", ["--lam inf", "finite"]),
        ("--tau nan", ["--tau nan", "finite"]),
        ("--floor nan", ["--floor nan", "finite"]),
        ("--floor inf", ["--floor inf", "finite"]),
        ("--floor=-inf", ["--floor -inf", "finite"]),
        ("--bait nan", ["--bait nan"]),
        ("--bait 1.5", ["--bait 1.5", "at most 1"]),
        ("--lr -1", ["--lr -1", "0 or more"]),
        ("--lr -1e-3", ["--lr -", "0 or more"]),
        ("--seed -1", ["--seed -1", "0 or more"]),
        ("--micro-batch-size -1", ["--micro-batch-size -1", "0 or more"]),
        ("--seed 99999999999999999999999", ["--seed 99999999999999999999999"]),
        (f"--seed {'9' * 5000}", ["--seed", "int"]),
        ("--epsilon 0", ["--epsilon 0"]),
        ("--sft-steps -1", ["--sft-steps -1", "0 or more"]),
        ("--rl-steps -1", ["--rl-steps -1", "0 or more"]),
        ("--updates 0", ["--updates 0", "1 or more"]),
        ("--beam-width 0", ["--beam-width 0", "1 or more"]),
        ("--eval-prompts 0", ["--eval-prompts 0", "1 or more"]),
        ("--eval-every 0", ["--eval-every 0", "1 or more"]),
        ("--max-history 0", ["--max-history 0", "1 or more"]),
        *((f"--device {name}", [f"--device {name}"]) for name in (
            "abacus", "cuda:99", "cuda:99999999999", "meta", "meta:0", "xla", "hpu", "privateuseone", "CPU", "auto:1")),
        (f"--{'x' * 5000}", ["--xxxx"]),
        (f"--device {'x' * 5000}", ["--device xxxx"]),
        (f"--method {'x' * 5000}", ["--method xxxx", "choose from nll"]),
        (f"--out {'x' * 300}", ["--out xxxx", "File name too long"]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_setting_that_cannot_work_is_refused_before_anything_starts(small_shop, refused, arguments, words):
    line = refused("--toy", *QUICK, *arguments.split()).replace(": ", " ")
    for word in words:
        assert word in line


@pytest.mark.parametrize("arguments", [
    ["--method"], ["--device"], ["--dtype"], ["--keep"], ["--ties"], ["--seed"], ["--tau"], ["--resume"],
    ["--floor", "1"], []],
    ids=" ".join)
@pytest.mark.parametrize("text", ["\x1b[31mred", "two\nlines", "nothing\0", "half \ud800", "\u2028"],
                         ids=["escape", "newline", "NUL", "surrogate", "separator"])
def test_what_cannot_be_printed_is_escaped(small_shop, refused, arguments, text):
    refused("--toy", *QUICK, *arguments, text)


@pytest.mark.parametrize("text, value", [("-1e3", -1000.0), ("-.5", -0.5), ("-5", -5.0), ("-1E3", -1000)])
def test_a_floor_may_be_any_number_in_any_notation(text, value):
    assert nano.parse(["--toy", "--floor", text]).floor == value


@pytest.mark.parametrize("text", ["-inf", "inf", "nan", "-1e31", "1e31"])
def test_a_floor_that_is_no_number_in_range_is_refused_as_a_number(refused, text):
    assert f"--floor {float(text)}: must be finite" in refused("--toy", "--floor", text)


@pytest.mark.parametrize("flag", ["--data", "--model", "--out", "--resume"])
def test_a_home_is_understood_where_the_shell_has_left_it(folder, monkeypatch, capsys, flag):
    """bash replaces ~ after a blank, not after =; a folder called ~ would be made otherwise."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    if flag == "--resume":
        with pytest.raises(nano.UserError, match=re.escape(f"{folder}{os.sep}here")):
            nano.parse(["--resume=~/here"])
        return
    other = [] if flag == "--data" else ["--toy"]
    assert getattr(nano.parse([*other, f"{flag}=~/here"]), flag[2:]) == os.path.join(folder, "here")
    assert getattr(nano.parse([*other, f"{flag}=a/~/b"]), flag[2:]) == "a/~/b"


def test_a_model_that_is_no_folder_here_is_said_to_be_none(refused, folder, monkeypatch):
    """Without a network the hub's library speaks of the network alone."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    jsonl(folder / "shop")
    assert "--model checkpoints/mine, no folder here: " in refused(*data("shop"), "--model", "checkpoints/mine")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_entered_is_refused_by_its_name(refused, folder):
    jsonl(folder / "shop").chmod(0o600)
    try:
        assert "shop: holds neither index.json nor catalogue.json to read" in refused(*data("shop"))
    finally:
        (folder / "shop").chmod(0o700)


def test_steps_may_be_none_at_all():
    cfg = nano.parse(["--toy", "--sft-steps", "0", "--rl-steps", "0", "--save-every", "0", "--micro-batch-size", "0"])
    assert (cfg.sft_steps, cfg.rl_steps) == (0, 0)


def test_toy_or_data_not_both_and_not_neither(refused, folder):
    shop = jsonl(folder / "shop")
    assert "--toy" in refused() and "--data" in refused()
    line = refused("--toy", "--data", shop)
    assert "--toy" in line and "--data" in line and "not both" in line


# -- where the results go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link", "looping link"])
def test_an_existing_out_is_refused_and_left_as_it_is(small_shop, refused, folder, kind):
    out = folder / "precious"
    if kind == "file":
        out.write_text("my thesis")
    elif "link" in kind:
        out.symlink_to("nowhere" if kind == "dangling link" else "precious")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "metrics.jsonl").write_text("my results\n")
    line = refused("--toy", "--out", "precious", *QUICK)
    assert "--out precious" in line and "File exists" in line and "name a new folder" in line
    assert out.is_symlink() == ("link" in kind)


@pytest.mark.parametrize("out", [".", "./", "..", "/", "//", "./."])
def test_the_folder_one_is_in_and_the_root_are_refused_and_left_as_they_are(small_shop, refused, folder, out):
    (folder / "thesis.md").write_text("mine")
    line = refused("--toy", "--out", out, *QUICK)
    assert f"--out {out}: " in line and "File exists" in line and "name a new folder" in line
    assert [path.name for path in folder.iterdir()] == ["thesis.md"]
    (folder / "thesis.md").unlink()


@pytest.mark.parametrize("out", ["notes/run", "notes/a/b/run", "loop/run", "dangling/run", "dangling/a/run",
                                 "x" * 300, "new/nothing\0", "new/half \udc80/run", "/dev/null/run"])
def test_an_out_that_cannot_be_made_is_refused_and_leaves_nothing(small_shop, refused, folder, out):
    (folder / "notes").write_text("mine")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    line = refused("--toy", "--out", out, *QUICK)
    assert line.startswith(f"nanoadagrpo: --out {out[:9]}") and "name a new folder" in line


def test_an_out_that_may_not_be_written_is_refused_and_leaves_nothing(small_shop, refused, folder, monkeypatch):
    def mkdir(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "mkdir", mkdir)
    line = refused("--toy", "--out", "locked/run", *QUICK)
    assert "--out locked/run" in line and "Permission denied" in line


# -- folders and catalogues --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "no\x1bwhere\n", "no\0where", "half \udc80", "x" * 300, "y/" * 3000])
def test_a_missing_folder_is_refused(refused, name):
    line = refused(*data(name))
    assert name[:2] in line and (("index.json" in line and "catalogue.json" in line) or "too long" in line)


def test_a_folder_without_the_files_is_refused(refused, folder):
    (folder / "empty").mkdir()
    line = refused(*data("empty"))
    assert "empty" in line and "index.json" in line and "catalogue.json" in line and "docs/data.md" in line


def test_a_folder_that_may_not_be_read_is_refused(refused, folder, monkeypatch):
    shop, read = jsonl(folder / "shop"), pathlib.Path.read_text

    def locked(path, *arguments, **options):
        if path == shop.relative_to(folder) / "train.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "read_text", locked)
    line = refused(*data("shop"))
    assert "shop/train.jsonl" in line and "Permission denied" in line


@pytest.mark.parametrize("make, ending", [(minionerec, "csv"), (jsonl, "jsonl")])
@pytest.mark.parametrize("name", ["train", "valid", "test"])
@pytest.mark.parametrize("instead", ["nothing", "a folder", "a looping link"])
def test_a_folder_that_lacks_one_split_is_refused(refused, folder, make, ending, name, instead):
    path = make(folder / "shop") / f"{name}.{ending}"
    path.unlink()
    if instead == "a folder":
        path.mkdir()
    elif instead == "a looping link":
        path.symlink_to(path.name)
    line = refused(*data("shop"))
    reason = {"nothing": "o such file", "a folder": "s a directory", "a looping link": "links"}[instead]
    assert f"shop/{name}.{ending}" in line and reason in line and f"test.{ending}" in line


DEEP = 100_000


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["not valid JSON"]),
        ("[[0, 0, 0], [0, 0", ["not valid JSON"]),
        ("[" * DEEP, ["not valid JSON"]),
        ("[" * DEEP + "]" * DEEP, ["not valid JSON"]),
        ('{"a": ' * DEEP, ["not valid JSON"]),
        ("[[0, 0, 0], " + "[" * 900 + "]" * 900 + "]", ["item 1", "expected a list of tokens"]),
        (f"[[{'9' * 5000}, 0, 0]]", ["not valid JSON"]),
        ("[[0, 0, 0]] and more", ["not valid JSON"]),
        ("[]", ["no items", "item -> list of tokens"]),
        ("{}", ["no items"]),
        ("7", ["no items"]),
        ("null", ["no items"]),
        ('"<a_1><b_2><c_3>"', ["no items"]),
        ('{"hammer": "<a_1><b_2>"}', ["item hammer", "expected a list of tokens", "'<a_1><b_2>'"]),
        ("[[0, 0, 0], []]", ["item 1", "expected a list of tokens"]),
        ("[[0, 0, 0], [0, 0.5, 1]]", ["item 1", "expected a list of tokens", "[0, 0.5, 1]"]),
        ("[[0, 0, NaN]]", ["item 0", "expected a list of tokens", "nan"]),
        ("[[true, false, true]]", ["item 0", "expected a list of tokens", "True"]),
        ("[[[0], [0], [0]]]", ["item 0", "expected a list of tokens"]),
        ("[[0, 0, 0], [0, 0, 1], [0, 1]]", ["item 2", "[0, 1]", "[0, 0, 0]", "same number of tokens"]),
        (f"[[{'0, ' * 5000}0], [1]]", ["item 1", "[1]", "same number of tokens"]),
        ('[[0, 0, 0], [0, 0, "1"]]', ["item 1", "[0, 0, 0]", "'1'"]),
        ('[["<next>", "<b_1>"]]', ["item 0", "<next>", "rename"]),
        ('[["<a_1>", "<b_1>"], ["<a_2>", "<start>"]]', ["item 1", "<start>", "rename"]),
        (r'[["half \ud800", "b"]]', ["item 0", r"\ud800", "rename"]),
        (r'[["\udc00\ud800", "b"]]', ["item 0", r"\udc00", "rename"]),
        (r'[["\u001b[31m", "b"]]', ["item 0", r"\x1b", "rename"]),
        (r'[["two\nlines", "b"]]', ["item 0", r"\n", "rename"]),
        ('[["1", "2"], ["1><b_2", "2"]]', ["item 1", "1><b_2", "rename"]),
        ('[["1"], ["1><next"]]', ["item 1", "1><next", "rename"]),
        ('[["1"], ["1><start>2"]]', ["item 1", "1><start>2", "rename"]),
        (r'[["two\u2028lines", "b"]]', ["item 0", r"\u2028", "rename"]),
        ('{"' + "x" * 5000 + r'\u001b\n": 5}', ["item xxx", "expected a list of tokens"]),
        (json.dumps([["x" * 5000], 5]), ["item 1", "expected a list of tokens"]),
    ],
    ids=lambda value: ascii(value[:30]) if isinstance(value, str) else "",
)
def test_a_catalogue_that_cannot_be_used_is_refused(refused, folder, text, words):
    (jsonl(folder / "shop") / "catalogue.json").write_text(text)
    line = refused(*data("shop"))
    for word in ["shop/catalogue.json", *words]:
        assert word in line


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00[", b"\0" * 50, b"\x1f\x8b\x08", "[[0]]".encode("utf-16"),
                                 b"\xed\xa0\x80"])
def test_a_catalogue_that_is_not_text_is_refused(refused, folder, raw):
    (jsonl(folder / "shop") / "catalogue.json").write_bytes(raw)
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


@pytest.mark.parametrize("sid", [[0, 0, 1], ["a0", "b0", "c1"], ["<a_0><b_0>", "<c_1>", "<d>"], ["<a_0>", "b", "<c_1>"],
                                 ["<a_0>", "", "<c_1>"], ["<a_0>", "<<b_0>", "<c_1>"]], ids=str)
def test_a_catalogue_beside_csv_whose_tokens_could_not_be_told_apart_in_a_cell_is_refused(refused, folder, sid):
    (csv_with(folder) / "index.json").write_text(json.dumps({"7": sid}))
    line = refused(*data("shop"))
    assert "index.json, item 7" in line and "<a_12>" in line


def test_the_unchanged_rows_are_accepted(folder):
    nano.load_data(csv_with(folder), nano.Settings(device="cpu"))


@pytest.mark.parametrize("missing, typed", [
    ("item_sid", "itemsid"), ("history_item_sid", "history_items_sid"), ("item_sid", " item_sid"),
    ("item_sid", "ITEM_SID"), ("item_sid", "\x1b\n"), ("item_sid", "x" * 5000)])
def test_a_missing_or_misspelt_column_is_refused_and_those_that_are_there_listed(refused, folder, missing, typed):
    csv_with(folder, columns=[typed if column == missing else column for column in COLUMNS])
    line = refused(*data("shop"))
    ends = 2 if "\n" in typed else 1  # the header's last line
    assert f"shop/train.csv, line {ends}" in line and "history_item_sid" in line and "'user_id'" in line


@pytest.mark.parametrize("twice", ["item_sid", "history_item_sid"])
def test_a_column_that_is_there_twice_is_refused(refused, folder, twice):
    csv_with(folder, columns=[twice, *COLUMNS[1:]])
    line = refused(*data("shop"))
    assert "shop/train.csv, line 1" in line and "one column for each" in line and f"'{twice}', '" in line


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_table_that_is_separated_otherwise_is_refused(refused, folder, separator):
    path = minionerec(folder / "shop") / "train.csv"
    path.write_text(path.read_text().replace(",", separator))
    assert "shop/train.csv, line 1" in refused(*data("shop"))


@pytest.mark.parametrize(
    "cells, words",
    [
        ({"item_sid": "<a_0><b_0>"}, ["<a_0>", "3 tokens"]),
        ({"item_sid": "<a_0><b_0><c_0><d_0>"}, ["<d_0>", "3 tokens"]),
        ({"item_sid": "<a_0>" * 50_000}, ["'<a_0><a_0><a_0><a_0>", "3 tokens"]),
        ({"item_sid": "<a_7><b_7><c_7>"}, ["<a_7>", "not in index.json", "drop the row"]),
        ({"item_sid": ""}, ["expected", "item_sid like <a_0><b_0><c_0>"]),
        ({"item_sid": "<a_0><b_0><c_0"}, ["<a_0><b_0><c_0", "expected", "item_sid like <a_0><b_0><c_0>"]),
        ({"item_sid": " <a_0><b_0><c_0>"}, ["expected", "item_sid like <a_0><b_0><c_0>"]),
        ({"item_sid": "the hammer"}, ["expected"]),
        ({"item_sid": "\x1b[31m<a_0><b_0>\0"}, ["expected"]),
        ({"history_item_sid": "[]"}, ["expected history_item_sid like", "drop the row"]),
        ({"history_item_sid": ""}, ["history_item_sid", "expected"]),
        ({"history_item_sid": "['<a_9><b_9><c_9>']"}, ["<a_9>", "not in index.json"]),
        ({"history_item_sid": "['<a_0><b_0><c_0>', '<a_0><b_0>']"}, ["<a_0>", "3 tokens"]),
        ({"history_item_sid": "<a_0><b_0><c_0>"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "['<a_0><b_0><c_0>'"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "[1, 2]"}, ["Semantic ID 1 is not in", "expected history_item_sid like"]),
        ({"history_item_sid": "('<a_0><b_0><c_0>',)"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "'<a_0><b_0><c_0>'"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "{'<a_0><b_0><c_0>'}"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "{[]}"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "[{[]: 1}]"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "nan"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "None"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "[None]"}, ["Semantic ID None is not in", "expected history_item_sid like"]),
        ({"history_item_sid": "[['<a_0><b_0><c_0>']]"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "[b'<a_0><b_0><c_0>']"}, ["expected history_item_sid like"]),
        # as NumPy prints lists: Python would read one word of six tokens
        ({"history_item_sid": "['<a_0><b_0><c_0>' '<a_0><b_0><c_1>']"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "array(['<a_0><b_0><c_0>'], dtype=object)"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "[np.str_('<a_0><b_0><c_0>')]"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "[" * 500 + "]" * 500}, ["expected history_item_sid like"]),
        ({"history_item_sid": "[" * DEEP}, ["expected history_item_sid like"]),
        ({"history_item_sid": "-" * DEEP + "1"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "x" * 200_000}, ["expected history_item_sid like"]),
        ({"history_item_sid": f"[{'9' * 5000}]"}, ["expected history_item_sid like"]),
        ({"history_item_sid": "['<a_0><b_0><c_0>\0']"}, ["expected history_item_sid like"]),
        ({"history_item_sid": r"['<a_0><b_0><\ud800>']"}, [r"\ud800", "not in index.json"]),
        ({"history_item_sid": "['\x1b[31m']"}, ["expected history_item_sid like"]),
    ],
    ids=lambda value: ascii("".join(value.values())[:40]) if isinstance(value, dict) else "",
)
def test_a_row_that_cannot_be_used_is_refused_by_file_and_line(refused, folder, cells, words):
    csv_with(folder, **cells)
    line = refused(*data("shop"))
    for word in ["shop/train.csv, line 4", *words]:
        assert word in line


@pytest.mark.parametrize("column, cell", [
    ("item_sid", "the hammer"), ("history_item_sid", "(1, 2)"), ("history_item_sid", "[nan]"),
    ("history_item_sid", "None"), ("history_item_sid", "{[]}"), ("history_item_sid", "x" * 200_000)])
def test_the_cell_that_cannot_be_used_is_shown_whatever_the_columns_before_it_hold(refused, folder, column, cell):
    csv_with(folder, **{column: cell})
    line = refused(*data("shop"))
    assert "shop/train.csv, line 4" in line and cell[:20] in line


def test_every_item_of_a_history_is_looked_at_the_oldest_too(refused, folder):
    shop = jsonl(folder / "shop")
    with (shop / "train.jsonl").open("a") as file:
        file.write(json.dumps({"history": [[9, 9, 9], *CODES, *CODES], "target": CODES[0]}) + "\n")
    line = refused(*data("shop"))
    assert f"shop/train.jsonl, line {len(TRAIN) + 1}" in line and "[9, 9, 9]" in line


def test_a_history_is_never_run_as_a_program(refused, folder, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    csv_with(folder, history_item_sid="__import__('os').system('touch broken-in')")
    line = refused(*data("shop"))
    assert "shop/train.csv, line 4" in line and "expected history_item_sid like" in line
    assert not ran and not (folder / "broken-in").exists()


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff", "\0\0\0", ",".join(COLUMNS), ",".join(COLUMNS) + "\n\n\n"])
def test_an_empty_csv_is_refused(refused, folder, text):
    (minionerec(folder / "shop") / "valid.csv").write_text(text)
    line = refused(*data("shop"))
    reason = "holds no rows" if "item_sid" in text else "one column for each is needed"
    assert "shop/valid.csv" in line and reason in line


@pytest.mark.parametrize("end", ["A7,x\n", 'A7,"x', "\x1a"])
def test_a_row_that_ends_too_soon_is_refused(refused, folder, end):
    shop = minionerec(folder / "shop")
    with (shop / "test.csv").open("a") as file:
        file.write(end)
    lines = (shop / "test.csv").read_bytes().count(b"\n") + (not end.endswith("\n"))
    assert f"shop/test.csv, line {lines}" in refused(*data("shop"))


@pytest.mark.parametrize("make, name", [(minionerec, "train.csv"), (jsonl, "train.jsonl")])
@pytest.mark.parametrize("change", [
    lambda raw: raw + "Größe\n".encode("latin-1"), lambda raw: raw.decode().encode("utf-16"),
    lambda raw: b"\x1f\x8b\x08" + raw], ids=["latin-1", "utf-16", "gzip"])
def test_a_file_in_another_encoding_is_refused(refused, folder, make, name, change):
    path = make(folder / "shop") / name
    path.write_bytes(change(path.read_bytes()))
    line = refused(*data("shop"))
    assert f"shop/{name}" in line and "utf-8" in line.lower()


@pytest.mark.parametrize("make, name", [(minionerec, "train.csv"), (minionerec, "index.json"), (jsonl, "train.jsonl")])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["", "crlf"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "mark"])
def test_a_byte_that_is_no_utf_8_is_told_with_its_line(refused, folder, make, name, end, mark):
    """Such as one of a title, that another program has saved in its own encoding."""
    path = make(folder / "shop") / name
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    lines = path.read_bytes().splitlines()
    lines[1] += "é".encode("cp1252")
    path.write_bytes(mark + end.join(lines))
    assert re.match(rf"nanoadagrpo: shop/{name}(: not valid JSON)?, line 2: 'utf-8' codec", refused(*data("shop")))


# -- jsonl -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, words",
    [
        ("{'history': [[0, 0, 0]], 'target': [0, 0, 1]}", ["like [[0, 0, 0], [0, 0, 0]], target like [0, 0, 0]"]),
        ('{"history": [[0, 0, 0]]', ["like [[0, 0, 0], [0, 0, 0]], target like [0, 0, 0]"]),
        ("", ["like [[0, 0, 0], [0, 0, 0]], target like [0, 0, 0]"]),
        ('{"history": [[0, 0, 0]]}', ["target: got {'history': [[0, 0, 0]]}", "target like [0, 0, 0]"]),
        ('{"histroy": [[0, 0, 0]], "target": [0, 0, 1]}', ["{'histroy'", "expected history like"]),
        ('{"history": [0, 0, 0], "target": [0, 0, 1]}', ["Semantic ID 0 is", "history like [[0, 0, 0], [0, 0, 0]]"]),
        ('{"history": [[0, 0, 0]], "target": 5}', ["Semantic ID 5 is not", "target like [0, 0, 0]"]),
        ('{"history": [[0, 0, 0]], "target": [[0], [0], [1]]}', ["[0]"]),
        ('{"history": {"a": [0, 0, 0]}, "target": [0, 0, 1]}', ["expected"]),
        ('{"history": null, "target": [0, 0, 1]}', ["expected"]),
        ('{"history": "hammer", "target": [0, 0, 1]}', ["expected"]),
        ("[1, 2]", ["expected"]),
        ("null", ["expected"]),
        ('"history and target"', ["expected"]),
        ("\0", ["expected"]),
        ("\x1b[31m", ["expected", r"\x1b"]),
        ("\ufeff{}", ["expected"]),
        ("[" * DEEP, ["expected"]),
        ('{"x": ' * DEEP, ["expected"]),
        ('{"history": 5, "target": ' + "[" * 900 + "]" * 900 + "}", ["expected"]),
        ('{"history": [[0, 0, 0]], "target": [0, 0, ' + "[" * 900 + "]" * 900 + "]}", ["numbers or text"]),
        ('{"history": [[0, 0, %s]], "target": [0, 0, 1]}' % ("9" * 5000), ["expected"]),
        ('{"history": [[0, 0, 1%s]], "target": [0, 0, 1]}' % ("0" * 400), ["not in catalogue.json"]),
        ('{"history": [], "target": [0, 0, 1]}', ["history: got []", "expected history like", "drop the row"]),
        ('{"history": [[]], "target": [0, 0, 1]}', ["Semantic ID [] is not", "3 tokens"]),
        ('{"history": [[0, 0]], "target": [0, 0, 1]}', ["[0, 0]", "3 tokens"]),
        ('{"history": [[0, 0, 0]], "target": [0, 0, 1, 1]}', ["[0, 0, 1, 1]", "3 tokens"]),
        ('{"history": [[0, 0, 0]], "target": [9, 9, 9]}', ["[9, 9, 9]", "not in catalogue.json", "drop the row"]),
        ('{"history": [[9, 9, 9]], "target": [0, 0, 0]}', ["[9, 9, 9]", "not in catalogue.json", "drop the row"]),
        # what looks the same but is of another type: to add the item would not help
        ('{"history": [["0", "0", "0"]], "target": [0, 0, 0]}', ["['0', '0', '0']", "[0, 0, 0]", "numbers or text"]),
        ('{"history": [[0, 0, 0]], "target": [0, 0, "1"]}', ["[0, 0, '1']", "[0, 0, 0]", "numbers or text"]),
        ('{"history": [[0, 0, 0]], "target": [0, 0, 0.0]}', ["[0, 0, 0.0]", "numbers or text"]),
        ('{"history": [[0, 0, 0]], "target": [0, 0, false]}', ["False", "numbers or text"]),
        ('{"history": [[0, 0, NaN]], "target": [0, 0, 0]}', ["nan", "numbers or text"]),
        ('{"history": [[{}, 0, 0]], "target": [0, 0, 0]}', ["{}", "numbers or text"]),
        (r'{"history": [["\u001b\u0000\n", "\ud800", "0"]], "target": [0, 0, 0]}', ["numbers or text"]),
        ('{"history": [["%s", 0, 0]], "target": [0, 0, 0]}' % ("x" * 9999), ["xxx", "numbers or text"]),
    ],
    ids=lambda value: ascii(value[:60]) if isinstance(value, str) else "",
)
def test_a_line_that_cannot_be_used_is_refused_by_file_and_line(refused, folder, row, words):
    shop = jsonl(folder / "shop")
    (shop / "train.jsonl").write_text(jsonl_row(*TRAIN[0]) + row + "\n" + jsonl_row(*TRAIN[1]))
    line = refused(*data("shop"))
    for word in ["shop/train.jsonl, line 2", *words]:
        assert word in line
    if "numbers or text" in words:
        assert "add the item" not in line


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_an_empty_jsonl_is_refused(refused, folder, text):
    (jsonl(folder / "shop") / "test.jsonl").write_text(text)
    line = refused(*data("shop"))
    assert "shop/test.jsonl" in line and "holds no rows" in line


def test_equal_words_of_another_type_are_not_the_same_item(refused, folder):
    shop = jsonl(folder / "shop")
    (shop / "catalogue.json").write_text(json.dumps([[str(code) for code in sid] for sid in CODES]))
    line = refused(*data("shop"))
    assert "shop/train.jsonl, line 1" in line and "numbers or text" in line and "add the item" not in line


# -- as a user sees it -------------------------------------------------------------------------------------------------


def test_the_program_itself_answers_in_one_line_with_code_2(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanoadagrpo.py", "--data", "nowhere"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(nano.__file__, run_name="__main__")
    out, err = capsys.readouterr()
    loading = "nanoadagrpo: loading torch and transformers\n"
    assert (end.value.code, out, len(err.splitlines())) == (2, loading, 1)
    assert re.match("nanoadagrpo: nowhere: ", err)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("error", [
    MemoryError(), MemoryError("Unable to allocate 7.45 GiB for an array"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried ...")],
    ids=lambda error: type(error).__name__)
def test_too_little_memory_is_one_line_that_names_the_flags(refused, monkeypatch, error):
    def run(cfg):
        raise error

    monkeypatch.setattr(nano, "run", run)
    line = refused("--toy")
    assert "out of memory; begin a new run with lower" in line and "--micro-batch-size" in line


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("std::bad_alloc"), OSError("Cannot allocate memory (os error 12)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where, what", [
    (pathlib.Path, "read_text"), (json, "loads"), (nano.AutoConfig, "from_pretrained"),
    (nano.AutoModelForCausalLM, "from_pretrained"), (nano, "tree_decode"), (nano.AutoModelForCausalLM, "from_config")],
    ids=lambda x: getattr(x, "__name__", x))
def test_too_little_memory_for_data_or_model_is_not_their_fault(refused, folder, monkeypatch, where, what, error):
    jsonl(folder / "shop"), save_model(folder / "model")

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(where, what, fails)
    line = refused(*data("shop"), "--model", "model")
    assert line.startswith("nanoadagrpo: out of memory; begin a new run with lower --batch-size")
    assert {path.name for path in folder.iterdir()} == {"shop", "model"}


@pytest.mark.parametrize("text", ["[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:34448.",
                                  "NCCL error: remote process exited or there was a network error"])
def test_of_several_processes_the_end_of_one_is_a_line_of_the_others(refused, monkeypatch, text):
    def run(cfg):
        raise RuntimeError(text)

    monkeypatch.setattr(nano, "run", run)
    assert "another process has stopped" in refused("--toy")


@pytest.mark.parametrize("text", ["mat1 and mat2 shapes cannot be multiplied",
                                  "CUDA error: an illegal memory access was encountered"])
def test_a_fault_of_the_script_itself_is_not_made_to_look_like_the_users(monkeypatch, text):
    def run(cfg):
        raise RuntimeError(text)

    monkeypatch.setattr(nano, "run", run)
    with pytest.raises(RuntimeError, match=text):
        nano.main(["--toy"])
