"""PyTorch networks as heads by configuration, and their fine-tuning under noise."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import lsrs_jax  # noqa: E402
from lsrs_jax import models  # noqa: E402
from lsrs_jax.certification.table import read_table  # noqa: E402
from lsrs_jax.config import default  # noqa: E402
from lsrs_jax.data import load_split  # noqa: E402
from lsrs_jax.models import custom, torch_head  # noqa: E402
from lsrs_jax.pytorch.architectures import CifarResNet, Normalize  # noqa: E402
from lsrs_jax.runtime.errors import NotHere, UserError  # noqa: E402
from lsrs_jax.training import checkpoint, steps  # noqa: E402
from support import threefry  # noqa: E402
from support.commands import ended, refused, run  # noqa: E402

CODE = '''
import torch
from torch import nn


def small(num_classes, latent_shape, width=8):
    channels, side = latent_shape[2], latent_shape[0] // 2
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Flatten(), nn.Linear(2 * width * side**2, num_classes),
    )


class Indexed(nn.Module):
    """A network with buffers of whole numbers and truth values."""

    def __init__(self, num_classes):
        super().__init__()
        self.last = nn.Linear(5, num_classes)
        self.register_buffer("index", torch.tensor([3, 60, 7, 0, 7]))
        self.register_buffer("large", torch.tensor(2**31 - 1))
        self.register_buffer("kept", torch.tensor([True, False, True, True, True]))

    def forward(self, x):
        x = x.flatten(1)[:, self.index]
        return self.last(torch.where(self.kept, x, -x)) + (self.large - (2**31 - 3))


class RandomFeatures(nn.Module):
    """A network with so many numbers in buffers that some averages of equal numbers are rounded."""

    def __init__(self, num_classes):
        super().__init__()
        self.register_buffer("matrix", torch.randn(64, 300))
        self.norm, self.last = nn.BatchNorm1d(300), nn.Linear(300, num_classes)

    def forward(self, x):
        return self.last(torch.relu(self.norm(x.flatten(1) @ self.matrix)))


def failing():
    raise RuntimeError("no weights today")


def two():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


def nothing():
    return 7
'''
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(CODE)
    return path


def built(code, function="small", shape=SHAPE, **fields):
    config = default()
    config.model.update({"encoder": "identity", "head": f"torch:{code}:{function}"} | fields)
    with custom.typed_code(config):
        return models.build(config.model, shape, 10)


def module_of(head):
    torch.manual_seed(1)
    return head.make().eval()


def logits(head, parameters, x):
    return np.asarray(jax.jit(lambda p, x: head.apply({"params": p}, x))(parameters, x))


def expected(module, x):
    with torch.inference_mode():
        return module(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()


@pytest.fixture(scope="module")
def model(code):
    return built(code)


@pytest.fixture(scope="module")
def clean(code, model):
    """A checkpoint file of a network that was trained on the digits without noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = default().data
    sets = [load_split(data, split) for split in ("train", "test")]
    x, labels, x_test, labels_test = (
        torch.from_numpy(np.array(part)) for images in sets for part in images.read(np.arange(len(images)), np.float32)
    )
    x, labels, network = x.permute(0, 3, 1, 2), labels.long(), module_of(model.head).train()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(5):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.inference_mode():
        found = network.eval()(x_test.permute(0, 3, 1, 2)).argmax(1)
    assert (found == labels_test).float().mean() > 0.9
    path = code.with_name("clean.pt")
    torch.save({"state_dict": network.state_dict()}, path)
    torch.set_num_threads(threads)
    return path


