"""Clients' states in a file: the numbers of a run in memory, whatever way a run goes; versions; a full disk."""

import dataclasses
import weakref
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import arrays
from fedbilevel.engines.simulated import on_disk
from fedbilevel.engines.simulated.layout import layout_of
from fedbilevel.engines.simulated.on_disk import Store, Version
from helpers.plain import plain
from helpers.quadratic import flat

TASK = fb.tasks.quadratic(clients=7)
KINDS = [
    plain(fb.Lockstep, batch_size=2, local_steps=1),
    fb.FedBiOAccLocal(batch_size=2),
    plain(fb.FedF2SA, batch_size=2),
]
START = {"a": jnp.arange(3.0), "n": jnp.zeros((), jnp.int32), "h": jnp.ones((2, 2), jnp.bfloat16)}


def solve(algorithm, where, iterations=4, task=TASK, dropout=0.3, **more):
    engine = fb.Simulation(cohort=3, dropout=dropout, client_state=where)
    return fb.solve(
        task.problem, task.data, algorithm, task.x, task.y, iterations, key=jax.random.key(3), engine=engine, **more
    )


def numbers(result):
    own = [] if result.clients_y is None else [result.clients_y]
    return np.concatenate([flat(tree) for tree in (result.x, result.y, *own)])


@pytest.mark.parametrize(
    "algorithm", [*KINDS[:2], pytest.param(KINDS[2], marks=pytest.mark.slow)], ids=lambda a: type(a).__name__
)
def test_the_numbers_are_those_of_memory(algorithm, tmp_path):
    """With cohorts, minibatches and dropout."""
    one, other = solve(algorithm, "memory"), solve(algorithm, tmp_path)
    np.testing.assert_allclose(numbers(one), numbers(other), rtol=0, atol=1e-12)
    assert [row["bytes_up"] for row in one.history] == [row["bytes_up"] for row in other.history]
    assert not list(tmp_path.iterdir())  # the file has no name


@pytest.mark.parametrize("pair", [("memory", "disk"), ("disk", "memory"), ("disk", "disk")], ids="-".join)
def test_a_resumed_run_goes_on_wherever_states_lie(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_LARGE", 16)  # bytes from which on an array is left in the checkpoint
    whole = solve(KINDS[0], "memory")
    first, then = (tmp_path if where == "disk" else where for where in pair)
    solve(KINDS[0], first, 2, callbacks=[fb.callbacks.Checkpoint(tmp_path)])
    back = solve(KINDS[0], then, resume=tmp_path)
    np.testing.assert_allclose(numbers(back), numbers(whole), rtol=0, atol=1e-12)


def test_a_run_that_blows_up_keeps_its_last_good_state(tmp_path):
    """Its end is run again, and the diagnosis tries other settings from before."""
    steep = dataclasses.replace(KINDS[0], inner_lr=4.0)
    found = []
    for where in ("memory", tmp_path):
        with pytest.raises(fb.Diverged) as error:
            solve(steep, where, 60)
        found.append((str(error.value), numbers(error.value.result)))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-12)


@pytest.mark.slow
def test_a_run_with_an_automatic_step_goes_back(tmp_path):
    """To its snapshot, and with it every client's state."""
    rows = [{"c": np.array([[0.1 * i, -0.1 * i]])} for i in range(4)]

    def inner(x, y, row):
        penalty = 0.5 * jnp.where(x[0] > 1, 1000.0, 1.0) * jnp.sum(y**2)
        return 0.5 * jnp.sum((y - row["c"] - 3) ** 2) + penalty + 1e-3 * jnp.sum(x * y)

    outer = lambda x, y, row: 0.5 * jnp.sum((y - 3) ** 2) + 0.5 * jnp.sum((x - 2) ** 2)
    auto = fb.Lockstep(hessian_lr="auto", inner_lr=2e-4, outer_lr=0.05, local_steps=1)
    given = fb.Problem(inner, outer), fb.FederatedData.stack(rows, rows), auto, jnp.zeros(2), jnp.zeros(2)
    ends = [
        fb.solve(*given, 40, key=jax.random.key(0), engine=fb.Simulation(client_state=where), check=False)
        for where in ("memory", tmp_path)
    ]
    halvings = [end.history.column("halvings").tolist() for end in ends]
    assert halvings[0] == halvings[1]
    assert halvings[0][-1] > 0
    np.testing.assert_allclose(numbers(ends[0]), numbers(ends[1]), rtol=0, atol=1e-12)


