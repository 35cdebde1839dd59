"""Constraints: maps that keep the norm of a weight matrix where you want it, and certificates.

Read this file second, after muon.py. It has three parts:

    Part I    norms, and the maps that limit them
    Part II   ellipsoids: certificates that follow a shape instead of a length
    Part III  bounds of whole transformers

On a first reading part I is enough. Every constraint has one signature,

    constraint(W, w_max, step_norm=0.0) -> W

for W (..., fan_out, fan_in) of any float dtype, wide or tall. It changes singular values alone.
`w_max` is the limit on the RMS->RMS norm of W. `step_norm` says how far above it, in the same norm,
the steps since the last use can have led. Infinity means that W may be anything. The two decays
read both in their own way: 1 / w_max is the strength of the decay, and step_norm the learning rate,
or under Muon the most that a step can add. With w = w_max * sqrt(fan_out / fan_in), the limit on
singular values, and s_1, the largest of them:

    name                    singular values                     what it guarantees
    none                    s -> s                              nothing
    weight_decay            s -> (1 - step_norm / w_max) s      s <= w under Muon if so at the start
    spectral_weight_decay   s_1 -> (1 - step_norm / w_max) s_1  nothing: only s_1 decays
    specnorm                s -> s * w / max(w, s_1)            s <= w always
    stiefel                 s -> w                              s = w always
    hammer                  s_1 -> w                            nothing: s_2 may exceed w
    soft_cap                an odd polynomial in s              s <= w after a step of known norm
    hard_cap                s -> min(s, w)                      s <= w always

Guarantees are for float32 and float64 weights, to a relative 1e-4. The exception is soft_cap where
it computes in bfloat16: see its docstring. bfloat16 weights are mapped in float32 and rounded at
the end. NaN or infinity in one matrix of a stack does not reach the others.

Ancestry: spectral normalization is Yoshida and Miyato (2017) and Miyato et al. (2018). Hammer, soft
cap and the comparison are Newhouse et al. (2025, arXiv 2507.13338).
"""

import math
import runpy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.linalg import cholesky, eigvalsh, matrix_norm, vector_norm
from torch.nn.functional import normalize

from muon import avoid_zero, fast_dtype, full_sums, msign, square

LN10 = math.log(10)

# ==== PART I: norms ===============================================================================
# rms(x) = ||x||_2 / sqrt(dim): a vector of RMS 1 has entries of about 1 whatever its width. The
# RMS->RMS norm of W is max_x rms(W x) / rms(x) = sigma_max(W) * sqrt(fan_in / fan_out); a square
# orthogonal W has norm 1.


def sigma_per_norm(W):
    """sqrt(fan_out / fan_in): singular value = this times RMS->RMS norm."""
    return (W.shape[-2] / W.shape[-1]) ** 0.5


def singular_values(W):
    """All singular values of W (..., fan_out, fan_in) in RMS->RMS units, largest first.

    That is divided by sigma_per_norm(W), so that the first is the RMS->RMS norm. In float64 and on
    the CPU.
    """
    return torch.linalg.svdvals(W.detach().cpu().double()) / sigma_per_norm(W)


def sigma(W):
    """Largest singular value of W (..., fan_out, fan_in), shape (...), in the precision of W.

    Not in RMS->RMS units.
    """
    largest = avoid_zero(W.abs().amax((-2, -1), keepdim=True))
    eigenvalue = eigvalsh(gram(W / largest))[..., -1]  # divided, as squares overflow
    return eigenvalue.clamp(min=0).sqrt() * largest[..., 0, 0]


def exact_norm(W):
    """RMS->RMS norm of W (..., fan_out, fan_in), shape (...), fit for a certificate.

    From eigenvalues in float64, with a relative error below 1e-12, and rounded up by 1e-9. Too slow
    for every step.
    """
    return sigma(in_float64(W)) / sigma_per_norm(W) * (1 + 1e-9)


def in_float64(W):
    """W in float64, without gradient: on CUDA, or else on the CPU, as Apple's GPUs lack float64."""
    return (W if W.is_cuda else W.cpu()).detach().double()


# A bound on the norm from above, by products alone (Delattre et al. 2023):
#   1. Divide W by its largest entry. Then s_1^2 is from 1 to fan_out * fan_in. Its logarithm is
#      small, so that float32 is enough: Apple's GPUs have no float64.
#   2. No Frobenius norm is below the spectral norm, and A = W W^T has largest eigenvalue s_1^2.
#   3. A^(2^k) has largest eigenvalue s_1^(2^(k+1)), so s_1 <= ||A^(2^k)||_F^(1 / 2^(k+1)).
#   4. Powers would overflow. So A is divided by its Frobenius norm before each squaring. After k
#      squarings its largest eigenvalue is s_1^(2^(k+1)) but for the divisors so far. So the
#      logarithm of the next divisor counts 1 / 2^k. The sum is log_square, an upper bound on
#      log s_1^2.
def norm_bound(W, squarings=10):
    """Upper bound on the RMS->RMS norm of W (..., fan_out, fan_in), shape (...).

    In the precision of W: in float64 fit for a certificate. In float32 the allowance for rounding,
    1e-5 and 1e-9 for each row or column, is measured, not proved. Too large by at most a factor
    rank^(1 / 2^(squarings+2)), 0.2 % for rank 768.
    """
    largest, bound = scaled_bound(W, squarings)
    return (largest * bound)[..., 0, 0]


def scaled_bound(W, squarings=10):
    """(largest entry of W, bound on the norm of W / that entry), of shape (..., 1, 1)."""
    largest = vector_norm(W, math.inf, dim=(-2, -1), keepdim=True)
    A = gram(W / avoid_zero(largest))
    log_square = torch.zeros_like(largest)
    for k in range(squarings + 1):
        if k > 0:
            A = A @ A
        size = matrix_norm(A, keepdim=True)
        log_square = log_square + size.log() / 2**k
        A = A / avoid_zero(size)
    up = 1 + (1e-9 if W.dtype == torch.float64 else 1e-5 + 1e-9 * max(W.shape[-2:]))
    return largest, (log_square / 2).exp() / sigma_per_norm(W) * up


# ---- tools: the maps are functions of the small Gram matrix, applied to W once -------------------
def gram(W):
    """W W^T of a wide W, W^T W of a tall one: the smaller of the two, with eigenvalues s^2."""
    return square(W if W.shape[-2] <= W.shape[-1] else W.mT)


def multiply(P, W):
    """P W for a wide W, W P for a tall one. If P is a function p of gram(W), s becomes p(s^2) s."""
    return P @ W if W.shape[-2] <= W.shape[-1] else W @ P


def polynomial(a, b, c, A, A2):
    """a I + b A + c A2, for square A and A2 (..., m, m)."""
    P = b * A
    P.add_(A2, alpha=c)
    P.diagonal(dim1=-2, dim2=-1).add_(a)
    return P


def eye_like(A):
    """The identity of the size of A (..., m, m), in its precision and on its device."""
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


def widen(W):
    """W in the precision the maps compute in: float32, or float64 if W is."""
    return W if W.dtype == torch.float64 else W.float()


def by_svd(new, X, where, f):
    """Overwrite new[i] by U f(s) V^T of X[i] = U diag(s) V^T wherever where[i], and return new.

    NaN and infinity become NaN. In float64, as an SVD in float32 may fail if all s agree.
    """
    if where.any():
        Y = in_float64(X[where])
        bad = ~Y.isfinite().all(-1).all(-1)[..., None, None]
        left, s, right = torch.linalg.svd(torch.where(bad, 0.0, Y), full_matrices=False)
        Y = (left * f(s)[..., None, :]) @ right
        new[where] = torch.where(bad, math.nan, Y).to(new)
    return new


