# SPDX-License-Identifier: MIT
"""The Liger-Kernel recipe: its real fused loss, on the CPU, against the objective written out by hand."""

import pytest
import torch
from case import GATE, K, by_hand, make, moved, relative, report

pytestmark = pytest.mark.peers


def inputs(case):
    hidden = case.hidden[:, None].expand(-1, K + 1, -1, -1).flatten(0, 1)
    return hidden, case.start.clone().requires_grad_(), case.tokens.flatten(0, 1), case.flat_mask()


@pytest.mark.parametrize("ragged", [False, True])
def test_ligers_loss_on_our_rows_has_the_gradient_of_the_objective(ragged):
    from liger_adagrpo import adagrpo_step

    case = make(ragged=ragged, dtype=torch.float32)
    hidden, weight, tokens, mask = inputs(case)
    loss, _, gate = adagrpo_step(hidden, weight, tokens, mask, case.rewards, case.negative_rewards, **GATE)
    loss.backward()
    assert gate.admitted.tolist() == case.rows()[1].tolist()
    name = "Liger-Kernel, ragged" if ragged else "Liger-Kernel"
    assert report(name, weight.grad, by_hand(case, case.start)) < 1e-6


def test_ligers_loss_is_not_the_objective_for_ragged_rows_by_token_mean_or_on_a_second_update():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def gradient(case, W, loss_type, old):
        hidden, _, tokens, mask = inputs(case)
        W = W.clone().requires_grad_()
        fused = LigerFusedLinearGRPOLoss(beta=0.0, loss_type=loss_type, use_ref_model=False, compiled=False)
        fused(hidden, W, tokens, mask.int(), case.rows()[0], old_per_token_logps=old)[0].backward()
        return W.grad

    ragged, case = make(ragged=True, dtype=torch.float32), make(dtype=torch.float32)
    by_token = gradient(ragged, ragged.start, "dapo", None)
    assert relative("Liger-Kernel, dapo (its default), ragged", by_token, by_hand(ragged, ragged.start)) > 0.2
    later = gradient(case, moved(case), "grpo", case.logp(case.start))
    assert relative("Liger-Kernel, second update", later, by_hand(case, moved(case))) > 0.2