# Versions ---------------------------------------------------------------------------------------------------------------


def store(tmp_path, clients=6):
    return Store(tmp_path, START, clients)


def filled(value, many):
    return [np.full((many, *leaf.shape), value, leaf.dtype) for leaf in layout_of(START).leaves]


def after(version, index, value):
    write = lambda _: version.store.write(np.array(index), version.store.layout.packed(filled(value, len(index))))
    return version.changed(write)[0]


def numbers_of(version):
    return np.asarray(version.whole()["n"]).tolist()


def test_every_version_is_as_it_was(tmp_path):
    first = Version(store(tmp_path))
    second = after(first, [0, 1, 4], 1)
    third = after(second, [1, 5], 2)
    branch = after(first, [1, 2], 3)  # from an earlier one
    expected = {
        first: [0, 0, 0, 0, 0, 0],
        second: [1, 1, 0, 0, 1, 0],
        third: [1, 2, 0, 0, 1, 2],
        branch: [0, 3, 3, 0, 0, 0],
    }
    for version in (third, branch, first, third, second, branch, second):
        assert numbers_of(version) == expected[version]
        assert np.asarray(version.whole()["a"])[3].tolist() == [0.0, 1.0, 2.0]  # never asked
    assert version.whole()["h"].dtype == jnp.bfloat16
    assert version.store.touched.tolist() == [True, True, False, False, True, False]


def test_what_nobody_can_go_back_to_is_forgotten(tmp_path, monkeypatch):
    alive = weakref.WeakSet()
    made = on_disk.Log.__init__
    monkeypatch.setattr(on_disk.Log, "__init__", lambda self, *a: (alive.add(self), made(self, *a))[1])
    version = Version(store(tmp_path))
    for step in range(5):
        version = after(version, [0, step], step)
    assert not alive


def test_a_stretch_that_fails_changes_nothing(tmp_path):
    first = after(Version(store(tmp_path)), [0, 1], 1)

    def fail(_):
        first.store.write(np.array([1, 2]), first.store.layout.packed(filled(7, 2)))
        raise KeyError("stopped")

    with pytest.raises(KeyError):
        first.changed(fail)
    assert numbers_of(first) == [1, 1, 0, 0, 0, 0]


def test_inside_a_program_a_client_that_was_drawn_twice_is_written_once(tmp_path):
    version = Version(store(tmp_path))

    @eqx.filter_jit
    def program(kept):
        index = jnp.array([1, 4, 4])
        kept, states = kept.read(index)
        states = jax.tree.map(lambda leaf: leaf + jnp.asarray(2, leaf.dtype), states)
        kept = kept.write(index, jnp.array([True, True, True]), states)
        kept, states = kept.read(index)
        return kept.write(jnp.array([0, 1, 2]), jnp.array([False, False, True]), states), states

    later, (_, states) = version.changed(lambda kept: jax.block_until_ready(program(kept)))
    assert states["n"].tolist() == [2, 2, 2]
    assert numbers_of(later) == [0, 2, 2, 0, 2, 0]
    assert numbers_of(version) == [0] * 6


def test_a_full_disk_ends_the_run_with_a_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(on_disk._File, "write", full)
    with pytest.raises(fb.RunError, match=f"clients' states.*{tmp_path}.*No space left on device") as error:
        solve(KINDS[0], tmp_path)
    assert error.value.result.iteration == 0


def test_what_cannot_go_with_it(tmp_path):
    with pytest.raises(fb.InputError, match="a folder that exists; got 'dsik'"):
        fb.Simulation(client_state="dsik")
    mesh = jax.make_mesh((1,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(fb.InputError, match="leave client_state= or mesh= out"):
        fb.Simulation(client_state=Path(tmp_path), mesh=mesh)
    given = TASK.problem, TASK.data, KINDS[0], TASK.x, TASK.y
    with pytest.raises(fb.InputError, match=r"leave client_state=.* out"):
        fb.stepper(*given, engine=fb.Simulation(client_state="disk"))
