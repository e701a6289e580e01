# SPDX-License-Identifier: MIT
"""The one seam to the array libraries. A project that vendors this folder changes this file, or puts its own
``_array_api_compat_vendor`` beside the folder, and nothing else."""

try:
    from .._array_api_compat_vendor import array_namespace, device, is_jax_array, is_torch_array
except ImportError:
    from array_api_compat import array_namespace, device, is_jax_array, is_torch_array

__all__ = ["array_namespace", "device", "stop_gradient", "widen"]


def stop_gradient(x, /):
    """The same values as a constant. The array API has no word for this, hence the branch per library."""
    if is_torch_array(x):
        return x.detach()
    if is_jax_array(x):
        from jax.lax import stop_gradient as jax_stop_gradient  # here, so that importing the core imports no JAX

        return jax_stop_gradient(x)
    return x


def widen(xp, x, /):
    """Half precision as float32, anything else as it is.

    bfloat16 holds 8 significant bits: a mean over K rollouts or L tokens would round at every addition. Callers
    widen, compute, and round once at the end.
    """
    return xp.astype(x, xp.float32) if xp.finfo(x.dtype).bits < 32 else x
