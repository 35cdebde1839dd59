"""Muon: momentum, orthogonalised. A step of size `lr` moves a weight matrix by at most `lr`, and that is the point.

Read this file first: the whole method rests on one fact that AdamW cannot offer. The size of an update is known
*before* it is made. Muon replaces the momentum matrix by its orthogonal factor (all singular values 1), so that in the
units of this project, where the RMS->RMS norm of W (fan_out x fan_in) is sigma_max(W) * sqrt(fan_in / fan_out),
the update

    W <- W - lr * sqrt(fan_out / fan_in) * msign(momentum)

has norm lr. If W was below its limit before the step, it is below limit + lr after it, and constraints.py knows how
much there is to take back. Used as

    optimizer = Muon(model.parameters(), lr=0.1, constraint=soft_cap, w_max=6.0)   # every parameter a matrix

Ancestry: Muon is Jordan et al. (2024, kellerjordan.github.io/posts/muon), its reading as steepest descent in a chosen
norm Bernstein and Newhouse (2024), minimax polynomials for msign Amsel et al. (2025, "Polar Express").
"""

import torch

# ======================================================================================================================
# msign: the orthogonal factor of a matrix, by matrix products alone
# ======================================================================================================================
# For G = U diag(s) V^T, msign(G) = U V^T: every singular value becomes 1. An odd polynomial p(x) = a x + b x^3 + c x^5
# acts on the singular values through (a I + b A + c A^2) G with A = G G^T, so a few such polynomials, composed to send
# (0, 1] close to 1, do the job with products alone, which is what hardware is good at. Which polynomials? What they
# overshoot by goes straight into the guarantee on the weights (Jordan's five quintics reach 1.20, and a step of lr
# would be one of 1.2 lr), so these never exceed 1:
#   1. Let the singular values lie in [l, 1]. Take the odd quintic nearest to 1 in the worst case on [l, 1 + tau]: it
#      touches 1-e, 1+e, 1-e, 1+e in turn, at l, at two points between, and at 1 + tau (Remez).
#   2. Divide it by its maximum 1+e. Now it maps [l, 1] into [(1-e)/(1+e), 1], and rises from 0 on [0, l]: p <= 1.
#   3. Repeat with (1-e)/(1+e) as the new l. From l = 0.003 these are 0.0125, 0.0515, 0.203, 0.638, 0.985.
#   4. The allowance tau = 0.02 is for rounding: at 1 these polynomials are steep (slope 11), and a singular value that
#      lands on 1 + 1e-6 would be thrown further out at each step. With tau even bfloat16 stays within 1.01.
# Five steps take [0.003, 1] into [0.985, 1]. tests/test_muon.py derives the table again from these four lines.
QUINTICS = (
    (4.162211142880929, -11.819187004684427, 8.420724651839146),
    (4.125812740391712, -11.528474162407102, 8.174927041191554),
    (3.9748311498067355, -10.37381061340934, 7.204584136937587),
    (3.408762476901501, -6.733872410694601, 4.228949125133077),
    (2.3145816798573553, -2.2886541246007197, 0.9671980073466953),
)
MSIGN_MAX = {torch.float64: 1 + 1e-6, torch.float32: 1 + 1e-3, torch.bfloat16: 1.01}  # sigma_max(msign(G)) for any G


