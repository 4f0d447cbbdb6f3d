"""`anyattn.compat.jax` does what JAX's own function does, under its transformations, by XLA and by Numba."""

from __future__ import annotations

from functools import partial
from inspect import signature

import numpy as np
import pytest

import anyattn as aa
from anyattn.compat.jax import dot_product_attention
from anyattn.dispatch import recording

jax = pytest.importorskip("jax", reason="compares with JAX's own function")
jnp = pytest.importorskip("jax.numpy")
theirs = jax.nn.dot_product_attention

B, T, S, N, K, H = 2, 7, 9, 4, 2, 5
IMPLEMENTATIONS = ["xla", "numba"]


def draw(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def tensors(dtype="float32"):
    return draw(B, T, N, H, dtype=dtype), draw(B, S, K, H, dtype=dtype), draw(B, S, K, H, seed=1, dtype=dtype)


def some(*shape):
    """A boolean array that leaves every row a key under each of the other options."""
    return jnp.asarray(np.random.default_rng(shape).random(shape) < 0.7).at[..., :3].set(True)


def need_numba():
    pytest.importorskip("numba", reason="runs the Numba engine")


EVERYTHING = {
    "bias": lambda: draw(1, N, T, S),
    "mask": lambda: some(B, 1, T, S),
    "query_seq_lengths": lambda: jnp.asarray([7, 4], jnp.int32),
    "key_value_seq_lengths": lambda: jnp.asarray([9, 5], jnp.int32),
    "scale": lambda: 0.3,
    "is_causal": lambda: True,
    "local_window_size": lambda: (6, 2),
}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True, "scale": 0.7},
    "both sides of a window": {"local_window_size": 4},
    "lengths, bias of keys": {
        **{name: EVERYTHING[name]() for name in ("query_seq_lengths", "key_value_seq_lengths")},
        "bias": draw(S),
    },
    "mask of heads, lengths of queries": {
        "mask": some(N, T, S),
        "query_seq_lengths": EVERYTHING["query_seq_lengths"](),
    },
    "everything": {name: make() for name, make in EVERYTHING.items()},
}
# Each mask or score is a kernel of its own, which takes Numba a second or two.
RUNS = [("xla", name) for name in OPTIONS] + [("numba", "plain"), ("numba", "everything")]


def results(function, options, given):
    """(out, residual) and the gradients of a sum of the outputs by q, k, v and the bias."""

    def total(floats):
        bias = {"bias": floats["bias"]} if "bias" in floats else {}
        out, residual = function(floats["q"], floats["k"], floats["v"], **{**options, **bias})
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), (out, residual)

    (_, found), gradients = jax.value_and_grad(total, has_aux=True)(given)
    return found, gradients


def compared(options, **how):
    """What each function gives, under `jax.jit`."""
    given = dict(zip("qkv", tensors(), strict=True))
    options = {**options, "return_residual": True}
    if "bias" in options:
        given["bias"] = options.pop("bias")
    ours = partial(dot_product_attention, **how)
    return [jax.jit(partial(results, f, options))(given) for f in (ours, theirs)]


def close(found, wanted, tolerance=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, wanted)


def test_signature():
    parameters = [
        [(p.name, p.kind, p.default) for p in signature(f).parameters.values()]
        for f in (dot_product_attention, theirs)
    ]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize(("implementation", "name"), RUNS)
def test_values_and_gradients(implementation, name):
    if implementation == "numba":
        need_numba()
    ((out, residual), gradients), ((their_out, their_residual), their_gradients) = compared(
        OPTIONS[name], implementation=implementation
    )
    close((out, gradients), (their_out, their_gradients))
    seen = residual != -jnp.inf
    close(jnp.where(seen, residual, 0), jnp.where(seen, their_residual, 0))
    lengths = OPTIONS[name].get("query_seq_lengths", jnp.asarray([T, T]))
    padded = jnp.arange(T)[None, :, None] >= lengths[:, None, None]
    assert jnp.array_equal(~seen, jnp.broadcast_to(padded, seen.shape))


@pytest.fixture
def host_calls(monkeypatch):
    """The settings under which the callback called `attention`, once for each time."""
    need_numba()
    from anyattn import settings
    from anyattn.compat import jax_numba

    calls = []

    def spied(*args, **options):
        calls.append((options["backend"], settings.current()))
        assert not any(isinstance(x, jax.Array) for x in options.values()), "arrays of JAX in a callback"
        return aa.attention(*args, **options)

    monkeypatch.setattr(jax_numba, "attention", spied)
    return calls


