"""Anybody's model and data: stopped anywhere and resumed, it is the run that was never stopped; mistakes get one line."""

import math
import os
import random
import signal
import sys

import numpy as np
import pytest
import torch
from helpers import ask_to_leave, assert_same, assert_same_run, metrics_without_times, session
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import Dataset, IterableDataset

import train_graceful as tg


class Points(Dataset):
    """Noisy points of four classes, moved at random each time that they are looked at."""

    def __init__(self, count: int = 42, kind: str = "tuple") -> None:
        generator = torch.Generator().manual_seed(count)
        self.labels = torch.randint(4, (count,), generator=generator)
        self.points = F.one_hot(self.labels, 6) + 0.3 * torch.randn(count, 6, generator=generator)
        self.kind = kind

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        point = self.points[index] + 0.1 * torch.randn(6) + np.random.uniform(0, 0.1)
        label = self.labels[index]
        return {
            "tuple": (point, label),
            "tensor": torch.cat([point, label[None]]),
            "dict": {"point": point, "label": label},
            "nested": {"a": [point, (label, "text")], "b": 1.5},
        }[self.kind]


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4)
    )


OPTIONS = {
    "batch_size": 8,
    "steps": 13,
    "eval_every": 4,
    "log_every": 3,
    "save_every": 100,
    "lr": 0.05,
}


def go(train, directory, *args, stop: int | None = None, **options) -> tg.Run:
    """One session of train(run); asked to leave in the body of batch `stop`."""
    runs = []

    def with_stop(run: tg.Run) -> None:
        runs.append(run)
        batches = run.batches

        def stopping(*arguments, **keywords):
            for batch in batches(*arguments, **keywords):
                if run.step + 1 == stop:
                    ask_to_leave(run)
                yield batch

        run.batches = stopping
        train(run)

    arguments = ("--checkpoint-dir", directory, *args)
    code = session(*arguments, train=with_stop, **{**OPTIONS, **options})
    assert code == (143 if stop else 0)
    return runs[0]


def assert_resumes(train, tmp_path, stops=(1, 4, 7, 13), **options) -> None:
    """Stopped in each of these batches it ends with the bits of the run that was not stopped."""
    go(train, tmp_path / "whole", **options)
    for stop in stops:
        directory = tmp_path / f"stopped_{stop}"
        go(train, directory, stop=stop, **options)
        go(train, directory, "--resume", "latest", **options)
        assert_same_run(directory, tmp_path / "whole")


def classification(
    optimizer=None, scheduler=None, kept=None, body=None, model=net, best="min loss", data=None
):
    """train(run) for Points; optimizer(parameters) and so on are what a test is about."""

    def train(run: tg.Run) -> None:
        run.data(data or Points(), Points(11))
        module = run.model(model())
        parameters = [one for one in module.parameters() if one.requires_grad]
        made = optimizer(parameters) if optimizer else torch.optim.AdamW(parameters, run.options.lr)
        run.keep(optimizer=made)
        planned = run.keep(scheduler=scheduler(made, run)) if scheduler else None
        more = kept(run, module) if kept else None

        def evaluate(batch):
            logits = module(batch[0])
            return {
                "loss": F.cross_entropy(logits, batch[1], reduction="none"),
                "accuracy": logits.argmax(1) == batch[1],
                "minus": -F.cross_entropy(logits, batch[1], reduction="none"),
            }

        for points, labels in run.batches(evaluate, best=best):
            loss = F.cross_entropy(module(points), labels)
            if body:
                body(run, module, made, planned, more, loss)
                continue
            made.zero_grad()
            loss.backward()
            run.clip_gradients(1.0)
            made.step()
            if planned is not None:
                planned.step()
            run.log(loss=loss, other=run.step)

    return train


@pytest.mark.parametrize("workers, stops", [(0, range(1, 14)), (2, range(1, 14, 4))])
def test_a_classifier_with_batch_norm_dropout_and_random_augmentation(tmp_path, workers, stops):
    assert_resumes(classification(), tmp_path, stops, workers=workers)


def test_another_number_of_workers_after_the_resume(tmp_path):
    go(classification(), tmp_path / "whole", "--workers", 2)
    go(classification(), tmp_path / "stopped", "--workers", 0, stop=6)
    go(classification(), tmp_path / "stopped", "--resume", "latest", "--workers", 3)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


