"""The mathematics of the rotations, the geometric losses and the controllers."""

import copy
import functools
import math
from pathlib import Path

import pytest
import torch
from helpers import TINY, ask_to_leave, assert_same, assert_same_run, session
from torch import nn

import train_graceful as t


@pytest.fixture
def built(corpus, tmp_path, monkeypatch):
    """built(*options) is (controller, batches), as the built-in program makes them for its loop.

    The controller has the run, the model and the loss; batches are its first 60 or so.
    """

    def build(*args):
        made = []
        data = t.text_datasets([str(corpus)], 16, Path("/nowhere"))[0]
        with monkeypatch.context() as patch:
            patch.setattr(
                t, "controller_training_loop", lambda run, one, evaluate: made.append(one)
            )
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
    torch.testing.assert_close(r @ r.T, torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.det(r), torch.tensor(1.0, dtype=torch.float64))
    x = torch.zeros(dim, dtype=torch.float64)
    # Givens: e_0 goes to cos e_0 + sin e_planes.
    x[0] = 1
    expected = torch.zeros(dim, dtype=torch.float64)
    expected[0], expected[dim // 2] = angle[0].cos(), angle[0].sin()
    torch.testing.assert_close(r @ x, expected)


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
    torch.testing.assert_close(experts(x), rotated_tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(experts.gates, gates)


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


def test_a_rotation_that_is_not_learned_only_chooses_where_muon_starts(built, float32_muon):
    """W R x is (W R) x, and Muon's step for W R is its step for W, rotated: the two never part."""
    args = "--mode", "geometric", "--dropout", 0, "--weight-decay", 0.1
    (rotated, batches), (folded, _) = built(*args), built(*args)
    folded.model.load_state_dict(rotated.model.state_dict())
    started = []
    with torch.no_grad():
        for ours, theirs in zip(rotated.experts, folded.experts, strict=True):
            angles = t.MAX_ANGLE * ours.theta.tanh()
            for w, angle, turned in zip(ours.w_in, angles, theirs.w_in):
                turned.copy_(t.rotate_columns(w[None], angle[None])[0])
            theirs.theta.zero_()
            started.append(theirs.w_in[0].clone())
    for controller in (rotated, folded):
        for experts in controller.experts:
            experts.theta.requires_grad_(False)
    for batch in batches[:20]:
        loss, same = rotated.training_step(batch), folded.training_step(batch)
        torch.testing.assert_close(loss, same, atol=1e-5, rtol=0)
    # They have gone far, and together.
    assert all(
        (theirs.w_in[0] - w).abs().max() > 0.02 for theirs, w in zip(folded.experts, started)
    )
    for ours, theirs in zip(rotated.experts, folded.experts):
        turned = t.rotate_columns(torch.stack(list(ours.w_in)), t.MAX_ANGLE * ours.theta.tanh())
        torch.testing.assert_close(turned, torch.stack(list(theirs.w_in)), atol=1e-5, rtol=0)


def test_theta_receives_its_gradient_from_the_task_loss_and_moves(built):
    controller, batches = built("--mode", "geometric", "--warmup-steps", "0")
    controller.loss(batches[0]).backward()
    blocks = controller.model.blocks
    before = [block.experts.theta.detach().clone() for block in blocks]
    for block in blocks:
        assert (block.experts.theta.grad != 0).all()
    controller.training_step(batches[0])
    assert all((block.experts.theta != old).all() for block, old in zip(blocks, before))


def test_one_forward_pass_per_micro_batch(built):
    controller, batches = built("--mode", "geometric", "--grad-accum", "3")
    calls = []
    controller.model.register_forward_hook(lambda *_: calls.append(1))
    controller.training_step(batches[0])
    assert len(calls) == 3


def test_angles_stay_below_the_largest_angle():
    experts = t.Experts(dim=8, experts=2)
    experts.theta.data.fill_(1e6)
    experts(torch.randn(1, 2, 8))
    assert (experts.rotated_by <= t.MAX_ANGLE).all()


def test_orthogonality_loss_is_the_squared_cosine_between_the_rotations():
    angles = torch.randn(4, 6, dtype=torch.float64)
    matrices = [rotation(angle, 12) for angle in angles]
    pairs = [(a, b) for i, a in enumerate(matrices) for b in matrices[i + 1 :]]
    expected = torch.stack([((a * b).sum() / (a.norm() * b.norm())) ** 2 for a, b in pairs]).mean()
    torch.testing.assert_close(t.orthogonality_loss(angles), expected)
    assert t.orthogonality_loss(torch.zeros(3, 6)) == 1
    assert t.orthogonality_loss(torch.zeros(1, 6)) == 0


def test_rotation_efficiency_loss_is_the_mean_square_of_the_relative_angle():
    assert t.rotation_efficiency_loss(torch.zeros(3, 4)) == 0
    half = torch.full((3, 4), t.MAX_ANGLE / 2)
    torch.testing.assert_close(t.rotation_efficiency_loss(half), torch.tensor(0.25))


def test_specialization_loss_is_minus_the_mutual_information():
    def loss(gates):
        return t.specialization_loss(gates, gates.mean(dim=0))

    # Each token sure of its expert, all experts equally used.
    torch.testing.assert_close(loss(torch.eye(4).repeat(8, 1)), torch.tensor(-1.0))
    undecided = torch.full((8, 4), 0.25)
    torch.testing.assert_close(loss(undecided), torch.tensor(0.0))
    collapsed = torch.zeros(8, 4)
    collapsed[:, 0] = 1
    torch.testing.assert_close(loss(collapsed), torch.tensor(0.0))
    assert t.specialization_loss(torch.ones(8, 1), torch.ones(1)) == 0


def test_the_loss_is_the_task_and_the_three_geometric_losses(built):
    controller, batches = built("--mode", "geometric", "--layers", "3")
    model = controller.model
    task = controller.loss(batches[0])
    expected = torch.zeros(())
    for block in model.blocks:
        angles, gates = block.experts.rotated_by, block.experts.gates
        expected += 0.01 * t.orthogonality_loss(angles) / 3
        expected += 0.001 * t.rotation_efficiency_loss(angles) / 3
        expected += 0.01 * t.specialization_loss(gates, gates.mean(dim=(0, 1))) / 3
    (task + expected).backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    mean = t.forward_backward(controller.loss, batches[0], 1, controller.regularization)
    torch.testing.assert_close(mean, task.detach())
    for gradient, parameter in zip(wanted, model.parameters()):
        torch.testing.assert_close(parameter.grad, gradient)


def owned(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def test_every_parameter_has_exactly_one_optimizer_and_muon_only_matrices(built):
    controller, _ = built("--mode", "geometric")
    optimizers = controller.optimizers
    everything = [parameter for one in optimizers.values() for parameter in owned(one)]
    assert sorted(map(id, everything)) == sorted(map(id, controller.model.parameters()))
    assert type(optimizers["expert"]) is t.BatchedMuon
    assert type(optimizers["rotation"]) is torch.optim.Adam
    assert type(optimizers["embedding"]) is torch.optim.AdamW
    names = {id(parameter): name for name, parameter in controller.model.named_parameters()}
    muon = {names[id(parameter)] for parameter in owned(optimizers["expert"])}
    assert all(parameter.ndim == 2 for parameter in owned(optimizers["expert"]))
    others = ("token", "position", "head", "norm", "router")
    assert muon and not any(word in name for name in muon for word in others)
    rotations = {names[id(parameter)] for parameter in owned(optimizers["rotation"])}
    assert rotations == {f"blocks.{layer}.experts.theta" for layer in range(2)}


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
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
    muon.load_state_dict(batched.state_dict())
    assert batched.state_dict()["param_groups"] == muon.state_dict()["param_groups"]
    for number, state in muon.state_dict()["state"].items():
        torch.testing.assert_close(batched.state_dict()["state"][number], state)


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(built):
    controller, batches = built("--mode", "standard", "--grad-accum", "3")
    model = controller.model
    assert len(batches[0]) == 12
    loss = t.forward_backward(controller.loss, batches[0], parts=3)
    accumulated = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    whole = t.forward_backward(controller.loss, batches[0])
    torch.testing.assert_close(loss, whole)
    for gradient, parameter in zip(accumulated, model.parameters()):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "kind, middle, end",
    [(t.StandardTrainingController, 0.1 + 0.45, 0.1), (t.GeometricTrainingController, 0.5, 0.0)],
)
def test_the_schedule_rises_falls_and_stays(kind, middle, end):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = t.warmup_decay(optimizer, 4, 20, functools.partial(kind.decay, None))
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
def test_it_learns(built, mode):
    controller, batches = built("--mode", mode, "--warmup-steps", "5")
    losses = [controller.training_step(batch).item() for batch in batches]
    assert len(losses) >= 50 and sum(losses[-5:]) / 5 < losses[0] - 1


@pytest.mark.parametrize("mode", ["standard", "geometric"])
def test_a_non_finite_gradient_updates_nothing(corpus, tmp_path, monkeypatch, mode):
    def everything(controller):
        parts = {"model": controller.model, **controller.optimizers}
        state = {name: part.state_dict() for name, part in parts.items()}
        state["schedulers"] = [one.state_dict() for one in controller.schedulers.values()]
        return copy.deepcopy(state)

    seen = []

    def loop(run, controller, evaluate):
        for batch in run.batches(evaluate):
            if run.step == 0:
                assert controller.training_step(batch).isfinite()
                continue
            before = everything(controller)
            controller.model.head.weight.register_hook(lambda grad: grad * math.nan)
            with pytest.raises(FloatingPointError, match="NaN or infinite; nothing was updated"):
                controller.training_step(batch)
            assert_same(everything(controller), before)
            seen.append(run.step)
            return

    monkeypatch.setattr(t, "controller_training_loop", loop)
    options = ["--data", corpus, "--checkpoint-dir", tmp_path, *TINY, "--mode", mode]
    assert session(*options, *(["--loop", "controller"] if mode == "standard" else [])) == 0
    assert seen == [1] and t.load_checkpoint(tmp_path / "final.pt")["step"] == 1


# A user's own model.


class Points(torch.utils.data.Dataset):
    """x in [-1, 1]^3 and a function of it."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(length)
        self.x = 2 * torch.rand(length, 3, generator=generator) - 1

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        x = self.x[index]
        return x, (3 * x).sin().sum()


class Outside(nn.Module):
    """Layers without any nn.ModuleList, and experts that are alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 1)
        self.experts = t.Experts(16, 4)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.experts(x)).squeeze(-1)


