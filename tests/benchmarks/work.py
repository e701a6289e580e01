# SPDX-License-Identifier: MIT
"""The work that speed.py times: models, prompts and rewards, what peers do with them, and that both sides agree.

Both sides get the same model, the same prompts of exactly T tokens, the same reward. The model's vocabulary is V words,
all of them SID tokens but the query token, and the start token where prompts have one; the softmax of either side runs
over all of them. Every combination of three words is an item, so that rewards of a random model's rollouts vary.
Nothing here needs TRL but `trl_trainer`.
"""

import copy
import dataclasses
import math
from fractions import Fraction
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import adagrpo_core as core
import nanoadagrpo as nano

L, V = 3, 1000
DEVICE, BF16 = "cpu", False  # where all of it happens, and whether products are in bfloat16: speed.py says so
SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4),
    "smollm2": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, rope_theta=100000.0),  # SmolLM2-135M but for its vocabulary
    "0.6 B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                  num_key_value_heads=8, head_dim=128),  # Qwen3-0.6B's sizes in a Llama
    "1.7 B": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
                  num_key_value_heads=8, head_dim=128),  # Qwen3-1.7B's
    "smoke": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
}


class AnyCombination(nano.Catalogue):
    """Items as ever, but every combination of tokens is one of them: a random model would hit none."""

    def item(self, tokens):
        mixed = sum(tokens[..., level] * 31**level for level in range(self.L))  # a GPU has no product of integers
        return (super().item(tokens).clamp(max=0) + mixed) % self.N


def a_policy(shape="tiny", T=61, L=L, N=3000, words=V, seed=0, **config):
    """A policy for prompts of T tokens: whole items, the query token, and a start token if that is what is missing."""
    start = T % L == 2
    S = words - 1 - start
    N = max(N, S)
    generator = torch.Generator().manual_seed(seed)
    level = torch.tensor([S // L] * (L - 1) + [S - (L - 1) * (S // L)])
    sids = (torch.rand(N - S, L, generator=generator) * level).long()
    sids = torch.cat([(torch.arange(S).unsqueeze(1) % level), sids])  # every word is there
    catalogue = AnyCombination(list(dict.fromkeys(map(tuple, sids.tolist()))), DEVICE)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=words, max_position_embeddings=1024, tie_word_embeddings=True,
                         initializer_range=0.05, bos_token_id=S + 1 if start else None, eos_token_id=None,
                         pad_token_id=None, **{**SHAPES[shape], **config})
    with torch.device(DEVICE):
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    policy = nano.Policy(model, catalogue, nano.Settings(device=DEVICE))
    policy.bf16 = BF16
    return policy


def copied(policy):
    """The same policy on a model of its own, to train."""
    other = copy.copy(policy)
    vars(other).pop("trained", None)
    other.model = copy.deepcopy(policy.model)
    return other


def some_prompts(policy, n, T, seed=0):
    generator, N, H = torch.Generator().manual_seed(seed), policy.catalogue.N, T // policy.catalogue.L
    prompts = nano.Prompts(torch.randint(N, (n, H), generator=generator), torch.randint(N, (n,), generator=generator),
                           torch.arange(n))
    prompts = nano.Prompts(*(x.to(DEVICE) for x in prompts))
    assert prompt_ids(policy, prompts.history).shape == (n, T), f"whole items do not make a prompt of {T} tokens"
    return prompts


def prompt_ids(policy, history):
    """(B, H) histories without padding -> (B, T) ids, as the policy makes them."""
    ids = F.pad(policy.catalogue.tokens[history].flatten(1), (0, 1), value=policy.query)
    return ids if policy.start is None else F.pad(ids, (1, 0), value=policy.start)


def reward(history, item):
    """Something to optimise, cheap on both sides."""
    return torch.sin(item * 12.9898 + history[:, -1:]) + 1


def settings(B, K, **changes):
    return nano.Settings(**{"device": DEVICE, "batch_size": B, "group_size": K, "lam": 1.0, "lr": 1e-4, "grpo_lr": 1e-4,
                            "rl_steps": 10_000, **changes})


OWN = {}  # methods of the benchmarks alone: the script has them while one of its steps is run


def steps(policy, prompts, cfg, method="grpo"):
    """A generator of whole steps of the script: next() is rollout, reward, gate, loss, backward, AdamW, diagnostics.

    Each is a call of `train_rl` that goes on from the one before, as a resumed run does, but without a checkpoint.
    """
    supervised = (nano.METHODS | OWN)[method].supervised
    kept, saved = nano.Optimizer(policy.model, cfg.lr if supervised else cfg.grpo_lr, cfg.rl_steps * cfg.updates), {}
    for step in range(cfg.rl_steps):
        def begin(optimizer, generators, *_, step=step):
            optimizer.adamw, optimizer.schedule = kept.adamw, kept.schedule
            generators.update(saved)
            saved.update(generators)
            return step

        with mock.patch.dict(nano.METHODS, OWN):
            nano.train_rl(policy, reward, prompts, dataclasses.replace(cfg, rl_steps=step + 1), method,
                          lambda **row: None, begin)
        yield


def admitting(n):
    """A method that supervises everyone and admits the first n of each batch, after having asked the real gate."""
    def admit(difficult, reliable, batch, generator):
        core.sample_clip(difficult, reliable)
        return torch.arange(len(difficult), device=difficult.device) < n

    OWN[f"admits {n}"] = nano.Method(True, admit)
    return f"admits {n}"


# -- do both sides compute the same? -----------------------------------------------------------------------------------


def our_loss(policy, history, tokens, advantages):
    """Plain GRPO on these rollouts (B, K, L), on-policy, by the script's tree and the core."""
    logp = nano.sequence_logp(policy, nano.prefill(policy, history), tokens)
    return core.grpo_loss(logp, logp, advantages).mean()


def repeating_loss(policy, history, tokens, advantages):
    """The same the usual way: the prompt repeated for each rollout, one plain pass, the loss by hand."""
    ids = prompt_ids(policy, history).repeat_interleave(tokens.shape[1], 0)
    ids = torch.cat([ids, tokens.flatten(0, 1)], 1)
    logits = policy.model(input_ids=ids, use_cache=False, logits_to_keep=L + 1).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(-1, tokens.view(-1, L, 1))[..., 0]
    return -((logp - logp.detach()).exp().mean(1) * advantages.flatten()).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


def same(name, ours, theirs, tolerance):
    """Their relative difference, or a refusal to time what is not the same. In bfloat16 hardly a digit is."""
    tolerance = max(tolerance, 0.2) if BF16 else tolerance
    difference = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-30)
    if not difference <= tolerance:
        raise AssertionError(f"{name}: the two sides differ by {difference:.1e}, allowed are {tolerance:.0e}")
    return difference


