"""jax_sft: supervised fine-tuning of causal language models with JAX, in one call.

    import jax_sft
    trainer = jax_sft.train("gpt2", samples=[["2 + 2 =", " 4"], ["3 + 3 =", " 6"]])

Names load when they are first used, so that `import jax_sft` costs nothing and a config file
can be read without JAX. Arrays carry single-letter axes in their names: B rows, T tokens,
S cache slots, P prompt tokens, G generated tokens, L layers, D width, H query heads,
K key/value heads, C head width, F MLP width, V vocabulary, N any other count.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_sft.config import SFTConfig, default_sft_config
    from jax_sft.inputs import tokenize
    from jax_sft.model.causal_lm import CausalLM
    from jax_sft.train import SFTTrainer, train

__version__ = "0.1.0"

_HOMES = {
    "CausalLM": "jax_sft.model.causal_lm",
    "SFTConfig": "jax_sft.config",
    "SFTTrainer": "jax_sft.train",
    "default_sft_config": "jax_sft.config",
    "tokenize": "jax_sft.inputs",
    "train": "jax_sft.train",
}
__all__ = [
    "CausalLM",
    "SFTConfig",
    "SFTTrainer",
    "__version__",
    "default_sft_config",
    "tokenize",
    "train",
]


class _LazyFace(types.ModuleType):
    """The package, which loads a public name's module when the name is first read."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'jax_sft' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing jax_sft.train makes Python bind the module over the function of that name.
        if name in _HOMES and isinstance(value, types.ModuleType):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _LazyFace
