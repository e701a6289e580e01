# SPDX-License-Identifier: MIT
"""Runs of the script, on your data or the toy, one per seed, as one table: mean and spread, and two simple yardsticks.

    python nanoadagrpo.py --data DIR --method all --seed S --out sS ...   # for several seeds, all else equal
    python docs/evidence/compare.py s0 s1 s2
    python docs/evidence/compare.py s0 s1 s2 --figure curve.png    # and the runs along their steps
    python docs/evidence/compare.py s0 s1 s2 --data DIR    # where the data are not where they were

The yardsticks are popularity, and the ranker alone over the whole catalogue. They serve the same test prompts, and
neither can hallucinate; neither needs a policy. What a run was given is read from its config.json. A folder of data
that is named there without its full path is looked for where this program is started.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]  # measure this checkout, whatever else is installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.backend_bases import FigureCanvasBase  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import nanoadagrpo as nano  # noqa: E402

COLOURS = {"nll": "0.35", "grpo": "C4", "grpo+nll": "C1", "adagrpo-d": "C2", "adagrpo-r": "C5", "adagrpo": "C0",
           "random-gate": "C3", "oracle-gate": "C8"}  # of the report's figures too


def data_of(cfg):
    if cfg.toy:
        return nano.toy_world(cfg)
    with nano.in_one_line("data of the runs", "if they have moved, name them by --data"):
        return nano.load_data(cfg.data, cfg)


def popularity(data):
    """How often an item was bought in the training rows; ties go to the one that the catalogue names first."""
    count = torch.bincount(data.sft.target, minlength=data.catalogue.N).float()
    return lambda history: count.expand(len(history), -1)


def ranker_alone(data, cfg):
    """The reward of every item of the catalogue."""
    reward = nano.make_reward(nano.train_ranker(data.catalogue, data.log, cfg), cfg)
    item = torch.arange(data.catalogue.N, device=cfg.device)
    return lambda history: reward(history, item.expand(len(history), -1))


@torch.no_grad()
def serve(score, prompts, batch=100):
    """{metric: mean over prompts} when all N items are served in the order of score(history) (n, N)."""
    ranks = []
    for rows in torch.arange(len(prompts.target)).split(batch):
        part = prompts.rows(rows)
        scores = score(part.history)
        order = scores.argsort(dim=1, descending=True, stable=True)
        ranks.append((order == part.target.unsqueeze(1)).int().argmax(1) + 1)
    rank = torch.cat(ranks)
    found = {f"hr@{k}": (rank <= k).float().mean().item() for k in (1, 10, 50)}
    return found | {"ndcg@10": torch.where(rank <= 10, 1 / torch.log2(1.0 + rank), 0.0).mean().item()}


def read(run, data=""):
    """(settings, lines of metrics.jsonl) of a run, be it complete or not. `data`: where its data are now."""
    with nano.in_one_line(run, "name folders that nanoadagrpo.py wrote"):
        cfg = nano.Settings(**json.loads((run / "config.json").read_text()) | {"device": "cpu"})
        if data and not cfg.toy:
            cfg = dataclasses.replace(cfg, data=data)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        if not all(isinstance(line, dict) and is_ours(line) for line in lines):
            raise ValueError("metrics.jsonl is of another program")
        return cfg, lines


def is_ours(line):
    keys = ["phase", "method"] if line.get("phase") in ("valid", "test") else ["phase"]
    return all(isinstance(line.get(key), str) for key in keys)


def tested(lines):
    """{method: its line}, of the methods that a run has tested."""
    return {line["method"]: line for line in lines if line["phase"] == "test"}


def check_alike(runs, found):
    """Runs of other settings, or one twice, would give a mean and a spread that mean nothing; an unfinished one,
    differences to another run's NLL. `found` is what `read` gives of each."""
    free = "seed", "out", "resume", "save_every"  # whatever device they were run on
    each = [dataclasses.asdict(cfg) | {"data": Path(cfg.data).resolve()} for cfg, _ in found]
    for run, cfg, (_, lines) in zip(runs, each, found, strict=True):
        if other := [nano.to_flag(key) for key, x in cfg.items() if x != each[0][key] and key not in free]:
            moved = "; if these are the same data, name them by --data" * (other == ["--data"])
            raise nano.UserError(f"{run}: {', '.join(other)} are not as in {runs[0]}; runs may differ in their seeds"
                                 + moved)
        if tested(lines).keys() != tested(found[0][1]).keys():
            raise nano.UserError(f"{run}: other methods were tested than in {runs[0]}; let both runs end")
        if len(lines) != len(found[0][1]):
            raise nano.UserError(f"{run}: has logged more or fewer steps than {runs[0]}; let both runs end")
    seeds = [cfg["seed"] for cfg in each]
    if len(set(seeds)) < len(seeds):
        raise nano.UserError(f"a seed is there twice: {', '.join(map(str, seeds))}; name one run of each")


def check_data(run, cfg, n):
    """Another shop of the same name would give yardsticks that mean nothing. Its report says how much a run tested;
    n: how many prompts there are."""
    report = run / "report.md"
    said = re.search(r"^(\d+) test prompts", report.read_text(encoding="utf-8"), re.M) if report.is_file() else None
    if said and int(said[1]) != n:
        raise nano.UserError(f"{run}: was tested on {said[1]} prompts, and {cfg.data or 'the toy'} has {n}; "
                             "name the data of the run by --data")


