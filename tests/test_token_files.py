"""What is written block by block is what is mapped; whatever is damaged is found."""

import json

import numpy as np
import pytest

from jax_sft.data.token_files import (
    DTYPES,
    TokenWriter,
    check_arrays,
    map_arrays,
    read_manifest,
    time_of_manifest,
)
from jax_sft.data.tokenization import Part
from jax_sft.data.types import Counts

ABOUT = {"source": "here", "name": ["line ", "", 1]}
FILES = [*(f"{name}.npy" for name in DTYPES), "numbers.npy", "manifest.json"]


def part(number, lengths):
    tokens = np.arange(sum(lengths), dtype=np.int32) + 100 * number
    return Part(
        tokens,
        tokens + 1,
        (tokens % 3).astype(np.float32),
        np.array(lengths, np.int64),
        np.arange(len(lengths), dtype=np.int64),
        Counts(rows_read=len(lengths), kept=len(lengths), stop_tokens={"</s>": number}),
    )


PARTS = [part(0, [3, 1, 2]), part(1, []), part(2, [5]), part(3, [1, 1])]
ROWS = [0, 10, 20, 30]


def build(folder, *, from_block=0, until=4, finish=True):
    writer = TokenWriter(folder)
    assert writer.num_blocks == from_block
    for one, row in list(zip(PARTS, ROWS, strict=True))[from_block:until]:
        writer.append(one, row)
    if finish:
        writer.finish(ABOUT, np.array([4, 9]))
    writer.close()
    return folder


def assert_whole(folder):
    body = read_manifest(folder)
    check_arrays(folder, body)
    arrays, numbers = map_arrays(folder, body)
    assert arrays["offsets"].tolist() == [0, 3, 4, 6, 11, 12, 13]
    assert arrays["rows"].tolist() == [0, 1, 2, 20, 30, 31]
    for name in ("inputs", "targets", "weights"):
        np.testing.assert_array_equal(
            arrays[name], np.concatenate([getattr(one, name) for one in PARTS])
        )
        assert arrays[name].dtype == getattr(PARTS[0], name).dtype
        assert type(arrays[name]) is np.ndarray and not arrays[name].flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            arrays[name][0] = 0
    assert numbers.tolist() == [4, 9]
    counts = Counts(rows_read=6, kept=6, stop_tokens={"</s>": 6})
    assert (body["about"], Counts(**body["counts"])) == (ABOUT, counts)


def test_blocks_are_mapped_as_they_were_written(tmp_path):
    build(tmp_path / "new" / "folder")
    assert_whole(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(FILES)


def test_the_files_are_arrays_that_numpy_loads(tmp_path):
    build(tmp_path)
    assert np.load(tmp_path / "offsets.npy").tolist() == [0, 3, 4, 6, 11, 12, 13]


def test_no_block_is_a_whole_folder_too(tmp_path):
    writer = TokenWriter(tmp_path)
    writer.finish({}, None)
    body = read_manifest(tmp_path)
    check_arrays(tmp_path, body)
    arrays, numbers = map_arrays(tmp_path, body)
    assert len(arrays["inputs"]) == 0 and arrays["offsets"].tolist() == [0] and numbers is None


@pytest.mark.parametrize("until", range(len(PARTS) + 1))
def test_a_build_goes_on_behind_the_finished_blocks(tmp_path, until):
    build(tmp_path, until=until, finish=False)
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path)
    with pytest.raises(FileNotFoundError):
        time_of_manifest(tmp_path)
    build(tmp_path, from_block=until)
    assert_whole(tmp_path)


@pytest.mark.parametrize("name", ["inputs.npy", "weights.npy", "offsets.npy", "blocks.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "gone"])
def test_a_build_goes_on_behind_the_last_intact_block(tmp_path, name, damage):
    """The last of three blocks is damaged, or what a killed process began to write behind it."""
    build(tmp_path, until=3, finish=False)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[-5] ^= 1
        changed = {"cut": data[:-1], "longer": path.read_bytes() + b"half", "flipped": data}
        path.write_bytes(changed[damage])
    build(tmp_path, from_block={"longer": 3, "gone": 0}.get(damage, 2))
    assert_whole(tmp_path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "longer", "first", "middle", "last", "gone", "empty"])
def test_damage_of_a_whole_folder_is_found(tmp_path, name, damage):
    build(tmp_path)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    at = {"first": 0, "middle": len(data) // 2, "last": len(data) - 1}.get(damage)
    if damage == "gone":
        path.unlink()
    elif at is not None:
        data[at] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes({"cut": data[:-1], "longer": data + b"\0", "empty": b""}[damage])
    with pytest.raises((ValueError, OSError), match=name):
        check_arrays(tmp_path, read_manifest(tmp_path))


def test_a_manifest_of_another_kind_is_damage(tmp_path):
    for text in ("[]", "{}", "null", json.dumps({"crc32": 0, "body": {}})):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="manifest.json is damaged"):
            read_manifest(tmp_path)
