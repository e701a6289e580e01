# SPDX-License-Identifier: MIT
"""Group-relative advantages (eq. 3), and the objective as advantages alone (eq. 5)."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adagrpo_core import group_advantages, grpo_loss, length_normalized, nll_loss, target_row_advantages

from . import oracle
from . import strategies as draw
from .backends import NUMPY, STRICT, TORCH, every_backend

INF, NAN = float("inf"), float("nan")
EPS = st.sampled_from([Fraction(0), Fraction(1, 10**4), Fraction(1, 2)])
without_a_warning = pytest.mark.filterwarnings("error::RuntimeWarning")


@every_backend
@given(pool=draw.pools(), eps=EPS, correction=st.sampled_from([0, 1]))
def test_advantages_are_equation_3(xp, pool, eps, correction):
    size, _, rewards, _ = pool
    found = xp.run(group_advantages, rewards, eps=float(eps), correction=correction)
    expected = [oracle.advantages(rewards[b], eps, correction) for b in range(size.B)]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@every_backend
def test_the_defaults_are_the_sample_spread_and_an_eps_of_one_ten_thousandth(xp):
    rewards = np.asarray([[1.0, 2.0, 3.0, 6.0]])  # mean 3, squared deviations 4 + 1 + 0 + 9 = 14 over 3
    spread = (14 / 3) ** 0.5 + 1e-4
    np.testing.assert_allclose(xp.run(group_advantages, rewards), np.asarray([[-2, -1, 0, 3]]) / spread, rtol=1e-12)


@every_backend
@pytest.mark.parametrize("correction, K", [(0, 1), (1, 2)])
def test_the_smallest_group_allowed_has_finite_advantages(xp, correction, K):
    rewards = np.arange(1.0, K + 1)[None, :]
    np.testing.assert_allclose(
        xp.run(group_advantages, rewards, eps=0.0, correction=correction),
        [oracle.advantages(rewards[0], 0, correction)],
        rtol=1e-12,
    )


def test_a_group_that_differs_by_rounding_alone_is_not_blown_up():
    rewards = np.asarray([[0.7, 0.7, np.nextafter(np.float32(0.7), np.float32(1))]], dtype=np.float32)
    assert np.abs(group_advantages(rewards)).max() < 1e-3
    assert np.abs(group_advantages(rewards, eps=0.0)).max() > 1  # what the paper's formula, without eps, would do


@every_backend
@without_a_warning
@given(pool=draw.pools(), bad=st.sampled_from([NAN, INF, -INF]))
def test_a_nan_or_infinite_reward_makes_its_own_row_nan_and_touches_no_other(xp, pool, bad):
    size, _, rewards, _ = pool
    spoilt = rewards.copy()
    spoilt[0, size.K - 1] = bad
    before, after = xp.run(group_advantages, rewards), xp.run(group_advantages, spoilt)
    assert np.isnan(after[0]).all()
    np.testing.assert_array_equal(after[1:], before[1:])


@every_backend
@given(pool=draw.pools())
def test_advantages_have_mean_zero_and_ignore_the_level_of_the_rewards(xp, pool):
    _, _, rewards, _ = pool
    found = xp.run(group_advantages, rewards)
    np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(xp.run(group_advantages, rewards + 5), found, rtol=1e-6, atol=1e-9)


# -- the unit of the rewards ------------------------------------------------------------------------------------------

every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)


@every_backend
@every_dtype
@given(pool=draw.pools(), power=st.sampled_from([-100, -40, -1, 1, 40, 100]), correction=st.sampled_from([0, 1]))
def test_a_unit_that_is_a_power_of_two_changes_no_bit_of_the_advantages(xp, dtype, power, pool, correction):
    rewards = pool[2].astype(dtype)
    found, other = (
        xp.run(group_advantages, unit * rewards, eps=float(unit) * 2.0**-10, correction=correction)
        for unit in (dtype(1), dtype(2) ** power)
    )
    np.testing.assert_array_equal(found, other)


@every_backend
@every_dtype
@given(
    pool=draw.pools(), unit=st.sampled_from([1e-30, 1e-19, 1e-6, 1e6, 1e19, 1e30]), correction=st.sampled_from([0, 1])
)
def test_rewards_in_any_unit_have_the_advantages_of_equation_3(xp, dtype, unit, pool, correction):
    size, _, rewards, _ = pool
    rewards = (dtype(unit) * rewards).astype(dtype)
    found = xp.run(group_advantages, rewards, eps=0.0, correction=correction)
    expected = [oracle.advantages(rewards[b].tolist(), 0, correction) for b in range(size.B)]
    # A group of a million times 0.1 is told apart by rounding alone: float32 has the spread to four digits there.
    np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == np.float32 else 1e-9, atol=1e-6)


@every_backend
@pytest.mark.parametrize("eps", [0.0, 1e-4, 1e3])
@pytest.mark.parametrize("dtype, largest", [(np.float32, 3e38), (np.float64, 1.7e308)])
def test_the_largest_rewards_do_not_overflow(xp, dtype, largest, eps):
    rewards = np.asarray([[-largest, largest, 0, 0], [largest] * 4, [-largest] * 4, [0, 0, 0, largest]], dtype=dtype)
    found = xp.run(group_advantages, rewards, eps=eps)
    ends = 1.5**0.5
    expected = [[-ends, ends, 0, 0], [0] * 4, [0] * 4, [-0.5, -0.5, -0.5, 1.5]]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert (found[1:3] == 0).all()


@pytest.mark.parametrize("xp", [NUMPY, TORCH, STRICT], ids=lambda xp: xp.name)
@pytest.mark.parametrize("dtype, least", [(np.float32, 2.0**-149), (np.float64, 2.0**-1074)])
def test_rewards_below_the_least_normal_number_still_differ(xp, dtype, least):
    """JAX on a CPU takes them for 0."""
    rewards = np.asarray([[1, 2, 4, 9], [3, 3, 3, 3], [1000, 1001, 1001, 1000]], dtype=dtype) * dtype(least)
    found = xp.run(group_advantages, rewards, eps=0.0)
    expected = [oracle.advantages(row.tolist()) for row in np.asarray([[1.0, 2, 4, 9], [3.0] * 4, [0.0, 1, 1, 0]])]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found[1] == 0).all()
    with np.errstate(all="raise", under="ignore"):  # eps in units of such rewards is more than the largest number
        for eps in (1e-4, 1.0, 1e3, 1e30):
            assert np.abs(xp.run(group_advantages, rewards, eps=eps)).max() < 1e-30


@without_a_warning
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_has_nothing_to_remark_on_infinite_and_tiny_rewards(dtype):
    special = [INF, -INF, NAN, 1e-45, -1e-45, 0.0, 1.0, -3e38]
    rewards = np.asarray([[a, b, c] for a in special for b in special for c in special], dtype=dtype)
    for eps in (0.0, 1e-4, 1.0, 1e300, INF):
        found = group_advantages(rewards, eps=eps)
        bad = ~np.isfinite(rewards).all(axis=1)
        assert np.isnan(found[bad]).all() and np.isfinite(found[~bad]).all()


@every_backend
@pytest.mark.parametrize("eps", [1e-3, 1.0, 1e3, 1e30])
def test_a_spread_far_below_eps_gives_the_advantages_of_equation_3(xp, eps):
    rewards = np.asarray([[0.0, 1.0, 5.0]], dtype=np.float32) * np.float32(1e-9)
    found = xp.run(group_advantages, rewards, eps=eps)
    np.testing.assert_allclose(found, [oracle.advantages(rewards[0].tolist(), Fraction(eps))], rtol=1e-5, atol=2e-38)


@every_backend
@every_dtype
@pytest.mark.parametrize("K, eps", [*((7, eps) for eps in (0.0, 1e-12, 1e-9, 1e-4, 1.0, 1e4)),
                                    *((K, eps) for K in (2, 3) for eps in (0.0, 1e-9, 1e-4))])
def test_equal_rewards_have_advantage_exactly_zero(xp, dtype, K, eps):
    sizes = [0.0, 1e-45, 1e-38, 1e-30, 0.1, 0.7, 1.0, 1e6, 1e19, 1e30, 3e38]
    rewards = np.asarray([[sign * size] * K for size in sizes for sign in (1, -1)], dtype=dtype)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = xp.run(group_advantages, rewards, eps=eps)
    assert (found == 0).all()


@every_backend
@without_a_warning
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_nan_or_infinity_beside_very_large_or_small_rewards_stays_in_its_row(xp, bad):
    rewards = np.asarray([[1e30, 2e30, 3e30], [1e30, bad, 3e30], [1e-30, bad, 3e-30], [1e-30, 2e-30, 3e-30]])
    found = xp.run(group_advantages, rewards.astype(np.float32), eps=0.0)
    assert np.isnan(found).tolist() == [[False] * 3, [True] * 3, [True] * 3, [False] * 3]
    np.testing.assert_allclose(found[[0, 3]], [[-1, 0, 1]] * 2, atol=1e-6)


def test_bfloat16_rewards_are_computed_in_float32_and_rounded_once():
    rewards = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 16))).to(torch.bfloat16)
    found = group_advantages(rewards)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, group_advantages(rewards.float()).to(torch.bfloat16))
    for_jax = jnp.asarray(rewards.float().numpy()).astype(jnp.bfloat16)
    assert group_advantages(for_jax).dtype == jnp.bfloat16
    assert (group_advantages(for_jax) == group_advantages(for_jax.astype(jnp.float32)).astype(jnp.bfloat16)).all()


def test_no_gradient_flows_into_rewards():
    rewards = torch.tensor([[0.7, 0.7, 0.7], [1.0, 2.0, 3.0]], requires_grad=True)
    assert not group_advantages(rewards).requires_grad


# -- the objective as advantages alone --------------------------------------------------------------------------------


@every_backend
@given(size=draw.sizes, lam=st.sampled_from([0.0, 0.5, 1.0, 3.0]), data=st.data())
def test_rollouts_are_scaled_by_lam_clip_and_the_longer_mean_and_the_truth_gets_its_row(xp, size, lam, data):
    advantages, clip = data.draw(draw.grid((size.B, size.K))), data.draw(draw.masks(size.B))
    found = xp.run(target_row_advantages, advantages, clip, lam=lam)
    expected = [oracle.target_row(advantages[b].tolist(), clip[b], lam) for b in range(size.B)]
    np.testing.assert_allclose(found, expected, rtol=1e-14)


@every_backend
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_row_that_is_not_admitted_gets_zero_advantages_whatever_they_were(xp, bad):
    advantages, clip = np.asarray([[bad, 1.0], [2.0, 4.0]]), np.asarray([False, True])
    found = xp.run(target_row_advantages, advantages, clip, lam=1.0)
    assert found.tolist() == [[0.0, 0.0, 3.0], [3.0, 6.0, 3.0]]


@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_a_stack_that_averages_over_the_rows_computes_the_gradient_of_equation_5(lam):
    """The stack is four lines of plain PyTorch, with nothing of the core in them."""
    B, K, L, words = 3, 4, 2, 5
    make = torch.Generator().manual_seed(0)
    logits = torch.randn(B, K + 1, L, words, dtype=torch.float64, generator=make)  # row K is the ground truth's
    tokens = torch.randint(words, (B, K + 1, L, 1), generator=make)
    advantages = group_advantages(torch.randn(B, K, dtype=torch.float64, generator=make))
    clip = torch.tensor([True, False, True])

    def token_logp(x):
        return x.log_softmax(-1).gather(-1, tokens)[..., 0]

    ours = logits.clone().requires_grad_()
    logp = token_logp(ours)
    loss = nll_loss(logp[:, K]) + lam * torch.where(clip, grpo_loss(logp[:, :K], logp[:, :K], advantages), 0)
    loss.mean().backward()

    theirs = logits.clone().requires_grad_()
    logp = token_logp(theirs)
    ratio = (logp - logp.detach()).exp()
    rows = target_row_advantages(advantages, clip, lam=lam)[:, :, None]
    torch.maximum(-rows * ratio, -rows * ratio.clamp(0.8, 1.2)).mean().backward()

    torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-12, atol=1e-14)
    assert ours.grad[1, :K].abs().max() == 0 < ours.grad[0, :K].abs().max()


def test_target_row_advantages_keep_bfloat16_and_stop_gradients():
    advantages = torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16, requires_grad=True)
    found = target_row_advantages(advantages, torch.tensor([True]), lam=0.1)
    assert found.dtype == torch.bfloat16
    assert not found.requires_grad


# -- length normalisation and supervision -----------------------------------------------------------------------------


@every_backend
@given(size=draw.sizes, data=st.data(), with_mask=st.booleans())
def test_likelihood_is_the_mean_over_the_tokens_that_count(xp, size, data, with_mask):
    logp = data.draw(draw.logps((size.B, size.K, size.L)))
    mask = {"mask": data.draw(draw.masks(logp.shape))} if with_mask else {}
    found = xp.run(length_normalized, logp, **mask)
    expected = [
        [float(oracle.length_normalized(logp[b, k], mask["mask"][b, k] if mask else None)) for k in range(size.K)]
        for b in range(size.B)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-15)  # NaN where no token counts, in both
    for leading in (logp[0], logp[0, 0]):  # any number of leading axes
        assert xp.run(length_normalized, leading).shape == leading.shape[:-1]


@every_backend
@given(size=draw.sizes, data=st.data(), with_mask=st.booleans())
def test_supervision_is_equation_2(xp, size, data, with_mask):
    logp = data.draw(draw.logps((size.B, size.L)))
    mask = {"mask": data.draw(draw.masks(logp.shape))} if with_mask else {}
    found = xp.run(nll_loss, logp, **mask)
    expected = [float(oracle.nll(logp[b], mask["mask"][b] if mask else None)) for b in range(size.B)]
    np.testing.assert_allclose(found, expected, rtol=1e-15)


@every_backend
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_masked_token_is_not_read(xp, bad):
    logp, mask = np.asarray([[-1.0, bad, -3.0]]), np.asarray([[True, False, True]])
    assert xp.run(length_normalized, logp, mask=mask).tolist() == [-2.0]
    assert xp.run(nll_loss, logp, mask=mask).tolist() == [2.0]


def test_bfloat16_tokens_are_summed_in_float32_and_rounded_once():
    logp = -torch.rand(100, 60, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = length_normalized(logp)
    assert found.dtype == nll_loss(logp).dtype == torch.bfloat16
    assert torch.equal(found, length_normalized(logp.float()).to(torch.bfloat16))
    for_jax = jnp.asarray(logp.float().numpy()).astype(jnp.bfloat16)
    assert (length_normalized(for_jax) == length_normalized(for_jax.astype(jnp.float32)).astype(jnp.bfloat16)).all()


@given(size=draw.sizes, data=st.data())
def test_a_rollout_that_repeats_the_truth_token_by_token_has_exactly_its_likelihood(size, data):
    floats = st.floats(-20, 0, width=32)
    target = data.draw(draw.npst.arrays(np.float32, (size.B, 7), elements=floats))
    rollouts = np.repeat(target[:, None, :], size.K, axis=1)
    for xp in (TORCH,):
        one, many = xp.run(length_normalized, target), xp.run(length_normalized, rollouts)
        assert (many == one[:, None]).all()
