# SPDX-License-Identifier: MIT
"""nanoadagrpo: AdaGRPO (arXiv 2606.08480) end to end, in one file to be read from top to bottom.

A generative recommender is a language model that reads a user's history, the prompt, and writes the next item
as a Semantic ID (SID): L tokens, coarse to fine. GRPO trains it on its own samples (rollouts), with a
ranker's scores as rewards. But a ranker trained on what was shown and clicked is sometimes wrong, and its
scores do not say where. So AdaGRPO decides for each prompt: loss = NLL(true item) + lambda * D * R * GRPO.
D is 1 if the policy ranks the true item low among its rollouts, so that there is something to learn; else 0.
R is 1 if the ranker ranks the true item high, and negatives (other prompts' rollouts) low; else 0.

    python nanoadagrpo.py --toy                     # a made-up shop, one method, about a minute
    python nanoadagrpo.py --toy --method all        # every method from the same start, side by side
    python nanoadagrpo.py --data DIR                # your data: MiniOneRec's layout or JSONL (docs/data.md)
    python nanoadagrpo.py --data DIR --model MODEL  # start from a Hugging Face model (docs/models.md)

`adagrpo_core` has the formulas, by the paper's equation numbers (1 to 10). Part I is the method; Part II the
shop: data, toy world, ranker, models; Part III the workshop: processes, checkpoints, report, command line.

Where this differs from the paper, or the paper is silent (at first reading, go on to Part I):
 1. The paper's data, ranker and language model are proprietary: a toy world or public data take their place.
 2. Its lambda, epsilon, learning rate, K and M are unknown to us. Epsilon is PPO's 0.2; the others, and rho
    (0.3, where the paper has 0.1), were chosen on seeds 0-3 of the toy.
 3. Rollouts are sampled from the policy being trained, one update per batch: eq. 4's ratio is 1, up to
    rounding. `--updates 2` takes a second step on the same rollouts: only then does `--epsilon` matter.
 4. The vocabulary is cut to the catalogue's SID tokens and one or two special ones. L tokens that are no item
    are a hallucination. `--constrained` samples and searches only items; likelihoods are over all words.
 5. The ranker cannot score a hallucination: its reward is `--floor`, as a rollout and as a negative.
 6. Rollouts that repeat each other or the truth are ranked too; ties share the better rank (R: see `--ties`).
 7. HR counts places among the valid beams only: in service, the others would be dropped. The paper does not
    define ClkRwd@k and OrdRwd@k; its values grow with k, so here they are the best score up to place k.
 8. Pure GRPO has a learning rate of its own: without NLL, lambda only scales the loss, which Adam undoes.
 9. Two controls are added: continued training by NLL alone, and a gate that admits as many at random.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import os
import re
import shlex
import signal
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # the imports below take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until then, Ctrl-C ends without a traceback
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # a full disk is reported by `main`
            print("nanoadagrpo: loading torch and transformers", flush=True)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import adagrpo_core as core

# == Part I: the method ======================================================================================
# Shape letters: B prompts, H items of a history, T tokens of a prompt; K rollouts and M negatives of each
# prompt; L tokens of a Semantic ID; V tokens in the policy's vocabulary, S of them SID tokens, of all levels;
# N items; W beams. The truth, or target, is the item that came next. An item is its row number in
# `catalogue.tokens` (N, L); `catalogue.item` finds it by its tokens. -1 is no item: padding on the left of a
# history, or a hallucination (L tokens that are no item's).


# The flags of the command line: at first reading, go on to the policy.
def option(default, help, low=0, high=None, choices="", group=""):
    high = high or (10**6 if isinstance(default, int) else 1e38)
    metadata = dict(help=help, range=(low, high), choices=choices.split(), group=group)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    toy: bool = option(False, "train in a made-up shop: no data needed", group="what to train")
    data: str = option("", "folder with a catalogue and train, valid and test files (docs/data.md)")
    model: str = option("", "causal language model to start from, hub name or folder; none: a tiny new one")
    method: str = option("adagrpo", "a method, several with commas between them, or all")
    seed: int = option(0, "decides everything random: equal seeds, equal numbers on a CPU", high=2**63 - 1)
    group_size: int = option(16, "K, rollouts per prompt", 2, group="method and gate")
    negatives: int = option(1, "M, other prompts' rollouts that the ranker must put at the bottom")
    tau: float = option(1 / 3, "top fraction of K: D needs the truth beyond it, R within it", 1e-6, 0.999999)
    rho: float = option(0.3, "bottom fraction of K: R needs each negative there; paper: 0.1", 1e-6, 0.999999)
    ties: str = option("min", "rank of equal rewards; max for rewards of 0 and 1", choices="min average max")
    lam: float = option(5.0, "lambda, weight of the admitted GRPO term beside the NLL")
    epsilon: float = option(0.2, "clip of the ratio in eq. 4; matters only with --updates above 1")
    reward: str = option("", "package.module:function as reward instead of the ranker (docs/models.md)")
    floor: float = option(0.0, "reward of what is no item; the ranker's rewards lie in 0..2", -1e30, 1e30)
    constrained: bool = option(False, "sample and search items only; likelihoods are over all words")
    sft_steps: int = option(400, "steps that train the base policy; 0: take --model", group="optimisation")
    sft_batch_size: int = option(128, "prompts per supervised step", 1)
    sft_lr: float = option(3e-3, "peak learning rate of the supervised steps; for --model rather 3e-4")
    rl_steps: int = option(200, "steps of --method, each on fresh rollouts; 0: only evaluate")
    batch_size: int = option(64, "B, prompts per step of --method, of all processes together", 1)
    micro_batch_size: int = option(0, "prompts that a process runs at once; saves memory, same loss; 0: all")
    updates: int = option(1, "optimizer steps per batch of rollouts", 1)
    lr: float = option(2e-3, "peak learning rate of --method; for --model rather 3e-5")
    grpo_lr: float = option(5e-5, "the same for pure GRPO, which has no NLL")
    max_history: int = option(10, "items of a history that the policy sees, the latest", 1, group="data")
    rl_prompts: int = option(0, "labelled prompts for --method; 0 takes all there are", high=10**9)
    log_holdout: float = option(0.1, "share of log.*, its last rows, that the ranker is judged on", high=0.9)
    bait: float = option(1.0, "toy: how far clicks in baited contexts follow bait, not taste; 0..1", high=1)
    beam_width: int = option(50, "W, beams per prompt in evaluation", 1, group="evaluation")
    eval_prompts: int = option(4000, "test prompts at the end; a quarter as many for validation", 1, 10**9)
    eval_every: int = option(50, "steps between two validations", 1)
    eval_batch_size: int = option(250, "prompts that are evaluated at once", 1)
    keep: str = option("last", "policy to test and save; best: by validation HR@10", choices="last best")
    out: str = option("", "folder for the results, new; default: one under runs/", group="running")
    resume: str = option("", "folder of a run that was stopped: go on from its last checkpoint")
    save_every: int = option(100, "steps between two checkpoints; 0 makes none")
    device: str = option("auto", "cpu, cuda, cuda:1 ..., or auto: a GPU where there is one")
    dtype: str = option("auto", "auto: bfloat16 for --model on a GPU", choices="auto float32 bfloat16")

    def __post_init__(self):
        check_settings(self)

    def tau_rho_ties(self):
        return dict(tau=self.tau, rho=self.rho, ties=self.ties)


# -- the policy: a prompt is run once, and a tree of Semantic IDs grows on its KV cache ----------------------


class PromptCache(NamedTuple):
    """What the model keeps of prompts; `tree_decode` and `sequence_logp` continue from it."""

    kv_cache: list  # per layer, keys and values (B, heads, T, width)
    mask: torch.Tensor  # (B, T) boolean attention mask, False at padding
    next_logp: torch.Tensor  # (B, 1, V) log-probabilities of the answer's first token; 1: a single branch
    target_logp: torch.Tensor | None = None  # (B, L) log-probabilities of the truth's tokens, if asked for

    def rows(self, index):
        kv_cache = [(k[index], v[index]) for k, v in self.kv_cache]
        return PromptCache(kv_cache, self.mask[index], self.next_logp[index])  # no target_logp


class Policy:
    """A Hugging Face causal language model whose vocabulary, cut in Part II, is Semantic IDs and little else.

    Its V token ids: 0 to S - 1 are the SID tokens of all levels, as the catalogue numbers them; S is <next>,
    which ends each prompt (query token); S + 1 is <start>, which begins it, if the model has one. If L = 3,
    two items make a prompt <start><a_1><b_7><c_3><a_4><b_0><c_9><next>; an answer is <a_4><b_2><c_5>.
    """

    def __init__(self, model, catalogue, cfg, tokenizer=None):
        self.model = model.to(cfg.device).eval()  # in training too: dropout would move eq. 4's ratio from 1
        self.catalogue, self.tokenizer = catalogue, tokenizer
        self.query, self.start = catalogue.S, model.config.get_text_config().bos_token_id  # start: or None
        self.constraint = catalogue if cfg.constrained else None  # what samples and beams have to follow
        accepted = inspect.signature(model.forward).parameters  # transformers 5.24 renames the argument
        self.cache_name = "cache" if "cache" in accepted else "past_key_values"
        able = cfg.device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        self.bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and bool(cfg.model) and able)

    def forward(self, tokens, attention_mask, kv_cache=None, keep=0):
        """Run n new tokens (B, n); attention_mask (B, n, cached + n): which cached and new ones each may see.

        Returns log-probabilities of what follows each token (B, n, V), or only the last `keep` of them if it
        is not 0; and the KV cache, longer by n.
        """
        positions = (attention_mask.sum(-1) - 1).clamp(min=0)  # = others it sees; padding: 0
        # Added to the attention scores. Not -inf: padding may see nothing; a softmax of -inf alone is NaN.
        mask = torch.where(attention_mask, 0.0, -1e30)[:, None]
        mask = mask.to(torch.bfloat16 if self.bf16 else self.model.dtype)
        cache = DynamicCache(kv_cache)  # appends by making new tensors: kv_cache stays as it was
        # With bf16, products are in bfloat16 but weights in float32: bfloat16 weights lose small updates.
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True,
                                logits_to_keep=keep, **{self.cache_name: cache}).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # no softmax in bfloat16
        return logits.log_softmax(-1), [(layer.keys, layer.values) for layer in cache.layers]


def prefill(policy, history, target=None):
    """Run histories (B, H) once -> PromptCache, with log-probabilities of the items `target` (B,), if given.

    One pass over prompt and truth gives both: attention is causal, so the truth changes nothing before it.
    """
    history = history[:, (history >= 0).any(0)]  # without columns that are padding in every row
    tokens = torch.where(history[..., None] >= 0, policy.catalogue.tokens[history], -1)  # (B, H, L)
    tokens = F.pad(tokens.flatten(1), (0, 1), value=policy.query)  # (B, H * L + 1), -1 at padding
    if policy.start is not None:  # left of the padding, which the mask hides
        tokens = F.pad(tokens, (1, 0), value=policy.start)
    T, keep = tokens.shape[1], 1  # the last `keep` tokens predict; here <next> alone
    if target is not None:  # L tokens predict the truth: <next>, and all of its own but the last
        truth, keep = policy.catalogue.tokens[target], policy.catalogue.L
        tokens = torch.cat([tokens, truth[:, :-1]], 1)
    mask = tokens >= 0
    causal = mask.new_ones(mask.shape[1], mask.shape[1]).tril()
    next_logp, kv_cache = policy.forward(tokens.clamp(min=0), mask[:, None] & causal, keep=keep)
    target_logp = None if target is None else next_logp.gather(-1, truth[..., None])[..., 0]
    kv_cache = [(k[:, :, :T], v[:, :, :T]) for k, v in kv_cache]  # without the truth
    return PromptCache(kv_cache, mask[:, :T], next_logp[:, :1], target_logp)


# A tree of Semantic IDs grows on each prompt, one token per level. At first the prompt is its only branch. At
# each level a function `select`, made by sample(...) or beam(...), extends the m branches to n, which are one
# token longer; `tree_decode` does the rest. `select` is given
#     prefix (B, m, level), the tokens of each branch so far; next_logp (B, m, V), log-probabilities of all
#     tokens that could follow; branch_logp (B, m), the log-probability of each branch
# and returns parent (B, n) and token (B, n): new branch j is the old branch parent[j], then token[j].


def unbranched(prefix, n):
    """Parents (B, n) of n samples: all begin at branch 0, the prompt; from then on sample j continues j."""
    B, m, _ = prefix.shape  # m is 1 at level 0, and then n
    return torch.arange(n, device=prefix.device).clamp(max=m - 1).expand(B, n)


def sample(uniform):
    """`select` for n independent samples: inverse-CDF by `uniform` (L, B, n), random numbers in [0, 1).

    A number picks the first token whose cumulative probability exceeds it. The numbers are drawn for the
    whole batch, so that the samples do not depend on how it is split over processes and micro-batches.
    """

    def select(prefix, next_logp, branch_logp):
        B, m, level = prefix.shape
        cdf = next_logp.float().exp().cumsum(-1)  # (B, m, V); the last one is 1 but for rounding
        u = uniform[level].view(B, m, -1)  # (B, 1, n) at level 0, and then (B, n, 1): one per branch
        token = torch.searchsorted(cdf, u * cdf[..., -1:], right=True)  # shaped as u; rounding may give V
        return unbranched(prefix, uniform.shape[-1]), token.clamp(max=cdf.shape[-1] - 1).flatten(1)

    return select


def beam(width):
    """`select` for beam search: the most likely continuations of all branches together."""

    def select(prefix, next_logp, branch_logp):
        V = next_logp.shape[-1]
        total = (branch_logp[..., None] + next_logp).flatten(1)  # (B, m * V)
        best = total.topk(min(width, total.shape[1])).indices
        return best // V, best % V  # parent, token

    return select


def tree_decode(policy, cache, select):
    """Grow a tree on each prompt -> tokens and log-probabilities (B, n, L) of its branches.

    The m branches of a level are run as ONE sequence of m tokens. The attention mask shows each of them the
    prompt, its ancestors and itself: so the prompt is never repeated. An example: after a prompt of 3 tokens,
    level 0 chose the tokens a and b, and level 1 x and y, both after a. When x and y are run, they see

              prompt   a b   x y
        x      1 1 1   1 0   1 0
        y      1 1 1   1 0   0 1

    To choose parents is to select rows of this mask, some more than once; the KV cache only grows.
    """
    kv_cache, next_logp, B = cache.kv_cache, cache.next_logp, len(cache.mask)
    mask = cache.mask[:, None]  # (B, m, T + tokens of the tree that were run): what each branch sees
    tokens, token_logp = next_logp.new_zeros(B, 1, 0, dtype=torch.long), next_logp.new_zeros(B, 1, 0)
    row = torch.arange(B, device=next_logp.device)[:, None]  # x[row, parent] (B, n, ...): x of the parents
    for level in range(policy.catalogue.L):
        if level:  # run the last token of each branch; that of the prompt has been run
            m = tokens.shape[1]
            itself = torch.eye(m, dtype=torch.bool, device=tokens.device).expand(B, m, m)
            mask = torch.cat([mask, itself], -1)
            next_logp, kv_cache = policy.forward(tokens[..., -1], mask, kv_cache)
        parent, token = select(tokens, next_logp, token_logp.sum(-1))
        tokens = torch.cat([tokens[row, parent], token[..., None]], -1)
        token_logp = torch.cat([token_logp[row, parent], next_logp[row, parent, token][..., None]], -1)
        mask = mask[row, parent]
    return tokens, token_logp


def sequence_logp(policy, cache, tokens):
    """Log-probabilities (B, n, L) of known Semantic IDs, with gradient. One pass runs them as one sequence of
    n blocks of L - 1 tokens; a token sees the prompt, and of its own block what is before it and itself."""
    B, n, L = tokens.shape
    first = cache.next_logp[:, 0].gather(1, tokens[..., 0])[..., None]  # (B, n, 1), from the prompt
    if L == 1:
        return first
    depth = L - 1  # tokens that are run: nothing comes after the last
    causal = cache.mask.new_ones(depth, depth).tril()  # the mask within a block
    blocks = torch.block_diag(*[causal] * n).expand(B, -1, -1)  # (B, n * depth, n * depth)
    mask = torch.cat([cache.mask[:, None].expand(B, n * depth, -1), blocks], -1)
    next_logp, _ = policy.forward(tokens[..., :-1].flatten(1), mask, cache.kv_cache)
    others = next_logp.view(B, n, depth, -1).gather(-1, tokens[..., 1:, None])[..., 0]
    return torch.cat([first, others], -1)


# -- the step: roll out, score, judge, learn -----------------------------------------------------------------
# Every process knows the whole batch and draws all random numbers for it, but runs only its own slices.
# Helpers from later parts (come back to this list for them):
#   make_generator(...)       random numbers by seed and purpose; batches(...) draws the prompts of all steps
#   batch.rows(part)          some rows of batch.history (B, H) and of batch.target (B,), the true items
#   local_micro_batches(...)  `parts`, the slices of the batch that this process runs; often only one
#   all_gather(pieces)        the rows of all slices and processes, joined; sum_gradients(...) over processes
#   diagnostics(...)          shares and means, only logged
#   constrained(select, ...)  lets `select` choose only items, if --constrained; distinct=True for beams
#   reward_of(...)            reward_fn's scores (B, n) of the whole batch; means of its named terms, to log
#   Optimizer.step(...)       AdamW with a falling rate, clipping, zero_grad; stops at what is not finite


class Method(NamedTuple):
    supervised: bool  # is the NLL part of the loss?
    admit: Callable | None  # (D, R, batch, generator) -> (B,) boolean: who gets GRPO. None: no rollouts.


def random_gate(difficult, reliable, batch, generator):
    """Admits as many prompts of the batch as AdaGRPO would, but random ones."""
    admitted = core.sample_clip(difficult, reliable)
    return admitted[torch.randperm(len(admitted), generator=generator, device=admitted.device)]


METHODS = {
    "nll": Method(True, None),  # control, not in the paper
    "grpo": Method(False, lambda D, R, *_: torch.ones_like(D)),
    "grpo+nll": Method(True, lambda D, R, *_: torch.ones_like(D)),
    "adagrpo-d": Method(True, lambda D, R, *_: D),
    "adagrpo-r": Method(True, lambda D, R, *_: R),
    "adagrpo": Method(True, lambda D, R, *_: core.sample_clip(D, R)),  # eq. 10: D and R
    "random-gate": Method(True, random_gate),  # control, not in the paper
}


@torch.no_grad()  # samples need no graph: `learn` runs those of the admitted prompts again, with one
def rollout(policy, batch, parts, K, generator):
    """Sample K Semantic IDs for each prompt of the batch, of which this process runs the slices `parts`.

    Returns tokens and log-probabilities (B, K, L) of the rollouts, and log-probabilities (B, L) of the truth;
    and the prompts' cache with its graph, from which `learn` goes on. With several parts it is None, since
    their graphs might not fit in memory: then `learn` runs the prompts again.
    """
    B, L = len(batch.target), policy.catalogue.L
    uniform = torch.rand(L, B, K, generator=generator, device=batch.target.device)
    pieces, keep_graph = [], len(parts) == 1  # then the last `cache` is the only one
    for part in parts:
        with torch.set_grad_enabled(keep_graph):  # prompts and truths: `learn` needs the graph of all
            cache = prefill(policy, batch.history[part], batch.target[part])
        select = constrained(sample(uniform[:, part]), policy.constraint)
        pieces.append((*tree_decode(policy, cache, select), cache.target_logp))
    tokens, logp, target_logp = map(all_gather, zip(*pieces, strict=True))  # each: all parts joined
    return tokens, logp, target_logp, (cache if keep_graph else None)


def draw_negatives(items, prompt_rows, M, generator):
    """For each prompt M random rollouts of others: (B, K) -> (B, M). Equal prompt_rows (B,): same prompt."""
    B, K = items.shape
    keys = torch.rand(B, B * K, generator=generator, device=items.device)  # (prompts, rollouts of all)
    # The core takes the M smallest keys, none of its own K. + 1 puts the rollouts of equal prompts last.
    keys += prompt_rows[:, None] == prompt_rows.repeat_interleave(K)
    return items.flatten()[core.in_batch_negatives(keys, k=K, m=M)]


def learn(policy, batch, selected, cache, method, cfg):
    """Add the gradient of a micro-batch of b prompts; returns NLL, GRPO loss and mean ratio of each (b, 3).

    `selected` is () or, of the A admitted prompts, rows in the micro-batch (A,), tokens and old
    log-probabilities (A, K, L), advantages (A, K). `cache` is the prompts', from `rollout`; None: run here.
    """
    cache = cache or prefill(policy, batch.history, batch.target)
    nll = core.nll_loss(cache.target_logp)  # (b,), eq. 2: minus the mean over the L tokens
    grpo, ratio = torch.zeros_like(nll), torch.zeros_like(nll)  # stay 0 where not admitted
    if selected:
        rows, tokens, old_logp, advantages = selected
        cache = cache if len(rows) == len(nll) else cache.rows(rows)  # no copy if all are admitted
        logp = sequence_logp(policy, cache, tokens)
        # (A,), eq. 4: PPO's clipped loss, mean over K rollouts and L tokens; no KL term.
        grpo[rows] = core.grpo_loss(logp, old_logp, advantages, epsilon=cfg.epsilon)
        ratio[rows] = (logp.detach() - old_logp).exp().mean((1, 2))
    loss = method.supervised * nll + cfg.lam * grpo  # eq. 5
    (loss.sum() / cfg.batch_size).backward()  # a mean over the whole batch, not over the admitted
    return torch.stack([nll, grpo, ratio], 1).detach()


def train_rl(policy, reward_fn, prompts, cfg, name, log, restore=lambda *_: 0, on_step=lambda *_: None):
    """Train `policy` in place by METHODS[name] ("sft": nll); reward_fn(history, item) scores (B, n).

    log(**row) is called once per step, then on_step(step, optimizer, generators, name): to evaluate, to save.
    restore(optimizer, generators, name) loads the state of a stopped run and returns the step to start at.
    """
    method, shuffle = (METHODS["nll"], "sft") if name == "sft" else (METHODS[name], "order")
    B, K = cfg.batch_size, cfg.group_size
    peak_lr = cfg.lr if method.supervised else cfg.grpo_lr
    optimizer = Optimizer(policy.model, peak_lr, cfg.rl_steps * cfg.updates)
    purposes = "rollouts", "negatives", "random gate"
    generators = {purpose: make_generator(cfg.seed, purpose, cfg.device) for purpose in purposes}
    # (steps, B) rows of `prompts`, by the seed alone: every method sees the same ones; sft has its own order.
    order = batches(len(prompts.target), B, cfg.rl_steps, make_generator(cfg.seed, shuffle)).to(cfg.device)
    parts = local_micro_batches(B, cfg.micro_batch_size)
    first_step = restore(optimizer, generators, name)

    for step in progress(range(first_step, cfg.rl_steps), name):
        batch = prompts.rows(order[step])
        cache, selected = None, [()] * len(parts)  # what `learn` is given without rollouts
        stats, checked = {}, {}  # `stats` are logged; both have to be finite, or the run stops
        if method.admit:
            # -- roll out: K samples of each prompt, from the policy as it is --------------------------------
            rollouts, old_logp, target_logp, cache = rollout(policy, batch, parts, K, generators["rollouts"])
            items = policy.catalogue.item(rollouts)  # (B, K), -1 for a hallucination: it gets --floor

            # -- score: rollouts, truth and negatives in one call, all under the prompt of their row ---------
            negatives = draw_negatives(items, order[step], cfg.negatives, generators["negatives"])  # (B, M)
            pool = torch.cat([items, batch.target[:, None], negatives], 1)  # (B, K + 1 + M)
            scored, stats = reward_of(reward_fn, batch.history, pool)
            checked = {"reward of an item": scored}
            rewards, target_reward, negative_rewards = scored[:, :K], scored[:, K], scored[:, K + 1 :]

            # -- judge: is the truth difficult for the policy, and the ranker reliable here? -----------------
            target_mean = core.length_normalized(target_logp)  # (B,), mean log-probability per token
            # A rollout equal to the truth must tie with it; in another pass, rounding may differ.
            rollout_mean = torch.where(items == batch.target[:, None], target_mean[:, None],
                                       core.length_normalized(old_logp))  # (B, K)
            # D (eq. 7): among truth and rollouts, the policy puts the truth beyond place tau * K (6 to 17).
            # R (eq. 9): among these and negatives, the ranker puts the truth within place tau * K (1 to 5),
            # each negative beyond (1 - rho) * K (12 to 18). Place 1 is best; in brackets: K = 16, M = 1.
            difficult = core.difficulty(target_mean, rollout_mean, tau=cfg.tau)  # (B,)
            reliable = core.reliability(target_reward, rewards, negative_rewards, **cfg.tau_rho_ties())
            admitted = method.admit(difficult, reliable, batch, generators["random gate"])  # (B,)
            advantages = core.group_advantages(rewards)  # (B, K), eq. 3: (r - mean) / (std + 1e-4)
            stats |= diagnostics(difficult, reliable, admitted, rewards, target_reward, rollouts, items, cfg)
            for i, part in enumerate(parts):
                rows = admitted[part].nonzero()[:, 0]  # counted within the micro-batch
                if len(rows):
                    selected[i] = rows, rollouts[part][rows], old_logp[part][rows], advantages[part][rows]

        # -- learn: all from the truth (but for pure GRPO), the admitted from their rollouts too (eq. 5) -----
        for _ in range(cfg.updates):
            terms = [learn(policy, batch.rows(part), each, cache, method, cfg)
                     for part, each in zip(parts, selected, strict=True)]
            cache = None  # backward has freed its graph: a second update runs the prompts again
            sum_gradients(policy.model)
            nll, grpo, ratio = all_gather(terms).unbind(1)  # (B,) each, of the whole batch
            stats["nll"] = nll.mean()
            if method.admit:  # the mean ratio of the admitted; 1 if there are none
                mean_ratio = torch.where(admitted.any(), ratio.sum() / admitted.sum(), 1.0)
                stats |= dict(grpo=grpo.mean(), ratio=mean_ratio)
            norm, lr = optimizer.step(f"{name}, step {step + 1}", **stats, **checked)

        log(step=step + 1, lr=lr, **stats, gradient_norm=norm)
        on_step(step + 1, optimizer, generators, name)


def train_sft(policy, prompts, cfg, log, **callbacks):
    """Train the base policy on the NLL of the next item (eq. 2): `train_rl` with the method nll."""
    cfg = dataclasses.replace(cfg, method="nll", batch_size=cfg.sft_batch_size, lr=cfg.sft_lr,
                              rl_steps=cfg.sft_steps, updates=1)  # nll: K and M need not fit this size
    train_rl(policy, None, prompts, cfg, "sft", functools.partial(log, phase="sft"), **callbacks)


# -- evaluation ----------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(policy, ranker, prompts, cfg):
    """Beam search and 8 samples for every prompt. Returns the mean of each metric; and, per prompt, metrics,
    beams (`item`; `logp`, the mean per token), and the rank of the truth among the valid beams."""
    n, pieces, generator = len(prompts.target), [], make_generator(cfg.seed, "evaluation", cfg.device)
    search = constrained(beam(cfg.beam_width), policy.constraint, distinct=True)
    cutoffs = [k for k in (1, 10, 50) if k <= cfg.beam_width]  # HR@50 of 10 beams would be HR@10
    uniform = torch.rand(policy.catalogue.L, n, 8, generator=generator, device=cfg.device)
    for part in progress(local_micro_batches(n, cfg.eval_batch_size), "evaluate"):
        # Equally many rows for each process: those past the end repeat the last; [:n] below drops them.
        rows = torch.arange(part.start, part.stop, device=cfg.device).clamp(max=n - 1)
        batch = prompts.rows(rows)
        cache = prefill(policy, batch.history)
        beams, logp = tree_decode(policy, cache, search)
        if not logp.isfinite().all():
            raise UserError("evaluation: the policy's likelihoods are not finite; lower its learning rate")
        samples, _ = tree_decode(policy, cache, constrained(sample(uniform[:, rows]), policy.constraint))
        item = policy.catalogue.item(beams)  # (B, W), most likely first
        valid = item >= 0
        rank = valid.cumsum(1)  # among the valid beams: (valid, invalid, valid) has 1, 1, 2
        hit = item == batch.target[:, None]
        target_rank = torch.where(hit, rank, 10**9).amin(1)  # beyond every cutoff where the beams missed it
        terms = {f"hr@{k}": target_rank <= k for k in cutoffs}
        if 10 in cutoffs:
            terms["ndcg@10"] = terms["hr@10"] / torch.log2(1.0 + target_rank)
        for head, p in ranker.probabilities(batch.history, item).items():  # click, order; 0 for no item
            terms |= {f"{head}_reward@{k}": (p * (rank <= k)).amax(1) for k in cutoffs}
        terms["hallucination"] = 1 - valid.float().mean(1)
        terms["sampled_hallucination"] = (policy.catalogue.item(samples) < 0).float().mean(1)
        terms = {key: x.float() for key, x in terms.items()}
        pieces.append(terms | dict(rank=target_rank, item=item, logp=logp.mean(-1)))
    each = {key: all_gather([piece[key] for piece in pieces])[:n] for key in pieces[0]}
    return {key: each[key].mean().item() for key in terms}, each  # no means of rank, item and logp


# == Part II: the shop =======================================================================================
# At first reading, stop here: what follows is needed by the method, but is not the method.


class Catalogue:
    """The items and their Semantic IDs, `tokens` (N, L), numbered over all levels from 0 to S - 1."""

    def __init__(self, sids, device="cpu"):
        self.row = {sid: i for i, sid in enumerate(sids)}
        codes = sorted({pair for sid in sids for pair in enumerate(sid)})  # (level, code)
        number = {pair: token for token, pair in enumerate(codes)}
        tokens = np.array([[number[pair] for pair in enumerate(sid)] for sid in sids])
        (self.N, self.L), self.S = tokens.shape, len(codes)
        # Spelt as MiniOneRec does, so that a model of theirs finds the words it knows.
        self.words = [str(code) for _, code in codes]
        if len({word for word in self.words if re.fullmatch(r"<[^<>\s]+>", word)}) < self.S:
            self.words = [f"<{chr(97 + i)}_{code}>" for i, code in codes]
        # Per level, the sorted pairs node * S + token of a node (a prefix that exists) and a token that
        # continues it. A pair's place is the node's number at the next level.
        node, self.pairs, self.fan_out = np.zeros(self.N, int), [], []
        for column in tokens.T:
            pairs, node = np.unique(node * self.S + column, return_inverse=True)
            self.pairs.append(torch.as_tensor(pairs, device=device))
            self.fan_out.append(np.bincount(pairs // self.S).max())  # the most continuations of a node
        self.tokens, self.item_at = (torch.as_tensor(x, device=device) for x in (tokens, np.argsort(node)))

    def node(self, prefix):
        """(..., l) tokens -> (...) numbers of nodes; of any other where there is no such node."""
        node = prefix.new_zeros(prefix.shape[:-1])
        for token, pairs in zip(prefix.unbind(-1), self.pairs, strict=False):
            node = torch.searchsorted(pairs, node * self.S + token).clamp(max=len(pairs) - 1)
        return node

    def item(self, tokens):
        """(..., L) words of the policy -> (...) items, -1 where none has that Semantic ID."""
        item = self.item_at[self.node(tokens)]
        return torch.where((self.tokens[item] == tokens).all(-1), item, -1)

    def continuations(self, prefix):
        """Words that lead on from prefixes (B, n, l) of items, padded to (B, n, C); which are no padding."""
        node, level = self.node(prefix)[..., None], prefix.shape[-1]
        pairs = self.pairs[level]  # a node's lie side by side
        first, end = torch.searchsorted(pairs, torch.stack([node, node + 1]) * self.S)
        place = first + torch.arange(self.fan_out[level], device=node.device)
        return pairs[place.clamp(max=len(pairs) - 1)] % self.S, place < end


def constrained(select, catalogue, distinct=False):
    """`--constrained`: the same choice among words with which some item goes on; None leaves it as it is.

    The tree still notes the free softmax's likelihoods, which D and the ratio compare. Branches that have to
    be distinct, as beams, can be no more than there are prefixes of items.
    """

    def among_items(prefix, next_logp, branch_logp):
        words, valid = catalogue.continuations(prefix)  # (B, m, C)
        next_logp = next_logp.gather(-1, words).masked_fill(~valid, -torch.inf)
        norm = next_logp.logsumexp(-1)  # (B, m); without it, exp() of all that are allowed could be 0
        parent, place = select(prefix, next_logp - norm[..., None], branch_logp + norm)
        row = torch.arange(len(words), device=words.device)[:, None]
        most = len(catalogue.pairs[prefix.shape[-1]]) if distinct else None  # beyond them, beams are padding
        return parent[:, :most], words[row, parent, place][:, :most]

    return among_items if catalogue else select


class Prompts(NamedTuple):
    history: torch.Tensor  # (n, H) items, oldest first, -1 on the left where there are fewer
    target: torch.Tensor  # (n,) the item that was bought next
    user: torch.Tensor  # (n,) number of the user, or of the row; read by gates of your own

    def rows(self, index):
        return type(self)(*(x if x is None else x[index] for x in self))


class ImpressionLog(NamedTuple):
    history: torch.Tensor  # (n, H)
    item: torch.Tensor  # (n, I) what was shown, -1 on the right where there was less
    click: torch.Tensor  # (n, I) boolean
    order: torch.Tensor | None = None  # (n, I) boolean, only where clicked; None if not recorded

    rows = Prompts.rows


class Data(NamedTuple):
    catalogue: Catalogue
    sft: Prompts
    rl: Prompts
    valid: Prompts
    test: Prompts
    log: ImpressionLog  # what the ranker learns from
    holdout: ImpressionLog | None  # and what it is judged on
    source: str  # of the log, in words
    world: dict | None = None  # the toy's truth, which no learner may see


LAYOUTS = {"index.json": ".csv", "catalogue.json": ".jsonl"}  # catalogue -> ending of the files beside it


def load_data(folder, cfg):
    """Read MiniOneRec's layout or JSONL, see docs/data.md."""
    folder, device = Path(folder), cfg.device
    source = next((name for name in LAYOUTS if os.path.isfile(folder / name)), None)  # never raises
    if not source:
        raise UserError(f"{folder}: holds neither index.json nor catalogue.json to read, see docs/data.md"
                        + "; if the data have moved, name them by --data" * bool(cfg.resume))
    catalogue, ending = Catalogue(read_catalogue(folder / source), device), LAYOUTS[source]
    for path in sorted(folder.iterdir()):  # what would not be read, Log.jsonl on Linux too
        optional = re.fullmatch(r"(rl|log)\.(csv|tsv|jsonl?)(\.gz)?", path.name, re.I)
        if optional and path.name not in (f"rl{ending}", f"log{ending}"):
            raise UserError(f"{path}: {source} goes with {optional[1].lower()}{ending}; convert or rename "
                            "this, or move it away")

    def prompts(name):
        history, target = read_rows(folder / f"{name}{ending}", catalogue, source, cfg)
        return Prompts(history, target[:, 0], torch.arange(len(target), device=device))

    train, valid, test = map(prompts, ("train", "valid", "test"))
    labelled = prompts("rl") if os.path.lexists(folder / f"rl{ending}") else train
    rl = subset(labelled, cfg.rl_prompts, cfg.seed, "prompts of the method")
    if os.path.lexists(folder / f"log{ending}"):
        log = ImpressionLog(*read_rows(folder / f"log{ending}", catalogue, source, cfg))
        n = len(log.item) - int(len(log.item) * cfg.log_holdout + 1e-9)
        if not log.click[:n].any():
            raise UserError(f"{folder}/log{ending}: no click in the first {n} rows, which teach the ranker; "
                            "add some, or take the file away: then it learns from purchases")
        origin = f"{n} of {len(log.item)} rows of log{ending}"
        log, holdout = log.rows(slice(n)), log.rows(slice(n, None)) if n < len(log.item) else None
    else:  # the ranker learns to tell what was bought from 15 other items
        n, generator = len(train.target), make_generator(cfg.seed, "negatives of the ranker", device)
        others = torch.randint(catalogue.N, (n, 15), generator=generator, device=device)
        item = torch.cat([train.target[:, None], others], 1)
        log, holdout = ImpressionLog(train.history, item, item == item[:, :1]), None
        origin = f"train{ending}, what was bought against 15 items at random (there is no log{ending})"
    return Data(catalogue, train, rl, valid, test, log, holdout, origin)


