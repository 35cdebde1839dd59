"""Troubles that users of similar software have reported, each as a kind."""

import pickle
import socket

import pytest
import torch
from matrices import with_spectrum
from torch.utils._python_dispatch import TorchDispatchMode

import constraints
import nanogpt_lipschitz
from constraints import CONSTRAINTS, after_unknown_step, norm_bound
from constraints import singular_values
from muon import Muon


# ---- FSDP: a parameter that is a part of a matrix ------------------------------------------------
def test_a_dtensor_is_refused_when_the_optimizer_is_made():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0,
                                         world_size=1)
    try:
        part = distribute_tensor(torch.eye(4), init_device_mesh("cpu", (1,)))
        for constraint in (None, constraints.soft_cap):
            with pytest.raises(ValueError, match="DTensor .* must be") as refusal:
                Muon([torch.nn.Parameter(part)], constraint=constraint, w_max=1.0)
            assert "\n" not in str(refusal.value)
    finally:
        torch.distributed.destroy_process_group()


# ---- an optimizer is pickled, whatever its constraint --------------------------------------------
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_muon_pickles_with_each_constraint(name):
    optimizer = Muon([torch.nn.Parameter(torch.eye(3))], constraint=CONSTRAINTS[name], w_max=1.0)
    awake = pickle.loads(pickle.dumps(optimizer))
    assert awake.param_groups[0]["constraint"] is CONSTRAINTS[name]


# ---- gradients of zeros --------------------------------------------------------------------------
W_MAX = 1.5


def rest(constraint, kind, steps=200, **settings):
    """A matrix after the last of 5 gradients, and after `steps` and twice `steps` of zeros.

    kind: "alone", beside a "busy" matrix of the same shape, which Muon takes together with it, or
    in a "stack" with a busy one.
    """
    torch.manual_seed(0)
    stacked = torch.stack([with_spectrum(12, 8, torch.linspace(2, 1, 8), seed) for seed in (0, 1)])
    if kind == "stack":
        parameters = [torch.nn.Parameter(stacked)]
    else:
        parameters = [torch.nn.Parameter(W.clone()) for W in stacked]
    optimizer = Muon(parameters, lr=0.05, constraint=constraint, w_max=W_MAX, **settings)
    seen = []
    for step in range(5 + 2 * steps):
        gradients = torch.randn(2, 12, 8)
        if step >= 5:
            gradients[0] = 0
            parameters[-1].grad = None
        parameters[0].grad = gradients if kind == "stack" else gradients[0]
        if kind == "busy" or kind == "alone" and step < 5:
            parameters[1].grad = gradients[1]
        optimizer.step()
        now = parameters[0].detach() if kind == "stack" else torch.stack(list(parameters)).detach()
        if constraint in (constraints.specnorm, constraints.soft_cap, constraints.hard_cap):
            assert singular_values(now).max() <= W_MAX * (1 + 1e-4)
        if step in (4, 4 + steps, 4 + 2 * steps):
            seen.append(now[0].clone())
    return seen


@pytest.mark.parametrize("dtype, on_cpu", [(None, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("kind", ["alone", "busy", "stack"])
def test_a_weight_comes_to_rest_without_gradients(kind, dtype, on_cpu, monkeypatch):
    """At once. The branch of a GPU, too, in which nobody looks at values."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda p: on_cpu))
    start, end, later = rest(None, kind, steps=3, dtype=dtype)
    assert torch.equal(start, end) and torch.equal(end, later)


@pytest.mark.parametrize("kind, every", [("alone", 1), ("busy", 4)])
@pytest.mark.parametrize("name", ["specnorm", "soft_cap", "hard_cap"])
def test_a_weight_within_its_limit_comes_to_rest(name, kind, every):
    _, end, later = rest(CONSTRAINTS[name], kind, every=every)
    assert (end - later).norm() <= 1e-4 * end.norm()
    assert singular_values(later).max() > 0.9 * W_MAX


@pytest.mark.parametrize("kind", ["alone", "busy", "stack"])
def test_a_decay_goes_on_without_gradients(kind):
    start, end, later = rest(constraints.weight_decay, kind)
    assert later.norm() < 0.01 * end.norm() < 0.01 * start.norm()


def test_one_gradient_of_zeros_costs_one_step():
    W = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([W], lr=0.1, momentum=0.9)
    norms = []
    for gradient in (torch.eye(4), torch.zeros(4, 4), torch.zeros(4, 4), torch.eye(4)):
        before = W.detach().clone()
        W.grad = gradient
        optimizer.step()
        norms.append(singular_values(W - before).max().item())
    full = norms[0]
    assert norms[1:] == pytest.approx([0, 0, full], rel=1e-5)


# ---- a device without float64, as Apple's GPUs ---------------------------------------------------
class NoFloat64(TorchDispatchMode):
    """Refuses tensors in float64, but for what in_float64 made, which is on the CPU there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype (in {function})")
        return made


@pytest.mark.parametrize("scale", [1e-3, 1.0, 2.0])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints_and_muon_need_no_float64(name, scale):
    f = CONSTRAINTS[name]
    W = with_spectrum(6, 4, torch.linspace(1, 0.4, 4)) * scale
    p = torch.nn.Parameter(W.clone())
    p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    optimizer = Muon([p], lr=0.1, constraint=f, w_max=1.0)
    with NoFloat64():
        f(W, 1.0, 0.1)
        after_unknown_step(f, W, 1.0, 0.1)
        for _ in range(70):
            optimizer.step()


def test_what_needs_float64_leaves_the_device(monkeypatch):
    """Far above the limit, and for rank 0, an SVD is needed. in_float64 takes it to the CPU."""
    asked = []
    before = constraints.in_float64

    def in_float64(W):
        asked.append(W)
        return before(W)

    monkeypatch.setattr(constraints, "in_float64", in_float64)
    for f, W in ((constraints.hard_cap, 100 * torch.eye(3)), (constraints.stiefel, torch.zeros(3, 3)),
                 (constraints.exact_norm, torch.eye(3))):
        asked.clear()
        f(W) if f is constraints.exact_norm else f(W, 1.0)
        assert len(asked) == 1


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1.0, 1e18, 1e30])
def test_the_bound_in_float32_is_above_the_norm_at_any_scale(scale):
    W = (with_spectrum(40, 24, torch.linspace(1, 0.01, 24), dtype=torch.float64) * scale).float()
    bound = norm_bound(W).item()
    exact = singular_values(W).max().item()
    assert exact <= bound <= 1.003 * exact
    assert singular_values(constraints.specnorm(W, 0.5)).max() <= 0.5 * (1 + 1e-4)


@pytest.mark.parametrize("shape", [(8, 50304), (1, 50304), (50304, 8)])
def test_the_bound_in_float32_is_above_the_norm_of_a_long_matrix(shape):
    W = torch.full(shape, 0.21872)
    assert singular_values(W).max() <= norm_bound(W)


# ---- shards of a tokenizer of one's own ----------------------------------------------------------
@pytest.mark.parametrize("vocab", [255, 1500, 50_256, 60_000])
def test_tokens_of_an_unknown_meaning_are_not_decoded(vocab, capsys):
    config = nanogpt_lipschitz.Config.of("tiny", vocab=vocab, width=16, blocks=1, heads=2,
                                         hidden=16, prompt="x", length=3)
    model = nanogpt_lipschitz.Transformer(config)
    with pytest.raises(nanogpt_lipschitz.UserError, match=f"--vocab {vocab}.*256.*50257"):
        nanogpt_lipschitz.sample(model, config, torch.float32)
