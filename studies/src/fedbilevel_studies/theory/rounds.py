"""Rounds to a given |grad Phi|^2: AggITD's one loop for both levels against FedNest's two, one after the other.

An iteration of AggITD takes 2N+3 rounds, one of FedNest with T = N takes 3N+3. Where both need as many iterations, the
ratio of their rounds is (2N+3)/(3N+3), which goes to 2/3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas

from fedbilevel import AggITD, FedNest

from . import common, problems, runner
from .family import DX, DY, Family, family, power

LEVEL, BUDGET, LAM = 1e-6, 300_000, 1.5
METHODS = ("AggITD", "FedNest")


def rounds_ratio(folder: Path, quick: bool = False, progress: common.Progress = lambda text: None) -> list[Path]:
    """The study; leaves rounds-ratio.csv, .md and .png."""
    numbers = (2, 4) if quick else (2, 4, 8, 16, 32)
    settings = {"N": numbers, "level": LEVEL, "inner": problems.INNER, "outer": problems.OUTER}

    def rows():
        with jax.enable_x64(True):
            return [row for N in numbers for row in _both(N, progress)]

    frame = common.table(folder, "rounds-ratio", settings, rows)
    common.agree(frame, "rounds-ratio")
    spent = lambda row, method: (
        common.count(row[f"{method}_iterations"]) + " / " + common.count(row[f"{method}_rounds"])
    )
    table = [
        [f"{row['N']:.0f}", *(spent(row, method) for method in METHODS), f"{row['ratio']:.3f}", f"{row['formula']:.3f}"]
        for _, row in frame.iterrows()
    ]
    head = ["N = T", *(f"{method}: iterations / rounds" for method in METHODS), "ratio of rounds", "(2N+3)/(3N+3)"]
    text = f"Rounds until |h_N(x)|^2 < {LEVEL:g}, each method with the best steps of one grid."
    return [
        folder / "rounds-ratio.csv",
        common.markdown(folder / "rounds-ratio.md", text, head, table),
        _figure(folder, frame),
    ]


def _both(N: int, progress: common.Progress) -> Iterator[common.Row]:
    setup, row = problems.quadratic(), {"N": N}
    f = family(1.0)
    lanes = problems.grid(setup, 1)
    for method in METHODS:
        progress(f"rounds-ratio: {method}, N = {N}")
        extra = {} if method == "AggITD" else {"neumann_terms": N}
        algorithm = {"AggITD": AggITD, "FedNest": FedNest}[method](
            inner_rounds=N, local_steps=1, truncation="full", **extra
        )
        best = None
        for lam in problems.INNER:  # what the series can see at best depends on its step
            chosen = {name: values[lanes["hessian_lr"] == lam] for name, values in lanes.items()}
            seen = dataclasses.replace(setup, stationarity=visible(f, N, lam))
            race = runner.race(seen, algorithm, LEVEL, BUDGET if best is None else best.rounds, **chosen)
            if race.lane is not None and (best is None or race.rounds < best.rounds):
                best = race
                row |= {f"{method}_{name}": values[race.lane] for name, values in chosen.items()}
        assert best is not None
        row |= {f"{method}_rounds": best.rounds, f"{method}_iterations": best.iterations}
    ratio = row["AggITD_rounds"] / row["FedNest_rounds"]
    iterations = row["AggITD_iterations"] / row["FedNest_iterations"]
    formula = (2 * N + 3) / (3 * N + 3)
    yield {**row, "ratio": ratio, **common.point(ratio / iterations, formula, 0)}


def visible(f: Family, N: int, lam: float) -> problems.Affine:
    """h_N = d_x f - J (I - M^{N+1}) v*(x): what N+1 terms make of grad Phi at y*(x), and what both methods drive to zero."""
    seen = np.eye(DY) - power(np.eye(DY) - lam * f.H.mean(0), N + 1)
    at = lambda x: f.compose(x, seen @ f.adjoint(x))
    zero = at(np.zeros(DX))
    return problems.Affine(jnp.asarray(np.stack([at(e) - zero for e in np.eye(DX)], axis=1)), jnp.asarray(zero))


def _figure(folder: Path, frame: pandas.DataFrame) -> Path:
    figure, axes = common.panels(1, 2, (10, 4.4))
    left, right = axes[0]
    for place, method in enumerate(METHODS):
        left.plot(frame["N"], frame[f"{method}_rounds"], **common.style(place), label=method)
    left.set(xlabel="N = T, turns of the lower loop", ylabel=f"rounds to $|h_N|^2$ < {LEVEL:g}", yscale="log")
    left.legend(frameon=False)
    right.plot(frame["N"], frame["ratio"], **common.style(0), label="measured, AggITD over FedNest")
    right.plot(frame["N"], frame["formula"], **common.FORMULA, label="(2N+3) / (3N+3)")
    right.axhline(2 / 3, color="grey", linestyle=":", label="2/3")
    right.set(xlabel="N = T, turns of the lower loop", ylabel="ratio of rounds", ylim=(0.5, 1))
    right.legend(frameon=False)
    for axis in axes[0]:
        common.ticks(axis, frame["N"])
    return common.save(figure, folder / "rounds-ratio.png")