def top_pair(W):
    """(u, s_1 v), shapes (..., fan_out, 1) and (..., 1, fan_in), with the singular vectors of s_1.

    Their product is the part of W that has s_1. Zeros for a zero matrix.
    """
    A = gram(W / avoid_zero(W.abs().amax((-2, -1), keepdim=True)))
    for _ in range(12):
        A = A / avoid_zero(matrix_norm(A, keepdim=True))
        A = A @ A
    # A^4096 is nearly of rank one, x x^T, if s_2 < 0.999 s_1. Its longest column is the
    # best-conditioned multiple of x. If s_2 is nearer, x is a mixture of both vectors.
    longest = vector_norm(A, dim=-2, keepdim=True).argmax(-1, keepdim=True)
    x = normalize(A.take_along_dim(longest, -1), dim=-2)
    if W.shape[-2] <= W.shape[-1]:
        return x, x.mT @ W
    su = W @ x
    return normalize(su, dim=-2), vector_norm(su, dim=-2, keepdim=True) * x.mT


def check(W, w_max, step_norm):
    """ValueError if these are no arguments for a constraint."""
    if W.ndim < 2 or not W.is_floating_point():
        raise ValueError(f"a constraint needs a matrix of floats, got {W.dtype} {tuple(W.shape)}")
    if not (0 < w_max < math.inf and step_norm >= 0):
        raise ValueError("a constraint needs a finite w_max > 0 and step_norm >= 0, "
                         f"got {w_max} and {step_norm}")


# ---- the decays: lr = step_norm, weight_decay = 1 / w_max ----------------------------------------
def none(W, w_max=1.0, step_norm=0.0):
    """All s as they are."""
    return W


def weight_decay(W, w_max, step_norm=0.0):
    """All s -> (1 - step_norm / w_max) s: decoupled weight decay of strength 1 / w_max.

    Under Muon step_norm is the most that a step can add. So it keeps a limit:
    (w_max + step_norm) (1 - step_norm / w_max) = w_max - step_norm^2 / w_max. After AdamW's steps,
    of unknown norm, it guarantees nothing.
    """
    check(W, w_max, step_norm)
    return W * max(0.0, 1 - step_norm / w_max)


def spectral_weight_decay(W, w_max, step_norm=0.0):
    """Only the largest s_1 -> (1 - step_norm / w_max) s_1: weight decay where it is needed."""
    check(W, w_max, step_norm)
    u, sv = top_pair(widen(W))
    return (widen(W) - min(1.0, step_norm / w_max) * u @ sv).to(W.dtype)


# ---- the limits ----------------------------------------------------------------------------------
def specnorm(W, w_max, step_norm=0.0):
    """All s -> s * w / max(w, s_1): spectral normalization of the weights, and only downwards.

    In place of s_1 stands norm_bound, up to 0.2 % above it, so that the limit holds.
    """
    check(W, w_max, step_norm)
    X = widen(W)
    largest, bound = scaled_bound(X)
    new = X / avoid_zero(largest) * (w_max / bound)
    return torch.where(largest * bound <= w_max, X, new).to(W.dtype)


def stiefel(W, w_max, step_norm=0.0):
    """All s -> w: the nearest matrix of the scaled Stiefel manifold.

    That is, its rows or columns are orthonormal, times w. Computed by msign, two Newton-Schulz
    steps, a check, and an SVD where that was not enough. A step makes about 2.5 e^3 of a deviation
    e from 1. The zero matrix has no nearest one: the SVD picks.
    """
    check(W, w_max, step_norm)
    X = msign(widen(W))
    for _ in range(2):
        A = gram(X)
        X = multiply(polynomial(15 / 8, -10 / 8, 3 / 8, A, A @ A), X)
    deviation = matrix_norm(gram(X) - eye_like(A))  # at least the largest |s^2 - 1|
    X = by_svd(X, widen(W), deviation > 1e-4, torch.ones_like)
    return (w_max * sigma_per_norm(W) * X).to(W.dtype)


def hammer(W, w_max, step_norm=0.0):
    """Only s_1 -> w, up or down. Nothing limits the others.

    The paper has it for AdamW, whose updates have few large singular values.
    """
    check(W, w_max, step_norm)
    w = w_max * sigma_per_norm(W)
    u, sv = top_pair(widen(W))
    return (widen(W) + u @ (w * normalize(sv, dim=-1) - sv)).to(W.dtype)


def hard_cap(W, w_max, step_norm=0.0):
    """All s -> min(s, w), exactly: the nearest matrix within the limit.

    A matrix that is within the limit stays as it is. A is the small Gram matrix of W / w. Of
    A = V diag((s / w)^2) V^T the result is W - V diag(max(0, 1 - w / s)) V^T W. That takes as long
    as a dozen products on a CPU. A resolves squares only to 1e-7 of the largest, so an SVD is used
    where s_1 is more than 4 w.
    """
    check(W, w_max, step_norm)
    w = w_max * sigma_per_norm(W)
    X = widen(W)
    A = gram(X) / w**2 if 1e-15 < w < 1e15 else gram(X / w)
    finite = A.isfinite().all(-1).all(-1)
    eye = eye_like(A)
    eigenvalue, V = torch.linalg.eigh(torch.where(finite[..., None, None], A, eye))
    excess = 1 - eigenvalue.clamp(min=1).rsqrt()
    new = X - multiply((V * excess[..., None, :]) @ V.mT, X)

    def cap(s):
        return s.clamp(max=w)

    return by_svd(new, X, ~finite | (eigenvalue.amax(-1) > 16), cap).to(W.dtype)


# ---- soft cap: the hard cap as a polynomial, for s at most k = w + step, just above the limit ----
# A first cubic pulls large singular values x down, and a second gives back to small ones what the
# first took.
#   1. Take y = x - alpha x^3, then z = y + alpha y^3. Small x stay, as z = x - 3 alpha^2 x^5 + ...
#   2. Ask that z(k) = w. With t = alpha k^2 this is
#      w / k = (1 - t)(1 + t (1 - t)^2) = 1 - 3 t^2 + 3 t^3 - t^4, so t^4 - 3 t^3 + 3 t^2 = 1 - w/k.
#      The left side rises from 0 to 1 on [0, 1]: there is one root, which bisection finds.
#   3. z <= w on all of [0, k] if z rises there. z rises with y, as its slope is 1 + 3 alpha y^2. y
#      rises with x until alpha x^2 = 1/3, where z = (2/3)(1 + 4/27) x = (62/81) x. So step 2 is
#      sound up to k = (81/62) w = 1.306 w.
#   4. Beyond, put that peak on w: (62/81) / sqrt(3 alpha) = w. Then 0 <= z <= w while
#      alpha x^2 <= 1, which is up to k = (81/62) sqrt(3) w = 2.26 w. Beyond that, use the hard cap.
#   5. Where k <= w nothing has to come down: alpha = 0.
def soft_cap_alpha(w, k):
    """The alpha that takes every s in [0, k] into [0, w], for k <= 2.26 w.

    w and k in one unit, singular values or RMS->RMS norms. alpha has that unit to the power -2.
    """
    if k <= w:
        return 0.0
    if k > 81 / 62 * 3**0.5 * w:
        raise ValueError(f"the soft cap needs k <= 2.26 w, got {k} at w = {w}; use hard_cap")
    if k > 81 / 62 * w:
        return (62 / 81) ** 2 / (3 * w * w)
    low = 0.0
    high = 1 / 3  # where the left side is 19/81 = 1 - 62/81
    for _ in range(60):
        t = (low + high) / 2
        if t**4 - 3 * t**3 + 3 * t**2 < 1 - w / k:
            low = t
        else:
            high = t
    return high / k**2


