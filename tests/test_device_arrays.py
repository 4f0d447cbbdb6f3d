"""Calls are described on the device of their arrays, and without reading these: the host would wait for them.

There is no device here: arrays of NumPy pose as CuPy's, in the namespace that array_api_compat makes of CuPy.
No backend is asked, so they do without the memory, streams and kernels that those of `cuda_posing` have.
"""

from __future__ import annotations

from functools import partial, wraps
from types import SimpleNamespace

import array_api_compat.numpy
import numpy as np
import pytest
from array_api_compat.common import _aliases

import anyattn as aa
from anyattn import arrays, layer_rope, planning, varlen
from anyattn.call import AttentionCall
from anyattn.compat.flash_attn import cached
from anyattn.describe import Options, describe
from anyattn.expr.nodes import Load, walk
from anyattn.quantise import quantise
from anyattn.top_blocks import top_blocks


class Device:
    id = 1
    current = False

    def __enter__(self):
        self.current = True

    def __exit__(self, *error):
        self.current = False


DEVICE = Device()
# Functions that compute nothing.
VIEWS = {"broadcast_to", "expand_dims", "moveaxis", "reshape", "swapaxes", "transpose"}


class ndarray(np.ndarray):  # noqa: N801 - arrays are told by the names of their types
    """An array that lies on a device which is not current, and whose values nobody may ask for."""

    device = DEVICE

    def _refuse(self, *_):
        raise AssertionError("the host asked for values of a device")

    __int__ = __bool__ = __float__ = __index__ = item = tolist = get = __array__ = _refuse

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        assert DEVICE.current, f"{ufunc.__name__} was computed on another device"
        plain = [_plain(x) for x in inputs]
        if "out" in options:
            options["out"] = tuple(map(_plain, options["out"]))
        return _posed(getattr(ufunc, method)(*plain, **options))

    def __array_function__(self, function, types, args, options):
        name = function.__name__
        assert DEVICE.current or name in VIEWS, f"{name} was computed on another device"
        return _posed(function(*map(_plain, args), **{name: _plain(x) for name, x in options.items()}))

    def __getitem__(self, key):
        if isinstance(key, np.ndarray) and key.dtype == bool:
            self._refuse()
        return _posed(np.asarray(_plain(self))[key])

    def __setitem__(self, key, value):
        if isinstance(key, np.ndarray) and key.dtype == bool:
            self._refuse()
        _plain(self)[key] = _plain(value)

    def astype(self, *args, **options):
        assert DEVICE.current, "astype was computed on another device"
        return _posed(_plain(self).astype(*args, **options))

    def clip(self, low, high):
        assert DEVICE.current, "clip was computed on another device"
        return _posed(_plain(self).clip(low, high))


ndarray.__module__ = "cupy"


def _plain(x):
    if isinstance(x, (list, tuple)):
        return type(x)(map(_plain, x))
    return x.view(np.ndarray) if isinstance(x, ndarray) else x


def _posed(x):
    return np.asarray(x).view(ndarray) if isinstance(x, (np.ndarray, np.generic)) else x


def _made(function):
    @wraps(function)
    def posed(*args, device=None, **options):
        return _posed(function(*map(_plain, args), **options))

    return posed


@pytest.fixture(autouse=True)
def xp(monkeypatch):
    """The namespace of the arrays above, with the `clip` that array_api_compat gives CuPy."""
    names = "arange", "asarray", "empty", "full"
    made = {name: _made(getattr(array_api_compat.numpy, name)) for name in names}
    found = SimpleNamespace(**{**vars(array_api_compat.numpy), **made})
    found.clip = partial(_aliases.clip, xp=found)
    kinds = {"integral": np.dtype("int64")}
    found.__array_namespace_info__ = lambda: SimpleNamespace(default_dtypes=lambda device: kinds)
    monkeypatch.setattr(_aliases, "array_namespace", lambda *_: found)
    monkeypatch.setattr(arrays, "namespace", lambda x: found)
    monkeypatch.setattr(arrays, "device", lambda x: DEVICE)
    return found


def array(values, dtype):
    return np.asarray(values, dtype=dtype).view(ndarray)


def described(options, q_len=1, operation="attention") -> AttentionCall:
    q, k = (array(np.zeros((2, 2, length, 8)), "f4") for length in (q_len, 20))
    return describe(operation, q, k, k if operation == "attention" else None, Options(**options))


