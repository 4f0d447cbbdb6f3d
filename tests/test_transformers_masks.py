"""What transformers says of masks, and what `anyattn.attention` is told of it."""

from __future__ import annotations

import re
import sys

import pytest

import anyattn

torch = pytest.importorskip("torch", reason="torch not installed")
transformers = pytest.importorskip("transformers", reason="transformers not installed")

from anyattn.compat.transformers import register  # noqa: E402
from anyattn.compat.transformers.forward import attention_forward  # noqa: E402
from anyattn.compat.transformers.seen import seen_keys  # noqa: E402

hf = transformers.masking_utils
B, L = 2, 9
KEPT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]]).bool()
HOLE = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1]]).bool()
EMPTY = torch.tensor([[0] * 9, [1] * 9]).bool()
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
GROUPS = torch.tensor([[-1, -1, -1, 0, 0, 0, -1, 1, 1], [-1] * 9])
STARTS = torch.tensor([3, 0])


def packed(function):
    ids = hf.find_packed_sequence_indices(POSITIONS)
    return hf.packed_sequence_compatibility_function(function, POSITIONS, ids)


def user(b, h, i, j):
    return torch.where(i > 3, j % 2 == 0, 5 - j > 0) | ~torch.logical_or(j != i, i < 2)


def window(size):
    return {"mask_function": hf.sliding_window_causal_mask_function(size), "local_size": size}


def both_ways(size):
    return {"mask_function": hf.sliding_window_bidirectional_mask_function(size), "local_size": size}


def chunks(size):
    return {"mask_function": hf.chunked_causal_mask_function(size, STARTS), "local_size": size}


# Arguments of transformers, and the options that say the same; "mask" stands for some expression.
CASES = {
    "causal": ({}, {"causal": True}),
    "all kept": ({"attention_mask": KEPT | True}, {"causal": True}),
    "padding on both sides": ({"attention_mask": KEPT}, {"causal": True, "mask": ..., "kv_lengths": [9, 7]}),
    "padding right": ({"attention_mask": KEPT | ~KEPT[:1]}, {"causal": True, "kv_lengths": [9, 7]}),
    "a hole": ({"attention_mask": HOLE}, {"causal": True, "mask": ...}),
    "nothing kept": ({"attention_mask": EMPTY}, {"causal": True, "kv_lengths": [0, 9]}),
    "both ways": ({"mask_function": hf.bidirectional_mask_function}, {}),
    "window": (window(3), {"causal": True, "window": (2, None)}),
    "window of all keys": (window(9), {"causal": True}),
    "window of all keys but one": (window(8), {"causal": True, "window": (7, None)}),
    "window of what follows": (
        both_ways(7) | {"q_length": 1, "attention_mask": KEPT | True},
        {"window": (7, 7)},
    ),
    "window both ways": (both_ways(2), {"window": (2, 2)}),
    "chunks": (
        chunks(4) | {"attention_mask": KEPT[:, :6]},
        {"causal": True, "mask": ..., "kv_lengths": [6, 6]},
    ),
    "a user's function": (
        {"mask_function": hf.and_masks(hf.causal_mask_function, user)},
        {"causal": True, "mask": ...},
    ),
    "one token": ({"q_length": 1, "q_offset": 8}, {}),
    "one token, padding left": (
        {"q_length": 1, "q_offset": 8, "attention_mask": KEPT | KEPT[:1]},
        {"mask": ...},
    ),
    "two tokens": ({"q_length": 2, "q_offset": 7}, {"causal": True}),
    "part of a prompt": ({"q_length": 3, "q_offset": 6}, {"causal": True}),
    "a static cache": (
        {"q_length": 3, "kv_length": 12, "q_offset": torch.tensor(6), "attention_mask": KEPT},
        {"causal": True, "mask": ..., "kv_lengths": [9, 7]},
    ),
    "a window's cache": (
        window(4) | {"q_length": 3, "kv_length": 6, "q_offset": 6, "kv_offset": 3, "attention_mask": KEPT},
        {"causal": True, "window": (3, None), "kv_lengths": [6, 4]},
    ),
    "a window's cache, one token": (
        window(4) | {"q_length": 1, "kv_length": 4, "q_offset": 8, "kv_offset": 5},
        {},
    ),
    "a chunk's cache": (
        chunks(4) | {"q_length": 3, "kv_length": 6, "q_offset": 6, "kv_offset": 3},
        {"causal": True, "mask": ...},
    ),
}
if hasattr(hf, "packed_sequence_compatibility_function"):  # not in transformers 5.18
    CASES["packed"] = ({"mask_function": packed(hf.causal_mask_function)}, {"mask": ...})
    CASES["packed windows"] = ({"mask_function": packed(window(2)["mask_function"])}, {"mask": ...})
