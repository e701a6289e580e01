# SPDX-License-Identifier: MIT
"""The driver through its command line: a toy of the toy, interrupted, resumed and reported."""

import json
import re

import measure
import numpy as np
import pytest
import report
import run
from measure import ARMS, Arm

SETTINGS = run.SIZES["default"][0]
DEFAULT = f"_bait1_lam{SETTINGS.lam:g}_lr{SETTINGS.lr:g}"


def test_seeds_are_read_as_ranges_and_lists():
    assert run.seed_list("100-102,7") == [100, 101, 102, 7] and run.seed_list("") == []
    assert [run.seeds_text(seeds) for seeds in ([100, 101, 102], [7], [1, 3])] == ["100-102", "7", "1,3"]


def test_equal_doses_are_the_defaults_and_tuned_ones_those_of_the_file():
    doses = {"1": {name: {"lam": 3.0} for name in ARMS} | {"grpo": {"lr": 1e-5}, "nll": {"lr": 1e-4}},
             "0.5": {"adagrpo": {"lam": 30.0}}}
    dose = lambda rule, name, bait: run.dose(SETTINGS, doses, rule, name, bait)  # noqa: E731
    assert dose("equal", "adagrpo", 1.0) == Arm("adagrpo", 1.0, SETTINGS.lam, SETTINGS.lr)
    assert dose("equal", "grpo", 1.0).lr == SETTINGS.grpo_lr
    assert dose("tuned", "adagrpo", 0.5).lam == 30.0
    assert dose("tuned", "random-gate", 0.5).lam == 3.0  # not tuned for there: as at the default bait
    assert dose("tuned", "grpo", 1.0) == Arm("grpo", 1.0, SETTINGS.lam, 1e-5)
    assert dose("tuned", "nll", 0.25) == Arm("nll", 1.0, SETTINGS.lam, 1e-4)  # never sees a ranker


def test_every_method_has_as_many_trials():
    work = run.trials(SETTINGS, [0.5, 1.0], [0, 1])
    assert list(work) == [0, 1]
    for bait, names in ((1.0, ARMS), (0.5, measure.KNOB_ARMS)):
        for name in names:
            mine = [arm for arm in work[0] if arm.name == name and arm.bait == bait]
            assert len(mine) == len(run.LAMBDAS) == len(run.RATES), name


