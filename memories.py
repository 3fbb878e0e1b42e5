"""What a memory computes: the recurrences, slow and fast. No parameters live here; those are in model.py.

Every mechanism has a loop, which is the paper's equation token by token. It is slow, and it is what the other forms are
tested against. The chunked form computes the same numbers with matrix products, and is sequential only from chunk to
chunk. The two mechanisms that keep a matrix as their state have a third form: Triton kernels for CUDA, with their
gradients. Whoever wants to know what the memories are may stop reading where the kernels begin.

    python memories.py     On a GPU this compares the kernels with the loops and times them. Without a GPU it compares
                           them in Triton's interpreter, and prints what each kernel reads, writes and computes.

Reading order
    leaky_average      Memory Mosaics' key smoothing        y_t = g_t x_t + λ_t y_{t-1}
    gated_delta_rule   Gated DeltaNet's fast weights        S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ
    ttt_linear         TTT-Linear's inner gradient descent  W_i = W_start - s_i Σ_{j<=i} η_j k_jᵀ ∇_j
    the kernels        what they share, then those of the delta rule, then those of TTT-Linear
    main               are the kernels right, and what do they cost?

Glossary (name in the code = symbol in the paper)
    B, T, H, D         batch, time, heads, head dimension; Dk and Dv where keys and values differ.
                       In arguments time is axis 1
    log_alpha          log α, where the forget gate α is the share of the state that a token keeps. It is the argument
                       g of gated_delta_rule (the gate g below is leaky_average's)
    log_gamma = log γ  the sum of log α since a chunk's start
    beta = β           writing strength of a token, from 0 to 1, or to 2 where a write may reverse what was stored
    lr = η             inner learning rate of a token
    token_scale = s    factor of the learning rate, one for each of the K positions in a mini-batch
    W, b               the weights and bias of TTT's inner model. As arguments they are W_0 and b_0, where each sequence
                       starts; W_start and b_start are those at the start of a mini-batch
    grad = ∇           inner gradient of a token's loss, and lr_grad = η ∇. Sums over a mini-batch are grad_W, Σ η kᵀ ∇,
                       and grad_b, Σ η ∇. dq, dW and the like are gradients of the training
    decay = λ          share of the leaky sum that a token keeps; log_decay is log λ
    gate = g           how much of a token enters the leaky sum
    C                  tokens in a chunk (in model.py C counts channels); in the comments on chunks Q, K, V stack the
                       chunk's q, k, v. The letters of _delta_chunk's docstring (S, γ, Γ, A, U, W) hold in the delta
                       rule alone
    state              all that is remembered of the past. It is kept in float32 at least, whatever the inputs' dtype is
    impl               which form computes: "loop", "chunk", "triton" or "auto". With "auto" CUDA tensors of a supported
                       shape take the kernel, and all others the chunked form. A single token takes the loop with "auto"
                       in gated_delta_rule, and with any impl in leaky_average (which has no kernel)

Every function continues from a state: up to rounding, f(x) equals f(x[:, :t]) followed by f(x[:, t:], state).

References
    Memory Mosaics: Zhang et al. 2024 (arXiv 2405.06394), official code github.com/facebookresearch/MemoryMosaics;
                    with gates Zhang & Bottou 2025 (2507.03285), whose code is not public
    Gated DeltaNet: Yang, Kautz, Hatamizadeh 2025 (2412.06464), official code github.com/NVlabs/GatedDeltaNet
    DeltaNet in chunks: Yang et al. 2024 (2406.06484)
    TTT-Linear: Sun et al. 2024 (2407.04620), official code github.com/test-time-training/ttt-lm-pytorch and ttt-lm-jax
"""
import inspect
import os
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    # without it everything but the kernels works; their signatures need this one name
    triton = None
    class tl: constexpr = None

LEAKY_CHUNK = 64
DELTA_CHUNK = 64  # work grows as T·C·D, the sequential part as T/C
LN_EPS = 1e-6     # added to the variance in TTT's inner LayerNorm
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # kernels then run on CPU tensors, slowly


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States and gates are kept in float32, or in float64 when the inputs are (the tests' exact arithmetic)."""
    return torch.promote_types(dtype, torch.float32)


def check_impl(name: str, impl: str, choices: tuple) -> None:
    """Raises ValueError unless impl is one of the choices."""
    if impl not in choices:
        raise ValueError(f"{name}: impl={impl!r} was given, expected one of {', '.join(choices)}; use 'auto'")


def use_triton(name: str, impl: str, x: Tensor, supported: bool, given: str, expected: str) -> bool:
    """Whether the kernels are to run. Raises ValueError where they were asked for and cannot run, because x's device,
    or what was given, is not supported."""
    if impl == "auto":
        return triton is not None and x.is_cuda and supported
    if impl != "triton":
        return False

    if triton is None:
        raise ValueError(f"{name}: impl='triton' needs the package triton, which is not installed; use impl='chunk'")
    if not (x.is_cuda or INTERPRET):
        raise ValueError(f"{name}: impl='triton' was given {x.device} tensors, expected cuda; use impl='chunk', "
                         f"or set TRITON_INTERPRET=1 to test the kernels without a GPU")
    if not supported:
        raise ValueError(f"{name}: impl='triton' was given {given}, expected {expected}; use impl='chunk'")
    return True


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of columns (aᵀ b of rows, as in TTT's equations), the matrix that gives b to a key a of length one:
    (B,H,Da), (B,H,Db) -> (B,H,Da,Db)."""
    return a[..., :, None] * b[..., None, :]


def read(matrix: Tensor, key: Tensor) -> Tensor:
    """Mᵀ k, what a matrix M gives to a key k:  (B,H,Dk,Dv), (B,H,Dk) -> (B,H,Dv). Where keys are rows, as in TTT's
    equations, it is written k M."""
    return (key[..., :, None] * matrix).sum(-2)


# ----------------------------------------------------------------------------------------------------------------------
# Leaky average (Memory Mosaics)

def leaky_average(x: Tensor, decay: Tensor | None = None, state: Tensor | None = None, impl: str = "auto",
                  log_decay: Tensor | None = None, log_gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = g_t x_t + λ_t y_{t-1}, with one λ per head (Zhang et al. 2024, eq. 7), or with a λ and a
    gate g that every token chooses (Zhang & Bottou 2025, eq. 8).

    x          (B,T,H,D)  float
    decay      (H,)       λ, in [0, 1), of all tokens; or instead of it
    log_decay  (B,T,H)    log λ_t, at most 0, of every token
    state      (B,H,D)    y of the token before x; zeros where it is None
    log_gate   (B,T,H)    log g_t; g is 1 where it is None
    impl                  see the top of this file; a single token takes the loop whatever is asked for

    Returns y (B,T,H,D) in x's dtype, and the new state in float32 (float64 for float64 inputs).
    Raises ValueError for an impl other than auto, loop and chunk, and unless one of decay and log_decay is
    given, in this shape.

    There is no Triton kernel: the chunked form moves x and y a few times and never builds a T×T matrix, so
    that a kernel could save little.
    Official implementation: github.com/facebookresearch/MemoryMosaics.
    """
    check_impl("leaky_average", impl, ("auto", "loop", "chunk"))
    if (decay is None) == (log_decay is None):
        raise ValueError("leaky_average: decay and log_decay were both given or both left out; give one of them")
    B, T, H, D = x.shape
    if decay is not None and decay.shape != (H,):
        raise ValueError(f"leaky_average: decay has the shape {tuple(decay.shape)}, expected {(H,)}; log_decay may "
                         "differ from token to token")
    if log_decay is not None and log_decay.shape != (B, T, H):
        raise ValueError(f"leaky_average: log_decay has the shape {tuple(log_decay.shape)}, expected {(B, T, H)}; "
                         "give decay where all tokens have the same")
    dtype = state_dtype(x.dtype)
    if state is None:
        state = x.new_zeros(B, H, D, dtype=dtype)
    if T == 0:
        return x, state

    gated = x.to(dtype)
    if log_gate is not None:
        gated = log_gate.to(dtype).exp()[..., None] * gated
    state = state.to(dtype)
    in_loop = impl == "loop" or T == 1
    if log_decay is None:
        decay = decay.to(dtype)
        y = _leaky_loop(gated, decay.expand(B, T, H), state) if in_loop else _leaky_chunk(gated, decay, state)
    else:
        log_decay = log_decay.to(dtype)
        y = _leaky_loop(gated, log_decay.exp(), state) if in_loop else _leaky_chunk_per_token(gated, log_decay, state)
    return y.to(x.dtype), y[:, -1]


def _leaky_loop(gated, decay, state):
    """Token by token; gated is g_t x_t (B,T,H,D), decay is λ_t (B,T,H)."""
    y = state                                                                           # (B,H,D)
    outputs = []
    for new, decay_t in zip(gated.unbind(1), decay.unbind(1)):      # g_t x_t (B,H,D), λ_t (B,H)
        y = new + decay_t[..., None] * y
        outputs.append(y)
    return torch.stack(outputs, 1)


def _leaky_chunk(x, decay, state):
    """The same numbers, C tokens at a time. The last y of all chunks form a sequence of their own. Its
    recurrence is the same with decay λ^C, so the function calls itself on it. That makes log_C(T) levels,
    each of them one batched C×C product."""
    B, T, H, D = x.shape
    C = min(LEAKY_CHUNK, T)
    x = F.pad(x, (0, 0, 0, 0, 0, -T % C)).view(B, -1, C, H, D)                          # (B,n,C,H,D)

    # each chunk as if nothing came before it: y = L x with L_ij = λ^(i-j) for i >= j
    i = torch.arange(C, device=x.device)
    L = torch.pow(decay[:, None, None], (i[:, None] - i).clamp(min=0)).tril()           # (H,C,C)
    y = torch.einsum("hij,bnjhd->bnihd", L, x)

    # y of the token before each chunk: the state, and then the chunks' ends
    before = state[:, None]                                                             # (B,1,H,D)
    if y.size(1) > 1:
        ends = _leaky_chunk(y[:, :-1, -1], decay ** C, state)                           # (B,n-1,H,D)
        before = torch.cat([before, ends], 1)                                           # (B,n,H,D)

    # what came before reaches position i of a chunk with weight λ^(i+1)
    weight = torch.pow(decay[None, :], i[:, None] + 1)                                  # (C,H)
    y = y + weight[:, :, None] * before[:, :, None]
    return y.reshape(B, -1, H, D)[:, :T]


def _leaky_chunk_per_token(x, log_decay, state):
    """As `_leaky_chunk`, for a λ that every token chooses. A chunk's end then has the product of
    its tokens' λ for a decay."""
    B, T, H, D = x.shape
    C = min(LEAKY_CHUNK, T)
    x = F.pad(x, (0, 0, 0, 0, 0, -T % C)).view(B, -1, C, H, D).movedim(3, 1)            # (B,H,n,C,D)
    log_decay = F.pad(log_decay, (0, 0, 0, -T % C)).view(B, -1, C, H).movedim(3, 1)     # (B,H,n,C)

    # each chunk as if nothing came before it: y = L x with L_ij = λ_{j+1} … λ_i for i >= j
    L = log_decay_between(log_decay).exp().tril()                                       # (B,H,n,C,C)
    y = L @ x

    # y of the token before each chunk: the state, and then the chunks' ends
    log_to_here = log_decay.cumsum(-1)                                                  # of λ_0 … λ_i
    before = state[:, :, None]                                                          # (B,H,1,D)
    if y.size(2) > 1:
        ends = y[:, :, :-1, -1].transpose(1, 2)                                         # (B,n-1,H,D)
        log_decay_of_chunks = log_to_here[:, :, :-1, -1].transpose(1, 2)                # (B,n-1,H)
        ends = _leaky_chunk_per_token(ends, log_decay_of_chunks, state)
        before = torch.cat([before, ends.transpose(1, 2)], 2)                           # (B,H,n,D)

    # what came before reaches position i of a chunk with weight λ_0 … λ_i
    y = y + log_to_here.exp()[..., None] * before[:, :, :, None]
    return y.movedim(1, 3).reshape(B, -1, H, D)[:, :T]


def log_decay_between(log_decay: Tensor) -> Tensor:
    """How far token j has decayed when token i comes: at [i,j] stands Σ_{j<l<=i} log_decay_l.  (...,C) -> (...,C,C)

    Only i >= j means something; elsewhere stands 0. Three tokens with the log decays a, b and c give

        0 b c                                       0 b b+c                        0   0 0
        0 0 c    in row j those after j;  summed:   0 0 c      and transposed:     b   0 0
        0 0 0                                       0 0 0                          b+c c 0

    Every pair is summed by itself. The difference of two sums from the chunk's start would be the same
    number, but where the decay is strong both sums are large, and rounding would take most of it.
    """
    C = log_decay.size(-1)
    later = log_decay[..., None, :].expand(*log_decay.shape, C).triu(1)                 # (...,C,C)
    return later.cumsum(-1).mT


# ----------------------------------------------------------------------------------------------------------------------
# Gated delta rule (Gated DeltaNet)

def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None,
                     scale: float | None = None, erase: bool = True, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,   o_t = scale · S_tᵀ q_t   (Yang et al. 2025, eq. 10).

    q, k   (B,T,H,Dk)   the keys should have unit length, or else I - β k kᵀ can expand
    v      (B,T,H,Dv)
    g      (B,T,H)      log α, at most 0
    beta   (B,T,H)      β, in [0, 2]: what the key held is multiplied by 1 - β, which is 0 at β = 1 and -1 at β = 2
    state  (B,H,Dk,Dv)  S before the first token; zeros where it is None
    scale               1/√Dk where it is None
    erase               False leaves -β k kᵀ out: S_t = α_t S_{t-1} + β_t k_t v_tᵀ, the rule of Mamba 2 (Dao and Gu
                        2024). It has no kernel: on a CUDA device, too, "auto" then takes the chunked form
    impl                see the top of this file

    Returns o (B,T,H,Dv) in v's dtype, and the new state in float32 (float64 for float64 inputs).
    Raises ValueError for an unknown impl, and for impl="triton" where there is no triton, no GPU
    (but TRITON_INTERPRET=1 needs none), or no kernel for the shape or dtype.
    Official implementation: github.com/NVlabs/GatedDeltaNet (it stores Sᵀ).
    """
    check_impl("gated_delta_rule", impl, ("auto", "loop", "chunk", "triton"))
    B, T, H, Dk = k.shape
    Dv = v.size(-1)
    dtype = state_dtype(v.dtype)
    if scale is None:
        scale = Dk ** -0.5
    if state is None:
        state = v.new_zeros(B, H, Dk, Dv, dtype=dtype)
    state = state.to(dtype)
    if T == 0:
        return v, state

    # a single token, as in generation, does not pay for a chunk
    if impl == "auto" and T == 1:
        impl = "loop"

    supported = erase and v.dtype in KERNEL_DTYPES and Dk in (16, 32, 64, 128) and Dv in (Dk, 2 * Dk)
    given = f"erase={erase}, {v.dtype}, Dk {Dk}, Dv {Dv}"
    expected = "erase=True, float32 or 16-bit, Dk 16, 32, 64 or 128, Dv = Dk or 2 Dk"
    if use_triton("gated_delta_rule", impl, v, supported, given, expected):
        return _delta_triton(q, k, v, g, beta, state, scale)
    form = _delta_loop if impl == "loop" else _delta_chunk
    o, state = form(q.to(dtype), k.to(dtype), v.to(dtype), g.to(dtype), beta.to(dtype), state, scale, erase)
    return o.to(v.dtype), state


def _delta_loop(q, k, v, log_alpha, beta, S, scale, erase):
    """Token by token: the state S is a matrix (B,H,Dk,Dv) that answers values to keys."""
    alpha = log_alpha.exp()[..., None]                                                  # (B,T,H,1)
    beta = beta[..., None]
    outputs = []
    for t in range(q.size(1)):
        # forget a little of everything: α is one number a head
        S = alpha[:, t, :, :, None] * S

        # look up what is stored at this key, and move it towards the value
        stored = read(S, k[:, t]) if erase else 0                                       # (B,H,Dv)
        error = v[:, t] - stored
        S = S + outer(k[:, t], beta[:, t] * error)

        # answer the query; scale is 1/√D unless another one is given
        outputs.append(scale * read(S, q[:, t]))
    return torch.stack(outputs, 1), S


def _delta_chunk(q, k, v, log_alpha, beta, S, scale, erase):
    """The same numbers, C tokens at a time (Yang et al. 2024, section 3; with gates Yang et al. 2025, section 3.3).

    Let S be the state at a chunk's start, γ_i the product of α from there to token i, and Γ_ij = γ_i/γ_j
    for i >= j (0 elsewhere) what is left of write j when token i comes. Token i writes v'_i, which is
    β_i times its error. What is stored at its key comes from the state at the start and from the writes
    before it in the chunk:

        v'_i = β_i (v_i - stored_i)      stored_i = γ_i Sᵀ k_i + Σ_{j<i} Γ_ij (k_i·k_j) v'_j

    So the writes V' solve a triangular system:

        (I + A) V' = diag(β) (V - diag(γ) K S)      A = tril(diag(β) (K Kᵀ ⊙ Γ), -1)

    It is linear in S. Solved for all chunks at once it is V' = U - W S, and only S walks from chunk to chunk. Without
    erasing a write does not depend on the writes before it: V' = U = diag(β) V."""
    B, T, H, Dk = k.shape
    Dv = v.size(-1)
    C = min(DELTA_CHUNK, T)

    def chunks(x):
        """(B,T,H,...) -> (B,H,n,C,...). What is padded neither forgets nor writes."""
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -T % C))
        return x.view(B, -1, C, *x.shape[2:]).movedim(3, 1)

    q = chunks(q * scale)                                                               # (B,H,n,C,Dk)
    k = chunks(k)
    v = chunks(v)
    log_alpha = chunks(log_alpha)                                                       # (B,H,n,C)
    beta = chunks(beta)[..., None]                                                      # (B,H,n,C,1)

    # what is left at token i of the state at the chunk's start, and of the write of token j
    gamma = log_alpha.cumsum(-1).exp()[..., None]                                       # γ_i  (B,H,n,C,1)
    Gamma = log_decay_between(log_alpha).exp().tril()                                   # Γ_ij  (B,H,n,C,C)
    to_end = Gamma[..., -1, :, None]                    # γ_C/γ_i, the share of write i that is left at the chunk's end

    # U = (I + A)^-1 diag(β) V   and   W = (I + A)^-1 diag(β γ) K. The solver is told that the
    # diagonal is ones, and does not read it, so that it takes A for I + A.
    beta_v = beta * v
    if erase:
        A = (beta * (k @ k.mT) * Gamma).tril(-1)
        right_side = torch.cat([beta_v, beta * gamma * k], -1)
        UW = torch.linalg.solve_triangular(A, right_side, upper=False, unitriangular=True)
        U, W = UW.split([Dv, Dk], -1)
        W = W.unbind(2)
    else:
        U = beta_v

    # walk from chunk to chunk:  V' = U - W S,   S <- γ_C S + (diag(γ_C/γ) K)ᵀ V'
    U = U.unbind(2)
    K_to_end = (to_end * k).mT.unbind(2)
    gamma_end = gamma[..., -1:, :].unbind(2)
    starts = []
    writes = []
    for n in range(len(U)):
        starts.append(S)
        write = U[n]
        if erase:
            write = write - W[n] @ S
        writes.append(write)
        S = gamma_end[n] * S + K_to_end[n] @ write

    # answer the queries:  O = diag(γ) Q S + (Q Kᵀ ⊙ Γ) V'
    from_start = (gamma * q) @ torch.stack(starts, 2)                                   # (B,H,n,C,Dv)
    o = from_start + ((q @ k.mT) * Gamma) @ torch.stack(writes, 2)
    return o.movedim(1, 3).reshape(B, -1, H, Dv)[:, :T], S


