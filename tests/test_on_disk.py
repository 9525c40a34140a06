"""What a run leaves on disk: numbers bit for bit, every column, seconds of computation alone."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import time
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import arrays, clock
from fedbilevel.callbacks import CSV, Callback, Checkpoint
from fedbilevel.callbacks.checkpoint import FILE
from fedbilevel.compare import Plan, Shipped, gather
from fedbilevel.engines.messaging.transport import RUN, START
from fedbilevel.engines.nvflare.worker import _Inside
from fedbilevel.jaxprs import COMPILING
from fedbilevel.results import report
from fedbilevel.tasks import Options
from helpers.cases import OneRound
from helpers.quadratic import flat, quadratic

TYPES = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float4_e2m1fn",
         "int4", "uint4", "int2", "float32", "float64", "complex64", "int8", "uint32", "bool"]  # fmt: skip
Q0 = quadratic(seed=6, clients=4)


def every_bit(dtype: str) -> np.ndarray:
    """Numbers of that type, NaN with its bits among them where there is one."""
    wide = np.arange(-7.0, 8.0).astype(np.dtype(dtype)) if dtype != "bool" else np.arange(15) % 2 == 0
    if jnp.issubdtype(wide.dtype, jnp.floating) and dtype != "float4_e2m1fn":
        wide[3] = np.nan
    return wide.reshape(3, 5)


def bits(array) -> bytes:
    return np.asarray(array).tobytes()


def same_bits(one, other) -> None:
    ours, theirs = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (np.shape(a), a.dtype, bits(a)) == (np.shape(b), b.dtype, bits(b))


@pytest.mark.parametrize("dtype", TYPES)
def test_arrays_of_every_type_come_back_bit_for_bit(tmp_path, dtype):
    tree = {"m": every_bit(dtype), "s": every_bit(dtype)[1, 1], "none": every_bit(dtype)[:0], "other": "a word"}
    file = io.BytesIO()
    arrays.write_leaves(file, tree)
    assert len(arrays.leaves_of(tree)) == 3
    file.seek(0)
    back = arrays.restore(tree, arrays.read_leaves(file, 3))
    same_bits([back[k] for k in ("m", "s", "none")], [tree[k] for k in ("m", "s", "none")])
    arrays.write_named(tmp_path / "v.npz", {"x['m']": tree["m"]})
    with np.load(tmp_path / "v.npz") as kept:  # as any user reads it
        same_bits(kept["x['m']"], tree["m"])


def test_a_random_key_comes_back_as_one():
    key, file = jax.random.key(7), io.BytesIO()
    arrays.write_leaves(file, key)
    file.seek(0)
    back = arrays.restore(jax.random.key(0), arrays.read_leaves(file, 1))
    assert jax.random.uniform(back) == jax.random.uniform(key)


@pytest.mark.parametrize("other", [{"a": np.zeros(3)}, {"a": np.zeros(2, np.float32)}, {}, [np.zeros(2)] * 2])
def test_other_arrays_are_not_taken_for_these(other):
    with pytest.raises(ValueError, match="where"):
        arrays.restore(other, [np.zeros(2)])


class Half(fb.Algorithm):
    """Steps in half precision, with a state at the clients and an integer at the server."""

    step_size: float = fb.rate(0.125)

    def init(self, x, y):
        return HalfState(x, y, jnp.zeros((), jnp.int4), jax.random.key(3))

    def client_init(self, x, y):
        return y

    def step(self, fed, state):
        d = fed.average(self.turn, state.x, state.y)
        y = jax.tree.map(lambda a, b: a - b, state.y, d)
        return dataclasses.replace(state, y=y, count=state.count + jnp.ones((), jnp.int4)), {}

    def turn(self, client, x, y):
        d = client.problem.inner_gradient(x, y, client.batch("inner", 1))
        lr = jnp.asarray(self.step_size)
        d = jax.tree.map(lambda a: a * lr.astype(a.dtype), d)
        return fb.Reply(jax.tree.map(lambda a, b: a + b - b, d, client.state), d)


class HalfState(fb.State):
    count: jax.Array
    key: jax.Array


def half(dtype="bfloat16"):
    rows = [{"a": np.arange(1.0, 4 + i).astype(np.dtype(dtype)) / np.dtype(dtype).type(4)} for i in range(3)]
    loss = lambda x, y, e: ((y["w"] - e["a"] - x) ** 2).sum() / jnp.asarray(2, dtype)
    y = {"w": jnp.full(2, 1 / 3, dtype), "bits": jnp.arange(4).astype(jnp.int4)}
    return fb.Problem(loss, loss), fb.FederatedData.stack(rows, rows), Half(), jnp.asarray(0.7, dtype), y


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("engine", [fb.Simulation(), fb.Loopback()], ids=["simulation", "loopback"])
def test_half_precision_is_resumed_bit_for_bit(tmp_path, dtype, engine):
    run = lambda n, **options: fb.solve(*half(dtype), n, key=jax.random.key(0), engine=engine, **options)
    whole = run(5)
    run(3, callbacks=[Checkpoint(tmp_path)])
    resumed = run(5, resume=tmp_path)
    assert whole.y["w"].dtype == dtype and whole.y["bits"].dtype == jnp.int4
    assert bits(whole.y["w"]) != bits(run(3).y["w"])
    same_bits((resumed.x, resumed.y, resumed.state.count), (whole.x, whole.y, whole.state.count))
    resumed.save(tmp_path)
    with np.load(tmp_path / "variables.npz") as kept:
        assert sorted(kept.files) == ["x", "y['bits']", "y['w']"]
        same_bits([kept["x"], kept["y['w']"], kept["y['bits']"]], [whole.x, whole.y["w"], whole.y["bits"]])


def test_a_site_finds_its_half_precision_state_again(tmp_path):
    tags, like = [START, (0, 1, 0), (4, 2, 1)], {"c": jnp.zeros((3, 5), jnp.bfloat16), "n": jnp.zeros((), jnp.int4)}
    states = [
        {"c": every_bit("bfloat16") * ml_dtypes.bfloat16(k + 1), "n": np.asarray(k, ml_dtypes.int4)} for k in (1, 2, 3)
    ]

    def inside(states):
        worker = _Inside("app.py", "site-1", tmp_path)
        worker.purpose, worker.side = RUN, types.SimpleNamespace(keeps=True, states=states)
        return worker

    inside(dict(zip(tags, jax.tree.map(jnp.asarray, states), strict=True)))._save()
    again = inside({START: like})
    again._store(resume=True)
    assert list(again.side.states) == tags
    same_bits(list(again.side.states.values()), states)


# The file's format ----------------------------------------------------------------------------------------------------


def solve(iterations=6, algorithm=None, engine=None, **options):
    good = {"algorithm": algorithm or OneRound(batch_size=2), "engine": engine or fb.Simulation(cohort=3)}
    key = jax.random.key(0)
    return fb.solve(Q0.problem, Q0.data, x=Q0.x, y=Q0.y, iterations=iterations, key=key, **good, **options)


def rewritten(folder, change):
    """The checkpoint's head changed."""
    head, arrays = (folder / FILE).read_bytes().split(b"\n", 1)
    (folder / FILE).write_bytes(json.dumps(change(json.loads(head))).encode() + b"\n" + arrays)


