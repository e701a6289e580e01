# SPDX-License-Identifier: MIT
"""What properties are tried on: coarse grids, because ties are where the bugs are; NaN and infinities on request."""

from fractions import Fraction
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

# 0.1, 0.35 and 0.7 have no exact binary form; 1e3 makes a group's spread dwarf its other members.
GRID = [-1.0, 0.0, 0.1, 0.35, 0.7, 1.0, 1e3]
WILD = [*GRID, float("inf"), float("-inf"), float("nan")]
# Few sizes, and the second one that of other tests, so that JAX compiles few times. B, K, M, L.
SIZES = [(1, 3, 1, 3), (4, 5, 2, 3)]


class Sizes(NamedTuple):
    B: int
    K: int
    M: int
    L: int


sizes = st.sampled_from([Sizes(*size) for size in SIZES])


def grid(shape, elements=GRID):
    return npst.arrays(np.float64, shape, elements=st.sampled_from(elements))


def logps(shape):
    """Log-probabilities in eighths: sums of them are exact, so that equal means tie in every library."""
    return npst.arrays(np.float64, shape, elements=st.integers(0, 24).map(lambda n: -n / 8))


def masks(shape):
    return npst.arrays(np.bool_, shape)


def taus(K):
    """Prominence fractions, down to the one for which K is just large enough."""
    shares = [Fraction(1, K), Fraction(1, 3), Fraction(29, 100), Fraction(1, 2), Fraction(2, 3), Fraction(99, 100)]
    return st.sampled_from([tau for tau in shares if tau * K >= 1])


rhos = st.sampled_from([Fraction(1, 10), Fraction(1, 3), Fraction(2, 3), Fraction(71, 100), Fraction(99, 100)])
ties = st.sampled_from(["min", "max", "average"])


@st.composite
def pools(draw, elements=GRID, size=None):
    """Truth (B,), rollouts (B, K), negatives (B, M): with constant groups and rollouts that repeat the truth."""
    B, K, M, _ = size = draw(sizes) if size is None else size
    target, rollouts, negatives = draw(grid(B, elements)), draw(grid((B, K), elements)), draw(grid((B, M), elements))
    for b in range(B):
        shape = draw(st.sampled_from(["as drawn", "constant", "repeats the truth", "truth on top, negatives below"]))
        if shape == "constant":
            rollouts[b, :] = rollouts[b, 0]
        elif shape == "repeats the truth":
            rollouts[b, draw(st.integers(0, K - 1))] = target[b]
        elif shape == "truth on top, negatives below":  # without it hardly any drawn instance would be reliable
            target[b], negatives[b] = 2e3, -2.0
    return size, target, rollouts, negatives