def subset(prompts, n, seed, purpose):
    """n prompts at random; all of them where there are fewer, or n is 0."""
    order = torch.randperm(len(prompts.target), generator=make_generator(seed, purpose))[: n or None]
    return prompts.rows(order.to(prompts.target.device))


def read_catalogue(path):
    """The distinct Semantic IDs, in their order; items that share one cannot be told apart."""
    with in_one_line(f"{path}: not valid JSON", "it has to be in UTF-8, and to hold item -> list of tokens"):
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    sids, like = {}, ("<a_12>", "<b_3>")  # so that a cell of CSV can hold several
    entries = dict(enumerate(entries)) if isinstance(entries, list) else entries
    for name, sid in entries.items() if isinstance(entries, dict) else ():
        kinds, first = [*map(type, sid)] if isinstance(sid, list) else [], [*next(iter(sids), like)]
        if (not kinds or not {*kinds} <= {int, str} or (sids and kinds != [*map(type, first)])
                or any(code in (QUERY_TOKEN, START_TOKEN) or not str(code).isprintable()
                       or re.search(r"><(._|(next|start)\b)", str(code)) for code in sid)  # two words in one
                or (path.name == "index.json" and not all(re.fullmatch("<[^<>]+>", str(x)) for x in sid))):
            raise UserError(f"{path}, item {name!s:.40}: got {sid!r:.80}; expected a list of tokens such as "
                            f"{first!r:.60}, the same number of tokens of the same sort in each; rename "
                            f"{QUERY_TOKEN}, {START_TOKEN}, '><b_' and what cannot be printed")
        sids.setdefault(tuple(sid))
    if not sids:
        raise UserError(f"{path}: holds no items; expected item -> list of tokens")
    return list(sids)