class Noise:
    """A transform with generators of its own, as libraries for augmentation have them."""

    def __init__(self) -> None:
        self.generators = {"numpy": np.random.default_rng(0), "torch": torch.Generator()}
        self.python = random.Random(0)
        self.old = [np.random.RandomState(0)]

    def __call__(self, point: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(6, generator=self.generators["torch"])
        numbers = self.generators["numpy"].random(), self.old[0].rand(), self.python.random()
        return point + 0.1 * noise + 0.1 * sum(numbers)


class Transformed(Dataset):
    def __init__(self, points: Dataset) -> None:
        self.points, self.transforms = points, (Noise(), Noise())

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int):
        point, label = self.points[index]
        for transform in self.transforms:
            point = transform(point)
        return point, label


@pytest.mark.parametrize("workers", [0, 2])
def test_generators_of_a_datasets_own_make_the_same_run_too(tmp_path, workers):
    split = torch.utils.data.Subset(Transformed(Points()), range(40))
    train = classification(data=split)
    assert_resumes(train, tmp_path, (3, 8), workers=workers)
    if not workers:
        first, second = (one.generators["numpy"].random() for one in split.dataset.transforms)
        assert first != second, "each has a stream of its own"


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, 0.05),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.05, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:2], "lr": 0.1}, {"params": p[2:]}], 0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_any_kind(tmp_path, name):
    assert_resumes(classification(OPTIMIZERS[name]), tmp_path, (5,))


def two_networks(steps_of_the_second, backward_of_the_second):
    """The first optimizer steps in every batch, the second where it is told; so does its backward pass."""

    def train(run: tg.Run) -> None:
        run.data(Points(), Points(11))
        first, second = run.model(net(), "first"), run.model(net(), "second")
        sgd = torch.optim.SGD
        one = run.keep(one=sgd(first.parameters(), 0.05, momentum=0.9))
        two = run.keep(two=sgd(second.parameters(), 0.05, momentum=0.9))

        def evaluate(batch):
            return {"loss": F.cross_entropy(second(batch[0]), batch[1], reduction="none")}

        for points, labels in run.batches(evaluate):
            one.zero_grad()
            loss = F.cross_entropy(first(points), labels)
            loss.backward()
            one.step()
            if backward_of_the_second(run.step):
                F.cross_entropy(second(points), labels).backward()
            if steps_of_the_second(run.step):
                two.step()
                two.zero_grad()
            run.log(loss=loss)

    return train


def test_an_accumulation_by_hand_beside_an_optimizer_that_steps_in_every_batch(tmp_path):
    train = two_networks(lambda step: step % 4 == 3, lambda step: True)
    assert_resumes(train, tmp_path, range(1, 14))
    assert go(train, tmp_path / "early", stop=5).step == 5
    state = tg.load_checkpoint(tmp_path / "early" / "emergency_exit" / "emergency_step_5.pt")
    assert {name.partition(".")[0] for name in state["loop"]["gradients"]} == {"second"}


def test_an_optimizer_that_steps_now_and_then_keeps_nobody_waiting(tmp_path):
    train = two_networks(lambda step: step % 4 == 3, lambda step: step % 4 == 3)
    assert_resumes(train, tmp_path, range(1, 14))
    assert go(train, tmp_path / "late", stop=5).step == 5


def test_an_optimizer_that_lives_for_a_batch_need_not_be_kept(tmp_path):
    """Samples that an attack has made, say."""

    def body(run, module, optimizer, planned, more, loss):
        shift = torch.zeros(6, requires_grad=True)
        attack = torch.optim.SGD([shift], 0.1)
        for _ in range(3):
            (shift.sum() + loss.detach()).backward()
            attack.step()
        optimizer.zero_grad()
        (loss + shift.detach().sum()).backward()
        optimizer.step()

    assert_resumes(classification(body=body), tmp_path, (5,))


def test_frozen_parameters(tmp_path):
    def frozen() -> nn.Module:
        model = net()
        model[0].requires_grad_(False)
        return model

    assert_resumes(classification(model=frozen), tmp_path, (5,))


SCHEDULERS = {
    "StepLR": lambda o, run: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o, run: lr_scheduler.MultiStepLR(o, [2, 7]),
    "ConstantLR": lambda o, run: lr_scheduler.ConstantLR(o, total_iters=7),
    "LinearLR": lambda o, run: lr_scheduler.LinearLR(o, total_iters=9),
    "ExponentialLR": lambda o, run: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o, run: lr_scheduler.PolynomialLR(o, run.total_steps),
    "CosineAnnealingLR": lambda o, run: lr_scheduler.CosineAnnealingLR(o, run.total_steps),
    "CosineAnnealingWarmRestarts": lambda o, run: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o, run: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o, run: lr_scheduler.OneCycleLR(o, 0.1, total_steps=run.total_steps),
    "LambdaLR": lambda o, run: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o, run: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "SequentialLR": lambda o, run: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "ChainedScheduler": lambda o, run: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o, run: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=6),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_next_learning_rates_are_those_of_the_run_that_was_not_stopped(tmp_path, name):
    assert_resumes(classification(scheduler=SCHEDULERS[name]), tmp_path, (5,), log_every=1)


