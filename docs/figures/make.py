# SPDX-License-Identifier: MIT
"""The gate, looked at: the figures beside this file, and the measured tables of docs/faq.md.

    python docs/figures/make.py                        # everything again: docs/figures/*.png and docs/faq.md
    python docs/figures/make.py --size small --out X   # a toy of the toy, in seconds: X/faq.md and X/figures

Needs the extras nano and evidence. What was computed is kept under --out, in a folder per version of the code: only
drawing is repeated. The figures show the first seed, the tables are over all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import sys
from fractions import Fraction
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "docs" / "evidence"), str(ROOT)]  # measure this checkout, whatever is installed

import numpy as np  # noqa: E402
import probe  # noqa: E402
import report  # noqa: E402
import run as evidence  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from probe import Gate  # noqa: E402

import nanoadagrpo as nano  # noqa: E402

# Okabe and Ito's colours, which colour-blind readers can tell apart; every one comes with a shape or a line of its own.
BLUE, SKY, ORANGE, RED, GREEN, GREY = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "0.75"


def fraction(x):
    return Fraction(x).limit_denominator(10**6)


def default_gate(cfg):
    return Gate(fraction(cfg.tau), fraction(cfg.rho), cfg.negatives, cfg.group_size)


def wording(gate):
    return f"τ {gate.tau}, ρ {float(gate.rho):g}, M {gate.M}, K {gate.K}"


# == The gate as a picture ============================================================================================


def figure_gate(rows, gate, path):
    """Both pools of four prompts of the run: one that is admitted, and one for each reason of clipping."""
    figure = Figure(figsize=(15, 6.6), layout="constrained")
    grid = figure.subplots(2, 4)
    for column, (verdict, prompt) in zip(grid.T, examples(rows, gate).items(), strict=True):
        column[0].set_title(verdict, fontsize=13, color=GREEN if "c = 1" in verdict else "black")
        if prompt is None:
            continue
        K, M = gate.K, gate.M
        valid = rows.valid[prompt, :K]
        pool(column[0], rows.target_logp[prompt], rows.rollout_logp[prompt, :K], valid, [], gate)
        pool(column[1], rows.target_reward[prompt], rows.rewards[prompt, :K], valid,
             rows.negative_rewards[prompt, :M], gate)
    for axes, label in zip(grid[:, 0], ("policy's pool (eq. 6)\nlog-likelihood per token",
                                        "ranker's pool (eq. 8)\nreward"), strict=True):
        axes.set_ylabel(label, fontsize=12)
    for axes in grid[1]:
        axes.set_xlabel("place, 1 is best", fontsize=12)
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=12, frameon=False)
    figure.savefig(path, dpi=100)


def examples(rows, gate):
    """{verdict: the first prompt to show it}. Those full of hallucinations are passed over."""
    D, R = probe.judged(rows, gate)
    nothing = np.full_like(rows.negative_rewards[:, :1], -np.inf)  # a negative that any ranker suppresses
    prominent = probe.judged(rows._replace(negative_rewards=nothing), gate._replace(M=1))[1]
    readable = (rows.valid[:, : gate.K].mean(1) > 2 / 3) & rows.negative_valid[:, : gate.M].all(1)
    verdicts = {"admitted\nD = 1, R = 1, so c = 1": D & R, "clipped: easy\nD = 0, R = 1": ~D & R,
                "clipped: truth not prominent\nD = 1, R = 0": D & ~prominent,
                "clipped: negative too high\nD = 1, R = 0": D & prominent & ~R}
    return {verdict: int(np.argmax(which & readable)) if (which & readable).any() else None
            for verdict, which in verdicts.items()}


def pool(axes, target, rollouts, valid, negatives, gate):
    """One pool, sorted; equal entries side by side, the truth and the negatives first, as their rank says."""
    score = np.concatenate([[target], negatives, rollouts])
    kind = np.concatenate([[0], np.ones(len(negatives)), np.where(valid, 2, 3)])
    order = np.lexsort((kind, -score))
    place = np.empty(len(score))
    place[order] = 1 + np.arange(len(score))
    top, bottom = int(gate.tau * gate.K), int((1 - gate.rho) * gate.K)
    axes.axvspan(0.5, top + 0.5, color=SKY, alpha=0.25, lw=0, label="top τK")
    if len(negatives):
        axes.axvspan(bottom + 0.5, len(score) + 0.5, color=ORANGE, alpha=0.3, lw=0, label="beyond (1−ρ)K")
    for which, style in ((2, dict(marker="o", s=28, color=BLUE, label="rollout")),
                         (3, dict(marker="o", s=28, facecolor="white", edgecolor=BLUE, label="rollout, no item")),
                         (1, dict(marker="v", s=130, color="black", label="negative", zorder=3)),
                         (0, dict(marker="*", s=330, color=RED, label="truth", zorder=4, edgecolor="white"))):
        axes.scatter(place[kind == which], score[kind == which], **style)
    said = f"truth: place {place[0]:.0f} of {len(score)}"
    said += "".join(f"\nnegative: place {at:.0f}" for at in place[1 : 1 + len(negatives)])
    axes.text(0.98, 0.96, said, transform=axes.transAxes, ha="right", va="top", fontsize=11,
              bbox=dict(boxstyle="round", facecolor="white", edgecolor="0.8"))
    low, high = score.min(), score.max()
    axes.set(xlim=(0.5, len(score) + 0.5), ylim=(low - 0.08 * (high - low), high + 0.3 * (high - low)))
    axes.tick_params(labelsize=11)


# == Where the admitted lie ===========================================================================================


def figure_plane(rows, gate, path):
    """Every prompt at the rank of its truth by the policy and by the ranker."""
    import adagrpo_core as core

    K, M = gate.K, gate.M
    D, R = probe.judged(rows, gate)
    x = core.policy_rank(rows.target_logp, rows.rollout_logp[:, :K]).astype(float)
    y = core.reward_ranks(rows.target_reward, rows.rewards[:, :K], rows.negative_rewards[:, :M]).target.astype(float)
    jitter = np.random.default_rng(0)  # ranks are whole: spread them to be seen
    x, y = (rank + jitter.uniform(-0.38, 0.38, rank.shape) for rank in (x, y))
    top = int(gate.tau * K) + 0.5
    figure = Figure(figsize=(12.5, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    left.scatter(x[~(D & R)], y[~(D & R)], s=5, color=GREY, label=f"clipped ({(~(D & R)).mean():.0%})")
    left.scatter(x[D & R], y[D & R], s=14, color=RED, marker="D", label=f"admitted ({(D & R).mean():.1%})")
    for label, which, style in (
            ("trustworthy context", ~rows.misled, dict(color=BLUE, marker="o")),
            ("baited context", rows.misled, dict(color=ORANGE, marker="^", edgecolor="black", lw=0.4))):
        share = (D & R & which).sum() / max(1, (D & R).sum())
        right.scatter(x[D & R & which], y[D & R & which], s=26, label=f"{label} ({share:.0%})", **style)
    for axes, title in ((left, "all prompts"), (right, "the admitted alone")):
        axes.axvline(top, color="black", lw=1)
        axes.axhline(top, color="black", lw=1)
        axes.set_title(title, fontsize=13)
        axes.set_xlabel("policy's rank of the truth: 1 is likeliest", fontsize=12)
        axes.set(xlim=(0.3, K + 1.7), ylim=(K + 1.7 + M, 0.3))
        axes.legend(loc="lower left" if axes is left else "lower right", fontsize=11, framealpha=1)
        axes.tick_params(labelsize=11)
    left.set_ylabel("ranker's rank of the truth: 1 is best", fontsize=12)
    right.text(top / 2, K, "easy", ha="center", fontsize=12)
    right.text((top + K) / 2, K / 2 + 3, "the ranker does not pick the truth out", ha="center", fontsize=12)
    figure.savefig(path, dpi=100)


# == The tree of tokens ===============================================================================================


def tree_of(items, K, seed=0):
    """What is run for K rollouts of a history of so many items: [attention mask (n, seen)] of each pass."""
    sids = [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    cfg = nano.Settings(toy=True, device="cpu", seed=seed, max_history=max(items, 1))
    policy = nano.tiny_policy(nano.Catalogue(sids), cfg)
    plain, calls = policy.forward, []

    def spied(tokens, attention_mask, *others, **more):
        calls.append(attention_mask[0].numpy())
        return plain(tokens, attention_mask, *others, **more)

    policy.forward = spied
    with torch.no_grad():
        prompt = nano.prefill(policy, torch.arange(items)[None])
        nano.tree_decode(policy, prompt, probe.sampled(policy.catalogue.L, 1, K, nano.make_generator(seed, "tree")))
    return calls, policy.catalogue.L


def figure_tree(cfg, history, path):
    items, K = 2, 4
    calls, L = tree_of(items, K)
    T = len(calls[0])
    run_by_tree = sum(map(len, calls))
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    (repeated, tree), (mask, growth) = figure.subplots(2, 2)

    def cell(axes, x, y, text, color, edge="black"):
        axes.add_patch(Rectangle((x - 0.42, y - 0.36), 0.84, 0.72, facecolor=color, edgecolor=edge))
        axes.text(x, y, text, ha="center", va="center", fontsize=11)

    for axes in (repeated, tree):
        axes.set(xlim=(0, T + L + 1.2), ylim=(K + 0.7, 0.2))
        axes.axis("off")
    middle = (K + 1) / 2
    for k in range(1, K + 1):
        for t in range(1, T + 1):
            cell(repeated, t, k, "x", GREY)
        for level in range(1, L + 1):
            cell(repeated, T + level, k, f"s{level}", SKY)
            cell(tree, T + level, k, f"s{level}", SKY if level < L else "white", "black" if level < L else "0.6")
            start = (T + 0.45, middle) if level == 1 else (T + level - 0.56, k)
            tree.plot([start[0], T + level - 0.44], [start[1], k], color="0.4", lw=1, zorder=0)
    for t in range(1, T + 1):
        cell(tree, t, middle, "x", GREY)
    repeated.set_title(f"prompt repeated: {K} rows of {T} + {L}, {K * (T + L)} tokens run", fontsize=13)
    tree.set_title(f"one tree: {T} + {K} · {L - 1}, {run_by_tree} tokens run", fontsize=13)
    tree.text(T / 2, K + 0.1, "x prompt, s Semantic ID\nwhite: sampled, never run", fontsize=11, ha="center")

    shade = np.zeros((run_by_tree, run_by_tree))
    start = 0
    for number, attention_mask in enumerate(calls):
        rows, columns = attention_mask.shape
        shade[start : start + rows, :columns] = attention_mask * (1 if number == 0 else 2)
        start += rows
    colors = np.array([[1, 1, 1], [0.6, 0.6, 0.6], [0.34, 0.71, 0.91]])
    mask.imshow(colors[shade.astype(int)])
    for start in np.cumsum([0, *map(len, calls)])[1:-1]:
        mask.axhline(start - 0.5, color="black", lw=1)
        mask.axvline(start - 0.5, color="black", lw=1)
    mask.set_xticks(np.arange(run_by_tree + 1) - 0.5, minor=True)
    mask.set_yticks(np.arange(run_by_tree + 1) - 0.5, minor=True)
    mask.grid(which="minor", color="0.85", lw=0.5)
    names = ["x"] * T + [f"s{level}" for level in range(1, L) for _ in range(K)]
    mask.set_xticks(range(run_by_tree), names, fontsize=10)
    mask.set_yticks(range(run_by_tree), names, fontsize=10)
    mask.tick_params(which="both", length=0)
    mask.set_title("which token (row) may attend to which (column) in the tree", fontsize=13)

    Ks = np.arange(1, 65)
    for n, style in ((history, "-"), (60, "--")):
        length = n * L + 1
        growth.plot(Ks, Ks * (length + L), style, color=ORANGE, lw=2, label=f"repeated, T = {length}")
        growth.plot(Ks, length + Ks * (L - 1), style, color=BLUE, lw=2, label=f"tree, T = {length}")
    counts = counted(history, cfg.group_size)
    growth.plot(cfg.group_size, counts["tree"], "o", color=BLUE, ms=8)
    growth.plot(cfg.group_size, counts["repeated"], "o", color=ORANGE, ms=8)
    for count in counts.values():
        growth.annotate(f"{count:,}", (cfg.group_size, count), xytext=(8, -14), textcoords="offset points", fontsize=11)
    growth.set_yscale("log")
    growth.set_title("tokens run per prompt", fontsize=13)
    growth.set_xlabel("K, rollouts", fontsize=12)
    growth.legend(fontsize=11)
    growth.grid(alpha=0.3)
    growth.tick_params(labelsize=11)
    figure.savefig(path, dpi=100)


def counted(items, K):
    """Tokens that the model runs for K rollouts of a history of so many items: the tree's are counted, not computed."""
    calls, L = tree_of(items, K)
    return {"repeated": K * (len(calls[0]) + L), "tree": sum(map(len, calls))}


