"""The README.md of a saved model: what it was made from, and how it did."""

from pathlib import Path
from typing import Any

import jax_sft

CARD = """---
library_name: transformers
tags: [jax, sft, jax_sft]
---

# {title}

Fine-tuned with jax_sft {version} (supervised fine-tuning with JAX).

| | |
|---|---|
| started from | {origin} |
| samples | {kept:,} of {rows_read:,} rows read |
| trained tokens in the samples | {trained_tokens:,} ({trained_share:.1%}) |
| steps | {steps:,} of {batch_size} rows x {seq_length} tokens |
| optimizer | {optimizer} {optimizer_kwargs} |
{metrics}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
```
"""


def write_model_card(
    folder: Path,
    *,
    config: dict[str, Any],
    data_report: dict[str, Any],
    history: list[dict[str, Any]],
) -> None:
    """Writes README.md.

    Args:
        folder: the model's folder.
        config: the run's config.
        data_report: what `data.report.data_report` returned.
        history: the run's log lines; the last value of each metric is shown.
    """
    newest: dict[str, Any] = {}
    for line in history:
        newest |= line
    shown = ("loss", "eval/loss", "eval/perplexity")
    names = [name for name in newest if name in shown or name.startswith("metrics/")]
    rows = (f"| {name} | {newest[name]:.4g} |\n" for name in names if newest[name] is not None)
    is_random = config["model"]["init"] == "random"
    (folder / "README.md").write_text(
        CARD.format(
            title=folder.name,
            version=jax_sft.__version__,
            origin="random weights" if is_random else config["model"]["model_path"],
            steps=newest["step"] if newest else 0,
            batch_size=config["train"]["batch_size"],
            seq_length=config["train"]["seq_length"],
            optimizer=config["optimizer"]["name"],
            optimizer_kwargs=config["optimizer"]["kwargs"],
            metrics="".join(rows),
            **{k: data_report[k] for k in ("kept", "rows_read", "trained_tokens", "trained_share")},
        ),
        encoding="utf-8",
    )
