# SPDX-License-Identifier: MIT
"""What all kinds of tries share: small shops, processes of their own, and what a refusal has to look like."""

import contextlib
import csv
import ctypes
import dataclasses
import hashlib
import io
import json
import os
import random
import signal
import stat
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

import nanoadagrpo as nano

torch.set_num_threads(1)

# The files of --data, in the order in which the script reads them. Each has an ending of its layout.
SPLITS = ["train", "valid", "test"]
EXTRA = ["rl", "log"]  # they may be there or not


class Result(NamedTuple):
    outcome: str  # a word: loaded, refused, finished ...
    fault: str = ""  # what went wrong; in what comes before the first colon, equal faults are equal


def make_draw(seed, kind, number):
    """Each try has a generator of its own: it can be made again without those before it."""
    return random.Random(f"{seed} {kind} {number}")


# -- shops ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Shop:
    layout: str  # csv or jsonl
    sids: list  # Semantic IDs: lists of tokens
    files: dict  # name -> bytes

    def write(self, folder):
        folder.mkdir(parents=True)
        for name, raw in self.files.items():
            (folder / name).write_bytes(raw)
        return folder


TITLES = ["Glue", 'Tape "extra", wide', "Drill\r\nbits, 3 mm", "Größe 5", "Saw, a", "日本", "", "O'Neill's"]


def make_shop(draw, layout="", extra=True):
    """A small shop that is right in every way."""
    layout = layout or draw.choice(["csv", "jsonl"])
    L, style = draw.choice([1, 2, 3, 3, 3, 4]), draw.choice(["int", "word", "text", "mixed"])
    spell = {"int": lambda i, c: c, "word": lambda i, c: f"<{chr(97 + i)}_{c}>",
             "text": lambda i, c: f"k{c} ü", "mixed": lambda i, c: c if i % 2 else f"t{c}"}
    spell = spell["word" if layout == "csv" else style]
    codes = sorted({tuple(draw.randrange(4) for _ in range(L)) for _ in range(draw.randint(6, 14))})
    sids = [[spell(i, c) for i, c in enumerate(code)] for code in codes]
    draw.shuffle(sids)

    def items(low, high):
        return [draw.choice(sids) for _ in range(draw.randint(low, high))]

    tables = {name: [dict(history=items(1, 5), target=draw.choice(sids)) for _ in range(draw.randint(*n))]
              for name, n in zip([*SPLITS, "rl"], [(3, 7), (2, 3), (2, 3), (2, 3)], strict=True)}
    tables["log"], orders = [], draw.random() < 0.5
    for _ in range(draw.randint(2, 12)):
        shown = items(1, 4)
        click = [draw.randrange(2) for _ in shown]
        row = dict(history=items(draw.randrange(2), 4), shown=shown, click=click)
        tables["log"].append(row | (dict(order=[x and draw.randrange(2) for x in click]) if orders else {}))
    for name in EXTRA:
        if not extra or draw.random() < 0.5:
            del tables[name]
    named = {str(i): sid for i, sid in enumerate(sids)}
    catalogue = named if layout == "csv" or draw.random() < 0.3 else sids
    catalogue = json.dumps(catalogue, ensure_ascii=draw.random() < 0.5)
    ending = "." + layout
    files = {"index.json" if layout == "csv" else "catalogue.json": catalogue.encode()}
    write = csv_text if layout == "csv" else jsonl_text
    files |= {name + ending: write(draw, rows).encode() for name, rows in tables.items()}
    return Shop(layout, sids, files)


def jsonl_text(draw, rows):
    ascii_only = draw.random() < 0.5
    rows = [{**row, "title": draw.choice(TITLES)} for row in rows]
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)


def csv_text(draw, rows):
    names = dict(history="history_item_sid", target="item_sid", shown="shown_item_sid")
    columns = ["user_id", "history_item_title", *(names.get(key, key) for key in rows[0]), "item_title",
               "note"]
    draw.shuffle(columns)

    def cells(row):
        row = {key: x if key in ("click", "order", "target") else ["".join(sid) for sid in x]
               for key, x in row.items()}
        row = {names.get(key, key): "".join(x) if key == "target" else repr(x) for key, x in row.items()}
        titles = draw.sample(TITLES, 3)
        row |= dict(user_id="A7", history_item_title=repr(titles[1:]), item_title=titles[0])
        return [row.get(column, "") for column in columns]

    out = io.StringIO()
    csv.writer(out, lineterminator=draw.choice(["\n", "\r\n"])).writerows([columns, *map(cells, rows)])
    return out.getvalue()


