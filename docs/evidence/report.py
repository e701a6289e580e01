# SPDX-License-Identifier: MIT
"""The pages: tables, figures and verdicts, all computed from the units of work; nothing is concluded beforehand."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from arithmetic import (
    Interval,
    difficulty_bins,
    hr_in_bins,
    lift,
    over_seeds,
    pooled_lift,
    seen,
    split_users,
    verdict,
)
from compare import COLOURS
from matplotlib.figure import Figure
from measure import DWELL, EFFECTIVE, VISIT

from nanoadagrpo import UserError, in_one_line

NAMES = {"base": "Base (SFT only)", "nll": "NLL continued", "grpo": "GRPO", "grpo+nll": "GRPO+NLL",
         "adagrpo-d": "AdaGRPO D", "adagrpo-r": "AdaGRPO R", "adagrpo": "AdaGRPO D&R", "r-thinned": "R thinned",
         "random-gate": "random gate", "random-at-r": "random at R's rate", "oracle-gate": "oracle gate",
         "true-reward": "GRPO+NLL, true utility as reward"}
RERANKED = "NLL continued, beams re-ranked by the ranker"
CONTROLS = ("nll", "grpo+nll", "random-gate")
RULES = {"equal": "equal lambda", "tuned": "lambda chosen on validation"}
# Column of Table 4 -> (key, scale, digits).
COLUMNS = {"HR@1": ("hr@1", 100, 2), "HR@10": ("hr@10", 100, 2), "HR@50": ("hr@50", 100, 2),
           "NDCG@10": ("ndcg@10", 100, 2), "Clk@1": ("click_reward@1", 1, 3), "Clk@10": ("click_reward@10", 1, 3),
           "Clk@50": ("click_reward@50", 1, 3), "Ord@1": ("order_reward@1", 1, 3), "Ord@10": ("order_reward@10", 1, 3),
           "Ord@50": ("order_reward@50", 1, 3), "halluc. %": ("hallucination", 100, 2),
           "sampled %": ("sampled_hallucination", 100, 2), "true utility": ("utility@10", 1, 2)}
BINS = ("easiest", "2", "3", "4", "hardest")
STRATA = {"overall": "all (Table 1)", "hard": "hard (Table 2)", "discriminable": "hard and discriminable (Table 3)",
          "clean": "contexts without bait", "misled": "contexts with bait"}


class Results(NamedTuple):
    """Everything that the page is about. Lists of units run over the seeds, in one order."""

    cfg: object
    world: object
    seeds: list
    tuned_on: list
    rules: tuple
    base: list
    arms: dict  # rule -> row -> units
    doses: dict  # rule -> row -> Arm
    knob_seeds: list
    knob_tuned: list  # baits for which doses were chosen
    knob: dict  # rule -> bait -> row -> units
    widths: dict
    code: str
    core_minutes: float  # of all seeds
    machines: dict  # each in words -> the seeds of which it ran something
    beside: Results | None  # the same on a second set of seeds, without the knob

    def units(self, rule, name):
        return self.base if name == "base" else self.arms[rule][name]

    def values(self, rule, name, key, checkpoint="final"):
        return np.array([unit[checkpoint][key] for unit in self.units(rule, name)])


# == The claims =======================================================================================================


class Claim(NamedTuple):
    """A finding in words, and the differences that must all lie above 0 for it to be seen."""

    text: str
    paper: str  # its numbers there; empty where the paper has no such comparison
    differences: Callable  # (results, rule) -> list of Interval, in `unit`
    unit: str = "points"
    any_dose: bool = False  # no dose enters


def more(key, name, other, checkpoint="final", other_checkpoint="final", share=1.0, over=None):
    """name - other, paired over seeds, in points (utility as it is); or (name - over) - share * (other - over)."""
    scale = 1 if key == "utility@10" else 100

    def difference(results, rule):
        a, b = results.values(rule, name, key, checkpoint), results.values(rule, other, key, other_checkpoint)
        c = 0 if over is None else results.values(rule, over, key)
        return over_seeds(scale * ((a - c) - share * (b - c)))

    return difference


def less(key, name, other):
    return more(key, other, name)


def every(*differences):
    return lambda results, rule: [difference(results, rule) for difference in differences]


def influence_over_null(results, stratum):
    """How much more the ranker moves the truth up than a random ranker does, per beam width."""
    return [over_seeds([unit["influence"][width]["ranker"][stratum]["influence"]
                        - unit["influence"][width]["random"][stratum]["influence"] for unit in results.base])
            for width in results.widths]


def trust_grows(results):
    """Rank correlation of reward and true utility on the discriminable, minus that on all."""
    tables = [[unit["influence"][width]["ranker"] for unit in results.base] for width in results.widths]
    return [over_seeds([table["discriminable"]["spearman"] - table["overall"]["spearman"] for table in per_seed])
            for per_seed in tables]


def lifts(treatment, control, *columns):
    return lambda results, rule: [ab_test(results, rule, treatment, control)[column] for column in columns]


CLAIMS = [
    Claim("The ranker moves hard truths up, more than a random ranker does (Table 2)", "+11.4 at W=50, +30.8 at W=128",
          lambda results, rule: influence_over_null(results, "hard"), "ranks", True),
    Claim("The same of hard and discriminable truths (Table 3)", "+23.2, +59.9; no null given",
          lambda results, rule: influence_over_null(results, "discriminable"), "ranks", True),
    Claim("Where the truth is hard and discriminable, the reward agrees better with the true utility", "",
          lambda results, rule: trust_grows(results), "correlation", True),
    Claim("GRPO alone loses HR@10 against Base", "10.39 against 11.01", every(less("hr@10", "grpo", "base"))),
    Claim("GRPO alone hallucinates more than Base", "0.89 against 0.08 %",
          every(more("hallucination", "grpo", "base"))),
    Claim("GRPO+NLL hallucinates more than NLL continued", "0.59 %; the paper has Base only, 0.08 %",
          every(more("hallucination", "grpo+nll", "nll"))),
    Claim("GRPO+NLL raises the ranker's p(click) most: more than AdaGRPO D&R", "Clk@10 .2391 against .2331",
          every(more("click_reward@10", "grpo+nll", "adagrpo"))),
    Claim("AdaGRPO D&R raises the ranker's p(order) more than GRPO+NLL", "Ord@10 .4617 against .4479",
          every(more("order_reward@10", "adagrpo", "grpo+nll"))),
    Claim("AdaGRPO D beats GRPO+NLL in HR@10", "11.48 against 11.06", every(more("hr@10", "adagrpo-d", "grpo+nll"))),
    Claim("AdaGRPO D&R beats D alone in HR@10", "11.63 against 11.48", every(more("hr@10", "adagrpo", "adagrpo-d"))),
    Claim("AdaGRPO D&R beats GRPO+NLL in HR@10", "11.63 against 11.06", every(more("hr@10", "adagrpo", "grpo+nll"))),
    Claim("AdaGRPO D&R hallucinates less than GRPO+NLL", "0.27 against 0.59 %",
          every(less("hallucination", "adagrpo", "grpo+nll"))),
    Claim("AdaGRPO D&R beats Base in HR@10", "11.63 against 11.01", every(more("hr@10", "adagrpo", "base"))),
    Claim("Control: AdaGRPO D&R beats NLL continued in HR@10", "", every(more("hr@10", "adagrpo", "nll"))),
    Claim("Control: AdaGRPO D&R beats the random gate of equal coverage in HR@10", "",
          every(more("hr@10", "adagrpo", "random-gate"))),
    Claim("Control: the same in the true utility of what is served", "",
          every(more("utility@10", "adagrpo", "random-gate")), "utility"),
    Claim("Control: AdaGRPO R, without D, beats NLL continued in HR@10", "",
          every(more("hr@10", "adagrpo-r", "nll"))),
    Claim("Control: AdaGRPO D&R beats R alone in HR@10", "", every(more("hr@10", "adagrpo", "adagrpo-r"))),
    Claim("Control: AdaGRPO D&R beats R thinned to its coverage in HR@10", "",
          every(more("hr@10", "adagrpo", "r-thinned"))),
    Claim("Control: AdaGRPO R beats random at R's rate in HR@10", "", every(more("hr@10", "adagrpo-r", "random-at-r"))),
    Claim("Control: AdaGRPO D&R has more than .6 of the oracle gate's gain over NLL, itself above 0", "",
          every(more("hr@10", "oracle-gate", "nll"), more("hr@10", "adagrpo", "oracle-gate", share=0.6, over="nll"))),
    Claim("Headroom: the true utility as reward beats NLL continued in HR@10", "",
          every(more("hr@10", "true-reward", "nll"))),
    Claim("AdaGRPO's best checkpoint, chosen on validation, beats its last in HR@10", "12.18 against 11.63",
          every(more("hr@10", "adagrpo", "adagrpo", checkpoint="best"))),
    Claim("Against GRPO+NLL, AdaGRPO D&R gains HR@10 in the three middle bins (Table 5)",
          "12.83 to 12.90, 8.47 to 8.64, 5.21 to 5.38",
          lambda results, rule: binned_differences(results, rule, "adagrpo", "grpo+nll")[1:4]),
    Claim("Served to users, AdaGRPO D&R lifts effective page views, CTR and dwell time over Base (Table 6)",
          "+0.43, +0.27, +0.23 %", lifts("adagrpo", "base", "page_views", "ctr", "dwell"), "%"),
    Claim("The same over GRPO+NLL", "whose own lifts were +0.09, +0.09, +0.01 %",
          lifts("adagrpo", "grpo+nll", "page_views", "ctr", "dwell"), "%"),
    Claim("More categories exposed and clicked than by Base (Table 6)", "significant",
          lifts("adagrpo", "base", "exposed", "clicked"), "%"),
]


def judged(results, claim):
    """(verdict, {rule: intervals}) of a claim."""
    rules = ("any",) if claim.any_dose else results.rules
    intervals = {rule: claim.differences(results, rule) for rule in rules}
    return verdict({rule: seen(found) for rule, found in intervals.items()}), intervals


def said(interval, above, unclear, below):
    """The words for a difference whose interval lies above 0, holds 0 or cannot say, or lies below 0."""
    return {"yes": above, "no": unclear, "opposite": below}[seen([interval])]


def worth_of_d(results, rule):
    """What is D worth? Every word that could be otherwise is chosen by `said`."""
    both, choice, rate, of_r = (
        more("hr@10", name, other)(results, rule)
        for name, other in (("adagrpo", "adagrpo-r"), ("adagrpo", "r-thinned"), ("r-thinned", "adagrpo-r"),
                            ("adagrpo-r", "random-at-r")))
    chance = "chooses better than chance", "cannot be told from chance", "chooses worse than chance"
    nothing = f"nothing that {len(results.seeds)} seeds can show"
    return (f"**What is D worth, at {RULES[rule]}?** Beside R alone {said(both, 'a gain', nothing, 'a loss')}: "
            f"D&R − R is {signed(both)} points of HR@10. D {said(choice, *chance)} among what R admits: D&R − "
            f"R thinned is {signed(choice)}. To admit fewer {said(rate, 'gains', f'costs {nothing}', 'costs')}: "
            f"R thinned − R is {signed(rate)}. R {said(of_r, *chance)}: R − random at R's rate is {signed(of_r)}.")


def what_it_says(results):
    """The main findings in sentences, an item each; as above, the intervals choose the words."""
    gain = "gains over", "cannot be told from", "loses to"

    def found(rule, key, name, other):
        interval = more(key, name, other)(results, rule)
        return f"{said(interval, *gain)} {NAMES[other]}: {signed(interval)}"

    rule = results.rules[-1]
    yield (f"**Does the gate help?** At {RULES[rule]}, AdaGRPO D&R {found(rule, 'hr@10', 'adagrpo', 'nll')} points of "
           "HR@10.")
    yield (f"**Is it the gate's choice, or its rate?** D&R {found(rule, 'hr@10', 'adagrpo', 'random-gate')} points of "
           f"HR@10. In true utility of what is served it {found(rule, 'utility@10', 'adagrpo', 'random-gate')}.")
    against = "; ".join(f"at {RULES[each]} it {found(each, 'hr@10', 'adagrpo', 'grpo+nll')} points of HR@10, and in "
                        f"true utility it {found(each, 'utility@10', 'adagrpo', 'grpo+nll')}" for each in results.rules)
    yield f"**Does a smaller lambda do the same?** D&R against GRPO+NLL: {against}."
    alone = "; ".join(f"at {RULES[each]} it {found(each, 'hr@10', 'grpo+nll', 'nll')} points of HR@10 and has "
                      f"{signed(more('hallucination', 'grpo+nll', 'nll')(results, each))} points of hallucination"
                      for each in results.rules)
    yield f"**What does RL do without a gate?** GRPO+NLL: {alone}."
    yield (f"**How much is there to gain?** A gate that knows where the log misleads "
           f"{found(rule, 'hr@10', 'oracle-gate', 'nll')} points of HR@10; the true utility as reward "
           f"{found(rule, 'hr@10', 'true-reward', 'nll')}.")
    for each, gains in ((each, knob_gains(results, each)["D&R − GRPO+NLL"]) for each in results.knob):
        ends = "; ".join(f"at bait {bait:g} {signed(gains[bait])}" for bait in (min(gains), max(gains)))
        yield f"**Along the bait, at {RULES[each]}:** D&R − GRPO+NLL in points of HR@10, {ends}."


def together(results):
    """The results of both sets of seeds as those of one."""
    other = results.beside
    arms = {rule: {name: units + other.arms[rule][name] for name, units in rows.items()}
            for rule, rows in results.arms.items()}
    return results._replace(seeds=results.seeds + other.seeds, base=results.base + other.base, arms=arms)


def table_sets(results):
    """The main differences on either set of seeds, and on both."""
    sets, first, last = (results, results.beside, together(results)), results.rules[0], results.rules[-1]
    rows = [["difference", "in", *(f"seeds {span(each.seeds)}" for each in sets[:2]), "both"]]
    hits = [("adagrpo", "nll"), ("adagrpo", "random-gate"), ("adagrpo", "grpo+nll"), ("adagrpo", "adagrpo-r"),
            ("adagrpo", "r-thinned"), ("adagrpo-r", "nll"), ("adagrpo-r", "grpo+nll"), ("adagrpo-r", "random-at-r"),
            ("adagrpo-d", "nll"), ("adagrpo-d", "grpo+nll"), ("adagrpo", "adagrpo-d"), ("oracle-gate", "nll")]
    asked = [(last, "hr@10", *pair) for pair in hits] + [(last, "utility@10", "adagrpo", "grpo+nll")]
    asked += [(first, "hr@10", *pair) for pair in hits[1:3]] if first != last else []
    for rule, key, *pair in asked:
        unit = "HR@10, points" if key == "hr@10" else "true utility"
        rows.append([" − ".join(NAMES[name] for name in pair), f"{unit}; {RULES[rule]}",
                     *(signed(more(key, *pair)(each, rule)) for each in sets)])
    return markdown(rows, text=2)


def agreement(results):
    """How many verdicts the second set of seeds gives too, and a table of the others."""
    sets = results, results.beside
    verdicts = [[claim.text, *(judged(each, claim)[0] for each in sets)] for claim in CLAIMS]
    apart = [row for row in verdicts if row[1] != row[2]]
    yield (f"Of the {len(CLAIMS)} verdicts above, the second set gives {len(CLAIMS) - len(apart)} too"
           + (". The others:" if apart else "."))
    if apart:
        yield markdown([["finding", *(f"seeds {span(each.seeds)}" for each in sets)], *apart], text=3)


def span(seeds):
    """[100, 101, 102, 7] -> "100 to 102, 7"."""
    runs = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


# == Quantities of several seeds that more than one place needs =======================================================


def bins_per_seed(results):
    return [difficulty_bins(unit["arrays"]["rank"], unit["arrays"]["truth_logp"], results.cfg.beam_width)
            for unit in results.base]


def binned(results, rule, name):
    """(seeds, 5) HR@10 in the bins of Table 5."""
    return np.array([hr_in_bins(unit["arrays"]["rank"], bins)
                     for unit, bins in zip(results.units(rule, name), bins_per_seed(results), strict=True)])


def binned_differences(results, rule, name, other):
    difference = 100 * (binned(results, rule, name) - binned(results, rule, other))
    return [over_seeds(column) for column in difference.T]


def ab_test(results, rule, treatment, control):
    """{column of VISIT: pooled relative lift in percent}: both arms in one period, users split at random."""
    found = {}
    for column, key in enumerate(VISIT):
        each = []
        pairs = zip(results.seeds, results.units(rule, treatment), results.units(rule, control), strict=True)
        for seed, one, other in pairs:
            one, other = one["arrays"]["visit"][:, column], other["arrays"]["visit"][:, column]
            each.append([100 * x for x in lift(one, other, split_users(len(one), seed))])
        found[key] = pooled_lift(*zip(*each, strict=True))
    return found


# == Markdown =========================================================================================================


def markdown(rows, text=1):
    """Rows of cells, the first of which is the head; `text` columns to the left, numbers to the right."""
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    line = ["-" * w if i < text else "-" * (w - 1) + ":" for i, w in enumerate(width)]
    cells = [rows[0], line, *rows[1:]]
    return "\n".join("| " + " | ".join(cell.ljust(w) if i < text else cell.rjust(w)
                                       for i, (cell, w) in enumerate(zip(row, width, strict=True))) + " |"
                     for row in cells)


def number(x, scale=1, digits=2):
    return "" if np.isnan(x) else f"{x * scale:.{digits}f}"


def mean(values):
    """Of those that are numbers; NaN if none is."""
    return over_seeds(values).mean


def signed(interval, digits=2):
    """Mean and 95 % interval; bold where the interval does not hold 0."""
    middle, low, high = (f"{round(x, digits) + 0.0:+.{digits}f}" for x in interval)  # + 0.0: no minus zero
    if np.isnan(interval.low):
        return "" if np.isnan(interval.mean) else middle
    text = f"{middle} [{low}, {high}]"
    return f"**{text}**" if interval.low > 0 or interval.high < 0 else text


def table_influence(results, width):
    """Tables 1 to 3 for one beam width."""
    rows = [["stratum", "ranker", "LLM rank", "RM rank", "influence", "coverage %", "correlation", "baited %"]]
    for stratum, title in STRATA.items():
        for ranker in ("ranker", "random"):
            parts = [unit["influence"][width][ranker][stratum] for unit in results.base]
            cells = [number(mean([part.get(key, np.nan) for part in parts]), scale, digits)
                     for key, scale, digits in (("llm_rank", 1, 1), ("rm_rank", 1, 1), ("influence", 1, 1),
                                                ("coverage", 100, 1), ("spearman", 1, 3), ("misled", 100, 1))]
            rows.append([title, "the ranker" if ranker == "ranker" else "random", *cells])
    return markdown(rows, text=2)


def table_main(results, rule, checkpoint):
    """Table 4: means over seeds."""
    rows = [["method", *COLUMNS, "admitted %", "of them baited %"]]
    for name, title in NAMES.items():
        units = results.units(rule, name)
        gate = ["", ""]
        if name not in ("base", "nll"):
            gate = [number(mean([unit["admitted"] for unit in units]), 100, 1),
                    number(mean([unit["misled"] for unit in units if unit["admitted"] > 0]), 100, 1)]
        rows.append([title, *(number(mean(results.values(rule, name, key, checkpoint)), scale, digits)
                              for key, scale, digits in COLUMNS.values()), *gate])
        if name == "nll" and checkpoint == "final":
            again = [unit["reranked"] for unit in units]
            rows.append([RERANKED,
                         *(number(mean([one.get(key, np.nan) for one in again]), scale, digits)
                           for key, scale, digits in COLUMNS.values()), "", ""])
    return markdown(rows)


def table_differences(results, rule, checkpoint, keys=("hr@10", "ndcg@10", "hallucination", "utility@10")):
    """Every row against the three controls, paired over seeds."""
    titles = {"hr@10": "HR@10", "ndcg@10": "NDCG@10", "hallucination": "halluc. %", "utility@10": "true utility"}
    rows = [["method", *(f"{titles[key]} − {NAMES[control]}" for key in keys for control in CONTROLS)]]
    for name, title in NAMES.items():
        rows.append([title, *("" if name == control else
                              signed(more(key, name, control, checkpoint, checkpoint)(results, rule))
                              for key in keys for control in CONTROLS)])
    return markdown(rows)


def table_contexts(results, rule):
    """HR@10 where the log was clean and where it was baited."""
    rows = [["method", "HR@10 without bait", "− NLL continued", "HR@10 with bait", "− NLL continued"]]
    for name, title in NAMES.items():
        cells = []
        for key in ("hr@10 clean", "hr@10 misled"):
            cells.append(number(mean(results.values(rule, name, key)), 100))
            cells.append("" if name == "nll" else signed(more(key, name, "nll")(results, rule)))
        rows.append([title, *cells])
        if name == "nll":
            cells = []
            for key in ("hr@10 clean", "hr@10 misled"):
                again = 100 * np.array([unit["reranked"][key] for unit in results.units(rule, name)])
                cells += [number(mean(again)), signed(over_seeds(again - 100 * results.values(rule, name, key)))]
            rows.append([RERANKED, *cells])
    return markdown(rows)


def table_bins(results, rule):
    rows = [["HR@10 by the base policy's rank of the truth", *BINS]]
    for name, title in NAMES.items():
        rows.append([title, *(number(x, 100) for x in binned(results, rule, name).mean(0))])
    for other in CONTROLS:
        rows.append([f"AdaGRPO D&R − {NAMES[other]}",
                     *(signed(x) for x in binned_differences(results, rule, "adagrpo", other))])
    return markdown(rows)


def table_ab(results, rule):
    rows = [["lift, %", "effective page views", "CTR", "dwell time", "categories exposed", "categories clicked"]]
    for control, treatments in {"base": ("grpo+nll", "adagrpo", "random-gate", "oracle-gate"),
                                "nll": ("grpo+nll", "adagrpo", "random-gate", "oracle-gate"),
                                "grpo+nll": ("adagrpo",)}.items():
        for treatment in treatments:
            found = ab_test(results, rule, treatment, control)
            rows.append([f"{NAMES[treatment]} over {NAMES[control]}", *(signed(found[key]) for key in VISIT)])
    return markdown(rows)


def table_coverage(results, rule):
    """HR@10 over coverage: of R, of D&R, and of as many at random."""
    rows = [["method", "lambda", "admitted %", "HR@10", "− NLL continued", "− as many at random"]]
    for name, chance in {"adagrpo": "random-gate", "r-thinned": "random-gate", "random-gate": "",
                         "adagrpo-r": "random-at-r", "random-at-r": "", "adagrpo-d": "", "grpo+nll": ""}.items():
        rows.append([NAMES[name], f"{results.doses[rule][name].lam:g}",
                     number(mean([unit["admitted"] for unit in results.units(rule, name)]), 100, 1),
                     number(mean(results.values(rule, name, "hr@10")), 100),
                     signed(more("hr@10", name, "nll")(results, rule)),
                     signed(more("hr@10", name, chance)(results, rule)) if chance else ""])
    return markdown(rows)


def table_doses(results):
    rows = [["method", *(RULES[rule] for rule in results.rules)]]
    for name, title in NAMES.items():
        if name != "base":
            arms = [results.doses[rule][name] for rule in results.rules]
            rows.append([title, *(f"learning rate {arm.lr:g}" if name in ("nll", "grpo") else f"lambda {arm.lam:g}"
                                  for arm in arms)])
    return markdown(rows)


def table_verdicts(results):
    rows = [["finding", "the paper", "verdict", "unit", *(f"differences, {RULES[rule]}" for rule in results.rules)]]
    for claim in CLAIMS:
        word, intervals = judged(results, claim)
        if claim.any_dose:  # measured once: under the first rule's heading
            intervals = {results.rules[0]: intervals["any"]}
        rows.append([claim.text, claim.paper, f"**{word}**", claim.unit,
                     *("; ".join(filter(None, map(signed, intervals.get(rule, ())))) for rule in results.rules)])
    return markdown(rows, text=len(rows[0]))


# == Figures ==========================================================================================================


def band(axes, x, values, name, scale=1):
    """Mean over seeds (seeds, x) and its 95 % interval."""
    spread = [over_seeds(column * scale) for column in np.asarray(values, float).T]
    middle, low, high = (np.array([getattr(point, end) for point in spread]) for end in Interval._fields)
    axes.plot(x, middle, label=NAMES[name], color=COLOURS[name], lw=2.4 if name == "adagrpo" else 1.3,
              ls="--" if name == "oracle-gate" else "-")
    axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, lw=0)


def figure_dynamics(results, path):
    """Figure 3, a row of panels per dose rule."""
    panels = {"HR@10 (%)": ("hr@10", 100), "hallucination (%)": ("hallucination", 100),
              "ranker's p(click), best of 10": ("click_reward@10", 1), "admitted (%)": (None, 100)}
    figure = Figure(figsize=(15, 3.4 * len(results.rules)), layout="constrained")
    grid = figure.subplots(len(results.rules), len(panels), squeeze=False)
    for line, rule in zip(grid, results.rules, strict=True):
        for axes, (title, (key, scale)) in zip(line, panels.items(), strict=True):
            for name in COLOURS:
                units = results.arms[rule][name]
                if key:
                    x = [0, *(point["step"] for point in units[0]["curve"])]
                    values = [[base["valid"][key], *(point[key] for point in unit["curve"])]
                              for unit, base in zip(units, results.base, strict=True)]
                    # Seeds start at different levels, which is not the methods' doing: the band is of the change.
                    values = np.array(values)
                    band(axes, x, values - values[:, :1] + values[:, 0].mean(), name, scale)
                elif name not in ("nll", "grpo", "grpo+nll"):
                    each = [unit["arrays"]["admitted"] for unit in units]
                    share = np.array([one[:, 1] / one[:, 0] for one in each])
                    n = max(1, share.shape[1] // 20)  # one batch admits in steps of 1/B: means of a twentieth
                    share = share[:, : share.shape[1] // n * n].reshape(len(share), -1, n).mean(2)
                    band(axes, n * (np.arange(share.shape[1]) + 1), share, name, scale)
            axes.set(title=title, xlabel="step")
            axes.grid(alpha=0.3)
        line[0].set_ylabel(RULES[rule])
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def knob_gains(results, rule):
    """{line: {bait: interval}} of the knob figure: HR@10 in points, paired over seeds."""
    lines = {"D&R − random gate": ("adagrpo", "random-gate"), "D&R − GRPO+NLL": ("adagrpo", "grpo+nll"),
             "D&R − NLL continued": ("adagrpo", "nll"), "oracle gate − NLL continued": ("oracle-gate", "nll")}
    return {line: {bait: over_seeds([100 * (a["final"]["hr@10"] - b["final"]["hr@10"])
                                     for a, b in zip(rows[one], rows[other], strict=True)])
                   for bait, rows in results.knob[rule].items()} for line, (one, other) in lines.items()}


def figure_knob(results, path):
    figure = Figure(figsize=(6.5 * len(results.knob), 4), layout="constrained")
    for axes, rule in zip(figure.subplots(1, len(results.knob), squeeze=False)[0], results.knob, strict=True):
        lines = zip(knob_gains(results, rule).items(), ("C3", "C1", "0.35", "C8"), strict=True)
        for i, ((line, gains), colour) in enumerate(lines):
            x, points = [bait + (i - 1.5) / 100 for bait in gains], list(gains.values())  # whiskers side by side
            reach = [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
            axes.errorbar(x, [p.mean for p in points], reach, label=line, color=colour, capsize=3, marker="o", ms=4,
                          ls="--" if line.startswith("oracle") else "-")
        axes.axhline(0, color="0.7", lw=0.8)
        axes.set(title=f"gain in HR@10, points ({RULES[rule]})",
                 xlabel="bait: how far clicks mislead in half of the contexts")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def figure_coverage(results, rule, path):
    """Gain in HR@10 over NLL continued, along how many are admitted: chosen by whom?"""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    chosen = {"at random (0: NLL continued; 100: GRPO+NLL)": ("nll", "random-gate", "random-at-r", "grpo+nll"),
              "R, thinned and whole": ("r-thinned", "adagrpo-r"), "D": ("adagrpo-d",), "D&R": ("adagrpo",)}
    for (title, names), colour in zip(chosen.items(), ("C3", "C5", "C2", "C0"), strict=True):
        x = [100 * mean([unit["admitted"] for unit in results.units(rule, name)]) for name in names]
        points = [more("hr@10", name, "nll")(results, rule) for name in names]
        reach = [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
        axes.errorbar(x, [p.mean for p in points], reach, label=title, color=colour, capsize=3, marker="o", ms=4)
    axes.axhline(0, color="0.7", lw=0.8)
    axes.set(title=f"gain in HR@10 over NLL continued, points ({RULES[rule]})", xlabel="admitted (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def table_knob(results, rule):
    gains = knob_gains(results, rule)
    rows = [["bait", *(f"{bait:g}" for bait in results.knob[rule])]]
    rows += [[line, *(signed(interval) for interval in points.values())] for line, points in gains.items()]
    for title, key in (("D&R admits, %", "admitted"), ("of these baited, %", "misled")):
        rows.append([title, *(number(mean([unit[key] for unit in units["adagrpo"] if unit["admitted"] > 0]), 100, 1)
                              for units in results.knob[rule].values())])
    return markdown(rows)


# == The page =========================================================================================================


def machine():
    """The processor's name, the cores, the libraries."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return (f"{name}, {os.cpu_count()} cores, one per process; Python {platform.python_version()}, "
            f"torch {torch.__version__}")


