"""All that a run is given, before any weights: tokenizer, examples, prompts, metric.

In: the config and what was passed to `train(...)`, which wins over the config. Out: `Inputs`,
checked. Leaves take plain values; here, and in `train.py`, the config is unpacked for them.
"""

import dataclasses
import functools
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from jax_sft.config import SFTConfig, default_sft_config
from jax_sft.data.fingerprint import source_fingerprint
from jax_sft.data.samples import load_eval_prompts, load_function, load_samples, read_samples
from jax_sft.data.sources import names_part
from jax_sft.data.stream_batches import StreamBatches
from jax_sft.data.streams import open_stream
from jax_sft.data.token_cache import tokenize_all
from jax_sft.data.tokenization import (
    Encoding,
    check_stop_sequences,
    encode_prompt,
    prompt_difference,
)
from jax_sft.data.tokenizer import has_tokenizer, load_tokenizer
from jax_sft.data.types import (
    Conversation,
    Counts,
    Examples,
    ExampleSet,
    Samples,
    Source,
    join_examples,
    join_origins,
)
from jax_sft.evaluate import MetricFn
from jax_sft.model.adapter_files import base_model, is_adapter_folder

_SHOWN_BEFORE, _SHOWN_BEHIND = 24, 24  # characters around a difference


class Prompts(NamedTuple):
    """Prompts to watch.

    Attributes:
        texts: as the model sees them.
        ids: the exact prefix of training's ids.
        metadata: what else each came with.
        note: how the chat template's own prompt differs from training's, where it does.
    """

    texts: list[str]
    ids: list[list[int]]
    metadata: dict[str, list]
    note: str | None = None


class Inputs(NamedTuple):
    """All that a run is given.

    Attributes:
        tokenizer: of the model.
        train: what is trained, and what became of the rows that it was made of.
        evals: held-out sets by name; one without a name is called "".
        prompts: to generate from, or None.
        metric_fn: scores outputs, or None.
        stop_sequences: strings that end an output.
        stream: the batches of what is read while training, of which `train` then has the
            first window alone; None where everything has been read.
    """

    tokenizer: PreTrainedTokenizerBase
    train: ExampleSet
    evals: dict[str, ExampleSet]
    prompts: Prompts | None
    metric_fn: MetricFn | None
    stop_sequences: tuple[str, ...]
    stream: StreamBatches | None = None


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
    tokenizer = find_tokenizer(config, tokenizer)
    return _tokenize(config, _Opened(_read(config, samples)), tokenizer).examples


def load_inputs(
    config: SFTConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    samples: Any = None,
    eval_samples: Any = None,
    eval_prompts: Any = None,
    metric_fn: MetricFn | None = None,
    stop_sequences: Sequence[str] | None = (),
) -> Inputs:
    """Reads and tokenizes all that a run is given; what is None comes from the config.

    Raises:
        ValueError: something is missing or not as it must be; one line says what.
    """
    stop_sequences = () if stop_sequences is None else stop_sequences
    check_stop_sequences(stop_sequences)
    if samples is None and config.data.train is None:
        raise ValueError(
            "no samples: pass samples=[...], or set data.train to a file, a hub name or "
            "module:function"
        )
    if samples is None and eval_samples is None:
        _check_held_out(config)
    if metric_fn is None and config.data.metric_fn is not None:
        metric_fn = load_function(config.data.metric_fn)
    if metric_fn is not None and not callable(metric_fn):
        raise ValueError(
            f"metric_fn is a {type(metric_fn).__name__}: pass a function of samples, prompts, "
            "outputs and **metadata"
        )
    prompts = _find_prompts(config, eval_prompts, tokenizer)
    if metric_fn is not None and prompts is not None:
        _check_takes(metric_fn, ["samples", "prompts", "outputs", *prompts[1]])
    stream = None
    if config.data.streaming:
        stream = _open_stream(config, samples, tokenizer)
        first = stream.first
        source = Source(stream.stream.source, stream.stream.format, 1.0, first.counts)
        train = ExampleSet(first.examples, first.counts, (source,))
    else:
        train = _load_train(config, samples, tokenizer)
    return Inputs(
        tokenizer=tokenizer,
        train=train,
        evals=_load_evals(config, eval_samples, tokenizer),
        prompts=None if prompts is None else _encode_prompts(config, *prompts, tokenizer, train),
        metric_fn=metric_fn,
        stop_sequences=tuple(stop_sequences) or tuple(config.data.stop_sequences),
        stream=stream,
    )


def _check_takes(metric_fn: MetricFn, names: Sequence[str]) -> None:
    """Raises ValueError for a function that cannot be called with these, before any training."""
    if not inspect.isfunction(metric_fn):
        return
    try:
        inspect.signature(metric_fn, follow_wrapped=False).bind(**dict.fromkeys(names))
    except TypeError as error:
        raise ValueError(
            f"metric_fn {metric_fn.__name__!r} is called with {', '.join(names)} by name, and"
            f" cannot be ({error}): give it the parameters that it uses, and **_ for the others"
        ) from None


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
    if is_adapter_folder(folder) and not has_tokenizer(folder):
        return base_model(folder)
    return model_path


