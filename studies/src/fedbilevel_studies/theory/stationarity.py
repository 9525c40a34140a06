"""Every method on heterogeneous ridge tuning, all clients and all rows, float64: |grad Phi|^2 over rounds.

Each has the best steps of the one grid of `problems`: those that are first below 1e-8, or lowest at the end. With one local
step the methods that average before they compose go to the solution. With five, those without corrections stop at a floor;
those that use the clients' own Hessians stop at theirs however many steps they take.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pandas

from fedbilevel import Algorithm, protocol
from fedbilevel.algorithms import ALGORITHMS

from ..kinds import Setting
from ..oracles import oracle_calls
from . import common, problems, runner

LEVEL, BUDGET, BLOCKS = 1e-8, 3_000, 100
FULL: dict[str, Setting] = {"truncation": "full"}
_SERIES: dict[str, Setting] = {"inner_rounds": 5, "neumann_terms": 20, **FULL}
LOCAL: dict[str, Setting] = {"neumann_terms": 20, **FULL, "slow_after": 1e6, "forget": 0.5}
METHODS: dict[str, tuple[str, dict[str, Setting]]] = {
    "AggITD, full, warm v (ours), N = 1": ("aggitd", {"inner_rounds": 1, **FULL, "warm_start_v": True}),
    "Lockstep (ours)": ("lockstep", {}),
    "FedNest, full, 20 terms": ("fednest", _SERIES),
    "FedMSA": ("fedmsa", {}),
    "SimFBO": ("simfbo", {}),
    "MemFBO": ("memfbo", {}),
    "FedBiOAcc": ("fedbioacc", {"slow_after": 1e6}),
    "FedF2SA": ("fedf2sa", {"inner_rounds": 2, "penalty_growth": 1.0}),
    "FedMBO, 4 chains": ("fedmbo", {"inner_rounds": 2, "neumann_terms": 20}),
    "LFedNest, 20 terms": ("lfednest", _SERIES),
    "LocalBSGM": ("localbsgm", LOCAL),
    "LocalBSGVRM": ("localbsgvrm", LOCAL),
    "AdaFBiO": ("adafbio", {**LOCAL, "damping": 1.0}),
}
SAME = "ShroFBO and FedBiO are SimFBO here: equal numbers of local steps, and a server step of one."


def stationarity(folder: Path, quick: bool = False, progress: common.Progress = lambda text: None) -> list[Path]:
    """The study; leaves stationarity.csv, .md and .png."""
    names = ("Lockstep (ours)", "SimFBO", "LocalBSGM") if quick else tuple(METHODS)
    budget, locals_ = (600, (1,)) if quick else (BUDGET, (1, 5))
    settings = {"methods": {name: METHODS[name] for name in names}, "local_steps": locals_, "budget": budget}
    settings |= {"level": LEVEL, "inner": problems.INNER, "outer": problems.OUTER, "blocks": BLOCKS}

    def rows():
        found = []
        with jax.enable_x64(True):
            for local_steps in locals_:
                for name in names:
                    progress(f"stationarity: {name}, {local_steps} local steps")
                    found += [
                        {"method": name, "local_steps": local_steps, **row} for row in _curve(name, local_steps, budget)
                    ]
        return found

    frame = common.table(folder, "stationarity", settings, rows)
    lines = []
    for name, at in frame.groupby("method", sort=False):
        line = [str(name)]
        for local_steps in locals_:
            curve = at[at["local_steps"] == local_steps]
            below = curve[curve["value"] < LEVEL]["rounds"]
            rounds = below.min() if len(below) else np.inf
            kilobytes, calls = (rounds * each for each in _costs(str(name), local_steps))
            spent = [common.number(kilobytes), common.count(calls)] if np.isfinite(rounds) else ["-", "-"]
            line += [common.count(rounds), *spent, common.number(curve["value"].iloc[-1])]
        lines.append(line)
    head = ["method"]
    for local_steps in locals_:
        head += [f"{local_steps} local: rounds to {LEVEL:g}", "kB sent by one client", "its oracle calls"]
        head += [f"at {budget:,} rounds"]
    text = "|grad Phi|^2 on heterogeneous ridge tuning, 8 clients, everything exact, best steps of one grid."
    table = common.markdown(folder / "stationarity.md", text, head, lines, SAME)
    return [folder / "stationarity.csv", table, _figure(folder, frame, locals_, budget)]


def _algorithm(name: str, local_steps: int) -> Algorithm:
    kind, options = METHODS[name]
    return ALGORITHMS[kind](**{"local_steps": local_steps, **options})


def _costs(name: str, local_steps: int) -> tuple[float, float]:
    """kB that a client sends, and oracle calls that it makes, for each round."""
    algorithm = _algorithm(name, local_steps)
    with jax.enable_x64(True):
        setup = problems.ridge()
        each = protocol(algorithm, setup.problem, setup.data, setup.x, setup.y)
        calls = oracle_calls(algorithm, setup.data.clients, setup.data.clients)["all"]
    return each.bytes_up / setup.data.clients / 1e3 / each.rounds, calls / each.rounds


def _curve(name: str, local_steps: int, budget: int) -> list[common.Row]:
    setup = problems.ridge()
    algorithm = _algorithm(name, local_steps)
    lanes = {field: values for field, values in problems.grid(setup, local_steps).items() if hasattr(algorithm, field)}
    each = protocol(algorithm, setup.problem, setup.data, setup.x, setup.y).rounds
    used, values = runner.curves(setup, algorithm, int(budget / each), BLOCKS, None, **lanes)
    values = np.where(np.isfinite(values), values, np.inf)
    first = np.where((values < LEVEL).any(1), (values < LEVEL).argmax(1), BLOCKS)
    soonest = first == first.min()
    best = int(np.argmin(np.where(soonest, values[:, -1], np.inf)))
    return [{"rounds": int(rounds), "value": value} for rounds, value in zip(used, values[best], strict=True)]


def _figure(folder: Path, frame: pandas.DataFrame, locals_: tuple[int, ...], budget: int) -> Path:
    figure, axes = common.panels(1, len(locals_), (5.6 * len(locals_), 5.6), sharey=True)
    for axis, local_steps in zip(axes[0], locals_, strict=True):
        for place, (name, at) in enumerate(frame[frame["local_steps"] == local_steps].groupby("method", sort=False)):
            look = {**common.style(place), "markevery": (3 * place % 20, 20)}
            axis.plot(at["rounds"], at["value"].clip(lower=1e-20), **look, label=name)
        axis.axhline(LEVEL, color="grey", linestyle=":")
        axis.set(
            title=f"{local_steps} local step{'s' * (local_steps > 1)}", xlabel="rounds", yscale="log", xlim=(0, budget)
        )
    axes[0, 0].set_ylabel("$|\\nabla\\Phi|^2$")
    common.legend(figure, 4)
    return common.save(figure, folder / "stationarity.png")
