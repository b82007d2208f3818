"""Networks of PyTorch with the layers of well-known image classifiers, small, and with calibrated batch statistics."""

import torch
from torch import nn

from lsrs_jax.pytorch.architectures import CifarResNet, ResNet50


class ViT(nn.Module):
    """A small vision transformer: patches, a class token, positions, and pre-norm encoder layers."""

    def __init__(self, width=48, depth=3, heads=3, classes=10):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(0.2 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.2 * torch.randn(1, 65, width))
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.fc(self.norm(self.encoder(x))[:, 0])


class Inverted(nn.Module):
    """An inverted residual with a depthwise convolution and squeeze-and-excitation, as in MobileNetV3."""

    def __init__(self, inside, outside, stride, size):
        super().__init__()
        wide = 4 * inside
        self.expand = nn.Sequential(nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, size, stride, size // 2, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 8, 1), nn.ReLU(), nn.Conv2d(8, wide, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(wide, outside, 1, bias=False), nn.BatchNorm2d(outside))
        self.skip = stride == 1 and inside == outside

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.squeeze(y))
        return x + y if self.skip else y


class MobileNet(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        blocks = [Inverted(16, 16, 1, 3), Inverted(16, 24, 2, 5), Inverted(24, 24, 1, 3)]
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish(inplace=True), *blocks
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean([2, 3]))


def vgg(classes=10):
    """A VGG with batch norm, max pooling and hidden dense layers with dropout."""
    layers, inside = [], 3
    for width, count in ((16, 1), (32, 2), (64, 2)):
        for _ in range(count):
            layers += [nn.Conv2d(inside, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            inside = width
        layers.append(nn.MaxPool2d(2, 2))
    hidden = [nn.Flatten(), nn.Linear(64 * 9, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, classes)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((3, 3)), *hidden)


class Dense(nn.Module):
    def __init__(self, inside, growth):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inside), nn.Conv2d(inside, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(torch.relu_(self.norm(x)))], 1)


def densenet(growth=8, classes=10):
    """A DenseNet: concatenations, and transitions with average pooling."""
    layers, channels = [nn.Conv2d(3, 16, 3, padding=1)], 16
    for number in range(3):
        for _ in range(3):
            layers.append(Dense(channels, growth))
            channels += growth
        if number < 2:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1), nn.AvgPool2d(2, 2)]
            channels //= 2
    head = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers, *head)


def damped(network, last, scale=0.25):
    """A ResNet whose residual branches, which end in the layers `last`, are small, as training makes them.

    With scales of 1, random branches multiply every rounding error: PyTorch's own float32 logits are then up to 3e-5 of
    the largest away from its logits in float64.
    """
    for name, part in network.named_modules():
        if name.endswith(last):
            nn.init.constant_(part.weight, scale)
    return network


NETWORKS = {
    "ResNet-110": (lambda: damped(CifarResNet(110), "bn2"), 32),
    "ResNet-50": (lambda: damped(ResNet50(10), "bn3"), 64),
    "ViT": (ViT, 32),
    "MobileNet": (MobileNet, 32),
    "VGG": (vgg, 32),
    "DenseNet": (densenet, 32),
}


def images(count, size):
    """Images ``(count, 3, size, size)`` of a few coloured squares, so that the logits of random networks differ."""
    return nn.functional.interpolate(2 * torch.rand(count, 3, 4, 4) - 0.5, size=(size, size))


def noisy(count, size):
    return images(count, size) + 0.25 * torch.randn(count, 3, size, size)


def calibrated(network, size, batches=3):
    """The network in eval mode, with the batch statistics of noisy images, and logits that are 0 on average."""
    network.train()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None  # the mean of all batches
    with torch.no_grad():
        for _ in range(batches):
            network(noisy(8, size))
        last = [part for part in network.modules() if isinstance(part, nn.Linear)][-1]
        last.bias -= network.eval()(noisy(16, size)).mean(0)
    return network
