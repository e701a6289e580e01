# SPDX-License-Identifier: MIT
"""A few tries of each kind with every run of the tests; `python tests/fuzz/run.py` makes more."""

import pytest

from .run import tries

SHARE = dict(files=400, commands=8, damage=4, kills=1)  # less than 30 s of a core

OPEN = {  # faults that are known, by how they begin; to be emptied as they are mended
    "accepts what cannot be right", "does not name the file", "does not name the line",
    "exit code 1 in forged", "does not say rightly whether to go on", "comes to something else",
}


@pytest.mark.parametrize("kind, n", SHARE.items())
def test_a_few_tries_find_no_fault(kind, n):
    found = tries(kind, range(n), seed=1)[0]
    faults = {number: x.fault for number, x in found.items() if x.fault}
    assert [f"{kind}:{number}: {x}" for number, x in faults.items() if x.split(":")[0] not in OPEN] == []
