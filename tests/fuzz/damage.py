# SPDX-License-Identifier: MIT
"""Kind 3: a stopped run whose files were damaged. It is refused and left as it is, or comes to the same."""

import hashlib
import json
import os
from pathlib import Path

from .common import Result, changes, child, make_draw, not_one_line, remove, snapshot
from .runs import SORTS, copy, differs, resume, template


def checkpoint(out):
    return sorted(out.glob("checkpoint-*"))[-1]


def named(path, raw, rows=None):
    """Put a checkpoint in the place of this one, under the name that its contents deserve."""
    words = path.stem.split("-")
    path.unlink()
    new = path.with_name(f"checkpoint-{rows or words[1]}-{hashlib.sha256(raw).hexdigest()[:16]}.safetensors")
    new.write_bytes(raw)
    return new


# -- to a checkpoint -----------------------------------------------------------------------------------------


def flipped(draw, out):
    path = checkpoint(out)
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(draw.choice([1, 1, 2, 100])):
        raw[draw.randrange(draw.choice([8, header, len(raw)]))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def truncated(draw, out):
    path = checkpoint(out)
    os.truncate(path, draw.choice([0, 1, 7, 8, 9, draw.randrange(path.stat().st_size),
                                   path.stat().st_size - 1]))


def lengthened(draw, out):
    with checkpoint(out).open("ab") as file:
        file.write(draw.choice([b"\0", b"\n", b"\0" * 4096, checkpoint(out).read_bytes()]))


def zeros(draw, out):
    path = checkpoint(out)
    raw = bytearray(path.read_bytes())
    at = draw.randrange(len(raw))
    raw[at : at + 4096] = bytes(len(raw[at : at + 4096]))
    path.write_bytes(raw)


def renamed(draw, out):
    path = checkpoint(out)
    start, rows, digest = path.stem.split("-")
    name = draw.choice([f"{start}-{rows}-{digest[::-1]}", f"{start}-{rows}", f"{start}-{rows}-",
                        f"{start}-{digest}", f"{start}-x-{digest}", f"{start}-9999999999-{digest}",
                        f"{start}--{digest}", path.stem.upper(), f"{start}-{rows}-{digest} (1)",
                        f"x{path.stem}", f"{start}-{rows}-{digest.upper()}"])
    path.rename(path.with_name(name + draw.choice([".safetensors", ".safetensors", ".partial", "",
                                                   ".SAFETENSORS"])))


def another_runs(draw, out):
    """The last checkpoint of a run with another seed, instead of this one or beside it."""
    path = checkpoint(out.parent / "other")
    if draw.random() < 0.5:
        checkpoint(out).unlink()
    (out / path.name).write_bytes(path.read_bytes())


def an_older_one(draw, out):
    """An earlier checkpoint of the same run: that is no fault."""
    path = checkpoint(out.parent / "stopped-3")
    checkpoint(out).unlink()
    (out / path.name).write_bytes(path.read_bytes())


def a_newer_one_beside_it(draw, out):
    raw = draw.choice([b"", b"x", checkpoint(out).read_bytes()[:-1]])
    name = f"checkpoint-0000009999-{hashlib.sha256(raw).hexdigest()[:16]}.safetensors"
    (out / name).write_bytes(raw)


def copied_beside_it(draw, out):
    path = checkpoint(out)
    new = path.stem + draw.choice([".safetensors.bak", " (copy).safetensors", ".partial"])
    path.with_name(new).write_bytes(path.read_bytes())


def no_checkpoint(draw, out):
    checkpoint(out).unlink()


def a_folder(draw, out):
    path = checkpoint(out)
    path.unlink()
    path.mkdir()


def a_link(draw, out):
    path = checkpoint(out)
    moved = path.rename(out.parent / "moved")
    path.symlink_to(draw.choice([moved, "nowhere", path.name]))


def unreadable(draw, out):
    draw.choice([checkpoint(out), out / "config.json", out / "metrics.jsonl"]).chmod(0)


def read_only(draw, out):
    draw.choice([out, out / "metrics.jsonl", checkpoint(out)]).chmod(0o555)


# -- to the other files --------------------------------------------------------------------------------------


def config_edited(draw, out):
    path = out / "config.json"
    saved = json.loads(path.read_text())
    key = draw.choice(sorted(saved))
    old = saved[key]
    if draw.random() < 0.2:
        del saved[key]
    elif draw.random() < 0.2:
        saved[draw.choice(["x", "grop_size", "", "\x1b"])] = 1
    else:
        saved[key] = draw.choice([None, True, False, 0, 1, -1, 3, 0.5, "", "x", "cpu", "shop", "nll", [], {},
                                  str(old), float("nan"), 10**30, [old], "nowhere", "two\nlines", "wandb",
                                  "\ud800", "\0"])
    path.write_text(json.dumps(saved))
    return f"{key}: {saved.get(key, 'gone')!r:.40}"


def config_damaged(draw, out):
    path = out / "config.json"
    raw = bytearray(path.read_bytes())
    how = draw.randrange(4)
    if how == 0:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    elif how == 1:
        del raw[draw.randrange(len(raw)) :]
    elif how == 2:
        raw = draw.choice([b"", b"{}", b"null", b"[" * 100_000, b"\xff", b"\0" * 100, b'{"a":' * 990])
    else:
        raw = bytearray((out.parent / "other" / "config.json").read_bytes())
    path.write_bytes(raw)


def something_instead(draw, out):
    path = out / draw.choice(["config.json", "metrics.jsonl"])
    path.unlink()
    draw.choice([lambda: None, path.mkdir, lambda: path.symlink_to("nowhere"),
                 lambda: path.symlink_to(path.name)])()
    return path.name


def metrics_damaged(draw, out):
    path = out / "metrics.jsonl"
    raw = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    else:
        raw = draw.choice([b"", raw[: len(raw) // 2], raw + b"x", raw + raw, b"\xff\xfe", b"[" * 9999,
                           raw[5:]])
    path.write_bytes(raw)


def report_there(draw, out):
    draw.choice([lambda: (out / "report.md").write_text("half"),
                 lambda: (out / "report.partial").write_text("half"),
                 lambda: (out / "report.partial").mkdir(), lambda: (out / "report.md").mkdir(),
                 lambda: (out / "policy").write_text("a file"), lambda: (out / "policy").mkdir(),
                 lambda: (out / "checkpoint.partial").mkdir(), lambda: (out / "ranker.safetensors").mkdir()])()


def data_edited(draw, out):
    path = draw.choice(sorted((out.parent / "shop").iterdir()))
    raw = path.read_bytes()
    lines = raw.splitlines(keepends=True)
    path.write_bytes(draw.choice([lambda: b"".join(lines[1:]), lambda: b"".join(lines[::-1]),
                                  lambda: raw + lines[0], lambda: raw.replace(b"1", b"2", 1),
                                  lambda: raw + b"\n"])())


CHECKPOINT = [flipped, flipped, truncated, lengthened, zeros, renamed, renamed, another_runs, an_older_one,
              a_newer_one_beside_it, copied_beside_it, no_checkpoint, a_folder, a_link]
OTHERS = [config_edited, config_edited, config_edited, config_damaged, metrics_damaged,
          something_instead, something_instead, report_there, data_edited, unreadable, read_only]


def attempt(seed, number, place):
    draw = make_draw(seed, "damage", number)
    sort, name = draw.choice(sorted(SORTS)), draw.choice(["stopped-7", "stopped-11"])
    work = copy(place, sort, name, "other", "stopped-3")
    act = draw.choice(CHECKPOINT if draw.random() < 0.6 else OTHERS)
    more = act(draw, work / name)
    what = f"{act.__name__.replace('_', ' ')}, {sort}, {name}" + (f", {more}" if more else "")
    try:
        before = snapshot(work)
        code, out, err, hung = child(lambda: resume(name), place, limit=60)
        changed = changes(before, snapshot(work))
        outcome = "resumed" if code == 0 else "refused" if code == 2 else "failed"
        if hung:
            fault = "hangs: no end after a minute"
        elif code == 0:
            # With another configuration and no checkpoint, it is another run that is begun.
            there = [str(Path(path).relative_to(name)) for path in before if path.startswith(f"{name}/")]
            # What is written to a link that leads nowhere is written there.
            there += ["nowhere"] * (act is something_instead)
            fault = differs(work / name, template(place, sort) / "whole", there)
            fault = fault and f"resumed to something else: {fault}"
        elif code != 2:
            fault = f"exit code {code} in {act.__name__}: {not_one_line(err) or err[:200]}"
        else:
            fault = not_one_line(err)
            fault = fault and f"{fault.split(':')[0]} in {act.__name__}: {fault}"
            began = "no checkpoint" in out or "goes on" in out
            if not fault and changed and not began:
                fault = f"a refusal changes something: {changed[:4]}, having said {err[:150]!r}"
            elif not fault and began and "--resume" not in err:
                fault = f"does not say how to go on: {err[:200]!r}"
    finally:
        os.chdir(place)
        if not KEEP:
            remove(work)
    return Result(outcome, f"{fault} [{what}]" if fault else "")


KEEP = False
