# SPDX-License-Identifier: MIT
"""Ranks (eq. 6, 8) and the sample-level clip (eq. 7, 9, 10)."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adagrpo_core import difficulty, gate_diagnostics, policy_rank, reliability, reward_ranks, sample_clip

from . import oracle
from . import strategies as draw
from .backends import NUMPY, every_backend, every_tie

INF, NAN = float("inf"), float("nan")
COMPARABLE = [*draw.GRID, INF, -INF]


# -- ranks ------------------------------------------------------------------------------------------------------------


@every_backend
@given(pool=draw.pools(COMPARABLE), ties=draw.ties)
def test_policy_rank_is_the_place_in_the_sorted_pool(xp, pool, ties):
    (B, *_), target, rollouts, _ = pool
    ranks = xp.run(policy_rank, target, rollouts, ties=ties)
    assert ranks.tolist() == [
        oracle.rank(target[b], oracle.policy_pool(target[b], rollouts[b]), ties) for b in range(B)
    ]


@every_backend
@given(pool=draw.pools(COMPARABLE), ties=draw.ties)
def test_reward_ranks_are_places_in_the_sorted_pool_of_rollouts_truth_and_negatives(xp, pool, ties):
    (B, *_), *rewards = pool
    ranks = xp.run(reward_ranks, *rewards, ties=ties)
    for b in range(B):
        everything = oracle.reward_pool(*(part[b] for part in rewards))
        assert ranks.target[b] == oracle.rank(rewards[0][b], everything, ties)
        assert ranks.negatives[b].tolist() == [oracle.rank(negative, everything, ties) for negative in rewards[2][b]]


@every_backend
@given(pool=draw.pools(draw.WILD), ties=draw.ties)
def test_a_nan_is_ranked_as_minus_infinity_so_ranks_stay_in_range_and_no_nan_beats_a_number(xp, pool, ties):
    _, *rewards = pool
    floored = [np.where(np.isnan(part), -INF, part) for part in rewards]
    assert_same(xp.run(reward_ranks, *rewards, ties=ties), xp.run(reward_ranks, *floored, ties=ties))
    assert_same(xp.run(policy_rank, *rewards[:2], ties=ties), xp.run(policy_rank, *floored[:2], ties=ties))


@every_backend
@every_tie
def test_ranks_are_int32_in_every_library_and_float32_where_they_can_be_halves(xp, ties):
    target, rollouts, negatives = np.asarray([0.7]), np.asarray([[0.7, 0.1]]), np.asarray([[0.1]])
    wanted = np.float32 if ties == "average" else np.int32
    found = [xp.run(policy_rank, target, rollouts, ties=ties)]
    found += xp.run(reward_ranks, target, rollouts, negatives, ties=ties)
    assert [ranks.dtype for ranks in found] == [wanted] * 3
    expected = {"min": [1, 1, 3], "max": [2, 2, 4], "average": [1.5, 1.5, 3.5]}[ties]
    assert [ranks.ravel()[0] for ranks in found] == expected


@given(pool=draw.pools(COMPARABLE))
def test_a_rollout_that_repeats_the_truth_leaves_its_min_rank_alone(pool):
    _, target, rollouts, _ = pool
    more = np.concatenate([rollouts, target[:, None]], axis=1)
    np.testing.assert_array_equal(policy_rank(target, more), policy_rank(target, rollouts))


# -- the gate against the paper's definitions -------------------------------------------------------------------------


@every_backend
@given(data=st.data(), pool=draw.pools(draw.WILD), ties=draw.ties)
def test_difficulty_is_equation_7(xp, data, pool, ties):
    size, target, rollouts, _ = pool
    tau = data.draw(draw.taus(size.K))
    found = xp.run(difficulty, target, rollouts, tau=float(tau), ties=ties)
    assert found.dtype == bool
    assert found.tolist() == [oracle.difficulty(target[b], rollouts[b], tau, ties) for b in range(size.B)]


@every_backend
@given(data=st.data(), pool=draw.pools(draw.WILD), rho=draw.rhos, ties=draw.ties)
def test_reliability_is_equation_9(xp, data, pool, rho, ties):
    size, *rewards = pool
    tau = data.draw(draw.taus(size.K))
    found = xp.run(reliability, *rewards, tau=float(tau), rho=float(rho), ties=ties)
    expected = [oracle.reliability(*(part[b] for part in rewards), tau, rho, ties) for b in range(size.B)]
    assert found.dtype == bool
    assert found.tolist() == expected


@every_backend
def test_an_instance_is_admitted_where_it_is_difficult_and_reliable(xp):
    difficult, reliable = np.asarray([True, True, False, False]), np.asarray([True, False, True, False])
    clip = xp.run(sample_clip, difficult, reliable)
    assert clip.dtype == bool
    assert clip.tolist() == [True, False, False, False]


@every_backend
@given(data=st.data(), pool=draw.pools(draw.WILD), rho=draw.rhos, ties=draw.ties)
def test_gate_diagnostics_give_each_prompt_that_is_not_reliable_one_reason(xp, data, pool, rho, ties):
    size, target, rollouts, negatives = pool
    tau, hard = data.draw(draw.taus(size.K)), np.asarray(data.draw(st.permutations([True, False] * size.B))[: size.B])
    clear = xp.run(reliability, target, rollouts, negatives, tau=float(tau), rho=float(rho), ties=ties)
    found = xp.run(gate_diagnostics, hard, clear, target, rollouts, tau=float(tau), ties=ties)
    assert {each.dtype.name for each in found} == {"bool"}
    expected = [
        oracle.gate_diagnostics(bool(hard[b]), target[b], rollouts[b], negatives[b], tau, rho, ties)
        for b in range(size.B)
    ]
    assert [each.tolist() for each in found] == [list(each) for each in zip(*expected, strict=True)]
    assert (found.reliable.astype(int) + found.not_prominent + found.not_suppressed == 1).all()


# -- thresholds are exact ---------------------------------------------------------------------------------------------

SHARES = [Fraction(29, 100), Fraction(1, 3), Fraction(1, 10), Fraction(7, 10), Fraction(57, 100), Fraction(999, 1000)]


def every_rank(K):
    """Truths (K+1,) and rollouts (K+1, K) such that row r - 1 has rank r, without ties."""
    rollouts = np.tile(np.arange(K, 0, -1) * 1.0, (K + 1, 1))
    return K + 0.5 - np.arange(K + 1), rollouts


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_the_prominence_threshold_is_not_moved_by_binary_rounding(share):
    for K in [3, 7, 10, 19, 50, 100, 300]:
        if share * K < 1:
            continue
        target, rollouts = every_rank(K)
        expected = [rank > share * K for rank in range(1, K + 2)]
        assert difficulty(target, rollouts, tau=float(share)).tolist() == expected
        nothing = np.full((K + 1, 1), -INF)  # one negative below everything: only prominence decides
        assert reliability(target, rollouts, nothing, tau=float(share)).tolist() == [not hard for hard in expected]


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_the_suppression_threshold_is_not_moved_by_binary_rounding(share):
    for K in [3, 7, 10, 19, 50, 100, 300]:
        negative, rollouts = every_rank(K)
        truth = np.full(K + 1, INF)  # always first, so that the negative's rank in the pool is one more
        found = reliability(truth, rollouts, negative[:, None], rho=float(share))
        assert found.tolist() == [rank + 1 > (1 - share) * K for rank in range(1, K + 2)]


@pytest.mark.parametrize(
    "tau, K, last", [(0.29, 100, 29), (1 / 3, 3, 1), (0.57, 100, 57), (0.1, 30, 3), (1 - 0.71, 100, 29)]
)
def test_the_last_prominent_rank_is_the_one_that_decimal_arithmetic_gives(tau, K, last):
    """0.29 * 100 is 28.999999999999996, 0.1 * 30 is 3.0000000000000004 and 1 - 0.71 is 0.29000000000000004."""
    assert difficulty(*every_rank(K), tau=tau).tolist().index(True) == last  # rank last + 1 is the first difficult one


@pytest.mark.parametrize("kind", [np.float64, np.float32, torch.tensor, jnp.float32, lambda x: np.asarray(x, "f4")])
@pytest.mark.parametrize("share", [Fraction(29, 100), Fraction(1, 3), Fraction(57, 100)], ids=str)
def test_a_threshold_may_be_given_in_float32(kind, share):
    """0.29 in float32 is 0.28999999165."""
    for K in (100, 300):
        target, rollouts = every_rank(K)
        expected = [rank > share * K for rank in range(1, K + 2)]
        assert difficulty(target, rollouts, tau=kind(float(share))).tolist() == expected
        found = reliability(np.full(K + 1, INF), rollouts, target[:, None], rho=kind(float(share)))
        assert found.tolist() == [rank + 1 > (1 - share) * K for rank in range(1, K + 2)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_every_fraction_with_a_denominator_up_to_1000_is_read_as_what_it_is(dtype):
    random = np.random.default_rng(0)
    for d in [*range(2, 60), *random.integers(60, 1001, 200).tolist(), 997, 998, 999, 1000]:
        for n in {1, d - 1, *random.integers(1, d, 2).tolist()}:
            K = int(random.integers(1, 5001))
            K = K // d * d if d < K and K % 2 else K  # half of the time n / d of K is whole: there rounding decides
            share = dtype(n / d)
            if n * K >= d:
                last = n * K // d
                assert difficulty(*around(last, K), tau=share).tolist() == [False, True]
            last = (d - n) * K // d - 1  # among the rollouts; the truth leads the pool, hence one rank more there
            if last >= 1:
                negative, rollouts = around(last, K)
                found = reliability(np.full(2, INF), rollouts, negative[:, None], rho=share, tau=0.999)
                assert found.tolist() == [False, True]


def around(last, K):
    """Truths (2,) and rollouts (2, K): those of rank last and last + 1."""
    better = np.asarray([[last - 1], [last]])
    return np.zeros(2), np.where(np.arange(K) < better, 1.0, -1.0)


@pytest.mark.parametrize("tau, last", [(0.3334, 1667), (0.1234, 617), (0.3332, 1666), (0.9998, 4999)])
def test_a_share_of_more_digits_keeps_them(tau, last):
    assert difficulty(*around(last, 5000), tau=tau).tolist() == [False, True]


@every_backend
def test_average_ranks_are_compared_exactly_between_two_whole_thresholds(xp):
    # The truth ties with one rollout at places 2 and 3, rank 5/2; tau * K is 5/2 exactly, then just below and above.
    target, rollouts = np.asarray([0.7]), np.asarray([[1.0, 0.7, 0.1, 0.1, 0.0]])
    hard = {tau: xp.run(difficulty, target, rollouts, tau=tau, ties="average").item() for tau in (0.49, 0.5, 0.51)}
    assert hard == {0.49: True, 0.5: False, 0.51: False}
    # A negative ties with a rollout at places 3 and 4 behind the truth, rank 7/2, of K = 5.
    rewards = np.asarray([2.0]), np.asarray([[1.0, 0.7, 0.1, 0.1, 0.0]]), np.asarray([[0.7]])
    clear = {rho: xp.run(reliability, *rewards, rho=rho, ties="average").item() for rho in (0.29, 0.3, 0.31, 0.5)}
    assert clear == {0.29: False, 0.3: False, 0.31: True, 0.5: True}


def test_thresholds_are_shares_of_k_and_not_of_the_pool():
    # K = 6, tau = 1/3: rank 2 is in the top. Of the pool's 7 entries a third is 2.33, of K+1+M = 12 it is 4.
    target, rollouts = every_rank(6)
    assert difficulty(target, rollouts).tolist() == [False, False, True, True, True, True, True]
    assert reliability(target, rollouts, np.full((7, 5), -INF)).tolist() == [
        True,
        True,
        False,
        False,
        False,
        False,
        False,
    ]


def test_the_defaults_are_a_third_a_tenth_and_competition_ranks():
    target, rollouts = every_rank(30)
    assert difficulty(target, rollouts).tolist() == [rank > 10 for rank in range(1, 32)]
    truth, below = np.full(31, INF), np.full((31, 1), -INF)
    assert reliability(truth, rollouts, target[:, None]).tolist() == [rank + 1 > 27 for rank in range(1, 32)]
    assert reliability(target, rollouts, below).tolist() == [rank <= 10 for rank in range(1, 32)]
    tied = np.asarray([0.7]), np.asarray([[0.7, 0.5, 0.1]])
    assert policy_rank(*tied).item() == reward_ranks(*tied, np.asarray([[0.0]])).target.item() == 1
    assert not difficulty(*tied).item()
    assert reliability(*tied, np.asarray([[0.0]])).item()


def test_settings_may_be_numpy_scalars_or_fractions():
    target, rollouts = every_rank(100)
    plain = difficulty(target, rollouts, tau=0.29).tolist()
    for tau in (np.float64(0.29), Fraction(29, 100)):
        assert difficulty(target, rollouts, tau=tau).tolist() == plain


# -- what the gate sees, and what it does not -------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("place", ["target", "rollouts", "negatives"])
def test_a_nan_anywhere_in_a_pool_closes_its_own_row_and_no_other(xp, place):
    target = np.asarray([0.5, 0.5, 0.5])
    rollouts, negatives = np.asarray([[0.1, 0.2, 0.3]] * 3), np.asarray([[-1.0, -2.0]] * 3)
    hard = np.asarray([[0.6, 0.7, 0.8]] * 3)
    spoilt = {"target": target, "rollouts": rollouts, "negatives": negatives}
    assert xp.run(reliability, target, rollouts, negatives).tolist() == [True] * 3
    assert xp.run(difficulty, target, hard).tolist() == [True] * 3
    spoilt[place][1] = NAN if place == "target" else [NAN, *spoilt[place][1][1:]]
    if place == "rollouts":
        hard[1, 2] = NAN
    assert xp.run(reliability, target, rollouts, negatives).tolist() == [True, False, True]
    if place != "negatives":
        assert xp.run(difficulty, target, hard).tolist() == [True, False, True]


@every_backend
def test_a_nan_truth_is_not_admitted_even_where_its_stand_in_rank_would_pass(xp):
    """Ranked as minus infinity it ties with floors of minus infinity, at place 2 of tau * K = 2.97."""
    rollouts, negatives = np.asarray([[5.0, -INF, -INF]]), np.asarray([[-INF]])
    open_, closed = (xp.run(reliability, np.asarray([x]), rollouts, negatives, tau=0.99, rho=0.71) for x in (-INF, NAN))
    assert (open_.item(), closed.item()) == (True, False)


@every_backend
@given(data=st.data(), pool=draw.pools(draw.WILD), ties=draw.ties)
def test_the_order_of_rollouts_and_negatives_does_not_matter(xp, data, pool, ties):
    size, target, rollouts, negatives = pool
    k, m = data.draw(st.permutations(range(size.K))), data.draw(st.permutations(range(size.M)))
    assert_same(
        xp.run(reliability, target, rollouts[:, k], negatives[:, m], ties=ties),
        xp.run(reliability, target, rollouts, negatives, ties=ties),
    )
    assert_same(xp.run(difficulty, target, rollouts[:, k], ties=ties), xp.run(difficulty, target, rollouts, ties=ties))


@given(pool=draw.pools(draw.WILD), ties=draw.ties)
def test_only_the_order_of_the_scores_matters_not_their_scale(pool, ties):
    _, *rewards = pool
    stretched = [np.arctan(part / 7) * 3 + 5 for part in rewards]
    assert_same(NUMPY.run(reliability, *stretched, ties=ties), NUMPY.run(reliability, *rewards, ties=ties))


@every_backend
@pytest.mark.parametrize("ties, opens", [("min", False), ("average", False), ("max", True)])
def test_with_a_zero_one_reward_the_ties_decide_whether_the_gate_can_open(xp, ties, opens):
    # Only the truth is rewarded. Negatives tie with all 9 rollouts, at places 2 to 12: 2, 7 or 12, against 0.9 * 9.
    found = xp.run(reliability, np.ones(1), np.zeros((1, 9)), np.zeros((1, 2)), ties=ties)
    assert found.item() is opens


def assert_same(a, b):
    for one, other in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
        np.testing.assert_array_equal(one, other)
