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


def interrupted_at(patch, module, n):
    """The nth arm that `module` runs is interrupted. Returns what it was before."""
    whole, begun = module.run_arm, []

    def run_arm(*given):
        begun.append(given)
        if len(begun) == n:
            raise KeyboardInterrupt
        return whole(*given)

    patch.setattr(module, "run_arm", run_arm)
    return whole


@pytest.fixture(scope="session")
def setup(tmp_path_factory):
    """One seed of the small size, ready for its arms."""
    import measure
    import run

    cfg, world, _ = run.SIZES["small"]
    return measure.prepare(cfg, world, tmp_path_factory.mktemp("seed") / "base-policy.npz")
