"""LocalBSGM, LocalBSGVRM and AdaFBiO: local hypergradients, followed by momentum or STORM; one round for all local steps.

After Gao, "On the Convergence of Momentum-Based Algorithms for Federated Bilevel Optimization Problems", arXiv 2204.13299
(LocalBSGM, LocalBSGVRM), and Huang, "Faster Adaptive Federated Bilevel Optimization" (AdaFBiO), arXiv 2211.01122. The
equations are REMEMBERED, not verified. With z = (x, y) and K = `neumann_terms`, as in `tracking`,

    D_i(z) = ( h_i(x, y), d_y g_i(x, y) ),    h_i = d_x f_i - J_i v_i,   v_i a K-term Neumann estimate of H_i^{-1} d_y f_i

LocalBSGM follows D_i by momentum, LocalBSGVRM by STORM; points and estimates are averaged once a round.

AdaFBiO is LocalBSGVRM with adaptive steps: after every round the server renews, from the averaged estimates e = (e_x, e_y),

    a <- keep a + (1 - keep) e_x^2    for each number of x,       b <- keep b + (1 - keep) |e_y|,       both 1 at first

and in the next round x moves along e_x / (sqrt(a) + damping) and y along e_y / (b + damping). The two travel with the
message.

The Hessian is each client's OWN: the mean of J_i H_i^{-1} d_y f_i is not J H^{-1} d_y f when clients differ. The fixed
point is where mean_i h_i(x, y*(x)) = 0, beside the solution, and no number of terms or rounds removes that
(`truncation="full"`: with v_i = lam sum_{n=0}^{K} (I - lam H_i)^n d_y f_i that point is known in closed form, and the tests
find it).

Floats per client and round: down 2 dx + 2 dy + 1, up 2 dx + 2 dy; AdaFBiO down 3 dx + 2 dy + 2.
"""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from ..algorithm import About, Truncation, count, rate
from .components.steps import momentum, norm
from .neumann import LocalNeumann
from .tracking import Tracking


class LocalBSGVRM(Tracking, LocalNeumann):
    """LocalBSGVRM (Gao, 2022; equations remembered): STORM on local hypergradients; biased where clients differ.

    Args:
        inner_lr, outer_lr: the step of the FIRST local steps of y and of x; later ones are a_t of it.
        local_steps: local steps a round.
        hessian_lr: the step of the clients' own Neumann series; "auto" measures the curvature (ours).
        neumann_terms: K, its terms.
        truncation: "uniform" (a random term stands for the sum), "full" (all summed), or an int that fixes the term.
        batch_size: rows of a minibatch, fresh for every factor; None for all rows.
        forget: how much of the estimate a local step forgets at first; at most 1.
        slow_after: after how many local steps the steps have fallen to 0.79 (2^{-1/3}).
    """

    about: ClassVar[About] = About(
        name="localbsgvrm",
        rounds="1",
        when="as localbsgm, with STORM",
        hypergradient="biased where clients differ",
        lower="beside y* for two or more `local_steps`",
        biased=True,
    )

    neumann_terms: int = count(5)
    truncation: Any = eqx.field(default="uniform", converter=Truncation)

    def point(self, state, kept):
        return state.x, state.y

    def rates(self, lam):
        return self.outer_lr, self.inner_lr

    def along(self, client, lam):
        def on_rows(s):
            own = self.local_hypergradients(client, lam, s)
            inner = client.batch("inner", self.batch_size, s * (self.neumann_terms + 1))
            return lambda z: (own(z[0], z[1]), client.problem.inner_gradient(z[0], z[1], inner))

        return on_rows


class LocalBSGM(LocalBSGVRM):
    """LocalBSGM (Gao, 2022; equations remembered): momentum on local hypergradients; biased where clients differ.

    The arguments are `LocalBSGVRM`'s.
    """

    about: ClassVar[About] = About(
        name="localbsgm",
        rounds="1",
        when="clients are alike, minibatches: momentum; off the solution where they differ",
        hypergradient="biased where clients differ",
        lower="beside y* for two or more `local_steps`",
        biased=True,
    )

    renewal: ClassVar[Any] = momentum
    power: ClassVar[int] = 1


class AdaFBiO(LocalBSGVRM):
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
    )

    keep: Any = rate(0.9)
    damping: Any = rate(0.1)

    def keeps(self, x, y):
        ones = {"a": jax.tree.map(jnp.ones_like, x), "b": jnp.ones_like(norm(y))}
        return super().keeps(x, y) | {"moments": ones}

    def scales(self, kept):
        a, b = kept["moments"]["a"], kept["moments"]["b"]
        return jax.tree.map(lambda leaf: 1 / (jnp.sqrt(leaf) + self.damping), a), 1 / (b + self.damping)

    def scaled(self, scales, e):
        return jax.tree.map(jnp.multiply, scales[0], e[0]), jax.tree.map(lambda leaf: scales[1] * leaf, e[1])

    def renewed(self, kept):
        mix = lambda old, new: self.keep * old + (1 - self.keep) * new
        moments, (e_x, e_y) = kept["moments"], kept["estimate"]
        a = jax.tree.map(lambda old, e: mix(old, e**2), moments["a"], e_x)
        return {**kept, "moments": {"a": a, "b": mix(moments["b"], norm(e_y))}}
