"""Turns a trained encoder into a pure function of float64 arrays, with a proven Lipschitz constant."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Shaped

from lsrs_jax.layers.base import Layer, Plain, Shape, matrix_plain
from lsrs_jax.layers.linear import Encoder
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import standard_flags
from lsrs_jax.runtime.validate import array, refuse_masked

CLAIMED = "claimed by the caller"  # the proof of a constant that is not proven here; on-disk format
_LARGEST = 2**31  # largest number of entries of an image or latent


@dataclasses.dataclass(frozen=True)
class LayerBound:
    """One line of the report: the fields of `lsrs_jax.layers.Plain` without the function and its arrays."""

    layer: str
    sigma_max: float
    sigma_min: float
    proof: str
    rounding: float = 0.0
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class LipschitzReport:
    """Singular values of every layer of an encoder, for one input size.

    **Guarantee**: the encoder, as the function and float64 parameters of the `Materialized` that holds this report, is
    ``constant``-Lipschitz in ℓ2 on inputs of ``input_shape``. The constant is the product of the layers' σ_max (float64
    SVD of exactly the arrays that run, each with a margin for the SVD's own error), rounded up. In a network with
    branches, σ_max and offset of a line are those of the whole network's step (`network.materialize_network`).
    """

    layers: tuple[LayerBound, ...]
    input_shape: Shape
    output_shape: Shape

    @property
    def constant(self) -> float:
        product = 1.0
        for layer in self.layers:
            if layer.sigma_max != 1.0:
                product = math.nextafter(product * layer.sigma_max, math.inf)
        # Rounded up to a multiple of 1e-12, because the last places of an SVD differ between machines.
        return product if product == 1.0 else math.nextafter(math.ceil(product * 1e12) / 1e12, math.inf)

    @property
    def claimed(self) -> bool:
        """Whether the constant is not proven here (`layers.claimed`)."""
        return any(layer.proof == CLAIMED for layer in self.layers)

    def rounding(self, norm: ArrayLike) -> Float[np.ndarray, "..."]:
        """ℓ2 bound on the float64 rounding error of the output, for inputs of at most this norm."""
        norm = np.asarray(norm, np.float64)
        error = np.zeros_like(norm)
        # Each layer adds its own rounding error and stretches the error of the layers before it by at most its σ_max.
        for layer in self.layers:
            error = layer.sigma_max * error + layer.rounding * (layer.sigma_max * (norm + error) + layer.offset)
            norm = layer.sigma_max * norm + layer.offset
        return error * (1 + 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types, with the constant."""
        return dataclasses.asdict(self) | {"constant": self.constant}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LipschitzReport":
        """The inverse of `to_dict`, from JSON; raises ValueError for values that `to_dict` cannot return."""
        try:
            bounds = tuple(LayerBound(**layer) for layer in values["layers"])
            for shape in (values["input_shape"], values["output_shape"]):
                sizes = shape if isinstance(shape, list | tuple) else [0]
                if not all(type(size) is int and size >= 1 for size in sizes) or math.prod(sizes) > _LARGEST:
                    raise ValueError(f"{shape} cannot be the shape of an image or latent")
            report = cls(bounds, tuple(values["input_shape"]), tuple(values["output_shape"]))
            if report.constant != values["constant"]:
                raise ValueError("the Lipschitz constant is not the product of the layers' constants")
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a report of a Lipschitz constant ({error})") from error
        return report

    def __str__(self) -> str:
        rows = [f"{'layer':<28}{'sigma_max - 1':>14}{'1 - sigma_min':>15}  proof"]
        rows += [f"{x.layer:<28}{x.sigma_max - 1:>14.1e}{1 - x.sigma_min:>15.1e}  {x.proof}" for x in self.layers]
        rows += [f"encoder {self.input_shape} -> {self.output_shape}: Lipschitz constant {self.constant:.15g}"]
        return "\n".join(rows)


class Materialized(NamedTuple):
    """An encoder ready for certification."""

    apply: Callable[[PyTree, Array], Array]  # (params, x[B, ...]) -> latents[B, ...], in the dtype of x
    params: tuple[PyTree[Float[np.ndarray, "..."]], ...]  # float64, one tree per line of the report
    report: LipschitzReport


