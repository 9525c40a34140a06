"""Does a larger cohort help? The floor that sampling clients leaves, and the rounds to a level, over the cohort's size.

Every round asks m of n clients of the quadratic family, each with all its rows, so that all noise is the choice of clients.
A mean over m clients drawn without replacement has c = (n - m) / (m (n - 1)) of the variance of one client, and a method
whose error is that noise has a floor in proportion (for small steps): linear speed-up. Other ends are possible, and occur:
no floor at all (control variates, or a look at all clients), one from the clients' own Hessians, and one that only more
chains lower.

SimFBO's floor has a closed form. With one local step it is z <- z - E mean_{i in S} D_i(z), D_i(z) = M_i z + m_i, as in
`unequal`. At the solution z*, d_i = M_i z* + m_i has mean zero, and S, the covariance of z - z*, solves

    S = A S A' + c E [ mean_i (M_i - M) S (M_i - M)' + mean_i d_i d_i' ] E,     A = I - E M.

The mean of |grad Phi|^2 = |G (x - x*)|^2 is then trace(G S_xx G').
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pandas

from fedbilevel import Simulation, protocol
from fedbilevel.algorithms import ALGORITHMS

from ..kinds import Setting
from . import common, problems, runner
from .family import DX, DY, Family, family
from .stationarity import FULL, LOCAL
from .unequal import linear, weighted_solution

CLIENTS, SPREAD, COHORTS = 64, 0.3, (1, 4, 16)
RATES = {"inner_lr": 0.5, "hessian_lr": 0.5, "outer_lr": 0.2}  # times the scale
SCALES = tuple(2.0**-k for k in range(8))
AT = 0.5  # the scale at which floors are compared
LEVEL, BLOCKS, KEYS = 0.02, 800, 8
ROUNDS, LEAST = 20_000, 4_000  # of a run; and the fewest iterations, after half of which floors are reached
# name -> (algorithm, settings, whether its v moves by steps that the scale is for; else hessian_lr is its series')
METHODS: dict[str, tuple[str, dict[str, Setting], bool]] = {
    "SimFBO": ("simfbo", {}, True),
    "FedBiOAcc": ("fedbioacc", {"slow_after": 1e6}, True),
    "AggITD, full, warm v (ours)": ("aggitd", {"inner_rounds": 1, **FULL, "warm_start_v": True}, False),
    "FedNest, full, 20 terms": ("fednest", {"inner_rounds": 2, "neumann_terms": 20, **FULL}, False),
    "FedMBO, 4 chains": ("fedmbo", {"inner_rounds": 2, "neumann_terms": 20}, False),
    "FedMBO, m chains": ("fedmbo", {"inner_rounds": 2, "neumann_terms": 20, "chains": None}, False),
    "LocalBSGM": ("localbsgm", LOCAL, False),
    "LocalBSGVRM": ("localbsgvrm", LOCAL, False),
    "AdaFBiO": ("adafbio", {**LOCAL, "damping": 1.0}, False),
    "FedMSA": ("fedmsa", {}, True),
    "Lockstep (ours)": ("lockstep", {}, True),
}
NOTHING, BLOWN_UP = 1e-9, 1e6  # what is no floor, and what is none either
SERIES = 1.5  # hessian_lr of the Neumann series, whose largest curvature is about 1


def covariance(f: Family, cohort: int, rates: tuple[float, ...]) -> np.ndarray:
    """S, of SimFBO with one local step and steps `rates` of x, y and v."""
    n = len(f.H)
    E = np.diag(np.concatenate([np.full(size, rate) for size, rate in zip((DX, DY, DY), rates, strict=True)]))
    matrices, vectors = zip(*(linear(f, i) for i in range(n)), strict=True)
    M, z = np.mean(matrices, axis=0), weighted_solution(f, None)
    A, share = np.eye(len(z)) - E @ M, (n - cohort) / (cohort * (n - 1))
    apart, pulls = (
        [E @ (own - M) for own in matrices],
        [E @ (own @ z + m) for own, m in zip(matrices, vectors, strict=True)],
    )
    spread = np.mean([np.kron(own, own) for own in apart], axis=0)
    noise = np.mean([np.outer(d, d) for d in pulls], axis=0)
    S = np.linalg.solve(np.eye(len(z) ** 2) - np.kron(A, A) - share * spread, share * noise.ravel())
    return S.reshape(A.shape)


def floor(f: Family, cohort: int, scale: float) -> float:
    """The mean of |grad Phi|^2 of SimFBO, one local step, in its stationary state."""
    S = covariance(f, cohort, tuple(RATES[name] * scale for name in ("outer_lr", "inner_lr", "hessian_lr")))
    G, _ = f.upper()
    return float(np.trace(G @ S[:DX, :DX] @ G.T))


def speed_up(folder: Path, quick: bool = False, progress: common.Progress = lambda text: None) -> list[Path]:
    """The study; leaves speed-up.csv, .md and .png."""
    names = ("SimFBO", "Lockstep (ours)") if quick else tuple(METHODS)
    cohorts = COHORTS[1:] if quick else COHORTS
    settings = {"methods": {name: METHODS[name] for name in names}, "cohorts": cohorts, "scales": SCALES}
    settings |= {"clients": CLIENTS, "spread": SPREAD, "rates": RATES, "series": SERIES, "keys": KEYS}
    settings |= {"level": LEVEL, "rounds": ROUNDS, "least": LEAST, "at": AT, "blocks": BLOCKS}

    def rows():
        found, f = [], family(SPREAD, CLIENTS)
        with jax.enable_x64(True):
            for name in names:
                for cohort in cohorts:
                    progress(f"speed-up: {name}, {cohort} of {CLIENTS} clients")
                    found.append({"method": name, "cohort": cohort, **_measure(name, cohort, f)})
        return found

    frame = common.table(folder, "speed-up", settings, rows)
    common.agree(frame[frame["method"] == "SimFBO"], "speed-up")
    least, most = cohorts[0], cohorts[-1]
    lines = []
    for name, at in frame.groupby("method", sort=False):
        one, many = (at[at["cohort"] == m].iloc[0] for m in (least, most))
        times = one["measured"] / many["measured"]
        floors = one["measured"] > NOTHING and one["measured"] < BLOWN_UP
        lines.append([
            str(name), _floor(one["measured"]), _floor(many["measured"]), f"{times:.1f}" if floors else "-",
            common.count(one["rounds"]), common.count(many["rounds"]),
            f"{one['rounds'] / many['rounds']:.1f}" if np.isfinite(one["rounds"]) else "-",
        ])  # fmt: skip
    head = ["method", f"floor, m = {least}", f"floor, m = {most}", "times lower"]
    head += [f"rounds to {LEVEL:g}, m = {least}", f"m = {most}", "times fewer"]
    law = _share(least) / _share(most)
    text = f"|grad Phi|^2 with {CLIENTS} clients, cohorts of m; constant steps; {KEYS} runs each."
    notes = (
        f"The variance of the mean of m clients is {law:.1f} times lower at m = {most} than at m = {least}. "
        f"Floors are at one step size for all, rounds at the best of {len(SCALES)}.",
        "FedMSA looks at all clients in the first of its two rounds; FedMBO's chains ask one client a factor, whatever m.",
    )
    table = common.markdown(folder / "speed-up.md", text, head, lines, *notes)
    return [folder / "speed-up.csv", table, _figure(folder, frame, cohorts)]


def _share(cohort: int) -> float:
    """c."""
    return (CLIENTS - cohort) / (cohort * (CLIENTS - 1))


def _floor(value: float) -> str:
    return "none" if value < NOTHING else common.number(value) if value < BLOWN_UP else "blew up"


def _measure(name: str, cohort: int, f: Family) -> dict[str, float]:
    """The floor at scale `AT` with its standard error, and the rounds to the level at the best scale."""
    setup = problems.quadratic(CLIENTS, SPREAD, cohort)
    kind, options, together = METHODS[name]
    options = {field: cohort if value is None else value for field, value in options.items()}
    algorithm = ALGORITHMS[kind](**{"local_steps": 1, **options})
    scales = np.repeat(SCALES, KEYS)
    lanes = {field: RATES[field] * scales for field in ("inner_lr", "outer_lr")}
    lanes["hessian_lr"] = RATES["hessian_lr"] * scales if together else np.full_like(scales, SERIES)
    keys = jax.random.split(setup.key, len(scales))
    each = protocol(algorithm, setup.problem, setup.data, setup.x, setup.y, Simulation(cohort=cohort)).rounds
    used, values = runner.curves(setup, algorithm, max(LEAST, round(ROUNDS / each)), BLOCKS, keys, **lanes)
    values = np.where(np.isfinite(values), values, np.inf).reshape(len(SCALES), KEYS, BLOCKS)
    ends = values[SCALES.index(AT), :, BLOCKS // 2 :].mean(1)  # a number for each key: they are independent
    below = values.mean(1) < LEVEL
    rounds = [used[np.argmax(row)] if row.any() else np.inf for row in below]
    formula = floor(f, cohort, AT) if name == "SimFBO" else np.nan
    error = ends.std(ddof=1) / np.sqrt(KEYS)
    return {
        "measured": ends.mean(), "formula": formula, "tolerance": common.ERRORS * error, "rounds": float(min(rounds)),
    }  # fmt: skip


def _figure(folder: Path, frame: pandas.DataFrame, cohorts: tuple[int, ...]) -> Path:
    figure, axes = common.panels(1, 2, (11.2, 6.0))
    for place, (name, at) in enumerate(frame.groupby("method", sort=False)):
        look = {**common.style(place), "label": str(name)}
        floors = at["measured"].where((at["measured"] > NOTHING) & (at["measured"] < BLOWN_UP))
        axes[0, 0].plot(at["cohort"], floors, **look)
        axes[0, 1].plot(at["cohort"], at["rounds"].replace(np.inf, np.nan), **look)
        if at["formula"].notna().all():
            axes[0, 0].plot(at["cohort"], at["formula"], **common.FORMULA, label="SimFBO's formula")
    simfbo, law = frame[frame["method"] == "SimFBO"], np.array([_share(m) for m in cohorts])
    for axis, column in zip(axes[0], ("measured", "rounds"), strict=True):
        start = 1.6 * simfbo[column].iloc[0] / law[0]
        axis.plot(cohorts, start * law, color="grey", linewidth=1, linestyle=":", label="(n - m) / (m (n - 1))")
        axis.set(yscale="log", xlabel=f"m, of n = {CLIENTS} clients")
        common.ticks(axis, cohorts)
    axes[0, 0].set(title="floor at one step size, where there is one", ylabel="$|\\nabla\\Phi|^2$")
    axes[0, 1].set(title=f"rounds to {LEVEL:g}, best step size", ylabel="rounds")
    common.legend(figure, 4)
    return common.save(figure, folder / "speed-up.png")