def test_a_plateau_scheduler_follows_the_evaluations(tmp_path):
    def body(run, module, optimizer, plateau, more, loss):
        if run.evaluation is not None:
            plateau.step(run.evaluation["loss"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)

    plateau = lambda o, run: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5)  # noqa: E731
    train = classification(scheduler=plateau, body=body)
    assert_resumes(train, tmp_path, (3, 4, 5, 8, 9), log_every=1)
    rates = {row["lr_optimizer"] for row in metrics_without_times(tmp_path / "whole")}
    assert len(rates) > 1


def test_an_average_of_the_weights(tmp_path):
    def kept(run, module):
        ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        return run.keep(ema=torch.optim.swa_utils.AveragedModel(run.module, multi_avg_fn=ema))

    def body(run, module, optimizer, planned, ema, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update_parameters(run.module)
        run.log(loss=loss)

    assert_resumes(classification(kept=kept, body=body), tmp_path, (5, 8))


def test_a_gradient_scaler_that_skips_steps(tmp_path):
    """It begins with a scale at which the gradient overflows, so that it skips the first steps."""

    def kept(run, module):
        return run.keep(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3))

    def body(run, module, optimizer, planned, scaler, loss):
        optimizer.zero_grad()
        # Twice the loss is more than float32 has room for, as long as the scale is this large.
        scaler.scale(4 * loss).backward()
        scaler.unscale_(optimizer)
        run.clip_gradients(1.0)
        scaler.step(optimizer)
        scaler.update()
        run.log(loss=loss, scale=scaler.get_scale())

    train = classification(kept=kept, body=body)
    assert_resumes(train, tmp_path, (1, 2, 3, 5, 8))
    scales = [float(row["scale"]) for row in metrics_without_times(tmp_path / "whole")]
    assert scales[-1] < 2.0**127


def test_accumulation_by_hand(tmp_path):
    """A step of the optimizer every four batches; nobody waits for it, its gradients are saved."""

    def body(run, module, optimizer, planned, more, loss):
        (loss / 4).backward()
        run.log(loss=loss)
        if (run.step + 1) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()

    train = classification(body=body)
    assert_resumes(train, tmp_path, (1, 2, 4, 6, 8, 11), steps=16, eval_every=3)
    for stop in (1, 4, 6, 11):
        folder = tmp_path / f"stopped_{stop}" / "emergency_exit"
        state = tg.load_checkpoint(folder / f"emergency_step_{stop}.pt")
        assert bool(state["loop"]["gradients"]) == (stop % 4 > 0)


def test_two_optimizers_that_step_in_turn(tmp_path):
    def train(run: tg.Run) -> None:
        run.data(Points(), Points(11))
        generator = run.model(nn.Linear(3, 6), name="generator")
        discriminator = run.model(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), "critic"
        )
        of_g = torch.optim.Adam(generator.parameters(), 1e-2)
        of_d = torch.optim.RMSprop(discriminator.parameters(), 1e-2)
        run.keep(optimizers={"of_g": of_g, "of_d": of_d})
        for points, _ in run.batches():
            fake = generator(torch.randn(len(points), 3))
            if run.step % 2:
                loss = -discriminator(fake).mean()
            else:
                loss = discriminator(fake.detach()).mean() - discriminator(points).mean()
            optimizer = of_g if run.step % 2 else of_d
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)

    assert_resumes(train, tmp_path, (1, 5, 6))
    state = tg.load_checkpoint(tmp_path / "whole" / "final.pt")
    assert set(state["state_dicts"]) == {"generator", "critic"}
    assert set(state["optimizer_state_dicts"]) == {"of_g", "of_d"}
    # What the generator's loss has left in the critic waits for the critic's next zero_grad().
    state = tg.load_checkpoint(tmp_path / "stopped_6" / "emergency_exit" / "emergency_step_6.pt")
    assert "critic.0.weight" in state["loop"]["gradients"]


