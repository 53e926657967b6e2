"""`make check` names what a script does wrong, and passes scripts that are right."""

import re
import subprocess
import sys

import helpers as h
import pytest

sys.path.insert(0, str(h.ROOT / "scripts"))
import check_resume

RIGHT = """
import torch
import train_graceful as tg

class Samples(torch.utils.data.Dataset):
    def __init__(self):
        self.values = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return self.values[index] + torch.randn(4)

class Counter:
    batches = 0

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]

def train(run):
    data = Samples()
    run.data(data, Samples())
    model = run.model(torch.nn.Linear(4, 1))
    optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.01, momentum=0.9))
    ema = run.keep(ema=torch.optim.swa_utils.AveragedModel(run.module))
    counter = run.keep(counter=Counter())
    rate, old = 0.01, []

    def evaluate(batch):
        return {"loss": (ema(batch) - 1).square().mean(dim=1)}

    for batch in run.batches(evaluate):
        loss = (model(batch) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update_parameters(model)
        counter.batches += 1
        run.log(loss=loss)

tg.main(train, batch_size=4, epochs=9)
"""
# What is wrong: the right line, what stands in its place, and the words that name it.
MISTAKES = """
an EMA that nobody keeps
- run.keep(ema=torch.optim.swa_utils.AveragedModel(run.module))
+ torch.optim.swa_utils.AveragedModel(run.module)
= Stopped and resumed: val_loss differs from step|The weights are the same|EMA

a generator that is made late
- return self.values[index] + torch.randn(4)
+ self.late = getattr(self, 'late', None) or torch.Generator()
+ return self.values[index] + torch.randn(4, generator=self.late)
= With other workers: the batch differs from step|generators are made in __init__

a dataset that the loop changes, --workers 0
- counter.batches += 1
+ data.values += 0.1
= Stopped and resumed: the batch differs from step|The loop changes the dataset

a list of samples that is learned from
- loss = (model(batch) - 1).square().mean()
+ old.append(batch)
+ loss = (model(torch.cat(old)) - 1).square().mean()
= Stopped and resumed: loss differs from step|The batches are the same|a list of samples

a learning rate set by hand
- optimizer.step()
+ rate *= 0.9
+ optimizer.param_groups[0]['lr'] = rate
+ optimizer.step()
= Stopped and resumed: lr_optimizer differs from step|set by hand
""".strip().split("\n\n")


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """checked(*options, source=...) runs the check in forks of this process: exit code, output."""
    monkeypatch.setattr(subprocess, "Popen", h.forked)

    def check(*options, source: str = RIGHT, script=tmp_path / "mine.py") -> tuple[int, str]:
        (tmp_path / "mine.py").write_text(source)
        code = check_resume.main(["--steps", "20", "--seed", "3", str(script), *options])
        return code, capsys.readouterr().out

    return check


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.splitlines()[0])
def test_a_mistake_is_named(checked, mistake):
    name, *lines = mistake.splitlines()
    [right], wrong, [words] = ([line[2:] for line in lines if line[0] == sign] for sign in "-+=")
    options = re.findall("--workers|0$", name)
    code, said = checked(*options, source=RIGHT.replace(right, "\n        ".join(wrong)))
    assert right in RIGHT and code == 1, said
    assert all(word in said for word in words.split("|")), said


def test_a_script_that_is_right_passes(checked, corpus, tmp_path):
    for script, *options in (
        (tmp_path / "mine.py",),
        (h.ROOT / "scripts" / "examples" / "own_model.py", "--batch-size", "16"),
        (h.SCRIPT, "--mode", "geometric", "--data", str(corpus), *h.TINY),
    ):
        code, said = checked(*options, script=script)
        assert code == 0 and "✅ The same bits" in said and "⚠️" not in said, said


def test_a_script_that_does_not_learn_proves_nothing(checked):
    code, said = checked(source=RIGHT.replace("optimizer.step()", "pass"))
    assert code == 0 and "⚠️ The weights have not changed" in said, said


def test_make_shows_how_a_script_fails_with_its_options(tmp_path):
    fails = RIGHT.replace("run.log(loss=loss)", "run.log(loss=1 / (run.options.batch_size - 5))")
    (tmp_path / "mine.py").write_text(fails)
    command = [*h.MAKE, "check", f"SCRIPT={tmp_path}/mine.py", "ARGS=--batch-size 5"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 2 and "ZeroDivisionError: division by zero" in result.stdout
    assert "✅" not in result.stdout
