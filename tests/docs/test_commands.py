# SPDX-License-Identifier: MIT
"""Every command that README or docs quote is run: here, made small, or by what RUN_BY names."""

import ast
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from nano.helpers import make_brief
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

import nanoadagrpo as nano

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs" / "figures"), str(ROOT / "docs" / "evidence")]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]}
PROGRAMS = ("python", "torchrun", "unzip", "pip", "pytest", "sphinx-build", "cp", "git", "ruff", "bash", "sh")

# A command starts with this -> where it is run. None: it is this file that does.
RUN_BY = {
    "python nanoadagrpo.py": None,
    "python nanoadagrpo.py --resume": "tests/nano/test_resume.py",
    "torchrun": "tests/nano/test_processes.py",
    "python docs/evidence/run.py": "tests/evidence/test_run.py",
    "python docs/evidence/compare.py": "tests/evidence/test_compare.py",
    "python docs/evidence/tuned.py": "tests/evidence/test_tuned.py",
    "python tests/benchmarks/speed.py": "tests/nano/test_benchmarks.py",
    "python tests/benchmarks/feedback.py": "tests/nano/test_benchmarks.py",
    "python tests/benchmarks/same.py": "tests/nano/test_benchmarks.py",
    "python tests/benchmarks/memory.py": "tests/docs/test_scale_page.py",
    "python docs/figures/make.py": "tests/docs/test_figures.py",
    "python docs/figures/dynamics.py": "tests/docs/test_figures.py",
    "python tests/recipes/on_copy.py": "tests/recipes/test_vendored_copy.py",
    "python tests/recipes/check_peers.py": "tests/recipes/check_peers.py",  # needs every peer: run by hand
    "cp data/Amazon/": "tests/docs/test_data_page.py",
    "pytest -m peers": ".ci/run",
    "pytest": ".ci/run",
    "pip install -e": ".ci/run",
    "git clone": ".ci/run",  # in a clone
    "pip download": "docs/models.md",  # 93 MB, and what converts them: run by hand
    "unzip": "docs/models.md",
    "python - <<": "docs/models.md",
    "pip install": "tests/recipes/check_peers.py",  # what it installs from elsewhere is not this repository's
    "cp -r adagrpo_core": "tests/recipes/test_vendored_copy.py",
    "cp LICENSE": "tests/recipes/test_vendored_copy.py",
    "sphinx-build": "tests/docs/test_site.py",
}


def quoted(text):
    """The commands of a page: lines of blocks, and code spans, that start with a program; split at &&, no comments."""
    text = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"^(?: {4,}|\t)(\S.*)$", text, flags=re.M)
    for _, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S):
        lines += block.splitlines()
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    for line in lines:
        for command in re.split(r"\s&&\s", re.split(r"\s#\s", line)[0].strip()):
            words = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command.strip())
            if words.split(" ")[0] in PROGRAMS and " " in words:
                yield words


COMMANDS = sorted({command for text in PAGES.values() for command in quoted(text)} | {"pytest"})


def runner(command):
    """Of the entries with which it starts, the longest decides."""
    starts = [start for start in RUN_BY if command.startswith(start)]
    assert starts, f"say in RUN_BY what runs: {command}"
    return RUN_BY[max(starts, key=len)]


def test_every_command_that_is_quoted_is_run_by_something_that_exists():
    for command in COMMANDS:
        assert runner(command) is None or (ROOT / runner(command)).is_file(), command
    unused = [start for start in RUN_BY if not any(command.startswith(start) for command in COMMANDS)]
    assert unused == []


def test_commands_are_found_in_blocks_and_spans():
    text = "`python a.py --x` and `python`\n\n    A=1 pip install b && pytest -q  # c\n\n```\nsphinx-build . d\n```\n"
    assert sorted(quoted(text)) == ["pip install b", "pytest -q", "python a.py --x", "sphinx-build . d"]
    assert len(COMMANDS) >= 10


SMALL = shlex.split("--device cpu --sft-steps 2 --sft-batch-size 8 --rl-steps 2 --batch-size 4 --group-size 6 "
                    "--eval-prompts 8 --beam-width 8 --eval-every 1")


