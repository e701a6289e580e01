# SPDX-License-Identifier: MIT
"""A run that was stopped, anywhere and however rudely, goes on to the same bits; what cannot go on says so."""

import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import shlex
import shutil
import signal
import sys
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig

import nanoadagrpo as nano

from .helpers import DEVICE, FAMILIES, logged, made, make_brief, refused, save_model
from .shops import CODES, jsonl, minionerec

sys.path[:0] = [str(pathlib.Path(__file__).parents[1] / "benchmarks")]
import families  # noqa: E402

OPTIONS = ["--device", DEVICE, "--sft-steps", "5", "--sft-batch-size", "8", "--rl-steps", "5", "--batch-size", "4",
           "--group-size", "6", "--eval-prompts", "8", "--beam-width", "6", "--eval-every", "2", "--save-every", "2",
           "--updates", "2", "--lr", "1e-2"]


class Stopped(BaseException):
    pass


pytestmark = pytest.mark.usefixtures("brief")


def begin(out, *arguments):
    return nano.main(["--data", "shop", "--out", str(out), *OPTIONS, *map(str, arguments)])


def resume(out, *arguments):
    return nano.main(["--resume", str(out), *map(str, arguments)])


def stop():
    raise Stopped


@contextlib.contextmanager
def at_line(monkeypatch, lines, act):
    """Do something when so many lines have been logged; yields those that were."""
    with monkeypatch.context() as patch:
        seen, write = [], nano.MetricsLog.__call__

        def counting(self, **row):
            write(self, **row)
            seen.append(self.rows[-1])
            if len(seen) == lines:
                act()

        patch.setattr(nano.MetricsLog, "__call__", counting)
        yield seen


def stopped_after(monkeypatch, lines, call):
    """Run until so many lines have been logged."""
    with at_line(monkeypatch, lines, stop), pytest.raises(Stopped):
        call()


def checkpoint(out):
    [path] = out.glob("*checkpoint*")
    return path


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Data, what an uninterrupted run makes of them, and one that stopped in its fourth step, the second saved."""
    folder = tmp_path_factory.mktemp("templates")
    jsonl(folder / "shop")
    with pytest.MonkeyPatch.context() as patch:
        make_brief(patch)
        patch.chdir(folder)
        begin("whole")
        stopped_after(patch, 12, lambda: begin("here"))
    return folder


@pytest.fixture
def shop(templates, folder):
    """A folder with data, and what an uninterrupted run makes of them."""
    shutil.copytree(templates / "shop", folder / "shop")
    shutil.copytree(templates / "whole", folder / "whole")
    return folder


@pytest.fixture
def here(templates, shop):
    """A run that can go on."""
    shutil.copytree(templates / "here", shop / "here")
    return shop / "here"


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [1, 5, 6, 7, 12, 15, 16])
def test_a_run_stopped_in_any_phase_goes_on_to_the_same_bits(shop, monkeypatch, lines):
    stopped_after(monkeypatch, lines, lambda: begin("here"))
    assert len(logged(shop / "here")) == lines
    results = resume("here")
    assert made(shop / "here") == made(shop / "whole")
    assert results == {row["method"]: {k: x for k, x in row.items() if k not in ("phase", "method", "step")}
                       for row in logged(shop / "whole") if row["phase"] == "test"}
    assert not list((shop / "here").glob("*checkpoint*"))


def test_a_run_of_all_methods_stopped_again_and_again_goes_on_to_the_same_bits(folder, monkeypatch):
    jsonl(folder / "shop")
    begin("whole", "--method", "all")
    stopped_after(monkeypatch, 20, lambda: begin("here", "--method", "all"))
    for lines in (17, 25, 12):
        stopped_after(monkeypatch, lines, lambda: resume("here"))
    resume("here")
    assert made(folder / "here") == made(folder / "whole")
    assert len(made(folder / "here")[0]) > 3 * len(nano.METHODS)


@pytest.mark.parametrize("options", [["--sft-steps", "0"], ["--rl-steps", "0"], ["--method", "nll,grpo"],
                                     ["--micro-batch-size", "1", "--method", "random-gate"]], ids=" ".join)
def test_any_sort_of_run_goes_on_to_the_same_bits(folder, monkeypatch, options):
    jsonl(folder / "shop")
    begin("whole", *options)
    stopped_after(monkeypatch, 3, lambda: begin("here", *options))
    stopped_after(monkeypatch, len(logged(folder / "whole")) // 2, lambda: resume("here"))
    resume("here")
    assert made(folder / "here") == made(folder / "whole")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pretrained_model_goes_on_even_if_the_folder_that_it_came_from_is_gone(folder, monkeypatch, family):
    jsonl(folder / "shop")
    options = ["--model", save_model(folder / "model", family), "--sft-lr", "1e-2"]
    begin("whole", *options)
    stopped_after(monkeypatch, 11, lambda: begin("here", *options))
    shutil.rmtree(folder / "model")
    resume("here")
    assert made(folder / "here") == made(folder / "whole")


@pytest.mark.parametrize("family, kind", [("llama", "attn_implementation"), ("mixtral", "experts_implementation")])
def test_a_model_goes_on_with_the_kind_of_products_that_it_began_with(folder, monkeypatch, family, kind):
    """Plain ones and fused ones round differently. A policy has the library's own, whatever its folder asks for."""
    monkeypatch.setitem(FAMILIES, "mixtral", lambda **kw: MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=2, num_experts_per_tok=1, **kw))
    jsonl(folder / "shop")
    options = ["--model", save_model(folder / "model", family), "--sft-lr", "1e-2"]
    path, had, broadcast = folder / "model" / "config.json", [], nano.broadcast
    path.write_text(json.dumps(json.loads(path.read_text()) | {kind: "eager"}))
    monkeypatch.setattr(nano, "broadcast", lambda model: (  # the ranker has no config
        hasattr(model, "config") and had.append(getattr(model.config, f"_{kind}")), broadcast(model))[1])
    begin("whole", *options)
    stopped_after(monkeypatch, 11, lambda: begin("here", *options))
    resume("here")
    assert made(folder / "here") == made(folder / "whole") and len({*had}) == 1 and len(had) == 3


