# SPDX-License-Identifier: MIT
"""A ratio that runs away (eq. 4): value and gradient at any gap between the learning and the sampling policy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adagrpo_core import adagrpo_loss, grpo_loss

from . import oracle
from . import strategies as draw
from .backends import every_backend

INF = float("inf")
GAPS = [0.0, 0.05, -0.05, 1.0, -1.0, 50.0, -50.0, 100.0, -100.0, 1000.0, -1000.0, 1e30, -1e30, INF, -INF]
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)


def apart(gap):
    """Log-probabilities, new and old, that are so far apart; what one policy rules out has -inf."""
    return (-1.0, -1.0 - gap) if gap >= 0 else (-1.0 + gap, -1.0)


PAIRS = [*map(apart, GAPS), (-INF, -INF)]


@st.composite
def cases(draw_):
    """new, old (B, K, L), advantages (B, K), and a mask and a clip or none."""
    shape = 3, 3, 2
    chosen = draw_(draw.npst.arrays(np.int64, shape, elements=st.integers(0, len(PAIRS) - 1)))
    new, old = np.moveaxis(np.asarray(PAIRS)[chosen], -1, 0)
    advantages = draw_(draw.grid(shape[:2], [-1.0, 0.0, 1.0, -0.5, 2.0]))
    options = {"mask": draw_(draw.masks(shape))} if draw_(st.booleans()) else {}
    options |= {"clip": draw_(draw.masks(3))} if draw_(st.booleans()) else {}
    return new, old, advantages, options


def cast(dtype, case):
    new, old, advantages, options = case
    return new.astype(dtype), old.astype(dtype), advantages.astype(dtype), options


def expected(case, low=0.2, high=0.2):
    """The oracle's loss (B,), its gradient (B, K, L) by the new log-probabilities, and its largest term (B,)."""
    new, old, advantages, options = case
    loss, gradient, largest = np.zeros(new.shape[0]), np.zeros(new.shape), np.zeros(new.shape[0])
    mask, clip = options.get("mask", np.ones(new.shape, bool)), options.get("clip", np.ones(new.shape[0], bool))
    for b, k, i in np.ndindex(new.shape):
        if mask[b, k, i] and clip[b]:
            w = oracle.ratio(float(new[b, k, i]), float(old[b, k, i]), float(np.finfo(new.dtype).max))
            value, slope = oracle.surrogate(w, float(advantages[b, k]), low, high)
            share = new.shape[1] * mask[b, k].sum()
            loss[b], gradient[b, k, i] = loss[b] - value / share, -slope / share
            largest[b] = max(largest[b], abs(value / share))
    return loss, gradient, largest


def torch_gradient(new, old, advantages, options, **settings):
    leaf = torch.tensor(new, requires_grad=True)
    options = {name: torch.tensor(array) for name, array in options.items()}
    loss = grpo_loss(leaf, torch.tensor(old), torch.tensor(advantages), **options, **settings)
    loss.sum().backward()
    return loss.detach().numpy(), leaf.grad.numpy()


def jax_gradient(new, old, advantages, options, **settings):
    return tuple(map(np.asarray, _jax_gradient(tuple(settings.items()))(new, old, advantages, options)))


def jit_gradient(new, old, advantages, options, **settings):
    return tuple(map(np.asarray, _jitted_gradient(tuple(settings.items()))(new, old, advantages, options)))


@functools.cache
def _jax_gradient(settings):
    def loss(new, old, advantages, options):
        losses = grpo_loss(new, jnp.asarray(old), jnp.asarray(advantages), **options, **dict(settings))
        return losses.sum(), losses

    def both(new, old, advantages, options):
        options = {name: jnp.asarray(array) for name, array in options.items()}
        (_, losses), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(new), old, advantages, options)
        return losses, gradient

    return both


@functools.cache
def _jitted_gradient(settings):
    return jax.jit(_jax_gradient(settings))


