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
                                     {"scale_rewards": False}, {"neftune_noise_alpha": 5.0},
                                     {"delta": 0.9}, {"delta": 1.0}, {"delta": float("nan")},
                                     {"multi_objective_aggregation": "normalize_then_sum"}])  # fmt: skip
def test_settings_under_which_the_rows_would_not_add_up_are_refused(tmp_path, setting):
    import trl_run

    with pytest.raises(ValueError, match=f"{next(iter(setting))}: expected"):
        trl_run.trainer(str(tmp_path), **setting)


@pytest.mark.parametrize("negatives", [None, 0, -1, K + 2, 1.0, "1", True], ids=repr)
def test_a_number_of_negatives_that_cannot_be_is_refused(tmp_path, negatives):
    import trl_run

    with pytest.raises(ValueError, match=f"^negatives: expected 1 to num_generations=6, got {negatives!r}$"):
        trl_run.trainer(str(tmp_path), negatives=negatives)


@pytest.mark.parametrize("delta", [0.9, 1.5])
def test_what_is_refused_as_delta_would_take_the_gradient_of_the_truth(tmp_path, monkeypatch, delta):
    import torch
    import trl_run

    with monkeypatch.context() as without_the_check:
        without_the_check.setattr("trl_adagrpo.check_settings", lambda *_: None)
        trainer = trl_run.trainer(str(tmp_path), delta=delta)
    batch = first_batch(trainer)
    batch["advantages"] = torch.tensor([0.0] * K + [K + 1.0]).repeat(3)  # the truth alone
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*trainer.model.parameters()])])
    assert (gradient.norm() > 0) == (delta > 1)


def model_of(name, **settings):
    import transformers

    sizes = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                 intermediate_size=16)  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes | settings)
    return transformers.AutoModelForCausalLM.from_config(config)


OPT = dict(ffn_dim=16, word_embed_proj_dim=16)
NOISE = [  # kind of model, settings, what is named
    ("Llama", dict(attention_dropout=0.1), "config.attention_dropout of LlamaForCausalLM"), ("Llama", {}, None),
    ("Qwen2", dict(attention_dropout=0.1), "config.attention_dropout of Qwen2ForCausalLM"), ("Qwen2", {}, None),
    ("OPT", OPT, "config.dropout of OPTForCausalLM"), ("OPT", OPT | dict(dropout=0.0), None),
    ("OPT", OPT | dict(dropout=0.0, layerdrop=0.5), "layerdrop of model.decoder"),
    ("GPT2", dict(n_embd=16, n_layer=1, n_head=2), None),  # whose dropout is all of nn.Dropout
    ("Falcon", dict(hidden_dropout=0.1), "config.hidden_dropout of FalconForCausalLM"), ("Falcon", {}, None),
    ("Mixtral", dict(router_jitter_noise=0.1), "jitter_noise of model.layers.0.mlp"),
]  # fmt: skip


@pytest.mark.parametrize("name, settings, says", NOISE, ids=lambda x: x if isinstance(x, str) else None)
def test_models_whose_passes_differ_in_training_are_refused_and_no_others(name, settings, says):
    import torch
    from trl.trainer.utils import disable_dropout_in_model
    from trl_checks import check_model

    torch.manual_seed(0)
    model = model_of(name, **settings).train()
    disable_dropout_in_model(model)
    ids = torch.randint(20, (8, 12))
    one, other = (model(ids).logits for _ in range(2))
    assert torch.equal(one, other) == (says is None)
    if says is None:
        check_model(model)
    else:
        with pytest.raises(ValueError, match=rf"^{says}: expected 0, got 0\.[15]; set it to 0 in the model's config$"):
            check_model(model)
    if name == "Llama" and says:  # the attention's own number too, whatever the config says
        model.config.attention_dropout = 0.0
        with pytest.raises(ValueError, match=r"^attention_dropout of model\.layers\.0\.self_attn: expected 0, got 0"):
            check_model(model)


def test_a_dropout_that_is_no_nn_dropout_is_refused():
    import torch
    from trl_checks import check_model

    check_model(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.0)))
    for module in (torch.nn.Dropout2d(0.1), torch.nn.AlphaDropout(0.1), torch.nn.LSTM(2, 2, 2, dropout=0.1)):
        with pytest.raises(ValueError, match=r"expected 0, got 0\.1"):
            check_model(torch.nn.Sequential(torch.nn.Linear(2, 2), module))