# == Sensitivity ======================================================================================================


def settings(cfg):
    """{wording: Gate}: each knob moved alone, then some together."""
    default = default_gate(cfg)
    third, fifth, tenth = Fraction(1, 3), Fraction(1, 5), Fraction(1, 10)
    moves = [dict(), *(dict(tau=tau) for tau in (tenth, fifth, Fraction(1, 2))),
             *(dict(rho=rho) for rho in (Fraction(1, 20), fifth, Fraction(3, 10), Fraction(1, 2))),
             *(dict(M=M) for M in (2, 4, 8)), *(dict(K=K) for K in (8, 16, 64)),
             dict(M=2, rho=Fraction(3, 10)), dict(M=4, rho=Fraction(1, 2)),
             dict(tau=fifth, M=2, rho=Fraction(3, 10)), dict(tau=fifth, M=4, rho=Fraction(1, 2)),
             dict(tau=tenth, M=4, rho=Fraction(1, 2))]
    symbol = dict(tau="τ", rho="ρ")
    return {", ".join(f"{symbol.get(key, key)} {value if value == third else f'{float(value):g}'}"
                      for key, value in move.items()) or f"default: {wording(default)}": default._replace(**move)
            for move in moves if default._replace(**move) != default or not move}


def figure_sensitivity(passes, cfg, path):
    """Coverage and selectivity when one knob moves; a random ranker beside it."""
    default = default_gate(cfg)
    twentieths = [Fraction(n, 20) for n in range(1, 17)]
    sweeps = {"tau": ("τ", twentieths[1:]), "rho": ("ρ", twentieths),
              "M": ("M", list(range(1, 9))), "K": ("K", [8, 12, 16, 24, 32, 48, 64])}
    figure = Figure(figsize=(15, 6.2), layout="constrained")
    grid = figure.subplots(2, 4, sharey="row")
    everywhere = np.mean([rows.misled.mean() for rows in passes])
    for column, (knob, (symbol, values)) in zip(grid.T, sweeps.items(), strict=True):
        gates = [default._replace(**{knob: value}) for value in values]
        found = [[probe.coverage(rows, gate) for rows in passes] for gate in gates]
        admitted = 100 * np.array([[each["admitted"] for each in row] for row in found])
        chance = [100 * np.mean([each["difficult"] for each in row]) * float(probe.null(gate))
                  for gate, row in zip(gates, found, strict=True)]
        misled = 100 * np.array([[each["misled"] for each in row] for row in found])
        x = [float(value) for value in values]
        for seed, (line, other) in enumerate(zip(admitted.T, misled.T, strict=True)):
            column[0].plot(x, line, "o-", color=BLUE, ms=3, lw=1.2, label=None if seed else "measured, a line per seed")
            column[1].plot(x, other, "s-", color=RED, ms=3, lw=1.2, label=None if seed else "among the admitted")
        column[0].plot(x, chance, "--", color="black", lw=1.5, label="random ranker: D × chance of R")
        column[1].axhline(100 * everywhere, color="black", ls="--", lw=1.5, label="among all prompts")
        for axes in column:
            axes.axvline(float(getattr(default, knob)), color="0.6", lw=6, alpha=0.4, zorder=0)
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=11)
        column[1].set_xlabel(symbol, fontsize=13)
    grid[0, 0].set_ylabel("admitted, % of prompts", fontsize=12)
    grid[1, 0].set_ylabel("baited, %", fontsize=12)
    for line in grid:
        line[0].set_ylim(bottom=0)  # last: the rows share their scale
        line[2].legend(fontsize=11)
    figure.savefig(path, dpi=100)


