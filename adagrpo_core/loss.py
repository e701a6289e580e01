# SPDX-License-Identifier: MIT
"""The losses: supervised (eq. 2), policy gradient (eq. 4), and the two joined by the sample-level clip (eq. 5)."""

from typing import Any, NamedTuple

from ._checks import (
    REAL,
    as_number,
    check_dtype,
    check_finite,
    check_positive,
    check_same_shape,
    check_shape,
    namespace,
)
from ._compat import stop_gradient, widen
from .advantages import group_advantages
from .gate import difficulty, reliability, sample_clip
from .ranks import policy_rank, reward_ranks


class AdaGRPOLoss(NamedTuple):
    """What :func:`adagrpo_loss` returns; a named tuple, hence a pytree to JAX.

    Attributes
    ----------
    loss : array, shape (B,)
        nll + lam * clip * grpo (eq. 5). Train on its mean over the batch.
    nll : array, shape (B,)
        Supervised loss (eq. 2), nats per token.
    grpo : array, shape (B,)
        Policy-gradient loss (eq. 4), exactly 0 where it is not admitted.
    clip : array, shape (B,), boolean
        The admission c (eq. 10); its mean is the gate rate.
    difficult : array, shape (B,), boolean
        Eq. 7.
    reliable : array, shape (B,), boolean
        Eq. 9.
    policy_rank : array, shape (B,)
        Rank of the ground truth by likelihood (eq. 6).
    reward_rank : array, shape (B,)
        Rank of the ground truth by reward (eq. 8).
    negative_ranks : array, shape (B, M)
        Ranks of the negatives by reward (eq. 8).
    """

    loss: Any
    nll: Any
    grpo: Any
    clip: Any
    difficult: Any
    reliable: Any
    policy_rank: Any
    reward_rank: Any
    negative_ranks: Any


def length_normalized(token_logp, /, mask=None):
    """Mean log-probability of the tokens that count, so that lengths do not matter.

        l = (1/L) * sum_l log pi(s_l | x, s_<l)            (eq. 1, 6)

    Parameters
    ----------
    token_logp : array, shape (..., L), real floating
        Log-probability of each token, in nats.
    mask : array of the same shape, boolean, optional
        True where a token counts. Without it all do.

    Returns
    -------
    array, shape (...), dtype of ``token_logp``
        In nats per token.

    Raises
    ------
    ValueError
        For an array without a token axis, a wrong dtype, or a mask of another shape.
    TypeError
        For what is no array, or is of another library than the first; it is a ValueError as well.

    Notes
    -----
    Gradient: flows to the tokens that count; the others get exactly 0.
    NaN: masked tokens are not read. A sequence in which no token counts is NaN, without a gradient.

    References
    ----------
    arXiv 2606.08480, Section 3.1, eq. 1 and Section 5, eq. 6.

    Examples
    --------
    >>> import numpy as np
    >>> logp = np.asarray([[-1.0, -2.0, -6.0]])
    >>> length_normalized(logp).tolist(), length_normalized(logp, np.asarray([[True, True, False]])).tolist()
    ([-3.0], [-1.5])
    """
    xp = namespace({"token_logp": token_logp}, {"mask": mask})
    if len(token_logp.shape) < 1 or token_logp.shape[-1] < 1:
        raise ValueError(
            f"token_logp: expected shape (..., L) with L >= 1, got {tuple(token_logp.shape)}; "
            "put the tokens on the last axis"
        )
    check_dtype(xp, "token_logp", token_logp, REAL)
    _check_mask(xp, "mask", mask, "token_logp", token_logp)
    return _sequence_mean(xp, token_logp, mask)


