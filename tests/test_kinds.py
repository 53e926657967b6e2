"""Whatever a loop draws from, keeps and changes: stopped anywhere, it is resumed bit for bit."""

import functools
import random
import threading
from pathlib import Path

import helpers as h
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, default_collate

import train_graceful as tg


def ranks(ended, train, folder: str, *args, stop=None, code: int = 0, **options) -> str:
    """Two processes run it to its end; what the first one printed."""
    run = lambda: tg.main(h.stopping(train, stop), **{**h.OWN, **options})
    return ended(folder, 2, *args, code=code, program=run)[0]


def assert_ranks_resume(ended, train, tmp_path: Path, *before) -> Path:
    ranks(ended, train, "whole")
    ranks(ended, train, "parts", *before, stop=8, code=143)
    ranks(ended, train, "parts", "--resume", "latest")
    h.assert_same_run(tmp_path / "whole", tmp_path / "parts")
    return tmp_path / "whole"


# ---- samplers


def weighted(epoch: int) -> np.ndarray:
    """Of an epoch's twenty samples none is of the first ten."""
    return np.random.choice(20, 20, p=np.repeat([0, 0.1], 10))


def buckets(epoch: int) -> list[list[int]]:
    order = (10 + torch.randperm(10)).tolist()
    return [order[:2], order[2:8], [*order[6:], *order[:4]], order[4:8]]


def with_a_generator() -> torch.utils.data.Sampler:
    weights, generator = [0.0] * 10 + [1.0] * 10, torch.Generator()
    return torch.utils.data.WeightedRandomSampler(weights, 20, generator=generator)


