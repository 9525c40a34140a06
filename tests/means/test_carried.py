"""Outer losses of means while algorithms run: where they come to rest, what it costs, and whom it is refused."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.algorithms import ALGORITHMS, checked
from fedbilevel.callbacks import Checkpoint
from fedbilevel.means.carried import Carried
from fedbilevel.pace.automatic import numbered
from fedbilevel.protocol import running
from helpers.of_means import inner, of_means
from helpers.quadratic import flat

KEY = jax.random.key(0)
Q = of_means()  # clients of weights 1, 3, 2 and 1/2
ALIKE = of_means(weighted=False)
STEPS = {"inner_lr": 0.1, "hessian_lr": 0.1, "outer_lr": 0.3}
REFUSED = {"lfednest", "lfednest-svrg", "localbsgm", "localbsgvrm", "adafbio", "fedbioacc-local"}
QUICK = ("lockstep", "aggitd")
NUMBERS, X, Y = 5, 3, 4  # floats of the means, of x and of y


def solve(algorithm, iterations=8, q=Q, **more):
    return fb.solve(q.problem, q.data, algorithm, q.x, q.y, iterations, key=KEY, **more)


def busy(name):
    algorithm, _ = checked(name)
    several = {f.name for f in dataclasses.fields(algorithm)} & {"client_steps"}
    return dataclasses.replace(algorithm, client_steps=(1, 2, 3, 1)) if several else algorithm


def each(names):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


# Where they come to rest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm",
    [
        fb.Lockstep(**STEPS),
        pytest.param(
            fb.AggITD(inner_rounds=60, truncation="full", **STEPS | {"hessian_lr": 0.4}), marks=pytest.mark.slow
        ),
        fb.AggITD(inner_rounds=8, truncation="full", warm_start_v=True, one_round=True, **STEPS),
    ],
    ids=["lockstep", "aggitd-full", "aggitd-warm"],
)
def test_the_hypergradient_is_zero_where_it_ends(algorithm):
    """Everyone, all rows: against pooled differences of Phi too."""
    end = solve(algorithm, 4000 if isinstance(algorithm, fb.Lockstep) else 1500, evaluate_every=4000)
    assert np.linalg.norm(flat(fb.reference.hypergradient(Q.problem, Q.data, end.x, Q.y))) < 1e-8
    assert np.abs(flat(Q.hypergradient(end.x))).max() < 1e-8
    assert np.abs(flat(Q.hypergradient(Q.x))).max() > 0.1
    own = Q.means(end.x, Q.solution(end.x))
    np.testing.assert_allclose(flat(end.state.of_means.means), flat(jax.tree.map(jnp.asarray, own)), atol=1e-9)


def test_lagged_means_are_those_of_one_exchange_before():
    """Iteration k is sent the means at the x and y that iteration k - 1 sent."""
    points = [solve(fb.Lockstep(**STEPS), k) for k in (1, 2, 3)]
    start = fb.reference.outer_means(Q.problem, Q.data, Q.x, Q.y)
    np.testing.assert_allclose(flat(points[0].state.of_means.means), flat(start), rtol=1e-12)
    for before, after in itertools.pairwise(points):
        there = fb.reference.outer_means(Q.problem, Q.data, before.x, before.y)
        np.testing.assert_allclose(flat(after.state.of_means.means), flat(there), rtol=1e-12)


def test_an_iteration_is_that_of_the_tangent():
    """One of Lockstep with a mean for f, made by hand of F' at the means of the start."""
    slope = jax.grad(Q.problem.outer_of)(fb.reference.outer_means(Q.problem, Q.data, Q.x, Q.y))
    dot = lambda m: sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(m), jax.tree.leaves(slope), strict=True))
    plain = fb.Problem(Q.problem.inner, lambda x, y, row: dot(Q.problem.outer_means(x, y, row)))
    by_hand = fb.solve(plain, Q.data, fb.Lockstep(**STEPS), Q.x, Q.y, 2, key=KEY)
    carried = solve(fb.Lockstep(**STEPS), 2)  # in both iterations the means are those of the start
    np.testing.assert_allclose(flat((carried.x, carried.y)), flat((by_hand.x, by_hand.y)), rtol=1e-12)


