# SPDX-License-Identifier: MIT
"""What is measured on one seed."""

import dataclasses
import math
from types import SimpleNamespace

import measure
import numpy as np
import pytest
import run
import scipy.stats
import torch

import nanoadagrpo as nano


def arm_of(setup, name, **changes):
    return run.dose(setup.cfg, {}, "equal", name, setup.cfg.bait)._replace(**changes)


def weights(setup):
    return {name: value.clone() for name, value in setup.policy.model.state_dict().items()}


# -- Tables 1 to 3 -----------------------------------------------------------------------------------------------------


def test_influence_on_two_prompts_worked_by_hand(monkeypatch):
    """W = 4, tau = rho = 1/2: hard beyond place 2, negatives below place 2."""
    catalogue = nano.Catalogue([(i,) for i in range(6)])
    reward = torch.tensor([[0.1, 0.2, 0.9, 0.3, 0.0, 0.05], [0.0, 0.5, 0.0, 0.0, 0.6, 0.1]])
    beams = torch.tensor([[0, 1, 2, 3], [4, 5, 4, 5]])
    beam_logp = torch.tensor([[-1.0, -2, -3, -4], [-1.0, -2, -3, -4]]).unsqueeze(-1)
    # The truth, scored alone. The first is among the beams, at -3: that this pass is off by rounding must not
    # cost it a place. The second is not.
    target_logp = torch.tensor([[-3.0001], [-5.0]])
    monkeypatch.setattr(nano, "prefill", lambda *_: nano.PromptCache([], None, None, target_logp))
    monkeypatch.setattr(nano, "tree_decode", lambda policy, prompt, select: (beams.unsqueeze(-1), beam_logp))
    monkeypatch.setattr(nano, "make_reward", lambda ranker, cfg: lambda history, item: reward.gather(1, item))
    # True utility falls with the item's number; both contexts are alike.
    truth = measure.Truth(np.zeros((2, 6)), -np.arange(6.0), np.zeros((6, 6)), np.zeros(6, int), np.array([False]), 1.0)
    cfg = nano.Settings(tau=0.5, rho=0.5)
    setup = SimpleNamespace(cfg=cfg, data=SimpleNamespace(catalogue=catalogue), ranker=None, truth=truth, policy=None)
    prompts = nano.Prompts(torch.zeros(2, 1, dtype=torch.long), torch.tensor([2, 1]), torch.tensor([0, 1]))
    rows = measure.influence_rows(setup, prompts, 4)

    assert rows["llm"].tolist() == [3, 5]  # inserted, the second comes after all four beams
    assert rows["ranker rank"].tolist() == [1, 3]  # .9 beats all; .5 stands behind .6 and .6
    assert rows["hard"].tolist() == [True, True]
    assert rows["ranker clear"].tolist() == [True, False]
    # Without the truth: rewards .1, .2, .3 rise while utilities fall. Ties in the second: 4, 5, 4, 5 at .6, .1, .6, .1.
    assert rows["ranker spearman"].tolist() == pytest.approx([-1.0, 1.0])
    tables = measure.influence_tables(rows)["ranker"]
    expected = {"overall": (4, 2, 2, 1), "hard": (4, 2, 2, 1), "discriminable": (3, 1, 2, 0.5)}
    for stratum, (llm, rm, moved, coverage) in expected.items():
        found = tables[stratum]
        assert [found[key] for key in ("llm_rank", "rm_rank", "influence", "coverage")] == [llm, rm, moved, coverage]
    assert tables["overall"]["spearman"] == pytest.approx(0)
    assert tables["discriminable"]["spearman"] == pytest.approx(-1)
    assert tables["misled"]["coverage"] == 0 and math.isnan(tables["misled"]["spearman"])


def test_a_random_ranker_has_no_correlation_with_utility(setup):
    everyone = setup.data.test
    rows = measure.influence_rows(setup, everyone, 50)
    assert len(rows["llm"]) == len(everyone.target) // 100 * 100
    assert abs(np.nanmean(rows["random spearman"])) < 0.1  # about .03 is its standard error
    assert ((rows["random rank"] >= 1) & (rows["random rank"] <= 51)).all()


