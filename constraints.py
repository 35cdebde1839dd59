"""Constraints: maps that keep the norm of a weight matrix where you want it, and the norms themselves.

Read this file second, after muon.py. Every constraint has one signature,

    constraint(W, w_max, step_norm=0.0) -> W      W (..., fan_out, fan_in), any float dtype, wide or tall

and acts on singular values alone. `w_max` is the limit on the RMS->RMS norm of W. `step_norm` says how far
above it, in the same norm, the updates since can have led; infinity: W may be anything. With
w = w_max * sqrt(fan_out / fan_in), the limit on singular values:

    name                    singular values                     what it guarantees
    none                    s -> s                              nothing
    weight_decay            s -> (1 - step_norm / w_max) s      s <= w under Muon if so at the start
    spectral_weight_decay   s_1 -> (1 - step_norm / w_max) s_1  nothing alone
    specnorm                s -> s * w / max(w, s_1)            s <= w always
    stiefel                 s -> w                              s = w always
    hammer                  s_1 -> w                            only s_1; made for low-rank updates
    soft_cap                an odd polynomial in s              s <= w after a step of known norm
    hard_cap                s -> min(s, w)                      s <= w always

Guarantees are for float32 and float64, to a relative 1e-4 (soft_cap in bfloat16 arithmetic: see there).
bfloat16 input is mapped in float32 and rounded at the end. NaN or infinity in one matrix of a stack does not
reach the others. The file ends with certificates: ellipsoids, and bounds of whole transformers.

Ancestry: spectral normalization is Yoshida and Miyato (2017) and Miyato et al. (2018); hammer, soft cap and
the comparison are Newhouse et al. (2025, arXiv 2507.13338).
"""

import copy
import functools
import math
import runpy

import numpy as np
import torch
import torch.nn.functional as F

from muon import fast_dtype, msign, square

LN10 = math.log(10)

# ==== Norms =======================================================================================
# rms(x) = ||x||_2 / sqrt(dim): a vector of RMS 1 has entries of about 1 whatever its width. The RMS->RMS norm
# of W is max_x rms(W x) / rms(x) = sigma_max(W) * sqrt(fan_in / fan_out); a square orthogonal W has norm 1.


def sigma_per_norm(W):
    """sqrt(fan_out / fan_in): singular value = this times RMS->RMS norm."""
    return (W.shape[-2] / W.shape[-1]) ** 0.5


def singular_values(W: torch.Tensor) -> torch.Tensor:
    """Singular values of W (..., fan_out, fan_in) in RMS->RMS units, largest first, float64, on the CPU."""
    return torch.linalg.svdvals(W.detach().cpu().double()) / sigma_per_norm(W)


def sigma(W: torch.Tensor) -> torch.Tensor:
    """Largest singular value of W (..., fan_out, fan_in), shape (...), in the precision of W."""
    scale = W.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(W.dtype).tiny)  # (squares overflow)
    return torch.linalg.eigvalsh(gram(W / scale))[..., -1].clamp(min=0).sqrt() * scale[..., 0, 0]


def exact_norm(W: torch.Tensor) -> torch.Tensor:
    """RMS->RMS norm of W (..., fan_out, fan_in), shape (...), rounded up by 1e-9: fit for a certificate.

    From eigenvalues in float64, with a relative error below 1e-12. Not for each step.
    """
    return sigma(in_float64(W)) / sigma_per_norm(W) * (1 + 1e-9)


def in_float64(W):
    """W in float64, without gradient; on the CPU if it is not on CUDA: Apple's GPUs have no float64."""
    return (W if W.is_cuda else W.cpu()).detach().double()


def norm_bound(W: torch.Tensor, squarings: int = 10, dtype=torch.float64) -> torch.Tensor:
    """Upper bound on the RMS->RMS norm of W (..., fan_out, fan_in), shape (...), by products alone.

    In float64 fit for a certificate; in float32 the allowance for rounding, 1e-5, is measured, not proved.
    Too large by at most rank^(1 / 2^(squarings+2)), 0.2 % for rank 768. Source: Delattre et al. (2023).
    """
    # 1. No Frobenius norm is below the spectral norm, and A = W W^T has largest eigenvalue s_1^2.
    # 2. A^(2^k) has s_1^(2^(k+1)), so s_1 <= ||A^(2^k)||_F^(1 / 2^(k+1)) for every k.
    # 3. Rescale before each squaring, and carry the factor as a logarithm: log s_1^2 <= log_square.
    W = W.detach().to(dtype)
    largest = torch.linalg.vector_norm(W, math.inf, dim=(-2, -1), keepdim=True)
    A = gram(W / torch.where(largest == 0, torch.ones_like(largest), largest))
    log_square = 2 * largest.double().log()
    for k in range(squarings + 1):
        A = A if k == 0 else A @ A
        size = torch.linalg.matrix_norm(A, keepdim=True)
        log_square = log_square + size.double().log() / 2**k
        A = A / torch.where(size == 0, torch.ones_like(size), size)
    up = 1 + (1e-9 if dtype == torch.float64 else 1e-5)
    return (log_square / 2).exp()[..., 0, 0] / sigma_per_norm(W) * up


