# SPDX-License-Identifier: MIT
import array_api_strict
import jax
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "core", max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("core")
torch.set_num_threads(1)
jax.config.update("jax_enable_x64", True)  # gradients are checked in float64; one test turns it off again
# What a compiled library could not do either: no index by a boolean, no shape that depends on values, no extension.
array_api_strict.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=())


def pytest_configure(config):
    # Dynamo remarks that it traces through array-api-compat's cached look-up of the namespace, which is what we want.
    config.addinivalue_line("filterwarnings", "ignore:Dynamo detected a call to a `functools.lru_cache`")
