# SPDX-License-Identifier: MIT
"""The driver through its command line: a toy of the toy, interrupted, resumed and reported."""

import json
import re
from types import SimpleNamespace

import measure
import numpy as np
import pytest
import report
import run
from measure import ARMS, Arm

from nanoadagrpo import UserError

from .conftest import interrupted_at

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

        whole = interrupted_at(patch, measure, 4)
        with pytest.raises(KeyboardInterrupt):
            run.main(["--seeds", "0,1", "--knob-seeds", "1", *common])
        before = {path: path.stat().st_mtime_ns for path in folder.glob("seed-*/*.json")}
        patch.setattr(measure, "run_arm", whole)
        results = run.main(["--seeds", "0,1", "--beside", "2", "--knob-seeds", "1", *common])
    return folder, before, results


def test_finished_units_are_not_computed_again(finished):
    folder, before, _ = finished
    assert len(before) == 4  # the base policy and three arms
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert not list(folder.glob("**/*.part*"))


def test_doses_are_the_best_of_those_tried(finished):
    page = json.loads((finished[0] / "dose.json").read_text())
    assert page["seeds"] == [2]
    assert page["doses"]["1"].keys() == page["code"]["1"].keys() == ARMS.keys()
    for name, chosen in page["doses"]["1"].items():
        tried = page["validation HR@10 %"]["1"][name]
        (key, value), = chosen.items()
        assert len(tried) == 2 and tried[f"{value:g}"] == max(tried.values())
        assert key == ("lr" if name in ("nll", "grpo") else "lam")


def pages(folder):
    return [(folder / name).read_text() for name in ("results.md", "results-tables.md")]


def test_the_pages_hold_every_table_and_figure(finished):
    folder, _, _ = finished
    page, tables = pages(folder)
    assert re.findall(r"^### (.*)$", page, re.M) == ["What it says", "Verdicts", "Do other seeds agree?",
                                                     "What is D worth?", "How unevenly can the ranker be trusted?"]
    headings = re.findall(r"^### (.*)$", tables, re.M)
    assert re.findall(r"^##? (.*)$", page + tables, re.M) == ["The toy shop", "The toy shop: all tables"]
    said = page.partition("### What it says\n\n")[2].partition("\n\n")[0].splitlines()
    assert len(said) == 6 and all(line.startswith("* **") for line in said)  # the knob was run under one rule
    for rule in report.RULES.values():
        for table in ("Table 4, {}: final checkpoint", "Table 4, {}: best checkpoint", "Table 5, {}",
                      "Table 6, {}: a simulated A/B test"):
            assert table.format(rule) in headings
        assert f"**What is D worth, at {rule}?** " in page
    assert {"Verdicts on seeds 2", "Doses", "Tables 1 to 3: what the ranker does to the truth's rank",
            "Figure 3: training dynamics", "How unevenly can the ranker be trusted?"} <= set(headings)
    for name in report.NAMES.values():  # in four versions of Table 4, their differences, contexts, bins
        assert len(re.findall(rf"^\| {re.escape(name)} ", tables, re.M)) >= 12, name
    assert tables.count(report.RERANKED) == 4  # under either rule: Table 4, and by context
    for claim in report.CLAIMS:
        assert f"| {claim.text} " in page and f"| {claim.text} " in tables
    assert "**W = 50**" in tables and "**W = 128**" in tables and "[results-tables.md](results-tables.md#" in page
    assert re.search(rf"Of the {len(report.CLAIMS)} verdicts above, the second set gives \d+ too", page)
    assert "| AdaGRPO D&R − NLL continued " in page and f"| machine  | {report.machine()} " in page
    figures = re.findall(r"\]\((evidence/.*?png)\)", page + tables)
    assert sorted(figures) == ["evidence/coverage.png", "evidence/dynamics.png", "evidence/knob.png"]
    for figure in figures:
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    for text in (page, tables):
        assert "`python docs/evidence/run.py --seeds 0-1 --beside 2 --size small" in text
        assert str(folder) not in text and "nan" not in text.lower().replace("nanoadagrpo", "")
        for block in re.findall(r"(?:^\|.*\n)+", text, re.M):  # rows of a table have as many cells as its head
            assert len({line.count(" | ") for line in block.splitlines()}) == 1


