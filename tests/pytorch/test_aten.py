"""Every group of ATen operations against PyTorch, through a whole import, on odd sizes and another batch size."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch.nn import functional as F  # noqa: E402

from lsrs_jax.pytorch import aten_layers, from_torch  # noqa: E402

SHAPE = (4, 9, 7)


def weights(*shape):
    return torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))


def positive(*shape):
    return weights(*shape).abs() + 0.5


def flat(x):
    """``(B, 36, 7)``: images as sequences."""
    return x.flatten(1, 2)


GROUPS = {
    "convolution": [
        lambda x: F.conv2d(x, weights(6, 2, 3, 2), weights(6), (2, 3), (1, 2), (2, 1), groups=2),
        lambda x: F.conv2d(x, weights(8, 1, 3, 3), padding=1, groups=4),
        lambda x: F.conv2d(x, weights(5, 4, 4, 3), padding="same"),
        lambda x: F.conv2d(x, weights(5, 4, 1, 1), stride=2),
        lambda x: F.conv1d(flat(x), weights(3, 36, 3), weights(3), 2, 1),
    ],
    "transposed convolution": [
        lambda x: F.conv_transpose2d(x, weights(4, 3, 3, 2), weights(6), (2, 3), (1, 0), (1, 2), 2, (1, 2)),
        lambda x: F.conv_transpose1d(flat(x), weights(36, 2, 3), stride=2, padding=1),
    ],
    "normalisation": [
        lambda x: F.batch_norm(x, weights(4), positive(4), weights(4), weights(4)),
        lambda x: F.batch_norm(x, weights(4), positive(4), eps=1e-3),
        lambda x: F.batch_norm(x.flatten(1), weights(252), positive(252)),
        lambda x: F.group_norm(x, 2, weights(4), weights(4)),
        lambda x: F.layer_norm(x, (9, 7), weights(9, 7), weights(9, 7)),
        lambda x: F.layer_norm(x, (7,)),
        lambda x: F.instance_norm(x, weight=weights(4), bias=weights(4)),
    ],
    "max pooling": [
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: F.max_pool2d(x, 2, ceil_mode=True),
        lambda x: F.max_pool2d(x, (3, 2), (2, 3), (1, 0), ceil_mode=True),
        lambda x: F.max_pool2d(x, 3, 1, 1, dilation=2),
        lambda x: F.adaptive_max_pool2d(x, (4, 3)),
        lambda x: F.max_pool1d(flat(x), 3, 2, 1),
    ],
    "average pooling": [
        lambda x: F.avg_pool2d(x, 3, 2, 1),
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
        lambda x: F.avg_pool2d(x, 4, 3, 2, ceil_mode=True, count_include_pad=False),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        lambda x: F.avg_pool2d(x, (9, 7)),
        lambda x: F.avg_pool1d(flat(x), 3, 2, 1),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
        lambda x: F.adaptive_avg_pool2d(x, (3, 7)),
        lambda x: F.adaptive_avg_pool2d(x, (11, 2)),
        lambda x: F.adaptive_avg_pool1d(flat(x), 3),
    ],
    "activations": [
        F.relu,
        F.relu6,
        F.hardtanh,
        F.leaky_relu,
        F.elu,
        F.celu,
        F.selu,
        F.gelu,
        F.silu,
        F.hardswish,
        F.hardsigmoid,
        torch.sigmoid,
        torch.tanh,
        F.softplus,
        F.mish,
        F.logsigmoid,
        F.softsign,
        F.tanhshrink,
        F.hardshrink,
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: F.softplus(10 * x, 2.0, 5.0),
        lambda x: F.elu(x, 0.5),
        lambda x: F.prelu(x, weights(4)),
        lambda x: F.glu(x, 1),
        lambda x: F.leaky_relu(x, 0.2),
        lambda x: F.hardtanh(x, -0.3, 0.8),
        lambda x: F.dropout(x, 0.5, training=False),
    ],
    "arithmetic": [
        lambda x: x + 2 * x - 1,
        lambda x: torch.add(x, x, alpha=3),
        lambda x: torch.sub(1, x, alpha=2),
        lambda x: x / 3 - 1 / (x.abs() + 1),
        lambda x: x**2 + x**3 + (x.abs() + 1) ** -0.5,
        lambda x: 2**x,
        lambda x: (x.abs() + 1) ** x,
        lambda x: x.abs().sqrt() + (x.abs() + 1).rsqrt(),
        lambda x: x.exp() + x.expm1(),
        lambda x: x.abs().log1p() + (x.abs() + 1).log(),
        lambda x: x.sin() + x.cos() + x.erf(),
        lambda x: -x.neg(),
        lambda x: x.floor() + x.ceil() + x.round() + x.trunc(),
        lambda x: torch.fmod(x, 0.4) + torch.remainder(x, 0.4),
        lambda x: torch.div(x, 0.3, rounding_mode="floor") + torch.div(x, 0.3, rounding_mode="trunc"),
        lambda x: x.clamp(-0.5, 0.7) + x.clamp_min(0.1) + x.clamp_max(0.1),
        lambda x: torch.maximum(x, -x) + x.sign(),
        lambda x: torch.where(x > 0.2, x, -x),
        lambda x: ((x >= 0) & ~(x < 0.5)).float(),
        lambda x: x.square(),
        lambda x: x.masked_fill(x.le(0), -2.0),
        lambda x: torch.where(x.eq(x), 1.0, x) + x.ne(0).float(),
        lambda x: x.reciprocal().clamp(-5, 5),
        lambda x: (10 * x).int() // 3 + (10 * x).long(),
    ],
    "reductions": [
        lambda x: x.mean((2, 3)),
        lambda x: x.mean(1, keepdim=True),
        lambda x: x.sum((1, -1)),
        lambda x: x.var((2, 3)),
        lambda x: x.var(1, correction=0),
        lambda x: x.std((2, 3), correction=0),
        lambda x: x.amax((2, 3)),
        lambda x: x.amin(1),
        lambda x: x.max(2)[0] - x.min(-1)[0].sum(2, keepdim=True),
        lambda x: x.norm(dim=1),
        lambda x: F.normalize(x, dim=1),
        lambda x: x.abs().sum(3).norm(1, dim=1),
        lambda x: x.logsumexp(1),
        lambda x: (x > 2).any(1).float(),
        lambda x: (x > -1).all(3).float(),
        lambda x: x.cumsum(1),
        lambda x: x.prod(1),
        lambda x: x.argmax(1).float(),
        lambda x: torch.var_mean(x, 1)[0] + torch.var_mean(x, 1)[1],
    ],
    "products": [
        lambda x: F.linear(x, weights(5, 7), weights(5)),
        lambda x: x.flatten(1) @ weights(252, 3),
        lambda x: torch.bmm(x[:, 0], x[:, 1].transpose(1, 2)),
        lambda x: x @ weights(7),
        lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
        lambda x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2, :7]),
        lambda x: torch.addmm(weights(3), x.flatten(1), weights(252, 3), beta=0.5, alpha=2),
        lambda x: weights(3, 9) @ x,
    ],
    "attention": [
        lambda x: x.softmax(1) + F.log_softmax(x, -1),
        lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1),
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=weights(9, 9)),
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=weights(9, 9) > 0, scale=0.3),
    ],
    "shapes": [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], 2, -1, 7),
        lambda x: x.permute(0, 3, 1, 2),
        lambda x: x.transpose(1, -1),
        lambda x: x.unsqueeze(2).squeeze(),
        lambda x: x.mean(2, keepdim=True).squeeze(2),
        lambda x: x[:, :1].expand(-1, 5, -1, -1),
        lambda x: torch.cat([x, x[:, 1:]], 1),
        lambda x: x.unflatten(1, (2, 2)),
        lambda x: torch.stack(x.split(3, 2), 1),
        lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1),
        lambda x: x.flip(1, -1),
        lambda x: x.chunk(3, 3)[2],
        lambda x: x[:, 2],
        lambda x: x[:, ::2, 1:-1, -3:],
        lambda x: x.repeat(1, 2, 1, 3),
        lambda x: x.roll((1, 2), (2, 3)),
        lambda x: x.unbind(1)[-1],
        lambda x: x.unfold(2, 3, 2),
        lambda x: x.contiguous(),
        lambda x: F.pixel_unshuffle(x[:, :, :8, :6], 2),
        lambda x: F.pixel_shuffle(x, 2),
        lambda x: x.narrow(3, 1, 4),
        lambda x: x.view(x.shape[0] * 2, -1).view(x.shape[0], -1),
        lambda x: x.movedim(1, 3),
        lambda x: x[:, None, ..., 0],
    ],
    "padding and resizing": [
        lambda x: F.pad(x, (1, 2, 3, 0), value=1.5),
        lambda x: F.pad(x, (-1, 2, 0, -2)),
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
        lambda x: F.pad(x, (1, 2, 3, 1), mode="reflect"),
        lambda x: F.pad(x, (1, 2, 3, 1), mode="replicate"),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.interpolate(x, size=(13, 4)),
        lambda x: F.interpolate(x, scale_factor=1.7),
        lambda x: F.interpolate(x, size=(5, 11), mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=(2.0, 1.5), mode="bilinear", align_corners=False),
        lambda x: F.interpolate(x, size=(5, 11), mode="bilinear", align_corners=True),
    ],
    "indices and new tensors": [
        lambda x: x[:, [2, 0, 2]],
        lambda x: x[:, torch.tensor([3, 1]), :, 2],
        lambda x: x.index_select(2, torch.tensor([8, 0])),
        lambda x: x[torch.arange(x.shape[0]), 1],
        lambda x: x * torch.arange(7) + torch.arange(1, 9, 2)[:, None, None, None][0],
        lambda x: F.embedding((x * 2).long().clamp(0, 4), weights(5, 3)),
        lambda x: x + torch.ones(7) + torch.zeros_like(x),
        lambda x: torch.full((x.shape[0], 2), 0.5) + x.new_ones(2),
        lambda x: x * x.shape[0] + x.shape[1] // 3,
        lambda x: x.gather(1, (x[:, :2] > 0).long()),
        lambda x: x + torch.tensor([1.0, 2.0]).repeat(x.shape[0], 4, 9, 4)[..., :7],
        lambda x: x.to(torch.int32).to(torch.float32),
        lambda x: x.tril() + x.triu(1),
        lambda x: torch.linspace(0, 1, 7) * x,
    ],
}


class Group(torch.nn.Module):
    """The results of some functions of a batch, flattened and in a row."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def parts(self, x):
        return [function(x).float().reshape(x.shape[0], -1) for function in self.functions]

    def forward(self, x):
        return torch.cat(self.parts(x), 1)


