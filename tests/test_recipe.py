"""The config turned into what will run: which parameters train, and what fits."""

import jax
import numpy as np
import pytest
from small_tokenizers import packaged_bytes
from tiny_runs import SAMPLES, TINY_GPT2, tiny_config

from jax_sft.inputs import load_inputs
from jax_sft.recipe import (
    check_rows,
    compile_step,
    make_batches,
    make_update,
    open_model,
    split_best_metric,
    trained_params,
)
from jax_sft.sharding import named_sharding


def names_of(tree) -> dict[str, object]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def frozen_config(num_layers_unfrozen):
    return tiny_config(
        "run",
        model=dict(config=TINY_GPT2 | dict(n_layer=2), num_layers_unfrozen=num_layers_unfrozen),
    )


@pytest.mark.parametrize(
    ("num_layers_unfrozen", "trained"),
    [
        (-1, ("embed/", "layers/", "final_norm/")),
        (1, ("layers/", "final_norm/")),
        (0, ("final_norm/",)),
    ],
)
def test_what_trains_has_optimizer_state_and_nothing_else(num_layers_unfrozen, trained):
    config = frozen_config(num_layers_unfrozen)
    model = open_model(config, packaged_bytes())
    expected = {name for name in names_of(model.param_structs()) if name.startswith(trained)}
    mask = names_of(trained_params(config, model))
    assert {name for name, is_trained in mask.items() if is_trained} == expected
    update = make_update(config, model, num_steps=4)
    moments = [name for name in names_of(update.structs.opt_state) if "/mu/" in name]
    assert {name.partition("/mu/")[2] for name in moments} == expected
    assert len(moments) == len(expected)


@pytest.mark.parametrize("num_layers_unfrozen", [0, 1])
def test_a_step_changes_what_trains_and_nothing_else(num_layers_unfrozen):
    config = frozen_config(num_layers_unfrozen)
    model = open_model(config, packaged_bytes())
    inputs = load_inputs(
        config,
        tokenizer=packaged_bytes(),
        samples=SAMPLES,
        eval_samples=None,
        eval_prompts=[],
        metric_fn=None,
        stop_sequences=(),
    )
    model.init(0)
    before = {name: np.array(leaf) for name, leaf in names_of(model.params).items()}
    update = make_update(config, model, num_steps=4)
    take_step, seconds = compile_step(config, model, update)
    assert seconds > 0
    batch = make_batches(config, inputs.train.examples).place(
        0, named_sharding(model.mesh, "batch", "tokens")
    )
    state, metrics = take_step(update.init(model.params), batch)
    assert bool(metrics.ok)
    changed = {
        name
        for name, leaf in names_of(state.params).items()
        if not np.array_equal(before[name], np.asarray(leaf))
    }
    mask = names_of(trained_params(config, model))
    # A key's bias shifts all of a query's scores alike, so that its gradient is zero or noise.
    still = {name for name in before if "key/bias" in name}
    assert changed - still == {name for name, trained in mask.items() if trained} - still


@pytest.mark.parametrize(
    ("written", "name", "sign"),
    [
        ("max:metrics/x", "metrics/x", 1),
        ("min:metrics/x", "metrics/x", -1),
        ("metrics/x@top_k=1", "metrics/x@top_k=1", 1),
        ("eval/loss", "eval/loss", -1),
        ("eval/perplexity", "eval/perplexity", -1),
        ("max:eval/loss", "eval/loss", 1),
    ],
)
def test_a_best_metric_has_a_direction(written, name, sign):
    assert split_best_metric(written) == (name, sign)


def test_rows_have_to_fit_where_they_are_trained_and_not_where_they_are_not():
    config = tiny_config("run", train=dict(batch_size=6))
    model = open_model(config, packaged_bytes())
    with pytest.raises(ValueError, match="train.batch_size=6 does not divide over 8 devices"):
        check_rows(config, model)
