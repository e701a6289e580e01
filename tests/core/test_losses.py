# SPDX-License-Identifier: MIT
"""The policy-gradient loss (eq. 4) and the whole objective (eq. 5): values, and what NaN and infinity may touch."""

import functools
import inspect
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adagrpo_core import (
    adagrpo_loss,
    difficulty,
    group_advantages,
    grpo_loss,
    length_normalized,
    nll_loss,
    policy_rank,
    reliability,
    reward_ranks,
    sample_clip,
    target_row_advantages,
)

from . import oracle
from . import strategies as draw
from .backends import JIT, NUMPY, TORCH, every_backend, every_eager_backend

INF, NAN = float("inf"), float("nan")
without_a_warning = pytest.mark.filterwarnings("error::RuntimeWarning")


# -- equation 4 -------------------------------------------------------------------------------------------------------


@every_backend
@given(
    size=draw.sizes,
    data=st.data(),
    masked=st.booleans(),
    high=st.sampled_from([None, 0.28]),
    beta=st.sampled_from([0.0, 0.5]),
)
def test_the_surrogate_is_equation_4_averaged_over_tokens_then_rollouts(xp, size, data, masked, high, beta):
    shape = size.B, size.K, size.L
    new, old, ref = (data.draw(draw.logps(shape)) for _ in range(3))
    old = new + (old - new) / 8  # ratios on both sides of the clip range and within
    advantages = data.draw(draw.grid(shape[:2]))
    arrays = {"mask": data.draw(draw.masks(shape))} if masked else {}
    arrays |= {"ref_token_logp": ref} if beta else {}
    found = xp.run(grpo_loss, new, old, advantages, **arrays, epsilon=0.2, epsilon_high=high, beta=beta)
    for b in range(size.B):
        mask = arrays["mask"][b] if masked else None
        expected = oracle.grpo(new[b], old[b], advantages[b], mask, 0.2, high or 0.2, ref[b], beta)
        assert math.isclose(found[b], expected, rel_tol=1e-9, abs_tol=1e-9)


@every_backend
@pytest.mark.parametrize(
    "ratio, advantage, expected",
    [
        (1.5, 1.0, -1.2),  # rises too far: no more than 1 + epsilon is rewarded
        (0.5, 1.0, -0.5),  # falls though good: the full loss, pulling it back
        (1.5, -1.0, 1.5),  # rises though bad: the full loss, pushing it back
        (0.5, -1.0, 0.8),  # falls too far: no more than 1 - epsilon is rewarded
        (1.1, 1.0, -1.1),
        (0.9, -1.0, 0.9),
    ],
)
def test_a_worked_example_of_the_clip(xp, ratio, advantage, expected):
    new, old = np.log(np.asarray([[[ratio / 2]]])), np.log(np.asarray([[[0.5]]]))
    assert math.isclose(xp.run(grpo_loss, new, old, np.asarray([[advantage]])).item(), expected, rel_tol=1e-12)


@every_backend
def test_epsilon_high_moves_the_upper_end_of_the_clip_range_alone(xp):
    new, old = np.log(np.asarray([[[0.9], [0.1]]])), np.log(np.asarray([[[0.3], [0.3]]]))  # ratios 3 and 1/3
    advantages = np.asarray([[1.0, -1.0]])
    losses = [xp.run(grpo_loss, new, old, advantages, epsilon=0.2, epsilon_high=high).item() for high in (None, 0.2, 1)]
    np.testing.assert_allclose(losses, [(-1.2 + 0.8) / 2, (-1.2 + 0.8) / 2, (-2 + 0.8) / 2], rtol=1e-12)


@every_backend
def test_a_rollout_without_tokens_adds_nothing_and_still_counts_in_the_mean(xp):
    logp, mask = np.zeros((1, 2, 3)), np.asarray([[[True, True, False], [False, False, False]]])
    assert xp.run(grpo_loss, logp, logp, np.asarray([[3.0, 5.0]]), mask=mask).tolist() == [-1.5]


@every_backend
def test_the_penalty_is_zero_at_the_reference_and_positive_around_it(xp):
    logp, advantages = np.full((1, 1, 2), -1.0), np.zeros((1, 1))
    found = [
        xp.run(grpo_loss, logp, logp, advantages, ref_token_logp=logp + gap, beta=2.0).item()
        for gap in (0.0, 0.5, -0.5)
    ]
    np.testing.assert_allclose(found, [0, 2 * (math.exp(0.5) - 1.5), 2 * (math.exp(-0.5) - 0.5)], atol=1e-15)


