# SPDX-License-Identifier: MIT
"""The command line: what a run leaves behind, and that equal seeds leave the same."""

import contextlib
import io
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import nanoadagrpo as nano

from .helpers import DEVICE, QUICK, SHOP, make_brief

FILES = ["config.json", "metrics.jsonl", "policy", "ranker.safetensors", "report.md"]
EVERY_STEP = {"phase", "step", "lr", "nll", "gradient_norm"}
EVERY_RL_STEP = EVERY_STEP | {
    "method", "lr", "grpo", "ratio", "reward", "reward_spread", "difficult", "easy", "reliable", "not_prominent",
    "not_suppressed", "admitted", "zero_spread", "duplicate_rollouts", "invalid_rollouts"}
EVERY_EVALUATION = {  # with beams of width 12; HR@50 of them would be HR@12
    "phase", "method", "step", "ndcg@10", "hallucination", "sampled_hallucination",
    *(f"{name}@{k}" for name in ("hr", "click_reward", "order_reward") for k in (1, 10))}
STRATA = [f"{who}/{stratum}" for who in ("ranker", "chance") for stratum in ("overall", "hard", "discriminable")]
EVERY_INFLUENCE = {"phase", "step", "prompts", "beams", "ranker/reliable", "chance/reliable",
                   *(f"{stratum}/coverage" for stratum in STRATA)}
ANY_INFLUENCE = EVERY_INFLUENCE | {f"{stratum}/{key}" for stratum in STRATA  # of strata that are not empty
                                   for key in ("llm_rank", "rm_rank", "influence")}
NOTHING = ["--sft-steps", "0", "--rl-steps", "0"]  # but a ranker, and an evaluation of what there is


@pytest.fixture(autouse=True)
def brief(request, monkeypatch):
    """Where the ranker is looked at, it is trained in full."""
    if "everything" not in request.fixturenames:
        make_brief(monkeypatch)


