"""The rotations, geometric losses and controllers compute what their mathematics says.

They train any model with experts, and a run that is left and resumed with them is the same.
"""

import copy
import functools
from pathlib import Path

import pytest
import torch
from helpers import TINY, Images, ask_to_leave, assert_same, assert_same_run, session
from torch import nn

import train_graceful as t

assert_close = torch.testing.assert_close


@pytest.fixture
def built(corpus, tmp_path, monkeypatch):
    """built(*options) is (controller, batches), as the built-in program makes them for its loop.

    The controller has the run, the model and the loss; batches are its first 60 or so.
    """

    def build(*args):
        made = []
        data = t.text_datasets([str(corpus)], 16, Path("/nowhere"))[0]
        with monkeypatch.context() as patch:
            keep = lambda run, controller, evaluate: made.append(controller)
            patch.setattr(t, "controller_training_loop", keep)
            loop = [] if "geometric" in args else ["--loop", "controller"]
            where = ["--data", corpus, "--checkpoint-dir", tmp_path / "ck", *loop]
            code = session(*where, *TINY, "--dropout", 0, "--steps", 100, *args)
        assert code == 0 and not (tmp_path / "ck").exists()
        size = 4 * made[0].options.grad_accum
        starts = range(0, min(len(data), 60 * size) - size, size)
        return made[0], [torch.stack([data[i] for i in range(s, s + size)]) for s in starts]

    return build


def rotation(angle, dim):
    return t.rotate_columns(torch.eye(dim, dtype=angle.dtype), angle)


