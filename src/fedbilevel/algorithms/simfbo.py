"""SimFBO, ShroFBO and MemFBO: x, y and v move together by local steps; one round an iteration, a server step of its own.

After Yang, Xiao & Ji, "SimFBO: Towards Simple, Flexible and Communication-efficient Federated Bilevel Optimization",
NeurIPS 2023, arXiv 2305.19442, and for MemFBO after an AAAI 2025 paper on memory-efficient federated bilevel optimisation.
One round an iteration is published; the update is REMEMBERED, not verified. With D_i(z) as in `simultaneous`:

    moves      z_i = z, tau_i times  z_i -= (outer_lr, inner_lr, hessian_lr) D_i(z_i)           up z_i - z
    server     z += server_lr mean (z_i - z),   then v is projected on |v| <= radius, where that is given

In the paper's letters: local steps eta_z, coefficients a_ik = 1, h_{z,i} = sum_k a_ik D_i, and gamma_z = server_lr eta_z.

The fixed point is where mean_i sum_k D_i(z_i^k) = 0. With one local step that is the solution. With tau >= 2 it is beside
it, by the order of the steps, where clients differ: no control variates. And with unequal tau_i (`client_steps`) clients
count in proportion to their steps: even with tiny steps the limit is the solution of the problem with weights tau_i / sum
tau.

ShroFBO removes the latter: up (z_i - z) / tau_i and tau_i; server z += server_lr mean (tau_i) mean ((z_i - z) / tau_i). One
number more up.

MemFBO asks first-order oracles only: H v and J v by central differences of d_y g and d_x g between y + d v and y - d v with
|d v| = `distance`. Its error is of the order distance^2 (third derivatives), and rounding over distance. Messages are
SimFBO's.

Floats per client and round: down dx + 2 dy, up dx + 2 dy.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
import optax.tree
from jaxtyping import PyTree

from ..algorithm import About, choice, rate
from ..errors import check
from ..federation import Client, Federation
from .components.directions import first_order_direction
from .components.steps import norm
from .simultaneous import LocalRounds


def _counts(steps: Any) -> Any:
    """A tuple of whole numbers; also from words such as "1,5,20"."""
    words = steps.split(",") if isinstance(steps, str) else []
    if words and all(word.strip().isdecimal() for word in words):
        return tuple(map(int, words))
    return tuple(steps) if isinstance(steps, list) else steps


class SimFBO(LocalRounds):
    """SimFBO (NeurIPS 2023; update remembered): x, y, v in one round; a floor for two or more local steps.

    Args:
        inner_lr, hessian_lr, outer_lr: the step of ONE local step of y, of v and of x. `hessian_lr="auto"` measures the
            curvature (ours; up to five rounds every 20 iterations, at first more often).
        local_steps: local steps a round.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows.
        server_lr: the server's step along the mean of the clients' moves.
        radius: the largest |v|; None: any.
        client_steps: each client's number of local steps, in place of `local_steps`: a tuple with one for each client.
    """

    about: ClassVar[About] = About(
        name="simfbo",
        rounds="1",
        when="short messages, one local step; a floor for more",
        hypergradient="right with one local step; else off by the order of the steps",
        lower="the same",
        busy={"client_steps": (1, 2, 3, 1, 2, 3, 1, 2), "radius": 3.0},
    )

    server_lr: Any = rate(1.0)
    radius: Any = rate(None)
    client_steps: Any = choice(None, _counts)

    def __check_init__(self):
        chosen, name = self.client_steps, type(self).__name__
        whole = lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1
        good = chosen is None or (isinstance(chosen, tuple) and len(chosen) > 0 and all(map(whole, chosen)))
        check(
            good, f"{name}(client_steps=...) is each client's number of local steps, a tuple of counts; got {chosen!r}."
        )

    @property
    def local_factors(self):
        return max(self.client_steps or (self.local_steps,)) > 1

    @property
    def mean_steps(self):
        return self.local_steps if self.client_steps is None else sum(self.client_steps) / len(self.client_steps)

    def steps(self, client):
        return self.local_steps if self.client_steps is None else jnp.asarray(self.client_steps)[client.index]

    def step(self, fed, state):
        given, name = self.client_steps, type(self).__name__
        good = given is None or len(given) == fed.clients
        check(good, f"{name}(client_steps={given}) has a number for each client, and there are {fed.clients} clients.")
        return super().step(fed, state)

    def arrive(self, z, moved):
        x, y, v = optax.tree.add_scale(z, self.server_lr, moved)
        if self.radius is not None:
            length = norm(v)
            v = optax.tree.scale(jnp.where(length > self.radius, self.radius / length, 1), v)
        return x, y, v


class ShroFBO(SimFBO):
    """ShroFBO (NeurIPS 2023; update remembered): SimFBO in which clients with more local steps do not count more.

    The arguments are `SimFBO`'s.
    """

    about: ClassVar[About] = About(
        name="shrofbo",
        rounds="1",
        when="as simfbo, where clients take unequal numbers of local steps",
        hypergradient="right with one local step; else off by the order of the steps",
        lower="the same",
        busy={"client_steps": (1, 2, 3, 1, 2, 3, 1, 2), "radius": 3.0},
    )

    def moved(self, fed: Federation, z: PyTree, lam: Any) -> PyTree:
        a_step, steps = fed.average(self.normalised, *z, lam)
        return optax.tree.scale(steps, a_step)

    def normalised(self, client: Client, x: PyTree, y: PyTree, v: PyTree, lam: Any) -> tuple[PyTree, Any]:
        """How far a local step goes on average, and how many there are."""
        steps = jnp.asarray(self.steps(client), norm(y).dtype)
        return optax.tree.scale(1 / steps, self.moves(client, x, y, v, lam)), steps


class MemFBO(SimFBO):
    """MemFBO (AAAI 2025; update remembered): SimFBO without second derivatives.

    Args:
        distance: how far the central differences reach to either side, |d v|.

    The other arguments are `SimFBO`'s.
    """

    about: ClassVar[About] = About(
        name="memfbo",
        rounds="1",
        when="as simfbo, where there are no second derivatives",
        hypergradient="as SimFBO's, by first-order oracles only",
        lower="the same",
        order="first",
        busy={"client_steps": (1, 2, 3, 1, 2, 3, 1, 2), "radius": 3.0},
    )

    distance: Any = rate(0.01)

    def direction(self, problem, z, inner, outer):
        return first_order_direction(problem, z, inner, outer, self.distance)
