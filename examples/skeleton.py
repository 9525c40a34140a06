"""Start your own algorithm here: copy this file, rename the class, and change what is marked CHANGE.

As it stands it runs, but its hypergradient is crude: one term of the Neumann series. Write here the paper, the update
equations, and the rounds of one iteration: inner_rounds + 2.
"""

import optax.tree

import fedbilevel as fb


class Skeleton(fb.Algorithm):
    """What it does, in a sentence. Then each setting, in a line."""

    inner_rounds: int = fb.count(5)  # a count is at least 1; loops and shapes depend on it
    inner_lr: float = fb.rate(0.1)  # a rate is positive; a new value does not compile again
    outer_lr: float = fb.rate(0.1)
    batch_size: int | None = fb.count(None)  # None: all rows

    # The server sees no data. Each `fed.average` is one round: send, let every client compute, take the mean.

    def step(self, fed, state):
        h, y = self.estimate(fed, state.x, state.y)
        x = optax.tree.add_scale(state.x, -self.outer_lr, h)
        return fb.State(x, y), {"hypergradient_norm": optax.tree.norm(h)}  # scalars here become columns of the history

    def estimate(self, fed, x, y):
        def turn(t, y):  # CHANGE: the lower level, `inner_rounds` rounds of it
            return optax.tree.add_scale(y, -self.inner_lr, fed.average(self.gradient, x, y))

        y = fed.repeat(self.inner_rounds, turn, y)
        v = optax.tree.scale(self.inner_lr, fed.average(self.start, x, y))  # CHANGE: v should be near H^{-1} d_y f
        return fed.average(self.hypergradient, x, y, v), y

    # A client sees its own rows and the message, nothing else. Its methods are public, and return what it replies.

    def gradient(self, client, x, y):
        return client.problem.inner_gradient(x, y, client.batch("inner", self.batch_size))

    def start(self, client, x, y):
        return client.problem.outer_gradients(x, y, client.batch("outer", self.batch_size))[1]

    def hypergradient(self, client, x, y, v):
        direct, _ = client.problem.outer_gradients(x, y, client.batch("outer", self.batch_size))
        return optax.tree.sub(direct, client.problem.cross_vector(x, y, v, client.batch("inner", self.batch_size)))
