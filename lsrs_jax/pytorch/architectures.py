"""PyTorch modules of the networks whose checkpoints the field publishes, with the parameter names of their files.

This file imports PyTorch; import it only inside the functions that use it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Mean and standard deviation of each channel, with which the field's networks standardise their input.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Normalize(nn.Module):
    """Standardises images ``(B, C, H, W)``: ``(x - mean) / std`` per channel.

    The noise is added in front of this layer, so that radii are in units of the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Any, std: Any) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            vector = torch.as_tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)
            self.register_buffer(name, vector, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _conv(inside: int, outside: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, size, stride, size // 2, bias=False)


def _shortcut(inside: int, outside: int, stride: int) -> nn.Sequential | None:
    """The projection of a shortcut that changes its shape (He et al. 2016, option B)."""
    if stride == 1 and inside == outside:
        return None
    return nn.Sequential(_conv(inside, outside, 1, stride), nn.BatchNorm2d(outside))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inside, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = _shortcut(inside, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + skip)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al. 2016, figure 5 right); the 3x3 one has the stride."""

    expansion = 4

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inside, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(inside, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        inner = torch.relu(self.bn1(self.conv1(x)))
        inner = torch.relu(self.bn2(self.conv2(inner)))
        return torch.relu(self.bn3(self.conv3(inner)) + skip)


def _stage(block: Any, inside: int, width: int, count: int, stride: int) -> nn.Sequential:
    first = block(inside, width, stride)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1) for _ in range(count - 1)))


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers for 32x32 images (He et al. 2016, section 4.2)."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        count = (depth - 2) // 6
        self.conv1, self.bn1 = _conv(3, 16, 3), nn.BatchNorm2d(16)
        self.layer1 = _stage(BasicBlock, 16, 16, count, 1)
        self.layer2 = _stage(BasicBlock, 16, 32, count, 2)
        self.layer3 = _stage(BasicBlock, 32, 64, count, 2)
        self.avgpool, self.fc = nn.AvgPool2d(8), nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


class ResNet50(nn.Module):
    """ResNet-50 for images of any size (He et al. 2016, table 1), with the names of torchvision."""

    def __init__(self, num_classes: int = 1000, counts: Sequence[int] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(Bottleneck, 64, 64, counts[0], 1)
        self.layer2 = _stage(Bottleneck, 256, 128, counts[1], 2)
        self.layer3 = _stage(Bottleneck, 512, 256, counts[2], 2)
        self.layer4 = _stage(Bottleneck, 1024, 512, counts[3], 2)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(2048, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class DnCNN(nn.Module):
    """Denoiser: the image minus the noise that 3x3 convolutions find in it (Zhang et al. 2017).

    For denoised smoothing (Salman et al. 2020) it stands in front of a classifier, and has no normalisation.
    """

    def __init__(self, width: int = 64, depth: int = 17) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [_conv(width, width, 3), nn.BatchNorm2d(width, eps=1e-4), nn.ReLU()]
        self.dncnn = nn.Sequential(*layers, _conv(width, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.dncnn(x)


# Name of an architecture in the field's files → a function of the number of classes (which denoisers ignore).
ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "cifar_resnet20": lambda classes: CifarResNet(20, classes),
    "cifar_resnet110": lambda classes: CifarResNet(110, classes),
    "resnet50": ResNet50,
    "cifar_dncnn": lambda _: DnCNN(),
    "cifar_dncnn_wide": lambda _: DnCNN(128),
    "imagenet_dncnn": lambda _: DnCNN(),
}
# The statistics that belong to a classifier in files that name a normalisation layer and do not hold its numbers.
NORMALIZATION = {"cifar_resnet20": "cifar10", "cifar_resnet110": "cifar10", "resnet50": "imagenet"}