@pytest.mark.parametrize("dtype", ["i4", "i8", "u1"])
def test_lengths_are_held_within_the_keys(dtype):
    most = 255 if dtype == "u1" else 21
    call = described({"kv_lengths": array([7, most], dtype), "causal": True})
    assert _plain(call.kv_lengths).tolist() == [7, 20]
    assert _plain(call.offset).tolist() == [6, 19]
    assert call.lengths_host is None
    if dtype != "u1":
        assert _plain(described({"kv_lengths": array([-3, 2], dtype)}).kv_lengths).tolist() == [0, 2]


def test_rows_are_held_within_the_queries():
    call = described({"rows": array([-1, 0, 9], "i8")}, 5, "weights")
    assert _plain(call.rows).tolist() == [0, 0, 4]


@pytest.mark.parametrize(
    "options",
    [
        {"q_offset": array([6, 19], "i4"), "causal": True},
        {"sinks": array([0, 1], "f2")},
        {"dropout": 0.5, "dropout_seed": array(3, "i8")},
        {"bias": array(np.zeros((1, 20)), "f2")},
        {"mask": aa.masks.documents(array(np.arange(20), "i8")), "q_offset": 0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_nothing_is_read(options):
    call = described(options)
    assert call.library == "cupy"


def test_feeds_of_plans(xp):
    call = described({"kv_lengths": array([7, 20], "i4"), "causal": True, "sinks": array([0, 1], "f2")})
    given = {"kv_lengths": [array([-1, 99], "i4")], "sinks": [array([2, 3], "f2")]}
    options = (None,) * len(planning.ARGUMENTS)
    known = SimpleNamespace(given=given, key=(None, None, None, options))
    feeds = planning._feeds(known, call, None)
    others = []
    for feed in feeds:
        others.append(feed(given, others, 20))
    assert [_plain(x).tolist() for x in others] == [[0, 20], [-1, 19], [2, 3]]
    assert [x.dtype.name for x in others] == ["int64", "int64", "float32"]


def _tables(root):
    loads = [node for node in walk(root) if isinstance(node, Load)]
    return {node.table.label: _plain(node.table.value).tolist() for node in loads}


def test_blocks_are_chosen_on_their_device():
    x = array([[[1], [1], [2], [2], [3]]], "f4")
    assert _plain(top_blocks(x, x, 2, 2)).tolist() == [[[False, True, True]] * 3]
    seen = [[True, False, False], [True, True, False], [False, True, True]]
    assert _plain(top_blocks(x, x, 2, 2, causal=True)).tolist() == [seen]


def test_packed_sequences():
    q, cu_seqlens = array(np.zeros((6, 2, 8)), "f4"), array([0, 2, 6], "i4")
    given = {"causal": True, "window": None, "mask": None, "score_mod": None}
    found = varlen.packed_options(q, q, q, cu_seqlens, cu_seqlens, **given)
    assert _tables(found["mask"].expr) == {
        "sequence of each query": [0, 0, 1, 1, 1, 1],
        "sequence of each key": [0, 0, 1, 1, 1, 1],
        "position of each query": [0, 0, -2, -2, -2, -2],
        "start of each key's sequence": [0, 0, 2, 2, 2, 2],
    }


def test_positions_of_a_layer():
    x, kv = (array(np.zeros((2, 3, length, 8)), "f4") for length in (1, 20))
    at = layer_rope.default_positions(x, kv, {"kv_lengths": array([7, 99], "i4")})
    assert _plain(at).tolist() == [[6], [19]]
    at = layer_rope.default_positions(kv, None, {"q_offset": array([6, 0], "i4")})
    assert _plain(at)[:, -1].tolist() == [25, 19]


def test_caches_of_flash_attn(monkeypatch):
    monkeypatch.setattr(cached, "attention", lambda q, cache, **options: cache.lookup())
    q, k = array(np.zeros((2, 1, 2, 8)), "f4"), array(np.ones((2, 1, 2, 8)), "f4")
    pool = array(np.zeros((6, 4, 2, 8)), "f4")
    lengths, table = array([3, 4], "i4"), array([[1, 5], [2, 0]], "i4")
    options = {"cache_seqlens": lengths, "cache_leftpad": lengths, "block_table": table}
    found = cached.flash_attn_with_kvcache(q, pool, pool, k, k, **options)
    assert _plain(found.lengths).tolist() == [4, 5]
    written = np.argwhere(_plain(pool)[:, :, 0, 0])
    assert written.tolist() == [[0, 0], [1, 3]]
    assert _tables(found.visible)["pages"] == [[-1, 0, -1, -1, -1, -1], [1, -1, 0, -1, -1, -1]]


def test_rows_of_a_cache_are_rounded():
    whole, scales = quantise(array([[1.0, -3.0, 0.2]], "f4"))
    assert _plain(whole).tolist() == [[42, -127, 8]]
    assert _plain(scales)[0, 0] == np.float32(3 / 127)
