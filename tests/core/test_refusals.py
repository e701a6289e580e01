# SPDX-License-Identifier: MIT
"""What is refused, and that the message says which argument, what was expected, what came, and what to do."""

import inspect
import re
import warnings
from decimal import Decimal
from fractions import Fraction

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import adagrpo_core as core

from .test_gradients_and_tracing import B, K, L, M, arrays, parts

A = arrays()
ARGUMENTS = {  # function: its arrays by name, then the settings it needs
    "length_normalized": ({"token_logp": A["new"], "mask": A["mask"]}, {}),
    "policy_rank": ({"target_logp": A["target_logp"], "rollout_logp": A["rollout_logp"]}, {}),
    "difficulty": ({"target_logp": A["target_logp"], "rollout_logp": A["rollout_logp"]}, {}),
    "reward_ranks": (
        {"target_reward": A["target_reward"], "rollout_rewards": A["rewards"], "negative_rewards": A["negatives"]},
        {},
    ),
    "reliability": (
        {"target_reward": A["target_reward"], "rollout_rewards": A["rewards"], "negative_rewards": A["negatives"]},
        {},
    ),
    "gate_diagnostics": (
        {
            "difficult": A["clip"],
            "reliable": A["clip"],
            "target_reward": A["target_reward"],
            "rollout_rewards": A["rewards"],
        },
        {},
    ),
    "sample_clip": ({"difficult": A["clip"], "reliable": A["clip"]}, {}),
    "group_advantages": ({"rewards": A["rewards"]}, {}),
    "nll_loss": ({"target_token_logp": A["target"], "mask": A["target_mask"]}, {}),
    "grpo_loss": (
        {
            "token_logp": A["new"],
            "old_token_logp": A["old"],
            "advantages": A["advantages"],
            "mask": A["mask"],
            "clip": A["clip"],
            "ref_token_logp": A["ref"],
        },
        {"beta": 0.1},
    ),
    "adagrpo_loss": (
        {
            "target_token_logp": A["target"],
            "token_logp": A["new"],
            "old_token_logp": A["old"],
            "rewards": A["rewards"],
            "target_reward": A["target_reward"],
            "negative_rewards": A["negatives"],
            "target_mask": A["target_mask"],
            "mask": A["mask"],
            "target_old_logp": A["target_logp"],
            "ref_token_logp": A["ref"],
        },
        {"beta": 0.1},
    ),
    "target_row_advantages": ({"advantages": A["advantages"], "clip": A["clip"]}, {"lam": 0.5}),
    "in_batch_negatives": ({"keys": A["keys"]}, {"k": K, "m": 3}),
    "group": ({"flat": A["target"]}, {"k": 2}),
    "ungroup": ({"grouped": A["target"]}, {}),
    "group_by": ({"index": np.asarray([2, 1, 2, 1])}, {}),
    "reward_influence": (
        {"llm_rank": A["ranks"], "rm_rank": A["ranks"], "hard": A["clip"], "discriminable": A["clip"]},
        {},
    ),
}
EVERY_ARRAY = [(function, name) for function, (given, _) in ARGUMENTS.items() for name in given]
every_array = pytest.mark.parametrize("function, name", EVERY_ARRAY)


def call(function, given, settings, into=np.asarray):
    """Arrays by position where the signature wants it."""
    kinds = inspect.signature(getattr(core, function)).parameters
    given = {name: into(array) for name, array in given.items()}
    positional = [array for name, array in given.items() if kinds[name].kind is inspect.Parameter.POSITIONAL_ONLY]
    named = {name: array for name, array in given.items() if kinds[name].kind is not inspect.Parameter.POSITIONAL_ONLY}
    return getattr(core, function)(*positional, **named, **settings)


def refusal(function, given, settings, into=np.asarray):
    with pytest.raises(ValueError) as caught:
        call(function, given, settings, into)
    message = str(caught.value)
    assert message.partition(":")[0] in inspect.signature(getattr(core, function)).parameters  # of this function
    assert re.fullmatch(r"\w+: expected .+, got .+[;,] .+", message), message  # fullmatch without DOTALL: one line
    return message


