# SPDX-License-Identifier: MIT
"""Ranks within the two diagnostic pools (eq. 6 and 8): 1 is best, and nothing is sorted."""

from typing import Any, NamedTuple

from ._checks import check_shape, check_ties, namespace


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
    TypeError
        For what is no array, or is of another library than the first; it is a ValueError as well.

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
    xp = namespace({"target_logp": target_logp, "rollout_logp": rollout_logp})
    return _ranks(xp, *policy_pool(xp, target_logp, rollout_logp), ties)[:, 0]


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
    TypeError
        For what is no array, or is of another library than the first; it is a ValueError as well.

    Notes
    -----
    Gradient: none, a rank is a count.
    NaN: ranked as minus infinity, hence never better than a number. :func:`reliability` does not read such a rank.

    Compares all with all, in an array of B x (1+M) x (K+1+M). Give all rewards in one dtype: 0.1 rounded to two dtypes
    does not tie. JAX on a CPU takes subnormal numbers for 0.

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
    arrays = {"target_reward": target_reward, "rollout_rewards": rollout_rewards, "negative_rewards": negative_rewards}
    xp = namespace(arrays)
    ranks = _ranks(xp, *reward_pool(xp, target_reward, rollout_rewards, negative_rewards), ties)
    return RewardRanks(ranks[:, 0], ranks[:, 1:])


# -- The pools, and twice the rank: the halves of ties="average" are whole then, and the gate compares integers --------


def policy_pool(xp, target_logp, rollout_logp):
    """The checked pool of eq. 6: the entry to be ranked (B, 1), and all there are (B, K+1)."""
    sizes = {}
    check_shape(xp, "target_logp", target_logp, "B", sizes)
    check_shape(xp, "rollout_logp", rollout_logp, "B K", sizes)
    target = target_logp[:, None]
    return target, xp.concat([rollout_logp, target], axis=1)


def reward_pool(xp, target_reward, rollout_rewards, negative_rewards):
    """The checked pool of eq. 8: truth and negatives to be ranked (B, 1+M), and all there are (B, K+1+M)."""
    sizes = {}
    check_shape(xp, "target_reward", target_reward, "B", sizes)
    check_shape(xp, "rollout_rewards", rollout_rewards, "B K", sizes)
    check_shape(xp, "negative_rewards", negative_rewards, "B M", sizes)
    judged = xp.concat([target_reward[:, None], negative_rewards], axis=1)
    return judged, xp.concat([rollout_rewards, judged], axis=1)


def doubled_ranks(xp, entries, pool, ties):
    """Twice the rank of each entry (B, E) in its pool (B, P), which holds the entries too. No NaN may be read."""
    check_ties(ties)
    entries, pool = entries[:, :, None], pool[:, None, :]

    def count(hits):  # int32 everywhere, where libraries disagree on the default integer
        return xp.sum(xp.astype(hits, xp.int32), axis=-1, dtype=xp.int32)

    best = count(pool > entries) + 1
    if ties == "min":
        return best + best
    worst = best - 1 + count(pool == entries)  # the entry itself is one of them
    return worst + worst if ties == "max" else best + worst


def _ranks(xp, entries, pool, ties):
    """Ranks, whole but for ties="average", whose halves float32 holds exactly. A NaN is ranked as minus infinity:
    compared as it is, it would be beaten by nobody and so come out best."""
    entries, pool = (xp.where(xp.isnan(x), float("-inf"), x) for x in (entries, pool))
    doubled = doubled_ranks(xp, entries, pool, ties)
    return xp.astype(doubled, xp.float32) / 2 if ties == "average" else doubled // 2
