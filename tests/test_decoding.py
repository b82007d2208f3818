"""Image files become what a viewer shows, or are refused by name."""

import hashlib
import io
import warnings

import numpy as np
import PIL
import pytest
from PIL import Image, features

from lsrs_jax import data
from lsrs_jax.data import decode as decoding
from lsrs_jax.data.decode import decode, decoded_differently_before, is_grey
from lsrs_jax.runtime.errors import UserError
from support import prepared

RAMP = np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T.reshape(6, 8)], axis=2)


def saved(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shown(file, channels):
    return np.asarray(decode(file, channels))


def test_plain_files_are_unchanged():
    np.testing.assert_array_equal(shown(saved(Image.fromarray(RAMP)), 1), RAMP)
    np.testing.assert_array_equal(shown(saved(Image.fromarray(COLOURS)), 3), COLOURS)
    np.testing.assert_array_equal(shown(saved(Image.fromarray(RAMP)), 3), np.stack([RAMP] * 3, axis=2))
    assert not decoded_differently_before(saved(Image.fromarray(COLOURS)))


def test_a_palette_becomes_its_colours_not_its_indices():
    picture = Image.fromarray(COLOURS).quantize(16)
    expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(shown(saved(picture), 3), expected)
    assert np.abs(expected.astype(int) - COLOURS).mean() < 20
    assert not is_grey(saved(picture))


def test_one_bit_is_black_and_white():
    picture = Image.fromarray(RAMP > 99)
    np.testing.assert_array_equal(shown(saved(picture), 1), np.where(RAMP > 99, 255, 0))
    assert is_grey(saved(picture))


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 257, 1000, 32768, 65535]], np.uint16)
    file = saved(Image.fromarray(values))
    np.testing.assert_array_equal(shown(file, 1), np.round(values / 257))
    assert is_grey(file)
    assert decoded_differently_before(file)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_show_white_and_opaque_ones_their_colour(mode):
    picture = Image.fromarray(COLOURS).convert(mode)
    opaque = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(shown(saved(picture), 3), opaque)
    picture.putalpha(Image.fromarray(np.where(RAMP > 99, 255, 0).astype(np.uint8)))
    np.testing.assert_array_equal(shown(saved(picture), 3), np.where((RAMP > 99)[..., None], opaque, 255))


def test_a_transparent_colour_of_a_palette_shows_white():
    picture = Image.fromarray(COLOURS).quantize(16)
    found = shown(saved(picture, transparency=3), 3)
    inside = np.asarray(picture) == 3
    assert (found[inside] == 255).all()
    np.testing.assert_array_equal(found[~inside], np.asarray(picture.convert("RGB"))[~inside])


def test_cmyk_becomes_colours():
    picture = Image.fromarray(COLOURS).convert("CMYK")
    found = shown(saved(picture, "tiff"), 3)
    np.testing.assert_array_equal(found, np.asarray(picture.convert("RGB")))
    assert np.abs(found.astype(int) - COLOURS).max() <= 2


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_file_is_turned_as_its_exif_tag_says(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    picture = Image.fromarray(COLOURS)
    file, plain = saved(picture, kind, exif=exif), saved(picture, kind)
    np.testing.assert_array_equal(shown(file, 3), np.rot90(shown(plain, 3), -1))
    assert decoded_differently_before(file)
    assert not decoded_differently_before(plain)


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (saved(Image.fromarray(RAMP.astype(np.float32)), "tiff"), "mode F"),
        (saved(Image.fromarray(RAMP.astype(np.int32) * 100000), "tiff"), "mode I"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),  # would start Ghostscript
        (b"GIF89a but not really", "cannot identify"),
        (b"", "cannot identify"),
        (saved(Image.fromarray(COLOURS))[:60], "truncated|Truncated"),
    ],
)
def test_other_files_are_refused_with_a_reason(file, why):
    with pytest.raises(ValueError, match=why) as error:
        decode(file, 3)
    assert "0x" not in str(error.value)


def test_a_small_file_that_claims_many_pixels_is_not_decoded(monkeypatch):
    bomb = saved(Image.new("1", (16384, 8193)))
    assert len(bomb) < 40_000
    with pytest.raises(ValueError, match=r"16384x8193 pixels, more than|decompression bomb"):
        decode(bomb, 3)
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match="12288x8192 pixels, more than"):
        decode(saved(Image.new("1", (12288, 8192))), 3)
    monkeypatch.setattr(decoding, "_MOST_PIXELS", 8 * 6)
    assert shown(saved(Image.fromarray(RAMP)), 1).shape == (6, 8)
    monkeypatch.setattr(decoding, "_MOST_PIXELS", 8 * 6 - 1)
    with pytest.raises(ValueError, match="8x6 pixels, more than 47"):
        decode(saved(Image.fromarray(RAMP)), 1)


def odd_files():
    palette = Image.fromarray(COLOURS).quantize(16)
    alpha = Image.fromarray(COLOURS).convert("RGBA")
    return [saved(palette), saved(alpha), saved(Image.fromarray(RAMP.astype(np.uint16) * 257)), saved(palette)]


@pytest.mark.parametrize("size", [0, 6])
def test_a_prepared_set_with_such_files_is_read_as_a_viewer_shows_it(tmp_path, size):
    files = odd_files()
    prepared.write(tmp_path, "odd", {"train": (files, [0, 1, 2, 0])})
    found = data.load("odd", "train", tmp_path, size).read(np.arange(4), np.float64)[0]
    assert found.shape[3] == 3
    if not size:
        np.testing.assert_array_equal(np.round(found * 255), [shown(file, 3) for file in files])


def first_digest(files, labels, split):
    """The digest that the first versions gave: of files and labels, the decoder, and the pixels of the first photos."""
    stored = hashlib.sha256()
    for file in files:
        stored.update(len(file).to_bytes(8, "little") + file)
    stored.update(np.asarray(labels, np.int32).tobytes())
    decoder = (PIL.__version__, features.version("jpg"), features.version("libjpeg_turbo"))
    total = hashlib.sha256(str((stored.hexdigest(), split.shape, 3, decoder)).encode())
    total.update(split.read(np.arange(len(files)), np.float32)[0].tobytes())
    return total.hexdigest()


def test_an_old_digest_stays_only_if_the_pixels_do(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    plain = [saved(Image.fromarray(COLOURS)), saved(Image.fromarray(COLOURS[::-1]), "jpeg")]
    for name, files in (("plain", plain), ("turned", [plain[0], saved(Image.fromarray(COLOURS), exif=exif)])):
        prepared.write(tmp_path / name, "photos", {"test": (files, [0, 1])})
        split = data.load("photos", "test", tmp_path / name, 6)
        assert (split.digest() == first_digest(files, [0, 1], split)) == (name == "plain")


@pytest.mark.parametrize("size", [0, 6])
def test_a_label_that_is_no_class_is_refused_with_split_image_and_value(tmp_path, size):
    images, _ = prepared.random_split(4, (6, 6, 3))
    for label, words in (
        (-1, r"label -1.*-1 marks images whose label is not published"),
        (3, "label 3, but labels go"),
    ):
        home = tmp_path / str(label)
        prepared.write(home, "tiny", {"test": (images, [0, 2, label % 2**64, 1])})
        with pytest.raises(UserError, match=rf"image 2 of the split 'test' of tiny has the {words}"):
            data.load("tiny", "test", home, size).read([2], np.float32)
        if size:
            with pytest.raises(UserError, match=f"label {label}"):
                _ = data.load("tiny", "test", home, size).labels
