"""`outer_optimizer=`: an optax transformation of x - mean x_i at the server, as it is given or by name."""

from __future__ import annotations

import jax
import numpy as np
import optax
import optax.tree
from jaxtyping import PyTree

from ...algorithm import Component, choice
from ...errors import check

NAMED = ("sgd", "adam", "adamw", "adagrad", "rmsprop", "yogi", "amsgrad", "lion")


Optimizer = optax.GradientTransformation | str | None


class OuterOptimizer(Component):
    """The server's step on x, given the mean of the clients' x_i. What it keeps is optax's state; None if there is none.

    Args:
        optimizer: an optax transformation, its name and learning rate as in "adam:0.01", or None: the mean itself.
        owner: whose setting it is, for sentences.

    Raises:
        InputError: the optimizer is nothing of these.
    """

    optimizer: Optimizer = choice(None)
    owner: str = choice("OuterOptimizer")

    def __check_init__(self):
        resolve(self.optimizer, self.owner)

    def begin(self, x: PyTree) -> PyTree:
        """What is kept at the start."""
        chosen = resolve(self.optimizer, "")
        return None if chosen is None else chosen.init(x)

    def step(self, x: PyTree, mean: PyTree, kept: PyTree) -> tuple[PyTree, PyTree]:
        """(The next x, what is kept): the mean, or the optimizer's step along x - mean."""
        chosen = resolve(self.optimizer, "")
        if chosen is None:
            return mean, kept
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic relies on it
            updates, after = chosen.update(optax.tree.sub(x, mean), kept, x)
        return optax.apply_updates(x, updates), after


def begin(optimizer: Optimizer, x: PyTree) -> dict[str, PyTree]:
    """`OuterOptimizer.begin`, for states that keep things by name."""
    return {} if optimizer is None else {"optimizer": OuterOptimizer(optimizer).begin(x)}


def outer_step(
    optimizer: Optimizer, x: PyTree, mean: PyTree, kept: dict[str, PyTree]
) -> tuple[PyTree, dict[str, PyTree]]:
    """`OuterOptimizer.step`, for states that keep things by name."""
    if optimizer is None:
        return mean, kept
    x, after = OuterOptimizer(optimizer).step(x, mean, kept["optimizer"])
    return x, {**kept, "optimizer": after}


def resolve(optimizer: Optimizer, owner: str) -> optax.GradientTransformation | None:
    """The transformation: None, one of optax's, or words such as "adam:0.01", one of optax's names and its learning rate.

    Raises:
        InputError: it is nothing of these.
    """
    if optimizer is None or isinstance(optimizer, optax.GradientTransformation):
        if optimizer is not None and owner:
            _check_update(optimizer, owner)
        return optimizer
    name, _, rate = optimizer.partition(":") if isinstance(optimizer, str) else ("", "", "")
    try:
        value = float(rate or "nan")
    except ValueError:
        value = float("nan")
    check(
        name in NAMED and 0 < value < float("inf"),
        f"{owner}(outer_optimizer=...) is an optax transformation, or its name and learning rate as in 'adam:0.01' "
        f"({', '.join(NAMED)}); got {optimizer!r}.",
    )
    return getattr(optax, name)(value)


def _check_update(optimizer: optax.GradientTransformation, owner: str) -> None:
    """Refuse a transformation whose update needs more than updates, state and parameters."""
    x = jax.ShapeDtypeStruct((2,), np.float32)
    try:
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(lambda x: optimizer.update(x, optimizer.init(x), x), x)
    except TypeError as error:
        check(
            "required keyword-only argument" not in str(error) and "required positional argument" not in str(error),
            f"{owner}(outer_optimizer=...) needs more than the direction of its step ({error}): line searches and "
            "plateau schedules ask for values of the loss, which an iteration does not compute. Take another, such as "
            "optax.adam(0.01).",
        )
    except Exception:  # it is made for x of another structure: tried when there is one
        pass
