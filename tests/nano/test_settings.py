# SPDX-License-Identifier: MIT
"""The script as a program: every option is read and explained, and importing it does nothing."""

import ast
import contextlib
import dataclasses
import inspect
import io
import os
import pathlib
import re
import subprocess
import sys

import pytest

import nanoadagrpo as nano

FIELDS = dataclasses.fields(nano.Settings)
TREE = ast.parse(pathlib.Path(nano.__file__).read_text())


def reads(tree):
    """Names that are read as cfg.NAME."""
    return {node.attr for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cfg"}


@pytest.fixture(scope="module")
def help_text():
    """What --help prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as end:
            nano.main(["--help"])
    assert end.value.code == 0
    return out.getvalue()


def test_every_setting_is_read_somewhere_and_nothing_else_is():
    outside = [node for node in TREE.body if not (isinstance(node, ast.ClassDef) and node.name == "Settings")]
    read = set().union(*map(reads, outside))
    names = {field.name for field in FIELDS}
    read -= {name for name, x in vars(nano.Settings).items() if inspect.isfunction(x)}
    assert names - read == set(), "options that no code reads"
    assert read - names == set(), "settings that do not exist"


def test_help_shows_every_option_with_its_explanation_and_default(help_text):
    for field in FIELDS:
        flag = "--" + field.name.replace("_", "-")
        explained = re.escape(field.metadata["help"]).replace(r"\ ", r"\s*")  # wrapped anywhere
        x = f"{field.default:.3g}" if isinstance(field.default, float) else str(field.default)
        default = "" if field.default in (False, "") else rf"\s*\(default:\s*{re.escape(x)}\)"
        assert re.search(rf"{flag}\s.*?{explained}{default}", " ".join(help_text.split())), flag
    assert "default: )" not in help_text and max(map(len, help_text.splitlines())) <= 110


def test_help_comes_in_groups_none_of_which_is_long(help_text):
    groups = re.split(r"^([a-z ]+):$", help_text, flags=re.MULTILINE)[1:]
    titles, texts = groups[::2], groups[1::2]
    assert len(titles) == 7 and all(len(re.findall("^  --", text, re.MULTILINE)) <= 10 for text in texts)


def test_help_names_every_method(help_text):
    for name in [*nano.METHODS, "all"]:
        assert re.search(rf"[ ,]{re.escape(name)}[,.]", help_text), name


CHOSEN = {"method": "grpo+nll", "dtype": "bfloat16", "ties": "max", "keep": "best"}  # not any word will do


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_option_reaches_its_setting(field, monkeypatch, folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "config.json").write_text('{"toy": true}')
    if field.name == "device":
        value, text = "cpu", ["cpu"]
    elif field.default is False:
        value, text = True, []
    elif field.name == "data":
        value, text = "somewhere", ["somewhere"]
    elif field.name in CHOSEN:
        value, text = CHOSEN[field.name], [CHOSEN[field.name]]
    elif field.name == "out":
        value, text = "new", ["new"]
    elif isinstance(field.default, str):
        value, text = "elsewhere", ["elsewhere"]
    else:
        value = type(field.default)(field.default + 1 if isinstance(field.default, int) else field.default * 0.75)
        text = [str(value)]
    source = [] if field.name in ("toy", "data") else ["--toy"]
    cfg = nano.parse([*source, f"--{field.name.replace('_', '-')}", *text])
    assert getattr(cfg, field.name) == value
    untouched = {f.name for f in FIELDS} - {field.name, "toy", "device"}
    assert all(getattr(cfg, f.name) == f.default for f in FIELDS if f.name in untouched)


def test_settings_cannot_be_changed_once_made():
    with pytest.raises(dataclasses.FrozenInstanceError):
        nano.Settings().tau = 0.5


def test_importing_the_script_does_nothing(tmp_path):
    code = """
import random, os, sys
import numpy, torch, transformers
before = (torch.random.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
          torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ),
          transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled(),
          torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32)
import nanoadagrpo
after = (torch.random.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
         torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ),
         transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled(),
         torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32)
assert before == after
assert "matplotlib" not in sys.modules, "the script needs none"
"""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(nano.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not list(tmp_path.iterdir())


def test_the_modules_body_holds_definitions_alone():
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Expr, ast.If)
    assert all(isinstance(node, kinds) for node in TREE.body)
    assert [ast.unparse(node.test) for node in TREE.body if isinstance(node, ast.If)] == ["__name__ == '__main__'"] * 2
    assert [node for node in TREE.body if isinstance(node, ast.Expr)] == TREE.body[:1], "the docstring"


def test_no_formula_of_the_core_is_written_twice():
    """Advantages, ranks, thresholds and ratios come from the core: the script has no clamp of a ratio of its own."""
    def called(tree):
        return {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "core"}

    step = [node for node in TREE.body if getattr(node, "name", "") in ("draw_negatives", "learn", "train_rl")]
    assert {"nll_loss", "grpo_loss", "difficulty", "reliability", "group_advantages", "length_normalized",
            "in_batch_negatives"} == set().union(*map(called, step))
    assert "sample_clip" in called(TREE)
