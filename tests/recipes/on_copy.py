# SPDX-License-Identifier: MIT
"""Run the core's tests on a copy of the core: your vendored one, under whatever name it has there.

    PYTHONPATH=/path/to/your/project python tests/recipes/on_copy.py yourproject.vendor.adagrpo_core [pytest options]

from a checkout of this repository at the version that you copied (its test requirements installed).
"""

import importlib
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDS = "pytest", "hypothesis", "array_api_strict", "scipy", "torch", "jax"
HOOK, FROM_HOOK = "_array_api_compat_vendor", ("array_namespace", "device", "is_jax_array", "is_torch_array")
INSTALL = 'pip install "array-api-compat>=1.13"'


def find(name):
    """The folder of the copy, or a line that says why it is none."""
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        return None, f"{name}: expected the name of a module, with dots: yourproject.vendor.adagrpo_core"
    try:
        spec = find_spec(name)
    except ModuleNotFoundError as missing:
        if not f"{name}.".startswith(f"{missing.name}."):
            raise  # it is not the copy that is missing, but something that a package around it imports
        spec = None
    if spec is None:
        first, path = name.split(".")[0], os.environ.get("PYTHONPATH", "")
        return None, f"{name}: not found; PYTHONPATH must be the folder that holds {first}, and is {path!r}"
    folder = Path((spec.submodule_search_locations or [spec.origin])[0])
    if not (folder / "__init__.py").is_file() or not (folder / "_compat.py").is_file():
        return None, f"{name}: {folder} is no copy of adagrpo_core; name the copied folder itself"
    sources = [file.read_text(encoding="utf-8") for file in folder.glob("*.py")]
    if any(re.search(rf"\b(import|from)\s+[\w.]*\b{folder.name}\b", source) for source in sources):
        return None, f"{name}: the core imports a {folder.name} of its own; give the copied folder another name"
    return folder, None


def trouble_with_arrays(name, folder):
    """Why array-api-compat would not be found, or not the one that is meant, in a line."""
    hook, package = folder.parent / f"{HOOK}.py", name.rpartition(".")[0]
    if (folder / hook.name).exists():
        return f"{folder / hook.name}: not used; it belongs beside the copy, into {folder.parent}"
    if not hook.is_file():
        return None if find_spec("array_api_compat") else f"array_api_compat is not installed: {INSTALL}"
    if not package:
        return f"{hook}: not used, because {name} is in no package; import it as a part of one"
    try:
        module = importlib.import_module(f"{package}.{HOOK}")
    except Exception as error:
        return f"{hook}: not used, because importing it fails: {type(error).__name__}: {error}"
    missing = [each for each in FROM_HOOK if not hasattr(module, each)]
    return f"{hook}: not used, because it does not import {', '.join(missing)}" if missing else None


def take_the_place_of_the_core(name, folder):
    """Whatever the tests import from adagrpo_core, they get from the copy."""
    for file in folder.glob("*.py"):
        inner = file.stem != "__init__"
        sys.modules["adagrpo_core" + f".{file.stem}" * inner] = importlib.import_module(name + f".{file.stem}" * inner)
    return sys.modules["adagrpo_core"]


def main(name, *options):
    absent = [each for each in NEEDS if find_spec(each) is None]
    if absent:
        sys.exit(f"{', '.join(absent)}: not installed; the tests need the extra test: pip install -e '.[test]'")
    folder, trouble = find(name)
    trouble = trouble or trouble_with_arrays(name, folder)
    if trouble:
        sys.exit(trouble)
    copy = take_the_place_of_the_core(name, folder)
    print(f"testing {copy.__file__}, version {copy.__version__}")
    here = {file.name: file.read_bytes() for file in (ROOT / "adagrpo_core").glob("*.py")}
    other = sorted(file for file, text in here.items() if (folder / file).read_bytes() != text)
    if other:
        print(f"not as in this checkout: {', '.join(other)}; its tests may be those of another version")
    import pytest

    # In this process: another one would import adagrpo_core itself.
    sys.exit(pytest.main([str(ROOT / "tests" / "core"), *options, "-n", "0"]))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
