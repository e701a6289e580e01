# SPDX-License-Identifier: MIT
"""The arithmetic of AdaGRPO (arXiv 2606.08480) as pure functions of arrays.

AdaGRPO trains a generative recommender on the supervised loss of every instance and lets the policy gradient
speak only on instances where the policy struggles and the reward model can be trusted. Everything that decides or
computes this is here, for any array-API library (NumPy, PyTorch, JAX; CuPy untried) and with no state.

Shape letters: B prompts, K rollouts per prompt, M negatives, L tokens. Required arrays are positional-only, settings
keyword-only, optional arrays may be given either way unless they stand after the ``*``.

Read in this order: ``ranks`` (who beats whom), ``gate`` (who is admitted), ``advantages``, ``loss``; ``groups`` moves
rows about and draws negatives, ``influence`` is the analysis that motivates the method. To vendor, copy this folder
under any name; ``_compat`` is the one file that knows where arrays come from.
"""

from .advantages import group_advantages, target_row_advantages
from .gate import GateDiagnostics, difficulty, gate_diagnostics, reliability, sample_clip
from .groups import GroupOrder, group, group_by, in_batch_negatives, ungroup
from .influence import RewardInfluence, Stratum, reward_influence
from .loss import AdaGRPOLoss, adagrpo_loss, grpo_loss, length_normalized, nll_loss
from .ranks import RewardRanks, policy_rank, reward_ranks

__version__ = "0.1.0"

__all__ = [
    "AdaGRPOLoss",
    "GateDiagnostics",
    "GroupOrder",
    "RewardInfluence",
    "RewardRanks",
    "Stratum",
    "adagrpo_loss",
    "difficulty",
    "gate_diagnostics",
    "group",
    "group_advantages",
    "group_by",
    "grpo_loss",
    "in_batch_negatives",
    "length_normalized",
    "nll_loss",
    "policy_rank",
    "reliability",
    "reward_influence",
    "reward_ranks",
    "sample_clip",
    "target_row_advantages",
    "ungroup",
]
