"""The conformance suite: put an algorithm of your own, or a problem's oracles, through what every shipped one passes.

    fb.testing.check_algorithm(MyAlgorithm())
    fb.testing.check_problem(problem, data, x, y)
    p = fb.testing.random_problem(seed)

The first two compute in float64, print nothing, return a `Report`, and raise `CheckFailed` with the whole table if a check
fails. The third draws a problem in units of any size, whose Phi is known.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from . import reference
from .algorithm import Algorithm
from .component import title_of
from .data import FederatedData
from .engines import Engine, Loopback, Simulation
from .losses import check_losses
from .problem import Problem, bind
from .problem_checks import checks
from .protocol import protocol
from .protocol.table import Protocol
from .random_problems import RandomProblem as RandomProblem
from .random_problems import random_problem as random_problem
from .result import Result
from .solve import estimate_hypergradient, solve
from .variables import trainable

_AGREE = 1e-12
_DROPOUT = 0.4
_PROGRAMS = itertools.count(1)


class CheckFailed(AssertionError):
    """A check failed; the message is the report's table, `report` the report."""

    def __init__(self, report: Report):
        super().__init__(f"\n{report}")
        self.report = report


@dataclasses.dataclass
class Report:
    """What was checked: (what, whether it holds, the figure or the reason) for each check."""

    name: str
    lines: list[tuple[str, bool, str]] = dataclasses.field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether all checks hold."""
        return all(good for _, good, _ in self.lines)

    def add(self, what: str, check: Callable[[], tuple[bool, str]]) -> None:
        """Run a check; an exception fails it."""
        try:
            good, detail = check()
        except Exception as error:  # whatever an algorithm under test raises
            good, detail = False, f"{type(error).__name__}: {error}"
        self.lines.append((what, bool(good), detail))

    def conclude(self) -> Report:
        """The report itself, or `CheckFailed`."""
        if not self.passed:
            raise CheckFailed(self)
        return self

    def __str__(self) -> str:
        width = max(len(what) for what, _, _ in self.lines)
        marks = {True: "ok    ", False: "FAILED"}
        return "\n".join(
            [self.name, *(f"  {marks[good]} {what.ljust(width)}  {detail}" for what, good, detail in self.lines)]
        )


def heterogeneous(clients: int = 8, seed: int = 0) -> tuple[Problem, FederatedData, PyTree, PyTree]:
    """A small problem (problem, data, x, y) that hides nothing: clients of other sizes and curvatures, nested pytrees.

    The inner loss is quadratic in y and depends on x through its targets and its curvature; call it in float64.
    """
    draw = np.random.default_rng(seed)

    def rows(client: int, count: int) -> dict[str, np.ndarray]:
        shift = draw.normal(size=3)
        features = draw.normal(size=(count, 3)) * (0.5 + client / clients) + 0.3 * shift
        return {"a": features, "b": draw.normal(size=count) + shift[0], "c": draw.normal(size=(count, 2)) + shift[1]}

    def inner(x: Mapping[str, Array], y: Mapping[str, PyTree], e: Mapping[str, Array]) -> Float[Array, ""]:
        residual = e["a"] @ y["w"] + y["deep"]["s"] * (e["c"] @ x["u"]) - e["b"] * x["k"]
        ridge = jnp.sum(y["w"] ** 2) + (1 + 0.1 * x["k"] ** 2) * y["deep"]["s"] ** 2
        return 0.5 * residual**2 + 0.2 * ridge

    def outer(x: Mapping[str, Array], y: Mapping[str, PyTree], e: Mapping[str, Array]) -> Float[Array, ""]:
        fit = (e["a"] @ y["w"] + y["deep"]["s"] - e["b"]) ** 2
        return 0.5 * fit + 0.1 * (x["u"] @ e["c"]) * y["deep"]["s"] + 0.05 * (jnp.sum(x["u"] ** 2) + x["k"] ** 2)

    sizes = [(3, 4), (6, 3), (4, 6), (6, 4)]
    pairs = [sizes[i % len(sizes)] for i in range(clients)]
    data = FederatedData.stack(
        [rows(i, n) for i, (n, _) in enumerate(pairs)],
        [rows(i, n) for i, (_, n) in enumerate(pairs)],
    )
    x = {"u": jnp.asarray([0.3, -0.2]), "k": jnp.asarray(0.7)}
    y = {"w": jnp.asarray([0.1, 0.0, -0.1]), "deep": {"s": jnp.asarray(0.2)}}
    return Problem(inner, outer), data, x, y


def check_algorithm(algorithm: Algorithm, accurate: Algorithm | None = None, tolerance: float = 1e-8) -> Report:
    """Put an algorithm through the conformance suite, on a small ragged, heterogeneous problem in float64.

    Checked: simulation (plain, in client batches, and over devices where there are several) and loopback agree to 1e-12
    on a cohort of 4 of 8 clients, whatever the order of replies; all of them count the same rounds and bytes, and what
    they count is what `protocol` says; nothing is compiled again between iterations, nor for another step size; the same
    key gives the same run; and what `accurate` estimates is the hypergradient. Where parts of a reply are combined in
    several ways, engines agree with clients dropping out, too.

    Args:
        algorithm: the instance to check, with step sizes that are stable where curvatures are of order one.
        accurate: the same algorithm set to be exact (many rounds, all terms, all rows): its estimate with all clients is
            compared with `reference.hypergradient`. None leaves that check out.
        tolerance: of that comparison, relative.

    Raises:
        CheckFailed: with the table of what holds and what does not.
    """
    report = Report(f"{title_of(algorithm)}: conformance, float64, 4 of 8 ragged clients")
    with jax.enable_x64(True):
        problem, data, x, y = heterogeneous()
        runs: dict[str, Result] = {}

        def run(name: str, engine: Engine, seed: int = 0, alg: Algorithm = algorithm) -> Result:
            runs[name] = solve(
                problem, data, alg, x, y, iterations=3, key=jax.random.key(seed), engine=engine, check=False
            )
            return runs[name]

        def agree(name: str, engine: Engine, like: str = "simulation") -> Callable[[], tuple[bool, str]]:
            def check() -> tuple[bool, str]:
                one, other = runs[like], run(name, engine)
                gap = distance((one.x, one.y), (other.x, other.y))
                ledgers = [
                    [(r["rounds"], r["bytes_down"], r["bytes_up"]) for r in each.history] for each in (one, other)
                ]
                if ledgers[0] != ledgers[1]:
                    return (
                        False,
                        f"ledgers differ: {ledgers[0][-1]} against {ledgers[1][-1]} (rounds, bytes down, bytes up)",
                    )
                return gap <= _AGREE, f"largest difference {gap:.1e}"

            return check

        def finite():
            res = run("simulation", Simulation(cohort=4))
            return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((res.x, res.y))), "three iterations"

        report.add("runs, and stays finite", finite)
        if not report.passed:
            return report.conclude()
        report.add("client batches of 3 = all at once", agree("batches", Simulation(cohort=4, client_batch=3)))
        report.add("loopback = simulation", agree("loopback", Loopback(cohort=4)))
        report.add("order of clients and replies", agree("shuffled", Loopback(cohort=4, shuffle=7)))
        if len(jax.devices()) > 1:
            auto = jax.make_mesh((len(jax.devices()),), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
            report.add(f"{len(jax.devices())} devices = one", agree("mesh", Simulation(cohort=4, mesh=auto)))
        if _in_parts(runs["simulation"].protocol):  # who does not answer counts in none of them
            run("dropping out", Simulation(cohort=4, dropout=_DROPOUT))
            dropping = agree("dropping out, loopback", Loopback(cohort=4, dropout=_DROPOUT), like="dropping out")
            report.add("means and maxima of those who answer", dropping)
        report.add("same key, same run", agree("again", Simulation(cohort=4)))
        report.add("ledger = protocol", lambda: _ledger_fits(runs["simulation"]))
        report.add("compiles once", lambda: _compiles_once(algorithm, problem, data, x, y))
        if accurate is not None:
            report.add("estimates the hypergradient", lambda: _accurate(accurate, problem, data, x, y, tolerance))
    return report.conclude()


def distance(one: PyTree, other: PyTree) -> float:
    """The largest absolute difference of two pytrees, relative to the first where that is above one."""
    gaps = jax.tree.map(
        lambda a, b: np.max(np.abs(np.asarray(a) - np.asarray(b)) / np.maximum(1, np.abs(a)), initial=0.0), one, other
    )
    return float(max(jax.tree.leaves(gaps)))


def _in_parts(protocol: Protocol) -> bool:
    """Whether parts of one reply are combined in several ways."""
    return any(len(set(site.combine)) > 1 for site in protocol.sites.values())


def _ledger_fits(result: Result) -> tuple[bool, str]:
    protocol, last = result.protocol, result.history[-1]
    n = result.iteration
    rare = {name: sum(getattr(line, f"{name}_most") for line in protocol.rarely) for name in ("bytes_down", "bytes_up")}
    beside = {"rounds": protocol.rounds_rarely, **{name: n * most for name, most in rare.items()}}  # what measures
    for name in ("rounds", "bytes_down", "bytes_up"):
        expected, most, seen = getattr(protocol, name), getattr(protocol, f"{name}_most"), int(last[name])
        least = n * most if expected == most and protocol.kind == "exact" else 1
        if not least <= seen <= n * most + beside[name]:
            return False, f"{seen} {name} in {n} iterations, where the protocol says at most {most} each"
    return True, f"{last['rounds']} rounds in {n} iterations"


def _compiles_once(
    algorithm: Algorithm, problem: Problem, data: FederatedData, x: PyTree, y: PyTree
) -> tuple[bool, str]:
    traces, own = [], float(next(_PROGRAMS))

    def counted(x: PyTree, y: PyTree, e: PyTree) -> Float[Array, ""]:
        traces.append(1)
        return problem.inner(x, y, e) + own  # a program of its own: that of an earlier run does not serve

    same = Problem(counted, problem.outer)
    engine = Simulation(cohort=4)

    def traced(run: Callable[[], Result | Protocol]) -> int:
        before = len(traces)
        run()
        return len(traces) - before

    def go(alg: Algorithm, iterations: int) -> int:
        key = jax.random.key(0)
        return traced(lambda: solve(same, data, alg, x, y, iterations, key=key, engine=engine, check=False))

    slower = algorithm
    for field in dataclasses.fields(algorithm):
        if field.metadata.get("role") == "rate" and isinstance(getattr(algorithm, field.name), float):
            slower = eqx.tree_at(lambda a, n=field.name: getattr(a, n), slower, getattr(algorithm, field.name) * 0.5)
    first, longer, other = go(algorithm, 1), go(algorithm, 5), go(slower, 5)
    # each run derives its protocol anew, abstractly; beyond that nothing may be traced again
    abstract = traced(lambda: protocol(algorithm, same, data, x, y, engine=engine))
    more, changed = longer - abstract, other - abstract
    detail = f"{first - abstract} traces of the loss to compile; {more} for more iterations, {changed} for other steps"
    return first > abstract and longer == other == abstract, detail


def _accurate(
    algorithm: Algorithm, problem: Problem, data: FederatedData, x: PyTree, y: PyTree, tolerance: float
) -> tuple[bool, str]:
    h, _ = estimate_hypergradient(problem, data, algorithm, x, y, key=jax.random.key(0))
    true = reference.hypergradient(problem, data, x, y)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    error = float(np.linalg.norm(flat(h) - flat(true)) / np.linalg.norm(flat(true)))
    return error <= tolerance, f"relative error {error:.1e}"


def check_problem(problem: Problem, data: FederatedData, x: PyTree, y: PyTree, tolerance: float = 1e-5) -> Report:
    """Compare a problem's oracles with central differences on its first three clients, in float64.

    Checked along random directions, at a point beside x and y where nothing is zero by chance, on rows of unequal weights
    with padding behind them: that both losses are weighted means over rows, without the padding; their gradients, the
    Hessian- and cross-products of the inner loss; that the Hessian is symmetric. Further that the inner loss curves
    upwards at x and y, and that no loss indexes an array outside its bounds on any client's rows, which XLA clamps or
    drops without a word.

    Args:
        x, y: the point; it should be a typical one.
        tolerance: relative.

    Raises:
        InputError: x or y cannot be used, or a loss does not return a real floating-point scalar.
        CheckFailed: with the table of what holds and what does not.
    """
    report = Report("problem: oracles against central differences")
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(_widen, tree)
        x, x_rest = trainable(x, "x")
        y, y_rest = trainable(y, "y")
        bound = bind(problem, x_rest, y_rest)
        x, y, data = wide((x, y, data))
        check_losses(bound, x, y, data.inner.client(0).all(), data.outer.client(0).all())
        for what, check in checks(bound, data, x, y, tolerance):
            report.add(what, check)
    return report.conclude()


def _widen(leaf: PyTree) -> PyTree:
    if not isinstance(leaf, (jax.Array, np.ndarray)) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
    return jnp.asarray(leaf, jnp.complex128 if is_complex else jnp.float64)