@pytest.mark.parametrize("part", report.DRIVERS)
def test_a_page_with_a_place_for_a_part_keeps_the_rest(tmp_path, part):
    page = tmp_path / "results.md"
    start, end = report.marks(part)
    around = "".join("".join(report.marks(other)) for other in report.DRIVERS if other != part)
    page.write_text(f"before\n{start}old\n{end}\nafter\n{around}")
    report.place(part, page, ["new", "words"])
    assert page.read_text() == f"before\n{start}new\n\nwords\n{end}\nafter\n{around}"
    report.place(part, tmp_path / "absent.md", ["new"])
    assert (tmp_path / "absent.md").read_text() == "new\n"
    for text in ("written by hand\n", around):
        page.write_text(text)
        with pytest.raises(UserError, match="has no place for this"):
            report.place(part, page, ["new"])
        assert page.read_text() == text


UP, UNCLEAR, DOWN = np.array([0.9, 1.0, 1.1]), np.array([-1.0, 0.0, 1.0]), np.array([-0.9, -1.0, -1.1])


@pytest.mark.parametrize("both, choice, of_r, words", [
    (DOWN, UP, UNCLEAR, ["a loss: D&R − R is **-1.00", "D chooses better than chance",
                         "fewer costs: R thinned − R is **-2", "R cannot be told from chance"]),
    (UP, DOWN, UP, ["a gain: D&R − R is **+1.00", "D chooses worse than chance",
                    "fewer gains: R thinned − R is **+2", "R chooses better than chance"]),
    (UNCLEAR, UNCLEAR, DOWN, ["Beside R alone nothing that 3 seeds can show: D&R − R is +0.00 [", "D cannot be told",
                              "fewer costs nothing that 3 seeds can show", "R chooses worse than chance"]),
])
def test_what_d_is_worth_is_worded_by_the_intervals(both, choice, of_r, words):
    """Differences in points on three seeds, whose levels differ: D&R − R, D&R − R thinned, R − random at R's rate."""
    r = np.array([40.0, 45.0, 60.0])
    hits = {"adagrpo-r": r, "adagrpo": r + both, "r-thinned": r + both - choice, "random-at-r": r - of_r}
    results = SimpleNamespace(seeds=[1, 2, 3], values=lambda rule, name, key, checkpoint: hits[name] / 100)
    text = report.worth_of_d(results, "tuned")
    assert text.startswith("**What is D worth, at lambda chosen on validation?** ")
    for part in words:
        assert part in text, text


@pytest.mark.parametrize("way, helps, choice, rate", [
    (UP, "gains over NLL continued: **+1.00", "gains over random gate: **+2.00", "loses to NLL continued: **-1.00"),
    (DOWN, "loses to NLL continued: **-1.00", "loses to random gate: **-2.00", "gains over NLL continued: **+1.00"),
    (UNCLEAR, "cannot be told from NLL continued: +0.00 [", "cannot be told from random gate: +0.00 [",
     "cannot be told from NLL continued: +0.00 ["),
])
def test_what_the_toy_says_is_worded_by_the_intervals(way, helps, choice, rate):
    """The random gate, GRPO+NLL and the true reward lie as far on the other side of NLL continued as D&R on its."""
    nll = np.array([40.0, 45.0, 60.0])
    hits = {"nll": nll, "adagrpo": nll + way, **dict.fromkeys(("random-gate", "grpo+nll", "true-reward"), nll - way),
            "oracle-gate": nll + 10 * UP}
    results = SimpleNamespace(rules=("equal", "tuned"), knob={},
                              values=lambda rule, name, key, checkpoint="final": hits[name] / 100)
    said = [*report.what_it_says(results)]
    assert helps in said[0] and choice in said[1] and said[2].count(choice.replace("random gate", "GRPO+NLL")) >= 2
    assert said[3].count(rate) == 2 and "gains over NLL continued: **+10.00" in said[4] and rate in said[4]
    assert "chosen on validation" in said[0] and "equal lambda" in said[2] and len(said) == 5


