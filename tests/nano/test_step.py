# SPDX-License-Identifier: MIT
"""The step: every method's training equals a second, dense version in which nothing is cached and nobody left out."""

import copy
import functools
import itertools
import re

import pytest
import torch

import adagrpo_core as core
import nanoadagrpo as nano

from .helpers import distance, listen, make_policy, plain_logp, plain_next, settings, state

CATALOGUE = nano.Catalogue([(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 1, 0)])
DRAW = torch.Generator().manual_seed(0)
HISTORY = torch.randint(6, (14, 3), generator=DRAW)
HISTORY[::3, 0] = HISTORY[::6, 1] = -1
PROMPTS = nano.Prompts(HISTORY, torch.randint(6, (14,), generator=DRAW), torch.arange(14))
OPINIONS = torch.rand(101, 6, generator=DRAW)
STEPS, EPSILON = 4, 0.01  # so narrow that a second update is clipped
METHODS = list(nano.METHODS)
every_method = pytest.mark.parametrize("name", METHODS)
every_gated_method = pytest.mark.parametrize("name", [name for name in METHODS if name != "nll"])


def cfg(**changes):  # a seed whose first batch admits some and not all
    return settings(**{"seed": 7, "batch_size": 5, "group_size": 6, "negatives": 2, "rl_steps": STEPS, "tau": 0.5,
                       "rho": 0.6, "lam": 2.0, "lr": 1e-2, "grpo_lr": 5e-3, "floor": -0.5, **changes})


def reward(history, item):
    """Some opinion on every prompt and item, without reason, and looked up in a table."""
    key = (history.clamp(min=-1) + 1) @ torch.tensor([49, 7, 1]) % 101
    return torch.where(item >= 0, OPINIONS[key[:, None], item], -0.5)


@functools.cache
def beginner(dtype):
    """Knows what items look like and some of the truths, so that rollouts and verdicts are of every sort."""
    policy = make_policy(CATALOGUE, "gpt2", spread=0.1, dtype=dtype)
    nano.train_sft(policy, PROMPTS, settings(sft_steps=40, sft_batch_size=8, sft_lr=1e-2), lambda **row: None)
    return policy


def policy_of(dtype=torch.float64):
    return copy.deepcopy(beginner(dtype))


def train(name, c, reward=reward, prompts=PROMPTS, policy=None):
    """Parameters after training by the script, and its log."""
    policy, steps = policy or policy_of(), []
    rows, log = listen()
    nano.train_rl(policy, reward, prompts, c, name, log, on_step=lambda step, *_: steps.append(step))
    assert steps == list(range(1, c.rl_steps + 1)) and len(rows) == c.rl_steps
    return state(policy), rows


# -- the dense version -------------------------------------------------------------------------------------------------


def plain_rollouts(policy, history, points):
    """(B, K, L) samples, word after word: the first one whose probabilities, added up so far, are above the point."""
    rows = []
    for b, one in enumerate(history):
        tokens = torch.zeros(points.shape[2], 0, dtype=torch.long)
        for point in points[:, b]:
            ends = plain_next(policy, one, tokens).float().exp().cumsum(-1)
            tokens = torch.cat([tokens, (point.unsqueeze(1) * ends[:, -1:] >= ends).sum(1, keepdim=True)], 1)
        rows.append(tokens)
    return torch.stack(rows)


