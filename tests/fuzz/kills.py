# SPDX-License-Identifier: MIT
"""Kind 4: signals at random moments of a run that saves often. Resumed, it comes to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import nanoadagrpo as nano

from .common import Ended, Result, changes, child, environment, make_draw, not_one_line, remove, snapshot
from .runs import OPTIONS, SORTS, begin, copy, differs, resume, template

CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
SCRIPT = nano.__file__


def at_line(number, count, later, signals):
    """Send a signal when a line of the script is about to run for the count-th time; another after it."""
    seen, left = [0, 0], list(signals)

    def watch(frame, event, argument):
        if frame.f_code.co_filename != SCRIPT or not left:
            return None
        if event == "line":
            seen[0] += frame.f_lineno == number
            seen[1] += len(left) < len(signals)  # lines since the first signal
            if (left == signals and seen[0] == count) or seen[1] == later:
                seen[1] = 0
                os.kill(os.getpid(), left.pop())
        return watch

    sys.settrace(watch)


def traced(where, signals, call):
    return lambda: (at_line(*where, signals), call())


def lines_run(place, sort):
    """{line of the script: how often it runs} in the whole run, and the seconds that it takes; found once."""
    path = template(place, sort) / "lines"
    if not path.exists():
        def count():
            lines = Counter()

            def watch(frame, event, argument):
                if frame.f_code.co_filename != SCRIPT:
                    return None
                if event == "line":
                    lines[frame.f_lineno] += 1
                return watch

            sys.settrace(watch)
            begin("counted", *SORTS[sort])
            sys.settrace(None)
            path.write_text(json.dumps(lines))

        os.chdir(template(place, sort))
        ended = child(count, place)
        assert ended.code == 0, ended
        began = time.monotonic()
        child(lambda: begin("timed", *SORTS[sort]), place)
        path.with_name("seconds").write_text(str(time.monotonic() - began))
    found = {int(line): count for line, count in json.loads(path.read_text()).items()}
    return found, float(path.with_name("seconds").read_text())


def process(words, signals, delay, pause):
    """The script itself, as a user starts it."""
    run = subprocess.Popen([sys.executable, SCRIPT, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, env=environment())
    time.sleep(delay)
    for one in signals:
        run.send_signal(one)
        time.sleep(pause)
    out, err = run.communicate(timeout=120)
    return Ended(run.returncode, out, err, False)


def complete(out):
    return (out / "report.md").exists() and not list(out.glob("checkpoint-*"))


def attempt(seed, number, place):
    draw = make_draw(seed, "kills", number)
    sort = draw.choice(sorted(SORTS))
    lines, seconds = lines_run(place, sort)
    work = copy(place, sort)
    story = [sort]
    try:
        outcome, fault = hunt(draw, place, work, sort, lines, seconds, story)
    finally:
        os.chdir(place)
        if not KEEP:
            remove(work)
    return Result(outcome, f"{fault} [{'; '.join(story)}]" if fault else "")


def hunt(draw, place, work, sort, lines, seconds, story):
    out, name = work / "run", "not hit"
    for _ in range(draw.choice([1, 1, 2, 3])):
        sent = draw.choice([*CODES])
        signals = [sent] * draw.choice([1, 1, 2])
        how = draw.choices(["line", "time", "process"], [60, 35, 5])[0]
        going_on = out.exists()
        before = snapshot(work)
        if how == "process":
            delay = draw.uniform(0, 8)
            story.append(f"a process, {len(signals)} {sent.name} after {delay:.2f} s")
            words = ["--resume", "run"] if going_on else ["--data", "shop", "--out", "run", *OPTIONS,
                                                          *SORTS[sort]]
            ended = process(words, signals, delay, draw.choice([0, 0.02]))
        else:
            call = (lambda: resume("run")) if going_on else (lambda: begin("run", *SORTS[sort]))
            if how == "line":
                line = draw.choice(sorted(lines))
                where = line, draw.randint(1, lines[line]), draw.randint(1, 12)
                more = f", another {where[2]} lines later" if signals[1:] else ""
                story.append(f"{sent.name} before line {line} runs for time {where[1]}{more}")
                ended = child(traced(where, signals, call), place)
            else:
                delay, pause = draw.uniform(0, seconds), draw.choice([0, 0.001, 0.01])
                story.append(f"{len(signals)} {sent.name} after {delay:.3f} s")

                def send(pid, signals=signals, delay=delay, pause=pause):
                    time.sleep(delay)
                    for one in signals:
                        os.kill(pid, one)
                        time.sleep(pause)

                ended = child(call, place, meanwhile=send)
        fault = ending(ended, sent, signals, out, changes(before, snapshot(work)), how)
        if fault:
            return "failed", fault
        if ended.code:
            name = sent.name
        if complete(out):
            break
    if not complete(out):
        last = (lambda: resume("run")) if out.exists() else (lambda: begin("run", *SORTS[sort]))
        ended = child(last, place)
        if ended.code:
            return "failed", f"cannot go on: exit code {ended.code}: {ended.err[-300:]!r}"
    fault = differs(out, template(place, sort) / "whole")
    return name, fault and f"comes to something else: {fault}"


def ending(ended, sent, signals, out, changed, how):
    """What is wrong with how it ended; "" if nothing is."""
    if ended.hung:
        return "hangs: no end after a minute"
    if ended.code == 0 or (ended.code == 2 and complete(out)):
        return ""
    if sent == signal.SIGKILL:
        return "" if ended.code == -sent else f"exit code {ended.code}, not {-sent}: {ended.err[-200:]!r}"
    if ended.code == -sent and not ended.err and (not changed or complete(out)):
        return ""  # it had not begun, or all was done
    told, times = f"{len(signals)} {sent.name}", "twice" if len(signals) > 1 else "once"
    if ended.code != CODES[sent] and not (len(signals) > 1 and ended.code == -sent):  # the second ended it
        return f"{sent.name} {times}, exit code {ended.code} ({how}): {ended.err[-300:]!r}"
    fault = not_one_line(ended.err)
    if fault:
        return f"{sent.name} {times}, {fault.split(':')[0]} ({how}): {fault}, {told}"
    if out.exists() != ("--resume run" in ended.err) and changed:
        there = "there is a run" if out.exists() else "there is no run"
        return f"does not say rightly whether to go on: {ended.err!r}, and {there}"
    left = [name for name in changed if name.split("/")[0] != "run"]
    return f"leaves something: {left}" if left else ""


KEEP = False
