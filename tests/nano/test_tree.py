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
    beam_search,
    every_sequence,
    make_policy,
    plain_logp,
    plain_next,
    settings,
    state,
)

CATALOGUE = nano.Catalogue([(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 1, 0)])  # S = 7, L = 3
HISTORIES = torch.tensor([[-1, -1, 3], [0, 5, 2], [-1, 4, 4], [1, 0, 3]])
BATCH = nano.Prompts(HISTORIES, torch.tensor([3, 0, 5, 1]), torch.arange(4))
every_model = pytest.mark.parametrize(
    "family, attention",
    [(family, attention) for family in FAMILIES for attention in ("eager", "sdpa")
     if (family, attention) != ("gemma2", "sdpa")],  # which transformers refuses: it caps its logits
)
two_families = pytest.mark.parametrize("family", ["llama", "gpt2"])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def some_tokens(n=5, seed=2, words=CATALOGUE.S + 1):
    """(4, n, 3) of all words, the query among them: it can be sampled like any other."""
    return torch.randint(words, (len(HISTORIES), n, 3), generator=generator(seed))


def gradients(policy, value):
    policy.model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def forced(policy, histories, tokens):
    return nano.tree_decode(policy, nano.prefill(policy, histories), nano.teacher_forcing(tokens))[1]


def at_once(policy, histories, tokens):
    return nano.sequence_logp(policy, nano.prefill(policy, histories), tokens)


def plainly(policy, histories, tokens):
    return torch.stack([plain_logp(policy, h, t) for h, t in zip(histories, tokens, strict=True)])


def beams(policy, histories, width):
    return nano.tree_decode(policy, nano.prefill(policy, histories), nano.beam(width))


def samples(policy, histories, n, seed):
    points = torch.rand(policy.catalogue.L, len(histories), n, generator=generator(seed))
    return nano.tree_decode(policy, nano.prefill(policy, histories), nano.sample(points))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_asks_nothing_of_the_library_that_it_announces_to_remove(family):
    policy = make_policy(CATALOGUE, family, "eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beams(policy, HISTORIES, 3)


# -- likelihoods -------------------------------------------------------------------------------------------------------


@every_model
def test_log_probabilities_and_their_gradients_are_those_of_plain_forward_passes(family, attention):
    policy = make_policy(CATALOGUE, family, attention, seed=1, bos=attention == "eager")
    tokens = some_tokens(words=policy.model.config.vocab_size)
    weight = torch.randn(tokens.shape, generator=generator(3))
    plain = plainly(policy, HISTORIES, tokens)
    assert plain.std() > 0.3, "a model that says the same of everything would prove nothing"
    theirs = gradients(policy, (plain * weight).sum())
    for way in forced, at_once:
        tree = way(policy, HISTORIES, tokens)
        torch.testing.assert_close(tree, plain, rtol=1e-5, atol=1e-5)
        ours = gradients(policy, (tree * weight).sum())
        assert ours.keys() == theirs.keys()
        for name in theirs:
            scale = theirs[name].abs().max().item()
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5 * max(scale, 1e-2), msg=name)


@pytest.mark.parametrize("way", [forced, at_once])
def test_in_float64_the_two_ways_agree_to_the_last_digits(way):
    policy, tokens = make_policy(CATALOGUE, "gpt2", bos=True, dtype=torch.float64), some_tokens()
    tree, plain = way(policy, HISTORIES, tokens), plainly(policy, HISTORIES, tokens)
    torch.testing.assert_close(tree, plain, rtol=0, atol=1e-12)
    ours, theirs = gradients(policy, tree.square().sum()), gradients(policy, plain.square().sum())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-11)


@two_families
def test_run_with_the_truth_behind_it_a_prompt_is_the_same_and_the_truth_as_likely(family):
    policy = make_policy(CATALOGUE, family, bos=True)
    prompt = nano.prefill(policy, BATCH.history, BATCH.target)
    alone, truth = nano.prefill(policy, HISTORIES), CATALOGUE.tokens[BATCH.target].unsqueeze(1)
    torch.testing.assert_close(prompt.target_logp, nano.sequence_logp(policy, alone, truth)[:, 0], rtol=0, atol=5e-6)
    assert alone.target_logp is None
    torch.testing.assert_close(prompt.next_logp, alone.next_logp, rtol=0, atol=5e-6)
    assert torch.equal(prompt.mask, alone.mask)
    for (keys, values), (k, v) in zip(prompt.kv_cache, alone.kv_cache, strict=True):
        seen = alone.mask[:, None, :, None]
        torch.testing.assert_close(keys * seen, k * seen, rtol=0, atol=5e-6)
        torch.testing.assert_close(values * seen, v * seen, rtol=0, atol=5e-6)


