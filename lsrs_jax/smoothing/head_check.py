"""Tries a head before it is sampled: its logits, rows that depend on each other, and traces that differ."""

import contextlib
import functools
import hashlib
import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import domain_key
from lsrs_jax.smoothing.head_hints import EVAL_MODE
from lsrs_jax.smoothing.head_trace import TracedHead, calling
from lsrs_jax.smoothing.replay import parts

_SCALES = (0.01, 1.0, 100.0, 0.0, 1.0, 1.0)  # of the random rows that surround the row under test
_EXPECTED = "a function latents -> logits (for a Flax module: lambda z: net.apply(variables, z))"
_LOW = (jnp.bfloat16, jnp.float16)
_HIGHEST = (None, jax.lax.Precision.HIGHEST, (jax.lax.Precision.HIGHEST,) * 2)


class Head(Protocol):
    """Any function latents → logits whose rows are independent and deterministic."""

    def __call__(self, latents: Float[Array, "batch *latent"], /) -> Float[Array, "batch classes"]: ...


class CheckedHead(NamedTuple):
    """A head that `check_head` accepted."""

    num_classes: int
    digest: str  # of the logits at some random latents
    logits: Callable[[jax.Array], jax.Array]  # the compiled head, for latents of the shape that was checked
    fingerprint: str  # of its program and constants
    tolerance: float  # share of a logit by which rounding may move it, if other rows or another program surround it


# A batch takes up to 8 GiB, so each is drawn on the device that uses it, one at a time; by one program, for the time
# that it takes to compile.
@functools.partial(jax.jit, static_argnums=4)
def _normals(key: jax.Array, scale: float, row: Any, position: Any, shape: tuple[int, ...]) -> jax.Array:
    """A batch of normals of this scale, with `row` at `position`, or without it if there is no such position."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).at[position].set(row, mode="drop")


@jax.jit
def _pick(latents: jax.Array, rows: Any) -> jax.Array:
    return latents[rows]


def check_head(head: TracedHead, shape: tuple[int, ...]) -> CheckedHead:
    """Runs a head on random latents ``(rows, *latent)``.

    Raises UserError for a head that returns anything but ``(rows, K ≥ 2)`` logits, or NaN logits.

    **Guarantee**: a head is refused if the logits of one of six random latents change when that latent moves to a
    random position among new random latents; this finds statistics over the batch or over groups. It is also refused if
    they change when the head is traced again for a batch of 1 (or, where the head does not accept 1, for the same
    batch); this finds branches on the batch size, and NumPy's random numbers and clocks that are read while JAX traces
    the head. It does not find what these few latents do not show, nor a head that is another function for other batch
    sizes than these two. Dependences that only show among similar latents are left to `coupling_check`.
    """
    with calling(f"in its first call: it must be {_EXPECTED}, but it does not accept latents {shape}"):
        traced = head.trace(shape)
    out = traced.out_info
    real = hasattr(out, "dtype") and not jnp.issubdtype(out.dtype, jnp.complexfloating)
    if not real or len(out.shape) != 2 or out.shape[0] != shape[0] or out.shape[1] < 2:
        one = "; with one class nothing can change: give a second one, such as a logit of 0" * _one_class(out, shape[0])
        if getattr(out, "shape", None) == (shape[0],) and jnp.issubdtype(out.dtype, jnp.integer):
            one = "; return the logits, not the class"
        one += "; give the logits alone, without the new state" * isinstance(out, tuple)
        raise UserError(f"the head must return logits (B, K >= 2) for latents {shape}, got {_shapes(out)}{one}")
    # Compiled here, in the caller's thread and context, so that it can be called in any other.
    with calling("when its first call was compiled"):
        compiled = traced.lower().compile()
    key, rng = domain_key(0, "probe"), np.random.default_rng(0)
    tolerance = 0.05 if out.dtype in _LOW else 1e-4

    def logits(latents: jax.Array) -> np.ndarray:
        with calling("on random latents, before any sample is drawn"):
            return np.asarray(compiled(latents), np.float32)

    latents = _normals(key, 1.0, np.zeros(shape[1:], np.float32), np.int64(shape[0]), shape)
    chosen, positions = rng.integers(shape[0], size=(2, len(_SCALES)))
    found, moving = logits(latents), np.asarray(_pick(latents, chosen))
    del latents
    if np.isnan(found).any():
        raise UserError("the head returns NaN logits; a NaN never certifies")
    for number, position in enumerate(positions):
        # Moves one row to a random position in a batch of new rows.
        batch = _normals(jax.random.fold_in(key, number + 1), _SCALES[number], moving[number], position, shape)
        before, after = found[chosen[number]], logits(batch)[position]
        masked = np.isinf(before) & (before == after)  # a head may mask a class with an infinite logit
        before, after = np.where(masked, 0, before), np.where(masked, 0, after)
        if not (np.abs(after - before) <= tolerance * (1 + np.abs(before))).all():
            remedy = "a row may depend on its own latent alone, not on chance; normalise with stored statistics"
            raise UserError(f"the head's rows depend on each other (batch statistics?): {remedy} ({EVAL_MODE})")
    digest, program = hashlib.sha256(found.tobytes()).hexdigest(), fingerprint(traced.jaxpr)
    checked = CheckedHead(out.shape[1], digest, compiled, program, _rounding(traced.jaxpr, out.dtype))
    _check_traces(head, traced.jaxpr, checked, shape, moving, chosen, found)
    return checked


def _shapes(out: Any) -> str:
    """The shapes of what a head returned."""
    return str(jax.tree.map(lambda leaf: (*getattr(leaf, "shape", ()), str(getattr(leaf, "dtype", leaf))), out))[:200]


def _one_class(out: Any, rows: int) -> bool:
    return getattr(out, "shape", None) in ((rows,), (rows, 1))


def check_logits(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises UserError for logits of a new shape: a head is traced several times, and may differ each time."""
    if shape != expected:
        raise UserError(f"a head must always have the same classes: {expected[1]} before, now logits of shape {shape}")


