"""Tune a federated ridge regression with an algorithm of our own: averaged gradients, then a Neumann series."""

import jax
import jax.numpy as jnp
import optax.tree

import fedbilevel as fb
from fedbilevel.datasets import load


class Neumann(fb.Algorithm):
    """lr = inner_lr: y -= lr d_y g, then v -= lr (H v - d_y f), then x -= outer_lr h; inner_rounds + terms + 1 rounds."""

    inner_rounds: int = fb.count(10)
    terms: int = fb.count(10)
    inner_lr: float = fb.rate(0.1)
    outer_lr: float = fb.rate(0.3)

    def step(self, fed, state):
        h, y = self.estimate(fed, state.x, state.y)
        x = optax.tree.add_scale(state.x, -self.outer_lr, h)
        return fb.State(x, y), {"hypergradient_norm": optax.tree.norm(h)}

    def estimate(self, fed, x, y):
        down = lambda point, gradient: optax.tree.add_scale(point, -self.inner_lr, gradient)
        y = fed.repeat(self.inner_rounds, lambda t, y: down(y, fed.average(self.gradient, x, y)), y)
        zero = optax.tree.zeros_like(y)  # from here the series' terms add up: lr sum_k (I - lr H)^k d_y f
        v = fed.repeat(self.terms, lambda k, v: down(v, fed.average(self.residual, x, y, v)), zero)
        return fed.average(self.hypergradient, x, y, v), y

    def gradient(self, client, x, y):
        return client.problem.inner_gradient(x, y, client.inner)

    def residual(self, client, x, y, v):
        _, right_side = client.problem.outer_gradients(x, y, client.outer)
        return optax.tree.sub(client.problem.hessian_vector(x, y, v, client.inner), right_side)

    def hypergradient(self, client, x, y, v):
        direct, _ = client.problem.outer_gradients(x, y, client.outer)
        return optax.tree.sub(direct, client.problem.cross_vector(x, y, v, client.inner))


jax.config.update("jax_enable_x64", True)
print(fb.testing.check_algorithm(Neumann(), accurate=Neumann(inner_rounds=500, terms=500)))

diabetes, key = load("diabetes"), jax.random.key(0)
parts = fb.partition.by_quantity(len(diabetes.y_train), clients=8, key=key)
data = fb.FederatedData.split([(diabetes.x_train[p], diabetes.y_train[p]) for p in parts], outer=0.3, key=key)
error = lambda y, row: 0.5 * (row[0] @ y - row[1]) ** 2
problem = fb.Problem(lambda x, y, row: error(y, row) + 0.5 * jnp.exp(x) @ y**2, lambda x, y, row: error(y, row))
x, y = jnp.zeros(10), jnp.zeros(10)  # x: the logarithm of each feature's penalty; y: the weights
print(fb.protocol(Neumann(), problem, data, x, y), "\n")

loss = {"loss": lambda x, y: fb.reference.value(problem, data, x, y)}  # f(x, y*(x)), on the validation rows
solve = lambda engine: fb.solve(problem, data, Neumann(), x, y, 30, key=key, engine=engine, metrics=loss)
one, two = solve(fb.Simulation()), solve(fb.Loopback())
losses, gap = one.history.column("loss"), abs(one.x - two.x).max()
print(f"validation loss {losses[0]:.4f} -> {losses[-1]:.4f}; the two engines differ by {gap:.0e}")
assert losses[-1] < losses[0] and gap < 1e-12
