# SPDX-License-Identifier: MIT
"""A run that was stopped, anywhere and however rudely, goes on to the same bits; a run is repeated from its folder."""

import itertools
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import time

import pytest
from transformers import AutoModelForCausalLM

import nanoadagrpo as nano

from .helpers import save_model
from .shops import jsonl

OPTIONS = ["--device", "cpu", "--sft-steps", "5", "--sft-batch-size", "8", "--rl-steps", "5", "--batch-size", "4",
           "--group-size", "6", "--eval-prompts", "8", "--beam-width", "6", "--eval-every", "2", "--save-every", "2",
           "--updates", "2", "--lr", "1e-2"]


class Stopped(BaseException):
    pass


def begin(out, *arguments):
    return nano.main(["--data", "shop", "--out", str(out), *OPTIONS, *map(str, arguments)])


def resume(out, *arguments):
    return nano.main(["--resume", str(out), *map(str, arguments)])


def stopped_after(monkeypatch, lines, call):
    """Run until so many lines have been logged."""
    with monkeypatch.context() as patch:
        seen, write = [], nano.Journal.__call__

        def counting(self, **row):
            write(self, **row)
            seen.append(row)
            if len(seen) == lines:
                raise Stopped

        patch.setattr(nano.Journal, "__call__", counting)
        with pytest.raises(Stopped):
            call()


def made(out):
    """Everything that a run leaves, but for times, and for where a tokenizer once came from."""
    files = {"metrics.jsonl": (out / "metrics.jsonl").read_bytes()}
    files |= {str(path.relative_to(out)): path.read_bytes() for path in (out / "policy").rglob("*")
              if path.is_file() and path.name != "tokenizer_config.json"}
    report = (out / "report.md").read_text().splitlines()
    return files, [line for line in report if line.startswith("|") and "python" not in line]


@pytest.fixture
def shop(folder):
    """A folder with data, and what an uninterrupted run makes of it."""
    jsonl(folder / "shop")
    begin("whole")
    return folder


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [1, 5, 7, 11, 14, 15])
def test_a_run_stopped_in_any_phase_goes_on_to_the_same_bits(shop, monkeypatch, lines):
    stopped_after(monkeypatch, lines, lambda: begin("here"))
    assert len((shop / "here" / "metrics.jsonl").read_text().splitlines()) == lines
    results = resume("here")
    assert made(shop / "here") == made(shop / "whole")
    assert results == {row["method"]: {k: x for k, x in row.items() if k not in ("phase", "method", "step")}
                       for row in map(json.loads, (shop / "whole" / "metrics.jsonl").read_text().splitlines())
                       if row["phase"] == "test"}
    assert not (shop / "here" / "checkpoints").exists()


def test_a_run_of_all_methods_stopped_again_and_again_goes_on_to_the_same_bits(folder, monkeypatch):
    jsonl(folder / "shop")
    begin("whole", "--method", "all")
    stopped_after(monkeypatch, 20, lambda: begin("here", "--method", "all"))
    for lines in (17, 25, 12):
        stopped_after(monkeypatch, lines, lambda: resume("here"))
    resume("here")
    assert made(folder / "here") == made(folder / "whole")
    assert len(made(folder / "here")[0]) > 3 * len(nano.METHODS)


@pytest.mark.parametrize("lines", [2, 3, 6, 9, 13])
def test_looking_at_the_supervised_steps_changes_no_other_line_and_resumes_to_the_same_bits(shop, monkeypatch, lines):
    look = ["--sft-eval-every", "2"]
    begin("looked", *look)
    rows, plain = ([json.loads(line) for line in (shop / out / "metrics.jsonl").read_text().splitlines()]
                   for out in ("looked", "whole"))
    seen = [row for row in rows if row["phase"] == "sft_valid"]
    assert [row for row in rows if row not in seen] == plain
    assert made(shop / "looked")[1] == made(shop / "whole")[1]
    assert [(row["method"], row["step"]) for row in seen] == [("base", 2), ("base", 4), ("base", 5)]
    start = next(row for row in plain if row["phase"] == "valid")
    assert seen[-1] == {**start, "phase": "sft_valid", "method": "base", "step": 5}
    assert seen[0].keys() == start.keys() and seen[0] != {**seen[-1], "step": 2}, "the policy was moving"
    stopped_after(monkeypatch, lines, lambda: begin("here", *look))
    resume("here")
    assert made(shop / "here") == made(shop / "looked")