@pytest.mark.parametrize("best", ["max accuracy", "max minus", "min loss"])
def test_what_is_best_may_be_high_or_negative(tmp_path, best):
    train = classification(best=best)
    assert_resumes(train, tmp_path, (9,))
    rows = [row for row in metrics_without_times(tmp_path / "whole") if row["val_loss"]]
    choose, name = (max if best.startswith("max") else min), best.split()[1]
    expected = choose(rows, key=lambda row: float(row[f"val_{name}"]))
    state = tg.load_checkpoint(tmp_path / "whole" / "best.pt")
    value, step = float(expected[f"val_{name}"]), int(expected["step"])
    assert state["best"] == {"value": value, "step": step, "of": best}
    assert state["step"] == state["best"]["step"]


@pytest.mark.parametrize("kind", ["tensor", "dict", "nested"])
def test_batches_of_any_shape(tmp_path, kind):
    def train(run: tg.Run) -> None:
        run.data(Points(kind=kind), Points(11, kind=kind))
        model = run.model(nn.Linear(6, 4))
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.1))

        def losses(batch):
            points, labels = {
                "tensor": lambda: (batch[:, :6], batch[:, 6].long()),
                "dict": lambda: (batch["point"], batch["label"]),
                "nested": lambda: (batch["a"][0], batch["a"][1][0]),
            }[kind]()
            return F.cross_entropy(model(points), labels, reduction="none")

        for batch in run.batches(lambda batch: {"loss": losses(batch)}):
            optimizer.zero_grad()
            loss = losses(batch).mean()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)

    assert_resumes(train, tmp_path, (4, 6), workers=1)


def test_a_collate_function_of_ones_own_may_be_random(tmp_path):
    def collate(samples):
        points = torch.stack([point for point, _ in samples])
        return points * torch.rand(()), torch.stack([label for _, label in samples])

    def train(run: tg.Run) -> None:
        run.data(Points(), Points(11), collate)
        model = run.model(nn.Linear(6, 4))
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.1))
        for points, labels in run.batches():
            # mixup, with numpy's generator.
            share = np.random.beta(0.4, 0.4)
            order = torch.randperm(len(points))
            logits = model(share * points + (1 - share) * points[order])
            loss = share * F.cross_entropy(logits, labels)
            loss = loss + (1 - share) * F.cross_entropy(logits, labels[order])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)

    assert_resumes(train, tmp_path, (4, 6), workers=2)


def test_early_stopping_with_patience(tmp_path):
    """break in the batch after the third evaluation without a better one; what is saved is final."""

    def train(run: tg.Run) -> None:
        run.data(Points(), Points(11))
        model = run.model(net())
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.0))

        def evaluate(batch):
            return {"loss": F.cross_entropy(model(batch[0]), batch[1], reduction="none")}

        for points, labels in run.batches(evaluate):
            if run.best is not None and run.step - run.best_step >= 4:
                break
            loss = F.cross_entropy(model(points), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
        run.log(after=1.0)

    assert_resumes(train, tmp_path, (3, 5, 8), steps=100)
    state = tg.load_checkpoint(tmp_path / "whole" / "final.pt")
    assert state["step"] < 100 and state["exit_reason"] == "completed"


def ends_itself(at: int, how: str):
    """train(run) that leaves its loop in the batch behind so many."""

    def train(run: tg.Run) -> None:
        run.data(Points())
        model = run.model(net())
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.1))
        for points, labels in run.batches():
            optimizer.zero_grad()
            F.cross_entropy(model(points), labels).backward()
            here = how if run.step == at else ""
            if here == "break before the step":
                break
            optimizer.step()
            if here == "break":
                break
            if here == "return":
                return

    return train


@pytest.mark.parametrize("how", ["return", "break", "break before the step"])
def test_break_completes_a_batch_in_which_an_optimizer_has_stepped_and_no_other(tmp_path, how):
    train, stepped = ends_itself(6, how), how != "break before the step"
    run = go(train, tmp_path)
    state = tg.load_checkpoint(tmp_path / "final.pt")
    assert state["step"] == run.step == 6 + stepped and state["exit_reason"] == "completed"
    assert state["model_state_dict"]["1.num_batches_tracked"] == 6 + stepped


@pytest.mark.parametrize("how", ["return", "break", "break before the step"])
def test_a_run_that_has_ended_its_loop_trains_on_when_it_is_resumed(tmp_path, how):
    """The body decides again; where it does not end the loop any more, it is the run that never did."""
    go(ends_itself(6, how), tmp_path / "ended")
    step = go(ends_itself(6, how), tmp_path / "ended", "--resume", "latest").step
    assert step == (6 if how == "break before the step" else 13)
    on = ends_itself(13, "never")
    go(ends_itself(6, how), tmp_path / "on")
    go(on, tmp_path / "on", "--resume", "latest")
    go(on, tmp_path / "whole")
    assert_same_run(tmp_path / "on", tmp_path / "whole")


