# SPDX-License-Identifier: MIT
"""What the recipes share: which core they use, and AdaGRPO for a stack that takes nothing but one advantage per row.

Each group holds K rollouts and, as its last row, the ground truth. Copy this file next to your trainer.

    python docs/recipes/extra_row.py      # prints which core the recipes use
"""

from pathlib import Path

# The one line to change for a vendored copy: from yourproject.vendor import adagrpo_core as core
import adagrpo_core as core


def which_core():
    return f"adagrpo core {core.__version__} from {Path(core.__file__).parent}"


def advantage_rows(
    logp, rewards, negative_rewards, repeats=0, *,
    lam=1.0, tau=1 / 3, rho=0.1, ties="min", tol=1e-4, eps=1e-4, correction=1,
):  # fmt: skip
    """Advantages (B, K+1) for the stack's loss, and which prompts were admitted (B,).

    logp, rewards (B, K+1): length-normalised log-likelihood under the policy that sampled, and reward; truth last.
    Take the mean over tokens in float32: a mean in bfloat16 is coarser than what D compares.
    negative_rewards (B, M): rewards of other prompts' rollouts under this prompt; NaN, if there is no other prompt,
    admits nobody. ties: of the rewards.
    repeats (B, K): which rollouts repeat the truth (see `repeats_of_truth`). They tie with it, and so do not beat it.
    By their log-likelihoods alone they might, a little: the same tokens in another micro-batch are rounded otherwise,
    by 3e-3 in bfloat16, and a dozen such repeats would make an easy prompt look difficult. Where token ids are not at
    hand, tol does the same: a rollout must be this much likelier than the truth to beat it.
    """
    difficult = core.difficulty(logp[:, -1] + tol, logp[:, :-1] - 1e9 * repeats, tau=tau)
    reliable = core.reliability(rewards[:, -1], rewards[:, :-1], negative_rewards, tau=tau, rho=rho, ties=ties)
    admitted = core.sample_clip(difficult, reliable)
    advantages = core.group_advantages(rewards[:, :-1], eps=eps, correction=correction)
    return core.target_row_advantages(advantages, admitted, lam=lam), admitted


def negative_rows(keys, *, k, m):
    """Rows (B, M) of the flat (B*(K+1)) batch to use as negatives: other groups' rollouts, never a ground truth.

    keys (B, B*K): uniform random numbers, the same on every process.
    """
    drawn = core.in_batch_negatives(keys, k=k, m=m)  # counts rollouts only
    return drawn + drawn // k  # one ground truth stands behind every k rollouts


def repeats_of_truth(responses, k):
    """B lists of K booleans: does a rollout hold the tokens of its group's truth? responses: those of all B*(K+1) rows.

    A response is a list of tokens, or a text. The truth is the last of each group.
    """
    groups = [responses[i : i + k + 1] for i in range(0, len(responses), k + 1)]
    return [[response == truth for response in rollouts] for *rollouts, truth in groups]


if __name__ == "__main__":
    print(which_core())
