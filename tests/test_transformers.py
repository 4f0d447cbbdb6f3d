"""Models of Hugging Face transformers under `attn_implementation="anyattn"` against their own `eager`."""

from __future__ import annotations

import contextlib
import copy
import functools
from pathlib import Path

import pytest
from transformers_models import LENGTH, MODELS, UNASKED, VOCABULARY, table

import anyattn
from anyattn import dispatch

torch = pytest.importorskip("torch", reason="torch not installed")
transformers = pytest.importorskip("transformers", reason="transformers not installed")

PADDING = {"none": (0, 0), "left": (5, 0), "right": (0, 5)}
NEW_TOKENS = 8


@pytest.fixture(autouse=True, scope="module")
def registered():
    from anyattn.compat.transformers import register

    register()
    # Every configuration made here is explained in its log.
    transformers.logging.set_verbosity_error()


def named(name):
    return next(model for model in MODELS if model.name == name)


@functools.cache
def pair(model):
    """The same weights under eager and under anyattn, large enough that attention is far from uniform."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < model.since:
        pytest.skip(f"{model.name} of transformers {transformers.__version__} computes attention itself")
    config = getattr(transformers, model.config)(**model.options)
    kind = getattr(transformers, model.model)
    torch.manual_seed(3)
    eager = kind._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (parameter.ndim == 1 and parameter == 1))
    ours = kind._from_config(copy.deepcopy(config), attn_implementation="anyattn").eval()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def backend_of(records):
    """The one backend that ran."""
    (name,) = {record.backend for record in records}
    return name


def first(*names):
    """The first installed backend that takes a small call."""
    return next(name for name in names if anyattn.backends()[name].available)


def inputs_of(model, side="none", length=LENGTH):
    """Arguments of a forward pass of two sequences, one padded, and which of its rows count."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(3, VOCABULARY, (2, length), generator=generator)
    if model.inputs == "image":
        return {"pixel_values": torch.randn((2, 3, 12, 12), generator=generator)}, None
    if model.inputs == "speech":
        speech = torch.randn((2, 6, 22), generator=generator)
        return {"input_features": speech, "decoder_input_ids": tokens}, None
    left, right = PADDING[side]
    kept = torch.ones((2, length), dtype=torch.long)
    kept[0, :left] = 0
    kept[0, length - right :] = 0
    given = {"input_ids": tokens * kept, "attention_mask": kept}
    if model.kind == "both":
        return given | {"decoder_input_ids": tokens.flip(1)[:, :9]}, None
    return given, kept.bool()


