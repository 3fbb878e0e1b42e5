"""The network: one GPT backbone in which every memory is a flag (`Config(memory="deltanet")`).

Every memory layer has one signature, and so does the whole model:

    y, state = layer(x, state)                  x, y (B,T,C); state is all the layer remembers, None for "nothing yet"
    logits, state = model.stream(idx, state)    idx (B,T) int64

Whatever computes logits goes through `stream`, in training, evaluation and generation alike. Cutting a sequence
anywhere and carrying the state gives the same outputs, up to rounding. A state is None, a tensor, or a tuple of states
(a NamedTuple where they differ in kind). It is never changed; no layer writes into its inputs.

A fast form that is hard to recognise has a slow one beside it (`attend_slow`, and `slow` in a layer). That is the
paper's equation as it would be written on a board: no state, whole sequences, no attention to speed. The tests compare
the two. The slow forms of the recurrences that `ttt` and `deltanet` use are in memories.py.

Reading order (top to bottom; the checks of Config and the table of memories need the layers, so they stand after them)
    Config, PRESETS                    what can be chosen
    attend, rotary, Norm, ValueGate    parts shared by the mixers (a mixer is what moves information between tokens)
    Attention                          `none`: attention over a window, or over all of the past
    PersistentAttention                `persistent`: learned key/value slots beside it
    KNNAttention                       `knn`: an external store that is searched for the nearest keys
    TTT, DeltaNet                      `ttt`, `deltanet`: recurrent memories
    ContextualMemory, PersistentMemory `mosaic`: both halves of a Memory Mosaics block
    ShortAndLongMemory                 `mosaic2`: its successor
    MLP, TokenShift, Block, Stack      the transformer around them
    RMT                                `rmt`: memory tokens carried from segment to segment, wrapped around the stack
    Memory, MEMORIES                   what a memory has to offer, and the table of memories
    check_architecture                 what cannot be built
    GPT                                the model

Glossary (name here = symbol in the papers)
    B, T, C, H, D    batch, time, channels (n_embd), heads, head dimension          Hkv  key/value heads (GQA)
    Letters of one memory's text:
        attention    W = window                                persistent   M = slots per layer
        rmt          M = memory tokens, S = rmt_segment        knn          W = window, N = knn_capacity
        ttt          K = ttt_chunk, W, b = inner weights       deltanet     S = the matrix of a head
        mosaic       N = persistent pairs
    pos              in a state: tokens seen so far, a 0-dim int64 tensor on the CPU (reading it never waits for a GPU);
                     ttt and rmt count within the running mini-batch or segment. Config.pos is the kind of positions
    ve               value embeddings: (B,T,Hkv·D) looked up from the token ids, mixed into a layer's values
    free keys        the first keys of a layer, which every later query sees, whatever the window and ALiBi say

References: persistent memory (Sukhbaatar et al. 2019, 1907.01470), RMT (Bulatov et al. 2022, 2207.06881), TTT-Linear
(Sun et al. 2024, 2407.04620), Gated DeltaNet (Yang et al. 2025, 2412.06464), nearest-key store (Wu et al. 2022,
2203.08913), Memory Mosaics (Zhang et al. 2024, 2405.06394) and their second version (Zhang & Bottou 2025, 2507.03285).
The d12 preset's backbone is nanochat's (via memory-bench).
"""
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from memories import DELTA_CHUNK, TTTState, gated_delta_rule, leaky_average, state_dtype, ttt_linear


# ----------------------------------------------------------------------------------------------------------------------
# Configuration

def option(default, help: str, group: str = "architecture", choices: tuple = (), low=-math.inf, high=math.inf):
    """A field of a configuration: its default, what it means, and which values it may have.

    `group` is the heading under which --help lists it. The fields of the group "run" change how a
    run is executed and not what it computes (save that device_batch_size decides which numbers are drawn
    for dropout and for mosaic2's m). A number has to be finite and lie in [low, high]; a
    value has to be one of `choices` if there are any.
    """
    return field(default=default, metadata=dict(help=help, group=group, choices=choices, low=low, high=high))


def check_options(config) -> None:
    """Raises ValueError for the first field of a dataclass of options that has a value it may not
    have."""
    for f in fields(config):
        value = getattr(config, f.name)
        choices = f.metadata["choices"]
        low = f.metadata["low"]
        high = f.metadata["high"]
        if choices and value not in choices:
            names = ", ".join(map(str, choices))
            raise ValueError(f"{f.name}={value} was given, expected one of {names}")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not (low <= value <= high and math.isfinite(value)):
            limits = f", {low} or more" if high == math.inf else f" from {low} to {high}"
            expected = "a finite number" + (limits if low > -math.inf else "")
            raise ValueError(f"{f.name}={value} was given, expected {expected}")


@dataclass
class Config:
    """The architecture, flat. A Config that exists can be built: all others raise ValueError with
    one sentence."""
    memory: str = option("none", "which memory: none, persistent, rmt, ttt, deltanet, knn, mosaic or mosaic2", "memory")
    memory_layers: str = option("all", "layers that carry it: all, middle, one index, or indexes joined by + (1+3)",
                                "memory")

    n_layer: int = option(4, "number of blocks", low=1)
    n_head: int = option(4, "attention heads", low=1)
    n_kv_head: int = option(0, "key/value heads (grouped queries); 0 = n_head", low=0)
    n_embd: int = option(128, "channels", low=1)
    vocab_size: int = option(257, "size of the token vocabulary", low=1)
    max_seq_len: int = option(512, "training length in tokens", low=1)

    window: str = option("SSSL", "attention layers' pattern, tiled over the layers: L all of the past, S short_window")
    short_window: int = option(0, "tokens an S layer sees; 0 = max_seq_len / 4", low=0)
    pos: str = option("rope", "positions in attention layers", choices=("rope", "alibi", "learned", "none"))
    rope_theta: float = option(100_000.0, "RoPE: base of the wavelengths 2π·base^(2i/D)", low=1)
    qk_norm: bool = option(True, "normalise queries and keys per head")

    token_shift: bool = option(False, "every block first adds to a token a learned mixture of itself and the three "
                               "before it")
    norm: str = option("rms", "rms (no parameters) or layer", choices=("rms", "layer"))
    activation: str = option("relu2", "MLP nonlinearity", choices=("relu2", "gelu"))
    bias: bool = option(False, "biases in linear layers and LayerNorms")
    tie_embeddings: bool = option(False, "share the input and output embedding")
    softcap: float = option(15.0, "logits = c tanh(logits / c); 0 = off", low=0)
    value_embeds: bool = option(False, "token-id value embeddings on alternating layers, gated by the input")
    dropout: float = option(0.0, "dropout on embeddings, attention weights and residual branches", low=0, high=0.999)

    persistent_slots: int = option(32, "persistent: learned key/value pairs a layer", "memory", low=1)
    rmt_tokens: int = option(16, "rmt: memory tokens; 0 = the same segments without memory (its fair baseline)",
                             "memory", low=0)
    rmt_segment: int = option(0, "rmt: tokens a segment; 0 = max_seq_len / 4", "memory", low=0)
    rmt_bptt: int = option(8, "rmt: segment boundaries that each segment's gradient crosses backwards", "memory", low=0)
    ttt_chunk: int = option(16, "ttt: inner mini-batch K, tokens a gradient step", "memory", low=1)
    ttt_backbone: str = option("mamba", "ttt: what stands around the inner model: mamba (as published: convolutions "
                               "and an output gate) or transformer (neither)", "memory",
                               choices=("mamba", "transformer"))
    expand_v: int = option(1, "deltanet: value width over key width (1 near attention's size, 2 the paper's)",
                           "memory", low=1)
    delta_beta: int = option(1, "deltanet: β is from 0 to this; with 2 a write can reflect what a key holds", "memory",
                             choices=(1, 2))
    delta_steps: int = option(1, "deltanet: keys and values that a token writes, one after the other", "memory", low=1)
    delta_erase: bool = option(True, "deltanet: look up what a key holds and replace it; false adds to it", "memory")
    knn_capacity: int = option(512, "knn: pairs the store holds", "memory", low=1)
    knn_topk: int = option(32, "knn: nearest keys each query retrieves, at most all that are stored", "memory", low=1)
    knn_evict: str = option("fifo", "knn: the pair that leaves a full store, the oldest (fifo) or the least recently "
                            "retrieved (lru)", "memory", choices=("fifo", "lru"))
    mosaic_slots: int = option(0, "mosaic, and mosaic2 without its MLP: persistent pairs a head; 0 = so many "
                               "that the block is as large as one of attention",
                               "memory", low=0)
    mosaic2_short: int = option(0, "mosaic2: h. The short-term memory sees the last h-1 pairs, the long-term one all "
                                "that are at least m tokens old; m is h/4, in training drawn from h/4 to h; "
                                "0 = max_seq_len / 16", "memory", low=0)
    mosaic2_long: bool = option(True, "mosaic2: short- and long-term memory; off = one that sees all pairs", "memory")
    mosaic2_gated: bool = option(True, "mosaic2: every token chooses gate and leak; off = one leak a head", "memory")
    mosaic2_adaptive: bool = option(True, "mosaic2: the kernel narrows as pairs are added; off = it is fixed", "memory")
    mosaic2_mlp: bool = option(True, "mosaic2: an MLP as persistent memory; off = learned pairs", "memory")

    def __post_init__(self):
        if self.n_kv_head == 0:
            self.n_kv_head = self.n_head
        check_options(self)
        check_architecture(self)        # stands after the table of memories

    @property
    def head_dim(self) -> int:
        """D, the channels of one head."""
        return self.n_embd // self.n_head

    @property
    def local_window(self) -> int:
        """Tokens that an S layer sees, the query's own included."""
        return self.short_window or max(self.max_seq_len // 4, 1)

    @property
    def segment_length(self) -> int:
        """Tokens in a segment of rmt."""
        return self.rmt_segment or self.max_seq_len // 4

    @property
    def store_block(self) -> int:
        """Pairs that move into knn's store at once."""
        return min(self.local_window, 64)

    def window_of(self, layer: int) -> int | None:
        """Tokens that attention layer `layer` sees, the query's own included; None for all of the past."""
        letter = self.window[layer % len(self.window)]
        return None if letter == "L" else self.local_window

    def value_embed_index(self, layer: int) -> int | None:
        """Which of the value embeddings a layer uses. Alternating layers have one, the last layer
        included."""
        has_one = self.value_embeds and layer % 2 == (self.n_layer - 1) % 2
        return layer // 2 if has_one else None


PRESETS = {
    # This one trains in minutes on two cores. Its 128 channels make 2 heads of 64: normalised queries
    # and keys score √D at most, so a small D could not single out one of max_seq_len keys. With this RoPE base
    # half of the wavelengths fit into a row.
    "laptop": dict(n_head=2, rope_theta=10_000.0, token_shift=True),
    # its vocabulary is memory-bench's; train.py takes that of the tokenizer
    "d12": dict(n_layer=12, n_head=6, n_embd=768, vocab_size=32768, max_seq_len=2048, value_embeds=True),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, max_seq_len=512, window="L", pos="learned",
                 norm="layer", activation="gelu", bias=True, tie_embeddings=True, qk_norm=False, softcap=0.0,
                 dropout=0.05),
}


# ----------------------------------------------------------------------------------------------------------------------
# Shared parts: tensors

def at_least_float32(x: Tensor) -> torch.dtype:
    """float32, or x's own dtype where that is wider."""
    return state_dtype(x.dtype)


