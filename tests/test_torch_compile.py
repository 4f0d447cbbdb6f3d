"""`torch.compile` of functions that call `attention`: no break in the graph, forward and backward."""

from __future__ import annotations

import gc
import weakref

import pytest

import anyattn as aa
from anyattn import masks, scores
from anyattn.compat.torch import scaled_dot_product_attention
from anyattn.dispatch import recording

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.library import opcheck  # noqa: E402

# torch's compiler imports parts of torch that warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

GENERATOR = torch.Generator().manual_seed(3)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


Q, K, V = draw(2, 4, 9, 8), draw(2, 2, 11, 8), draw(2, 2, 11, 5)
SLOPES, TABLE, DISTANCES = draw(4).abs(), draw(4, 11), draw(7, 8)
IDS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
BEFORE = masks.documents(IDS)
SCORE = scores.alibi(SLOPES)
DISTANCES.requires_grad_()
KEYS = scores.relative_keys(Q, DISTANCES)

CACHE = aa.KVCache(*draw(2, 2, 4, 9, 8))
RING = aa.KVCache(CACHE.k, CACHE.v, window=5)


def attend(q, k, v, **options):
    return aa.attention(q, k, v, **options)


def twice(x, b, h, i, j):
    return aa.where(i > j, x * 2, x + TABLE[h][j])


