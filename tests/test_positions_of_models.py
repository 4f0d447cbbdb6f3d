"""Positions against the code of models that were trained with them, as transformers has it.

Frequencies and Llama's rotation are in `test_rope`, T5's buckets in `test_scores`.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest

import anyattn as aa

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")


def model(name):
    return import_module(f"transformers.models.{name}.modeling_{name}")


def drawn(*shape, seed=0):
    return torch.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def same(found, wanted):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=1e-5, rtol=0)


def added(score, q, k, **options):
    """What `score` adds to the scores of a call, up to a constant a row."""
    both = (
        torch.log(aa.attention_weights(q, k, score_mod=s, **options))
        for s in (score, lambda s, b, h, i, j: s)
    )
    changed, plain = both
    return changed - plain


def up_to_rows(found, wanted):
    """The same for keys that are not later than the row, from which softmax sees differences alone."""
    wanted = wanted.expand(found.shape)
    found, wanted = (x - x[..., :1] for x in (found, wanted))
    lower = torch.ones(found.shape[-2:]).tril().bool()
    np.testing.assert_allclose(found[..., lower], wanted[..., lower], atol=2e-5, rtol=0)


def test_interleaved_and_partial_as_in_gpt_j():
    gptj = model("gptj")
    x = drawn(2, 7, 3, 12)
    sin, cos = gptj.create_sinusoidal_positions(40, 8)[None, 11:18].expand(2, 7, 8).chunk(2, dim=-1)
    wanted = torch.cat([gptj.apply_rotary_pos_emb(x[..., :8], sin, cos), x[..., 8:]], dim=-1)
    same(aa.rope(x, range(11, 18), dims=8, interleaved=True, layout="blhd"), wanted)


def test_partial_halves_as_in_gpt_neox():
    neox = model("gpt_neox")
    config = neox.GPTNeoXConfig(
        hidden_size=48,
        num_attention_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
    )
    q, k = drawn(2, 3, 7, 16), drawn(2, 3, 7, 16, seed=1)
    positions = torch.asarray([[*range(7)], [*range(50, 57)]])
    wanted = neox.apply_rotary_pos_emb(q, k, *neox.GPTNeoXRotaryEmbedding(config)(q, positions))
    for x, right in zip((q, k), wanted, strict=True):
        same(aa.rope(x, positions, dims=4, base=5000.0), right)


def test_rows_and_columns_as_in_sam_2():
    sam = model("sam2_video")
    config = SimpleNamespace(
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0}, memory_attention_hidden_size=16,
        memory_attention_downsample_rate=1, memory_attention_num_attention_heads=2,
    )  # fmt: skip
    place = torch.stack([torch.arange(15) // 5, torch.arange(15) % 5])
    cos, sin = sam.Sam2VideoVisionRotaryEmbedding(config)(drawn(1), place[None])
    q, k = drawn(1, 2, 15, 8), drawn(1, 2, 15, 8, seed=1)
    wanted = sam.apply_rotary_pos_emb_2d(q, k, cos, sin)
    for x, right in zip((q, k), wanted, strict=True):
        same(aa.rope_2d(x, *place, base=10000.0, interleaved=True), right)


def test_relative_positions_of_pixels_as_in_swin():
    height, width, heads = 3, 4, 2
    bias = model("swin").SwinRelativePositionBias(heads, (height, width))
    with torch.no_grad():
        bias.relative_position_bias_table.copy_(drawn((2 * height - 1) * (2 * width - 1), heads))
        wanted = bias()[0]
    table = bias.relative_position_bias_table.detach().T.reshape(heads, 2 * height - 1, 2 * width - 1)
    q = drawn(heads, height * width, 4)
    same(
        aa.attention_weights(q, q, score_mod=aa.scores.relative_bias_2d(table, width)),
        aa.attention_weights(q, q, bias=wanted),
    )


def test_relative_keys_as_in_wav2vec2_bert():
    """Shaw's, with the scale of the scores."""
    reach = 3
    module = SimpleNamespace(
        left_max_position_embeddings=reach, right_max_position_embeddings=reach, scaling=8**-0.5,
        distance_embedding=torch.nn.Embedding(2 * reach + 1, 8),
    )  # fmt: skip
    q, k = drawn(2, 3, 9, 8), drawn(2, 3, 9, 8, seed=1)
    with torch.no_grad():
        _, bias = model("wav2vec2_bert")._apply_relative_key_position_encoding(module, q, k)
    score = aa.scores.relative_keys(q, module.distance_embedding.weight.detach())
    same(aa.attention_weights(q, k, score_mod=score), aa.attention_weights(q, k, bias=bias))


@pytest.mark.parametrize("heads", [8, 12, 3])
def test_alibi_as_in_bloom_and_mpt(heads):
    """Both add slope * j, which softmax cannot tell from -slope * (i - j) at keys that are not later."""
    q = drawn(heads, 10, 4)
    found = added(aa.scores.alibi(heads), q, q)
    bloom = model("bloom").build_alibi_tensor(torch.ones(1, 10), heads, torch.float32)
    up_to_rows(found, bloom)
    up_to_rows(found, model("mpt").build_mpt_alibi_tensor(heads, 10))
