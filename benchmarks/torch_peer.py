"""The classic sampling loop in PyTorch, as published code runs it, on a network with the layers of one of ours.

One image at a time, a batch of copies of it, ``randn_like``, argmax, bincount (Cohen et al. 2019, locuslab/smoothing).
The network has the layers of a `lsrs_jax.models.Model` with their shapes, and random parameters; a plain zero-padded
``nn.Conv2d`` stands for an orthogonal convolution.
"""

import importlib
import os

import jax
import measure
import numpy as np

from lsrs_jax import layers, models
from lsrs_jax.models.heads import BlocksHead, ConvHead
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import domain_key

BATCH, SMALL_BATCH = 1000, 128  # the published one, and one that stays in the cache


def load():
    """The module torch with all cores, and the device that stands beside JAX's.

    Raises:
      UserError: where it is not installed, or does not reach the device.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise UserError(f"No rows of PyTorch ({error}): pip install torch") from error
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"No rows of PyTorch: {torch.__version__} does not reach the {jax.default_backend()}")
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    return torch, device


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


def flops(torch, net, shape):
    """FLOPs of convolutions and products for one image, by PyTorch's own count (padding counted as if it were data)."""
    counter = importlib.import_module("torch.utils.flop_counter").FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        net(torch.zeros(1, shape[2], *shape[:2]))
    return counter.get_total_flops()


class Peer:
    """The split network of a config under the classic loop of PyTorch and under ours, all loops in turns.

    Attributes:
      flops: per sample, by the name of our loops: ``"LSRS"``, ``"ISRS"`` (the same network, noise on the image),
        ``"head"`` (the head alone, noise on the image).
      rates: samples per second, by that name, and by ``(batch, channels_last)`` of PyTorch.
      note: why PyTorch has none, or None.
    """

    def __init__(self, model_config, image, classes, options, batches):
        self._block, self.note = int(np.prod(options.tile)), None
        works, self.flops, layers_of = {}, {}, {}
        split = model_config.split
        blocks = {"widths": tuple(model_config.widths)[split:], "strides": tuple(model_config.strides)[split:]}
        alone = {"encoder": "identity", "split": 0, **blocks}
        for name, changes in (("LSRS", {}), ("ISRS", {"noise": "input"}), ("head", alone)):
            variant = model_config.copy_and_resolve_references()
            variant.update(changes)
            model = models.build(variant, image, classes)
            encoder, function = model.for_certification(model.init(domain_key(0, "init")))
            shape = encoder.report.output_shape
            loop = measure.make_sampler(function, shape, options.tile)
            works |= {name: measure.sampling(loop), ("noise", name): measure.drawing(loop)}
            self.flops[name] = measure.flops(function, shape)
            layers_of[name] = measure.layers(function, shape, batches)
            if name == "LSRS":
                whole = model
        self._layers, self._head_layers = layers_of["ISRS"], layers_of["LSRS"]
        works |= {"matmul": measure.matmul("float32")} | measure.layer_works(self._layers)
        works |= self._torch_works(whole, image, classes)
        rates = measure.rates(works, options.seconds, "the classic loop")
        self._measured = measure.Measured(self.flops["ISRS"], self._layers, rates, self._block)
        self.rates = {name: rates[name] * self._block for name in self.flops}
        self.rates |= {key: rates[key] * key[0] for key in self._torch}

    def _torch_works(self, model, image, classes):
        """``(batch, channels_last)`` → work; nothing, and a note, without PyTorch."""
        self._torch = []
        try:
            torch, device = load()
            nets = {last: network(torch, model) for last in (False, True)}
        except UserError as error:
            self.note = str(error)
            return {}
        self.torch_flops, self.version = flops(torch, nets[False], image), f"{torch.__version__}, {device}"
        self._torch = [(batch, last) for batch in (BATCH, SMALL_BATCH) for last in (False, True)]
        return {key: sampling(torch, device, nets[key[1]], image, classes, *key) for key in self._torch}

    def classic(self, batch=BATCH):
        """The faster memory format of a batch, and its samples per second; None without PyTorch."""
        forms = {False: "contiguous", True: "channels_last"}
        rates = {forms[last]: self.rates[size, last] for size, last in self._torch if size == batch}
        return max(rates.items(), key=lambda item: item[1]) if rates else None

    def predictions(self):
        """How much faster the split should be, by name of the reckoning."""
        whole, head = self.flops["ISRS"], self.flops["LSRS"]
        measured, ceiling = self._measured, self._measured.ceiling
        noise = [1 / (measured.rates["noise", name] * self._block) for name in ("ISRS", "LSRS")]
        seconds = [
            sum(layer.count * layer.flops / measured.best(layer) for layer in some)
            for some in (self._layers, self._head_layers)
        ]
        return {
            "FLOPs alone": whole / head,
            "FLOPs at the matmul ceiling, and noise": (whole / ceiling + noise[0]) / (head / ceiling + noise[1]),
            "layers at their best rates, and noise": (seconds[0] + noise[0]) / (seconds[1] + noise[1]),
        }
