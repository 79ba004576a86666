"""Rows of a name table that many families share: norms, linear layers, the vocabulary.

In: their name and ours, without the last part. Out: `Tensor`s.
"""

from jax_sft.model.types import DecoderConfig, Tensor


def norm(theirs: str, ours: str, *, bias: bool) -> tuple[Tensor, ...]:
    """A norm's factor, and its bias if it has one."""
    scale = Tensor(f"{theirs}.weight", (f"{ours}/scale",))
    return (scale, Tensor(f"{theirs}.bias", (f"{ours}/bias",))) if bias else (scale,)


def linear(
    theirs: str, *ours: str, bias: bool, transpose: bool = True, num_groups: int = 1
) -> tuple[Tensor, ...]:
    """A linear layer's kernel, and its bias if it has one; see `Tensor` for the options."""
    kernels = tuple(f"{name}/kernel" for name in ours)
    rows = (Tensor(f"{theirs}.weight", kernels, transpose=transpose, num_groups=num_groups),)
    if bias:
        biases = tuple(f"{name}/bias" for name in ours)
        rows += (Tensor(f"{theirs}.bias", biases, num_groups=num_groups),)
    return rows


def head(config: DecoderConfig, theirs: str = "lm_head") -> tuple[Tensor, ...]:
    """The output vocabulary where it is not the embedding, and its bias."""
    rows: tuple[Tensor, ...] = ()
    if not config.tied_head:
        rows += (Tensor(f"{theirs}.weight", ("head/kernel",), vocabulary=True),)
    if config.head_bias:
        rows += (Tensor(f"{theirs}.bias", ("head/bias",), vocabulary=True),)
    return rows
