# SPDX-License-Identifier: MIT
"""The Tunix recipe: its real GRPO loss on our rows, compiled, against the objective written out by hand in PyTorch."""

import dataclasses
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from case import GATE, B, K, L, V, by_hand, make, moved, relative, report
from extra_row import shares

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
        completion_mask=mask.at[K :: K + 1].set(False),  # of another length than the truth that takes the place
        advantages=None,
        ref_per_token_logps=None,
        old_per_token_logps=None if on_policy else logp,
    )
    example = tunix_adagrpo.with_truth(example, tokens[:, K], jnp.asarray(case.mask[:, K].numpy()), k=K)
    assert (example.completion_ids == tokens.reshape(-1, L)).all() and (example.completion_mask == mask).all()
    rewards, negative_rewards = jnp.asarray(case.rewards.flatten().numpy()), jnp.asarray(case.negative_rewards.numpy())
    example, gate = tunix_adagrpo.with_advantages(example, logp, rewards, negative_rewards, k=K, **GATE)
    assert gate.admitted.tolist() == case.rows()[1].tolist()
    logged = case.logged()
    assert shares(gate) == {name: pytest.approx(logged[name]) for name in logged if name != "adagrpo/nll"}
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


@dataclass
class Example:
    """The fields of Tunix's TrainExample that the recipe's `with_truth` touches."""

    completion_ids: object
    completion_mask: object
    replace = dataclasses.replace


@pytest.mark.parametrize("kind", [bool, int])
def test_where_padding_and_the_end_of_sequence_are_one_id_no_row_loses_its_end(kind):
    import jax.numpy as jnp
    import tunix_adagrpo

    end, k = 0, 2
    ids = jnp.asarray([[5, 6, end, end], [7, end, end, end], [8, 8, 8, 8]] * 2)
    mask = jnp.asarray([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]] * 2).astype(kind)
    truth, counts = jnp.asarray([[1, end, end, end], [2, 3, 4, end]]), jnp.asarray([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = tunix_adagrpo.with_truth(Example(ids, mask), truth, counts.astype(bool), k=k)
    assert found.completion_mask.dtype == mask.dtype and found.completion_ids.dtype == ids.dtype
    for row in range(6):
        of_truth = row % 3 == 2
        assert found.completion_ids[row].tolist() == (truth[row // 3] if of_truth else ids[row]).tolist()
        assert found.completion_mask[row].tolist() == (counts[row // 3] if of_truth else mask[row]).tolist()


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 1), (2, 3), (2, 5), (3, 4), (1, 1), ()], ids=str)
def test_a_truth_of_another_shape_is_refused_and_nothing_broadcasts(shape):
    import jax.numpy as jnp
    import tunix_adagrpo

    example = Example(jnp.ones((6, 4), int), jnp.ones((6, 4), bool))
    good, wrong = jnp.ones((2, 4), int), jnp.ones(shape, int)
    for name, given in (("truth_ids", (wrong, good)), ("truth_mask", (good, wrong))):
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \(B, L\) = \(2, 4\), got "):
            tunix_adagrpo.with_truth(example, *given, k=2)
    tunix_adagrpo.with_truth(example, good, good, k=2)
