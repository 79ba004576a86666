"""train(): the whole run, in order; and SFTTrainer, what it leaves in the user's hands.

In: a config, samples, prompts, a metric. Out: a trained model, and a run's folder (see
`run_folder.py`). Nothing is computed here: this file says what happens when.
"""

import contextlib
import dataclasses
import functools
import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

from jax_sft import run_folder
from jax_sft.checkpoint import Checkpoints
from jax_sft.config import SFTConfig, default_sft_config
from jax_sft.config_keys import shortened
from jax_sft.data.batches import prefetch
from jax_sft.data.report import check_trained, run_report
from jax_sft.data.report_page import write_report_page
from jax_sft.data.token_view import draw_examples
from jax_sft.distributed import is_first, world
from jax_sft.evaluate import MetricFn, Table, evaluate_loss, evaluate_prompts
from jax_sft.failure import finishing
from jax_sft.inputs import Inputs, find_tokenizer, load_inputs, read_prompts
from jax_sft.interrupt import STOPPED, asked_to_stop
from jax_sft.manifest import complete_steps
from jax_sft.model.causal_lm import ADAPTER, CausalLM
from jax_sft.model.decoder import logical_axes
from jax_sft.model.pretrained import by_path
from jax_sft.model_card import write_model_card
from jax_sft.profiling import profiled
from jax_sft.progress import Progress
from jax_sft.recipe import (
    Update,
    check_inputs,
    check_rows,
    compile_step,
    make_batches,
    make_eval_batches,
    make_update,
    open_model,
    split_best_metric,
    trained_params,
)
from jax_sft.resume_point import ResumePoint, check_goes_on
from jax_sft.run_folder import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    DATA_PAGE,
    DATA_REPORT,
    FINAL,
    METRICS,
    TENSORBOARD,
    TOKENIZER,
)
from jax_sft.same_run import check_data, check_joined, check_start
from jax_sft.sharding import named_sharding
from jax_sft.startup import flops_a_step, peak_flops, print_start, say, shown
from jax_sft.together import from_first, wait_for_all
from jax_sft.tracking import Tracker, check_tracker
from jax_sft.train_step import TrainState, batch_sums

_EXAMPLES_SHOWN = 5  # on the page of the data report


def train(
    model_path: str | None = None,
    samples: Any = None,
    eval_prompts: Any = None,
    metric_fn: MetricFn | None = None,
    config: SFTConfig | None = None,
    stop_sequences: Sequence[str] | None = (),
    eval_samples: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    reward_fn: None = None,
    rewards: None = None,
    prompts: None = None,
    dataset: None = None,
) -> "SFTTrainer":
    """Fine-tunes a causal language model on samples.

    Args:
        model_path: hub name or folder; None: config.model.model_path.
        samples: a sequence of strings, of [prompt, output, prompt, output, ...] lists, of
            conversations (lists of messages) or of rows with fields, or a `datasets.Dataset`;
            None: config.data.train.
        eval_prompts: strings, conversations, or dicts with "prompt" and metadata; None:
            config.data.eval_prompts, and without those the tokenizer's BOS, if it has one; []:
            none.
        metric_fn: metric_fn(samples=, prompts=, outputs=, **metadata) -> {name: numbers}, one
            number a sample or one for all; None: config.data.metric_fn.
        config: None for `default_sft_config()`; it is not changed.
        stop_sequences: strings that end an output; None or none: config.data.stop_sequences.
        eval_samples: held-out samples for eval/loss, or {name: samples} for eval/name/loss;
            None: config.data.eval.
        tokenizer: None loads config.tokenizer.tokenizer_path, or the model's own.
        reward_fn: refused, as are the next three: in trlX they ask for other methods than SFT.
        rewards: refused.
        prompts: refused.
        dataset: refused.

    Returns:
        The trainer, with the trained model.

    Raises:
        ValueError: the config or the data are not as they must be; one line says what to do.
        FloatingPointError: a step's loss or gradient was not finite.
    """
    if config is not None and not isinstance(config, SFTConfig):
        raise ValueError(
            f"config is a {type(config).__name__}: pass an SFTConfig, as default_sft_config() or "
            "SFTConfig.from_dict({...})"
        )
    _refuse(reward_fn=reward_fn, rewards=rewards, prompts=prompts, dataset=dataset)
    config = (default_sft_config() if config is None else config).evolve()
    if model_path is not None:
        config.model.model_path = str(model_path)
    config.validate()
    check_start(config)
    run_folder.check_writable(Path(config.train.checkpoint_dir))
    if config.train.logging_dir is not None:
        run_folder.check_writable(Path(config.train.logging_dir), key="train.logging_dir")
    run_folder.check_shared(Path(config.train.checkpoint_dir))
    if is_first():
        check_tracker(config.train.tracker)
    run_dir = Path(config.train.checkpoint_dir).resolve()
    with run_folder.held(run_dir) if is_first() else contextlib.nullcontext():
        tokenizer = find_tokenizer(config, tokenizer)
        model = open_model(config, tokenizer)
        check_joined()
        check_rows(config, model)
        inputs = load_inputs(
            config,
            tokenizer=tokenizer,
            samples=samples,
            eval_samples=eval_samples,
            eval_prompts=eval_prompts,
            metric_fn=metric_fn,
            stop_sequences=stop_sequences,
        )
        trainer = SFTTrainer(config, model=model, inputs=inputs)
        trainer.learn()
    return trainer


