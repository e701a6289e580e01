# SPDX-License-Identifier: MIT
"""AdaGRPO in verl: one module, loaded by verl itself, no fork. Tested with verl 0.9.1 (its v1 trainer).

    export VERL_USE_EXTERNAL_MODULES=verl_adagrpo      # and this folder and adagrpo_core on every worker's PYTHONPATH
    python -m verl.trainer.main_ppo trainer.v1.trainer_mode=adagrpo algorithm.adv_estimator=grpo \
        actor_rollout_ref.rollout.n=17 actor_rollout_ref.rollout.agent.default_agent_loop=adagrpo \
        actor_rollout_ref.rollout.temperature=1.0 actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean \
        actor_rollout_ref.actor.ppo_epochs=1 actor_rollout_ref.actor.ppo_mini_batch_size=$TRAIN_BATCH_SIZE \
        data.train_batch_size=$TRAIN_BATCH_SIZE ...    # and no KL, no entropy term, no filter of groups

Why a trainer and not register_adv_est: verl gives an estimator rewards, mask and uid, but neither log-probabilities
(the policy's rank of the truth) nor other prompts' rollouts (the negatives). To adapt: the dataset's column
``target_ids``, `score`, GATE. Let the data-parallel ranks divide train_batch_size * rollout.n, or verl adds padding
rows, which group_by refuses as a ragged group.
"""

import numpy as np
import torch
import transfer_queue as tq
from extra_row import advantage_rows, core, negative_rows, repeats_of_truth, same_prompt, shares
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.workers.utils.padding import response_to_nested

GATE = {"lam": 1.0, "ties": "min"}
NEGATIVES = 1


def score(prompts, responses):
    """Rewards of responses under prompts (lists of token ids): whatever also fills rm_scores."""
    raise NotImplementedError("verl_adagrpo.score: put your reward model here")


@register("adagrpo")
class TruthInEveryGroup(SingleTurnAgentLoop):
    """Of the rollout.n sessions of a prompt, the last answers with the ground truth. Validate with fewer than n."""

    async def run(self, sampling_params, **columns):
        output = await super().run(sampling_params, **columns)
        if columns["session_id"] == self.rollout_config.n - 1:
            output.response_ids = [int(token) for token in columns["target_ids"]]
            output.response_mask = [1] * len(output.response_ids)
            output.response_logprobs = [0.0] * len(output.response_ids) if output.response_logprobs else None
        return output


@register_trainer("adagrpo")
class AdaGRPOTrainer(PPOTrainerSync):
    def _compute_advantage(self, batch, metrics):
        batch = super()._compute_advantage(batch, metrics)  # verl's own, to be replaced
        names = ["prompts", "responses", "response_mask", "old_log_probs", "rm_scores"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        lengths = data["response_mask"]  # nested
        prompts, responses = ([row.tolist() for row in data[name].unbind()] for name in names[:2])
        mask, logp, rewards = (data[name].to_padded_tensor(0) for name in names[2:])

        # Rows come in any order; a key is uid_session_index. Sorted by session, the truth ends up last in its group.
        uid, session, _ = zip(*(key.rsplit("_", 2) for key in batch.keys), strict=True)
        by_session = np.argsort(np.asarray(session, dtype=int), kind="stable")
        order = by_session[core.group_by(np.asarray(uid)[by_session]).order]
        k = self.config.actor_rollout_ref.rollout.n - 1
        likelihood, reward = (
            core.group(x[torch.from_numpy(order)], k + 1)
            for x in (core.length_normalized(logp.float(), mask.bool()), rewards.float().sum(-1))
        )
        B = len(order) // (k + 1)
        make = torch.Generator().manual_seed(self.global_steps)
        keys = torch.rand(B, B * k, generator=make)
        keys += torch.tensor(same_prompt([prompts[row] for row in order[:: k + 1]], k))  # rollouts of copies come last
        rows = order[negative_rows(keys, k=k, m=NEGATIVES).numpy()]  # (B, M)
        own = [prompts[order[b * (k + 1)]] for b in range(B) for _ in range(NEGATIVES)]
        negative = torch.as_tensor(score(own, [responses[row] for row in rows.flatten()])).reshape(B, NEGATIVES)

        repeats = torch.tensor(repeats_of_truth([responses[row] for row in order], k))
        sorted_rows, diagnostics = advantage_rows(likelihood, reward, negative.float(), repeats, **GATE)
        advantages = core.ungroup(sorted_rows)[torch.from_numpy(np.argsort(order))]  # in verl's order again
        metrics.update({"adagrpo/nll": -likelihood[:, -1].mean().item(), **shares(diagnostics)})
        fields = {name: response_to_nested(advantages[:, None] * mask, lengths) for name in ("advantages", "returns")}
        fields = TensorDict(fields, batch_size=len(batch.keys))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
