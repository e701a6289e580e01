# SPDX-License-Identifier: MIT
"""The OpenRLHF recipe: its real PolicyLoss on our rows, and the recipe's experience maker on its real Experiences."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from case import GATE, B, K, by_hand, in_stack, make, moved, relative, report

import adagrpo_core as core

pytestmark = pytest.mark.peers


class NotOnACPU:
    """Stands in for what OpenRLHF imports at import, cannot be had without CUDA, and nothing here calls."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flash_attn", "vllm"):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        def anything(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module = ModuleType(spec.name)
        module.__getattr__ = anything
        return module

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module", autouse=True)
def without_cuda():
    sys.meta_path.append(NotOnACPU())  # behind the real finders, so that a real vllm comes first


def loss(*, token_level):
    from openrlhf.models.loss import PolicyLoss

    policy_loss = PolicyLoss(token_level_loss=token_level)
    return lambda logp, old, advantages, mask: policy_loss(logp, old, advantages[:, None] * mask, action_mask=mask)[0]


@pytest.mark.parametrize("ragged, token_level", [(False, True), (True, False)])
def test_openrlhfs_loss_on_our_rows_has_the_gradient_of_the_objective(ragged, token_level):
    case = make(ragged=ragged)
    found = in_stack(case, loss(token_level=token_level), case.start)
    # The mean over a sequence's tokens divides by their number plus 1e-8.
    assert report(f"OpenRLHF, token level {token_level}", found, by_hand(case, case.start)) < 1e-7


def test_openrlhfs_loss_is_not_the_objective_on_a_second_update_or_for_ragged_rows_by_token_mean():
    case, ragged = make(), make(ragged=True)
    later = in_stack(case, loss(token_level=False), moved(case))
    assert relative("OpenRLHF, second update", later, by_hand(case, moved(case))) > 0.2
    by_token = in_stack(ragged, loss(token_level=True), ragged.start)
    assert relative("OpenRLHF, ragged by token mean", by_token, by_hand(ragged, ragged.start)) > 0.2


class Tokenizer:
    eos_token_id = pad_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [int(word) for word in text.split()]}


def maker(cls, n=K + 1):
    """An experience maker without its remote models."""
    made = object.__new__(cls)
    made.args = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=n, micro_batch_size=4),
        train=SimpleNamespace(dynamic_batch_enable=False),
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="group_norm", gamma=1.0)),
        reward=SimpleNamespace(
            clip_range=None, overlong_buffer_len=None, overlong_penalty_factor=None, stop_properly_penalty_coef=None
        ),
    )
    made.strategy = SimpleNamespace(args=made.args)
    made.advantage_estimator, made.kl_ctl, made.tokenizer = "group_norm", SimpleNamespace(value=0.0), Tokenizer()
    return made


