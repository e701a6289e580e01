# SPDX-License-Identifier: MIT
"""nanoadagrpo: AdaGRPO (arXiv 2606.08480) end to end, in one file to be read from top to bottom.

A generative recommender is a language model that writes the next item as a Semantic ID: L tokens, from coarse to
fine. Reinforcement learning can teach it what a ranker knows, but the ranker, trained on what was shown and clicked,
is wrong in places and does not say where. AdaGRPO asks before it listens: every sample is supervised; the policy
gradient is added only for a sample that the policy finds difficult (D) and whose truth the ranker picks out (R).

    python nanoadagrpo.py --toy                       # a made-up shop, one method, under a minute on a laptop
    python nanoadagrpo.py --toy --method all          # every method from the same start, side by side
    python nanoadagrpo.py --data DIR                  # your data: MiniOneRec's layout or JSONL (docs/data.md)
    python nanoadagrpo.py --data DIR --model MODEL    # from a Hugging Face model on; resuming, GPUs: docs/models.md

The mathematics is imported from `adagrpo_core`; nothing of it is written twice. Reading order: 1 settings,
2 catalogue and data, 3 the toy world, 4 the ranker, 5 the policy and its tree of tokens, 6 the step, 7 evaluation,
8 the command line. In a hurry, read `grow` (5) and `train_rl` (6).

Where this differs from the paper, or the paper is silent:
 1. The paper's data, ranker and language model are proprietary: here a toy world, or public data, stand in.
 2. lambda, epsilon and the learning rate are not given, K and M not legible in the text we had: the defaults are ours,
    chosen on seeds 0-9 of the toy.
 3. Rollouts are sampled from the policy being trained, one update per rollout, so the ratio of eq. 4 starts at 1.
    `--updates 2` takes a second step on the same rollouts; only then does `--epsilon` have something to clip.
 4. The softmax runs over the catalogue's SID tokens only, all levels together: in training, sampling and evaluation.
    A token of the wrong level, or a combination that no item has, is a hallucination. Nothing is constrained.
 5. A hallucination cannot be scored by the ranker. It gets a fixed reward, `--floor`. A negative that is none gets it
    too, and so counts as suppressed without asking the ranker anything.
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
import contextlib
import csv
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
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
    model: str = option("", "causal language model to start from, hub name or folder (default: a tiny new one)")
    method: str = option("adagrpo", "one of the methods above, several with commas between them, or all")
    seed: int = option(0, "decides everything random; equal seeds give equal numbers on a CPU")
    out: str = option("", "folder for the results, must not exist yet (default: a new one under runs/)")
    resume: str = option("", "folder of a run that was stopped: go on from its last checkpoint")
    save_every: int = option(100, "steps between two checkpoints; 0 makes none")
    log_to: str = option("", "tensorboard, wandb or trackio, beside metrics.jsonl")
    device: str = option("auto", "cpu, cuda, cuda:1 ..., or auto: a GPU where there is one")
    dtype: str = option("auto", "of products: float32, bfloat16, or auto: bfloat16 for --model on a GPU that has it")
    sft_steps: int = option(400, "supervised steps that make the base policy")
    sft_batch_size: int = option(128, "prompts per supervised step")
    sft_lr: float = option(3e-3, "peak learning rate of the supervised steps; for --model rather 3e-4")
    sft_eval_every: int = option(0, "supervised steps between two points of their validation curve; 0: none")
    rl_steps: int = option(200, "steps of --method, each on a fresh batch of rollouts")
    batch_size: int = option(64, "B, prompts per step of --method, of all processes together")
    micro_batch_size: int = option(0, "prompts that one process runs at once; saves memory, changes no loss; 0: all")
    group_size: int = option(16, "K, rollouts per prompt")
    reward: str = option("", "package.module:function to use as reward instead of the ranker (docs/models.md)")
    negatives: int = option(1, "M, negatives per prompt that the ranker must put at the bottom")
    negatives_from: str = option("rollouts", "rollouts (of other prompts), catalogue, or package.module:function")
    lam: float = option(5.0, "lambda, weight of the admitted GRPO term beside the NLL")
    tau: float = option(1 / 3, "top fraction of K: the truth outside it is difficult, inside it (by reward) prominent")
    rho: float = option(0.3, "bottom fraction of K in which the ranker must put every negative; the paper has 0.1")
    epsilon: float = option(0.2, "clip of the ratio in eq. 4; has work to do only with --updates above 1")
    updates: int = option(1, "optimizer steps per batch of rollouts")
    lr: float = option(2e-3, "peak learning rate of --method; for --model rather 3e-5")
    grpo_lr: float = option(5e-5, "the same for pure GRPO, which no NLL holds")
    floor: float = option(0.0, "reward of a rollout that is no item; the ranker's rewards lie in 0..2")
    rl_prompts: int = option(0, "labelled prompts for --method; 0 takes all there are")
    max_history: int = option(10, "items of a history that the policy sees, the most recent ones")
    bait: float = option(1.0, "toy: how far clicks in the baited contexts follow bait instead of taste, 0..1")
    beam_width: int = option(50, "W, beams per prompt in evaluation")
    eval_prompts: int = option(4000, "test prompts at the end; a quarter as many validation prompts along the way")
    eval_every: int = option(50, "steps between two points of the training curve")
    eval_batch_size: int = option(250, "prompts that are evaluated at once")

    def __post_init__(self):
        at_least_1 = {"sft_steps", "sft_batch_size", "rl_steps", "batch_size", "updates", "max_history", "beam_width",
                      "eval_prompts", "eval_every", "eval_batch_size"}
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), 1 if field.name in at_least_1 else 0
            if type(field.default) in (int, float) and field.name != "floor" and not low <= value < float("inf"):
                raise BadInput(f"--{dashed(field.name)} {value}: must be a finite number, {low} or more")
        if self.seed >= 2**63:
            raise BadInput(f"--seed {self.seed}: too large; use a number below 2**63")
        if not (self.bait <= 1 and abs(self.floor) < float("inf")):
            raise BadInput(f"--bait {self.bait} --floor {self.floor}: bait lies between 0 and 1, floor is finite")
        if len(set(names := methods(self))) < len(names):
            raise BadInput(f"--method {self.method}: names a method twice; leave one out")
        for name, value, known in [*(("method", one, [*METHODS, "all"]) for one in names),
                                   ("dtype", self.dtype, ["auto", "float32", "bfloat16"]),
                                   ("log_to", self.log_to, ["", "tensorboard", "wandb", "trackio"])]:
            if value not in known:
                hint = difflib.get_close_matches(value, known, 1)
                raise BadInput(f"--{dashed(name)} {value}: " + (f"did you mean {hint[0]}? " if hint else "")
                               + f"Choose from {', '.join(filter(None, known))}")
        if self.batch_size == 1 and names != ["nll"] and self.negatives_from == "rollouts":
            raise BadInput("--batch-size 1: negatives come from the other prompts of a batch; use 2 or more")
        if self.group_size == 1 and names != ["nll"]:
            raise BadInput("--group-size 1: a rollout is judged by the others of its group; use 3 or more")
        # The core knows which tau, rho, epsilon, K and M cannot work; ask it now instead of after the supervised steps.
        B, K, M = self.batch_size, self.group_size, self.negatives
        try:
            if names != ["nll"]:
                core.group_advantages(np.zeros((1, K)))
                core.reliability(np.zeros(1), np.zeros((1, K)), np.zeros((1, M)), tau=self.tau, rho=self.rho)
                if self.negatives_from == "rollouts":
                    core.in_batch_negatives(np.zeros((B, B * K)), k=K, m=M)
                core.grpo_loss(np.zeros((1, 1, 1)), np.zeros((1, 1, 1)), np.zeros((1, 1)), epsilon=self.epsilon)
        except ValueError as error:
            raise BadInput(f"--tau {self.tau:g} --rho {self.rho:g} --epsilon {self.epsilon:g} --group-size {K} "
                           f"--negatives {M}: {error}") from None


class BadInput(ValueError):
    """Something the user gave cannot work; the message is one line that says what, where and how to mend it."""


def methods(cfg):
    """Their names, in the order in which they are run; each starts from the same base."""
    names = cfg.method.split(",")
    return list(METHODS) if "all" in names else names


def dashed(name):
    return name.replace("_", "-")


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def stream(seed, purpose, device="cpu"):
    """A generator of its own for each purpose: drawing more in one place changes nothing anywhere else."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {purpose}".encode()))


