"""Samples, their order and all that is random are the same with any workers, ranks and stops."""

import random
import sysconfig
from pathlib import Path

import helpers as h
import numpy as np
import pytest
import torch

import train_graceful as t


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000])
def test_shuffled_is_a_permutation_that_depends_on_its_key(n):
    orders = [t.shuffled(np.arange(n), n, key).tolist() for key in (b"0 0", b"0 1", b"1 0")]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert [t.shuffled(np.array([i]), n, b"0 0").item() for i in range(n)] == orders[0]
    assert n < 16 or orders[0] != orders[1] != orders[2] != orders[0]


def draw() -> tuple:
    """A number from each generator."""
    return torch.rand(()).item(), random.random(), float(np.random.rand())


class Numbers(torch.utils.data.Dataset):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple:
        return index, *draw()


def noisy_collate(samples: list[tuple]) -> list[tuple]:
    """A batch as a list of its samples, and a last one that is random."""
    return [*samples, (-1, *draw())]


def batches_of(
    training=103, validation=23, batch_size=10, seed=0, rank=0, size=1, validated=None
) -> t.Batches:
    data = Numbers(training), Numbers(validation), noisy_collate
    return t.Batches(*data, batch_size, seed, validated or validation, rank, size)


def ranks(size: int, **settings) -> list[t.Batches]:
    return [batches_of(rank=rank, size=size, **settings) for rank in range(size)]


def indices(batches: t.Batches, split: str, number: int) -> list[int]:
    """Of the samples of a batch, those that count."""
    batch, count = batches[split, number]
    return [sample[0] for sample in batch[:-1]][:count]


def test_an_epoch_is_one_pass_over_the_samples_in_whole_batches():
    """What fills no batch, another part in each epoch, is left out."""
    batches, seen = batches_of(), set()
    for epoch in (0, 1, 7):
        order = [indices(batches, "training", 10 * epoch + number) for number in range(10)]
        assert all(len(batch) == 10 for batch in order)
        samples = frozenset(sum(order, []))
        assert len(samples) == 100 and samples < set(range(103))
        seen.add(samples)
    assert batches.per_epoch == 10 and len(seen) == 3


def test_a_batch_and_its_randomness_are_a_pure_function_of_seed_and_number():
    """In any order, whatever was drawn between."""
    batches, other, numbers = batches_of(), batches_of(seed=1), [25, 3, 24, 25, 0]
    found = {number: batches["training", number] for number in numbers}
    draw()
    again = batches_of()
    assert all(again["training", number] == found[number] for number in reversed(numbers))
    assert all(other["training", number] != found[number] for number in numbers)
    assert indices(other, "training", 3) != indices(batches, "training", 3)