def test_which_verdicts_a_second_set_of_seeds_shares(monkeypatch):
    claims = [report.Claim(text, "", None) for text in ("A beats B", "B beats C", "C beats D")]
    monkeypatch.setattr(report, "CLAIMS", claims)
    words = {"first": ["confirmed", "not seen", "confirmed"], "second": ["confirmed", "confirmed", "not seen"]}
    monkeypatch.setattr(report, "judged", lambda results, claim: (words[results.name][claims.index(claim)], {}))
    first = SimpleNamespace(name="first", seeds=[1], beside=SimpleNamespace(name="second", seeds=[7, 8]))
    text, table = report.agreement(first)
    assert text == "Of the 3 verdicts above, the second set gives 1 too. The others:"
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[::2]] == [
        ["finding", "seeds 1", "seeds 7, 8"], ["B beats C", "not seen", "confirmed"]]
    assert table.splitlines()[3].split(" | ")[0] == "| C beats D"


def test_two_sets_of_seeds_are_compared_and_taken_together(finished):
    """D&R is 1 and 3 points above NLL on the first two seeds, 8 on the second set's only one."""
    def hits(nll, both):
        values = dict.fromkeys(ARMS, nll) | {"adagrpo": both}
        return {"tuned": {name: [{"final": {"hr@10": x / 100, "utility@10": x}} for x in mine]
                          for name, mine in values.items()}}

    results = finished[2]._replace(seeds=[0, 1], rules=("tuned",), arms=hits([40, 50], [41, 53]))
    beside = results._replace(seeds=[2], arms=hits([45], [53]), beside=None)
    line = report.table_sets(results._replace(beside=beside)).splitlines()[2]
    first, second, both = (float(cell.strip(" *").split(" ")[0]) for cell in line.split("|")[3:-1])
    assert "NLL" in line and (first, second, both) == (2.0, 8.0, 4.0)


@pytest.mark.parametrize("seeds, text", [([100, 101, 102], "100 to 102"), ([1, 2], "1, 2"), ([7], "7"),
                                         ([100, 101, 102, 103, 300, 302, 303, 304], "100 to 103, 300, 302 to 304")])
def test_seeds_in_words(seeds, text):
    assert report.span(seeds) == text


def test_the_table_of_coverage_says_who_is_admitted_and_what_it_gains(finished):
    """Two seeds, three arms that matter: admitted .25 and .27, HR@10 50 and 54; NLL 48 and 52; at random 49 and 52."""
    numbers = {"adagrpo-r": ([0.25, 0.27], [0.50, 0.54]), "nll": ([0, 0], [0.48, 0.52]),
               "random-at-r": ([0.2, 0.3], [0.49, 0.52])}
    arms = {name: [{"admitted": admitted, "final": {"hr@10": hit}} for admitted, hit in zip(*pairs, strict=True)]
            for name, pairs in (dict.fromkeys(ARMS, ([0.1, 0.1], [0.4, 0.4])) | numbers).items()}
    table = report.table_coverage(finished[2]._replace(arms={"equal": arms}), "equal")
    cells = [cell.strip(" *") for cell in next(x for x in table.splitlines() if "AdaGRPO R " in x).split("|")]
    assert cells[2:5] == [f"{SETTINGS.lam:g}", "26.0", "52.00"]
    assert cells[5] == "+2.00 [+2.00, +2.00]" and cells[6].startswith("+1.50 [")


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
    assert "`--tune` has not been run" in (folder / "again-tables.md").read_text()
    assert "at equal lambda?**" in (folder / "again.md").read_text()


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


