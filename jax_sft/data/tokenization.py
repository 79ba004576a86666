"""Samples to Examples: the only place that decides which tokens are trained.

What comes in is text in turns, what goes out are shifted ids with weights. Weights
follow from the position of a token's turn, never from a token's id. A prompt for
evaluation goes through the same encoder, so that its ids are the exact prefix that
training masked; the way back, from sampled ids to text, is here too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from jax_sft.data.encoding import Dialogue, decode_continuations, encode_dialogues, own_bos_ids
from jax_sft.data.types import Counts, Examples, Sample, Turn, examples_from_parts, join_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AddEos = bool | Literal["last"]
Shifted = tuple[np.ndarray, np.ndarray, np.ndarray]

_SAMPLES_A_CALL = 2000  # fast tokenizers spread one call's texts over the cores


def load_tokenizer(
    path: str | Path,
    *,
    truncation_side: str = "right",
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer with transformers' AutoTokenizer.

    Args:
        path: a folder, or a name on the Hugging Face hub.
        truncation_side: "left" or "right", kept in what the tokenizer saves.
        chat_template: a Jinja template, or a file that holds one; None keeps its own.

    Raises:
        ValueError: there is no tokenizer to load under this path.
    """
    from transformers import AutoTokenizer  # takes seconds to import; most modules need none

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"tokenizer_path {str(path)!r}: no tokenizer could be loaded ({reason}); pass a folder "
            "that holds tokenizer.json, or a hub name with the network reachable"
        ) from error
    _check_choice("truncation_side", truncation_side, ("left", "right"))
    tokenizer.truncation_side = truncation_side
    if chat_template is not None:
        is_file = "{" not in chat_template and Path(chat_template).is_file()
        tokenizer.chat_template = Path(chat_template).read_text() if is_file else chat_template
    return tokenizer


def tokenize_samples(
    samples: Iterable[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_length: int,
    truncation_side: str = "right",
    add_bos: bool | None = None,
    add_eos: AddEos = True,
    over_length: str = "truncate",
) -> tuple[Examples, Counts]:
    """Turns samples into shifted, weighted examples of at most seq_length inputs.

        turns        "Hi" (prompt)   " there" (output)
        ids          BOS Hi          there EOS
        inputs_T     BOS Hi there
        targets_T    Hi there EOS
        weights_T    0   1    1

    Args:
        samples: as `read_samples` gives them.
        tokenizer: any transformers tokenizer; it may have no pad token.
        seq_length: the most inputs an example may have, in tokens.
        truncation_side: the side that "truncate" cuts off; a BOS stays in front.
        add_bos: None as the tokenizer itself does, True or False.
        add_eos: True after every output, "last" after the last one only, or False.
        over_length: what happens to longer samples: "truncate", "split" into chunks that
            train every target once, "drop" or "error".

    Returns:
        The examples in the order of the samples, and what became of every sample.

    Raises:
        ValueError: a bad option, or with "error" a sample that is too long.
    """
    _check_choice("truncation_side", truncation_side, ("left", "right"))
    _check_choice("over_length", over_length, ("truncate", "split", "drop", "error"))
    if seq_length < 1:
        raise ValueError(f"seq_length is {seq_length}; an example needs at least 1 input token")
    bos_ids = _bos_ids(tokenizer, add_bos)
    eos_id = _eos_id(tokenizer, add_eos)
    counts = Counts(stop_token=None if eos_id is None else tokenizer.eos_token)
    for reason, num_rows in getattr(samples, "dropped", {}).items():
        counts.drop(reason, num_rows)
    blocks: list[Examples] = []
    origins: list[str] = []
    stream = iter(samples)
    while chunk := list(itertools.islice(stream, _SAMPLES_A_CALL)):
        parts: list[Shifted] = []
        ends = [_ends(sample.turns, add_eos) for sample in chunk]
        dialogues = encode_dialogues(
            [[turn.text for turn in sample.turns] for sample in chunk],
            tokenizer,
            ends=ends,
            bos_ids=bos_ids,
            eos_id=eos_id,
        )
        for sample, dialogue, answer_ends in zip(chunk, dialogues, ends, strict=True):
            ids, trained = _join(dialogue, sample)
            fitted = _fit(
                ids,
                trained,
                num_bos=len(dialogue.bos_ids),
                seq_length=seq_length,
                truncation_side=truncation_side,
                over_length=over_length,
                origin=sample.origin,
            )
            _count(
                counts,
                fitted,
                num_retokenized=dialogue.retokenized,
                num_answers=sum(answer_ends),
                eos_id=eos_id,
            )
            parts += fitted.parts
            origins += [sample.origin] * len(fitted.parts)
        blocks.append(examples_from_parts(parts))
    return join_examples(blocks, tokenizer=tokenizer, origins=origins), counts


class _Fitted(NamedTuple):
    """What a sample became: fate is "kept", "truncated", "split" or a reason to drop."""

    parts: list[Shifted]
    fate: str
    num_untrained: int = 0


def _bos_ids(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> list[int]:
    own = [] if add_bos is False else own_bos_ids(tokenizer)
    if not add_bos or own:
        return own
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "tokenizer.add_bos is True, but the tokenizer has no BOS token; set its bos_token, or "
            "leave add_bos at None"
        )
    return [tokenizer.bos_token_id]


def _eos_id(tokenizer: PreTrainedTokenizerBase, add_eos: AddEos) -> int | None:
    _check_choice("add_eos", add_eos, (True, "last", False))
    if add_eos is False:
        return None
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer.add_eos is {add_eos!r}, but the tokenizer has no EOS token; set its "
            "eos_token, or set add_eos to False"
        )
    return tokenizer.eos_token_id


