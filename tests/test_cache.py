"""The user's cache: what it keeps is found again, and made again if the file is damaged or has another name."""

import numpy as np
import pytest

from lsrs_jax import data
from lsrs_jax.data import decoded as decoded_sets
from lsrs_jax.data import prepared as prepared_sets
from lsrs_jax.runtime import cache
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import discrete_gaussian
from tests.support import prepared


def test_a_file_is_read_only_if_it_is_what_was_written_under_this_name(tmp_path, monkeypatch):
    made = []

    def content(name):
        return cache.cached(name, lambda: made.append(name) or name.encode())

    monkeypatch.setattr(cache, "folder", None)
    assert [content("a"), content("a"), made] == [b"a", b"a", ["a", "a"]]
    monkeypatch.setattr(cache, "folder", tmp_path / "tables")
    made.clear()
    assert [content("a"), content("a"), content("b"), made] == [b"a", b"a", b"b", ["a", "b"]]
    first = tmp_path / "tables" / "a"
    (tmp_path / "tables" / "b").write_bytes(first.read_bytes())  # the file of another name
    first.write_bytes(first.read_bytes()[:-1])
    assert [content("a"), content("b"), made] == [b"a", b"b", ["a", "b", "a", "b"]]
    first.unlink()
    first.mkdir()  # cannot be read or written
    assert content("a") == b"a"


def test_a_table_of_noise_from_the_cache_is_the_computed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "folder", tmp_path)
    found = []
    for _ in range(2):
        discrete_gaussian.grid.cache_clear()
        found.append(discrete_gaussian.grid(0.37))
    monkeypatch.setattr(cache, "folder", None)
    discrete_gaussian.grid.cache_clear()
    fresh = discrete_gaussian.grid(0.37)
    assert len(list(tmp_path.iterdir())) == 1
    for grid in found:
        assert grid.spacing == fresh.spacing
        np.testing.assert_array_equal(grid.table, fresh.table)
    other = discrete_gaussian.grid(0.4)
    assert (other.table != fresh.table).any()


def test_more_than_the_limit_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "folder", tmp_path)
    assert [cache.cached(name, lambda: b"four", most) for name, most in (("a", 3), ("b", 4))] == [b"four", b"four"]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


class TestDecodedImages:
    @pytest.fixture
    def home(self, tmp_path, monkeypatch):
        monkeypatch.setattr(cache, "folder", tmp_path / "tables")
        splits = {split: prepared.random_split(5, (4, 4, 3), seed=i) for i, split in enumerate(("train", "test"))}
        home = prepared.write(tmp_path / "sets", "tiny", splits)
        (home / "label.labels.txt").write_text("cat\ndog\nfrog\n")
        return home

    @pytest.fixture
    def load(self, home, monkeypatch):
        """Loads a split, and says whether it was decoded."""
        decoded = []
        read = prepared_sets._read
        monkeypatch.setattr(prepared_sets, "_read", lambda *words: decoded.append(words) or read(*words))

        def loaded(split, **fields):
            decoded.clear()
            return data.load("tiny", split, str(home.parents[1]), **fields), bool(decoded)

        return loaded

    def test_a_second_command_finds_the_same_images(self, load):
        for split in ("test", "test[1:4]"):
            first, decoded = load(split)
            second, again = load(split)
            assert (decoded, again) == (True, False)
            assert first.digest() == second.digest()
            assert second.images.dtype == np.uint8
            for name in ("name", "version", "split", "class_names", "max_value"):
                assert getattr(first, name) == getattr(second, name)
                assert type(getattr(first, name)) is type(getattr(second, name))
        assert load("test[1:4]")[0].digest() != load("test")[0].digest()

    def test_changed_records_classes_and_fields_are_read_anew(self, load, home):
        old, _ = load("test")
        record, names = next(home.glob("*-test.array_record*")), home / "label.labels.txt"
        stored = record.read_bytes()
        record.write_bytes(next(home.glob("*-train.array_record*")).read_bytes())
        new, decoded = load("test")
        assert decoded
        assert new.digest() != old.digest()
        record.write_bytes(stored)
        assert not load("test")[1]
        names.write_text("cat\ndog\ntoad\n")
        assert load("test")[0].class_names == ("cat", "dog", "toad")
        with pytest.raises(UserError, match="no feature 'pixels'"):
            load("test", image_column="pixels")

    def test_a_damaged_file_is_made_again(self, load, tmp_path):
        old, _ = load("test")
        (kept,) = (tmp_path / "tables").iterdir()
        kept.write_bytes(kept.read_bytes()[:-100] + bytes(100))
        new, decoded = load("test")
        assert decoded
        assert new.digest() == old.digest()
        assert not load("test")[1]

    def test_other_libraries_and_code_decode_again(self, load, tmp_path, monkeypatch):
        load("test")
        monkeypatch.setattr(decoded_sets.PIL, "__version__", "0")
        assert load("test")[1]
        assert not load("test")[1]
        code = tmp_path / "decode.py"
        code.write_text("another decoder")
        monkeypatch.setattr(decoded_sets, "_CODE", [code])
        assert load("test")[1]
        assert not load("test")[1]

        def nightly(package):
            raise decoded_sets.PackageNotFoundError(package)

        monkeypatch.setattr(decoded_sets, "version", nightly)
        assert load("test")[1]

    def test_nothing_is_kept_of_large_splits_sums_photos_and_classes_without_names(
        self, load, home, tmp_path, monkeypatch
    ):
        for split, fields in (("train+test", {}), ("test", {"size": 4})):
            assert load(split, **fields)[1]
        (home / "label.labels.txt").unlink()
        assert load("test")[1]
        (home / "label.labels.txt").write_text("cat\ndog\nfrog\n")
        monkeypatch.setattr(decoded_sets, "_MOST", 100)
        assert load("test")[1]
        monkeypatch.setattr(decoded_sets, "_MOST", 10**6)
        monkeypatch.setattr(cache, "folder", None)
        assert load("test")[1]
        assert not (tmp_path / "tables").exists()

    def test_a_set_that_cannot_be_read_leaves_nothing(self, load, home, tmp_path):
        record = next(home.glob("*-test.array_record*"))
        record.write_bytes(record.read_bytes()[:100])
        with pytest.raises(UserError, match="cannot read"):
            load("test")
        assert not (tmp_path / "tables").exists()
