# SPDX-License-Identifier: MIT
"""The tree of tokens: scoring, sampling and beam search equal what plain forward passes over whole sequences say."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig

import nanoadagrpo as nano

from .helpers import (
    FAMILIES,
    SIZES,
    Exact,
    every_sequence,
    make_policy,
    plain_next,
    plain_prompt,
    plain_scores,
    settings,
    state,
)

CATALOGUE = nano.Catalogue([(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 1, 0)])  # S = 7, L = 3
HISTORIES = torch.tensor([[-1, -1, 3], [0, 5, 2], [-1, 4, 4], [1, 0, 3]])
every_model = pytest.mark.parametrize(
    "family, attention",
    [(family, attention) for family in FAMILIES for attention in ("eager", "sdpa")
     if (family, attention) != ("gemma2", "sdpa")],  # which transformers refuses: it caps its logits
)


def gradients(policy, value):
    policy.model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def score(policy, histories, tokens):
    return nano.score(policy, policy.read(histories), tokens)


def beams(policy, histories, width):
    return nano.grow(policy, policy.read(histories), nano.beam(width))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_asks_nothing_of_the_library_that_it_announces_to_remove(family):
    policy = make_policy(CATALOGUE, family, "eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beams(policy, HISTORIES, 3)


# -- scoring -----------------------------------------------------------------------------------------------------------


@every_model
def test_scores_and_their_gradients_are_those_of_plain_forward_passes(family, attention):
    policy = make_policy(CATALOGUE, family, attention, seed=1)
    tokens = torch.randint(CATALOGUE.S, (len(HISTORIES), 5, 3), generator=torch.Generator().manual_seed(2))
    weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))

    tree = score(policy, HISTORIES, tokens)
    plain = torch.stack([plain_scores(policy, h, t) for h, t in zip(HISTORIES, tokens, strict=True)])
    assert plain.std() > 0.3, "a model that says the same of everything would prove nothing"
    torch.testing.assert_close(tree, plain, rtol=1e-5, atol=1e-5)

    ours, theirs = gradients(policy, (tree * weight).sum()), gradients(policy, (plain * weight).sum())
    assert ours.keys() == theirs.keys()
    for name in theirs:
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5 * max(scale, 1e-2), msg=name)


def test_in_float64_the_two_ways_agree_to_the_last_digits():
    policy = make_policy(CATALOGUE, "gpt2", kind=Exact)
    tokens = torch.randint(CATALOGUE.S, (4, 5, 3), generator=torch.Generator().manual_seed(2))
    tree = score(policy, HISTORIES, tokens)
    plain = torch.stack([plain_scores(policy, h, t) for h, t in zip(HISTORIES, tokens, strict=True)])
    torch.testing.assert_close(tree, plain, rtol=0, atol=1e-12)
    ours, theirs = gradients(policy, tree.square().sum()), gradients(policy, plain.square().sum())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-11)


def test_all_levels_at_once_say_what_level_after_level_says():
    policy = make_policy(CATALOGUE, "llama")
    tokens = torch.randint(CATALOGUE.S, (4, 5, 3), generator=torch.Generator().manual_seed(2))
    grown = nano.grow(policy, policy.read(HISTORIES), nano.given(tokens))[1]
    torch.testing.assert_close(score(policy, HISTORIES, tokens), grown, rtol=0, atol=5e-6)
    ours, theirs = (gradients(policy, x.square().sum()) for x in (score(policy, HISTORIES, tokens), grown))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_read_with_the_truth_behind_it_a_prompt_is_the_same_and_the_truth_as_likely():
    policy = make_policy(CATALOGUE, "gpt2")
    batch = nano.Prompts(HISTORIES, torch.tensor([3, 0, 5, 1]), torch.arange(4))
    prompt, target_logp = nano.supervise(policy, batch)
    alone, truth = policy.read(HISTORIES), CATALOGUE.tokens[batch.target].unsqueeze(1)
    torch.testing.assert_close(target_logp, nano.score(policy, alone, truth)[:, 0], rtol=0, atol=5e-6)
    torch.testing.assert_close(prompt.logp, alone.logp, rtol=0, atol=5e-6)
    assert torch.equal(prompt.visible, alone.visible)
    for (keys, values), (k, v) in zip(prompt.cache, alone.cache, strict=True):
        seen = alone.visible[:, None, :, None]
        torch.testing.assert_close(keys * seen, k * seen, rtol=0, atol=5e-6)
        torch.testing.assert_close(values * seen, v * seen, rtol=0, atol=5e-6)


def rows_seen(layer):
    """How many positions each module of a layer is run on, in a list per name that grows with every pass."""
    seen = {}
    for name, part in layer.named_modules():
        part.register_forward_hook(lambda _, given, made, name=name: (
            seen.setdefault(name, []).append(given[0].shape[1]) if given else None), always_call=True)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_the_last_layer_does_nothing_for_tokens_of_a_prompt_that_nobody_asks_but_keys_and_values(family):
    policy = make_policy(CATALOGUE, family, "eager")
    layers = next(x for x in policy.model.base_model.modules() if isinstance(x, torch.nn.ModuleList))
    middle, last = rows_seen(layers[0]), rows_seen(layers[-1])
    ids = torch.randint(CATALOGUE.S, (2, 10))
    T = len(plain_prompt(policy, HISTORIES[1]))
    nano.supervise(policy, nano.Prompts(HISTORIES, torch.tensor([3, 0, 5, 1]), torch.arange(4)))
    policy.read(HISTORIES)
    policy.model(input_ids=ids, use_cache=False)
    assert middle["mlp"] == [T + 2, T, 10]
    assert last["mlp"] == [3, 1, 10], "all of it only where somebody calls the model itself"
    if family != "gpt2":  # whose queries, keys and values are one product
        assert last["self_attn.q_proj"] == last["self_attn.o_proj"] == [3, 1, 10]
        assert last["self_attn.k_proj"] == last["self_attn.v_proj"] == [T + 2, T, 10]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_last_layer_leaves_out_changes_no_probability_no_key_and_no_gradient(family, monkeypatch):
    policy = make_policy(CATALOGUE, family, "eager", seed=1)
    batch = nano.Prompts(HISTORIES, torch.tensor([3, 0, 5, 1]), torch.arange(4))
    tokens = torch.randint(CATALOGUE.S, (4, 5, 3), generator=torch.Generator().manual_seed(2))
    found = []
    for names in nano.LATE, ():
        monkeypatch.setattr(nano, "LATE", names)
        prompt, target_logp = nano.supervise(policy, batch)
        logp = nano.score(policy, prompt, tokens)
        cache = [x.detach() for pair in prompt.cache for x in pair]
        found.append((target_logp.detach(), logp.detach(), *cache,
                      gradients(policy, logp.square().sum() + target_logp.square().sum())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_mixture_of_experts_is_asked_for_the_same_tokens_only():
    torch.manual_seed(0)
    config = GptOssConfig(**SIZES, vocab_size=CATALOGUE.S + 1, num_key_value_heads=1, head_dim=8, num_local_experts=4,
                          num_experts_per_tok=2, sliding_window=64, initializer_range=0.3, pad_token_id=None)
    policy = nano.Policy(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), CATALOGUE, settings())
    tokens = torch.randint(CATALOGUE.S, (4, 5, 3), generator=torch.Generator().manual_seed(2))
    plain = torch.stack([plain_scores(policy, h, t) for h, t in zip(HISTORIES, tokens, strict=True)])
    torch.testing.assert_close(score(policy, HISTORIES, tokens), plain, rtol=1e-5, atol=1e-5)


def test_returned_tokens_are_the_given_ones():
    policy = make_policy(CATALOGUE)
    tokens = torch.randint(CATALOGUE.S, (4, 5, 3))
    assert torch.equal(nano.grow(policy, policy.read(HISTORIES), nano.given(tokens))[0], tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_scores_the_same_alone_and_beside_longer_ones(family):
    policy = make_policy(CATALOGUE, family)
    tokens = torch.randint(CATALOGUE.S, (4, 3, 3), generator=torch.Generator().manual_seed(0))
    together = score(policy, HISTORIES, tokens)
    wider = score(policy, torch.cat([torch.full((4, 2), -1), HISTORIES], 1), tokens)
    torch.testing.assert_close(wider, together, rtol=0, atol=5e-6)
    for row, (history, own) in enumerate(zip(HISTORIES, tokens, strict=True)):
        alone = score(policy, history[history >= 0][None], own[None])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neither_the_order_of_prompts_nor_of_branches_nor_their_number_matters(family):
    policy = make_policy(CATALOGUE, family)
    tokens = torch.randint(CATALOGUE.S, (4, 6, 3), generator=torch.Generator().manual_seed(0))
    all_of_them = score(policy, HISTORIES, tokens)
    rows, branches = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 1, 0, 4, 2, 3])
    shuffled = score(policy, HISTORIES[rows], tokens[rows][:, branches])
    torch.testing.assert_close(shuffled, all_of_them[rows][:, branches], rtol=0, atol=5e-6)
    halves = torch.cat([score(policy, HISTORIES[part], tokens[part]) for part in (slice(0, 1), slice(1, 4))])
    torch.testing.assert_close(halves, all_of_them, rtol=0, atol=5e-6)
    for branch in range(6):
        one = score(policy, HISTORIES, tokens[:, [branch]])
        torch.testing.assert_close(one[:, 0], all_of_them[:, branch], rtol=0, atol=5e-6)


def test_rows_of_a_prompt_are_the_prompts_of_these_rows():
    policy = make_policy(CATALOGUE)
    tokens = torch.randint(CATALOGUE.S, (4, 6, 3), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([3, 1])
    part = nano.grow(policy, policy.read(HISTORIES).rows(rows), nano.given(tokens[rows]))[1]
    torch.testing.assert_close(part, score(policy, HISTORIES, tokens)[rows], rtol=0, atol=5e-6)


def test_only_the_items_and_their_order_decide_what_a_prompt_says():
    policy = make_policy(CATALOGUE)
    logp = policy.read(torch.tensor([[0, 5], [5, 0], [0, 5]])).logp
    torch.testing.assert_close(logp[0], logp[2], rtol=0, atol=5e-6)
    assert (logp[0] - logp[1]).abs().max() > 1e-3


def test_dropout_is_off_so_that_sampling_and_scoring_agree():
    policy = make_policy(CATALOGUE, "gpt2", embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    assert torch.equal(policy.read(HISTORIES).logp, policy.read(HISTORIES).logp)
    cfg = nano.Settings(device="cpu", sft_steps=1, sft_batch_size=2)
    prompts = nano.Prompts(HISTORIES, torch.arange(4), torch.arange(4))
    nano.train_sft(policy, prompts, cfg, lambda **row: None)
    assert torch.equal(policy.read(HISTORIES).logp, policy.read(HISTORIES).logp)


# -- the prompt --------------------------------------------------------------------------------------------------------


def test_growing_leaves_the_prompt_as_it_was():
    policy = make_policy(CATALOGUE, "llama")
    prompt = policy.read(HISTORIES)
    before = [(keys.clone(), values.clone()) for keys, values in prompt.cache]
    first = nano.grow(policy, prompt, nano.beam(9))
    nano.grow(policy, prompt, nano.sample(5, torch.Generator().manual_seed(0)))
    second = nano.grow(policy, prompt, nano.beam(9))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    for old, new in zip(before, prompt.cache, strict=True):
        assert torch.equal(old[0], new[0]) and torch.equal(old[1], new[1])


def test_two_trees_on_one_prompt_add_their_gradients():
    policy = make_policy(CATALOGUE, "llama")
    a, b = (torch.randint(CATALOGUE.S, (4, n, 3), generator=torch.Generator().manual_seed(n)) for n in (2, 3))
    prompt = policy.read(HISTORIES)
    both = sum(nano.grow(policy, prompt, nano.given(tokens))[1].sum() for tokens in (a, b))
    ours = gradients(policy, both)
    plain = gradients(policy, score(policy, HISTORIES, torch.cat([a, b], 1)).sum())
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_large_layers_are_added_up_to_what_they_are_elsewhere(family, monkeypatch):
    batch = nano.Prompts(HISTORIES, torch.tensor([3, 0, 5, 1]), torch.arange(4))
    tokens = torch.randint(CATALOGUE.S, (2, 4, 5, 3), generator=torch.Generator().manual_seed(2))
    found = []
    for least in 1, 10**9:
        monkeypatch.setattr(nano, "LARGE", least)
        policy = make_policy(CATALOGUE, family, "eager", seed=1)
        large = sum(type(layer) is nano.LargeLinear for layer in policy.model.modules())
        assert large == 0 if least > 1 else large >= 1
        policy.model.zero_grad()
        for part in tokens:  # two backward passes, each of prompts, a tree grown level by level, and one scored
            prompt, target_logp = nano.supervise(policy, batch)
            grown, scored = nano.grow(policy, prompt, nano.given(part))[1], nano.score(policy, prompt, part.flip(1))
            (grown.square().sum() + scored.sum() + target_logp.sum()).backward()
        found.append({name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None})
    ours, plain = found
    assert ours.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-5, atol=1e-5 * plain[name].abs().max().item())


def test_a_large_layer_that_is_frozen_gets_no_gradient_and_passes_it_on():
    layer = torch.nn.Linear(4, 3)
    layer.__class__ = nano.LargeLinear
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 5, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 5, 4))
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), 10.0))


def test_products_in_bfloat16_stay_autograds(monkeypatch):
    monkeypatch.setattr(nano, "LARGE", 1)
    model = make_policy(CATALOGUE, "llama").model
    for layer in model.modules():
        layer.__class__ = torch.nn.Linear if type(layer) is nano.LargeLinear else type(layer)
    nano.Policy(model, CATALOGUE, settings(dtype="bfloat16"))
    assert not any(type(layer) is nano.LargeLinear for layer in model.modules())


# -- beam search -------------------------------------------------------------------------------------------------------


def beam_search(policy, history, width):
    """The textbook's: extend every beam by every token, sort, keep `width`."""
    kept = [((), 0.0)]
    for _ in range(policy.catalogue.L):
        prefixes = torch.tensor([tokens for tokens, _ in kept], dtype=torch.long).reshape(len(kept), -1)
        following = plain_next(policy, history, prefixes).tolist()
        longer = [((*tokens, token), total + logp)
                  for (tokens, total), row in zip(kept, following, strict=True) for token, logp in enumerate(row)]
        kept = sorted(longer, key=lambda beam: -beam[1])[:width]
    return kept


