# SPDX-License-Identifier: MIT
"""Ranks within the two diagnostic pools (eq. 6 and 8): 1 is best, and nothing is sorted."""

from typing import Any, NamedTuple

from ._checks import check_shape, check_ties
from ._compat import array_namespace


class RewardRanks(NamedTuple):
    """Ranks in the reward-side pool (eq. 8).

    Attributes
    ----------
    target : array, shape (B,)
        Rank of the ground truth.
    negatives : array, shape (B, M)
        Rank of every negative.
    """

    target: Any
    negatives: Any


def policy_rank(target_logp, rollout_logp, /, *, ties: str = "min"):
    """Where the ground truth stands among its prompt's rollouts by the policy's own likelihood.

        rank[b] = 1 + #{k : l[b,k] > l*[b]}            within the pool of eq. 6, for ties="min"

    Parameters
    ----------
    target_logp : array, shape (B,), real floating
        Length-normalised log-likelihood of the ground truth, in nats per token.
    rollout_logp : array, shape (B, K), real floating
        The same of the K rollouts, in any order. Rollouts that repeat each other, or the truth, stay in.
    ties : {"min", "max", "average"}
        The rank that equal entries share, in SciPy's words. "min" (competition ranking) is the default because a
        rollout that repeats the truth then leaves its rank alone.

    Returns
    -------
    array, shape (B,), int32 in 1..K+1
        float32 for ties="average", whose ranks are halves.

    Raises
    ------
    ValueError
        For a wrong shape or dtype, or an unknown ``ties``.

    Notes
    -----
    Gradient: none, a rank is a count.
    NaN: ranked as minus infinity, hence never better than a number. :func:`difficulty` does not read such a rank.

    References
    ----------
    arXiv 2606.08480, Section 5 (policy-side diagnostic), eq. 6.

    Examples
    --------
    >>> import numpy as np
    >>> policy_rank(np.asarray([-2.0]), np.asarray([[-1.0, -2.0, -3.0]])).tolist()
    [2]
    >>> policy_rank(np.asarray([-2.0]), np.asarray([[-1.0, -2.0, -3.0]]), ties="max").tolist()
    [3]
    """
    return _as_ranks(doubled_policy_rank(target_logp, rollout_logp, ties=ties), ties)


def reward_ranks(target_reward, rollout_rewards, negative_rewards, /, *, ties: str = "min") -> RewardRanks:
    """Where the ground truth and the negatives stand among rollouts, truth and negatives by reward.

        rank[x] = 1 + #{p in pool : p > x}            within the pool of eq. 8, for ties="min"

    Parameters
    ----------
    target_reward : array, shape (B,), real floating
        Reward of the ground truth. All rewards of a row are scored under that row's prompt, in one unit.
    rollout_rewards : array, shape (B, K), real floating
        Rewards of the K rollouts.
    negative_rewards : array, shape (B, M), real floating
        Rewards of M rollouts of *other* prompts, scored under this one.
    ties : {"min", "max", "average"}
        The rank that equal entries share. With a 0/1 reward the choice decides everything: by "min" negatives tie
        with every unrewarded rollout near the top, by "max" near the bottom.

    Returns
    -------
    RewardRanks
        ``target`` (B,) and ``negatives`` (B, M), int32 in 1..K+1+M; float32 for ties="average".

    Raises
    ------
    ValueError
        For a wrong shape or dtype, M < 1, or an unknown ``ties``.

    Notes
    -----
    Gradient: none, a rank is a count.
    NaN: ranked as minus infinity, hence never better than a number. :func:`reliability` does not read such a rank.

    References
    ----------
    arXiv 2606.08480, Section 5 (reward-side diagnostic), eq. 8.

    Examples
    --------
    >>> import numpy as np
    >>> ranks = reward_ranks(np.asarray([0.9]), np.asarray([[0.5, 0.7]]), np.asarray([[0.1, 0.6]]))
    >>> ranks.target.tolist(), ranks.negatives.tolist()
    ([1], [[5, 3]])
    """
    doubled = doubled_reward_ranks(target_reward, rollout_rewards, negative_rewards, ties=ties)
    return RewardRanks(*(_as_ranks(ranks, ties) for ranks in doubled))


# -- Twice the rank, so that the halves of ties="average" are whole and the gate compares integers ---------------------


def doubled_policy_rank(target_logp, rollout_logp, /, *, ties):
    """Twice :func:`policy_rank`, int32."""
    xp = array_namespace(target_logp, rollout_logp)
    sizes = {}
    check_shape("target_logp", target_logp, "B", sizes)
    check_shape("rollout_logp", rollout_logp, "B K", sizes)
    target = target_logp[:, None]
    return _doubled_ranks(target, xp.concat([rollout_logp, target], axis=1), ties)[:, 0]


def doubled_reward_ranks(target_reward, rollout_rewards, negative_rewards, /, *, ties):
    """Twice :func:`reward_ranks`, int32 (B,) and (B, M)."""
    xp = array_namespace(target_reward, rollout_rewards, negative_rewards)
    sizes = {}
    check_shape("target_reward", target_reward, "B", sizes)
    check_shape("rollout_rewards", rollout_rewards, "B K", sizes)
    check_shape("negative_rewards", negative_rewards, "B M", sizes)
    judged = xp.concat([target_reward[:, None], negative_rewards], axis=1)  # (B, 1+M)
    doubled = _doubled_ranks(judged, xp.concat([rollout_rewards, judged], axis=1), ties)
    return doubled[:, 0], doubled[:, 1:]


def _doubled_ranks(entries, pool, ties):
    """Twice the rank of each entry (B, E) in its pool (B, P), which holds the entries too."""
    check_ties(ties)
    xp = array_namespace(entries, pool)
    low = float("-inf")  # compared as they are, NaNs would be beaten by nobody and so come out best
    entries = xp.where(xp.isnan(entries), low, entries)[:, :, None]
    pool = xp.where(xp.isnan(pool), low, pool)[:, None, :]
    larger = _count(pool > entries)
    equal = _count(pool == entries)  # the entry itself is one of them
    if ties == "min":
        return 2 * (larger + 1)
    if ties == "max":
        return 2 * (larger + equal)
    return 2 * larger + equal + 1


def _count(hits):
    """How many are true along the last axis: int32 everywhere, where libraries disagree on the default integer."""
    xp = array_namespace(hits)
    return xp.sum(xp.astype(hits, xp.int32), axis=-1, dtype=xp.int32)


def _as_ranks(doubled, ties):
    """Ranks from doubled ranks: whole but for ties="average", whose halves float32 holds exactly."""
    xp = array_namespace(doubled)
    return xp.astype(doubled, xp.float32) / 2 if ties == "average" else doubled // 2