class Learner:
    """AdamW, a linear decay to 2 %, gradients clipped to norm 1; `shared` adds up the gradients of all processes."""

    def __init__(self, module, lr, steps, shared=True):
        self.parameters, self.shared = list(module.parameters()), shared and dist.is_initialized()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.01, fused=True)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.02, max(1, steps))

    def step(self):
        """One step down what was run backward; returns the gradient's norm before clipping and the learning rate."""
        lr = self.schedule.get_last_lr()[0]
        if self.shared:
            for parameter in self.parameters:  # every process needs the same ones, used in its share or not
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, lr


def batches(n, size, steps, generator):
    """(steps, size) row numbers: all n in random order, and again, until there are enough."""
    need = steps * size
    rounds = [torch.randperm(n, generator=generator) for _ in range(-(-need // n))]
    return torch.cat(rounds)[:need].view(steps, size)


def progress(steps, name, total=None):
    return tqdm(steps, name, total, leave=False, mininterval=0.5, dynamic_ncols=True, disable=rank() > 0 or None)


# Several processes (torchrun) all draw the numbers of the whole batch and keep their own rows. What they then gather is
# the batch that one process would have: gate, negatives and metrics are of all of it. Only the first one writes.


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def shares(B, size):
    """Slices of the batch's B rows that this process runs, `size` rows at a time; size 0: all its rows at once."""
    mine = B // (dist.get_world_size() if dist.is_initialized() else 1)
    start, stop, size = rank() * mine, (rank() + 1) * mine, size or mine
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def gather(pieces):
    """The rows of this process, in pieces -> those of the whole batch."""
    mine = torch.cat(pieces)
    if not dist.is_initialized():
        return mine
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine.contiguous())
    return torch.cat(everyone)


def plugin(flag, name):
    """package.module:function -> the function; modules in the current folder are found too."""
    module, _, function = name.partition(":")
    sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"--{flag} {name}: {error}; expected package.module:function, as Python imports it") from None
    finally:
        sys.path.remove(os.getcwd())


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
        # How a language model spells the S tokens: as MiniOneRec does, so that a model of theirs finds its own words.
        codes = [str(code) for level in vocabulary for code in level]
        spelt = [f"<{chr(97 + level)}_{code}>" for level, codes in enumerate(vocabulary) for code in codes]
        self.words = codes if len({c for c in codes if re.fullmatch(r"<\S+>", c)}) == self.S else spelt
        # Validity is looked up in sorted arrays, not in Python sets: per level, the pairs of node (a prefix) and token
        # that lead on. The next node is a pair's place. 8 bytes per prefix; a dense table would take 8 S.
        node, self.ways = np.zeros(self.N, int), []
        for level in range(self.L):
            ways, node = np.unique(node * self.S + tokens[:, level], return_inverse=True)
            self.ways.append(torch.as_tensor(ways, device=device))
        item_at = np.zeros(len(ways), int)
        item_at[node] = np.arange(self.N)
        self.tokens, self.item_at = (torch.as_tensor(x, device=device) for x in (tokens, item_at))

    def item(self, tokens):
        """(..., L) SID tokens -> (...) item, -1 where no item has that Semantic ID."""
        node = torch.zeros_like(tokens[..., 0])
        for level, ways in enumerate(self.ways):
            way = node * self.S + tokens[..., level]
            place = torch.searchsorted(ways, way).clamp(max=len(ways) - 1)
            node = torch.where(ways[place] == way, place, -1)  # a pair of no node is none
        return torch.where(node >= 0, self.item_at[node], -1)


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
# Not the method: skip it at first reading. docs/toy.md gives a reason for every constant.


@dataclass(frozen=True)
class World:
    """The shop's constants; docs/toy.md tells what each does and how they were chosen."""

    codes: int = 24  # per level
    items: int = 2000  # about
    users: int = 4000
    dims: int = 8  # of taste
    taste: float = 3.5  # standard deviation of what a user likes, over items
    quality: float = 2.0  # of what everyone likes; drawn anew between the SFT period and the RL week
    node_share: float = 0.7  # of quality's variance that all items of a level-2 node have in common
    popularity: float = 0.5  # weight of log popularity in choice; of one in exposure
    click_at: float = 6.0  # utility at which a shown item is clicked every other time
    order_at: float = 9.0  # and at which a clicked one is ordered every other time
    bait_pull: float = 4.0  # strength of the bait in clicks, where it works
    impressions: int = 64  # per user and step of the RL week
    history: int = 6  # items in a prompt
    warm_up: int = 6  # steps of a user's life: before the first prompt,
    sft: int = 12  # in the SFT period,
    rl: int = 4  # in the RL week (chosen from what was shown; log and labels are recorded here), and then
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
    popularity = -np.log(1 + g.permutation(N))  # Zipf
    quality_then, quality = w.quality * (w.node_share**0.5 * g.standard_normal((2, nodes))[:, node]
                                         + (1 - w.node_share) ** 0.5 * g.standard_normal((2, N)))
    # What draws clicks where bait works: an attribute that good items lack. Nobody chooses by it.
    bait = w.bait_pull * (-0.9 * quality / w.quality + 0.19**0.5 * g.standard_normal(N))
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
    # Bait works where the last item lies in one of these nodes: drawn until half of all choices fall into them.
    often = np.bincount(node, (wanted / wanted.sum(1, keepdims=True)).mean(0))  # (nodes,) their shares
    drawn = g.permutation(nodes)
    baited = np.isin(np.arange(nodes), drawn[often[drawn].cumsum() - often[drawn] / 2 < 0.5])[node]  # (N,)
    rl_week = w.warm_up + w.sft
    life = np.zeros((w.users, rl_week + w.rl + w.valid + w.test), int)
    logs = []
    for t in range(life.shape[1]):
        last = life[:, t - 1] if t else draw(rng["life"], wanted_then, 1)[:, 0]
        if rl_week <= t < rl_week + w.rl:  # a feed: what is shown, what of it is clicked, what of it is chosen
            g = rng["log"]
            item = draw(g, shown, w.impressions)
            utility = np.take_along_axis(taste, item, 1) + quality[item] + context[last[:, None], item]
            share = cfg.bait * baited[last][:, None]
            appeal = (1 - share) * utility + share * bait[item]
            click = g.random(item.shape) < sigmoid(appeal - w.click_at)
            order = click & (g.random(item.shape) < sigmoid(appeal - w.order_at))
            logs.append((life[:, t - w.history : t].copy(), item, click, order))
            liked = utility + w.popularity * popularity[item] + rng["life"].gumbel(size=item.shape)
            life[:, t] = item[np.arange(w.users), liked.argmax(1)]  # exp(utility) among the shown: no bait
        else:  # of all items
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
        items = self.item.weight + self.code(self.tokens).sum(1)  # an item is itself plus its Semantic ID
        known = (history >= 0).unsqueeze(-1)
        past = items[history.clamp(min=0)] * known
        user = self.user(torch.cat([past.sum(1) / known.sum(1).clamp(min=1), past[:, -1]], -1))
        candidate = items[item.clamp(min=0)]  # (B, n, width)
        last = past[:, -1:].expand_as(candidate)
        affinity = torch.einsum("bhw,bnw->bnh", user.view(len(user), self.heads, -1), candidate)
        return affinity + self.pair(torch.cat([candidate, last, candidate * last], -1))

    @torch.no_grad()
    def probabilities(self, history, item):
        """{"click": p(click), "order": p(order given click)}, each (B, n) and 0 for what is no item."""
        p = self(history, item).sigmoid() * (item >= 0).unsqueeze(-1)
        return dict(zip(("click", "order"), p.unbind(-1), strict=False))  # no order head without orders in the log


def train_ranker(catalogue, log, cfg, epochs=3, batch=64, lr=1e-2):
    torch.manual_seed(cfg.seed)
    ranker = Ranker(catalogue, heads=1 if log.order is None else 2).to(cfg.device)
    contexts = batches(len(log.item), batch, max(1, epochs * len(log.item) // batch), stream(cfg.seed, "ranker"))
    learner = Learner(ranker, lr, len(contexts), shared=False)  # every process trains the whole of it
    for rows in progress(contexts.to(cfg.device), "ranker"):
        logit, click = ranker(log.history[rows], log.item[rows]), log.click[rows].float()
        loss = F.binary_cross_entropy_with_logits(logit[..., 0], click)
        if log.order is not None:  # an order is seen only where there was a click
            loss = loss + F.binary_cross_entropy_with_logits(logit[..., 1], log.order[rows].float(), weight=click)
        loss.backward()
        learner.step()
    return ranker.eval().requires_grad_(False)


def make_reward(ranker, cfg):
    """r(history, item) -> (B, n): what a showing is worth, p(click) + p(click and order), in 0..2; eq. 8's r.

    It looks at prompt and item, never at the group, so that truth and negatives can be scored like rollouts.
    """

    def reward(history, item):
        p = ranker.probabilities(history, item)
        return torch.where(item >= 0, p["click"] * (1 + p.get("order", 0.0)), cfg.floor)

    return reward


def own_reward(cfg):
    """The same from --reward: function(history, item) -> (B, n) scores, or {name: scores}, whose sum is the reward."""
    function = plugin("reward", cfg.reward)

    def reward(history, item):
        found = function(history, item)
        named = found if isinstance(found, dict) else {"": found}
        for name, scores in named.items():
            if tuple(np.shape(scores)) != tuple(item.shape):
                raise BadInput(f"--reward {cfg.reward}: {name or 'it'} has shape {tuple(np.shape(scores))}; expected "
                               f"{tuple(item.shape)}, a score for each candidate")
        return {name: torch.where(item >= 0, torch.as_tensor(scores, dtype=torch.float32, device=item.device),
                                  cfg.floor / len(named)) for name, scores in named.items()}

    return reward


def ask(reward, history, item, mine):
    """Scores (B, n) of the whole batch, of which each process asks for its own rows; and by name, where there are."""
    with torch.no_grad():
        scores = reward(history[mine], item[mine])
    named = {name: gather([x]) for name, x in (scores.items() if isinstance(scores, dict) else [("", scores)])}
    return sum(named.values()), {f"reward/{name}": x.mean() for name, x in named.items() if name}


def own_negatives(catalogue, cfg):
    """None, where they are rollouts of other prompts; else (history, target, M, generator) -> (B, M) items."""

    def uniform(history, target, m, generator):
        item = torch.randint(catalogue.N - 1, (len(target), m), generator=generator, device=target.device)
        return item + (item >= target.unsqueeze(1))  # any but the truth

    names = {"rollouts": None, "catalogue": uniform}
    known = cfg.negatives_from in names
    return names[cfg.negatives_from] if known else plugin("negatives-from", cfg.negatives_from)


# == 5. The policy, and the tree of tokens ============================================================================


class Words(NamedTuple):
    """What the model has of the tokens that prompts and items are made of.

    Looked up once for a tree, prompt included: each look-up's gradient is as large as the model's whole vocabulary.
    """

    vectors: torch.Tensor  # (S + 1 or more, width) what goes in for SID tokens, the question, and the start if any
    head: torch.Tensor  # (S, width) the head's rows of SID tokens; the others are never computed
    bias: torch.Tensor | None  # (S,) the head's, where it has one


class Trunk(NamedTuple):
    """Prompts that were read once; every tree below grows on them."""

    cache: list  # per layer, keys and values (B, heads, T, width)
    visible: torch.Tensor  # (B, T) boolean, False at padding
    logp: torch.Tensor  # (B, 1, S) log-probabilities of the first SID token
    words: Words

    def rows(self, index):
        return Trunk([(k[index], v[index]) for k, v in self.cache], self.visible[index], self.logp[index], self.words)


class Product(torch.autograd.Function):
    """x W', whose gradient for the weights W is added up where it lies, in W.grad.

    Autograd would write that of every pass (prompts, each level of the tree) to fresh memory and add all up later.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            factors = gradient.flatten(0, -2).T, x.flatten(0, -2)
            weight.grad = torch.mm(*factors) if weight.grad is None else weight.grad.addmm_(*factors)
        return gradient @ weight, None


LARGE = 2**18  # weights of a layer from which on that pays


class LargeLinear(nn.Linear):
    """nn.Linear with that product."""

    def forward(self, x):
        y = Product.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


class Policy:
    """A Hugging Face causal language model that speaks Semantic IDs."""

    def __init__(self, model, catalogue, cfg, tokenizer=None):
        self.model = model.to(cfg.device).eval()  # eval also in training: dropout would make two passes disagree
        # Not the model's: a temperature or a length of its own would follow the policy to whoever generates with it.
        self.model.generation_config = GenerationConfig()
        self.catalogue, self.tokenizer = catalogue, tokenizer
        known = inspect.signature(model.base_model.forward).parameters  # transformers 5.24 calls it by another name
        self.takes_cache_as = "cache" if "cache" in known else "past_key_values"
        S, words = catalogue.S, [*catalogue.words, ASK]
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(words) if tokenizer else range(S + 1), device=cfg.device)
        self.vocabulary = ids[:S]  # the model's token of each SID token
        self.ask = ids[S:]  # ends every prompt: what comes next?
        start = getattr(tokenizer, "bos_token_id", None)  # begins it, in models that are used to that
        self.start = torch.tensor([] if start is None else [start], dtype=torch.long, device=cfg.device)
        able = cfg.model and cfg.device.startswith("cuda") and torch.cuda.is_bf16_supported(False)
        self.half = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and bool(able))
        for layer in [] if self.half else model.modules():
            if type(layer) is nn.Linear and layer.weight.numel() >= LARGE:
                layer.__class__ = LargeLinear

    def precision(self):
        """Products in bfloat16 where that is wanted. Weights stay float32: small steps would round to none in less."""
        return torch.autocast(self.ask.device.type, torch.bfloat16, enabled=self.half)

    def save(self, folder):
        self.model.save_pretrained(folder)
        if self.tokenizer:
            self.tokenizer.save_pretrained(folder)

    def words(self):
        head = self.model.get_output_embeddings()
        known = torch.cat([self.vocabulary, self.ask, self.start])  # below, tokens are numbered in this order
        return Words(self.model.get_input_embeddings()(known), head.weight[self.vocabulary],
                     None if head.bias is None else head.bias[self.vocabulary])

    def run(self, words, tokens, visible, positions, cache=None, unasked=0):
        """Run n new tokens, which see what `visible` (B, n, cached + n) says; hidden (B, n, width) and longer cache.

        Nobody will ask the first `unasked` of them what comes next: their `hidden` is worth nothing.
        """
        model = self.model
        # An additive mask, since some attention implementations add a boolean one; and finite (in float32 too, where
        # the softmax may run), since a padding row that sees nothing would otherwise be NaN.
        dtype = torch.bfloat16 if self.half else model.dtype
        blocked = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        mask = mask.masked_fill(~visible, blocked).unsqueeze(1)
        cache = DynamicCache(cache)  # wraps, copies nothing: a prompt can be grown upon many times
        with self.precision(), last_layer_without(unasked, model):
            hidden = model.base_model(inputs_embeds=F.embedding(tokens, words.vectors), attention_mask=mask,
                                      position_ids=positions, use_cache=True,
                                      **{self.takes_cache_as: cache}).last_hidden_state
        return hidden, [(layer.keys, layer.values) for layer in cache.layers]

    def logp(self, words, hidden):
        """Over the SID tokens alone."""
        with self.precision():
            logits = F.linear(hidden, words.head, words.bias).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)  # Gemma 2
        return (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(-1)

    def read(self, history, after=None):
        """(B, H) histories -> Trunk. Runs the language model over the prompt, which nothing below does again.

        With SID tokens `after` it (B, l), over these too: T is longer by l, and logp is that of l + 1 next tokens.
        """
        history = history[:, (history >= 0).any(0)]
        words, B, S = self.words(), len(history), self.catalogue.S
        ask, *start = torch.arange(S, len(words.vectors), device=history.device).split(1)
        tokens = self.catalogue.tokens[history.clamp(min=0)].flatten(1)
        tokens = torch.cat([x.expand(B, -1) for x in (*start, tokens, ask)], 1)  # (B, T)
        visible = (history >= 0).repeat_interleave(self.catalogue.L, dim=1)
        visible = torch.cat([visible.new_ones(B, len(self.start)), visible, visible.new_ones(B, 1)], 1)  # (B, T)
        T = tokens.shape[1]
        if after is not None:
            tokens, visible = torch.cat([tokens, after], 1), F.pad(visible, (0, after.shape[1]), value=True)
        causal = visible.new_ones(tokens.shape[1], tokens.shape[1]).tril()
        positions = (visible.cumsum(1) - 1).clamp(min=0)
        hidden, cache = self.run(words, tokens, visible.unsqueeze(1) & causal, positions, unasked=T - 1)
        return Trunk(cache, visible, self.logp(words, hidden[:, T - 1 :]), words)


LATE = ("mlp", "self_attn.q_proj", "self_attn.o_proj")  # what comes after, or has no part in, keys and values


@contextlib.contextmanager
def last_layer_without(unasked, model):
    """Until this ends, the last layer makes nothing but keys and values of the first `unasked` tokens.

    Nobody asks a prompt's earlier tokens what comes next, so what the modules in LATE would say of them in the last
    layer serves none: these get the other tokens alone, and zeros stand for the rest. A layer that has no modules of
    such names stays whole.
    """
    def shorter(module, given):
        return tuple(x[:, unasked:].contiguous() for x in given)

    def as_long_as_before(module, given, made):
        made, *more = made if isinstance(made, tuple) else (made,)  # a mixture of experts also says whom it asked
        made = F.pad(made, (0, 0, unasked, 0))
        return (made, *more) if more else made

    lists = (x for x in model.base_model.modules() if isinstance(x, nn.ModuleList))
    layers = list(next(lists, [])) if unasked else []  # the layers come first
    hooks = []
    for part in [x for layer in layers[-1:] for name, x in layer.named_modules() if name in LATE]:
        hooks += [part.register_forward_pre_hook(shorter), part.register_forward_hook(as_long_as_before)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def grow(policy, prompt, pick):
    """Grow a tree of Semantic IDs on each prompt; sampling, scoring and beam search differ in `pick` alone.

    At each level, pick(level, logp (B, m, S), score (B, m)) is shown what follows each of the m branches and how likely
    they are so far; it says which branch each of n new ones continues, and with which token: two (B, n) integers.
    Returns the branches' tokens (B, n, L) and their log-probabilities (B, n, L), which carry gradient.

    The n branches of a level are run as one sequence of n tokens, under a mask by which each sees the prompt, its
    ancestors and itself. So the prompt is never repeated, and nothing is reordered when a beam changes its parent.
    """
    logp = prompt.logp  # (B, 1, S): the only branch is the prompt
    cache, visible, words = prompt.cache, prompt.visible, prompt.words
    B, T = visible.shape
    tokens, token_logp = logp.new_zeros(B, 1, 0, dtype=torch.long), logp.new_zeros(B, 1, 0)
    sees = visible.new_zeros(B, 1, 0)  # which of the tree's tokens each branch descends from
    for level in range(policy.catalogue.L):
        if level:
            m = tokens.shape[1]  # branches so far; the last token of each is run now
            sees = torch.cat([sees, torch.eye(m, dtype=bool, device=sees.device).expand(B, m, m)], -1)
            hidden, cache = policy.run(
                words,
                tokens[..., -1],
                torch.cat([visible.unsqueeze(1).expand(B, m, T), sees], -1),
                (visible.sum(1, keepdim=True) + level - 1).expand(B, m),
                cache,
            )
            logp = policy.logp(words, hidden)
        parent, token = pick(level, logp, token_logp.sum(-1))
        chosen = logp[torch.arange(B, device=parent.device)[:, None], parent, token].unsqueeze(-1)
        tokens = torch.cat([inherit(tokens, parent), token.unsqueeze(-1)], -1)
        token_logp = torch.cat([inherit(token_logp, parent), chosen], -1)
        sees = inherit(sees, parent)
    return tokens, token_logp


def inherit(x, parent):
    """(B, m, ...) of the old branches -> (B, n, ...) of the new ones."""
    return x.gather(1, parent.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def score(policy, prompt, tokens):
    """How likely these Semantic IDs (B, n, L) are: (B, n, L) log-probabilities, which carry gradient.

    What `grow` would say of them, but known tokens need not wait for each other: all levels are run as one sequence.
    """
    B, n, L = tokens.shape
    first = prompt.logp[:, 0].gather(1, tokens[..., 0]).unsqueeze(-1)  # (B, n, 1)
    if L == 1:
        return first
    visible, depth = prompt.visible, L - 1  # the last token predicts nothing
    sees = torch.block_diag(*[visible.new_ones(depth, depth).tril()] * n)  # ancestors and itself
    hidden, _ = policy.run(
        prompt.words,
        tokens[..., :-1].flatten(1),  # (B, n * depth), branch after branch
        torch.cat([visible.unsqueeze(1).expand(B, n * depth, -1), sees.expand(B, -1, -1)], -1),
        visible.sum(1, keepdim=True) + torch.arange(depth, device=visible.device).repeat(n),
        prompt.cache,
    )
    others = policy.logp(prompt.words, hidden).view(B, n, depth, -1).gather(-1, tokens[..., 1:].unsqueeze(-1))[..., 0]
    return torch.cat([first, others], -1)


def own_branch(logp, n):
    """Each of n branches continues itself; at the first level all continue the prompt."""
    return torch.arange(n, device=logp.device).clamp(max=logp.shape[1] - 1).expand(len(logp), n)


def given(tokens):
    """Follow these Semantic IDs (B, n, L): teacher forcing."""
    return lambda level, logp, score: (own_branch(logp, tokens.shape[1]), tokens[..., level])


def sample(n, generator, rows=slice(None), B=None):
    """n independent draws: a token's share of the way from 0 to 1 is its probability, and a random point hits one.

    A micro-batch draws for all B prompts of its batch and keeps its own `rows`: it gets what it would get among them.
    """

    def pick(level, logp, score):
        ends = logp.detach().float().exp().cumsum(-1)  # (B, m, S), the last one is 1 but for rounding
        points = torch.rand(B or len(logp), n, generator=generator, device=logp.device)[rows]
        points = points.view(*ends.shape[:2], -1) * ends[..., -1:]  # (B, m, n / m): m is 1, then n
        token = torch.searchsorted(ends, points, right=True).clamp(max=ends.shape[-1] - 1)
        return own_branch(logp, n), token.view(-1, n)

    return pick


def beam(width):
    """The most likely continuations of all branches together."""

    def pick(level, logp, score):
        total = (score.unsqueeze(-1) + logp).flatten(1)
        best = total.topk(min(width, total.shape[1])).indices
        return best // logp.shape[-1], best % logp.shape[-1]

    return pick


ASK = "<next>"  # the word that ends a prompt


def tiny_policy(catalogue, cfg, width=64, layers=2):
    """A small Llama from scratch, whose vocabulary is the SID tokens, the question mark and padding."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({})))
    learn_words(tokenizer, [*catalogue.words, ASK, "<pad>"])
    torch.manual_seed(cfg.seed)
    config = LlamaConfig(
        vocab_size=catalogue.S + 2, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=(cfg.max_history + 1) * catalogue.L + 1,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=catalogue.S + 1)
    return Policy(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), catalogue, cfg, tokenizer)


def learn_words(tokenizer, words):
    """Each word becomes one token; returns those that were unknown."""
    known = tokenizer.get_vocab()
    new = [word for word in words if word not in known]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in new])
    return new


