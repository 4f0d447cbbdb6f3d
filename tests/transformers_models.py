"""Small randomly initialised models of transformers, and what is checked of each.

`test_transformers.py` runs the checks; the table of `docs/transformers.md` is what this file prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 61
# A window of 5 cuts in all of them.
LENGTH = 13

_DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
)
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_WIDE = dict(hidden_size=40, head_dim=8)
_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
_HYBRID = dict(head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"])


@dataclass(frozen=True, eq=False)
class Model:
    """A model, by the names of its classes in transformers, and what runs on it.

    `attentions` is how many calls one forward pass makes, `inputs` what it takes: "tokens", "image" or
    "speech". A "decoder" continues its input, an "encoder" does not, "both" is an encoder with a decoder.
    Before the version `since` transformers does not let others compute its attention.
    """

    name: str
    config: str
    model: str
    options: dict[str, Any]
    shows: str
    kind: str = "decoder"
    inputs: str = "tokens"
    attentions: int = 2
    since: tuple[int, int] = (5, 4)
    checks: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        generates = () if self.kind == "encoder" else ("generation",)
        padded = ("padding",) if self.inputs == "tokens" else ()
        object.__setattr__(self, "checks", ("logits", *padded, *generates, "gradients"))


MODELS = (
    Model("BERT", "BertConfig", "BertForMaskedLM", _DECODER, "two-way", kind="encoder"),
    Model(
        "ModernBERT",
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {**_DECODER, "local_attention": 6, "global_attn_every_n_layers": 2, "layer_types": None},
        "two-way windows",
        kind="encoder",
    ),
    Model(
        "ViT",
        "ViTConfig",
        "ViTForImageClassification",
        dict(_DECODER, image_size=12, patch_size=4, num_labels=7),
        "patches of an image",
        kind="encoder",
        inputs="image",
    ),
    Model(
        "GPT-2",
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0),
        "causal",
    ),
    Model("Llama", "LlamaConfig", "LlamaForCausalLM", _GROUPED, "grouped heads"),
    Model("Qwen 2", "Qwen2Config", "Qwen2ForCausalLM", _GROUPED, "grouped heads"),
    Model("Qwen 3", "Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, **_WIDE}, "heads that do not add up"),
    Model("Phi", "PhiConfig", "PhiForCausalLM", _GROUPED, "rotary on half of the features"),
    Model("Mistral", "MistralConfig", "MistralForCausalLM", {**_GROUPED, "sliding_window": 5}, "windows"),
    Model(
        "Mixtral",
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GROUPED, **_EXPERTS, "sliding_window": 5},
        "windows, mixture of experts",
    ),
    Model(
        "Gemma 2",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_GROUPED, **_HYBRID, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 3.0},
        "soft cap, windows in turn, own scale",
    ),
    Model(
        "Gemma 3",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GROUPED, **_HYBRID, "query_pre_attn_scalar": 11},
        "windows in turn, own scale",
    ),
    Model(
        "GPT-OSS",
        "GptOssConfig",
        "GptOssForCausalLM",
        {**_GROUPED, **_EXPERTS, **_HYBRID, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "sinks, windows in turn",
    ),
    Model(
        "Llama 4",
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **_GROUPED,
            **_EXPERTS,
            "head_dim": 8,
            "intermediate_size_mlp": 40,
            "attention_chunk_size": 5,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "chunks in turn",
    ),
    Model(
        "T5",
        "T5Config",
        "T5ForConditionalGeneration",
        dict(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=6,
            relative_attention_max_distance=9,
            decoder_start_token_id=0,
        ),
        "position bias, cross attention",
        kind="both",
        attentions=6,
        since=(5, 15),
    ),
    Model(
        "BART",
        "BartConfig",
        "BartForConditionalGeneration",
        dict(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            max_position_embeddings=64,
        ),
        "cross attention",
        kind="both",
        attentions=6,
    ),
    Model(
        "Whisper",
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        dict(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            num_mel_bins=6,
            max_source_positions=11,
            max_target_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        "speech, cross attention",
        kind="both",
        inputs="speech",
        attentions=6,
    ),
)

# Models that compute attention themselves: transformers takes the name and asks nobody.
UNASKED = (
    Model("BLOOM", "BloomConfig", "BloomModel", dict(vocab_size=VOCABULARY, hidden_size=32, n_head=4), ""),
    Model("DeBERTa v2", "DebertaV2Config", "DebertaV2Model", _DECODER, ""),
    Model("Longformer", "LongformerConfig", "LongformerModel", {**_DECODER, "attention_window": 4}, ""),
    Model("MPNet", "MPNetConfig", "MPNetModel", _DECODER, ""),
    Model("MPT", "MptConfig", "MptModel", dict(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4), ""),
    Model("XLNet", "XLNetConfig", "XLNetModel", dict(vocab_size=VOCABULARY, d_model=32, n_head=4), ""),
)

COLUMNS = {
    "logits": "logits",
    "padding": "padding left, right",
    "generation": "greedy generation",
    "gradients": "gradients",
}


def table() -> str:
    """The table of models and checks, in Markdown."""
    lines = [
        f"| model | has | {' | '.join(COLUMNS.values())} |",
        f"| --- | --- | {' | '.join('---' for _ in COLUMNS)} |",
    ]
    for model in MODELS:
        cells = ["✓" if check in model.checks else "" for check in COLUMNS]
        lines.append(f"| {model.name} | {model.shows} | {' | '.join(cells)} |")
    empty = " | ".join("" for _ in COLUMNS)
    lines += [f"| {model.name} | attention of its own | {empty} |" for model in UNASKED]
    return "\n".join(lines) + "\n"