def read_rows(path, catalogue, source, cfg):
    """Prompts, as tensors history and target; or the log: history, shown, click, and order if recorded.

    Each is (n, longest), -1 or False where a row has less. What cannot be used is refused by its line.
    """
    is_log, is_csv, found = path.stem == "log", path.suffix == ".csv", []
    spell = "".join if is_csv else list  # a Semantic ID as the rows have it
    items = {repr(spell(sid)): i for sid, i in catalogue.row.items()}  # repr: 0.0 and False are equal to 0
    flags = {"0": False, "1": True, "False": False, "True": True}
    sid = spell(next(iter(catalogue.row)))
    history, target, shown = (("history_item_sid", "item_sid", "shown_item_sid") if is_csv
                              else ("history", "target", "shown"))
    like = {history: [sid, sid]}  # columns, and what their cells look like
    like |= {shown: [sid, sid], "click": [1, 0], "order": [0, 0]} if is_log else {target: sid}
    with in_one_line(path, f"{source} needs train, valid and test{path.suffix} beside it, in UTF-8"):
        text = path.read_text(encoding="utf-8-sig").rstrip()  # with or without a byte-order mark

    def parse(column, x):
        if is_csv and column != target:  # a Python list: parsed as such, never evaluated
            x = ast.literal_eval(x)
        x = [x] if column == target and x is not None else x
        if not isinstance(x, list) or not (x or (is_log and column == history)):
            raise TypeError
        number = flags if column in ("click", "order") else items
        read = [number.get(repr(y)) for y in x]
        if None in read and number is items:
            raise UserError(f"{column}: Semantic ID {x[read.index(None)]!r:.60} is not in {source}, where "
                            f"all are like {sid!r:.60}, {catalogue.L} tokens, numbers or text")
        if None in read:
            raise TypeError
        return read[-cfg.max_history :] if column == history else read

    rows = text.split("\n") if text else []  # splitlines() would split at U+2028 too
    try:
        if is_csv:
            warnings.simplefilter("ignore", SyntaxWarning)  # of literals, which are refused in one line
            csv.field_size_limit(2**31 - 1)  # a long history, or a column that nobody reads
            rows = csv.DictReader((x + "\n" for x in rows), restval="", strict=True)
            header = list(rows.fieldnames or ())
            if any(header.count(x) != 1 and (x != "order" or x in header) for x in like):
                raise UserError(f"one column for each is needed, there are {header!r:.120}")
        for row in rows:
            column, cell, x = "the row", row, {}
            found.append(x)
            row = row if is_csv else json.loads(row)
            for column in like:
                cell = row.get(column, row)
                if column != "order" or row.get(column) is not None:
                    x[column] = parse(column, row.get(column))
            if x.keys() != found[0].keys():
                raise UserError("order has to be there in all rows or in none")
            if is_log:
                click, order = x["click"], x.get("order", x["click"])
                if not len(x[shown]) == len(click) == len(order):
                    raise UserError("shown, click and order are not equally long")
                if any(y > z for y, z in zip(order, click, strict=True)):
                    raise UserError("an order without a click")
    except Exception as error:  # a file can be anything
        what = error if isinstance(error, UserError | csv.Error) else f"{column}: got {cell!r:.100}"
        expected = ", ".join(f"{name} like {cells}" for name, cells in like.items())
        line = rows.reader.line_num or 1 if is_csv else len(found)
        raise UserError(f"{path}, line {line}: {what}; expected {expected}; or drop the row") from None
    if not found:
        raise UserError(f"{path}: holds no rows; put at least one in it, as docs/data.md shows")
    for column in found[0]:
        side, fill = "left" if column == history else "right", False if column in ("click", "order") else -1
        rows = [torch.tensor(x[column] or [-1]) for x in found]
        yield nn.utils.rnn.pad_sequence(rows, True, fill, side).to(cfg.device)