CALLS = {
    "causal": lambda q, k, v, s: attend(q, k, v, causal=True),
    "window and softcap": lambda q, k, v, s: attend(q, k, v, window=(3, 0), softcap=2.0),
    "entries": lambda q, k, v, s: attend(
        q, k, v, mask=masks.sliding_window(3) | masks.global_tokens([2]), scale=0.3
    ),
    "an entry of a tensor": lambda q, k, v, s: attend(
        q, k, v, mask=masks.documents(IDS) & masks.causal(), return_lse=True
    ),
    "a score of a tensor": lambda q, k, v, s: attend(
        q, k, v, score_mod=scores.alibi(s) + scores.softcap(3.0)
    ),
    "a score of queries": lambda q, k, v, s: attend(
        q, k, v, score_mod=scores.relative_keys(q, DISTANCES), window=(4, 0)
    ),
    "a function": lambda q, k, v, s: attend(q, k, v, score_mod=lambda x, b, h, i, j: x - s[h] * abs(i - j)),
    "a function of outside": lambda q, k, v, s: attend(q, k, v, score_mod=twice),
    "tensors beside symbols": lambda q, k, v, s: attend(
        q,
        k,
        v,
        score_mod=lambda x, b, h, i, j: (
            (x - s[0] * TABLE[h][j]) / (1.5 + s[h]) + (s[1] - x) * (i % s.shape[0]) + -x // s[2]
        ),
        mask=lambda b, h, i, j: (i - j < 5) | (j == 0),
    ),
    "inverted": lambda q, k, v, s: attend(q, k, v, mask=~(masks.prefix(2) | BEFORE) | masks.causal()),
    "a function that inverts, and reads at two symbols": lambda q, k, v, s: attend(
        q,
        k,
        v,
        mask=lambda b, h, i, j: ~(i - j > 5) & ~(TABLE[h, j] > 1),
        score_mod=lambda x, b, h, i, j: x + TABLE[h, j] * s[0] - TABLE[0, (i + j) % 11] + TABLE[h, 2],
    ),
    "made before": lambda q, k, v, s: attend(q, k, v, mask=BEFORE),
    "made before, joined": lambda q, k, v, s: attend(
        q, k, v, score_mod=SCORE.then(scores.softcap(3.0)), mask=BEFORE & masks.causal()
    ),
    "queries made before": lambda q, k, v, s: attend(q, k, v, score_mod=KEYS + SCORE),
    "blocks that queries choose": lambda q, k, v, s: attend(q, k, v, mask=masks.top_blocks(q, k, 4, 2)),
    "lengths and sinks": lambda q, k, v, s: attend(
        q, k, v, kv_lengths=[3, 9], q_offset=0, causal=True, sinks=s
    ),
    "mask array and bias": lambda q, k, v, s: attend(
        q,
        k,
        v,
        mask=TABLE[:1, None, :].expand(1, 9, 11)[0] > -1,
        bias=(s[:, None, None] * TABLE[:, None, :])[None],
    ),
    "layout": lambda q, k, v, s: attend(
        *(x.transpose(1, 2) for x in (q, k, v)), layout="blhd", softcap=9.0, return_lse=True
    ),
    "packed sequences": lambda q, k, v, s: aa.varlen_attention(
        *(x[0].transpose(0, 1) for x in (q, k, v)),
        [0, 4, 9],
        torch.tensor([0, 5, 11]),
        window=(2, 0),
        mask=lambda b, h, i, j: ~((j == 1) & (b == 1)),
        score_mod=scores.alibi(s),
        sinks=s,
        return_lse=True,
    ),
    "two axes": lambda q, k, v, s: attend(
        q[0, 0], k[0, 0], v[0, 0], window=(3, 3), sinks=s[:1], return_lse=True
    ),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("function", CALLS.values(), ids=CALLS)
def test_gives_what_the_function_gives(function):
    arrays = [*(x.clone().requires_grad_() for x in (Q, K, V, SLOPES)), DISTANCES]

    def results(f):
        found = f(*arrays[:4])
        found = found if isinstance(found, tuple) else (found,)
        total = sum(x.sin().sum() for x in found)
        return *found, *torch.autograd.grad(total, arrays, allow_unused=True, materialize_grads=True)

    compiled = results(torch.compile(function, fullgraph=True, backend="aot_eager"))
    for found, wanted in zip(compiled, results(function), strict=True):
        torch.testing.assert_close(found, wanted)


def test_is_one_call_in_one_graph():
    def function(q, k, v):
        return attend(q * 2, k, v, mask=masks.documents(IDS), score_mod=lambda x, b, h, i, j: x * SLOPES[h])

    found = torch._dynamo.explain(function)(Q, K, V)
    assert (found.graph_break_count, found.graph_count) == (0, 1)
    calls = [node.target.__name__ for node in found.graphs[0].graph.nodes if node.op == "call_function"]
    assert calls == ["mul", "attention_in_graph"]


def test_a_score_of_queries_is_one_operation_that_keeps_what_is_linear():
    """Inductor's partition, which keeps or computes again what it likes of the operations of a graph."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def kept(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def function(q, k, v, table):
        return attend(q, k, v, score_mod=scores.relative_keys(q, table) + SCORE, causal=True)

    backend = aot_autograd(fw_compiler=kept, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    held = []
    for length in (33, 66, 132):
        given = [draw(1, 4, length, 8).requires_grad_() for _ in range(3)] + [DISTANCES]
        kept_by_autograd = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept_by_autograd.append(x) or x, lambda x: x):  # noqa: B023
            found = compiled(*given)
        wanted = function(*given)
        torch.testing.assert_close(found, wanted)
        gradients = [torch.autograd.grad(x.sin().sum(), given) for x in (found, wanted)]
        torch.testing.assert_close(*gradients)
        held.append(sum(x.numel() for x in kept_by_autograd))
    assert held[2] - held[1] == 2 * (held[1] - held[0])
    counts = [sum("anyattn.attend" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert counts == [1, 1]


def test_other_lengths_and_masks_compile_nothing():
    def function(q, ids):
        return attend(q, q, q, mask=masks.documents(ids), causal=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for length in (5, 9, 13):
        q = draw(2, 3, length, 8).requires_grad_()
        ids = torch.arange(length) // 4
        found, wanted = compiled(q, ids), function(q, ids)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), q)[0] for x in (found, wanted)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


OPEN = {
    "plain": lambda q, k: attend(q, k, k, scale=0.5),
    "causal": lambda q, k: attend(q, q, q, causal=True),
    "an array of keys": lambda q, k: attend(q, k, k, mask=k[:1, :1, None, :, 0] > -1),
    "a bias": lambda q, k: attend(q, k, k, bias=k[:, :1, None, :, 0].detach()),
    "layout, grouped": lambda q, k: attend(
        *(x.transpose(1, 2) for x in (q, k[:, :2], k[:, 2:])), layout="blhd"
    ),
    "three axes": lambda q, k: attend(q[0], k[0], k[0]),
    "torch's function": lambda q, k: scaled_dot_product_attention(q, k, k),
    "causal order elsewhere": lambda q, k: attend(q, k, k, causal=True),
    "with dropout": lambda q, k: attend(q, k, k, dropout=0.2, dropout_seed=5),
    "an offset that is a tensor": lambda q, k: attend(q, k, k, causal=True, q_offset=torch.tensor([0, 2])),
}


@pytest.mark.parametrize("name", OPEN)
def test_open_sizes_stay_open_and_sdpa_is_in_the_graph(name):
    """Where SDPA means the same whatever the sizes are; the rest is the operation."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def kept(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(OPEN[name], fullgraph=True, backend=aot_autograd(fw_compiler=kept), dynamic=True)
    for length in (11, 15, 20):  # sizes that are the same at first are taken to stay so
        q, k = draw(2, 4, length, 8).requires_grad_(), draw(2, 4, length + 3, 8)
        found, wanted = compiled(q, k), OPEN[name](q, k)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(x.sin().sum(), q)[0] for x in (found, wanted)))
    forward, _ = graphs
    kernels = [str(node.target) for node in forward.graph.nodes if "flash_attention" in str(node.target)]
    operations = [node for node in forward.graph.nodes if "anyattn.attend" in str(node.target)]
    other = name in ("causal order elsewhere", "with dropout", "an offset that is a tensor")
    assert (len(kernels), len(operations)) == ((0, 1) if other else (1, 0))


