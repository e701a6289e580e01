# SPDX-License-Identifier: MIT
"""Evaluation: the arithmetic of the tables, against a case worked by hand and a second, plain way to compute it."""

import dataclasses
import math

import pytest
import torch

import nanoadagrpo as nano

from .helpers import settings

# Items 0, 1, 2 and 3; the tokens (a, d) and (b, d) name none, and of wrong levels there are more.
CATALOGUE = nano.Catalogue([(0, 0), (0, 1), (1, 0), (2, 1)])
A, B, C, D, E = range(5)  # a, b, c are codes of the first level, d and e of the second
ITEM = {0: (A, D), 1: (A, E), 2: (B, D), 3: (C, E)}
NOTHING = [(B, E), (C, D), (D, D), (A, A)]


class Judge:
    """A ranker whose opinion of an item is the same everywhere."""

    CLICK, ORDER = torch.tensor([0.1, 0.4, 0.2, 0.8]), torch.tensor([0.9, 0.3, 0.5, 0.6])

    def probabilities(self, history, item):
        known = item >= 0
        return {"click": self.CLICK[item] * known, "order": self.ORDER[item] * known}


class Parrot:
    """A policy that says what it was told to."""

    catalogue, constraint = CATALOGUE, None


@pytest.fixture
def say(monkeypatch):
    """say(beams, samples): the next evaluation sees these."""

    def prepare(beams, samples, logp=0.0):
        monkeypatch.setattr(nano, "prefill", lambda policy, history: history[:, 0])
        monkeypatch.setattr(nano, "beam", lambda width: torch.tensor(beams))
        monkeypatch.setattr(nano, "sample", lambda points: torch.tensor(samples))
        monkeypatch.setattr(nano, "tree_decode", lambda policy, rows, tokens: (
            tokens[rows], torch.full(tokens[rows].shape, logp)))

    return prepare


def evaluate(targets, **changes):
    prompts = nano.Prompts(torch.arange(len(targets))[:, None], torch.tensor(targets), torch.arange(len(targets)))
    return nano.evaluate(Parrot(), Judge(), prompts, settings(**changes))


def test_a_case_worked_by_hand(say):
    beams = [
        [ITEM[3], ITEM[0], ITEM[1], ITEM[2]],  # the truth, item 3, comes first
        [NOTHING[0], NOTHING[2], ITEM[1], ITEM[2]],  # two that are nothing come first; item 2 is the second that is
        [NOTHING[0], NOTHING[1], NOTHING[2], NOTHING[3]],  # nothing at all
        [ITEM[0], NOTHING[0], ITEM[1], ITEM[2]],  # items, but not the truth
    ]
    samples = [[ITEM[0]] * 8, [ITEM[0]] * 6 + [NOTHING[1]] * 2, [NOTHING[3]] * 8, [ITEM[1]] * 4 + [NOTHING[2]] * 4]
    say(beams, samples)
    mean, each = evaluate([3, 2, 0, 3])

    assert each["rank"].tolist() == [1, 2, 10**9, 10**9]
    assert each["item"].tolist() == [[3, 0, 1, 2], [-1, -1, 1, 2], [-1] * 4, [0, -1, 1, 2]]
    assert each["hr@1"].tolist() == [1, 0, 0, 0]
    assert each["hr@10"].tolist() == each["hr@50"].tolist() == [1, 1, 0, 0]
    assert each["ndcg@10"].tolist() == pytest.approx([1, 1 / math.log2(3), 0, 0])
    # At 1 the first valid beam alone: items 3, 1, none, 0. At 10 the best of all: 3, 1 or 2, none, 0 to 2.
    assert each["click_reward@1"].tolist() == pytest.approx([0.8, 0.4, 0, 0.1])
    assert each["click_reward@10"].tolist() == each["click_reward@50"].tolist() == pytest.approx([0.8, 0.4, 0, 0.4])
    assert each["order_reward@1"].tolist() == pytest.approx([0.6, 0.3, 0, 0.9])
    assert each["order_reward@10"].tolist() == pytest.approx([0.9, 0.5, 0, 0.9])
    assert each["hallucination"].tolist() == [0, 0.5, 1, 0.25]
    assert each["sampled_hallucination"].tolist() == [0, 0.25, 1, 0.5]

    assert mean.keys() == each.keys() - {"rank", "item", "logp"}
    for name, value in mean.items():
        assert value == pytest.approx(each[name].float().mean().item()), name
    assert mean["hr@1"] == 0.25 and mean["hr@10"] == 0.5


def test_ranks_beyond_ten_count_for_hr_at_50_alone(say):
    # Eleven times the wrong item, then the right one: place 12 among the valid beams, 15 among all.
    row = [NOTHING[0]] * 3 + [ITEM[0]] * 11 + [ITEM[3]] + [ITEM[1]]
    say([row], [[ITEM[0]] * 8])
    mean, each = evaluate([3])
    assert each["rank"].tolist() == [12]
    assert (mean["hr@1"], mean["hr@10"], mean["hr@50"], mean["ndcg@10"]) == (0, 0, 1, 0)
    assert mean["click_reward@10"] == pytest.approx(0.1) and mean["click_reward@50"] == pytest.approx(0.8)


