"""The mathematics of the rotations, the geometric losses and the controllers."""

import copy
import math

import pytest
import torch
from conftest import TINY
from test_resume import assert_same

import train_graceful as t


@pytest.fixture
def config(corpus):
    return lambda *extra: t.Config.from_options({key: value for key, value in t.parse_options(
        ["--data", str(corpus), *TINY, "--dropout", "0", *extra]).items() if key not in ("resume", "no_keyboard")})


def build(config, seed=0):
    torch.manual_seed(seed)
    model = t.ByteLM(config)
    kind = t.GeometricTrainingController if config.mode == "geometric" else t.StandardTrainingController
    return model, kind(model, config, total_steps=100), t.ByteDataset(config)


def rotation(angle, dim):
    return t.rotate_columns(torch.eye(dim, dtype=angle.dtype), angle)


@pytest.mark.parametrize("dim", [8, 7])
def test_the_rotation_is_orthogonal_with_determinant_one(dim):
    angle = torch.randn(dim // 2, dtype=torch.float64)
    r = rotation(angle, dim)
    torch.testing.assert_close(r @ r.T, torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.det(r), torch.tensor(1.0, dtype=torch.float64))
    x = torch.zeros(dim, dtype=torch.float64)
    x[0] = 1  # Givens: e_0 goes to cos e_0 + sin e_planes
    expected = torch.zeros(dim, dtype=torch.float64)
    expected[0], expected[dim // 2] = angle[0].cos(), angle[0].sin()
    torch.testing.assert_close(r @ x, expected)


def test_folding_the_rotation_into_the_weight_equals_rotating_the_tokens():
    torch.manual_seed(1)
    experts = t.Experts(dim=16, experts=3, rotations=True)
    experts.theta.data.normal_(std=2)
    x = torch.randn(5, 7, 16)
    gates = experts.router(x).softmax(-1)
    rotated_tokens = torch.zeros_like(x)
    for e, (w_in, w_out) in enumerate(zip(experts.w_in, experts.w_out)):
        y = x @ rotation(experts.angles()[e], 16).T  # R_e x for every token
        rotated_tokens += gates[..., e : e + 1] * (torch.nn.functional.gelu(y @ w_in.T) @ w_out.T)
    folded, (returned_gates, _) = experts(x)
    torch.testing.assert_close(folded, rotated_tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returned_gates, gates)


def test_theta_at_zero_is_exactly_the_unrotated_model(config):
    rotated, _, data = build(config("--mode", "geometric"))
    plain, _, _ = build(config("--mode", "standard"), seed=1)
    plain.load_state_dict({name: value for name, value in rotated.state_dict().items() if not name.endswith("theta")})
    windows = next(data.validation_batches())
    assert not t.task_loss(rotated, windows)[0].equal(t.task_loss(plain, windows)[0])
    for block in rotated.blocks:
        block.experts.theta.data.zero_()
    assert rotated(windows[:, :-1].long())[0].equal(plain(windows[:, :-1].long())[0])


def test_theta_receives_its_gradient_from_the_task_loss_and_moves(config):
    model, controller, data = build(config("--mode", "geometric", "--warmup-steps", "0"))
    loss, _ = t.task_loss(model, data[0])
    loss.backward()
    before = [block.experts.theta.detach().clone() for block in model.blocks]
    for block in model.blocks:
        assert (block.experts.theta.grad != 0).all()
    controller.training_step(data[0])
    assert all((block.experts.theta != old).all() for block, old in zip(model.blocks, before))


def test_one_forward_pass_per_micro_batch(config):
    model, controller, data = build(config("--mode", "geometric", "--grad-accum", "3"))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    controller.training_step(data[0])
    assert len(calls) == 3


def test_angles_stay_below_the_largest_angle():
    experts = t.Experts(dim=8, experts=2, rotations=True)
    experts.theta.data.fill_(1e6)
    assert (experts.angles() <= t.MAX_ANGLE).all()


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
    torch.testing.assert_close(t.rotation_efficiency_loss(torch.full((3, 4), t.MAX_ANGLE / 2)), torch.tensor(0.25))


def test_specialization_loss_is_minus_the_mutual_information():
    decided = torch.eye(4).repeat(8, 1)  # each token sure of its expert, all experts equally used
    torch.testing.assert_close(t.specialization_loss(decided, decided.mean(dim=0)), torch.tensor(-1.0))
    undecided = torch.full((8, 4), 0.25)
    torch.testing.assert_close(t.specialization_loss(undecided, undecided.mean(dim=0)), torch.tensor(0.0))
    collapsed = torch.zeros(8, 4)
    collapsed[:, 0] = 1
    torch.testing.assert_close(t.specialization_loss(collapsed, collapsed.mean(dim=0)), torch.tensor(0.0))
    assert t.specialization_loss(torch.ones(8, 1), torch.ones(1)) == 0


def test_every_parameter_has_exactly_one_optimizer_and_muon_only_matrices(config):
    model, controller, _ = build(config("--mode", "geometric"))
    owned = [p for optimizer in controller.optimizers.values() for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    assert isinstance(controller.optimizers["expert"], torch.optim.Muon)
    assert type(controller.optimizers["rotation"]) is torch.optim.Adam
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)] for p in controller.optimizers["expert"].param_groups[0]["params"]}
    assert all(p.ndim == 2 for p in controller.optimizers["expert"].param_groups[0]["params"])
    assert not any("token" in name or "position" in name or "head" in name or "norm" in name or "router" in name for name in muon)


