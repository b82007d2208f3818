"""Modules that `from_torch` refuses: each in one line that says why, before anything of them runs in JAX."""

import sys

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from lsrs_jax.pytorch import aten, export, from_torch  # noqa: E402
from lsrs_jax.runtime.errors import UserError  # noqa: E402

EXAMPLE = np.zeros((2, 3, 8, 8), np.float32)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def refusal(module, x=EXAMPLE, **settings):
    with pytest.raises(UserError) as error:
        from_torch(module, x, **settings)
    message = str(error.value)
    assert "\n" not in message
    return message


def of_function(function, x=EXAMPLE):
    return refusal(Function(function).eval(), x)


def pooled(x):
    return x.mean((2, 3))


def test_all_unknown_operations_are_named_at_once():
    def unknown(x):
        spectrum = torch.fft.fft(x).real
        return pooled(spectrum) + torch.linalg.inv(x)[..., 0, 0] + torch.special.i0(pooled(x))

    message = of_function(unknown)
    assert message.startswith("the importer does not know these operations: aten._fft_r2c.default, ")
    assert all(name in message for name in ("aten.linalg_inv_ex.default", "aten.i0.default", "torch_callback"))
    assert "aten.mean" not in message


def test_train_mode_names_the_call_that_is_missing():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    assert refusal(network) == "the module must be in eval mode, but it is in training mode: call module.eval() first"
    network.eval()[1].train()
    assert "its part '1' is in training mode: call module.eval() first" in refusal(network)


def counting(x):
    return pooled(x) if x.sum() > 0 else pooled(-x)


def masked(x):
    return pooled(x).flatten()[pooled(x).flatten() > 0][None, :]


def converted(x):
    return pooled(x) * float(x.sum())


@pytest.mark.parametrize("function", [counting, masked, converted])
def test_data_dependent_control_flow_and_shapes(function, capfd):
    assert "depend on the values of its input" in of_function(function)
    assert capfd.readouterr() == ("", "")  # torch lists the graph otherwise


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return pooled(x) * self.calls


class Noisy(nn.Module):
    def forward(self, x):
        return F.dropout(pooled(x), 0.5) + torch.rand_like(pooled(x))


def test_what_is_not_one_deterministic_function_of_a_row():
    message = refusal(Noisy().eval())
    assert "draws random numbers" in message
    assert "native_dropout" in message
    assert "rand" in message
    assert "changes 'calls' while it runs" in refusal(Counter().eval())
    statistics = of_function(lambda x: pooled(F.batch_norm(x, None, None, training=True)))
    assert "statistics of the batch" in statistics
    assert "changes" in of_function(lambda x: pooled(x.add_(1)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.view(2, -1), "only its example's batch size"),
        (lambda x: pooled(x) * (1.0 if x.shape[0] == 2 else 2.0), "only its example's batch size"),
        (lambda x: x, "must return logits (B, K) for a batch of B, got"),
        (lambda x: pooled(x).mean(0), "must return logits (B, K)"),
        (lambda x: pooled(x).T, "must return logits (B, K)"),
        (lambda x: (pooled(x), x), "one tensor of logits (B, K), it returns 2 values"),
        (lambda x: pooled(x.double()), "computes in float32, the module has float64"),
        (lambda x: pooled(x.half()), "computes in float32, the module has float16"),
        (lambda x: pooled(x).undefined(), "torch.export cannot export the module"),
        (lambda x: F.max_pool2d(x, 8, return_indices=True)[1].flatten(1), "uses result 1 of an operation"),
    ],
)
def test_modules_of_another_form(function, message):
    assert message in of_function(function)


def test_arguments_and_parameters_of_another_form():
    linear = nn.Linear(3, 2).eval()
    assert "must be a torch.nn.Module, got function" in refusal(pooled)
    assert "unknown layout 'HWC'" in refusal(linear, np.zeros((2, 3)), layout="HWC")
    assert 'layout="NHWC" is for images' in refusal(linear, np.zeros((2, 3)), layout="NHWC")
    assert "floating point numbers, got int64(2, 3)" in refusal(linear, np.zeros((2, 3), np.int64))
    assert "batch (B, ...)" in refusal(linear, np.zeros(3))
    assert "call module.float() first" in refusal(nn.Linear(3, 2).double().eval(), np.zeros((2, 3)))
    assert "torch.export cannot export" in refusal(linear, np.zeros((2, 4)))


def test_an_operation_with_a_fault_is_refused(monkeypatch):
    module, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), np.ones((2, 3), np.float32)
    with torch.no_grad():
        module[0].bias.copy_(torch.tensor([1.0, -3, 2, -1]))
    faults = {
        "differs from the module by": abs,
        "aten.relu.default returns float32(3, 3) where torch says float32(3, 4)": lambda x: x[:, 1:],
        "cannot run aten.relu.default with its arguments in this module": lambda x: x.reshape(7, 7),
    }
    for message, fault in faults.items():
        monkeypatch.setitem(export.OPERATIONS, "aten.relu.default", fault)
        assert message in refusal(module, x)
    monkeypatch.setitem(export.OPERATIONS, "aten.relu.default", aten.OPERATIONS["aten.relu.default"])
    np.testing.assert_allclose(jax.jit(from_torch(module, x))(x), module(torch.from_numpy(x)).detach(), atol=1e-6)


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="from_torch needs the extra torch of lsrs_jax: pip install torch"):
        from_torch(None, EXAMPLE)
