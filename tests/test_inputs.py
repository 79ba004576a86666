"""What a run is given: arguments win over the config, and the tokenizer follows the model."""

import functools

import pytest
from small_tokenizers import metaspace, packaged_bytes
from tiny_runs import SAMPLES, tiny_config
from transformers import AutoTokenizer

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
    assert "from the file" in from_config.train.examples[0].text()
    assert "held out" in from_config.evals[""].examples[0].text()
    assert from_config.evals[""].counts.kept == 1
    assert from_config.prompts.texts == ["asked"]
    assert from_config.stop_sequences == ("stop",)
    assert load(config, samples=["a"], stop_sequences=None).stop_sequences == ("stop",)
    assert from_config.metric_fn(4.0) == 2.0

    passed = load(
        config,
        samples=["a"],
        eval_samples=["b"],
        eval_prompts=["c"],
        metric_fn=len,
        stop_sequences=["d"],
    )
    assert passed.train.examples[0].text().startswith("a")
    assert passed.evals[""].examples[0].text().startswith("b")
    assert (passed.prompts.texts, passed.stop_sequences) == (["c"], ("d",))
    assert passed.metric_fn is len


def test_what_was_trained_does_not_measure(tmp_path):
    (tmp_path / "texts.txt").write_text("one\n")
    source = str(tmp_path / "texts.txt")
    with pytest.raises(ValueError, match="data.eval is .*texts.txt', as data.train is"):
        load(tiny_config("run", data=dict(train=source, eval=source)), samples=None)
    other = dict(eval=f"{tmp_path}/./texts.txt", eval_split="test")
    with pytest.raises(ValueError, match="data.eval is .*texts.txt', as data.train is"):
        load(tiny_config("run", data=dict(train=source, **other)), samples=None)


def test_the_split_of_the_training_data_is_not_that_of_an_eval_file(tmp_path):
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n" * 10)
    data = dict(train=f"{tmp_path}/train.txt", eval=f"{tmp_path}/held_out.txt")
    inputs = load(tiny_config("run", data=data | dict(split="train[:20%]")), samples=None)
    assert inputs.train.counts.kept == 2 and inputs.evals[""].counts.kept == 10


def test_metadata_may_not_take_the_names_that_metric_fn_is_given():
    with pytest.raises(ValueError, match="key 'outputs', which metric_fn is given"):
        load(tiny_config("run"), eval_prompts=[{"prompt": "a", "outputs": "b"}])


def test_parts_of_a_file_may_be_trained_and_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{n}\n" for n in range(10)))
    data = dict(train=f"{tmp_path}/a.txt", eval=f"{tmp_path}/a.txt", split="train[:80%]")
    config = tiny_config("run", data=data | dict(eval_split="train[80%:]"))
    inputs = load(config, samples=None)
    assert (inputs.train.counts.kept, inputs.evals[""].counts.kept) == (8, 2)


def test_a_metric_may_be_wrapped():
    @functools.wraps(lambda outputs: None)
    def metric_fn(**given):
        return {"n": len(given["outputs"])}

    assert load(tiny_config("run"), eval_prompts=["a"], metric_fn=metric_fn).metric_fn is metric_fn


def test_prompts_that_cannot_be_counted_are_named():
    with pytest.raises(ValueError, match="eval_prompts is a generator, which cannot be indexed"):
        load(tiny_config("run"), eval_prompts=(text for text in "ab"))


def test_a_path_is_no_tokenizer():
    with pytest.raises(ValueError, match="tokenizer is a str: pass a transformers tokenizer"):
        jax_sft.tokenize(["a"], "folder")
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


def texts_of(example_set):
    return [example.text() for example in example_set.examples]


def write_lines(folder, name, *lines):
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return str(folder / name)


def test_a_mixture_sees_each_source_as_often_as_it_says(tmp_path):
    many = write_lines(tmp_path, "many.txt", *(f"many {n}" for n in range(10)))
    few = write_lines(tmp_path, "few.txt", "few 0", "few 1")
    once = write_lines(tmp_path, "once.txt", "once 0")
    config = tiny_config("run", data=dict(train=[[many, 0.5], [few, 2.5], once]))
    train = load(config, samples=None).train
    texts = [text.removesuffix("<|endoftext|>") for text in texts_of(train)]
    assert sum("many" in text for text in texts) == 5 == len(set(texts) - {"few 0", "few 1"}) - 1
    assert sorted(texts.count(f"few {n}") for n in range(2)) == [2, 3]
    assert texts.count("once 0") == 1
    assert [(source.name, source.times) for source in train.sources] == [
        (many, 0.5),
        (few, 2.5),
        (once, 1.0),
    ]
    assert (train.counts.rows_read, train.counts.kept) == (13, 13)
    again = load(config, samples=None).train
    assert texts_of(again) == texts_of(train), "drawn by the seed"
    other = load(config.evolve(train=dict(seed=7)), samples=None).train
    assert texts_of(other) != texts_of(train)
    origins = {example.origin for example in train.examples}
    assert "few.txt line 2" in origins and "once.txt line 1" in origins