# == The tables =======================================================================================================


def number(values, scale=100, digits=1):
    """Mean over seeds, and from where to where; nothing where no seed has a value."""
    values = [scale * value for value in values if not np.isnan(value)]
    if not values:
        return ""

    def written(x):
        return f"{round(x, digits) + 0.0:.{digits}f}".replace("-", "−")  # + 0.0: no minus before a zero

    mean = written(np.mean(values))
    return f"{mean} ({written(min(values))} to {written(max(values))})" if len(values) > 1 else mean


def table_knobs(passes, cfg):
    rows = [["setting", "random ranker: R %", "R %", "D %", "admitted %", "baited among them %", "agreement"]]
    for name, gate in settings(cfg).items():
        found = [probe.coverage(each, gate) for each in passes]
        rows.append([name, f"{100 * float(probe.null(gate)):.1f}",
                     *(f"{100 * np.mean([one[key] for one in found]):.1f}" for key in ("reliable", "difficult")),
                     number([one["admitted"] for one in found]), number([one["misled"] for one in found], digits=0),
                     number([one["agreement"] for one in found], 1, 2)])
    rows.append(["everyone admitted", "100", "", "", "100", number([each.misled.mean() for each in passes], digits=0),
                 number([np.nanmean(each.agreement) for each in passes], 1, 2)])
    return report.markdown(rows)


