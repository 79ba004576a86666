"""One file a family: its `transformers` config to ours, and its tensor names to ours."""

from typing import Any

from huggingface_hub.errors import StrictDataclassError

from jax_sft.model.families import (
    bloom,
    codegen,
    cohere,
    cohere2,
    falcon,
    gemma,
    gemma2,
    gemma3_text,
    gpt2,
    gpt_bigcode,
    gpt_neo,
    gpt_neox,
    gptj,
    granite,
    llama,
    mistral,
    mixtral,
    olmo,
    olmo2,
    opt,
    phi,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
    xglm,
)
from jax_sft.model.types import DecoderConfig, Family

FAMILIES = {
    "bloom": bloom.FAMILY,
    "codegen": codegen.FAMILY,
    "cohere": cohere.FAMILY,
    "cohere2": cohere2.FAMILY,
    "falcon": falcon.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3_text.FAMILY,
    "gpt2": gpt2.FAMILY,
    "gpt_bigcode": gpt_bigcode.FAMILY,
    "gpt_neo": gpt_neo.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "gptj": gptj.FAMILY,
    "granite": granite.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmo": olmo.FAMILY,
    "olmo2": olmo2.FAMILY,
    "opt": opt.FAMILY,
    "phi": phi.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "smollm3": smollm3.FAMILY,
    "stablelm": stablelm.FAMILY,
    "xglm": xglm.FAMILY,
}

# Fields that many configs have and that change no logits: of generation, heads for other
# tasks, storage.
_HARMLESS_EVERYWHERE = {
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "label2id",
    "model_type",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "sep_token_id",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def find_family(config: Any) -> Family:
    """Returns the family of a `transformers` config.

    Raises:
        ValueError: its `model_type` is not one that is built.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported: choose one of {sorted(FAMILIES)}"
        )
    return FAMILIES[config.model_type]


def read_config(config: Any) -> DecoderConfig:
    """Returns the decoder's config for a `transformers` config.

    Raises:
        ValueError: the family, or an option that would change the numbers, is not built.
    """
    family = find_family(config)
    _check_any_family(config)
    reading = _Reading(config)
    decoder_config = family.decoder_config(reading)
    _check_unread(config, {*reading.fields, *family.harmless, *family.dropout_fields})
    return decoder_config


def _check_any_family(config: Any) -> None:
    """Refuses what `transformers` reads of any config, and families need not know.

    Raises:
        ValueError: it is there.
    """
    if getattr(config, "quantization_config", None):
        raise ValueError(
            "the model is quantised (quantization_config), which is not built: pass the folder of"
            " its float16, bfloat16 or float32 weights"
        )
    if config.is_heterogeneous:
        raise ValueError(
            "config field per_layer_config gives layers options of their own, which is not built:"
            " choose a model whose layers are alike"
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        size = getattr(config, name, None)
        if isinstance(size, int) and size < 1:
            field = config.attribute_map.get(name, name)
            raise ValueError(f"config field {field}={size} leaves no model: set it to at least 1")
    if not getattr(config, "is_causal", True):
        raise ValueError(
            f"config field is_causal={config.is_causal!r} is not built: only True is, where a"
            " token sees those before it"
        )


def _check_unread(config: Any, known: set[str]) -> None:
    """Refuses fields that are neither known nor as they would be if they were not stated.

    A config made of what is known has the defaults of everything else, those among them that its
    class computes. What its class has no field for, `transformers` does not read either.

    Raises:
        ValueError: names a field, its value and its default.
    """
    fields = config.to_dict()
    # Tokens are stated too, since classes warn of defaults that the vocabulary has not.
    known = known | {"bos_token_id", "eos_token_id", "pad_token_id"}
    known = {config.attribute_map.get(field, field) for field in known} - {"model_type"}
    stated = {field: value for field, value in fields.items() if field in known}
    try:
        defaults = type(config)(**stated).to_dict()
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(
            f"a {type(config).__name__} of these fields is not built ({reason}): see its"
            " documentation"
        ) from None
    for field in sorted(defaults.keys() - known - _HARMLESS_EVERYWHERE):
        value, default = fields.get(field, defaults[field]), defaults[field]
        if value != default:
            raise ValueError(
                f"config field {field}={value!r} is not built for {config.model_type}: only its"
                f" default {default!r} is"
            )


class _Reading:
    """A config that remembers which of its fields were read."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.fields: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.fields.add(name)
        return getattr(self._config, name)