def test_a_semantic_id_may_have_one_token_alone():
    catalogue = nano.Catalogue([(3,), (1,), (7,)])
    policy, histories = make_policy(catalogue, "llama", seed=1), torch.tensor([[-1, 2], [0, 1]])
    tokens = torch.tensor([[[0], [1], [2], [3]]]).expand(2, 4, 1)
    plain = plainly(policy, histories, tokens)
    for found in forced(policy, histories, tokens), at_once(policy, histories, tokens):
        torch.testing.assert_close(found, plain, rtol=0, atol=5e-6)
    truth = nano.prefill(policy, histories, torch.tensor([2, 0])).target_logp
    expected = torch.stack([plain[0, catalogue.tokens[2, 0]], plain[1, catalogue.tokens[0, 0]]])
    torch.testing.assert_close(truth, expected, rtol=0, atol=5e-6)


def test_a_mixture_of_experts_grows_the_same_tree():
    torch.manual_seed(0)
    config = GptOssConfig(**SIZES, vocab_size=CATALOGUE.S + 1, num_key_value_heads=1, head_dim=8, num_local_experts=4,
                          num_experts_per_tok=2, sliding_window=64, initializer_range=0.3, pad_token_id=None,
                          bos_token_id=None, eos_token_id=None)
    policy = nano.Policy(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), CATALOGUE, settings())
    tokens = some_tokens()
    torch.testing.assert_close(at_once(policy, HISTORIES, tokens), plainly(policy, HISTORIES, tokens),
                               rtol=1e-5, atol=1e-5)


def test_returned_tokens_are_the_given_ones():
    policy, tokens = make_policy(CATALOGUE), some_tokens()
    prompt = nano.prefill(policy, HISTORIES)
    assert torch.equal(nano.tree_decode(policy, prompt, nano.teacher_forcing(tokens))[0], tokens)


@two_families
def test_a_prompt_says_the_same_alone_and_beside_longer_ones(family):
    policy, tokens = make_policy(CATALOGUE, family), some_tokens(3)
    together = at_once(policy, HISTORIES, tokens)
    wider = torch.cat([torch.full((4, 2), -1), HISTORIES], 1)
    torch.testing.assert_close(at_once(policy, wider, tokens), together, rtol=0, atol=5e-6)
    assert nano.prefill(policy, wider).mask.shape == (4, 3 * 3 + 1), "nobody pays for padding that all rows have"
    for row, (history, own) in enumerate(zip(HISTORIES, tokens, strict=True)):
        alone = at_once(policy, history[history >= 0][None], own[None])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=5e-6)


@two_families
def test_neither_the_order_of_prompts_nor_of_branches_nor_their_number_matters(family):
    policy, tokens = make_policy(CATALOGUE, family), some_tokens(6)
    all_of_them = forced(policy, HISTORIES, tokens)
    rows, branches = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 1, 0, 4, 2, 3])
    for way in forced, at_once:
        shuffled = way(policy, HISTORIES[rows], tokens[rows][:, branches])
        torch.testing.assert_close(shuffled, all_of_them[rows][:, branches], rtol=0, atol=5e-6)
        halves = torch.cat([way(policy, HISTORIES[part], tokens[part]) for part in (slice(0, 1), slice(1, 4))])
        torch.testing.assert_close(halves, all_of_them, rtol=0, atol=5e-6)
        for branch in 0, 5:
            one = way(policy, HISTORIES, tokens[:, [branch]])
            torch.testing.assert_close(one[:, 0], all_of_them[:, branch], rtol=0, atol=5e-6)


