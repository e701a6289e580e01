# SPDX-License-Identifier: MIT
"""AdaGRPO written down a second time, from the paper's equations, in plain Python.

One instance at a time, lists and exact fractions, no array library and nothing of the package. Only exp, log and the
square root leave the rationals. Slow on purpose: this is what the fast version is held against.
"""

import math
from fractions import Fraction


def rank(value, pool, ties="min"):
    """Place of a value in its pool, sorted descending; equal entries share the least, greatest or mean place."""
    places = [place for place, entry in enumerate(sorted(pool, reverse=True), start=1) if entry == value]
    return {"min": min(places), "max": max(places), "average": Fraction(sum(places), len(places))}[ties]


def policy_pool(target, rollouts):
    """Eq. 6."""
    return [*rollouts, target]


def reward_pool(target, rollouts, negatives):
    """Eq. 8."""
    return [*rollouts, target, *negatives]


def difficulty(target, rollouts, tau, ties="min"):
    """Eq. 7, with tau a Fraction."""
    pool = policy_pool(target, rollouts)
    if any(math.isnan(entry) for entry in pool):
        return False
    return rank(target, pool, ties) > tau * len(rollouts)


def reliability(target, rollouts, negatives, tau, rho, ties="min"):
    """Eq. 9, with tau and rho Fractions."""
    pool = reward_pool(target, rollouts, negatives)
    if any(math.isnan(entry) for entry in pool):
        return False
    K = len(rollouts)
    prominent = rank(target, pool, ties) <= tau * K
    return prominent and all(rank(negative, pool, ties) > (1 - rho) * K for negative in negatives)


def gate_diagnostics(difficult, target, rollouts, negatives, tau, rho, ties="min"):
    """Eq. 10 taken apart, in the order of the core's fields."""
    clear, own = reliability(target, rollouts, negatives, tau, rho, ties), [target, *rollouts]
    prominent = not any(map(math.isnan, own)) and rank(target, own, ties) <= tau * len(rollouts)
    return (difficult and clear, difficult, not difficult, clear, not (prominent or clear), prominent and not clear,
            all(reward == rollouts[0] and math.isfinite(reward) for reward in rollouts))  # fmt: skip


def advantages(rewards, eps=Fraction(0), correction=1):
    """Eq. 3."""
    rewards = [Fraction(reward) for reward in rewards]
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - correction)
    if variance == 0:
        return [0.0] * len(rewards)
    return [float(reward - mean) / (math.sqrt(variance) + float(eps)) for reward in rewards]


def length_normalized(token_logp, mask=None):
    """Eq. 6's likelihood: the exact mean of the tokens that count."""
    counted = [Fraction(logp) for i, logp in enumerate(token_logp) if mask is None or mask[i]]
    return sum(counted) / len(counted) if counted else math.nan


def nll(token_logp, mask=None):
    """Eq. 2."""
    return -length_normalized(token_logp, mask)


def ratio(new, old, largest=math.inf):
    """w, infinite beyond the largest number that the dtype holds. A token of -inf has ratio 0, whatever it had."""
    if new == -math.inf:
        return 0.0
    try:
        w = math.exp(new - old)
    except OverflowError:
        w = math.inf
    return w if w <= largest else math.inf


def surrogate(w, advantage, low=0.2, high=0.2):
    """Eq. 4's min(w A, clip(w) A), and its derivative by log w."""
    if advantage == 0:
        return 0.0, 0.0
    clipped = min(max(w, 1 - low), 1 + high)
    if clipped * advantage < w * advantage:
        return clipped * advantage, 0.0
    return w * advantage, w * advantage


def grpo(token_logp, old_token_logp, advantages, mask=None, low=0.2, high=0.2, ref=None, beta=0.0):
    """Eq. 4 of one prompt: lists over rollouts of lists over tokens."""
    total = 0.0
    for k, advantage in enumerate(advantages):
        terms = []
        for i, (new, old) in enumerate(zip(token_logp[k], old_token_logp[k], strict=True)):
            if mask is None or mask[k][i]:
                term = -surrogate(ratio(new, old), advantage, low, high)[0]
                if beta:
                    gap = ref[k][i] - new
                    term += beta * (math.exp(gap) - gap - 1)
                terms.append(term)
        total += sum(terms) / len(terms) if terms else 0.0
    return total / len(advantages)


def target_row(advantages, admitted, lam):
    """The objective as advantages alone."""
    K = len(advantages)
    return [lam * advantage * (K + 1) / K if admitted else 0.0 for advantage in advantages] + [K + 1]


def negatives(keys, b, k, m):
    """The m smallest keys of row b outside its own group."""
    others = [j for j in range(len(keys)) if j // k != b]
    return sorted(others, key=lambda j: (keys[j], j))[:m]


def group_order(index):
    """Positions group by group, in the order of first appearance."""
    groups = {}
    for position, name in enumerate(index):
        groups.setdefault(name, []).append(position)
    return [position for rows in groups.values() for position in rows]


def influence(llm_rank, rm_rank, member):
    """One row of Section 4's tables: mean ranks, mean difference, coverage."""
    chosen = [(Fraction(a), Fraction(b)) for a, b, inside in zip(llm_rank, rm_rank, member, strict=True) if inside]
    coverage = Fraction(len(chosen), len(llm_rank))
    if not chosen:
        return math.nan, math.nan, math.nan, coverage
    n = len(chosen)
    return sum(a for a, _ in chosen) / n, sum(b for _, b in chosen) / n, sum(a - b for a, b in chosen) / n, coverage
