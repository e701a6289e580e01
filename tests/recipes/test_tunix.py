# SPDX-License-Identifier: MIT
"""The Tunix recipe: its real GRPO loss on our rows, compiled, against the objective written out by hand in PyTorch."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from case import GATE, B, K, L, V, by_hand, make, moved, relative, report

import adagrpo_core as core

pytestmark = pytest.mark.peers
PAD = V  # a token of its own


@pytest.fixture(scope="module")
def tunix():
    """The modules algo_core and common, without the packages' __init__, which wants TensorFlow and Google Cloud."""
    spec = importlib.util.find_spec("tunix")
    for name, folder in (("tunix", ""), ("tunix.rl", "/rl"), ("tunix.sft", "/sft")):
        package = ModuleType(name)
        package.__path__ = [spec.submodule_search_locations[0] + folder]
        sys.modules[name] = package
    return SimpleNamespace(core=importlib.import_module("tunix.rl.algo_core"), common=sys.modules["tunix.rl.common"])


def gradient(tunix, case, W, *, mode="sequence-mean-token-mean", on_policy=True):
    import jax
    import jax.numpy as jnp
    import tunix_adagrpo
    from flax import nnx

    class Policy(nnx.Module):
        """The case's policy: the prompt is one token, its number."""

        def __init__(self):
            self.weight = nnx.Param(jnp.asarray(W.numpy()))

        def __call__(self, tokens, positions, cache, attention_mask):
            hidden = jnp.pad(jnp.asarray(case.hidden.numpy()), ((0, 0), (0, 1), (0, 0)))  # the last predicts nothing
            logits = hidden[tokens[:, 0]] @ self.weight[...].T
            return jnp.pad(logits, ((0, 0), (0, 0), (0, 1)), constant_values=-1e9), None  # never the padding token

    tokens = jnp.asarray(torch.where(case.mask, case.tokens, PAD).numpy())
    mask, logp = jnp.asarray(case.flat_mask().numpy()), jnp.asarray(case.logp(case.start).numpy())
    example = tunix.common.TrainExample(
        prompt_ids=jnp.repeat(jnp.arange(B), K + 1)[:, None],
        prompt_mask=jnp.ones((B * (K + 1), 1), bool),
        completion_ids=tokens.at[:, K].set(PAD).reshape(-1, L),
        completion_mask=mask,
        advantages=None,
        ref_per_token_logps=None,
        old_per_token_logps=None if on_policy else logp,
    )
    example = tunix_adagrpo.with_truth(example, tokens[:, K], k=K, pad_id=PAD)
    assert (example.completion_ids == tokens.reshape(-1, L)).all() and (example.completion_mask == mask).all()
    rewards, negative_rewards = jnp.asarray(case.rewards.flatten().numpy()), jnp.asarray(case.negative_rewards.numpy())
    example, admitted = tunix_adagrpo.with_advantages(example, logp, rewards, negative_rewards, k=K, **GATE)
    assert admitted.tolist() == case.rows()[1].tolist()
    config = SimpleNamespace(beta=0.0, epsilon=0.2, loss_algo="grpo", loss_agg_mode=mode, temperature=1.0)

    @nnx.jit
    def differentiate(policy, example):
        return nnx.grad(lambda p: tunix.core.grpo_loss_fn(p, example, config, pad_id=PAD, eos_id=PAD)[0])(policy)

    return torch.from_numpy(np.array(jax.device_get(differentiate(Policy(), example))["weight"][...]))


@pytest.mark.parametrize("ragged, mode", [(False, "token-mean"), (True, "sequence-mean-token-mean")])
def test_tunixs_loss_on_our_rows_has_the_gradient_of_the_objective(tunix, ragged, mode):
    case = make(ragged=ragged, dtype=torch.float32)
    found = gradient(tunix, case, case.start, mode=mode)
    assert report(f"Tunix, {mode}", found, by_hand(case, case.start)) < 1e-6


def test_tunixs_loss_is_not_the_objective_on_a_second_update_or_for_ragged_rows_by_token_mean(tunix):
    case, ragged = make(dtype=torch.float32), make(ragged=True, dtype=torch.float32)
    later = gradient(tunix, case, moved(case), on_policy=False)
    assert relative("Tunix, second update", later, by_hand(case, moved(case))) > 0.2
    by_token = gradient(tunix, ragged, ragged.start, mode="token-mean")
    assert relative("Tunix, ragged by token mean", by_token, by_hand(ragged, ragged.start)) > 0.2


def test_tunixs_own_advantages_are_ours_with_its_eps_and_correction(tunix):
    rewards = np.random.default_rng(0).normal(size=(B, K))
    theirs = tunix.core.compute_advantages(rewards.flatten(), K)
    ours = core.group_advantages(rewards, eps=1e-6, correction=1)
    np.testing.assert_allclose(theirs, ours.flatten(), rtol=1e-12)