def test_a_mask_made_before_is_told_from_another():
    def function(q, mask):
        return attend(q, q, q, mask=mask)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    q = draw(2, 11, 8)
    for mask in (masks.documents(IDS), masks.documents(IDS.flip(0)), masks.prefix(3), masks.prefix(4)):
        torch.testing.assert_close(compiled(q, mask), function(q, mask))


def test_tensors_of_a_mask_made_before_are_not_kept():
    table = torch.ones(4, 9)
    score = scores.relative_bias(table)
    held = weakref.ref(table)
    compiled = torch.compile(
        lambda q, score: attend(q, q, q, score_mod=score), fullgraph=True, backend="aot_eager"
    )
    compiled(Q, score)
    del table, score
    torch._dynamo.reset()
    gc.collect()
    assert held() is None


def test_as_many_masks_made_before_are_known_as_are_kept(monkeypatch):
    from anyattn_torch import recipes

    monkeypatch.setattr(recipes, "_KEPT", 3)
    monkeypatch.setattr(recipes, "_known", recipes.OrderedDict())
    made = {n: masks.prefix(n) for n in range(1, 6)}
    q = draw(2, 11, 8)
    compiled = torch.compile(lambda q, mask: attend(q, q, q, mask=mask), fullgraph=True, backend="eager")
    for n in (1, 2, 3, 1, 4, 1):  # the fourth is in the place of the second, as the first was used since
        torch.testing.assert_close(compiled(q, made[n]), attend(q, q, q, mask=made[n]))
        assert len(recipes._known) <= 3
    with pytest.raises(RuntimeError, match=r"while 3 others did.*torch\._dynamo\.reset"):
        compiled(q, made[2])
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(q, made[2]), attend(q, q, q, mask=made[2]))


def test_inductor_takes_it():
    def function(q, k, v):
        return attend(q, k, v, causal=True, sinks=SLOPES, layout="blhd", return_lse=True)

    arrays = [x.transpose(1, 2).contiguous().requires_grad_() for x in (Q, K, V)]
    compiled = torch.compile(function, fullgraph=True)(*arrays)
    for found, wanted in zip(compiled, function(*arrays), strict=True):
        torch.testing.assert_close(found, wanted)
        grads = (
            torch.autograd.grad(x, arrays, torch.ones_like(x), retain_graph=True) for x in (found, wanted)
        )
        torch.testing.assert_close(*grads)


RELATIVES = {
    "weights": lambda q: aa.attention_weights(q, q, mask=masks.prefix(3), rows=[1, 2]),
    "statistics": lambda q: aa.attention_stats(q, q, causal=True, stats=("entropy", "max"))["max"],
    "linear attention": lambda q: aa.linear_attention(q, q, q, rule="gated", decay=-q[..., 0].abs()),
    "rope": lambda q: aa.rope(q, 3, scaling={"rope_type": "linear", "factor": 2.0}),
    "merge": lambda q: aa.merge([q, q], [q[..., 0], q[..., 1]])[0],
}


@pytest.mark.parametrize("function", RELATIVES.values(), ids=RELATIVES)
def test_relatives_are_compiled_too(function):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(Q), function(Q))