@pytest.mark.parametrize("ahead, within", [(9, 1), (10, 0)])
def test_the_tenth_place_is_within_ten_and_the_eleventh_is_not(say, ahead, within):
    say([[ITEM[0]] * ahead + [NOTHING[0], ITEM[3]]], [[ITEM[0]] * 8])
    mean, _ = evaluate([3])
    assert mean["hr@10"] == within and mean["hr@50"] == 1
    assert mean["ndcg@10"] == pytest.approx(within / math.log2(1 + ahead + 1))
    assert mean["click_reward@10"] == pytest.approx(0.8 if within else 0.1)


def test_the_truth_found_twice_counts_where_it_stands_first(say):
    say([[ITEM[0], ITEM[3], ITEM[1], ITEM[3]]], [[ITEM[0]] * 8])
    assert evaluate([3])[1]["rank"].tolist() == [2]


def test_without_an_order_head_there_is_no_order_reward(say, monkeypatch):
    monkeypatch.setattr(Judge, "probabilities", lambda self, history, item: {"click": self.CLICK[item] * (item >= 0)})
    say([[ITEM[0], ITEM[3], ITEM[1], ITEM[3]]], [[ITEM[0]] * 8])
    assert {name for name in evaluate([3])[0] if "reward" in name} == {f"click_reward@{k}" for k in (1, 10, 50)}


@pytest.mark.parametrize("width, cutoffs", [(9, [1]), (10, [1, 10]), (49, [1, 10]), (50, [1, 10, 50])])
def test_what_more_beams_would_have_to_say_is_left_out(say, width, cutoffs):
    # HR@50 of ten beams would be HR@10 under another name.
    say([[ITEM[0]] * width], [[ITEM[0]] * 8])
    names = {f"{name}@{k}" for name in ("hr", "click_reward", "order_reward") for k in cutoffs}
    expected = names | {"hallucination", "sampled_hallucination"} | ({"ndcg@10"} if 10 in cutoffs else set())
    assert evaluate([3], beam_width=width)[0].keys() == expected


@pytest.mark.parametrize("logp", [float("nan"), float("-inf")])
def test_a_policy_whose_log_probabilities_are_not_finite_is_not_evaluated(say, logp):
    say([[ITEM[0]] * 50], [[ITEM[0]] * 8], logp)
    with pytest.raises(nano.UserError, match=r"^evaluation: .*not finite"):
        evaluate([3])


# -- a real policy -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(shop, base):
    return base, nano.subset(shop.test, 23, 0, "some"), settings(beam_width=12)


def test_metrics_of_a_real_policy_are_those_of_its_beams_counted_one_by_one(scene, shop, ranker):
    policy, prompts, cfg = scene
    mean, each = nano.evaluate(policy, ranker, prompts, cfg)
    beams, _ = nano.tree_decode(policy, nano.prefill(policy, prompts.history), nano.beam(12))
    names = {tuple(tokens): item for item, tokens in enumerate(shop.catalogue.tokens.tolist())}
    hits, gains, clicks, invalid = [], [], [], []
    for history, target, row in zip(prompts.history, prompts.target.tolist(), beams.tolist(), strict=True):
        valid = [names[tuple(tokens)] for tokens in row if tuple(tokens) in names]
        place = valid.index(target) + 1 if target in valid else None
        hits.append(place is not None and place <= 10)
        gains.append(1 / math.log2(1 + place) if hits[-1] else 0)
        p = ranker.probabilities(history[None], torch.tensor([valid[:10]], dtype=torch.long))["click"]
        clicks.append(p.max().item() if valid else 0)
        invalid.append(1 - len(valid) / len(row))
    assert sum(invalid) > 0 and 0 < sum(hits) < len(hits), "the case has something of everything"
    assert each["hr@10"].tolist() == hits
    assert mean["ndcg@10"] == pytest.approx(sum(gains) / 23, abs=1e-6)
    assert mean["click_reward@10"] == pytest.approx(sum(clicks) / 23, abs=1e-5)
    assert mean["hallucination"] == pytest.approx(sum(invalid) / 23, abs=1e-6)


def test_prompts_may_be_evaluated_in_any_number_of_parts(scene, ranker):
    policy, prompts, cfg = scene
    whole, whole_each = nano.evaluate(policy, ranker, prompts, cfg)
    parts, parts_each = nano.evaluate(policy, ranker, prompts, dataclasses.replace(cfg, eval_batch_size=4))
    assert torch.equal(whole_each["item"], parts_each["item"])
    for name in whole:
        assert whole[name] == pytest.approx(parts[name], abs=1e-6)


def test_evaluation_repeats_itself_and_changes_nothing(scene, ranker):
    policy, prompts, cfg = scene
    before = [p.clone() for p in policy.model.parameters()]
    torch.manual_seed(5)
    dice = torch.random.get_rng_state()
    assert nano.evaluate(policy, ranker, prompts, cfg)[0] == nano.evaluate(policy, ranker, prompts, cfg)[0]
    assert torch.equal(dice, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