@pytest.mark.parametrize("name", each(n for n in ALGORITHMS if n not in REFUSED | {"fedmbo"}))  # its chains are drawn
def test_a_mean_that_is_said_as_one_runs_as_it_does(name):
    """F the identity, nothing drawn: the numbers are those of the plain outer loss, after a round more."""
    given = {"truncation": "full", "batch_size": None, "same_cohort": False}
    algorithm = busy(name)
    known = {f.name for f in dataclasses.fields(algorithm)}
    algorithm = dataclasses.replace(algorithm, **{k: v for k, v in given.items() if k in known})
    loss = lambda x, y, row: Q.problem.outer_means(x, y, row)["loss"]
    problems = (
        fb.Problem(inner, loss),
        fb.Problem(inner, outer_means=lambda *a: {"f": loss(*a)}, outer_of=lambda m: m["f"]),
    )
    plain, means = (fb.solve(problem, Q.data, algorithm, Q.x, Q.y, 3, key=KEY) for problem in problems)
    np.testing.assert_allclose(flat((means.x, means.y)), flat((plain.x, plain.y)), rtol=1e-11, atol=1e-13)
    assert means.history[-1]["rounds"] == plain.history[-1]["rounds"] + 1


def test_a_run_goes_back_with_half_its_steps():
    sharp = lambda x: jnp.where(x > 1, 1000.0, 1.0)  # a thousand times as curved once x has passed one
    steep = lambda x, y, row: 0.5 * (y - row - 3) ** 2 + 0.5 * sharp(x) * y**2 + 1e-3 * x * y
    means = lambda x, y, row: {"y": (y - 3) ** 2, "x": (x - 2) ** 2}
    problem = fb.Problem(steep, outer_means=means, outer_of=lambda m: 0.5 * m["y"] + 0.5 * m["x"])
    data = fb.FederatedData.stack([jnp.zeros(1), jnp.ones(1)], [jnp.zeros(1), jnp.ones(1)])
    algorithm = fb.Lockstep(inner_lr=2e-4, hessian_lr="auto", outer_lr=0.05)
    end = fb.solve(problem, data, algorithm, jnp.zeros(()), jnp.zeros(()), 400, key=KEY, check=False)
    assert abs(end.x - 2) < 1e-3 and end.history[-1]["halvings"] >= 1


@pytest.mark.parametrize("name", each(n for n in ALGORITHMS if checked(n)[1] is not None and n not in REFUSED))
def test_estimates_are_the_hypergradient(name):
    h, _ = fb.estimate_hypergradient(Q.problem, Q.data, checked(name)[1], Q.x, Q.y, key=KEY)
    np.testing.assert_allclose(flat(h), flat(Q.hypergradient(Q.x)), rtol=1e-6, atol=1e-9)


# Which algorithms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", each(n for n in ALGORITHMS if n not in REFUSED))
def test_engines_agree(name):
    """On a cohort, with every option at work."""
    algorithm = busy(name)
    ends = [solve(algorithm, 3, ALIKE, engine=engine(cohort=3)) for engine in (fb.Simulation, fb.Loopback)]
    assert fb.testing.distance(ends[0].state, ends[1].state) <= 1e-12
    for name in ("rounds", "bytes_down", "bytes_up"):
        np.testing.assert_array_equal(ends[0].history.column(name), ends[1].history.column(name))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_clients_own_hypergradients_are_refused(name):
    with pytest.raises(fb.InputError, match=r"cannot have an outer loss of means .*: each client (makes|has) a"):
        solve(ALGORITHMS[name](), 1)


