"""msign against its own derivation and SVDs; Muon against torch.optim.Muon and its users."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from matrices import SHAPES, hadamard, randn, singular_values, spectra, with_spectrum
from torch.utils._python_dispatch import TorchDispatchMode

import muon
from constraints import CONSTRAINTS, exact_norm, hard_cap, sigma, soft_cap, weight_decay
from muon import MSIGN_MAX, QUINTICS, Muon, fast_dtype, msign


def composed(x, quintics=QUINTICS):
    for a, b, c in quintics:
        x = a * x + b * x**3 + c * x**5
    return x


def test_quintics_follow_from_their_derivation():
    """Steps 1-4 above QUINTICS, by Remez in numpy."""
    low, tau = 0.003, 0.08
    for quintic in QUINTICS:
        top = 1 + tau
        q, r = low + 0.35 * (top - low), low + 0.8 * (top - low)
        for _ in range(60):
            x = np.array([low, q, r, top])
            a, b, c, e = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1), np.ones(4))
            q, r = np.sort(np.sqrt(np.roots([5 * c, 3 * b, a]).real))
        np.testing.assert_allclose(quintic, np.array([a, b, c]) / (1 + e), rtol=1e-9)
        low = (1 - e) / (1 + e)
    assert low == pytest.approx(0.956, abs=1e-3)


def test_composition_never_exceeds_one_and_reaches_the_stated_range():
    x = np.concatenate([np.linspace(0, 1.08, 200_001), np.logspace(-8, 0, 100_001)])
    assert composed(x).max() <= 1 + 1e-9
    assert composed(x[(x >= 0.003) & (x <= 1)]).min() >= 0.955
    of_the_docstring = composed(np.array([0.1, 0.01, 0.001]))
    assert of_the_docstring == pytest.approx([0.956, 0.956, 0.446], abs=1e-3)


@pytest.mark.parametrize("dtype", MSIGN_MAX)
@pytest.mark.parametrize("shape", SHAPES + [(3, 500), (64, 600), (128, 150)])
def test_msign_never_overshoots(shape, dtype):
    a, b, c = QUINTICS[0]
    turning = np.sort(np.sqrt(np.roots([5 * c, 3 * b, a]).real))  # of the first quintic
    r = min(shape)
    cases = list(spectra(r).values())
    for t in turning:
        around = torch.linspace(t - 0.02, t + 0.02, r - 1)
        cases.append(torch.cat([torch.ones(1), around]).double())
    for rank in (1, r // 2):  # what long matrices are divided by is then large where they are small
        cases.append(torch.where(torch.arange(r) < rank, 1.0, 1e-4).double())
    for s in cases:
        for scale in (1.0, 1e30 if s is cases[0] else 1e-30):
            G = with_spectrum(*shape, s * scale, dtype=dtype)
            for X in (msign(G), *msign(torch.stack([G, -G]))):
                assert X.dtype == dtype and X.shape == shape
                assert singular_values(X).max() <= MSIGN_MAX[dtype]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-3), (torch.float64, 1e-8)])
def test_msign_is_the_polynomial_of_the_singular_values(dtype, error, shape):
    """U p(s / bound) V^T, with bound as documented; so msign has the vectors of the SVD."""
    s = torch.linspace(1, 0.05, min(shape), dtype=torch.float64)
    G = with_spectrum(*shape, s, dtype=dtype)
    U, s, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    bound = (s**8).sum() ** 0.125  # ||A^2||_F^(1/4) with A = G G^T
    expected = (U * composed(s / bound)) @ Vh
    torch.testing.assert_close(msign(G).double(), expected, rtol=0, atol=error)
    assert singular_values(msign(G)).min() > 0.955 - error


def test_msign_of_zero_extremes_and_views():
    assert torch.equal(msign(torch.zeros(3, 5)), torch.zeros(3, 5))
    for tiny in (1e-44, 1e38):
        assert singular_values(msign(torch.eye(4, 9) * tiny)).min() > 0.9
    assert msign(torch.full((2, 3), math.nan)).isnan().all()
    assert msign(torch.tensor([[math.inf, 1.0]])).isnan().any()
    G = randn(5, 12, 30).float()
    G[0] = 0
    torch.testing.assert_close(msign(G.mT), msign(G).mT)  # tall, and not contiguous
    torch.testing.assert_close(msign(G[::2, :, ::3]), msign(G[::2, :, ::3].contiguous()))
    torch.testing.assert_close(torch.stack([msign(g) for g in G]), msign(G), rtol=0, atol=1e-5)
    two_by_two = msign(G[:4].reshape(2, 2, 12, 30)).reshape(4, 12, 30)
    torch.testing.assert_close(two_by_two, msign(G[:4]), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="matrix"):
        msign(torch.ones(3))
    with pytest.raises(ValueError, match="float16"):
        msign(torch.ones(3, 3, dtype=torch.float16))


def two_sizes(H, j):
    """bfloat16 rounds the entries of each size the same way: the error has rank 1."""
    return torch.where(H < 0, H * (1 + j / 256), H)


# ---- what broke an earlier msign -----------------------------------------------------------------
def attacks():
    """(name, float64 matrix): of one sign, nearly constant, low ranks, heavy tails, a head's."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    yield "outer, tall", torch.outer(torch.ones(1000), torch.linspace(0.3, 1, 10)).double()
    yield "outer, wide", torch.outer(torch.linspace(0.3, 1, 10), torch.ones(3072)).double()
    for m, n in ((1, 1), (1, 1000), (2, 768), (2, 2048), (3, 768), (10, 3072), (16, 4096), (24, 40),
                 (64, 300), (100, 149), (100, 151), (130, 384)):
        for noise in (0, 1e-7, 1e-5, 2e-3, 0.1):
            yield f"constant rows, noise {noise}", randn(m, 1) * (1 + noise * randn(m, n))
            yield f"one sign, spread {noise}", 1 - noise * rand(m, n)
        for rank in (1, 2, 3):
            yield f"rank {rank}", randn(m, rank) @ randn(rank, n)
            yield f"rank {rank}, positive", rand(m, rank) @ rand(rank, n)
        yield "rank 1 + 1e-3", rand(m, 1) @ rand(1, n) + 1e-3 * randn(m, n)
        yield "heavy tails", randn(m, n) / randn(m, n)
        yield "trend", rand(m, 1) @ torch.linspace(1e-3, 1, n, dtype=torch.float64)[None]
    # A head's gradient: everywhere the mean, minus the labels'.
    tokens = 1 / torch.arange(1, 50305, dtype=torch.float64)
    label = torch.multinomial(tokens, 4096, replacement=True, generator=generator)
    h = 1 + 0.1 * randn(4096, 8)
    yield "identity + constant", torch.eye(16, dtype=torch.float64) + 0.1
    symmetric = 1 - 2 * torch.eye(4, dtype=torch.float64)
    symmetric = torch.kron(torch.kron(symmetric, symmetric), symmetric)  # a Hadamard matrix
    squares = torch.zeros(127)
    squares[[x * x % 127 for x in range(1, 127)]] = 1
    i = torch.arange(127)
    paley = torch.where(i[:, None] == i, 0.0, 2 * squares[(i[:, None] - i) % 127] - 1).double()
    for H in (symmetric, symmetric.repeat(1, 8), paley):
        for j in range(-30, 31, 2):
            yield f"two sizes, {j}", two_sizes(H, j)
    mean = (h.mean(0) / 50304).expand(50304, 8).clone()
    yield "head 50304 x 8", mean.index_add_(0, label, -h / 4096)


