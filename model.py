"""The network: one GPT backbone in which every memory is a flag (`Config(memory="deltanet")`).

Every memory layer has one signature, and so does the whole model:

    y, state = layer(x, state)                  x, y (B,T,C); state is all the layer remembers, None for "nothing yet"
    logits, state = model.stream(idx, state)    idx (B,T) int64

Training, evaluation and generation all go through it; there is no other path. Cutting a sequence anywhere and carrying
the state gives the same outputs, a state is an immutable NamedTuple of tensors, and no layer writes into its inputs.

Reading order (nothing is used before it has been read)
    Config, PRESETS                    what can be chosen
    rotary, attend, ValueGate          parts shared by the mixers
    Attention                          `none`: attention over a window, or over all of the past
    PersistentAttention                `persistent`: learned key/value slots beside it
    KNNAttention                       `knn`: an external store that is searched for the nearest keys
    TTT, DeltaNet                      `ttt`, `deltanet`: recurrent memories (their equations are in memories.py)
    ContextualMemory, PersistentMemory `mosaic`: both halves of a Memory Mosaics block
    MLP, Block, Stack                  the transformer around them
    RMT                                `rmt`: memory tokens carried from segment to segment, wrapped around the stack
    MEMORIES, GPT                      the table of memories and the model

Glossary (name here = symbol in the papers)
    B, T, C, H, D    batch, time, channels (n_embd), heads, head dimension          Hkv  key/value heads (GQA)
    W = window, S = rmt_segment, M = memory tokens or slots, K = ttt_chunk, N = knn_capacity or mosaic_slots
    pos              tokens seen before this call, a 0-dim int64 tensor on the CPU (reading it never waits for a GPU)
    ve               value embeddings: (B,T,Hkv·D) looked up from the token ids, mixed into a layer's values

References: persistent memory (Sukhbaatar et al. 2019, 1907.01470), RMT (Bulatov et al. 2022, 2207.06881), TTT-Linear
(Sun et al. 2024, 2407.04620), Gated DeltaNet (Yang et al. 2025, 2412.06464), nearest-key store (Wu et al. 2022,
2203.08913), Memory Mosaics (Zhang et al. 2024, 2405.06394), the backbone of the d12 preset (nanochat, via memory-bench).
"""
import math
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from memories import TTTState, gated_delta_rule, leaky_average, ttt_linear


# ----------------------------------------------------------------------------------------------------------------------
# Configuration

def option(default, help: str, group: str = "architecture", choices: tuple = (), low=-math.inf, high=math.inf):
    """A field of a configuration: its default, what it means, and which values it may have.

    `group` is the heading under which --help lists it. The fields of the group "run" change how a run is executed and
    not what it computes. A number has to be finite and lie in [low, high]; a value has to be one of `choices` if there
    are any.
    """
    return field(default=default, metadata=dict(help=help, group=group, choices=choices, low=low, high=high))


def check_options(config) -> None:
    """Raises ValueError for the first field of a dataclass of options that has a value it may not have."""
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
            raise ValueError(f"{f.name}={value} was given, expected a finite number from {low} to {high}")


