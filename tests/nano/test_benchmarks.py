# SPDX-License-Identifier: MIT
"""The benchmarks' own checks, on small models: both sides compute the same, and a difference shows."""

import functools
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import nanoadagrpo as nano

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import families
import feedback
import same
import speed
import work


@pytest.mark.parametrize("T", [20, 61])
def test_a_step_of_the_tree_has_the_loss_and_the_gradient_of_repeating_the_prompt(T):
    policy = work.a_policy("smoke", T)
    history = work.some_prompts(policy, 3, T).history
    assert work.prompt_ids(policy, history).shape == (3, T)
    assert work.check_step(policy, history, 5)["gradient"] < 2e-5


def test_steps_taken_one_by_one_are_those_of_a_run():
    policy, enough = work.a_policy("smoke", 20), RuntimeError("enough")
    prompts, cfg = work.some_prompts(policy, 7, 20), work.settings(3, 4)
    one, other = work.copied(policy), work.copied(policy)
    steps = work.steps(one, prompts, cfg)
    for _ in range(3):
        next(steps)

    def stop(step, *_):
        if step == 3:
            raise enough

    with pytest.raises(RuntimeError, match="enough"):
        nano.train_rl(other, work.reward, prompts, cfg, "grpo", lambda **row: None, on_step=stop)
    for ours, theirs, before in zip(*(p.model.parameters() for p in (one, other, policy)), strict=True):
        assert torch.equal(ours, theirs) and not torch.equal(ours, before)


def test_beams_are_those_of_hugging_face():
    policy = work.a_policy("smoke", 20)
    history = work.some_prompts(policy, 3, 20).history
    assert work.check_beams(policy, history, 12)["in the same place"] > 0.9
    policy.constraint, allowed = policy.catalogue, work.allowed_tokens(policy.catalogue, 20)
    assert work.check_beams(policy, history, 12, allowed)["in the same place"] > 0.9


def test_a_constraint_that_is_not_read_is_not_timed():
    policy = work.a_policy("smoke", 20)
    history = work.some_prompts(policy, 3, 20).history
    with pytest.raises(AssertionError, match="no item"):
        work.check_constrained(policy, history)
    policy.constraint = policy.catalogue
    work.check_constrained(policy, history)


@pytest.mark.parametrize("hand", [work.hand_loss, work.guarded_loss])
def test_the_cores_loss_and_gradients_are_those_of_torch_by_hand(hand):
    case = work.core_case(B=16, K=12)
    assert max(work.check_core(case, hand).values()) < 1e-5
    assert case[0].requires_grad and torch.autograd.grad(work.core_loss(*case), case[0])[0].abs().max() > 0


def test_torch_by_hand_has_the_protections_that_the_core_is_timed_against():
    """Equal rewards, a NaN in a pool, huge rewards, far ratios."""
    logp, truth, old, rewards, target, negatives = work.core_case(B=16, K=12)
    rewards[:4] = 0.7
    rewards[4, 3] = torch.nan
    rewards[5:8] *= 3e38
    old[8:] = logp.detach()[8:] - 200
    case = [logp, truth, old, rewards, target, negatives]
    assert max(work.check_core(case, work.guarded_loss).values()) < 1e-5
    assert work.guarded_loss(*case).isfinite()


def test_products_are_counted_also_where_they_are_added_in_place():
    a, b, total = torch.randn(3, 4), torch.randn(4, 5), torch.zeros(3, 5)
    assert speed.flops(lambda: total.addmm_(a, b)) == speed.flops(lambda: torch.mm(a, b)) == 2 * 3 * 4 * 5


def test_a_side_that_computes_something_else_is_not_timed():
    with pytest.raises(AssertionError, match="differ by"):
        work.same("loss", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 1e-5)