# ==== Tools: the maps are functions of the small Gram matrix, applied to W once ===================
def gram(W):
    """W W^T of a wide W, W^T W of a tall one: the smaller of the two, with eigenvalues s^2."""
    return square(W if W.shape[-2] <= W.shape[-1] else W.mT)


def multiply(R, W):
    """R W for a wide W, W R for a tall one: if R is a function r of gram(W), s -> r(s^2) s."""
    return R @ W if W.shape[-2] <= W.shape[-1] else W @ R


def polynomial(a, b, c, A, A2):
    """a I + b A + c A2, for square A and A2 (..., m, m)."""
    P = b * A
    P.add_(A2, alpha=c)
    P.diagonal(dim1=-2, dim2=-1).add_(a)
    return P


def working(W):
    """W in the precision the maps compute in: float32, or float64 if W is."""
    return W if W.dtype == torch.float64 else W.float()


def by_svd(new, X, where, f):
    """`new`, but s -> f(s) by an SVD of X where `where` (...). (A float32 SVD may fail if all s agree.)"""
    if where.any():
        Y = X[where].double()
        bad = ~Y.isfinite().all(-1).all(-1)[..., None, None]
        U, s, Vh = torch.linalg.svd(torch.where(bad, 0.0, Y), full_matrices=False)
        new[where] = torch.where(bad, math.nan, (U * f(s)[..., None, :]) @ Vh).to(new.dtype)
    return new


