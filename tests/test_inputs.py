"""What a run is given: arguments win over the config, and the tokenizer follows the model."""

import pytest
from small_tokenizers import metaspace, packaged_bytes
from tiny_runs import SAMPLES, tiny_config

import jax_sft
from jax_sft.config import BYTE_TOKENIZER
from jax_sft.inputs import find_tokenizer, load_inputs


def load(config, tokenizer=None, **given):
    arguments = dict(
        samples=SAMPLES, eval_samples=None, eval_prompts=None, metric_fn=None, stop_sequences=()
    )
    tokenizer = packaged_bytes() if tokenizer is None else tokenizer
    return load_inputs(config, tokenizer=tokenizer, **(arguments | given))


def test_arguments_win_over_the_config(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("from the file\n")
    (tmp_path / "held_out.txt").write_text("held out\n")
    config = tiny_config(
        "run",
        data=dict(
            train=str(file),
            eval=str(tmp_path / "held_out.txt"),
            eval_prompts=("asked",),
            stop_sequences=("stop",),
            metric_fn="math:sqrt",
        ),
    )
    from_config = load(config, samples=None)
    assert "from the file" in from_config.examples[0].text()
    assert "held out" in from_config.eval_examples[0].text()
    assert from_config.eval_counts.kept == 1
    assert from_config.prompts.texts == ["asked"]
    assert from_config.stop_sequences == ("stop",)
    assert from_config.metric_fn(4.0) == 2.0

    passed = load(
        config,
        samples=["a"],
        eval_samples=["b"],
        eval_prompts=["c"],
        metric_fn=len,
        stop_sequences=["d"],
    )
    assert passed.examples[0].text().startswith("a")
    assert passed.eval_examples[0].text().startswith("b")
    assert (passed.prompts.texts, passed.stop_sequences) == (["c"], ("d",))
    assert passed.metric_fn is len


def test_what_was_trained_does_not_measure(tmp_path):
    (tmp_path / "texts.txt").write_text("one\n")
    source = str(tmp_path / "texts.txt")
    with pytest.raises(ValueError, match="data.eval is .*texts.txt', as data.train is"):
        load(tiny_config("run", data=dict(train=source, eval=source)), samples=None)


def test_metadata_may_not_take_the_names_that_metric_fn_is_given():
    with pytest.raises(ValueError, match="key 'outputs', which metric_fn is given"):
        load(tiny_config("run"), eval_prompts=[{"prompt": "a", "outputs": "b"}])


def test_a_path_is_no_tokenizer():
    with pytest.raises(ValueError, match="tokenizer is a str: pass a transformers tokenizer"):
        find_tokenizer(tiny_config("run"), "folder")


def test_without_a_tokenizer_of_its_own_the_model_is_named():
    config = tiny_config("run", tokenizer=dict(tokenizer_path=None))
    config.model.model_path = "no/such/model"
    with pytest.raises(ValueError, match="model.model_path is 'no/such/model' and .*DIR"):
        find_tokenizer(config, None)


def test_without_prompts_the_tokenizers_bos_is_asked(tmp_path):
    config = tiny_config("run", train=dict(batch_size=8))
    assert load(config, metaspace()).prompts.texts == ["<s>"] * 8
    assert load(config, metaspace(), eval_prompts=[]).prompts is None, "the way to ask for none"


def test_no_bos_no_prompts():
    tokenizer = packaged_bytes()
    bos = tokenizer.bos_token
    prompts = load(tiny_config("run"), tokenizer).prompts
    assert (prompts is None) == (bos is None)


def test_a_prompt_keeps_its_metadata_and_its_ids():
    prompts = load(
        tiny_config("run"),
        eval_prompts=[{"prompt": "ab", "answer": "c"}, {"prompt": ["a", "b", "c"], "answer": "d"}],
    ).prompts
    assert prompts.texts == ["ab", "abc"]
    assert prompts.metadata == {"answer": ["c", "d"]}
    assert prompts.ids[0] == packaged_bytes().encode("ab", add_special_tokens=False)


@pytest.mark.parametrize("named", [None, BYTE_TOKENIZER])
def test_the_tokenizer_follows_the_model_unless_it_is_set(named):
    config = jax_sft.default_sft_config()
    config.model.model_path = BYTE_TOKENIZER if named is None else "elsewhere"
    config.tokenizer.tokenizer_path = named
    assert len(find_tokenizer(config, None)) == len(packaged_bytes())
    assert find_tokenizer(config, metaspace()) is metaspace()


def test_tokenize_shows_what_is_trained():
    examples = jax_sft.tokenize([["ab", "cd"]], tokenizer=packaged_bytes())
    ids = packaged_bytes().encode("abcd", add_special_tokens=False)
    eos = packaged_bytes().eos_token_id
    assert examples[0].inputs_T.tolist() == ids
    assert examples[0].targets_T.tolist() == [*ids[1:], eos]
    assert examples[0].weights_T.tolist() == [0.0, 1.0, 1.0, 1.0]


def test_eval_samples_without_a_trained_token_are_refused():
    config = tiny_config("run")
    with pytest.raises(ValueError, match="no eval sample has a trained token"):
        load(config, eval_samples=[["a" * 40, "b"]])
