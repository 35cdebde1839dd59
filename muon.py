"""Muon: momentum, orthogonalised. An update has a norm of at most `lr`, whatever the gradient.

Read this file first. The method rests on one fact that AdamW cannot offer: the size of an update is
known *before* it is made. Muon replaces the momentum matrix by its orthogonal factor, whose
singular values are all 1. The RMS->RMS norm of W (fan_out x fan_in) is the largest factor by which
W can increase the root mean square (RMS) of a vector's entries:
sigma_max(W) * sqrt(fan_in / fan_out). In that norm the update

    W <- W - lr * sqrt(fan_out / fan_in) * msign(momentum)

has size lr, or at most 1.07 lr as it is computed in bfloat16. By the triangle inequality a matrix
that was within its limit ends above it by no more than that. The constraints of constraints.py take
that back.

The file has two parts: msign, which computes the orthogonal factor, and the optimizer, which also
decides when a constraint has to run.

Ancestry: Muon is Jordan et al. (2024, kellerjordan.github.io/posts/muon). Bernstein and Newhouse
(2024) read it as steepest descent in a norm. Minimax polynomials for msign are Amsel et al. (2025,
"Polar Express").
"""

import contextlib
import math

import torch

# ==== msign: the orthogonal factor of a matrix, by matrix products alone ==========================
# For G = U diag(s) V^T, msign(G) = U V^T: every singular value becomes 1. With A = G G^T, the
# matrix (a I + b A + c A^2) G has the singular vectors of G, and a s + b s^3 + c s^5 as singular
# values. So such quintics can be applied by matrix products alone. Together those here take all
# from 0.003 to 1 into [0.955, 1], and smaller values grow by a factor of at least 300. A singular
# value above 1 would make the update larger than lr, and so weaken the guarantee on the weights.
# Jordan's five quintics reach 1.20. In exact arithmetic those here never exceed 1:
#   1. Let the singular values lie in [low, 1], and let tau = 0.08 be room for rounding. Take the
#      odd quintic whose largest distance from 1 on [low, 1 + tau] is least. Call that distance e.
#      The quintic is 1 - e at low, 1 + e and 1 - e at two points between, and 1 + e at 1 + tau.
#      Remez's algorithm finds it.
#   2. Divide it by 1 + e. It then maps [low, 1] into [(1 - e) / (1 + e), 1], and rises from 0 on
#      [0, low].
#   3. Repeat with low = (1 - e) / (1 + e). From 0.003 that is 0.0118, 0.046, 0.173, 0.548, 0.956.
#   4. Why tau: in low precision a singular value may land a little above 1. Up to 1 + tau a quintic
#      still gives at most 1. Beyond, it rises steeply, the first one with a slope of 12 and more,
#      so the next steps would blow that value up.
#
# How far above 1 can rounding lead? bfloat16 has 8 significant bits and rounds an entry by up to a
# relative 2^-8. The entries of an orthogonal factor of m x n, m <= n, are about 1 / sqrt(n). If all
# errors have the same sign and size, they form a matrix of rank one of norm 2^-8 sqrt(m): 0.09 for
# 512 rows, 0.18 for 2048. To assume that would weaken the guarantee needlessly. A matrix comes near
# it if all positive entries have one size, which is rounded up, and all negative entries another,
# which is rounded towards 0. Hadamard matrices with two such sizes are the worst that were found.
# With 64 to 2048 rows and up to 10,240 columns msign gave at most 1.056, for 512 x 2560 and sizes
# that differ by 40/256 (tests/test_muon.py). So the 1.07 below is what was found and some room, not
# a theorem.
QUINTICS = (
    (3.9315793965075883, -9.961059610387684, 6.330758067286728),
    (3.9014935990598114, -9.746436633712356, 6.16886741692355),
    (3.7835090368911892, -8.934734423551463, 5.559685776990915),
    (3.3527885714277708, -6.356417693343335, 3.665787153475924),
    (2.399582326380437, -2.5019688578112294, 1.0618535818890484),
)
# {dtype: the largest singular value of msign(G) that is assumed; found by tests, not proved}
MSIGN_MAX = {torch.float64: 1 + 1e-6, torch.float32: 1 + 1e-3, torch.bfloat16: 1.07}


