# SPDX-License-Identifier: MIT
"""What is measured on one seed: the arms of the comparison, and section 4's analysis of the base policy.

Everything that learns is `nanoadagrpo`'s. This file adds what only the toy allows, since it knows the truth: an oracle
gate, the true utility as a reward, and readers who click; and the gates that show what D and R choose, beside as many
chosen at random. What is computed over seeds is in arithmetic.py.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from typing import NamedTuple
from unittest import mock

import numpy as np
import scipy.stats
import torch
from arithmetic import best_step

import adagrpo_core as core
import nanoadagrpo as nano

# Row of the tables -> (method of nanoadagrpo or of this file, reward).
ARMS = {
    "nll": ("nll", "ranker"),
    "grpo": ("grpo", "ranker"),
    "grpo+nll": ("grpo+nll", "ranker"),
    "adagrpo-d": ("adagrpo-d", "ranker"),
    "adagrpo-r": ("adagrpo-r", "ranker"),
    "adagrpo": ("adagrpo", "ranker"),
    "r-thinned": ("r-thinned", "ranker"),
    "random-gate": ("random-gate", "ranker"),
    "random-at-r": ("random-at-r", "ranker"),
    "oracle-gate": ("oracle-gate", "ranker"),
    "true-reward": ("grpo+nll", "truth"),
}
KNOB_ARMS = ("grpo+nll", "adagrpo", "random-gate", "oracle-gate")  # NLL does not look at the ranker
DWELL, EFFECTIVE = 30.0, 10.0  # seconds; see `visit`
VISIT = ("page_views", "ctr", "dwell", "exposed", "clicked")


class Arm(NamedTuple):
    """One training run. `lam` is the dose of what NLL holds, `lr` the dose of nll and grpo, which have no lambda."""

    name: str
    bait: float
    lam: float
    lr: float

    @property
    def label(self):
        return f"{self.name}_bait{self.bait:g}_lam{self.lam:g}_lr{self.lr:g}"


class Truth(NamedTuple):
    """What the toy knows and no learner sees; see nanoadagrpo.toy_world."""

    taste: np.ndarray  # (users, N)
    quality: np.ndarray  # (N,)
    context: np.ndarray  # (N, N) what goes with the last item
    level1: np.ndarray  # (N,) category
    baited: np.ndarray  # (N,) boolean: do clicks follow bait where this was the last item?
    bait: float

    def utility(self, prompts, item):
        """(B, n) true utility of these items (B, n) for these prompts; no item gets the catalogue's mean."""
        everything = self.taste[prompts.user] + self.quality + self.context[prompts.history[:, -1]]  # (B, N)
        return np.where(item >= 0, np.take_along_axis(everything, np.maximum(item, 0), 1),
                        everything.mean(1, keepdims=True))

    def misled(self, prompts):
        """(B,) whether clicks in this context follow the bait, to whatever degree."""
        return (self.bait > 0) & self.baited[prompts.history[:, -1]]


class Setup(NamedTuple):
    """What all arms of a seed share."""

    cfg: nano.Settings
    world: nano.World
    data: nano.Data
    truth: Truth
    ranker: nano.Ranker
    policy: nano.Policy
    base: dict  # the policy's weights after SFT
    valid: nano.Prompts
    test: nano.Prompts


def save_weights(policy, path):
    save(path, {name: value.numpy() for name, value in policy.model.state_dict().items()})


def load_weights(policy, path):
    with np.load(path, allow_pickle=False) as weights:
        policy.model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})


def load_or_train(policy, data, cfg, base_file):
    """Make this policy the base policy: read from `base_file`, or trained and kept there."""
    if base_file.exists():
        load_weights(policy, base_file)
    else:
        nano.train_sft(policy, data.sft, cfg, lambda **row: None)
        base_file.parent.mkdir(parents=True, exist_ok=True)
        save_weights(policy, base_file)


