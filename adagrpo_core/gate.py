# SPDX-License-Identifier: MIT
"""The sample-level clip (eq. 7, 9, 10): which instances may add a policy gradient to their supervised loss."""

from typing import Any, NamedTuple

from ._checks import as_fraction, check_shape, check_tau, namespace
from .ranks import doubled_ranks, policy_pool, reward_pool


class GateDiagnostics(NamedTuple):
    """Which instances are admitted, and why the others are not; see :func:`gate_diagnostics`.

    Attributes
    ----------
    admitted : array, shape (B,), boolean
        c: difficult and reliable.
    difficult : array, shape (B,), boolean
        D, as it was given.
    easy : array, shape (B,), boolean
        Not difficult.
    reliable : array, shape (B,), boolean
        R, as it was given.
    not_prominent : array, shape (B,), boolean
        Not reliable, and the truth is not in the top tau * K of the rollouts and itself by reward.
    not_suppressed : array, shape (B,), boolean
        Not reliable, although the truth is in that top: among the negatives, one ranks within (1 - rho) * K, or some of
        them push the truth out of the top.
    zero_spread : array, shape (B,), boolean
        All K rewards are equal and finite, so that the advantages are 0: if admitted, it teaches nothing.
    """

    admitted: Any
    difficult: Any
    easy: Any
    reliable: Any
    not_prominent: Any
    not_suppressed: Any
    zero_spread: Any


def difficulty(target_logp, rollout_logp, /, *, tau: float = 1 / 3, ties: str = "min"):
    """Whether the policy ranks the ground truth below its own top tau * K.

        D[b] = 1[ policy_rank[b] > tau * K ]            (eq. 7)

    Parameters
    ----------
    target_logp : array, shape (B,), real floating
        Length-normalised log-likelihood of the ground truth, in nats per token.
    rollout_logp : array, shape (B, K), real floating
        The same of the K rollouts.
    tau : float
        Prominence fraction, a share of K (not of the pool's K+1). A third is the paper's default. Read as the fraction
        that it rounds, so that 0.29 of 100 is exactly 29: the nearest one with a denominator up to 1000, or, if that
        is not equal to it in float32, up to a million.
    ties : {"min", "max", "average"}
        See :func:`policy_rank`.

    Returns
    -------
    array, shape (B,), boolean

    Raises
    ------
    ValueError
        For a wrong shape or dtype, tau outside (0, 1), tau * K < 1 (nothing could be in the top), or unknown ``ties``.
    TypeError
        For what is no array, or is of another library than the first; it is a ValueError as well.

    Notes
    -----
    Gradient: none, the result is boolean.
    NaN: any NaN in a row makes that row False: what cannot be compared is not admitted.

    References
    ----------
    arXiv 2606.08480, Section 5 (policy-side diagnostic), eq. 7.

    Examples
    --------
    >>> import numpy as np
    >>> rollouts = np.asarray([[-1.0, -2.0, -3.0]] * 3)
    >>> difficulty(np.asarray([-0.5, -1.5, float("nan")]), rollouts).tolist()
    [False, True, False]
    """
    xp = namespace({"target_logp": target_logp, "rollout_logp": rollout_logp})
    entries, pool = policy_pool(xp, target_logp, rollout_logp)
    K = rollout_logp.shape[-1]
    hard = doubled_ranks(xp, entries, pool, ties)[:, 0] > _doubled_threshold(check_tau(tau, K), K)
    return hard & _comparable(xp, pool)