@every_backend
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_masked_or_not_admitted_is_never_read_by_the_surrogate(xp, bad):
    new, old, ref = (np.random.default_rng(seed).normal(size=(3, 2, 2)) for seed in range(3))
    advantages, mask, clip = (
        np.asarray([[1.0, -1.0]] * 3),
        np.ones((3, 2, 2), dtype=bool),
        np.asarray([True, False, True]),
    )
    mask[2, 1, 0] = False
    options = {"mask": mask, "clip": clip, "beta": 0.1}
    before = xp.run(grpo_loss, new, old, advantages, ref_token_logp=ref, **options)
    for array in (new, old, ref):
        array[1], array[2, 1, 0] = bad, bad
    advantages[1] = bad
    with np.errstate(all="raise"):  # masked before the exponential: NumPy would remark on what comes of it after
        after = xp.run(grpo_loss, new, old, advantages, ref_token_logp=ref, **options)
    np.testing.assert_array_equal(after, before)
    assert after[1] == 0 != after[0]


@every_backend
@without_a_warning
def test_a_nan_that_is_admitted_reaches_the_loss_of_its_own_prompt_and_of_no_other(xp):
    new = np.random.default_rng(0).normal(size=(3, 2, 2))
    advantages = np.asarray([[1.0, -1.0]] * 3)
    before = xp.run(grpo_loss, new, new, advantages)
    spoilt = new.copy()
    spoilt[1, 0, 0] = NAN
    after = xp.run(grpo_loss, spoilt, new, advantages)
    assert np.isnan(after[1])
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


# -- equation 5 -------------------------------------------------------------------------------------------------------


@st.composite
def instances(draw_):
    """Everything that adagrpo_loss takes, in eighths where a mean decides a rank."""
    size, target_reward, rewards, negative_rewards = pool = draw_(draw.pools())
    target = draw_(draw.logps((size.B, size.L)))
    if draw_(st.booleans()):  # the truth at the bottom, or too few instances would be admitted
        target = target - 4
    old = draw_(draw.logps((size.B, size.K, size.L)))
    if draw_(st.booleans()):
        old[:, 0] = target  # a rollout repeats the truth
    new = old + draw_(draw.logps(old.shape)) / 8 + 0.125
    return pool[0], (target, new, old, rewards, target_reward, negative_rewards)