def test_continue_and_an_exception_that_the_body_swallows_complete_the_batch(tmp_path):
    def train(run: tg.Run) -> None:
        run.data(Points())
        model = run.model(net())
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.1))
        for points, labels in run.batches():
            try:
                if run.step == 3:
                    continue
                optimizer.zero_grad()
                loss = F.cross_entropy(model(points), labels)
                loss.backward()
                if run.step == 5:
                    raise OSError("no matter")
                optimizer.step()
            except OSError:
                pass

    assert go(train, tmp_path).step == 13
    assert_resumes(train, tmp_path / "more", (4, 6, 7))


def test_fine_tuning_goes_on_with_its_own_weights(tmp_path):
    pretrained = net().state_dict()

    def model() -> nn.Module:
        made = net()
        made.load_state_dict(pretrained)
        return made

    assert_resumes(classification(model=model), tmp_path, (5,))


def test_an_evaluation_leaves_every_module_as_it_was(tmp_path):
    """One that its user has frozen with eval() stays so; its statistics never move."""
    flags = []

    def model() -> nn.Module:
        made = net()
        made[1].eval()
        return made

    def body(run, module, optimizer, planned, more, loss):
        flags.append((module.training, module[1].training, module[3].training))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    go(classification(model=model, body=body), tmp_path)
    assert set(flags) == {(True, False, True)}
    state = tg.load_checkpoint(tmp_path / "final.pt")["model_state_dict"]
    assert state["1.num_batches_tracked"] == 0


def test_an_evaluation_is_the_mean_over_all_samples(tmp_path):
    seen = []

    def train(run: tg.Run) -> None:
        run.data(list(range(8)), list(range(100, 121)))
        run.model(nn.Linear(1, 1))
        for _ in run.batches(
            lambda batch: {"number": batch, "odd": batch % 2 == 1}, best="max number"
        ):
            seen.append(run.evaluation)

    go(train, tmp_path, steps=5)
    assert seen[-1] == {"number": 110.0, "odd": 10 / 21}
    go(train, tmp_path / "few", "--eval-batches", 1, steps=5)
    assert seen[-1] == {"number": 108.75, "odd": 4 / 8}


def test_the_loop_may_be_all_there_is(tmp_path):
    """Without an optimizer of PyTorch's every batch is a boundary."""

    def train(run: tg.Run) -> None:
        run.data(Points())
        model = run.model(nn.Linear(6, 4))
        for points, labels in run.batches():
            loss = F.cross_entropy(model(points), labels)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients):
                    parameter -= 0.1 * gradient
            run.log(loss=loss)

    assert_resumes(train, tmp_path, (1, 5))


# ---- what goes wrong in the body


def failing(when: str, at: int = 6):
    def body(run, module, optimizer, planned, more, loss):
        optimizer.zero_grad()
        loss.backward()
        if run.step == at and when == "before":
            raise ZeroDivisionError
        optimizer.step()
        run.log(loss=loss)
        if run.step == at and when == "after":
            raise ZeroDivisionError
        if run.step == at and when == "exit":
            sys.exit(7)
        if run.step == at and when == "nan":
            run.log(loss=math.nan)

    return classification(body=body)


def test_an_exception_before_the_optimizer_saves_the_last_boundary(tmp_path, capfd):
    """BatchNorm's statistics, which the forward pass has moved, are put back."""
    arguments = ("--checkpoint-dir", tmp_path / "failed")
    assert session(*arguments, train=failing("before"), **OPTIONS) == 1
    assert "ZeroDivisionError" in capfd.readouterr().err
    path = tmp_path / "failed" / "emergency_exit" / "emergency_step_6.pt"
    state = tg.load_checkpoint(path)
    assert state["exit_reason"] == "exception_ZeroDivisionError"
    go(failing("never"), tmp_path / "stopped", stop=6)
    other = tg.load_checkpoint(tmp_path / "stopped" / "emergency_exit" / "emergency_step_6.pt")
    keys = ("model_state_dict", "optimizer_state_dicts", "step", "best", "evaluation")
    assert_same({key: state[key] for key in keys}, {key: other[key] for key in keys})
    go(failing("never"), tmp_path / "failed", "--resume", path)
    go(failing("never"), tmp_path / "whole")
    assert_same_run(tmp_path / "failed", tmp_path / "whole")