@pytest.mark.parametrize("name", GROUPS)
def test_operations_agree_with_torch(name):
    group = Group(GROUPS[name]).eval()
    imported = from_torch(group, torch.randn(2, *SHAPE))
    for batch in (1, 5):
        x = np.random.default_rng(batch).standard_normal((batch, *SHAPE)).astype(np.float32)
        found, start = np.asarray(jax.jit(imported)(x)), 0
        for number, part in enumerate(group.parts(torch.from_numpy(x))):
            expected, stop = part.numpy(), start + part.shape[1]
            difference = np.abs(found[:, start:stop] - expected).max()
            assert difference <= 1e-5 * np.abs(expected).max(), (name, number)
            start = stop


def test_the_attention_that_some_versions_export_whole():
    queries, keys, values = (weights(2, 3, size, 8) for size in (5, 6, 6))
    whole = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for settings in ({}, {"scale": 0.2}, {"attn_mask": weights(5, 6)}):
        expected = whole(queries, keys, values, **settings)[0]
        settings = {key: value.numpy() if hasattr(value, "numpy") else value for key, value in settings.items()}
        arrays = (tensor.numpy() for tensor in (queries, keys, values))
        np.testing.assert_allclose(aten_layers.flash_attention(*arrays, **settings)[0], expected, atol=2e-6)
    square = (weights(2, 3, 5, 8), weights(2, 3, 5, 8) + 1, weights(2, 3, 5, 8) * 2)
    expected = whole(*square, 0.0, True)[0]
    np.testing.assert_allclose(aten_layers.flash_attention(*map(np.asarray, square), 0.0, True)[0], expected, atol=2e-6)


def test_large_inputs_have_finite_gradients():
    group = Group([F.softplus, F.mish, F.elu, F.silu, F.gelu, torch.sigmoid]).eval()
    imported = from_torch(group, torch.randn(2, 3))
    for size in (-200.0, 0.0, 200.0):
        x = np.full((1, 3), size, np.float32)
        leaf = torch.from_numpy(x).requires_grad_()
        group(leaf).sum().backward()
        found = jax.grad(lambda x: imported(x).sum())(x)
        np.testing.assert_allclose(found, leaf.grad.numpy(), atol=1e-5)