@every_eager_backend
@given(
    instance=instances(),
    data=st.data(),
    rho=draw.rhos,
    ties=draw.ties,
    masked=st.booleans(),
    lam=st.sampled_from([0.5, 2.0]),
)
def test_the_whole_objective_is_equations_2_to_10(xp, instance, data, rho, ties, masked, lam):
    size, arrays = instance
    tau = data.draw(draw.taus(size.K))
    masks = {"target_mask": data.draw(draw.masks((size.B, size.L))), "mask": data.draw(draw.masks(arrays[1].shape))}
    masks = masks if masked else {}
    options = {"tau": float(tau), "rho": float(rho), "ties": ties, "lam": lam, "epsilon": 0.1, "eps": 0.5}
    out = xp.run(adagrpo_loss, *arrays, **masks, **options)
    for b in range(size.B):
        target, new, old, rewards, target_reward, negatives = (array[b] for array in arrays)
        mask = masks["mask"][b] if masked else None
        nll = oracle.nll(target, masks["target_mask"][b] if masked else None)
        pool = [oracle.length_normalized(old[k], mask[k] if masked else None) for k in range(size.K)]
        hard = oracle.difficulty(-nll, pool, tau, ties)
        clear = oracle.reliability(target_reward, rewards, negatives, tau, rho, ties)
        grpo = (
            oracle.grpo(new, old, oracle.advantages(rewards, Fraction(1, 2)), mask, 0.1, 0.1) if hard and clear else 0
        )
        assert [out.difficult[b], out.reliable[b], out.clip[b]] == [hard, clear, hard and clear]
        np.testing.assert_allclose(out.nll[b], float(nll), rtol=1e-12)
        np.testing.assert_allclose(out.grpo[b], grpo, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(out.loss[b], float(nll) + lam * grpo, rtol=1e-9, atol=1e-9)
        everything = oracle.reward_pool(target_reward, rewards, negatives)
        assert out.reward_rank[b] == oracle.rank(target_reward, everything, ties)
        assert out.negative_ranks[b].tolist() == [oracle.rank(negative, everything, ties) for negative in negatives]
        if not any(math.isnan(entry) for entry in [*pool, nll]):
            assert out.policy_rank[b] == oracle.rank(-nll, oracle.policy_pool(-nll, pool), ties)


@every_eager_backend
@given(instance=instances(), ties=draw.ties)
def test_one_call_gives_exactly_what_its_parts_give(xp, instance, ties):
    _, (target, new, old, rewards, target_reward, negatives) = instance
    out = xp.run(adagrpo_loss, target, new, old, rewards, target_reward, negatives, ties=ties, tau=0.4, rho=0.5)
    target_logp, rollout_logp = xp.run(length_normalized, target), xp.run(length_normalized, old)
    hard = xp.run(difficulty, target_logp, rollout_logp, tau=0.4, ties=ties)
    clear = xp.run(reliability, target_reward, rewards, negatives, tau=0.4, rho=0.5, ties=ties)
    clip = xp.run(sample_clip, hard, clear)
    advantages = xp.run(group_advantages, rewards)
    grpo = xp.run(grpo_loss, new, old, advantages, clip=clip)
    nll = xp.run(nll_loss, target)
    ranks = xp.run(reward_ranks, target_reward, rewards, negatives, ties=ties)
    expected = (nll, grpo, clip, hard, clear, xp.run(policy_rank, target_logp, rollout_logp, ties=ties), *ranks)
    for found, wanted in zip(out[1:], expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(out.loss, nll + grpo, rtol=1e-12, atol=1e-12)


def admitted(B=4, K=5, L=3, M=2, seed=0):
    """Arrays of which every prompt is admitted: the truth least likely and best rewarded, the negatives worst."""
    make = np.random.default_rng(seed)
    old = make.uniform(-2, -1, (B, K, L))
    new = old + make.uniform(-0.4, 0.4, old.shape)
    target, rewards = make.uniform(-4, -3, (B, L)), make.uniform(0, 1, (B, K))
    return target, new, old, rewards, np.full(B, 2.0), make.uniform(-2, -1, (B, M))


def test_the_defaults_of_the_whole_are_those_of_its_parts():
    ours = inspect.signature(adagrpo_loss).parameters
    for part in (
        policy_rank,
        reward_ranks,
        difficulty,
        reliability,
        group_advantages,
        grpo_loss,
        target_row_advantages,
    ):
        for name, parameter in inspect.signature(part).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and name != "clip":
                assert ours[name].default == parameter.default, name


@every_backend
def test_the_truth_is_judged_by_the_sampling_policy_where_its_likelihood_is_given(xp):
    arrays = admitted()
    assert xp.run(adagrpo_loss, *arrays).clip.all()
    known = np.asarray([-3.5, -0.5, -3.5, NAN])  # of row 1 the sampling policy was sure, of row 3 nothing is known
    out = xp.run(adagrpo_loss, *arrays, target_old_logp=known)
    assert out.clip.tolist() == [True, False, True, False]
    assert out.policy_rank[:3].tolist() == [6, 1, 6]
    np.testing.assert_array_equal(out.nll, xp.run(nll_loss, arrays[0]))


DTYPES = {
    "torch": (torch.as_tensor, [torch.bfloat16, torch.float16, torch.float32, torch.float64], torch.Tensor.to),
    "jax": (jnp.asarray, [jnp.bfloat16, jnp.float16, jnp.float32], lambda x, dtype: x.astype(dtype)),
    "numpy": (np.asarray, [np.float16, np.float32, np.float64], np.ndarray.astype),
}
PAIRS = [(backend, i, j) for backend, (_, dtypes, _) in DTYPES.items() for i, j in np.ndindex(2 * (len(dtypes),))]
PAIRS = [(x, i, j) for x, i, j in PAIRS if {i, j} != {0, 1} or x == "numpy"]  # the two kinds of half hold other numbers


@pytest.mark.parametrize("form, backend, one, other", [
    *((form, *pair) for form in ("per token", "none") for pair in PAIRS),
    # Of two dtypes, a mean may have been rounded before it was taken, or after.
    *(("mean", backend, i, j) for backend, i, j in PAIRS if i == j)])  # fmt: skip
@pytest.mark.parametrize("L", [1, 3, 7, 20])
@pytest.mark.parametrize("padding", [None, (0, 0), (0, 5), (9, 0)])  # of the truth and of the rollouts; None: no masks
def test_rollouts_that_repeat_the_truth_tie_with_it_whatever_dtypes_and_padding_they_have(
        form, backend, one, other, L, padding):
    """Every rollout has the truth's tokens, kept in one dtype or two: no prompt is difficult."""
    make, dtypes, to = DTYPES[backend]
    rng, N, K = np.random.default_rng(L), 200, 8
    target, rewards = rng.uniform(-6, -1, (N, L)).astype(np.float32), rng.normal(size=(N, K)).astype(np.float32)
    rollouts, masks = np.repeat(target[:, None], K, 1), []
    for x, extra in zip((target, rollouts), padding or (0, 0), strict=True):
        counts = np.arange(L + extra) < L
        masks.append(make(np.broadcast_to(counts, (*x.shape[:-1], L + extra)).copy()))
    target, rollouts = (np.concatenate([x, rng.normal(size=(*x.shape[:-1], extra))], -1)
                        for x, extra in zip((target, rollouts), padding or (0, 0), strict=True))
    arrays = target, rollouts, rewards, np.full(N, 9.0), np.full((N, 1), -9.0)
    target, rollouts, *rewards = (make(np.asarray(x, np.float32)) for x in arrays)
    target, rollouts = to(target, dtypes[one]), to(rollouts, dtypes[other])
    masks = (None, None) if padding is None else masks

    def difficult(shift):
        mean = length_normalized(target, masks[0]) - shift
        old = {"none": None, "mean": mean, "per token": target - shift}[form]
        at = target - shift if form == "none" else target
        return adagrpo_loss(at, rollouts, rollouts, *rewards, *masks, target_old_logp=old).difficult

    tol = 1e-5 if form == "mean" and (backend == "jax" or padding) else 0  # two sums may be added up in two orders
    assert not difficult(-tol).any() and difficult(1).all()


@pytest.mark.parametrize("form, backend, one", [
    (form, backend, i) for form in ("per token", "mean", "none") for backend, (_, dtypes, _) in DTYPES.items()
    for i, dtype in enumerate(dtypes)
    if form != "mean" or dtype not in (torch.bfloat16, jnp.bfloat16)])  # there a mean has steps of .03125 itself
def test_a_rollout_beats_the_truth_only_by_more_than_tol_in_any_dtype(form, backend, one):
    """The first of four tokens is .03125 nats likelier in the rollouts: the least step that bfloat16 has there."""
    make, dtypes, to = DTYPES[backend]
    target, rollouts = np.full((2, 4), -5.0), np.full((2, 8, 4), -5.0)
    rollouts[..., 0] += 0.03125
    arrays = target, rollouts, np.tile(np.arange(8.0), (2, 1)), np.full(2, 9.0), np.full((2, 1), -9.0)
    target, rollouts, *rewards = (make(np.asarray(x, np.float32)) for x in arrays)
    target, rollouts = to(target, dtypes[one]), to(rollouts, dtypes[one])
    old = {"per token": target, "mean": length_normalized(target), "none": None}[form]
    apart = 0.03125 / 4  # per token
    for ties in ("max", "average"):  # exactly tol apart, and a tol that rounding takes away: no copy beats the truth
        for new, tol in ((rollouts, apart), (to(make(np.full((2, 8, 4), -5.0, np.float32)), dtypes[one]), 1e-30)):
            out = adagrpo_loss(target, new, new, *rewards, target_old_logp=old, tol=tol, ties=ties)
            assert out.policy_rank.tolist() == [1, 1] and not any(out.difficult.tolist())
    for tol, rank in ((0.0, 9), (apart / 2, 9), (apart, 1), (2 * apart, 1)):
        out = adagrpo_loss(target, rollouts, rollouts, *rewards, target_old_logp=old, tol=tol)
        assert out.policy_rank.tolist() == [rank, rank] and out.difficult.tolist() == [rank > 2] * 2, tol


@every_backend
def test_the_likelihood_that_the_sampling_policy_gave_the_truth_may_be_given_per_token(xp):
    """Then its mean is taken over the tokens that count; NaN behind the mask is not read."""
    arrays, mask = admitted(), np.asarray([[True] * 3, [True, False, False], [True, True, False], [True] * 3])
    known = np.asarray([[-3.5] * 3, [-0.5, NAN, -99], [-3.0, -4.0, NAN], [-1.0, NAN, -1.0]])
    assert arrays[0].shape == known.shape
    out = xp.run(adagrpo_loss, *arrays, mask, target_old_logp=known)
    mean = xp.run(adagrpo_loss, *arrays, mask, target_old_logp=np.asarray([-3.5, -0.5, -3.5, NAN]))
    assert out.clip.tolist() == mean.clip.tolist() == [True, False, True, False]
    assert out.policy_rank.tolist() == mean.policy_rank.tolist()
    np.testing.assert_array_equal(out.loss, mean.loss)


@every_backend
def test_difficulty_is_judged_by_the_policy_that_sampled_not_by_the_one_that_learns(xp):
    target, new, old, *rewards = admitted()
    assert xp.run(adagrpo_loss, target, new - 9, old, *rewards).clip.all()
    assert not xp.run(adagrpo_loss, target, new, old - 9, *rewards).clip.any()


@every_backend
def test_the_truth_may_have_another_length_than_the_rollouts(xp):
    target, *rest = admitted()
    short = xp.run(adagrpo_loss, target[:, :1], *rest)
    np.testing.assert_allclose(short.nll, -target[:, 0], rtol=1e-15)


# -- NaN and infinity: an instance that is not admitted adds its NLL and exactly nothing else -------------------------

CLOSED = 1  # the row that is made to fail the gate, and is then poisoned


def poisoned(how, bad):
    """Arrays whose row CLOSED is not admitted, before and after a value that cannot be computed with is put there."""
    target, new, old, rewards, target_reward, negatives = clean = admitted()
    ref = old - 0.1
    # Closed by the diagnostic that the poison leaves alone, or by both.
    if "reward" in how or how == "everything":
        target[CLOSED] = -0.5  # not difficult
    if "reward" not in how:
        target_reward[CLOSED] = -9.0  # not reliable
    before = [array.copy() for array in (*clean, ref)]
    for array in {
        "rewards": (rewards, negatives),
        "one reward": (rewards[:, :1],),
        "log-probabilities": (new,),
        "sampling log-probabilities": (old,),
        "reference": (ref,),
        "everything": (new, old, ref, rewards, negatives, target_reward),
    }[how]:
        array[CLOSED] = bad
    return before, [*clean, ref]


WAYS = ["rewards", "one reward", "log-probabilities", "sampling log-probabilities", "reference", "everything"]
poisons = pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
ways = pytest.mark.parametrize("how", WAYS)


@every_backend
@poisons
@ways
@without_a_warning
def test_value_an_instance_that_is_not_admitted_adds_exactly_its_nll(xp, how, bad):
    before, after = poisoned(how, bad)
    out, clean = (
        xp.run(adagrpo_loss, *arrays[:6], ref_token_logp=arrays[6], beta=0.1, lam=3.0) for arrays in (after, before)
    )
    assert out.clip.tolist() == clean.clip.tolist() == [True, False, True, True]
    assert out.grpo[CLOSED] == 0
    assert out.loss[CLOSED] == out.nll[CLOSED] == xp.run(nll_loss, after[0])[CLOSED]
    np.testing.assert_array_equal(out.loss, clean.loss)


@without_a_warning
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e-45, 1e308, -1e308], ids=str)
@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("closed", [True, False])
def test_numpy_has_nothing_to_remark_on_whatever_one_input_is(place, bad, closed):
    arrays = admitted()
    if closed:
        arrays[4 if place != 4 else 5][CLOSED] = -9.0 if place != 4 else NAN
    arrays[place].reshape(4, -1)[CLOSED, 0] = bad
    if place == 1 and bad > 0 and not closed:
        return  # a ratio that overflows
    out = adagrpo_loss(*arrays)
    assert np.isfinite(out.loss[[0, 2, 3]]).all()
    assert out.loss[CLOSED] == out.nll[CLOSED] or not closed or np.isnan(out.nll[CLOSED])


