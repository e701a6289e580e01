# SPDX-License-Identifier: MIT
"""A few tries of each kind with every run of the tests; `python tests/fuzz/run.py` makes more."""

import functools

import pytest

import nanoadagrpo as nano

from .run import tries

SHARE = dict(files=300, commands=6, damage=3, kills=1)  # under 30 s of a core

OPEN = {  # faults that are known (RESULT.md), by how they begin; to be emptied as they are mended
    "does not say rightly whether to go on", "SIGINT once, exit code -2 (process)",
    "SIGINT twice, a traceback (process)",
}


@pytest.fixture(scope="module", autouse=True)
def small_ranker():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "train_ranker", functools.partial(nano.train_ranker, least_steps=5))
        yield


@pytest.mark.parametrize("kind, n", SHARE.items())
def test_a_few_tries_find_no_fault(kind, n):
    found = tries(kind, range(n), seed=1)[0]
    faults = {number: x.fault for number, x in found.items() if x.fault}
    assert [f"{kind}:{number}: {x}" for number, x in faults.items() if x.split(":")[0] not in OPEN] == []
