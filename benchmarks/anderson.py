"""Rounds to |grad Phi|^2 < 1e-8: Lockstep with Anderson mixing at one setting for all, against the best of a grid without.

    python benchmarks/anderson.py [--seeds 0 1 2 3 4] [--rounds 5000] [--problems 20 100 ridge] [--outer .01 .1 ...]
        [--quick]

Quadratics (10 clients of 1 to 3 rows, dx = dy = 10, eigenvalues of the mean H from 1 to 20 and to 100, each client's own
H_i between half and one and a half times it) and ridge tuning on diabetes (10 clients), in 64 bits, everyone, all rows,
five local steps. Plain: inner_lr and hessian_lr in {.03, .1, .3, 1} / L, outer_lr in --outer (.01 .. 100), L the largest
curvature of a client at the start; the point with the least median over seeds counts, a run that does not arrive or blows
up counts as --rounds. Mixing: `SETTING`; and other settings, to see how much it takes.

"steps" are (inner_lr L = hessian_lr L, outer_lr). At last a cohort and minibatches, where nothing is mixed: Phi averaged
over the last quarter of 300 rounds with anderson= less that without, as a share of the gain.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

import fedbilevel as fb
from fedbilevel.tasks.quadratic import inner_loss, outer_loss
from fedbilevel.tasks.ridge import BIAS_PENALTY

CLIENTS, SIZE, LOCAL_STEPS, ENOUGH = 10, 10, 5, 1e-8
LOWER, UPPER = (0.03, 0.1, 0.3, 1.0), tuple(10.0**k for k in range(-2, 3))
SETTING = (20, 0.1, 10.0)  # anderson, inner_lr L = hessian_lr L, outer_lr
OTHERS = [(20, 0.05, 10.0), (20, 0.3, 10.0), (20, 1.0, 10.0), (20, 0.1, 3.0), (20, 0.1, 30.0), (10, 0.1, 10.0)]


Vector = Float[Array, " dx"]
Gradient = Callable[[Vector], Vector]


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem, L, and |grad Phi|^2 as a function of x."""

    name: str
    problem: fb.Problem
    data: fb.FederatedData
    x: PyTree
    y: PyTree
    L: float
    slope: Callable[[Vector], Float[Array, ""]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=5000)
    parser.add_argument("--problems", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--outer", type=float, nargs="+", default=UPPER, help="outer_lr of the grid")
    parser.add_argument("--quick", action="store_true", help="one seed, 50 rounds: to see that it works")
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    seeds, most = (given.seeds[:1], 50) if given.quick else (given.seeds, given.rounds)
    for problem in given.problems:
        compare([MAKERS[problem](seed) for seed in seeds], most, given.outer)
    drawn(quadratic(20.0)(seeds[0]), 20 if given.quick else 300)


# The problems ---------------------------------------------------------------------------------------------------------


def quadratic(condition: float) -> Callable[[int], Case]:
    def make(seed: int) -> Case:
        draw = np.random.default_rng(seed)
        basis, _ = np.linalg.qr(draw.normal(size=(SIZE, SIZE)))
        root = basis * np.sqrt(np.geomspace(1, condition, SIZE))
        own = draw.normal(size=(CLIENTS, SIZE, SIZE))
        own = own + np.swapaxes(own, 1, 2)
        own = own - own.mean(0)
        own = 0.5 * own / np.max(np.abs(np.linalg.eigvalsh(own)))
        hessians = root @ (np.eye(SIZE) + own) @ root.T
        cross = draw.normal(size=(SIZE, SIZE))
        inner, outer = [], []
        for i in range(CLIENTS):
            rows, mixed, centre = 1 + i % 3, cross + 0.3 * draw.normal(size=cross.shape), draw.normal(size=SIZE)
            repeat = lambda matrix, rows=rows: np.broadcast_to(matrix, (rows, SIZE, SIZE))
            noisy = lambda middle, rows=rows: middle + 0.1 * draw.normal(size=(rows, SIZE))
            inner.append({"H": repeat(hessians[i]), "B": repeat(mixed), "b": noisy(centre)})
            outer.append({"t": noisy(1 + 0.3 * draw.normal(size=SIZE))})
        data = fb.FederatedData.stack(inner, outer)
        start = jnp.asarray(draw.normal(size=SIZE)), jnp.zeros(SIZE)
        name = f"quadratic, condition {condition:g}"
        H, B, b = (means(data, lambda rows, k=k: np.mean(rows[k], axis=0), "inner") for k in ("H", "B", "b"))
        t, inverse = means(data, lambda rows: np.mean(rows["t"], axis=0), "outer"), np.linalg.inv(H)
        gradient = lambda x: 0.1 * x + B.T @ (inverse @ (inverse @ (B @ x + b) - t))
        return case(name, fb.Problem(inner_loss, outer_loss), data, *start, gradient)

    return make


def ridge(seed: int) -> Case:
    task = fb.tasks.ridge(dataset="diabetes", clients=CLIENTS, seed=seed)
    wide = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)
    inner, outer = (
        [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), level.alone(i).rows) for i in range(CLIENTS)]
        for level in (task.data.inner, task.data.outer)
    )
    data = fb.FederatedData.stack(inner, outer)
    columns = lambda rows: np.concatenate([rows["a"], np.ones((len(rows["a"]), 1))], axis=1)
    square = lambda rows: columns(rows).T @ columns(rows) / len(rows["a"])
    against = lambda rows: columns(rows).T @ rows["target"][:, 0] / len(rows["a"])
    (G, h), (Go, ho) = ([means(data, of, level) for of in (square, against)] for level in ("inner", "outer"))

    def gradient(x):
        H = G + jnp.diag(jnp.append(jnp.exp(x), BIAS_PENALTY))
        y = jnp.linalg.solve(H, h)
        v = jnp.linalg.solve(H, Go @ y - ho)
        return -jnp.exp(x) * (y * v)[:-1]

    return case("ridge on diabetes", task.problem, data, wide(task.x), wide(task.y), gradient)


