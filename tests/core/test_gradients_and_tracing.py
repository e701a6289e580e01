# SPDX-License-Identifier: MIT
"""Gradients against finite differences and between libraries; compilers, vmap, and other floating-point types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adagrpo_core import (
    adagrpo_loss,
    difficulty,
    gate_diagnostics,
    group,
    group_advantages,
    grpo_loss,
    in_batch_negatives,
    length_normalized,
    nll_loss,
    policy_rank,
    reliability,
    reward_influence,
    reward_ranks,
    sample_clip,
    target_row_advantages,
    ungroup,
)

# Whatever conftest.py sets, these are compiled as for users.
OPTIONS = {"xla_cpu_use_fusion_emitters": True, "xla_backend_optimization_level": 3}
jit = functools.partial(jax.jit, compiler_options=OPTIONS if jax.__version__.startswith("0.10.") else None)
B, K, M, L = 4, 5, 2, 3


def arrays(seed=0):
    """One of each input. Rows 0 and 2 are admitted, row 1 is easy, row 3 is not reliably judged."""
    make = np.random.default_rng(seed)
    old = make.uniform(-2, -1, (B, K, L))
    target_reward = np.asarray([2.0, 2.0, 2.0, -3.0])
    target = make.uniform(-4, -3, (B, L))
    target[1] += 3.5
    return {
        "target": target,
        "old": old,
        "new": old + make.uniform(-0.5, 0.5, old.shape),  # ratios from 0.6 to 1.6, none on a kink
        "ref": old + make.uniform(-0.5, 0.5, old.shape),
        "rewards": make.uniform(0, 1, (B, K)),
        "target_reward": target_reward,
        "negatives": make.uniform(-2, -1, (B, M)),
        "advantages": make.normal(size=(B, K)),
        "mask": make.random((B, K, L)) < 0.8,
        "target_mask": make.random((B, L)) < 0.9,
        "clip": np.asarray([True, False, True, True]),
        "target_logp": make.uniform(-3, -1, B),
        "rollout_logp": make.uniform(-3, -1, (B, K)),
        "keys": make.random((B, B * K)),
        "ranks": make.integers(1, 9, B),
    }


def whole(a, **settings):
    names = "target", "new", "old", "rewards", "target_reward", "negatives", "target_mask", "mask"
    settings = {"beta": 0.1, "lam": 0.5, **settings}
    return adagrpo_loss(*(a[name] for name in names), ref_token_logp=a["ref"], **settings)


def surrogate(a):
    names = "new", "old", "advantages", "mask"
    return grpo_loss(*(a[name] for name in names), clip=a["clip"], ref_token_logp=a["ref"], beta=0.1, epsilon_high=0.3)


# Every function that can be traced, on a dictionary of arrays.
TRACED = {
    "length_normalized": lambda a: length_normalized(a["new"], a["mask"]),
    "policy_rank": lambda a: policy_rank(a["target_logp"], a["rollout_logp"], ties="average"),
    "reward_ranks": lambda a: tuple(reward_ranks(a["target_reward"], a["rewards"], a["negatives"])),
    "difficulty": lambda a: difficulty(a["target_logp"], a["rollout_logp"], tau=0.29 + 0.11),
    "reliability": lambda a: reliability(a["target_reward"], a["rewards"], a["negatives"], ties="max"),
    "sample_clip": lambda a: sample_clip(a["clip"], a["clip"]),
    "gate_diagnostics": lambda a: tuple(
        gate_diagnostics(a["clip"], a["clip"], a["target_reward"], a["rewards"], tau=0.4)
    ),
    "group_advantages": lambda a: group_advantages(a["rewards"]),
    "target_row_advantages": lambda a: target_row_advantages(a["advantages"], a["clip"], lam=0.5),
    "nll_loss": lambda a: nll_loss(a["target"], a["target_mask"]),
    "grpo_loss": surrogate,
    "adagrpo_loss": lambda a: tuple(whole(a)),
    "in_batch_negatives": lambda a: in_batch_negatives(a["keys"], k=K, m=3),
    "group": lambda a: group(a["target"], 2),
    "ungroup": lambda a: ungroup(a["new"]),
    "reward_influence": lambda a: sum(
        map(tuple, reward_influence(a["ranks"], a["ranks"], hard=a["clip"], discriminable=a["clip"])), ()
    ),
}
every_function = pytest.mark.parametrize("name", TRACED)


def in_torch(a, **changes):
    return {name: torch.tensor(array, **changes.get(name, {})) for name, array in a.items()}


def in_jax(a):
    return {name: jnp.asarray(array) for name, array in a.items()}


def parts(result):
    result = result if isinstance(result, tuple) else (result,)
    return [part.detach().numpy() if isinstance(part, torch.Tensor) else np.asarray(part) for part in result]


def assert_alike(found, expected, **tolerance):
    for one, other in zip(parts(found), parts(expected), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, **{"rtol": 1e-12, "atol": 1e-14, **tolerance})


# -- gradients -------------------------------------------------------------------------------------------------------


def test_the_surrogates_gradient_is_that_of_finite_differences():
    a = in_torch(arrays())

    def of(new):
        return surrogate({**a, "new": new})

    assert torch.autograd.gradcheck(of, (a["new"].requires_grad_(),))


def test_the_objectives_gradient_is_that_of_finite_differences_through_a_softmax():
    a = in_torch(arrays())
    make = torch.Generator().manual_seed(0)
    words = torch.randint(6, (B, L), generator=make)[..., None]
    a["target_old_logp"] = torch.tensor([-4.0, 0.0, -4.0, -4.0])  # the gate must not depend on what is varied

    def of(logits, new):
        target = logits.log_softmax(-1).gather(-1, words)[..., 0]
        out = whole({**a, "target": target, "new": new}, target_old_logp=a["target_old_logp"])
        assert out.clip.tolist() == [True, False, True, False]
        return out.loss

    logits = torch.randn(B, L, 6, dtype=torch.float64, generator=make, requires_grad=True)
    assert torch.autograd.gradcheck(of, (logits, a["new"].requires_grad_()))


@pytest.mark.parametrize(
    "function", [lambda a: whole(a).loss, surrogate, TRACED["nll_loss"], TRACED["length_normalized"]]
)
def test_jax_and_torch_have_the_same_gradients(function):
    a = arrays()
    named = {"target": {"requires_grad": True}, "new": {"requires_grad": True}}
    tensors = in_torch(a, **named)
    function(tensors).sum().backward()
    rest = in_jax(a)
    gradient = jit(jax.grad(lambda two: function({**rest, **two}).sum()))
    found = gradient({name: rest[name] for name in named})
    for name in named:
        expected = tensors[name].grad
        np.testing.assert_allclose(found[name], 0 if expected is None else expected, rtol=1e-12, atol=1e-15)


def test_on_policy_the_same_log_probabilities_may_be_passed_twice():
    a = in_torch(arrays())
    new = a["new"].requires_grad_()
    loss = grpo_loss(new, new, a["advantages"])
    torch.testing.assert_close(loss, -a["advantages"].mean(1))
    loss.sum().backward()
    torch.testing.assert_close(new.grad, (-a["advantages"] / (K * L))[:, :, None].expand(B, K, L))
    found = jit(jax.grad(lambda new: grpo_loss(new, new, jnp.asarray(a["advantages"].numpy())).sum()))
    np.testing.assert_allclose(found(jnp.asarray(new.detach().numpy())), new.grad, rtol=1e-12)


CONSTANT = ["old", "ref", "rewards", "target_reward", "negatives", "advantages", "target_old_logp"]


def test_only_the_learning_policys_log_probabilities_receive_a_gradient():
    a = {**arrays(), "target_old_logp": np.asarray([-4.0, 0.0, -4.0, -4.0])}
    leaves = {name: {"requires_grad": True} for name in [*CONSTANT, "target", "new"]}
    tensors = in_torch(a, **leaves)
    out = whole(tensors, target_old_logp=tensors["target_old_logp"])
    (out.loss.sum() + surrogate(tensors).sum()).backward()
    assert [name for name in leaves if tensors[name].grad is not None] == ["target", "new"]

    def loss(a):
        return whole(a, target_old_logp=a["target_old_logp"]).loss.sum() + surrogate(a).sum()

    floating = {name: array for name, array in in_jax(a).items() if array.dtype == jnp.float64}
    found = jit(jax.grad(lambda some: loss({**in_jax(a), **some})))(floating)
    assert all((found[name] == 0).all() for name in CONSTANT)
    assert all((found[name] != 0).any() for name in ("target", "new"))


@pytest.mark.parametrize("ratio, advantage, flows", [(1.5, 1, 0), (0.5, 1, 1), (1.5, -1, 1), (0.5, -1, 0), (1.0, 1, 1)])
def test_the_clip_range_cuts_the_gradient_where_the_ratio_has_gone_far_enough(ratio, advantage, flows):
    new = torch.tensor([[[np.log(ratio)]]], requires_grad=True)
    grpo_loss(new, torch.zeros_like(new), torch.tensor([[float(advantage)]], dtype=torch.float64)).sum().backward()
    assert new.grad.item() == pytest.approx(-ratio * advantage * flows, rel=1e-12, abs=0)


# -- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TRACED if name != "adagrpo_loss"])  # which is the next test's
def test_torch_compiles_the_whole_function_into_one_graph(name):
    torch.compiler.reset()
    a = in_torch(arrays())
    compiled = torch.compile(TRACED[name], fullgraph=True, backend="eager")
    assert_alike(compiled(a), TRACED[name](a))


def test_the_compiled_objective_has_the_same_gradient_and_takes_other_sizes():
    torch.compiler.reset()

    def gradients(function, a):
        a = {**a, "target": a["target"].clone().requires_grad_(), "new": a["new"].clone().requires_grad_()}
        out = function(a)
        out[0].mean().backward()
        return (*(part.detach() for part in out), a["target"].grad, a["new"].grad)

    compiled = torch.compile(TRACED["adagrpo_loss"], fullgraph=True, backend="eager")
    for rollouts in (5, 4):
        a = {
            name: array[:, :rollouts] if name in ("new", "old", "ref", "rewards", "mask") else array
            for name, array in in_torch(arrays()).items()
        }
        assert_alike(gradients(compiled, a), gradients(TRACED["adagrpo_loss"], a))


@every_function
def test_jax_compiles_it_and_agrees_with_numpy(name):
    assert_alike(jit(TRACED[name])(in_jax(arrays())), TRACED[name](arrays()), rtol=1e-10)


def test_the_jitted_objective_agrees_with_numpy_on_many_draws():
    compiled = jit(TRACED["adagrpo_loss"])
    for seed in range(20):
        a = arrays(seed)
        assert_alike(compiled(in_jax(a)), TRACED["adagrpo_loss"](a), rtol=1e-10)


@every_function
def test_vmap_over_batches_equals_a_loop_over_them(name):
    batches = [arrays(seed) for seed in range(3)]
    stacked = {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}
    for found in (jax.jit(jax.vmap(TRACED[name]))(in_jax(stacked)), torch.vmap(TRACED[name])(in_torch(stacked))):
        for s, batch in enumerate(batches):
            assert_alike(tuple(part[s] for part in parts(found)), TRACED[name](batch), rtol=1e-10)


def test_lam_may_be_a_traced_number_so_a_schedule_compiles_once():
    a = in_jax(arrays())
    names = "target", "new", "old", "rewards", "target_reward", "negatives"
    compiled = jit(lambda lam: adagrpo_loss(*(a[name] for name in names), lam=lam).loss)
    for lam in (0.0, 0.5):
        expected = adagrpo_loss(*(arrays()[name] for name in names), lam=lam).loss
        assert_alike(compiled(lam), expected, rtol=1e-10)
    rows = jit(lambda lam: target_row_advantages(a["advantages"], a["clip"], lam=lam))
    assert_alike(rows(0.5), TRACED["target_row_advantages"](arrays()))


def test_torch_compiles_settings_that_change_from_step_to_step():
    torch.compiler.reset()
    a = in_torch(arrays())
    names = "target", "new", "old", "rewards", "target_reward", "negatives"

    def loss(lam, epsilon, eps, beta, tau, correction):
        settings = {"lam": lam, "epsilon": epsilon, "eps": eps, "beta": beta, "tau": tau, "correction": correction}
        return adagrpo_loss(*(a[name] for name in names), ref_token_logp=a["ref"], **settings).loss

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    floats = [(0.5, 0.2, 1e-4, 0.1, 0.3, 1), (0.6, 0.3, 1e-3, 0.2, 0.4, 0), (0.7, 0.4, 1e-2, 0.3, 0.5, 2)]
    for settings in (*floats, (1, 1, 1, 1, 0.29, 1), (3, 2, 0, 0, 0.62, 0)):
        assert_alike(compiled(*settings), loss(*settings))


@pytest.mark.parametrize("lam", [torch.tensor(0.5), np.float32(0.5), np.asarray(0.5)], ids=["torch", "np32", "numpy"])
def test_torch_compiles_a_lam_that_is_an_array(lam):
    torch.compiler.reset()
    a = in_torch(arrays())
    compiled = torch.compile(lambda lam: whole(a, lam=lam).loss, fullgraph=True, backend="eager")
    assert_alike(compiled(lam), whole(a, lam=0.5).loss)


def test_a_traced_lam_is_a_constant_to_the_gradient():
    a = arrays()
    assert whole(a, lam=0.5).clip.any(), "or there is nothing to stop"
    row, one = jnp.asarray([[1.0, -1.0]]), jnp.asarray([True])
    for transform in (lambda f: f, jax.jit):
        assert transform(jax.grad(lambda lam: whole(in_jax(a), lam=lam).loss.sum()))(0.5) == 0
        assert (transform(jax.jacobian(lambda lam: target_row_advantages(row, one, lam=lam)))(0.5) == 0).all()
    mapped = torch.vmap(torch.func.grad(lambda lam: whole(in_torch(a), lam=lam).loss.sum()))
    assert (mapped(torch.tensor([0.5, 2.0])) == 0).all()
    lam = torch.tensor(0.5, requires_grad=True)
    known = {key: x.detach() for key, x in in_torch(a).items()}
    torch.compiler.reset()
    for f in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="eager")):
        assert not f(lambda lam: whole(known, lam=lam).loss)(lam).requires_grad


def test_torch_and_jax_map_over_lam():
    a = arrays()
    expected = [whole(a, lam=lam).loss for lam in (0.5, 2.0)]
    assert_alike(torch.vmap(lambda lam: whole(in_torch(a), lam=lam).loss)(torch.tensor([0.5, 2.0])), np.stack(expected))
    found = jax.vmap(lambda lam: whole(in_jax(a), lam=lam).loss)(jnp.asarray([0.5, 2.0]))
    assert_alike(found, np.stack(expected), rtol=1e-10)


@every_function
def test_jax_without_64_bits_agrees(name):
    expected = TRACED[name](arrays())
    with jax.enable_x64(False):
        a = {key: jnp.asarray(array) for key, array in arrays().items()}
        assert a["new"].dtype == jnp.float32
        assert_alike(jax.jit(TRACED[name])(a), expected, rtol=2e-5, atol=2e-6)


# -- short floating-point types --------------------------------------------------------------------------------------

FLOATING = [  # the results that are numbers of the inputs' type, not ranks, booleans, indices or averages of ranks
    "length_normalized",
    "group_advantages",
    "target_row_advantages",
    "nll_loss",
    "grpo_loss",
    "group",
    "ungroup",
]


def shortened(a, dtype):
    return {key: array.to(dtype) if array.is_floating_point() else array for key, array in in_torch(a).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FLOATING)
def test_the_result_has_the_inputs_dtype_in_torch_and_jax(name, dtype):
    a = shortened(arrays(), dtype)
    assert TRACED[name](a).dtype == dtype
    b = jax.tree.map(
        lambda array: jnp.asarray(array.to(torch.float64).numpy() if array.is_floating_point() else array.numpy()), a
    )
    short = jnp.dtype(str(dtype).removeprefix("torch."))
    b = {key: array.astype(short) if array.dtype == jnp.float64 else array for key, array in b.items()}
    found = jax.jit(TRACED[name])(b)
    assert found.dtype == short
    np.testing.assert_allclose(
        found.astype(jnp.float64),
        TRACED[name](a).to(torch.float64).numpy(),
        rtol=2.0**-7 if dtype.itemsize < 4 else 1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FLOATING)
def test_the_result_has_the_inputs_dtype_in_numpy(name, dtype):
    a = {key: array.astype(dtype) if array.dtype == np.float64 else array for key, array in arrays().items()}
    assert TRACED[name](a).dtype == dtype
    assert [part.dtype for part in TRACED["adagrpo_loss"](a)][:3] == [dtype] * 3


def test_the_objective_of_bfloat16_inputs_is_that_of_their_float32_values_rounded_once():
    make = torch.Generator().manual_seed(0)
    a = shortened(arrays(), torch.bfloat16)
    long = -torch.rand(B, K, 60, generator=make).to(torch.bfloat16)
    a |= {"old": long, "new": long - 0.125, "ref": long, "mask": torch.ones(B, K, 60, dtype=torch.bool)}
    a["target"] = -torch.rand(B, 60, generator=make).to(torch.bfloat16)
    a["target_mask"] = torch.ones(B, 60, dtype=torch.bool)
    wide = {key: array.float() if array.is_floating_point() else array for key, array in a.items()}
    found, expected = whole(a), whole(wide)
    for part in ("loss", "nll", "grpo"):
        assert getattr(found, part).dtype == torch.bfloat16
        assert torch.equal(getattr(found, part), getattr(expected, part).to(torch.bfloat16))
    for part in ("clip", "difficult", "reliable", "policy_rank", "reward_rank", "negative_ranks"):
        assert torch.equal(getattr(found, part), getattr(expected, part))


def test_likelihoods_of_bfloat16_tokens_are_ranked_before_they_are_rounded():
    rollouts = torch.full((1, 4, 10), -0.5, dtype=torch.bfloat16)
    target = rollouts[:, 0].clone()
    target[0, 0] = -0.51  # one token is less likely: a mean of -0.501, which bfloat16 would round to -0.5
    rewards = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([0.9]), torch.tensor([[-1.0]])
    assert adagrpo_loss(target, rollouts, rollouts, *rewards).policy_rank.item() == 5
    rollouts[0, :3] = target  # three rollouts a little less likely than the truth, one as likely
    assert adagrpo_loss(rollouts[:, 3], rollouts, rollouts, *rewards, ties="max").policy_rank.item() == 2


@pytest.mark.parametrize("name", ["grpo_loss", "nll_loss", "length_normalized"])
def test_bfloat16_losses_are_computed_in_float32_and_rounded_once(name):
    make = torch.Generator().manual_seed(0)
    a = shortened(arrays(), torch.bfloat16)
    a["mask"] = torch.ones(B, K, 60, dtype=torch.bool)
    a["target_mask"] = torch.ones(B, 60, dtype=torch.bool)
    a["target"] = -torch.rand(B, 60, generator=make).to(torch.bfloat16)
    a |= {key: -torch.rand(B, K, 60, generator=make).to(torch.bfloat16) for key in ("old", "new", "ref")}
    wide = {key: array.float() if array.is_floating_point() else array for key, array in a.items()}
    assert torch.equal(TRACED[name](a), TRACED[name](wide).to(torch.bfloat16))


def test_bfloat16_gradients_are_computed_in_float32_and_rounded_once():
    short = shortened(arrays(), torch.bfloat16)
    found = []
    for a in (short, {key: array.float() if array.is_floating_point() else array for key, array in short.items()}):
        leaf = a["new"].clone().requires_grad_()
        surrogate({**a, "new": leaf}).float().sum().backward()
        found.append(leaf.grad)
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(found[0], found[1].to(torch.bfloat16))


def test_ranks_compare_bfloat16_values_as_they_are_and_beyond_256_entries():
    rollouts = torch.linspace(1, 2, 400).to(torch.bfloat16)[None, :]  # many ties; 8 bits could not count to 400
    target = torch.tensor([0.5], dtype=torch.bfloat16)
    assert policy_rank(target, rollouts).item() == 401
    assert policy_rank(rollouts[:, 200], rollouts).item() == 1 + (rollouts > rollouts[0, 200]).sum().item()


def test_rewards_and_log_probabilities_may_differ_in_type():
    a = in_torch(arrays())
    a |= {key: a[key].float() for key in ("target", "new", "old", "ref")}
    out = whole(a)
    assert out.loss.dtype == out.nll.dtype == out.grpo.dtype == torch.float32
    assert_alike(out.loss, whole(in_torch(arrays())).loss, rtol=1e-5)


@pytest.mark.skipif(np.finfo(np.longdouble).eps == np.finfo(np.float64).eps, reason="long double is a double here")
def test_what_is_longer_than_a_double_stays_so():
    third = np.longdouble(1) / 3
    nll = nll_loss(np.asarray([[-third, -third]]))
    assert nll.dtype == np.longdouble and nll[0] == third
    assert group_advantages(np.asarray([[third] * 3]), eps=0.0).tolist() == [[0, 0, 0]]