def refused(function, name, array):
    given, settings = ARGUMENTS[function]
    message = refusal(function, {**given, name: array}, settings)
    others = [other for other in given if other != name]
    assert re.match("|".join([name, *others]), message)
    return message


def test_the_table_of_arguments_covers_every_public_function_and_array():
    functions = {name for name in core.__all__ if inspect.isfunction(getattr(core, name))}
    assert functions == set(ARGUMENTS)
    settings = {"ties", "tau", "rho", "lam", "tol", "epsilon", "epsilon_high", "beta", "eps", "correction", "k", "m"}
    for function, (given, _) in ARGUMENTS.items():
        assert set(inspect.signature(getattr(core, function)).parameters) - settings == set(given)
        call(function, *ARGUMENTS[function])


@every_array
def test_one_axis_too_few_is_refused_by_name(function, name):
    array = ARGUMENTS[function][0][name]
    while array.ndim and (function, name) in [("group", "flat"), ("ungroup", "grouped")]:
        array = array[0]  # these take any number of further axes
    if function == "length_normalized" and name == "token_logp":
        array = np.asarray(-1.0)
    message = refused(function, name, array[0] if array.ndim else array)
    assert message.startswith(f"{name}: ") or function == "length_normalized"


@every_array
def test_one_axis_too_many_is_refused_by_name(function, name):
    if (function, name) in [("group", "flat"), ("ungroup", "grouped"), ("length_normalized", "token_logp")]:
        return  # any number of axes
    array = ARGUMENTS[function][0][name]
    for wrong in (array[..., None], array[None]):  # (B,) against (B, 1) is the classic
        assert refused(function, name, wrong).startswith(f"{name}: ")


@every_array
def test_no_axis_broadcasts_not_even_one_of_size_one(function, name):
    """Every axis that another argument shares is cut to one entry, and grown by one."""
    given, settings = ARGUMENTS[function]
    array = given[name]
    for axis in range(array.ndim):
        shared = [other for other in given if other != name and array.shape[axis] in given[other].shape[: array.ndim]]
        if not shared or (function, name, axis) in FREE:
            continue
        for wrong in (array.take([0], axis), np.concatenate([array, array.take([0], axis)], axis)):
            refusal(function, {**given, name: wrong}, settings)


FREE = {("adagrpo_loss", "negative_rewards", 1), ("reward_ranks", "negative_rewards", 1)}
FREE |= {("reliability", "negative_rewards", 1)}


@every_array
def test_an_empty_axis_is_refused(function, name):
    if function in ("group", "ungroup"):
        return  # nothing in, nothing out
    given, settings = ARGUMENTS[function]
    array = given[name]
    for axis in range(array.ndim):
        if function == "length_normalized" and axis < array.ndim - 1:
            continue
        refusal(function, {**given, name: array.take([], axis)}, settings)


@every_array
def test_a_wrong_dtype_is_refused_by_name(function, name):
    if function in ("group", "ungroup"):
        return  # any dtype
    array = ARGUMENTS[function][0][name]
    wrong = array.astype(np.int64) if array.dtype == bool else array.astype(bool)
    assert refused(function, name, wrong).startswith(f"{name}: expected ")
    if array.dtype == np.float64 and name != "keys":
        assert refused(function, name, array.astype(np.int64)).endswith("with xp.astype or, in torch, .to(dtype)")


