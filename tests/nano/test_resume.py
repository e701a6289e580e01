# SPDX-License-Identifier: MIT
"""A run that was stopped, anywhere and however rudely, goes on to the same bits; what cannot go on says so."""

import hashlib
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
from safetensors import SafetensorError
from safetensors.torch import load_file

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
        seen, write = [], nano.MetricsLog.__call__

        def counting(self, **row):
            write(self, **row)
            seen.append(row)
            if len(seen) == lines:
                raise Stopped

        patch.setattr(nano.MetricsLog, "__call__", counting)
        with pytest.raises(Stopped):
            call()


def rows_of(out):
    """The log without times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in row.items() if key != "seconds"} for row in rows]


def made(out):
    """Everything that a run leaves, but for times."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in (out / "policy").rglob("*") if path.is_file()}
    files["ranker.safetensors"] = (out / "ranker.safetensors").read_bytes()
    report = (out / "report.md").read_text().splitlines()
    return files, rows_of(out), [line for line in report if line.startswith("|")]


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
                       for row in rows_of(shop / "whole") if row["phase"] == "test"}
    assert not list((shop / "here").glob("checkpoint*"))


def test_a_run_of_all_methods_stopped_again_and_again_goes_on_to_the_same_bits(folder, monkeypatch):
    jsonl(folder / "shop")
    begin("whole", "--method", "all")
    stopped_after(monkeypatch, 20, lambda: begin("here", "--method", "all"))
    for lines in (17, 25, 12):
        stopped_after(monkeypatch, lines, lambda: resume("here"))
    resume("here")
    assert made(folder / "here") == made(folder / "whole")
    assert len(made(folder / "here")[0]) > 3 * len(nano.METHODS)


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
    assert not list((shop / "here").glob("checkpoint*"))
    resume("here")
    assert "no checkpoint" in capsys.readouterr().out
    assert made(shop / "here") == made(shop / "whole")


def state(checkpoint):
    """What a checkpoint says, without its tensors."""
    return json.loads(load_file(checkpoint)["state"].numpy().tobytes())


def test_the_training_that_a_checkpoint_had_is_not_done_again(shop, monkeypatch):
    stopped_after(monkeypatch, 11, lambda: begin("here"))
    [checkpoint] = (shop / "here").glob("checkpoint-*")
    done, steps = state(checkpoint), []
    assert (done["phase"], done["step"]) == ("adagrpo", 2)
    step = nano.Optimizer.step
    monkeypatch.setattr(nano.Optimizer, "step",
                        lambda self, where, **watched: (steps.append(where), step(self, where, **watched))[1])
    resume("here")
    assert [where for where in steps if not where.startswith("ranker")] == [
        f"adagrpo, step {i}" for i in (3, 4, 5) for _ in range(2)]


def test_a_checkpoint_is_one_file_without_pickle_whose_name_is_its_checksum(shop, monkeypatch):
    stopped_after(monkeypatch, 11, lambda: begin("here"))
    [checkpoint] = (shop / "here").glob("*checkpoint*")
    assert checkpoint.suffix == ".safetensors"
    assert hashlib.sha256(checkpoint.read_bytes()).hexdigest().startswith(checkpoint.stem.split("-")[-1])
    assert [{key: x for key, x in row.items() if key != "seconds"} for row in state(checkpoint)["rows"]] == rows_of(
        shop / "here")[: len(state(checkpoint)["rows"])]


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
            os.truncate(path, os.path.getsize(path) // 2)

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
        watch(pathlib.Path, "unlink")
        watch(shutil, "rmtree", half_a_folder)
        watch(os, "fsync")

    return prepare


def complete(out):
    return (out / "report.md").exists() and not list(out.glob("checkpoint-*"))


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


def refused(capsys, call, code=2):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call()
    err = capsys.readouterr().err.splitlines()
    assert end.value.code == code and len(err) == 1 and err[0].startswith("nanoadagrpo: ")
    return err[0]


def emptied(path):
    path.write_bytes(b"")


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def stopped(folder, monkeypatch):
    """A run that has a checkpoint; and its one file."""
    jsonl(folder / "shop")
    stopped_after(monkeypatch, 11, lambda: begin("here"))
    [checkpoint] = (folder / "here").glob("checkpoint-*")
    return checkpoint


@pytest.mark.parametrize("damage", [emptied, halved], ids=["emptied", "halved"])
def test_a_damaged_checkpoint_is_named_in_one_line(stopped, capsys, damage):
    damage(stopped)
    before = (stopped.parent / "metrics.jsonl").read_bytes()
    assert f"here/{stopped.name}" in refused(capsys, lambda: resume("here"))
    assert (stopped.parent / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("place", [0.0, 0.01, 0.3, 0.6, 0.999])
def test_one_flipped_bit_anywhere_in_a_checkpoint_is_refused(stopped, capsys, place):
    data = bytearray(stopped.read_bytes())
    data[int(len(data) * place)] ^= 16
    stopped.write_bytes(data)
    assert f"here/{stopped.name}" in refused(capsys, lambda: resume("here"))


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, emptied, halved], ids=["deleted", "emptied", "halved"])
def test_a_damaged_log_is_made_good_from_the_checkpoint(shop, monkeypatch, damage):
    stopped_after(monkeypatch, 11, lambda: begin("here"))
    damage(shop / "here" / "metrics.jsonl")
    resume("here")
    assert made(shop / "here") == made(shop / "whole")


