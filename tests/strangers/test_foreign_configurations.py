"""Configurations and flags from strangers are valid, or give an error of one line."""

import json
import math

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from lsrs_jax.config import check_config, config_from_dict, config_to_dict, default
from lsrs_jax.flags import config_from_flags
from support.hostile import JSON, NOT_NUMBERS, NOT_WHOLE, STRANGE, answer, changed, examples, json_text, places
from support.samples import CONFIG, FIELDS, load


@examples(300)
@given(
    st.sampled_from(list(places(CONFIG))),
    st.sampled_from([*STRANGE, {"a.b": 1}, [10**400], [math.nan], [True]]) | JSON,
)
@example(("sigma",), 10**400)
@example(("certify", "radii"), [10**400])
@example(("certify", "alpha"), {"a.b": 1})
def test_a_changed_configuration_is_valid_or_one_line(folder, where, new):
    config = load(folder / "config.json", json_text(changed(CONFIG, where, new)).encode())
    if config is not None:
        assert np.isfinite(
            [config.sigma, config.certify.alpha, config.train.learning_rate, *config.certify.radii]
        ).all()
        assert type(config.certify.n) is type(config.seed) is int


@examples(150)
@given(st.binary(max_size=50) | JSON.map(lambda value: json_text(value).encode()))
@example(b"[" * 100_000)
@example(b"1" * 5000)
def test_any_other_text_is_no_configuration(folder, text):
    assert load(folder / "config.json", text) is None


def test_a_field_beside_the_known_ones_is_refused(folder):
    for value in (CONFIG | {"a\nb": 1}, CONFIG | {"certify": CONFIG["certify"] | {"__class__": {}, "": 1}}):
        assert load(folder / "config.json", json.dumps(value).encode()) is None


FLAG_VALUES = [
    *(text for text in NOT_NUMBERS if "\0" not in text),
    *NOT_WHOLE,
    "0.25",
    "(0.25, 0.5)",
    "(2, 16)",
    "(1j, 2)",
    "(b'a', 3)",
    "({1}, 3)",
    "(..., 3)",
    "({}, 3)",
    "(None,)",
    "('a\nb', 3)",
    "(1e999,)",
    f"({'9' * 400}, 2)",
    f"(0x{'f' * 5000}, 2)",
    f"0x{'f' * 5000}",
    "(" * 500,
    "-" * 5000 + "1",
    "{'a': 1}",
    "{}",
    "\x1b[2J",
    "\udcff",
]


@examples(400)
@given(
    st.sampled_from(FIELDS) | st.text(max_size=8),
    st.sampled_from(FLAG_VALUES) | st.text(max_size=8),
    st.sampled_from(["--config.{}={}", "--config.{} {}", "--config.{}", "--config{}={}", "-config.{}={}"]),
)
def test_any_flag_gives_a_valid_configuration_or_one_line(field, value, form):
    arguments = form.format(field, value).split(" ", 1)
    config = answer(config_from_flags, arguments, default())
    if config is not None:
        assert check_config(config_from_dict(config_to_dict(config)))
        assert 2.0**-60 <= config.sigma <= 2.0**60


@examples(100)
@given(
    st.lists(
        st.text(max_size=8) | st.sampled_from(["--config", "--config=", "--", "--config=x:y", "--help"]), max_size=3
    )
)
@example(["--config=" + "a" * 5000])
@example(["--config=a\0b"])
def test_any_arguments_without_a_configuration_file_are_one_line(arguments):
    assert answer(config_from_flags, arguments) is None
