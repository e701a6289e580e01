# SPDX-License-Identifier: MIT
"""Refusals. They read shapes, dtypes and settings, never array values: a value would have to come from the device,
and a traced array has none."""

from fractions import Fraction
from functools import lru_cache

from ._compat import array_namespace, is_traced, stop_gradient

AXES = {"B": "prompts", "K": "rollouts per prompt", "M": "negatives", "L": "tokens", "L*": "tokens", "N": "rows"}
REAL = "real floating"
NUMBER = ("integral", "real floating")
TIES = ("min", "max", "average")
UNLIKE = ("matrix", "MaskedArray")  # NumPy's arrays whose arithmetic is another: always two axes, or gaps


class NoSuchArray(TypeError, ValueError):
    """An argument that is no array, or one of another library. Python calls that a TypeError; every other refusal here
    is a ValueError, and whoever catches those shall catch this one too."""


def namespace(arrays, optional=None):
    """The library of the arrays, given by name; refuse what is no array and what comes from another library.

    ``optional`` holds arguments that may be None.
    """
    given = arrays | {name: array for name, array in optional.items() if array is not None} if optional else arrays
    xp = first = kind = None
    for name, array in given.items():
        if type(array) is kind:
            continue  # of the same library, without asking again
        try:
            found = array_namespace(array)
        except TypeError:
            found = None
        if found is None or (first and found is not xp) or type(array).__name__ in UNLIKE:
            wanted = f"an array of the library of {first} ({_type(given[first])})" if first else "an array"
            remedy = "pass one" if array is None else "convert it first"
            raise NoSuchArray(f"{name}: expected {wanted}, got {_type(array)}; {remedy}")
        xp, first, kind = found, first or name, type(array)
    return xp


def _type(value):
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def check_shape(xp, name, array, letters, sizes, *, kind=REAL):
    """Refuse an array whose axes are not ``letters`` or disagree with ``sizes``; note its sizes there.

    ``kind`` is a dtype kind in the array API's names, or None for any.
    """
    wanted, shape = letters.split(), tuple(array.shape)
    fits = len(shape) == len(wanted)
    for axis, size in zip(wanted, shape, strict=False):
        fits = fits and sizes.setdefault(axis, size) == size
    if not fits:
        spec = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in wanted)
        spec += "," if len(wanted) == 1 else ""
        meaning = ", ".join(f"{axis} {AXES[axis]}" for axis in wanted)
        raise ValueError(f"{name}: expected shape ({spec}), got {shape}; nothing broadcasts, so bring it to {meaning}")
    if 0 in shape:
        axis = wanted[shape.index(0)]
        raise ValueError(f"{name}: expected {axis} >= 1, got shape {shape}; pass some {AXES[axis]}")
    if kind is not None:
        check_dtype(xp, name, array, kind)


def check_same_shape(xp, name, array, like_name, like, *, kind):
    """Refuse an array that has not exactly the shape of another."""
    if tuple(array.shape) != tuple(like.shape):
        raise ValueError(
            f"{name}: expected the shape of {like_name}, {tuple(like.shape)}, got {tuple(array.shape)}; "
            f"nothing broadcasts, so give it one entry per entry of {like_name}"
        )
    check_dtype(xp, name, array, kind)


def check_dtype(xp, name, array, kind):
    """Refuse a dtype that is not of ``kind`` (the array API's names)."""
    try:
        fits = xp.isdtype(array.dtype, kind)
    except TypeError:  # NumPy, asked about a dtype that is not its own, such as the bfloat16 of JAX
        fits = False
    if not fits:
        wanted = kind if isinstance(kind, str) else " or ".join(kind)
        remedy = "convert it first, with xp.astype or, in torch, .to(dtype)"
        raise ValueError(f"{name}: expected a {wanted} dtype, got {array.dtype}; {remedy}")


def check_ties(ties):
    if not isinstance(ties, str) or ties not in TIES:
        raise ValueError(f'ties: expected "min", "max" or "average", got {ties!r}; the default is "min"')


def check_count(name, value, *, least=1):
    """The setting as a Python int; refuse what is no whole number, or is below ``least``."""
    one = not isinstance(value, bool)
    if isinstance(value, int):  # asked first: a compiler's symbolic integer is one, and has no attributes
        count = value
    else:
        try:
            one, count = tuple(getattr(value, "shape", ())) == (), value.__index__()
            one = one and not _dtype_has(value, "bool")
        except (AttributeError, TypeError, RuntimeError):  # RuntimeError: torch.vmap over it
            one = False
    if not one or count < least:
        remedy = "make it static, for jax.jit by static_argnames" if is_traced(value) else "pass a Python int"
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}; {remedy}")
    return count