@pytest.mark.slow
def test_a_checkpoint_of_a_later_format_is_refused_and_an_earlier_one_read(tmp_path):
    whole = solve()
    solve(4, callbacks=[Checkpoint(tmp_path)])
    old = lambda head: {name: head[name] for name in ("iteration", "totals", "history", "fingerprint")}
    rewritten(tmp_path, old)  # the arrays lay as they do now
    np.testing.assert_array_equal(flat(solve(resume=tmp_path).y), flat(whole.y))
    rewritten(tmp_path, lambda head: {**head, "format": 99})
    with pytest.raises(fb.InputError, match=r"is of format 99.*update it"):
        solve(resume=tmp_path)


def test_parts_that_a_reader_does_not_know_are_no_harm(tmp_path):
    solve(4, callbacks=[Checkpoint(tmp_path)])
    extra = io.BytesIO()
    arrays.write(extra, np.arange(3))
    with (tmp_path / FILE).open("ab") as file:
        file.write(extra.getvalue())
    rewritten(tmp_path, lambda head: {**head, "parts": {**head["parts"], "more": 1}})
    assert solve(resume=tmp_path).iteration == 6


class Early(Callback):
    """Fails before anything is recorded."""

    def start(self, run):
        raise KeyboardInterrupt


def test_a_run_that_was_stopped_before_its_first_row_is_resumed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        solve(callbacks=[Checkpoint(tmp_path), Early()])
    np.testing.assert_array_equal(flat(solve(resume=tmp_path).y), flat(solve().y))


# Other metrics --------------------------------------------------------------------------------------------------------

ONE = {"one": lambda x, y: jnp.sum(y["w"] ** 2)}
TWO = {"two": lambda x, y: jnp.sum(y["w"]), "three": lambda x, y: float("nan")}
OFFERS = {
    "added": ({}, ONE),
    "dropped": (ONE, {}),
    "others": (ONE, TWO),
    "more": (ONE, ONE | TWO),
    "fewer": (ONE | TWO, ONE),
}
both_engines = pytest.mark.parametrize("engine", [fb.Simulation(cohort=3), fb.Loopback(cohort=3)], ids=["sim", "loop"])


