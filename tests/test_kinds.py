"""Whatever a loop draws from, keeps and changes: stopped anywhere, it is resumed bit for bit."""

import functools
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    OWN,
    Rows,
    assert_resumes,
    assert_same,
    assert_same_run,
    column,
    finished,
    go,
    learning,
    loss_of,
    losses,
    metrics_without_times,
    mistake,
    resume,
    sgd,
    stopping,
    update,
)
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

import train_graceful as tg


def final(directory: Path, name: str = "final.pt") -> dict:
    """As anybody reads it."""
    return torch.load(directory / name, weights_only=True)


def ranks(group, train, directory: Path, *args, stop=None, code: int = 0, **options) -> str:
    """Two processes run it to its end; what the first one printed."""
    run = lambda: tg.main(stopping(train, stop), **{**OWN, **options})
    texts, codes = finished(group(2, "--checkpoint-dir", directory, *args, program=run))
    assert codes == [code] * 2, texts
    return texts[0]


def assert_ranks_resume(group, train, tmp_path: Path, *before) -> Path:
    ranks(group, train, tmp_path / "whole")
    ranks(group, train, tmp_path / "parts", *before, stop=8, code=143)
    ranks(group, train, tmp_path / "parts", "--resume", "latest")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    return tmp_path / "whole"


# ---- samplers


def weighted(epoch: int) -> np.ndarray:
    """Of an epoch's twenty samples none is of the first ten."""
    return np.random.choice(20, 20, p=np.repeat([0, 0.1], 10))


def buckets(epoch: int) -> list[list[int]]:
    order = (10 + torch.randperm(10)).tolist()
    return [order[:2], order[2:8], [*order[6:], *order[:4]], order[4:8]]


def weighted_by_torch(**settings) -> torch.utils.data.Sampler:
    return torch.utils.data.WeightedRandomSampler([0.0] * 10 + [1.0] * 10, 20, **settings)


SAMPLERS = {
    "indices": lambda: weighted,
    "batches": lambda: buckets,
    "torch": weighted_by_torch,
    "own generator": lambda: weighted_by_torch(generator=torch.Generator()),
}