#   6. As matrices: by step 2, z = x - e x with e = 3 t^2 - 3 t^3 + t^4 and t = alpha x^2. So W
#      becomes W - E W, with T = alpha A for the Gram matrix A, and E = T^2 (3 I - 3 T + T^2).
#   7. E is small, so it may be computed in bfloat16: a relative error of 2^-8 in E W changes a
#      singular value s by about 2^-8 e s.
#   8. A matrix written from outside may have alpha s^2 > 1, where the polynomial explodes. So W is
#      first divided by sqrt(c), with c = max(1, ||T^2||_F^(1/2)) >= alpha s_1^2. Then
#      alpha s^2 <= 1, and what comes out is at most the peak of step 3, (62/81) / sqrt(3 alpha):
#      1.3 w for steps of 5 %. That may be above the limit still; later uses bring it there. Where
#      squares overflow, the result is the zero matrix.
#   9. For matrices within range c = 1, unless very many singular values sit near the limit, so that
#      t rank^(1/4) > 1 there. W is then scaled down a little more than needed, which is safe.
@full_sums()
def soft_cap_map(W, alpha, dtype=None):
    """s -> y + alpha y^3 with y = s - alpha s^3. alpha is for singular values, not RMS->RMS.

    dtype: in which E is computed; None: that of the other arithmetic, float32 or float64.
    """
    X = widen(W)
    low = X.to(dtype or X.dtype)
    T = alpha * gram(low)
    T2 = T @ T
    size = matrix_norm(widen(T2), keepdim=True).sqrt()
    c = size.nan_to_num(math.inf, math.inf).clamp(min=1)
    T = (T / c).to(T.dtype)
    T2 = (T2 / c**2).to(T.dtype)
    E = T2 @ polynomial(3, -3, 1, T, T2)
    new = multiply(E.nan_to_num(0), low).to(X.dtype)
    return new.sub_(X).mul_(-c.rsqrt()).to(W.dtype)  # (X - E X) / sqrt(c)


# How far do the roundings of bfloat16 lead? Count those of a 1 x 1 matrix, each a relative 2^-8. W
# twice in A, A, and T = alpha A are 4. E is about 3 T^2, so they count double: 8. T^2, the bracket
# of step 6, E, E W, and W in E W are 5 more. At worst they add up to 13/256 of E W. At the top of
# the range E W is what the cap takes off, step_norm. So alpha is solved for a limit that is lower
# by step_norm / 16, which is 16/256. For larger matrices that is experience, not proof. A matrix of
# entries just beside the middle of two bfloat16 numbers, made to break it, ends at 1.012 w_max
# (tests/test_constraints.py).
def soft_cap(W, w_max, step_norm=0.0):
    """All s up to w_max + step_norm, in RMS->RMS units, to at most w_max, by the cubics above.

    It needs matrix products only. Small s hardly change; s near the limit are pulled a little below
    it. The limit holds to a relative 1e-4 in float32 and float64. But on devices where bfloat16 is
    fast it computes in bfloat16, for float32 weights and steps up to 0.3 w_max. Then the limit is
    exceeded by up to 1.2 % in the worst case known. For a proof take hard_cap. step_norm has to be
    right: where steps have no known norm, as AdamW's, use after_unknown_step. For a step_norm above
    1.26 w_max this is hard_cap.
    """
    check(W, w_max, step_norm)
    k = w_max + step_norm
    in_range = 1e-15 < w_max * sigma_per_norm(W) < 1e15  # else squares leave float32
    if k > 2.26 * w_max or not in_range:
        return hard_cap(W, w_max)
    dtype = None
    target = w_max
    if k <= 1.3 * w_max and W.dtype == torch.float32:
        dtype = fast_dtype(W.device)
        if dtype == torch.bfloat16:
            target -= step_norm / 16
    alpha = soft_cap_alpha(target, k)
    if alpha == 0:
        return W
    return soft_cap_map(W, alpha / sigma_per_norm(W) ** 2, dtype)


CONSTRAINTS = {f.__name__: f for f in (none, weight_decay, spectral_weight_decay, specnorm, stiefel,
                                       hammer, soft_cap, hard_cap)}
# What this promises stands above Muon._constrain in muon.py.
specnorm.can_wait = soft_cap.can_wait = hard_cap.can_wait = True
NO_LIMIT = ("none", "weight_decay", "spectral_weight_decay")  # to which w_max is not a limit


def norm_at_start(name, w_max):
    """The RMS->RMS norm with which training under the constraint of that name starts a matrix.

    It is 1, or w_max if that is a smaller limit. stiefel has all singular values at the limit. To
    the decays w_max is no limit but the inverse of a strength, so they start as `none` does.
    """
    if name == "stiefel":
        return w_max
    return 1.0 if name in NO_LIMIT else min(1.0, w_max)


# ---- where steps have no known norm; embeddings; constraints of one's own ------------------------
@torch.no_grad()
def after_unknown_step(constraint, W, w_max, lr):
    """constraint(W, w_max, ...) after a step of unknown norm, as AdamW's.

    How far the step led is measured. Decays get lr as step_norm, as their pull is lr / w_max.
    """
    if constraint in (weight_decay, spectral_weight_decay):
        return constraint(W, w_max, lr)
    bound = norm_bound(widen(W)).nan_to_num(math.inf).max().item()
    return constraint(W, w_max, max(0.0, bound - w_max))


def cap_rows(table_VD, limit=1.0):
    """Each row of an embedding table (V, D) scaled down to an RMS of at most `limit`."""
    # The first clamp is for the gradient: that of sqrt at 0 is infinite.
    rms = table_VD.square().mean(-1, keepdim=True).clamp(min=1e-30).sqrt()
    return table_VD * (limit / rms.clamp(min=limit))


def find_constraint(name):
    """The constraint of that name, or FILE.py:NAME, a function of yours from a file, which is run.

    ValueError, in words for the user, if there is none or it returns another shape.
    """
    if ":" not in name:
        if name not in CONSTRAINTS:
            raise ValueError(f"must be one of {', '.join(CONSTRAINTS)}, or FILE.py:NAME")
        return CONSTRAINTS[name]
    try:
        path, _, function = name.rpartition(":")
        mine = runpy.run_path(str(Path(path).expanduser()))[function]
        stack = torch.eye(2, 3).expand(4, 2, 3)  # Muon gives it all matrices of one shape at once
        if mine(stack.clone(), 1.0, 0.1).shape != stack.shape:
            raise TypeError("it returns another shape")
    except Exception as problem:  # it is any code whatever
        raise ValueError("must name a function f(W, w_max, step_norm) that returns W of the same "
                         f"shape; here: {problem!r}") from problem
    return mine


# On a first reading, go on with mlp_cifar.py. Parts II and III are for certificates.

