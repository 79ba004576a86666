"""The memory that loading takes on the host, measured on a gigabyte of weights.

The files are holes: their zeros take no room on the disk, and as much memory as other numbers.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

MIB = 1 << 20
BUDGET = 256 * MIB
# Compiled programs, and what the allocator keeps of smaller blocks that were freed.
REST = 128 * MIB
# Embedding and head are all but everything, and each is of twice the budget: whichever comes
# second is read when the other is there.
V, L, D, F, H = 150_000, 2, 1024, 1_000, 8
CONFIG = dict(
    model_type="llama",
    vocab_size=V,
    num_hidden_layers=L,
    hidden_size=D,
    intermediate_size=F,
    num_attention_heads=H,
    num_key_value_heads=H,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
    tie_word_embeddings=False,
)
LINEAR = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (D, D), "self_attn.v_proj": (D, D)}
LINEAR |= {"self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D)}
LINEAR |= {"mlp.down_proj": (D, F)}


def torch_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for layer in range(L):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.{name}.weight": shape for name, shape in LINEAR.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}.{name}.weight"] = (D,)
    return shapes | {"lm_head.weight": (V, D)}


def num_bytes(shape: tuple[int, ...]) -> int:
    return 4 * int(np.prod(shape))


def write_safetensors(folder: Path) -> None:
    header, end = {}, 0
    for name, shape in torch_shapes().items():
        start, end = end, end + num_bytes(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_msgpack(folder: Path) -> None:
    """Writes what flax.serialization would, with maps and arrays of 32-bit lengths."""
    tree: dict = {}
    for name, shape in torch_shapes().items():
        *above, last = name.split(".")
        if len(shape) == 2:
            last = "embedding" if "embed" in name else "kernel"
            shape = shape if "embed" in name else shape[::-1]
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = shape

    def string(text: str) -> bytes:
        return b"\xd9" + bytes([len(text)]) + text.encode()

    def long(code: bytes, number: int) -> bytes:
        return code + number.to_bytes(4, "big")

    def write(file, value) -> None:
        if isinstance(value, dict):
            file.write(long(b"\xdf", len(value)))
            for key, inner in value.items():
                file.write(string(key))
                write(file, inner)
            return
        sizes = b"".join(long(b"\xce", size) for size in value)
        head = b"\x93" + long(b"\xdd", len(value)) + sizes + string("float32")
        head += long(b"\xc6", num_bytes(value))
        file.write(long(b"\xc9", len(head) + num_bytes(value)) + b"\x01" + head)
        file.truncate(file.tell() + num_bytes(value))
        file.seek(0, os.SEEK_END)

    with (folder / "flax_model.msgpack").open("wb") as file:
        write(file, tree)


MEASURE = """
    import sys
    from pathlib import Path
    import jax
    from jax_sft.model import pretrained
    from jax_sft.model.causal_lm import CausalLM

    def memory(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    budget, *folders = sys.argv[1:]
    jax.numpy.zeros(1).block_until_ready()
    for folder in folders:
        model = CausalLM.open(folder)
        like = model.param_structs()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts at what is used
        before = memory("VmHWM")
        params, _ = pretrained.load_params(
            model.folder, model.family, config=model.decoder.config, like=like,
            staging_bytes=int(budget),
        )
        print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), memory("VmHWM") - before)
        del params
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say what was used")
def test_loading_a_gigabyte_takes_its_parameters_and_the_budget(tmp_path):
    folders = {name: tmp_path / name for name in ("safetensors", "flax")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(folders["safetensors"])
    write_msgpack(folders["flax"])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(BUDGET), *folders.values()],
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for name, line in zip(folders, done.stdout.splitlines(), strict=True):
        size, peak = map(int, line.split())
        print(f"{name}: {size / MIB:.0f} MiB, and {(peak - size) / MIB:.0f} MiB at the peak")
        assert size == sum(map(num_bytes, torch_shapes().values())) > 10**9
        assert size <= peak < size + BUDGET + REST
