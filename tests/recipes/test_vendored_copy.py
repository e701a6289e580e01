# SPDX-License-Identifier: MIT
"""What docs/vendoring.md tells you to do, done: copy, rename, bring an array-api-compat of your own, run the tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import array_api_compat

import adagrpo_core

ROOT = Path(__file__).parents[2]
HOOK = "from shop.array_api_compat import array_namespace, device, is_jax_array, is_torch_array  # noqa: F401\n"


def vendor(project, *, hook):
    """A project that vendors the core as shop.ext.adagrpo."""
    (project / "shop" / "ext").mkdir(parents=True)
    for package in (project / "shop", project / "shop" / "ext"):
        (package / "__init__.py").write_text("")
    shutil.copytree(Path(adagrpo_core.__file__).parent, project / "shop" / "ext" / "adagrpo")
    if hook:
        shutil.copytree(Path(array_api_compat.__file__).parent, project / "shop" / "array_api_compat")
        (project / "shop" / "ext" / "_array_api_compat_vendor.py").write_text(HOOK)


def run(project, *command):
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_cores_tests_run_on_a_copy_under_another_name(tmp_path):
    vendor(tmp_path, hook=False)
    script = str(ROOT / "tests" / "recipes" / "on_copy.py")
    out = run(tmp_path, script, "shop.ext.adagrpo", "-p", "no:cacheprovider", "-k", "nothing_happens")
    assert str(tmp_path / "shop" / "ext" / "adagrpo") in out


def test_the_hook_beside_the_copy_replaces_the_installed_array_api_compat(tmp_path):
    vendor(tmp_path, hook=True)
    code = """
import sys
sys.modules["array_api_compat"] = None  # importing it fails
import numpy as np
from shop.ext import adagrpo
assert adagrpo.group_advantages(np.asarray([[1.0, 2.0, 3.0]]), eps=0.0).tolist() == [[-1.0, 0.0, 1.0]]
assert "shop.array_api_compat" in sys.modules and "adagrpo_core" not in sys.modules
"""
    run(tmp_path, "-c", code)