def msign(G: torch.Tensor) -> torch.Tensor:
    """The orthogonal factor U V^T of G = U diag(s) V^T, approximately and never too large.

    G: (..., fan_out, fan_in), tall or wide, float64, float32 or bfloat16, any scale. Returns the same shape and dtype,
    with every singular value at most MSIGN_MAX[dtype]. Relative to the largest one, s = 0.1, 0.01, 0.001 become 0.999,
    0.987, 0.51, or less for matrices of high rank: s is measured against a bound on the largest (inverse_norm), up to
    rank^(1/8) too large. Zero gives zero, NaN or infinity gives NaN.
    """
    if G.ndim < 2 or G.dtype not in MSIGN_MAX:
        raise ValueError(f"msign needs a matrix (..., fan_out, fan_in) in float64, float32 or bfloat16, got {G.dtype} "
                         f"{tuple(G.shape)}")
    if G.numel() == 0:
        return G.clone()
    if G.ndim > 3:
        return msign(G.flatten(0, -3)).view_as(G)
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G  # (..., m, n) with m <= n
    m, n = X.shape[-2:]
    # 1. Entries into [-1, 1], so that no product below over- or underflows. (Dividing, as 1/1e-45 would be infinite.)
    largest = torch.maximum(X.amax((-2, -1), keepdim=True), -X.amin((-2, -1), keepdim=True))
    X = X / torch.where(largest == 0, torch.ones_like(largest), largest)
    if X.dtype != torch.bfloat16:
        long = 1.5  # n / m from where form 2b is faster, as measured on a CPU
    else:
        long = 4 if X.device.type == "cpu" else 8  # (a guess for GPUs, whose Cholesky is slow next to their products)
    if n < long * m:
        # 2a. Direct form, for matrices near square: largest singular value to at most 1, then the five steps. Nearer than
        #     the usual ||G||_F, which costs steps, is s_1^4 <= ||A^2||_F.
        A = X @ X.mT
        A2 = A @ A
        inverse = inverse_norm(A2)
        X = quintics(X * inverse.sqrt(), A * inverse, A2 * inverse.square())
    else:
        # 2b. Cholesky form, for matrices much longer than wide: A = L L^T, so L^-1 X has orthonormal rows, and with
        #     X = L (L^-1 X) it is msign(X) = msign(L) L^-1 X: all steps on the small square L, the long X touched twice.
        #     A loses half the digits: an eigenvalue that rounding makes too small would be amplified too much. So it is
        #     lifted by an allowance: at eigenvalue t >= s^2 the result is s p(sqrt(t)) / sqrt(t) <= p(sqrt(t)) <= 1.
        #     A and the quotient by L need many digits, the steps on L no more than G has.
        wide = X if X.dtype == torch.float64 else X.float()
        A = symmetric_square(wide)
        A2 = A @ A
        inverse = inverse_norm(A2)
        A = A * inverse
        A.diagonal(dim1=-2, dim2=-1).add_(2e-6 if wide.dtype == torch.float32 else 1e-13)  # (A2 without: 4e-6 off at most)
        L = torch.linalg.cholesky_ex(A).L  # (does not raise: NaN stays NaN)
        S = quintics(L.to(X.dtype), A.to(X.dtype), (A2 * inverse.square()).to(X.dtype))
        R = torch.linalg.solve_triangular(L, S.to(wide.dtype), upper=False, left=False) * inverse.sqrt()
        if X.dtype == torch.bfloat16:  # R in two parts of 8 bits each
            R = torch.cat([R.bfloat16(), (R - R.bfloat16()).bfloat16()], -1)
            X = torch.cat([X.mT, X.mT], -1).mT if tall else torch.cat([X, X], -2)
        X = (X.mT @ R.mT).mT if tall else R @ X  # (R X, laid out in memory as G is)
    return X.mT if tall else X


def quintics(X, A, A2):
    """The five steps on X (..., m, n): X <- a X + (b A + c A^2) X. The first A = X X^T and its square are known."""
    def product(C, beta, A, B, alpha=1.0):  # beta C + alpha A B
        return (torch.addmm if X.ndim == 2 else torch.baddbmm)(C, A, B, beta=beta, alpha=alpha)

    a, b, c = QUINTICS[0]
    X = product(X, a, torch.add(b * A, A2, alpha=c), X)
    for a, b, c in QUINTICS[1:]:
        A = X @ X.mT
        X = product(X, a, product(A, b, A, A, c), X)
    return X


def inverse_norm(A2):
    """1 / sqrt(||A^2||_F), at most 1 / the largest eigenvalue of A: shape (..., 1, 1); 1 for zero."""
    bound = torch.linalg.matrix_norm(A2.float() if A2.dtype == torch.bfloat16 else A2, keepdim=True).sqrt().to(A2.dtype)
    return torch.where(bound == 0, torch.ones_like(bound), bound).reciprocal()


def symmetric_square(X):
    """X X^T, with the upper right quarter copied from the lower left."""
    h = X.shape[-2] // 2
    A = X.new_empty(*X.shape[:-1], X.shape[-2])
    A[..., :h, :h] = X[..., :h, :] @ X[..., :h, :].mT
    A[..., h:, :] = X[..., h:, :] @ X.mT
    A[..., :h, h:] = A[..., h:, :h].mT
    return A


