"""Text to ids and back, for text that goes on from other text.

What comes in are the turns of a dialogue as strings, what goes out are each turn's ids
such that a prefix of the turns has a prefix of the ids. Training and evaluation prompts
both pass through `encode_dialogues`, which is why they cannot differ. Nothing here
knows which tokens are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands in front of a continuation while it is encoded: the first that does not merge.
_SENTINELS = ("\n", ":", "0", "a")


@dataclass
class Dialogue:
    """The ids of one dialogue: bos_ids, then pieces, one list of ids a turn.

    retokenized counts the turns whose start would have merged into the turn before.
    """

    bos_ids: list[int]
    pieces: list[list[int]] = field(default_factory=list)
    retokenized: int = 0
    # The text since the last EOS, which later turns are encoded together with.
    segment_text: str = ""
    segment_ids: list[int] = field(default_factory=list)
    is_continuation: bool = False


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Encodes each text by itself, without special tokens of the tokenizer's own.

    A special token that is spelled out in a text becomes that token. The tokenizer's
    call, unlike its backend, ignores a truncation stored in tokenizer.json.
    """
    if not texts:
        return []
    rows = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return [list(ids) if text else [] for text, ids in zip(texts, rows, strict=True)]


def encode_continuations(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Encodes each text as what follows other text, without a dummy leading space.

        tokenizer adds "▁" in front      "you"  ->  ▁you
        behind a sentinel               "\\nyou"  ->  ▁ \\n you     the ids of "\\n" are taken off

    A sentinel whose ids do not stay as they are in front of a text is replaced by the
    next one; where none does, the text is encoded by itself.
    """
    found: dict[int, list[int]] = {}
    for sentinel in _SENTINELS:
        waiting = [index for index in range(len(texts)) if index not in found]
        [lead] = encode([sentinel], tokenizer) if waiting else [[]]
        rows = encode([sentinel + texts[index] for index in waiting], tokenizer)
        for index, ids in zip(waiting, rows, strict=True):
            if lead and ids[: len(lead)] == lead:
                found[index] = ids[len(lead) :]
    alone = [index for index in range(len(texts)) if index not in found]
    found.update(zip(alone, encode([texts[index] for index in alone], tokenizer), strict=True))
    return [found[index] for index in range(len(texts))]


def encode_dialogues(
    dialogues: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends: Sequence[Sequence[bool]],
    bos_ids: Sequence[int],
    eos_id: int | None,
) -> list[Dialogue]:
    """Encodes dialogues turn by turn; a turn's ids never depend on later turns.

    A turn's ids are what follows the ids so far in the encoding of the text so far plus
    the turn. Where the ids so far are not a prefix of that, because text merges across
    the boundary, the turn is encoded as a continuation, and counted.

    Args:
        dialogues: the texts of each dialogue's turns.
        tokenizer: any transformers tokenizer.
        ends: for each turn, whether EOS follows it; an EOS that the text itself ends
            with is not doubled.
        bos_ids: what stands in front of every dialogue; not doubled either.
        eos_id: needed where anything in ends is True.

    Returns:
        One Dialogue each, in order.
    """
    states = [Dialogue(list(bos_ids)) for _ in dialogues]
    for turn in range(max(map(len, dialogues), default=0)):
        active = [index for index, texts in enumerate(dialogues) if turn < len(texts)]
        _encode_turn(
            [states[index] for index in active],
            [dialogues[index][turn] for index in active],
            tokenizer,
        )
        for index in active:
            if ends[index][turn]:
                _end_turn(states[index], eos_id)
    return states


def _encode_turn(
    states: list[Dialogue], texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Adds one turn's ids to each dialogue, in two or three calls of the tokenizer."""
    wholes: list[list[int]] = [[] for _ in states]
    for is_continuation, encoder in ((False, encode), (True, encode_continuations)):
        these = [i for i, s in enumerate(states) if s.is_continuation == is_continuation]
        rows = encoder([states[i].segment_text + texts[i] for i in these], tokenizer)
        for i, ids in zip(these, rows, strict=True):
            wholes[i] = ids
    merged = []
    for i, state in enumerate(states):
        num_before = len(state.segment_ids)
        if wholes[i][:num_before] == state.segment_ids:
            _add_piece(state, wholes[i][num_before:])
            state.segment_text += texts[i]
            state.segment_ids = wholes[i]
        else:
            merged.append(i)
    for i, ids in zip(
        merged, encode_continuations([texts[i] for i in merged], tokenizer), strict=True
    ):
        _add_piece(states[i], ids)
        states[i].retokenized += 1
        _start_segment(states[i], texts[i], ids)


def _start_segment(state: Dialogue, text: str, ids: list[int]) -> None:
    state.segment_text, state.segment_ids, state.is_continuation = text, ids, True


def _add_piece(state: Dialogue, ids: list[int]) -> None:
    num_bos = len(state.bos_ids)
    if not any(state.pieces) and ids[:num_bos] == state.bos_ids:
        ids = ids[num_bos:]  # the text spells the BOS out itself
    state.pieces.append(ids)


def _end_turn(state: Dialogue, eos_id: int) -> None:
    if state.pieces[-1][-1:] != [eos_id]:
        state.pieces[-1] = [*state.pieces[-1], eos_id]
    _start_segment(state, "", [])


def own_bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer by itself puts in front of a text, found by encoding one.

    Attributes such as `add_bos_token` are not consulted: they and the post-processor
    that does the work may disagree.
    """
    [plain] = encode(["a"], tokenizer)
    whole = list(tokenizer("a", return_attention_mask=False)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def decode_continuations(
    rows_ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Decodes ids as what follows other text; special tokens are skipped.

    Many decoders strip the space of a first "▁word"; behind a known letter it survives.
    """
    [lead] = encode(["a"], tokenizer)
    texts = _decode([lead + [int(i) for i in ids] for ids in rows_ids], tokenizer)
    [known] = _decode([lead], tokenizer)
    if all(text.startswith(known) for text in texts):
        return [text.removeprefix(known) for text in texts]
    return _decode(rows_ids, tokenizer)


def _decode(rows_ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [
        tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for ids in rows_ids
    ]
