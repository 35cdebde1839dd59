"""Matrices with known singular values, for tests: made in float64, kept as the dtype asked for."""

import math

import torch

SHAPES = [(8, 8), (24, 40), (40, 24), (64, 256), (256, 64), (1, 30), (30, 1), (96, 96)]


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def hadamard(m):
    """Of m rows, m a power of 2: orthogonal rows of entries 1 and -1."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < m:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def with_spectrum(m, n, s, seed=0, dtype=torch.float32):
    """U diag(s) V^T (m, n) with random orthonormal U, V; s has min(m, n) entries."""
    generator = torch.Generator().manual_seed(seed)
    r = min(m, n)
    U = torch.linalg.qr(torch.randn(m, r, dtype=torch.float64, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64, generator=generator))[0]
    return ((U * s) @ V.T).to(dtype)


def spectra(r):
    """{name: r singular values, the largest 1}: the kinds that break things."""
    generator = torch.Generator().manual_seed(1)
    ones = torch.ones(r, dtype=torch.float64)
    first = torch.zeros(r, dtype=torch.float64)
    first[0] = 1
    noise = torch.rand(r, dtype=torch.float64, generator=generator)
    return {
        "flat": ones,
        "random": torch.linspace(1, 1 / r, r, dtype=torch.float64),
        "ill-conditioned 1e-3": torch.logspace(0, -3, r, dtype=torch.float64),
        "ill-conditioned 1e-7": torch.logspace(0, -7, r, dtype=torch.float64),
        "clustered": 1 - 1e-4 * noise * (1 - first),
        "two clusters": torch.cat([ones[: (r + 1) // 2], 0.01 * ones[: r // 2]]),
        "one huge value": 1e-3 * ones + (1 - 1e-3) * first,
        "one very huge value": 1e-6 * ones + (1 - 1e-6) * first,
        "rank 1": first,
        "rank deficient": torch.cat([ones[: (r + 1) // 2], 0 * ones[: r // 2]]),
    }


def singular_values(W):
    return torch.linalg.svdvals(W.double())


def sigma_limit(W, w_max):
    return w_max * math.sqrt(W.shape[-2] / W.shape[-1])