def has_fast_bfloat16(device) -> bool:
    """Whether matrix products in bfloat16 are native there, so 2-3 times (GPU: 8 times) as fast as in float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device(device).type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


# ======================================================================================================================
# Muon
# ======================================================================================================================
class Muon(torch.optim.Optimizer):
    """Muon for matrices, with an optional constraint applied to each matrix right after its update.

    lr            RMS->RMS norm of an update
    momentum      M <- momentum * M + (1 - momentum) * gradient (msign does not see the scale; this keeps M readable)
    nesterov      use momentum * M + (1 - momentum) * gradient in place of M
    weight_decay  W <- (1 - lr * weight_decay) W before the update
    constraint    a map constraint(W, w_max, step_norm) from constraints.py or of your own, or None
    w_max         the RMS->RMS limit the constraint enforces (a number, needed if there is a constraint). The weights have
                  to start within it, and to be float32 or float64: in bfloat16, rounding lets them drift past it
    dtype         precision of msign, None for that of the parameters. bfloat16 takes a half of float32's time or less
                  where it is native, and a step is then of norm at most 1.01 lr, which is what the constraint is told
    every         how many steps a constraint may wait, at most 64. 1: it is applied after each step. More: only when it has
                  to be for the limit to hold after every step (see _constrain). This takes a constraint that brings
                  anything of norm up to w_max + step_norm to at most w_max and says so: constraint.can_wait = True;
                  others are applied after each step. Who writes to weights through .data, where nobody can see it,
                  has to say so by optimizer.state[W].pop("reach", None)

    All can be set per parameter group. Parameters are matrices (fan_out, fan_in); stacks (..., fan_out, fan_in) are
    taken as independent matrices. Those of one shape in a group are handled as one batch.
    """

    def __init__(self, params, lr=0.1, momentum=0.95, nesterov=True, weight_decay=0.0, constraint=None, w_max=None,
                 dtype=None, every=1):
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
                                      constraint=constraint, w_max=w_max, dtype=dtype, every=every))
        self.versions = {}  # of each parameter after its last step: whether anyone has written to it since

    def __setstate__(self, state):  # (after loading or copying)
        super().__setstate__(state)
        self.versions = {}
        for group in self.param_groups:
            group.setdefault("every", 1)  # (a checkpoint from before there was such a thing)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.ndim < 2:
                raise ValueError(f"Muon orthogonalises matrices (fan_out, fan_in) and got a parameter of shape "
                                 f"{tuple(p.shape)}; give biases and gains to another optimizer, e.g. torch.optim.Adam")
        for name, ok in (("lr", group["lr"] >= 0), ("momentum", 0 <= group["momentum"] < 1),
                         ("weight_decay", group["weight_decay"] >= 0)):
            if not ok:
                raise ValueError(f"Muon: {name} is {group[name]}, must be >= 0" + " and < 1" * (name == "momentum"))
        if not 1 <= group["every"] <= 64:
            raise ValueError(f"Muon: every is {group['every']}, must be from 1 to 64")
        if group["constraint"] is not None and not (group["w_max"] is not None and group["w_max"] > 0):
            raise ValueError(f"Muon: a constraint needs w_max > 0, got {group['w_max']}")

    def state_dict(self):
        """As of any optimizer, without the constraints: a checkpoint holds tensors and numbers, never code."""
        self._forget_what_was_written_to()
        state = super().state_dict()
        for group in state["param_groups"]:
            del group["constraint"]
        return state

    def load_state_dict(self, state_dict):
        """The groups keep the constraints they were made with."""
        constraints = [group["constraint"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, constraint in zip(self.param_groups, constraints):
            group["constraint"] = constraint

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._forget_what_was_written_to()
        for group in self.param_groups:
            batches = {}
            for p in group["params"]:
                if p.grad is not None:
                    batches.setdefault((p.shape, p.dtype, p.device), []).append(p)
            for batch in batches.values():
                self._update(batch, group)
        self.versions = {p: p._version for group in self.param_groups for p in group["params"]}
        return loss

    def _forget_what_was_written_to(self):
        """Of weights that someone else has changed since our last step, the norm is not known."""
        for p, version in self.versions.items():
            if version != p._version and p in self.state:
                self.state[p].pop("reach", None)

    @staticmethod
    def _norm(p):
        """RMS->RMS norm of p (the largest, of a stack), where nothing is known of it yet; NaN if it is not finite.

        By the eigenvalues of the Gram matrix in float64: an SVD in float32 may fail where all singular values agree, as
        those of an orthogonal start do (seen in torch 2.13).
        """
        X = p.detach().cpu().double()
        A = X @ X.mT if X.shape[-2] <= X.shape[-1] else X.mT @ X
        if not A.isfinite().all():
            return float("nan")
        return (torch.linalg.eigvalsh(A).max().clamp(min=0) * p.shape[-1] / p.shape[-2]).sqrt().item()

    def _start(self, p, group):
        """Constraints are told how far a step can lead from the limit, so the first one has to begin within it."""
        if group["constraint"] is not None:
            norm, w_max = self._norm(p), group["w_max"]
            if norm > w_max * (1 + 1e-3):
                raise ValueError(f"Muon: a {tuple(p.shape)} parameter starts at RMS->RMS norm {norm:.4g}, above its w_max of "
                                 f"{w_max:g}; bring it there first: p.data = constraints.hard_cap(p.data, {w_max:g})")
            self.state[p]["reach"] = max(min(norm * (1 + 1e-5), w_max), norm * (1 - 1e-5))  # (w_max if it is near that)
        self.state[p]["momentum"] = torch.zeros_like(p)

    def _update(self, batch, group):
        """One step for matrices of one shape: momentum, orthogonal factor, update, constraint."""
        lr, momentum = group["lr"], group["momentum"]
        updates = []
        for p in batch:
            state = self.state[p]
            if not state:
                self._start(p, group)
            M = state["momentum"].lerp_(p.grad, 1 - momentum)
            updates.append((torch.lerp(p.grad, M, momentum) if group["nesterov"] else M).to(group["dtype"] or M.dtype))
        update = msign(updates[0] if len(batch) == 1 else torch.stack(updates))
        fan_out, fan_in = batch[0].shape[-2:]
        size = lr * (fan_out / fan_in) ** 0.5
        for p, U in zip(batch, [update] if len(batch) == 1 else update):
            if group["weight_decay"]:
                p.mul_(1 - lr * group["weight_decay"])
            p.add_(U, alpha=-size)
        if group["constraint"] is not None:
            self._constrain(batch, group, lr * MSIGN_MAX[update.dtype])
        for p in batch:
            if not self._waits(group):
                self.state[p].pop("reach", None)

    @staticmethod
    def _waits(group):
        return group["every"] > 1 and getattr(group["constraint"], "can_wait", False)

    def _constrain(self, batch, group, step):
        """Keep matrices of one shape within w_max after an update of norm at most `step`.

        A constraint costs a few products, and most of the time it need not be applied for the limit to hold:
          1. Let r ("reach") be a number that the norm of W does not exceed. An update takes it to |1 - lr weight_decay| r
             + step. Where it is not known (another constraint before, weights written from outside) it is measured.
          2. While r <= w_max the limit holds, and there is nothing to do.
          3. When r > w_max, the constraint takes W to a target so far below w_max that the next every - 1 steps cannot pass
             it, target = w_max - (every - 1) step, but not below 15/16 w_max. Then r = target.
        r was at most w_max before the update, so it is w_max + step - target that the constraint has to take back, or
        more after a change from outside. (The same for matrices that are due together, so it matters not which are.)
        """
        w_max, target, due, most = group["w_max"], group["w_max"], batch, group["w_max"] + step
        if self._waits(group):
            for p in batch:
                state = self.state[p]
                state["reach"] = (abs(1 - group["lr"] * group["weight_decay"]) * state["reach"] + step if "reach" in state
                                  else self._norm(p) * (1 + 1e-5))
            due = [p for p in batch if not self.state[p]["reach"] <= w_max]
            if not due:
                return
            most = max(most, *(self.state[p]["reach"] for p in due))
            target = w_max - min(group["every"] - 1, w_max // (16 * step) if step else 0) * step
        W = group["constraint"](due[0] if len(due) == 1 else torch.stack(due), target, most - target)
        for p, new in zip(due, [W] if len(due) == 1 else W):
            p.copy_(new)
            self.state[p]["reach"] = target