def gradients_in_torch(arrays):
    leaves = [torch.tensor(array, requires_grad=True) for array in arrays]
    loss = adagrpo_loss(*leaves[:6], ref_token_logp=leaves[6], beta=0.1, lam=3.0).loss
    loss.mean().backward()
    return [
        np.zeros_like(array) if leaf.grad is None else leaf.grad.numpy()
        for leaf, array in zip(leaves, arrays, strict=True)
    ]


def _mean_loss(*arrays):
    return adagrpo_loss(*arrays[:6], ref_token_logp=arrays[6], beta=0.1, lam=3.0).loss.mean()


_gradient = jax.grad(_mean_loss, argnums=tuple(range(7)))
_jitted_gradient = jax.jit(_gradient)


def gradients_in_jax(arrays):
    return [np.asarray(gradient) for gradient in _gradient(*map(jnp.asarray, arrays))]


def gradients_in_jit(arrays):
    return [np.asarray(gradient) for gradient in _jitted_gradient(*map(jnp.asarray, arrays))]


# JAX by steps is slow, and does what it does compiled: one poison will do.
every_gradient_of_poisons = pytest.mark.parametrize(
    "gradients, bad",
    [(g, bad) for bad in (NAN, INF, -INF) for g in (gradients_in_torch, gradients_in_jit)] + [(gradients_in_jax, NAN)],
)