def test_rows_without_a_peer_run_and_are_written_between_the_markers(tmp_path, capsys):
    results = speed.main(["--quick", "--rows", "beams-60", "core", "growth"])
    assert all(0 < row["low"] <= row["middle"] <= row["high"] for row in results.values())
    assert capsys.readouterr().out.count("\n| ") == 2 + 3
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: speed.py writes from here -->\nold\n<!-- table: to here -->\nafter\n")
    speed.write("| new |", page=page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "| new |" in text and "old" not in text


def test_a_method_of_the_benchmarks_is_none_of_the_script_behind_its_step():
    before, policy = dict(nano.METHODS), work.a_policy("tiny", 20)
    next(work.steps(policy, work.some_prompts(policy, 4, 20), work.settings(2, 4), work.admitting(1)))
    assert before == nano.METHODS


def test_the_benchmark_of_logs_and_of_the_constrained_search_runs(tmp_path, capsys):
    feedback.million(tmp_path, rows=20, shown=3)
    feedback.constrained(200, 8, B=2, width=5, turns=1)
    assert capsys.readouterr().out.count("| ") >= 2


@pytest.mark.skipif(not os.environ.get("DEEP_TESTS"), reason="two more processes; DEEP_TESTS=1 pytest")
def test_cost_over_the_vocabulary_is_measured_beside_another_checkout(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- words: speed.py writes from here -->\n<!-- words: to here -->\n")
    monkeypatch.setattr(speed, "write", functools.partial(speed.write, page=page))
    speed.main(["--quick", "--words", "--before", str(speed.ROOT), "--write"])
    found = page.read_text().split("\n| 1,000 | ")[1].split(" | ")
    assert len(found) == 5 and found[0] == found[2] and 0.1 < float(found[4].split()[0]) < 10, "the same script twice"
    assert found[0] == "0.1", "millions of weights: 999 words of 32 numbers, and two layers"


@pytest.mark.skipif(not os.environ.get("DEEP_TESTS"), reason="two more processes; DEEP_TESTS=1 pytest")
def test_a_version_of_the_script_that_leaves_out_one_update_is_not_the_same(tmp_path, monkeypatch, capsys):
    script = (same.ROOT / "nanoadagrpo.py").read_text()
    changed = script.replace("self.adamw.step()", "self.adamw.step() if where != 'adagrpo, step 1' else 0")
    assert changed != script
    (tmp_path / "nanoadagrpo.py").write_text(changed)
    (tmp_path / "adagrpo_core").symlink_to(same.ROOT / "adagrpo_core")
    monkeypatch.setattr(same, "RUNS", {"brief": "--toy", "on data": "--data {data}"})
    monkeypatch.setattr(same, "SMALL", "--sft-steps 1 --rl-steps 2 --batch-size 8 --eval-prompts 8 --beam-width 10")
    assert same.main([str(tmp_path)]) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    differ, tensors, gap = re.fullmatch(r"\| brief \| (\d+) of (\d+) \| (\S+) \(\w.*\) \|", line).groups()
    assert 0 < int(differ) < int(tensors) and float(gap) > 0, "the ranker is the same"


def test_the_same_weights_and_metrics_are_the_same():
    rows, weights = [{"nll": 1.5, "phase": "rl", "seconds": 3}], {("policy", "x"): torch.ones(2)}
    assert same.differences((rows, weights), ([{**rows[0], "seconds": 4}], dict(weights))) == (0, 1, 0.0, "")
    assert same.differences((rows, weights), (rows, {("policy", "x"): torch.tensor([1, 1 + 1e-7])}))[0] == 1
    assert same.differences((rows, weights), (rows, {})) == (1, 1, 0.0, "")
    assert same.differences((rows, weights), ([{**rows[0], "nll": 1.0}], weights))[2:] == (0.5, "nll")
    assert same.differences((rows, weights), ([{**rows[0], "phase": "sft"}], weights))[2] == float("inf")
    assert same.differences((rows, weights), (rows * 2, weights))[2] == float("inf")


def test_the_sweep_over_model_families_tells_right_from_refused(capsys):
    assert families.main(["llama", "mamba", "moshi"]) == {"right": 1, "wrong": 0, "refused": 2, "not made": 0}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("llama | right") and "kind of layers or cache" in lines[1]
    assert "made anew with other tables" in lines[2], "its table has a row more than its head"


def test_a_ratio_meets_a_target_from_above_and_a_time_from_below():
    assert speed.met(15, 15.1) and not speed.met(15, 14.9)
    assert speed.met(-1.6, 1.5) and not speed.met(-1.6, 1.7)


@pytest.mark.peers
@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL is not installed")
def test_trl_computes_the_same_and_is_timed():
    results = speed.main(["--quick", "--rows", "step-16-60", "tenth-16-60"])
    assert results["step-16-60"]["same"]["gradient"] < 5e-5 and results["tenth-16-60"]["middle"] > 0
