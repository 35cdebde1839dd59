"""Constraints: maps that keep the norm of a weight matrix where you want it, and the norms they speak of.

Read this file second, after muon.py. Everything here has one signature,

    constraint(W, w_max, step_norm=0.0) -> W          W (..., fan_out, fan_in), any float dtype, wide or tall

and acts on singular values alone. `w_max` is the limit on the RMS->RMS norm of W, `step_norm` says how far above it, in
the same norm, the updates since can have led (under Muon: lr, if after each step). A constraint of your own is a function
of this form. With w the limit on singular values, w = w_max * sqrt(fan_out / fan_in):

    name                    singular values                                what it guarantees
    none                    s -> s                                         nothing
    weight_decay            s -> (1 - step_norm / w_max) s                 s <= w under Muon if so at the start
    spectral_weight_decay   s_1 -> (1 - step_norm / w_max) s_1             nothing alone
    specnorm                s -> s * w / max(w, s_1)                       s <= w always
    stiefel                 s -> w                                         s = w always
    hammer                  s_1 -> w                                       nothing beyond s_1; for low-rank updates
    soft_cap                s -> an odd polynomial in s, of slope 1 at 0   s <= w after a step of known norm from there
    hard_cap                s -> min(s, w)                                 s <= w always

Guarantees are for float32 (float64) weights, to a relative 1e-4; soft_cap's in bfloat16 arithmetic is one by experience,
see there. bfloat16 input is mapped in float32 and rounded at the end. Ancestry: spectral normalization is Yoshida and Miyato
(2017) and Miyato et al. (2018); hammer, soft cap and the comparison are Newhouse et al. (2025, arXiv 2507.13338).
"""

import functools
import math
import runpy

import torch

from muon import has_fast_bfloat16, msign

# ======================================================================================================================
# Norms
# ======================================================================================================================
# rms(x) = ||x||_2 / sqrt(dim): a vector of RMS 1 has entries of about 1 whatever its width. The norm of W as a map from
# RMS to RMS is max_x rms(W x) / rms(x) = sigma_max(W) * sqrt(fan_in / fan_out); a square orthogonal W has norm 1.


def sigma_per_norm(W):
    """sqrt(fan_out / fan_in): multiply an RMS->RMS norm by this to get a singular value, divide for the way back."""
    return (W.shape[-2] / W.shape[-1]) ** 0.5


def exact_norm(W: torch.Tensor) -> torch.Tensor:
    """RMS->RMS norm of W (..., fan_out, fan_in), shape (...), float64, rounded up by 1e-9: fit for a certificate.

    From an SVD in float64, whose error is below 1e-12: milliseconds to seconds, by size. Not for each step.
    """
    return torch.linalg.matrix_norm(W.detach().double(), ord=2) / sigma_per_norm(W) * (1 + 1e-9)


def norm_bound(W: torch.Tensor, squarings: int = 10, dtype=torch.float64) -> torch.Tensor:
    """Upper bound on the RMS->RMS norm of W (..., fan_out, fan_in), shape (...), by matrix products alone.

    In float64 (the default) it is fit for a certificate; in float32 it allows for rounding as measured (1e-5), not as
    proved. Power iteration, in contrast, bounds from below. Above the true norm by at most rank^(1 / 2^(squarings+2)):
    0.2 % for rank 768 with 10 squarings, and less for spectra that are not flat. Source: Delattre et al. (2023).
    """
    # 1. A = W W^T has largest eigenvalue s_1^2, and the Frobenius norm of a matrix is at least its spectral norm.
    # 2. A^(2^k) has largest eigenvalue s_1^(2^(k+1)), so s_1 <= ||A^(2^k)||_F^(1 / 2^(k+1)) for every k.
    # 3. Rescale before each squaring, or it overflows, and carry the factor as a logarithm: log s_1^2 <= log_square.
    W = W.detach().to(dtype)
    largest = torch.linalg.vector_norm(W, math.inf, dim=(-2, -1), keepdim=True)
    A = gram(W / torch.where(largest == 0, torch.ones_like(largest), largest))
    log_square = 2 * largest.double().log()
    for k in range(squarings + 1):
        A = A if k == 0 else A @ A
        size = torch.linalg.matrix_norm(A, keepdim=True)
        log_square = log_square + size.double().log() / 2**k
        A = A / torch.where(size == 0, torch.ones_like(size), size)
    return (log_square / 2).exp()[..., 0, 0] / sigma_per_norm(W) * (1 + (1e-9 if dtype == torch.float64 else 1e-5))


