# SPDX-License-Identifier: MIT
"""The MiniOneRec recipe with a stand-in for its trainer: its loss formula on our rows against the objective by hand."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from case import GATE, B, K, by_hand, in_stack, make, report

pytestmark = pytest.mark.peers  # it needs accelerate


def minionerec_loss(logp, old, advantages, mask):
    """The default branch of ReReTrainer.compute_loss with beta=0: always on-policy, the mean per sequence first."""
    per_token = -(logp - logp.detach()).exp() * advantages.unsqueeze(1)
    return ((per_token * mask).sum(1) / mask.sum(1)).mean()


def trainer_of(case, ranker, logp=None):
    return SimpleNamespace(
        num_generations=K + 1,
        model=None,
        _get_per_token_logps=lambda model, ids, attend, length: case.logp(case.start) if logp is None else logp,
        args=SimpleNamespace(seed=0),
        state=SimpleNamespace(global_step=7),
        accelerator=SimpleNamespace(process_index=0),
        reward_funcs=[ranker],
        reward_weights=torch.ones(1),
        _metrics=defaultdict(list),
    )


@pytest.mark.parametrize("ragged", [False, True])
def test_minionerecs_loss_on_our_rows_has_the_gradient_of_the_objective(ragged):
    from minionerec_adagrpo import adagrpo_advantages

    case = make(ragged=ragged, dtype=torch.float32)
    completions = [f"row {n}" for n in range(B * (K + 1))]
    asked = []

    def ranker(prompts, completions, column):
        assert column == ["x"] * len(prompts)
        asked.extend(zip(prompts, completions, strict=True))
        return case.negative_rewards[:, 0].repeat_interleave(K + 1).tolist()

    trainer = trainer_of(case, ranker)
    prompts = [n // (K + 1) for n in range(B * (K + 1))]
    columns = {"column": ["x"] * len(prompts)}
    given = prompts, completions, None, None, case.flat_mask().int(), case.rewards.flatten(), columns
    advantages = adagrpo_advantages(trainer, *given, **GATE)

    case.negative_rewards = case.negative_rewards[:, :1]
    torch.testing.assert_close(advantages, case.rows()[0])
    for prompt, completion in asked:  # another prompt's rollout, never a ground truth
        row = int(completion.split()[1])
        assert row // (K + 1) != prompt and row % (K + 1) != K
    found = in_stack(case, minionerec_loss, case.start, advantages)
    assert report("MiniOneRec's formula", found, by_hand(case, case.start)) < 1e-6
    assert trainer._metrics == {name: [pytest.approx(value, rel=1e-6)] for name, value in case.logged().items()}


def test_the_truth_is_the_last_row_of_a_group_that_two_processes_share():
    """Of 2 * (K + 1) rows the first process has fewer than a group."""
    from minionerec_adagrpo import is_truth

    n = K + 1
    for processes in (1, 2, 3, 4):
        local = 2 * n // processes
        found = [is_truth(SimpleNamespace(accelerator=SimpleNamespace(process_index=p), num_generations=n), i, local)
                 for p in range(processes) for i in range(local)]  # fmt: skip
        assert found == ([False] * K + [True]) * 2


def test_rollouts_of_a_copy_of_the_prompt_are_no_negatives():
    from minionerec_adagrpo import adagrpo_advantages

    case, n = make(dtype=torch.float32), K + 1
    asked = []

    def ranker(prompts, completions):
        asked.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    prompts = [("b" if row // n == 1 else "a") for row in range(B * n)]
    completions = [f"row {row}" for row in range(B * n)]
    trainer = trainer_of(case, ranker)
    adagrpo_advantages(trainer, prompts, completions, None, None, case.flat_mask().int(), case.rewards.flatten(), {},
                       **GATE)  # fmt: skip
    assert len(asked) == B * n
    assert all((int(text.split()[1]) // n == 1) == (prompt == "a") for prompt, text in asked)


def test_a_batch_of_one_prompt_has_no_negatives_and_admits_nobody():
    from minionerec_adagrpo import adagrpo_advantages

    case = make(dtype=torch.float32)
    n = K + 1

    def ranker(prompts, completions):
        raise AssertionError("there is nothing to ask")

    trainer = trainer_of(case, ranker, logp=case.logp(case.start)[:n])
    rewards = case.rewards[0]  # a ranker that knows
    given = [0] * n, ["text"] * n, None, None, case.flat_mask()[:n].int(), rewards, {}
    advantages = adagrpo_advantages(trainer, *given, **GATE)
    assert advantages.tolist() == [0.0] * K + [n]
    assert trainer._metrics["adagrpo/admitted"] == [0.0]