def nll_loss(target_token_logp, /, mask=None):
    """The supervised loss: the negative log-likelihood of the ground truth per token.

        NLL[b] = -(1/L) * sum_l log pi(s*_l | x[b], s*_<l)            (eq. 2)

    Parameters
    ----------
    target_token_logp : array, shape (B, L), real floating
        Log-probability of every token of the ground truth, in nats.
    mask : array, shape (B, L), boolean, optional
        True where a token counts. Without it all do.

    Returns
    -------
    array, shape (B,), dtype of ``target_token_logp``
        At least 0, in nats per token.

    Raises
    ------
    ValueError
        For a wrong shape or dtype.
    TypeError
        For what is no array, or is of another library than the first; it is a ValueError as well.

    Notes
    -----
    Gradient: flows to the tokens that count; the others get exactly 0.
    NaN: masked tokens are not read. A row in which no token counts is NaN, without a gradient.

    References
    ----------
    arXiv 2606.08480, Section 3.2, eq. 2.

    Examples
    --------
    >>> import numpy as np
    >>> nll_loss(np.asarray([[-1.0, -2.0, -6.0]])).tolist()
    [3.0]
    """
    xp = namespace({"target_token_logp": target_token_logp}, {"mask": mask})
    check_shape(xp, "target_token_logp", target_token_logp, "B L", {})
    _check_mask(xp, "mask", mask, "target_token_logp", target_token_logp)
    return -_sequence_mean(xp, target_token_logp, mask)


def grpo_loss(
    token_logp,
    old_token_logp,
    advantages,
    /,
    mask=None,
    *,
    clip=None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    ref_token_logp=None,
    beta: float = 0.0,
):
    """The clipped policy-gradient loss of each prompt: mean over its rollouts of the mean over their tokens.

        GRPO[b] = -(1/K) sum_k (1/L) sum_l min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A)            (eq. 4)
        with w[b,k,l] = exp(token_logp - old_token_logp) and A = advantages[b,k]

    Parameters
    ----------
    token_logp : array, shape (B, K, L), real floating
        Log-probability of the rollouts' tokens under the policy that learns, in nats.
    old_token_logp : array, shape (B, K, L), real floating
        The same under the policy that sampled. On-policy, pass ``token_logp`` once more: the ratio is then 1. A token
        of -inf under both has ratio 0.
    advantages : array, shape (B, K), real floating
        From :func:`group_advantages`.
    mask : array, shape (B, K, L), boolean, optional
        True where a token counts. A rollout in which none counts adds 0; the mean over K still includes it.
    clip : array, shape (B,), boolean, optional
        From :func:`sample_clip`; without it every prompt is admitted. What is not admitted is removed before the
        exponential, so that the loss and every gradient there are exactly 0.
    epsilon : float
        How far the ratio may fall below 1 (and rise above it). 0.2 is PPO's; the paper names no value.
    epsilon_high : float, optional
        How far the ratio may rise, where this differs from ``epsilon`` (DAPO's clip-higher).
    ref_token_logp : array, shape (B, K, L), real floating, optional
        Log-probability under a reference policy, for ``beta``.
    beta : float
        Weight of the KL penalty to the reference, by the estimator exp(d) - d - 1 with d = ref - token_logp. Beyond
        d = 20 it goes on as its tangent, and log-probabilities below -1e25 are read as that, so that it is finite (but
        for float16, which holds no more than 65504). None by default, as in the paper's objective.

    Returns
    -------
    array, shape (B,), dtype of ``token_logp``

    Raises
    ------
    ValueError
        For a wrong shape or dtype, epsilon <= 0, epsilon_high <= 0, beta < 0 or infinite, or beta without a reference.
    TypeError
        For what is no array, or is of another library than the first; it is a ValueError as well.

    Notes
    -----
    Gradient: flows to ``token_logp`` alone; the old and reference log-probabilities and the advantages are constants.
    NaN: masked tokens and prompts that are not admitted are not read, in value and gradient. Elsewhere a NaN reaches
    the loss of its own prompt and of no other.

    Where the clip decides, the gradient is exactly 0, however far the policies are apart, -inf included; an advantage
    of 0 adds exactly 0 to both. Where the ratio decides it may overflow: a token that was bad and has become e^89 times
    as likely makes the loss of its own prompt infinite, in float32.

    Settings are read while tracing, so they cannot be traced themselves: name them in ``jax.jit``'s static_argnames.

    References
    ----------
    arXiv 2606.08480, Section 3.3, eq. 4. Clip-higher: arXiv 2503.14476. The KL estimator: arXiv 2402.03300, eq. 4.

    Examples
    --------
    >>> import numpy as np
    >>> logp = np.log(np.asarray([[[0.5], [0.5]]]))
    >>> old = np.log(np.asarray([[[0.25], [0.5]]]))  # ratios 2 and 1
    >>> grpo_loss(logp, old, np.asarray([[1.0, -1.0]])).round(3).tolist()  # -(1.2 - 1) / 2
    [-0.1]
    """
    arrays = {"token_logp": token_logp, "old_token_logp": old_token_logp, "advantages": advantages}
    xp = namespace(arrays, {"mask": mask, "clip": clip, "ref_token_logp": ref_token_logp})
    sizes = {}
    check_shape(xp, "token_logp", token_logp, "B K L", sizes)
    check_shape(xp, "old_token_logp", old_token_logp, "B K L", sizes)
    check_shape(xp, "advantages", advantages, "B K", sizes)
    epsilon = check_positive("epsilon", epsilon)
    epsilon_high = epsilon if epsilon_high is None else check_positive("epsilon_high", epsilon_high)
    beta = _check_reference(xp, ref_token_logp, beta, sizes, token_logp)
    _check_mask(xp, "mask", mask, "token_logp", token_logp)
    logp, A, live = widen(xp, token_logp), stop_gradient(advantages)[:, :, None], mask
    if clip is not None:
        check_shape(xp, "clip", clip, "B", sizes, kind="bool")
        live = clip[:, None, None] if mask is None else mask & clip[:, None, None]

    def where_live(x):  # a number in place of what is not to be read
        return x if live is None else xp.where(live, x, 0.0)

    old = where_live(stop_gradient(widen(xp, old_token_logp)))
    gain = xp.exp(_clipped_gap(xp, logp, old, A, live, epsilon, epsilon_high)) * where_live(A)
    if beta > 0:
        gain = gain - _penalty(xp, where_live(logp), where_live(stop_gradient(widen(xp, ref_token_logp)))) * beta
    # Without a mask all rollouts are as long, and the mean over tokens and the one over rollouts are one.
    mean = xp.mean(gain, axis=(1, 2)) if mask is None else xp.mean(_token_mean(xp, gain, mask, 0.0), axis=1)
    return xp.astype(-mean, token_logp.dtype, copy=False)