def test_rows_of_a_prompt_are_the_prompts_of_these_rows():
    policy, tokens, rows = make_policy(CATALOGUE), some_tokens(6), torch.tensor([3, 1])
    part = nano.sequence_logp(policy, nano.prefill(policy, HISTORIES).rows(rows), tokens[rows])
    torch.testing.assert_close(part, at_once(policy, HISTORIES, tokens)[rows], rtol=0, atol=5e-6)


def test_only_the_items_and_their_order_decide_what_a_prompt_says():
    policy = make_policy(CATALOGUE)
    logp = nano.prefill(policy, torch.tensor([[0, 5], [5, 0], [0, 5]])).next_logp
    torch.testing.assert_close(logp[0], logp[2], rtol=0, atol=5e-6)
    assert (logp[0] - logp[1]).abs().max() > 1e-3


def test_dropout_is_off_so_that_sampling_and_scoring_agree():
    policy = make_policy(CATALOGUE, "gpt2", embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)

    def said():
        return nano.prefill(policy, HISTORIES).next_logp

    assert torch.equal(said(), said())
    nano.train_sft(policy, BATCH, settings(sft_steps=1, sft_batch_size=2), lambda **row: None)
    assert torch.equal(said(), said())


# -- the prompt --------------------------------------------------------------------------------------------------------


def test_growing_leaves_the_prompt_as_it_was():
    policy = make_policy(CATALOGUE, "llama")
    prompt = nano.prefill(policy, HISTORIES)
    before = [(keys.clone(), values.clone()) for keys, values in prompt.kv_cache]
    first = nano.tree_decode(policy, prompt, nano.beam(9))
    nano.tree_decode(policy, prompt, nano.sample(torch.rand(3, 4, 5)))
    nano.sequence_logp(policy, prompt, some_tokens())
    second = nano.tree_decode(policy, prompt, nano.beam(9))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    for old, new in zip(before, prompt.kv_cache, strict=True):
        assert torch.equal(old[0], new[0]) and torch.equal(old[1], new[1])


def test_two_trees_on_one_prompt_add_their_gradients():
    policy, a, b = make_policy(CATALOGUE, "llama", dtype=torch.float64), some_tokens(2), some_tokens(3, seed=4)
    prompt = nano.prefill(policy, HISTORIES)
    both = sum(nano.tree_decode(policy, prompt, nano.teacher_forcing(tokens))[1].sum() for tokens in (a, b))
    ours = gradients(policy, both)
    plain = gradients(policy, at_once(policy, HISTORIES, torch.cat([a, b], 1)).sum())
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-5, atol=1e-5)


# -- beam search -------------------------------------------------------------------------------------------------------


@every_model
@torch.no_grad()
def test_beams_are_those_of_textbook_beam_search(family, attention):
    policy = make_policy(CATALOGUE, family, attention, seed=4, bos=attention == "eager")
    tokens, logp = beams(policy, HISTORIES, 6)
    for row, history in enumerate(HISTORIES):
        expected = beam_search(policy, history, 6)
        assert [tuple(beam) for beam in tokens[row].tolist()] == [beam for beam, _ in expected]
        torch.testing.assert_close(logp[row].sum(-1).tolist(), [total for _, total in expected], rtol=0, atol=1e-5)


@torch.no_grad()
def test_beams_as_wide_as_everything_list_everything_from_likely_to_unlikely_and_sum_to_one():
    policy = make_policy(CATALOGUE, "qwen3", seed=5)
    everything = every_sequence(CATALOGUE, special=1)
    tokens, logp = beams(policy, HISTORIES, len(everything) + 10)
    total = logp.sum(-1)
    assert tokens.shape == (4, len(everything), 3)
    torch.testing.assert_close(total.exp().sum(1), torch.ones(4), rtol=0, atol=1e-5)
    assert (total.diff(dim=1) <= 0).all()
    for row, history in enumerate(HISTORIES):
        assert {tuple(beam) for beam in tokens[row].tolist()} == {tuple(each) for each in everything.tolist()}
        torch.testing.assert_close(logp[row], plain_logp(policy, history, tokens[row]), rtol=0, atol=1e-5)


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

PAIRS = nano.Catalogue([(0, 0), (0, 1), (1, 1), (2, 0)])  # S = 5, L = 2; with the query token 36 sequences


