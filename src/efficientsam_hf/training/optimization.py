"""Which parameters decay, and the curve of the learning rate: arithmetic, not objects."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters whose names fit one of these patterns (`vision_encoder.*`) out of training.

    Raises:
        ValueError: if a pattern fits no parameter.
    """
    for pattern in patterns:
        chosen = [parameter for name, parameter in module.named_parameters() if fnmatchcase(name, pattern)]
        if not chosen:
            example = next(iter(module.named_parameters()))[0]
            raise ValueError(
                f"no parameter is called {pattern!r}: wanted a pattern that fits names such as {example!r}"
            )
        for parameter in chosen:
            parameter.requires_grad_(False)


def parameter_groups(
    module: nn.Module, weight_decay: float, rate_shares: Mapping[str, float] | None = None
) -> list[dict]:
    """Weights of layers decay; biases, norms, tokens and tables (of positions, of queries) do not.

    As in MAE (He et al., 2022) and Mask2Former (Cheng et al., 2022). Frozen parameters are in no group.

    Args:
        module: What is trained.
        weight_decay: Of what decays.
        rate_shares: For parameters whose names begin so: their learning rate as a share of the others'.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_matrix = max(parameter.shape, default=1) < parameter.numel()
            decays = is_matrix and name.endswith("weight") and id(parameter) not in tables
            share = next((share for prefix, share in (rate_shares or {}).items() if name.startswith(prefix)), 1.0)
            groups.setdefault((decays, share), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "rate_share": share}
        for (decays, share), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def encoder_shares(
    layers: int,
    encoder: float = 1.0,
    stem: float | None = None,
    layer_decay: float = 1.0,
    prefix: str = "model.vision_encoder.",
) -> dict[str, float]:
    """The image encoder's learning rates for `parameter_groups`: the deeper a layer, the nearer to the decoder's rate.

    Layer i of n learns at `encoder * layer_decay ** (n - i)`, the embeddings before it at `** (n + 1)`, the neck at
    `encoder` itself (Bao et al., 2022; SAM has 0.8).

    Args:
        layers: How many there are.
        encoder: Share of the rate for all of the encoder.
        stem: Share of it for the blocks of a convolutional stem, in place of `encoder` and the decay; None: as theirs.
        layer_decay: What is left of the rate a layer further down.
        prefix: Of the encoder's names.
    """
    shares = {} if stem is None else {f"{prefix}embeddings.patch_embedding.blocks.": stem}
    shares[f"{prefix}embeddings."] = encoder * layer_decay ** (layers + 1)
    shares |= {f"{prefix}layers.{index}.": encoder * layer_decay ** (layers - index) for index in range(layers)}
    return {**shares, prefix: encoder}


def warmup_linear(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Linear climb to `peak` over `warmup` steps, then a straight line to 0 at `total` (the paper's SA-1B stage)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * max(total - step, 0) / max(total - warmup, 1)


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, floor: float = 0.0) -> float:
    """Linear climb to `peak` over `warmup` steps, then half a cosine down to `floor` at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def decay_polynomial(step: int, *, peak: float, total: int, power: float = 0.9) -> float:
    """From `peak` down to 0 at `total`, nearly straight (the paper's ADE20K recipe, with the usual power)."""
    return peak * (1 - min(step / total, 1.0)) ** power


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give all parameter groups this rate, or their share of it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_share", 1.0)


def seeded_generator(seed: int, number: int) -> torch.Generator:
    """A generator that depends on nothing but these numbers, so that a resumed run draws what it would have drawn."""
    # All bits go into the lowest 32, which are all that torch's generator on CPU takes.
    mixed = (seed * 1_000_003 + number) * 1_000_003
    return torch.Generator().manual_seed(mixed % 2**63)
