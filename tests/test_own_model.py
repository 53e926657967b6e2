"""Anybody's model and loop is resumed bit for bit, and a mistake in it is answered in one line."""

import functools
import math
import sys

import helpers as h
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

import train_graceful as tg


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2)
    )


def adam(parameters) -> AdamW:
    return AdamW(parameters, 0.05)


def optimizing(make=adam, schedule=None, model=net, **how):
    """train(run) with the optimizer make(parameters) and the scheduler schedule(optimizer, run)."""

    def begin(run: tg.Run, module: nn.Module):
        optimizer = run.keep(optimizer=make([*module.parameters()]))
        return optimizer, schedule and run.keep(scheduler=schedule(optimizer, run))

    def body(run, module, kept, batch):
        optimizer, scheduler = kept
        optimizer.zero_grad()
        loss = h.loss_of(module, batch)
        loss.backward()
        run.clip_gradients(1.0)
        optimizer.step()
        if scheduler:
            scheduler.step()
        return loss

    return h.learning(begin, body, model=model, **how)


# ---- what is resumed


def noisy(run: tg.Run, module: nn.Module):
    evaluate = h.losses(run, module)
    return lambda batch: {**evaluate(batch), "noise": torch.rand(len(batch[0]))}


@pytest.mark.parametrize(
    "before, after, stops",
    [(0, 0, range(1, 13)), (2, 3, [6, "evaluation 5"]), (0, 2, [5]), (2, 2, [10])],
)
def test_whenever_it_is_stopped_and_with_any_number_of_workers(tmp_path, before, after, stops):
    """A model with BatchNorm and dropout, augmentation at random, rows of means over batches."""
    how = {"before": ["--workers", before], "after": ["--workers", after], "log_every": 3}
    h.assert_resumes(optimizing(evaluate=noisy), tmp_path, *stops, **how)


OPTIMIZERS = {
    "amsgrad": lambda p: torch.optim.Adam(p, 0.05, amsgrad=True),
    "SGD": lambda p: SGD(p, 0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "groups": lambda p: AdamW([{"params": p[:2], "lr": 0.1}, {"params": p[2:]}], 0.05),
}


def warm_up(o) -> list:
    return [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]


SCHEDULERS = {
    "StepLR": lambda o, run: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o, run: lr_scheduler.MultiStepLR(o, [2, 7]),
    "ExponentialLR": lambda o, run: lr_scheduler.ExponentialLR(o, 0.9),
    "CyclicLR": lambda o, run: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o, run: lr_scheduler.OneCycleLR(o, 0.1, total_steps=run.total_steps),
    "SequentialLR": lambda o, run: lr_scheduler.SequentialLR(o, warm_up(o), [4]),
    "ChainedScheduler": lambda o, run: lr_scheduler.ChainedScheduler(warm_up(o)),
    "SWALR": lambda o, run: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=6),
}
KEPT = {name: optimizing(make) for name, make in OPTIMIZERS.items()}
KEPT |= {name: optimizing(schedule=make) for name, make in SCHEDULERS.items()}


@pytest.mark.parametrize("name", KEPT)
def test_optimizers_and_schedulers_of_any_kind(tmp_path, name):
    """Every row has the learning rates; what is shown of the loss is smooth."""
    whole = h.assert_resumes(KEPT[name], tmp_path, 5)
    smooth = functools.reduce(lambda mean, one: 0.9 * mean + 0.1 * one, h.column(whole, "loss"))
    assert h.final(whole)["metrics"]["smooth_loss"] == pytest.approx(smooth)


def attacks(run, module, optimizer, batch):
    """By an optimizer that lives for a batch, and need not be kept."""
    shift = torch.zeros(4, requires_grad=True)
    attack = SGD([shift], 0.1)
    h.loss_of(module, [batch[0] + shift, batch[1]]).backward()
    attack.step()
    return h.update(run, module, optimizer, [batch[0] + shift.detach(), batch[1]])


def plateau(run, module):
    optimizer = h.sgd(run, module)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
    return optimizer, run.keep(scheduler=scheduler)