# -- the toy world: a shop whose click log misleads in some places; docs/toy.md gives the reasons ------------


@dataclasses.dataclass(frozen=True)
class World:
    codes: int = 24  # per level
    items: int = 2000  # about
    users: int = 4000
    dims: int = 8  # of taste
    taste: float = 3.5  # standard deviation of what a user likes, over items
    quality: float = 2.0  # of what everyone likes; drawn anew before the RL week
    node_share: float = 0.7  # of quality's variance that all items of a level-2 node have in common
    popularity: float = 0.5  # weight of log popularity in choice; in exposure it is 1
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
    """A made-up shop: catalogue, users' lives, and the log of what they were shown."""
    w, users = world, np.arange(world.users)[:, None]
    of_items, of_users, of_lives, of_log = (np.random.default_rng([cfg.seed, i]) for i in range(4))

    # items: a taxonomy numbered consecutively, a place in taste space, popularity, quality then and now
    g, leaves = of_items, w.items / w.codes / 8  # per node of level 2, on average
    sids = [(a, b, c) for a in range(w.codes) for b in range(np.clip(g.poisson(8), 1, w.codes))
            for c in range(np.clip(round(g.gamma(1.2, leaves / 1.2)), 1, w.codes))]
    level1, level2, _ = np.array(sids).T
    node = np.unique(level1 * w.codes + level2, return_inverse=True)[1]
    N, nodes = len(sids), node.max() + 1
    place = (0.5**0.5 * g.standard_normal((w.codes, w.dims))[level1]  # half of the variance by the first code
             + 0.3**0.5 * g.standard_normal((nodes, w.dims))[node]
             + 0.2**0.5 * g.standard_normal((N, w.dims)))
    popularity = -np.log(1 + g.permutation(N))  # Zipf
    quality_then, quality = w.quality * (w.node_share**0.5 * g.standard_normal((2, nodes))[:, node]
                                         + (1 - w.node_share) ** 0.5 * g.standard_normal((2, N)))
    # What draws clicks where bait works is an attribute that good items lack. Nobody chooses by it.
    bait = w.bait_pull * (-0.9 * quality / w.quality + 0.19**0.5 * g.standard_normal(N))
    complement = g.permutation(nodes)[node, None]
    context = 0.5 * (level1[:, None] == level1) + 0.5 * (node[:, None] == node) + (complement == node)
    context = context.astype(np.float32)  # (N, N): what goes with the last item

    # users: what each wants and is shown of all items (users, N)
    likes, popular = of_users.standard_normal((w.users, w.dims)), w.popularity * popularity
    taste = (w.taste * likes / np.linalg.norm(likes, axis=1, keepdims=True) @ place.T).astype(np.float32)
    wanted_then, wanted = (np.exp(taste + np.float32(q + popular)) for q in (quality_then, quality))
    shown = np.exp(0.3 * taste + np.float32(0.3 * quality_then + popularity))  # by yesterday's server
    # Bait works where the last item lies in one of these nodes: drawn until half of all choices are there.
    often = np.bincount(node, (wanted / wanted.sum(1, keepdims=True)).mean(0))  # (nodes,) their shares
    drawn = of_users.permutation(nodes)
    baited = np.isin(np.arange(nodes), drawn[often[drawn].cumsum() - often[drawn] / 2 < 0.5])[node]  # (N,)

    def draw(g, weight, n):  # n items per user, with replacement, in proportion to weight (users, N)
        below = np.cumsum(weight, axis=1, dtype=np.float64)
        below = below / below[:, -1:] + users  # user u's from u to u + 1, so that all are sorted
        return np.minimum(np.searchsorted(below.ravel(), g.random((w.users, n)) + users) - N * users, N - 1)

    # lives: in the RL week users choose from a feed that is logged, otherwise among all items
    pull, rl_week, logs, H = np.exp(context), w.warm_up + w.sft, [], min(w.history, cfg.max_history)
    life = np.zeros((w.users, rl_week + w.rl + w.valid + w.test), int)
    for t in range(life.shape[1]):
        last = life[:, t - 1] if t else draw(of_lives, wanted_then, 1)[:, 0]
        if rl_week <= t < rl_week + w.rl:
            item = draw(of_log, shown, w.impressions)
            utility = taste[users, item] + quality[item] + context[last[:, None], item]
            share = cfg.bait * baited[last][:, None]
            appeal = (1 - share) * utility + share * bait[item]
            click = of_log.random(item.shape) < 1 / (1 + np.exp(w.click_at - appeal))
            order = click & (of_log.random(item.shape) < 1 / (1 + np.exp(w.order_at - appeal)))
            logs.append((item, click, order))
            liked = utility + popular[item] + of_lives.gumbel(size=item.shape)
            life[:, t] = item[users[:, 0], liked.argmax(1)]  # in proportion to exp(utility): no bait
        else:
            life[:, t] = draw(of_lives, (wanted if t >= rl_week else wanted_then) * pull[last], 1)[:, 0]

    def columns(steps):  # step by step, user by user
        return [torch.as_tensor(np.concatenate(x), device=cfg.device) for x in zip(*steps, strict=True)]

    prompts = columns((life[:, t - H : t], life[:, t], users[:, 0]) for t in range(w.warm_up, life.shape[1]))
    sizes = [n * w.users for n in (w.sft, w.rl, w.valid, w.test)]
    sft, rl, valid, test = map(Prompts, *(x.split(sizes) for x in prompts))  # one period after the other
    log = ImpressionLog(rl.history, *columns(logs))
    rl = subset(rl, cfg.rl_prompts, cfg.seed, "prompts of the method")
    truth = dict(taste=taste, quality=quality, context=context, popularity=popularity, baited=baited,
                 level1=level1)
    return Data(Catalogue(sids, cfg.device), sft, rl, valid, test, log, None, "the toy's log", truth)