@contextlib.contextmanager
def full_sums():
    """On CUDA, add up bfloat16 products in float32: partial sums in bfloat16 make msign explode."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@full_sums()
def msign(G: torch.Tensor) -> torch.Tensor:
    """The orthogonal factor U V^T of G = U diag(s) V^T, approximately.

    G (..., fan_out, fan_in): float64, float32 or bfloat16, of any scale. Returns the same shape and
    dtype, with singular values that no test found above MSIGN_MAX[dtype]. Singular values of 0.1,
    0.01 and 0.001 of the largest become 0.96, 0.96 and 0.45. At high rank they become less, as the
    largest one is known only up to a factor rank^(1/8). Zero gives zero; NaN or infinity gives NaN.
    Not for TF32, nor under autocast. ValueError for other dtypes and for vectors.
    """
    if G.ndim < 2 or G.dtype not in MSIGN_MAX:
        raise ValueError(f"msign needs a float64, float32 or bfloat16 matrix, not {G.dtype} "
                         f"{tuple(G.shape)}")
    m, n = sorted(G.shape[-2:])
    tall = G.shape[-2] > G.shape[-1]
    X = (G.mT if tall else G).reshape(-1, m, n)

    # Bring the entries into [-1, 1], so that no product over- or underflows. A division, as the
    # inverse of 1e-45 is infinite.
    largest = X.abs().amax((-2, -1), keepdim=True)
    X = X / avoid_zero(largest)

    # Bring the singular values to at most 1, by s_1^4 <= ||A^2||_F.
    A = square(X)
    size = torch.linalg.matrix_norm(A @ A, keepdim=True).sqrt()
    inverse = avoid_zero(size).reciprocal()
    X = X * inverse.sqrt()
    A = A * inverse

    for i, (a, b, c) in enumerate(QUINTICS):
        if i > 0:
            A = square(X)
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A^2
        X = torch.baddbmm(X, P, X, beta=a)  # (a I + b A + c A^2) X
    return (X.mT if tall else X).reshape(G.shape)


def avoid_zero(x):
    """x to divide by: 1 where it is 0."""
    return torch.where(x == 0, torch.ones_like(x), x)


def square(X: torch.Tensor) -> torch.Tensor:
    """X X^T of X (..., m, n)."""
    if X.ndim == 3 and len(X) == 1:
        # Of a stack of one, torch would copy X^T first: three times the time.
        return (X[0] @ X[0].mT)[None]
    return X @ X.mT


def fast_dtype(device) -> torch.dtype:
    """bfloat16 where its products are native, 2 to 8 times as fast as float32's; else float32."""
    kind = torch.device(device).type
    native = False
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        native = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


