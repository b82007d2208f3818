"""Compares the sampling loop with the classic loop in PyTorch, on a network with the same layers.

  python -m benchmarks.classic_loop [--config=configs/cifar10_small.py:deep --tile=32,8]

The classic loop takes one image at a time: a batch of copies, ``randn_like``, argmax, bincount (Cohen et al. 2019,
locuslab/smoothing), in `inference_mode`, contiguous and channels last, with and without `torch.compile`, and with four
batch sizes. It is also timed with the noise on the latent. The PyTorch network has the layers of the configured one
with their shapes and random parameters; a plain zero-padded ``nn.Conv2d`` takes the place of an orthogonal convolution.
All loops take turns; ratios are over PyTorch's best one. PyTorch needs idle cores: its threads wait for each other, and
one busy core slows it many times.
"""

import argparse
import fnmatch
import itertools

import numpy as np

from benchmarks import measuring
from lsrs_jax import cli, layers, models
from lsrs_jax.flags import config_from_flags
from lsrs_jax.models.heads import BlocksHead, ConvHead
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import domain_key
from studies.accelerator import table

IMAGE, CLASSES, BATCHES = (32, 32, 3), 10, (1000, 256, 128, 64)  # batches: as published, and smaller ones


LSRS, ISRS = "LSRS here, noise on the latent", "ISRS here, noise on the image"


def network(torch, model):
    """Encoder and head of a split model, normalisation included, as two `nn.Module` on arrays (B, C, H, W).

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
    encoder, chain, channels = nn.Sequential(*chain).eval(), [], shape[-1]
    for width, stride, unshuffled in _head_stages(model.head):
        if unshuffled > 1:
            chain.append(nn.PixelUnshuffle(unshuffled))
        chain += [_conv(nn, channels * unshuffled**2, width, (3, 3), (stride, stride)), nn.ReLU(inplace=True)]
        channels = width
    mean = _module(torch, lambda x: x.mean(dim=(2, 3)))
    return encoder, nn.Sequential(*chain, mean, nn.Linear(channels, model.head.num_classes)).eval()


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


def compiled(torch, net, shape):
    """A network of images (H, W, C) under `torch.compile`, or None with a line about why it does not work here."""
    try:
        found = torch.compile(net)
        with torch.inference_mode():
            found(torch.rand(2, shape[2], *shape[:2]).contiguous(memory_format=torch.channels_last))
    except Exception as error:  # a compiler is missing, or too old
        measuring.say(f"torch.compile does not work here: {str(error).splitlines()[0]}")
        return None
    return found


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


def classic(model):
    """PyTorch's loops for a split model: name → (our loop with noise at the same place, work, batch)."""
    torch, device = measuring.load_torch()
    encoder, head = network(torch, model)
    whole, found = torch.nn.Sequential(encoder, head), {}
    for place, module, shape in ((ISRS, whole, IMAGE), (LSRS, head, model.shapes()[1].shape[1:])):
        kinds = {"": module, ", torch.compile": compiled(torch, module, shape)}
        for (kind, each), batch, last in itertools.product(kinds.items(), BATCHES, (False, True)):
            if each is not None:
                name = f"PyTorch{place[9:]}, batch {batch}{', channels last' * last}{kind}"
                found[name] = place, sampling(torch, device, each, shape, CLASSES, batch, last), batch
    return found


def measure(model_config, tile, seconds):
    """FLOPs of a sample and samples/s by name of the loop, all in turns; and a note where PyTorch is missing."""
    split, works, flops, note = model_config.split, {}, {}, ""
    blocks = {"widths": tuple(model_config.widths)[split:], "strides": tuple(model_config.strides)[split:]}
    variants = {
        LSRS: {},
        ISRS: {"noise": "input"},
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
        for name, (place, *rest) in classic(models.build(model_config, IMAGE, CLASSES)).items():
            works[name], flops[name] = rest, flops[place]
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
    best = {
        place: max(fnmatch.filter(rates, f"PyTorch{place[9:]},*"), key=rates.get, default=place)
        for place in (ISRS, LSRS)
    }
    base = best[ISRS]
    rows = [
        [name, f"{rate:,.0f}", f"{flops[name] / 1e6:.2f}", f"{rate / rates[base]:.2f}x"] for name, rate in rates.items()
    ]
    print(table(f"loop|samples/s|MFLOP per sample|over {base}", rows) + f"\n\n{note}".rstrip())
    rows = [["the split: LSRS over ISRS, both here", f"{rates[LSRS] / rates[ISRS]:.2f}x"]]
    rows.append(["the same by FLOPs alone", f"{flops[ISRS] / flops[LSRS]:.2f}x"])
    if not note:
        rows.append(["the implementation: ISRS here over PyTorch's best", f"{rates[ISRS] / rates[base]:.2f}x"])
        rows.append(["the implementation: LSRS here over PyTorch's best", f"{rates[LSRS] / rates[best[LSRS]]:.2f}x"])
        rows.append(["both: LSRS here over PyTorch's best ISRS", f"{rates[LSRS] / rates[base]:.2f}x"])
    print("\n" + table("contribution|factor", rows))


if __name__ == "__main__":
    cli.execute(main)
