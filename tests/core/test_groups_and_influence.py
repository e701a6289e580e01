# SPDX-License-Identifier: MIT
"""Moving rows, drawing negatives, and Section 4's analysis."""

import itertools
import math
from collections import Counter

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adagrpo_core import (
    difficulty,
    group,
    group_by,
    in_batch_negatives,
    policy_rank,
    reliability,
    reward_influence,
    ungroup,
)

from . import oracle
from . import strategies as draw
from .backends import every_backend, every_eager_backend

INF, NAN = float("inf"), float("nan")


# -- layouts ---------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("rest", [(), (4,), (2, 3)])
def test_consecutive_rows_become_groups_and_come_back_as_they_were(xp, rest):
    flat = np.arange(6 * math.prod(rest)).reshape(6, *rest)
    grouped = xp.run(group, flat, k=3)
    assert grouped.shape == (2, 3, *rest)
    for b, j in itertools.product(range(2), range(3)):
        np.testing.assert_array_equal(grouped[b, j], flat[b * 3 + j])
    back = xp.run(ungroup, grouped)
    assert back.dtype == flat.dtype
    np.testing.assert_array_equal(back, flat)


IDS = st.sampled_from([(1, 1), (4, 3)]).flatmap(
    lambda size: st.lists(st.integers(-3, 50), min_size=size[0], max_size=size[0], unique=True).flatmap(
        lambda names: st.permutations(names * size[1])
    )
)


@every_eager_backend
@given(ids=IDS)
def test_rows_of_equal_id_come_together_in_order_of_first_appearance_and_go_back(xp, ids):
    index = np.asarray(ids)
    with array_api_strict.ArrayAPIStrictFlags(data_dependent_shapes=True):  # the one function that reads values
        order, inverse = xp.run(group_by, index)
    assert order.tolist() == oracle.group_order(ids)
    assert index[order][inverse].tolist() == ids
    assert order[inverse].tolist() == list(range(len(ids)))


def test_ids_may_be_strings_where_the_library_has_them():
    strings = np.dtypes.StringDType()
    for uid in (np.asarray(["b", "a", "b", "a"]), np.asarray(["b", "a", "b", "a"], dtype=strings),
                np.asarray(["b", "a", "b", "a"], dtype=object)):
        order, inverse = group_by(uid)
        assert (order.tolist(), inverse.tolist()) == ([0, 2, 1, 3], [0, 2, 1, 3])


@pytest.mark.parametrize("into", [np.asarray, torch.tensor, jnp.asarray])
def test_ragged_groups_are_refused_by_name(into):
    with pytest.raises(ValueError, match=r"^index: expected groups of one size, got 3 rows of id 7 and 1 of id 5; "):
        group_by(into([7, 5, 7, 8, 8, 7]))


@every_eager_backend
@pytest.mark.parametrize("ids", [[1.0, 0.0], [True, False], [1j, 0j], [NAN, NAN]], ids=str)
def test_ids_that_are_no_integers_are_refused_by_name(xp, ids):
    with pytest.raises(ValueError, match=r"^index: expected integers, or strings in NumPy, got .+; "):
        xp.run(group_by, np.asarray(ids * 2))


def test_ids_may_be_of_every_integer_type():
    for dtype in (np.int8, np.uint8, np.uint16, np.uint32, np.uint64, np.int64):
        for into in (np.asarray, torch.tensor, jnp.asarray):
            assert group_by(into(np.asarray([7, 3, 7, 3], dtype=dtype))).order.tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("ids", [[1, "a"], [None, 1], [None, None], [1j, 2j]], ids=str)
def test_objects_that_cannot_be_sorted_are_refused_by_name(ids):
    with pytest.raises(ValueError, match=r"^index: expected ids of one type, got several; "):
        group_by(np.asarray(ids * 2, dtype=object))


@pytest.mark.parametrize("ids", [[NAN, 1.0, NAN, 1.0], [NAN, NAN], ["a", NAN]], ids=str)
def test_objects_that_are_nan_are_refused_because_nan_equals_nothing_and_would_make_groups_of_one(ids):
    with pytest.raises(ValueError, match=r"^index: expected ids, got NaN; "):
        group_by(np.asarray(ids, dtype=object))