class Epochs(Rows):
    """Its rows depend on the epoch that it was told."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int):
        row, label, _ = super().__getitem__(index)
        return row + self.epoch, label, 100 * self.epoch + index


def sampled(sampler):
    return learning(data=lambda run: run.data(Epochs(), Rows(7), sampler=sampler()))


@pytest.mark.parametrize("workers", [(0, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_goes_on_in_the_middle_of_an_epoch(tmp_path, name, workers):
    before, after = (("--workers", number) for number in workers)
    whole = assert_resumes(sampled(SAMPLERS[name]), tmp_path, before=before, after=after)
    sizes = [2, 6, 8, 4] if name == "batches" else [4] * 5
    assert column(whole, "size") == (sizes * 3)[:12]
    index = column(whole, "index")
    # The epoch is heard where a sample is loaded.
    assert [number // 100 for number in index] == [step // len(sizes) for step in range(12)]
    assert all(number % 100 >= 10 for number in index)
    assert {number % 100 for number in index[:4]} != {number % 100 for number in index[5:9]}


def test_each_batch_of_a_sampler_is_dealt_out_to_the_ranks(tmp_path, group):
    train = sampled(lambda: buckets)
    go(train, tmp_path / "alone")
    whole = assert_ranks_resume(group, train, tmp_path, "--workers", 1)
    assert column(whole, "size") == [1, 3, 4, 2] * 3
    assert column(whole, "index") == pytest.approx(column(tmp_path / "alone", "index"))
    odd = sampled(lambda: lambda epoch: [[1, 2], [3, 4, 5]])
    text = ranks(group, odd, tmp_path / "odd", code=2)
    assert "no multiple of 2 processes" in text and "Traceback" not in text


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


EPOCHS = [100 * epoch + number for epoch in range(3) for number in range(1, 6)]


def streamed(stream=lambda run: Numbers(run.rank, run.world_size), validation=None):
    evaluate = validation and losses
    return learning(data=lambda run: run.data(stream(run), validation), evaluate=evaluate)


def test_a_stream_goes_on_where_it_was(tmp_path, capfd):
    """In the middle of an epoch, and at its end."""
    train = streamed(validation=Rows(7))
    whole = assert_resumes(train, tmp_path, 1, 5, 7, after=("--workers", 2))
    assert column(whole, "index") == EPOCHS[:12]
    assert "begins it anew" not in capfd.readouterr().out


def test_a_stream_that_knows_no_place_begins_anew(tmp_path, capfd):
    train = streamed(lambda run: DataLoader(Numbers(), batch_size=None))
    go(train, tmp_path, stop=7)
    line = "⚠️ The stream has no state_dict and load_state_dict: resumed it begins anew"
    assert line in capfd.readouterr().out
    resume(train, tmp_path)
    assert column(tmp_path, "index") == [*EPOCHS[:7], *EPOCHS[5:10]]


def test_a_stream_for_each_rank(tmp_path, group, capfd):
    whole = assert_ranks_resume(group, streamed(), tmp_path)
    assert column(whole, "index")[:2] == [2.5, 4.5]
    words = mistake(capfd, streamed(), whole, "--resume", "latest", "--steps", 20)
    assert "a stream of 2 ranks; --weights" in words


def test_no_data_gives_the_steps(tmp_path):
    def body(run, module, optimizer, step):
        assert step == run.step
        return update(run, module, optimizer, [torch.randn(4, 4), torch.arange(4) % 2])

    train = learning(data=lambda run: run.data(None, Rows(7)), body=body)
    whole = assert_resumes(train, tmp_path, workers=2)
    assert final(whole)["evaluation"]["step"] == 12


NO_DATA = {
    "Numbers yields no batches": (streamed(lambda run: Numbers(batches=0)), {}),
    "Give --steps": (streamed(), {"steps": None, "epochs": 2}),
    "int is no dataset or stream": (streamed(lambda run: 5), {}),
    "run.data(sampler=...): epoch 1 has 4 batches, not 5": (
        sampled(lambda: lambda epoch: range(20 - 4 * epoch)),
        {"workers": 2},
    ),
}


@pytest.mark.parametrize("words", NO_DATA)
def test_data_without_batches_or_an_end_is_refused(tmp_path, capfd, words):
    train, options = NO_DATA[words]
    assert words in mistake(capfd, train, tmp_path, **options)


# ---- what the data is known by, and its generators


def joined(part):
    return torch.utils.data.ConcatDataset([part, part])


@pytest.mark.parametrize("wrap", [lambda part: part, joined], ids=["split", "joined"])
def test_another_split_is_refused_and_the_same_one_goes_on(tmp_path, capfd, wrap):
    def split(run: tg.Run) -> None:
        generator = torch.Generator().manual_seed(run.options.split)
        parts = torch.utils.data.random_split(Rows(24), [16, 8], generator)
        run.data(*map(wrap, parts))

    train, options = learning(data=split), {"split": tg.option(0, fixed=False)}
    whole = assert_resumes(train, tmp_path, **options)
    words = mistake(capfd, train, whole, "--resume", "latest", "--split", 1, **options)
    assert "the data is not what the run of" in words and "--weights" in words


class Noise:
    """With generators of its own, whose seeds no two programs have in common."""

    def __init__(self) -> None:
        self.generators = {"numpy": np.random.default_rng(), "torch": torch.Generator()}
        self.generators["torch"].seed()
        self.others = [np.random.RandomState(), random.Random()]

    def draw(self) -> float:
        drawn = [self.generators["numpy"].random(), self.others[0].rand(), self.others[1].random()]
        return sum(drawn) + torch.rand((), generator=self.generators["torch"]).item()

    def __call__(self, samples: list):
        rows, labels, indices = default_collate(samples)
        return rows + self.draw(), labels, indices

    def sampler(self, epoch: int) -> np.ndarray:
        return self.generators["numpy"].permutation(20)


class Annotated(Rows):
    """Its generators are those of its transforms, beside much that has to be looked through."""

    def __init__(self) -> None:
        super().__init__()
        boxes = [{"boxes": [[n, 1.0], [2.0, 3.0]], "names": ["a", "b"]} for n in range(1000)]
        self.annotations, self.more = boxes, {"files": [{"name": [str(n)]} for n in range(1000)]}
        self.transforms = Noise(), Noise()

    def __getitem__(self, index: int):
        row, label, _ = super().__getitem__(index)
        first, second = (noise.draw() for noise in self.transforms)
        assert first != second, "each has a stream of its own"
        return row + first + second, label, index


def in_a_closure() -> dict:
    noise = Noise()
    return {"collate": lambda samples: noise(samples)}


GENERATORS = {
    "of transforms": lambda: {"training": Subset(Annotated(), range(20))},
    "in a closure": in_a_closure,
    "of a method": lambda: {"collate": Noise().__call__},
    "of a sampler": lambda: {"sampler": Noise().sampler},
    "of a partial": lambda: {"collate": functools.partial(Noise.__call__, Noise())},
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_are_found_and_seeded(tmp_path, name):
    data = lambda run: run.data(**{"training": Rows(), **GENERATORS[name]()})
    assert_resumes(learning(data=data, evaluate=None), tmp_path, before=("--workers", 2))


# ---- what a loop changes

CHANGE = 7  # the step in which it does


def once(change, begin=sgd, model=lambda: nn.Linear(4, 2)):
    """The loop does this once; then its batch may fail, as what needs too much memory does."""

    def body(run, module, kept, batch):
        if run.step == CHANGE:
            change(run.module, kept)
        if run.step == run.options.fails:
            raise RuntimeError("out of memory")
        return update(run, module, kept, batch)

    return learning(begin, body, model=model)


def two_layers() -> nn.Sequential:
    """The first one does not train yet."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def all_of_two_layers() -> nn.Sequential:
    return two_layers().requires_grad_(True)


