# SPDX-License-Identifier: MIT
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the recipes build their models; nothing is to be downloaded
sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "recipes"))
