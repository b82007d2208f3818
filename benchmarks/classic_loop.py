"""Compares the sampling loop with the classic loop in PyTorch, on a network with the same layers.

  python -m benchmarks.classic_loop [--config=configs/cifar10_small.py:deep --tile=32,8]

The classic loop takes one image at a time: a batch of copies, ``randn_like``, argmax, bincount (Cohen et al. 2019,
locuslab/smoothing). The PyTorch network has the layers of the configured one with their shapes and random parameters; a
plain zero-padded ``nn.Conv2d`` takes the place of an orthogonal convolution. All loops take turns. PyTorch needs idle
cores: its threads wait for each other, and one busy core slows it many times.
"""

import argparse

import numpy as np

from benchmarks import measuring
from lsrs_jax import cli, layers, models
from lsrs_jax.flags import config_from_flags
from lsrs_jax.models.heads import BlocksHead, ConvHead
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import domain_key
from studies.accelerator import table

IMAGE, CLASSES, BATCHES = (32, 32, 3), 10, (1000, 128)  # batches: as published, and one that stays in the cache


def network(torch, model):
    """The `nn.Module` (B, C, H, W) → logits with the layers of a split model, normalisation included.

    Raises:
      UserError: for a layer or head that has no counterpart here.
    """
    nn, shape, chain = torch.nn, model.input_shape, []
    if model.normalize is not None:
        chain.append(_module(torch, _normalize(torch, model.normalize)))
    for layer in model.encoder.layers:
        if isinstance(layer, layers.SpaceToDepth) and len(set(layer.strides)) == 1:
            chain.append(nn.PixelUnshuffle(layer.strides[0]))
        elif isinstance(layer, layers.OrthogonalConv):
            chain.append(_conv(nn, shape[-1], layer.features, layer.kernel_size, layer.strides, bias=False))
        elif isinstance(layer, layers.Haar):
            chain += [nn.PixelUnshuffle(2), _module(torch, lambda x: _haar(torch, x))]
        elif isinstance(layer, layers.MaxMin):
            chain.append(_module(torch, lambda x: _maxmin(torch, x)))
        else:
            raise UserError(f"No rows of PyTorch: it has no counterpart of {type(layer).__name__} here")
        shape = layer.output_shape(shape)
    channels = shape[-1]
    for width, stride, unshuffled in _head_stages(model.head):
        if unshuffled > 1:
            chain.append(nn.PixelUnshuffle(unshuffled))
        chain += [_conv(nn, channels * unshuffled**2, width, (3, 3), (stride, stride)), nn.ReLU(inplace=True)]
        channels = width
    mean = _module(torch, lambda x: x.mean(dim=(2, 3)))
    return nn.Sequential(*chain, mean, nn.Linear(channels, model.head.num_classes)).eval()


def _head_stages(head):
    """``(channels, stride, space-to-depth in front)`` of the convolutions of a head."""
    if isinstance(head, ConvHead):
        return [(width, stride, 1) for width, stride in head.stages]
    if isinstance(head, BlocksHead) and all(head.widths):
        return [(width, 1, stride) for width, stride in zip(head.widths, head.strides, strict=True)]
    raise UserError(f"No rows of PyTorch: it has no counterpart of {type(head).__name__} here")


def _haar(torch, x):
    a, b, c, d = x.unflatten(1, (-1, 4)).unbind(2)
    return torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], dim=1) / 2


