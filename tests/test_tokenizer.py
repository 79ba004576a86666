"""Tokenizers as they are loaded, and the packaged one."""

import json

import pytest
import sentencepiece
from small_tokenizers import BYTE_TOKENIZER
from transformers import AutoConfig, AutoTokenizer

from jax_sft.data.tokenizer import load_tokenizer

EOS = 256  # of the packaged byte tokenizer, whose other ids are bytes


def test_packaged_tokenizer_has_a_byte_an_id_and_survives_saving(tmp_path):
    tokenizer = load_tokenizer(BYTE_TOKENIZER)
    text = "a\x00 é\r\n🙂<|endoftext|>"
    ids = tokenizer(text)["input_ids"]
    assert ids == [*"a\x00 é\r\n🙂".encode(), EOS]
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id) == (257, EOS, EOS)
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == ids and again.eos_token_id == EOS


def test_load_tokenizer_sets_what_it_is_told(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    tokenizer = load_tokenizer(BYTE_TOKENIZER, truncation_side="left", chat_template=str(template))
    assert (tokenizer.truncation_side, tokenizer.chat_template) == ("left", "{{ messages }}")
    assert load_tokenizer(BYTE_TOKENIZER, chat_template="{{ 1 }}").chat_template == "{{ 1 }}"


def test_a_missing_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer could be loaded") as caught:
        load_tokenizer(tmp_path / "nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="truncation_side is 'up'"):
        load_tokenizer(BYTE_TOKENIZER, truncation_side="up")


@pytest.mark.parametrize("model_type", ["gemma", "gpt2", "qwen2", "xglm"])
def test_what_transformers_makes_of_a_config_alone_is_no_tokenizer(model_type, tmp_path):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its tokenizer has no tokens but special ones; pass a"):
        load_tokenizer(tmp_path)


def test_code_beside_a_tokenizer_is_neither_run_nor_asked_for(tmp_path, monkeypatch):
    fields = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    (tmp_path / "own.py").write_text("raise RuntimeError('run')")
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_model_alone_is_used_as_llama_does(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("hello world\nhello there\nthe other world\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("hello world", "the 3 others", "two  spaces"):
        assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