@pytest.mark.parametrize("name", [name for name in ARGUMENTS["adagrpo_loss"][0] if name != "target_old_logp"])
@pytest.mark.parametrize("into", [np.asarray, torch.tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
def test_the_whole_objective_refuses_an_array_by_name_also_where_the_truths_likelihood_is_not_given(name, into):
    given, settings = ARGUMENTS["adagrpo_loss"]
    given = {other: array for other, array in given.items() if other != "target_old_logp"}
    array = given[name]
    wrong = [array[0], array[..., None], array[None], np.concatenate([array, array], -1), array.astype(np.int64)]
    wrong += [array.take([0], axis) for axis in range(array.ndim) if (name, axis) != ("negative_rewards", 1)]
    for other in wrong:
        if (name, other.shape) == ("negative_rewards", (B, 2 * M)):
            continue  # as many as one likes
        message = refusal("adagrpo_loss", {**given, name: other}, settings, into)
        assert re.match("|".join(given), message)
    odd = array.astype(np.int64) if array.dtype == bool else array > 0  # such as TRL's masks of 0 and 1
    assert refusal("adagrpo_loss", {**given, name: odd}, settings, into).startswith(f"{name}: expected a ")


def test_a_message_names_the_expected_and_the_given_shape():
    given, settings = ARGUMENTS["reliability"]
    message = refusal("reliability", {**given, "negative_rewards": np.zeros((5, 4))}, settings)
    assert message.startswith("negative_rewards: expected shape (B=4, M), got (5, 4); ")
    message = refusal("policy_rank", {"target_logp": np.zeros((4, 1)), "rollout_logp": np.zeros((4, 5))}, {})
    assert message.startswith("target_logp: expected shape (B,), got (4, 1); ")


# -- settings --------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
# Python takes True for 1; a switch where a number belongs is a slip.
SWITCHES = True, False, np.bool_(True), np.asarray(True), torch.tensor(True), jnp.asarray(True)
WRONG_SETTINGS = [
    *[
        (function, "tau", wrong)
        for function in ("difficulty", "reliability", "gate_diagnostics", "adagrpo_loss")
        for wrong in (0, 1, -0.1, 1.5, NAN, 1e-7, 1 - 1e-7)
    ],
    *[(function, "rho", wrong) for function in ("reliability", "adagrpo_loss") for wrong in (0, 1, -0.1, 1e-7, NAN)],
    *[
        (function, "ties", wrong)
        for function in ("policy_rank", "reward_ranks", "difficulty", "reliability", "gate_diagnostics", "adagrpo_loss")
        for wrong in ("dense", None, "MIN", np.asarray(["min", "max"]))
    ],
    *[(function, "eps", wrong) for function in ("group_advantages", "adagrpo_loss") for wrong in (-1e-9, NAN)],
    *[
        (function, "correction", wrong)
        for function in ("group_advantages", "adagrpo_loss")
        for wrong in (-1, 0.5, 1.0, True, False, torch.tensor(1.0))
    ],
    *[
        (function, name, wrong)
        for function in ("grpo_loss", "adagrpo_loss")
        for name in ("epsilon", "epsilon_high")
        for wrong in (0.0, -0.2, NAN)
    ],
    *[(function, "beta", wrong) for function in ("grpo_loss", "adagrpo_loss") for wrong in (-0.1, NAN, INF)],
    *[("adagrpo_loss", "tol", wrong) for wrong in (-1e-9, NAN, INF, 1e309)],
    *[
        (function, "lam", wrong)
        for function in ("adagrpo_loss", "target_row_advantages")
        for wrong in (np.ones(2), NAN, INF, -INF, np.float32("inf"), torch.tensor(INF), jnp.asarray(NAN))
    ],
    *[(function, "k", wrong) for function in ("group", "in_batch_negatives") for wrong in (0, -1, 2.0, True)],
    *[("group", "k", wrong) for wrong in (torch.tensor(2.0), torch.tensor([2]), np.asarray([2]), np.float64(2))],
    *[("in_batch_negatives", "m", wrong) for wrong in (0, -1, 1.0)],
    *[  # what is no number, or more than one
        (function, name, wrong)
        for function in ARGUMENTS
        for name in inspect.signature(getattr(core, function)).parameters
        for wrong in (None, "a", [0.3], 1j, np.asarray([0.3, 0.3]), *SWITCHES)
        if name in ("tau", "rho", "eps", "correction", "epsilon", "epsilon_high", "beta", "lam", "tol", "k", "m")
        if not (name == "epsilon_high" and wrong is None)
    ],
]


@pytest.mark.parametrize("function, name, wrong", WRONG_SETTINGS)
def test_a_setting_that_cannot_work_is_refused_by_name(function, name, wrong):
    given, settings = ARGUMENTS[function]
    assert refusal(function, given, {**settings, name: wrong}).startswith(f"{name}: ")


SETTINGS = [
    (function, name)
    for function, name in dict.fromkeys((function, name) for function, name, _ in WRONG_SETTINGS)
    if name in ("tau", "rho", "eps", "epsilon", "epsilon_high", "beta", "lam")
]
every_setting = pytest.mark.parametrize("function, name", SETTINGS)
ONE_NUMBER = {
    "np.float16": np.float16,
    "np.float32": np.float32,
    "numpy": np.asarray,
    "torch": torch.tensor,
    "torch with grad": lambda x: torch.tensor(x, requires_grad=True),
    "jax": jnp.asarray,
    "strict": array_api_strict.asarray,
    "Fraction": lambda x: Fraction(x),
    "Decimal": lambda x: Decimal(x),
}


@pytest.mark.parametrize("library", [np.asarray, torch.tensor, jnp.asarray, array_api_strict.asarray])
@every_setting
def test_a_setting_may_be_one_number_of_any_kind(function, name, library):
    """0.375 is the same number in all of them; arrays are float64, so a float16 that took part would show."""
    given, settings = ARGUMENTS[function]
    wanted = parts(call(function, given, {**settings, name: 0.375}, library))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ONE_NUMBER.values():
            found = call(function, given, {**settings, name: kind(0.375)}, library)
            results = found if isinstance(found, tuple) else (found,)
            assert not any(getattr(result, "requires_grad", False) for result in results)
            for one, other in zip(parts(found), wanted, strict=True):
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other)


@every_setting
def test_a_number_that_no_float_can_hold_and_complex_numbers_are_refused_by_name(function, name):
    given, settings = ARGUMENTS[function]
    for wrong in (10**400, np.str_("0.3"), np.complex64(0.3), torch.tensor(0.3j), jnp.asarray(0.3j), Fraction(10**400)):
        assert refusal(function, given, {**settings, name: wrong}).startswith(f"{name}: expected one number")


@every_setting
def test_a_traced_setting_is_refused_by_name_with_the_remedy_unless_it_is_lam(function, name):
    given, settings = ARGUMENTS[function]

    def traced(value):
        return call(function, given, {**settings, name: value}, jnp.asarray)

    if name == "lam":
        jax.jit(traced)(1)
        return
    with pytest.raises(ValueError, match=rf"^{name}: expected .* while tracing, got a traced one; .* static_argnames"):
        jax.jit(traced)(1)


@pytest.mark.parametrize("function, name", [
    ("group", "k"), ("in_batch_negatives", "k"), ("in_batch_negatives", "m"), ("group_advantages", "correction")])
def test_a_traced_count_is_refused_with_the_remedy(function, name):
    given, settings = ARGUMENTS[function]
    with pytest.raises(ValueError, match=rf"^{name}: expected a whole number .* static_argnames"):
        jax.jit(lambda value: call(function, given, {**settings, name: value}, jnp.asarray))(2)


@pytest.mark.parametrize("function", ["length_normalized", "difficulty", "group_advantages", "nll_loss"])
def test_a_numpy_array_of_a_dtype_that_is_not_numpys_is_refused_by_name(function):
    """As np.asarray makes of JAX's bfloat16."""
    given, settings = ARGUMENTS[function]
    theirs = {name: np.asarray(jnp.asarray(x, jnp.bfloat16)) if x.dtype.kind == "f" else x for name, x in given.items()}
    assert "expected a real floating dtype, got bfloat16; convert it first" in refusal(function, theirs, settings)


@pytest.mark.parametrize("name, wrong", [("tau", 1e-7), ("tau", 1 - 1e-7), ("rho", 1e-7), ("rho", 1 - 1e-7)])
def test_the_bounds_that_a_refused_share_names_are_those_that_hold(name, wrong):
    given, settings = ARGUMENTS["reliability"]
    assert "from 0.000001 to 0.999999, got" in refusal("reliability", given, {**settings, name: wrong})
    call("reliability", given, {"rho": 0.000001})
    call("reliability", given, {name: 0.999999})


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.asarray, torch.tensor, jnp.asarray, array_api_strict.asarray])
def test_a_count_may_be_one_whole_number_of_any_kind(kind):
    rewards, flat = A["rewards"], np.arange(6)
    for library in (np.asarray, torch.tensor, jnp.asarray):
        wanted = core.group_advantages(library(rewards), correction=2).tolist()
        assert core.group_advantages(library(rewards), correction=kind(2)).tolist() == wanted
        assert tuple(core.group(library(flat), kind(3)).shape) == (2, 3)
        found = core.in_batch_negatives(library(A["keys"]), k=kind(K), m=kind(3))
        assert found.tolist() == core.in_batch_negatives(A["keys"], k=K, m=3).tolist()