def _conv(nn, channels, width, size, strides, bias=True):
    return nn.Conv2d(channels, width, tuple(size), tuple(strides), tuple(k // 2 for k in size), bias=bias)


def _maxmin(torch, x):
    first, second = x.chunk(2, dim=1)
    return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)


def _normalize(torch, normalize):
    mean, std = (torch.tensor(np.asarray(v, np.float32)).reshape(1, -1, 1, 1) for v in (normalize.mean, normalize.std))
    return lambda x: (x - mean.to(x.device)) / std.to(x.device)


def _module(torch, function):
    class Function(torch.nn.Module):
        def forward(self, x):
            return function(x)

    return Function()


def sampling(torch, device, net, shape, classes, batch, channels_last):
    """A work whose repetition is a batch of samples of one image ``(H, W, C)`` of a random content."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(device, memory_format=form)
    image = torch.rand(1, shape[2], *shape[:2], device=device)

    def work(k):
        counts = torch.zeros(classes, dtype=torch.int64, device=device)
        with torch.inference_mode():
            for _ in range(k):
                copies = image.repeat(batch, 1, 1, 1).contiguous(memory_format=form)
                noisy = copies + torch.randn_like(copies) * 0.25
                counts += torch.bincount(net(noisy).argmax(dim=1), minlength=classes)
        return counts.tolist()  # waits

    return work


def measure(model_config, tile, seconds):
    """FLOPs of a sample and samples/s by name of the loop, all in turns; and a note where PyTorch is missing."""
    split, works, flops, note = model_config.split, {}, {}, ""
    blocks = {"widths": tuple(model_config.widths)[split:], "strides": tuple(model_config.strides)[split:]}
    variants = {
        "LSRS here, noise on the latent": {},
        "ISRS here, noise on the image": {"noise": "input"},
        "ISRS here, the head alone on the image": {"encoder": "identity", "split": 0, **blocks},
    }
    for name, changes in variants.items():
        variant = model_config.copy_and_resolve_references()
        variant.update(changes)
        model = models.build(variant, IMAGE, CLASSES)
        encoder, function = model.for_certification(model.init(domain_key(0, "init")))
        shape = encoder.report.output_shape
        works[name] = measuring.sampling(measuring.make_sampler(function, shape, tile)), np.prod(tile)
        flops[name] = measuring.row_flops(function, shape)
    try:
        torch, device = measuring.load_torch()
        whole = models.build(model_config, IMAGE, CLASSES)
        for batch in BATCHES:
            for channels_last in (False, True):
                name = (
                    f"PyTorch {torch.__version__}, batch {batch}, {'channels last' if channels_last else 'contiguous'}"
                )
                net = network(torch, whole)
                works[name] = sampling(torch, device, net, IMAGE, CLASSES, batch, channels_last), batch
                flops[name] = flops["ISRS here, noise on the image"]
    except UserError as error:
        note = str(error)
    rates = measuring.rates({name: work for name, (work, _) in works.items()}, seconds, "loops")
    return flops, {name: rates[name] * samples for name, (_, samples) in works.items()}, note


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="configs/cifar10_small.py:deep", help="network that is compared")
    parser.add_argument("--tile", default="32,8", help="images,samples of a batch of our loop")
    parser.add_argument("--seconds", type=float, default=1.0, help="per loop")
    options = parser.parse_args(arguments)
    config = config_from_flags([f"--config={options.config}"]).model
    flops, rates, note = measure(config, tuple(map(int, options.tile.split(","))), options.seconds)
    lsrs, isrs, *_ = rates
    classic = max((name for name in rates if f"batch {BATCHES[0]}," in name), key=rates.get, default=None)
    base = rates[classic or isrs]
    rows = [[name, f"{rate:,.0f}", f"{flops[name] / 1e6:.2f}", f"{rate / base:.2f}x"] for name, rate in rates.items()]
    print(table(f"loop|samples/s|MFLOP per sample|over {classic or isrs}", rows) + f"\n\n{note}".rstrip())
    rows = [["the split: LSRS over ISRS, both here", f"{rates[lsrs] / rates[isrs]:.2f}x"]]
    rows.append(["the same by FLOPs alone", f"{flops[isrs] / flops[lsrs]:.2f}x"])
    if classic:
        rows.append(["the implementation: ISRS here over PyTorch", f"{rates[isrs] / base:.2f}x"])
        rows.append(["both: LSRS here over PyTorch", f"{rates[lsrs] / base:.2f}x"])
    print("\n" + table("contribution|factor", rows))


if __name__ == "__main__":
    cli.execute(main)