@pytest.mark.parametrize(
    ("offer", "engine"), [*((offer, fb.Simulation(cohort=3)) for offer in OFFERS), ("others", fb.Loopback(cohort=3))]
)
def test_a_run_goes_on_with_other_metrics(tmp_path, offer, engine):
    before, after = OFFERS[offer]
    file = lambda: CSV(tmp_path / "history.csv", {"seed": 0})
    part = solve(3, metrics=before, callbacks=[file(), Checkpoint(tmp_path)], engine=engine)
    head = (tmp_path / "history.csv").read_text().splitlines()[0]
    resumed = solve(5, metrics=after, callbacks=[file(), Checkpoint(tmp_path)], resume=tmp_path, engine=engine)
    np.testing.assert_array_equal(flat(resumed.y), flat(solve(5, engine=engine).y))
    names = list(part.history[0]) + [name for name in after if name not in before]
    frame = resumed.history.to_dataframe()
    assert list(frame) == names and [set(row) for row in resumed.history] == [set(names)] * 6
    with (tmp_path / "history.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert list(rows[0]) == ["seed", *names] and head == ",".join(["seed", *part.history[0]])
    for name in before.keys() | after.keys():
        taken = [name in (before if k <= 3 else after) for k in range(6)]
        assert [row[name] != "" for row in rows] == taken
        if name != "three":
            assert list(frame[name].notna()) == list(~np.isnan(resumed.history.column(name))) == taken
    third = solve(6, metrics=ONE, callbacks=[file(), Checkpoint(tmp_path)], resume=tmp_path, engine=engine)
    np.testing.assert_equal(third.history[:6], list(resumed.history))


def test_a_last_row_off_the_grid_is_taken_again_with_the_new_metrics(tmp_path):
    solve(3, metrics=ONE, evaluate_every=2, callbacks=[Checkpoint(tmp_path)])
    ended = solve(3, metrics=TWO, evaluate_every=2, resume=tmp_path).history[-1]
    assert ended["iteration"] == 3 and np.isfinite(ended["one"]) and np.isfinite(ended["two"])
    assert np.isfinite(ended["moved"])


def test_columns_that_appear_later_rewrite_the_whole_file(tmp_path):
    history = fb.History()
    run = types.SimpleNamespace(history=history, metrics={})
    sink = CSV(tmp_path / "h.csv")
    sink.start(run)
    for row in ({"a": 1, "b": 2.0}, {"a": 2, "c": None}, {"d": 4}):
        history.add([row])
        sink.record(run, [row])
    sink.finish(run, None)
    assert (tmp_path / "h.csv").read_text().splitlines() == ["a,b,c,d", "1,2.0,,", "2,,,", ",,,4"]
    assert [path.name for path in tmp_path.iterdir()] == ["h.csv"]


def test_histories_with_other_columns_are_gathered_summarised_and_drawn(tmp_path):
    plan = Plan(Shipped("quadratic", Options()), {"aggitd": {}, "fednest": {}}, (0,), iterations=2)
    for name, metric in (("aggitd", "distance"), ("fednest", "other")):
        place = tmp_path / "runs" / f"{name}-0"
        place.mkdir(parents=True)
        line = f"{name},0,{{}},1,8,8,0.5,{{}}"
        head = f"algorithm,seed,iteration,rounds,bytes_down,bytes_up,seconds,{metric}"
        (place / "history.csv").write_text("\n".join([head, line.format(0, ""), line.format(1, 2.5)]) + "\n")
    gather(plan, tmp_path)
    frame = report.read(tmp_path)
    assert list(frame.columns[-2:]) == ["distance", "other"] and frame["other"].isna().sum() == 3
    files = report.write(tmp_path, frame)
    assert {file.name for file in files} == {"summary.csv", "summary.md", "distance.png", "other.png"}
    _, curves = report.curves_of(frame[frame["algorithm"] == "aggitd"], "rounds", "distance")
    assert (curves == 2.5).all()  # the start, where it was not taken, is left out


# Seconds --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@both_engines
def test_seconds_of_a_resumed_run_go_on_without_compilation_and_without_the_time_between(tmp_path, engine):
    algorithm = fb.Lockstep(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.01, batch_size=2)

    def run(n, **options):
        jax.clear_caches()  # as in a new process
        compiled, begin = clock.compiling(), time.perf_counter()
        result = solve(n, algorithm, engine, callbacks=[Checkpoint(tmp_path), CSV(tmp_path / "h.csv")], **options)
        return result, time.perf_counter() - begin, clock.compiling() - compiled

    part, wall, compiled = run(3)
    assert 0 < part.seconds < wall - compiled < wall
    time.sleep(0.5)
    resumed, wall, compiled = run(6, resume=tmp_path)
    seconds = resumed.history.column("seconds")
    assert seconds[3] == part.history[-1]["seconds"] == part.seconds
    assert 0 < seconds[6] - seconds[3] < wall - compiled < wall
    assert resumed.seconds == seconds[6]
    with (tmp_path / "h.csv").open(newline="") as text:
        assert [float(row["seconds"]) for row in csv.DictReader(text)] == list(seconds)


def test_the_clock_leaves_compilation_out_once():
    """Compilation within compilation (a jitted function in another) is not taken off twice."""
    slow = jax.jit(lambda a: jnp.linalg.svd(a @ a.T)[1])
    nested = jax.jit(lambda a: slow(jnp.stack([a, a]).sum(0)) + slow(a[:3, :3]).sum())
    told = []
    listen = lambda event, seconds, **_: told.append(seconds if event.startswith(COMPILING) else 0.0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    watch, begin = clock.Stopwatch(), time.perf_counter()
    try:
        jax.block_until_ready(nested(np.eye(4)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    time.sleep(0.2)
    seconds = watch.seconds()
    assert 0.2 <= seconds < time.perf_counter() - begin - max(told)
