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
    logp, rewards, negative_rewards, *, lam=1.0, tau=1 / 3, rho=0.1, ties="min", tol=1e-4, eps=1e-4, correction=1
):
    """Advantages (B, K+1) for the stack's loss, and which prompts were admitted (B,).

    logp, rewards (B, K+1): length-normalised log-likelihood under the policy that sampled, and reward; truth last.
    negative_rewards (B, M): rewards of other prompts' rollouts under this prompt. ties: of the rewards.
    tol: a rollout must be this much likelier than the truth to beat it. One that repeats the truth has another
    likelihood by rounding, 2e-3 apart in bfloat16, and a dozen such repeats would make an easy prompt look difficult.
    """
    difficult = core.difficulty(logp[:, -1] + tol, logp[:, :-1], tau=tau)
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


if __name__ == "__main__":
    print(which_core())