def _ends(turns: Sequence[Turn], add_eos: AddEos) -> list[bool]:
    """Where EOS follows: after every trained turn, or after the last of them."""
    ends = [add_eos is not False and turn.trained for turn in turns]
    if add_eos == "last":
        ends[:-1] = [False] * (len(ends) - 1)
    return ends


def _join(dialogue: Dialogue, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the whole dialogue, and which of them belong to trained turns."""
    pieces = [dialogue.bos_ids, *dialogue.pieces]
    ids = np.fromiter(itertools.chain.from_iterable(pieces), np.int32)
    trained = np.repeat(
        [False, *(turn.trained for turn in sample.turns)], [len(piece) for piece in pieces]
    )
    return ids, trained


def _fit(
    ids: np.ndarray,
    trained: np.ndarray,
    *,
    num_bos: int,
    seq_length: int,
    truncation_side: str,
    over_length: str,
    origin: str,
) -> _Fitted:
    """Shifts, and brings what is longer than seq_length to length."""
    fate, length = "kept", len(ids) - 1
    if length > seq_length:
        if over_length == "error":
            raise ValueError(
                f"{origin} has {length} input tokens, more than seq_length {seq_length}; raise "
                'train.seq_length, or set data.over_length to "truncate", "split" or "drop"'
            )
        if over_length == "drop":
            return _Fitted([], "over_length")
        fate = "split" if over_length == "split" else "truncated"
    if fate == "truncated" and truncation_side == "right":
        ids, trained = ids[: seq_length + 1], trained[: seq_length + 1]
    elif fate == "truncated":
        num_tail = max(seq_length + 1 - num_bos, 1)
        cut = len(ids) - num_tail
        trained = np.concatenate([trained[:num_bos], [False], trained[cut + 1 :]])
        ids = np.concatenate([ids[:num_bos], ids[cut:]])
    weights = trained[1:].astype(np.float32)
    chunks = [
        (
            ids[lo : lo + seq_length],
            ids[lo + 1 : lo + 1 + seq_length],
            weights[lo : lo + seq_length],
        )
        for lo in range(0, len(ids) - 1, seq_length)
    ]
    parts = [chunk for chunk in chunks if chunk[2].any()]
    if not parts:
        return _Fitted([], "no_trained_token")
    return _Fitted([(i[: len(w)], t, w) for i, t, w in parts], fate, len(chunks) - len(parts))


def _count(
    counts: Counts,
    fitted: _Fitted,
    *,
    num_retokenized: int,
    num_answers: int,
    eos_id: int | None,
) -> None:
    """Counts a sample's fate, and looks for its stop tokens in what will be trained."""
    counts.retokenized_boundaries += num_retokenized
    if not fitted.parts:
        counts.drop(fitted.fate)
        return
    counts.rows_read += 1
    counts.kept += 1
    counts.truncated += fitted.fate == "truncated"
    counts.split += fitted.fate == "split"
    counts.untrained_chunks += fitted.num_untrained
    if eos_id is None or fitted.fate == "truncated":
        return
    num_stops = sum(
        int(np.count_nonzero((targets == eos_id) & (weights > 0)))
        for _, targets, weights in fitted.parts
    )
    counts.untruncated_answers += num_answers
    counts.answers_without_stop += max(num_answers - num_stops, 0)
    counts.rows_with_more_stops += num_stops > num_answers


def prompt_ids(
    prompt: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_bos: bool | None = None,
    add_eos: AddEos = True,
) -> list[int]:
    """The ids that training put before the answer to this prompt.

    Args:
        prompt: text, or [prompt, output, ..., prompt] texts.
        tokenizer: the tokenizer of the training run.
        add_bos: as in `tokenize_samples`.
        add_eos: as in `tokenize_samples`: it decides what ends the outputs inside a
            longer prompt.

    Raises:
        ValueError: the prompt does not end in a prompt, or has no token at all.
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"prompt holds {text!r}; pass a str, or a list of str")
    if len(texts) % 2 == 0:
        raise ValueError(
            f"prompt has {len(texts)} texts; pass [prompt, output, ..., prompt], which ends in a "
            "prompt and so has an odd number"
        )
    ends = [add_eos is True and index % 2 == 1 for index in range(len(texts))]
    [dialogue] = encode_dialogues(
        [texts],
        tokenizer,
        ends=[ends],
        bos_ids=_bos_ids(tokenizer, add_bos),
        eos_id=_eos_id(tokenizer, add_eos) if any(ends) else None,
    )
    ids = [*dialogue.bos_ids, *itertools.chain.from_iterable(dialogue.pieces)]
    if not ids:
        raise ValueError(
            f"prompt {texts[-1]!r} has no tokens and the tokenizer adds no BOS; pass some text, "
            "or set tokenizer.add_bos=True"
        )
    return ids


def decode_outputs(
    outputs_ids: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_sequences: Sequence[str] = (),
) -> list[str]:
    """Turns sampled ids into text that continues the prompt's.

    Special tokens are skipped, the text ends before the earliest stop sequence, and
    white space at its end is taken off. Ids are decoded behind a known text, so that
    the space of a first "▁word" survives; whole texts are cut, never bytes.

    Args:
        outputs_ids: one sequence of ids an output; they are left as they are.
        tokenizer: the tokenizer of the prompts.
        stop_sequences: non-empty strings.

    Returns:
        One str an output.

    Raises:
        ValueError: stop_sequences is a str or holds an empty string.
    """
    check_stop_sequences(stop_sequences)
    outputs = []
    for text in decode_continuations(outputs_ids, tokenizer):
        ends = [end for stop in stop_sequences if (end := text.find(stop)) >= 0]
        outputs.append(text[: min(ends, default=len(text))].rstrip())
    return outputs


def check_stop_sequences(stop_sequences: Sequence[str]) -> None:
    """Raises ValueError unless stop_sequences is a sequence of non-empty strings."""
    if isinstance(stop_sequences, str):
        raise ValueError(
            f"stop_sequences is the str {stop_sequences!r}; pass a list: [{stop_sequences!r}]"
        )
    for index, stop in enumerate(stop_sequences):
        if not isinstance(stop, str) or not stop:
            raise ValueError(
                f"stop_sequences[{index}] is {stop!r}; every stop sequence must be a non-empty str"
            )


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} is {value!r}; choose one of {listed}")