@every_model
@torch.no_grad()
def test_beams_are_those_of_textbook_beam_search(family, attention):
    policy = make_policy(CATALOGUE, family, attention, seed=4)
    tokens, logp = beams(policy, HISTORIES, 6)
    for row, history in enumerate(HISTORIES):
        expected = beam_search(policy, history, 6)
        assert [tuple(beam) for beam in tokens[row].tolist()] == [beam for beam, _ in expected]
        torch.testing.assert_close(logp[row].sum(-1).tolist(), [total for _, total in expected], rtol=0, atol=1e-5)


@torch.no_grad()
def test_beams_as_wide_as_everything_list_everything_from_likely_to_unlikely_and_sum_to_one():
    policy = make_policy(CATALOGUE, "qwen3", seed=5)
    everything = every_sequence(CATALOGUE)
    tokens, logp = beams(policy, HISTORIES, len(everything) + 10)
    total = logp.sum(-1)
    assert tokens.shape == (4, len(everything), 3)
    torch.testing.assert_close(total.exp().sum(1), torch.ones(4), rtol=0, atol=1e-5)
    assert (total.diff(dim=1) <= 0).all()
    for row, history in enumerate(HISTORIES):
        assert {tuple(beam) for beam in tokens[row].tolist()} == {tuple(each) for each in everything.tolist()}
        torch.testing.assert_close(logp[row], plain_scores(policy, history, tokens[row]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_beams_of_width_one_take_the_likeliest_token_each_time():
    policy = make_policy(CATALOGUE, "gpt2", seed=6)
    tokens, _ = beams(policy, HISTORIES, 1)
    for row, history in enumerate(HISTORIES):
        said = []
        for _ in range(3):
            prefix = torch.tensor([said], dtype=torch.long)
            said.append(plain_next(policy, history, prefix).argmax().item())
        assert tokens[row, 0].tolist() == said


# -- sampling ----------------------------------------------------------------------------------------------------------

PAIRS = nano.Catalogue([(0, 0), (0, 1), (1, 1), (2, 0)])  # S = 5, L = 2: 25 sequences


def chi_square(counts, expected):
    """In standard deviations above its mean; cells in which fewer than five are expected are put together."""
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None].clamp(min=1e-9)])
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / (2 * freedom) ** 0.5


