# SPDX-License-Identifier: MIT
"""docs/faq.md: the shares that it reads from a run, the KL penalty as a change of the script, and its numbers."""

import contextlib
import inspect
import io
import itertools
import json
import re
import sys
import types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_page import TINY, small_toy

import adagrpo_core as core
import nanoadagrpo as nano

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "nanoadagrpo.py").read_text(encoding="utf-8")
(DIFF,), (SHARES,) = (re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, flags=re.M | re.S) for kind in ("diff", "py"))
FLAGS = [*TINY, "--toy", "--batch-size", "8", "--rl-steps", "4", "--lr", "1e-2"]


def patched(source, diff):
    """Apply the hunks of a page: old lines, which are there once, become new ones."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        lines = [(line[0], line[1:]) for line in hunk.splitlines()]
        old, new = ("".join(text + "\n" for sign, text in lines if sign in signs) for signs in (" -", " +"))
        assert source.count(old) == 1, f"follow the script, where this is no more: {old}"
        source = source.replace(old, new)
    return source


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Metrics and final weights of a few steps of a script, by the name of its folder."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(script, out, methods="grpo+nll"):
        monkeypatch.setattr(script, "toy_world", lambda cfg: small_toy(cfg))
        script.main([*FLAGS, "--method", methods, "--out", out])
        rows = map(json.loads, (tmp_path / out / "metrics.jsonl").read_text().splitlines())
        return [row for row in rows if row["phase"] == "rl"]

    yield run
    torch.set_num_threads(threads)


def variant(source, monkeypatch):
    module = types.ModuleType("variant")
    module.__file__ = nano.__file__
    monkeypatch.setitem(sys.modules, "variant", module)
    exec(compile(source, "variant.py", "exec"), module.__dict__)
    return module


def test_the_lines_for_a_kl_penalty_add_one(run, monkeypatch):
    with_penalty = patched(SOURCE, DIFF)
    assert with_penalty.count("beta=0.04") == 1
    none, small, large = (variant(with_penalty.replace("beta=0.04", f"beta={beta}"), monkeypatch)
                          for beta in ("0.0", "0.04", "50.0"))
    plain = run(nano, "plain")
    assert [row["grpo"] for row in run(none, "none")] == [row["grpo"] for row in plain], "weight 0 is no penalty"
    for name, script in {"small": small, "large": large}.items():
        rows = run(script, name)
        assert rows[0]["admitted"] > 0 and abs(rows[0]["grpo"] - plain[0]["grpo"]) < 1e-4, "0 at the reference"
        assert all(abs(row["ratio"] - 1) < 1e-4 for row in rows)
        assert rows[-1]["grpo"] > plain[-1]["grpo"] + 1e-6, "positive elsewhere"


def test_the_penalty_is_the_estimator_of_the_page():
    """The estimator is exp(d) - d - 1, as the page says."""
    d = np.linspace(-2, 2, 9)
    logp, old, zero = np.zeros((1, 9, 1)), np.zeros((1, 9, 1)), np.zeros((1, 9))
    found = core.grpo_loss(logp, old, zero, ref_token_logp=d[None, :, None], beta=1.0)
    assert np.allclose(found, (np.exp(d) - d - 1).mean())


def test_the_shares_are_read_from_a_run(run, tmp_path):
    """Of a run with other methods, those of AdaGRPO."""
    rows = [row for row in run(nano, "mine", "grpo,adagrpo") if row["method"] == "adagrpo"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(SHARES.replace("RUN", "mine"), {})
    says = dict(line.split() for line in printed.getvalue().splitlines())
    assert float(says["admitted"]) == round(np.mean([row["admitted"] for row in rows]), 3)
    assert list(says)[:5] == ["admitted", "invalid_rollouts", "not_suppressed", "not_prominent", "easy"]
    assert not set(says) - rows[0].keys()


@pytest.mark.parametrize("K, rho, most", [(16, 0.3, 6), (32, 0.1, 5)])
def test_the_most_invalid_rollouts_with_which_the_gate_opens_are_those_of_the_page(K, rho, most):
    assert f"at most {most} of {K}" in " ".join(PAGE.split())
    rewards = np.where(np.arange(K) < np.arange(K + 1)[:, None], 0.0, np.linspace(1, 2, K))  # row n: n are invalid
    truth, negative = np.full(K + 1, 3.0), np.full((K + 1, 1), 0.5)
    assert core.reliability(truth, rewards, negative, tau=1 / 3, rho=rho).sum() - 1 == most


def test_the_constraint_leaves_ratio_and_likelihoods_and_ends_hallucination(run, monkeypatch):
    monkeypatch.setitem(globals(), "FLAGS", [*FLAGS, "--constrained"])
    rows = run(nano, "mine")
    assert all(row["invalid_rollouts"] == 0 and abs(row["ratio"] - 1) < 1e-4 for row in rows)
    tested = [json.loads(line) for line in Path("mine/metrics.jsonl").read_text().splitlines()]
    assert all(row["hallucination"] == row["sampled_hallucination"] == 0 for row in tested if "hallucination" in row)


# -- what the page says about gate, gradient, difficulty and defaults --------------------------------------------------


def cells(text):
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def number(text):
    return float(Fraction(text))


def test_the_defaults_that_faq_and_readme_show_are_those_of_core_and_script():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    theirs = {name: x.default for name, x in inspect.signature(core.adagrpo_loss).parameters.items()}
    [block] = re.findall(r"<!-- defaults:.*?-->\n(.*?)<!-- /defaults -->", PAGE, flags=re.S)
    page, symbols = cells(block), dict(zip("τρλε", ("tau", "rho", "lam", "epsilon"), strict=True)) | {"ties": "ties"}
    assert [row[0] for row in page] == ["τ", "ρ", "M", "K", "λ", "ε", "ties"]
    [small] = re.findall(r"^\| \| paper \| core \| script \|\n.*?(?=\n\n)", readme, flags=re.M | re.S)
    for symbol, core_says, script_says, flag in page:
        ours = getattr(nano.Settings, flag.strip("`-").replace("-", "_"))
        if symbol == "ties":
            assert (core_says, script_says) == (theirs["ties"], ours)
        else:
            assert number(script_says) == ours
            assert symbol not in symbols or number(core_says) == theirs[symbols[symbol]]
    names = {row[-1].strip("`"): row[0] for row in page}
    for symbol, paper, core_says, script_says in cells(small):
        flag = next(flag for flag, x in names.items() if x == symbol)
        assert number(script_says) == getattr(nano.Settings, flag.strip("-").replace("-", "_"))
        if symbol in symbols:
            assert number(core_says) == theirs[symbols[symbol]]
            assert symbol == "λ" or number(paper) == number(core_says)
    assert {row[0] for row in cells(small)} == set("τρMKλ")


def test_many_negatives_with_a_small_rho_shut_the_gate_of_a_good_ranker_too():
    """Of 25 places a negative needs one of the last 11, and all eight of them must have one."""
    assert "M 8, rho 0.1: R = 1 on  0.0% by chance" in PAGE
    g, n = np.random.default_rng(3), 20_000
    truth, rollouts, negatives = (g.standard_normal((n, k)) for k in (1, 16, 8))
    shares = [core.reliability(truth[:, 0] + 1.5, rollouts, negatives[:, :M] - 1.5, rho=rho).mean()
              for M, rho in ((1, 0.3), (1, 0.1), (4, 0.1), (8, 0.1))]
    says = [int(share) / 100 for share in re.findall(r"on (\d+)% with the good ranker", PAGE)[:4]]
    assert np.allclose(shares, says, atol=0.02) and shares == sorted(shares, reverse=True)


def every_group(p, K):
    """All groups of K rollouts of a policy with probabilities p, and how likely each is."""
    groups = np.array(list(itertools.product(range(len(p)), repeat=K)))
    return groups, p[groups].prod(1)


def test_a_step_too_small_to_change_a_rank_does_not_change_c_nor_add_to_the_gradient():
    """The gradient by finite differences, with c computed anew each time, is that with c held constant."""
    z, rollouts = torch.tensor([0.1, 0.9, 0.4, -0.3]).double().requires_grad_(), torch.tensor([[1, 2, 1]])
    rewards, best, worst = (torch.tensor(x).double() for x in ([[0.2, 0.6, 0.2]], [0.9], [[0.1]]))
    logp, sampled = z.log_softmax(-1), z.detach().log_softmax(-1)[rollouts][..., None]
    out = core.adagrpo_loss(logp[None, :1], logp[rollouts][..., None], sampled, rewards, best, worst, rho=0.3, lam=2.0)
    assert out.clip.tolist() == [True]
    [gradient] = torch.autograd.grad(out.loss.sum(), z)
    A, finite = core.group_advantages(rewards), []

    def given(z):  # the same with c computed inside, under a policy that has moved a little from the one that sampled
        logp = z.log_softmax(-1)
        c = core.sample_clip(core.difficulty(logp[:1], logp[rollouts]), core.reliability(best, rewards, worst, rho=0.3))
        return (-logp[0] + 2.0 * c.double() * core.grpo_loss(logp[rollouts][..., None], sampled, A)).sum()

    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = 1e-6
        finite.append(((given(z + step) - given(z - step)) / 2e-6).item())
    assert np.allclose(gradient.numpy(), finite, atol=1e-6)


def test_the_mean_of_c_times_the_gradient_is_not_the_mean_of_c_times_that_of_the_gradient():
    """Exactly, over all groups of three rollouts of four items: c and the gradient are of the same rollouts."""
    p, reward, K = np.array([0.2, 0.4, 0.3, 0.1]), np.array([0.9, 0.5, 0.2, 0.7]), 3
    groups, weight = every_group(p, K)
    assert np.isclose(weight.sum(), 1)
    n = len(groups)
    rewards, truth, negative = reward[groups], np.full(n, reward[0]), np.full((n, 1), 0.1)
    c = core.sample_clip(core.difficulty(np.full(n, np.log(p[0])), np.log(p)[groups]),
                         core.reliability(truth, rewards, negative, rho=0.3))
    A = core.group_advantages(rewards)
    g = (A[..., None] * (np.eye(4)[groups] - p)).mean(1)  # of the sampled rollouts' log-probabilities, by the logits
    assert 0 < weight @ c < 1
    joint, apart = weight @ (c[:, None] * g), (weight @ c) * (weight @ g)
    assert joint[3] / apart[3] > 1.1, "one item is pushed a tenth more than a weight of the mean of c would push it"


def test_the_share_of_groups_without_the_truth_is_that_of_the_page():
    assert ".99^16 = 85 %" in PAGE and round(0.99**16, 2) == 0.85


def test_a_factor_of_the_whole_loss_is_seen_by_eps_and_by_the_norm_clip_alone():
    """Gradients below norm 1, and the same halved, move a weight alike; above norm 1 the clip takes the factor too."""

    def trained(scale, factors):
        module = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.constant_(module.weight, 0.5)
        optimizer = nano.Optimizer(module, 1e-2, len(factors))
        for i, factor in enumerate(factors):
            (module(torch.tensor([0.1, 0.2, 0.3]) * (i + 1)) * factor * scale).sum().backward()
            optimizer.step("here")
        return module.weight.detach()

    assert torch.allclose(trained(1.0, [0.1, -0.2, 0.3]), trained(0.5, [0.1, -0.2, 0.3]), atol=1e-6)
    assert torch.allclose(trained(1.0, [50, 50, 50]), trained(9.0, [50, 50, 50]), atol=1e-6)
    assert not torch.allclose(trained(1.0, [0.1, -90, 0.3]), trained(9.0, [0.1, -90, 0.3]), atol=1e-4)


@pytest.mark.parametrize("constrained", [False, True])
def test_the_history_is_not_masked_in_evaluation(constrained):
    cfg = nano.Settings(toy=True, device="cpu", constrained=constrained, beam_width=100)
    catalogue = nano.Catalogue([(a, b) for a in range(3) for b in range(2)])
    history = torch.tensor([[0, 1], [2, 5]])
    prompts = nano.Prompts(history, torch.tensor([3, 4]), torch.arange(2))
    policy, ranker = nano.tiny_policy(catalogue, cfg), nano.Ranker(catalogue)
    beams = nano.evaluate(policy, ranker, prompts, cfg)[1]["item"].long()
    assert all(set(past.tolist()) <= set(found.tolist()) for past, found in zip(history, beams, strict=True))