def test_the_trainer_refuses_a_model_with_attention_dropout(tmp_path, monkeypatch):
    import functools

    import trl_run

    monkeypatch.setattr(trl_run, "LlamaConfig", functools.partial(trl_run.LlamaConfig, attention_dropout=0.1))
    with pytest.raises(ValueError, match=r"^config\.attention_dropout of LlamaForCausalLM: expected 0, got 0\.1; "):
        trl_run.trainer(str(tmp_path))


def first_batch(trainer, prompts=(0, 1, 2), **columns):
    trainer.model.train()
    rows = [trainer.train_dataset[n] | columns for n in prompts]
    return trainer._generate_and_score_completions([row for row in rows for _ in range(K + 1)])


@pytest.mark.parametrize("given", [None, [], "3 1", 3, 3.0, [3.0, 1.0], [3, None], [True, 1], [[3, 1]], [-1, 1],
                                   [26, 1]], ids=repr)  # fmt: skip
def test_a_truth_that_is_no_list_of_tokens_is_refused_in_one_line(tmp_path, given):
    import trl_run

    with pytest.raises(ValueError) as caught:
        first_batch(trl_run.trainer(str(tmp_path)), target_ids=given)
    assert str(caught.value) == f"target_ids: expected a list of tokens from 0 to 25, got {given!r}"


def test_a_dataset_without_the_truth_is_refused_in_one_line(tmp_path):
    import trl_run

    trainer = trl_run.trainer(str(tmp_path))
    trainer.train_dataset = trainer.train_dataset.remove_columns("target_ids")
    with pytest.raises(ValueError, match=r"^target_ids: expected this column"):
        first_batch(trainer)


def test_the_trained_row_counts_no_padding(tmp_path):
    import torch
    import trl_run
    from trl_checks import target_ids

    trainer = trl_run.trainer(str(tmp_path))
    for padded in ([3, 5, 0], [3, 5, 1, 0], [3, 5, 1, 1], [3, 1, 5, 1]):  # 0 is the padding, 1 the end
        with pytest.raises(ValueError, match=r"^target_ids: expected the tokens of a rollout, got some behind its end"):
            first_batch(trainer, target_ids=padded)
    batch = first_batch(trainer, target_ids=torch.tensor([3, 0, 1]))
    assert batch["completion_mask"][K].sum() == 3 and batch["completion_ids"][K, :3].tolist() == [3, 0, 1]
    of = [{"target_ids": np.array([3, 1])}, {"target_ids": (4, 5)}]
    assert target_ids(of, [1], 1, 26) == [[3, 1], [4, 5]]  # where the padding has the id of the end
    with pytest.raises(ValueError, match="some behind its end"):
        target_ids([{"target_ids": [3, 1, 1]}], [1], 1, 26)


# -- several reward functions ------------------------------------------------------------------------------------------


def judged(tmp_path, monkeypatch, change, **settings):
    """Totals (B, K+1), of negatives (B, 1) and R (B,) where change(scores, second) alters the ranker's scores.

    The ranker's numbers are negative, and it knows: truth -1, rollouts below -2, negatives -9. A second function is for
    the prompts u0 and u2 alone.
    """
    import torch
    import trl_run

    import adagrpo_core as core

    calls = []

    def ranker(prompts, completions, **_):
        second = bool(calls)
        calls.append(1)
        scores = [-9.0 if second else -1.0 if n % (K + 1) == K else -2 - n / 64 for n in range(len(prompts))]
        change(scores, second)
        return scores

    def task(prompts, completions, **_):
        return [None if prompt == "u1" else 0.5 for prompt in prompts]

    monkeypatch.setattr(trl_run, "reward", [ranker, task])
    trainer = trl_run.trainer(str(tmp_path), **settings)
    batch = first_batch(trainer)
    total, negative, _ = trainer._rewards
    R = core.reliability(total[:, -1], total[:, :-1], negative, rho=RHO)
    assert torch.isfinite(batch["advantages"]).all()
    assert (batch["advantages"].reshape(3, K + 1)[~R, :K] == 0).all()
    return total, negative, R.tolist()


def test_a_function_that_is_not_for_a_prompt_leaves_its_rewards_as_they_are(tmp_path, monkeypatch):
    total, negative, R = judged(tmp_path, monkeypatch, lambda *_: None)
    assert R == [True] * 3
    assert total[:, -1].tolist() == [-0.5, -1.0, -0.5] and negative[:, 0].tolist() == [-8.5, -9.0, -8.5]


@pytest.mark.parametrize("none", [None, float("nan")])
@pytest.mark.parametrize("row, second", [(K, False), (2, False), (0, True), (1, True)],
                         ids=["truth", "rollout", "negative", "a repeat of the negative"])  # fmt: skip
