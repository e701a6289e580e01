# SPDX-License-Identifier: MIT
"""The recipes for loops of one's own: PyTorch, NumPy and JAX compute the same gradient, and each learns."""

import jax
import jax.numpy as jnp
import jax_optax
import numpy as np
import numpy_loop
import pytest
import torch
import torch_loop


def a_second_update():
    """A batch of rollouts, and logits that have moved on from those that sampled it."""
    generator = torch.Generator().manual_seed(1)
    shape = torch_loop.USERS, torch_loop.LEVELS, torch_loop.CODES
    sampled = torch.randn(shape, generator=generator, dtype=torch.float64)
    moved = sampled + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    batch = torch_loop.rollout(sampled, generator)
    return moved.requires_grad_(), {name: a.double() if a.is_floating_point() else a for name, a in batch.items()}


def test_jax_compiled_has_the_gradient_of_torch_on_a_second_update():
    logits, batch = a_second_update()
    loss, out = torch_loop.objective(logits, batch, lam=0.7)
    loss.backward()
    assert 0 < out.clip.sum() < len(out.clip)
    assert (torch_loop.token_logp(logits, batch["tokens"]) - batch["old_logp"]).abs().max() > 0.2  # some are clipped
    with jax.enable_x64(True):
        given = {name: jnp.asarray(array.numpy()) for name, array in batch.items()}
        start = jnp.asarray(logits.detach().numpy())
        found, _ = jax.jit(jax.grad(jax_optax.objective, has_aux=True))(start, given, 0.7)
        difference = np.abs(np.asarray(found) - logits.grad.numpy()).max()
    print(f"JAX: gradient differs from PyTorch's by {difference:.1e}, the largest is {logits.grad.abs().max():.2g}")
    assert difference < 1e-12


def test_numpys_written_out_gradient_of_the_rows_is_that_of_the_explicit_loss():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(numpy_loop.USERS, numpy_loop.LEVELS, numpy_loop.CODES))
    state = rng.bit_generator.state
    rows, advantages, gate = numpy_loop.rows_and_advantages(logits, rng, lam=0.7)
    admitted = gate.admitted
    assert 0 < admitted.sum() < len(admitted)
    rng.bit_generator.state = state
    rng.gumbel(size=(numpy_loop.USERS, numpy_loop.K, numpy_loop.LEVELS, numpy_loop.CODES))
    negatives = numpy_loop.negative_rows(
        rng.random((numpy_loop.USERS, numpy_loop.USERS * numpy_loop.K)), k=numpy_loop.K, m=numpy_loop.M
    )

    tokens, policy = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(logits).requires_grad_()
    batch = {
        "tokens": tokens,
        "old_logp": torch_loop.token_logp(policy.detach(), tokens),
        "target_old_logp": torch_loop.token_logp(policy.detach(), torch_loop.TRUTH),
        "rewards": torch_loop.reward(tokens).double(),
        "target_reward": torch_loop.reward(torch_loop.TRUTH).double(),
        "negative_rewards": torch_loop.reward(torch.from_numpy(rows.reshape(-1, rows.shape[-1])[negatives])).double(),
    }
    loss, out = torch_loop.objective(policy, batch, lam=0.7)
    loss.backward()
    assert out.clip.tolist() == admitted.tolist()
    difference = np.abs(numpy_loop.gradient(logits, rows, advantages) - policy.grad.numpy()).max()
    print(f"NumPy: gradient differs from PyTorch's by {difference:.1e}, the largest is {policy.grad.abs().max():.2g}")
    assert difference < 1e-6  # torch_loop's rewards are float32


@pytest.mark.parametrize("recipe", [torch_loop, numpy_loop, jax_optax], ids=lambda module: module.__name__)
def test_the_recipe_learns_and_admits_some_prompts_on_the_way(recipe):
    history = recipe.train()
    nll, admitted = zip(*history, strict=True)
    assert nll[-1] < 0.2 * nll[0]
    assert max(admitted) > 0.2
    assert recipe.train(steps=10)[-1] == pytest.approx(history[9], rel=1e-4)