# -- processes -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ordinary_user():
    """The superuser may read and write everything; for a while, give that up. Others are left as they are."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        header, caps = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        lowered = os.geteuid() == 0 and libc.capget(header, caps) == 0
    except (OSError, AttributeError):
        lowered = False
    before = caps[0] if lowered else 0
    try:
        if lowered:
            caps[0] = before & ~0b1110  # the rights to pass by owner, mode and search permission
            libc.capset(header, caps)
        yield
    finally:
        if lowered:
            caps[0] = before
            libc.capset(header, caps)


def warm(place):
    """A run in this process: what it imports need not be imported in each of the processes to come."""
    home, here = Path.cwd(), place / "warm"
    if here.exists():
        return
    make_shop(make_draw(0, "warm", 0), "jsonl", extra=False).write(here / "shop")
    os.chdir(here)
    words = "--data shop --out out --device cpu --sft-steps 1 --rl-steps 1 --batch-size 2 --beam-width 2"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        nano.main([*words.split(), "--group-size", "4", "--eval-prompts", "1", "--sft-batch-size", "2"])
    os.chdir(home)


def environment():
    """For the script itself as a process: one thread, nothing from the net, nothing beside the source."""
    return os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1",
                             PYTHONPATH=str(Path(nano.__file__).parent))


class Ended(NamedTuple):
    code: int  # exit code; -9 and the like: of a signal
    out: str
    err: str
    hung: bool


def child(call, place, limit=60, meanwhile=lambda pid: None):
    """Run call() in a fork of this process, which has everything imported. meanwhile(pid) runs beside it."""
    paths = [place / "stdout", place / "stderr"]
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])  # until all is prepared
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    else:
        code = 1
        try:
            for number, path in enumerate(paths, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            import sys  # under pytest, these two are not the process's own

            sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb", 0, closefd=False),
                                                       errors="backslashreplace", write_through=True)
                                      for n in (1, 2))
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            try:
                with ordinary_user():
                    call()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    meanwhile(pid)
    code, hung = wait(pid, limit)
    out, err = (path.read_text(errors="backslashreplace") if path.exists() else "" for path in paths)
    return Ended(code, out, err, hung)


def wait(pid, limit):
    end = time.monotonic() + limit
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), False
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), True
        time.sleep(0.002)


# -- what is right -------------------------------------------------------------------------------------------


def not_one_line(err):
    """What is wrong with what a refusal says; "" if nothing is."""
    err = err.split("\r")[-1]  # progress bars
    if "Traceback" in err:
        return f"a traceback: {last_line(err)}"
    if len(err.splitlines()) != 1 or not err.endswith("\n"):
        return f"{len(err.splitlines())} lines on stderr: {err[:200]!r}"
    if not err.startswith("nanoadagrpo: ") or not err.strip().isprintable():
        return f"not a printable line of the script: {err[:200]!r}"
    return f"{len(err) - 1} characters" if len(err) > 301 else ""


def last_line(err):
    """The end of a traceback, and where in the script it was."""
    lines = err.rstrip().splitlines()
    places = [line.split(", ", 1)[1] for line in lines if "nanoadagrpo.py" in line and ", line" in line]
    return f"{lines[-1][:200]!r} ({places[-1] if places else 'outside the script'})"


def snapshot(folder):
    """{path: what is there}, to see that nothing has changed."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        mode = path.lstat().st_mode
        what = os.readlink(path) if stat.S_ISLNK(mode) else (
            hashlib.sha256(path.read_bytes()).hexdigest()[:12] if stat.S_ISREG(mode) else "")
        found[str(path.relative_to(folder))] = oct(mode), what
    return found


def changes(before, after):
    """Names of what has gone, come or changed."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def remove(path):
    """The whole of a folder, whatever its modes are."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):
            path.chmod(0o755)
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