def test_other_data_are_refused_and_the_same_data_may_have_moved(shop, monkeypatch, capsys):
    stopped_after(monkeypatch, 11, lambda: begin("here"))
    lines = (shop / "shop" / "train.jsonl").read_text().splitlines(keepends=True)
    (shop / "shop").rename(shop / "moved")
    shutil.copytree(shop / "moved", shop / "other")
    (shop / "other" / "train.jsonl").write_text("".join([*lines[1:], lines[0]]))
    shutil.copytree(shop / "moved", shop / "grown")
    catalogue = json.loads((shop / "grown" / "catalogue.json").read_text())
    (shop / "grown" / "catalogue.json").write_text(json.dumps([*catalogue, [7, 7, 7]]))
    for name in ("other", "grown"):
        assert "another set of data" in refused(capsys, lambda name=name: resume("here", "--data", name))
    assert "shop" in refused(capsys, lambda: resume("here"))
    resume("here", "--data", "moved")
    assert made(shop / "here") == made(shop / "whole")


def test_another_number_of_processes_is_refused(stopped, monkeypatch, capsys):
    monkeypatch.setattr(nano, "world_size", lambda: 2)
    assert "another number of processes" in refused(capsys, lambda: resume("here"))


def test_a_run_that_is_being_run_is_refused(stopped, capsys):
    fcntl = pytest.importorskip("fcntl")
    with (stopped.parent / "config.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in refused(capsys, lambda: resume("here"))


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_a_full_disk_ends_in_one_line_and_the_checkpoint_before_is_used(shop, monkeypatch, capsys, fault):
    def full(tensors, path):
        pathlib.Path(path).write_bytes(b"half")
        raise fault

    stopped_after(monkeypatch, 11, lambda: begin("here"))
    with monkeypatch.context() as patch:
        patch.setattr(nano, "save_file", full)
        line = refused(capsys, lambda: resume("here"))
    assert "--resume here" in line and "space" in line
    assert len(list((shop / "here").glob("*checkpoint*"))) == 1
    resume("here")
    assert made(shop / "here") == made(shop / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_one_line_that_says_how_to_go_on(shop, monkeypatch, capsys, number, code):
    with monkeypatch.context() as patch:
        step = nano.Optimizer.step

        def stepping(self, where, **watched):
            if where == "adagrpo, step 4":
                os.kill(os.getpid(), number)
            return step(self, where, **watched)

        patch.setattr(nano.Optimizer, "step", stepping)
        assert "--resume here" in refused(capsys, lambda: begin("here"), code)
    resume("here")
    assert made(shop / "here") == made(shop / "whole")


def test_what_is_no_run_or_complete_or_to_be_changed_is_refused(shop, capsys):
    assert "nowhere/config.json" in refused(capsys, lambda: resume("nowhere"))
    assert "complete" in refused(capsys, lambda: resume("whole"))
    line = refused(capsys, lambda: resume("whole", "--lr", "0.5", "--seed", "1"))
    assert "leave out" in line and "--lr" in line and "--seed" in line


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100000, '{"grop_size": 3}', '{"group_size": "3"}'])
def test_a_config_that_cannot_be_used_is_refused(folder, capsys, text):
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(text)
    assert "run/config.json" in refused(capsys, lambda: resume("run"))