def test_the_worst_case_known_in_bfloat16():
    """The figure above MSIGN_MAX: entries of two sizes that differ by 40/256, 512 x 2560."""
    largest = {}
    for m in (64, 256, 512):
        for j in (-40, 0, 36, 38, 40, 42):
            G = two_sizes(hadamard(m).repeat(1, 5), j).bfloat16()
            largest[m, j] = sigma(msign(G).double()).item()
    assert max(largest.values()) <= MSIGN_MAX[torch.bfloat16]
    if fast_dtype("cpu") == torch.bfloat16:  # other CPUs add up in another order
        assert max(largest, key=largest.get) == (512, 40)
        assert largest[512, 40] == pytest.approx(1.056, abs=0.005)


@pytest.mark.parametrize("dtype, scales", [
    (torch.float32, (1, 1e-43, 1e30)), (torch.bfloat16, (1, 1e-39, 1e30)),
    (torch.float64, (1e-310, 1))])
def test_msign_of_what_broke_it(dtype, scales):
    """About 5,000 inputs in all: never above its bound, never NaN, of any scale and layout."""
    count = 0
    for name, G in attacks():
        many = len(G) < 50000 and not name.startswith("two sizes")
        for scale in scales if many else (1,):
            X = (G / G.abs().max() * scale).to(dtype)
            for Y in (X, X.mT, X.mT.contiguous()) if many else (X, X.mT.contiguous()):
                largest = singular_values(msign(Y)).max()
                assert largest <= MSIGN_MAX[dtype], (name, tuple(Y.shape), scale)
                count += 1
    assert count > 400