def top_singular_pair(W, squarings=12):
    """(u, s v), shapes (..., fan_out, 1) and (..., 1, fan_in), of the largest singular value s.

    A^(2^12) projects on its vector but for (s_2 / s_1)^8192: the largest column. Zeros for zero.
    """
    A = gram(W / W.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(W.dtype).tiny))
    for _ in range(squarings):
        A = A / torch.linalg.matrix_norm(A, keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
        A = A @ A
    index = torch.linalg.vector_norm(A, dim=-2, keepdim=True).argmax(-1, keepdim=True)
    x = F.normalize(A.gather(-1, index.expand(*A.shape[:-1], 1)), dim=-2)  # (..., small side, 1)
    if W.shape[-2] <= W.shape[-1]:
        return x, x.mT @ W
    sy = W @ x
    return F.normalize(sy, dim=-2), torch.linalg.vector_norm(sy, dim=-2, keepdim=True) * x.mT


def check(W, w_max, step_norm):
    """The limit w on the singular values of W, after a look at the arguments."""
    if W.ndim < 2 or not W.is_floating_point():
        raise ValueError("a constraint needs a floating-point matrix (..., fan_out, fan_in), "
                         f"got {W.dtype} {tuple(W.shape)}")
    if not (0 < w_max < math.inf and step_norm >= 0):
        raise ValueError("a constraint needs a finite w_max > 0 and step_norm >= 0, "
                         f"got {w_max} and {step_norm}")
    return w_max * sigma_per_norm(W)


# ==== The decays: no limit, only a pull. step_norm / w_max is lr * weight_decay. ==================
def none(W, w_max=1.0, step_norm=0.0):
    """All s as they are."""
    return W


def weight_decay(W, w_max, step_norm=0.0):
    """All s -> (1 - step_norm / w_max) s. Muon: (w_max + lr) (1 - lr / w_max) = w_max - lr^2 / w_max.

    Decoupled weight decay of strength 1 / w_max. After AdamW's steps of unknown norm it guarantees nothing.
    """
    check(W, w_max, step_norm)
    return W * max(0.0, 1 - step_norm / w_max)


def spectral_weight_decay(W, w_max, step_norm=0.0):
    """Only the largest s_1 -> (1 - step_norm / w_max) s_1: weight decay where it is needed."""
    check(W, w_max, step_norm)
    u, sv = top_singular_pair(working(W))
    return (working(W) - min(1.0, step_norm / w_max) * u @ sv).to(W.dtype)


# ==== The limits ==================================================================================
def specnorm(W, w_max, step_norm=0.0):
    """All s -> s * w / max(w, s_1): spectral normalization of the weights, and only downwards.

    For s_1 stands norm_bound, within 0.2 %, so that the limit holds.
    """
    check(W, w_max, step_norm)
    X = working(W)
    bound = norm_bound(W, dtype=X.dtype)[..., None, None]
    largest = X.abs().amax((-2, -1), keepdim=True).clamp(min=1e-38)  # (w_max / bound may underflow)
    new = X / largest * (w_max / bound * largest.double()).to(X.dtype)
    return torch.where(bound <= w_max, X, new).to(W.dtype)


def stiefel(W, w_max, step_norm=0.0):
    """All s -> w: the nearest matrix of the (scaled) Stiefel manifold, with orthonormal rows or columns.

    msign, one Newton-Schulz step (a deviation e from 1 becomes about 2.5 e^3), a check, and an SVD where that
    was not enough. (The zero matrix has no nearest one: the SVD picks.)
    """
    w = check(W, w_max, step_norm)
    X = msign(working(W))
    A = gram(X)
    X = multiply(polynomial(15 / 8, -10 / 8, 3 / 8, A, A @ A), X)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    off = torch.linalg.matrix_norm(gram(X) - eye)  # at least the largest |s^2 - 1|
    return (w * by_svd(X, working(W), off > 1e-4, torch.ones_like)).to(W.dtype)


def hammer(W, w_max, step_norm=0.0):
    """Only s_1 -> w, up or down. Nothing holds the others, but AdamW's updates are of low rank."""
    w = check(W, w_max, step_norm)
    u, sv = top_singular_pair(working(W))
    return (working(W) + u @ (w * F.normalize(sv, dim=-1) - sv)).to(W.dtype)


def hard_cap(W, w_max, step_norm=0.0):
    """All s -> min(s, w), exactly: the nearest matrix within the limit. One that is within stays as it is.

    With the small Gram matrix A = V diag(s^2) V^T, take V diag(max(0, 1 - w / s)) V^T W from W: a few
    products' time on a CPU. But A resolves s^2 only to 1e-7 of s_1^2, so far above the limit it is an SVD.
    """
    w = check(W, w_max, step_norm)
    X = working(W)
    A = gram(X) / w**2 if 1e-15 < w < 1e15 else gram(X / w)
    finite, eye = A.isfinite().all(-1).all(-1), torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    eigenvalue, V = torch.linalg.eigh(torch.where(finite[..., None, None], A, eye))
    excess = 1 - eigenvalue.clamp(min=1).rsqrt()
    new = X - multiply((V * excess[..., None, :]) @ V.mT, X)
    return by_svd(new, X, ~finite | (eigenvalue.amax(-1) > 16), lambda s: s.clamp(max=w)).to(W.dtype)


# ---- soft cap: the hard cap as a polynomial, for s at most k = w + step, just above the limit -----
#   1. Take y = x - alpha x^3, then z = y + alpha y^3: small x stay, as z = x - 3 alpha^2 x^5 + ...
#   2. Ask that z(k) = w. With u = alpha k^2, z(k) / k = (1 - u)(1 + u (1 - u)^2) = 1 - 3u^2 + 3u^3 - u^4:
#      u^4 - 3 u^3 + 3 u^2 = 1 - w / k. The left side rises from 0 to 1 on [0, 1]: one root, by bisection.
#   3. z <= w on all of [0, k] if z rises there. z rises with y (slope 1 + 3 alpha y^2), and y with x until
#      alpha x^2 = 1/3, where z = (2/3)(1 + 4/27) x = (62/81) x. So 2 is sound to k = 81/62 w = 1.306 w.
#   4. Beyond, put that peak on w: (62/81) / sqrt(3 alpha) = w. Then 0 <= z <= w as long as alpha x^2 <= 1,
#      up to k = (81/62) sqrt(3) w = 2.26 w. Beyond that, use the hard cap.
#   5. Where k <= w nothing has to come down: alpha = 0.
#   6. Where alpha x^2 > 1 the polynomial explodes, and a matrix written from outside would. So W is divided
#      by sqrt(c), c = max(1, ||U^2||_F^(1/2)) >= sigma(U), U = alpha W W^T: then at most the peak comes out,
#      1.3 w for steps of 5 %; 0 if squares overflow. In range c is 1, but where u rank^(1/4) > 1.
def soft_cap_alpha(w: float, k: float) -> float:
    """The alpha that takes every s in [0, k] into [0, w]; k <= 2.26 w. Its unit is that of w to the -2."""
    if k <= w:
        return 0.0
    if k > 81 / 62 * 3**0.5 * w:
        raise ValueError(f"the soft cap holds up to k = 2.26 w, got k = {k} at w = {w}; use hard_cap")
    if k > 81 / 62 * w:
        return (62 / 81) ** 2 / (3 * w * w)
    low, high = 0.0, 1 / 3  # the left side at 1/3 is 19/81 = 1 - 62/81
    for _ in range(60):
        u = (low + high) / 2
        low, high = (u, high) if u**4 - 3 * u**3 + 3 * u**2 < 1 - w / k else (low, u)
    return high / k**2


def soft_cap_map(W, alpha, dtype=None):
    """s -> y + alpha y^3 with y = s - alpha s^3, at a given alpha (in singular values, not RMS->RMS).

    By step 2 z = x - e(u) x with u = alpha x^2, e(u) = 3u^2 - 3u^3 + u^4: W goes to W - E W, E = e(alpha A).
    E is small: computed with few digits (dtype), the result is still good to many.
    """
    X = working(W)
    low = X.to(dtype or X.dtype)
    U = alpha * gram(low)
    U2 = U @ U
    size = torch.linalg.matrix_norm(working(U2), keepdim=True).sqrt()
    c = size.nan_to_num(math.inf, math.inf).clamp(min=1)  # step 6
    U, U2 = (U / c).to(U.dtype), (U2 / c**2).to(U.dtype)
    new = multiply((U2 @ polynomial(3, -3, 1, U, U2)).nan_to_num(0), low).to(X.dtype)
    return new.sub_(X).mul_(-c.rsqrt()).to(W.dtype)


def soft_cap(W, w_max, step_norm=0.0):
    """All s <= w_max + step_norm (in RMS->RMS) to at most w_max, by the cubics above, in products alone.

    step_norm must be true (after AdamW: after_unknown_step). Beyond 1.26 w_max it is hard_cap. Small s hardly
    move; s near the limit are pulled a little below it.
    Where bfloat16 is fast, E W is computed in it for steps up to 0.3 w_max. For a matrix of one entry 13
    roundings of 2^-8 count (W: twice in A, which enters E squared, and once more; A, alpha A: twice; U^2,
    the bracket, E, E W), at worst 13/256 of E W: alpha is solved for a limit lower by step_norm / 16. For
    larger matrices that is experience, not proof: one of entries just beside the middle of two bfloat16
    numbers, made to break it, ends at 1.012 w_max (tests/test_constraints.py). For proof take hard_cap.
    """
    w, k = check(W, w_max, step_norm), w_max + step_norm
    if k > 2.26 * w_max or not 1e-15 < w < 1e15:  # (where squares leave the range of float32)
        return hard_cap(W, w_max)
    low = fast_dtype(W.device) if k <= 1.3 * w_max and W.dtype == torch.float32 else None
    alpha = soft_cap_alpha(w_max - (step_norm / 16 if low == torch.bfloat16 else 0.0), k)
    return soft_cap_map(W, alpha / sigma_per_norm(W) ** 2, low) if alpha else W


CONSTRAINTS = {f.__name__: f for f in (none, weight_decay, spectral_weight_decay, specnorm, stiefel,
                                       hammer, soft_cap, hard_cap)}
specnorm.can_wait = soft_cap.can_wait = hard_cap.can_wait = True  # see Muon._constrain in muon.py


# ==== Where steps have no known norm; embeddings; constraints of one's own ========================
@torch.no_grad()
def after_unknown_step(constraint, W, w_max, lr):
    """constraint(W, w_max, ...) after a step of unknown norm, as AdamW's: how far it led is measured.

    The decays are told lr, as their pull is lr / w_max.
    """
    if constraint in (weight_decay, spectral_weight_decay):
        return constraint(W, w_max, lr)
    bound = norm_bound(W, dtype=working(W).dtype).nan_to_num(nan=math.inf).max().item()
    return constraint(W, w_max, max(0.0, bound - w_max))


def cap_rows(table_VD: torch.Tensor, limit: float = 1.0) -> torch.Tensor:
    """Each row of an embedding table scaled down to an RMS of at most `limit`, so its l1->RMS norm is."""
    return table_VD * (limit / table_VD.square().mean(-1, keepdim=True).sqrt().clamp(min=limit))


@functools.cache  # a file runs once
def find_constraint(name: str):
    """The constraint of that name, or FILE.py:NAME, a function of yours from a file that is run.

    ValueError, in words for the user, if there is none or it returns another shape.
    """
    path, _, function = name.rpartition(":")
    if not path:
        if name not in CONSTRAINTS:
            raise ValueError(f"must be one of {', '.join(CONSTRAINTS)}, or FILE.py:NAME, a function of yours")
        return CONSTRAINTS[name]
    try:
        mine = runpy.run_path(path)[function]
        stack = torch.eye(2, 3).expand(4, 2, 3)  # (Muon gives it all matrices of one shape at once)
        if mine(stack.clone(), 1.0, 0.1).shape != stack.shape:
            raise TypeError("it returns another shape than it is given")
    except Exception as problem:  # it is any code whatever
        raise ValueError("must name a function f(W, w_max, step_norm) of a file, which returns W of the same "
                         f"shape; here: {type(problem).__name__}: {problem}") from problem
    return mine


# ==== Ellipsoids: certificates that follow a shape instead of a length ============================
# A product of norms is loose, as the worst direction of one layer is not the worst of the next. So let what
# moves, z, lie in E(S) = {z : z^T S^-1 z <= 1}, or for any positive semidefinite S (D, D): the z with
# |u z| <= sqrt(u S u^T) for every row u. S = I: length 1; S = D I: RMS 1. E(S) is convex and symmetric, and
# G z lies in E(G S G^T). Over many layers S leaves the range of float64: all functions take and return a pair
# (S, log), for E(exp(log) S). Everything is float64 and, but where S or u is 0, differentiable.
# Shapes: D dimension of z, O of what comes out, N neurons, K parts of a sum or rows of U, H heads, E = D / H.
def ellipsoid(S_DD: torch.Tensor, log=0.0):
    """(S, log) of the same ellipsoid, or of each of a stack (..., D, D), with S of trace 1 (zero stays)."""
    trace = S_DD.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-300)
    return S_DD / trace[..., None, None], log + trace.log()