def commit(root):
    """The commit, and whether the code differs from it."""
    try:
        def git(*words):
            return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

        changed = git("status", "--porcelain", "--", "nanoadagrpo.py", "adagrpo_core", "docs/evidence/*.py")
        return git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_page(results, path, command, root):
    """The page at `path`, its long tables beside it (results.md, results-tables.md), and the figures of both."""
    figures = path.parent / "evidence"
    figures.mkdir(parents=True, exist_ok=True)
    figure_dynamics(results, figures / "dynamics.png")
    figure_coverage(results, results.rules[-1], figures / "coverage.png")
    if results.knob:
        figure_knob(results, figures / "knob.png")
    tables = tables_beside(path)
    place("toy", path, page(results, command, root, tables.name))
    place("toy", tables, tables_page(results, command, root, path.name))


def tables_beside(path):
    return path.with_name(f"{path.stem}-tables.md")


DRIVERS = {"toy": "docs/evidence/run.py", "real": "docs/evidence/real.py", "tuned": "docs/evidence/tuned.py"}


def marks(part):
    """The lines between which a driver writes its part of a page."""
    return f"<!-- {part}: this part is written by {DRIVERS[part]} -->\n", f"<!-- /{part} -->"


def no_place(part, path):
    start, end = marks(part)
    return UserError(f"--page {path}: has no place for this; put the lines {start.strip()} and {end} there")