def shop(folder):
    """Data in MiniOneRec's layout, as docs/data.md describes it."""
    sids = [f"<a_{a}><b_{b}><c_{c}>" for a in range(3) for b in range(2) for c in range(2)]
    folder.mkdir()
    tokens = {str(i): re.findall(r"<\w+>", sid) for i, sid in enumerate(sids)}
    (folder / "index.json").write_text(json.dumps(tokens))
    rows = [f'"{[sids[i % 12], sids[(i * 5) % 12]]}",{sids[(i * 7) % 12]}' for i in range(20)]
    for name in ("train", "valid", "test"):
        (folder / f"{name}.csv").write_text("\n".join(["history_item_sid,item_sid", *rows]) + "\n")
    return folder


def model(folder, *known, **special):
    """A random one with a tokenizer, as --model takes it."""
    words = {word: i for i, word in enumerate(["<unk>", "hammer", "nail", "saw", *known])}
    config = GPT2Config(vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special).save_pretrained(folder)


@pytest.mark.parametrize("command", [command for command in COMMANDS
                                     if re.match(r"python nanoadagrpo\.py --", command) and runner(command) is None])
def test_every_command_line_of_the_script_runs_made_small(command, tmp_path, monkeypatch):
    words = shlex.split(command.replace("RUN", "runs/mine"))[2:]
    if "--model" in words:
        words[words.index("--model") + 1] = "model"
        model(tmp_path / "model")
    if "--reward" in words:
        (tmp_path / "mine.py").write_text("def reward(history, item):\n    return item * 0.1\n")
    if "--data" in words:
        words[words.index("--data") + 1] = str(shop(tmp_path / "shop"))
    whole, threads = nano.toy_world, torch.get_num_threads()
    torch.set_num_threads(1)
    world = nano.World(codes=6, items=60, users=60, impressions=8)
    monkeypatch.setattr(nano, "toy_world", lambda cfg: whole(cfg, world))
    make_brief(monkeypatch)
    monkeypatch.chdir(tmp_path)
    none = [word for flag in ("--sft-steps", "--rl-steps") if f"{flag} 0" in command for word in (flag, "0")]
    results = nano.main([*words, *SMALL, *none])  # what is said twice is as it is said last
    torch.set_num_threads(threads)
    assert "base" in results and (len(results) >= 2) == ("--rl-steps 0" not in command)
    assert list(tmp_path.rglob("report.md"))


def test_command_lines_of_the_drivers_parse():
    import make
    import run

    for command in COMMANDS:
        words = shlex.split(command)
        if words[1:2] == ["docs/evidence/run.py"]:
            assert run.parse(words[2:])
        if words[1:2] == ["docs/figures/make.py"]:
            assert make.parse(words[2:])


def test_the_check_installs_every_extra_that_the_pages_install():
    """From nothing, in a fresh environment, on every change."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {extra for command in COMMANDS for group in re.findall(r"\.\[([\w,]+)\]", command)
              for extra in group.split(",")}
    installed = {extra for group in re.findall(r"\.\[([\w,]+)\]", (ROOT / ".ci/run").read_text())
                 for extra in group.split(",")}
    assert wanted <= installed and wanted <= set(extras)


def test_the_layouts_that_the_data_page_shows_are_read(tmp_path):
    page, cfg = PAGES["docs/data.md"], nano.Settings(device="cpu")
    row = re.search(r'\{"history":.*?"target":.*?\}', page)[0]
    (tmp_path / "jsonl").mkdir()
    given = json.loads(row)
    (tmp_path / "jsonl" / "catalogue.json").write_text(json.dumps([*given["history"], given["target"]]))
    for name in ("train", "valid", "test"):
        (tmp_path / "jsonl" / f"{name}.jsonl").write_text(row + "\n")
    read = nano.load_data(tmp_path / "jsonl", cfg)
    assert read.test.history.tolist() == [[0, 1]] and read.test.target.tolist() == [2]

    history = re.search(r"\['<[^\]]*?(?:, \.\.\.)?\]", page)[0].replace(", ...", "")
    target = re.search(r"item_sid\s+what came next: (\S+)", page)[1]
    index = json.loads(re.search(r"DIR/index.json +(\{.*?), \.\.\.\}", page)[1] + "}")
    (tmp_path / "csv").mkdir()
    index |= {f"more {i}": re.findall(r"<\w+>", sid) for i, sid in enumerate([*ast.literal_eval(history), target])}
    (tmp_path / "csv" / "index.json").write_text(json.dumps(index))
    for name in ("train", "valid", "test"):
        (tmp_path / "csv" / f"{name}.csv").write_text(f'history_item_sid,item_sid\n"{history}",{target}\n')
    read = nano.load_data(tmp_path / "csv", cfg)
    assert read.test.history.tolist() == [[1]] and read.test.target.tolist() == [2]
