# SPDX-License-Identifier: MIT
"""What docs/vendoring.md tells you to do, done: copy, rename, bring an array-api-compat of your own, run the tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import array_api_compat
import pytest

import adagrpo_core

ROOT = Path(__file__).parents[2]
ON_COPY = str(ROOT / "tests" / "recipes" / "on_copy.py")
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


def ended(project, *command, path=None):
    environment = {**os.environ, "PYTHONPATH": str(path or project), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, cwd=project, capture_output=True, text=True)


def run(project, *command):
    done = ended(project, *command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_cores_tests_run_on_a_copy_under_another_name(tmp_path):
    vendor(tmp_path, hook=False)
    out = run(tmp_path, ON_COPY, "shop.ext.adagrpo", "-p", "no:cacheprovider", "-k", "nothing_happens")
    assert str(tmp_path / "shop" / "ext" / "adagrpo") in out


def test_a_fault_of_the_copy_is_found_and_not_looked_for_in_the_core_of_this_repository(tmp_path):
    vendor(tmp_path, hook=False)
    with (tmp_path / "shop" / "ext" / "adagrpo" / "__init__.py").open("a") as file:
        file.write("\n\ndef grpo_loss(new, old, advantages, /, **settings):\n    return new.sum(-1) * 0\n")
    options = ["-k", "worked_example_of_the_clip", "-p", "no:cacheprovider", "-x"]
    done = ended(tmp_path, ON_COPY, "shop.ext.adagrpo", *options)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-2000:]


def test_a_hook_within_the_copy_is_told_its_place(tmp_path):
    vendor(tmp_path, hook=True)
    (tmp_path / "shop" / "ext" / "_array_api_compat_vendor.py").rename(
        tmp_path / "shop" / "ext" / "adagrpo" / "_array_api_compat_vendor.py")
    assert "belongs beside the copy" in refused(tmp_path, "shop.ext.adagrpo")


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


def refused(project, name, *, path=None):
    """The one line by which on_copy.py refuses."""
    done = ended(project, ON_COPY, name, path=path)
    assert done.returncode == 1 and done.stdout == "", done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("name, says", [
    ("shop/ext/adagrpo", "with dots"),
    ("shop.exit.adagrpo", "shop.exit.adagrpo: not found; PYTHONPATH must be the folder that holds shop"),
    ("market.adagrpo", "the folder that holds market"),
    ("shop.ext", "is no copy of adagrpo_core"),
    ("shop.ext.adagrpo.loss", "is no copy of adagrpo_core"),
])
def test_a_wrong_name_of_the_copy_is_refused_in_a_line(name, says, tmp_path):
    vendor(tmp_path, hook=False)
    assert says in refused(tmp_path, name)


@pytest.mark.parametrize("name", ["gate", "functools"])
def test_a_copy_that_has_the_name_of_something_it_imports_is_refused_in_a_line(name, tmp_path):
    vendor(tmp_path, hook=False)
    (tmp_path / "shop" / "ext" / "adagrpo").rename(tmp_path / "shop" / "ext" / name)
    assert f"the core imports a {name} of its own" in refused(tmp_path, f"shop.ext.{name}")


def test_a_wrong_path_is_refused_in_a_line_that_shows_it(tmp_path):
    vendor(tmp_path, hook=False)
    line = refused(tmp_path, "shop.ext.adagrpo", path=tmp_path / "shop")
    assert line.endswith(f"and is {str(tmp_path / 'shop')!r}")


@pytest.mark.parametrize("hook, says", [
    ("from shop.no_such_place import array_namespace\n", "importing it fails: ModuleNotFoundError"),
    ("from array_api_compat import array_namespace\n", "it does not import device, is_jax_array, is_torch_array"),
    ("1 / 0\n", "importing it fails: ZeroDivisionError"),
])
def test_a_hook_that_would_not_be_used_is_refused_in_a_line(hook, says, tmp_path):
    vendor(tmp_path, hook=False)
    (tmp_path / "shop" / "ext" / "_array_api_compat_vendor.py").write_text(hook)
    assert says in refused(tmp_path, "shop.ext.adagrpo")


def test_a_hook_beside_a_copy_that_is_in_no_package_is_refused_in_a_line(tmp_path):
    vendor(tmp_path, hook=True)
    assert "is in no package" in refused(tmp_path, "adagrpo", path=tmp_path / "shop" / "ext")


def test_the_recipes_use_the_copy_when_one_line_is_changed_and_say_so(tmp_path):
    vendor(tmp_path, hook=True)
    for name in ("extra_row.py", "numpy_loop.py", "torch_loop.py"):
        shutil.copy(ROOT / "docs" / "recipes" / name, tmp_path)
    recipe, line = tmp_path / "extra_row.py", "import adagrpo_core as core\n"
    assert recipe.read_text().count(f"\n{line}") == 1
    recipe.write_text(recipe.read_text().replace(f"\n{line}", "\nfrom shop.ext import adagrpo as core\n"))
    (tmp_path / "adagrpo_core.py").write_text("raise ImportError('not this one')\n")
    says = f"adagrpo core {adagrpo_core.__version__} from {tmp_path / 'shop' / 'ext' / 'adagrpo'}"
    assert run(tmp_path, "extra_row.py").splitlines() == [says]
    for name in ("numpy_loop.py", "torch_loop.py"):
        assert run(tmp_path, name).splitlines()[0] == says


def test_no_recipe_imports_the_core_but_the_one_that_says_where_it_is():
    for recipe in (ROOT / "docs" / "recipes").glob("*.py"):
        imports = re.findall(r"^(?:import|from) adagrpo_core.*", recipe.read_text(), flags=re.M)
        assert imports == [] or recipe.name == "extra_row.py", recipe.name