def test_a_setting_at_the_edge_of_what_works_is_taken():
    given, _ = ARGUMENTS["difficulty"]
    call("difficulty", given, {"tau": 1 / K})
    call("difficulty", given, {"tau": 0.999})
    call("in_batch_negatives", *[ARGUMENTS["in_batch_negatives"][0], {"k": K, "m": (B - 1) * K}])
    call("group_advantages", {"rewards": A["rewards"][:, :2]}, {})
    call(
        "grpo_loss",
        {
            name: A[key]
            for name, key in [("token_logp", "new"), ("old_token_logp", "old"), ("advantages", "advantages")]
        },
        {"epsilon": 2.0},
    )


@pytest.mark.parametrize("function", ["difficulty", "reliability", "gate_diagnostics", "adagrpo_loss"])
def test_a_tau_that_admits_nothing_is_refused_with_the_tau_and_the_k_that_would_do(function):
    given, settings = ARGUMENTS[function]
    message = refusal(function, given, {**settings, "tau": 0.19})  # K is 5
    assert message.startswith("tau: expected tau * K >= 1, got tau=0.19 with K=5")
    assert "1/5 or more" in message and "K >= 6" in message


@pytest.mark.parametrize("function", ["group_advantages", "adagrpo_loss"])
def test_a_group_too_small_for_a_spread_is_refused_with_both_remedies(function):
    given, settings = ARGUMENTS[function]
    message = refusal(function, given, {**settings, "correction": K})
    assert message.startswith(f"rewards: expected K > correction={K}, got K={K}; ")
    assert "sample more rollouts" in message and "correction=0" in message


