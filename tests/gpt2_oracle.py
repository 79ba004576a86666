"""GPT-2 as `transformers` computes it in PyTorch, on weights that need neither to be made.

A case is a set of config fields that differ from `FIELDS`. Its weights come from numpy's
generator, under the names and shapes that `transformers` has, written out here by hand, so
that they do not depend on the code under test. `run_torch` gives the numbers to match;
`scripts/make_golden.py` stores them in tests/laws/golden/gpt2.npz.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from transformers import GPT2Config

GOLDEN = Path(__file__).parent / "laws" / "golden" / "gpt2.npz"

FIELDS = dict(
    n_layer=2,
    n_embd=24,
    n_head=3,
    n_positions=16,
    vocab_size=41,
    bos_token_id=0,
    eos_token_id=0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
)
# Options in twos and threes, each of which alone moves a logit by 7e-4 or more, so that
# five compilations show every one of them both on and off.
OPTIONS = {
    "plain": {},
    "gelu_fast": dict(activation_function="gelu_fast"),
    "gelu_pytorch_tanh": dict(activation_function="gelu_pytorch_tanh"),
    "upcast": dict(reorder_and_upcast_attn=True),
    "relu, n_inner": dict(activation_function="relu", n_inner=20),
    "gelu, unscaled": dict(activation_function="gelu", scale_attn_weights=False),
    "silu, by layer": dict(activation_function="silu", scale_attn_by_inverse_layer_idx=True),
    "swish, by layer": dict(activation_function="swish", scale_attn_by_inverse_layer_idx=True),
    "tanh, eps, untied": dict(
        activation_function="tanh", layer_norm_epsilon=0.3, tie_word_embeddings=False
    ),
}
# Two examples, and which of their targets are trained.
IDS = [[5, 11, 0, 7, 7, 40, 3, 22, 9, 1], [33, 2, 2, 19, 0, 28]]
TRAINED = [[0, 0, 0, 1, 1, 1, 1, 0, 1], [0, 1, 1, 1, 1]]


def config_of(name: str) -> GPT2Config:
    return GPT2Config(**(FIELDS | OPTIONS[name]))


def weights_of(config: GPT2Config) -> dict[str, np.ndarray]:
    """Weights by their `transformers` names; linear layers are [in, out] but for lm_head."""
    D, F = config.n_embd, config.n_inner or 4 * config.n_embd
    shapes = {"transformer.wte.weight": (config.vocab_size, D)}
    shapes["transformer.wpe.weight"] = (config.n_positions, D)
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        linears = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D)}
        linears |= {"mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
        for name, shape in linears.items():
            shapes[f"{block}.{name}.weight"] = shape
            shapes[f"{block}.{name}.bias"] = shape[1:]
        for name in ("ln_1", "ln_2"):
            shapes[f"{block}.{name}.weight"] = shapes[f"{block}.{name}.bias"] = (D,)
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, D)
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        # random() is PCG64's bits as they are: the same numbers in every release of numpy.
        values = 0.8 * (rng.random(shape) - 0.5)
        return (values + (".ln_" in name and name.endswith("weight"))).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def write_folder(folder: Path, name: str) -> Path:
    """Writes a case as a `transformers` model folder."""
    config = config_of(name)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder)
    save_file(weights_of(config), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def probe(name: str, grad: np.ndarray) -> np.ndarray:
    """A tensor's gradient as three numbers: its norm, and its products with two random ones."""
    rng = np.random.default_rng(len(name) + grad.size)
    flat = np.asarray(grad, np.float64).ravel()
    return np.array([np.linalg.norm(flat), *((rng.random((2, flat.size)) - 0.5) @ flat)])


def torch_model(folder: Path):
    """The model of a folder in PyTorch, with its plainest attention."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


def run_torch(folder: Path) -> dict[str, np.ndarray]:
    """Logits of each example alone, the summed loss, and a probe of each gradient."""
    import torch

    model = torch_model(folder)
    logits, loss = [], 0.0
    for ids, trained in zip(IDS, TRAINED, strict=True):
        inputs, targets = torch.tensor([ids[:-1]]), torch.tensor(ids[1:])
        logits_TV = model(inputs).logits[0]
        losses_T = torch.nn.functional.cross_entropy(logits_TV, targets, reduction="none")
        loss = loss + (losses_T * torch.tensor(trained)).sum()
        logits.append(logits_TV.detach().numpy())
    loss.backward()
    grads = {name: param.grad.numpy() for name, param in model.named_parameters()}
    probes = np.stack([probe(name, grads[name]) for name in sorted(grads)])
    return {
        "logits": np.concatenate(logits),
        "loss": np.float32(loss.item()),
        "probes": probes.astype(np.float32),
    }
