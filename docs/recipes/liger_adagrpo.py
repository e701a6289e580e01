# SPDX-License-Identifier: MIT
"""AdaGRPO through Liger-Kernel's fused GRPO loss, which never holds the logits. Tested with Liger-Kernel 0.8.5.

The fused loss takes hidden states and the output layer's weight and gives back no log-probabilities, while the
policy's rank of the truth needs one number per row. `likelihood` computes it a few rows at a time, without gradient.
"""

import torch
from extra_row import advantage_rows, core
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

# "grpo" is the mean per sequence first; "dapo", the default, is a mean over tokens. compiled=False saves the warm-up.
fused = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="grpo", use_ref_model=False, temperature=1.0, compiled=False)


@torch.no_grad()
def likelihood(hidden, weight, tokens, mask, rows_at_once=64):
    """Mean log-probability (N,) of tokens (N, L) under hidden states (N, L, H) and an output layer (V, H)."""
    parts = []
    for h, t, m in zip(*(x.split(rows_at_once) for x in (hidden, tokens, mask)), strict=True):
        logp = (h @ weight.T).float().log_softmax(-1).gather(-1, t[..., None])[..., 0]
        parts.append(core.length_normalized(logp, m))
    return torch.cat(parts)


def adagrpo_step(hidden, weight, tokens, mask, rewards, negative_rewards, **gate):
    """Loss (), likelihood (B, K+1) and the gate's diagnostics, (B,) each. The truth is the last row of each group.

    hidden (B*(K+1), L, H) at the positions that predict tokens (B*(K+1), L), with gradient; mask boolean;
    rewards (B, K+1), negative_rewards (B, M).
    """
    logp = core.group(likelihood(hidden, weight, tokens, mask), rewards.shape[1])
    rows = core.group(torch.where(mask.bool(), tokens, -1), rewards.shape[1])  # (B, K+1, L)
    repeats = (rows[:, :-1] == rows[:, -1:]).all(-1)
    given = logp, rewards.to(logp.dtype), negative_rewards.to(logp.dtype), repeats
    advantages, diagnostics = advantage_rows(*given, **gate)
    # Without old_per_token_logps the loss takes the ratio to be 1, which is what the rows need.
    loss, _ = fused(hidden, weight, tokens, mask.int(), core.ungroup(advantages))
    return loss, logp, diagnostics