# ----------------------------------------------------------------------------------------------------------------------
# TTT-Linear

class TTTState(NamedTuple):
    """The inner model, and the mini-batch that is still running. At the start of a mini-batch
    grad_W, grad_b and pos are 0. All but pos are float32, or float64 where the inputs are."""
    W_start: Tensor  # (B,H,D,D)  the inner weights at the mini-batch's start
    b_start: Tensor  # (B,H,D)    the inner bias there
    grad_W: Tensor   # (B,H,D,D)  Σ_j η_j k_jᵀ ∇_j over the running mini-batch
    grad_b: Tensor   # (B,H,D)    Σ_j η_j ∇_j
    pos: Tensor      # ()         tokens of the mini-batch seen, 0 to K-1; int64 on the CPU: reading it waits for no GPU


def ttt_linear(q: Tensor, k: Tensor, v: Tensor, lr: Tensor, token_scale: Tensor, W: Tensor, b: Tensor,
               ln_weight: Tensor, ln_bias: Tensor, state: TTTState | None = None,
               impl: str = "auto") -> tuple[Tensor, TTTState]:
    """Gradient descent on ℓ_j = ½‖f(k_j) - v_j‖² with the inner model f(k) = k + LN(k W + b), in
    mini-batches of K tokens. Every gradient is taken at the model of the mini-batch's start. Token i
    is answered by the model that is one step from there, against the gradients of the tokens up to i.
    Vectors are rows in these equations:

        Z_j = k_j W_start + b_start                            ∇_j = ∂ℓ_j/∂Z_j
        W_i = W_start - s_i Σ_{j<=i} η_j k_jᵀ ∇_j              b_i = b_start - s_i Σ_{j<=i} η_j ∇_j
        o_i = q_i + LN(q_i W_i + b_i)                          the next mini-batch starts from W_K and b_K

    (Sun et al. 2024, sections 2.3, 2.4 and appendix A.)

    q, k, v             (B,T,H,D)
    lr                  (B,T,H)    η
    token_scale         (K,)       s, which also says how long a mini-batch is
    W, b                (H,D,D), (H,D)  W_0 and b_0, where every sequence starts; with a state they are not used
    ln_weight, ln_bias  (H,D)      of the inner LayerNorm
    state               the running mini-batch is continued exactly
    impl                see the top of this file

    Returns o (B,T,H,D) in q's dtype, and the new state. Raises ValueError for an unknown impl, and
    for impl="triton" where there is no triton, no GPU (but TRITON_INTERPRET=1 needs none), or no
    kernel for the shape or dtype.
    Official implementations: github.com/test-time-training/ttt-lm-pytorch and ttt-lm-jax.
    """
    check_impl("ttt_linear", impl, ("auto", "loop", "chunk", "triton"))
    B, T, H, D = q.shape
    K = len(token_scale)
    if state is None:
        dtype = state_dtype(q.dtype)
        W_0 = W.to(dtype).expand(B, H, D, D)
        b_0 = b.to(dtype).expand(B, H, D)
        state = TTTState(W_0, b_0, torch.zeros_like(W_0), torch.zeros_like(b_0), torch.tensor(0))
        pos = 0  # torch.compile can trace this number, but not one read from a new tensor
    else:
        pos = int(state.pos)
    if T == 0:
        return q, state

    supported = q.dtype in KERNEL_DTYPES and D in (32, 64, 128) and K in (16, 32, 64)
    given = f"{q.dtype}, D {D}, K {K}"
    expected = "float32 or 16-bit, D 32, 64 or 128, K 16, 32 or 64"
    if use_triton("ttt_linear", impl, q, supported, given, expected):
        return _ttt_triton(q, k, v, lr, token_scale, ln_weight, ln_bias, state, pos)
    form = _ttt_loop if impl == "loop" else _ttt_chunk
    return _ttt_torch(form, q, k, v, lr, token_scale, ln_weight, ln_bias, state, pos)