def reliability(
    target_reward, rollout_rewards, negative_rewards, /, *, tau: float = 1 / 3, rho: float = 0.1, ties: str = "min"
):
    """Whether the reward model puts the ground truth in the top and every negative at the bottom.

        R[b] = 1[ rank*[b] <= tau * K ] * prod_m 1[ rank[b,m] > (1 - rho) * K ]            (eq. 9)

    Parameters
    ----------
    target_reward : array, shape (B,), real floating
        Reward of the ground truth, under its prompt.
    rollout_rewards : array, shape (B, K), real floating
        Rewards of the rollouts, under the same prompt.
    negative_rewards : array, shape (B, M), real floating
        Rewards of other prompts' rollouts, under the same prompt. See :func:`in_batch_negatives`.
    tau : float
        Prominence fraction of K; see :func:`difficulty`.
    rho : float
        Suppression fraction of K: negatives must rank beyond (1 - rho) * K. A tenth is the paper's default. Read as
        exactly as tau.
    ties : {"min", "max", "average"}
        See :func:`reward_ranks`. With a 0/1 reward "min" keeps the gate shut and "max" always counts unrewarded
        negatives as suppressed: the default is for rewards that seldom tie.

    Returns
    -------
    array, shape (B,), boolean

    Raises
    ------
    ValueError
        For a wrong shape or dtype, tau or rho outside (0, 1), tau * K < 1, M < 1, or an unknown ``ties``.
    TypeError
        For what is no array, or is of another library than the first; it is a ValueError as well.

    Notes
    -----
    Gradient: none, the result is boolean.
    NaN: any NaN in a row of the pool makes that row False. Infinities are compared like other numbers.

    Memory and equal rewards are as in :func:`reward_ranks`.

    References
    ----------
    arXiv 2606.08480, Section 5 (reward-side diagnostic), eq. 9.

    Examples
    --------
    >>> import numpy as np
    >>> rollouts = np.asarray([[0.5, 0.6, 0.7]] * 2)
    >>> reliability(np.asarray([0.9, 0.9]), rollouts, np.asarray([[0.1], [0.8]])).tolist()
    [True, False]
    """
    arrays = {"target_reward": target_reward, "rollout_rewards": rollout_rewards, "negative_rewards": negative_rewards}
    xp = namespace(arrays)
    entries, pool = reward_pool(xp, target_reward, rollout_rewards, negative_rewards)
    K = rollout_rewards.shape[-1]
    doubled = doubled_ranks(xp, entries, pool, ties)
    prominent = doubled[:, 0] <= _doubled_threshold(check_tau(tau, K), K)
    suppressed = xp.all(doubled[:, 1:] > _doubled_threshold(as_fraction("rho", rho), K, rest=True), axis=1)
    return prominent & suppressed & _comparable(xp, pool)


def sample_clip(difficult, reliable, /):
    """Which instances are admitted: difficult for the policy and reliably judged by the reward model.

        c[b] = D[b] * R[b]            (eq. 10)

    Parameters
    ----------
    difficult : array, shape (B,), boolean
        From :func:`difficulty`; all True switches this condition off.
    reliable : array, shape (B,), boolean
        From :func:`reliability`; all True gives the paper's ablation with difficulty alone.

    Returns
    -------
    array, shape (B,), boolean
        True: supervision plus the full policy gradient. False: supervision alone.

    Raises
    ------
    ValueError
        For a wrong shape or a dtype other than boolean.
    TypeError
        For what is no array, or is of another library than the first; it is a ValueError as well.

    Notes
    -----
    Gradient: none, the coefficient is a constant to the optimiser as the paper asks.
    NaN: cannot occur; both diagnostics answer a NaN with False.

    References
    ----------
    arXiv 2606.08480, Section 5 (the sample-level clip), eq. 10.

    Examples
    --------
    >>> import numpy as np
    >>> sample_clip(np.asarray([True, True, False]), np.asarray([True, False, True])).tolist()
    [True, False, False]
    """
    xp = namespace({"difficult": difficult, "reliable": reliable})
    sizes = {}
    check_shape(xp, "difficult", difficult, "B", sizes, kind="bool")
    check_shape(xp, "reliable", reliable, "B", sizes, kind="bool")
    return difficult & reliable