def check_place(part, *paths):
    """Refuse pages that `place` would refuse; before hours of runs, not after them."""
    start, end = marks(part)
    for path in paths:
        with in_one_line(f"--page {path}", "name a page of text, or a new one"):
            old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old and end not in old.partition(start)[2] and f"*Written by `{DRIVERS[part]}`" not in old:
            raise no_place(part, path)


def place(part, path, paragraphs):
    """Write a page, or its part on a page that has a place for it; what stands around that is kept. A page without a
    place that somebody else wrote is refused, not overwritten."""
    check_place(part, path)
    old, text = path.read_text(encoding="utf-8") if path.exists() else "", "\n\n".join(paragraphs) + "\n"
    start, end = marks(part)
    before, began, rest = old.partition(start)
    _, ended, after = rest.partition(end)
    if began and ended:
        text = before + start + text + end + after
    path.write_text(text, encoding="utf-8")


def provenance(results, command, root):
    """Where the numbers of a page are from."""
    cfg, seeds = results.cfg, results.seeds
    overlap = sorted(set(seeds) & set(results.tuned_on))
    return markdown([["", ""],
                     ["command", f"`{command}`"],
                     ["seeds", span(seeds) + (f", beside them {span(results.beside.seeds)}" if results.beside else "")
                      + (f"; of these {', '.join(map(str, overlap))} also chose the doses" if overlap else "")],
                     ["settings", f"{cfg.rl_steps} steps of {cfg.batch_size} prompts, "
                      f"K={cfg.group_size}, M={cfg.negatives}, tau={cfg.tau:.3g}, rho={cfg.rho:g}, bait={cfg.bait:g}, "
                      f"{cfg.rl_prompts or 'all'} labelled prompts"],
                     ["test", f"{cfg.eval_prompts} prompts a seed, the same for all methods, beams of width "
                      f"{cfg.beam_width}"],
                     ["machine", "; ".join(results.machines) if len(results.machines) == 1 else
                      ". ".join(f"Seeds {span(of)}: {name}" for name, of in results.machines.items())],
                     ["commit", f"{commit(root)}; code of the runs {results.code[:12]}"],
                     ["run time", f"{results.core_minutes:.0f} core minutes"]], text=2)