class Epochs(h.Rows):
    """Its rows depend on the epoch that it was told."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int):
        row, label, _ = super().__getitem__(index)
        return row + self.epoch, label, 100 * self.epoch + index


def sampled(make):
    return h.learning(data=lambda run: run.data(Epochs(), h.Rows(7), sampler=make()))


@pytest.mark.parametrize("workers", [(0, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("make", [lambda: weighted, lambda: buckets, with_a_generator])
def test_a_sampler_goes_on_in_the_middle_of_an_epoch(tmp_path, make, workers):
    before, after = (("--workers", number) for number in workers)
    whole = h.assert_resumes(sampled(make), tmp_path, before=before, after=after)
    sizes = [2, 6, 8, 4] if make() is buckets else [4] * 5
    assert h.column(whole, "size") == (sizes * 3)[:12]
    index = h.column(whole, "index")
    # The epoch is heard where a sample is loaded.
    assert [number // 100 for number in index] == [step // len(sizes) for step in range(12)]
    assert all(number % 100 >= 10 for number in index)
    assert {number % 100 for number in index[:4]} != {number % 100 for number in index[5:9]}


def test_each_batch_of_a_sampler_is_dealt_out_to_the_ranks(tmp_path, ended):
    train = sampled(lambda: buckets)
    h.go(train, tmp_path / "alone")
    whole = assert_ranks_resume(ended, train, tmp_path, "--workers", 1)
    assert h.column(whole, "size") == [1, 3, 4, 2] * 3
    assert h.column(whole, "index") == pytest.approx(h.column(tmp_path / "alone", "index"))


# ---- streams


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


def draws(run, module, optimizer, batch):
    """Its own random numbers on each rank."""
    assert len({*run.processes.gather(torch.rand(()).item())}) == run.world_size
    return h.update(run, module, optimizer, batch)


def streamed(stream=lambda run: Numbers(run.rank, run.world_size), validation=None):
    evaluate = validation and h.losses
    return h.learning(
        body=draws, data=lambda run: run.data(stream(run), validation), evaluate=evaluate
    )


def test_a_stream_goes_on_where_it_was(tmp_path, capfd):
    """In the middle of an epoch, and at its end."""
    train = streamed(validation=h.Rows(7))
    whole = h.assert_resumes(train, tmp_path, 1, 5, 7, after=("--workers", 2))
    assert h.column(whole, "index") == EPOCHS[:12]
    assert "begins it anew" not in capfd.readouterr().out


def test_a_stream_that_knows_no_place_begins_anew(tmp_path, capfd):
    train = streamed(lambda run: DataLoader(Numbers(), batch_size=None))
    h.go(train, tmp_path, stop=7)
    line = "⚠️ The stream has no state_dict and load_state_dict: resumed it begins anew"
    assert line in capfd.readouterr().out
    h.resume(train, tmp_path)
    assert h.column(tmp_path, "index") == [*EPOCHS[:7], *EPOCHS[5:10]]


def test_a_stream_for_each_rank(tmp_path, ended, capfd):
    whole = assert_ranks_resume(ended, streamed(), tmp_path)
    assert h.column(whole, "index")[:2] == [2.5, 4.5]
    words = h.mistake(capfd, streamed(), whole, "--resume", "latest", "--steps", 20)
    assert "a stream of 2 ranks; --weights" in words


# ---- what the data is known by, and its generators


def test_another_split_is_refused_and_the_same_one_goes_on(tmp_path, capfd):
    def split(run: tg.Run) -> None:
        generator = torch.Generator().manual_seed(run.options.split)
        parts = torch.utils.data.random_split(h.Rows(24), [16, 8], generator)
        run.data(*(ConcatDataset([part, part]) for part in parts))

    train, options = h.learning(data=split), {"split": tg.option(0, fixed=False)}
    whole = h.assert_resumes(train, tmp_path, **options)
    words = h.mistake(capfd, train, whole, "--resume", "latest", "--split", 1, **options)
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


class Annotated(h.Rows):
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


def test_generators_are_found_and_seeded(tmp_path):
    """Also one in a closure."""

    def data(run: tg.Run) -> None:
        noise = Noise()

        def collate(samples: list):
            rows, labels, indices = default_collate(samples)
            return rows + noise.draw(), labels, indices

        run.data(Subset(Annotated(), range(20)), collate=collate)

    h.assert_resumes(h.learning(data=data, evaluate=None), tmp_path, before=("--workers", 2))


# ---- what a loop changes

CHANGE = 7  # the step in which it does


def once(change, begin=h.sgd, model=lambda: nn.Linear(4, 2)):
    """The loop does this once; then its batch may fail, as what needs too much memory does."""

    def body(run, module, kept, batch):
        if run.step == CHANGE:
            change(run.module, kept)
        if run.step == run.options.fails:
            raise RuntimeError("out of memory")
        return h.update(run, module, kept, batch)

    return h.learning(begin, body, model=model)


def two_layers() -> nn.Sequential:
    """The first one does not train yet."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def unfreezes(module, optimizer) -> None:
    module[0].requires_grad_(True)


def last_layer(run: tg.Run, module: nn.Module) -> Optimizer:
    module.requires_grad_(True)
    return run.keep(optimizer=SGD(module[2].parameters(), run.options.lr, momentum=0.9))


def adds_a_group(module, optimizer) -> None:
    optimizer.add_param_group({"params": [*module[0].parameters()], "lr": 0.01})


def grows(module, optimizer) -> None:
    module.weight = nn.Parameter(module.weight.detach().clone())
    optimizer.add_param_group({"params": [module.weight]})


def steps_first(run, module, optimizer, batch):
    """A gradient that no step has used waits behind one of the same batch."""
    optimizer.step()
    optimizer.zero_grad()
    loss = h.loss_of(module, batch)
    loss.backward()
    return loss


def fades(run, module, optimizer, batch):
    """Instead of being set to zero."""
    loss = h.loss_of(module, batch)
    loss.backward()
    optimizer.step()
    for one in module.parameters():
        one.grad.mul_(0.5)
    return loss