@functools.cache
def dense(name, updates):
    """The same training with whole sequences, the core's one-call objective and Adam by hand; only the dice are shared.

    Also returns (difficult, reliable, admitted) of every step.
    """
    policy, c = policy_of(), cfg(updates=updates, epsilon=EPSILON)
    parameters = list(policy.model.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    order = nano.batches(len(PROMPTS.target), c.batch_size, c.rl_steps, nano.make_generator(c.seed, "order"))
    dice = {use: nano.make_generator(c.seed, use) for use in ("rollouts", "negatives", "random gate")}
    B, K, count, verdicts = c.batch_size, c.group_size, 0, []

    def logp_of(history, tokens):
        return torch.stack([plain_logp(policy, h, t) for h, t in zip(history, tokens, strict=True)])

    for rows in order:
        history, target = PROMPTS.history[rows], PROMPTS.target[rows]
        truth = CATALOGUE.tokens[target].unsqueeze(1)
        with torch.no_grad():
            rollouts = plain_rollouts(policy, history, torch.rand(3, B, K, generator=dice["rollouts"]))
            old, old_truth = logp_of(history, rollouts), logp_of(history, truth)
        same = (rollouts == truth).all(-1)  # a rollout that repeats the truth is exactly as likely
        old = torch.where(same.unsqueeze(-1), old_truth, old)
        items = CATALOGUE.item(rollouts)
        keys = torch.rand(B, B * K, generator=dice["negatives"])
        for b, j in itertools.product(range(B), range(B)):
            if rows[b] == rows[j]:  # the same prompt, twice in this batch
                keys[b, j * K : (j + 1) * K] += 1
        negatives = items.flatten()[core.in_batch_negatives(keys, k=K, m=c.negatives)]
        rewards, negative_rewards = reward(history, items), reward(history, negatives)
        target_reward = reward(history, target[:, None])[:, 0]
        for update in range(c.updates):
            logp, truth_logp = logp_of(history, rollouts), logp_of(history, truth)[:, 0]
            whole = core.adagrpo_loss(
                truth_logp, logp, old, rewards, target_reward, negative_rewards, tau=c.tau, rho=c.rho, lam=c.lam,
                epsilon=c.epsilon, target_old_logp=core.length_normalized(old_truth)[:, 0])
            if update == 0:
                shuffled = whole.clip[torch.randperm(B, generator=dice["random gate"])]
                clip = {"nll": torch.zeros(B, dtype=bool), "grpo": torch.ones(B, dtype=bool),
                        "grpo+nll": torch.ones(B, dtype=bool), "adagrpo-d": whole.difficult,
                        "adagrpo-r": whole.reliable, "adagrpo": whole.clip, "random-gate": shuffled}[name]
                verdicts.append((whole.difficult, whole.reliable, clip))
            if name == "adagrpo":
                loss = whole.loss.mean()
            else:
                advantages = core.group_advantages(rewards)
                surrogate = core.grpo_loss(logp, old, advantages, clip=clip, epsilon=c.epsilon)
                loss = (c.lam * surrogate + (0 if name == "grpo" else whole.nll)).mean()
            gradients = torch.autograd.grad(loss, parameters)
            count += 1
            rate = (c.grpo_lr if name == "grpo" else c.lr) * (1 - 0.98 * (count - 1) / (c.rl_steps * c.updates))
            norm = torch.stack([g.norm() for g in gradients]).norm()
            with torch.no_grad():
                for p, g, (mean, square) in zip(parameters, gradients, moments, strict=True):
                    g = g * min(1.0, 1 / (norm.item() + 1e-6))
                    mean.mul_(0.9).add_(0.1 * g)
                    square.mul_(0.999).add_(0.001 * g * g)
                    p.mul_(1 - rate * 0.01)
                    p.sub_(rate * (mean / (1 - 0.9**count)) / ((square / (1 - 0.999**count)).sqrt() + 1e-8))
    return state(policy), verdicts


@pytest.mark.parametrize("updates", [1, 2])
@every_method
def test_training_equals_the_dense_version(name, updates):
    ours, log = train(name, cfg(updates=updates, epsilon=EPSILON))
    theirs, verdicts = dense(name, updates)
    assert distance(ours, state(policy_of())) > 1e-3
    assert distance(ours, theirs) < 1e-7
    if name != "nll":
        assert [row["admitted"].item() for row in log] == pytest.approx(
            [clip.float().mean().item() for *_, clip in verdicts])


def test_the_dense_comparison_meets_every_kind_of_sample_and_tells_the_methods_apart():
    kinds = {(hard, clear) for d, r, _ in dense("adagrpo", 1)[1]
             for hard, clear in zip(d.tolist(), r.tolist(), strict=True)}
    assert len(kinds) == 4
    results = [dense(name, 1)[0] for name in METHODS]
    for i, one in enumerate(results):
        assert all(distance(one, other) > 1e-4 for other in results[:i])


# -- what the methods share, and what each leaves out ------------------------------------------------------------------


def test_every_method_sees_the_same_prompts_in_the_same_order():
    seen = {}
    for name in METHODS:
        policy, prompts = policy_of(), seen.setdefault(name, [])
        policy.model.register_forward_pre_hook(
            lambda module, args, options, prompts=prompts: prompts.append(options["input_ids"]), with_kwargs=True)
        train(name, cfg(), policy=policy)
        prompts[:] = [ids for ids in prompts if ids.shape == (5, 12)]  # three items, <next>, two tokens of the truth
    order = nano.batches(14, 5, STEPS, nano.make_generator(cfg().seed, "order"))
    for ids, rows in zip(seen["nll"], order, strict=True):
        items, there = PROMPTS.history[rows].clamp(min=0), PROMPTS.history[rows].repeat_interleave(3, 1) >= 0
        assert torch.equal(ids[:, :9][there], CATALOGUE.tokens[items].flatten(1)[there])
        assert torch.equal(ids[:, 10:], CATALOGUE.tokens[PROMPTS.target[rows]][:, :2])
    for name in "grpo", "grpo+nll":  # which admit everyone: their second pass of each step is over rollouts
        assert len(seen[name]) == 2 * STEPS
        seen[name] = seen[name][::2]
    for prompts in seen.values():
        assert torch.equal(torch.stack(prompts), torch.stack(seen["nll"]))


def test_prompts_come_round_in_random_order_each_as_often_as_the_others():
    rows = nano.batches(7, 3, 7, torch.Generator().manual_seed(0))
    assert rows.shape == (7, 3)
    rounds = rows.flatten().view(3, 7)
    assert all(sorted(one.tolist()) == list(range(7)) for one in rounds)
    assert len({tuple(one.tolist()) for one in rounds}) == 3


def test_nll_is_supervised_training_continued(monkeypatch):
    monkeypatch.setattr(nano, "make_generator", lambda seed, purpose, device="cpu": torch.Generator().manual_seed(seed))
    c = cfg(sft_steps=STEPS, sft_batch_size=5, sft_lr=1e-2)
    continued, rows = train("nll", c)
    policy = policy_of()
    supervised_rows, log = listen()
    nano.train_sft(policy, PROMPTS, c, log)
    assert distance(continued, state(policy)) == 0
    assert [row["nll"] for row in rows] == [row["nll"] for row in supervised_rows]


def test_nll_asks_for_no_reward_and_draws_no_rollouts():
    def never(history, item):
        raise AssertionError("nll asked the ranker")

    _, rows = train("nll", cfg(), reward=never)
    assert not {"admitted", "reward", "grpo", "ratio"} & rows[0].keys()


@every_gated_method
def test_at_the_first_update_the_ratio_is_one(name, monkeypatch):
    gaps, loss, c, policy = [], core.grpo_loss, cfg(), policy_of(torch.float32)  # float32, as the script trains

    def spy(logp, old_logp, *rest, **options):
        gaps.append((logp - old_logp).abs().max().item())
        return loss(logp, old_logp, *rest, **options)

    monkeypatch.setattr(nano.core, "grpo_loss", spy)
    _, rows = train(name, c, policy=policy)
    assert gaps and max(gaps) < 1e-5
    assert all(float(row["ratio"]) == pytest.approx(1, abs=1e-5) for row in rows)


@every_gated_method
def test_epsilon_has_work_to_do_only_with_more_updates_than_one(name):
    def moved(**changes):
        return train(name, cfg(**changes))[0]

    assert distance(moved(epsilon=0.001), moved(epsilon=0.9)) == 0
    assert distance(moved(epsilon=0.001, updates=2), moved(epsilon=0.9, updates=2)) > 1e-4


def test_the_learning_rate_in_the_log_is_that_of_the_step():
    _, rows = train("nll", cfg())
    expected = [cfg().lr * (1 - 0.98 * i / STEPS) for i in range(STEPS)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)


def test_the_random_gate_admits_as_many_of_each_batch_as_adagrpo_would():
    draw = torch.Generator().manual_seed(0)
    share = torch.zeros(8)
    for _ in range(400):
        hard, clear = torch.rand(2, 8, generator=draw) < 0.6
        clip = nano.METHODS["random-gate"].admit(hard, clear, None, draw)
        assert clip.dtype == torch.bool and clip.sum() == (hard & clear).sum()
        share += clip / 400
    assert share.min() > 0.28 and share.max() < 0.44  # 0.36 each, whoever it is: 3.3 standard deviations
    one_sided = torch.arange(8) < 2
    picked = torch.stack([nano.METHODS["random-gate"].admit(one_sided, one_sided, None, draw) for _ in range(400)])
    assert (picked.float().mean(0) > 0.15).all() and (picked.float().mean(0) < 0.35).all()


def test_each_method_admits_what_its_name_says():
    hard, clear = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    admitted = {name: method.admit(hard, clear, None, None).tolist() for name, method in nano.METHODS.items()
                if name not in ("nll", "random-gate")}
    assert admitted == {
        "grpo": [True] * 4, "grpo+nll": [True] * 4, "adagrpo-d": [True, True, False, False],
        "adagrpo-r": [True, False, True, False], "adagrpo": [True, False, False, False],
    }
    assert [name for name, method in nano.METHODS.items() if not method.supervised] == ["grpo"]


# -- ties --------------------------------------------------------------------------------------------------------------


def test_a_rollout_that_repeats_the_truth_ties_with_it_exactly(monkeypatch):
    # The truth is scored in a tree of its own. A last digit that differs there would rank it behind its own repeats.
    policy, pools, said, judge = policy_of(torch.float32), [], [], core.difficulty
    c = cfg(group_size=24, lr=0.0)

    def spy(truth, rollouts, **options):
        pools.append((truth, rollouts))
        return judge(truth, rollouts, **options)

    def item(tokens):
        said.append(tokens)
        return CATALOGUE.item(tokens)

    monkeypatch.setattr(nano.core, "difficulty", spy)
    monkeypatch.setattr(policy, "catalogue", copy.copy(CATALOGUE))
    monkeypatch.setattr(policy.catalogue, "item", item)
    train("adagrpo", c, policy=policy)
    order, repeats = nano.batches(14, 5, STEPS, nano.make_generator(c.seed, "order")), 0
    for (truth, rollouts), tokens, rows in zip(pools, said, order, strict=True):
        same = (tokens == CATALOGUE.tokens[PROMPTS.target[rows]][:, None]).all(-1)
        assert torch.equal(rollouts[same], truth[:, None].expand(-1, 24)[same])
        repeats += same.sum().item()
    assert repeats > 20


def test_a_truth_that_the_policy_says_nearly_always_is_easy():
    policy = policy_of(torch.float32)
    histories = torch.randint(6, (12, 3), generator=torch.Generator().manual_seed(3))
    few = nano.Prompts(histories, torch.arange(12) % 6, torch.arange(12))
    nano.train_sft(policy, few, settings(sft_steps=60, sft_batch_size=12, sft_lr=1e-2), lambda **row: None)
    with torch.no_grad():
        p = nano.prefill(policy, few.history, few.target).target_logp.sum(-1).exp()
    assert p.min() > 0.8
    _, rows = train("adagrpo", cfg(batch_size=8, group_size=24, lr=0.0, rl_steps=6), prompts=few, policy=policy)
    assert [float(row["easy"]) for row in rows] == [1] * 6


# -- rewards that say nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("nll", "grpo")])
def test_a_constant_reward_leaves_exactly_the_supervised_update(name):
    with_rewards, rows = train(name, cfg(), reward=lambda history, item: torch.full(item.shape, 0.7))
    assert distance(with_rewards, train("nll", cfg())[0]) < 1e-12
    assert all(row["zero_spread"] == 1 for row in rows)


def test_a_constant_reward_leaves_pure_grpo_nothing_but_weight_decay():
    moved, _ = train("grpo", cfg(), reward=lambda history, item: torch.full(item.shape, 0.7))
    factor = 1.0
    for i in range(STEPS):
        factor *= 1 - 0.01 * cfg().grpo_lr * (1 - 0.98 * i / STEPS)
    before = policy_of()
    decayed = {name: value * factor for name, value in state(before).items()}
    assert distance(moved, decayed) < 1e-12


def test_the_reward_is_asked_about_rollouts_truth_and_other_prompts_rollouts(monkeypatch):
    asked, drawn, draw, c = [], [], core.in_batch_negatives, cfg(updates=2)

    def listening(history, item):
        asked.append((history, item))
        return reward(history, item)

    def remember(keys, **sizes):
        drawn.append(draw(keys, **sizes))
        return drawn[-1]

    monkeypatch.setattr(nano.core, "in_batch_negatives", remember)
    train("adagrpo", c, reward=listening)
    order = nano.batches(14, 5, STEPS, nano.make_generator(c.seed, "order"))
    assert len(asked) == STEPS, "the same rollouts are scored once, however many updates"
    for (history, item), rows, negatives in zip(asked, order, drawn, strict=True):
        assert torch.equal(history, PROMPTS.history[rows])
        assert item.shape == (5, 6 + 1 + 2)
        assert torch.equal(item[:, 6], PROMPTS.target[rows])
        assert torch.equal(item[:, 7:], item[:, :6].flatten()[negatives])
        assert (negatives // 6 != torch.arange(5)[:, None]).all()


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_negatives_are_of_other_prompts_where_a_prompt_stands_in_a_batch_twice_too(monkeypatch, n):
    """Fewer prompts than a batch holds, or a batch in which one round through them ends and the next begins."""
    drawn, draw, c = [], core.in_batch_negatives, cfg()
    monkeypatch.setattr(nano.core, "in_batch_negatives",
                        lambda *x, **sizes: drawn.append(draw(*x, **sizes)) or drawn[-1])
    train("adagrpo", c, prompts=PROMPTS.rows(slice(n)))
    order = nano.batches(n, 5, STEPS, nano.make_generator(c.seed, "order"))
    assert any(len(rows.unique()) < 5 for rows in order)
    for rows, negatives in zip(order, drawn, strict=True):
        assert (rows[negatives // 6] != rows[:, None]).all()


# -- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what, value", [("reward", float("nan")), ("reward", float("inf")), ("nll", float("nan")),
                                         ("grpo", float("inf")), ("ratio", float("inf")),
                                         ("gradient norm", float("nan"))])
def test_a_number_that_is_not_finite_ends_the_run_by_its_name_and_step_before_a_weight_moves(what, value, monkeypatch):
    policy, kept, c = policy_of(), [], cfg(rl_steps=3)
    name = "grpo+nll" if what in ("grpo", "ratio") else "adagrpo"

    def broken(x):
        return torch.where(torch.arange(x.numel()).view(x.shape) == 0, value, x) if len(kept) == 2 else x

    if what == "gradient norm":
        policy.model.base_model.ln_f.bias.register_hook(broken)
    elif what == "ratio":
        learn = nano.learn
        monkeypatch.setattr(nano, "learn", lambda *given: torch.stack([*(x := learn(*given).T)[:2], broken(x[2])], 1))
    elif what != "reward":
        real = getattr(core, f"{what}_loss")
        monkeypatch.setattr(core, f"{what}_loss", lambda *given, **options: broken(real(*given, **options)))
    with pytest.raises(nano.UserError, match=f"^{re.escape(name)}, step 3: the {what} is not finite"):
        nano.train_rl(policy, lambda *given: broken(reward(*given)) if what == "reward" else reward(*given), PROMPTS, c,
                      name, lambda **row: None, on_step=lambda *_: kept.append(state(policy)))
    assert len(kept) == 2 and distance(kept[1], state(policy)) == 0 and distance(*kept) > 0


@pytest.mark.parametrize("place", [6, 7], ids=["truth", "negative"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_so_does_the_reward_of_a_truth_or_of_a_negative(place, value):
    """The gate could be judged, but by numbers that mean nothing. A negative that repeats a rollout has its score."""
    def broken(history, item):
        scores = reward(history, item)
        scores[0, place] = value
        return scores

    c = cfg(group_size=6)
    with pytest.raises(nano.UserError, match=r"^adagrpo, step \d: the reward of an item is not finite"):
        nano.train_rl(policy_of(), broken, PROMPTS, c, "adagrpo", lambda **row: None)


@every_gated_method
def test_a_policy_that_knows_no_probabilities_any_more_is_said_to_be_so(name):
    policy = policy_of(torch.float32)
    policy.model.get_input_embeddings().weight.data[0, 0] = float("nan")
    with pytest.raises(nano.UserError, match=f"^{re.escape(name)}, step 1: the nll is not finite"):
        train(name, cfg(), policy=policy)


@pytest.mark.parametrize("what", ["nll", "gradient norm"])
def test_so_do_the_supervised_steps(what, monkeypatch):
    policy, kept = policy_of(), []

    def broken(x):
        return x * float("inf") if len(kept) == 1 else x

    if what == "nll":
        monkeypatch.setattr(core, "nll_loss", lambda logp, real=core.nll_loss: broken(real(logp)))
    else:
        policy.model.base_model.ln_f.bias.register_hook(broken)
    with pytest.raises(nano.UserError, match=f"^sft, step 2: the {what} is not finite"):
        nano.train_sft(policy, PROMPTS, cfg(sft_steps=3, sft_batch_size=5), lambda **row: None,
                       on_step=lambda *_: kept.append(state(policy)))
    assert len(kept) == 1 and distance(kept[0], state(policy)) == 0


# -- cost --------------------------------------------------------------------------------------------------------------


def passes(policy):
    """The shapes of all that the model is run on, in a list that grows."""
    sizes = []
    policy.model.register_forward_pre_hook(
        lambda module, args, options: sizes.append(tuple(options["input_ids"].shape)), with_kwargs=True)
    return sizes


@pytest.mark.parametrize("updates", [1, 2])
@every_method
def test_a_prompt_is_run_once_per_update_and_the_rejected_rollouts_not_again(name, updates):
    policy = policy_of()
    sizes = passes(policy)
    _, [row] = train(name, cfg(rl_steps=1, updates=updates), policy=policy)
    B, K, T, A = 5, 6, 3 * 3 + 1, round(row.get("admitted", torch.zeros(())).item() * 5)
    assert 0 < A < B or name in ("nll", "grpo", "grpo+nll")
    prompts, rollouts, admitted = [(B, T + 2)], [(B, K)] * 2 * (name != "nll"), [(A, 2 * K)] * (A > 0)
    assert sizes == prompts + rollouts + admitted + (prompts + admitted) * (updates - 1)


def test_sampling_keeps_no_graph(monkeypatch):
    policy, with_graph = policy_of(), []
    policy.model.register_forward_pre_hook(lambda *_: with_graph.append(torch.is_grad_enabled()))
    train("grpo+nll", cfg(rl_steps=1), policy=policy)
    assert with_graph == [True, False, False, True]  # prompts with their truth; rollouts, by level; and again


def test_evaluation_runs_each_prompt_once():
    policy = policy_of(torch.float32)
    sizes = passes(policy)

    class Judge:
        def probabilities(self, history, item):
            return {"click": (item >= 0).float()}

    nano.evaluate(policy, Judge(), PROMPTS, settings(beam_width=9))
    V = CATALOGUE.S + 1
    assert sizes == [(14, 10), (14, V), (14, 9), (14, 8), (14, 8)]  # prompt; beams; samples


# -- what is logged ----------------------------------------------------------------------------------------------------


@every_gated_method
def test_the_shares_in_the_log_add_up(name):
    _, rows = train(name, cfg())
    for row in rows:
        row = {key: float(value) for key, value in row.items() if key not in ("phase", "method")}
        assert row["difficult"] + row["easy"] == pytest.approx(1)
        assert row["reliable"] + row["not_prominent"] + row["not_suppressed"] == pytest.approx(1)
        for key in ("zero_spread", "duplicate_rollouts", "invalid_rollouts", "admitted"):
            assert 0 <= row[key] <= 1
        assert row["reward_spread"] >= 0 and row["gradient_norm"] > 0 and row["nll"] > 0
    expected = {"grpo": lambda row: 1, "grpo+nll": lambda row: 1, "adagrpo-d": lambda row: row["difficult"],
                "adagrpo-r": lambda row: row["reliable"]}
    if name in expected:
        assert [float(row["admitted"]) for row in rows] == [float(expected[name](row)) for row in rows]
    else:
        assert all(row["admitted"] <= min(row["difficult"], row["reliable"]) for row in rows)


def test_diagnostics_of_a_case_worked_by_hand():
    hard, clear = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, False])
    rewards = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5] * 4, [-1.0, -1.0, 0.2, 0.4], [0.3, 0.9, 0.8, 0.7]])
    # Of K = 4 with tau 1/2, prominent is rank 1 or 2: the first three. One of them is reliable.
    target_reward = torch.tensor([0.35, 0.5, 0.3, 0.4])
    rollouts = torch.tensor([
        [[0, 3], [0, 4], [1, 3], [2, 4]],
        [[0, 3], [0, 3], [0, 3], [0, 3]],  # three repeat an earlier one
        [[3, 3], [3, 3], [0, 3], [0, 4]],  # one does
        [[0, 3], [1, 3], [1, 3], [0, 3]],  # two do
    ])
    items = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0], [-1, -1, 0, 1], [0, 2, 2, 0]])
    shares = nano.diagnostics(hard, clear, hard & clear, rewards, target_reward, rollouts, items,
                              cfg(tau=0.5, rho=0.5, group_size=4))
    spread = sum(torch.tensor(row).std().item() for row in rewards.tolist()) / 4
    assert {name: value.item() for name, value in shares.items()} == pytest.approx({
        "reward": rewards.mean().item(), "reward_spread": spread, "difficult": 0.5, "reliable": 0.25, "admitted": 0.25,
        "easy": 0.5, "not_prominent": 0.25, "not_suppressed": 0.5, "zero_spread": 0.25,
        "duplicate_rollouts": 6 / 16, "invalid_rollouts": 2 / 16})


# -- does it learn? ----------------------------------------------------------------------------------------------------


def test_supervised_steps_make_the_truth_likelier(shop, base):
    def nll(policy):
        with torch.no_grad():
            return -nano.prefill(policy, shop.valid.history, shop.valid.target).target_logp.mean().item()

    assert nll(base) < nll(nano.tiny_policy(shop.catalogue, settings(), width=16)) - 0.3


def test_policy_gradients_make_what_is_rewarded_likelier():
    policy, wanted = policy_of(torch.float32), PROMPTS._replace(target=torch.full((14,), 3))

    def p():
        with torch.no_grad():
            return nano.prefill(policy, wanted.history, wanted.target).target_logp.sum(-1).exp().mean().item()

    before = p()
    train("grpo", cfg(rl_steps=25, grpo_lr=1e-2), reward=lambda history, item: (item == 3).float(), policy=policy)
    assert p() > 2 * before