def test_an_arm_is_tuned_alone_and_the_other_doses_stay(tmp_path, monkeypatch, capsys):
    """The file says by which code each dose was chosen; an arm that has none is asked for before anything is run."""
    monkeypatch.setattr(run, "LAMBDAS", (1.0, 5.0))
    monkeypatch.setattr(run, "RATES", (0.5, 1.0))
    asked = []

    def work_through(size, out, work, jobs, base):
        for seed, arms in work.items():
            for arm in arms:
                asked.append((seed, arm.name))
                run.write(run.unit_file(out, seed, arm.label), json.dumps({"valid": {"hr@10": arm.lam / 100}}))

    monkeypatch.setattr(run, "work_through", work_through)
    made = run.fingerprint("small")
    others = [name for name in ARMS if name != "r-thinned"]
    old = {"seeds": [0, 1], "doses": {"1": {name: {"lam": 3.0} for name in others}},
           run.VALIDATION: {"1": {name: {"3": 40.0} for name in others}},
           "code": {"1": dict.fromkeys(others, "earlier")}, "settings": made["settings"], "world": made["world"]}
    (tmp_path / "dose.json").write_text(json.dumps(old))
    common = ["--size", "small", "--out", str(tmp_path)]
    refused = [(["--seeds", "4"], "no dose of r-thinned; run --tune --arms r-thinned"),
               (["--tune", "--seeds", "0", "--arms", "r-thinned"], "were chosen on seeds 0-1; name these")]
    for words, message in refused:
        with pytest.raises(SystemExit):
            run.main([*words, *common])
        assert message in capsys.readouterr().err and not asked
    run.main(["--tune", "--seeds", "0,1", "--baits", "1", "--arms", "r-thinned,adagrpo", *common])
    assert sorted(set(asked)) == [(seed, name) for seed in (0, 1) for name in ("adagrpo", "r-thinned")]
    assert "adagrpo, bait 1: lam 5, before 3\n" in capsys.readouterr().out
    page = json.loads((tmp_path / "dose.json").read_text())
    tuned = {name: {"lam": 5.0} for name in ("r-thinned", "adagrpo")}
    assert page["doses"] == {"1": old["doses"]["1"] | tuned}
    assert page[run.VALIDATION]["1"] == old[run.VALIDATION]["1"] | {name: {"1": 1.0, "5": 5.0} for name in tuned}
    assert page["code"]["1"] == old["code"]["1"] | dict.fromkeys(tuned, made["code"][:12])


@pytest.mark.parametrize("words", [
    [], ["--seeds", "0", "--baits", "0.3"], ["--seeds", "0", "--beside", "0-2"], ["--seeds", "0", "--arms", "adagrpo"],
    ["--tune", "--arms", "adagrpoo"], ["--seeds", "0,0"], ["--seeds", "0-3,2"], ["--seeds", "0", "--beside", "1,1"],
    ["--seeds", "x"], ["--seeds", "0", "--jobs", "-1"], ["--nonsense"], ["--seeds", "0", "--out", __file__]])
def test_bad_input_is_refused_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(words)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", ["made-by.json", "dose.json"])
@pytest.mark.parametrize("text", ["{", "[]", "3", ""])
def test_a_file_that_none_of_these_programs_wrote_is_refused(tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        run.main(["--seeds", "0", "--size", "small", "--out", str(tmp_path), "--jobs", "0"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and f"{tmp_path / name}: " in lines[0]
    assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize("name", ["results.md", "results-tables.md"])
def test_a_page_without_a_place_is_refused_before_the_work(tmp_path, capsys, name):
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(SystemExit) as stop:
        run.main(["--seeds", "0", "--size", "small", "--out", str(tmp_path), "--jobs", "0"])
    assert stop.value.code == 2 and f"{name}: has no place" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine\n"


def test_what_is_written_is_whole_or_absent(tmp_path):
    run.write(tmp_path / "new" / "unit.json", "{}")
    assert (tmp_path / "new" / "unit.json").read_text() == "{}\n" and len(list((tmp_path / "new").iterdir())) == 1


def test_numbers_read_well():
    assert report.signed(report.Interval(1.234, 0.5, 2.0)) == "**+1.23 [+0.50, +2.00]**"
    assert report.signed(report.Interval(-0.001, -0.5, 2.0)) == "+0.00 [-0.50, +2.00]"
    assert report.signed(report.Interval(1.0, np.nan, np.nan)) == "+1.00"
    assert report.signed(report.Interval(np.nan, np.nan, np.nan)) == ""
    assert report.markdown([["a", "bb"], ["x", "1"]]) == "| a | bb |\n| - | -: |\n| x |  1 |"