def train(code, workdir, *flags, start=None):
    given = [] if start is None else [f"--config.train.start_from=torch:{start}"]
    fixed = ["--config=digits", "--config.sigma=0.75", "--config.model.encoder=identity"]
    return [*fixed, f"--config.model.head=torch:{code}:small", *given, *flags, f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def tuned(code, clean, tmp_path_factory):
    """The workdir of a fine-tuning with its certificates, and what certify has printed."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    out = run("train", *train(code, workdir, "--config.train.steps=400", start=clean))
    assert f"starting with the parameters of torch:{clean}" in out
    return workdir, certify(workdir, code)


def certify(workdir, code):
    return run("certify", f"--workdir={workdir}", "--config.certify.n=1000", f"--allow-code={code}:small")


def accuracy(workdir):
    """The certified accuracy at r = 0.25."""
    table = read_table(workdir / "certify" / "default" / "certificates.tsv")
    return np.mean((table.predict == table.label) & (table.radius >= 0.25))


def test_fine_tuning_under_noise_raises_the_certified_accuracy(code, clean, tuned, tmp_path):
    still = ["--config.train.steps=1", "--config.train.learning_rate=1e-12"]
    run("train", *train(code, tmp_path / "before", *still, start=clean))
    said = certify(tmp_path / "before", code)
    assert "without noise" in said
    assert "the noise ruins this classifier" in said
    assert "torch:FILE" in said
    workdir, said = tuned
    assert "the noise ruins" not in said
    assert accuracy(workdir) > accuracy(tmp_path / "before") + 0.06


def test_other_commands_and_load_take_the_head(code, tuned, clean, tmp_path):
    names, workdir = [f"torch:{code}:small"], tuned[0]  # the name as the configuration has it
    run("certify", f"--workdir={workdir}", "--recast=2", f"--allow-code={names[0]}")
    classifier = lsrs_jax.load(workdir, allow_code=names)
    run("export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--n=64", f"--allow-code={names[0]}")
    again = lsrs_jax.load(tmp_path / "out", allow_code=names)
    x, key = np.random.default_rng(0).random((2, *SHAPE)), threefry(0)
    assert np.array_equal(again.soft_logits(x, key, 8), classifier.soft_logits(x, key, 8))


def test_a_training_resumes_with_the_same_parameters_and_buffers_stay(code, clean, model, tmp_path):
    flags = ["--config.train.steps=30", "--config.train.checkpoint_every=10", "--config.train.keep_checkpoints=3"]
    flags += ["--config.train.ema=0.9", "--config.train.weight_decay=0.1"]
    file, workdir = tmp_path / "start.pt", tmp_path / "run"
    shutil.copy(clean, file)
    command = train(code, workdir, *flags, start=file)
    run("train", *command)
    whole, first = (checkpoint.restore(workdir, model, step)[0] for step in (30, 10))
    for step in (20, 30):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    file.unlink()  # a resumed training does not read it
    assert "resuming after step 10" in run("train", *command)
    resumed = checkpoint.restore(workdir, model)[0]
    assert checkpoint.digest(resumed) == checkpoint.digest(whole) != checkpoint.digest(first)
    given = torch_head.read_parameters(model.head, clean)["torch"]
    stored = resumed["head"]["torch"]
    assert {name for name in given["buffers"] if "running" in name}
    jax.tree.map(np.testing.assert_array_equal, stored["buffers"], given["buffers"])
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), stored["parameters"], given["parameters"])
    assert all(changed.values())
    forged = jax.tree.map(np.array, resumed)
    forged["head"]["torch"]["buffers"]["1.1.running_var"][0] += 1e-3
    assert checkpoint.digest(forged) != checkpoint.digest(resumed)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_no_step_changes_a_buffer(code, optimizer):
    model, config = built(code, "RandomFeatures"), default()
    config.train.update({"optimizer": optimizer, "weight_decay": 0.1, "ema": 0.3, "schedule": "constant"})
    params = model.init(threefry(0))
    rng = np.random.default_rng(0)
    own = params["head"]["torch"]
    own["buffers"] = {name: leaf + 0.1 * rng.random(leaf.shape, np.float32) for name, leaf in own["buffers"].items()}
    before = jax.tree.map(np.array, params)  # copies: a step donates its state
    transformation = steps.make_optimizer(config.train)
    step = steps.step_function(steps.make_step(model, config, transformation.update))
    state = steps.State(params, transformation.init(params), jax.tree.map(jnp.array, params))
    images, labels = rng.random((16, *SHAPE), np.float32), np.arange(16) % 10
    for number in range(12):
        state, _ = step(state, images, labels, threefry(1), np.uint32(number))
    for params in (state.params, state.average):
        found, old = jax.device_get(params)["head"]["torch"], before["head"]["torch"]
        assert checkpoint.digest(found["buffers"]) == checkpoint.digest(old["buffers"])
        kept = [name for name, leaf in old["parameters"].items() if np.array_equal(leaf, found["parameters"][name])]
        assert not kept
    moments = jax.tree_util.tree_leaves_with_path(state.optimizer)
    of_buffers = [leaf for path, leaf in moments if "['buffers']" in jax.tree_util.keystr(path)]
    assert len(of_buffers) == len(own["buffers"]) * (2 if optimizer == "adam" else 1)
    assert not any(np.any(leaf) for leaf in of_buffers)


def test_weight_decay_touches_kernels_and_no_scale(model):
    settings = default().train
    settings.weight_decay, settings.schedule, settings.learning_rate = 0.1, "constant", 0.5
    transformation, params = steps.make_optimizer(settings), model.init(threefry(0))
    updates, _ = transformation.update(jax.tree.map(np.zeros_like, params), transformation.init(params), params)
    moved = {jax.tree_util.keystr(p[-1:]) for p, u in jax.tree_util.tree_leaves_with_path(updates) if np.any(u)}
    assert moved == {"['1.0.weight']", "['1.3.weight']", "['1.7.weight']"}


def test_new_parameters_are_those_that_torch_draws(model):
    one, same, other = (model.init(threefry(seed))["head"]["torch"] for seed in (3, 3, 4))
    assert checkpoint.digest(one) == checkpoint.digest(same) != checkpoint.digest(other)
    kernel, scale = one["parameters"]["1.3.weight"], one["parameters"]["1.1.weight"]
    assert np.abs(kernel).max() <= 1 / np.sqrt(8 * 9) < 1.01 * np.abs(kernel).max()
    assert np.all(scale == 1)
    assert np.all(one["buffers"]["0.mean"] == 0)
    assert np.all(one["buffers"]["0.std"] == 1)
    state = torch.get_rng_state()
    model.init(threefry(5))
    assert torch.equal(torch.get_rng_state(), state)


def test_whole_numbers_in_buffers_stay_what_they_are(code, tmp_path):
    head = built(code, "Indexed").head
    network = module_of(head)
    network.index[0] = -5
    network.large -= 1
    torch.save(network.state_dict(), tmp_path / "file.pt")
    parameters = torch_head.read_parameters(head, tmp_path / "file.pt")
    x = np.random.default_rng(0).standard_normal((4, *SHAPE), np.float32)
    np.testing.assert_allclose(logits(head, parameters, x), expected(network, x), atol=1e-5)
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parameters)  # as --recast does, to see roundings
    np.testing.assert_allclose(logits(head, halved, x), expected(network, x), atol=0.1)
    gradient = jax.grad(lambda p: head.apply({"params": p}, x).sum())(parameters)["torch"]
    assert np.any(gradient["parameters"]["1.last.weight"])
    assert not any(map(np.any, gradient["buffers"].values()))


@pytest.fixture(scope="module")
def resnet():
    config = default().model
    config.encoder, config.head = "identity", "torch:cifar_resnet20"
    return models.build(config, (32, 32, 3), 10).head


def test_a_file_in_the_layout_of_the_field_starts_an_architecture(resnet, tmp_path):
    torch.manual_seed(2)
    network, mean, std = CifarResNet(20).eval(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    named = {f"1.module.{name}": tensor for name, tensor in network.state_dict().items()}
    named |= {"0.mean": torch.tensor(mean), "0.std": torch.tensor(std)}
    torch.save({"arch": "cifar_resnet20", "state_dict": named}, tmp_path / "file.pth.tar")
    parameters = torch_head.read_parameters(resnet, tmp_path / "file.pth.tar")
    np.testing.assert_array_equal(parameters["torch"]["buffers"]["0.mean"].ravel(), np.float32(mean))
    x = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    wanted = expected(nn.Sequential(Normalize(mean, std), network), x)
    np.testing.assert_allclose(logits(resnet, parameters, x), wanted, atol=1e-4 * np.abs(wanted).max())
    others = (7, "cifar_resnet20", "fc.weight has the shape"), (10, "cifar_resnet110", "holds a cifar_resnet110")
    for classes, name, message in others:
        torch.save({"arch": name, "state_dict": CifarResNet(20, classes).state_dict()}, tmp_path / "other.pt")
        with pytest.raises(UserError, match=message):
            torch_head.read_parameters(resnet, tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("head", "shape", "message"),
    [
        ("torch:cifar_resnet20", (8, 8, 1), "takes images of 32x32 pixels with 3 channels, the latent is 8x8x1"),
        ("torch:resnet50", (64, 64, 1), "with 3 channels"),
        ("torch:cifar_dncnn", (32, 32, 3), "is no network: give torch:cifar_resnet110"),
        ("torch:", (32, 32, 3), "is no network"),
    ],
)
def test_architectures_that_do_not_fit_are_refused(head, shape, message):
    config = default().model
    config.encoder, config.head = "identity", head
    with pytest.raises(UserError, match=message):
        models.build(config, shape, 10)


@pytest.mark.parametrize(
    ("function", "shape", "message"),
    [
        ("failing", SHAPE, "no weights today"),
        ("nothing", SHAPE, "must make a torch.nn.Module"),
        ("two", SHAPE, "returns 2 logits, the data has 10 classes"),
        ("two", (9, 9, 1), "fails for a latent of shape"),
        ("missing", SHAPE, "has no 'missing'"),
    ],
)
def test_code_that_cannot_be_a_head_gives_one_line(code, function, shape, message):
    with pytest.raises(UserError, match=message) as error:
        built(code, function, shape)
    assert "\n" not in str(error.value)


def test_a_pytorch_network_is_no_encoder_and_no_head_of_flax(code):
    with pytest.raises(UserError, match="can be a head only"):
        built(code, encoder=f"torch:{code}:small")
    with pytest.raises(UserError, match=f"a head of PyTorch is torch:{code}:two"):
        built(code, head=f"{code}:two")


def test_files_that_do_not_fit_are_refused(code, clean, tmp_path):
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"state_dict": nn.Linear(64, 10).state_dict()}, tmp_path / "other.pt")
    found = {"none": "cannot be read", "text": "is no checkpoint", "other": "does not have the names"}
    for name, message in found.items():
        line = refused("train", *train(code, tmp_path / "run", start=tmp_path / f"{name}.pt"))
        assert f"{tmp_path / name}.pt" in line
        assert message in line
    assert "shapes" in refused(
        "train", *train(code, tmp_path / "run", '--config.model.head_args={"width": 4}', start=clean)
    )
    other = ["--config=digits", f"--config.train.start_from=torch:{clean}", f"--workdir={tmp_path / 'run'}"]
    assert "model.head=mlp is none" in refused("train", *other)
    for field in ("train.head_dtype", "certify.head_dtype"):
        flag = f"--config.{field}=bfloat16"
        assert f"{field} must be float32" in refused("train", *train(code, tmp_path / "run", flag, start=clean))
    assert not (tmp_path / "run" / "config.json").exists()


def test_code_of_a_folder_is_not_imported(tuned, code, tmp_path, monkeypatch):
    tuned, _ = tuned
    monkeypatch.setattr(custom, "resolve", lambda name: pytest.fail(name))
    for command in (["certify"], ["certify", "--recast=2"], ["audit"], ["export", f"--out={tmp_path / 'out'}"]):
        exit_code, _, err = ended(command[0], f"--workdir={tuned}", *command[1:])
        assert exit_code == 2
        assert f"--allow-code={code}:small" in err
    with pytest.raises(UserError, match="--allow-code="):
        lsrs_jax.load(tuned)


def test_without_torch_one_line_names_the_extra(code, clean, tuned, tmp_path, monkeypatch):
    tuned, _ = tuned
    monkeypatch.setitem(sys.modules, "torch", None)
    line = "needs the extra torch of lsrs_jax: pip install torch"
    assert line in refused("train", *train(code, tmp_path / "run", start=clean))
    assert line in refused("certify", f"--workdir={tuned}", f"--allow-code={code}:small")
    config = default().model
    config.encoder, config.head = "identity", "torch:cifar_resnet20"
    with pytest.raises(NotHere, match=line):
        models.build(config, (32, 32, 3), 10)


def test_verify_without_torch_checks_what_needs_no_network(tuned, monkeypatch):
    """As with the head torch:cifar_resnet20, which is no code of the user."""

    def build(*_):
        raise NotHere("model.head=torch:cifar_resnet20 needs the extra torch")

    monkeypatch.setattr("lsrs_jax.certification.verify.code_of", lambda _: [])
    monkeypatch.setattr(models, "build", build)
    exit_code, out, _ = ended("certify", f"--workdir={tuned[0]}", "--verify", "--json")
    assert exit_code == 3
    assert any("needs the extra torch" in line for line in json.loads(out)["unchecked"])