def lifted(S_DD):
    """S + 1e-13 trace(S) I, (..., D, D): a little too large, but never without a Cholesky factor."""
    trace = S_DD.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return S_DD + (1e-13 * trace + 1e-300) * torch.eye(S_DD.shape[-1]).to(S_DD)


def image(G_OD, S_DD, size=0.0):
    """G S G^T (..., O, O), a little too large: so that it holds G z where that, or G itself, cancels.

    size: if G is a sum, the sum of the Frobenius norms.
    """
    # G C, C C^T = S, is off by at most D 2^-53 size |C| =: d, its square by 2 d |G C| + d^2, at most
    # 1e-9 |G C|^2 + (1 + 1e9) d^2, and d^2 < 1e-26 size^2 trace(S) for D < 900, more in proportion to D^2.
    R = G_OD @ torch.linalg.cholesky(lifted(S_DD))
    size = torch.linalg.matrix_norm(G_OD).clamp(min=size) ** 2 * S_DD.diagonal(dim1=-2, dim2=-1).sum(-1)
    rounding = 1e-17 * max(1, S_DD.shape[-1] / 900) ** 2 * size[..., None, None]
    return (1 + 1e-9) * R @ R.mT + rounding * torch.eye(G_OD.shape[-2]).to(R)


def ellipsoid_sum(S_KDD: torch.Tensor, log_K: torch.Tensor, free_K=0.0):
    """(S, log) of an ellipsoid that holds every z_1 + ... + z_K, z_k in the k-th, each free of the others.

    Any free_K gives a true one; 0 gives the smallest trace, if the S_k are of trace 1.
    """
    # 1. |u sum_k z_k| <= sum_k sqrt(u S_k u^T) = sum_k sqrt(w_k) sqrt(u S_k u^T / w_k).
    # 2. With sum_k w_k = 1 that is at most sqrt(u (sum_k S_k / w_k) u^T), by Cauchy-Schwarz.
    # 3. The trace, sum_k t_k / w_k, is smallest at w_k proportional to sqrt(t_k): exp(free_K) more or less.
    top = log_K.max()
    w_K = ((log_K - top) / 2 + free_K).exp().clamp(min=1e-150)
    return ellipsoid((S_KDD * ((log_K - top).exp() * w_K.sum() / w_K)[:, None, None]).sum(0), top)


