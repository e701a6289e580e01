# SPDX-License-Identifier: MIT
"""Look for input that nanoadagrpo.py does not take as it should; prints a table and every fault.

    python tests/fuzz/run.py --files 10000 --commands 500 --damage 100 --kills 100 --seed 0
    python tests/fuzz/run.py --seed 0 --only files:1234        # one try again; its folder is left, and named
"""

import argparse
import datetime
import importlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    os.environ |= dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1", CUDA_VISIBLE_DEVICES="")
    sys.path[0:1] = [str(HERE.parent), str(HERE.parents[1])]  # this folder is the package `fuzz`
from fuzz.common import Result, remove  # noqa: E402

KINDS = {"files": "data folders with a fault in them", "commands": "command lines at random",
         "damage": "stopped runs whose files were damaged", "kills": "signals at random moments, resumed"}


def cpu_seconds():
    return sum(os.times()[:4])  # with those of the processes that were waited for


def tries(kind, numbers, seed, limit=float("inf"), keep=False):
    """Make tries of a kind -> {number: result}, CPU s, wall s, and the folder in which they were made."""
    module, found, home = importlib.import_module(f"fuzz.{kind}"), {}, os.getcwd()
    began, cpu, place = time.monotonic(), cpu_seconds(), Path(tempfile.mkdtemp(prefix="fuzz-"))
    module.KEEP = keep
    os.chdir(place)
    try:
        for number in numbers:
            if cpu_seconds() - cpu > limit:
                break
            try:
                found[number] = module.attempt(seed, number, place)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = f"the fuzzer failed: {error!r} in {Path(where.filename).name}, line {where.lineno}"
                found[number] = Result("failed", text)
            if sys.stderr.isatty():
                print(f"\r{kind} {number} ", end="", file=sys.stderr, flush=True)
    finally:
        os.chdir(home)
        if not keep:
            remove(place)
    return found, cpu_seconds() - cpu, time.monotonic() - began, place


def commit():
    def git(*words):
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "../../nanoadagrpo.py", "../../adagrpo_core")
    return git("rev-parse", "--short", "HEAD") + (" and what was changed since" if changed else "")


def listed(kind, wrong, seed):
    """A line for each sort of fault: the first of them in full, and the numbers of all."""
    sorts = {}
    for number, fault in wrong.items():
        sorts.setdefault(fault.split(":")[0], []).append(number)
    for numbers in sorts.values():
        more = f"; also {', '.join(map(str, numbers[1:]))}" if numbers[1:] else ""
        yield f"* {len(numbers)} times {wrong[numbers[0]]} (`--seed {seed} --only {kind}:{numbers[0]}`{more})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind, what in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="N", help=f"tries: {what}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first try of each kind")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="make this try alone, and leave its folder")
    parser.add_argument("--write", action="store_true", help="put the result into tests/fuzz/RESULT.md too")
    cfg = parser.parse_args()
    wanted = {kind: range(cfg.start, cfg.start + n) for kind in KINDS if (n := getattr(cfg, kind))}
    if cfg.only:
        kind, number = cfg.only.split(":")
        wanted = {kind: [int(number)]}
    page = ["| kind | tries | what came of them | faults | s |", "| --- | ---: | --- | ---: | ---: |"]
    faults = []
    for kind, numbers in wanted.items():
        found, _, seconds, place = tries(kind, numbers, cfg.seed, keep=bool(cfg.only))
        outcomes = Counter(x.outcome for x in found.values()).most_common()
        outcomes = ", ".join(f"{n} {word}" for word, n in outcomes)
        wrong = {number: x.fault for number, x in found.items() if x.fault}
        page.append(f"| {kind}: {KINDS[kind]} | {len(found)} | {outcomes} | {len(wrong)} | {seconds:.0f} |")
        faults += listed(kind, wrong, cfg.seed)
        if cfg.only:
            print(*found.values(), f"its folder: {place}", sep="\n")
    page = "\n".join([*page, "", *(faults or ["No faults."])])
    print(page)
    if cfg.write:
        command = shlex.join(["python", "tests/fuzz/run.py", *sys.argv[1:]]).replace(" --write", "")
        head = f"# Result of the fuzzer\n\n{datetime.date.today()}, commit {commit()}, 2 cores, no GPU:"
        (HERE / "RESULT.md").write_text(f"{head}\n\n    {command}\n\n{page}\n")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
