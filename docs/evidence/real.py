# SPDX-License-Identifier: MIT
"""A real log with an unbiased judge: AdaGRPO on ratings that users chose to give, judged by ratings of random items.

    python docs/evidence/real.py --yahoo DIR --tune                  # once: learning rate, lambda -> real-dose.json
    python docs/evidence/real.py --yahoo DIR --seeds 100-109         # everything -> its part of docs/results.md

DIR holds Yahoo! R3 as two files of user,item,rating: user.txt (songs that users chose to rate) and random.txt (songs
drawn at random, ten a user). Neither belongs to this project. Needs the extras nano and evidence. What was interrupted
goes on where it stopped: the unit of work is one arm on one seed, a JSON file under --out, with an array beside it.

Only user.txt is learnt from. A rating of 4 or 5 is a like. The file has no times, so the seed draws the order of each
user's likes. The last of five or more is the HR test, the second last validation, the third last the target of the RL
prompts. Semantic IDs, base policy, rankers and RL are nanoadagrpo's; what they read is written in its own format.
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
import real_data  # noqa: E402
import real_report  # noqa: E402
import run  # noqa: E402
import scipy.sparse  # noqa: E402
import torch  # noqa: E402
from arithmetic import best_step, choose_dose  # noqa: E402
from real_report import REWARDS, Results  # noqa: E402
from report import check_place, tables_beside  # noqa: E402

import adagrpo_core as core  # noqa: E402
import nanoadagrpo as nano  # noqa: E402
from nanoadagrpo import UserError  # noqa: E402

# Tried by --tune: as many values of lambda for the gate as without it.
RATES, LAMBDAS, TUNED = (3e-5, 1e-4, 3e-4, 1e-3), (0.3, 1.0, 5.0, 15.0, 50.0), ("grpo+nll", "adagrpo")
SIZES = {
    "default": nano.Settings(toy=True, device="cpu", sft_steps=8000, sft_batch_size=64, rl_steps=200, batch_size=32,
                             eval_prompts=1000, eval_every=1000),
    "small": nano.Settings(toy=True, device="cpu", sft_steps=40, sft_batch_size=32, sft_lr=1e-2, rl_steps=2,
                           batch_size=8, eval_prompts=20, eval_every=20),
}


# == What all arms of a seed share ====================================================================================


class Setup(NamedTuple):
    cfg: nano.Settings
    data: nano.Data
    likes: dict  # for the yardsticks
    rankers: dict  # of REWARDS -> nano.Ranker
    learnt: dict  # -> AUC on rows of its own log that were kept out
    policy: nano.Policy
    base: dict  # the policy's weights
    curve: list  # of the supervised steps, on validation
    valid: nano.Prompts
    judged: nano.Prompts  # test prompts of users who liked some of their random items, not all
    judged_rl: nano.Prompts  # RL prompts of the same users
    item: torch.Tensor  # (n, R) the random items of these users
    liked: np.ndarray  # (n, R) boolean


def against_popular(log, cfg):
    """What the script makes of purchases where there is no log, but against 15 targets of other rows: (c)."""
    bought, generator = log.item[:, :1], nano.make_generator(cfg.seed, "negatives of the ranker", cfg.device)
    others = torch.randint(len(bought), (len(bought), 15), generator=generator, device=cfg.device)
    item = torch.cat([bought, bought[others, 0]], 1)
    return log._replace(item=item, click=item == bought)


@functools.lru_cache(1)
def prepare(cfg, yahoo, folder, tuning):
    """The files, the rankers, and the base policy: read from `folder`, or trained and kept there."""
    ratings = real_data.read(yahoo)
    mine, files = real_data.split(ratings, cfg.seed), folder / "data"
    real_data.write(mine, ratings.items, files, cfg)
    data, rankers, learnt = nano.load_data(files, cfg), {}, {}
    for name in ("rated", "uniform"):
        logged = nano.load_data(files / name, cfg)
        rankers[name] = nano.train_ranker(data.catalogue, logged.log, cfg)
        learnt[name] = nano.judge_ranker(rankers[name], logged.holdout)["click_auc"]
    if not tuning:
        rankers["popular"] = nano.train_ranker(data.catalogue, against_popular(data.log, cfg), cfg)
        learnt["popular"] = float("nan")  # no row of this log is kept out
    valid = nano.subset(data.valid, cfg.eval_prompts, cfg.seed, "valid")
    policy = nano.tiny_policy(data.catalogue, cfg)
    curve = base_policy(policy, data, rankers["rated"], valid, cfg, folder)
    row = {user: i for i, user in enumerate(mine.held)}  # of rl, valid and test alike
    item, liked = ratings.random[..., 0], ratings.random[..., 1] > 0
    which = np.flatnonzero(liked.any(1) & ~liked.all(1) & np.isin(ratings.users, list(row)))
    at = torch.tensor([row[user] for user in ratings.users[which].tolist()])
    return Setup(cfg, data, mine.likes, rankers, learnt, policy, copy.deepcopy(policy.model.state_dict()), curve,
                 valid, data.test.rows(at), data.rl.rows(data.rl.user.argsort()[at]),
                 torch.from_numpy(item[which]), liked[which])


def serve(policy, ranker, prompts, cfg):
    """(n, W) beams without items of the prompt's history, most likely first, -1 behind their end; and all beams.

    What is known to be liked is not served again, by no policy and no yardstick. The search is wider by a history, so
    that W may be left of it.
    """
    wider = dataclasses.replace(cfg, beam_width=cfg.beam_width + cfg.max_history)
    _, each = nano.evaluate(policy, ranker, prompts, wider)
    known = (each["item"][:, :, None] == prompts.history[:, None]).any(2)
    return measure.top(each["item"].masked_fill(known, -1).numpy(), cfg.beam_width), each


def hit(served, target):
    """(n,) is the target among the first ten that are served?"""
    return (served[:, :10] == target[:, None]).any(1)


def validate(policy, ranker, prompts, cfg):
    """HR@10 on validation, of what would be served in the test."""
    return float(hit(serve(policy, ranker, prompts, cfg)[0], prompts.target.numpy()).mean())


def base_policy(policy, data, ranker, valid, cfg, folder):
    """Supervised steps, stopped where HR@10 on validation was best. Returns the curve."""
    path, curve = folder / "base-policy.npz", []

    def on_step(step, *_):
        if step % cfg.eval_every == 0 or step == cfg.sft_steps:
            curve.append({"step": step, "hr@10": validate(policy, ranker, valid, cfg)})
            if best_step(curve) == step:
                measure.save_weights(policy, folder / "best.npz")

    if not path.exists():
        nano.train_sft(policy, data.sft, cfg, lambda **row: None, on_step=on_step)
        run.write(folder / "curve.json", json.dumps(curve))
        (folder / "best.npz").replace(path)  # last: its presence means done
    measure.load_weights(policy, path)
    return json.loads((folder / "curve.json").read_text())


# == The judges =======================================================================================================


def auc(score, liked):
    """(n,) share of a row's pairs of a liked item and another that the score (n, R) orders rightly; ties count half."""
    pair = liked[:, :, None] & ~liked[:, None]
    ahead = np.sign(score[:, :, None] - score[:, None]) / 2 + 0.5
    return (pair * ahead).sum((1, 2)) / pair.sum((1, 2))


