"""Compares this platform's arithmetic with NumPy before any sample is drawn: errors must be within the error budget."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from numpy.lib.stride_tricks import sliding_window_view

from lsrs_jax.layers.lipschitz import Materialized
from lsrs_jax.layers.moves import MOVES
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import COLUMN_BITS, THRESHOLD_BITS
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.smoothing.arithmetic import Arithmetic, GridArithmetic
from lsrs_jax.smoothing.discrete_gaussian import LIMIT

_DRAWS = 4096
_REMEDY = "certify on the CPU (JAX_PLATFORMS=cpu), or without the flags that change its arithmetic"


def check_encoder(materialized: Materialized, encode: Callable[[np.ndarray], np.ndarray]) -> float:
    """Compares `encode`, which will encode the images to be certified, with NumPy in float64 on the proven arrays.

    The error budget is twice `LipschitzReport.rounding`, as both may round. Returns the largest share of it that was
    seen; raises UserError for a larger difference. `materialized` has the proven arrays.

    **Guarantee**: on the images tried (one random, one of large pixels) the rounding is within the error budget. A
    platform whose products run in reduced precision (TF32, bfloat16) exceeds it by orders of magnitude on any image.
    """
    report = materialized.report
    if not report.layers or report.claimed:  # nothing is computed, or nobody knows from what
        return 0.0
    rng = np.random.default_rng(0)
    images = np.stack([rng.random(report.input_shape), rng.normal(0.5, 100, report.input_shape)])
    found = np.asarray(encode(images), np.float64)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        program = jax.make_jaxpr(materialized.apply)(materialized.params, images)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((materialized.params, images))]
        exact = np.asarray(_evaluate(program.jaxpr, program.consts, leaves)[0])
    error = np.linalg.norm((found - exact).reshape(len(images), -1), axis=1)
    allowed = 2 * report.rounding(np.linalg.norm(images.reshape(len(images), -1), axis=1))
    if not (error <= allowed).all():
        worst = int(np.argmax(error / allowed))
        errors = f"an error of {error[worst]:.1e}, but certificates allow for {allowed[worst]:.1e}"
        raise UserError(f"this platform computes the encoder with {errors}: it does not multiply in float64; {_REMEDY}")
    return float(np.divide(error, allowed, out=np.zeros_like(error), where=allowed > 0).max())


def check_noise(arithmetic: Arithmetic) -> None:
    """Compares the drawing and adding of grid noise on every local device with integers in NumPy.

    Raises UserError for any difference. Float32 arithmetic claims nothing, and is not compared.
    """
    if not isinstance(arithmetic, GridArithmetic):
        return
    edges = np.array([0, 1, -1, LIMIT, -LIMIT, LIMIT - 1, 1 - LIMIT, 2**18, -(2**18)], np.int32)
    latents, added = (axis.ravel() for axis in np.meshgrid(edges, edges))
    sums = np.clip(latents.astype(np.int64) + added, -LIMIT, LIMIT) * np.float64(arithmetic.identity["spacing"])
    for device in jax.local_devices():
        with pinned(), jax.default_device(device):
            key = jax.device_put(domain_key(0, "probe"), device)
            drawn = jax.jit(arithmetic.draw, static_argnums=1)(key, (_DRAWS,), jnp.asarray(arithmetic.tables))
            exact = _draw(np.asarray(jax.random.key_data(key)), arithmetic.tables)
            noisy = np.asarray(jax.jit(arithmetic.add)(latents, added))
        if not np.array_equal(np.asarray(drawn), exact):
            raise UserError(f"{device} draws other noise than certificates assume; {_REMEDY}")
        if not np.array_equal(noisy.astype(np.float64), sums) or np.signbit(noisy[sums == 0]).any():
            raise UserError(f"{device} adds noise to latents with an error, but the sum must be exact; {_REMEDY}")


def _draw(key: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`arithmetic.GridArithmetic.draw` for `_DRAWS` numbers, in NumPy."""
    columns, thresholds = _threefry(key, np.arange(2 * _DRAWS, dtype=np.uint32))
    column = columns >> np.uint32(32 - COLUMN_BITS)
    high, low = (words[column].astype(np.int64) for words in table)
    drawn = (columns & np.uint32(2 ** (THRESHOLD_BITS - 32) - 1)).astype(np.int64) << 32 | thresholds
    own = drawn < ((high >> COLUMN_BITS) << 32 | low)
    magnitude = np.where(own, column, high & (2**COLUMN_BITS - 1))
    sign = columns >> np.uint32(THRESHOLD_BITS - 32) & np.uint32(1)
    return np.where(sign == 1, -magnitude, magnitude)


