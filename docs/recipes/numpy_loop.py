# SPDX-License-Identifier: MIT
"""AdaGRPO where nothing differentiates for you: NumPy, and the objective as one advantage per row.

    python docs/recipes/numpy_loop.py

On-policy, the policy gradient of a row is its advantage times the gradient of its log-probability. So an engine in
any language needs only the rows of advantages; here the gradient of a table of logits is written out.
"""

import numpy as np
from extra_row import advantage_rows, core, negative_rows, which_core

USERS, LEVELS, CODES = 8, 3, 6
K, M = 12, 1
RHO = 0.5  # the paper's tenth suits a large group: of 14 in the pool, a negative would have to be 11th or worse
TRUTH = (np.arange(USERS)[:, None] + np.arange(LEVELS) * 2) % CODES  # (B, L)


def reward(tokens):
    """How many codes are right, (B, ...) for tokens (B, ..., L); every fourth user's ranker has it backwards."""
    ones = (1,) * (tokens.ndim - 2)
    hits = (tokens == TRUTH.reshape(USERS, *ones, LEVELS)).sum(-1) + 0.01 * tokens.sum(-1)  # the latter breaks ties
    return np.where(np.arange(USERS) % 4 == 0, -1.0, 1.0).reshape(USERS, *ones) * hits


def rows_and_advantages(logits, rng, **gate):
    """The groups (B, K+1, L), truth last, their advantages (B, K+1), and the gate's diagnostics."""
    gumbel = rng.gumbel(size=(USERS, K, LEVELS, CODES))
    rows = np.concatenate([(logits[:, None] + gumbel).argmax(-1), TRUTH[:, None]], axis=1)  # (B, K+1, L)
    logp_table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    token_logp = np.take_along_axis(logp_table[:, None], rows[..., None], axis=-1)[..., 0]  # (B, K+1, L)
    negatives = core.ungroup(rows)[negative_rows(rng.random((USERS, USERS * K)), k=K, m=M)]  # (B, M, L)
    logp = core.length_normalized(token_logp)
    return rows, *advantage_rows(logp, reward(rows), reward(negatives), **{"rho": RHO, **gate})


def gradient(logits, rows, advantages):
    """Of the mean over all rows of -advantage * mean over tokens of the ratio, at ratio 1."""
    policy = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    per_token = np.eye(CODES)[rows] - policy[:, None]  # (B, K+1, L, V): gradient of each token's log-probability
    return -(advantages[:, :, None, None] * per_token).sum(1) / LEVELS / advantages.size


def train(steps=60, seed=0, rate=6.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(USERS, LEVELS, CODES))
    history = []
    for _ in range(steps):
        rows, advantages, diagnostics = rows_and_advantages(logits, rng)
        logp_table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll = -np.take_along_axis(logp_table, TRUTH[..., None], axis=-1).mean()
        logits = logits - rate * gradient(logits, rows, advantages)
        history.append((nll, diagnostics.admitted.mean()))
    return history


if __name__ == "__main__":
    print(which_core())
    for step, (nll, admitted) in enumerate(train()):
        print(f"step {step:2d}  NLL {nll:.3f}  admitted {admitted:.2f}")
