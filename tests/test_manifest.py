"""A step counts once its manifest stands, and only while its files are as the manifest says."""

import re

import pytest

from jax_sft.manifest import (
    MANIFEST,
    complete_steps,
    find_damage,
    read_manifest,
    remove_incomplete,
    remove_step,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path):
    """Steps 5 and 10 complete, each with two files; step 12 without a manifest."""
    for step in (5, 10, 12):
        (tmp_path / str(step) / "d").mkdir(parents=True)
        (tmp_path / str(step) / "tree").write_bytes(b"names")
        (tmp_path / str(step) / "d" / "values").write_bytes(bytes(range(100)))
    for step in (5, 10):
        write_manifest(tmp_path / str(step), {"step": step, "data": {"epoch": 1, "loss": 0.1}})
    return tmp_path


def test_a_step_counts_once_its_manifest_stands(folder):
    assert complete_steps(folder) == [5, 10]
    assert read_manifest(folder, 10)["data"] == {"epoch": 1, "loss": 0.1}
    assert find_damage(folder, 10, read_manifest(folder, 10)["files"]) == ""
    with pytest.raises(ValueError, match=re.escape("step 12")):
        read_manifest(folder, 12)


def test_incomplete_steps_are_removed_and_nothing_else(folder):
    (folder / "15.orbax-checkpoint-tmp").mkdir()
    (folder / "notes").mkdir()
    remove_incomplete(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["10", "5", "notes"]
    remove_step(folder, 5)
    assert complete_steps(folder) == [10]
    assert not (folder / "5").exists()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (flip, "checksum differs"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "99 bytes, not 100"),
        (lambda path: path.unlink(), "missing"),
    ],
    ids=["flipped", "truncated", "missing"],
)
def test_damage_names_the_file_and_the_earlier_step(folder, harm, what):
    files = read_manifest(folder, 10)["files"]
    harm(folder / "10" / "d" / "values")
    damage = find_damage(folder, 10, files)
    assert what in damage
    assert str(folder / "10" / "d" / "values") in damage
    assert "to use step 5" in damage
    assert "\n" not in damage
    remove_step(folder, 5)
    assert "start anew" in find_damage(folder, 10, files)


@pytest.mark.parametrize(
    "harm", [flip, lambda path: path.write_text("{"), lambda path: path.write_text("[1]")]
)
def test_the_manifest_guards_itself(folder, harm):
    harm(folder / "10" / MANIFEST)
    with pytest.raises(ValueError, match="manifest.json is damaged.*to use step 5"):
        read_manifest(folder, 10)