WRONG = {
    "layout": (lambda q: attend(q, q, q, layout="bhdl"), "layout: wanted 'bhld' or 'blhd', got 'bhdl'"),
    "flag": (lambda q: attend(q, q, q, causal=1), "causal: wanted True or False, got 1"),
    "softcap": (lambda q: attend(q, q, q, softcap=0), "softcap: wanted a positive number, got 0"),
    "seed": (lambda q: attend(q, q, q, dropout_seed=0.5), "dropout_seed: wanted"),
    "dtype": (lambda q: attend(q.int(), q.int(), q.int()), "q: wanted dtype float16, bfloat16, float32"),
    "rank": (
        lambda q: attend(q[0], q[0], q[0], mask=torch.ones(1, 1, 9, 9, dtype=torch.bool)),
        "mask: wanted 2 axes (9, 9) or all 3 axes (4, 9, 9), got shape (1, 1, 9, 9)",
    ),
    "shape": (
        lambda q: attend(q, q, q, mask=torch.ones(9, 7, dtype=torch.bool)),
        "mask: wanted a shape that broadcasts to (2, 4, 9, 9), got (9, 7)",
    ),
    "name": (lambda q: attend(q, q, q, windows=(1, 1)), "windows"),
    "batch": (lambda q: attend(q, k := torch.cat((q, q))[1:], k), "q, k, v: batch axes do not broadcast"),
}


class TestErrors:
    """What is wrong is said in anyattn's words, when the function is compiled or when it runs."""

    def message(self, function, *arrays):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            torch.compile(function, fullgraph=True, backend="aot_eager")(*arrays)
        return str(caught.value)

    def test_of_values(self):
        found = self.message(lambda q: attend(q, q, q, softcap=-1.0), Q)
        assert "softcap: wanted a positive number, got -1.0" in found

    def test_of_shapes(self):
        found = self.message(lambda q, k: attend(q, k, k, window=(1, 1)), Q, draw(2, 3, 9, 8))
        assert "k: wanted a number of heads that divides q's 4, got 3" in found

    def test_of_dtypes(self):
        found = self.message(lambda q, k: attend(q, k, k, softcap=1.0), Q, Q.int())
        assert "k: wanted dtype float16, bfloat16, float32, float64, got torch.int32" in found

    def test_of_values_that_are_missing(self):
        found = self.message(lambda q: attend(q, q, None, bias=torch.zeros(2, 4, 9, 9)), Q)
        assert "v: wanted an array, got NoneType" in found

    def test_of_names(self):
        found = self.message(lambda q: attend(q, q, q, windows=(1, 1)), Q)
        assert "windows" in found

    def test_of_a_backend_that_refuses(self):
        found = self.message(lambda q: attend(q, q, q, softcap=1.0, backend="cupy"), Q)
        assert "cupy" in found

    def test_of_parts_of_arrays(self):
        found = self.message(lambda q: attend(q, q, q, score_mod=lambda s, b, h, i, j: s + TABLE[h, :][j]), Q)
        assert "index every axis of a captured tensor" in found

    def test_of_a_mask_that_was_made_before_and_is_inverted_inside(self):
        found = self.message(lambda q: attend(q, q, q, mask=~BEFORE), Q)
        assert "builtin `invert` with argument types ['Mask']" in found

    def test_of_functions(self):
        found = self.message(lambda q: attend(q, q, q, score_mod=lambda s, b, h, i, j: torch.erf(s)), Q)
        assert "torch.erf is not known in a traced function" in found

    @pytest.mark.parametrize(
        "transformed",
        [
            lambda f, x: torch.func.vmap(f)(x),
            lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
            lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
        ],
        ids=["vmap", "grad", "jvp"],
    )
    def test_of_transforms_inside(self, transformed):
        found = self.message(lambda q: transformed(lambda x: attend(x, x, x, softcap=2.0), q), Q)
        assert "attention: a compiled function has no transform of torch.func" in found

    @pytest.mark.parametrize(("function", "message"), WRONG.values(), ids=WRONG)
    def test_where_sizes_are_open(self, function, message):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)(Q)
        assert message in str(caught.value)


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_order_that_torch_does_not_head_is_kept(dynamic):
    compiled = torch.compile(lambda q: attend(q, q, q), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with aa.use(order=("reference",)), recording() as records:
        torch.testing.assert_close(compiled(Q), attend(Q, Q, Q))
    assert [one.backend for one in records] == ["reference", "reference"]


def test_another_backend_is_recorded_operation_by_operation():
    def function(q):
        return attend(q, q, q, window=(3, 0), backend="reference")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(Q), function(Q))


def test_the_operation_is_registered_as_torch_wants_it():
    from anyattn_torch.graph import _attend

    arrays = [x.clone().requires_grad_() for x in (Q, K, V, SLOPES)]
    opcheck(_attend, (arrays, "(('sinks', ('tensor', 3)), ('window', ('tuple', 3, 1)))"))


