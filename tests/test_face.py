"""The package's face: function and submodule share the name train, whatever imported it first."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_train_is_the_function_twice_in_a_row_whatever_was_imported_first():
    code = """
import importlib, sys
for first in (
    "",
    "from jax_sft.train import train",
    "import jax_sft.train",
    "importlib.import_module('jax_sft.train')",
    "import jax_sft.train; importlib.reload(sys.modules['jax_sft.train'])",
):
    for name in [name for name in sys.modules if name.partition(".")[0] == "jax_sft"]:
        del sys.modules[name]
    exec(first)
    import jax_sft
    for _ in range(2):
        try:
            jax_sft.train(samples=["a"], rewards=[1.0])
        except ValueError as error:
            print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("this is SFT only") == 10


def test_importing_the_face_imports_no_jax():
    code = "import sys, jax_sft; jax_sft.default_sft_config(); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