def _threefry(key: np.ndarray, counters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011) of the two halves of `counters`, as two uint32 arrays."""
    first, second = (half.copy() for half in np.split(counters, 2))
    schedule = [*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    first += schedule[0]
    second += schedule[1]
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            first += second
            second = (second << np.uint32(turn) | second >> np.uint32(32 - turn)) ^ first
        first += schedule[(group + 1) % 3]
        second += schedule[(group + 2) % 3] + np.uint32(group + 1)
    return first, second


# Frequent operations, for speed alone: XLA would compile each of them.
_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide},
    **{"max": np.maximum, "min": np.minimum, "real": np.real, "imag": np.imag},
}


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[np.ndarray]:
    """Runs a program: products and convolutions by NumPy, all else, loops included, in float64 on the CPU."""
    values = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))

    def value(atom: Any) -> Any:
        return np.asarray(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs, name, params = [value(atom) for atom in equation.invars], equation.primitive.name, equation.params
        inner = [params[key] for key in ("jaxpr", "call_jaxpr") if key in params]
        # A convolution with a batch group count is part of a gradient: XLA runs it.
        if name == "conv_general_dilated" and params["batch_group_count"] == 1:
            outputs = [_convolve(inputs[0], inputs[1], **params)]
        elif name == "dot_general":
            outputs = [_multiply(inputs[0], inputs[1], params["dimension_numbers"])]
        elif name in _ELEMENTWISE:
            outputs = [_ELEMENTWISE[name](*inputs)]
        elif name in MOVES:
            outputs = MOVES[name](*inputs, **params)
        elif len(inner) == 1 and name not in ("scan", "while", "cond"):
            # A closed program carries its constants, an open one has none.
            program, constants = getattr(inner[0], "jaxpr", inner[0]), getattr(inner[0], "consts", ())
            outputs = _evaluate(program, constants, inputs)
        else:
            outputs = equation.primitive.bind(*inputs, **params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _multiply(left: np.ndarray, right: np.ndarray, dimension_numbers: Any) -> np.ndarray:
    ((left_sum, right_sum), (left_batch, right_batch)) = dimension_numbers
    first, second = list(range(left.ndim)), list(range(left.ndim, left.ndim + right.ndim))
    for i, j in zip((*left_sum, *left_batch), (*right_sum, *right_batch), strict=True):
        second[j] = i
    kept = [
        *left_batch,
        *(i for i in first if i not in (*left_sum, *left_batch)),
        *(j for j in second if j >= left.ndim),
    ]
    return np.einsum(left, first, right, second, kept, optimize=True)


def _convolve(x: np.ndarray, kernel: np.ndarray, **params: Any) -> np.ndarray:
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    edges = zip(params["padding"], params["lhs_dilation"], strict=True)
    x = _pad(x.transpose(numbers.lhs_spec), [(low, high, factor - 1) for (low, high), factor in edges])
    kernel = _pad(kernel.transpose(numbers.rhs_spec), [(0, 0, factor - 1) for factor in params["rhs_dilation"]])
    axes, steps = tuple(range(2, x.ndim)), [slice(None, None, stride) for stride in params["window_strides"]]
    windows = sliding_window_view(x, kernel.shape[2:], axes)[(slice(None), slice(None), *steps)]
    summed = ((1, *range(x.ndim, 2 * x.ndim - 2)), (1, *axes))
    parts = zip(np.split(windows, groups, axis=1), np.split(kernel, groups), strict=True)
    y = np.concatenate([np.tensordot(own, weights, summed) for own, weights in parts], axis=-1)
    return np.moveaxis(y, -1, 1).transpose(np.argsort(numbers.out_spec))


def _pad(array: np.ndarray, edges: list[tuple[int, int, int]]) -> np.ndarray:
    """Puts zeros before, after and between the entries of the axes from the third on; a negative number crops."""
    if not any(map(any, edges)):
        return array
    return np.asarray(jax.lax.pad(array, np.zeros((), array.dtype), [(0, 0, 0), (0, 0, 0), *edges]))
