"""python -m jax_sft.preview --config=FILE [--config.section.key=value ...]: shows what is trained.

In: the flags of a training run. Out: on the terminal the data report, a few examples with what is
trained in them, and the exact eval prompts; in a folder of its own, data_report.json and
data_report.html. No weights are read and no device is used, so it takes seconds.

  --examples=3        how many examples and eval prompts are shown
  --ids               the examples' token ids, too
  --row=ROW           shows this row instead: what messages call it, as 'a.jsonl line 12', a part
                      of that, or an example's number from 0
  --output=preview    the folder that the two files are written to; never a run's own, whose
                      report is to stay that of the run
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from jax_sft.command import Parser, run_command
from jax_sft.config import SFTConfig, config_from_flags, help_text
from jax_sft.run_folder import CONFIG, DATA_PAGE, DATA_REPORT, write_json

if TYPE_CHECKING:
    from jax_sft.data.types import Example, Examples
    from jax_sft.inputs import Inputs

_MOST_SHOWN = 20  # examples of one row


def main(argv: Sequence[str]) -> None:
    """Shows what would be trained as the flags say.

    Raises:
        ValueError: the flags, the config or the data are not as they must be, or would teach
            nothing, or not to stop; the latter only after all has been shown.
    """
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{help_text('python -m jax_sft.preview')}")
        return
    flags, others = _parse(argv)
    config = config_from_flags(others)
    config.validate()
    _check_folder(flags.output)
    if not sys.stderr.isatty():  # `datasets` draws its bars into logs, too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    preview(
        config, num_examples=flags.examples, row=flags.row, with_ids=flags.ids, folder=flags.output
    )


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own flags, and the words that are the config's."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--examples", type=int, default=3)
    parser.add_argument("--ids", action="store_true")
    parser.add_argument("--row")
    parser.add_argument("--output", type=Path, default=Path("preview"))
    flags, others = parser.parse_known_args(argv)
    if flags.examples < 0:
        raise ValueError(f"--examples is {flags.examples}; it must be at least 0")
    return flags, others


def _check_folder(folder: Path) -> None:
    if (folder / CONFIG).exists():
        raise ValueError(f"--output={folder} holds a run: pass another folder, or none")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output={folder} cannot be made ({error.strerror}): pass one that can be written"
        ) from None


def preview(
    config: SFTConfig, *, num_examples: int, row: str | None, with_ids: bool, folder: Path
) -> None:
    """Prints and writes what would be trained.

    Args:
        config: validated.
        num_examples: how many examples and eval prompts are printed.
        row: the row to print instead of examples from all over the data.
        with_ids: whether the examples' ids are printed.
        folder: where the files are written.

    Raises:
        ValueError: the data are not as they must be.
    """
    # After the flags are known to be right: these take seconds.
    from jax_sft.data.report import check_trained, print_report
    from jax_sft.data.report_page import write_report_page
    from jax_sft.data.token_view import draw_examples
    from jax_sft.inputs import find_tokenizer, load_inputs

    tokenizer = find_tokenizer(config, None)
    inputs = load_inputs(config, tokenizer=tokenizer)
    report = _report(config, inputs)
    examples = inputs.train.examples
    shown = draw_examples(examples, num_examples) if row is None else _examples_of(examples, row)
    problem = ""
    try:
        check_trained(inputs.train, stop_tokens=config.tokenizer.stop_tokens)
    except ValueError as error:
        problem = str(error)
    prompts = [] if inputs.prompts is None else inputs.prompts.ids
    console = Console(soft_wrap=False)
    title = "data" if inputs.stream is None else "data, the first that is read of a stream"
    print_report(report, title=title, console=console)
    for name, held_out in report.get("eval", {}).items():
        print_report(held_out, title=f"eval data {name}".rstrip(), console=console)
    _print_examples(shown, console, with_ids=with_ids)
    _print_prompts(prompts, inputs, console, num_shown=num_examples)
    write_json(folder / DATA_REPORT, report)
    write_report_page(
        report,
        folder / DATA_PAGE,
        examples=shown,
        prompts=prompts,
        tokenizer=tokenizer,
        problem=problem,
    )
    console.print(Text(f"\nwritten: {folder / DATA_REPORT}, {folder / DATA_PAGE}"))
    sys.stdout.flush()
    if problem:
        raise ValueError(problem)


def _report(config: SFTConfig, inputs: "Inputs") -> dict[str, Any]:
    from jax_sft.data.report import run_report
    from jax_sft.recipe import make_batches

    if not len(inputs.train.examples):
        return run_report(inputs.train, inputs.evals)
    if inputs.stream is not None:  # nobody knows the steps before a stream has ended
        return run_report(inputs.train, inputs.evals, plan=inputs.stream.first.plan)
    batches = make_batches(config, inputs.train.examples)
    return run_report(
        inputs.train,
        inputs.evals,
        plan=batches.plan(0),
        steps_per_epoch=batches.steps_in_epoch(0),
    )


def _examples_of(examples: "Examples", row: str) -> list["Example"]:
    """The examples of the row that is meant: an example's number, or its origin or a part of it."""
    if row.isdecimal():
        if int(row) >= len(examples):
            raise ValueError(f"--row={row}, but there are {len(examples)} examples, from 0 on")
        return [examples[int(row)]]
    origins = [example.origin for example in examples]
    exact = [index for index, origin in enumerate(origins) if origin == row]
    found = exact or [index for index, origin in enumerate(origins) if row in origin]
    if not found:
        raise ValueError(
            f"--row={row}: no example comes from such a row, so it was dropped or not read; rows "
            f"are called as {origins[0]!r}"
            if origins
            else f"--row={row}: there are no examples"
        )
    return [examples[index] for index in found[:_MOST_SHOWN]]


def _print_examples(shown: list["Example"], console: Console, *, with_ids: bool) -> None:
    from jax_sft.data.token_view import coloured, legend, printable

    if not shown:
        return
    console.print(Text("\nexamples: ").append_text(legend(console)))
    for example in shown:
        num_trained = int((example.weights_T != 0).sum())
        counted = f"{len(example.inputs_T):,} tokens, {num_trained:,} trained"
        console.print(Text(f"\n{printable(example.origin, console)} ({counted})", style="bold"))
        console.print(coloured(example, console=console))
        if with_ids:
            console.print(coloured(example, console=console, what="ids"))


def _print_prompts(
    prompts: Sequence[Sequence[int]], inputs: "Inputs", console: Console, *, num_shown: int
) -> None:
    from jax_sft.data.token_view import coloured_prompt, printable

    if not len(prompts):
        console.print(Text("\neval prompts: none"))
        return
    console.print(Text(f"\neval prompts: {min(num_shown, len(prompts))} of {len(prompts):,}"))
    if inputs.prompts.note is not None:
        console.print(Text(printable(inputs.prompts.note, console)))
    for index, ids in enumerate(prompts[:num_shown]):
        console.print(Text(f"\nprompt {index} ({len(ids):,} tokens)", style="bold"))
        for what in ("text", "ids"):
            console.print(coloured_prompt(ids, inputs.tokenizer, console=console, what=what))


if __name__ == "__main__":
    run_command(main)
