"""AggITD: hypergradient estimation in the rounds of the lower loop. 2N+3 rounds an iteration, N = `inner_rounds`.

After Xiao & Ji, "Communication-Efficient Federated Hypergradient Computation via Aggregated Iterative
Differentiation", ICML 2023, arXiv 2302.04969. The text of the paper was not available: the estimator below is a
reconstruction that agrees with every fact known of it, with the index convention Q in {0..N}. With lam = hessian_lr,
Q ~ Uniform{0..N} drawn by the server, y^0 the last iteration's y^N:

    for t = 0..N-1:
      anchor      q = mean d_y g_i(x, y^t)
                  r^Q = mean d_y f_i(x, y^Q)                                  if t = Q
                  r^t = mean (I - lam d2_yy g_i(x, y^t)) r^{t-1}              if t > Q
      lower       y^{t+1} = mean of y_i: FedSVRG steps with inner_lr from y^t around q
    vector        r^N
    hypergradient h = mean d_x f_i(x, y^N) - d2_xy g_i(x, y^N) v,   v = lam (N+1) r^N
    upper         x = mean of x_i: FedSVRG steps with outer_lr around h, y^N and v fixed

Every mean is one round with a fresh cohort and fresh rows. On a quadratic g with H = d2_yy g, A = d2_yy f, M = I - lam H
and lower error map P:   E[v] - v* = -M^{N+1} v* + lam sum_{q=0}^{N} M^{N-q} A P^q (y^0 - y*).

The vector r is answered by the clients that also answer q, which moves y: on a non-quadratic g that leaves a bias of
order inner_lr * hessian_lr (a few per cent in a toy problem, whatever N), with sampled clients or rows only.

`same_cohort` asks one cohort in all exchanges of an iteration. Rounds and bytes stay the same; but factors of one cohort are
not independent, which leaves a bias that does not shrink with N.

Floats per client: down (2N+4) dx + (4N-Q+5) dy, up 2N dy + (N-Q+1) dy + 2 dx.

What is ours, options that are off by default, stands in `aggitd_ours.py`.

`estimate` starts v and c at 0: it is for clients at their start, not for use in the `step` of another algorithm with these.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, Truncation, choice, component, count, option, rate
from ..errors import check
from ..federation import Client, Federation, When
from ..pace.curvature import AutoStep, Curvature, Rate, number
from .aggitd_ours import AllTerms, AnchoredApart, OneRound, OneRoundApart, WarmTerms
from .components.directions import inner_gradient
from .components.optimizer import Optimizer, OuterOptimizer, resolve
from .components.riding import Flag, OneTerm, Scalar, Terms, Turns
from .components.steps import descend, fedsvrg, norm
from .components.upper import CorrectedUpper, one_cohort


class State(algorithm.State):
    """x and y, and what options keep; None without them.

    Attributes:
        v: the last iteration's z_N (`warm_start_v`).
        pull: |d_y f| of the first iteration, to which the residual of v is compared (`warm_start_v`).
        control: c, like y (`one_round`).
        optimizer: optax's state (`outer_optimizer`).
        curvature: what `hessian_lr="auto"` remembers.
    """

    v: PyTree
    pull: Scalar | None
    control: PyTree
    optimizer: PyTree
    curvature: Curvature | None


@final
class AggITD(Algorithm):
    """Aggregated iterative differentiation (Xiao & Ji, ICML 2023), 2 `inner_rounds` + 3 rounds an iteration.

    Args:
        inner_rounds: N >= 1, the turns of the lower loop.
        inner_lr: the step of ONE local lower step.
        local_steps: local lower steps a turn.
        hessian_lr: lam of the Hessian factors (I - lam H); diverges from 2 / (largest curvature of g) on. "auto"
            measures that curvature (ours).
        outer_lr: the step of ONE local upper step.
        outer_steps: local upper steps an iteration.
        batch_size: rows of a minibatch, fresh for every factor; None for all rows.
        truncation: "uniform" (the paper's random Q), "full" (all terms summed), or an int that fixes Q in 0..N (a
            test device: its mean over Q is the estimator, a single one is not).
        skip_idle_rounds: leave out rounds in which one local step adds nothing.
        same_cohort: one cohort for all exchanges of an iteration, instead of a fresh one for each; biased, see above.
        outer_optimizer: an optax transformation applied at the server to x - mean x_i, or its name and learning rate as in
            "adam:0.01"; None: the mean itself.
        warm_start_v, one_round, independent_cohorts: ours, see above.

    Each of the three steps is "auto" where it is not given: it is found while the algorithm runs
    (`fedbilevel.pace.automatic`, ours). With `outer_optimizer`, `outer_lr="auto"` is 0.05.
    """

    about: ClassVar[About] = About(
        name="aggitd",
        rounds="2N+3",
        when="rounds are dear and clients differ; N = 1 with truncation=full to start with",
        hypergradient="right where clients differ",
        lower="at y* for any `local_steps`",
        exact={"inner_rounds": 600},
    )

    follows: ClassVar[dict[str, str]] = Algorithm.follows | {"optimizer": "outer_optimizer", "control": "inner_lr"}

    inner_rounds: int = count(5)
    inner_lr: Rate | str = rate("auto", "auto")
    local_steps: int = count(5)
    batch_size: int | None = count(None)
    skip_idle_rounds: bool = option(False)
    same_cohort: bool = option(False)
    hessian_lr: Rate | str = rate("auto", "auto")
    outer_lr: Rate | str = rate("auto", "auto")
    outer_steps: int = count(1)
    truncation: Truncation = eqx.field(default="uniform", converter=Truncation)
    outer_optimizer: Optimizer = choice(None)
    warm_start_v: bool = option(False)
    one_round: bool = option(False)
    independent_cohorts: bool = option(False)

    def __check_init__(self):
        self.truncation.check_range("AggITD", self.inner_rounds)
        apart = not (self.same_cohort and self.independent_cohorts)
        check(apart, "AggITD takes same_cohort or independent_cohorts, for they contradict each other: use one.")
        good = self.truncation.full or not self.warm_start_v
        check(good, "AggITD(warm_start_v=True) goes on with the last sum of all terms: add truncation='full'.")
        resolve(self.outer_optimizer, "AggITD")

    @component
    def hessian(self) -> AutoStep:
        """The step of the Hessian factors."""
        return AutoStep(self.hessian_lr, self.batch_size)

    @component
    def terms(self) -> Terms:
        """How v is made of the vector r: one term of the series, or ours."""
        kind = WarmTerms if self.warm_start_v else AllTerms if self.truncation.full else OneTerm
        return kind(self.hessian, self.truncation, self.inner_rounds, self.batch_size)

    @component
    def turns(self) -> Turns:
        """The turns of the lower loop, in which r rides along: anchored, or ours."""
        whole = OneRoundApart if self.independent_cohorts else OneRound
        split = AnchoredApart if self.independent_cohorts else Anchored
        kind = whole if self.one_round else split
        return kind(self.terms, self.inner_lr, self.local_steps, self.batch_size, self.skip_idle_rounds)

    @component
    def upper(self) -> CorrectedUpper:
        """The upper level."""
        return CorrectedUpper(self.outer_lr, self.outer_steps, self.batch_size, self.skip_idle_rounds)

    @component
    def optimizer(self) -> OuterOptimizer:
        """The server's step on x."""
        return OuterOptimizer(self.outer_optimizer, "AggITD")

    @property
    def spares_unasked(self) -> bool:
        return self.outer_optimizer is None

    def init(self, x: PyTree, y: PyTree) -> State:
        v, pull = self.terms.begin(y)
        return State(x, y, v, pull, self.turns.begin(y), self.optimizer.begin(x), self.hessian.begin(y))

    def client_init(self, x: PyTree, y: PyTree) -> PyTree:
        return self.turns.begin(y)

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        h, v, told, after, cohort = self.estimate_parts(fed, state)
        mean = self.upper.move(fed, state.x, after.y, v, h, cohort)
        x, kept = self.optimizer.step(state.x, mean, state.optimizer)
        x = fed.renewed(x, state.x)
        memory = self.hessian.watch(after.curvature, v)
        return dataclasses.replace(after, x=x, optimizer=kept, curvature=memory), Info(norm(h), *told)

    def estimate(self, fed: Federation, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        h, _, _, after, _ = self.estimate_parts(fed, self.init(x, y))
        return h, after.y

    def estimate_parts(
        self, fed: Federation, state: State
    ) -> tuple[PyTree, PyTree, tuple[Scalar | None, ...], State, jax.Array | None]:
        """(h, v such that h = d_x f - d2_xy g v, the rest of `Info`, the state but for a new x, and the clients of the
        upper round, None for fresh ones)."""
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        cohort = one_cohort(fed, self.same_cohort)
        x, N, terms = state.x, self.inner_rounds, self.terms
        Q = terms.draw(fed)

        def turn(t, loop):
            before, control, r, last, first, _ = loop
            sent = fed.when(terms.exists(t, Q), r)  # r^{t-1}; and r^t from Q on
            y, control, new = self.turns.turn(fed, x, before, control, sent, t >= Q, lam, cohort)
            last = terms.size(r, new)
            slope = norm(optax.tree.sub(y, before)) / (number(self.inner_lr) * self.local_steps)
            return y, control, new, last, jnp.where(t == Q, last, first), slope

        zero = jnp.zeros_like(norm(state.y))
        loop = (state.y, state.control, terms.start(state.y, state.v), zero, zero, zero)
        y, control, r, _, first, slope = fed.repeat(N, turn, loop)
        new = fed.average(self.terms.vector, x, y, fed.when(terms.exists(N, Q), r), lam, cohort=cohort)
        new = fed.renewed(new, r)
        last = terms.size(r, new)
        first = jnp.where(jnp.asarray(N) == Q, last, first)
        v, kept = terms.solution(new, lam)
        h = self.upper.estimate(fed, x, y, v, cohort)
        stretched, lag, pull = terms.told(last, first, lam, state.pull)
        after = State(x, y, kept, pull, control, state.optimizer, memory)
        return h, v, (stretched, lag, slope), after, cohort


@final
class Anchored(Turns):
    """The paper's turn: two rounds, the mean gradient with r, and FedSVRG steps on y around it."""

    def begin(self, y: PyTree) -> PyTree:
        return None

    def turn(
        self, fed: Federation, x: PyTree, y: PyTree, control: PyTree, r: When, wanted: Flag, lam: Scalar | None,
        cohort: jax.Array | None,
    ) -> tuple[PyTree, PyTree, PyTree]:  # fmt: skip
        q, new = fed.average(self.anchor, x, y, r, lam, replies=(True, wanted), cohort=cohort)
        new = fed.renewed(new, r.value)
        if self.skip_idle_rounds and self.local_steps == 1:  # nothing is left for the clients to add
            return descend(y, number(self.inner_lr), q), control, new
        return fed.renewed(fed.average(self.lower, x, y, q, cohort=cohort), y), control, new

    def anchor(self, client: Client, x: PyTree, y: PyTree, r: When, lam: Scalar | None) -> tuple[PyTree, PyTree]:
        """q_i = d_y g_i(x, y^t), and r_i where wanted."""
        rows = client.batches("inner", self.batch_size, 2, at=x)
        q = client.problem.inner_gradient(x, y, rows(0))
        return q, self.if_wanted(client, x, y, r, lam, lambda: rows(1))

    def lower(self, client: Client, x: PyTree, y: PyTree, q: PyTree) -> PyTree:
        """FedSVRG steps on y around the mean gradient q at y."""
        rows = client.batches("inner", self.batch_size, self.local_steps - 1, at=x)  # the first step needs none
        return fedsvrg(
            lambda s: inner_gradient(client.problem, x, rows(s)), y, q, number(self.inner_lr), self.local_steps
        )
