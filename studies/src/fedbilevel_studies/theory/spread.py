"""Clients that grow apart: what that does to the hypergradients of AggITD and FedNest (nothing) and of LFedNest (a floor).

At one (x, y^0), with N = T = terms of the series growing. Formulas, with M = I - lam H, P and y^t the lower loop's:

    AggITD        E v = lam sum_{q=0}^N M^{N-q} d_y f(y^q), the mean over Q of v_Q = lam (N+1) M^{N-Q} d_y f(y^Q)
    FedNest       full: v = lam sum_{n=0}^N M^n d_y f(y^T); uniform: the mean over N' of lam N M^{N'} d_y f(y^T)
    LFedNest      h = mean of d_x f_i - J_i lam sum_{n=0}^N (I - lam H_i)^n d_y f_i(y^T), y^T of plain local steps

LFedNest's floor is its limit: the mean of d_x f_i - J_i H_i^-1 d_y f_i where plain local steps end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas

from fedbilevel import AggITD, FedNest, LFedNest

from . import common, runner
from .family import CURVATURE, DY, PROBLEM, Family, family, power

SPREADS, ROUNDS = (0.0, 0.5, 1.0, 2.0), (2, 4, 8, 16, 32, 64, 128)
STEPS = {"inner_lr": 0.7, "local_steps": 2, "hessian_lr": 1.4}
LAM, LOWER = STEPS["hessian_lr"], (STEPS["inner_lr"], STEPS["local_steps"])
MANY = 1_000  # turns after which LFedNest is at its floor
UNBIASED = ("AggITD", "FedNest")
LABELS = {"AggITD": "AggITD", "FedNest": "FedNest, T = N", "LFedNest": "LFedNest, T = N"}
COST = {"AggITD": (2, 3), "FedNest": (3, 3), "LFedNest": (1, 1)}  # rounds: so many times N, and so many more
MEAN = {"AggITD": (2, 3), "FedNest": (2.5, 2.5)}  # on average, where the number of terms is random


def heterogeneity(folder: Path, quick: bool = False, progress: common.Progress = lambda text: None) -> list[Path]:
    """The study; leaves heterogeneity.csv, .md and .png."""
    spreads, numbers = ((0.0, 2.0), (4,)) if quick else (SPREADS, ROUNDS)
    settings = {"spreads": spreads, "N": numbers, "rounds": COST, "rounds_random": MEAN, **STEPS}

    def rows():
        with jax.enable_x64(True):
            return [*(row for N in numbers for row in _rows(N, spreads, progress)), *_floors(spreads, progress)]

    frame = common.table(folder, "heterogeneity", settings, rows)
    common.agree(frame, "heterogeneity")
    return [folder / "heterogeneity.csv", _markdown(folder, frame), _figure(folder, frame)]


def _rows(N: int, spreads: tuple[float, ...], progress: common.Progress) -> Iterator[common.Row]:
    for spread in spreads:
        progress(f"heterogeneity: N = {N}, s = {spread:g}")
        f = family(spread)
        setup = _setup(f)
        true, size = f.hypergradient(f.x), np.abs(f.x).max() + np.abs(f.solution(f.x)).max()
        for method in LABELS:
            mean, deviation = measured(setup, method, N)
            formula_mean, formula_deviation = formula(f, method, N)
            rounds = lambda cost, method=method: {"rounds": cost[method][0] * N + cost[method][1]}
            at = {"spread": spread, "method": method, "N": N, **rounds(COST)}
            yield {**at, "quantity": "error", **common.distance(mean, formula_mean, true, N * size)}
            if deviation is not None and formula_deviation is not None:
                yield {
                    **at,
                    **rounds(MEAN),
                    "quantity": "deviation",
                    **common.point(deviation, formula_deviation, N * size),
                }


def _floors(spreads: tuple[float, ...], progress: common.Progress) -> Iterator[common.Row]:
    """LFedNest with so many terms that nothing is left but its floor."""
    for spread in spreads:
        progress(f"heterogeneity: the floor of LFedNest, s = {spread:g}")
        f = family(spread)
        h, _ = measured(_setup(f), "LFedNest", MANY)
        at = {"spread": spread, "method": "LFedNest", "N": MANY, "rounds": MANY + 1, "quantity": "floor"}
        yield {**at, **common.distance(h, local_limit(f), f.hypergradient(f.x), 100)}


def _setup(f: Family) -> runner.Setup:
    return runner.Setup(PROBLEM, f.data(), jnp.asarray(f.x), jnp.asarray(f.y))


def measured(setup: runner.Setup, method: str, N: int) -> tuple[np.ndarray, float | None]:
    """(mean estimate, root mean square deviation from it) by the library; over the random number by enumeration."""
    if method == "LFedNest":
        h = runner.estimates(
            setup, LFedNest(inner_rounds=N, neumann_terms=N, truncation="full", **STEPS), hessian_lr=[LAM]
        )
        return h[0], None
    kind, extra, last = (AggITD, {}, N + 1) if method == "AggITD" else (FedNest, {"neumann_terms": N}, N)
    single = runner.estimates(setup, kind(inner_rounds=N, truncation=0, **extra, **STEPS), truncation=range(last))
    full = runner.estimates(setup, kind(inner_rounds=N, truncation="full", **extra, **STEPS), hessian_lr=[LAM])
    return full[0], np.sqrt(np.mean(np.sum((single - single.mean(0)) ** 2, axis=1)))


def formula(f: Family, method: str, N: int) -> tuple[np.ndarray, float | None]:
    """The same in numpy."""
    if method == "LFedNest":
        y = f.path(f.plain(f.x, *LOWER), N)[-1]
        series = [LAM * sum(power(np.eye(DY) - LAM * H, n) for n in range(N + 1)) for H in f.H]
        return _local(f, y, np.stack(series)), None
    M, y = np.eye(DY) - LAM * f.H.mean(0), f.path(f.corrected(f.x, *LOWER), N)
    slope = [f.outer_y(z).mean(0) for z in y]
    if method == "AggITD":
        single = [LAM * (N + 1) * power(M, N - Q) @ slope[Q] for Q in range(N + 1)]
        v = np.mean(single, axis=0)
    else:
        single = [LAM * N * power(M, n) @ slope[-1] for n in range(N)]
        v = LAM * sum(power(M, n) @ slope[-1] for n in range(N + 1))
    h = np.stack([f.compose(f.x, one) for one in single])
    return f.compose(f.x, v), np.sqrt(np.mean(np.sum((h - h.mean(0)) ** 2, axis=1)))


def local_limit(f: Family, exact_lower: bool = False) -> np.ndarray:
    """What LFedNest's estimate goes to; with an exact lower level what local hypergradients alone would make of it."""
    y = f.solution(f.x) if exact_lower else f.plain(f.x, *LOWER)[1]
    return _local(f, y, np.linalg.inv(f.H))