def ndcg(score, liked, k=5):
    """(n,) NDCG@k of a row's items."""
    weight = np.where(np.arange(score.shape[1]) < k, 1 / np.log2(2.0 + np.arange(score.shape[1])), 0.0)
    gain = np.take_along_axis(liked, np.argsort(-score, axis=1, kind="stable"), 1) @ weight
    return gain / (np.sort(liked, axis=1)[:, ::-1] @ weight)


def per_user(score, item, liked, served, target, mass=None):
    """(n, PER_USER) from scores of random items (n, R), and lists served (n, W), -1 behind their end.

    P@k is the like rate of the random items among the first k served, a ratio of two sums over users: nobody chose to
    rate these, so it says what those who did not choose would have said. mass: see `judge`.
    """
    columns = [hit(served, target), auc(score, liked), ndcg(score, liked)]
    for k in (10, 50):
        among = (item[:, :, None] == served[:, None, :k]).any(2)
        columns += [(among & liked).sum(1), among.sum(1)]
    mass = np.full(score.shape, np.nan) if mass is None else mass
    return np.stack([*columns, (mass * liked).sum(1), mass.sum(1)], 1).astype(np.float32)


@torch.no_grad()
def item_logp(policy, history, item, batch=500):
    """(n, R) the policy's log-likelihood of items (n, R)."""
    parts = zip(history.split(batch), policy.catalogue.tokens[item].split(batch), strict=True)
    logp = [nano.sequence_logp(policy, nano.prefill(policy, past), tokens).sum(-1) for past, tokens in parts]
    return torch.cat(logp).numpy()