def test_more_negatives_than_there_are_others_are_refused_with_the_number_there_are():
    given, _ = ARGUMENTS["in_batch_negatives"]
    message = refusal("in_batch_negatives", given, {"k": K, "m": 16})
    assert message.startswith("m: expected at most (B-1)*k = 15 with B=4 and k=5, got 16; lower m")
    message = refusal("in_batch_negatives", {"keys": A["keys"][:1, :5]}, {"k": 5, "m": 1})  # a batch of one prompt
    assert "more prompts" in message


def test_keys_and_rows_that_k_does_not_fit_are_refused():
    assert refusal("in_batch_negatives", *[ARGUMENTS["in_batch_negatives"][0], {"k": 4, "m": 1}]).startswith(
        "keys: expected shape (B=4, B*k=16), got (4, 20); "
    )
    assert refusal("group", {"flat": np.zeros((5, 2))}, {"k": 2}).startswith(
        "flat: expected shape (B*k, ...) with k=2, got (5, 2); "
    )


@pytest.mark.parametrize("function, name", [
    ("adagrpo_loss", "lam"), ("target_row_advantages", "lam"), ("adagrpo_loss", "beta"), ("grpo_loss", "beta")])
@pytest.mark.parametrize("into", [np.asarray, jnp.asarray, torch.tensor, array_api_strict.asarray])
def test_a_factor_that_the_dtype_cannot_hold_is_refused_and_half_precision_holds_what_float32_does(
        function, name, into):
    """Times the 0 of a prompt that is not admitted it would be NaN."""
    given, settings = ARGUMENTS[function]

    def at(dtype):
        return lambda x: into(np.asarray(x, dtype) if np.issubdtype(np.asarray(x).dtype, np.floating) else x)

    for too_much, dtype in ((1e39, np.float32), (2e38, np.float32), (1.7e308, np.float64)):
        with jax.enable_x64(True):
            message = refusal(function, given, {**settings, name: too_much}, at(dtype))
        assert message.startswith(f"{name}: expected a finite number, at most half of the largest ")
    with np.errstate(over="ignore"):  # of what is admitted
        call(function, given, {**settings, name: 1e38}, at(np.float32))
        if into is not array_api_strict.asarray:  # which has no half precision
            call(function, given, {**settings, name: 1e5}, at(np.float16))


