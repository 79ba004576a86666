"""Stores what transformers' PyTorch GPT-2 computes, for tests that run without PyTorch.

    python scripts/make_golden.py

Writes tests/laws/golden/gpt2.npz: logits, loss and probes of the gradients of every case in
tests/gpt2_oracle.py. Needs torch; the weights are made by numpy's seeded generator.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import gpt2_oracle  # noqa: E402


def main() -> None:
    numbers = {}
    for name in gpt2_oracle.OPTIONS:
        with tempfile.TemporaryDirectory() as folder:
            expected = gpt2_oracle.run_torch(gpt2_oracle.write_folder(Path(folder), name))
        numbers |= {f"{name}/{key}": value for key, value in expected.items()}
    gpt2_oracle.GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(gpt2_oracle.GOLDEN, **numbers)
    size = gpt2_oracle.GOLDEN.stat().st_size
    print(f"wrote {gpt2_oracle.GOLDEN.name}: {len(numbers)} arrays, {size:,} bytes")


if __name__ == "__main__":
    main()
