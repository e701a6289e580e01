# SPDX-License-Identifier: MIT
"""The verl recipe: its real policy loss on our rows, and the recipe's trainer on rows in verl's own layout."""

import asyncio
import re
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
    ours = {name: value for name, value in metrics.items() if name.startswith("adagrpo/")}
    assert ours == {name: pytest.approx(value, rel=1e-6) for name, value in case.logged().items()}
    for row, n in zip(store["advantages"].unbind(), order, strict=True):
        torch.testing.assert_close(row, expected[n].expand(lengths[n]))
    groups = [{tuple(tokens[b * (K + 1) + k, : lengths[b * (K + 1) + k]].tolist()) for k in range(K)} for b in range(B)]
    for prompt, response in asked:  # a negative is another prompt's rollout
        own = len(prompt) - 1
        assert any(tuple(response) in group for b, group in enumerate(groups) if b != own)

    # The same prompt in all groups but the second: its rollouts are no negatives of its copies.
    store["prompts"] = nested([torch.tensor([int(n // (K + 1) == 1)]) for n in range(len(order))])
    asked.clear()
    trainer._compute_advantage(batch, {})
    assert len(asked) == B and all((tuple(response) in groups[1]) == (prompt == [0]) for prompt, response in asked)


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


class Engine:
    """In place of the rollout server: log-probabilities by a table, sampled as vLLM samples among allowed tokens."""

    def __init__(self, sids):
        self.asked, self.sids = [], sids
        self.logits = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))  # after each last token
        self.dice = torch.Generator().manual_seed(1)

    def probabilities(self, last, allowed):
        mask = torch.full((20,), -torch.inf).index_fill(0, torch.tensor(allowed), 0.0)
        return (self.logits[last] + mask).softmax(-1)

    async def generate(self, request_id, *, prompt_ids, sampling_params):
        from verl.workers.rollout.replica import TokenOutput

        self.asked.append((request_id, prompt_ids, sampling_params))
        p = self.probabilities(prompt_ids[-1], sampling_params["allowed_token_ids"])
        return TokenOutput(token_ids=torch.multinomial(p, 1, generator=self.dice).tolist())


def test_the_constrained_loop_samples_items_in_proportion_and_the_truth_last(monkeypatch):
    import verl_sids

    sids = [(1, 5, 9), (1, 5, 10), (1, 6, 9), (2, 7, 11), (3, 5, 9)]
    monkeypatch.setattr(verl_sids, "items", lambda: sids)
    verl_sids.continuations.cache_clear()
    loop = object.__new__(verl_sids.ItemsAndTheTruth)
    loop.server_manager, loop.rollout_config = Engine(sids), SimpleNamespace(n=2001)
    given = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": False}
    row = {"sid_prompt": np.asarray([4, 8, 12]), "target_ids": np.asarray([2, 7, 11])}
    answers = [asyncio.run(loop.run(given, session_id=n, **row)) for n in (*range(2000), 2000)]
    *sampled, truth = [tuple(answer.response_ids) for answer in answers]
    assert truth == (2, 7, 11) and len(loop.server_manager.asked) == 3 * 2000, "the truth is not asked for"
    assert all(answer.prompt_ids == [4, 8, 12] and answer.response_mask == [1, 1, 1] for answer in answers)
    assert set(sampled) == set(sids)
    for sid in sids:  # the product of the softmaxes over what may follow
        p = 1.0
        for level in range(3):
            allowed = sorted({other[level] for other in sids if other[:level] == sid[:level]})
            p *= loop.server_manager.probabilities([12, *sid][level], allowed)[sid[level]].item()
        assert sampled.count(sid) / 2000 == pytest.approx(p, abs=4 * (p * (1 - p) / 2000) ** 0.5)
    request, prompt_ids, parameters = loop.server_manager.asked[1]
    assert request == loop.server_manager.asked[0][0] and prompt_ids[:3] == [4, 8, 12] and len(prompt_ids) == 4
    assert parameters["max_tokens"] == 1 and parameters["temperature"] == 1.0 and given == {
        "temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": False}  # fmt: skip
    fields = answers[0].as_dict()  # what verl puts into its queue
    assert fields["prompts"].tolist() == [4, 8, 12] and fields["responses"].tolist() == list(sampled[0])
    assert "rollout_log_probs" not in fields


def test_the_settings_that_the_recipes_name_are_verls_and_their_classes_are_found():
    """Its own configuration, put together by hydra as main_ppo does."""
    import verl_sids
    from hydra import compose, initialize_config_module
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.trainer.ppo.v1 import get_trainer_cls

    text = verl_sids.verl_adagrpo.__doc__ + verl_sids.__doc__
    flags = re.findall(r"(?<![\w.])((?:trainer|algorithm|actor_rollout_ref|data)\.[\w.]+=[\w.$/-]+)", text)
    flags = [flag.rstrip(".").replace("$TRAIN_BATCH_SIZE", "64") for flag in flags]
    assert len(flags) == 15, flags
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", flags)  # refuses a key that verl does not have
    rollout = config.actor_rollout_ref.rollout
    assert rollout.n == 17 and rollout.agent.default_agent_loop == "adagrpo_items"
    assert {"adagrpo", "adagrpo_items"} <= _agent_loop_registry.keys() and rollout.calculate_log_probs is False
    assert get_trainer_cls(config.trainer.v1.trainer_mode) is verl_sids.verl_adagrpo.AdaGRPOTrainer


def test_rows_of_verls_own_dataset_reach_the_loop_that_verl_makes_without_a_chat_template(tmp_path):
    import pandas
    import verl_sids
    from hydra import compose, initialize_config_module
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

    words = Tokenizer(models.WordLevel({f"<a_{i}>": i for i in range(20)}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<a_0>")
    row = dict(data_source="shop", prompt=[{"role": "user", "content": ""}], sid_prompt=[4, 8], target_ids=[2, 7, 11])
    file = tmp_path / "train.parquet"
    pandas.DataFrame([row | dict(extra_info={"index": i}) for i in range(3)]).to_parquet(file)
    flags = [f"data.train_files={file}", "data.filter_overlong_prompts=False", "actor_rollout_ref.rollout.n=4"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", flags)
    data = RLHFDataset(str(file), tokenizer, config.data)
    columns = {name: column[0] for name, column in collate_fn([data[0], data[1]]).items()}

    async def last():
        parts = {"trainer_config": DictConfigWrap(config), "data_config": DictConfigWrap(config.data)}
        loop = verl_sids.ItemsAndTheTruth(
            **parts, server_manager=None, tokenizer=tokenizer, processor=None, dataset_cls=RLHFDataset
        )
        return await loop.run({}, session_id=3, **columns)

    answer = asyncio.run(last())
    assert answer.prompt_ids == [4, 8] and answer.response_ids == [2, 7, 11]