def prepare(cfg, world, base_file):
    """The world, the ranker, and the base policy: read from `base_file`, or trained and kept there.

    The base policy has seen nothing of the log, so that one file serves every `bait`.
    """
    data = nano.toy_world(cfg, world)
    truth = Truth(*(data.world[key] for key in ("taste", "quality", "context", "level1", "baited")), cfg.bait)
    ranker = nano.train_ranker(data.catalogue, data.log, cfg)
    policy = nano.tiny_policy(data.catalogue, cfg)
    load_or_train(policy, data, cfg, base_file)
    return Setup(cfg, world, data, truth, ranker, policy, copy.deepcopy(policy.model.state_dict()),
                 nano.subset(data.valid, -(-cfg.eval_prompts // 5), cfg.seed, "valid"),
                 nano.subset(data.test, cfg.eval_prompts, cfg.seed, "test"))


def save(path, arrays):
    """Whole or not at all: an interrupted write leaves no file of this name."""
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.replace(path)


# == The arms =========================================================================================================


def run_arm(setup, arm, scope):
    """Train one arm. Returns what goes into its JSON, and its arrays.

    scope "tune": validation at the end only. "knob": the test at the end. "full": both, and validation on the way.
    """
    began = time.process_time()
    method, reward = ARMS[arm.name]
    cfg = dataclasses.replace(setup.cfg, lam=arm.lam, **{"grpo_lr" if method == "grpo" else "lr": arm.lr})
    if reward == "truth":
        reward = true_reward(setup.truth, setup.data.rl)
    else:
        reward = nano.make_reward(setup.ranker, cfg)
    model = setup.policy.model
    model.load_state_dict(setup.base)
    curve, tally, best = [], [], None

    def on_step(step, *_):
        nonlocal best
        if scope == "full" and (step % cfg.eval_every == 0 or step == cfg.rl_steps):
            curve.append({"step": step, **judge(setup, setup.valid)[0]})
            if best_step(curve) == step:
                best = copy.deepcopy(model.state_dict())

    with registered(method, setup.truth, tally) as name:
        nano.train_rl(setup.policy, reward, setup.data.rl, cfg, name, lambda **row: None, on_step=on_step)

    found, arrays = {"arm": arm.name, **arm._asdict()}, {}
    admitted = np.array(tally, float).reshape(-1, 3)  # steps x (batch, admitted, admitted though misled)
    found["admitted"] = float(admitted[:, 1].sum() / max(1, admitted[:, 0].sum()))
    found["misled"] = float(admitted[:, 2].sum() / max(1, admitted[:, 1].sum()))
    if scope == "tune":
        found["valid"] = judge(setup, nano.subset(setup.data.valid, cfg.eval_prompts, cfg.seed, "valid"))[0]
    else:
        found["final"], served = judge(setup, setup.test)
    if scope == "full":
        found |= {"curve": curve, "best_step": best_step(curve), "best": found["final"]}
        arrays = dict(admitted=admitted, rank=served["rank"], visit=visit(setup, served["item"]))
        if arm.name == "nll":
            found["reranked"] = reranked(setup, served["item"])
        if found["best_step"] != cfg.rl_steps:
            model.load_state_dict(best)
            found["best"] = judge(setup, setup.test)[0]
    return found | {"core_seconds": time.process_time() - began}, arrays


def run_base(setup, widths):
    """The base policy: what it serves, Tables 1 to 3 about it, and the order that Table 5 cuts into bins."""
    began = time.process_time()
    setup.policy.model.load_state_dict(setup.base)
    metrics, served = judge(setup, setup.test)
    found = {"arm": "base", "final": metrics, "best": metrics, "valid": judge(setup, setup.valid)[0], "influence": {}}
    for width, n in widths.items():
        rows = influence_rows(setup, nano.subset(setup.test, n, setup.cfg.seed, "influence"), int(width))
        found["influence"][width] = influence_tables(rows) | {"prompts": len(rows["hard"])}
    arrays = dict(rank=served["rank"], truth_logp=truth_logp(setup), visit=visit(setup, served["item"]))
    return found | {"core_seconds": time.process_time() - began}, arrays


def r_thinned(hard, clear, batch, generator):
    """Of those that R admits as many as D&R admits of this batch, chosen at random."""
    points = torch.rand(len(clear), generator=generator)
    order = torch.where(clear, points, 2.0).argsort()  # R's rows come first, in random order
    admitted = torch.zeros_like(clear)
    admitted[order[: core.sample_clip(hard, clear).sum()]] = True
    return admitted


def random_at_r(hard, clear, batch, generator):
    """As many as R admits of this batch, chosen at random."""
    return clear[torch.randperm(len(clear), generator=generator)]


@contextlib.contextmanager
def registered(method, truth, tally):
    """Under a name of its own, a method that also writes down (batch size, admitted, admitted though misled)."""
    gates = {"oracle-gate": lambda hard, clear, batch, _: ~torch.from_numpy(truth.misled(batch)),
             "r-thinned": r_thinned, "random-at-r": random_at_r}
    known = nano.Method(True, gates[method]) if method in gates else nano.METHODS[method]

    def admit(hard, clear, batch, generator):
        clip = known.admit(hard, clear, batch, generator)
        tally.append((len(clip), int(clip.sum()), int((clip.numpy() & truth.misled(batch)).sum())))
        return clip

    name = f"{method}, counted"
    with mock.patch.dict(nano.METHODS, {name: known._replace(admit=admit if known.admit else None)}):
        yield name


def true_reward(truth, prompts):
    """The true utility as a reward. A hallucination is worth what the mean of the catalogue is.

    A reward is asked about histories; whose they are is looked up. Of users with equal histories the last is taken.
    """
    row = {tuple(history): i for i, history in enumerate(prompts.history.tolist())}

    def reward(history, item):
        mine = prompts.rows([row[tuple(one)] for one in history.tolist()])
        return torch.from_numpy(truth.utility(mine, item.numpy())).float()

    return reward


# == What an arm serves ===============================================================================================


def judge(setup, prompts):
    """nanoadagrpo's evaluation; the mean true utility of the first ten valid beams; HR@10 in both kinds of context."""
    metrics, each = nano.evaluate(setup.policy, setup.ranker, prompts, setup.cfg)
    item, rank, misled = each["item"].numpy(), each["rank"].numpy(), setup.truth.misled(prompts)
    first = (item >= 0) & (np.cumsum(item >= 0, 1) <= 10)
    utility = setup.truth.utility(prompts, item)
    metrics["utility@10"] = float(np.mean((utility * first).sum(1)[first.any(1)] / first.sum(1)[first.any(1)]))
    return metrics | by_context(rank, misled), {"rank": np.minimum(rank, 10**6).astype(np.int32), "item": item}


def by_context(rank, misled):
    """HR@10 where clicks tell the truth and where they follow the bait; NaN where there is no such prompt."""
    return {f"hr@10 {name}": float(np.mean(rank[part] <= 10)) if part.any() else float("nan")
            for name, part in (("clean", ~misled), ("misled", misled))}


def reranked(setup, item):
    """Beams (n, W) of the policy in the order of the ranker instead: what a ranker after the policy would give."""
    score = nano.make_reward(setup.ranker, setup.cfg)(setup.test.history, torch.from_numpy(item)).numpy()
    order = np.argsort(np.where(item >= 0, -score, np.inf), axis=1, kind="stable")
    hit = np.take_along_axis(item, order, 1) == setup.test.target.numpy()[:, None]
    rank = np.where(hit.any(1), hit.argmax(1) + 1, 10**6)
    metrics = {f"hr@{k}": float(np.mean(rank <= k)) for k in (1, 10, 50)}
    metrics |= by_context(rank, setup.truth.misled(setup.test))
    return metrics | {"ndcg@10": float(np.mean(np.where(rank <= 10, 1 / np.log2(1.0 + rank), 0.0)))}


def visit(setup, item):
    """(users, 5) what every user would do, were this arm to serve the test period; NaN for users without a prompt."""
    shown = top(item, 10)
    prompts = setup.test
    utility = setup.truth.utility(prompts, shown)
    points = np.random.default_rng([setup.cfg.seed, 6]).random(shown.shape)
    return engagement(prompts.user.numpy(), shown >= 0, utility - setup.world.click_at,
                      np.where(shown >= 0, setup.truth.level1[shown], -1), points, len(setup.truth.taste))


def top(item, n):
    """(B, W) beams -> (B, n) the first n valid ones, -1 where there are fewer."""
    first = np.argsort(item < 0, axis=1, kind="stable")[:, :n]
    return np.take_along_axis(item, first, 1)


def engagement(user, shown, excess, category, points, users):
    """Per user, over the lists (B, n) shown in the period: VISIT's columns.

    A user clicks with probability sigmoid(excess), excess being true utility above `click_at`: the click model of the
    log without its bait. A click is followed by DWELL * log(1 + exp(excess)) seconds on the item's page, and counts as
    an effective page view from EFFECTIVE seconds on. Categories are the level-1 codes shown and clicked, each once.
    """
    click = shown & (points < 1 / (1 + np.exp(-excess)))
    seconds = np.where(click, DWELL * np.logaddexp(0, excess), 0.0)

    def total(x):
        return np.bincount(user, x.sum(1), minlength=users)

    def distinct(which):
        seen = np.zeros((users, max(1, category.max() + 1)), bool)
        seen[np.broadcast_to(user[:, None], category.shape)[which], category[which]] = True
        return seen.sum(1)

    columns = [total(seconds >= EFFECTIVE), total(click) / np.maximum(1, total(shown)), total(seconds),
               distinct(shown), distinct(click)]
    return np.where(np.isin(np.arange(users), user)[:, None], np.stack(columns, 1).astype(float), np.nan)


# == Section 4 ========================================================================================================


@torch.no_grad()
def truth_logp(setup, batch=500):
    """(n,) the base policy's log-likelihood of every test prompt's truth, per token."""
    parts = []
    for rows in torch.arange(len(setup.test.target)).split(batch):
        part = setup.test.rows(rows)
        parts.append(core.length_normalized(nano.prefill(setup.policy, part.history, part.target).target_logp))
    return torch.cat(parts).numpy()


@torch.no_grad()
def influence_rows(setup, prompts, width, batch=100):
    """Per prompt: ranks of the truth among `width` beams, by the policy, by the ranker, by a random ranker.

    The truth is inserted in both pools, as eq. 6 and 8 do; where it is among the beams it takes their score, to the
    bit, so that it ties with itself. Negatives are beams of other prompts of a batch.
    """
    cfg, catalogue, reward = setup.cfg, setup.data.catalogue, nano.make_reward(setup.ranker, setup.cfg)
    generator = nano.make_generator(cfg.seed, "influence")
    B = min(batch, len(prompts.target))
    parts = []
    for rows in torch.arange(len(prompts.target) // B * B).split(B):  # whole batches: negatives need company
        part = prompts.rows(rows)
        prompt = nano.prefill(setup.policy, part.history, part.target)
        beams, beam_logp = nano.tree_decode(setup.policy, prompt, nano.beam(width))
        item, logp = catalogue.item(beams), core.length_normalized(beam_logp)  # (B, W)
        W = item.shape[1]
        hit = item == part.target.unsqueeze(1)
        place = hit.int().argmax(1, keepdim=True)

        def own(in_beams, alone, hit=hit, place=place):
            """The truth's score: as a beam where it is one, else what it got alone."""
            return torch.where(hit.any(1), in_beams.gather(1, place)[:, 0], alone)

        target_logp = own(logp, core.length_normalized(prompt.target_logp))
        hard = core.difficulty(target_logp, logp, tau=cfg.tau)
        keys = torch.rand(B, B * W, generator=generator)
        negatives = item.flatten()[core.in_batch_negatives(keys, k=W, m=cfg.negatives)]
        pool = torch.cat([item, part.target.unsqueeze(1), negatives], 1)
        utility = setup.truth.utility(part, item.numpy())
        others = (item >= 0).numpy() & ~hit.numpy()  # the truth is left out: the strata are chosen by its rank
        # The random ranker, too, gives an item one score and a hallucination the floor.
        noise = torch.rand(B, catalogue.N, generator=generator).gather(1, pool.clamp(min=0))
        found = dict(llm=core.policy_rank(target_logp, logp), hard=hard,
                     misled=torch.from_numpy(setup.truth.misled(part)))
        for ranker, scores in (("ranker", reward(part.history, pool)),
                               ("random", torch.where(pool >= 0, noise, cfg.floor))):
            beam_reward, negative = scores[:, :W], scores[:, W + 1 :]
            target = own(beam_reward, scores[:, W])
            found[f"{ranker} rank"] = core.policy_rank(target, beam_reward)
            found[f"{ranker} clear"] = core.reliability(target, beam_reward, negative, tau=cfg.tau, rho=cfg.rho)
            found[f"{ranker} spearman"] = torch.from_numpy(spearman(beam_reward.numpy(), utility, others))
        parts.append(found)
    return {key: torch.cat([part[key] for part in parts]).numpy() for key in parts[0]}


def spearman(x, y, where):
    """(B,) rank correlation of each row's entries that count; NaN where there are fewer than three, or no spread."""
    x, y = (scipy.stats.rankdata(np.where(where, z, np.nan), axis=1, nan_policy="omit") for z in (x, y))
    n = where.sum(1)
    x, y = (np.where(where, z - (n[:, None] + 1) / 2, 0.0) for z in (x, y))  # ranks of n entries have mean (n + 1) / 2
    spread = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.where((n > 2) & (spread > 0), (x * y).sum(1) / np.where(spread > 0, spread, 1.0), np.nan)


def influence_tables(rows):
    """Tables 1 to 3 on one seed, for the ranker and the random one; per stratum the mean correlation, and how many
    are misled."""
    tables = {}
    for ranker in ("ranker", "random"):
        clear = rows[f"{ranker} clear"]
        result = core.reward_influence(rows["llm"], rows[f"{ranker} rank"], hard=rows["hard"], discriminable=clear)
        tables[ranker] = {stratum: {key: float(value) for key, value in getattr(result, stratum)._asdict().items()}
                          for stratum in result._fields}
        strata = dict(overall=np.ones_like(clear), hard=rows["hard"], discriminable=rows["hard"] & clear,
                      clean=~rows["misled"], misled=rows["misled"])
        correlation = rows[f"{ranker} spearman"]
        for stratum, part in strata.items():
            known = correlation[part & ~np.isnan(correlation)]
            tables[ranker].setdefault(stratum, {"coverage": float(part.mean())})
            tables[ranker][stratum]["spearman"] = float(known.mean()) if len(known) else float("nan")
            tables[ranker][stratum]["misled"] = float(rows["misled"][part].mean()) if part.any() else float("nan")
    return tables
