# SPDX-License-Identifier: MIT
"""One small batch for every stack's loss function, and the objective written out by hand to compare with.

The policy is a weight matrix W (V, H) on fixed hidden states: log pi(token l of prompt b) = log_softmax(h[b, l] @ W.T).
"""

import statistics
from dataclasses import dataclass

import torch
from extra_row import advantage_rows

import adagrpo_core as core

B, K, M, L, V, H = 6, 5, 2, 4, 11, 7
TAU, RHO, LAM = 0.4, 0.5, 0.7
GATE = {"tau": TAU, "rho": RHO, "lam": LAM}


@dataclass
class Case:
    hidden: torch.Tensor  # (B, L, H)
    start: torch.Tensor  # (V, H), the policy that sampled
    tokens: torch.Tensor  # (B, K+1, L), the truth last
    mask: torch.Tensor  # (B, K+1, L)
    rewards: torch.Tensor  # (B, K+1)
    negative_rewards: torch.Tensor  # (B, M)

    def logp(self, W):
        """Of every token, (B*(K+1), L): the shape that the stacks want."""
        table = (self.hidden @ W.T).log_softmax(-1)[:, None].expand(B, K + 1, L, V)
        return table.gather(-1, self.tokens[..., None])[..., 0].flatten(0, 1)

    def flat_mask(self):
        return self.mask.flatten(0, 1)

    def rows(self, **settings):
        """Advantages (B*(K+1),) and admitted (B,), from the core."""
        advantages, gate = self.judged(**settings)
        return advantages.flatten(), gate.admitted

    def judged(self, **settings):
        likelihood = core.length_normalized(core.group(self.logp(self.start), K + 1), self.mask)
        return advantage_rows(likelihood, self.rewards, self.negative_rewards, **{**GATE, **settings})

    def logged(self):
        """What a trainer has to log of this batch: the NLL and, by loops, the share of each of the diagnostics."""
        likelihood = core.length_normalized(core.group(self.logp(self.start), K + 1), self.mask).tolist()
        found = []
        for logp, rewards, negatives in zip(
            likelihood, self.rewards.tolist(), self.negative_rewards.tolist(), strict=True
        ):
            hard, clear = gate_by_hand(logp, rewards, negatives)
            prominent = 1 + sum(r > rewards[-1] for r in rewards) <= TAU * K
            found.append({"adagrpo/nll": -logp[-1], "adagrpo/admitted": hard and clear, "adagrpo/difficult": hard,
                          "adagrpo/easy": not hard, "adagrpo/reliable": clear, "adagrpo/not_prominent": not prominent,
                          "adagrpo/not_suppressed": prominent and not clear,
                          "adagrpo/zero_spread": len({*rewards[:-1]}) == 1})  # fmt: skip
        return {name: sum(row[name] for row in found) / len(found) for name in found[0]}


def make(*, ragged=False, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, L + 1, (B, K + 1, 1), generator=generator) if ragged else L
    case = Case(
        hidden=torch.randn(B, L, H, generator=generator, dtype=torch.float64).to(dtype),
        start=(torch.randn(V, H, generator=generator, dtype=torch.float64) / 2).to(dtype),
        tokens=torch.randint(V, (B, K + 1, L), generator=generator),
        mask=torch.arange(L).expand(B, K + 1, L) < lengths,
        rewards=torch.randn(B, K + 1, generator=generator, dtype=torch.float64).to(dtype),
        negative_rewards=torch.randn(B, M, generator=generator, dtype=torch.float64).to(dtype),
    )
    case.rewards[::2, -1] = 3.0  # a ranker that knows, on every other prompt
    case.negative_rewards[::2] = -3.0
    return case


def gate_by_hand(likelihood, rewards, negatives):
    """D and R of one prompt from lists, the truth last."""
    pool = [*rewards, *negatives]
    hard = 1 + sum(other > likelihood[-1] for other in likelihood) > TAU * K
    clear = 1 + sum(r > rewards[-1] for r in pool) <= TAU * K
    return hard, clear and all(1 + sum(r > negative for r in pool) > (1 - RHO) * K for negative in negatives)


def by_hand(case, W, *, beta=0.0, reference=None, eps=1e-4, correction=1):
    """Gradient in W of the mean of NLL + lam * c * (GRPO + beta * KL against the reference), by loops."""
    W = W.detach().clone().requires_grad_()
    logp = case.logp(W).reshape(B, K + 1, L)
    start = case.logp(case.start).reshape(B, K + 1, L)
    ref = start if reference is None else case.logp(reference).reshape(B, K + 1, L)
    losses, admitted = [], []
    for b in range(B):
        counts = [case.mask[b, k] for k in range(K + 1)]
        likelihood = [start[b, k][counts[k]].mean().item() for k in range(K + 1)]
        rewards = case.rewards[b].tolist()
        rollouts = rewards[:-1]
        hard, clear = gate_by_hand(likelihood, rewards, case.negative_rewards[b].tolist())
        spread = statistics.stdev(rollouts) if correction else statistics.pstdev(rollouts)
        loss = -logp[b, K][counts[K]].mean()
        if hard and clear:
            for k, reward in enumerate(rollouts):
                A = (reward - statistics.mean(rollouts)) / (spread + eps)
                new, old = logp[b, k][counts[k]], start[b, k][counts[k]]
                ratio = (new - old).exp()
                gap = ref[b, k][counts[k]] - new
                kl = gap.exp() - gap - 1
                loss = loss + LAM / K * (beta * kl - torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)).mean()
        losses.append(loss)
        admitted.append(hard and clear)
    assert any(admitted) and not all(admitted)
    assert admitted == case.rows()[1].tolist()
    torch.stack(losses).mean().backward()
    return W.grad


def in_stack(case, loss, W, advantages=None):
    """Gradient in W of a stack's loss(logp, old_logp, advantages, mask) on the rows."""
    W = W.detach().clone().requires_grad_()
    advantages = case.rows()[0] if advantages is None else advantages
    loss(case.logp(W), case.logp(case.start), advantages, case.flat_mask()).backward()
    return W.grad


def report(name, found, expected):
    difference = (found - expected).abs().max().item()
    print(f"{name}: gradient differs by {difference:.1e}, its largest entry is {expected.abs().max():.2g}")
    return difference


def moved(case, size=0.25):
    """A policy some updates later: ratios leave the clip range."""
    generator = torch.Generator().manual_seed(1)
    step = torch.randn(V, H, generator=generator, dtype=torch.float64).to(case.start.dtype)
    return case.start + size * step


def relative(name, found, expected):
    error = ((found - expected).norm() / expected.norm()).item()
    print(f"{name}: the gradient is off by {error:.0%} of its length")
    return error