every_gradient = pytest.mark.parametrize("gradients", [torch_gradient, jax_gradient, jit_gradient])
torch_and_jit = pytest.mark.parametrize("gradients", [torch_gradient, jit_gradient])  # jax by steps is slow


def close(found, wanted, dtype):
    # XLA and PyTorch take what is below the least normal number for 0.
    tolerance = {"rtol": 1e-5, "atol": 1e-37} if dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-300}
    np.testing.assert_allclose(found, wanted, **tolerance)


def close_sums(found, wanted, dtype, largest):
    """Where terms cancel, what is left is rounded as the largest of them was."""
    rounded = 8 * np.finfo(dtype).eps * largest
    with np.errstate(invalid="ignore"):  # infinity less infinity
        cancelled = (np.abs(wanted) < 1e-3 * largest) & (np.abs(found - wanted) <= rounded)
    close(np.where(cancelled, wanted, found), wanted, dtype)


overflow_is_meant = pytest.mark.filterwarnings("ignore:overflow encountered")


@every_backend
@every_dtype
@overflow_is_meant
@given(case=cases())
def test_the_value_at_any_gap_is_that_of_equation_4(xp, dtype, case):
    case = new, old, advantages, options = cast(dtype, case)
    found = xp.run(grpo_loss, new, old, advantages, **options)
    assert found.dtype == dtype
    loss, _, largest = expected(case)
    close_sums(found, loss, dtype, largest)


@every_gradient
@every_dtype
@given(case=cases())
def test_the_gradient_at_any_gap_is_that_of_equation_4_and_exactly_0_where_the_clip_decides(gradients, dtype, case):
    case = cast(dtype, case)
    loss, gradient, largest = expected(case)
    found = gradients(*case)
    close_sums(found[0], loss, dtype, largest)
    close(found[1], gradient, dtype)
    assert (found[1][gradient == 0] == 0).all()


@every_gradient
@every_dtype
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_one_token_at_each_gap(gradients, dtype, advantage):
    """Every pair of gap and advantage in a prompt by itself, so that no other token can cover for it."""
    new, old = (np.asarray(logps)[:, None, None] for logps in zip(*PAIRS, strict=True))
    case = cast(dtype, (new, old, np.full((len(PAIRS), 1), advantage), {}))
    loss, gradient, _ = expected(case)
    found = gradients(*case)
    close(found[0], loss, dtype)
    close(found[1], gradient, dtype)
    if advantage == 0:
        assert (found[0] == 0).all() and (found[1] == 0).all()


@every_dtype
def test_numpy_has_nothing_to_remark_on_where_the_clip_decides(dtype):
    new, old = (np.asarray(logps, dtype=dtype)[:, None, None] for logps in zip(*PAIRS, strict=True))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for advantage in (0.0, 1.0):
            grpo_loss(new, old, np.full((len(PAIRS), 1), advantage, dtype=dtype))


@torch_and_jit
@every_dtype
@pytest.mark.parametrize("epsilon, epsilon_high", [(0.999, 5.0), (1.0, 0.3), (2.0, INF), (1e-9, 1e-9), (1.0, 1e300)])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_wide_and_narrow_clip_ranges_are_kept_at_any_gap(gradients, dtype, epsilon, epsilon_high, advantage):
    pairs = [pair for pair in PAIRS if advantage <= 0 or epsilon_high < 1e9 or pair[0] - pair[1] < 80]
    new, old = (np.asarray(logps, dtype=dtype)[:, None, None] for logps in zip(*pairs, strict=True))
    case = new, old, np.full((len(pairs), 1), advantage, dtype=dtype), {}
    loss, gradient, _ = expected(case, epsilon, epsilon_high)
    found = gradients(*case, epsilon=epsilon, epsilon_high=epsilon_high)
    np.testing.assert_allclose(found[0], loss, rtol=1e-5, atol=1e-37)
    off_the_kink = new != old  # with a range of 1e-9 float32 cannot tell 1 from its limit
    np.testing.assert_allclose(found[1][off_the_kink], gradient[off_the_kink], rtol=1e-5, atol=1e-37)


