# SPDX-License-Identifier: MIT
"""What trl_adagrpo.py refuses, each in one line: settings, models, data and rewards that would not give AdaGRPO."""

import re
from operator import index

import torch

NEEDED = {"loss_type": "grpo", "beta": 0.0, "temperature": 1.0, "num_iterations": 1, "entropy_coef": 0.0,
          "use_adaptive_entropy": False, "top_entropy_quantile": 1.0, "mask_truncated_completions": False,
          "off_policy_mask_threshold": None, "disable_dropout": True, "neftune_noise_alpha": None,
          "scale_rewards": "group", "multi_objective_aggregation": "sum_then_normalize"}  # fmt: skip


def check_settings(args, negatives):
    needed = NEEDED | {"steps_per_generation": args.gradient_accumulation_steps}
    for name, value in needed.items():
        if getattr(args, name) != value:
            raise ValueError(f"{name}: expected {value!r}, got {getattr(args, name)!r}; see docs/vendoring.md")
    if args.delta is not None and not args.delta > 1:  # at ratio 1 the bound would be the loss, and has no gradient
        raise ValueError(f"delta: expected None, or more than 1, got {args.delta!r}; the truth would not be learnt")
    if type(negatives) is not int or not 1 <= negatives <= args.num_generations:
        raise ValueError(f"negatives: expected 1 to num_generations={args.num_generations}, got {negatives!r}")


def check_model(model):
    """Refuse what makes two passes in training differ: D would compare likelihoods of different noise.

    disable_dropout sets modules of the class nn.Dropout to 0. Attention, among others, keeps a number of its own, or
    reads the config's at each pass.
    """
    for name, module in model.named_modules():
        kind, config = type(module).__name__, getattr(module, "config", None)
        noise = {key: value for key, value in vars(module).items() if re.search("drop|jitter", f"{kind} {key}", re.I)}
        for key in ("attention_dropout", "hidden_dropout", "dropout"):
            noise[f"config.{key}"] = getattr(config, key, 0)
        for key, value in noise.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0:
                raise ValueError(f"{key} of {name or kind}: expected 0, got {value}; set it to 0 in the model's config")


def target_ids(examples, eos, pad, words):
    """The ground truths as lists of ints. eos: ids by which a rollout ends; words: size of the vocabulary."""
    targets = []
    for example in examples:
        if "target_ids" not in example:
            raise ValueError("target_ids: expected this column in the dataset (remove_unused_columns drops it)")
        given = example["target_ids"]
        try:
            ids = [-1 if isinstance(token, bool) else index(token) for token in given]
        except TypeError:  # None, one number, a text, or such things in a list
            ids = []
        if not ids or not all(0 <= token < words for token in ids):
            raise ValueError(f"target_ids: expected a list of tokens from 0 to {words - 1}, got {given!r:.80}")
        if any(token in eos for token in ids[:-1]) or (ids[-1] == pad and pad not in eos):
            raise ValueError(f"target_ids: expected the tokens of a rollout, got some behind its end, {ids!r:.80}")
        targets.append(ids)
    return targets


def total_rewards(each, weights, names):
    """Weighted sums (B, P) of the rewards (B, P, functions) of a prompt's group and its negatives.

    A function that gives none of these a number (but None, which is NaN here) is not for this prompt, as in TRL. One
    that gives some a number has failed on the others: their sum is NaN, which shuts the gate. As 0, as TRL counts it,
    the failed one would be best of all where the rewards are negative.
    """
    weights = weights.to(each.device)
    absent = each.isnan().all(1, keepdim=True) | (weights == 0)  # (B, 1, functions)
    each = (each * weights).masked_fill(absent, 0.0)
    total = each.sum(-1).masked_fill(absent.all(-1), torch.nan)
    if each.isinf().any() or total.isinf().any():  # there is no advantage of it: the loss would be NaN
        infinite = [name for name, of_one in zip(names, each.unbind(-1), strict=True) if of_one.isinf().any()]
        raise ValueError(f"rewards of {', '.join(infinite or names)}: expected finite numbers or None, got infinity; "
                         "the floor of what is invalid is a number below all others")  # fmt: skip
    return total