def test_the_randomness_of_a_sample_is_one_of_seed_epoch_and_index_alone():
    """Whatever stands beside it in a batch, and whoever computes it."""

    def drawn(epoch: int, **settings) -> dict[int, tuple]:
        batches, samples = batches_of(training=100, **settings), {}
        for number in range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch):
            samples |= {sample[0]: sample for sample in batches["training", number][0][:-1]}
        return samples

    one = drawn(2)
    assert len({sample[1:] for sample in one.values()}) == 100
    assert drawn(2, batch_size=25) == one
    assert drawn(2, rank=0, size=2) | drawn(2, rank=1, size=2) == one
    for other in drawn(3), drawn(2, seed=1):
        assert all(other[index] != one[index] for index in range(100))


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_an_equal_part_of_every_batch(size):
    whole, parts = batches_of(batch_size=12), ranks(size, batch_size=12)
    for number in (0, 7, 8, 30):
        shares = [indices(part, "training", number) for part in parts]
        assert {len(share) for share in shares} == {12 // size}
        assert sorted(sum(shares, [])) == sorted(indices(whole, "training", number))
    # What collate draws is another thing for each.
    assert len({part["training", 0][0][-1] for part in parts}) == size


@pytest.mark.parametrize("validation, validated", [(1, 1), (10, 10), (23, 23), (1000, 20)])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_an_evaluation_has_evenly_spread_samples_once_on_any_number_of_ranks(
    validation, validated, size
):
    """With --eval-batches it has some of them, else all; each rank makes as many passes."""
    parts, seen = ranks(size, validation=validation, validated=validated), []
    assert {part.per_evaluation for part in parts} == {-(-validated // 10)}
    for part in parts:
        for number in range(part.per_evaluation):
            seen += indices(part, "validation", number)
            # Who has no sample of its own computes one all the same, that does not count.
            assert len(part["validation", number][0]) >= 2
    assert sorted(seen) == list(range(0, validation, validation // validated))


def test_what_is_random_in_the_loop_is_the_same_with_any_workers_and_after_a_resume(tmp_path):
    """Every evaluation draws the same, so that only the model makes them differ."""

    def drawn(session, *args, **how) -> tuple[list, dict]:
        bodies, evaluations = [], {}

        def train(run):
            run.data(Numbers(40), Numbers(8))
            optimizer = h.sgd(run, model := run.model(torch.nn.Linear(1, 1)))

            def evaluate(batch):
                evaluations.setdefault(run.step, []).append(draw())
                return {"loss": batch[1]}

            for index, *_ in run.batches(evaluate):
                bodies.append((run.step, *draw()))
                model(index.float().unsqueeze(1)).mean().backward()
                optimizer.step()

        session(train, tmp_path, *args, lr=1e-9, **how)
        return bodies, evaluations

    bodies, evaluations = drawn(h.go)
    assert [step for step, *_ in bodies] == list(range(12))
    assert len({tuple(numbers) for _, *numbers in bodies}) == 12
    assert evaluations.keys() == {5, 10, 12} and len(evaluations[5]) == 2
    assert evaluations[5] == evaluations[10] == evaluations[12]
    assert drawn(h.go, "--workers", 2) == (bodies, evaluations)
    assert drawn(h.go, "--workers", 1, stop=7)[0] + drawn(h.resume)[0] == bodies


# ---- what the built-in program reads


@pytest.fixture
def folder(tmp_path):
    """1,500 bytes over files that end in the middle of windows, and what is none of them."""
    text = bytes((i * i // 7 + i) % 251 for i in range(1500))
    files = {"a.txt": text[:701], "b.bin": b"", "sub/c.py": text[701:705], "sub/d": text[705:]}
    for name, part in {**files, ".hidden": b"zzz", ".git/config": b"zzz"}.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(part)
    return tmp_path / "data", text


def datasets(*paths: Path, context=8, left_out=Path("/nowhere")):
    return t.text_datasets([str(path) for path in paths], context, left_out)


def assert_windows_of(both: list[torch.Tensor], text: bytes) -> None:
    """Over all of it, but for what fills no window at the end of its two parts."""
    cut = len(text) - len(text) // 20
    for windows, part in zip(both, (text[:cut], text[cut:]), strict=True):
        seen = windows[:, :-1].numpy().tobytes() + windows[-1, -1:].numpy().tobytes()
        assert part.startswith(seen) and len(part) - len(seen) < windows.shape[1] - 1


def test_the_windows_lie_end_to_end_over_files_and_the_last_part_is_for_validation(folder):
    path, text = folder
    training, validation = datasets(path)
    assert training[0].dtype == torch.uint8
    # 95 % of the bytes; a window has the byte that follows it, too.
    assert [bytes(row.tolist()) for row in training] == [text[i : i + 9] for i in range(0, 1424, 8)]
    last = [text[i : i + 9] for i in range(1425, 1497, 8)]
    assert [bytes(row.tolist()) for row in validation] == last
    # Several paths are taken in their order.
    assert_windows_of(datasets(path / "sub", path / "a.txt"), text[701:] + text[:701])


def test_a_run_that_saves_beside_its_data_can_be_resumed(folder, monkeypatch):
    """Its own checkpoints are no data; those of others are."""
    path, text = folder
    link = path.parent / "link"
    link.symlink_to(path)
    monkeypatch.chdir(link)
    options = "--data . --context 8 --layers 1 --heads 1 --dim 8 --experts 1 --batch-size 4".split()
    h.go(t.train, None, *options, "--steps", 4, defaults=t.OPTIONS)
    h.go(t.train, None, "--resume", "latest", "--steps", 6, defaults=t.OPTIONS)
    assert t.load_checkpoint(path / "checkpoints" / "final.pt")["step"] == 6
    assert_windows_of(datasets(path, left_out=path / "checkpoints"), text)
    assert len(datasets(path)[0]) > len(text) / 8


def test_the_fingerprint_knows_content_and_not_place(folder):
    path, _ = folder
    before = [t.fingerprint(one) for one in datasets(path)]
    (path / "sub").rename(path / "sub2")
    assert [t.fingerprint(one) for one in datasets(path)] == before and before[0] != before[1]
    whole = (path / "sub2" / "d").read_bytes()
    # The last one that is in a window is validation data.
    for place, change in (100, [False, True]), (-3, [True, False]):
        changed = bytearray(whole)
        changed[place] ^= 1
        (path / "sub2" / "d").write_bytes(changed)
        after = [t.fingerprint(one) for one in datasets(path)]
        assert [one == other for one, other in zip(after, before)] == change


def test_the_default_data_is_pythons_own_source():
    top = Path(sysconfig.get_path("stdlib"))
    omitted = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = sorted(path for path in top.rglob("*.py") if path.is_file())
    kept = [path for path in files if omitted.isdisjoint(path.relative_to(top).parts)]
    assert_windows_of(datasets(context=128), b"".join(path.read_bytes() for path in kept))
    assert len(kept) > 300