def ellipsoid_layer(S_DD, log, F_ND, A_OD, B_ON, free_N=0.0, free_share=0.0, size=0.0):
    """(S', log') that holds every A z + B v with z in E(exp(log) S) and |v_i| <= |(F z)_i| for each i.

    ReLU with a matrix W behind it: F = I, A = B = W / 2, as relu(z) moves by (dz + v) / 2. Any free_N and
    free_share (a scalar) give a true one; size is that of image, for A. Zeros are ECLipsE-Fast (Xu and
    Sivaranjani 2024), a value for each neuron is LipSDP (Fazlyab et al. 2019).
    """
    # 1. With S = C C^T, z = C y with |y| <= 1. For L = diag(l), any l > 0: v^T L v <= z^T F^T L F z.
    # 2. So y^T (I - K) y + v^T L v <= y^T y <= 1 with K = C^T F^T L F C. If K < I, A C y + B v is in the
    #    ellipsoid of S' = A C (I - K)^-1 C^T A^T + B L^-1 B^T, the image of that of (y, v).
    # 3. K < I: take L = share diag(exp(free_N)) / sigma(C^T F^T diag(exp(free_N)) F C), and share =
    #    sigmoid(free_share), at most 1 - 1e-4: beyond, rounding would pass the allowance of 1e-9.
    C = torch.linalg.cholesky(lifted(S_DD))
    FC = F_ND @ C
    l_N = (torch.as_tensor(free_N) + torch.zeros_like(FC[:, 0])).exp()
    K = FC.mT @ (l_N[:, None] * FC)
    share = torch.sigmoid(torch.as_tensor(free_share)).clamp(max=1 - 1e-4)
    scale = share / torch.linalg.eigvalsh(K)[-1].clamp(min=1e-300)
    half = torch.linalg.cholesky(torch.eye(len(K)).to(K) - scale * K)
    root = torch.linalg.solve_triangular(half, C.mT, upper=False)  # root^T root = C (I - K)^-1 C^T
    return ellipsoid(image(A_OD, root.mT @ root, size) + (B_ON / (scale * l_N)) @ B_ON.mT, log)


def ellipsoid_norm(S_DD, log, U_KD) -> torch.Tensor:
    """Logarithm of the largest |U z| over the ellipsoid (for one row u: of |u z|), rounded up."""
    UC = U_KD @ torch.linalg.cholesky(lifted(S_DD))
    rounding = 1e-17 * max(1, len(S_DD) / 900) ** 2 * U_KD.square().sum() * S_DD.trace()  # see image
    largest = torch.linalg.eigvalsh(gram(UC))[-1] + rounding
    return (largest.clamp(min=1e-300).log() + log) / 2 + 2e-9


def ellipsoid_pairs(S_DD, log, U_KD) -> torch.Tensor:
    """(K, K): logarithm of the largest |(u_i - u_j) z|, u the rows of U, rounded up; -inf if they agree."""
    UC = U_KD @ torch.linalg.cholesky(lifted(S_DD))
    apart_KK = torch.cdist(UC, UC, compute_mode="donot_use_mm_for_euclid_dist")
    largest = 2 * U_KD.square().sum(1).max() * S_DD.trace()
    rounding = 1e-13 * max(1, len(S_DD) / 900) * largest.sqrt()  # see image
    return torch.where(apart_KK > 0, apart_KK + rounding, apart_KK).log() + log / 2 + 1e-9