def judge(setup, ranker, power=1):
    """Metrics, and what they are for each user. The mass is how often a sample would be each of the random items.

    With a power of 3 the policy's probabilities are sharpened to the third power before samples are drawn: its order
    and what it serves stay as they are. All but a trace of the third powers lies in the beams, which are summed over.
    """
    served, each = serve(setup.policy, ranker, setup.judged, setup.cfg)
    logp = item_logp(setup.policy, setup.judged.history, setup.item)
    total = np.exp(power * setup.policy.catalogue.L * each["logp"].numpy()).sum(1, keepdims=True) if power > 1 else 1.0
    mass = np.exp(power * logp) / total
    table = per_user(logp, setup.item.numpy(), setup.liked, served, setup.judged.target.numpy(), mass)
    return {"entropy": entropy(served[:, 0])}, table


def entropy(item):
    """Of what is served first, in bits."""
    share = np.unique(item, return_counts=True)[1] / len(item)
    return float(-(share * np.log2(share)).sum())


def ease(likes, N, ridge=200.0):
    """(N, N) item to item, in closed form (Steck 2019)."""
    pairs = np.array([(user, item) for user, mine in likes.items() for item in mine])
    X = scipy.sparse.coo_matrix((np.ones(len(pairs)), pairs.T), (pairs[:, 0].max() + 1, N)).tocsr()
    P = np.linalg.inv((X.T @ X).toarray() + ridge * np.eye(N))
    B = -P / np.diag(P)
    np.fill_diagonal(B, 0.0)
    return B


def yardsticks(setup):
    """{name: (n, N) scores} of all items for the judged users."""
    history, N = setup.judged.history, setup.data.catalogue.N
    past = np.zeros((len(history), N))
    np.put_along_axis(past, history.clamp(min=0).numpy(), (history >= 0).numpy().astype(float), 1)
    popular = np.bincount([item for mine in setup.likes.values() for item in mine], minlength=N)
    everything = torch.arange(N).expand(len(history), -1)
    found = {"popularity": np.broadcast_to(popular, past.shape), "EASE": past @ ease(setup.likes, N)}
    for name, ranker in setup.rankers.items():
        reward = nano.make_reward(ranker, setup.cfg)
        parts = zip(history.split(100), everything.split(100), strict=True)
        found[name] = torch.cat([reward(*part) for part in parts]).numpy()
    return found


# == Section 4: is there anything for the gate to find? ===============================================================


