# SPDX-License-Identifier: MIT
"""Kind 2: a command line at random. It is run, or refused in one line and leaves the disk as it was."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import huggingface_hub.constants

import nanoadagrpo as nano

from .common import (
    Result,
    changes,
    child,
    environment,
    last_line,
    make_draw,
    make_shop,
    not_one_line,
    remove,
    snapshot,
    warm,
)

QUICK = dict(sft_steps=2, sft_batch_size=4, rl_steps=2, batch_size=4, group_size=4, rl_prompts=8,
             eval_prompts=4, beam_width=4, eval_every=2, save_every=1, max_history=3)
SMALL = nano.World(codes=4, items=30, users=20, impressions=4)

REWARDS = """
import torch

def good(history, item):
    return (item % 3).float()

def parts(history, item):
    return {"a": item * 0.1, "b": -item}

def shape(history, item):
    return item[:, 0]

def nan(history, item):
    return item / 0 * float("nan")

def huge(history, item):
    return item * 1e38

def fails(history, item):
    raise RuntimeError("two\\nlines \\x1b[31m and out of memory")

def leaves(history, item):
    raise SystemExit(0)

def text(history, item):
    return "high"

def nothing(history, item):
    pass

number = 5
"""

TEXTS = ["", "x", "-", "--", "-1", "--toy", "nan", "None", "ü", "日本", "\u202e", "a\u0301", "two\nlines",
         "\x1b[31m", "nothing\0", "half \udc80", "\u2028", "x" * 300, "x" * 5000, "%s%n", "{0}", "$HOME", "~",
         "*", "a,b", ",", "0"]
PATHS = ["shop", "notes", "full", "empty", "loop", "dangling", "locked", "locked/run", "unread", "notes/run",
         "loop/run", "dangling/run", "full/run", "new", "new/a/b/c", "./new", "new/", "new//a", "new/../new2",
         "../above/desk/new3", "..", ".", "", "/", "/dev/null", "/dev/null/run", "/proc/run", "new/nothing\0",
         "new/half \udc80", "new/" + "x" * 300, "y/" * 3000, "ünder/日本", "two\nlines", "\x1b[31m", " ",
         "-run", "~/run", "a'b", 'a"b', "$(x)", "stopped", "whole", "empty/../empty/run", "link", "link/run",
         "new.partial", ".new", "x" * 255, "x" * 256]
INTS = [-1, 0, 1, 2, 3, 5, 7, 10**6, 10**6 + 1, 10**9, 2**31, 2**31 - 1, 2**63 - 1, 2**63, -(2**63), 10**30]
FLOATS = [-1.0, 0.0, -0.0, 1.0, 0.5, 1 / 3, 0.1, 0.9, 0.999, 1.5, 2.0, 1e-8, 1e-38, 1e-45, 5e-324, 1e10, 1e38,
          3.5e38, 1e39, 1e308, float("nan"), float("inf"), float("-inf")]
SPELT = ["1_000", "1e3", "0x10", "1.0", "1.5", "١", "½", "+5", " 5", "5 ", "05", "1,5", "9" * 5000,
         "0." + "0" * 5000 + "1", "1e-999", "1e999", "1e", "NaN", "infinity", "-inf", "-1e3", "-.5", "",
         "5\n", "5\0", "True"]
KNOWN = dict(method=["nll", "grpo", "grpo+nll", "adagrpo-d", "adagrpo-r", "adagrpo", "random-gate", "all",
                     "nll,adagrpo", "all,nll", "nll,nll", "nll,", "NLL", " nll", "adagpro"],
             ties=["min", "average", "max", "mean"],
             keep=["last", "best", "first"], dtype=["auto", "float32", "bfloat16", "float16"],
             device=["cpu", "auto", "cuda", "cuda:99", "meta", "cpu:0", "cpu:7", "mps", "xla", "abacus",
                     "CPU", "cpu:-1"],
             model=["model", "nowhere", "shop", "notes", "a/b", "a/b/c", "http://localhost/x",
                    "../desk/model", "model/"],
             reward=["", "rewards:good", "rewards:parts", "rewards:shape", "rewards:nan", "rewards:huge",
                     "rewards:fails", "rewards:leaves", "rewards:text", "rewards:nothing", "rewards:number",
                     "rewards", "rewards:", ":good", "os:getcwd", "os.path:join", "a:b:c", "nowhere:x",
                     "broken:x", "..rewards:good", "rewards:good.x"],
             resume=["stopped", "stopped", "stopped/", "./stopped", "whole", "nowhere", "shop",
                     "stopped/config.json"],
             data=["shop", "shop", "./shop", "shop/", "mini", "nowhere",
                   "shop/train.jsonl"], out=["new", "new/a"])


def prepare(place):
    """The folder in which commands are tried, with all sorts of things in it; made once."""
    work = place / "above" / "desk"
    if work.exists():
        return work
    warm(place)
    work.mkdir(parents=True)
    draw = make_draw(0, "commands", "shops")
    make_shop(draw, "jsonl", extra=False).write(work / "shop")
    make_shop(draw, "csv", extra=False).write(work / "mini")
    (work / "notes").write_text("my thesis")
    for name in ("full", "empty", "locked", "unread"):
        (work / name).mkdir()
    (work / "full" / "metrics.jsonl").write_text("my results\n")
    (work / "loop").symlink_to("loop")
    (work / "dangling").symlink_to("nowhere at all")
    (work / "link").symlink_to("empty")
    (work / "rewards.py").write_text(REWARDS)
    (work / "broken.py").write_text("def x(:\n")
    from nano.helpers import save_model  # a small model with random weights

    save_model(work / "model")
    os.chdir(work)

    class Stopped(BaseException):
        pass

    def stop(*_):
        raise Stopped

    def make(out, seen):
        write = nano.MetricsLog.__call__

        def count(self, **row):
            write(self, **row)
            if len(self.rows) >= seen:
                stop()

        nano.MetricsLog.__call__ = count
        try:
            nano.main(["--data", "shop", "--device", "cpu", "--out", out, *flags(QUICK)])
        except Stopped:
            pass
        finally:
            nano.MetricsLog.__call__ = write

    for out, seen in (("whole", 999), ("stopped", 5)):
        child(lambda out=out, seen=seen: make(out, seen), place)
    (work / "locked").chmod(0o555)
    (work / "unread").chmod(0)
    assert list((work / "stopped").glob("checkpoint-*")) and (work / "whole" / "report.md").exists()
    return work


def flags(values):
    return [word for name, x in values.items() for word in (nano.to_flag(name), str(x))]


def value(draw, field, modest):
    """Text for a flag; modest: no number that makes a run long."""
    if draw.random() < 0.1:
        return draw.choice(SPELT)
    if field.name in KNOWN and draw.random() < 0.75:
        return draw.choice(KNOWN[field.name])
    if field.name in ("out", "data", "model", "resume") and draw.random() < 0.8:
        return draw.choice(PATHS)
    if isinstance(field.default, int):
        return str(draw.choice([x for x in INTS if not modest or x < 8]))
    if isinstance(field.default, float):
        return repr(draw.choice(FLOATS))
    return draw.choice(TEXTS)


def command(draw, modest):
    fields = [field for field in dataclasses.fields(nano.Settings) if field.name not in ("toy", "data")]
    shop = ["--data", "shop"]
    words = draw.choice([shop] * 6 + [["--toy"]] * 3 + [["--data", "mini"], [], ["--toy", *shop]])
    words = [*words, "--device", "cpu", *flags(QUICK)] if draw.random() < 0.95 else list(words)
    if draw.random() < 0.15:
        words = ["--resume", value(draw, next(x for x in fields if x.name == "resume"), modest)]
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3, 5])):
        field = draw.choice(fields)
        flag, x = nano.to_flag(field.name), value(draw, field, modest)
        if field.default is False:
            words += [flag] if draw.random() < 0.8 else [f"{flag}={x}"]
        else:
            words += [flag, x] if draw.random() < 0.8 else [f"{flag}={x}"]
    if draw.random() < 0.1:
        words.insert(draw.randint(0, len(words)), draw.choice([*TEXTS, "--help", "-h", "--seed", "--config",
                                                               "@notes", "-x"]))
    if draw.random() < 0.05:
        del words[draw.randrange(len(words))]
    if draw.random() < 0.7 and "--out" not in words:
        words += ["--out", "new"]
    return words


class Enough(BaseException):
    """The run would begin now."""


def front(words):
    """main() as it is until the run would begin: everything is read, made and checked."""

    def locked(out, rows, cfg):
        print(f"out: {json.dumps(str(out))}")
        raise Enough

    nano.locked = locked
    try:
        nano.main(words)
    except Enough:
        return


def small_toy():
    whole = nano.toy_world
    nano.toy_world = lambda cfg: whole(cfg, SMALL)


def attempt(seed, number, place):
    draw = make_draw(seed, "commands", number)
    work = prepare(place)
    os.chdir(work)
    how = draw.choices(["front", "run", "process"], [70, 26, 4])[0]
    words = command(draw, modest=how != "front")
    before = snapshot(place / "above")

    def call():
        small_toy()
        sys.dont_write_bytecode = huggingface_hub.constants.HF_HUB_OFFLINE = True
        front(words) if how == "front" else nano.main(words)

    if how == "process" and "--toy" not in words and not any("\0" in word for word in words):
        raw = [os.fsencode(word) for word in words]
        try:
            done = subprocess.run([sys.executable, nano.__file__, *raw], capture_output=True, timeout=120,
                                  env=environment(), stdin=subprocess.DEVNULL)
            code, out, err, hung = done.returncode, done.stdout, done.stderr, False
        except subprocess.TimeoutExpired:
            code, out, err, hung = -9, b"", b"", True
        out, err = (x.decode(errors="backslashreplace") for x in (out, err))
    else:
        code, out, err, hung = child(call, place, limit=60)
    changed = changes(before, snapshot(place / "above"))
    theirs = [name for name in changed if name in before and not name.startswith("work/stopped")]
    fault = judge(how, words, code, out, err, hung, changed, theirs, work)
    text = " ".join(word if re.fullmatch(r"[\w.+-]{1,60}", word) else f"{word!r:.60}" for word in words)
    restore(place, before)
    outcome = {0: "run" if how != "front" else "would be run", 2: "refused"}.get(code, "failed")
    return Result(outcome, f"{fault} [{how}: {text:.400}]" if fault else "")


def judge(how, words, code, out, err, hung, changed, theirs, work):
    helped = {"-h", "--help"} & {*words}
    if hung:
        return "hangs: no end after a minute"
    if code == 0 and helped:
        return f"help changes the disk: {changed[:3]}" if changed else ""
    if code == 0:
        if err.split("\r")[-1].strip():
            return f"runs, and says on stderr: {err[-200:]!r}"
        if theirs:
            return f"changes what was there: {theirs[:3]}"
        if how == "front" and not any(word.startswith("--resume") for word in words):
            folder = work / json.loads(out.splitlines()[-1].removeprefix("out: "))
            names = sorted(path.name for path in folder.iterdir())
            if names != ["config.json"]:
                return f"makes more than config.json: {names}"
            nano.Settings(**json.loads((folder / "config.json").read_text()))
            inside = str(folder.resolve().relative_to(work.parent.resolve()))
            others = [name for name in changed if not (inside + "/").startswith(name + "/")
                      and not name.startswith(inside)]
            return f"makes other things too: {others[:3]}" if others else ""
        return ""
    if code != 2:
        return f"exit code {code}: {last_line(err) if err else out[-100:]!r}"
    fault = not_one_line(err)
    if fault:
        return f"{fault.split(':')[0]}: {fault}"
    started = how != "front" and ("no checkpoint" in out or "goes on" in out)
    if changed and not started:
        return f"a refusal leaves something: {changed[:4]}, having said {err[:150]!r}"
    return ""


def restore(place, before):
    """Remove what has come; what has changed or gone is made anew with all the rest."""
    above = place / "above"
    after = snapshot(above)
    for name in sorted(after.keys() - before.keys(), reverse=True):
        if os.path.lexists(above / name):
            remove(above / name)
    if changes(before, snapshot(above)) and not KEEP:
        os.chdir(place)
        remove(above)


KEEP = False