# -- the ranker: the reward model, trained on the log alone --------------------------------------------------


class Ranker(nn.Module):
    """Click, and order given click: a dot product of user and item, and a small network on the pair."""

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
        known = (history >= 0)[..., None]
        past = items[history.clamp(min=0)] * known
        user = self.user(torch.cat([past.sum(1) / known.sum(1).clamp(min=1), past[:, -1]], -1))
        candidate = items[item.clamp(min=0)]  # (B, n, width)
        last = past[:, -1:].expand_as(candidate)
        affinity = torch.einsum("bhw,bnw->bnh", user.view(len(user), self.heads, -1), candidate)
        return affinity + self.pair(torch.cat([candidate, last, candidate * last], -1))

    @torch.no_grad()
    def probabilities(self, history, item):
        """{"click": (B, n), "order": (B, n), given a click, if the log has orders}; 0 for what is no item."""
        p = self(history, item).sigmoid() * (item >= 0)[..., None]
        return dict(zip(("click", "order"), p.unbind(-1), strict=False))


def train_ranker(catalogue, log, cfg, epochs=3, least_steps=100, batch=64, lr=1e-2):
    torch.manual_seed(cfg.seed)
    ranker = Ranker(catalogue, heads=1 if log.order is None else 2).to(cfg.device)
    steps = max(least_steps, epochs * len(log.item) // batch)  # a short log is gone through more often
    optimizer = Optimizer(ranker, lr, steps)
    order = batches(len(log.item), batch, steps, make_generator(cfg.seed, "ranker")).to(cfg.device)
    longest = (log.item >= 0).sum(1)[order].amax(1).tolist()  # one long row shall not pad all batches
    for step in progress(range(steps if rank() == 0 else 0), "ranker"):
        history, *shown = log.rows(order[step])
        item, click, ordered = (x if x is None else x[:, : longest[step]] for x in shown)
        logit, click, shown = ranker(history, item), click.float(), (item >= 0).float()
        loss = F.binary_cross_entropy_with_logits(logit[..., 0], click, weight=shown)
        if ordered is not None:  # an order can be seen only where there was a click
            loss = loss + F.binary_cross_entropy_with_logits(logit[..., 1], ordered.float(), weight=click)
        loss = loss / shown.mean()  # rows may be of different lengths
        loss.backward()
        optimizer.step(f"ranker, step {step + 1}", loss=loss)
    broadcast(ranker)
    return ranker.eval().requires_grad_(False)


@torch.no_grad()
def judge_ranker(ranker, log):
    """{"click_auc", "order_auc"}: how often what was clicked (of that: ordered) is put above what was not."""
    found, p = {}, [*map(ranker.probabilities, log.history.split(1024), log.item.split(1024))]
    for head, counts in zip(p[0], (log.item >= 0, log.click), strict=False):  # the heads are those of the log
        x, label = torch.cat([part[head] for part in p]), getattr(log, head)
        yes, no = x[counts & label], x[counts & ~label].sort().values
        if len(yes) and len(no):  # equal ones count half
            below = torch.searchsorted(no, yes) + torch.searchsorted(no, yes, right=True)
            found[f"{head}_auc"] = below.sum().item() / (2 * len(yes) * len(no))
    return found


def make_reward(ranker, cfg):
    """r(history, item) -> (B, n): p(click) + p(click and order), in 0..2, of each item alone: eq. 8's r."""

    def reward(history, item):
        p = ranker.probabilities(history, item)
        return torch.where(item >= 0, p["click"] * (1 + p.get("order", 0.0)), cfg.floor)

    return reward


@torch.no_grad()  # if it turns gradients off, that ends here
def own_reward(cfg, names, history, item):
    """The same by --reward: function(history, item) -> (B, n) scores, or {name: scores} to be added up.

    Whatever goes wrong in the user's code is said in one line, with the place in their file. `names` of the
    first call have to stay: every process gathers them, and in one order.
    """
    def numbers(x):  # in float64: of large scores, such as times in seconds, float32 would make ties
        if isinstance(x, list | tuple) and any(torch.is_tensor(row) for row in x):
            return torch.stack([*map(numbers, x)])  # NumPy takes no list of tensors on a GPU
        x = x if torch.is_tensor(x) else np.array(x, subok=True)
        if isinstance(x, np.ma.MaskedArray) or re.search("complex|time", str(x.dtype)):
            raise TypeError("a score is masked, complex or a time")
        return (x if torch.is_tensor(x) else torch.tensor(x.astype(float))).to(item.device, torch.float64)

    sys.path.append(here := os.getcwd())  # modules in the current folder are found too
    try:
        module, _, name = cfg.reward.partition(":")
        function = getattr(importlib.import_module(module), name)
        found = named(function(history.clone(), item.clone()))  # copies: it may write into what it is given
        if (torch.get_default_dtype(), torch.get_default_device().type) != (torch.float32, "cpu"):
            torch.set_default_dtype(torch.float32), torch.set_default_device(None)
            raise ValueError("it changes torch's default dtype or device; name them where tensors are made")
        names[:] = names or sorted(found)
        if names != sorted(found):
            raise ValueError(f"parts {sorted(found)} instead of {names}")
        parts = {key: numbers(found[key]) for key in names}
        if wrong := [tuple(x.shape) for x in parts.values() if x.shape != item.shape]:
            raise ValueError(f"shape {wrong} instead of {tuple(item.shape)}")
        if not all(x[item >= 0].float().isfinite().all() for x in (*parts.values(), sum(parts.values()))):
            raise ValueError("a score is not finite, or beyond float32")
        return {key: torch.where(item >= 0, x, cfg.floor / len(parts)) for key, x in parts.items()}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() and a cancelled task too
        place = [f" in {x.filename}, line {x.lineno}" for x in traceback.extract_tb(error.__traceback__)
                 if x.filename != __file__ and "importlib" not in x.filename]
        what = type(error).__name__ + "".join(place[:1])
        raise UserError(f"--reward {cfg.reward}: {what}: {first_line(error)}; expected package.module:"
                        "function, found from here, that gives each item a number (docs/models.md)") from None
    finally:
        with contextlib.suppress(ValueError, OSError):
            os.chdir(here)  # where the run's folder is
            sys.path.remove(here)


def named(scores):
    """The parts of a reward by name; "" if it has but one."""
    return scores if isinstance(scores, dict) and scores else {"": scores}


def first_copy(item):
    """(B, n) where each item stands first in its row: its copies get that score, none is rounded apart."""
    return (item[:, :, None] == item[:, None]).int().argmax(2)


def reward_of(reward_fn, history, item):
    """Scores (B, n) of the whole batch, each process having asked for its own rows; means of named parts."""
    [local] = local_micro_batches(len(item), 0)
    with torch.no_grad():
        scores = named(reward_fn(history[local], item[local]))
    first = first_copy(item)
    scores = {name: all_gather([x]).gather(1, first) for name, x in scores.items()}
    return sum(scores.values()), {f"reward/{name}": x.mean() for name, x in scores.items() if name != ""}


@torch.no_grad()
def ranker_influence(policy, reward, prompts, each, cfg):
    """The paper's Section 4 for prompts that were evaluated, `each` having their beams: a row of numbers.

    It is the gate with beams as rollouts, and beside it that of a ranker which answers at random. A truth
    that the beams have missed is ranked as if it were among them.
    """
    item, M = each["item"], cfg.negatives
    n, W = item.shape
    if n < 2 or not M or W * cfg.tau < 1:
        return {}
    generator, row = make_generator(cfg.seed, "influence", cfg.device), torch.arange(n, device=cfg.device)
    u = torch.rand(n, W + 1 + 3 * M, generator=generator, device=cfg.device)
    other, place, chance = u.split([M, M, W + 1 + M], 1)
    negatives = item[(row[:, None] + 1 + (other * (n - 1)).long()) % n, (place * W).long()]
    pool = torch.cat([item, prompts.target[:, None], negatives], 1)  # (n, W + 1 + M)
    parts = [(prompts.rows(rows), pool[rows]) for rows in row.split(cfg.eval_batch_size)]
    first = torch.cat([first_copy(x) for _, x in parts])
    by_ranker = torch.cat([sum(named(reward(y.history, x)).values()) for y, x in parts]).gather(1, first)
    by_chance = torch.where(pool < 0, -1.0, chance.gather(1, first))
    target_logp = torch.cat([prefill(policy, x.history, x.target).target_logp for x, _ in parts])
    target_logp = core.length_normalized(target_logp)
    logp = torch.where(item == prompts.target[:, None], target_logp[:, None], each["logp"])

    llm_rank, hard = core.policy_rank(target_logp, logp), core.difficulty(target_logp, logp, tau=cfg.tau)
    found = dict(prompts=n, beams=W)
    for who, x in ("ranker", by_ranker), ("chance", by_chance):
        x = x[:, W], x[:, :W], x[:, W + 1 :]
        rm_rank = core.policy_rank(*x[:2], ties=cfg.ties)
        reliable = core.reliability(*x, **cfg.tau_rho_ties())
        found[f"{who}/reliable"] = reliable.float().mean()
        strata = core.reward_influence(llm_rank, rm_rank, hard=hard, discriminable=reliable)
        for name, stratum in strata._asdict().items():
            found |= {f"{who}/{name}/{key}": x for key, x in stratum._asdict().items() if x.isfinite()}
    return found


# -- models: a tiny new one, or a pretrained one whose vocabulary is cut -------------------------------------

QUERY_TOKEN, START_TOKEN = "<next>", "<start>"
KEYS_TO_IGNORE = r"masked_bias|\battn(\.attention)?\.bias$|pooler|seq_relationship"  # old masks, BERT's heads


def tiny_policy(catalogue, cfg, width=64, layers=2):
    torch.manual_seed(cfg.seed)
    config = transformers.LlamaConfig(
        vocab_size=catalogue.S + 1, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=(cfg.max_history + 1) * catalogue.L + 1,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return make_policy(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), catalogue, cfg)


def make_policy(model, catalogue, cfg):
    """Policy of a model whose vocabulary is cut, with a tokenizer in which each word is one token."""
    special = [QUERY_TOKEN, START_TOKEN][: 1 if model.config.get_text_config().bos_token_id is None else 2]
    tokenizer = Tokenizer(models.WordLevel({}))
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in [*catalogue.words, *special]])
    tokenizer.decoder = decoders.Fuse()  # or decoding would put spaces between the words
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*special[1:], "$A", QUERY_TOKEN], special_tokens=list(enumerate(special, catalogue.S)))
    roles = dict(zip(("pad_token", "bos_token"), special, strict=False))  # padding is masked: any will do
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **roles)
    model.generation_config = transformers.GenerationConfig(max_new_tokens=catalogue.L)  # no inherited one
    return Policy(model, catalogue, cfg, tokenizer)


def pretrained_policy(catalogue, cfg):
    """The causal language model --model, from the hub or a folder, cut to Semantic IDs."""
    torch.manual_seed(cfg.seed)  # some families draw at random what their file does not hold
    what = f"--model {cfg.model}" + ", no folder here" * (not os.path.isdir(cfg.model))
    remedy = ("expected a decoder-only model of plain attention (config.json, safetensors): hub name or "
              "folder, such as RUN/policy or RUN/policy/METHOD")
    files, known = " ".join(path.name for path in Path(cfg.model).glob("*")), {}  # word -> its row
    with in_one_line(what, remedy):
        if "adapter_config.json" in files:  # transformers might leave it out
            raise ValueError("it holds an adapter; merge that into the model, and save it")
        config = AutoConfig.from_pretrained(cfg.model, trust_remote_code=False).get_text_config()
        what += f", a {config.model_type}"
    with in_one_line(what, remedy):
        T = (cfg.max_history + 1) * catalogue.L + 1  # of start, history, query and L - 1 tokens
        context = getattr(config, "max_position_embeddings", None) or T
        if 0 < context < T:
            raise ValueError(f"its context of {context} tokens is too short for {T}; lower --max-history")
        if not files or re.search(r"tokenizer|vocab|tekken|\.model\b", files):  # without one it knows no word
            with in_one_line("its tokenizer cannot be loaded"):
                tokenizer = AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False)
            known = tokenizer.get_vocab() | {START_TOKEN: tokenizer.bos_token_id}
        model, found = AutoModelForCausalLM.from_pretrained(  # never pickled weights, never code from the hub
            cfg.model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, return_dict=True)
        wrong = [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"]),
                 *(name for name in found["unexpected_keys"] if not re.search(KEYS_TO_IGNORE, name)),
                 *(name for name, p in model.named_parameters() if not p.isfinite().all())]
        if wrong:
            raise ValueError(f"{min(wrong)} is missing, of another shape, not of this model, or not finite")
        return cut_vocabulary(model.eval(), known, catalogue, cfg)