MAKERS = {"20": quadratic(20.0), "100": quadratic(100.0), "ridge": ridge}


def case(name: str, problem: fb.Problem, data: fb.FederatedData, x: PyTree, y: PyTree, gradient: Gradient) -> Case:
    """All of it, with the gradient of Phi looked at once."""
    start, back = ravel_pytree(y)
    alone = jax.jit(lambda i: jax.hessian(lambda y: problem.inner_value(x, back(y), data.inner.client(i).all()))(start))
    L = max(float(np.linalg.eigvalsh(alone(i))[-1]) for i in range(data.clients))
    known = fb.reference.hypergradient(problem, data, x + 0.1, y)
    np.testing.assert_allclose(gradient(x + 0.1), known, rtol=1e-8, atol=1e-10)
    return Case(name, problem, data, x, y, L, lambda x: jnp.sum(gradient(x) ** 2))


def means(data: fb.FederatedData, of: Callable[[dict[str, np.ndarray]], np.ndarray], level: str) -> np.ndarray:
    """The mean over clients of what a client's rows give."""
    return np.mean([of(getattr(data, level).alone(i).rows) for i in range(data.clients)], axis=0)


# Rounds -----------------------------------------------------------------------------------------------------------------


def rounds(case: Case, algorithm: fb.Lockstep, grid: list[tuple[float, float, float]], most: int) -> np.ndarray:
    """Rounds to arrive at each point (inner_lr, hessian_lr, outer_lr) of a grid; `most` if it does not, -1: blown up."""
    algorithm = dataclasses.replace(
        algorithm, **dict(zip(("inner_lr", "hessian_lr", "outer_lr"), grid[0], strict=True))
    )
    stepper = fb.stepper(case.problem, case.data, algorithm, case.x, case.y)
    steps = jnp.asarray(grid).T
    every = eqx.tree_at(lambda a: (a.inner_lr, a.hessian_lr, a.outer_lr), stepper.algorithm, tuple(steps))

    def one(algorithm):
        def going(loop):
            _, k, slope = loop
            return (k < most) & (slope >= ENOUGH) & jnp.isfinite(slope)

        def turn(loop):
            at, k, _ = loop
            at, _ = stepper(at, k, jax.random.key(0), algorithm)
            fine = [jnp.all(jnp.abs(leaf) < 1e10) for leaf in jax.tree.leaves((at.state.x, at.state.y))]
            return at, k + 1, jnp.where(jnp.all(jnp.stack(fine)), case.slope(at.state.x), jnp.nan)

        _, k, slope = jax.lax.while_loop(going, turn, (stepper.start, 0, case.slope(case.x)))
        return jnp.where(jnp.isfinite(slope), k, -1)

    axes = jax.tree.map(lambda leaf, first: 0 if leaf.ndim > first.ndim else None, every, stepper.algorithm)
    return np.asarray(jax.jit(jax.vmap(one, in_axes=(axes,)))(every))