@pytest.mark.parametrize("function", ["grpo_loss", "adagrpo_loss"])
def test_a_penalty_without_its_reference_is_refused(function):
    given, settings = ARGUMENTS[function]
    given = {name: array for name, array in given.items() if name != "ref_token_logp"}
    assert refusal(function, given, settings).startswith("ref_token_logp: ")
    call(function, given, {"beta": 0.0})


def test_discriminable_without_hard_is_refused():
    given = {name: array for name, array in ARGUMENTS["reward_influence"][0].items() if name != "hard"}
    assert refusal("reward_influence", given, {}).startswith("hard: ")


@pytest.mark.parametrize("into", [torch.tensor, jnp.asarray, array_api_strict.asarray])
def test_every_library_is_refused_the_same(into):
    for function, name in EVERY_ARRAY:
        if function in ("group", "ungroup", "group_by", "length_normalized"):
            continue
        given, settings = ARGUMENTS[function]
        wrong = {**given, name: given[name][None]}
        assert refusal(function, wrong, settings, into) == refusal(function, wrong, settings)


def test_refusals_work_while_tracing():
    with pytest.raises(ValueError, match=r"^rollout_logp: expected shape \(B=4, K\), got \(5, 4\); "):
        jax.jit(core.policy_rank)(jnp.zeros(4), jnp.zeros((5, 4)))


# -- what is no array, and what is of another library ------------------------------------------------------------------

LIBRARIES = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray, "strict": array_api_strict.asarray}
every_library = pytest.mark.parametrize("library", LIBRARIES)


def refused_type(function, given, settings):
    with pytest.raises(TypeError) as caught:
        call(function, given, settings, into=lambda array: array)
    assert isinstance(caught.value, ValueError)  # as every other refusal is
    assert re.fullmatch(r"\w+: expected an array.*, got .+; (convert it first|pass one)", str(caught.value))
    return str(caught.value)


@every_library
@every_array
def test_what_is_no_array_is_refused_by_name(function, name, library):
    given, settings = ARGUMENTS[function]
    arrays = {other: LIBRARIES[library](array) for other, array in given.items()}
    for wrong in (given[name].tolist(), tuple(given[name].tolist()), 0.5, 1, True, "abc", {}, range(3), object()):
        message = refused_type(function, {**arrays, name: wrong}, settings)
        assert message.startswith(f"{name}: ") and type(wrong).__name__ in message


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("kind", [np.matrix, np.ma.masked_array])
@every_array
def test_numpys_matrices_and_masked_arrays_are_refused_by_name(function, name, kind):
    given, settings = ARGUMENTS[function]
    wrong = kind(np.zeros((2, 2)))
    assert refused_type(function, {**given, name: wrong}, settings).startswith(f"{name}: expected an array")
    call(function, {**given, name: given[name].view(type("Mine", (np.ndarray,), {}))}, settings, lambda array: array)


@every_array
def test_none_is_refused_by_name_where_an_array_is_required(function, name):
    given, settings = ARGUMENTS[function]
    if inspect.signature(getattr(core, function)).parameters[name].default is None:
        return
    assert refused_type(function, {**given, name: None}, settings).startswith(f"{name}: expected an array")


@pytest.mark.parametrize("odd", LIBRARIES)
@every_library
@every_array
def test_arrays_of_two_libraries_are_refused_by_name(function, name, library, odd):
    given, settings = ARGUMENTS[function]
    if len(given) == 1 or odd == library:
        return
    arrays = {other: LIBRARIES[library](array) for other, array in given.items()}
    message = refused_type(function, {**arrays, name: LIBRARIES[odd](given[name])}, settings)
    first, second, *_ = given
    assert message.startswith(f"{second if name == first else name}: ") and f" of {first} (" in message


def test_a_list_is_refused_while_tracing():
    with pytest.raises(TypeError, match=r"^rollout_logp: expected an array of the library of target_logp "):
        jax.jit(lambda target: core.policy_rank(target, [[1.0]]))(jnp.zeros(1))


def test_sizes_used_here_are_distinct_enough_to_notice_a_mix_up():
    assert len({B, K, M, L}) == 4
