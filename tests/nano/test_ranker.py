# SPDX-License-Identifier: MIT
"""The ranker and the reward: one prompt, one item, one number, whatever else is in the group."""

import pytest
import torch
import torch.nn.functional as F

import nanoadagrpo as nano

from .helpers import SHOP, settings

FLOOR = -0.75


@pytest.fixture(scope="module")
def question(shop):
    """Prompts and candidates for them, of which some are no items."""
    draw = torch.Generator().manual_seed(0)
    item = torch.randint(-1, shop.catalogue.N, (12, 9), generator=draw)
    item[0, 4] = item[5, 0] = -1
    return shop.test.history[:12], item


@pytest.fixture(scope="module")
def reward(ranker):
    return nano.make_reward(ranker, settings(floor=FLOOR))


def test_what_is_no_item_gets_the_floor_and_every_item_more(question, reward):
    history, item = question
    scores = reward(history, item)
    assert scores.shape == item.shape
    assert (scores[item < 0] == FLOOR).all() and (item < 0).sum() >= 2
    assert (scores[item >= 0] >= 0).all() and (scores[item >= 0] <= 2).all()


def test_the_reward_is_p_click_plus_p_click_and_order(question, reward, ranker):
    history, item = question
    p = ranker.probabilities(history, item)
    assert set(p) == {"click", "order"}
    expected = torch.where(item >= 0, p["click"] + p["click"] * p["order"], FLOOR)
    torch.testing.assert_close(reward(history, item), expected, rtol=1e-6, atol=0)
    assert (p["click"][item < 0] == 0).all() and (p["order"][item < 0] == 0).all()
    for head in p.values():
        assert ((head[item >= 0] > 0) & (head[item >= 0] < 1)).all()


def test_the_reward_is_pointwise_the_rest_of_the_group_does_not_matter(question, reward):
    history, item = question
    scores = reward(history, item)
    shuffle = torch.randperm(item.shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(reward(history, item[:, shuffle]), scores[:, shuffle], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reward(history, item[:, 3:5]), scores[:, 3:5], rtol=1e-5, atol=1e-6)
    rows = torch.tensor([7, 2, 11])
    torch.testing.assert_close(reward(history[rows], item[rows]), scores[rows], rtol=1e-5, atol=1e-6)
    assert scores.std(0).min() > 0, "the prompt matters, or the test above says nothing"


@pytest.mark.parametrize("width", [7, 18, 33])
def test_copies_of_an_item_tie_in_the_pool_of_a_ranker_without_orders(shop, width):
    """A product of matrices may round one item otherwise in another column."""
    ranker = nano.train_ranker(shop.catalogue, shop.log._replace(order=None), settings(), epochs=1)
    draw = torch.Generator().manual_seed(0)
    history, item = shop.test.history[:64], torch.randint(-1, 4, (64, width), generator=draw)
    scores, _ = nano.reward_of(nano.make_reward(ranker, settings()), history, item)
    same = item[:, :, None] == item[:, None]
    assert torch.equal(scores[:, :, None].expand_as(same)[same], scores[:, None].expand_as(same)[same])


def test_padding_on_the_left_of_a_history_does_not_matter(question, reward):
    history, item = question
    padded = torch.cat([torch.full((12, 3), -1), history], 1)
    torch.testing.assert_close(reward(padded, item), reward(history, item), rtol=1e-5, atol=1e-6)
    assert (reward(history[:, -2:], item) - reward(history, item)).abs().max() > 1e-4


def test_without_orders_in_the_log_the_reward_is_p_click(shop, question):
    history, item = question
    ranker = nano.train_ranker(shop.catalogue, shop.log._replace(order=None), settings(), epochs=1)
    p = ranker.probabilities(history, item)
    assert set(p) == {"click"}
    scores = nano.make_reward(ranker, settings())(history, item)
    assert torch.equal(scores[item >= 0], p["click"][item >= 0])


def test_the_ranker_follows_from_the_log_and_the_seed(shop, ranker):
    def weights(log, **changes):
        return torch.cat([p.flatten() for p in nano.train_ranker(shop.catalogue, log, settings(**changes), epochs=1)
                          .parameters()])

    before = weights(shop.log)
    torch.rand(7)
    assert torch.equal(before, weights(shop.log))
    assert torch.equal(before, torch.cat([p.flatten() for p in ranker.parameters()]))
    assert not torch.equal(before, weights(shop.log, seed=1))
    assert not torch.equal(before, weights(shop.log._replace(click=~shop.log.click)))


def test_orders_count_only_where_there_was_a_click(shop):
    def weights(order):
        ranker = nano.train_ranker(shop.catalogue, shop.log._replace(order=order), settings(), epochs=1)
        return torch.cat([p.flatten() for p in ranker.parameters()])

    elsewhere, clicked = shop.log.order | ~shop.log.click, shop.log.order ^ shop.log.click
    assert torch.equal(weights(shop.log.order), weights(elsewhere))
    assert not torch.equal(weights(shop.log.order), weights(clicked))


def test_the_ranker_learns_what_is_clicked(shop):
    # A log in which one half of the items is always clicked: the two halves are told apart.
    likes = shop.log.item % 2 == 0
    ranker = nano.train_ranker(shop.catalogue, shop.log._replace(click=likes, order=likes), settings(), epochs=6)
    p = ranker.probabilities(shop.log.history[:100], shop.log.item[:100])["click"]
    assert ((p > 0.5) == likes[:100]).float().mean() > 0.95


def test_the_ranker_is_frozen(ranker):
    assert not ranker.training and not any(p.requires_grad for p in ranker.parameters())


def test_one_long_row_does_not_pad_every_batch(monkeypatch):
    """Wider padding changes no bit of the ranker; and batches are as wide as their longest row."""
    cfg = settings()
    data = nano.toy_world(cfg, SHOP)
    n = len(data.log.item)
    short = torch.arange(n) % 3 + 1  # items of each row
    kept = torch.arange(5) < short[:, None]
    log = data.log._replace(item=torch.where(kept, data.log.item[:, :5], -1), click=data.log.click[:, :5] & kept,
                            order=data.log.order[:, :5] & kept)
    wide = log._replace(item=F.pad(log.item, (0, 40), value=-1), click=F.pad(log.click, (0, 40)),
                        order=F.pad(log.order, (0, 40)))
    widths, forward = [], nano.Ranker.forward

    def seen(self, history, item):
        widths.append(item.shape[1])
        return forward(self, history, item)

    monkeypatch.setattr(nano.Ranker, "forward", seen)
    one, other = (nano.train_ranker(data.catalogue, x, cfg, epochs=1).state_dict() for x in (log, wide))
    assert all(torch.equal(one[key], other[key]) for key in one) and set(widths) == {3}
    wide.item[0, :45] = data.log.item[0, 0]
    widths.clear()
    nano.train_ranker(data.catalogue, wide, cfg, epochs=1)
    assert set(widths) == {3, 45} and widths.count(45) < len(widths) / 2
