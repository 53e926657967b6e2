"""The order of the data, what is random about it, the built-in program's text, its fingerprint."""

import os
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ask_to_leave, refused, session

import train_graceful as t


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000])
def test_shuffled_is_a_permutation_that_depends_on_its_key(n):
    orders = [t.shuffled(np.arange(n), n, key).tolist() for key in (b"0 0", b"0 1", b"1 0")]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert [t.shuffled(np.array([i]), n, b"0 0").item() for i in range(n)] == orders[0]
    if n >= 16:
        assert orders[0] != orders[1] != orders[2] != orders[0]


class Numbers(torch.utils.data.Dataset):
    """Sample i is i and a random number from each generator."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple:
        return index, torch.rand(()).item(), random.random(), float(np.random.rand())


def noisy_collate(samples: list[tuple]) -> list[tuple]:
    """A batch as a list of its samples, and a last one that is random."""
    return [*samples, (-1, torch.rand(()).item(), random.random(), float(np.random.rand()))]


def batches_of(
    training=103, validation=23, batch_size=10, seed=0, rank=0, world_size=1, validated=None
) -> t.Batches:
    validated = validation if validated is None else validated
    data = Numbers(training), Numbers(validation), noisy_collate
    return t.Batches(*data, batch_size, seed, validated, rank, world_size)


def indices(batches: t.Batches, split: str, number: int) -> list[int]:
    """Of the samples of a batch, those that count."""
    batch, count = batches[split, number]
    return [sample[0] for sample in batch[:-1]][:count]


def test_an_epoch_is_one_pass_over_the_samples_in_whole_batches():
    batches = batches_of()
    assert batches.per_epoch == 10
    orders = []
    for epoch in (0, 1, 7):
        order = [indices(batches, "training", 10 * epoch + number) for number in range(10)]
        assert all(len(batch) == 10 for batch in order)
        orders.append(sum(order, []))
        # What fills no batch, another part in each epoch, is left out.
        assert len(set(orders[-1])) == 100 and set(orders[-1]) < set(range(103))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len({frozenset(order) for order in orders}) == 3


def test_a_batch_and_its_randomness_are_a_pure_function_of_seed_and_number():
    batches = batches_of()
    numbers = [25, 3, 24, 25, 0]
    # In any order, whatever was drawn between.
    found = {number: batches["training", number] for number in numbers}
    torch.manual_seed(5)
    random.seed(6)
    np.random.seed(7)
    again = batches_of()
    assert all(again["training", number] == found[number] for number in reversed(numbers))
    other = batches_of(seed=1)
    for number in numbers:
        assert other["training", number] != found[number]
    assert indices(other, "training", 3) != indices(batches, "training", 3)


def test_the_randomness_of_a_sample_is_one_of_seed_epoch_and_index_alone():
    """Whatever stands beside it in a batch, and whoever computes it."""

    def drawn(epoch: int, **settings) -> dict[int, tuple]:
        batches = batches_of(training=100, **settings)
        samples = {}
        for number in range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch):
            samples |= {sample[0]: sample for sample in batches["training", number][0][:-1]}
        return samples

    one = drawn(2)
    assert len({sample[1:] for sample in one.values()}) == 100
    assert drawn(2, batch_size=25) == one
    assert drawn(2, rank=0, world_size=2) | drawn(2, rank=1, world_size=2) == one
    assert all(drawn(3)[index] != one[index] for index in range(100))
    assert all(drawn(2, seed=1)[index] != one[index] for index in range(100))


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_any_number_of_workers_gives_the_same_batches(workers):
    batches = batches_of()
    # An evaluation comes between training batches.
    keys = [("training", number) for number in range(8, 11)]
    keys += [("validation", number) for number in range(3)]
    keys += [("training", number) for number in range(11, 15)]
    items, started = t.started_loader(batches, iter(keys), workers, False)
    try:
        assert len(started) == workers
        assert list(items) == [batches[key] for key in keys]
    finally:
        t.end_children(started)


def test_every_rank_has_an_equal_part_of_every_batch():
    whole = batches_of(batch_size=12)
    for world_size in (2, 3):
        parts = [
            batches_of(batch_size=12, rank=r, world_size=world_size) for r in range(world_size)
        ]
        for number in (0, 7, 8, 30):
            shares = [indices(part, "training", number) for part in parts]
            assert {len(share) for share in shares} == {12 // world_size}
            assert sorted(sum(shares, [])) == sorted(indices(whole, "training", number))
        # What collate draws is another thing for each.
        assert len({part["training", 0][0][-1] for part in parts}) == world_size


@pytest.mark.parametrize("validation", [1, 9, 10, 23, 30])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_an_evaluation_has_every_sample_once_and_as_many_passes_on_every_rank(
    validation, world_size
):
    ranks = [
        batches_of(validation=validation, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    passes = {batches.per_evaluation for batches in ranks}
    assert passes == {-(-validation // 10)}
    seen = []
    for batches in ranks:
        for number in range(batches.per_evaluation):
            seen += indices(batches, "validation", number)
            # Who has no sample of its own computes one all the same, that does not count.
            assert len(batches["validation", number][0]) >= 2
    assert sorted(seen) == list(range(validation))


def test_eval_batches_are_evenly_spread_and_always_the_same():
    batches = batches_of(validation=1000, validated=20)
    assert batches.per_evaluation == 2
    chosen = indices(batches, "validation", 0) + indices(batches, "validation", 1)
    assert chosen == list(range(0, 1000, 50))
    ranks = [batches_of(validation=1000, validated=20, rank=r, world_size=2) for r in range(2)]
    shares = [indices(one, "validation", number) for one in ranks for number in range(2)]
    assert sorted(sum(shares, [])) == chosen


@pytest.mark.parametrize("eval_batches, samples", [(1, 4), (2, 8), (9, 11)])
def test_eval_batches_says_how_many_are_evaluated(tmp_path, eval_batches, samples):
    seen = []

    def train(run):
        run.data(Numbers(8), Numbers(11))
        model = run.model(torch.nn.Linear(1, 1))

        def evaluate(batch):
            seen.extend(batch[0].tolist())
            return {"loss": batch[1]}

        for index, *_ in run.batches(evaluate):
            run.log(loss=model(index.float().unsqueeze(1)).mean())

    arguments = ["--checkpoint-dir", tmp_path, "--eval-batches", eval_batches]
    assert session(*arguments, train=train, steps=1, batch_size=4) == 0
    assert seen == [index * 11 // samples for index in range(samples)]


def random_body(seen: list[tuple]):
    """A train(run) that notes what is random in the loop's body and in evaluate."""

    def train(run):
        run.data(Numbers(40), Numbers(8))
        model = run.model(torch.nn.Linear(1, 1))
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 1e-9))

        def note(what: str) -> None:
            seen.append((what, run.step, torch.rand(()).item(), random.random(), np.random.rand()))

        def evaluate(batch):
            note("evaluation")
            return {"loss": batch[1]}

        for index, *_ in run.batches(evaluate):
            note("body")
            model(index.float().unsqueeze(1)).mean().backward()
            optimizer.step()
            if run.step + 1 == run.options.stop:
                ask_to_leave(run)

    return train