if hasattr(hf, "blockwise_overlay"):  # not in transformers 5.4
    groups = hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(GROUPS))
    CASES["groups"] = ({"mask_function": groups}, {"mask": ...})


@pytest.mark.parametrize("name", CASES)
def test_options_say_what_transformers_says(name):
    arguments, wanted = CASES[name]
    arguments = {"batch_size": B, "q_length": L, "kv_length": L} | arguments
    seen = seen_keys(**arguments)
    options = dict(seen.options)
    first = int(arguments.get("q_offset", 0)) - arguments.get("kv_offset", 0)
    assert options.pop("q_offset") == first
    assert options.keys() == wanted.keys()
    for option in wanted.keys() - {"mask"}:
        found = options[option]
        assert (found.tolist() if option == "kv_lengths" else found) == wanted[option]
    # The constants that `and_masks` and `or_masks` begin with are gone.
    assert not re.search("True|False", repr(options.get("mask")))
    arguments.pop("local_size", None)
    dense = hf.sdpa_mask(**arguments, allow_is_causal_skip=False)
    q, k = (torch.zeros((B, 1, arguments[n], 1)) for n in ("q_length", "kv_length"))
    weights = anyattn.attention_weights(q, k, backend="reference", **seen.options)
    assert torch.equal(weights > 0, dense)
    assert torch.equal(seen.view(-1) == 0, dense.reshape(-1))


def test_to_models_a_mask_is_that_of_eager():
    dtype = torch.bfloat16
    seen, dense = seen_keys(B, L, L, dtype=dtype), hf.eager_mask(B, L, L, dtype=dtype)
    assert (seen.shape, seen.dtype, seen.device.type) == (dense.shape, dtype, "cpu")
    assert torch.equal(seen[:, :, 2:5], dense[:, :, 2:5])
    assert torch.equal(torch.ones((B, 4, L, L)) + seen, torch.ones((B, 4, L, L)) + dense)
    assert "SeenKeys" in str(seen)


def test_a_function_that_cannot_be_traced_is_evaluated():
    def branches(b, h, i, j):
        return j <= i if bool((i >= 0).all()) else j < 0

    with pytest.warns(UserWarning, match="evaluated at all 9 x 9 pairs"):
        seen = seen_keys(B, L, L, mask_function=branches, attention_mask=KEPT)
    q = torch.zeros((B, 1, L, 1))
    weights = anyattn.attention_weights(q, q, backend="reference", **seen.options)
    assert torch.equal(weights > 0, hf.sdpa_mask(B, L, L, attention_mask=KEPT, allow_is_causal_skip=False))


def test_a_row_of_a_static_cache_on_a_device_is_computed_there():
    seen = seen_keys(B, 1, 12, q_offset=torch.tensor(6, device="meta"), device="meta")
    assert type(seen) is torch.Tensor
    assert (seen.shape, seen.device.type) == ((B, 1, 1, 12), "meta")


class Layer(torch.nn.Module):
    is_causal = True


def attend(mask=None, q_length=5, kv_length=5, **options):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn((B, 4, q_length, 3), generator=generator)
    k, v = (torch.randn((B, 2, kv_length, 3), generator=generator) for _ in range(2))
    return (q, k, v), attention_forward(Layer(), q, k, v, mask, **options)