def test_the_refused_ones_are_those_that_their_classes_say():
    own = {name for name, kind in ALGORITHMS.items() if kind.about.biased or hasattr(kind, "own_lower")}
    assert own == REFUSED


def test_which_exchanges_use_the_outer_loss_is_seen():
    uses = lambda algorithm: running(algorithm, Q.problem, Q.data, Q.x, Q.y, 4).uses
    assert uses(fb.Lockstep(**STEPS)) == ("moves",)
    assert uses(fb.FedNest(**STEPS)) == ("series.start", "upper.hypergradient", "upper.steps")
    assert uses(fb.Lockstep()) == ("meter.begin", "meter.curvature", "moves")


def test_what_does_not_use_it_runs_as_it_is():
    end = fb.train(Q.problem, Q.data, Q.x, Q.y, rounds=200, key=KEY, inner_lr=0.1)
    np.testing.assert_allclose(np.append(end.y["w"], end.y["b"]), Q.solution(Q.x), atol=1e-6)
    assert [line.name for line in end.protocol.rarely] == []


# What it costs --------------------------------------------------------------------------------------------------------


def test_rounds_and_bytes_by_hand():
    """Down z and c of 11 floats each, and the means; up as many, and the client's own; 4 clients of 8 bytes a float."""
    known = fb.protocol(fb.Lockstep(**STEPS), Q.problem, Q.data, Q.x, Q.y)
    assert (known.rounds, known.rounds_most, known.rounds_rarely) == (1, 1, 1)
    z = X + 2 * Y
    assert known.bytes_down == known.bytes_up == 4 * 8 * (2 * z + NUMBERS)
    (begin,) = known.rarely
    assert (begin.name, begin.bytes_down_most, begin.bytes_up_most) == ("means_at", 4 * 8 * (X + Y), 4 * 8 * NUMBERS)
    assert "1 round at the start: means_at" in str(known)
    history = solve(fb.Lockstep(**STEPS), 3).history
    np.testing.assert_array_equal(history.column("rounds"), [0, 2, 3, 4])
    np.testing.assert_array_equal(np.diff(history.column("bytes_up"))[1:], known.bytes_up)
    assert history[1]["bytes_down"] == known.bytes_down + begin.bytes_down_most


def test_what_travels_only_sometimes_takes_the_means_along():
    """AggITD's second cohorts are sent x and y in some turns alone, and say nothing of their means in the others."""
    settings = {"inner_rounds": 4, "truncation": 2, "independent_cohorts": True, **STEPS}
    known, plain = (
        fb.protocol(fb.AggITD(**settings), problem, Q.data, Q.x, Q.y)
        for problem in (Q.problem, fb.Problem(Q.problem.inner, lambda x, y, row: jnp.sum(y["w"]) * x["k"] * row["t"]))
    )
    added = {
        line.name.split()[0]: line.bytes_down - other.bytes_down
        for line, other in zip(known.exchanges, plain.exchanges, strict=True)
    }
    one = 4 * 8 * NUMBERS
    assert added["turns.vector_apart"] == 2 * one  # of four turns
    assert added["upper.hypergradient"] == added["terms.vector"] == one and added["turns.gradient"] == 0
    assert known.rounds == plain.rounds


def test_a_cohort_begins_with_everybody():
    """Else a group that nobody drew has would be divided by."""
    known = fb.protocol(fb.Lockstep(**STEPS), ALIKE.problem, ALIKE.data, ALIKE.x, ALIKE.y, fb.Simulation(cohort=1))
    (begin,) = known.rarely
    assert begin.bytes_up_most == 4 * 8 * NUMBERS and known.bytes_up == 8 * (2 * (X + 2 * Y) + NUMBERS)
    end = solve(fb.Lockstep(**STEPS), 40, ALIKE, engine=fb.Simulation(cohort=1))
    assert np.isfinite(flat(end.state.of_means.means)).all() and end.history[-1]["rounds"] == 41


