# SPDX-License-Identifier: MIT
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "docs" / "evidence")]  # the driver stands beside the docs that it writes
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def setup(tmp_path_factory):
    """One seed of the small size, ready for its arms."""
    import measure
    import run

    cfg, world, _ = run.SIZES["small"]
    return measure.prepare(cfg, world, tmp_path_factory.mktemp("seed") / "base-policy.npz")