def table_invalid(passes, cfg):
    gate = default_gate(cfg)._replace(M=1)
    found = np.array([list(probe.by_invalid(each, gate)) for each in passes])  # (seeds, counts, 3)
    rows = [["rollouts that are no item, of K", "share of prompts %", "random ranker: R %", "R %",
             "R %, negative is no item"]]
    for v in range(found.shape[1]):
        last = v == found.shape[1] - 1
        chance = "" if last else f"{100 * float(probe.null(gate, v)):.1f}"
        rows.append([f"{v} or more" if last else str(v), f"{100 * found[:, v, 0].mean():.1f}", chance,
                     *(number(found[:, v, i], digits=0) for i in (1, 2))])
    return report.markdown(rows)


def table_lambda(numbers, cfg):
    rows = [["arm", "HR@10 − NLL", "p(click), best of 10, − NLL", "hallucination − NLL", "admitted %",
             "baited among them %"]]
    for row in numbers[0]["doses"]:
        if row != "nll":
            gains = {key: [each["doses"][row][key] - each["doses"]["nll"][key] for each in numbers]
                     for key in ("hr@10", "click_reward@10", "hallucination")}
            name, lam = row.rsplit(" ", 1)
            rows.append([f"`{name}`, λ {float(lam):.3g}", number(gains["hr@10"]),
                         number(gains["click_reward@10"], 1, 3), number(gains["hallucination"]),
                         *(number([each["doses"][row][key] for each in numbers], digits=digits)
                           for key, digits in (("admitted", 1), ("misled", 0)))])
    return report.markdown(rows)