def _check_held_out(config: SFTConfig) -> None:
    data = config.data
    trained = {_place_of(source, data.split) for source, _ in _mixture(data.train)}
    for source in _named(data.eval).values():
        if _place_of(source, _eval_split(data, source)) in trained:
            raise ValueError(
                f"data.eval is {source!r}, as data.train is, so that it would measure what "
                "was trained: set it to held-out samples, data.eval_split to another split of a "
                "hub dataset, or None"
            )


def _place_of(source: str, split: str) -> tuple[str | Path, str]:
    """A source's name, or the path it is whatever way it is written, and what is read of it."""
    path = Path(source).expanduser()
    if path.is_file() and not names_part(split):
        split = "train"
    return path.resolve() if path.exists() else source, split


def _eval_split(data: Any, source: str) -> str:
    """What is read of held-out data: data.split may be a part of the training data alone."""
    is_file = Path(source).expanduser().is_file()
    return data.eval_split or ("train" if is_file else data.split)


def _mixture(train: str | Sequence) -> list[tuple[str, float]]:
    """The sources of config.data.train, and how often an epoch sees each."""
    items = [train] if isinstance(train, str) else train or ()
    return [(item, 1.0) if isinstance(item, str) else (item[0], item[1]) for item in items]


def _named(evals: str | Mapping[str, Any] | None) -> dict[str, Any]:
    if evals is None:
        return {}
    return dict(evals) if isinstance(evals, Mapping) or hasattr(evals, "items") else {"": evals}


def _load_train(config: SFTConfig, samples: Any, tokenizer: PreTrainedTokenizerBase) -> ExampleSet:
    if samples is not None:
        return _tokenize(config, _Opened(_read(config, samples)), tokenizer)
    data = config.data
    sets = [
        (_tokenize(config, _find(config, source, split=data.split), tokenizer), times)
        for source, times in _mixture(data.train)
    ]
    return _mixed(sets, seed=config.train.seed)


def _open_stream(
    config: SFTConfig, samples: Any, tokenizer: PreTrainedTokenizerBase
) -> StreamBatches:
    data, train = config.data, config.train
    mixture = _mixture(data.train)
    if samples is None and (len(mixture) > 1 or mixture[0][1] != 1):
        raise ValueError(
            "data.streaming reads one source, but data.train is a mixture: set data.streaming to "
            "False, or interleave the sources in a module:function"
        )
    stream = open_stream(
        mixture[0][0] if samples is None else samples,
        split=data.split,
        format=data.format,
        **_reading(config),
    )
    return StreamBatches(
        stream,
        tokenizer,
        encoding_of(config),
        batch_size=train.batch_size,
        epochs=train.epochs,
        seed=train.seed,
        shuffle=data.shuffle,
        packing=data.packing,
        look_ahead=data.look_ahead,
    )


def _load_evals(
    config: SFTConfig, eval_samples: Any, tokenizer: PreTrainedTokenizerBase
) -> dict[str, ExampleSet]:
    data = config.data
    if eval_samples is not None:
        named = eval_samples if isinstance(eval_samples, dict) else {"": eval_samples}
        found = {name: _Opened(_read(config, samples)) for name, samples in named.items()}
    else:
        found = {}
        for name, source in _named(data.eval).items():
            found[name] = _find(config, source, split=_eval_split(data, source))
    evals = {}
    for name, samples in found.items():
        evals[name] = _tokenize(config, samples, tokenizer)
        if not len(evals[name].examples):
            raise ValueError(
                f"no eval sample{f' of {name}' if name else ''} has a trained token: pass others, "
                "or none"
            )
    return evals


def _mixed(sets: list[tuple[ExampleSet, float]], *, seed: int) -> ExampleSet:
    """Lays the examples of each source out as often as an epoch sees them."""
    if len(sets) == 1 and sets[0][1] == 1:
        return sets[0][0]
    blocks, sources, total = [], [], Counts()
    for index, ((examples, counts, [source]), times) in enumerate(sets):
        blocks.append(_repeated(examples, times, seed=(seed, index)))
        sources.append(dataclasses.replace(source, times=times))
        total.add(counts)
    origins = join_origins([block.origins for block in blocks])
    joined = join_examples(blocks, tokenizer=blocks[0].tokenizer, origins=origins)
    return ExampleSet(joined, total, tuple(sources))