def full_precision(x: Tensor):
    """Recurrences, gates and normalisations stay out of autocast: a state in bf16 would forget by
    rounding."""
    return torch.autocast(x.device.type, enabled=False)


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last axis, in float32 at least."""
    x = x.to(at_least_float32(x))
    return x * (x.square().sum(-1, keepdim=True) + 1e-12).rsqrt()


def split_heads(x: Tensor, D: int) -> Tensor:
    """(B,T,H·D) -> (B,H,T,D)"""
    return x.view(*x.shape[:2], -1, D).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B,H,T,D) -> (B,T,H·D)"""
    return x.transpose(1, 2).flatten(2)


def extend(seen: Tensor | None, new: Tensor) -> Tensor:
    """The past and what is new, one after the other in time (axis 2)."""
    return new if seen is None else torch.cat([seen, new], 2)


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE (Su et al. 2021): the pair (x_i, x_{i+D/2}) turns by positions · theta^(-2i/D).

    x (B,H,T,D), positions (T,) -> (B,H,T,D)
    """
    D = x.size(-1)
    dtype = at_least_float32(x)
    frequency = theta ** (-torch.arange(0, D, 2, device=x.device, dtype=dtype) / D)     # (D/2,)
    angle = positions.to(dtype)[:, None] * frequency                                    # (T,D/2)
    cos = angle.cos().to(x.dtype)
    sin = angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)                              # each (B,H,T,D/2)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


CONV_WIDTH = 4      # tokens that a short convolution sees, as published for ttt and deltanet


def causal_conv(x: Tensor, weight: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """A depthwise convolution over time that looks back only: y_t = Σ_i weight_i ⊙ x_{t-width+1+i}.

    x (B,T,channels), weight (channels,1,width), tail (B,width-1,channels) the inputs before x, None
    for zeros -> y (B,T,channels), the new tail
    """
    B, T, channels = x.shape
    width = weight.size(2)
    if tail is None:
        tail = x.new_zeros(B, width - 1, channels)
    x = torch.cat([tail, x], 1)
    # Shifted multiply-adds: as fast as a grouped convolution on the CPU, and one fused pass under
    # torch.compile.
    y = 0
    for i in range(width):
        y = y + weight[:, 0, i].to(x.dtype) * x[:, i:i + T]
    return y, x[:, T:]


def conv_start(*shape) -> Tensor:
    """How the filters and biases of a short convolution start in the official codes of Gated DeltaNet
    and TTT (nn.Conv1d's way): uniform within ±1/√width."""
    return torch.empty(shape).uniform_(-1, 1) * CONV_WIDTH ** -0.5


# ----------------------------------------------------------------------------------------------------------------------
# Shared parts: softmax attention (Vaswani et al. 2017, eq. 1), first slow, then fast

def attend_slow(q, k, v, window=None, n_free=0, slopes=None, scale=None):
    """Causal attention as its equation, with a Tq×Tk matrix of weights. Arguments as of `attend`."""
    _, H, Tq, D = q.shape
    Tk = k.size(2)
    k = repeat_heads(k, H)
    v = repeat_heads(v, H)
    if scale is None:
        scale = D ** -0.5
    score = scale * (q @ k.mT)                                  # q_i·k_j / √D  (B,H,Tq,Tk)

    # Query i stands at key i: the last Tq of the keys belong to the queries.
    i = torch.arange(Tk - Tq, Tk, device=q.device)[:, None]
    j = torch.arange(Tk, device=q.device)
    distance = torch.where(j < n_free, 0, i - j)                # free keys are never far
    if slopes is not None:
        score = score - slopes[:, None, None] * distance        # ALiBi: far tokens count less
    visible = (j <= i) & (distance < (window or Tk))
    weights = score.masked_fill(~visible, -math.inf).softmax(-1)    # rows sum to one
    return weights @ v


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, n_free: int = 0, slopes: Tensor | None = None,
           scale: float | None = None, dropout: float = 0.0) -> Tensor:
    """Causal attention: q (B,H,Tq,D), k (B,Hkv,Tk,D), v (B,Hkv,Tk,Dv) -> (B,H,Tq,Dv).

    The last Tq keys stand at the queries' positions. Query i sees only keys j <= i, and of these only
    those with i - j < window and the first n_free. slopes (H,) are ALiBi's, from which
    the free keys are exempt. Whole sequences without window and slopes are one flash-attention
    call. Otherwise queries go block by block, each with a mask of its own, and a window's block
    meets only the keys of its window: O(T·window).
    """
    _, H, Tq, _ = q.shape
    Tk = k.size(2)
    k = repeat_heads(k, H)
    v = repeat_heads(v, H)
    before = Tk - Tq        # keys that precede the first query's own

    # Without window and slopes no mask is needed but the causal one, which is built into the kernel.
    only_causal = slopes is None and (window is None or window >= Tk)
    if only_causal and Tq == 1:
        # the one query is the newest token: it sees every key
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    if only_causal and before <= Tq:
        # The kernel wants as many queries as keys, so blank ones stand on the left. That at most
        # doubles the work.
        padded = F.pad(q, (0, 0, before, 0))
        y = F.scaled_dot_product_attention(padded, k, v, dropout_p=dropout, is_causal=True, scale=scale)
        return y[:, :, before:]
    return attend_in_blocks(q, k, v, window, n_free, slopes, scale, dropout)


def attend_in_blocks(q, k, v, window, n_free, slopes, scale, dropout):
    """`attend` for one block of queries after the other; k and v have as many heads as q."""
    Tq = q.size(2)
    Tk = k.size(2)
    before = Tk - Tq
    free = min(n_free, Tk)
    block = max(window or 256, 64)      # at least as wide as the window, so that this reaches at most one block back

    # Keys and values are cut into pieces: 0 holds the free keys, 1 the others that precede the
    # queries, 2 + n the keys of the n-th block of queries. The cut is made by split, as the
    # gradient of a slice is as long as the whole sequence, and a slice for each block would cost
    # O(T²/block). For 2 free keys, 3 more of the past, and 130 queries in blocks of 64 the pieces
    # have 2, 3, 64, 64 and 2 keys. (A free key that is itself a query stands in piece 0 alone.)
    ends = [free, max(before, free)]
    for end in range(before + block, Tk, block):
        ends.append(max(end, free))
    ends.append(Tk)
    sizes = [end - begin for begin, end in zip([0, *ends], ends)]
    k_pieces = k.split(sizes, 2)
    v_pieces = v.split(sizes, 2)
    positions = torch.arange(Tk, device=q.device)
    j_pieces = positions.split(sizes)
    i_blocks = positions[before:, None].split(block)

    ys = []
    for n, q_block in enumerate(q.split(block, 2)):
        # The free keys, then what the block can see of the past, then its own keys.
        first = n + 1 if window else 1
        visible_pieces = [0, *range(first, n + 3)]
        keys = torch.cat([k_pieces[p] for p in visible_pieces], 2)
        values = torch.cat([v_pieces[p] for p in visible_pieces], 2)
        j = torch.cat([j_pieces[p] for p in visible_pieces])            # (keys,)
        i = i_blocks[n]                                                 # (block,1)

        mask = j <= i
        if window is not None:
            mask = mask & ((i - j < window) | (j < n_free))
        if slopes is not None:
            bias = -slopes[:, None, None] * torch.where(j < n_free, 0, i - j)
            mask = bias.masked_fill(~mask, -math.inf).to(q.dtype)  # (H,block,keys), added to the scores
        y = F.scaled_dot_product_attention(q_block, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale)
        ys.append(y)
    return torch.cat(ys, 2)


