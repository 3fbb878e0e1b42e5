"""What a memory computes: the recurrences, each written twice. No parameters live here (those are in model.py).

For every mechanism there is a loop, which is the paper's equation token by token and serves as the oracle, and a
chunked form, which computes the same numbers with matrix products and a short loop over chunks. The two that keep a
matrix as their state are there a third time, as Triton kernels, forward and backward.

    python memories.py     checks the kernels against the loops and reports on them: times on a GPU; without one, values
                           from Triton's interpreter and what the compiler says for sm_80 and sm_90

Reading order
    leaky_average      Memory Mosaics' key smoothing       y_t = x_t + λ y_{t-1}
    gated_delta_rule   Gated DeltaNet's fast weights       S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ
    ttt_linear         TTT-Linear's inner gradient descent W_t = W_0 - s_t Σ η_j k_jᵀ g_j

Glossary (name here = symbol in the paper)
    B, T, H, D         batch, time, heads, head dimension; Dk, Dv where keys and values differ
    g      = log α     log of the forget gate, <= 0          G = cumulative sum of g inside a chunk, γ = exp(G)
    beta   = β         writing strength, in [0, 1]
    lr     = η         inner learning rate of a token        token_scale = s, one factor per position in the mini-batch
    decay  = λ         leak of the key average
    state              all that is remembered of the past; float32 at least, whatever the inputs' dtype
    impl               "loop", "chunk", "triton", or "auto": triton for CUDA tensors of a supported shape, else chunk

Every function continues from a state exactly: f(x) == f(x[:, :t]) ++ f(x[:, t:], state). Time is axis 1 throughout.

References
    Gated DeltaNet: Yang, Kautz, Hatamizadeh 2025 (arXiv 2412.06464); the chunked form: Yang et al. 2024 (2406.06484)
    TTT-Linear: Sun et al. 2024 (2407.04620)           Memory Mosaics: Zhang et al. 2024 (2405.06394)
"""
import inspect
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton
    import triton.language as tl
except ImportError:                                                 # without it everything but the kernels works
    triton = None
    class tl: constexpr = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"                # kernels then run on CPU tensors, slowly

# The tuned choices (block sizes, warps, pipeline stages), for the first measurement on a device to correct. Made from
# bytes, programs in flight and the compiler's report, for the shapes B8 T4096 H6 D128 and B16 T2048 H12 D64. Products
# with 64 rows and 4 warps or more become wgmma on Hopper; the kernels keep wgmma's left factor in shared memory, as the
# ptxas that comes with triton 3.6 has miscompiled left factors in registers.
TUNING = {
    "delta_prep": dict(BD=32, num_warps=1, num_stages=1),
    "delta_walk": dict(BV=32, num_warps=4, num_stages=3),           # B·H·Dv/BV programs: what an H200 has room for
    "delta_grads": dict(BK=16, num_warps=4, num_stages=1),
    "ttt_output": dict(num_warps=4, num_stages=1),
    "ttt_grads": dict(BD=16, num_warps=4, num_stages=1),
    ("ttt_walk", 32): dict(num_warps=2, num_stages=2),              # W (D, D) in registers: at most 64 a thread
    ("ttt_walk", 64): dict(num_warps=4, num_stages=2),
    ("ttt_walk", 128): dict(num_warps=8, num_stages=2),
}

DELTA_CHUNK = 64  # C of the chunked delta rule: work grows as T·C·D, the sequential part as T/C
LEAKY_CHUNK = 64
LN_EPS = 1e-6     # TTT's inner LayerNorm (biased variance)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States and gates are kept in float32, or in float64 when the inputs are (the tests' exact arithmetic)."""
    return torch.promote_types(dtype, torch.float32)


def check_impl(name: str, impl: str, choices: tuple) -> None:
    if impl not in choices:
        raise ValueError(f"{name}: impl={impl!r} was given, expected one of {', '.join(choices)}; use 'auto'")


# ----------------------------------------------------------------------------------------------------------------------
# What the kernels share. Prefixes in them: i_ index, o_ offsets, m_ mask, p_ position in a tensor, b_ block

def kernel(fn):
    return fn if triton is None else triton.jit(fn, do_not_specialize=["n"])             # a loop of one round is a loop


def launch_options(fn, grid: tuple, args: tuple, key, largest: int = 0) -> tuple:
    """A kernel's launch with its row of TUNING; no block is wider than `largest`. float32 is there to be exact, not fast:
    its products take three tf32 passes, or none where these would not fit into shared memory."""
    options = {name: min(x, largest) if name in ("BV", "BK", "BD") else x for name, x in TUNING[key].items()}
    exact = "ieee" if "grads" in key else "tf32x3"
    return fn, grid, args, options | {"PREC": exact if args[0].dtype == torch.float32 else "tf32"}


def launch(*launch_args) -> None:
    if not isinstance(launch_args[2][0], FakeTensor):               # torch.compile's: it only wants the shapes
        fn, grid, args, options = launch_options(*launch_args)
        with torch.cuda.device_of(args[0]):
            fn[grid](*args, **options)


def operator(run, outputs: int):
    """`run` as one operator that torch.compile leaves alone without a graph break; fake tensors get their shapes by it."""
    kinds = {"scale": "float", "save": "bool"}
    inputs = ", ".join(f"{kinds.get(name, 'Tensor')} {name}" for name in inspect.signature(run).parameters)
    schema = f"({inputs}) -> ({', '.join(['Tensor'] * outputs)})"
    op = torch.library.custom_op(f"nanomem::{run.__name__.strip('_')}", run, mutates_args=(), schema=schema)
    op.register_fake(run)
    return op


def use_triton(name: str, impl: str, x: Tensor, supported: bool, expected: str) -> bool:
    if impl == "auto":
        return triton is not None and x.is_cuda and supported
    if impl != "triton":
        return False
    if triton is None:
        raise ValueError(f"{name}: impl='triton' needs the package triton, which is not installed; use impl='chunk'")
    if not (x.is_cuda or INTERPRET):
        raise ValueError(f"{name}: impl='triton' was given {x.device} tensors, expected cuda; use impl='chunk', or set "
                         f"TRITON_INTERPRET=1 to test the kernels without a GPU")
    if not supported:
        raise ValueError(f"{name}: impl='triton' was given {tuple(x.shape)} {x.dtype}, "
                         f"expected {expected}; use impl='chunk'")
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Leaky average (Memory Mosaics, eq. 7)

