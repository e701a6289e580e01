# SPDX-License-Identifier: MIT
"""The one seam to the array libraries. A project that vendors this folder changes this file, or puts its own
``_array_api_compat_vendor`` beside the folder, and nothing else."""

import sys

HOOK = f"{__package__.rpartition('.')[0]}._array_api_compat_vendor"
try:
    from .._array_api_compat_vendor import array_namespace, device, is_jax_array, is_torch_array
except ImportError as absent:
    # No such file, or no package around this folder. An error inside the file is for whoever wrote it.
    if "." in __package__ and not (isinstance(absent, ModuleNotFoundError) and absent.name == HOOK):
        raise
    try:
        from array_api_compat import array_namespace, device, is_jax_array, is_torch_array
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f'pip install "array-api-compat>=1.13", or vendor it as {HOOK}') from None

__all__ = ["array_namespace", "device", "is_traced", "stop_gradient", "widen"]


def is_traced(x, /):
    """Whether a number may have no value yet: it is one of JAX's tracers, or torch.compile is reading the program."""
    torch = sys.modules.get("torch")  # if it is not imported yet, it is not compiling
    if torch and torch.compiler.is_compiling():
        return True
    if not is_jax_array(x):
        return False
    from jax.core import Tracer  # here, so that importing the core imports no JAX

    return isinstance(x, Tracer)


def stop_gradient(x, /):
    """The same values as a constant. The array API has no word for this, hence the branch per library."""
    if is_torch_array(x):
        return x.detach()
    if type(x).__module__ != "numpy" and is_jax_array(x):  # torch.compile cannot ask NumPy's numbers that
        from jax.lax import stop_gradient as jax_stop_gradient  # here, so that importing the core imports no JAX

        return jax_stop_gradient(x)
    return x


def widen(xp, x, /):
    """Half precision as float32, anything else as it is.

    bfloat16 holds 8 significant bits: a mean over K rollouts or L tokens would round at every addition. Callers
    widen, compute, and round once at the end.
    """
    return xp.astype(x, xp.float32) if xp.finfo(x.dtype).bits < 32 else x