COLUMNS = {"HR@1 %": "hr@1", "HR@10 %": "hr@10", "HR@50 %": "hr@50", "NDCG@10 %": "ndcg@10",
           "halluc. %": "hallucination", "sampled %": "sampled_hallucination", "admitted %": "admitted"}


def collect(runs, found):
    """{row: [{metric: value} of each run]}: the methods in the order of the runs, then the yardsticks."""
    rows = {}
    for run, (cfg, lines) in zip(runs, found, strict=True):
        data = data_of(cfg)
        test = nano.subset(data.test, cfg.eval_prompts, cfg.seed, "test")
        check_data(run, cfg, len(test.target))
        yardsticks = {"popularity": serve(popularity(data), test),
                      "ranker alone": serve(ranker_alone(data, dataclasses.replace(cfg, reward="")), test)}
        for name, metrics in (tested(lines) | yardsticks).items():
            rows.setdefault(name, []).append(metrics)
    return rows


def table(rows):
    """Markdown: mean ± standard deviation over the runs; last, HR@10 against NLL's of the same run."""
    def cell(values, sign=""):
        if any(value is None for value in values):
            return ""
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        return f"{np.mean(values):{sign}.2f}{spread}"

    lines = ["| | " + " | ".join(COLUMNS) + " | HR@10 − NLL |", "| --- |" + " ---: |" * (len(COLUMNS) + 1)]
    for name, found in rows.items():
        cells = [cell([100 * one[key] if key in one else None for one in found]) for key in COLUMNS.values()]
        pairs = zip(found, rows.get("nll", []), strict=False)
        cells.append(cell([100 * (one["hr@10"] - nll["hr@10"]) for one, nll in pairs], "+") if "nll" in rows else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(lines, n):
    """Training NLL along the supervised steps (steps, values), and {method: (steps, HR@10 in %, standard errors)} of
    n validation prompts."""
    losses = [line for line in lines if line["phase"] == "sft"]
    width = max(1, len(losses) // 40)  # one batch says little
    smooth = [np.mean([line["nll"] for line in losses[i : i + width]]) for i in range(0, len(losses), width)]
    methods = {}
    for name in dict.fromkeys(line["method"] for line in lines if line["phase"] == "valid"):
        points = [line for line in lines if line["phase"] == "valid" and line["method"] == name]
        share = np.array([point["hr@10"] for point in points])
        methods[name] = [point["step"] for point in points], 100 * share, 100 * (share * (1 - share) / n) ** 0.5
    return ([line["step"] for line in losses[::width]], smooth), methods


def over_runs(each):
    """The curves of several runs as one: means over runs. Runs start at different levels, which is not the methods'
    doing: the bars are the standard deviation of the change since the start. Of one run they are as they were."""
    if len(each) == 1:
        return each[0]
    steps, values = zip(*(losses for losses, _ in each), strict=True)
    methods = {}
    for name, (x, *_) in each[0][1].items():
        hits = np.array([found[name][1] for _, found in each])
        methods[name] = x, hits.mean(0), (hits - hits[:, :1]).std(0, ddof=1)
    return (steps[0], np.mean(values, 0)), methods


def draw(found, path):
    """Left the supervised steps, right the methods from there on."""
    cfg = found[0][0]
    n = min(-(-cfg.eval_prompts // 4), len(data_of(cfg).valid.target))
    losses, methods = over_runs([curves(lines, n) for _, lines in found])
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*losses, "k-")
    left.set(title=f"training NLL, supervised steps of {cfg.sft_batch_size}", xlabel="step", ylabel="nats per token")
    for i, (name, (steps, values, errors)) in enumerate(methods.items()):
        x = np.array(steps) + (i - len(methods) / 2) * max(steps) / 200  # bars side by side
        right.errorbar(x, values, errors, fmt="o-", label=name, color=COLOURS[name], capsize=2, ms=4)
    right.set(title=f"then RL: HR@10 on {n} validation prompts", xlabel="step", ylabel="%")
    figure.legend(fontsize=9, loc="outside right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def compare(args):
    kinds = FigureCanvasBase.get_supported_filetypes()
    if args.figure and (args.figure.is_dir() or not args.figure.parent.is_dir()
                        or args.figure.suffix[1:].lower() not in kinds):
        raise nano.UserError(f"--figure {args.figure}: needs a folder that exists, and an ending such as .png")
    found = [read(run, args.data) for run in args.runs]
    check_alike(args.runs, found)
    if args.data and found[0][0].toy:
        raise nano.UserError(f"--data {args.data}: these are runs of the toy; leave it out")
    if not (args.figure or tested(found[0][1])):
        raise nano.UserError(f"{args.runs[0]}: nothing was tested so far; let the run end")
    rows = collect(args.runs, found)
    print(table(rows))
    if args.figure:
        draw(found, args.figure)
    return rows


def main(argv=None):
    parser = nano.Parser("compare.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that nanoadagrpo.py wrote")
    parser.add_argument("--figure", type=Path, help="draw the runs' curves into this file")
    parser.add_argument("--data", type=os.path.expanduser, default="",  # --data=~/x: no shell does it there
                        help="the folder of the runs' data, if it is not where it was")
    try:
        return compare(parser.parse_args(argv))
    except (nano.UserError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