def leaky_average(x: Tensor, decay: Tensor, state: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """y_t = x_t + λ y_{t-1}, one λ per head.

    x (B,T,H,D), decay (H,) in [0, 1), state (B,H,D) = y of the token before x. Returns y (B,T,H,D) in x's dtype and
    the new state. Memory is linear in T: no T×T matrix is ever built. There is no Triton kernel: one
    batched 64×64 product a chunk reads x and writes y once, which is nearly all that a kernel would have to move.
    """
    check_impl("leaky_average", impl, ("auto", "loop", "chunk"))
    B, T, H, D = x.shape
    dtype = state_dtype(x.dtype)
    xf, decay = x.to(dtype), decay.to(dtype)
    if state is None:
        state = xf.new_zeros(B, H, D)
    if T == 0:
        return x, state
    form = _leaky_loop if impl == "loop" or T == 1 else _leaky_chunk
    y = form(xf, decay, state.to(dtype))
    return y.to(x.dtype), y[:, -1]


def _leaky_loop(x, decay, state):
    ys = []
    for x_t in x.unbind(1):                                         # (B,H,D)
        state = x_t + decay[:, None] * state
        ys.append(state)
    return torch.stack(ys, 1)


def _leaky_chunk(x, decay, state):
    """Inside a chunk y = L x with L_ij = λ^(i-j), i >= j. The chunks' last values obey the same recurrence with decay
    λ^C, so the function calls itself on them: log_C(T) levels, each a batched C×C product."""
    B, T, H, D = x.shape
    C = min(LEAKY_CHUNK, T)
    i = torch.arange(C, device=x.device)
    L = torch.pow(decay[:, None, None], (i[:, None] - i).clamp(min=0)).tril()           # (H,C,C)
    x = F.pad(x, (0, 0, 0, 0, 0, -T % C)).view(B, -1, C, H, D)                          # (B,n,C,H,D)
    y = torch.einsum("hij,bnjhd->bnihd", L, x)
    ends = y[:, :-1, -1]                                                                # (B,n-1,H,D)
    carry = state[:, None]                                                              # y just before each chunk
    if ends.size(1):
        ends = _leaky_chunk(ends, decay ** C, state)
        carry = torch.cat([carry, ends], 1)                                             # (B,n,H,D)
    reach = torch.pow(decay[None, :], i[:, None] + 1)                                   # (C,H): λ^(i+1)
    y = y + reach[:, :, None] * carry[:, :, None]
    return y.reshape(B, -1, H, D)[:, :T]


# ----------------------------------------------------------------------------------------------------------------------
# Gated delta rule (Gated DeltaNet)

def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None,
                     scale: float | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,   o_t = S_tᵀ q_t · scale   (Yang et al. 2025, eq. 10).

    q, k (B,T,H,Dk), v (B,T,H,Dv), g = log α (B,T,H) <= 0, beta (B,T,H) in [0, 1], state (B,H,Dk,Dv); scale defaults
    to Dk^-1/2. The keys should have unit length, otherwise I - β k kᵀ can expand. Returns o (B,T,H,Dv) in v's dtype
    and the new state in float32 (float64 for float64 inputs).
    """
    check_impl("gated_delta_rule", impl, ("auto", "loop", "chunk", "triton"))
    B, T, H, Dk = k.shape
    dtype = state_dtype(v.dtype)
    scale = Dk ** -0.5 if scale is None else scale
    state = v.new_zeros(B, H, Dk, v.size(-1), dtype=dtype) if state is None else state.to(dtype)
    if T == 0:
        return v, state
    if impl == "auto" and T == 1:
        impl = "loop"                                               # generation does not pay for a chunk
    supported = v.dtype in KERNEL_DTYPES and Dk in (16, 32, 64, 128) and v.size(-1) in (Dk, 2 * Dk)
    if use_triton("gated_delta_rule", impl, v, supported, "float32 or 16-bit, Dk 16, 32, 64 or 128, Dv = Dk or 2 Dk"):
        return _delta_triton(q, k, v, g, beta, state, scale)
    form = _delta_loop if impl == "loop" else _delta_chunk
    o, state = form(q.to(dtype) * scale, k.to(dtype), v.to(dtype), g.to(dtype), beta.to(dtype), state)
    return o.to(v.dtype), state


def _delta_loop(q, k, v, g, beta, S):
    os = []
    for t in range(q.size(1)):
        k_t = k[:, t, :, :, None]                                   # (B,H,Dk,1)
        S = g[:, t, :, None, None].exp() * S                        # forget: α S
        read = (k_t * S).sum(-2)                                    # (B,H,Dv): what S says about k_t
        write = beta[:, t, :, None] * (v[:, t] - read)              # correct it towards v_t
        S = S + k_t * write[:, :, None]
        os.append((q[:, t, :, :, None] * S).sum(-2))                # (B,H,Dv)
    return torch.stack(os, 1), S


def _delta_chunk(q, k, v, g, beta, S):
    """The WY form: inside a chunk the writes v' solve a unit lower triangular system, after which everything is matrix
    products; only the state's walk from chunk to chunk is sequential. Γ_ij = γ_i/γ_j for i >= j, never above 1."""
    B, T, H, Dk = k.shape
    C = min(DELTA_CHUNK, T)

    def chunks(x):                                                  # (B,T,H,...) -> (B,H,n,C,...); padding writes nothing
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -T % C))
        return x.view(B, -1, C, *x.shape[2:]).movedim(3, 1)

    q, k, v, g, beta = map(chunks, (q, k, v, g, beta))
    G = g.cumsum(-1)                                                # (B,H,n,C)
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    # log Γ_ij = Σ_{j<l<=i} g_l is summed per pair: as a difference G_i - G_j it would cancel where decay is strong. Only
    # i >= j is formed, masked before exp: γ itself may underflow, its inverse would overflow.
    between = g[..., None, :].expand(*g.shape, C).triu(1).cumsum(-1).mT
    Gamma = between.masked_fill(~causal, float("-inf")).exp()
    gamma, to_end = G.exp()[..., None], (G[..., -1:] - G).exp()[..., None]              # γ_i and γ_C/γ_i  (B,H,n,C,1)
    beta = beta[..., None]

    A = (beta * (k @ k.mT) * Gamma).tril(-1)                        # (B,H,n,C,C), strictly lower
    UW = torch.linalg.solve_triangular(A, torch.cat([beta * v, beta * gamma * k], -1), upper=False, unitriangular=True)
    U, W = UW.split([v.size(-1), Dk], -1)                           # T diag(β) V and T diag(βγ) K, T = (I + A)^-1
    K_end = (to_end * k).mT                                         # (B,H,n,Dk,C)
    starts, writes = [], []
    for U_n, W_n, K_n, decay in zip(U.unbind(2), W.unbind(2), K_end.unbind(2), gamma[..., -1:, :].unbind(2)):
        starts.append(S)
        writes.append(U_n - W_n @ S)                                # V' (B,H,C,Dv)
        S = decay * S + K_n @ writes[-1]
    S_start, V = torch.stack(starts, 2), torch.stack(writes, 2)
    o = (gamma * q) @ S_start + ((q @ k.mT) * Gamma) @ V            # (B,H,n,C,Dv)
    return o.movedim(1, 3).reshape(B, -1, H, V.size(-1))[:, :T], S


# ----------------------------------------------------------------------------------------------------------------------
# Gated delta rule in Triton
#
# Three steps make the chunked form above cheap. (1) Y = (I + tril(K Kᵀ, -1) diag(β))^-1 has no gates and no division by
# β: with E_i = v_i - (what the state says about k_i), R = V - γ K S and all gates in the ratios Γ,
#
#     E = (Y ⊙ Γ) R       V' = β E       O = scale γ Q S + (P ⊙ Γ) V'       S <- γ_C S + (γ_C/γ K)ᵀ V'
#
# with P = scale tril(Q Kᵀ). (2) Y ⊙ Γ and P ⊙ Γ know nothing of S, so a kernel parallel over chunks makes them. (3) What
# is left to the walk along T is three dependent products a chunk, and the columns of S never meet: every program takes
# BV of them. It holds Sᵀ (BV, DK): with BV = 32 rows Triton uses mma.sync, and the warps share the columns.
#
# Backward. With dO given and dS the gradient of the state after the chunk, the walk in reverse is
#
#     dV' = (P ⊙ Γ)ᵀ dO + γ_C/γ K dS       dV = dR = (Y ⊙ Γ)ᵀ β dV'       dS <- γ_C dS + scale (γ Q)ᵀ dO - (γ K)ᵀ dR
#
# and everything else is parallel over chunks again, from E, dV, S and dS, without v or Y. See _delta_grads.