def test_a_pretrained_model_goes_on_even_if_the_folder_that_it_came_from_is_gone(folder, monkeypatch):
    jsonl(folder / "shop")
    options = ["--model", save_model(folder / "model"), "--sft-lr", "1e-2"]
    begin("whole", *options)
    stopped_after(monkeypatch, 10, lambda: begin("here", *options))
    shutil.rmtree(folder / "model")
    resume("here")
    assert made(folder / "here") == made(folder / "whole")


def test_without_checkpoints_a_run_begins_again_says_so_and_comes_to_the_same(shop, monkeypatch, capsys):
    stopped_after(monkeypatch, 9, lambda: begin("here", "--save-every", "0"))
    assert not (shop / "here" / "checkpoints").exists()
    resume("here")
    assert "no checkpoint" in capsys.readouterr().out
    assert made(shop / "here")[0] == made(shop / "whole")[0]


def test_the_training_that_a_checkpoint_had_is_not_done_again(shop, monkeypatch):
    stopped_after(monkeypatch, 11, lambda: begin("here"))
    done = json.loads(next((shop / "here" / "checkpoints").glob("*/state.json")).read_text())
    assert (done["phase"], done["step"]) == ("adagrpo", 2)
    machine = (shop / "here" / "machine.jsonl").read_text().splitlines()
    resume("here")
    again = [json.loads(line) for line in (shop / "here" / "machine.jsonl").read_text().splitlines()[len(machine) :]]
    assert [row["step"] for row in again if row["phase"] == "rl"] == [3, 4, 5]
    assert not [row for row in again if row["phase"] == "sft"]


def test_a_checkpoint_is_a_model_that_transformers_loads_and_holds_no_pickle(shop, monkeypatch):
    stopped_after(monkeypatch, 11, lambda: begin("here"))
    [checkpoint] = (shop / "here" / "checkpoints").iterdir()
    AutoModelForCausalLM.from_pretrained(checkpoint)
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}


# -- killed ------------------------------------------------------------------------------------------------------------

fork = multiprocessing.get_context("fork")


def life(call, *arguments, dies=None):
    """In a process of its own, which `dies` may prepare to kill itself."""
    if dies:
        dies()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    call(*arguments)