def test_rank_correlation_is_scipys():
    g = np.random.default_rng(0)
    x, y, where = g.integers(0, 5, (20, 9)), g.random((20, 9)), g.random((20, 9)) < 0.8
    expected = [scipy.stats.spearmanr(a[w], b[w]).statistic for a, b, w in zip(x, y, where, strict=True)]
    assert measure.spearman(x, y, where) == pytest.approx(np.array(expected))
    no_spread = measure.spearman(np.ones((1, 4)), np.arange(4.0)[None], np.ones((1, 4), bool))
    too_few = measure.spearman(np.arange(4.0)[None], np.arange(4.0)[None], np.array([[True, True, False, False]]))
    assert np.isnan(no_spread).all() and np.isnan(too_few).all()


# -- what is served ----------------------------------------------------------------------------------------------------


def test_the_first_valid_beams_are_served():
    item = np.array([[-1, 7, -1, 8, 9], [-1, -1, 3, -1, -1]])
    assert measure.top(item, 2).tolist() == [[7, 8], [3, -1]]


def test_a_period_of_two_readers_worked_by_hand():
    """Three lists of two items; user 1 never comes. A click stays 30 log(1 + e^excess) seconds."""
    user = np.array([0, 2, 0])
    shown = np.array([[True, True], [True, False], [True, True]])
    excess = np.array([[0.0, 0.0], [-2.0, 0.0], [-2.0, 3.0]])
    category = np.array([[1, 2], [0, -1], [1, 1]])
    # p(click): .5, .5 | .119 | .119, .953
    points = np.array([[0.4, 0.6], [0.05, 0.0], [0.1, 0.9]])
    found = measure.engagement(user, shown, excess, category, points, users=3)
    stay = {x: 30 * math.log(1 + math.exp(x)) for x in (0.0, -2.0, 3.0)}  # 20.8, 3.8 and 91.5 seconds
    # User 0 clicks three of four: 20.8 and 91.5 s count as effective, 3.8 s does not. Categories 1 and 2, then 1.
    assert found[0].tolist() == pytest.approx([2, 0.75, stay[0.0] + stay[-2.0] + stay[3.0], 2, 1])
    assert np.isnan(found[1]).all()
    assert found[2].tolist() == pytest.approx([0, 1.0, stay[-2.0], 1, 1])  # the missing item was not shown


def test_utility_is_what_the_world_says(setup):
    world, part = setup.data.world, setup.test.rows(torch.arange(5))
    item = np.array([[0, 3], [1, 1], [2, -1], [4, 0], [5, 6]])
    found = setup.truth.utility(part, item)
    for b in range(5):
        user, last = int(part.user[b]), int(part.history[b, -1])
        every = world["taste"][user] + world["quality"] + world["context"][last]
        assert found[b] == pytest.approx([every[i] if i >= 0 else every.mean() for i in item[b]], abs=1e-5)


def test_the_true_utility_of_ten_valid_beams_and_hr_per_context(setup, monkeypatch):
    part = setup.test.rows(torch.arange(4))
    item = torch.stack([torch.randperm(setup.data.catalogue.N, generator=torch.Generator().manual_seed(b))[:14]
                        for b in range(4)])
    item[:, 1] = -1
    rank = torch.tensor([1, 10, 11, 10**9])
    monkeypatch.setattr(nano, "evaluate", lambda *_: ({}, {"item": item, "rank": rank}))
    metrics, served = measure.judge(setup, part)
    first = np.delete(item.numpy(), 1, axis=1)[:, :10]
    assert metrics["utility@10"] == pytest.approx(setup.truth.utility(part, first).mean(), abs=1e-5)
    misled, hit = setup.truth.misled(part), np.array([True, True, False, False])
    for name, group in (("clean", ~misled), ("misled", misled)):
        assert metrics[f"hr@10 {name}"] == pytest.approx(hit[group].mean() if group.any() else math.nan, nan_ok=True)
    assert served["rank"].tolist() == [1, 10, 11, 10**6]