@torch_and_jit
@every_dtype
def test_a_clip_range_that_is_open_above_does_not_let_a_zero_advantage_overflow(gradients, dtype):
    new, old = (np.asarray(logps, dtype=dtype)[:, None, None] for logps in zip(*PAIRS, strict=True))
    found = gradients(new, old, np.zeros((len(PAIRS), 1), dtype=dtype), {}, epsilon=1.0, epsilon_high=INF)
    assert (found[0] == 0).all() and (found[1] == 0).all()


def test_where_the_ratio_counts_the_gradient_is_the_ratio_times_the_advantage():
    new = torch.tensor([[[-1.0]]], requires_grad=True)
    grpo_loss(new, new.detach() - 0.05, torch.tensor([[1.0]])).sum().backward()
    assert new.grad.item() == pytest.approx(-math.exp(0.05), rel=1e-6)


@torch_and_jit
@every_dtype
@pytest.mark.parametrize("bad", ["new", "old", "advantages"])
def test_a_nan_is_not_taken_for_a_clipped_ratio(gradients, dtype, bad):
    arrays = {"new": np.full((3, 2, 1), -1.0), "old": np.full((3, 2, 1), -91.0), "advantages": np.ones((3, 2))}
    arrays[bad][1, 0] = math.nan
    new, old, advantages = (array.astype(dtype) for array in arrays.values())
    loss, gradient = gradients(new, old, advantages, {})
    assert np.isnan(loss).tolist() == [False, True, False]
    assert not np.isnan(gradient[[0, 2]]).any()


def test_bfloat16_is_clipped_as_float32_is():
    new = torch.tensor([[[-1.0]], [[-1.0]], [[-91.0]]], dtype=torch.bfloat16, requires_grad=True)
    old = torch.tensor([[[-91.0]], [[-INF]], [[-1.0]]], dtype=torch.bfloat16)
    loss = grpo_loss(new, old, torch.tensor([[1.0], [0.0], [-1.0]], dtype=torch.bfloat16))
    loss.sum().backward()
    assert torch.equal(loss.detach(), torch.tensor([-1.2, 0.0, 0.8], dtype=torch.bfloat16))
    assert (new.grad == 0).all()


# -- the whole objective ----------------------------------------------------------------------------------------------


def instance(gap, dtype):
    """One admitted prompt, of which the rollout that is rewarded most has run away by this gap, and so has its twin."""
    new, old = apart(gap)
    rewards = np.asarray([[0.2, 0.3, 1.0, 0.5]])
    tokens = np.full((1, 4, 2), -2.0), np.full((1, 4, 2), -2.0)
    tokens[0][0, 2], tokens[1][0, 2] = new, old
    return [x.astype(dtype) for x in (np.full((1, 2), -4e30), *tokens, rewards, np.full(1, 2.0), np.full((1, 1), -1.0))]


@jax.jit
@functools.partial(jax.grad, argnums=1)
def jitted_objective_gradient(target, new, *rest):
    return adagrpo_loss(target, new, *rest).loss.sum()


@every_dtype
@pytest.mark.parametrize("gap", [1.0, 50.0, 100.0, 1000.0, INF])
def test_the_objective_of_a_rollout_that_has_become_likely_is_finite_and_leaves_it_alone(dtype, gap):
    arrays = instance(gap, dtype)
    leaf = torch.tensor(arrays[1], requires_grad=True)
    rest = [torch.tensor(array) for array in (arrays[0], *arrays[2:])]
    out = adagrpo_loss(rest[0], leaf, *rest[1:])
    out.loss.sum().backward()
    for gradient in (leaf.grad.numpy(), np.asarray(jitted_objective_gradient(*map(jnp.asarray, arrays)))):
        assert out.clip.all() and np.isfinite(gradient).all()
        assert (gradient[0, 2] == 0).all() and (gradient[0, [0, 1]] > 0).all()
    assert torch.isfinite(out.grpo).all()


