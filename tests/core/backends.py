# SPDX-License-Identifier: MIT
"""The array libraries under test. Numbers are drawn once in NumPy and converted, so that all see the same."""

import functools

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch


class Backend:
    """One way to run a core function: NumPy in, NumPy out, the library in between."""

    def __init__(self, name, into, out):
        self.name, self.into, self.out = name, into, out

    def run(self, function, *arrays, **settings):
        given = {name: value for name, value in settings.items() if isinstance(value, np.ndarray)}
        static = {name: value for name, value in settings.items() if name not in given}
        arrays = [self.into(array) for array in arrays]
        given = {name: self.into(array) for name, array in given.items()}
        return self.back(self.call(function, static, arrays, given))

    def call(self, function, static, arrays, given):
        return function(*arrays, **given, **static)

    def back(self, result):
        if result is None:
            return None
        if isinstance(result, tuple):
            return type(result)(*(self.back(part) for part in result))
        return self.out(result)


class Jitted(Backend):
    def call(self, function, static, arrays, given):
        return compiled(function, tuple(sorted(static.items())))(arrays, given)


@functools.cache
def compiled(function, static):
    return jax.jit(lambda arrays, given: function(*arrays, **given, **dict(static)))


def to_torch(array):
    return torch.from_numpy(np.array(array))


NUMPY = Backend("numpy", np.asarray, np.asarray)
TORCH = Backend("torch", to_torch, lambda x: x.detach().numpy())
STRICT = Backend("array_api_strict", array_api_strict.asarray, np.asarray)
JAX = Backend("jax", jnp.asarray, np.asarray)
JIT = Jitted("jax.jit", jnp.asarray, np.asarray)
BACKENDS = [NUMPY, TORCH, STRICT, JAX, JIT]
EAGER = [NUMPY, TORCH, STRICT, JAX]

every_backend = pytest.mark.parametrize("xp", BACKENDS, ids=lambda xp: xp.name)
every_eager_backend = pytest.mark.parametrize("xp", EAGER, ids=lambda xp: xp.name)
every_tie = pytest.mark.parametrize("ties", ["min", "max", "average"])
