"""The tests: python test_all.py [-k part of a name] [-j processes] [-x]. Also collected by pytest.

A test is a function `test_*` with plain asserts. `@each(memory=…, t=…)` makes one test of every combination. Every fast
form is compared with the equation written out slowly, values and gradients, and every memory must keep the law:

    split       f(x) == f(x[:, :t]) ++ f(x[:, t:], state)        causality   token t changes nothing before t
    influence   an early token reaches past window and segment   purity      a state used twice gives the same answer
    bounded     the state of a memory that claims it stops growing

Reading order: the decorator; memories, the law, model, kernels, data, train, eval, toys, analyze; the README's example; the runner.
"""
import argparse
import contextlib
import functools
import hashlib
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one process a core

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import analyze
import data
import eval as measuring
import memories
import model
import toys
import train
from memories import gated_delta_rule, leaky_average, ttt_linear
from model import GPT, MEMORIES, PRESETS, Config, state_bytes

ROOT = Path(__file__).resolve().parent


def each(**grid):
    """One test per combination of the values given, named test_x__a_b."""
    def bind(function, arguments):
        return lambda: function(**arguments)  # no parameters: pytest would take them for fixtures

    def expand(function):
        for values in itertools.product(*grid.values()):
            name = "__".join([function.__name__, re.sub(r"[^\w.=]+", "_", "_".join(map(str, values))).strip("_")])
            globals()[name] = bind(function, dict(zip(grid, values)))
            globals()[name].__name__ = name
        LAWS[function.__name__] = function
    return expand


LAWS = {}  # the functions before expansion, for a memory that is not in the table yet (the README's example)


def error(a, b):
    """Relative error ‖a-b‖/‖b‖"""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def raises(kind, function, *parts):
    """The call fails with `kind`, one sentence that contains every part."""
    try:
        function()
    except kind as e:
        assert "\n" not in str(e), e
        for part in parts:
            assert part in str(e), f"{part!r} is not in: {e}"
        return
    raise AssertionError(f"no {kind.__name__} was raised")


def call(main, *argv):
    """A script's main in this process -> exit status, stdout, stderr"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in argv])
        except SystemExit as e:  # how argparse ends after --help
            status = e.code
    return status, out.getvalue(), err.getvalue()


def refused(main, argv, *words):
    """main ends with status 2 and one line "error: ..." that holds every word."""
    status, out, err = call(main, *argv)
    assert status == 2, (argv, status, out, err)
    assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err + out, err
    for word in words:
        assert word in err, (word, err)


# ----------------------------------------------------------------------------------------------------------------------
# memories.py: the chunked forms are the loops, in outputs, states and every gradient. The kernels take the same cases

def runs(**grid):
    """The sizes of every combination of the values given."""
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def delta(T=(1, 63, 64, 65, 150), D=(16,), Dv=(32,), **more):
    return runs(B=[1], H=[2], T=T, D=D, Dv=Dv, **more)


def ttt(T=(64,), D=(32,), K=(16,), **more):
    return runs(B=[1], H=[2], T=T, D=D, K=K, **more)


def identical(k):
    return k[:, :1].expand_as(k).clone()


def correlated(k):
    return F.normalize(k[:, :1] + 0.1 * k, dim=-1)


def now_and_then(x):
    """A strong decay at every fifth token, next to none at the others."""
    return torch.where(torch.rand_like(x) < 0.2, -30.0, -0.01).to(x.dtype)


def some_rates(scale):
    return torch.where(torch.arange(len(scale)) % 3 == 0, 0.0, scale)


def times(factor):
    return lambda x: factor * x


ZERO, ONE, TWO = torch.zeros_like, torch.ones_like, lambda x: torch.full_like(x, 2)
HEAD_SIZES = [(16, 16), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
LARGE = dict(W=times(15), b=times(10), ln_bias=times(10))

# name -> the sizes to run, and what is changed in memories.example; at the cuts a call ends and the next one begins
CASES = {
    "leaky": (runs(B=[2], H=[3], D=[4], T=[1, 2, 64, 65, 4200]),        # 4200 > 64²: three levels of the scan
              dict(decay=lambda x: torch.tensor([0.0, 0.6, 0.999], dtype=x.dtype))),
    "delta_plain": (delta(), {}),
    "delta_rows": (runs(B=[2], H=[2], D=[16], T=[2, 31, 32, 33, 129]), {}),
    "delta_heads": ([dict(B=1, T=66, H=1, D=D, Dv=Dv) for D, Dv in HEAD_SIZES], {}),
    "delta_strong_decay": (delta(), dict(g=lambda g: -30 * torch.rand_like(g))),
    "delta_stronger_decay": (delta(T=[70]), dict(g=lambda g: -20 * ONE(g))),
    "delta_uneven_decay": (delta(T=[130]), dict(g=now_and_then)),
    "delta_little_decay": (delta(T=[70]), dict(g=times(1e-3))),
    "delta_no_decay": (delta(), dict(g=ZERO)),
    "delta_beta_0": (delta(), dict(beta=ZERO)),
    "delta_beta_1": (delta(T=[70]), dict(beta=ONE)),
    "delta_beta_0_or_1": (delta(T=[70]), dict(beta=torch.round)),
    "delta_identical_keys": (delta(), dict(k=identical, beta=ONE)),
    "delta_identical_keys_kept": (delta(T=[130], D=[32]), dict(k=identical, beta=ONE, g=ZERO)),
    "delta_correlated_keys": (delta(), dict(k=correlated, beta=ONE)),
    "delta_correlated_keys_kept": (delta(T=[130], D=[32]), dict(k=correlated, beta=ONE, g=ZERO)),
    "delta_beta_to_2": (delta(T=[70]), dict(beta=times(2))),
    "delta_beta_2_kept": (delta(T=[130]), dict(beta=TWO, g=ZERO)),
    "delta_beta_to_2_correlated_keys": (delta(T=[130]), dict(k=correlated, beta=times(2), g=ZERO)),
    "delta_state": (delta(T=[70], cuts=[(37,), (0, 64)]), {}),
    "delta_strided": (delta(T=[70]), dict(v=lambda v: v.transpose(1, 2).contiguous().transpose(1, 2),
                                          g=lambda g: g.mT.contiguous().mT)),
    "ttt_lengths": (ttt(T=[1, 15, 16, 17, 49, 100, 129]), {}),
    "ttt_heads": (ttt(T=[96], D=[32, 64], K=[16, 32, 64]) + ttt(T=[32], D=[128]), {}),
    "ttt_long": (ttt(T=[192], K=[64]), {}),
    "ttt_no_rate": (ttt(), dict(lr=ZERO)),
    "ttt_high_rates": (ttt(), dict(lr=times(8), token_scale=some_rates)),
    "ttt_large_weights": (ttt(T=[53]), LARGE),
    "ttt_identical_keys": (ttt(), dict(k=identical)),
    "ttt_state": (ttt(T=[100], cuts=[(0, 9, 60), (19,), (16,)]) + ttt(T=[90], K=[32], cuts=[(40, 41)]), {}),
    "adding_delta": (delta(), {}),                                      # without erasing: not for the kernels
    "adding_delta_state": (delta(T=[70], cuts=[(37,), (0, 64)]), dict(beta=times(2))),
    "adding_delta_kept": (delta(T=[130]), dict(k=identical, g=ZERO)),
    "small_ttt_batches": (ttt(T=[4, 17], D=[8], K=[4], cuts=[(), (1,), (7,)]), LARGE),      # not for the kernels
}


def function_of(case):
    return next(fn for name, fn in memories.FUNCTIONS.items() if re.search("leaky|delta|ttt", case)[0] in name)


def fed_in_pieces(fn, cuts):
    """fn in several calls, each of which continues from the state of the one before."""
    def run(impl, state=None, **args):
        tokens = [name for name in args if name in ("q", "k", "v", "g", "beta", "lr")]
        outputs = []
        for start, stop in zip((0, *cuts), (*cuts, args["q"].size(1))):
            o, state = fn(**args | {name: args[name][:, start:stop] for name in tokens}, state=state, impl=impl)
            outputs.append(o)
        return torch.cat(outputs, 1), state
    return run


def check_case(case, impl, dtype, tolerance):
    sizes, changes = CASES[case]
    for size in sizes:
        torch.manual_seed(0)
        cuts, size = size.get("cuts", ()), {name: x for name, x in size.items() if name != "cuts"}
        fn = function_of(case)
        args = memories.example(fn.__name__, **size, dtype=dtype)
        args |= {name: change(args[name]) for name, change in changes.items()}
        if case.startswith("adding"):
            fn = functools.partial(fn, erase=False)
        close(f"{case} {size} {cuts}", fed_in_pieces(fn, cuts) if cuts else fn, args, impl, tolerance)


def close(what, fn, args, impl, tolerance):
    wrong = {name: x for name, x in memories.errors(fn, args, impl).items() if x > tolerance}
    assert not wrong, f"{what}: {wrong}"


@each(case=list(CASES), dtype=[torch.float64, torch.float32])
def test_chunk_is_the_loop(case, dtype):
    check_case(case, "chunk", dtype, {torch.float64: 1e-10, torch.float32: 1e-5}[dtype])


def delta_example(T=70, dtype=torch.float32, D=16, Dv=16):
    torch.manual_seed(0)
    return memories.example("gated_delta_rule", 2, T, 3, D, Dv=Dv, dtype=dtype)


def ttt_example(T=70, dtype=torch.float32, D=32, K=16):
    torch.manual_seed(0)
    return memories.example("ttt_linear", 2, T, 3, D, K=K, dtype=dtype)


@each(erase=[True, False])
def test_delta_rule_loop_is_the_equation(erase):
    """One head written out with explicit matrices, S_t = α (I - β k kᵀ) S + β k vᵀ; without erasing k kᵀ is left out."""
    args = delta_example(9, torch.float64, 8, 16)
    o, last = gated_delta_rule(**args, erase=erase, impl="loop")
    q, k, v, g, beta = [args[name][1, :, 2] for name in ("q", "k", "v", "g", "beta")]
    S, eye = args["state"][1, 2], torch.eye(8, dtype=torch.float64)
    for t in range(9):
        S = g[t].exp() * (eye - erase * beta[t] * torch.outer(k[t], k[t])) @ S + beta[t] * torch.outer(k[t], v[t])
        assert error(o[1, t, 2], S.T @ q[t] * 8 ** -0.5) < 1e-12
    assert error(last[1, 2], S) < 1e-12


def check_reflections(keys, impl, T):
    """β of 1.5 and 2 and no forgetting, for T tokens of like keys: rounding in float32 stays rounding, in values and
    gradients, and a state to which nothing is written never gets longer."""
    torch.manual_seed(0)
    args = memories.example("gated_delta_rule", 1, T, 1, 16)
    beta = 1.5 + 0.5 * torch.rand_like(args["beta"]).round()
    for beta in (beta, TWO(beta)):
        args |= dict(k=keys(args["k"]), g=ZERO(beta), beta=beta)
        exact = memories.results(gated_delta_rule, {name: x.double() for name, x in args.items()}, "loop")
        found = memories.results(gated_delta_rule, args, impl)
        for name in exact:
            assert error(found[name], exact[name]) < 5e-4, (name, error(found[name], exact[name]))
    _, last = gated_delta_rule(**args | dict(v=ZERO(args["v"])), impl=impl)
    assert last.norm() <= 1.0001 * args["state"].norm()


@each(keys=["identical", "correlated"])
def test_nothing_grows_where_the_delta_rule_reflects(keys):
    check_reflections(globals()[keys], "chunk", 2048)


def test_ttt_loop_is_gradient_descent():
    """The inner gradient by autograd instead of the closed form; one head, all gradients at the mini-batch's start."""
    args = ttt_example(11, torch.float64, 8, 4)
    args |= dict(W=15 * args["W"], b=10 * args["b"], ln_bias=10 * args["ln_bias"])
    o, state = ttt_linear(**args, impl="loop")
    q, k, v, lr = [args[name][1, :, 2] for name in ("q", "k", "v", "lr")]
    W0, b0, weight, bias = [args[name][2].clone() for name in ("W", "b", "ln_weight", "ln_bias")]
    ln = lambda z: F.layer_norm(z, (8,), weight, bias, eps=1e-6)
    sum_W, sum_b = 0, 0
    for t in range(11):
        loss = 0.5 * (k[t] + ln(k[t] @ W0.requires_grad_() + b0.requires_grad_()) - v[t]).square().sum()
        dW, db = torch.autograd.grad(loss, (W0, b0))
        sum_W, sum_b, s = sum_W + lr[t] * dW, sum_b + lr[t] * db, args["token_scale"][t % 4]
        W, b = (W0 - s * sum_W).detach(), (b0 - s * sum_b).detach()
        assert error(o[1, t, 2], q[t] + ln(q[t] @ W + b)) < 1e-12, t
        if t % 4 == 3:
            W0, b0, sum_W, sum_b = W, b, 0, 0
    assert error(state.W_start[1, 2], W0) < 1e-12 and error(state.grad_W[1, 2], sum_W) < 1e-12 and int(state.pos) == 3
    assert error(state.b_start[1, 2], b0) < 1e-12 and error(state.grad_b[1, 2], sum_b) < 1e-12


def check_no_tokens(impl):
    args = delta_example(0)
    o, state = gated_delta_rule(**args, impl=impl)
    assert o.shape == args["v"].shape and torch.equal(state, args["state"])
    args = ttt_example(0)
    o, state = ttt_linear(**args, impl=impl)
    assert o.shape == args["q"].shape and torch.equal(state.W_start[0], args["W"])


def test_memories_take_no_tokens():
    check_no_tokens("auto")
    y, state = leaky_average(torch.zeros(2, 0, 3, 4), torch.rand(3), torch.ones(2, 3, 4))
    assert y.shape == (2, 0, 3, 4) and torch.equal(state, torch.ones(2, 3, 4))


def test_memories_keep_float32_states():
    args = delta_example(dtype=torch.bfloat16)
    o, S = gated_delta_rule(**args)
    assert o.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert error(o, gated_delta_rule(**{name: x.double() for name, x in args.items()})[0]) < 1e-2
    raises(ValueError, lambda: gated_delta_rule(**args, impl="fast"), "fast", "chunk")


# ----------------------------------------------------------------------------------------------------------------------
# The law, for every entry of MEMORIES, in float64, through the public stream

T = 80
SMALL = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=40, max_seq_len=T, short_window=8, knn_capacity=16, knn_topk=4, ttt_chunk=8,
             rmt_segment=20, rmt_tokens=3, persistent_slots=3, dropout=0.0, window="SL")
VARIANTS = {name: {k: v for k, v in preset.items() if k not in SMALL} for name, preset in PRESETS.items()}
VARIANTS |= {"alibi": dict(pos="alibi"), "gqa": dict(n_kv_head=1, value_embeds=True, token_shift=True), "hybrid": dict(n_layer=3, memory_layers="1"),
             "lru": dict(knn_evict="lru"), "wide": dict(expand_v=2, value_embeds=True, ttt_backbone="transformer")}
CUTS = (1, 7, 8, 9, 19, 20, 21, 63, 64, 65, T - 1)  # around windows and mini-batches (8), segments (20), delta chunks (64)


def small(memory, variant="laptop", **changes):
    options = SMALL | VARIANTS[variant] | changes
    if MEMORIES[memory].mixer is model.Attention:
        options.pop("memory_layers", None)
    torch.manual_seed(0)
    return GPT(Config(memory=memory, **options)).double().eval()


def small_layer(memory, **changes):
    """The mixer of a model of one layer."""
    return small(memory, n_layer=1, **changes).body.blocks[0].mixer