# ==== PART II: ellipsoids =========================================================================
# A product of norms is loose, as the worst direction of one layer is not the worst of the next. A
# picture: vectors of length at most 1 fill a ball. Behind a matrix they fill an ellipsoid,
# stretched in some directions and thin in others. The product of norms goes on with the smallest
# ball around it. Here we go on with the ellipsoid itself, so the next matrix can stretch only what
# is there.
#
#   E(S) = {z : |c z| <= sqrt(c S c^T) for every row vector c},  S (D, D) positive semidefinite,
#
# which is {z : z^T S^-1 z <= 1} where S has an inverse. What will be used of it:
#   1. S = I means |z| <= 1, and S = D I means rms(z) <= 1.
#   2. If z is in E(S), G z is in E(G S G^T), as |c G z| <= sqrt((c G) S (c G)^T). So, for example,
#      W x for |x| <= 1 lies in E(W W^T).
#   3. E(S) is convex and symmetric: averages of its vectors are in it, and so is -z.
#   4. From E(S), |c z| can get as large as sqrt(c S c^T), which is the bound on one output in the
#      end.
#
# Over many layers S leaves the range of float64. So all functions take and return a pair (S, log),
# which stands for E(exp(log) S). Everything is in float64, and differentiable where neither S nor
# the matrix that is applied to it is 0. A bound has free numbers of its own, which are called
# weights, too. Whatever they are, the bound is valid. So they can be trained: see `tune`.
#
# Shapes: D dimension of z, O of what comes out, N neurons, P parts of a sum, K rows of U, H heads,
# E = D / H, F = E / 2, V vocabulary, M ellipsoids of the same vector. S, and in part III X, are
# always (..., D, D). E(.) with brackets is an ellipsoid, E alone a dimension. From here on letters
# mean what is said here, and no longer what they meant in part I.
def ellipsoid(S, log=0.0):
    """(S, log) of the same ellipsoid with S of trace 1, of each of (..., D, D). Zero stays zero."""
    size = trace(S).clamp(min=1e-300)
    return S / size[..., None, None], log + size.log()


def trace(S):
    """The trace of S (..., D, D), shape (...)."""
    return S.diagonal(dim1=-2, dim2=-1).sum(-1)


# Rounding of S. What can it take from S? Let eps = 2^-53, and |.| the Frobenius norm.
#   1. G G^T, with sums of n terms, is off by a matrix of spectral norm at most n eps |G|^2 =
#      n eps trace(G G^T). Adding n such matrices is off by at most n eps times the trace of their
#      sum. So S may be too small by n eps trace(S).
#   2. Cholesky's root is one of a matrix that is off by another (D + 1) eps trace(S).
#   3. So 1e-11 trace(S) I is added wherever S is used. That is enough for n + D < 90,000, such as
#      D = 16,384 with hidden layers of four times that.
def rounding(S):
    """1e-11 trace(S) of step 3, shape (...)."""
    return 1e-11 * trace(S) + 1e-300


def root_of(S):
    """The lower triangular root with root root^T = S + rounding(S) I."""
    return cholesky(S + rounding(S)[..., None, None] * eye_like(S))


# G S G^T, rounded up. Where terms cancel, in G itself or in G z, the computed matrix may be too
# small by more than 1e-11 of its trace. So step 3 is not enough here.
#   4. Let root root^T = S, so |root|^2 = trace(S), up to the relative 1e-11 D of step 3. Let `size`
#      be |G|, or the sum of its terms' norms if G is a sum, or the product of its factors' norms if
#      it is a product. The computed G root is off by at most d = n eps size |root|, with n terms in
#      the sums that compute G, if it is computed, and those of G root, together.
#   5. The square of a length, |c G root|^2 for |c| = 1, is then off by at most
#      2 d |c G root| + d^2 <= 1e-9 |c G root|^2 + (1 + 1e9) d^2.
#   6. (1 + 1e9) d^2 < 1e-13 size^2 trace(S) for n < 90,000. So size^2 rounding(S) I covers it, and
#      what the product of step 1 loses.
def ellipsoid_image(G_OD, S, size=0.0):
    """G S G^T (..., O, O), a little too large. size: of step 4, if G is computed."""
    G_root = G_OD @ root_of(S)
    image = (1 + 1e-9) * G_root @ G_root.mT
    up = matrix_norm(G_OD).clamp(min=size) ** 2 * rounding(S)
    return image + up[..., None, None] * eye_like(image)


# The sum of vectors, each anywhere in its own ellipsoid:
#   1. |c (z_1 + ... + z_P)| <= sum_p sqrt(c S_p c^T) = sum_p sqrt(w_p) sqrt(c S_p c^T / w_p) for
#      any weights w_p > 0.
#   2. With sum_p w_p = 1 that is at most sqrt(c (sum_p S_p / w_p) c^T), by Cauchy-Schwarz.
#   3. So the sum lies in E(sum_p S_p / w_p). The w_p may be trained. A good start has the least
#      trace: w_p proportional to sqrt(trace(S_p)).
def ellipsoid_sum(S_P, log_P, weights_P=0.0):
    """(S, log) of an ellipsoid that holds every z_1 + ... + z_P, z_p in the p-th.

    weights_P: log w_p, up to a constant, less that of the start of step 3 (for S_p of trace 1).
    """
    top = log_P.max()
    size_P = (log_P - top).exp()
    w_P = ((log_P - top) / 2 + weights_P).exp().clamp(min=1e-150)
    factor_P = size_P * w_P.sum() / w_P
    return ellipsoid((S_P * factor_P[:, None, None]).sum(0), top)


# A layer of neurons, which see J z. A neuron with a slope between 0 and 1 turns a change d into
# d / 2 + v / 2, where all that is known of v is |v| <= |d|. So the output of such a layer, with its
# matrix behind it, is A z + B v with |v_i| <= |(J z)_i|. For ReLU and a matrix W behind it J = I
# and A = B = W / 2.
#   1. With S = root root^T, z = root y with |y| <= 1. For any l_i > 0,
#      sum_i l_i v_i^2 <= sum_i l_i (J z)_i^2 = y^T Y y with Y = root^T J^T diag(l) J root.
#   2. So y^T (I - Y) y + v^T diag(l) v <= y^T y <= 1: if Y < I, the pair (y, v) is in an ellipsoid.
#   3. By 2 of what is used of E(S), above, its image A root y + B v is in the ellipsoid of
#      S' = A root (I - Y)^-1 root^T A^T + B diag(1 / l) B^T.
#   4. For Y < I take any m_i > 0 and scale them: l = share m / sigma(root^T J^T diag(m) J root),
#      with share < 1.
#   5. Let rest rest^T = I - Y, and half = rest^-1 root^T. Then half^T half is the
#      root (I - Y)^-1 root^T of step 3.
#   6. Rounding: Y is rounded up as G S G^T is. Cholesky's root is one of a matrix that differs from
#      I - Y by at most (D + 1) eps D, less than 1e-7, which is taken from I first. With
#      share <= 1 - 1e-4 rest has a condition number of at most 101. So `half` is off by at most
#      e |half| with e = 101 D^1.5 eps. By 2 a b <= 1e-8 a^2 + 1e8 b^2, |half c^T|^2 for |c| = 1 is
#      then off by at most 1e-8 |half c^T|^2 + (1 + 1e8) e^2 |half|^2. Both are added.
# All m alike and share 1/2 are ECLipsE-Fast (Xu and Sivaranjani 2024). The best values of all would
# be LipSDP-Neuron (Fazlyab et al. 2019); trained ones come near it from above.
def ellipsoid_layer(S, log, J_ND, A_OD, B_ON, weights_N=0.0, share_logit=0.0, size=0.0):
    """(S', log') that holds every A z + B v with z in E(exp(log) S), and |v_i| <= |(J z)_i|.

    weights_N: log m. share_logit: share is its sigmoid. size: that of ellipsoid_image, for A.
    """
    root = root_of(S)
    seen = J_ND @ root
    m_N = (torch.zeros_like(seen[:, 0]) + weights_N).exp()
    eye = eye_like(S)
    # With m in place of l. So scale * Y is the Y of step 1.
    Y = (1 + 1e-9) * seen.mT @ (m_N[:, None] * seen)
    Y = Y + m_N.max() * J_ND.square().sum() * rounding(S) * eye
    share = torch.sigmoid(torch.as_tensor(share_logit)).clamp(max=1 - 1e-4)
    scale = share / eigvalsh(Y)[-1].clamp(min=1e-290)
    rest = cholesky((1 - 1e-7) * eye - scale * Y)
    half = torch.linalg.solve_triangular(rest, root.mT, upper=False)
    inner = (1 + 1e-8) * half.mT @ half
    e = 101 * len(S) ** 1.5 * 2.0**-53
    inner = inner + (1 + 1e8) * e**2 * trace(inner) * eye
    of_z = ellipsoid_image(A_OD, inner, size)
    of_v = (B_ON / (scale * m_N)) @ B_ON.mT
    return ellipsoid(of_z + of_v, log)