def allowance(logits: Float[np.ndarray, "rows classes"], tolerance: float) -> Float[np.ndarray, "rows classes"]:
    """How far rounding may move each logit: by `tolerance` of its size, and of the size of the two largest of a row.

    A logit can be small where large ones cancel, so the size of its row counts too, and that of the median row. Masked
    classes, with logits of −1e9 or −∞, are not among the two largest of a row.
    """
    finite, rows = np.where(np.isfinite(logits), logits, -np.inf), np.arange(len(logits))
    first, best = finite.max(axis=1), finite.argmax(axis=1)
    finite[rows, best] = -np.inf
    sizes = np.abs(np.stack([first, finite.max(axis=1)]))
    size = np.where(np.isfinite(sizes), sizes, 0).max(axis=0)
    own = np.where(np.isfinite(logits), np.abs(logits), 0)
    return tolerance * (own + (size + np.median(size))[:, None])


def differing(
    before: Float[np.ndarray, "rows classes"], after: Float[np.ndarray, "rows classes"], allowed: Any
) -> Bool[np.ndarray, " rows"]:
    """Whether logits of each row differ by more than is allowed; neither equal infinities nor two NaN differ."""
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    with np.errstate(invalid="ignore"):
        return ~(same | (np.abs(after - before) <= allowed)).all(axis=1)


def _second_trace(head: TracedHead, shape: tuple[int, ...], num_classes: int) -> tuple[int, Any]:
    """Traces a head for a batch of 1, or, if it accepts only its own batch size, for that; returns size and trace."""
    size, traced, found = 1, None, ()
    with contextlib.suppress(Exception):  # whatever the caller's function raises
        traced = head.trace((1, *shape[1:]))
        found = traced.out_info.shape
    if traced is None or len(found) != 2 or found[0] != 1:
        with calling(f"in its third call, the second one for latents {shape}"):
            size, traced = shape[0], head.trace(shape)
    check_logits(getattr(traced.out_info, "shape", ()), (size, num_classes))
    return size, traced


