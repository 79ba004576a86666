"""The house: a file imports only from lower floors, and the package's face is lazy.

The floors are the picture of the package; a new file takes its place in it here.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = {
    "main": 6,
    "preview": 6,
    "plan": 6,
    "generate": 6,
    "export": 6,
    "train": 5,
    "fit": 5.5,
    "planned_step": 5.2,
    "estimate": 5,
    "recipe": 4,
    "startup": 4,
    "inputs": 3,
    "progress": 3,
    "evaluate": 2,
    "train_step": 2,
    "sampler": 2,
    "config": 2,
    "config_flags": 1,
    "config_keys": 0,
    "checkpoint": 1,
    "manifest": 0,
    "tracking": 1,
    "console": 0,
    "command": 1,
    "interrupt": 0.5,
    "failure": 0.7,
    "together": 0.5,
    "distributed": 0,
    "same_run": 4.5,
    "profiling": 0,
    "rounding": 0,
    "run_folder": 1,
    "resume_point": 0,
    "model_card": 0,
    "flops": 0,
    "loss": 1,
    "optimizer": 0,
    "sharding": 0,
    "topology": 0,
    "compiled": 0,
    "data/stream_batches": 2.5,
    "data/batches": 2,
    "data/report_page": 2.5,
    "data/report": 2,
    "data/packing": 1,
    "data/token_view": 1,
    "data/streams": 1.5,
    "data/token_cache": 2,
    "data/token_workers": 1.5,
    "data/token_files": 1.5,
    "data/fingerprint": 1.5,
    "data/samples": 1,
    "data/tokenization": 1,
    "data/tokenizer": 0.1,
    "data/chat": 0.8,
    "data/dialect": 0.7,
    "data/habits": 0.6,
    "data/template": 0.4,
    "data/encoding": 0,
    "data/row_filter": 0,
    "data/row_reader": 0.6,
    "data/conversations": 0.4,
    "data/token_rows": 0.4,
    "data/row_template": 0.4,
    "data/row_checks": 0.2,
    "data/csv_cells": 0,
    "data/sources": 0.2,
    "data/json_lines": 0.15,
    "data/text_files": 0.1,
    "data/types": 0,
    "model/causal_lm": 3,
    "model/adapter_files": 2.5,
    "model/pretrained": 2,
    "model/config_fields": 2,
    "model/placement": 1,
    "model/decoder": 1,
    "model/block": 0.8,
    "model/experts": 0.6,
    "model/grouped_matmul": 0,
    "model/layers": 0.4,
    "model/rotary": 0.2,
    "model/attention": 0.2,
    "model/attention_cudnn": 0.1,
    "model/attention_splash": 0,
    "model/attention_xla": 0,
    "model/name_table": 1,
    "model/families": 1,
    "model/lora": 0.2,
    "model/flax_files": 1,
    "model/weight_files": 0,
    "model/types": 0,
}


def floor_of(place: str) -> float | None:
    """The floor of a file such as data/types; each family has its folder's floor."""
    folder = place.rpartition("/")[0]
    return FLOORS[place] if place in FLOORS else FLOORS.get(folder)


def imported(source: str) -> Iterator[str]:
    """Each place of the package that a source imports, as data/types; "" for its face."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import with jax_sft in front"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *parts = name.split(".")
            if package == "jax_sft":
                yield next(_places(parts), "")


def _places(parts: list[str]) -> Iterator[str]:
    """The longest part of a dotted name that is a file or a folder with a floor."""
    for end in range(len(parts), 0, -1):
        place = "/".join(parts[:end])
        if place in FLOORS or (ROOT / "jax_sft" / f"{place}.py").exists():
            yield place


def upward_arrows(place: str, source: str) -> list[str]:
    """What a file imports that is not below it; families may build on one another."""
    top, families = floor_of(place), "model/families/"
    return [
        other
        for other in imported(source)
        if other
        and floor_of(other) >= top
        and not (place.startswith(families) and other.startswith(families))
    ]


def package_files() -> list[Path]:
    files = sorted((ROOT / "jax_sft").rglob("*.py"))
    assert len(files) > 10
    return [file for file in files if file.name != "__init__.py"]


@pytest.mark.parametrize("file", package_files(), ids=lambda file: file.stem)
def test_a_file_imports_only_from_lower_floors(file):
    place = file.relative_to(ROOT / "jax_sft").with_suffix("").as_posix()
    assert floor_of(place) is not None, f"{place} has no floor: give it one in FLOORS"
    assert not upward_arrows(place, file.read_text())


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda f: f.stem)
def test_configs_import_only_the_config(file):
    assert set(imported(file.read_text())) <= {"config"}


def test_arrows_up_and_sideways_are_found():
    assert upward_arrows("optimizer", "import jax_sft.sharding") == ["sharding"]
    assert upward_arrows("checkpoint", "from jax_sft.train import train") == ["train"]
    assert upward_arrows("checkpoint", "from jax_sft import train") == ["train"]
    assert upward_arrows("sharding", "def f():\n    from jax_sft.data import types, batches") == [
        "data/types",
        "data/batches",
    ]
    assert upward_arrows("model/families/gpt2", "import jax_sft.model.decoder") == ["model/decoder"]
    assert upward_arrows("model/decoder", "from jax_sft.model.families.gpt2 import x") == [
        "model/families/gpt2"
    ]
    assert not upward_arrows("train", "from jax_sft.loss import x\nimport jax")
    assert floor_of("nowhere") is None and floor_of("data/nowhere") is None
    assert list(imported("import jax_sft")) == [""]


@pytest.mark.parametrize("module", ["jax_sft", "jax_sft.config"])
def test_importing_is_light(module):
    code = f"import sys, {module}; print(*{{'jax', 'transformers', 'datasets'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("", "", 0)


def test_the_face_has_its_names():
    code = (
        "import jax_sft, jax_sft.train as module; import sys; from jax_sft.train import train;"
        "assert jax_sft.train is train is sys.modules['jax_sft.train'].train;"
        "assert all(getattr(jax_sft, name) for name in jax_sft.__all__);"
        "assert set(jax_sft.__all__) <= set(dir(jax_sft));"
        "assert not hasattr(jax_sft, 'nothing')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