# -- the penalty ------------------------------------------------------------------------------------------------------

LOGPS = [0.0, -1.0, -22.0, -50.0, -1000.0, -1e30, -3e38]


def penalty(gradients, new, ref, dtype, beta=1.0):
    """Of tokens (N,) on-policy with advantage 0: what is left is the penalty, and its gradient."""
    new, ref = (np.asarray(logps, dtype=dtype)[:, None, None] for logps in (new, ref))
    advantages = np.zeros((len(new), 1), dtype=dtype)
    loss, gradient = gradients(new, new, advantages, {"ref_token_logp": ref}, beta=beta)
    return loss, gradient[:, 0, 0]


@torch_and_jit
@every_dtype
def test_the_penalty_and_its_gradient_are_finite_for_finite_log_probabilities(gradients, dtype):
    new, ref = zip(*[(a, b) for a in LOGPS for b in LOGPS], strict=True)
    loss, gradient = penalty(gradients, new, ref, dtype)
    assert np.isfinite(loss).all() and np.isfinite(gradient).all() and (loss >= 0).all()
    for many in (-3e38, 0.0), (0.0, -3e38):  # and so is the mean over many tokens
        new, ref = (np.full((1, 40, 100), logp, dtype=dtype) for logp in many)
        found = gradients(new, new, np.zeros((1, 40), dtype=dtype), {"ref_token_logp": ref}, beta=1.0)
        assert np.isfinite(found[0]).all() and np.isfinite(found[1]).all()


@torch_and_jit
@every_dtype
def test_the_penalty_is_the_estimator_up_to_20_and_its_tangent_beyond(gradients, dtype):
    d = np.asarray([-1000.0, -3.0, 0.0, 0.5, 10.0, 19.75, 20.0, 20.25, 100.0, 1000.0])
    loss, gradient = penalty(gradients, -1 - np.maximum(d, 0), -1 + np.minimum(d, 0), dtype)
    near = np.minimum(d, 20)
    tolerance = {"rtol": 1e-5 if dtype == np.float32 else 1e-12, "atol": 1e-6}
    np.testing.assert_allclose(loss, np.exp(near) * (1 + d - near) - d - 1, **tolerance)
    off_the_kink = d != 20
    np.testing.assert_allclose(gradient[off_the_kink], (1 - np.exp(near))[off_the_kink], **tolerance)


@torch_and_jit
def test_a_token_that_the_reference_finds_far_likelier_is_still_pulled_back(gradients):
    loss, gradient = penalty(gradients, [-30.0, -90.0, -1000.0], [-1.0, -1.0, -1.0], np.float32)
    assert (gradient < -1e8).all() and (np.diff(loss) > 0).all()


@torch_and_jit
@every_dtype
def test_the_penalty_near_the_reference_keeps_its_digits(gradients, dtype):
    d = np.concatenate([sign * np.logspace(-6, 3, 91) for sign in (1, -1)]).astype(dtype)
    loss, gradient = penalty(gradients, -np.maximum(d, 0), np.minimum(d, 0), dtype)
    exact = d.astype(np.float64)
    near = np.minimum(exact, 20)
    series = sum(exact**n / math.factorial(n) for n in range(2, 9))
    wanted = np.where(np.abs(exact) < 0.01, series, np.expm1(near) * (1 + exact - near) - near)
    rounding = 4 * np.finfo(dtype).eps * np.minimum(np.abs(exact), 1)  # as that of d itself
    assert (np.abs(loss - wanted) <= rounding + 1e-6 * wanted).all()
    np.testing.assert_allclose(gradient, -np.expm1(near), rtol=16 * np.finfo(dtype).eps)