@kernel
def _delta_prep(q, k, g, beta, G, Y, P, T, scale, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
    """G = cumsum(g)      Y = (I + L)^-1, L = tril(K Kᵀ, -1) diag(β), stored as Y ⊙ Γ      P = scale tril(Q Kᵀ) ⊙ Γ

    One program a chunk of 32 and head. In registers: the 32×32 products, summed over BD columns of q and k at a time.
    Reads q, k, g, β once, writes G and two triangles. The two 16×16 blocks on the diagonal are inverted by forward
    substitution, both at once, and merged by products; a power series of L would overflow where keys are alike."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, i_b, i_h = tl.num_programs(0), i_bh // H, i_bh % H
    q, k = q + (i_b * T * H + i_h) * D, k + (i_b * T * H + i_h) * D
    o_c = tl.arange(0, 32)
    o_t = i_n * 32 + o_c
    m_t = o_t < T                                                   # beyond T: zeros, which write and forget nothing
    b_L, b_P = tl.zeros([32, 32], tl.float32), tl.zeros([32, 32], tl.float32)
    for i_d in range(D // BD):
        p = o_t[:, None] * (H * D) + i_d * BD + tl.arange(0, BD)[None, :]
        b_q = tl.load(q + p, mask=m_t[:, None], other=0.0)
        b_k = tl.load(k + p, mask=m_t[:, None], other=0.0)
        b_L = tl.dot(b_k, tl.trans(b_k), b_L, input_precision=PREC)
        b_P = tl.dot(b_q, tl.trans(b_k), b_P, input_precision=PREC)
    b_beta = tl.load(beta + i_b * T * H + i_h + o_t * H, mask=m_t, other=0.0)
    b_G = tl.cumsum(tl.load(g + i_b * T * H + i_h + o_t * H, mask=m_t, other=0.0), 0)

    m_block = (o_c[:, None] // 16) == (o_c[None, :] // 16)
    b_U = tl.where(m_block & (o_c[:, None] < o_c[None, :]), b_L * b_beta[:, None], 0.0)   # Lᵀ: K Kᵀ is symmetric
    b_D = tl.where(o_c[:, None] == o_c[None, :], 1.0, 0.0)
    for i in range(1, 16):                                          # row_i = e_i - Σ_{j<i} L_ij row_j
        b_col = tl.sum(tl.where((o_c % 16 == i)[None, :], b_U, 0.0), 1)                 # L_ij, j along the rows
        b_row = tl.sum(b_col[:, None] * b_D, 0)
        b_D = tl.where(m_block & (o_c % 16 == i)[:, None], b_D - b_row[None, :], b_D)
    b_L = tl.where(m_block, 0.0, tl.where(o_c[:, None] > o_c[None, :], b_L * b_beta[None, :], 0.0))
    b_Y = tl.dot(b_L, b_D, input_precision="tf32x3")                # float32 in three tf32 products
    b_Y = b_D - tl.dot(b_D, b_Y, input_precision="tf32x3")          # (D^-1 + L)^-1 = D - D L D, as L D L = 0

    # Γ is formed from differences of G that are <= 0 wherever i >= j: γ may underflow, 1/γ would overflow.
    b_ratio = tl.exp(tl.where(o_c[:, None] >= o_c[None, :], b_G[:, None] - b_G[None, :], float("-inf")))
    p_C = (i_bh * n + i_n) * 1024 + o_c[:, None] * 32 + o_c[None, :]
    tl.store(G + (i_bh * n + i_n) * 32 + o_c, b_G)
    tl.store(Y + p_C, (b_Y * b_ratio).to(Y.dtype.element_ty))
    tl.store(P + p_C, (b_P * (b_ratio * scale)).to(P.dtype.element_ty))


@kernel
def _delta_forward(q, k, v, beta, G, Y, P, S0, o, E, S_chunk, S_end, T, n, scale, H: tl.constexpr, DK: tl.constexpr,
                   DV: tl.constexpr, SAVE: tl.constexpr, BV: tl.constexpr, PREC: tl.constexpr):
    """R = V - γ K S      E = Y R      O = scale γ Q S + P (β E)      S <- γ_C S + (γ_C/γ K)ᵀ (β E)      (Y, P gated)

    One program a head and BV columns of V; it walks the chunks. In registers: Sᵀ (BV, DK) in float32. Reads q, k, v, Y,
    P, writes o; for the backward also E and the state at each chunk's start. Programs: B·H·DV/BV, all that there is to
    run at once, which is why nothing is done here that does not need S. The slices of one head read the same q, k, Y,
    P, from L2. Chunks of 32 and not 64: Y, P and their products halve, and what is kept of S is every second state."""
    i_v, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    q, k = q + (i_b * T * H + i_h) * DK, k + (i_b * T * H + i_h) * DK
    v, o, E = v + (i_b * T * H + i_h) * DV, o + (i_b * T * H + i_h) * DV, E + (i_b * T * H + i_h) * DV
    beta, G = beta + i_b * T * H + i_h, G + i_bh * n * 32
    Y, P = Y + i_bh * n * 1024, P + i_bh * n * 1024
    o_c, o_k, o_v = tl.arange(0, 32), tl.arange(0, DK), i_v * BV + tl.arange(0, BV)
    p_C = o_c[:, None] * 32 + o_c[None, :]
    p_S = i_bh * DK * DV + o_v[:, None] + o_k[None, :] * DV         # (BV, DK): Sᵀ
    b_S = tl.load(S0 + p_S)
    for i_n in range(n):
        o_t = i_n * 32 + o_c
        m_t = o_t < T
        p_k = o_t[:, None] * (H * DK) + o_k[None, :]
        p_v = o_v[:, None] + o_t[None, :] * (H * DV)                # (BV, 32): Vᵀ
        b_k = tl.load(k + p_k, mask=m_t[:, None], other=0.0)
        b_q = tl.load(q + p_k, mask=m_t[:, None], other=0.0)
        b_v = tl.load(v + p_v, mask=m_t[None, :], other=0.0)
        b_Y = tl.load(Y + i_n * 1024 + p_C)
        b_P = tl.load(P + i_n * 1024 + p_C)
        b_beta = tl.load(beta + o_t * H, mask=m_t, other=0.0)
        b_G, b_GC = tl.load(G + i_n * 32 + o_c), tl.load(G + i_n * 32 + 31)
        b_s = b_S.to(b_k.dtype)
        if SAVE and i_n % 2 == 0:
            tl.store(S_chunk + (i_bh * n + i_n) // 2 * (DK * DV) + o_v[:, None] * DK + o_k[None, :], b_s)
        b_o = tl.dot(b_s, tl.trans(b_q), input_precision=PREC) * (tl.exp(b_G) * scale)[None, :]
        b_R = b_v - tl.dot(b_s, tl.trans(b_k), input_precision=PREC) * tl.exp(b_G)[None, :]
        b_E = tl.dot(b_R.to(b_k.dtype), tl.trans(b_Y), input_precision=PREC)
        if SAVE:
            tl.store(E + p_v, b_E.to(b_k.dtype), mask=m_t[None, :])
        b_V = b_E * b_beta[None, :]                                 # what is written: V'
        b_o = tl.dot(b_V.to(b_k.dtype), tl.trans(b_P), b_o, input_precision=PREC)
        tl.store(o + p_v, b_o.to(b_k.dtype), mask=m_t[None, :])
        b_V = (b_V * tl.exp(b_GC - b_G)[None, :]).to(b_k.dtype)
        b_S = tl.dot(b_V, b_k, b_S * tl.exp(b_GC), input_precision=PREC)
    tl.store(S_end + p_S, b_S)


@kernel
def _delta_backward(q, k, do, beta, G, Y, P, dS_end, dv, dS_chunk, dS0, T, n, scale, H: tl.constexpr, DK: tl.constexpr,
                    DV: tl.constexpr, BV: tl.constexpr, PREC: tl.constexpr):
    """dV' = Pᵀ dO + γ_C/γ K dS      dV = Yᵀ (β dV')      dS <- γ_C dS + scale (γ Q)ᵀ dO - (γ K)ᵀ dV      (Y, P gated)

    The forward walk in reverse, cut the same way. In registers: dSᵀ (BV, DK). Reads q, k, do, Y, P, writes dv and
    the gradient of the state at each chunk's end. It needs no activation of the forward pass but Y and P."""
    i_v, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    q, k = q + (i_b * T * H + i_h) * DK, k + (i_b * T * H + i_h) * DK
    do, dv = do + (i_b * T * H + i_h) * DV, dv + (i_b * T * H + i_h) * DV
    beta, G = beta + i_b * T * H + i_h, G + i_bh * n * 32
    Y, P = Y + i_bh * n * 1024, P + i_bh * n * 1024
    o_c, o_k, o_v = tl.arange(0, 32), tl.arange(0, DK), i_v * BV + tl.arange(0, BV)
    p_C = o_c[:, None] * 32 + o_c[None, :]
    p_S = i_bh * DK * DV + o_v[:, None] + o_k[None, :] * DV
    b_dS = tl.load(dS_end + p_S)
    for i in range(n):
        i_n = n - 1 - i
        o_t = i_n * 32 + o_c
        m_t = o_t < T
        p_k = o_t[:, None] * (H * DK) + o_k[None, :]
        p_v = o_v[:, None] + o_t[None, :] * (H * DV)
        b_k = tl.load(k + p_k, mask=m_t[:, None], other=0.0)
        b_q = tl.load(q + p_k, mask=m_t[:, None], other=0.0)
        b_do = tl.load(do + p_v, mask=m_t[None, :], other=0.0)
        b_Y = tl.load(Y + i_n * 1024 + p_C)
        b_P = tl.load(P + i_n * 1024 + p_C)
        b_beta = tl.load(beta + o_t * H, mask=m_t, other=0.0)
        b_G, b_GC = tl.load(G + i_n * 32 + o_c), tl.load(G + i_n * 32 + 31)
        b_ds = b_dS.to(b_k.dtype)
        if i_n % 2 == 1:
            tl.store(dS_chunk + (i_bh * n + i_n) // 2 * (DK * DV) + o_v[:, None] * DK + o_k[None, :], b_ds)
        b_dV = tl.dot(b_ds, tl.trans(b_k), input_precision=PREC) * tl.exp(b_GC - b_G)[None, :]
        b_dV = tl.dot(b_do, b_P, b_dV, input_precision=PREC)
        b_dR = tl.dot((b_dV * b_beta[None, :]).to(b_k.dtype), b_Y, input_precision=PREC)
        tl.store(dv + p_v, b_dR.to(b_k.dtype), mask=m_t[None, :])
        b_do = (b_do * (tl.exp(b_G) * scale)[None, :]).to(b_k.dtype)
        b_dS = tl.dot(b_do, b_q, b_dS * tl.exp(b_GC), input_precision=PREC)
        b_dS = tl.dot((b_dR * -tl.exp(b_G)[None, :]).to(b_k.dtype), b_k, b_dS, input_precision=PREC)
    tl.store(dS0 + p_S, b_dS)


@kernel
def _delta_grads(q, k, g, beta, do, E, dv, S_chunk, dS_chunk, dq, dk, dg, dbeta, T, scale, H: tl.constexpr,
                 DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr):
    """A key k_i acts twice: it reads (in R and in the rows of L) and it writes (in S and in the columns of L and P).

        dP = scale tril(dO Eᵀ ⊙ Γ)                  dL = tril(dV Eᵀ ⊙ Γ, -1)
        dq = scale γ dO Sᵀ + dP (β K)               -dk_read = γ dV Sᵀ + dL (β K)
        dk_write = β x,  x = γ_C/γ E dSᵀ + dPᵀ Q - dLᵀ K        dβ_i = k_i·x_i

    Every gate stands beside a q or a k: γ_i beside q_i and a reading k_i, 1/γ_j beside a writing k_j, γ_C beside the
    new state S'. So  dG_i = q_i·dq_i + k_i·dk_read_i - k_i·dk_write_i + [i = C] ⟨S', dS⟩  and dg is its sum from the right.

    One program a chunk of 64 and head (E and dV do not depend on the chunk, so this one may be longer than the walk's).
    In registers: dP and dL, and of dqᵀ, dk_readᵀ, xᵀ BK rows at a time, as the whole would not fit. Reads q, k, dO,
    E, dV, S, dS, writes dq, dk, dg, dβ, all once."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, i_b, i_h = tl.num_programs(0), i_bh // H, i_bh % H
    o_c, o_v = tl.arange(0, 64), tl.arange(0, DV)
    o_t = i_n * 64 + o_c
    m_t = o_t < T
    q, k = q + (i_b * T * H + i_h) * DK, k + (i_b * T * H + i_h) * DK
    dq, dk = dq + (i_b * T * H + i_h) * DK, dk + (i_b * T * H + i_h) * DK
    p_v = (i_b * T * H + i_h) * DV + o_t[:, None] * (H * DV) + o_v[None, :]
    p_g = i_b * T * H + i_h + o_t * H
    S_chunk, dS_chunk = S_chunk + (i_bh * n + i_n) * (DK * DV), dS_chunk + (i_bh * n + i_n) * (DK * DV)
    b_E = tl.load(E + p_v, mask=m_t[:, None], other=0.0)
    b_do = tl.load(do + p_v, mask=m_t[:, None], other=0.0)
    b_dv = tl.load(dv + p_v, mask=m_t[:, None], other=0.0)
    b_beta = tl.load(beta + p_g, mask=m_t, other=0.0)
    b_g = tl.load(g + p_g, mask=m_t, other=0.0)
    b_G, b_GC = tl.cumsum(b_g, 0), tl.sum(b_g, 0)
    b_ratio = tl.exp(tl.where(o_c[:, None] >= o_c[None, :], b_G[:, None] - b_G[None, :], float("-inf")))
    b_dP = (tl.dot(b_do, tl.trans(b_E), input_precision=PREC) * (b_ratio * scale)).to(b_E.dtype)
    b_dL = tl.dot(b_dv, tl.trans(b_E), input_precision=PREC) * b_ratio
    b_dL = tl.where(o_c[:, None] > o_c[None, :], b_dL, 0.0).to(b_E.dtype)
    b_gamma, b_to_end = tl.exp(b_G), tl.exp(tl.minimum(b_GC - b_G, 0.0))
    b_dG, b_dbeta, b_last = tl.zeros([64], tl.float32), tl.zeros([64], tl.float32), tl.zeros([64], tl.float32)
    for i_k in range(DK // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        p_k = o_k[:, None] + o_t[None, :] * (H * DK)                # (BK, 64): Kᵀ
        p_S = o_k[:, None] + o_v[None, :] * DK                      # (BK, DV): S
        b_q = tl.load(q + p_k, mask=m_t[None, :], other=0.0)
        b_k = tl.load(k + p_k, mask=m_t[None, :], other=0.0)
        b_S, b_dS = tl.load(S_chunk + p_S), tl.load(dS_chunk + p_S)
        b_bk = (b_k * b_beta[None, :]).to(b_k.dtype)
        b_dq = tl.dot(b_S, tl.trans(b_do), input_precision=PREC) * (b_gamma * scale)[None, :]
        b_dq = tl.dot(b_bk, tl.trans(b_dP), b_dq, input_precision=PREC)
        tl.store(dq + p_k, b_dq.to(b_k.dtype), mask=m_t[None, :])
        b_read = tl.dot(b_S, tl.trans(b_dv), input_precision=PREC) * b_gamma[None, :]
        b_read = tl.dot(b_bk, tl.trans(b_dL), b_read, input_precision=PREC)
        b_x = tl.dot(b_dS, tl.trans(b_E), input_precision=PREC) * b_to_end[None, :]
        b_last += tl.sum(b_x * b_bk, 0)
        b_last += tl.where(o_c == 0, tl.exp(b_GC) * tl.sum(tl.sum(b_S.to(tl.float32) * b_dS, 1), 0), 0.0)
        b_x = tl.dot(b_q, b_dP, b_x, input_precision=PREC)
        b_x -= tl.dot(b_k, b_dL, input_precision=PREC)
        b_dbeta += tl.sum(b_x * b_k, 0)
        b_x *= b_beta[None, :]
        b_dG += tl.sum(b_q * b_dq - b_k * (b_read + b_x), 0)
        tl.store(dk + p_k, (b_x - b_read).to(b_k.dtype), mask=m_t[None, :])
    b_dG += tl.where(o_c == 63, tl.sum(b_last, 0), 0.0)
    tl.store(dg + p_g, tl.cumsum(b_dG, 0, reverse=True), mask=m_t)
    tl.store(dbeta + p_g, b_dbeta, mask=m_t)



def _delta_forward_run(q, k, v, g, beta, state, scale, save):
    B, T, H, DK, DV, n = *q.shape, v.size(-1), -(-q.size(1) // 64) * 2                  # n chunks of 32, an even number
    G, Y, P = g.new_empty(B * H * n, 32), q.new_empty(B * H * n, 32, 32), q.new_empty(B * H * n, 32, 32)
    launch(_delta_prep, (n, B * H), (q, k, g, beta, G, Y, P, T, scale, H, DK), "delta_prep", DK)
    o, S_end = torch.empty_like(v), torch.empty_like(state)
    E, S_chunk = (torch.empty_like(v), q.new_empty(B * H * n // 2, DV, DK)) if save else (q.new_empty(0), q.new_empty(0))
    launch(_delta_forward, (triton.cdiv(DV, TUNING["delta_walk"]["BV"]), B * H),
           (q, k, v, beta, G, Y, P, state, o, E, S_chunk, S_end, T, n, scale, H, DK, DV, save), "delta_walk", DV)
    return o, S_end, E, S_chunk, G, Y, P


def _delta_backward_run(q, k, g, beta, do, dS_end, E, S_chunk, G, Y, P, scale):
    B, T, H, DK, DV, n = *q.shape, do.size(-1), -(-q.size(1) // 64) * 2
    dq, dk, dg, dbeta, dv, dS0, dS_chunk = map(torch.empty_like, (q, k, g, beta, do, dS_end, S_chunk))
    launch(_delta_backward, (triton.cdiv(DV, TUNING["delta_walk"]["BV"]), B * H),
           (q, k, do, beta, G, Y, P, dS_end, dv, dS_chunk, dS0, T, n, scale, H, DK, DV), "delta_walk", DV)
    launch(_delta_grads, (n // 2, B * H),
           (q, k, g, beta, do, E, dv, S_chunk, dS_chunk, dq, dk, dg, dbeta, T, scale, H, DK, DV), "delta_grads", DK)
    return dq, dk, dv, dg, dbeta, dS0


_delta_forward_op, _delta_backward_op = operator(_delta_forward_run, 7), operator(_delta_backward_run, 6)


def _delta_save(ctx, inputs, output):
    q, k, v, g, beta, state, ctx.scale, _ = inputs
    _, _, E, S_chunk, G, Y, P = output
    ctx.save_for_backward(q, k, g, beta, E, S_chunk, G, Y, P)
    ctx.set_materialize_grads(False)                                # or zeros would be made for everything unused


def _delta_autograd(ctx, do, dS_end, *unused):
    q, k, g, beta, E, *saved = ctx.saved_tensors
    do = torch.zeros_like(E) if do is None else do.contiguous()
    (B, _, H, DK), DV = q.shape, E.size(-1)
    dS_end = g.new_zeros(B, H, DK, DV) if dS_end is None else dS_end.contiguous()
    return *_delta_backward_op(q, k, g, beta, do, dS_end, E, *saved, ctx.scale), None, None


_delta_forward_op.register_autograd(_delta_autograd, setup_context=_delta_save)


def _delta_triton(q, k, v, g, beta, S, scale):
    q, k, v, g, beta, S = (x.contiguous() for x in (q.to(v.dtype), k.to(v.dtype), v, g.float(), beta.float(), S))
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta, S))
    return _delta_forward_op(q, k, v, g, beta, S, float(scale), save)[:2]


# ----------------------------------------------------------------------------------------------------------------------
# TTT-Linear

class TTTState(NamedTuple):
    """The inner model, and the mini-batch that is still running. A new mini-batch has dW = db = 0 and pos = 0."""
    W: Tensor    # (B,H,D,D)  W_0, the weights at the mini-batch's start
    b: Tensor    # (B,H,D)    b_0
    dW: Tensor   # (B,H,D,D)  Σ_j η_j k_jᵀ g_j over the running mini-batch
    db: Tensor   # (B,H,D)    Σ_j η_j g_j
    pos: Tensor  # ()         tokens of the running mini-batch seen, 0..K-1; int64 on the CPU, so reading it waits for no GPU


def ttt_linear(q: Tensor, k: Tensor, v: Tensor, lr: Tensor, token_scale: Tensor, W: Tensor, b: Tensor, ln_weight: Tensor,
               ln_bias: Tensor, state: TTTState | None = None, impl: str = "auto") -> tuple[Tensor, TTTState]:
    """One step of gradient descent per mini-batch of K tokens on ℓ_j = ½‖f(k_j) - v_j‖², f(k) = k + LN(k W + b); every
    gradient is taken at the mini-batch's start (Sun et al. 2024, section 2.4 and appendix A; i = 1..K):

        Z_j = k_j W_0 + b_0                        g_j = ∂ℓ_j/∂Z_j
        W_i = W_0 - s_i Σ_{j<=i} η_j k_jᵀ g_j      b_i = b_0 - s_i Σ_{j<=i} η_j g_j      o_i = q_i + LN(q_i W_i + b_i)

    q, k, v (B,T,H,D), lr = η (B,T,H), token_scale = s (K,), W (H,D,D) and b (H,D) where every sequence starts,
    ln_weight, ln_bias (H,D). With a state, W and b are not used and the running mini-batch is continued exactly.
    Returns o (B,T,H,D) in q's dtype and the new state.
    """
    check_impl("ttt_linear", impl, ("auto", "loop", "chunk", "triton"))
    (B, T, H, D), K = q.shape, len(token_scale)
    dtype = state_dtype(q.dtype)
    if state is None:
        W, b = W.to(dtype).expand(B, H, D, D), b.to(dtype).expand(B, H, D)
        state, pos = TTTState(W, b, torch.zeros_like(W), torch.zeros_like(b), torch.tensor(0)), 0
    else:
        pos = int(state.pos)
    if T == 0:
        return q, state
    supported = q.dtype in KERNEL_DTYPES and D in (32, 64, 128) and K in (16, 32, 64)
    if use_triton("ttt_linear", impl, q, supported, "float32 or 16-bit, D 32, 64 or 128, K 16, 32 or 64"):
        return _ttt_triton(q, k, v, lr, token_scale, ln_weight, ln_bias, state, pos)
    return _ttt_torch(_ttt_loop if impl == "loop" else _ttt_chunk, q, k, v, lr, token_scale, ln_weight, ln_bias, state, pos)


def _ttt_torch(form, q, k, v, lr, s, ln_weight, ln_bias, state, pos):
    dtype = state_dtype(q.dtype)
    heads_first = lambda x: x.to(dtype).transpose(1, 2)             # (B,H,T,...)
    o, state = form(*map(heads_first, (q, k, v, lr[..., None])), s.to(dtype), ln_weight.to(dtype)[:, None],
                    ln_bias.to(dtype)[:, None], *state[:4], pos)
    return o.transpose(1, 2).to(q.dtype), state


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(z, z.shape[-1:], eps=LN_EPS) * weight + bias


def ttt_gradient(z: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """∂/∂z of ½‖LN(z) - target‖², in closed form: with ẑ = (z-μ)/σ and e = ∂ℓ/∂ẑ,  g = (e - mean(e) - ẑ mean(e ẑ))/σ."""
    var, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
    inv_sigma = (var + LN_EPS).rsqrt()
    z_hat = (z - mean) * inv_sigma
    e = (weight * z_hat + bias - target) * weight
    return (e - e.mean(-1, keepdim=True) - z_hat * (e * z_hat).mean(-1, keepdim=True)) * inv_sigma


def _ttt_loop(q, k, v, lr, s, ln_weight, ln_bias, W, b, dW, db, i):
    os = []
    for q_t, k_t, v_t, lr_t in zip(*(x.split(1, 2) for x in (q, k, v, lr))):            # each (B,H,1,·)
        g = ttt_gradient(k_t @ W + b[:, :, None], v_t - k_t, ln_weight, ln_bias)
        dW = dW + lr_t * (k_t.mT @ g)
        db = db + (lr_t * g)[:, :, 0]
        W_i, b_i = W - s[i] * dW, b - s[i] * db
        os.append(q_t + layer_norm(q_t @ W_i + b_i[:, :, None], ln_weight, ln_bias))
        i += 1
        if i == len(s):
            W, b, dW, db, i = W_i, b_i, torch.zeros_like(W), torch.zeros_like(b), 0
    return torch.cat(os, 2), TTTState(W, b, dW, db, torch.tensor(i))


def _ttt_chunk(q, k, v, lr, s, ln_weight, ln_bias, W, b, dW, db, i):
    """The dual form, a mini-batch at a time: no W_i is built, since q_i W_i = q_i W_0 - s_i Σ_{j<=i} (q_i·k_j) η_j g_j.
    Mini-batches lie on absolute positions, so the first piece is whatever completes the running one."""
    K, T, zs = len(s), q.size(2), []
    first = min(K - i, T)
    cuts = [first] + [K] * ((T - first) // K) + [(T - first) % K] * ((T - first) % K > 0)
    for q_n, k_n, target, lr_n in zip(*(x.split(cuts, 2) for x in (q, k, v - k, lr))):  # (B,H,n,·), n <= K
        n = q_n.size(2)
        g = lr_n * ttt_gradient(k_n @ W + b[:, :, None], target, ln_weight, ln_bias)                # η_j g_j
        past = (q_n @ k_n.mT + 1).tril() @ g                        # the +1 is the bias's share
        if i:                                                       # a fresh mini-batch has dW = db = 0
            past = past + q_n @ dW + db[:, :, None]
        zs.append(q_n @ W + b[:, :, None] - s[i:i + n, None] * past)
        dW, db, i = dW + k_n.mT @ g, db + g.sum(2), i + n
        if i == K:
            W, b, dW, db, i = W - s[-1] * dW, b - s[-1] * db, torch.zeros_like(W), torch.zeros_like(b), 0
    return q + layer_norm(torch.cat(zs, 2), ln_weight, ln_bias), TTTState(W, b, dW, db, torch.tensor(i))


# ----------------------------------------------------------------------------------------------------------------------
# TTT-Linear in Triton
#
# W and b walk from mini-batch to mini-batch and LayerNorm needs whole rows, so there is one program a head and T/K steps
# in a chain, each as short as it can be. The reverse walk is the same chain for dW and db; for it the forward pass
# leaves ẑ and 1/σ of both LayerNorms. All that only *uses* W or dW, dq and dk, leaves the chain: with W at the start
# and dW at the end of every 64 tokens, the W of a mini-batch in between is a sum over the tokens before it, and a
# kernel parallel over chunks of 64 does the rest with masks, as in attention. See _ttt_grads.

@kernel
def _ttt_forward(k, v, lr, s, W0, b0, ln_weight, ln_bias, g, z, r, W_chunk, b_chunk, W_end, b_end, T, n, EPS: tl.constexpr,
                 H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, SAVE: tl.constexpr, PREC: tl.constexpr):
    """Z = K W + b      r = 1/σ(Z), ẑ = r (Z - mean Z)      g = η ∂ℓ/∂Z      W <- W - s_K Kᵀ g      b <- b - s_K Σ g

    One program a head; it walks the mini-batches. In registers: W (D, D) and b in float32. Reads k, v, η, writes g,
    and W, b at the start of every 64 tokens; for the backward ẑ and r. The step of W is taken at the start of the next
    iteration: the compiler cuts all products of a loop as it cuts the last one, and that should be K W, whose columns
    the warps can share. A mini-batch of more than 16 tokens is walked in pieces of 16, for all of which W and b stay
    what they were at its start."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_i, o_d = tl.arange(0, 16), tl.arange(0, D)
    p_D = (i_b * T * H + i_h) * D
    k, v, g, z, lr, r = k + p_D, v + p_D, g + p_D, z + p_D, lr + i_b * T * H + i_h, r + i_b * T * H + i_h
    p_W = o_d[:, None] * D + o_d[None, :]
    b_W, b_b = tl.load(W0 + i_bh * D * D + p_W), tl.load(b0 + i_bh * D + o_d)
    b_weight, b_bias = tl.load(ln_weight + i_h * D + o_d)[None, :], tl.load(ln_bias + i_h * D + o_d)[None, :]
    b_sK = tl.load(s + K - 1)
    p_last = (o_i[:, None] - 16) * (H * D) + o_d[None, :]           # the piece before
    b_step = tl.zeros([16, D], k.dtype.element_ty)
    b_w, b_b0 = b_W.to(k.dtype.element_ty), b_b
    for i_n in range(n):
        b_k = tl.load(k + i_n * 16 * H * D + p_last, mask=i_n > 0, other=0.0)
        b_W = tl.dot(tl.trans(b_k), b_step, b_W, input_precision=PREC)
        p_x = (i_n * 16 + o_i[:, None]) * (H * D) + o_d[None, :]
        p_t = (i_n * 16 + o_i) * H
        b_k, b_v, b_lr = tl.load(k + p_x), tl.load(v + p_x), tl.load(lr + p_t)
        if i_n % (K // 16) == 0:
            b_w, b_b0 = b_W.to(b_k.dtype), b_b
        if i_n % 4 == 0:
            i_c = i_bh * tl.cdiv(T, 64) + i_n // 4
            tl.store(W_chunk + i_c * D * D + p_W, b_w)
            tl.store(b_chunk + i_c * D + o_d, b_b)
        b_z = tl.dot(b_k, b_w, input_precision=PREC) + b_b0[None, :]
        b_z -= tl.sum(b_z, 1)[:, None] / D
        b_r = tl.rsqrt(tl.sum(b_z * b_z, 1) / D + EPS)
        b_z *= b_r[:, None]
        b_e = (b_weight * b_z + b_bias + b_k - b_v) * b_weight                          # ∂ℓ/∂ẑ
        b_g = b_e - tl.sum(b_e, 1)[:, None] / D - b_z * (tl.sum(b_e * b_z, 1) / D)[:, None]
        b_g *= (b_r * b_lr)[:, None]
        tl.store(g + p_x, b_g.to(b_k.dtype))
        if SAVE:
            tl.store(z + p_x, b_z.to(b_k.dtype))
            tl.store(r + p_t, b_r)
        b_step = (b_g * -b_sK).to(b_k.dtype)
        b_b -= b_sK * tl.sum(b_g, 0)
    b_W = tl.dot(tl.trans(tl.load(k + n * 16 * H * D + p_last)), b_step, b_W, input_precision=PREC)
    tl.store(W_end + i_bh * D * D + p_W, b_W)
    tl.store(b_end + i_bh * D + o_d, b_b)


@kernel
def _ttt_output(q, k, g, s, ln_weight, ln_bias, W_chunk, b_chunk, o, zq, rq, T, EPS: tl.constexpr, H: tl.constexpr,
                D: tl.constexpr, K: tl.constexpr, SAVE: tl.constexpr, PREC: tl.constexpr):
    """Zq = Q W + b - (Q Kᵀ + 1 ⊙ M) g      M_ij = s_K for j in an earlier mini-batch, s_i for j <= i in the same one
    o = q + LN(Zq)

    One program a chunk of 64 tokens and head, W and b those of its start. In registers: the 64×64 weights, Zqᵀ (D, 64).
    Reads q, k, g, W, writes o; for the backward ẑq and r_q."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_c, o_d = tl.arange(0, 64), tl.arange(0, D)
    o_t = i_n * 64 + o_c
    m_t = o_t < T
    p_D = (i_b * T * H + i_h) * D
    q, k, g, o, zq = q + p_D, k + p_D, g + p_D, o + p_D, zq + p_D
    p_x = o_t[None, :] * (H * D) + o_d[:, None]                     # (D, 64)
    i_c = i_bh * tl.num_programs(0) + i_n
    b_q = tl.load(q + p_x, mask=m_t[None, :], other=0.0)
    b_k = tl.load(k + p_x, mask=m_t[None, :], other=0.0)
    b_g = tl.load(g + p_x, mask=m_t[None, :], other=0.0)
    m_own = ((o_c[:, None] // K) == (o_c[None, :] // K)) & (o_c[:, None] >= o_c[None, :])
    b_M = tl.where(m_own, tl.load(s + o_c % K)[:, None], 0.0)
    b_M = tl.where((o_c[:, None] // K) > (o_c[None, :] // K), tl.load(s + K - 1), b_M)
    b_M *= tl.dot(tl.trans(b_q), b_k, input_precision=PREC) + 1.0
    b_W = tl.load(W_chunk + i_c * D * D + o_d[None, :] * D + o_d[:, None])              # Wᵀ
    b_z = tl.dot(b_W, b_q, input_precision=PREC) + tl.load(b_chunk + i_c * D + o_d)[:, None]
    b_z -= tl.dot(b_g, tl.trans(b_M.to(b_g.dtype)), input_precision=PREC)
    b_z -= tl.sum(b_z, 0)[None, :] / D
    b_r = tl.rsqrt(tl.sum(b_z * b_z, 0) / D + EPS)
    b_z *= b_r[None, :]
    b_o = b_q + tl.load(ln_weight + i_h * D + o_d)[:, None] * b_z + tl.load(ln_bias + i_h * D + o_d)[:, None]
    tl.store(o + p_x, b_o.to(b_q.dtype), mask=m_t[None, :])
    if SAVE:
        tl.store(zq + p_x, b_z.to(b_q.dtype), mask=m_t[None, :])
        tl.store(rq + i_b * T * H + i_h + o_t * H, b_r, mask=m_t)


@kernel
def _ttt_backward(q, k, v, lr, s, ln_weight, ln_bias, z, r, zq, rq, do, dW_end, db_end, dv, dz, dzq, dlr, ds, dln_weight,
                  dln_bias, dW_chunk, dW0, db0, T, n, H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PREC: tl.constexpr):
    """With y = do·w and Y = K dW + db (what the next mini-batch asks for; u, h, m, a are rows of the closed form of g):

        dZq = r_q (y - mean y - ẑq mean(y ẑq))             dg = -tril(Q Kᵀ + 1)ᵀ (s dZq) - s_K Y
        g/r = h = e - mean e - ẑ m,  m = mean(e ẑ)         dη = dg·g      u = η r dg      de = u - mean u - ẑ a,  a = mean(u ẑ)
        dẑ = w² de - m u - a e                             dZ = r (dẑ - mean dẑ - ẑ (mean(dẑ ẑ) + mean(u h)))
        dv = -w de                                         dW <- dW + Kᵀ dZ + Qᵀ dZq      db <- db + Σ dZ + dZq

    One program a head; it walks the mini-batches in reverse. In registers: dW and db in float32, and the gradients of
    the LayerNorm's weights. Reads q, k, v, do, ẑ, ẑq, writes dv, dZ, dZq, and dW at the end of every 64 tokens. W does
    not appear: what depended on it is in ẑ and ẑq. A mini-batch of more than 16 tokens is walked in pieces of 16; what
    the later pieces ask of the earlier ones through Q Kᵀ + 1 is collected in X = Σ s qᵀ dZq and x = Σ s dZq."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_i, o_d = tl.arange(0, 16), tl.arange(0, D)
    p_D, p_T = (i_b * T * H + i_h) * D, i_b * T * H + i_h
    q, k, v, z, zq, do, dv, dz, dzq = (q + p_D, k + p_D, v + p_D, z + p_D, zq + p_D, do + p_D, dv + p_D, dz + p_D,
                                       dzq + p_D)
    lr, r, rq, dlr = lr + p_T, r + p_T, rq + p_T, dlr + p_T
    p_W = o_d[:, None] * D + o_d[None, :]
    b_dW, b_db = tl.load(dW_end + i_bh * D * D + p_W), tl.load(db_end + i_bh * D + o_d)
    b_weight, b_bias = tl.load(ln_weight + i_h * D + o_d)[None, :], tl.load(ln_bias + i_h * D + o_d)[None, :]
    b_sK, b_ds = tl.load(s + K - 1), tl.zeros([16], tl.float32)
    b_dweight, b_dbias = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    b_dz, b_dzq = tl.zeros([16, D], k.dtype.element_ty), tl.zeros([16, D], k.dtype.element_ty)
    b_sdzq = tl.zeros([16, D], k.dtype.element_ty)
    b_dw, b_db0 = b_dW.to(k.dtype.element_ty), b_db
    b_X, b_x = tl.zeros([D, D], tl.float32), tl.zeros([D], tl.float32)
    for i in range(n):
        i_n = n - 1 - i
        p_x = (i_n * 16 + 16 + o_i[:, None]) * (H * D) + o_d[None, :]   # the step of dW, one piece late as forward
        b_q, b_k = tl.load(q + p_x, mask=i > 0, other=0.0), tl.load(k + p_x, mask=i > 0, other=0.0)
        b_dW = tl.dot(tl.trans(b_q), b_dzq, b_dW, input_precision=PREC)
        b_dW = tl.dot(tl.trans(b_k), b_dz, b_dW, input_precision=PREC)
        if K > 16:
            b_X = tl.dot(tl.trans(b_q), b_sdzq, b_X, input_precision=PREC)
            if i_n % (K // 16) == K // 16 - 1:                      # a new mini-batch
                b_dw, b_db0 = b_dW.to(b_k.dtype), b_db
                b_X, b_x = b_X * 0.0, b_x * 0.0
        else:
            b_dw, b_db0 = b_dW.to(b_k.dtype), b_db
        p_x = (i_n * 16 + o_i[:, None]) * (H * D) + o_d[None, :]
        p_t = (i_n * 16 + o_i) * H
        b_q, b_k, b_v, b_do = tl.load(q + p_x), tl.load(k + p_x), tl.load(v + p_x), tl.load(do + p_x).to(tl.float32)
        b_z, b_zq = tl.load(z + p_x).to(tl.float32), tl.load(zq + p_x).to(tl.float32)
        b_lr, b_r, b_rq = tl.load(lr + p_t)[:, None], tl.load(r + p_t)[:, None], tl.load(rq + p_t)[:, None]
        if (i_n + 1) % 4 == 0 or i == 0:
            tl.store(dW_chunk + (i_bh * tl.cdiv(T, 64) + i_n // 4) * D * D + p_W, b_dw)
        b_y = b_do * b_weight
        b_yq = b_rq * (b_y - tl.sum(b_y, 1)[:, None] / D - b_zq * (tl.sum(b_y * b_zq, 1)[:, None] / D))
        b_syq = tl.load(s + i_n % (K // 16) * 16 + o_i)[:, None] * b_yq
        b_sdzq = b_syq.to(b_k.dtype)
        b_P = tl.where(o_i[:, None] >= o_i[None, :], tl.dot(b_q, tl.trans(b_k), input_precision=PREC) + 1.0, 0.0)
        b_Y = tl.dot(b_k, b_dw, input_precision=PREC) + b_db0[None, :]
        b_dg = -tl.dot(tl.trans(b_P.to(b_k.dtype)), b_sdzq, input_precision=PREC) - b_sK * b_Y
        if K > 16:
            b_dg -= tl.dot(b_k, b_X.to(b_k.dtype), input_precision=PREC) + b_x[None, :]
            b_x += tl.sum(b_syq, 0)

        b_error = b_weight * b_z + b_bias + b_k - b_v
        b_e = b_error * b_weight
        b_m = tl.sum(b_e * b_z, 1)[:, None] / D
        b_h = b_e - tl.sum(b_e, 1)[:, None] / D - b_z * b_m
        tl.store(dlr + p_t, tl.sum(b_dg * b_h * b_r, 1))
        b_ds -= tl.sum(b_Y * b_h * (b_r * b_lr), 1)                 # all of it belongs to s_K
        b_u = b_dg * (b_lr * b_r)
        b_a = tl.sum(b_u * b_z, 1)[:, None] / D
        b_de = b_u - tl.sum(b_u, 1)[:, None] / D - b_z * b_a
        b_dweight += tl.sum(b_do * b_zq + b_de * (b_error + b_weight * b_z), 0)
        b_dbias += tl.sum(b_do + b_de * b_weight, 0)
        tl.store(dv + p_x, (b_de * -b_weight).to(b_k.dtype))
        b_y = b_weight * b_weight * b_de - b_u * b_m - b_e * b_a    # dẑ
        b_y = b_r * (b_y - tl.sum(b_y, 1)[:, None] / D - b_z * (tl.sum(b_y * b_z + b_u * b_h, 1)[:, None] / D))
        b_db += tl.sum(b_y + b_yq, 0)
        b_dz, b_dzq = b_y.to(b_k.dtype), b_yq.to(b_k.dtype)
        tl.store(dz + p_x, b_dz)
        tl.store(dzq + p_x, b_dzq)
    p_x = o_i[:, None] * (H * D) + o_d[None, :]
    b_dW = tl.dot(tl.trans(tl.load(q + p_x)), b_dzq, b_dW, input_precision=PREC)
    b_dW = tl.dot(tl.trans(tl.load(k + p_x)), b_dz, b_dW, input_precision=PREC)
    tl.store(dW0 + i_bh * D * D + p_W, b_dW)
    tl.store(db0 + i_bh * D + o_d, b_db)
    tl.store(ds + i_bh, tl.sum(b_ds, 0))
    tl.store(dln_weight + i_bh * D + o_d, b_dweight)
    tl.store(dln_bias + i_bh * D + o_d, b_dbias)


@kernel
def _ttt_grads(q, k, s, g, dz, dzq, do, dv, W_chunk, dW_chunk, dq, dk, ds, T, H: tl.constexpr, D: tl.constexpr,
               K: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
    """Token i sees g_j through W if j is in an earlier mini-batch (weight s_K), through tril(Q Kᵀ + 1) if in its own
    (weight s_i), and W at the chunk's start for all before that. With W, dW at the chunk's start and end:

        A_ij = dZq_i·g_j (s_K | s_i)      B_ij = s_K dZ_i·g_j, earlier mini-batches only
        dq = do + dZq Wᵀ - A K            dk = -dv + dZ Wᵀ - s_K g dWᵀ - (B + Bᵀ) K - Aᵀ Q
        ds_i = -Σ_j dZq_i·g_j (q_i·k_j + 1), own mini-batch

    One program a chunk of 64 tokens and head. In registers: A and B + Bᵀ, and BD rows of dqᵀ and dkᵀ at a time. Reads
    q, k, g, dZ, dZq, do, dv, W, dW and writes dq, dk, all once."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_c, o_d = tl.arange(0, 64), tl.arange(0, D)
    o_t = i_n * 64 + o_c
    m_t = o_t < T
    p_D = (i_b * T * H + i_h) * D
    q, k, g, dz, dzq, do, dv, dq, dk = (q + p_D, k + p_D, g + p_D, dz + p_D, dzq + p_D, do + p_D, dv + p_D, dq + p_D,
                                        dk + p_D)
    p_x = o_t[:, None] * (H * D) + o_d[None, :]
    p_W = (i_bh * tl.num_programs(0) + i_n) * D * D
    b_s, b_sK = tl.load(s + o_c % K), tl.load(s + K - 1)
    m_own = ((o_c[:, None] // K) == (o_c[None, :] // K)) & (o_c[:, None] >= o_c[None, :])
    m_earlier = (o_c[:, None] // K) > (o_c[None, :] // K)
    b_QK = tl.dot(tl.load(q + p_x, mask=m_t[:, None], other=0.0),
                  tl.trans(tl.load(k + p_x, mask=m_t[:, None], other=0.0)), input_precision=PREC)
    b_g = tl.load(g + p_x, mask=m_t[:, None], other=0.0)
    b_dz = tl.load(dz + p_x, mask=m_t[:, None], other=0.0)
    b_dzq = tl.load(dzq + p_x, mask=m_t[:, None], other=0.0)
    b_A = tl.dot(b_dzq, tl.trans(b_g), input_precision=PREC)
    b_ds = -tl.sum(tl.where(m_own, b_A * (b_QK + 1.0), 0.0), 1)
    tl.store(ds + i_b * T * H + i_h + o_t * H, b_ds, mask=m_t)
    b_A = (b_A * tl.where(m_own, b_s[:, None], tl.where(m_earlier, b_sK, 0.0))).to(b_g.dtype)
    b_B = tl.where(m_earlier, tl.dot(b_dz, tl.trans(b_g), input_precision=PREC) * b_sK, 0.0).to(b_g.dtype)
    b_B += tl.trans(b_B)
    for i_d in range(D // BD):
        o_k = i_d * BD + tl.arange(0, BD)
        p_k = o_k[:, None] + o_t[None, :] * (H * D)                 # (BD, 64): Kᵀ
        b_q = tl.load(q + p_k, mask=m_t[None, :], other=0.0)
        b_k = tl.load(k + p_k, mask=m_t[None, :], other=0.0)
        b_W = tl.load(W_chunk + p_W + o_k[:, None] * D + o_d[None, :])
        b_dW = tl.load(dW_chunk + p_W + o_k[:, None] * D + o_d[None, :])
        b_dq = tl.dot(b_W, tl.trans(b_dzq), input_precision=PREC) - tl.dot(b_k, tl.trans(b_A), input_precision=PREC)
        b_dq += tl.load(do + p_k, mask=m_t[None, :], other=0.0)
        tl.store(dq + p_k, b_dq.to(b_g.dtype), mask=m_t[None, :])
        b_dk = tl.dot(b_W, tl.trans(b_dz), input_precision=PREC) - b_sK * tl.dot(b_dW, tl.trans(b_g), input_precision=PREC)
        b_dk -= tl.dot(b_k, b_B, input_precision=PREC) + tl.dot(b_q, b_A, input_precision=PREC)
        b_dk -= tl.load(dv + p_k, mask=m_t[None, :], other=0.0)
        tl.store(dk + p_k, b_dk.to(b_g.dtype), mask=m_t[None, :])


def _ttt_forward_run(q, k, v, lr, s, W, b, ln_weight, ln_bias, save):
    (B, T, H, D), K, n = q.shape, len(s), -(-q.size(1) // 64)
    o, g, r, rq, W_end, b_end = map(torch.empty_like, (q, q, lr, lr, W, b))
    z, zq = (torch.empty_like(q) if save else q.new_empty(0) for _ in range(2))
    W_chunk, b_chunk = q.new_empty(B * H * n, D, D), lr.new_empty(B * H * n, D)
    launch(_ttt_forward, (B * H,), (k, v, lr, s, W, b, ln_weight, ln_bias, g, z, r, W_chunk, b_chunk, W_end, b_end, T,
                                    T // 16, LN_EPS, H, D, K, save), ("ttt_walk", D))
    launch(_ttt_output, (n, B * H), (q, k, g, s, ln_weight, ln_bias, W_chunk, b_chunk, o, zq, rq, T, LN_EPS, H, D, K,
                                     save), "ttt_output")
    return o, W_end, b_end, g, z, zq, r, rq, W_chunk


def _ttt_backward_run(q, k, v, lr, s, ln_weight, ln_bias, g, z, zq, r, rq, W_chunk, do, dW_end, db_end):
    (B, T, H, D), K, n = q.shape, len(s), -(-q.size(1) // 64)
    dq, dk, dv, dz, dzq, dlr, ds = map(torch.empty_like, (q, q, q, q, q, lr, lr))
    dW_chunk, dW0, db0 = map(torch.empty_like, (W_chunk, dW_end, db_end))
    dln_weight, dln_bias, dsK = lr.new_empty(B, H, D), lr.new_empty(B, H, D), lr.new_empty(B * H)
    launch(_ttt_backward, (B * H,), (q, k, v, lr, s, ln_weight, ln_bias, z, r, zq, rq, do, dW_end, db_end, dv, dz, dzq,
                                     dlr, dsK, dln_weight, dln_bias, dW_chunk, dW0, db0, T, T // 16, H, D, K), ("ttt_walk", D))
    launch(_ttt_grads, (n, B * H), (q, k, s, g, dz, dzq, do, dv, W_chunk, dW_chunk, dq, dk, ds, T, H, D, K),
           "ttt_grads", D)
    ds = ds.view(-1, K, H).sum((0, 2))
    ds = torch.cat([ds[:-1], ds[-1:] + dsK.sum()])
    return dq, dk, dv, dlr, ds, dW0, db0, dln_weight.sum(0), dln_bias.sum(0)


_ttt_forward_op, _ttt_backward_op = operator(_ttt_forward_run, 9), operator(_ttt_backward_run, 9)


def _ttt_save(ctx, inputs, output):
    q, k, v, lr, s, W, b, ln_weight, ln_bias, _ = inputs
    ctx.save_for_backward(q, k, v, lr, s, ln_weight, ln_bias, *output[3:])
    ctx.set_materialize_grads(False)


def _ttt_autograd(ctx, do, dW, db, *unused):
    q, f32 = ctx.saved_tensors[0], ctx.saved_tensors[3].new_zeros
    B, _, H, D = q.shape
    do = torch.zeros_like(q) if do is None else do.contiguous()
    dW = f32(B, H, D, D) if dW is None else dW.contiguous()
    db = f32(B, H, D) if db is None else db.contiguous()
    return *_ttt_backward_op(*ctx.saved_tensors, do, dW, db), None


_ttt_forward_op.register_autograd(_ttt_autograd, setup_context=_ttt_save)


def _ttt_triton(q, k, v, lr, s, ln_weight, ln_bias, state, pos):
    """The kernels take whole mini-batches. What completes a running one, and what is left over at the end, takes the
    chunked form: fewer than K tokens each, and exact."""
    K, T = len(s), q.size(1)
    head = min(-pos % K, T)
    body, os = (T - head) // K * K, []
    if head:
        o, state = _ttt_torch(_ttt_chunk, *(x[:, :head] for x in (q, k, v, lr)), s, ln_weight, ln_bias, state, pos)
        os.append(o)
    if body:
        xs = [x[:, head:head + body].to(q.dtype).contiguous() for x in (q, k, v)]
        xs += [x.float().contiguous() for x in (lr[:, head:head + body], s, state.W, state.b, ln_weight, ln_bias)]
        save = torch.is_grad_enabled() and any(x.requires_grad for x in xs)
        o, W, b, *_ = _ttt_forward_op(*xs, save)
        state = TTTState(W, b, torch.zeros_like(W), torch.zeros_like(b), torch.tensor(0))
        os.append(o)
    if head + body < T:
        rest = (x[:, head + body:] for x in (q, k, v, lr))
        o, state = _ttt_torch(_ttt_chunk, *rest, s, ln_weight, ln_bias, state, 0)
        os.append(o)
    return torch.cat(os, 1) if len(os) > 1 else os[0], state


# ----------------------------------------------------------------------------------------------------------------------
# python memories.py: are the kernels right, and what do they cost

FLOPS, BYTES = 790e12, 4.3e12  # an H200's bf16 products and copies, as measured: the roofline's two ceilings
SHARED_LIMIT = {90: 232448, 80: 166912}                             # bytes of shared memory a program may have
SHAPES = {"A": (8, 4096, 6, 128), "B": (16, 2048, 12, 64)}          # B, T, H, D

# FLOPs a token and head of each kernel (chunks of 32 in the walks and 64 elsewhere; K and V of the delta rule have D)
KERNEL_FLOPS = {
    "_delta_prep": lambda D, K: 4 * 32 * D + 4 * 32 * 32, "_delta_forward": lambda D, K: 6 * D * D + 4 * 32 * D,
    "_delta_backward": lambda D, K: 6 * D * D + 4 * 32 * D, "_delta_grads": lambda D, K: 6 * D * D + 12 * 64 * D,
    "_ttt_forward": lambda D, K: 4 * D * D, "_ttt_output": lambda D, K: 2 * D * D + 4 * 64 * D,
    "_ttt_backward": lambda D, K: 6 * D * D + 4 * 16 * D, "_ttt_grads": lambda D, K: 6 * D * D + 12 * 64 * D,
}
# The floors: (FLOPs, bytes) a token and head, inputs read once, outputs written once, in bf16. The delta rule's FLOPs are
# those of the usual form in chunks of 64; its walks here, in chunks of 32 and without recomputing E, take fewer.
FLOORS = {
    ("gated_delta_rule", "forward"): lambda D: (10 * 64 * D + 6 * D * D, 8 * D + 6),
    ("gated_delta_rule", "backward"): lambda D: (28 * 64 * D + 16 * D * D + 4 * 64 * 64, 14 * D + 12),
    ("ttt_linear", "forward"): lambda D: (6 * D * D + 4 * 16 * D, 8 * D + 4),
    ("ttt_linear", "backward"): lambda D: (12 * D * D + 12 * 16 * D, 14 * D + 8),
}


def example(name: str, B: int, T: int, H: int, D: int, K: int = 16, Dv: int = 0, device="cpu", dtype=torch.float32) -> dict:
    """Arguments of a function as a trained layer would give them."""
    rand = lambda *shape: torch.randn(*shape, device=device)
    if name == "gated_delta_rule":
        q, k = F.normalize(rand(B, T, H, D), dim=-1), F.normalize(rand(B, T, H, D), dim=-1)
        return dict(q=q.to(dtype), k=k.to(dtype), v=rand(B, T, H, Dv or D).to(dtype), g=-0.1 * rand(B, T, H).exp(),
                    beta=rand(B, T, H).sigmoid(), state=rand(B, H, D, Dv or D))
    q, k, v = (rand(B, T, H, D).to(dtype) for _ in range(3))
    return dict(q=q, k=k, v=v, lr=rand(B, T, H).sigmoid() / D, token_scale=1 / torch.arange(1, K + 1, device=device),
                W=0.02 * rand(H, D, D), b=0.1 * rand(H, D), ln_weight=1 + 0.1 * rand(H, D), ln_bias=0.1 * rand(H, D))


def results(fn, args: dict, impl: str) -> dict:
    """Outputs, state and every gradient of fn, for one fixed random loss."""
    xs = {name: x.detach().requires_grad_() for name, x in args.items()}
    o, state = fn(**xs, impl=impl)
    outs = {"o": o} | ({"state": state} if torch.is_tensor(state) else dict(zip(state._fields[:4], state)))
    generator = torch.Generator().manual_seed(1)
    loss = sum((y.float() * torch.randn(y.shape, generator=generator).to(y.device)).sum() for y in outs.values())
    grads = torch.autograd.grad(loss, list(xs.values()), allow_unused=True)
    return outs | {f"d{name}": torch.zeros_like(x) if g is None else g for (name, x), g in zip(xs.items(), grads)}


def errors(fn, args: dict, impl: str = "triton") -> dict:
    """Relative errors ‖a - b‖/‖b‖ of everything in results() against the loop in float32 on the same numbers. What is
    zero, as dβ where nothing depends on it, is compared with 1 instead."""
    want, got = results(fn, {n: x.float() for n, x in args.items()}, "loop"), results(fn, args, impl)
    return {n: ((got[n].float() - x).norm() / (x.norm() if x.norm() > 1e-6 else 1)).item() for n, x in want.items()}


def check(device: str) -> None:
    """Every kernel against its loop: float32 to 1e-4 anywhere, and bfloat16 to 1e-2 on a GPU."""
    cases = [("gated_delta_rule", dict(D=D, Dv=Dv, T=T)) for D, Dv, T in ((16, 32, 70), (64, 64, 129), (128, 128, 64))]
    cases += [("ttt_linear", dict(D=D, K=K, T=T)) for D, K, T in ((32, 16, 150), (64, 64, 192), (128, 32, 64))]
    worst = 0.0
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2))[:2 if device == "cuda" else 1]:
        for name, sizes in cases:
            torch.manual_seed(0)
            e = errors(globals()[name], example(name, 1, H=2, device=device, dtype=dtype, **sizes))
            bad = max(e, key=e.get)
            print(f"{name:17} {str(dtype)[6:]:9} {str(sizes):34} largest error {e[bad]:.1e} ({bad})", flush=True)
            worst = max(worst, e[bad] / limit)
    if worst > 1:
        raise SystemExit("error: a kernel disagrees with its loop; expected 1e-4 in float32, 1e-2 in bfloat16")


def launches(name: str, B: int, T: int, H: int, D: int, K: int = 16, Dv: int = 0, dtype=torch.bfloat16) -> list:
    """The kernel launches of forward and backward, recorded instead of run: (kernel, grid, args, options)."""
    f, Dv, record = lambda *s: torch.empty(s, device="meta"), Dv or D, []
    run, globals()["launch"] = launch, lambda *a: record.append(launch_options(*a))
    try:
        q, v, x, W, s = f(B, T, H, D).to(dtype), f(B, T, H, Dv).to(dtype), f(B, T, H), f(B, H, D, Dv), f(K)
        if name == "gated_delta_rule":
            o, S, *saved = _delta_forward_run(q, q, v, x, x, W, 1.0, True)
            _delta_backward_run(q, q, x, x, o, S, *saved, 1.0)
        else:
            o, W, b, *saved = _ttt_forward_run(q, q, q, x, s, W, f(B, H, D), f(H, D), f(H, D), True)
            _ttt_backward_run(q, q, q, x, s, f(H, D), f(H, D), *saved, o, W, b)
    finally:
        globals()["launch"] = run
    return record


def compiled(fn, args: tuple, options: dict, arch: int):
    """Compile for sm_80 or sm_90 and read registers, stack (spills) and shared memory a program."""
    triton.runtime.driver.set_active(SimpleNamespace(               # stands where the driver of a GPU would
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", arch, 32), get_current_device=lambda: arch,
        get_current_stream=lambda device: 0, map_python_to_cpp_type=lambda ty: ty))
    binary = fn.warmup(*(x.dtype if torch.is_tensor(x) else x for x in args), grid=(1,), **options)
    tool = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK"))
    in_registers = [x for x in binary.asm["ttgir"].splitlines() if "warp_group_dot " in x and " : tensor" in x]
    return dict(registers=registers, stack=stack, shared=binary.metadata.shared, wgmma_from_registers=len(in_registers))


def report() -> None:
    """What the compiler says of every kernel at shapes A and B, and the bytes and FLOPs it moves against the floor."""
    for shape, (B, T, H, D) in SHAPES.items():
        for name in ("gated_delta_rule", "ttt_linear"):
            print(f"\n{name}, shape {shape}: B{B} T{T} H{H} D{D} bfloat16\n{'kernel':16} programs warps  "
                  + "".join(f"sm_{a}: regs stack  shared  " for a in SHARED_LIMIT) + "bytes/token,head  FLOPs/token,head")
            total = {"forward": [0, 0], "backward": [0, 0]}
            for i, (fn, grid, args, options) in enumerate(launches(name, B, T, H, D)):
                nbytes = sum(x.numel() * x.element_size() for x in args if torch.is_tensor(x)) / (B * T * H)
                flops = KERNEL_FLOPS[fn.__name__](D, 16)
                part = total["forward" if i < 2 else "backward"]
                part[:] = part[0] + flops, part[1] + nbytes
                said = [compiled(fn, args, options, arch) for arch in SHARED_LIMIT]
                print(f"{fn.__name__:16} {grid[0] * (grid + (1,))[1]:8} {options['num_warps']:5}  "
                      + "".join(f"{x['registers']:11} {x['stack']:5} {x['shared']:7}  " for x in said)
                      + f"{nbytes:16.0f}  {flops:16.0f}")
            for part, (flops, nbytes) in total.items():
                floor_flops, floor_bytes = FLOORS[name, part](D)
                us = B * T * H * 1e6
                print(f"{part}: {nbytes:.0f} bytes (floor {floor_bytes}), {flops} FLOPs (floor {floor_flops}) a token and head; "
                      f"at the ceilings {us * nbytes / BYTES:.0f} and {us * flops / FLOPS:.0f} us, "
                      f"floor {us * max(floor_bytes / BYTES, floor_flops / FLOPS):.0f} us; time on a device: not measured")


def median_ms(fn, repeats: int = 30) -> float:
    times = []
    for _ in range(repeats + 5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times[5:])[repeats // 2]


def peer(name: str):
    """flash-linear-attention's nearest function, as a function of our arguments, where it is installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.ttt import chunk_ttt_linear
    except ImportError:
        return None
    if name == "gated_delta_rule":
        return lambda q, k, v, g, beta, state: chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state)[0]
    return lambda q, k, v, lr, ln_weight, ln_bias, **_: chunk_ttt_linear(q, k, v, ln_weight, ln_bias, lr[..., None])[0]


def benchmark() -> None:
    print(f"\n{torch.cuda.get_device_name()}; medians; TFLOP/s and GB/s of the floor's work; / is their time over ours"
          f"\n{'':17} shape dtype     part      ms      TFLOP/s  GB/s   x floor  / PyTorch  / fla")
    for name in ("gated_delta_rule", "ttt_linear"):
        for shape, (B, T, H, D) in SHAPES.items():
            args = {n: x.requires_grad_() for n, x in example(name, B, T, H, D, device="cuda", dtype=torch.bfloat16).items()}
            forms = {impl: lambda impl=impl, **a: globals()[name](**a, impl=impl)[0] for impl in ("triton", "chunk")}
            forms |= {"fla": peer(name)} if peer(name) else {}
            ms = {}
            for form, fn in forms.items():
                try:
                    o = fn(**args)
                    do, xs = torch.randn_like(o), list(args.values())
                    ms[form] = (median_ms(lambda: fn(**args)),
                                median_ms(lambda: torch.autograd.grad(o, xs, do, retain_graph=True, allow_unused=True)))
                except (RuntimeError, torch.OutOfMemoryError) as e:     # the others may lack memory or support; ours may not
                    if form == "triton":
                        raise
                    print(f"{name}: {form} did not run: {str(e).splitlines()[0]}")
            for i, part in enumerate(("forward", "backward")):
                flops, nbytes = (x * B * T * H for x in FLOORS[name, part](D))
                t = ms["triton"][i]
                ratios = "".join(f"{ms[f][i] / t:9.2f}" if f in ms else "        -" for f in ("chunk", "fla"))
                print(f"{name:17} {shape:5} bfloat16  {part:8} {t:7.3f} {flops / t / 1e9:8.1f} {nbytes / t / 1e6:8.0f} "
                      f"{t / 1e3 / max(flops / FLOPS, nbytes / BYTES):8.1f} {ratios}")


def main() -> None:
    if triton is None:
        raise SystemExit("error: triton is not installed, and there is nothing to check without it; pip install triton")
    if INTERPRET:
        check("cpu")
    elif torch.cuda.is_available():
        check("cuda")
        benchmark()
    else:
        print("No GPU: values from Triton's interpreter, in float32.")
        subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
        report()


if __name__ == "__main__":
    main()