@pytest.mark.parametrize(
    "when, code, words",
    [("after", 1, "ZeroDivisionError"), ("exit", 7, ""), ("nan", 1, "the loss is NaN")],
)
def test_an_exception_after_a_step_saves_nothing_half_updated(tmp_path, capfd, when, code, words):
    arguments = ("--checkpoint-dir", tmp_path, "--save-every", 4)
    assert session(*arguments, train=failing(when), **OPTIONS) == code
    printed = capfd.readouterr()
    assert words in printed.err and "nothing half-updated is saved" in printed.out
    assert f"Newest whole checkpoint: {tmp_path}/step_4.pt" in printed.out
    assert not (tmp_path / "emergency_exit").exists()


def test_sys_exit_before_a_step_saves_and_keeps_its_code(tmp_path):
    def body(run, module, optimizer, planned, more, loss):
        if run.step == 1:
            sys.exit(5)
        loss.backward()

    assert session("--checkpoint-dir", tmp_path, train=classification(body=body), **OPTIONS) == 5
    state = tg.load_checkpoint(tmp_path / "emergency_exit" / "emergency_step_1.pt")
    assert state["exit_reason"] == "exception_SystemExit"


def test_a_gradient_that_is_not_finite_raises_before_anything_is_updated(tmp_path, capfd):
    def body(run, module, optimizer, planned, more, loss):
        optimizer.zero_grad()
        (loss * (math.nan if run.step == 6 else 1)).backward()
        run.clip_gradients(1.0)
        optimizer.step()

    assert session("--checkpoint-dir", tmp_path, train=classification(body=body), **OPTIONS) == 1
    assert "the gradient is NaN or infinite; nothing was updated" in capfd.readouterr().err
    assert tg.load_checkpoint(tmp_path / "emergency_exit" / "emergency_step_6.pt")["step"] == 6


def test_leaving_runs_finally_and_not_what_comes_after_the_loop(tmp_path):
    seen = []

    def train(run: tg.Run) -> None:
        try:
            classification()(run)
            seen.append("after")
        finally:
            seen.append("finally")

    go(train, tmp_path, stop=4)
    assert seen == ["finally"]
    go(train, tmp_path, "--resume", "latest")
    assert seen == ["finally", "after", "finally"]
    go(train, tmp_path, "--resume", "latest")
    assert seen[-2:] == ["after", "finally"]


# ---- mistakes


def mistake(capfd, train, *args, **options) -> str:
    """The one line that a mistake is answered with."""
    assert session(*args, train=train, **{**OPTIONS, **options}) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


class Stream(IterableDataset):
    def __iter__(self):
        yield 1


def in_the_loop(change):
    """train(run) with one thing changed: change(run, model) instead of the body."""

    def train(run: tg.Run) -> None:
        run.data(Points(), Points(11))
        model = run.model(net())
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.1))
        change(run, model, optimizer)

    return train


def evaluates(result):
    return in_the_loop(lambda run, model, optimizer: list(run.batches(result)))


def loops_twice(run, model, optimizer):
    list(run.batches())
    list(run.batches())


def steps_with_another(run, model, optimizer):
    another = torch.optim.Adam(model.parameters())
    for points, labels in run.batches():
        F.cross_entropy(model(points), labels).backward()
        another.step()


def steps_another_network(run, model, optimizer):
    critic = nn.Linear(6, 1)
    another = torch.optim.SGD(critic.parameters(), 0.1)
    for points, labels in run.batches():
        F.cross_entropy(model(points), labels).backward()
        optimizer.step()
        critic(points).mean().backward()
        another.step()


def made_before(run):
    run.data(Points())
    optimizer = torch.optim.SGD(nn.Linear(6, 4).parameters(), 0.1)
    run.model(net())
    run.keep(optimizer=optimizer)
    list(run.batches())


