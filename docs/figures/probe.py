# SPDX-License-Identifier: MIT
"""What make.py draws and tabulates: one pass of a base policy and its ranker over prompts that neither has seen.

The rollouts are drawn once, the gate is computed again for every setting, so that settings differ in nothing else.
"""

from __future__ import annotations

import json
from fractions import Fraction
from typing import NamedTuple

import measure
import numpy as np
import torch

import adagrpo_core as core
import nanoadagrpo as nano

ROLLOUTS, NEGATIVES = 64, 8  # the most that any setting asks for


class Gate(NamedTuple):
    """One setting of the gate."""

    tau: Fraction
    rho: Fraction
    M: int
    K: int


class Pass(NamedTuple):
    """P prompts, each with its rollouts, its truth and its negatives, and what only the toy knows."""

    target_logp: np.ndarray  # (P,) per token
    rollout_logp: np.ndarray  # (P, ROLLOUTS)
    target_reward: np.ndarray  # (P,)
    rewards: np.ndarray  # (P, ROLLOUTS)
    valid: np.ndarray  # (P, ROLLOUTS) boolean: is it an item?
    negative_rewards: np.ndarray  # (P, NEGATIVES)
    negative_valid: np.ndarray  # (P, NEGATIVES)
    misled: np.ndarray  # (P,) boolean: clicks follow bait in this context
    agreement: np.ndarray  # (P,) rank correlation of reward and true utility within the group


# == The pass =========================================================================================================


def sampled(L, B, n, generator):
    return nano.sample(torch.rand(L, B, n, generator=generator))