@pytest.mark.parametrize("shape", [(2, 2), (2, 3), (2, 7), (3, 3), (4, 4), (4, 10)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_msign_of_many_small_matrices(shape, dtype):
    """Gaussians: one in ten thousand of 2 x 2 in bfloat16 once went to 10^5."""
    G = torch.randn(20_000, *shape, generator=torch.Generator().manual_seed(shape[1])).to(dtype)
    if shape == (2, 2):
        G[0] = torch.tensor([[-0.5, -2.234375], [-1.671875, -1.2421875]])
    assert singular_values(msign(G)).max() <= MSIGN_MAX[dtype]


def test_msign_of_stacks_of_mixed_scales():
    singles = [1 - 1e-3 * randn(5, 300, seed=i).sigmoid().float() for i in range(4)]
    stack = torch.stack([a * s for a, s in zip(singles, (1e-40, 1, 1e30, 0))])
    for one, alone in zip(msign(stack), singles):
        assert singular_values(one).max() <= MSIGN_MAX[torch.float32]
        assert not one.any() or (one - msign(alone)).abs().max() < 1e-3
    stack[1, 0, 0] = math.nan  # one that is bad does not spoil the others
    assert msign(stack)[1].isnan().all() and msign(stack)[[0, 2, 3]].isfinite().all()


class SplitSums(TorchDispatchMode):
    """What CUDA may do with bfloat16 products, where its setting allows it: sums in bfloat16."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        allowed = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        if name not in ("mm", "bmm", "baddbmm") or args[-1].dtype != torch.bfloat16 or not allowed:
            return function(*args, **kwargs)
        A, B = args[-2:]
        total = torch.zeros((), dtype=torch.bfloat16)
        for a, b in zip(A.split(-(-A.shape[-1] // 16), -1), B.split(-(-A.shape[-1] // 16), -2)):
            total = total + (a.float() @ b.float()).bfloat16()
        if name != "baddbmm":
            return total
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        return (beta * args[0].float() + alpha * total.float()).bfloat16()


def test_partial_sums_in_bfloat16():
    """Emulated: with CUDA's default msign would exceed its bound. It sets it, and puts it back."""
    matmul, cases = torch.backends.cuda.matmul, []
    for name, G in attacks():
        if G.shape in ((64, 300), (2, 768)) or name == "identity + constant":
            cases.append(G.bfloat16())

    def largest(f):
        with SplitSums():
            return max(singular_values(f(G)).max().item() for G in cases)

    assert largest(msign.__wrapped__) > MSIGN_MAX[torch.bfloat16]  # without the remedy
    try:
        for setting in (False, True):
            matmul.allow_bf16_reduced_precision_reduction = setting
            assert largest(msign) <= MSIGN_MAX[torch.bfloat16]
            assert matmul.allow_bf16_reduced_precision_reduction is setting
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True


# ---- Muon against torch.optim.Muon ---------------------------------------------------------------
def both(W0, gradients, monkeypatch, ours, **theirs):
    """(our weights, torch's), with the classical Newton-Schulz quintic until it converges."""
    classical = (15 / 8, -10 / 8, 3 / 8)
    monkeypatch.setattr(muon, "QUINTICS", (classical,) * 20)
    a, b = torch.nn.Parameter(W0.clone()), torch.nn.Parameter(W0.clone())
    optimizers = (Muon([a], momentum=0.9, **ours),
                  torch.optim.Muon([b], momentum=0.9, nesterov=True, ns_coefficients=classical,
                                   ns_steps=20, **theirs))
    for G in gradients:
        a.grad, b.grad = G.clone(), G.clone()
        for optimizer in optimizers:
            optimizer.step()
    return a.detach(), b.detach()


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40)])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_against_torch(adjust, shape, monkeypatch):
    """The same weights, in either of torch's own parametrisations of the learning rate."""
    spectrum = torch.linspace(1, 0.3, 24, dtype=torch.float64)
    W0, *gradients = [with_spectrum(*shape, spectrum, seed=i) for i in range(9)]
    rms = math.sqrt(shape[0] / shape[1])  # what an update of norm 1 is multiplied by here
    factor = dict(original=max(1.0, rms), match_rms_adamw=0.2 * math.sqrt(max(shape)))[adjust]
    theirs = dict(lr=0.1 * rms / factor, adjust_lr_fn=adjust, weight_decay=0.0)
    a, b = both(W0, gradients, monkeypatch, dict(lr=0.1), **theirs)
    moved = (b - W0).norm()
    assert moved > 1 and (a - b).norm() / moved < 0.02  # torch computes in bfloat16


