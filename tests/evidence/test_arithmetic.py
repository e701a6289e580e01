# SPDX-License-Identifier: MIT
"""The arithmetic over seeds and users, on cases worked by hand."""

import math

import arithmetic
import numpy as np
import pytest
from arithmetic import Interval


def test_the_interval_is_a_t_interval_of_paired_differences():
    # HR of two arms on three seeds whose levels differ by far more than the arms do: differences 1, 2, 3.
    a, b = np.array([31.0, 52.0, 13.0]), np.array([30.0, 50.0, 10.0])
    found = arithmetic.over_seeds(a - b)
    # Mean 2, standard deviation 1, standard error 1/sqrt(3); the 97.5 % point of t with 2 degrees of freedom: 4.3027.
    assert found == pytest.approx((2, 2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)


def test_one_seed_has_no_interval_and_equal_seeds_an_interval_of_no_width():
    mean, low, high = arithmetic.over_seeds([0.5])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)
    assert arithmetic.over_seeds([0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_a_seed_that_cannot_say_is_left_out():
    assert arithmetic.over_seeds([1.0, math.nan, 2.0, 3.0]) == arithmetic.over_seeds([1.0, 2.0, 3.0])
    assert all(map(math.isnan, arithmetic.over_seeds([math.nan])))


def test_the_best_checkpoint_has_the_highest_hr_and_is_the_earliest_of_equals():
    curve = [{"step": step, "hr@10": hr} for step, hr in ((50, 0.2), (100, 0.4), (150, 0.4), (200, 0.3))]
    assert arithmetic.best_step(curve) == 100


def test_the_dose_has_the_highest_mean_over_tuning_seeds_and_is_the_smallest_of_equals():
    # Means .30, .35, .35, .10; the best single number belongs to the last.
    trials = {10.0: [0.3, 0.4], 3.0: [0.4, 0.3], 1.0: [0.3, 0.3], 30.0: [0.5, -0.3]}
    assert arithmetic.choose_dose(trials) == 3.0


def test_bins_go_by_rank_and_beyond_the_beams_by_likelihood():
    # Width 50. Found: rows 4 (rank 1), 2 (rank 7), 0 (rank 50). Not found: 5 (-1.0), 1 (-2.0), 3 (-3.0).
    rank = np.array([50, 10**6, 7, 10**6, 1, 10**6])
    logp = np.array([-9.0, -2.0, -0.1, -3.0, -8.0, -1.0])
    bins = arithmetic.difficulty_bins(rank, logp, 50, n=3)
    assert [part.tolist() for part in bins] == [[4, 2], [0, 5], [1, 3]]
    # Another policy finds rows 2 and 1 within 10, and 3 at 11.
    assert arithmetic.hr_in_bins(np.array([20, 10, 3, 11, 99, 30]), bins) == [0.5, 0.0, 0.5]


def test_five_bins_have_equal_mass():
    bins = arithmetic.difficulty_bins(np.arange(6000) % 60 + 1, np.zeros(6000), 50)
    assert [len(part) for part in bins] == [1200] * 5
    assert sorted(np.concatenate(bins).tolist()) == list(range(6000))


def test_users_are_split_in_halves_that_follow_the_seed():
    split = arithmetic.split_users(4000, 0)
    assert split.sum() == 2000
    assert (split == arithmetic.split_users(4000, 0)).all() and (split != arithmetic.split_users(4000, 1)).any()


def test_a_lift_compares_the_treated_with_the_others():
    # Treated users 0, 1, 2 under the treatment: 3, 5 (and one who never came). The others under the control: 1, 3.
    treatment = np.array([3.0, 5.0, np.nan, 100.0, 100.0])
    control = np.array([100.0, 100.0, 100.0, 1.0, 3.0])
    found = arithmetic.lift(treatment, control, np.array([True, True, True, False, False]))
    # Means 4 and 2: lift 1. Variances 2 and 2, over 2 users each: standard error sqrt(2) users' units, / 2.
    assert found == pytest.approx((1.0, math.sqrt(2) / 2))


def test_lifts_of_independent_worlds_are_pooled():
    # Errors 3 and 4 of two worlds: the mean has error sqrt(9 + 16) / 2 = 2.5.
    assert arithmetic.pooled_lift([1.0, 3.0], [3.0, 4.0]) == pytest.approx((2, 2 - 1.95996 * 2.5, 2 + 1.95996 * 2.5),
                                                                           abs=1e-4)


ABOVE, ACROSS, BELOW = Interval(2, 1, 3), Interval(1, -1, 3), Interval(-2, -3, -1)
ALONE = Interval(2, math.nan, math.nan)


@pytest.mark.parametrize("intervals, answer", [
    ([ABOVE], "yes"), ([ABOVE, ABOVE], "yes"), ([ACROSS], "no"), ([ABOVE, ACROSS], "no"), ([BELOW], "opposite"),
    ([ABOVE, BELOW], "opposite"), ([ALONE], "no"), ([Interval(1, 0, 2)], "no"),
])
def test_a_finding_is_seen_if_all_its_intervals_lie_above_0(intervals, answer):
    assert arithmetic.seen(intervals) == answer


@pytest.mark.parametrize("by_rule, words", [
    (dict(equal="yes", tuned="yes"), "confirmed"),
    (dict(any="yes"), "confirmed"),
    (dict(equal="yes"), "confirmed at equal lambda; the other not run"),
    (dict(equal="yes", tuned="no"), "only at equal lambda"),
    (dict(equal="no", tuned="yes"), "only at tuned lambda"),
    (dict(equal="yes", tuned="opposite"), "only at equal lambda (the opposite at tuned lambda)"),
    (dict(equal="no", tuned="no"), "not seen"),
    (dict(any="no"), "not seen"),
    (dict(equal="opposite", tuned="no"), "not seen (the opposite at equal lambda)"),
    (dict(equal="opposite", tuned="opposite"), "not seen: the opposite"),
    (dict(any="opposite"), "not seen: the opposite"),
])
def test_the_verdict_says_under_which_dose_rule(by_rule, words):
    assert arithmetic.verdict(by_rule) == words