INTERVALS = ("Intervals in brackets are 95 % t-intervals over seeds of paired differences (same shop, same prompts); "
             "bold where 0 lies outside. HR, NDCG and hallucination are in percent, their differences in points. "
             "Definitions: [metrics.md](metrics.md). *True utility* is the mean over the first 10 valid beams. "
             "No correction is made for the number of comparisons.")


def page(results, command, root, tables):
    """The paragraphs of docs/results.md about the toy: what was found, verdicts, what D is worth, and the knob."""
    yield "## The toy shop"
    yield ("*Written by `docs/evidence/run.py`; edit that instead.* "
           "Every table and figure of the paper, on a made-up shop whose truth is known ([toy.md](toy.md)), beside "
           "controls that could refute it: supervision alone, continued; gates of equal coverage that admit at "
           "random; a random ranker; and, as ceilings, a gate that knows where the log misleads, and the true utility "
           f"as a reward. All tables: [{tables}]({tables}#the-toy-shop-all-tables).")
    yield provenance(results, command, root)
    yield INTERVALS
    yield "### What it says"
    yield "\n".join(f"* {text}" for text in what_it_says(results))
    yield "### Verdicts"
    yield ("The rule is code (`verdict` in `docs/evidence/arithmetic.py`): a finding is *seen* under a dose rule if "
           "all of its differences, turned so that the claim says \"above 0\", have intervals above 0. *Confirmed*: "
           "seen under every dose rule. *Only at ...*: under that one alone. *The opposite*: an interval below 0. All "
           "at the final checkpoint unless said otherwise.")
    yield table_verdicts(results)
    if results.beside:
        yield "### Do other seeds agree?"
        yield table_sets(results)
        yield from agreement(results)
    yield "### What is D worth?"
    yield ("*R thinned* admits some of those that R admits, chosen at random, as many in each batch as D&R admits "
           "there: beside it, D&R shows what D chooses, at the same dose. *Random at R's rate* admits as many in each "
           "batch as R does, whoever they are: beside it, R shows what R chooses.")
    for rule in results.rules:
        yield worth_of_d(results, rule)
    yield f"Along coverage, {RULES[results.rules[-1]]}:"
    yield table_coverage(results, results.rules[-1])
    yield "![gain in HR@10 over NLL continued, along how many are admitted](evidence/coverage.png)"
    if results.knob:
        yield "### How unevenly can the ranker be trusted?"
        yield (f"`bait` turns clicks away from utility in half of the contexts. Seeds "
               f"{span(results.knob_seeds)}. The oracle gate admits the contexts without bait (at 0, "
               "everyone). Whiskers: 95 %."
               + (f" Lambda was chosen at bait {', '.join(f'{bait:g}' for bait in results.knob_tuned)}; elsewhere "
                  f"that of {results.cfg.bait:g} is used." if "tuned" in results.knob else ""))
        yield "![gain of AdaGRPO over its controls along bait](evidence/knob.png)"