def follows_the_evaluations(run, module, kept, batch):
    if run.evaluation is not None:
        kept[1].step(run.evaluation["loss"])
    return h.update(run, module, kept[0], batch)


def scaler(run, module):
    """With a scale at which the gradient overflows, so that it skips the first steps."""
    made = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
    return h.sgd(run, module), run.keep(scaler=made)


def scales(run, module, kept, batch):
    optimizer, scaler = kept
    optimizer.zero_grad()
    loss = h.loss_of(module, batch)
    # More than float32 has room for, as long as the scale is this large.
    scaler.scale(8 * loss).backward()
    scaler.unscale_(optimizer)
    run.clip_gradients(1.0)
    scaler.step(optimizer)
    scaler.update()
    run.log(scale=scaler.get_scale())
    return loss


def takes_turns(run, module, optimizer, batch):
    """In every other batch only the first layer has a part; the others step with zeros."""
    optimizer.zero_grad(set_to_none=False)
    loss = h.loss_of(module if run.step % 2 else module[0], batch)
    loss.backward()
    optimizer.step()
    return loss


# A loop, and a column that has to change in it.
LOOPS = {
    "an optimizer for a batch": (h.learning(body=attacks, model=net), "loss"),
    "a plateau": (h.learning(plateau, follows_the_evaluations), "lr_optimizer"),
    "a scaler": (h.learning(scaler, scales), "scale"),
    "gradients that are zeros": (h.learning(body=takes_turns, model=h.mlp), "loss"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_and_batches_of_any_kind(tmp_path, name):
    train, changes = LOOPS[name]
    whole = h.assert_resumes(train, tmp_path, 1, 5, 6, "evaluation 5", workers=1)
    assert len(set(h.column(whole, changes))) > 1


def two_networks(run: tg.Run) -> None:
    """Two models and their optimizers: one steps in every batch, the other in every fourth."""
    run.data(h.Rows(), h.Rows(7))
    models = run.model(nn.Linear(4, 4), "first"), run.model(nn.Linear(4, 2), "second")
    one, two = (SGD(model.parameters(), 0.05, momentum=0.9) for model in models)
    run.keep(optimizers={"one": one, "two": two})
    both = nn.Sequential(*models)
    for batch in run.batches(h.losses(run, both)):
        run.log(loss=h.update(run, both, one, batch))
        if run.step % 4 == 3:
            two.step()
            two.zero_grad()


def test_gradients_that_wait_for_a_step_are_saved_and_nobody_waits_for_it(tmp_path):
    whole = h.assert_resumes(two_networks, tmp_path, *range(4, 9))
    for stop in range(4, 9):
        folder = tmp_path / f"stopped {stop}" / "emergency_exit"
        state = tg.load_checkpoint(folder / f"emergency_step_{stop}.pt")
        waiting = {"second.weight", "second.bias"} if stop % 4 else set()
        gradients = state["loop"]["gradients"]
        assert {name for name, one in gradients.items() if one is not None} == waiting
    state = tg.load_checkpoint(whole / "final.pt")
    assert set(state["state_dicts"]) == {"first", "second"}
    assert set(state["optimizer_state_dicts"]) == {"one", "two"}


def test_a_column_that_comes_late_is_empty_before(tmp_path):
    def body(run, module, optimizer, batch):
        if run.step > 5:
            run.log(late=run.step)
        return h.update(run, module, optimizer, batch)

    whole = h.assert_resumes(h.learning(body=body), tmp_path, 4, 8)
    late = [row["late"] for row in h.metrics_without_times(whole)]
    assert late[0] == "" and late[-1] == "11.0"


# ---- evaluations


@pytest.mark.parametrize("best", ["max minus", "min loss"])
def test_what_is_best_may_be_high_or_negative(tmp_path, best):
    whole = h.assert_resumes(h.learning(best=best), tmp_path, 9, eval_every=2)
    rows = [row for row in h.metrics_without_times(whole) if row["val_loss"]]
    choose, name = (max if best.startswith("max") else min), best.split()[1]
    expected = choose(rows, key=lambda row: float(row[f"val_{name}"]))
    state = tg.load_checkpoint(whole / "best.pt")
    value, step = float(expected[f"val_{name}"]), int(expected["step"])
    assert state["best"] == {"value": value, "step": step, "of": best}
    assert state["step"] == step


def test_an_evaluation_leaves_every_module_as_it_was(tmp_path):
    """One that its user has frozen with eval() stays so; its statistics never move."""
    flags = []

    def model() -> nn.Module:
        made = net()
        made[1].eval()
        return made

    def body(run, module, optimizer, batch):
        flags.append((module.training, module[1].training, module[3].training))
        return h.update(run, module, optimizer, batch)

    h.go(h.learning(body=body, model=model), tmp_path)
    assert set(flags) == {(True, False, True)}
    state = tg.load_checkpoint(tmp_path / "final.pt")["model_state_dict"]
    assert state["1.num_batches_tracked"] == 0


def test_an_evaluation_is_the_mean_over_all_samples(tmp_path):
    seen = []

    def train(run: tg.Run) -> None:
        run.data(list(range(8)), list(range(100, 121)))
        run.model(nn.Linear(1, 1))
        evaluate = lambda batch: {"number": batch, "odd": batch % 2 == 1}
        for _ in run.batches(evaluate, best="max number"):
            seen.append(run.evaluation)

    h.go(train, tmp_path, steps=6)
    assert seen[-1] == {"number": 110.0, "odd": 10 / 21}
    h.go(train, tmp_path / "few", "--eval-batches", 2, steps=6)
    assert seen[-1] == {"number": 108.75, "odd": 4 / 8}


# ---- a loop that ends itself


def ends_itself(how: str):
    """train(run) that leaves its loop in the seventh batch."""

    def train(run: tg.Run) -> None:
        run.data(h.Rows(), h.Rows(7))
        model = run.model(net())
        optimizer = h.sgd(run, model)
        for batch in run.batches(h.losses(run, model)):
            optimizer.zero_grad()
            h.loss_of(model, batch).backward()
            if run.step == 6 and how == "break before the step":
                break
            optimizer.step()
            if run.step == 6 and how == "break":
                break

    return train


@pytest.mark.parametrize("how", ["break", "break before the step"])
def test_break_completes_a_batch_in_which_an_optimizer_has_stepped_and_no_other(
    tmp_path, capfd, how
):
    """Resumed, the body decides again; where it goes on, it is the run that never ended itself."""
    train, on, step = ends_itself(how), ends_itself("never"), 6 + (how != "break before the step")
    run = h.go(train, tmp_path / "on")
    said = capfd.readouterr().out
    assert "🎉 The loop has ended." in said and "All steps done" not in said
    state = tg.load_checkpoint(tmp_path / "on" / "final.pt")
    assert state["step"] == run.step == step and state["exit_reason"] == "completed"
    assert state["model_state_dict"]["1.num_batches_tracked"] == step
    assert step == 7 or h.resume(train, tmp_path / "on").step == 6
    h.resume(on, tmp_path / "on", eval_every=100)
    h.go(on, tmp_path / "whole")
    ours, theirs = (tg.load_checkpoint(tmp_path / one / "final.pt") for one in ("on", "whole"))
    h.assert_same(ours["model_state_dict"], theirs["model_state_dict"])
    assert h.resume(on, tmp_path / "on", "--steps", 20).step == 20
    # A request in the evaluation behind the break ends a run that is completed.
    h.go(train, tmp_path / "asked", stop=f"evaluation {step}", code=0)
    state = tg.load_checkpoint(tmp_path / "asked" / "final.pt")
    assert state["step"] == step and state["exit_reason"] == "completed"


def test_leaving_runs_finally_and_not_what_comes_after_the_loop(tmp_path):
    seen = []

    def train(run: tg.Run) -> None:
        try:
            h.learning()(run)
            seen.append("after")
        finally:
            seen.append("finally")

    h.go(train, tmp_path, stop=4)
    assert seen == ["finally"]
    h.resume(train, tmp_path)
    assert seen == ["finally", "after", "finally"]
    h.resume(train, tmp_path)
    assert seen[3:] == ["after", "finally"]


# ---- what goes wrong in the body


def failing(before=lambda: 1.0, after=lambda: 0.0):
    """In batch --fails this happens before the step of the optimizer, or behind it."""

    def body(run, module, optimizer, batch):
        fails = run.step == run.options.fails
        optimizer.zero_grad()
        loss = h.loss_of(module, batch)
        (loss * (before() if fails else 1)).backward()
        run.clip_gradients(1.0)
        optimizer.step()
        return loss + (after() if fails else 0)

    return h.learning(body=body, model=net)


BEFORE = {
    "SystemExit": (5, lambda: sys.exit(5), ""),
    "FloatingPointError": (1, lambda: math.nan, "NaN or infinite; nothing was updated"),
}
AFTER = {"": (7, lambda: sys.exit(7)), "the loss is NaN": (1, lambda: math.nan)}


@pytest.mark.parametrize("reason", BEFORE)
def test_a_failure_before_the_optimizer_saves_the_last_boundary(tmp_path, capfd, reason):
    """BatchNorm's statistics, which the forward pass has moved, are put back."""
    code, before, words = BEFORE[reason]
    h.go(failing(before), tmp_path / "parts", "--fails", 6, code=code)
    assert words in capfd.readouterr().err
    path = tmp_path / "parts" / "emergency_exit" / "emergency_step_6.pt"
    assert tg.load_checkpoint(path)["exit_reason"] == f"exception_{reason}"
    h.resume(failing(), tmp_path / "parts", "--fails", -1)
    h.go(failing(), tmp_path / "whole")
    h.assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("words", AFTER)
def test_a_failure_after_a_step_saves_nothing_half_updated(tmp_path, capfd, words):
    code, after = AFTER[words]
    for fails, newest in (1, "Checkpoint: none yet"), (6, f"Newest whole checkpoint: {tmp_path}/6"):
        directory = tmp_path / str(fails)
        how = {"save_every": 4, "eval_every": 100}
        h.go(failing(after=after), directory, "--fails", fails, code=code, **how)
        said = capfd.readouterr()
        assert words in said.err and "nothing half-updated is saved" in said.out
        assert f"   {newest}" in said.out and not (directory / "emergency_exit").exists()


# ---- mistakes


def evaluates(result):
    return h.learning(evaluate=lambda run, module: result)


def given(*data, **arguments):
    return h.learning(data=lambda run: run.data(*data, **arguments), evaluate=None)


def with_a_critic(run: tg.Run, module: nn.Module) -> tuple:
    """What else is kept, an average of the weights say, has no optimizer of anybody's."""
    run.keep(ema=AveragedModel(run.module))
    critic = nn.Linear(4, 1)
    return h.sgd(run, module), critic, SGD(critic.parameters(), 0.1)


def steps_another(run, module, kept, batch):
    optimizer, critic, another = kept
    critic(batch[0]).mean().backward()
    another.step()
    return h.update(run, module, optimizer, batch)


def made_before(run: tg.Run, module: nn.Module) -> SGD:
    return run.keep(optimizer=SGD(nn.Linear(4, 2).parameters(), 0.1))


def unkept_scheduler(run: tg.Run, module: nn.Module) -> tuple:
    optimizer, *_ = with_a_critic(run, module)
    return optimizer, lr_scheduler.StepLR(optimizer, 3)


def in_the_loop(change):
    return h.learning(body=lambda run, *others: change(run))


SHAPE = 'evaluate returned "loss" of shape'
MISTAKES = {
    "run.data(training, validation) first": lambda run: run.total_steps,
    "run.model(module) before the loop": lambda run: (run.data(h.Rows()), run.batches()),
    "run.data: validation data is map-style, but list_iter": given(h.Rows(), iter([1, 2])),
    "run.data: 3 training samples, where 4 are needed": given(h.Rows(3)),
    "run.data: 0 validation samples, where 1 are needed": given(h.Rows(), []),
    "run.data(collate_fn=...): it has collate=, ": given(h.Rows(), collate_fn=list),
    # Of samples of different lengths.
    "run.data(collate=...) is needed: ": given([torch.ones(1 + n % 3, 4) for n in range(8)]),
    "give it the dataset of your DataLoader": given(h.Rows(), DataLoader(h.Rows())),
    "there is no validation data": h.learning(data=lambda run: run.data(h.Rows())),
    "one loop goes through all epochs": in_the_loop(lambda run: run.batches()),
    "run.keep(late=...): before the loop": in_the_loop(lambda run: run.keep(late=net())),
    "run.log(step=...): metrics.csv has a column of that": in_the_loop(lambda run: run.log(step=1)),
    "SGD steps in the loop but is not kept: run.keep(": h.learning(with_a_critic, steps_another),
    "has parameters that no run.model(...) has": h.learning(made_before),
    "optimizer has a scheduler that is not kept": h.learning(unkept_scheduler),
    "evaluate gave 0.5, not {name: a value": evaluates(lambda batch: 0.5),
    "evaluate has found hits; best is 'min loss'": evaluates(lambda batch: {"hits": batch[1]}),
    f'{SHAPE} () for 4 samples: reduction="none"': evaluates(lambda _: {"loss": torch.ones(())}),
    f"{SHAPE} (4, 2) for 4 samples": evaluates(lambda batch: {"loss": torch.ones(4, 2)}),
    'best="least loss"': h.learning(best="least loss"),
    "it has no load_state_dict": h.learning(lambda run, module: run.keep(number=1)),
    "the name model is taken": h.learning(lambda run, module: run.keep(model=module)),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_answered_with_what_to_write(tmp_path, capfd, words):
    assert words in h.mistake(capfd, MISTAKES[words], tmp_path)
    # Evaluate is called in evaluations only: what was trained until then is saved.
    assert len(list(tmp_path.rglob("emergency*.pt"))) == words.startswith("evaluate")


# What is said: what the run was, what it is then, and arguments and options of the resumed one.
PLAIN, STEPLR = optimizing(), KEPT["StepLR"]
OTHERS = {
    "scheduler is in the checkpoint, but not kept by this run": (STEPLR, PLAIN),
    "scheduler (class: StepLR there, ExponentialLR here)": (STEPLR, KEPT["ExponentialLR"]),
    "does not fit optimizer (class: AdamW there, SGD here)": (PLAIN, KEPT["SGD"]),
    "step_6.pt does not fit first (": (PLAIN, two_networks),
    '"max minus" does not fit the checkpoint': (PLAIN, optimizing(best="max minus")),
    "(total_steps: 12 there, 20 here)": (KEPT["OneCycleLR"], KEPT["OneCycleLR"], "--steps", 20),
}


@pytest.mark.parametrize("words", OTHERS)
def test_what_does_not_fit_the_checkpoint_is_named_before_training(tmp_path, capfd, words):
    was, becomes, *arguments = OTHERS[words]
    h.go(was, tmp_path, stop=6)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = h.mistake(capfd, becomes, tmp_path, "--resume", "latest", *arguments)
    assert words in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("stop", [7, None], ids=["in the middle", "at the end"])
def test_what_another_length_and_other_options_mean_is_said(tmp_path, capfd, stop):
    h.go(KEPT["ExponentialLR"], tmp_path, stop=stop)
    h.resume(KEPT["ExponentialLR"], tmp_path, "--steps", 20, "--lr", "1e-05")
    said = capfd.readouterr().out
    changed = "⚙️ Changed: --steps 20 (was 12), --lr 1e-05 (was 0.05)."
    assert f"{changed} Learning rates and schedules that are kept go on as saved.\n" in said
    assert (
        h.column(tmp_path, "step")[-1] == 20 and max(h.column(tmp_path, "lr_optimizer")[13:]) > 1e-4
    )