def maxmin(z):
    """(max, min) of pairs, neuron i of the first half and i of the second (Anil et al. 2019)."""
    first, second = z.chunk(2, -1)
    # torch.maximum and minimum take 3 to 7 times as long. The rounding error of this is relative to
    # the larger of the pair.
    excess = (first - second).relu()
    return torch.cat([second + excess, first - excess], -1)


# A residual block with an MLP makes stream x + w_out f(w_in x) of x, with a number `stream`. It is
# such a layer. Let h = w_in x be what its neurons see:
#   1. If f has slopes from 1/2 - spread to 1/2 + spread, it changes by df = dh / 2 + spread v with
#      |v_i| <= |dh_i|. So J = w_in, A = stream I + w_out w_in / 2, and B = spread w_out. ReLU has
#      spread 1/2, and GeLU g - 1/2 with g its steepest slope.
#   2. For values in place of differences, gelu(h) = h / 2 + v / 2 with |v| <= |h|: spread 1/2.
#   3. MaxMin of a pair (p, q) is ((p + q) + |p - q|) / 2 and ((p + q) - |p - q|) / 2. The change of
#      |p - q| is sqrt(2) v with |v| <= |d(p - q)| / sqrt(2). So J has rows (in_1 - in_2) / sqrt(2),
#      B has columns (out_1 - out_2) / sqrt(2), and A has the part of p + q.
def mlp_slopes(stream, w_in, w_out, spread=None):
    """(J, A, B, size) of ellipsoid_layer for stream x + w_out f(w_in x).

    f has slopes 1/2 +- spread, or, for spread None, is MaxMin of neuron i of the first half and i
    of the second.
    """
    eye = stream * torch.eye(len(w_out), w_in.shape[1]).to(w_out)
    size = (matrix_norm(eye) + matrix_norm(w_out) * matrix_norm(w_in)).item()
    if spread is not None:
        return w_in, eye + w_out @ w_in / 2, spread * w_out, size
    in_1, in_2 = w_in.chunk(2, 0)
    out_1, out_2 = w_out.chunk(2, 1)
    A = eye + (out_1 + out_2) @ (in_1 + in_2) / 2
    return (in_1 - in_2) / 2**0.5, A, (out_1 - out_2) / 2**0.5, size


def ellipsoid_norm(S, log, U_KD, size=0.0):
    """Logarithm of the largest |U z| over the ellipsoid (for one row u: of |u z|), rounded up.

    size: that of ellipsoid_image, if U is a product.
    """
    up = matrix_norm(U_KD).clamp(min=size) ** 2 * rounding(S)
    largest = eigvalsh(gram(U_KD @ root_of(S)))[-1] + up
    return (largest.clamp(min=1e-300).log() + log) / 2 + 2e-9


def ellipsoid_pairs(S, log, U_KD):
    """(K, K): logarithm of the largest |(u_i - u_j) z|, u_i the rows of U, rounded up.

    -inf for i = j.
    """
    rows_KD = U_KD @ root_of(S)
    distance_KK = torch.cdist(rows_KD, rows_KD, compute_mode="donot_use_mm_for_euclid_dist")
    # Two rows, each off by at most the d of ellipsoid_image, which is less than 1e-11 |u_i| |root|.
    longest = U_KD.square().sum(1).max().sqrt()
    up = 2e-11 * longest * trace(S).sqrt()
    same_KK = torch.eye(len(U_KD), dtype=torch.bool)
    return (distance_KK + up).masked_fill(same_KK, 0).log() + log / 2 + 1e-9


def tune(goal, free, steps, lr=0.1):
    """Make goal(free), the logarithm of a bound, small by Adam. Every bound on the way is valid.

    free: {name: trainable weights of the bound}. goal fills it at its first call. It is changed in
    place to the best weights that were seen, and returned.
    """
    goal(free)
    if not free or not steps:
        return free
    least = math.inf
    best = {name: weights.clone() for name, weights in free.items()}
    optimizer = torch.optim.Adam([weights.requires_grad_() for weights in free.values()])
    for step in range(steps + 1):
        value = goal(free)
        if value < least:
            least = value.item()
            best = {name: weights.detach().clone() for name, weights in free.items()}
        optimizer.zero_grad()
        value.backward()
        for weights in free.values():
            if weights.grad is not None:  # some weights are not used, as those for RoPE without it
                weights.grad.nan_to_num_(0, 0, 0)  # a zero matrix gives NaN
        optimizer.param_groups[0]["lr"] = lr * (1 - step / (steps + 1))
        optimizer.step()
    free.update(best)
    return free


def log10(x):
    return math.log10(x) if x > 0 else -math.inf


def add_log10(x, y):
    """log10(10^x + 10^y), also where these overflow."""
    return np.logaddexp(x * LN10, y * LN10).item() / LN10


def power(exponent, down=False, digits=4):
    """10^exponent, to read, also where it overflows.

    Rounded up, as it is a bound: with 4 digits by up to 0.1 %, or a tenth in the exponent. down:
    rounded down, for lower bounds, such as what an attack found.
    """
    up = -1 if down else 1
    if abs(exponent) < 6 or math.isinf(exponent):
        return f"{10**exponent * (1 + up * 5 * 10.0**-digits):.{digits}g}"
    decimals = digits - 3
    return f"10^{exponent + up * 0.5 * 10.0**-decimals:.{decimals}f}"


# ==== PART III: transformers without norm layers ==================================================
# How far do the logits get apart, if all embeddings change? A block is
#
#   x <- (1 - a) x + a attention(x), then x <- (1 - a) x + a mlp(x)
#   attention(x)_t = beta sum_h o_h v_h sum_(j <= t) P^h_tj x_j,   mlp(x) = w_out f(w_in x) / scale
#   P^h_t = softmax over j of s q_h x_t . k_h x_j + bias,   q_h and k_h with or without RoPE
#
# Here a is the share of a sublayer, beta is attention_scale, and s is logit_scale / (D / H). P^h
# are the attention weights of head h, its pattern. f is GeLU or MaxMin. scale is the constant by
# which GeLU is divided, and 1 for MaxMin. This is attention by content. By position there is no q_h
# and no k_h: the bias alone decides. A block by content may have a cap: if the RMS of q_h x_t,
# k_h x_j or v_h x_j is above the cap, the vector is scaled down to it, as cap_rows does. q_h, k_h
# and v_h (E, D) are the rows of q, k and v that belong to head h, and o_h (D, E) the columns of o.
#
# A sequence is measured by its largest token, max_t rms(x_t): bounds then do not depend on its
# length. Attention without a cap has no bound on all of space, as larger tokens move its pattern
# more (Kim, Papamakarios and Mnih 2021). So embeddings are in the ball rms(x_t) <= R. It is convex,
# so the segment between two inputs stays in it. MaxMin and the cap have kinks. But along the
# segment all that is computed is Lipschitz in one number. So it has a derivative at almost every
# point, and a difference is the integral of the derivative. A length or a convex ellipsoid that
# bounds the derivatives bounds the differences, too. From here on dx, dP, y and m are derivatives
# along such a segment, and sigma(.) is the largest singular value.
@dataclass
class BlockBounds:
    """What the bounds need of a block. Matrices are in float64."""
    # The product: constants of steps 3 to 7.
    value: float  # attention's constant, if its pattern did not change; also its gain, by step 6
    pattern: float  # what the changed pattern adds; without a cap this is still to be times R^2
    mlp: float  # the MLP's constant
    mlp_gain: float  # its largest output, divided by R
    # The ellipsoid: x_t <- (1 - a) x_t + sum_h C_h sum_j P^h_tj x_j, then the MLP with its stream.
    a: float
    o_HDE: Tensor  # a beta o_h
    v_HED: Tensor
    C_HDD: Tensor  # C_h = a beta o_h v_h
    mlp_differences: tuple  # mlp_slopes of the MLP and its stream, for differences of tokens
    mlp_tokens: tuple  # and for tokens themselves
    # By position: the least weight that head h gives to the token at which it stands,
    # P^h_tt >= p_h. By content it is None.
    p_H: Tensor | None = None
    # By content: logits are q_h x_t . k_h x_j, with s in q_h.
    q_HED: Tensor | None = None
    k_HED: Tensor | None = None
    rotates: bool = False  # with RoPE
    longest: float = 0.0  # with a cap: the largest length of k_h x_j, v_h x_j and q_h x_t / s; or 0
    s: float = 0.0  # the factor on q . k


