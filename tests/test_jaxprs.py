"""The names that JAX does not promise to keep: each does what the library relies on, and one module imports them."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel
from fedbilevel import jaxprs

SOURCE = Path(fedbilevel.__file__).parent
PRIVATE = ("jax._src", "jax.core", "jax.extend", "jax.interpreters", "jax.lib", "jaxlib")


def imported(text):
    """The modules that a file imports, or imports from, with the names."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def private(text):
    return [name for name in imported(text) if any(name == p or name.startswith(f"{p}.") for p in PRIVATE)]


def test_one_module_imports_private_names_of_jax():
    assert [file.name for file in SOURCE.rglob("*.py") if private(file.read_text())] == ["jaxprs.py"]


@pytest.mark.parametrize(
    "text", ["from jax import core", "import jax.extend as e", "from jax._src.core import x", "y = jax.core.Tracer"]
)
def test_a_private_name_is_seen(text):
    assert private(text)
    assert not private("import jax.numpy as jnp\nfrom jax.tree_util import keystr\ny = jax.lax.scan")


def test_every_name_is_tested():
    here = Path(__file__).read_text()
    assert not [name for name in jaxprs.__all__ if f"jaxprs.{name}" not in here]


def test_traced_programs():
    """Variables and literals of a program; and the program as a function of lists."""
    program = jax.make_jaxpr(lambda a: (a * 2.0).sum())(jnp.arange(3.0))
    assert isinstance(program, jaxprs.ClosedJaxpr)
    assert isinstance(program.jaxpr, jaxprs.Jaxpr)
    first = program.jaxpr.eqns[0]
    assert isinstance(first, jaxprs.JaxprEqn)
    assert [isinstance(v, jaxprs.Literal) for v in first.invars] == [False, True]
    assert isinstance(first.invars[0], jaxprs.Var)
    assert first.invars[1].val == 2.0
    assert jaxprs.jaxpr_as_fun(program)(jnp.arange(3.0)) == [6.0]


def test_what_results_do_not_need_is_cut_away():
    program = jax.make_jaxpr(lambda a, b: (jnp.sin(a), jnp.cos(b)))(1.0, 2.0).jaxpr
    less, used = jaxprs.dce_jaxpr(program, [False, True])
    assert used == [False, True]
    assert [eqn.primitive.name for eqn in less.eqns] == ["cos"]
    whole, used = jaxprs.dce_jaxpr(program, [False, True], instantiate=True)
    assert used == [True, True]
    assert len(whole.invars) == 2


def test_a_trace_is_told_from_another():
    state = lambda: jaxprs.get_opaque_trace_state(convention="nnx")
    inside = []

    @jax.jit
    def traced(a):
        inside.extend([isinstance(a, jaxprs.Tracer), state() == state(), state() == outside])
        return a

    outside = state()
    traced(1.0)
    assert inside == [True, True, False]
    assert state() == outside
    assert not isinstance(jnp.ones(()), jaxprs.Tracer)
    known = jax.make_jaxpr(jnp.sin)(jnp.ones(3)).jaxpr.outvars[0].aval
    assert isinstance(known, jaxprs.ShapedArray) and (known.shape, known.weak_type) == ((3,), False)


