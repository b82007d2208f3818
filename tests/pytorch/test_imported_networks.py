"""Whole networks against PyTorch: logits, votes on identical noise, certificates, gradients and layouts."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from sklearn.datasets import load_digits  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from lsrs_jax.pytorch import Imported, from_torch  # noqa: E402
from lsrs_jax.pytorch.architectures import STATISTICS, CifarResNet, Normalize  # noqa: E402
from lsrs_jax.runtime.errors import UserError  # noqa: E402
from lsrs_jax.smoothing import certify  # noqa: E402
from support import threefry  # noqa: E402
from support.torch_networks import NETWORKS, calibrated, images  # noqa: E402

SHARE = 1e-5  # of the largest logit


def check_votes(network, clean):
    """Logits agree, and so do the classes of noisy images except where the two leading logits nearly tie."""
    noisy = clean + 0.25 * np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
    imported = from_torch(network, noisy)
    with torch.inference_mode():
        expected = network(torch.from_numpy(noisy)).numpy()
    found = np.asarray(jax.jit(imported.apply)(imported.params, noisy))
    largest = np.abs(expected).max()
    assert np.abs(found - expected).max() <= SHARE * largest
    first, second = np.sort(expected, axis=1)[:, :-3:-1].T
    clear = first - second > 10 * SHARE * largest
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found.argmax(1)[clear], expected.argmax(1)[clear])
    assert len(set(expected.argmax(1))) > 1
    return imported, expected


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_votes_as_in_torch(name):
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    network = calibrated(make(), size)
    imported, _ = check_votes(network, images(4, size).repeat(5, 1, 1, 1).numpy())
    assert isinstance(imported, Imported)
    assert (imported.input_shape, imported.num_classes, imported.layout) == ((3, size, size), 10, "NCHW")


def test_a_trained_network_votes_as_in_torch():
    torch.manual_seed(0)
    digits, labels = load_digits(return_X_y=True)
    digits = torch.from_numpy(digits[:360].reshape(-1, 1, 8, 8).astype(np.float32) / 16)
    digits, labels = F.interpolate(digits, scale_factor=4).repeat(1, 3, 1, 1), torch.from_numpy(labels[:360])
    network = nn.Sequential(Normalize(*STATISTICS["cifar10"]), CifarResNet(20))
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.3  # a short training
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for rows in [*torch.arange(320).split(32)] * 3:
        noisy = digits[rows] + 0.25 * torch.randn_like(digits[rows])
        F.cross_entropy(network(noisy), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    _, expected = check_votes(network, digits[320:].numpy())
    assert (expected.argmax(1) == labels[320:].numpy()).mean() > 0.5


@pytest.fixture(scope="module")
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def test_certificates_are_those_of_the_same_network_written_in_jax(mlp):
    weights = [tensor.detach().numpy() for tensor in mlp.parameters()]

    def twin(z):
        return jax.nn.relu(z @ weights[0].T + weights[1]) @ weights[2].T + weights[3]

    rows = np.random.default_rng(0).standard_normal((5, 6))
    settings = {"sigma": 0.5, "key": threefry(0), "n0": 50, "n": 1000, "tile": (2, 16)}
    imported = certify(from_torch(mlp, torch.zeros(1, 6)), rows, **settings)
    expected = certify(twin, rows, **settings)
    np.testing.assert_array_equal(imported.counts, expected.counts)
    np.testing.assert_array_equal(imported.radius, expected.radius)


def test_gradients_reach_parameters_and_no_buffers():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ELU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    network = calibrated(network, 8)
    imported = from_torch(network, torch.zeros(2, 3, 8, 8))
    assert set(imported.params["parameters"]) == {name for name, _ in network.named_parameters()}
    assert set(imported.params["buffers"]) == {"1.running_mean", "1.running_var"}
    x, labels = np.random.default_rng(0).random((4, 3, 8, 8), dtype=np.float32), np.array([0, 1, 2, 0])

    def loss(params, x):
        return -jnp.mean(jax.nn.log_softmax(imported.apply(params, x))[np.arange(4), labels])

    to_params, to_x = jax.jit(jax.grad(loss, (0, 1)))(imported.params, x)
    leaf = torch.from_numpy(x).requires_grad_()
    F.cross_entropy(network(leaf), torch.from_numpy(labels)).backward()
    np.testing.assert_allclose(to_x, leaf.grad.numpy(), atol=1e-6)
    for name, tensor in network.named_parameters():
        np.testing.assert_allclose(to_params["parameters"][name], tensor.grad.numpy(), atol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(to_params["buffers"]))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, imported.params)
    assert not np.allclose(imported.apply(doubled, x), imported(x))


def test_layouts_transformations_and_pickle():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten())
    network = calibrated(nn.Sequential(network, nn.Linear(24, 3)), 8)
    x = np.random.default_rng(0).random((5, 3, 6, 8), dtype=np.float32)
    first, last = (from_torch(network, x, layout=layout) for layout in ("NCHW", "NHWC"))
    assert (first.input_shape, last.input_shape) == ((3, 6, 8), (6, 8, 3))
    expected = np.asarray(first(x))
    np.testing.assert_allclose(expected, network(torch.from_numpy(x)).detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(last(x.transpose(0, 2, 3, 1)), expected, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(first)(x[:, None])[:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(first))(x), expected, atol=1e-6)
    with jax.enable_x64(True):
        found = jax.jit(first)(x)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(UserError, match=r"takes inputs of shape \(B, 6, 8, 3\), got \(5, 3, 6, 8\)"):
        last(x)


def test_layers_that_only_differ_outside_of_the_state_dict_are_kept_apart():
    """Tensors that a module makes itself, as the normalisation of Cohen's code, are part of the function."""

    class Front(nn.Module):
        def __init__(self, mean):
            super().__init__()
            self.mean = torch.tensor(mean)

        def forward(self, x):
            return x - self.mean.repeat(x.shape[0], 1)

    x = np.ones((2, 3), np.float32)
    found = [np.asarray(from_torch(Front([mean, 0.0, 0.0]).eval(), x)(x))[0, 0] for mean in (0.25, 0.5)]
    assert found == [0.75, 0.5]
