"""python -m jax_sft.export --checkpoint_dir=DIR --output=DIR: a checkpoint to `transformers`.

In: a run's folder and a step of it. Out: a folder that `transformers` loads. Only the parameters
are read, not the optimizer's state, and they are spread over the devices that are here, however
many the run had.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from jax_sft.command import Parser, join_processes, run_command
from jax_sft.distributed import is_first


def main(argv: Sequence[str]) -> None:
    """Writes a step of a run as a `transformers` folder.

    Raises:
        ValueError: no such run or step, or its files are damaged.
    """
    parser = Parser("python -m jax_sft.export", description=__doc__)
    parser.add_argument("--checkpoint_dir", required=True, help="a run's folder")
    parser.add_argument("--step", type=int, help="a checkpoint's step; the newest if left out")
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args(argv)
    join_processes()
    import jax  # after --help: these take seconds

    from jax_sft.checkpoint import Checkpoints
    from jax_sft.config import SFTConfig
    from jax_sft.data.tokenizer import load_tokenizer
    from jax_sft.manifest import read_manifest
    from jax_sft.recipe import open_model
    from jax_sft.run_folder import CHECKPOINTS, TOKENIZER, read_config
    from jax_sft.sharding import make_mesh

    run_dir = Path(args.checkpoint_dir)
    checkpoints = Checkpoints.open_for_reading(run_dir)
    step = checkpoints.latest() if args.step is None else args.step
    saved = read_manifest(run_dir / CHECKPOINTS, step)
    config = SFTConfig.from_dict(read_config(run_dir))
    config.mesh, config.model.attention = {}, "auto"  # this machine's, not those of the run
    model = open_model(config, load_tokenizer(run_dir / TOKENIZER))
    decoder = model.decoder.config
    ways = math.gcd(jax.device_count(), decoder.width, decoder.embed_width or decoder.width)
    model.mesh = make_mesh(data=-1, fsdp=ways, sequence=1, tensor=1)
    num_rows = saved["leaves"]["params/embed/tokens"]["shape"][0]  # padded for the run's mesh
    model.decoder = model.decoder.clone(vocab_padding=num_rows - decoder.vocab_size)
    model.source_dtypes = saved["data"]["source_dtypes"]
    model.generation_config.eos_token_id = saved["data"]["stop_ids"] or None
    like = {"params": model.param_structs()}
    model.params = checkpoints.restore(step, like, part="params/")["params"]
    model.save_pretrained(args.output, dtype=args.dtype)
    if is_first():
        print(f"saved step {step} of {run_dir} to {args.output}")


if __name__ == "__main__":
    run_command(main)
