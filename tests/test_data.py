"""Windows, epochs, validation data and the fingerprint."""

import torch
import pytest

import train_graceful as t


def dataset(*paths, context=8, batch_size=4, grad_accum=1, seed=0, workers=0):
    return t.ByteDataset(t.Config.from_options({"data": [str(path) for path in paths], "context": context, "batch_size": batch_size,
                                                "grad_accum": grad_accum, "seed": seed, "workers": workers}))


@pytest.fixture
def folder(tmp_path):
    """1,500 distinct-looking bytes over files that end in the middle of windows, with a hidden and an empty file between."""
    text = bytes((i * i // 7 + i) % 251 for i in range(1500))
    (tmp_path / "sub").mkdir()
    for name, part in {"a.txt": text[:701], "b.bin": b"", "sub/c.py": text[701:705], "sub/d": text[705:], ".hidden": b"zzz"}.items():
        (tmp_path / name).write_bytes(part)
    return tmp_path, text


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000])
def test_shuffled_is_a_permutation_that_depends_on_its_key(n):
    orders = [[t.shuffled(i, n, key) for i in range(n)] for key in (b"0 0", b"0 1", b"1 0")]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 16:
        assert orders[0] != orders[1] != orders[2] != orders[0]


def test_an_epoch_is_one_pass_over_the_windows(folder):
    path, text = folder
    data = dataset(path)
    assert data.train_bytes == 1425 and data.train_windows == 178 and data.batches_per_epoch == 44
    for epoch in (0, 3):
        batches = list(data.batches(epoch, 0))
        assert len(batches) == 44 and all(batch.shape == (4, 9) and batch.dtype == torch.uint8 for batch in batches)
        starts = {bytes(window.tolist()) for batch in batches for window in batch}
        whole = {text[i * 8 : i * 8 + 9] for i in range(178)}
        assert starts <= whole and len(starts) >= 175  # 44 * 4 of 178 windows; a few have twins


def test_a_batch_is_a_pure_function_of_seed_epoch_and_number(folder):
    path, _ = folder
    data, again, other = dataset(path), dataset(path), dataset(path, seed=1)
    epoch_2 = list(data.batches(2, 0))
    assert all(a.equal(b) for a, b in zip(epoch_2[40:], again.batches(2, 40)))
    assert not epoch_2[0].equal(next(other.batches(2, 0)))
    assert not epoch_2[0].equal(next(data.batches(1, 0)))


def test_workers_give_the_same_batches_and_leave_the_default_generator_alone(folder):
    path, _ = folder
    torch.manual_seed(5)
    before = torch.get_rng_state()
    data = dataset(path)
    alone = list(data.batches(1, 30))
    data.workers = 2
    assert all(a.equal(b) for a, b in zip(alone, data.batches(1, 30)))
    assert torch.get_rng_state().equal(before)


def test_validation_windows_are_the_last_bytes_and_always_the_same(folder):
    path, text = folder
    data = dataset(path)
    windows = [bytes(window.tolist()) for batch in data.validation_batches() for window in batch]
    assert windows == [text[1425 + i * 8 : 1425 + i * 8 + 9] for i in range(9)]


def test_the_fingerprint_knows_content_and_not_place(folder, tmp_path):
    path, text = folder
    fingerprint = dataset(path).fingerprint()
    moved = tmp_path / "sub2"
    path.joinpath("sub").rename(moved)
    assert dataset(path).fingerprint() == fingerprint
    (moved / "d").write_bytes(text[705:-1] + b"!")
    assert dataset(path).fingerprint() != fingerprint


def test_a_large_corpus_is_fingerprinted_by_samples(folder, monkeypatch):
    path, text = folder
    monkeypatch.setattr(t, "FULL_FINGERPRINT_BYTES", 100)
    monkeypatch.setattr(t, "FINGERPRINT_SAMPLE_BYTES", 100)
    fingerprint = dataset(path).fingerprint()
    assert dataset(path).fingerprint() == fingerprint
    (path / "a.txt").write_bytes(b"!" + text[1:701])
    assert dataset(path).fingerprint() != fingerprint


def test_the_default_data_is_pythons_own_source():
    files = t.standard_library_files()
    assert len(files) > 300 and all(path.suffix == ".py" for path in files)
    assert not any("site-packages" in path.parts or "test" in path.parts for path in files)


def test_files_are_mapped_and_hold_no_descriptors(tmp_path):
    import os
    for i in range(300):
        (tmp_path / f"{i:03}").write_bytes(bytes([i % 256]) * 50)
    before = len(os.listdir("/dev/fd"))
    data = dataset(tmp_path)
    list(data.batches(0, 0))
    assert len(os.listdir("/dev/fd")) == before


def test_workers_whose_sockets_would_have_too_long_a_path_are_refused(folder, monkeypatch):
    """They would be waited for for ever."""
    monkeypatch.setattr(t.tempfile, "tempdir", "/" + "a" * t.SOCKET_FOLDER_BYTES)
    dataset(folder[0])
    with pytest.raises(t.UserError, match="set TMPDIR"):
        dataset(folder[0], workers=1)
    monkeypatch.setattr(t.tempfile, "tempdir", "/" + "a" * (t.SOCKET_FOLDER_BYTES - 1))
    assert len(t.tempfile.gettempdir() + "/pymp-12345678/listener-12345678") == 103
    dataset(folder[0], workers=1)
