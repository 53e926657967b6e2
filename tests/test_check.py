"""`make check` names what a script does wrong, and passes scripts that are right."""

import os
import re
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, SCRIPT, TINY, Forked, processes_in_session, wait_until

sys.path.insert(0, str(ROOT / "scripts"))
import check_resume

RIGHT = """
import os, time, torch
import train_graceful as tg

class Samples(torch.utils.data.Dataset):
    def __init__(self):
        self.values = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return self.values[index] + torch.randn(4)

class Counter:
    batches, samples, scale = 0, 0, 1.0

    def state_dict(self):
        return {"batches": self.batches, "samples": self.samples}

    def load_state_dict(self, state):
        self.batches, self.samples = state.values()

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
        counter.samples += len(batch)
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

a load_state_dict that leaves something out
- self.batches, self.samples = state.values()
+ self.batches = state['batches']
= checkpoint['state_dicts']['counter']['samples'] (1 values in all)|leaves something out

a state_dict that leaves something out
- run.log(loss=loss)
+ counter.scale += 0.1
+ run.log(loss=loss * counter.scale)
= Stopped and resumed: loss differs from step|the state_dict of counter, ema?

the time in a dataset
- torch.randn(4)
+ time.time() % 1
= Two equal runs: the batch differs from step 1 on|the time

a learning rate set by hand
- optimizer.step()
+ rate *= 0.9
+ optimizer.param_groups[0]['lr'] = rate
+ optimizer.step()
= Stopped and resumed: lr_optimizer differs from step|set by hand

an end by what the loop has counted itself
- run.log(loss=loss)
+ run.log(loss=loss)
+ old.append(1)
+ if len(old) == 16: break
= Stopped and resumed: one ends before step 17|The batches are the same
""".strip().split("\n\n")


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """checked(*options, source=...) runs the check in forks of this process: exit code, output."""
    monkeypatch.setattr(subprocess, "Popen", Forked)

    def check(*options, source: str = RIGHT, script=tmp_path / "mine.py") -> tuple[int, str]:
        if not script.exists():
            script.write_text(source)
        try:
            code = check_resume.main(["--steps", "20", "--seed", "3", str(script), *options])
        except SystemExit as leaving:
            code = leaving.code
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
    built_in = ["--mode", "geometric", "--data", str(corpus), *TINY]
    for options, script in (
        ([], tmp_path / "mine.py"),
        (["--batch-size", "16"], ROOT / "scripts" / "examples" / "own_model.py"),
        (built_in, SCRIPT),
    ):
        code, said = checked(*options, script=script)
        assert code == 0 and "✅ The same bits" in said and "⚠️" not in said, said


def test_a_script_that_does_not_learn_proves_nothing_and_one_that_fails_is_shown(checked, tmp_path):
    code, said = checked(source=RIGHT.replace("optimizer.step()", "pass"))
    assert code == 0 and "⚠️ The weights have not changed" in said, said
    fails = RIGHT.replace("run.log(loss=loss)", "run.log(loss=1 / 0)")
    code, said = checked(source=fails, script=tmp_path / "fails.py")
    assert code == 2 and "ZeroDivisionError: division by zero" in said and "✅" not in said


def test_make_gives_script_and_options(tmp_path):
    (tmp_path / "mine.py").write_text(RIGHT)
    make = ["make", "-C", str(ROOT), f"VENV_PYTHON={sys.executable}", "-o", ".venv/installed"]
    command = [*make, "check", f"SCRIPT={tmp_path}/mine.py", "ARGS=--batch-sizes 4"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 2 and "exit code 2" in result.stdout
    assert "error: unrecognized arguments: --batch-sizes 4" in result.stdout


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    script = tmp_path / "mine.py"
    waits = f"open('{tmp_path}/pid', 'w').write(f'{{os.getpid()}} ')\n        time.sleep(60)"
    script.write_text(RIGHT.replace("run.log(loss=loss)", waits))
    command = [sys.executable, ROOT / "scripts" / "check_resume.py", script, "--workers", "1"]
    checker = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)})
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), checker)
    session = int((tmp_path / "pid").read_text())
    assert len(processes_in_session(session)) >= 2
    checker.send_signal(signal.SIGINT)
    assert checker.wait(timeout=60) == 130
    wait_until(lambda: not processes_in_session(session))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py", "pid"]
