"""The encoder of a `SmoothedClassifier`: from inputs to float64 latents, with a Lipschitz constant."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lsrs_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from lsrs_jax.layers.lipschitz import Materialized
    from lsrs_jax.smoothing.head_identity import ProgramIdentity


class Encoding:
    """An encoder as a caller gives it: None, a JAX function with a claimed constant, or a `Materialized`."""

    def __init__(self, encoder: Any, lipschitz: float | None) -> None:
        self._proven: Materialized | None = encoder if hasattr(encoder, "report") else None
        self._function = None if self._proven else encoder
        if self._function is not None and not callable(encoder):
            raise UserError(f"encoder must be a function from inputs to latents, got {type(encoder).__name__}")
        if self._proven and lipschitz is not None:
            raise UserError("the encoder has a proven Lipschitz constant: leave lipschitz out")
        if self._function is not None and lipschitz is None:
            proven = "or give layers.materialize_network(...), which proves it"
            raise UserError(f"an encoder needs its Lipschitz constant: give lipschitz=, {proven}")
        self.lipschitz = self._proven.report.constant if self._proven else 1.0 if lipschitz is None else lipschitz
        self._made: dict[tuple[tuple[int, ...], bool], Materialized] = {}
        self._compiled: dict[tuple[tuple[int, ...], bool, int], Callable[[np.ndarray], np.ndarray]] = {}

    def __bool__(self) -> bool:
        return self._proven is not None or self._function is not None

    def materialized(self, shape: Sequence[int], low_precision: bool = False) -> "Materialized":
        """The encoder for inputs of this shape. A caller's function may compute below float64 if `low_precision`."""
        if self._proven:
            if self._proven.report.input_shape != tuple(shape):
                own = self._proven.report.input_shape
                hint = "; one input needs a batch axis: x[None]" if tuple(shape) == own[1:] else ""
                hint = "; images are NHWC" if sorted(shape) == sorted(own) else hint
                raise UserError(f"the encoder takes inputs of shape {own}, got {tuple(shape)}{hint}")
            return self._proven
        from lsrs_jax.layers.claimed import claimed

        key = tuple(shape), low_precision
        if key not in self._made:
            self._made[key] = claimed(self._function, self.lipschitz, *key)
        return self._made[key]

    def latents(
        self, inputs: Float[np.ndarray, "inputs *input"], slack: Any, sigma: float, batch: int
    ) -> tuple[Float[np.ndarray, "inputs *latent"], Any]:
        """Float64 latents, and their ℓ2 error: the caller's slack and the rounding of the encoder."""
        if not self:
            return inputs, slack
        from lsrs_jax.certification.encode import encoder_slack
        from lsrs_jax.certification.platform_check import check_encoder
        from lsrs_jax.layers.lipschitz import Float64Encoder

        low = all_positive(slack)
        encoder, key = self.materialized(inputs.shape[1:], low), (inputs.shape[1:], low, batch)
        if key not in self._compiled:
            compiled = Float64Encoder(encoder, batch)
            check_encoder(encoder, compiled)
            self._compiled[key] = compiled
        found = self._compiled[key](inputs)
        norms = np.linalg.norm(inputs.reshape(len(inputs), -1), axis=1)
        return np.asarray(found, np.float64), slack + encoder_slack(encoder.report, norms, sigma)

    def identity(self, shape: Sequence[int], low_precision: bool) -> "ProgramIdentity | None":
        """What identifies the encoder for inputs of this shape; None without one."""
        if not self:
            return None
        from lsrs_jax.smoothing.head_identity import program_identity

        encoder = self.materialized(shape, low_precision)
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            example = jax.ShapeDtypeStruct((2, *shape), jnp.float64)
            program = jax.make_jaxpr(lambda x: encoder.apply(encoder.params, x))(example)
        return program_identity(program, self._function, "encoder")

    def in_float32(self, x: Float[Array, "inputs *input"]) -> Float[Array, "inputs *latent"]:
        """The latents in float32, differentiable."""
        if self._proven:
            params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), self._proven.params)
            return self._proven.apply(params, x)
        return x if self._function is None else jnp.asarray(self._function(x), jnp.float32)


def all_positive(slack: Any) -> bool:
    """Whether the caller gives an error for every latent."""
    return bool((np.asarray(slack) > 0).all())