def lines(folder):
    """What was logged, but for what no seed decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") >= 0 and row.pop("memory", 0) >= 0 for row in rows)
    return rows


def toy(*arguments):
    return nano.main(["--toy", "--device", DEVICE, *QUICK, *map(str, arguments)])


def cells(text):
    """Of the table of methods that a text holds."""
    text = text[text.index("| method") :].split("\n\n")[0]
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
    phases = {phase: [row for row in rows if row["phase"] == phase]
              for phase in ("sft", "influence", "rl", "valid", "test")}
    assert sum(map(len, phases.values())) == len(rows)
    assert [row["step"] for row in phases["sft"]] == list(range(1, sft_steps + 1))
    assert all(row.keys() == EVERY_STEP for row in phases["sft"])
    [influence] = phases["influence"]
    assert rows.index(influence) == sft_steps and EVERY_INFLUENCE <= influence.keys() <= ANY_INFLUENCE
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


@pytest.mark.skipif(os.name != "posix", reason="a shell's >&- and /dev/full")
@pytest.mark.parametrize("end", [">&-", "> /dev/full"])
def test_an_output_that_cannot_be_written_hides_no_refusal(tmp_path, end):
    command = f'"{sys.executable}" "{nano.__file__}" --toy --group-size 1 {end}'
    done = subprocess.run(command, shell=True, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--group-size" in done.stderr
    assert not list(tmp_path.iterdir())



@pytest.mark.skipif(os.name != "posix", reason="a shell's >&- and /dev/full")
@pytest.mark.parametrize("end", ["2>&-", "2> /dev/full", "2>&1 >&- | true; exit ${PIPESTATUS[0]}"])
def test_an_error_that_cannot_be_said_still_ends_in_exit_code_2(tmp_path, end):
    command = f'"{sys.executable}" "{nano.__file__}" --toy --group-size 1 {end}'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["-O"], ["-I"], ["-W", "error", "-X", "dev"]], ids=" ".join)
def test_pythons_own_flags_change_nothing_about_help_and_refusals(tmp_path, flags):
    command = [sys.executable, *flags, nano.__file__]
    helped = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert helped.returncode == 0 and "--group-size" in helped.stdout and helped.stderr == ""
    done = subprocess.run([*command, "--toy", "--group-size", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--group-size" in done.stderr


@pytest.mark.parametrize("wrong", [None, 1.5, ["a"]], ids=str)
def test_arguments_of_main_may_be_paths_and_numbers_and_what_is_neither_is_refused(tmp_path, capsys, wrong):
    missing = tmp_path / "nowhere"
    for given, said in ((["--data", missing, "--seed", 1], f"{missing}: holds neither"),
                        (["--toy", "--seed", wrong], "--seed")):
        with pytest.raises(SystemExit) as end:
            nano.main(given)
        assert end.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert said in line


def test_it_runs_where_standard_output_was_replaced_as_in_a_notebook(tmp_path):
    text = (f"import io, runpy, sys\nsys.argv = ['nanoadagrpo', '--data', 'nowhere']\nsys.stdout = io.StringIO()\n"
            f"runpy.run_path({nano.__file__!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("nanoadagrpo: nowhere: "), done.stderr


def test_the_toy_runs_from_the_command_line_and_leaves_what_it_promises(tmp_path):
    options = "--toy --sft-steps 5 --rl-steps 3 --beam-width 12 --eval-prompts 20 --device cpu --out results/première"
    command = [sys.executable, nano.__file__, *options.split()]
    # The order of a set differs between processes, and a terminal may not know a letter of the folder's name.
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    out = tmp_path / "results" / "première"
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert sorted(path.name for path in out.iterdir()) == FILES

    config = json.loads((out / "config.json").read_text())
    assert config == {**vars(nano.Settings(toy=True, device="cpu")), "sft_steps": 5, "rl_steps": 3, "eval_prompts": 20,
                      "beam_width": 12, "out": "results/première"}
    check_log(lines(out), ["adagrpo"], 5, 3)

    report = (out / "report.md").read_text()
    assert "python nanoadagrpo.py --toy --sft-steps 5 --rl-steps 3 --beam-width 12 --eval-prompts 20" in report
    for text, columns in ((done.stdout, nano.ON_SCREEN), (report, nano.COLUMNS)):
        header, _, *rows = cells(text)
        assert [row[0] for row in rows] == ["base", "adagrpo"]
        assert header == ["method", *columns]
    assert max(map(len, done.stdout.splitlines())) <= 110 and "docs/metrics.md" in done.stdout
    assert done.stdout.startswith("nanoadagrpo: loading"), "before anything that takes seconds"

    if os.environ.get("DEEP_TESTS"):  # of a small shop: tests/nano/test_models.py, in a fresh process
        nano.main([*command[2:-1], str(out.parent / "again")])
        assert lines(out) == lines(out.parent / "again")
        for file in ("policy/model.safetensors", "ranker.safetensors"):
            assert (out / file).read_bytes() == (out.parent / "again" / file).read_bytes()

    model = AutoModelForCausalLM.from_pretrained(out / "policy")
    logits = model(torch.arange(12)[None]).logits
    assert logits.shape[:2] == (1, 12) and logits.isfinite().all()


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_the_sums_of_several_threads_do_not_depend_on_who_comes_first(folder, monkeypatch):
    whole, world = nano.toy_world, nano.World(codes=6, items=60, users=24, impressions=64)  # enough for two threads
    monkeypatch.setattr(nano, "toy_world", lambda cfg: whole(cfg, world))
    torch.set_num_threads(2)
    try:
        results = [toy(*NOTHING, "--out", f"run{i}") for i in range(2)]
    finally:
        torch.set_num_threads(1)
    assert results[0] == results[1]
    one, two = ((folder / f"run{i}" / "ranker.safetensors").read_bytes() for i in range(2))
    assert one == two


def test_a_run_does_not_depend_on_what_was_drawn_before_it_but_on_its_seed(small_shop, folder):
    results = []
    for seed, burn in ((0, 0), (0, 17), (1, 17)):
        torch.manual_seed(burn)
        results.append(toy("--method", "random-gate", "--seed", seed, "--out", f"run{len(results)}"))
    assert results[0] == results[1] != results[2]
    one, two, three = ((lines(folder / f"run{i}"), (folder / f"run{i}" / "policy" / "model.safetensors").read_bytes())
                       for i in range(3))
    assert one == two
    assert one[0] != three[0] and one[1] != three[1]


@pytest.mark.parametrize("argv", [["--toy", "--rl-steps", "1"], ["--toy", "--rl-steps", "1", "--out", "/dev/null/no"]])
def test_who_goes_on_in_python_has_the_random_numbers_that_would_have_come(small_shop, folder, argv):
    """A seed is set for the run alone, also where it is refused."""
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with contextlib.suppress(SystemExit):
        nano.main([*argv, "--sft-steps", "1", "--eval-prompts", "8", "--device", "cpu"])
    assert torch.rand(3).tolist() == expected.tolist()


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
    header, _, *table = cells((folder / "here" / "report.md").read_text())
    narrow, _, *shown = cells(capsys.readouterr().out)
    assert [[cell for title, cell in zip(header, row, strict=True) if title in narrow] for row in table] == shown
    for name, row in results.items():
        assert "hr@10" in row and "hr@50" not in row, "there are 12 beams"
        assert {key: tests[name][key] for key in row} == row
        printed = dict(zip(header, next(line for line in table if line[0] == name), strict=True))
        for title, key in nano.COLUMNS.items():
            if key in row:
                scale, digits = (100, 0.005) if "%" in title else (1, 0.0005)
                assert float(printed[title]) == pytest.approx(row[key] * scale, abs=digits + 1e-9)
            else:
                assert printed[title] == ""


@pytest.mark.parametrize("width", [9, 10])
def test_the_screen_shows_how_good_the_policy_is_with_few_beams_too(small_shop, folder, capsys, width):
    toy(*NOTHING, "--beam-width", str(width), "--out", "here")
    title, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][-3:]
    shown = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (title, row)), strict=True))
    assert shown["method"] == "base" and shown["HR@10 %" if width == 10 else "HR@1 %"]


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
    toy(*NOTHING), toy(*NOTHING), toy(*NOTHING, "--seed", "1")
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["toy-adagrpo-0", "toy-adagrpo-0-2",
                                                                         "toy-adagrpo-1"]


def test_without_steps_of_a_method_the_base_policy_is_evaluated_and_saved(small_shop, folder):
    results = toy("--rl-steps", "0", "--method", "all", "--out", "here")
    assert list(results) == ["base"]
    assert sorted(path.name for path in (folder / "here").iterdir()) == FILES
    AutoModelForCausalLM.from_pretrained(folder / "here" / "policy")
    check_log([row for row in lines(folder / "here") if row["phase"] != "valid"], [], 3, 0)


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
    assert {**vars(again), "out": "here", "device": DEVICE} == config


# -- two runs at a time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False], ids=["into one --out", "without --out"])
def test_of_two_runs_started_together_the_slower_leaves_nothing_or_takes_the_next_name(
        small_shop, folder, monkeypatch, capsys, given):
    out, mkdir = folder / ("one" if given else "runs/toy-adagrpo-0"), pathlib.Path.mkdir

    def overtaken(path, *arguments, **options):
        if path.name == out.name and not out.exists():
            mkdir(out, parents=True)
            (out / "config.json").write_text("the faster one's")
        return mkdir(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "mkdir", overtaken)
    if given:
        with pytest.raises(SystemExit) as end:
            toy(*NOTHING, "--out", "one")
        err = capsys.readouterr().err
        assert end.value.code == 2 and len(err.splitlines()) == 1 and "--out one" in err
    else:
        toy(*NOTHING)
        assert (folder / "runs" / "toy-adagrpo-0-2" / "report.md").exists()
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert (out / "config.json").read_text() == "the faster one's"
    assert not [path for path in folder.rglob("*") if "partial" in path.name]


def test_what_looks_like_a_leftover_may_be_somebodys_thesis(small_shop, folder):
    names = ".here.partial", f".{os.getpid()}.partial", "here.partial", ".partial"
    for name in names:
        (folder / name).mkdir()
        (folder / name / "thesis.md").write_text("mine")
    toy(*NOTHING, "--out", "here")
    assert all((folder / name / "thesis.md").read_text() == "mine" for name in names)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "here"])


# -- numbers that run away ---------------------------------------------------------------------------------------------

RUNAWAYS = {
    "--sft-lr 1e30": "sft, step 2",
    "--lr 1e30 --method grpo+nll": "grpo+nll, step",
    "--grpo-lr 1e30 --method grpo --save-every 0": "grpo, step",
    "--lam 1e38 --method grpo+nll": "grpo+nll, step 1" if DEVICE == "cpu" else "grpo+nll, step",
    "--method grpo+nll --updates 4 --lr 1e3": "step",
}


@pytest.mark.parametrize("options", RUNAWAYS)
def test_a_run_whose_numbers_run_away_ends_in_one_line_and_nothing_bad_is_written(small_shop, folder, capsys, options):
    with pytest.raises(SystemExit) as end:
        toy("--out", "here", "--rl-steps", "12", "--save-every", "2", *options.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1
    assert "finite" in err and RUNAWAYS[options] in err
    assert {path.name.split("-")[0] for path in (folder / "here").iterdir()} <= {
        "config.json", "metrics.jsonl", "checkpoint"}
    for line in (folder / "here" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    for path in (folder / "here").glob("checkpoint-*"):
        assert all(x.isfinite().all() for x in load_file(path).values())
