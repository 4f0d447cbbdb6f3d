"""FlexAttention: its mask of blocks from a schedule, and one kernel, compiled on CPU."""

from __future__ import annotations

import shutil
from functools import partial

import pytest

import anyattn as aa
from anyattn import masks
from anyattn.describe import Options, describe
from anyattn.expr.print_torch import torch_functions
from anyattn.expr.program import lower
from anyattn.expr.statements import aligned_slots, aligned_view
from anyattn.schedule import schedule

torch = pytest.importorskip("torch", reason="torch is not installed")

from anyattn_torch import flex, routes  # noqa: E402

if flex._missing():
    pytest.skip(f"FlexAttention {flex._missing()}", allow_module_level=True)

from torch.nn.attention.flex_attention import create_block_mask  # noqa: E402

# torch's compiler imports parts of torch that warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

GENERATOR = torch.Generator().manual_seed(2)
FIELDS = [
    f"{kind}{axis}_{what}"
    for kind in ("", "full_")
    for axis in ("kv", "q")
    for what in ("num_blocks", "indices")
]


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR)


MASKS = {
    "causal": (masks.causal(), 300, 300),
    "band and column": (masks.sliding_window(130) | masks.global_tokens(3), 257, 257),
    "documents": (masks.documents(torch.tensor([0] * 100 + [1] * 150 + [2] * 7)), 257, 257),
    "gathered": (masks.strided(64), 256, 512),
    "by batch entry": (masks.padding([5, 200]), 130, 256),
    "by head": (masks.from_function(lambda b, h, i, j: (h + 1) * 30 > abs(i - j)), 200, 300),
    "by head, an array": (masks.block_sparse(draw(4, 3, 3) > 0, 100), 257, 300),
    "nothing": (masks.prefix(0), 130, 257),
}


@pytest.mark.parametrize(("mask", "q_len", "k_len"), MASKS.values(), ids=MASKS)
def test_blocks_are_those_of_an_evaluation_of_all_pairs(mask, q_len, k_len):
    q, k = torch.zeros(2, 4, q_len, 8), torch.zeros(2, 4, k_len, 8)
    call = describe("attention", q, k, k, Options(mask=mask, q_offset=0))
    program = lower(call.visible, None)
    views = tuple(
        aligned_view(call.xp, x, slot.block, call.batch_shape, 4, q_len, k_len)
        for x, slot in zip(program.aligned, aligned_slots(program), strict=True)
    )
    mask_mod, _ = torch_functions(program, "float32", views, call.offset, q.device)
    plan = schedule(call, 128, 128)
    found = flex.block_mask(plan, mask_mod, q.device)
    wanted = create_block_mask(mask_mod, *plan.groups, q_len, k_len, device="cpu")
    assert found.seq_lengths == wanted.seq_lengths
    for field in FIELDS:
        torch.testing.assert_close(getattr(found, field), getattr(wanted, field), msg=field)


REFUSED = {
    "lengths": ({"kv_lengths": [3, 5]}, "kv_lengths"),
    "sinks": ({"mask": masks.prefix(3), "sinks": [0.0] * 4}, "sinks"),
    "nothing to compile": ({}, "there is none"),
    "lse on CPU": ({"mask": masks.prefix(3), "return_lse": True}, "lse on CPU"),
    "float64": ({"mask": masks.prefix(3), "dtype": torch.float64}, "float32 at most"),
    "gradients on CPU": ({"mask": masks.prefix(3), "gradient": True}, "no backward on CPU"),
}