def test_fake_tensors_get_shapes():
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in (Q, K, V))
        out, lse = aa.attention(q, k, v, kv_lengths=[3, 4], q_offset=0, window=(3, 0), return_lse=True)
        plain = aa.attention(q, k, k, causal=True)
    assert (tuple(out.shape), tuple(lse.shape), lse.dtype) == ((2, 4, 9, 5), (2, 4, 9), torch.float32)
    assert tuple(plain.shape) == (2, 4, 9, 8)


def test_a_module_is_exported():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, causal=True, softcap=3.0)

    exported = torch.export.export(Layer(), (Q, K, V), strict=True)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert "anyattn.attend.default" in targets
    torch.testing.assert_close(exported.module()(Q, K, V), Layer()(Q, K, V))


@pytest.mark.parametrize("options", [{}, {"window": (3, 0)}], ids=["plain", "window"])
def test_a_module_is_exported_with_open_sizes(options):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, **options)

    queries, keys = torch.export.Dim("queries", max=64), torch.export.Dim("keys", max=64)
    shapes = {"q": {2: queries}, "k": {2: keys}, "v": {2: keys}}
    exported = torch.export.export(Layer(), (Q, K, V), strict=True, dynamic_shapes=shapes)
    other = Q[:, :, :5], K[:, :, :8], V[:, :, :8]
    torch.testing.assert_close(exported.module()(*other), Layer()(*other))


class TestCaches:
    """A cache that was filled outside is read as it is; it is not filled inside."""

    @pytest.mark.parametrize("layout", ["bhld", "blhd"])
    def test_is_read_as_it_is(self, layout):
        cache = aa.KVCache(*draw(2, 2, 2, 5, 8), capacity=16)

        def function(q):
            q = q if layout == "bhld" else q.transpose(1, 2)
            return aa.attention(q, cache, causal=True, layout=layout)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch._dynamo.utils.counters.clear()
        q = draw(2, 4, 3, 8).requires_grad_()
        for lengths in ([1, 2], [2, 0], [2, 2]):
            cache.append(*draw(2, 2, 2, 2, 8), lengths=lengths)
            found, wanted = compiled(q), function(q)
            torch.testing.assert_close(found, wanted)
            torch.testing.assert_close(*(torch.autograd.grad(x.sin().sum(), q)[0] for x in (found, wanted)))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    def test_tokens_may_be_added_where_the_graph_may_break(self):
        """Of what adds them nothing is compiled, which took 49 frames and told of each."""
        q, k = draw(2, 4, 1, 8), draw(2, 4, 1, 8)
        caches = [aa.KVCache(CACHE.k, CACHE.v) for _ in range(2)]

        def step(cache):
            cache.append(k, k)
            return aa.attention(q, cache)

        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(lambda: step(caches[0]), backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(), step(caches[1]))
        assert torch._dynamo.utils.counters["frames"]["total"] <= 6

    def test_what_counts_keys_counts_tokens_and_not_the_room(self):
        """Another number of tokens compiles once more at most."""
        q, (k, v) = draw(1, 4, 1, 8), draw(2, 1, 2, 37, 8)
        mask = aa.masks.random_blocks(2, 8, 1)
        cache = aa.KVCache(k[:, :, :30], v[:, :, :30], capacity=64)
        function = torch.compile(lambda: aa.attention(q, cache, mask=mask), fullgraph=True, backend="eager")
        torch._dynamo.utils.counters.clear()
        for n in range(30, 37):
            cache.append(k[:, :, n : n + 1], v[:, :, n : n + 1])
            wanted = aa.attention(q, k[:, :, : n + 1], v[:, :, : n + 1], mask=mask)
            torch.testing.assert_close(function(), wanted)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (
                lambda q: aa.attention(q, aa.KVCache(q, q)),
                "a cache counts its tokens on the host; add them outside of the compiled function",
            ),
            (
                lambda q: aa.attention(q, RING),
                "a compiled function attends to a KVCache without a window in the dtype of q",
            ),
            (lambda q: aa.attention(q, CACHE, kv_lengths=3), "kv_lengths: wanted None with a cache"),
            (lambda q: aa.attention(q, CACHE, q), "v: wanted None where k is a cache"),
            (lambda q: aa.pack(q, [3, 3]), "lengths are sizes of the result; pack outside"),
        ],
        ids=["made inside", "ring", "lengths", "values", "pack"],
    )
    def test_what_is_refused_says_what_to_do(self, function, message):
        with pytest.raises(Exception, match=message) as caught:
            torch.compile(function, fullgraph=True, backend="eager")(Q)
        assert "Unsupported" in type(caught.value).__name__
