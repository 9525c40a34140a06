"""What to say after a run blew up: what left its range, when, and which setting to change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from ..algorithm import Algorithm
from ..component import title_of
from ..engines.base import Carry, Execution
from ..watch import Seen, parts
from .blame import LEAST, Blame, Replays, followed, isinstance_optimizer, rates
from .derivatives import not_finite

__all__ = ["LEAST", "diagnose", "largest", "of_estimate"]

_ORDINARY = 100.0  # how far beyond its size at first a part is out of its ordinary range
_BOUND = "below 2 / (largest curvature of the inner loss)"
_WORDS = {
    "control": "the control variates", "optimizer": "the optimiser's state", "estimate": "the estimates",
    "before": "the last iteration's x, y and v", "moments": "the second moments", "penalty": "the penalty",
    "curvature": "the measured curvature", "memory": "the measured curvature", "mean": "the measured curvature",
    "pace": "the pace of x", "pull": "d_y f", "past": "the points that are mixed",
}  # fmt: skip


def largest(tree: PyTree) -> float:
    """The largest absolute value in a pytree; NaN if one is NaN."""
    values = [
        np.max(np.abs(np.asarray(leaf)), initial=0.0) for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)
    ]
    return float(np.max(values, initial=0.0)) if values else 0.0


def diagnose(
    execution: Execution, algorithm: Algorithm, healthy: Carry, failed: Carry, limit: float, recent: Sequence[Seen] = ()
) -> str:
    """What blew up, when, and which step to lower.

    Args:
        healthy: where the iterates were last of ordinary size.
        failed: the state that is out of range, after the failing iteration.
        recent: what was seen of the last iterations, the failing one last: all there is where nothing can be repeated.
    """
    kind = title_of(algorithm)
    gone = [part for part, tree in parts(failed.state).items() if not largest(tree) <= limit]
    left = _listed(words(gone) or ["the diagnostics"])
    what = f"{kind} blew up in iteration {failed.iteration}: {left} left the finite range"
    if not execution.replays:
        return f"{what}; {_guess(algorithm, healthy, failed, recent)}."
    at = healthy.state
    broken = not_finite(execution.problem, execution.data, at.x, at.y)
    if broken is not None:
        where = "at the start" if healthy.iteration == 0 else f"at the x and y of iteration {healthy.iteration}"
        return (
            f"{kind} cannot go on in iteration {failed.iteration}: {broken} is not finite {where}, so that the derivative "
            f"is not finite {where}. Start elsewhere, or write the loss so that it has one there (jnp.sqrt and "
            "jnp.linalg.norm have none at zero, jnp.log neither; a jnp.where does not hide the branch it does not take)."
        )
    blame = Replays(execution, algorithm, healthy, failed, limit).blame()
    return f"{what}; {advice(algorithm, blame)}."


def advice(algorithm: Algorithm, blame: Blame) -> str:
    """Why, and what to change."""
    steps = rates(algorithm)
    if not blame.field and not steps_given(algorithm):
        return (
            "its steps are automatic, and shorter ones do not help: is the inner loss bounded below, does it curve upwards "
            "in y, and are its derivatives finite? fedbilevel.testing.check_problem looks"
        )
    if not blame.field:
        return f"lower its step sizes: {', '.join(f'{k} = {v:g}' for k, v in steps.items())}"
    why = f"{blame.why}: " if blame.why else ""
    if blame.instead is not None:
        verb = "lower" if blame.instead < steps[blame.field] else "raise"
        return f"{why}{verb} {blame.field} (now {steps[blame.field]:g})"
    return why + _change(algorithm, blame.field)


def steps_given(algorithm: Algorithm) -> list[str]:
    """Its steps that are numbers of the user's."""
    return [name for name in rates(algorithm) if name.endswith("_lr")]


def advice_for(algorithm: Algorithm, field: str, raised: bool = False) -> str:
    """What to do about a step, with its value now."""
    value = rates(algorithm).get(field)
    if not field:
        return advice(algorithm, Blame("", ""))
    return f"raise {field} (now {value:g})" if raised and value is not None else _change(algorithm, field)