def test_numba_runs_inside_compiled_code(host_calls):
    program = jax.jit(partial(dot_product_attention, implementation="numba"))
    with aa.use(threads=1), recording() as records:
        lowered = program.lower(*tensors())
    assert [record.backend for record in records] == ["numba"], "told where the function is traced"
    assert not host_calls
    compiled = lowered.compile()
    for _ in range(3):
        compiled(*tensors())
    # Threads of XLA do not see the context in which the function was traced.
    assert [(name, here.threads) for name, here in host_calls] == [("numba", 1)] * 3


def test_arrays_with_values_go_to_numba():
    need_numba()
    q, k, v = tensors()
    wanted = theirs(q, k, v)
    with recording() as records:
        close(dot_product_attention(q, k, v), wanted)
        # Eagerly differentiated ones have values when the forward pass runs.
        jax.grad(lambda q: dot_product_attention(q, k, v, implementation="numba").sum())(q)
    assert [record.backend for record in records] == ["numba"] * 2
    with recording() as records:
        close(dot_product_attention(q, k, v, implementation="xla"), wanted)
        jax.jit(dot_product_attention).lower(q, k, v)
    assert [record.backend for record in records] == ["reference"] * 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap(implementation):
    """Over some arguments and not others, nested, with gradients, and over a mask or lengths alone."""
    if implementation == "numba":
        need_numba()
    q, k, v = tensors()
    mask, queries, keys = (EVERYTHING[n]() for n in ("mask", "query_seq_lengths", "key_value_seq_lengths"))

    def call(function, q, k, mask, queries, keys):
        options = {"bias": EVERYTHING["bias"](), "mask": mask, "scale": 0.3, "is_causal": True}
        options |= {"local_window_size": (6, 2), "query_seq_lengths": queries, "key_value_seq_lengths": keys}
        return jnp.sum(function(q, k, v, **options) ** 2, axis=(1, 2, 3))

    def mapped(function):
        one = partial(call, function)
        by_mask = jax.vmap(one, (None, None, 0, None, None))
        by_query = jax.vmap(by_mask, (0, None, None, None, None))
        by_lengths = jax.vmap(one, (None, None, None, 0, 1))

        def total(q, k):
            first = by_query(jnp.stack([q, q + 1, q - 1]), k, jnp.stack([mask, mask | True]), queries, keys)
            second = by_lengths(q, k, mask, jnp.stack([queries, queries - 1]), jnp.stack([keys, keys], 1))
            return jnp.sum(first) + jnp.sum(second), (first, second)

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(q, k)

    found = mapped(partial(dot_product_attention, implementation=implementation))
    assert found[1][0].shape == (3, 2, B)
    close(found, mapped(theirs), 2e-5)


def test_gradients_of_gradients_and_checkpoints():
    need_numba()
    options = {"mask": some(T, S).at[2].set(False)}

    def second(implementation, wrap):
        def total(q, k, v):
            return jnp.sum(dot_product_attention(q, k, v, **options, implementation=implementation) ** 3)

        def steep(*given):
            return sum(jnp.sum(x**2) for x in jax.grad(wrap(total), argnums=(0, 1, 2))(*given))

        with jax.enable_x64(True):
            return jax.jit(jax.grad(steep, argnums=(0, 1, 2)))(*tensors("float64"))

    close(second("numba", jax.checkpoint), second("xla", lambda f: f), 1e-10)


def test_forward_mode():
    q, k, v = tensors()
    found, wanted = (
        jax.jit(lambda q, f=f: jax.jvp(lambda q: f(q, k, v), (q,), (q,)))(q)
        for f in (dot_product_attention, theirs)
    )
    close(found, wanted)
    need_numba()
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: dot_product_attention(q, k, v, implementation="numba"), (q,), (q,))