def check_step(policy, history, K, seed=0):
    """Loss and gradients of the tree against repeating the prompt; {what: relative difference}."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(policy.catalogue.S, (len(history), K, L), generator=generator).to(DEVICE)
    advantages = core.group_advantages(reward(history, policy.catalogue.item(tokens)))
    losses = [f(policy, history, tokens, advantages) for f in (our_loss, repeating_loss)]
    # On-policy the loss is minus the mean advantage, which is 0: compare with what its terms are like.
    found = {"loss": same("loss", *(x.detach() + 1 for x in losses), 1e-6)}
    return found | {"gradient": same("gradient", *(gradients(policy.model, x) for x in losses), 2e-5)}


# -- beam search -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def our_beams(policy, history, width):
    select = nano.constrained(nano.beam(width), policy.constraint, distinct=True)
    return nano.tree_decode(policy, nano.prefill(policy, history), select)


def allowed_tokens(catalogue, T):
    """A `prefix_allowed_tokens_fn` for prompts of T tokens: a dictionary of the prefixes that exist, the usual way."""
    following = {}
    for sid in catalogue.tokens.tolist():
        for level, token in enumerate(sid):
            following.setdefault(tuple(sid[:level]), set()).add(token)
    following = {prefix: sorted(tokens) for prefix, tokens in following.items()}
    return lambda row, ids: following.get(tuple(ids[T:].tolist()), [0])  # [0]: of a beam that is no item


@torch.no_grad()
def their_beams(policy, history, width, allowed=None):
    """Hugging Face's generate: no length penalty to pay, no end of sequence that could come early."""
    ids = prompt_ids(policy, history)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=BF16):
        out = policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=width, num_return_sequences=width,
            max_new_tokens=L, min_new_tokens=L, do_sample=False, length_penalty=0.0, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True, prefix_allowed_tokens_fn=allowed)
    return out.sequences[:, -L:].view(len(history), width, L), out.sequences_scores.view(len(history), width)


def check_beams(policy, history, width, allowed=None):
    """The same beams in the same order; where two are as likely as each other to six digits, either order will do."""
    (ours, logp), (theirs, scores) = our_beams(policy, history, width), their_beams(policy, history, width, allowed)
    difference = same("scores of beams", logp.sum(-1), scores, 1e-5)
    equal = (ours == theirs).all(-1)
    if BF16:  # many are as likely as each other then
        return {"beams": difference, "in the same place": equal.float().mean().item()}
    for b, w in (~equal).nonzero().tolist():
        twins = (scores[b] - scores[b, w]).abs() < 2e-5 * scores[b, w].abs()
        if not (ours[b, w] == theirs[b, twins]).all(-1).any() and w < width - 1:
            raise AssertionError(f"beam {w} of prompt {b} is another")
    return {"beams": difference, "in the same place": equal.float().mean().item()}