def adagrpo_loss(
    target_token_logp,
    token_logp,
    old_token_logp,
    rewards,
    target_reward,
    negative_rewards,
    /,
    target_mask=None,
    mask=None,
    *,
    target_old_logp=None,
    ref_token_logp=None,
    tau: float = 1 / 3,
    rho: float = 0.1,
    lam: float = 1.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    ties: str = "min",
    tol: float = 0.0,
    eps: float = 1e-4,
    correction: int = 1,
) -> AdaGRPOLoss:
    """The whole objective in one call: supervision for all, the policy gradient for the admitted.

        loss[b] = NLL[b] + lam * c[b] * GRPO[b]            (eq. 5)

    Parameters
    ----------
    target_token_logp : array, shape (B, L*), real floating
        Log-probability of the ground truth's tokens under the policy that learns, in nats. Its L* may differ from L.
    token_logp : array, shape (B, K, L), real floating
        The same of the rollouts' tokens.
    old_token_logp : array, shape (B, K, L), real floating
        The rollouts' under the policy that sampled, which the difficulty is judged by. On-policy, pass ``token_logp``.
    rewards : array, shape (B, K), real floating
        Rewards of the rollouts under their prompt. All rewards of a row are in one unit.
    target_reward : array, shape (B,), real floating
        Reward of the ground truth under its prompt.
    negative_rewards : array, shape (B, M), real floating
        Rewards of other prompts' rollouts under this prompt; see :func:`in_batch_negatives`.
    target_mask : array, shape (B, L*), boolean, optional
        True where a token of the ground truth counts.
    mask : array, shape (B, K, L), boolean, optional
        True where a token of a rollout counts. A rollout without any cannot be ranked, so its prompt is not admitted.
    target_old_logp : array, shape (B, L*) or (B,), real floating, optional
        Log-probability of the ground truth's tokens under the policy that sampled, or its mean over those that count.
        Without it ``target_token_logp`` is used, which is the same thing on-policy. If it and ``old_token_logp`` have
        two dtypes, the finer is rounded to the coarser, so that copies of the truth tie with it. Per token is safer:
        then both means are taken in one sum, and leave out what the masks leave out.
    ref_token_logp : array, shape (B, K, L), real floating, optional
        See :func:`grpo_loss`; the penalty is admitted or not along with the rest.
    tau, rho : float
        See :func:`difficulty` and :func:`reliability`.
    lam : float
        Scale of the admitted policy gradient. The paper names no value; 1 is our choice.
    epsilon, epsilon_high, beta
        See :func:`grpo_loss`.
    ties : {"min", "max", "average"}
        See :func:`policy_rank` and :func:`reward_ranks`.
    tol : float
        In nats per token: a rollout ranks above the truth by likelihood only if its mean is more than ``tol`` above
        the truth's. Copies of the truth that were scored in another pass differ from it by rounding: 1e-4 covers
        float32. It is added in float32 or wider. With one, likelihoods are ranked by "min": ``ties`` concerns rewards.
    eps, correction
        See :func:`group_advantages`.

    Returns
    -------
    AdaGRPOLoss
        ``loss`` and ``nll`` in the dtype of ``target_token_logp``, ``grpo`` in that of ``token_logp``.

    Raises
    ------
    ValueError
        Where any of the functions it is made of would.
    TypeError
        For what is no array, or is of another library than the first; it is a ValueError as well.

    Notes
    -----
    Gradient: flows to ``target_token_logp`` (NLL) and, where admitted, to ``token_logp``; to nothing else.
    NaN: anywhere in a prompt's pools it closes that prompt's clip. A prompt that is not admitted adds its NLL and
    exactly nothing else, to value and gradient, even if its rewards or ratios are NaN or infinite. An infinite reward
    can be ranked but has no advantage: among the rollouts of an admitted prompt it makes that prompt's loss NaN.

    Half precision is widened to float32 first and rounded once at the end, so ranks are those of the given values,
    but for log-probabilities of two dtypes (see ``target_old_logp``).

    Of the settings only ``lam`` may be traced; name the others in ``jax.jit``'s static_argnames.

    References
    ----------
    arXiv 2606.08480, Section 5, eq. 5 to 10.

    Examples
    --------
    >>> import numpy as np
    >>> logp = np.log(np.asarray([[[0.5], [0.3], [0.2]]]))
    >>> target = np.log(np.asarray([[0.1]]))
    >>> out = adagrpo_loss(target, logp, logp, np.asarray([[0.2, 0.3, 0.4]]), np.asarray([0.9]), np.asarray([[0.1]]))
    >>> out.clip.tolist(), out.policy_rank.tolist(), out.reward_rank.tolist(), out.negative_ranks.tolist()
    ([True], [4], [1], [[5]])
    """
    arrays = {"target_token_logp": target_token_logp, "token_logp": token_logp, "old_token_logp": old_token_logp}
    arrays |= {"rewards": rewards, "target_reward": target_reward, "negative_rewards": negative_rewards}
    optional = {"target_mask": target_mask, "mask": mask, "target_old_logp": target_old_logp}
    xp = namespace(arrays, optional | {"ref_token_logp": ref_token_logp})
    sizes = {}
    for (name, array), axes in zip(arrays.items(), ("B L*", "B K L", "B K L", "B K", "B", "B M"), strict=True):
        check_shape(xp, name, array, axes, sizes)
    _check_mask(xp, "target_mask", target_mask, "target_token_logp", target_token_logp)
    _check_mask(xp, "mask", mask, "token_logp", token_logp)
    lam = as_number("lam", lam, traced_too=True)
    check_finite(xp, "lam", lam, target_token_logp)
    check_finite(xp, "lam", lam, token_logp)
    tol = check_positive("tol", tol, zero_too=True)
    check_finite(xp, "tol", tol, target_token_logp)

    nll = nll_loss(widen(xp, target_token_logp), target_mask)
    truth = target_token_logp if target_old_logp is None else target_old_logp
    per_token = tuple(truth.shape) == tuple(target_token_logp.shape)
    check_shape(xp, "target_old_logp", truth, "B L*" if per_token else "B", sizes)
    truth, rollouts = _likelihoods(xp, truth, old_token_logp, target_mask, mask)
    pools = (truth + tol, rollouts), (target_reward, rewards, negative_rewards)
    by_policy = "min" if tol else ties  # what is within tol shall not beat the truth, at equal sums neither
    difficult = difficulty(*pools[0], tau=tau, ties=by_policy)
    reliable = reliability(*pools[1], tau=tau, rho=rho, ties=ties)
    clip = sample_clip(difficult, reliable)

    advantages = group_advantages(widen(xp, rewards), eps=eps, correction=correction)
    surrogate = {"epsilon": epsilon, "epsilon_high": epsilon_high, "ref_token_logp": ref_token_logp, "beta": beta}
    grpo = grpo_loss(widen(xp, token_logp), old_token_logp, advantages, mask, clip=clip, **surrogate)
    return AdaGRPOLoss(
        xp.astype(nll + grpo * lam, target_token_logp.dtype, copy=False),
        xp.astype(nll, target_token_logp.dtype, copy=False),
        xp.astype(grpo, token_logp.dtype, copy=False),
        clip,
        difficult,
        reliable,
        policy_rank(*pools[0], ties=by_policy),
        *reward_ranks(*pools[1], ties=ties),
    )