def test_weight_decay_against_torch(monkeypatch):
    """Decoupled decay of strength 1 / w_max. (After the update, so lr^2 / w_max off.)"""
    W0 = with_spectrum(24, 24, torch.linspace(1, 0.3, 24))
    gradients = [with_spectrum(24, 24, torch.ones(24), seed=1)] * 20
    ours = dict(lr=0.01, constraint=weight_decay, w_max=2.0)
    a, b = both(W0, gradients, monkeypatch, ours, lr=0.01, weight_decay=0.5)
    assert (a - b).norm() / (b - W0).norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_update_has_norm_lr(shape, dtype):
    W = torch.nn.Parameter(torch.zeros(shape))
    W.grad = with_spectrum(*shape, torch.linspace(1, 0.5, min(shape), dtype=torch.float64))
    Muon([W], lr=0.3, dtype=dtype).step()
    assert 0.97 * 0.3 <= exact_norm(W) <= 0.3 * MSIGN_MAX[dtype]


def test_same_shapes_are_one_batch_and_constraint_follows_update():
    start, grads = 0.05 * randn(3, 6, 10), randn(3, 6, 10, seed=1)
    together, apart = ([torch.nn.Parameter(W.clone()) for W in start] for _ in range(2))
    stack = torch.nn.Parameter(start.clone())
    stack.grad = grads.clone()
    for W, V, G in zip(together, apart, grads):
        W.grad, V.grad = G.clone(), G.clone()
    for matrices in (together, [stack], *[[V] for V in apart]):
        Muon(matrices, lr=0.9, constraint=hard_cap, w_max=0.7).step()
    for W, V, U in zip(together, apart, stack):
        torch.testing.assert_close(W, V, rtol=0, atol=1e-5)
        torch.testing.assert_close(W, U, rtol=0, atol=1e-5)
        assert exact_norm(W) == pytest.approx(0.7, rel=1e-4)


# ---- the limit -----------------------------------------------------------------------------------
WAITING = sorted(name for name, f in CONSTRAINTS.items() if hasattr(f, "can_wait"))


def held(optimizer, W):
    """Whether W is within its limit, and within what the optimizer has counted."""
    w_max = optimizer.param_groups[0]["w_max"]
    return exact_norm(W).max().item() <= min(w_max, optimizer.bounds.get(W, w_max)) * (1 + 1e-4)