@functools.cache
def gradients_before(gradients, how):
    """Whatever is put there afterwards."""
    return gradients(poisoned(how, 0.0)[0])


@every_gradient_of_poisons
@ways
def test_gradient_an_instance_that_is_not_admitted_adds_exactly_that_of_its_nll(gradients, how, bad):
    found, clean = gradients(poisoned(how, bad)[1]), gradients_before(gradients, how)
    assert (found[1][CLOSED] == 0).all() and (found[1][[0, 2, 3]] != 0).any()
    np.testing.assert_allclose(found[0], np.full((4, 3), -1 / 12), rtol=1e-15)  # of mean_b mean_l -logp
    for one, other in zip(found, clean, strict=True):
        np.testing.assert_array_equal(one, other)
    for constant in found[2:]:  # old and reference log-probabilities and all rewards
        assert (constant == 0).all()


@every_gradient_of_poisons
def test_gradient_a_masked_token_is_never_read(gradients, bad):
    def run(arrays):
        target_mask, mask = np.ones((4, 3), dtype=bool), np.ones((4, 5, 3), dtype=bool)
        target_mask[:, 2], mask[:, 3, 1:] = False, False
        return masked_gradients(gradients, arrays, target_mask, mask)

    clean = [*admitted(), admitted()[2] - 0.1]
    spoilt = [array.copy() for array in clean]
    spoilt[0][:, 2] = bad
    for array in (spoilt[1], spoilt[2], spoilt[6]):
        array[:, 3, 1:] = bad
    (value, found), (clean_value, expected) = run(spoilt), run(clean)
    assert value == clean_value
    assert (found[0][:, 2] == 0).all() and (found[1][:, 3, 1:] == 0).all() and (found[1] != 0).any()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def masked_gradients(gradients, arrays, target_mask, mask):
    if gradients is gradients_in_torch:
        leaves = [torch.tensor(array, requires_grad=True) for array in arrays[:2]]
        rest = [torch.tensor(array) for array in arrays[2:]]
        masks = torch.tensor(target_mask), torch.tensor(mask)
        out = adagrpo_loss(*leaves, *rest[:4], *masks, ref_token_logp=rest[4], beta=0.1)
        assert out.clip.all()
        out.loss.mean().backward()
        return out.loss.mean().item(), [leaf.grad.numpy() for leaf in leaves]

    function = _jitted_masked_gradient if gradients is gradients_in_jit else _masked_gradient
    value, found = function(*map(jnp.asarray, arrays), jnp.asarray(target_mask), jnp.asarray(mask))
    return float(value), [np.asarray(gradient) for gradient in found]


def _masked_mean_loss(target, new, old, rewards, target_reward, negatives, ref, *masks):
    out = adagrpo_loss(target, new, old, rewards, target_reward, negatives, *masks, ref_token_logp=ref, beta=0.1)
    return out.loss.mean()


_masked_gradient = jax.value_and_grad(_masked_mean_loss, argnums=(0, 1))
_jitted_masked_gradient = jax.jit(_masked_gradient)


@pytest.mark.parametrize("xp", [NUMPY, TORCH, JIT], ids=lambda xp: xp.name)
@without_a_warning
def test_prompts_do_not_see_each_other(xp):
    arrays = admitted(B=4)
    together = xp.run(adagrpo_loss, *arrays)
    for b in range(4):
        alone = xp.run(adagrpo_loss, *(array[b : b + 1] for array in arrays))
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one[0], other[b], rtol=1e-14)
