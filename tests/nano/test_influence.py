# SPDX-License-Identifier: MIT
"""The paper's Section 4: influence of the ranker, against a version in plain loops; and what is said about it."""

import dataclasses
import json
import math

import pytest
import torch

import nanoadagrpo as nano

from .helpers import DEVICE, QUICK, make_policy, settings
from .shops import jsonl
from .test_step import CATALOGUE, PROMPTS, cfg, reward, train


class Judge:
    def probabilities(self, history, item):
        return {"click": (item >= 0).float()}


@pytest.fixture(scope="module")
def scene():
    """A policy, the settings and the beams of its prompts: some are no items, and some hold the truth."""
    policy, c = make_policy(CATALOGUE, "gpt2", spread=0.1), cfg(beam_width=12, eval_batch_size=5)
    nano.train_sft(policy, PROMPTS, settings(sft_steps=8, sft_batch_size=8, sft_lr=1e-2), lambda **row: None)
    each = nano.evaluate(policy, Judge(), PROMPTS, c)[1]
    found = (each["item"] == PROMPTS.target[:, None]).any(1)
    assert (each["item"] < 0).any() and found.any() and not found.all()
    return policy, c, each


def rank(x, pool, ties):
    larger, equal = sum(y > x for y in pool), sum(y == x for y in pool)
    return {"min": larger + 1, "max": larger + equal, "average": larger + (equal + 1) / 2}[ties]


def slowly(policy, reward, prompts, each, c):
    """Prompt by prompt and beam by beam; only the dice are shared."""
    (n, W), M, draw = each["item"].shape, c.negatives, nano.make_generator(c.seed, "influence")
    rows, fires = {"ranker": [], "chance": []}, {}
    for start in range(0, n, c.eval_batch_size):
        size = min(c.eval_batch_size, n - start)
        for b, u in enumerate(torch.rand(size, W + 1 + 3 * M, generator=draw), start):
            beams, truth, negatives = each["item"][b].tolist(), prompts.target[b].item(), []
            for m in range(M):
                other = (b + 1 + int(u[m] * (n - 1))) % n
                assert other != b
                negatives.append(each["item"][other, int(u[M + m] * W)].item())
            pool = [*beams, truth, *negatives]
            dice = {}
            for item, x in zip(pool, u[2 * M :].tolist(), strict=True):
                dice.setdefault(item, x if item >= 0 else -1.0)
            logp = nano.prefill(policy, prompts.history[[b]], prompts.target[[b]]).target_logp[0].mean().item()
            likely = [logp if item == truth else x for item, x in zip(beams, each["logp"][b].tolist(), strict=True)]
            llm_rank = rank(logp, [*likely, logp], "min")
            scores = reward(prompts.history[b : b + 1], torch.tensor([pool]))[0].tolist()
            for who, x in (("ranker", scores), ("chance", [dice[item] for item in pool])):
                reliable = rank(x[W], x, c.ties) <= c.tau * W and all(
                    rank(negative, x, c.ties) > (1 - c.rho) * W for negative in x[W + 1 :])
                rm_rank = rank(x[W], x[: W + 1], c.ties)
                rows[who].append((llm_rank, rm_rank, llm_rank > c.tau * W, reliable))
    found = dict(prompts=n, beams=W)
    for who, mine in rows.items():
        fires[who] = [row[3] for row in mine]
        found[f"{who}/reliable"] = sum(fires[who]) / n
        parts = {"overall": mine, "hard": [row for row in mine if row[2]],
                 "discriminable": [row for row in mine if row[2] and row[3]]}
        for name, part in parts.items():
            found[f"{who}/{name}/coverage"] = len(part) / n
            if part:
                llm, rm = (sum(row[i] for row in part) / len(part) for i in (0, 1))
                numbers = dict(llm_rank=llm, rm_rank=rm, influence=llm - rm)
                found |= {f"{who}/{name}/{key}": x for key, x in numbers.items()}
    return found


def plain(row):
    return {key: float(x) for key, x in row.items()}


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(negatives=1, tau=1 / 3, rho=0.3, seed=3), dict(ties="max", seed=4),
                                     dict(ties="average", eval_batch_size=14)], ids=str)
