"""One file a family: its `transformers` config to ours, and its tensor names to ours."""

from typing import Any

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

# Fields that every config has and that change no logits: of generation, heads for other
# tasks, storage. A quantised checkpoint is another matter.
_HARMLESS_EVERYWHERE = {
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
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
    reading = _Reading(config)
    decoder_config = family.decoder_config(reading)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            "the model is quantised (quantization_config), which is not built: pass the folder of"
            " its float16, bfloat16 or float32 weights"
        )
    known = reading.fields | _HARMLESS_EVERYWHERE | {*family.harmless, *family.dropout_fields}
    renamed = getattr(config, "attribute_map", {})
    known |= {renamed[field] for field in known if field in renamed}
    known |= {field for field, name in renamed.items() if name in known}
    defaults = type(config)().to_dict()
    for field, default in defaults.items():
        value = getattr(config, field, default)
        if field not in known and not field.startswith("_") and value != default:
            raise ValueError(
                f"config field {field}={value!r} is not built for {config.model_type}: only its"
                f" default {default!r} is"
            )
    return decoder_config


class _Reading:
    """A config that remembers which of its fields were read."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.fields: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.fields.add(name)
        return getattr(self._config, name)