@pytest.mark.parametrize("name", WAITING)
@pytest.mark.parametrize("lr, every", [(0.07, 1), (0.03, 3), (0.004, 4)])  # not below 15/16 w_max
def test_limit_holds_after_each_step_though_the_constraint_waits(lr, every, name):
    """Steps that all push the same way, for two matrices of which one starts far above it."""
    calls, step = [], lr * MSIGN_MAX[torch.float32]

    def constraint(W, w_max, step_norm):
        calls.append((w_max, step_norm))
        return CONSTRAINTS[name](W, w_max, step_norm)

    constraint.can_wait = True
    push = (6 / 4) ** 0.5 * torch.linalg.qr(randn(6, 4))[0].float()
    a, b = (torch.nn.Parameter(-norm * push) for norm in (3.0, 0.5))
    optimizer = Muon([a, b], lr=lr, momentum=0.0, constraint=constraint, w_max=1.0, every=4)
    for _ in range(60):
        for W in (a, b):
            W.grad = -W.detach()
        optimizer.step()
        assert held(optimizer, a) and held(optimizer, b)
    assert calls[0] == (pytest.approx(1 + step), math.inf)  # once to begin
    assert len(calls) == math.ceil(60 / every) + 1
    for call in calls[1:]:
        assert call == pytest.approx((1 - (every - 1) * step, every * step))


@pytest.mark.parametrize("dtype, target", [(torch.float32, 1.8999), (torch.bfloat16, 1.893)])
def test_the_example_of_waiting(dtype, target):
    """Above _constrain: room for one step, so the constraint runs at every second one."""
    calls = []

    def constraint(W, w_max, step_norm):
        calls.append((optimizer.steps, w_max))
        return hard_cap(W, w_max)

    constraint.can_wait = True
    W = torch.nn.Parameter(torch.eye(4))
    optimizer = Muon([W], lr=0.1, constraint=constraint, w_max=2.0, every=4, dtype=dtype)
    for _ in range(7):
        W.grad = -torch.eye(4)
        optimizer.step()
    assert [step for step, _ in calls] == [1, 1, 3, 5, 7]
    assert [w_max for _, w_max in calls[1:]] == [pytest.approx(target)] * 4


