"""Tables in the user's cache: found again, and made again if the file is damaged or has another name."""

import numpy as np

from lsrs_jax.runtime import cache
from lsrs_jax.smoothing import discrete_gaussian


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