def ellipsoid_pattern(S_DD, X_DD, q_HED, k_HED, C_HDD, rotates, free_H=0.0, free_S=0.0, free_X=0.0):
    """(S', log') that holds sum_h C_h u_h, u_h how far a moved attention pattern moves its average of tokens.

    Tokens are in E(X) and move in E(S); logits of head h are q_h x_t . k_h x_j, with RoPE in between if
    `rotates`. Free are a weight for each head and, for RoPE, for each pair that turns (H, E / 2), twice.
    """
    # Movements are derivatives: tokens fill a convex set, so a bound on these is one on differences.
    # 1. If each logit of a row moves by at most e_h, u_h is in e_h E(X), as in step 1 of the product below.
    # 2. |c sum_h C_h u_h| <= sum_h e_h sqrt(c C_h X C_h^T c^T). By Cauchy-Schwarz with any t_h > 0, the sum
    #    is in the ellipsoid of (sum_h t_h^2 e_h^2) (sum_h C_h X C_h^T / t_h^2).
    # 3. e_h <= |q_h dx_t . k_h x_j| + |q_h x_t . k_h dx_j|. As x_j is in E(X), the first is at most
    #    sqrt(y^T K_h y), y = q_h dx_t, K_h = k_h X k_h^T. RoPE turns one against the other: any K_h will do
    #    that is as large and does not change by turning. sigma(d k_h X k_h^T d) d^-2 is, with d > 0
    #    diagonal and one value for both coordinates that turn together.
    # 4. All heads see one token, dx_t in E(S): sum_h t_h^2 y_h^T K_h y_h is at most n_1^2, the largest
    #    z^T (sum_h t_h^2 q_h^T K_h q_h) z on E(S); likewise n_2^2 for the second part. With Minkowski,
    #    sum_h t_h^2 e_h^2 <= (n_1 + n_2)^2.
    roots = []  # K_h^1/2 q_h, of both parts of e_h
    for Y_DD, free in ((X_DD, free_X), (S_DD, free_S)):
        K_HEE = image(k_HED, Y_DD)
        if rotates:
            pair = K_HEE.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, -1)).sum(-2).clamp(min=1e-300)
            d = (free - (pair.log() - pair.log().mean()) / 4).exp().repeat(1, 2)
            largest = torch.linalg.eigvalsh(d[:, :, None] * K_HEE * d[:, None])[:, -1:]
            roots.append((largest.clamp(min=1e-300).sqrt() / d)[:, :, None] * q_HED)
        else:
            roots.append(torch.linalg.cholesky(lifted(K_HEE)).mT @ q_HED)
    CXC, log_H = ellipsoid(image(C_HDD, X_DD))
    sizes = [ellipsoid(Kq @ Y_DD @ Kq.mT)[1] for Kq, Y_DD in zip(roots, (S_DD, X_DD))]
    t_H = (free_H + (log_H - torch.logaddexp(*sizes)) / 4).exp()[:, None, None]
    n_1, n_2 = (ellipsoid_norm(Y_DD, 0.0, (t_H * Kq).flatten(0, 1)).exp()
                for Kq, Y_DD in zip(roots, (S_DD, X_DD)))
    up = 1 + 1e-6  # (K_h^1/2 q_h may cancel)
    return ellipsoid((CXC * log_H.exp()[:, None, None] / t_H**2).sum(0), 2 * (up * (n_1 + n_2)).log())


def ellipsoid_blocks(blocks: list[dict], R: float, free: dict):
    """[(S, log)]: after each block of a transformer tokens move in E(exp(log) S), if at first by RMS <= 1.

    A block, matrices in float64:  x_t <- stream x_t + sum_h C_h sum_j P^h_tj x_j,  x_t <- mlp(x_t)
    stream, C_HDD    as above
    p_H              what head h gives a token of itself, at least, if P does not depend on content; else None
    q_HED, k_HED, rotates      if it does: logits q_h x_t . k_h x_j (see ellipsoid_pattern)
    moves, values    mlp_slopes of the MLP and its stream, for movements and for tokens
    R                largest RMS of a token at the start
    free             weights, filled with zeros where there are none
    """
    # 1. E(S) is convex and symmetric: averages of tokens that move in it do, whatever the pattern.
    # 2. P fixed: head h gives a token at least p_h of itself, and an average y_h of the rest. So it moves by
    #    the sum of G_0 dx_t and all G_h y_h, G_0 = stream I + sum_h p_h C_h, G_h = (1 - p_h) C_h.
    # 3. P not fixed: p_h = 0, and the moved pattern is one more part. It depends on where tokens are: in
    #    E(X), from X = R^2 D I on by the same steps.
    # 4. Any weights are true. So each G of the next sum may use an ellipsoid with weights of its own for the
    #    same movement: U uses.
    D, after = blocks[0]["C_HDD"].shape[-1], []
    eye = torch.eye(D).to(blocks[0]["C_HDD"])
    S_UDD, log_U = ellipsoid(eye[None], math.log(D))
    X, log_X = ellipsoid(eye, math.log(D) + 2 * math.log(max(R, 1e-300)) + 1e-9)
    for i, block in enumerate(blocks):
        def weights(name, *shape):
            return free.setdefault(f"{name} {i}", torch.zeros(shape).to(eye))

        C_HDD, content, N = block["C_HDD"], block["p_H"] is None, len(block["moves"][0])
        H, U = len(C_HDD), 1 if content or i == len(blocks) - 1 else len(C_HDD) + 1
        p_H11 = torch.zeros(H, 1, 1).to(eye) if content else block["p_H"][:, None, None] * (1 - 1e-12)
        G_KDD = torch.cat([(block["stream"] * eye + (p_H11 * C_HDD).sum(0))[None], (1 - p_H11) * C_HDD])
        size = block["stream"] * D**0.5 + torch.linalg.matrix_norm(C_HDD).sum().item()
        S_KDD, log_K = ellipsoid(image(G_KDD, S_UDD, size), log_U)
        if content:
            pairs = H, block["q_HED"].shape[1] // 2
            S, log = ellipsoid_pattern(
                S_UDD[0], X, block["q_HED"], block["k_HED"], C_HDD, block["rotates"],
                weights("heads", H), weights("S", *pairs), weights("X", *pairs))
            # (S and X went in without their logs: e_h^2 scales as S X, and u_h is in e_h E(X))
            S_KDD, log_K = torch.cat([S_KDD, S[None]]), torch.cat([log_K, log + log_U + 2 * log_X])
            X, log_X = ellipsoid_sum(*ellipsoid(image(G_KDD, X, size), log_X), weights("tokens", H + 1))
            F, A, B, size = block["values"]
            X, log_X = ellipsoid_layer(X, log_X, F, A, B, weights("values", N), weights("share"), size)
        free_U = zip(weights("parts", U, len(S_KDD)), weights("neurons", U, N), weights("shares", U))
        F, A, B, size = block["moves"]
        uses = [ellipsoid_layer(*ellipsoid_sum(S_KDD, log_K, parts_K), F, A, B, neurons_N, share, size)
                for parts_K, neurons_N, share in free_U]
        S_UDD, log_U = map(torch.stack, zip(*uses))
        after.append(uses[0])
    return after


