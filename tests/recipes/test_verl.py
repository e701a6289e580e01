# SPDX-License-Identifier: MIT
"""The verl recipe: its real policy loss on our rows, and the recipe's trainer on rows in verl's own layout."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from case import GATE, B, K, L, by_hand, in_stack, make, moved, relative, report

import adagrpo_core as core

pytestmark = pytest.mark.peers


def loss(mode):
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp", rollout_n=K + 1, use_dynamic_bsz=True)

    def of(logp, old, advantages, mask):
        return compute_policy_loss_vanilla(old, logp, advantages[:, None] * mask, mask, mode, config)[0]

    return of


@pytest.mark.parametrize("ragged, mode", [(False, "token-mean"), (True, "seq-mean-token-mean")])
def test_verls_loss_on_our_rows_has_the_gradient_of_the_objective(ragged, mode):
    case = make(ragged=ragged)
    found = in_stack(case, loss(mode), case.start)
    assert report(f"verl, {mode}", found, by_hand(case, case.start)) < 1e-8


def test_verls_loss_is_not_the_objective_on_a_second_update_or_for_ragged_rows_by_token_mean():
    case, ragged = make(), make(ragged=True)
    later = in_stack(case, loss("seq-mean-token-mean"), moved(case))
    assert relative("verl, second update", later, by_hand(case, moved(case))) > 0.2
    by_token = in_stack(ragged, loss("token-mean"), ragged.start)
    assert relative("verl, ragged by token mean", by_token, by_hand(ragged, ragged.start)) > 0.2


def verls_advantages(name, rewards):
    """Of rewards (B, K), through rows in random order."""
    from verl.trainer.ppo import core_algos

    k = rewards.shape[1]
    order = torch.randperm(rewards.numel(), generator=torch.Generator().manual_seed(0))
    uid = np.asarray([f"prompt-{n // k}" for n in range(rewards.numel())])[order]
    token_level = torch.nn.functional.pad(rewards.flatten()[order][:, None], (L - 1, 0))
    found, _ = getattr(core_algos, name)(token_level, torch.ones(rewards.numel(), L), uid.astype(object))
    return core.group(found[:, 0][torch.argsort(order)], k)


@pytest.mark.parametrize("name", ["compute_grpo_outcome_advantage", "compute_grpo_vectorized_outcome_advantage"])
def test_verls_own_advantages_are_ours_with_its_eps_and_correction(name):
    rewards = torch.randn(B, K, generator=torch.Generator().manual_seed(0))
    ours = core.group_advantages(rewards, eps=1e-6, correction=1)
    torch.testing.assert_close(verls_advantages(name, rewards), ours, rtol=1e-5, atol=1e-5)


def test_the_recipes_trainer_gives_every_row_its_advantage_whatever_the_order(monkeypatch):
    """The real _compute_advantage of verl and then ours, on a dictionary in place of the transfer queue."""
    import transfer_queue as tq
    import verl_adagrpo
    from omegaconf import OmegaConf
    from tensordict import NonTensorStack, TensorDict
    from verl.trainer.ppo.v1 import get_trainer_cls

    case = make(ragged=True, dtype=torch.float32)
    order = torch.randperm(B * (K + 1), generator=torch.Generator().manual_seed(2)).tolist()
    lengths = case.flat_mask().sum(1)

    def nested(rows):
        return torch.nested.as_nested_tensor([rows[n] for n in order], layout=torch.jagged)

    logp, tokens = case.logp(case.start), case.tokens.flatten(0, 1)
    rewards = list(zip(case.rewards.flatten(), lengths, strict=True))
    store = {
        "prompts": nested([torch.tensor([b] * (b + 1)) for b in range(B) for _ in range(K + 1)]),
        "responses": nested([tokens[n, : lengths[n]] for n in range(len(order))]),
        "response_mask": nested([torch.ones(n, dtype=torch.int64) for n in lengths]),
        "old_log_probs": nested([logp[n, : lengths[n]] for n in range(len(order))]),
        "rm_scores": nested([torch.nn.functional.pad(r[None], (n - 1, 0)) for r, n in rewards]),
        "uid": NonTensorStack(*[f"u_{n // (K + 1)}" for n in order]),
    }
    keys = [f"u_{n // (K + 1)}_{n % (K + 1)}_0" for n in order]
    asked = []

    def get(keys, partition_id, select_fields):
        return TensorDict({name: store[name] for name in select_fields if name in store}, batch_size=len(keys))

    def put(keys, partition_id, fields):
        store.update(fields.items())
        return batch

    def score(prompts, responses):
        asked.extend(zip(prompts, responses, strict=True))
        return case.negative_rewards[:, 0].tolist()

    monkeypatch.setattr(tq, "kv_batch_get", get)
    monkeypatch.setattr(tq, "kv_batch_put", put)
    monkeypatch.setattr(verl_adagrpo, "score", score)
    monkeypatch.setattr(verl_adagrpo, "GATE", GATE)
    trainer = object.__new__(get_trainer_cls("adagrpo"))
    algorithm = {"use_kl_in_reward": False, "adv_estimator": "grpo", "gamma": 1.0, "lam": 1.0}
    trainer.config = OmegaConf.create({"algorithm": algorithm, "actor_rollout_ref": {"rollout": {"n": K + 1}}})
    trainer.global_steps, metrics = 3, {}
    batch = tq.KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id="train")
    trainer._compute_advantage(batch, metrics)

    case.negative_rewards = case.negative_rewards[:, :1]
    expected, admitted = case.rows()
    assert 0 < admitted.sum() < B
    assert metrics["adagrpo/admitted"] == pytest.approx(admitted.float().mean().item())
    for row, n in zip(store["advantages"].unbind(), order, strict=True):
        torch.testing.assert_close(row, expected[n].expand(lengths[n]))
    groups = [{tuple(tokens[b * (K + 1) + k, : lengths[b * (K + 1) + k]].tolist()) for k in range(K)} for b in range(B)]
    for prompt, response in asked:  # a negative is another prompt's rollout
        own = len(prompt) - 1
        assert any(tuple(response) in group for b, group in enumerate(groups) if b != own)


def test_the_recipes_agent_loop_answers_with_the_truth_in_the_last_session_only(monkeypatch):
    import verl_adagrpo
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

    async def run(self, sampling_params, **columns):
        return AgentLoopOutput(prompt_ids=[1], response_ids=[2, 3], response_mask=[1, 1], metrics=AgentLoopMetrics())

    monkeypatch.setattr(verl_adagrpo.SingleTurnAgentLoop, "run", run)
    loop = object.__new__(verl_adagrpo.TruthInEveryGroup)
    loop.rollout_config = SimpleNamespace(n=4)
    answers = [asyncio.run(loop.run({}, session_id=n, target_ids=np.asarray([7, 8, 9]))) for n in range(4)]
    assert [a.response_ids for a in answers] == [[2, 3]] * 3 + [[7, 8, 9]]
    assert [len(a.response_mask) for a in answers] == [2, 2, 2, 3]
