# SPDX-License-Identifier: MIT
"""Does the script compute what it computed at an older commit? Short runs of both: weights bit for bit, and metrics.

    git clone . BEFORE && git -C BEFORE checkout COMMIT
    python tests/benchmarks/same.py BEFORE                 # on a CPU; two to three minutes
    python tests/benchmarks/same.py BEFORE --data DIR      # also on data, such as Amazon's (docs/results.md)

It is for pages whose figures took hours: if nothing has moved here, they are figures of the code of today.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import feedback
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SMALL = "--sft-steps 20 --rl-steps 6 --batch-size 8 --sft-batch-size 8 --group-size 4 --eval-prompts 60 --eval-every 3"
RUNS = {
    "every method": "--toy --method all",
    "micro-batches, two updates, two negatives, valid items only":
        "--toy --method all --updates 2 --micro-batch-size 3 --negatives 2 --constrained",
    "bfloat16, the best policy kept": "--toy --keep best --dtype bfloat16",
    "a log whose rows show different numbers of items": "--data {log} --method adagrpo",
    "data": "--data {data} --method adagrpo,random-gate",
    "data, from a saved policy": "--data {data} --model {model}",
}  # fmt: skip


def trained(checkout, flags, out):
    """The rows of metrics.jsonl and all weights of a run of this checkout's script."""
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "nanoadagrpo.py", *flags, "--out", str(out)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr.strip().splitlines()[-1]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = {}
    for path in sorted(out.rglob("*.safetensors")):
        weights |= {(path.relative_to(out).as_posix(), name): x for name, x in load_file(path).items()}
    return rows, weights


def differences(one, other):
    """How many of how many tensors differ in any bit; the largest difference of a metric that both have, its name."""
    (rows, weights), (other_rows, other_weights) = one, other
    names = weights.keys() | other_weights.keys()
    differ = sum(not (name in weights and name in other_weights and torch.equal(weights[name], other_weights[name]))
                 for name in names)  # fmt: skip
    largest, which = 0.0, ""
    if len(rows) != len(other_rows):
        return differ, len(names), float("inf"), "number of rows"
    for row, other_row in zip(rows, other_rows, strict=True):
        for key in row.keys() & other_row.keys() - {"seconds", "memory"}:
            if row[key] != other_row[key]:
                gap = abs(row[key] - other_row[key]) if isinstance(row[key], float | int) else float("inf")
                largest, which = max((largest, which), (gap, key))
    return differ, len(names), largest, which


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a clone at the older commit")
    parser.add_argument("--data", default="", help="a folder of data for two more runs")
    parser.add_argument("--runs", nargs="*", help="names of runs; default: all")
    args = parser.parse_args(argv)
    moved = False
    print("| run | tensors that differ | largest difference of a metric |\n| --- | ---: | --- |")
    with tempfile.TemporaryDirectory() as folder:
        model, log = Path(folder, "BEFORE", "data", "policy", "adagrpo"), Path(folder, "log")
        log.mkdir()  # the toy's is too regular
        items, shown = [*itertools.product(range(5), range(4), range(3))], [*range(1, 6)] * 60 + [16]  # one long row
        feedback.shop(log, random.Random(0), items, dict(train=80, valid=40, test=80), shown)
        for name, flags in RUNS.items():
            if (args.runs and name not in args.runs) or ("{data}" in flags and not args.data):
                continue
            flags = f"{flags} {SMALL} --device cpu".split()
            flags = [flag.format(data=os.path.abspath(args.data), model=model, log=log) for flag in flags]
            outs = [Path(folder, side, name) for side in ("BEFORE", "NOW")]
            sides = [trained(where, flags, out) for where, out in zip((args.before, ROOT), outs, strict=True)]
            differ, tensors, gap, key = differences(*sides)
            moved |= differ > 0 or gap > 1e-5  # sums for the log alone may be taken in another order
            print(f"| {name} | {differ} of {tensors} | {f'{gap:.1e} ({key})' if key else 'none'} |", flush=True)
    return int(moved)


if __name__ == "__main__":
    sys.exit(main())