@dataclass
class Config:
    """The architecture, flat. Raises ValueError with one sentence for a combination that cannot be built."""
    memory: str = option("none", "which memory: none, persistent, rmt, ttt, deltanet, knn or mosaic", "memory")
    memory_layers: str = option("all", "layers that carry it: all, middle, one index, or indexes joined by + (1+3)", "memory")
    n_layer: int = option(4, "number of blocks", low=1)
    n_head: int = option(4, "attention heads", low=1)
    n_kv_head: int = option(0, "key/value heads (grouped queries); 0 = n_head", low=0)
    n_embd: int = option(128, "channels", low=1)
    vocab_size: int = option(257, "size of the token vocabulary", low=1)
    max_seq_len: int = option(512, "training length in tokens", low=1)
    window: str = option("SSSL", "attention layers' pattern, tiled: L all of the past, S short_window; the last is L")
    short_window: int = option(0, "tokens an S layer sees; 0 = max_seq_len / 4", low=0)
    sink_tokens: int = option(0, "first tokens of a sequence that every S layer keeps seeing", low=0)
    pos: str = option("rope", "positions in attention layers", choices=("rope", "alibi", "learned", "none"))
    rope_theta: float = option(100_000.0, "RoPE base wavelength", low=1)
    norm: str = option("rms", "rms (no parameters) or layer", choices=("rms", "layer"))
    activation: str = option("relu2", "MLP nonlinearity", choices=("relu2", "gelu"))
    bias: bool = option(False, "biases in linear layers and LayerNorms")
    tie_embeddings: bool = option(False, "share the input and output embedding")
    qk_norm: bool = option(True, "normalise queries and keys per head")
    softcap: float = option(15.0, "logits = c tanh(logits / c); 0 = off", low=0)
    value_embeds: bool = option(False, "token-id value embeddings on alternating layers, gated by the input")
    dropout: float = option(0.0, "dropout on embeddings, attention weights and residual branches", low=0, high=0.999)
    persistent_slots: int = option(32, "persistent: learned key/value pairs a layer", "memory", low=0)
    rmt_tokens: int = option(16, "rmt: memory tokens; 0 = the same segments without memory (its fair baseline)", "memory", low=0)
    rmt_segment: int = option(0, "rmt: tokens a segment; 0 = max_seq_len / 4", "memory", low=0)
    rmt_bptt: int = option(8, "rmt: segment boundaries that each segment's gradient crosses backwards", "memory", low=0)
    ttt_chunk: int = option(16, "ttt: inner mini-batch K, tokens a gradient step", "memory", low=1)
    conv_width: int = option(4, "deltanet: width of the causal convolution before q, k, v", "memory", low=1)
    expand_v: int = option(1, "deltanet: value width over key width (1 near attention's size, 2 the paper's)", "memory", low=1)
    knn_capacity: int = option(512, "knn: pairs the store holds", "memory", low=1)
    knn_topk: int = option(32, "knn: nearest keys each query retrieves", "memory", low=1)
    knn_evict: str = option("fifo", "knn: who leaves a full store: oldest, or least recently retrieved", "memory", choices=("fifo", "lru"))
    mosaic_slots: int = option(0, "mosaic: persistent pairs a head; 0 = as many parameters as an attention block", "memory", low=0)

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        check_options(self)
        if self.memory not in MEMORIES:
            raise ValueError(f"memory={self.memory!r} is not known; choose one of {', '.join(MEMORIES)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads; make it a multiple")
        if self.pos == "rope" and self.head_dim % 2:
            raise ValueError(f"rope needs an even head size, but n_embd/n_head = {self.head_dim}; change either")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}; change either")
        if not self.window or set(self.window) - set("SL"):
            raise ValueError(f"window={self.window!r} was given, expected a pattern of the letters S and L such as SSSL")
        self.carries_memory(0)      # raises if memory_layers cannot be read

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def local_window(self) -> int:
        return self.short_window or max(self.max_seq_len // 4, 1)

    def window_of(self, layer: int) -> int | None:
        """Tokens that attention layer `layer` sees, itself included; None for all of the past."""
        short = self.window[layer % len(self.window)] == "S" and layer < self.n_layer - 1
        return self.local_window if short else None

    def carries_memory(self, layer: int) -> bool:
        if self.memory_layers == "all":
            return True
        if MEMORIES[self.memory].mixer is Attention:
            raise ValueError(f"memory_layers={self.memory_layers!r} has no effect with memory={self.memory!r}; leave it at all")
        if self.memory_layers == "middle":
            return layer == self.n_layer // 2
        try:
            chosen = [int(i) for i in self.memory_layers.split("+")]
        except ValueError:
            raise ValueError(f"memory_layers={self.memory_layers!r} was given, expected all, middle, or indexes such as "
                             "6 or 1+3+5") from None
        if not all(0 <= i < self.n_layer for i in chosen):
            raise ValueError(f"memory_layers={self.memory_layers!r} is out of range; the layers are 0 to {self.n_layer - 1}")
        return layer in chosen

    def value_embed_slot(self, layer: int) -> int | None:
        """Alternating layers have value embeddings, the last one included."""
        return layer // 2 if self.value_embeds and layer % 2 == (self.n_layer - 1) % 2 else None


PRESETS = {
    # Minutes on two cores. Heads of 64, since normalised queries and keys score √D at most, which must be enough to tell
    # one key from max_seq_len others; a RoPE base whose wavelengths lie within so short a row.
    "laptop": dict(n_head=2, rope_theta=10_000.0),
    "d12": dict(n_layer=12, n_head=6, n_embd=768, vocab_size=32768, max_seq_len=2048, value_embeds=True),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, max_seq_len=512, window="L", pos="learned",
                 norm="layer", activation="gelu", bias=True, tie_embeddings=True, qk_norm=False, softcap=0.0, dropout=0.05),
}


# ----------------------------------------------------------------------------------------------------------------------
# Shared parts

def full_precision(x: Tensor):
    """Recurrences, gates and normalisations stay out of autocast: a state in bf16 would forget by rounding."""
    return torch.autocast(x.device.type, enabled=False)


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last axis, in float32 at least."""
    x = x if x.dtype == torch.float64 else x.float()
    return x * (x.square().sum(-1, keepdim=True) + 1e-12).rsqrt()


def split_heads(x: Tensor, D: int) -> Tensor:
    """(B,T,H·D) -> (B,H,T,D)"""
    return x.view(*x.shape[:2], -1, D).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B,H,T,D) -> (B,T,H·D)"""
    return x.transpose(1, 2).flatten(2)