def test_eval_sets_have_names(tmp_path):
    held_out = {name: write_lines(tmp_path, f"{name}.txt", name) for name in ("easy", "hard")}
    from_config = load(tiny_config("run", data=dict(eval=held_out)))
    assert {name: texts_of(one)[0][:4] for name, one in from_config.evals.items()} == {
        "easy": "easy",
        "hard": "hard",
    }
    passed = load(tiny_config("run"), eval_samples={"mine": ["own"]})
    assert list(passed.evals) == ["mine"]
    with pytest.raises(ValueError, match="no eval sample of mine has a trained token"):
        load(tiny_config("run"), eval_samples={"mine": [["a" * 40, "b"]]})


def test_another_split_of_the_training_data_measures(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder, "train.jsonl", '{"text": "seen"}')
    write_lines(folder, "test.jsonl", '{"text": "unseen"}')
    data = dict(train=str(folder), eval=str(folder), eval_split="test")
    held_out = load(tiny_config("run", data=data), samples=None).evals[""]
    assert texts_of(held_out)[0].startswith("unseen")
    with pytest.raises(ValueError, match="data.eval_split"):
        load(tiny_config("run", data=data | dict(eval_split=None)), samples=None)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(template=CHATML):
    tokenizer = AutoTokenizer.from_pretrained(BYTE_TOKENIZER)
    tokens = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = template
    return tokenizer


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_a_conversation_is_trained_from_its_eval_prompt_on():
    tokenizer = chat_tokenizer()
    config = tiny_config("run", train=dict(seq_length=128))
    given = dict(samples=[CHAT], eval_prompts=[CHAT[:1]])
    inputs = load(config, tokenizer, **given)
    [example] = inputs.train.examples
    prompt, [prompt_ids] = inputs.prompts.texts[0], inputs.prompts.ids
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert example.ids[: len(prompt_ids)] == prompt_ids
    trained = example.targets_T[example.weights_T > 0]
    assert tokenizer.decode(trained) == "Hello<|im_end|>"
    assert inputs.train.counts.stop_tokens == {"<|im_end|>": 1}
    assert inputs.prompts.note is None
    own = CHATML.replace("assistant\n'", "assistant'")
    note = load(config, chat_tokenizer(own), **given).prompts.note
    end = repr("nd|>\n<|im_start|>assistant\n"[-25:])
    assert note == (
        f"as training has them, with {end}; add_generation_prompt would have "
        + repr("|>\n<|im_start|>assistant"[-24:])
    )
    early = CHATML.replace("{% for", "{{ 'Hey. ' if add_generation_prompt }}{% for", 1)
    note = load(config, chat_tokenizer(early), **given).prompts.note
    assert note == (
        "as training has them, with '<|im_start|>user\\nHi<|im_'; add_generation_prompt would have "
        "'Hey. <|im_start|>user\\nHi'"
    )


def test_the_options_of_the_config_reach_the_chat_template():
    template = CHATML.replace("{% for", "{{ motto }}{% for", 1)
    config = tiny_config(
        "run",
        train=dict(seq_length=128),
        tokenizer=dict(chat_template_kwargs=dict(motto="Be kind."), stop_tokens=["<|endoftext|>"]),
    )
    inputs = load(config, chat_tokenizer(template), samples=[CHAT], eval_prompts=[CHAT[:1]])
    assert inputs.prompts.texts[0].startswith("Be kind.<|im_start|>user")
    assert inputs.train.counts.stop_tokens == {"<|endoftext|>": 1}


def test_bad_rows_are_errors_or_counted():
    rows = ["good", "", "good too"]
    with pytest.raises(ValueError, match=r"samples\[1\] is empty"):
        load(tiny_config("run"), samples=rows)
    train = load(tiny_config("run", data=dict(on_bad_row="skip")), samples=rows).train
    assert (train.counts.rows_read, train.counts.kept) == (3, 2)
    assert train.counts.dropped == {"empty_text": 1}
    assert "samples[1] is empty" in train.counts.shown["empty_text"][0]
    assert [example.origin for example in train.examples] == ["samples[0]", "samples[2]"]