def sentence_invalid(passes, cfg):
    gate, admitted, everyone = default_gate(cfg), [], []
    for rows in passes:
        c, no_item = np.logical_and(*probe.judged(rows, gate)), (~rows.negative_valid[:, : gate.M]).any(1)
        admitted.append(no_item[c].mean() if c.any() else np.nan)
        everyone.append(no_item.mean())
    return (f"A negative that is no item, % of prompts: {number(everyone)} of all, {number(admitted)} of those that "
            "the default setting admits.")


def sentence_drift(passes, numbers, cfg):
    """Does the gate select in training as it does on fresh prompts before it?"""
    row = f"adagrpo {cfg.lam:g}"
    before = [probe.coverage(rows, default_gate(cfg)) for rows in passes]
    after = [one["doses"][row] for one in numbers]
    admitted, misled = ([number([one[key] for one in when], digits=digits) for when in (before, after)]
                        for key, digits in (("admitted", 1), ("misled", 0)))
    return (f"Before training, on fresh prompts, the gate admits {admitted[0]} % of the prompts, and {misled[0]} % of "
            f"these are baited. In training with the default λ the means are {admitted[1]} % and {misled[1]} %.")


def sentence_pulls(numbers):
    gated = [each["pulls"][0] / each["pulls"][1] if each["pulls"][1] else np.nan for each in numbers]
    everyone = [each["pulls"][0] / each["pulls"][2] for each in numbers]
    return (f"At the base policy, the admitted GRPO term pulls as hard as the NLL at λ = {number(gated, 1)}, GRPO for "
            f"everyone at λ = {number(everyone, 1)} (ratio of the median lengths of a batch's gradients).")


