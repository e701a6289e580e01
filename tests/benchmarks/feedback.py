# SPDX-License-Identifier: MIT
"""An exposure log of a million shown items, and what `--constrained` costs. One core:

    OMP_NUM_THREADS=1 python tests/benchmarks/feedback.py

Seconds are CPU time of this process; ratios are medians of five turns, taken in alternation.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import nanoadagrpo as nano


def cpu(work):
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def shop(folder, g, items, prompts, shown):
    """JSONL with {file: number} of random prompts, and a log with a row for each number of items that were shown."""
    def some(n):
        return [list(g.choice(items)) for _ in range(n)]

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    (folder / "catalogue.json").write_text(json.dumps([list(sid) for sid in items]))
    for name, n in prompts.items():
        write(f"{name}.jsonl", (dict(history=some(10), target=some(1)[0]) for _ in range(n)))
    clicks = ([int(g.random() < 0.3) for _ in range(n)] for n in shown)
    write("log.jsonl", (dict(history=some(10), shown=some(len(click)), click=click,
                             order=[int(y and g.random() < 0.3) for y in click]) for click in clicks))


def million(folder, rows=50_000, shown=20):
    g = random.Random(0)
    items = sorted({tuple(g.randrange(64) for _ in range(3)) for _ in range(10_000)})
    shop(folder, g, items, dict(train=5000, valid=500, test=500), [shown] * rows)
    cfg = nano.Settings(data=str(folder), device="cpu")
    load, data = cpu(lambda: nano.load_data(folder, cfg))
    train, ranker = cpu(lambda: nano.train_ranker(data.catalogue, data.log, cfg))
    judge, _ = cpu(lambda: nano.judge_ranker(ranker, data.holdout))
    print(f"| a million shown items: load, train, judge | {load:.1f} + {train:.1f} + {judge:.1f} s |", flush=True)


def constrained(items, codes, B=64, width=50, turns=5):
    sids = sorted({tuple(x) for x in np.random.default_rng(0).integers(0, codes, (items, 3)).tolist()})
    build, catalogue = cpu(lambda: nano.Catalogue(sids))
    policy = nano.tiny_policy(catalogue, nano.Settings(toy=True, device="cpu", max_history=19))
    history = torch.randint(catalogue.N, (B, 19), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def search(allowed):
        select = nano.constrained(nano.beam(width), allowed, distinct=True)
        return nano.tree_decode(policy, nano.prefill(policy, history), select)[0]

    assert (catalogue.item(search(catalogue)) >= 0).all()
    times = [[cpu(lambda x=x: search(x))[0] for x in (None, catalogue)] for _ in range(turns)]
    ratios = sorted(after / before for before, after in times)
    size = sum(x.nbytes for x in (catalogue.tokens, catalogue.item_at, *catalogue.pairs)) / 2**20
    print(f"| `--constrained` against free, {items:,} items, 3 x {codes:,} codes, B={B}, width {width} | "
          f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
          f"catalogue {size:.0f} MiB, built in {build:.1f} s |", flush=True)


if __name__ == "__main__":
    print("| what | measured |\n| --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        million(Path(folder))
    for sizes in ((10**4, 64), (10**5, 256), (10**6, 8192)):
        constrained(*sizes)