def _equally_precise(xp, a, b):
    """Both in the coarser dtype. Else a truth would beat its own copies, or not, by how one side was rounded."""
    if a.dtype == b.dtype:
        return a, b
    step_a, step_b = xp.finfo(a.dtype).eps, xp.finfo(b.dtype).eps
    return xp.astype(a, b.dtype) if step_a < step_b else a, xp.astype(b, a.dtype) if step_b < step_a else b


def _likelihoods(xp, truth, rollouts, target_mask, mask):
    """Mean log-probability per token of the truth (B,), which may be given as that, and of rollouts (B, K).

    Both in one sum: arrays of two shapes are added up in two orders, by which copies of the truth would not tie.
    """
    truth, rollouts = stop_gradient(truth), stop_gradient(rollouts)
    if truth.ndim == 1:
        pair = _equally_precise(xp, truth, length_normalized(widen(xp, rollouts), mask))
        return tuple(widen(xp, x) for x in pair)
    truth, rollouts = _equally_precise(xp, truth[:, None, :], rollouts)
    if not (mask is None and target_mask is None and truth.shape[-1] == rollouts.shape[-1]):
        mask = xp.ones_like(rollouts, dtype=xp.bool) if mask is None else mask
        target_mask = xp.ones_like(truth, dtype=xp.bool) if target_mask is None else target_mask[:, None, :]
        truth, rollouts = _equally_long(xp, truth, rollouts)
        mask = xp.concat(_equally_long(xp, target_mask, mask), axis=1)
    means = _token_mean(xp, widen(xp, xp.concat([truth, rollouts], axis=1)), mask, float("nan"))
    return means[:, 0], means[:, 1:]


