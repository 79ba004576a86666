"""Where a run stood when a checkpoint was written, and whether a run of now may go on there.

In: what lies in a checkpoint beside its arrays. Out: nothing, or one error that says what keeps
this run from going on.
"""

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """What a checkpoint says beside its arrays; JSON holds it.

    Attributes:
        fingerprint: of the data and its order.
        tokens: inputs seen so far, padding left out.
        trained_tokens: of them, those with a weight.
        best: the best value of train.best_metric so far, or None.
        source_dtypes: the dtype that each tensor had in the model that the run began with.
        stop_ids: tokens that end an answer.
        vocab_size: of the model, without padding.
        stream: the position in a stream, or None.
        has_optimizer: whether the optimizer's state is among the arrays.
    """

    fingerprint: str
    tokens: int
    trained_tokens: int
    best: float | None
    source_dtypes: dict[str, str]
    stop_ids: list[int]
    vocab_size: int
    stream: Any
    has_optimizer: bool


def check_goes_on(
    point: ResumePoint,
    folder: Path,
    step: int,
    *,
    fingerprint: str,
    vocab_size: int,
    num_steps: int,
    total_steps: int,
    epochs: int,
) -> None:
    """Checks that a run may go on from a checkpoint.

    Args:
        point: what the checkpoint says.
        folder: of the run that wrote it.
        step: of the checkpoint.
        fingerprint: of this run's data.
        vocab_size: of this run's model.
        num_steps: of this run.
        total_steps: train.total_steps.
        epochs: train.epochs.

    Raises:
        ValueError: the data differ, the optimizer's state is missing, the run would already be
            over, or the model has another vocabulary.
    """
    checkpoint = f"the checkpoint in {folder}"
    if point.fingerprint != fingerprint:
        raise ValueError(
            f"{checkpoint} was trained on other data, or in another order: keep samples and what "
            "chooses them, seq_length, batch_size, seed, shuffle and packing to resume it, or "
            "start anew in another train.checkpoint_dir"
        )
    if not point.has_optimizer:
        raise ValueError(
            f"{checkpoint} has no optimizer state, since train.save_optimizer was False: make a "
            "model of it with python -m jax_sft.export, and start anew with that as "
            "model.model_path"
        )
    if step > num_steps:
        key = "total_steps" if total_steps == num_steps else "epochs"
        raise ValueError(
            f"{checkpoint} is at step {step}, but train.total_steps={total_steps} and "
            f"train.epochs={epochs} end the run at step {num_steps}: raise train.{key}, for "
            f"at least {step} steps, or make a model of it with python -m jax_sft.export"
        )
    if point.vocab_size != vocab_size:
        raise ValueError(
            f"{checkpoint} is of a vocabulary of {point.vocab_size}, but the model has "
            f"{vocab_size}: resume it with its own tokenizer and model"
        )
