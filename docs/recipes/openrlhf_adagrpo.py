# SPDX-License-Identifier: MIT
"""AdaGRPO in OpenRLHF: an experience maker in place of its own. Tested with OpenRLHF 0.11.2.

OpenRLHF has no registry for this, so one line changes, in openrlhf/trainer/ppo_trainer.py:

    from openrlhf_adagrpo import AdaGRPOExperienceMaker as RemoteExperienceMaker

    python -m openrlhf.cli.train_ppo_ray --rollout.n_samples_per_prompt 17 --algo.advantage.estimator group_norm \
        --actor.loss_agg_mode seq-mean-token-mean --algo.kl.init_coef 0 --train.max_epochs 1 \
        --train.batch_size $((17 * ROLLOUT_BATCH_SIZE)) --rollout.batch_size $ROLLOUT_BATCH_SIZE ...
        # and no entropy term, no dynamic filtering, no importance-sampling correction, temperature 1

The label of a prompt is its ground truth as text. To adapt: `truth_ids`, `score`, GATE.
"""

import torch
from extra_row import advantage_rows, core, negative_rows, repeats_of_truth, same_prompt, which_core
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

GATE = {"lam": 1.0, "ties": "min"}
NEGATIVES = 1


def truth_ids(label, tokenizer):
    """The ground truth exactly as a rollout would hold it, with the end of sequence where rollouts end by one."""
    return [*tokenizer(label, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def score(prompts, responses, labels):
    """Rewards of responses (lists of token ids) under prompts (texts): whatever also fills Experience.rewards."""
    raise NotImplementedError("openrlhf_adagrpo.score: put your reward model here")


class AdaGRPOExperienceMaker(RemoteExperienceMaker):
    def __init__(self, *positional, **keyword):
        super().__init__(*positional, **keyword)
        self.generator = torch.Generator().manual_seed(self.args.train.seed)  # draws the negatives
        print(which_core())

    def make_experience_batch(self, rollout_samples):
        """Rollouts come one by one, groups side by side; the last of each group gives way to the ground truth."""
        n = self.args.rollout.n_samples_per_prompt
        for sample in rollout_samples[n - 1 :: n]:
            # Masks start at token 1. Behind a prompt that fills the context there is no response, and all of it is 0.
            masked = torch.nn.functional.pad(sample.action_mask[0].bool(), (0, 1), value=True)
            prompt = sample.sequences[0, : int(masked.int().argmax()) + 1]
            truth = torch.tensor(truth_ids(sample.labels[0], self.tokenizer))
            sample.sequences = torch.cat([prompt, truth])[None]
            sample.attention_mask = torch.ones_like(sample.sequences)
            sample.action_mask = (torch.arange(1, sample.sequences.shape[1]) >= len(prompt)).long()[None]
            sample.response_length = torch.tensor([len(truth)])
            sample.total_length = torch.tensor([float(len(prompt) + len(truth))])
            sample.truncated = torch.tensor([False])
            if sample.rewards is not None:  # else a reward model scores it like any other row
                sample.rewards = torch.tensor(score(sample.prompts, [truth.tolist()], sample.labels))
                sample.info["reward"] = sample.rewards
        return super().make_experience_batch(rollout_samples)

    def compute_advantages_and_returns(self, experiences):
        experiences = super().compute_advantages_and_returns(experiences)  # OpenRLHF's own, to be replaced
        k = self.args.rollout.n_samples_per_prompt - 1
        order = torch.tensor([row for batch in experiences for row in batch.index]).argsort()  # groups side by side
        token_logp = [(batch.action_log_probs.float(), batch.action_mask.bool()) for batch in experiences]
        logp = [core.length_normalized(*each) for each in token_logp]
        rewards = torch.cat([batch.rewards for batch in experiences])[order].float()
        rows = [
            (prompt, sequence[1:][mask.bool()].tolist(), label)
            for batch in experiences
            for prompt, sequence, mask, label in zip(
                batch.prompts, batch.sequences, batch.action_mask, batch.labels, strict=True
            )
        ]
        rows = [rows[row] for row in order]
        B = len(rows) // (k + 1)
        negatives = torch.full((B, NEGATIVES), torch.nan)
        if B > 1:  # a last batch of one prompt has no other prompts: nobody is admitted
            copies = torch.tensor(same_prompt([rows[b * (k + 1)][0] for b in range(B)], k))  # their rollouts come last
            keys = torch.rand(B, B * k, generator=self.generator) + copies
            drawn = negative_rows(keys, k=k, m=NEGATIVES).tolist()
            pairs = [(rows[b * (k + 1)], rows[row]) for b in range(B) for row in drawn[b]]
            scores = score([own[0] for own, _ in pairs], [other[1] for _, other in pairs], [own[2] for own, _ in pairs])
            negatives = torch.tensor(scores, dtype=rewards.dtype).reshape(B, NEGATIVES)

        repeats = torch.tensor(repeats_of_truth([tokens for _, tokens, _ in rows], k))
        grouped = core.group(torch.cat(logp)[order], k + 1), core.group(rewards, k + 1), negatives, repeats
        advantages, diagnostics = advantage_rows(*grouped, **GATE)
        logged = {  # OpenRLHF logs means over rows; its loss is a constant now
            f"adagrpo/{name}": which.float().repeat_interleave(k + 1) for name, which in diagnostics._asdict().items()
        }
        logged["adagrpo/nll"] = -grouped[0][:, -1].repeat_interleave(k + 1)
        columns = [core.ungroup(advantages), *logged.values()]
        sizes = [len(batch.index) for batch in experiences]
        parts = zip(*(column[order.argsort()].split(sizes) for column in columns), strict=True)
        for batch, (own_advantages, *info) in zip(experiences, parts, strict=True):
            batch.advantages = own_advantages[:, None] * batch.action_mask
            batch.returns = batch.advantages.clone()
            batch.info |= zip(logged, info, strict=True)
        return experiences
