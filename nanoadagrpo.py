# SPDX-License-Identifier: MIT
"""nanoadagrpo: AdaGRPO (arXiv 2606.08480) end to end, in one file to be read from top to bottom.

A generative recommender is a language model that writes the next item as a Semantic ID: L tokens, from coarse to
fine. Reinforcement learning can teach it what a ranker knows, but the ranker, trained on what was shown and clicked,
is wrong in places and does not say where. AdaGRPO asks before it listens: every sample is supervised; the policy
gradient is added only for a sample that the policy finds difficult (D) and whose truth the ranker picks out (R).

    python nanoadagrpo.py --toy                       # a made-up shop, one method, under a minute on a laptop
    python nanoadagrpo.py --toy --method all          # every method from the same start, side by side
    python nanoadagrpo.py --data DIR                  # your data: MiniOneRec's layout or JSONL (docs/data.md)

The mathematics is imported from `adagrpo_core`; nothing of it is written twice. Reading order: 1 settings,
2 catalogue and data, 3 the toy world, 4 the ranker, 5 the policy and its tree of tokens, 6 the step, 7 evaluation,
8 the command line. In a hurry, read `grow` (5) and `train_rl` (6).

Where this differs from the paper, or the paper is silent:
 1. The paper's data, ranker and language model are proprietary: here a toy world, or public data, stand in.
 2. K, M, lambda, epsilon and the learning rate are not given: the defaults are ours, chosen on seeds 0-9 of the toy.
 3. Rollouts are sampled from the policy being trained, one update per rollout, so the ratio of eq. 4 starts at 1.
    `--updates 2` takes a second step on the same rollouts; only then does `--epsilon` have something to clip.
 4. The softmax runs over the catalogue's SID tokens only, all levels together: in training, sampling and evaluation.
    A token of the wrong level, or a combination that no item has, is a hallucination. Nothing is constrained.
 5. A hallucination cannot be scored by the ranker. It gets a fixed reward, `--floor`.
 6. Rollouts that repeat each other or the truth stay in the pools, and ties share the better rank.
 7. HR counts places among the valid beams only, as a server would, having dropped the others. ClkRwd@k and OrdRwd@k
    are the best score within the first k, since the paper's values grow with k as a mean would not.
 8. Pure GRPO (no NLL) takes `--grpo-lr`: Adam undoes the scale of a loss, so what lambda tempers elsewhere, only the
    learning rate can temper here.
 9. Two controls are added: NLL alone, continued (`nll`), and a gate that admits as many samples of each batch as
    AdaGRPO would, at random (`random-gate`).
"""

from __future__ import annotations

import argparse
import ast
import copy
import csv
import dataclasses
import difflib
import itertools
import json
import re
import shlex
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.utils.logging import disable_progress_bar

import adagrpo_core as core

# Shape letters, everywhere: B prompts, K rollouts of each, M negatives, L tokens of a Semantic ID, H items of a
# history, T tokens of a prompt, n branches of a tree, S SID tokens of all levels, N items. An item is a row of the
# catalogue; -1 is no item: padding on the left of a history, a hallucination among rollouts and beams.


# == 1. Settings ======================================================================================================


def option(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    toy: bool = option(False, "train in a made-up shop: no data needed")
    data: str = option("", "folder with a catalogue and train, valid and test files (docs/data.md)")
    method: str = option("adagrpo", "one of the methods below, or all")
    seed: int = option(0, "decides everything random; equal seeds give equal numbers on a CPU")
    out: str = option("", "folder for the results, must not exist yet (default: a new one under runs/)")
    device: str = option("auto", "cpu, cuda, cuda:1 ..., or auto: a GPU where there is one")
    sft_steps: int = option(400, "supervised steps that make the base policy")
    sft_batch_size: int = option(128, "prompts per supervised step")
    sft_lr: float = option(3e-3, "peak learning rate of the supervised steps")
    rl_steps: int = option(200, "steps of --method, each on a fresh batch of rollouts")
    batch_size: int = option(32, "B, prompts per step of --method")
    group_size: int = option(32, "K, rollouts per prompt")
    negatives: int = option(1, "M, rollouts of other prompts that the ranker must put at the bottom")
    lam: float = option(6.0, "lambda, weight of the admitted GRPO term beside the NLL")
    tau: float = option(1 / 3, "top fraction of K: the truth outside it is difficult, inside it (by reward) prominent")
    rho: float = option(0.1, "bottom fraction of K in which the ranker must put every negative")
    epsilon: float = option(0.2, "clip of the ratio in eq. 4; has work to do only with --updates above 1")
    updates: int = option(1, "optimizer steps per batch of rollouts")
    lr: float = option(3e-4, "peak learning rate of --method")
    grpo_lr: float = option(5e-5, "the same for pure GRPO, which no NLL holds")
    floor: float = option(0.0, "reward of a rollout that is no item; the ranker's rewards lie in 0..2")
    rl_prompts: int = option(300, "labelled prompts for --method; 0 takes all there are")
    max_history: int = option(10, "items of a history that the policy sees, the most recent ones")
    bait: float = option(1.0, "toy: how far clicks in the baited contexts follow bait instead of taste, 0..1")
    beam_width: int = option(50, "W, beams per prompt in evaluation")
    eval_prompts: int = option(4000, "test prompts at the end; a quarter as many validation prompts along the way")
    eval_every: int = option(50, "steps between two points of the training curve")

    def __post_init__(self):
        at_least_1 = {"sft_steps", "sft_batch_size", "rl_steps", "batch_size", "updates", "max_history", "beam_width",
                      "eval_prompts", "eval_every"}
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), 1 if field.name in at_least_1 else 0
            if type(field.default) in (int, float) and field.name != "floor" and not low <= value < float("inf"):
                raise BadInput(f"--{dashed(field.name)} {value}: must be a finite number, {low} or more")
        if self.seed >= 2**63:
            raise BadInput(f"--seed {self.seed}: too large; use a number below 2**63")
        if not (self.bait <= 1 and abs(self.floor) < float("inf")):
            raise BadInput(f"--bait {self.bait} --floor {self.floor}: bait lies between 0 and 1, floor is finite")
        if self.method != "all" and self.method not in METHODS:
            hint = difflib.get_close_matches(self.method, METHODS, 1)
            raise BadInput(f"--method {self.method}: " + (f"did you mean {hint[0]}? " if hint else "")
                           + f"Choose from {', '.join(METHODS)}, all")
        if self.batch_size == 1 and self.method != "nll":
            raise BadInput("--batch-size 1: negatives come from the other prompts of a batch; use 2 or more")
        if self.group_size == 1 and self.method != "nll":
            raise BadInput("--group-size 1: a rollout is judged by the others of its group; use 3 or more")
        # The core knows which tau, rho, epsilon, K and M cannot work; ask it now instead of after the supervised steps.
        B, K, M = self.batch_size, self.group_size, self.negatives
        try:
            if self.method != "nll":
                core.group_advantages(np.zeros((1, K)))
                core.reliability(np.zeros(1), np.zeros((1, K)), np.zeros((1, M)), tau=self.tau, rho=self.rho)
                core.in_batch_negatives(np.zeros((B, B * K)), k=K, m=M)
                core.grpo_loss(np.zeros((1, 1, 1)), np.zeros((1, 1, 1)), np.zeros((1, 1)), epsilon=self.epsilon)
        except ValueError as error:
            raise BadInput(f"--tau {self.tau:g} --rho {self.rho:g} --epsilon {self.epsilon:g} --group-size {K} "
                           f"--negatives {M}: {error}") from None