@pytest.mark.parametrize("family", ["roc_bert", "got_ocr2"])
def test_a_model_of_several_parts_or_tables_goes_on_to_the_same_bits(folder, monkeypatch, family):
    """roc_bert: further embeddings with a row for padding, which would learn only after the resume. got_ocr2: products
    of attention by another kernel in its part for text."""
    jsonl(folder / "shop")
    families.make(family, folder / "model")
    options = ["--model", "model", "--sft-lr", "1e-2"]
    begin("whole", *options)
    stopped_after(monkeypatch, 11, lambda: begin("here", *options))
    resume("here")
    assert made(folder / "here") == made(folder / "whole")


def test_without_checkpoints_a_run_begins_again_says_so_and_comes_to_the_same(shop, monkeypatch, capsys):
    stopped_after(monkeypatch, 10, lambda: begin("here", "--save-every", "0"))
    assert not list((shop / "here").glob("*checkpoint*"))
    capsys.readouterr()
    resume("here")
    assert "no checkpoint" in capsys.readouterr().out
    assert made(shop / "here") == made(shop / "whole")


def test_the_training_that_a_checkpoint_had_is_not_done_again(here, monkeypatch):
    with at_line(monkeypatch, 1000, stop) as again:
        resume("here")
    assert [row["step"] for row in again if row["phase"] == "rl"] == [3, 4, 5]
    assert not [row for row in again if row["phase"] == "sft"]


def test_how_often_a_run_saves_may_change_on_the_way(here, shop):
    resume("here", "--save-every", "1")
    assert made(shop / "here") == made(shop / "whole")


# -- a checkpoint ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_one_file_without_pickle_and_bears_its_checksum(here):
    assert sorted(path.name for path in here.iterdir()) == [checkpoint(here).name, "config.json", "metrics.jsonl"]
    assert checkpoint(here).suffix == ".safetensors" and len(load_file(checkpoint(here))) > 10
    digest = hashlib.sha256(checkpoint(here).read_bytes()).hexdigest()
    assert checkpoint(here).stem.split("-")[-1] == digest[:16]


