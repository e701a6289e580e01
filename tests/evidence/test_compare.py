# SPDX-License-Identifier: MIT
"""The yardsticks, against what counting by hand gives on a few rows."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import compare
import pytest
import torch

import nanoadagrpo as nano

CODES = [(i, 0) for i in range(12)]
BOUGHT = [5, 5, 5, 5, 2, 2, 2, 7, 7, 0]  # by popularity: 5, 2, 7, 0, and then the rest in their order


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "catalogue.json").write_text(json.dumps(CODES))
    rows = {"train": [(1, item) for item in BOUGHT], "valid": [(1, 2)], "test": [(1, 5), (3, 7), (1, 0), (4, 11)]}
    for name, pairs in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"history": [CODES[history]], "target": CODES[target]}) + "\n" for history, target in pairs))
    return tmp_path


def test_popularity_serves_everyone_the_same_list(folder):
    data = nano.load_data(folder, nano.Settings(device="cpu"))
    found = compare.serve(compare.popularity(data), data.test, batch=3)
    # Places 1, 3, 4, and 12: seven of the others stand before item 11.
    assert found == pytest.approx({"hr@1": 1 / 4, "hr@10": 3 / 4, "hr@50": 1.0,
                                   "ndcg@10": (1 + 1 / math.log2(4) + 1 / math.log2(5)) / 4})


def test_the_ranker_alone_ranks_the_whole_catalogue_item_by_item(folder):
    cfg = nano.Settings(device="cpu")
    data = nano.load_data(folder, cfg)
    ranker = nano.train_ranker(data.catalogue, data.log, cfg)
    ranks = []
    for history, target in zip(data.test.history, data.test.target.tolist(), strict=True):
        p = [ranker.probabilities(history[None], torch.tensor([[item]]))["click"].item() for item in range(12)]
        ranks.append(1 + sum(other > p[target] for other in p))
    found = compare.serve(compare.ranker_alone(data, cfg), data.test)
    assert found["hr@1"] == sum(rank == 1 for rank in ranks) / 4 and found["hr@10"] == sum(r <= 10 for r in ranks) / 4
    assert len(set(ranks)) > 1


def test_the_table_holds_mean_and_spread_over_runs_and_differences_within_them(folder, tmp_path, capsys):
    runs = []
    for seed, nll, gated in ((0, 0.10, 0.13), (1, 0.30, 0.31)):
        run = tmp_path / f"s{seed}"
        run.mkdir()
        (run / "config.json").write_text(json.dumps(dataclasses.asdict(nano.Settings(data=str(folder), seed=seed))))
        lines = [{"phase": "rl", "method": "nll", "step": 1, "nll": 3.0}]
        for name, hit, admitted in (("base", 0.05, None), ("nll", nll, 0.0), ("adagrpo", gated, 0.1)):
            metrics = {"hr@1": 0.01, "hr@10": hit, "hr@50": 0.5, "ndcg@10": 0.04, "hallucination": 0.2}
            metrics |= {} if admitted is None else {"admitted": admitted}
            lines.append({"phase": "test", "method": name, "step": 1, **metrics})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(run)
    rows = compare.main([str(run) for run in runs])
    printed = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    cells = {row[0]: row[1:] for row in printed[2:]}
    assert list(cells) == ["base", "nll", "adagrpo", "popularity", "ranker alone"]
    # Of 13 and 31 %: mean 22, deviations of 9, so a sample standard deviation of 9 * sqrt(2). Differences 3 and 1.
    assert cells["adagrpo"][1] == "22.00 ± 12.73" and cells["adagrpo"][-1] == "+2.00 ± 1.41"
    assert cells["adagrpo"][6] == "10.00 ± 0.00" and cells["base"][6] == ""
    assert cells["popularity"][1] == "75.00 ± 0.00" and cells["popularity"][4] == ""
    assert cells["popularity"][-1] == "+55.00 ± 14.14"
    assert [one["hr@10"] for one in rows["popularity"]] == [0.75, 0.75]


@pytest.mark.parametrize("settings, words", [
    ({"seed": 1, "constrained": True, "lam": 2.0}, "s1: --lam, --constrained are not as in"),
    ({"seed": 1, "method": "nll"}, "s1: --method are not as in"), ({}, "a seed is there twice: 0, 0"),
    ({"seed": 1}, "s0: nothing was tested so far"),
    (None, "s1: [Errno 2] No such file"), ({"words": 3}, "s1: Settings.__init__() got an unexpected")], ids=str)
def test_runs_that_cannot_be_averaged_are_refused(folder, tmp_path, capsys, settings, words):
    for name, more in (("s0", {}), ("s1", settings)):
        (tmp_path / name).mkdir()
        if more is not None:
            config = dataclasses.asdict(nano.Settings(data=str(folder), device="cpu")) | more
            (tmp_path / name / "config.json").write_text(json.dumps(config))
            (tmp_path / name / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit) as end:
        compare.main([str(tmp_path / "s0"), str(tmp_path / "s1")])
    assert end.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_runs_of_which_one_has_not_ended_are_refused(folder, tmp_path, capsys):
    """AdaGRPO of the second would be set against NLL of the first."""
    for seed, names in enumerate((["base", "nll"], ["base", "nll", "adagrpo"])):
        (tmp_path / f"s{seed}").mkdir()
        config = dataclasses.asdict(nano.Settings(data=str(folder), seed=seed, device="cpu"))
        (tmp_path / f"s{seed}" / "config.json").write_text(json.dumps(config))
        (tmp_path / f"s{seed}" / "metrics.jsonl").write_text("".join(
            json.dumps({"phase": "test", "method": name, "hr@10": 0.1 * seed}) + "\n" for name in names))
    with pytest.raises(SystemExit) as end:
        compare.main([str(tmp_path / "s0"), str(tmp_path / "s1")])
    assert end.value.code == 2 and "other methods were tested than in" in capsys.readouterr().err


def a_run(folder, data, seed=0, **more):
    """One that has been tested, with this folder of data in its config.json."""
    folder.mkdir()
    config = dataclasses.asdict(nano.Settings(data=str(data), seed=seed, device="cpu", **more))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text(json.dumps({"phase": "test", "method": "nll", "hr@10": 0.1}))
    return str(folder)


def test_data_that_have_moved_are_named(folder, tmp_path, monkeypatch, capsys):
    """One run has a folder that is gone, the other a path that was right elsewhere."""
    runs = [a_run(tmp_path / "s0", tmp_path / "gone"), a_run(tmp_path / "s1", "shop", seed=1)]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    rows = compare.main([*runs, "--data", str(folder)])
    assert [one["hr@10"] for one in rows["popularity"]] == [0.75, 0.75]
    monkeypatch.setenv("HOME", str(folder))
    assert compare.main([*runs, "--data=~"])["popularity"] == rows["popularity"]
    capsys.readouterr()
    for words, message in ((runs, "s1: --data are not as in"), (runs[:1], "gone: holds neither"),
                           (runs[1:], "shop: holds neither"), ([*runs, "--data", "none"], "none: holds neither")):
        with pytest.raises(SystemExit) as end:
            compare.main(words)
        [line] = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and message in line and "name them by --data" in line


@pytest.mark.parametrize("said, more, fits", [(4, {}, True), (3, {}, False), (3, {"eval_prompts": 3}, True),
                                              (4000, {}, False)])
def test_other_data_than_those_of_the_run_are_refused(folder, tmp_path, capsys, said, more, fits):
    run = a_run(tmp_path / "s0", tmp_path / "gone", **more)
    Path(run, "report.md").write_text(f"# s0\n\n{said} test prompts, beams of width 50; 2 s, 1 threads\n")
    if fits:
        assert "popularity" in compare.main([run, "--data", str(folder)])
        return
    with pytest.raises(SystemExit) as end:
        compare.main([run, "--data", str(folder)])
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and f"s0: was tested on {said} prompts, and {folder} has 4; name" in line


def test_the_report_of_a_run_is_read(folder, tmp_path, monkeypatch, capsys):
    """Of the script itself, so that the line which is looked for is the one that is written."""
    words = "--device cpu --sft-steps 2 --rl-steps 0 --beam-width 4 --batch-size 2"
    nano.main([*words.split(), "--data", str(folder), "--out", str(tmp_path / "s0")])
    rows = (folder / "test.jsonl").read_text().splitlines(keepends=True)
    assert "base" in compare.main([str(tmp_path / "s0")])
    (folder / "test.jsonl").write_text("".join(rows[:3]))
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "s0")])
    assert "was tested on 4 prompts" in capsys.readouterr().err


def test_rows_that_are_missing_where_the_data_were_name_the_remedy_too(folder, tmp_path, capsys):
    (folder / "test.jsonl").rename(folder / "away.jsonl")
    with pytest.raises(SystemExit) as end:
        compare.main([a_run(tmp_path / "s0", folder)])
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "test.jsonl" in line and "name them by --data" in line


def test_runs_of_the_toy_have_no_data_to_name(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        compare.main([a_run(tmp_path / "s0", "", toy=True), "--data", str(tmp_path)])
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "these are runs of the toy; leave it out" in line


@pytest.mark.parametrize("words", [[], ["--dat", "x", "s0"], ["s0", "--figure"], ["nowhere"]])
def test_what_is_refused_is_refused_in_one_line(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        compare.main(words)
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("compare.py: ")


@pytest.mark.parametrize("text", [
    '{"loss": 1}', '{"phase": "test"}', "3", "[]", '{"phase": 1}', '{"phase": "rl"', "\x00"])
def test_the_log_of_another_program_is_refused(folder, tmp_path, capsys, text):
    (tmp_path / "s0").mkdir()
    (tmp_path / "s0" / "config.json").write_text(json.dumps(dataclasses.asdict(nano.Settings(data=str(folder)))))
    (tmp_path / "s0" / "metrics.jsonl").write_text(text + "\n")
    with pytest.raises(SystemExit) as end:
        compare.main([str(tmp_path / "s0")])
    assert end.value.code == 2 and f"{tmp_path}/s0: " in capsys.readouterr().err


@pytest.mark.parametrize("path", ["nowhere/f.png", "f.xyz", "f"])
def test_a_figure_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, capsys, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        compare.main(["nothing", "--figure", path])
    assert end.value.code == 2 and f"--figure {path}: needs a folder" in capsys.readouterr().err


def test_runs_that_are_still_going_at_different_steps_are_refused(folder, tmp_path, capsys):
    for seed in (0, 1):
        (tmp_path / f"s{seed}").mkdir()
        config = dataclasses.asdict(nano.Settings(data=str(folder), seed=seed, device="cpu"))
        (tmp_path / f"s{seed}" / "config.json").write_text(json.dumps(config))
        (tmp_path / f"s{seed}" / "metrics.jsonl").write_text('{"phase": "sft", "step": 1, "nll": 2.0}\n' * (3 + seed))
    with pytest.raises(SystemExit) as end:
        compare.main([str(tmp_path / "s0"), str(tmp_path / "s1"), "--figure", str(tmp_path / "f.png")])
    assert end.value.code == 2 and "s1: has logged more or fewer steps than" in capsys.readouterr().err


def test_runs_may_have_been_made_elsewhere(folder, tmp_path):
    others = {"device": "cpu", "out": "x", "save_every": 7, "data": f"{folder}/../{folder.name}"}
    for seed, more in enumerate([{"device": "cuda"}, others]):
        (tmp_path / f"s{seed}").mkdir()
        config = dataclasses.asdict(nano.Settings(data=str(folder), seed=seed)) | more
        (tmp_path / f"s{seed}" / "config.json").write_text(json.dumps(config))
        (tmp_path / f"s{seed}" / "metrics.jsonl").write_text("")
    runs = [tmp_path / "s0", tmp_path / "s1"]
    compare.check_alike(runs, [compare.read(run) for run in runs])


def test_the_figure_shows_what_was_logged_with_the_standard_error_of_a_share(folder, tmp_path):
    lines = [{"phase": "sft", "step": i, "nll": 6.0 - i} for i in (1, 2, 3, 4)]
    for name, hit in (("nll", 0.5), ("adagrpo", 0.8)):
        lines += [{"phase": "valid", "method": name, "step": step, "hr@10": x} for step, x in ((0, 0.5), (3, hit))]
    lines += [{"phase": "rl", "method": "adagrpo", "step": 1, "nll": 3.0}]
    losses, methods = compare.curves(lines, 100)
    assert losses == ([1, 2, 3, 4], [5, 4, 3, 2]) and list(methods) == ["nll", "adagrpo"]
    steps, values, errors = methods["adagrpo"]
    assert steps == [0, 3] and values == pytest.approx([50, 80]) and errors == pytest.approx([5, 4])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(nano.Settings(data=str(folder)))))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compare.main([str(run), "--figure", str(run / "curve.png")])
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_several_runs_are_their_mean_and_the_spread_of_their_change():
    one, other = ([1, 2], [4.0, 2.0]), ([1, 2], [6.0, 3.0])
    each = [(one, {"nll": ([0, 3], [10.0, 12.0], [1, 1])}), (other, {"nll": ([0, 3], [20.0, 26.0], [1, 1])})]
    (steps, losses), methods = compare.over_runs(each)
    assert steps == [1, 2] and losses.tolist() == [5.0, 2.5]
    x, values, errors = methods["nll"]  # changes of 2 and 6
    assert x == [0, 3] and values.tolist() == [15.0, 19.0] and errors == pytest.approx([0, 8**0.5])
    assert compare.over_runs(each[:1]) == each[0]


def test_runs_of_the_toy_are_compared_too(tmp_path, monkeypatch):
    small = nano.World(codes=6, items=60, users=40, impressions=8)
    monkeypatch.setattr(nano, "toy_world", lambda cfg, real=nano.toy_world: real(cfg, small))
    for seed in (0, 1):
        (tmp_path / f"s{seed}").mkdir()
        config = dataclasses.asdict(nano.Settings(toy=True, seed=seed, device="cpu", eval_prompts=20))
        (tmp_path / f"s{seed}" / "config.json").write_text(json.dumps(config))
        line = {"phase": "test", "method": "nll", "hr@10": 0.1}
        (tmp_path / f"s{seed}" / "metrics.jsonl").write_text(json.dumps(line))
    runs = [tmp_path / "s0", tmp_path / "s1"]
    rows = compare.collect(runs, [compare.read(run) for run in runs])
    assert [*rows] == ["nll", "popularity", "ranker alone"] and all(0 < row["hr@10"] < 1 for row in rows["popularity"])


def test_what_the_readmes_first_command_installs_is_enough():
    """SciPy belongs to the extra of the evidence; this program is for everybody."""
    code = "import sys; sys.modules['scipy'] = None; sys.path.insert(0, 'docs/evidence'); import compare"
    root = Path(compare.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True).returncode == 0