def gate_diagnostics(
    difficult, reliable, target_reward, rollout_rewards, /, *, tau: float = 1 / 3, ties: str = "min"
) -> GateDiagnostics:
    """Why instances are not admitted: to be logged, as means over the batch.

        prominent[b] = 1[ the truth's rank by reward, among the rollouts and itself, is <= tau * K ]
        not_suppressed[b] = prominent[b] * (1 - R[b]),        so that R + not_prominent + not_suppressed = 1

    Parameters
    ----------
    difficult : array, shape (B,), boolean
        From :func:`difficulty`, or from the result of :func:`adagrpo_loss`.
    reliable : array, shape (B,), boolean
        From :func:`reliability`, or from the result of :func:`adagrpo_loss`.
    target_reward : array, shape (B,), real floating
        Reward of the ground truth, as it was given there.
    rollout_rewards : array, shape (B, K), real floating
        Rewards of the rollouts, as they were given there.
    tau : float
        Prominence fraction of K. It has to be the one given there: with another, the reasons are silently wrong.
    ties : {"min", "max", "average"}
        Of the rewards; the rule given there, as tau.

    Returns
    -------
    GateDiagnostics
        Seven arrays (B,), boolean.

    Raises
    ------
    ValueError
        For a wrong shape or dtype, tau outside (0, 1), tau * K < 1, or an unknown ``ties``.
    TypeError
        For what is no array, or is of another library than the first; it is a ValueError as well.

    Notes
    -----
    Gradient: none, all are boolean.
    NaN: where truth or rollouts hold one, the truth is not prominent; where a negative alone does, and the truth is
    prominent, it counts as not suppressed.

    The negatives take no part in ``prominent``: a truth that they alone push out of the top counts as not suppressed.

    References
    ----------
    arXiv 2606.08480, Section 5 (the sample-level clip), eq. 9 and 10, taken apart.

    Examples
    --------
    >>> import numpy as np
    >>> truth, rewards = np.asarray([0.9, 0.9, 0.2]), np.asarray([[0.5, 0.6, 0.7]] * 3)
    >>> reliable = reliability(truth, rewards, np.asarray([[0.1], [0.8], [0.1]]))
    >>> found = gate_diagnostics(np.asarray([True, True, True]), reliable, truth, rewards)
    >>> found.admitted.tolist(), found.not_suppressed.tolist(), found.not_prominent.tolist()
    ([True, False, False], [False, True, False], [False, False, True])
    """
    arrays = {"difficult": difficult, "reliable": reliable, "target_reward": target_reward}
    xp = namespace(arrays | {"rollout_rewards": rollout_rewards})
    sizes = {}
    check_shape(xp, "difficult", difficult, "B", sizes, kind="bool")
    check_shape(xp, "reliable", reliable, "B", sizes, kind="bool")
    check_shape(xp, "target_reward", target_reward, "B", sizes)
    check_shape(xp, "rollout_rewards", rollout_rewards, "B K", sizes)
    beyond = difficulty(target_reward, rollout_rewards, tau=tau, ties=ties)  # eq. 7's question, of the rewards
    prominent = ~beyond & _comparable(xp, xp.concat([rollout_rewards, target_reward[:, None]], axis=1))
    return GateDiagnostics(
        admitted=sample_clip(difficult, reliable),
        difficult=difficult,
        easy=~difficult,
        reliable=reliable,
        not_prominent=~(prominent | reliable),
        not_suppressed=prominent & ~reliable,
        zero_spread=xp.all((rollout_rewards == rollout_rewards[:, :1]) & xp.isfinite(rollout_rewards), axis=1),
    )


def _comparable(xp, pool):
    """Whether a row (B, P) holds no NaN: its maximum would be one, which alone differs from itself."""
    largest = xp.max(pool, axis=1)
    return largest == largest


def _doubled_threshold(fraction, K, rest=False):
    """The largest whole number t with t <= 2 * fraction * K: a doubled rank exceeds the one where it exceeds the other.
    With ``rest``, the fraction is 1 less this one.

    In integers alone, so that a symbolic K (a compiler's) passes through.
    """
    share = fraction.denominator - fraction.numerator if rest else fraction.numerator
    return 2 * share * K // fraction.denominator