def _check_traces(
    head: TracedHead,
    program: ClosedJaxpr,
    checked: CheckedHead,
    shape: tuple[int, ...],
    latents: Float[np.ndarray, "some *latent"],
    chosen: Int[np.ndarray, " some"],
    found: Float[np.ndarray, "rows classes"],
) -> None:
    """Traces a head again, and raises UserError if it is another function than `program`.

    Programs that look alike are one function; others are compiled and compared: `latents` are the rows `chosen` of a
    batch whose logits are `found`.
    """
    size, again = _second_trace(head, shape, checked.num_classes)
    if _alike(program, again.jaxpr, shape[0] // size):
        return
    key = domain_key(0, "probe")
    batches = (_normals(key, 1.0, row, np.int64(0), (size, *shape[1:])) for row in latents)
    with calling(f"on random latents, as JAX traced it again for a batch of {size}"):
        compiled = again.lower().compile()
        after = np.stack([np.asarray(compiled(batch), np.float32)[0] for batch in batches])
    if differing(found[chosen], after, allowance(found, checked.tolerance)[chosen]).any():
        where = f"for a batch of {size} instead of {shape[0]}" if size == 1 else "again"
        why = "it may depend on neither the batch and its size, nor random numbers or clocks read while it is traced"
        raise UserError(f"the head is another function when JAX traces it {where}: {why}; draw masks when it is made")


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, tuple | list):
        for inner in value:
            yield from _whole_numbers(inner)
    elif isinstance(value, int):
        yield value


def facts(program: ClosedJaxpr) -> Iterator[Any]:
    """What tells two traces apart: primitives, what they read, parameters, constants, literals and the results."""
    for jaxpr, constants in parts(program):
        yield from constants
        numbers = {variable: str(number) for number, variable in enumerate((*jaxpr.constvars, *jaxpr.invars))}
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            yield from (value.val if isinstance(value, Literal) else numbers[value] for value in equation.invars)
            numbers |= {variable: str(len(numbers) + number) for number, variable in enumerate(equation.outvars)}
            for _, value in sorted(equation.params.items()):
                yield from _whole_numbers(value)
                if isinstance(value, str | float | np.dtype):
                    yield repr(value)
        yield from (value.val if isinstance(value, Literal) else numbers[value] for value in jaxpr.outvars)


def fingerprint(program: ClosedJaxpr) -> str:
    """SHA-256 of a program and its constants; another one each time if the program calls functions of Python."""
    text = re.sub(r" at 0x[0-9a-f]+", "", str(program.jaxpr))  # it names all that `facts` leaves out
    total = hashlib.sha256(text.encode())
    if calls_python(program):
        total.update(secrets.token_bytes(32))
    for fact in facts(program):
        if isinstance(fact, jax.Array) and jax.dtypes.issubdtype(fact.dtype, jax.dtypes.prng_key):
            fact = jax.random.key_data(fact)
        array = np.asarray(fact)
        total.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return total.hexdigest()


def calls_python(program: ClosedJaxpr) -> bool:
    """Whether a program calls functions of Python when it runs; rules for derivatives and meshes do not count."""
    equations = [equation for jaxpr, _ in parts(program) for equation in jaxpr.eqns]
    return any(
        callable(value) and not isinstance(value, type | Mesh)
        for equation in equations
        if equation.primitive.name not in ("custom_jvp_call", "custom_vjp_call")
        for name, value in equation.params.items()
        if name not in ("policy", "computation")  # of remat and reduce, used while JAX traces
    )


def _alike(one: ClosedJaxpr, other: ClosedJaxpr, ratio: int) -> bool:
    """Whether two programs differ only in sizes, by the ratio of their batch sizes."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, str) or isinstance(b, str):
            return a == b
        if isinstance(a, int) and isinstance(b, int):
            return a in (b, b * ratio)
        if isinstance(a, jax.Array) and jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())

    first, second = list(facts(one)), list(facts(other))
    return len(first) == len(second) and all(a is b or same(a, b) for a, b in zip(first, second, strict=True))


def _rounding(program: ClosedJaxpr, dtype: Any) -> float:
    """The tolerance of a program: larger if any number or product is less precise than float32."""
    equations = [equation for jaxpr, _ in parts(program) for equation in jaxpr.eqns]
    dtypes = {getattr(value.aval, "dtype", None) for equation in equations for value in equation.outvars} | {dtype}
    low = any(
        found is not None and jnp.issubdtype(found, jnp.floating) and jnp.dtype(found).itemsize < 4 for found in dtypes
    )
    reduced = any(equation.params.get("precision") not in _HIGHEST for equation in equations)
    return 0.05 if low or reduced else 1e-4
