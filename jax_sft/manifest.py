"""When a checkpoint counts: its manifest stands, and every file is as the manifest says.

In comes a folder of steps, `<folder>/<step>/...`; out come the complete ones, and in one
line what is wrong with a damaged one. The manifest is written last, by rename, and removed
first, so that a process killed at any moment leaves a step complete or incomplete, never
in between. Knows files alone: neither arrays nor Orbax.
"""

import concurrent.futures
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"\d+(\.orbax-checkpoint-tmp.*)?")
_CHUNK_BYTES = 1 << 22


def complete_steps(folder: Path) -> list[int]:
    """Returns the steps under `folder` that have a manifest, ascending."""
    names = [path.parent.name for path in folder.glob(f"*/{MANIFEST}")]
    return sorted(int(name) for name in names if name.isdecimal())


def write_manifest(step_folder: Path, body: dict[str, Any]) -> None:
    """Makes a step complete: writes `body` with the size and checksum of every file.

    Args:
        step_folder: the step's folder, in which nothing is written any more.
        body: what JSON gives back unchanged; "files" is added to it.
    """
    files = {
        path.relative_to(step_folder).as_posix(): {
            "bytes": path.stat().st_size,
            "crc32": _crc32(path),
        }
        for path in sorted(step_folder.rglob("*"))
        if path.is_file()
    }
    body = {**body, "files": files}
    temporary = step_folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps({"crc32": _body_crc32(body), "body": body}, indent=1))
    temporary.rename(step_folder / MANIFEST)


def read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """Returns the body of a complete step's manifest.

    Raises:
        ValueError: there is no such complete step, or the manifest itself is damaged.
    """
    steps = complete_steps(folder)
    if step not in steps:
        raise ValueError(f"no complete checkpoint of step {step} in {folder}; complete: {steps}")
    try:
        manifest = json.loads((folder / str(step) / MANIFEST).read_bytes())
        body = manifest["body"]
        intact = manifest["crc32"] == _body_crc32(body)
    except (ValueError, LookupError, TypeError):
        intact = False
    if not intact:
        raise ValueError(_damage(folder, step, MANIFEST, "its own checksum does not hold"))
    return body


def find_damage(folder: Path, step: int, files: dict[str, dict[str, int]]) -> str:
    """Compares every file of a step with the manifest's `files`.

    Returns:
        One line that names the first damaged file and the remedy; "" where all are whole.
    """
    step_folder = folder / str(step)
    for name, entry in files.items():
        if not (step_folder / name).is_file():
            return _damage(folder, step, name, "it is missing")
        size = (step_folder / name).stat().st_size
        if size != entry["bytes"]:
            return _damage(folder, step, name, f"it has {size} bytes, not {entry['bytes']}")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sums = pool.map(_crc32, [step_folder / name for name in files])
        for (name, entry), crc32 in zip(files.items(), sums, strict=True):
            if crc32 != entry["crc32"]:
                return _damage(folder, step, name, "its checksum differs from the manifest's")
    return ""


def remove_incomplete(folder: Path) -> None:
    """Removes the steps, and Orbax's temporary folders, that have no manifest."""
    for path in folder.iterdir():
        if _STEP_FOLDER.fullmatch(path.name) and not (path / MANIFEST).is_file():
            shutil.rmtree(path)


def remove_step(folder: Path, step: int) -> None:
    """Removes a complete step, the manifest first: killed half-way, it is incomplete."""
    (folder / str(step) / MANIFEST).unlink()
    shutil.rmtree(folder / str(step))


def _damage(folder: Path, step: int, name: str, what: str) -> str:
    earlier = [other for other in complete_steps(folder) if other < step]
    remedy = (
        f"delete {folder / str(step)} to use step {earlier[-1]}, the newest complete one before it"
        if earlier
        else "no earlier complete step is left, so start anew in another folder"
    )
    return f"checkpoint file {folder / str(step) / name} is damaged: {what}; {remedy}"


def _body_crc32(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _crc32(path: Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32
