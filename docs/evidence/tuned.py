# SPDX-License-Identifier: MIT
"""Does the gate help on your data? Every method at a lambda of its own, chosen on validation, beside its controls.

    python docs/evidence/tuned.py --data DIR --out OUT --tuning 0-2 --seeds 100-109 [flags of nanoadagrpo.py]

First, on the seeds of --tuning, each method is trained at each of LAMBDAS; the one with the best HR@10 on all
validation prompts is its dose. Then, on --seeds, every method is trained at its dose; and beside each gate, at the same
dose, one that admits at each step as many at random. All are judged on all test prompts. The result goes to
OUT/report.md, or to its place on --page.

A flag of nanoadagrpo.py that is not decided here (--constrained, --rho, --lr ...) holds for all runs. Needs the extras
nano and evidence. What was interrupted goes on where it stopped: the unit of work is one arm on one seed, a JSON file
under OUT.
"""

from __future__ import annotations

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
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
import tuned_report  # noqa: E402
from arithmetic import choose_dose  # noqa: E402
from report import check_place, marks, no_place  # noqa: E402

import nanoadagrpo as nano  # noqa: E402
from nanoadagrpo import UserError  # noqa: E402

LAMBDAS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TUNED = ("grpo+nll", "adagrpo-d", "adagrpo-r", "adagrpo", "random-gate")
CONTROL_OF = {"adagrpo": "as-adagrpo", "adagrpo-r": "as-r", "adagrpo-d": "as-d"}  # gate -> at random, as many
GATE_OF = {control: gate for gate, control in CONTROL_OF.items()}
# What is decided here, and what has nothing to do here.
DECIDED = ("toy", "seed", "method", "lam", "grpo_lr", "bait", "out", "resume", "keep", "eval_prompts", "eval_every",
           "save_every", "device")


class Arm(NamedTuple):
    """One training run; the base policy and NLL continued have no lambda."""

    name: str
    lam: float = 0.0

    @property
    def label(self):
        return self.name + (f"_lam{self.lam:g}" if self.lam else "")


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
    data = nano.load_data(cfg.data, cfg)
    ranker = nano.train_ranker(data.catalogue, data.log, cfg)
    reward = functools.partial(nano.own_reward, cfg, []) if cfg.reward else nano.make_reward(ranker, cfg)
    policy = (nano.pretrained_policy if cfg.model else nano.tiny_policy)(data.catalogue, cfg)
    measure.load_or_train(policy, data, cfg, folder / "base-policy.npz")
    return Setup(cfg, data, ranker, reward, policy, copy.deepcopy(policy.model.state_dict()))


def as_many(counts):
    """A gate that admits at each step as many as another run did, chosen at random."""
    left = iter(counts.tolist())

    def admit(difficult, reliable, batch, generator):
        order = torch.randperm(len(difficult), generator=generator)
        return torch.zeros_like(difficult).index_fill(0, order[: next(left)], True)

    return admit


def run_arm(setup, arm, tuning, counts=None):
    """Train one arm. Returns what goes into its JSON, and its arrays. Tuning looks at nothing but validation.

    counts: of the gate that a control stands beside, how many it admitted at each step.
    """
    rows, cfg, controls = [], dataclasses.replace(setup.cfg, lam=arm.lam), {}
    setup.policy.model.load_state_dict(setup.base)
    if counts is not None:
        controls[arm.name] = nano.Method(True, as_many(counts))
    if arm.name != "base":
        with mock.patch.dict(nano.METHODS, controls):
            nano.train_rl(setup.policy, setup.reward, setup.data.rl, cfg, arm.name, lambda **row: rows.append(row))
    prompts = setup.data.valid if tuning else setup.data.test
    metrics, each = nano.evaluate(setup.policy, setup.ranker, prompts, cfg)
    shares = np.array([float(row["admitted"]) for row in rows if "admitted" in row])
    arrays = {"rank": each["rank"].numpy(), "admitted": np.rint(shares * cfg.batch_size).astype(int)}
    return {**arm._asdict(), "admitted": float(shares.mean()) if len(shares) else float("nan"), **metrics}, arrays


