"""`certify_torch`: checkpoint files of PyTorch as certified classifiers, and what the command refuses."""

import contextlib
import io
import json
import os
import pickle
import signal
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

import verify_certificates  # noqa: E402
from lsrs_jax import SmoothedClassifier, data, from_torch  # noqa: E402
from lsrs_jax.certification import ledger  # noqa: E402
from lsrs_jax.certification.table import read_table  # noqa: E402
from support import threefry  # noqa: E402
from support.commands import ended, fingerprint, refused, run, without_time  # noqa: E402
from test_schemas import validator  # noqa: E402

CODE = """
from torch import nn


def net(channels=1, classes=10):
    layers = [nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, classes)]
    return nn.Sequential(*layers)


def seven():
    return net(classes=7)


def colour():
    return net(3, 2)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.noise = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return x - self.noise(x)


def failing():
    raise RuntimeError("no such luck")
"""
MEAN, STD, SIGMA = 0.3, 0.4, 0.25
SAMPLING = ["--n=3000", "--step=12"]


class Standardised(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network((x - MEAN) / STD)


def prefixed(network):
    """The names of a network in DataParallel, behind a normalisation layer."""
    weights = {f"1.module.{name}": tensor for name, tensor in network.state_dict().items()}
    return {"0.mean": torch.tensor([MEAN]), "0.std": torch.tensor([STD])} | weights


def save(path, state, arch="of_my_own"):
    torch.save({"epoch": 3, "arch": arch, "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def code():
    names = {}
    exec(CODE, names)
    return names


@pytest.fixture(scope="module")
def trained_net(code):
    """A small network, trained under noise, in eval mode."""
    torch.manual_seed(0)
    digits, network = data.load("digits", "train"), code["net"]()
    pixels, labels = digits.read(np.arange(len(digits)), np.float32)
    x, y = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype(np.int64))
    model, optimizer = Standardised(network), torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(150):
        some = torch.randint(0, len(x), (128,))
        loss = nn.functional.cross_entropy(model(x[some] + SIGMA * torch.randn(128, 1, 8, 8)), y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def home(folder, trained_net):
    (folder / "nets.py").write_text(CODE)
    save(folder / "net.pth.tar", prefixed(trained_net))
    return folder


def arguments(home, out, *others, file="net.pth.tar", arch="net", sigma=SIGMA, name="digits"):
    code = [] if arch is None else [f"--arch={home}/nets.py:{arch}" if arch.isidentifier() else f"--arch={arch}"]
    named = [f"--checkpoint={home / file}", f"--sigma={sigma}", f"--data.name={name}", f"--out={out}"]
    return ["certify_torch", *named, *code, *others]


@pytest.fixture(scope="module")
def done(home):
    out = home / "done"
    return out, run(*arguments(home, out, *SAMPLING))


def table_of(out, name="default"):
    return out / "certify" / name / "certificates.tsv"


def in_memory(network, out, step):
    """Certificates of a module of torch for the same images and the same noise, without files."""
    test = data.load("digits", "test")
    images, labels = test.read(np.arange(0, len(test), step), np.float64)
    head = from_torch(network.eval(), images.transpose(0, 3, 1, 2)[:2].astype(np.float32), layout="NHWC")
    seed = json.loads((out / "certify" / "default" / "certificates.json").read_text())["identity"]["seed"]
    settings = {"key": threefry(seed), "n": 3000, "schedule": "staged"}
    return SmoothedClassifier(head, sigma=SIGMA).certify(images, labels, **settings)


def same_certificates(out, expected):
    found = read_table(table_of(out))
    np.testing.assert_array_equal(found.predict, expected.predict)
    np.testing.assert_allclose(found.radius, expected.radius, rtol=1e-11, atol=0)
    np.testing.assert_array_equal(found.label, expected.labels)


def test_a_published_file_is_certified_as_the_network_behind_its_normalisation(done, trained_net):
    out, printed = done
    expected = in_memory(Standardised(trained_net), out, 12)
    same_certificates(out, expected)
    assert expected.accuracy() > 0.7
    assert read_table(table_of(out)).idx.tolist() == list(range(0, 360, 12))
    assert "under noise of sigma 0.25" in printed
    assert "30 inputs, sigma 0.25" in printed
    assert f"accuracy    {expected.accuracy():.3f}" in printed


def test_every_reader_reads_the_folder_and_its_data_are_named(done, home, tmp_path):
    out, _ = done
    code, verdict, _ = ended("certify", f"--workdir={out}", "--verify", "--json")
    found = json.loads(verdict)
    assert (code, found["verdict"], found["certificates"], found["split"]) == (0, "intact", 30, 360)
    assert "PyTorch checkpoint" in str(found["beyond"])
    assert "trained with" not in run("certify", f"--workdir={out}", "--verify")
    stored = json.loads((table_of(out).parent / "certificates.json").read_text())
    test = data.load("digits", "test")
    named = {name: stored["identity"]["data"][name] for name in ("name", "version", "split", "digest")}
    assert named == {"name": "digits", "version": test.version, "split": "test", "digest": test.digest()}
    assert (stored["config"]["data"]["name"], stored["identity"]["images"]) == ("digits", 360)
    assert stored["record"][0]["source"].startswith(f"net.pth.tar ({home}/nets.py:net), sha256 ")
    validator("certificates").validate(stored)
    with contextlib.redirect_stdout(io.StringIO()) as report:
        assert verify_certificates.main([str(table_of(out).parent)]) in (None, 0)
    assert "30 certificates follow" in report.getvalue()
    assert "| mine |" in run("report", f"mine={out}", f"--out={tmp_path / 'report'}")
    assert "certify-torch continues it" in refused("certify", f"--workdir={out}")


def test_a_second_call_draws_nothing(done, home):
    out, printed = done
    before = fingerprint(out)
    again = run(*arguments(home, out, *SAMPLING))
    assert {name: fingerprint(out)[name] for name in before if "json" not in name} == {
        name: digest for name, digest in before.items() if "json" not in name
    }
    assert again.splitlines()[-4:] == printed.splitlines()[-4:]
    assert "samples/s" not in again


def test_a_resumed_certification_ends_with_the_same_table(home, tmp_path, monkeypatch):
    append, calls = ledger.Ledger.append, []

    def interrupted(self, rows):
        append(self, rows)
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)

    words = ["--n=3000", "--schedule=fixed", "--step=12"]
    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "append", interrupted)
        code, _, err = ended(*arguments(home, tmp_path / "halves", *words))
    assert (code, err.startswith("interrupted; ")) == (143, True)
    rows = (tmp_path / "halves" / "certify" / "default" / ledger.name(0)).read_bytes()
    for out in ("halves", "whole"):
        run(*arguments(home, tmp_path / out, *words))
    assert without_time(table_of(tmp_path / "halves")) == without_time(table_of(tmp_path / "whole"))
    whole = (tmp_path / "halves" / "certify" / "default" / ledger.name(0)).read_bytes()
    assert whole.startswith(rows)
    assert len(rows) < len(whole)


def test_images_are_chosen_by_their_index_in_the_split(home, done, tmp_path):
    run(*arguments(home, tmp_path, "--n=3000", "--start=12", "--stop=37", "--step=12"))
    first = without_time(table_of(tmp_path))
    assert read_table(table_of(tmp_path)).idx.tolist() == [12, 24, 36]
    whole = without_time(table_of(done[0]))
    assert first == [whole[0], *whole[2:5]]
    more = run(*arguments(home, tmp_path, "--n=3000", "--start=24", "--stop=50", "--step=12"))
    assert read_table(table_of(tmp_path)).idx.tolist() == [12, 24, 36, 48]
    assert without_time(table_of(tmp_path)) == [whole[0], *whole[2:6]]
    assert "3 inputs, sigma 0.25" in more


def test_a_denoiser_stands_in_front_of_the_classifier(home, code, trained_net, tmp_path):
    torch.manual_seed(1)
    denoiser = code["Denoiser"]()
    torch.save(denoiser.state_dict(), home / "denoiser.pt")
    both = [f"--denoiser={home / 'denoiser.pt'}", f"--denoiser-arch={home}/nets.py:Denoiser"]
    run(*arguments(home, tmp_path, *both, *SAMPLING))
    network = nn.Sequential(denoiser, Standardised(trained_net))
    expected = in_memory(network, tmp_path, 12)
    same_certificates(tmp_path, expected)
    alone = in_memory(Standardised(trained_net), tmp_path, 12)
    assert (alone.counts != expected.counts).any()
    wrong = [f"--denoiser={home / 'net.pth.tar'}", f"--denoiser-arch={home}/nets.py:net"]
    assert "holds no denoiser" in refused(*arguments(home, tmp_path / "wrong", *wrong))


def test_photos_are_cut_to_one_size(home, code, tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("dark", "light"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 100, (20 + number, 30, 3)) + 120 * (name == "light")
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / split / name / f"{number}.png")
    torch.manual_seed(2)
    save(home / "colour.pt", code["colour"]().state_dict())
    out, name = tmp_path / "out", f"folder:{tmp_path / 'photos'}"
    run(*arguments(home, out, "--data.size=8", "--n=500", file="colour.pt", arch="colour", name=name))
    stored = json.loads((table_of(out).parent / "certificates.json").read_text())
    assert stored["identity"]["data"]["digest"] == data.load(name, "test", size=8).digest()
    assert stored["identity"]["data"]["class_names"] == ["dark", "light"]
    assert read_table(table_of(out)).label.tolist() == [0, 0, 0, 1, 1, 1]
    code, _, err = ended("certify", f"--workdir={out}", "--verify")
    assert (code, err) == (0, "")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def malicious(home):
    """Files that would make a folder ``marker``, if anything in them were executed or imported."""
    marker = home / "marker"
    (home / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\ndef make(): pass\n")
    (home / "pickle.pt").write_bytes(pickle.dumps({"state_dict": {"w": Payload(marker)}}))
    torch.save({"arch": "net", "state_dict": {"w": Payload(marker)}}, home / "zip.pt")
    save(home / "code.pt", {"w": torch.zeros(1)}, f"{home}/evil.py:make")
    save(home / "module.pt", {"w": torch.zeros(1)}, "evil:make")
    return marker


@pytest.mark.parametrize("file", ["pickle.pt", "zip.pt", "code.pt", "module.pt"])
@pytest.mark.parametrize("option", ["checkpoint", "denoiser"])
def test_nothing_that_a_file_holds_or_names_is_executed(home, tmp_path, monkeypatch, file, option):
    marker = malicious(home)
    monkeypatch.syspath_prepend(str(home))
    if option == "checkpoint":
        words = arguments(home, tmp_path / "out", file=file, arch=None)
    else:
        words = arguments(home, tmp_path / "out", f"--denoiser={home / file}")
    line = refused(*words)
    assert "holds more than weights" in line or "choose one of cifar_resnet20" in line
    assert not marker.exists()
    assert not list(tmp_path.iterdir())


def test_the_malicious_pickle_acts_where_it_is_loaded(home):
    marker = malicious(home)
    pickle.loads((home / "pickle.pt").read_bytes())
    assert marker.exists()
    marker.rmdir()


def other_weights(home, network):
    changed = prefixed(network)
    changed["1.module.4.bias"] = changed["1.module.4.bias"] + 1e-6
    return save(home / "other.pt", changed).name


# Changes of the command of `done` -> what the line says.
REFUSALS = {
    "sigma": ({"sigma": 0.5}, [], "sigma was 0.25 and is now 0.5; use another --name"),
    "weights": ({"file": "other.pt"}, [], "the parameters of the classifier have changed"),
    "n": ({}, ["--n=4000"], "--n was 3000 and is now 4000"),
    "tile": ({}, ["--tile=16,8"], "tile was [32, 8] and is now [16, 8]"),
    "split": ({}, ["--data.split=train"], "split"),
    "classes": ({"file": "seven.pt", "arch": "seven"}, [], "seven.pt has 7 classes, and digits has 10"),
    "shape": (
        {"file": "colour.pt", "arch": "colour"},
        [],
        "does not take images of shape (8, 8, 1), as digits has them",
    ),
    "names": ({"arch": "seven", "file": "colour.pt"}, [], "does not have the shapes of this network"),
    "unknown": (
        {"arch": None},
        ["--arch=resnet7"],
        "unknown --arch 'resnet7': choose one of cifar_resnet20, cifar_resnet110",
    ),
    "unnamed": ({"arch": None}, [], "unknown --arch 'of_my_own': choose one of cifar_resnet20"),
    "failing": ({"arch": "failing"}, [], "nets.py:failing failed: no such luck"),
    "missing": ({"arch": "nothing"}, [], "has no 'nothing'"),
    "module": ({"arch": "json:dumps"}, [], "json:dumps failed"),
    "file": ({"file": "nowhere.pt"}, [], "nowhere.pt cannot be read"),
    "number": ({}, ["--n=many"], "--n=many: it must be a whole number"),
    "range": ({}, ["--alpha=2"], "--alpha must be strictly between 0 and 1, got 2.0"),
    "stop": ({}, ["--start=5", "--stop=3"], "--stop must be 0 or above --start=5, got 3"),
    "start": ({}, ["--start=360"], "no image to certify"),
    "data": ({"name": "../x"}, [], "--data.name must be the name of a data set"),
    "path": ({"name": "npz:x"}, ["--data.dir=y"], "leave --data.dir out"),
    "field": ({}, ["--config.certify.n=5"], "unrecognized arguments: --config.certify.n=5"),
    "bucket": ({}, ["--out=gs://bucket/x"], "must be a folder of this machine"),
    "normalize": ({}, ["--normalize=mnist"], "argument --normalize: invalid choice: 'mnist'"),
    "denoiser": ({}, ["--denoiser-arch=cifar_dncnn"], "--denoiser=FILE, which is missing"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_answered_in_one_line(done, home, trained_net, code, case):
    torch.manual_seed(3)
    other_weights(home, trained_net)
    save(home / "seven.pt", code["seven"]().state_dict())
    save(home / "colour.pt", code["colour"]().state_dict())
    before, (changes, words, message) = fingerprint(done[0]), REFUSALS[case]
    assert message in refused(*arguments(home, done[0], *SAMPLING, *words, **changes))
    assert fingerprint(done[0]) == before


def test_without_torch_one_line_names_the_extra(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    line = refused(*arguments(home, tmp_path / "out"))
    assert "certify-torch needs the extra torch of lsrs_jax: pip install torch" in line


@pytest.mark.parametrize("missing", ["--checkpoint", "--sigma", "--data.name", "--out"])
def test_what_is_required_is_named(home, tmp_path, missing):
    words = [word for word in arguments(home, tmp_path / "out") if not word.startswith(f"{missing}=")]
    assert f"the following arguments are required: {missing}" in refused(*words)
