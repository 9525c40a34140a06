"""Call sites of `fed.average`: what travels there, and its size.

A site is known by its place in the program: a path of positions within the nested loops, so that tracing a loop body
twice finds the same site.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from .. import owned
from ..errors import InputError, check
from ..federation import Combine, Flag, Replies, Way, When
from ..problem import describe

Path: TypeAlias = tuple[int, ...]
Wanted: TypeAlias = tuple[Flag, ...]  # one for each part of a reply
_WAYS = typing.get_args(Way)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a message or reply: its size, and which of the site's flags decides whether it travels (None: always)."""

    label: str
    bytes: int
    flag: int | None


@dataclasses.dataclass(frozen=True)
class Site:
    """One call of `fed.average` in the program: what travels there.

    Attributes:
        path: its place in the program.
        name: the client method.
        message, reply: the structure that both sides know (pytrees of shapes and dtypes; `When` nodes in the message).
        down, up: the parts that travel, with their sizes for one client.
        flags: how many conditional parts there are, down and up.
        cohort: how many clients are asked.
        round: whether it is a round of its own, or asks in the round of the exchange before.
        combine: how each part of the reply is combined.
    """

    path: Path
    name: str
    message: PyTree
    reply: PyTree
    down: tuple[Part, ...]
    up: tuple[Part, ...]
    flags: int
    cohort: int
    round: bool = True
    combine: tuple[Way, ...] = ("mean",)


def is_static(flag: Flag) -> bool:
    """Whether a flag is the Python constant True: the part always travels."""
    return flag is True


def normalise(message: PyTree) -> tuple[PyTree, list[Flag]]:
    """Leaves as arrays, absent parts zero; and the flags of the message's `When` parts."""
    flags: list[Flag] = []

    def visit(part: PyTree) -> PyTree:
        if not isinstance(part, When):
            return jax.tree.map(_as_array, part)
        flags.append(part.present)
        value = jax.tree.map(jnp.asarray, part.value)
        if is_static(part.present):
            return When(jnp.asarray(True), value)
        present = jnp.asarray(part.present, bool)
        return When(present, jax.tree.map(lambda leaf: jnp.where(present, leaf, jnp.zeros_like(leaf)), value))

    return jax.tree.map(visit, message, is_leaf=lambda part: isinstance(part, When)), flags


def _as_array(leaf: ArrayLike) -> Array:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)  # the same object: features know x by it


def wanted_flags(replies: Replies) -> Wanted:
    """The flags of a reply's parts, as a tuple."""
    if replies is True:
        return (True,)
    good = isinstance(replies, tuple) and len(replies) > 0
    check(good, f"replies= is True, or a tuple with one flag per part of the reply; got {replies!r}.")
    assert isinstance(replies, tuple)
    return replies


def parts_wanted(replies: Replies, combine: Combine) -> tuple[Wanted, Combine]:
    """(The flags of a reply's parts, how they are combined: in one way, or in one for each part).

    Raises:
        InputError: `combine` names another way, or has not as many parts as `replies`.
    """
    ways = combine if isinstance(combine, tuple) else (combine,)
    check(
        len(ways) > 0 and all(isinstance(way, str) and way in _WAYS for way in ways),
        'fed.average(combine=...) is "mean" or "maximum", or a tuple with one of them for each part of the reply; '
        f"got {combine!r}.",
    )
    if not isinstance(combine, tuple):
        return wanted_flags(replies), combine
    wanted = (True,) * len(combine) if replies is True else wanted_flags(replies)
    check(
        len(wanted) == len(combine),
        f"fed.average(combine=...) has {len(combine)} ways to combine, and replies= {len(wanted)} flags: "
        "give one of each for each part of the reply.",
    )
    if len(combine) == 1:  # the whole reply, not a tuple of one
        return wanted, combine[0]
    return wanted, combine


def check_parts(where: str, combine: Combine, reply: PyTree) -> None:
    """Refuse a reply that has not as many parts as there are ways to combine them."""
    fits = not isinstance(combine, tuple) or (isinstance(reply, tuple) and len(reply) == len(combine))
    check(
        fits,
        lambda: (
            f"combine= has {len(combine)} ways to combine the reply of {where}, which is {describe(reply)}: "
            "return a tuple of as many parts."
        ),
    )


def reply_parts(reply: PyTree, wanted: Wanted) -> tuple:
    """The parts of a reply, one per flag."""
    if len(wanted) == 1:
        return (reply,)
    if not (isinstance(reply, tuple) and len(reply) == len(wanted)):
        raise InputError(
            f"replies= has {len(wanted)} flags, but the client's reply is {describe(reply)}: "
            "return a tuple of as many parts."
        )
    return reply


def mask_reply(reply: PyTree, wanted: Wanted) -> PyTree:
    """The reply with zeros in place of the parts that did not travel."""
    parts = tuple(
        part if is_static(flag) else jax.tree.map(lambda a, f=flag: jnp.where(f, a, jnp.zeros_like(a)), part)
        for part, flag in zip(reply_parts(reply, wanted), wanted, strict=True)
    )
    return parts[0] if len(wanted) == 1 else parts


def size(tree: PyTree) -> int:
    """Bytes of a pytree of arrays; what is kept at the sites has none."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(owned.travelling(tree)))


def site(
    path: Path,
    name: str,
    message: PyTree,
    reply: PyTree,
    sent: list[Flag],
    wanted: Wanted,
    cohort: int,
    counts: bool,
    combine: Combine,
) -> Site:
    """What travels at a call site, from the message and one client's reply."""
    if owned.nodes(message):  # a client is sent its own blocks
        message = owned.own(jax.eval_shape(lambda: message), 0)
    shapes = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    flag = iter(range(len(sent) + len(wanted)))
    number = lambda value: None if is_static(value) else next(flag)
    down = []
    flags = iter(sent)
    for place, part in enumerate(message):
        always = 0
        for piece in jax.tree.leaves(part, is_leaf=lambda p: isinstance(p, When) or owned.is_block(p)):
            if isinstance(piece, When):
                down.append(Part(str(place), size(piece.value), number(next(flags))))
            else:
                always += size(piece)
        if always:
            down.append(Part(str(place), always, None))
    up = [
        Part(str(i), size(part), number(f))
        for i, (part, f) in enumerate(zip(reply_parts(reply, wanted), wanted, strict=True))
    ]
    flags = next(flag, len(sent) + len(wanted))
    ways = combine if isinstance(combine, tuple) else (combine,) * len(up)
    return Site(path, name, shapes(message), shapes(reply), tuple(down), tuple(up), flags, cohort, counts, ways)
