"""A new method from components that ship: FedNest, whose v is kept and goes on from one iteration to the next."""

import optax.tree
from jaxtyping import PyTree

from fedbilevel.algorithm import Algorithm, State, Truncation, component, count, rate
from fedbilevel.algorithms.components import lower, neumann, upper


class Kept(State):
    v: PyTree  # it follows H^-1 d_y f as y follows y*: a few factors an iteration are enough


class WarmNest(Algorithm):
    """FedNest's levels, and between them v <- v - inner_lr (H v - d_y f), T times each: 3T+3 rounds."""

    inner_rounds: int = count(2)
    inner_lr: float = rate(0.1)
    outer_lr: float = rate(0.1)
    lower = component(lambda self: lower.CorrectedLower(self.inner_rounds, self.inner_lr))
    series = component(lambda self: neumann.NeumannSeries(neumann.AutoStep(self.inner_lr), Truncation("full")))
    upper = component(lambda self: upper.CorrectedUpper(self.outer_lr))

    def init(self, x, y):
        return Kept(x, y, optax.tree.zeros_like(y))

    def step(self, fed, state):
        h, y, v = self.follow(fed, state)
        return Kept(self.upper.move(fed, state.x, y, v, h, None), y, v), {"hypergradient_norm": optax.tree.norm(h)}

    def estimate(self, fed, x, y):
        return self.follow(fed, self.init(x, y))[:2]

    def follow(self, fed, state):
        x, (y, _) = state.x, self.lower.rounds(fed, state.x, state.y)
        start = fed.average(self.series.start, x, y)
        turn = lambda n, v: optax.tree.add_scale(fed.average(self.series.factor, x, y, v, None), self.inner_lr, start)
        v = fed.repeat(self.inner_rounds, turn, state.v)
        return self.upper.estimate(fed, x, y, v, None), y, v