@pytest.mark.parametrize(("options", "word"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_a_reason(options, word):
    options = dict(options)
    q = torch.zeros(2, 4, 5, 16, dtype=options.pop("dtype", torch.float32))
    q.requires_grad_(options.pop("gradient", False))
    assert word in flex.refusal(describe("attention", q, q, q, Options(**options)))


def test_is_not_taken_on_cpu_unless_it_is_asked_for():
    q = torch.zeros(2, 4, 600, 16)
    call = describe("attention", q, q, q, Options(window=(30, 0)))
    route = routes.choose(call)
    assert route.name == "tiles"
    assert "slower on CPU" in dict(route.passed)["flex"]
    with routes.only("flex"):
        assert routes.choose(call).name == "flex"
        assert any("compiled by torch.compile" in note for note in routes.notes(call))


AS_REFERENCE = {
    "a mask and a score": {
        "mask": masks.documents(torch.arange(140) // 60),
        "score_mod": aa.scores.alibi(4),
        "causal": True,
    },
    "a bias, offsets and rows without keys": {
        "bias": draw(4, 140, 140)[None],
        "q_offset": torch.tensor([-9, 3]),
        "window": (20, 0),
    },
    "softcap": {"softcap": 2.0, "scale": 0.4},
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("options", AS_REFERENCE.values(), ids=AS_REFERENCE)
def test_agrees_with_reference_uncompiled(options, monkeypatch):
    monkeypatch.setattr(flex, "_compiled", lambda kind: torch.nn.attention.flex_attention.flex_attention)
    q, k = draw(2, 4, 140, 16), draw(2, 2, 140, 16)
    found = flex.attend(describe("attention", q, k, k, Options(return_lse=True, **options)))
    wanted = aa.attention(q, k, k, return_lse=True, backend="reference", **options)
    torch.testing.assert_close(found, wanted)


def test_all_that_a_kernel_gets_lies_on_the_device(monkeypatch):
    """Made as for a device without memory, and looked at in place of being compiled."""
    given = {}

    def compiled(kind):
        def attend(q, k, v, **options):
            given.update(options, q=q, k=k, v=v)
            return q.new_empty(*q.shape[:-1], v.shape[-1]), torch.nn.attention.flex_attention.AuxOutput(
                lse=q.new_empty(q.shape[:-1])
            )

        return attend

    monkeypatch.setattr(flex, "_compiled", compiled)
    with torch.device("meta"):
        q, k = torch.empty(2, 4, 600, 16), torch.empty(2, 2, 600, 16)
        options = Options(
            mask=masks.documents(torch.zeros(600, dtype=torch.int64)) | masks.global_tokens([3, 500]),
            window=(70, 0),
            q_offset=torch.zeros(2, dtype=torch.int64),
            bias=torch.empty(1, 4, 600, 600),
            score_mod=aa.scores.alibi([0.5, 0.25, 0.125, 1.0]),
            return_lse=True,
        )
        with torch.device("cpu"):  # where what names no device would go
            out, lse = flex.attend(describe("attention", q, k, k, options))
        mask, score = given["block_mask"], given["score_mod"]
        indices = [torch.zeros(1, dtype=torch.int32) for _ in range(4)]
        results = out, lse, mask.mask_mod(*indices), score(torch.zeros(1), *indices)
    found = [*results, *(given[name] for name in "qkv"), *(getattr(mask, field) for field in FIELDS)]
    for function in (mask.mask_mod, score):
        captured = [cell.cell_contents for cell in function.__closure__]
        captured = [x for part in captured for x in (part if isinstance(part, tuple) else (part,))]
        found += [x for x in captured if isinstance(x, torch.Tensor)]
    assert {x.device.type for x in found} == {"meta"}
    assert len(found) > 20


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_compiled_kernel_agrees_and_serves_other_numbers():
    slopes = draw(4).abs()
    q, k = draw(2, 4, 140, 16), draw(2, 2, 140, 16)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for window in (30, 50):
        options = {"mask": masks.sliding_window(window), "score_mod": aa.scores.alibi(slopes * window)}
        with routes.only("flex"):
            assert aa.explain(q, k, k, backend="torch", **options).notes[0] == "runs on FlexAttention"
            found = aa.attention(q, k, k, backend="torch", **options)
        torch.testing.assert_close(found, aa.attention(q, k, k, backend="reference", **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_more_kinds_than_dynamo_keeps_with_a_function_stay_compiled(monkeypatch):
    """Beyond its limit torch warns, and keeps all scores."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch._dynamo.config.recompile_limit < 10
    for length in [*range(20, 30), 20]:
        q = draw(1, 2, length, 16)
        with routes.only("flex"):
            found = aa.attention(q, q, q, window=(3, 0), backend="torch")
        torch.testing.assert_close(found, aa.attention(q, q, q, window=(3, 0), backend="reference"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 10
    flex._compiled.cache_clear()
