# SPDX-License-Identifier: MIT
"""Where the objective as advantages alone stops being the objective, and what to use there instead.

The stack is the clipped surrogate that all of them share, in its two ways of averaging.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from case import GATE, B, K, by_hand, in_stack, make, moved, relative
from extra_row import advantage_rows, negative_rows, repeats_of_truth, same_prompt

import adagrpo_core as core


def stack(logp, old, advantages, mask, *, token_mean=False, beta=0.0, ref=None):
    ratio = (logp - old).exp()
    A = advantages[:, None]
    loss = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
    if beta:
        loss = loss + beta * ((ref - logp).exp() - (ref - logp) - 1)
    if token_mean:
        return (loss * mask).sum() / mask.sum()
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def explicit(case, W, **settings):
    """The form that has none of these limits."""
    W = W.detach().clone().requires_grad_()
    logp, start = (core.group(case.logp(policy), K + 1) for policy in (W, case.start))
    out = core.adagrpo_loss(
        logp[:, -1],
        logp[:, :-1],
        start[:, :-1],
        case.rewards[:, :-1],
        case.rewards[:, -1],
        case.negative_rewards,
        case.mask[:, -1],
        case.mask[:, :-1],
        target_old_logp=core.length_normalized(start[:, -1], case.mask[:, -1]),
        **GATE,
        **settings,
    )
    out.loss.mean().backward()
    return W.grad


@pytest.mark.parametrize("noise", [0, 2e-3])
@pytest.mark.parametrize("backend", [np.asarray, torch.from_numpy, jnp.asarray])
def test_rollouts_that_repeat_the_truth_never_beat_it_however_they_were_rounded(backend, noise):
    """Half of the rollouts repeat the truth, and bfloat16 has rounded them up. The others are less likely."""
    rng, k = np.random.default_rng(0), 16
    responses = [[*rng.permutation(9)[:3].tolist()] for _ in range(5 * (k + 1))]
    logp = rng.uniform(-9, -5, (5, k + 1)).astype(np.float32)
    for b in range(5):
        for row in range(k):
            if row % 2:
                responses[b * (k + 1) + row] = [*responses[b * (k + 1) + k]]
                logp[b, row] = logp[b, k] + noise * rng.uniform(0.5, 1)
        logp[b, k] = -4.0
        logp[b, 1:k:2] = -4.0 + noise * rng.uniform(0.5, 1, k // 2)
    repeats = np.array(repeats_of_truth(responses, k))
    assert repeats[:, 1::2].all() and repeats.sum() < 5 * k
    rewards, negatives = rng.normal(size=(5, k + 1)).astype(np.float32), np.full((5, 1), -9, np.float32)
    rewards[:, k] = 9.0
    given = [backend(x) for x in (logp, rewards, negatives)]
    assert advantage_rows(*given)[1].admitted.tolist() == [bool(noise)] * 5  # by tol alone
    assert advantage_rows(*given, backend(repeats))[1].admitted.tolist() == [False] * 5  # they are easy
    for b in range(5):  # and a truth that others beat stays difficult
        logp[b, 0:k:2] = -3.0
    advantages, gate = advantage_rows(backend(logp), *given[1:], backend(repeats))
    assert gate.admitted.tolist() == [True] * 5
    np.testing.assert_array_equal(advantages, advantage_rows(backend(logp), *given[1:])[0])


@pytest.mark.parametrize("tol", [-1e-4, float("nan"), float("inf"), True, None, "1e-4", np.ones(2)], ids=str)
def test_a_tolerance_that_is_no_finite_number_from_zero_on_is_refused(tol):
    with pytest.raises(ValueError, match=r"^tol: expected a finite number >= 0"):
        make().rows(tol=tol)


@pytest.mark.parametrize("shape", [(), (1, 1), (K,), (1, K), (B, 1), (B, K + 1), (K, B)], ids=str)
@pytest.mark.parametrize("backend", [np.zeros, torch.zeros, jnp.zeros])
def test_repeats_of_another_shape_than_the_rollouts_are_refused_and_nothing_broadcasts(backend, shape):
    into = {np.zeros: np.asarray, torch.zeros: torch.from_numpy, jnp.zeros: jnp.asarray}[backend]
    rows = [into(np.random.default_rng(0).normal(size=each)) for each in ((B, K + 1), (B, K + 1), (B, 1))]
    with pytest.raises(ValueError, match=r"^repeats: expected a boolean array of shape"):
        advantage_rows(*rows, backend(shape) > 1)
    for wrong in (backend((B, K)), [[False] * K] * B, 0):  # numbers, lists
        with pytest.raises(ValueError, match=r"^repeats: expected a boolean array of shape"):
            advantage_rows(*rows, wrong)
    advantage_rows(*rows, backend((B, K)) > 1)


@pytest.mark.parametrize("into", [np.asarray, torch.tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
@pytest.mark.parametrize("widths", [(K, K + 1), (K + 1, K), (K + 2, K + 1)], ids=str)
def test_likelihoods_and_rewards_of_other_widths_are_refused_since_another_row_would_be_the_truth(into, widths):
    logp, rewards = (into(np.random.default_rng(0).normal(size=(B, width))) for width in widths)
    with pytest.raises(ValueError, match=r"^logp, rewards: expected arrays of one shape"):
        advantage_rows(logp, rewards, into(np.zeros((B, 1))))


@pytest.mark.parametrize("given", [([[0.0] * 4], [[0.0] * 4], [[0.0]]), (None, None, None)], ids=["lists", "None"])
def test_rows_that_are_no_arrays_are_refused_by_name(given):
    with pytest.raises(ValueError, match=r"^logp, rewards: expected arrays of one shape"):
        advantage_rows(*given)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("library", [np, torch, jnp])
def test_rows_in_half_precision_are_judged_in_float32(library, dtype):
    """By a tol that half precision would round away, and with a K+1 that bfloat16 does not hold."""
    if (library, dtype) == (np, "bfloat16"):
        return  # which NumPy does not have
    k, kind = 258, getattr(library, dtype)
    logp = np.full((2, k + 1), -4.0)
    logp[0, :k] = -3.75  # likelier than the truth
    rewards = np.tile(np.arange(k + 1) % 128, (2, 1))
    rewards[:, -1] = 200

    def rows(kind):
        def into(x):
            return torch.tensor(x, dtype=kind) if library is torch else library.asarray(x, dtype=kind)

        advantages, gate = advantage_rows(into(logp), into(rewards), into(np.full((2, 1), -1.0)), rho=0.5, tol=1e-4)
        return advantages, gate.admitted

    advantages, admitted = rows(kind)
    expected, wanted = rows(library.float32)
    assert admitted.tolist() == wanted.tolist() == [True, False]  # equal likelihoods do not beat the truth
    assert "float32" in str(advantages.dtype) and advantages[:, -1].tolist() == [k + 1, k + 1]
    np.testing.assert_array_equal(np.asarray(advantages), np.asarray(expected))
    logp[1, :k] = -3.984375  # one step of bfloat16 likelier: within a tol of .0157, half precision or not
    assert rows(kind)[1].tolist() == [True, True]


def test_a_response_may_be_a_list_a_tuple_or_a_text_and_odd_ones_are_refused():
    assert repeats_of_truth([[1, 2], [1, 3], (1, 2), (), [2], []], 2) == [[True, False], [True, False]]
    assert repeats_of_truth(["a b", "a", "a b"], 2) == [[True, False]]
    with pytest.raises(ValueError, match=r"expected groups of k\+1=3 rows, got 4 rows"):
        repeats_of_truth([[1]] * 4, 2)
    for odd, name in ((torch.ones(3, 2), "Tensor"), (np.ones((3, 2)), "ndarray"), ([None] * 3, "NoneType")):
        with pytest.raises(ValueError, match=f"expected lists of tokens, or else texts, got {name}"):
            repeats_of_truth(odd, 2)
    with pytest.raises(ValueError, match="got both"):
        repeats_of_truth(["1", [1], [1]], 2)


def test_rollouts_of_a_copy_of_the_prompt_are_negatives_only_where_nothing_else_is_left():
    prompts, k = ["a", "b", "a", [{"content": "a"}]], 3
    for seed in range(20):
        keys = np.random.default_rng(seed).random((4, 4 * k)) + np.asarray(same_prompt(prompts, k))
        rows = negative_rows(keys, k=k, m=2 * k)
        assert {*rows[0] // (k + 1)} == {*rows[2] // (k + 1)} == {1, 3} and (rows % (k + 1) < k).all()
        assert {*negative_rows(keys, k=k, m=3 * k)[0] // (k + 1)} == {1, 2, 3}


def test_a_prompt_without_negatives_is_not_admitted():
    case = make()
    case.negative_rewards[:] = torch.nan
    advantages, admitted = case.rows()
    assert not admitted.any() and advantages.reshape(-1, K + 1)[:, :K].eq(0).all()


@pytest.mark.parametrize("ragged, token_mean", [(False, False), (False, True), (True, False)])
def test_on_policy_the_rows_are_the_objective(ragged, token_mean):
    case = make(ragged=ragged)
    expected = by_hand(case, case.start)
    found = in_stack(case, lambda *given: stack(*given, token_mean=token_mean), case.start)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(explicit(case, case.start), expected, rtol=1e-12, atol=1e-14)


def test_after_the_first_update_the_rows_are_not_the_objective_and_the_explicit_loss_is():
    case = make()
    W = moved(case)
    expected = by_hand(case, W)
    assert relative("second update", in_stack(case, stack, W), expected) > 0.2
    torch.testing.assert_close(explicit(case, W), expected, rtol=1e-12, atol=1e-14)


def test_an_nll_beside_the_stack_survives_further_updates():
    """The stack gets the rollouts alone, scaled by lam * c; the supervised loss is a term of its own."""
    case = make()
    W = moved(case).requires_grad_()
    advantages, _ = case.rows(lam=1.0)
    rollouts = core.group(advantages, K + 1)[:, :-1] * (K / (K + 1)) * GATE["lam"]  # = lam * c * A
    logp, old, mask = (core.group(x, K + 1) for x in (case.logp(W), case.logp(case.start), case.flat_mask()))
    nll = core.nll_loss(logp[:, -1], mask[:, -1]).mean()
    logp, old, mask = (core.ungroup(x[:, :-1]) for x in (logp, old, mask))
    (nll + stack(logp, old, rollouts.flatten(), mask)).backward()
    torch.testing.assert_close(W.grad, by_hand(case, W), rtol=1e-12, atol=1e-14)


def test_with_ragged_completions_a_mean_over_tokens_is_not_the_objective():
    case = make(ragged=True)
    expected = by_hand(case, case.start)
    found = in_stack(case, lambda *given: stack(*given, token_mean=True), case.start)
    assert relative("ragged completions, token mean", found, expected) > 0.2


def test_a_kl_term_inside_the_stack_escapes_the_gate():
    case, beta = make(), 0.1
    ref = case.logp(moved(case))
    expected = by_hand(case, case.start, beta=beta, reference=moved(case))
    found = in_stack(case, lambda *given: stack(*given, beta=beta, ref=ref), case.start)
    assert relative("KL inside the stack, beta 0.1", found, expected) > 0.02
    gated = explicit(case, case.start, beta=beta, ref_token_logp=core.group(ref, K + 1)[:, :-1])
    torch.testing.assert_close(gated, expected, rtol=1e-12, atol=1e-14)


def test_dropping_the_rows_that_are_not_admitted_rescales_the_loss():
    case = make()
    expected = by_hand(case, case.start)
    advantages, _ = case.rows()
    kept = (advantages != 0).nonzero()[:, 0]  # what a filter on zero advantages leaves
    assert len(kept) < len(advantages)
    found = in_stack(case, lambda *given: stack(*(x[kept] for x in given)), case.start)
    assert relative("zero advantages dropped", found, expected) > 0.2


def test_the_logged_loss_is_minus_one_at_ratio_one_and_elsewhere_it_is_not():
    case, ragged = make(), make(ragged=True)

    def logged(case, W=None, **settings):
        given = case.logp(case.start if W is None else W), case.logp(case.start), case.rows()[0], case.flat_mask()
        return stack(*given, **settings), given

    whole, given = logged(case)
    assert whole.item() == pytest.approx(-1)
    assert logged(ragged)[0].item() == pytest.approx(-1)
    parts = [stack(*(x[first::2] for x in given)).item() for first in (0, 1)]  # groups are split
    assert sum(parts) / 2 == pytest.approx(-1) and abs(parts[0] + 1) > 0.1
    for other in (logged(case, moved(case)), logged(ragged, token_mean=True),
                  logged(case, beta=0.1, ref=case.logp(moved(case)))):  # fmt: skip
        assert abs(other[0].item() + 1) > 0.01
