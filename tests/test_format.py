"""A checkpoint is what torch.save writes, whoever writes it: one process by several threads, or many processes together."""

import collections
import io
import os
import random
import subprocess
import sys
import threading
import zipfile
import zlib

import numpy as np
import pytest
import torch
from campaign import Forked
from conftest import ROOT, assert_same

import train_graceful as t


def every_dtype() -> list[torch.Tensor]:
    """A tensor of random bits of each dtype that torch.save takes (quantized ones aside)."""
    found = []
    for dtype in sorted({*torch.storage._dtype_to_storage_type_map(), *torch.storage._new_dtypes()}, key=str):
        if not str(dtype).startswith(("torch.q", "torch.quint")):
            tensor = torch.empty(2, 3, dtype=dtype)
            t.storage_bytes(tensor).copy_(torch.randint(256, (tensor.nbytes,), dtype=torch.uint8))
            found.append(tensor)
    return found


def zoo() -> dict:
    """All that a state may hold."""
    torch.manual_seed(0)
    large, model, betas = torch.randn(3_000_000), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)), (0.9, 0.999)
    model.tied = model[0]
    return {
        "none": None, "flag": True, 5: [1, 2.5, "text ü", (3,), 1j, {1, 2}], "big": 10**30, "dtype": torch.bfloat16, "size": torch.Size([2]),
        "device": torch.device("cpu"), "nan": float("nan"), "count": collections.Counter({5: 1}), "betas": [betas, betas],
        "views": [large[5:9], large.view(1000, 3000).T, large[::2], large], "again": large,
        "zero-dim": torch.tensor(3.0), "empty": [torch.empty(0), torch.empty(0, 4)], "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "negative": torch.ones(2, dtype=torch.complex64).conj().imag,
        "model": model.state_dict(), "parameter": model[0].weight, "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "random": random.getstate(), "dtypes": every_dtype(), "odd": [torch.randn(n) for n in (1, 75_001, t.PIECE_BYTES // 4, t.PIECE_BYTES // 4 + 1)],
    }