class SFTTrainer:
    """A run: its model, its data, its folder.

    Attributes:
        config: the resolved config.
        model: the model; its params are the run's newest.
        inputs: tokenizer, examples, prompts, metric.
        run_dir: the run's folder.
        num_steps: optimizer steps of the whole run.
    """

    def __init__(self, config: SFTConfig, *, model: CausalLM, inputs: Inputs) -> None:
        check_inputs(config, model, inputs)
        self.config, self.model, self.inputs = config, model, inputs
        # Resolved once: a renamed folder takes "." and what links point to along with it.
        self.run_dir = Path(config.train.checkpoint_dir).resolve()
        check_trained(inputs.train, stop_tokens=config.tokenizer.stop_tokens)
        stream = inputs.stream
        self._batches = stream or make_batches(config, inputs.train.examples)
        self._row_sharding = named_sharding(model.mesh, "batch", "tokens")
        self.num_steps = config.train.total_steps
        self._steps_per_epoch = None  # nobody knows before a stream has ended
        if stream is None:
            self.num_steps = min(self._batches.num_steps, self.num_steps)
            self._steps_per_epoch = self._batches.steps_in_epoch(0)
        self.data_report = run_report(
            inputs.train,
            inputs.evals,
            plan=self._batches.plan(0) if stream is None else stream.first.plan,
            steps_per_epoch=self._steps_per_epoch,
        )
        model.stop_at(inputs.train.counts.stop_tokens)
        self._best: float | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict a log line, as metrics.jsonl holds them."""
        return self._tracker.history

    def learn(self) -> None:
        """Trains: from the start, or from where the run to resume stood."""
        try:
            with contextlib.ExitStack() as opened:  # however it ends, files and threads are closed
                step = self._train(*self._start(opened))
        except KeyboardInterrupt:
            steps = complete_steps(self.run_dir / CHECKPOINTS)
            saved = f"step {steps[-1]} is" if steps else "no step is"
            say("interrupted", f"{saved} saved in {shown(self.run_dir)}")
            raise
        if step < self.num_steps:
            say(
                "stopped",
                f"by SIGTERM, saved step {step} of {self.num_steps} in {shown(self.run_dir)}",
            )
            say("go on", "with --config.train.resume_from_checkpoint=auto")
            raise SystemExit(STOPPED)
        self._finish()

    def _train(self, first: int, state: TrainState) -> int:
        """Makes the steps after `first`; returns the last one made."""
        train, place = self.config.train, self._batches.place
        batches = prefetch(
            functools.partial(place, sharding=self._row_sharding),
            range(first, self.num_steps),
            waited=self._progress.add_wait,
        )
        step = first
        traces = Path(train.logging_dir or self.run_dir / TENSORBOARD)
        self.model.params = state.params
        if first == 0:
            self._evaluate(0)
        with (
            jax.set_mesh(self.model.mesh),
            contextlib.closing(batches),
            asked_to_stop() as is_asked_to_stop,
            profiled(train.profile_steps, traces) as begin,
        ):
            for step, batch in enumerate(batches, start=first + 1):
                begin(step, state)
                state, metrics = self._step(state, batch)
                self.model.params = state.params
                self._progress.add(step, metrics)
                self._checkpoints.poll()
                is_last = step == self.num_steps
                if step % train.eval_interval == 0 or is_last:
                    with self._saved_if_it_fails(step, state):
                        self._evaluate(step)
                is_stopped = is_asked_to_stop(step - first)
                if step % train.checkpoint_interval == 0 or is_last or is_stopped:
                    self._save(step, state)
                if is_stopped:
                    return step
            if step < self.num_steps:
                self._end_early(step, state, is_new=step > first)
            elif first == self.num_steps and not self._goes_on:
                self._save(first, state)  # another folder's last step, with nothing left to do
        return self.num_steps

    @contextlib.contextmanager
    def _saved_if_it_fails(self, step: int, state: TrainState) -> Iterator[None]:
        """Saves what was trained if a metric of the user's fails, alone: others would not join."""
        try:
            yield
        except FloatingPointError:  # of the step
            raise
        except Exception:
            if world() is None:
                self._save(step, state)
                say("saved", f"step {step} in {shown(self.run_dir)}, before what failed there")
            raise

    def _end_early(self, step: int, state: TrainState, *, is_new: bool) -> None:
        """Makes the last step that a stream had data for the last one of the run."""
        self.num_steps = self._progress.num_steps = step
        epochs = self.config.train.epochs
        say("data", f"the stream has ended after {epochs} epochs, at step {step}")
        if is_new and step % self.config.train.eval_interval:
            with self._saved_if_it_fails(step, state):
                self._evaluate(step)
        if is_new and step % self.config.train.checkpoint_interval:
            self._save(step, state)

    def evaluate(self) -> dict[str, float]:
        """Measures the model as it is now.

        Returns:
            eval/loss and eval/perplexity where there are eval samples, eval/name/... where they
            have names; metrics/... where there
            are prompts and a metric_fn; seconds under time/...
        """
        return self._measure()[0]

    def generate(self, prompts: Sequence[str | Sequence], **gen_kwargs: Any) -> list[str]:
        """Continues each prompt with the model as it is now.

        Args:
            prompts: texts, [prompt, output, ..., prompt] texts, or conversations.
            **gen_kwargs: over those of config.method.gen_kwargs, such as max_new_tokens=40.

        Returns:
            The outputs, without their prompts, in order.
        """
        configured = self.config.method.gen_kwargs.to_dict()
        fixed = {k: v for k, v in configured.items() if not isinstance(v, list)}
        if isinstance(prompts, str):
            raise ValueError(f"prompts is the string {shortened(prompts)}: pass a list of strings")
        return self.model.generate_from_ids(
            read_prompts(self.config, prompts, self.inputs.tokenizer, self.inputs.train).ids,
            stop_sequences=self.inputs.stop_sequences,
            seed=self.config.train.seed,
            gen_kwargs=fixed | gen_kwargs,
        )

    def save_pretrained(self, folder: str | Path, *, dtype: str | None = None) -> None:
        """Writes the model as it is now, as a folder that `transformers` loads.

        Args:
            folder: made if missing.
            dtype: "float32", "bfloat16" or "float16"; None keeps the source checkpoint's.
        """
        self.model.save_pretrained(folder, dtype=dtype)
        if is_first():
            write_model_card(
                Path(folder),
                config=self.config.to_dict(),
                data_report=self.data_report,
                history=self.history,
            )

    def _start(self, opened: contextlib.ExitStack) -> tuple[int, TrainState]:
        """Prints what will run, makes the state or restores it, and opens the run's folder."""
        config, model = self.config, self.model
        check_data(config, self._batches, self.inputs)
        asked = config.train.resume_from_checkpoint
        resume_dir = from_first(lambda: run_folder.find_resume_folder(self.run_dir, asked))
        if asked == "auto" and resume_dir is None and (self.run_dir / CONFIG).is_file():
            say("no resume", f"{shown(self.run_dir)} has no checkpoint: the run starts anew")
        trained = by_path(trained_params(config, model))
        print_start(
            config,
            model,
            trained=trained,
            num_steps=self.num_steps,
            steps_per_epoch=self._steps_per_epoch,
            data_report=self.data_report,
            note=None if self.inputs.prompts is None else self.inputs.prompts.note,
        )
        # Weights before the compiler: a bad folder is known in seconds.
        update = make_update(config, model, num_steps=self.num_steps)
        restored = None if resume_dir is None else self._restore(Path(resume_dir), update.structs)
        step, state, point = restored or (0, self._first_state(update), None)
        self._step, seconds = compile_step(config, model, update)
        say("compiled", f"the train step in {seconds:.1f} s")
        wait_for_all()  # gloo gives up on a process that is half a minute late
        self._goes_on = restored is not None and Path(resume_dir).resolve() == self.run_dir
        self._best = point.best if self._goes_on else None  # another folder's best/ is not here
        self._open_folder(step if self._goes_on else None, opened)
        self._progress = Progress(
            self._tracker,
            num_steps=self.num_steps,
            log_interval=config.train.log_interval,
            describe=self._batches.describe,
            flops_a_step=flops_a_step(config, model, trained=trained),
            peak_flops=peak_flops(model),
            num_tokens=0 if point is None else point.tokens,
            num_trained=0 if point is None else point.trained_tokens,
        )
        return step, state

    def _first_state(self, update: Update) -> TrainState:
        if self.config.model.init == "random":
            self.model.init(self.config.train.seed)
        else:
            self.model.load(seed=self.config.train.seed)
        with jax.set_mesh(self.model.mesh):
            return update.init(self.model.params)

    def _restore(self, folder: Path, like: TrainState) -> tuple[int, TrainState, ResumePoint]:
        """Reads the newest complete checkpoint."""
        checkpoints = Checkpoints.open_for_reading(folder)
        step = checkpoints.latest()
        point = ResumePoint(**checkpoints.read_data(step))
        check_goes_on(
            point,
            folder,
            step,
            fingerprint=self._batches.fingerprint,
            vocab_size=self.model.decoder.config.vocab_size,
            num_steps=self.num_steps,
            total_steps=self.config.train.total_steps,
            epochs=self.config.train.epochs,
        )
        if self.inputs.stream is not None:
            self.inputs.stream.seek(point.stream)
        state = checkpoints.restore(step, like, padded=_vocabulary_leaves(self.model))
        self.model.source_dtypes = point.source_dtypes
        say("resumed", f"{folder} at step {step}")
        return step, state, point

    def _open_folder(self, resume_step: int | None, opened: contextlib.ExitStack) -> None:
        """Opens what the run writes, and has `opened` close it."""
        config = self.config
        from_first(functools.partial(self._fill_folder, is_new=resume_step is None))
        train = config.train
        self._checkpoints = opened.enter_context(
            Checkpoints(self.run_dir, keep=train.keep_checkpoints, is_writer=is_first())
        )
        self._tracker = Tracker(
            self.run_dir,
            kind=train.tracker,
            logging_dir=train.logging_dir,
            project_name=train.project_name,
            run_name=train.run_name,
            entity_name=train.entity_name,
            group_name=train.group_name,
            tags=train.tags,
            config=config.to_dict(),
            resume_step=resume_step,
            is_writer=is_first(),
        )
        opened.callback(self._tracker.close)
        opened.enter_context(finishing(self._checkpoints.finish))
        opened.enter_context(finishing(self._tracker.close))

    def _fill_folder(self, *, is_new: bool) -> None:
        if is_new and (old := run_folder.set_aside(self.run_dir)):
            say("kept", f"{shown(self.run_dir)} held an earlier run, now {shown(old)}")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(self.run_dir / CONFIG, self.config.to_dict())
        self._write_report()
        self.inputs.tokenizer.save_pretrained(self.run_dir / TOKENIZER)

    def _write_report(self) -> None:
        inputs = self.inputs
        run_folder.write_json(self.run_dir / DATA_REPORT, self.data_report)
        write_report_page(
            self.data_report,
            self.run_dir / DATA_PAGE,
            title=f"What {self.run_dir.name} is trained on",
            examples=draw_examples(inputs.train.examples, _EXAMPLES_SHOWN),
            prompts=[] if inputs.prompts is None else inputs.prompts.ids,
            tokenizer=inputs.tokenizer,
        )

    def _measure(self) -> tuple[dict[str, float], list[Table]]:
        """Computes the eval loss, and generates from the prompts and scores the outputs."""
        config, inputs, model = self.config, self.inputs, self.model
        metrics: dict[str, float] = {}
        tables: list[Table] = []
        for name, held_out in inputs.evals.items():
            batches = make_eval_batches(config, held_out.examples)
            placed = (batches.place(i, self._row_sharding) for i in range(batches.num_steps))
            with jax.set_mesh(model.mesh):
                sums = functools.partial(_eval_sums, model.decoder, model.params)
                metrics |= evaluate_loss(sums, placed, name=f"eval/{name}" if name else "eval")
        if inputs.prompts is not None:
            scores, tables = evaluate_prompts(
                lambda gen_kwargs: model.generate_from_ids(
                    inputs.prompts.ids,
                    stop_sequences=inputs.stop_sequences,
                    seed=config.train.seed,
                    gen_kwargs=gen_kwargs,
                ),
                prompts=inputs.prompts.texts,
                metadata=inputs.prompts.metadata,
                gen_kwargs=config.method.gen_kwargs.to_dict(),
                metric_fn=inputs.metric_fn,
            )
            metrics |= scores
        return from_first(lambda: metrics), tables  # what is best is decided by them, everywhere

    def _evaluate(self, step: int) -> None:
        """Measures, logs, shows samples, and keeps the best model."""
        self._progress.flush()
        with self._progress.paused():
            metrics, tables = self._measure()
            if not metrics:
                return
            self._tracker.log(step, metrics)
            for table in tables:
                self._tracker.table(step, *table)
            if any(not name.startswith("time/") for name in metrics):
                self._tracker.progress(step, self.num_steps, metrics)
            self._keep_best(metrics)

    def _keep_best(self, metrics: dict[str, float]) -> None:
        train = self.config.train
        if train.best_metric is None or not train.save_best:
            return
        name, sign = split_best_metric(train.best_metric)
        if name not in metrics:
            raise ValueError(
                f"train.best_metric names {name!r}, which is not measured: choose one of "
                f"{sorted(metrics)}"
            )
        if not math.isfinite(metrics[name]):
            return
        if self._best is None or sign * metrics[name] > sign * self._best:
            self._best = metrics[name]
            self.save_pretrained(self.run_dir / BEST)
            say("best", f"{name} {self._best:.4g}, saved in {shown(self.run_dir / BEST)}")

    def _save(self, step: int, state: TrainState) -> None:
        self._progress.flush()
        has_optimizer = self.config.train.save_optimizer
        with self._progress.paused():
            point = ResumePoint(
                fingerprint=self._batches.fingerprint,
                tokens=self._progress.num_tokens,
                trained_tokens=self._progress.num_trained,
                best=self._best,
                source_dtypes=self.model.source_dtypes,
                stop_ids=self.model.stop_ids,
                vocab_size=self.model.decoder.config.vocab_size,
                stream=None if self.inputs.stream is None else self.inputs.stream.mark(step),
                has_optimizer=has_optimizer,
            )
            saved = state if has_optimizer else state._replace(opt_state=())
            self._checkpoints.save(step, saved, dataclasses.asdict(point))

    def _finish(self) -> None:
        if self.inputs.stream is not None:
            self.data_report["streamed"] = dataclasses.asdict(self.inputs.stream.counts)
            counts = self.inputs.stream.counts
            if counts.dropped:
                say("data", f"{counts.rows_read:,} rows were read{counts.dropped_in_words}")
            if is_first():
                self._write_report()
        self.save_pretrained(self.run_dir / FINAL)
        folder = shown(self.run_dir)
        say("saved", f"{folder / FINAL} (weights, tokenizer, model card; transformers loads it)")
        if self.model.adapters is not None:
            say("saved", f"{folder / FINAL / ADAPTER} (the adapters alone, for peft)")
        if self._best is not None:
            say("saved", f"{folder / BEST} (the best by {self.config.train.best_metric})")
        use = "to resume" if self.config.train.save_optimizer else "to export"
        say("saved", f"{folder / METRICS}, {folder / CHECKPOINTS} ({use})")
        is_chat = self.inputs.train.sources[0].format in ("messages", "sharegpt")
        prompt = f"--model={folder / FINAL} {'--chat ' * is_chat}--prompt={self._example()}"
        say("try it", f"python -m jax_sft.generate {prompt}")

    def _example(self) -> str:
        """A prompt to paste into a shell."""
        text = "" if self.inputs.prompts is None else self.inputs.prompts.texts[0]
        return shlex.quote(text) if 0 < len(text) < 80 and text.isprintable() else '"..."'


def _vocabulary_leaves(model: CausalLM) -> list[str]:
    """Parameters with a row a token, which are padded to divide over the mesh."""
    _, axes = logical_axes(model.decoder)
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, names in leaves
        if names[:1] == ("vocab",)
    ]


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name} is {shortened(value)}, but this is SFT only: leave it out, and pass "
                "demonstrations as samples and prompts to watch as eval_prompts"
            )


@functools.partial(jax.jit, static_argnums=0)
def _eval_sums(decoder, params, batch):
    return batch_sums(decoder, params, batch)