def test_reranking_puts_beams_in_the_rankers_order(setup, monkeypatch):
    part = setup.test.rows(torch.arange(2))
    a, b = part.target.tolist()
    others = [i for i in range(setup.data.catalogue.N) if i not in (a, b)]
    item = np.array([[-1, others[0], a], [others[0], others[1], others[2]]])
    scores = torch.tensor([[5.0, 0.2, 0.7], [0.1, 0.2, 0.3]])  # a hallucination has no place, whatever its score
    monkeypatch.setattr(nano, "make_reward", lambda *_: lambda history, item: scores)
    found = measure.reranked(setup._replace(test=part), item)
    assert (found["hr@1"], found["hr@10"], found["hr@50"], found["ndcg@10"]) == (0.5, 0.5, 0.5, 0.5)


# -- the arms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nll", "adagrpo-d"])
def test_an_arm_is_the_scripts_own_training(setup, name):
    """Counting who is admitted, and looking at validation on the way, change nothing."""
    setup.policy.model.load_state_dict(setup.base)
    reward = nano.make_reward(setup.ranker, setup.cfg)
    nano.train_rl(setup.policy, reward, setup.data.rl, setup.cfg, name, lambda **row: None)
    alone = weights(setup)
    found, arrays = measure.run_arm(setup, arm_of(setup, name), "knob")
    assert all(torch.equal(alone[key], value) for key, value in weights(setup).items())
    assert not arrays and set(found) >= {"final", "admitted", "misled"} and "curve" not in found
    full, _ = measure.run_arm(setup, arm_of(setup, name), "full")
    assert full["final"] == pytest.approx(found["final"], nan_ok=True)
    assert list(nano.METHODS) == ["nll", "grpo", "grpo+nll", "adagrpo-d", "adagrpo-r", "adagrpo", "random-gate"]


def test_the_best_checkpoint_is_the_policy_of_its_step(setup, monkeypatch):
    """A policy whose validation says that step 1 of 2 was best is tested as it was at step 1."""
    seen, whole = [], measure.judge

    def judge(setup, prompts):
        metrics, served = whole(setup, prompts)
        seen.append((prompts is setup.valid, weights(setup)))
        return (metrics | {"hr@10": 1 - len(seen) / 10} if prompts is setup.valid else metrics), served

    monkeypatch.setattr(measure, "judge", judge)
    found, _ = measure.run_arm(setup, arm_of(setup, "nll", lr=1e-2), "full")
    assert found["best_step"] == 1 and [point["step"] for point in found["curve"]] == [1, 2]
    assert [valid for valid, _ in seen] == [True, True, False, False]  # steps 1 and 2; the test at the end, and at best
    at_1, at_2, final, best = (state for _, state in seen)
    assert all(torch.equal(at_1[key], best[key]) and torch.equal(at_2[key], final[key]) for key in best)
    assert any(not torch.equal(best[key], final[key]) for key in best)


def test_the_oracle_admits_exactly_the_contexts_without_bait(setup):
    _, arrays = measure.run_arm(setup, arm_of(setup, "oracle-gate"), "full")
    batch, admitted, misled = arrays["admitted"].T
    order = nano.batches(len(setup.data.rl.target), setup.cfg.batch_size, setup.cfg.rl_steps,
                         nano.make_generator(setup.cfg.seed, "order"))
    clean = [int((~setup.truth.misled(setup.data.rl.rows(rows))).sum()) for rows in order]
    assert admitted.tolist() == clean and 0 < admitted.sum() < batch.sum() and not misled.any()
    assert not setup.truth._replace(bait=0.0).misled(setup.test).any()


