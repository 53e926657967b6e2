"""Samplers, streams, wrapped optimizers and what else a loop may do: stopped anywhere, it is resumed bit for bit."""

import functools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ask_to_leave,
    assert_same,
    assert_same_run,
    finished,
    metrics_without_times,
    session,
)
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    WeightedRandomSampler,
    random_split,
)

import train_graceful as tg

OPTIONS = {"batch_size": 4, "steps": 12, "eval_every": 5, "save_every": 100, "log_every": 1}
OPTIONS |= {"lr": tg.option(0.05, fixed=False), "stop": tg.option(0, fixed=False)}


class Rows(Dataset):
    """Rows of two classes with their index, moved at random each time that they are looked at."""

    def __init__(self, count: int = 20) -> None:
        self.rows = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        row = self.rows[index]
        return row + 0.1 * torch.randn(4), (row.sum() > 0).long(), index


def sgd(run: tg.Run, module: nn.Module) -> Optimizer:
    parameters = module.parameters()
    return run.keep(optimizer=SGD(parameters, run.options.lr, momentum=0.9))


def loss_of(module: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def update(run: tg.Run, module: nn.Module, optimizer: Optimizer, batch) -> torch.Tensor:
    optimizer.zero_grad()
    loss = loss_of(module, batch)
    loss.backward()
    optimizer.step()
    return loss


def losses(run: tg.Run, module: nn.Module):
    def evaluate(batch):
        return {"loss": F.cross_entropy(module(batch[0]), batch[1], reduction="none")}

    return evaluate


def program(
    data=lambda run: run.data(Rows(), Rows(7)),
    begin=sgd,
    body=update,
    model=lambda: nn.Linear(4, 2),
    evaluate=losses,
    **how,
):
    """train(run): begin(run, module) keeps what a test is about, body(run, module, it, batch) trains.

    In the body of batch --stop it asks to leave.
    """

    def train(run: tg.Run) -> None:
        data(run)
        module = run.model(model())
        kept = begin(run, module)
        evaluated = evaluate(run, module) if evaluate else None
        for batch in run.batches(evaluated, **how):
            run.log(loss=body(run, module, kept, batch))
            if isinstance(batch, (list, tuple)):
                run.log(index=batch[2].float().mean(), size=len(batch[2]))
            if run.step + 1 == run.options.stop:
                ask_to_leave(run)

    return train


def go(train, directory: Path, *args, code: int = 0, **options) -> None:
    arguments = ("--checkpoint-dir", directory, *args)
    assert session(*arguments, train=train, **{**OPTIONS, **options}) == code


def resume(train, directory: Path, *args, code: int = 0, **options) -> None:
    go(train, directory, "--resume", "latest", *args, code=code, **options)


def assert_resumes(train, tmp_path: Path, stop: int = 7, before=(), after=(), **options) -> Path:
    """Stopped in this batch and resumed it ends with the bits of the run that was not stopped."""
    go(train, tmp_path / "whole", **options)
    go(train, tmp_path / "parts", "--stop", stop, *before, code=143, **options)
    resume(train, tmp_path / "parts", *after, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    return tmp_path / "parts"


def column(directory: Path, name: str, file: str = "metrics.csv") -> list[float]:
    return [float(row[name]) for row in metrics_without_times(directory, file)]


def final(directory: Path, name: str = "final.pt") -> dict:
    """As anybody reads it."""
    return torch.load(directory / name, weights_only=True)


def mistake(capfd, train, *args, session=go, **options) -> str:
    """The one line on standard error that a run ends with, with exit code 2."""
    capfd.readouterr()
    session(train, *args, code=2, **options)
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def ranks(group, train, directory: Path, *args, size: int = 2, code: int = 0, **options) -> str:
    """So many processes run it to its end; what the first one printed."""
    run = lambda: tg.main(train, **{**OPTIONS, **options})
    texts, codes = finished(group(size, "--checkpoint-dir", directory, *args, program=run))
    assert codes == [code] * size, texts
    return texts[0]


# ---- samplers


def weighted(epoch: int) -> np.ndarray:
    """Of an epoch's twenty samples none is of the first ten."""
    return np.random.choice(20, 20, p=np.repeat([0, 0.1], 10))


def buckets(epoch: int) -> list[list[int]]:
    order = (10 + torch.randperm(10)).tolist()
    return [order[:2], order[2:8], [*order[6:], *order[:4]], order[4:8]]


def weighted_by_torch(**settings) -> WeightedRandomSampler:
    return WeightedRandomSampler([0.0] * 10 + [1.0] * 10, 20, **settings)


SAMPLERS = {
    "indices": lambda: weighted,
    "batches": lambda: buckets,
    "torch": weighted_by_torch,
    "own generator": lambda: weighted_by_torch(generator=torch.Generator()),
}


def sampled(sampler):
    return program(lambda run: run.data(Rows(), Rows(7), sampler=sampler()))


@pytest.mark.parametrize("workers", [(0, 2), (2, 0), (1, 2)], ids=str)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_goes_on_in_the_middle_of_an_epoch(tmp_path, name, workers):
    before, after = (("--workers", number) for number in workers)
    parts = assert_resumes(sampled(SAMPLERS[name]), tmp_path, before=before, after=after)
    sizes = [2, 6, 8, 4] if name == "batches" else [4] * 5
    assert column(parts, "size") == (sizes * 3)[:12]
    index, epoch = column(parts, "index"), len(sizes)
    assert min(index) >= 10 and index[:epoch] != index[epoch : 2 * epoch]


def test_each_batch_of_a_sampler_is_dealt_out_to_the_ranks(tmp_path, group):
    train = sampled(lambda: buckets)
    go(train, tmp_path / "alone")
    ranks(group, train, tmp_path / "whole")
    ranks(group, train, tmp_path / "parts", "--stop", 6, "--workers", 1, code=143)
    ranks(group, train, tmp_path / "parts", "--resume", "latest")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert column(tmp_path / "whole", "size") == [1, 3, 4, 2] * 3
    alone = column(tmp_path / "alone", "index")
    assert column(tmp_path / "whole", "index") == pytest.approx(alone)


def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path, group):
    train = sampled(lambda: lambda epoch: [[1, 2], [3, 4, 5]])
    text = ranks(group, train, tmp_path, code=2)
    assert "no multiple of 2 processes" in text and "Traceback" not in text


@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_of_a_sampler_has_as_many_batches(tmp_path, capfd, workers):
    train = sampled(lambda: lambda epoch: range(20 - 4 * epoch))
    words = mistake(capfd, train, tmp_path, "--workers", workers)
    assert "run.data(sampler=...): epoch 1 has 4 batches, not 5" in words


class Epochs(Rows):
    """Its rows depend on the epoch that it was told."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int):
        row, label, _ = super().__getitem__(index)
        return row + self.epoch, label, self.epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_hears_its_epoch_where_its_samples_are_loaded(tmp_path, workers):
    train = program(lambda run: run.data(Epochs(), Rows(7)))
    parts = assert_resumes(train, tmp_path, workers=workers)
    assert column(parts, "index") == [step // 5 for step in range(12)]


# ---- streams, and no data


class Numbers(IterableDataset):
    """Five batches an epoch for each of `size` ranks, from a place that it can tell."""

    def __init__(self, rank: int = 0, size: int = 1, batches: int = 5) -> None:
        self.rank, self.size, self.batches = rank, size, batches
        self.place = self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        while self.place < self.batches:
            self.place += 1
            number = 100 * self.epoch + self.place * self.size + self.rank
            rows = torch.randn(4, 4) + number % 7
            yield rows, (rows.sum(1) > 0).long(), torch.full([4], number)
        self.place = 0

    def state_dict(self) -> dict:
        return {"place": self.place}

    def load_state_dict(self, state: dict) -> None:
        self.place = state["place"]


class Loader(DataLoader):
    """As those that know their place are: it asks its dataset."""

    def state_dict(self) -> dict:
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.dataset.load_state_dict(state)


STREAMS = {
    "dataset": lambda run: Numbers(run.rank, run.world_size),
    "loader": lambda run: Loader(Numbers(), batch_size=None),
}
EPOCHS = [100 * epoch + number for epoch in range(3) for number in range(1, 6)]


def streamed(stream=STREAMS["dataset"], validation=None):
    return program(lambda run: run.data(stream(run), validation), evaluate=validation and losses)


@pytest.mark.parametrize("stop", [1, 5, 7])
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_goes_on_where_it_was(tmp_path, capfd, name, stop):
    """In the middle of an epoch, and at its end."""
    parts = assert_resumes(streamed(STREAMS[name], Rows(7)), tmp_path, stop, after=("--workers", 2))
    assert column(parts, "index") == EPOCHS[:12]
    assert "begins it anew" not in capfd.readouterr().out


def test_a_stream_that_knows_no_place_begins_anew(tmp_path, capfd):
    train = streamed(lambda run: DataLoader(Numbers(), batch_size=None))
    go(train, tmp_path, "--stop", 7, code=143)
    line = "⚠️ The stream has no state_dict and load_state_dict: resumed it begins anew"
    assert line in capfd.readouterr().out
    resume(train, tmp_path)
    assert column(tmp_path, "index") == [*EPOCHS[:7], *EPOCHS[5:10]]


def test_a_stream_for_each_rank(tmp_path, group, capfd):
    train = streamed()
    ranks(group, train, tmp_path / "whole")
    ranks(group, train, tmp_path / "parts", "--stop", 7, code=143)
    assert "a stream of 2 ranks; --weights" in mistake(
        capfd, train, tmp_path / "parts", session=resume
    )
    ranks(group, train, tmp_path / "parts", "--resume", "latest")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert column(tmp_path / "parts", "index")[:2] == [2.5, 4.5]


def test_no_data_gives_the_steps(tmp_path):
    def body(run, module, optimizer, step):
        assert step == run.step
        return update(run, module, optimizer, [torch.randn(4, 4), torch.arange(4) % 2])

    data = lambda run: None
    assert_resumes(program(data, body=body, evaluate=None), tmp_path / "none")
    data = lambda run: run.data(None, Rows(7))
    parts = assert_resumes(program(data, body=body), tmp_path / "validation", workers=2)
    assert final(parts)["evaluation"]["step"] == 12


NO_STREAMS = {
    "Numbers yields no batches": (lambda run: Numbers(batches=0), {}),
    "Give --steps": (STREAMS["dataset"], {"steps": None, "epochs": 2}),
    "int is no dataset or stream": (lambda run: 5, {}),
}


@pytest.mark.parametrize("words", NO_STREAMS)
def test_a_stream_that_is_none_or_has_no_end_is_refused(tmp_path, capfd, words):
    stream, options = NO_STREAMS[words]
    assert words in mistake(capfd, streamed(stream), tmp_path, **options)


# ---- what the data is known by, and its generators


def joined(part: Dataset) -> Dataset:
    return ConcatDataset([part, part])


@pytest.mark.parametrize("wrap", [lambda part: part, joined], ids=["split", "joined"])
def test_another_split_is_refused_and_the_same_one_goes_on(tmp_path, capfd, wrap):
    def split(run: tg.Run) -> None:
        generator = torch.Generator().manual_seed(run.options.split)
        run.data(*map(wrap, random_split(Rows(24), [16, 8], generator)))

    train, options = program(split), {"split": tg.option(0, fixed=False)}
    parts = assert_resumes(train, tmp_path, **options)
    words = mistake(capfd, train, parts, "--split", 1, session=resume, **options)
    assert "the data is not what the run of" in words and "--weights" in words
    go(train, parts, "--weights", "latest", "--split", 1, **options)


class Noise:
    def __init__(self) -> None:
        self.generator = np.random.default_rng()

    def __call__(self, samples: list):
        rows, labels, indices = torch.utils.data.default_collate(samples)
        return rows + torch.from_numpy(self.generator.normal(size=(4, 4))).float(), labels, indices

    def sampler(self, epoch: int) -> np.ndarray:
        return self.generator.permutation(20)


class Annotated(Rows):
    def __init__(self) -> None:
        super().__init__()
        boxes = [{"boxes": [[n, 1.0], [2.0, 3.0]], "names": ["a", "b"]} for n in range(1000)]
        self.annotations, self.more = boxes, {"files": [{"name": [str(n)]} for n in range(1000)]}
        self.noise = Noise()

    def __getitem__(self, index: int):
        row, label, _ = super().__getitem__(index)
        return row + self.noise.generator.normal(), label, index


def in_a_closure() -> dict:
    noise = Noise()
    return {"training": Rows(), "collate": lambda samples: noise(samples)}


GENERATORS = {
    "beside annotations": lambda: {"training": Annotated()},
    "in a closure": in_a_closure,
    "of a method": lambda: {"training": Rows(), "collate": Noise().__call__},
    "of a sampler": lambda: {"training": Rows(), "sampler": Noise().sampler},
    "of a partial": lambda: {
        "training": Rows(),
        "collate": functools.partial(Noise.__call__, Noise()),
    },
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_are_found_and_seeded(tmp_path, name):
    """They are made with seeds that no two programs have in common."""
    train = program(lambda run: run.data(**GENERATORS[name]()), evaluate=None)
    assert_resumes(train, tmp_path, before=("--workers", 2))


# ---- what a loop changes


def two_layers() -> nn.Sequential:
    """The first one does not train yet."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def unfreezes(run, module, optimizer, batch):
    if run.step == 3:
        run.module[0].requires_grad_(True)
    return update(run, module, optimizer, batch)


def test_parameters_that_the_loop_has_unfrozen_stay_so(tmp_path, capfd):
    parts = assert_resumes(program(body=unfreezes, model=two_layers), tmp_path)
    some = "⚙️ Changed: requires_grad in the script (it stays as saved).\n"
    assert some in capfd.readouterr().out and final(parts)["loop"]["frozen"] == []


@pytest.mark.parametrize("frozen_after", [True, False])
def test_what_the_loop_unfreezes_trains_on_every_rank_or_is_refused(tmp_path, group, frozen_after):
    """What is frozen when it is wrapped is not shared among ranks, and would be another on each."""

    def begin(run: tg.Run, module: nn.Module) -> Optimizer:
        run.module[0].requires_grad_(False)
        return sgd(run, module)

    def open_layers() -> nn.Module:
        return two_layers().requires_grad_(True)

    if not frozen_after:
        text = ranks(group, program(body=unfreezes, model=two_layers), tmp_path, code=2)
        assert "stays so on many ranks: freeze after" in text
        return
    train = program(begin=begin, body=unfreezes, model=open_layers)
    ranks(group, train, tmp_path / "whole")
    ranks(group, train, tmp_path / "parts", "--stop", 7, code=143)
    ranks(group, train, tmp_path / "parts", "--resume", "latest")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def last_layer(run: tg.Run, module: nn.Module) -> Optimizer:
    return run.keep(optimizer=SGD(module[1].parameters(), run.options.lr, momentum=0.9))


def adds_a_group(run, module, optimizer, batch):
    if run.step == 3:
        module[0].requires_grad_(True)
        optimizer.add_param_group({"params": [*module[0].parameters()], "lr": 0.01})
    if run.step == run.options.fails:
        raise RuntimeError("out of memory")
    return update(run, module, optimizer, batch)


FAILS = {"fails": tg.option(-1, fixed=False)}


def test_groups_of_parameters_that_the_loop_has_added(tmp_path):
    train = program(begin=last_layer, body=adds_a_group, model=two_layers)
    parts = assert_resumes(train, tmp_path, **FAILS)
    groups = final(parts)["optimizer_state_dicts"]["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [0.05, 0.01]


def test_a_batch_that_fails_after_it_has_added_a_group_is_not_saved(tmp_path, capfd):
    """As one does that has unfrozen too much for the memory."""
    train = program(begin=last_layer, body=adds_a_group, model=two_layers)
    go(train, tmp_path, "--fails", 3, code=1, **FAILS)
    assert "nothing half-updated is saved" in capfd.readouterr().out
    assert not list(tmp_path.rglob("*.pt"))


def with_a_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def sets_once(run, module, optimizer, batch):
    """As people do who freeze the statistics of a BatchNorm for the rest of the run."""
    if run.step == 3:
        run.module[1].eval()
    return update(run, module, optimizer, batch)


def steps_first(run, module, optimizer, batch):
    """A gradient that no step has used waits behind one of the same batch."""
    if run.step % 2 == 0:
        optimizer.step()
        optimizer.zero_grad()
    loss = loss_of(module, batch)
    loss.backward()
    return loss


def fades(run, module, optimizer, batch):
    """Instead of being set to zero."""
    loss = loss_of(module, batch)
    loss.backward()
    optimizer.step()
    for one in module.parameters():
        one.grad.mul_(0.5)
    return loss


class Precise(SGD):
    """Its averages have more digits than its weights; a mask says which weights have stepped."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for one in self.param_groups[0]["params"]:
            state = self.state[one]
            if not state:
                state["average"] = torch.zeros(one.shape, dtype=torch.float64)
                state["mask"] = torch.zeros(one.shape, dtype=torch.bool)
            state["mask"] |= one.grad != 0
            state["average"].lerp_(one.grad.double(), 0.1)
            one.sub_(0.1 * (state["average"] * state["mask"]).float())


def precise(run: tg.Run, module: nn.Module) -> Optimizer:
    return run.keep(optimizer=Precise(module.parameters(), run.options.lr))


CHANGES = {
    "modules in eval mode": {"body": sets_once, "model": with_a_norm},
    "a gradient behind a step": {"body": steps_first},
    "a gradient that fades": {"body": fades},
    "an optimizer's types": {"begin": precise},
}


@pytest.mark.parametrize("stop", [7, 8])
@pytest.mark.parametrize("change", CHANGES)
def test_what_else_a_loop_changes(tmp_path, change, stop):
    assert_resumes(program(**CHANGES[change]), tmp_path, stop)


def test_a_model_that_grows_in_the_loop_ends_the_run_with_a_line(tmp_path, capfd):
    """No checkpoint would fit it; the ones before are whole."""

    def body(run, module, optimizer, batch):
        if run.step == 6:
            module.weight = nn.Parameter(module.weight.detach().clone())
            optimizer.add_param_group({"params": [module.weight]})
        return update(run, module, optimizer, batch)

    go(program(body=body), tmp_path, code=2, save_every=5)
    said = capfd.readouterr()
    assert (
        said.err == "error: a kept optimizer has parameters that no run.model(...) had at first\n"
    )
    assert "Newest whole checkpoint" in said.out and tg.latest_checkpoint(tmp_path)


class Scaled(nn.Linear):
    """Its outputs are scaled by a buffer that is not in its state_dict."""

    def __init__(self, first) -> None:
        super().__init__(4, 2)
        self.register_buffer("scale", first, persistent=False)

    def forward(self, rows):
        outputs = super().forward(rows)
        return outputs if self.scale is None else outputs * (1 + self.scale.float().mean())


def mean_of(batch) -> torch.Tensor:
    return batch[0].mean(0)


BUFFERS = {
    "in place": (torch.zeros(4), lambda scale, batch: scale.add_(mean_of(batch))),
    "anew": (torch.zeros(4), lambda scale, batch: scale + mean_of(batch)),
    "longer": (torch.zeros(4), lambda scale, batch: torch.cat([scale, mean_of(batch)])),
    "from nothing": (None, lambda scale, batch: mean_of(batch)),
    "of another type": (torch.zeros(4), lambda scale, batch: (mean_of(batch) * 9).long()),
    "taken away": (torch.ones(4), lambda scale, batch: None),
}


def scaled(name: str):
    first, change = BUFFERS[name]

    def body(run, module, optimizer, batch):
        if run.step < 6:
            module.scale = change(module.scale, batch)
        if run.step == run.options.fails:
            raise RuntimeError("out of memory")
        return update(run, module, optimizer, batch)

    return program(body=body, model=lambda: Scaled(first if first is None else first.clone()))


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_that_no_state_dict_has(tmp_path, name):
    parts = assert_resumes(scaled(name), tmp_path, **FAILS)
    assert_same(final(parts)["loop"], final(tmp_path / "whole")["loop"])


@pytest.mark.parametrize("name", ["in place", "anew"])
def test_a_batch_that_fails_after_it_has_changed_a_buffer_is_done_again(tmp_path, name):
    go(scaled(name), tmp_path / "whole", **FAILS)
    go(scaled(name), tmp_path / "parts", "--fails", 5, code=1, **FAILS)
    resume(scaled(name), tmp_path / "parts", "--fails", -1, **FAILS)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


class Replay:
    """Arrays of all kinds; `numbers` change in place in every batch."""

    def __init__(self) -> None:
        self.numbers = np.zeros((6, 4))
        self.others = {
            "one": np.array(1.5),
            "sliced": np.arange(12.0).reshape(3, 4)[::2, 1:],
            "backwards": np.arange(4)[::-1],
            "empty": np.zeros((0, 3), np.int32),
            "bytes": np.arange(256, dtype=np.uint8),
            "half": np.array([0.1, np.inf], np.float16),
            "number": np.float32(0.1),
        }

    def state_dict(self) -> dict:
        return {"numbers": self.numbers, "others": self.others}

    def load_state_dict(self, state: dict) -> None:
        assert isinstance(state["numbers"], np.ndarray) and state["others"].keys() == {*self.others}
        self.numbers = state["numbers"]


def replay(run: tg.Run, module: nn.Module):
    return sgd(run, module), run.keep(replay=Replay())


def remembers(run, module, kept, batch):
    """It learns from what it has seen before, too."""
    optimizer, replay = kept
    rows = torch.from_numpy(replay.numbers).float().sum(0)
    replay.numbers[run.step % 6] = batch[0].mean(0)
    return update(run, module, optimizer, [batch[0] + 0.1 * rows, *batch[1:]])


def test_arrays_are_tensors_in_the_file_and_arrays_again(tmp_path):
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    train = program(begin=replay, body=remembers)
    go(train, whole)
    go(train, parts, "--stop", 7, code=143)
    resume(train, parts)
    left, right = final(whole), final(parts)
    assert_same(left["state_dicts"], right["state_dicts"])
    assert_same(left["model_state_dict"], right["model_state_dict"])
    assert isinstance(left["state_dicts"]["replay"]["others"]["half"], torch.Tensor)
    arrays = tg.load_checkpoint(parts / "final.pt")["state_dicts"]["replay"]["others"]
    for name, array in Replay().others.items():
        assert type(arrays[name]) is (float if name == "number" else np.ndarray)
        assert np.array_equal(arrays[name], array) and np.shape(arrays[name]) == np.shape(array)
        assert name == "number" or arrays[name].dtype == array.dtype


def test_a_periodic_checkpoint_has_an_array_as_it_was_at_its_step(tmp_path, monkeypatch):
    """It is written while the loop goes on and changes the array."""
    changed, save = threading.Event(), tg.save_checkpoint
    seen = {}

    def save_later(state, path) -> None:
        assert changed.wait(60)
        save(state, path)

    def body(run, module, kept, batch):
        seen[run.step] = kept[1].numbers.copy()
        loss = remembers(run, module, kept, batch)
        if run.step == 3:
            changed.set()
        return loss

    monkeypatch.setattr(tg, "save_checkpoint", save_later)
    go(program(begin=replay, body=body, evaluate=None), tmp_path, save_every=3, keep=9)
    for step in (3, 6, 9):
        state = tg.load_checkpoint(tmp_path / f"step_{step}.pt")["state_dicts"]["replay"]
        assert np.array_equal(state["numbers"], seen[step])


# ---- what cannot be saved


class Notes:
    """What it holds changes in the loop."""

    def __init__(self, **state) -> None:
        self.state = state

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def noted(run: tg.Run, module: nn.Module):
    return sgd(run, module), run.keep(notes=Notes(items=[]))


def notes(run, module, kept, batch):
    kept[1].state["items"].append({"a": object()} if run.step == 7 else run.step)
    return update(run, module, kept[0], batch)


MEETINGS = {
    "save": ({"save_every": 3}, 9),
    "q": ({"stop": 9, "save_every": 6}, 9),
    "best": ({"save_every": 6}, 10),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_what_cannot_be_saved_ends_the_run_at_the_first_save_that_meets_it(tmp_path, capfd, name):
    options, step = MEETINGS[name]
    go(program(begin=noted, body=notes), tmp_path, code=2, **options)
    said = capfd.readouterr()
    where = "error: ['state_dicts']['notes']['items'][7]['a'] cannot be saved: it is a "
    assert (
        said.err.startswith(where + "builtins.object; dense tensors") and said.err.count("\n") == 1
    )
    assert said.err.endswith("(list(x), vars(x))\n") and f"Completed Steps: {step}\n" in said.out
    assert f"Newest whole checkpoint: {tmp_path / 'step_6.pt'}\n" in said.out
    assert not list(tmp_path.glob("emergency_exit/*"))


def test_an_exception_is_shown_where_nothing_can_be_saved_either(tmp_path, capfd):
    def body(run, module, optimizer, batch):
        if run.step == 8:
            raise ZeroDivisionError
        optimizer.param_groups[0]["note"] = object() if run.step == 7 else ""
        return update(run, module, optimizer, batch)

    go(program(body=body), tmp_path, code=1, save_every=6)
    said = capfd.readouterr()
    assert "ZeroDivisionError" in said.err and "Newest whole checkpoint" in said.out


@pytest.mark.parametrize("kind", [">i4", "longdouble", "U3", "datetime64[s]", "O"])
def test_an_array_that_torch_has_no_type_for_is_refused(tmp_path, capfd, kind):
    begin = lambda run, module: (run.keep(notes=Notes(a=np.zeros(3, kind))), sgd(run, module))[1]
    words = mistake(capfd, program(begin=begin), tmp_path)
    assert "['state_dicts']['notes']['a'] cannot be saved: it is a" in words


@pytest.mark.parametrize("persistent", [False, True])
def test_a_kept_module_of_which_nothing_is_saved_is_named(tmp_path, capfd, persistent):
    class Metric(nn.Module):
        def state_dict(self, *args, **settings) -> dict:
            return {"total": 1.0} if persistent else {}

        def load_state_dict(self, state) -> None:
            pass

    begin = lambda run, module: (run.keep(metric=Metric()), sgd(run, module))[1]
    go(program(begin=begin), tmp_path)
    line = "⚠️ run.keep(metric=...): its state is empty (a metric: persistent(True))."
    assert (line in capfd.readouterr().out) is not persistent


# ---- optimizers around optimizers


class Sam(Optimizer):
    """Steps with the gradient that it finds uphill."""

    def __init__(self, base: type[Optimizer], parameters, **settings) -> None:
        super().__init__(parameters, settings)
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def climb(self, sign: float = 1) -> None:
        for one in self.param_groups[0]["params"]:
            self.state[one].setdefault("uphill", one.grad.clone().sign_())
            one.add_(self.state[one]["uphill"], alpha=0.05 * sign)

    def step(self, closure=None) -> None:
        self.climb(-1)
        self.state.clear()
        self.base_optimizer.step()


class Lookahead(Optimizer):
    """Every third step leads halfway back to where it has looked last."""

    def __init__(self, base: type[Optimizer], parameters, **settings) -> None:
        self.inner = base(parameters, **settings)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups
        for one in self.param_groups[0]["params"]:
            self.state[one]["slow"] = one.detach().clone()
        self.param_groups[0]["steps"] = 0

    def climb(self) -> None:
        pass

    @torch.no_grad()
    def step(self, closure=None) -> None:
        self.inner.step()
        self.param_groups[0]["steps"] += 1
        if self.param_groups[0]["steps"] % 3 == 0:
            for one in self.param_groups[0]["params"]:
                one.copy_(self.state[one]["slow"].lerp_(one, 0.5))


WRAPPERS = {"Sam": (Sam, "base_optimizer"), "Lookahead": (Lookahead, "inner")}


def wrapped(name: str, kept: str, scheduled: str = "", by_hand: bool = False):
    """Kept is a list of what is kept, in this order: the outer one, the inner one."""
    kind, inner = WRAPPERS[name]

    def begin(run: tg.Run, module: nn.Module) -> tuple:
        outer = kind(SGD, module.parameters(), lr=run.options.lr, momentum=0.9)
        optimizers = {"outer": outer, "inner": getattr(outer, inner)}
        for label in kept.split():
            run.keep(**{label: optimizers[label]})
        scheduler = None
        if scheduled:
            scheduler = run.keep(scheduler=lr_scheduler.StepLR(optimizers[scheduled], 2, 0.8))
        return outer, scheduler

    def body(run, module, kept, batch):
        optimizer, scheduler = kept
        optimizer.zero_grad()
        loss_of(module, batch).backward()
        optimizer.climb()
        if run.step == run.options.fails:
            raise RuntimeError("out of memory")
        optimizer.zero_grad()
        loss = loss_of(module, batch)
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        return loss

    return program(begin=begin, body=body)


@pytest.mark.parametrize("scheduled", ["", "outer", "inner"])
@pytest.mark.parametrize("kept", ["outer", "outer inner", "inner outer"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_an_optimizer_around_another_one(tmp_path, name, kept, scheduled):
    parts = assert_resumes(wrapped(name, kept, scheduled), tmp_path, **FAILS)
    rates = list(dict.fromkeys(column(parts, "lr_outer")))
    assert rates == pytest.approx([0.05 * 0.8**n for n in range(7 if scheduled else 1)])
    label = "inner" if "inner" in kept else f"outer.{WRAPPERS[name][1]}.1"
    assert "momentum_buffer" in final(parts)["optimizer_state_dicts"][label]["state"][0]


@pytest.mark.parametrize("kept", ["outer", "outer inner", "inner outer"])
def test_weights_that_sam_has_moved_for_its_first_step_are_never_saved(tmp_path, capfd, kept):
    train = wrapped("Sam", kept)
    go(train, tmp_path / "whole", **FAILS)
    go(train, tmp_path / "parts", "--fails", 7, code=1, save_every=3, **FAILS)
    newest = tmp_path / "parts" / "step_6.pt"
    assert f"   Newest whole checkpoint: {newest}\n" in capfd.readouterr().out
    resume(train, tmp_path / "parts", "--fails", -1, **FAILS)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


class Averaging(Optimizer):
    """Schedule-free: it trains weights between a sequence and its average, which is evaluated."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "steps": 0, "trains": True})

    @torch.no_grad()
    def switch(self, trains: bool, weight: float) -> None:
        for group in self.param_groups:
            for one in group["params"] if group["trains"] is not trains else ():
                if "sequence" in self.state[one]:
                    one.lerp_(self.state[one]["sequence"], weight)
            group["trains"] = trains

    def eval(self) -> None:
        self.switch(False, 1 - 1 / 0.9)

    def train(self) -> None:
        self.switch(True, 1 - 0.9)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            assert group["trains"]
            group["steps"] += 1
            part = 1 / group["steps"]
            for one in group["params"]:
                sequence = self.state[one].setdefault("sequence", one.detach().clone())
                one.lerp_(sequence, part).add_(one.grad, alpha=group["lr"] * (0.9 * (1 - part) - 1))
                sequence.sub_(one.grad, alpha=group["lr"])


def averaging(evaluated: dict, trained: dict, stop_in_evaluation: int = 0):
    """It notes the weights that are evaluated, and those that are trained on, at each step."""

    def evaluate(run: tg.Run, module: nn.Module):
        def evaluate(batch):
            evaluated[run.step] = module.weight.detach().clone()
            if run.step == stop_in_evaluation:
                ask_to_leave(run)
            return losses(run, module)(batch)

        return evaluate

    def body(run, module, optimizer, batch):
        trained[run.step] = module.weight.detach().clone()
        return update(run, module, optimizer, batch)

    begin = lambda run, module: run.keep(optimizer=Averaging(module.parameters(), 0.1))
    return program(begin=begin, body=body, evaluate=evaluate)


@pytest.mark.parametrize("stop", [7, 10])
def test_a_schedule_free_optimizer_goes_on_with_the_weights_that_it_trains(tmp_path, stop):
    """Those of an evaluation are others; `show` says which of the two a checkpoint has."""
    evaluated, trained = {}, {}
    train = averaging(evaluated, trained)
    parts = assert_resumes(train, tmp_path, stop, save_every=5)
    state = final(parts, "step_5.pt")
    assert state["model_state_dict"]["weight"].equal(trained[5])
    assert not trained[5].equal(evaluated[5])


def test_an_evaluation_that_is_cut_short_leaves_schedule_free_weights_as_they_were(tmp_path):
    evaluated, trained = {}, {}
    go(averaging(evaluated, trained), tmp_path / "whole")
    go(averaging(evaluated, {}, stop_in_evaluation=5), tmp_path / "parts", code=143)
    state = final(tmp_path / "parts", "emergency_exit/emergency_step_5.pt")
    assert state["model_state_dict"]["weight"].equal(trained[5])
    resume(averaging({}, {}), tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# ---- what is said on resume


SCHEDULES = {
    "cosine": lambda optimizer, run: lr_scheduler.CosineAnnealingLR(optimizer, run.total_steps),
    "lambda": lambda optimizer, run: lr_scheduler.LambdaLR(
        optimizer, lambda n: 1 - n / run.total_steps
    ),
}


@pytest.mark.parametrize("stop", [7, 0], ids=["in the middle", "at the end"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_another_length_and_other_options_mean_is_said(tmp_path, capfd, name, stop):
    def begin(run, module):
        optimizer = sgd(run, module)
        return optimizer, run.keep(scheduler=SCHEDULES[name](optimizer, run))

    def body(run, module, kept, batch):
        loss = update(run, module, kept[0], batch)
        kept[1].step()
        return loss

    train = program(begin=begin, body=body)
    go(train, tmp_path, "--stop", stop, code=143 if stop else 0)
    resume(train, tmp_path, "--steps", 20, "--lr", "1e-05")
    said = capfd.readouterr().out
    changed = "⚙️ Changed: --steps 20 (was 12), --lr 1e-05 (was 0.05)."
    assert f"{changed} Learning rates and schedules that are kept go on as saved.\n" in said
    assert final(tmp_path)["step"] == 20 and max(column(tmp_path, "lr_optimizer")[13:]) > 1e-4


# ---- other beginnings


def wider(run: tg.Run, module: nn.Module) -> Optimizer:
    run.keep(more=Notes(a=1))
    return sgd(run, module)


def renamed(run: tg.Run, module: nn.Module) -> Optimizer:
    return run.keep(sgd=SGD(module.parameters(), run.options.lr))


# What is said: what is another then, the command line, the program's options.
EXTRA = {"extra": 5}
REFUSED = {
    "the data is not what": ({"data": lambda run: run.data(Rows(28), Rows(7))}, [], EXTRA),
    "more is kept by this run, but not in": ({"begin": wider}, [], EXTRA),
    "optimizer is in the checkpoint, but not kept": ({"begin": renamed}, [], EXTRA),
    "here is no --extra as in its run": ({}, [], {}),
    "whose run has --extra 5: leave it out": ({}, ["--extra", 6], EXTRA),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_go_on_can_begin_anew_with_the_weights(tmp_path, capfd, words):
    begun = []

    def body(run, module, optimizer, batch):
        if run.step == 0:
            begun.append((module.weight.detach().clone(), len(optimizer.state)))
        return update(run, module, optimizer, batch)

    how, arguments, options = REFUSED[words]
    go(program(), tmp_path, "--stop", 7, code=143, **EXTRA)
    before = final(tmp_path, "emergency_exit/emergency_step_7.pt")
    train = program(body=body, **how)
    said = mistake(capfd, train, tmp_path, *arguments, session=resume, **options)
    assert words in said and "--weights in the place of --resume begins a new run" in said
    go(train, tmp_path, "--weights", "latest", "--lr", 0.01, *arguments, **options)
    assert "📂 A new run, with the weights of " in capfd.readouterr().out
    assert begun[0][0].equal(before["model_state_dict"]["weight"]) and begun[0][1] == 0
    after = final(tmp_path)
    assert after["run_id"] != before["run_id"] and len(column(tmp_path, "loss")) == 7
    assert column(tmp_path, "step", "metrics_2.csv") == list(range(1, 13))


def two_models(run: tg.Run, module: nn.Module) -> Optimizer:
    run.model(nn.Linear(4, 2), "second")
    return sgd(run, module)


NO_WEIGHTS = {
    "--weights begins a new run: leave it out, or --resume": ({}, ["--resume", "latest"]),
    "emergency_step_7.pt does not fit second (": ({"begin": two_models}, []),
    "size mismatch for weight": ({"model": lambda: nn.Linear(4, 3)}, []),
}


@pytest.mark.parametrize("words", NO_WEIGHTS)
def test_weights_that_do_not_fit_are_a_mistake(tmp_path, capfd, words):
    how, arguments = NO_WEIGHTS[words]
    go(program(), tmp_path, "--stop", 7, code=143)
    said = mistake(capfd, program(**how), tmp_path, "--weights", "latest", *arguments)
    assert words in said and len(list(tmp_path.rglob("*.pt"))) == 2


@pytest.mark.parametrize("weights", [False, True])
def test_one_command_begins_and_goes_on(tmp_path, capfd, weights):
    go(program(), tmp_path / "others", "--stop", 3, code=143)
    arguments = ("--weights", tmp_path / "others" / "emergency_exit" / "emergency_step_3.pt")
    arguments = ("--resume", "auto", *(arguments if weights else ()))
    go(program(), tmp_path / "whole", *arguments)
    go(program(), tmp_path / "parts", *arguments, "--stop", 7, code=143)
    go(program(), tmp_path / "parts", *arguments)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert "⚙️" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["step_3.pt", "emergency_exit/emergency_step_4.pt", "final.pt"])
def test_resume_auto_begins_nothing_where_only_damaged_ones_are(tmp_path, capfd, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"damaged")
    assert "no checkpoint there" in mistake(capfd, program(), tmp_path, "--resume", "auto")
    assert path.read_bytes() == b"damaged" and len(list(tmp_path.rglob("*.pt"))) == 1


# ---- evaluations


def f1(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of values in the order of the samples, whatever their shape."""
    assert values["index"].tolist() == list(range(7)) and values["scores"].shape == (7, 3)
    guessed = values["scores"].argmax(1)
    hits = ((guessed == 1) & (values["label"] == 1)).sum()
    return {"f1": 2 * hits / ((guessed == 1).sum() + (values["label"] == 1).sum())}


def scores(run: tg.Run, module: nn.Module):
    def evaluate(batch):
        logits = module(batch[0])
        values = {"index": batch[2], "label": batch[1], "scores": logits @ torch.eye(2, 3)}
        return {**values, "loss": F.cross_entropy(logits, batch[1], reduction="none")}

    return evaluate


def wanders(run, module, optimizer, batch):
    """It changes the weights as any number of processes does."""
    with torch.no_grad():
        run.module.weight.copy_(torch.sin(torch.arange(8.0).view(2, 4) * (1 + run.step)))
    return loss_of(module, batch)


def summarized(summarize=f1, best="max f1"):
    return program(body=wanders, evaluate=scores, best=best, summarize=summarize)


def test_a_summary_of_all_samples_is_the_same_on_any_number_of_ranks(tmp_path, group):
    parts = assert_resumes(summarized(), tmp_path, eval_every=3)
    ranks(group, summarized(), tmp_path / "two", eval_every=3)
    rows = [row for row in metrics_without_times(parts) if row["val_f1"]]
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12]
    assert len({row["val_f1"] for row in rows}) > 2 and not {"val_index", "val_scores"} & {*rows[0]}
    left, right = metrics_without_times(parts), metrics_without_times(tmp_path / "two")
    assert [row["val_f1"] for row in left] == [row["val_f1"] for row in right]
    best = final(tmp_path / "two")["best"]
    assert best == final(parts)["best"] and best["value"] == max(float(r["val_f1"]) for r in rows)


WRONG = {
    "a number": (
        lambda values: 0.5,
        "max f1",
        "summarize gave 0.5, not {name: num",
    ),
    "two numbers": (lambda values: {"f1": torch.ones(2)}, "max f1", "summarize gave"),
    "a text": (lambda values: {"f1": "good"}, "max f1", "summarize gave"),
    "another name": (f1, "max f2", "evaluate has found loss, f1; best is 'max f2'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_summary_of_anything_else_is_a_mistake(tmp_path, capfd, name):
    summarize, best, words = WRONG[name]
    assert words in mistake(capfd, summarized(summarize, best), tmp_path)


def test_an_evaluation_at_the_end_of_every_epoch(tmp_path):
    parts = assert_resumes(program(), tmp_path, eval_every="epoch")
    rows = metrics_without_times(parts)
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [5, 10, 12]


# ---- a loop that ends itself


def test_a_loop_that_was_left_trains_on_with_more_patience(tmp_path):
    """With as much it ends where it has ended, with the same bits."""

    def train(run: tg.Run) -> None:
        run.data(Rows(), Rows(7))
        module = run.model(nn.Linear(4, 2))
        optimizer = sgd(run, module)

        def evaluate(batch):
            # It is best in step 4.
            return {"loss": torch.full([len(batch[0])], abs(run.step - 4.0))}

        for batch in run.batches(evaluate):
            if run.evaluation and run.step - run.best_step >= run.options.patience:
                break
            run.log(loss=update(run, module, optimizer, batch))
            if run.step + 1 == run.options.stop:
                ask_to_leave(run)

    options = {"eval_every": 2, "patience": tg.option(4, fixed=False)}
    go(train, tmp_path / "long", "--patience", 6, **options)
    go(train, tmp_path / "whole", **options)
    assert final(tmp_path / "whole")["step"] == 8 and final(tmp_path / "long")["step"] == 10
    go(train, tmp_path / "parts", "--stop", 7, code=143, **options)
    for _ in range(2):
        resume(train, tmp_path / "parts", **options)
        assert_same_run(tmp_path / "whole", tmp_path / "parts")
    resume(train, tmp_path / "parts", "--patience", 6, **options)
    assert_same_run(tmp_path / "long", tmp_path / "parts")