def as_number(name, value, *, traced_too=False):
    """The setting as a Python float, which changes no dtype and takes no gradient; refuse what is not one number.

    Where ``traced_too``, a number that is traced, and so has no value yet, passes, as a constant to the gradient.
    """
    if type(value) is float:  # asked first: the usual case, and a compiler's symbolic float, which has no attributes
        return value
    if not isinstance(value, int):  # nor has its symbolic integer
        if tuple(getattr(value, "shape", ())) != ():
            raise ValueError(f"{name}: expected one number, got shape {tuple(value.shape)}; pass one for all prompts")
        if traced_too and hasattr(value, "__float__") and is_traced(value):
            return stop_gradient(value)
    try:
        return _real(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as failure:
        if traced_too and isinstance(failure, RuntimeError):  # torch.vmap over it: a value for each of the batch
            return stop_gradient(value)
    if is_traced(value):
        remedy = "make it static, for jax.jit by static_argnames"
        raise ValueError(f"{name}: expected a number that is known while tracing, got a traced one; {remedy}")
    raise ValueError(f"{name}: expected one number that fits a float, got {_type(value)}; pass a Python float")


def _real(value):
    """The float of a number; Python would convert True, and NumPy a string and a complex number too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not hasattr(value, "__float__") or isinstance(value, (bool, str)) or _dtype_has(value, "bool", "complex"):
        raise TypeError
    return float(stop_gradient(value))


def _dtype_has(value, *words):
    return any(word in str(getattr(value, "dtype", "")) for word in words)


def check_finite(xp, name, value, array):
    """Refuse NaN, infinity, and what becomes infinite in the dtype that ``array`` is computed in (doubled, as by
    (K+1)/K): times the 0 of a prompt that is not admitted it is NaN. A traced number passes."""
    if isinstance(value, float):
        dtype = array.dtype if xp.finfo(array.dtype).bits >= 32 else xp.float32
        if not abs(value) <= min(float(xp.finfo(dtype).max) / 2, 2.0**1023):
            raise ValueError(
                f"{name}: expected a finite number, at most half of the largest {dtype}, got {value!r}; "
                "pass one, such as the default"
            )


def check_positive(name, value, *, zero_too=False):
    """The number as a float; refuse what is not above zero (NaN is not)."""
    value = as_number(name, value)
    if not (value > 0 or (zero_too and value == 0)):
        wanted = ">= 0" if zero_too else "> 0"
        raise ValueError(f"{name}: expected a number {wanted}, got {value!r}; pass one, such as the default")
    return value


def as_fraction(name, value):
    """The fraction that the caller meant: 0.29 is 29/100 and 1/3 a third, whatever their binary form.

    Binary rounding must not move a threshold: 0.29 * 100 is 28.999..., so rank 29 would fall on its wrong side.
    """
    value = as_number(name, value)
    fraction = _nearest_fraction(value) if 0 < value < 1 else None
    if fraction is None:
        raise ValueError(
            f"{name}: expected a fraction from 0.000001 to 0.999999, got {value!r}; "
            f"pass a share of the K rollouts, such as {'1/3' if name == 'tau' else '0.1'}"
        )
    return fraction


@lru_cache(maxsize=64)  # a run asks for the same two or three at every step
def _nearest_fraction(value):
    fraction = Fraction(value).limit_denominator(1000)
    near = fraction.numerator / fraction.denominator  # before torch 2.13, torch.compile traces no Fraction - float
    if abs(near - value) > value * 2.0**-24:  # further off than rounding to float32 can be: more digits are meant
        fraction = Fraction(value).limit_denominator(10**6)
    return fraction if 0 < fraction.numerator < fraction.denominator else None


def check_tau(tau, K):
    """The fraction tau, refused where not even rank 1 lies in the top tau * K."""
    fraction = as_fraction("tau", tau)
    if fraction.numerator * K < fraction.denominator:
        enough = -(-fraction.denominator // fraction.numerator)
        raise ValueError(
            f"tau: expected tau * K >= 1, got tau={tau!r} with K={K}, which admits nothing; "
            + f"raise tau to 1/{K} or more, or " * (K > 1) + f"sample K >= {enough} rollouts"
        )
    return fraction
