"""What identifies a head between sessions: its parameters, and its program."""

import hashlib
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.head_check import Head, calls_python, facts, fingerprint
from lsrs_jax.smoothing.head_trace import TracedHead, calling
from lsrs_jax.smoothing.sampler import pinned_flags


class HeadIdentity(NamedTuple):
    """The digest of a head's parameters, and that of its program, which differs between versions of JAX."""

    parameters: str
    program: str


def head_identity(head: Head, shape: tuple[int, ...]) -> HeadIdentity:
    """The `HeadIdentity` of a head for a batch of latents of this shape.

    The parameters are all arrays with more than one entry that the head reads, in any order. For a head that calls
    functions of Python, whose parameters JAX does not see, both are its attribute ``digest``.

    Raises UserError for a head that calls functions of Python and has no such attribute.
    """
    with pinned_flags(), calling(f"in its first call, with latents {shape}"):
        program = TracedHead(head).trace(shape).jaxpr
    if calls_python(program):
        own = getattr(head, "digest", None)
        if not isinstance(own, str) or not own:
            remedy = "give it an attribute digest, a text that changes with its parameters"
            raise UserError(f"the head calls functions of Python, so nothing tells its parameters apart: {remedy}")
        return HeadIdentity(hashlib.sha256(own.encode()).hexdigest(), own)
    digests = {_digest(fact) for fact in facts(program) if math.prod(np.shape(fact)) > 1}
    return HeadIdentity(hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest(), fingerprint(program))


def _digest(array: Any) -> str:
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.asarray(array)
    return hashlib.sha256(f"{array.dtype} {array.shape}\n".encode() + array.tobytes()).hexdigest()
