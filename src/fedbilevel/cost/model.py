"""The round-cost model: recorded histories as predicted wall-clock time on a given network.

The time up to a row of a history, with C clients an exchange, is

    rounds * latency                                                         latency
    + 8 * max(bytes_down / (C * down), bytes_down / server_up)               transfer, from the server to the clients
    + 8 * max(bytes_up / (C * up), bytes_up / server_down)                   transfer, from the clients to the server
    + compute * seconds / C                                                  computation

- `latency` (seconds) is all that a round takes beyond transfer and computation.
- `down` and `up` (bits a second) are EACH client's link. Clients send at the same time, so a round takes one client's
  payload. A history's bytes are summed over the cohort: they are divided by C.
- `server_up` and `server_down` are the server's own link, which the payload of the whole cohort passes. The slower of the
  two ways counts. Both are proportional to the bytes, so it is the same one in every round and in the sum.
- `seconds` are those of all C clients on the machine of the history, where a real client computes its own share. They
  are divided by C, as if that machine had worked through the clients one after the other. `compute` is how many times
  slower a client is; 0 leaves computation out.

Rounds do not overlap. Compression, encryption and clients that get lost are left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas

from ..errors import InputError, check
from ..results.curves import Values, direction, first_reached, running_median
from ..results.report import metrics_of
from .network import Network, duration

ACCURACY = "test_accuracy"
LEVELS = (0.80, 0.85, 0.88, 0.90, 0.93)  # test accuracies to which times are predicted
LEVEL = 0.90  # the one that decides, unless another is asked for
PARTS = ("latency", "transfer", "computation")


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is to be reached.

    Attributes:
        metric: a column of the history; it is to fall, unless it is an accuracy.
        level: the value that decides.
        levels: all values to which times are predicted, `level` among them.
    """

    metric: str
    level: float
    levels: tuple[float, ...]

    def when(self, values: Values, level: float) -> int | None:
        """Index of the evaluation at which one run's values are at the level; None for never."""
        sign = direction(self.metric)
        return first_reached(sign * np.asarray(values, float), sign * level)

    def name(self, level: float) -> str:
        """A level in words: "90 %", "test error 0.12"."""
        return f"{100 * level:.4g} %" if self.metric == ACCURACY else f"{self.metric.replace('_', ' ')} {level:.3g}"

    def column(self, level: float) -> str:
        """The column of the seconds to a level."""
        return f"seconds_to_{100 * level:.4g}%" if self.metric == ACCURACY else "seconds_to_level"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Times of every algorithm on every network.

    Attributes:
        table: a DataFrame, a row per network and algorithm. At the level that decides: the rounds, the megabytes down and up
            of ONE client, and the predicted seconds, in all and by part. Then the seconds to each level. Infinite: never.
        goal, networks, clients, compute: what it was made with; `clients` is how many an exchange asks.
    """

    table: pandas.DataFrame
    goal: Goal
    networks: Mapping[str, Network]
    clients: int
    compute: float

    def on(self, network: str) -> pandas.DataFrame:
        """The rows of one network."""
        return self.table[self.table["network"] == network]


def clients_an_exchange(folder: str | Path, clients: int | None = None) -> int:
    """How many clients an exchange asked in a results folder: `clients`, or else what its config.json says.

    Raises:
        InputError: there is no config.json that can be read, or it does not say.
    """
    if clients is not None:
        check(clients >= 1, f"--cohort is how many clients an exchange asked, at least 1; got {clients}.")
        return clients
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text())
        said = (config.get("clients_an_exchange"), config.get("cohort"), config.get("options", {}).get("clients"))
    except (OSError, ValueError, AttributeError):
        raise InputError(f"{file} cannot be read: say with --cohort how many clients an exchange asked.") from None
    found = next((number for number in said if isinstance(number, int) and number >= 1), None)
    check(found is not None, f"{file} does not say how many clients an exchange asked: say it with --cohort.")
    assert found is not None
    return found


def predict(
    frame: pandas.DataFrame,
    networks: Mapping[str, Network],
    clients: int,
    level: float | None = None,
    compute: float = 1.0,
) -> Prediction:
    """Predict the time of every algorithm of a history on every network.

    A level is reached at the first evaluation at which the median of the last five is there (`results.first_reached`). Of
    several seeds the one with the median time counts, or the mean of the two in the middle; never, if too few get there.

    Args:
        frame: a history, as `report.read` gives it.
        networks: name -> Network, such as `network.NETWORKS`.
        clients: how many clients an exchange asked: the history's bytes and seconds are summed over them.
        level: the value that decides. For test_accuracy 0.9 by default. Of a history without it the first metric counts;
            by default its level is the loosest end value of the algorithms that end better than they started, so that
            each of them gets there. An end value is the median of a run's last five evaluations; of several seeds
            the middle one counts (of an even number, the looser of the two).
        compute: how many times slower a client computes than the machine of the history did; 0 leaves computation out.

    Raises:
        InputError: a level or a factor that makes no sense, or a history without metrics.
    """
    check(0 <= compute < math.inf, f"--compute is a factor on the seconds of computation, 0 or more; got {compute}.")
    goal = _goal(frame, level)
    rows = []
    for name, network in networks.items():
        for algorithm, runs in frame.groupby("algorithm", sort=False):
            seeds = [seed.sort_values("iteration") for _, seed in runs.groupby("seed")]
            costs = [spent(seed, network, clients, compute) for seed in seeds]
            to = {value: _middle(goal, value, seeds, costs) for value in goal.levels}
            row = {"network": name, "algorithm": algorithm, "seeds": len(seeds), "metric": goal.metric}
            row |= {"level": goal.level, **to[goal.level]}
            rows.append(row | {goal.column(value): to[value]["seconds"] for value in goal.levels})
    return Prediction(pandas.DataFrame(rows), goal, networks, clients, compute)


def spent(run: pandas.DataFrame, network: Network, clients: int, compute: float = 1.0) -> pandas.DataFrame:
    """What one run had cost at each row of its history: rounds, one client's megabytes, and seconds, in all and by part."""
    rounds, down, up, seconds = (run[name].to_numpy(float) for name in ("rounds", "bytes_down", "bytes_up", "seconds"))
    slower = lambda size, link, whole: 8 * np.maximum(size / (clients * link), size / whole)
    parts = {
        "latency": rounds * network.latency,
        "transfer": slower(down, network.down, network.server_up) + slower(up, network.up, network.server_down),
        "computation": compute * seconds / clients,
    }
    payload = {"megabytes_down": down / clients / 1e6, "megabytes_up": up / clients / 1e6}
    return pandas.DataFrame(
        {"rounds": rounds, **payload, "seconds": sum(parts.values())} | {f"seconds_{k}": v for k, v in parts.items()}
    )