class Inside(nn.Module):
    """Layers in an nn.ModuleList, whose experts are of different numbers, and some unrotated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 1)
        experts = [t.Experts(16, 2), t.Experts(16, 4), t.Experts(16, 3, rotations=False)]
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(16), one) for one in experts])

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x).squeeze(-1)


class Skipping(Inside):
    """Stochastic depth: a layer, its experts among it, has no part in every second batch."""

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            if not self.training or torch.rand(()) < 0.5:
                x = x + layer(x)
        return self.last(x).squeeze(-1)


def own_program(kind, stop=None):
    """A train(run) for a model of one's own; stop is the step at which somebody asks to leave."""

    def train(run):
        run.data(Points(400), Points(40))
        model = run.model(kind())

        def loss(batch):
            return nn.functional.mse_loss(model(batch[0]), batch[1])

        def evaluate(batch):
            return {"loss": (model(batch[0]) - batch[1]).square()}

        controller = t.GeometricTrainingController(run, model, loss)
        run.keep(optimizers=controller.optimizers, schedulers=controller.schedulers)
        for batch in run.batches(evaluate):
            run.log(loss=controller.training_step(batch))
            if run.step + 1 == stop:
                ask_to_leave(run)

    return train


@pytest.mark.parametrize("kind", [Inside, Outside, Skipping])
def test_the_geometric_controller_trains_any_model_with_experts(tmp_path, kind):
    options = {"steps": 60, "batch_size": 20, "eval_every": 20, "warmup_steps": 5}
    whole, stopped = (["--checkpoint-dir", tmp_path / name] for name in ("whole", "stopped"))
    assert session(*whole, train=own_program(kind), **options) == 0
    assert session(*stopped, train=own_program(kind, stop=31), **options) == 143
    assert session(*stopped, "--resume", "latest", train=own_program(kind), **options) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    final = t.load_checkpoint(tmp_path / "whole" / "final.pt")
    # The variance of sin(3 x) is about a half in each of three dimensions.
    assert final["evaluation"]["values"]["loss"] < (1.2 if kind is Skipping else 0.75)
    names = {name: one["param_names"][0] for name, one in final["optimizer_state_dicts"].items()}
    assert all(name.endswith(".theta") for name in names["rotation"])
    # The matrices of all experts, of those without rotations too, and no router.
    experts = 4 if kind is Outside else 9
    assert len(names["expert"]) == 2 * experts and all(".w_" in name for name in names["expert"])


@pytest.mark.parametrize("kind", ["no experts", "no rotations"])
def test_a_model_without_rotated_experts_gets_one_line(tmp_path, capfd, kind):
    def model():
        return nn.Linear(3, 1) if kind == "no experts" else t.Experts(16, 2, rotations=False)

    where = ["--checkpoint-dir", tmp_path / "ck"]
    assert session(*where, train=own_program(model), steps=5, batch_size=4) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "tg.Experts(dim, experts)" in error
    assert error.startswith("error: GeometricTrainingController: ")
    assert not (tmp_path / "ck").exists()