# ---- THE PRODUCT: how long a difference gets in a sublayer ---------------------------------------
# Let |dx_t| <= 1 and |x_t| <= r = R sqrt(D).
#   1. By the product rule head h's output, with its o_h, changes by o_h v_h y_h + o_h v_h m_h, with
#      y_h = sum_j P_tj dx_j and m_h = sum_j dP_tj x_j. y_h is an average of changes, so |y_h| <= 1.
#      Let no logit of a row change by more than e_h. The softmax's change in l1 is
#      sum_j P_tj |dl_j - mean|, which is convex in the changes dl of the logits. So it is largest
#      at a corner: +e_h on some tokens, of total weight p, and -e_h on the others. There it is
#      4 p (1 - p) e_h, at most e_h. So |m_h| <= e_h r.
#   2. Keys come from any token: e_h <= s sigma(k_h) (|q_h dx_t| r + |q_h x_t|). So a head may as
#      well give each token the key of the one before it, as key_offset does. RoPE keeps norms, so
#      it changes nothing.
#   3. o is applied to the v_h y_h of the heads side by side. So |beta sum_h o_h v_h y_h| <= value,
#      with value = beta sigma(o) sqrt(sum_h sigma(v_h)^2).
#   4. All queries of a token come from one vector. Let Q be q with the rows of head h times
#      sigma(v_h) sigma(k_h). Then sum_h (sigma(v_h) sigma(k_h) |q_h dx_t|)^2 = |Q dx_t|^2. As in
#      step 3, |beta sum_h o_h v_h m_h| <= beta sigma(o) sqrt(sum_h (sigma(v_h) e_h r)^2). With
#      step 2 and Minkowski's inequality that is at most
#      beta s sigma(o) r (r |Q dx_t| + |Q x_t|). As |Q dx_t| <= sigma(Q), |Q x_t| <= sigma(Q) r and
#      r^2 = R^2 D, it is at most pattern R^2, with pattern = beta 2 s D sigma(o) sigma(Q).
#      Attention's constant is value + pattern R^2.
#      The paper's formula is this one for a single head, and takes the norms of whole matrices for
#      any number of heads. For H heads it is too small: by up to sqrt(H) in the value, and by up to
#      H in the pattern, as s D is logit_scale H here, where the paper has logit_scale. Attacks
#      exceed it.
#   5. With a cap let v_hj be v_h x_j, scaled down. Head h's output changes by o_h y'_h + o_h m_h,
#      with y'_h = sum_j P_tj dv_hj and m_h = sum_j dP_tj v_hj. Scaling down to a ball is the
#      projection onto it, which brings no two vectors further apart. So |y'_h| <= sigma(v_h), and
#      step 3's value holds. Queries, keys and values have a length of at most
#      longest = cap sqrt(E). So |m_h| <= longest e_h, and
#      e_h <= s longest (|q_h dx_t| + |k_h dx_j|): the radius is gone. The query's token is the same
#      for all heads, and keys come from any token. So by Minkowski
#      sqrt(sum_h e_h^2) <= s longest (sigma(q) + sqrt(sum_h sigma(k_h)^2)). And
#      |beta sum_h o_h m_h| <= beta sigma(o) sqrt(sum_h |m_h|^2). So in the place of pattern R^2
#      stands beta s longest^2 sigma(o) (sigma(q) + sqrt(sum_h sigma(k_h)^2)).
#   6. The output of attention has an RMS of at most value R: step 3 with averages of tokens.
#   7. MLP: let n = sigma(w_out) sigma(w_in). MaxMin has constant n and output n R. GeLU has slopes
#      in [1 - g, g] and |gelu(z)| <= |z|. Divided by a scale, it has constant n g / scale and
#      output n R / scale.
#   8. Residual: R starts as the largest RMS of an embedding. Let a sublayer have outputs of an RMS
#      of at most gain * R, by step 6 or 7, and a constant by step 4, 5 or 7. It multiplies R by
#      (1 - a) + a * gain, and the network's constant by (1 - a) + a * constant. Last comes the norm
#      of U, the matrix from the last block to the logits.
def block_bounds(W, heads, a, beta, p_H=None, logit_scale=0.0, rotates=False, gelu=None, cap=0.0):
    """What transformer_bounds takes of a block.

    W            {role: matrix in float64}, roles q, k (by content), v, o, in, out
    p_H          by position: as in BlockBounds; None: by content, with s = logit_scale / (D / H)
    gelu         (g, scale) of step 7; None: MaxMin
    cap          largest RMS of a head's queries, keys and values by content; 0: no cap
    """
    D = len(W["v"])
    v_HED = W["v"].view(heads, -1, D)
    o_HDE = a * beta * W["o"].unflatten(1, (heads, -1)).transpose(0, 1)
    sigma_v_H = sigma(v_HED)
    up = 1 + 1e-9  # for rounding
    beta_o = beta * sigma(W["o"]).item() * up

    pattern = longest = s = 0.0
    q_HED = k_HED = None
    if p_H is None:  # by content
        s = logit_scale * heads / D
        q_HED = s * W["q"].view(heads, -1, D)
        k_HED = W["k"].view(heads, -1, D)
        sigma_k_H = sigma(k_HED)
        if cap:
            longest = cap * (D / heads) ** 0.5
            pattern = beta_o * s * longest**2 * (sigma(W["q"]) + sigma_k_H.norm()).item()
        else:
            Q_HED = (sigma_v_H * sigma_k_H)[:, None, None] * q_HED  # s Q of step 4
            pattern = beta_o * 2 * D * sigma(Q_HED.flatten(0, 1)).item()

    g = scale = 1.0
    spread = token_spread = None
    if gelu:
        g, scale = gelu
        spread = g - 0.5
        token_spread = 0.5
    gain = (sigma(W["in"]) * sigma(W["out"])).item() * up / scale
    w_out = a * W["out"] / scale
    return BlockBounds(
        value=beta_o * sigma_v_H.norm().item(),
        pattern=pattern,
        mlp=gain * g,
        mlp_gain=gain,
        a=a,
        o_HDE=o_HDE,
        v_HED=v_HED,
        C_HDD=o_HDE @ v_HED,
        mlp_differences=mlp_slopes(1 - a, W["in"], w_out, spread),
        mlp_tokens=mlp_slopes(1 - a, W["in"], w_out, token_spread),
        p_H=p_H,
        q_HED=q_HED,
        k_HED=k_HED,
        rotates=rotates,
        longest=longest,
        s=s)


