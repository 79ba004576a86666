"""Low-rank adapters: which linear layers have one, and how it is added.

LoRA (Hu et al. 2021): beside a frozen kernel W stand A and B of a small rank r, and the layer
computes x·W + scale · x·A·B. `Adapters` is what the decoder needs to know of it.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters on some of a decoder's linear layers.

    Attributes:
        rank: inner width of an adapter (r).
        scale: factor on x·A·B.
        targets: linear layers that have one, by the last parts of their path, such as
            "attention/query".
        shared: targets that take x·A from the target before them in their module, since
            the checkpoint holds both kernels in one tensor, and PEFT gives it one A.
        dropout: rate on x, before A.
        dora: also learn each output's magnitude (DoRA, Liu et al. 2024).
        init_std: standard deviation of A; None: uniform up to 1/√inputs, as PEFT draws it.
    """

    rank: int
    scale: float
    targets: frozenset[str]
    shared: frozenset[str] = frozenset()
    dropout: float = 0.0
    dora: bool = False
    init_std: float | None = None
