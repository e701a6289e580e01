# SPDX-License-Identifier: MIT
"""AdaGRPO in JAX and optax: sampling, gate, loss and update compiled into one function. Needs: pip install jax optax

    python docs/recipes/jax_optax.py
"""

import jax
import jax.numpy as jnp
import optax
from extra_row import core, which_core

USERS, LEVELS, CODES = 8, 3, 6
K, M, UPDATES = 12, 1, 2
TOL = 1e-4  # in nats; in bfloat16 1e-2: a rollout that repeats the truth does not beat it by a rounding error
RHO = 0.5  # the paper's tenth suits a large group: of 14 in the pool, a negative would have to be 11th or worse
TRUTH = (jnp.arange(USERS)[:, None] + jnp.arange(LEVELS) * 2) % CODES  # (B, L)


def reward(tokens):
    """How many codes are right, (B, ...) for tokens (B, ..., L); every fourth user's ranker has it backwards."""
    ones = (1,) * (tokens.ndim - 2)
    hits = (tokens == TRUTH.reshape(USERS, *ones, LEVELS)).sum(-1) + 0.01 * tokens.sum(-1)  # the latter breaks ties
    return jnp.where(jnp.arange(USERS) % 4 == 0, -1.0, 1.0).reshape(USERS, *ones) * hits


def token_logp(logits, tokens):
    """Log-probability of tokens (B, ..., L) under logits (B, L, V), in their shape."""
    table = jax.nn.log_softmax(logits).reshape(USERS, *(1,) * (tokens.ndim - 2), LEVELS, CODES)
    return jnp.take_along_axis(table, tokens[..., None], axis=-1)[..., 0]


def rollout(logits, key):
    """Everything that the policy of this moment decides; the updates that follow keep it fixed."""
    for_tokens, for_negatives = jax.random.split(key)
    tokens = jax.random.categorical(for_tokens, logits[:, None], shape=(USERS, K, LEVELS))
    drawn = core.in_batch_negatives(jax.random.uniform(for_negatives, (USERS, USERS * K)), k=K, m=M)
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
        target_old_logp=batch["target_old_logp"],
        tol=TOL,
        lam=lam,
        rho=RHO,
    )
    return out.loss.mean(), out


def train(steps=30, seed=0):
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(logits, state, key):
        batch = rollout(logits, key)
        for _ in range(UPDATES):
            gradient, out = jax.grad(objective, has_aux=True)(logits, batch)
            change, state = optimizer.update(gradient, state)
            logits = optax.apply_updates(logits, change)
        return logits, state, (out.nll.mean(), out.clip.mean())

    logits = jax.random.normal(jax.random.key(seed), (USERS, LEVELS, CODES))
    state, history = optimizer.init(logits), []
    for key in jax.random.split(jax.random.key(seed), steps):
        logits, state, measured = step(logits, state, key)
        history.append(tuple(map(float, measured)))
    return history


if __name__ == "__main__":
    print(which_core())
    for step, (nll, admitted) in enumerate(train()):
        print(f"step {step:2d}  NLL {nll:.3f}  admitted {admitted:.2f}")