@pytest.mark.parametrize("name", WAITING)
@pytest.mark.parametrize("dtype", MSIGN_MAX)
@pytest.mark.parametrize("seed", range(3))
def test_limit_holds_whatever_happens_between_the_steps(seed, dtype, name):
    """Rates and limits change, gradients are missing, constraints come and go; writes, copies."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.float64 if dtype == torch.float64 else torch.float32

    def chance(p):
        return torch.rand((), generator=generator).item() < p

    def noise():
        return torch.randn(6, 9, generator=generator, dtype=weights)

    start = with_spectrum(6, 9, torch.linspace(0.1, 0.5, 6), dtype=weights)
    Ws = [torch.nn.Parameter(start.clone()) for _ in range(3)]
    optimizer = Muon(Ws, lr=0.01, momentum=0.5, constraint=CONSTRAINTS[name], w_max=1.0,
                     dtype=dtype, every=4)
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(120):
        group = optimizer.param_groups[0]
        group["lr"] = 0.05 * torch.rand((), generator=generator).item() ** 3
        group["w_max"] = 0.7 if chance(0.1) else 1.0
        if chance(0.05):  # the limit is not ours to keep for a while
            group["constraint"] = None if chance(0.5) else lambda W, w_max, step_norm: 1.5 * W
            for W in Ws:
                W.grad = noise()
            optimizer.step()
            group["constraint"] = CONSTRAINTS[name]
        if chance(0.1):
            Ws[0].data.copy_(noise())
            optimizer.forget()
        if chance(0.1):
            rewound = chance(0.5)
            optimizer.load_state_dict(saved if rewound else copy.deepcopy(optimizer.state_dict()))
        if chance(0.1):
            saved = copy.deepcopy(optimizer.state_dict())
        if chance(0.1):
            Ws, optimizer = copy.deepcopy((Ws, optimizer))
        for W in Ws:
            W.grad = None if chance(0.2) else -W.detach() + 0.1 * noise()
        optimizer.step()
        assert all(held(optimizer, W) for W in Ws if W.grad is not None)


WRITES = {
    "no_grad": lambda W, new: torch.no_grad()(W.copy_)(new),
    "data": lambda W, new: setattr(W, "data", new),
    "vector": lambda W, new: torch.nn.utils.vector_to_parameters(new.flatten(), [W])}


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("norm, lr", [  # at a rate of 0 nothing counts up
    (10.0, 0.01), (1e20, 0.01), (10.0, 1e-4), (10.0, 0.0)])
def test_a_write_that_nobody_announced(norm, lr, write, every):
    """Never NaN, and within the limit of 1 after at most 64 small steps, for good."""
    W = torch.nn.Parameter(torch.zeros(12, 12))
    optimizer = Muon([W], lr=lr, constraint=soft_cap, w_max=1.0, every=every)
    generator, within = torch.Generator().manual_seed(0), []
    for step in range(140):
        if step == 5:
            WRITES[write](W, norm * torch.eye(12))
        W.grad = torch.randn(12, 12, generator=generator)
        optimizer.step()
        assert W.isfinite().all()
        within.append(exact_norm(W) <= 1 + 1e-4)
    assert all(within[:5]) and all(within[5 + 64 - 1:])


# ---- states --------------------------------------------------------------------------------------
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("name", WAITING)
def test_state_dict_is_safe_to_load_and_continues(name, every):
    """Bit by bit, at the limit and with small steps: there constraints wait."""
    def make():
        W = torch.nn.Parameter(0.2 * torch.ones(3, 5))
        return W, Muon([W], lr=0.01, constraint=CONSTRAINTS[name], w_max=1.0, every=every)

    def step(W, optimizer, seed):
        W.grad = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    W, optimizer = make()
    for seed in range(11):
        step(W, optimizer, seed)
    file = io.BytesIO()
    torch.save(dict(W=W.data, optimizer=optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    V, other = make()
    V.data.copy_(saved["W"])
    other.load_state_dict(saved["optimizer"])
    for seed in range(11, 100):
        step(W, optimizer, seed)
        step(V, other, seed)
    assert torch.equal(W, V) and other.param_groups[0]["constraint"] is CONSTRAINTS[name]
    assert saved["optimizer"]["param_groups"][0]["constraint"] == name


def test_states_that_do_not_fit_are_refused():
    def used(optimizer):
        W.grad = torch.ones_like(W)
        optimizer.step()
        return optimizer.state_dict()

    W = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = Muon([W], lr=0.1, constraint=hard_cap, w_max=1.0)
    fresh = torch.optim.Muon([W]).state_dict()
    for state in (fresh, used(torch.optim.Muon([W])), used(torch.optim.AdamW([W]))):
        with pytest.raises(ValueError, match="another optimizer"):
            optimizer.load_state_dict(state)
        used(optimizer)  # and nothing was harmed


def test_a_state_without_a_limit_leaves_the_limit():
    W = torch.nn.Parameter(torch.eye(3))
    W.grad = -torch.eye(3)
    optimizer = Muon([W], lr=0.5, constraint=hard_cap, w_max=1.0)
    optimizer.load_state_dict(Muon([W], lr=0.5).state_dict())
    optimizer.step()
    assert optimizer.param_groups[0]["w_max"] == 1 and exact_norm(W) <= 1 + 1e-4


# ---- in other people's programs ------------------------------------------------------------------
def problem():
    """(model, its optimizer, one step's loss)."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, n, bias=False) for n in (6, 4)]
    model = torch.nn.Sequential(*layers)
    for layer in model:
        layer.weight.data = hard_cap(layer.weight.data, 0.5)
    x = torch.randn(16, 6)

    def loss():
        return (model(x) - 1).square().mean()

    optimizer = Muon(model.parameters(), lr=0.1, constraint=soft_cap, w_max=1.0, every=4)
    return model, optimizer, loss


def test_learning_rates_as_tensors_schedules_and_closures():
    model, optimizer, loss = problem()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 5))  # from 0
    start = [p.clone() for p in model.parameters()]

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    first = optimizer.step(closure)
    for p, q in zip(model.parameters(), start):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # a learning rate of 0
    for step in range(12):
        ramp.step()
        optimizer.param_groups[0]["momentum"] = 0.85 + step / 100  # as OneCycleLR does
        optimizer.step(closure)
        assert all(exact_norm(p) <= 1 + 1e-4 for p in model.parameters())
    assert first > loss()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_makes_no_update(bad):
    model, optimizer, loss = problem()
    W, other = model.parameters()
    optimizer.param_groups[0]["constraint"] = None  # (it would run)
    for step in range(8):
        optimizer.zero_grad()
        loss().backward()
        before = [p.detach().clone() for p in (W, other)]
        if step == 4:
            W.grad[1, 2] = bad
        optimizer.step()
        assert all(p.isfinite().all() for p in (W, other, optimizer.state[W]["momentum"]))
        assert torch.equal(W, before[0]) == (step == 4) and not torch.equal(other, before[1])
    optimizer.param_groups[0]["constraint"] = soft_cap
    for _ in range(70):
        W.grad = torch.full_like(W, bad)
        optimizer.step()
        assert exact_norm(W) <= 1 + 1e-4