def materialize_layer(name: str, layer: Layer, params: PyTree, input_shape: Shape) -> Plain:
    """``layer.materialize``, with a line that names the layer for everything that can be wrong with its parameters."""
    if _overrides_only_call(type(layer)):
        raise UserError(
            f"layer {name} has a __call__ of its own, and the constant of another class: a subclass that computes "
            "something else must override materialize as well"
        )
    refuse_masked(f"parameters of layer {name}", jax.tree.leaves(params))
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params)):
        raise UserError(f"layer {name} of the encoder has non-finite parameters; train again")
    try:
        return layer.materialize(params, input_shape)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"layer {name} of the encoder finds no parameters that fit ({error}); pass the parameters of this "
            "encoder, and in an Encoder use an instance of its own for every layer"
        ) from error
    except np.linalg.LinAlgError as error:
        raise UserError(f"the singular values of layer {name} cannot be computed ({error}); train again") from error


def _overrides_only_call(kind: type) -> bool:
    """Whether a class inherits its constant from a class with another ``__call__``."""
    order = kind.__mro__
    call = next(index for index, own in enumerate(order) if "__call__" in vars(own))
    return not any({"materialize", "proof"} & set(vars(own)) for own in order[: call + 1])


def materialize(encoder: nn.Module, params: PyTree, input_shape: Sequence[int]) -> Materialized:
    """Turns an `Encoder` and its parameters into a `Materialized`.

    `params` are the variables of the encoder, or their ``params`` collection. The report holds for inputs of
    `input_shape` ``(H, W, C)`` only, and ``apply`` refuses others.

    Raises:
      UserError: for a layer whose Lipschitz constant is not proven, or a non-finite parameter.
    """
    if not isinstance(encoder, Encoder):
        raise UserError(f"materialize takes an lsrs_jax.layers.Encoder, got {type(encoder).__name__}")
    params = params.get("params", params)
    shape, plains, bounds = tuple(input_shape), [], []
    for index, layer in enumerate(encoder.layers):
        name = f"{index} {type(layer).__name__}"
        if not isinstance(layer, Layer):
            raise UserError(f"layer {name} of the encoder has no proven Lipschitz constant; use lsrs_jax.layers")
        plain = materialize_layer(name, layer, params.get(f"layers_{index}", {}), shape)
        plains.append(plain)
        bounds.append(LayerBound(name, *plain[2:]))
        shape = layer.output_shape(shape)
    report = LipschitzReport(tuple(bounds), tuple(input_shape), shape)

    def apply(params: PyTree, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch ..."]:
        if x.shape[1:] != report.input_shape:
            raise UserError(f"this encoder was materialized for inputs {report.input_shape}, got {x.shape[1:]}")
        for plain, values in zip(plains, params, strict=True):
            x = plain.apply(values, x)
        return x

    return Materialized(apply, tuple(plain.params for plain in plains), report)


def project(materialized: Materialized, basis: Float[np.ndarray, "d m"]) -> Materialized:
    """Appends one more layer: the product of the flattened latents with a float64 matrix."""
    plain = matrix_plain(lambda basis, z: z.reshape(z.shape[0], -1) @ basis, np.asarray(basis, np.float64))
    report = materialized.report
    last = LayerBound(f"{len(report.layers)} span of the weights", *plain[2:])  # on-disk format
    report = dataclasses.replace(report, layers=(*report.layers, last), output_shape=basis.shape[1:])

    def apply(params: PyTree, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch m"]:
        return plain.apply(params[-1], materialized.apply(params[:-1], x))

    return Materialized(apply, (*materialized.params, plain.params), report)


class Float64Encoder:
    """Runs a `Materialized` encoder in float64, on NumPy arrays.

    One program with a constant `batch` runs on the default device, with every product at the highest precision. It runs
    on the CPU if the default device is a TPU, which has no float64.
    """

    def __init__(self, materialized: Materialized, batch: int) -> None:
        device = jax.local_devices()[0]
        self._device = jax.local_devices(backend="cpu")[0] if device.platform == "tpu" else device
        self._batch = batch
        self._encode = jax.jit(materialized.apply)
        with self._context():
            self._params = jax.tree.map(jnp.asarray, materialized.params)

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        precision = jax.default_matmul_precision("highest")
        with standard_flags(), jax.enable_x64(True), jax.default_device(self._device), precision:
            yield

    def __call__(self, images: Shaped[np.ndarray, "images height width channels"]) -> Float[np.ndarray, "images ..."]:
        images = np.asarray(array("images", images), np.float64)
        parts = []
        with self._context():
            for start in range(0, len(images), self._batch):
                part = images[start : start + self._batch]
                padded = np.concatenate([part, np.zeros((self._batch - len(part), *images.shape[1:]))])
                parts.append(np.asarray(self._encode(self._params, jnp.asarray(padded)))[: len(part)])
        return np.concatenate(parts)