@torch.no_grad()
def section4(setup):
    """Rates of D, R and c on the judged users' RL prompts, and for each user who was admitted and who knew better."""
    cfg, policy, K, n = setup.cfg, setup.policy, setup.cfg.group_size, len(setup.judged.target)
    generator, parts = nano.make_generator(cfg.seed, "section 4"), []
    rewards = {name: nano.make_reward(ranker, cfg) for name, ranker in setup.rankers.items()}
    for rows in np.array_split(np.arange(n), max(1, n // cfg.batch_size)):  # negatives need company
        batch = setup.judged_rl.rows(torch.from_numpy(rows))
        B = len(rows)
        tokens, logp, target_logp, _ = nano.rollout(policy, batch, [slice(0, B)], K, generator)
        items = policy.catalogue.item(tokens)
        keys = torch.rand(B, B * K, generator=generator)
        negatives = items.flatten()[core.in_batch_negatives(keys, k=K, m=4)]
        pool = torch.cat([items, batch.target[:, None], negatives], 1)
        target_mean = -core.nll_loss(target_logp)
        mean = torch.where(items == batch.target[:, None], target_mean[:, None], core.length_normalized(logp))
        noise = torch.rand(B, policy.catalogue.N, generator=generator).gather(1, pool.clamp(min=0))
        scores = {"random": torch.where(pool >= 0, noise, cfg.floor)}
        for name, reward in rewards.items():
            scores[name] = reward(batch.history, pool)
            scores[f"{name}, another user"] = reward(batch.history.roll(1, 0), pool)
        found = {"D": core.difficulty(target_mean, mean, tau=cfg.tau)}
        for name, x in scores.items():
            for M in range(1, 5):
                negative = x[:, K + 1 : K + 1 + M]
                found[f"R {M} {name}"] = core.reliability(x[:, K], x[:, :K], negative, **cfg.tau_rho_ties())
        parts.append(found)
    table = {key: torch.cat([part[key] for part in parts]).numpy() for key in parts[0]}
    rates = {key: float(x.mean()) for key, x in table.items()}
    rates |= {"c" + key[1:]: float((x & table["D"]).mean()) for key, x in table.items() if key != "D"}
    history = setup.judged_rl.history
    table["AUC policy"] = auc(item_logp(policy, history, setup.item), setup.liked)
    for name, reward in rewards.items():
        table[f"AUC {name}"] = auc(reward(history, setup.item).numpy(), setup.liked)
    return rates, table


# == The arms =========================================================================================================


def anti_r(difficult, reliable, batch, generator):
    """As many as R admits, chosen at random among those that it rejects (and others only if these are too few)."""
    order = (torch.rand(len(reliable), generator=generator) + reliable).argsort()
    return torch.zeros_like(reliable).index_fill(0, order[: int(reliable.sum())], True)


CONTROLS = {"random-r": nano.Method(True, measure.random_at_r), "anti-r": nano.Method(True, anti_r)}


class Arm(NamedTuple):
    """One training run; NLL has neither reward nor lambda."""

    name: str
    lr: float
    reward: str = ""
    lam: float = 0.0

    @property
    def label(self):
        return self.name + (f"_{self.reward}_lam{self.lam:g}" if self.reward else "") + f"_lr{self.lr:g}"


def plan(doses):
    """The arms of every seed, each at its dose. A random gate has the lambda that validation chose for the gate."""
    lr, found = doses["lr"], [Arm("nll", doses["lr"])]
    for reward in REWARDS[:2]:
        found += [Arm(name, lr, reward, doses[reward][name]) for name in TUNED]
        found.append(Arm("random-gate", lr, reward, doses[reward]["adagrpo"]))
        found += [Arm(name, lr, reward, 5.0) for name in ("adagrpo-r", "random-r", "anti-r")]
    return found


def run_arm(setup, arm, tuning=False):
    """Train one arm. Returns what goes into its JSON, and its arrays. Tuning looks at nothing but validation."""
    began, rows = time.process_time(), []
    cfg = dataclasses.replace(setup.cfg, lam=arm.lam, lr=arm.lr)
    ranker = setup.rankers[arm.reward or "rated"]
    setup.policy.model.load_state_dict(setup.base)
    with mock.patch.dict(nano.METHODS, CONTROLS):
        nano.train_rl(setup.policy, nano.make_reward(ranker, cfg), setup.data.rl, cfg, arm.name,
                      lambda **row: rows.append(row))
    keys = [key for key in ("admitted", "reliable", "difficult", "invalid_rollouts", "reward") if key in rows[0]]
    found = {**arm._asdict(), **{key: float(np.mean([row[key] for row in rows])) for key in keys}, "arrays": {}}
    found["valid"] = validate(setup.policy, ranker, setup.valid, cfg)
    if not tuning:
        found["final"], found["arrays"]["each"] = judge(setup, ranker)
    return found | {"core_seconds": time.process_time() - began}


def run_base(setup):
    """The base policy, the same sharpened, the yardsticks, and Section 4."""
    began, final, arrays = time.process_time(), {}, {}
    setup.policy.model.load_state_dict(setup.base)
    final["base"], arrays["base"] = judge(setup, setup.rankers["rated"])
    final["sharpened"], arrays["sharpened"] = judge(setup, setup.rankers["rated"], power=3)
    history, item = setup.judged.history.numpy(), setup.item.numpy()
    for name, score in yardsticks(setup).items():
        free = np.array(score, float)  # what is known to be liked is not served again
        for line, past in zip(free, history, strict=True):
            line[past[past >= 0]] = -np.inf
        served = np.argsort(-free, axis=1, kind="stable")[:, :50]
        asked = np.take_along_axis(score, item, 1)
        arrays[name] = per_user(asked, item, setup.liked, served, setup.judged.target.numpy())
        final[name] = {"entropy": entropy(served[:, 0])}
    rates, gate = section4(setup)
    return {"arm": "base", "final": final, "rates": rates, "curve": setup.curve, "learnt": setup.learnt,
            "users": len(item), "arrays": arrays | {f"gate {key}": x for key, x in gate.items()},
            "core_seconds": time.process_time() - began}


# == The work: one process per seed, one file per unit ================================================================


def one_seed(cfg, yahoo, out, seed, arms, tuning):
    """Whatever of this seed is not there yet; arm None is the base policy."""
    torch.set_num_threads(1)
    nano.progress = run.plain
    for arm in arms:
        path = run.unit_file(out, seed, arm.label if arm else "base")
        if path.exists():
            continue
        began = time.process_time()
        setup = prepare(dataclasses.replace(cfg, seed=seed), yahoo, out / f"seed-{seed}", tuning)  # once
        preparing = time.process_time() - began
        found = run_arm(setup, arm, tuning) if arm else run_base(setup)
        arrays = found.pop("arrays")
        found["core_seconds"] += preparing
        if arrays:
            measure.save(path.with_suffix(".npz"), arrays)
        run.write(path, json.dumps({"seed": seed, **found}, indent=1))  # last: its presence means done
        print(f"seed {seed}: {path.stem}, {found['core_seconds']:.0f} s", flush=True)


def work_through(args, out, arms, tuning=False):
    tasks = [(SIZES[args.size], args.yahoo, out, seed, arms, tuning) for seed in args.seeds]
    run.side_by_side(one_seed, tasks, args.jobs)


def origin(args):
    """What the units depend on: settings, ratings, and the code that makes them."""
    ratings = hashlib.sha256(b"".join((args.yahoo / name).read_bytes() for name in real_data.FILES)).hexdigest()
    return {"settings": dataclasses.asdict(SIZES[args.size]), "ratings": ratings,
            "code": run.code_of("real.py", "real_data.py", "measure.py", "arithmetic.py")}


def tune(args, made):
    """The learning rate at which NLL continued does best, then each method's lambda: by HR@10 on validation alone."""
    out = args.out / "tune"

    def tried(arms):
        work_through(args, out, arms, tuning=True)
        return {arm: [run.load(out, seed, arm.label)["valid"] for seed in args.seeds] for arm in arms}

    found = tried([Arm("nll", lr) for lr in RATES])
    page = {"seeds": args.seeds, **made, "lr": choose_dose({arm.lr: hits for arm, hits in found.items()})}
    found |= tried([Arm(name, page["lr"], reward, lam) for reward in REWARDS[:2] for name in TUNED for lam in LAMBDAS])
    for reward in REWARDS[:2]:
        page[reward] = {name: choose_dose({arm.lam: hits for arm, hits in found.items()
                                           if (arm.reward, arm.name) == (reward, name)}) for name in TUNED}
    curves = [json.loads((out / f"seed-{seed}" / "curve.json").read_text()) for seed in args.seeds]
    valid = {"base": [max(point["hr@10"] for point in curve) for curve in curves]}
    valid |= {arm.label: hits for arm, hits in found.items()}
    page["validation HR@10 %"] = {name: round(100 * float(np.mean(hits)), 2) for name, hits in valid.items()}
    run.write(args.dose, json.dumps(page, indent=1))
    print(f"doses: {args.dose}")
    return page


# == The command line =================================================================================================


def parse(argv):
    parser = nano.Parser("real.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--yahoo", type=Path, required=True, help="folder with user.txt and random.txt")
    add("--seeds", type=run.seed_list, help="such as 100-109 (with --tune: default 0-2)")
    add("--jobs", type=run.job_count, default=1, help="seeds at a time, each on one core; 0: all in this process")
    add("--out", type=Path, help="folder of the finished units (default runs/real)")
    add("--size", choices=SIZES, default="default", help="small: a few steps, to try the driver")
    add("--tune", action="store_true", help="choose learning rate and lambda on validation, write --dose, and stop")
    add("--dose", type=Path, help="what --tune found (default docs/evidence/real-dose.json, "
                                  "of small OUT/real-dose.json)")
    add("--page", type=Path, help="the report, its tables beside it (default docs/results.md and "
                                  "docs/results-tables.md; OUT/results.md with --size small)")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/real") / ("" if args.size == "default" else args.size)
    args.dose = args.dose or (HERE if args.size == "default" else args.out) / "real-dose.json"
    args.page = args.page or (ROOT / "docs/results.md" if args.size == "default" else args.out / "results.md")
    args.seeds = args.seeds or ([0, 1, 2] if args.tune else None)
    if not args.seeds:
        raise UserError("--seeds: say which, such as 100-109")
    if not args.tune and not args.dose.exists():
        raise UserError(f"--dose {args.dose}: no such file; run --tune first")
    if not args.tune:
        check_place("real", args.page, tables_beside(args.page))
    return args


def main(argv=None):
    try:
        args = parse(argv)
        real_data.read(args.yahoo)
        cfg, made = SIZES[args.size], origin(args)
        run.same_origin(args.out, made)
        if args.tune:
            return tune(args, made)
        doses = run.read_doses(args.dose, made, ("settings", "ratings"))
        arms = plan(doses)
        work_through(args, args.out, [None, *arms])
        results = Results(args.seeds, doses, [run.load(args.out, seed, "base") for seed in args.seeds],
                          {arm: [run.load(args.out, seed, arm.label) for seed in args.seeds] for arm in arms})
        real_report.write_page(args, results, cfg)
        return results
    except (UserError, OSError) as error:
        print(f"real.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