def _change(algorithm: Algorithm, field: str) -> str:
    value = getattr(algorithm, field)
    if field not in rates(algorithm) and isinstance_optimizer(value):
        now = f" (now {value!r})" if isinstance(value, str) else ""
        return f"lower the learning rate of {field}{now}"
    if isinstance(value, str):
        return f"give {field} a number (now {value!r}), lower than what it measured"
    bound = f" {_BOUND}" if field == algorithm.follows.get("v") else ""
    return f"lower {field} (now {float(value):g}){bound}"


def words(names: Sequence[str]) -> list[str]:
    """Parts of a state in users' words, each once."""

    def own(part: str) -> str:
        name = part.partition(".")[0]
        return _WORDS.get(name, name)

    return list(dict.fromkeys(own(part) for part in names))


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + [names[-1]])


# Where nothing can be repeated ------------------------------------------------------------------------------------------


def _guess(algorithm: Algorithm, healthy: Carry, failed: Carry, recent: Sequence[Seen]) -> str:
    """Which steps may be too large, by the order in which parts left their ordinary range."""
    follows = followed(algorithm)
    series = {name: np.concatenate([np.atleast_1d(seen.sizes[name]) for seen in recent]) for name in _names(recent)}
    if failed.iteration == 1 and series and not any(np.isfinite(series[name][-1]) for name in ("x", "y")):
        start = "the derivative may be not finite at the start (a simulation says so)"
        return f"{start}, or the steps are far too large: lower {_or(algorithm, _moving(follows))}"
    usual = {name: max(1.0, largest(tree)) for name, tree in parts(healthy.state).items()}
    beyond = {name: size / usual[name] for name, size in series.items() if name in follows}
    out = {name: ~(ratio <= _ORDINARY) for name, ratio in beyond.items()}
    when = min((int(np.argmax(left)) for left in out.values() if left.any()), default=None)
    if when is None:
        return f"lower its step sizes (a simulation says which): {_or(algorithm, _moving(follows))}"
    ratios = {name: np.nan_to_num(beyond[name][when], nan=np.inf) for name, left in out.items() if left[when]}
    first = sorted(ratios, key=lambda name: -ratios[name])
    first = [name for name in first if ratios[name] >= ratios[first[0]] / _ORDINARY]
    fields = [follows[name] for name in first]
    if "x" in first and "v" in follows and not {part for part in series if follows.get(part) == follows["v"]}:
        fields = [follows["v"], *fields]  # v is made anew each time: what it does is seen in x
    before = len(next(iter(series.values()))) - 1 - when
    told = f"{_listed(words(first))} first, {before} iterations before" if before else f"{_listed(words(first))} first"
    return f"{told}: lower {_or(algorithm, fields)} (a simulation says which)"


def _moving(follows: dict[str, str]) -> list[str]:
    return [follows[part] for part in ("x", "y", "v", "optimizer") if part in follows]


def _names(recent: Sequence[Seen]) -> list[str]:
    return list(recent[-1].sizes) if recent else []


def _or(algorithm: Algorithm, fields: Iterable[str]) -> str:
    steps = rates(algorithm)
    return " or ".join(f"{f} (now {steps[f]:g})" if f in steps else f for f in dict.fromkeys(fields))


# An estimate of the hypergradient alone ---------------------------------------------------------------------------------


def of_estimate(execution: Execution, algorithm: Algorithm, start: Carry, after: Carry) -> str:
    """Why an estimate is not finite."""
    kind, follows = title_of(algorithm), followed(algorithm)
    if execution.replays and (broken := not_finite(execution.problem, execution.data, start.state.x, start.state.y)):
        return f"the hypergradient estimate of {kind} is not finite, for {broken} is not finite at the start."
    below = not np.isfinite(largest(after.state.y))
    field = follows.get("y" if below or "v" not in follows else "v")
    part = "the lower variable" if below else "it"
    step = _change(algorithm, field) if field else "lower its step sizes"
    return f"the hypergradient estimate of {kind} is not finite, for {part} blew up: {step}."
