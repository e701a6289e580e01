# SPDX-License-Identifier: MIT
"""The TRL recipe in a live GRPOTrainer: its gradient against the objective written out by hand."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.peers
HERE = Path(__file__).parent
K, RHO = 5, 0.5


def step(folder, processes, rows, accumulation):
    """One optimizer step in fresh processes. Returns the noted arrays, rows of all processes in order."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={processes}"]
    launch = launch if processes > 1 else []
    command = [sys.executable, *launch, str(HERE / "trl_worker.py"), str(folder), str(rows), str(accumulation)]
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(processes)]


def by_hand(noted):
    """Gradient of NLL + c * GRPO (eq. 5) by plain PyTorch and Python, from the tokens and the start weights alone."""
    import torch
    import trl_run

    trainer = trl_run.trainer("unused")
    model, words = trainer.model, trainer.processing_class
    start = torch.from_numpy(noted[0]["before"])
    torch.nn.utils.vector_to_parameters(start.to(next(model.parameters()).dtype), model.parameters())
    negative_rewards = noted[0]["negative_rewards"]

    texts, users, logps = [], [], []
    for part in noted:
        for prompt, attend, completion, counts in zip(
            *(part[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True
        ):
            prompt, completion = prompt[attend == 1].tolist(), completion[counts == 1].tolist()
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
            logps.append(logits.log_softmax(-1)[range(len(completion)), completion])
            texts.append(words.decode(completion, skip_special_tokens=True))
            users.append(words.decode(prompt))

    losses, admitted = [], []
    for b in range(len(texts) // (K + 1)):
        rows = range(b * (K + 1), (b + 1) * (K + 1))
        user = users[rows[0]]
        assert {users[row] for row in rows} == {user} and texts[rows[-1]].split() == trl_run.truth(int(user[1:]))
        *rollouts, target = np.float32(trl_run.reward([user] * (K + 1), [texts[row] for row in rows])).tolist()
        (negative,) = negative_rewards[b].tolist()
        strangers = [texts[row] for row in range(len(texts)) if row not in rows and (row + 1) % (K + 1)]
        assert any(np.float32(score) == negative for score in trl_run.reward([user] * len(strangers), strangers))

        likelihood = [logps[row].mean().item() for row in rows]
        hard = sum(other > likelihood[-1] for other in likelihood[:-1]) + 1 > K / 3
        pool = [*rollouts, target, negative]
        clear = sum(r > target for r in pool) + 1 <= K / 3 and sum(r > negative for r in pool) + 1 > (1 - RHO) * K
        mean, spread = statistics.mean(rollouts), statistics.stdev(rollouts)
        grpo = sum(
            -((logps[row] - logps[row].detach()).exp() * (reward - mean) / (spread + 1e-4)).mean() / K
            for row, reward in zip(rows[:-1], rollouts, strict=True)
        )
        losses.append(-logps[rows[-1]].mean() + (grpo if hard and clear else 0))
        admitted.append(hard and clear)
    torch.stack(losses).mean().backward()
    return np.concatenate([p.grad.flatten().double().numpy() for p in model.parameters()]), admitted


@pytest.mark.parametrize(
    "processes, rows, accumulation",
    [(1, 9, 4), (2, 9, 3)],
    ids=["groups-split-over-micro-batches", "groups-split-over-two-processes-too"],
)
def test_the_trainers_gradient_is_that_of_the_objective_written_by_hand(tmp_path, processes, rows, accumulation):
    noted = step(tmp_path, processes, rows, accumulation)
    expected, admitted = by_hand(noted)
    assert any(admitted) and not all(admitted)
    for part in noted:  # every process ends up with the same gradient
        difference = np.abs(part["gradient"] - expected).max()
        print(f"TRL, {processes} process(es): gradient differs by {difference:.1e}, its largest entry is "
              f"{np.abs(expected).max():.2g}; {sum(admitted)} of {len(admitted)} prompts admitted")  # fmt: skip
        assert difference < 1e-6


def test_trls_own_advantages_are_ours_with_its_eps_and_correction(tmp_path):
    import torch
    import trl_run
    from trl import GRPOTrainer

    import adagrpo_core as core

    class Plain(GRPOTrainer):
        def __init__(self, negatives, gate, **settings):
            super().__init__(**settings)

        def _calculate_rewards(self, inputs, prompts, *rest):
            self.noted = torch.arange(len(prompts)).remainder(7).sqrt().reshape(-1, 1)
            self.noted[:6] = 0.7  # a group without spread
            return self.noted

    trainer = trl_run.trainer(str(tmp_path), Plain)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([row for row in trainer.train_dataset for _ in range(6)])
    ours = core.ungroup(core.group_advantages(core.group(trainer.noted[:, 0], 6), eps=1e-4, correction=1))
    torch.testing.assert_close(batch["advantages"], ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("setting", [{"beta": 0.1}, {"loss_type": "dapo"}, {"num_iterations": 2}, {"temperature": 0.7},
                                     {"steps_per_generation": 2}, {"entropy_coef": 0.1}, {"disable_dropout": False},
                                     {"off_policy_mask_threshold": 0.5}, {"scale_rewards": "batch"},
                                     {"scale_rewards": False},
                                     {"multi_objective_aggregation": "normalize_then_sum"}])  # fmt: skip
def test_settings_under_which_the_rows_would_not_add_up_are_refused(tmp_path, setting):
    import trl_run

    with pytest.raises(ValueError, match=f"{next(iter(setting))}: expected"):
        trl_run.trainer(str(tmp_path), **setting)


def first_batch(trainer):
    trainer.model.train()
    prompts = trainer.train_dataset.select(range(3))
    return trainer._generate_and_score_completions([row for row in prompts for _ in range(K + 1)])


def test_an_agent_whose_groups_would_not_end_by_the_truth_is_refused(tmp_path):
    import functools

    import trl_run

    def agent(prompts, trainer):
        return dict(prompt_ids=[[2]] * len(prompts), completion_ids=[[3, 1]] * len(prompts), logprobs=None)

    trainer = trl_run.trainer(str(tmp_path), functools.partial(trl_run.AdaGRPOTrainer, rollout_func=agent))
    with pytest.raises(ValueError, match="not its target_ids: rollout_func, tools"):
        first_batch(trainer)


@pytest.mark.parametrize("rows", [2, 3])
def test_evaluation_with_fewer_generations_has_no_truth_in_its_groups(tmp_path, rows):
    import trl_run

    trainer = trl_run.trainer(str(tmp_path), num_generations_eval=rows, per_device_eval_batch_size=12)
    trainer.eval_dataset = trainer.train_dataset
    found = trainer.evaluate()
    assert np.isfinite(found["eval_reward"]) and not any("adagrpo" in key for key in found)


def test_what_a_reward_logs_is_of_the_rollouts_and_not_of_the_negatives(tmp_path, monkeypatch):
    import trl_run

    reward, logged = trl_run.reward, []

    def logging_reward(prompts, completions, log_extra, log_metric, **columns):
        scores = reward(prompts, completions)
        log_extra("words", [len(text.split()) for text in completions])
        log_metric("mean", sum(scores) / len(scores))
        logged.append(scores)
        return scores

    monkeypatch.setattr(trl_run, "reward", logging_reward)
    trainer = trl_run.trainer(str(tmp_path))
    first_batch(trainer)
    rollouts, negatives = logged
    assert len(trainer._logs["extra"]["words"]) == len(trainer._logs["completion"]) == len(rollouts)
    assert trainer._metrics["train"]["mean"] == [pytest.approx(np.mean(rollouts), rel=1e-6)]
    assert np.mean(rollouts) != pytest.approx(np.mean(negatives), rel=1e-3)


def test_likelihoods_of_a_model_in_bfloat16_are_averaged_in_float32(tmp_path, monkeypatch):
    import torch
    import trl_adagrpo
    import trl_run

    seen, advantage_rows = [], trl_adagrpo.advantage_rows
    monkeypatch.setattr(trl_adagrpo, "advantage_rows", lambda *a, **b: (seen.append(a), advantage_rows(*a, **b))[1])
    trainer = trl_run.trainer(str(tmp_path), dtype=torch.bfloat16)
    batch = first_batch(trainer)
    ((logp, _, _, repeats),) = seen
    assert logp.dtype == torch.float32
    ids = (batch["completion_ids"] * batch["completion_mask"]).reshape(-1, K + 1, batch["completion_ids"].shape[1])
    assert repeats.equal((ids[:, :-1] == ids[:, -1:]).all(-1))


def test_the_recipe_learns(tmp_path):
    import trl_run

    run = trl_run.trainer(str(tmp_path), max_steps=30, logging_steps=15)
    run.train()
    first, last = [log["adagrpo/nll"] for log in run.state.log_history if "adagrpo/nll" in log]
    assert last < first - 0.3