def muon_steps(kind, gradients):
    weights = [torch.nn.Parameter(torch.ones_like(gradient)) for gradient in gradients[0]]
    optimizer = kind(weights, lr=0.1, weight_decay=0.1)
    for step in gradients:
        for weight, gradient in zip(weights, step):
            weight.grad = gradient.clone()
        optimizer.step()
    assert all(weight.grad.equal(gradient) for weight, gradient in zip(weights, gradients[-1]))
    return weights, optimizer


@pytest.mark.parametrize("bfloat16, tolerance", [(True, 2e-6), (False, 0.02)])
def test_batched_muon_takes_the_steps_and_keeps_the_state_of_torchs_muon(monkeypatch, bfloat16, tolerance):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bfloat16})
    torch.manual_seed(3)
    gradients = [[torch.randn(shape) for shape in [(24, 16), (16, 24), (24, 16), (8, 8)]] for _ in range(3)]
    ours, batched = muon_steps(t.BatchedMuon, gradients)
    theirs, muon = muon_steps(torch.optim.Muon, gradients)
    assert not ours[0].equal(torch.ones(24, 16))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
    muon.load_state_dict(batched.state_dict())
    assert batched.state_dict()["param_groups"] == muon.state_dict()["param_groups"]
    for number, state in muon.state_dict()["state"].items():
        torch.testing.assert_close(batched.state_dict()["state"][number], state)


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(config):
    model, _, data = build(config("--grad-accum", "3"))
    batch = data[0]
    loss = t.forward_backward(model, batch, grad_accum=3)
    accumulated = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    whole = t.forward_backward(model, batch, grad_accum=1)
    torch.testing.assert_close(loss, whole)
    for a, p in zip(accumulated, model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("decay, middle, end", [(t.cosine, 0.1 + 0.45, 0.1), (t.cubic, 0.03 + 0.97 / 8, 0.03)])
def test_the_schedule_rises_falls_and_stays(decay, middle, end):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
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
def test_it_learns(config, mode):
    model, controller, data = build(config("--mode", mode, "--warmup-steps", "5"))
    losses = [controller.training_step(data[i]).item() for i in range(60)]
    assert sum(losses[-5:]) / 5 < losses[0] - 1


@pytest.mark.parametrize("mode", ["standard", "geometric"])
def test_a_non_finite_gradient_updates_nothing(config, mode):
    model, controller, data = build(config("--mode", mode))
    assert controller.training_step(data[0]).isfinite()

    def everything():
        return copy.deepcopy({"model": dict(model.state_dict()), **controller.state_dict()})

    before = everything()
    model.head.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(FloatingPointError, match="NaN or infinite; nothing was updated"):
        controller.training_step(data[1])
    assert_same(everything(), before)