class Precise(SGD):
    """Its averages have more digits than its weights, and it counts and marks."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for one in self.param_groups[0]["params"]:
            state = self.state[one]
            average = state.setdefault("average", torch.zeros(one.shape, dtype=torch.float64))
            average.lerp_(one.grad.double(), 0.1)
            count = state["count"] = state.get("count", torch.tensor(0)) + 1
            marked = state["marked"] = torch.logical_not(state.get("marked", one > 0))
            one.sub_(0.1 * torch.where(marked, average, average / count).float())


class Scaled(nn.Linear):
    """Its outputs are scaled by a buffer that is not in its state_dict."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, rows):
        outputs = super().forward(rows)
        return outputs if self.scale is None else outputs * (1 + self.scale.float().mean())


def scaled(change):
    def rescales(module, optimizer) -> None:
        module.scale = change(module.scale)

    return once(rescales, model=Scaled)


CHANGES = {
    "a buffer in place": scaled(lambda scale: scale.add_(1)),
    "a buffer anew": scaled(lambda scale: scale + 1),
    "a longer buffer": scaled(lambda scale: torch.full([5], 2.0)),
    "a buffer of another type": scaled(lambda scale: scale.long() + 3),
    "a buffer taken away": scaled(lambda scale: None),
    "parameters that train": once(unfreezes, model=two_layers),
    "groups of parameters": once(adds_a_group, last_layer, two_layers),
    "modules in eval mode": once(lambda module, _: module[1].eval(), model=two_layers),
    "a gradient behind a step": h.learning(body=steps_first),
    "a gradient that fades": h.learning(body=fades),
    "an optimizer's types": h.learning(
        lambda run, module: run.keep(optimizer=Precise(module.parameters()))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_loop_changes_stays_so(tmp_path, capfd, change):
    h.assert_resumes(CHANGES[change], tmp_path, 8, 9)
    line = "⚙️ Changed: requires_grad in the script (it stays as saved).\n"
    assert (line in capfd.readouterr().out) == (change == "parameters that train")


ON_RANKS = {
    "no multiple of 2 processes": sampled(lambda: lambda epoch: [[1, 2], [3, 4, 5]]),
    # It is not shared among ranks, and would become another on each.
    "stays so on many ranks: freeze after": once(unfreezes, model=two_layers),
    "make it of run.module, which fits any number": h.learning(
        lambda run, module: run.keep(ema=AveragedModel(module))
    ),
}


@pytest.mark.parametrize("words", ON_RANKS)
def test_what_many_processes_cannot_do_is_refused(ended, words):
    text = ranks(ended, ON_RANKS[words], "ck", code=2)
    assert words in text and "Traceback" not in text


class Notes:
    """What it holds changes in the loop."""

    def __init__(self, **state) -> None:
        self.state = state

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


ARRAYS = {
    "sliced": np.arange(12.0).reshape(3, 4)[::2, 1:],
    "backwards": np.arange(4)[::-1],
    "half": np.array([0.1, np.inf], np.float16),
}


def replay(run: tg.Run, module: nn.Module):
    notes = Notes(numbers=np.zeros((6, 4)), others=ARRAYS, number=np.int64(4))
    return h.sgd(run, module), run.keep(replay=notes)


def remembers(run, module, kept, batch):
    """It learns from what it has seen before, too, and changes an array in place."""
    optimizer, replay = kept
    rows = torch.from_numpy(replay.state["numbers"]).float().sum(0)
    replay.state["numbers"][run.step % 6] = batch[0].mean(0)
    return h.update(run, module, optimizer, [batch[0] + 0.1 * rows, *batch[1:]])


def test_arrays_are_tensors_in_the_file_and_arrays_again(tmp_path, monkeypatch):
    train = h.learning(replay, remembers)
    h.go(train, tmp_path / "whole")
    changed, save = threading.Event(), tg.save_checkpoint

    def body(run, module, kept, batch):
        loss = remembers(run, module, kept, batch)
        if run.step == 6:
            changed.set()
        return loss

    def saved_later(state: dict, path: Path) -> None:
        assert path.name != "step_6.pt" or changed.wait(60)
        save(state, path)

    monkeypatch.setattr(tg, "save_checkpoint", saved_later)
    h.go(h.learning(replay, body), tmp_path / "parts", stop=7, save_every=3)
    h.resume(train, tmp_path / "parts")
    paths = (tmp_path / name / "final.pt" for name in ("whole", "parts"))
    left, right = (torch.load(path, weights_only=True) for path in paths)
    for key in ("state_dicts", "model_state_dict"):
        h.assert_same(left[key], right[key])
    assert isinstance(right["state_dicts"]["replay"]["others"]["half"], torch.Tensor)
    names = "step_6.pt", "emergency_exit/emergency_step_7.pt"
    states = (tg.load_checkpoint(tmp_path / "parts" / name) for name in names)
    arrays, later = (state["state_dicts"]["replay"] for state in states)
    # A copy, for the loop has changed the first row in the meantime.
    assert (arrays["numbers"] == later["numbers"]).all(1).tolist() == [False] + 5 * [True]
    for name, array in arrays["others"].items():
        assert np.array_equal(array, ARRAYS[name]) and array.dtype == ARRAYS[name].dtype


def noted(**state):
    """What begins with notes, and keeps the optimizer."""
    return lambda run, module: (h.sgd(run, module), run.keep(notes=Notes(**state)))


def notes(run, module, kept, batch):
    items = kept[1].state.get("items", [])
    items.append({"a": object()} if run.step == 7 else run.step)
    return h.update(run, module, kept[0], batch)


@pytest.mark.parametrize("step, how", [(9, {"save_every": 3}), (9, {"stop": 9}), (10, {})])
def test_what_cannot_be_saved_ends_the_run_where_a_save_meets_it(tmp_path, capfd, step, how):
    """At a periodic one, a requested one, and that of a best evaluation."""
    how = {"save_every": 6, **how}
    h.go(h.learning(noted(items=[]), notes), tmp_path, code=2, **how)
    said = capfd.readouterr()
    where = "error: ['state_dicts']['notes']['items'][7]['a'] cannot be saved: it is a builtins."
    assert said.err.startswith(where + "object; dense tensors") and said.err.count("\n") == 1
    assert f"Completed Steps: {step}\n" in said.out
    assert f"Newest whole checkpoint: {tmp_path / 'step_6.pt'}\n" in said.out
    assert not list(tmp_path.glob("emergency_exit/*"))


def test_an_exception_is_shown_where_nothing_can_be_saved_either(tmp_path, capfd):
    unsavable = once(lambda module, optimizer: optimizer.param_groups[0].update(note=object()))
    h.go(unsavable, tmp_path, "--fails", CHANGE, code=1, save_every=6)
    said = capfd.readouterr()
    assert "out of memory" in said.err and "Newest whole checkpoint" in said.out


def test_a_kept_module_of_which_nothing_is_saved_is_named(tmp_path, capfd):
    norm = nn.BatchNorm1d(1, affine=False)
    begin = lambda run, module: run.keep(metric=nn.Identity(), norm=norm)
    h.go(h.learning(begin, stands_still), tmp_path)
    said = capfd.readouterr().out
    assert "⚠️ run.keep(metric=...): its state is empty (a metric: persistent(True)).\n" in said
    assert "run.keep(norm" not in said


# ---- a batch that fails


def keeps_notes(run: tg.Run, module: nn.Module) -> Optimizer:
    run.keep(notes=Notes(number=1))
    return h.sgd(run, module)


def keeps_more(run: tg.Run, module: nn.Module) -> Optimizer:
    optimizer = h.sgd(run, module)
    scaler, scheduler = torch.amp.GradScaler("cpu"), lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.others = run.keep(scaler=scaler, scheduler=scheduler)
    return optimizer


def scales(module: nn.Module, optimizer: Optimizer) -> None:
    scaler, scheduler = optimizer.others
    state = scaler.state_dict()
    scaler.load_state_dict({**state, "scale": 2 * state["scale"]})
    scheduler.last_epoch += 1


# True where the state before the batch is certain, and saved.
FAILURES = {
    "a weight": (once(lambda module, optimizer: nn.init.ones_(module.bias)), False),
    "what else is kept, maybe": (once(lambda *others: None, keeps_notes), False),
    "what trains": (CHANGES["parameters that train"], False),
    "a group": (CHANGES["groups of parameters"], False),
    "a buffer anew": (CHANGES["a buffer anew"], False),
    "a buffer in place": (CHANGES["a buffer in place"], True),
    "a scale and a schedule": (once(scales, keeps_more), True),
    "a rate": (once(lambda module, optimizer: optimizer.others[1].step(), keeps_more), False),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_a_batch_has_changed_before_it_failed_is_never_saved(tmp_path, capfd, name):
    train, certain = FAILURES[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    h.go(train, whole)
    h.go(train, parts, "--fails", CHANGE, code=1, save_every=3)
    said = capfd.readouterr().out
    newest = parts / ("emergency_exit/emergency_step_7.pt" if certain else "step_6.pt")
    assert tg.latest_checkpoint(parts) == newest
    assert ("nothing half-updated is saved" in said) is not certain
    h.resume(train, parts, "--fails", -1)
    h.assert_same_run(whole, parts)


class Averaging(SGD):
    """Schedule-free: other weights are evaluated than are trained, and the way back rounds."""

    trains = True

    @torch.no_grad()
    def switch(self, trains: bool) -> None:
        for one in self.param_groups[0]["params"] if self.trains is not trains else ():
            one.add_(-1000 if trains else 1000)
        self.trains = trains

    eval = functools.partialmethod(switch, False)
    train = functools.partialmethod(switch, True)


def test_a_schedule_free_optimizer_goes_on_with_the_weights_that_it_trains(tmp_path):
    """Those of an evaluation are others, also of one that is cut short."""
    trained = {}

    def evaluate(run: tg.Run, module: nn.Module):
        return lambda batch: {"loss": module.weight.sum().expand(len(batch[0]))}

    def body(run, module, optimizer, batch):
        loss = h.update(run, module, optimizer, batch)
        trained[run.step + 1] = module.weight.detach().clone()
        return loss

    begin = lambda run, module: run.keep(optimizer=Averaging(module.parameters(), 0.1))
    train = h.learning(begin, body, evaluate=evaluate)
    whole = h.assert_resumes(train, tmp_path, 7, 10, "evaluation 5", save_every=5)
    found = [float(row["val_loss"]) for row in h.metrics_without_times(whole) if row["val_loss"]]
    assert found[0] == pytest.approx((trained[5] + 1000).sum().item())
    cut_short = tmp_path / "stopped evaluation 5" / "emergency_exit" / "emergency_step_5.pt"
    for path in whole / "step_5.pt", cut_short:
        assert tg.load_checkpoint(path)["model_state_dict"]["weight"].equal(trained[5])


# ---- other beginnings


def test_what_cannot_go_on_can_begin_anew_with_the_weights(tmp_path, capfd):
    begun = []

    def body(run, module, optimizer, batch):
        if run.step == 0:
            begun.append((module.weight.detach().clone(), len(optimizer.state)))
        return h.update(run, module, optimizer, batch)

    before = tg.load_checkpoint(h.go(h.learning(), tmp_path, stop=7).saved)
    train = h.learning(body=body, data=lambda run: run.data(h.Rows(28), h.Rows(7)))
    said = h.mistake(capfd, train, tmp_path, "--resume", "latest")
    assert "--weights in the place of --resume begins a new run" in said
    weights = tmp_path, "--weights", "latest"
    said = h.mistake(capfd, h.learning(model=lambda: nn.Linear(4, 3)), *weights)
    assert "size mismatch for weight" in said
    said = h.mistake(capfd, train, *weights, "--resume", "latest")
    assert "--weights begins a new run: leave it out, or --resume" in said
    h.go(train, *weights, "--lr", 0.01, extra=5)
    assert "📂 A new run, with the weights of " in capfd.readouterr().out
    assert begun[0][0].equal(before["model_state_dict"]["weight"]) and begun[0][1] == 0
    assert h.final(tmp_path)["run_id"] != before["run_id"] and len(h.column(tmp_path, "loss")) == 7
    assert h.column(tmp_path, "step", "metrics_2.csv") == list(range(1, 13))


@pytest.mark.parametrize("weights", [False, True])
def test_one_command_begins_and_goes_on(tmp_path, capfd, weights):
    others = h.go(h.learning(), tmp_path / "others", stop=3).saved
    arguments = ("--resume", "auto", *(("--weights", others) if weights else ()))
    h.go(h.learning(), tmp_path / "whole", *arguments)
    h.go(h.learning(), tmp_path / "parts", *arguments, stop=7)
    h.go(h.learning(), tmp_path / "parts", *arguments)
    h.assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert "⚙️" not in capfd.readouterr().out
    # Where only damaged ones are it begins nothing.
    for path in (tmp_path / "parts").rglob("*.pt"):
        path.write_bytes(b"damaged")
    assert "no checkpoint there" in h.mistake(capfd, h.learning(), tmp_path / "parts", *arguments)


# ---- evaluations


def middle(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of values in the order of the samples, whatever their shape."""
    assert values["index"].tolist() == list(range(7)) and values["scores"].shape == (7, 2)
    return {"middle": values["scores"].median()}


def scores(run: tg.Run, module: nn.Module):
    evaluate = h.losses(run, module)
    return lambda batch: {**evaluate(batch), "index": batch[2], "scores": module(batch[0])}


def stands_still(run, module, optimizer, batch):
    """The weights are the same on any number of processes."""
    return h.loss_of(module, batch)


def summarized(summarize=middle, best="max middle"):
    return h.learning(body=stands_still, evaluate=scores, best=best, summarize=summarize)


def test_a_summary_of_all_samples_is_the_same_on_any_number_of_ranks(tmp_path, ended):
    whole = h.assert_resumes(summarized(), tmp_path, eval_every=3)
    ranks(ended, summarized(), "two", eval_every=3)
    left, right = h.metrics_without_times(whole), h.metrics_without_times(tmp_path / "two")
    rows = {int(row["step"]): float(row["val_middle"]) for row in left if row["val_middle"]}
    assert list(rows) == [3, 6, 9, 12] and not {"val_index", "val_scores"} & {*left[0]}
    assert [row["val_middle"] for row in left] == [row["val_middle"] for row in right]
    best = h.final(tmp_path / "two")["best"]
    assert best == h.final(whole)["best"] and best["value"] == max(rows.values())


# ---- mistakes

UNEVEN = sampled(lambda: lambda epoch: range(20 - 4 * epoch))
REFUSED = {
    "Numbers yields no batches": (streamed(lambda run: Numbers(batches=0)), {}),
    "Give --steps": (streamed(), {"steps": None, "epochs": 2}),
    "int is no dataset or stream": (streamed(lambda run: 5), {}),
    "run.data(sampler=...): epoch 1 has 4 batches, not 5": (UNEVEN, {"workers": 2}),
    "a kept optimizer has parameters that no run.model(...) had at first": (once(grows), {}),
    "['state_dicts']['notes']['a'] cannot be saved: it is a": (
        h.learning(noted(a=object()), notes),
        {},
    ),
    "summarize gave 0.5, not {name: num": (summarized(lambda values: 0.5), {}),
    "summarize gave {'f1': tensor([1.": (summarized(lambda values: {"f1": torch.ones(2)}), {}),
    "minus, accuracy, middle; best is 'max f2'": (summarized(best="max f2"), {}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_is_one_line(tmp_path, capfd, words):
    train, options = REFUSED[words]
    assert words in h.mistake(capfd, train, tmp_path, **options)
