# SPDX-License-Identifier: MIT
"""docs/faq.md: the shares that it reads from a run, and the KL penalty as a change of the script."""

import contextlib
import io
import json
import re
import sys
import types
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

    def run(script, out):
        monkeypatch.setattr(script, "toy_world", lambda cfg: small_toy(cfg))
        script.main([*FLAGS, "--method", "grpo+nll", "--out", out])
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
    rows = run(nano, "mine")
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
