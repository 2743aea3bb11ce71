"""Configs of the text encoders, held against the tensors that they describe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPTextConfig, GenerationConfig, T5Config
from transformers.activations import ACT2FN

from exporters.checkpoint.agreement import check_same, unknown_keys
from exporters.checkpoint.config import count_blocks
from exporters.checkpoint.tensors import StoredTensor, Weights
from fluxdeploy.errors import CheckpointError

__all__ = ["FOLDERS", "is_spare", "text_config", "unknown_text_keys", "with_aliases"]

FOLDERS = {"clip": "text_encoder", "t5": "text_encoder_2"}
"""What diffusers' layout calls them."""

_CLIP_PREFIX = "text_model."
_SPARE = {
    "clip": r"text_model\.(embeddings\.position_ids|(text|visual)_projection(\.weight)?|logit_scale"
    r"|vision_model\..*)",
    # ComfyUI puts a tokenizer beside the weights, and CLIP's scale beside all encoders.
    "t5": r"encoder\.embed_tokens\.weight|decoder\..*|lm_head\.weight|spiece_model|logit_scale",
}
_GGUF_EMBEDDING = "token_embd.weight"
_GGUF_ENDS = {
    _GGUF_EMBEDDING: "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
}
_GGUF_BLOCK = {
    "attn_norm": "0.layer_norm",
    "attn_q": "0.SelfAttention.q",
    "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "ffn_norm": "1.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
}
"""What llama.cpp's converter calls the tensors of T5's encoder, below `enc.blk.N.`."""

_LEGACY = (
    "dropout",
    "gradient_checkpointing",
    "logit_scale_init_value",
    "n_positions",
    "output_past",
    "task_specific_params",
    "text_config",
    "text_config_dict",
    "tie_word_embeddings",
    "torch_dtype",
    "torchscript",
    "use_bfloat16",
    "vision_config",
    "vision_config_dict",
)
"""Keys of published configs that no version of the encoders reads any more."""

_UNREAD = (
    "attention_dropout",
    "classifier_dropout",
    "dropout_rate",
    "dtype",
    "id2label",
    "label2id",
    "num_labels",
    "torch_dtype",
)
"""Of training and other uses; transformers makes as many labels as it is told."""

_MAX_SIZE = 1 << 20
_SIZES = (
    "d_ff",
    "d_kv",
    "d_model",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_decoder_layers",
    "num_heads",
    "num_hidden_layers",
    "num_layers",
    "projection_dim",
    "relative_attention_max_distance",
    "relative_attention_num_buckets",
    "vocab_size",
)