@contextlib.contextmanager
def no_mask_is_computed():
    """Fails where the entries of a mask are asked for, L * L of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.masking_utils, "sdpa_mask", lambda **_: pytest.fail("a mask was computed"))
        yield


def close(found, wanted, tolerance, size=0.0):
    """Equal but for a share of the largest number, or of `size` where that is larger."""
    assert found.shape == wanted.shape
    error, size = (found - wanted).abs().max().item(), max(size, wanted.abs().max().item())
    assert error <= tolerance * size, f"differs by {error:.2e} where numbers are up to {size:.2e}"


@pytest.mark.parametrize(
    ("model", "side"),
    [(m, side) for m in MODELS for side in PADDING if side == "none" or "padding" in m.checks],
    ids=lambda value: getattr(value, "name", value),
)
def test_logits(model, side):
    eager, ours = pair(model)
    given, counts = inputs_of(model, side)
    with torch.no_grad():
        wanted = eager(**given).logits
        with no_mask_is_computed(), dispatch.recording() as records:
            found = ours(**given).logits
    assert len(records) == model.attentions
    assert backend_of(records) == first("numba", "torch", "reference")
    if counts is not None:
        found, wanted = found[counts], wanted[counts]
    close(found, wanted, 1e-5)


@pytest.mark.parametrize("model", [m for m in MODELS if m.kind != "encoder"], ids=lambda m: m.name)
def test_greedy_generation(model):
    """From a left-padded prompt, long enough that windows and chunks cut and their caches wrap around."""
    eager, ours = pair(model)
    given, _ = inputs_of(model, "left")
    given.pop("decoder_input_ids", None)
    options = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    wanted = eager.generate(**given, **options)
    with no_mask_is_computed(), dispatch.recording() as records:
        found = ours.generate(**given, **options)
    assert torch.equal(found, wanted)
    encoder, decoder = (2, 4) if model.kind == "both" else (0, 2)
    assert len(records) == encoder + decoder * NEW_TOKENS
    assert backend_of(records) == first("numba", "torch", "reference")


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}], ids=str
)
@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_other_ways_to_generate(name, options):
    model = named(name)
    eager, ours = pair(model)
    given, _ = inputs_of(model, "left")
    options = dict(options, max_new_tokens=NEW_TOKENS, do_sample=False)
    wanted = eager.generate(**given, **options)
    with no_mask_is_computed(), dispatch.recording() as records:
        found = ours.generate(**given, **options)
    assert len(records) == 2 * NEW_TOKENS
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["Mistral", "Gemma 3", "Llama 4"])
def test_a_prompt_in_parts(name):
    """Several rows over a cache that has wrapped around already, one sequence of two padded."""
    given, counts = inputs_of(named(name), "left")
    found = []
    for made in pair(named(name)):
        cache = transformers.DynamicCache(config=made.config)
        parts = []
        for start, stop in ((0, 7), (7, 8), (8, LENGTH)):
            part = {"input_ids": given["input_ids"][:, start:stop], "past_key_values": cache}
            with torch.no_grad():
                parts.append(made(**part, attention_mask=given["attention_mask"][:, :stop]).logits)
        found.append(torch.cat(parts, 1)[counts])
    close(found[1], found[0], 1e-5)


def test_packed_sequences():
    """Three in one row, told apart by their positions, give what each gives alone."""
    _, ours = pair(named("Mistral"))
    tokens = inputs_of(named("Mistral"))[0]["input_ids"][:1]
    parts = (slice(0, 7), slice(7, 9), slice(9, LENGTH))
    positions = torch.cat([torch.arange(p.stop - p.start) for p in parts])[None]
    with torch.no_grad(), no_mask_is_computed():
        found = ours(tokens, position_ids=positions, use_cache=False).logits
        alone = torch.cat([ours(tokens[:, p], use_cache=False).logits for p in parts], 1)
    close(found, alone, 1e-5)


@pytest.mark.parametrize("name", ["T5", "GPT-OSS", "Gemma 2"])
def test_attention_weights(name):
    given, _ = inputs_of(named(name))
    with torch.no_grad():
        wanted, found = (made(**given, output_attentions=True) for made in pair(named(name)))
    kinds = [key for key in wanted if key.endswith("attentions")]
    assert len(kinds) == (3 if name == "T5" else 1)
    for kind in kinds:
        assert len(found[kind]) == len(wanted[kind]) == 2
        for ours, theirs in zip(found[kind], wanted[kind], strict=True):
            close(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    ("model", "side"),
    [(m, side) for m in MODELS for side in (("left", "right") if "padding" in m.checks else ("none",))],
    ids=lambda value: getattr(value, "name", value),
)
def test_gradients(model, side):
    """With one sequence of two padded, whose rows of padding count for nothing."""
    eager, ours = (copy.deepcopy(m).train() for m in pair(model))
    for module in (*eager.modules(), *ours.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    given, counts = inputs_of(model, side)
    logits = eager(**given).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    if counts is not None:
        weights = weights * counts[..., None]
    (logits * weights).mean().backward()
    with dispatch.recording() as records:
        (ours(**given).logits * weights).mean().backward()
    assert len(records) == model.attentions
    assert "numba" not in {record.backend for record in records}
    wanted = dict(eager.named_parameters())
    # The gradients of biases of keys are 0 but for rounding: a row's softmax does not feel them.
    usual = max(p.grad.abs().max().item() for p in eager.parameters() if p.grad is not None) / 100
    for name, parameter in ours.named_parameters():
        if wanted[name].grad is None:
            assert parameter.grad is None, name
            continue
        assert torch.isfinite(parameter.grad).all(), name
        close(parameter.grad, wanted[name].grad, 1e-4, usual)


def test_the_usual_loss_of_left_padding_is_that_of_sdpa():
    """The last row of padding, of which eager gives the mean of all values, predicts the first token."""
    eager, ours = pair(named("Llama"))
    sdpa = type(eager)._from_config(copy.deepcopy(eager.config), attn_implementation="sdpa").eval()
    sdpa.load_state_dict(eager.state_dict())
    given, counts = inputs_of(named("Llama"), "left")
    labels = given["input_ids"].masked_fill(~counts, -100)

    def losses(labels):
        with torch.no_grad():
            return [made(**given, labels=labels).loss.item() for made in (eager, sdpa, ours)]

    by_eager, by_sdpa, found = losses(labels)
    assert found == pytest.approx(by_sdpa, rel=1e-5)
    assert abs(found - by_eager) > 1e-3
    labels[torch.arange(2), counts.int().argmax(1)] = -100
    by_eager, *others = losses(labels)
    assert others == pytest.approx([by_eager] * 2, rel=1e-5)


def test_compiled_without_a_break():
    eager, ours = pair(named("Llama"))
    given, counts = inputs_of(named("Llama"), "left")
    with torch.no_grad():
        wanted = eager(**given).logits
        with dispatch.recording() as records:
            found = torch.compile(ours, backend="eager", fullgraph=True)(**given).logits
    close(found[counts], wanted[counts], 1e-5)
    assert records


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of DeBERTa
@pytest.mark.parametrize("model", UNASKED, ids=lambda m: m.name)
def test_models_that_do_not_ask(model):
    """Their attention is their own: when one of them begins to ask, it belongs into the table."""
    given, counts = inputs_of(model, "left")
    with torch.no_grad(), dispatch.recording() as records:
        wanted, found = (made(**given)[0] for made in pair(model))
    assert records == []
    close(found[counts], wanted[counts], 1e-5)


def test_the_page_shows_the_table():
    page = Path(__file__).parent.parent / "docs" / "transformers.md"
    assert table() in page.read_text(encoding="utf-8"), "wanted what transformers_models.table() gives"
