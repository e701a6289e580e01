# SPDX-License-Identifier: MIT
"""--constrained: samples and beams are items, every item can be said, likelihoods are those of the free softmax."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import nanoadagrpo as nano

from .helpers import beam_search, every_sequence, make_policy, plain_logp, plain_next, settings
from .test_tree import PAIRS, chi_square

catalogues = st.integers(1, 4).flatmap(lambda levels: st.lists(
    st.tuples(*[st.integers(0, 3)] * levels), min_size=1, max_size=12, unique=True)).map(nano.Catalogue)
each_catalogue = examples(max_examples=15, deadline=None, derandomize=True)
HISTORY = torch.tensor([[-1, -1, 0], [0, 0, 0]])  # item 0 is in every catalogue


def names_of(catalogue):
    return {tuple(tokens): item for item, tokens in enumerate(catalogue.tokens.tolist())}


def allowed_by(catalogue):
    """What may follow a prefix, by a search through all names."""
    names = catalogue.tokens.tolist()
    return lambda prefix: sorted({name[len(prefix)] for name in names if name[: len(prefix)] == list(prefix)})


def small_policy(catalogue, seed=0, spread=0.5, **config):
    return make_policy(catalogue, "llama", seed=seed, spread=spread, **config)


def beam(width, catalogue):
    return nano.constrained(nano.beam(width), catalogue, distinct=True)


def sample(points, catalogue):
    return nano.constrained(nano.sample(points), catalogue)


def beams(policy, width, history=HISTORY):
    return nano.tree_decode(policy, nano.prefill(policy, history), beam(width, policy.catalogue))


def samples(policy, n, history=HISTORY, seed=0):
    points = torch.rand(policy.catalogue.L, len(history), n, generator=torch.Generator().manual_seed(seed))
    return nano.tree_decode(policy, nano.prefill(policy, history), sample(points, policy.catalogue))


def tokens_of(found):
    return [[tuple(one) for one in row] for row in found.tolist()]


# -- the catalogue's continuations -------------------------------------------------------------------------------------


@each_catalogue
@given(catalogues)
def test_continuations_are_those_of_a_search_through_all_names(catalogue):
    allowed = allowed_by(catalogue)
    for level in range(catalogue.L):
        prefixes = sorted({tuple(name[:level]) for name in catalogue.tokens.tolist()})
        words, valid = catalogue.continuations(torch.tensor([prefixes], dtype=torch.long).view(1, len(prefixes), level))
        assert words.shape == valid.shape and valid.any(-1).all()
        for prefix, row, there in zip(prefixes, words[0], valid[0], strict=True):
            assert row[there].tolist() == allowed(prefix)


# -- beams -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@each_catalogue
@given(catalogues, st.integers(0, 9), st.integers(1, 14))
def test_every_beam_is_an_item_no_item_twice_and_all_of_them_if_there_is_room(catalogue, seed, width):
    """With fewer continuations than beams there are fewer beams, at the end as many as items."""
    policy, names = small_policy(catalogue, seed), names_of(catalogue)
    found, logp = beams(policy, width)
    for row, scores in zip(tokens_of(found), logp.sum(-1), strict=True):
        assert len(row) == min(width, catalogue.N) and len(set(row)) == len(row) and set(row) <= names.keys()
        assert (scores.diff() <= 0).all()
    # whatever the width, the likelihoods are the free softmax's
    forced = nano.tree_decode(policy, nano.prefill(policy, HISTORY), nano.teacher_forcing(found))[1]
    torch.testing.assert_close(logp, forced, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@each_catalogue
@given(catalogues, st.integers(0, 9))
def test_beams_as_wide_as_the_catalogue_are_its_items_from_likely_to_unlikely(catalogue, seed):
    policy = small_policy(catalogue, seed)
    found, logp = beams(policy, catalogue.N)
    for history, row, scores in zip(HISTORY, tokens_of(found), logp, strict=True):
        free = plain_logp(policy, history, catalogue.tokens)
        total = dict(zip(names_of(catalogue), free.sum(-1).tolist(), strict=True))
        assert sorted(row) == sorted(total)
        assert [total[name] for name in row] == pytest.approx(sorted(total.values(), reverse=True), abs=1e-4)
        order = [names_of(catalogue)[name] for name in row]
        torch.testing.assert_close(scores, free[order], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_beams_are_those_of_textbook_search_among_what_is_allowed(width):
    catalogue = nano.Catalogue([(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 1, 0)])
    for seed in range(3):
        policy = small_policy(catalogue, seed)
        found, logp = beams(policy, width)
        for history, row, scores in zip(HISTORY, tokens_of(found), logp.sum(-1).tolist(), strict=True):
            expected = beam_search(policy, history[history >= 0], width, allowed_by(catalogue))
            assert row == [tokens for tokens, _ in expected]
            assert scores == pytest.approx([total for _, total in expected], abs=1e-4)


@torch.no_grad()
@each_catalogue
@given(catalogues, st.integers(0, 9), st.data())
def test_beams_are_those_of_generate_with_the_same_words_allowed(catalogue, seed, data):
    # Free likelihoods, added up and not normalised; as many beams as there are first words at most, because generate
    # fills up with what is not allowed.
    policy, allowed = small_policy(catalogue, seed), allowed_by(catalogue)
    width = data.draw(st.integers(1, len(catalogue.pairs[0])))
    prompt = torch.tensor([[*catalogue.tokens[0].tolist() * 2, policy.query]])
    T, search = prompt.shape[1], {} if width == 1 else dict(length_penalty=0.0)  # one beam is the greedy search
    out = policy.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=catalogue.L,
                                do_sample=False, num_beams=width, num_return_sequences=width, **search,
                                prefix_allowed_tokens_fn=lambda _, ids: allowed(ids[T:].tolist()),
                                return_dict_in_generate=True, output_scores=True)
    found, logp = beams(policy, width, torch.tensor([[0, 0]]))
    assert tokens_of(out.sequences[None, :, T:]) == tokens_of(found)
    if width > 1:
        torch.testing.assert_close(out.sequences_scores, logp[0].sum(-1), rtol=1e-5, atol=1e-5)


# -- samples -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@each_catalogue
@given(catalogues, st.integers(0, 9))
def test_every_sample_is_an_item_and_its_likelihood_that_of_the_free_softmax(catalogue, seed):
    policy, names = small_policy(catalogue, seed), names_of(catalogue)
    found, logp = samples(policy, 20, seed=seed)
    assert {name for row in tokens_of(found) for name in row} <= names.keys()
    forced = nano.tree_decode(policy, nano.prefill(policy, HISTORY), nano.teacher_forcing(found))[1]
    torch.testing.assert_close(logp, forced, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logp[0], plain_logp(policy, HISTORY[0], found[0]), rtol=1e-5, atol=1e-5)


def renormalised(policy, history):
    """How likely each item is (N,), if at each level only what leads to items shares the probability."""
    p, allowed = [], allowed_by(policy.catalogue)
    for name in policy.catalogue.tokens.tolist():
        p.append(0.0)
        for level, token in enumerate(name):
            logp = plain_next(policy, history, torch.tensor([name[:level]], dtype=torch.long))[0]
            p[-1] += (logp[token] - logp[allowed(name[:level])].logsumexp(0)).item()
    return torch.tensor(p, dtype=torch.float64).exp()


@torch.no_grad()
@pytest.mark.parametrize("catalogue", [PAIRS, nano.Catalogue([(0, 0, 0), (0, 0, 1), (0, 2, 0), (1, 0, 1), (3, 1, 1)])],
                         ids=["two levels", "three levels"])
def test_samples_come_as_often_as_the_probabilities_renormalised_level_by_level(catalogue):
    policy, history = small_policy(catalogue, seed=7, spread=0.3), torch.tensor([2, 0])
    p, free = renormalised(policy, history), plain_logp(policy, history, catalogue.tokens).sum(-1).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    assert free.sum() < 0.9 and p.max() < 0.9, "a policy that says items alone, or one alone, would prove little"
    found, _ = samples(policy, 80, history.expand(250, 2))
    counts = torch.bincount(catalogue.item(found).flatten(), minlength=catalogue.N).double()
    assert chi_square(counts, p * counts.sum()) < 5
    wrong = (free / free.sum()).double()  # normalised once, over whole items, is another distribution
    assert (wrong - p).abs().max() > 0.05 and chi_square(counts, wrong * counts.sum()) > 5


@pytest.mark.parametrize("depth", [200.0, 1e4, 1e30])
def test_words_so_unlikely_that_exp_is_zero_are_sampled_and_found_all_the_same(depth):
    # The policy would say only what is no item. Among the items the second is three times as likely as the first.
    catalogue = nano.Catalogue([(0,), (1,), (2,)])
    prefix, total = torch.zeros(1, 1, 0, dtype=torch.long), torch.zeros(1, 1)
    gap = math.log(3) if depth < 1e6 else 0.0  # which 1e30 swallows in float32
    logp = torch.tensor([[[-depth, gap - depth, -2 * depth, 0.0]]])
    assert logp.exp().sum() == 1
    points = torch.linspace(0, 1 - 2**-24, 1000).view(1, 1, -1)
    _, token = sample(points, catalogue)(prefix, logp, total)
    share = token.eq(1).float().mean().item()
    assert set(token[0].tolist()) == {0, 1} and share == pytest.approx(0.75 if gap else 0.5, abs=0.01)
    _, token = beam(5, catalogue)(prefix, logp, total)
    assert sorted(token[0].tolist()) == [0, 1, 2] and token[0, 2] == 2


@torch.no_grad()
def test_a_policy_that_never_says_an_item_says_one_nevertheless():
    catalogue = nano.Catalogue([(0, 0), (0, 1), (2, 1)])
    policy = small_policy(catalogue, tie_word_embeddings=False)
    policy.model.lm_head.weight.data[: catalogue.S] -= 1e4 * policy.model.lm_head.weight.data[policy.query].sign()
    policy.model.lm_head.weight.data[policy.query] *= 1e3
    hidden = policy.model.model.norm.weight
    hidden.data.fill_(1.0)
    for found, logp in (beams(policy, 3), samples(policy, 30)):
        assert logp.isfinite().all() and (catalogue.item(found) >= 0).all()
    assert sorted(catalogue.item(beams(policy, 3)[0])[0].tolist()) == [0, 1, 2]


def test_a_point_at_either_end_picks_what_is_there_and_never_the_filling():
    # A node with one continuation beside one with four: three places of its row are filling.
    catalogue = nano.Catalogue([(0, 0), (1, 0), (1, 1), (1, 2), (1, 3)])
    logp = torch.randn(1, 2, catalogue.S + 1, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    prefix = torch.tensor([[[0], [1]]])
    for point in 0.0, 0.5, 1 - 2**-24:
        points = torch.full((2, 1, 2), point)
        _, token = sample(points, catalogue)(prefix, logp, torch.zeros(1, 2))
        assert (catalogue.item(torch.cat([prefix, token[..., None]], -1)) >= 0).all()
    parent, token = beam(9, catalogue)(prefix, logp, torch.zeros(1, 2))
    items = catalogue.item(torch.cat([prefix[0, parent[0]], token[0, :, None]], -1))
    assert sorted(items.tolist()) == [0, 1, 2, 3, 4]


@torch.no_grad()
@pytest.mark.parametrize("levels", [1, 4])
def test_in_a_catalogue_of_one_item_nothing_else_is_said(levels):
    catalogue = nano.Catalogue([(5,) * levels])
    policy = small_policy(catalogue)
    for found, logp in (beams(policy, 12), samples(policy, 6)):
        assert (catalogue.item(found) == 0).all() and (logp < 0).all()
    assert beams(policy, 12)[0].shape == (2, 1, levels)


# -- without the flag --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_where_every_combination_is_an_item_beams_differ_from_free_ones_by_special_words_alone():
    catalogue = nano.Catalogue([(a, b) for a in range(3) for b in range(2)])
    policy = small_policy(catalogue)
    found, _ = beams(policy, 4)
    free, _ = nano.tree_decode(policy, nano.prefill(policy, HISTORY), nano.beam(len(every_sequence(catalogue, 1))))
    for row, everything in zip(found, free, strict=True):
        assert torch.equal(row, everything[catalogue.item(everything) >= 0][:4])


def test_the_flag_reaches_rollouts_and_evaluation_and_only_them(shop, ranker, base):
    cfg = settings(constrained=True, beam_width=12, group_size=9, batch_size=6, rl_steps=2)
    policy = nano.Policy(base.model, shop.catalogue, cfg)
    prompts = nano.subset(shop.test, 20, 0, "some")
    free, held = (nano.evaluate(x, ranker, prompts, cfg)[0] for x in (base, policy))
    assert held["hallucination"] == held["sampled_hallucination"] == 0
    assert free["hallucination"] > 0 and free["sampled_hallucination"] > 0
    batch, [part] = prompts.rows(slice(0, 6)), nano.local_micro_batches(6, 0)
    rollouts, logp, truth, _ = nano.rollout(policy, batch, [part], 9, torch.Generator().manual_seed(0))
    assert (shop.catalogue.item(rollouts) >= 0).all()
    with torch.no_grad():
        prompt = nano.prefill(base, batch.history, batch.target)
        torch.testing.assert_close(truth, prompt.target_logp)
        torch.testing.assert_close(logp, nano.sequence_logp(base, prompt, rollouts), rtol=1e-5, atol=1e-5)