def one_seed(cfg, out, seed, arms, tuning):
    """Whatever of this seed is not there yet."""
    torch.set_num_threads(1)
    nano.progress = run.plain
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for arm in arms:
        path = run.unit_file(out, seed, arm.label)
        if path.exists():
            continue
        began = time.process_time()
        setup, counts = prepare(dataclasses.replace(cfg, seed=seed), out / f"seed-{seed}"), None  # once
        if arm.name in GATE_OF:
            counts = run.load(out, seed, arm._replace(name=GATE_OF[arm.name]).label)["arrays"]["admitted"]
        found, arrays = run_arm(setup, arm, tuning, counts)
        measure.save(path.with_suffix(".npz"), arrays)
        found |= {"seed": seed, "core_seconds": time.process_time() - began}
        run.write(path, json.dumps(found, indent=1))  # last: its presence means done
        print(f"seed {seed}: {path.stem}, {found['core_seconds']:.0f} s", flush=True)


def units(args, cfg, out, seeds, arms, tuning=False):
    """{arm: [unit of each seed]}, made where they are not there yet."""
    run.side_by_side(one_seed, [(cfg, out, seed, arms, tuning) for seed in seeds], args.jobs)
    return {arm: [run.load(out, seed, arm.label) for seed in seeds] for arm in arms}


# == The command line =================================================================================================


def parse(argv):
    parser = nano.Parser("tuned.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", required=True, help="folder as docs/data.md has it")
    add("--out", type=Path, required=True, help="folder of the finished units and the report")
    add("--tuning", type=run.seed_list, default=[0, 1, 2], help="seeds that choose the doses (default 0-2)")
    add("--seeds", type=run.seed_list, required=True, help="seeds that are reported, such as 100-109")
    add("--page", type=Path, help="a page that has a place for the result (default OUT/report.md)")
    add("--jobs", type=run.job_count, default=1, help="seeds at a time, each on one core; 0: all in this process")
    args, args.flags = parser.parse_known_args(argv)
    check_place("tuned", args.page or args.out / "report.md")  # before hours of runs, not after them
    if args.page and not (args.page.is_file() and marks("tuned")[0] in args.page.read_text(encoding="utf-8")):
        raise no_place("tuned", args.page)
    args.page, both = args.page or args.out / "report.md", args.tuning + args.seeds
    if not args.tuning or not args.seeds or len(set(both)) < len(both):
        raise UserError("--tuning, --seeds: name seeds for each, each seed once")
    for name in sorted({flag.split("=")[0] for flag in args.flags} & set(map(nano.to_flag, DECIDED))):
        raise UserError(f"{name}: decided by tuned.py, or without effect here; leave it out")
    cfg = nano.parse(["--data", args.data, "--device", "cpu", *args.flags])
    if cfg.beam_width < 10:
        raise UserError("--beam-width: HR@10 chooses the doses, and needs 10 or more beams")
    return args, cfg


def origin(cfg):
    """What the units depend on: settings, data, and the code that makes them."""
    content = hashlib.sha256()
    for path in sorted(path for path in Path(cfg.data).iterdir() if path.is_file()):
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    return {"settings": dataclasses.asdict(cfg) | {"data": ""}, "data": content.hexdigest(),
            "code": run.code_of("tuned.py", "measure.py", "arithmetic.py")}


def compare(args, cfg):
    data = nano.load_data(cfg.data, cfg)  # what is wrong with it, or with the reward, is said first
    if cfg.reward:
        item = F.pad(data.rl.target[:2][:, None], (0, 1), value=-1)
        nano.own_reward(cfg, [], data.rl.history[:2], item)
    made = origin(cfg)
    run.same_origin(args.out, made)
    grid = [Arm(name, lam) for name in TUNED for lam in LAMBDAS]
    trials = units(args, cfg, args.out / "tuning", args.tuning, grid, tuning=True)
    tried = {name: {lam: [unit["hr@10"] for unit in trials[Arm(name, lam)]] for lam in LAMBDAS} for name in TUNED}
    at = {name: Arm(name, choose_dose(tried[name])) for name in TUNED}
    control = {name: Arm(other, at[name].lam) for name, other in CONTROL_OF.items()}
    base, nll = Arm("base"), Arm("nll")
    arms = [base, nll, *at.values(), *control.values()]  # a control after its gate
    pairs = [(nll, base), (at["grpo+nll"], nll)]
    for name in CONTROL_OF:
        pairs += [(at[name], other) for other in (nll, control[name], at["random-gate"], at["grpo+nll"])]
    found = units(args, cfg, args.out, args.seeds, arms)
    tuned_report.write_page(args, made["code"][:12], tried, found, pairs)
    return found


def main(argv=None):
    try:
        return compare(*parse(argv))
    except (UserError, OSError) as error:
        print(f"tuned.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
