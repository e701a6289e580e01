# SPDX-License-Identifier: MIT
"""Run the core's tests on a copy of the core: your vendored one, under whatever name it has there.

    PYTHONPATH=/path/to/your/project python tests/recipes/on_copy.py yourproject.vendor.adagrpo_core [pytest options]

from a checkout of this repository at the version that you copied (its test requirements installed).
"""

import importlib
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "core"


def take_the_place_of_the_core(name):
    """Whatever the tests import from adagrpo_core, they get from the copy."""
    copy = importlib.import_module(name)
    for file in Path(copy.__file__).parent.glob("*.py"):
        if file.stem != "__init__":
            sys.modules[f"adagrpo_core.{file.stem}"] = importlib.import_module(f"{name}.{file.stem}")
    sys.modules["adagrpo_core"] = copy
    return copy


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    copy = take_the_place_of_the_core(sys.argv[1])
    print(f"testing {copy.__file__}, version {copy.__version__}")
    sys.exit(pytest.main([str(TESTS), *sys.argv[2:]]))