def tables_page(results, command, root, page):
    """The paragraphs of docs/results-tables.md about the toy."""
    yield "## The toy shop: all tables"
    yield f"*Written by `docs/evidence/run.py`; edit that instead.* What they say: [{page}]({page}#the-toy-shop)."
    yield provenance(results, command, root)
    yield INTERVALS
    if results.beside:
        yield f"### Verdicts on seeds {span(results.beside.seeds)}"
        yield table_verdicts(results.beside)
    yield "### Doses"
    if "tuned" in results.rules:
        yield ("The paper compares at equal lambda. But an equal weight is not an equal dose: a gate that admits a "
               f"tenth applies a tenth. So beside it every method gets the dose with the highest HR@10 on validation, "
               f"mean of seeds {', '.join(map(str, results.tuned_on))}, of equally many tried (`dose.json`). What has "
               "no lambda is tuned in its learning rate.")
    else:
        yield "Doses were not chosen on validation: `--tune` has not been run. Only equal lambda is reported."
    yield table_doses(results)
    yield "### Tables 1 to 3: what the ranker does to the truth's rank"
    yield ("Beams of the base policy; the truth is inserted in both pools, as in eq. 6 and 8. Influence is LLM rank − "
           "RM rank. *Random* gives every item a random score: choosing instances by both ranks forces an "
           "influence by itself, and its rows say how much. *Correlation* is Spearman's, of reward and true utility, "
           "over the valid beams of an instance without the truth, averaged: no choice by ranks forces it.")
    for width, n in results.widths.items():
        yield f"**W = {width}**, {n} prompts a seed"
        yield table_influence(results, width)
    for rule in results.rules:
        yield f"### Table 4, {RULES[rule]}: final checkpoint"
        yield table_main(results, rule, "final")
        yield "Differences:"
        yield table_differences(results, rule, "final")
        yield "By context:"
        yield table_contexts(results, rule)
        yield f"### Table 4, {RULES[rule]}: best checkpoint"
        steps = [str(point["step"]) for point in results.arms[rule]["nll"][0]["curve"]]
        yield (f"Of the steps {', '.join(steps)}, the one with the highest HR@10 on validation, for each method and "
               "seed.")
        yield table_main(results, rule, "best")
        yield table_differences(results, rule, "best", ("hr@10", "hallucination"))
        yield f"### Table 5, {RULES[rule]}"
        yield ("Five bins of equally many prompts, by the rank that the base policy gives the truth among its beams; "
               "beyond the beams, by the likelihood that it gives the truth.")
        yield table_bins(results, rule)
        yield f"### Table 6, {RULES[rule]}: a simulated A/B test"
        yield ("In every world users are split at random, and both arms serve in the same period: on each visit of the "
               "test period the first 10 valid beams are shown. A reader clicks with probability sigmoid(true utility "
               f"− {results.world.click_at:g}), the click model of the log without its bait, and stays {DWELL:g} · "
               f"log(1 + exp(true utility − {results.world.click_at:g})) seconds; an effective page view is a click "
               f"with {EFFECTIVE:g} seconds or more. Categories are level-1 codes, counted once per user. What was "
               "shown does not change a user's life. Relative lifts in percent; 95 % normal intervals from the "
               "variance over users, pooled over worlds.")
        yield table_ab(results, rule)
    yield "### Figure 3: training dynamics"
    yield "On validation prompts: mean over seeds, and a 95 % band of the change since the base policy."
    yield "![HR@10, hallucination, click reward and admission over steps, per method](evidence/dynamics.png)"
    if results.knob:
        yield "### How unevenly can the ranker be trusted?"
        for rule in results.knob:
            yield f"HR@10, points, {RULES[rule]}, seeds {span(results.knob_seeds)}:"
            yield table_knob(results, rule)
