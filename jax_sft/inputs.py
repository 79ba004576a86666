"""All that a run is given, before any weights: tokenizer, examples, prompts, metric.

In: the config and what was passed to `train(...)`, which wins over the config. Out: `Inputs`,
checked. Leaves take plain values; here, and in `train.py`, the config is unpacked for them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from jax_sft.config import SFTConfig, default_sft_config
from jax_sft.data.samples import load_eval_prompts, load_function, load_samples, read_samples
from jax_sft.data.tokenization import (
    check_stop_sequences,
    load_tokenizer,
    prompt_ids,
    tokenize_samples,
)
from jax_sft.data.types import Counts, Examples, Sample
from jax_sft.evaluate import MetricFn
from jax_sft.model.adapter_files import base_model, is_adapter_folder


class Prompts(NamedTuple):
    """Prompts to watch: their text, their ids, and what else each came with."""

    texts: list[str]
    ids: list[list[int]]
    metadata: dict[str, list]


class Inputs(NamedTuple):
    """All that a run is given.

    Attributes:
        tokenizer: of the model.
        examples: what is trained.
        counts: what became of the samples.
        eval_examples: held-out samples, or None.
        eval_counts: what became of them, or None.
        prompts: to generate from, or None.
        metric_fn: scores outputs, or None.
        stop_sequences: strings that end an output.
    """

    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    counts: Counts
    eval_examples: Examples | None
    eval_counts: Counts | None
    prompts: Prompts | None
    metric_fn: MetricFn | None
    stop_sequences: tuple[str, ...]


def tokenize(
    samples: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: SFTConfig | None = None,
) -> Examples:
    """Shows what would be trained: samples to shifted, weighted token ids.

    Args:
        samples: as for `train`.
        tokenizer: a `transformers` tokenizer.
        config: its sections train, tokenizer and data decide; None for the default.

    Returns:
        A sequence of examples, each with inputs_T, targets_T, weights_T and text().

    Raises:
        ValueError: a sample is not as it must be.
    """
    config = default_sft_config() if config is None else config
    return _tokenize(config, _read(config, samples), tokenizer)[0]


def load_inputs(
    config: SFTConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    samples: Any,
    eval_samples: Any,
    eval_prompts: Any,
    metric_fn: MetricFn | None,
    stop_sequences: Sequence[str],
) -> Inputs:
    """Reads and tokenizes all that a run is given; what is None comes from the config.

    Raises:
        ValueError: something is missing or not as it must be; one line says what.
    """
    check_stop_sequences(stop_sequences)
    if samples is None and config.data.train is None:
        raise ValueError(
            "no samples: pass samples=[...], or set data.train to a file, a hub name or "
            "module:function"
        )
    if samples is None and eval_samples is None and config.data.eval == config.data.train:
        raise ValueError(
            f"data.eval is {config.data.eval!r}, as data.train is, so that it would measure what "
            "was trained: set it to held-out samples, or None"
        )
    prompts = _load_prompts(config, eval_prompts, tokenizer)
    if metric_fn is None and config.data.metric_fn is not None:
        metric_fn = load_function(config.data.metric_fn)
    train_samples = _load(config, samples, config.data.train)
    examples, counts = _tokenize(config, train_samples, tokenizer)
    eval_examples = eval_counts = None
    if eval_samples is not None or config.data.eval is not None:
        held_out = _load(config, eval_samples, config.data.eval)
        eval_examples, eval_counts = _tokenize(config, held_out, tokenizer)
        if not len(eval_examples):
            raise ValueError("no eval sample has a trained token: pass others, or none")
    return Inputs(
        tokenizer=tokenizer,
        examples=examples,
        counts=counts,
        eval_examples=eval_examples,
        eval_counts=eval_counts,
        prompts=prompts,
        metric_fn=metric_fn,
        stop_sequences=tuple(stop_sequences) or tuple(config.data.stop_sequences),
    )


def find_tokenizer(
    config: SFTConfig, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that was passed, or the one that the config names.

    Raises:
        ValueError: there is none to load, or what was passed is none.
    """
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}: pass a transformers tokenizer, or set "
            "config.tokenizer.tokenizer_path"
        )
    if tokenizer is not None:
        return tokenizer
    path, model_path = config.tokenizer.tokenizer_path, config.model.model_path
    try:
        return load_tokenizer(
            _tokenizer_home(model_path) if path is None else path,
            truncation_side=config.tokenizer.truncation_side,
            chat_template=config.tokenizer.chat_template,
        )
    except ValueError as error:
        if path is not None:
            raise
        raise ValueError(
            f"model.model_path is {model_path!r} and tokenizer.tokenizer_path is not set, and "
            f"{error}, as --config.model.model_path=DIR"
        ) from None


def _tokenizer_home(model_path: str) -> str | Path:
    """An adapter's folder may have no tokenizer: then its base model's is meant."""
    folder = Path(model_path)
    if is_adapter_folder(folder) and not (folder / "tokenizer_config.json").is_file():
        return base_model(folder)
    return model_path


def _load(config: SFTConfig, samples: Any, source: str | None) -> Sequence[Sample]:
    if samples is not None:
        return _read(config, samples)
    data = config.data
    return load_samples(
        source, split=data.split, format=data.format, num_proc=data.num_proc, **_fields(config)
    )


def _read(config: SFTConfig, samples: Any) -> Sequence[Sample]:
    return read_samples(samples, **_fields(config))


def _fields(config: SFTConfig) -> dict[str, Any]:
    names = ("text_field", "prompt_field", "output_field", "messages_field")
    names += ("template", "filter", "max_samples")
    return {name: config.data[name] for name in names}


def _tokenize(
    config: SFTConfig, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase
) -> tuple[Examples, Counts]:
    return tokenize_samples(
        samples,
        tokenizer,
        seq_length=config.train.seq_length,
        truncation_side=config.tokenizer.truncation_side,
        add_bos=config.tokenizer.add_bos,
        add_eos=config.tokenizer.add_eos,
        over_length=config.data.over_length,
    )


def _load_prompts(
    config: SFTConfig, eval_prompts: Any, tokenizer: PreTrainedTokenizerBase
) -> Prompts | None:
    source = config.data.eval_prompts if eval_prompts is None else eval_prompts
    if source is None:  # trlX's default: what the model says of itself
        if tokenizer.bos_token is None:
            return None
        source = [tokenizer.bos_token] * config.train.batch_size
    if not isinstance(source, str) and not len(source):  # the way to ask for none
        return None
    prompts, metadata = load_eval_prompts(source)
    taken = sorted({"samples", "prompts", "outputs"} & set(metadata))
    if taken:
        raise ValueError(
            f"eval prompts have a key {taken[0]!r}, which metric_fn is given already: rename it"
        )
    ids = [
        prompt_ids(
            prompt,
            tokenizer,
            add_bos=config.tokenizer.add_bos,
            add_eos=config.tokenizer.add_eos,
        )
        for prompt in prompts
    ]
    texts = [prompt if isinstance(prompt, str) else "".join(prompt) for prompt in prompts]
    return Prompts(texts, ids, metadata)
