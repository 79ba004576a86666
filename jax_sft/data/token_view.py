"""An example as a person reads it: pieces of text, each trained, context or special.

What comes in is an Example, what goes out are Pieces for the report's page, or lines for a
terminal: in colour, or with the trained tokens in brackets where there are no colours. The
weights decide what counts as trained, never the ids.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from rich.console import Console
from rich.text import Text

from jax_sft.data.types import Example, Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS_A_CHARACTER = 4  # UTF-8 has at most four bytes a character
_STYLES = {  # trained, special: neighbours alternate, so that tokens can be told apart
    (True, False): ("bold underline green", "bold underline cyan"),
    (False, False): ("dim", "dim blue"),
    (True, True): ("bold underline magenta",) * 2,
    (False, True): ("magenta",) * 2,
}


class Piece(NamedTuple):
    """The least run of tokens that is text: one token, or those of one character.

    Attributes:
        text: what it says; a special token is named.
        ids: its tokens.
        weight: in the loss; 0 for context.
        is_special: whether it is one of the tokenizer's special tokens.
    """

    text: str
    ids: tuple[int, ...]
    weight: float
    is_special: bool


class Gap(NamedTuple):
    """Tokens of one weight that are left out of a long run."""

    num_tokens: int
    weight: float


def pieces(example: Example, *, longest_run: int = 400) -> list[Piece | Gap]:
    """An example's tokens as text; within long runs of one weight the middle is left out.

        ids       97  195  169   98  256         "aéb" and EOS in bytes; "b" and EOS are trained
        pieces    "a" "é"        "b" "<|endoftext|>"

    Args:
        example: with its tokenizer.
        longest_run: tokens of one weight, one after another, that are all shown.

    Raises:
        ValueError: the example has no tokenizer.
    """
    if example.tokenizer is None:
        raise ValueError("this Example has no tokenizer to show tokens with; give Examples one")
    weights = [0.0, *example.weights_T.tolist()]
    shown: list[Piece | Gap] = []
    for weight, run in itertools.groupby(
        zip(example.ids, weights, strict=True), key=lambda token: token[1]
    ):
        ids = [token_id for token_id, _ in run]
        end = longest_run // 2
        if len(ids) <= longest_run:
            shown += _pieces_of_run(ids, weight, example.tokenizer)
            continue
        shown += _pieces_of_run(ids[:end], weight, example.tokenizer)
        shown.append(Gap(len(ids) - 2 * end, weight))
        shown += _pieces_of_run(ids[len(ids) - end :], weight, example.tokenizer)
    return shown


def draw_examples(examples: Examples, number: int) -> list[Example]:
    """The first example, and from each further part of the data one drawn, always the same.

    So that each large source has one, and rows that recur in a rhythm are not all alike.
    """
    number = min(number, len(examples))
    draw = random.Random(0)
    starts = [index * len(examples) // max(number, 1) for index in range(number + 1)]
    drawn = [draw.randrange(low, high) for low, high in itertools.pairwise(starts)]
    return [examples[index] for index in [0, *drawn[1:]][:number]]


def prompt_pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A prompt's tokens, none of them trained."""
    return list(_pieces_of_run(list(ids), 0.0, tokenizer))


