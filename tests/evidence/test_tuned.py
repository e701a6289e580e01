# SPDX-License-Identifier: MIT
"""tuned.py on a folder of a few rows: doses from validation, controls at the same dose, what is judged on what."""

import json
import re

import numpy as np
import pytest
import report
import torch
import tuned
import tuned_report
from arithmetic import choose_dose
from nano.shops import TEST, VALID, jsonl

import nanoadagrpo as nano

from .conftest import interrupted_at

SMALL = ["--sft-steps", "3", "--sft-batch-size", "4", "--rl-steps", "2", "--batch-size", "4", "--group-size", "6",
         "--beam-width", "12", "--eval-batch-size", "9"]


def words_of(folder, out, *more):
    return ["--data", str(folder), "--out", str(out), "--tuning", "0", "--seeds", "100,101", "--jobs", "0", *SMALL,
            *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("tuned") / "shop")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """Interrupted at the fourth arm of tuning, and gone on with."""
    out, patch = tmp_path_factory.mktemp("out"), pytest.MonkeyPatch()
    patch.setattr(nano, "progress", nano.progress)
    with patch.context() as inner:
        interrupted_at(inner, tuned, 4)
        with pytest.raises(KeyboardInterrupt):
            tuned.main(words_of(folder, out))
    found = tuned.main(words_of(folder, out))
    patch.undo()
    return out, found


def test_the_dose_is_the_best_on_validation_and_the_control_has_the_same(finished):
    out, found = finished
    for name in tuned.TUNED:
        units = [json.loads((out / "tuning" / "seed-0" / f"{tuned.Arm(name, lam).label}.json").read_text())
                 for lam in tuned.LAMBDAS]
        arm = tuned.Arm(name, choose_dose({unit["lam"]: [unit["hr@10"]] for unit in units}))
        assert arm in found
        if name in tuned.CONTROL_OF:
            assert arm._replace(name=tuned.CONTROL_OF[name]) in found


def test_doses_are_chosen_on_validation_and_arms_judged_on_all_test_prompts(finished):
    out, found = finished
    with np.load(out / "tuning" / "seed-0" / "grpo+nll_lam1.npz") as arrays:
        assert len(arrays["rank"]) == len(VALID)
    for units in found.values():
        assert [unit["seed"] for unit in units] == [100, 101]
        assert all(len(unit["arrays"]["rank"]) == len(TEST) for unit in units)


def test_a_control_admits_at_each_step_as_many_as_its_gate_did_and_anybody(finished):
    _, found = finished
    counts = {arm.name: np.stack([unit["arrays"]["admitted"] for unit in units]) for arm, units in found.items()}
    assert counts["nll"].shape == (2, 0) and (counts["grpo+nll"] == 4).all()
    for gate, control in tuned.CONTROL_OF.items():
        assert counts[gate].shape == (2, 2) and (counts[control] == counts[gate]).all()
    assert (counts["adagrpo-d"] > 0).any()
    seen, none = torch.zeros(8), torch.zeros(8, dtype=torch.bool)
    for seed in range(200):
        admitted = tuned.as_many(np.array([3]))(none, none, None, torch.Generator().manual_seed(seed))
        assert admitted.sum() == 3
        seen += admitted
    assert (seen > 50).all() and (seen < 100).all()


def test_the_base_is_trained_once_and_the_same_for_all_arms(finished, folder, tmp_path):
    out, found = finished
    base, nll = found[tuned.Arm("base")], found[tuned.Arm("nll")]
    assert (out / "seed-100" / "base-policy.npz").exists() and not list(out.rglob("*.part*"))
    assert nll[0]["core_seconds"] > 0 and base[0]["lam"] == 0 and np.isnan(nll[0]["admitted"])
    # The script's own run of the same seed ends at the same base policy and the same NLL.
    results = nano.main(["--data", str(folder), "--seed", "100", "--method", "nll", "--device", "cpu", "--out",
                         str(tmp_path / "run"), *SMALL])
    assert results["base"]["hr@10"] == base[0]["hr@10"] and results["nll"]["hr@10"] == nll[0]["hr@10"]


