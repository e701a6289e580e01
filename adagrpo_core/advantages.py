# SPDX-License-Identifier: MIT
"""Group-relative advantages (eq. 3), and the whole objective as advantages alone."""

from ._checks import as_number, check_count, check_finite, check_positive, check_shape, namespace
from ._compat import stop_gradient, widen


def group_advantages(rewards, /, *, eps: float = 1e-4, correction: int = 1):
    """How much better each rollout did than the rollouts of its prompt, in units of their spread.

        A[b,k] = (r[b,k] - mean_j r[b,j]) / (std_j r[b,j] + eps)            (eq. 3)

    Parameters
    ----------
    rewards : array, shape (B, K), real floating
        Row b holds the K rewards of prompt b, in any order and unit: but for ``eps``, 1e-30 or 1e30 times the same
        rewards have the same advantages, even where float32 cannot hold their squares.
    eps : float
        Added to the spread, in the unit of the rewards. The paper's formula has none (0 is allowed); 1e-4 is our
        choice and keeps a nearly constant group from being blown up to unit spread.
    correction : int
        The spread divides by K - correction: 1 is the sample's, 0 the population's. Peers differ in silence; 1 is our
        choice, as in PyTorch.

    Returns
    -------
    array, shape (B, K), dtype of ``rewards``
        Every row has mean 0. A group of equal rewards gets exactly 0, for any eps.

    Raises
    ------
    ValueError
        For a wrong shape or dtype, eps < 0, a correction that is no whole number >= 0, or K <= correction.
    TypeError
        For what is no array; it is a ValueError as well.

    Notes
    -----
    Gradient: stopped; to the policy a reward is a number.
    NaN: a NaN or infinite reward makes its own row NaN and touches no other. Give invalid rollouts a finite floor.

    References
    ----------
    arXiv 2606.08480, Section 3.3, eq. 3.

    Examples
    --------
    >>> import numpy as np
    >>> group_advantages(np.asarray([[1.0, 2.0, 3.0], [0.7, 0.7, 0.7]]), eps=0.0).tolist()
    [[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    xp = namespace({"rewards": rewards})
    sizes = {}
    check_shape(xp, "rewards", rewards, "B K", sizes)
    eps = check_positive("eps", eps, zero_too=True)
    correction = check_count("correction", correction, least=0)
    if sizes["K"] <= correction:
        raise ValueError(
            f"rewards: expected K > correction={correction}, got K={sizes['K']}; "
            "sample more rollouts per prompt, or pass correction=0"
        )
    wide = stop_gradient(widen(xp, rewards))
    low, high = xp.min(wide, axis=1, keepdims=True), xp.max(wide, axis=1, keepdims=True)
    size = xp.maximum(high, -low)
    # Large rewards are divided by 1024, which is exact: 3e38 less -3e38 overflows float32, and XLA, which divides by
    # multiplying, takes 1 / 3e38 for 0. Small rewards are not, because the least numbers would lose bits.
    part = xp.where(size > 1, 2.0**-10, xp.ones_like(high))
    # An infinite reward makes its row NaN at once: infinity less infinity would too, but NumPy warns of it.
    low = xp.where(size < float("inf"), low * part, float("nan"))
    unit = high * part - low
    # Groups without spread, or with one so small that eps / unit would overflow: their numerators are 0, or as good as
    # that beside eps, so that they need no unit.
    most = float(xp.finfo(wide.dtype).max)
    eps = min(eps, most)
    flat = unit <= eps * (4 / most)
    unit = xp.where(flat, 1.0, unit)
    # Measured from the least reward of the group, equal rewards differ by exactly 0. Measured from the mean they need
    # not: seven float32 rewards of 0.7 then have a spread of 6e-8, and a tiny eps makes that advantages of 0.8.
    # And measured in units of the group's range, because a spread squares: 1e-30 would vanish and 1e30 overflow.
    wide = (wide * part - low) / unit
    centred = wide - xp.mean(wide, axis=1, keepdims=True)
    spread = xp.sqrt(xp.sum(centred * centred, axis=1, keepdims=True) / (sizes["K"] - correction))
    scale = xp.where(flat, max(1.0, eps), spread + eps * part / unit)
    return xp.astype(centred / scale, rewards.dtype, copy=False)


def target_row_advantages(advantages, clip, /, *, lam: float = 1.0):
    """The objective as advantages alone, for a training stack that accepts nothing else.

        A'[b,k] = lam * c[b] * A[b,k] * (K+1)/K   for the K rollouts            (eq. 5)
        A'[b,K] = K+1                             for the ground truth, appended as one more row

    A stack that averages A' times the ratio over the K+1 rows then has the gradient of eq. 5: at ratio 1 the policy
    gradient of the ground truth's row is the gradient of its length-normalised NLL.

    Parameters
    ----------
    advantages : array, shape (B, K), real floating
        From :func:`group_advantages`.
    clip : array, shape (B,), boolean
        From :func:`sample_clip`.
    lam : float
        Scale of the admitted policy gradient. The paper names no value; 1 is our choice.

    Returns
    -------
    array, shape (B, K+1), dtype of ``advantages``

    Raises
    ------
    ValueError
        For a wrong shape or dtype, or a ``lam`` that is not one finite number.
    TypeError
        For what is no array, or is of another library than the first; it is a ValueError as well.

    Notes
    -----
    Gradient: stopped, as for any advantage.
    NaN: a row that is not admitted gets exactly 0 for its rollouts, whatever its advantages are.

    Valid on-policy only (away from ratio 1 the ground truth's row is ratio-clipped too), for completions of one length
    or a stack that averages per sequence first. A KL or entropy term inside the stack escapes the clip. Rows that are
    not admitted stay in the batch: dropping them would rescale the loss. In bfloat16 K + 1 is rounded from K = 256 on:
    pass float32 advantages.

    References
    ----------
    arXiv 2606.08480, Section 5, eq. 5; the reformulation is ours.

    Examples
    --------
    >>> import numpy as np
    >>> advantages = np.asarray([[1.0, -1.0], [float("nan"), 1.0]])
    >>> target_row_advantages(advantages, np.asarray([True, False]), lam=0.5).tolist()
    [[0.75, -0.75, 3.0], [0.0, 0.0, 3.0]]
    """
    xp = namespace({"advantages": advantages, "clip": clip})
    sizes = {}
    check_shape(xp, "advantages", advantages, "B K", sizes)
    check_shape(xp, "clip", clip, "B", sizes, kind="bool")
    lam = as_number("lam", lam, traced_too=True)
    check_finite(xp, "lam", lam, advantages)
    K = sizes["K"]
    wide = stop_gradient(widen(xp, advantages))
    rollouts = xp.where(clip[:, None], wide, 0.0) * (lam * ((K + 1) / K))
    rows = xp.concat([rollouts, xp.full_like(wide[:, :1], K + 1)], axis=1)
    return xp.astype(rows, advantages.dtype, copy=False)