def test_without_a_mask_the_layer_says_what_is_causal():
    (q, k, v), (out, weights) = attend()
    assert weights is None
    assert out.is_contiguous()
    assert torch.equal(out, anyattn.attention(q, k, v, causal=True).transpose(1, 2))
    (q, k, v), (out, _) = attend(is_causal=False, kv_length=7)
    assert torch.equal(out, anyattn.attention(q, k, v).transpose(1, 2))
    (q, k, v), (out, _) = attend(q_length=1)
    assert torch.equal(out, anyattn.attention(q, k, v).transpose(1, 2))
    with pytest.raises(ValueError, match="Layer is causal and gave none for 5 queries and 7 keys"):
        attend(kv_length=7)


def test_masks_of_the_user():
    seen = torch.rand((B, 1, 5, 5), generator=torch.Generator().manual_seed(2)) < 0.7
    added = torch.where(seen, 0.5, torch.finfo(torch.float32).min)
    bias = torch.randn((1, 4, 5, 5), generator=torch.Generator().manual_seed(3))
    scores = {"softcap": 2.0, "scaling": 1.5}
    (q, k, v), (out, weights) = attend(seen, position_bias=bias, output_attentions=True, **scores)
    options = dict(mask=seen, bias=bias, softcap=2.0, scale=1.5)
    assert torch.allclose(out, anyattn.attention(q, k, v, **options).transpose(1, 2), atol=1e-6)
    assert torch.allclose(weights, anyattn.attention_weights(q, k, **options), atol=1e-6)
    _, (out, _) = attend(added, position_bias=bias - 0.5, **scores)
    assert torch.allclose(out, anyattn.attention(q, k, v, **options).transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dropout": 1.0}, ValueError, "dropout: wanted a probability"),
        ({"cache": object()}, NotImplementedError, "cache: continuous batching"),
        ({"indices": object()}, NotImplementedError, "indices: keys chosen by an indexer"),
        ({"block_indices": object()}, NotImplementedError, "block_indices: "),
        ({"sinks": object()}, NotImplementedError, "sinks: sinks that differ"),
        (
            {"mask": torch.ones(B, 1, 5, 5, dtype=torch.int64)},
            TypeError,
            "attention_mask: wanted booleans or",
        ),
        ({"mask": seen_keys(B, 5, 6)}, ValueError, r"wanted 5 rows and 5 keys, got .* \(2, 1, 5, 6\)"),
    ],
)
def test_what_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        attend(**options)


def test_a_mask_of_three_axes_is_no_padding():
    with pytest.raises(
        ValueError, match=r"attention_mask: wanted shape \(batch, tokens\), or .* got \(2, 5, 5\)"
    ):
        seen_keys(B, 5, 5, attention_mask=torch.ones(B, 5, 5, dtype=torch.bool).tril())


def test_autocast_counts():
    with torch.autocast("cpu", torch.bfloat16):
        (q, k, v), (out, _) = attend()
    assert out.dtype == torch.bfloat16
    halves = (x.bfloat16() for x in (q, k, v))
    assert torch.equal(out, anyattn.attention(*halves, causal=True).transpose(1, 2))


@pytest.mark.parametrize("version", ["4.57.6", "5.3.0", "6.0.0", "unknown"])
def test_versions(monkeypatch, version):
    # transformers puts another module in its own place when a model is first imported.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError, match=rf"wanted transformers >= 5.4 and < 6, got {version}"):
        register()


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        register()


def test_dropout_is_repeated_by_the_seed_of_torch():
    torch.manual_seed(5)
    (q, k, v), (out, weights) = attend(dropout=0.3, output_attentions=True)
    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, ())
    wanted = anyattn.attention(q, k, v, causal=True, dropout=0.3, dropout_seed=seed)
    assert torch.equal(out, wanted.transpose(1, 2))
    assert torch.allclose(weights, anyattn.attention_weights(q, k, causal=True), atol=1e-6)
