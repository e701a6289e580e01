# SPDX-License-Identifier: MIT
"""Moving rows between flat and grouped layouts, and choosing negatives."""

from typing import Any, NamedTuple

from ._checks import NUMBER, check_count, check_shape, namespace
from ._compat import device, is_traced

STRINGS_OR_OBJECTS = ("S", "T", "U", "O")  # as NumPy's dtypes call them; the array API has no such kinds


class GroupOrder(NamedTuple):
    """How to sort rows into groups and back; see :func:`group_by`.

    Attributes
    ----------
    order : array, shape (N,), integer
        ``flat[order]`` has the rows of a group side by side.
    inverse : array, shape (N,), integer
        ``flat[order][inverse]`` is ``flat``.
    """

    order: Any
    inverse: Any


def group(flat, /, k: int):
    """Give each prompt a row of its k consecutive entries.

        grouped[b, j] = flat[b*k + j]

    Parameters
    ----------
    flat : array, shape (B*K, ...), any dtype
        The rollouts of a prompt side by side, as TRL, OpenRLHF and Tunix keep them.
    k : int
        Rollouts per prompt.

    Returns
    -------
    array, shape (B, K, ...), dtype of ``flat``

    Raises
    ------
    ValueError
        For an array without axes, k < 1, or a first axis that k does not divide.
    TypeError
        For what is no array; it is a ValueError as well.

    Notes
    -----
    Gradient: flows, entries are only renamed.
    NaN: moved like any value.

    References
    ----------
    arXiv 2606.08480, Section 3.3 (the rollout group).

    Examples
    --------
    >>> import numpy as np
    >>> group(np.asarray([1, 2, 3, 4]), 2).tolist()
    [[1, 2], [3, 4]]
    """
    xp = namespace({"flat": flat})
    k = check_count("k", k)
    shape = tuple(flat.shape)
    if not shape or shape[0] % k:
        raise ValueError(
            f"flat: expected shape (B*k, ...) with k={k}, got {shape}; pass all k rollouts of every prompt"
        )
    return xp.reshape(flat, (shape[0] // k, k, *shape[1:]))


def ungroup(grouped, /):
    """Undo :func:`group`: one axis for prompts and rollouts.

        flat[b*K + j] = grouped[b, j]

    Parameters
    ----------
    grouped : array, shape (B, K, ...), any dtype

    Returns
    -------
    array, shape (B*K, ...), dtype of ``grouped``

    Raises
    ------
    ValueError
        For an array with fewer than two axes.
    TypeError
        For what is no array; it is a ValueError as well.

    Notes
    -----
    Gradient: flows, entries are only renamed.
    NaN: moved like any value.

    References
    ----------
    arXiv 2606.08480, Section 3.3 (the rollout group).

    Examples
    --------
    >>> import numpy as np
    >>> ungroup(np.asarray([[1, 2], [3, 4]])).tolist()
    [1, 2, 3, 4]
    """
    xp = namespace({"grouped": grouped})
    shape = tuple(grouped.shape)
    if len(shape) < 2:
        raise ValueError(f"grouped: expected shape (B, K, ...), got {shape}; use group(flat, k) to get there")
    return xp.reshape(grouped, (shape[0] * shape[1], *shape[2:]))


def group_by(index, /) -> GroupOrder:
    """The order that brings rows of equal id together, for stacks that keep them anywhere (verl's uid).

        index[order] = a a a b b b ...        order[inverse] = 0 1 2 3 ...

    Groups come in the order of their first row, and a group's rows keep their order, so that arrays with one entry
    per prompt still fit.

    Parameters
    ----------
    index : array, shape (N,), integers
        Id of the group of each row, in any order. NumPy arrays of strings, or of objects of one type, work too.

    Returns
    -------
    GroupOrder
        ``order`` and ``inverse``, integers (N,). With K rows per group, ``group(flat[order], K)`` is grouped and
        ``ungroup(grouped)[inverse]`` is back in the order of ``index``.

    Raises
    ------
    ValueError
        For a wrong shape or dtype, or groups of unequal size: the message names a larger and a smaller one.
    TypeError
        For what is no array; it is a ValueError as well.

    Notes
    -----
    Gradient: none, indices.
    NaN: not an id.

    The one function that looks at values, to refuse ragged groups. So it waits for the device and cannot be traced:
    call it outside ``jit`` and ``compile``.

    References
    ----------
    arXiv 2606.08480, Section 3.3 (the rollout group).

    Examples
    --------
    >>> import numpy as np
    >>> uid = np.asarray([7, 3, 7, 3])
    >>> order, inverse = group_by(uid)
    >>> uid[order].tolist(), order.tolist(), uid[order][inverse].tolist()
    ([7, 7, 3, 3], [0, 2, 1, 3], [7, 3, 7, 3])
    """
    xp = namespace({"index": index})
    check_shape(xp, "index", index, "N", {}, kind=None)
    kind = getattr(index.dtype, "kind", None)  # NumPy's, one letter
    if kind not in STRINGS_OR_OBJECTS and not xp.isdtype(index.dtype, "integral"):
        raise ValueError(f"index: expected integers, or strings in NumPy, got {index.dtype}; number the groups")
    if kind == "O" and (index != index).any():  # NaN equals nothing, not even itself
        raise ValueError("index: expected ids, got NaN; give each group one, or drop the rows that have none")
    try:
        (ids, sizes), by_id = xp.unique_counts(index), xp.argsort(index, stable=True)
    except TypeError:  # objects, of which some cannot be compared; or JAX cannot look at the values
        if is_traced(index):
            raise ValueError("index: expected ids that are known, got traced ones; call it outside jit") from None
        raise ValueError("index: expected ids of one type, got several; make all of them strings") from None
    most, least = int(xp.argmax(sizes)), int(xp.argmin(sizes))
    if int(sizes[most]) != int(sizes[least]):
        raise ValueError(
            f"index: expected groups of one size, got {int(sizes[most])} rows of id {ids[most]} and "
            f"{int(sizes[least])} of id {ids[least]}; drop or complete the odd ones"
        )
    rows = group(by_id, int(sizes[most]))  # one group per row, sorted by id
    order = ungroup(xp.take(rows, xp.argsort(rows[:, 0], stable=True), axis=0))
    return GroupOrder(order, xp.argsort(order, stable=True))


def in_batch_negatives(keys, /, *, k: int, m: int):
    """Draw m negatives per prompt from the rollouts of the other prompts.

        negatives[b] = the m rollouts j with the smallest keys[b, j], among those outside b*k .. b*k + k-1

    With independent uniform keys this is a uniform draw without repetition. The caller brings the randomness, so the
    draw is reproducible with any library's generator.

    Parameters
    ----------
    keys : array, shape (B, B*k), real numbers
        One random number per prompt and rollout. Entries of the own group are ignored, whatever they are.
    k : int
        Rollouts per prompt; rollouts b*k to b*k + k-1 belong to prompt b.
    m : int
        Negatives per prompt. More make the reliability gate stricter.

    Returns
    -------
    array, shape (B, m), integer, in 0..B*k-1
        Indices into the flat (B*k) rollouts, distinct within a row.

    Raises
    ------
    ValueError
        For a wrong shape or dtype, k < 1, m < 1, or m > (B-1)*k.
    TypeError
        For what is no array; it is a ValueError as well.

    Notes
    -----
    Gradient: none, indices.
    NaN: no key; whether it is drawn first or last is the library's affair, but never from the own group.

    Of equal keys the earlier rollout wins, so keys should come from a continuous distribution. They are B x B*k
    numbers: for a large batch draw within parts of its prompts. Where a prompt can stand twice in a batch, add 1 to the
    keys that belong to its copies: then they are drawn last.

    References
    ----------
    arXiv 2606.08480, Section 5 (reward-side diagnostic: in-batch negatives).

    Examples
    --------
    >>> import numpy as np
    >>> keys = np.asarray([[0.0, 0.0, 0.9, 0.1], [0.8, 0.2, 0.0, 0.0]])
    >>> in_batch_negatives(keys, k=2, m=1).tolist()
    [[3], [1]]
    """
    xp = namespace({"keys": keys})
    sizes = {}
    k, m = check_count("k", k), check_count("m", m)
    check_shape(xp, "keys", keys, "B N", sizes, kind=NUMBER)
    B, N = sizes["B"], sizes["N"]
    if B * k != N:
        raise ValueError(
            f"keys: expected shape (B={B}, B*k={B * k}), got {(B, N)}; draw one key per prompt and rollout"
        )
    if m > N - k:
        raise ValueError(
            f"m: expected at most (B-1)*k = {N - k} with B={B} and k={k}, got {m}; "
            "lower m, or use more prompts or rollouts per batch"
        )
    # The own group is left out of the table instead of given a huge key, which another key could tie with.
    column = xp.arange(N - k, device=device(keys))[None, :]
    own = xp.arange(B, device=device(keys))[:, None] * k
    others = xp.where(column < own, column, column + k)  # (B, (B-1)*k)
    try:
        keys = xp.take_along_axis(keys, others, axis=1)
        if m == 1:  # the smallest is found in a fraction of the time that it takes to sort
            chosen = xp.argmin(keys, axis=1, keepdims=True)
        else:
            chosen = xp.argsort(keys, axis=1, stable=True)[:, :m]
    except NotImplementedError:  # torch cannot index, or compare, uint16, uint32 and uint64
        raise ValueError(f"keys: expected a dtype that torch can index, got {keys.dtype}; convert it") from None
    return xp.take_along_axis(others, chosen, axis=1)