# ======================================================================================================================
# Tools: every map below is a polynomial or function of the small Gram matrix, applied to W once
# ======================================================================================================================
def gram(W):
    """A = W W^T of a wide W, W^T W of a tall one: the smaller of the two, with eigenvalues s^2."""
    return W @ W.mT if W.shape[-2] <= W.shape[-1] else W.mT @ W


def multiply(R, W):
    """R W for a wide W, W R for a tall one: where R is a function r of gram(W), singular values go s -> r(s^2) s."""
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


def top_singular_pair(W, squarings=12):
    """(u, s v), shapes (..., fan_out, 1) and (..., 1, fan_in), of the largest singular value s of W; zeros for zero.

    A^(2^12) is the projector on the leading singular vector but for (s_2 / s_1)^8192; its largest column is
    that vector.
    Where several singular values agree to 1e-4 it is one vector of their span.
    """
    A = gram(W / W.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(W.dtype).tiny))
    for _ in range(squarings):
        A = A / torch.linalg.matrix_norm(A, keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
        A = A @ A
    index = torch.linalg.vector_norm(A, dim=-2, keepdim=True).argmax(-1, keepdim=True)
    x = torch.nn.functional.normalize(A.gather(-1, index.expand(*A.shape[:-1], 1)), dim=-2)  # (..., small side, 1)
    if W.shape[-2] <= W.shape[-1]:
        return x, x.mT @ W
    sy = W @ x
    return torch.nn.functional.normalize(sy, dim=-2), torch.linalg.vector_norm(sy, dim=-2, keepdim=True) * x.mT


def check(W, w_max, step_norm):
    """The sigma limit w for this W, after a look at the arguments."""
    if W.ndim < 2 or not W.is_floating_point():
        raise ValueError(f"a constraint needs a floating-point matrix (..., fan_out, fan_in), got {W.dtype} "
                         f"{tuple(W.shape)}")
    if not (0 < w_max < math.inf and 0 <= step_norm < math.inf):
        raise ValueError(f"a constraint needs w_max > 0 and step_norm >= 0, both finite, got {w_max} and {step_norm}")
    return w_max * sigma_per_norm(W)


# ======================================================================================================================
# The decays: no limit of their own, only a pull. step_norm / w_max plays the part of lr * weight_decay.
# ======================================================================================================================
def none(W, w_max=1.0, step_norm=0.0):
    """W as it is."""
    return W


def weight_decay(W, w_max, step_norm=0.0):
    """All s -> (1 - step_norm / w_max) s. Under Muon: (w_max + lr) (1 - lr / w_max) = w_max - lr^2 / w_max <= w_max.

    In other words decoupled weight decay of strength 1 / w_max, whose equilibrium norm under steps of norm lr is w_max.
    AdamW's steps have no known norm, so there it guarantees nothing.
    """
    check(W, w_max, step_norm)
    return W * max(0.0, 1 - step_norm / w_max)


def spectral_weight_decay(W, w_max, step_norm=0.0):
    """Only the largest s_1 -> (1 - step_norm / w_max) s_1: weight decay where it is needed."""
    check(W, w_max, step_norm)
    u, sv = top_singular_pair(working(W))
    return (working(W) - min(1.0, step_norm / w_max) * u @ sv).to(W.dtype)


# ======================================================================================================================
# The limits
# ======================================================================================================================
def specnorm(W, w_max, step_norm=0.0):
    """All s -> s * w / max(w, s_1): spectral normalization, on the weights themselves, and only from above.

    s_1 is a bound from above (norm_bound, within 0.2 %), so that the limit holds; power iteration would leave s_1 > w.
    """
    check(W, w_max, step_norm)
    bound = norm_bound(W, dtype=working(W).dtype)[..., None, None]
    return (working(W) * (w_max / bound.clamp(min=w_max)).to(working(W).dtype)).to(W.dtype)


def stiefel(W, w_max, step_norm=0.0):
    """All s -> w: the nearest matrix of the (scaled) Stiefel manifold, one with orthonormal rows or columns.

    msign and one Newton-Schulz step, which turns a deviation e from 1 into about 2.5 e^3; then a check, and an SVD where
    that was not enough, for singular values below 0.003 of the largest (to zero no one is nearest, and it gets one).
    """
    w = check(W, w_max, step_norm)
    X = msign(working(W))
    A = gram(X)
    X = multiply(polynomial(15 / 8, -10 / 8, 3 / 8, A, A @ A), X)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    if (torch.linalg.matrix_norm(gram(X) - eye) > 1e-3).any():  # at least the largest |s^2 - 1|
        U, _, Vh = torch.linalg.svd(working(W), full_matrices=False)
        X = U @ Vh
    return (w * X).to(W.dtype)


def hammer(W, w_max, step_norm=0.0):
    """Only the largest s_1 -> w, up or down. Nothing holds the others, but AdamW's updates are of low rank."""
    w = check(W, w_max, step_norm)
    u, sv = top_singular_pair(working(W))
    return (working(W) + u @ (w * torch.nn.functional.normalize(sv, dim=-1) - sv)).to(W.dtype)


def hard_cap(W, w_max, step_norm=0.0):
    """All s -> min(s, w), exactly: the nearest matrix within the limit. NaN or infinity gives NaN.

    Through the eigenvectors of the small Gram matrix, A = V diag(s^2) V^T: multiply W by V diag(min(1, w / s)) V^T. That
    takes a few matrix products' time on a CPU, an SVD of W dozens. But A resolves s^2 only to 1e-7 of s_1^2, so far above
    the limit, where Muon never is, it is an SVD after all.
    """
    w = check(W, w_max, step_norm)
    X = working(W)
    A = gram(X)
    if not A.isfinite().all():
        return torch.full_like(W, math.nan)
    eigenvalue, V = torch.linalg.eigh(A)
    if eigenvalue.numel() and eigenvalue.amax() > (4 * w) ** 2:
        U, s, Vh = torch.linalg.svd(X.double(), full_matrices=False)
        return (U * s.clamp(max=w)[..., None, :] @ Vh).to(W.dtype)
    shrink = w / eigenvalue.clamp(min=w * w).sqrt()  # min(1, w / s)
    return multiply((V * shrink[..., None, :]) @ V.mT, X).to(W.dtype)


# ---- soft cap ------------------------------------------------------------------------------------------------------
# The hard cap as a polynomial for the case at hand: s is at most k = w + step, just above the limit.
#   1. Take y = x - alpha x^3, then z = y + alpha y^3: small x stay (z = x - 3 alpha^2 x^5 + ...), large x come down.
#   2. Ask that z(k) = w. With u = alpha k^2: z(k) / k = (1 - u)(1 + u (1 - u)^2) = 1 - 3u^2 + 3u^3 - u^4, hence
#          u^4 - 3 u^3 + 3 u^2 = 1 - w / k,   whose left side rises from 0 to 1 on [0, 1]: one root, found by bisection.
#   3. z <= w on all of [0, k] if z rises there. z rises with y (slope 1 + 3 alpha y^2), and y with x until alpha x^2
#      is 1/3, where z = (2/3)(1 + 4/27) x = (62/81) x. So 2 is sound while u <= 1/3: k <= 81/62 w = 1.306 w.
#   4. Beyond, put that peak on w: (62/81) / sqrt(3 alpha) = w. Then 0 <= z <= w as long as alpha x^2 <= 1, i.e. up to
#      k = (81/62) sqrt(3) w = 2.26 w. Beyond that, use the hard cap.
#   5. Where k <= w nothing has to come down: alpha = 0.
def soft_cap_alpha(w: float, k: float) -> float:
    """The alpha that takes every s in [0, k] into [0, w]; needs k <= 2.26 w. Unit: that of w and k, to the -2."""
    if k <= w:
        return 0.0
    if k > 81 / 62 * 3**0.5 * w:
        raise ValueError(f"the soft cap holds for steps up to k = 2.26 w, got k = {k} at w = {w}; use hard_cap")
    if k > 81 / 62 * w:
        return (62 / 81) ** 2 / (3 * w * w)
    low, high = 0.0, 1 / 3  # the left side at 1/3 is 19/81 = 1 - 62/81
    for _ in range(60):
        u = (low + high) / 2
        low, high = (u, high) if u**4 - 3 * u**3 + 3 * u**2 < 1 - w / k else (low, u)
    return high / k**2


def soft_cap_map(W, alpha, dtype=None):
    """s -> y + alpha y^3 with y = s - alpha s^3, at a given alpha (in singular values, not RMS->RMS).

    By step 2 z = x - e(u) x with u = alpha x^2 and e(u) = 3u^2 - 3u^3 + u^4, so W goes to W - E W, E = e(alpha A).
    Where E is small it can be computed with few digits (dtype), and the result is still good to many.
    """
    X = working(W)
    low = X.to(dtype or X.dtype)
    U = alpha * gram(low)
    E = U @ U
    E = E @ polynomial(3, -3, 1, U, E)
    return (X - multiply(E, low)).to(W.dtype)


def soft_cap(W, w_max, step_norm=0.0):
    """All s <= w_max + step_norm (in RMS->RMS) to at most w_max, by the cubics above: products only, no decomposition.

    step_norm must be true: under Muon it is lr; where a step's norm is unknown (AdamW) pass norm_bound(W) - w_max.
    Steps beyond 1.26 w_max are left to hard_cap. Small s hardly move; s near the limit are pulled a little below it.
    Where bfloat16 is fast, the correction E W is computed in it for steps up to 0.3 w_max. For a matrix of one entry 13
    roundings of 2^-8 count (W: twice in A, which enters E squared, and once more; A, alpha A: twice; U^2, the bracket,
    E, E W), at worst 13/256 of it. So alpha is solved for a limit lower by step_norm / 16, which with that is enough.
    For larger matrices this is experience, not proof: rounding entry by entry can move the norm by more. Spectra of all
    kinds in random, cosine or coordinate directions stay below w_max; a matrix of entries all just beside the middle
    of two bfloat16 numbers, made to break it, ends at 1.004 w_max (tests/test_constraints.py). Certificates do not
    rest on this, they measure norms. In need of proof take hard_cap.
    """
    check(W, w_max, step_norm)
    k = w_max + step_norm
    if k > 2.26 * w_max:
        return hard_cap(W, w_max)
    low = torch.bfloat16 if k <= 1.3 * w_max and W.dtype == torch.float32 and has_fast_bfloat16(W.device) else None
    alpha = soft_cap_alpha(w_max - (step_norm / 16 if low else 0.0), k)
    if alpha == 0:
        return W
    return soft_cap_map(W, alpha / sigma_per_norm(W) ** 2, low)


CONSTRAINTS = {f.__name__: f for f in (none, weight_decay, spectral_weight_decay, specnorm, stiefel, hammer,
                                       soft_cap, hard_cap)}
# These take anything up to w_max + step_norm to at most w_max, so Muon need not call them at each step.
specnorm.can_wait = soft_cap.can_wait = hard_cap.can_wait = True
DECAYS = ("weight_decay", "spectral_weight_decay")  # pass these the learning rate, also if a step's norm is unknown


@functools.cache  # a file runs once
def find_constraint(name: str):
    """The function of that name in the table, or a function of yours: FILE.py:NAME runs FILE.py and takes NAME from it.

    ValueError, in words for the user, if there is none, or if it does not turn a matrix into one of its shape.
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
        raise ValueError("must name a function f(W, w_max, step_norm) of a file, which returns W of the same shape, (fan_out, fan_in) or "
                         f"(..., fan_out, fan_in); here: {type(problem).__name__}: {problem}") from problem
    return mine