def samples(case, last=(5, 5)):
    """Rollouts as the samples generator hands them over: prompt b is b + 1 tokens long. last: what will give way."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    made = []
    for b in range(B):
        truth = case.tokens[b, K][case.mask[b, K]].tolist()
        for k in range(K + 1):
            response = case.tokens[b, k][case.mask[b, k]] if k < K else torch.tensor(last, dtype=torch.long)
            sequence = torch.cat([torch.full((b + 1,), 90 + b), response])
            made.append(
                Experience(
                    sequences=sequence[None],
                    attention_mask=torch.ones_like(sequence)[None],
                    action_mask=(torch.arange(1, len(sequence)) > b).long()[None],
                    prompts=[str(b)],
                    labels=[" ".join(map(str, truth[:-1]))],
                    rewards=case.rewards[b, k, None].clone(),
                    response_length=torch.tensor([len(response)]),
                    truncated=torch.tensor([True]),
                    total_length=torch.tensor([float(len(sequence))]),
                    info={"reward": case.rewards[b, k, None]},
                )
            )
    return made


@pytest.mark.parametrize("last", [(5, 5), ()], ids=["a response", "an empty one"])
def test_the_recipes_experience_maker_puts_in_the_truth_and_gives_every_row_its_advantage(monkeypatch, last):
    import openrlhf_adagrpo

    case = make(ragged=True, dtype=torch.float32)
    case.tokens[:, K] = torch.where(case.mask[:, K], case.tokens[:, K] + 1, 0)
    case.tokens[torch.arange(B), K, case.mask[:, K].sum(1) - 1] = 0  # the truth ends by the end of sequence
    asked = []

    def score(prompts, responses, labels):
        if len(prompts) == 1:  # a ground truth
            b = int(prompts[0])
            assert responses[0] == case.tokens[b, K][case.mask[b, K]].tolist()
            return [case.rewards[b, K].item()]
        asked.extend(zip(prompts, responses, strict=True))
        return case.negative_rewards[:, 0].tolist()

    def forward(self, batches):  # the actor's pass, which needs remote workers
        for batch in batches:
            batch.action_log_probs = torch.zeros(batch.action_mask.shape)
            for row, index in enumerate(batch.index):
                logp = case.logp(case.start)[index][case.flat_mask()[index]]
                batch.action_log_probs[row, batch.action_mask[row].bool()] = logp
            batch.kl = torch.zeros_like(batch.action_log_probs)
        return batches

    monkeypatch.setattr(openrlhf_adagrpo.RemoteExperienceMaker, "make_experience", forward)
    monkeypatch.setattr(openrlhf_adagrpo, "score", score)
    monkeypatch.setattr(openrlhf_adagrpo, "GATE", GATE)
    made = maker(openrlhf_adagrpo.AdaGRPOExperienceMaker)
    made.generator = torch.Generator().manual_seed(0)
    given = samples(case, last)
    whole = [sample.sequences[0, : b + 1].tolist() for b, sample in enumerate(given[K :: K + 1])]
    experiences = made.make_experience_batch(given)
    assert [sample.sequences[0, : b + 1].tolist() for b, sample in enumerate(given[K :: K + 1])] == whole
    assert [sample.action_mask[0].tolist() for sample in given[K :: K + 1]] == [
        [0] * b + [1] * int(case.mask[b, K].sum()) for b in range(B)]  # the prompt is as long as it was

    case.negative_rewards = case.negative_rewards[:, :1]
    expected, admitted = case.rows()
    assert 0 < admitted.sum() < B
    for batch in experiences:
        for row, index in enumerate(batch.index):
            mask = batch.action_mask[row].bool()
            tokens = case.tokens.flatten(0, 1)[index][case.flat_mask()[index]]
            assert batch.sequences[row, 1:][mask].tolist() == tokens.tolist()
            torch.testing.assert_close(batch.advantages[row, mask], expected[index].expand(int(mask.sum())))
            assert (batch.advantages[row, ~mask] == 0).all()
    for name, value in case.logged().items():
        assert torch.cat([batch.info[name] for batch in experiences]).mean() == pytest.approx(value, rel=1e-6), name
    groups = [[case.tokens[b, k][case.mask[b, k]].tolist() for k in range(K)] for b in range(B)]
    # The last batch of an epoch may have a single prompt: nobody is admitted, and the truth is learnt from.
    for batch in made.make_experience_batch(samples(case)[: K + 1]):
        for row, index in enumerate(batch.index):
            mask = batch.action_mask[row].bool()
            assert batch.advantages[row, mask].tolist() == [float(K + 1) if index == K else 0.0] * int(mask.sum())
    assert len(asked) == B
    assert all(any(response in groups[b] for b in range(B) if b != int(prompt)) for prompt, response in asked)

    # The same prompt in all groups but the second: its rollouts are no negatives of its copies.
    alike, asked = samples(case), []
    for n, sample in enumerate(alike):
        sample.prompts = ["b" if n // (K + 1) == 1 else "a"]

    def any_score(prompts, responses, labels):
        asked.extend(zip(prompts, responses, strict=True))
        return [0.0] * len(prompts)

    monkeypatch.setattr(openrlhf_adagrpo, "score", any_score)
    made.make_experience_batch(alike)
    assert all((response in groups[1]) == (prompt == "a") for prompt, response in asked[B:]) and len(asked) == 2 * B


def openrlhfs_advantages(rewards):
    """Of rewards (B, K+1)."""
    from openrlhf.trainer.ppo_utils.experience import Experience
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    rows = Experience(
        rewards=rewards.flatten().clone(),
        index=list(range(rewards.numel())),
        action_mask=torch.ones(rewards.numel(), 3),
        kl=torch.zeros(rewards.numel(), 3),
        info={},
    )
    (batch,) = maker(RemoteExperienceMaker, n=rewards.shape[1]).compute_advantages_and_returns([rows])
    return core.group(batch.advantages[:, 0], rewards.shape[1])


def test_openrlhfs_own_advantages_are_ours_with_its_eps_and_correction():
    rewards = torch.randn(B, K + 1, generator=torch.Generator().manual_seed(0))
    ours = core.group_advantages(rewards, eps=1e-9, correction=1)
    torch.testing.assert_close(openrlhfs_advantages(rewards), ours, rtol=1e-5, atol=1e-5)


def test_of_equal_rewards_openrlhf_makes_advantages_of_rounding_and_we_do_not():
    rewards = torch.full((1, 8), 0.7)
    assert openrlhfs_advantages(rewards).abs().min() > 0.9
    assert (core.group_advantages(rewards, eps=1e-9) == 0).all()