def test_a_ranker_that_fails_on_some_of_a_prompt_shuts_its_gate_and_no_other(tmp_path, monkeypatch, row, second, none):
    """As 0, beside the other function, it would be the best of all."""
    def fail(scores, now):
        if now == second:
            scores[row] = none

    total, negative, R = judged(tmp_path, monkeypatch, fail)
    if (row, second) == (1, True):  # which is not looked at: each of the group scores the one negative
        assert R == [True] * 3
        return
    assert R == [False, True, True]
    assert (negative[0, 0] if second else total[0, row]).isnan()
    assert total[1:].isfinite().all() and negative[1:].isfinite().all()


def test_a_ranker_that_fails_on_all_negatives_but_not_on_the_group_shuts_the_gate_too(tmp_path, monkeypatch):
    """As 0 they would be worst of all beside rewards that are positive, and R would be taken in."""
    def fail(scores, second):
        scores[:] = [score + 20 for score in scores]
        if second:
            scores[: K + 1] = [None] * (K + 1)

    assert judged(tmp_path, monkeypatch, fail)[2] == [False, True, True]


def test_a_function_of_weight_zero_decides_nothing(tmp_path, monkeypatch):
    """Neither by what it does not answer nor by infinity."""
    def fail(scores, second):
        scores[0], scores[K] = float("-inf"), None

    total, negative, R = judged(tmp_path, monkeypatch, fail, reward_weights=[0.0, 2.0])
    assert total[::2].tolist() == [[1.0] * (K + 1)] * 2 and negative[::2].tolist() == [[1.0]] * 2
    assert total[1].isnan().all() and negative[1].isnan().all() and R[1] is False  # nothing is left to judge it


@pytest.mark.parametrize("second", [False, True], ids=["group", "negatives"])
@pytest.mark.parametrize("infinite", [float("-inf"), float("inf")])
def test_infinite_rewards_are_refused_by_the_name_of_their_function(tmp_path, monkeypatch, infinite, second):
    def fail(scores, now):
        if now == second:
            scores[1], scores[2] = None, infinite

    with pytest.raises(ValueError, match=r"^rewards of ranker: expected finite numbers or None, got infinity; "):
        judged(tmp_path, monkeypatch, fail)


def test_finite_rewards_whose_sum_is_infinite_are_refused(tmp_path):
    import torch
    from trl_checks import total_rewards

    with pytest.raises(ValueError, match=r"^rewards of one, two: expected finite numbers or None, got infinity; "):
        total_rewards(torch.full((1, 4, 2), 3e38), torch.ones(2), ["one", "two"])


# -- what else the batch holds -----------------------------------------------------------------------------------------


def test_rollouts_of_a_copy_of_the_prompt_are_negatives_only_where_nothing_else_is_left(tmp_path, monkeypatch):
    import trl_adagrpo
    import trl_run

    drawn, negative_rows = [], trl_adagrpo.negative_rows
    monkeypatch.setattr(trl_adagrpo, "negative_rows", lambda *a, **b: drawn.append(negative_rows(*a, **b)) or drawn[-1])
    trainer = trl_run.trainer(str(tmp_path), negatives=K)
    first_batch(trainer, (0, 1, 0))
    groups = (drawn[0] // (K + 1)).tolist()
    assert groups[0] == groups[2] == [1] * K and {*groups[1]} <= {0, 2}
    first_batch(trainer, (0, 0, 0))
    assert all(b not in group for b, group in enumerate((drawn[1] // (K + 1)).tolist()))


def test_the_advantages_that_trl_logs_are_those_that_are_used(tmp_path):
    import trl_run

    trainer = trl_run.trainer(str(tmp_path))
    for _ in range(2):
        batch = first_batch(trainer)
        assert [*trainer._logs["advantages"]] == batch["advantages"].tolist()
        assert batch["advantages"][K] == K + 1 and len(trainer._logs["completion"]) == len(batch["advantages"])


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
    first, last = [log for log in run.state.log_history if "adagrpo/nll" in log]
    assert last["adagrpo/nll"] < first["adagrpo/nll"] - 0.3
    for log in (first, last):  # the shares that explain each other add up
        reasons = [log[f"adagrpo/{name}"] for name in ("reliable", "not_prominent", "not_suppressed")]
        assert sum(reasons) == pytest.approx(1)
        assert log["adagrpo/difficult"] + log["adagrpo/easy"] == pytest.approx(1)
        assert log["adagrpo/admitted"] <= min(log["adagrpo/difficult"], log["adagrpo/reliable"])