def test_influence_is_what_plain_loops_say(scene, changes):
    policy, c, each = scene
    c = dataclasses.replace(c, **changes)
    row = plain(nano.ranker_influence(policy, reward, PROMPTS, each, c))
    assert row == pytest.approx(slowly(policy, reward, PROMPTS, each, c), abs=1e-5)
    assert row.keys() == slowly(policy, reward, PROMPTS, each, c).keys()
    assert 0 < row["ranker/overall/coverage"] == row["chance/overall/coverage"] == 1
    assert row["ranker/hard/coverage"] == row["chance/hard/coverage"] > 0, "whether it is hard is the policy's affair"


@torch.no_grad()
def test_a_reward_of_several_parts_is_their_sum(scene):
    policy, c, each = scene
    whole = nano.ranker_influence(policy, reward, PROMPTS, each, c)
    parts = nano.ranker_influence(policy, lambda *given: {"a": reward(*given) * 0.25, "b": reward(*given) * 0.75},
                                  PROMPTS, each, c)
    assert plain(parts) == pytest.approx(plain(whole))


@torch.no_grad()
def test_a_ranker_that_knows_the_truth_fires_everywhere_and_lifts_it_to_the_top(scene):
    policy, c, each = scene
    pairs = [*zip(map(tuple, PROMPTS.history.tolist()), PROMPTS.target.tolist(), strict=True)]
    rows = [i for i, (past, _) in enumerate(pairs) if past not in dict(pairs[:i])]  # each history once
    prompts, each, answer = PROMPTS.rows(rows), {key: x[rows] for key, x in each.items()}, dict(pairs[i] for i in rows)

    def oracle(history, item):
        truth = torch.tensor([answer[tuple(past)] for past in history.tolist()])
        return (item == truth[:, None]).float() - 0.01 * item  # else an opinion, or all others would tie

    c = dataclasses.replace(c, negatives=1, tau=1 / 6, rho=0.99)
    row = plain(nano.ranker_influence(policy, oracle, prompts, each, c))
    assert row["ranker/overall/rm_rank"] == row["ranker/reliable"] == 1 > row["chance/reliable"]
    assert row["ranker/overall/influence"] == pytest.approx(row["ranker/overall/llm_rank"] - 1)


@torch.no_grad()
def test_strata_that_are_empty_are_left_out_and_blank_in_the_table(scene):
    policy, c, each = scene
    constant = nano.ranker_influence(policy, lambda history, item: torch.ones(item.shape), PROMPTS, each, c)
    assert constant["ranker/reliable"] == constant["ranker/discriminable/coverage"] == 0
    assert not [key for key in constant if key.startswith("ranker/discriminable/") and "coverage" not in key]
    easy = nano.ranker_influence(policy, reward, PROMPTS, each | {"logp": each["logp"] - 100}, c)
    assert {key for key in easy if "/hard/" in key} == {"ranker/hard/coverage", "chance/hard/coverage"}
    assert all(math.isfinite(x) for row in (constant, easy) for x in plain(row).values())
    cells = [line.strip("| ").split("|") for line in nano.influence_table(plain(easy)).splitlines() if line[0:1] == "|"]
    by_title = {row[0].strip(): [x.strip() for x in row[1:]] for row in cells[2:]}
    assert len(by_title) == 6
    for title, row in by_title.items():
        assert (row[:3] == ["", "", ""] and row[3] == "0.0%") == title.startswith("hard"), title
        assert all(row) != title.startswith("hard")


@torch.no_grad()
def test_with_too_few_prompts_beams_or_negatives_there_is_none(scene):
    policy, c, each = scene
    first = {key: x[:1] for key, x in each.items()}
    assert nano.ranker_influence(policy, reward, PROMPTS.rows(slice(0, 1)), first, c) == {}
    assert nano.ranker_influence(policy, reward, PROMPTS, each, dataclasses.replace(c, negatives=0, method="nll")) == {}
    few = {key: x[:, :2] if x.ndim > 1 else x for key, x in each.items()}
    assert nano.ranker_influence(policy, reward, PROMPTS, few, dataclasses.replace(c, tau=0.4)) == {}


