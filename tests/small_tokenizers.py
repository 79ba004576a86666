"""Tokenizers small enough to build in a test, one for each behaviour that matters here.

byte_bpe merges bytes and adds no BOS; its EOS is its BOS. pad_is_eos is the same with the
pad token that users set. metaspace adds "▁" in front of a text and a BOS, and falls back to
bytes, as Llama's does. The packaged byte tokenizer merges nothing.
"""

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import jax_sft.data

BYTE_TOKENIZER = Path(jax_sft.data.__file__).parent / "byte_tokenizer"
CORPUS = ["hello world", "hello there, world wide", "the other one there", "low lower lowest"] * 9


@functools.cache
def byte_bpe(pad_token: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>", pad_token=pad_token
    )


def pad_is_eos() -> PreTrainedTokenizerFast:
    return byte_bpe(pad_token="<eos>")


@functools.cache
def metaspace() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"]
    names = special + [f"<0x{byte:02X}>" for byte in range(256)] + list(model["vocab"])
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@functools.cache
def packaged_bytes() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BYTE_TOKENIZER)


@functools.cache
def without_specials() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(packaged_bytes().backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


ALL = [byte_bpe, pad_is_eos, metaspace, packaged_bytes]