def test_what_is_random_in_the_loop_is_the_same_with_any_workers_and_after_a_resume(tmp_path):
    def drawn(*args) -> list[tuple]:
        seen: list[tuple] = []
        options = {"steps": 12, "batch_size": 4, "eval_every": 5, "stop": t.option(0, fixed=False)}
        session("--checkpoint-dir", tmp_path, *args, train=random_body(seen), **options)
        return seen

    whole = drawn()
    bodies = [one for one in whole if one[0] == "body"]
    assert [step for _, step, *_ in bodies] == list(range(12))
    assert len({one[2:] for one in bodies}) == 12
    # Every evaluation draws the same, so that only the model makes them differ.
    evaluations = {}
    for _, step, *numbers in (one for one in whole if one[0] == "evaluation"):
        evaluations.setdefault(step, []).append(numbers)
    assert evaluations.keys() == {5, 10, 12}
    assert evaluations[5] == evaluations[10] == evaluations[12] and len(evaluations[5]) == 2
    for workers in (2, 3):
        assert drawn("--workers", workers) == whole
    stopped = drawn("--stop", 7, "--workers", 1)
    resumed = drawn("--resume", "latest", "--stop", 0)
    assert [one for one in stopped + resumed if one[0] == "body"] == bodies


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield torch.zeros(1)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            (Numbers(8), Endless()),
            ["validation data is map-style", "Endless", "__getitem__(index)"],
        ),
        ((Numbers(8), iter([1, 2])), ["validation data is map-style", "__len__()"]),
        ((Numbers(3),), ["3 training samples, where 4 are needed"]),
        ((Numbers(8), Numbers(0)), ["0 validation samples, where 1"]),
    ],
)
def test_data_without_an_index_or_too_short_is_refused(capfd, arguments, words):
    def train(run):
        run.data(*arguments)
        raise AssertionError

    assert session(train=train, steps=5, batch_size=4) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: run.data: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


# What the built-in program reads.


