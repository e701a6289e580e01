# SPDX-License-Identifier: MIT
"""docs/vendoring.md keeps its word: its code runs, its tables are measured, its recipes are short."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from check_peers import OPTIONS, PEERS
from transformers import LlamaConfig, LlamaForCausalLM

import adagrpo_core as core
import nanoadagrpo as nano

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


def test_the_tests_of_peers_are_found_without_the_plugins_that_the_project_asks_for():
    """An environment of check_peers has pytest alone."""
    options = ["-p", "no:xdist", *OPTIONS, "--collect-only"]
    command = [sys.executable, "-m", "pytest", *options, "tests/recipes/test_trl.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "test_the_recipe_learns" in done.stdout, done.stdout + done.stderr


def test_every_recipe_is_named_on_the_page_and_short():
    for recipe in RECIPES:
        assert f"recipes/{recipe.name}" in PAGE
        longest = 155 if recipe.name == "trl_sids.py" else 100  # which is a whole program, with data and evaluation
        assert len(recipe.read_text().splitlines()) <= longest
    for name in re.findall(r"\]\(((?:recipes/|\.\./)[^)#]+)\)", PAGE):
        assert (ROOT / "docs" / name).exists(), name


# -- the code on the page --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=range(3))
def page(request):
    """The names that the blocks leave behind, played one after the other."""
    torch.manual_seed(request.param)
    names = {"printed": io.StringIO()}
    with contextlib.redirect_stdout(names["printed"]):
        for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
            before = dict(names)
            exec(compile(block, "page", "exec"), names)
            names.setdefault("after", {})[len(names.get("after", {}))] = dict(names) | {"before": before}
    return names


def test_the_first_block_trains_and_its_ratio_is_one(page):
    first = page["after"][0]
    assert page["printed"].getvalue().startswith("ratio 1.00000  NLL ")
    assert first["policy"].grad.abs().max() > 0 and first["ratio"].item() == pytest.approx(1, abs=1e-5)
    assert first["out"].loss.shape == (4,) and first["rewards"].dtype == torch.float32


def test_its_negatives_are_other_prompts_rollouts_under_this_prompt_and_not_rewards_of_rows(page):
    first = page["after"][0]
    K, rows = first["K"], first["rows"]
    for b, each in enumerate(rows.tolist()):
        for m, row in enumerate(each):
            assert row // K != b
            under = first["score"](torch.tensor([b]), first["rollouts"][row][None])
            assert first["negative_rewards"][b, m] == under[0]
    assert (first["rewards"][rows] != first["negative_rewards"]).any()


def test_rollouts_of_the_same_user_are_no_negatives(page):
    second = page["after"][1]
    users = second["user"].repeat_interleave(second["K"])[second["rows"]]
    assert (users != second["user"][:, None]).all()


def test_what_the_core_returns_is_what_the_script_logs(page):
    last = page["after"][2]
    K, rollouts, cfg = last["K"], last["rollouts"], nano.Settings(toy=True, device="cpu", rho=0.3)
    out, logged = last["out"], last["logged"]
    says = nano.diagnostics(out.difficult, out.reliable, out.clip, last["r"], last["target_reward"],
                            core.group(rollouts, K), torch.zeros(len(out.clip), K), cfg)  # fmt: skip
    known = {name: value.item() for name, value in says.items()}
    assert {"invalid_rollouts", "duplicate_rollouts"} == known.keys() - logged.keys()
    assert {"nll", "grpo", "ratio"} == logged.keys() - known.keys()
    for name in known.keys() & logged.keys():
        assert logged[name] == pytest.approx(known[name]), name
    assert logged["ratio"] == pytest.approx(1, abs=1e-5) or not out.clip.any()


# -- the sizes on the page -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_tokens_in_another_batch_differ_by_less_than_tol(dtype, scale):
    """Seven more columns of padding. The page gives the size, and advises a tol of 1e-4, or 1e-2 in bfloat16."""
    worst = []
    for seed in range(8):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                             num_attention_heads=4, initializer_range=0.02 * scale)  # fmt: skip
        model = LlamaForCausalLM(config).eval().to(dtype)
        ids = torch.randint(300, (4, 34))
        found = []
        for padding in (0, 7):
            mask = F.pad(torch.ones_like(ids), (padding, 0))
            with torch.no_grad():
                logits = model(input_ids=F.pad(ids, (padding, 0)), attention_mask=mask,
                               position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -5:-1]  # fmt: skip
            logp = logits.float().log_softmax(-1).gather(-1, ids[:, -4:, None])[..., 0]
            found.append(core.length_normalized(logp))
        worst.append((found[0] - found[1]).abs().max().item())
    print(f"{dtype}, weights x {scale}: {max(worst):.1e} nats per token, median {np.median(worst):.1e}")
    if dtype == torch.float32:
        assert max(worst) < 1e-5
    else:  # more than the tol of float32, so that it has to be larger; sharp weights may reach it
        assert 1e-4 < max(worst) < (1e-2 if scale == 1 else 5e-2)


@pytest.mark.parametrize("given", ["per token", "mean", "none"])
def test_with_the_pages_tol_copies_of_the_truth_that_are_rounded_otherwise_make_no_prompt_difficult(given):
    """Log-probabilities kept in bfloat16, as the page advises against, below 4 nats: a step is .016 at most."""
    rng, N, K, L = np.random.default_rng(0), 400, 8, 4
    truth = rng.uniform(-3.9, -2.1, (N, L))
    rollouts = truth[:, None] + rng.uniform(-0.003, 0.003, (N, K, L))
    truth, rollouts = (torch.tensor(x, dtype=torch.bfloat16) for x in (truth, rollouts))
    pools = torch.rand(N, K), torch.full((N,), 2.0), torch.full((N, 1), -1.0)
    old = {"per token": truth, "mean": core.length_normalized(truth.float()), "none": None}[given]

    def difficult(tol):
        out = core.adagrpo_loss(truth, rollouts, rollouts, *pools, target_old_logp=old, tol=tol)
        return out.difficult.float().mean().item()

    assert difficult(0.0) > 0.2 and difficult(0.017) == 0


def test_with_padding_the_gate_is_that_without_it_but_not_where_the_truths_mean_is_over_padding():
    rng, N, K, L = np.random.default_rng(0), 500, 16, 10

    def padded(*shape):
        mask = np.arange(L) < rng.integers(2, 7, (*shape, 1))
        return np.where(mask, -3 * rng.random((*shape, L)), 0.0), mask

    (truth, target_mask), (rollouts, mask) = padded(N), padded(N, K)
    pools = rng.normal(size=(N, K)), np.full(N, 9.0), np.full((N, 1), -9.0)
    means = [np.asarray([x[i][m[i]].mean() for i in np.ndindex(m.shape[:-1])]).reshape(m.shape[:-1])
             for x, m in ((truth, target_mask), (rollouts, mask))]  # fmt: skip
    expected = core.difficulty(*means)
    for old, right in ((truth, True), (core.length_normalized(truth, target_mask), True), (truth.mean(-1), False)):
        out = core.adagrpo_loss(truth, rollouts, rollouts, *pools, target_mask, mask, target_old_logp=old)
        assert (out.difficult == expected).all() == right
    assert out.difficult.mean() < 0.1 < 0.6 < expected.mean()  # a mean over padding: the gate is all but shut


def test_rewards_of_rows_would_all_but_shut_the_gate():
    truth, rollouts, negatives = REWARDS["real numbers, a ranker that knows"]
    rng = np.random.default_rng(0)
    target, r, right = truth(rng), rollouts(rng), negatives(rng)
    others = (np.arange(PROMPTS) * K + K + rng.integers(0, (PROMPTS - 1) * K, PROMPTS)) % (PROMPTS * K)
    wrong = r.reshape(-1)[others][:, None]  # the reward of another prompt's rollout under that prompt
    found = [core.reliability(target, r, each).mean() for each in (right, wrong)]
    assert "from {:.0%} to {:.0%}".format(*found).replace("%", " %") in " ".join(PAGE.split()), found


def test_the_table_of_small_groups_is_computed():
    rows = re.findall(r"^\| (\d+) \| first (\d+) of (\d+) \| (.*) \|$", PAGE, flags=re.M)
    assert [int(row[0]) for row in rows] == [3, 4, 8, 16, 32]
    for n, top, pool, cells in rows:
        n, rng = int(n), np.random.default_rng(0)
        target, r, negative = rng.random(40_000), rng.random((40_000, n)), rng.random((40_000, 1))
        ranks = core.reward_ranks(target, r, negative)
        assert int(pool) == n + 2 and int(top) == max(place for place in range(1, n + 3) if place <= n / 3)
        for rho, cell in zip((0.1, 0.3, 0.5), cells.split(" | "), strict=True):
            places, floor, chance = map(int, re.fullmatch(r"last (\d+), (\d+), (\d+) %", cell).groups())
            R = core.reliability(target, r, negative, rho=rho)
            expected = (ranks.target <= int(top)) & (ranks.negatives[:, 0] > n + 2 - places)
            assert (expected == R).all()
            assert abs(R.mean() - chance / 100) < 0.005 + 4 * (chance / 100 / 40_000) ** 0.5
            for below, opens in ((floor, True), (floor + 1, False)):
                floored = np.where(np.arange(n) < below, 0.0, np.linspace(1, 2, n))[None]
                R = core.reliability(np.array([3.0]), floored, np.array([[0.5]]), rho=rho)[0]
                assert below > n or opens == R