def test_bfloat16(host_calls):
    def total(function, *given):
        out, residual = function(*given, return_residual=True)
        assert (out.dtype, residual.dtype) == (jnp.bfloat16, jnp.bfloat16)
        return jnp.sum(out.astype(jnp.float32) ** 2), (out, residual)

    ours = partial(dot_product_attention, implementation="numba")
    found, wanted = (
        jax.jit(jax.grad(partial(total, f), argnums=(0, 1, 2), has_aux=True))(*tensors("bfloat16"))
        for f in (ours, theirs)
    )
    assert host_calls
    to_float = partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    # Two roundings of one of eight bits; theirs rounds the weights as well.
    close(to_float(found), to_float(wanted), 2**-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_hidden_does_not_matter(implementation):
    if implementation == "numba":
        need_numba()
    q, k, v = tensors()
    options = OPTIONS["everything"]

    def total(q, k, v):
        return jnp.sum(dot_product_attention(q, k, v, **options, implementation=implementation) ** 2)

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    # Beyond the lengths of the second batch entry.
    spoiled = q, k.at[1, 5:].set(jnp.nan), v.at[1, 5:].set(jnp.inf)
    close(run(*spoiled), run(q, k, v))


def test_rows_that_see_nothing_are_0():
    q, k, v = tensors()
    out, residual = dot_product_attention(q, k, v, mask=some(T, S).at[2].set(False), return_residual=True)
    assert jnp.all(out[:, 2] == 0)
    assert jnp.all(residual[:, 2] == -jnp.inf)
    assert jnp.all(jnp.isfinite(jnp.delete(residual, 2, axis=1)))


def test_memory_of_the_gradient_grows_with_the_lengths():
    need_numba()

    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        total = lambda q: dot_product_attention(q, q, q, implementation="numba").sum()  # noqa: E731
        return jax.jit(jax.grad(total)).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.2 * temporary(2048) < 2.2 * 2048 * 2048 * 4 / 2


def test_axes_and_libraries():
    q, k, v = tensors()
    mask = some(B, 1, T, S)
    wanted, residual = theirs(q, k, v, mask=mask, return_residual=True)
    close(
        dot_product_attention(q[0], k[0], v[0], mask=mask[0], return_residual=True), (wanted[0], residual[0])
    )
    close(dot_product_attention(q, np.asarray(k), v, mask=np.asarray(mask)), wanted)
    lengths = [3, 7]
    out = dot_product_attention(*map(np.asarray, (q, k, v)), query_seq_lengths=lengths)
    assert type(out) is np.ndarray
    close(out, theirs(q, k, v, query_seq_lengths=jnp.asarray(lengths, jnp.int32)))


REFUSED = [
    ({"implementation": "cudnn"}, ValueError, "implementation: .*'cudnn'"),
    ({"implementation": "nobody"}, ValueError, "implementation: 'nobody' is not installed"),
    ({"mask": draw(T, S)}, TypeError, "mask: wanted dtype bool.*bias"),
    ({"mask": aa.masks.causal()}, TypeError, "mask: wanted an array, got Mask.*anyattn.attention"),
    ({"bias": some(T, S)}, TypeError, "bias: wanted a float dtype, got bool"),
    ({"local_window_size": -1}, ValueError, "local_window_size: left is -1"),
    ({"query_seq_lengths": [1, 2, 3]}, ValueError, r"query_seq_lengths: .*\(2,\), got int\d\d \(3,\)"),
    ({"key_value_seq_lengths": [1.5, 2.0]}, TypeError, "key_value_seq_lengths: wanted integers"),
    ({"is_causal": 1}, TypeError, "is_causal: wanted True or False"),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_refused(implementation, options, error, message):
    if implementation == "numba":
        need_numba()
    q, k, v = tensors()
    options = {"implementation": implementation, **options}
    with pytest.raises(error, match=message):
        jax.jit(lambda q: dot_product_attention(q, k, v, **options)).lower(q)


def test_numba_elsewhere_is_refused(monkeypatch):
    from anyattn import registry

    missing = registry.Status("numba", None, "pip install 'anyattn[numba]'", None)
    monkeypatch.setattr(registry, "find", lambda name, source: missing)
    with pytest.raises(aa.errors.UnsupportedCallError, match=r"implementation=.*pip install 'anyattn\[numba"):
        jax.jit(partial(dot_product_attention, implementation="numba")).lower(*tensors())


def test_attention_under_transformations():
    """`anyattn.attention` with traced arrays that a function captures: each mapped entry is a call."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in tensors())
    slopes = draw(3, N)

    def total(slopes, q):
        score_mod = lambda s, b, h, i, j: s - slopes[h] * abs(i - j)  # noqa: E731
        return jnp.sum(aa.attention(q, k, v, score_mod=score_mod, causal=True) ** 2)

    one = jax.value_and_grad(jax.checkpoint(total))
    found = jax.jit(jax.vmap(one, (0, None)))(slopes, q)
    each = [jax.jit(one)(row, q) for row in slopes]
    close(found, jax.tree.map(lambda *x: jnp.stack(x), *each), 1e-5)