def flipped(raw, bit):
    raw = bytearray(raw)
    raw[bit // 8] ^= 1 << bit % 8
    return bytes(raw)


def test_one_flipped_bit_anywhere_in_a_checkpoint_is_refused_and_nothing_is_touched(here, capsys):
    path, before = checkpoint(here), (here / "metrics.jsonl").read_bytes()
    raw, draw = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(raw[:8], "little")
    places = [*range(0, 64, 9), *(draw.randrange(64, 8 * header) for _ in range(8)), 8 * header, 8 * len(raw) - 1,
              *(draw.randrange(8 * header, 8 * len(raw)) for _ in range(16))]
    for bit in places:
        path.write_bytes(flipped(raw, bit))
        line = refused(capsys, lambda: resume("here"))
        assert f"here/{path.name}" in line and "checksum" in line, bit
        assert (here / "metrics.jsonl").read_bytes() == before
    path.write_bytes(raw)
    resume("here")


DAMAGE = {
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another's name": lambda path: path.rename(path.with_name(path.name[:-13] + "x.safetensors")),
    "no name": lambda path: path.rename(path.with_name("checkpoint-last.safetensors")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "something else with the right checksum": lambda path: (
        path.unlink(), path.with_name(f"checkpoint-9999999999-{hashlib.sha256(b'x').hexdigest()[:16]}.safetensors")
        .write_bytes(b"x")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_in_one_line(here, capsys, damage):
    before = (here / "metrics.jsonl").read_bytes()
    damage(checkpoint(here))
    assert f"here/{checkpoint(here).name}" in refused(capsys, lambda: resume("here"))
    assert (here / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", [
    pathlib.Path.unlink, DAMAGE["emptied"], DAMAGE["halved"], DAMAGE["a byte long"],
    lambda path: path.write_bytes(flipped(path.read_bytes(), 1234))],
    ids=["deleted", "emptied", "halved", "a byte long", "flipped"])
def test_a_damaged_log_is_written_anew_from_the_checkpoint(here, shop, damage):
    damage(shop / "here" / "metrics.jsonl")
    resume("here")
    assert made(shop / "here") == made(shop / "whole")


def test_if_the_checkpoint_is_deleted_the_run_begins_again(here, shop, capsys):
    checkpoint(shop / "here").unlink()
    resume("here")
    assert "no checkpoint" in capsys.readouterr().out
    assert made(shop / "here") == made(shop / "whole")


@pytest.mark.parametrize("flags", [[], ["--save-every", "0"]], ids=["saving again", "saving no more"])
def test_what_a_kill_left_beside_a_checkpoint_is_no_obstacle_and_goes_at_the_end(here, shop, flags):
    (shop / "here" / "checkpoint.partial").write_bytes(b"half of it")
    resume("here", *flags)
    assert made(shop / "here") == made(shop / "whole") and not [*(shop / "here").glob("checkpoint*")]


def test_copies_of_a_checkpoint_that_the_user_has_made_are_not_deleted(here, shop):
    path = checkpoint(here)
    names = {"checkpoint-0-mine.safetensors", "checkpoint-00 (copy).safetensors", f"{path.name}.bak"}
    raw = path.read_bytes()
    for name in names:
        (shop / "here" / name).write_bytes(raw)
    resume("here", "--save-every", "1")
    assert {x.name for x in (shop / "here").glob("checkpoint*")} == names, "of its own, none is left"
    for name in names:
        assert (shop / "here" / name).read_bytes() == raw
        (shop / "here" / name).unlink()
    assert made(shop / "here") == made(shop / "whole")


def forge(path, change):
    """Another state in a checkpoint, with the right checksum."""
    tensors = load_file(path)
    state = json.loads(tensors["state"].numpy().tobytes())
    change(state)
    tensors["state"] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    path.unlink()
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    path.rename(path.with_name(f"{path.stem.rsplit('-', 1)[0]}-{digest}.safetensors"))


MODELS = {
    "of no kind": lambda model: model.pop("model_type"),
    "of an unknown kind": lambda model: model.update(model_type="x"),
    "of text": lambda model: model.update(hidden_size="wide"), "of no size": lambda model: model.update(hidden_size=0),
    "of heads that do not fit": lambda model: model.update(num_attention_heads=3),
    "of another width": lambda model: model.update(hidden_size=32),
    "of more words": lambda model: model.update(vocab_size=1000), "empty": dict.clear,
}


@pytest.mark.parametrize("change", MODELS.values(), ids=MODELS)
def test_a_checkpoint_whose_model_cannot_be_built_is_named_in_one_line(here, capsys, change):
    forge(checkpoint(here), lambda state: change(state["model"]))
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    line = refused(capsys, lambda: resume("here"))
    assert f"here/{checkpoint(here).name}: " in line and "begin a new run" in line
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


@pytest.mark.parametrize("key", ["rows", "origin", "policy"])
@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_checkpoint_that_lacks_something_is_named_in_one_line(here, capsys, key, how):
    path = checkpoint(here)
    forge(path, lambda state: state.pop(key) if how == "gone" else state.update({key: None}))
    line = refused(capsys, lambda: resume("here"))
    assert f"here/{checkpoint(here).name}: " in line and "begin a new run" in line


def with_other_names(weights):
    return {name.replace("mlp.", "feed_forward."): x for name, x in weights.items()}


WEIGHTS = {
    "of other names": lambda state: state.update(policy=with_other_names(state["policy"])),
    "none": lambda state: state.update(policy={}), "too few": lambda state: state["policy"].popitem(),
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS)
def test_a_checkpoint_with_weights_of_another_model_is_refused(here, capsys, change):
    """As of another version of transformers: the weights that it does not find would be random ones."""
    forge(checkpoint(here), change)
    line = refused(capsys, lambda: resume("here"))
    assert f"here/{checkpoint(here).name}: " in line and "begin a new run" in line


@pytest.mark.parametrize("rows", [[], {}, [{}], [0], [{"phase": "sft"}]], ids=str)
def test_a_checkpoint_of_no_step_is_refused(here, capsys, rows):
    forge(checkpoint(here), lambda state: state.update(rows=rows))
    line = refused(capsys, lambda: resume("here"))
    assert f"here/{checkpoint(here).name}: " in line and "begin a new run" in line


def test_a_checkpoint_that_is_forged_into_itself_is_read(here, shop):
    forge(checkpoint(here), lambda state: None)
    resume("here")
    assert made(shop / "here") == made(shop / "whole")


def test_what_a_kill_left_of_a_policy_that_was_being_saved_is_gone_at_the_end(here, shop):
    for name in (".tmpA1b2C3", "policy/.tmpX9y8Z7"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(b"half of it")
    mine = [here / ".tmp_notes", here / "policy" / ".tmp", here / ".tmpA1b2C3-kept", here / ".tmpf0ld3r" / "inside"]
    for path in mine:  # not of safetensors' making
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    resume("here")
    left = {path for path in here.rglob("*") if "tmp" in path.name or path.name == "inside"}
    assert left == {*mine, here / ".tmpf0ld3r"}
    for path in mine:
        path.unlink()
    (here / ".tmpf0ld3r").rmdir()
    assert made(shop / "here") == made(shop / "whole")


@pytest.mark.parametrize("when", ["load_data", "make_generator"])  # before and after it is asked for a checkpoint
def test_a_run_that_another_process_ends_meanwhile_is_not_begun_again(here, shop, monkeypatch, capsys, when):
    work = getattr(nano, when)

    def slow(*arguments):
        monkeypatch.setattr(nano, when, work)
        resume("here")
        return work(*arguments)

    monkeypatch.setattr(nano, when, slow)
    line = refused(capsys, lambda: resume("here"))
    assert line == "nanoadagrpo: --resume here: this run is complete, see its report.md"
    assert made(shop / "here") == made(shop / "whole") and len(logged(here)) > 12


def test_a_complete_run_of_the_name_that_later_processes_say_is_no_obstacle(shop):
    """They do not know the number of the folder, and call it RUN."""
    shutil.copytree(shop / "whole", shop / "RUN")
    with nano.locked(pathlib.Path("RUN"), [], nano.parse(["--data", "shop"])):
        pass


def ends(monkeypatch, what):
    """Something happens when the last table is about to be printed, the report having been written."""
    calls = itertools.count(1)

    def at_the_end(results, titles, table=nano.table):
        if next(calls) == 2:
            what()
        return table(results, titles)

    monkeypatch.setattr(nano, "table", at_the_end)


def broken():
    raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("what, code, says", [
    (lambda: os.kill(os.getpid(), signal.SIGINT), 130, "stopped; nothing is lost"),
    (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "stopped; nothing is lost"),
    (broken, 2, "[Errno 32] Broken pipe")], ids=["Ctrl-C", "SIGTERM", "broken pipe"])
def test_what_stops_a_complete_run_does_not_say_how_to_go_on(shop, monkeypatch, capsys, what, code, says):
    ends(monkeypatch, what)
    assert refused(capsys, lambda: begin("here"), code) == f"nanoadagrpo: {says}"
    assert made(shop / "here") == made(shop / "whole") and complete(shop / "here")


def test_a_signal_before_the_rows_are_read_names_no_step(here, shop, monkeypatch, capsys):
    monkeypatch.setattr(nano, "origin_of", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    line = refused(capsys, lambda: resume("here"), 143)
    assert line == "nanoadagrpo: stopped; go on with --resume here"


def test_data_that_have_moved_are_named_with_the_remedy(here, shop, capsys):
    (shop / "shop").rename(shop / "elsewhere")
    line = refused(capsys, lambda: resume("here"))
    assert line.startswith("nanoadagrpo: shop: holds neither")
    assert line.endswith("; if the data have moved, name them by --data")
    resume("here", "--data", "elsewhere")
    assert made(shop / "here") == made(shop / "whole")


@pytest.mark.parametrize("config", [dict(tensor="0"), dict(foo=dict(tensor=1)), dict(foo=[dict(tensor="state")])],
                         ids=str)
def test_a_model_with_a_setting_called_tensor_goes_on_too(folder, monkeypatch, config):
    jsonl(folder / "shop"), save_model(folder / "model")
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    begin("whole", "--model", "model")
    stopped_after(monkeypatch, 12, lambda: begin("here", "--model", "model"))
    resume("here")
    assert made(folder / "here") == made(folder / "whole")


# -- killed ------------------------------------------------------------------------------------------------------------

fork = multiprocessing.get_context("fork")
forks = pytest.mark.skipif(DEVICE != "cpu", reason="CUDA cannot be used in a fork")


def life(call, *arguments, dies=None, said=None):
    """In a process of its own, which `dies` may prepare to kill itself; what it says goes into a file."""
    if dies:
        dies()
    with (open(os.devnull, "w") as out, open(said or os.devnull, "w") as err,
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
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

        def half_a_file(real, tensors, path, *header):
            real(tensors, path, *header)
            os.truncate(path, path.stat().st_size // 2)

        def half_a_text(real, path, text):
            real(path, text[: len(text) // 2])

        watch(nano, "save_file", half_a_file)
        watch(nano, "save_policy")
        watch(pathlib.Path, "write_text", half_a_text)
        watch(pathlib.Path, "mkdir")
        watch(pathlib.Path, "rename")
        watch(pathlib.Path, "unlink")
        watch(os, "fsync")

    return prepare


def complete(out):
    return (out / "report.md").exists() and not list(out.glob("checkpoint-*"))


def finish(out, call, *arguments):
    """Resume, or begin where nothing had begun, until the run is complete."""
    if complete(out):
        return
    if out.exists() and not (out / "metrics.jsonl").exists():  # killed while the folder was made
        assert not list(out.glob("checkpoint-*"))
        shutil.rmtree(out)
    process = fork.Process(target=life, args=(resume, out) if out.exists() else (call, out, *arguments))
    process.start()
    process.join()
    assert process.exitcode == 0, "what was left could not be resumed"


@forks
@pytest.mark.parametrize("half", [False, True], ids=["before", "halfway"])
def test_a_kill_at_any_touch_of_the_disk_leaves_what_resume_can_use(shop, half):
    draw, killed = random.Random(half), 0
    counts = range(45) if os.environ.get("DEEP_TESTS") else [1 + 2 * half, *sorted(draw.sample(range(45), 3))]
    for count in counts:
        out = shop / f"killed-{count}"
        process = fork.Process(target=life, args=(begin, out), kwargs={"dies": kill_at(count, half)})
        process.start()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        finish(out, begin)
        assert made(out) == made(shop / "whole"), count
    assert killed > len(counts) / 2, "most of these moments came"


@forks
@pytest.mark.parametrize("number, codes", [(signal.SIGKILL, [0, -9]), (signal.SIGTERM, [0, 143, -15]),
                                           (signal.SIGINT, [0, 130])], ids=["SIGKILL", "SIGTERM", "SIGINT"])
def test_signals_at_random_moments_one_after_the_other_change_nothing(shop, number, codes):
    draw, began = random.Random(number), time.monotonic()
    finish(shop / "timed", begin)
    whole, out, left = time.monotonic() - began, shop / "hunted", time.monotonic() - began
    for _ in range(20 if os.environ.get("DEEP_TESTS") else 3):
        process = fork.Process(target=life, args=(resume, out) if out.exists() else (begin, out),
                               kwargs={"said": shop / "said"})
        process.start()
        wait = draw.uniform(0, left)
        time.sleep(wait)
        os.kill(process.pid, number)
        process.join()
        said = (shop / "said").read_text() if (shop / "said").exists() else ""
        assert process.exitcode in codes or (wait < whole / 4 and process.exitcode < 2), said  # it had not begun
        if process.exitcode == codes[1]:
            assert number == signal.SIGKILL or ("stopped" in said and len(said.splitlines()) == 1)
        (shop / "said").unlink(missing_ok=True)
        if process.exitcode == 0 or complete(out):  # it was faster, or killed when all was done
            assert made(out) == made(shop / "whole")
            shutil.rmtree(out)  # once more, and killed sooner: at last before it has begun
            left = wait / 2
    finish(out, begin)
    assert made(out) == made(shop / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("lines, last", [(1, "sft, step 1"), (4, "sft, step 4"), (6, "sft, step 5"),
                                         (10, "adagrpo, step 2"), (16, "adagrpo, step 5")])
def test_a_signal_ends_a_run_in_one_line_that_says_how_to_go_on(shop, monkeypatch, capsys, number, code, lines, last):
    before = signal.getsignal(number)
    with at_line(monkeypatch, lines, lambda: os.kill(os.getpid(), number)):
        line = refused(capsys, lambda: begin("here"), code)
    how = "no checkpoint yet, begin again" if last == "sft, step 1" else "go on"
    assert line == f"nanoadagrpo: stopped after {last}; {how} with --resume here"
    assert signal.getsignal(number) is before
    resume("here")
    assert made(shop / "here") == made(shop / "whole")


@pytest.mark.parametrize("number, other, code", [
    (signal.SIGINT, signal.SIGINT, 130), (signal.SIGTERM, signal.SIGINT, 143), (signal.SIGINT, signal.SIGTERM, 130)],
    ids=["Ctrl-C twice", "SIGTERM and Ctrl-C", "Ctrl-C and SIGTERM"])
def test_a_second_signal_is_ignored_while_the_first_is_handled(shop, monkeypatch, number, other, code):
    class Rude(io.StringIO):
        def write(self, text):
            os.kill(os.getpid(), other)
            return super().write(text)

    before = [signal.getsignal(x) for x in (number, other)]
    with monkeypatch.context() as patch, at_line(monkeypatch, 9, lambda: os.kill(os.getpid(), number)):
        patch.setattr("sys.stderr", err := Rude())
        with pytest.raises(SystemExit) as end:
            begin("here")
    [line] = err.getvalue().splitlines()
    assert end.value.code == code
    assert line.startswith("nanoadagrpo: stopped after") and line.endswith("; go on with --resume here")
    assert [signal.getsignal(x) for x in (number, other)] == before
    module = torch.nn.Linear(1, 1)  # who goes on in Python can train again
    module(torch.ones(1)).backward()
    nano.Optimizer(module, 0.1, 1).step("here")
    resume("here")
    assert made(shop / "here") == made(shop / "whole")


def test_after_a_signal_others_are_handled_by_doing_nothing():
    """Were they ignored instead, Python would tell of one that was on its way already."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    try:
        with pytest.raises(KeyboardInterrupt):
            nano.interrupt(signal.SIGINT, None)
        assert all(callable(signal.getsignal(number)) for number in numbers)
        for number in numbers:
            signal.raise_signal(number)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_file_in_the_place_of_the_policy_loses_nothing(shop, here, capsys):
    (here / "policy").write_text("x")
    assert "File exists" in refused(capsys, lambda: resume("here"))
    (here / "policy").unlink()
    resume("here")
    assert made(here) == made(shop / "whole")


@pytest.mark.parametrize("name", ["a b", "it's", "$HOME", "[x]*"])
def test_what_a_message_says_to_go_on_with_can_be_pasted_into_a_shell(shop, monkeypatch, capsys, name):
    with at_line(monkeypatch, 8, lambda: os.kill(os.getpid(), signal.SIGINT)):
        line = refused(capsys, lambda: begin(name), code=130)
    assert shlex.split(line[line.index("--resume") :]) == ["--resume", name]
    with failing(monkeypatch, nano, "save_file", FULL, 1):
        line = refused(capsys, lambda: resume(name))
    assert shlex.split(line[line.index("--resume") :]) == ["--resume", name]
    resume(name)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_of_which_a_library_makes_an_error_is_still_a_signal(here, shop, monkeypatch, capsys, number, code):
    def load(path):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise TypeError("could not determine the shape") from None

    with monkeypatch.context() as patch:
        patch.setattr(nano, "load_file", load)
        assert "stopped" in refused(capsys, lambda: resume("here"), code)
    resume("here")
    assert made(here) == made(shop / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_before_the_first_step_leaves_nothing(folder, monkeypatch, capsys, number, code):
    jsonl(folder / "shop")
    read = nano.load_data
    monkeypatch.setattr(nano, "load_data", lambda *arguments: (os.kill(os.getpid(), number), read(*arguments))[1])
    line = refused(capsys, lambda: begin("here"), code)
    assert "stopped" in line and "--resume" not in line
    assert [path.name for path in folder.iterdir()] == ["shop"]


# -- what the disk refuses ---------------------------------------------------------------------------------------------

FULL = OSError(28, "No space left on device")
FAULTS = {
    "disk full": FULL,
    "disk full, as safetensors has it": SafetensorError("Error while serializing: I/O error: No space left on device"),
    "read-only": OSError(30, "Read-only file system"),
    "not allowed": PermissionError(13, "Permission denied"),
    "broken disk": OSError(5, "Input/output error"),
}


@contextlib.contextmanager
def failing(monkeypatch, owner, name, error, count):
    """From the count-th call on."""
    with monkeypatch.context() as patch:
        calls, real = itertools.count(1), getattr(owner, name)

        def call(*arguments, **options):
            if next(calls) >= count:
                if owner is nano and name == "save_file":
                    pathlib.Path(arguments[1]).write_bytes(b"half of it")
                raise error
            return real(*arguments, **options)

        patch.setattr(owner, name, call)
        yield


@pytest.mark.parametrize("error, count", [*[(error, 3) for error in FAULTS.values()], (FULL, 1)],
                         ids=[*FAULTS, "disk full at once"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_and_says_how_to_go_on(
        shop, monkeypatch, capsys, error, count):
    with failing(monkeypatch, nano, "save_file", error, count):
        line = refused(capsys, lambda: begin("here"))
    assert str(error).splitlines()[0] in line and "--resume here" in line
    assert len(list((shop / "here").glob("*checkpoint*"))) == (count > 1)
    resume("here")
    assert made(shop / "here") == made(shop / "whole")


@pytest.mark.parametrize("owner, name, count", [
    (os, "fsync", 2), (pathlib.Path, "rename", 3), (pathlib.Path, "unlink", 2), (pathlib.Path, "open", 9),
    (pathlib.Path, "write_text", 2), (pathlib.Path, "write_text", 3), (nano, "save_policy", 1)],
    ids=lambda value: getattr(value, "__name__", str(value)))
def test_whatever_cannot_be_written_is_one_line_and_the_run_can_go_on(shop, monkeypatch, capsys, owner, name, count):
    with failing(monkeypatch, owner, name, FULL, count):
        line = refused(capsys, lambda: begin("here"))
    assert "No space left on device" in line and "--resume here" in line
    resume("here")
    assert made(shop / "here") == made(shop / "whole")


@pytest.mark.parametrize("flags, kept", [
    (["--lr", "1e38"], "sft"), (["--lr", "1e25"], "sft"), (["--sft-lr", "1e38"], None)], ids=str)
def test_weights_that_have_run_away_are_not_saved_and_the_checkpoint_before_them_stays(shop, capsys, flags, kept):
    line = refused(capsys, lambda: begin("here", *flags, "--save-every", "1", "--eval-every", "9", "--updates", "1"))
    assert "the weights have run away, beyond float32; lower the learning rate; the run so far: --resume here" in line
    left = list((shop / "here").glob("checkpoint*"))
    assert len(left) == (kept is not None)
    for path in left:
        found = load_file(path)
        assert all(x.isfinite().all() for x in found.values() if x.is_floating_point())
        state = json.loads(found["state"].numpy().tobytes())
        assert state["rows"][-1]["phase"] == kept


def test_a_disk_that_is_full_at_the_tokenizer_is_one_line_and_the_run_can_go_on(shop, monkeypatch, capsys):
    """The tokenizers library raises no OSError."""
    error = Exception("No space left on device (os error 28)")
    with failing(monkeypatch, nano.transformers.PreTrainedTokenizerFast, "save_pretrained", error, 1):
        line = refused(capsys, lambda: begin("here"))
    assert "here/policy: No space left on device" in line and line.endswith("; the run so far: --resume here")
    resume("here")
    assert made(shop / "here") == made(shop / "whole")
    with failing(monkeypatch, nano.transformers.PreTrainedTokenizerFast, "save_pretrained", error, 1):
        line = refused(capsys, lambda: begin("evaluated", "--rl-steps", "0"))  # the base policy is saved elsewhere
    assert "evaluated/policy: No space left" in line and line.endswith("; the run so far: --resume evaluated")


def test_a_run_resumed_from_within_its_folder_has_its_name_in_the_report(shop, monkeypatch):
    stopped_after(monkeypatch, 4, lambda: begin("here"))
    monkeypatch.chdir("here")
    nano.main(["--resume", ".", "--data", "../shop"])
    assert (shop / "here" / "report.md").read_text().startswith("# here\n")


@pytest.mark.parametrize("lines", [1, 4, 9])
def test_a_folder_that_is_gone_is_one_line(here, monkeypatch, capsys, lines):
    with at_line(monkeypatch, lines, lambda: pathlib.Path("there").rename("elsewhere")):
        line = refused(capsys, lambda: begin("there"))
    assert "No such file" in line and "--resume there" in line
    assert not pathlib.Path("there").exists()
    pathlib.Path("elsewhere").rename("there")
    resume("there")


# -- one run at a time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [1, 9])
def test_a_run_that_still_runs_is_not_resumed(shop, monkeypatch, lines):
    said = []

    def resumed():
        with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as end:
            resume("here")
        said.append((end.value.code, err.getvalue()))

    with at_line(monkeypatch, lines, resumed):
        begin("here")
    [(code, err)] = said
    assert code == 2 and len(err.splitlines()) == 1 and "--resume here" in err and "another process" in err
    assert made(shop / "here") == made(shop / "whole")


@forks
def test_of_processes_started_together_one_makes_the_folder_and_the_others_leave_nothing(shop):
    processes = [fork.Process(target=life, args=(begin, "here"), kwargs={"said": f"said-{i}"}) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [0, 2, 2]
    for i, process in enumerate(processes):
        said = (shop / f"said-{i}").read_text().splitlines()
        assert process.exitcode == 0 or (len(said) == 1 and "--out here" in said[0])
        (shop / f"said-{i}").unlink()
    assert sorted(path.name for path in shop.iterdir()) == ["here", "shop", "whole"]
    assert made(shop / "here") == made(shop / "whole")


@forks
def test_of_two_processes_that_resume_one_run_one_does(here, shop):
    processes = [fork.Process(target=life, args=(resume, "here")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert 0 in [process.exitcode for process in processes]  # the other was refused, or came when all was done
    assert {process.exitcode for process in processes} <= {0, 2}
    assert made(shop / "here") == made(shop / "whole")


# -- the same data -----------------------------------------------------------------------------------------------------


def test_the_same_data_may_have_moved(here, shop):
    shutil.copytree(shop / "shop", shop / "moved")
    (shop / "moved" / "catalogue.json").write_text(  # the same items under other names
        json.dumps({f"item {i}": sid for i, sid in enumerate(CODES)}, indent=2))
    (shop / "shop").rename(shop / "gone")
    resume("here", "--data", "moved")
    assert made(shop / "here") == made(shop / "whole")


def lines_of(name, change):
    def edit(folder):
        lines = (folder / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(change(lines)))

    return edit


def catalogue(change):
    return lambda folder: (folder / "catalogue.json").write_text(
        json.dumps(change(json.loads((folder / "catalogue.json").read_text()))))


def renamed(folder):
    for path in folder.iterdir():
        path.write_text(path.read_text().replace("2", "7"))


OTHER = {
    "a new word in the catalogue": catalogue(lambda sids: [*sids, [0, 0, 7]]),
    "a new item of old words": catalogue(lambda sids: [*sids, [0, 1, 1]]),
    "the catalogue in another order": catalogue(lambda sids: sids[::-1]),
    "other words": renamed,
    **{f"{name}: {what}": lines_of(name, change) for name in ("train", "valid", "test") for what, change in {
        "a row less": lambda lines: lines[:-1], "a row more": lambda lines: [*lines, lines[0]],
        "another order": lambda lines: lines[::-1], "another row": lambda lines: [*lines[:-1], lines[0]]}.items()},
}


def test_a_run_whose_data_have_moved_says_where_they_are_when_it_is_stopped_again(here, shop, monkeypatch, capsys):
    (shop / "shop").rename(shop / "moved here")
    with at_line(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT)):
        line = refused(capsys, lambda: resume("here", "--data", "moved here"), 130)
    assert line.endswith("; go on with --resume here --data 'moved here'")
    nano.main(shlex.split(line[line.index("--resume") :]))
    assert made(here) == made(shop / "whole")



@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
@pytest.mark.parametrize("moved", [False, True], ids=["", "at another place"])
def test_other_data_are_refused(here, capsys, change, moved):
    if moved:
        shutil.copytree("shop", "moved")
    change(pathlib.Path("moved" if moved else "shop"))
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    line = refused(capsys, lambda: resume("here", *(["--data", "moved"] if moved else [])))
    assert "here" in line and "another" in line and "data" in line
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_the_same_rows_of_other_words_are_refused_too(here, capsys):
    minionerec(pathlib.Path("mini"))
    line = refused(capsys, lambda: resume("here", "--data", "mini"))
    assert "another" in line and "data" in line


def test_another_number_of_processes_is_refused(here, monkeypatch, capsys):
    monkeypatch.setattr(nano, "world_size", lambda: 2)
    assert "number of processes" in refused(capsys, lambda: resume("here"))


# -- what cannot be resumed says so ------------------------------------------------------------------------------------


def test_what_is_no_run_or_complete_or_to_be_changed_is_refused(shop, capsys):
    for folder in ("nowhere", "nothing\0", "\x1b\n", "half \udc80", "shop", "shop/catalogue.json"):
        assert "config.json" in refused(capsys, lambda folder=folder: resume(folder))
    assert "name a run" in refused(capsys, lambda: resume("x" * 300))
    assert "complete" in refused(capsys, lambda: resume("whole"))
    line = refused(capsys, lambda: resume("whole", "--lr", "0.5", "--seed", "1"))
    assert "leave out" in line and "--lr" in line and "--seed" in line
    assert "--toy" in refused(capsys, lambda: resume("whole", "--toy"))
    assert "--out" in refused(capsys, lambda: resume("whole", "--out", "elsewhere"))
    assert "complete" in refused(capsys, lambda: resume("whole", "--out", "whole"))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", "[" * 100_000, '{"grop_size": 3}', '{"group_size": "3"}',
             '{"group_size": null}', '{"data": "shop", "tau": 0.01}', '{"data": "shop", "lr": NaN}',
             '{"data": "shop", "seed": %s}' % ("9" * 5000),
             '{"data": "shop", "method": "magic"}', '{"data": "shop", "keep": "worst"}',
             '{"data": "shop", "seed": true}', '{"data": "shop", "dtype": "float16"}',
             '{"data": "shop", "keep": "json"}', '{"data": "shop", "lam": true}',
             '{"\\u001b\\n%s": 1}' % ("x" * 999), "{}"],
    ids=lambda text: text[:25])
def test_a_config_that_cannot_be_used_is_refused(here, capsys, text):
    (here / "config.json").write_text(text)
    line = refused(capsys, lambda: resume("here"))
    assert "here/config.json" in line or text == "{}"
    assert checkpoint(here).exists()


def test_a_config_of_a_toy_that_names_no_data_is_one_line_too(here, small_shop, capsys):
    """What is missing there has its default."""
    (here / "config.json").write_text('{"toy": true, "device": "cpu"}')
    line = refused(capsys, lambda: resume("here"))
    assert "the run was begun with another set of flags" in line and checkpoint(here).exists()
