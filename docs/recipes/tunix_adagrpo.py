# SPDX-License-Identifier: MIT
"""AdaGRPO for Tunix (JAX): what to do to a TrainExample before its GRPO loss. Tested with google-tunix 0.1.7's loss.

Tunix's advantage estimators (function_registry) get rewards and num_generations only: no log-probabilities, no other
prompts. So override GRPOLearner._generate_and_compute_advantage: call it, then `with_truth`, score the ground truths
and the negatives with your reward functions, take log-probabilities from rl_cluster.get_old_per_token_logps, and
return `with_advantages`. GRPOConfig: num_generations=K+1, num_iterations=1, beta=0, temperature 1, and
loss_agg_mode="sequence-mean-token-mean" (its default).

Draw the negatives from the whole batch, before Tunix splits it (`negative_rows` of extra_row.py): a micro-batch of one
prompt has no other prompt in it.
"""

import jax.numpy as jnp
from extra_row import advantage_rows, core


def with_truth(example, truth_ids, truth_mask, *, k):
    """The last of each group's k+1 completions gives way to the ground truth, (B, L), padded on the right.

    truth_mask (B, L): true where a token counts, the end of sequence too. The padding's id may be that of the end of
    sequence, so a mask cannot be read off the ids.
    """
    ids, mask = core.group(example.completion_ids, k + 1), core.group(example.completion_mask, k + 1)  # (B, K+1, L)
    for name, truth in (("truth_ids", truth_ids), ("truth_mask", truth_mask)):
        if truth.shape != ids[:, k].shape:
            raise ValueError(f"{name}: expected shape (B, L) = {ids[:, k].shape}, got {truth.shape}; pad to L")
    ids, mask = ids.at[:, k].set(truth_ids), mask.at[:, k].set(truth_mask)
    return example.replace(completion_ids=core.ungroup(ids), completion_mask=core.ungroup(mask))


def with_advantages(example, token_logp, rewards, negative_rewards, *, k, **gate):
    """The example with AdaGRPO's advantages, and the gate's diagnostics (`shares` of them is what to log).

    token_logp (B*(k+1), L) of the policy that sampled; rewards (B*(k+1),), truth last; negative_rewards (B, M).
    """
    mask = example.completion_mask
    likelihood = core.group(core.length_normalized(token_logp.astype(jnp.float32), mask), k + 1)
    rows = core.group(jnp.where(mask, example.completion_ids, -1), k + 1)  # (B, K+1, L)
    repeats = (rows[:, :-1] == rows[:, -1:]).all(-1)
    advantages, diagnostics = advantage_rows(likelihood, core.group(rewards, k + 1), negative_rewards, repeats, **gate)
    return example.replace(advantages=core.ungroup(advantages)), diagnostics
