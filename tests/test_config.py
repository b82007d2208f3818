import importlib.util
import json
import re

import pytest

from lsrs_jax import models
from lsrs_jax.config import check_config, config_from_dict, config_to_dict, default, load_config, save_config
from lsrs_jax.flags import config_from_flags
from lsrs_jax.runtime.documents import first_difference
from lsrs_jax.runtime.errors import UserError
from support import ROOT


def test_configs_survive_json(tmp_path):
    config = default()
    config.sigma, config.model.std = 0.25, (0.2, 0.3, 0.4)
    path = tmp_path / "config.json"
    save_config(config, path)
    assert config_to_dict(load_config(path)) == config_to_dict(config)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_experiment_is_a_valid_config(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    named = {
        "cifar10": (
            "lsrs",
            "isrs_split",
            "free",
            "isometric",
            "gaussian",
            "macer",
            "smoothadv",
            "haar_resnet",
            "margin",
            "partial",
            "latent",
        ),
        "cifar10_small": ("lsrs", "isrs_split", "free", "isometric", "isrs_light", "cayley", "deep"),
        "cifar10_mlp": ("learned", "lowpass", "bands", "haar", "identity"),
        "cifar10_orthogonal": ("adaptive", "paraunitary", "exponential", "cayley"),
        "imagenet": ("lsrs", "isrs_split", "isrs", "smoke", "smoke_isrs"),
        "digits": ("lsrs", "cayley", "isrs", "isrs_split", "margin_attacked"),
        "cifar10_study": ("split0", "split6", "split4_input", "split4_haar", "margin"),
    }
    variants = named.get(path.stem, ("lsrs", "cayley", "isrs", "isrs_split"))
    seen = {str(config_to_dict(check_config(module.get_config(variant)))) for variant in variants}
    assert len(seen) == len(variants)
    for variant in variants:
        assert re.search(rf"(^|[ `]){re.sub('[1-6]', '<k>', variant)}[ ,`\n]", module.__doc__, re.MULTILINE), variant
        config = module.get_config(variant)
        image = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "imagenet2012": (224, 224, 3)}.get(
            config.data.name, (32, 32, 3)
        )
        assert models.build(config.model, image, 10).input_shape == image
    with pytest.raises(ValueError, match="unknown variant"):
        module.get_config("lrss")


def test_variants_of_the_comparison_of_families_change_what_they_say():
    spec = importlib.util.spec_from_file_location("cifar10_orthogonal", ROOT / "configs" / "cifar10_orthogonal.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    base = config_to_dict(module.get_config("adaptive"))
    for change, field, value in (
        ("random", "initializer", "random"),
        ("zero", "padding", "zero"),
        ("householder", "activation", "householder"),
    ):
        changed = config_to_dict(module.get_config(f"adaptive_{change}"))
        assert changed["model"] == base["model"] | {field: value}
        assert changed["train"] == base["train"]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"sgima": 1.0}, "did you mean sigma"),
        ({"certify": {"alhpa": 0.1}}, "did you mean certify.alpha"),
        ({"certify": 3}, "certify is a section: set one of"),
        ({"sigma": "large"}, "wrong type"),
        ({"certify": {"n": 1.5}}, "wrong type"),
        ({"certify": {"tile": [8, 8.5]}}, "wrong type"),
        ({"certify": {"tile": ["a", 3]}}, "wrong type"),
        ({"certify": {"tile": [True, 4]}}, "wrong type"),
        ({"model": {"mean": ["a"]}}, "wrong type"),
        ({"seed": None}, "wrong type"),
        ({"seed": True}, "wrong type"),
        ({"model": {"mean": None}}, "wrong type"),
        ({"data": {"name": None}}, "wrong type"),
    ],
)
def test_foreign_values_are_refused(values, why):
    complete = config_to_dict(default())
    for key, value in values.items():
        complete[key] = complete[key] | value if isinstance(value, dict) else value
    with pytest.raises(UserError, match=why):
        config_from_dict(complete)


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--config.foo=1", "unknown config field 'foo'; a configuration has certify, data, model, seed, sigma, train"),
        ("--config.foo.bar=1", "unknown config field 'foo'; a configuration has"),
        (
            "--config.train.macer.foo=1",
            "'train.macer.foo'; train.macer has margin, sharpness, weight",
        ),
        ("--config.data.nam=x", "unknown config field 'data.nam'; did you mean data.name?"),
        ("--config.model.widths[0]=3", "did you mean model.widths?"),
        ("--config.train.batch_size=3", "unknown config field 'train.batch_size'; did you mean data.batch_size?"),
        ("--config.sigma.bar=1", "config field sigma is no section"),
        ("--config.train.macer=1", "config field train.macer is a section: set one of train.macer.margin, "),
    ],
)
def test_a_flag_that_names_no_field_is_told_which_there_are(flag, why):
    with pytest.raises(UserError) as error:
        config_from_flags([flag], default())
    assert why in str(error.value)


def test_a_missing_field_is_refused(tmp_path):
    for section, field in ((None, "sigma"), ("model", "encoder")):
        values = config_to_dict(default())
        del (values[section] if section else values)[field]
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        with pytest.raises(UserError, match=f"{field} is missing"):
            load_config(path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not a stored configuration"):
        load_config(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sigma", float("nan")),
        ("sigma", float("inf")),
        ("seed", -1),
        ("data.crop", -1),
        ("train.steps", 0),
        ("train.learning_rate", float("nan")),
        ("train.warmup_steps", 1000),
        ("certify.n0", 0),
        ("certify.certificate", "exact"),
        ("train.loss", "hinge"),
        ("train.radius", -0.1),
        ("train.temperature", 0.0),
        ("train.noises", 0),
        ("train.late_noises", -1),
        ("train.sigma_start", 0.0),
        ("train.sigma_steps", -1),
        ("train.smoothadv.warmup_steps", -1),
        ("train.consistency.weight", -1.0),
        ("train.macer.margin", 0.0),
        ("train.smoothadv.steps", 0),
        ("train.ema", 1.0),
        ("train.head_dtype", "float16"),
        ("certify.alpha", float("nan")),
        ("certify.stop", -1),
        ("certify.tile", (1, 1)),
        ("data.name", ""),
        ("data.name", "../x"),
        ("certify.step", 0),
        ("certify.tile", (4,)),
        ("certify.name", "a/b"),
        ("certify.name", ".hidden"),
        ("certify.spmd", "xmap"),
    ],
)
def test_values_out_of_range_name_their_field(field, value):
    config = default()
    *sections, last = field.split(".")
    place = config
    for section in sections:
        place = place[section]
    place[last] = value
    with pytest.raises(UserError, match=field):
        check_config(config)


def test_consistency_needs_two_samples():
    config = default()
    config.train.loss = "consistency"
    with pytest.raises(UserError, match=r"train.noises must be at least 1, with consistency at least 2, got 1"):
        check_config(config)
    config.train.noises = 2
    check_config(config)


def test_first_difference():
    old = {"a": 1, "b": {"c": 2, "d": 3}}
    assert first_difference(old, old) is None
    assert first_difference(old, {"a": 1, "b": {"c": 2, "d": 4}}) == ("b.d", 3, 4)
    assert first_difference(old, {"a": 1, "b": {"c": 2}}) == ("b.d", 3, None)
    assert first_difference(old, {"a": 9, "b": {"c": 2, "d": 4}}, ("a", "b.d")) is None
    assert first_difference(old, {"a": 1}, ("b",)) is None
