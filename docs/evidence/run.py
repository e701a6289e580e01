# SPDX-License-Identifier: MIT
"""The evidence: every method and control on the toy, seed by seed, and the pages that report them.

    python docs/evidence/run.py --tune --seeds 0,1 --baits 1      # once: doses -> docs/evidence/dose.json
    python docs/evidence/run.py --tune --seeds 0,1 --baits 1 --arms r-thinned   # of this arm; the others' doses stay
    python docs/evidence/run.py --seeds 100-109 --jobs 2          # docs/results.md, results-tables.md, figures
    python docs/evidence/run.py --seeds 0,1 --size small --out X  # a toy of the toy, in a minute: X/results.md

Needs the extras nano and evidence. What was interrupted goes on where it stopped: the unit of work is one arm on one
seed, kept as a JSON file (and arrays beside it) under --out. Two dose rules: "equal" gives every method the default
lambda; "tuned" gives each method what --tune found best for it on validation, with the same number of trials for each.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch; jobs are processes, each on one core
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]  # measure this checkout, whatever else is installed

import measure  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
import torch  # noqa: E402
from arithmetic import choose_dose  # noqa: E402
from measure import ARMS, KNOB_ARMS, Arm  # noqa: E402

import nanoadagrpo as nano  # noqa: E402
from nanoadagrpo import UserError  # noqa: E402

# Doses tried by --tune: lambda, or for what has none (nll, grpo) as many multiples of its learning rate.
LAMBDAS = (0.3, 1.0, 5.0, 15.0)
RATES = (0.25, 0.5, 1.0, 2.0)
BAITS = (0.0, 0.25, 0.5, 0.75, 1.0)
# The file of doses: tables of bait -> arm -> what was chosen, what was tried, and by which code (see `fingerprint`).
VALIDATION = "validation HR@10 %"
NO_DOSES = {"seeds": [], "doses": {}, VALIDATION: {}, "code": {}}

# Beam width -> prompts of Tables 1 to 3, which describe and do not compare.
SIZES = {
    "default": (nano.Settings(toy=True, device="cpu", eval_prompts=6000), nano.World(), {"50": 2000, "128": 1000}),
    "small": (nano.Settings(toy=True, device="cpu", eval_prompts=40, sft_steps=20, sft_batch_size=32, sft_lr=1e-2,
                            rl_steps=2, batch_size=8, group_size=12, rl_prompts=60, beam_width=50, eval_every=1),
              nano.World(codes=6, items=60, users=60, impressions=8), {"50": 40, "128": 20}),
}


# == The plan: which arms, at which dose ==============================================================================


def dose(cfg, doses, rule, name, bait):
    """The arm of this name under this rule. Where a bait was not tuned for, the doses of the default bait serve."""
    method = ARMS[name][0]
    rate = cfg.grpo_lr if method == "grpo" else cfg.lr
    arm = Arm(name, cfg.bait if name == "nll" else bait, cfg.lam, rate)  # nll never sees the ranker
    if rule == "tuned":
        tuned = doses.get(f"{arm.bait:g}", {})
        arm = arm._replace(**tuned.get(name, doses[f"{cfg.bait:g}"][name]))
    return arm


def plan(cfg, doses, rules, knob_rules, seeds, knob_seeds):
    """{seed: {(arm, scope), ...}}; an arm that two rules share is run once."""
    work = {seed: {} for seed in seeds}
    for seed in seeds:
        for rule in rules:
            for name in ARMS:
                work[seed][dose(cfg, doses, rule, name, cfg.bait)] = "full"
        for rule in knob_rules if seed in knob_seeds else ():
            for bait in BAITS:
                for name in KNOB_ARMS:
                    work[seed].setdefault(dose(cfg, doses, rule, name, bait), "knob")
    return work


def tuned_arms(cfg, bait, chosen):
    """The arms that get a dose at this bait, of those that --arms chose (none named: all)."""
    return [name for name in (ARMS if bait == cfg.bait else KNOB_ARMS) if not chosen or name in chosen]


def trials(cfg, baits, seeds, chosen=()):
    """The arms that --tune runs: the same number of doses for every method."""
    work = {seed: {} for seed in seeds}
    for bait in baits:
        for name in tuned_arms(cfg, bait, chosen):
            arm = dose(cfg, {}, "equal", name, bait)
            for lam, rate in zip(LAMBDAS, RATES, strict=True):
                arm_tried = arm._replace(lr=arm.lr * rate) if name in ("nll", "grpo") else arm._replace(lam=lam)
                for seed in seeds:
                    work[seed][arm_tried] = "tune"
    return work


# == The work: one process per seed, one file per unit ================================================================


def unit_file(out, seed, label):
    return out / f"seed-{seed}" / f"{label}.json"


def one_seed(size, out, seed, units, say=print):
    """Whatever of this seed is not there yet. `units`: [(arm, or None for the base policy, scope)]."""
    cfg, world, widths = SIZES[size]
    missing = [(arm, scope) for arm, scope in units if not unit_file(out, seed, arm.label if arm else "base").exists()]

    def order(unit):
        """The base policy, then the default bait, then bait by bait: a ranker is trained once for each."""
        bait = unit[0].bait if unit[0] else cfg.bait
        return unit[0] is not None, bait != cfg.bait, bait

    setup = None
    for arm, scope in sorted(missing, key=order):
        bait = arm.bait if arm else cfg.bait
        preparing = 0.0
        if setup is None or setup.cfg.bait != bait:
            began = time.process_time()
            mine = dataclasses.replace(cfg, seed=seed, bait=bait)
            setup = measure.prepare(mine, world, out / f"seed-{seed}" / "base-policy.npz")
            preparing = time.process_time() - began
        found, arrays = measure.run_arm(setup, arm, scope) if arm else measure.run_base(setup, widths)
        found["core_seconds"] += preparing
        path = unit_file(out, seed, arm.label if arm else "base")
        if arrays:
            measure.save(path.with_suffix(".npz"), arrays)
        found |= {"seed": seed, "scope": scope, "machine": report.machine()}
        write(path, json.dumps(found, indent=1))  # last: its presence means done
        say(f"seed {seed}: {arm.label if arm else 'base'}, {found['core_seconds']:.0f} s", flush=True)


def in_own_process(*task):
    torch.set_num_threads(1)
    nano.progress = plain
    one_seed(*task)


def plain(steps, name):
    """Instead of progress bars, which several processes would draw over each other."""
    return steps


def write(path, text):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def read_json(path, *keys):
    """A JSON object that one of these programs wrote, with these keys at least."""
    with nano.in_one_line(path, "remove it, if no program here wrote it, or mend it"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not found.keys() >= set(keys):
            raise ValueError(f"no JSON object{' with ' * bool(keys)}{', '.join(keys)}")
        return found


def work_through(size, out, work, jobs, base=True):
    """Every seed in a process of its own, `jobs` at a time; jobs 0: here, one after another."""
    first = [(None, "full")] if base else []
    tasks = [(size, out, seed, first + list(units.items())) for seed, units in work.items()]
    tasks = [task for task in tasks
             if not all(unit_file(out, task[2], arm.label if arm else "base").exists() for arm, _ in task[3])]
    side_by_side(in_own_process if jobs else one_seed, tasks, jobs)


def side_by_side(function, tasks, jobs):
    """Every task in a process of its own, `jobs` at a time; the first that fails or is interrupted ends the others.

    jobs 0: here, one after another."""
    if not jobs:
        for task in tasks:
            function(*task)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        try:
            for future in as_completed([pool.submit(function, *task) for task in tasks]):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def code_of(*files):
    """A checksum of the code that makes units: the script, these files beside this one, and the core."""
    sources = [ROOT / "nanoadagrpo.py", *(HERE / file for file in files), *sorted((ROOT / "adagrpo_core").glob("*.py"))]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def fingerprint(size):
    """What the units depend on: settings, world, and the code that makes them. Not the code that reports them."""
    cfg, world, widths = SIZES[size]
    return {"settings": dataclasses.asdict(cfg), "world": dataclasses.asdict(world), "widths": widths,
            "code": code_of("measure.py", "arithmetic.py")}


def same_origin(out, made):
    """Refuse to mix units of different code or settings."""
    path = out / "made-by.json"
    if not path.exists():
        write(path, json.dumps(made, indent=1))
        return
    before = read_json(path)
    changed = [key for key in made if before.get(key) != made[key]]
    if changed:
        raise UserError(f"--out {out}: holds units of other {' and '.join(changed)}; name another folder, or remove it")


def load(out, seed, label):
    """One unit: its JSON, with its arrays under "arrays"."""
    path = unit_file(out, seed, label)
    unit = read_json(path)
    unit["arrays"] = {}
    if path.with_suffix(".npz").exists():
        with (nano.in_one_line(path.with_suffix(".npz"), f"remove it and {path.name}: they are made again"),
              np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays):
            unit["arrays"] = {name: arrays[name] for name in arrays.files}
    return unit


# == The command line =================================================================================================


def tune(args, made):
    cfg = SIZES[args.size][0]
    seeds, baits = args.seeds or [0, 1, 2], sorted({cfg.bait, *args.baits})
    page = read_doses(args.dose, made) if args.arms else NO_DOSES
    if page["doses"] and page["seeds"] != seeds:
        raise UserError(f"--seeds {seeds_text(seeds)}: the doses of {args.dose}, which --arms keeps, were chosen on "
                        f"seeds {seeds_text(page['seeds'])}; name these")
    work = trials(cfg, baits, seeds, args.arms)
    work_through(args.size, args.out / "tune", work, args.jobs, base=False)
    tables = doses, validation, code = [copy.deepcopy(page[key]) for key in ("doses", VALIDATION, "code")]
    for bait in baits:
        for table in tables:
            table.setdefault(f"{bait:g}", {})
        for name in tuned_arms(cfg, bait, args.arms):
            key = "lr" if name in ("nll", "grpo") else "lam"
            tried = {}
            for seed in seeds:
                for arm in work[seed]:
                    if arm.name == name and arm.bait == bait:
                        hit = load(args.out / "tune", seed, arm.label)["valid"]["hr@10"]
                        tried.setdefault(getattr(arm, key), []).append(hit)
            before = doses[f"{bait:g}"].get(name, {}).get(key)
            chosen = doses[f"{bait:g}"][name] = {key: choose_dose(tried)}
            validation[f"{bait:g}"][name] = {
                f"{value:g}": round(100 * float(np.mean(hits)), 2) for value, hits in tried.items()}
            code[f"{bait:g}"][name] = made["code"][:12]
            print(f"{name}, bait {bait:g}: {key} {chosen[key]:g}" + (f", before {before:g}" if before else ""))
    page = {"seeds": seeds, "doses": doses, VALIDATION: validation, "code": code,
            "settings": made["settings"], "world": made["world"]}
    write(args.dose, json.dumps(page, indent=1))
    print(f"doses: {args.dose}")
    return page


def read_doses(path, made, keys=("settings", "world")):
    """What --tune wrote, or nothing; refused where it was found under other settings, or in another world."""
    if not path.exists():
        return NO_DOSES
    page = read_json(path)
    for key in keys:
        if page.get(key) != made[key]:
            raise UserError(f"--dose {path}: was chosen for other {key}; run --tune again, or name another file")
    return page


def seed_list(text):
    """'100-102,7' -> [100, 101, 102, 7]"""
    found = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text}: a seed is there twice; name each seed once")
    return found


def job_count(text):
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text}: jobs are 0 or more")
    return int(text)


def parse(argv):
    parser = nano.Parser("run.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--seeds", type=seed_list, help="such as 100-109 or 0,3 (with --tune: default 0-2)")
    add("--beside", type=seed_list, default=[], help="a second set of seeds: do the verdicts agree?")
    add("--jobs", type=job_count, default=1, help="seeds at a time, each on one core; 0: all in this process")
    add("--out", type=Path, help="folder of the finished units (default runs/evidence)")
    add("--page", type=Path, help="the report, its tables beside it (default docs/results.md and "
                                  "docs/results-tables.md; OUT/results.md with --size small)")
    add("--size", choices=SIZES, default="default", help="small: a toy of the toy, to try the driver")
    add("--knob-seeds", type=seed_list, help="seeds of the bait figure (default: the first five; '' for none)")
    add("--knob-rule", choices=("equal", "tuned", "both"), default="tuned", help="its dose rule")
    add("--tune", action="store_true", help="choose a dose for every method on validation, write --dose, and stop")
    add("--arms", type=lambda text: text.split(","), default=[], help="tune these alone, and keep the other doses")
    add("--baits", type=lambda text: [float(x) for x in text.split(",")], default=list(BAITS), help="to tune for")
    add("--dose", type=Path, help="what --tune found (default docs/evidence/dose.json, of small OUT/dose.json); "
                                  "absent: only the equal rule is run")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/evidence") / ("" if args.size == "default" else args.size)
    args.dose = args.dose or (HERE if args.size == "default" else args.out) / "dose.json"
    args.page = args.page or (ROOT / "docs/results.md" if args.size == "default" else args.out / "results.md")
    if not (args.seeds or args.tune):
        raise UserError("--seeds: say which, such as 100-109")
    if set(args.seeds or ()) & set(args.beside):
        raise UserError("--beside: names seeds of --seeds; a second set shares none")
    if args.baits and not set(args.baits) <= set(BAITS):
        raise UserError(f"--baits {args.baits}: choose among {BAITS}")
    if not set(args.arms) <= set(ARMS) or (args.arms and not args.tune):
        raise UserError(f"--arms {','.join(args.arms)}: goes with --tune; choose among {', '.join(ARMS)}")
    if not args.tune:
        report.check_place("toy", args.page, report.tables_beside(args.page))
    return args


def run(args):
    made = fingerprint(args.size)
    same_origin(args.out, made)
    if args.tune:
        return tune(args, made)
    cfg, world, widths = SIZES[args.size]
    page = read_doses(args.dose, made)
    doses = page["doses"]
    untuned = [name for name in ARMS if doses and name not in doses[f"{cfg.bait:g}"]]
    if untuned:
        raise UserError(f"--dose {args.dose}: no dose of {', '.join(untuned)}; run --tune --arms {','.join(untuned)}")
    rules = ("equal", "tuned") if doses else ("equal",)
    knob_rules = [rule for rule in rules if args.knob_rule in (rule, "both")] or ["equal"]
    knob_seeds = args.seeds[:5] if args.knob_seeds is None else [seed for seed in args.knob_seeds if seed in args.seeds]
    work = plan(cfg, doses, rules, knob_rules, args.seeds + args.beside, knob_seeds)
    work_through(args.size, args.out, work, args.jobs)

    machines, minutes = {}, 0.0
    for seed in args.seeds + args.beside:
        for path in (args.out / f"seed-{seed}").glob("*.json"):
            unit = read_json(path, "machine", "core_seconds")
            machines.setdefault(unit["machine"], set()).add(seed)
            minutes += unit["core_seconds"] / 60

    def results_of(seeds, knob_seeds, beside=None):
        """What the report is given about one set of seeds."""

        def units(name, rule=None, bait=cfg.bait, seeds=seeds):
            """The units of one row, a list over seeds."""
            label = name if name == "base" else dose(cfg, doses, rule, name, bait).label
            return [load(args.out, seed, label) for seed in seeds]

        return report.Results(
            cfg=cfg, world=world, seeds=seeds, tuned_on=page["seeds"], rules=rules, base=units("base"),
            arms={rule: {name: units(name, rule) for name in ARMS} for rule in rules},
            doses={rule: {name: dose(cfg, doses, rule, name, cfg.bait) for name in ARMS} for rule in rules},
            knob_seeds=knob_seeds, knob_tuned=[bait for bait in BAITS if f"{bait:g}" in doses],
            knob={rule: {bait: {name: units(name, rule, bait, knob_seeds) for name in (*KNOB_ARMS, "nll")}
                         for bait in BAITS} for rule in (knob_rules if knob_seeds else ())},
            widths=widths, code=made["code"], core_minutes=minutes, beside=beside,
            machines={machine: sorted(of) for machine, of in sorted(machines.items())})

    results = results_of(args.seeds, knob_seeds, results_of(args.beside, []) if args.beside else None)
    command = f"python docs/evidence/run.py --seeds {seeds_text(args.seeds)}"
    command += f" --beside {seeds_text(args.beside)}" if args.beside else ""
    command += f" --size {args.size}" if args.size != "default" else ""
    command += f" --knob-seeds {seeds_text(knob_seeds)}" if knob_seeds != args.seeds[:5] else ""
    command += f" --knob-rule {args.knob_rule}" if args.knob_rule != "tuned" else ""
    report.write_page(results, args.page, command, ROOT)
    print(f"report: {args.page}")
    return results


def seeds_text(seeds):
    """[100, 101, 102] -> '100-102'; others one by one."""
    if len(seeds) > 1 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds)) or "''"


def main(argv=None):
    try:
        return run(parse(argv))
    except (UserError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
