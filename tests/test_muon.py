"""msign against its own derivation and against SVDs; Muon against torch.optim.Muon."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from matrices import SHAPES, singular_values, spectra, with_spectrum

import muon
from constraints import CONSTRAINTS, exact_norm, hard_cap, weight_decay
from muon import MSIGN_MAX, QUINTICS, Muon, msign


def composed(x, quintics=QUINTICS):
    for a, b, c in quintics:
        x = a * x + b * x**3 + c * x**5
    return x


def test_quintics_follow_from_their_derivation():
    """Steps 1-4 above QUINTICS, by Remez in numpy."""
    low, tau = 0.003, 0.02
    for quintic in QUINTICS:
        top = 1 + tau
        q, r = low + 0.35 * (top - low), low + 0.8 * (top - low)
        for _ in range(60):
            x = np.array([low, q, r, top])
            a, b, c, e = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1), np.ones(4))
            q, r = np.sort(np.sqrt(np.roots([5 * c, 3 * b, a]).real))
        np.testing.assert_allclose(quintic, np.array([a, b, c]) / (1 + e), rtol=1e-9)
        low = (1 - e) / (1 + e)
    assert low == pytest.approx(0.985, abs=1e-3)


def test_composition_never_exceeds_one_and_reaches_the_stated_range():
    x = np.concatenate([np.linspace(0, 1.02, 200_001), np.logspace(-8, 0, 100_001)])
    assert composed(x).max() <= 1 + 1e-9
    assert composed(x[(x >= 0.003) & (x <= 1)]).min() >= 0.984
    np.testing.assert_allclose(composed(np.array([0.1, 0.01, 0.001])), [0.999, 0.987, 0.506], atol=1e-3)  # docstring of msign


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES + [(3, 500), (64, 600), (256, 300)])
def test_msign_never_overshoots(shape, dtype):
    a, b, c = QUINTICS[0]
    turning = np.sort(np.sqrt(np.roots([5 * c, 3 * b, a]).real))  # where the first quintic is 1, and where it is smallest
    r = min(shape)
    cases = list(spectra(r).values())
    for t in turning:
        cases.append(torch.cat([torch.ones(1), torch.linspace(t - 0.02, t + 0.02, r - 1)]).double())
    for rank in (1, r // 2):  # what long matrices are divided by is then large where they are small
        cases.append(torch.where(torch.arange(r) < rank, 1.0, 1e-4).double())
    for s in cases:
        for scale in (1.0, 1e30 if s is cases[0] else 1e-30):
            G = with_spectrum(*shape, s * scale, dtype=dtype)
            for X in (msign(G), *msign(torch.stack([G, -G]))):
                assert X.dtype == dtype and X.shape == shape
                assert singular_values(X).max() <= MSIGN_MAX[dtype]


@pytest.mark.parametrize("shape", SHAPES)
def test_msign_is_the_polynomial_of_the_singular_values(shape):
    """In float64 both forms must equal U p(s / bound) V^T, with bound as documented; so msign has the vectors of the SVD."""
    G = with_spectrum(*shape, torch.linspace(1, 0.05, min(shape), dtype=torch.float64), dtype=torch.float64)
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    bound = (s**8).sum() ** 0.125  # ||A^2||_F^(1/4) with A = G G^T
    expected = (U * composed(s / bound)) @ Vh
    torch.testing.assert_close(msign(G), expected, rtol=0, atol=1e-8)
    assert singular_values(msign(G)).min() > 0.98


def test_msign_of_zero_extremes_and_views():
    assert torch.equal(msign(torch.zeros(3, 5)), torch.zeros(3, 5))
    batch = torch.stack([torch.zeros(4, 9), torch.randn(4, 9, generator=torch.Generator().manual_seed(0))])
    assert torch.equal(msign(batch)[0], torch.zeros(4, 9)) and singular_values(msign(batch)[1]).min() > 0.9
    for tiny in (1e-44, 1e38):
        assert 0.9 < singular_values(msign(torch.eye(4, 9) * tiny)).min()
    assert msign(torch.full((2, 3), math.nan)).isnan().all() and msign(torch.tensor([[math.inf, 1.0]])).isnan().any()
    G = torch.randn(5, 12, 30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(msign(G.mT), msign(G).mT)  # tall, and not contiguous
    torch.testing.assert_close(msign(G[::2, :, ::3]), msign(G[::2, :, ::3].contiguous()))
    torch.testing.assert_close(torch.stack([msign(g) for g in G]), msign(G), rtol=0, atol=1e-5)
    torch.testing.assert_close(msign(G[None, :4].reshape(2, 2, 12, 30)), msign(G[:4]).reshape(2, 2, 12, 30), rtol=0, atol=1e-6)
    assert msign(torch.zeros(0, 3)).shape == (0, 3)
    with pytest.raises(ValueError, match="matrix"):
        msign(torch.ones(3))
    with pytest.raises(ValueError, match="float16"):
        msign(torch.ones(3, 3, dtype=torch.float16))


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_against_torch(shape, nesterov, monkeypatch):
    """Same gradients, same polynomial (the classical Newton-Schulz quintic, often enough to converge): same weights."""
    classical = (15 / 8, -10 / 8, 3 / 8)
    monkeypatch.setattr(muon, "QUINTICS", (classical,) * 20)
    W0 = with_spectrum(*shape, torch.linspace(1, 0.3, 24, dtype=torch.float64))
    ours, theirs = torch.nn.Parameter(W0.clone()), torch.nn.Parameter(W0.clone())
    fan_out, fan_in = shape
    lr = 0.1
    a = Muon([ours], lr=lr, momentum=0.9, nesterov=nesterov, weight_decay=0.2)
    to_rms = min(1.0, math.sqrt(fan_out / fan_in))  # torch scales by sqrt(max(1, fan_out / fan_in))
    b = torch.optim.Muon([theirs], lr=lr * to_rms, weight_decay=0.2 / to_rms, momentum=0.9, nesterov=nesterov,
                         ns_coefficients=classical, ns_steps=20)
    for step in range(8):
        G = with_spectrum(*shape, torch.linspace(1, 0.3, 24, dtype=torch.float64), seed=step)
        ours.grad, theirs.grad = G.clone(), G.clone()
        a.step()
        b.step()
    moved = (theirs - W0).norm()
    assert moved > 1 and (ours - theirs).norm() / moved < 0.02  # torch computes in bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_update_has_norm_lr(shape, dtype):
    W = torch.nn.Parameter(torch.zeros(shape))
    W.grad = with_spectrum(*shape, torch.linspace(1, 0.5, min(shape), dtype=torch.float64))
    Muon([W], lr=0.3, dtype=dtype).step()
    assert 0.97 * 0.3 <= singular_values(W.data).max() / math.sqrt(shape[0] / shape[1]) <= 0.3 * MSIGN_MAX[dtype]


def test_same_shapes_are_one_batch_and_constraint_follows_update():
    generator = torch.Generator().manual_seed(0)
    start = [0.05 * torch.randn(6, 10, generator=generator) for _ in range(3)]
    grads = [torch.randn(6, 10, generator=generator) for _ in range(3)]
    together = [torch.nn.Parameter(w.clone()) for w in start]
    apart = [torch.nn.Parameter(w.clone()) for w in start]
    kwargs = dict(lr=0.9, constraint=hard_cap, w_max=0.7)
    optimizers = [Muon(together, **kwargs)] + [Muon([w], **kwargs) for w in apart]
    for w, v, g in zip(together, apart, grads):
        w.grad, v.grad = g.clone(), g.clone()
    for optimizer in optimizers:
        optimizer.step()
    for w, v in zip(together, apart):
        torch.testing.assert_close(w, v, rtol=0, atol=1e-5)
        assert singular_values(w.data).max() == pytest.approx(0.7 * math.sqrt(6 / 10), rel=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_constraint_is_told_the_true_step(dtype):
    told = []
    W = torch.nn.Parameter(torch.zeros(4, 4))
    W.grad = torch.eye(4)
    Muon([W], lr=0.25, w_max=2.0, dtype=dtype,
         constraint=lambda W, w_max, step_norm: told.append((w_max, step_norm)) or W).step()
    assert told == [(2.0, pytest.approx(0.25 * MSIGN_MAX[dtype or torch.float32]))]


WAITING = sorted(name for name, f in CONSTRAINTS.items() if hasattr(f, "can_wait"))


def held(optimizer, W):
    """Whether W is within its limit, and what the optimizer believes of its norm true."""
    return exact_norm(W).item() <= min(optimizer.param_groups[0]["w_max"], optimizer.state[W]["reach"]) * (1 + 1e-4)


@pytest.mark.parametrize("name", WAITING)
@pytest.mark.parametrize("lr, every", [(0.07, 1), (0.03, 3), (0.004, 4), (0.0, 0)])  # 15/16 w_max is the lowest target
def test_limit_holds_after_each_step_though_the_constraint_waits(lr, every, name):
    """The worst case, steps that all push the same way, for two matrices of which one starts at the limit."""
    calls, step = [], lr * MSIGN_MAX[torch.float32]

    def constraint(W, w_max, step_norm):
        calls.append((len(W) if W.ndim == 3 else 1, w_max, step_norm))
        return CONSTRAINTS[name](W, w_max, step_norm)

    constraint.can_wait = True
    push = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    a, b = (torch.nn.Parameter(-norm * (6 / 4) ** 0.5 * torch.linalg.qr(push)[0]) for norm in (1.0, 0.5))
    optimizer = Muon([a, b], lr=lr, momentum=0.0, constraint=constraint, w_max=1.0, every=4)
    for _ in range(60):
        for W in (a, b):
            W.grad = -W.detach()
        optimizer.step()
        assert held(optimizer, a) and held(optimizer, b)
    if every:
        assert 60 / every <= sum(count for count, _, _ in calls) <= 2 * 60 / every
    for _, w_max, step_norm in calls:
        assert w_max == pytest.approx(1 - (every - 1) * step) and step_norm == pytest.approx(every * step)


@pytest.mark.parametrize("name", WAITING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_limit_holds_whatever_happens_between_the_steps(seed, dtype, name):
    """Learning rates, decays and limits that change, gradients that are missing, weights written from outside, reloads."""
    generator = torch.Generator().manual_seed(seed)

    def chance(p):
        return torch.rand((), generator=generator).item() < p

    weights = torch.float64 if dtype == torch.float64 else torch.float32
    Ws = [torch.nn.Parameter(with_spectrum(6, 9, torch.linspace(0.1, 0.5, 6), dtype=weights)) for _ in range(3)]
    optimizer = Muon(Ws, lr=0.01, momentum=0.5, constraint=CONSTRAINTS[name], w_max=1.0, dtype=dtype, every=4)
    group = optimizer.param_groups[0]
    for _ in range(120):
        group.update(lr=0.05 * torch.rand((), generator=generator).item() ** 3, w_max=0.7 if chance(0.1) else 1.0,
                     weight_decay=25.0 if chance(0.1) else 0.0)
        if chance(0.05):  # the limit is not ours to keep for a while
            group["constraint"] = None if chance(0.5) else lambda W, w_max, step_norm: 1.5 * W
            for W in Ws:
                W.grad = torch.randn(6, 9, generator=generator, dtype=weights)
            optimizer.step()
            group["constraint"] = CONSTRAINTS[name]
        if chance(0.1) and Ws[0] in optimizer.state:
            with torch.no_grad():
                Ws[0].copy_(torch.randn(6, 9, generator=generator))
        if chance(0.1):
            state = copy.deepcopy(optimizer.state_dict())
            if chance(0.5):  # as from before there was such a thing
                del state["param_groups"][0]["every"]
                for s in state["state"].values():
                    s.pop("reach", None)
            optimizer.load_state_dict(state)
            group = optimizer.param_groups[0]
            group["every"] = 4
        for W in Ws:
            W.grad = None if chance(0.2) else -W.detach() + 0.1 * torch.randn(6, 9, generator=generator, dtype=weights)
        optimizer.step()
        assert all(held(optimizer, W) for W in Ws if W.grad is not None)


@pytest.mark.parametrize("every", [1, 4])
def test_state_dict_is_safe_to_load_and_continues(every):
    def make():
        W = torch.nn.Parameter(0.1 * torch.ones(3, 5))
        return W, Muon([W], lr=0.1, constraint=hard_cap, w_max=1.0, dtype=torch.bfloat16, every=every)

    def step(W, optimizer, seed):
        W.grad = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    W, optimizer = make()
    step(W, optimizer, 0)
    file = io.BytesIO()
    torch.save(dict(W=W.data, optimizer=optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    V, other = make()
    V.data.copy_(saved["W"])
    other.load_state_dict(saved["optimizer"])
    for seed in range(1, 12):
        step(W, optimizer, seed)
        step(V, other, seed)
    assert torch.equal(W, V) and other.param_groups[0]["constraint"] is hard_cap


def test_weight_decay_under_muon_keeps_the_limit():
    W = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([W], lr=0.1, constraint=weight_decay, w_max=1.0)
    for _ in range(100):
        W.grad = -torch.eye(8)
        optimizer.step()
        assert singular_values(W.data).max() <= 1
    assert singular_values(W.data).min() > 0.85  # equilibrium at w_max - lr, less what msign falls short of 1


def test_muon_refuses_to_start_above_the_limit():
    W = torch.nn.Parameter(2 * torch.eye(4))
    W.grad = torch.eye(4)
    with pytest.raises(ValueError, match="starts at RMS->RMS norm 2, above its w_max of 1"):
        Muon([W], constraint=hard_cap, w_max=1.0).step()
    assert torch.equal(W, 2 * torch.eye(4))


def test_muon_refuses():
    W = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
    for wrong in (dict(lr=-1.0), dict(lr=math.nan), dict(momentum=1.0), dict(weight_decay=-0.1), dict(every=0), dict(every=65), dict(constraint=hard_cap)):
        with pytest.raises(ValueError, match="Muon"):
            Muon([W], **wrong)
