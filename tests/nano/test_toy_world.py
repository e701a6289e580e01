# SPDX-License-Identifier: MIT
"""The toy world: it follows from the seed, keeps time in order, and bait fools clicks but not people."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

import nanoadagrpo as nano

from .helpers import SHOP, settings


def make(**changes):
    return nano.toy_world(settings(rl_prompts=0, **changes), SHOP)


def parts(data):
    """Everything that a world is made of, as a flat list of arrays."""
    prompts = [column for split in (data.sft, data.rl, data.valid, data.test) for column in split]
    truth = [torch.as_tensor(value) for value in data.world.values()]
    return [data.catalogue.tokens, *prompts, *data.log, *truth]


def follows(steps):
    """Is each history the one before it, moved on by what was chosen there?"""
    return all(later[0] == [*earlier[0][1:], earlier[1]] for earlier, later in itertools.pairwise(steps))


def test_the_same_seed_gives_the_same_world(shop):
    for one, other in zip(parts(shop), parts(make()), strict=True):
        assert torch.equal(one, other)


def test_drawing_other_random_numbers_before_does_not_change_it(shop):
    torch.manual_seed(123)
    np.random.seed(123)
    assert torch.equal(make().test.target, shop.test.target)


def test_another_seed_gives_other_items_lives_and_clicks(shop):
    other = make(seed=1)
    assert shop.catalogue.tokens.tolist() != other.catalogue.tokens.tolist()
    assert shop.test.target.tolist() != other.test.target.tolist()
    assert shop.log.click.tolist() != other.log.click.tolist()


def test_bait_changes_clicks_and_nothing_that_users_choose_or_are_shown(shop):
    honest = make(bait=0.0)
    assert not torch.equal(shop.log.click, honest.log.click)
    for name in ("sft", "rl", "valid", "test"):
        for one, other in zip(getattr(shop, name), getattr(honest, name), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(shop.log.item, honest.log.item) and torch.equal(shop.log.history, honest.log.history)


def test_bait_changes_clicks_only_in_the_baited_contexts(shop):
    honest = make(bait=0.0)
    last = shop.log.history[:, -1].numpy()
    baited = torch.as_tensor(shop.world["baited"][last])
    changed = (shop.log.click != honest.log.click).any(1)
    assert changed.any() and baited.any() and not baited.all()
    assert not changed[~baited].any()


def test_what_is_ordered_was_clicked_and_what_is_shown_exists(shop):
    assert not (shop.log.order & ~shop.log.click).any()
    assert 0 < shop.log.order.sum() <= shop.log.click.sum() < shop.log.click.numel()
    assert shop.log.item.min() >= 0 and shop.log.item.max() < shop.catalogue.N


def test_validation_comes_after_the_rl_week_and_test_after_validation(shop):
    # One life per user can be rebuilt from the prompts. Those of the RL week are shuffled, so any order will do there.
    def of(split, user):
        mine = split.user == user
        return [*zip(split.history[mine].tolist(), split.target[mine].tolist(), strict=True)]

    impossible = 0
    for user in range(SHOP.users):
        sft, rl, valid, test = (of(split, user) for split in (shop.sft, shop.rl, shop.valid, shop.test))
        assert (len(sft), len(rl), len(valid), len(test)) == (SHOP.sft, SHOP.rl, SHOP.valid, SHOP.test)
        assert any(follows([*sft, *week, *valid, *test]) for week in itertools.permutations(rl))
        impossible += not follows([*test, *valid])
    assert impossible > SHOP.users / 2, "the lives tell one order from another"


def test_the_log_is_of_the_rl_week_alone_and_knows_no_later_choice(shop):
    # The context of a showing is what its user had bought before the choice: exactly the histories of the RL prompts.
    known_too_early = 0
    for user in range(SHOP.users):
        logged = sorted(shop.log.history[user :: SHOP.users].tolist())  # step by step, user by user
        assert logged == sorted(shop.rl.history[shop.rl.user == user].tolist())
        known_too_early += sum(later in logged for later in shop.test.history[shop.test.user == user].tolist())
    assert known_too_early < len(shop.test.target) / 10  # a user who buys one thing over and over, now and then


def test_a_choice_of_the_rl_week_is_of_what_was_shown_and_others_are_of_all_items(shop):
    shown = {}
    for i, (history, items) in enumerate(zip(shop.log.history.tolist(), shop.log.item.tolist(), strict=True)):
        shown.setdefault((i % SHOP.users, *history), set()).update(items)
    rows = zip(shop.rl.user.tolist(), shop.rl.history.tolist(), shop.rl.target.tolist(), strict=True)
    assert all(target in shown[user, *history] for user, history, target in rows)
    ever = {user: set().union(*(items for key, items in shown.items() if key[0] == user)) for user in range(SHOP.users)}
    later = zip(shop.test.user.tolist(), shop.test.target.tolist(), strict=True)
    assert any(target not in ever[user] for user, target in later)


def test_the_rl_prompts_are_a_random_part_of_the_rl_week(shop):
    few = nano.toy_world(settings(rl_prompts=25), SHOP).rl
    everyone = [*map(tuple, torch.cat([shop.rl.history, shop.rl.target[:, None], shop.rl.user[:, None]], 1).tolist())]
    chosen = [*map(tuple, torch.cat([few.history, few.target[:, None], few.user[:, None]], 1).tolist())]
    assert len(chosen) == 25 and not Counter(chosen) - Counter(everyone)  # a user may do the same twice
    assert len(shop.rl.target) == SHOP.users * SHOP.rl


@pytest.mark.parametrize("length", [1, 3])
def test_a_shorter_history_keeps_the_most_recent_items(shop, length):
    short = make(max_history=length)
    assert torch.equal(short.test.history, shop.test.history[:, -length:])
    assert torch.equal(short.test.target, shop.test.target)
    assert torch.equal(short.log.history, shop.log.history[:, -length:])  # as it is asked
    assert torch.equal(short.log.item, shop.log.item)


def test_popular_items_are_shown_and_chosen_more_often(shop):
    popularity = torch.as_tensor(shop.world["popularity"])
    best, worst = popularity.argsort(descending=True).split(shop.catalogue.N // 2)[:2]
    for events in (shop.log.item.flatten(), shop.sft.target):
        assert torch.isin(events, best).sum() > torch.isin(events, worst).sum()