MISTAKES = {
    "call run.data(training, validation) first": lambda run: run.total_steps,
    "call run.model(module) before the loop": lambda run: (run.data(Points()), list(run.batches())),
    "validation data is map-style, but Stream has no __getitem__": lambda run: run.data(
        Points(), Stream()
    ),
    "5 training samples, where 8 are needed": lambda run: run.data(Points(5)),
    "0 validation samples, where 1 are needed": lambda run: run.data(Points(), []),
    "there is no validation data": lambda run: (
        run.data(Points()),
        run.model(net()),
        list(run.batches(lambda batch: {})),
    ),
    "one loop goes through all epochs": in_the_loop(loops_twice),
    "Adam steps in the loop but is not kept: run.keep(": in_the_loop(steps_with_another),
    "SGD steps in the loop but is not kept": in_the_loop(steps_another_network),
    "has parameters that no run.model(...) has": made_before,
    "optimizer has a scheduler that is not kept": in_the_loop(
        lambda run, model, optimizer: (SCHEDULERS["StepLR"](optimizer, run), list(run.batches()))
    ),
    "run.log(step=...): metrics.csv has a column of that name": in_the_loop(
        lambda run, model, optimizer: [run.log(step=1) for batch in run.batches()]
    ),
    "evaluate gave 0.5, not {name: a value": evaluates(lambda batch: 0.5),
    "evaluate has found accuracy; best is 'min loss'": evaluates(
        lambda batch: {"accuracy": batch[1]}
    ),
    'evaluate returned "loss" of shape () for 8 samples: reduction="none"': evaluates(
        lambda batch: {"loss": torch.zeros(())}
    ),
    'evaluate returned "loss" of shape (8, 2) for 8 samples': evaluates(
        lambda batch: {"loss": torch.zeros(8, 2)}
    ),
    'evaluate returned "loss" of shape () for 8 samples: ': evaluates(
        lambda batch: {"loss": "small"}
    ),
    'best="least loss"': in_the_loop(lambda run, *rest: run.batches(None, "least loss")),
    "it has no load_state_dict": in_the_loop(lambda run, *rest: run.keep(number=1)),
    "the name optimizer is taken": in_the_loop(
        lambda run, model, optimizer: run.keep(optimizer=torch.optim.SGD(model.parameters()))
    ),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_answered_with_what_to_write(tmp_path, capfd, words):
    assert words in mistake(capfd, MISTAKES[words], "--checkpoint-dir", tmp_path)
    # Evaluate is called in evaluations only: what was trained until then is saved.
    assert len(list(tmp_path.rglob("emergency*.pt"))) == words.startswith("evaluate")


def test_how_long_has_to_be_said(tmp_path, capfd):
    words = mistake(capfd, classification(), "--checkpoint-dir", tmp_path, steps=None)
    assert "how long? Give --steps (or --epochs, but not of a stream)" in words


def test_a_column_that_comes_late_is_empty_before(tmp_path):
    def body(run, module, optimizer, planned, more, loss):
        optimizer.step()
        run.log(loss=loss)
        if run.step > 5:
            run.log(late=run.step)

    assert_resumes(classification(body=body), tmp_path, (4, 8))
    rows = metrics_without_times(tmp_path / "whole")
    late = [row["late"] for row in rows]
    assert late[0] == "" and late[-1] == "12.0"


OTHERS = {
    "kept by this run, but not in the checkpoint": classification(scheduler=SCHEDULERS["StepLR"]),
    "does not fit optimizer (class: AdamW there, SGD here)": classification(OPTIMIZERS["SGD"]),
    "does not fit optimizer (param_names: [['model.0.weight', ": classification(
        lambda p: torch.optim.AdamW(p[::-1])
    ),
    "does not fit optimizer (param_names: ": classification(lambda p: torch.optim.AdamW(p[:-1])),
    "size mismatch for 0.weight": classification(
        model=lambda: nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4))
    ),
    '"max accuracy" does not fit the checkpoint, whose run has "min loss"': classification(
        best="max accuracy"
    ),
}


@pytest.mark.parametrize("words", OTHERS)
def test_what_does_not_fit_the_checkpoint_is_named_before_training(tmp_path, capfd, words):
    go(classification(), tmp_path, stop=6)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capfd.readouterr()
    arguments = ("--checkpoint-dir", tmp_path, "--resume", "latest")
    assert words in mistake(capfd, OTHERS[words], *arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_is_in_the_checkpoint_but_not_kept_is_named(tmp_path, capfd):
    go(classification(scheduler=SCHEDULERS["StepLR"]), tmp_path, stop=4)
    capfd.readouterr()
    words = mistake(capfd, classification(), "--checkpoint-dir", tmp_path, "--resume", "latest")
    assert "scheduler is in the checkpoint, but not kept by this run" in words


def test_a_model_that_the_checkpoint_has_not_is_named(tmp_path, capfd):
    go(classification(), tmp_path, stop=4)
    capfd.readouterr()
    train = two_networks(lambda step: True, lambda step: True)
    words = mistake(capfd, train, "--checkpoint-dir", tmp_path, "--resume", "latest")
    assert "emergency_step_4.pt does not fit first (" in words


def test_a_scheduler_of_another_class_is_named(tmp_path, capfd):
    go(classification(scheduler=SCHEDULERS["StepLR"]), tmp_path, stop=4)
    capfd.readouterr()
    train = classification(scheduler=SCHEDULERS["ExponentialLR"])
    words = mistake(capfd, train, "--checkpoint-dir", tmp_path, "--resume", "latest")
    assert "does not fit scheduler (class: StepLR there, ExponentialLR here)" in words


@pytest.mark.parametrize("steps", [10, 20])
def test_another_length_than_one_cycle_was_made_for_is_refused(tmp_path, capfd, steps):
    train = classification(scheduler=SCHEDULERS["OneCycleLR"])
    go(train, tmp_path / "whole")
    go(train, tmp_path / "whole", "--resume", "latest")
    assert "Nothing left to do: step 13 of 13.\n" in capfd.readouterr().out
    go(train, tmp_path, stop=4)
    capfd.readouterr()
    arguments = ("--checkpoint-dir", tmp_path, "--resume", "latest", "--steps", steps)
    assert f"(total_steps: 13 there, {steps} here)" in mistake(capfd, train, *arguments)


def test_a_request_in_the_evaluation_behind_a_break_ends_a_completed_run(tmp_path):
    def train(run: tg.Run) -> None:
        run.data(Points(), Points(11))
        model = run.model(net())
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.1))

        def evaluate(batch):
            ask_to_leave(run)
            return {"loss": F.cross_entropy(model(batch[0]), batch[1], reduction="none")}

        for points, labels in run.batches(evaluate):
            F.cross_entropy(model(points), labels).backward()
            optimizer.step()
            if run.step == 3:
                break

    assert session("--checkpoint-dir", tmp_path, train=train, **OPTIONS) == 0
    state = tg.load_checkpoint(tmp_path / "final.pt")
    assert state["step"] == 4 and state["best"]["value"] is None