@pytest.fixture
def folder(tmp_path):
    """1,500 distinct-looking bytes over files that end in the middle of windows, with a hidden and
    an empty file between."""
    text = bytes((i * i // 7 + i) % 251 for i in range(1500))
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    files = {"a.txt": text[:701], "b.bin": b"", "sub/c.py": text[701:705], "sub/d": text[705:]}
    for name, part in {**files, ".hidden": b"zzz"}.items():
        (data / name).write_bytes(part)
    (data / ".git").mkdir()
    (data / ".git" / "config").write_bytes(b"zzz")
    return data, text


def datasets(*paths: Path, context=8, left_out=Path("/nowhere")):
    return t.text_datasets([str(path) for path in paths], context, left_out)


def text_of(windows: torch.Tensor) -> bytes:
    """What windows consist of, end to end."""
    return windows[:, :-1].numpy().tobytes() + windows[-1, -1:].numpy().tobytes()


def assert_windows_of(both: list[torch.Tensor], text: bytes) -> None:
    """Over all of it, but for what fills no window at the end of its two parts."""
    cut = len(text) - len(text) // 20
    for windows, part in zip(both, (text[:cut], text[cut:]), strict=True):
        seen = text_of(windows)
        assert part.startswith(seen) and len(part) - len(seen) < windows.shape[1] - 1


def test_the_windows_lie_end_to_end_over_files_and_the_last_part_is_for_validation(folder):
    path, text = folder
    training, validation = datasets(path)
    assert training[0].dtype == torch.uint8
    windows = [bytes(training[i].tolist()) for i in range(len(training))]
    # 95 % of the bytes; a window has the byte that follows it, too.
    assert windows == [text[i * 8 : i * 8 + 9] for i in range(178)] and 178 == (1425 - 1) // 8
    windows = [bytes(validation[i].tolist()) for i in range(len(validation))]
    assert windows == [text[1425 + i * 8 : 1425 + i * 8 + 9] for i in range(9)]


def test_several_paths_are_taken_in_their_order(folder, tmp_path):
    path, text = folder
    one, other = path / "a.txt", path / "sub"
    assert_windows_of(datasets(other, one), text[701:] + text[:701])


def test_its_own_checkpoints_and_hidden_files_are_no_data(folder):
    path, text = folder
    (path / "ck" / "emergency_exit").mkdir(parents=True)
    for name in ("final.pt", "metrics.csv", "emergency_exit/emergency_step_1.pt"):
        (path / "ck" / name).write_bytes(b"zzz")
    assert_windows_of(datasets(path, left_out=path / "ck"), text)
    assert [text_of(one).count(b"zzz") for one in datasets(path)] == [3, 0]


def test_a_run_that_saves_beside_its_data_can_be_resumed(folder, monkeypatch):
    path, _ = folder
    link = path.parent / "link"
    link.symlink_to(path)
    monkeypatch.chdir(link)
    sizes = ["--context", 8, "--layers", 1, "--heads", 1, "--dim", 8, "--experts", 1]
    options = ["--data", ".", *sizes, "--batch-size", 4, "--eval-every", 2]
    assert session(*options, "--steps", 4) == 0
    assert (path / "checkpoints" / "final.pt").exists()
    assert session("--resume", "latest", "--steps", 6) == 0
    assert t.load_checkpoint(path / "checkpoints" / "final.pt")["step"] == 6
    assert session(*options, "--steps", 4) == 0
    first, second = (
        t.load_checkpoint(path / "checkpoints" / name)["data_fingerprint"]
        for name in ("final.pt", "final_2.pt")
    )
    assert first == second


def test_the_fingerprint_knows_content_and_not_place(folder):
    path, text = folder

    def saved() -> list:
        return [t.fingerprint(one) for one in datasets(path)]

    before = saved()
    (path / "sub").rename(path / "sub2")
    (path / "sub2" / ".later").write_bytes(b"zzz")
    assert saved() == before and before[0] != before[1]
    for place, change in (100, [False, True]), (-3, [True, False]):
        changed = bytearray((path / "sub2" / "d").read_bytes())
        changed[place] ^= 1
        (path / "sub2" / "d").write_bytes(changed)
        # The last one that is in a window is validation data.
        assert [one == other for one, other in zip(saved(), before)] == change
        changed[place] ^= 1
        (path / "sub2" / "d").write_bytes(changed)


def test_the_default_data_is_pythons_own_source():
    top = Path(sysconfig.get_path("stdlib"))
    omitted = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = [
        path
        for path in sorted(top.rglob("*.py"))
        if path.is_file() and omitted.isdisjoint(path.relative_to(top).parts)
    ]
    both = training, validation = datasets(context=128)
    assert len(files) > 300
    assert_windows_of(both, b"".join(path.read_bytes() for path in files))
    assert len(training) > 18 * len(validation) > 0


def test_many_files_hold_no_descriptors(tmp_path):
    for i in range(300):
        (tmp_path / f"{i:03}").write_bytes(bytes([i % 256]) * 50)
    before = len(os.listdir("/dev/fd"))
    training, _ = datasets(tmp_path)
    assert training[1700].tolist() == [272 % 256] * 9
    assert [training[i].shape for i in range(len(training))] == [(9,)] * len(training)
    assert len(os.listdir("/dev/fd")) == before


def test_text_that_is_too_short_is_refused(tmp_path):
    short = tmp_path / "short.txt"
    short.write_bytes(b"x" * 300)
    message = refused("--data", short, "--context", 16, "--checkpoint-dir", tmp_path / "ck")
    assert message == f"--data {short}: 300 bytes are too few"
    assert not (tmp_path / "ck").exists()