def parts(passes, numbers, cfg, command, where):
    """{name of a place in the page: what stands there}."""
    prompts = sum(len(each.misled) for each in passes)
    return {
        "provenance": f"`{command}`; {prompts:,} validation prompts of the toy in all; {where}.",
        "knobs": table_knobs(passes, cfg),
        "invalid": table_invalid(passes, cfg) + "\n\n" + sentence_invalid(passes, cfg),
        "lambda": "\n\n".join([sentence_pulls(numbers), table_lambda(numbers, cfg),
                               sentence_drift(passes, numbers, cfg)]),
    }


def placed(page, found):
    """The page with every part in its place, between <!-- NAME: ... --> and <!-- /NAME -->."""
    for name, text in found.items():
        place = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)", re.S)
        if not place.search(page):
            raise nano.UserError(f"the page has no place for {name}; put <!-- {name}: --> and <!-- /{name} --> in it")
        page = place.sub(lambda match, text=text: match[1] + text + "\n" + match[2], page)
    return page


# == The command line =================================================================================================


def parse(argv):
    parser = argparse.ArgumentParser("make.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--seeds", type=evidence.seed_list, default=[0, 1, 2], help="tuning seeds, such as 0-2")
    add("--size", choices=evidence.SIZES, default="default", help="small: a toy of the toy, to try the script")
    add("--out", type=Path, help="folder of what was computed (default runs/figures)")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/figures") / ("" if args.size == "default" else args.size)
    return args


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(1)
    nano.progress = evidence.plain
    cfg, world, _ = evidence.SIZES[args.size]
    made = json.dumps(evidence.fingerprint(args.size)).encode() + (HERE / "probe.py").read_bytes()
    kept = args.out / hashlib.sha256(made).hexdigest()[:12]
    kept.mkdir(parents=True, exist_ok=True)
    if not (kept / "where.txt").exists():  # drawing again is not measuring again
        (kept / "where.txt").write_text(f"{report.machine()}; commit {report.commit(ROOT)}", encoding="utf-8")
    where = (kept / "where.txt").read_text(encoding="utf-8")
    passes, numbers = [], []
    for seed in args.seeds:
        folder = kept / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        rows, found = probe.one_seed(dataclasses.replace(cfg, seed=seed), world, folder)
        passes.append(rows)
        numbers.append(found)

    default = args.size == "default"
    figures = HERE if default else args.out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    gate = default_gate(cfg)
    figure_gate(passes[0], gate, figures / "gate.png")
    figure_plane(passes[0], gate, figures / "plane.png")
    figure_tree(cfg, world.history, figures / "tree.png")
    figure_sensitivity(passes, cfg, figures / "sensitivity.png")
    command = f"python docs/figures/make.py --seeds {evidence.seeds_text(args.seeds)}"
    page = ROOT / "docs/faq.md"
    text = placed(page.read_text(encoding="utf-8"), parts(passes, numbers, cfg, command, where))
    target = page if default else args.out / "faq.md"
    target.write_text(text, encoding="utf-8")
    print(f"figures: {figures}\npage: {target}")
    return passes, numbers


if __name__ == "__main__":
    main()