@torch.no_grad()
def test_samples_come_as_often_as_their_probability_says():
    policy = make_policy(PAIRS, "llama", seed=7)
    history = torch.tensor([[2, 0]])
    tokens, logp = nano.grow(policy, policy.read(history.expand(250, 2)), nano.sample(80, generator(0)))
    p = plain_scores(policy, history[0], every_sequence(PAIRS)).sum(-1).exp()
    assert p.max() < 0.5 and (p * 20_000 >= 5).sum() >= 15, "a skewed distribution would prove little"
    counts = torch.bincount((tokens[..., 0] * 5 + tokens[..., 1]).flatten(), minlength=25).double()
    assert chi_square(counts, p * counts.sum()) < 5
    assert chi_square(counts, counts.sum() * torch.full((25,), 0.04)) > 50, "the test can tell distributions apart"
    torch.testing.assert_close(logp[0], plain_scores(policy, history[0], tokens[0]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_samples_of_one_prompt_are_independent_of_each_other():
    policy = make_policy(PAIRS, "llama", seed=7)
    history = torch.tensor([[2, 0]])
    tokens, _ = nano.grow(policy, policy.read(history.expand(20_000, 2)), nano.sample(2, generator(1)))
    p = plain_scores(policy, history[0], every_sequence(PAIRS)).sum(-1).exp()
    code = tokens[..., 0] * 5 + tokens[..., 1]
    counts = torch.bincount(code[:, 0] * 25 + code[:, 1], minlength=625).double()
    assert chi_square(counts, (p[:, None] * p).flatten() * len(code)) < 5


@torch.no_grad()
def test_samples_follow_from_the_generator_alone():
    policy = make_policy(CATALOGUE)
    prompt = policy.read(HISTORIES)
    first = nano.grow(policy, prompt, nano.sample(8, generator(3)))[0]
    torch.manual_seed(99)
    assert torch.equal(first, nano.grow(policy, prompt, nano.sample(8, generator(3)))[0])
    assert not torch.equal(first, nano.grow(policy, prompt, nano.sample(8, generator(4)))[0])


def generator(seed):
    return torch.Generator().manual_seed(seed)


# -- the tiny policy ---------------------------------------------------------------------------------------------------


def test_the_tiny_policy_reads_the_longest_history_and_is_decided_by_the_seed():
    cfg = nano.Settings(device="cpu", max_history=5)
    policy = nano.tiny_policy(CATALOGUE, cfg, width=8)
    history = torch.tensor([[0, 1, 2, 3, 4]])
    assert policy.read(history).logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
    tokens, logp = beams(policy, history, 4)
    torch.testing.assert_close(logp[0], plain_scores(policy, history[0], tokens[0]), rtol=0, atol=1e-5)
    same, other = (state(nano.tiny_policy(CATALOGUE, nano.Settings(device="cpu", max_history=5, seed=seed), width=8))
                   for seed in (0, 1))
    assert all(torch.equal(value, same[name]) for name, value in state(policy).items())
    assert not all(torch.equal(value, other[name]) for name, value in same.items())
