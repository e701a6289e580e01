# SPDX-License-Identifier: MIT
"""What damage and kills share: a small run, whole and stopped, and whether two runs came to the same."""

import os
import shutil
import sys

from nano.helpers import made

import nanoadagrpo as nano

from .common import child, make_draw, make_shop, warm

OPTIONS = ["--device", "cpu", "--sft-steps", "4", "--sft-batch-size", "8", "--rl-steps", "4", "--batch-size",
           "4", "--group-size", "4", "--eval-prompts", "6", "--beam-width", "5", "--eval-every", "2",
           "--save-every", "1", "--updates", "2", "--lr", "1e-2", "--rl-prompts", "0"]
SORTS = {"adagrpo": [], "two methods": ["--method", "nll,grpo"],
         "the best": ["--keep", "best", "--beam-width", "10"]}


class Stopped(BaseException):
    pass


def quiet():
    sys.dont_write_bytecode = True


def begin(out, *words):
    quiet()
    nano.main(["--data", "shop", "--out", out, *OPTIONS, *words])


def resume(out, *words):
    quiet()
    nano.main(["--resume", out, *words])


def stop_after(rows, call):
    """Run until so many rows have been logged."""
    write = nano.MetricsLog.__call__

    def count(self, **row):
        write(self, **row)
        if len(self.rows) >= rows:
            raise Stopped

    nano.MetricsLog.__call__ = count
    try:
        call()
    except Stopped:
        pass
    finally:
        nano.MetricsLog.__call__ = write


def stopped(rows, out, *words):
    return lambda: stop_after(rows, lambda: begin(out, *words))


def template(place, sort):
    """A folder with data, a whole run, and runs stopped after some rows; made once of each sort."""
    home = place / f"template {sort}"
    if not home.exists():
        warm(place)
        home.mkdir()
        make_shop(make_draw(0, "runs", "shop"), "jsonl").write(home / "shop")
        os.chdir(home)
        words = SORTS[sort]
        steps = [("whole", 10**6, words), ("other", 9, [*words, "--seed", "1"])]
        for out, rows, more in [*steps, *((f"stopped-{n}", n, words) for n in (3, 7, 11))]:
            ended = child(stopped(rows, out, *more), place)
            assert ended.code == 0, ended
    return home


def copy(place, sort, *names):
    """A fresh folder `work` with some of the template's folders, and in it."""
    home, work = template(place, sort), place / "work"
    work.mkdir()
    for name in ("shop", *names):
        shutil.copytree(home / name, work / name)
    os.chdir(work)
    return work


def differs(out, whole, others=()):
    """What is not as in the undisturbed run, but for the names of others; "" if all is."""
    try:
        found, expected = made(out), made(whole)
    except (OSError, ValueError) as error:
        return f"something is missing: {type(error).__name__}: {str(error)[:100]}"
    if more := (found[0].keys() ^ expected[0].keys()) - {*others}:
        return f"other files: {sorted(more)[:4]}"
    names = [name for name in expected[0] if found[0][name] != expected[0][name]]
    parts = {"metrics.jsonl": found[1] != expected[1], "report.md": found[2] != expected[2]}
    names += [name for name, wrong in parts.items() if wrong]
    return f"other contents: {names}" if names else ""
