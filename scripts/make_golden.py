"""Stores what transformers computes in PyTorch, for tests that run without PyTorch.

    python scripts/make_golden.py                 # every family
    python scripts/make_golden.py llama gpt2      # some

Reads the cases in tests/families/test_<model_type>.py and writes
tests/families/golden/<model_type>.npz; see tests/family_oracle.py. Of each case it tells by how
much each field moves the logits that differs from the first case: one that hardly does is
marked, as no test would miss it. Needs torch.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
from transformers.utils import logging  # noqa: E402

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import family_oracle as oracle  # noqa: E402
from family_laws import laws_of  # noqa: E402

NUM_SEEDS = 200
NEAR_TIE = 1e-3  # of the largest logit: a step of greedy decoding that rounding might decide
NUM_DISTINCT = 3  # different tokens in an answer
NOISE = 1e-4  # relative, on weights: it changes no token, and no logit by more than SHAKEN
SHAKEN = 2e-2
VISIBLE = 1e-3  # of the largest logit: a hundred times the tolerance of the tests


def known_types() -> list[str]:
    files = sorted((TESTS / "families").glob("test_*.py"))
    return [file.stem.removeprefix("test_") for file in files if "FamilyLaws" in file.read_text()]


def write(folder: Path, name: str, fields: dict, weights: dict) -> Path:
    (folder / name).mkdir(exist_ok=True)
    return oracle.write_folder(folder / name, fields, weights)


def why_unfit(folder: Path, fields: dict, weights: dict, logits, tokens, leads) -> str | None:
    """Says why rounding might change these numbers, or why they would tell little apart."""
    scale = np.abs(logits).max()
    if leads.min() < NEAR_TIE * scale:
        return f"a lead of {leads.min() / scale:.1e}"
    if len({tuple(answer) for answer in tokens}) < len(tokens):
        return "two answers are the same"
    if min(len(set(answer)) for answer in tokens.tolist()) < NUM_DISTINCT:
        return "an answer repeats itself"
    rng = np.random.default_rng(0)
    noisy = {
        name: (values * (1 + NOISE * (2 * rng.random(values.shape) - 1))).astype(np.float32)
        for name, values in weights.items()
    }
    shaken = write(folder, "shaken", fields, noisy)
    error = np.abs(oracle.torch_logits(shaken) - logits).max() / scale
    if error > SHAKEN:
        return f"noise moves logits by {error:.1e}, as where two experts are as good"
    if (oracle.torch_greedy(shaken, over_cache=True)[0] != tokens).any():
        return "noise changes tokens"
    return None


def make_case(folder: Path, fields: dict) -> oracle.Golden:
    """Takes the first seed whose numbers are fit for comparing."""
    shapes = oracle.shapes_on_disk(fields, folder / "theirs")
    numbered = write(folder, "numbered", fields, oracle.number_elements(shapes))
    for seed in range(NUM_SEEDS):
        weights = oracle.draw_weights(shapes, seed)
        model = write(folder, "model", fields, weights)
        logits = oracle.torch_logits(model)
        assert np.isfinite(logits).all()
        tokens, leads = oracle.torch_greedy(model, over_cache=True)
        reason = why_unfit(folder, fields, weights, logits, tokens, leads)
        if reason is None:
            break
        print(f"    seed {seed}: {reason}")
    else:
        raise SystemExit(f"none of {NUM_SEEDS} seeds will do: are the logits nearly flat?")
    check_cache(fields, tokens, oracle.torch_greedy(model, over_cache=False)[0])
    loss, probes = oracle.torch_loss_probes(model, numbered, shapes)
    numbers = {"logits": logits, "tokens": tokens, "loss": np.float32(loss), "probes": probes}
    print(f"    seed {seed}: {len(shapes)} tensors, {describe(logits, tokens)}, loss {loss:.2f}")
    return oracle.Golden(fields, seed, shapes, numbers)


def check_cache(fields: dict, tokens: np.ndarray, by_full_passes: np.ndarray) -> None:
    """Refuses a cache that changes the tokens, but where no cache can help it.

    Where frequencies depend on the length, keys keep the turn of the length at which they were
    made, in transformers' cache as in ours.
    """
    if (tokens == by_full_passes).all():
        return
    kind = (fields.get("rope_parameters") or {}).get("rope_type")
    if kind not in ("dynamic", "longrope"):
        raise SystemExit("full passes give other tokens than the cache: an error in transformers?")
    print(f"    full passes give other tokens than the cache, as rope_type {kind!r} does")


def describe(logits_TV: np.ndarray, tokens: np.ndarray) -> str:
    likelihoods_TV = np.exp(logits_TV - logits_TV.max(axis=1, keepdims=True))
    best = (1 / likelihoods_TV.sum(axis=1)).mean()
    num_distinct = [len(set(answer)) for answer in tokens.tolist()]
    return (
        f"largest logit {np.abs(logits_TV).max():.2f}, mean best probability {best:.2f}, "
        f"distinct tokens {num_distinct}"
    )


def tell_what_fields_do(folder: Path, golden: oracle.Golden, first: dict[str, Any]) -> None:
    """Sets one field at a time back to what it is in the first case."""
    weights = oracle.draw_weights(golden.shapes, golden.seed)
    expected = golden.numbers["logits"]
    for field in sorted(golden.fields.keys() | first.keys()):
        missing = object()
        value, before = golden.fields.get(field, missing), first.get(field, missing)
        if value == before:
            continue
        without = {name: golden.fields[name] for name in golden.fields if name != field}
        without |= {} if before is missing else {field: before}
        shown = f"    {field}={'default' if value is missing else value}"
        try:
            shapes = oracle.shapes_on_disk(without, folder / f"without {field}")
            if shapes != golden.shapes:
                print(f"{shown}: other tensors")
                continue
            other = oracle.torch_logits(write(folder, "other", without, weights))
        except Exception as error:  # whatever a config class or a model makes of it
            print(f"{shown}: cannot be set back by itself ({str(error).splitlines()[0][:80]})")
            continue
        moved = np.abs(other - expected).max() / np.abs(expected).max()
        mark = "" if moved > VISIBLE else "  <-- hardly visible"
        print(f"{shown}: moves logits by {moved:.1e}{mark}")


def make(model_type: str) -> None:
    cases = laws_of(model_type).cases
    first = next(iter(cases.values()))
    made = {}
    print(model_type)
    for name, fields in cases.items():
        start = time.monotonic()
        assert fields["model_type"] == first["model_type"], name
        print(f"  {name}")
        with tempfile.TemporaryDirectory() as folder:
            made[name] = make_case(Path(folder), fields)
            tell_what_fields_do(Path(folder), made[name], first)
        print(f"    took {time.monotonic() - start:.1f} s")
    file = oracle.write_golden(first["model_type"], made)
    print(f"  wrote {file.name}: {file.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model_types", nargs="*", help="as in test_<model_type>.py; none for all")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for model_type in parser.parse_args().model_types or known_types():
        make(model_type)


if __name__ == "__main__":
    main()