@pytest.mark.parametrize("keep", [1, 3, 4, 5, 50])
def test_so_many_periodic_checkpoints_are_kept(tmp_path, keep):
    go(classification(), tmp_path, save_every=2, keep=keep)
    steps = sorted(int(path.stem[5:]) for path in tmp_path.glob("step_*.pt"))
    assert steps == [2, 4, 6, 8, 10, 12][-keep:]


def test_a_break_is_not_called_all_steps(tmp_path, capfd):
    train = ends_itself(5, "break")
    go(train, tmp_path)
    output = capfd.readouterr().out
    assert "🎉 The loop has ended." in output and "All steps done" not in output
    assert "Final checkpoint: " in output
    assert go(train, tmp_path, "--resume", "latest", "--steps", 20).step == 20


def test_a_failure_before_the_first_save_says_that_there_is_none(tmp_path, capfd):
    def body(run, module, optimizer, planned, more, loss):
        optimizer.step()
        run.log(loss=math.nan)

    arguments = ("--checkpoint-dir", tmp_path)
    assert session(*arguments, train=classification(body=body), **OPTIONS) == 1
    assert "   Checkpoint: none yet\n" in capfd.readouterr().out


def test_an_interrupt_that_the_body_raises_is_an_exception_like_any_other(tmp_path):
    def body(run, module, optimizer, planned, more, loss):
        if run.step == 3:
            raise KeyboardInterrupt
        optimizer.step()

    arguments = ("--checkpoint-dir", tmp_path)
    assert session(*arguments, train=classification(body=body), **OPTIONS) == 1
    state = tg.load_checkpoint(tmp_path / "emergency_exit" / "emergency_step_3.pt")
    assert state["exit_reason"] == "exception_KeyboardInterrupt"


def test_what_cannot_be_saved_is_said_after_the_first_step(tmp_path, capfd):
    class Odd:
        def state_dict(self):
            return {"path": object()}

        def load_state_dict(self, state):
            pass

    train = classification(kept=lambda run, module: run.keep(odd=Odd()))
    words = mistake(capfd, train, "--checkpoint-dir", tmp_path)
    assert "error: ['state_dicts']['odd']['path'] cannot be saved: it is a builtins.object" in words


# ---- waiting for data


def test_a_dataset_that_stands_still_keeps_nobody_from_leaving(tmp_path):
    """Without workers the main thread itself waits in it."""

    class Stuck(Points):
        def __getitem__(self, index):
            if stuck:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            return super().__getitem__(index)

    stuck = []

    def train(run: tg.Run) -> None:
        run.data(Stuck())
        model = run.model(net())
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.1))
        for points, labels in run.batches():
            optimizer.zero_grad()
            F.cross_entropy(model(points), labels).backward()
            optimizer.step()
            if run.step == 4:
                stuck.append(1)

    assert session("--checkpoint-dir", tmp_path, train=train, **OPTIONS) == 143
    state = tg.load_checkpoint(tmp_path / "emergency_exit" / "emergency_step_5.pt")
    assert state["exit_reason"] == "signal_SIGTERM"
