# SPDX-License-Identifier: MIT
"""The catalogue: which of all combinations of tokens are items."""

import numpy as np
import pytest
import torch

import nanoadagrpo as nano

from .helpers import every_sequence

RAGGED = {
    "one level": [(3,), (1,), (7,)],
    "two levels": [(0, 5), (9, 5), (9, 0), (2, 2)],
    "three levels, ragged": [(1, 1, 1), (0, 0, 0), (0, 0, 4), (0, 3, 0), (5, 3, 4), (5, 3, 1)],
    "four levels": [(0, 0, 0, 0), (0, 1, 0, 1), (1, 1, 1, 1), (1, 0, 0, 1), (1, 0, 0, 0)],
    "written tokens": [("<a_1>", "<b_1>", "<c_1>"), ("<a_10>", "<b_1>", "<c_2>"), ("<a_2>", "<b_7>", "<c_1>")],
    "the same word on two levels": [("x", "y"), ("y", "x"), ("y", "y")],
    "a single item": [(4, 4, 4)],
}
every_catalogue = pytest.mark.parametrize("sids", RAGGED.values(), ids=RAGGED)


def look_up(sids):
    """{tokens: item}, numbered level by level in the order of the codes."""
    number, start = [], 0
    for level in range(len(sids[0])):
        codes = sorted({sid[level] for sid in sids})
        number.append({code: start + i for i, code in enumerate(codes)})
        start += len(codes)
    return {tuple(number[level][code] for level, code in enumerate(sid)): i for i, sid in enumerate(sids)}


@every_catalogue
def test_every_combination_of_tokens_is_the_item_of_a_dictionary_or_none(sids):
    catalogue, expected = nano.Catalogue(sids), look_up(sids)
    everything = every_sequence(catalogue)  # tokens of a wrong level included
    assert len(everything) == catalogue.S**catalogue.L
    found = catalogue.item(everything).tolist()
    assert found == [expected.get(tuple(tokens), -1) for tokens in everything.tolist()]
    assert sorted(item for item in found if item >= 0) == list(range(len(sids)))


@every_catalogue
def test_the_special_words_belong_to_no_item(sids):
    # S and S + 1 are the query and the start token: node * S + S must not be taken for the next node's first token.
    catalogue = nano.Catalogue(sids)
    everything = every_sequence(catalogue, special=2)
    special = (everything >= catalogue.S).any(1)
    assert (catalogue.item(everything[special]) == -1).all()
    assert (catalogue.item(everything[~special]) >= 0).sum() == catalogue.N


@every_catalogue
def test_the_tokens_of_an_item_lead_back_to_it(sids):
    catalogue = nano.Catalogue(sids)
    assert catalogue.item(catalogue.tokens).tolist() == list(range(catalogue.N)) == [*catalogue.row.values()]
    assert list(catalogue.row) == sids
    levels = [set(column) for column in catalogue.tokens.T.tolist()]
    assert sum(map(len, levels)) == len(set.union(*levels)) == catalogue.S, "levels share no token"


def test_any_shape_of_tokens_is_looked_up():
    catalogue = nano.Catalogue(RAGGED["three levels, ragged"])
    tokens = torch.randint(catalogue.S, (2, 5, 4, 3), generator=torch.Generator().manual_seed(0))
    one_by_one = [catalogue.item(sid).item() for sid in tokens.reshape(-1, 3)]
    assert catalogue.item(tokens).flatten().tolist() == one_by_one


def test_large_random_catalogues_are_looked_up_too():
    rng = np.random.default_rng(0)
    sids = [*dict.fromkeys(map(tuple, rng.integers(0, 8, (200, 3)).tolist()))]
    catalogue, expected = nano.Catalogue(sids), look_up(sids)
    everything = every_sequence(catalogue)
    assert catalogue.item(everything).tolist() == [expected.get(tuple(tokens), -1) for tokens in everything.tolist()]


def test_the_toy_catalogue_has_combinations_that_no_item_has(shop):
    catalogue = shop.catalogue
    assert catalogue.L == 3 and len(catalogue.row) == catalogue.N
    item = catalogue.item(every_sequence(catalogue))
    assert (item >= 0).sum() == catalogue.N < len(item)
