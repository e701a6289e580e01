# SPDX-License-Identifier: MIT
"""The arithmetic of the report: NumPy and SciPy in, numbers out; nothing here knows the toy or a policy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats


class Interval(NamedTuple):
    """A mean and its 95 % interval; the ends are NaN where there was one seed only."""

    mean: float
    low: float
    high: float


def over_seeds(values):
    """Mean over seeds with a 95 % t-interval. Pass differences of two arms on the same seed: then it is paired.

    A seed that cannot say (NaN: it has no instance of a stratum) is left out.
    """
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if len(values) else float("nan")
    error = float(scipy.stats.sem(values)) if len(values) > 1 else float("nan")
    if not error > 0:  # all seeds agree to the bit: t.interval would say NaN; or there is one: NaN is right
        return Interval(mean, mean + error, mean + error)
    return Interval(mean, *map(float, scipy.stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)))


def best_step(curve):
    """The step with the highest HR@10 on validation; the earliest of equals."""
    return max(curve, key=lambda point: point["hr@10"])["step"]


def choose_dose(trials):
    """{dose: HR@10 on validation, one per tuning seed} -> the dose of the highest mean; the smallest of equals."""
    return max(sorted(trials), key=lambda dose: np.mean(trials[dose]))


def difficulty_bins(rank, logp, width, n=5):
    """Five parts of equal size, easiest first: by the rank of the truth among the base policy's valid beams.

    Beyond the beams the rank is unknown; there the base policy's likelihood of the truth decides. Returns row numbers.
    """
    rank = np.minimum(rank, width + 1)
    return np.array_split(np.lexsort((-np.where(rank > width, logp, 0.0), rank)), n)


def hr_in_bins(rank, bins, k=10):
    return [float(np.mean(rank[part] <= k)) for part in bins]


def split_users(users, seed):
    """Boolean (users,): a random half gets the treatment, the others the control."""
    treated = np.zeros(users, bool)
    treated[np.random.default_rng([seed, 7]).permutation(users)[: users // 2]] = True
    return treated


def lift(treatment, control, treated):
    """One A/B test: relative difference of the means of two groups of users, and its standard error (Welch).

    `treatment` and `control` hold for every user what they would do under either; a user is seen under one only.
    Users without a visit are NaN and left out. The control's mean, as a divisor, is taken as known.
    """
    a, b = treatment[treated], control[~treated]
    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return float((a.mean() - b.mean()) / b.mean()), float(error / b.mean())


def pooled_lift(lifts, errors):
    """The mean lift of several worlds, whose users are independent: a normal 95 % interval."""
    mean, error = float(np.mean(lifts)), float(np.sqrt(np.sum(np.square(errors)))) / len(errors)
    reach = float(scipy.stats.norm.ppf(0.975)) * error
    return Interval(mean, mean - reach, mean + reach)


def seen(intervals):
    """Of differences turned so that the claim says "above 0": "yes" if every interval lies above 0, "opposite" if any
    lies below, else "no"."""
    if any(interval.high < 0 for interval in intervals):
        return "opposite"
    return "yes" if all(interval.low > 0 for interval in intervals) else "no"


def verdict(by_rule):
    """{dose rule: seen(...)} -> the word for it. A finding that no dose touches comes under the one rule "any"."""
    held = [rule for rule, answer in by_rule.items() if answer == "yes"]
    against = [rule for rule, answer in by_rule.items() if answer == "opposite"]
    names = {"equal": "at equal lambda", "tuned": "at tuned lambda"}
    if len(held) == len(by_rule):
        word = "confirmed" if len(by_rule) > 1 or "any" in by_rule else f"confirmed {names[held[0]]}; the other not run"
    elif held:
        word = f"only {names[held[0]]}"
    else:
        word = "not seen"
    if against:
        word += ": the opposite" if len(against) == len(by_rule) else f" (the opposite {names[against[0]]})"
    return word
