"""python -m jax_sft.generate --model=DIR --prompt=TEXT [--prompt=...]: prompts a model.

In: a `transformers` folder, such as a run's hf_model, and prompts. Out: each prompt with its
output, and with --chat the answer alone. It is greedy, unless a temperature, top_k or top_p says
how to sample.
"""

from collections.abc import Sequence

from jax_sft.command import Parser, join_processes, run_command
from jax_sft.distributed import is_first


def main(argv: Sequence[str]) -> None:
    """Prints what the model makes of each prompt.

    Raises:
        ValueError: the folder holds no model, or a prompt does not fit.
    """
    parser = Parser("python -m jax_sft.generate", description=__doc__)
    parser.add_argument("--model", required=True, help="a transformers folder, or a hub name")
    parser.add_argument("--prompt", required=True, action="append", help="may be repeated")
    parser.add_argument(
        "--chat", action="store_true", help="prompts are a user's messages, for the chat template"
    )
    parser.add_argument("--stop", action="append", default=[], help="a string that ends an output")
    parser.add_argument("--max_new_tokens", type=int, default=40)
    parser.add_argument(
        "--temperature", type=float, help="0 is greedy; 1 beside --top_k or --top_p, else 0"
    )
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    join_processes()
    from jax_sft.model.causal_lm import CausalLM  # after --help: it takes seconds

    model = CausalLM.from_pretrained(args.model)
    prompts = args.prompt
    if args.chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in args.prompt]
    samples = args.top_k > 0 or args.top_p < 1
    outputs = model.generate(
        prompts,
        stop_sequences=args.stop,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        temperature=float(samples) if args.temperature is None else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
    )
    if not is_first():
        return
    for prompt, output in zip(args.prompt, outputs, strict=True):
        print(output if args.chat else f"{prompt}{output}")


if __name__ == "__main__":
    run_command(main)
