"""AdaFBiO: LocalBSGVRM with adaptive steps; one round for all local steps.

After Huang, "Faster Adaptive Federated Bilevel Optimization", arXiv 2211.01122. The equations are REMEMBERED, not verified.
With z = (x, y), K = `neumann_terms` and

    D_i(z) = ( h_i(x, y), d_y g_i(x, y) ),    h_i = d_x f_i - J_i v_i,   v_i a K-term Neumann estimate of H_i^{-1} d_y f_i

every client takes `local_steps` steps along a STORM estimate of D_i (`components/tracking.py`), and the server averages z
and the estimates e = (e_x, e_y). After every round it renews from them

    a <- keep a + (1 - keep) e_x^2    for each number of x,       b <- keep b + (1 - keep) |e_y|,       both 1 at first

and in the next round x moves along e_x / (sqrt(a) + damping) and y along e_y / (b + damping). The two travel with the
message.

The Hessian is each client's OWN: the mean of J_i H_i^{-1} d_y f_i is not J H^{-1} d_y f when clients differ. The fixed
point is where mean_i h_i(x, y*(x)) = 0, beside the solution, and no number of terms or rounds removes that
(`truncation="full"`: with v_i = lam sum_{n=0}^{K} (I - lam H_i)^n d_y f_i that point is known in closed form, and the tests
find it).

Floats per client and round: down 3 dx + 2 dy + 2, up 2 dx + 2 dy.
"""

from __future__ import annotations

from typing import ClassVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Int, PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, Truncation, component, count, rate
from ..federation import Client, Federation
from ..pace.curvature import AutoStep, Curvature, Rate
from .components.diagnostics import of_each
from .components.neumann import LocalNeumann
from .components.steps import norm
from .components.tracking import Point, Scalar, Tracking, along_local_hypergradients, check_forget


class Moments(eqx.Module):
    """Second moments: a, of each number of e_x; b, of e_y."""

    a: PyTree
    b: Scalar


class State(algorithm.State):
    """z = (x, y) and its estimate.

    Attributes:
        estimate: e, like z.
        time: local steps so far.
        curvature: what `hessian_lr="auto"` remembers.
        moments: the second moments of e.
    """

    estimate: Point
    time: Int[Array, ""]
    curvature: Curvature | None
    moments: Moments


@final
class AdaFBiO(Algorithm):
    """AdaFBiO (Huang, 2022; equations remembered): LocalBSGVRM with adaptive steps; biased where clients differ.

    Args:
        keep: how much of the second moments a round keeps; below 1.
        damping: what is added to their roots.

    The other arguments are `LocalBSGVRM`'s.
    """

    about: ClassVar[About] = About(
        name="adafbio",
        rounds="1",
        when="as localbsgvrm, with adaptive steps",
        hypergradient="biased where clients differ",
        lower="beside y* for two or more `local_steps`",
        biased=True,
        no_blocks="the estimate of a block grows old while its owner is not asked",
    )

    follows: ClassVar[dict[str, str]] = Algorithm.follows | of_each("estimate")

    hessian_lr: Rate | str = rate("auto", "auto")
    batch_size: int | None = count(None)
    neumann_terms: int = count(5)
    truncation: Truncation = eqx.field(default="uniform", converter=Truncation)
    inner_lr: Rate = rate(0.01, why="its moments scale it, not the curvature")
    local_steps: int = count(5)
    outer_lr: Rate = rate(0.05, why="the clients' estimates follow x on their own way")
    forget: Rate = rate(0.1)
    slow_after: Rate = rate(1000.0)
    keep: Rate = rate(0.9)
    damping: Rate = rate(0.1)

    def __check_init__(self):
        self.truncation.check_range("AdaFBiO", self.neumann_terms - 1)
        check_forget(self.forget, "AdaFBiO")

    @component
    def hessian(self) -> AutoStep:
        """The step of the series' factors, which are each client's own."""
        return AutoStep(self.hessian_lr, self.batch_size, local_factors=True)

    @component
    def series(self) -> LocalNeumann:
        """The clients' own hypergradients."""
        return LocalNeumann(self.hessian, self.truncation, self.neumann_terms, self.batch_size)

    @component
    def tracking(self) -> Tracking:
        """The local steps, along an estimate that STORM renews."""
        return Tracking(self.local_steps, self.forget, self.slow_after)

    def init(self, x: PyTree, y: PyTree) -> State:
        moments = Moments(jax.tree.map(jnp.ones_like, x), jnp.ones_like(norm(y)))
        return State(x, y, optax.tree.zeros_like((x, y)), jnp.zeros((), jnp.int32), self.hessian.begin(y), moments)

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        z, t = (state.x, state.y), state.time
        moved, e = fed.average(self.moves, z, state.estimate, t, lam, self._scales(state.moments))
        x, y = optax.tree.add(z, moved)
        h = norm(moved[0]) / (self.outer_lr * self.local_steps)
        moments = self._renewed(state.moments, *e)
        after = State(x, y, e, t + self.local_steps, self.hessian.watch(memory, h), moments)
        return after, Info(h, lower_gradient_norm=norm(e[1]))

    def _scales(self, moments: Moments) -> tuple[PyTree, Scalar]:
        """What e_x and e_y are multiplied by."""
        x = jax.tree.map(lambda leaf: 1 / (jnp.sqrt(leaf) + self.damping), moments.a)
        return x, 1 / (moments.b + self.damping)

    def _renewed(self, moments: Moments, e_x: PyTree, e_y: PyTree) -> Moments:
        mix = lambda old, new: self.keep * old + (1 - self.keep) * new
        a = jax.tree.map(lambda old, e: mix(old, e**2), moments.a, e_x)
        return Moments(a, mix(moments.b, norm(e_y)))

    def moves(
        self, client: Client, z: Point, e: Point, t: Int[Array, ""], lam: Scalar | None, scales: tuple[PyTree, Scalar]
    ) -> tuple[Point, Point]:
        """How far the client's steps go from z, and its estimate there."""

        def scaled(e: Point) -> Point:
            return jax.tree.map(jnp.multiply, scales[0], e[0]), jax.tree.map(lambda leaf: scales[1] * leaf, e[1])

        along = along_local_hypergradients(client, self.series, lam)
        end, e = self.tracking.follow(along, z, e, t, (self.outer_lr, self.inner_lr), scaled)
        return optax.tree.sub(end, z), e