def unfreezes(module, optimizer) -> None:
    module[0].requires_grad_(True)


def last_layer(run: tg.Run, module: nn.Module) -> Optimizer:
    return run.keep(optimizer=SGD(module[2].parameters(), run.options.lr, momentum=0.9))


def adds_a_group(module, optimizer) -> None:
    optimizer.add_param_group({"params": [*module[0].parameters()], "lr": 0.01})


def grows(module, optimizer) -> None:
    module.weight = nn.Parameter(module.weight.detach().clone())
    optimizer.add_param_group({"params": [module.weight]})


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
            average = state.setdefault("average", torch.zeros(one.shape, dtype=torch.float64))
            mask = state.setdefault("mask", torch.zeros(one.shape, dtype=torch.bool))
            mask |= one.grad != 0
            average.lerp_(one.grad.double(), 0.1)
            one.sub_(0.1 * (average * mask).float())


def precise(run: tg.Run, module: nn.Module) -> Optimizer:
    return run.keep(optimizer=Precise(module.parameters(), run.options.lr))


class Scaled(nn.Linear):
    """Its outputs are scaled by a buffer that is not in its state_dict."""

    def __init__(self, first) -> None:
        super().__init__(4, 2)
        self.register_buffer("scale", first, persistent=False)

    def forward(self, rows):
        outputs = super().forward(rows)
        return outputs if self.scale is None else outputs * (1 + self.scale.float().mean())


ONE = torch.ones(1)
BUFFERS = {
    "in place": lambda scale: scale.add_(ONE),
    "anew": lambda scale: scale + ONE,
    "longer": lambda scale: torch.cat([scale, ONE]),
    "of another type": lambda scale: scale.long() + 3,
    "from nothing": lambda scale: ONE,
    "taken away": lambda scale: None,
}


def scaled(name: str):
    def rescales(module, optimizer) -> None:
        module.scale = BUFFERS[name](module.scale)

    return once(rescales, model=lambda: Scaled(None if name == "from nothing" else torch.ones(4)))


