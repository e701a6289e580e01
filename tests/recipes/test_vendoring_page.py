# SPDX-License-Identifier: MIT
"""docs/vendoring.md keeps its word: its code runs, its tables are measured, its recipes are short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from check_peers import PEERS

import adagrpo_core as core

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vendoring.md").read_text()
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.py"))

# -- which tie rule for which reward ---------------------------------------------------------------------------------

K, M, PROMPTS = 16, 1, 20_000
LEVELS = np.arange(4.0)
REWARDS = {  # of the truth, of the rollouts, of the negatives
    "real numbers, a ranker that knows": (
        lambda rng: rng.normal(2, 1, PROMPTS),
        lambda rng: rng.normal(0, 1, (PROMPTS, K)),
        lambda rng: rng.normal(-3, 1, (PROMPTS, M)),
    ),
    "real numbers, a ranker that knows nothing": (
        lambda rng: rng.normal(0, 1, PROMPTS),
        lambda rng: rng.normal(0, 1, (PROMPTS, K)),
        lambda rng: rng.normal(0, 1, (PROMPTS, M)),
    ),
    "the same knowing ranker, 3 in 10 rollouts at a floor": (
        lambda rng: rng.normal(2, 1, PROMPTS),
        lambda rng: np.where(rng.random((PROMPTS, K)) < 0.3, -9.0, rng.normal(0, 1, (PROMPTS, K))),
        lambda rng: np.where(rng.random((PROMPTS, M)) < 0.3, -9.0, rng.normal(-3, 1, (PROMPTS, M))),
    ),
    "levels matched, 0 to 3": (
        lambda rng: np.full(PROMPTS, 3.0),
        lambda rng: rng.choice(LEVELS, (PROMPTS, K), p=[0.4, 0.3, 0.2, 0.1]),
        lambda rng: rng.choice(LEVELS, (PROMPTS, M), p=[0.9, 0.1, 0.0, 0.0]),
    ),
    "0/1, exact match": (
        lambda rng: np.ones(PROMPTS),
        lambda rng: (rng.random((PROMPTS, K)) < 0.1) * 1.0,
        lambda rng: np.zeros((PROMPTS, M)),
    ),
}


def share(reward, ties):
    truth, rollouts, negatives = REWARDS[reward]
    rng = np.random.default_rng(0)
    return core.reliability(truth(rng), rollouts(rng), negatives(rng), ties=ties).mean()


@pytest.mark.parametrize("reward", REWARDS)
def test_the_table_of_tie_rules_is_measured(reward):
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {reward} |"))
    found = [share(reward, ties) for ties in ("min", "average", "max")]
    assert re.findall(r"\d+ %", row) == [f"{each:.0%}".replace("%", " %") for each in found], found


# -- the page as a whole ---------------------------------------------------------------------------------------------


def test_the_versions_in_the_table_are_those_that_check_peers_knows():
    for peer in PEERS.values():
        if peer.package != "accelerate":
            assert re.search(rf"\| {peer.package} {re.escape(peer.tested)} \|", PAGE, flags=re.I), peer


def test_every_recipe_is_named_on_the_page_and_short():
    for recipe in RECIPES:
        assert f"recipes/{recipe.name}" in PAGE
        longest = 150 if recipe.name == "trl_sids.py" else 90  # which is a whole program, with data and evaluation
        assert len(recipe.read_text().splitlines()) <= longest
    for name in re.findall(r"\]\(((?:recipes/|\.\./)[^)#]+)\)", PAGE):
        assert (ROOT / "docs" / name).exists(), name


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, flags=re.S))
def test_the_code_on_the_page_runs(block):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", block], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
