# SPDX-License-Identifier: MIT
"""The package as a thing to be copied: it works alone under any name, and its public names keep their word."""

import ast
import doctest
import importlib
import inspect
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import adagrpo_core as core

from .test_gradients_and_tracing import B, K, L, arrays
from .test_refusals import ARGUMENTS, call

FOLDER = pathlib.Path(core.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))
FUNCTIONS = [name for name in core.__all__ if inspect.isfunction(getattr(core, name))]
TUPLES = [name for name in core.__all__ if inspect.isclass(getattr(core, name))]
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
every_public_function = pytest.mark.parametrize("name", FUNCTIONS)


# -- vendoring -------------------------------------------------------------------------------------------------------

ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "jax", "jaxlib", "adagrpo_core", "array_api_strict"):
            raise ImportError(name + " is not here")

sys.meta_path.insert(0, Absent())
import {package} as core
assert "numpy" not in sys.modules, "importing the package imports an array library"
import numpy as np
logp = np.log(np.asarray([[[0.5], [0.3], [0.2]]]))
out = core.adagrpo_loss(
    np.log(np.asarray([[0.1]])), logp, logp, np.asarray([[0.2, 0.3, 0.4]]), np.asarray([0.9]), np.asarray([[0.1]])
)
assert out.clip.tolist() == [True], out
assert core.group_by(np.asarray([1, 0, 1, 0])).order.tolist() == [0, 2, 1, 3]
assert core.in_batch_negatives(np.zeros((2, 2)), k=1, m=1).tolist() == [[1], [0]]
assert not {{"torch", "jax", "adagrpo_core"}} & set(sys.modules)
{more}
print(core.__version__, core.__name__)
"""


def run_alone(folder, package, more=""):
    code = ALONE.format(package=package, more=more)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_copied_and_renamed_folder_works_alone_without_torch_and_jax(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "gate_for_us", ignore=shutil.ignore_patterns("__pycache__"))
    assert run_alone(tmp_path, "gate_for_us") == [core.__version__, "gate_for_us"]


def test_the_folder_works_inside_another_package_and_uses_the_hook_beside_it(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "stack" / "_vendor" / "grpo", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "stack" / "__init__.py").write_text("")
    (tmp_path / "stack" / "_vendor" / "__init__.py").write_text("")
    hook = "from array_api_compat import *\nfrom array_api_compat import array_namespace as found\ncalls = []\n"
    hook += "def array_namespace(*arrays):\n    calls.append(1)\n    return found(*arrays)\n"
    (tmp_path / "stack" / "_vendor" / "_array_api_compat_vendor.py").write_text(hook)
    more = "from stack._vendor._array_api_compat_vendor import calls\nassert calls"
    assert run_alone(tmp_path, "stack._vendor.grpo", more)[1] == "stack._vendor.grpo"


@pytest.mark.parametrize("hook, said", [
    ("import nothing_of_this_name\n", "nothing_of_this_name"),
    ("def array_namespace(*arrays):\n    return None\n", "cannot import name"),
    ("1 / 0\n", "ZeroDivisionError")], ids=["needs what is missing", "incomplete", "raises"])
def test_a_broken_hook_is_not_passed_over(tmp_path, hook, said):
    shutil.copytree(FOLDER, tmp_path / "stack" / "grpo", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "stack" / "__init__.py").write_text("")
    (tmp_path / "stack" / "_array_api_compat_vendor.py").write_text(hook)
    done = subprocess.run([sys.executable, "-c", "import stack.grpo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("place", ["grpo", "stack/grpo"])
def test_without_array_api_compat_the_last_line_says_what_to_install(tmp_path, place):
    shutil.copytree(FOLDER, tmp_path / place, ignore=shutil.ignore_patterns("__pycache__"))
    program = f"import sys\nsys.modules['array_api_compat'] = None\nimport {place.replace('/', '.')}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and 'pip install "array-api-compat>=1.13"' in done.stderr.splitlines()[-1]
    assert "another exception" not in done.stderr


@every_file
def test_a_file_states_its_licence_never_names_the_package_and_imports_only_what_it_may(file):
    source = file.read_text()
    assert source.startswith("# SPDX-License-Identifier: MIT\n")
    assert "adagrpo_core" not in source
    assert not re.search(rf"\b(import|from)\s+[\w.]*\b{FOLDER.name}\b", source), "nor a copy its own name"
    allowed = {"typing", "fractions", "functools", "array_api_compat"}
    allowed |= {"jax", "sys"} if file.name == "_compat.py" else set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.partition(".")[0] in allowed


@every_file
def test_nothing_happens_at_import_but_definitions(file):
    kinds = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Try
    body = ast.parse(file.read_text()).body
    assert isinstance(body[0], ast.Expr)  # the docstring
    assert all(isinstance(node, kinds) for node in body[1:])


@every_file
def test_a_function_is_short_enough_to_hold_in_the_head(file):
    source = file.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = source.splitlines()[body[0].lineno - 1 : node.end_lineno]
            assert sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines) <= 40


def test_the_package_is_typed_and_has_one_version():
    assert (FOLDER / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+", core.__version__)
    assert sum("__version__ =" in file.read_text() for file in FILES) == 1


# -- public names ----------------------------------------------------------------------------------------------------


def test_public_names_are_listed_sorted_and_there():
    assert list(core.__all__) == sorted(core.__all__)
    public = {name for name, value in vars(core).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public == set(core.__all__)


@every_public_function
def test_arrays_are_positional_only_settings_keyword_only_and_defaults_where_optional(name):
    for parameter in inspect.signature(getattr(core, name)).parameters.values():
        if parameter.name in ARGUMENTS[name][0]:
            required = parameter.default is parameter.empty
            assert required == (parameter.kind is parameter.POSITIONAL_ONLY)
        elif name != "group":  # whose k is as good as part of its name
            assert parameter.kind is parameter.KEYWORD_ONLY


@every_public_function
def test_a_docstring_has_every_section_and_every_argument(name):
    function = getattr(core, name)
    text = inspect.getdoc(function)
    assert re.match(r"[A-Z][^\n]*[.:]\n\n", text), "one plain sentence first"
    places = [text.index(f"\n{title}\n{'-' * len(title)}\n") for title in SECTIONS]
    assert places == sorted(places)
    parameters = text[places[0] : places[1]]
    documented = re.findall(r"^([\w, ]+?)(?: : .*)?$", parameters, flags=re.M)
    documented = {one for line in documented if not line.startswith(" ") for one in line.split(", ")}
    assert set(inspect.signature(function).parameters) <= documented
    notes = text[places[3] : places[4]]
    assert "\nGradient: " in notes and "\nNaN: " in notes
    assert "arXiv 2606.08480" in text[places[4] :] and "Section" in text[places[4] :]
    assert ">>> " in text[places[5] :]


SECTIONS = ["Parameters", "Returns", "Raises", "Notes", "References", "Examples"]


@pytest.mark.parametrize("name", TUPLES)
def test_a_named_tuple_documents_every_field(name):
    for field in getattr(core, name)._fields:
        assert re.search(rf"^{field} : ", inspect.getdoc(getattr(core, name)), flags=re.M)


@every_file
def test_docstring_examples_are_true(file):
    name = core.__name__ + ("" if file.stem == "__init__" else "." + file.stem)
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert results.attempted > 0 or file.stem.startswith("_")


# -- every argument is read ------------------------------------------------------------------------------------------

A = arrays()
# Arrays of which every prompt is admitted, on-policy or with ratios that the clip range cuts on both sides.
ADMITTED = {
    "target_reward": np.full(B, 2.0),
    "target_old_logp": np.full(B, -9.0),
    "target_mask": np.ones((B, L), dtype=bool),
    "mask": np.ones((B, K, L), dtype=bool),
}
BETTER = A["rewards"] > A["rewards"].mean(1, keepdims=True)
ADMITTED_FAR = {**ADMITTED, "token_logp": A["old"] + np.where(BETTER, 1.0, -1.0)[:, :, None]}
FAR = {"token_logp": A["old"] + np.where(A["advantages"] > 0, 1.0, -1.0)[:, :, None]}
TIED = {"target_logp": np.asarray([-1.0]), "rollout_logp": np.asarray([[-1.0, -2.0, -3.0]])}
SECOND = {**TIED, "target_logp": np.asarray([-1.5])}
UNREWARDED = {"target_reward": np.ones(1), "rollout_rewards": np.zeros((1, 9)), "negative_rewards": np.zeros((1, 2))}
EVEN = {**UNREWARDED, "rollout_rewards": np.arange(1, 10)[None] / 10, "negative_rewards": np.asarray([[-1.0]])}
SHUT = {"difficult": np.ones(1, dtype=bool), "reliable": np.zeros(1, dtype=bool)}
SHUT |= {"target_reward": np.asarray([0.45]), "rollout_rewards": EVEN["rollout_rewards"]}
MIDDLE = np.sort(A["old"].mean(2), axis=1)[:, 2]

OTHER = {  # function, setting: another value, and the arrays for which it must make a difference
    ("policy_rank", "ties"): ("max", TIED),
    ("reward_ranks", "ties"): ("max", UNREWARDED),
    ("difficulty", "ties"): ("max", TIED),
    ("difficulty", "tau"): (0.7, SECOND),
    ("reliability", "ties"): ("max", UNREWARDED),
    ("reliability", "tau"): (0.9, {**EVEN, "target_reward": np.asarray([0.45])}),
    ("reliability", "rho"): (0.3, {**EVEN, "negative_rewards": np.asarray([[0.45]])}),
    ("gate_diagnostics", "ties"): ("max", {**SHUT, "rollout_rewards": np.full((1, 9), 0.45)}),
    ("gate_diagnostics", "tau"): (0.9, SHUT),
    ("group_advantages", "eps"): (0.5, {}),
    ("group_advantages", "correction"): (0, {}),
    ("grpo_loss", "epsilon"): (0.1, FAR),
    ("grpo_loss", "epsilon_high"): (0.3, FAR),
    ("grpo_loss", "beta"): (0.5, {}),
    ("adagrpo_loss", "ties"): ("max", {**ADMITTED, "target_old_logp": A["old"].mean(2).max(1)}),
    ("adagrpo_loss", "tau"): (0.9, {**ADMITTED, "target_old_logp": MIDDLE}),
    ("adagrpo_loss", "tol"): (9.0, ADMITTED),
    ("adagrpo_loss", "rho"): (0.7, {**ADMITTED, "negative_rewards": np.sort(A["rewards"], 1)[:, 2:3]}),
    ("adagrpo_loss", "lam"): (0.5, ADMITTED),
    ("adagrpo_loss", "epsilon"): (0.1, ADMITTED_FAR),
    ("adagrpo_loss", "epsilon_high"): (0.3, ADMITTED_FAR),
    ("adagrpo_loss", "beta"): (0.5, ADMITTED),
    ("adagrpo_loss", "eps"): (0.5, ADMITTED),
    ("adagrpo_loss", "correction"): (0, ADMITTED),
    ("target_row_advantages", "lam"): (2.0, {}),
    ("in_batch_negatives", "k"): (2, {"keys": np.arange(16.0).reshape(4, 4)}),
    ("in_batch_negatives", "m"): (2, {}),
    ("group", "k"): (4, {}),
}


def test_the_table_of_settings_is_complete():
    every = {
        (name, parameter)
        for name in FUNCTIONS
        for parameter in inspect.signature(getattr(core, name)).parameters
        if parameter not in ARGUMENTS[name][0]
    }
    assert every == set(OTHER)


@pytest.mark.parametrize("function, setting", [key for key in OTHER if key != ("in_batch_negatives", "k")])
def test_every_setting_is_read(function, setting):
    value, changes = OTHER[function, setting]
    given, settings = ARGUMENTS[function]
    given = {**given, **changes}
    before, after = (call(function, given, either) for either in (settings, {**settings, setting: value}))
    assert not same(before, after)
    if function == "adagrpo_loss" and setting not in ("ties", "tau", "rho", "tol"):  # which change the clip
        assert before.clip.all() and after.clip.all() and not same(before.loss, after.loss)


def test_k_says_how_many_columns_are_the_own_group():
    keys = np.zeros((2, 4))
    assert call("in_batch_negatives", {"keys": keys}, {"k": 2, "m": 1}).tolist() == [[2], [0]]
    assert call("in_batch_negatives", {"keys": np.zeros((4, 4))}, {"k": 1, "m": 1}).tolist() == [[1], [0], [0], [0]]


@pytest.mark.parametrize("function, name", [(f, n) for f, (given, _) in ARGUMENTS.items() for n in given])
def test_every_array_is_read(function, name):
    given, settings = ARGUMENTS[function]
    if function == "adagrpo_loss":
        given = {**given, **ADMITTED}
    array = given[name]
    if name == "index":
        others = [array[[0, 0, 1, 1]]]
    elif array.dtype == bool:
        others = [~array if array.ndim == 1 else array & (np.arange(array.shape[-1]) > 0)]
    else:
        others = [-3 * array, 3 * array]  # where a threshold is read, one of the two crosses it
    before = call(function, given, settings)
    assert not all(same(before, call(function, {**given, name: other}, settings)) for other in others)


def same(one, other):
    if isinstance(one, tuple):
        return all(map(same, one, other))
    return np.array_equal(one, other, equal_nan=True)
