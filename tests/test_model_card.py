"""The model card: what it was made from and how it did."""

import jax_sft
from jax_sft.model_card import write_model_card

REPORT = {"kept": 1800, "rows_read": 2000, "trained_tokens": 12345, "trained_share": 0.25}


def card(tmp_path, history, **sections):
    folder = tmp_path / "hf_model"
    folder.mkdir()
    config = jax_sft.default_sft_config().evolve(**sections).to_dict()
    write_model_card(folder, config=config, data_report=REPORT, history=history)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_it_says_where_the_model_comes_from_and_how_it_did(tmp_path):
    history = [
        {"step": 0, "eval/loss": 9.0, "metrics/x": None},
        {"step": 10, "loss": 2.0, "learning_rate": 1e-4},
        {"step": 10, "eval/loss": 2.34567, "metrics/x": 0.5, "time/generate": 3.0},
    ]
    text = card(tmp_path, history)
    assert "| started from | gpt2 |" in text
    assert "| samples | 1,800 of 2,000 rows read |" in text
    assert "12,345 (25.0%)" in text
    assert "| steps | 10 of 8 rows x 1024 tokens |" in text
    assert "| eval/loss | 2.346 |" in text and "| metrics/x | 0.5 |" in text
    assert "time/generate" not in text
    assert 'from_pretrained("hf_model")' in text


def test_random_weights_and_metrics_that_are_no_number(tmp_path):
    model = dict(init="random", config=dict(model_type="gpt2"))
    text = card(tmp_path, [{"step": 1, "loss": None}], model=model)
    assert "| started from | random weights |" in text
    assert "| loss |" not in text


def test_before_the_first_step(tmp_path):
    assert "| steps | 0 of" in card(tmp_path, [])
