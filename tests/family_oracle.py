"""What `transformers` computes in PyTorch for small models of any family, and where it is kept.

In comes a case: a dict of config fields, `model_type` among them. Its weights come from numpy's
generator under the names that `transformers` writes to disk, so that neither side makes them
and neither depends on the code under test. `scripts/make_golden.py` stores the names, shapes and
numbers in tests/families/golden/, for tests that run without PyTorch.
"""

import copy
import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoConfig

GOLDEN = Path(__file__).parent / "families" / "golden"

# Two examples, and which of their targets are trained.
IDS = [[5, 11, 0, 7, 7, 40, 3, 22, 9, 1], [33, 2, 2, 19, 0, 28]]
TRAINED = [[0, 0, 0, 1, 1, 1, 1, 0, 1], [0, 1, 1, 1, 1]]
PROMPTS = [[8, 30, 17, 4, 25, 12, 6], [33, 2, 19], [5, 11, 0, 7, 7, 40, 3, 22, 9, 1]]
NUM_NEW = 12

Shapes = dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Golden:
    """What is stored of a case.

    Attributes:
        fields: the config fields that it was made with.
        seed: of the weights.
        shapes: each tensor's shape, by its name on disk; all are float32.
        numbers: "logits" [14, V] of both examples, "tokens" [3, 12] after the prompts,
            the summed "loss", and "probes" [tensors, 3] of the gradients, sorted by name.
    """

    fields: dict[str, Any]
    seed: int
    shapes: Shapes
    numbers: dict[str, np.ndarray]

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """The weights that the numbers were computed with."""
        return draw_weights(self.shapes, self.seed)


def golden_file(model_type: str) -> Path:
    return GOLDEN / f"{model_type}.npz"


def read_golden(model_type: str) -> dict[str, Golden]:
    """Reads a model type's cases, by name."""
    about, numbers = {}, {}
    with np.load(golden_file(model_type)) as stored:
        for key in stored:
            name, _, what = key.rpartition("/")
            if what == "about":
                about[name] = json.loads(str(stored[key]))
            else:
                numbers.setdefault(name, {})[what] = stored[key]
    return {name: Golden(**about[name], numbers=numbers[name]) for name in about}


def write_golden(model_type: str, cases: dict[str, Golden]) -> Path:
    arrays = {}
    for name, golden in cases.items():
        about = {"fields": golden.fields, "seed": golden.seed, "shapes": golden.shapes}
        arrays[f"{name}/about"] = np.array(json.dumps(about))
        arrays |= {f"{name}/{what}": values for what, values in golden.numbers.items()}
    GOLDEN.mkdir(exist_ok=True)
    np.savez_compressed(golden_file(model_type), **arrays)
    return golden_file(model_type)


def config_of(fields: dict[str, Any]) -> Any:
    """The `transformers` config of a case, whose fields must be the class's own."""
    known = AutoConfig.for_model(fields["model_type"])
    # Models read head_dim even where the class does not declare it, as Qwen3-MoE's.
    unknown = [name for name in fields if not hasattr(known, name) and name != "head_dim"]
    assert not unknown, f"{type(known).__name__} has no {unknown}"
    # Copied, as some classes complete the rope_parameters that they are given.
    return AutoConfig.for_model(**copy.deepcopy(fields))


def draw_weights(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """Draws weights by name: uniform in ±0.4, norms' factors around 1.

    Wide, so that attention is far from even and each bias and option moves the logits.
    """
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        # random() is PCG64's bits as they are: the same numbers in every release of numpy.
        values = 0.8 * (rng.random(shape) - 0.5)
        is_norm = len(shape) == 1 and name.endswith("weight")
        weights[name] = (values + is_norm).astype(np.float32)
    return weights


def number_elements(shapes: Shapes) -> dict[str, np.ndarray]:
    """Weights whose every element is another whole number, counted from 0 by sorted name.

    Loaded like a checkpoint, they say where each element of a parameter tree comes from.
    """
    sizes = [int(np.prod(shapes[name])) for name in sorted(shapes)]
    assert sum(sizes) < 2**24, "float32 holds no larger whole numbers"
    starts = np.cumsum([0, *sizes])
    return {
        name: np.arange(start, start + size, dtype=np.float32).reshape(shapes[name])
        for name, start, size in zip(sorted(shapes), starts, sizes, strict=False)
    }


def by_their_names(shapes: Shapes, places: list[Any], values: list[Any]) -> dict[str, np.ndarray]:
    """Brings a parameter tree's leaves to their names on disk.

    Args:
        shapes: by name on disk.
        places: the leaves as loaded from `number_elements`.
        values: the same leaves, with what is to be named.
    """
    sizes = [int(np.prod(shapes[name])) for name in sorted(shapes)]
    flat = np.full(sum(sizes), np.nan, np.float32)
    for place, value in zip(places, values, strict=True):
        flat[np.asarray(place).astype(np.int64)] = np.asarray(value)
    assert not np.isnan(flat).any(), "a tensor on disk was not loaded whole, or has a NaN"
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(shapes[name]) for name, part in zip(sorted(shapes), parts, strict=True)
    }