def maxmin(z):
    """(max, min) of each pair of neurons, i of the first half and i of the second (Anil et al. 2019)."""
    a, b = z.chunk(2, -1)
    excess = (a - b).relu()  # (rounds as the larger; maximum and minimum take 3 to 7 times as long)
    return torch.cat([b + excess, a - excess], -1)


def mlp_slopes(stream, w_in, w_out, spread=None):
    """(F, A, B, size) of ellipsoid_layer for stream x + w_out f(w_in x).

    f is MaxMin, of neuron i of the first half and i of the second, or has slopes 1/2 +- spread (values
    f(z) = z/2 +- spread |z|).
    """
    eye = stream * torch.eye(len(w_out), w_in.shape[1]).to(w_out)
    norms = [torch.linalg.matrix_norm(W).item() for W in (eye, w_out, w_in)]
    size = norms[0] + norms[1] * norms[2]
    if spread is not None:
        return w_in, eye + w_out @ w_in / 2, spread * w_out, size
    # A pair has the sum a + b and the difference |a - b|, which moves by at most |d(a - b)|.
    (in_1, in_2), (out_1, out_2) = w_in.chunk(2, 0), w_out.chunk(2, 1)
    A = eye + (out_1 + out_2) @ (in_1 + in_2) / 2
    return (in_1 - in_2) / 2**0.5, A, (out_1 - out_2) / 2**0.5, size


# ==== Transformers without norm layers: how far the end moves if all embeddings move ==============
# A block is x <- (1 - a) x + a attention(x), then x <- (1 - a) x + a mlp(x). A sequence is measured by its
# largest token, max_t rms(x_t): bounds do not depend on its length. Attention has no bound on all of space,
# as larger tokens move its pattern more. So embeddings are in the ball rms(x_t) <= R, which is convex: a
# bound on derivatives is one on differences. sigma(.) is the largest singular value, C_h = o_h v_h. Attention
# is out_t = beta sum_h C_h sum_(j <= t) P^h_tj x_j, P^h_t the softmax over j of s q_t^h . k_j^h + bias.
#
# THE PRODUCT: how long a movement gets in a sublayer. Let |dx_t| <= 1 and |x_t| <= r = R sqrt(D).
#   1. Head h moves by C_h a_h + C_h u_h: a_h averages moved tokens, |a_h| <= 1; u_h is the moved pattern
#      applied to tokens. If no logit of a row moves by more than e_h, the softmax moves by at most e_h in l1
#      (over sets of probability p: 4 p (1 - p) e_h <= e_h). So |u_h| <= e_h r.
#   2. Keys come from any token: e_h <= s sigma(k_h) (|q_h dx_t| r + |q_h x_t|). RoPE keeps norms.
#   3. o is applied to the v_h a_h of the heads side by side: beta sum_h C_h a_h is at most value long, with
#      value = beta sigma(o) sqrt(sum_h sigma(v_h)^2).
#   4. All queries of a token come from one vector. Let Q be q with the rows of head h times sigma(v_h)
#      sigma(k_h): sum_h (sigma(v_h) sigma(k_h) |q_h dx_t|)^2 = |Q dx_t|^2, |Q dx_t| <= sigma(Q) and |Q x_t|
#      <= sigma(Q) r. So beta sum_h C_h u_h is at most pattern R^2 long, with pattern = beta 2 s D sigma(o)
#      sigma(Q), and attention's derivative is value + pattern R^2. For one head this is the paper's formula,
#      with norms of whole matrices. For H heads that is too small by up to sqrt(H) in the value and H in the
#      pattern: attacks exceed it.
#   5. The output of attention has an RMS of at most value R: step 3 with averages of tokens.
#   6. MLP: with n = sigma(w_out) sigma(w_in), MaxMin has derivative n and output n R. GeLU's slopes are in [1
#      - g, g] and |gelu(z)| <= |z|: divided by a scale, derivative n g / scale, output n R / scale.
#   7. Residual: R starts as the largest RMS of an embedding, and is multiplied by (1 - a) + a output / R of
#      step 5 or 6; the constant by (1 - a) + a derivative, last by the head's norm.
#
# THE ELLIPSOID (ellipsoid_blocks): what one sublayer stretches most, the next does not.
#   8. GeLU has slopes 1/2 +- (g - 1/2) and values z/2 +- |z|/2 (mlp_slopes).
#   9. If tokens move in E(S), logits U x move by at most sqrt(sigma(U S U^T) / V) in RMS.
def block_bounds(W, heads, a, beta, p_H=None, logit_scale=0.0, rotates=False, gelu=None):
    """What transformer_bounds takes of a block. W: {role: matrix in float64}; logits are s q . k, with
    s = logit_scale / (D / H); p_H: see ellipsoid_blocks; gelu: (g, scale) of step 6.
    """
    H, D, up = heads, len(W["v"]), 1 + 1e-9
    v_HED, o_HDE = W["v"].view(H, -1, D), W["o"].unflatten(1, (H, -1)).transpose(0, 1)
    beta_o, v_H = beta * sigma(W["o"]).item() * up, sigma(v_HED)
    block = dict(stream=1 - a, C_HDD=a * beta * o_HDE @ v_HED, p_H=p_H, pattern=0.0,
                 value=beta_o * v_H.norm().item())
    if p_H is None:
        q_HED, k_HED = W["q"].view(H, -1, D), W["k"].view(H, -1, D)
        Q_HED = (v_H * sigma(k_HED))[:, None, None] * q_HED
        pattern = beta_o * 2 * logit_scale * H * sigma(Q_HED.flatten(0, 1)).item()
        block.update(pattern=pattern, q_HED=logit_scale * H / D * q_HED, k_HED=k_HED, rotates=rotates)
    (g, scale), spreads = gelu or (1.0, 1.0), (gelu[0] - 0.5, 0.5) if gelu else (None, None)
    gain = (sigma(W["in"]) * sigma(W["out"])).item() * up / scale
    moves, values = (mlp_slopes(1 - a, W["in"], a * W["out"] / scale, spread) for spread in spreads)
    return dict(block, mlp=gain * g, mlp_gain=gain, moves=moves, values=values)


