# SPDX-License-Identifier: MIT
"""--keep best: the policy of the highest validation HR@10 is tested and saved, also over interruptions."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

import nanoadagrpo as nano

from .helpers import logged, made, refused, state
from .shops import jsonl
from .test_resume import begin, resume, stopped_after

BEST = ["--keep", "best", "--beam-width", "12"]  # evaluations at steps 0, 2, 4 and 5, checkpoints at 2, 4 and 5


@pytest.fixture(autouse=True)
def shop(folder, brief):
    return jsonl(folder / "shop")


@pytest.fixture
def scripted(monkeypatch):
    """scripted(values): HR@10 of the validations; returns the weights that each evaluation saw."""

    real = nano.evaluate

    def prepare(*values):
        seen, values = [], iter(values)

        def evaluate(policy, ranker, prompts, cfg):
            mean, each = real(policy, ranker, prompts, cfg)
            seen.append(state(policy))
            test = len(prompts.target) > 2  # four test prompts, two for validation
            return mean | ({} if test else {"hr@10": next(values)}), each

        monkeypatch.setattr(nano, "evaluate", evaluate)
        return seen

    return prepare


def same(one, other):
    return all(torch.equal(x.cpu(), other[name].cpu()) for name, x in one.items())


def saved(name):
    return load_file(nano.Path("here/policy", name, "model.safetensors"))


SCRIPTS = {"rises": ([0.1, 0.2, 0.3, 0.4], 5), "falls": ([0.4, 0.3, 0.2, 0.1], 0), "a hill": ([0.1, 0.3, 0.5, 0.2], 4),
           "the earliest of equal ones": ([0.1, 0.5, 0.5, 0.2], 2), "flat": ([0.2, 0.2, 0.2, 0.2], 0),
           "all are zero": ([0.0, 0.0, 0.0, 0.0], 0), "recovers, but not to the base": ([0.5, 0.1, 0.4, 0.4], 0)}


@pytest.mark.parametrize("curve, kept", SCRIPTS.values(), ids=SCRIPTS)
def test_the_highest_point_of_the_curve_is_tested_and_saved(folder, scripted, curve, kept):
    seen = scripted(*curve)
    results = begin("here", *BEST)
    base, tested_base, *others, last = seen
    points = dict(zip([0, 2, 4, 5], [base, *others], strict=True))
    assert same(base, tested_base) and not any(same(*pair) for pair in itertools.combinations(points.values(), 2))
    assert results["adagrpo"]["kept_step"] == kept and "kept_step" not in results["base"]
    assert same(last, points[kept]) and same(saved(""), points[kept])
    assert [row["hr@10"] for row in logged(folder / "here") if row["phase"] == "valid"] == curve
    assert f"| adagrpo, step {kept} |" in (folder / "here" / "report.md").read_text()
    if kept == 0:
        rest = {key: x for key, x in results["adagrpo"].items() if key not in ("admitted", "kept_step")}
        assert rest == results["base"]


def test_each_method_keeps_its_own_and_begins_at_the_base_not_at_what_another_kept(folder, scripted):
    curves = {"nll": [0.1, 0.9, 0.3, 0.4], "grpo+nll": [0.1, 0.05, 0.02, 0.01], "adagrpo": [0.1, 0.05, 0.2, 0.1]}
    first, *others = curves.values()
    seen = scripted(*first, *(x for curve in others for x in curve[1:]))  # the base is evaluated once
    results = begin("here", *BEST, "--method", ",".join(curves))
    assert [row.get("kept_step") for row in results.values()] == [None, 2, 0, 4]
    base, parts = seen[0], dict(zip(curves, (seen[i : i + 4] for i in (2, 6, 10)), strict=True))
    for name, index in (("nll", 0), ("grpo+nll", None), ("adagrpo", 1)):
        expected = base if index is None else parts[name][index]
        assert same(saved(name), expected) and same(parts[name][3], expected)
    alone = scripted(*curves["adagrpo"])
    begin("alone", *BEST)
    assert all(same(one, other) for one, other in zip(alone[2:], parts["adagrpo"], strict=True))


def test_what_is_kept_is_not_trained_on(folder, scripted):
    """The curve and the training are those of a run that keeps the last one."""
    seen = [scripted(0.1, 0.5, 0.4, 0.3), None]
    begin("here", *BEST)
    seen[1] = scripted(0.1, 0.5, 0.4, 0.3)
    begin("last", *BEST[2:])
    assert all(same(one, other) for one, other in zip(seen[0][:-1], seen[1][:-1], strict=True))
    assert logged(folder / "here")[:-1] == logged(folder / "last")[:-1]
    assert same(load_file(folder / "last" / "policy" / "model.safetensors"), seen[1][-2])


@pytest.fixture
def arbitrary(monkeypatch):
    """HR@10 of a validation follows from the policy's weights: weights not seen before get the next value.

    Not from their bits: another CPU rounds otherwise, and there the last step might always be the best.
    """
    real, known, values = nano.evaluate, {}, itertools.cycle([0.3, 0.1, 0.5, 0.2])

    def evaluate(policy, ranker, prompts, cfg):
        mean, each = real(policy, ranker, prompts, cfg)
        bits = b"".join(x.cpu().numpy().tobytes() for x in state(policy).values())
        if bits not in known:
            known[bits] = next(values)
        return mean | {"hr@10": known[bits]}, each

    monkeypatch.setattr(nano, "evaluate", evaluate)


@pytest.mark.parametrize("options, stops", [
    ([], [9, 3, 2, 1]),
    (["--eval-every", "1", "--save-every", "3", "--method", "nll,adagrpo"], [16, 9, 12]),
    (["--save-every", "1", "--method", "grpo+nll,nll"], [11, 4, 3, 6])], ids=["one", "two", "two, saved often"])
def test_interrupted_again_and_again_it_keeps_the_same_step_and_weights(folder, monkeypatch, arbitrary, options, stops):
    results = begin("whole", *BEST, *options)
    rows = [row for row in logged(folder / "whole") if row["phase"] == "valid"]
    for name in list(results)[1:]:
        curve = {row["step"]: row["hr@10"] for row in rows if row["method"] == name}
        assert results[name]["kept_step"] == max(curve, key=curve.get)
    assert {row.get("kept_step") for row in results.values()} - {None, 5}, "some other than the last one is kept"
    stopped_after(monkeypatch, stops[0], lambda: begin("here", *BEST, *options))
    for lines in stops[1:]:
        stopped_after(monkeypatch, lines, lambda: resume("here"))
    assert resume("here") == results
    assert made(folder / "here") == made(folder / "whole")


def test_it_needs_ten_beams(folder, capsys):
    line = refused(capsys, lambda: begin("here", "--keep", "best", "--beam-width", "9"))
    assert "--keep best" in line and "--beam-width 10" in line and not (folder / "here").exists()


def test_by_default_the_last_one_is_tested_and_nothing_is_said_of_it(folder, scripted):
    seen = scripted(0.5, 0.4, 0.3, 0.2)
    results = begin("here", "--beam-width", "12")
    assert same(saved(""), seen[-2]) and "kept_step" not in results["adagrpo"]
    assert "step" not in (folder / "here" / "report.md").read_text().split("| adagrpo")[1].split("|")[0]
    assert json.loads((folder / "here" / "config.json").read_text())["keep"] == "last"
