# SPDX-License-Identifier: MIT
"""Does the gate help on your data? Every method at a lambda of its own, chosen on validation, beside its controls.

    python docs/evidence/tuned.py --data DIR --out OUT --tuning 0-2 --seeds 100-109 [flags of nanoadagrpo.py]

First, on the seeds of --tuning, each method is trained at each of LAMBDAS; the one with the best HR@10 on all
validation prompts is its dose. Then, on --seeds, every method is trained at its dose, and beside it a gate that admits
as many at random, at the same dose; all are judged on all test prompts. The result goes to OUT/report.md.

A flag of nanoadagrpo.py that is not decided here (--constrained, --rho, --lr ...) holds for all runs. Needs the extras
nano and evidence. What was interrupted goes on where it stopped: the unit of work is one arm on one seed, a JSON file
under OUT.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch; jobs are processes, each on one core
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]  # measure this checkout, whatever else is installed

import measure  # noqa: E402
import numpy as np  # noqa: E402
import run  # noqa: E402
import torch  # noqa: E402
from arithmetic import choose_dose  # noqa: E402
from real_report import interval  # noqa: E402
from report import commit, machine, markdown, number, signed  # noqa: E402

import nanoadagrpo as nano  # noqa: E402
from nanoadagrpo import UserError  # noqa: E402

LAMBDAS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TUNED = ("grpo+nll", "adagrpo-d", "adagrpo-r", "adagrpo", "random-gate")
CONTROLS = {  # as many as R, or D, admits of the batch, chosen at random
    "random-r": nano.Method(True, measure.random_at_r),
    "random-d": nano.Method(True, lambda hard, clear, *rest: measure.random_at_r(hard, hard, *rest))}
CONTROL_OF = {"adagrpo": "random-gate", "adagrpo-r": "random-r", "adagrpo-d": "random-d"}
TITLES = {"base": "base", "nll": "NLL continued", "grpo+nll": "GRPO+NLL", "adagrpo-d": "D", "adagrpo-r": "R",
          "adagrpo": "AdaGRPO D&R", "random-gate": "random gate", "random-r": "random at R's rate",
          "random-d": "random at D's rate"}
DECIDED = ("toy", "seed", "method", "lam", "out", "resume", "keep", "eval_prompts", "device")  # here, not by flags


class Arm(NamedTuple):
    """One training run; the base policy and NLL continued have no lambda."""

    name: str
    lam: float = 0.0

    @property
    def label(self):
        return self.name + (f"_lam{self.lam:g}" if self.lam else "")

    @property
    def title(self):
        return TITLES[self.name] + (f" (λ {self.lam:g})" if self.lam else "")


class Setup(NamedTuple):
    """What all arms of a seed share."""

    cfg: nano.Settings
    data: nano.Data
    ranker: nano.Ranker
    reward: object
    policy: nano.Policy
    base: dict  # the policy's weights after the supervised steps


@functools.lru_cache(1)
def prepare(cfg, folder):
    """Data, ranker, and the base policy: read from `folder`, or trained and kept there."""
    data, path = nano.load_data(cfg.data, cfg), folder / "base-policy.npz"
    ranker = nano.train_ranker(data.catalogue, data.log, cfg)
    reward = functools.partial(nano.own_reward, cfg, []) if cfg.reward else nano.make_reward(ranker, cfg)
    policy = (nano.pretrained_policy if cfg.model else nano.tiny_policy)(data.catalogue, cfg)
    if path.exists():
        measure.load_weights(policy, path)
    else:
        nano.train_sft(policy, data.sft, cfg, lambda **row: None)
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        measure.save_weights(policy, part)
        part.replace(path)
    return Setup(cfg, data, ranker, reward, policy, copy.deepcopy(policy.model.state_dict()))


def run_arm(setup, arm, tuning):
    """Train one arm. Returns what goes into its JSON, and its arrays. Tuning looks at nothing but validation."""
    rows, cfg = [], dataclasses.replace(setup.cfg, lam=arm.lam)
    setup.policy.model.load_state_dict(setup.base)
    if arm.name != "base":
        with mock.patch.dict(nano.METHODS, CONTROLS):
            nano.train_rl(setup.policy, setup.reward, setup.data.rl, cfg, arm.name, lambda **row: rows.append(row))
    prompts = setup.data.valid if tuning else setup.data.test
    metrics, each = nano.evaluate(setup.policy, setup.ranker, prompts, cfg)
    admitted = float(np.mean([row["admitted"] for row in rows])) if arm.lam else float("nan")
    return {**arm._asdict(), "admitted": admitted, **metrics}, {"rank": each["rank"].numpy()}


def one_seed(cfg, out, seed, arms, tuning):
    """Whatever of this seed is not there yet."""
    torch.set_num_threads(1)
    nano.progress = run.plain
    for arm in arms:
        path = run.unit_file(out, seed, arm.label)
        if path.exists():
            continue
        began = time.process_time()
        setup = prepare(dataclasses.replace(cfg, seed=seed), out / f"seed-{seed}")  # once
        found, arrays = run_arm(setup, arm, tuning)
        measure.save(path.with_suffix(".npz"), arrays)
        found |= {"seed": seed, "core_seconds": time.process_time() - began}
        run.write(path, json.dumps(found, indent=1))  # last: its presence means done
        print(f"seed {seed}: {path.stem}, {found['core_seconds']:.0f} s", flush=True)


def units(args, cfg, out, seeds, arms, tuning=False):
    """{arm: [unit of each seed]}, made where they are not there yet."""
    tasks = [(cfg, out, seed, arms, tuning) for seed in seeds]
    if args.jobs:
        run.side_by_side(one_seed, tasks, args.jobs)
    else:
        for task in tasks:
            one_seed(*task)
    return {arm: [run.load(out, seed, arm.label) for seed in seeds] for arm in arms}


# == The report =======================================================================================================


def values(found, arm):
    """{metric: (seeds, prompts)} in percent."""
    rank = np.stack([unit["arrays"]["rank"] for unit in found[arm]]).astype(float)
    return {"HR@10": 100.0 * (rank <= 10), "HR@50": 100.0 * (rank <= 50),
            "NDCG@10": 100.0 * np.where(rank <= 10, 1 / np.log2(1.0 + rank), 0.0)}


def table_doses(tried):
    """HR@10 on validation; the dose in bold."""
    rows = [["λ", *(f"{lam:g}" for lam in LAMBDAS)]]
    for name, trials in tried.items():
        dose, cells = choose_dose(trials), {lam: f"{100 * np.mean(trials[lam]):.2f}" for lam in LAMBDAS}
        rows.append([TITLES[name], *(f"**{x}**" if lam == dose else x for lam, x in cells.items())])
    return markdown(rows)


def table_arms(found):
    rows = [["", "HR@10 %", "HR@50 %", "NDCG@10 %", "admitted %"]]
    for arm, of_seeds in found.items():
        means = [number(x.mean()) for x in values(found, arm).values()]
        rows.append([arm.title, *means, number(np.mean([unit["admitted"] for unit in of_seeds]), 100, 1)])
    return markdown(rows)


def table_differences(found, pairs):
    rows = [["difference, points", "HR@10", "HR@50", "NDCG@10"]]
    for a, b in pairs:
        x, y = values(found, a), values(found, b)
        rows.append([f"{a.title} − {b.title}", *(signed(interval(x[key] - y[key])) for key in x)])
    return markdown(rows)


def paragraphs(args, cfg, made, tried, found, pairs):
    flags = [f"{nano.to_flag(name)} {x}" for name, x in dataclasses.asdict(cfg).items()
             if x != getattr(nano.Settings, name) and name not in (*DECIDED, "data")]
    command = " ".join(["python docs/evidence/tuned.py --data DIR --out OUT",
                        f"--tuning {run.seeds_text(args.tuning)} --seeds {run.seeds_text(args.seeds)}", *flags])
    minutes = sum(unit["core_seconds"] for of_seeds in found.values() for unit in of_seeds) / 60
    rows, prompts = next(iter(found.values()))[0]["arrays"]["rank"].shape[0], "test prompts"
    yield f"`{command.replace(' True', '')}`"
    yield (f"Seeds {run.seeds_text(args.seeds)}, all {rows} {prompts}; {machine()}; commit {commit(ROOT)}; code of the "
           f"runs {made['code'][:12]}; {minutes:.0f} core minutes without tuning.")
    yield f"HR@10 % on all validation prompts, mean of seeds {run.seeds_text(args.tuning)}; bold: chosen."
    yield table_doses(tried)
    yield "On the test prompts:"
    yield table_arms(found)
    yield ("Paired differences, with 95 % intervals over prompts and seeds; bold where 0 lies outside. No correction "
           "is made for the number of comparisons.")
    yield table_differences(found, pairs)


# == The command line =================================================================================================


def parse(argv):
    parser = argparse.ArgumentParser("tuned.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", required=True, help="folder as docs/data.md has it")
    add("--out", type=Path, required=True, help="folder of the finished units and the report")
    add("--tuning", type=run.seed_list, default=[0, 1, 2], help="seeds that choose the doses (default 0-2)")
    add("--seeds", type=run.seed_list, required=True, help="seeds that are reported, such as 100-109")
    add("--jobs", type=int, default=1, help="seeds at a time, each on one core; 0: all in this process")
    args, flags = parser.parse_known_args(argv)
    if not args.tuning or not args.seeds or set(args.tuning) & set(args.seeds):
        raise UserError("--tuning, --seeds: name seeds for each, and none in both")
    cfg = nano.parse(["--data", args.data, "--device", "cpu", *flags])
    for name in DECIDED[:-1]:
        if getattr(cfg, name) != getattr(nano.Settings, name):
            raise UserError(f"{nano.to_flag(name)}: decided by tuned.py; leave it out")
    return args, cfg


def main(argv=None):
    try:
        args, cfg = parse(argv)
        files = sorted(path for path in Path(cfg.data).iterdir() if path.is_file())
        content = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        made = {"settings": dataclasses.asdict(cfg) | {"data": ""}, "data": content,
                "code": run.code_of("tuned.py", "measure.py", "arithmetic.py")}
        run.same_origin(args.out, made)
        grid = [Arm(name, lam) for name in TUNED for lam in LAMBDAS]
        trials = units(args, cfg, args.out / "tuning", args.tuning, grid, tuning=True)
        tried = {name: {arm.lam: [unit["hr@10"] for unit in of_seeds] for arm, of_seeds in trials.items()
                        if arm.name == name} for name in TUNED}
        at = {name: Arm(name, choose_dose(tried[name])) for name in TUNED}
        control = {name: Arm(other, at[name].lam) for name, other in CONTROL_OF.items()}
        base, nll = Arm("base"), Arm("nll")
        arms = list(dict.fromkeys([base, nll, *at.values(), *control.values()]))
        pairs = [(nll, base), (at["grpo+nll"], nll)]
        for name in CONTROL_OF:
            pairs += [(at[name], nll), (at[name], control[name]), (at[name], at["grpo+nll"])]
        pairs.append((at["adagrpo"], at["random-gate"]))
        found = units(args, cfg, args.out, args.seeds, arms)
        text = "\n\n".join(paragraphs(args, cfg, made, tried, found, list(dict.fromkeys(pairs))))
        run.write(args.out / "report.md", text)
        print(text)
        return found
    except (UserError, OSError) as error:
        print(f"tuned.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