def kill_at(count, half):
    """Die at the count-th touch of the disk: before it, or having done half of it."""

    def prepare():
        touched = itertools.count()

        def watch(owner, name, part=None):
            real = getattr(owner, name)

            def touch(*arguments, **options):
                if next(touched) == count:
                    if half and part:
                        part(real, *arguments, **options)
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            setattr(owner, name, touch)

        def half_a_file(real, tensors, path):
            real(tensors, path)
            os.truncate(path, path.stat().st_size // 2)

        def half_a_text(real, path, text):
            real(path, text[: len(text) // 2])

        def half_a_folder(real, path, **options):
            for file in sorted(pathlib.Path(path).glob("*"))[::2]:
                if file.is_file():
                    file.unlink()

        watch(nano, "save_file", half_a_file)
        watch(nano.Policy, "save")
        watch(pathlib.Path, "write_text", half_a_text)
        watch(pathlib.Path, "rename")
        watch(shutil, "rmtree", half_a_folder)
        watch(os, "fsync")

    return prepare


def complete(out):
    return (out / "report.md").exists() and not (out / "checkpoints").exists()


def finish(out, call, *arguments):
    """Resume, or begin where nothing had begun, until the run is complete."""
    if complete(out):
        return
    process = fork.Process(target=life, args=(resume, out) if out.exists() else (call, out, *arguments))
    process.start()
    process.join()
    assert process.exitcode == 0, "what was left could not be resumed"


@pytest.mark.parametrize("half", [False, True], ids=["before", "halfway"])
def test_a_kill_at_any_touch_of_the_disk_leaves_what_resume_can_use(shop, half):
    draw, killed = random.Random(half), 0
    for count in [1, 2, *sorted(draw.sample(range(3, 70), 7))]:
        out = shop / f"killed-{count}"
        process = fork.Process(target=life, args=(begin, out), kwargs={"dies": kill_at(count, half)})
        process.start()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        finish(out, begin)
        assert made(out) == made(shop / "whole"), count
    assert killed >= 5, "most of these moments came"


def test_kills_at_random_moments_one_after_the_other_change_nothing(shop):
    draw, began = random.Random(0), time.monotonic()
    finish(shop / "timed", begin)
    whole = time.monotonic() - began
    for trial in range(3):
        out, left = shop / f"hunted-{trial}", whole
        for _ in range(4):
            wait = draw.uniform(0, left)
            process = fork.Process(target=life, args=(resume, out) if out.exists() else (begin, out))
            process.start()
            time.sleep(wait)
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), trial
            if process.exitcode == 0 or complete(out):  # it was faster, or killed when all was done
                assert made(out) == made(shop / "whole"), trial
                shutil.rmtree(out)  # once more, and killed sooner: at last before it has begun
                left = wait / 2
        finish(out, begin)
        assert made(out) == made(shop / "whole"), trial


# -- what cannot be resumed says so ------------------------------------------------------------------------------------


def refused(capsys, call):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call()
    err = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(err) == 1 and err[0].startswith("nanoadagrpo: ")
    return err[0]


def emptied(path):
    path.write_bytes(b"")


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", [pathlib.Path.unlink, emptied, halved], ids=["deleted", "emptied", "halved"])
def test_a_damaged_checkpoint_is_named_in_one_line(folder, monkeypatch, capsys, name, damage):
    jsonl(folder / "shop")
    stopped_after(monkeypatch, 11, lambda: begin("here"))
    [checkpoint] = (folder / "here" / "checkpoints").iterdir()
    damage(checkpoint / name)
    before = (folder / "here" / "metrics.jsonl").read_bytes()
    assert f"here/checkpoints/{checkpoint.name}" in refused(capsys, lambda: resume("here"))
    assert (folder / "here" / "metrics.jsonl").read_bytes() == before


def test_a_log_that_has_lost_lines_is_named_in_one_line(folder, monkeypatch, capsys):
    jsonl(folder / "shop")
    stopped_after(monkeypatch, 11, lambda: begin("here"))
    halved(folder / "here" / "metrics.jsonl")
    assert "here/metrics.jsonl: lines are missing" in refused(capsys, lambda: resume("here"))


def test_what_is_no_run_or_complete_or_to_be_changed_is_refused(shop, capsys):
    assert "nowhere/config.json: cannot be read" in refused(capsys, lambda: resume("nowhere"))
    assert "complete" in refused(capsys, lambda: resume("whole"))
    line = refused(capsys, lambda: resume("whole", "--lr", "0.5", "--seed", "1"))
    assert "leave out" in line and "--lr" in line and "--seed" in line


# -- a run repeated from its own folder --------------------------------------------------------------------------------


def test_a_run_is_repeated_from_its_config_and_flags_beside_it_win(shop):
    nano.main(["--config", "whole/config.json", "--out", "again"])
    assert made(shop / "again") == made(shop / "whole")
    cfg = nano.parse(["--seed", "7", "--config", "whole/config.json", "--lam", "0.5"])
    saved = nano.Settings(**json.loads((shop / "whole" / "config.json").read_text()))
    assert {k: v for k, v in vars(cfg).items() if v != getattr(saved, k)} == {"seed": 7, "lam": 0.5, "out": ""}


@pytest.mark.parametrize(
    "text, words",
    [("{", "cannot be read"), ("[]", "cannot be read"), ('{"grop_size": 3}', "did you mean group_size?"),
     ('{"group_size": "3"}', "group_size '3'"), ('{"toy": 1}', "toy 1"),
     ('{"data": "shop", "tau": 0.01}', "--tau 0.01")],
)
def test_a_config_that_cannot_be_used_is_refused(folder, capsys, text, words):
    (folder / "mine.json").write_text(text)
    assert words in refused(capsys, lambda: nano.main(["--config", "mine.json"]))