def test_compiling_is_told_of():
    """Each of the three steps by an event of its own, and running a compiled program by none."""
    told = []

    def listen(event, seconds, **_):
        if event.startswith(jaxprs.COMPILING):  # a program that is read from a cache has other events besides
            told.append((event.removeprefix(jaxprs.COMPILING), seconds))

    jax.monitoring.register_event_duration_secs_listener(listen)
    program = jax.jit(lambda a: jnp.tan(a) + 3.0 * a**3)
    try:
        program(2.0)
        compiled = list(told)
        program(3.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert told == compiled
    assert all(seconds > 0 for _, seconds in told)
    for step in ("jaxpr_trace", "jaxpr_to_mlir", "backend_compile"):
        assert any(event.startswith(step) for event, _ in told)


def test_random_bits_are_those_of_the_published_cipher():
    """Known answers of Threefry-2x32 with 20 rounds, from the test vectors of Salmon et al. 2011."""
    key, counter = np.array([0x13198A2E, 0x03707344], np.uint32), np.array([0x243F6A88, 0x85A308D3], np.uint32)
    expected = np.array([0xC4923A9C, 0x483DF7A0], np.uint32)
    np.testing.assert_array_equal(jaxprs.threefry_2x32(jnp.asarray(key), jnp.asarray(counter)), expected)


def test_where_jax_asks_for_compiled_programs(monkeypatch):
    """What stands there is asked before a program is compiled, and handed what was."""
    asked = []

    class Deaf(jaxprs.CacheInterface):
        _path = Path()

        def get(self, key):
            asked.append(("get", key))

        def put(self, key, value):
            asked.append(("put", key, type(value)))

    monkeypatch.setattr(jaxprs.compilation_cache, "_cache", Deaf())
    jax.jit(lambda a: a * 1234.5)(np.float32(1))
    assert callable(jaxprs.compilation_cache.reset_cache)
    assert asked[0][0] == "get"
    assert asked[0][1].startswith("jit__lambda")


def _next(count, numbers):
    assert isinstance(numbers, np.ndarray)
    return [count + 1, numbers * count]


def test_a_call_of_python_in_a_loop():
    """In the order in which results are handed on; with numpy's arrays."""
    call = lambda _, both: tuple(jaxprs.on_host(_next, both, *both))
    begin = jnp.ones((), jnp.int32), jnp.ones(3)
    count, numbers = jax.jit(lambda: jax.lax.fori_loop(0, 4, call, begin))()
    assert count == 5
    assert numbers.tolist() == [24.0] * 3


def test_version_of_jaxlib():
    assert [int(part) for part in jaxprs.jaxlib_version.split(".")[:2]] >= [0, 10]


def test_a_number_gives_way_as_python_s_do():
    """Within a trace too, and across the precisions of strict promotion."""

    def scaled(number):
        return jnp.ones(2, jnp.float16) * jaxprs.weakly(number)

    with jax.numpy_dtype_promotion("strict"):
        for run in (scaled, jax.jit(scaled)):
            assert run(jnp.asarray(2.0, jnp.float32)).dtype == jnp.float16


def _each(batch, one, other):
    """Sums, each of its own; in numpy, of numbers that lie where JAX's do."""
    lead = len(batch)
    assert type(one) is type(other) is np.ndarray and (one.ndim, other.ndim) == (lead + 1, lead)
    total = one.sum(axis=-1) + other
    return [np.broadcast_to(total, batch).copy(), np.broadcast_to(np.ones((), np.float32), batch).copy()]


LIKE = [jax.ShapeDtypeStruct((), jnp.float64), jax.ShapeDtypeStruct((), jnp.float32)]


def test_a_call_for_each():
    """Once under however many vmaps, in loops, outside of programs; shared arguments have an axis of one."""
    ask = lambda one, other: jaxprs.each_on_host(_each, LIKE, one, other)
    one, other = jnp.arange(6.0).reshape(2, 3), jnp.arange(4.0)
    total, ones = jax.jit(jax.vmap(jax.vmap(ask, (None, 0)), (0, None)))(one, other)
    assert total.dtype == jnp.float64 and ones.dtype == jnp.float32
    np.testing.assert_array_equal(total, np.asarray(one).sum(1)[:, None] + np.asarray(other))
    np.testing.assert_array_equal(ones, np.ones((2, 4)))
    assert float(ask(one[0], other[1])[0]) == 4.0
    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: ask(one[0], x)[0], x))
    assert float(looped(other[0])) == 9.0


def test_a_call_keeps_64_bits_where_they_are_on_within_a_context_alone():
    """JAX looks at what Python returns in another thread, where the context does not hold."""
    with jax.enable_x64(False), jax.enable_x64(True):
        third = jnp.asarray([1.0, 1.0], jnp.float64) / 3
        ask = jax.jit(lambda x: jax.lax.fori_loop(0, 2, lambda _, x: jaxprs.each_on_host(_same, [x], x)[0], x))
        assert ask(third).dtype == jnp.float64
        np.testing.assert_array_equal(ask(third), np.ones(2) / 3)


def _same(_, x):
    return [x]


def test_an_equation_is_done_again_on_other_values():
    @jax.custom_jvp
    def halved(a):
        return a / 2

    halved.defjvp(lambda at, along: (halved(*at), 7 * along[0]))
    function = lambda a: halved(jax.jit(jnp.sin)(a) * 3)
    program = jax.make_jaxpr(function)(1.0)

    def again(a):
        known = dict(zip(program.jaxpr.invars, [a], strict=True))
        for eqn in program.jaxpr.eqns:
            given = [of.val if isinstance(of, jaxprs.Literal) else known[of] for of in eqn.invars]
            known.update(zip(eqn.outvars, jaxprs.bound(program.jaxpr, eqn, given), strict=True))
        return known[program.jaxpr.outvars[0]]

    np.testing.assert_allclose(again(2.0), function(2.0))
    np.testing.assert_allclose(jax.grad(again)(2.0), 7 * 3 * np.cos(2.0))  # the rule is kept


def test_arrays_of_a_loop_cannot_be_used_after_it():
    kept = []

    def turn(t, carry):
        kept.append(carry)
        assert jaxprs.usable((carry, t))
        return carry + 1

    def whole(x):
        kept.append(x)
        assert jaxprs.usable((x, np.ones(2), 1.0))
        out = jax.lax.fori_loop(0, 2, turn, x)
        assert [jaxprs.usable(each) for each in kept] == [True, *[False] * (len(kept) - 1)]
        return jax.lax.cond(out[0] > 0, lambda: out if jaxprs.usable(x) else x, lambda: x)

    assert jax.vmap(jax.jit(whole))(jnp.zeros((3, 2))).shape == (3, 2)
    assert not jaxprs.usable(kept[0]) and jaxprs.usable(jnp.zeros(2))
