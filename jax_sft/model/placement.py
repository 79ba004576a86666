"""How a model is computed and where it lives: the names in a config, and what they stand for.

In: names such as "auto" and "bfloat16". Out: the dtypes, the attention backend and why it is that
one, and how many layers are not trained, for a mesh's platform and a model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_sft import sharding
from jax_sft.model.attention import check_backend, choose_backend
from jax_sft.model.layers import Numerics
from jax_sft.model.types import DecoderConfig

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a model is computed and where it lives.

    Attributes:
        mesh: devices; None takes all, with the parameters split over them.
        dtype: "float32", "bfloat16", or "auto": float32 on CPU, else bfloat16.
        param_dtype: "float32", "bfloat16", or "auto": float32.
        remat: what the backward pass computes again, a name in `decoder.REMAT_POLICIES`.
        attention: attention backend, or "auto".
        num_layers_unfrozen: top layers that will be trained, -1 for all; the layers below
            them are kept in a stack of their own.
    """

    mesh: Mesh | None = None
    dtype: str = "auto"
    param_dtype: str = "auto"
    remat: str = "none"
    attention: str = "auto"
    num_layers_unfrozen: int = -1

    def numerics(self, config: DecoderConfig, mesh: Mesh) -> tuple[Numerics, str]:
        """Returns what the names stand for on a mesh's platform, and what there is to say of it."""
        platform = sharding.platform_of(mesh)
        auto = "float32" if platform == "cpu" else "bfloat16"
        for name in (self.dtype, self.param_dtype):
            if name not in ("auto", *DTYPES):
                raise ValueError(f"dtype {name!r} is unknown: choose auto, {', '.join(DTYPES)}")
        dtype = DTYPES[auto if self.dtype == "auto" else self.dtype]
        attention, reason = choose_backend(
            self.attention, platform=platform, config=config, dtype=dtype
        )
        if attention == "cudnn" and jax.default_backend() == "gpu":
            wrong = check_backend(attention, config=config, dtype=dtype)
            if wrong and self.attention != "auto":
                raise ValueError(f"model.attention='cudnn' {wrong}: choose auto or xla")
            if wrong:
                attention, reason = "xla", f"cudnn {wrong}"
        numerics = Numerics(
            dtype=dtype,
            param_dtype=DTYPES["float32" if self.param_dtype == "auto" else self.param_dtype],
            remat=self.remat,
            attention=attention,
        )
        return numerics, reason

    def num_frozen_layers(self, num_layers: int) -> int:
        """Returns how many of a model's layers are not trained."""
        unfrozen = self.num_layers_unfrozen
        if unfrozen > num_layers:
            raise ValueError(
                f"model.num_layers_unfrozen={unfrozen}, but the model has {num_layers} layers: "
                "choose at most as many, or -1 for all"
            )
        return 0 if unfrozen < 0 else num_layers - unfrozen