def pretrained_policy(source, catalogue, cfg):
    """Any decoder-only causal language model, of the hub or a folder, with the words that it lacks for Semantic IDs."""
    T = (cfg.max_history + 1) * catalogue.L + 1  # start, history, question and the item but for its last token
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
        layers, window = set(getattr(config, "layer_types", None) or ["?"]), getattr(config, "sliding_window", None)
        context = getattr(config, "max_position_embeddings", None) or T
        odd = layers - {"?", "full_attention", "sliding_attention"}
        for reason, holds in {
            "an encoder-decoder": config.is_encoder_decoder,
            "no attention (a state-space or recurrent model)": not hasattr(config, "num_attention_heads"),
            f"layers of {', '.join(sorted(odd))}, not of attention alone": odd,
            f"a sliding window of {window} tokens": window and window < T and layers & {"?", "sliding_attention"},
            f"a context of {context} tokens": context < T,
        }.items():
            if holds:
                raise BadInput(f"--model {source}: {config.model_type} with {reason} cannot grow a tree on prompts of "
                               f"{T} tokens; take another, or a lower --max-history where a length is the reason")
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, found = AutoModelForCausalLM.from_pretrained(  # never pickled weights, never code from the hub
            source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
        if found["missing_keys"] or not tokenizer.get_vocab():
            missing = sorted(found["missing_keys"])[:1] or ["a tokenizer with a vocabulary"]
            raise ValueError(f"it lacks {missing[0]}")
    except BadInput:
        raise
    except Exception as error:  # what a foreign folder can break is not a short list
        raise BadInput(f"--model {source}: cannot be loaded ({first_line(error)}); expected a causal language model "
                       "with config.json, tokenizer and weights in safetensors") from None
    rows = sorted(set(tokenizer.get_vocab().values()))
    new = tokenizer.convert_tokens_to_ids(learn_words(tokenizer, [*catalogue.words, ASK]))
    if new:  # a word starts near the mean of the known ones: with half their spread SmolLM2 began worse than guessing
        model.resize_token_embeddings(max(len(model.get_input_embeddings().weight), max(new) + 1), mean_resizing=False)
        torch.manual_seed(cfg.seed)
        tables = (layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
        for table in {id(table): table for table in tables}.values():  # input and output may be one
            known = table.data[rows]
            table.data[new] = known.mean(0) + 0.1 * known.std(0) * torch.randn(len(new), known.shape[1])
    for p in model.parameters():  # out of the file's memory: where that begins can decide a product's last digit
        p.data = p.data.clone()
    policy = Policy(model, catalogue, cfg, tokenizer)
    check_tree(policy, source, cfg)
    return policy


@torch.no_grad()
def check_tree(policy, source, cfg):
    """A tree must say what plain passes over whole sequences say; whatever is not attention alone fails here."""
    dice, N, H, half = torch.Generator().manual_seed(0), policy.catalogue.N, cfg.max_history, policy.half
    history, item = (torch.randint(N, (2, n), generator=dice).to(cfg.device) for n in (H, 2))
    history[1, : H // 2] = -1
    tokens = policy.catalogue.tokens[item]  # (2, 2, L)
    policy.half = False
    try:
        prompt = policy.read(history)
        trees = grow(policy, prompt, given(tokens))[1], score(policy, prompt, tokens)
        for row in range(2):
            said = policy.vocabulary[policy.catalogue.tokens[history[row][history[row] >= 0]]].flatten()
            prompt = torch.cat([policy.start, said, policy.ask])
            for branch in range(2):
                ids = torch.cat([prompt, policy.vocabulary[tokens[row, branch, :-1]]])
                logits = policy.model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, len(prompt) - 1 :]
                plain = logits[:, policy.vocabulary].log_softmax(-1).gather(1, tokens[row, branch].unsqueeze(1))[:, 0]
                if not all((plain - tree[row, branch]).abs().max() < 1e-3 for tree in trees):
                    raise ValueError("its probabilities there are not those of the whole sequence")
    except Exception as error:
        raise BadInput(f"--model {source}: {policy.model.config.model_type} cannot grow a tree on a prompt "
                       f"({first_line(error)}); take a model of plain attention") from None
    finally:
        policy.half = half


def supervise(policy, batch):
    """Read the prompts; and how likely the truth is, (B, L) log-probabilities with gradient.

    One pass over prompt and truth says both: what comes later changes nothing before it, and is cut off again.
    """
    target = policy.catalogue.tokens[batch.target]
    cache, visible, logp, words = policy.read(batch.history, target[:, :-1])  # the last token predicts nothing
    T = visible.shape[1] - target.shape[1] + 1
    prompt = Trunk([(k[:, :, :T], v[:, :, :T]) for k, v in cache], visible[:, :T], logp[:, :1], words)
    return prompt, logp.gather(-1, target.unsqueeze(-1))[..., 0]


def from_the_start(order, phase, learner, dice):
    """Every step of a phase; `Checkpoints.steps` is the same for runs that can be stopped."""
    return enumerate(order)


def train_sft(policy, prompts, cfg, log, steps=from_the_start, after=lambda step: None):
    """The base policy: the mean NLL of the next item (eq. 2), nothing else. `after` each step, someone may look."""
    B = cfg.sft_batch_size
    learner = Learner(policy.model, cfg.sft_lr, cfg.sft_steps)
    order = batches(len(prompts.target), B, cfg.sft_steps, stream(cfg.seed, "sft"))
    for step, rows in progress(steps(order, "sft", learner, {}), "sft", len(order)):
        batch, nll = prompts.rows(rows.to(cfg.device)), []
        for part in shares(B, cfg.micro_batch_size):
            _, target_logp = supervise(policy, batch.rows(part))
            nll.append(core.nll_loss(target_logp))
            (nll[-1].sum() / B).backward()
        norm, lr = learner.step()
        log(phase="sft", step=step + 1, lr=lr, nll=gather(nll).mean(), gradient_norm=norm)
        after(step + 1)


# == 6. The step: roll out, score, judge, learn =======================================================================


class Method(NamedTuple):
    supervised: bool  # is the NLL there?
    admit: Callable | None  # (D, R, batch, generator) -> (B,) boolean: who gets the GRPO term; None: no rollouts


def everyone(difficult, reliable, batch, generator):
    return torch.ones_like(difficult)


def at_random(difficult, reliable, batch, generator):
    """As many as AdaGRPO would admit of this batch, but whichever."""
    admitted = core.sample_clip(difficult, reliable)
    return admitted[torch.randperm(len(admitted), generator=generator, device=admitted.device)]


METHODS = {
    "nll": Method(True, None),  # the control that the paper lacks
    "grpo": Method(False, everyone),
    "grpo+nll": Method(True, everyone),
    "adagrpo-d": Method(True, lambda difficult, reliable, *_: difficult),
    "adagrpo-r": Method(True, lambda difficult, reliable, *_: reliable),
    "adagrpo": Method(True, lambda difficult, reliable, *_: core.sample_clip(difficult, reliable)),
    "random-gate": Method(True, at_random),
}


def roll_out(policy, batch, parts, K, generator, everyone_learns=False):
    """K samples of each prompt and how likely the truth is, (B, K, L) tokens and log-probabilities and (B, L).

    Also the graph to learn from: of prompts and truth, and of the samples if everyone will learn from his. That is of
    the only micro-batch. Of several none is kept, to save memory.
    """
    pieces, dice, keep = [], generator.get_state(), len(parts) == 1
    for part in parts:
        with torch.set_grad_enabled(keep):
            prompt, target_logp = supervise(policy, batch.rows(part))
        with torch.set_grad_enabled(keep and everyone_learns):
            generator.set_state(dice)  # every micro-batch draws the same numbers, the whole batch's
            tokens, logp = grow(policy, prompt, sample(K, generator, part, len(batch.target)))
        pieces.append((tokens, logp.detach(), target_logp.detach()))
    graph = (prompt, target_logp, logp if everyone_learns else None) if keep else None
    return *map(gather, zip(*pieces, strict=True)), graph


def train_rl(policy, reward, prompts, cfg, name, log, steps=from_the_start, other=None):
    """Post-train `policy` in place by method `name`; yields the step's number after each, for evaluations between.

    `steps` counts them and may leave out what a checkpoint has; `other` draws negatives that are no rollouts.
    """
    method = METHODS[name]
    catalogue, B, K = policy.catalogue, cfg.batch_size, cfg.group_size
    learner = Learner(policy.model, cfg.lr if method.supervised else cfg.grpo_lr, cfg.rl_steps * cfg.updates)
    # The order of prompts depends on the seed alone, so that every method sees the same prompts in the same order.
    order = batches(len(prompts.target), B, cfg.rl_steps, stream(cfg.seed, "order")).to(cfg.device)
    dice = {use: stream(cfg.seed, use, cfg.device) for use in ("rollouts", "negatives", "random gate")}
    parts = shares(B, cfg.micro_batch_size)  # the rows of a batch that this process runs, a micro-batch at a time

    for step, rows in steps(order, name, learner, dice):
        batch = prompts.rows(rows)
        chosen = [()] * len(parts)
        for update in range(cfg.updates):
            graph = None
            if update == 0 and method.admit:
                # -- roll out: K samples of each prompt, from the policy as it is -----------------------------------
                rollouts, old_logp, target_logp, graph = roll_out(policy, batch, parts, K, dice["rollouts"],
                                                                  method.admit is everyone)
                items = catalogue.item(rollouts)  # (B, K)

                # -- score: rollouts, truth and negatives in one call, all under the prompt of their row ------------
                if other:
                    negatives = other(batch.history, batch.target, cfg.negatives, dice["negatives"])  # (B, M)
                else:
                    keys = torch.rand(B, B * K, generator=dice["negatives"], device=items.device)
                    negatives = items.flatten()[core.in_batch_negatives(keys, k=K, m=cfg.negatives)]  # (B, M)
                pool = torch.cat([items, batch.target.unsqueeze(1), negatives], 1)
                scores, named = ask(reward, batch.history, pool, slice(parts[0].start, parts[-1].stop))
                rewards, target_reward, negative_rewards = scores[:, :K], scores[:, K], scores[:, K + 1 :]  # and (B, M)

                # -- judge: is it difficult for the policy (eq. 7), does the ranker know (eq. 9)? -------------------
                # A rollout that repeats the truth ties with it; two passes round differently, so say so.
                likely, truth = core.length_normalized(old_logp), -core.nll_loss(target_logp)  # (B, K) and (B,)
                likely = torch.where(items == batch.target.unsqueeze(1), truth.unsqueeze(1), likely)
                difficult = core.difficulty(truth, likely, tau=cfg.tau)  # (B,)
                reliable = core.reliability(target_reward, rewards, negative_rewards, tau=cfg.tau, rho=cfg.rho)
                admitted = method.admit(difficult, reliable, batch, dice["random gate"])
                advantages = core.group_advantages(rewards)  # (B, K)
                # Who is not admitted (with adagrpo nine in ten) needs no gradient through its rollouts: left out.
                # To know who, the host waits for the GPU, here and nowhere else between rollout and update.
                who = admitted.tolist()
                chosen = [torch.tensor([b for b in range(part.start, part.stop) if who[b]], dtype=torch.long,
                                       device=items.device) for part in parts]

            # -- learn: everyone from the truth, the admitted from their rollouts too (eq. 5) ------------------------
            learnt = []
            for part, mine in zip(parts, chosen, strict=True):
                prompt, target_logp, logp = graph or (*supervise(policy, batch.rows(part)), None)
                nll = core.nll_loss(target_logp)  # of the part's prompts
                loss = nll.sum() / B if method.supervised else 0.0 * nll.sum()
                grpo, ratio = torch.zeros_like(nll), torch.zeros_like(nll)
                if len(mine):
                    if logp is None:  # else everyone is admitted, and sampling has left the graph
                        logp = score(policy, prompt.rows(mine - part.start), rollouts[mine])
                    gain = core.grpo_loss(logp, old_logp[mine], advantages[mine], epsilon=cfg.epsilon)
                    loss = loss + cfg.lam * gain.sum() / B  # by B, not by the number admitted: eq. 5
                    grpo[mine - part.start] = gain.detach()
                    ratio[mine - part.start] = (logp.detach() - old_logp[mine]).exp().mean((1, 2))
                loss.backward()
                learnt.append(torch.stack([nll.detach(), grpo, ratio], 1))
            norm, lr = learner.step()

        nll, grpo, ratio = gather(learnt).unbind(1)
        extra = {}
        if method.admit:
            extra = diagnostics(difficult, reliable, admitted, rewards, target_reward, rollouts, items, cfg) | named
            extra |= dict(grpo=grpo.sum() / B, ratio=ratio.sum() / sum(who) if any(who) else 1.0,
                          bad_scores=1 - scores.isfinite().float().mean())
        log(phase="rl", method=name, step=step + 1, lr=lr, nll=nll.mean(), **extra, gradient_norm=norm)
        yield step + 1


def diagnostics(difficult, reliable, admitted, rewards, target_reward, rollouts, items, cfg):
    """What to look at when training goes wrong; docs/metrics.md defines each."""
    nothing = torch.full_like(rewards[:, :1], -torch.inf)  # a negative that any ranker suppresses
    prominent = core.reliability(target_reward, rewards, nothing, tau=cfg.tau, rho=cfg.rho)
    same = (rollouts.unsqueeze(1) == rollouts.unsqueeze(2)).all(-1)  # (B, K, K)
    share = dict(difficult=difficult, reliable=reliable, admitted=admitted, easy=~difficult, not_prominent=~prominent,
                 not_suppressed=prominent & ~reliable, zero_spread=(rewards == rewards[:, :1]).all(1),
                 duplicate_rollouts=same.tril(-1).any(-1), invalid_rollouts=items < 0)
    return dict(reward=rewards.mean(), reward_spread=rewards.std(1).mean(),
                **{name: which.float().mean() for name, which in share.items()})


# == 7. Evaluation ====================================================================================================


@torch.no_grad()
def evaluate(policy, ranker, prompts, cfg):
    """Beam search on every prompt. Returns the metrics, and per prompt what they are the means of."""
    parts = []
    dice = stream(cfg.seed, "evaluation", cfg.device)
    everyone = torch.arange(len(prompts.target), device=cfg.device)
    for rows in progress(everyone.split(cfg.eval_batch_size), "evaluate"):
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
    """metrics.jsonl: a line for every step and every evaluation, written as it happens; --log-to hears it too.

    machine.jsonl is its neighbour for what no seed decides: seconds and memory. A resumed run keeps the first `size`
    bytes of the one, those that its checkpoint knows of, and appends to the other.
    """

    def __init__(self, out, cfg, size=0):
        self.rows, self.file, self.sink = [], None, open_sink(out, cfg)
        self.device, self.last = cfg.device, time.perf_counter()
        path = out / "metrics.jsonl"
        if size:
            text = path.read_bytes()[:size] if path.is_file() else b""
            if len(text) < size:
                raise BadInput(f"{path}: lines are missing that were there at the last checkpoint; {START_ANEW}")
            self.rows = [json.loads(line) for line in text.splitlines()]
        if rank() == 0:
            self.file, self.machine = path.open("ab"), (out / "machine.jsonl").open("a")
            self.file.truncate(size)

    def __call__(self, **row):
        # All the numbers of a step cross from the GPU at once, after its work has been queued.
        numbers = {key: value.detach().float() for key, value in row.items() if torch.is_tensor(value)}
        if numbers:
            row |= zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True)
        self.rows.append(row)
        if self.file:
            self.file.write(json.dumps(row).encode() + b"\n")
            self.file.flush()
            now, where = time.perf_counter(), {k: row[k] for k in ("phase", "method", "step") if k in row}
            used = dict(seconds=round(now - self.last, 4), memory=peak_memory(self.device))
            self.machine.write(json.dumps(where | used) + "\n")
            self.machine.flush()
            self.sink(row | used)
            self.last = now

    def found(self, phase, method=None):
        """What was measured in these rows."""
        mine = [row for row in self.rows if row["phase"] == phase and method in (None, row["method"])]
        return [{key: x for key, x in row.items() if key not in ("phase", "method", "step")} for row in mine]

    def saved(self):
        """How many bytes are safely on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()


def peak_memory(device):
    """GiB: of a GPU, at most since the last line; of a CPU, what the whole process has held at most."""
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif importlib.util.find_spec("resource") is None:  # Windows
        return None
    else:
        usage = importlib.import_module("resource")
        peak = usage.getrusage(usage.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round(peak / 2**30, 3)


def open_sink(out, cfg):
    """Where --log-to sends the numbers of a line; a library is imported only if it was asked for."""
    if not cfg.log_to or rank() > 0:
        return lambda row: None
    if cfg.log_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(out / "tensorboard")
    else:
        library = importlib.import_module(cfg.log_to)
        library.init(project="nanoadagrpo", name=out.name, config=dataclasses.asdict(cfg))

    def send(row):
        step, name = row["step"], "/".join(row[key] for key in ("phase", "method") if key in row)
        numbers = {f"{name}/{key}": value for key, value in row.items() if isinstance(value, int | float)}
        if cfg.log_to == "tensorboard":
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
            writer.flush()
        else:
            library.log(numbers)  # these libraries count lines themselves; the step is one of the numbers

    return send


START_ANEW = "it cannot be resumed; begin again with --config and its config.json"


class Checkpoints:
    """RUN/checkpoints/: all that a run needs to go on: model, optimizer, schedule, dice, and how far it was.

    A checkpoint is written beside its place, forced to the disk, and renamed when whole; only then the one before it
    goes. So a kill at any moment leaves a whole one, or none yet. No pickle: safetensors and JSON.
    """

    def __init__(self, folder, cfg):
        self.folder, self.every, self.policy, self.base = folder, cfg.save_every, None, {}
        self.state, self.tensors = {}, {}
        self.newest = (self.whole() or [None])[-1]
        if self.newest:
            try:
                self.state = json.loads((self.newest / "state.json").read_text())
                self.tensors = load_file(self.newest / "state.safetensors", cfg.device)
                self.tensors = {key: x.clone() for key, x in self.tensors.items()}  # see pretrained_policy
                _ = [self.state[key] for key in ("phase", "step", "bytes", "groups", "schedule")]
            except Exception as error:  # a disk can do anything to a file
                raise BadInput(f"{self.newest}: damaged ({first_line(error)}); {START_ANEW}") from None
            self.base = {key[5:]: x for key, x in self.tensors.items() if key.startswith("base.")}

    def whole(self):
        """Oldest first."""
        return sorted(path for path in self.folder.glob("*") if path.suffix != ".partial")

    def at(self, phase):
        """Did the run stop in this phase, and has not gone on yet?"""
        return self.state.get("phase") == phase

    def steps(self, order, phase, learner, dice):
        """(step, rows) of the phase's steps that are still to be done; saves every so often and after the last."""
        done = self.restore(learner, dice) if self.at(phase) else 0
        for step in range(done, len(order)):
            if self.every and step > done and step % self.every == 0:
                self.save(phase, step, learner, dice)
            yield step, order[step]
        if self.every and len(order) > done:
            self.save(phase, len(order), learner, dice)

    def restore(self, learner, dice):
        state, memory = self.state, {}
        for name, x in self.tensors.items():
            kind, key = name.split(".", 1)
            if kind == "dice":
                dice[key].set_state(x.cpu())
            elif kind == "optimizer":
                index, key = key.split(".")
                memory.setdefault(int(index), {})[key] = x
        learner.optimizer.load_state_dict({"state": memory, "param_groups": state["groups"]})
        learner.schedule.load_state_dict(state["schedule"])
        self.state = self.tensors = {}
        return state["step"]

    def save(self, phase, step, learner, dice):
        if rank() > 0:
            return
        older = self.whole()
        place = self.folder / f"{1 + int(older[-1].name if older else 0):08d}"
        partial = place.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self.policy.save(partial)
        memory = learner.optimizer.state_dict()
        tensors = {f"optimizer.{i}.{key}": x for i, one in memory["state"].items() for key, x in one.items()}
        tensors |= {f"dice.{use}": generator.get_state() for use, generator in dice.items()}
        save_file(tensors | {f"base.{name}": x for name, x in self.base.items()}, partial / "state.safetensors")
        state = dict(phase=phase, step=step, bytes=self.log.saved(), groups=memory["param_groups"],
                     schedule=learner.schedule.state_dict())
        (partial / "state.json").write_text(json.dumps(state))
        for path in [*partial.iterdir(), partial]:
            force(path)
        partial.rename(place)
        force(self.folder)
        for path in older:
            shutil.rmtree(path)

    def remove(self):
        """The run is complete."""
        if rank() == 0 and self.folder.exists():
            gone = self.folder.with_suffix(".partial")
            self.folder.rename(gone)
            shutil.rmtree(gone)


def force(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


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

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    colours = dict(zip(METHODS, ["k", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#0072B2", "#009E73"], strict=True))
    panels = {"HR@10 (%)": ("valid", "hr@10", 100), "hallucination (%)": ("valid", "hallucination", 100),
              "ranker's p(click), best of 10": ("valid", "click_reward@10", 1), "admitted (%)": ("rl", "admitted", 100)}
    trained = dict.fromkeys(row["method"] for row in rows if row["phase"] == "rl")
    for axes, (title, (phase, key, scale)) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        for method in trained:
            mine = [row for row in rows if row["phase"] == phase and row["method"] == method and key in row]
            x, y = [row["step"] for row in mine], [row[key] * scale for row in mine]
            if phase == "rl":  # one batch admits in steps of 1/B: show the mean of the last twenty
                y = [np.mean(y[max(0, i - 19) : i + 1]) for i in range(len(y))]
            axes.plot(x, y, label=method, color=colours.get(method), lw=2.5 if method == "adagrpo" else 1.2)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=9)
    figure.savefig(path, dpi=130)


def run(cfg):
    """Everything, from the data to the report; returns {method: metrics}."""
    began = time.time()
    disable_progress_bar()  # of saving; ours stay
    # With several threads, sums into the same place (the gradient of an index) would come in any order otherwise.
    torch.use_deterministic_algorithms(cfg.device == "cpu", warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    out = Path(cfg.resume) if cfg.resume else new_folder(cfg)
    data = toy_world(cfg) if cfg.toy else load_data(cfg.data, cfg)
    reward = own_reward(cfg) if cfg.reward else None
    checkpoints = Checkpoints(out / "checkpoints", cfg)
    source = checkpoints.newest or cfg.model
    policy = pretrained_policy(source, data.catalogue, cfg) if source else tiny_policy(data.catalogue, cfg)
    other = own_negatives(data.catalogue, cfg)
    if cfg.resume and not checkpoints.newest:
        say(f"{out}: no checkpoint was made, or it is gone; beginning with the first step again")
    if not cfg.resume:
        make_folder(out, cfg)  # only now: what is refused leaves nothing behind
    checkpoints.policy, checkpoints.log = policy, Journal(out, cfg, checkpoints.state.get("bytes", 0))
    log = checkpoints.log
    say(f"{data.catalogue.N} items, {len(data.sft.target)} prompts for SFT, {len(data.rl.target)} for RL; see {out}")

    ranker = train_ranker(data.catalogue, data.log, cfg)
    reward = reward or make_reward(ranker, cfg)
    names = methods(cfg)
    test = subset(data.test, cfg.eval_prompts, cfg.seed, "test")
    valid = subset(data.valid, -(-cfg.eval_prompts // 4), cfg.seed, "valid")

    def look(step):
        if cfg.sft_eval_every and (step % cfg.sft_eval_every == 0 or step == cfg.sft_steps):
            log(phase="sft_valid", method="base", step=step, **evaluate(policy, ranker, valid, cfg)[0])

    if not any(map(checkpoints.at, names)):
        train_sft(policy, data.sft, cfg, log, checkpoints.steps, look)
    base = checkpoints.base or {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    checkpoints.base = base if len(names) > 1 else {}  # the others start from it
    starts = (log.found("valid") or log.found("sft_valid")[-1:] or [evaluate(policy, ranker, valid, cfg)[0]])[0]
    if not log.found("test", "base"):
        log(phase="test", method="base", step=0, **evaluate(policy, ranker, test, cfg)[0])

    for name in names:
        if log.found("test", name):
            continue
        if not checkpoints.at(name):
            for key, p in policy.model.named_parameters():
                p.data.copy_(base[key])
            log(phase="valid", method=name, step=0, **starts)
        steps = train_rl(policy, reward, data.rl, cfg, name, log, checkpoints.steps, other)
        for step in progress(steps, name, cfg.rl_steps):
            if log.rows[-1].get("bad_scores"):
                raise BadInput(f"--reward {cfg.reward or '(the ranker)'}: {log.rows[-1]['bad_scores']:.1%} of the "
                               f"scores of step {step} are not finite; return a number for every item")
            if step % cfg.eval_every == 0 or step == cfg.rl_steps:
                log(phase="valid", method=name, step=step, **evaluate(policy, ranker, valid, cfg)[0])
        admitted = [row.get("admitted", 0.0) for row in log.found("rl", name)]
        metrics = evaluate(policy, ranker, test, cfg)[0] | {"admitted": float(np.mean(admitted))}
        log(phase="test", method=name, step=cfg.rl_steps, **metrics)
        if rank() == 0:
            policy.save(out / "policy" / (name if len(names) > 1 else ""))

    results = {row["method"]: log.found("test", row["method"])[0] for row in log.rows if row["phase"] == "test"}
    facts = (f"{len(test.target)} test prompts, beams of width {cfg.beam_width}; {time.time() - began:.0f} s in all, "
             f"torch {torch.__version__} on {cfg.device}, {torch.get_num_threads()} threads")
    if rank() == 0:
        picture(log.rows, out / "dynamics.png")
        page = [f"# {out.name}", f"`python nanoadagrpo.py {shlex.join(command(cfg))}`", table(results), facts,
                "![training dynamics](dynamics.png)"]
        (out / "report.partial").write_text("\n\n".join(page) + "\n")
        (out / "report.partial").rename(out / "report.md")
    checkpoints.remove()
    say(f"\n{table(results)}\n\n{facts}\nreport, figure and policy: {out}")
    return results


def say(text):
    if rank() == 0:
        print(text, flush=True)


def new_folder(cfg):
    """Where results go; never over anything."""
    if cfg.out:
        if rank() == 0 and Path(cfg.out).exists():
            raise BadInput(f"--out {cfg.out}: exists already; name a new folder, or remove that one yourself")
        return Path(cfg.out)
    name = f"{'toy' if cfg.toy else Path(cfg.data).resolve().name}-{cfg.method}-{cfg.seed}"
    paths = (Path("runs") / (name + (f"-{i}" if i > 1 else "")) for i in itertools.count(1))
    return next(path for path in paths if not path.exists())


def make_folder(out, cfg):
    """The folder appears with its config.json in it, or not at all."""
    if rank() > 0:
        return
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
        partial.rename(out)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be made ({error.strerror}); name another folder") from None


def command(cfg):
    """The flags that differ from the defaults: what to type to have the same again."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != field.default and field.name not in ("out", "device", "resume"):
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
    parser.add_argument("--config", default="", help="config.json of a run, to repeat it; flags given beside it win")
    given = vars(parser.parse_args(argv))
    saved = str(Path(given["resume"]) / "config.json") if given["resume"] else given["config"]
    if saved:
        parser.set_defaults(**read_config(saved, given["resume"]))
        given = vars(parser.parse_args(argv))
    del given["config"]
    cfg = Settings(**given)
    if cfg.resume:
        free = ("resume", "out", "device", "save_every", "log_to")  # what may differ from what was begun
        other = [name for name, value in read_config(saved, cfg.resume).items()
                 if getattr(cfg, name) != value and name not in free]
        if other:
            raise BadInput(f"--resume goes on as the run was begun; leave out --{', --'.join(map(dashed, other))}")
        if (Path(cfg.resume) / "report.md").exists() and not (Path(cfg.resume) / "checkpoints").exists():
            raise BadInput(f"--resume {cfg.resume}: this run is complete, see its report.md")
    if cfg.toy == bool(cfg.data):
        raise BadInput("say either --toy or --data DIR" + (", not both" if cfg.toy else ""))
    if cfg.log_to and importlib.util.find_spec(cfg.log_to) is None:
        raise BadInput(f"--log-to {cfg.log_to}: not installed; pip install {cfg.log_to}")
    crew = int(os.environ.get("WORLD_SIZE", 1))  # torchrun says so
    for name in ("sft_batch_size", "batch_size"):
        if getattr(cfg, name) % crew:
            raise BadInput(f"--{dashed(name)} {getattr(cfg, name)}: {crew} processes cannot share it equally")
    if cfg.device == "auto":
        cfg = dataclasses.replace(cfg, device="cuda" if torch.cuda.is_available() else "cpu")
    if crew > 1 and cfg.device.startswith("cuda"):
        cfg = dataclasses.replace(cfg, device=f"cuda:{os.environ['LOCAL_RANK']}")
    try:
        torch.empty(0, device=cfg.device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {cfg.device}: {first_line(error)}") from None
    return cfg


def read_config(path, resume):
    """Settings of an earlier run, without where it wrote."""
    try:
        saved = json.loads(Path(path).read_text())
        known = {field.name: field.default for field in dataclasses.fields(Settings)}
        for name, value in saved.items():
            if name not in known or type(value) not in {type(known[name]), {float: int}.get(type(known[name]))}:
                hint = difflib.get_close_matches(name, known, 1)
                raise BadInput(f"{path}: {name} {value!r} is no setting or of another type"
                               + (f"; did you mean {hint[0]}?" if hint and hint[0] != name else ""))
        return {name: value for name, value in saved.items() if name not in ("out", "resume")}
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, BadInput):
            raise
        flag = "--resume needs the folder of a run" if resume else "--config needs the config.json of a run"
        raise BadInput(f"{path}: cannot be read ({first_line(error)}); {flag}") from None


def main(argv=None):
    try:
        cfg = parse(argv)
        if "WORLD_SIZE" in os.environ and not dist.is_initialized():  # started by torchrun
            if cfg.device.startswith("cuda"):
                torch.cuda.set_device(cfg.device)
            dist.init_process_group("nccl" if cfg.device.startswith("cuda") else "gloo")
        return run(cfg)
    except BadInput as error:
        print(f"nanoadagrpo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