@torch.no_grad()
def roll_out(setup):
    """Every validation prompt of the toy once, in batches as the step makes them."""
    cfg, catalogue, reward = setup.cfg, setup.data.catalogue, nano.make_reward(setup.ranker, setup.cfg)
    setup.policy.model.load_state_dict(setup.base)
    B, generator, parts = cfg.batch_size, nano.make_generator(cfg.seed, "gate"), []
    prompts = setup.data.valid
    for rows in torch.arange(len(prompts.target) // B * B).split(B):
        batch = prompts.rows(rows)
        prompt = nano.prefill(setup.policy, batch.history, batch.target)
        rollouts, rollout_logp = nano.tree_decode(setup.policy, prompt, sampled(catalogue.L, B, ROLLOUTS, generator))
        item = catalogue.item(rollouts)
        keys = torch.rand(B, B * ROLLOUTS, generator=generator)
        negative = item.flatten()[core.in_batch_negatives(keys, k=ROLLOUTS, m=NEGATIVES)]
        scores = reward(batch.history, torch.cat([item, batch.target.unsqueeze(1), negative], 1))
        target_logp = core.length_normalized(prompt.target_logp)
        # A rollout that repeats the truth ties with it, as in the step.
        rollout_logp = torch.where(item == batch.target.unsqueeze(1), target_logp.unsqueeze(1),
                                   core.length_normalized(rollout_logp))
        rewards = scores[:, :ROLLOUTS].numpy()
        utility = setup.truth.utility(batch, item.numpy())
        parts.append((target_logp.numpy(), rollout_logp.numpy(), scores[:, ROLLOUTS].numpy(), rewards,
                      (item >= 0).numpy(), scores[:, ROLLOUTS + 1 :].numpy(), (negative >= 0).numpy(),
                      setup.truth.misled(batch), measure.spearman(rewards, utility, (item >= 0).numpy())))
    return Pass(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def judged(rows, gate):
    """D and R (P,) of a pass under one setting; the first K rollouts and the first M negatives count."""
    tau, rho, M, K = float(gate.tau), float(gate.rho), gate.M, gate.K
    return (core.difficulty(rows.target_logp, rows.rollout_logp[:, :K], tau=tau),
            core.reliability(rows.target_reward, rows.rewards[:, :K], rows.negative_rewards[:, :M], tau=tau, rho=rho))


def coverage(rows, gate):
    """Shares: difficult, reliable, admitted; of the admitted, misled; and their mean agreement."""
    D, R = judged(rows, gate)
    c = core.sample_clip(D, R)
    some = c.any()
    return {"difficult": D.mean(), "reliable": R.mean(), "admitted": c.mean(),
            "misled": rows.misled[c].mean() if some else np.nan,
            "agreement": np.nanmean(rows.agreement[c]) if some else np.nan}


def null(gate, invalid=0):
    """P(R = 1) under a ranker that knows nothing, exactly. `invalid` of the K rollouts are no items, at the floor.

    Truth, negatives and the other rollouts are then in any order with equal chance. Of n places that are not taken by
    the floor, the truth needs one of the first tau * K, and each negative one beyond (1 - rho) * K.
    """
    n, bound = gate.K + 1 + gate.M - invalid, int((1 - gate.rho) * gate.K)
    chance = Fraction(0)
    for place in range(1, min(n, int(gate.tau * gate.K)) + 1):  # of the truth, which may stand among the last itself
        one = Fraction(1, n)
        for m in range(gate.M):
            one *= Fraction(max(0, n - bound - (place > bound) - m), n - 1 - m)
        chance += one
    return chance


def by_invalid(rows, gate, most=7):
    """Per number of invalid rollouts among K: share of prompts, and R where the one negative is, or is not, an item."""
    R, count = judged(rows, gate)[1], (~rows.valid[:, : gate.K]).sum(1)
    item = rows.negative_valid[:, : gate.M].all(1)
    for v in range(most + 1):
        here = count == v if v < most else count >= v
        yield [here.mean(), *(R[here & which].mean() if (here & which).any() else np.nan for which in (item, ~item))]


# == Lambda ===========================================================================================================


def pulls(setup, batches=40):
    """Median over batches of the lengths of three gradients at the base policy: NLL, c * GRPO and GRPO for everyone."""
    cfg, catalogue, reward = setup.cfg, setup.data.catalogue, nano.make_reward(setup.ranker, setup.cfg)
    policy, K = setup.policy, cfg.group_size
    policy.model.load_state_dict(setup.base)
    weights, generator, lengths = list(policy.model.parameters()), nano.make_generator(cfg.seed, "pulls"), []

    def length(loss):
        if not loss.requires_grad:
            return 0.0
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients]).norm().item()

    prompts = setup.data.valid
    for rows in torch.arange(len(prompts.target) // cfg.batch_size * cfg.batch_size).split(cfg.batch_size)[:batches]:
        batch = prompts.rows(rows)
        B, prompt = len(rows), nano.prefill(policy, batch.history, batch.target)
        rollouts, logp = nano.tree_decode(policy, prompt, sampled(catalogue.L, B, K, generator))
        item = catalogue.item(rollouts)
        keys = torch.rand(B, B * K, generator=generator)
        negative = item.flatten()[core.in_batch_negatives(keys, k=K, m=cfg.negatives)]
        scores = reward(batch.history, torch.cat([item, batch.target.unsqueeze(1), negative], 1))
        out = core.adagrpo_loss(prompt.target_logp, logp, logp.detach(), scores[:, :K], scores[:, K],
                                scores[:, K + 1 :], tau=cfg.tau, rho=cfg.rho, lam=1.0)
        everyone = core.grpo_loss(logp, logp.detach(), core.group_advantages(scores[:, :K]))
        lengths.append([length(x.mean()) for x in (out.nll, torch.where(out.clip, everyone, 0.0), everyone)])
    return np.median(lengths, 0).tolist()


def lambdas(cfg):
    return [cfg.lam / 3, cfg.lam, 3 * cfg.lam, 10 * cfg.lam]


def doses(setup):
    """{row: {metric: value}}: NLL continued, and AdaGRPO and its random twin at several lambdas."""
    cfg = setup.cfg
    arms = {"nll": measure.Arm("nll", cfg.bait, cfg.lam, cfg.lr)}
    for name in ("adagrpo", "random-gate"):
        arms |= {f"{name} {lam:g}": measure.Arm(name, cfg.bait, lam, cfg.lr) for lam in lambdas(cfg)}
    found = {}
    for row, arm in arms.items():
        trained = measure.run_arm(setup, arm, "knob")[0]
        found[row] = {key: trained["final"][key] for key in ("hr@10", "click_reward@10", "hallucination")}
        found[row] |= {key: trained[key] for key in ("admitted", "misled")}  # means over the steps
    return found


# == One seed =========================================================================================================


def one_seed(cfg, world, folder, say=print):
    """(Pass, numbers) of a seed, from its files or from scratch."""
    numbers, arrays = folder / "numbers.json", folder / "pass.npz"
    if not numbers.exists():
        setup = measure.prepare(cfg, world, folder / "base-policy.npz")
        say(f"seed {cfg.seed}: prepared", flush=True)
        rows = roll_out(setup)
        measure.save(arrays, rows._asdict())
        found = {"pulls": pulls(setup)}
        say(f"seed {cfg.seed}: rolled out", flush=True)
        found["doses"] = doses(setup)
        say(f"seed {cfg.seed}: trained", flush=True)
        numbers.write_text(json.dumps(found, indent=1) + "\n")  # last: its presence means done
    with np.load(arrays, allow_pickle=False) as saved:
        rows = Pass(*(saved[name] for name in Pass._fields))
    return rows, json.loads(numbers.read_text())