def chi_square(counts, expected):
    """In standard deviations above its mean; cells in which fewer than five are expected are put together."""
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None].clamp(min=1e-9)])
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / (2 * freedom) ** 0.5


@pytest.fixture(scope="module")
def pairs():
    """A policy, a history, and how likely each of the 36 sequences is after it."""
    policy, history = make_policy(PAIRS, "llama", seed=7), torch.tensor([2, 0])
    with torch.no_grad():
        return policy, history, plain_logp(policy, history, every_sequence(PAIRS, special=1)).sum(-1).exp()


@torch.no_grad()
def test_samples_come_as_often_as_their_probability_says_the_special_words_too(pairs):
    policy, history, p = pairs
    tokens, logp = samples(policy, history.expand(250, 2), 80, seed=0)
    assert p.max() < 0.5 and (p * 20_000 >= 5).sum() >= 15, "a skewed distribution would prove little"
    counts = torch.bincount((tokens[..., 0] * 6 + tokens[..., 1]).flatten(), minlength=36).double()
    assert chi_square(counts, p * counts.sum()) < 5
    assert chi_square(counts, counts.sum() * torch.full((36,), 1 / 36)) > 50, "the test can tell distributions apart"
    torch.testing.assert_close(logp[0], plain_logp(policy, history, tokens[0]), rtol=0, atol=1e-5)
    special = (tokens == policy.query).any(-1)
    assert special.any() and (PAIRS.item(tokens)[special] == -1).all()


@torch.no_grad()
def test_samples_of_one_prompt_are_independent_of_each_other(pairs):
    policy, history, p = pairs
    tokens, _ = samples(policy, history.expand(20_000, 2), 2, seed=1)
    code = tokens[..., 0] * 6 + tokens[..., 1]
    counts = torch.bincount(code[:, 0] * 36 + code[:, 1], minlength=36**2).double()
    assert chi_square(counts, (p[:, None] * p).flatten() * len(code)) < 5


@torch.no_grad()
def test_samples_follow_from_the_points_alone_and_a_part_of_the_batch_samples_what_the_whole_would():
    policy, points = make_policy(CATALOGUE), torch.rand(3, 4, 8, generator=generator(3))

    def sampled(rows):
        prompt = nano.prefill(policy, HISTORIES[rows])
        return nano.tree_decode(policy, prompt, nano.sample(points[:, rows]))[0]

    whole = sampled(slice(0, 4))
    torch.manual_seed(99)
    assert torch.equal(whole, sampled(slice(0, 4)))
    assert torch.equal(whole, torch.cat([sampled(slice(0, 1)), sampled(slice(1, 4))]))
    points = 1 - points
    assert not torch.equal(whole, sampled(slice(0, 4)))


def test_a_token_without_probability_is_not_sampled_wherever_the_point_lies():
    points = torch.tensor([0.0, 1e-30, 0.5 - 2**-25, 0.5, 1 - 2**-24]).view(1, 1, 5)
    for size in 5, 40_000:  # rounding may keep the sum of so many from being 1
        logp = torch.full((1, 1, size), -torch.inf)
        logp[..., [1, size - 2]] = torch.log(torch.tensor(0.5))
        parent, token = nano.sample(points)(torch.zeros(1, 1, 0, dtype=torch.long), logp, torch.zeros(1, 1))
        assert token.tolist() == [[1, 1, 1, size - 2, size - 2]] and parent.tolist() == [[0] * 5]


# -- the tiny policy ---------------------------------------------------------------------------------------------------


def test_the_tiny_policy_reads_the_longest_history_and_is_decided_by_the_seed():
    c = settings(max_history=5)
    policy, history = nano.tiny_policy(CATALOGUE, c, width=8), torch.tensor([[0, 1, 2, 3, 4]])
    assert nano.prefill(policy, history).next_logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
    tokens, logp = beams(policy, history, 4)
    torch.testing.assert_close(logp[0], plain_logp(policy, history[0], tokens[0]), rtol=0, atol=1e-5)
    same, other = (state(nano.tiny_policy(CATALOGUE, settings(max_history=5, seed=seed), width=8)) for seed in (0, 1))
    assert all(torch.equal(value, same[name]) for name, value in state(policy).items())
    assert not all(torch.equal(value, other[name]) for name, value in same.items())