def probe(name: str, grad: np.ndarray) -> np.ndarray:
    """A tensor's gradient as three numbers: its norm, and its products with two random ones."""
    rng = np.random.default_rng(len(name) + grad.size)
    flat = np.asarray(grad, np.float64).ravel()
    return np.array([np.linalg.norm(flat), *((rng.random((2, flat.size)) - 0.5) @ flat)])


def probe_all(grads: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack([probe(name, grads[name]) for name in sorted(grads)]).astype(np.float32)


def write_folder(folder: Path, fields: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    """Writes a `transformers` model folder."""
    config = config_of(fields)
    config.dtype = "float32"  # as transformers writes it
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# From here on torch is needed.


def shapes_on_disk(fields: dict[str, Any], folder: Path) -> Shapes:
    """Each tensor's name and shape as `transformers` saves it, by saving one."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config_of(fields)).save_pretrained(folder)
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                assert tensors.get_slice(name).get_dtype() == "F32", name
                shapes[name] = tensors.get_slice(name).get_shape()
    return shapes


def torch_model(folder: Path) -> Any:
    """The model of a folder in PyTorch, with its plainest attention that is right."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # for models of this size more only wait for each other
    # Falcon's eager attention adds the ALiBi biases twice; its default, like the original, once.
    kind = "sdpa" if getattr(AutoConfig.from_pretrained(folder), "alibi", False) else "eager"
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=kind, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: names for kind, names in info.items() if names}
    assert not wrong, f"transformers does not load {folder} whole: {wrong}"
    for module in model.modules():
        # It would leave the gradient of one row of the vocabulary out.
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    return model.eval()


def torch_logits(folder: Path) -> np.ndarray:
    """Logits [14, V] of each example alone; some models remember the longest they saw."""
    import torch

    with torch.no_grad():
        logits = [
            torch_model(folder)(torch.tensor([ids[:-1]]), use_cache=False).logits[0] for ids in IDS
        ]
    return torch.cat(logits).numpy()


def torch_greedy(folder: Path, *, over_cache: bool) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens [3, 12] after each prompt alone, and their leads over the second.

    Args:
        folder: the model.
        over_cache: feed each token by itself to a model with a cache, else all so far to one
            without; `transformers`' own generate decides where a cache is of no use.
    """
    import torch

    answers, all_leads = [], []
    for prompt in PROMPTS:
        model = torch_model(folder)
        model.generation_config.eos_token_id = None
        prompt_1P = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                prompt_1P,
                attention_mask=torch.ones_like(prompt_1P),  # the pad token is a token too
                do_sample=False,
                max_new_tokens=NUM_NEW,
                use_cache=over_cache,
                output_logits=True,
                return_dict_in_generate=True,
            )
        answers.append(out.sequences[0, len(prompt) :].tolist())
        best, second = torch.cat(out.logits).topk(2).values.T.tolist()
        all_leads.append(np.subtract(best, second))
    return np.array(answers, np.int32), np.array(all_leads)


def torch_loss_probes(folder: Path, numbered: Path, shapes: Shapes) -> tuple[float, np.ndarray]:
    """The summed loss of both examples, and a probe of each gradient, sorted by name on disk.

    Args:
        folder: the model.
        numbered: the same with the weights of `number_elements`.
        shapes: by name on disk.
    """
    import torch

    model, loss = torch_model(folder), 0.0
    for ids, trained in zip(IDS, TRAINED, strict=True):
        logits_TV = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        losses_T = torch.nn.functional.cross_entropy(
            logits_TV, torch.tensor(ids[1:]), reduction="none"
        )
        loss = loss + (losses_T * torch.tensor(trained)).sum()
    loss.backward()
    places = {name: p.detach().numpy() for name, p in torch_model(numbered).named_parameters()}
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    named = by_their_names(shapes, list(places.values()), [grads[name] for name in places])
    return float(loss.detach()), probe_all(named)