def tables_of(model):
    """All that has a row for each word: embeddings, the head unless it is the same, its bias if any."""
    head = model.get_output_embeddings()
    found = model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)
    return list(dict.fromkeys(x for x in found if x is not None))


def teacher_forcing(tokens):
    """Follow given Semantic IDs (B, n, L); a `select` for checking models."""
    return lambda prefix, *_: (unbranched(prefix, tokens.shape[1]), tokens[..., prefix.shape[-1]])


@torch.no_grad()
def cut_vocabulary(model, known, catalogue, cfg):
    """A Policy, checked: a new model with the same layers, whose tables are cut to the words of a policy.

    known: word -> its row today, which it brings along. A new word starts near the mean of the model's words:
    with half of their spread, SmolLM2 began worse than guessing. Text words are given up (docs/models.md).
    """
    tables, generator = tables_of(model), torch.Generator().manual_seed(cfg.seed)
    size, S, L = len(tables[0]), catalogue.S, catalogue.L
    known = {word: row for word, row in known.items() if row is not None and row < size}
    V = S + 1 + (START_TOKEN in known)
    words, text = [*catalogue.words, QUERY_TOKEN, START_TOKEN][:V], sorted(set(known.values()))
    text = text if len(text) > 1 else range(size)  # one row has no spread
    old = {i: known[word] for i, word in enumerate(words) if word in known}

    def around_the_mean(table, spread):
        rows, noise = table[text], torch.randn(V, *table.shape[1:], generator=generator)
        return rows.mean(0) + spread * rows.std(0) * noise

    true = {table: around_the_mean(table, 0.1) for table in tables}
    for table, rows in true.items():
        rows[[*old]] = table[[*old.values()]]

    config, state = AutoConfig.for_model(**model.config.to_dict()), model.state_dict(keep_vars=True)
    config.get_text_config().vocab_size = V
    for part in (config, config.get_text_config()):  # outputs would forbid saving, or change the mask
        part.tie_word_embeddings = sum(x.dim() > 1 for x in tables) == 1  # as it is, whatever was said
        part.bos_token_id = V - 1 if START_TOKEN in known else None
        part.pad_token_id = part.eos_token_id = None  # the row of a padding token would get no gradient
        part.output_attentions = part.output_hidden_states = part.output_router_logits = False
    # New words are nearly alike, which would hide faults: the check is made on rows far apart.
    places = torch.randint(size, (V,), generator=generator)
    with in_one_line("it cannot be made anew with other tables"):
        for table in tables:
            table[places] = around_the_mean(table, 1.0)
        cut = AutoModelForCausalLM.from_config(config)
        cut.load_state_dict({name: x[places] if x in true else x for name, x in state.items()})
    policy = make_policy(cut, catalogue, dataclasses.replace(cfg, dtype="float32"))

    # The check: trees of the cut model must say what plain passes of the whole one say. Windows, recurrence,
    # positions that ignore position_ids and further tables over the vocabulary fail.
    sizes, plain = (cfg.max_history, max(cfg.beam_width, cfg.group_size)), []  # a tree as wide as it will be
    history, item = (torch.randint(catalogue.N, (2, n), generator=generator) for n in sizes)
    history[1, :-1] = -1  # the other one has but one item: positions may depend on the longest row
    tokens = catalogue.tokens.cpu()
    for past, last in zip(history, tokens[item[:, -1]], strict=True):  # the last item (L,) of each tree
        ids = places[torch.tensor([[*range(S + 1, V), *tokens[past[past >= 0]].flatten(), S, *last[:-1]]])]
        other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % size], 1)  # another last token
        logits, changed = model(input_ids=torch.cat([ids, other]), use_cache=False).logits[..., places]
        if (changed - logits)[:-1].abs().max() > 5e-5 * logits.std():  # which tells even if weights are small
            raise ValueError("it sees later tokens, as an encoder does")
        plain.append(logits[-L:].log_softmax(-1))
    plain = torch.stack(plain)  # (2, L, V)
    expected = plain.gather(-1, tokens[item[:, -1]][..., None])[..., 0]
    with in_one_line("no tree can grow on its kind of layers or cache"):
        cache, tokens = prefill(policy, history.to(cfg.device)), tokens[item].to(cfg.device)
        tree = tree_decode(policy, cache, teacher_forcing(tokens))[1]
        found = torch.stack([tree, sequence_logp(policy, cache, tokens)])[:, :, -1].cpu()
    error = ((found - expected).abs().max() / plain.std()).item()
    if not error < 1e-3:
        raise ValueError(f"its log-probabilities in a tree are off by {error:.1g} of their spread")
    for small, rows in zip(tables_of(cut), true.values(), strict=True):
        small[:] = rows
    print_main(f"--model {cfg.model}: knows {sum(i < S for i in old)} of the {S} SID tokens")
    return Policy(cut, catalogue, cfg, policy.tokenizer)


# == Part III: the workshop ==================================================================================


class UserError(ValueError):
    """What was given cannot work: one line that says what, where and how to repair it."""


def first_line(error):
    with contextlib.suppress(Exception):  # its own __str__ may fail
        return (" ".join(str(error).split()) or type(error).__name__)[:150]
    return type(error).__name__


@contextlib.contextmanager
def in_one_line(what, remedy=""):
    """Whatever goes wrong inside is told in one line: what it was about, the error, and the remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UnicodeDecodeError):
            what = f"{what}, line {error.object.count(10, 0, error.start) + 1}"
        raise UserError(f"{what}: {first_line(error)}" + f"; {remedy}" * bool(remedy)) from None


def make_generator(seed, purpose, device="cpu"):
    """A generator for each purpose: drawing more in one place changes nothing anywhere else."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {purpose}".encode()))


def batches(n, size, steps, generator):
    """(steps, size) row numbers: all n in random order, and again, until there are enough."""
    rounds = [torch.randperm(n, generator=generator) for _ in range(steps * size // n + 1)]
    return torch.cat(rounds)[: steps * size].view(steps, size)


def print_main(text):
    if rank() == 0:
        print(text, flush=True)


def progress(steps, name):
    return tqdm(steps, name, leave=False, mininterval=0.5, dynamic_ncols=True, disable=rank() > 0 or None)


# -- processes (torchrun): all draw the random numbers of the whole batch, and each runs its own rows.
# What they gather is what one process would have: gate, negatives and metrics are of the whole batch.


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_micro_batches(B, size):
    """Slices of B rows that this process runs, `size` at a time; 0: all at once. All run equally many."""
    n = -(-B // world_size())
    start, stop, size = rank() * n, (rank() + 1) * n, size or n
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def broadcast(module):
    """To all processes the weights of the first."""
    for p in module.parameters() if dist.is_initialized() else ():
        dist.broadcast(p.data, 0)


def sum_gradients(module):
    """Over all processes. A weight that none of them has used stays without a gradient, as in one process."""
    if not dist.is_initialized():
        return
    parameters = list(module.parameters())
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    parts.append(parameters[0].new_tensor([p.grad is not None for p in parameters]))  # in how many processes?
    total = torch.cat([x.flatten() for x in parts])
    dist.all_reduce(total)  # at once: each sum costs a millisecond
    *gradients, uses = total.split([x.numel() for x in parts])
    for p, gradient, n in zip(parameters, gradients, uses.tolist(), strict=True):
        p.grad = gradient.view_as(p) if n else None


def all_gather(pieces):
    """The rows of this process, in pieces -> those of the whole batch."""
    local = torch.cat(pieces)
    if not dist.is_initialized():
        return local
    found = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(found, local)
    return torch.cat(found)


class Optimizer:
    """AdamW, decaying linearly to 2 %; gradients are clipped to norm 1."""

    def __init__(self, module, lr, steps):
        self.parameters = list(module.parameters())
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.01, fused=True)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.adamw, 1.0, 0.02, max(1, steps))

    def step(self, where, **watched):
        """Returns norm before clipping and learning rate. No weight moves if `watched` is not finite."""
        if getattr(interrupt, "code", 0):  # code of the user's has swallowed the signal
            raise KeyboardInterrupt
        lr = self.schedule.get_last_lr()[0]
        watched["gradient norm"] = norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        finite = torch.stack([x.float().isfinite().all() for x in watched.values()]).tolist()
        if not all(finite):
            fault = f"the {list(watched)[finite.index(False)]} is not finite"
            raise UserError(f"{where}: {fault}; give each item a number, or lower the learning rate or --lam")
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()
        return norm, lr


# -- what a run writes ---------------------------------------------------------------------------------------

FREE = dict(data="", device="", resume="", save_every=0)  # what a resumed run may change
CHECKPOINT = f"checkpoint-{'[0-9]' * 10}-{'[0-9a-f]' * 16}.safetensors"  # what may be deleted


class MetricsLog:
    """metrics.jsonl: a row for each step and each evaluation; `rows` may hold some already."""

    def __init__(self, out, cfg, rows):
        self.path = out / "metrics.jsonl" if rank() == 0 else Path(os.devnull)
        self.rows, self.device, self.last = rows, cfg.device, time.perf_counter()
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def __call__(self, **row):
        # All the numbers of a step cross from the GPU at once, after its work has been queued.
        numbers = {key: x.detach().float() for key, x in row.items() if torch.is_tensor(x)}
        if numbers:
            row |= zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True)
        row["seconds"], self.last = round(time.perf_counter() - self.last, 4), time.perf_counter()
        if self.device.startswith("cuda"):  # GiB, since the last row
            row["memory"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def weights(module):
    """{name: tensor}, tied ones once."""
    once = {x: name for name, x in module.state_dict(keep_vars=True).items()}
    return {name: x.detach() for x, name in once.items()}


def origin_of(cfg, data):
    """What a resumed run has to have in common with the one that was stopped."""
    digest = hashlib.sha256(repr(list(data.catalogue.row)).encode())
    for x in (*data.sft, *data.rl, *data.valid, *data.test, *data.log, *(data.holdout or ())):
        digest.update(b"" if x is None else x.cpu().numpy().tobytes())
    return {"set of flags": repr(dataclasses.replace(cfg, out="", **FREE)), "set of data": digest.hexdigest(),
            "number of processes": world_size(), "kind of device": cfg.device.split(":")[0]}


class Checkpoints:
    """RUN/checkpoint-ROWS-CHECKSUM.safetensors: all that a run needs to go on, in one file without pickle.

    It is written beside its place, forced to the disk and renamed; only then the one before it goes. So a run
    that is killed at any moment has a whole one, or none yet. The checksum in its name shows later damage.
    """

    def __init__(self, out, cfg, data, rows):
        self.out, self.origin, self.rows = out, origin_of(cfg, data), rows
        self.policy, self.phase, self.state, self.base, self.best = None, None, {}, {}, {}
        if paths := sorted(out.glob("checkpoint-*.safetensors")) if cfg.resume else []:  # oldest first
            path = paths[-1]  # damaged, perhaps, or written by another version
            with in_one_line(path, "mend that, or begin a new run"):
                if hashlib.sha256(path.read_bytes()).hexdigest()[:16] != path.stem.split("-")[-1]:
                    raise ValueError("its checksum is not that in its name")
                # Copies: where a tensor begins in the file's memory can decide a product's last digit.
                tensors = {key: x.clone().to(cfg.device) for key, x in load_file(path).items()}
                self.state = json.loads(tensors["state"].cpu().numpy().tobytes(), object_hook=lambda x: (
                    tensors[x["<tensor>"]] if "<tensor>" in x else x))
                self.base, self.best, last = self.state["base"], self.state["best"], self.state["rows"][-1]
                self.phase, self.step = last.get("method", "sft"), last["step"]  # it was saved after this row
                if changed := [key for key, x in self.origin.items() if x != self.state["origin"][key]]:
                    raise ValueError(f"the run was begun with another {changed[0]}")
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**self.state["model"]))
                if self.state["policy"].keys() != weights(model).keys():
                    raise ValueError("its weights have other names: another version of transformers")
                model.load_state_dict(self.state["policy"], strict=False)  # tied ones are there once
                self.policy = make_policy(model, data.catalogue, cfg)  # without a look at --model's folder
                rows[:] = self.state["rows"]

    def restore(self, optimizer, generators, phase):
        """The step at which to begin; in the phase in which the run stopped, with all as it was."""
        if phase != self.phase:
            return 0
        state, self.state = self.state, {}
        for use, generator in generators.items():
            generator.set_state(state["generators"][use].cpu())
        memory = {int(i): x for i, x in state["adamw"]["state"].items()}  # JSON has text for keys
        optimizer.adamw.load_state_dict(state["adamw"] | {"state": memory})
        optimizer.schedule.load_state_dict(state["schedule"])
        return self.step

    def save(self, policy, optimizer, generators):
        older, partial, tensors = [*self.out.glob(CHECKPOINT)], self.out / "checkpoint.partial", {}
        if not torch.stack([x.norm() for x in policy.model.parameters()]).isfinite().all():  # keep the old
            raise UserError("the weights have run away, beyond float32; lower the learning rate")

        def number(tensor):
            tensors[str(len(tensors))] = tensor
            return {"<tensor>": str(len(tensors) - 1)}

        state = dict(origin=self.origin, rows=self.rows, base=self.base, best=self.best,
                     policy=weights(policy.model), model=policy.model.config.to_dict(),
                     generators={use: generator.get_state() for use, generator in generators.items()},
                     adamw=optimizer.adamw.state_dict(), schedule=optimizer.schedule.state_dict())
        text = json.dumps(state, default=number).encode()  # json asks `number` about what it cannot write
        tensors["state"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)  # a header has a limit
        try:
            save_file(tensors, partial)
            with partial.open("r+b") as file:  # Windows syncs no file that is only read
                os.fsync(file.fileno())
                checksum = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            partial.rename(self.out / f"checkpoint-{len(self.rows):010d}-{checksum}.safetensors")
        finally:
            partial.unlink(missing_ok=True)
        for path in older:
            path.unlink()