def advice(prediction: Prediction) -> str:
    """Which algorithm to use, in a sentence for each network."""
    return "\n".join(_sentence(prediction.goal, name, prediction.on(name)) for name in prediction.networks)


def _sentence(goal: Goal, network: str, rows: pandas.DataFrame) -> str:
    ordered = rows.sort_values("seconds", kind="stable")
    best, *others = zip(ordered["algorithm"], ordered["seconds"], strict=True)
    name, seconds = best
    if not math.isfinite(seconds):
        lower = [value for value in goal.levels if np.isfinite(rows[goal.column(value)]).any()]
        hint = f"; the highest level of the table that is reached is {goal.name(max(lower))}" if lower else ""
        return f"On {network} no algorithm reaches {goal.name(goal.level)}{hint}."
    if not others:
        return f"On {network} {name} takes {duration(seconds)} to {goal.name(goal.level)}."
    text = f"On {network} use {name}: {goal.name(goal.level)} in {duration(seconds)}"
    second, later = others[0]
    if not math.isfinite(later):
        return f"{text}; no other algorithm gets there."
    if seconds == 0 or later / seconds < 1.05:
        return f"{text}; {second} takes {duration(later)}."
    return f"{text}, {later / seconds:.1f} times sooner than {second}."


def _goal(frame: pandas.DataFrame, level: float | None) -> Goal:
    metrics = metrics_of(frame)
    check(metrics, "the history has no metric, so nothing says how far a run has come: record one.")
    if ACCURACY in metrics:
        level = LEVEL if level is None else level
        check(0 < level <= 1, f"--level is a test accuracy above 0 and up to 1, as in 0.9; got {level:g}.")
        return Goal(ACCURACY, level, tuple(sorted({*LEVELS, level})))
    level = _loosest_end(frame, metrics[0]) if level is None else level
    check(math.isfinite(level), f"--level is a value of {metrics[0]}; got {level}.")
    return Goal(metrics[0], level, (level,))


def _loosest_end(frame: pandas.DataFrame, metric: str) -> float:
    sign, ends = direction(metric), []
    for _, runs in frame.groupby("algorithm", sort=False):
        values = [sign * seed.sort_values("iteration")[metric].to_numpy(float) for _, seed in runs.groupby("seed")]
        best_first = sorted(((running_median(v)[-1], v[0]) for v in values), reverse=True)
        end, start = best_first[len(values) // 2]  # more than half of the seeds end there or better
        ends += [end] if end > start else []
    check(ends, f"no algorithm ends with a better {metric.replace('_', ' ')} than it started with: give --level.")
    return float(sign * min(ends))


def _middle(goal: Goal, level: float, seeds: list[pandas.DataFrame], costs: list[pandas.DataFrame]) -> dict[str, float]:
    """The cost to a level at the median of the seconds, or the mean of the two in the middle: its parts add up."""
    never = dict.fromkeys(costs[0].columns, math.inf)
    places = [goal.when(seed[goal.metric], level) for seed in seeds]
    rows = [never if i is None else cost.iloc[i].to_dict() for i, cost in zip(places, costs, strict=True)]
    rows.sort(key=lambda row: row["seconds"])
    middle = rows[(len(rows) - 1) // 2 : len(rows) // 2 + 1]
    return {name: sum(row[name] for row in middle) / len(middle) for name in never}