@pytest.fixture
def gated_batches():
    """[(hard, clear)] of 40 batches of 30 prompts; in the last two R admits nobody, and D and R admit everybody."""
    g = torch.Generator().manual_seed(0)
    drawn = [tuple(torch.rand(2, 30, generator=g) < 0.5) for _ in range(38)]
    return [*drawn, (torch.ones(30, dtype=bool), torch.zeros(30, dtype=bool)), (torch.ones(30, dtype=bool),) * 2]


def test_r_thinned_admits_as_many_of_rs_in_each_batch_as_d_and_r(gated_batches):
    g = torch.Generator().manual_seed(1)
    for hard, clear in gated_batches:
        admitted = measure.r_thinned(hard, clear, None, g)
        assert admitted.sum() == (hard & clear).sum() and not (admitted & ~clear).any()


def test_random_at_rs_rate_admits_as_many_as_r_in_each_batch(gated_batches):
    g = torch.Generator().manual_seed(1)
    for hard, clear in gated_batches:
        assert measure.random_at_r(hard, clear, None, g).sum() == clear.sum()


def test_thinning_and_the_random_gate_at_rs_rate_choose_at_random():
    """4 of R's 12 and 12 of 30: everyone who can be chosen is chosen equally often, whatever D says."""
    hard, clear = torch.arange(30) < 4, torch.arange(30) < 12
    g = torch.Generator().manual_seed(2)
    for gate, chance in ((measure.r_thinned, torch.where(clear, 4 / 12, 0.0)),
                         (measure.random_at_r, torch.full((30,), 12 / 30))):
        often = torch.stack([gate(hard, clear, None, g) for _ in range(4000)]).double().mean(0)
        error = (chance * (1 - chance) / 4000).sqrt()
        assert ((often - chance).abs() <= 4 * error).all()  # 0 where R does not admit


def test_both_gates_are_trained_with_and_keep_their_coverage(setup, monkeypatch):
    """In training the gates get the D and R of each batch: as many are admitted as D&R, or R, admits there."""
    asked = []

    def noted(gate):
        def admit(hard, clear, batch, generator):
            asked.append((len(clear), int((hard & clear).sum()), int(clear.sum())))
            return gate(hard, clear, batch, generator)
        return admit

    cfg = dataclasses.replace(setup.cfg, batch_size=20, rl_steps=3, tau=0.1, rho=0.8)  # admit some of a small batch
    setup = setup._replace(cfg=cfg)
    for name, gate, column in (("r-thinned", "r_thinned", 1), ("random-at-r", "random_at_r", 2)):
        monkeypatch.setattr(measure, gate, noted(getattr(measure, gate)))
        asked.clear()
        _, arrays = measure.run_arm(setup, arm_of(setup, name), "full")
        assert arrays["admitted"][:, :2].tolist() == [[row[0], row[column]] for row in asked]
        assert len(asked) == cfg.rl_steps and 0 < sum(row[1] for row in asked) < sum(row[2] for row in asked)


def test_the_true_reward_is_the_users_own_utility(setup):
    _, which, count = torch.unique(setup.data.rl.history, dim=0, return_inverse=True, return_counts=True)
    part = setup.data.rl.rows((count[which] == 1).nonzero()[:6, 0])  # of equal histories one user answers for all
    item = torch.tensor([[0, 1, -1]] * len(part.user))
    assert len(part.user) == 6
    found = measure.true_reward(setup.truth, setup.data.rl)(part.history, item)
    assert found.numpy() == pytest.approx(setup.truth.utility(part, item.numpy()), abs=1e-5)


def test_bait_changes_the_log_and_nothing_that_the_base_policy_saw(setup):
    plain = nano.toy_world(dataclasses.replace(setup.cfg, bait=0.0), setup.world)
    for name in ("sft", "rl", "valid", "test"):
        for one, other in zip(getattr(plain, name), getattr(setup.data, name), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(plain.log.item, setup.data.log.item) and not torch.equal(plain.log.click, setup.data.log.click)
