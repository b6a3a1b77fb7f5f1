"""Damage is noticed by digests: in files, in parts of mapped arrays as they are read, and in JSON."""

import random

import numpy as np
import pytest

from research import digests

BLOCK = digests.BLOCK


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of several blocks, of one, and an empty one."""
    folder = tmp_path_factory.mktemp("digests")
    rng = np.random.default_rng(0)
    (folder / "below").mkdir()
    for name, size in (("large", 3 * BLOCK + 7), ("below/one", 100), ("empty", 0), ("exact", 2 * BLOCK)):
        (folder / name).write_bytes(rng.bytes(size))
    return folder


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("threads", [1, 4])
def test_every_flipped_byte_and_cut_is_named_and_nothing_else(folder, threads, monkeypatch):
    monkeypatch.setattr(digests, "_THREADS", threads)
    monkeypatch.setattr(digests, "_TASK", 2 * BLOCK)
    entries = digests.of_folder(folder, ["exact"])
    assert sorted(entries) == ["below/one", "empty", "large"]
    assert digests.first_fault(folder, entries) == ""
    rng = random.Random(0)
    for name in ("large", "below/one"):
        size = (folder / name).stat().st_size
        for at in (0, size - 1, rng.randrange(size)):
            flip(folder / name, at)
            block = at // BLOCK * BLOCK
            assert f"{name} has other bytes than were written, between {block:,}" in digests.first_fault(
                folder, entries
            )
            flip(folder / name, at)
    whole = (folder / "large").read_bytes()
    (folder / "large").write_bytes(whole[:-1])
    assert digests.first_fault(folder, entries) == f"large has {len(whole) - 1:,} bytes, and had {len(whole):,}"
    (folder / "large").unlink()
    assert "large can't be read" in digests.first_fault(folder, entries)
    (folder / "large").write_bytes(whole)
    assert digests.first_fault(folder, entries) == ""


@pytest.mark.parametrize("width", [1, 3, 5])  # rows of 12 and 20 bytes lie across blocks
def test_a_mapped_array_is_checked_where_it_is_read(width, tmp_path):
    values = np.random.default_rng(1).random((3 * BLOCK // 4 // width, width), np.float32)
    path = tmp_path / "x.bin"
    path.write_bytes(values.tobytes())
    entry = digests.of_files(tmp_path, ["x.bin"])["x.bin"]

    def opened():
        return digests.mapped(path, np.float32, values.shape, entry, ValueError)

    first_row = BLOCK // (4 * width)  # which begins in the first block or at the second
    flip(path, BLOCK + 4 * width + 1)
    touching = [slice(None), slice(first_row, first_row + 3), np.array([0, first_row + 1]), slice(None, None, -1)]
    mask = np.zeros(len(values), bool)
    mask[first_row + 1] = True
    for index in [*touching, mask, np.array([[first_row + 1]]), first_row + 1 - len(values)]:
        with pytest.raises(ValueError, match=f"between {BLOCK:,} and {2 * BLOCK:,}"):
            opened()[index]
    array = opened()
    for index in (slice(0, 5), slice(3, 3), np.array([1, 2]), np.array([], int), slice(-5, None), -1):
        np.testing.assert_array_equal(array[index], values[index])
    flip(path, BLOCK + 4 * width + 1)
    np.testing.assert_array_equal(opened()[:], values)
    np.testing.assert_array_equal(np.asarray(opened()), values)
    with pytest.raises(ValueError, match="and should have"):
        digests.mapped(path, np.float64, values.shape, entry, ValueError)
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 bytes, and had"):
        opened()


def test_json_keeps_its_seal_whatever_its_order_and_loses_it_with_any_value():
    sealed = digests.seal({"a": (1, 2.5), "b": {2: None, 10: float("nan")}})
    assert digests.is_whole(sealed)
    assert digests.is_whole(dict(reversed(sealed.items())))
    assert not digests.is_whole(sealed | {"a": [1, 2.25]})
    assert digests.is_whole({"a": 1})
    assert digests.is_whole(digests.seal(sealed | {"a": 3}))