def extend(seen: Tensor | None, new: Tensor) -> Tensor:
    return new if seen is None else torch.cat([seen, new], 2)


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE (Su et al. 2021): the pair (x_i, x_{i+D/2}) turns by positions · theta^(-2i/D). x (B,H,T,D), positions (T,)"""
    D, dtype = x.size(-1), torch.promote_types(x.dtype, torch.float32)
    freq = theta ** (-torch.arange(0, D, 2, device=x.device, dtype=dtype) / D)
    angle = positions.to(dtype)[:, None] * freq                 # (T,D/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, n_free: int = 0, slopes: Tensor | None = None,
           scale: float | None = None, dropout: float = 0.0) -> Tensor:
    """Causal attention: q (B,H,Tq,D), k, v (B,Hkv,Tk,D), the last Tq keys standing at the queries' positions.

    Query i sees the keys j <= i with i - j < window, and the first n_free keys whatever their distance. slopes (H,) are
    ALiBi's, from which the free keys are exempt. No Tq×Tk mask is built: without window and bias this is one
    flash-attention call, otherwise queries go block by block and meet only the keys of their own window, O(T·window).
    """
    H, Tq, Tk = q.size(1), q.size(2), k.size(2)
    if k.size(1) != H:
        k, v = (x.repeat_interleave(H // x.size(1), 1) for x in (k, v))
    start = Tk - Tq                                             # the first query's own key
    if slopes is None and (window is None or window >= Tk):
        if Tq == 1:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        if start <= Tq:                                         # blank queries on the left make the causal mask square
            y = F.scaled_dot_product_attention(F.pad(q, (0, 0, start, 0)), k, v, dropout_p=dropout, is_causal=True, scale=scale)
            return y[:, :, start:]
    # The keys in pieces: the free ones, what else precedes the queries, then one piece a block of queries. A window no
    # wider than a block reaches one piece back. Pieces come from split: the gradient of a slice is as long as the whole
    # sequence, and a slice for each block would cost O(T²/block).
    block, free = max(window or 256, 64), min(n_free, Tk)
    bounds = [0, free, max(start, free), *(max(start + b, free) for b in range(block, Tq, block)), Tk]
    sizes = [b - a for a, b in zip(bounds, bounds[1:])]
    positions = torch.arange(Tk, device=q.device)
    pieces = list(zip(k.split(sizes, 2), v.split(sizes, 2), positions.split(sizes)))
    ys = []
    for n, (q_n, i) in enumerate(zip(q.split(block, 2), positions[start:, None].split(block))):
        keys, values, j = zip(*(pieces[:1] + pieces[n + 1:n + 3] if window else pieces[:n + 3]))
        j = torch.cat(j)
        mask = (j <= i) if window is None else (j <= i) & ((i - j < window) | (j < n_free))
        if slopes is not None:
            bias = -slopes[:, None, None] * torch.where(j < n_free, 0, i - j)
            mask = bias.masked_fill(~mask, float("-inf")).to(q.dtype)                   # (H,block,keys)
        ys.append(F.scaled_dot_product_attention(q_n, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=mask,
                                                 dropout_p=dropout, scale=scale))
    return torch.cat(ys, 2)


def attention_flops(T: int, window: int | None, width: int) -> float:
    """Forward FLOPs a token of causal attention: scores and mixing cost 2·width each per visible key, averaged over T."""
    w = min(window or T, T)
    return 4 * width * (w - w * (w - 1) / (2 * T))


class Norm(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.shape, self.rms = (config.n_embd,), config.norm == "rms"
        if not self.rms:
            self.weight = nn.Parameter(torch.ones(config.n_embd))
            self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        return F.rms_norm(x, self.shape) if self.rms else F.layer_norm(x, self.shape, self.weight, self.bias)


class ValueGate(nn.Module):
    """v + 2σ(W x) ve: the layer's values plus the token's value embedding, gated per head by the input's first 32
    channels. v (B,H,T,Dv); ve (B,T,Hkv·D) is repeated where the layer has more heads or wider values."""
    def __init__(self, config: Config, heads: int):
        super().__init__()
        self.head_dim, self.width = config.head_dim, min(32, config.n_embd)
        self.linear = nn.Linear(self.width, heads, bias=False)

    def forward(self, v, x, ve):
        gate = 2 * torch.sigmoid(self.linear(x[..., :self.width])).transpose(1, 2)[..., None]       # (B,H,T,1)
        ve = split_heads(ve, self.head_dim)                                                         # (B,Hkv,T,D)
        ve = ve.repeat_interleave(v.size(1) // ve.size(1), 1).repeat(1, 1, 1, v.size(-1) // ve.size(-1))
        return v + (gate * ve).to(v.dtype)


def value_gate(config: Config, layer: int, heads: int) -> ValueGate | None:
    return ValueGate(config, heads) if config.value_embed_slot(layer) is not None else None


# ----------------------------------------------------------------------------------------------------------------------
# none: attention

class AttentionState(NamedTuple):
    k: Tensor    # (B,Hkv,t,D) keys still visible to a later query, rotated; t grows without end only in an L layer
    v: Tensor    # (B,Hkv,t,D)
    pos: Tensor  # ()


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        C, self.H, self.Hkv, self.D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.q = nn.Linear(C, self.H * self.D, bias=config.bias)
        self.k = nn.Linear(C, self.Hkv * self.D, bias=config.bias)
        self.v = nn.Linear(C, self.Hkv * self.D, bias=config.bias)
        self.out = nn.Linear(C, C, bias=config.bias)
        self.value_gate = value_gate(config, layer, self.Hkv)
        self.window, self.n_free = config.window_of(layer), config.sink_tokens
        self.dropout, self.qk_norm = config.dropout, config.qk_norm
        self.theta = config.rope_theta if config.pos == "rope" else None
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / self.H) for h in range(self.H)])              # Press et al. 2022
        self.register_buffer("slopes", slopes if config.pos == "alibi" else None, persistent=False)

    def project(self, x, ve):
        """x (B,T,C) -> q (B,H,T,D), k, v (B,Hkv,T,D), normalised but not yet rotated."""
        q, k, v = (split_heads(f(x), self.D) for f in (self.q, self.k, self.v))
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.D,)), F.rms_norm(k, (self.D,))
        if self.value_gate is not None:
            v = self.value_gate(v, x, ve)
        return q, k, v

    def look_back(self, q, k, v, state):
        """Attention over the window (or all) of the past; returns y (B,H,T,D) and what a later query can still see."""
        seen_k, seen_v, pos = state or (None, None, 0)
        T, pos = q.size(2), int(pos)
        if self.theta:
            positions = torch.arange(pos, pos + T, device=q.device)
            q, k = rotary(q, positions, self.theta), rotary(k, positions, self.theta)
        k, v = extend(seen_k, k), extend(seen_v, v)
        state = AttentionState(self.still_visible(k), self.still_visible(v), torch.tensor(pos + T))
        k, v, n_free = self.with_slots(k, v)
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, self.window, n_free, self.slopes, dropout=dropout), state

    def still_visible(self, x):
        """The free tokens at the front and the window's last W-1: the next token is the window's W-th."""
        keep = self.n_free + self.window - 1 if self.window else x.size(2)
        if x.size(2) <= keep:
            return x
        return torch.cat([x[:, :, :self.n_free], x[:, :, x.size(2) - keep + self.n_free:]], 2)

    def with_slots(self, k, v):
        return k, v, self.n_free

    def forward(self, x, state=None, ve=None):
        y, state = self.look_back(*self.project(x, ve), state)
        return self.out(join_heads(y)), state

    def flops(self, T):
        return attention_flops(T, self.window, self.H * self.D)


# ----------------------------------------------------------------------------------------------------------------------
# persistent: learned slots (Sukhbaatar et al. 2019)

class PersistentAttention(Attention):
    """Attention whose every query also sees M learned key/value pairs, which have no position and lie in no window."""
    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.M = config.persistent_slots
        std = 0.02 * config.n_embd ** 0.5                       # the spread of a projected key or value at the start
        self.slot_k = nn.Parameter(std * torch.randn(self.M, self.Hkv * self.D))
        self.slot_v = nn.Parameter(std * torch.randn(self.M, self.Hkv * self.D))
        self.slot_scale = nn.Parameter(torch.tensor([0.01]))    # the layer starts close to plain attention

    def with_slots(self, k, v):
        slots = split_heads(torch.stack([self.slot_k, self.slot_scale * self.slot_v]), self.D)      # (2,Hkv,M,D)
        slot_k, slot_v = slots.to(k.dtype).unbind()
        if self.qk_norm:
            slot_k = F.rms_norm(slot_k, (self.D,))
        slot_k, slot_v = (slot.expand(k.size(0), -1, -1, -1) for slot in (slot_k, slot_v))
        return torch.cat([slot_k, k], 2), torch.cat([slot_v, v], 2), self.M + self.n_free

    def flops(self, T):
        return super().flops(T) + 4 * self.M * self.H * self.D


# ----------------------------------------------------------------------------------------------------------------------
# knn: an external key-value store (Wu et al. 2022)

class Store(NamedTuple):
    k: Tensor        # (B,Hkv,n,D) unrotated keys: a match is by content, wherever the token stood; n grows up to N
    v: Tensor        # (B,Hkv,n,D)
    written: Tensor  # (B,Hkv,n) the token's position
    used: Tensor     # (B,Hkv,n) lru: position of the last query that retrieved it; at first, when it was written


class KNNState(NamedTuple):
    local: AttentionState
    k: Tensor        # (B,Hkv,W,D) unrotated keys of the window's tokens, the next to move into the store
    v: Tensor
    store: Store


class KNNAttention(Attention):
    """Window attention, plus a store of the (key, value) pairs that have left the window. A query retrieves its k
    nearest keys from the store, attends to them, and a learned gate per head mixes both results. No gradient flows into
    stored pairs. The window is short_window whatever the pattern: further back only the store reaches.

    Pairs move into the store in blocks of at most 64 tokens at fixed absolute positions. A block is written before its
    first token leaves the window, and each query sees only those that have left it, so nothing is seen twice or missed;
    the price is that up to 63 of the N places hold pairs still waiting.
    """
    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.window = config.local_window
        self.N, self.topk, self.evict = config.knn_capacity, min(config.knn_topk, config.knn_capacity), config.knn_evict
        self.block = min(self.window, 64)
        if self.N < self.block:
            raise ValueError(f"knn_capacity={self.N} is smaller than the {self.block} pairs that move at once; raise it")
        self.gate = nn.Parameter(torch.zeros(self.H))           # σ(0): half local, half retrieved

    def forward(self, x, state=None, ve=None):
        B, T, _ = x.shape
        q, k, v = self.project(x, ve)
        local, past_k, past_v, store = state or (None, None, None, None)
        pos = 0 if local is None else int(local.pos)
        y, local = self.look_back(q, k, v, local)
        if not self.qk_norm:
            q, k = F.rms_norm(q, (self.D,)), F.rms_norm(k, (self.D,))
        past_k, past_v = extend(past_k, k.detach()), extend(past_v, v.detach())
        first = pos + T - past_k.size(2)                        # absolute position of past_k[:, :, 0]
        found, any_found, blocks = [], [], range(pos // self.block * self.block, pos + T, self.block)
        sizes = [min(a + self.block, pos + T) - max(a, pos) for a in blocks]
        for a, q_n in zip(blocks, q.split(sizes, 2)):
            lo, hi = max(a - self.window, 0), a - self.window + self.block
            if a >= pos and hi > 0:                             # a block begins inside this call
                store = self.write(store, *(p[:, :, lo - first:hi - first] for p in (past_k, past_v)), lo, a)
            t = torch.arange(q_n.size(2), device=x.device) + max(a, pos)
            memory, hit, store = self.retrieve(q_n, store, t)
            found.append(memory)
            any_found.append(hit)
        gate = torch.sigmoid(self.gate)[:, None, None] * torch.cat(any_found, 2)        # 0 where nothing was found
        y = y + gate.to(y.dtype) * (torch.cat(found, 2) - y)
        last = lambda past: past[:, :, max(past.size(2) - self.window, 0):]
        return self.out(join_heads(y)), KNNState(local, last(past_k), last(past_v), store)

    def write(self, store, k, v, first, now):
        """Tokens first, first+1, … enter; where they do not fit, the oldest (fifo) or least recently retrieved (lru)
        pairs leave."""
        position = torch.arange(first, first + k.size(2), device=k.device).expand(*k.shape[:3])
        new = Store(k, v, position, torch.full_like(position, now))
        if store is None:
            return new
        n = store.k.size(2)
        if n + k.size(2) > self.N:
            age = store.written if self.evict == "fifo" else store.used
            keep = age.topk(self.N - k.size(2), dim=-1, sorted=False).indices           # (B,Hkv,N-new)
            rows = keep[..., None].expand(-1, -1, -1, self.D)
            store = Store(store.k.gather(2, rows), store.v.gather(2, rows), store.written.gather(2, keep), store.used.gather(2, keep))
        return Store(*map(extend, store, new))

    def retrieve(self, q, store, t):
        """q (B,H,n,D) at positions t (n,) -> mixed values (B,H,n,D), whether anything was found (B,H,n,1), new store."""
        B, _, n, D = q.shape
        if store is None:
            return torch.zeros_like(q), torch.zeros_like(q[..., :1], dtype=torch.bool), None
        G = self.H // self.Hkv
        q = q.reshape(B, self.Hkv, G * n, D)                    # the G heads of a group search the same store
        k, v = store.k.to(q.dtype), store.v.to(q.dtype)
        outside = store.written[:, :, None] <= (t.repeat(G) - self.window)[:, None]     # (B,Hkv,G·n,size)
        score = (q @ k.mT * D ** -0.5).masked_fill(~outside, float("-inf"))
        top, place = score.detach().topk(min(self.topk, score.size(-1)), sorted=False)
        hit = top > float("-inf")                               # (B,Hkv,G·n,topk)
        used = store.used
        if self.evict == "lru":
            # Equal tokens can have equal keys. Which of them topk takes is a matter of rounding, so all that tie with
            # the last taken count as retrieved: otherwise what leaves the store would depend on how the text was cut.
            last = top.amin(-1, keepdim=True)                   # -inf where fewer than topk can be seen
            ties = score.detach() >= last - 8 * torch.finfo(score.dtype).eps * last.abs().clamp(1, D)
            used = used.maximum(torch.where(ties & outside, t.repeat(G)[:, None], -1).amax(2))
        # The other scores are masked rather than the best gathered: two matrix products cost less than moving k·D numbers
        # a query. finfo.min instead of -inf keeps the softmax of a query that found nothing finite.
        nearest = torch.zeros_like(outside).scatter(-1, place, hit)
        weight = score.masked_fill(~nearest, torch.finfo(score.dtype).min).softmax(-1)
        y = weight @ v
        hit = hit.any(-1, keepdim=True)
        return y.reshape(B, self.H, n, D), hit.reshape(B, self.H, n, 1), store._replace(used=used)

    def flops(self, T):
        return super().flops(T) + self.H * self.D * (2 * self.N + 4 * self.topk)


# ----------------------------------------------------------------------------------------------------------------------
# ttt: TTT-Linear (Sun et al. 2024)

class TTT(nn.Module):
    """The state is the weights of a small linear model, trained by gradient descent while it reads; see memories.py."""
    def __init__(self, config: Config, layer: int):
        super().__init__()
        C, H, self.D, self.K = config.n_embd, config.n_head, config.head_dim, config.ttt_chunk
        if self.D % 2:
            raise ValueError(f"ttt rotates its keys and needs an even head size, but n_embd/n_head = {self.D}")
        self.q, self.k, self.v = (nn.Linear(C, C, bias=config.bias) for _ in range(3))
        self.lr = nn.Linear(C, H)                                       # w_h, c_h
        self.token_scale = nn.Parameter(torch.zeros(self.K))            # learned_i
        self.W = nn.Parameter(0.02 * torch.randn(H * self.D, self.D))   # W_0, the heads stacked
        self.b = nn.Parameter(torch.zeros(H * self.D))
        self.ln_weight = nn.Parameter(torch.ones(H * self.D))
        self.ln_bias = nn.Parameter(torch.zeros(H * self.D))
        self.post_norm = nn.LayerNorm(C)
        self.out = nn.Linear(C, C, bias=config.bias)
        self.value_gate = value_gate(config, layer, H)
        self.theta = config.rope_theta

    def forward(self, x, state: TTTState | None = None, ve=None):
        T, D = x.size(1), self.D
        q, k, v = (split_heads(f(x), D) for f in (self.q, self.k, self.v))
        if self.value_gate is not None:
            v = self.value_gate(v, x, ve)
        p = 0 if state is None else int(state.pos)
        positions = torch.arange(p, p + T, device=x.device) % self.K
        q, k = rotary(q, positions, self.theta), rotary(k, positions, self.theta)
        lr = torch.sigmoid(self.lr(x).to(torch.promote_types(x.dtype, torch.float32))) / D          # η (B,T,H), base_lr 1
        i = torch.arange(1, self.K + 1, device=x.device, dtype=self.token_scale.dtype)
        scale = (1 / i + self.token_scale).clamp(min=0)                                             # s_i
        with full_precision(x):
            o, state = ttt_linear(*(a.transpose(1, 2) for a in (q, k, v)), lr, scale, self.W.view(-1, D, D),
                                  *(p.view(-1, D) for p in (self.b, self.ln_weight, self.ln_bias)), state)
        return self.out(self.post_norm(o.flatten(2))), state

    def flops(self, T):
        H, D = self.W.size(0) // self.D, self.D
        return H * (6 * D * D + 4 * self.K * D)


# ----------------------------------------------------------------------------------------------------------------------
# deltanet: Gated DeltaNet (Yang et al. 2025)

class DeltaNetState(NamedTuple):
    tail: Tensor  # (B,w-1,channels) the convolution's last inputs
    S: Tensor     # (B,H,Dk,Dv) the fast weights


class DeltaNet(nn.Module):
    """Fast weights S written by the gated delta rule; see memories.py for the recurrence."""
    def __init__(self, config: Config, layer: int):
        super().__init__()
        C, H, D = config.n_embd, config.n_head, config.head_dim
        self.D, self.Dv, self.width = D, D * config.expand_v, config.conv_width
        self.q, self.k = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)
        self.v, self.g = nn.Linear(C, H * self.Dv, bias=False), nn.Linear(C, H * self.Dv, bias=False)
        self.beta, self.alpha = nn.Linear(C, H, bias=False), nn.Linear(C, H, bias=False)
        channels = 2 * C + H * self.Dv                          # q, k and v share one depthwise convolution
        self.conv = nn.Parameter(torch.empty(channels, 1, self.width).uniform_(-1, 1) * self.width ** -0.5)
        self.A_log = nn.Parameter(torch.empty(H).uniform_(0, 16).log())
        dt = torch.exp(torch.empty(H).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))                  # softplus(dt_bias) = dt
        self.norm_weight = nn.Parameter(torch.ones(self.Dv))
        self.out = nn.Linear(H * self.Dv, C, bias=False)
        self.value_gate = value_gate(config, layer, H)

    def forward(self, x, state=None, ve=None):
        C, T = x.size(2), x.size(1)
        u = torch.cat([self.q(x), self.k(x), self.v(x)], -1)                            # (B,T,channels)
        tail = u.new_zeros(u.size(0), self.width - 1, u.size(2)) if state is None else state.tail
        u = torch.cat([tail, u], 1)
        tail = u[:, T:]
        # Shifted multiply-adds: as fast as a grouped convolution on the CPU, and one fused pass under torch.compile.
        u = F.silu(sum(self.conv[:, 0, w].to(u.dtype) * u[:, w:w + T] for w in range(self.width)))
        q, k, v = u.split([C, C, u.size(2) - 2 * C], -1)
        if self.value_gate is not None:
            v = join_heads(self.value_gate(split_heads(v, self.Dv), x, ve))
        heads = lambda a, D: a.view(*a.shape[:2], -1, D)                                # (B,T,H,D)
        dtype = torch.promote_types(x.dtype, torch.float32)
        beta = torch.sigmoid(self.beta(x).to(dtype))
        log_alpha = -self.A_log.exp() * F.softplus(self.alpha(x).to(dtype) + self.dt_bias)          # <= 0
        with full_precision(x):
            o, S = gated_delta_rule(unit(heads(q, self.D)).to(v.dtype), unit(heads(k, self.D)).to(v.dtype), heads(v, self.Dv),
                                    log_alpha, beta, None if state is None else state.S)
        o = F.rms_norm(o, (self.Dv,), self.norm_weight.to(o.dtype), eps=1e-6).flatten(2)
        return self.out(o * F.silu(self.g(x))), DeltaNetState(tail, S)

    def flops(self, T):
        H, chunk = self.beta.out_features, min(64, T)
        rule = H * (4 * chunk * self.D + 6 * chunk * self.Dv + 6 * self.D * self.Dv)    # the chunked form's
        return rule + 2 * self.width * self.conv.size(0)


# ----------------------------------------------------------------------------------------------------------------------
# mosaic: Memory Mosaics (Zhang et al. 2024)

EXP_SPEEDUP = 10.0  # scales and leaks are stored divided by this, so that they learn ten times faster than their lr
KEY_SCALE_MAX = 5.0


class MosaicKey(nn.Module):
    """k_t = exp(min(power·σ, cap)) k̄_t/‖k̄_t‖,   k̄_t = W_φ x_t + λ k̄_{t-1},   λ = exp(-|b|)   per head."""
    def __init__(self, config: Config, power: float):
        super().__init__()
        self.D, self.power = config.head_dim, power
        self.phi = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.leak = nn.Parameter(torch.linspace(0.5, 5, config.n_head) / EXP_SPEEDUP)   # b
        self.scale = nn.Parameter(torch.ones(config.n_head) / EXP_SPEEDUP)              # σ

    def forward(self, x, k_bar):
        """x (B,T,C), k_bar (B,H,D) or None -> keys (B,H,T,D), the new k_bar."""
        raw = self.phi(x)
        with full_precision(x):
            decay = torch.exp(-EXP_SPEEDUP * self.leak.abs())
            raw, k_bar = leaky_average(raw.view(*x.shape[:2], -1, self.D), decay, k_bar)
            size = (self.power * EXP_SPEEDUP * self.scale).clamp(max=KEY_SCALE_MAX).exp()
            return (size[:, None, None] * unit(raw.transpose(1, 2))).to(raw.dtype), k_bar


class ContextState(NamedTuple):
    k_bar: Tensor  # (B,H,D)     the leaky average
    k: Tensor      # (B,H,t,D)   all keys
    v: Tensor      # (B,H,t-1,D) all values but the last, which waits for the next token
    u: Tensor      # (B,H,1,D)   that value's first half


class ContextualMemory(nn.Module):
    """y_t = Σ_{i<t} softmax_i(k_t·k_i) v_i. The value v_i peeks at token i+1, so the sum stops before t, and y_0 = 0.
    Strictly causal attention is ordinary causal attention of k[1:] on k[:-1]: it runs on the flash kernel."""
    def __init__(self, config: Config, layer: int):
        super().__init__()
        H, self.D, self.dropout = config.n_head, config.head_dim, config.dropout
        self.key = MosaicKey(config, power=1)
        self.psi = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.mix = nn.Parameter(torch.rand(H))                                          # a
        self.scale = nn.Parameter(torch.full((H,), -0.5) / EXP_SPEEDUP)                 # τ
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.value_gate = value_gate(config, layer, H)

    def forward(self, x, state=None, ve=None):
        k_bar, past_k, past_v, past_u = state or (None, None, None, None)
        k, k_bar = self.key(x, k_bar)
        u = split_heads(self.psi(x), self.D)
        if self.value_gate is not None:
            u = self.value_gate(u, x, ve)
        with full_precision(x):
            a, size = self.mix[:, None, None], (EXP_SPEEDUP * self.scale).exp()[:, None, None]
            both = extend(past_u, u)
            v = (size * unit(a * both[:, :, :-1] + (1 - a) * both[:, :, 1:])).to(u.dtype)           # v_i for i < t
        K, V = extend(past_k, k), extend(past_v, v)
        queries = k if state is not None else k[:, :, 1:]                               # nothing stands before token 0
        dropout = self.dropout if self.training else 0.0
        y = attend(queries, K[:, :, :-1], V, scale=1.0, dropout=dropout) if queries.size(2) else queries
        if state is None:
            y = F.pad(y, (0, 0, 1, 0))                                                  # y_0 = 0
        return self.out(join_heads(y)), ContextState(k_bar, K, V, u[:, :, -1:])

    def flops(self, T):
        return attention_flops(T, None, self.psi.in_features)


class PersistentMemory(nn.Module):
    """y = exp(τ) softmax(k P_kᵀ) P_v per head, N learned pairs: takes the place of the MLP. Its state is the leaky
    average of its keys."""
    def __init__(self, config: Config):
        super().__init__()
        C, H, self.D, self.dropout = config.n_embd, config.n_head, config.head_dim, config.dropout
        # An attention block has 2C(C + Hkv·D) + 8C² weights; a mosaic block 5C² + 2·N·C.
        N = config.mosaic_slots or (5 * C + 2 * config.n_kv_head * self.D) // 2
        self.key = MosaicKey(config, power=2)
        self.P_k = nn.Parameter(torch.randn(N, C) * self.D ** -0.5)                     # a row is one slot of every head
        self.P_v = nn.Parameter(torch.randn(N, C) * self.D ** -0.5)
        self.scale = nn.Parameter(torch.full((H,), -0.5) / EXP_SPEEDUP)                 # τ
        self.out = nn.Linear(C, C, bias=False)

    def forward(self, x, state=None):
        k, k_bar = self.key(x, state)
        P_k, P_v = (split_heads(P[None].to(k.dtype), self.D).expand(x.size(0), -1, -1, -1) for P in (self.P_k, self.P_v))
        y = F.scaled_dot_product_attention(k, P_k, P_v, scale=1.0, dropout_p=self.dropout if self.training else 0.0)
        return self.out(join_heads((EXP_SPEEDUP * self.scale).exp()[:, None, None].to(y.dtype) * y)), k_bar

    def flops(self, T):
        return 4 * self.P_k.numel()


# ----------------------------------------------------------------------------------------------------------------------
# The transformer around them

class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.relu2 = config.activation == "relu2"

    def forward(self, x, state=None):
        h = self.up(x)
        return self.out(F.relu(h).square() if self.relu2 else F.gelu(h)), None

    def flops(self, T):
        return 0


class BlockState(NamedTuple):
    mixer: tuple
    feedforward: Tensor | None


class Block(nn.Module):
    def __init__(self, config: Config, layer: int, mixer: type, feedforward: type):
        super().__init__()
        self.norm1, self.mixer = Norm(config), mixer(config, layer)
        self.norm2, self.feedforward = Norm(config), feedforward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, state=None, ve=None):
        mixer, feedforward = state or (None, None)
        y, mixer = self.mixer(self.norm1(x), mixer, ve)
        x = x + self.dropout(y)
        y, feedforward = self.feedforward(self.norm2(x), feedforward)
        return x + self.dropout(y), BlockState(mixer, feedforward)


class StackState(NamedTuple):
    pos: Tensor
    blocks: tuple  # one BlockState a layer


class Stack(nn.Module):
    """Positions, blocks, final norm: x (B,T,C) embedded tokens -> y (B,T,C) ready for the output projection.
    ve (B,T,n,Hkv·D) holds the value embeddings of the n layers that have them."""
    def __init__(self, config: Config):
        super().__init__()
        memory = MEMORIES[config.memory]
        fill = [memory[:2] if config.carries_memory(i) else (Attention, MLP) for i in range(config.n_layer)]
        self.blocks = nn.ModuleList(Block(config, i, *classes) for i, classes in enumerate(fill))
        self.slots = [config.value_embed_slot(i) for i in range(config.n_layer)]
        self.wpe = nn.Embedding(config.max_seq_len, config.n_embd) if config.pos == "learned" else None
        self.embed_norm = Norm(config) if config.norm == "rms" else nn.Identity()
        self.final_norm = Norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, state=None, ve=None):
        pos, states = state or (0, [None] * len(self.blocks))
        T, pos = x.size(1), int(pos)
        if self.wpe is not None:
            if pos + T > self.wpe.num_embeddings:
                raise ValueError(f"{pos + T} tokens were given to a model with {self.wpe.num_embeddings} learned "
                                 "positions; shorten the text, or train with --pos=rope")
            x = x + self.wpe(torch.arange(pos, pos + T, device=x.device))
        x = self.dropout(self.embed_norm(x))
        new = []
        for block, s, slot in zip(self.blocks, states, self.slots):
            x, s = block(x, s, None if slot is None else ve[:, :, slot])
            new.append(s)
        return self.final_norm(x), StackState(torch.tensor(pos + T), tuple(new))

    def flops(self, T):
        weights = sum(2 * p.weight.numel() for p in self.modules() if isinstance(p, nn.Linear))
        return weights + sum(b.mixer.flops(T) + b.feedforward.flops(T) for b in self.blocks)


# ----------------------------------------------------------------------------------------------------------------------
# rmt: Recurrent Memory Transformer (Bulatov et al. 2022)

class RMTState(NamedTuple):
    memory: Tensor                # (B,M,C) what the running segment read
    segment: StackState | None    # the stack over [read memory; the segment's tokens so far]
    pos: Tensor                   # () tokens of the running segment seen, 0..S


class RMT(nn.Module):
    """Runs the stack on [read memory (M); segment (S); write memory (M)], segment after segment; the outputs at the
    write positions are the next segment's read memory.

    The memory is written at the end because a causal model's earlier positions never see the segment. Write positions
    start from the read memory, as in the paper: what is not overwritten carries over, and no weights are added. The
    write tokens run only once a token of the next segment is there to read them. Positions restart in each segment and
    windowed layers keep seeing the read memory (sink_tokens).

    Each segment's loss reaches rmt_bptt boundaries back. Where that is fewer than a row has, segments are run once per
    depth: run d reads a memory whose gradient crosses d boundaries. So truncation costs rmt_bptt + 1 runs of the stack,
    and a row with no more boundaries than rmt_bptt costs one.
    """
    def __init__(self, config: Config):
        super().__init__()
        self.M, self.S = config.rmt_tokens, config.rmt_segment or config.max_seq_len // 4
        self.bptt = config.rmt_bptt
        if self.S < 1 or config.max_seq_len % self.S:
            raise ValueError(f"max_seq_len={config.max_seq_len} is not a multiple of rmt_segment={self.S}; change either")
        if config.sink_tokens:
            raise ValueError(f"sink_tokens={config.sink_tokens} was given, but rmt uses the sinks for its read memory; leave it 0")
        self.stack = Stack(replace(config, max_seq_len=self.S + 2 * self.M, short_window=config.local_window,
                                   sink_tokens=self.M))
        self.memory = nn.Embedding(self.M, config.n_embd)       # what the first segment reads

    def forward(self, x, state=None, ve=None):
        start = self.memory.weight.to(x.dtype).expand(x.size(0), -1, -1)
        memory, segment, p = state or (start, None, 0)
        p = int(p)
        boundaries = (p + x.size(1) - 1) // self.S              # that this call crosses
        copies = [(memory, segment)]                            # one a gradient depth, the deepest last
        ys = []
        while x.size(1):
            n = min(self.S - p, x.size(1))
            piece, x = x[:, :n], x[:, n:]
            piece_ve, ve = (None, None) if ve is None else (ve[:, :n], ve[:, n:])
            p += n
            close = p == self.S and x.size(1) > 0
            copies = [self.run(piece, piece_ve, memory, segment, close) for memory, segment in copies]
            ys.append(copies[-1][0])
            if close:
                p, written = 0, [(memory, None) for _, memory, _ in copies]
                if self.bptt < boundaries and torch.is_grad_enabled():
                    written = [(written[0][0].detach(), None), *written][:self.bptt + 1]
                copies = written
            else:
                copies = [(memory, segment) for _, memory, segment in copies]
        return torch.cat(ys, 1), RMTState(*copies[-1], torch.tensor(p))

    def run(self, piece, ve, memory, segment, close):
        """The stack over [memory if the segment begins here; piece; memory if it ends here] -> outputs at the piece, the
        memory (rewritten if it ends), the stack's state."""
        before, after = self.M * (segment is None), self.M * close
        if segment is not None and piece.size(1) + after == 0:  # a complete segment of a model without memory
            return piece, memory, segment
        x = torch.cat([memory[:, :before], piece, memory[:, :after]], 1)
        ve = None if ve is None else F.pad(ve, (0, 0, 0, 0, before, after))             # memory has no token ids
        y, segment = self.stack(x, segment, ve)
        if close:
            memory = y[:, y.size(1) - self.M:]
        return y[:, before:before + piece.size(1)], memory, segment

    def flops(self, T):
        return self.stack.flops(self.S + 2 * self.M) * (self.S + 2 * self.M) / self.S


