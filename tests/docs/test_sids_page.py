# SPDX-License-Identifier: MIT
"""docs/sids.md: what it says of shops with fewer items than codes. Its blocks are run by test_docs.py."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from fences import blocks

PAGE = (Path(__file__).parents[2] / "docs" / "sids.md").read_text(encoding="utf-8")
sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def kmeans(*given):
    names = {"np": np, "x": np.random.default_rng(0).standard_normal((300, 8))}
    exec(compile(blocks(PAGE)[1].partition("codes = residual")[0], "page", "exec"), names)
    return names["residual_kmeans"](*given)


def test_more_codes_than_items_are_refused_with_the_error_of_the_page():
    [says] = re.findall(r"`ValueError: ([^`]*)`", PAGE)
    with pytest.raises(ValueError, match=re.escape(says)):
        kmeans(np.random.default_rng(0).standard_normal((10, 8)), (5, 16, 16))


def test_fewer_vectors_than_codes_leave_codes_unused():
    x = np.random.default_rng(0).standard_normal((6, 8)).repeat(4, 0)
    with pytest.warns(sklearn.exceptions.ConvergenceWarning):
        codes = kmeans(x, (5, 16, 16))
    assert len(np.unique(codes, axis=0)) == 6


def test_the_shop_of_a_hundred_items_needs_no_fewer_codes():
    [sizes] = re.findall(r"a hundred items takes \((.*?)\)", PAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", sklearn.exceptions.ConvergenceWarning)
        codes = kmeans(np.random.default_rng(0).standard_normal((100, 8)), tuple(map(int, sizes.split(","))))
    assert len(np.unique(codes, axis=0)) > 90