@pytest.mark.parametrize("lr", [-0.01, math.nan, math.inf])
def test_a_learning_rate_that_went_wrong_stops_before_anything_is_written(lr):
    model, optimizer, loss = problem()
    loss().backward()
    before = model[0].weight.detach().clone()
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="lr is .* must be finite"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_sparse_gradients_are_as_dense_ones():
    tables = [torch.nn.Embedding(10, 4, sparse=sparse) for sparse in (True, False)]
    tables[1].load_state_dict(tables[0].state_dict())
    for table in tables:
        optimizer = Muon(table.parameters(), lr=0.1)
        for tokens in ([1, 2, 2], [3]):
            optimizer.zero_grad()
            (table(torch.tensor(tokens)) * torch.arange(4)).square().sum().backward()
            optimizer.step()
    assert torch.equal(tables[0].weight, tables[1].weight)


def test_autocast_around_a_step_changes_nothing():
    """It would compute in bfloat16, where a step in float32 is told to be 1.001 lr at most."""
    stepped = []
    for enabled in (False, True):
        model, optimizer, loss = problem()
        loss().backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.step()
        stepped.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*stepped))


@pytest.mark.parametrize("result", [None, 0.0, torch.zeros(1, 3, 3), torch.zeros(2, 3, 1)])
def test_a_constraint_that_returns_something_else_is_refused(result):
    """A shorter stack would leave the others without a limit, a thinner one be broadcast."""
    Ws = [torch.nn.Parameter(torch.eye(3)) for _ in range(2)]
    for W in Ws:
        W.grad = torch.eye(3)
    with pytest.raises(ValueError, match=r"a constraint must return a tensor \(2, 3, 3\)"):
        Muon(Ws, constraint=lambda W, w_max, step_norm: result, w_max=1.0).step()


@pytest.mark.parametrize("shape, weights, dtype, says", [
    ((3,), None, None, "must be a matrix.*convolution"),
    ((4, 3, 3, 3), None, None, "must be a matrix"), ((0, 3), None, None, "must be a matrix"),
    ((3, 3), torch.float16, None, r"\(3, 3\) in .*float16"),
    ((3, 3), torch.complex64, torch.float32, "complex64"),
    ((3, 3), torch.float32, torch.float16, "float16")])
def test_muon_refuses_parameters(shape, weights, dtype, says):
    optimizer = Muon([torch.nn.Parameter(torch.zeros(2, 2))])
    wrong = torch.nn.Parameter(torch.zeros(shape, dtype=weights))
    with pytest.raises(ValueError, match=says):
        optimizer.add_param_group(dict(params=[wrong], dtype=dtype))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("wrong", [
    dict(lr=None), dict(momentum=None), dict(lr=-1.0), dict(lr=math.nan), dict(lr=math.inf), dict(momentum=1.0), dict(every=0),
    dict(every=65), dict(constraint="hard_cap", w_max=1.0), dict(constraint=hard_cap),
    dict(constraint=hard_cap, w_max=0.0), dict(constraint=hard_cap, w_max=math.nan)])
def test_muon_refuses_settings(wrong):
    with pytest.raises(ValueError, match="Muon: .* must be"):
        Muon([torch.nn.Parameter(torch.zeros(3, 3))], **wrong)