def compare(cases: list[Case], most: int, outer: Sequence[float]) -> None:
    """Plain rounds at the best of the grid, mixing at its one setting, and at others."""
    begin, name = time.perf_counter(), cases[0].name
    points = list(itertools.product(LOWER, LOWER, outer))
    scaled = lambda case, points: [(a / case.L, b / case.L, o) for a, b, o in points]
    plain = np.stack([rounds(c, fb.Lockstep(local_steps=LOCAL_STEPS), scaled(c, points), most) for c in cases])
    counted = np.where(plain < 0, most, plain)
    best = int(np.argmin(np.median(counted, axis=0)))
    blown = f"{np.mean(plain < 0):.2f} of the {plain.size} runs of the grid blow up"
    least = line(f"{name}, plain", points[best], plain[:, best], most)
    print(f"    {blown}; {time.perf_counter() - begin:.0f} s")
    for many in (20, 10):
        settings = [(lower, lower, upper) for count, lower, upper in [SETTING, *OTHERS] if count == many]
        algorithm = fb.Lockstep(local_steps=LOCAL_STEPS, anderson=many)
        own = np.stack([rounds(c, algorithm, scaled(c, settings), most) for c in cases])
        for setting, found in zip(settings, own.T, strict=True):
            line(f"    anderson={many}", setting, found, most, least)


def line(name: str, point: tuple[float, float, float], found: np.ndarray, most: int, least: float = 0.0) -> float:
    """Print one; its median."""
    middle = float(statistics.median(np.where(found < 0, most, found).tolist()))
    told = ["blown up" if k < 0 else f"over {most}" if k == most else str(k) for k in found]
    share = f"  {middle / least:.3f} of plain" if least else ""
    inner, hessian, outer = (f"{part:g}" for part in point)
    print(
        f"{name}, steps ({inner}, {hessian}) / L, {outer}:  median {middle:.1f}{share}  of {', '.join(told)}",
        flush=True,
    )
    return middle


def drawn(case: Case, most: int) -> None:
    """Where a cohort or minibatches are drawn: with anderson= against without."""
    steps = {"inner_lr": 0.1 / case.L, "hessian_lr": 0.1 / case.L, "outer_lr": 0.01}
    for name, engine, batch in (("a cohort", fb.Simulation(cohort=5), None), ("minibatches", fb.Simulation(), 2)):
        ends = []
        for most_points in (None, SETTING[0]):
            algorithm = fb.Lockstep(**steps, batch_size=batch, anderson=most_points)
            history = fb.solve(
                case.problem, case.data, algorithm, case.x, case.y, most, key=jax.random.key(0), engine=engine,
                metrics={"value": lambda x, y: fb.reference.value(case.problem, case.data, x, y)},
            ).history  # fmt: skip
            values = [row["value"] for row in history]
            ends.append(statistics.mean(values[-most // 4 :]))
        gain = values[0] - ends[0]
        print(f"{case.name}, {name}: gain {gain:.4f}, with anderson= worse by {(ends[1] - ends[0]) / gain:.4f} of it")


if __name__ == "__main__":
    main()