def noise(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens(seed=0, rows=2, length=T):
    return torch.randint(SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def changed(idx, t):
    idx = idx.clone()
    idx[:, t] = (idx[:, t] + 1) % SMALL["vocab_size"]
    return idx


def token_by_token(net, idx):
    state, steps = None, []
    for t in range(idx.size(1)):
        logits, state = net.stream(idx[:, t:t + 1], state)
        steps.append(logits)
    return torch.cat(steps, 1)


def tensors(state):
    if state is None or isinstance(state, torch.Tensor):
        return [] if state is None else [state]
    return [x for part in state for x in tensors(part)]


@each(variant=VARIANTS, memory=MEMORIES)
@torch.no_grad()
def test_split_and_causality(variant, memory):
    net, idx = small(memory, variant), tokens()
    full, _ = net.stream(idx)
    for t in CUTS:
        first, state = net.stream(idx[:, :t])
        second, _ = net.stream(idx[:, t:], state)
        assert error(torch.cat([first, second], 1), full) < 1e-10, f"cut at {t}"
    assert error(token_by_token(net, idx), full) < 1e-10, "token by token"
    for t in (1, 20, 50, T - 1):
        before = net(changed(idx, t))[:, :t]
        assert torch.equal(before, full[:, :t]) or error(before, full[:, :t]) < 1e-14, t


DELTA_FAMILY = {"reflecting": dict(delta_beta=2), "adding": dict(delta_erase=False), "steps": dict(delta_beta=2, delta_steps=2),
                "adding_steps": dict(delta_erase=False, delta_steps=2, expand_v=2)}


@each(member=DELTA_FAMILY)
def test_laws_of_the_delta_family(member):
    with mock.patch.dict(SMALL, DELTA_FAMILY[member]):
        for variant in ("laptop", "gqa"):
            LAWS["test_split_and_causality"](variant, "deltanet")
        LAWS["test_influence"]("deltanet", 1)
        LAWS["test_purity"]("deltanet")
        LAWS["test_bounded_state"]("deltanet")
        LAWS["test_generation_is_the_forward_argmax"]("deltanet", "d12")
        LAWS["test_every_parameter_learns_and_has_an_optimizer"]("deltanet")
        LAWS["test_compiles_without_graph_breaks"]("deltanet")


@each(seed=range(4))
@torch.no_grad()
def test_knn_lru_forgets_the_same_however_equal_keys_are_read(seed):
    net, idx = small("knn", "lru"), tokens(seed) % 7  # seven tokens: in the first layer most keys are exactly equal
    assert error(token_by_token(net, idx), net(idx)) < 1e-10


@each(memory=list(MEMORIES), layers=[1, 2])
@torch.no_grad()
def test_influence(memory, layers):
    """An early token reaches the last one, far outside every window and segment, in one call and through a state."""
    net, idx = small(memory, n_layer=layers, window="SL"[-layers:], knn_capacity=128, knn_topk=128), tokens()
    for t in (0, 30):
        other = changed(idx, t)
        assert error(net(other)[:, -1], net(idx)[:, -1]) > 1e-9, f"token {t} is forgotten"
        last, last_other = (net.stream(idx[:, 41:], net.stream(x[:, :41])[1])[0][:, -1] for x in (idx, other))
        assert error(last_other, last) > 1e-9


@torch.no_grad()
def test_influence_fails_without_memory():
    """The fair baselines forget: segments without memory tokens, windows without a store, and the floor (--window=S has no
    layer that sees everything)."""
    local = small("none", window="S")
    few = small("knn", n_layer=1, knn_capacity=16)              # 8 in the window, at most 16 in the store
    idx = tokens()
    for net, t, reach in ((small("rmt", rmt_tokens=0), 19, 20), (few, 0, 30), (local, 0, 16)):
        assert torch.equal(net(idx)[:, reach:], net(changed(idx, t))[:, reach:])


@each(memory=MEMORIES)
@torch.no_grad()
def test_purity(memory):
    net, idx = small(memory, "d12"), tokens()
    before = idx.clone()
    _, state = net.stream(idx[:, :33])
    copy = [x.clone() for x in tensors(state)]
    first = net.stream(idx[:, 33:], state)[0]
    assert torch.equal(first, net.stream(idx[:, 33:], state)[0])
    assert torch.equal(idx, before) and all(map(torch.equal, tensors(state), copy)) and len(copy) > 0


@each(memory=["none", "persistent", "rmt", "ttt", "deltanet", "knn"])
@torch.no_grad()
def test_bounded_state(memory):
    idx = tokens(length=4 * T)
    sizes = lambda net: [state_bytes(net.stream(idx[:, :t])[1]) for t in (2 * T, 3 * T, 4 * T)]
    bounded = sizes(small(memory, window="S"))
    assert len(set(bounded)) == 1 and bounded[0] > 0, bounded
    if memory in ("none", "persistent"):                        # a layer that sees everything remembers it
        unbounded = sizes(small(memory, window="SL"))
        assert unbounded[2] > 1.9 * unbounded[0]


@each(memory=MEMORIES, variant=["laptop", "gpt2", "d12"])
@torch.no_grad()
def test_generation_is_the_forward_argmax(memory, variant):
    net, idx = small(memory, variant, max_seq_len=T).float(), tokens(rows=1, length=5)
    out = net.generate(idx, T - 5, temperature=0)
    assert out.shape == (1, T) and torch.equal(net(out)[:, 4:-1].argmax(-1), out[:, 5:])


def test_generation_is_sampling():
    """A temperature near 0 leaves the likeliest token, and so does top_k=1; at temperature 1 tokens come as often as the
    softmax says. A model that trains goes on training."""
    net, idx = small("none").train(), tokens(rows=1, length=5)
    likeliest = net.generate(idx, 20, temperature=0)
    assert torch.equal(net.generate(idx, 20, temperature=1e-4), likeliest) and torch.equal(net.generate(idx, 20, top_k=1), likeliest)
    drawn = net.generate(idx.expand(20_000, -1), 1, generator=torch.Generator().manual_seed(0))[:, -1]
    share = torch.bincount(drawn, minlength=40) / 20_000
    assert (share - net(idx)[0, -1].softmax(-1)).abs().max() < 0.01 and net.training


@each(memory=MEMORIES)
@torch.no_grad()
def test_dropout_is_for_training_alone(memory):
    """Two passes of eval() are equal. In train() the model's differ, and so do those of each half of a block that drops
    attention weights."""
    net, idx, x = small(memory, dropout=0.5), tokens(), noise(2, T, 16)
    block = net.body.blocks[-1] if memory != "rmt" else net.body.stack.blocks[-1]
    parts = [part for part in (block.mixer, block.feedforward) if hasattr(part, "dropout")]
    assert len(parts) == {"ttt": 0, "deltanet": 0, "mosaic": 2}.get(memory, 1)
    assert torch.equal(net(idx), net(idx)) and all(torch.equal(part(x)[0], part(x)[0]) for part in parts)
    net.train()
    assert error(net(idx), net(idx)) > 1e-3 and all(error(part(x)[0], part(x)[0]) > 1e-3 for part in parts)


# ----------------------------------------------------------------------------------------------------------------------
# model.py: each layer against its slow form

def test_attend_is_masked_softmax():
    q, k, v = noise(2, 4, 70, 8), noise(2, 2, 90, 8, seed=2), noise(2, 2, 90, 5, seed=3)
    alibi = torch.tensor([0.5, 0.25, 0.1, 0.7], dtype=torch.float64)
    for Tq, Tk, *rest in itertools.product((1, 40, 70), (70, 90), (None, 5, 33, 200), (0, 3), (None, alibi), (None, 1.0)):
        given = (q[:, :, :Tq], k[:, :, :Tk], v[:, :, :Tk], *rest)
        assert error(model.attend(*given), model.attend_slow(*given)) < 1e-12, (Tq, Tk, rest)
        assert error(model.attend(*given, dropout=0.5), model.attend(*given)) > 1e-2, (Tq, Tk, rest)


@torch.no_grad()
def test_rotary_is_relative():
    q, k = noise(1, 1, 1, 8), noise(1, 1, 1, 8, seed=2)
    dot = lambda i, j: (model.rotary(q, torch.tensor([i]), 100.0) * model.rotary(k, torch.tensor([j]), 100.0)).sum()
    assert abs(dot(7, 3) - dot(104, 100)) < 1e-10 and abs(dot(7, 3) - dot(8, 3)) > 1e-3


@each(evict=["fifo", "lru"], kv=[1, 2], qk_norm=[True, False])
@torch.no_grad()
def test_knn_is_a_store_searched_token_by_token(evict, kv, qk_norm):
    layer = small_layer("knn", n_kv_head=kv, knn_evict=evict, qk_norm=qk_norm, short_window=6, knn_capacity=14, knn_topk=3)
    layer.gate.copy_(torch.tensor([0.3, -1.0]))
    x = noise(2, 60, 16)
    for keys in layer.by_content(*layer.project(x, None)[:2]):
        assert error(keys.square().mean(-1), torch.ones(keys.shape[:-1])) < 1e-3
    # Under lru pairs with equal stamps may leave in any order: there the two agree up to the first eviction, at token 18.
    until = 60 if evict == "fifo" else 18
    assert error(layer(x)[0][:, :until], layer.slow(x)[:, :until]) < 1e-12


def test_knn_lru_keeps_what_is_retrieved():
    """A pair that every query retrieves outlives the capacity under lru, and not under fifo; stored pairs get no gradient."""
    for evict in ("fifo", "lru"):
        layer = small_layer("knn", knn_evict=evict, pos="none", short_window=4, knn_capacity=8, knn_topk=1)
        direction = F.normalize(noise(8), dim=0)
        store = None
        k = 0.01 * noise(1, 2, 40, 8, seed=2)
        k[:, :, 0] = 10 * direction                             # token 0 matches every query best
        q = direction.expand(1, 2, 40, 8)
        for a in range(4, 40, 4):
            store = layer.write(store, k[:, :, a - 4:a], k[:, :, a - 4:a], a - 4, a)
            _, _, store = layer.retrieve(q[:, :, a:a + 4], store, torch.arange(a, a + 4))
        assert (0 in store.written[0, 0].tolist()) == (evict == "lru"), store.written[0, 0]
        assert store.k.size(2) == 8
    x = noise(1, 40, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(small_layer("knn")(x)[0][:, -1].sum(), x)
    assert gradient[:, :32].abs().max() == 0 and gradient[:, 32:].abs().min() > 0   # 8 in the window, none through the store


@each(window=[None, 4])
@torch.no_grad()
def test_persistent_slots_are_keys_without_position_or_window(window):
    layer = small_layer("persistent", pos="none")
    layer.window = window
    layer.slot_scale.fill_(1.0)
    x = noise(1, 12, 16)
    q, k, v = layer.project(x, None)
    slot_k, slot_v = (p.view(1, 3, 2, 8).transpose(1, 2) for p in (layer.slot_k, layer.slot_v))
    hidden = torch.ones(12, 12).triu(1) + torch.ones(12, 12).tril(-(window or 12))
    score = torch.cat([q @ F.rms_norm(slot_k, (8,)).mT, (q @ k.mT).masked_fill(hidden.bool(), float("-inf"))], -1)
    weights = (score * 8 ** -0.5).softmax(-1)
    assert error(layer(x)[0], layer.out(model.join_heads(weights @ torch.cat([slot_v, v], 2)))) < 1e-12
    to_slots, to_tokens = layer.weights(x)
    assert error(to_slots, weights[..., :3].sum(-1)) < 1e-12 and error(to_tokens, weights[..., 3:]) < 1e-12


@torch.no_grad()
def test_attention_weights():
    """What `weights` shows is what mixes the values, from a state too: of attention, of knn's window, of mosaic."""
    x = noise(1, 30, 16)
    for memory, options in (("none", dict(pos="alibi")), ("knn", dict(n_kv_head=1))):
        layer = small_layer(memory, **options)
        layer.window = 5
        _, _, v = layer.project(x, None)
        nothing, weights = layer.weights(x)
        local, _ = layer.look_back(*layer.project(x, None), None)
        assert error(weights @ v, local) < 1e-12 and nothing.abs().max() == 0
        _, later = layer.weights(x[:, 29:], layer(x[:, :29])[1])
        assert error(later[:, :, 0], weights[:, :, 29, 25:]) < 1e-12
    layer = small_layer("mosaic")
    _, state = layer(x[:, :29])
    nothing, weights = layer.weights(x[:, 29:], state)
    y, (_, _, values, _) = layer(x[:, 29:], state)
    assert error(layer.out(model.join_heads(weights[..., :29] @ values)), y) < 1e-12
    assert weights.size(-1) == 30 and weights[..., 29].max() == 0 == nothing.max()


@each(window=["SSSL", "L"])
@torch.no_grad()
def test_rmt_is_read_segment_write(window):
    """The memory changes, and its tokens are seen past the window."""
    net = small("rmt", window=window)
    rmt, x = net.body, net.wte(tokens())
    y, (memory, _, _) = rmt(x)
    assert error(y, rmt.slow(x)) < 1e-12 and error(memory, rmt.memory_tokens.weight.expand(2, -1, -1)) > 1e-6
    memory, block = rmt.memory_tokens.weight[None], rmt.stack.blocks[0]
    (seen, _), (other, _) = (block(torch.cat([m, x[:1, :20]], 1)) for m in (memory, memory + 1))
    assert error(other[:, -1], seen[:, -1]) > 1e-12             # at place 22, with a window of 8
    usual = small("rmt", window=window, short_window=0)         # a quarter of max_seq_len, as without segments
    assert usual.body.stack.blocks[0].mixer.window == (20 if window == "SSSL" else None)


@each(bptt=[0, 1, 2, 3])
def test_rmt_gradient_crosses_bptt_boundaries(bptt):
    """The loss of segment n reaches the tokens of segment m exactly when 0 <= n - m <= bptt, for every n. Where nothing is
    cut, the gradient is the full one."""
    cut, full = small("rmt", rmt_bptt=bptt).body, small("rmt", rmt_bptt=9).body
    x = noise(1, T, 16).requires_grad_()
    y, y_full = cut(x)[0], full(x)[0]
    assert error(y, y_full) < 1e-14
    for n in range(4):
        segment = slice(20 * n, 20 * n + 20)
        g, g_full = (torch.autograd.grad(z[:, segment].square().sum(), x, retain_graph=True)[0] for z in (y, y_full))
        size = g.view(4, 20, 16).abs().amax((1, 2))
        for m in range(4):
            assert (size[m] > 0) == (0 <= n - m <= bptt), (n, m, size)
        assert n > bptt or error(g, g_full) < 1e-12


@torch.no_grad()
def test_mosaic_is_its_equation():
    block = small("mosaic", n_layer=1, n_embd=24).body.blocks[0]
    for half in (block.mixer, block.feedforward):
        half.scale.copy_(torch.tensor([-0.03, 0.04]))
        half.key.scale.copy_(torch.tensor([0.15, 0.4]))         # ×10: the second head's squared scale meets the cap, e^5
        x = noise(2, 30, 24)
        assert error(half(x)[0], half.slow(x)) < 1e-10
    assert error(block.feedforward.key.size(), torch.exp(torch.tensor([3.0, 5.0]))) < 1e-6
    assert error(block.mixer.key.decay(), torch.exp(-torch.tensor([0.5, 5.0]))) < 1e-6


@each(member=["plain", *DELTA_FAMILY])
def test_deltanet_layer(member):
    """The layer's own steps around the rule: convolution, normalisation, gates, n writes a token, output norm. Values, and
    the gradients of all parameters."""
    layer, x = small_layer("deltanet", **DELTA_FAMILY.get(member, {})), noise(1, 10, 16)
    n, top, erase, Dv = layer.steps, layer.beta_max, layer.erase, layer.Dv
    u = torch.cat([layer.q(x), layer.k(x), layer.v(x)], -1)
    u = F.silu(F.conv1d(F.pad(u, (0, 0, 3, 0)).mT, layer.conv, groups=u.size(-1)).mT)
    q, k, v = u.split([16, 16 * n, 2 * n * Dv], -1)
    q, k, v = q.view(10, 2, 8), k.view(10, 2, n, 8), v.view(10, 2, n, Dv)
    alpha = torch.exp(-layer.A_log.exp() * F.softplus(layer.alpha(x) + layer.dt_bias))[0]
    beta = top * torch.sigmoid(layer.beta(x)).view(10, 2, n)
    outputs = []
    S = torch.zeros(2, 8, Dv, dtype=torch.float64)
    for t in range(10):
        S = alpha[t, :, None, None] * S
        for j in range(n):
            key = F.normalize(k[t, :, j], dim=-1)[..., None]                        # (H,D,1)
            stored = key.mT @ S if erase else 0
            S = S + beta[t, :, j, None, None] * key @ (v[t, :, j, None] - stored)
        outputs.append(F.normalize(q[t], dim=-1)[:, None] @ S / 8 ** 0.5)           # (H,1,Dv)
    o = torch.stack(outputs).squeeze(2)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * layer.norm_weight
    expected = layer.out(o.flatten(1)[None] * F.silu(layer.output_gate(x)))
    weight = noise(*expected.shape, seed=3)
    for computed, wanted in zip(*(torch.autograd.grad((y * weight).sum(), list(layer.parameters()), materialize_grads=True)
                                  for y in (layer(x)[0], expected))):
        assert error(computed, wanted) < 1e-8
    assert error(layer(x)[0], expected) < 1e-9


@torch.no_grad()
def test_ttt_layer(backbone):
    """The layer's own steps around the recurrence: η = σ(·)/D, s = max(0, 1/i + learned), W_0 and b_0 per head, keys turned by
    the position modulo K; as published, queries and keys are two convolutions of one projection, and the output is gated."""
    layer, x = small_layer("ttt", ttt_backbone=backbone), noise(1, 20, 16)
    layer.scale_offset[2] = -9.0
    layer.b.normal_()
    with mock.patch.object(model, "ttt_linear", wraps=model.ttt_linear) as recurrence:
        y, state = layer(x)
    if backbone == "mamba":
        u = F.pad(layer.qk(x), (0, 0, 3, 0)).mT
        q = F.conv1d(u, layer.conv_q, layer.conv_q_bias, groups=16).mT
        k = F.conv1d(u, layer.conv_k, layer.conv_k_bias, groups=16).mT
        gate = F.gelu(layer.output_gate(x), approximate="tanh")
        assert error(state.tail, layer.qk(x)[:, -3:]) < 1e-12
    else:
        q, k, gate = layer.q(x), layer.k(x), 1
    heads = lambda z: z.view(1, 20, 2, 8)
    turned = lambda z: model.rotary(heads(z).transpose(1, 2), torch.arange(20) % 8, layer.theta).transpose(1, 2)
    s = 1 / torch.arange(1, 9).double()
    s[2] = 0
    W, b, weight, bias = (p.view(2, 8, -1).squeeze(-1) for p in (layer.W, layer.b, layer.ln_weight, layer.ln_bias))
    expected = dict(q=turned(q), k=turned(k), v=heads(layer.v(x)), lr=torch.sigmoid(layer.lr(x)) / 8, token_scale=s, W=W, b=b,
                    ln_weight=weight, ln_bias=bias)
    for value, (name, expected_value) in zip(recurrence.call_args.args, expected.items()):
        assert value.shape == expected_value.shape and error(value, expected_value) < 1e-12, name
    o, _ = ttt_linear(**expected, impl="loop")
    joined = F.layer_norm(o.flatten(2), (16,), layer.post_norm.weight, layer.post_norm.bias, eps=1e-6)
    assert error(y, layer.out(gate * joined)) < 1e-10


@torch.no_grad()
def test_token_shift():
    """x + conv(norm(x)) over four tokens before each mixer: two blocks of one-token windows then see six tokens back, and no
    further. It starts as if it were not there."""
    net, idx = small("none", window="S", short_window=1, token_shift=True), tokens()
    without = small("none", window="S", short_window=1)
    without.load_state_dict(net.state_dict(), strict=False)
    assert torch.equal(net(idx), without(idx))
    for block in net.body.blocks:
        block.shift.mixture.copy_(noise(16, 1, 4))
    x = noise(2, 9, 16)
    shift = net.body.blocks[0].shift
    mixed = F.conv1d(F.pad(shift.norm(x), (0, 0, 3, 0)).mT, shift.mixture, groups=16).mT
    assert error(shift(x)[0], x + mixed) < 1e-12
    moved = (net(changed(idx, 40)) - net(idx)).abs().amax((0, 2))
    assert moved.nonzero().flatten().tolist() == list(range(40, 47))


@torch.no_grad()
def test_value_embeddings_and_softcap():
    """v + 2σ(W x[:32]) ve on alternating layers, the last included; logits = c tanh(raw / c)."""
    net, idx = small("none", "d12", n_layer=3, n_embd=64), tokens(rows=1)
    assert [b.mixer.value_gate is not None for b in net.body.blocks] == [True, False, True]
    gate, x, ve, v = net.body.blocks[0].mixer.value_gate, noise(1, 5, 64), noise(1, 5, 64, seed=2), noise(1, 2, 5, 32, seed=3)
    expected = v + (2 * torch.sigmoid(x[..., :32] @ gate.linear.weight.T)).mT[..., None] * ve.view(1, 5, 2, 32).transpose(1, 2)
    assert error(gate(v, x, ve), expected) < 1e-12
    capped = net(idx)
    net.lm_head.weight.mul_(100)
    net.config.softcap = 0.0
    raw = net(idx)
    net.config.softcap = 15.0
    assert error(net(idx), 15 * torch.tanh(raw / 15)) < 1e-12 and raw.abs().max() > 15 > net(idx).abs().max()
    assert error(capped, raw / 100) < 1e-3


def starts(layers, heads, width):
    """The end of a parameter's name -> how it starts in the papers' code: a number, a tensor, or a distribution function."""
    gaussian = lambda std: stats.norm(0, std).cdf
    pair, projected = gaussian((width / heads) ** -0.5), gaussian(0.02 * width ** 0.5)
    return {
        ".A_log": lambda x: np.exp(x) / 16,                                             # A ~ U(0,16)
        ".dt_bias": lambda x: np.log(np.log1p(np.exp(x)) / 1e-3) / math.log(100),       # dt log-uniform from 1e-3 to 1e-1
        # a convolution of width 4 starts as PyTorch's, U(-1,1)/√4
        ".conv": stats.uniform(-0.5, 1).cdf, ".conv_q": stats.uniform(-0.5, 1).cdf, ".conv_k": stats.uniform(-0.5, 1).cdf,
        ".conv_q_bias": stats.uniform(-0.5, 1).cdf, ".conv_k_bias": stats.uniform(-0.5, 1).cdf,
        ".W": gaussian(0.02), ".b": 0, ".scale_offset": 0, ".lr.weight": gaussian(0.02), ".lr.bias": 0,                  # ttt
        ".leak": torch.linspace(0.5, 5, heads) / 10, ".key.scale": 1 / 10, ".scale": -0.5 / 10, ".mix": stats.uniform(0, 1).cdf,
        ".P_k": pair, ".P_v": pair, ".slot_k": projected, ".slot_v": projected, ".slot_scale": 0.01, ".mixer.gate": 0,
        ".memory_tokens.weight": gaussian(0.02), "value_embeds.weight": projected,
        ".out.weight": gaussian(0.02 / (2 * layers) ** 0.5),                            # what adds to the residual stream
        "norm.weight": 1, "norm1.weight": 1, "norm2.weight": 1, "norm_weight": 1, "ln_weight": 1,
        ".weight": gaussian(0.02), "bias": 0}                                           # everything else


@each(memory=MEMORIES, heads=[4, 128])
def test_starting_values(memory, heads):
    torch.manual_seed(0)
    net = GPT(Config(memory=memory, n_layer=8, n_head=heads, n_embd=256, vocab_size=200, rmt_tokens=64, persistent_slots=64,
                     mosaic_slots=100, norm="layer", bias=True, pos="learned", value_embeds=True))
    parameters = {}                                             # name -> that parameter in every layer
    for name, p in net.named_parameters():
        parameters.setdefault(re.sub(r"\.\d+\.", ".", name), []).append(p.detach())
    for name, values in parameters.items():
        start = next(start for suffix, start in starts(8, heads, 256).items() if name.endswith(suffix))
        if callable(start):
            sample = torch.stack(values).flatten()[:100_000].double()
            assert stats.kstest(sample, start).pvalue > 1e-3, f"{name} does not start as expected"
        else:
            assert torch.allclose(torch.stack(values), torch.as_tensor(start, dtype=torch.float32)), name


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def test_preset_sizes():
    with torch.device("meta"):
        assert abs(parameters(GPT(Config(**PRESETS["d12"]))) / 286e6 - 1) < 0.01
        gpt2 = GPT(Config(**PRESETS["gpt2"]))
        assert abs(parameters(gpt2) / 124e6 - 1) < 0.01
        mosaic = GPT(Config(memory="mosaic", **PRESETS["gpt2"]))
        assert mosaic.body.blocks[0].feedforward.P_k.size(0) == 2688
        for a, b in zip(mosaic.body.blocks, gpt2.body.blocks):
            assert abs(parameters(a) / parameters(b) - 1) < 0.01


@each(memory=MEMORIES)
def test_every_parameter_learns_and_has_an_optimizer(memory):
    net = small(memory, "d12", max_seq_len=T)
    net(tokens(), tokens(1)).backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    hidden = {id(p) for p in net.hidden_matrices()}
    for name, p in net.named_parameters():
        assert (id(p) in hidden) == (".blocks." in name and p.ndim == 2), name


def test_targets_of_minus_one_are_ignored():
    net, idx, targets = small("none"), tokens(), tokens(1)
    masked = targets.clone()
    masked[:, ::2] = -1
    nats = F.cross_entropy(net(idx).flatten(0, 1), targets.flatten(), reduction="none").view(2, T)
    assert error(net(idx, masked), nats[:, 1::2].mean()) < 1e-12


@each(memory=MEMORIES)
def test_compiles_without_graph_breaks(memory):
    """torch.compile sees training as one graph (traced here; code generation is the compiler's own business)."""
    net, idx = small(memory, "d12").float().train(), tokens()
    traced = torch.compile(net, backend="eager", fullgraph=True)
    assert error(traced(idx, idx), net(idx, idx)) < 1e-6


@torch.no_grad()
def test_flops_count_the_matrix_products():
    """Exactly, but for attention (not counted on the CPU); the recurrences' formulas within their small change."""
    from torch.utils.flop_counter import FlopCounterMode
    for memory, low, high in (("none", 1, 1), ("rmt", 0.95, 1.2), ("ttt", 0.8, 1.25), ("deltanet", 0.8, 1.25)):
        net, idx = small(memory, n_embd=64, max_seq_len=256, rmt_segment=64), tokens(rows=1, length=256)
        with FlopCounterMode(display=False) as counter:
            net(idx)
        attention = sum(b.mixer.flops(256) for b in net.body.blocks) if memory == "none" else 0
        ratio = (net.flops_per_token(256) / 3 - attention) / (counter.get_total_flops() / 256)
        assert low <= ratio <= high, (memory, ratio)
    for member in DELTA_FAMILY.values():
        layer, x = small_layer("deltanet", n_embd=64, **member), noise(1, 256, 64)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        linear = sum(2 * part.weight.numel() for part in layer.modules() if isinstance(part, torch.nn.Linear))
        solving = 2 * layer.steps * 64 * (layer.D + layer.Dv) * 2 if layer.erase else 0     # these are not counted: the solver
        convolving = 8 * len(layer.conv)                                                    # and what isn't a product
        assert layer.flops(256) - solving - convolving == counter.get_total_flops() / 256 - linear, member
    for window in (None, 8, 100):
        visible = [min(i + 1, window or 64) for i in range(64)]
        assert model.attention_flops(64, window, 10) == 4 * 10 * sum(visible) / 64


@each(case=[
    (dict(n_embd=10, n_head=4), "n_embd=10"), (dict(window="SXL"), "window='SXL'"), (dict(n_head=4, n_kv_head=3), "n_kv_head=3"),
    (dict(memory="lstm"), "lstm"), (dict(memory="ttt", memory_layers="9"), "out of range"), (dict(memory="ttt", memory_layers="a"), "memory_layers"),
    (dict(memory_layers="1"), "no effect"), (dict(memory="rmt", memory_layers="middle"), "no effect"), (dict(pos="sinus"), "sinus"),
    (dict(dropout=1.5), "dropout"), (dict(n_layer=0), "n_layer=0"), (dict(memory="knn", knn_capacity=10), "knn_capacity=10"),
    (dict(memory="rmt", max_seq_len=100, rmt_segment=30), "rmt_segment=30"), (dict(memory="rmt", max_seq_len=3), "rmt_segment=0"),
    (dict(n_embd=12, n_head=4), "rope needs an even head size"),
    (dict(memory="ttt", n_embd=12, n_head=4, pos="none"), "ttt rotates its keys and needs an even head size")])
def test_impossible_architectures(case):
    options, part = case
    raises(ValueError, lambda: Config(**options), part)


def test_memory_layers():
    for text, expected in (("all", {0, 1, 2, 3}), ("middle", {2}), ("3", {3}), ("1+3", {1, 3}), ("0+0", {0})):
        config = Config(memory="mosaic", memory_layers=text)
        assert model.layers_with_memory(config) == expected
        blocks = GPT(config).body.blocks
        assert {i for i, b in enumerate(blocks) if isinstance(b.mixer, model.ContextualMemory)} == expected
        assert {i for i, b in enumerate(blocks) if isinstance(b.feedforward, model.PersistentMemory)} == expected


def test_settings_of_other_memories_are_named():
    others = dict(knn_capacity=600, expand_v=2, delta_steps=2, mosaic_slots=5)
    assert model.unused_options(Config()) == [] == model.unused_options(Config(memory="knn", knn_capacity=600, memory_layers="1"))
    assert model.unused_options(Config(n_layer=3, **others)) == ["expand_v", "delta_steps", "knn_capacity", "mosaic_slots"]
    assert model.unused_options(Config(memory="deltanet", **others)) == ["knn_capacity", "mosaic_slots"]


def test_learned_positions_end():
    net = small("none", pos="learned")
    _, state = net.stream(tokens())
    raises(ValueError, lambda: net.stream(tokens()[:, :1], state), "81 tokens", "80 learned positions")
    raises(ValueError, lambda: net.generate(tokens()[:, :0], 3), "no tokens")


# ----------------------------------------------------------------------------------------------------------------------
# memories.py: the Triton kernels without a GPU: values from the interpreter (float32), and what the compiler says

HAVE_TRITON = importlib.util.find_spec("triton") is not None
SHARED_LIMIT = {80: 166912, 90: 232448}     # bytes of shared memory that a program may have
PARITY = 1e-4
BOTH = [(gated_delta_rule, delta_example), (ttt_linear, ttt_example)]


def kernels_without_one_output():
    """A loss on the state alone or on the output alone: the gradient of the other one arrives as None."""
    def state_only(fn, **args):
        o, state = fn(**args)
        return o.detach(), state

    def output_only(fn, **args):
        o, state = fn(**args)
        return o, state.detach() if torch.is_tensor(state) else memories.TTTState(*[x.detach() for x in state])

    for (fn, make), only in itertools.product(BOTH, (state_only, output_only)):
        close(only.__name__, functools.partial(only, fn), make(), "triton", PARITY)


def kernels_without_state_gradient_or_tokens():
    args = delta_example()
    del args["state"]
    close("no state", gated_delta_rule, args, "triton", PARITY)
    with torch.no_grad():
        for fn, make in BOTH:
            assert error(fn(**make(), impl="triton")[0], fn(**make(), impl="loop")[0]) <= PARITY
    check_no_tokens("triton")


def kernels_in_float16():
    close("half", gated_delta_rule, delta_example(dtype=torch.float16), "triton", 1e-2)


def kernels_compile_without_breaks():
    def compiled_if_triton(fn, impl, **args):
        if impl == "triton":
            fn = torch.compile(fn, fullgraph=True, backend="aot_eager")
        return fn(**args, impl=impl)
    for fn, make in BOTH:
        close("compiled", functools.partial(compiled_if_triton, fn), make(), "triton", PARITY)


def kernels_where_the_delta_rule_reflects():
    check_reflections(identical, "triton", 256)


def kernels_refuse():
    for fn, args in ((gated_delta_rule, delta_example(D=24)), (gated_delta_rule, delta_example(dtype=torch.float64)),
                     (ttt_linear, ttt_example(D=16)), (gated_delta_rule, delta_example() | dict(erase=False))):
        raises(ValueError, lambda: fn(**args, impl="triton"), "expected", "use impl='chunk'")


def run_kernel_cases(part):
    """In the interpreter's process: the cases of a part; the last line is JSON, what failed and how, and the CPU time."""
    checks = {case: functools.partial(check_case, case, "triton", torch.float32, PARITY) for case in CASES}
    checks |= {name: check for name, check in globals().items() if name.startswith("kernels_")}
    failed = {}
    for name, check in checks.items():
        if name.startswith(part):
            try:
                check()
            except Exception:  # reported by the test that started this process
                failed[name] = traceback.format_exc()
    print("\n" + json.dumps([failed, time.process_time()]))


@each(part=["delta", "ttt", "kernels"])
def test_kernels_in_the_interpreter(part):
    if not HAVE_TRITON:
        raise unittest.SkipTest("triton is not installed")
    run = subprocess.run([sys.executable, "-c", f"import test_all; test_all.run_kernel_cases({part!r})"], cwd=ROOT,
                         capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stderr
    failed, seconds = json.loads(run.stdout.splitlines()[-1])
    assert not failed, "\n".join(f"{name}: {report}" for name, report in failed.items())
    assert seconds < 60, f"{seconds:.0f} s of CPU time"


def test_kernels_need_triton_and_a_gpu():
    """impl='triton' where it cannot run is one sentence; without triton everything else works."""
    raises(ValueError, lambda: gated_delta_rule(**delta_example(), impl="triton"), "use impl='chunk'")
    code = ("import sys; sys.modules['triton'] = None; import memories as m\n"
            "for name in ('gated_delta_rule', 'ttt_linear'):\n"
            "    f, a = getattr(m, name), m.example(name, 1, 20, 2, 32)\n"
            "    f(**a)\n"
            "    try: f(**a, impl='triton'); sys.exit(3)\n"
            "    except ValueError as e: assert 'not installed' in str(e)\n")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr


def compiled(fn, args, options, arch):
    """Compile a kernel for sm_80 or sm_90 without a GPU: its registers, stack (spills) and shared memory a program."""
    import triton
    triton.runtime.driver.set_active(SimpleNamespace(       # stands where the driver of a GPU would
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch, get_current_stream=lambda device: 0, map_python_to_cpp_type=lambda ty: ty))
    binary = fn.warmup(*(x.dtype if torch.is_tensor(x) else x for x in args), grid=(1,), **options)
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    in_registers = [x for x in binary.asm["ttgir"].splitlines() if "warp_group_dot " in x and " : tensor" in x]
    return dict(registers=int(re.search(r"REG:(\d+)", text)[1]), stack=int(re.search(r"STACK:(\d+)", text)[1]),
                shared=binary.metadata.shared, wgmma_from_registers=len(in_registers))


@each(arch=[80, 90], name=["gated_delta_rule", "ttt_linear"])
def test_kernels_build(arch, name):
    """Every kernel builds in bf16 within the chip's shared memory, the forward ones without a stack: at D = 64 and 128.
    EVERY_KERNEL=1 in the environment does this at every size there is (minutes the first time; Triton keeps its
    binaries), and prints what the compiler says of each kernel."""
    if not HAVE_TRITON:
        raise unittest.SkipTest("triton is not installed")
    every = bool(os.environ.get("EVERY_KERNEL"))
    cells = runs(D=[64, 128])
    if every and name == "gated_delta_rule":
        cells = [dict(D=D, Dv=Dv) for D, Dv in [(16, 32), *HEAD_SIZES]]
    elif every:
        cells = runs(D=[32, 64, 128], K=[16, 32, 64])
    for sizes in cells:
        parts = memories.launches(name, 2, 256, 2, **sizes)
        for fn, grid, args, options in parts["forward"] + parts["backward"]:
            x = compiled(fn, args, options, arch)
            where = f"{fn.__name__} for sm_{arch}, {sizes}: {x}"
            if every:
                print(where, flush=True)
            assert x["shared"] <= SHARED_LIMIT[arch], f"too much shared memory: {where}"
            assert not x["wgmma_from_registers"], f"wgmma with its left factor in registers: {where}"
            allowed = 32 if sizes.get("K", 16) > 16 else 0      # 8 bytes at D = 128, K = 32
            if fn.__name__ in ("_delta_prep", "_delta_forward", "_ttt_forward", "_ttt_output"):
                assert x["stack"] <= allowed, f"stack use in a forward kernel: {where}"


# ----------------------------------------------------------------------------------------------------------------------
# data.py: text to tokens to batches

patched = functools.partial(mock.patch.multiple, data)  # data.py with other values of some of its names


@contextlib.contextmanager
def folder(**text):
    """-> the path of a temporary folder, which has these files under text/"""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as path:
        yield put(Path(path), **{"text__" + name: content for name, content in text.items()})


def fails(function, *words):
    raises(data.UserError, function, *map(str, words))


def put(root, **files):
    """Writes files; the name a__b_txt is the path a/b.txt."""
    for name, content in files.items():
        path = Path(root, name.replace("__", "/").replace("_", "."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def story(seed, n):
    """About n characters of words, the same for the same seed."""
    words = ["the", "a", "memory", "of", "model", "state", "reads", "writes", "häuser", "x_1", "42", "\n"]
    return " ".join(words[i] for i in np.random.default_rng(seed).integers(0, len(words), n // 4 + 1))[:n]


def load_text(path, tokenizer="byte"):
    return data.load(str(path / "text"), tokenizer, path / "cache", quiet=True)


@contextlib.contextmanager
def small_corpus(tokenizer="byte"):
    """-> (path, the corpus of 60 stories in path/text, its cache being path/cache)"""
    with folder(**{f"f{i}_txt": story(i, 20 + 37 * i) for i in range(60)}) as path:
        yield path, load_text(path, tokenizer)


def decoded(corpus, *splits):
    """The text of some splits or of all, <|endoftext|> before each document"""
    parts = [part for split in splits or ("train", "val") for part in corpus.parts[split]]
    return corpus.encoding.decode(np.concatenate(parts).tolist())


def count_documents(corpus):
    return [corpus.documents[split].shape[1] for split in ("train", "val")]


@contextlib.contextmanager
def server(files, drop=(), etag=None, ranges=True, redirect=False):
    """Serves files; the first len(drop) answers stop after drop[i] bytes.  Yields (base url, log of Range headers)."""
    log, drops, told = [], list(drop), {"X-Linked-ETag": f'"{etag}"'} if etag else {}

    class Handler(http.server.BaseHTTPRequestHandler):
        log_message = lambda *_: None

        def answer(self, status, headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()

        def do_GET(self):
            name, wanted = self.path.split("/")[-1], self.headers.get("Range")
            if redirect and not self.path.startswith("/real"):
                return self.answer(302, {"Location": "/real/" + name, **told})
            log.append(wanted)
            begin = int(re.search(r"\d+", wanted)[0]) if ranges and wanted else 0
            if name not in files or begin >= len(files[name]):
                return self.send_error(416 if name in files else 404)
            body = files[name][begin:]
            self.answer(206 if begin else 200, {"Content-Length": len(body), **({} if redirect else told)})
            self.wfile.write(body[:drops.pop(0)] if drops else body)    # and the connection ends, as in HTTP/1.0

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd, patched(RETRY_SECONDS=0.001):
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}/", log
        finally:
            httpd.shutdown()


# ----------------------------------------------------------------------------------------------------- download
BODY = np.random.default_rng(0).bytes(300_000)
BODY_SHA256 = hashlib.sha256(BODY).hexdigest()


def fetched(url, path, sha256=None):
    return data.download(url + "a.bin", path / "a.bin", sha256, quiet=True).read_bytes()


def test_download_completes_and_resumes():
    cases = [(None, dict(drop=(100_000, 50_000)), [None, "bytes=100000-", "bytes=150000-"]),  # the connection drops
             (BODY[:1234], dict(etag=BODY_SHA256), ["bytes=1234-"]),            # the part of an earlier run
             (b"x" * 1000, dict(ranges=False), ["bytes=1000-"]),                # the server sends all of it
             (b"x" * 1000, dict(etag=BODY_SHA256), ["bytes=1000-", None]),      # the part is of another file
             (b"x" * 400_000, dict(), ["bytes=400000-", None])]                 # 416: it is longer than the file
    for part, options, ranges in cases:
        with folder() as path, server({"a.bin": BODY}, **options) as (url, log):
            put(path, **{"sub__a_bin_part": part} if part else {})
            assert fetched(url, path / "sub") == BODY and log == ranges, log
            assert os.listdir(path / "sub") == ["a.bin"]


def test_download_that_cannot_succeed_says_so():
    wrong = "0" * 64                                                    # and of a wrong file nothing is left
    for options, sha256 in ((dict(etag=wrong), None), (dict(etag=wrong, redirect=True), None), (dict(), wrong)):
        with folder() as path, server({"a.bin": BODY}, **options) as (url, _):
            fails(lambda: fetched(url, path, sha256), "a.bin", wrong, BODY_SHA256)
            assert os.listdir(path) == []
    with folder() as path, patched(RETRY_SECONDS=0.001):
        with server({}) as (url, log):
            fails(lambda: fetched(url, path), "404")
            assert len(log) == 1                                        # that is not tried again
        fails(lambda: fetched(url, path), "a.bin", "refused")           # the server is gone
        with server({"a.bin": BODY}, drop=[10] * 50) as (url, log):
            fails(lambda: fetched(url, path), "a.bin", "run again", path)
            assert os.listdir(path) == ["a.bin.part"] and len(log) == data.RETRIES


# ----------------------------------------------------------------------------------------------------- fineweb-edu
def gpt2_sized():
    """An Encoding of GPT-2's size and name, which needs no download: the bytes, and pairs of bytes."""
    tokens = [bytes([i]) for i in range(256)] + [bytes([i % 256, i // 256]) for i in range(50_000)]
    return data.tiktoken.Encoding("gpt2", pat_str=data.WORDS, mergeable_ranks={t: i for i, t in enumerate(tokens)},
                                  special_tokens={"<|endoftext|>": 50256}, explicit_n_vocab=50257)


def shard(tokens, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens) if count is None else count
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


@contextlib.contextmanager
def fineweb(*shards):
    """fineweb-edu from a server: the validation shard and then the training shards. Yields a folder."""
    names = ["val_000000", *(f"train_{i:06d}" for i in range(1, len(shards)))]
    files = {f"edu_fineweb_{name}.bin": body for name, body in zip(names, shards)}
    with folder() as path, server(files) as (url, _), patched(HUB=url, gpt2_encoding=functools.cache(gpt2_sized)):
        yield path


def test_fineweb_shards():
    gpt2 = gpt2_sized()
    stream = [token for i in range(150) for token in [50256, *gpt2.encode_ordinary(story(i, 30 + 11 * i))]]
    third = len(stream) // 3                                            # shards cut documents in two
    val, train = stream[:third], stream[third:]
    with fineweb(shard(val), shard(train[:third]), shard(train[third:])) as path:
        corpus = data.load("fineweb-edu:2", "gpt2", path, quiet=True)   # read where they lie
        assert corpus.sha256 == hashlib.sha256(np.array(train + val, "<u2").tobytes()).hexdigest()
        assert corpus.vocab_size == 50257 and corpus.eos == 50256
        for split, tokens in dict(train=train, val=val).items():
            assert np.concatenate(corpus.parts[split]).tolist() == tokens
            check_rows(corpus, split, 64, tokens)
        assert not list(path.rglob("train.bin"))                        # no second copy
        corpus = data.load("fineweb-edu:2", "byte", path, quiet=True)   # with another tokenizer it is the same text
        text = gpt2.decode_bytes([t for t in train if t != 50256]).decode()
        assert decoded(corpus, "train").replace("<|endoftext|>", "") == text
    # a document that ends with its shard, and one that begins the next
    with fineweb(shard(val), shard([50256, 1, 2, 3, 50256, 4]), shard([5, 6, 50256, 7, 8])) as path:
        corpus = data.load("fineweb-edu:2", "gpt2", path, quiet=True)
        check_rows(corpus, "train", 2)
        assert corpus.read("train", 6, 2).tolist() == [5, 6] and corpus.read("train", 5, 1).tolist() == [4]


def test_a_bad_shard_is_named():
    for bad, words in ((shard(range(3000), count=5000), ("5000", "3000")), (shard(range(10))[:1000], ("20240520", "1000 bytes")),
                       (b"\1" + shard(range(10))[1:], ("20240520",))):
        with fineweb(shard(range(5000)), bad) as path:
            fails(lambda: data.load("fineweb-edu:1", "gpt2", path, quiet=True), "edu_fineweb_train_000001.bin", *words)


# ----------------------------------------------------------------------------------------------------- other corpora
def test_tinystories_shakespeare_and_simplewiki_from_a_server():
    stories = [story(i, 200) for i in range(30)]
    files = {"TinyStoriesV2-GPT4-train.txt": "\n<|endoftext|>\n".join(stories).encode(),
             "TinyStoriesV2-GPT4-valid.txt": "\n<|endoftext|>\n".join(stories[:5]).encode() + b"\n<|endoftext|>\n",
             "train-00000-of-00001.parquet": b"PAR1"}
    with folder() as path, server(files) as (url, _), patched(HUB=url):
        assert count_documents(data.load("tinystories", "byte", path, quiet=True)) == [30, 5]
        with mock.patch.dict(sys.modules, pyarrow=None):                # makes the import fail
            fails(lambda: data.load("simplewiki", "byte", path, quiet=True), "pip install pyarrow")
    play = "".join(f"SPEAKER {i}:\nSay {i * i}.\n\n" for i in range(400))
    with folder() as path, server({"input.txt": play.encode()}) as (url, _), patched(SHAKESPEARE=url + "input.txt"):
        fails(lambda: data.load("shakespeare", "byte", path, quiet=True), data.SHAKESPEARE_SHA256)
        with patched(SHAKESPEARE_SHA256=hashlib.sha256(play.encode()).hexdigest()):
            corpus = data.load("shakespeare", "byte", path, quiet=True)
    train, val = (decoded(corpus, split).removeprefix("<|endoftext|>") for split in ("train", "val"))
    assert train + val == play and train.endswith("\n")                 # the lone document is cut, at a line's end
    assert 0.04 < len(val) / len(play) < 0.06


def test_python_corpus_takes_py_files_only_and_splits_by_file():
    with folder() as path:
        put(path / "lib", a_py="import os\n" * 50, a_pyc=b"\0\1", sub__b_py="x = 1\n" * 90, sub__empty_py="",
            pydoc_data="no file of source code")
        os.rename(path / "lib/pydoc.data", path / "lib/_sysconfigdata_x.py")
        for left_out in ("__pycache__", "site-packages", ".hidden", "pydoc_data"):
            put(path / "lib" / left_out, topics_py="left out")
        put(path / "pkg", z_py="y = 2\n" * 30)
        with patched(python_roots=lambda: [("stdlib/", path / "lib"), ("pkg/", path / "pkg")]):
            files = data.find_text("python", path).files
            assert [file.key for file in files] == ["pkg/z.py", "stdlib/a.py", "stdlib/sub/b.py"]
            assert count_documents(data.load("python", "byte", path / "cache", quiet=True)) == [2, 1]
    roots = dict(data.python_roots())
    assert (roots["stdlib/"] / "os.py").exists() and (roots["numpy/"] / "__init__.py").exists()


def test_of_even_a_few_documents_each_split_has_one():
    with folder(**{f"f{i}_txt": story(i, 90) for i in range(3)}) as path:
        for val_fraction in (0.0, 1.0):  # the draws send all to training, or all to validation
            files = data.path_text(path / "text").files
            is_val = data.Text("few", files, val_fraction).survey.is_val
            assert is_val.sum() == (1 if val_fraction == 0 else 2), (val_fraction, is_val)


def test_python_docs_are_the_topics_and_no_part_of_python():
    from pydoc_data.topics import topics
    with folder() as path:
        corpus = data.load("python-docs", "byte", path / "a", quiet=True)
        assert corpus.sha256 == data.load("python-docs", "byte", path / "b", quiet=True).sha256
    texts = decoded(corpus).split("<|endoftext|>")[1:]
    assert sorted(texts) == sorted(topics.values()) and len(texts) == len(topics) > 60
    sizes = [int(corpus.token_bytes[np.concatenate(corpus.parts[s]).astype(int)].sum()) for s in ("train", "val")]
    assert sum(sizes) == sum(len(text.encode()) for text in topics.values()) > 300_000
    assert min(sizes) > 131_072 and corpus.n_rows(512, "val") > 256   # what an evaluation reads by default
    check_rows(corpus, "val", 512)
    # the split depends on a topic's name, not on which other topics there are
    some = [data.Text("python-docs", data.python_docs_text().files[at:], 0.5, data.read_topic) for at in (0, 7)]
    every, rest = ({d.key: bool(v) for d, v in zip(text.documents(), text.survey.is_val)} for text in some)
    assert len(rest) == len(every) - 7 and rest.items() <= every.items()
    keys = [file.key for file in data.find_text("python", Path("none")).files]
    assert "stdlib/pydoc.py" in keys and not any("topics" in key and "pydoc" in key for key in keys)


def test_jsonl_and_named_splits_and_babistories():
    docs = [story(i, 300) for i in range(40)]
    with folder(a_jsonl="\n".join(json.dumps({"text": d}) for d in docs[:20]) + "\n",
                b_jsonl="\n".join(json.dumps({"story": d}) for d in docs[20:]) + "\n\n") as path:
        assert sorted(decoded(load_text(path)).split("<|endoftext|>")[1:]) == sorted(docs)
        put(path, c_jsonl='{"text": "fine"}\n{"txt": 1}\n')
        fails(lambda: data.load(str(path / "c.jsonl"), "byte", path / "cache"), "line 2", "c.jsonl", "txt")
    for names in (("traindataset_txt", "valdataset_txt"), ("train1_jsonl", "stories-validation_jsonl")):
        lines = ["\n".join(map(json.dumps, part)) for part in (docs[:30], docs[30:])]
        with folder(**dict(zip(names, lines))) as path:
            assert count_documents(load_text(path)) == [30, 10]


# ----------------------------------------------------------------------------------------------------- bad input
def test_bad_datasets_and_tokenizers_are_one_line():
    with folder() as path:
        put(path, zero_txt=b"", blank_txt="\n \n", short_txt=story(0, 900)), os.makedirs(path / "nothing")
        short = path / "short.txt"
        for dataset, tokenizer, *words in (
                ("pyhton", "byte", "pyhton", "did you mean python?"), ("fineweb-edu:many", "gpt2", "fineweb-edu:N"),
                (path / "zero.txt", "byte", "zero.txt", "empty"), (path / "blank.txt", "byte", "blank.txt", "no text"),
                (path / "nothing", "byte", "nothing", "no text"), (path / "nope.txt", "byte", "nope.txt"),
                (short, "word2vec", "word2vec"), (short, "bpe:12", "bpe:12"), (short, "bpe:x", "bpe:x"),
                (short, "bpe:4096@nowhere", "nowhere"), (short, "bpe:4096", "too small", "4096")):
            refused(data.main, [f"--dataset={dataset}", f"--tokenizer={tokenizer}", f"--cache={path}/cache"], *words)
        refused(data.main, [f"--dataset={short}", f"--cache={short}/cache"], "short.txt")
        refused(data.main, ["--datset=python"], "--datset=python", "did you mean --dataset?")
        refused(data.main, ["--dataset"], "--dataset", "expected")
        refused(data.main, ["python"], "python", "--help")
        corpus = data.load(str(short), "byte", path / "cache")
        fails(lambda: corpus.batch(0, 2, 2000, seed=1), "train", 2001)
        fails(lambda: next(corpus.eval_batches(512, 2)), "val", 513)
        fails(lambda: corpus.batch(0, 3, 16, seed=1, rank=0, world=2), "2 ranks")


def test_the_command_line_counts_bytes_that_are_not_utf8():
    assert call(data.main, "--help")[0] == 0
    assert data.decode("naïve".encode()) == ("naïve", 0)
    assert data.decode(b"ab\xff\xfe\xe4\xb8cd") == ("ab" + "\ufffd" * 4 + "cd", 4)
    latin = b"caf\xe9 au lait, na\xefve\n"
    with folder(a_txt=latin * 30, b_txt="café\n" * 30, c_txt="x" * 99) as path:
        for _ in range(2):                                              # from the text, and from the cache
            status, out, _ = call(data.main, f"--dataset={path}/text", f"--cache={path}/cache")
            assert status == 0 and "60 bytes in 1 documents" in out, out
            assert "sha256" in out and "bytes a token" in out and "<|endoftext|>" in out, out
        both = decoded(load_text(path))
        assert both.count("\ufffd") == 60 and both.count("é") == 30


# ----------------------------------------------------------------------------------------------------- tokenizers
def naive_bpe(words, n_tokens):
    """The definition: count all pairs of all words anew for each merge."""
    tokens = [bytes([i]) for i in range(256)]
    spelling = [(list(word.encode()), n) for word, n in words.items()]
    while len(tokens) < n_tokens:
        count = Counter()
        for ids, n in spelling:
            for pair in zip(ids, ids[1:]):
                count[pair] += n
        best = max(count, key=lambda pair: (count[pair], -pair[0], -pair[1]))
        for ids, _ in spelling:
            at = 0
            while at < len(ids) - 1:
                if (ids[at], ids[at + 1]) == best:
                    ids[at:at + 2] = [len(tokens)]
                at += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def test_bpe_is_the_naive_bpe():
    for text in (story(1, 6000), "aaaa aaa aaaaaaa baaaa aabaab ab" * 9 + story(2, 1500),
                 "日本語のテキスト、本日は日本 " * 5 + story(3, 2000)):
        words = Counter(re.findall(data.WORDS, text))
        assert "".join(re.findall(data.WORDS, text)) == text
        expected = naive_bpe(words, 256 + 25)
        assert data.train_bpe(words, 256 + 25) == expected and len(set(expected)) == 256 + 25
        shuffled = dict(sorted(words.items(), key=lambda item: hashlib.md5(item[0].encode()).digest()))
        assert data.train_bpe(shuffled, 256 + 25) == expected           # the order of the words does not matter


def test_tokenizers_round_trip_and_bytes_add_up():
    samples = ["", "hello world", "naïve 日本語 \U0001f600\r\n\tx", "<|endoftext|> is text", "a\u200bb  \n\n  c_d __e 1234567 ½",
               story(5, 3000), "\ufffd\0\x1c", "a\t\t\tb \t \x0b\u3000\t"]
    sizes = {"byte": 257, "bpe:300": 300, "gpt2": 50257}
    try:
        data.get_encoding("gpt2")
    except data.UserError:                                              # offline
        del sizes["gpt2"]
    for name, size in sizes.items():
        with small_corpus(name) as (_, corpus):
            enc = corpus.encoding
        assert corpus.vocab_size == enc.n_vocab == len(corpus.token_bytes) == size
        assert corpus.eos == size - 1 and corpus.token_bytes[-1] == 0 and corpus.token_bytes.dtype == torch.int64
        for text in samples:
            tokens = data.encode(enc, text)
            assert tokens.tolist() == enc.encode_ordinary(text), (name, text)
            assert enc.decode(tokens.tolist()) == text and corpus.eos not in tokens
            assert corpus.token_bytes[tokens.astype(int)].sum() == len(text.encode())


def test_a_long_unbroken_run_does_not_hang():
    run = "ab" * 60_000 + "\n" * 60_000
    with folder(a_txt=run + story(0, 20_000), b_txt=story(1, 5000), c_txt=story(2, 900)) as path:
        assert decoded(load_text(path, "bpe:280")).count(run) == 1
    for text, limit in (("ab" * 5000, 2048), ("\n" * 5000, 2048), ("ab " * 5000, 15000)):
        sizes = []                                                      # of what tiktoken gets to see at once
        record = lambda part, disallowed_special: sizes.append(len(part)) or np.zeros(1, np.uint32)
        data.encode(SimpleNamespace(n_vocab=280, encode_to_numpy=record), text)
        assert max(sizes) == limit


def test_bpe_is_trained_on_training_text_and_of_another_corpus():
    with folder(train_txt="alpha beta gamma " * 200, val_txt="zebra " * 300) as path:
        put(path / "other", a_txt="zebra " * 300, b_txt="zebra zoo " * 300)
        mine, others = load_text(path, "bpe:262"), load_text(path, f"bpe:262@{path}/other")
        spelled = [b"".join(c.encoding.decode_single_token_bytes(i) for i in range(256, 261)) for c in (mine, others)]
        assert b"z" not in spelled[0] and b"z" in spelled[1] and mine.sha256 != others.sha256
        assert len(list((path / "cache").glob("*.tiktoken"))) == 2


# ----------------------------------------------------------------------------------------------------- cache
def test_a_damaged_cache_is_made_again():
    for pattern, damage in (("*/train.bin", lambda b: b[:-2]), ("*/val.npy", lambda b: b + b"x"), ("*/meta.json", lambda b: b[:9]),
                            ("*.tiktoken", lambda b: b[:b.index(b"\n", len(b) // 2) + 1])):
        with small_corpus("bpe:280") as (path, first):
            (target,) = (path / "cache").glob(pattern)
            target.write_bytes(damage(target.read_bytes()))
            with contextlib.redirect_stdout(io.StringIO()) as out:
                again = load_text(path, "bpe:280")
            assert again.sha256 == first.sha256 and "made again" in out.getvalue(), pattern
            check_rows(again, "train", 100)


def test_the_cache_is_used_and_follows_the_files_even_after_a_kill():
    with small_corpus() as (path, first):
        parts = lambda: list((path / "cache").glob("*.part"))
        with patched(tokenize=None):                                    # a call would fail
            assert load_text(path).sha256 == first.sha256
        put(path / "text", f3_txt="changed " * 20)
        with patched(add_file=None):                                    # killed: tokens are written, meta.json is not
            raises(TypeError, lambda: load_text(path))
        assert parts()
        second = load_text(path)
        assert not parts()
        check_rows(second, "train", 64)
        put(path / "text", f3_txt="charged " * 20)                      # as long, but later
        assert len({first.sha256, second.sha256, load_text(path).sha256}) == 3 and not parts()


def test_two_processes_prepare_the_same_data_at_once():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import data\n"
            "old = data.tokenize\n"
            "def slow(*a): print('tokenized'); import time; time.sleep(0.5); return old(*a)\n"
            "data.tokenize = slow\n"
            "print(data.load(sys.argv[2], 'bpe:280', sys.argv[3], quiet=True).sha256)")
    with small_corpus() as (path, _):
        command = [sys.executable, "-c", code, ROOT, path / "text", path / "new"]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        lines = [process.communicate()[0].split() for process in both]
        assert [process.returncode for process in both] == [0, 0] and lines[0][-1] == lines[1][-1]
        if data.fcntl:
            assert sum(out.count("tokenized") for out in lines) == 1


# ----------------------------------------------------------------------------------------------------- rows
def check_rows(corpus, split, seq_len, stream=None):
    """The promises of the packing, checked on one split."""
    row, eos, plan, n = seq_len + 1, corpus.eos, corpus.plan(split, seq_len), corpus.n_rows(seq_len, split)
    stream = np.concatenate(corpus.parts[split]) if stream is None else np.array(stream)
    out, position = corpus.rows(split, seq_len, range(n))
    assert out.shape == position.shape == (n, row)
    assert (out[:, 0] == eos).all() and (position[:, 0] == 0).all()
    assert ((out == eos) == (position == 0)).all()                      # no padding, no stray <|endoftext|>
    assert (plan.length.reshape(-1) >= 1).all() and plan.length.sum() == n * row
    used, true_end = np.zeros(len(stream), int), np.append(stream[1:] == eos, True)
    for i in range(n):
        at = 0
        for k in range(plan.first[i], plan.first[i + 1]):
            start, size = int(plan.start[k]), int(plan.length[k])
            end = start + size - 1
            assert out[i, at + 1:at + size].tolist() == stream[start:end].tolist()
            used[start:end] += 1
            at += size                                                  # inside a row a piece ends where its document does
            assert at == row or true_end[end - 1] or end in corpus.bases[split].tolist()
        assert at == row
    assert used[stream == eos].sum() == 0 and used.max() <= 1           # nothing twice ...
    lost = (used[stream != eos] == 0).sum()
    assert lost < row, lost                                             # ... and less than a row is dropped


def test_rows_keep_their_promises():
    for tokenizer in ("byte", "bpe:300"):
        with small_corpus(tokenizer) as (_, corpus):
            for split, seq_len in (("train", 2), ("train", 7), ("train", 64), ("train", 1000), ("val", 30)):
                check_rows(corpus, split, seq_len)


def test_packing_prefers_whole_documents():
    plan = data.pack(np.array([0, 10, 20, 30]), np.array([7, 6, 5, 3]), 10)     # the example in its docstring
    assert plan.first.tolist() == [0, 2, 4]
    assert plan.start.tolist() == [0, 30, 10, 20] and plan.length.tolist() == [7, 3, 6, 4]
    plan = data.pack(np.array([0, 10, 20]), np.array([7, 6, 5]), 10)    # where none fits the largest is cut
    assert plan.first.tolist() == [0, 2, 5] and plan.length.tolist() == [7, 3, 5, 4, 1]
    start, length = np.arange(0, 1200, 100), np.array([60, 39, 20, 19, 98, 50, 48, 99, 30, 30, 37, 5])
    plan = data.plan_rows(start, length, 100)                           # pairs that fill a row exactly are found
    rows = [sorted(plan.length[plan.first[i]:plan.first[i + 1]].tolist()) for i in range(len(plan.first) - 1)]
    assert [100] in rows and [49, 51] in rows and [1, 99] in rows, rows
    rng = np.random.default_rng(0)
    length = rng.integers(1, 2000, 20_000)
    plan = data.plan_rows(np.cumsum(length + 1) - length, length, 1025)
    cut = len(plan.length) - (plan.length == 1).sum() - (-(-length // 1024)).sum()
    assert cut < 0.05 * len(plan.first), cut                            # few rows need one


def test_eval_rows_are_the_same_for_everyone():
    with small_corpus() as (path, corpus):
        other = load_text(path)
        first = [[t.clone() for t in batch] for batch in corpus.eval_batches(32, 4)]
        other.batch(3, 4, 32, seed=9)
        for a, b in zip(first, other.eval_batches(32, 4), strict=True):
            assert all(torch.equal(u, v) for u, v in zip(a, b))
        assert sum(len(x) for x, *_ in first) == corpus.n_rows(32, "val")
        some = list(corpus.eval_batches(32, 4, max_tokens=6 * 32))
        assert [len(x) for x, *_ in some] == [4, 2] and torch.equal(some[0][0], first[0][0])
        assert sum(len(x) for x, *_ in corpus.eval_batches(32, 4, max_tokens=64, split="train")) == 2
        for x, y, doc_pos in corpus.eval_batches(50, 4):                # it counts the tokens before the target
            assert x.dtype == y.dtype == doc_pos.dtype == torch.int64 and x.shape == y.shape == doc_pos.shape == (len(x), 50)
            assert (x[:, 1:] == y[:, :-1]).all()
            before = F.pad(doc_pos, (1, 0))[:, :-1] + 1                 # x starts with <|endoftext|>
            assert torch.equal(doc_pos, before.where(y != corpus.eos, 0))


def test_batches_are_pure_seeded_shared_by_the_ranks_and_every_row_once_an_epoch():
    with small_corpus() as (path, corpus):
        fresh, n = load_text(path), corpus.n_rows(40)
        every = corpus.rows("train", 40, range(n))[0].tolist()
    assert n % 8                                                        # so that batches lie across epochs
    wanted = [corpus.batch(step, 8, 40, seed=3) for step in range(2 * n // 8 + 1)]
    for step in (59, 0, 31, 31, 7):                                     # in any order, from a new process' view
        assert all(torch.equal(a, b) for a, b in zip(fresh.batch(step, 8, 40, seed=3), wanted[step]))
    for x, y in wanted:
        assert x.shape == y.shape == (8, 40) and x.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
        assert (x[:, 0] == corpus.eos).all() and (x[:, 1:] == y[:, :-1]).all()
    assert not torch.equal(fresh.batch(0, 8, 40, seed=4)[0], wanted[0][0])
    for world, step in itertools.product((1, 2, 4), (0, 5, 40)):
        shares = [fresh.batch(step, 8, 40, seed=3, rank=rank, world=world) for rank in range(world)]
        assert all(torch.equal(torch.cat(parts), whole) for parts, whole in zip(zip(*shares), wanted[step]))
    seen = torch.cat([torch.cat([x, y[:, -1:]], 1) for x, y in wanted]).tolist()
    first, second = seen[:n], seen[n:2 * n]
    assert sorted(first) == sorted(second) == sorted(every) and first != second


# ----------------------------------------------------------------------------------------------------------------------
# train.py: the loop, checkpoints, sweeps, bad input

TINY = ["--tokenizer=byte", "--n_layer=2", "--n_embd=32", "--n_head=2", "--max_seq_len=64", "--batch_size=4", "--eval_tokens=1024",
        "--sample_tokens=8", "--warmup=2", "--device=cpu", "--compile=false", "--out_dir=runs"]


@contextlib.contextmanager
def workplace():
    """A folder with a corpus (60 kB of the standard library); -> (folder, tiny flags for main)"""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(Path(argparse.__file__).read_text()[:60_000])
        old = os.getcwd()
        os.chdir(folder)  # data's cache goes to out/data below it
        try:
            yield Path(folder), [f"--dataset={text}", *TINY]
        finally:
            os.chdir(old)


def runs_well(*argv):
    """What `python train.py ...` prints; it has to end well."""
    status, out, err = call(train.main, *argv)
    assert status == 0, err
    return out


def at_call(number, before=lambda: None, factor=1.0):
    """train.accumulate, but before call `number` something happens, and that call's loss is multiplied."""
    original, calls = train.accumulate, itertools.count(1)

    def accumulate(*args):
        now = next(calls) == number
        if now:
            before()
        return original(*args) * (factor if now else 1)
    return mock.patch.object(train, "accumulate", accumulate)


def log(folder) -> list[dict]:
    """log.jsonl without its clock"""
    records = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "step_seconds")} for r in records]


def weights(folder):
    return torch.load(Path(folder, "ckpt.pt"), weights_only=True)["model"]


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_losses(a, b):
    return len(a) == len(b) and all(math.isclose(r["loss"], s["loss"], rel_tol=1e-5) for r, s in zip(a, b))


@contextlib.contextmanager
def limited_files(size):
    """No file may grow beyond size bytes: as on a full disk, a write fails half-way."""
    import resource
    limit, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)


def in_background(*argv):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, *argv], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


def tiny(**kw):
    settings = dict(n_layer=2, n_embd=32, n_head=2, max_seq_len=64, batch_size=4, vocab_size=257, device="cpu")
    return train.RunConfig(**settings | kw)


# ---------------------------------------------------------------- configuration and command line

def test_help_lists_every_flag_with_its_default():
    status, out, _ = call(train.main, "--help")
    text = " ".join(out.split())
    for f in train.fields(train.RunConfig):
        assert f"--{f.name} " in text and f.metadata["help"].split(";")[0] in text, f.name
    assert status == 0 and all(f"{group}:" in text for group in ("architecture", "memory", "data", "optimisation", "run"))
    assert text.count("(default: ") == len(train.fields(train.RunConfig))
    assert "(default: 80000)" in call(train.main, "--preset=gpt2", "--help")[1]


def test_precedence_defaults_preset_flags():
    a, = train.parse_args(["--preset=gpt2"])
    assert (a.optimizer, a.lr, a.min_lr, a.weight_decay, a.dropout, a.warmup, a.steps, a.schedule, a.batch_size, a.max_seq_len,
            a.clip, a.beta2) == ("adamw", 5e-3, 1e-4, .1, .05, 2000, 80_000, "cosine", 512, 512, 1.0, .95)
    b, = train.parse_args(["--lr=0.25", "--preset=gpt2", "--bias", "false"])
    assert b.lr == 0.25 and b.bias is False and b.steps == a.steps
    d, = train.parse_args(["--preset=d12"])
    assert d.batch_size * d.max_seq_len == 524288 and d.steps == 2520 and d.optimizer == "muon" and d.dataset == "fineweb-edu"


def test_sweep_is_the_grid_with_seeds_innermost():
    cs = train.parse_args(["--seed=1,2", "--memory=none,ttt", "--window=L,S"])
    got = [(c.memory, c.window, c.seed) for c in cs]
    assert got == list(itertools.product(["none", "ttt"], ["L", "S"], [1, 2])), got
    assert len({c.name for c in cs}) == 8


def test_run_names():
    def name(*argv):
        return train.parse_args(list(argv))[0].name
    assert name() == "laptop-none-s1"
    assert name("--memory=deltanet", "--window=L") == "laptop-deltanet-window=L-s1"
    assert name("--memory=deltanet", "--window=SSSL", "--device=cpu", "--save_every=7", "--out_dir=x") == "laptop-deltanet-s1"
    assert name("--lr=0.5", "--seed=3").endswith("lr=0.5-s3")
    assert "/" not in name("--dataset=/a/b/c.txt")
    long = [name("--dataset=" + "a" * 300 + c) for c in ("", "b")]
    assert max(map(len, long)) < 140 and long[0] != long[1]
    assert name("--dataset=" + "a" * 300) == long[0]
    assert name("--name=mine") == "mine"


def test_bad_input_is_one_line_and_status_2():
    refusals = [  # flags, words of the refusal; the first run of a sweep is not even begun
        (["--memroy=ttt"], "--memory"), (["--stepz", "4"], "--steps"), (["--xyzzy=1"], "xyzzy"), (["extra"], "extra"),
        (["--steps"], "steps"), (["--steps=many"], "--steps=many", "whole number"), (["--lr=fast"], "--lr=fast", "a number"),
        (["--bias=maybe"], "true or false"), (["--preset=huge"], "huge", "laptop"), (["--optimizer=sgd"], "sgd", "muon"),
        (["--memory=mamba"], "mamba", "deltanet"), (["--pos=nope"], "nope", "rope"), (["--n_head=3"], "n_head=3"),
        (["--window=SXL"], "SXL"), (["--memory=ttt", "--memory_layers=9"], "9"), (["--memory=none,rmt", "--rmt_segment=60"], "60"),
        (["--steps=0"], "steps=0"), (["--lr=nan"], "lr=nan"), (["--lr=-1"], "lr=-1"), (["--lr=inf"], "lr=inf"),
        (["--beta2=1"], "beta2=1"), (["--clip=,1"], "--clip="), (["--vocab_size=100"], "100", "257"),
        (["--device_batch_size=3"], "device_batch_size=3", "4"), (["--dtype=bfloat16"], "bfloat16"),
        (["--data_sha256=abc"], "abc"), (["--seed=1,2", "--name=x"], "such as x", "leave --name out"), (["--seed=1,1"], "each value once"), (["--dataset=/nowhere/at/all"], "/nowhere/at/all"),
        (["--out_dir=file"], "cannot write", "file")]
    refusals += [] if torch.cuda.is_available() else [(["--device=cuda"], "CUDA")]
    with workplace() as (folder, base):
        Path("file").write_text("")
        for flags, *words in refusals:
            refused(train.main, [*base, *flags], *words)
        assert not list(Path("runs").glob("*/*.pt")) and not list(Path("runs").glob("*/result.json"))


def test_a_setting_that_no_run_reads_is_named():
    def notes(*argv):
        return call(lambda words: train.note_unused(train.parse_args(words)), *argv)[1]
    assert notes("--knn_capacity=600") == "note: --knn_capacity changes nothing, because no memory here reads it\n"
    assert notes("--memory=none,knn", "--knn_capacity=600") == "" and notes("--memory=knn", "--knn_capacity=600") == ""


# ---------------------------------------------------------------- optimizer

def test_schedules():
    cfg = tiny(steps=100, warmup=10, lr=1.0, min_lr=0.1, schedule="wsd", warmdown=0.4)
    at = [train.lr_at(s, cfg) for s in range(100)]
    assert abs(at[0] - 0.1) < 1e-12 and abs(at[4] - 0.5) < 1e-12 and at[9:61] == [1.0] * 52
    assert abs(at[80] - (0.1 + 0.9 * 0.5)) < 1e-12 and all(a > b for a, b in zip(at[60:], at[61:]))
    assert abs(train.lr_at(100, cfg) - 0.1) < 1e-12
    cfg = tiny(steps=110, warmup=10, lr=1.0, min_lr=0.1, schedule="cosine")
    assert abs(train.lr_at(10, cfg) - 1) < 1e-12 and abs(train.lr_at(60, cfg) - 0.55) < 1e-12
    assert abs(train.lr_at(110, cfg) - 0.1) < 1e-12 and train.lr_at(0, tiny(warmup=0)) == tiny().lr


def test_muon_is_torchs_muon():
    """Same momentum, scaling and decay: with a float32 Newton-Schulz in torch's too, equal to rounding."""
    torch.manual_seed(0)
    shapes = [(16, 16), (48, 16), (16, 48), (16, 16)]
    ours = [nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [nn.Parameter(p.detach().double()) for p in ours]
    a = train.Muon([dict(params=ours)], lr=0.02, momentum=0.9, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.double()
        before = [p.detach().clone() for p in ours]
        a.step()
        b.step()
        for p, q, was in zip(ours, theirs, before):
            # bfloat16 in theirs: the updates differ by up to about 2%
            assert ((p - q).norm() / (p - was).norm()).item() < 0.03
            q.data.copy_(p)
    s = torch.linalg.svdvals(train.orthogonalise(torch.randn(3, 20, 50)))
    assert 0.6 < s.min() and s.max() < 1.3


def test_every_parameter_has_one_owner_and_muon_has_the_hidden_matrices():
    for memory in MEMORIES:
        net = GPT(tiny(memory=memory).architecture())
        optimizers = train.build_optimizer(net, tiny(memory=memory, beta2=0.97))
        muon, = [o for o in optimizers if isinstance(o, train.Muon)]
        assert {id(p) for g in muon.param_groups for p in g["params"]} == {id(p) for p in net.hidden_matrices()}
        owned = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(owned) == sorted(id(p) for p in net.parameters()), memory
        adam, = [o for o in optimizers if o is not muon]
        for g in adam.param_groups:
            assert g["weight_decay"] == (0 if g["params"][0].ndim < 2 else 0.1) and g["betas"] == (0.9, 0.97)
        alone, = train.build_optimizer(net, tiny(memory=memory, optimizer="adamw"))
        assert isinstance(alone, torch.optim.AdamW)
        assert sum(len(g["params"]) for g in alone.param_groups) == len(owned)


# ---------------------------------------------------------------- the loop

class Line(nn.Module):
    """y = x w, to be learned; notes whether it is asked in training mode, and what dropout draws."""
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 1))

    def forward(self, x, y):
        return (x @ self.w - y).square().mean() + 0 * torch.rand(())


def line_batch(step):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
    return x, x @ torch.tensor([[1.0], [-2.0], [3.0]])


def test_fit_trains_any_module():
    cfg = train.FitConfig(steps=200, lr=0.1, weight_decay=0.0, optimizer="adamw", device="cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        history = train.fit(Line(), line_batch, cfg)
    assert len(history) == 200 and history[-1]["loss"] < 1e-2 < history[0]["loss"]


def test_an_update_clips_first_and_uses_the_rate_of_its_own_step():
    """Plain gradient descent moves the weights by rate · clipped gradient, and the rate is the one that the log has."""
    cfg = tiny(steps=10, warmup=4, lr=1.0, clip=0.01)
    for step in range(3):
        line = Line()
        descent = torch.optim.SGD(line.parameters(), lr=0.0)
        train.update(line, [descent], line_batch(0), step, cfg, torch.device("cpu"))
        assert math.isclose(line.w.norm().item(), 0.01 * train.lr_at(step, cfg), rel_tol=1e-3), step


def test_dropout_draws_differ_by_step_and_rank_and_evaluation_has_none():
    net, batch = GPT(tiny(dropout=0.5).architecture()), (torch.arange(128).view(2, 64), torch.arange(128).view(2, 64))

    def loss(step, rank):
        with mock.patch.object(train, "rank", lambda: rank):
            unmoved = torch.optim.SGD(net.parameters(), lr=0.0)
            return train.update(net, [unmoved], batch, step, tiny(lr=0.0), torch.device("cpu"))[0].item()

    assert loss(1, 0) == loss(1, 0) and len({loss(1, 0), loss(1, 1), loss(2, 0)}) == 3

    modes = []
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        cfg = tiny(steps=4, eval_every=2, optimizer="adamw")
        net = Line()
        net.register_forward_pre_hook(lambda module, given: modes.append(module.training))
        train.fit(net, line_batch, cfg, Path(folder), evaluate=lambda: modes.append(net.training) or {})
    assert modes == [True, True, False, True, True, False]  # an evaluation after steps 2 and 4


def test_accumulation_is_one_big_batch():
    with workplace() as (folder, base):
        for n in (4, 2, 1):
            runs_well(*base, "--steps=4", "--optimizer=adamw", f"--device_batch_size={n}", f"--name=b{n}")
        big, half, one = (log(f"runs/b{n}") for n in (4, 2, 1))
        assert same_losses(big, half) and same_losses(big, one)
        assert all(math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-4) for a, b in zip(big, half))


def test_two_ranks_are_one_rank_for_every_memory():
    with workplace() as (folder, base):
        every = [*base, "--memory=" + ",".join(MEMORIES), "--steps=4", "--sample_tokens=0"]
        runs_well(*every, "--out_dir=one", "--device_batch_size=2")
        two = in_background("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train.__file__, *every, "--out_dir=two",
                            "--device_batch_size=1")
        stdout, stderr = two.communicate()
        assert two.returncode == 0, stderr[-3000:]
        runs = sorted(p.name for p in Path("one").iterdir())
        assert len(runs) == len(MEMORIES) and runs == sorted(p.name for p in Path("two").iterdir())
        for run in runs:
            a, b = log(f"one/{run}"), log(f"two/{run}")
            assert same_losses(a, b) and math.isclose(a[-1]["val_bpb"], b[-1]["val_bpb"], rel_tol=1e-5), run
        assert stdout.count("seeds") == 1  # only rank 0 prints the table


def test_two_nodes_are_one():
    with workplace() as (folder, base):
        flags = [*base, "--steps=2", "--sample_tokens=0"]
        runs_well(*flags, "--name=one")
        for _ in range(3):  # the port found free may be taken by the time it is used
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            nodes = [in_background("-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={n}", "--nproc_per_node=1",
                                   "--master_addr=127.0.0.1", f"--master_port={port}", train.__file__, *flags, "--name=two")
                     for n in range(2)]
            errors = [node.communicate()[1] for node in nodes]
            if not any("in use" in e for e in errors):
                break
        assert [node.returncode for node in nodes] == [0, 0], errors
        assert same_losses(log("runs/one"), log("runs/two"))


# ---------------------------------------------------------------- interruption

def interrupted(flags, run, at):
    """Dies at the start of step `at` as if killed (no clean-up, no checkpoint), then the same command again."""
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    with at_call(at, kill), contextlib.suppress(Killed):
        call(train.main, *flags, f"--name={run}")
        raise AssertionError("was not interrupted")
    assert not Path(f"runs/{run}/result.json").exists()
    return runs_well(*flags, f"--name={run}")


def test_resume_is_bit_identical_for_every_memory():
    with workplace() as (folder, base):
        for memory in MEMORIES:
            flags = [*base, f"--memory={memory}", "--steps=5", "--save_every=2", "--eval_every=2", "--dropout=0.1"]
            runs_well(*flags, f"--name={memory}-whole")
            assert "from step 2" in interrupted(flags, memory, at=4)
            assert log(f"runs/{memory}") == log(f"runs/{memory}-whole"), memory
            assert same_tensors(weights(f"runs/{memory}"), weights(f"runs/{memory}-whole")), memory


def test_sigkill_then_the_same_command_is_bit_identical():
    with workplace() as (folder, base):
        flags = [*base, "--steps=40", "--save_every=3", "--eval_every=7", "--memory=deltanet"]
        runs_well(*flags, "--name=whole")
        process = in_background(train.__file__, *flags, "--name=killed")
        lines, target, path = 0, random.randint(5, 25), Path("runs/killed/log.jsonl")
        while lines < target and process.poll() is None:
            time.sleep(0.005)
            lines = path.read_bytes().count(b"\n") if path.exists() else 0
        process.kill()
        process.communicate()
        assert not Path("runs/killed/result.json").exists()
        assert "continuing" in runs_well(*flags, "--name=killed")
        assert log("runs/killed") == log("runs/whole") and same_tensors(weights("runs/killed"), weights("runs/whole"))


@each(number=[signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(number):
    handler = signal.signal(number, signal.default_int_handler)  # nohup and & ignore SIGINT
    try:
        with workplace() as (folder, base):
            flags = [*base, "--steps=8", "--save_every=0", "--name=a"]
            with at_call(3, lambda: os.kill(os.getpid(), number)):
                status, out, err = call(train.main, *flags)
            assert status == 128 + number and "same command" in out and "--name=a" in out and not err
            assert torch.load("runs/a/ckpt.pt", weights_only=True)["step"] == 3
            assert runs_well(*flags) and len(log("runs/a")) == 8
            assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, handler)


def test_damaged_checkpoint_falls_back_to_the_previous_one():
    def truncate(path):
        path.write_bytes(path.read_bytes()[:1000])

    def flip(path):
        b = bytearray(path.read_bytes())
        b[len(b) // 2] ^= 1
        path.write_bytes(bytes(b))

    with workplace() as (folder, base):
        flags = [*base, "--steps=6", "--save_every=2"]
        runs_well(*flags, "--name=whole")
        for i, damage in enumerate((truncate, flip, lambda p: p.write_bytes(b""), lambda p: p.unlink())):
            folder = Path(f"runs/r{i}")
            runs_well(*flags, f"--name=r{i}")
            (folder / "result.json").unlink()
            damage(folder / "ckpt.pt")
            out = runs_well(*flags, f"--name=r{i}")
            assert "from step 4" in out and (i == 3 or "damaged" in out), (i, out)
            assert log(folder) == log("runs/whole")
            (folder / "result.json").unlink()
            truncate(folder / "ckpt.pt")
            truncate(folder / "ckpt.prev.pt")
            assert "starts over" in runs_well(*flags, f"--name=r{i}")
            assert log(folder) == log("runs/whole") and same_tensors(weights(folder), weights("runs/whole"))


def test_another_architecture_is_refused():
    with workplace() as (folder, base):
        flags = [*base, "--steps=2", "--name=a"]
        runs_well(*flags)
        refused(train.main, [*flags, "--memory=ttt", "--seed=5"], "memory (there none, now ttt)", "seed (there 1, now 5)")
        Path("runs/a/result.json").unlink()
        refused(train.main, [*flags, "--n_embd=64"], "n_embd (there 32, now 64)")
        runs_well(*flags, "--eval_every=1", "--device_batch_size=1")  # these may change


def test_nan_stops_and_keeps_the_last_good_checkpoint():
    with workplace() as (folder, base):
        with at_call(4, factor=math.nan):
            refused(train.main, [*base, "--steps=6", "--save_every=2", "--name=a"], "step 4", "step 2")
        assert torch.load("runs/a/ckpt.pt", weights_only=True)["step"] == 2 and not Path("runs/a/result.json").exists()
        assert all(w.isfinite().all() for w in weights("runs/a").values())


def test_full_disk_is_one_line_and_leaves_the_checkpoint():
    def untouched():
        return torch.load("runs/a/ckpt.pt", weights_only=True)["step"] == 2 and not list(Path("runs/a").glob("*.tmp"))

    with workplace() as (folder, base):
        flags = [*base, "--steps=6", "--save_every=2", "--name=a"]
        original, calls = torch.save, itertools.count(1)

        def full_at_the_second(*args):
            if next(calls) == 2:
                raise OSError(28, "No space left on device")
            original(*args)

        with mock.patch.object(torch, "save", full_at_the_second):
            refused(train.main, flags, "No space left", "ckpt.pt")
        assert untouched()
        with limited_files(1000):  # the log's turn
            refused(train.main, [*base, "--steps=90", "--name=b"], "cannot write", "log.jsonl")
        for limit in (2_000, 100_000, 900_000):  # what torch raises depends on where in the file it happens
            with limited_files(limit):
                refused(train.main, [*base, "--steps=2", "--n_embd=128", f"--name=c{limit}"], "cannot write", "ckpt.pt")
            assert not list(Path(f"runs/c{limit}").glob("*.pt*"))
        assert untouched()
        assert runs_well(*flags) and len(log("runs/a")) == 6


# ---------------------------------------------------------------- results

def test_sweep_skips_finished_runs_goes_on_after_nan_and_prints_a_table():
    with workplace() as (folder, base):
        flags = [*base, "--steps=2", "--memory=none,persistent", "--seed=1,2"]
        with at_call(3, factor=math.nan):  # the first step of none, seed 2
            refused(train.main, flags, "1 of 4", "-none-", "-s2")
        assert len(list(Path("runs").glob("*/result.json"))) == 3
        out = runs_well(*flags)
        assert "3 of 4 runs are finished already" in out
        table = out[out.rindex("| condition"):]
        head, _, *rows = table.strip().splitlines()
        for column in ("val bpb", "std", "seeds", "parameters", "FLOPs/token", "state bytes", "tokens/s", "minutes", "MiB"):
            assert column in head, head
        assert len(rows) == 2 and all("|     2 |" in row for row in rows), table
        bpb = [json.loads(p.read_text())["val_bpb"] for p in Path("runs").glob("*-none-*/result.json")]
        assert f"{sum(bpb) / 2:.4f}" in next(r for r in rows if "local" in r)


def test_result_has_everything_and_the_files_are_there():
    with workplace() as (folder, base):
        flags = [*base, "--steps=3", "--name=a", "--memory=persistent", "--tokenizer=bpe:300"]
        out = runs_well(*flags)
        r = json.loads(Path("runs/a/result.json").read_text())
        for key in ("memory window preset seed max_seq_len config dataset data_sha256 val_bpb val_loss train_tokens total_params "
                    "memory_params flops_per_token state_bytes total_time_min tokens_per_second peak_vram_mib device versions "
                    "bpb_by_position seconds cpu_seconds").split():
            assert key in r, key
        net, cfg, checkpoint = train.load_run("runs/a")
        assert r["total_params"] == sum(p.numel() for p in net.parameters())
        none = GPT(replace(cfg, memory="none").architecture())
        assert r["memory_params"] == r["total_params"] - sum(p.numel() for p in none.parameters()) > 0
        assert r["train_tokens"] == 3 * 4 * 64 and r["state_bytes"] > 0 and r["tokens_per_second"] > 0 and r["peak_rss_mib"] > 50
        assert r["config"]["vocab_size"] == 300 and len(r["data_sha256"]) == 64 and r["curve"][-1]["val_bpb"] == r["val_bpb"]
        for name in ("log.jsonl", "ckpt.pt", "loss.png"):
            assert Path("runs/a", name).stat().st_size > 0
        for word in ("bits per byte", "parameters", "FLOPs", "state", "tokens/s", "peak memory", "sample"):
            assert word in out, word
        assert same_tensors(net.state_dict(), weights("runs/a")) and checkpoint["step"] == 3

        # the log's bits per byte are those of the batch's bytes, not of its tokens
        corpus = train.load_corpus(cfg.dataset, cfg.tokenizer)
        _, y = corpus.batch(0, 4, 64, 1)
        first = log("runs/a")[0]
        assert math.isclose(first["bpb"], first["loss"] * y.numel() / math.log(2) / corpus.token_bytes[y].sum().item(), rel_tol=1e-6)

        Path("runs/a/result.json").unlink()  # killed between the last checkpoint and the result
        runs_well(*flags)
        again = json.loads(Path("runs/a/result.json").read_text())
        clocks = ("peak_rss_mib", "peak_vram_mib", "seconds", "cpu_seconds")
        assert all(again[k] == r[k] for k in r if k not in clocks), (again, r)
        assert train.evaluate_bpb(net, corpus, cfg)["val_bpb"] == r["val_bpb"]


def test_bpb_by_position_recombines_to_the_total():
    """Against a plain loop over the rows, with tokens of several bytes, none at all, and a length that is no multiple of 64."""
    class Toy:
        name, token_bytes = "toy", torch.tensor([0, 1, 2, 7] + [1] * 12)

        def eval_batches(self, seq_len, rows, max_tokens=None, split="val"):
            g = torch.Generator().manual_seed(0)
            for n in (3, 3, 1):
                x = torch.randint(16, (n, seq_len + 1), generator=g)
                yield x[:, :-1], x[:, 1:], torch.zeros(n, seq_len, dtype=torch.long)

    cfg = tiny(max_seq_len=100, vocab_size=16)
    torch.manual_seed(0)
    model = GPT(cfg.architecture()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    r = train.evaluate_bpb(model, Toy(), cfg)
    nats = size = targets = 0
    for x, y, _ in Toy().eval_batches(100, 3):
        logp = model(x).log_softmax(-1)
        for row, position in itertools.product(range(len(x)), range(100)):
            token = y[row, position].item()
            b = Toy.token_bytes[token].item()
            if b:
                nats, size, targets = nats - logp[row, position, token].item(), size + b, targets + 1
    by = r["bpb_by_position"]
    assert math.isclose(r["val_bpb"], nats / math.log(2) / size, rel_tol=1e-6)
    assert math.isclose(r["val_loss"], nats / targets, rel_tol=1e-6)
    assert by["bucket"] == 64 and by["positions"] == [0, 64] and len(by["nats"]) == len(by["bytes"]) == len(by["bpb"]) == 2
    assert sum(by["nats"]) / (math.log(2) * sum(by["bytes"])) == r["val_bpb"] and sum(by["bytes"]) == size
    assert math.isclose(by["bpb"][1], by["nats"][1] / math.log(2) / by["bytes"][1])


# ----------------------------------------------------------------------------------------------------------------------
# eval.py: what is measured on a checkpoint

L = 32
SHAPE = ["--dataset=text.txt", "--n_layer=2", "--n_embd=16", "--n_head=2", "--ttt_chunk=8", "--knn_capacity=24", "--rmt_tokens=3",
         "--knn_topk=4", "--persistent_slots=3", "--mosaic_slots=8", f"--max_seq_len={L}", "--batch_size=4", "--eval_tokens=1024",
         "--sample_tokens=0", "--steps=3", "--warmup=1", "--device=cpu", "--compile=false", "--lr=0.01"]


def short_documents(n=800):
    """Sentences of a small grammar, of 20 to 90 characters, some of them over and over"""
    draw = random.Random(0)
    words = [draw.choice("bdfgklmnprst") + draw.choice("aeiou") + draw.choice(["", "n", "r", "sh"]) for _ in range(60)]
    for i in range(n):
        subject, verb = draw.choice(words), draw.choice(words)
        yield " ".join([subject, verb, *draw.choices(words, k=3 + i % 14), "and", subject, f"{verb}, {i % 50}."])


@functools.lru_cache(None)
def lab():
    """A folder with a text and a short run of every memory in out/<memory>, made once a process."""
    folder = tempfile.TemporaryDirectory()
    Path(folder.name, "text.txt").write_text("\n<|endoftext|>\n".join(short_documents()))
    Path(folder.name, "other.txt").write_text("the cow jumps over the moon, and so on and on. " * 300)
    with inside(folder.name):
        for memory in MEMORIES:
            trained(memory, f"--memory={memory}")
    return folder


@contextlib.contextmanager
def inside(folder=None):
    old = os.getcwd()
    os.chdir(folder or lab().name)  # data's cache goes to out/data below it
    try:
        yield
    finally:
        os.chdir(old)


def trained(name, *flags):
    status, _, err = call(train.main, *SHAPE, f"--name={name}", *flags)
    assert status == 0, err


def measured(run, task, *flags):
    """The task's JSON, made now"""
    path = Path("out", run, f"eval_{task}.json")
    path.unlink(missing_ok=True)
    draw, measuring.save_picture = measuring.save_picture, lambda run, task, figure: sys.modules["matplotlib.pyplot"].close(figure)
    try:                                                            # to draw takes longer than to measure
        status, out, err = call(measuring.main, f"out/{run}", f"--task={task}", *flags)
    finally:
        measuring.save_picture = draw
    assert status == 0, err
    return json.loads(path.read_text())


def opened(*names):
    return measuring.open_runs([f"out/{name}" for name in names], measuring.Options())


def in_pieces(run, n):
    """The run, read n tokens at a time"""
    return run._replace(cfg=SimpleNamespace(**vars(run.cfg) | dict(max_seq_len=n)))


def recombined(curve):
    return sum(curve["nats"]) / (math.log(2) * sum(curve["bytes"]))


def nats_at_once(net, x, y):
    return F.cross_entropy(net(x).double().flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def stub(stream, rows=4, **settings):
    """A Run whose model is a function"""
    cfg = SimpleNamespace(device="cpu", dtype="float32", max_seq_len=L, batch_size=rows, device_batch_size=0, **settings)
    return measuring.Run(Path("."), "stub", SimpleNamespace(stream=stream), cfg)


def uniform(x, state=None):
    """A model that likes every token alike; its state is the number of tokens"""
    return torch.zeros(*x.shape, 257), (state or 0) + x.size(1)


def up_to(n):
    """`uniform`, but without the memory for more than n tokens"""
    def stream(x, state=None):
        if (state or 0) + x.size(1) > n:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried")
        return uniform(x, state)
    return stream


# ---------------------------------------------------------------- bpb, position, extend, ood

def test_eval_position_recombines_and_is_the_training_number():
    """Every memory, also read in pieces of 7 tokens: buckets recombine to 1e-6, to what whole rows give, on the same tokens."""
    with inside():
        hashes = set()
        for memory in MEMORIES:
            at_once, position = measured(memory, "bpb"), measured(memory, "position", "--bucket=10")
            (run,) = opened(memory)
            pieces, _ = measuring.measure(in_pieces(run, 7), run.corpus(), L, 1024, 10)
            result = json.loads(Path("out", memory, "result.json").read_text())
            assert abs(at_once["val_bpb"] - result["val_bpb"]) < 1e-6
            for r in (position, pieces):
                numbers = [r["val_bpb"], recombined(r["bpb_by_position"]), recombined(r["bpb_by_document_position"])]
                assert max(abs(number - at_once["val_bpb"]) for number in numbers) < 1e-6, (memory, numbers)
                assert r["bpb_by_position"]["positions"] == [0, 10, 20, 30]
            hashes |= {at_once["tokens_sha256"], position["tokens_sha256"], pieces["tokens_sha256"]}
        assert len(hashes) == 1
        assert measured("none", "position", "--tokens=512")["tokens_sha256"] not in hashes


def test_eval_position_by_hand():
    """Each bucket by a plain loop over targets; ends of text don't count; a document starts again at 0."""
    with inside():
        (run,), r, digest = opened("none"), measured("none", "position", "--bucket=4"), hashlib.sha256()
        corpus, sums = run.corpus(), {key: torch.zeros(L // 4, 2, dtype=torch.float64) for key in measuring.CURVES}
        for x, y, _ in corpus.eval_batches(L, 3, 1024):
            nats = nats_at_once(run.model, x, y).tolist()
            digest.update(torch.cat([x, y[:, -1:]], 1).int().numpy().tobytes())
            for row, targets, losses in zip(x.tolist(), y.tolist(), nats):
                start = 0
                for t in range(L):
                    start = t if row[t] == corpus.eos else start
                    if targets[t] != corpus.eos:
                        sums["row"][t // 4] += torch.tensor([losses[t], 1])
                        sums["document"][(t - start) // 4] += torch.tensor([losses[t], 1])
        assert sums["document"][0, 1] > sums["row"][0, 1] and sums["document"][-1, 1] > 0
        for key, name in measuring.CURVES.items():
            found = torch.tensor([r[name]["nats"], r[name]["bytes"]], dtype=torch.float64).T
            assert (found - sums[key]).abs().max() < 1e-3 and torch.equal(found[:, 1], sums[key][:, 1]), key
            assert error(torch.tensor(r[name]["bpb"]), found[:, 0] / math.log(2) / found[:, 1]) < 1e-6
        assert r["tokens_sha256"] == digest.hexdigest()


def test_eval_extend_is_one_forward():
    """Reading 4 training lengths through the state, in pieces, is what one pass over them gives, for every memory."""
    with inside():
        for memory in MEMORIES:
            r, (run,) = measured(memory, "extend", "--factor=4", "--rows=2"), opened(memory)
            ((x, y, _),) = run.corpus().eval_batches(4 * L, 2, 8 * L)
            with torch.no_grad():
                nats = nats_at_once(run.model, x, y) * (y < 256)
            odd, _ = measuring.measure(in_pieces(run, 24), run.corpus(), 4 * L, 8 * L, 64)
            assert abs(odd["val_bpb"] - r["val_bpb"]) < 1e-5
            assert [(s["start"], s["end"]) for s in r["spans"]] == [(0, 32), (32, 64), (64, 128)] and r["reached"] == 4 * L
            for s in r["spans"]:
                a, b = s["start"], s["end"]
                expected = nats[:, a:b].sum() / (math.log(2) * (y[:, a:b] < 256).sum())
                assert abs(s["bpb"] - expected.item()) < 1e-5, (memory, s)
        text = call(measuring.main, "out/none", "--task=extend", "--factor=1000", "--rows=1")[1]
        assert "note: " in text and "1000" in text                 # too little validation text: shorter rows, and said so
    assert measuring.span_ends(L, 6) == [L, 2 * L, 4 * L, 6 * L] and measuring.span_ends(L, 1) == [L]


def test_eval_learned_positions_are_a_limit():
    with inside():
        trained("learned", "--memory=none", "--pos=learned")
        extend, attention = measured("learned", "extend", "--factor=4"), measured("learned", "attention", "--sequences=4")
        assert extend["reached"] == L and "learned positions" in extend["limit"]
        assert extend["spans"][0]["bpb"] > 0 and extend["spans"][1]["bpb"] is None
        assert {f["length"] for f in attention["layers"]} == {L} and list(attention["limits"]) == [str(3 * L)]
        (cell,) = measured("learned", "niah", "--lengths=8", "--depths=0")["cells"]
        assert cell["limit"] == "needle does not fit"
        cells = measured("learned", "niah", "--lengths=32,64", "--depths=0", "--pairs=2", "--needle=k {key}")["cells"]
        assert "limit" not in cells[0] and "learned positions" in cells[1]["limit"]
        speed = measured("learned", "speed", "--context=128")["models"]["local"]
        assert speed["reached"] == L and "learned positions" in speed["limit"] and speed["points"][0]["context"] == L
        text = measured("learned", "generate", "--prompt=abc", "--new_tokens=500")["texts"][0]["text"]
        assert len(text) <= L


def test_eval_out_of_memory_is_a_limit():
    """The allocators' errors and only those; rows are halved first; what was read stays measured, a span only if read whole."""
    def short_of_rows(x, state=None):
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return uniform(x, state)

    with inside():
        corpus = data.load("text.txt", "byte", quiet=True)
        for stream, reached in ((uniform, 4 * L), (short_of_rows, 4 * L), (up_to(2 * L), 2 * L)):
            r, sums = measuring.measure(stub(stream, 16), corpus, 4 * L, 12 * L, 64)
            assert r["reached"] == reached and r["limit"] == (None if reached == 4 * L else "out of memory")
            assert abs(r["val_loss"] - math.log(257)) < 1e-6 and (sums[2] > 0).sum() == reached
            by = r["bpb_by_document_position"]                      # no nats or bytes of what was not read
            assert sum(by["targets"]) == sum(by["bytes"]) == sums[1].sum() and math.isclose(sum(by["nats"]), sums[0].sum())
        (run,) = opened("none")
        with contextlib.redirect_stdout(io.StringIO()):             # the limit lies in the middle of the last span
            measuring.task_extend([run._replace(model=SimpleNamespace(stream=up_to(3 * L)))], measuring.Options(factor=4, rows=2))
        r = json.loads(Path("out/none/eval_extend.json").read_text())
        assert r["reached"] == 3 * L and [s["bpb"] is None for s in r["spans"]] == [False, False, True]
    for other in (RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("x")):
        raises(type(other), lambda: measuring.limit(other), str(other))
    assert measuring.limit(MemoryError()) == "out of memory"
    if sys.platform == "linux":
        with measuring.memory_ceiling(torch.device("cpu")):
            raises(RuntimeError, lambda: [torch.empty(2 ** 30, dtype=torch.uint8) for _ in range(4096)], "can't allocate memory")
        torch.ones(2 ** 20)


def test_eval_what_is_not_finite_is_null():
    assert measuring.plain(dict(a=torch.tensor([1.0, math.nan]), b=[math.inf, -math.inf, 2])) == dict(a=[1.0, None], b=[None, None, 2])
    with inside():
        (run,) = opened("none")
        hopeless = run._replace(model=SimpleNamespace(stream=lambda x, state=None: (torch.full((*x.shape, 257), math.nan), None)))
        for task in ("position", "niah"):
            assert call(lambda argv: measuring.TASKS[task]([hopeless], measuring.Options(pairs=2, depths="0", lengths="80")))[2] == ""
            assert "NaN" not in Path(f"out/none/eval_{task}.json").read_text()
        assert json.loads(Path("out/none/eval_niah.json").read_text())["cells"][0]["margin"] is None


def test_eval_ood_is_another_corpus_in_the_models_tokens():
    with inside():
        own, r = measured("mosaic", "position"), measured("mosaic", "ood", "--dataset=other.txt", "--tokens=320")
        corpus, digest = data.load("other.txt", "byte", quiet=True), hashlib.sha256()
        for x, y, _ in corpus.eval_batches(L, 1, 320):
            measuring.add_tokens(digest, x, y)
        assert r["ood_sha256"] == corpus.sha256 != r["data_sha256"] and r["ood_dataset"] == "other.txt"
        assert r["tokens_sha256"] == digest.hexdigest() != own["tokens_sha256"]
        assert r["bpb_by_position"]["positions"] == [0, 16]
        trained("words", "--memory=none", "--tokenizer=bpe:300")
        (run,), r = opened("words"), measured("words", "ood", "--dataset=other.txt")
        words = data.load("other.txt", "bpe:300@text.txt", quiet=True)
        assert r["ood_sha256"] == words.sha256 and words.encoding._mergeable_ranks == run.corpus().encoding._mergeable_ranks
    assert measuring.Options().dataset == "python-docs"             # every Python has it: no download, no pyarrow


# ---------------------------------------------------------------- niah

def copier(x, state=None, wrong=()):
    """Predicts what followed the last earlier occurrence of the last four tokens: perfect on a needle. The guess at the
    digits whose number in the key is in `wrong` is another one. (The key follows "key is".)"""
    seen = x if state is None else torch.cat([state, x], 1)
    logits = torch.zeros(*x.shape, 257)
    for row in range(len(x)):
        text = seen[row].tolist()
        for j in range(x.size(1)):
            t = len(text) - x.size(1) + j
            for i in range(t - 1, 2, -1):
                if text[i - 3:i + 1] == text[t - 3:t + 1]:
                    written = "".join(map(chr, text[:t + 1])).rpartition("key is")[2]
                    logits[row, j, text[i + 1] ^ (len(written) in wrong)] = 9.0
                    break
    return logits, seen


def test_eval_niah_scoring():
    """A model that copies finds every key; one that only has a taste for some digits has a margin of exactly 0; one that
    is wrong in a single digit, or in every second one, has not found the key."""
    taste = torch.linspace(-3, 3, 257)
    biased = lambda x, state=None: (taste.expand(*x.shape, 257), x)
    opts = measuring.Options(pairs=2, needle="\n@The key is {key}.\n")
    with inside():
        corpus = data.load("text.txt", "byte", quiet=True)
        cell = lambda stream, length=80, depth=0.5: measuring.niah_cell(stub(stream), corpus, length, depth, opts)
        for length, depth in itertools.product((80, 160), (0, 0.5, 1)):
            found, guess = cell(copier, length, depth), cell(biased, length, depth)
            assert found["exact"] == 1 and found["margin"] > 20 and found["log_p_key"] > -1, (length, depth, found)
            assert guess["exact"] == 0 and abs(guess["margin"]) < 1e-4 > guess["margin_error"] and guess["log_p_key"] < -20
        negative = cell(lambda x, state=None: (lambda logits, s: (-logits, s))(*copier(x, state)))
        assert negative["exact"] == 0 and negative["margin"] < -20
        for wrong in ((0, 2, 4, 6), (6,), (1,)):
            assert cell(functools.partial(copier, wrong=wrong))["exact"] == 0, wrong


def test_eval_niah_prompt():
    """The needle stands at its depth and nowhere else, the question at the end, and the answer fits the length."""
    with inside():
        corpus = data.load("text.txt", "byte", quiet=True)
        (hay, *_), = corpus.eval_batches(100, 1, 100)
        for tokenizer in ("byte", "bpe:300"):
            encoding = data.load("text.txt", tokenizer, quiet=True).encoding
            before, after, keys = measuring.draw_keys(encoding, "Key is {key}!", 4, 1)
            texts = [encoding.decode(k) for k in keys.tolist()]
            assert len(set(texts)) == 8 and all(t[0] == " " and t[1:].isdigit() and len(t) == 7 for t in texts)
            assert encoding.decode(before) == "Key is" and encoding.decode(after) == "!"
            assert not torch.equal(keys, measuring.draw_keys(encoding, "Key is {key}!", 4, 2)[2])
        before, after, keys = measuring.draw_keys(corpus.encoding, "Key is {key}!", 1, 1)
        key = corpus.encoding.decode(keys[0].tolist())
        places = []
        for depth in (0, 0.5, 1):
            prompt = measuring.hide(hay[0], depth, before, after, keys[0])
            text = "".join(map(chr, prompt[1:].tolist()))           # chr(256) is an end of text
            assert len(prompt) + len(keys[0]) == 100 and prompt[0] == corpus.eos and text.endswith("Key is")
            assert text.count("Key is" + key + "!") == 1 and text.count("Key is") == 2
            assert text.replace("Key is" + key + "!", "", 1)[:-6] == "".join(map(chr, hay[0, 1:100 - 14 - 6 - 7].tolist()))
            places.append(text.index("Key is" + key))
        assert places[0] == 0 and places[2] == len(text) - 6 - 14 and abs(places[1] - places[2] / 2) <= 1


# ---------------------------------------------------------------- attention

def explicit(layer, x, window):
    """(rows,H,keys) attention of the last of the positions x (B,T,C) that this layer is given, with T×T scores and masks"""
    near = torch.arange(x.size(1))[:, None] - torch.arange(x.size(1))
    if isinstance(layer, model.ContextualMemory):
        k, _ = layer.key(x, None)
        return (k @ k.mT).masked_fill(near <= 0, -1e30).softmax(-1)[:, :, -1]
    q, k, _ = layer.project(x, None)
    if layer.theta:
        q, k = (model.rotary(a, torch.arange(x.size(1)), layer.theta) for a in (q, k))
    k = k.repeat_interleave(layer.H // layer.Hkv, 1)
    score = q @ k.mT / layer.D ** 0.5
    free = torch.arange(x.size(1)) < layer.n_free
    if layer.slopes is not None:
        score = score - layer.slopes[:, None, None] * torch.where(free, 0, near)
    score = score.masked_fill((near < 0) | ((near >= (window or x.size(1))) & ~free), -math.inf)
    if isinstance(layer, model.PersistentAttention):
        slots = F.rms_norm(layer.slot_k.view(layer.M, -1, layer.D), (layer.D,)).transpose(0, 1)
        score = torch.cat([q @ slots.repeat_interleave(layer.H // layer.Hkv, 0).mT / layer.D ** 0.5, score], -1)
    return score.softmax(-1)[:, :, -1]


def test_eval_attention_is_the_softmax():
    """Every layer's profile against a T×T softmax on what a pass over the whole sequence gives that layer."""
    cases = [dict(memory="none"), dict(memory="none", pos="alibi", n_kv_head=1), dict(memory="none", pos="none", n_kv_head=2),
             dict(memory="persistent"), dict(memory="persistent", window="L", pos="none", n_kv_head=1), dict(memory="mosaic"),
             dict(memory="rmt", rmt_tokens=3), dict(memory="rmt", rmt_tokens=3, pos="alibi"), dict(memory="knn", knn_capacity=24)]
    for case in cases:
        torch.manual_seed(0)
        net = GPT(model.Config(**{"n_layer": 3, "n_head": 4, "n_embd": 32, "max_seq_len": L, "persistent_slots": 3} | case)).eval().double()
        for p in net.parameters():
            p.data.normal_(0, 0.3)
        run = in_pieces(stub(None)._replace(model=net), 13)
        for T in (L, 3 * L):
            x, seen = torch.randint(257, (3, T)), {}
            with torch.no_grad():
                out = measuring.attention_at(run, x)
                mixers = [b.mixer for b in net.modules() if isinstance(b, model.Block)]
                hooks = [m.register_forward_hook(lambda m, a, o, i=i: seen.update({i: a[0]})) for i, m in enumerate(mixers)]
                net(x)                                              # rmt's last call is its last segment, at once
                [h.remove() for h in hooks]
            assert len(out) == 3, case
            for i, shares in out.items():
                w = explicit(mixers[i], seen[i], getattr(mixers[i], "window", None)).sum(0).double()
                m = 3 if case["memory"] in ("persistent", "rmt") else 0
                expected = torch.zeros(4, 1 + T, dtype=torch.float64)
                expected[:, 0], expected[:, 1 + T - (w.size(1) - m):] = w[:, :m].sum(1), w[:, m:]
                assert (shares - expected).abs().max() < 1e-5 and (shares.sum(1) - 3).abs().max() < 1e-5, (case, i, T)
                assert m == 0 or shares[:, 0].min() > 1e-4


def test_eval_attention_files():
    """The averages over sequences, λ of the mosaic, and memories without attention."""
    with inside():
        r, (run,) = measured("mosaic", "attention", "--sequences=6"), opened("mosaic")
        assert [(f["layer"], f["length"], f["sequences"]) for f in r["layers"]] == [(0, L, 6), (1, L, 6), (0, 3 * L, 6), (1, 3 * L, 6)]
        x = torch.cat([x for x, *_ in run.corpus().eval_batches(L, 6, 6 * L)])
        expected = measuring.attention_at(run, x)[1][:, 1:] / 6
        assert (torch.tensor(r["layers"][1]["profile"], dtype=torch.float64) - expected).abs().max() < 1e-6
        leak = run.model.body.blocks[1].mixer.key.leak
        assert all(abs(a - math.exp(-10 * abs(b))) < 1e-6 for a, b in zip(r["layers"][1]["leak"], leak.tolist()))
        trained("hybrid", "--memory=mosaic", "--memory_layers=0")
        assert [f["leak"] is None for f in measured("hybrid", "attention", "--sequences=2")["layers"]] == [False, True] * 2
        assert measured("deltanet", "attention")["layers"] == []
        assert "no layer" in call(measuring.main, "out/ttt", "--task=attention")[1]
        assert not torch.nn.modules.module._global_forward_pre_hooks and not run.model.body.blocks[0].mixer._forward_pre_hooks


# ---------------------------------------------------------------- generate, speed

def test_eval_generate():
    with inside():
        flags = ("--new_tokens=12", "--prompt=the sun, and", "--prompt=import")
        for memory in ("none", "rmt", "ttt"):
            first = measured(memory, "generate", *flags)
            assert first["texts"] == measured(memory, "generate", *flags)["texts"], memory
            assert [t["prompt"] for t in first["texts"]] == ["the sun, and", "import"]
            (run,), idx = opened(memory), [256, *b"import"]
            for _ in range(12):                                     # greedy, from scratch at each token
                with torch.no_grad():
                    idx.append(run.model(torch.tensor([idx]))[0, -1].argmax().item())
            tail = idx[7:idx.index(256, 1)] if 256 in idx[1:] else idx[7:]
            assert first["texts"][1]["text"] == bytes(tail).decode(errors="replace"), memory
            warm = [measured(memory, "generate", *flags, "--temperature=1", f"--seed={s}")["texts"] for s in (1, 1, 2)]
            assert warm[0] == warm[1] != warm[2]
            alone = measured(memory, "generate", "--new_tokens=12", "--prompt=import", "--temperature=1")["texts"]
            assert alone[0] == warm[0][1]                           # a prompt's answer doesn't depend on the others


def test_eval_prompts_are_like_the_training_text():
    """Validation documents begin so, whole documents only and no more than their first lines; stories get the paper's prompts."""
    with inside():
        documents = set(short_documents())
        texts = [t["prompt"] for t in measured("none", "generate", "--new_tokens=2")["texts"]]
        assert len(set(texts)) == 8 and not documents & set(texts)  # half of it at most: there is something to write
        assert all(any(d.startswith(text) for d in documents) for text in texts)
        status, out, _ = call(measuring.main, "out/none", "out/mosaic", "--task=generate", "--new_tokens=2")
        assert out.count("  local: ") == out.count("  mosaic: ") == 8
        long = [f"def f{i}():\n\n    return {i}\n" + "x = 1\n" * 50 for i in range(400)]
        Path("my_stories.txt").write_text("\n<|endoftext|>\n".join(long))
        beginnings = measuring.document_beginnings(data.load("my_stories.txt", "byte", quiet=True))
        assert len(beginnings) == 8 and all(re.fullmatch(r"def f(\d+)\(\):\n\n    return \1", text) for text in beginnings)
        (run,) = opened("none")
        assert measuring.prompts_for(run, measuring.Options(prompt=("a",))) == ["a"]
        run.cfg.dataset = "tinystories"
        assert measuring.prompts_for(run, measuring.Options()) is measuring.PROMPTS
        os.makedirs("babi", exist_ok=True), Path("babi/valdataset.txt").touch()
        stories = ["my_stories.txt", "tinystories", "b/traindataset.txt", "babi"]
        assert list(filter(measuring.tells_stories, ["text.txt", *stories, "python"])) == stories
    assert len(measuring.PROMPTS) == 24 == len(set(measuring.PROMPTS)) and measuring.PROMPTS[23].endswith("Would you happen")


def test_eval_speed_reports_the_state():
    """State bytes are those of the tensors, for every memory; lengths double; the bounded memories stay as they are."""
    with inside():
        models = measured("none", "speed", "--memory=all", "--context=300")["models"]
        (run,) = opened("none")
        assert list(models) == ["local"] + [f"{m} (untrained)" for m in MEMORIES if m != "none"]
        for name, r in models.items():
            memory = name.split()[0].replace("local", "none")
            assert [p["context"] for p in r["points"]] == [32, 64, 128, 256] and r["limit"] is None and r["reached"] == 256
            net = GPT(replace(run.model.config, memory=memory))
            for p in r["points"]:
                with torch.no_grad():
                    _, state = net.stream(torch.zeros(1, p["context"], dtype=torch.int64))
                assert p["state_bytes"] == state_bytes(state), (name, p)
                assert p["prefill_tokens_per_second"] > 0 and p["ms_per_token"] > 0 and p["peak_rss_mib"] >= 0
            sizes = [p["state_bytes"] for p in r["points"]]
            assert (sizes[-1] == sizes[-2]) == (memory != "mosaic"), (name, sizes)  # two layers of SSSL have windows


# ---------------------------------------------------------------- the command line

def test_eval_all_tasks_of_two_runs():
    """Every task with its files and pictures; what was there is replaced whole."""
    with inside():
        Path("out/rmt/eval_bpb.json").write_text("old")
        status, out, err = call(measuring.main, "out/rmt", "out/ttt", "--dataset=other.txt", "--factor=2", "--rows=2", "--pairs=2",
                                "--depths=0,1", "--lengths=80", "--sequences=2", "--context=64", "--new_tokens=1")
        assert status == 0 and not err, err
        for task in measuring.TASKS:
            for memory in ("rmt", "ttt"):
                r = json.loads(Path("out", memory, f"eval_{task}.json").read_text())
                assert (r["task"], r["memory"], r["name"]) == (task, memory, memory) and len(r["data_sha256"]) == 64
        for task in ("position", "extend", "niah", "ood", "attention", "speed"):
            assert Path("out/rmt", f"eval_{task}.png").read_bytes()[:4] == b"\x89PNG"
        assert not list(Path("out").rglob("*.tmp")) and "note: these runs" not in out
        trained("short", "--memory=none", "--max_seq_len=16")
        text = call(measuring.main, "out/short", "out/none", "--task=bpb")[1]
        assert "note: these runs were measured on different tokens" in text


def test_eval_labels_tell_runs_apart():
    """A run is called by its condition, and by what sets it apart from others of it; its curve has the condition's look."""
    with inside():
        for name, *flags in (("global", "--window=L"), ("second", "--seed=2"), ("segments", "--memory=rmt", "--rmt_tokens=0"),
                             ("few", "--memory=rmt", "--rmt_tokens=2"), ("lower", "--memory=mosaic", "--memory_layers=0")):
            trained(name, *flags)
        for names, labels in ((("none", "rmt"), ["local", "rmt"]), (("none", "global"), ["local", "global"]),
                              (("none", "second"), ["local s1", "local s2"]), (("none", "none"), ["local"]),
                              (("rmt", "segments", "lower"), ["rmt", "rmt-0", "mosaic@0"]),
                              (("few", "rmt", "none"), ["rmt rmt_tokens=2", "rmt rmt_tokens=3", "local"])):
            assert [run.label for run in opened(*names)] == labels
        styles = measuring.looks(opened("none", "second", "global", "few", "rmt"))
        assert [s["linestyle"] for s in styles] == ["-", "--", "-", "-", "--"]
        assert [s["color"] for s in styles] == [analyze.look(name)["color"] for name in ("local", "local", "global", "rmt", "rmt")]


def test_eval_bad_input():
    with inside():
        if not Path("out/changed").exists():
            found = torch.load("out/none/ckpt.pt", weights_only=True)
            found["config"]["data_sha256"] = "0" * 64
            Path("out/changed").mkdir()
            torch.save(found, "out/changed/ckpt.pt")
        for flags, *words in (
                ("out/nome", "there is no out/nome", "did you mean out/none?"), ("out", "no checkpoint"), ("", "no run was given"),
                ("out/none/nothing", "there is no out/none/nothing"), ("out/changed --task=bpb", "it is other data"),
                ("out/none --task=nia", "'nia' is none of bpb", "did you mean niah?"), ("out/none --task=bpb,,", "''"),
                ("out/none --tusk=bpb", "unknown argument --tusk=bpb", "--task"), ("out/none --task", "expected one argument"),
                ("out/none --pairs=many", "--pairs=many", "whole number"), ("out/none --pairs=1", "pairs=1", "from 2"),
                ("out/none --temperature=nan", "temperature=nan"), ("out/none --device=tpu", "device=tpu"),
                ("out/none --depths=0,2", "depths=0,2", "from 0 to 1"), ("out/none --depths=a", "depths=a"),
                ("out/none --lengths=0", "lengths=0"), ("out/none --needle=key", "{key}"), ("out/none --needle={key}", "text"),
                ("out/none --memory=delta", "memory=delta", "deltanet"), ("out/none --piece=7", "unknown argument --piece=7"),
                ("out/none --task=ood --dataset=nowhere.txt", "nowhere.txt")):
            refused(measuring.main, flags.split(), *words)
        Path("out/none/eval_bpb.json").unlink(missing_ok=True)
        Path("out/none/eval_bpb.json").mkdir()                      # can't be written
        try:
            refused(measuring.main, ["out/none", "--task=bpb"], "cannot write")
        finally:
            Path("out/none/eval_bpb.json").rmdir()
    status, text, _ = call(measuring.main, "--help")
    assert status == 0 and "margin" not in text and all(f"--{name}" in text for name in measuring.Options.__dataclass_fields__)


# ----------------------------------------------------------------------------------------------------------------------
# toys.py: generators, metrics, training

TOY_SHAPE = dict(steps=2, n_layer=1, n_embd=16, n_head=1)


def five_batches(model, batch_fn, cfg):
    """In the place of train.fit"""
    return [batch_fn(i) for i in range(5)]


@contextlib.contextmanager
def recorded(**functions):
    """toys.py with these functions in the place of its own; yields {name: [(arguments, what it returned), ...]}."""
    calls = {name: [] for name in functions}

    def recorder(name, function):
        def record(*arguments):
            calls[name].append((arguments, function(*arguments)))
            return calls[name][-1][1]
        return record
    with mock.patch.multiple(toys, **{name: recorder(name, f) for name, f in functions.items()}):
        yield calls


def test_toys_every_string_is_accepted_by_its_automaton():
    for i, automaton in enumerate(toys.draw_automata(3, [40])[0]):
        assert 4 <= len(automaton) <= 12 and all(1 <= len(edges) <= 3 for edges in automaton)
        assert len({a for edges in automaton for a in edges}) <= 18
        tokens, states = toys.instance(random.Random(i), automaton, 10_000)
        strings = [list(s) for sep, s in itertools.groupby(tokens, lambda a: a == toys.SEP) if not sep]
        assert 10 <= len(strings) <= 19 and all(1 <= len(s) <= 49 for s in strings)
        for string in strings:
            q = 0
            for a in string:
                assert a in automaton[q], (string, automaton)
                q = automaton[q][a]
        assert toys.instance(random.Random(i), automaton, 100)[0] == tokens[:101]


def test_toys_automata_edges_go_to_distinct_other_states():
    """Checked on the raw draw: minimising may merge targets, never add edges."""
    with recorded(minimal=lambda automaton: automaton):
        for seed in range(60):
            automaton = toys.draw_automaton(random.Random(seed))
            assert 4 <= len(automaton) <= 12
            for q, edges in enumerate(automaton):
                assert 1 <= len(edges) <= 3 and q not in edges.values() and len(set(edges.values())) == len(edges)


def language(automaton, n):
    """Every string of n symbols and its probability."""
    strings = {(): (0, Fraction(1))}
    for _ in range(n):
        strings = {s + (a,): (p, w / len(automaton[q])) for s, (q, w) in strings.items() for a, p in automaton[q].items()}
    return {s: w for s, (_, w) in strings.items()}


def test_toys_minimal_keeps_the_language_and_is_canonical():
    for seed in range(30):
        rng = random.Random(seed)
        raw = []
        for q in range(6):
            k = rng.randint(1, 2)
            raw.append(dict(zip(rng.sample(range(3), k), rng.sample([p for p in range(6) if p != q], k))))
        small = toys.minimal(tuple(raw))
        assert language(raw, 6) == language(small, 6) and len(small) <= 6
        order = [0, *rng.sample(range(1, 6), 5)]  # other names for the states, the start kept, and a useless copy of state 3
        named = [None] * 6
        for q, edges in enumerate(raw):
            named[order[q]] = {a: order[p] for a, p in edges.items()}
        assert toys.minimal((*named, dict(named[3]))) == small
    # States 1 and 2 do the same: three states suffice, and a fourth cannot be reached.
    assert toys.minimal(({0: 1, 1: 2}, {5: 3}, {5: 3}, {7: 0}, {9: 0})) == ({0: 1, 1: 1}, {5: 2}, {7: 0})


def test_toys_splits_share_no_language():
    parts = toys.draw_automata(0, [60, 60, 300])
    keys = [repr(toys.minimal(a)) for part in parts for a in part]
    assert [len(p) for p in parts] == [60, 60, 300] and len(set(keys)) == len(keys)
    fewer = toys.draw_automata(0, [60, 60, 20])  # the test set does not depend on the training set
    assert fewer[0] == parts[0] and fewer[2] == parts[2][:20]
    # Real draws hardly ever meet twice; here there are only 12 languages, each under many names.
    with recorded(draw_automaton=lambda rng: toys.minimal(({rng.randrange(12): 1}, {1: 0}, {2: 1}))):
        assert len({repr(a) for part in toys.draw_automata(0, [4, 4, 4]) for a in part}) == 12


def test_toys_truth_sums_to_one_and_equals_enumeration():
    automaton = toys.draw_automata(5, [1])[0][0]
    data = toys.Instances([automaton], 1, 200)
    truth, y, x = data.truth(0), data.y[0], data.x[0].tolist()
    asked = (y >= 0).nonzero()[:, 0].tolist()
    assert torch.allclose(truth[asked].sum(1), torch.ones(len(asked)))
    for t in asked[:60]:
        string = x[:t + 1]
        string = string[len(string) - string[::-1].index(toys.SEP):] if toys.SEP in string else string
        if len(string) > 5:
            continue
        whole, longer = language(automaton, len(string)), language(automaton, len(string) + 1)
        for a in range(20):
            p = longer.get((*string, a), 0) / whole[tuple(string)]
            assert abs(truth[t, a].item() - float(p)) < 1e-6


def test_toys_metrics_on_a_case_worked_by_hand():
    # Two symbols asked (targets 0 and 1), a separator between them. Truth: {0: ½, 2: ½} and {1: 1}.
    truth, probs = torch.zeros(3, 20), torch.zeros(3, 20)
    truth[0, [0, 2]], truth[2, 1] = 0.5, 1.0
    probs[0, 2], probs[0, 3] = 0.75, 0.25         # legal; TVD ½(½ + ¼ + ¼) = ½
    probs[1, 5] = 1.0                             # not asked
    probs[2, 0], probs[2, 1] = 0.75, 0.25         # illegal; TVD ¾
    s = toys.symbol_scores(probs, truth, torch.tensor([0, -1, 1]))
    assert s == dict(count=2, accuracy=1, tvd=1.25, accuracy_last=0.0, tvd_last=0.75)
    other = dict(count=1, accuracy=1, tvd=0.1, accuracy_last=1.0, tvd_last=0.1)
    assert toys.total([s, other]) == dict(accuracy=2 / 3, tvd=1.35 / 3, accuracy_last=0.5, tvd_last=(0.75 + 0.1) / 2)


def test_toys_ngram_on_a_tiny_sequence():
    x = torch.tensor([0, 1, 0, 2, 0, toys.SEP, 0, 1, 3])
    probs = [toys.ngram(x, n) for n in range(4)]
    for n, t, expected in ((0, 3, {a: round(1 / 18, 4) for a in range(18)}), (1, 3, {0: 0.5, 1: 0.25, 2: 0.25}),
                           (2, 2, {1: 1.0}),                       # 0 was followed by 1
                           (2, 4, {1: 0.5, 2: 0.5}),
                           (2, 3, {0: 0.5, 1: 0.25, 2: 0.25}),     # after 2, new: backs off to single symbols
                           (2, 5, {0: 1.0}),                       # a string started with 0 before
                           (3, 6, {1: 1.0}),                       # a second string begins with 0: the first went on with 1
                           (2, 6, {1: 0.5, 2: 0.5}),               # and the 0 before a separator has no follower
                           (3, 7, {0: 1.0})):
        assert {a: round(p, 4) for a, p in enumerate(probs[n][t].tolist()) if p} == expected, (n, t)
    for p in probs[1:]:
        assert torch.allclose(p.sum(1), torch.ones(9))
    assert torch.equal(toys.ngram(x[:5], 3), probs[3][:5])         # only the past is used


def test_toys_brackets_are_balanced_and_asked_for():
    far = 0
    for seed in range(40):
        word, y, distance = toys.brackets(random.Random(seed), 96)
        assert len(word) == len(y) == len(distance) == 96
        openers = []
        for t, token in enumerate([*word, max(y[-1], 0)]):  # the last closer is an answer alone
            assert t == 0 or y[t - 1] == (token if token > 8 else -1)
            if token > 8:
                opener, then = openers.pop()
                assert token == opener + 8 and distance[t - 1] == t - then
                far += t - then >= 32
            elif token:
                openers.append((token, t))
                assert len(openers) <= 4
        assert not openers
    assert far > 40


def test_toys_copy_repeat_and_recall_ask_what_they_say():
    for seed in range(30):
        rng = random.Random(seed)
        x, y, d = toys.copy(rng, 80)
        asked = [t for t in range(80) if y[t] >= 0]
        assert len(asked) >= 8 and max(d) >= 9 and len(x) == len(y) == len(d) == 80 and asked[-1] == 79
        for t in asked:
            assert y[t] == x[t + 1 - d[t]] and (t == 79 or x[t + 1] == y[t])
        x, y, d = toys.repeat(rng, 80)
        for t in range(80):
            assert y[t] == (x[t] in x[:t])
            assert not y[t] or x[t - d[t]] == x[t] and x[t] not in x[t - d[t] + 1:t]
        x, y, d = toys.recall(rng, 80)
        for t in range(80):
            assert (y[t] >= 0) == (8 <= x[t] < 24)
            if y[t] >= 0:
                writes = [s for s in range(t) if x[s] >= 24 and (x[s] - 24) // 8 == x[t] - 8]
                assert y[t] == (x[writes[-1]] - 24) % 8 and d[t] == t - writes[-1]
        for name, task in toys.TASKS.items():
            x, y, d = task.draw(rng, 72)
            assert 0 <= min(x) and max(*x, *y) < task.vocabulary and len(x) == len(y) == len(d) == 72, name


def test_toys_products_are_parity_and_composed_permutations():
    rng = random.Random(0)
    for _ in range(20):
        x, y, d = toys.TASKS["parity"].draw(rng, 100)
        assert y == [sum(x[:t + 1]) % 2 for t in range(100)] and d == list(range(100))
    for task, n in (("s3", 3), ("s5", 5)):
        group = list(itertools.permutations(range(n)))
        matrices = [torch.eye(n)[:, list(p)] for p in group]    # M e_i = e_p(i): the product is one of matrices
        x, y, _ = toys.TASKS[task].draw(rng, 300)
        so_far = torch.eye(n)
        for token, answer in zip(x, y):
            so_far = matrices[token] @ so_far
            assert torch.equal(so_far, matrices[answer])
        assert set(x) == set(y) == set(range(len(group))) or task == "s5"


@each(task=["capacity", "mqar"])
def test_toys_pairs_are_asked_for_once(task):
    rng = random.Random(0)
    for T in (16, 64, 512):
        x, y, d = toys.TASKS[task].draw(rng, T)
        written = {}                                            # key -> its value and its place
        for t, token in enumerate(x[:T // 2]):
            if task == "capacity" and token != 8:
                written[(token - 137) // 8] = (token - 137) % 8, t
            elif task == "mqar" and t % 2 == 0:
                written[token - 9] = x[t + 1], t
        assert len(written) == T // 4 and not any(v >= 0 for v in y[:T // 2])
        asked = [t for t in range(T // 2, T) if x[t] != 8]
        assert sorted(x[t] - 9 for t in asked) == sorted(written) and all((y[t] >= 0) == (t in asked) for t in range(T))
        assert all((y[t], t - d[t]) == written[x[t] - 9] for t in asked)
        if T == 512:
            assert [x[t] - 9 for t in asked] != list(written) and set(y) == set(range(-1, 8))


def test_toys_pairs_held_and_what_fits_into_the_budget():
    """Accuracies 1, 1, .95, .85, .5 at 4 to 64 pairs cross .9 half-way between 16 and 32."""
    result = dict(lengths=[16, 32, 64, 128, 256], accuracy=[1, 1, 0.95, 0.85, 0.5], state_bytes=[100, 200, 400, 800, 1600])
    held, states = toys.pairs_held(result)
    assert abs(held - 24) < 1e-9 and abs(states - 600) < 1e-9
    assert toys.pairs_held(result | dict(accuracy=[1] * 5)) == (64, 1600)
    assert abs(toys.pairs_held(result | dict(accuracy=[0.8, 1, 1, 1, 1]))[0] - 2) < 1e-9
    for budget, fitting in ((99, 0), (300, 12), (600, 24), (1200, 24), (5000, 24)):
        with mock.patch.object(toys, "BUDGET", budget):
            assert abs(toys.pairs_in_budget(result) - fitting) < 1e-9, budget
    with mock.patch.object(toys, "BUDGET", 700):
        assert toys.pairs_in_budget(result | dict(state_bytes=[700] * 5)) == held


def test_toys_picture_shows_the_best_variant_of_each_model():
    """In the cells the means over seeds of a model's best variant; beside them how far from guessing to perfect."""
    with tempfile.TemporaryDirectory() as out:
        def leave(kind, measured, **settings):
            cfg = kind(out_dir=out, **settings)
            cfg.folder.mkdir(parents=True)
            (cfg.folder / "result.json").write_text(json.dumps(dict(config=vars(cfg)) | measured))

        assert toys.ability_cells(Path(out)) == {} and toys.picture_abilities(Path(out)) is None
        for lr, seed, share in ((0.001, 1, 0.5), (0.001, 2, 0.7), (0.002, 1, 0.95), (0.002, 2, 0.85)):
            leave(toys.Length, dict(accuracy=[1, 1, share, 0]), task="parity", model="deltanet-beta2", lr=lr, seed=seed)
        leave(toys.Length, dict(accuracy=[1, 1, 1, 9 / 16]), task="recall", model="local")
        leave(toys.RegBench, dict(ood=dict(accuracy=0.75)), model="rope", automata=1000)
        leave(toys.RegBench, dict(ood=dict(accuracy=0.99)), model="rope", automata=100)
        cells = toys.ability_cells(Path(out))
        assert list(cells) == ["local", "global", "deltanet-beta2"]
        assert cells["local"] == {"recall": (9 / 16, 0.5)} and cells["global"] == {"regbench": (0.75, 0.5)}
        number, share = cells["deltanet-beta2"]["parity"]
        assert abs(number - 0.9) < 1e-12 and abs(share - 0.8) < 1e-12
        status, text, _ = call(lambda argv: toys.picture_abilities(Path(out)))
        assert Path(out, "abilities.png").read_bytes()[:4] == b"\x89PNG" and "abilities.png" in text
    assert [analyze.level(share)[0] for share in (1, 0.9, 0.89, 0.3, 0.29, -1)] == ["solved", "solved", "partly", "partly", "not", "not"]
    figure = analyze.ability_figure({"a": {"x": (0.5, 0.5)}, "b": {"y": (17.2, 1.0)}}, {"x": "X", "y": "Y"})
    texts = {(t.get_position(), t.get_text()) for t in figure.axes[0].texts}
    to_hex = analyze.matplotlib.colors.to_hex
    colours = {tuple(round(v + 0.48) for v in p.get_xy()): to_hex(p.get_facecolor()).upper() for p in figure.axes[0].patches}
    assert texts == {((0, 0), "0.50"), ((1, 1), "17")} and colours == {(0, 0): "#9CCBE6", (1, 1): "#0072B2"}


def test_toys_capacity_reports_the_best_learning_rate_of_each_width():
    def result(width, lr, seed, *accuracy):
        cfg = toys.Length(task="capacity", model="deltanet", n_embd=width, lr=lr, seed=seed)
        return dict(config=vars(cfg), lengths=cfg.tested_lengths(), accuracy=list(accuracy), state_bytes=[64 * width] * 6, parameters=1,
                    far_accuracy=None, by_distance=[], cpu_seconds=1)

    low, high = (1, 0.5, 0.5, 0.5, 0.5, 0.5), (1, 1, 1, 1, 0.8, 0.5)
    results = [result(32, 0.1, 1, *low), result(32, 0.1, 2, *high), result(32, 0.2, 1, *high), result(32, 0.2, 2, *low),
               result(64, 0.1, 1, *high)]
    with tempfile.TemporaryDirectory() as out:
        status, text, err = call(lambda argv: print(toys.report_task("capacity", results, Path(out))))
        assert Path(out, "capacity.png").is_file()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| deltanet")]
    assert [(row[1], row[-7]) for row in rows] == [("deltanet, lr=0.2, n_embd=32", "26"), ("deltanet, lr=0.1", "48")]


def test_toys_pairs_train_and_test_at_every_number_of_pairs():
    cfg = toys.Length(task="mqar", model="deltanet-steps2", **TOY_SHAPE, test_rows=2, batch_size=2)
    assert [n // 4 for n in cfg.trained_lengths()] == [4, 8, 16, 32, 64] and [n // 4 for n in cfg.tested_lengths()] == [4, 8, 16, 32, 64, 128]
    assert cfg.architecture().delta_steps == 2 and not cfg.architecture().token_shift
    with recorded(fit=five_batches) as calls:
        result = toys.length_job(cfg)
    assert [x.size(1) for x, _ in calls["fit"][0][1]] == [16, 32, 64, 128, 256] and len(result["accuracy"]) == 6


def test_toys_same_seed_same_data():
    for task in toys.TASKS:
        a, b, c, d = (toys.length_batch(task, 3, 40, *s) for s in ((1, 5), (1, 5), (2, 5), (1, 6)))
        assert all(map(torch.equal, a, b)) and not torch.equal(a[0], c[0]) and not torch.equal(a[0], d[0])
    one, same, other = (toys.moons_batch(7, toys.Moons(seed=s))[0] for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    automata = toys.draw_automata(2, [5])[0]
    one, same, other = (toys.Instances(automata, s, 64).x for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


# ---------------------------------------------------------------- moons

def test_toys_moons_never_train_on_the_validation_ratios():
    for heads in (1, 3):
        rng = np.random.default_rng(0)
        for _ in range(3000):
            p = sorted(int(v) for v in toys.draw_periods(rng, toys.Moons(heads=heads)))
            assert (p[0] * 2, p[0] * 3) != (p[1], p[2]), p
            assert heads == 3 or 40 <= math.lcm(*p) <= 126
    assert toys.VALIDATION not in toys.PUBLISHED and len(set(toys.PUBLISHED)) == 8


def moons_solution(heads, scale=6.0):
    """The paper's analytic solution: identity matrices, here with a narrower kernel."""
    net = toys.MoonsNet(toys.Moons(heads=heads))
    with torch.no_grad():
        for w in (net.phi, net.psi, net.z):
            w.zero_()
            w[range(3), range(3), 0] = 1.0
        net.phi *= scale
    return net


def test_toys_moons_identity_solves_it_when_the_orbits_are_known():
    periods = np.array([[8, 12, 20]] * 4)         # lcm 120
    x = toys.orbits(np.random.default_rng(1), periods, 200)
    assert torch.allclose(x.abs(), torch.ones(4, 200, 3)) and torch.allclose(x[:, 0], x[:, 120], atol=1e-4)
    three = moons_solution(3).rollout_error(x, [7, 19, 21, 100, 130], 25)
    one = moons_solution(1).rollout_error(x, [21, 100, 121, 130], 25)
    assert three[2:].max() < 0.01 and three[0] > 0.3 and 0.1 < three[1] < three[0], three
    assert one[:2].min() > 0.3 and one[2:].max() < 0.01, one


def test_toys_moons_is_strictly_causal():
    """The prediction of x_42 is that of the definition written out: it reads values that peek one step, but not x_42."""
    net = moons_solution(3)
    x = toys.orbits(np.random.default_rng(1), np.array([[8, 12, 20]]), 60)
    x[:, 40:] = torch.exp(1j * torch.rand(1, 20, 3) * 6)
    alone = torch.zeros(1), torch.tensor([40])    # no sharpening; of x_2, x_3, … x_42 alone counts
    expected = net_prediction(net, x[:, :42])
    with mock.patch.object(toys, "LOSS_CLIP", 100.0):
        for sign in (1, -1):                      # the same prediction, whatever x_42 is
            x[:, 42] *= sign
            loss = net(x[:, :43], *alone).item()
            assert abs(loss - torch.view_as_real(expected - x[0, 42]).square().mean().item()) < 1e-5
    with mock.patch.object(toys, "LOSS_CLIP", loss / 2):
        assert abs(net(x[:, :43], *alone).item() - loss / 2) < 1e-6


def net_prediction(net, x):
    """The next observation after x (1,n,3), by the definition written out."""
    phi, psi, z = net.matrices()
    n, D = x.size(1), 6 // net.cfg.heads
    with torch.no_grad():
        k = torch.view_as_real(x[0] @ phi.T).reshape(n, net.cfg.heads, D)
        v = torch.view_as_real(x[0] @ psi.T).reshape(n, net.cfg.heads, D)
        y = torch.zeros(net.cfg.heads, D)
        for h in range(net.cfg.heads):
            weight = (net.cfg.beta * (k[:n - 1, h] @ k[n - 1, h])).softmax(0)
            y[h] = weight @ v[1:, h]
        return torch.view_as_complex(y.reshape(3, 2)) @ z.T


def test_toys_disentangled_needs_one_moon_a_head_everywhere():
    eye, swap = torch.eye(3), torch.eye(3)[[1, 0, 2]]
    assert toys.disentangled(swap, swap, swap.T)[0] and toys.disentangled(3 * eye, 2 * eye, eye)[0]
    assert not toys.disentangled(swap, eye, eye)[0]                       # keys of one moon, values of another
    cycle = torch.eye(3)[[1, 2, 0]]
    assert toys.disentangled(cycle, cycle, cycle.T)[0] and not toys.disentangled(cycle, cycle, cycle)[0]
    assert not toys.disentangled(torch.eye(3)[[0, 0, 2]], torch.eye(3)[[0, 0, 2]], torch.eye(3)[[0, 0, 2]].T)[0]
    ok, share = toys.disentangled(eye, eye + 0.3 * (1 - eye), eye)
    assert not ok and abs(share - 1 / 1.18) < 1e-5


def test_toys_moons_converges():
    with tempfile.TemporaryDirectory() as out:
        status, text, err = call(toys.main, "moons", "--heads=3", "--T=160", "--skip=60", "--steps=220", "--sequences=16",
                                 "--jobs=1", f"--out_dir={out}")
        result = json.loads(Path(out, "moons", "3-steps=220-T=160-skip=60-sequences=16-s1", "result.json").read_text())
        assert status == 0 and {p.name for p in Path(out).glob("*.png")} == {"moons.png", "moons-matrices.png"}, err
    first, _, _, known, _ = result["stairs"]
    assert result["disentangled"] and first > 0.5 and known < 0.08, (result["smallest_share"], result["stairs"])
    assert f"{first:.3f} |" in text and "1/1" in text
    assert np.hypot(*np.array(result["matrices"][0]).transpose(2, 0, 1)).max() > math.exp(1.2)  # keys hold the sharpening


# ---------------------------------------------------------------- runs and reports

def test_toys_bad_flags_are_one_line():
    for argv, *words in (("recal", "recall"), ("moons --hedas=1", "--heads"), ("moons --steps=many", "whole number"),
                         ("moons --heads=2", "expected one of 1, 3"), ("recall --model=deltanets", "deltanet"),
                         ("regbench --n_embd=63", "n_head"), ("moons --seeds=0", "seeds"), ("copy --task=x", "--task"),
                         ("moons --skip=300", "skip", "T=256"), ("regbench --seed=1", "--seeds"), ("--nonsense", "--nonsense"),
                         ("recall --seeds=1,2", "--seeds: expected one value; --seeds=N runs the seeds 1 to N"),
                         ("moons --out_dir=a,b", "--out_dir: expected one value"), ("moons --lr=nan", "lr"), ("rmt", "expected a toy"),
                         ("recall --model=rmt --window=24", "window=24"), ("moons --sharpen=-2", "sharpen"),
                         ("moons --optimizer=muon", "adamw"), ("moons --dtype=bfloat16", "float32"),
                         ("regbench --model=ropes", "did you mean rope?")):
        with mock.patch.object(toys, "run_all", side_effect=AssertionError(f"{argv}: training starts")):
            refused(toys.main, argv.split(), *words)


def test_toys_names_of_models_are_conditions_and_local_means_local_in_the_last_layer_too():
    for name, settings in toys.LENGTH_MODELS.items():
        assert analyze.condition(settings).split()[0] == (name if name not in toys.DELTANETS else "deltanet")
    assert [toys.Length(model="local").architecture().window_of(i) for i in range(2)] == [16, 16]
    assert toys.Length(model="global").architecture().window_of(1) is None
    changed = [toys.Moons(heads=heads, lr=lr) for heads, lr in ((1, 0), (3, 0.03), (3, 0.01))]
    settings, shared = toys.grouped(toys.Moons, [dict(config=vars(replace(cfg, T=300))) for cfg in changed + changed[:1]])
    assert [(s.name, len(s.runs)) for s in settings] == [("1 head", 2), ("3 heads", 1), ("3 heads, lr=0.01", 1)]
    assert shared == " (all with T=300)"


def test_toys_workers_side_by_side_leave_results_picture_and_table_and_finished_runs_are_skipped():
    with tempfile.TemporaryDirectory() as out:
        flags = ["recall", "--model=local,deltanet", "--seeds=2", "--steps=2", "--n_embd=16", "--test_rows=4", "--T=32", "--jobs=2",
                 f"--out_dir={out}"]
        assert [(c.model, c.seed) for c in toys.plan(flags)] == [("local", 1), ("local", 2), ("deltanet", 1), ("deltanet", 2)]
        done = subprocess.run([sys.executable, toys.__file__, *flags], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert "4/4  recall-" in done.stdout and "[recall-" not in done.stdout.split("4/4")[1] and "skipped" not in done.stdout
        made = sorted(Path(out, "length").glob("*/result.json"))
        results = [json.loads(path.read_text()) for path in made]
        made[0].unlink()
        status, text, err = call(toys.main, *flags, "--jobs=1")
        assert status == 0 and "3 of 4 runs are finished already" in text, err
        assert json.loads(made[0].read_text())["accuracy"] == results[0]["accuracy"]  # a function of the settings alone
        assert Path(out, "recall.png").read_bytes()[:4] == b"\x89PNG"
    assert "| deltanet | 0." in text and "T = 32 (all with steps=2, T=32, n_embd=16, test_rows=4)" in text and "local 0." in text
    r = results[0]
    assert len(made) == 4 and made[0].parent.name == r["name"] and (r["toy"], r["config"]["model"], r["seed"]) == ("length", "deltanet", 1)
    assert r["lengths"] == [32, 64, 128, 256] and all(0 <= a <= 1 for a in r["accuracy"])
    assert r["state_bytes"][0] == r["state_bytes"][-1]  # the delta rule's state does not grow
    assert sum(b["asked"] for b in r["by_distance"]) > 0


def test_toys_length_counts_the_last_tokens_and_all_distances():
    """Every answer is 0. One model gives it but in the last T tokens, the other only there."""
    def batch(task, rows, T, *seed):
        return torch.zeros(rows, T, dtype=torch.int64), torch.zeros(rows, T, dtype=torch.int64), torch.arange(1, T + 1).expand(rows, T)

    cfg = toys.Length(T=32, test_rows=2, window=16)
    for wrong_at_the_end in (True, False):
        def stream(x):
            at_the_end = torch.arange(x.size(1)) >= x.size(1) - cfg.T
            return F.one_hot((at_the_end == wrong_at_the_end).long().expand(x.shape), 2).float(), None
        with recorded(length_batch=batch):
            r = toys.measure_length(SimpleNamespace(stream=stream), cfg)
        assert r["accuracy"] == [0.0 if wrong_at_the_end else 1.0] * 4
        assert [b["distance"] for b in r["by_distance"]] == [[1, 15], [16, 31], [32, 63], [64, 127], [128, 255]]
        assert [b["asked"] for b in r["by_distance"]] == [30, 32, 64, 128, 256]
        assert [round(b["accuracy"], 3) for b in r["by_distance"]] == ([1, 1, 1, 1, 0.758] if wrong_at_the_end else [0, 0, 0, 0, 0.242])
        assert abs(r["far_accuracy"] - (193 if wrong_at_the_end else 32) / 225) < 1e-6


def test_toys_length_tests_on_rows_that_were_not_trained_on():
    with recorded(length_batch=toys.length_batch, fit=five_batches) as calls:
        toys.length_job(toys.Length(T=32, batch_size=8, test_rows=8, **TOY_SHAPE))
    trained = {tuple(row) for x, _ in calls["fit"][0][1] for row in x.tolist()}
    tested = [x for _, (x, _, _) in calls["length_batch"][5:]]
    assert len(trained) == 40 and [x.shape for x in tested] == [(8, T) for T in (32, 64, 128, 256)]
    assert not trained & {tuple(row) for row in tested[0].tolist()}


def test_toys_regbench_trains_on_every_automaton_once_an_epoch_and_tests_on_others():
    cfg = toys.RegBench(automata=10, T=24, test_automata=4, batch_size=4, **TOY_SHAPE)
    with recorded(Instances=toys.Instances, fit=five_batches) as calls:
        result = toys.regbench_job(replace(cfg, steps=5))
    made = calls["Instances"]
    rows = [tuple(row) for x, _ in calls["fit"][0][1] for row in x.tolist()]
    assert len(rows) == 20 and len(set(rows[:10])) == 10 and set(rows[:10]) == set(rows[10:])
    assert set(result) == {"ood", "valid", "iid", "parameters"}

    # By their seeds these are ood, valid, training and iid. All are the languages of one draw, without a repetition.
    ood, valid, trained, iid = ({repr(a) for a in automata} for (automata, _, _), _ in sorted(made, key=lambda made: made[0][1]))
    assert (len(ood), len(valid), len(trained), len(ood | valid | trained)) == (4, 4, 10, 18) and iid < trained
    assert len({seed for (_, seed, _), _ in made}) == 4  # iid has other strings of these automata


def test_toys_regbench_report_chooses_on_the_validation_automata():
    def result(lr, valid, ood):
        scores = {name: dict.fromkeys(toys.METRICS, value) for name, value in (("valid", valid), ("ood", ood), ("iid", 0.5))}
        return dict(scores, config=vars(toys.RegBench(model="mosaic", automata=100, T=24, test_automata=4, lr=lr)), parameters=1)

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()) as text:
        results = [result(0.001, 0.6, 0.9), result(0.002, 0.8, 0.7), result(0.004, 0.7, 0.95)]
        for order in (results, results[::-1]):
            (experiment, said, here), = toys.report_regbench(order, Path(out))
            assert experiment == "regbench, mosaic, lr=0.002, 100 automata" and here == "0.700 / 0.700" and "0.925 / 0.57" in said
        assert json.loads(Path(out, "regbench", "baselines.json").read_text())["ood"].keys() >= {"uniform", "3-gram"}
        assert Path(out, "regbench.png").read_bytes()[:4] == b"\x89PNG" and "RetNet 0.876" in text.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# analyze.py: the statistics against hand-worked numbers and scipy, the reader against broken files

LN2 = math.log(2)


def result(memory="none", window="SSSL", seed=1, bpb=1.0, T=512, curve=None, **more):
    """A result file as train.py writes it; `curve`: bpb per 64-token bucket (default flat)."""
    curve = [bpb] * (T // 64) if curve is None else list(curve)
    nbytes = [1000.0] * len(curve)
    nats = [b * LN2 * n for b, n in zip(curve, nbytes)]
    config = {"memory": memory, "window": window, "max_seq_len": T, "memory_layers": "all", "lr": 0.01, "rmt_tokens": 16,
              "seed": seed, "device": "cpu", "log_every": 10, **more.pop("config", {})}
    return {"memory": memory, "window": window, "preset": "laptop", "seed": seed, "max_seq_len": T, "config": config,
            "dataset": "python", "data_sha256": "ab", "val_bpb": bpb, "val_loss": bpb, "train_tokens": 1_000_000,
            "total_params": 1_000_000, "memory_params": 0, "flops_per_token": 6e6, "state_bytes": 65536,
            "total_time_min": 3.0, "tokens_per_second": 5000.0, "peak_vram_mib": None, "device": "cpu", "versions": {},
            "bpb_by_position": {"bucket": 64, "positions": list(range(0, 64 * len(curve), 64)), "nats": nats, "bytes": nbytes,
                                "bpb": curve}, **more}


def write(folder, name, content):
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def cells_of(*results, by=()):
    with tempfile.TemporaryDirectory() as d:
        for i, r in enumerate(results):
            write(d, f"{i:03}/result.json", r)
        runs, skipped, _ = analyze.read_all([d])
        assert not skipped, skipped
        return analyze.make_cells(runs, by)


def rows_of(table):
    """A table's cells as texts, line by line, without the title and the line of dashes."""
    lines = [line for line in table.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_condition_has_one_name_and_one_look():
    names = ("memory", "window", "memory_layers", "rmt_tokens")
    cases = {(): "local", ("none", "L"): "global", ("none", "SL"): "local SL", ("rmt",): "rmt", ("rmt", "L"): "rmt L",
             ("rmt", "SSSL", "all", 0): "rmt-0", ("rmt", "SL", "all", 0): "rmt-0 SL", ("ttt", "L"): "ttt",
             ("knn", "S", "all", 0): "knn", ("deltanet", "SSSL", "1+3"): "deltanet@1+3", ("mosaic", "S", "1"): "mosaic@1 S",
             ("persistent", "L"): "persistent L", ("persistent-32",): "persistent-32", ("rmt-m16-s512",): "rmt-m16-s512"}
    assert {case: analyze.condition(dict(zip(names, case))) for case in cases} == cases
    bases = [analyze.base_name(name) for name in cases.values()]
    assert " ".join(bases) == "local global local rmt rmt rmt-0 rmt-0 ttt knn deltanet mosaic persistent persistent rmt"
    looks = {name: tuple(analyze.look(name).values()) for name in [*bases, "anything"]}
    assert len(set(looks.values())) == len(looks) == 10 and looks["rmt"] == tuple(analyze.look("rmt@1 S").values())
    assert set(analyze.LOOKS) == set(analyze.CONDITIONS) and set(MEMORIES) - {"none"} <= set(analyze.LOOKS)


def test_table_is_aligned_markdown():
    text = analyze.table(["name", "x", "n"], [["a longer name", 1 / 3, None], ["b", 12.0, 7]])
    assert text.splitlines() == ["| name          |       x |   n |", "| ------------- | ------: | --: |",
                                 "| a longer name |  0.3333 |   - |", "| b             | 12.0000 |   7 |"]
    assert analyze.table(["a", "b"], [["x", "y"]], left=2).splitlines()[1] == "| --- | --- |"
    assert analyze.table(["a"], []) == "" and text.endswith("|\n")


def test_paired_uses_only_shared_seeds():
    p = analyze.paired({1: 1.0, 2: 2.0, 3: 4.0, 9: 99.0}, {3: 3.0, 2: 1.5, 1: 0.9, 7: -50.0})
    assert p.seeds == [1, 2, 3] and np.allclose(p.diffs, [0.1, 0.5, 1.0])
    ref = stats.ttest_rel([1.0, 2.0, 4.0], [0.9, 1.5, 3.0])
    assert math.isclose(p.p_t, ref.pvalue) and math.isclose(p.mean, 1.6 / 3)
    assert np.allclose((p.lo, p.hi), ref.confidence_interval(0.95))
    assert abs(p.hi - p.mean - 1.12016) < 1e-4               # by hand: sd 0.45092, t(2) = 4.30265
    few = analyze.paired({1: 1.0, 2: 2.0, 3: 9.0}, {1: 1.0, 2: 2.5})
    assert few.seeds == [1, 2] and math.isnan(few.mean) and math.isnan(few.p_flip)
    same = analyze.paired({1: 2.0, 2: 3.0, 3: 4.0}, {1: 1.0, 2: 2.0, 3: 3.0})
    assert math.isnan(same.p_t) and same.mean == 1.0 and same.p_flip == 0.25


def test_sign_flip_is_exact():
    assert analyze.sign_flip([1.0, 2.0, 3.0]) == 0.25                    # 2 of 8: all + and all -
    assert analyze.sign_flip([1.0, 2.0, 3.0, -1.0]) == 6 / 16            # |sum| >= 5: hand-counted
    assert analyze.sign_flip([0.1, 0.2, 0.3, -0.3, -0.3]) == 1.0         # a sum of 0, but for rounding, is always reached
    x = np.random.default_rng(1).normal(0.4, 1, 9)
    ref = stats.permutation_test((x,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert math.isclose(analyze.sign_flip(x), ref.pvalue)
    big = np.random.default_rng(2).normal(0.3, 1, 30)                    # drawn signs, not all of them
    assert abs(analyze.sign_flip(big) - stats.ttest_1samp(big, 0).pvalue) < 0.02
    assert 0 < analyze.sign_flip(np.ones(40)) < 1e-4


def test_holm():
    assert analyze.holm([]) == []
    assert np.allclose(analyze.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert np.allclose(analyze.holm([0.5, 0.9, 0.8]), [1.0, 1.0, 1.0])
    got = analyze.holm([0.02, math.nan, 0.01])                           # a test not made is not in the family
    assert np.allclose([got[0], got[2]], [0.02, 0.02]) and math.isnan(got[1])
    # in the table each kind of test has its own correction, in brackets
    noise = np.random.default_rng(0).normal(0, 0.01, (6, 4))
    conditions = [("none", "SSSL", 1.0), ("none", "L", 0.99), ("ttt", "SSSL", 0.9), ("knn", "SSSL", 1.001)]
    runs = [result(m, w, seed, bpb + noise[seed, i]) for i, (m, w, bpb) in enumerate(conditions) for seed in range(6)]
    rows = rows_of(analyze.mechanism_table(cells_of(*runs)[0]))
    assert len(rows) == 5
    for column in (5, 6):
        raw, adjusted = zip(*(map(float, row[column].strip(")").split(" (")) for row in rows))
        assert np.allclose(analyze.holm(raw), adjusted, rtol=0.02), (column, rows)


def test_closure_edges():
    ratio, lo, hi = analyze.closure([2.0, 2.2, 1.8, 2.0], [4.0, 4.1, 3.9, 4.0])
    assert math.isclose(ratio, 0.5) and lo < 0.5 < hi
    assert analyze.closure([1.0, 1.0], [2.0, 2.1]) == analyze.NOT_ENOUGH
    # the interval of D holds 0; global clearly worse than local; mean 4 ± 4.97, though every ratio is 1/2
    for G, D in (([1.0] * 3, [-0.1, 0.1, 0.3]), ([1.0] * 3, [-2.0, -2.1, -1.9]), ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])):
        assert analyze.closure(G, D) == "undefined", D
    assert np.allclose(analyze.closure([30.0, 31.0, 32.0], [60.0, 62.0, 64.0]), (0.5, 0.5, 0.5))
    # constant D: the ratio is a mean, and the interval has to be its t interval
    G = np.array([1.0, 1.5, 1.2, 0.9, 1.6])
    assert np.allclose(analyze.closure(G, np.full(5, 2.0)), np.array(analyze.t_interval(G)) / 2, rtol=0.03)


def test_bootstrap_coverage():
    """The 95% interval of a known closure, on simulated seeds that share the noise of their local run."""
    for n in (3, 5, 8):
        rng, hits = np.random.default_rng(n), []
        for _ in range(400):
            noise, of_memory, of_full = rng.normal(0, 0.08, (3, n))
            _, lo, hi = analyze.closure(0.5 + noise + of_memory, 1.0 + noise + of_full, resamples=500)
            hits.append(lo <= 0.5 <= hi)
        assert 0.91 <= np.mean(hits) <= 0.985, (n, np.mean(hits))


def test_null_correlation():
    """Three independent noises: r is near 0.5, the null says so, and split seeds see nothing."""
    rng = np.random.default_rng(0)
    answers = []
    for _ in range(40):
        r, null, split = analyze.gain_deficit(*rng.normal(size=(3, 4, 64)))
        assert len(null) == 7                                            # 2^(4-1) choices of signs, less the zero one
        answers.append((r, np.mean(null), split))
    assert np.allclose(np.mean(answers, 0), (0.5, 0.5, 0), atol=0.05)
    # a memory that really wins where the window loses is seen by both
    shape = np.linspace(0, 3, 64)
    L, M, F = rng.normal(0, 0.3, (3, 4, 64))
    r, null, split = analyze.gain_deficit(L + shape, M + 0.3 * shape, F)
    assert split > 0.75 and r > max(null) + 0.2 and abs(np.mean(null) - 0.5) < 0.1   # the null holds no trace of it
    # and one that is better everywhere alike is not taken for it
    r, null, split = analyze.gain_deficit(L, M - 1.0, F)
    assert abs(split) < 0.3 and abs(r - np.mean(null)) < 0.3
    assert math.isnan(analyze.corr([1.0, 1.0], [1.0, 2.0]))


def test_numbers_are_short():
    assert [analyze.human(x) for x in (0, 0.5, 999.4, 999.9, 12345, 999_600, 2_097_176, -4000, 1e25)] == [
        "0", "0.5", "999", "1k", "12.3k", "1M", "2.1M", "-4k", "1e+04Z"]


def test_pareto():
    points = [(1, 5), (2, 4), (3, 4), (2, 6), (4, 1), (4, 1), (0.5, 9), (5, 0.5)]
    assert analyze.pareto(points) == [0, 1, 4, 5, 6, 7]                  # (3,4) loses to (2,4), (2,6) to (1,5); ties stay
    cloud = np.random.default_rng(0).normal(size=(60, 2)).tolist()
    best, low = set(), math.inf
    for i in sorted(range(60), key=lambda i: cloud[i]):                  # the other way: sort by cost, keep new minima
        if cloud[i][1] < low:
            best, low = best | {i}, cloud[i][1]
    assert set(analyze.pareto(cloud)) == best


def test_matched_compute():
    log = [{"step": s, "seconds": 60.0 * s, "tokens": 1000 * s, "val_bpb": b} for s, b in ((1, 3.0), (4, 2.0), (16, 1.0))]
    log += [{"step": 17, "train_loss": 1.0}, {"step": 18, "tokens": 18000, "seconds": None, "val_bpb": math.nan}]
    twice = [dict(e, seconds=2 * e["seconds"]) for e in log[:2]]
    fast = [result(seed=s, bpb=1.0, log=log) for s in (1, 2, 3)]
    slow = [result("ttt", seed=s, bpb=1.5, log=twice) for s in (1, 2, 3)]
    cells, _ = cells_of(*fast, *slow)
    run = cells[0].runs[1]
    assert analyze.at_budget(run, "minutes", 4.0) == 2.0 and math.isclose(analyze.at_budget(run, "minutes", 8.0), 1.5)
    assert math.isclose(analyze.at_budget(run, "flops", 6e6 * 2000), 2.5)
    assert math.isnan(analyze.at_budget(run, "minutes", 17.0)) and math.isnan(analyze.at_budget(run, "minutes", 0.5))
    # the common budgets are what ttt reached: 4000 tokens (both at 2.0) and 8 minutes (1.5 against 2.0)
    assert [row[1:] for row in rows_of(analyze.matched_table(cells)) if row[2] == "ttt"] == [
        ["24G FLOPs", "ttt", "3", "2.00000", "local", "+0.00 [+0.00, +0.00]"],
        ["8 minutes", "ttt", "3", "2.00000", "local", "+500.00 [+500.00, +500.00]"]]
    assert analyze.matched_table(cells_of(result(), result("ttt"))[0]) == ""      # no log: no table
    late, _ = cells_of(*fast, *slow, result("knn", bpb=1.0, log=log[2:]))         # none of it within the budget: said, not left out
    knn = [row[3:5] for row in rows_of(analyze.matched_table(late)) if row[2] == "knn"]
    assert knn == [["0", "first evaluated later"]] * 2


def test_cells_pairs_and_repeats():
    runs = [result(seed=s, bpb=1 + s / 100) for s in (1, 2, 3)] + [result(window="L", seed=s, bpb=0.9) for s in (2, 3, 4, 5)]
    runs += [result(seed=2, bpb=0.5)]                                    # seed 2 again, and better: must not count
    cells, repeats = cells_of(*runs)
    assert [(c.label, sorted(c.runs)) for c in cells] == [("local", [1, 2, 3]), ("global", [2, 3, 4, 5])]
    assert cells[0].runs[2].bpb == 1.02 and len(repeats) == 1 and "520.00 mBPB" in repeats[0]
    assert analyze.paired(cells[0].bpb(), cells[1].bpb()).seeds == [2, 3]
    assert rows_of(analyze.mechanism_table(cells)) == [["512", "global", "local", "2", analyze.NOT_ENOUGH, "-", "-"]]


def test_mixed_cell_is_an_error():
    mixtures = ((dict(config={"lr": 0.02}), ("lr is 0.01", "0.02", "--by=lr")), (dict(data_sha256="cd"), ("data_sha256",)),
                (dict(train_tokens=5), ("train_tokens",)))
    for other, words in mixtures:
        raises(analyze.UserError, lambda: cells_of(result(seed=1), result(seed=2, **other)), *words)
    cells, _ = cells_of(result(seed=1), result(seed=2, config={"lr": 0.02}), by=["lr"])
    assert [c.label for c in cells] == ["local lr=0.01", "local lr=0.02"]
    # what says only how it was run, belongs to another memory, or is a pattern that no layer follows, is no mixture
    for memory, other in (("none", {"device": "cuda", "log_every": 1, "rmt_tokens": 0}), ("ttt", {"window": "L"})):
        cells, _ = cells_of(result(memory, seed=1), result(memory, seed=2, config=other))
        assert len(cells) == 1 and len(cells[0].runs) == 2
    # RMT without memory tokens is RMT's own baseline, not a mixture
    cells, _ = cells_of(*(result("rmt", seed=s, config={"rmt_tokens": m}) for s in (1, 2, 3) for m in (0, 16)))
    assert [c.label for c in cells] == ["rmt", "rmt-0"]
    assert [row[1:4] for row in rows_of(analyze.mechanism_table(cells))] == [["rmt", "rmt-0", "3"]]


def test_baseline_is_the_most_similar():
    cells, _ = cells_of(*(result(m, seed=s, config={"n_layer": n}) for m in ("none", "ttt") for s in (1, 2, 3) for n in (2, 4)),
                        by=["n_layer"])
    ttt4 = next(c for c in cells if c.label == "ttt n_layer=4")
    assert analyze.baseline(ttt4, cells, "local").label == "local n_layer=4"
    unequal, _ = cells_of(result(seed=1), result("ttt", seed=1, config={"lr": 0.5}))
    assert "\n- ttt and local: lr\n" in analyze.mechanism_table(unequal)


def test_buckets_recombine():
    rng = np.random.default_rng(0)
    nats, nbytes = rng.uniform(50, 300, 8), rng.integers(50, 400, 8).astype(float)
    nbytes[3], nats[3] = 0, 0                                            # a bucket of special tokens only
    d = {"positions": list(range(0, 512, 64)), "nats": nats.tolist(), "bytes": nbytes.tolist(), "bpb": [0.0] * 8}
    curve, n_bytes, total = analyze.read_curve(d)
    assert math.isclose(total, nats.sum() / LN2 / nbytes.sum()) and 192 not in curve and len(curve) == len(n_bytes) == 7
    values = list(curve.values())
    assert math.isclose(total, np.average(values, weights=n_bytes)) and abs(total - np.mean(values)) > 1e-3
    for last, words in ((1.25, "recombine to val_bpb."), (1.30, "do not recombine")):
        cells, _ = cells_of(*(result(bpb=1.0, seed=s, curve=[1.5, 0.5, 0.75, last]) for s in (1, 2)))
        assert words in analyze.recombination(cells)


def test_position_deficit_gain_closure():
    """D = 0.2 and G = 0.1 in the second half, with a small seed noise in all three: closure is 0.5."""
    rng, runs = np.random.default_rng(0), []
    for s in range(1, 6):
        for memory, window, level in (("none", "SSSL", 1.2), ("none", "L", 1.0), ("ttt", "SSSL", 1.1)):
            runs.append(result(memory, window, s, curve=np.array([1.0] * 4 + [level] * 4) + rng.normal(0, 1e-4, 8)))
    runs.append(result("ttt", seed=6))                                   # no partner: left out
    cells, _ = cells_of(*runs)
    (c, positions, L, M, F), = analyze.position_curves(cells)
    assert c.label == "ttt" and L.shape == M.shape == F.shape == (5, 8) and positions == list(range(0, 512, 64))
    (row,) = rows_of(analyze.position_table(cells))
    D, G, share = (float(x.split(" ")[0]) for x in row[3:6])
    assert row[2] == "5" and abs(D - 100) < 0.2 and abs(G - 50) < 0.2 and share == 0.5, row
    runs[2] = result("ttt", seed=1, curve=[1.0] * 8)                     # measured on other tokens: doesn't compare
    runs[2]["bpb_by_position"].update(bytes=[999.0] * 8)
    (_, _, L, M, F), = analyze.position_curves(cells_of(*runs)[0])
    assert L.shape == (4, 8)


def test_broken_files_are_named_skipped_and_counted():
    short = {"positions": [0, 64], "nats": [1.0], "bytes": [1, 1]}
    bad = {"cut": json.dumps(result())[:200], "empty": "", "list": "[1, 2]", "nothing": "{}", "noseed": result(seed=None),
           "nobpb": {k: v for k, v in result().items() if k != "val_bpb"}, "nan": result(bpb=math.nan, curve=[1.0]),
           "text": result() | {"val_bpb": "1.0"}, "lengths": result() | {"bpb_by_position": short},
           "curve": result() | {"bpb_by_position": {"x": 1}}, "config": result() | {"config": 3}, "binary": ""}
    with tempfile.TemporaryDirectory() as d:
        for s in (1, 2, 3):
            write(d, f"a/{s}/result.json", result(seed=s))
        for name, content in bad.items():
            write(d, f"bad/{name}/result.json", content)
        Path(d, "bad/binary/result.json").write_bytes(b"\xff\xfe\x00{")
        # no errors: JSON of another kind, what eval.py measured on a run already read, a toy's result
        write(d, "other.json", {"hello": 1})
        write(d, "a/1/eval_bpb.json", result(seed=9))
        write(d, "toy/result.json", result(seed=9) | {"toy": "length"})
        status, out, err = call(analyze.main, d, f"--out={d}/report")
        text = Path(d, "report/REPORT.md").read_text()
        assert status == 1 and f"{len(bad)} files skipped" in out, (status, out, err)
        for name in bad:
            assert f"bad/{name}/result.json: " in err and f"bad/{name}/result.json: " in text, name
        assert "3 runs in 1 conditions; 12 files skipped" in text and "3 other JSON files ignored" in text
        assert call(analyze.main, f"{d}/a", f"--out={d}/report")[0] == 0


def test_bad_input_to_analyze_is_one_line():
    with tempfile.TemporaryDirectory() as d:
        write(d, "bad/result.json", "{")
        write(d, "mixed/1/result.json", result(seed=1))
        write(d, "mixed/2/result.json", result(seed=2, config={"lr": 1.0}))
        Path(d, "empty").mkdir()
        write(d, "file", "")
        cases = (([f"{d}/missing"], "missing is not a folder"), ([f"{d}/bad"], "the first of 1 skipped"),
                 ([f"{d}/empty"], "expected <run>/result.json"), ([f"{d}/mixed"], "mixes configurations"),
                 ([f"{d}/mixed", "--colour=red"], "--colour=red"), ([], "folders"),
                 ([f"{d}/mixed", "--by=lr", f"--out={d}/file"], "file"), ([f"{d}/mixed", "--by=lr,n_layers"], "--by=n_layers"))
        for argv, words in cases:
            refused(analyze.main, argv, words)
            assert not call(analyze.main, *argv)[1]
        status, out, _ = call(analyze.main, "--help")
        assert status == 0 and "--by" in out and "--out" in out


def peer(mechanism, seed, bpb, T=None, window=None, level=1.0):
    """memory-bench's schema, as its published files have it."""
    d = {"mechanism": mechanism, "depth": 12, "seed": seed, "val_bpb": bpb, "total_params": 286261730, "memory_params": 0,
         "total_time_min": 5.4 + seed / 100, "peak_vram_mib": 29659.3, "flops_per_step": 398299446116352,
         "total_flops": 1003714604213207040}
    if T:
        d |= {"max_seq_len": T, "window_pattern": window}
    buckets = {f"{i}-{i + 64}": {"center_position": i + 32.0, "bpb": level + i * 1e-6} for i in range(0, T or 2048, 64)}
    return d | {"bpb_by_position": {"task": "bpb_by_position", "buckets": buckets, "overall_mean_bpb": level}}


def test_peer_schema():
    with tempfile.TemporaryDirectory() as d:
        for s in (42, 67, 1337):
            write(d, f"baseline_d12_s{s}.json", peer("baseline", s, 0.84 + s * 1e-6))
            write(d, f"baseline_d12_t2048_wL_s{s}.json", peer("baseline", s, 0.83, 2048, "L", level=0.9))
            write(d, f"persistent_d12_s{s}.json", peer("persistent-32", s, 0.82, level=0.95))
            write(d, f"rmt_d12_s{s}.json", peer(f"rmt-m{32 if s == 67 else 16}-s512", s, 0.88))
        write(d, "baseline_d12_t2048_s42.json", peer("baseline", 42, 0.7, 2048, "SSSL"))
        write(d, "statistical_tests_4seed.json", {"persistent": {"n_pairs": 4}})
        runs, skipped, others = analyze.read_all([d])
        cells, repeats = analyze.make_cells(runs)
        assert not skipped and len(others) == 1 and len(repeats) == 1
        assert [(c.label, c.T, len(c.runs)) for c in cells] == [      # the peer pools the last two
            ("local", 2048, 3), ("global", 2048, 3), ("persistent-32", 2048, 3), ("rmt-m16-s512", 2048, 2),
            ("rmt-m32-s512", 2048, 1)]
        assert list(cells[0].runs[42].curve)[:3] == [0, 64, 128] and cells[0].runs[42].bpb == 0.84 + 42e-6
        assert cells[0].study == ("d12", "memory-bench")
        assert math.isclose(cells[0].runs[42].costs["flops"], 1.003714604213207e18)
        status, _, err = call(analyze.main, d, f"--out={d}/report")
        text = Path(d, "report/REPORT.md").read_text()
        assert status == 0 and "memory-bench" in text and "do not recombine" in text and not err
        assert {p.name for p in Path(d, "report").iterdir()} == {"REPORT.md", "differences.png", "position.png", "pareto.png"}


def test_200_files_without_torch_in_10_seconds():
    """Each file costs little: two hundred are read and summed up at once. Panels are what takes long, so one length has most."""
    rng = np.random.default_rng(0)
    log = [{"step": k, "seconds": k, "tokens": 1000 * k, "val_bpb": 2 - 0.1 * k} for k in range(1, 11)]
    with tempfile.TemporaryDirectory() as d:
        for memory, window in (("none", "SSSL"), ("none", "L"), ("persistent", "SSSL"), ("rmt", "SSSL"), ("mosaic", "L")):
            for T, seed in itertools.product((512, 1024), range(20)):
                content = result(memory, window, seed, 1 + rng.normal(0, 0.01), T, rng.normal(1, 0.01, T // 64), log=log)
                write(d, f"{memory}{window}{T}/{seed}/result.json", content)
        code = ("import sys, analyze; status = analyze.main(sys.argv[1:]); "
                "assert not {'torch', 'triton', 'model', 'data', 'train'} & set(sys.modules); sys.exit(status)")
        start = sum(os.times()[2:4])                                     # of the children's CPU: other work doesn't count
        r = subprocess.run([sys.executable, "-c", code, d, f"--out={d}/report"], cwd=ROOT, capture_output=True, text=True)
        assert r.returncode == 0 and not r.stderr and r.stdout.startswith("200 runs, 10 conditions"), r
        assert sum(os.times()[2:4]) - start < 10, sum(os.times()[2:4]) - start


# ----------------------------------------------------------------------------------------------------------------------
# README.md: its example of a new memory is a memory, what it quotes stands in the code, what it shows exists

def test_readme_example_of_a_new_memory():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(b.split("```")[0] for b in text.split("```python\n")[1:] if "MEMORIES[" in b)
    before = dict(MEMORIES)
    try:
        exec(compile(block, "README.md", "exec"), vars(model))
        (name,) = set(MEMORIES) - set(before)
        LAWS["test_split_and_causality"]("laptop", name)
        LAWS["test_influence"](name, 1)
        LAWS["test_purity"](name)
        LAWS["test_bounded_state"](name)
        LAWS["test_generation_is_the_forward_argmax"](name, "gpt2")
        LAWS["test_every_parameter_learns_and_has_an_optimizer"](name)
    finally:
        for name in set(MEMORIES) - set(before):
            del MEMORIES[name]


def test_readme_quotes_the_code():
    text, quoted = (ROOT / "README.md").read_text(encoding="utf-8"), 0
    for block in text.split("```python\n")[1:]:
        where, _, block = block.split("```")[0].partition("\n")
        if not (found := re.fullmatch(r"# (\w+\.py), ([\w.]+)", where)):
            continue
        scope = importlib.import_module(found[1].removesuffix(".py"))
        for name in found[2].split("."):
            scope = getattr(scope, name)
        code = [line.strip() for line in inspect.getsource(scope).splitlines()]
        for piece in block.strip().split("\n...\n"):
            lines = [line.strip() for line in piece.splitlines()]
            assert any(code[i:i + len(lines)] == lines for i in range(len(code))), f"{where}: {piece}"
            quoted += 1
    assert quoted >= len(MEMORIES)


def test_readme_shows_what_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\((?!http|#)([^)#]+)\)", text) + re.findall(r"`(results/[\w./-]+)`", text)
    assert named and not [name for name in named if not (ROOT / name).exists()], named
    lengths = re.findall(r"`(\w+\.py)` \| ([\d,]+) \|", text)  # of the files, in lines
    assert len(lengths) == 8
    for name, said in lengths:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(int(said.replace(",", "")) - lines) <= 0.05 * lines, (name, said, lines)


def test_readme_is_short_and_narrow():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = [word for word in text.split() if re.search(r"\w", word)]
    assert len(words) <= 2500, len(words)
    prose = "".join(text.split("```")[::2])  # without code
    wide = [line for line in prose.splitlines() if len(line) > 160 and not line.startswith("|")]
    assert not wide, wide


# ----------------------------------------------------------------------------------------------------------------------
# The runner

def run(name):
    """-> (name, outcome, seconds, report), in a worker process"""
    start = time.time()
    try:
        globals()[name]()
        outcome, report = "passed", ""
    except unittest.SkipTest as reason:
        outcome, report = "skipped", str(reason)
    except Exception:  # any failure of a test is its result
        outcome, report = "failed", traceback.format_exc()
    return name, outcome, time.time() - start, report


def main():
    parser = argparse.ArgumentParser(description="Run the tests.")
    parser.add_argument("-k", default="", help="only tests whose name contains this")
    parser.add_argument("-j", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("-x", action="store_true", help="stop at the first failure")
    args = parser.parse_args()
    names = [n for n, f in globals().items() if n.startswith("test_") and callable(f) and args.k in n]
    results, start = [], time.time()
    with ProcessPoolExecutor(args.j, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, name) for name in names]
        for future in as_completed(futures):
            name, outcome, seconds, report = future.result()
            results.append((seconds, name, outcome))
            if outcome == "passed":
                print(".", end="" if len(results) % 100 else "\n", flush=True)
            else:
                print(f"\n{outcome.upper()} {name}: {report}", flush=True)
            if outcome == "failed" and args.x:
                pool.shutdown(cancel_futures=True)
                break
    print("\nslowest: " + ", ".join(f"{name} {seconds:.1f} s" for seconds, name, _ in sorted(results)[:-6:-1]))
    print(f"{time.time() - start:.0f} s on {args.j} processes")
    count = lambda outcome: sum(o == outcome for *_, o in results)
    print(f"{count('passed')} passed, {count('failed')} failed" + f", {count('skipped')} skipped" * (count("skipped") > 0))
    return 1 if count("failed") or not results else 0


if __name__ == "__main__":
    sys.exit(main())
