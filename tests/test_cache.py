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

    def test_whatever_changes_in_the_folder_or_the_fields_is_read_anew(self, load, home, monkeypatch):
        old, _ = load("test")
        record, names, described = next(home.glob("*-test.array*")), home / "label.labels.txt", home / "features.json"
        other = next(home.glob("*-train.array*"))
        for path, content in (
            (record, other.read_bytes()),
            (other, record.read_bytes()),  # of another split, whose labels can tell how many classes there are
            (names, b"cat\ndog\ntoad\n"),
            (described, described.read_bytes() + b" "),
            (home / "more.json", b"{}"),
        ):
            stored = path.read_bytes() if path.exists() else None
            path.write_bytes(content)
            new, decoded = load("test")
            assert decoded, path
            assert (new.digest() != old.digest()) == (path == record)
            assert (new.class_names == ("cat", "dog", "toad")) == (path == names)
            assert not load("test")[1]
            if stored is None:
                path.unlink()
            else:
                path.write_bytes(stored)
            assert not load("test")[1]
        for column in ("image_column", "label_column"):
            with pytest.raises(UserError, match="no feature 'pixels'"):
                load("test", **{column: "pixels"})
        with monkeypatch.context() as patched:
            patched.setattr(decoded_sets, "_digest", lambda path: "")  # the names of the files count too
            load("test")
            assert not load("test")[1]
            record.with_name("another").write_bytes(b"")
            assert load("test")[1]

    def test_a_damaged_file_is_made_again(self, load, tmp_path):
        old, _ = load("test")
        (kept,) = (tmp_path / "tables").iterdir()
        kept.write_bytes(kept.read_bytes()[:-100] + bytes(100))
        new, decoded = load("test")
        assert decoded
        assert new.digest() == old.digest()
        assert not load("test")[1]

    def test_other_libraries_and_code_decode_again(self, load, tmp_path, monkeypatch):
        def changed(place, name, value):
            monkeypatch.setattr(place, name, value)
            first, second = load("test")[1], load("test")[1]
            return first and not second

        load("test")
        assert changed(decoded_sets.PIL, "__version__", "0")
        assert changed(decoded_sets, "version", lambda package: f"another {package}")
        found = decoded_sets.features.version
        for decoder in ("jpg", "libjpeg_turbo", "zlib", "webp", "jpg_2000", "libtiff"):
            assert changed(
                decoded_sets.features, "version", lambda name, own=decoder: "0" * (name == own) or found(name)
            )
        names = {path.name for path in decoded_sets._CODE}
        assert names == {f"{module}.py" for module in ("decode", "decoded", "images", "photos", "prepared")}
        code = tmp_path / "decode.py"
        code.write_text("another decoder")
        assert changed(decoded_sets, "_CODE", [code])

        def nightly(package):
            raise decoded_sets.PackageNotFoundError(package)

        monkeypatch.setattr(decoded_sets, "version", nightly)
        assert [load("test")[1] for _ in range(2)] == [True, True]

    def test_nothing_is_kept_of_photos_large_sets_and_large_splits(self, load, tmp_path, monkeypatch):
        assert load("test", size=4)[1]
        for name, limit in (("_STORED", 100), ("_DECODED", 5 * 48 - 1)):
            with monkeypatch.context() as patched:
                patched.setattr(decoded_sets, name, limit)
                assert load("test")[1]
        with monkeypatch.context() as patched:
            patched.setattr(cache, "folder", None)
            assert load("test")[1]
        assert not (tmp_path / "tables").exists()
        monkeypatch.setattr(decoded_sets, "_DECODED", 5 * 48)
        assert [load("test")[1] for _ in range(2)] == [True, False]

    def test_files_that_change_while_they_are_decoded_are_not_kept(self, load, home, monkeypatch):
        record, read = next(home.glob("*-test.array*")), prepared_sets._read
        stored = record.read_bytes()

        def replaced(*words):
            record.write_bytes(next(home.glob("*-train.array*")).read_bytes())
            return read(*words)

        with monkeypatch.context() as patched:
            patched.setattr(prepared_sets, "_read", replaced)
            wrong, _ = load("test")
        record.write_bytes(stored)
        right, decoded = load("test")
        assert decoded
        assert right.digest() != wrong.digest()

    def test_a_file_that_cannot_be_read_costs_the_cache_only(self, load, home, monkeypatch):
        (home / "backup.json").mkdir()
        (home / "dangling.json").symlink_to(home / "nothing")
        assert [load("test")[1] for _ in range(2)] == [True, False]

        def locked(path):
            raise PermissionError(path)

        monkeypatch.setattr(decoded_sets, "_digest", locked)
        assert [load("test")[1] for _ in range(2)] == [True, True]

    def test_a_set_that_cannot_be_decoded_leaves_nothing(self, load, home, tmp_path):
        record = next(home.glob("*-test.array_record*"))
        record.write_bytes(record.read_bytes()[:100])
        with pytest.raises(UserError, match="cannot read"):
            load("test")
        assert not (tmp_path / "tables").exists()
