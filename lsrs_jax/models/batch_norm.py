"""Batch normalisation in heads: trained as usual, then folded into the layers before it, once, before certification.

In training, a row's logits depend on the other rows of its batch, so such a head cannot be certified. With fixed means
and variances the normalisation is an affine function of each channel. It becomes a part of the weights and the bias of
the convolution or dense layer before it, and rows are independent again.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lsrs_jax.models.heads import NORM_EPSILON, NORM_SUFFIX
from lsrs_jax.runtime.errors import UserError

STATISTICS = "batch_stats"  # the collection of Flax


def is_training(head: nn.Module) -> bool:
    """Whether a head normalises over the rows of its batch."""
    return getattr(head, "norm", None) == "batch"


def variants(head: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """The head that is certified, and the same head with batch normalisation in training."""
    if not hasattr(head, "norm"):
        raise UserError(
            f"model.head_norm=batch is for the heads mlp, convnet*, resnet to resnet18* and blocks, not {name}"
        )
    return head.clone(norm="folded"), head.clone(norm="batch")


def pooled(batches: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Means and variances over several batches of equal size, from those of each (float64).

    A variance is the mean of the batches' variances plus the variance of their means.
    """
    found = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(batch)) for batch in batches]
    result = {}
    for layer in found[0]:
        mean, var = (np.stack([batch[layer][name] for batch in found]) for name in ("mean", "var"))
        result[layer] = {"mean": mean.mean(axis=0), "var": var.mean(axis=0) + mean.var(axis=0)}
    return result


def fold(params: Mapping[str, Any], statistics: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """The parameters of the certified head, float32, from those of the trained one and `pooled` statistics.

    With scale γ, shift β, mean μ and variance v of a channel, and s = γ/√(v + `NORM_EPSILON`), its kernel W becomes sW
    and its bias b becomes s(b − μ) + β (computed in float64).
    """
    folded = {name: dict(layer) for name, layer in params.items() if not name.endswith(NORM_SUFFIX)}
    for name, found in statistics.items():
        layer = folded[name.removesuffix(NORM_SUFFIX)]
        kernel, scale, shift = (
            np.asarray(values, np.float64) for values in (layer["kernel"], params[name]["scale"], params[name]["bias"])
        )
        scale = scale / np.sqrt(found["var"] + NORM_EPSILON)
        bias = scale * (np.asarray(layer.get("bias", 0.0), np.float64) - found["mean"]) + shift
        layer |= {"kernel": (kernel * scale).astype(np.float32), "bias": bias.astype(np.float32)}
    return folded