# ---- THE ELLIPSOID: what one sublayer stretches most, the next does not --------------------------
# From here on q_h includes the factor s, and o_h the factors a and beta, as in BlockBounds. First
# the changed pattern, sum_h C_h m_h of step 1. Tokens are in E(X), their differences in E(S). As
# before, derivatives are enough, as E(X) is convex.
#   a. If no logit of a row changes by more than e_h, m_h is in e_h E(X), as in step 1.
#   b. |c sum_h C_h m_h| <= sum_h e_h sqrt(c C_h X C_h^T c^T) for every row vector c. By
#      Cauchy-Schwarz with any r_h > 0, the sum is in the ellipsoid of
#      (sum_h r_h^2 e_h^2) (sum_h C_h X C_h^T / r_h^2).
#   c. Let e_h be the largest change of a logit of the row. It is at most
#      max_j |q_h dx_t . k_h x_j| + max_j |q_h x_t . k_h dx_j|. Every x_j is in E(X), so k_h x_j is
#      in E(k_h X k_h^T). So the first term is at most |root_h^T q_h dx_t|, where root_h root_h^T is
#      k_h X k_h^T. Likewise the second, with S in place of X.
#   d. RoPE turns queries against keys. So the keys' ellipsoid must be one that turning does not
#      change: E(L d^-2) holds it with L = sigma(d k_h X k_h^T d), for any diagonal d > 0 that has
#      one value for both coordinates that turn together. root_h is then sqrt(L) d^-1.
#   e. All heads see one token. Let n_first be the largest norm of the stacked r_h root_h^T q_h dx_t
#      for dx_t in E(S), and n_second that of the second terms. Then by Minkowski
#      sum_h r_h^2 e_h^2 <= (n_first + n_second)^2. In root_h^T q_h terms may cancel: its `size` is
#      |root_h| |q_h|.
def seen_by_keys(q_HED, k_HED, S, rotates, weights_HF):
    """(root_h^T q_h (H, E, D), its size (H,)): |k_h z . q_h x| <= |root_h^T q_h x| for z in E(S).

    weights_HF: for d of step d, one for each of the F = E / 2 pairs of coordinates that turn.
    """
    keys_HEE = ellipsoid_image(k_HED, S)
    if not rotates:
        root_HEE = root_of(keys_HEE)
        return root_HEE.mT @ q_HED, matrix_norm(root_HEE) * matrix_norm(q_HED)
    # With d = 1 the ellipsoid that holds it is a ball. With d = pair_HF^(-1/2) its axes are in
    # proportion to the extents of the keys' ellipsoid along the pairs. The start is half way, in
    # logarithms: the power -1/4.
    pair_HF = keys_HEE.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, -1)).sum(-2)
    log_HF = pair_HF.clamp(min=1e-300).log()
    d_HE = (weights_HF - (log_HF - log_HF.mean()) / 4).exp().repeat(1, 2)
    L_H1 = eigvalsh(d_HE[:, :, None] * keys_HEE * d_HE[:, None])[:, -1:]
    seen_HED = (L_H1.clamp(min=1e-300).sqrt() / d_HE)[:, :, None] * q_HED
    return seen_HED, matrix_norm(seen_HED)


def changed_pattern(values_HDD, S, first_HED, size_H, log_second_H, norm_second, weights_H):
    """(S', log') of steps b and e.

    values_HDD      C_h X C_h^T, or what takes its place
    S               of the differences of tokens
    first_HED       what is applied to dx_t in the first term of e_h; size_H: of step e
    log_second_H    logarithm of the second term's square, roughly: for the start of r_h
    norm_second     a function of r_h: n_second
    weights_H       logarithm of r_h, less that of the start
    """
    # The start has about the least trace in step b: r_h^4 is trace(values_HDD) / e_h^2.
    log_first_H = ellipsoid(first_HED @ S @ first_HED.mT)[1]
    start_H = (ellipsoid(values_HDD)[1] - torch.logaddexp(log_first_H, log_second_H)) / 4
    r_H = (weights_H + start_H).exp()
    r_H11 = r_H[:, None, None]
    stacked = (r_H11 * first_HED).flatten(0, 1)
    n_first = ellipsoid_norm(S, 0.0, stacked, (r_H * size_H).norm()).exp()
    log = 2 * ((1 + 1e-9) * (n_first + norm_second(r_H))).log()
    return ellipsoid((values_HDD / r_H11**2).sum(0), log)


def ellipsoid_pattern(S, X, block, weights_H=0.0, weights_S=0.0, weights_X=0.0):
    """(S', log') that holds sum_h C_h m_h, for tokens in E(X) that change within E(S).

    weights_H: for r_h. With RoPE, weights_S and weights_X: for d of the second and the first term
    of step c, of each head and pair of coordinates that turns (H, F).
    """
    keys = block.k_HED
    rotates = block.rotates
    first_HED, first_size_H = seen_by_keys(block.q_HED, keys, X, rotates, weights_X)  # of dx_t
    second_HED, second_size_H = seen_by_keys(block.q_HED, keys, S, rotates, weights_S)  # of x_t
    values_HDD = ellipsoid_image(block.C_HDD, X, size_of_C(block))
    log_second_H = ellipsoid(second_HED @ X @ second_HED.mT)[1]

    def norm_second(r_H):
        stacked = (r_H[:, None, None] * second_HED).flatten(0, 1)
        return ellipsoid_norm(X, 0.0, stacked, (r_H * second_size_H).norm()).exp()

    return changed_pattern(values_HDD, S, first_HED, first_size_H, log_second_H, norm_second,
                           weights_H)


def size_of_C(block):
    """(H,): `size` of ellipsoid_image for C_h = o_h v_h, which is a product."""
    return matrix_norm(block.o_HDE) * matrix_norm(block.v_HED)


# With a cap tokens may be anywhere, and lengths are enough.
#   f. |m_h| <= longest e_h takes the place of e_h E(X) in step a, where m_h is of values, v_h x_j
#      capped. o_h is applied to it. So in step b longest^2 o_h o_h^T takes the place of
#      C_h X C_h^T.
#   g. e_h <= longest |q_h dx_t| + s longest |k_h dx_j|, by step 5. In the second terms each head
#      has a token of its own. So in step e
#      n_second = sqrt(sum_h (r_h s longest)^2 sigma(k_h S k_h^T)).
#   h. Values: y'_h of step 5 is an average of vectors no longer than |v_h dx_j|. So o_h y'_h is in
#      the ellipsoid of sigma(v_h S v_h^T) o_h o_h^T.
def longest_image(W_HED, S):
    """The largest |W_h z| for z in E(S), of each head (H,)."""
    return eigvalsh(ellipsoid_image(W_HED, S))[:, -1].clamp(min=1e-300).sqrt()


def capped_values(S, block):
    """S' (H, D, D): the ellipsoids of all o_h y'_h, for tokens that change within E(S)."""
    longest_H = longest_image(block.v_HED, S)
    root_HDE = longest_H[:, None, None] * block.o_HDE
    return root_HDE @ root_HDE.mT


def capped_pattern(S, block, weights_H=0.0):
    """(S', log') that holds sum_h o_h m_h, for tokens that change within E(S)."""
    values_HDD = block.longest**2 * block.o_HDE @ block.o_HDE.mT
    second_H = block.s * block.longest * longest_image(block.k_HED, S)

    def norm_second(r_H):
        return (r_H * second_H).norm()

    first_HED = block.longest * block.q_HED
    return changed_pattern(values_HDD, S, first_HED, matrix_norm(first_HED), 2 * second_H.log(),
                           norm_second, weights_H)