def records(path) -> dict[str, tuple[int, int, int]]:
    """{name: (size, CRC-32, offset)} of a zip file's records, but the one with torch.save's random number."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: (info.file_size, info.CRC, info.header_offset) for info in archive.infolist()
                if not info.filename.endswith("serialization_id")}


def assert_as_torch_saves_it(path, state) -> None:
    """Record for record, checksum for checksum, byte for byte."""
    expected = io.BytesIO()
    torch.save(state, expected)
    assert records(path) == records(expected)
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(expected) as theirs:
        assert ours.testzip() is None
        assert all(ours.read(name) == theirs.read(name) for name in records(path))
    assert os.path.getsize(path) == len(expected.getvalue())


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_the_file_is_the_one_that_torch_save_writes(tmp_path, monkeypatch, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    state, path = zoo(), tmp_path / "a.pt"
    t.save_checkpoint(state, path)
    assert_as_torch_saves_it(path, state)
    for options in ({}, {"mmap": True}):
        assert list(torch.load(path, weights_only=True, **options)) == list(state)
    assert subprocess.run([sys.executable, "-m", "zipfile", "-t", path], capture_output=True, text=True).stdout == "Done testing\n"


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_it_loads_as_what_was_saved(tmp_path):
    state, path = zoo(), tmp_path / "a.pt"
    t.save_checkpoint(state, path)
    loaded = t.load_checkpoint(path)
    assert list(loaded) == list(state) and loaded["random"] == state["random"] and loaded[5] == state[5]
    for tensor, other in zip(loaded["dtypes"], state["dtypes"]):
        assert tensor.dtype == other.dtype and t.storage_bytes(tensor).equal(t.storage_bytes(other))
    for key in ("views", "again", "zero-dim", "empty", "conjugate", "negative", "model", "odd"):
        assert_same(loaded[key], state[key])
    assert loaded["views"][1].stride() == state["views"][1].stride()
    assert len({tensor.untyped_storage().data_ptr() for tensor in (*loaded["views"], loaded["again"])}) == 1
    weights = loaded["model"]
    assert weights["tied.weight"].data_ptr() == weights["0.weight"].data_ptr() and weights._metadata == state["model"]._metadata
    assert isinstance(loaded["parameter"], torch.nn.Parameter) and loaded["parameter"].requires_grad and not loaded["frozen"].requires_grad


def random_state(rng: random.Random, tensors: list, depth: int = 0):
    """Nested at random; tensors, views of them and containers occur again and again."""
    kind = rng.choice(["tensor", "view", "number", "text", "dict", "list", "tuple"] if depth < 4 else ["tensor", "number"])
    if kind == "tensor":
        tensors.append(torch.randn(rng.choice([(), (0,), (3,), (2, 5), (40, 7)])).to(rng.choice([torch.float32, torch.float64, torch.bfloat16])))
        return tensors[-1]
    if kind == "view" and tensors:
        base = rng.choice(tensors)
        return rng.choice([base, base[1:] if base.ndim and len(base) else base, base.mT if base.ndim == 2 else base])
    if kind == "dict":
        items = {rng.choice("abcdef") * rng.randrange(1, 5): random_state(rng, tensors, depth + 1) for _ in range(rng.randrange(5))}
        return collections.OrderedDict(items) if rng.random() < 0.3 else items
    if kind in ("list", "tuple"):
        items = [random_state(rng, tensors, depth + 1) for _ in range(rng.randrange(5))]
        items += items[:1]
        return items if kind == "list" else tuple(items)
    return rng.choice([1, 2.5, None, "x", "y" * 300, True, 2**40])


def test_any_nesting_keeps_the_order_of_the_records(tmp_path):
    """Where a storage goes follows from the order in which the pickle meets it."""
    for seed in range(150):
        rng, tensors = random.Random(seed), []
        torch.manual_seed(seed)
        state = {str(i): random_state(rng, tensors) for i in range(6)}
        t.save_checkpoint(state, tmp_path / "a.pt")
        assert_as_torch_saves_it(tmp_path / "a.pt", state)
        assert_same(t.load_checkpoint(tmp_path / "a.pt"), state)


class Exchange(t.OneWriter):
    """What many processes tell each other about a save, here between threads."""

    def __init__(self, rank: int, size: int, shared: dict, barrier: threading.Barrier) -> None:
        self.rank, self.world_size, self._shared, self._barrier = rank, size, shared, barrier

    def lead(self, function, *arguments):
        if self.rank == 0:
            self._shared["lead"] = function(*arguments)
        self._barrier.wait()
        answer = self._shared["lead"]
        self._barrier.wait()
        return answer

    def each(self, function, *arguments):
        self._shared[self.rank] = function(*arguments)
        self._barrier.wait()
        return [self._shared[rank] for rank in range(self.world_size)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_many_that_have_some_rows_each_write_the_file_of_one_that_has_all(tmp_path, size):
    """Also where the rows are no multiple of the processes, or some have none, or a piece is larger than a thread takes."""
    torch.manual_seed(0)
    whole = {"a": torch.randn(7, 3), "b": torch.randn(4, 2), "one": torch.randn(1, 5), "large": torch.randn(1001, 3000), "step": torch.tensor(3.0),
             "half": torch.randn(6, 2).bfloat16(), "plain": 5}
    whole["tied"] = whole["a"]
    kept_whole = ("step", "plain", "b")

    def rows(rank: int) -> dict:
        found = {}
        for name, value in whole.items():
            if name in kept_whole:
                found[name] = value
                continue
            share = -(-len(value) // size)
            first = min(rank * share, len(value))
            local = value[first : first + share].clone()
            found[name] = found["a"] if name == "tied" else t.Rows(local, first, value.shape)
        return found

    shared, barrier, path = {}, threading.Barrier(size, timeout=30), tmp_path / "many.pt"
    ranks = [threading.Thread(target=t.write_checkpoint, args=(*t.laid_out(rows(rank), rank), path, Exchange(rank, size, shared, barrier))) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    t.save_checkpoint(whole, tmp_path / "one.pt")
    assert {name: value[:2] for name, value in records(path).items() if "/data/" in name} == {
        name: value[:2] for name, value in records(tmp_path / "one.pt").items() if "/data/" in name}
    assert_same(t.load_checkpoint(path), whole)
    for rank in range(size):  # and each reads what it has
        with t.opened_checkpoint(path) as checkpoint:
            for name, value in rows(rank).items():
                if isinstance(value, t.Rows):
                    read = checkpoint.rows(checkpoint.state[name], value.first, value.first + len(value.local))
                    checkpoint.read()
                    assert read.equal(value.local) and read.untyped_storage().nbytes() == value.local.nbytes
            checkpoint.share(rank, size)
            shared[rank] = checkpoint.read()
    t.check_checksums(path, checkpoint.records, [shared[rank] for rank in range(size)])
    shared[size - 1][0] ^= 1
    with pytest.raises(t.CheckpointError, match="damaged checkpoint .record data/0."):
        t.check_checksums(path, checkpoint.records, [shared[rank] for rank in range(size)])


def test_rows_of_a_tensor_with_other_strides(tmp_path):
    """What one process has saved with channels last is read row by row by many."""
    weights = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    t.save_checkpoint({"conv": weights, "t": torch.randn(5, 8).T, "wide": torch.randn(4, 6)[:, 2:5]}, tmp_path / "a.pt")
    whole = t.load_checkpoint(tmp_path / "a.pt")
    with t.opened_checkpoint(tmp_path / "a.pt") as checkpoint:
        for name, tensor in checkpoint.state.items():
            for first, last in [(0, 2), (1, 3), (2, 2), (0, len(tensor))]:
                part = checkpoint.rows(tensor, first, last)
                checkpoint.read()
                assert part.equal(whole[name][first:last])


def test_the_checksum_of_a_whole_follows_from_those_of_its_parts():
    rng = random.Random(0)
    for _ in range(200):
        data = rng.randbytes(rng.choice([0, 1, 2, 5, 1000, 70_000]))
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(4)))
        crc = 0
        for first, last in zip([0, *cuts], [*cuts, len(data)]):
            crc ^= t.crc32_followed_by(len(data) - last, zlib.crc32(data[first:last]))
        assert crc == zlib.crc32(data)


def test_a_file_of_more_than_4_gib(tmp_path, whole):
    """The zip format says sizes and offsets in other places then. The tensor is never touched, so it takes no memory and no disk."""
    size = 2**32 + 10**6
    state, path = {"zeros": torch.empty(size, dtype=torch.uint8), "small": torch.arange(5)}, tmp_path / "large.pt"
    shown, parts = t.laid_out(state, 0)
    t.write_without_data(shown, tmp_path / "new")
    [nothing, small] = t.write_parts([parts[0]._replace(data=parts[0].data[:0]), parts[1]], tmp_path / "new")
    zeros, left, behind, block = 0, size, 0, 1
    crc = zlib.crc32(b"\0")
    while left:  # the checksum of as many zeros, by doubling
        if left & 1:
            zeros ^= t.crc32_followed_by(behind, crc)
            behind += block
        left, crc, block = left >> 1, t.crc32_followed_by(block, crc) ^ crc, 2 * block
    assert nothing == 0
    t.publish(tmp_path / "new", [[zeros, small]], path)
    assert path.stat().st_size > size > path.stat().st_blocks * 512
    with zipfile.ZipFile(path) as archive:
        large, other = sorted((info for info in archive.infolist() if "/data/" in info.filename), key=lambda info: -info.file_size)
        assert large.CRC == zeros and len(archive.read(other)) == 40
        assert not whole or archive.testzip() is None
    assert torch.load(path, weights_only=True, mmap=True)["small"].tolist() == [0, 1, 2, 3, 4]
    assert [record.size for record in t.read_records(open(path, "rb"))] == [size, 40]


def test_checksums_are_written_even_where_torch_was_told_not_to(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        t.save_checkpoint({"a": torch.ones(3)}, tmp_path / "a.pt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None and all(record.CRC for record in archive.infolist())


def test_numpys_scalars_are_saved_as_the_numbers_they_are(tmp_path):
    state = {"best": np.mean([0.5, 0.25]), np.int64(4): [np.float32(1.5), (np.int16(3),)], "done": np.bool_(False), "name": np.str_("x")}
    t.save_checkpoint(state, tmp_path / "a.pt")
    loaded = t.load_checkpoint(tmp_path / "a.pt")
    assert loaded == {"best": 0.375, 4: [1.5, (3,)], "done": False, "name": "x"}
    assert [type(value) for value in (loaded["best"], loaded[4][0], loaded["done"], loaded["name"])] == [float, float, bool, str]
    assert type(state["best"]) is np.float64


def test_attributes_of_a_state_dict_are_saved_as_its_items_are(tmp_path):
    state = torch.nn.Linear(2, 2).state_dict()
    state.note, state.small = np.float64(1.5), torch.zeros(1).expand(4)
    t.save_checkpoint({"model": state}, tmp_path / "a.pt")
    loaded = t.load_checkpoint(tmp_path / "a.pt")["model"]
    assert loaded.note == 1.5 and type(loaded.note) is float and loaded.small.tolist() == [0] * 4
    assert loaded._metadata == state._metadata and type(state.note) is np.float64


WRITER = """
import sys, torch, train_graceful as t
value = float(sys.argv[2])
for _ in range(6):
    t.save_checkpoint({"x": torch.full((3_000_000,), value), "i": value}, sys.argv[1])
