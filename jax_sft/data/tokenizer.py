"""A tokenizer, loaded with `transformers`, and the ids that it has for tokens given as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jax_sft.data.encoding import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Those of transformers that say what tokens there are, or how they are used.
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "vocab.json", "vocab.txt"),
)


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
    # They take seconds to import; most modules need none.
    from transformers import AutoTokenizer, LlamaTokenizer

    try:
        kind = LlamaTokenizer if _is_bare_sentencepiece(Path(path)) else AutoTokenizer
        tokenizer = kind.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"tokenizer_path {str(path)!r}: no tokenizer could be loaded ({reason}); pass a folder "
            "that holds tokenizer.json, or a hub name with the network reachable"
        ) from error
    if len(tokenizer) == len(
        {*map(str, tokenizer.added_tokens_decoder.values()), *tokenizer.all_special_tokens}
    ):
        # What transformers makes of a model's config where there are no files of a tokenizer.
        raise ValueError(
            f"tokenizer_path {str(path)!r}: its tokenizer has no tokens but special ones; pass a "
            "folder that holds tokenizer.json, or a hub name of one"
        )
    if truncation_side not in ("left", "right"):
        raise ValueError(f"truncation_side is {truncation_side!r}; choose one of 'left', 'right'")
    tokenizer.truncation_side = truncation_side
    if chat_template is not None:
        tokenizer.chat_template = _read_chat_template(chat_template)
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, whole or in part."""
    return any((folder / name).is_file() for name in _FILES)


def token_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a token by its text, as the tokenizer reads it."""
    [ids] = encode([token], tokenizer)
    return ids[0] if len(ids) == 1 else int(tokenizer.convert_tokens_to_ids(token))


def special_stop_ids(
    stop_sequences: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The ids of those stop sequences that are special tokens, which no decoded text shows."""
    known = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    known |= zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return [known[stop] for stop in stop_sequences if stop in known]


def _read_chat_template(template: str) -> str:
    """A template, or what the file of one holds: a file's name has no braces."""
    if "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"tokenizer.chat_template {template!r} has no braces, so that it names a file, and it "
            f"cannot be read ({error}); pass a Jinja template, or a file of one"
        ) from error


def _is_bare_sentencepiece(folder: Path) -> bool:
    """Whether a folder has a SentencePiece model and nothing that says how it is used.

    Causal models with such a file use it as Llama does: a space in front, BOS, byte fallback.
    """
    names = ("tokenizer.json", "tokenizer_config.json")
    has_model = (folder / "tokenizer.model").is_file()
    return has_model and not any((folder / name).exists() for name in names)
