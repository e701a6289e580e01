# SPDX-License-Identifier: MIT
"""Section 4's analysis: how far the reward model moves the ground truth, and for whom."""

from typing import Any, NamedTuple

from ._checks import NUMBER, check_shape, namespace
from ._compat import stop_gradient


class Stratum(NamedTuple):
    """Averages over one part of the instances; see :func:`reward_influence`.

    Attributes
    ----------
    llm_rank : array, shape ()
        Mean rank of the ground truth by likelihood.
    rm_rank : array, shape ()
        Mean rank of the ground truth by reward.
    influence : array, shape ()
        Mean of llm_rank - rm_rank; positive where the reward model moves the truth up.
    coverage : array, shape ()
        Share of all instances that are in this part, 0..1.
    """

    llm_rank: Any
    rm_rank: Any
    influence: Any
    coverage: Any


class RewardInfluence(NamedTuple):
    """The paper's three tables; see :func:`reward_influence`.

    Attributes
    ----------
    overall : Stratum
        All instances (Table 1).
    hard : Stratum or None
        The hard ones (Table 2).
    discriminable : Stratum or None
        The hard ones on which the reward model separates truth from negatives (Table 3).
    """

    overall: Stratum
    hard: Stratum | None
    discriminable: Stratum | None


def reward_influence(llm_rank, rm_rank, /, *, hard=None, discriminable=None) -> RewardInfluence:
    """How many ranks the reward model moves the ground truth up, on average and per stratum.

        influence[b] = llm_rank[b] - rm_rank[b]            (Section 4.1)

    Parameters
    ----------
    llm_rank : array, shape (B,), integers or real floating
        Rank of the ground truth among W beams by log-probability: :func:`policy_rank` with the beams as rollouts.
    rm_rank : array, shape (B,), integers or real floating
        Its rank among the same beams by reward: :func:`policy_rank` of rewards.
    hard : array, shape (B,), boolean, optional
        Which instances are hard: :func:`difficulty` with the beams as rollouts, so that K is W.
    discriminable : array, shape (B,), boolean, optional
        On which the reward model ranks the truth in the top and every negative low: :func:`reliability`. The stratum
        is its intersection with ``hard``.

    Returns
    -------
    RewardInfluence
        Three strata of float32 scalars; None for those whose mask was not given.

    Raises
    ------
    ValueError
        For a wrong shape or dtype, or ``discriminable`` without ``hard``.
    TypeError
        For what is no array, or is of another library than the first; it is a ValueError as well.

    Notes
    -----
    Gradient: none, ranks are counts.
    NaN: an empty stratum has NaN means and coverage 0. A NaN rank makes the means of its own strata NaN, and so do two
    infinite ranks of one instance the mean of their difference.

    The paper does not say what happens when the truth is not among the W beams. Our reading inserts its score, as
    eq. 6 and 8 do: the rank is then in 1..W+1, and a truth that *is* among the beams keeps its rank (ties="min").

    References
    ----------
    arXiv 2606.08480, Section 4, Tables 1 to 3.

    Examples
    --------
    >>> import numpy as np
    >>> tables = reward_influence(np.asarray([1, 9]), np.asarray([2, 3]), hard=np.asarray([False, True]))
    >>> float(tables.overall.influence), float(tables.hard.influence), float(tables.hard.coverage)
    (2.5, 6.0, 0.5)
    """
    xp = namespace({"llm_rank": llm_rank, "rm_rank": rm_rank}, {"hard": hard, "discriminable": discriminable})
    sizes = {}
    check_shape(xp, "llm_rank", llm_rank, "B", sizes, kind=NUMBER)
    check_shape(xp, "rm_rank", rm_rank, "B", sizes, kind=NUMBER)
    ranks = tuple(xp.astype(stop_gradient(rank), xp.float32) for rank in (llm_rank, rm_rank))
    overall = _stratum(xp, *ranks, xp.ones_like(llm_rank, dtype=xp.bool))
    if hard is None:
        if discriminable is not None:
            raise ValueError("hard: expected shape (B,) beside discriminable, got None; pass difficulty(...)")
        return RewardInfluence(overall, None, None)
    check_shape(xp, "hard", hard, "B", sizes, kind="bool")
    if discriminable is None:
        return RewardInfluence(overall, _stratum(xp, *ranks, hard), None)
    check_shape(xp, "discriminable", discriminable, "B", sizes, kind="bool")
    return RewardInfluence(overall, _stratum(xp, *ranks, hard), _stratum(xp, *ranks, hard & discriminable))


def _stratum(xp, llm_rank, rm_rank, member):
    """Averages over the members, by sums under a mask: an index by a boolean could not be traced."""
    number = xp.sum(xp.astype(member, xp.float32))

    def mean(values):
        total = xp.sum(xp.where(member, values, 0.0))
        return xp.where(number > 0, total / xp.where(number > 0, number, 1.0), float("nan"))

    # Two infinite ranks have no difference: NaN, of which NumPy warns unless one of them is NaN before.
    lost = xp.isinf(llm_rank) & (llm_rank == rm_rank)
    influence = llm_rank - xp.where(lost, float("nan"), rm_rank)
    averages = mean(llm_rank), mean(rm_rank), mean(influence), number / member.shape[0]
    # NumPy 1 makes float64 of a float32 scalar and a Python number.
    return Stratum(*(xp.astype(average, xp.float32, copy=False) for average in averages))
