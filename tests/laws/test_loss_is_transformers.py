"""The loss over packed rows is what transformers computes for each sample by itself.

Ids, masks and labels of the oracle are made with the tokenizer and transformers alone: text
and prompts by plain encoding, conversations by a chat template that marks its answers, where
ours gets the same template without the marks.
"""

import numpy as np
import pytest
from tiny_runs import TINY_GPT2, tiny_config
from transformers import AutoTokenizer

import jax_sft
from jax_sft.config import BYTE_TOKENIZER

torch = pytest.importorskip("torch")

WORDS = "the film was slow and yet it held me to the very last of its frames".split()
TEXTS = [" ".join(WORDS[i % 5 : 3 + i]) for i in range(9)]
PAIRS = [[f"Say {word}, {n} times.\n", " ".join([word] * n)] for n, word in enumerate(WORDS[:7], 1)]
CHATS = [
    [{"role": "system", "content": "Be brief."}] * (n % 2)
    + [
        {"role": role, "content": f"{word} {n}{turn}"}
        for turn in range(n)
        for role, word in (("user", "Why?"), ("assistant", "Because."))
    ]
    for n in range(1, 5)
]
TURN = "{{ '<|im_start|>' + m.role + '\\n' }}%s{{ '\\n' }}"
ANSWER = "{{ m.content + '<|im_end|>' }}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    + TURN % ("{% generation %}" + ANSWER + "{% endgeneration %}")
    + "{% else %}"
    + TURN % ANSWER
    + "{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}" + TURN % ANSWER + "{% endfor %}"


def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(BYTE_TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = PLAIN
    return tokenizer


def labelled(sample, tokenizer):
    """A sample's ids, and its labels as transformers has them: -100 is not trained."""
    if isinstance(sample, str):
        ids = [*tokenizer.encode(sample, add_special_tokens=False), tokenizer.eos_token_id]
        return ids, ids
    if isinstance(sample[0], str):
        prompt, output = (tokenizer.encode(text, add_special_tokens=False) for text in sample)
        ids = [*prompt, *output, tokenizer.eos_token_id]
        return ids, [-100] * len(prompt) + ids[len(prompt) :]
    marked = tokenizer.apply_chat_template(
        sample,
        chat_template=MARKED,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = marked["input_ids"], marked["assistant_masks"]
    return ids, [i if trained else -100 for i, trained in zip(ids, mask, strict=True)]


def transformers_loss(folder, samples, tokenizer):
    """The mean over all trained tokens of losses that were computed sample by sample."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    losses, counts = [], []
    for sample in samples:
        ids, labels = (torch.tensor([part]) for part in labelled(sample, tokenizer))
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=labels).loss.item())
        counts.append(int((labels[0, 1:] != -100).sum()))
    return np.average(losses, weights=counts), sum(counts)


@pytest.mark.parametrize(
    ("samples", "packing"),
    [(TEXTS, "best_fit"), (PAIRS, "best_fit"), (CHATS, "best_fit"), (CHATS, "none")],
)
def test_the_loss_is_that_of_each_sample_alone(samples, packing, tmp_path):
    config = tiny_config(
        tmp_path / "run",
        train=dict(seq_length=256, total_steps=1, batch_size=8),
        model=dict(config=TINY_GPT2 | dict(n_positions=256)),
        optimizer=dict(kwargs=dict(lr=0.0)),
        data=dict(packing=packing),
    )
    trainer = jax_sft.train(
        samples=samples, eval_samples=samples, eval_prompts=[], config=config, tokenizer=tokenizer()
    )
    expected, num_trained = transformers_loss(
        tmp_path / "run" / "hf_model", samples, trainer.inputs.tokenizer
    )
    assert trainer.data_report["trained_tokens"] == num_trained
    # Both are means over some hundred tokens; ours is summed in float32.
    assert trainer.history[0]["eval/loss"] == pytest.approx(expected, rel=2e-6)
