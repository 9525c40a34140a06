"""An algorithm of one exchange: of a part of the reply it takes the mean, of another the maximum."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax.tree

import fedbilevel as fb

PARTS = ("mean", "maximum")


class Seen(fb.State):
    """x and y, which stay, and the sum of what came back."""

    seen: Any


class Parts(fb.Algorithm):
    """Sums up the replies of an exchange; what is asked and drawn does not depend on them.

    So what one `how` sees, part by part, can be compared with what another one does.

    Args:
        how: "parts"; "mean" or "maximum" of the whole reply; "two" exchanges with one cohort that
            the program draws, or "one" of parts.
        batch_size: rows of a minibatch.
    """

    how: str = fb.option("parts")
    batch_size: int | None = fb.count(None)

    def init(self, x, y):
        return Seen(x, y, (_first(x, y), _second(y)))

    def client_init(self, x, y):
        return jnp.zeros(())

    def step(self, fed, state):
        x, y = state.x, state.y
        if self.how == "two":
            cohort = fed.draw_cohort()
            came = fed.average(self.first, x, y, cohort=cohort), fed.maximum(self.second, x, y, cohort=cohort)
        elif self.how == "one":
            came = fed.average(self.both, x, y, cohort=fed.draw_cohort(), combine=PARTS)
        else:
            came = fed.average(self.both, x, y, combine=PARTS if self.how == "parts" else self.how)
        return Seen(x, y, optax.tree.add(state.seen, came)), {"seen": optax.tree.norm(state.seen)}

    def both(self, client, x, y):
        """Two parts of several leaves, from fresh rows and from how often the client was asked."""
        return fb.Reply((self.first(client, x, y), self.second(client, x, y)), client.state + 1)

    def first(self, client, x, y):
        h, g = client.problem.outer_gradients(x, y, client.batch("outer", self.batch_size))
        return {"h": h, "g": optax.tree.scale(1 + client.state, g)}

    def second(self, client, x, y):
        """Of numbers below zero too: where nobody answers in a slot, zero is no maximum."""
        rows = client.batch("inner", self.batch_size)
        curved = client.problem.hessian_vector(x, y, y, rows)
        return {"curved": curved, "slope": -optax.tree.norm(client.problem.inner_gradient(x, y, rows)) - client.state}


class Careful(fb.Algorithm):
    """Two steps on y, the first of which is shorter where the steepest client is steep.

    So y depends on both parts, and the second travels only with the first step.
    """

    inner_lr: Any = fb.rate(0.1)
    batch_size: int | None = fb.count(None)

    def step(self, fed, state):
        def turn(t, y):
            wanted = True, t == 0
            gradient, steepest = fed.average(self.both, state.x, y, replies=wanted, combine=PARTS)
            return optax.tree.add_scale(y, -self.inner_lr / (1 + steepest), gradient)

        return fb.State(state.x, fed.repeat(2, turn, state.y)), {}

    def both(self, client, x, y):
        gradient = client.problem.inner_gradient(x, y, client.batch("inner", self.batch_size))
        return gradient, optax.tree.norm(gradient)


def _first(x, y):
    return {"h": optax.tree.zeros_like(x), "g": optax.tree.zeros_like(y)}


def _second(y):
    return {"curved": optax.tree.zeros_like(y), "slope": jnp.zeros(())}


def ledger(result):
    """Cumulative rounds and bytes, row by row."""
    return np.array([[row[name] for name in ("rounds", "bytes_down", "bytes_up")] for row in result.history])
