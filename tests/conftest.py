# SPDX-License-Identifier: MIT
"""`DEEP_TESTS=1 pytest` tries more: 100 draws of every property of the core, a kill at every touch
of the disk, and a benchmark that starts processes of its own.
"""

import gc
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each process: two threads on a busy core wait for each other
if os.environ.get("TEST_DEVICE", "cpu") == "cpu":  # on a machine with a GPU too: tests fork, which CUDA does not bear
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or each process would take most of the GPU's memory


@pytest.fixture(scope="module", autouse=True)
def collected():
    """What earlier files and the libraries leave is not looked through again at every collection of garbage."""
    gc.set_threshold(100_000, 50, 100)
    gc.collect()
    gc.freeze()