# ==== Muon ========================================================================================
class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, and a constraint applied to each matrix after its update.

    lr            RMS->RMS norm of an update
    momentum      M <- momentum * M + (1 - momentum) * gradient; msign does not see the scale
    constraint    a map (W, w_max, step_norm) -> W, of constraints.py or yours, or None
    w_max         the limit it enforces, RMS->RMS, on float32 or float64 weights (those in bfloat16
                  drift by rounding); for weight_decay, 1 / decay
    dtype         precision of msign; None: that of the parameters. In bfloat16 an update has a norm
                  of up to 1.07 lr, which the constraint takes into account
    every         1 to 64. A constraint that can wait takes norms so far below w_max that up to
                  every - 1 more steps of the present size fit, but by at most w_max / 16. It runs
                  again when that room is used up. Other constraints run after each step

    Each can be set per group. Parameters are matrices (fan_out, fan_in) or stacks of matrices
    (count, fan_out, fan_in); ValueError for anything else.

    With a constraint that can wait (soft_cap, hard_cap, specnorm) the limit holds for each weight
    after each of its steps, to a relative 1e-4, wherever the weights start. soft_cap in bfloat16
    arithmetic may exceed it by more: see its docstring. Writing to weights from outside breaks the
    limit for at most 64 steps, or until forget() is called. A gradient that is not finite makes no
    update, and the momentum of those entries restarts at 0. A matrix whose gradient is zero in
    every entry gets no update, but a decay still shrinks it. It counts as moved on a GPU, since
    finding out would wait for the GPU, and in a stack of which another matrix moves. Then the norm
    that is counted for it grows, and soft_cap goes on lowering the singular values near the limit.
    """

    def __init__(self, params, lr=0.1, momentum=0.95, constraint=None, w_max=None, dtype=None,
                 every=1):
        self.forget()
        super().__init__(params, dict(lr=lr, momentum=momentum, constraint=constraint,
                                      w_max=w_max, dtype=dtype, every=every))

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        faults = find_faults(self.param_groups[-1])
        if faults:
            self.param_groups.pop()
            raise ValueError("Muon: " + "; ".join(faults))

    def forget(self):
        """Take nothing for granted about norms. Call it after writing to weights from outside."""
        self.bounds = {}  # {matrix: what its norm is at most}
        self.steps = 0  # since the last call

    def __setstate__(self, state):
        """Called after load_state_dict, by copying and by unpickling."""
        super().__setstate__(state)
        self.forget()

    def state_dict(self):
        """As of any optimizer, with constraints by name: a checkpoint holds no code."""
        self.forget()  # as loading does: so a run that goes on after saving equals a resumed one
        state = super().state_dict()
        for group in state["param_groups"]:
            group["constraint"] = getattr(group["constraint"], "__name__", None)
        return state

    def load_state_dict(self, state_dict):
        """Groups keep the constraints they were made with. ValueError if it is no state of Muon."""
        for group in state_dict["param_groups"]:
            if "every" not in group:
                raise ValueError("Muon: this is a state of another optimizer, must be of Muon")
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, before):
            group["constraint"] = own["constraint"]
            group["w_max"] = group.get("w_max") or own["w_max"]

    @torch._disable_dynamo  # torch.compile leaves it as it is
    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        if self.steps == 64:  # someone may have written to the weights
            self.forget()
        for group in self.param_groups:
            # Matrices of one shape are one batch: a stack takes less time than one after the other.
            batches = {}
            for p in group["params"]:
                if p.grad is not None:
                    idle = p.is_cpu and not find_moving(p.grad).any()  # reading waits for a GPU
                    batches.setdefault((p.shape, p.dtype, p.device, idle), []).append(p)
            for (*_, idle), batch in batches.items():
                with torch.autocast(batch[0].device.type, enabled=False):
                    step_norm = self._update(batch, group, idle)
                    if group["constraint"] is not None:
                        self._constrain(batch, group, step_norm)
        return loss

    def _update(self, batch, group, idle):
        """W <- W - lr * sqrt(fan_out / fan_in) * msign(M). Returns what its norm is at most."""
        lr = float(group["lr"])
        momentum = float(group["momentum"])
        if not 0 <= lr < math.inf:  # a schedule that ran past its end
            raise ValueError(f"Muon: lr is {lr}, must be finite and at least 0")

        directions = []
        for p in batch:
            gradient = p.grad.to_dense()  # that of an embedding may be sparse
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            M = state["momentum"].lerp_(gradient, 1 - momentum)
            # msign does not see the scale of the momentum. So without a gradient a matrix would go
            # on in the same direction for thousands of steps. It stays instead, as msign(0) = 0.
            direction = torch.lerp(gradient, M, momentum).to(group["dtype"] or M.dtype)
            directions.append(direction.mul_(find_moving(gradient)))
        updates = msign(stack(directions))

        # One entry that is not finite makes its whole update NaN: then no update, and momentum
        # restarts. On a GPU, waiting for a look at the first entries would cost more than doing
        # this always.
        if updates.device.type != "cpu" or not updates[..., 0, 0].isfinite().all():
            updates.nan_to_num_(0, 0, 0)
            for p in batch:
                self.state[p]["momentum"].nan_to_num_(0, 0, 0)

        fan_out, fan_in = batch[0].shape[-2:]
        step_norm = 0.0 if idle else lr * MSIGN_MAX[updates.dtype]
        for p, update in zip(batch, updates):
            p.add_(update, alpha=-lr * (fan_out / fan_in) ** 0.5)
            self.bounds[p] = self.bounds.get(p, math.inf) + step_norm
        return step_norm

    # A constraint need not run after each step, if the limit holds all the same. `can_wait = True`
    # on a constraint promises: it takes any W of norm up to w_max + step_norm to at most w_max, and
    # any W at all if step_norm is infinite. Then no norm is measured, as it is enough to count:
    #   1. bounds[W] has grown by step_norm. While it is at most the limit, there is nothing to do.
    #   2. Where nothing is known of W its bound is infinite: at the first step, after loading or
    #      saving, after forget(). One call with an infinite step_norm would restore the limit. But
    #      soft_cap is hard_cap for that, and would act otherwise than at other steps, though most
    #      weights never left their limit. So a first call enforces limit + step_norm only. It
    #      changes no weight that was within its limit before this step.
    #   3. The second call takes W to a target below the limit. The distance is a number of whole
    #      steps, at most every - 1, and at most 1/16 of the limit. The target is the new bound.
    # For example: w_max 2, lr 0.1, every 4, with steps of 0.1001 in float32. Room for 3 steps would
    # need a target of 1.70, but it may not go below 15/16 of 2 = 1.875. So there is room for one
    # step: the target is 1.8999, and the constraint runs at every second step. In bfloat16 steps
    # count 0.107, the target is 1.893, and it runs as often.
    def _constrain(self, batch, group, step_norm):
        constraint = group["constraint"]
        limit = float(group["w_max"])
        can_wait = getattr(constraint, "can_wait", False)
        if can_wait:
            batch = [p for p in batch if self.bounds[p] > limit * (1 + 1e-9)]
        if not batch:
            return

        norm_at_most = max(self.bounds[p] for p in batch)
        W = stack(batch)
        target = limit
        # A constraint that cannot wait gets the norm of a full step, also where the gradient was 0.
        # Else a decay would stop there.
        overshoot = float(group["lr"]) * MSIGN_MAX[group["dtype"] or W.dtype]
        bound = math.inf
        if can_wait:
            reach = limit + step_norm
            if norm_at_most == math.inf:
                W = constraint(W, reach, math.inf)
                norm_at_most = reach
            if step_norm > 0:
                room = min(group["every"] - 1, limit // (16 * step_norm))  # in steps
                target -= room * step_norm
            overshoot = max(norm_at_most, reach) - target
            bound = target
        new = constraint(W, target, overshoot)
        if getattr(new, "shape", None) != W.shape:
            raise ValueError(f"Muon: a constraint must return a tensor {tuple(W.shape)}, as given")
        for p, new_W in zip(batch, new):
            p.copy_(new_W)
            self.bounds[p] = bound


def find_moving(gradient):
    """(..., 1, 1): which of the matrices have a gradient that is not zero in every entry."""
    gradient = gradient.to_dense()
    moving = gradient[..., :1, :].any(-1, keepdim=True)
    if gradient.is_cpu and moving.all():  # nearly always, and quick to see
        return moving
    return gradient.abs().amax((-2, -1), keepdim=True) > 0


def stack(matrices):
    """(count, ...): one tensor of all. One alone is not copied."""
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]


def find_faults(group):
    """What is wrong with the settings of a group, in words."""
    faults = []
    ranges = dict(lr=(0, 1e9), momentum=(0, 0.9999), every=(1, 64))
    if group["constraint"] is not None:
        ranges["w_max"] = (1e-30, 1e30)
        if not callable(group["constraint"]):
            faults.append(f"constraint is {group['constraint']!r}, must be a function or None")
    for name, (least, most) in ranges.items():
        try:
            fits = least <= float(group[name]) <= most
        except (TypeError, ValueError):
            fits = False
        if not fits:
            faults.append(f"{name} is {group[name]}, must be from {least} to {most:g}")
    for p in group["params"]:
        dtypes = {p.dtype, group["dtype"] or p.dtype}
        whole = not hasattr(p, "full_tensor")  # a DTensor, of FSDP, is a part of a matrix
        if not (whole and p.ndim in (2, 3) and p.numel() and dtypes <= MSIGN_MAX.keys()):
            faults.append(f"a parameter is {type(p).__name__} {tuple(p.shape)} in {dtypes}, must "
                          "be a matrix or stack in float32, float64 or bfloat16: no bias, no "
                          "convolution")
    return faults
