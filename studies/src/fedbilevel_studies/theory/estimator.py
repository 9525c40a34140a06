"""The estimator itself, on a quadratic with M = I - lam H and lower error map P: its bias and its second moment.

    E v - v* = -M^{N+1} v* + lam sum_{q=0}^{N} M^{N-q} A P^q (y^0 - y*)
    E |v_Q|^2 <= lam (N+1) C^2 / (mu (2 - lam mu))      C >= |d_y f| on the way, mu the smallest eigenvalue of H

for lam <= 2/(L+mu). Both by enumerating Q = 0..N through the library, against the closed form.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas

from fedbilevel import AggITD, RunError

from . import common, runner
from .family import DY, PROBLEM, Family, family, power

SPREAD, LOWER = 1.0, (0.7, 2)
STARTS = {"zero": "$y^0 = 0$", "solution": "$y^0 = y^*$: truncation alone"}


def bias(folder: Path, quick: bool = False, progress: common.Progress = lambda text: None) -> list[Path]:
    """|E v - v*| over N for several Hessian steps; leaves bias.csv, .md and .png."""
    lams, numbers = ((1.5,), (4, 16)) if quick else ((0.25, 0.5, 1.0, 1.5, 1.8), (1, 2, 4, 8, 16, 32, 64, 128))
    settings = {"spread": SPREAD, "lower": LOWER, "hessian_lr": lams, "N": numbers}

    def rows():
        found = []
        with jax.enable_x64(True):
            for N in numbers:
                progress(f"bias: N = {N}")
                for start in STARTS:
                    f = _started(start)
                    best = f.adjoint(f.x)
                    for lam, v in zip(lams, _vectors(f, N, lams), strict=True):
                        place = {"start": start, "hessian_lr": lam, "N": N, "rounds": 2 * N + 3}
                        expected, size = best + bias_formula(f, N, lam), N * np.abs(best).max()
                        found.append({**place, **common.distance(v.mean(0), expected, best, size)})
        return found

    frame = common.table(folder, "bias", settings, rows)
    common.agree(frame, "bias")
    head = ["start", "lam", *(f"N = {N}" for N in numbers)]
    table = [
        [start, f"{lam:g}", *(common.number(value) for value in at.sort_values("N")["measured"])]
        for (start, lam), at in frame.groupby(["start", "hessian_lr"], sort=False)
    ]
    size = np.linalg.norm(family(SPREAD).adjoint(family(SPREAD).x))
    text = f"|E v - v*|, L = 1, |v*| = {size:.3g}; every number agrees with the formula."
    return [
        folder / "bias.csv", common.markdown(folder / "bias.md", text, head, table), _bias_figure(folder, frame)
    ]  # fmt: skip


def bias_formula(f: Family, N: int, lam: float) -> np.ndarray:
    """E v - v*."""
    M, (P, best) = np.eye(DY) - lam * f.H.mean(0), f.corrected(f.x, *LOWER)
    moved = sum(power(M, N - q) @ f.A.mean(0) @ power(P, q) for q in range(N + 1)) @ (f.y - best)
    return -power(M, N + 1) @ f.adjoint(f.x) + lam * moved


def _started(start: str) -> Family:
    f = family(SPREAD)
    return dataclasses.replace(f, y=f.solution(f.x)) if start == "solution" else f


def _vectors(f: Family, N: int, lams: tuple[float, ...]) -> np.ndarray:
    """(steps, N+1, dim y) v for every Hessian step and Q = 0..N, by the library."""
    setup = runner.Setup(PROBLEM, f.data(), jnp.asarray(f.x), jnp.asarray(f.y))
    algorithm = AggITD(inner_rounds=N, inner_lr=LOWER[0], local_steps=LOWER[1], truncation=0)
    steps, numbers = np.repeat(lams, N + 1), np.tile(np.arange(N + 1), len(lams))
    v = runner.estimates(setup, algorithm, runner.adjoint, hessian_lr=steps, truncation=numbers)
    return v.reshape(len(lams), N + 1, DY)


def _bias_figure(folder: Path, frame: pandas.DataFrame) -> Path:
    figure, axes = common.panels(1, 2, (10, 4.6), sharey=True)
    for axis, (start, title) in zip(axes[0], STARTS.items(), strict=True):
        for place, (lam, at) in enumerate(frame[frame["start"] == start].groupby("hessian_lr")):
            axis.plot(at["N"], at["measured"], **common.style(place), label=f"$\\lambda$ = {lam:g} / L")
            axis.plot(at["N"], at["formula"], **common.FORMULA, label="formula")
        axis.set(title=title, xlabel="N, turns of the lower loop", yscale="log")
        common.ticks(axis, sorted(frame["N"].unique()))
    axes[0, 0].set_ylabel("bias $|E\\,v - v^*|$")
    common.legend(figure, 6)
    return common.save(figure, folder / "bias.png")


def q_variance(folder: Path, quick: bool = False, progress: common.Progress = lambda text: None) -> list[Path]:
    """E |v_Q|^2 over N, its closed form and its bound; leaves q-variance.csv, .md and .png."""
    lam = 1.5
    numbers = (4, 16) if quick else (2, 4, 8, 16, 32, 64)
    settings = {"spread": SPREAD, "lower": LOWER, "hessian_lr": lam, "N": numbers}

    def rows():
        f, found = _started("zero"), []
        with jax.enable_x64(True):
            for N in numbers:
                progress(f"q-variance: N = {N}")
                v = _vectors(f, N, (lam,))[0]
                second, bound = moment_formula(f, N, lam), moment_bound(f, N, lam)
                measured = np.mean(np.sum(v**2, axis=1))
                spread = np.mean(np.sum((v - v.mean(0)) ** 2, axis=1))
                found.append({"N": N, **common.point(measured, second, 0), "bound": bound, "variance": spread})
        return found

    frame = common.table(folder, "q-variance", settings, rows)
    common.agree(frame, "q-variance")
    if (frame["measured"] > frame["bound"]).any():
        raise RunError("q-variance: E |v_Q|^2 is above its bound.")
    table = [
        [common.count(N), *map(common.number, row)]
        for N, *row in zip(frame["N"], frame["measured"], frame["variance"], frame["bound"], strict=True)
    ]
    head = ["N", "E abs(v_Q)^2", "of it variance", "bound"]
    text = "Exact over Q = 0..N; the closed form gives the same numbers."
    return [
        folder / "q-variance.csv",
        common.markdown(folder / "q-variance.md", text, head, table),
        _moment_figure(folder, frame),
    ]


def moment_formula(f: Family, N: int, lam: float) -> float:
    """E |v_Q|^2."""
    M, path = np.eye(DY) - lam * f.H.mean(0), f.path(f.corrected(f.x, *LOWER), N)
    v = [lam * (N + 1) * power(M, N - Q) @ f.outer_y(path[Q]).mean(0) for Q in range(N + 1)]
    return float(np.mean([one @ one for one in v]))


def moment_bound(f: Family, N: int, lam: float) -> float:
    """lam (N+1) C^2 / (mu (2 - lam mu))."""
    mu = f.eigenvalues[0]
    C = max(np.linalg.norm(f.outer_y(y).mean(0)) for y in f.path(f.corrected(f.x, *LOWER), N))
    return float(lam * (N + 1) * C**2 / (mu * (2 - lam * mu)))


def _moment_figure(folder: Path, frame: pandas.DataFrame) -> Path:
    figure, axes = common.panels(1, 1, (6.4, 4.6))
    axis = axes[0, 0]
    axis.plot(frame["N"], frame["bound"], color="grey", linestyle=":", linewidth=1.8, label="bound")
    axis.plot(frame["N"], frame["measured"], **common.style(0), label="$E\\,|v_Q|^2$, Q enumerated")
    axis.plot(frame["N"], frame["variance"], **common.style(1), label="of it variance")
    axis.plot(frame["N"], frame["formula"], **common.FORMULA, label="formula")
    last = frame.iloc[-1]
    axis.plot(
        frame["N"],
        last["formula"] * (frame["N"] + 1) / (last["N"] + 1),
        color="grey",
        linewidth=1,
        label="linear in N+1",
    )
    axis.set(xlabel="N, turns of the lower loop", ylabel="second moment over Q", yscale="log")
    common.ticks(axis, frame["N"])
    axis.legend(frameon=False, fontsize=9)
    return common.save(figure, folder / "q-variance.png")