def _equally_long(xp, a, b):
    """Both with the longer last axis, by zeros, or False, at the end."""
    gap = a.shape[-1] - b.shape[-1]

    def longer(x):
        return xp.concat([x, xp.broadcast_to(xp.zeros_like(x[..., :1]), (*x.shape[:-1], abs(gap)))], axis=-1)

    return (longer(a), b) if gap < 0 else (a, longer(b)) if gap > 0 else (a, b)


def _clipped_gap(xp, logp, old, A, live, epsilon, epsilon_high):
    """The logarithm of the ratio w; where the clip decides, that of its limit, a constant. So too where not ``live``.

    min(w A, clip(w) A) is w A, until w has passed the limit on the side that A rewards: from there on it is limit A.
    Bounded behind the exponential, a ratio that overflows would still send 0 * inf back through the gradient; and so
    would, masked behind it, what is not to be read.
    """
    # -inf less -inf is NaN. Less the least number it is -inf: what neither policy can emit has ratio 0.
    gap = logp - xp.maximum(old, xp.full_like(old, xp.finfo(old.dtype).min))
    # An advantage of 0 counts as a good one, so that its ratio is bounded too. That takes a limit that is finite and
    # above 0: epsilon >= 1 and epsilon_high = inf, which clip nothing, become the ends of what the dtype holds.
    number, bad = xp.finfo(gap.dtype), A < 0
    limit = xp.full_like(A, min(1 + epsilon_high, float(number.max) / 2), dtype=gap.dtype)
    limit = xp.log(xp.where(bad, max(1 - epsilon, number.smallest_normal), limit))
    side = xp.where(bad, -1.0, xp.ones_like(limit))
    passed = gap * side > limit * side  # no NaN has
    return xp.where(passed if live is None else passed | ~live, limit, gap)


