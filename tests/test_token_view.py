"""Tokens are shown as text with what is trained, in colour or without, and none is hidden."""

import io

import numpy as np
import pytest
from rich.console import Console
from small_tokenizers import byte_bpe, metaspace, packaged_bytes

from jax_sft.data.token_view import (
    Gap,
    Piece,
    coloured,
    coloured_prompt,
    draw_examples,
    legend,
    pieces,
)
from jax_sft.data.types import Example, examples_from_parts

EOS = "<|endoftext|>"


def example(context, trained, *, tokenizer=None, weight=1.0, eos=True):
    tokenizer = tokenizer or packaged_bytes()
    head, tail = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, trained)
    )
    ids = [*head, *tail, *([tokenizer.eos_token_id] if eos else [])]
    weights = [0.0] * len(head) + [weight] * (len(ids) - len(head))
    as_array = [np.array(part, np.int32) for part in (ids[:-1], ids[1:])]
    return Example(*as_array, np.array(weights[1:], np.float32), tokenizer, "row 0")


def console(encoding="utf-8", **options):
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), width=80, **options)


def in_colour():
    return console(force_terminal=True, color_system="standard")


def test_pieces_by_hand():
    assert pieces(example("aé", "b")) == [
        Piece("a", (97,), 0.0, False),
        Piece("é", (195, 169), 0.0, False),
        Piece("b", (98,), 1.0, False),
        Piece(EOS, (256,), 1.0, True),
    ]


@pytest.mark.parametrize("tokenizer", [packaged_bytes, byte_bpe, metaspace])
@pytest.mark.parametrize("text", ["hello there, world", "é 日本語 🙂\n\tx  y", "a\u200db\x1b[31m"])
def test_pieces_are_the_whole_text_and_every_id(tokenizer, text):
    given = example("low world", f" {text}", tokenizer=tokenizer())
    shown = pieces(given)
    assert [i for piece in shown for i in piece.ids] == given.ids
    assert "".join(piece.text for piece in shown[:-1]).strip() == f"low world {text}"
    assert [piece.is_special for piece in shown] == [False] * (len(shown) - 1) + [True]


def test_a_character_is_not_joined_over_the_masks_edge():
    tokenizer = packaged_bytes()
    ids = np.array(tokenizer("aéb")["input_ids"], np.int32)
    edge = Example(ids[:-1], ids[1:], np.array([0, 1, 1], np.float32), tokenizer)
    assert [(piece.text, piece.weight) for piece in pieces(edge)] == [
        ("a", 0.0),
        ("Ã", 0.0),
        ("©", 1.0),
        ("b", 1.0),
    ]


def test_long_runs_lose_their_middle_and_no_edge():
    shown = pieces(example("x" * 30, "y" * 5), longest_run=10)
    assert shown[5] == Gap(20, 0.0)
    assert "".join(piece.text for piece in shown if isinstance(piece, Piece)) == (
        "x" * 10 + "y" * 5 + EOS
    )
    text = coloured(example("x" * 30, "y"), console=console(), longest_run=10).plain
    assert text == f"xxxxx[... 20 tokens ...]xxxxx⟦y{EOS}⟧"


def test_colours_show_the_mask_and_hide_no_token():
    text = coloured(example("ab", "cd"), console=in_colour())
    assert text.plain == f"abcd{EOS}"
    trained = [text.plain[s.start : s.end] for s in text.spans if "bold underline" in s.style]
    assert trained == ["c", "d", EOS]
    assert [text.plain[s.start : s.end] for s in text.spans if "magenta" in s.style] == [EOS]


@pytest.mark.parametrize(
    ("where", "marked"),
    [
        (console(), f"ab⟦cd{EOS}⟧"),
        (console("ascii"), f"ab[[cd{EOS}]]"),
        (console(force_terminal=True, color_system="standard", no_color=True), f"ab⟦cd{EOS}⟧"),
    ],
    ids=["pipe", "ascii", "NO_COLOR"],
)
def test_without_colours_brackets_show_the_mask(where, marked):
    assert coloured(example("ab", "cd"), console=where).plain == marked
    assert legend(where).plain.replace("trained", f"cd{EOS}", 1).startswith(marked[2:])


def test_other_weights_are_written():
    assert coloured(example("ab", "c", weight=0.5), console=console()).plain == f"ab⟦0.5:c{EOS}⟧"
    assert "0.5:" in coloured(example("ab", "c", weight=0.5), console=in_colour()).plain


def test_ids_have_the_same_marks():
    given = example("ab", "cd")
    a, b, c, d, eos = given.ids
    assert coloured(given, console=console(), what="ids").plain == f"{a} {b} ⟦{c} {d} {eos}⟧"
    weighted = coloured(example("ab", "c", weight=0.5), console=console(), what="ids").plain
    assert weighted == f"{a} {b} ⟦0.5: {c} {eos}⟧"


def test_a_prompt_is_all_context():
    ids = packaged_bytes()("a\nb")["input_ids"]
    shown = coloured_prompt(ids, packaged_bytes(), console=console()).plain
    assert shown == "a↵\nb"
    shown = coloured_prompt(ids, packaged_bytes(), console=console("ascii")).plain
    assert shown == "a\\n\nb"


def test_the_data_cannot_steer_the_terminal():
    where = in_colour()
    where.print(coloured(example("a\x1b]0;title\x07", "[bold]\x1b[2J"), console=where))
    where.file.flush()
    written = where.file.buffer.getvalue().decode()
    assert "\x1b]" not in written and "\x1b[2J" not in written and "\x07" not in written
    assert "\\x1b" in coloured(example("a\x1b", "b"), console=where).plain


def test_an_example_without_a_tokenizer_is_refused():
    nothing = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="has no tokenizer"):
        pieces(Example(nothing, nothing, np.ones(1, np.float32)))


@pytest.mark.parametrize("number", [0, 1, 3, 7, 99])
def test_examples_are_drawn_from_every_part(number):
    one = (np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.float32))
    examples = examples_from_parts([one] * 21, origins=[str(index) for index in range(21)])
    drawn = [int(example.origin) for example in draw_examples(examples, number)]
    assert drawn == [int(example.origin) for example in draw_examples(examples, number)]
    assert len(drawn) == min(number, 21) and drawn[:1] in ([], [0])
    assert [index * len(drawn) // 21 for index in drawn] == list(range(len(drawn)))
    assert draw_examples(examples[:0], number) == []