# ----------------------------------------------------------------------------------------------------------------------
# The table of memories, and the model

class Memory(NamedTuple):
    """What a memory puts into the backbone: in place of attention, in place of the MLP, around the blocks."""
    mixer: type = Attention
    feedforward: type = MLP
    stack: type = Stack


MEMORIES = {
    "none": Memory(),
    "persistent": Memory(mixer=PersistentAttention),
    "rmt": Memory(stack=RMT),
    "ttt": Memory(mixer=TTT),
    "deltanet": Memory(mixer=DeltaNet),
    "knn": Memory(mixer=KNNAttention),
    "mosaic": Memory(mixer=ContextualMemory, feedforward=PersistentMemory),
}


def state_bytes(state) -> int:
    """Bytes of all tensors in a state: what a sequence costs to keep."""
    if state is None:
        return 0
    return state.numel() * state.element_size() if isinstance(state, Tensor) else sum(map(state_bytes, state))


class GPT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.n_embd
        self.wte = nn.Embedding(V, C)
        self.n_ve = sum(config.value_embed_slot(i) is not None for i in range(config.n_layer))
        self.value_embeds = nn.Embedding(V, self.n_ve * config.n_kv_head * config.head_dim) if self.n_ve else None
        self.body = MEMORIES[config.memory].stack(config)
        self.lm_head = nn.Linear(C, V, bias=False)
        self.init_weights()
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight

    def init_weights(self):
        """N(0, 0.02²) everywhere, GPT-2's 1/√(2L) on what is added to the residual stream; value embeddings as wide as
        the values they join. What a memory has beyond linear layers and embeddings is set in its own class."""
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

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The blocks' matrices, of every mechanism alike: Muon's share. Embeddings, memory tokens, output projection,
        vectors and convolutions are AdamW's."""
        return [p for m in self.modules() if isinstance(m, Block) for p in m.parameters() if p.ndim == 2]

    def stream(self, idx: Tensor, state=None) -> tuple[Tensor, tuple]:
        """idx (B,T) int64 continues the sequence that `state` remembers -> logits (B,T,V), the new state."""
        x = self.wte(idx)                                       # (B,T,C)
        ve = self.value_embeds(idx).unflatten(-1, (self.n_ve, -1)) if self.n_ve else None
        x, state = self.body(x, state, ve)
        logits = self.lm_head(x)                                # (B,T,V)
        if self.config.softcap:
            logits = self.config.softcap * torch.tanh(logits.to(torch.promote_types(x.dtype, torch.float32)) / self.config.softcap)
        return logits, state

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B,T,V); with targets (B,T) the mean cross-entropy in nats over targets other than -1."""
        logits, _ = self.stream(idx)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 generator: torch.Generator | None = None) -> Tensor:
        """Appends max_new_tokens sampled tokens to idx (B,T), one `stream` call each; temperature 0 takes the likeliest."""
        if idx.size(1) == 0:
            raise ValueError("generate was given no tokens to continue; start from the end-of-text token")
        training = self.training
        self.eval()
        state, new = None, idx
        for _ in range(max_new_tokens):
            logits, state = self.stream(new, state)
            logits = logits[:, -1].float()
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:], float("-inf"))
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            idx = torch.cat([idx, new], 1)
        self.train(training)
        return idx

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs (forward, and backward at twice that) per token of a row of seq_len tokens: matrix products and
        each memory's own work."""
        return 3 * (self.body.flops(seq_len) + 2 * self.lm_head.weight.numel())