@torch.no_grad()
def test_it_draws_from_dice_of_its_own_and_changes_nothing(scene):
    policy, c, each = scene
    before, state = {key: x.clone() for key, x in each.items()}, torch.random.get_rng_state()
    rows = [plain(nano.ranker_influence(policy, reward, PROMPTS, each, c)) for _ in range(2)]
    assert rows[0] == rows[1] and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(x, each[key]) for key, x in before.items())
    assert rows[0] != plain(nano.ranker_influence(policy, reward, PROMPTS, each, dataclasses.replace(c, seed=8)))


# -- what is said about it ---------------------------------------------------------------------------------------------


def said(R, chance, n):
    row = {"prompts": n, "beams": 50, "ranker/reliable": R, "chance/reliable": chance}
    text = nano.influence_table(row)
    assert text.startswith("## Influence of the ranker\n\n| ") and f"{n} prompts, 50 beams" in text
    return text.splitlines()[-1]


@pytest.mark.parametrize("R, chance, n, verdict", [
    (0.6, 0.1, 100, "6.0 times as often: the ranker separates."),
    (1.0, 0.5, 100, "2.0 times as often: the ranker separates."),
    (0.13, 0.1, 10_000, "1.3 times as often: the ranker separates."),
    (0.13, 0.1, 100, "no clear difference: expect nothing of the gate."),
    (0.5, 0.1, 4, "no clear difference: expect nothing of the gate."),
    (0.1, 0.1, 1000, "no clear difference: expect nothing of the gate."),
    (0.1, 0.6, 1000, "clearly less often: rewards that tie (--ties max), or a ranker that is wrong (docs/faq.md)."),
    (0.0, 0.1, 1000, "clearly less often: rewards that tie (--ties max), or a ranker that is wrong (docs/faq.md)."),
    (0.09, 0.1, 1000, "no clear difference: expect nothing of the gate."),
    (0.5, 0.0, 100, "on 0.0%; the ranker separates."),
    (0.0, 0.0, 1000, "the gate is shut for any ranker among these beams: docs/faq.md."),
])
def test_the_verdict_says_whether_the_ranker_is_clearly_above_chance(R, chance, n, verdict):
    text = said(R, chance, n)
    assert text.startswith(f"R fires on {R:.1%}, with a random ranker on {chance:.1%}; ") and text.endswith(verdict)
    clear = R - chance > 2 * math.sqrt((R * (1 - R) + chance * (1 - chance)) / n)  # docs/metrics.md
    assert ("separates" in text) == clear


def test_a_run_shows_it_on_the_screen_and_in_the_report_before_the_method_begins(folder, brief, capsys):
    jsonl(folder / "shop")
    given = ["--data", "shop", "--device", DEVICE, *QUICK, "--batch-size", "4"]
    nano.main([*given, "--out", "here"])
    rows = [json.loads(line) for line in (folder / "here" / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == [*["sft"] * 3, "influence", "test", "valid", "rl", "rl", "valid", "test"]
    text, out = nano.influence_table(rows[3]), capsys.readouterr().out
    assert text in out and (folder / "here" / "report.md").read_text().endswith(text + "\n")
    assert out.index(text) < out.index("| method")
    nano.main([*given, "--method", "nll", "--negatives", "0", "--out", "nll"])
    assert "Influence" not in (folder / "nll" / "report.md").read_text() + capsys.readouterr().out


# -- ties --------------------------------------------------------------------------------------------------------------


def test_with_a_reward_of_0_and_1_max_opens_the_gate_that_min_keeps_shut():
    right = {}
    for past, target in zip(PROMPTS.history.tolist(), PROMPTS.target.tolist(), strict=True):
        right.setdefault(tuple(past), set()).add(target)

    def one_if_right(history, item):
        return torch.tensor([[float(x in right[tuple(past)]) for x in row]
                             for past, row in zip(history.tolist(), item.tolist(), strict=True)])

    shares = {}
    for ties in ("min", "average", "max"):
        policy = make_policy(CATALOGUE, "gpt2", spread=0.1)  # which is seldom right
        _, rows = train("adagrpo", cfg(ties=ties, rho=0.3, negatives=1, lr=0.0), reward=one_if_right, policy=policy)
        shares[ties] = [sum(float(row[key]) for row in rows) / len(rows) for key in ("reliable", "admitted")]
    assert shares["min"] == [0, 0]
    assert shares["max"][0] > 0.8 and shares["max"][1] > 0.5
    assert shares["min"][0] <= shares["average"][0] <= shares["max"][0]
