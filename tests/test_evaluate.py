"""Eval loss as one sum over one weight; sweeps; what a metric_fn may return."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jax_sft.evaluate import check_scores, evaluate_loss, evaluate_prompts, sweep


def test_eval_loss_is_one_sum_over_one_weight():
    """Means of batches, 3 and 1, would give 2; by tokens it is (3 + 9) / (1 + 9)."""
    sums = {"a": (jnp.float32(3), jnp.float32(1)), "b": (jnp.float32(9), jnp.float32(9))}
    got = evaluate_loss(sums.get, ["a", "b"], name="eval")
    assert got == {"eval/loss": 1.2, "eval/perplexity": pytest.approx(math.exp(1.2))}


def test_a_huge_loss_has_a_finite_perplexity():
    got = evaluate_loss(lambda _: (jnp.float32(1e6), jnp.float32(1)), ["a"], name="eval")
    assert got["eval/loss"] == 1e6
    assert np.isfinite(got["eval/perplexity"])


def test_a_sweep_is_every_combination_with_its_name():
    got = sweep(dict(top_k=[1, 5], top_p=0.9, temperature=(0.5, 1.0)))
    assert [suffix for suffix, _ in got] == [
        "@top_k=1@temperature=0.5",
        "@top_k=1@temperature=1.0",
        "@top_k=5@temperature=0.5",
        "@top_k=5@temperature=1.0",
    ]
    assert got[1][1] == dict(top_k=1, top_p=0.9, temperature=1.0)


def test_nothing_to_sweep_is_one_run_without_a_name():
    assert sweep(dict(top_k=3)) == [("", dict(top_k=3))]


def test_metric_fn_gets_samples_prompts_outputs_and_metadata():
    calls = []

    def metric_fn(**kwargs):
        calls.append(kwargs)
        return {"length": [len(output) for output in kwargs["outputs"]], "mean": 0.25}

    metrics, [table] = evaluate_prompts(
        lambda kwargs: [kwargs["word"], kwargs["word"] * 2],
        prompts=["a ", "b "],
        metadata={"answer": ["x", "y"]},
        gen_kwargs=dict(word="no"),
        metric_fn=metric_fn,
    )
    assert calls == [
        dict(
            samples=["a no", "b nono"],
            prompts=["a ", "b "],
            outputs=["no", "nono"],
            answer=["x", "y"],
        )
    ]
    assert metrics["metrics/length"] == 3.0
    assert metrics["metrics/mean"] == 0.25
    assert {"time/generate", "time/metric"} < set(metrics)
    assert table.title == "samples"
    assert table.columns == ["prompt", "output", "length"]
    assert table.rows == [["a ", "no", 2.0], ["b ", "nono", 4.0]]


def test_what_a_metric_fn_does_to_its_lists_stays_with_it():
    def metric_fn(**lists):
        for values in lists.values():
            values.clear()
        return {"x": 1.0}

    prompts, metadata = ["a"], {"answer": ["x"]}
    _, [table] = evaluate_prompts(
        lambda _: ["o"], prompts=prompts, metadata=metadata, gen_kwargs={}, metric_fn=metric_fn
    )
    assert (table.rows, prompts, metadata) == ([["a", "o"]], ["a"], {"answer": ["x"]})


def test_a_score_may_not_have_the_name_of_a_column():
    with pytest.raises(ValueError, match="score named 'output', as a column of the samples is"):
        evaluate_prompts(
            lambda _: ["o"],
            prompts=["p"],
            metadata={},
            gen_kwargs={},
            metric_fn=lambda **_: {"output": [1.0]},
        )


def test_each_swept_value_has_its_metrics_and_table():
    metrics, tables = evaluate_prompts(
        lambda kwargs: ["x" * kwargs["top_k"]],
        prompts=["p"],
        metadata={},
        gen_kwargs=dict(top_k=[1, 3]),
        metric_fn=lambda outputs, **_: {"length": [len(output) for output in outputs]},
    )
    assert metrics["metrics/length@top_k=1"] == 1.0
    assert metrics["metrics/length@top_k=3"] == 3.0
    assert [table.title for table in tables] == ["samples@top_k=1", "samples@top_k=3"]
    assert tables[1].columns == ["prompt", "output", "length", "top_k"]
    assert tables[1].rows == [["p", "xxx", 3.0, 3]]


def test_without_a_metric_fn_there_are_samples_alone():
    metrics, [table] = evaluate_prompts(
        lambda _: ["o"], prompts=["p"], metadata={}, gen_kwargs={}, metric_fn=None
    )
    assert set(metrics) == {"time/generate", "time/metric"}
    assert table.rows == [["p", "o"]]


@pytest.mark.parametrize(
    "values",
    [[1, 0], [True, False], np.array([1, 0]), jnp.array([1.0, 0.0]), (1.0, np.float32(0)), 0.5],
    ids=lambda values: type(values).__name__,
)
def test_scores_may_be_any_numbers(values):
    assert check_scores({"x": values}, num_samples=2)["x"].mean() == 0.5


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], "metric_fn returned list: expected a dict"),
        (None, "metric_fn returned NoneType: expected a dict"),
        ({"x": [1.0]}, r"'x' of shape \[1\]: expected one number, or one for each of the 2"),
        ({"x": [[1.0], [2.0]]}, r"'x' of shape \[2, 1\]"),
        ({"x": ["good", "bad"]}, r"returned .*'good', 'bad'.* for 'x': expected numbers"),
        ({"x": ["1", "2"]}, "for 'x': expected numbers"),
        ({"x": [1.0, None]}, "for 'x': expected numbers"),
        ({"x": [[1.0], [2.0, 3.0]]}, "for 'x': expected numbers"),
    ],
)
def test_what_is_no_score_is_named(scores, message):
    with pytest.raises(ValueError, match=message):
        check_scores(scores, num_samples=2)