TANGENT = 20.0  # in nats: the estimator's slope is 5e8 there, and a steeper one would only overflow sooner
FLOOR = -1e25  # in nats: 5e8 times as much still fits float32 some ten thousand times


def _penalty(xp, logp, ref):
    """The KL estimator exp(d) - d - 1 with d = ref - logp, which beyond d = 20 goes on as its tangent.

    So it stays finite and still pulls back what has run away; a bound on d would let go of it. By expm1, because near
    the reference exp(d) - 1 would round away what is left of d: d**2 / 2.
    """
    ref = xp.maximum(ref, xp.full_like(ref, FLOOR))
    d = ref - xp.where(logp < FLOOR, FLOOR, logp)
    near = xp.where(d > TANGENT, TANGENT, d)
    rise = xp.expm1(near)
    return rise - near + rise * (d - near)


def _token_mean(xp, values, mask, empty):
    """Mean over the last axis of the values that count; ``empty`` where none does, without a gradient."""
    if mask is None:
        return xp.mean(values, axis=-1)
    total = xp.sum(xp.where(mask, values, 0.0), axis=-1)
    number = xp.sum(xp.astype(mask, values.dtype), axis=-1)
    return xp.where(number > 0, total / xp.where(number > 0, number, 1.0), empty)


def _sequence_mean(xp, token_logp, mask):
    """In the dtype of ``token_logp``; NaN where no token counts."""
    return xp.astype(_token_mean(xp, widen(xp, token_logp), mask, float("nan")), token_logp.dtype, copy=False)


def _check_mask(xp, name, mask, like_name, like):
    if mask is not None:
        check_same_shape(xp, name, mask, like_name, like, kind="bool")


def _check_reference(xp, ref_token_logp, beta, sizes, token_logp):
    beta = check_positive("beta", beta, zero_too=True)
    check_finite(xp, "beta", beta, token_logp)
    if ref_token_logp is not None:
        check_shape(xp, "ref_token_logp", ref_token_logp, "B K L", sizes)
    elif beta > 0:
        raise ValueError(f"ref_token_logp: expected shape (B, K, L) for beta={beta!r}, got None; pass it, or beta=0")
    return beta
