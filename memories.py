"""What a memory computes: the recurrences, each written twice. No parameters live here (those are in model.py).

For every mechanism there is a loop, which is the paper's equation token by token and serves as the oracle, and a
chunked form, which computes the same numbers with matrix products and a short loop over chunks.

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

Every function continues from a state exactly: f(x) == f(x[:, :t]) ++ f(x[:, t:], state). Time is axis 1 throughout.

References
    Gated DeltaNet: Yang, Kautz, Hatamizadeh 2025 (arXiv 2412.06464); the chunked form: Yang et al. 2024 (2406.06484)
    TTT-Linear: Sun et al. 2024 (2407.04620)           Memory Mosaics: Zhang et al. 2024 (2405.06394)
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DELTA_CHUNK = 64  # C of the chunked delta rule: work grows as T·C·D, the sequential part as T/C
LEAKY_CHUNK = 64
LN_EPS = 1e-6     # TTT's inner LayerNorm (biased variance)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States and gates are kept in float32, or in float64 when the inputs are (the tests' exact arithmetic)."""
    return torch.promote_types(dtype, torch.float32)


def check_impl(name: str, impl: str, choices: tuple) -> None:
    if impl not in choices:
        raise ValueError(f"{name}: impl={impl!r} was given, expected one of {', '.join(choices)}; use 'auto'")


# ----------------------------------------------------------------------------------------------------------------------
# Leaky average (Memory Mosaics, eq. 7)

def leaky_average(x: Tensor, decay: Tensor, state: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """y_t = x_t + λ y_{t-1}, one λ per head.

    x (B,T,H,D), decay (H,) in [0, 1), state (B,H,D) = y of the token before x. Returns y (B,T,H,D) in x's dtype and
    the new state. Memory is linear in T: no T×T matrix is ever built.
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
    check_impl("gated_delta_rule", impl, ("auto", "loop", "chunk"))
    B, T, H, Dk = k.shape
    dtype = state_dtype(v.dtype)
    scale = Dk ** -0.5 if scale is None else scale
    state = v.new_zeros(B, H, Dk, v.size(-1), dtype=dtype) if state is None else state.to(dtype)
    if T == 0:
        return v, state
    form = _delta_loop if impl == "loop" or (impl == "auto" and T == 1) else _delta_chunk
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
    check_impl("ttt_linear", impl, ("auto", "loop", "chunk"))
    B, T, H, D = q.shape
    dtype = state_dtype(q.dtype)
    if state is None:
        W, b = W.to(dtype).expand(B, H, D, D), b.to(dtype).expand(B, H, D)
        state, pos = TTTState(W, b, torch.zeros_like(W), torch.zeros_like(b), torch.tensor(0)), 0
    else:
        pos = int(state.pos)
    if T == 0:
        return q, state
    form = _ttt_loop if impl == "loop" else _ttt_chunk
    heads_first = lambda x: x.to(dtype).transpose(1, 2)             # (B,H,T,...)
    o, state = form(*map(heads_first, (q, k, v, lr[..., None])), token_scale.to(dtype),
                    ln_weight.to(dtype)[:, None], ln_bias.to(dtype)[:, None], *state[:4], pos)
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