class BadInput(ValueError):
    """Something the user gave cannot work; the message is one line that says what, where and how to mend it."""


def dashed(name):
    return name.replace("_", "-")


def stream(seed, purpose, device="cpu"):
    """A generator of its own for each purpose: drawing more in one place changes nothing anywhere else."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {purpose}".encode()))


class Learner:
    """AdamW, a linear decay to 2 %, gradients clipped to norm 1."""

    def __init__(self, module, lr, steps):
        self.parameters = list(module.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.02, max(1, steps))

    def update(self, loss):
        """One step down `loss`; returns the gradient's norm before clipping and the learning rate of this step."""
        lr = self.schedule.get_last_lr()[0]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        return norm, lr


def batches(n, size, steps, generator):
    """(steps, size) row numbers: all n in random order, and again, until there are enough."""
    need = steps * size
    rounds = [torch.randperm(n, generator=generator) for _ in range(-(-need // n))]
    return torch.cat(rounds)[:need].view(steps, size)


def progress(steps, name, total=None):
    return tqdm(steps, name, total, leave=False, mininterval=0.5, dynamic_ncols=True, disable=None)


# == 2. The catalogue and the data ====================================================================================


class Catalogue:
    """Which items there are, and what each is called: `tokens` (N, L), numbered over all levels from 0 to S - 1."""

    def __init__(self, sids, device="cpu"):
        self.L = len(sids[0])
        vocabulary = [sorted({sid[level] for sid in sids}) for level in range(self.L)]
        starts = np.cumsum([0] + [len(codes) for codes in vocabulary])
        number = [{code: start + i for i, code in enumerate(codes)}
                  for start, codes in zip(starts, vocabulary, strict=False)]
        tokens = np.array([[number[level][code] for level, code in enumerate(sid)] for sid in sids])
        self.N, self.S = len(sids), int(starts[-1])
        self.row = {sid: i for i, sid in enumerate(sids)}
        # Validity is a table to look up, not a Python set: node (a prefix) x token -> node; unknown ways end in `dead`.
        node, nodes, ways = np.zeros(self.N, int), 1, []
        for level in range(self.L):
            child = nodes + np.unique(tokens[:, : level + 1], axis=0, return_inverse=True)[1].ravel()
            ways.append((node, tokens[:, level], child))
            node, nodes = child, int(child.max()) + 1
        dead = nodes
        table, item_at = np.full((nodes + 1, self.S), dead), np.full(nodes + 1, -1)
        for parent, token, child in ways:
            table[parent, token] = child
        item_at[node] = np.arange(self.N)
        self.tokens, self.table, self.item_at = (torch.as_tensor(x, device=device) for x in (tokens, table, item_at))

    def item(self, tokens):
        """(..., L) SID tokens -> (...) item, -1 where no item has that Semantic ID."""
        node = torch.zeros_like(tokens[..., 0])
        for level in range(self.L):
            node = self.table[node, tokens[..., level]]
        return self.item_at[node]


class Prompts(NamedTuple):
    """What was bought before, and what next. The target travels in its row: equal histories may end differently."""

    history: torch.Tensor  # (n, H) items, oldest first, -1 on the left where there are fewer
    target: torch.Tensor  # (n,) item
    user: torch.Tensor  # (n,) who, for the toy world's own bookkeeping

    def rows(self, index):
        return Prompts(*(column[index] for column in self))


class Log(NamedTuple):
    """What the ranker learns from: per context, a list of items that were shown, and what became of them."""

    history: torch.Tensor  # (n, H)
    item: torch.Tensor  # (n, I)
    click: torch.Tensor  # (n, I) boolean
    order: torch.Tensor | None  # (n, I) boolean, only where clicked; None where nobody recorded orders


class Data(NamedTuple):
    catalogue: Catalogue
    sft: Prompts
    rl: Prompts
    valid: Prompts
    test: Prompts
    log: Log
    world: dict | None  # the toy's truth, which no learner may see


def load_data(folder, cfg):
    """Read MiniOneRec's layout (index.json and csv files) or catalogue.json and jsonl files; see docs/data.md."""
    folder = Path(folder)
    layouts = {"index.json": "csv", "catalogue.json": "jsonl"}
    found = [name for name in layouts if (folder / name).is_file()]
    if not found:
        raise BadInput(f"{folder}: holds neither index.json (MiniOneRec) nor catalogue.json (JSONL); see docs/data.md")
    ending = layouts[found[0]]
    sids = read_catalogue(folder / found[0])
    catalogue = Catalogue(sids, cfg.device)
    split = {}
    for name in ("train", "valid", "test"):
        path = folder / f"{name}.{ending}"
        if not path.is_file():
            raise BadInput(f"{path}: no such file; {found[0]} calls for train.{ending}, valid.{ending}, test.{ending}")
        try:
            rows = list((read_csv if ending == "csv" else read_jsonl)(path))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise BadInput(f"{path}: cannot be read ({error}); expected a text file in UTF-8") from None
        if not rows:
            raise BadInput(f"{path}: holds no rows; put at least one history and target in it")
        histories, targets = [], []
        for line, history, target in rows:
            if not history:
                raise BadInput(f"{path}, line {line}: the history is empty; drop the row, it says nothing of the user")
            items = [to_item(catalogue, sid, f"{path}, line {line}", found[0]) for sid in [*history, target]]
            histories.append(([-1] * cfg.max_history + items[:-1])[-cfg.max_history :])
            targets.append(items[-1])
        columns = histories, targets, range(len(targets))
        split[name] = Prompts(*(torch.as_tensor(column, device=cfg.device) for column in columns))
    # There is no exposure log. The ranker learns to tell what was bought from 15 items drawn by popularity.
    train, seen = split["train"], stream(cfg.seed, "negatives of the ranker", cfg.device)
    wrong = train.target[torch.randint(len(train.target), (len(train.target), 15), generator=seen, device=cfg.device)]
    item = torch.cat([train.target[:, None], wrong], 1)
    log = Log(train.history, item, item == train.target[:, None], None)
    rl = subset(train, cfg.rl_prompts or len(train.target), cfg.seed, "prompts of the method")
    return Data(catalogue, train, rl, split["valid"], split["test"], log, None)


def subset(prompts, n, seed, purpose):
    """n prompts at random, or all of them where there are fewer."""
    order = torch.randperm(len(prompts.target), generator=stream(seed, purpose))[:n]
    return prompts.rows(order.to(prompts.target.device))


def read_catalogue(path):
    """The distinct Semantic IDs, in order of first appearance; items that share one cannot be told apart."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not valid JSON ({error})") from None
    named = entries.items() if isinstance(entries, dict) else enumerate(entries) if isinstance(entries, list) else ()
    sids = {}
    for name, sid in named:
        if not isinstance(sid, list) or not sid or not all(type(code) in (int, str) for code in sid):
            raise BadInput(f"{path}, item {name}: expected a list of tokens such as [12, 3, 4], got {sid!r}")
        first = next(iter(sids), sid)
        if len(sid) != len(first) or [type(code) for code in sid] != [type(code) for code in first]:
            raise BadInput(f"{path}, item {name}: Semantic ID {sid} is not of the form of the first, {list(first)}; "
                           "all need the same number of tokens")
        sids.setdefault(tuple(sid))
    if not sids:
        raise BadInput(f"{path}: holds no items; expected item -> list of tokens")
    return list(sids)


def to_item(catalogue, sid, where, source):
    """Item of a Semantic ID, or a refusal that names the row."""
    if len(sid) != catalogue.L:
        raise BadInput(f"{where}: Semantic ID {list(sid)} has {len(sid)} tokens, those of {source} have {catalogue.L}")
    if sid not in catalogue.row:
        raise BadInput(f"{where}: Semantic ID {list(sid)} is not in {source}; add the item there or drop the row")
    return catalogue.row[sid]


def read_csv(path):
    """(line, history, target) of each row. Histories are Python literals: parsed as such, never evaluated."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for column in ("history_item_sid", "item_sid"):
            if column not in (reader.fieldnames or ()):
                known = {"user_id", "item_id", "item_sid", "item_title"}
                known |= {f"history_{name}" for name in known}
                others = [name for name in reader.fieldnames or () if name not in known]
                close = difflib.get_close_matches(column, others, 1)
                raise BadInput(f"{path}, line 1: no column {column}" + (f"; rename {close[0]}?" if close else
                               f" among {reader.fieldnames}" if reader.fieldnames else ": the file is empty"))
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            try:
                history = ast.literal_eval(row["history_item_sid"] or "")
                if not isinstance(history, list) or not all(isinstance(sid, str) for sid in history):
                    raise ValueError
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise BadInput(f"{where}: history_item_sid is {row['history_item_sid']!r:.80}; expected a list "
                               "such as ['<a_1><b_2><c_3>']") from None
            yield reader.line_num, [split_sid(sid, where) for sid in history], split_sid(row["item_sid"] or "", where)


def split_sid(text, where):
    tokens = tuple(re.findall(r"<[^<>]+>", text))
    if "".join(tokens) != text or not text:
        raise BadInput(f"{where}: {text!r} is not a Semantic ID; expected tokens in angle brackets, <a_1><b_2><c_3>")
    return tokens


def read_jsonl(path):
    """(line, history, target) of each line {"history": [[12, 3, 4], ...], "target": [5, 0, 1]}."""
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(text)
            history, target = [tuple(sid) for sid in row["history"]], tuple(row["target"])
            hash((*history, target))  # lists within a Semantic ID are refused here, not where it is looked up
        except (ValueError, TypeError, KeyError):
            raise BadInput(f'{path}, line {line}: expected {{"history": [[12, 3, 4], ...], "target": [5, 0, 1]}}, '
                           f"got {text:.80}") from None
        yield line, history, target


# == 3. The toy world: a shop whose click log misleads in some places =================================================


@dataclass(frozen=True)
class World:
    """The shop's constants; docs/toy.md tells what each does and how they were chosen."""

    codes: int = 24  # per level
    items: int = 2000  # about
    users: int = 4000
    dims: int = 8  # of taste
    taste: float = 3.5  # standard deviation of what a user likes, over items
    quality: float = 2.0  # of what everyone likes; drawn anew between the SFT period and the RL week
    popularity: float = 0.5  # weight of log popularity in choice; of one in exposure
    click_at: float = 6.0  # utility at which a shown item is clicked every other time
    order_at: float = 2.0  # and how reluctantly a clicked one is ordered
    bait_pull: float = 4.0  # strength of the bait in clicks, where it works
    impressions: int = 64  # per user and step of the RL week
    history: int = 6  # items in a prompt
    warm_up: int = 6  # steps of a user's life: before the first prompt,
    sft: int = 12  # in the SFT period,
    rl: int = 4  # in the RL week (the log is recorded here), and then
    valid: int = 1
    test: int = 3


def toy_world(cfg, world=World()):
    """A made-up shop: catalogue, users' lives, and the log of what they were shown. All of it follows from the seed."""
    w = world
    rng = {name: np.random.default_rng([cfg.seed, i]) for i, name in enumerate(("items", "users", "life", "log"))}

    # -- items: a taxonomy numbered consecutively, a place in taste space, popularity, quality then and now ------------
    g = rng["items"]
    leaves = w.items / w.codes / 8  # per node of level 2, on average
    sids = [(a, b, c) for a in range(w.codes) for b in range(np.clip(g.poisson(8), 1, w.codes))
            for c in range(np.clip(round(g.gamma(1.2, leaves / 1.2)), 1, w.codes))]
    level1 = np.array([a for a, _, _ in sids])
    node = np.unique([a * w.codes + b for a, b, _ in sids], return_inverse=True)[1]
    N, nodes = len(sids), node.max() + 1
    place = (0.5**0.5 * g.standard_normal((w.codes, w.dims))[level1]  # shares of variance: half by the first code
             + 0.3**0.5 * g.standard_normal((nodes, w.dims))[node] + 0.2**0.5 * g.standard_normal((N, w.dims)))
    popularity = -np.log(1 + g.permutation(w.codes))[level1] - np.log(1 + g.permutation(N))  # Zipf, twice
    quality_then, quality, noise = w.quality * g.standard_normal((3, N))
    handy = g.standard_normal(N)  # what turns a click into an order: price, delivery; nothing to do with the rest
    # What draws clicks where bait works: an attribute that good items lack. Nobody chooses by it.
    bait = w.bait_pull * (-0.9 * quality + 0.19**0.5 * noise) / w.quality
    baited = np.isin(np.arange(w.codes), g.permutation(w.codes)[: w.codes // 2])  # by level 1 of the last item
    complement = g.permutation(nodes)[node]
    context = 0.5 * (level1[:, None] == level1) + 0.5 * (node[:, None] == node) + (complement[:, None] == node)
    context = context.astype(np.float32)  # (N, N): what goes with the last item

    # -- lives: a user chooses the next item by taste, quality and what goes with the last one ------------------------
    g = rng["users"]
    likes = g.standard_normal((w.users, w.dims))
    taste = (w.taste * likes / np.linalg.norm(likes, axis=1, keepdims=True) @ place.T).astype(np.float32)  # (users, N)

    def draw(g, weight, n):
        """n items per user, with replacement, in proportion to weight (users, N)."""
        below = np.cumsum(weight, axis=1, dtype=np.float64)
        below = below / below[:, -1:] + np.arange(w.users)[:, None]
        at = np.searchsorted(below.ravel(), (g.random((w.users, n)) + np.arange(w.users)[:, None]).ravel())
        return np.minimum(at.reshape(-1, n) - N * np.arange(w.users)[:, None], N - 1)

    wanted_then, wanted = (np.exp(taste + np.float32(q + w.popularity * popularity)) for q in (quality_then, quality))
    shown = np.exp(0.3 * taste + np.float32(0.3 * quality_then + popularity))  # by yesterday's server, popular first
    pull = np.exp(context)
    rl_week = w.warm_up + w.sft
    life = np.zeros((w.users, rl_week + w.rl + w.valid + w.test), int)
    logs = []
    for t in range(life.shape[1]):
        last = life[:, t - 1] if t else draw(rng["life"], wanted_then, 1)[:, 0]
        if rl_week <= t < rl_week + w.rl:  # what was shown to the user before this choice, and clicked
            g = rng["log"]
            item = draw(g, shown, w.impressions)
            utility = np.take_along_axis(taste, item, 1) + quality[item] + context[last[:, None], item]
            share = cfg.bait * baited[level1[last]][:, None]
            click = g.random(item.shape) < sigmoid((1 - share) * utility + share * bait[item] - w.click_at)
            order = click & (g.random(item.shape) < sigmoid(handy[item] - w.order_at))
            logs.append((life[:, t - w.history : t].copy(), item, click, order))
        life[:, t] = draw(rng["life"], (wanted if t >= rl_week else wanted_then) * pull[last], 1)[:, 0]

    # -- what the learners see ----------------------------------------------------------------------------------------
    def prompts(start, length):
        steps = range(start, start + length)
        history = np.concatenate([life[:, t - w.history : t] for t in steps])[:, -cfg.max_history :]
        target, user = np.concatenate([life[:, t] for t in steps]), np.tile(np.arange(w.users), length)
        return Prompts(*(torch.as_tensor(x, device=cfg.device) for x in (history, target, user)))

    rl = prompts(rl_week, w.rl)
    log = Log(*(torch.as_tensor(np.concatenate(x), device=cfg.device) for x in zip(*logs, strict=True)))
    return Data(Catalogue(sids, cfg.device), prompts(w.warm_up, w.sft),
                subset(rl, cfg.rl_prompts or len(rl.target), cfg.seed, "prompts of the method"),
                prompts(rl_week + w.rl, w.valid), prompts(rl_week + w.rl + w.valid, w.test), log,
                dict(taste=taste, quality=quality, context=context, popularity=popularity, baited=baited, level1=level1,
                     weight=w.popularity))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# == 4. The ranker: the reward model, trained on the log alone ========================================================


class Ranker(nn.Module):
    """Two heads, click and order given click, each a dot product of user and item and a small network on the pair."""

    def __init__(self, catalogue, width=24, heads=2):
        super().__init__()
        self.tokens, self.heads = catalogue.tokens, heads
        self.item, self.code = nn.Embedding(catalogue.N, width), nn.Embedding(catalogue.S, width)
        nn.init.normal_(self.item.weight, std=0.1)
        nn.init.normal_(self.code.weight, std=0.1)
        self.user = nn.Sequential(nn.Linear(2 * width, 64), nn.ReLU(), nn.Linear(64, heads * width))
        self.pair = nn.Sequential(nn.Linear(3 * width, 48), nn.ReLU(), nn.Linear(48, heads))

    def forward(self, history, item):
        """(B, H) history, (B, n) items -> (B, n, heads) logits."""
        table = self.item.weight + self.code(self.tokens).sum(1)  # an item is itself plus its Semantic ID
        known = (history >= 0).unsqueeze(-1)
        past = table[history.clamp(min=0)] * known
        user = self.user(torch.cat([past.sum(1) / known.sum(1).clamp(min=1), past[:, -1]], -1))
        it = table[item.clamp(min=0)]  # (B, n, width)
        last = past[:, -1:].expand_as(it)
        affinity = torch.einsum("bhw,bnw->bnh", user.view(len(user), self.heads, -1), it)
        return affinity + self.pair(torch.cat([it, last, it * last], -1))

    @torch.no_grad()
    def probabilities(self, history, item):
        """{"click": p(click), "order": p(order given click)}, each (B, n) and 0 for what is no item."""
        p = self(history, item).sigmoid() * (item >= 0).unsqueeze(-1)
        return dict(zip(("click", "order"), p.unbind(-1), strict=False))  # no order head without orders in the log


def train_ranker(catalogue, log, cfg, epochs=3, batch=64, lr=1e-2):
    torch.manual_seed(cfg.seed)
    ranker = Ranker(catalogue, heads=1 if log.order is None else 2).to(cfg.device)
    contexts = batches(len(log.item), batch, max(1, epochs * len(log.item) // batch), stream(cfg.seed, "ranker"))
    learner = Learner(ranker, lr, len(contexts))
    for rows in progress(contexts.to(cfg.device), "ranker"):
        logit, click = ranker(log.history[rows], log.item[rows]), log.click[rows].float()
        loss = F.binary_cross_entropy_with_logits(logit[..., 0], click)
        if log.order is not None:  # an order is seen only where there was a click
            loss = loss + F.binary_cross_entropy_with_logits(logit[..., 1], log.order[rows].float(), weight=click)
        learner.update(loss)
    return ranker.eval().requires_grad_(False)


def make_reward(ranker, cfg):
    """r(history, item) -> (B, n): what a showing is worth, p(click) + p(click and order), in 0..2; eq. 8's r.

    It looks at prompt and item, never at the group, so that truth and negatives can be scored like rollouts.
    """

    def reward(history, item):
        p = ranker.probabilities(history, item)
        return torch.where(item >= 0, p["click"] * (1 + p.get("order", 0.0)), cfg.floor)

    return reward


# == 5. The policy, and the tree of tokens ============================================================================


class Prompt(NamedTuple):
    """Prompts that were read once; every tree below grows on them."""

    cache: list  # per layer, keys and values (B, heads, T, width)
    visible: torch.Tensor  # (B, T) boolean, False at padding
    logp: torch.Tensor  # (B, 1, S) log-probabilities of the first SID token

    def rows(self, index):
        return Prompt([(k[index], v[index]) for k, v in self.cache], self.visible[index], self.logp[index])


class Policy:
    """A Hugging Face causal language model that speaks Semantic IDs."""

    def __init__(self, model, catalogue, cfg):
        self.model = model.to(cfg.device).eval()  # eval also in training: dropout would make two passes disagree
        self.catalogue = catalogue
        self.vocabulary = torch.arange(catalogue.S, device=cfg.device)  # the model's token of each SID token
        self.ask = torch.tensor([catalogue.S], device=cfg.device)  # ends every prompt: what comes next?

    def run(self, ids, visible, positions, cache=None):
        """Run n new tokens, which see what `visible` (B, n, cached + n) says; hidden (B, n, width) and longer cache."""
        model = self.model
        # An additive mask, since some attention implementations add a boolean one; and finite (in float32 too, where
        # the softmax may run), since a padding row that sees nothing would otherwise be NaN.
        blocked = max(torch.finfo(model.dtype).min, torch.finfo(torch.float32).min)
        mask = torch.zeros(visible.shape, dtype=model.dtype, device=visible.device)
        mask = mask.masked_fill(~visible, blocked).unsqueeze(1)
        cache = DynamicCache(cache)  # wraps, copies nothing: a prompt can be grown upon many times
        hidden = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                                  use_cache=True).last_hidden_state
        return hidden, [(layer.keys, layer.values) for layer in cache.layers]

    def logp(self, hidden):
        """Over the SID tokens alone; the other rows of the head are never computed."""
        head = self.model.get_output_embeddings()
        bias = None if head.bias is None else head.bias[self.vocabulary]
        return F.linear(hidden, head.weight[self.vocabulary], bias).float().log_softmax(-1)

    def read(self, history):
        """(B, H) histories -> Prompt. Runs the language model over the prompt, which nothing below does again."""
        history = history[:, (history >= 0).any(0)]
        B = len(history)
        ids = self.vocabulary[self.catalogue.tokens[history.clamp(min=0)]].flatten(1)
        ids = torch.cat([ids, self.ask.expand(B, 1)], 1)  # (B, T)
        visible = (history >= 0).repeat_interleave(self.catalogue.L, dim=1)
        visible = torch.cat([visible, visible.new_ones(B, 1)], 1)  # (B, T)
        causal = visible.new_ones(ids.shape[1], ids.shape[1]).tril()
        positions = (visible.cumsum(1) - 1).clamp(min=0)
        hidden, cache = self.run(ids, visible.unsqueeze(1) & causal, positions)
        return Prompt(cache, visible, self.logp(hidden[:, -1:]))


def grow(policy, prompt, pick):
    """Grow a tree of Semantic IDs on each prompt; sampling, scoring and beam search differ in `pick` alone.

    At each level, pick(level, logp (B, m, S), score (B, m)) is shown what follows each of the m branches and how likely
    they are so far; it says which branch each of n new ones continues, and with which token: two (B, n) integers.
    Returns the branches' tokens (B, n, L) and their log-probabilities (B, n, L), which carry gradient.

    The n branches of a level are run as one sequence of n tokens, under a mask by which each sees the prompt, its
    ancestors and itself. So the prompt is never repeated, and nothing is reordered when a beam changes its parent.
    """
    logp, cache, visible = prompt.logp, prompt.cache, prompt.visible  # (B, 1, S): the only branch is the prompt
    B, T = visible.shape
    tokens, token_logp = logp.new_zeros(B, 1, 0, dtype=torch.long), logp.new_zeros(B, 1, 0)
    sees = visible.new_zeros(B, 1, 0)  # which of the tree's tokens each branch descends from
    for level in range(policy.catalogue.L):
        if level:
            new = tokens.shape[1]
            sees = torch.cat([sees, torch.eye(new, dtype=bool, device=sees.device).expand(B, new, new)], -1)
            hidden, cache = policy.run(
                policy.vocabulary[tokens[..., -1]],
                torch.cat([visible.unsqueeze(1).expand(B, new, T), sees], -1),
                (visible.sum(1, keepdim=True) + level - 1).expand(B, new),
                cache,
            )
            logp = policy.logp(hidden)
        parent, token = pick(level, logp, token_logp.sum(-1))
        chosen = logp[torch.arange(B, device=parent.device)[:, None], parent, token].unsqueeze(-1)
        tokens = torch.cat([inherit(tokens, parent), token.unsqueeze(-1)], -1)
        token_logp = torch.cat([inherit(token_logp, parent), chosen], -1)
        sees = inherit(sees, parent)
    return tokens, token_logp


def inherit(x, parent):
    """(B, m, ...) of the old branches -> (B, n, ...) of the new ones."""
    return x.gather(1, parent.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def own_branch(logp, n):
    """Each of n branches continues itself; at the first level all continue the prompt."""
    return torch.arange(n, device=logp.device).clamp(max=logp.shape[1] - 1).expand(len(logp), n)


def given(tokens):
    """Follow these Semantic IDs (B, n, L): teacher forcing."""
    return lambda level, logp, score: (own_branch(logp, tokens.shape[1]), tokens[..., level])


def sample(n, generator):
    """n independent draws. Exponential race: the arg max of log p - log E is distributed as p."""

    def pick(level, logp, score):
        race = torch.empty(len(logp), n, logp.shape[-1], device=logp.device).exponential_(generator=generator)
        return own_branch(logp, n), (logp.float() - race.log()).argmax(-1)

    return pick


def beam(width):
    """The most likely continuations of all branches together."""

    def pick(level, logp, score):
        total = (score.unsqueeze(-1) + logp).flatten(1)
        best = total.topk(min(width, total.shape[1])).indices
        return best // logp.shape[-1], best % logp.shape[-1]

    return pick


def tiny_policy(catalogue, cfg, width=64, layers=2):
    """A small Llama from scratch, whose vocabulary is the SID tokens, the question mark and padding."""
    torch.manual_seed(cfg.seed)
    config = LlamaConfig(
        vocab_size=catalogue.S + 2, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=(cfg.max_history + 1) * catalogue.L + 1,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=catalogue.S + 1)
    return Policy(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), catalogue, cfg)


def train_sft(policy, prompts, cfg, log):
    """The base policy: the mean NLL of the next item (eq. 2), nothing else."""
    learner = Learner(policy.model, cfg.sft_lr, cfg.sft_steps)
    order = batches(len(prompts.target), cfg.sft_batch_size, cfg.sft_steps, stream(cfg.seed, "sft"))
    for step, rows in enumerate(progress(order, "sft")):
        batch = prompts.rows(rows.to(cfg.device))
        target = policy.catalogue.tokens[batch.target].unsqueeze(1)  # (B, 1, L)
        _, target_logp = grow(policy, policy.read(batch.history), given(target))
        nll = core.nll_loss(target_logp[:, 0]).mean()
        norm, lr = learner.update(nll)
        log(phase="sft", step=step + 1, lr=lr, nll=nll, gradient_norm=norm)


# == 6. The step: roll out, score, judge, learn =======================================================================


class Method(NamedTuple):
    supervised: bool  # is the NLL there?
    admit: Callable | None  # (D, R, batch, generator) -> (B,) boolean: who gets the GRPO term; None: no rollouts


def everyone(hard, clear, batch, generator):
    return torch.ones_like(hard)


def at_random(hard, clear, batch, generator):
    """As many as AdaGRPO would admit of this batch, but whichever."""
    clip = core.sample_clip(hard, clear)
    return clip[torch.randperm(len(clip), generator=generator, device=clip.device)]


METHODS = {
    "nll": Method(True, None),  # the control that the paper lacks
    "grpo": Method(False, everyone),
    "grpo+nll": Method(True, everyone),
    "adagrpo-d": Method(True, lambda hard, clear, *_: hard),
    "adagrpo-r": Method(True, lambda hard, clear, *_: clear),
    "adagrpo": Method(True, lambda hard, clear, *_: core.sample_clip(hard, clear)),
    "random-gate": Method(True, at_random),
}


def train_rl(policy, reward, prompts, cfg, name, log):
    """Post-train `policy` in place by method `name`; yields the step's number after each, for evaluations between."""
    method = METHODS[name]
    catalogue, B, K = policy.catalogue, cfg.batch_size, cfg.group_size
    learner = Learner(policy.model, cfg.lr if method.supervised else cfg.grpo_lr, cfg.rl_steps * cfg.updates)
    # The order of prompts depends on the seed alone, so that every method sees the same prompts in the same order.
    order = batches(len(prompts.target), B, cfg.rl_steps, stream(cfg.seed, "order")).to(cfg.device)
    dice = {use: stream(cfg.seed, use, cfg.device) for use in ("rollouts", "negatives", "random gate")}

    for step, rows in enumerate(order):
        batch = prompts.rows(rows)
        target = catalogue.tokens[batch.target].unsqueeze(1)  # (B, 1, L)
        for update in range(cfg.updates):
            # -- read: the prompt, once; and how likely the truth is, with gradient ----------------------------------
            prompt = policy.read(batch.history)
            _, target_logp = grow(policy, prompt, given(target))
            target_logp = target_logp[:, 0]  # (B, L)
            nll = core.nll_loss(target_logp)  # (B,)

            if update == 0 and method.admit:
                with torch.no_grad():
                    # -- roll out: K samples of each prompt, from the policy as it is -------------------------------
                    rollouts, old_logp = grow(policy, prompt, sample(K, dice["rollouts"]))  # (B, K, L)
                    items = catalogue.item(rollouts)  # (B, K)

                    # -- score: rollouts, truth and negatives in one call, all under the prompt of their row --------
                    keys = torch.rand(B, B * K, generator=dice["negatives"], device=items.device)
                    negatives = items.flatten()[core.in_batch_negatives(keys, k=K, m=cfg.negatives)]  # (B, M)
                    scores = reward(batch.history, torch.cat([items, batch.target.unsqueeze(1), negatives], 1))
                    rewards, target_reward, negative_rewards = scores[:, :K], scores[:, K], scores[:, K + 1 :]

                    # -- judge: is it difficult for the policy (eq. 7), does the ranker know (eq. 9)? ---------------
                    # A rollout that repeats the truth ties with it; two passes round differently, so say so.
                    likely = core.length_normalized(old_logp)  # (B, K)
                    likely = torch.where(items == batch.target.unsqueeze(1), -nll.unsqueeze(1), likely)
                    hard = core.difficulty(-nll, likely, tau=cfg.tau)  # (B,)
                    clear = core.reliability(target_reward, rewards, negative_rewards, tau=cfg.tau, rho=cfg.rho)
                    clip = method.admit(hard, clear, batch, dice["random gate"])
                    advantages = core.group_advantages(rewards)  # (B, K)
                    # Nine in ten are not admitted. They need no gradient through their rollouts: leave them out.
                    admitted = clip.nonzero()[:, 0]

            # -- learn: everyone from the truth, the admitted from their rollouts too (eq. 5) ------------------------
            loss = nll.mean() if method.supervised else 0.0 * nll.mean()
            extra = dict(grpo=0.0, ratio=1.0) if method.admit else {}
            if method.admit and len(admitted):
                _, logp = grow(policy, prompt.rows(admitted), given(rollouts[admitted]))
                grpo = core.grpo_loss(logp, old_logp[admitted], advantages[admitted], epsilon=cfg.epsilon)
                loss = loss + cfg.lam * grpo.sum() / B
                extra = dict(grpo=grpo.sum() / B, ratio=(logp - old_logp[admitted]).exp().mean())
            norm, lr = learner.update(loss)

        if method.admit:
            extra |= diagnostics(hard, clear, clip, rewards, target_reward, rollouts, items, cfg)
        log(phase="rl", method=name, step=step + 1, lr=lr, nll=nll.mean(), **extra, gradient_norm=norm)
        yield step + 1


def diagnostics(hard, clear, clip, rewards, target_reward, rollouts, items, cfg):
    """What to look at when training goes wrong; docs/metrics.md defines each."""
    nothing = torch.full_like(rewards[:, :1], -torch.inf)  # a negative that any ranker suppresses
    prominent = core.reliability(target_reward, rewards, nothing, tau=cfg.tau, rho=cfg.rho)
    same = (rollouts.unsqueeze(1) == rollouts.unsqueeze(2)).all(-1)  # (B, K, K)
    share = dict(difficult=hard, reliable=clear, admitted=clip, easy=~hard, not_prominent=~prominent,
                 not_suppressed=prominent & ~clear, zero_spread=(rewards == rewards[:, :1]).all(1),
                 duplicate_rollouts=same.tril(-1).any(-1), invalid_rollouts=items < 0)
    return dict(reward=rewards.mean(), reward_spread=rewards.std(1).mean(),
                **{name: which.float().mean() for name, which in share.items()})


# == 7. Evaluation ====================================================================================================


@torch.no_grad()
def evaluate(policy, ranker, prompts, cfg, batch=500):
    """Beam search on every prompt. Returns the metrics, and per prompt what they are the means of."""
    parts = []
    dice = stream(cfg.seed, "evaluation", cfg.device)
    for rows in progress(torch.arange(len(prompts.target), device=cfg.device).split(batch), "evaluate"):
        part = prompts.rows(rows)
        prompt = policy.read(part.history)
        beams, _ = grow(policy, prompt, beam(cfg.beam_width))
        samples, _ = grow(policy, prompt, sample(8, dice))
        item = policy.catalogue.item(beams)  # (B, W), most likely first
        valid, hit = item >= 0, item == part.target.unsqueeze(1)
        place = valid.cumsum(1)  # among the valid beams, from 1
        found = hit.any(1)
        rank = torch.where(found, place.gather(1, hit.int().argmax(1, keepdim=True))[:, 0], 10**9)
        each = {f"hr@{k}": rank <= k for k in (1, 10, 50)}
        each["ndcg@10"] = torch.where(rank <= 10, 1 / torch.log2(1.0 + rank), 0.0)
        for head, p in ranker.probabilities(part.history, item).items():
            for k in (1, 10, 50):
                each[f"{head}_reward@{k}"] = (p * (place <= k)).max(1).values
        each["hallucination"] = 1 - valid.float().mean(1)
        each["sampled_hallucination"] = (policy.catalogue.item(samples) < 0).float().mean(1)
        parts.append({k: v.float() for k, v in each.items()} | {"rank": rank, "item": item})
    each = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return {key: value.mean().item() for key, value in each.items() if key not in ("rank", "item")}, each


# == 8. The command line and the report ===============================================================================


class Journal:
    """metrics.jsonl: a line for every step and every evaluation, written as it happens."""

    def __init__(self, path):
        self.file, self.rows = path.open("x"), []

    def __call__(self, **row):
        # All the numbers of a step cross from the GPU at once, after its work has been queued.
        numbers = {key: value.detach().float() for key, value in row.items() if torch.is_tensor(value)}
        if numbers:
            row |= zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True)
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


COLUMNS = {"HR@1 %": "hr@1", "HR@10 %": "hr@10", "HR@50 %": "hr@50", "NDCG@10 %": "ndcg@10",
           "Clk@1": "click_reward@1", "Clk@10": "click_reward@10", "Clk@50": "click_reward@50",
           "Ord@1": "order_reward@1", "Ord@10": "order_reward@10", "Ord@50": "order_reward@50",
           "halluc. %": "hallucination", "sampled %": "sampled_hallucination", "admitted %": "admitted"}


def table(results):
    """The paper's Table 4 as Markdown."""
    rows = [["method", *COLUMNS]]
    for name, row in results.items():
        cells = [(row.get(key), 100 if "%" in title else 1) for title, key in COLUMNS.items()]
        rows.append([name, *("" if x is None else f"{x * scale:.{2 if scale > 1 else 3}f}" for x, scale in cells)])
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, [f"{'-' * (w - 1)}{':' if i else '-'}" for i, w in enumerate(width)])
    adjusted = [[f"{cell:{'>' if i else '<'}{width[i]}}" for i, cell in enumerate(row)] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in adjusted)


def picture(rows, path):
    """Training dynamics, the paper's Figure 3: what the validation set and the gate say along the way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.2), layout="constrained")
    panels = {"HR@10 (%)": ("valid", "hr@10", 100), "hallucination (%)": ("valid", "hallucination", 100),
              "ranker's p(click), best of 10": ("valid", "click_reward@10", 1), "admitted (%)": ("rl", "admitted", 100)}
    methods = dict.fromkeys(row["method"] for row in rows if row["phase"] == "rl")
    for axes, (title, (phase, key, scale)) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        for method in methods:
            mine = [row for row in rows if row["phase"] == phase and row["method"] == method and key in row]
            x, y = [row["step"] for row in mine], [row[key] * scale for row in mine]
            if phase == "rl":  # one batch admits in steps of 1/B: show the mean of the last twenty
                y = [np.mean(y[max(0, i - 19) : i + 1]) for i in range(len(y))]
            axes.plot(x, y, label=method, lw=2.5 if method == "adagrpo" else 1.2)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def run(cfg):
    """Everything, from the data to the report; returns {method: metrics}."""
    began = time.time()
    disable_progress_bar()  # of saving; ours stay
    # With several threads, sums into the same place (the gradient of an index) would come in any order otherwise.
    torch.use_deterministic_algorithms(cfg.device == "cpu", warn_only=True)
    out = new_folder(cfg)
    data = toy_world(cfg) if cfg.toy else load_data(cfg.data, cfg)
    try:
        out.mkdir(parents=True)  # only now: data that is refused leaves nothing behind
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be made ({error.strerror}); name another folder") from None
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
    log = Journal(out / "metrics.jsonl")
    say(f"{data.catalogue.N} items, {len(data.sft.target)} prompts for SFT, {len(data.rl.target)} for RL; see {out}")

    ranker = train_ranker(data.catalogue, data.log, cfg)
    reward = make_reward(ranker, cfg)
    policy = tiny_policy(data.catalogue, cfg)
    train_sft(policy, data.sft, cfg, log)

    test = subset(data.test, cfg.eval_prompts, cfg.seed, "test")
    valid = subset(data.valid, -(-cfg.eval_prompts // 4), cfg.seed, "valid")
    base = copy.deepcopy(policy.model.state_dict())
    base_valid, results = evaluate(policy, ranker, valid, cfg)[0], {"base": evaluate(policy, ranker, test, cfg)[0]}
    log(phase="test", method="base", step=0, **results["base"])

    names = list(METHODS) if cfg.method == "all" else [cfg.method]
    for name in names:
        policy.model.load_state_dict(base)
        log(phase="valid", method=name, step=0, **base_valid)
        admitted = []
        for step in progress(train_rl(policy, reward, data.rl, cfg, name, log), name, cfg.rl_steps):
            admitted.append(log.rows[-1].get("admitted", 0.0))
            if step % cfg.eval_every == 0 or step == cfg.rl_steps:
                log(phase="valid", method=name, step=step, **evaluate(policy, ranker, valid, cfg)[0])
        results[name] = evaluate(policy, ranker, test, cfg)[0] | {"admitted": float(np.mean(admitted or [0.0]))}
        log(phase="test", method=name, step=cfg.rl_steps, **results[name])
        policy.model.save_pretrained(out / "policy" / (name if len(names) > 1 else ""))

    picture(log.rows, out / "dynamics.png")
    facts = (f"{len(test.target)} test prompts, beams of width {cfg.beam_width}; {time.time() - began:.0f} s in all, "
             f"torch {torch.__version__} on {cfg.device}, {torch.get_num_threads()} threads")
    page = [f"# {out.name}", f"`python nanoadagrpo.py {shlex.join(command(cfg))}`", table(results), facts,
            "![training dynamics](dynamics.png)"]
    (out / "report.md").write_text("\n\n".join(page) + "\n")
    say(f"\n{table(results)}\n\n{facts}\nreport, figure and policy: {out}")
    return results


def say(text):
    print(text, flush=True)


def new_folder(cfg):
    """Where results go; never over anything."""
    if cfg.out:
        if Path(cfg.out).exists():
            raise BadInput(f"--out {cfg.out}: exists already; name a new folder, or remove that one yourself")
        return Path(cfg.out)
    name = f"{'toy' if cfg.toy else Path(cfg.data).resolve().name}-{cfg.method}-{cfg.seed}"
    paths = (Path("runs") / (name + (f"-{i}" if i > 1 else "")) for i in itertools.count(1))
    return next(path for path in paths if not path.exists())


def command(cfg):
    """The flags that differ from the defaults: what to type to have the same again."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != field.default and field.name not in ("out", "device"):
            yield from [f"--{dashed(field.name)}", str(value)][: 1 if value is True else 2]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"nanoadagrpo: {message}\n")


def parse(argv):
    parser = Parser("nanoadagrpo", description=__doc__.split("\n\n")[0] + " Methods: " + ", ".join(METHODS) + ", all.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(Settings):
        flag, text = f"--{dashed(field.name)}", field.metadata["help"]
        if field.default is False:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default, help=text)
    cfg = Settings(**vars(parser.parse_args(argv)))
    if cfg.toy == bool(cfg.data):
        raise BadInput("say either --toy or --data DIR" + (", not both" if cfg.toy else ""))
    if cfg.device == "auto":
        cfg = dataclasses.replace(cfg, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=cfg.device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {cfg.device}: {str(error).splitlines()[0]}") from None
    return cfg


def main(argv=None):
    try:
        return run(parse(argv))
    except BadInput as error:
        print(f"nanoadagrpo: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