def test_an_estimate_asks_for_the_means_where_it_uses_them():
    """FedNest's first exchange that uses f is at the y of its rounds: a round before it, of the same message."""
    bound = fb.estimator(
        Q.problem, Q.data, fb.FedNest(inner_rounds=2, neumann_terms=2, truncation="full", **STEPS), Q.x, Q.y
    )
    names = [line.name for line in bound.protocol.exchanges]
    assert names[2:4] == ["means.series.start", "series.start"] and bound.protocol.rarely == ()
    assert bound.protocol.rounds == 2 * 2 + 1 + 3 + 1
    assert isinstance(bound.algorithm, fb.FedNest)


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_a_budget_of_rounds_holds_the_first_one(budget):
    go = lambda: fb.solve(Q.problem, Q.data, fb.Lockstep(**STEPS), Q.x, Q.y, rounds=budget, key=KEY)
    if budget == 1:
        with pytest.raises(fb.InputError, match="1 rounds are too few: one iteration of Lockstep takes up to 2"):
            go()
    else:
        assert (go().history[-1]["rounds"], go().iteration) == (budget, budget - 1)


# With what else there is ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lockstep", "aggitd"])
def test_with_steps_that_are_found(name):
    algorithm = ALGORITHMS[name](**{} if name == "lockstep" else {"truncation": "full"})
    ends = [solve(algorithm, 12, engine=engine) for engine in (fb.Simulation(), fb.Loopback())]
    assert fb.testing.distance(ends[0].state, ends[1].state) <= 1e-10
    known = ends[0].protocol
    assert known.rounds_rarely == 2 and [line.name.split()[0] for line in known.rarely][:2] == [
        "means_at",
        "meter.begin",
    ]
    assert ends[0].history[-1]["rounds"] == 12 * known.rounds + 2
    assert {"inner_lr", "outer_lr", "recovered"} <= set(ends[0].history.columns)
    assert type(numbered(running(algorithm, Q.problem, Q.data, Q.x, Q.y, 4))) is ALGORITHMS[name]


def test_with_steps_that_are_found_x_arrives():
    end = solve(fb.Lockstep(), 400, evaluate_every=400)
    assert np.linalg.norm(flat(Q.hypergradient(end.x))) < 0.02 * np.linalg.norm(flat(Q.hypergradient(Q.x)))


@pytest.mark.parametrize("budget", [2, 3, 4])
def test_a_small_budget_measures_less(budget):
    end = fb.solve(Q.problem, Q.data, fb.Lockstep(), Q.x, Q.y, rounds=budget, key=KEY)
    assert end.history[-1]["rounds"] == budget and end.iteration == max(1, budget - 2)


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    engine = fb.Simulation(cohort=2, dropout=0.2)
    whole = solve(fb.Lockstep(batch_size=2), 14, ALIKE, engine=engine)
    solve(fb.Lockstep(batch_size=2), 7, ALIKE, engine=engine, callbacks=[Checkpoint(tmp_path, every=7)])
    rest = solve(fb.Lockstep(batch_size=2), 14, ALIKE, engine=engine, resume=tmp_path)
    assert fb.testing.distance(whole.state, rest.state) == 0
    assert int(whole.state.of_means.seen) > 14


def test_the_validation_loss_is_that_of_pooled_means():
    end = solve(fb.Lockstep(**STEPS), 4, metrics={"f": fb.validation_loss}, keep="f:min")
    value = float(fb.reference.outer_value(Q.problem, Q.data, end.x, end.y))
    assert end.history[-1]["f"] == pytest.approx(value, rel=1e-12)
    apart = Q.problem.outer_of(Q.means(end.x, np.append(end.y["w"], end.y["b"])))
    assert value == pytest.approx(float(apart), rel=1e-12)
    (line,) = end.protocol.each_row
    assert line.bytes_up == 4 * 8 * NUMBERS