"""


def assert_one_of_two(path) -> None:
    state = t.load_checkpoint(path)
    assert state["x"].eq(state["i"]).all() and state["i"] in (1, 2)


def test_two_that_write_one_path_at_the_same_time_leave_the_file_of_one_of_them(tmp_path):
    """A loop of one's own that was started twice; or every rank saves. Threads and processes."""
    path = tmp_path / "mine.pt"
    threads = [threading.Thread(target=t.save_checkpoint, args=({"x": torch.full((3_000_000,), i), "i": i}, path)) for i in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_one_of_two(path)
    writers = [Forked([sys.executable, "-c", WRITER, path, str(i)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for i in (1, 2)]
    assert [writer.communicate()[1] for writer in writers] == ["", ""]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert_one_of_two(path)
    assert os.listdir(tmp_path) == ["mine.pt"]


def test_an_expanded_tensor_is_saved_with_all_its_elements(tmp_path):
    """A small file must not become a large state: one that claims more than it holds is refused."""
    expanded = torch.arange(3.0).expand(4, 3)
    t.save_checkpoint({"a": expanded}, tmp_path / "a.pt")
    assert t.load_checkpoint(tmp_path / "a.pt")["a"].equal(expanded)
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "b.pt")
    with pytest.raises(t.CheckpointError, match="a tensor does not fit its record"):
        t.load_checkpoint(tmp_path / "b.pt")


MEMORY = """
import resource, sys, torch, train_graceful as t
state = {str(i): torch.randn(2_500_000) for i in range(40)}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
t.save_checkpoint({"a": torch.randn(2_000_000)}, sys.argv[1])
before = peak()
t.save_checkpoint(state, sys.argv[1])
print((peak() - before) / 400e6)
"""


def test_saving_takes_hardly_any_memory(tmp_path):
    result = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "a.pt"], capture_output=True, text=True, cwd=ROOT)
    assert float(result.stdout) < 0.05, result.stderr