# As they stand in FLUX.1's own folders.
_CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
}
_KNOWN = {
    "clip": (
        "CLIP-L",
        _CLIP_L,
        {
            "text_model.embeddings.token_embedding.weight": (49408, 768),
            "text_model.embeddings.position_embedding.weight": (77, 768),
            "text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        },
        "text_model.encoder.layers.12.mlp.fc1.weight",
    ),
    "t5": (
        "T5-XXL 1.1's encoder",
        _T5_XXL,
        {
            "shared.weight": (32128, 4096),
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
            "encoder.block.23.layer.0.SelfAttention.q.weight": (4096, 4096),
            "encoder.block.23.layer.1.DenseReluDense.wi_0.weight": (10240, 4096),
        },
        "encoder.block.24.layer.0.SelfAttention.q.weight",
    ),
}
"""Text encoders whose config is known: what they are, it, the shapes that tell them, and the name
of a tensor that a longer one has."""

_MODEL_TYPES = {"clip": ("clip_text_model", "clip"), "t5": ("t5",)}


def with_aliases(weights: dict[str, StoredTensor], name: str) -> dict[str, StoredTensor]:
    """A text encoder's tensors under one name each, whatever version of transformers saved them."""
    if name == "clip":
        return _with_prefix(weights)
    if _GGUF_EMBEDDING in weights:
        weights = {_t5_name(key): tensor for key, tensor in weights.items()}
    embedding = weights.get("encoder.embed_tokens.weight")
    if embedding is not None:
        check_same(weights.setdefault("shared.weight", embedding), embedding)
    return weights


def _t5_name(name: str) -> str:
    """The name of a T5 encoder's tensor in transformers, of that in a GGUF file."""
    block = re.fullmatch(r"enc\.blk\.(\d{1,9})\.(\w+)\.weight", name)
    if block is None:
        return _GGUF_ENDS.get(name, name)
    inside = _GGUF_BLOCK.get(block[2])
    return name if inside is None else f"encoder.block.{block[1]}.layer.{inside}.weight"


def _with_prefix(weights: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    prefixed: dict[str, StoredTensor] = {}
    for key, tensor in weights.items():
        full = key if key.startswith(_CLIP_PREFIX) else f"{_CLIP_PREFIX}{key}"
        if full in prefixed:
            check_same(prefixed[full], tensor)
        prefixed[full] = tensor
    return prefixed


def is_spare(part: str, tensor: str) -> bool:
    """Whether a tensor of a text encoder's file is one that no picture needs.

    Whole CLIP and T5 models have a second half, and older files a buffer.
    """
    return part in _SPARE and re.fullmatch(_SPARE[part], tensor) is not None


def unknown_text_keys(name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence on the keys of a text encoder's config.json that transformers does not know."""
    kind = CLIPTextConfig if name == "clip" else T5Config
    known = {*kind().to_dict(), *GenerationConfig().to_dict(), *_LEGACY}
    return unknown_keys(f"The {name} text encoder's config.json", config, known)


def text_config(name: str, weights: Weights, config: Mapping[str, Any]) -> Any:
    """The config of `clip` or `t5` as transformers' class; without any, FLUX.1's own by shapes.

    Raises `CheckpointError` where it is missing, of another model, or contradicts the tensors.
    """
    if not config:
        config = _known_config(name, weights)
    kind = config.get("model_type", _MODEL_TYPES[name][0])
    if kind not in _MODEL_TYPES[name]:
        raise CheckpointError(
            f"The {name} text encoder's config.json says model_type {kind!r}; "
            f"{' or '.join(map(repr, _MODEL_TYPES[name]))} is needed."
        )
    nested = config.get("text_config") if kind == "clip" else None
    chosen = nested if isinstance(nested, dict) else config
    fields = {key: value for key, value in chosen.items() if key not in _UNREAD}
    _check_numbers(name, fields)
    try:
        parsed = CLIPTextConfig(**fields) if name == "clip" else T5Config(**fields)
    except (StrictDataclassError, ArithmeticError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"The {name} text encoder's config.json is not valid: {reason}"
        ) from error
    _check_sizes(name, parsed, weights)
    return parsed


def _known_config(name: str, weights: Weights) -> Mapping[str, Any]:
    """The config of the text encoder that FLUX.1 has, where the tensors are of its shapes."""
    what, config, shapes, beyond = _KNOWN[name]
    files = sorted({stored.file.name for stored in weights.values()})
    begin = f"The {name} text encoder in {', '.join(files)} has no config.json beside its weights"
    for tensor, shape in shapes.items():
        found = weights[tensor].shape if tensor in weights else None
        if found != shape:
            has = "is missing" if found is None else f"has shape {list(found)}"
            raise CheckpointError(
                f"{begin}, and is not {what}, whose config is known: {tensor} {has}. Put its "
                f"config.json into {FOLDERS[name]}/."
            )
    if beyond in weights:
        raise CheckpointError(
            f"{begin}, and more layers than {what}, whose config is known. Put its config.json "
            f"into {FOLDERS[name]}/."
        )
    return config


def _check_numbers(name: str, fields: Mapping[str, Any]) -> None:
    for key in _SIZES:
        value = fields.get(key, 1)
        if isinstance(value, (int, float)) and not 0 < value <= _MAX_SIZE:
            raise CheckpointError(
                f"The {name} text encoder's config.json says {key} {value!r}; 1 to {_MAX_SIZE} are "
                "allowed."
            )


def _check_sizes(name: str, config: Any, weights: Weights) -> None:
    """Hold a config against the tensors before a network of its sizes is made."""
    if name == "clip":
        pattern = r"text_model\.encoder\.layers\.(\d{1,9})\."
        layers, activation = config.num_hidden_layers, config.hidden_act
        tables = {
            "text_model.embeddings.token_embedding.weight": (
                config.vocab_size,
                config.hidden_size,
            ),
            "text_model.embeddings.position_embedding.weight": (
                config.max_position_embeddings,
                config.hidden_size,
            ),
        }
    else:
        pattern = r"encoder\.block\.(\d{1,9})\."
        layers, activation = config.num_layers, config.dense_act_fn
        tables = {
            "shared.weight": (config.vocab_size, config.d_model),
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
                config.relative_attention_num_buckets,
                config.num_heads,
            ),
        }
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise CheckpointError(
            f"The {name} text encoder's config.json names the activation {activation!r}, which "
            "transformers does not have."
        )
    for table, shape in tables.items():
        found = weights[table].shape if table in weights else None
        if found != shape:
            what = "is missing" if found is None else f"has shape {list(found)}"
            raise CheckpointError(
                f"The {name} text encoder's tensor {table} {what}; its config.json asks for "
                f"{list(shape)}."
            )
    if count_blocks(weights, pattern) != layers:
        raise CheckpointError(
            f"The {name} text encoder has {count_blocks(weights, pattern)} layers; its config.json "
            f"asks for {layers}."
        )