def test_a_stepper_does_what_solve_does():
    stepper = fb.stepper(Q.problem, Q.data, fb.Lockstep(**STEPS), Q.x, Q.y)
    at = stepper.start
    for k in range(3):
        at, rounds = stepper(at, k, KEY)
        assert int(rounds) == (2 if k == 0 else 1)
    assert fb.testing.distance(at.state, solve(fb.Lockstep(**STEPS), 3).state) <= 1e-12


def test_whoever_blows_up_is_named():
    with pytest.raises(fb.Diverged, match="outer_lr"):
        solve(fb.Lockstep(**STEPS | {"outer_lr": 1e4}), 200)


def test_several_settings_cannot_race():
    with pytest.raises(fb.InputError, match="cannot race for an outer loss of means"):
        fb.tune(Q.problem, Q.data, Q.x, Q.y, rounds=200, key=KEY)


def test_an_algorithm_of_ones_own_needs_x_and_y_in_its_message():
    class Turned(fb.Algorithm):
        def step(self, fed, state):
            h = fed.average(self.pull, state.y, state.x)
            return state, fb.Info(jnp.sum(jnp.abs(h)))

        def pull(self, client, y, x):
            along = lambda s, at: jax.tree.map(jnp.add, at, client.problem.outer_gradients(x, at, client.outer)[1])
            return jax.lax.fori_loop(0, 2, along, y)["w"]

    with pytest.raises(
        fb.InputError, match=r"Turned.pull asks for the outer loss within a loop.*send x and y, in this order"
    ):
        solve(Turned(), 1)


@pytest.mark.slow
def test_it_runs_in_32_bits_as_users_run_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        q = of_means(weighted=False)
        end = fb.solve(q.problem, q.data, fb.Lockstep(), q.x, q.y, 30, key=jax.random.key(0))
        assert end.x["group"].dtype == jnp.float32 and np.isfinite(flat(end.x)).all()


def test_it_stands_for_its_algorithm():
    carried = running(fb.Lockstep(**STEPS), Q.problem, Q.data, Q.x, Q.y, 4)
    assert isinstance(carried, Carried) and carried.outer_lr == 0.3 and carried.follows == fb.Lockstep.follows


@pytest.mark.slow
def test_blocks_that_belong_to_clients_go_with_it():
    """A weight for each training row, its client's, judged by pooled means: against differences of Phi."""
    rows = [own | {"place": np.arange(len(own["t"]))} for own in Q.inner]
    data = fb.FederatedData.stack(rows, Q.outer, weights=[1.0, 3.0, 2.0, 0.5])

    def weighted(x, y, row):
        return 2 * jax.nn.sigmoid(x["rows"][row["place"]]) * inner(x["all"], y, row)

    means = lambda x, y, row: Q.problem.outer_means(x["all"], y, row)
    problem = fb.Problem(weighted, outer_means=means, outer_of=Q.problem.outer_of)

    def at(client, place, step):
        blocks = [np.zeros(len(own["t"])) for own in rows]
        blocks[client][place] += step
        return {"all": Q.x, "rows": fb.per_client(blocks)}

    x = at(0, 0, 0.0)
    h = fb.reference.hypergradient(problem, data, x, Q.y)
    for client, place in ((0, 0), (1, 2), (3, 5)):
        phi = [float(fb.reference.value(problem, data, at(client, place, step), Q.y)) for step in (1e-5, -1e-5)]
        assert float(h["rows"].value[client][place]) == pytest.approx((phi[0] - phi[1]) / 2e-5, rel=1e-6)
    go = lambda engine: fb.solve(problem, data, fb.Lockstep(**STEPS), x, Q.y, 10, key=KEY, engine=engine)
    assert fb.testing.distance(*(go(engine).state for engine in (fb.Simulation(), fb.Loopback()))) <= 1e-12
