"""What every reader of rows asks of a value: that it is a text, and one that is not empty.

What comes in is a value and where it stands, what goes out is the text; what is wrong
with it is a BadRow of one line that begins with the place.
"""

from __future__ import annotations

from typing import Any

from jax_sft.data.types import BadRow

# Longer texts are files that lost their line ends: tokenizers take gigabytes for them.
MOST_CHARACTERS = 5_000_000


def as_text(value: Any, where: str) -> str:
    """The value, if it is a str that UTF-8 can hold, and of no more than MOST_CHARACTERS."""
    if value is None:
        raise BadRow(f"{where} is None; pass a str", reason="missing_field")
    if not isinstance(value, str):
        remedy = "decode it to a str" if isinstance(value, bytes) else "pass a str"
        raise BadRow(f"{where} is {what(value)}; {remedy}", reason="wrong_type")
    if len(value) > MOST_CHARACTERS:
        raise BadRow(
            f"{where} has {len(value):,} characters; a text may have {MOST_CHARACTERS:,}: split it "
            "into rows",
            reason="gigantic_text",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{where} holds half of a surrogate pair at {error.start}; decode it as UTF-8 again",
            reason="not_text",
        ) from error
    return str(value)


def as_filled(value: Any, where: str, *, reason: str) -> str:
    """The value, if it is a text and not empty; reason is what an empty one counts as."""
    text = as_text(value, where)
    if not text:
        raise BadRow(
            f"{where} is empty, so there is nothing to train; leave this sample out, or set "
            "data.filter, as in \"output != ''\"",
            reason=reason,
        )
    return text


def what(value: Any) -> str:
    """A value and its type, cut to what fits in an error line."""
    return "None" if value is None else f"{short(value)} ({type(value).__name__})"


def short(value: Any) -> str:
    """A value's repr, cut to what fits in an error line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