def test_the_report_says_what_the_units_say(finished):
    out, found = finished
    text = (out / "report.md").read_text(encoding="utf-8")
    for arm, units in found.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {tuned_report.title(arm)} ")
                   and "−" not in line and line.count("|") == 5)
        cells = [cell.strip() for cell in row.split("|")[2:-1]]
        ranks = np.stack([unit["arrays"]["rank"] for unit in units])
        assert float(cells[0]) == pytest.approx(100 * np.mean(ranks <= 10), abs=0.006)
        assert (cells[2] == "") == np.isnan(units[0]["admitted"])
    a, b = tuned.Arm("nll"), tuned.Arm("base")
    start = f"| {tuned_report.title(a)} − {tuned_report.title(b)} "
    row = next(line for line in text.splitlines() if line.startswith(start))
    x, y = (np.stack([unit["arrays"]["rank"] for unit in found[arm]]) <= 10 for arm in (a, b))
    assert float(re.search(r"[-+][\d.]+", row.split("|")[2])[0]) == pytest.approx(
        100 * (x.mean() - y.mean()), abs=0.006)
    command = next(line for line in text.splitlines() if line.startswith("    python "))
    assert "--tuning 0 --seeds 100-101" in command and "--group-size 6" in command and str(out) not in text


def test_a_page_that_has_a_place_for_it_keeps_what_stands_around(finished, folder, tmp_path, capsys):
    out, _ = finished
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text("before\n" + "x\n".join(report.marks("tuned")) + "\nafter\n")
    other.write_text("mine\n")
    tuned.main(words_of(folder, out, "--page", str(page)))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- tuned") and text.endswith("<!-- /tuned -->\nafter\n")
    assert "GRPO+NLL (λ" in text
    with pytest.raises(SystemExit):
        tuned.main(words_of(folder, out, "--page", str(other)))
    assert other.read_text() == "mine\n" and "has no place" in capsys.readouterr().err


def test_units_of_other_data_or_flags_are_refused(finished, folder, tmp_path, capsys):
    out, _ = finished
    other = jsonl(tmp_path / "other")
    with (other / "train.jsonl").open("a") as file:
        file.write((other / "test.jsonl").read_text())
    renamed = jsonl(tmp_path / "renamed")
    (renamed / "valid.jsonl").rename(renamed / "v"), (renamed / "test.jsonl").rename(renamed / "valid.jsonl")
    (renamed / "v").rename(renamed / "test.jsonl")
    for words in (words_of(other, out), words_of(renamed, out), words_of(folder, out, "--rho", "0.4")):
        with pytest.raises(SystemExit) as stop:
            tuned.main(words)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and "holds units of other" in lines[0]


@pytest.mark.parametrize("more, message", [
    (["--lam", "3"], "--lam: decided by tuned.py"), (["--method", "nll"], "--method: decided"),
    (["--keep", "best"], "--keep: decided"), (["--tuning", "0,100"], "each seed once"), (["--lam=5.0"], "--lam: deci"),
    (["--seeds", "100,100"], "each seed once"), (["--tuning", "0,1,1"], "each seed once"),
    (["--seeds", "x"], "--seeds"), (["--jobs", "-1"], "--jobs"),
    (["--device", "cuda"], "--device: decided"), (["--save-every", "3"], "--save-every: decided"),
    (["--beam-width", "9"], "--beam-width"), (["--page", "nowhere/page.md"], "has no place"),
    (["--reward", "none:score"], "--reward none:score"),
    (["--rho", "x"], "--rho"), (["--nonsense"], "--nonsense"), (["--data", "nowhere"], "nowhere"),
])
def test_bad_input_is_refused_in_one_line(folder, more, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tuned.main(words_of(folder, tmp_path / "out", *more))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_somebody_elses_report_is_refused_before_the_work(folder, tmp_path, capsys):
    (tmp_path / "report.md").write_text("mine\n")
    with pytest.raises(SystemExit) as stop:
        tuned.main(words_of(folder, tmp_path))
    assert stop.value.code == 2 and "report.md: has no place" in capsys.readouterr().err
    assert not (tmp_path / "made-by.json").exists() and (tmp_path / "report.md").read_text() == "mine\n"
