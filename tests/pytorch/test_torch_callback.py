"""Modules of PyTorch as heads through a callback: votes, batches, layouts, digests and refusals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from lsrs_jax.pytorch import from_torch, torch_callback  # noqa: E402
from lsrs_jax.runtime.errors import UserError  # noqa: E402
from lsrs_jax.smoothing import certify  # noqa: E402
from support import threefry  # noqa: E402

X = np.random.default_rng(0).random((3, 3, 8, 8), dtype=np.float32)
SETTINGS = {"sigma": 0.5, "key": threefry(0), "tile": (2, 16)}


class Branching(nn.Module):
    """A module that cannot be imported: its control flow depends on the values."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 4)

    def forward(self, x):
        rows = [row.flatten() if row.mean() > 0.5 else 2 * row.flatten() for row in x]
        return self.fc(torch.stack(rows))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def test_counts_are_those_of_the_import(network):
    found = certify(torch_callback(network, 4), X, n0=50, n=500, **SETTINGS)
    expected = certify(from_torch(network, X), X, n0=50, n=500, **SETTINGS)
    np.testing.assert_array_equal(found.counts, expected.counts)


def test_a_module_that_cannot_be_imported_is_certified():
    torch.manual_seed(0)
    module = Branching().eval()
    with pytest.raises(UserError, match=r"depend on the values of its input.*use torch_callback"):
        from_torch(module, X)
    found = certify(torch_callback(module, 4), X, n0=50, n=500, **SETTINGS)
    weights, bias = (tensor.detach().numpy() for tensor in module.parameters())

    def twin(z):
        rows = z.reshape(len(z), -1)
        return jnp.where(rows.mean(1, keepdims=True) > 0.5, rows, 2 * rows) @ weights.T + bias

    expected = certify(twin, X, n0=50, n=500, **SETTINGS)
    assert np.abs(found.counts - expected.counts).max() <= 1  # a mean may lie at 0.5, up to rounding


def test_rows_that_depend_on_their_batch_are_refused():
    class Centred(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4] - x.flatten(1)[:, :4].mean(0)

    with pytest.raises(UserError, match="rows depend on each other"):
        certify(torch_callback(Centred().eval(), 4), X, n0=50, n=500, **SETTINGS)


def test_batches_layouts_and_loops(network):
    expected = network(torch.from_numpy(X)).detach().numpy()
    head = torch_callback(network, 4)
    np.testing.assert_allclose(jax.jit(head)(X), expected, atol=1e-6)
    twice = np.stack([X, 2 * X])
    found = jax.jit(jax.vmap(head))(twice)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    np.testing.assert_allclose(found[1], network(torch.from_numpy(2 * X)).detach().numpy(), atol=1e-6)
    last = torch_callback(network, 4, layout="NHWC")
    np.testing.assert_allclose(last(X.transpose(0, 2, 3, 1)), expected, atol=1e-6)
    total = jax.lax.fori_loop(0, 3, lambda _, total: total + head(X), jnp.zeros((3, 4)))
    np.testing.assert_allclose(total, 3 * expected, atol=1e-5)
    with pytest.raises(UserError, match='layout="NHWC" is for images'):
        last(X[0])


def test_the_head_keeps_its_parameters_and_its_digest_tells_modules_apart(network):
    head = torch_callback(network, 4)
    assert re.fullmatch("[0-9a-f]{64}", head.digest)
    assert torch_callback(network, 4).digest == head.digest
    before, weights = np.asarray(head(X)), network[1].weight
    kept = weights.detach().clone()
    with torch.no_grad():
        weights[0, 0] += 1e-3
        assert torch_callback(network, 4).digest != head.digest
        weights[0, 0] += 100
    np.testing.assert_array_equal(head(X), before)
    with torch.no_grad():
        weights.copy_(kept)
    other = type("Other", (type(network),), {})(*network).eval()
    assert torch_callback(other, 4).digest != head.digest
    assert torch_callback(nn.Sequential(*network).eval(), 4).digest == head.digest


def test_refusals(network):
    with pytest.raises(UserError, match=r"call module\.eval\(\) first"):
        torch_callback(nn.Sequential(nn.Dropout()), 4)
    with pytest.raises(UserError, match="num_classes must be a whole number >= 2, got 1"):
        torch_callback(network, 1)
    with pytest.raises(UserError, match="unknown layout"):
        torch_callback(network, 4, layout="CHW")
    with pytest.raises(UserError, match=r"must return logits \(\d+, 5\), got \(\d+, 4\)"):
        certify(torch_callback(network, 5), X, n0=50, n=500, **SETTINGS)


def test_the_digest_tells_functions_of_the_same_parameters_apart():
    first, last = torch.nn.Linear(6, 16), torch.nn.Linear(16, 3)

    class Own(torch.nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.first, self.scale = first, scale

    class One(Own):
        def forward(self, x):
            return self.first(x)[:, :3] * 2

    class Other(Own):
        def forward(self, x):
            return self.first(x)[:, :3] * 3

    modules = [
        *(torch.nn.Sequential(first, act, last) for act in (torch.nn.ReLU(), torch.nn.Tanh())),
        *(torch.nn.Sequential(first, torch.nn.LeakyReLU(slope), last) for slope in (0.01, 5.0)),
        One(1.0),
        Other(1.0),
    ]
    digests = [torch_callback(module.eval(), 3).digest for module in modules]
    assert len(set(digests)) == len(modules)
    assert torch_callback(modules[0].eval(), 3).digest == digests[0]
    assert torch_callback(modules[0].eval(), 3, layout="NHWC").digest != digests[0]
