# SPDX-License-Identifier: MIT
import os

import array_api_strict
import jax
import torch
from hypothesis import HealthCheck, settings

# Every property is tried in every library, on the same examples, and JAX compiles for nearly each: few, by default.
settings.register_profile(
    "core", max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.register_profile("deep", settings.get_profile("core"), max_examples=100)
settings.load_profile("deep" if os.environ.get("DEEP_TESTS") else "core")
torch.set_num_threads(1)
jax.config.update("jax_enable_x64", True)  # gradients are checked in float64; one test turns it off again
if jax.__version__.startswith("0.10.") and not os.environ.get("DEEP_TESTS"):
    # JAX compiles by XLA's former emitter and optimises little, in less than half the time. As it does for users, it
    # compiles every function in test_gradients_and_tracing.py.
    less = " --xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + less
# What a compiled library could not do either: no index by a boolean, no shape that depends on values, no extension.
array_api_strict.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=())


def pytest_configure(config):
    # Dynamo remarks that it traces through array-api-compat's cached look-up of the namespace, which is what we want.
    config.addinivalue_line("filterwarnings", "ignore:Dynamo detected a call to a `functools.lru_cache`")