def _local(f: Family, y: np.ndarray, inverses: np.ndarray) -> np.ndarray:
    """mean d_x f_i - J_i inverse_i d_y f_i."""
    return CURVATURE * f.x + np.einsum("iab,iac,ic->b", f.B, inverses, f.outer_y(y)) / len(f.H)


def _markdown(folder: Path, frame: pandas.DataFrame) -> Path:
    floors, curves = frame["quantity"] == "floor", frame["quantity"] != "floor"
    limit = frame[floors].set_index("spread")["formula"]
    last = frame[curves & (frame["N"] == frame[curves]["N"].max())].set_index(["quantity", "method", "spread"])
    rows = []
    for spread in frame["spread"].unique():
        f = family(spread)
        alone = np.linalg.norm(local_limit(f, exact_lower=True) - f.hypergradient(f.x))
        errors = [common.number(last["measured"]["error", method, spread]) for method in LABELS]
        spreads = [common.number(last["measured"]["deviation", method, spread]) for method in UNBIASED]
        rows.append([f"{spread:g}", *errors, common.number(limit[spread]), common.number(alone), *spreads])
    head = ["s", *(f"{method}: error" for method in LABELS), "LFedNest: predicted floor", "floor with exact y*"]
    head += [f"{method} uniform: deviation" for method in UNBIASED]
    f = family(0)
    return common.markdown(
        folder / "heterogeneity.md", f"Hypergradients at N = {int(last['N'].iloc[0])}; |grad Phi| = "
        f"{np.linalg.norm(f.hypergradient(f.x)):.3g} at every s.", head, rows,
    )  # fmt: skip


def _figure(folder: Path, frame: pandas.DataFrame) -> Path:
    spreads = frame["spread"].unique()
    figure, axes = common.panels(2, len(spreads), (3.1 * len(spreads) + 0.6, 6.4), sharex=True, sharey="row")
    for column, spread in enumerate(spreads):
        at = frame[frame["spread"] == spread]
        floor = at[at["quantity"] == "floor"]["formula"].item()
        for place, (method, label) in enumerate(LABELS.items()):
            for row, quantity in enumerate(("error", "deviation")):
                points = at[(at["method"] == method) & (at["quantity"] == quantity)]
                axes[row, column].plot(points["rounds"], points["measured"], **common.style(place), label=label)
                axes[row, column].plot(points["rounds"], points["formula"], **common.FORMULA, label="formula")
        if floor > 1e-9:
            axes[0, column].axhline(
                floor, color="grey", linestyle=":", linewidth=1.6, label="LFedNest's predicted floor"
            )
        axes[0, column].set(title=f"heterogeneity s = {spread:g}", xscale="log", yscale="log")
        axes[1, column].set(xlabel="communication rounds of an estimate", yscale="log")
    axes[0, 0].set_ylabel("error of the mean estimate\n$|E\\,h - \\nabla\\Phi|$")
    axes[1, 0].set_ylabel("deviation of a random one (uniform)\n$(E\\,|h - E\\,h|^2)^{1/2}$")
    common.legend(figure, 5)
    return common.save(figure, folder / "heterogeneity.png")
