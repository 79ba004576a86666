"""What tokenized data depends on, each part of it as a hash.

What comes in are a source's name, Samples or a tokenizer, what goes out is a hex digest that
differs where any id or mask might, or None where that cannot be told. Nothing is tokenized,
and a file's rows are not read: its bytes are.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import pickle
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import jax_sft
from jax_sft.data.samples import names_function
from jax_sft.data.sources import RowNames, file_splits, find_source, open_dataset
from jax_sft.data.types import Samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_BYTES = 1 << 22
_ROWS_A_CHUNK = 1000
# What a tokenizer's files say that changes no id: where it came from, and its last call.
_HARMLESS_FIELDS = ("is_local", "local_files_only", "name_or_path", "_commit_hash")
_LAST_CALL = ("truncation", "padding")
_PROBE = "  Hello, wörld!\n\n<s> 12345\t'tis [INST] naïve </s> 你好 🙂 \r\n"


def digest_of(*parts: Any) -> str:
    """The digest of what JSON can hold."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def source_fingerprint(
    source: str, *, split: str = "train", format: str | None = None, **reading: Any
) -> str | None:
    """The fingerprint of what `load_samples` would read, without reading its rows.

    Args:
        source: as for `load_samples`.
        split: likewise.
        format: likewise.
        reading: the other options that decide what a row holds.

    Returns:
        A digest; None for a function, whose samples only a call can tell.

    Raises:
        ValueError: there is nothing under this name.
    """
    if names_function(source):
        return None
    place = find_source(source, format=format)
    if place.what == "file":
        content = _file_digest(place.path)
    elif splits := file_splits(place, split):
        wanted = {split: splits[split]} if split in splits else splits
        content = [
            [name, [[str(path), _file_digest(path)] for path in paths]]
            for name, paths in wanted.items()
        ]
    else:
        # From the hub's revision or the files' times, and the split.
        content = open_dataset(place, split=split)._fingerprint
    return digest_of(place.what, place.source, place.kind, split, reading, content)


def samples_fingerprint(samples: Samples) -> str | None:
    """The fingerprint of samples that are there: of their rows, and of how they are read.

    Returns:
        A digest; None where something in a row, or what reads it, has no plain content.
    """
    rows = samples.rows
    try:
        reader = pickle.dumps(samples.to_content)
        content = getattr(rows, "_fingerprint", None) or _rows_digest(samples)
    except (TypeError, ValueError, AttributeError, RecursionError, pickle.PicklingError):
        return None
    if not isinstance(samples.name, RowNames):
        return None
    name = samples.name
    numbers = None if name.numbers is None else _bytes_digest(name.numbers.tobytes())
    named = [name.before, name.after, name.step, name.files, numbers]
    about = [samples.source, samples.format, samples.dropped]
    return digest_of(content, len(rows), _bytes_digest(reader), named, about)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The fingerprint of a tokenizer: of all that it saves, and of what it makes of a text.

    Returns:
        A digest; None for a tokenizer that cannot be saved.
    """
    saved: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except (NotImplementedError, OSError, TypeError, ValueError):
            return None
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                saved[path.relative_to(folder).as_posix()] = _tokenizer_file(path)
    probes = [
        list(tokenizer(_PROBE, add_special_tokens=special)["input_ids"])
        for special in (True, False)
    ]
    special = [str(token) for token in tokenizer.all_special_tokens]
    kind = [type(tokenizer).__module__, type(tokenizer).__qualname__]
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    return digest_of(saved, probes, special, tokenizer.chat_template, kind, versions)


@functools.cache
def code_fingerprint() -> str:
    """The fingerprint of our own code of the data wing: a version that nobody need raise."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return digest_of(jax_sft.__version__, [[path.name, _file_digest(path)] for path in files])


def _tokenizer_file(path: Path) -> Any:
    """A file's digest, or what it says without the fields that do not matter."""
    ignored = {"tokenizer.json": _LAST_CALL, "tokenizer_config.json": _HARMLESS_FIELDS}
    if path.name not in ignored:
        return _file_digest(path)
    fields = json.loads(path.read_text(encoding="utf-8"))
    return digest_of({key: fields[key] for key in fields if key not in ignored[path.name]})


def _file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _bytes_digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _rows_digest(samples: Samples) -> str:
    """Of rows that JSON and numpy can hold; others raise TypeError."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(samples), _ROWS_A_CHUNK):
        rows = samples.rows_in(start, start + _ROWS_A_CHUNK)
        digest.update(json.dumps(rows, default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return [str(value.dtype), value.shape, _bytes_digest(value.tobytes())]
    if isinstance(value, np.generic):
        return [str(value.dtype), value.item()]
    raise TypeError(f"{type(value).__name__} has no plain content")