def diagnostics(difficult, reliable, admitted, rewards, target_reward, rollouts, items, cfg):
    """What to look at when training goes wrong; docs/metrics.md defines each."""
    gate = core.gate_diagnostics(difficult, reliable, target_reward, rewards, tau=cfg.tau, ties=cfg.ties)
    same = (rollouts[:, None] == rollouts.unsqueeze(2)).all(-1)  # (B, K, K)
    shares = gate._asdict() | dict(admitted=admitted, invalid_rollouts=items < 0,  # by its method, D R or not
                                   duplicate_rollouts=same.tril(-1).any(-1))
    return dict(reward=rewards.mean(), reward_spread=rewards.std(1).mean(),
                **{name: which.float().mean() for name, which in shares.items()})


COLUMNS = {"HR@1 %": "hr@1", "HR@10 %": "hr@10", "HR@50 %": "hr@50", "NDCG@10 %": "ndcg@10",
           "Clk@1": "click_reward@1", "Clk@10": "click_reward@10", "Clk@50": "click_reward@50",
           "Ord@1": "order_reward@1", "Ord@10": "order_reward@10", "Ord@50": "order_reward@50",
           "halluc. %": "hallucination", "sampled %": "sampled_hallucination", "admitted %": "admitted"}
ON_SCREEN = "HR@10 %", "HR@50 %", "NDCG@10 %", "Clk@10", "Ord@10", "halluc. %", "admitted %"


def markdown(titles, rows):
    """The first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    dashes = ["-" * widths[0], *("-" * (n - 1) + ":" for n in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
             for row in (titles, dashes, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(results, titles):
    """The paper's Table 4, or some of its columns."""
    rows = []
    for name, row in results.items():
        rows.append([name + (f", step {row['kept_step']}" if "kept_step" in row else "")])
        for title in titles:
            x = row.get(COLUMNS[title])
            rows[-1].append("" if x is None else f"{x * 100:.2f}" if "%" in title else f"{x:.3f}")
    return markdown(["method".ljust(11), *titles], rows)


def influence_table(row):
    """Tables 1 to 3 of the paper's Section 4, and in a sentence what they mean for the gate."""
    rows, strata = [], {"all": "overall", "hard (D)": "hard", "hard and discriminable (D R)": "discriminable"}
    for (title, stratum), who in itertools.product(strata.items(), ("ranker", "chance")):
        rows.append([title + ", a random ranker" * (who == "chance")])
        for key, form in zip(core.Stratum._fields, (".2f", ".2f", "+.2f", ".1%"), strict=True):
            x = row.get(f"{who}/{stratum}/{key}")
            rows[-1].append("" if x is None else format(x, form))
    size = f"{row['prompts']} prompts, {row['beams']} beams"
    R, chance = row["ranker/reliable"], row["chance/reliable"]
    noise = 2 * ((R * (1 - R) + chance * (1 - chance)) / row["prompts"]) ** 0.5
    if R == chance == 0:
        verdict = "the gate is shut for any ranker among these beams: docs/faq.md"
    elif chance - R > noise:
        verdict = "clearly less often: rewards that tie (--ties max), or a ranker that is wrong (docs/faq.md)"
    elif R - chance <= noise:
        verdict = "no clear difference: expect nothing of the gate"
    else:
        verdict = (f"{R / chance:.1f} times as often: " if chance else "") + "the ranker separates"
    text = markdown([size, "LLM rank", "RM rank", "influence", "coverage"], rows)
    return (f"## Influence of the ranker\n\n{text}\n\n"
            f"R fires on {R:.1%}, with a random ranker on {chance:.1%}; {verdict}.")


# -- a run ---------------------------------------------------------------------------------------------------