@pytest.mark.parametrize("dim", [8, 7])
def test_the_rotation_is_orthogonal_with_determinant_one(dim):
    angle = torch.randn(dim // 2, dtype=torch.float64)
    r = rotation(angle, dim)
    assert_close(r @ r.T, torch.eye(dim, dtype=torch.float64))
    assert_close(torch.linalg.det(r), torch.tensor(1.0, dtype=torch.float64))
    # Givens: e_0 goes to cos e_0 + sin e_planes.
    expected = torch.zeros(dim, dtype=torch.float64)
    expected[0], expected[dim // 2] = angle[0].cos(), angle[0].sin()
    assert_close(r[:, 0], expected)


def test_folding_the_rotation_into_the_weight_equals_rotating_the_tokens():
    torch.manual_seed(1)
    experts = t.Experts(dim=16, experts=3)
    experts.theta.data.normal_(std=2)
    x = torch.randn(5, 7, 16)
    gates = experts.router(x).softmax(-1)
    rotated_tokens = torch.zeros_like(x)
    for e, (w_in, w_out) in enumerate(zip(experts.w_in, experts.w_out)):
        # R_e x for every token.
        y = x @ rotation(t.MAX_ANGLE * experts.theta[e].tanh(), 16).T
        rotated_tokens += gates[..., e : e + 1] * (nn.functional.gelu(y @ w_in.T) @ w_out.T)
    assert_close(experts(x), rotated_tokens, atol=1e-5, rtol=1e-5)
    assert_close(experts.gates, gates)
    experts.theta.data.fill_(1e6)
    experts(x)
    assert (experts.rotated_by <= t.MAX_ANGLE).all()


def test_theta_at_zero_is_exactly_the_unrotated_model(built):
    controller, batches = built("--mode", "geometric")
    rotated, plain = controller.model, built("--mode", "standard", "--seed", 1)[0].model
    state = rotated.state_dict()
    plain.load_state_dict({k: value for k, value in state.items() if not k.endswith("theta")})
    tokens = batches[0][:, :-1].long()
    assert rotated(tokens).shape == (4, 16, 256) and not rotated(tokens).equal(plain(tokens))
    for block in rotated.blocks:
        block.experts.theta.data.zero_()
    assert rotated(tokens).equal(plain(tokens))


def test_a_step_is_one_pass_per_micro_batch_and_moves_theta_by_its_gradient(built):
    controller, batches = built("--mode", "geometric", "--warmup-steps", 0, "--grad-accum", 3)
    before = [experts.theta.detach().clone() for experts in controller.experts]
    controller.loss(batches[0]).backward()
    assert all((experts.theta.grad != 0).all() for experts in controller.experts)
    calls = []
    controller.model.register_forward_hook(lambda *_: calls.append(1))
    controller.training_step(batches[0])
    assert len(calls) == 3
    assert all((one.theta != old).all() for one, old in zip(controller.experts, before))


def test_the_geometric_losses_are_what_their_names_say():
    # The squared cosine between the rotations.
    angles = torch.randn(4, 6, dtype=torch.float64)
    matrices = [rotation(angle, 12) for angle in angles]
    pairs = [(a, b) for i, a in enumerate(matrices) for b in matrices[i + 1 :]]
    expected = torch.stack([((a * b).sum() / (a.norm() * b.norm())) ** 2 for a, b in pairs]).mean()
    assert_close(t.orthogonality_loss(angles), expected)
    assert t.orthogonality_loss(torch.zeros(3, 6)) == 1
    assert t.orthogonality_loss(torch.zeros(1, 6)) == 0
    # The mean square of the relative angle.
    assert t.rotation_efficiency_loss(torch.zeros(3, 4)) == 0
    half = torch.full((3, 4), t.MAX_ANGLE / 2)
    assert_close(t.rotation_efficiency_loss(half), torch.tensor(0.25))
    # Minus the mutual information: each token sure of its expert, all experts equally used, is -1.
    undecided, collapsed = torch.full((8, 4), 0.25), torch.eye(4)[[0] * 8]
    for gates, value in ((torch.eye(4).repeat(8, 1), -1.0), (undecided, 0.0), (collapsed, 0.0)):
        assert_close(t.specialization_loss(gates, gates.mean(dim=0)), torch.tensor(value))
    assert t.specialization_loss(torch.ones(8, 1), torch.ones(1)) == 0


def gradients_of(model) -> list[torch.Tensor]:
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return gradients


def test_the_loss_is_the_task_and_the_three_geometric_losses(built):
    controller, batches = built("--mode", "geometric", "--layers", "3")
    task = controller.loss(batches[0])
    expected = torch.zeros(())
    for experts in controller.experts:
        angles, gates = experts.rotated_by, experts.gates
        expected += 0.01 * t.orthogonality_loss(angles) / 3
        expected += 0.001 * t.rotation_efficiency_loss(angles) / 3
        expected += 0.01 * t.specialization_loss(gates, gates.mean(dim=(0, 1))) / 3
    (task + expected).backward()
    wanted = gradients_of(controller.model)
    mean = t.forward_backward(controller.loss, batches[0], 1, controller.regularization)
    assert_close(mean, task.detach())
    assert_close(gradients_of(controller.model), wanted)


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(built):
    controller, batches = built("--mode", "standard", "--grad-accum", "3")
    assert len(batches[0]) == 12
    loss = t.forward_backward(controller.loss, batches[0], parts=3)
    accumulated = gradients_of(controller.model)
    assert_close(loss, t.forward_backward(controller.loss, batches[0]))
    assert_close(accumulated, gradients_of(controller.model), atol=1e-6, rtol=1e-4)


def test_every_parameter_has_exactly_one_optimizer_and_muon_only_matrices(built):
    controller, _ = built("--mode", "geometric")
    name_of = {parameter: name for name, parameter in controller.model.named_parameters()}
    owned = {
        name: [parameter for group in one.param_groups for parameter in group["params"]]
        for name, one in controller.optimizers.items()
    }
    everything = [name_of[parameter] for parameters in owned.values() for parameter in parameters]
    assert sorted(everything) == sorted(name_of.values())
    kinds = {name: type(one) for name, one in controller.optimizers.items()}
    adam, adamw = torch.optim.Adam, torch.optim.AdamW
    assert kinds == {"expert": t.BatchedMuon, "rotation": adam, "embedding": adamw}
    assert owned["expert"] and all(parameter.ndim == 2 for parameter in owned["expert"])
    for word in ("token", "position", "head", "norm", "router"):
        assert not any(word in name_of[parameter] for parameter in owned["expert"])
    rotations = [name_of[parameter] for parameter in owned["rotation"]]
    assert sorted(rotations) == [f"blocks.{layer}.experts.theta" for layer in range(2)]


def muon_steps(kind, gradients):
    weights = [nn.Parameter(torch.ones_like(gradient)) for gradient in gradients[0]]
    optimizer = kind(weights, lr=0.1, weight_decay=0.1, ns_steps=5)
    for step in gradients:
        for weight, gradient in zip(weights, step):
            weight.grad = gradient.clone()
        optimizer.step()
    assert all(weight.grad.equal(one) for weight, one in zip(weights, gradients[-1]))
    return weights, optimizer


@pytest.mark.parametrize("bfloat16, tolerance", [(True, 2e-6), (False, 0.02)])
def test_batched_muon_takes_the_steps_and_keeps_the_state_of_torchs_muon(
    monkeypatch, bfloat16, tolerance
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bfloat16})
    torch.manual_seed(3)
    shapes = [(24, 16), (16, 24), (24, 16), (8, 8)]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    ours, batched = muon_steps(t.BatchedMuon, gradients)
    theirs, muon = muon_steps(torch.optim.Muon, gradients)
    assert not ours[0].equal(torch.ones(24, 16))
    assert_close(ours, theirs, atol=tolerance, rtol=0)
    state = batched.state_dict()
    muon.load_state_dict(copy.deepcopy(state))
    assert_close(muon.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("kind, middle, end", [("Standard", 0.55, 0.1), ("Geometric", 0.5, 0.0)])
def test_the_schedule_rises_falls_and_stays(kind, middle, end):
    decay = functools.partial(getattr(t, f"{kind}TrainingController").decay, None)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = t.warmup_decay(optimizer, 4, 20, decay)
    rates = []
    for _ in range(25):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:21] == sorted(rates[5:21], reverse=True)
    assert rates[12] == pytest.approx(middle)
    assert rates[20:] == pytest.approx([end] * 5)


@pytest.mark.parametrize("mode", ["standard", "geometric"])
def test_it_learns_and_a_gradient_that_is_not_finite_updates_nothing(built, monkeypatch, mode):
    controller, batches = built("--mode", mode, "--warmup-steps", "5")
    losses = [controller.training_step(batch).item() for batch in batches]
    assert len(losses) >= 50 and sum(losses[-5:]) / 5 < losses[0] - 1
    parts = [controller.model, *controller.optimizers.values(), *controller.schedulers.values()]
    before = copy.deepcopy([part.state_dict() for part in parts])

    def not_finite(norm: float) -> None:
        raise FloatingPointError

    monkeypatch.setattr(controller.run, "clip_gradients", not_finite)
    with pytest.raises(FloatingPointError):
        controller.training_step(batches[0])
    assert_same([part.state_dict() for part in parts], before)


# ---- anybody's own model


class Own(nn.Module):
    """With experts, in an nn.ModuleList or alone.

    Skipping is stochastic depth: a layer has no part in every second batch.
    """

    def __init__(self, experts: nn.Module, skipping: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3 * 64, 16), nn.Linear(16, 4)
        self.experts, self.skipping = experts, skipping

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.first(images.flatten(1))
        for layer in [self.experts] if isinstance(self.experts, t.Experts) else self.experts:
            if not (self.training and self.skipping) or torch.rand(()) < 0.5:
                x = x + layer(x)
        return self.last(x)


def three() -> nn.ModuleList:
    return nn.ModuleList([t.Experts(16, 2), t.Experts(16, 4), t.Experts(16, 3, rotations=False)])


def own_program(make, stop=None):
    """A train(run) for a model of one's own; stop is the step at which somebody asks to leave."""

    def train(run: t.Run) -> None:
        run.data(Images(400, True), Images(40, False))
        model = run.model(make())

        def losses(batch) -> torch.Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

        controller = t.GeometricTrainingController(run, model, lambda batch: losses(batch).mean())
        run.keep(optimizers=controller.optimizers, schedulers=controller.schedulers)
        for batch in run.batches(lambda batch: {"loss": losses(batch)}):
            run.log(loss=controller.training_step(batch))
            if run.step + 1 == stop:
                ask_to_leave(run)

    return train


# The model, and how many experts it has.
MODELS = {
    "a list of layers": (lambda: Own(three()), 9),
    "a single one": (lambda: Own(t.Experts(16, 4)), 4),
    "stochastic depth": (lambda: Own(three(), skipping=True), 9),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_geometric_controller_trains_any_model_with_experts(tmp_path, name):
    model, experts = MODELS[name]
    options = {"steps": 60, "batch_size": 20, "eval_every": 20, "warmup_steps": 5}
    whole, stopped = (["--checkpoint-dir", tmp_path / name] for name in ("whole", "stopped"))
    assert session(*whole, train=own_program(model), **options) == 0
    assert session(*stopped, train=own_program(model, stop=31), **options) == 143
    assert session(*stopped, "--resume", "latest", train=own_program(model), **options) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    final = t.load_checkpoint(tmp_path / "whole" / "final.pt")
    assert final["evaluation"]["values"]["loss"] < 0.9, "chance has log(4) = 1.39"
    names = {name: one["param_names"][0] for name, one in final["optimizer_state_dicts"].items()}
    assert all(name.endswith(".theta") for name in names["rotation"])
    # The matrices of all experts, of those without rotations too, and no router.
    assert len(names["expert"]) == 2 * experts and all(".w_" in name for name in names["expert"])


UNROTATED = [lambda: nn.Linear(3, 1), lambda: t.Experts(16, 2, rotations=False)]


@pytest.mark.parametrize("model", UNROTATED, ids=["no experts", "no rotations"])
def test_a_model_without_rotated_experts_gets_one_line(tmp_path, capfd, model):
    where = ["--checkpoint-dir", tmp_path / "ck"]
    assert session(*where, train=own_program(model), steps=5, batch_size=4) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "tg.Experts(dim, experts)" in error
    assert error.startswith("error: GeometricTrainingController: ")
    assert not (tmp_path / "ck").exists()
