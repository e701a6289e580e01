# SPDX-License-Identifier: MIT
"""The command line: what a run leaves behind, and that equal seeds leave the same."""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import nanoadagrpo as nano

from .helpers import QUICK, SHOP

FILES = ["config.json", "dynamics.png", "machine.jsonl", "metrics.jsonl", "policy", "report.md"]
EVERY_STEP = {"phase", "step", "lr", "nll", "gradient_norm"}
EVERY_RL_STEP = EVERY_STEP | {
    "method", "lr", "grpo", "ratio", "reward", "reward_spread", "difficult", "easy", "reliable", "not_prominent",
    "not_suppressed", "admitted", "zero_spread", "duplicate_rollouts", "invalid_rollouts",
    "bad_scores"}
EVERY_EVALUATION = {
    "phase", "method", "step", "ndcg@10", "hallucination", "sampled_hallucination",
    *(f"{name}@{k}" for name in ("hr", "click_reward", "order_reward") for k in (1, 10, 50))}

# A program of its own with a small toy world, for what one process cannot show.
SMALL = """
import sys, torch
import nanoadagrpo as nano
whole = nano.toy_world
nano.toy_world = lambda cfg: whole(cfg, nano.World(codes=6, items=60, users=60, impressions=8))
nano.main(sys.argv[1:])
"""


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def toy(*arguments):
    return nano.main(["--toy", "--device", "cpu", *QUICK, *map(str, arguments)])


def cells(text):
    """Of the table that a text holds."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A run of all methods: where it is, what it returned, what it printed."""
    out, printed, whole = tmp_path_factory.mktemp("runs") / "all", io.StringIO(), nano.toy_world
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(nano, "toy_world", lambda cfg: whole(cfg, SHOP))
        results = toy("--method", "all", "--out", out)
    return out, results, printed.getvalue()


def check_log(rows, methods, sft_steps, rl_steps):
    """Every line is there, in order, with everything that docs/metrics.md promises; all numbers are finite."""
    phases = {phase: [row for row in rows if row["phase"] == phase] for phase in ("sft", "rl", "valid", "test")}
    assert sum(map(len, phases.values())) == len(rows)
    assert [row["step"] for row in phases["sft"]] == list(range(1, sft_steps + 1))
    assert all(row.keys() == EVERY_STEP for row in phases["sft"])
    for method in methods:
        mine = [row for row in phases["rl"] if row["method"] == method]
        assert [row["step"] for row in mine] == list(range(1, rl_steps + 1))
        assert all(row.keys() == (EVERY_STEP | {"method"} if method == "nll" else EVERY_RL_STEP) for row in mine)
        evaluated = [row["step"] for row in phases["valid"] if row["method"] == method]
        assert evaluated[0] == 0 and evaluated[-1] == rl_steps and evaluated == sorted(set(evaluated))
    assert all(row.keys() == EVERY_EVALUATION for row in phases["valid"])
    assert [row["method"] for row in phases["test"]] == ["base", *methods]
    assert phases["test"][0].keys() == EVERY_EVALUATION
    assert all(row.keys() == EVERY_EVALUATION | {"admitted"} for row in phases["test"][1:])
    assert all(math.isfinite(value) for row in rows for value in row.values() if not isinstance(value, str))


# -- the command that the README begins with ---------------------------------------------------------------------------