def _repeated(examples: Examples, times: float, *, seed: tuple[int, int]) -> Examples:
    """The examples so many times; a fraction is drawn by the seed, the same on every host."""
    if times == 1:
        return examples
    num_whole, share = divmod(times, 1)
    num_drawn = round(share * len(examples))
    drawn = np.random.default_rng(seed).permutation(len(examples))[:num_drawn]
    whole = np.tile(np.arange(len(examples)), int(num_whole))
    return examples.take(np.concatenate([whole, np.sort(drawn)]))


class _Opened(NamedTuple):
    """Samples, or what opens them, and what tells from outside whether they changed."""

    samples: Samples | Callable[[], Samples]
    fingerprint: str | None = None


def _find(config: SFTConfig, source: str, *, split: str) -> _Opened:
    data = config.data
    options = dict(split=split, format=data.format, **_reading(config))
    return _Opened(
        functools.partial(load_samples, source, num_proc=data.num_proc, **options),
        source_fingerprint(source, **options),
    )


def _read(config: SFTConfig, samples: Any) -> Samples:
    return read_samples(samples, **_reading(config))


def _reading(config: SFTConfig) -> dict[str, Any]:
    """The options that decide what a row holds."""
    names = ("row_format", "text_field", "prompt_field", "output_field", "messages_field")
    names += ("template", "filter", "max_samples", "train_turns")
    return {name: config.data[name] for name in names}


def encoding_of(config: SFTConfig) -> Encoding:
    """The options that decide the ids and masks of rows."""
    tokenizer, data = config.tokenizer, config.data
    return Encoding(
        seq_length=config.train.seq_length,
        truncation_side=tokenizer.truncation_side,
        add_bos=tokenizer.add_bos,
        add_eos=tokenizer.add_eos,
        over_length=data.over_length,
        stop_tokens=tuple(tokenizer.stop_tokens),
        template_kwargs=json.dumps(tokenizer.chat_template_kwargs.to_dict(), sort_keys=True),
        on_bad_row=data.on_bad_row,
    )


def _tokenize(config: SFTConfig, opened: _Opened, tokenizer: PreTrainedTokenizerBase) -> ExampleSet:
    return tokenize_all(
        opened.samples,
        tokenizer,
        encoding_of(config),
        num_proc=config.data.num_proc,
        cache_dir=config.data.cache_dir,
        fingerprint=opened.fingerprint,
    )


def _find_prompts(
    config: SFTConfig, eval_prompts: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[list, dict[str, list]] | None:
    """The prompts to watch and their metadata, before the data is read: a bad one is quick."""
    source = config.data.eval_prompts if eval_prompts is None else eval_prompts
    if source is None:  # trlX's default: what the model says of itself
        if tokenizer.bos_token is None:
            return None
        source = [tokenizer.bos_token] * config.train.batch_size
    if hasattr(source, "__len__") and not len(source) and not isinstance(source, str):
        return None  # the way to ask for none
    prompts, metadata = load_eval_prompts(source)
    taken = sorted({"samples", "prompts", "outputs"} & set(metadata))
    if taken:
        raise ValueError(
            f"eval prompts have a key {taken[0]!r}, which metric_fn is given already: rename it"
        )
    return prompts, metadata


def read_prompts(
    config: SFTConfig, prompts: Any, tokenizer: PreTrainedTokenizerBase, train: ExampleSet
) -> Prompts:
    """Reads prompts, and encodes them as training encoded what stands before an answer.

    Args:
        config: the run's config.
        prompts: as `load_eval_prompts` takes them.
        tokenizer: the run's.
        train: what was trained.

    Raises:
        ValueError: a prompt is not as it must be.
    """
    return _encode_prompts(config, *load_eval_prompts(prompts), tokenizer, train)


def _encode_prompts(
    config: SFTConfig,
    prompts: list[str | list[str] | Conversation],
    metadata: dict[str, list],
    tokenizer: PreTrainedTokenizerBase,
    train: ExampleSet,
) -> Prompts:
    encoding = encoding_of(config)
    reasons = 2 * train.counts.examples_with_reasoning > len(train.examples)
    encoded = [encode_prompt(prompt, tokenizer, encoding, reasons=reasons) for prompt in prompts]
    note = None
    for prompt, (_, text) in zip(prompts, encoded, strict=True):
        if note is None and isinstance(prompt, Conversation):
            own = prompt_difference(prompt, text, tokenizer, encoding)
            if own is not None:
                shown, other = _apart(text, own)
                note = (
                    f"as training has them, with {shown}; add_generation_prompt would have {other}"
                )
    return Prompts([text for _, text in encoded], [ids for ids, _ in encoded], metadata, note)


def _apart(text: str, other: str) -> tuple[str, str]:
    """Where two texts differ, each in quotes, with a little of what stands before."""
    same = len(os.path.commonprefix([text, other]))
    start = max(same - _SHOWN_BEFORE, 0)
    return tuple(repr(one[start : same + _SHOWN_BEHIND]) for one in (text, other))