CHANGES = {f"a buffer {name}": scaled(name) for name in BUFFERS} | {
    "parameters that train": once(unfreezes, model=two_layers),
    "groups of parameters": once(adds_a_group, last_layer, all_of_two_layers),
    "modules in eval mode": once(lambda module, _: module[1].eval(), model=two_layers),
    "a gradient behind a step": learning(body=steps_first),
    "a gradient that fades": learning(body=fades),
    "an optimizer's types": learning(precise),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_loop_changes_stays_so(tmp_path, capfd, change):
    assert_resumes(CHANGES[change], tmp_path, 8, 9)
    line = "⚙️ Changed: requires_grad in the script (it stays as saved).\n"
    assert (line in capfd.readouterr().out) == (change == "parameters that train")


@pytest.mark.parametrize("frozen_after", [True, False])
def test_what_the_loop_unfreezes_trains_on_every_rank_or_is_refused(tmp_path, group, frozen_after):
    """What is frozen when it is wrapped is not shared among ranks, and would be another on each."""

    def begin(run: tg.Run, module: nn.Module) -> Optimizer:
        run.module[0].requires_grad_(False)
        return sgd(run, module)

    if frozen_after:
        train = once(unfreezes, begin, all_of_two_layers)
        assert_ranks_resume(group, train, tmp_path)
    else:
        text = ranks(group, once(unfreezes, model=two_layers), tmp_path, code=2)
        assert "stays so on many ranks: freeze after" in text


def test_a_model_that_grows_in_the_loop_ends_the_run_with_a_line(tmp_path, capfd):
    """No checkpoint would fit it; the ones before are whole."""
    words = mistake(capfd, once(grows), tmp_path, save_every=5)
    assert "error: a kept optimizer has parameters that no run.model(...) had at first\n" == words
    assert tg.latest_checkpoint(tmp_path)


class Notes:
    """What it holds changes in the loop."""

    def __init__(self, **state) -> None:
        self.state = state

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


ARRAYS = {
    "one": np.array(1.5),
    "sliced": np.arange(12.0).reshape(3, 4)[::2, 1:],
    "backwards": np.arange(4)[::-1],
    "empty": np.zeros((0, 3), np.int32),
    "bytes": np.arange(256, dtype=np.uint8),
    "half": np.array([0.1, np.inf], np.float16),
    "number": np.float32(0.1),
}


def replay(run: tg.Run, module: nn.Module):
    return sgd(run, module), run.keep(replay=Notes(numbers=np.zeros((6, 4)), others=ARRAYS))


def remembers(run, module, kept, batch):
    """It learns from what it has seen before, too, and changes an array in place."""
    optimizer, replay = kept
    rows = torch.from_numpy(replay.state["numbers"]).float().sum(0)
    replay.state["numbers"][run.step % 6] = batch[0].mean(0)
    return update(run, module, optimizer, [batch[0] + 0.1 * rows, *batch[1:]])


def test_arrays_are_tensors_in_the_file_and_arrays_again(tmp_path):
    train = learning(replay, remembers)
    go(train, tmp_path / "whole")
    go(train, tmp_path / "parts", stop=7)
    resume(train, tmp_path / "parts")
    left, right = (final(tmp_path / name) for name in ("whole", "parts"))
    for key in ("state_dicts", "model_state_dict"):
        assert_same(left[key], right[key])
    assert isinstance(right["state_dicts"]["replay"]["others"]["half"], torch.Tensor)
    arrays = tg.load_checkpoint(tmp_path / "parts" / "final.pt")["state_dicts"]["replay"]["others"]
    for name, array in ARRAYS.items():
        assert type(arrays[name]) is (float if name == "number" else np.ndarray)
        assert np.array_equal(arrays[name], array) and np.shape(arrays[name]) == np.shape(array)
        assert name == "number" or arrays[name].dtype == array.dtype


def test_a_periodic_checkpoint_has_an_array_as_it_was_at_its_step(tmp_path, monkeypatch):
    """It is written while the loop goes on and changes the array."""
    changed, save, seen = threading.Event(), tg.save_checkpoint, {}

    def save_later(state, path) -> None:
        assert changed.wait(60)
        save(state, path)

    def body(run, module, kept, batch):
        seen[run.step] = kept[1].state["numbers"].copy()
        loss = remembers(run, module, kept, batch)
        if run.step == 3:
            changed.set()
        return loss

    monkeypatch.setattr(tg, "save_checkpoint", save_later)
    go(learning(replay, body, evaluate=None), tmp_path, save_every=3, keep=9)
    for step in (3, 6, 9):
        state = tg.load_checkpoint(tmp_path / f"step_{step}.pt")["state_dicts"]["replay"]
        assert np.array_equal(state["numbers"], seen[step])


# ---- what cannot be saved


def noted(**state):
    """What begins with notes, and keeps the optimizer."""
    return lambda run, module: (sgd(run, module), run.keep(notes=Notes(**state)))


def notes(run, module, kept, batch):
    items = kept[1].state.get("items", [])
    items.append({"a": object()} if run.step == 7 else run.step)
    return update(run, module, kept[0], batch)


@pytest.mark.parametrize(
    "step, options",
    [(9, {"save_every": 3}), (9, {"stop": 9, "save_every": 6}), (10, {"save_every": 6})],
)
def test_what_cannot_be_saved_ends_the_run_at_the_first_save_that_meets_it(
    tmp_path, capfd, step, options
):
    """At a periodic one, a requested one, and that of a best evaluation."""
    go(learning(noted(items=[]), notes), tmp_path, code=2, **options)
    said = capfd.readouterr()
    where = "error: ['state_dicts']['notes']['items'][7]['a'] cannot be saved: it is a builtins."
    assert said.err.startswith(where + "object; dense tensors") and said.err.count("\n") == 1
    assert said.err.endswith("(list(x), vars(x))\n") and f"Completed Steps: {step}\n" in said.out
    assert f"Newest whole checkpoint: {tmp_path / 'step_6.pt'}\n" in said.out
    assert not list(tmp_path.glob("emergency_exit/*"))


def test_an_exception_is_shown_where_nothing_can_be_saved_either(tmp_path, capfd):
    unsavable = once(lambda module, optimizer: optimizer.param_groups[0].update(note=object()))
    go(unsavable, tmp_path, "--fails", CHANGE, code=1, save_every=6)
    said = capfd.readouterr()
    assert "out of memory" in said.err and "Newest whole checkpoint" in said.out


@pytest.mark.parametrize("kind", [">i4", "longdouble", "U3", "datetime64[s]", "O", object])
def test_what_no_tensor_can_hold_is_refused_before_much_is_trained(tmp_path, capfd, kind):
    begin = noted(a=object() if kind is object else np.zeros(3, kind))
    words = mistake(capfd, learning(begin, notes), tmp_path)
    assert "error: ['state_dicts']['notes']['a'] cannot be saved: it is a" in words


@pytest.mark.parametrize("empty", [False, True])
def test_a_kept_module_of_which_nothing_is_saved_is_named(tmp_path, capfd, empty):
    def begin(run: tg.Run, module: nn.Module) -> Optimizer:
        run.keep(metric=nn.Identity() if empty else nn.BatchNorm1d(1, affine=False))
        return sgd(run, module)

    go(learning(begin), tmp_path)
    line = "⚠️ run.keep(metric=...): its state is empty (a metric: persistent(True))."
    assert (line in capfd.readouterr().out) is empty


# ---- optimizers around optimizers


class Around(Optimizer):
    """Like SAM it steps by a gradient found uphill, like Lookahead it leads slow weights along."""

    def __init__(self, parameters, **settings) -> None:
        self.inner = SGD(parameters, **settings)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups
        for one in self.param_groups[0]["params"]:
            self.state[one]["slow"] = one.detach().clone()

    @torch.no_grad()
    def climb(self) -> None:
        for one in self.param_groups[0]["params"]:
            one.add_(one.grad.sign(), alpha=0.05)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for one in self.param_groups[0]["params"]:
            one.copy_(self.state[one]["slow"])
        self.inner.step()
        for one in self.param_groups[0]["params"]:
            self.state[one]["slow"].lerp_(one, 0.5)


def wrapped(kept: str, scheduled: str = "outer"):
    """Kept is what is kept, in this order: the outer one, the inner one."""

    def begin(run: tg.Run, module: nn.Module) -> tuple:
        outer = Around(module.parameters(), lr=run.options.lr, momentum=0.9)
        optimizers = {"outer": outer, "inner": outer.inner}
        for label in kept.split():
            run.keep(**{label: optimizers[label]})
        return outer, run.keep(scheduler=lr_scheduler.StepLR(optimizers[scheduled], 2, 0.8))

    def body(run, module, kept, batch):
        optimizer, scheduler = kept
        optimizer.zero_grad()
        loss_of(module, batch).backward()
        optimizer.climb()
        if run.step == run.options.fails:
            raise RuntimeError("out of memory")
        loss = update(run, module, optimizer, batch)
        scheduler.step()
        return loss

    return learning(begin, body)


KEPT = ["outer", "outer inner", "inner outer"]


@pytest.mark.parametrize("scheduled", ["outer", "inner"])
@pytest.mark.parametrize("kept", KEPT)
def test_an_optimizer_around_another_one(tmp_path, kept, scheduled):
    whole = assert_resumes(wrapped(kept, scheduled), tmp_path)
    rates = list(dict.fromkeys(column(whole, "lr_outer")))
    assert rates == pytest.approx([0.05 * 0.8**n for n in range(7)])
    label = "inner" if "inner" in kept else "outer.inner.1"
    assert "momentum_buffer" in final(whole)["optimizer_state_dicts"][label]["state"][0]


# True where the state before the batch is certain, and saved.
FAILURES = {kept: (wrapped(kept), False) for kept in KEPT} | {
    "a weight": (once(lambda module, optimizer: nn.init.ones_(module.bias)), False),
    "what trains": (CHANGES["parameters that train"], False),
    "a group": (CHANGES["groups of parameters"], False),
    "a buffer anew": (CHANGES["a buffer anew"], False),
    "a buffer in place": (CHANGES["a buffer in place"], True),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_a_batch_has_changed_before_it_failed_is_never_saved(tmp_path, capfd, name):
    train, certain = FAILURES[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    go(train, whole)
    go(train, parts, "--fails", CHANGE, code=1, save_every=3)
    said = capfd.readouterr().out
    newest = parts / ("emergency_exit/emergency_step_7.pt" if certain else "step_6.pt")
    assert tg.latest_checkpoint(parts) == newest
    assert ("nothing half-updated is saved" in said) is not certain
    assert (f"   Newest whole checkpoint: {newest}\n" in said) is not certain
    resume(train, parts, "--fails", -1)
    assert_same_run(whole, parts)


class Averaging(SGD):
    """Schedule-free: other weights are evaluated than are trained, and the way back rounds."""

    @torch.no_grad()
    def switch(self, trains: bool) -> None:
        for group in self.param_groups:
            for one in group["params"] if group.get("trains", True) is not trains else ():
                one.mul_(0.7 if trains else 1 / 0.7)
            group["trains"] = trains

    eval = functools.partialmethod(switch, False)
    train = functools.partialmethod(switch, True)

    def step(self, closure=None) -> None:
        assert self.param_groups[0].get("trains", True)
        super().step()


def test_a_schedule_free_optimizer_goes_on_with_the_weights_that_it_trains(tmp_path):
    """Those of an evaluation are others, also of one that is cut short."""
    evaluated, trained = {}, {}

    def evaluate(run: tg.Run, module: nn.Module):
        def evaluate(batch):
            evaluated[run.step] = module.weight.detach().clone()
            return losses(run, module)(batch)

        return evaluate

    def body(run, module, optimizer, batch):
        trained[run.step] = module.weight.detach().clone()
        return update(run, module, optimizer, batch)

    begin = lambda run, module: run.keep(optimizer=Averaging(module.parameters(), 0.1))
    train = learning(begin, body, evaluate=evaluate)
    whole = assert_resumes(train, tmp_path, 7, 10, "evaluation 5", save_every=5)
    assert not trained[5].equal(evaluated[5])
    cut_short = tmp_path / "stopped evaluation 5" / "emergency_exit"
    for directory, name in (whole, "step_5.pt"), (cut_short, "emergency_step_5.pt"):
        assert final(directory, name)["model_state_dict"]["weight"].equal(trained[5])


# ---- other beginnings


def renamed(run: tg.Run, module: nn.Module) -> Optimizer:
    return run.keep(sgd=SGD(module.parameters(), run.options.lr))


def test_what_cannot_go_on_can_begin_anew_with_the_weights(tmp_path, capfd):
    begun = []

    def body(run, module, optimizer, batch):
        if run.step == 0:
            begun.append((module.weight.detach().clone(), len(optimizer.state)))
        return update(run, module, optimizer, batch)

    go(learning(), tmp_path, stop=7)
    before = final(tmp_path, "emergency_exit/emergency_step_7.pt")
    train = learning(renamed, body, lambda run: run.data(Rows(28), Rows(7)))
    said = mistake(capfd, train, tmp_path, "--resume", "latest")
    assert "--weights in the place of --resume begins a new run" in said
    go(train, tmp_path, "--weights", "latest", "--lr", 0.01, extra=5)
    assert "📂 A new run, with the weights of " in capfd.readouterr().out
    assert begun[0][0].equal(before["model_state_dict"]["weight"]) and begun[0][1] == 0
    assert final(tmp_path)["run_id"] != before["run_id"] and len(column(tmp_path, "loss")) == 7
    assert column(tmp_path, "step", "metrics_2.csv") == list(range(1, 13))


def two_models(run: tg.Run, module: nn.Module) -> Optimizer:
    run.model(nn.Linear(4, 2), "second")
    return sgd(run, module)


def test_weights_that_do_not_fit_are_a_mistake(tmp_path, capfd):
    go(learning(), tmp_path, stop=7)
    for words, how, arguments in (
        ("--weights begins a new run: leave it out, or --resume", {}, ["--resume", "latest"]),
        ("emergency_step_7.pt does not fit second (", {"begin": two_models}, []),
        ("size mismatch for weight", {"model": lambda: nn.Linear(4, 3)}, []),
    ):
        said = mistake(capfd, learning(**how), tmp_path, "--weights", "latest", *arguments)
        assert words in said and len(list(tmp_path.rglob("*.pt"))) == 2


@pytest.mark.parametrize("weights", [False, True])
def test_one_command_begins_and_goes_on(tmp_path, capfd, weights):
    others = go(learning(), tmp_path / "others", stop=3).saved
    arguments = ("--resume", "auto", *(("--weights", others) if weights else ()))
    go(learning(), tmp_path / "whole", *arguments)
    go(learning(), tmp_path / "parts", *arguments, stop=7)
    go(learning(), tmp_path / "parts", *arguments)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert "⚙️" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["step_3.pt", "emergency_exit/emergency_step_4.pt", "final.pt"])
def test_resume_auto_begins_nothing_where_only_damaged_ones_are(tmp_path, capfd, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"damaged")
    assert "no checkpoint there" in mistake(capfd, learning(), tmp_path, "--resume", "auto")
    assert path.read_bytes() == b"damaged" and len(list(tmp_path.rglob("*.pt"))) == 1


# ---- evaluations


def middle(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of values in the order of the samples, whatever their shape."""
    assert values["index"].tolist() == list(range(7)) and values["scores"].shape == (7, 2)
    return {"middle": values["scores"].median()}


def scores(run: tg.Run, module: nn.Module):
    evaluate = losses(run, module)
    return lambda batch: {**evaluate(batch), "index": batch[2], "scores": module(batch[0])}


def wanders(run, module, optimizer, batch):
    """It changes the weights as any number of processes does."""
    with torch.no_grad():
        run.module.weight.copy_(torch.sin(torch.arange(8.0).view(2, 4) * (1 + run.step)))
    return loss_of(module, batch)


def summarized(summarize=middle, best="max middle"):
    return learning(body=wanders, evaluate=scores, best=best, summarize=summarize)


def test_a_summary_of_all_samples_is_the_same_on_any_number_of_ranks(tmp_path, group):
    whole = assert_resumes(summarized(), tmp_path, eval_every=3)
    ranks(group, summarized(), tmp_path / "two", eval_every=3)
    left, right = metrics_without_times(whole), metrics_without_times(tmp_path / "two")
    rows = {int(row["step"]): float(row["val_middle"]) for row in left if row["val_middle"]}
    assert list(rows) == [3, 6, 9, 12] and not {"val_index", "val_scores"} & {*left[0]}
    assert [row["val_middle"] for row in left] == [row["val_middle"] for row in right]
    best = final(tmp_path / "two")["best"]
    assert best == final(whole)["best"] and best["value"] == max(rows.values())


WRONG = {
    "summarize gave 0.5, not {name: num": (lambda values: 0.5, "max f1"),
    "summarize gave {'f1': tensor([1.": (lambda values: {"f1": torch.ones(2)}, "max f1"),
    "summarize gave {'f1': 'good'}": (lambda values: {"f1": "good"}, "max f1"),
    "minus, accuracy, middle; best is 'max f2'": (middle, "max f2"),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_summary_of_anything_else_is_a_mistake(tmp_path, capfd, words):
    assert words in mistake(capfd, summarized(*WRONG[words]), tmp_path)


def test_an_evaluation_at_the_end_of_every_epoch(tmp_path):
    whole = assert_resumes(learning(), tmp_path, eval_every="epoch")
    rows = metrics_without_times(whole)
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [5, 10, 12]