# Then block after block, from dx_t in E(D I):
#   9. E(S) is convex and symmetric: if all tokens change within E(S), so do their averages,
#      whatever the pattern.
#  10. The MLP with its stream is an ellipsoid_layer (mlp_slopes).
#  11. Pattern by position, which does not change: P_tt is at least p_h. So sum_j P_tj dx_j is
#      p_h dx_t + (1 - p_h) average_h, with some average of the changes of all tokens that are
#      seen, the token itself included. So the token changes by the sum of G_0 dx_t and all
#      G_h average_h, with G_0 = (1 - a) I + sum_h p_h C_h, and G_h = (1 - p_h) C_h.
#  12. Pattern by content: p_h = 0, and the changed pattern is one more term of the sum. Without a
#      cap it depends on where tokens are: in E(X), from X = R^2 D I on by the same steps.
#  13. The same difference lies in many ellipsoids, one for each choice of weights. A block hands on
#      one for each term G_0, ..., G_H of step 11 in the next block, tuned for that term. A block by
#      content takes a single one.
#  14. In the end, logits U x change by at most sqrt(sigma(U S U^T) / V) in RMS.
def attention_terms(block):
    """(G, size): G_0, ..., G_H of step 11 (P, D, D), and `size` of ellipsoid_image for them."""
    C_HDD = block.C_HDD
    eye = eye_like(C_HDD)
    p_H11 = torch.zeros(len(C_HDD), 1, 1).to(eye)
    if block.p_H is not None:
        p_H11 = block.p_H[:, None, None] * (1 - 1e-9)  # what a softmax may round up
    G_0 = (1 - block.a) * eye + (p_H11 * C_HDD).sum(0)
    size = (1 - block.a) * len(eye) ** 0.5 + size_of_C(block).sum().item()
    return torch.cat([G_0[None], (1 - p_H11) * C_HDD]), size


def after_mlp(slopes, S_P, log_P, M, weights, kind):
    """(S, log) (M, D, D) and (M,): M ellipsoids of a vector behind the sum and the MLP, step 13.

    S_P, log_P      of the terms of the sum
    weights         a function (name, *shape) to free weights
    kind            first word of their names: token or difference
    """
    J, A, B, size = slopes
    parts_MP = weights(f"{kind} parts", M, len(S_P))
    neurons_MN = weights(f"{kind} neurons", M, len(J))
    share_M = weights(f"{kind} share", M)
    found = []
    for m in range(M):
        S, log = ellipsoid_sum(S_P, log_P, parts_MP[m])
        found.append(ellipsoid_layer(S, log, J, A, B, neurons_MN[m], share_M[m], size))
    S_M, log_M = zip(*found)
    return torch.stack(S_M), torch.stack(log_M)


def add_changed_pattern(block, S_P, log_P, S, log, X, log_X, weights):
    """(S_P, log_P) with the terms that attention by content adds or changes, step 12.

    Differences of tokens are in E(exp(log) S), tokens in E(exp(log_X) X).
    """
    H, E, _ = block.q_HED.shape
    weights_H = weights("heads", H)
    if block.longest:
        values_HDD, log_values_H = ellipsoid(capped_values(S, block))
        pattern, log_pattern = capped_pattern(S, block, weights_H)
        S_P = torch.cat([S_P[:1], values_HDD, pattern[None]])
        return S_P, torch.cat([log_P[:1], log + log_values_H, log + log_pattern[None]])
    pairs = (H, E // 2)  # that RoPE turns
    pattern, log_pattern = ellipsoid_pattern(S, X, block, weights_H, weights("S", *pairs),
                                             weights("X", *pairs))
    # S and X went in without their logs. e_h^2 scales as S X, and m_h is in e_h E(X).
    log_pattern = log_pattern + log + 2 * log_X
    return torch.cat([S_P, pattern[None]]), torch.cat([log_P, log_pattern[None]])


def ellipsoid_blocks(blocks, R, free):
    """[(S, log)]: after each block, tokens change within E(exp(log) S), if at first by RMS <= 1.

    R       largest RMS of a token at the start
    free    {name: trainable weights}; filled with zeros where there are none
    """
    eye = eye_like(blocks[0].C_HDD)
    D = len(eye)
    S_M, log_M = ellipsoid(eye[None], math.log(D))
    X_M, log_XM = ellipsoid(eye[None], math.log(D) + 2 * math.log(max(R, 1e-300)) + 1e-9)
    after = []
    for i, block in enumerate(blocks):
        def weights(name, *shape, i=i):
            """The trainable weights of that name in this block. They start at zero."""
            return free.setdefault(f"{name} {i}", eye.new_zeros(shape))

        G_P, size = attention_terms(block)
        S_P, log_P = ellipsoid(ellipsoid_image(G_P, S_M, size), log_M)
        if block.p_H is None:
            S_P, log_P = add_changed_pattern(block, S_P, log_P, S_M[0], log_M[0], X_M[0], log_XM[0],
                                             weights)
        if any(later.p_H is None and not later.longest for later in blocks[i + 1:]):
            X_P, log_XP = ellipsoid(ellipsoid_image(G_P, X_M, size), log_XM)
            X_M, log_XM = after_mlp(block.mlp_tokens, X_P, log_XP, 1, weights, "token")
        M = 1
        if i + 1 < len(blocks) and blocks[i + 1].p_H is not None:
            M = len(blocks[i + 1].C_HDD) + 1
        S_M, log_M = after_mlp(block.mlp_differences, S_P, log_P, M, weights, "difference")
        after.append((S_M[0], log_M[0]))
    return after


# ---- both ----------------------------------------------------------------------------------------
def transformer_bounds(blocks, R, U_VD, free=None):
    """How far logits U x change (max-token RMS) if embeddings of RMS at most R change by RMS 1.

    What ends in log10 is a logarithm to base 10. Bounds are rounded up. free: the trainable weights
    that `tune` found; None: zeros.
    product_log10   the bound by the product; ellipsoid_log10: that by ellipsoids
    log10           the smaller of the two
    body_log10      the product before the head; radius_log10: R after the last block
    after           [(S, log)] after each block: tokens change within the ellipsoid exp(log) S. log
                    is a natural logarithm
    rows            one for each block: constants of steps 3 to 7, R before each sublayer, and
                    attention's constant, alone and with the stream
    """
    rows = []
    body_log10 = 0.0
    radius_log10 = log10(R * (1 + 1e-9))
    for block in blocks:
        a = block.a
        growth_log10 = log10((1 - a) + a * block.value)
        pattern_log10 = log10(block.pattern)
        if not block.longest:
            pattern_log10 += 2 * radius_log10
        alone_log10 = add_log10(log10(block.value), pattern_log10)
        attention_log10 = add_log10(growth_log10, log10(a) + pattern_log10)
        rows.append(dict(value=block.value, pattern=block.pattern, alone_log10=alone_log10,
                         mlp=block.mlp, mlp_gain=block.mlp_gain,
                         radius_log10=radius_log10,
                         radius_mlp_log10=radius_log10 + growth_log10,
                         attention_log10=attention_log10))
        radius_log10 += growth_log10 + log10((1 - a) + a * block.mlp_gain)
        body_log10 += attention_log10 + log10((1 - a) + a * block.mlp) + 1e-9
    product = body_log10 + log10(exact_norm(U_VD).item())
    after = ellipsoid_blocks(blocks, R, free or {})
    S, log = after[-1]
    followed = (ellipsoid_norm(S, log, U_VD).item() - math.log(len(U_VD)) / 2) / LN10
    return dict(log10=min(product, followed), product_log10=product, ellipsoid_log10=followed,
                body_log10=body_log10, radius_log10=radius_log10, after=after, rows=rows)
