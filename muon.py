"""Muon: momentum, orthogonalised. A step of size `lr` moves a weight matrix by at most `lr`.

Read this file first: the method rests on one fact that AdamW cannot offer. The size of an update is known
*before* it is made. Muon replaces the momentum matrix by its orthogonal factor (all singular values 1). The
RMS->RMS norm of W (fan_out x fan_in) is sigma_max(W) * sqrt(fan_in / fan_out), so in that norm the update

    W <- W - lr * sqrt(fan_out / fan_in) * msign(momentum)

has size lr. From within its limit W gets at most lr beyond it, and constraints.py takes that back.

Ancestry: Muon is Jordan et al. (2024, kellerjordan.github.io/posts/muon), its reading as steepest descent in
a norm Bernstein and Newhouse (2024), minimax polynomials for msign Amsel et al. (2025, "Polar Express").
"""

import contextlib
import math

import torch

# ==== msign: the orthogonal factor of a matrix, by matrix products alone ===========================
# For G = U diag(s) V^T, msign(G) = U V^T: every singular value becomes 1. An odd polynomial
# a x + b x^3 + c x^5 acts on singular values as (a I + b A + c A^2) G with A = G G^T, so a few of them,
# composed to send (0, 1] close to 1, need products alone. What they overshoot by goes straight into the
# guarantee on the weights (Jordan's five quintics reach 1.20), so these never exceed 1:
#   1. Let the singular values lie in [l, 1]. Take the odd quintic nearest to 1 in the worst case on
#      [l, 1 + tau]: it is 1-e, 1+e, 1-e, 1+e in turn, at l, at two points between, at 1 + tau (Remez).
#   2. Divide it by 1+e. It maps [l, 1] into [(1-e)/(1+e), 1], and rises from 0 on [0, l]: p <= 1.
#   3. Repeat with (1-e)/(1+e) as the new l. From l = 0.003: 0.0118, 0.046, 0.173, 0.548, 0.956.
#   4. tau = 0.08: beyond it the slope is 12, and what rounding takes there explodes. bfloat16 rounds by up to
#      2^-9, a matrix of entries that all round alike by 2^-9 sqrt(m): 3 % for m = 256, 6 % for 1024.
QUINTICS = (
    (3.9315793965075883, -9.961059610387684, 6.330758067286728),
    (3.9014935990598114, -9.746436633712356, 6.16886741692355),
    (3.7835090368911892, -8.934734423551463, 5.559685776990915),
    (3.3527885714277708, -6.356417693343335, 3.665787153475924),
    (2.399582326380437, -2.5019688578112294, 1.0618535818890484),
)
# Of any G: in bfloat16 as seen, not proved (1.03 for the worst matrices of 512 rows, 1.06 of 1024).
MSIGN_MAX = {torch.float64: 1 + 1e-6, torch.float32: 1 + 1e-3, torch.bfloat16: 1.07}


@contextlib.contextmanager
def full_sums():
    """On CUDA, add bfloat16 products up in float32: partial sums in bfloat16 would make msign explode."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@full_sums()
def msign(G: torch.Tensor) -> torch.Tensor:
    """The orthogonal factor U V^T of G = U diag(s) V^T, approximately and never too large.

    G (..., fan_out, fan_in): float64, float32 or bfloat16, any scale. Returns the same shape and dtype, with
    singular values of at most MSIGN_MAX[dtype]. Relative to the largest, s = 0.1, 0.01, 0.001 become 0.96,
    0.96, 0.45; less at high rank, as the largest is known only to rank^(1/8). Zero gives zero, NaN or
    infinity NaN. Not for TF32, nor under autocast.
    """
    if G.ndim < 2 or G.dtype not in MSIGN_MAX:
        raise ValueError(f"msign needs a float64, float32 or bfloat16 matrix, not {G.dtype} {tuple(G.shape)}")
    tall, (m, n) = G.shape[-2] > G.shape[-1], sorted(G.shape[-2:])
    X = (G.mT if tall else G).reshape(-1, m, n)
    # Entries into [-1, 1], so that no product over- or underflows. (Dividing: 1/1e-45 is infinite.)
    largest = X.abs().amax((-2, -1), keepdim=True)
    X = X / torch.where(largest == 0, torch.ones_like(largest), largest)
    A = square(X)
    # Scale to at most 1, by s_1^4 <= ||A^2||_F. (1 for zero.)
    size = torch.linalg.matrix_norm(A @ A, keepdim=True).sqrt()
    inverse = torch.where(size == 0, torch.ones_like(size), size).reciprocal()
    X, A = X * inverse.sqrt(), A * inverse
    for i, (a, b, c) in enumerate(QUINTICS):
        A = square(X) if i else A
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, P, X, beta=a)
    return (X.mT if tall else X).reshape(G.shape)


def square(X):
    """X X^T, X (..., m, n). (Of a stack of one torch would copy X^T first: three times the time.)"""
    return (X[0] @ X[0].mT)[None] if X.ndim == 3 and len(X) == 1 else X @ X.mT


def fast_dtype(device) -> torch.dtype:
    """bfloat16 where its products are native, and 2 to 8 times as fast as float32's; else float32."""
    native = dict(cuda=lambda: torch.cuda.is_bf16_supported(including_emulation=False),
                  cpu=torch.cpu._is_avx512_bf16_supported).get(torch.device(device).type, bool)
    return torch.bfloat16 if native() else torch.float32


