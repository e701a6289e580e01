# SPDX-License-Identifier: MIT
"""AdaGRPO in a training loop of your own, in plain PyTorch: the explicit loss, one call.

    python docs/recipes/torch_loop.py

It has no limits to mind: several updates per batch of rollouts, padded completions, a KL penalty, all inside the gate.
"""

import torch
from extra_row import core, which_core

USERS, LEVELS, CODES = 8, 3, 6  # the policy: one table of logits per user and level
K, M, UPDATES = 12, 1, 2
TOL = 1e-4  # in nats; in bfloat16 1e-2: a rollout that repeats the truth does not beat it by a rounding error
RHO = 0.5  # the paper's tenth suits a large group: of 14 in the pool, a negative would have to be 11th or worse
TRUTH = torch.arange(USERS)[:, None] + torch.arange(LEVELS) * 2  # (B, L)
TRUTH %= CODES


def reward(tokens):
    """How many codes are right, (B, ...) for tokens (B, ..., L); every fourth user's ranker has it backwards."""
    truth = TRUTH.reshape(USERS, *[1] * (tokens.ndim - 2), LEVELS)
    hits = (tokens == truth).sum(-1) + 0.01 * tokens.sum(-1)  # the second term breaks ties
    sign = torch.where(torch.arange(USERS) % 4 == 0, -1.0, 1.0).reshape(USERS, *[1] * (tokens.ndim - 2))
    return sign * hits


def token_logp(logits, tokens):
    """Log-probability of tokens (B, ..., L) under logits (B, L, V), in their shape."""
    table = logits.log_softmax(-1).reshape(USERS, *[1] * (tokens.ndim - 2), LEVELS, CODES)
    return table.expand(*tokens.shape, CODES).gather(-1, tokens[..., None])[..., 0]


@torch.no_grad()
def rollout(logits, generator):
    """Everything that the policy of this moment decides; the updates that follow keep it fixed."""
    draws = torch.multinomial(logits.softmax(-1).flatten(0, 1), K, True, generator=generator)  # (B*L, K)
    tokens = draws.reshape(USERS, LEVELS, K).movedim(2, 1)  # (B, K, L)
    drawn = core.in_batch_negatives(torch.rand(USERS, USERS * K, generator=generator), k=K, m=M)  # (B, M)
    return {
        "tokens": tokens,
        "old_logp": token_logp(logits, tokens),  # (B, K, L)
        "target_old_logp": token_logp(logits, TRUTH),  # (B, L)
        "rewards": reward(tokens),  # (B, K)
        "target_reward": reward(TRUTH),  # (B,)
        "negative_rewards": reward(core.ungroup(tokens)[drawn]),  # (B, M), under this row's prompt
    }


def objective(logits, batch, lam=1.0):
    out = core.adagrpo_loss(
        token_logp(logits, TRUTH),
        token_logp(logits, batch["tokens"]),
        batch["old_logp"],
        batch["rewards"],
        batch["target_reward"],
        batch["negative_rewards"],
        target_old_logp=batch["target_old_logp"],  # or a second update would be judged by another policy
        tol=TOL,
        lam=lam,
        rho=RHO,
    )
    return out.loss.mean(), out


def train(steps=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(USERS, LEVELS, CODES, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    history = []
    for _ in range(steps):
        batch = rollout(logits, generator)
        for _ in range(UPDATES):
            loss, out = objective(logits, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append((out.nll.mean().item(), out.clip.float().mean().item()))
    return history


if __name__ == "__main__":
    print(which_core())
    for step, (nll, admitted) in enumerate(train()):
        print(f"step {step:2d}  NLL {nll:.3f}  admitted {admitted:.2f}")