def repeat_heads(x: Tensor, H: int) -> Tensor:
    """(B,Hkv,T,D) -> (B,H,T,D): grouped queries, where H/Hkv neighbouring heads share keys and
    values."""
    return x if x.size(1) == H else x.repeat_interleave(H // x.size(1), 1)


def one_hot_values(k: Tensor) -> Tensor:
    """One unit vector a key: with these for values, attention returns its weights. k (B,H,keys,D)
    -> (B,H,keys,keys) in float64"""
    n = k.size(2)
    return torch.eye(n, device=k.device, dtype=torch.float64).expand(*k.shape[:2], n, n)


def attention_flops(T: int, window: int | None, width: int, n_free: int = 0) -> float:
    """Forward FLOPs a token of causal attention: scores and mixing cost 2·width each per visible
    key, averaged over T. No window hides the first n_free of the T keys."""
    w = min(window or T, T)
    visible = w * (w + 1) / 2 + (T - w) * w             # the first w queries see 1, 2, …, w keys, the others w
    # those others have 1, 2, …, T - w keys before their window, and still see at most n_free of them
    free = min(n_free, T - w)
    visible += free * (free + 1) / 2 + (T - w - free) * free
    return 4 * width * visible / T


# ----------------------------------------------------------------------------------------------------------------------
# Shared parts: modules

class Norm(nn.Module):
    """RMSNorm without parameters, or LayerNorm, over the channels."""
    def __init__(self, config: Config):
        super().__init__()
        self.shape = (config.n_embd,)
        self.is_rms = config.norm == "rms"
        if not self.is_rms:
            self.weight = nn.Parameter(torch.ones(config.n_embd))
            self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        """x (...,C) -> the same shape."""
        if self.is_rms:
            return F.rms_norm(x, self.shape)
        return F.layer_norm(x, self.shape, self.weight, self.bias)


class ValueGate(nn.Module):
    """v + 2σ(W x) ve: the layer's values plus the token's value embedding, gated per head by the
    input's first 32 channels. v (B,H,T,Dv); ve (B,T,Hkv·D) is repeated where the layer has more
    heads or wider values. (nanochat's)"""
    def __init__(self, config: Config, heads: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.width = min(32, config.n_embd)
        self.linear = nn.Linear(self.width, heads, bias=False)

    def forward(self, v, x, ve):
        """The values v of tokens with inputs x (B,T,C) and value embeddings ve -> the new
        values."""
        gate = 2 * torch.sigmoid(self.linear(x[..., :self.width]))      # (B,T,H)
        gate = gate.transpose(1, 2)[..., None]                          # (B,H,T,1)
        ve = split_heads(ve, self.head_dim)                             # (B,Hkv,T,D)
        ve = repeat_heads(ve, v.size(1))                                # (B,H,T,D)
        ve = ve.repeat(1, 1, 1, v.size(-1) // ve.size(-1))              # (B,H,T,Dv)
        return v + (gate * ve).to(v.dtype)


def value_gate(config: Config, layer: int, heads: int) -> ValueGate | None:
    """The layer's gate for value embeddings, None where the layer has none of them."""
    if config.value_embed_index(layer) is None:
        return None
    return ValueGate(config, heads)


# ----------------------------------------------------------------------------------------------------------------------
# none: attention

class AttentionState(NamedTuple):
    """The keys and values that a later query can still see."""
    k: Tensor    # (B,Hkv,t,D) turned to their positions; t grows without end only in an L layer
    v: Tensor    # (B,Hkv,t,D)
    pos: Tensor  # ()


class Attention(nn.Module):
    """Softmax attention (`attend`) over a window or over all of the past. The keys of its first n_free
    tokens are free: they stay visible whatever the window is."""
    def __init__(self, config: Config, layer: int, n_free: int = 0):
        super().__init__()
        C = config.n_embd
        self.H = config.n_head
        self.Hkv = config.n_kv_head
        self.D = config.head_dim
        self.q = nn.Linear(C, self.H * self.D, bias=config.bias)
        self.k = nn.Linear(C, self.Hkv * self.D, bias=config.bias)
        self.v = nn.Linear(C, self.Hkv * self.D, bias=config.bias)
        self.out = nn.Linear(C, C, bias=config.bias)
        self.value_gate = value_gate(config, layer, self.Hkv)

        self.window = config.window_of(layer)
        self.n_free = n_free
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        self.theta = config.rope_theta if config.pos == "rope" else None
        slopes = None
        if config.pos == "alibi":       # 2^(-8/H), 2^(-16/H), …, 2^-8 (Press et al. 2022)
            slopes = torch.tensor([2.0 ** (-8 * (h + 1) / self.H) for h in range(self.H)])
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, x, state=None, ve=None):
        """x (B,T,C) -> y (B,T,C), the new state."""
        q, k, v = self.project(x, ve)
        y, state = self.look_back(q, k, v, state)
        return self.out(join_heads(y)), state

    def project(self, x, ve):
        """x (B,T,C) -> q (B,H,T,D), k, v (B,Hkv,T,D), normalised but not yet rotated."""
        q = split_heads(self.q(x), self.D)
        k = split_heads(self.k(x), self.D)
        v = split_heads(self.v(x), self.D)
        if self.qk_norm:
            q = F.rms_norm(q, (self.D,))
            k = F.rms_norm(k, (self.D,))
        if self.value_gate is not None:
            v = self.value_gate(v, x, ve)
        return q, k, v

    def look_back(self, q, k, v, state):
        """Attention of projected queries over what they see -> y (B,H,T,D), what a later query can
        still see."""
        q, k, v, n_free, state = self.gather(q, k, v, state)
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, self.window, n_free, self.slopes, dropout=dropout), state

    def gather(self, q, k, v, state):
        """Turns q and k to their positions and puts the past before k and v.

        -> q (B,H,T,D), k and v (B,Hkv,keys,D), how many free keys come first, and the new state
        """
        seen_k, seen_v, pos = (None, None, 0) if state is None else state
        end = int(pos) + q.size(2)
        if self.theta is not None:
            positions = torch.arange(int(pos), end, device=q.device)
            q = rotary(q, positions, self.theta)
            k = rotary(k, positions, self.theta)
        # Under autocast the normalisation gives float32; keys are kept in the values' dtype.
        k = extend(seen_k, k.to(v.dtype))
        v = extend(seen_v, v)
        state = AttentionState(self.still_visible(k), self.still_visible(v), torch.tensor(end))
        k, v, n_free = self.with_slots(k, v)
        return q, k, v, n_free, state

    def still_visible(self, x):
        """Of keys or values (B,Hkv,t,D) those a later query sees: the free ones, and the window's
        last W-1, because the next token is the window's W-th."""
        if self.window is None:
            return x
        recent = self.window - 1
        if x.size(2) <= self.n_free + recent:
            return x
        return torch.cat([x[:, :, :self.n_free], x[:, :, x.size(2) - recent:]], 2)

    def with_slots(self, k, v):
        """k, v (B,Hkv,T,D) -> the same with a memory's slots before them, and how many free keys come first."""
        return k, v, self.n_free

    def weights(self, x, state=None, ve=None):
        """Where the queries of a call look.

        -> the weight of all free keys together (B,H,T): these are slots or memory tokens, no tokens of the text;
        and the weight of each token (B,H,T,tokens), in order, the last of which is the call's last
        """
        q, k, v = self.project(x, ve)
        q, k, v, n_free, _ = self.gather(q, k, v, state)
        weights = attend(q.double(), k.double(), one_hot_values(k), self.window, n_free, self.slopes)
        return weights[..., :n_free].sum(-1), weights[..., n_free:]

    def flops(self, T):
        """Scores and mixing."""
        return attention_flops(T, self.window, self.H * self.D, self.n_free)


# ----------------------------------------------------------------------------------------------------------------------
# persistent: learned slots (Sukhbaatar et al. 2019)

class PersistentAttention(Attention):
    """Attention whose every query also sees M learned key/value pairs, which have no position and
    lie in no window.

    Sukhbaatar et al. 2019, section 4: one softmax over the M slots and the tokens. There the slots
    take the place of the feed-forward layers, here they stand beside them. The nearest code by the
    authors is persistent_memory.py in https://github.com/facebookresearch/adaptive-span, where
    every head has its own, as here.
    """
    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.M = config.persistent_slots
        std = 0.02 * config.n_embd ** 0.5      # the spread of a projected key or value at the start
        self.slot_k = nn.Parameter(std * torch.randn(self.M, self.Hkv * self.D))
        self.slot_v = nn.Parameter(std * torch.randn(self.M, self.Hkv * self.D))
        self.slot_scale = nn.Parameter(torch.tensor([0.01]))  # the slots start by adding little to the values

    def with_slots(self, k, v):
        """One softmax over [slots; tokens]: k, v (B,Hkv,T,D) -> (B,Hkv,M+T,D), and the free keys."""
        slot_k = split_heads(self.slot_k[None].to(k.dtype), self.D)  # (1,Hkv,M,D)
        slot_v = split_heads((self.slot_scale * self.slot_v)[None].to(v.dtype), self.D)
        if self.qk_norm:
            slot_k = F.rms_norm(slot_k, (self.D,)).to(k.dtype)
        B = k.size(0)
        k = torch.cat([slot_k.expand(B, -1, -1, -1), k], 2)
        v = torch.cat([slot_v.expand(B, -1, -1, -1), v], 2)
        return k, v, self.M + self.n_free

    def flops(self, T):
        """Attention's, and M more keys a query."""
        return super().flops(T) + 4 * self.M * self.H * self.D


# ----------------------------------------------------------------------------------------------------------------------
# knn: an external key-value store (Wu et al. 2022)

class Store(NamedTuple):
    """n pairs, at most N. They enter `store_block` at a time, so some of them may still be in the window;
    retrieval skips these."""
    k: Tensor        # (B,Hkv,n,D) unrotated keys: a match is by content, wherever the token stood
    v: Tensor        # (B,Hkv,n,D)
    written: Tensor  # (B,Hkv,n) the token's position
    used: Tensor     # (B,Hkv,n) lru: position of the last query that retrieved it; at first, of its arrival


class KNNState(NamedTuple):
    """What window attention remembers, the window's pairs, and the store."""
    local: AttentionState
    k: Tensor   # (B,Hkv,w,D) unrotated keys of the window's w <= W tokens, the next to move into the store
    v: Tensor   # (B,Hkv,w,D)
    store: Store | None


class KNNAttention(Attention):
    """Window attention, plus a store of the (key, value) pairs that have left the window. A query
    retrieves the keys nearest to it (knn_topk of them) from the store and attends to them, and a
    learned gate per head mixes both results:

        y = (1 - σ(a)) y_window + σ(a) Σ_{j in top-k} softmax_j(q·k_j / √D) v_j

    No gradient flows into stored pairs. The window is short_window whatever the pattern: further
    back only the store reaches. `slow` says the same token by token. (With lru, pairs last used at the
    same token may leave in another order there.)

    Wu et al. 2022, section 3 (retrieval and gate). The authors' code is not published; the nearest
    is https://github.com/lucidrains/memorizing-transformers-pytorch, which has one softmax instead
    of the gate.
    """
    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.window = config.local_window
        self.N = config.knn_capacity
        self.topk = min(config.knn_topk, config.knn_capacity)
        self.evict = config.knn_evict
        self.block = config.store_block
        self.gate = nn.Parameter(torch.zeros(self.H))          # a; σ(0): half local, half retrieved

    def slow(self, x):
        """The layer on a whole sequence, token by token, with one dictionary as the store of
        each sequence and key/value head. x (B,T,C) -> (B,T,C)"""
        q, k, v = self.project(x, None)
        y_window, _ = self.look_back(q, k, v, None)
        q, k = self.by_content(q, k)
        gate = torch.sigmoid(self.gate)
        group = self.H // self.Hkv                              # heads that search the same store
        y = y_window.clone()
        for b, head_kv in itertools.product(range(x.size(0)), range(self.Hkv)):
            store = {}                             # a pair's position -> when it was last retrieved
            for t in range(x.size(1)):
                # Every `block` tokens the pairs are stored that leave the window before the next such move. The
                # oldest, or the least recently used, make room.
                if t % self.block == 0:
                    arriving = range(max(t - self.window, 0), max(t - self.window + self.block, 0))
                    while store and len(store) + len(arriving) > self.N:
                        leaving = min(store) if self.evict == "fifo" else min(store, key=store.get)
                        del store[leaving]
                    store.update(dict.fromkeys(arriving, t))

                # Only pairs outside the window are searched: nothing is seen twice.
                outside = [position for position in store if position <= t - self.window]
                if not outside:
                    continue
                keys = k[b, head_kv, outside]                   # (pairs,D)
                values = v[b, head_kv, outside]
                for h in range(head_kv * group, (head_kv + 1) * group):
                    score = keys @ q[b, h, t] / self.D ** 0.5
                    score, nearest = score.topk(min(self.topk, len(outside)))
                    retrieved = score.softmax(0) @ values[nearest]
                    y[b, h, t] = (1 - gate[h]) * y_window[b, h, t] + gate[h] * retrieved
                    for place in nearest.tolist():
                        store[outside[place]] = t
        return self.out(join_heads(y))

    def by_content(self, q, k):
        """Queries (B,H,T,D) and keys (B,Hkv,T,D) as they meet in the store: normalised, and not rotated."""
        if self.qk_norm:                                        # `project` has done it
            return q, k
        return F.rms_norm(q, (self.D,)), F.rms_norm(k, (self.D,))

    def forward(self, x, state=None, ve=None):
        """x (B,T,C) -> y (B,T,C), the state after it.

        Pairs move into the store in blocks of at most 64 tokens at fixed absolute positions. A
        block is written no later than its first token leaves the window, and each query sees only those
        that have left it, so nothing is seen twice or missed. The price is that up to 63 of the N
        places hold pairs still waiting."""
        if x.size(1) == 0:      # a block that is due would be written now, and again by the next call
            return x, state
        local, past_k, past_v, store = (None, None, None, None) if state is None else state
        begin = 0 if local is None else int(local.pos)
        end = begin + x.size(1)
        q, k, v = self.project(x, ve)
        y, local = self.look_back(q, k, v, local)

        # The pairs of the window before this call, then those of the call.
        q, k = self.by_content(q, k)
        past_k = extend(past_k, k.detach().to(v.dtype))
        past_v = extend(past_v, v.detach())
        first = end - past_k.size(2)                          # absolute position of past_k[:, :, 0]

        # Block by block, cut where the absolute position is a multiple of the block's length.
        next_block = (begin // self.block + 1) * self.block
        bounds = [begin, *range(next_block, end, self.block), end]
        sizes = [b - a for a, b in zip(bounds, bounds[1:])]
        found = []
        any_found = []
        for t, q_block in zip(bounds, q.split(sizes, 2)):
            arriving = max(t - self.window, 0)                # the first position that moves into the store
            end_of_block = t - self.window + self.block
            if t % self.block == 0 and end_of_block > 0:
                new_k = past_k[:, :, arriving - first:end_of_block - first]
                new_v = past_v[:, :, arriving - first:end_of_block - first]
                store = self.write(store, new_k, new_v, arriving, t)
            positions = torch.arange(t, t + q_block.size(2), device=x.device)
            y_block, hit, store = self.retrieve(q_block, store, positions)
            found.append(y_block)
            any_found.append(hit)

        # A query that found nothing keeps what the window says.
        gate = torch.sigmoid(self.gate)[:, None, None] * torch.cat(any_found, 2)        # (B,H,T,1)
        y = y + gate.to(y.dtype) * (torch.cat(found, 2) - y)
        keep = min(self.window, past_k.size(2))
        state = KNNState(local, past_k[:, :, -keep:], past_v[:, :, -keep:], store)
        return self.out(join_heads(y)), state

    def write(self, store, k, v, first, now):
        """The store after the tokens first, first+1, … have entered it at position `now`, as k and v
        (B,Hkv,tokens,D). Where they do not fit, the oldest (fifo) or least recently retrieved (lru) pairs leave."""
        position = torch.arange(first, first + k.size(2), device=k.device).expand(*k.shape[:3])
        new = Store(k, v, written=position, used=torch.full_like(position, now))
        if store is None:
            return new
        room = self.N - k.size(2)
        if store.k.size(2) > room:
            recency = store.written if self.evict == "fifo" else store.used
            keep = recency.topk(room, dim=-1, sorted=False).indices  # (B,Hkv,room) the most recent stay
            rows = keep[..., None].expand(-1, -1, -1, self.D)
            store = Store(store.k.gather(2, rows), store.v.gather(2, rows),
                          store.written.gather(2, keep), store.used.gather(2, keep))
        return Store(*map(extend, store, new))

    def retrieve(self, q, store, t):
        """q (B,H,n,D) at positions t (n,) -> mixed values (B,H,n,D), whether anything was found
        (B,H,n,1), new store."""
        B, _, n, D = q.shape
        if store is None:
            return torch.zeros_like(q), torch.zeros_like(q[..., :1], dtype=torch.bool), None

        # The heads of a group search the same store, so they stand one after the other in time: G·n
        # queries.
        group = self.H // self.Hkv
        q = q.reshape(B, self.Hkv, group * n, D)
        t_column = t.repeat(group)[:, None]                             # (G·n,1)
        outside = store.written[:, :, None] <= t_column - self.window   # (B,Hkv,G·n,size)
        score = (q @ store.k.to(q.dtype).mT * D ** -0.5).masked_fill(~outside, -math.inf)
        best, place = score.detach().topk(min(self.topk, score.size(-1)), sorted=False)
        is_pair = best > -math.inf         # (B,Hkv,G·n,topk): not one that is hidden from the query

        # All other scores are masked rather than the best gathered: two matrix products cost less
        # than moving topk·D numbers a query. finfo.min instead of -inf keeps the softmax of a query
        # that found nothing finite.
        is_nearest = torch.zeros_like(outside).scatter(-1, place, is_pair)
        weight = score.masked_fill(~is_nearest, torch.finfo(score.dtype).min).softmax(-1)
        y = weight @ store.v.to(q.dtype)
        if self.evict == "lru":
            store = store._replace(used=self.last_use(store, score.detach(), best, outside, t_column))
        hit = is_pair.any(-1, keepdim=True)
        return y.reshape(B, self.H, n, D), hit.reshape(B, self.H, n, 1), store

    def last_use(self, store, score, best, outside, t):
        """When each stored pair was last retrieved (B,Hkv,pairs), after the queries at t (G·n,1); score and
        outside (B,Hkv,G·n,pairs), best (B,Hkv,G·n,topk).

        Equal tokens can have equal keys. Which of them topk takes is a matter of rounding, so all
        that tie with the last taken count as retrieved: otherwise what leaves the store would
        depend on how the text was cut.
        """
        last = best.amin(-1, keepdim=True)                  # -inf where fewer than topk can be seen
        # a few units of rounding, of a score that is at most √D
        tolerance = 8 * torch.finfo(score.dtype).eps * last.abs().clamp(1, self.D)
        retrieved = (score >= last - tolerance) & outside
        return store.used.maximum(torch.where(retrieved, t, -1).amax(2))

    def weights(self, x, state=None, ve=None):
        """Where the queries look within the window (what the store adds has no fixed place)."""
        return super().weights(x, None if state is None else state.local, ve)

    def flops(self, T):
        """Attention's; each query is scored against all N stored keys, and the mixing runs over all N
        values too, where those that are not among the nearest weigh 0."""
        return super().flops(T) + self.H * self.D * 4 * self.N


# ----------------------------------------------------------------------------------------------------------------------
# ttt: TTT-Linear (Sun et al. 2024)

class TTTLayerState(NamedTuple):
    """The convolutions' last inputs, and the inner model."""
    tail: Tensor | None    # (B,CONV_WIDTH-1,C), None in the transformer backbone
    inner: TTTState


class TTT(nn.Module):
    """The state is the weights of a small linear model, trained by gradient descent while it reads.
    The recurrence is `ttt_linear` in memories.py, its slow form the loop there.

    Sun et al. 2024, section 2; https://github.com/test-time-training/ttt-lm-pytorch, ttt.py. The
    paper has two layers around the inner model (its section 2.7), and the one whose results it calls
    TTT-Linear is `mamba`: queries and keys are two convolutions of one projection, and the output
    is gated. In `transformer` each has a projection of its own, and there is no gate.
    """
    def __init__(self, config: Config, layer: int):
        super().__init__()
        C = config.n_embd
        H = config.n_head
        self.D = config.head_dim
        self.K = config.ttt_chunk
        self.is_mamba = config.ttt_backbone == "mamba"
        if self.is_mamba:
            self.qk = nn.Linear(C, C, bias=config.bias)
            self.output_gate = nn.Linear(C, C, bias=config.bias)
            self.conv_q = nn.Parameter(conv_start(C, 1, CONV_WIDTH))
            self.conv_k = nn.Parameter(conv_start(C, 1, CONV_WIDTH))
            self.conv_q_bias = nn.Parameter(conv_start(C))
            self.conv_k_bias = nn.Parameter(conv_start(C))
        else:
            self.q = nn.Linear(C, C, bias=config.bias)
            self.k = nn.Linear(C, C, bias=config.bias)
        self.v = nn.Linear(C, C, bias=config.bias)
        self.lr = nn.Linear(C, H)                                       # w_h, c_h: η = σ(w_h·x + c_h) / D
        self.scale_offset = nn.Parameter(torch.zeros(self.K))           # learned_i: s_i = 1/i + learned_i
        self.W = nn.Parameter(0.02 * torch.randn(H * self.D, self.D))   # W_0, the heads stacked into a matrix for Muon
        self.b = nn.Parameter(torch.zeros(H * self.D))                  # b_0
        self.ln_weight = nn.Parameter(torch.ones(H * self.D))
        self.ln_bias = nn.Parameter(torch.zeros(H * self.D))
        self.post_norm = nn.LayerNorm(C, eps=1e-6)
        self.out = nn.Linear(C, C, bias=config.bias)
        self.value_gate = value_gate(config, layer, H)
        self.theta = config.rope_theta

    def forward(self, x, state: TTTLayerState | None = None, ve=None):
        """x (B,T,C) -> y (B,T,C), the state after it."""
        tail, inner = (None, None) if state is None else state
        q, k, tail = self.queries_and_keys(x, tail)                     # (B,T,C)
        q = split_heads(q, self.D)                                      # (B,H,T,D)
        k = split_heads(k, self.D)
        v = split_heads(self.v(x), self.D)
        if self.value_gate is not None:
            v = self.value_gate(v, x, ve)

        # Queries and keys turn by the position within the mini-batch: beyond it the inner model
        # knows no order.
        seen = 0 if inner is None else int(inner.pos)
        positions = torch.arange(seen, seen + x.size(1), device=x.device) % self.K
        q = rotary(q, positions, self.theta)
        k = rotary(k, positions, self.theta)

        # η_t = σ(w_h·x_t + c_h) / D is how far a token moves the weights; s_i = max(0, 1/i +
        # learned_i) how far a step at place i of the mini-batch goes.
        lr = torch.sigmoid(self.lr(x).to(at_least_float32(x))) / self.D  # (B,T,H)
        place = torch.arange(1, self.K + 1, device=x.device, dtype=self.scale_offset.dtype)
        token_scale = (1 / place + self.scale_offset).clamp(min=0)  # s (K,)

        # Parameters are matrices and vectors of all heads together; the recurrence wants them by
        # head.
        W = self.W.view(-1, self.D, self.D)
        b = self.b.view(-1, self.D)
        ln_weight = self.ln_weight.view(-1, self.D)
        ln_bias = self.ln_bias.view(-1, self.D)
        with full_precision(x):
            o, inner = ttt_linear(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), lr, token_scale,
                                  W, b, ln_weight, ln_bias, inner)  # o (B,T,H,D)
        y = self.post_norm(o.flatten(2))
        if self.is_mamba:
            y = F.gelu(self.output_gate(x), approximate="tanh") * y
        return self.out(y), TTTLayerState(tail, inner)

    def queries_and_keys(self, x, tail):
        """x (B,T,C), the convolutions' last inputs -> q, k (B,T,C), the new last inputs."""
        if not self.is_mamba:
            return self.q(x), self.k(x), None
        u = self.qk(x)
        q, new_tail = causal_conv(u, self.conv_q, tail)
        k, _ = causal_conv(u, self.conv_k, tail)
        return q + self.conv_q_bias.to(q.dtype), k + self.conv_k_bias.to(k.dtype), new_tail

    def flops(self, T):
        """A head's products with D×D matrices are three: the answer to the key, that to the query, and
        kᵀ∇ (6D²). Within a mini-batch a query meets K keys and their gradients (4KD). The convolutions."""
        H = self.W.size(0) // self.D
        convolutions = 4 * self.conv_q.numel() if self.is_mamba else 0
        return H * (6 * self.D * self.D + 4 * self.K * self.D) + convolutions


# ----------------------------------------------------------------------------------------------------------------------
# deltanet: Gated DeltaNet (Yang et al. 2025)

class DeltaNetState(NamedTuple):
    """The convolution's last inputs, and the fast weights."""
    tail: Tensor  # (B,CONV_WIDTH-1,channels)
    S: Tensor     # (B,H,Dk,Dv)


class DeltaNet(nn.Module):
    """Fast weights S written by the gated delta rule. The recurrence is `gated_delta_rule` in
    memories.py, its slow form the loop there.

    Yang et al. 2025, eq. 10, and the block design of section 3;
    https://github.com/NVlabs/GatedDeltaNet, lit_gpt/gated_delta_net.py. β = σ(W_β x) and log α =
    -exp(A_log) softplus(W_α x + dt_bias), as in Mamba 2.

    delta_beta=2 doubles β, so that I - β k kᵀ can reflect (Grazzi et al. 2024). With delta_steps=n
    a token has n keys, values and β (DeltaProduct, Siems et al. 2025): it forgets once, writes n
    times, and then reads. delta_erase=False leaves the correction out.
    """
    def __init__(self, config: Config, layer: int):
        super().__init__()
        C = config.n_embd
        H = config.n_head
        self.D = config.head_dim
        self.Dv = self.D * config.expand_v
        self.beta_max = config.delta_beta
        n = config.delta_steps
        self.steps = n
        self.erase = config.delta_erase
        self.q = nn.Linear(C, C, bias=False)
        self.k = nn.Linear(C, n * C, bias=False)
        self.v = nn.Linear(C, n * H * self.Dv, bias=False)
        self.output_gate = nn.Linear(C, H * self.Dv, bias=False)
        self.beta = nn.Linear(C, n * H, bias=False)
        self.alpha = nn.Linear(C, H, bias=False)

        # q, k and v share one depthwise convolution: a filter a channel, without bias.
        channels = C + n * C + n * H * self.Dv
        self.conv = nn.Parameter(conv_start(channels, 1, CONV_WIDTH))

        # How fast S forgets: the rate A ~ U(0,16), and a time step dt, log-uniform from 0.001 to
        # 0.1.
        self.A_log = nn.Parameter(torch.empty(H).uniform_(0, 16).log())
        dt = torch.exp(torch.empty(H).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt

        self.norm_weight = nn.Parameter(torch.ones(self.Dv))
        self.out = nn.Linear(H * self.Dv, C, bias=False)
        self.value_gate = value_gate(config, layer, n * H)

    def forward(self, x, state=None, ve=None):
        """x (B,T,C) -> y (B,T,C), the new state."""
        n = self.steps
        tail, S = (None, None) if state is None else state
        v = self.v(x)                                                                   # (B,T,H·n·Dv)
        if self.value_gate is not None:
            v = join_heads(self.value_gate(split_heads(v, self.Dv), x, ve))
        projected = torch.cat([self.q(x), self.k(x), v], -1)                            # (B,T,channels)
        convolved, tail = causal_conv(projected, self.conv, tail)
        convolved = F.silu(convolved)
        C = x.size(2)
        q, k, v = convolved.split([C, n * C, convolved.size(2) - C - n * C], -1)
        q = q.unflatten(-1, (-1, self.D))                                               # (B,T,H,D)
        k = k.unflatten(-1, (-1, self.D))                                               # (B,T,H·n,D)
        v = v.unflatten(-1, (-1, self.Dv))                                              # (B,T,H·n,Dv)

        # The gates, in float32: β says how much a token overwrites, and log α <= 0 how much S keeps.
        beta = self.beta_max * torch.sigmoid(self.beta(x).to(at_least_float32(x)))      # (B,T,H·n)
        dt = F.softplus(self.alpha(x).to(at_least_float32(x)) + self.dt_bias)
        log_alpha = -self.A_log.exp() * dt                                              # (B,T,H)

        # To the rule every step is a token. The first of a token's steps forgets for all of them,
        # and what is read after the last one is the token's answer.
        q = unit(q).to(v.dtype).repeat_interleave(n, 1)                                 # (B,T·n,H,D)
        k = self.by_step(unit(k).to(v.dtype))
        v = self.by_step(v)
        beta = self.by_step(beta)                                                       # (B,T·n,H)
        log_alpha = F.pad(log_alpha[:, :, None], (0, 0, 0, n - 1)).flatten(1, 2)        # (B,T·n,H), 0 from step 2 on
        with full_precision(x):
            o, S = gated_delta_rule(q, k, v, log_alpha, beta, S, erase=self.erase)
        o = o[:, n - 1::n]                                                              # (B,T,H,Dv)

        # RMSNorm per head, then a gate per channel.
        o = F.rms_norm(o, (self.Dv,), self.norm_weight.to(o.dtype), eps=1e-6).flatten(2)
        return self.out(o * F.silu(self.output_gate(x))), DeltaNetState(tail, S)

    def by_step(self, x):
        """The n steps of each token, one after the other: (B,T,H·n,...) -> (B,T·n,H,...)."""
        return x.unflatten(2, (-1, self.steps)).transpose(2, 3).flatten(1, 2)

    def flops(self, T):
        """The rule's chunked form, n steps a token, with its triangular solve counted as a full product; and the
        convolution."""
        heads_and_steps = self.beta.out_features
        chunk = min(DELTA_CHUNK, T * self.steps)
        rule = 2 * chunk * (self.D + self.Dv) + 4 * self.D * self.Dv
        if self.erase:
            rule += 2 * chunk * (2 * self.D + self.Dv) + 2 * self.D * self.Dv
        convolution = 2 * CONV_WIDTH * self.conv.size(0)
        return heads_and_steps * rule + convolution


# ----------------------------------------------------------------------------------------------------------------------
# mosaic: Memory Mosaics (Zhang et al. 2024)

EXP_SPEEDUP = 10.0   # scales and leaks are stored divided by this, so that a step moves them ten times as far (save
                     # AdaptiveMemory's)
KEY_SCALE_MAX = 5.0  # the largest logarithm of a key's length


class MosaicKey(nn.Module):
    """k_t = exp(min(power·s, KEY_SCALE_MAX)) k̄_t/‖k̄_t‖,   k̄_t = W_φ x_t + λ k̄_{t-1},   λ = exp(-|b|)   per head.

    Zhang et al. 2024, eq. 7; https://github.com/facebookresearch/MemoryMosaics,
    Library/memory_mosaics/models/memory_mosaics.py, which the rest of `mosaic` follows too. The factor
    1 - λ there has no effect, since keys are normalised.
    """
    def __init__(self, config: Config, power: float):
        super().__init__()
        self.D = config.head_dim
        # k·k has the factor exp(s) twice. Learned keys have no such factor, so that a key that meets them gets
        # exp(2s), which is power = 2.
        self.power = power
        self.phi = nn.Linear(config.n_embd, config.n_embd, bias=False)                  # W_φ
        self.leak = nn.Parameter(torch.linspace(0.5, 5, config.n_head) / EXP_SPEEDUP)   # b / 10
        self.scale = nn.Parameter(torch.ones(config.n_head) / EXP_SPEEDUP)              # s / 10 (the paper's σ)

    def slow(self, x):
        """The keys of a whole sequence, token by token: x (B,T,C) -> (B,H,T,D)."""
        decay = self.decay()
        size = self.size()
        k_bar = 0
        keys = []
        for new in split_heads(self.phi(x), self.D).unbind(2):  # W_φ x_t  (B,H,D)
            k_bar = new + decay[:, None] * k_bar
            keys.append(size[:, None] * k_bar / k_bar.norm(dim=-1, keepdim=True))
        return torch.stack(keys, 2)

    def decay(self):
        """λ (H,), the share of the leaky sum that a token keeps. (It is called an average: its length
        does not matter, since keys are normalised.)"""
        return torch.exp(-EXP_SPEEDUP * self.leak.abs())

    def size(self):
        """The keys' length (H,): the longer they are, the more the nearest key outweighs the
        others."""
        if self.scale is None:      # AdaptiveMemory takes the scale away: its keys have length 1, and it scales queries
            return torch.ones_like(self.phi.weight[::self.D, 0])    # (H,) on phi's device
        return (self.power * EXP_SPEEDUP * self.scale).clamp(max=KEY_SCALE_MAX).exp()

    def gates(self, x):
        """decay (H,), log_decay and log_gate (B,T,H) of leaky_average, given x (B,T,C)."""
        return self.decay(), None, None

    def forward(self, x, k_bar, impl="auto"):
        """x (B,T,C), k_bar (B,H,D) or None -> keys (B,H,T,D), the new k_bar."""
        new = self.phi(x).unflatten(-1, (-1, self.D))                                   # (B,T,H,D)
        with full_precision(x):
            decay, log_decay, log_gate = self.gates(x)
            averages, k_bar = leaky_average(new, decay, k_bar, impl, log_decay, log_gate)
            keys = self.size()[:, None, None] * unit(averages.transpose(1, 2))
            return keys.to(averages.dtype), k_bar


class ContextState(NamedTuple):
    """The keys and values that a later query can see, and what the next ones are made of."""
    k_bar: Tensor  # (B,H,D)     the leaky average
    k: Tensor      # (B,H,t,D)   the keys: of all tokens, or of a window
    v: Tensor      # (B,H,t-1,D) their values but the last, which waits for the next token
    u: Tensor      # (B,H,1,D)   u of the newest token, the first part of that value


class ContextualMemory(nn.Module):
    """y_t = Σ_{i<t} softmax_i(k_t·k_i) v_i,   v_i = exp(τ) v̄_i/‖v̄_i‖,   v̄_i = a u_i + (1-a) u_{i+1},   u = W_ψ x.

    Keys (`MosaicKey`) are their own queries. The value v_i peeks at token i+1, so the sum stops
    before t, and y_0 = 0. Strictly causal attention is ordinary causal attention of k[1:] on
    k[:-1]: it runs on the flash kernel.
    """
    def __init__(self, config: Config, layer: int):
        super().__init__()
        C = config.n_embd
        H = config.n_head
        self.D = config.head_dim
        self.dropout = config.dropout
        self.key = MosaicKey(config, power=1)
        self.psi = nn.Linear(C, C, bias=False)                                          # W_ψ
        self.mix = nn.Parameter(torch.rand(H))                                          # a
        self.scale = nn.Parameter(torch.full((H,), -0.5) / EXP_SPEEDUP)                 # τ / 10
        self.out = nn.Linear(C, C, bias=False)
        self.value_gate = value_gate(config, layer, H)
        self.window = None                      # pairs that a query sees, all before it; None for no limit

    def slow(self, x):
        """The layer on a whole sequence, token by token. x (B,T,C) -> (B,T,C)"""
        k = self.key.slow(x)                                                            # (B,H,T,D)
        u = split_heads(self.psi(x), self.D)
        a = self.mix[:, None, None]
        size = self.size()[:, None, None]
        ys = [torch.zeros_like(u[:, :, 0])]                     # nothing stands before token 0
        for t in range(1, x.size(1)):
            # the values before t: each has seen the token after its own
            v_bar = a * u[:, :, :t] + (1 - a) * u[:, :, 1:t + 1]
            v = size * v_bar / v_bar.norm(dim=-1, keepdim=True)
            # the key of t asks the keys before t
            score = k[:, :, :t] @ k[:, :, t, :, None]                                   # (B,H,t,1)
            ys.append((score.softmax(2) * v).sum(2))
        return self.out(join_heads(torch.stack(ys, 2)))

    def size(self):
        """The values' length (H,)."""
        return (EXP_SPEEDUP * self.scale).exp()

    def forward(self, x, state=None, ve=None):
        """x (B,T,C) -> y (B,T,C), the new state."""
        k_bar, past_k, past_v, past_u = (None, None, None, None) if state is None else state
        k, k_bar = self.key(x, k_bar)
        u = split_heads(self.psi(x), self.D)
        if self.value_gate is not None:
            u = self.value_gate(u, x, ve)

        # Every token but the newest has its successor, and so its value.
        us = extend(past_u, u)
        with full_precision(x):
            a = self.mix[:, None, None]
            size = self.size()[:, None, None]
            v = size * unit(a * us[:, :, :-1] + (1 - a) * us[:, :, 1:])     # v_i for i < t
        keys = extend(past_k, k)
        values = extend(past_v, v.to(u.dtype))

        # Each key asks those before it. Nothing stands before token 0, where y is 0.
        queries = k[:, :, 1:] if state is None else k
        y = self.ask(queries, keys[:, :, :-1], values)
        if state is None:
            y = F.pad(y, (0, 0, 1, 0))
        gone = max(keys.size(2) - self.window, 0) if self.window else 0     # pairs that no later query sees
        return self.out(join_heads(y)), ContextState(k_bar, keys[:, :, gone:], values[:, :, gone:], u[:, :, -1:])

    def ask(self, queries, keys, values):
        """What queries (B,H,T,D) find among the pairs before them; the last query stands behind the last
        pair."""
        if queries.size(2) == 0:
            return values[:, :, :0]
        dropout = self.dropout if self.training else 0.0
        return attend(queries, keys, values, self.window, scale=1.0, dropout=dropout)

    def weights(self, x, state, ve=None):
        """Where the queries of a later call look, as `Attention.weights`: no free keys, and nothing
        on the own token."""
        k, _ = self.key(x, state.k_bar)
        keys = extend(state.k, k)[:, :, :-1].double()
        weights = self.ask(k.double(), keys, one_hot_values(keys))
        return torch.zeros_like(weights[..., 0]), F.pad(weights, (0, 1))

    def flops(self, T):
        """Causal attention to all of the past, or to a window, and the leaky average of the keys."""
        C = self.psi.in_features
        return attention_flops(T, self.window, C) + 2 * C


def feedforward_size(config: Config) -> int:
    """How many weights a mosaic block's second half has, so that the block has as many as one of attention:
    2C² (q and out), 2C·Hkv·D (k and v) and 8C² (the MLP)."""
    C = config.n_embd
    mixer = 3 * C * C       # phi, psi and out
    if config.memory == "mosaic2":
        gates = 2 * C * config.n_head if config.mosaic2_gated else 0
        mixer = (mixer + gates) * (2 if config.mosaic2_long else 1)
    return 10 * C * C + 2 * C * config.n_kv_head * config.head_dim - mixer


class PersistentMemory(nn.Module):
    """y = exp(τ) softmax(k P_kᵀ) P_v per head, N learned pairs: takes the place of the MLP. Its
    state is the leaky average of its keys."""
    def __init__(self, config: Config):
        super().__init__()
        C = config.n_embd
        H = config.n_head
        self.D = config.head_dim
        self.dropout = config.dropout
        # phi and out have C² weights each, and a pair (a row of P_k and one of P_v) has 2C
        N = config.mosaic_slots or (feedforward_size(config) - 2 * C * C) // (2 * C)
        self.key = MosaicKey(config, power=2)
        self.P_k = nn.Parameter(torch.randn(N, C) * self.D ** -0.5)  # a row is one pair of every head
        self.P_v = nn.Parameter(torch.randn(N, C) * self.D ** -0.5)
        self.scale = nn.Parameter(torch.full((H,), -0.5) / EXP_SPEEDUP)                 # τ / 10
        self.out = nn.Linear(C, C, bias=False)

    def slow(self, x):
        """The layer on a whole sequence, with the matrix of weights. x (B,T,C) -> (B,T,C)"""
        k = self.key.slow(x)                                                            # (B,H,T,D)
        P_k = split_heads(self.P_k[None], self.D)                                       # (1,H,N,D)
        P_v = split_heads(self.P_v[None], self.D)
        y = self.size()[:, None, None] * (k @ P_k.mT).softmax(-1) @ P_v
        return self.out(join_heads(y))

    def forward(self, x, state=None):
        """x (B,T,C) -> y (B,T,C), the new leaky average of its keys."""
        k, k_bar = self.key(x, state)
        P_k = split_heads(self.P_k.to(k.dtype).expand(x.size(0), -1, -1), self.D)       # (B,H,N,D)
        P_v = split_heads(self.P_v.to(k.dtype).expand(x.size(0), -1, -1), self.D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(k, P_k, P_v, scale=1.0, dropout_p=dropout)
        return self.out(join_heads(self.size()[:, None, None].to(y.dtype) * y)), k_bar

    def size(self):
        """What the mean of the values is multiplied by (H,), exp(τ)."""
        return (EXP_SPEEDUP * self.scale).exp()

    def flops(self, T):
        """Every key is scored and every value mixed; and the leaky average of the keys."""
        C = self.P_k.size(1)
        return 4 * self.P_k.numel() + 2 * C


# ----------------------------------------------------------------------------------------------------------------------
# mosaic2: Memory Mosaics v2 (Zhang & Bottou 2025; its code is not public). Each of its four changes can be switched off

class GatedKey(MosaicKey):
    """As MosaicKey, but k̄_t = exp(W_g x_t) W_φ x_t + exp(-|W_λ x_t|) k̄_{t-1} per head   (eq. 8)."""
    def __init__(self, config: Config, power: float):
        super().__init__(config, power)
        self.leak = None
        self.gate = nn.Linear(config.n_embd, config.n_head, bias=False)                 # W_g
        self.forget = nn.Linear(config.n_embd, config.n_head, bias=False)               # W_λ

    def slow(self, x):
        """The keys of a whole sequence by the loop in memories.py: x (B,T,C) -> (B,H,T,D)."""
        k, _ = self(x, None, impl="loop")
        return k

    def gates(self, x):
        """As MosaicKey.gates, with a λ and a g for every token."""
        return None, -self.forget(x).abs(), self.gate(x)    # λ of all tokens (none), log λ_t, log g_t


class AdaptiveMemory(ContextualMemory):
    """y_t = Σ_i softmax_i(β_n k_t·k_i) v_i over n pairs, β_n = β_1 n^p + β_0: the more pairs, the sharper   (eq. 6).

    A query t sees the last `window` of the pairs up to t - m. In training each layer draws its own m from
    lags = (least, largest) whenever a sequence starts. In evaluation, and where pairs were carried over, m is
    the least. In `ask` m is called lag.
    """
    def __init__(self, config: Config, layer: int, window: int | None = None, lags: tuple[int, int] = (1, 1)):
        super().__init__(config, layer)
        self.window = window
        self.lags = lags
        if config.mosaic2_gated:        # in place of ContextualMemory's key
            self.key = GatedKey(config, power=1)
        else:
            self.key = MosaicKey(config, power=1)
        self.is_adaptive = config.mosaic2_adaptive
        if self.is_adaptive:
            self.key.scale = None       # β_n takes its place
            start = torch.ones(config.n_head)
            self.scale = nn.Parameter(0 * start)
            self.log_beta_0 = nn.Parameter(1.5 * start)
            self.log_beta_1 = nn.Parameter(1.5 * start)
            self.exponent = nn.Parameter(start / 3)         # p

    def size(self):
        """The values' length (H,), exp(min(|scale|, 15)). The scale starts at 0, which it could never
        leave with torch.abs, whose gradient is 0 there."""
        if not self.is_adaptive:
            return super().size()
        return torch.where(self.scale < 0, -self.scale, self.scale).clamp(max=15).exp()

    def sharpen(self, queries, n):
        """β_n times queries (B,H,T,D), before which there are n (T,) pairs."""
        if not self.is_adaptive:
            return queries
        with full_precision(queries):
            n_p = n.clamp(1, self.window) ** self.exponent.abs().clamp(max=1)[:, None]  # n^p  (H,T)
            beta = self.log_beta_1.clamp(max=10).exp()[:, None] * n_p + self.log_beta_0.clamp(max=10).exp()[:, None]
            return (beta[..., None] * queries).to(queries.dtype)

    def slow(self, x):
        """The layer on a whole sequence, token by token. x (B,T,C) -> (B,T,C)"""
        k = self.key.slow(x)                                                            # (B,H,T,D)
        u = split_heads(self.psi(x), self.D)
        a = self.mix[:, None, None]
        v_bar = a * u[:, :, :-1] + (1 - a) * u[:, :, 1:]
        v = self.size()[:, None, None] * v_bar / v_bar.norm(dim=-1, keepdim=True)
        ys = []
        for t in range(x.size(1)):
            end = max(t + 1 - self.lags[0], 0)                                          # lags = (least m, largest m)
            begin = max(end - self.window, 0) if self.window else 0
            query = self.sharpen(k[:, :, t:t + 1], torch.tensor([end - begin], device=x.device))
            score = k[:, :, begin:end] @ query.mT                                       # (B,H,n,1)
            ys.append((score.softmax(2) * v[:, :, begin:end]).sum(2))                   # 0 where n = 0
        return self.out(join_heads(torch.stack(ys, 2)))

    def ask(self, queries, keys, values):
        """As ContextualMemory.ask, but of the pairs before a query its last m - 1 are left out."""
        T = queries.size(2)
        before = keys.size(2) - T      # pairs before the first query, the newest not counted
        lag = self.lags[0]             # m
        is_drawn = self.training and before == 0 and lag < self.lags[1]
        if is_drawn:    # a tensor: for a Python number the CPU would wait for the GPU, and the compiler compile anew
            lag = torch.randint(lag, self.lags[1] + 1, (), device=queries.device)
        # With m = 1 the first query of the call has before + 1 pairs; each further token of lag takes one away.
        n = torch.arange(before + 2, before + 2 + T, device=queries.device) - lag       # pairs left to a query (T,)
        queries = self.sharpen(queries, n)

        # ContextualMemory.ask shows to the query in place p the pairs 0 to p. To stop m - 1 pairs
        # earlier, the queries move m - 1 places to the left, and their answers back. With m = 3, query 4
        # moves to place 2, sees the pairs 0, 1 and 2 there, and its answer returns to place 4. The first
        # m - 1 queries have no pair left (n <= 0): they wrap around to the end, and their answers become 0.
        if is_drawn:
            place = torch.arange(T, device=queries.device)
            y = super().ask(queries.index_select(2, (place + lag - 1) % T), keys, values)
            return y.index_select(2, (place - lag + 1) % T) * (n > 0)[:, None]
        empty = min(max(lag - 1 - before, 0), T)                                        # queries that see no pair
        end = before + T - (lag - 1)
        y = super().ask(queries[:, :, empty:], keys[:, :, :end], values[:, :, :end])
        return F.pad(y, (0, 0, empty, 0))


class ShortAndLongMemory(nn.Module):
    """A memory of the pairs t-h+1 … t-1 (eq. 10), and one of those up to t-m. In training m is drawn
    from h/4 to h; else it is h/4.

    Published are h = 256 and m from 64 to 256, for rows of 4096 tokens. The paper puts the outputs of
    both side by side and projects them once. Here each memory has its own `out`, and the two are
    added, which is the same.
    """
    def __init__(self, config: Config, layer: int):
        super().__init__()
        h = config.mosaic2_short or max(config.max_seq_len // 16, 2)
        if config.mosaic2_long:
            short_term = AdaptiveMemory(config, layer, window=h - 1)
            long_term = AdaptiveMemory(config, layer, lags=(max(h // 4, 1), h))
            self.memories = nn.ModuleList([short_term, long_term])
        else:
            self.memories = nn.ModuleList([AdaptiveMemory(config, layer)])

    def forward(self, x, state=None, ve=None):
        """x (B,T,C) -> y (B,T,C), the states of the memories."""
        states = state or [None] * len(self.memories)
        results = [memory(x, before, ve) for memory, before in zip(self.memories, states)]
        return sum(y for y, _ in results), tuple(after for _, after in results)

    def flops(self, T):
        """Those of its memories."""
        return sum(memory.flops(T) for memory in self.memories)


def mosaic2_feedforward(config: Config) -> nn.Module:
    """mosaic2's second half: an MLP, or learned pairs with mosaic2_mlp=False."""
    if not config.mosaic2_mlp:
        return PersistentMemory(config)
    return MLP(config, swiglu_width=feedforward_size(config) // (3 * config.n_embd))


def mosaic2_start(block: nn.Module, layer: int) -> None:
    """The paper's starting values of the linear layers: N(0, 1/(2C(layer+1))), cut at three standard deviations."""
    C = block.mixer.memories[0].psi.in_features
    std = (2 * C * (layer + 1)) ** -0.5
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)


# ----------------------------------------------------------------------------------------------------------------------
# The transformer around them

class MLP(nn.Module):
    """C -> 4C -> C with ReLU² (nanochat) or GELU (GPT-2), or C -> swiglu_width -> C with SwiGLU. It remembers
    nothing."""
    def __init__(self, config: Config, swiglu_width: int = 0):
        super().__init__()
        width = swiglu_width or 4 * config.n_embd
        self.up = nn.Linear(config.n_embd, width, bias=config.bias)
        self.gate = nn.Linear(config.n_embd, width, bias=config.bias) if swiglu_width else None
        self.out = nn.Linear(width, config.n_embd, bias=config.bias)
        self.is_relu2 = config.activation == "relu2"

    def forward(self, x, state=None):
        """x (B,T,C) -> y (B,T,C), None."""
        h = self.up(x)
        if self.gate is not None:
            return self.out(F.silu(self.gate(x)) * h), None
        h = F.relu(h).square() if self.is_relu2 else F.gelu(h)
        return self.out(h), None

    def flops(self, T):
        """Nothing beside its linear layers."""
        return 0


class TokenShift(nn.Module):
    """x_t + Σ_i w_i ⊙ norm(x)_{t-3+i}, i = 0 … 3, a weight w_i per channel; it starts as x.

    It gives every mixer what deltanet's and ttt's convolutions and mosaic's peek give these alone:
    a cheap look at the tokens just before. (Canon layers, Allen-Zhu 2025, and TTT's `pre_conv`.)
    """
    def __init__(self, config: Config):
        super().__init__()
        self.norm = Norm(config)
        self.mixture = nn.Parameter(torch.zeros(config.n_embd, 1, CONV_WIDTH))

    def forward(self, x, tail=None):
        """x (B,T,C) and the last inputs before it -> x (B,T,C), the new last inputs."""
        y, tail = causal_conv(self.norm(x), self.mixture, tail)
        return x + y, tail

    def flops(self, T):
        """Its multiply-adds."""
        return 2 * self.mixture.numel()


class BlockState(NamedTuple):
    """The states of a block's parts."""
    mixer: tuple | Tensor | None
    feedforward: Tensor | None
    shift: Tensor | None  # (B,CONV_WIDTH-1,C) the token shift's last inputs


class Block(nn.Module):
    """Pre-norm residual block: x + mixer(norm(x)), then x + feedforward(norm(x)). With token_shift a
    TokenShift stands before it."""
    def __init__(self, config: Config, mixer: nn.Module, feedforward: nn.Module):
        super().__init__()
        self.shift = TokenShift(config) if config.token_shift else None
        self.norm1 = Norm(config)
        self.mixer = mixer
        self.norm2 = Norm(config)
        self.feedforward = feedforward
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, state=None, ve=None):
        """x (B,T,C) -> x (B,T,C), the new states of its parts."""
        mixer_state, feedforward_state, shift_tail = (None, None, None) if state is None else state
        if self.shift is not None:
            x, shift_tail = self.shift(x, shift_tail)
        y, mixer_state = self.mixer(self.norm1(x), mixer_state, ve)
        x = x + self.dropout(y)
        y, feedforward_state = self.feedforward(self.norm2(x), feedforward_state)
        x = x + self.dropout(y)
        return x, BlockState(mixer_state, feedforward_state, shift_tail)


class StackState(NamedTuple):
    """Tokens seen, and what each block remembers."""
    pos: Tensor
    blocks: tuple  # one BlockState a layer


class Stack(nn.Module):
    """Positions, blocks, final norm: x (B,T,C) embedded tokens -> y (B,T,C) ready for the output
    projection.

    ve (B,T,n,Hkv·D) holds the value embeddings of the n layers that have them. The first n_free
    tokens stay visible in every attention layer, whatever its window.
    """
    def __init__(self, config: Config, n_free: int = 0):
        super().__init__()
        memory = MEMORIES[config.memory]
        chosen = layers_with_memory(config)
        attention = partial(Attention, n_free=n_free)
        self.blocks = nn.ModuleList()
        for layer in range(config.n_layer):
            # attention alone has free tokens; every other mixer is made of (config, layer)
            mixer = attention
            feedforward = MLP
            if layer in chosen and memory.mixer is not Attention:
                mixer = memory.mixer
            if layer in chosen:
                feedforward = memory.feedforward
            self.blocks.append(Block(config, mixer(config, layer), feedforward(config)))
        self.value_embed_index = [config.value_embed_index(layer) for layer in range(config.n_layer)]
        # only attention takes learned positions
        has_positions = config.pos == "learned" and any(isinstance(block.mixer, Attention) for block in self.blocks)
        self.wpe = nn.Embedding(config.max_seq_len, config.n_embd) if has_positions else None
        self.embed_norm = Norm(config) if config.norm == "rms" else nn.Identity()
        self.final_norm = Norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, state=None, ve=None):
        """x (B,T,C) -> y (B,T,C), the new state. Raises ValueError where learned positions end."""
        pos, block_states = (0, [None] * len(self.blocks)) if state is None else state
        end = int(pos) + x.size(1)
        if self.wpe is not None:
            if end > self.wpe.num_embeddings:
                raise ValueError(f"{end} tokens were given to a model with {self.wpe.num_embeddings} learned "
                                 "positions; shorten the text, or train with --pos=rope")
            x = x + self.wpe(torch.arange(int(pos), end, device=x.device))
        x = self.dropout(self.embed_norm(x))
        new_states = []
        for block, block_state, index in zip(self.blocks, block_states, self.value_embed_index):
            block_ve = None if index is None else ve[:, :, index]
            x, block_state = block(x, block_state, block_ve)
            new_states.append(block_state)
        return self.final_norm(x), StackState(torch.tensor(end), tuple(new_states))

    def flops(self, T):
        """All of the stack's: 2 for each weight of a linear layer, and what the mixers, feed-forward
        parts and token shifts add."""
        total = 0
        for module in self.modules():
            if isinstance(module, nn.Linear):
                total += 2 * module.weight.numel()
        for block in self.blocks:
            total += block.mixer.flops(T) + block.feedforward.flops(T)
            if block.shift is not None:
                total += block.shift.flops(T)
        return total


# ----------------------------------------------------------------------------------------------------------------------
# rmt: Recurrent Memory Transformer (Bulatov et al. 2022)

class RMTState(NamedTuple):
    """The memory, and how far the stack has come in the running segment."""
    memory: Tensor                # (B,M,C) what the running segment begins with
    segment: StackState | None    # the stack over [read memory; the segment's tokens so far]
    pos: Tensor                   # () tokens of the running segment seen, 0..S


class RMT(nn.Module):
    """Runs the stack on [read memory (M); segment (S); write memory (M)], segment after segment;
    the outputs at the write positions are the next segment's read memory. `slow` is this sentence.

    The memory is written at the end because a causal model's earlier positions never see the
    segment. Write positions start from the read memory, as in the paper: what is not overwritten
    carries over, and no weights are added. A segment's write tokens wait until the first token of
    the next segment comes. Positions restart in each segment, and windowed layers keep
    seeing the read memory (the stack's free tokens).

    Bulatov et al. 2022, section 3; https://github.com/booydar/recurrent-memory-transformer.
    """
    def __init__(self, config: Config):
        super().__init__()
        self.M = config.rmt_tokens
        self.S = config.segment_length
        self.bptt = config.rmt_bptt
        # The inner stack reads rows of M + S + M positions. rmt_segment is set to the same, because
        # Config checks that segments divide a row. short_window is fixed, or it would follow the new
        # max_seq_len.
        length = self.S + 2 * self.M
        inner = replace(config, max_seq_len=length, rmt_segment=length, short_window=config.local_window)
        self.stack = Stack(inner, n_free=self.M)
        self.memory_tokens = nn.Embedding(self.M, config.n_embd)    # what the first segment reads

    def slow(self, x):
        """A whole sequence without truncated gradients: read, segment, write. x (B,T,C) -> (B,T,C)"""
        memory = self.memory_tokens.weight.to(x.dtype).expand(x.size(0), -1, -1)
        ys = []
        for segment in x.split(self.S, 1):
            n = segment.size(1)
            y, _ = self.stack(torch.cat([memory, segment, memory], 1))
            ys.append(y[:, self.M:self.M + n])
            memory = y[:, self.M + n:]                          # the outputs at the write positions
        return torch.cat(ys, 1)

    def forward(self, x, state=None, ve=None):
        """x (B,T,C) -> y (B,T,C), the memory and the running segment's state."""
        B, T, _ = x.shape
        start = self.memory_tokens.weight.to(x.dtype).expand(B, -1, -1)
        memory, segment, seen = (start, None, 0) if state is None else state

        # Cut where segments end. A segment that ends with this call stays open (seen = S), and the first
        # piece of the next call is then empty.
        bounds = [0, *range(self.S - int(seen), T, self.S), T]
        sizes = [end - begin for begin, end in zip(bounds, bounds[1:])]
        pieces = x.split(sizes, 1)
        ve_pieces = [None] * len(sizes) if ve is None else ve.split(sizes, 1)

        boundaries = len(pieces) - 1
        truncates = torch.is_grad_enabled() and self.bptt < boundaries
        run = self.run_truncated if truncates else self.run
        y, memory, segment = run(pieces, ve_pieces, memory, segment)
        seen = sizes[-1] if boundaries > 0 else int(seen) + T
        return y, RMTState(memory, segment, torch.tensor(seen))

    def run(self, pieces, ve_pieces, memory, segment):
        """The recurrence: every piece (B,·,C) but the last completes its segment, and writes the memory
        (B,M,C) that the next reads."""
        ys = []
        for piece, ve in zip(pieces[:-1], ve_pieces):
            y, memory = self.read_and_write(piece, ve, memory, segment)
            segment = None
            ys.append(y)
        y, segment = self.read_piece(pieces[-1], ve_pieces[-1], memory, segment)
        ys.append(y)
        return torch.cat(ys, 1), memory, segment

    def read_piece(self, piece, ve, memory, segment):
        """[read memory, if the segment begins here; piece (B,n,C)] -> the outputs at the piece (B,n,C),
        the stack's new state."""
        read_memory = memory if segment is None else memory[:, :0]
        y, segment = self.stack(torch.cat([read_memory, piece], 1), segment, self.pad(ve, read_memory.size(1), 0))
        return y[:, read_memory.size(1):], segment

    def read_and_write(self, piece, ve, memory, segment):
        """As `read_piece`, with the write positions behind the piece -> the outputs at the piece (B,n,C),
        the next segment's memory (B,M,C)."""
        n = piece.size(1)
        read_memory = memory if segment is None else memory[:, :0]
        x = torch.cat([read_memory, piece, memory], 1)
        if x.size(1) == 0:   # a segment that was complete already, in a model without memory tokens
            return piece, memory
        y, _ = self.stack(x, segment, self.pad(ve, read_memory.size(1), self.M))
        y = y[:, read_memory.size(1):]
        return y[:, :n], y[:, n:]

    def pad(self, ve, before, after):
        """Value embeddings come from token ids; memory tokens have none."""
        return None if ve is None else F.pad(ve, (0, 0, 0, 0, before, after))

    def run_truncated(self, pieces, ve_pieces, memory, segment):
        """`run`, when each segment's loss shall reach only rmt_bptt boundaries back.

        Let rmt_bptt be 1. The third segment is run twice. In run 0 its memory is detached, so that no
        gradient leaves the segment. In run 1 its memory is what the second segment wrote from a detached
        memory of its own, so that the gradient crosses one boundary. In general run d starts from a memory
        that was detached d boundaries ago, and its gradient crosses d of them. There is one run at first, and one
        more after each boundary, up to rmt_bptt + 1. Without dropout all of them compute the same numbers,
        and only the gradients differ. The outputs are those of the deepest run; of the others only the
        memory is used.
        """
        runs = [(memory, segment)]              # one for each depth, the deepest last
        ys = []
        for piece, ve in zip(pieces[:-1], ve_pieces):
            outputs = [self.read_and_write(piece, ve, *started) for started in runs]
            ys.append(outputs[-1][0])
            # What was depth d is depth d + 1 behind the boundary. Depth 0 is the same memory
            # without its gradient, and what would be deeper than rmt_bptt is dropped.
            written = [new_memory for _, new_memory in outputs]
            by_depth = [written[0].detach(), *written][:self.bptt + 1]
            runs = [(memory_d, None) for memory_d in by_depth]
        memory, segment = runs[-1]
        y, segment = self.read_piece(pieces[-1], ve_pieces[-1], memory, segment)
        ys.append(y)
        return torch.cat(ys, 1), memory, segment

    def flops(self, T):
        """The stack's for a segment and its 2M memory tokens, spread over the segment's S tokens. What
        truncation runs again is not counted."""
        return self.stack.flops(self.S + 2 * self.M) * (self.S + 2 * self.M) / self.S


# ----------------------------------------------------------------------------------------------------------------------
# The table of memories, and what cannot be built

class Memory(NamedTuple):
    """What a memory puts into the backbone: in place of attention, in place of the MLP, around the
    blocks.

        mixer(config, layer)    module(x, state, ve) -> y, state     x, y (B,T,C); ve (B,T,Hkv·D) or None
        feedforward(config)     module(x, state) -> y, state
        stack(config)           module(x, state, ve) -> y, state     ve (B,T,n,Hkv·D) or None
        start(block, layer)     gives the linear layers of a block other starting values than the backbone's

    Each has flops(T): the forward FLOPs a token, averaged over a row of T tokens, of everything but
    its nn.Linear modules, which the stack counts. A stack's flops(T) are all of its FLOPs. A linear
    layer that adds to the residual stream is called `out`, so that GPT.init_weights finds it.
    """
    mixer: Callable = Attention
    feedforward: Callable = MLP
    stack: Callable = Stack
    start: Callable | None = None


MEMORIES = {
    "none": Memory(),
    "persistent": Memory(mixer=PersistentAttention),
    "rmt": Memory(stack=RMT),
    "ttt": Memory(mixer=TTT),
    "deltanet": Memory(mixer=DeltaNet),
    "knn": Memory(mixer=KNNAttention),
    "mosaic": Memory(mixer=ContextualMemory, feedforward=PersistentMemory),
    "mosaic2": Memory(mixer=ShortAndLongMemory, feedforward=mosaic2_feedforward, start=mosaic2_start),
}


def layers_with_memory(config: Config) -> set[int]:
    """The layers that config.memory_layers names: there the memory takes the place of attention
    (and of the MLP)."""
    text = config.memory_layers
    everywhere = set(range(config.n_layer))
    if text == "all":
        return everywhere
    if MEMORIES[config.memory].mixer is Attention:
        raise ValueError(f"memory_layers={text!r} has no effect with memory={config.memory!r}; "
                         "leave it at 'all'")
    if text == "middle":
        return {config.n_layer // 2}
    if not re.fullmatch(r"\d+(\+\d+)*", text):
        raise ValueError(f"memory_layers={text!r} was given, expected all, middle, or indexes such as 6 or 1+3+5")
    chosen = {int(index) for index in text.split("+")}
    if not chosen <= everywhere:
        raise ValueError(f"memory_layers={text!r} is out of range; the layers are 0 to {config.n_layer - 1}")
    return chosen


def check_architecture(config: Config) -> None:
    """Raises ValueError for a combination of settings that cannot be built."""
    if config.memory not in MEMORIES:
        raise ValueError(f"memory={config.memory!r} is not known; choose one of {', '.join(MEMORIES)}")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd} does not divide into n_head={config.n_head} heads; "
                         "make it a multiple")
    if config.n_head % config.n_kv_head:
        raise ValueError(f"n_head={config.n_head} is not a multiple of n_kv_head={config.n_kv_head}; "
                         "change one of them")
    if not config.window or set(config.window) - set("SL"):
        raise ValueError(f"window={config.window!r} was given, expected a pattern of the letters S and L such as SSSL")
    layers_with_memory(config)          # raises if memory_layers cannot be read

    # Rotations turn pairs of channels.
    if config.pos == "rope" and config.head_dim % 2:
        raise ValueError(f"rope needs an even head size, but n_embd/n_head = {config.head_dim}; "
                         "change one of them")
    if config.memory == "ttt" and config.head_dim % 2:
        raise ValueError(f"ttt rotates its keys and needs an even head size, but n_embd/n_head = {config.head_dim}; "
                         "change one of them")

    if config.memory == "knn" and config.knn_capacity < config.store_block:
        raise ValueError(f"knn_capacity={config.knn_capacity} is smaller than the {config.store_block} pairs that move "
                         "at once; raise it")
    # A mosaic block has as many weights as a block of attention. What its first half leaves of them is for its second
    # half, which needs enough for one channel of the MLP, or for one learned pair.
    C = config.n_embd
    smallest = 0
    if config.memory == "mosaic2" and config.mosaic2_mlp:
        smallest = 3 * C
    elif config.memory in ("mosaic", "mosaic2") and not config.mosaic_slots:
        smallest = 2 * C * C + 2 * C
    if smallest and feedforward_size(config) < smallest:
        raise ValueError(f"{config.memory} with n_embd={C} and n_head={config.n_head} leaves its second half no "
                         "weights; take fewer heads")
    if config.mosaic2_short == 1:
        raise ValueError("mosaic2_short=1 leaves the short-term memory no pairs; give 2 or more")
    if config.memory == "rmt":
        S = config.segment_length
        if S < 1 or config.max_seq_len % S:
            raise ValueError(f"max_seq_len={config.max_seq_len} does not divide into rmt's segments of {S} tokens "
                             "(rmt_segment, or a quarter of max_seq_len where that is 0); give one that fits")


def unused_options(config: Config) -> list[str]:
    """The settings that this model does not read, so that to change them changes nothing: those of
    another memory, those of attention where nothing attends, and the like.

    A setting of the group "memory" belongs to the memory named before its first underscore, where
    deltanet is called delta; expand_v is deltanet's too, and mosaic_slots also mosaic2's where its
    MLP is switched off.
    """
    for_all = ("memory", "memory_layers")
    deltanets = {"delta": "deltanet", "expand": "deltanet"}
    unused = []
    for f in fields(Config):
        if f.metadata["group"] != "memory" or f.name in for_all:
            continue
        begin = f.name.split("_")[0]
        owner = deltanets.get(begin, begin)
        if f.name == "mosaic_slots" and config.memory == "mosaic2" and not config.mosaic2_mlp:
            continue
        if owner != config.memory:
            unused.append(f.name)

    # Positions and windows are attention's; knn has a window of its own, and ttt rotates whatever pos says. What is
    # measured on a model may read short_window where no layer does (`copy` in eval.py).
    mixer = MEMORIES[config.memory].mixer
    memory_attends = isinstance(mixer, type) and issubclass(mixer, Attention)
    in_every_layer = len(layers_with_memory(config)) == config.n_layer
    attends = memory_attends or not in_every_layer
    # Mosaic's learned pairs have neither a bias nor an activation, and mosaic2's MLP has its own activation (SwiGLU).
    # How many weights either second half has depends on n_kv_head, unless mosaic_slots says how many pairs there are.
    is_mosaic = config.memory in ("mosaic", "mosaic2")
    has_pairs = config.memory == "mosaic" or (config.memory == "mosaic2" and not config.mosaic2_mlp)
    fills_up = is_mosaic and not (has_pairs and config.mosaic_slots)
    reads_kv_heads = attends or fills_up or config.value_embeds
    is_unused = {
        "window": not attends or (config.memory == "knn" and in_every_layer),
        "n_kv_head": not reads_kv_heads,
        "pos": not attends,
        "qk_norm": not attends,
        "rope_theta": config.memory != "ttt" and not (attends and config.pos == "rope"),
        "activation": is_mosaic and in_every_layer,
        "bias": has_pairs and in_every_layer and config.norm == "rms",
        "rmt_bptt": config.memory == "rmt" and config.rmt_tokens == 0,
        "mosaic2_short": config.memory == "mosaic2" and not config.mosaic2_long,
    }
    return unused + [name for name, unread in is_unused.items() if unread]


# ----------------------------------------------------------------------------------------------------------------------
# The model

def state_bytes(state) -> int:
    """Bytes of all tensors in a state: what a sequence costs to keep."""
    if state is None:
        return 0
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(state_bytes(part) for part in state)


class GPT(nn.Module):
    """Token embeddings, the body (a stack of blocks, and what a memory wraps around it), and the
    output projection."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        V = config.vocab_size
        C = config.n_embd
        self.wte = nn.Embedding(V, C)
        indexes = [config.value_embed_index(layer) for layer in range(config.n_layer)]
        self.n_ve = config.n_layer - indexes.count(None)
        self.value_embeds = None
        if self.n_ve > 0:
            self.value_embeds = nn.Embedding(V, self.n_ve * config.n_kv_head * config.head_dim)
        self.body = MEMORIES[config.memory].stack(config)
        self.lm_head = nn.Linear(C, V, bias=False)
        self.init_weights()
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight

    def init_weights(self):
        """N(0, 0.02²) everywhere, GPT-2's 1/√(2L) on what is added to the residual stream; value
        embeddings as wide as the values they join. What a memory has beyond linear layers and
        embeddings is set in its own class."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02
                if name.endswith(".out"):
                    std *= (2 * self.config.n_layer) ** -0.5
                elif module is self.value_embeds:
                    std *= self.config.n_embd ** 0.5
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        start = MEMORIES[self.config.memory].start
        if start is not None:
            for layer in layers_with_memory(self.config):
                start(self.body.blocks[layer], layer)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The blocks' matrices, of every mechanism alike: Muon's share. Embeddings, memory tokens,
        output projection, vectors and convolutions are AdamW's."""
        matrices = []
        for module in self.modules():
            if isinstance(module, Block):
                matrices += [p for p in module.parameters() if p.ndim == 2]
        return matrices

    def stream(self, idx: Tensor, state=None) -> tuple[Tensor, tuple]:
        """idx (B,T) int64 continues the sequence that `state` remembers -> logits (B,T,V), the new
        state. Raises ValueError where idx has no tokens."""
        if idx.size(1) == 0:
            raise ValueError("idx has no tokens; give at least one, for example the end-of-text token")
        x = self.wte(idx)                                       # (B,T,C)
        ve = None
        if self.value_embeds is not None:
            ve = self.value_embeds(idx).unflatten(-1, (self.n_ve, -1))  # (B,T,n,Hkv·D)
        x, state = self.body(x, state, ve)
        logits = self.lm_head(x)                                # (B,T,V)
        cap = self.config.softcap
        if cap > 0:
            logits = cap * torch.tanh(logits.to(at_least_float32(x)) / cap)
        return logits, state

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """idx (B,T) -> logits (B,T,V); with targets (B,T) the mean cross-entropy in nats over targets
        other than -1."""
        logits, _ = self.stream(idx)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 generator: torch.Generator | None = None) -> Tensor:
        """Appends max_new_tokens sampled tokens to idx (B,T), one `stream` call each; temperature 0
        takes the likeliest. With top_k, 1 or more, only so many of the likeliest are drawn from.
        Raises ValueError for another top_k."""
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k} was given, expected 1 or more, or None")
        was_training = self.training
        self.eval()
        state = None
        new = idx
        for _ in range(max_new_tokens):
            logits, state = self.stream(new, state)
            logits = logits[:, -1].float()                      # (B,V) of the token to come
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -math.inf)
                # with the likeliest token at 0, and in float64, no temperature overflows
                logits = (logits - logits.amax(-1, keepdim=True)).double() / temperature
                new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            idx = torch.cat([idx, new], 1)
        self.train(was_training)
        return idx

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs (forward, and backward at twice that) per token of a row of seq_len
        tokens: matrix products and each memory's own work."""
        return 3 * (self.body.flops(seq_len) + 2 * self.lm_head.weight.numel())