# ==== Muon ========================================================================================
class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, and a constraint applied to each matrix after its update.
    lr            RMS->RMS norm of an update
    momentum      M <- momentum * M + (1 - momentum) * gradient (msign does not see the scale)
    constraint    a map (W, w_max, step_norm) -> W, yours or of constraints.py (weight_decay: w_max=1/decay)
    w_max         the RMS->RMS limit it enforces, on float32 or float64 (bfloat16's rounding drifts)
    dtype         precision of msign, None: the parameters'. A step in bfloat16 has norm up to 1.07 lr
    every         a constraint that can wait (see _constrain) runs about every so many steps, 1 to 64
    All can be set per group. Parameters are matrices (fan_out, fan_in) or stacks (count, fan_out, fan_in).
    With a constraint that can wait the limit holds for each weight after its every step, wherever it starts.
    Writing to it from outside breaks that for at most 64 steps, or until forget() is called. A gradient that
    is not finite makes no update (constraints run all the same); its entries restart their momentum at 0.
    """

    def __init__(self, params, lr=0.1, momentum=0.95, constraint=None, w_max=None, dtype=None, every=1):
        self.forget()
        super().__init__(params, dict(lr=lr, momentum=momentum, constraint=constraint, w_max=w_max,
                                      dtype=dtype, every=every))

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group, wrong = self.param_groups[-1], []
        limits = dict(lr=(0, math.inf), momentum=(0, 1), every=(1, 65), w_max=(1e-300, math.inf))
        for name, (low, high) in limits.items():
            if not low <= (group[name] or 0) < high and (name != "w_max" or group["constraint"]):
                wrong.append(f"{name} is {group[name]}, must be at least {low:g} and below {high:g}")
        if not (group["constraint"] is None or callable(group["constraint"])):
            wrong.append(f"constraint is {group['constraint']!r}, must be a function (or None)")
        for p in group["params"]:
            dtypes = {p.dtype, group["dtype"] or p.dtype}
            if p.ndim not in (2, 3) or p.numel() == 0 or not dtypes <= MSIGN_MAX.keys():
                wrong.append(f"a parameter is {tuple(p.shape)} in {dtypes}, must be a matrix or a stack, in "
                             "float32, float64 or bfloat16. Give biases to Adam; a convolution as a matrix")
        if wrong:
            self.param_groups.pop()
            raise ValueError("Muon: " + "; ".join(wrong))

    def forget(self):
        """Take nothing for granted about norms. To be called after writing to weights from outside."""
        self.bounds, self.steps = {}, 0  # {matrix: what its norm is at most}, steps counted since

    def __setstate__(self, state):  # after load_state_dict, copying, unpickling
        super().__setstate__(state)
        self.forget()

    def state_dict(self):
        """As of any optimizer, with constraints by name: a checkpoint holds no code."""
        self.forget()  # as loading does: so the run that goes on and the one that is loaded agree
        state = super().state_dict()
        for group in state["param_groups"]:
            group["constraint"] = getattr(group["constraint"], "__name__", None)
        return state

    def load_state_dict(self, state_dict):
        """Groups keep the constraints they were made with. ValueError if the state does not fit."""
        groups, own = state_dict["param_groups"], [dict(group) for group in self.param_groups]
        names = (i for group in groups for i in group["params"])
        for i, p in zip(names, (p for group in self.param_groups for p in group["params"])):
            saved = {k: getattr(v, "shape", ()) for k, v in state_dict["state"].get(i, {}).items()}
            if saved not in ({}, {"momentum": p.shape}) or not all("every" in group for group in groups):
                raise ValueError("Muon: this state is of another optimizer or model: needed is a momentum "
                                 f"{tuple(p.shape)}, it has {saved}")
        super().load_state_dict(state_dict)
        for group, before in zip(self.param_groups, own):
            group.update(constraint=before["constraint"], w_max=group.get("w_max") or before["w_max"])

    @torch._disable_dynamo  # (torch.compile runs it as it is)
    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        self.steps += 1
        if self.steps == 64:  # (someone may have written to the weights)
            self.forget()
        for group in self.param_groups:
            batches = {}
            for p in group["params"]:
                if p.grad is not None:
                    batches.setdefault((p.shape, p.dtype, p.device), []).append(p)
            for batch in batches.values():
                with torch.autocast(batch[0].device.type, enabled=False):
                    self._update(batch, group)
        return loss

    def _update(self, batch, group):
        lr, momentum, updates = float(group["lr"]), float(group["momentum"]), []
        if not 0 <= lr < math.inf:  # (a schedule that ran past its end)
            raise ValueError(f"Muon: lr is {lr}, must be finite and at least 0")
        for p in batch:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            M = state["momentum"].lerp_(p.grad.to_dense(), 1 - momentum)  # (an embedding's may be sparse)
            updates.append(torch.lerp(p.grad.to_dense(), M, momentum).to(group["dtype"] or M.dtype))
        update = msign(torch.stack(updates) if len(batch) > 1 else updates[0][None])
        if update.device.type != "cpu" or not update[..., 0, 0].isfinite().all():  # (a look costs a GPU more)
            for M in (update, *(self.state[p]["momentum"] for p in batch)):
                M.nan_to_num_(0, 0, 0)
        (fan_out, fan_in), step = batch[0].shape[-2:], lr * MSIGN_MAX[update.dtype]
        for p, U in zip(batch, update):
            p.add_(U, alpha=-lr * (fan_out / fan_in) ** 0.5)
            self.bounds[p] = self.bounds.get(p, math.inf) + step
        if group["constraint"] is not None:
            self._constrain(batch, group, step)

    def _constrain(self, batch, group, step):
        # can_wait = True promises: any W of norm up to w_max + step_norm goes to at most w_max, and any W if
        # step_norm is infinite. Then the constraint need not run at each step. No norm is measured:
        #   1. bounds[W] grew by step. While it is at most w_max there is nothing to do. Where it is infinite
        #      (nothing is known) W is first brought to w_max + step: one that is within stays as it is.
        #   2. Then W is taken to a target so far below w_max that the next every - 1 steps cannot pass it:
        #      w_max - (every - 1) step, in whole steps and not below 15/16 w_max. That is the new bound.
        constraint, target, bound, told = group["constraint"], float(group["w_max"]), math.inf, step
        waits, most = getattr(constraint, "can_wait", False), max(self.bounds[p] for p in batch)
        if waits and most <= target * (1 + 1e-9):
            return
        stack = torch.stack(batch) if len(batch) > 1 else batch[0][None]
        if waits:
            reach = target + step
            if most == math.inf:
                stack, most = constraint(stack, reach, math.inf), reach
            target -= max(0, min(group["every"] - 1, target // (16 * step))) * step if step else 0
            bound, told = target, max(most, reach) - target
        if getattr(new := constraint(stack, target, told), "shape", None) != stack.shape:
            raise ValueError(f"Muon: a constraint must return a tensor {tuple(stack.shape)}, as it is given")
        for p, W in zip(batch, new):
            p.copy_(W)
            self.bounds[p] = bound