def check_constrained(policy, history, n=50):
    """Samples of a policy with a constraint are items: without this, a constraint that is not read would be timed."""
    uniform = torch.rand(L, len(history), n, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        select = nano.constrained(nano.sample(uniform), policy.constraint)
        samples, _ = nano.tree_decode(policy, nano.prefill(policy, history), select)
    if (nano.Catalogue.item(policy.catalogue, samples) < 0).any():  # AnyCombination's own takes everything
        raise AssertionError("constrained: a sample is no item")


# -- the core's functions against torch by hand ------------------------------------------------------------------------


def core_case(B=64, K=32, M=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logp = torch.log(torch.rand(B, K, L, generator=generator) * 0.9 + 0.05)
    truth = torch.log(torch.rand(B, L, generator=generator) * 0.9 + 0.05)
    old = logp + 0.3 * torch.randn(logp.shape, generator=generator)
    rewards, target, negatives = (torch.rand(B, n, generator=generator) for n in (K, 1, M))
    target = target[:, 0] * 0.2 + 0.8  # often at the top, so that the gate lets some through
    return [x.requires_grad_() for x in (logp, truth)] + [old, rewards, target, negatives * 0.1]


def core_loss(logp, truth, old, rewards, target, negatives):
    nll = core.nll_loss(truth)
    hard = core.difficulty(-nll.detach(), core.length_normalized(old))
    clear = core.reliability(target, rewards, negatives)
    clip = core.sample_clip(hard, clear)
    grpo = core.grpo_loss(logp, old, core.group_advantages(rewards), clip=clip)
    return (nll + grpo).mean()


def hand_loss(logp, truth, old, rewards, target, negatives, tau=1 / 3, rho=0.1, epsilon=0.2):
    """What somebody would write who trusts the input: no checks, no NaN, no padding, no exact fractions.

    The fastest of three such versions: with `where` on ratio and surrogate, with the advantages of those not admitted
    set to 0 and min(w A, clip(w) A) as it stands, and this one, with that minimum as one choice, as the core has it.
    """
    K = rewards.shape[1]
    nll = -truth.mean(1)
    hard = 1 + (old.mean(2) > -nll.detach()[:, None]).sum(1) > tau * K
    judged = torch.cat([target[:, None], negatives], 1)
    ranks = 1 + (torch.cat([rewards, judged], 1)[:, None, :] > judged[:, :, None]).sum(2)
    clear = (ranks[:, 0] <= tau * K) & (ranks[:, 1:] > (1 - rho) * K).all(1)
    A = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    A = (A * (hard & clear)[:, None])[:, :, None]
    ratio = (logp - old).exp()
    limit = torch.where(A < 0, 1 - epsilon, 1 + epsilon)
    surrogate = torch.where((ratio - limit) * A > 0, limit, ratio) * A
    return (nll - surrogate.mean((1, 2))).mean()


def guarded_loss(logp, truth, old, rewards, target, negatives, tau=1 / 3, rho=0.1, epsilon=0.2):
    """The same by somebody who does not trust the input, in the same torch functions as above.

    A prompt with a NaN in a pool is not admitted; thresholds are exact fractions; equal rewards get advantages of
    exactly 0, and their spread neither overflows nor vanishes; the ratio is bounded before the exponential, so that far
    ratios, and -inf in both policies, give no NaN in value or gradient; prompts that are not admitted are not read.
    """
    K = rewards.shape[1]
    nll = -truth.mean(1)
    top, bottom = (Fraction(x).limit_denominator(1000) for x in (tau, rho))
    pool = torch.cat([old.mean(2), -nll.detach()[:, None]], 1)
    hard = 1 + (pool > pool[:, -1:]).sum(1) > top.numerator * K // top.denominator
    hard = hard & ~pool.isnan().any(1)
    judged = torch.cat([target[:, None], negatives], 1)
    pool = torch.cat([rewards, judged], 1)
    ranks = 1 + (pool[:, None, :] > judged[:, :, None]).sum(2)
    below = (bottom.denominator - bottom.numerator) * K // bottom.denominator
    clear = (ranks[:, 0] <= top.numerator * K // top.denominator) & (ranks[:, 1:] > below).all(1)
    admitted = (hard & clear & ~pool.isnan().any(1))[:, None, None]
    low, high = rewards.amin(1, keepdim=True), rewards.amax(1, keepdim=True)
    part = torch.where((high > 1) | (low < -1), 2.0**-10, 1.0)  # 3e38 less -3e38 would overflow
    low = low * part
    unit = high * part - low
    flat = unit == 0
    unit = torch.where(flat, 1.0, unit)
    A = (rewards * part - low) / unit
    A = A - A.mean(1, keepdim=True)
    A = A / torch.where(flat, 1.0, A.std(1, keepdim=True) + 1e-4 * part / unit)
    A = torch.where(admitted, A[:, :, None], 0.0)
    gap = torch.where(admitted, logp, 0.0) - torch.where(admitted, old, 0.0).clamp(min=torch.finfo(old.dtype).min)
    bad = A < 0
    limit = torch.where(bad, math.log(1 - epsilon), math.log(1 + epsilon))
    gap = torch.where(torch.where(bad, gap < limit, gap > limit), limit, gap)
    return (nll - (gap.exp() * A).mean((1, 2))).mean()


def check_core(case, hand=hand_loss):
    found = []
    for loss in (core_loss, hand):
        value = loss(*case)
        found.append((value.detach(), *torch.autograd.grad(value, case[:2])))
    return {name: same(name, *pair, 1e-5) for name, *pair in
            zip(("core: loss", "core: gradient of rollouts", "core: gradient of truth"), *found, strict=True)}


# -- TRL ---------------------------------------------------------------------------------------------------------------


def trl_trainer(policy, prompts, B, K, T, check=None, model=None, parts=1):
    """A GRPOTrainer that does the same on a copy of the policy's model, or on another, in the form that suits it best.

    Without gradient checkpointing, reference model or entropy bonus; old log-probabilities are not computed, since
    they are those of the step. TRL 1.16 runs the head over every position where there is no Triton, and keeps the
    entropy for its log: here over the completion's positions alone, and without the entropy.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    class Restricted(GRPOTrainer):
        noted = None

        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **_):
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False,
                           logits_to_keep=logits_to_keep + 1).logits[:, :-1]
            tokens = input_ids[:, -logits_to_keep:].unsqueeze(-1)
            logp = (logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True))[..., 0]
            return logp, torch.zeros_like(logp), None

        def training_step(self, model, inputs, num_items_in_batch):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if check and self.noted is None:
                self.noted = check(loss, self._buffered_inputs[0], model)
            return loss

    def rewards(prompts, completions, completion_ids, row, **columns):
        tokens, row = (torch.tensor(x, device=DEVICE) for x in (completion_ids, row))
        return reward(histories[row], policy.catalogue.item(tokens).unsqueeze(1))[:, 0].tolist()

    model = model or policy.model
    histories, size = prompts.history, model.config.vocab_size
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)} | {"<end>": size}, "<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The end of a sequence is a word beyond the model's vocabulary: every completion has L tokens.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="<end>")
    texts = [" ".join(f"w{i}" for i in ids) for ids in prompt_ids(policy, histories).tolist()]
    args = GRPOConfig(
        None, per_device_train_batch_size=B * K // parts, gradient_accumulation_steps=parts, num_generations=K,
        max_completion_length=L, loss_type="grpo", beta=0.0, learning_rate=1e-4, weight_decay=0.01, max_grad_norm=1.0,
        max_steps=10_000, lr_scheduler_type="linear", logging_steps=10**6, use_cpu=DEVICE == "cpu", report_to=[],
        save_strategy="no", bf16=BF16, disable_tqdm=True, gradient_checkpointing=False, shuffle_dataset=False,
        dataloader_num_workers=0, temperature=1.0)
    data = Dataset.from_list([{"prompt": text, "row": i} for i, text in enumerate(texts)])
    return Restricted(model=copy.deepcopy(model), reward_funcs=rewards, processing_class=tokenizer,
                      train_dataset=data, args=args)


def trl_agrees(policy, prompts, K):
    """For `check`: TRL's loss, advantages and gradient on its own rollouts are what ours are on these rollouts."""
    ids = [tuple(row) for row in prompt_ids(policy, prompts.history).tolist()]

    def check(loss, inputs, model):
        where = {}
        for i, row in enumerate(inputs["prompt_ids"].tolist()):
            where.setdefault(ids.index(tuple(row)), []).append(i)
        assert all(len(rows) == K for rows in where.values()) and inputs["completion_mask"].all()
        history, rows = prompts.history[list(where)], torch.tensor(list(where.values()))  # (B, K)
        rows = rows.to(DEVICE)
        tokens = inputs["completion_ids"][rows]
        advantages = core.group_advantages(reward(history, policy.catalogue.item(tokens)))
        found = {"advantages": same("advantages", advantages, inputs["advantages"][rows], 1e-4)}
        ours = our_loss(policy, history, tokens, advantages)
        theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
        found["loss"] = same("loss", ours.detach() + 1, loss + 1, 1e-6)
        return found | {"gradient": same("gradient", gradients(policy.model, ours), theirs, 5e-5)}

    return check
