"""What is tuned: six tasks, the ranges of x that every search draws from, and values by hand.

Ranges are written down here once, and are the same for every rival, whose first x is the start
(FedEx: the first of its values):

    a log penalty                  log 1e-4 to log 1e2
    a class weight (logit)         -4.6 to 4.6: positives get 1 to 99 % of the loss
    a hospital's weight (logit)    -3 to 3
    a class's factor (logit)       -2 to 2
    a class's shift                -3 to 3
    a weight or bias of a body     +-1/sqrt(inputs), from which the task draws its own start

By hand is what one would set without looking at a validation loss:

    penalties        1 / rows, scikit-learn's default C = 1 of a loss that is a mean; on `scaled`
                     times the column's mean square, as if columns had been standardised
    class weight     1 / frequency: half of the loss for each class
    hospitals        in proportion to their rows
    loss tuning      shifts of log frequency (balanced softmax), factors as they are
    a body           there is none: nobody sets 4,160 weights by hand, and the start is random
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from fedbilevel import Simulation
from fedbilevel.tasks import TASKS, Options, Task

from ..kinds import JSON, DataDir

PENALTY = (float(np.log(1e-4)), float(np.log(1e2)))
ByHand = Callable[[Task], PyTree]


@dataclasses.dataclass(frozen=True)
class Ground:
    """A task to tune on.

    Attributes:
        name: of the task.
        options: how it is built, seed and folder of data apart.
        ranges: the lowest and the highest value of x, by leaf; "" where x is one array.
        by_hand: the task's x as set by hand; None where nobody would set it.
        convex: whether g is strongly convex in y, so that Phi has a reference.
        test: the metric of the test rows, a loss.
        cohort, batch_size: clients an exchange and rows of a minibatch; None for all.
        files: whether its data lie in a folder that the user names.
        ours: settings of Lockstep where the store has none for the task.
    """

    name: str
    options: Options
    ranges: Mapping[str, tuple[float, float]]
    by_hand: ByHand | None
    convex: bool = True
    test: str = "test_loss"
    cohort: int | None = None
    batch_size: int | None = None
    files: bool = False
    ours: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def build(self, seed: int, data_dir: DataDir) -> Task:
        """The task for one seed.

        Raises:
            InputError: its data are not embedded, and not in the folder.
        """
        folder = data_dir if self.files else None
        return TASKS[self.name](dataclasses.replace(self.options, seed=seed, data_dir=folder))

    def engine(self) -> Simulation:
        """The engine of every contender."""
        return Simulation(cohort=self.cohort)

    def box(self, x: PyTree) -> tuple[PyTree, PyTree]:
        """The lowest and the highest x, structured like x."""
        return tuple(jax.tree_util.tree_map_with_path(self._bound(end), x) for end in (0, 1))

    def _bound(self, end: int) -> Callable[[tuple, Array], Array]:
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
        return lambda path, leaf: jnp.full_like(leaf, self.ranges[name(path)][end])

    def to_dict(self) -> dict[str, JSON]:
        """Everything that decides the numbers, as plain values."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        options = dataclasses.asdict(self.options)
        del options["seed"], options["data_dir"], plain["by_hand"]
        return plain | {"options": options, "ranges": dict(self.ranges), "ours": dict(self.ours)}


def _rows(task: Task) -> int:
    return int(np.sum(task.data.count("inner")))


def _bank(task: Task) -> PyTree:
    penalty = jnp.full_like(task.x["penalty"], -np.log(_rows(task)))
    return {"penalty": penalty, "class_weight": jnp.zeros_like(task.x["class_weight"])}


def _hearts(task: Task) -> PyTree:
    share = np.log(task.data.count("inner"))
    hospital = jnp.asarray(share - share.mean(), task.x["hospital"].dtype)
    return {"penalty": jnp.full_like(task.x["penalty"], -np.log(_rows(task))), "hospital": hospital}


def _regularisation(task: Task) -> PyTree:
    return jnp.full_like(task.x, -np.log(_rows(task)))


def _scaled(task: Task) -> PyTree:
    squares = np.mean(np.asarray(task.data.inner.rows["a"]) ** 2, axis=0)
    return jnp.asarray(np.log(squares / _rows(task)), task.x.dtype)


def _loss_tuning(task: Task) -> PyTree:
    counts = np.bincount(task.data.inner.rows["label"], minlength=len(task.x["iota"]))
    shifts = np.log(np.maximum(counts, 1) / counts.sum())
    return {**task.x, "iota": jnp.asarray(shifts - shifts.mean(), task.x["iota"].dtype)}


_NETWORK = 1 / 8  # 1/sqrt of 64 pixels

GROUNDS: dict[str, Ground] = {
    ground.name: ground
    for ground in (
        Ground("bank", Options(), {"penalty": PENALTY, "class_weight": (-4.6, 4.6)}, _bank),
        Ground(
            "hearts",
            Options(),
            {"penalty": PENALTY, "hospital": (-3.0, 3.0)},
            _hearts,
            files=True,
        ),
        Ground(
            "regularisation",
            Options(dataset="breast-cancer", partition="dirichlet", clients=10),
            {"": PENALTY},
            _regularisation,
            ours={"inner_lr": 0.3, "hessian_lr": 0.1, "outer_lr": 30.0},
        ),
        Ground("scaled", Options(), {"": PENALTY}, _scaled, test="test_error"),
        Ground(
            "loss-tuning",
            Options(dataset="digits", clients=20),
            {"delta": (-2.0, 2.0), "iota": (-3.0, 3.0)},
            _loss_tuning,
            convex=False,
            ours={"inner_lr": 0.03, "hessian_lr": 0.03, "outer_lr": 1.0},
        ),
        Ground(
            "hyper-representation",
            Options(dataset="digits", clients=20),
            {"weight": (-_NETWORK, _NETWORK), "bias": (-_NETWORK, _NETWORK)},
            None,
            convex=False,  # g is, but 100 rounds of training say what a user would get
            cohort=5,
            batch_size=16,
        ),
    )
}