def run(cfg):
    """Everything, from the data to the report; returns {method: metrics}."""
    if cfg.sft_batch_size % world_size() or cfg.batch_size % world_size():
        raise UserError(f"--sft-batch-size {cfg.sft_batch_size} --batch-size {cfg.batch_size}: "
                        f"{world_size()} processes cannot share them equally")
    transformers.utils.logging.disable_progress_bar()  # of saving; ours stay
    transformers.utils.logging.set_verbosity_error()  # no tables before what is refused in one line,
    importlib.import_module("huggingface_hub").logging.set_verbosity_error()  # and no retries
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # an async reward is one line too
    # With several threads, sums into one place (the gradient of an index) would come in any order otherwise.
    torch.use_deterministic_algorithms(cfg.device.startswith("cpu"), warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    data = toy_world(cfg) if cfg.toy else load_data(cfg.data, cfg)
    reward = None
    if cfg.reward:  # is asked about two rows, so that its faults show before the supervised steps
        reward = functools.partial(own_reward, cfg, [])  # the list will hold the names of its parts
        one_and_none = F.pad(data.rl.target[:2][:, None], (0, 2), value=-1)  # an item, and twice no item
        reward(data.rl.history[:2], one_and_none)
    begun = cfg.resume and any(Path(cfg.resume).glob("checkpoint-*.safetensors"))
    # Before the folder is made: what is refused leaves none behind. A checkpoint holds the policy.
    policy = None if begun else (pretrained_policy if cfg.model else tiny_policy)(data.catalogue, cfg)
    out, rows = Path(cfg.resume) if cfg.resume else make_folder(cfg), []
    with locked(out, rows, cfg):
        checkpoints = Checkpoints(out, cfg, data, rows)
        policy = checkpoints.policy or policy
        broadcast(policy.model)
        sizes = f"{data.catalogue.N} items, prompts: {len(data.sft.target)} SFT, {len(data.rl.target)} RL"
        print_main(f"{out}: {sizes}; {'goes on from its' if rows else 'no'} checkpoint")
        results, about = train_all(policy, reward, data, cfg, MetricsLog(out, cfg, rows), checkpoints)
    titles = ON_SCREEN if cfg.beam_width >= 10 else COLUMNS
    print_main(f"\n{table(results, titles)}\n\n{about}\n{out}: policy, and a report with all columns "
               "(their definitions: docs/metrics.md)")
    return results


def train_all(policy, reward, data, cfg, log, checkpoints):
    """The base policy, each method from there, and what is measured on the way; the report at the end."""
    out, names, rows, began = checkpoints.out, methods(cfg) if cfg.rl_steps else [], log.rows, time.time()
    ranker = train_ranker(data.catalogue, data.log, cfg)
    judged = judge_ranker(ranker, data.holdout) if data.holdout else {}
    learnt = f"ranker: learnt from {data.source}" + "".join(f"; {k} {x:.3f}" for k, x in judged.items())
    print_main(learnt)
    if judged and not rows:
        log(phase="ranker", step=0, **judged)
    reward = reward or make_reward(ranker, cfg)
    prompts = {"test": subset(data.test, cfg.eval_prompts, cfg.seed, "test"),
               "valid": subset(data.valid, -(-cfg.eval_prompts // 4), cfg.seed, "valid")}

    def measure(phase, method, step, **more):
        metrics, _ = evaluate(policy, ranker, prompts[phase], cfg)
        log(phase=phase, method=method, step=step, **metrics, **more)

    def on_step(step, optimizer, generators, phase):
        last = step == (cfg.sft_steps if phase == "sft" else cfg.rl_steps)
        if phase != "sft" and (last or step % cfg.eval_every == 0):
            measure("valid", phase, step)
            if cfg.keep == "best" and (hr := rows[-1]["hr@10"]) > checkpoints.best["hr"]:
                checkpoints.best = dict(step=step, hr=hr, weights=copy.deepcopy(weights(policy.model)))
        if rank() == 0 and cfg.save_every and (last or step % cfg.save_every == 0):
            checkpoints.save(policy, optimizer, generators)

    done = [row["method"] for row in rows if row["phase"] == "test"]
    start = next((row for row in rows if row["phase"] == "valid"), None)  # of the base policy
    if "base" not in done:
        train_sft(policy, data.sft, cfg, log, restore=checkpoints.restore, on_step=on_step)
        if len(names) > 1 or cfg.keep == "best":  # they begin at it, or may end there
            checkpoints.base = copy.deepcopy(weights(policy.model))
        metrics, each = evaluate(policy, ranker, prompts["valid"], cfg)
        start = dict(phase="valid", method="", step=0, **metrics)
        if influence := ranker_influence(policy, reward, prompts["valid"], each, cfg):
            log(phase="influence", step=0, **influence)
            print_main(influence_table(rows[-1]) + "\n")
        measure("test", "base", 0)
    for name in [name for name in names if name not in done]:
        if checkpoints.phase != name:
            policy.model.load_state_dict(checkpoints.base, strict=False)
            log(**start | dict(method=name))
            checkpoints.best = dict(step=0, hr=start.get("hr@10"), weights={})  # the base
        rl_log = functools.partial(log, phase="rl", method=name)
        train_rl(policy, reward, data.rl, cfg, name, rl_log, checkpoints.restore, on_step)
        admitted = [row.get("admitted", 0.0) for row in rows if row.get("method") == name and "lr" in row]
        kept = dict(kept_step=checkpoints.best["step"]) if cfg.keep == "best" else {}
        if kept:
            policy.model.load_state_dict(checkpoints.best["weights"] or checkpoints.base, strict=False)
        measure("test", name, cfg.rl_steps, admitted=float(np.mean(admitted)), **kept)
        if rank() == 0 and len(names) > 1:
            save_policy(policy, out / "policy" / name)

    labels = "phase", "method", "step", "seconds", "memory"
    results = {row["method"]: {key: x for key, x in row.items() if key not in labels}
               for row in rows if row["phase"] == "test"}
    tests = f"{len(prompts['test'].target)} test prompts, beams of width {cfg.beam_width}"
    about = (f"{learnt}\n{tests}; {time.time() - began:.0f} s, {torch.get_num_threads()} threads\n"
             f"script {zlib.crc32(Path(__file__).read_bytes()):08x}, torch {torch.__version__}, transformers "
             f"{transformers.__version__} on {cfg.device}, {torch.backends.cpu.get_cpu_capability()}")
    if rank() == 0:
        if len(names) < 2:
            save_policy(policy, out / "policy")
        save_file(weights(ranker), out / "ranker.safetensors")
        write_report(out, cfg, results, about, [row for row in rows if row["phase"] == "influence"])
        killed = [x for x in out.rglob(".tmp??????") if x.name[4:].isalnum() and x.is_file()]
        for path in (*out.glob(CHECKPOINT), out / "checkpoint.partial", *killed):  # the run is complete
            path.unlink(missing_ok=True)  # the latter are safetensors' own, of a run that was killed
    return results, about


def save_policy(policy, folder):
    """An ordinary Hugging Face folder: the small vocabulary has a tokenizer of its own."""
    with in_one_line(folder):  # on a full disk the tokenizer's error is no OSError
        Path(folder).mkdir(parents=True, exist_ok=True)  # fails if it is a file; the next line would not
        policy.model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)


def write_report(out, cfg, results, about, influence):
    again = []
    for name, x in vars(cfg).items():
        if x != getattr(Settings, name) and name not in ("out", "device", "resume"):
            again += [to_flag(name)] if x is True else [to_flag(name), str(x)]
    parts = [f"# {out.resolve().name}", f"`python nanoadagrpo.py {shlex.join(again)}`",
             table(results, COLUMNS), about, *map(influence_table, influence)]
    text = "\n\n".join(parts) + "\n"
    (out / "report.partial").write_text(text, encoding="utf-8", errors="backslashreplace")
    (out / "report.partial").replace(out / "report.md")


def make_folder(cfg):
    """A new folder with config.json in it, never one that exists already."""
    if rank() > 0:  # it says how to go on, and does not know the number that the first process finds
        return Path(cfg.out or "RUN")
    name = cfg.out or f"runs/{'toy' if cfg.toy else Path(cfg.data).resolve().name}-{cfg.method}-{cfg.seed}"
    for i in itertools.count(1):
        out = Path(name if i == 1 else f"{name}-{i}")
        try:
            name.encode()  # what cannot be printed could not be reported either
            out.mkdir(parents=True)  # fails if another run has been faster
            (out / "config.json").write_text(json.dumps(vars(cfg), indent=1) + "\n")
            return out
        except (OSError, ValueError) as error:
            if cfg.out or not (isinstance(error, FileExistsError) and os.path.lexists(out)):
                raise UserError(f"--out {name:.80}: {first_line(error):.90}; name a new folder") from None


@contextlib.contextmanager
def locked(out, rows, cfg):
    """One run at a time in a folder; the lock goes with its process. What stops a run says how to go on."""
    with open(out / "config.json" if rank() == 0 else os.devnull, "r+") as file:  # NFS locks for writing only
        moved = rank() == 0 and json.load(file).get("data", "") != cfg.data
        again = shlex.join(["--resume", str(out), *["--data", cfg.data] * moved])
        try:
            if rank() == 0 and os.name == "posix":  # Windows has no such lock
                fcntl = importlib.import_module("fcntl")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if cfg.resume and (out / "report.md").exists() and not any(out.glob("checkpoint-*")):
                raise UserError(f"--resume {out}: this run is complete, see its report.md")
            yield
        except BlockingIOError:
            raise UserError(f"{again}: another process runs it; wait for it, or stop it") from None
        except KeyboardInterrupt:
            last = [f" after {row.get('method', 'sft')}, step {row['step']}" for row in rows if "lr" in row]
            how = "go on" if any(out.glob("checkpoint-*")) else "no checkpoint yet, begin again"
            raise KeyboardInterrupt(f"stopped{''.join(last[-1:])}; {how} with {again}") from None
        except (UserError, OSError, SafetensorError) as error:  # perhaps of code that can be mended
            begun = rows or not isinstance(error, UserError)  # a full disk, even before the first row
            raise UserError(f"{error}" + f"; the run so far: {again}" * bool(begun)) from None


# -- the command line ----------------------------------------------------------------------------------------


def methods(cfg):
    """Their names, in the order in which they are run; each starts from the same base."""
    return list(METHODS) if cfg.method == "all" else cfg.method.split(",")


def to_flag(name):
    return "--" + name.replace("_", "-")


def check_settings(cfg):
    """Refuse what cannot work, alone or together, and name the flags that mend it."""
    for field in dataclasses.fields(cfg):
        x, (low, high), kind = getattr(cfg, field.name), field.metadata["range"], type(field.default)
        flag, choices = to_flag(field.name), field.metadata["choices"]
        fits = type(x) is kind or (kind is float and type(x) is int)  # a config.json may have been edited
        if not fits or (choices and x not in choices):
            raise UserError(f"{flag} {x!r:.80}: expected {', '.join(choices) or kind.__name__}")
        if kind in (int, float) and not low <= x <= high:
            raise UserError(f"{flag} {x!s:.80}: must be finite, {low} or more, at most {high}")
    names, B, K, M = methods(cfg), cfg.batch_size, cfg.group_size, cfg.negatives
    if wrong := [name for name in names if name not in METHODS or names.count(name) > 1]:
        raise UserError(f"--method {wrong[0]:.80}: choose from {', '.join(METHODS)}, all; each once")
    if cfg.keep == "best" and cfg.beam_width < 10:
        raise UserError("--keep best: chosen by HR@10, which needs --beam-width 10 or more")
    if names == ["nll"]:
        return
    # The core knows which tau, rho and epsilon cannot work; ask it now, not after the supervised steps.
    with in_one_line(f"--tau {cfg.tau:g} --rho {cfg.rho:g} --epsilon {cfg.epsilon:g} --group-size {K} "
                     f"--batch-size {B} --negatives {M}"):
        one = np.zeros((1, K))
        core.reliability(one[:, 0], one, one[:, : min(M, 1)], **cfg.tau_rho_ties())
        core.grpo_loss(*np.zeros((2, 1, 1, 1)), np.zeros((1, 1)), epsilon=cfg.epsilon)
        if M > (B - 1) * K:
            raise ValueError(f"other prompts have at most (B-1)*K = {(B - 1) * K} rollouts; "
                             "lower --negatives, or raise --batch-size to 2 or more")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse(argv):
    first, _, examples, *_ = __doc__.split("\n\n")
    parser = Parser("nanoadagrpo", "nanoadagrpo.py --toy | --data DIR [...]", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS,  # what is parsed are the flags that were given
                    description=f"{first}\nMethods: {', '.join(METHODS)}, all.\n\n{examples}",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser._negative_number_matcher = re.compile(r"-(\.?\d|inf)")  # or -1e3 would be a flag
    for field in dataclasses.fields(Settings):
        x, about, flag = field.default, field.metadata, to_flag(field.name)
        if about["group"]:  # begins with this one
            group = parser.add_argument_group(about["group"])
        if x is False:
            group.add_argument(flag, action="store_true", help=about["help"])
            continue
        shown = f"{x:.3g}" if isinstance(x, float) else x
        text = about["help"] + f" (default: {shown})" * (x != "")
        metavar = {int: "N", float: "X"}.get(type(x), "DIR" if text.startswith("folder") else None)
        kind = os.path.expanduser if x == "" else type(x)  # --out=~/x: no shell does it there
        group.add_argument(flag, type=kind, metavar="|".join(about["choices"]) or metavar, help=text)
    given, saved = vars(parser.parse_args(argv and [*map(str, argv)])), {}
    if given.get("resume"):
        out = Path(given["resume"])
        with in_one_line(f"{out!s:.80}/config.json", "name a run of this version"):
            saved = vars(Settings(**json.loads((out / "config.json").read_text())))
        if changed := [to_flag(name) for name in given if given[name] != saved[name] and name not in FREE]:
            raise UserError(f"--resume goes on as the run was begun; leave out {', '.join(changed)}")
    cfg = Settings(**saved | given)
    if cfg.toy == bool(cfg.data):
        raise UserError("say --toy or --data DIR, one of the two and not both")
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if "LOCAL_RANK" in os.environ and device.startswith("cuda"):  # torchrun, with one process too
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    with in_one_line(f"--device {device}", "take auto or cpu"):
        torch.zeros(1, device=device).item()
    return dataclasses.replace(cfg, device=device)


def interrupt(number, frame):  # Ctrl-C or SIGTERM
    if os.getpid() != interrupt.process:  # a child that a reward has forked ends as any other
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    for other in (signal.SIGINT, signal.SIGTERM):  # once is enough
        signal.signal(other, lambda *_: None)
    interrupt.code = 128 + number  # to exit with; 0 while there was no signal
    raise KeyboardInterrupt


def main(argv=None):
    """Returns what `run` does. What cannot work ends in one line and exit code 2; signals in 130 and 143."""
    at_the_end, interrupt.code, interrupt.process = contextlib.ExitStack(), 0, os.getpid()
    at_the_end.callback(setattr, interrupt, "code", 0)  # who goes on in Python may train again
    at_the_end.enter_context(torch.random.fork_rng(devices=[]))  # and has torch's random numbers again
    try:
        cfg = parse(argv)
        if "WORLD_SIZE" in os.environ and not dist.is_initialized():  # started by torchrun
            if cfg.device.startswith("cuda"):
                torch.cuda.set_device(cfg.device)
            importlib.import_module("torch.distributed.nn")  # later, it would keep the group's threads alive
            soon, late = datetime.timedelta(minutes=5), datetime.timedelta(days=1)
            with in_one_line("WORLD_SIZE is set, as torchrun sets it", "start with torchrun, or unset it"):
                store, number, size = next(dist.rendezvous("env://", timeout=soon))  # or they never come
                store.set_timeout(late)  # all wait for the first one's ranker
                # It may still hold what an earlier run of these processes has left.
                store = dist.PrefixStore(f"run {(store.add('runs', 1) - 1) // size}", store)
                dist.init_process_group("nccl" if cfg.device.startswith("cuda") else "gloo", store=store,
                                        rank=number, world_size=size, timeout=late)
            at_the_end.callback(dist.destroy_process_group)
        with contextlib.suppress(ValueError):  # only the main thread may
            for number in (signal.SIGINT, signal.SIGTERM):
                at_the_end.callback(signal.signal, number, signal.signal(number, interrupt))
        return run(cfg)
    except (UserError, KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
        text, code, stopped = str(error), 2, isinstance(error, KeyboardInterrupt)
        if stopped or interrupt.code:  # a library may make another error of it
            text = (stopped and text) or "stopped; nothing is lost"
            code = interrupt.code or 130
        elif re.search(r"out of memory|allocate (memory|[\d.]+ .iB)|bad_alloc|MemoryError", repr(error)):
            text = ("out of memory; begin a new run with lower --batch-size, --micro-batch-size, "
                    "--group-size, --eval-batch-size, --beam-width or --negatives")
        elif isinstance(error, RuntimeError):
            if not re.search("by peer|remote process", text):
                raise
            text = "another process has stopped, and says why if it can; go on with --resume RUN"
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        text = text if len(text) < 285 else f"{text[:220]} ... {text[-60:]}"
        with contextlib.suppress(OSError, ValueError):  # stderr may be full or closed
            if code == 2 or os.environ.get("RANK", "0") == "0":  # a signal is for all: one says so
                print(f"nanoadagrpo: {text}", file=sys.stderr)
        raise SystemExit(code) from None
    finally:
        at_the_end.close()


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a folder's name may hold what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    main()