def test_the_toy_runs_from_the_command_line_and_leaves_what_it_promises(tmp_path):
    options = "--toy --sft-steps 5 --rl-steps 3 --eval-prompts 50 --device cpu --out results/first"
    command = [sys.executable, nano.__file__, *options.split()]
    two_threads = {**os.environ, "OMP_NUM_THREADS": "2"}  # whose sums must not depend on who comes first
    done = subprocess.run(command, cwd=tmp_path, env=two_threads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "results" / "first"
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert sorted(path.name for path in out.iterdir()) == FILES

    config = json.loads((out / "config.json").read_text())
    assert config == {**vars(nano.Settings(toy=True, device="cpu")), "sft_steps": 5, "rl_steps": 3, "eval_prompts": 50,
                      "out": "results/first"}
    check_log(lines(out), ["adagrpo"], 5, 3)
    assert (out / "dynamics.png").read_bytes().startswith(b"\x89PNG")

    report = (out / "report.md").read_text()
    assert "python nanoadagrpo.py --toy --sft-steps 5 --rl-steps 3 --eval-prompts 50" in report
    assert "dynamics.png" in report
    for text in (done.stdout, report):
        header, _, *rows = cells(text)
        assert [row[0] for row in rows] == ["base", "adagrpo"]
        assert header == ["method", *nano.COLUMNS]

    command[-1] = "results/again"
    subprocess.run(command, cwd=tmp_path, env=two_threads, check=True, capture_output=True)
    for file in ("metrics.jsonl", "policy/model.safetensors"):
        assert (out / file).read_bytes() == (out.parent / "again" / file).read_bytes()

    model = AutoModelForCausalLM.from_pretrained(out / "policy")
    logits = model(torch.arange(12)[None]).logits
    assert logits.shape[:2] == (1, 12) and logits.isfinite().all()


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_equal_seeds_leave_the_same_bytes_in_every_process_and_other_seeds_do_not(small_shop, folder):
    options = ["--method", "random-gate", "--out"]
    for hashes in ("1", "2"):  # the order of a set differs from process to process
        environment = {**os.environ, "PYTHONHASHSEED": hashes, "PYTHONPATH": os.path.dirname(nano.__file__)}
        command = [sys.executable, "-c", SMALL, "--toy", "--device", "cpu", *QUICK, *options, f"run{hashes}"]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    toy(*options, "run3", "--seed", "1")
    files = "metrics.jsonl", "policy/model.safetensors"
    one, two, three = ([(folder / f"run{i}" / file).read_bytes() for file in files] for i in (1, 2, 3))
    assert one == two
    assert one[0] != three[0] and one[1] != three[1]


def test_a_run_does_not_depend_on_what_was_drawn_before_it(small_shop, folder):
    results = []
    for burn in (0, 17):
        torch.manual_seed(burn)
        results.append(toy("--out", f"run{burn}"))
    assert results[0] == results[1]


def test_a_method_gives_the_same_numbers_alone_and_beside_the_others(small_shop, folder, everything):
    for method in ("adagrpo", "random-gate"):
        assert toy("--method", method) == {name: everything[1][name] for name in ("base", method)}


def test_several_methods_run_in_the_order_in_which_they_are_named(small_shop, folder, everything):
    results = toy("--method", "grpo+nll,adagrpo", "--out", "two")
    assert list(results) == ["base", "grpo+nll", "adagrpo"]
    assert results == {name: everything[1][name] for name in results}
    assert sorted(path.name for path in (folder / "two" / "policy").iterdir()) == ["adagrpo", "grpo+nll"]


# -- what is left behind -----------------------------------------------------------------------------------------------


def test_all_methods_run_side_by_side(everything):
    out, results, printed = everything
    assert sorted(path.name for path in out.iterdir()) == FILES
    check_log(lines(out), list(nano.METHODS), 3, 2)
    assert sorted(path.name for path in (out / "policy").iterdir()) == sorted(nano.METHODS)
    for method in nano.METHODS:
        AutoModelForCausalLM.from_pretrained(out / "policy" / method)
    assert list(results) == ["base", *nano.METHODS]
    assert [row[0] for row in cells(printed)[2:]] == [row[0] for row in cells((out / "report.md").read_text())[2:]]
    assert [row[0] for row in cells(printed)[2:]] == list(results)
    assert results["nll"]["admitted"] == 0 and results["grpo"]["admitted"] == results["grpo+nll"]["admitted"] == 1
    assert results["random-gate"].keys() == results["adagrpo"].keys() == results["base"].keys() | {"admitted"}


def test_every_method_starts_from_the_same_base_and_the_same_rollouts(everything):
    rows = lines(everything[0])
    starts = [{**row, "method": ""} for row in rows if row["phase"] == "valid" and row["step"] == 0]
    assert len(starts) == len(nano.METHODS) and all(start == starts[0] for start in starts)
    first = {row["method"]: row for row in rows if row["phase"] == "rl" and row["step"] == 1}
    assert len({row["nll"] for row in first.values()}) == 1
    gated = [first[name] for name in nano.METHODS if name != "nll"]
    for key in ("reward", "difficult", "reliable", "invalid_rollouts"):
        assert len({row[key] for row in gated}) == 1


def test_the_returned_numbers_are_those_in_the_log_and_the_table(small_shop, folder, capsys):
    results = toy("--out", "here")
    tests = {row["method"]: row for row in lines(folder / "here") if row["phase"] == "test"}
    header, _, *table = cells(capsys.readouterr().out)
    for name, row in results.items():
        assert {key: tests[name][key] for key in row} == row
        printed = dict(zip(header, next(line for line in table if line[0] == name), strict=True))
        for title, key in nano.COLUMNS.items():
            if key in row:
                scale, digits = (100, 0.005) if "%" in title else (1, 0.0005)
                assert float(printed[title]) == pytest.approx(row[key] * scale, abs=digits + 1e-9)
            else:
                assert printed[title] == ""


def test_the_final_numbers_are_those_of_the_saved_policy(small_shop, folder):
    results = toy("--out", "here")
    cfg = nano.Settings(**json.loads((folder / "here" / "config.json").read_text()))
    data = nano.toy_world(cfg)
    model = AutoModelForCausalLM.from_pretrained(folder / "here" / "policy", attn_implementation="sdpa")
    ranker = nano.train_ranker(data.catalogue, data.log, cfg)
    test = nano.subset(data.test, cfg.eval_prompts, cfg.seed, "test")
    again = nano.evaluate(nano.Policy(model, data.catalogue, cfg), ranker, test, cfg)[0]
    assert again == pytest.approx({key: results["adagrpo"][key] for key in again}, abs=1e-6)


def test_without_out_every_run_gets_a_new_folder_under_runs(small_shop, folder):
    toy(), toy(), toy("--seed", "1")
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["toy-adagrpo-0", "toy-adagrpo-0-2",
                                                                         "toy-adagrpo-1"]


def test_the_validation_curve_has_a_point_every_eval_every_steps_and_at_the_end(small_shop, folder):
    toy("--rl-steps", "5", "--eval-every", "2", "--out", "here")
    assert [row["step"] for row in lines(folder / "here") if row["phase"] == "valid"] == [0, 2, 4, 5]


def test_evaluation_on_the_way_does_not_change_what_comes_out(small_shop, folder):
    often, seldom = (toy("--rl-steps", "4", "--eval-every", every, "--out", f"run{every}") for every in (1, 4))
    assert often == seldom


def test_the_report_repeats_the_options_that_were_given(small_shop, folder):
    toy("--out", "here", "--lam", "0.5", "--seed", "3")
    given = re.search(r"`python nanoadagrpo.py (.*)`", (folder / "here" / "report.md").read_text())[1].split()
    again = nano.parse(given)
    config = json.loads((folder / "here" / "config.json").read_text())
    assert {**vars(again), "out": "here", "device": "cpu"} == config
