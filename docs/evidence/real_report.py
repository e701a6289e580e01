# SPDX-License-Identifier: MIT
"""What real.py reports: intervals over users and seeds, tables, one figure, and their place on the page."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import run
import scipy.stats
from arithmetic import Interval
from matplotlib.figure import Figure
from report import commit, machine, markdown, number, place, said, signed, tables_beside

REWARDS = ("rated", "uniform", "popular")  # what a ranker learns from; arms are run with the first two
PER_USER = ("hr@10", "auc", "ndcg@5", "liked@10", "random@10", "liked@50", "random@50", "liked mass", "random mass")
JUDGES = ("AUC", "NDCG@5", "P@10", "P@50", "HR@10")
NAMES = {"popularity": "popularity", "EASE": "EASE", "rated": "ranker (a), rated lists",
         "uniform": "ranker (b), 15 uniform", "popular": "ranker (c), 15 by popularity", "base": "base policy",
         "sharpened": "base policy, sharpened"}
METHODS = {"nll": "NLL continued", "grpo+nll": "GRPO+NLL", "adagrpo": "AdaGRPO D&R", "random-gate": "random gate",
           "adagrpo-r": "R", "random-r": "random at R's rate", "anti-r": "anti-R"}
PAIRS = (("adagrpo", "nll"), ("adagrpo", "random-gate"), ("adagrpo", "grpo+nll"), ("grpo+nll", "nll"),
         ("adagrpo-r", "nll"), ("adagrpo-r", "random-r"), ("adagrpo-r", "anti-r"))


def interval(x):
    """Mean and 95 % interval of values (seeds, users), both drawn at random from many.

    A user's values go together over the seeds, and a seed's over the users. Sums over clusters of either kind give the
    variance of the mean: that of users, and what seeds add to the variance of single values (Cameron, Gelbach and
    Miller 2011). Users are many: a normal quantile; seeds are few: that of t. One seed cannot say what seeds add.
    """
    mean = float(x.mean())
    e = (x - mean) / x.size
    users, n = (e.sum(0) ** 2).sum(), len(x)
    seeds = max(0.0, (e.sum(1) ** 2).sum() * n / (n - 1) - (e**2).sum()) if n > 1 else 0.0
    z, t = scipy.stats.norm.ppf(0.975), scipy.stats.t.ppf(0.975, max(1, n - 1))
    half = float((z**2 * users + t**2 * seeds) ** 0.5)
    return Interval(mean, mean - half, mean + half)


def ratio(y, n):
    """Values (seeds, users) whose mean is sum(y) / sum(n), and whose spread is that of the ratio (linearised)."""
    p = y.sum() / n.sum()
    return p + (y - p * n) * n.size / n.sum()


def contrast(x, where):
    """The same of the mean of x where `where` holds, less its mean elsewhere; NaN where one of them is of nothing."""
    if where.all() or not where.any():
        return np.full(x.shape, np.nan)
    a, b = x[where].mean(), x[~where].mean()
    return a - b + x.size * np.where(where, (x - a) / where.sum(), (b - x) / (~where).sum())


def columns(each):
    """{judge: (seeds, users) values} in percent, of arrays (seeds, users, PER_USER)."""
    x = dict(zip(PER_USER, np.moveaxis(np.asarray(each, float), -1, 0), strict=True))
    found = {"AUC": x["auc"], "NDCG@5": x["ndcg@5"], "P@10": ratio(x["liked@10"], x["random@10"]),
             "P@50": ratio(x["liked@50"], x["random@50"]), "HR@10": x["hr@10"],
             "samples": ratio(x["liked mass"], x["random mass"])}
    return {name: 100 * value for name, value in found.items()}


class Results(NamedTuple):
    seeds: list
    doses: dict
    base: list  # units, one per seed
    arms: dict  # Arm -> units

    def arrays(self, name):
        return np.stack([unit["arrays"][name] for unit in self.base])

    def each(self, arm):
        return np.stack([unit["arrays"]["each"] for unit in self.arms[arm]])

    def arm(self, name, reward):
        return next(arm for arm in self.arms if arm.name == name and arm.reward in (reward, ""))


def mean(units, *keys):
    for key in keys:
        units = [unit[key] for unit in units]
    return float(np.mean(units))


def row_of(each, entropy, samples=True):
    x = columns(each)
    return [*(number(x[name].mean(), 1, 1) for name in JUDGES), number(entropy),
            number(x["samples"].mean(), 1, 1) if samples else ""]


HEAD = [*(f"{name} %" for name in JUDGES), "entropy", "samples liked %"]


def table_yardsticks(results):
    rows = [["", *HEAD, "AUC in its own log"]]
    for name, title in NAMES.items():
        own = mean(results.base, "learnt", name) if name in REWARDS else float("nan")
        entropy = mean(results.base, "final", name, "entropy")
        rows.append([title, *row_of(results.arrays(name), entropy, name in ("base", "sharpened")), number(own, 100, 1)])
    return markdown(rows)


def table_rankers(results):
    """Paired differences of what is served without any RL."""
    rows = [["difference", *(f"{name}, points" for name in JUDGES)]]
    pairs = ("uniform", "popular"), ("uniform", "rated"), *((name, "base") for name in REWARDS), ("uniform", "EASE")
    for name, other in pairs:
        a, b = columns(results.arrays(name)), columns(results.arrays(other))
        rows.append([f"{NAMES[name]} − {NAMES[other]}", *(signed(interval(a[key] - b[key])) for key in JUDGES)])
    return markdown(rows)


def table_rates(results):
    """R and c of rankers, asked about their user and about another one, and of one that answers at random."""
    rows = [["admitted %", *(f"R, M={M}" for M in range(1, 5)), *(f"D&R, M={M}" for M in range(1, 5))]]
    names = {"random": "a random ranker"}
    for name in REWARDS:
        names |= {name: NAMES[name], f"{name}, another user": f"the same, asked about another user ({name})"}
    for name, title in names.items():
        rows.append([title, *(number(mean(results.base, "rates", f"{gate} {M} {name}"), 100, 1)
                              for gate in "Rc" for M in range(1, 5))])
    return markdown(rows)


def table_knows(results):
    """Is the ranker better where the gate admits, and better than the policy?"""
    rows = [["", "gate", "admitted %", "ranker: AUC admitted", "others", "policy: AUC admitted", "others",
             "ranker − policy, admitted − others"]]
    policy, D = 100 * results.arrays("gate AUC policy"), results.arrays("gate D")
    for name in REWARDS:
        ranker = 100 * results.arrays(f"gate AUC {name}")
        for title, gate in {"R, M=1": results.arrays(f"gate R 1 {name}"), "R, M=4": results.arrays(f"gate R 4 {name}"),
                            "D&R, M=1": D & results.arrays(f"gate R 1 {name}")}.items():
            sides = [number(x[where].mean() if where.any() else np.nan, 1, 1)
                     for x in (ranker, policy) for where in (gate, ~gate)]
            found = signed(interval(contrast(ranker - policy, gate)))
            rows.append([NAMES[name], title, number(gate.mean(), 100, 1), *sides, found])
    return markdown(rows, text=2)


def table_arms(results):
    rows = [["reward", "arm", "λ", *HEAD, "admitted %"]]
    for name in ("base", "sharpened"):
        entropy = mean(results.base, "final", name, "entropy")
        rows.append(["", NAMES[name], "", *row_of(results.arrays(name), entropy), ""])
    for arm, units in results.arms.items():
        admitted = mean(units, "admitted") if arm.reward else float("nan")
        rows.append([arm.reward, METHODS[arm.name], f"{arm.lam:g}" if arm.reward else "",
                     *row_of(results.each(arm), mean(units, "final", "entropy")), number(admitted, 100, 1)])
    return markdown(rows, text=2)


def difference(results, arm, other):
    a, b = columns(results.each(arm)), columns(results.each(other))
    return {name: interval(a[name] - b[name]) for name in JUDGES}


def table_differences(results):
    rows = [["reward", "difference", *(f"{name}, points" for name in JUDGES)]]
    for reward in REWARDS[:2]:
        for names in PAIRS:
            arm, other = (results.arm(name, reward) for name in names)
            title = " − ".join(METHODS[x.name] + (f" (λ {x.lam:g})" if x.reward else "") for x in (arm, other))
            rows.append([reward, title, *map(signed, difference(results, arm, other).values())])
    return markdown(rows, text=2)


def figure(results, path):
    drawn = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(1, 2))
    for unit in results.base:
        steps, hits = zip(*((point["step"], 100 * point["hr@10"]) for point in unit["curve"]), strict=True)
        left.plot(steps, hits, color="C0", marker="o", ms=3)
    left.set(title="base policy: HR@10 on validation, %", xlabel="supervised steps")
    for i, (reward, marker) in enumerate(zip(REWARDS[:2], "os", strict=True)):
        for j, judge_name in enumerate(("AUC", "HR@10")):
            found = [difference(results, *(results.arm(name, reward) for name in names))[judge_name] for names in PAIRS]
            x = np.arange(len(PAIRS)) + (2 * i + j - 1.5) / 6
            reach = [p.high - p.mean for p in found]
            right.errorbar(x, [p.mean for p in found], reach, ls="", marker=marker, color=f"C{j}", capsize=3, ms=4,
                           label=f"{judge_name}, reward ({'ab'[i]})")
    right.set(title="paired differences, points", xticks=range(len(PAIRS)))
    labels = ["\n− ".join(METHODS[name].replace(" at ", "\n at ") for name in names) for names in PAIRS]
    right.set_xticklabels(labels, fontsize=7)
    right.axhline(0, color="0.7", lw=0.8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110)


def table_doses(doses):
    rows = [["tried, at this dose", "HR@10 %, validation"]]
    return markdown(rows + [[name, f"{hits:.2f}"] for name, hits in doses["validation HR@10 %"].items()])


def verdicts(results):
    """The main findings in sentences, an item each; `said` chooses every word that could be otherwise."""
    def found(name, other):
        each = difference(results, results.arm(name, reward), results.arm(other, reward))
        words = (f"{key} {said(each[key], 'higher', 'no clear difference', 'lower')} ({signed(each[key])})"
                 for key in ("AUC", "HR@10"))
        return f"against {METHODS[other]}: {', '.join(words)}"

    for reward in REWARDS[:2]:
        yield (f"**Does the gate help? Reward: {NAMES[reward]}.** AdaGRPO D&R {found('adagrpo', 'nll')}; "
               f"{found('adagrpo', 'grpo+nll')}.")
        yield (f"**Its choice, or its rate? Same reward.** D&R {found('adagrpo', 'random-gate')}. R alone "
               f"{found('adagrpo-r', 'random-r')}; {found('adagrpo-r', 'anti-r')}.")
    each = [x for reward in REWARDS[:2] for names in PAIRS
            for x in difference(results, *(results.arm(name, reward) for name in names)).values()]
    yield (f"**How many of these are chance?** Of the {len(each)} intervals below {sum(x.low > 0 for x in each)} lie "
           f"above 0 and {sum(x.high < 0 for x in each)} below.")
    policy, D = 100 * results.arrays("gate AUC policy"), results.arrays("gate D")
    parts = []
    for name in REWARDS:
        lead = 100 * results.arrays(f"gate AUC {name}") - policy
        gate = results.arrays(f"gate R 1 {name}")
        parts.append(f"{NAMES[name]}: R {signed(interval(contrast(lead, gate)))}, "
                     f"D&R {signed(interval(contrast(lead, D & gate)))}")
    yield ("**Does R know where the ranker is better than the policy?** By how much the ranker's lead in AUC over the "
           f"policy is larger where a gate admits than elsewhere, in points: {'; '.join(parts)}.")
    a, b = (columns(results.arrays(name)) for name in ("uniform", "popular"))
    yield ("**Which negatives make the better ranker?** 15 uniform − 15 by popularity: "
           + ", ".join(f"{key} {signed(interval(a[key] - b[key]))}" for key in ("AUC", "HR@10")) + ".")


def provenance(results, args, cfg):
    """Where the numbers of a page are from."""
    units, users = [*results.base, *(unit for each in results.arms.values() for unit in each)], results.base[0]["users"]
    minutes = sum(unit["core_seconds"] for unit in units) / 60
    code = json.loads((args.out / "made-by.json").read_text(encoding="utf-8"))["code"][:12]
    command = f"docs/evidence/real.py --yahoo DIR --seeds {run.seeds_text(results.seeds)}"
    command += f" --size {args.size}" if args.size != "default" else ""
    over = "users and seeds" if len(results.seeds) > 1 else "the users of the one seed, not over seeds"
    yield (f"*Written by `docs/evidence/real.py`; edit that instead.* Intervals in brackets are 95 %, over {over}; "
           "bold where 0 lies outside. No correction is made for the number of comparisons.")
    yield markdown([["", ""], ["command", f"`{command}`"], ["seeds", run.seeds_text(results.seeds)],
                    ["settings", f"{cfg.sft_steps} supervised steps of {cfg.sft_batch_size} prompts, {cfg.rl_steps} RL "
                     f"steps of {cfg.batch_size}, K={cfg.group_size}, M={cfg.negatives}, tau={cfg.tau:.3g}, "
                     f"rho={cfg.rho:g}, learning rate {results.doses['lr']:g}, histories of {cfg.max_history}"],
                    ["judges", f"{users} users a seed, each with liked and disliked random items"],
                    ["machine", machine()], ["commit", f"{commit(run.ROOT)}; code of the runs {code}"],
                    ["run time", f"{minutes:.0f} core minutes, {minutes / len(results.seeds):.1f} a seed"]], text=2)


def page(results, args, cfg):
    """The paragraphs of docs/results.md about the real log: what was found, and the differences."""
    yield from provenance(results, args, cfg)
    yield "### What the real log says"
    yield "\n".join(f"* {text}" for text in verdicts(results))
    yield "Paired differences in points; GRPO+NLL and AdaGRPO at the λ that validation chose on other seeds:"
    yield table_differences(results)


def tables_page(results, args, cfg):
    """The paragraphs of docs/results-tables.md about the real log."""
    yield "## The real log: all tables"
    yield from provenance(results, args, cfg)
    yield "### Judged by random items: what biased feedback teaches"
    yield table_yardsticks(results)
    yield "Paired differences in points:"
    yield table_rankers(results)
    yield "### Is there anything for the gate to find?"
    yield (f"Base policy, RL prompts of the judged users. D admits {number(mean(results.base, 'rates', 'D'), 100, 1)} "
           "%; R and D&R, for M negatives:")
    yield table_rates(results)
    yield ("AUC over random items in percent, of the users whose prompt is admitted and of the others. The last column "
           "is in points:")
    yield table_knows(results)
    yield "### The arms"
    yield table_arms(results)
    seeds = results.doses["seeds"]
    yield f"Doses, chosen on validation of seed{'s' * (len(seeds) > 1)} {run.seeds_text(seeds)}:"
    yield table_doses(results.doses)


def write_page(args, results, cfg):
    """The page, its long tables beside it (results.md, results-tables.md), and the figure."""
    figure(results, args.page.parent / "figures" / "real.png")
    place("real", args.page, page(results, args, cfg))
    place("real", tables_beside(args.page), tables_page(results, args, cfg))
    print(f"report: {args.page}")