def _ttt_torch(form, q, k, v, lr, token_scale, ln_weight, ln_bias, state, pos):
    """The loop or the chunked form, computed in the state's dtype."""
    dtype = state_dtype(q.dtype)
    inputs = [x.to(dtype) for x in (q, k, v, lr, token_scale, ln_weight, ln_bias)]
    o, state = form(*inputs, state, pos)
    return o.to(q.dtype), state


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LN(z) over the last axis, with the biased variance. z (...,H,D), weight and bias (H,D) -> (...,H,D)"""
    return F.layer_norm(z, z.shape[-1:], eps=LN_EPS) * weight + bias


def ttt_gradient(z: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """∂/∂z of ½‖LN(z) - target‖² in closed form. With ẑ = (z - μ)/σ and e = ∂ℓ/∂ẑ it is

        (e - mean(e) - ẑ mean(e ẑ)) / σ

    Shapes as in `layer_norm`; target and the result have the shape of z.
    """
    var, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
    inv_sigma = (var + LN_EPS).rsqrt()
    z_hat = (z - mean) * inv_sigma
    e = (weight * z_hat + bias - target) * weight
    return (e - e.mean(-1, keepdim=True) - z_hat * (e * z_hat).mean(-1, keepdim=True)) * inv_sigma


def _ttt_loop(q, k, v, lr, token_scale, ln_weight, ln_bias, state, pos):
    """Token by token. The state is an inner model, which learns to answer each key with its value."""
    W_start, b_start, grad_W, grad_b, _ = state
    lr = lr[..., None]                                                                  # (B,T,H,1)
    outputs = []
    for t in range(q.size(1)):
        # Which way does this token's loss rise, at the model of the mini-batch's start? Its answer
        # f(k) = k + LN(z) should be v, so LN(z) should be v - k.
        z = read(W_start, k[:, t]) + b_start                                            # (B,H,D)
        grad = ttt_gradient(z, v[:, t] - k[:, t], ln_weight, ln_bias)

        # add that to the directions of the mini-batch's tokens before it
        grad_W = grad_W + outer(k[:, t], lr[:, t] * grad)
        grad_b = grad_b + lr[:, t] * grad

        # step the other way, from the mini-batch's start
        W = W_start - token_scale[pos] * grad_W
        b = b_start - token_scale[pos] * grad_b

        # answer the query with the model after the step
        outputs.append(q[:, t] + layer_norm(read(W, q[:, t]) + b, ln_weight, ln_bias))

        # the next mini-batch starts where this one ends
        pos = pos + 1
        if pos == len(token_scale):
            W_start = W
            b_start = b
            grad_W = torch.zeros_like(W)
            grad_b = torch.zeros_like(b)
            pos = 0
    return torch.stack(outputs, 1), TTTState(W_start, b_start, grad_W, grad_b, torch.tensor(pos))


def _ttt_chunk(q, k, v, lr, token_scale, ln_weight, ln_bias, state, pos):
    """The same numbers, a mini-batch at a time (the dual form). No W_i is built, since for tokens i, j of a mini-batch

        q_i W_i + b_i = q_i W_start + b_start - s_i Σ_{j<=i} (q_i·k_j + 1) η_j ∇_j
    """
    W_start, b_start, earlier_grad_W, earlier_grad_b, _ = state
    K = len(token_scale)
    T = q.size(1)

    # Mini-batches lie on absolute positions: the first piece completes the running one, the last may remain incomplete.
    sizes = [min(K - pos, T)]
    while sum(sizes) < T:
        sizes.append(min(K, T - sum(sizes)))

    q = q.transpose(1, 2)                                                               # (B,H,T,D)
    k = k.transpose(1, 2)
    targets = (v.transpose(1, 2) - k).split(sizes, 2)
    rates = lr.transpose(1, 2)[..., None].split(sizes, 2)                               # (B,H,·,1)
    ln_weight = ln_weight[:, None]                                                      # (H,1,D)
    ln_bias = ln_bias[:, None]

    # The walk does only what the next mini-batch has to wait for.
    seen = pos      # tokens of the first mini-batch that earlier calls have read
    grad_W = earlier_grad_W
    grad_b = earlier_grad_b
    W_starts = []
    b_starts = []
    lr_grads = []                                                                       # η_j ∇_j
    for n, keys in enumerate(k.split(sizes, 2)):
        # all gradients are taken at the mini-batch's start
        z = keys @ W_start + b_start[:, :, None]
        lr_grad = rates[n] * ttt_gradient(z, targets[n], ln_weight, ln_bias)
        W_starts.append(W_start)
        b_starts.append(b_start)
        lr_grads.append(lr_grad)

        # the next mini-batch starts where this one ends
        grad_W = grad_W + keys.mT @ lr_grad
        grad_b = grad_b + lr_grad.sum(2)
        pos = pos + keys.size(2)
        if pos == K:
            W_start = W_start - token_scale[-1] * grad_W
            b_start = b_start - token_scale[-1] * grad_b
            grad_W = torch.zeros_like(W_start)
            grad_b = torch.zeros_like(b_start)
            pos = 0

    # Then the queries of all mini-batches at once. In the first mini-batch zeros stand for the tokens
    # of earlier calls, in the last one for those that have not come: they change nothing.
    def by_mini_batch(x):
        lacking = len(sizes) * K - seen - T
        return F.pad(x, (0, 0, seen, lacking)).unflatten(2, (len(sizes), K))            # (B,H,n,K,D)

    queries = by_mini_batch(q)
    weights = (queries @ by_mini_batch(k).mT + 1).tril()                                # the 1 is the bias's share
    step = weights @ by_mini_batch(torch.cat(lr_grads, 2))
    if seen > 0:    # add what the tokens that earlier calls have read contribute to the first mini-batch
        earlier = queries[:, :, :1] @ earlier_grad_W[:, :, None] + earlier_grad_b[:, :, None, None]
        step = torch.cat([step[:, :, :1] + earlier, step[:, :, 1:]], 2)
    z_at_start = queries @ torch.stack(W_starts, 2) + torch.stack(b_starts, 2)[..., None, :]
    z_q = z_at_start - token_scale[:, None] * step
    z_q = z_q.flatten(2, 3)[:, :, seen:seen + T]

    o = q + layer_norm(z_q, ln_weight, ln_bias)
    return o.transpose(1, 2), TTTState(W_start, b_start, grad_W, grad_b, torch.tensor(pos))


# ----------------------------------------------------------------------------------------------------------------------
# What the kernels share
#
# Names in a kernel begin with what they are: i_ an index, o_ offsets along an axis, m_ a mask, p_ a
# position in a tensor, b_ a block of numbers in registers. Names without a prefix are the
# arguments: pointers to tensors, sizes, and in capitals the constants that a kernel is compiled
# for.

# The tuned choices (block sizes, warps, pipeline stages), for the first measurement on a device to
# correct. They were made from bytes, programs in flight and the compiler's report, for the shapes
# B8 T4096 H6 D128 and B16 T2048 H12 D64. Products with 64 rows and 4 warps or more become wgmma on
# Hopper. The kernels keep wgmma's left factor in shared memory, because the ptxas of triton 3.6
# miscompiled left factors in registers; with 3.7.1 this has not been tried again.
TUNING = {
    "delta_prep": dict(BD=32, num_warps=1, num_stages=1),
    "delta_walk": dict(BV=32, num_warps=4, num_stages=3),           # B·H·Dv/BV programs; an H200 has room for 264
    "delta_grads": dict(BK=16, num_warps=4, num_stages=1),
    "ttt_output": dict(num_warps=4, num_stages=1),
    "ttt_grads": dict(BD=16, num_warps=4, num_stages=1),
    ("ttt_walk", 32): dict(num_warps=2, num_stages=2),              # W (D, D) in registers: at most 64 a thread
    ("ttt_walk", 64): dict(num_warps=4, num_stages=2),
    ("ttt_walk", 128): dict(num_warps=8, num_stages=2),
}


def kernel(function):
    """Makes a function a Triton kernel. Triton turns an argument that equals 1 into a constant; n,
    the number of rounds of a loop, must stay a variable, or a loop of one round would be compiled
    into something else."""
    if triton is None:
        return function
    return triton.jit(function, do_not_specialize=["n"])


def tuned(row, dtype: torch.dtype, largest: int | None = None) -> dict:
    """A row of TUNING as launch options. No block is wider than `largest`, the dimension that it divides;
    a row with a block needs it.

    float32 is there to be exact and not to be fast. Each of its products is three products in tf32,
    or, where these would not fit into shared memory, one in float32 proper (ieee). For 16-bit inputs
    the precision has no effect."""
    options = dict(TUNING[row])
    for block in ("BV", "BK", "BD"):
        if block in options:
            options[block] = min(options[block], largest)

    options["PREC"] = "tf32"
    if dtype == torch.float32:
        options["PREC"] = "ieee" if row in ("delta_grads", "ttt_grads") else "tf32x3"
    return options


def launch(fn, grid: tuple, args: tuple, options: dict) -> None:
    """Starts a kernel, one program for each point of the grid."""
    with torch.cuda.device_of(args[0]):
        fn[grid](*args, **options)


def launch_nothing(fn, grid: tuple, args: tuple, options: dict) -> None:
    """Stands for `launch` where only the shapes of the outputs matter."""


def operator(run, outputs: int):
    """Makes run(launch, *inputs) -> outputs an operator, which torch.compile leaves alone without a
    graph break. While it traces, torch.compile asks for the shapes of the outputs; `run` then gets
    a launch that starts nothing."""
    kinds = {"scale": "float", "save": "bool"}
    names = list(inspect.signature(run).parameters)[1:]
    inputs = ", ".join(f"{kinds.get(name, 'Tensor')} {name}" for name in names)
    results = ", ".join(["Tensor"] * outputs)

    op = torch.library.custom_op(f"nanomem::{run.__name__.strip('_')}", partial(run, launch), mutates_args=(),
                                 schema=f"({inputs}) -> ({results})")
    op.register_fake(partial(run, launch_nothing))
    return op


# ----------------------------------------------------------------------------------------------------------------------
# The gated delta rule in Triton
#
# In the symbols of _delta_chunk, but in errors E and not in writes V' = diag(β) E, so that β stands on the right of
# a product: with S the state at a chunk's start the forward pass is
#
#     R = V - diag(γ) K S                 the error of each value, if nothing of this chunk had been written yet
#     E = (I + L ⊙ Γ)^-1 R                the error of each token, as in _delta_loop;  L = tril(K Kᵀ, -1) diag(β)
#     O = scale diag(γ) Q S + P diag(β) E                                  P = scale tril(Q Kᵀ) ⊙ Γ
#     S <- γ_C S + (diag(γ_C/γ) K)ᵀ diag(β) E
#
# The inverse and P do not need S, so that a first kernel computes them for all chunks at once
# (_delta_prep). A second one walks from chunk to chunk and does only what needs S (_delta_forward).
# In the backward pass a third one walks back with the gradient of S (_delta_backward), and a fourth
# one does all the rest for all chunks at once (_delta_grads). The inverse is taken without gates and
# gated where it is stored, because (I + L ⊙ Γ)^-1 = (I + L)^-1 ⊙ Γ where Γ_ij = γ_i/γ_j.

@kernel
def _delta_prep(q, k, log_alpha, beta, log_gamma, inverse, P, T, scale, H: tl.constexpr, D: tl.constexpr,
                BD: tl.constexpr, PREC: tl.constexpr):
    """log γ = cumsum(log α)      inverse = (I + L)^-1 ⊙ Γ,  L = tril(K Kᵀ, -1) diag(β)      P = scale tril(Q Kᵀ) ⊙ Γ

    There is one program for each chunk of 32 tokens of each head. In registers are the 32×32 products, summed
    over BD columns of q and k at a time. It reads q, k, log α and β once, and writes log γ and two
    triangles. The two 16×16 blocks on the diagonal are inverted by forward substitution, both at
    once, and merged by products. A power series of L would overflow where keys are alike."""
    i_n = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    n = tl.num_programs(0)
    i_b = i_bh // H
    i_h = i_bh % H
    q = q + (i_b * T * H + i_h) * D
    k = k + (i_b * T * H + i_h) * D
    beta = beta + i_b * T * H + i_h
    log_alpha = log_alpha + i_b * T * H + i_h
    o_c = tl.arange(0, 32)
    o_t = i_n * 32 + o_c
    m_t = o_t < T                                                   # beyond T are zeros, which write and forget nothing

    # K Kᵀ and Q Kᵀ
    b_KK = tl.zeros([32, 32], tl.float32)
    b_P = tl.zeros([32, 32], tl.float32)
    for i_d in range(D // BD):
        p_k = o_t[:, None] * (H * D) + i_d * BD + tl.arange(0, BD)[None, :]
        b_q = tl.load(q + p_k, mask=m_t[:, None], other=0.0)
        b_k = tl.load(k + p_k, mask=m_t[:, None], other=0.0)
        b_KK = tl.dot(b_k, tl.trans(b_k), b_KK, input_precision=PREC)
        b_P = tl.dot(b_q, tl.trans(b_k), b_P, input_precision=PREC)
    b_beta = tl.load(beta + o_t * H, mask=m_t, other=0.0)
    b_log_gamma = tl.cumsum(tl.load(log_alpha + o_t * H, mask=m_t, other=0.0), 0)

    # X, the inverse of I + the blocks of L on the diagonal:  row_i = e_i - Σ_{j<i} L_ij row_j
    m_block = (o_c[:, None] // 16) == (o_c[None, :] // 16)
    b_LT = tl.where(m_block & (o_c[:, None] < o_c[None, :]), b_KK * b_beta[:, None], 0.0)  # Lᵀ: K Kᵀ is symmetric
    b_X = tl.where(o_c[:, None] == o_c[None, :], 1.0, 0.0)
    for i in range(1, 16):
        b_column = tl.sum(tl.where((o_c % 16 == i)[None, :], b_LT, 0.0), 1)               # L_ij, j along the rows
        b_row = tl.sum(b_column[:, None] * b_X, 0)
        b_X = tl.where(m_block & (o_c % 16 == i)[:, None], b_X - b_row[None, :], b_X)

    # merged with M, the block of L below those on the diagonal:  (X^-1 + M)^-1 = X - X M X, because M X M = 0
    b_M = tl.where(m_block, 0.0, tl.where(o_c[:, None] > o_c[None, :], b_KK * b_beta[None, :], 0.0))
    b_inverse = tl.dot(b_M, b_X, input_precision="tf32x3")          # float32, in three products of tf32
    b_inverse = b_X - tl.dot(b_X, b_inverse, input_precision="tf32x3")

    # Γ from differences of log γ, which a chunk of 32 tokens leaves exact enough. They are at most 0
    # where i >= j, while γ itself may underflow and 1/γ overflow.
    b_log_Gamma = tl.where(o_c[:, None] >= o_c[None, :], b_log_gamma[:, None] - b_log_gamma[None, :], float("-inf"))
    b_Gamma = tl.exp(b_log_Gamma)
    p_C = (i_bh * n + i_n) * 1024 + o_c[:, None] * 32 + o_c[None, :]
    tl.store(log_gamma + (i_bh * n + i_n) * 32 + o_c, b_log_gamma)
    tl.store(inverse + p_C, (b_inverse * b_Gamma).to(inverse.dtype.element_ty))
    tl.store(P + p_C, (b_P * (b_Gamma * scale)).to(P.dtype.element_ty))


@kernel
def _delta_chunk_of(q, k, beta, log_gamma, inverse, P, i_n, T, H: tl.constexpr, DK: tl.constexpr):
    """What both walks load of chunk i_n of their head: q, k (32, DK), inverse, P (32, 32), β, log γ (32,), log γ_C."""
    o_c = tl.arange(0, 32)
    o_t = i_n * 32 + o_c
    m_t = o_t < T
    p_k = o_t[:, None] * (H * DK) + tl.arange(0, DK)[None, :]       # (32, DK)
    p_C = i_n * 1024 + o_c[:, None] * 32 + o_c[None, :]
    b_q = tl.load(q + p_k, mask=m_t[:, None], other=0.0)
    b_k = tl.load(k + p_k, mask=m_t[:, None], other=0.0)
    b_beta = tl.load(beta + o_t * H, mask=m_t, other=0.0)
    b_log_gamma = tl.load(log_gamma + i_n * 32 + o_c)
    b_log_gamma_C = tl.load(log_gamma + i_n * 32 + 31)
    return b_q, b_k, tl.load(inverse + p_C), tl.load(P + p_C), b_beta, b_log_gamma, b_log_gamma_C


@kernel
def _delta_forward(q, k, v, beta, log_gamma, inverse, P, S_start, o, error, S_chunk, S_end, T, n, scale,
                   H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, SAVE: tl.constexpr, BV: tl.constexpr,
                   PREC: tl.constexpr):
    """R = V - γ K S      E = inverse R      O = scale γ Q S + P (β E)      S <- γ_C S + (γ_C/γ K)ᵀ (β E)

    There is one program for a head and BV columns of V; it walks the chunks. In registers is Sᵀ
    (BV, DK) in float32. It reads q, k, v, inverse and P, and writes o; for the backward pass also
    E, and the state at the start of every second chunk. There are only B·H·DV/BV programs, which is
    why nothing is done here that does not need S. The slices of one head read the
    same q, k, inverse and P, from the L2 cache. Chunks are of 32 and not of 64 tokens, because that
    halves inverse, P and the products with them."""
    i_v = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    q = q + (i_b * T * H + i_h) * DK
    k = k + (i_b * T * H + i_h) * DK
    v = v + (i_b * T * H + i_h) * DV
    o = o + (i_b * T * H + i_h) * DV
    error = error + (i_b * T * H + i_h) * DV
    beta = beta + i_b * T * H + i_h
    log_gamma = log_gamma + i_bh * n * 32
    inverse = inverse + i_bh * n * 1024
    P = P + i_bh * n * 1024

    o_c = tl.arange(0, 32)
    o_k = tl.arange(0, DK)
    o_v = i_v * BV + tl.arange(0, BV)
    p_S = i_bh * DK * DV + o_v[:, None] + o_k[None, :] * DV         # (BV, DK): Sᵀ
    b_S = tl.load(S_start + p_S)
    for i_n in range(n):
        # everything of the chunk; beyond T are zeros
        o_t = i_n * 32 + o_c
        m_t = o_t < T
        p_v = o_v[:, None] + o_t[None, :] * (H * DV)                # (BV, 32): Vᵀ
        b_v = tl.load(v + p_v, mask=m_t[None, :], other=0.0)
        b_q, b_k, b_inverse, b_P, b_beta, b_log_gamma, b_log_gamma_C = _delta_chunk_of(
            q, k, beta, log_gamma, inverse, P, i_n, T, H, DK)
        b_S_low = b_S.to(b_k.dtype)                                 # S in the precision of the products
        if SAVE and i_n % 2 == 0:
            tl.store(S_chunk + (i_bh * n + i_n) // 2 * (DK * DV) + o_v[:, None] * DK + o_k[None, :], b_S_low)

        # Oᵀ <- scale γ (Q S)ᵀ      Rᵀ = Vᵀ - γ (K S)ᵀ      Eᵀ = (inverse R)ᵀ
        b_o = tl.dot(b_S_low, tl.trans(b_q), input_precision=PREC) * (tl.exp(b_log_gamma) * scale)[None, :]
        b_R = b_v - tl.dot(b_S_low, tl.trans(b_k), input_precision=PREC) * tl.exp(b_log_gamma)[None, :]
        b_E = tl.dot(b_R.to(b_k.dtype), tl.trans(b_inverse), input_precision=PREC)
        if SAVE:
            tl.store(error + p_v, b_E.to(b_k.dtype), mask=m_t[None, :])

        # what is written, β E, is read by this chunk's queries:  Oᵀ <- Oᵀ + (P β E)ᵀ
        b_write = b_E * b_beta[None, :]
        b_o = tl.dot(b_write.to(b_k.dtype), tl.trans(b_P), b_o, input_precision=PREC)
        tl.store(o + p_v, b_o.to(b_k.dtype), mask=m_t[None, :])

        # and what is left of it at the chunk's end goes into the state:  Sᵀ <- γ_C Sᵀ + (γ_C/γ β E)ᵀ K
        b_write = (b_write * tl.exp(b_log_gamma_C - b_log_gamma)[None, :]).to(b_k.dtype)
        b_S = tl.dot(b_write, b_k, b_S * tl.exp(b_log_gamma_C), input_precision=PREC)
    tl.store(S_end + p_S, b_S)


@kernel
def _delta_backward(q, k, do, beta, log_gamma, inverse, P, dS_end, dv, dS_chunk, dS_start, T, n, scale,
                    H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, PREC: tl.constexpr):
    """dV' = Pᵀ dO + γ_C/γ K dS      dV = inverseᵀ (β dV')      dS <- γ_C dS + scale (γ Q)ᵀ dO - (γ K)ᵀ dV

    V' = β E is what is written. This is the forward walk in reverse, cut the same way. In registers
    is dSᵀ (BV, DK). It reads q, k, do, inverse and P, and writes dv and the gradient of the state
    at the end of every second chunk. Of the forward pass it needs no activation but inverse and
    P."""
    # pointers to this head, as in _delta_forward
    i_v = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    q = q + (i_b * T * H + i_h) * DK
    k = k + (i_b * T * H + i_h) * DK
    do = do + (i_b * T * H + i_h) * DV
    dv = dv + (i_b * T * H + i_h) * DV
    beta = beta + i_b * T * H + i_h
    log_gamma = log_gamma + i_bh * n * 32
    inverse = inverse + i_bh * n * 1024
    P = P + i_bh * n * 1024

    o_c = tl.arange(0, 32)
    o_k = tl.arange(0, DK)
    o_v = i_v * BV + tl.arange(0, BV)
    p_S = i_bh * DK * DV + o_v[:, None] + o_k[None, :] * DV         # (BV, DK): Sᵀ
    b_dS = tl.load(dS_end + p_S)
    for i in range(n):
        # everything of the chunk; beyond T are zeros
        i_n = n - 1 - i
        o_t = i_n * 32 + o_c
        m_t = o_t < T
        p_v = o_v[:, None] + o_t[None, :] * (H * DV)                # (BV, 32): Vᵀ
        b_do = tl.load(do + p_v, mask=m_t[None, :], other=0.0)
        b_q, b_k, b_inverse, b_P, b_beta, b_log_gamma, b_log_gamma_C = _delta_chunk_of(
            q, k, beta, log_gamma, inverse, P, i_n, T, H, DK)
        b_dS_low = b_dS.to(b_k.dtype)                               # dS in the precision of the products
        if i_n % 2 == 1:
            tl.store(dS_chunk + (i_bh * n + i_n) // 2 * (DK * DV) + o_v[:, None] * DK + o_k[None, :], b_dS_low)

        # a write is read by the next chunk's state and by this chunk's queries:  dV'ᵀ = γ_C/γ (K dS)ᵀ + (Pᵀ dO)ᵀ
        b_dwrite = tl.dot(b_dS_low, tl.trans(b_k), input_precision=PREC) * tl.exp(b_log_gamma_C - b_log_gamma)[None, :]
        b_dwrite = tl.dot(b_do, b_P, b_dwrite, input_precision=PREC)

        # R = V - γ K S, so that dR = dV:  dVᵀ = (inverseᵀ β dV')ᵀ
        b_dv = tl.dot((b_dwrite * b_beta[None, :]).to(b_k.dtype), b_inverse, input_precision=PREC)
        tl.store(dv + p_v, b_dv.to(b_k.dtype), mask=m_t[None, :])

        # dSᵀ <- γ_C dSᵀ + scale (γ dO)ᵀ Q - (γ dV)ᵀ K
        b_do = (b_do * (tl.exp(b_log_gamma) * scale)[None, :]).to(b_k.dtype)
        b_dS = tl.dot(b_do, b_q, b_dS * tl.exp(b_log_gamma_C), input_precision=PREC)
        b_dS = tl.dot((b_dv * -tl.exp(b_log_gamma)[None, :]).to(b_k.dtype), b_k, b_dS, input_precision=PREC)
    tl.store(dS_start + p_S, b_dS)


@kernel
def _delta_grads(q, k, log_alpha, beta, do, error, dv, S_chunk, dS_chunk, dq, dk, dlog_alpha, dbeta, T, scale,
                 H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr):
    """A key k_i acts twice: it reads (in R, and in the rows of L), and it writes (in S, and in the columns of L and P).

        dP = scale tril(dO Eᵀ ⊙ Γ)                  dL = tril(dV Eᵀ ⊙ Γ, -1)
        dq = scale γ dO Sᵀ + dP (β K)               -dk_read = γ dV Sᵀ + dL (β K)
        dk_write = β x,  x = γ_C/γ E dSᵀ + dPᵀ Q - dLᵀ K        dβ_i = k_i·x_i

    γ enters in four places only: γ_i multiplies q_i, and k_i where it reads; 1/γ_j multiplies k_j where
    it writes; and γ_C multiplies what the chunk adds up to, its end state S'. A factor's gradient follows from that
    of what it multiplies; C is the chunk's last token:

        d(log γ_j) = q_j·dq_j + k_j·dk_read_j - k_j·dk_write_j + (for j = C) ⟨S', dS⟩
        d(log α_i) = Σ_{j = i … C} d(log γ_j)

    There is one program for each chunk of 64 tokens of each head. E and dV are the same however long
    chunks are, so that these may be longer than the walk's. In registers are dP and dL, and BK rows at a time of
    dqᵀ, dk_readᵀ and xᵀ, which would not fit as a whole. It reads q, k, dO, E, dV, S and dS, and
    writes dq, dk, d(log α) and dβ, all once."""
    i_n = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    n = tl.num_programs(0)
    i_b = i_bh // H
    i_h = i_bh % H
    o_c = tl.arange(0, 64)
    o_v = tl.arange(0, DV)
    o_t = i_n * 64 + o_c
    m_t = o_t < T
    q = q + (i_b * T * H + i_h) * DK
    k = k + (i_b * T * H + i_h) * DK
    dq = dq + (i_b * T * H + i_h) * DK
    dk = dk + (i_b * T * H + i_h) * DK
    p_v = (i_b * T * H + i_h) * DV + o_t[:, None] * (H * DV) + o_v[None, :]
    p_gate = i_b * T * H + i_h + o_t * H
    S_chunk = S_chunk + (i_bh * n + i_n) * (DK * DV)
    dS_chunk = dS_chunk + (i_bh * n + i_n) * (DK * DV)
    b_E = tl.load(error + p_v, mask=m_t[:, None], other=0.0)
    b_do = tl.load(do + p_v, mask=m_t[:, None], other=0.0)
    b_dv = tl.load(dv + p_v, mask=m_t[:, None], other=0.0)
    b_beta = tl.load(beta + p_gate, mask=m_t, other=0.0)
    b_log_alpha = tl.load(log_alpha + p_gate, mask=m_t, other=0.0)

    # the gates of this chunk of 64, from log α anew
    b_log_gamma = tl.cumsum(b_log_alpha, 0)
    b_log_gamma_C = tl.sum(b_log_alpha, 0)
    b_log_Gamma = tl.where(o_c[:, None] >= o_c[None, :], b_log_gamma[:, None] - b_log_gamma[None, :], float("-inf"))
    b_Gamma = tl.exp(b_log_Gamma)

    # dP = scale tril(dO Eᵀ ⊙ Γ)      dL = tril(dV Eᵀ ⊙ Γ, -1)
    b_dP = (tl.dot(b_do, tl.trans(b_E), input_precision=PREC) * (b_Gamma * scale)).to(b_E.dtype)
    b_dL = tl.dot(b_dv, tl.trans(b_E), input_precision=PREC) * b_Gamma
    b_dL = tl.where(o_c[:, None] > o_c[None, :], b_dL, 0.0).to(b_E.dtype)

    b_gamma = tl.exp(b_log_gamma)
    b_to_end = tl.exp(tl.minimum(b_log_gamma_C - b_log_gamma, 0.0))
    b_dlog_gamma = tl.zeros([64], tl.float32)
    b_dbeta = tl.zeros([64], tl.float32)
    b_dlog_gamma_C = tl.zeros([64], tl.float32)                     # ⟨S', dS⟩, in parts
    for i_k in range(DK // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        p_k = o_k[:, None] + o_t[None, :] * (H * DK)                # (BK, 64): Kᵀ
        p_S = o_k[:, None] + o_v[None, :] * DK                      # (BK, DV): S
        b_q = tl.load(q + p_k, mask=m_t[None, :], other=0.0)
        b_k = tl.load(k + p_k, mask=m_t[None, :], other=0.0)
        b_S = tl.load(S_chunk + p_S)
        b_dS = tl.load(dS_chunk + p_S)
        b_beta_k = (b_k * b_beta[None, :]).to(b_k.dtype)

        # dqᵀ = scale γ (dO Sᵀ)ᵀ + (dP β K)ᵀ
        b_dq = tl.dot(b_S, tl.trans(b_do), input_precision=PREC) * (b_gamma * scale)[None, :]
        b_dq = tl.dot(b_beta_k, tl.trans(b_dP), b_dq, input_precision=PREC)
        tl.store(dq + p_k, b_dq.to(b_k.dtype), mask=m_t[None, :])

        # -dk_readᵀ = γ (dV Sᵀ)ᵀ + (dL β K)ᵀ
        b_read = tl.dot(b_S, tl.trans(b_dv), input_precision=PREC) * b_gamma[None, :]
        b_read = tl.dot(b_beta_k, tl.trans(b_dL), b_read, input_precision=PREC)

        # xᵀ = γ_C/γ (E dSᵀ)ᵀ, which with β K is the part of ⟨S', dS⟩ that this chunk wrote; the other is γ_C ⟨S, dS⟩
        b_x = tl.dot(b_dS, tl.trans(b_E), input_precision=PREC) * b_to_end[None, :]
        b_dlog_gamma_C += tl.sum(b_x * b_beta_k, 0)
        b_decayed = tl.exp(b_log_gamma_C) * tl.sum(tl.sum(b_S.to(tl.float32) * b_dS, 1), 0)
        b_dlog_gamma_C += tl.where(o_c == 0, b_decayed, 0.0)

        # xᵀ <- xᵀ + (dPᵀ Q)ᵀ - (dLᵀ K)ᵀ      dβ = k·x      dk_writeᵀ = β xᵀ
        b_x = tl.dot(b_q, b_dP, b_x, input_precision=PREC)
        b_x -= tl.dot(b_k, b_dL, input_precision=PREC)
        b_dbeta += tl.sum(b_x * b_k, 0)
        b_write = b_x * b_beta[None, :]
        b_dlog_gamma += tl.sum(b_q * b_dq - b_k * (b_read + b_write), 0)
        tl.store(dk + p_k, (b_write - b_read).to(b_k.dtype), mask=m_t[None, :])

    # log γ_i is a sum, in which log α_j stands for every i >= j
    b_dlog_gamma += tl.where(o_c == 63, tl.sum(b_dlog_gamma_C, 0), 0.0)
    tl.store(dlog_alpha + p_gate, tl.cumsum(b_dlog_gamma, 0, reverse=True), mask=m_t)
    tl.store(dbeta + p_gate, b_dbeta, mask=m_t)


def _delta_forward_run(launch, q, k, v, log_alpha, beta, S_start, scale, save):
    """The forward pass on contiguous tensors. With `save` it keeps what the backward pass needs."""
    B, T, H, DK = q.shape
    DV = v.size(-1)
    n = 2 * triton.cdiv(T, 64)                                      # chunks of 32: an even number
    log_gamma = log_alpha.new_empty(B * H * n, 32)
    inverse = q.new_empty(B * H * n, 32, 32)
    P = q.new_empty(B * H * n, 32, 32)
    launch(_delta_prep, (n, B * H), (q, k, log_alpha, beta, log_gamma, inverse, P, T, scale, H, DK),
           tuned("delta_prep", q.dtype, DK))

    o = torch.empty_like(v)
    S_end = torch.empty_like(S_start)
    error = torch.empty_like(v) if save else q.new_empty(0)
    S_chunk = q.new_empty(B * H * n // 2, DV, DK) if save else q.new_empty(0)
    launch(_delta_forward, (triton.cdiv(DV, TUNING["delta_walk"]["BV"]), B * H),
           (q, k, v, beta, log_gamma, inverse, P, S_start, o, error, S_chunk, S_end, T, n, scale, H, DK, DV, save),
           tuned("delta_walk", q.dtype, DV))
    return o, S_end, error, S_chunk, log_gamma, inverse, P


def _delta_backward_run(launch, q, k, log_alpha, beta, do, dS_end, error, S_chunk, log_gamma, inverse, P, scale):
    """The gradients of q, k, v, log α, β and the first state."""
    B, T, H, DK = q.shape
    DV = do.size(-1)
    n = 2 * triton.cdiv(T, 64)
    dv = torch.empty_like(do)
    dS_chunk = torch.empty_like(S_chunk)
    dS_start = torch.empty_like(dS_end)
    launch(_delta_backward, (triton.cdiv(DV, TUNING["delta_walk"]["BV"]), B * H),
           (q, k, do, beta, log_gamma, inverse, P, dS_end, dv, dS_chunk, dS_start, T, n, scale, H, DK, DV),
           tuned("delta_walk", q.dtype, DV))

    dq = torch.empty_like(q)
    dk = torch.empty_like(k)
    dlog_alpha = torch.empty_like(log_alpha)
    dbeta = torch.empty_like(beta)
    launch(_delta_grads, (n // 2, B * H),
           (q, k, log_alpha, beta, do, error, dv, S_chunk, dS_chunk, dq, dk, dlog_alpha, dbeta, T, scale, H, DK, DV),
           tuned("delta_grads", q.dtype, DK))
    return dq, dk, dv, dlog_alpha, dbeta, dS_start


_delta_forward_op = operator(_delta_forward_run, 7)
_delta_backward_op = operator(_delta_backward_run, 6)


def _delta_save(ctx, inputs, output):
    """Keeps for the backward pass what it needs of the forward one."""
    q, k, v, log_alpha, beta, S_start, ctx.scale, save = inputs
    o, S_end, *saved = output
    ctx.save_for_backward(q, k, log_alpha, beta, *saved)
    ctx.set_materialize_grads(False)                                # or zeros would be made for every unused output


def _delta_autograd(ctx, do, dS_end, *unused):
    """The gradients of the arguments of _delta_forward_run."""
    q, k, log_alpha, beta, error, *saved = ctx.saved_tensors
    B, T, H, DK = q.shape
    do = torch.zeros_like(error) if do is None else do.contiguous()
    dS_end = log_alpha.new_zeros(B, H, DK, error.size(-1)) if dS_end is None else dS_end.contiguous()
    gradients = _delta_backward_op(q, k, log_alpha, beta, do, dS_end, error, *saved, ctx.scale)
    return *gradients, None, None                                   # none for scale and save


_delta_forward_op.register_autograd(_delta_autograd, setup_context=_delta_save)


def _delta_triton(q, k, v, g, beta, state, scale):
    """gated_delta_rule by the kernels, which take contiguous tensors: q, k, v of one dtype, the rest in float32."""
    inputs = [x.contiguous() for x in (q.to(v.dtype), k.to(v.dtype), v, g.float(), beta.float(), state)]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    o, state, *_ = _delta_forward_op(*inputs, float(scale), save)
    return o, state


# ----------------------------------------------------------------------------------------------------------------------
# TTT-Linear in Triton
#
# W and b walk from mini-batch to mini-batch, and LayerNorm needs whole rows. So there is one
# program for a head and a chain of T/K steps, each as short as it can be (_ttt_forward). The
# reverse walk is the same chain for dW and db (_ttt_backward); for it the forward pass leaves ẑ and
# 1/σ of both LayerNorms, that of a key's answer Z = K W + b and that of a query's answer Zq. What
# only uses W or dW leaves the chain: the outputs, dq and dk. They need W at the start and dW at the
# end of every 64 tokens. In between, the W of a mini-batch is a sum over the tokens before it, so
# that a kernel that is parallel over chunks of 64 does the rest with masks, as in attention
# (_ttt_output and _ttt_grads).
#
# G stands for the rows η_j ∇_j, which the kernels keep as lr_grad. LN's derivative takes a gradient
# e at ẑ to (e - mean e - ẑ mean(e ẑ))/σ at Z.

@kernel
def _centred(b_e, b_z_hat, D: tl.constexpr):
    """e - mean e - ẑ mean(e ẑ), the derivative of LayerNorm times σ, for rows of length D."""
    return b_e - tl.sum(b_e, 1)[:, None] / D - b_z_hat * (tl.sum(b_e * b_z_hat, 1) / D)[:, None]


@kernel
def _ttt_forward(k, v, lr, token_scale, W_start, b_start, ln_weight, ln_bias, lr_grad, z_hat, inv_sigma, W_chunk,
                 b_chunk, W_end, b_end, T, n, EPS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
                 SAVE: tl.constexpr, PREC: tl.constexpr):
    """Z = K W + b      1/σ = 1/σ(Z), ẑ = (Z - mean Z)/σ      G = η ∂ℓ/∂Z      W <- W - s Kᵀ G      b <- b - s Σ G

    Here K are the keys, and s is the factor of a mini-batch's last position (in other formulas of TTT's kernels s_K).
    There is one program for a head; it walks the mini-batches. In registers are W (D, D) and b in
    float32. It reads k, v and η, and writes G, and W and b at the start of every 64 tokens; for the
    backward pass also ẑ and 1/σ. A step of W is taken late, at the start of the next iteration, so
    that K W is the last product of the loop. The reason is that the compiler lays all products of a loop
    out among the warps like the last one, and K W can be divided by its columns. A mini-batch of more than 16
    tokens is walked in pieces of 16. W_start and b_start are those of the first mini-batch; in
    registers b_W_start and b_b_start are those of the running one, which all of its pieces use."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_i = tl.arange(0, 16)
    o_d = tl.arange(0, D)
    p_D = (i_b * T * H + i_h) * D
    p_T = i_b * T * H + i_h
    k = k + p_D
    v = v + p_D
    lr_grad = lr_grad + p_D
    z_hat = z_hat + p_D
    lr = lr + p_T
    inv_sigma = inv_sigma + p_T
    p_W = o_d[:, None] * D + o_d[None, :]
    b_W = tl.load(W_start + i_bh * D * D + p_W)
    b_b = tl.load(b_start + i_bh * D + o_d)
    b_weight = tl.load(ln_weight + i_h * D + o_d)[None, :]
    b_bias = tl.load(ln_bias + i_h * D + o_d)[None, :]
    b_scale_K = tl.load(token_scale + K - 1)
    p_before = (o_i[:, None] - 16) * (H * D) + o_d[None, :]         # the piece before
    b_step = tl.zeros([16, D], k.dtype.element_ty)                  # its -s G
    b_W_start = b_W.to(k.dtype.element_ty)
    b_b_start = b_b
    for i_n in range(n):
        # the step of the piece before:  W <- W - s Kᵀ G
        b_k = tl.load(k + i_n * 16 * H * D + p_before, mask=i_n > 0, other=0.0)
        b_W = tl.dot(tl.trans(b_k), b_step, b_W, input_precision=PREC)

        # this piece; a mini-batch starts with every (K/16)th, and a chunk of 64 tokens with every 4th
        p_x = (i_n * 16 + o_i[:, None]) * (H * D) + o_d[None, :]
        p_t = (i_n * 16 + o_i) * H
        b_k = tl.load(k + p_x)
        b_v = tl.load(v + p_x)
        b_lr = tl.load(lr + p_t)
        if i_n % (K // 16) == 0:
            b_W_start = b_W.to(b_k.dtype)
            b_b_start = b_b
        if i_n % 4 == 0:
            i_c = i_bh * tl.cdiv(T, 64) + i_n // 4
            tl.store(W_chunk + i_c * D * D + p_W, b_W_start)
            tl.store(b_chunk + i_c * D + o_d, b_b)

        # Z = K W + b, and its LayerNorm without weight and bias
        b_z = tl.dot(b_k, b_W_start, input_precision=PREC) + b_b_start[None, :]
        b_z -= tl.sum(b_z, 1)[:, None] / D
        b_inv_sigma = tl.rsqrt(tl.sum(b_z * b_z, 1) / D + EPS)
        b_z_hat = b_z * b_inv_sigma[:, None]

        # e = ∂ℓ/∂ẑ      G = η (e - mean e - ẑ mean(e ẑ))/σ
        b_e = (b_weight * b_z_hat + b_bias + b_k - b_v) * b_weight
        b_lr_grad = _centred(b_e, b_z_hat, D) * (b_inv_sigma * b_lr)[:, None]
        tl.store(lr_grad + p_x, b_lr_grad.to(b_k.dtype))
        if SAVE:
            tl.store(z_hat + p_x, b_z_hat.to(b_k.dtype))
            tl.store(inv_sigma + p_t, b_inv_sigma)
        b_step = (b_lr_grad * -b_scale_K).to(b_k.dtype)
        b_b -= b_scale_K * tl.sum(b_lr_grad, 0)

    # the step of the last piece
    b_k = tl.load(k + n * 16 * H * D + p_before)
    b_W = tl.dot(tl.trans(b_k), b_step, b_W, input_precision=PREC)
    tl.store(W_end + i_bh * D * D + p_W, b_W)
    tl.store(b_end + i_bh * D + o_d, b_b)


@kernel
def _ttt_output(q, k, lr_grad, token_scale, ln_weight, ln_bias, W_chunk, b_chunk, o, zq_hat, inv_sigma_q, T,
                EPS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, SAVE: tl.constexpr,
                PREC: tl.constexpr):
    """Zq = Q W + b - ((Q Kᵀ + 1) ⊙ M) G      M_ij = s_K for j in an earlier mini-batch, s_i for j <= i in the same one
    o = q + LN(Zq)

    There is one program for each chunk of 64 tokens of each head; W and b are those of its start. In
    registers are the 64×64 weights and Zqᵀ (D, 64). It reads q, k, G and W, and writes o; for the
    backward pass also ẑq and 1/σq."""
    i_n = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_c = tl.arange(0, 64)
    o_d = tl.arange(0, D)
    o_t = i_n * 64 + o_c
    m_t = o_t < T
    p_D = (i_b * T * H + i_h) * D
    q = q + p_D
    k = k + p_D
    lr_grad = lr_grad + p_D
    o = o + p_D
    zq_hat = zq_hat + p_D
    p_x = o_t[None, :] * (H * D) + o_d[:, None]                     # (D, 64): Qᵀ
    i_c = i_bh * tl.num_programs(0) + i_n
    b_q = tl.load(q + p_x, mask=m_t[None, :], other=0.0)
    b_k = tl.load(k + p_x, mask=m_t[None, :], other=0.0)
    b_lr_grad = tl.load(lr_grad + p_x, mask=m_t[None, :], other=0.0)

    # (Q Kᵀ + 1) ⊙ M
    m_own = ((o_c[:, None] // K) == (o_c[None, :] // K)) & (o_c[:, None] >= o_c[None, :])
    b_M = tl.where(m_own, tl.load(token_scale + o_c % K)[:, None], 0.0)
    b_M = tl.where((o_c[:, None] // K) > (o_c[None, :] // K), tl.load(token_scale + K - 1), b_M)
    b_M *= tl.dot(tl.trans(b_q), b_k, input_precision=PREC) + 1.0

    # Zqᵀ, and its LayerNorm without weight and bias
    b_W = tl.load(W_chunk + i_c * D * D + o_d[None, :] * D + o_d[:, None])              # Wᵀ
    b_z = tl.dot(b_W, b_q, input_precision=PREC) + tl.load(b_chunk + i_c * D + o_d)[:, None]
    b_z -= tl.dot(b_lr_grad, tl.trans(b_M.to(b_lr_grad.dtype)), input_precision=PREC)
    b_z -= tl.sum(b_z, 0)[None, :] / D
    b_inv_sigma = tl.rsqrt(tl.sum(b_z * b_z, 0) / D + EPS)
    b_z_hat = b_z * b_inv_sigma[None, :]

    # o = q + LN(Zq)
    b_o = b_q + tl.load(ln_weight + i_h * D + o_d)[:, None] * b_z_hat + tl.load(ln_bias + i_h * D + o_d)[:, None]
    tl.store(o + p_x, b_o.to(b_q.dtype), mask=m_t[None, :])
    if SAVE:
        tl.store(zq_hat + p_x, b_z_hat.to(b_q.dtype), mask=m_t[None, :])
        tl.store(inv_sigma_q + i_b * T * H + i_h + o_t * H, b_inv_sigma, mask=m_t)


@kernel
def _ttt_backward(q, k, v, lr, token_scale, ln_weight, ln_bias, z_hat, inv_sigma, zq_hat, inv_sigma_q, do, dW_end,
                  db_end, dv, dz, dzq, dlr, dscale_K, dln_weight, dln_bias, dW_chunk, dW_start, db_start, T, n,
                  H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PREC: tl.constexpr):
    """With y = do ⊙ w, r = 1/σ, and N = K dW + db, the part of the next mini-batches:

        dZq = r_q (y - mean y - ẑq mean(y ẑq))             dG = -tril(Q Kᵀ + 1)ᵀ (s dZq) - s_K N
        h = e - mean e - ẑ m,  m = mean(e ẑ)               G = η r h      dη = r dG·h      u = η r dG
        de = u - mean u - ẑ a,  a = mean(u ẑ)              dv = -w de
        dẑ = w² de - m u - a e                             dZ = r (dẑ - mean dẑ - ẑ (mean(dẑ ẑ) + mean(u h)))
        dW <- dW + Kᵀ dZ + Qᵀ dZq                          db <- db + Σ dZ + dZq

    There is one program for a head; it walks the mini-batches in reverse. In registers are dW and
    db in float32, and the gradients of the LayerNorm's weight and bias. It reads q, k, v, do, ẑ and
    ẑq, and writes dv, dZ, dZq, and dW at the end of every 64 tokens. W does not appear, because
    what depended on it is in ẑ and ẑq. As in _ttt_forward the step of dW is taken one piece late,
    and a mini-batch of more than 16 tokens is walked in pieces of 16, for all of which b_dW_end and
    b_db_end are those at its end. Through Q Kᵀ + 1 its later pieces have a part in the gradient of
    the earlier ones, which is collected in later_W = Σ s qᵀ dZq and later_b = Σ s dZq."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_i = tl.arange(0, 16)
    o_d = tl.arange(0, D)
    p_D = (i_b * T * H + i_h) * D
    p_T = i_b * T * H + i_h
    q = q + p_D
    k = k + p_D
    v = v + p_D
    z_hat = z_hat + p_D
    zq_hat = zq_hat + p_D
    do = do + p_D
    dv = dv + p_D
    dz = dz + p_D
    dzq = dzq + p_D
    lr = lr + p_T
    inv_sigma = inv_sigma + p_T
    inv_sigma_q = inv_sigma_q + p_T
    dlr = dlr + p_T

    # what walks: dW and db, and the piece after this one, whose step of dW and later_W is still to be taken
    p_W = o_d[:, None] * D + o_d[None, :]
    b_dW = tl.load(dW_end + i_bh * D * D + p_W)
    b_db = tl.load(db_end + i_bh * D + o_d)
    b_weight = tl.load(ln_weight + i_h * D + o_d)[None, :]
    b_bias = tl.load(ln_bias + i_h * D + o_d)[None, :]
    b_scale_K = tl.load(token_scale + K - 1)
    b_dscale_K = tl.zeros([16], tl.float32)
    b_dweight = tl.zeros([D], tl.float32)
    b_dbias = tl.zeros([D], tl.float32)
    b_late_dz = tl.zeros([16, D], k.dtype.element_ty)
    b_late_dzq = tl.zeros([16, D], k.dtype.element_ty)
    b_late_scaled_dzq = tl.zeros([16, D], k.dtype.element_ty)
    b_dW_end = b_dW.to(k.dtype.element_ty)
    b_db_end = b_db
    b_later_W = tl.zeros([D, D], tl.float32)
    b_later_b = tl.zeros([D], tl.float32)
    for i in range(n):
        # the step of the piece after:  dW <- dW + Kᵀ dZ + Qᵀ dZq
        i_n = n - 1 - i
        p_x = (i_n * 16 + 16 + o_i[:, None]) * (H * D) + o_d[None, :]
        b_q = tl.load(q + p_x, mask=i > 0, other=0.0)
        b_k = tl.load(k + p_x, mask=i > 0, other=0.0)
        b_dW = tl.dot(tl.trans(b_q), b_late_dzq, b_dW, input_precision=PREC)
        b_dW = tl.dot(tl.trans(b_k), b_late_dz, b_dW, input_precision=PREC)
        if K > 16:
            b_later_W = tl.dot(tl.trans(b_q), b_late_scaled_dzq, b_later_W, input_precision=PREC)
            if i_n % (K // 16) == K // 16 - 1:                      # a mini-batch's last piece, the first one met
                b_dW_end = b_dW.to(b_k.dtype)
                b_db_end = b_db
                b_later_W = b_later_W * 0.0
                b_later_b = b_later_b * 0.0
        else:
            b_dW_end = b_dW.to(b_k.dtype)
            b_db_end = b_db

        # this piece
        p_x = (i_n * 16 + o_i[:, None]) * (H * D) + o_d[None, :]
        p_t = (i_n * 16 + o_i) * H
        b_q = tl.load(q + p_x)
        b_k = tl.load(k + p_x)
        b_v = tl.load(v + p_x)
        b_do = tl.load(do + p_x).to(tl.float32)
        b_z_hat = tl.load(z_hat + p_x).to(tl.float32)
        b_zq_hat = tl.load(zq_hat + p_x).to(tl.float32)
        b_lr = tl.load(lr + p_t)[:, None]
        b_r = tl.load(inv_sigma + p_t)[:, None]
        b_r_q = tl.load(inv_sigma_q + p_t)[:, None]
        if (i_n + 1) % 4 == 0 or i == 0:
            tl.store(dW_chunk + (i_bh * tl.cdiv(T, 64) + i_n // 4) * D * D + p_W, b_dW_end)

        # dZq, through the LayerNorm of the query's answer
        b_dzq = b_r_q * _centred(b_do * b_weight, b_zq_hat, D)
        b_scaled_dzq = tl.load(token_scale + i_n % (K // 16) * 16 + o_i)[:, None] * b_dzq
        b_late_scaled_dzq = b_scaled_dzq.to(b_k.dtype)

        # dG = -tril(Q Kᵀ + 1)ᵀ (s dZq) - s_K N, and the part of the later pieces:  -(K later_W + later_b)
        b_QK = tl.where(o_i[:, None] >= o_i[None, :], tl.dot(b_q, tl.trans(b_k), input_precision=PREC) + 1.0, 0.0)
        b_next = tl.dot(b_k, b_dW_end, input_precision=PREC) + b_db_end[None, :]
        b_dG = -tl.dot(tl.trans(b_QK.to(b_k.dtype)), b_late_scaled_dzq, input_precision=PREC) - b_scale_K * b_next
        if K > 16:
            b_dG -= tl.dot(b_k, b_later_W.to(b_k.dtype), input_precision=PREC) + b_later_b[None, :]
            b_later_b += tl.sum(b_scaled_dzq, 0)

        # the inner gradient once more, as G = η r h
        b_error = b_weight * b_z_hat + b_bias + b_k - b_v
        b_e = b_error * b_weight
        b_m = tl.sum(b_e * b_z_hat, 1)[:, None] / D
        b_h = _centred(b_e, b_z_hat, D)

        # dη = r dG·h; that of s_K here is all that the step of W adds to it
        tl.store(dlr + p_t, tl.sum(b_dG * b_h * b_r, 1))
        b_dscale_K -= tl.sum(b_next * b_h * (b_r * b_lr), 1)

        # u = η r dG      de = u - mean u - ẑ a      dv = -w de, and the gradients of the LayerNorm's weight and bias
        b_u = b_dG * (b_lr * b_r)
        b_a = tl.sum(b_u * b_z_hat, 1)[:, None] / D
        b_de = _centred(b_u, b_z_hat, D)
        b_dweight += tl.sum(b_do * b_zq_hat + b_de * (b_error + b_weight * b_z_hat), 0)
        b_dbias += tl.sum(b_do + b_de * b_weight, 0)
        tl.store(dv + p_x, (b_de * -b_weight).to(b_k.dtype))

        # dẑ = w² de - m u - a e      dZ = r (dẑ - mean dẑ - ẑ (mean(dẑ ẑ) + mean(u h)))
        b_dz_hat = b_weight * b_weight * b_de - b_u * b_m - b_e * b_a
        b_along = tl.sum(b_dz_hat * b_z_hat + b_u * b_h, 1)[:, None] / D
        b_dz = b_r * (b_dz_hat - tl.sum(b_dz_hat, 1)[:, None] / D - b_z_hat * b_along)
        b_db += tl.sum(b_dz + b_dzq, 0)
        b_late_dz = b_dz.to(b_k.dtype)
        b_late_dzq = b_dzq.to(b_k.dtype)
        tl.store(dz + p_x, b_late_dz)
        tl.store(dzq + p_x, b_late_dzq)

    # the step of the first piece
    p_x = o_i[:, None] * (H * D) + o_d[None, :]
    b_dW = tl.dot(tl.trans(tl.load(q + p_x)), b_late_dzq, b_dW, input_precision=PREC)
    b_dW = tl.dot(tl.trans(tl.load(k + p_x)), b_late_dz, b_dW, input_precision=PREC)
    tl.store(dW_start + i_bh * D * D + p_W, b_dW)
    tl.store(db_start + i_bh * D + o_d, b_db)
    tl.store(dscale_K + i_bh, tl.sum(b_dscale_K, 0))
    tl.store(dln_weight + i_bh * D + o_d, b_dweight)
    tl.store(dln_bias + i_bh * D + o_d, b_dbias)


@kernel
def _ttt_grads(q, k, token_scale, lr_grad, dz, dzq, do, dv, W_chunk, dW_chunk, dq, dk, dscale, T, H: tl.constexpr,
               D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
    """Token i sees row j of G through W if j is in an earlier mini-batch (with weight s_K), and
    through tril(Q Kᵀ + 1) if j is in its own (with weight s_i). Of all that was before the chunk it
    sees W. With W at the chunk's start and dW at its end:

        A_ij = dZq_i·G_j (s_K | s_i)      B_ij = s_K dZ_i·G_j, earlier mini-batches only
        dq = do + dZq Wᵀ - A K            dk = -dv + dZ Wᵀ - s_K G dWᵀ - (B + Bᵀ) K - Aᵀ Q
        ds_i = -Σ_j dZq_i·G_j (q_i·k_j + 1), own mini-batch

    There is one program for each chunk of 64 tokens of each head. In registers are A and B + Bᵀ, and BD
    rows of dqᵀ and dkᵀ at a time. It reads q, k, G, dZ, dZq, do, dv, W and dW, and writes dq and
    dk, all once."""
    i_n = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_c = tl.arange(0, 64)
    o_d = tl.arange(0, D)
    o_t = i_n * 64 + o_c
    m_t = o_t < T
    p_D = (i_b * T * H + i_h) * D
    q = q + p_D
    k = k + p_D
    lr_grad = lr_grad + p_D
    dz = dz + p_D
    dzq = dzq + p_D
    do = do + p_D
    dv = dv + p_D
    dq = dq + p_D
    dk = dk + p_D
    p_x = o_t[:, None] * (H * D) + o_d[None, :]                     # (64, D)
    p_W = (i_bh * tl.num_programs(0) + i_n) * D * D
    b_scale = tl.load(token_scale + o_c % K)
    b_scale_K = tl.load(token_scale + K - 1)
    m_own = ((o_c[:, None] // K) == (o_c[None, :] // K)) & (o_c[:, None] >= o_c[None, :])
    m_earlier = (o_c[:, None] // K) > (o_c[None, :] // K)

    # ds_i = -Σ_j dZq_i·G_j (q_i·k_j + 1)
    b_QK = tl.dot(tl.load(q + p_x, mask=m_t[:, None], other=0.0),
                  tl.trans(tl.load(k + p_x, mask=m_t[:, None], other=0.0)), input_precision=PREC)
    b_lr_grad = tl.load(lr_grad + p_x, mask=m_t[:, None], other=0.0)
    b_dz = tl.load(dz + p_x, mask=m_t[:, None], other=0.0)
    b_dzq = tl.load(dzq + p_x, mask=m_t[:, None], other=0.0)
    b_A = tl.dot(b_dzq, tl.trans(b_lr_grad), input_precision=PREC)
    b_dscale = -tl.sum(tl.where(m_own, b_A * (b_QK + 1.0), 0.0), 1)
    tl.store(dscale + i_b * T * H + i_h + o_t * H, b_dscale, mask=m_t)

    # A, and B + Bᵀ
    b_A = (b_A * tl.where(m_own, b_scale[:, None], tl.where(m_earlier, b_scale_K, 0.0))).to(b_lr_grad.dtype)
    b_B = tl.dot(b_dz, tl.trans(b_lr_grad), input_precision=PREC) * b_scale_K
    b_B = tl.where(m_earlier, b_B, 0.0).to(b_lr_grad.dtype)
    b_B += tl.trans(b_B)
    for i_d in range(D // BD):
        o_k = i_d * BD + tl.arange(0, BD)
        p_k = o_k[:, None] + o_t[None, :] * (H * D)                 # (BD, 64): Kᵀ
        b_q = tl.load(q + p_k, mask=m_t[None, :], other=0.0)
        b_k = tl.load(k + p_k, mask=m_t[None, :], other=0.0)
        b_W = tl.load(W_chunk + p_W + o_k[:, None] * D + o_d[None, :])
        b_dW = tl.load(dW_chunk + p_W + o_k[:, None] * D + o_d[None, :])

        # dqᵀ = doᵀ + (dZq Wᵀ)ᵀ - (A K)ᵀ
        b_dq = tl.dot(b_W, tl.trans(b_dzq), input_precision=PREC) - tl.dot(b_k, tl.trans(b_A), input_precision=PREC)
        b_dq += tl.load(do + p_k, mask=m_t[None, :], other=0.0)
        tl.store(dq + p_k, b_dq.to(b_lr_grad.dtype), mask=m_t[None, :])

        # dkᵀ = (dZ Wᵀ)ᵀ - s_K (G dWᵀ)ᵀ - ((B + Bᵀ) K)ᵀ - (Aᵀ Q)ᵀ - dvᵀ
        b_dk = tl.dot(b_W, tl.trans(b_dz), input_precision=PREC)
        b_dk -= b_scale_K * tl.dot(b_dW, tl.trans(b_lr_grad), input_precision=PREC)
        b_dk -= tl.dot(b_k, b_B, input_precision=PREC) + tl.dot(b_q, b_A, input_precision=PREC)
        b_dk -= tl.load(dv + p_k, mask=m_t[None, :], other=0.0)
        tl.store(dk + p_k, b_dk.to(b_lr_grad.dtype), mask=m_t[None, :])


def _ttt_forward_run(launch, q, k, v, lr, token_scale, W_start, b_start, ln_weight, ln_bias, save):
    """The forward pass on contiguous tensors and whole mini-batches. With `save` it keeps what the backward needs."""
    B, T, H, D = q.shape
    K = len(token_scale)
    n = triton.cdiv(T, 64)
    lr_grad = torch.empty_like(q)
    inv_sigma = torch.empty_like(lr)
    z_hat = torch.empty_like(q) if save else q.new_empty(0)
    W_chunk = q.new_empty(B * H * n, D, D)
    b_chunk = lr.new_empty(B * H * n, D)
    W_end = torch.empty_like(W_start)
    b_end = torch.empty_like(b_start)
    launch(_ttt_forward, (B * H,),
           (k, v, lr, token_scale, W_start, b_start, ln_weight, ln_bias, lr_grad, z_hat, inv_sigma, W_chunk,
            b_chunk, W_end, b_end, T, T // 16, LN_EPS, H, D, K, save),
           tuned(("ttt_walk", D), q.dtype))

    o = torch.empty_like(q)
    inv_sigma_q = torch.empty_like(lr)
    zq_hat = torch.empty_like(q) if save else q.new_empty(0)
    launch(_ttt_output, (n, B * H),
           (q, k, lr_grad, token_scale, ln_weight, ln_bias, W_chunk, b_chunk, o, zq_hat, inv_sigma_q, T,
            LN_EPS, H, D, K, save),
           tuned("ttt_output", q.dtype))
    return o, W_end, b_end, lr_grad, z_hat, zq_hat, inv_sigma, inv_sigma_q, W_chunk


def _ttt_backward_run(launch, q, k, v, lr, token_scale, ln_weight, ln_bias, lr_grad, z_hat, zq_hat, inv_sigma,
                      inv_sigma_q, W_chunk, do, dW_end, db_end):
    """The gradients of q, k, v, η, s, the first W and b, and the LayerNorm's weight and bias."""
    B, T, H, D = q.shape
    K = len(token_scale)
    dv = torch.empty_like(q)
    dz = torch.empty_like(q)
    dzq = torch.empty_like(q)
    dlr = torch.empty_like(lr)
    dscale_K = lr.new_empty(B * H)
    dln_weight = lr.new_empty(B, H, D)
    dln_bias = lr.new_empty(B, H, D)
    dW_chunk = torch.empty_like(W_chunk)
    dW_start = torch.empty_like(dW_end)
    db_start = torch.empty_like(db_end)
    launch(_ttt_backward, (B * H,),
           (q, k, v, lr, token_scale, ln_weight, ln_bias, z_hat, inv_sigma, zq_hat, inv_sigma_q, do, dW_end,
            db_end, dv, dz, dzq, dlr, dscale_K, dln_weight, dln_bias, dW_chunk, dW_start, db_start, T, T // 16,
            H, D, K),
           tuned(("ttt_walk", D), q.dtype))

    dq = torch.empty_like(q)
    dk = torch.empty_like(q)
    dscale = torch.empty_like(lr)
    launch(_ttt_grads, (triton.cdiv(T, 64), B * H),
           (q, k, token_scale, lr_grad, dz, dzq, do, dv, W_chunk, dW_chunk, dq, dk, dscale, T, H, D, K),
           tuned("ttt_grads", q.dtype, D))

    # every token has the factor of its position; s_K is also the factor of each mini-batch's step
    dtoken_scale = dscale.view(-1, K, H).sum((0, 2))
    dtoken_scale = torch.cat([dtoken_scale[:-1], dtoken_scale[-1:] + dscale_K.sum()])
    return dq, dk, dv, dlr, dtoken_scale, dW_start, db_start, dln_weight.sum(0), dln_bias.sum(0)


_ttt_forward_op = operator(_ttt_forward_run, 9)
_ttt_backward_op = operator(_ttt_backward_run, 9)


def _ttt_save(ctx, inputs, output):
    """Keeps for the backward pass what it needs of the forward one."""
    q, k, v, lr, token_scale, W_start, b_start, ln_weight, ln_bias, save = inputs
    o, W_end, b_end, *saved = output
    ctx.save_for_backward(q, k, v, lr, token_scale, ln_weight, ln_bias, *saved)
    ctx.set_materialize_grads(False)


def _ttt_autograd(ctx, do, dW_end, db_end, *unused):
    """The gradients of the arguments of _ttt_forward_run."""
    q = ctx.saved_tensors[0]
    lr = ctx.saved_tensors[3]
    B, T, H, D = q.shape
    do = torch.zeros_like(q) if do is None else do.contiguous()
    dW_end = lr.new_zeros(B, H, D, D) if dW_end is None else dW_end.contiguous()
    db_end = lr.new_zeros(B, H, D) if db_end is None else db_end.contiguous()
    gradients = _ttt_backward_op(*ctx.saved_tensors, do, dW_end, db_end)
    return *gradients, None                                         # none for save


_ttt_forward_op.register_autograd(_ttt_autograd, setup_context=_ttt_save)


def _ttt_triton(q, k, v, lr, token_scale, ln_weight, ln_bias, state, pos):
    """ttt_linear by the kernels, which take whole mini-batches. What completes a running one, and
    what is left over at the end, takes the chunked form: fewer than K tokens each, and exact."""
    T = q.size(1)
    K = len(token_scale)
    first = min(-pos % K, T)                                        # tokens that complete the running mini-batch
    last = first + (T - first) // K * K                             # where the whole mini-batches end
    outputs = []

    if first > 0:
        piece = [x[:, :first] for x in (q, k, v, lr)]
        o, state = _ttt_torch(_ttt_chunk, *piece, token_scale, ln_weight, ln_bias, state, pos)
        outputs.append(o)

    if first < last:
        piece = [x[:, first:last].to(q.dtype).contiguous() for x in (q, k, v)]
        others = (lr[:, first:last], token_scale, state.W_start, state.b_start, ln_weight, ln_bias)
        inputs = piece + [x.float().contiguous() for x in others]
        save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        o, W, b, *_ = _ttt_forward_op(*inputs, save)
        state = TTTState(W, b, torch.zeros_like(W), torch.zeros_like(b), torch.tensor(0))
        outputs.append(o)

    if last < T:
        piece = [x[:, last:] for x in (q, k, v, lr)]
        o, state = _ttt_torch(_ttt_chunk, *piece, token_scale, ln_weight, ln_bias, state, 0)
        outputs.append(o)
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state


# ----------------------------------------------------------------------------------------------------------------------
# Are the kernels right?

FUNCTIONS = {"leaky_average": leaky_average, "gated_delta_rule": gated_delta_rule, "ttt_linear": ttt_linear}

CHECKED = [
    ("gated_delta_rule", dict(T=70, D=16, Dv=32)),
    ("gated_delta_rule", dict(T=129, D=64, Dv=64)),
    ("gated_delta_rule", dict(T=64, D=128, Dv=128)),
    ("gated_delta_rule", dict(T=64, D=128, Dv=256)),
    ("ttt_linear", dict(T=150, D=32, K=16)),
    ("ttt_linear", dict(T=192, D=64, K=64)),
    ("ttt_linear", dict(T=64, D=128, K=32)),
]
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def example(name: str, B: int, T: int, H: int, D: int, Dv: int | None = None, K: int = 16, device="cpu",
            dtype=torch.float32, gated: bool = False) -> dict:
    """Arguments of a function as a trained layer would give them. x, q, k and v have the dtype that
    is asked for; gates, weights and states are in float32 at least. gated: leaky_average with a λ and a
    gate for every token."""
    def normal(*shape):
        return torch.randn(*shape, device=device, dtype=state_dtype(dtype))

    if name == "leaky_average" and gated:
        return dict(x=normal(B, T, H, D).to(dtype), log_decay=-normal(B, T, H).exp(), state=normal(B, H, D),
                    log_gate=normal(B, T, H))
    if name == "leaky_average":
        return dict(x=normal(B, T, H, D).to(dtype), decay=normal(H).sigmoid(), state=normal(B, H, D))

    if name == "gated_delta_rule":
        Dv = Dv or D
        q = F.normalize(normal(B, T, H, D), dim=-1).to(dtype)
        k = F.normalize(normal(B, T, H, D), dim=-1).to(dtype)
        v = normal(B, T, H, Dv).to(dtype)
        return dict(q=q, k=k, v=v, g=-0.1 * normal(B, T, H).exp(), beta=normal(B, T, H).sigmoid(),
                    state=normal(B, H, D, Dv))

    q = normal(B, T, H, D).to(dtype)
    k = normal(B, T, H, D).to(dtype)
    v = normal(B, T, H, D).to(dtype)
    token_scale = 1 / torch.arange(1, K + 1, device=device, dtype=state_dtype(dtype))
    return dict(q=q, k=k, v=v, lr=normal(B, T, H).sigmoid() / D, token_scale=token_scale, W=0.02 * normal(H, D, D),
                b=0.1 * normal(H, D), ln_weight=1 + 0.1 * normal(H, D), ln_bias=0.1 * normal(H, D))


def results(fn, args: dict, impl: str) -> dict:
    """The output of fn, its new state, and the gradient of every argument for one fixed random loss."""
    inputs = {name: x.detach().requires_grad_() for name, x in args.items()}
    o, state = fn(**inputs, impl=impl)
    outputs = {"o": o}
    if torch.is_tensor(state):
        outputs["state"] = state
    else:
        outputs |= zip(state._fields[:4], state)                    # all but pos, which is an integer

    # the loss is a random projection of all outputs, the same on every device
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for y in outputs.values():
        weight = torch.randn(y.shape, generator=generator).to(y.device)
        loss = loss + (y.to(state_dtype(y.dtype)) * weight).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    return outputs | {f"d{name}": gradient for name, gradient in zip(inputs, gradients)}


def errors(fn, args: dict, impl: str = "triton") -> dict:
    """The relative error ‖a - b‖/‖b‖ of everything in results() against the loop, which gets the
    same numbers in float32 at least. What is zero, as dβ where nothing depends on it, is compared
    with 1 instead. An error that is not a number counts as infinite, so that no comparison can
    overlook it."""
    exact = {name: x.to(state_dtype(x.dtype)) for name, x in args.items()}
    want = results(fn, exact, "loop")
    got = results(fn, args, impl)
    found = {}
    for name, b in want.items():
        size = b.norm().item()
        error = (got[name].to(b.dtype) - b).norm().item() / (size if size > 1e-6 else 1)
        found[name] = error if error < float("inf") else float("inf")
    return found


def check(device: str) -> None:
    """Compares every kernel with its loop: in float32, and on a GPU also in bfloat16, which the interpreter lacks."""
    dtypes = [torch.float32, torch.bfloat16] if device == "cuda" else [torch.float32]
    wrong = 0
    for dtype in dtypes:
        for name, sizes in CHECKED:
            torch.manual_seed(0)
            found = errors(FUNCTIONS[name], example(name, 1, H=2, device=device, dtype=dtype, **sizes))
            worst = max(found, key=found.get)
            row = f"{name:17} {str(dtype)[6:]:9} {str(sizes):34}"
            print(f"{row} largest error {found[worst]:.1e} ({worst})", flush=True)
            if found[worst] > LIMITS[dtype]:
                wrong += 1
    if wrong > 0:
        limits = " and ".join(f"{limit:g} in {str(dtype)[6:]}" for dtype, limit in LIMITS.items())
        raise SystemExit(f"error: a kernel disagrees with its loop; expected at most {limits}")


# ----------------------------------------------------------------------------------------------------------------------
# What do the kernels cost?

SHAPES = {"A": (8, 4096, 6, 128), "B": (16, 2048, 12, 64)}          # B, T, H, D

# what an H200 is assumed to reach in products of bf16 and in copies; these two ceilings are the roofline
FLOPS_A_SECOND = 790e12
BYTES_A_SECOND = 4.3e12


def kernel_flops(kernel_name: str, D: int) -> int:
    """FLOPs of a kernel for a token and head, with Dk = Dv = D. Chunks are of 32 tokens in the
    delta rule's first three kernels, pieces of 16 in TTT's walks, and chunks of 64 elsewhere."""
    return {
        "_delta_prep": 4 * 32 * D + 4 * 32 * 32,
        "_delta_forward": 6 * D * D + 4 * 32 * D,
        "_delta_backward": 6 * D * D + 4 * 32 * D,
        "_delta_grads": 6 * D * D + 12 * 64 * D,
        "_ttt_forward": 4 * D * D,
        "_ttt_output": 2 * D * D + 4 * 64 * D,
        "_ttt_backward": 6 * D * D + 4 * 16 * D,
        "_ttt_grads": 6 * D * D + 12 * 64 * D,
    }[kernel_name]


def usual_work(name: str, part: str, D: int) -> tuple[int, int]:
    """What our kernels are compared with: (FLOPs, bytes) for a token and head. The FLOPs are those of
    the usual form, for the delta rule in chunks of 64 tokens. There our kernels do less, because their
    walks have chunks of 32 and keep the error E instead of computing it twice. The bytes are the fewest
    possible: inputs are read once and outputs written once, in bf16."""
    return {
        ("gated_delta_rule", "forward"): (10 * 64 * D + 6 * D * D, 8 * D + 6),
        ("gated_delta_rule", "backward"): (28 * 64 * D + 16 * D * D + 4 * 64 * 64, 14 * D + 12),
        ("ttt_linear", "forward"): (6 * D * D + 4 * 16 * D, 8 * D + 4),
        ("ttt_linear", "backward"): (12 * D * D + 12 * 16 * D, 14 * D + 8),
    }[name, part]


def at_the_ceilings(flops: float, nbytes: float) -> float:
    """Seconds that an H200 needs at least."""
    return max(flops / FLOPS_A_SECOND, nbytes / BYTES_A_SECOND)


def launches(name: str, B: int, T: int, H: int, D: int, Dv: int | None = None, K: int = 16,
             dtype=torch.bfloat16) -> dict:
    """The kernel launches of a function's forward and backward pass, recorded and not run: for
    either part a list of (kernel, grid, arguments, options). The tensors among the arguments have
    shapes, but no memory."""
    recorded = {"forward": [], "backward": []}

    def forward(*launched):
        recorded["forward"].append(launched)

    def backward(*launched):
        recorded["backward"].append(launched)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, device="meta", dtype=dtype)

    q = empty(B, T, H, D, dtype=dtype)
    gate = empty(B, T, H)
    if name == "gated_delta_rule":
        v = empty(B, T, H, Dv or D, dtype=dtype)
        S = empty(B, H, D, Dv or D)
        o, S_end, *saved = _delta_forward_run(forward, q, q, v, gate, gate, S, 1.0, True)
        _delta_backward_run(backward, q, q, gate, gate, o, S_end, *saved, 1.0)
    else:
        scale = empty(K)
        weight = empty(H, D)
        W = empty(B, H, D, D)
        b = empty(B, H, D)
        o, W_end, b_end, *saved = _ttt_forward_run(forward, q, q, q, gate, scale, W, b, weight, weight, True)
        _ttt_backward_run(backward, q, q, q, gate, scale, weight, weight, *saved, o, W_end, b_end)
    return recorded


def report(name: str, shape: str) -> None:
    """Prints how much each kernel of a function moves and computes at a shape, against `usual_work`."""
    B, T, H, D = SHAPES[shape]
    tokens = B * T * H
    print(f"\n{name}, shape {shape}: B{B} T{T} H{H} D{D} bfloat16")
    print("kernel           programs  warps  bytes/token,head  FLOPs/token,head")
    for part, calls in launches(name, B, T, H, D).items():
        all_flops = 0
        all_bytes = 0
        for fn, grid, args, options in calls:
            flops = kernel_flops(fn.__name__, D)
            nbytes = sum(x.nbytes for x in args if torch.is_tensor(x)) / tokens
            programs = grid[0] * grid[1] if len(grid) == 2 else grid[0]
            print(f"{fn.__name__:16} {programs:8} {options['num_warps']:6} {nbytes:17.0f} {flops:17}")
            all_flops += flops
            all_bytes += nbytes

        usual_flops, fewest_bytes = usual_work(name, part, D)
        us_for_bytes = 1e6 * tokens * all_bytes / BYTES_A_SECOND
        us_for_flops = 1e6 * tokens * all_flops / FLOPS_A_SECOND
        us_usual = 1e6 * tokens * at_the_ceilings(usual_flops, fewest_bytes)
        print(f"{part}: {all_bytes:.0f} bytes (at least {fewest_bytes}) and {all_flops} FLOPs (usually {usual_flops}) "
              f"a token and head; at an H200's ceilings {us_for_bytes:.0f} us and {us_for_flops:.0f} us "
              f"(the usual work: {us_usual:.0f} us)")


def median_ms(fn, repeats: int = 30) -> float:
    """Milliseconds that a call of fn takes on the GPU, after five calls to warm up."""
    times = []
    for _ in range(repeats + 5):
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times[5:])[repeats // 2]


def measure(fn, args: dict) -> dict:
    """Milliseconds of fn's forward and backward pass."""
    o = fn(**args)[0]
    do = torch.randn_like(o)
    inputs = list(args.values())

    def forward():
        fn(**args)

    def backward():
        torch.autograd.grad(o, inputs, do, retain_graph=True, allow_unused=True)

    return {"forward": median_ms(forward), "backward": median_ms(backward)}


def peer(name: str):
    """flash-linear-attention's nearest function with our arguments, or None where the package is not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.ttt import chunk_ttt_linear
    except ImportError:
        return None

    def delta(q, k, v, g, beta, state):
        return chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state)

    def ttt(q, k, v, lr, token_scale, W, b, ln_weight, ln_bias):
        """It has no token_scale, and it starts from W = 0 and b = 0: good for its speed, not for its values."""
        return chunk_ttt_linear(q, k, v, ln_weight, ln_bias, lr[..., None])

    return delta if name == "gated_delta_rule" else ttt


def benchmark(name: str, shape: str) -> None:
    """Times the kernels of a function at a shape, and compares them with PyTorch and flash-linear-attention."""
    B, T, H, D = SHAPES[shape]
    args = example(name, B, T, H, D, device="cuda", dtype=torch.bfloat16)
    args = {key: x.requires_grad_() for key, x in args.items()}
    ms = {"ours": measure(partial(FUNCTIONS[name], impl="triton"), args)}

    # the others may lack memory, or support for this GPU
    others = {"chunk": partial(FUNCTIONS[name], impl="chunk"), "fla": peer(name)}
    for other, fn in others.items():
        if fn is None:
            continue
        try:
            ms[other] = measure(fn, args)
        except RuntimeError as e:  # torch.OutOfMemoryError is one too
            print(f"{name}: {other} did not run: {str(e).splitlines()[0]}")

    for part in ("forward", "backward"):
        flops, nbytes = [x * B * T * H for x in usual_work(name, part, D)]
        seconds = ms["ours"][part] / 1e3
        row = (f"{name:17} {shape:5} bfloat16  {part:8} {ms['ours'][part]:7.3f} {flops / seconds / 1e12:8.1f} "
               f"{nbytes / seconds / 1e9:8.0f} {seconds / at_the_ceilings(flops, nbytes):8.1f} ")
        for other in others:
            row += f"{ms[other][part] / ms['ours'][part]:9.2f}" if other in ms else "        -"
        print(row)


def main() -> None:
    """Checks the kernels, and times them on a GPU or counts their work without one."""
    if triton is None:
        raise SystemExit("error: triton is not installed, and there is nothing to check without it; pip install triton")
    cells = [(name, shape) for name in ("gated_delta_rule", "ttt_linear") for shape in SHAPES]

    if INTERPRET:
        check("cpu")
    elif torch.cuda.is_available():
        check("cuda")
        print(f"\n{torch.cuda.get_device_name()}; medians; TFLOP/s and GB/s of the usual work; "
              "/ is their time over ours")
        print("                  shape dtype     part      ms      TFLOP/s  GB/s   x usual  / PyTorch  / fla")
        for name, shape in cells:
            benchmark(name, shape)
    else:
        print("No GPU: values from Triton's interpreter, in float32.")
        subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
        for name, shape in cells:
            report(name, shape)


if __name__ == "__main__":
    main()
