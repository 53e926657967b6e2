"""The rotations, geometric losses and controllers compute what their mathematics says.

They train any model with experts, and a run that is left and resumed with them is the same.
"""

import copy
import functools
from pathlib import Path

import helpers as h
import pytest
import torch
from torch import nn

import train_graceful as t

assert_close = torch.testing.assert_close


@pytest.fixture
def built(corpus, tmp_path, monkeypatch):
    """built(*options) is (controller, its first 60 batches), as the built-in program makes them."""
    made = []
    keep = lambda run, controller, evaluate: made.append(controller)
    monkeypatch.setattr(t, "controller_training_loop", keep)

    def build(*args):
        words = ["--data", corpus, *h.TINY, "--dropout", 0, "--steps", 100, "--loop", "controller"]
        h.go(t.train, tmp_path / "ck", *words, *args, defaults=t.OPTIONS)
        size = 4 * made[-1].options.grad_accum
        data = t.text_datasets([str(corpus)], 16, Path("/nowhere"))[0]
        return made[-1], data[: 60 * size].split(size)

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


def test_a_byte_is_predicted_from_those_before_it():
    model = t.ByteLM(context=16, layers=2, heads=2, dim=16, experts=2, dropout=0.0, rotations=True)
    tokens = torch.randint(255, (3, 16))
    later = torch.cat([tokens[:, :9], tokens[:, 9:] + 1], dim=1)
    logits, others = model(tokens), model(later)
    assert_close(logits[:, :9], others[:, :9])
    assert logits.shape == (3, 16, 256) and not logits[:, 9].allclose(others[:, 9])


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
    gradients = [parameter.grad for parameter in model.parameters()]
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
    passes = []
    controller.model.register_forward_hook(lambda *_: passes.append(1))
    loss = t.forward_backward(controller.loss, batches[0], parts=3)
    accumulated = gradients_of(controller.model)
    assert len(batches[0]) == 12 and len(passes) == 3
    assert_close(loss, t.forward_backward(controller.loss, batches[0]))
    assert_close(accumulated, gradients_of(controller.model), atol=1e-6, rtol=1e-4)


def test_every_parameter_has_exactly_one_optimizer_and_muon_only_matrices(built):
    controller, _ = built("--mode", "geometric")
    named = dict(controller.model.named_parameters())
    name_of = {parameter: name for name, parameter in named.items()}
    owned = {
        name: {name_of[parameter] for group in one.param_groups for parameter in group["params"]}
        for name, one in controller.optimizers.items()
    }
    angles = {f"blocks.{layer}.experts.theta" for layer in range(2)}
    hidden = {name for name in named if name.startswith("blocks.") and named[name].ndim == 2}
    hidden -= {*angles, "blocks.0.experts.router.weight", "blocks.1.experts.router.weight"}
    others = named.keys() - angles - hidden
    assert owned == {"rotation": angles, "expert": hidden, "embedding": others}
    kinds = [type(controller.optimizers[name]) for name in ("rotation", "expert", "embedding")]
    assert kinds == [torch.optim.Adam, t.BatchedMuon, torch.optim.AdamW]


def muon_steps(kind, gradients):
    weights = [nn.Parameter(torch.ones_like(gradient)) for gradient in gradients[0]]
    optimizer = kind(weights, lr=0.1, weight_decay=0.1, ns_steps=5)
    for step in gradients:
        for weight, gradient in zip(weights, step):
            weight.grad = gradient.clone()
        optimizer.step()
    assert all(weight.grad.equal(one) for weight, one in zip(weights, gradients[-1]))
    return weights


@pytest.mark.parametrize("bfloat16, tolerance", [(True, 2e-6), (False, 0.02)])
def test_batched_muon_takes_the_steps_of_torchs_muon(monkeypatch, bfloat16, tolerance):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bfloat16})
    torch.manual_seed(3)
    shapes = [(24, 16), (16, 24), (24, 16), (8, 8)]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    ours = muon_steps(t.BatchedMuon, gradients)
    assert not ours[0].equal(torch.ones(24, 16))
    assert_close(ours, muon_steps(torch.optim.Muon, gradients), atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind, middle, end", [("Standard", 0.55, 0.1), ("Geometric", 0.5, 0.0)])
def test_the_schedule_rises_falls_and_stays(kind, middle, end):
    decay = functools.partial(getattr(t, f"{kind}TrainingController").decay, None)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = t.warmup_decay(optimizer, 4, 20, decay)
    rates = []
    for _ in range(22):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [rates[12], *rates[20:]] == pytest.approx([middle, end, end])


@pytest.mark.parametrize("mode", ["standard", "geometric"])
def test_it_learns_with_all_its_parameters(built, mode):
    controller, batches = built("--mode", mode, "--warmup-steps", "5")
    begun = copy.deepcopy(controller.model.state_dict())
    losses = [controller.training_step(batch).item() for batch in batches]
    assert len(losses) == 60 and sum(losses[-5:]) / 5 < losses[0] - 1
    assert not any(one.equal(begun[name]) for name, one in controller.model.state_dict().items())


# ---- anybody's own model


class Own(nn.Module):
    """Experts alone and in a list. Skipping is stochastic depth: a layer has no part in a batch."""

    def __init__(self, skipping: bool) -> None:
        super().__init__()
        self.first, self.last, self.skipping = nn.Linear(4, 16), nn.Linear(16, 2), skipping
        self.alone = t.Experts(16, 2)
        self.listed = nn.ModuleList([t.Experts(16, 4), t.Experts(16, 3, rotations=False)])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        x = self.first(rows)
        for layer in (self.alone, *self.listed):
            if not (self.training and self.skipping) or torch.rand(()) < 0.5:
                x = x + layer(x)
        return self.last(x)


def controlled(model):
    """A train(run) for a model of one's own, with the geometric controller."""

    def begin(run: t.Run, module: nn.Module) -> t.GeometricTrainingController:
        loss = functools.partial(h.loss_of, module)
        controller = t.GeometricTrainingController(run, module, loss)
        run.keep(optimizers=controller.optimizers, schedulers=controller.schedulers)
        return controller

    def body(run: t.Run, module: nn.Module, controller, batch) -> torch.Tensor:
        return controller.training_step(batch)

    return h.learning(begin, body, lambda run: run.data(h.Rows(400), h.Rows(40)), model)


@pytest.mark.parametrize("skipping", [False, True])
def test_the_geometric_controller_trains_any_model_with_experts(tmp_path, skipping):
    options = {"steps": 60, "batch_size": 20, "eval_every": 20, "warmup_steps": 5, "lr": 3e-3}
    h.assert_resumes(controlled(lambda: Own(skipping)), tmp_path, 31, **options)
    state = h.final(tmp_path / "whole")
    assert state["evaluation"]["values"]["loss"] < 0.4, "chance has log(2) = 0.69"
    names = {name: one["param_names"][0] for name, one in state["optimizer_state_dicts"].items()}
    assert names["rotation"] == ["model.alone.theta", "model.listed.0.theta"]
    # The matrices of all nine experts, of those without rotations too, and no router.
    assert len(names["expert"]) == 18 and all(".w_" in name for name in names["expert"])


def test_a_model_without_rotated_experts_gets_one_line(tmp_path, capfd):
    train = controlled(lambda: t.Experts(4, 2, rotations=False))
    error = h.mistake(capfd, train, tmp_path / "ck")
    assert error.startswith("error: GeometricTrainingController: no tg.Experts(dim, experts) in")
    assert not (tmp_path / "ck").exists()