def test_an_arm_that_two_rules_share_is_run_once():
    doses = {"1": {name: {"lr": run.dose(SETTINGS, {}, "equal", name, 1.0).lr} if name in ("nll", "grpo")
                   else {"lam": SETTINGS.lam} for name in ARMS}}
    work = run.plan(SETTINGS, doses, ("equal", "tuned"), ("tuned",), [0, 1], [1])
    assert len(work[0]) == len(ARMS) and set(work[0].values()) == {"full"}
    assert len(work[1]) == len(ARMS) + 4 * len(measure.KNOB_ARMS)  # four more values of bait


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Doses chosen on seed 2; then seeds 0 and 1, interrupted in the middle of the first and resumed."""
    folder = tmp_path_factory.mktemp("evidence")
    common = ["--size", "small", "--out", str(folder), "--dose", str(folder / "dose.json"), "--jobs", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "LAMBDAS", (1.0, SETTINGS.lam))
        patch.setattr(run, "RATES", (0.5, 1.0))
        patch.setattr(run, "BAITS", (0.0, 1.0))
        run.main(["--tune", "--seeds", "2", "--baits", "1", *common])

        whole, begun = measure.run_arm, []

        def interrupted(setup, arm, scope):
            begun.append(arm)
            if len(begun) == 4:
                raise KeyboardInterrupt
            return whole(setup, arm, scope)

        patch.setattr(measure, "run_arm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.main(["--seeds", "0,1", "--knob-seeds", "1", *common])
        before = {path: path.stat().st_mtime_ns for path in folder.glob("seed-*/*.json")}
        patch.setattr(measure, "run_arm", whole)
        results = run.main(["--seeds", "0,1", "--knob-seeds", "1", *common])
    return folder, before, results


def test_finished_units_are_not_computed_again(finished):
    folder, before, _ = finished
    assert len(before) == 4  # the base policy and three arms
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert not list(folder.glob("**/*.part*"))


def test_doses_are_the_best_of_those_tried(finished):
    page = json.loads((finished[0] / "dose.json").read_text())
    assert page["seeds"] == [2]
    for name, chosen in page["doses"]["1"].items():
        tried = page["validation HR@10 %"]["1"][name]
        (key, value), = chosen.items()
        assert len(tried) == 2 and tried[f"{value:g}"] == max(tried.values())
        assert key == ("lr" if name in ("nll", "grpo") else "lam")


def test_the_page_holds_every_table_and_figure(finished):
    folder, _, _ = finished
    text = (folder / "results.md").read_text()
    headings = re.findall(r"^### (.*)$", text, re.M)
    for rule in report.RULES.values():
        for table in ("Table 4, {}: final checkpoint", "Table 4, {}: best checkpoint", "Table 5, {}",
                      "Table 6, {}: a simulated A/B test"):
            assert table.format(rule) in headings
    assert {"Verdicts", "Doses", "Tables 1 to 3: what the ranker does to the truth's rank",
            "Figure 3: training dynamics", "How unevenly can the ranker be trusted?"} <= set(headings)
    for name in report.NAMES.values():  # in four versions of Table 4, their differences, contexts, bins
        assert len(re.findall(rf"^\| {re.escape(name)} ", text, re.M)) >= 12, name
    assert text.count(report.RERANKED) == 4  # under either rule: Table 4, and by context
    for claim in report.CLAIMS:
        assert f"| {claim.text} " in text
    assert "**W = 50**" in text and "**W = 128**" in text and "`python docs/evidence/run.py --seeds 0-1" in text
    for figure in re.findall(r"\]\((evidence/.*?png)\)", text):
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    assert str(folder) not in text and "nan" not in text.lower().replace("nanoadagrpo", "")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):  # rows of a table have as many cells as its head
        assert len({line.count(" | ") for line in block.splitlines()}) == 1


def test_cells_are_what_the_units_say(finished):
    folder, _, results = finished
    unit = {(seed, name): json.loads(path.read_text()) for seed in (0, 1) for name in ("adagrpo", "nll")
            for path in folder.glob(f"seed-{seed}/{name}{DEFAULT}.json")}
    hits = [[unit[seed, name]["final"]["hr@10"] for seed in (0, 1)] for name in ("adagrpo", "nll")]
    table = report.table_main(results, "equal", "final")
    row = next(line for line in table.splitlines() if line.startswith("| AdaGRPO D&R "))
    assert row.split("|")[3].strip() == f"{100 * np.mean(hits[0]):.2f}"
    gain = report.more("hr@10", "adagrpo", "nll")(results, "equal")
    assert gain.mean == pytest.approx(100 * np.mean(np.subtract(*hits)))
    # .6 of the oracle's gain: (D&R - NLL) - .6 (oracle - NLL)
    oracle = results.values("equal", "oracle-gate", "hr@10")
    part = report.more("hr@10", "adagrpo", "oracle-gate", share=0.6, over="nll")(results, "equal")
    assert part.mean == pytest.approx(100 * np.mean(np.array(hits[0]) - hits[1] - 0.6 * (oracle - hits[1])))


def test_another_process_gives_the_same_numbers(finished, monkeypatch):
    """One unit is removed, and made again in a process of its own."""
    monkeypatch.setattr(report, "figure_dynamics", lambda *_: None)  # drawn once is enough
    folder, _, _ = finished
    gone = folder / "seed-1" / f"adagrpo{DEFAULT}.json"
    before, others = json.loads(gone.read_text()), {p: p.stat().st_mtime_ns for p in folder.glob("seed-*/*.json")}
    gone.unlink()
    del others[gone]
    run.main(["--seeds", "1", "--size", "small", "--knob-seeds", "", "--out", str(folder), "--jobs", "1",
              "--dose", str(folder / "none.json"), "--page", str(folder / "again.md")])
    after = json.loads(gone.read_text())
    assert {**after, "core_seconds": 0} == {**before, "core_seconds": 0}
    assert all(path.stat().st_mtime_ns == then for path, then in others.items())
    assert "`--tune` has not been run" in (folder / "again.md").read_text()


@pytest.mark.parametrize("change, words", [
    (lambda made: made | {"code": "other"}, "units of other code"),
    (lambda made: made | {"settings": {}}, "units of other settings"),
])
def test_units_of_other_origin_are_refused(finished, monkeypatch, capsys, change, words):
    made = run.fingerprint("small")
    monkeypatch.setattr(run, "fingerprint", lambda size: change(made))
    with pytest.raises(SystemExit) as stop:
        run.main(["--seeds", "0", "--size", "small", "--out", str(finished[0]), "--jobs", "0"])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_doses_of_another_world_are_refused(finished, tmp_path, capsys):
    page = json.loads((finished[0] / "dose.json").read_text())
    page["world"]["users"] += 1
    (tmp_path / "dose.json").write_text(json.dumps(page))
    with pytest.raises(SystemExit):
        run.main(["--seeds", "0", "--size", "small", "--out", str(tmp_path), "--dose", str(tmp_path / "dose.json")])
    assert "other world" in capsys.readouterr().err


def test_the_doses_of_this_folder_were_chosen_for_todays_settings():
    assert run.read_doses(run.HERE / "dose.json", run.fingerprint("default"))["doses"]["1"].keys() == ARMS.keys()


@pytest.mark.parametrize("words", [[], ["--seeds", "0", "--baits", "0.3"]])
def test_bad_input_is_refused_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(words)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_what_is_written_is_whole_or_absent(tmp_path):
    run.write(tmp_path / "new" / "unit.json", "{}")
    assert (tmp_path / "new" / "unit.json").read_text() == "{}\n" and len(list((tmp_path / "new").iterdir())) == 1


def test_numbers_read_well():
    assert report.signed(report.Interval(1.234, 0.5, 2.0)) == "**+1.23 [+0.50, +2.00]**"
    assert report.signed(report.Interval(-0.001, -0.5, 2.0)) == "+0.00 [-0.50, +2.00]"
    assert report.signed(report.Interval(1.0, np.nan, np.nan)) == "+1.00"
    assert report.signed(report.Interval(np.nan, np.nan, np.nan)) == ""
    assert report.markdown([["a", "bb"], ["x", "1"]]) == "| a | bb |\n| - | -: |\n| x |  1 |"
