# SPDX-License-Identifier: MIT
"""What the recipes share: which core they use, and AdaGRPO for a stack that takes nothing but one advantage per row.

Each group holds K rollouts and, as its last row, the ground truth. Copy this file next to your trainer.

    python docs/recipes/extra_row.py      # prints which core the recipes use
"""

from numbers import Real
from pathlib import Path

# The one line to change for a vendored copy: from yourproject.vendor import adagrpo_core as core
import adagrpo_core as core


def which_core():
    return f"adagrpo core {core.__version__} from {Path(core.__file__).parent}"


def advantage_rows(
    logp, rewards, negative_rewards, repeats=None, *,
    lam=1.0, tau=1 / 3, rho=0.1, ties="min", tol=1e-4, eps=1e-4, correction=1,
):  # fmt: skip
    """Advantages (B, K+1) for the stack's loss; and, to be logged, core.GateDiagnostics: `admitted` (B,), and why not.

    logp, rewards (B, K+1): length-normalised log-likelihood under the policy that sampled, and reward; truth last.
    Take the mean over tokens in float32: a mean in bfloat16 is coarser than what D compares.
    negative_rewards (B, M): rewards of other prompts' rollouts under this prompt; NaN, if there is no other prompt,
    admits nobody. ties: of the rewards.
    repeats (B, K), boolean: which rollouts repeat the truth (see `repeats_of_truth`). They tie with it, and so do not
    beat it. By their log-likelihoods alone they might, a little: the same tokens in another micro-batch are rounded
    otherwise, by 3e-3 in bfloat16, and a dozen such repeats would make an easy prompt look difficult. Where token ids
    are not at hand, tol does the same: a rollout must be this much likelier than the truth to beat it.
    """
    if isinstance(tol, bool) or not isinstance(tol, Real) or not 0 <= tol < float("inf"):
        raise ValueError(f"tol: expected a finite number >= 0, in nats per token, got {tol!r}")
    shapes = [getattr(x, "shape", None) for x in (logp, rewards)]
    if None in shapes or shapes[0] != shapes[1]:  # or another row than the truth would be taken for it
        raise ValueError(f"logp, rewards: expected arrays of one shape (B, K+1), truth last, got {shapes}")
    # In half precision tol would be rounded away, and K+1 from K = 256 on.
    logp, rewards, negative_rewards = map(_at_least_float32, (logp, rewards, negative_rewards))
    likelihood = logp[:, :-1]
    if repeats is not None:
        shape, dtype = (getattr(repeats, name, None) for name in ("shape", "dtype"))
        if shape != likelihood.shape or "bool" not in str(dtype):
            wanted = f"a boolean array of shape {tuple(likelihood.shape)}"
            raise ValueError(f"repeats: expected {wanted}, got {type(repeats).__name__}, shape {shape}, dtype {dtype}")
        likelihood = likelihood - 1e9 * repeats
    difficult = core.difficulty(logp[:, -1] + float(tol), likelihood, tau=tau)
    reliable = core.reliability(rewards[:, -1], rewards[:, :-1], negative_rewards, tau=tau, rho=rho, ties=ties)
    gate = core.gate_diagnostics(difficult, reliable, rewards[:, -1], rewards[:, :-1], tau=tau, ties=ties)
    advantages = core.group_advantages(rewards[:, :-1], eps=eps, correction=correction)
    return core.target_row_advantages(advantages, gate.admitted, lam=lam), gate


def shares(gate):
    """What a trainer logs of a batch: the mean of each of the gate's diagnostics, by name. Not inside of jax.jit."""
    return {f"adagrpo/{name}": sum(which.tolist()) / len(which) for name, which in gate._asdict().items()}


def _at_least_float32(x):
    if "float16" not in str(getattr(x, "dtype", "")):  # nor bfloat16
        return x
    return x.float() if hasattr(x, "float") else x.astype("float32")


def negative_rows(keys, *, k, m):
    """Rows (B, M) of the flat (B*(K+1)) batch to use as negatives: other groups' rollouts, never a ground truth.

    keys (B, B*K): uniform random numbers, the same on every process, plus `same_prompt`.
    """
    drawn = core.in_batch_negatives(keys, k=k, m=m)  # counts rollouts only
    return drawn + drawn // k  # one ground truth stands behind every k rollouts


def same_prompt(prompts, k):
    """B lists of B*K booleans: is a rollout one of this prompt, also of a copy of it elsewhere in the batch?

    Added to the random keys, it puts those rollouts last: they are negatives only where nothing else is left.
    """
    return [[one == other for other in prompts for _ in range(k)] for one in prompts]


def repeats_of_truth(responses, k):
    """B lists of K booleans: does a rollout hold the tokens of its group's truth? responses: those of all B*(K+1) rows.

    A response is a list of tokens, or a text. The truth is the last of each group.
    """
    if len(responses) % (k + 1):
        raise ValueError(f"responses: expected groups of k+1={k + 1} rows, got {len(responses)} rows")
    odd = [type(each).__name__ for each in responses if not isinstance(each, (str, list, tuple))]
    if odd or len({isinstance(each, str) for each in responses}) > 1:
        raise ValueError(f"responses: expected lists of tokens, or else texts, got {odd[0] if odd else 'both'}")
    groups = [[*map(tuple, responses[i : i + k + 1])] for i in range(0, len(responses), k + 1)]
    return [[response == truth for response in rollouts] for *rollouts, truth in groups]


if __name__ == "__main__":
    print(which_core())
