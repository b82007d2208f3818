"""Checkpoint files of the field: their names and prefixes, and files that are damaged, wrong or malicious."""

import os
import pickle
import zipfile

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from lsrs_jax.pytorch import read_checkpoint  # noqa: E402
from lsrs_jax.pytorch.architectures import ARCHITECTURES, STATISTICS, CifarResNet, DnCNN, Normalize  # noqa: E402
from lsrs_jax.runtime.errors import UserError  # noqa: E402
from support.torch_networks import calibrated, images  # noqa: E402


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return calibrated(CifarResNet(20), 32, 1)


@pytest.fixture(scope="module")
def x():
    torch.manual_seed(1)
    return images(2, 32)


def renamed(network, prefix):
    return {prefix + name: tensor for name, tensor in network.state_dict().items()}


def saved(path, content):
    torch.save(content, path)
    return path


def refusal(path, *arguments, **settings):
    with pytest.raises(UserError) as error:
        read_checkpoint(path, *arguments, **settings)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def same(found, expected, x):
    assert not any(part.training for part in found.modules())
    with torch.inference_mode():
        torch.testing.assert_close(found(x), expected(x), rtol=0, atol=0)


def test_the_names_are_those_of_the_fields_files(network):
    """Facts about the public files: these names and shapes stand in the checkpoints of Cohen et al. and torchvision."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes["conv1.weight"] == (16, 3, 3, 3)
    assert shapes["layer2.0.downsample.0.weight"] == (32, 16, 1, 1)
    assert shapes["layer2.0.downsample.1.running_var"] == (32,)
    assert shapes["layer3.2.bn2.weight"] == (64,)
    assert (shapes["fc.weight"], shapes["fc.bias"]) == ((10, 64), (10,))
    assert not [name for name in shapes if name.startswith("layer1.0.downsample") or name == "conv1.bias"]
    counts = {"cifar_resnet20": 0.272e6, "cifar_resnet110": 1.73e6, "resnet50": 25.557e6}
    for name, count in counts.items():
        made = ARCHITECTURES[name](1000 if name == "resnet50" else 10)
        assert sum(tensor.numel() for tensor in made.parameters()) == pytest.approx(count, rel=5e-3)
    names = set(made.state_dict())
    assert {"layer1.0.conv3.weight", "layer1.0.downsample.1.bias", "layer4.2.bn3.running_mean", "fc.bias"} <= names
    assert {"dncnn.0.bias", "dncnn.2.weight", "dncnn.3.running_mean", "dncnn.47.weight"} <= set(DnCNN().state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
def test_a_bare_network_loads(network, x, prefix, tmp_path):
    path = saved(tmp_path / "a.pth", {"arch": "cifar_resnet20", "epoch": 90, "state_dict": renamed(network, prefix)})
    same(read_checkpoint(path, "cifar_resnet20"), network, x)
    same(read_checkpoint(path), network, x)
    same(read_checkpoint(path, lambda: CifarResNet(20)), network, x)
    normalized = nn.Sequential(Normalize(*STATISTICS["cifar10"]), network)
    same(read_checkpoint(path, normalize="cifar10"), normalized, x)
    assert not torch.equal(read_checkpoint(path, normalize="imagenet")(x), normalized(x))


@pytest.mark.parametrize("prefix", ["1.", "1.module.", "module.1.", "module.1.module."])
def test_a_network_behind_its_normalisation_loads(network, x, prefix, tmp_path):
    path = saved(tmp_path / "a.pth.tar", {"arch": "cifar_resnet20", "state_dict": renamed(network, prefix)})
    normalized = nn.Sequential(Normalize(*STATISTICS["cifar10"]), network).eval()
    same(read_checkpoint(path), normalized, x)
    assert "give normalize, cifar10 or imagenet" in refusal(path, lambda: CifarResNet(20))
    same(read_checkpoint(path, lambda: CifarResNet(20), normalize="cifar10"), normalized, x)
    front, outer = prefix.replace("1.module.", "1.").replace("1.", "0."), renamed(network, prefix)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.1]).reshape(1, 3, 1, 1)
    path = saved(tmp_path / "b.pth", outer | {f"{front}mean": mean, f"{front}std": std})
    own = nn.Sequential(Normalize(mean, std), network).eval()
    same(read_checkpoint(path, "cifar_resnet20"), own, x)
    assert "holds another normalisation than that of cifar10" in refusal(path, "cifar_resnet20", normalize="cifar10")
    path = saved(tmp_path / "c.pth", outer | {f"{front}weight": mean})
    assert "0.weight" in refusal(path, "cifar_resnet20")


def test_a_network_that_is_a_sequential_itself_loads(x, tmp_path):
    torch.manual_seed(0)

    def make():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 3))

    expected = make().eval()
    for prefix in ("", "module.", "1.", "module.1."):
        path = saved(tmp_path / "a.pth", renamed(expected, prefix))
        if "1." in prefix:
            path = saved(tmp_path / "a.pth", renamed(expected, prefix))
            front = nn.Sequential(Normalize(*STATISTICS["imagenet"]), expected)
            same(read_checkpoint(path, make, normalize="imagenet"), front, x)
        else:
            same(read_checkpoint(path, make), expected, x)


def test_details_of_old_files(network, x, tmp_path):
    stored = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    path = tmp_path / "old.pth"
    torch.save({"arch": "cifar_resnet20", "state_dict": stored}, path, _use_new_zipfile_serialization=False)
    same(read_checkpoint(path), network, x)
    hundred = CifarResNet(20, 100).eval()
    path = saved(tmp_path / "c100.pth", {"arch": "cifar_resnet20", "state_dict": hundred.state_dict()})
    same(read_checkpoint(path), hundred, x)
    denoiser = DnCNN().eval()
    path = saved(tmp_path / "d.pth", {"arch": "cifar_dncnn", "state_dict": renamed(denoiser, "module.")})
    both = nn.Sequential(read_checkpoint(path), network)
    same(both.eval(), nn.Sequential(denoiser, network), x)


def test_wrong_names_and_shapes(network, tmp_path):
    stored = network.state_dict()
    path = saved(tmp_path / "a.pth", {"arch": "cifar_resnet20", "state_dict": stored})
    assert "holds a cifar_resnet20, not a cifar_resnet110" in refusal(path, "cifar_resnet110")
    path = saved(tmp_path / "a.pth", stored)
    message = refusal(path, "cifar_resnet110")
    assert "missing layer1.10.bn1.bias, layer1.10.bn1.running_mean" in message
    assert " more" in message
    assert len(message) < 300
    assert "does not name its architecture: give arch" in refusal(path)
    assert "the names of this network: missing" in refusal(path, "resnet50")
    path = saved(tmp_path / "a.pth", stored | {"fc.scale": torch.ones(10)})
    assert refusal(path, "cifar_resnet20").endswith("unexpected fc.scale")
    path = saved(tmp_path / "a.pth", {name: tensor for name, tensor in stored.items() if name != "fc.bias"})
    assert refusal(path, "cifar_resnet20").endswith("missing fc.bias")
    path = saved(tmp_path / "a.pth", stored | {"conv1.weight": torch.ones(16, 3, 5, 5)})
    assert "conv1.weight is (16, 3, 5, 5), not (16, 3, 3, 3)" in refusal(path, "cifar_resnet20")
    path = saved(tmp_path / "a.pth", stored | renamed(network, "module."))
    assert "does not have the names" in refusal(path, "cifar_resnet20")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle", "inside the dict", "as a tensor"])
def test_code_in_a_file_is_not_executed(kind, network, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "a.pth"
    code = Malicious(marker)
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(code))
    elif kind == "inside the dict":
        torch.save({"arch": "cifar_resnet20", "state_dict": network.state_dict(), "optimizer": code}, path)
    elif kind == "as a tensor":
        torch.save(network.state_dict() | {"fc.bias": code}, path)
    else:
        torch.save(code, path, _use_new_zipfile_serialization=kind == "zip")
    for arch in ("cifar_resnet20", None):
        message = refusal(path, arch)
        assert "holds more than weights" in message
        assert "mkdir" in message or kind == "plain pickle"
    assert not marker.exists()


def test_files_that_are_no_checkpoints(network, tmp_path):
    path = saved(tmp_path / "a.pth", {"arch": "cifar_resnet20", "state_dict": network.state_dict()})
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:length])
        assert "not whole" in refusal(path) or "no checkpoint" in refusal(path)
    path.write_bytes(os.urandom(1000))
    assert "no checkpoint" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.txt", "text")
    assert "no checkpoint" in refusal(path)
    assert "cannot be read: No such file" in refusal(tmp_path / "missing")
    assert "cannot be read" in refusal(tmp_path)
    for number, content in enumerate(([1, 2], {"state_dict": {}}, {"a": 1}, {1: torch.ones(2)}, torch.ones(2), {})):
        path = saved(tmp_path / f"{number}.pth", content)
        assert "is no checkpoint" in refusal(path, "cifar_resnet20")


def test_wrong_arguments(network, tmp_path):
    path = saved(tmp_path / "a.pth", network.state_dict())
    with pytest.raises(UserError, match="unknown arch 'resnet18': choose one of cifar_resnet20"):
        read_checkpoint(path, "resnet18")
    with pytest.raises(UserError, match="unknown normalize 'mnist': choose one of cifar10, imagenet"):
        read_checkpoint(path, "cifar_resnet20", normalize="mnist")
    with pytest.raises(UserError, match=r"arch must make a torch\.nn\.Module, it made a dict"):
        read_checkpoint(path, dict)