def _pieces_of_run(
    ids: list[int], weight: float, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Piece]:
    special = _special_ids(tokenizer)
    start = 0
    while start < len(ids):
        if ids[start] in special:
            name = str(tokenizer.convert_ids_to_tokens(ids[start]))
            yield Piece(name, (ids[start],), weight, True)
            start += 1
            continue
        for end in range(start + 1, min(start + _TOKENS_A_CHARACTER, len(ids)) + 1):
            text = _continued(ids[start:end], tokenizer)
            if text and "\ufffd" not in text:
                break
        else:  # a part of a character, or nothing that can be seen: the tokenizer's own name
            end = start + 1
            text = str(tokenizer.convert_ids_to_tokens(ids[start]))
        yield Piece(text, tuple(ids[start:end]), weight, False)
        start = end


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _continued(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text behind other text, where many decoders keep the space that they strip in front."""
    lead, lead_text = _lead(tokenizer)
    text = _decoded([*lead, *ids], tokenizer)
    return text.removeprefix(lead_text) if text.startswith(lead_text) else _decoded(ids, tokenizer)


@functools.lru_cache(maxsize=4)
def _lead(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    lead = tokenizer("a", add_special_tokens=False)["input_ids"]
    return lead, _decoded(lead, tokenizer)


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def has_colours(console: Console) -> bool:
    """Whether what is printed there will be in colour."""
    return console.color_system is not None and not console.no_color


def printable(text: str, console: Console) -> str:
    """Text that a console's encoding can hold, with what is not printable escaped.

    So the data cannot steer the terminal. Line ends and tabs stay.
    """
    escaped = "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
    return escaped.encode(console.encoding, "backslashreplace").decode(console.encoding)


def coloured(
    example: Example,
    *,
    console: Console | None = None,
    what: Literal["text", "ids"] = "text",
    longest_run: int = 400,
) -> Text:
    """An example's tokens for a terminal, so that one sees what is trained.

        in colour       context dim, trained bold and underlined, special tokens magenta
        without         Hi there[[ Hello<|endoftext|>]]     on a console that has Unicode: ⟦ ⟧
        weight 0.5      Hi there[[0.5: Hello]]

    Args:
        example: with its tokenizer.
        console: where it is to be printed; None is standard output.
        what: "text", or "ids" for the tokens' ids.
        longest_run: tokens of one weight, one after another, that are all shown.
    """
    return _coloured(pieces(example, longest_run=longest_run), console or Console(), what)


def coloured_prompt(
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    console: Console | None = None,
    what: Literal["text", "ids"] = "text",
) -> Text:
    """A prompt's tokens, likewise."""
    return _coloured(prompt_pieces(ids, tokenizer), console or Console(), what)


def _coloured(shown: Sequence[Piece | Gap], console: Console, what: str) -> Text:
    in_colour = has_colours(console)
    left, right = ("[[", "]]") if _is_ascii(console) else ("⟦", "⟧")
    text = Text()
    for weight, run in itertools.groupby(shown, key=lambda piece: piece.weight):
        is_trained = weight > 0
        words = _words(list(run), console, what)
        if is_trained and not in_colour:
            text.append(left)
        if weight not in (0.0, 1.0):
            text.append(f"{weight:g}:", style="italic yellow")
            text.append(" " if what == "ids" else "")
        for index, (word, is_special) in enumerate(words):
            text.append(word, style=_STYLES[is_trained, is_special][index % 2])
            if what == "ids" and index < len(words) - 1:
                text.append(" ")
        if is_trained and not in_colour:
            text.append(right)
        if what == "ids":
            text.append(" ")
    if what == "ids":
        text.rstrip()
    return text


def _words(run: list[Piece | Gap], console: Console, what: str) -> list[tuple[str, bool]]:
    """What is printed for each piece, and whether it is special."""
    words = []
    for piece in run:
        if isinstance(piece, Gap):
            words.append((f"[... {piece.num_tokens:,} tokens ...]", False))
        elif what == "ids":
            words.append((" ".join(map(str, piece.ids)), piece.is_special))
        else:
            end_of_line = "\\n\n" if _is_ascii(console) else "↵\n"
            shown = printable(piece.text, console).replace("\n", end_of_line)
            words.append((shown, piece.is_special))
    return words


def _is_ascii(console: Console) -> bool:
    return console.options.ascii_only


def legend(console: Console) -> Text:
    """What the colours, or the brackets, mean."""
    if not has_colours(console):
        left, right = ("[[", "]]") if _is_ascii(console) else ("⟦", "⟧")
        return Text(f"{left}trained{right}, the rest is context")
    text = Text()
    for name, key in {
        "trained": (True, False),
        "context": (False, False),
        "special": (False, True),
        "special, trained": (True, True),
    }.items():
        text.append(name, style=_STYLES[key][0]).append("   ")
    text.rstrip()
    return text