def test_a_copy_for_saving_is_of_one_moment_and_reuses_its_memory(tmp_path):
    weight, model = torch.arange(12.0).view(3, 4), torch.nn.Linear(2, 2)
    state = {"weight": weight, "view": weight[1:].T, "model": model.state_dict(), "n": 1, "list": [torch.zeros(2)]}
    before, kept = t.mapped(state, lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf), {}
    shown, parts = t.laid_out(state)
    copies = t.host_copy(parts, kept)
    weight.add_(1)
    t.write_checkpoint(shown, copies, tmp_path / "a.pt", t.OneWriter())
    loaded = t.load_checkpoint(tmp_path / "a.pt")
    assert_same(loaded, before)
    assert loaded["view"].untyped_storage().data_ptr() == loaded["weight"].untyped_storage().data_ptr()
    again = t.host_copy(t.laid_out(state)[1], kept)
    assert [part.data.data_ptr() for part in again] == [part.data.data_ptr() for part in copies]
    t.write_checkpoint(shown, again, tmp_path / "a.pt", t.OneWriter())
    assert_as_torch_saves_it(tmp_path / "a.pt", state)


def test_a_failing_write_in_any_thread_is_raised_and_leaves_the_old_file(tmp_path, monkeypatch):
    state, calls = {"a": torch.randn(20 * t.PIECE_BYTES // 4)}, []
    t.save_checkpoint({"old": 1}, tmp_path / "a.pt")

    def full(fd, data, offset, pwrite=os.pwrite):
        calls.append(offset)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        t.save_checkpoint(state, tmp_path / "a.pt")
    monkeypatch.undo()
    assert t.load_checkpoint(tmp_path / "a.pt") == {"old": 1} and os.listdir(tmp_path) == ["a.pt"]


def test_short_writes_and_reads_are_continued(tmp_path, monkeypatch):
    """The kernel may take or give less than it was asked for."""
    state = {"a": torch.randn(3 * t.PIECE_BYTES // 8), "b": torch.arange(1000)}
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset, pwrite=os.pwrite: pwrite(fd, data[: max(4, len(data) // 3)], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset, preadv=os.preadv: preadv(fd, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset))
    t.save_checkpoint(state, tmp_path / "a.pt")
    loaded = t.load_checkpoint(tmp_path / "a.pt")
    monkeypatch.undo()
    assert_as_torch_saves_it(tmp_path / "a.pt", state)
    assert_same(loaded, state)
