"""Troubles that users of similar software have reported, each as a kind."""

import pickle
import socket

import pytest
import torch
from matrices import with_spectrum
from torch.utils._python_dispatch import TorchDispatchMode

import constraints
import nanogpt_lipschitz
from constraints import CONSTRAINTS, after_unknown_step, find_constraint, norm_bound
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
@pytest.mark.parametrize("can_wait", [False, True])
def test_a_muon_pickles_with_a_constraint_of_ones_own(tmp_path, can_wait):
    mine = tmp_path / "mine.py"
    mine.write_text("from constraints import hard_cap\n"
                    "def half(W, w_max, step_norm=0.0):\n"
                    "    return hard_cap(W, w_max / 2)\n"
                    f"half.can_wait = {can_wait}\n")
    W = torch.nn.Parameter(3 * torch.eye(3))
    optimizer = Muon([W], lr=0.01, w_max=2.0, constraint=find_constraint(f"{mine}:half"))
    awake = pickle.loads(pickle.dumps(optimizer))
    woken = awake.param_groups[0]
    assert woken["constraint"].can_wait == can_wait
    W2, = woken["params"]
    for p, its_optimizer in ((W, optimizer), (W2, awake)):
        p.grad = torch.ones(3, 3)
        its_optimizer.step()
        assert singular_values(p).max() <= 1 + 1e-4
    assert torch.equal(W, W2)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_muon_pickles_with_each_constraint(name):
    optimizer = Muon([torch.nn.Parameter(torch.eye(3))], constraint=CONSTRAINTS[name], w_max=1.0)
    awake = pickle.loads(pickle.dumps(optimizer))
    assert awake.param_groups[0]["constraint"] is CONSTRAINTS[name]


# ---- gradients of zeros --------------------------------------------------------------------------
def rest(constraint, dtype=None, steps=400):
    """(weights after the last gradient, after `steps` of zeros, of zeros again): one idle, one not.

    Both have the same shape, so that Muon takes them together.
    """
    torch.manual_seed(0)
    idle = torch.nn.Parameter(with_spectrum(12, 8, torch.linspace(2, 1, 8)))
    busy = torch.nn.Parameter(with_spectrum(12, 8, torch.linspace(2, 1, 8), seed=1))
    optimizer = Muon([idle, busy], lr=0.05, constraint=constraint, w_max=1.5, dtype=dtype)
    seen = []
    for step in range(5 + 2 * steps):
        idle.grad = torch.randn(12, 8) if step < 5 else torch.zeros(12, 8)
        busy.grad = torch.randn(12, 8)
        before = busy.detach().clone()
        optimizer.step()
        assert (busy - before).norm() > 0.01
        if constraint is not None:
            assert singular_values(torch.stack([idle, busy])).max() <= 1.5 * (1 + 1e-4)
        if step in (4, 4 + steps, 4 + 2 * steps):
            seen.append(idle.detach().clone())
    return seen


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_weight_comes_to_rest_without_gradients(dtype):
    start, end, later = rest(None, dtype)
    assert torch.equal(end, later)
    # All that is left of the momentum is lr (m + m^2 + ...), at most 19 steps for m = 0.95.
    moved = singular_values(end - start).max().item()
    assert 0 < moved <= 0.05 * 0.95 / 0.05 * 1.07


@pytest.mark.parametrize("name", ["specnorm", "hard_cap"])
def test_a_weight_within_its_limit_comes_to_rest(name):
    _, end, later = rest(CONSTRAINTS[name])
    assert (end - later).norm() <= 1e-5 * end.norm()  # a projection of what it made itself


def test_one_gradient_of_zeros_costs_one_small_step():
    W = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([W], lr=0.1, momentum=0.9)
    norms = []
    for gradient in (torch.eye(4), torch.zeros(4, 4), torch.zeros(4, 4), torch.eye(4)):
        before = W.detach().clone()
        W.grad = gradient
        optimizer.step()
        norms.append(singular_values(W - before).max().item())
    full = norms[0]
    assert norms[1:] == pytest.approx([0.9 * full, 0.81 * full, full], rel=1e-5)


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
                 (norm_bound, torch.eye(3))):
        asked.clear()
        f(W) if f is norm_bound else f(W, 1.0)
        assert len(asked) == 1


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1.0, 1e18, 1e30])
def test_the_bound_in_float32_is_above_the_norm_at_any_scale(scale):
    W = (with_spectrum(40, 24, torch.linspace(1, 0.01, 24), dtype=torch.float64) * scale).float()
    bound = norm_bound(W, dtype=torch.float32).item()
    exact = singular_values(W).max().item()
    assert exact <= bound <= 1.003 * exact
    assert singular_values(constraints.specnorm(W, 0.5)).max() <= 0.5 * (1 + 1e-4)


# ---- shards of a tokenizer of one's own ----------------------------------------------------------
@pytest.mark.parametrize("vocab", [255, 1500, 50_256, 60_000])
def test_tokens_of_an_unknown_meaning_are_not_decoded(vocab, capsys):
    config = nanogpt_lipschitz.Config.of("tiny", vocab=vocab, width=16, blocks=1, heads=2,
                                         hidden=16, prompt="x", length=3)
    model = nanogpt_lipschitz.Transformer(config)
    with pytest.raises(nanogpt_lipschitz.UserError, match=f"--vocab {vocab}.*256.*50257"):
        nanogpt_lipschitz.sample(model, config, torch.float32)
