"""Uncorrected local steps: where SimFBO and ShroFBO stop, when clients take unequal numbers of them.

On the quadratic family D_i(z) = M_i z + m_i, z = (x, y, v). A client's tau_i local steps with E = diag of the steps go to
P_i z - sum_{s < tau_i} (I - E M_i)^s E m_i with P_i = (I - E M_i)^{tau_i}, so that the fixed points solve linear systems:

    SimFBO     mean_i (moves of i)           = 0      for tiny steps: mean_i tau_i D_i(z) = 0, ANOTHER problem's solution
    ShroFBO    mean_i (moves of i) / tau_i   = 0      for tiny steps: mean_i D_i(z) = 0, the solution

tau_i is drawn from 1..20, once, for each client.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas

from fedbilevel import ShroFBO, SimFBO, solve

from . import common
from .family import CURVATURE, DX, DY, PROBLEM, Family, family, power

SPREAD, MOST = 1.0, 20
RATES = (0.02, 0.03, 0.03)  # steps of x, y and v; times the scale
METHODS = {"SimFBO": SimFBO, "ShroFBO": ShroFBO}


def steps(clients: int = 8) -> tuple[int, ...]:
    """tau_i."""
    return tuple(int(n) for n in np.random.default_rng(0).integers(1, MOST + 1, clients))


def linear(f: Family, i: int) -> tuple[np.ndarray, np.ndarray]:
    """(M, m) in D_i(z) = M z + m."""
    zero = np.zeros
    x = np.hstack([CURVATURE * np.eye(DX), zero((DX, DY)), f.B[i].T])
    y = np.hstack([-f.B[i], f.H[i], zero((DY, DY))])
    v = np.hstack([zero((DY, DX)), -f.A[i], f.H[i]])
    return np.vstack([x, y, v]), np.concatenate([zero(DX), -f.b[i], f.A[i] @ f.t[i]])


def fixed_point(
    f: Family, rates: tuple[float, float, float], taus: tuple[int, ...], normalised: bool = False
) -> np.ndarray:
    """z where the mean of the clients' moves (or of their moves over their steps) is zero."""
    E = np.diag(np.concatenate([np.full(n, rate) for n, rate in zip((DX, DY, DY), rates, strict=True)]))
    left, right = 0, 0
    for i, tau in enumerate(taus):
        M, m = linear(f, i)
        contracted = np.eye(len(M)) - E @ M
        share = 1 / tau if normalised else 1
        left = left + share * (power(contracted, tau) - np.eye(len(M)))
        right = right + share * sum(power(contracted, s) for s in range(tau)) @ E @ m
    return np.linalg.solve(left, right)


def weighted_solution(f: Family, weights: tuple[int, ...] | None) -> np.ndarray:
    """z where the mean of D_i with these weights is zero."""
    mean = np.average([np.column_stack(linear(f, i)) for i in range(len(f.H))], axis=0, weights=weights)
    return -np.linalg.solve(mean[:, :-1], mean[:, -1])


def unequal_steps(folder: Path, quick: bool = False, progress: common.Progress = lambda text: None) -> list[Path]:
    """The study; leaves unequal-steps.csv, .md and .png."""
    scales = (1.0, 0.3) if quick else (1.0, 0.5, 0.3, 0.2, 0.1)
    taus = steps()
    settings = {"scales": scales, "rates": RATES, "steps": taus, "spread": SPREAD}

    def rows():
        found, f = [], family(SPREAD)
        with jax.enable_x64(True):
            for scale in scales:
                rates = (RATES[0] * scale, RATES[1] * scale, RATES[2] * scale)
                for name in METHODS:
                    progress(f"unequal-steps: {name}, steps times {scale:g}")
                    z = fixed_point(f, rates, taus, name == "ShroFBO")
                    x = _end(f, name, rates, taus, z)
                    size = np.linalg.norm(z)
                    point = common.point(_slope(f, x), _slope(f, z[:DX]), size)
                    # the run ends within a part in 1e5 of the fixed point
                    found.append({"scale": scale, "method": name, **point, "tolerance": 1e-4 * point["formula"] + 1e-8})
        return found

    frame = common.table(folder, "unequal-steps", settings, rows)
    common.agree(frame, "unequal-steps")
    f = family(SPREAD)
    mismatch = _slope(f, weighted_solution(f, taus)[:DX])
    lines = [
        [f"{scale:g}", *(common.number(at[at["method"] == name]["measured"].item()) for name in METHODS)]
        for scale, at in frame.groupby("scale", sort=False)
    ]
    head = ["steps times", *(f"{name}: abs(grad Phi)^2" for name in METHODS)]
    text = f"|grad Phi|^2 where each stops, clients with {', '.join(map(str, taus))} local steps."
    note = f"For ever smaller steps SimFBO goes to {common.number(mismatch)}, ShroFBO to 0."
    table = common.markdown(folder / "unequal-steps.md", text, head, lines, note)
    return [folder / "unequal-steps.csv", table, _figure(folder, frame, mismatch)]


def _slope(f: Family, x: np.ndarray) -> float:
    return float(np.sum(f.hypergradient(x) ** 2))


def _end(
    f: Family, name: str, rates: tuple[float, float, float], taus: tuple[int, ...], near: np.ndarray
) -> np.ndarray:
    """x after so many iterations that nothing is left but the fixed point; started close to it, for small steps are slow."""
    algorithm = METHODS[name](outer_lr=rates[0], inner_lr=rates[1], hessian_lr=rates[2], client_steps=taus)
    x, y = near[:DX] + 0.01 * f.x, near[DX : DX + DY]
    most = int(20_000 * RATES[0] / rates[0])
    result = solve(
        PROBLEM,
        f.data(),
        algorithm,
        jnp.asarray(x),
        jnp.asarray(y),
        most,
        key=jax.random.key(0),
        evaluate_every=most,
        check=False,
    )
    return np.asarray(result.x)


def _figure(folder: Path, frame: pandas.DataFrame, mismatch: float) -> Path:
    figure, axes = common.panels(1, 1, (6.4, 4.4))
    axis = axes[0, 0]
    for place, (name, at) in enumerate(frame.groupby("method", sort=False)):
        axis.plot(at["scale"], at["measured"], **common.style(place), label=name)
        axis.plot(at["scale"], at["formula"], **common.FORMULA, label="formula" if place == 0 else None)
    axis.axhline(mismatch, color="grey", linestyle=":", label="solution with weights $\\tau_i$")
    axis.set(xlabel="local steps, times", ylabel="$|\\nabla\\Phi|^2$ where it stops", yscale="log")
    common.ticks(axis, sorted(frame["scale"].unique()))
    axis.legend(frameon=False)
    return common.save(figure, folder / "unequal-steps.png")