def transformer_bounds(blocks, R, U_VD, free=None):
    """How far logits U x move (max-token RMS) if embeddings of RMS at most R do by RMS 1: logarithms to base
    10, rounded up. free: what `tune` found; None: untuned.

    log10, the smaller of product_log10 and ellipsoid_log10; body_log10 and radius_log10, product and R after
    the last block; end, its (S, log); rows, one a block: constants of steps 3 to 6, R before each sublayer,
    and the factor of attention.
    """
    rows, body, radius = [], 0.0, log10(R * (1 + 1e-9))
    for block in blocks:
        a, row = 1 - block["stream"], {name: block[name] for name in ("value", "pattern", "mlp", "mlp_gain")}
        still, moved = log10((1 - a) + a * row["value"]), log10(a * row["pattern"]) + 2 * radius
        row.update(radius_log10=radius, radius_mlp_log10=radius + still,
                   attention_log10=np.logaddexp(still * LN10, moved * LN10).item() / LN10)
        radius += still + log10((1 - a) + a * row["mlp_gain"])
        body += row["attention_log10"] + log10((1 - a) + a * row["mlp"]) + 1e-9
        rows.append(row)
    product = body + log10(exact_norm(U_VD).item())
    S, log = ellipsoid_blocks(blocks, R, {} if free is None else free)[-1]
    end = (ellipsoid_norm(S, log, U_VD).item() - math.log(len(U_VD)) / 2) / LN10
    return dict(log10=min(product, end), product_log10=product, ellipsoid_log10=end, body_log10=body,
                radius_log10=radius, end=(S, log), rows=rows)


def log10(x: float) -> float:
    return math.log10(x) if x > 0 else -math.inf


def power(exponent: float) -> str:
    """10^exponent, to read, also where it overflows; rounded up, as it is a bound."""
    plain = abs(exponent) < 6 or math.isinf(exponent)
    return f"{10**exponent * 1.0005:.4g}" if plain else f"10^{exponent + 0.05:.1f}"


def tune(goal, free: dict, steps: int, lr: float = 0.1):
    """Make goal(free), the logarithm of a bound, small by Adam. Any `free` is true; the best seen is kept.

    free, a dictionary of tensors, is filled by goal at its first call, changed in place, and returned.
    """
    goal(free)
    if not free or not steps:
        return free
    optimizer = torch.optim.Adam([tensor.requires_grad_() for tensor in free.values()])
    least, best = math.inf, copy.deepcopy(free)
    for step in range(steps + 1):
        value = goal(free)
        if value < least:
            least, best = value.item(), copy.deepcopy(free)
        optimizer.zero_grad()
        value.backward()
        for tensor in free.values():
            if tensor.grad is not None:  # (the last block's tokens move nothing)
                tensor.grad.nan_to_num_(0, 0, 0)  # (a zero matrix gives NaN)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / (steps + 1))
        optimizer.step()
    free.update({name: tensor.detach().requires_grad_(False) for name, tensor in best.items()})
    return free
