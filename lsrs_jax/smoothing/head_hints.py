"""What a caller should do when a head of Flax, Equinox or PyTorch fails: the call that is missing."""

import sys
from collections.abc import Iterator

_FLAX = {  # class of an error of Flax -> what to do
    "TraceContextError": "a module of NNX in train mode changes its state: call its method eval() first",
    "ModifyScopeVariableError": "a module of Linen in train mode changes its state: give use_running_average=True",
    "InvalidRngError": "a module of Linen in train mode draws random numbers: give deterministic=True",
}
_STATE = "required positional argument: 'state'"  # such an error is raised before a function of Equinox is entered
_EQUINOX = {  # part of a message of a module of Equinox -> what to do
    "Dropout requires a key": "a module of Equinox in train mode draws random numbers: call "
    "eqx.nn.inference_mode(model) first",
    "unbound axis name": "a module of Equinox in train mode takes statistics over the batch: call "
    "eqx.nn.inference_mode(model) first",
    "Attempted to use old state": "a module of Equinox in train mode changes its state: call "
    "eqx.nn.inference_mode(model) first, with the newest state",
    _STATE: "a module of Equinox with state: after eqx.nn.inference_mode(model), give "
    "lambda z: jax.vmap(lambda x: model(x, state)[0])(z)",
}
EVAL_MODE = (
    "NNX: module.eval(); Linen: use_running_average=True, deterministic=True; Equinox: eqx.nn.inference_mode(model)"
)


def remedy(error: BaseException) -> str:
    """What to do about an error that a head raised, or an empty text."""
    modules, text, name = list(_modules(error)), str(error), type(error).__name__
    if name in _FLAX and "flax.nnx.bridge.wrappers" in modules and "RngCount" in text:
        return "nnx.bridge.ToNNX draws a random key in each call: give each wrapped layer .to_nnx__rngs = None first"
    if name in _FLAX:
        return _FLAX[name]
    if name == "TracerArrayConversionError" and not any(module.startswith("torch") for module in modules):
        return "a head computes with jax.numpy, not with NumPy or scikit-learn"
    if any(module.startswith("torch.nn.modules") for module in modules):
        return "JAX cannot trace a module of PyTorch: convert it with lsrs_jax.from_torch(module, example_input)"
    stateful = _STATE in text and "equinox" in sys.modules
    if not stateful and not any(module.startswith("equinox") for module in modules):
        return ""
    found = [what for part, what in _EQUINOX.items() if part in text]
    return found[0] if found else "a module of Equinox takes one example, channels first: give jax.vmap(model)"


def _modules(error: BaseException) -> Iterator[str]:
    """The names of the modules whose functions an error went through."""
    frame = error.__traceback__
    while frame is not None:
        yield frame.tb_frame.f_globals.get("__name__", "")
        frame = frame.tb_next