# -- negatives -------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from([(2, 1), (3, 2)]).flatmap(
    lambda size: st.tuples(
        st.just(size[1]), draw.npst.arrays(np.float64, (size[0], size[0] * size[1]), elements=st.floats(0, 1, width=16))
    )
)


@every_eager_backend
@given(keys=KEYS, data=st.data())
def test_negatives_are_the_smallest_keys_outside_the_own_group(xp, keys, data):
    k, keys = keys
    m = data.draw(st.integers(1, keys.shape[1] - k))
    found = xp.run(in_batch_negatives, keys, k=k, m=m)
    assert found.tolist() == [oracle.negatives(keys[b].tolist(), b, k, m) for b in range(len(keys))]


@every_backend
@pytest.mark.parametrize("worst", [INF, -INF, NAN, 1e300])
def test_the_own_group_is_never_drawn_whatever_the_keys_are(xp, worst):
    keys = np.full((3, 6), worst)
    found = xp.run(in_batch_negatives, keys, k=2, m=4)
    assert [sorted(row) for row in found.tolist()] == [[2, 3, 4, 5], [0, 1, 4, 5], [0, 1, 2, 3]]
    found = xp.run(in_batch_negatives, np.where(np.arange(6) // 2 == np.arange(3)[:, None], -INF, keys), k=2, m=4)
    assert [sorted(row) for row in found.tolist()] == [[2, 3, 4, 5], [0, 1, 4, 5], [0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int32", "float16"])
def test_keys_of_any_real_type_are_taken_or_refused_by_name(dtype):
    keys = np.asarray([[0, 0, 9, 1], [8, 2, 0, 0]])
    for m in (1, 2):
        for into in (np.asarray, jnp.asarray):
            assert in_batch_negatives(into(keys.astype(dtype)), k=2, m=m)[:, 0].tolist() == [3, 1]
        try:
            assert in_batch_negatives(torch.tensor(keys.astype(dtype)), k=2, m=m)[:, 0].tolist() == [3, 1]
        except ValueError as refusal:
            assert str(refusal).startswith("keys: expected a dtype") and dtype in ("uint16", "uint32", "uint64")


def test_ids_that_jax_traces_are_refused_as_what_they_are():
    with pytest.raises(ValueError, match="index: expected ids that are known, got traced ones; call it outside jit"):
        jax.jit(group_by)(jnp.asarray([1, 2, 1, 2]))


def test_the_draw_is_uniform_and_without_repetition():
    """Every order of the keys once: each pair of the four candidates must come out equally often."""
    orders = list(itertools.permutations(range(6)))
    drawn = Counter()
    for order in orders:
        first = in_batch_negatives(np.asarray([order] * 3) * 1.0, k=2, m=2)[0]
        assert len(set(first.tolist())) == 2
        drawn[frozenset(first.tolist())] += 1
    assert drawn == {frozenset(pair): len(orders) // 6 for pair in itertools.combinations(range(2, 6), 2)}


@every_backend
def test_the_indices_point_into_the_flat_rollouts(xp):
    keys = np.random.default_rng(0).random((4, 8))
    found = xp.run(in_batch_negatives, keys, k=2, m=3)
    assert np.issubdtype(found.dtype, np.integer)
    owners = np.repeat(np.arange(4), 2)
    assert (owners[found] != np.arange(4)[:, None]).all()


# -- Section 4 -------------------------------------------------------------------------------------------------------


@every_backend
@given(B=st.sampled_from([1, 5]), data=st.data())
def test_the_three_tables_are_means_over_all_hard_and_hard_and_discriminable(xp, B, data):
    rank = draw.npst.arrays(np.int32, B, elements=st.integers(1, 51))
    llm, rm, hard, clear = (data.draw(part) for part in (rank, rank, draw.masks(B), draw.masks(B)))
    tables = xp.run(reward_influence, llm, rm, hard=hard, discriminable=clear)
    for stratum, member in zip(tables, ([True] * B, hard, hard & clear), strict=True):
        wanted = [float(part) for part in oracle.influence(llm.tolist(), rm.tolist(), list(member))]
        np.testing.assert_allclose(list(stratum), wanted, rtol=1e-6)
        assert all(part.dtype == np.float32 and part.shape == () for part in stratum)


@every_backend
def test_a_stratum_without_a_mask_is_left_out_and_an_empty_one_is_nan_with_coverage_zero(xp):
    llm, rm = np.asarray([1, 4, 8]), np.asarray([2.0, 1.5, 1.0])
    tables = xp.run(reward_influence, llm, rm)
    assert (tables.hard, tables.discriminable) == (None, None)
    np.testing.assert_allclose(list(tables.overall), [13 / 3, 1.5, 17 / 6, 1.0], rtol=1e-6)
    tables = xp.run(reward_influence, llm, rm, hard=np.zeros(3, dtype=bool))
    assert np.isnan([tables.hard.llm_rank, tables.hard.rm_rank, tables.hard.influence]).all()
    assert tables.hard.coverage == 0 and tables.discriminable is None


def test_a_nan_rank_reaches_its_own_strata_only():
    tables = reward_influence(np.asarray([1.0, NAN]), np.asarray([2.0, 2.0]), hard=np.asarray([True, False]))
    assert np.isnan(tables.overall.influence)
    assert tables.hard == (1.0, 2.0, -1.0, 0.5)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_an_infinite_rank_is_averaged_as_it_is_and_beside_another_has_no_difference():
    llm, rm = np.asarray([INF, INF, 3.0, NAN]), np.asarray([INF, 2.0, INF, 1.0])
    for b, (influence, mean) in enumerate([(NAN, INF), (INF, INF), (-INF, 3.0), (NAN, NAN)]):
        tables = reward_influence(llm, rm, hard=np.arange(4) == b)
        np.testing.assert_array_equal([tables.hard.influence, tables.hard.llm_rank], [influence, mean])
    assert reward_influence(llm, rm, hard=np.zeros(4, dtype=bool)).hard.coverage == 0


@pytest.mark.parametrize("rank", [np.int64, np.uint8, np.float16, np.float32, np.float64])
def test_the_tables_are_float32_whatever_the_ranks_are(rank):
    ranks = np.asarray([1, 9], dtype=rank)
    tables = reward_influence(ranks, ranks, hard=np.asarray([True, False]))
    assert all(part.dtype == np.float32 for stratum in tables[:2] for part in stratum)


def test_no_gradient_flows_into_ranks():
    ranks = torch.tensor([1.0, 9.0], requires_grad=True)
    tables = reward_influence(ranks, ranks * 2, hard=torch.tensor([True, False]))
    assert not any(part.requires_grad for stratum in tables[:2] for part in stratum)
    found = jax.grad(lambda ranks: reward_influence(ranks, ranks * 2).overall.influence)(jnp.asarray([1.0, 9.0]))
    assert found.tolist() == [0, 0]


def test_the_tables_follow_from_the_functions_of_the_gate_with_the_beams_as_rollouts():
    """A made-up world of 4 prompts and 5 beams: the truth's place by likelihood, then by reward."""
    beams = np.tile([-1.0, -2.0, -3.0, -4.0, -5.0], (4, 1))
    truth = np.asarray([-1.0, -3.0, -9.0, -9.0])  # among the beams at 1 and 3; not among them: 6, 6
    rewards = np.tile([0.1, 0.2, 0.3, 0.4, 0.5], (4, 1))
    truth_reward, negatives = np.asarray([0.5, 0.9, 0.9, 0.05]), np.full((4, 2), -1.0)
    llm_rank, rm_rank = policy_rank(truth, beams), policy_rank(truth_reward, rewards)
    assert (llm_rank.tolist(), rm_rank.tolist()) == ([1, 3, 6, 6], [1, 1, 1, 6])
    hard, clear = difficulty(truth, beams), reliability(truth_reward, rewards, negatives)
    tables = reward_influence(llm_rank, rm_rank, hard=hard, discriminable=clear)
    assert tables.overall == (4.0, 2.25, 1.75, 1.0)
    np.testing.assert_allclose(tables.hard, (5.0, 8 / 3, 7 / 3, 0.75), rtol=1e-6)
    assert tables.discriminable == (4.5, 1.0, 3.5, 0.5)
