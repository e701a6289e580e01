# SPDX-License-Identifier: MIT
"""What tuned.py reports: the doses, the arms, their differences, and where the numbers are from."""

from __future__ import annotations

import shlex

import numpy as np
import run
from arithmetic import choose_dose
from real_report import interval
from report import commit, machine, markdown, number, place, signed

TITLES = {"base": "base", "nll": "NLL continued", "grpo+nll": "GRPO+NLL", "adagrpo-d": "D", "adagrpo-r": "R",
          "adagrpo": "AdaGRPO D&R", "random-gate": "random gate", "as-adagrpo": "as many as D&R, at random",
          "as-r": "as many as R, at random", "as-d": "as many as D, at random"}


def title(arm):
    return TITLES[arm.name] + (f" (λ {arm.lam:g})" if arm.lam else "")


def values(units):
    """{metric: (seeds, prompts)} in percent; HR@50 if there are as many beams."""
    rank = np.stack([unit["arrays"]["rank"] for unit in units]).astype(float)
    found = {f"HR@{k}": 100.0 * (rank <= k) for k in (10, 50) if f"hr@{k}" in units[0]}
    return found | {"NDCG@10": 100.0 * np.where(rank <= 10, 1 / np.log2(1.0 + rank), 0.0)}


def table_doses(tried):
    """HR@10 on validation; the dose in bold. tried: {method: {lambda: [of each seed]}}"""
    rows = [["λ", *(f"{lam:g}" for lam in next(iter(tried.values())))]]
    for name, trials in tried.items():
        cells = {lam: f"{100 * np.mean(hits):.2f}" for lam, hits in trials.items()}
        dose = choose_dose(trials)
        rows.append([TITLES[name], *(f"**{x}**" if lam == dose else x for lam, x in cells.items())])
    return markdown(rows)


def table_arms(found):
    rows = [["", *(f"{key} %" for key in values(next(iter(found.values())))), "admitted %"]]
    for arm, units in found.items():
        means = [number(x.mean()) for x in values(units).values()]
        rows.append([title(arm), *means, number(np.mean([unit["admitted"] for unit in units]), 100, 1)])
    return markdown(rows)


def table_differences(found, pairs):
    rows = [["difference, points", *values(next(iter(found.values())))]]
    for a, b in pairs:
        x, y = values(found[a]), values(found[b])
        rows.append([f"{title(a)} − {title(b)}", *(signed(interval(x[key] - y[key])) for key in x)])
    return markdown(rows)


def paragraphs(args, code, tried, found, pairs):
    units = next(iter(found.values()))
    n = len(units[0]["arrays"]["rank"])
    minutes = sum(unit["core_seconds"] for of_seeds in found.values() for unit in of_seeds) / 60
    tuning, seeds = run.seeds_text(args.tuning), run.seeds_text(args.seeds)
    over = "prompts and seeds" if len(units) > 1 else "the prompts of the one seed, not over seeds"
    yield "*Written by `docs/evidence/tuned.py`; edit that instead.*"
    command = f"python docs/evidence/tuned.py --data DIR --out OUT --tuning {tuning} --seeds {seeds} "
    yield f"    {command}{shlex.join(args.flags)}".rstrip()
    yield f"HR@10 in % on all validation prompts, mean of seed{'s' * (len(args.tuning) > 1)} {tuning}; bold: chosen."
    yield table_doses(tried)
    yield f"Then seed{'s' * (len(units) > 1)} {seeds}, all {n:,} test prompts:"
    yield table_arms(found)
    yield (f"Paired differences, with 95 % intervals over {over}; bold where 0 lies outside. They take λ as given, and "
           "leave out that it was chosen on a few seeds. No correction is made for the number of comparisons.")
    yield table_differences(found, pairs)
    made = f"commit {commit(run.ROOT)}; code of the runs {code}; {minutes:.0f} core minutes without tuning."
    yield f"{machine()}; {made}"


def write_page(args, code, tried, found, pairs):
    place("tuned", args.page, paragraphs(args, code, tried, found, pairs))
    print(f"report: {args.page}")
