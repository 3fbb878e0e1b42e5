r"""Toys that show what the memories do: minutes on a laptop, with pictures.

    python toys.py                                  five toys, small: what was seen beside what the papers say
    python toys.py moons --seeds=20                 three moons (Memory Mosaics, section 3): figures 4, 5 and 6
    python toys.py recall --model=floor,deltanet    or brackets, copy, repeat: train short, test up to 8x longer
    python toys.py parity,s3 --seeds=5              or s5, state tracking: the product of all permutations so far
    python toys.py capacity --n_embd=32,64,128      how many pairs, in how many bytes? mqar: each pair is two tokens
    python toys.py regbench --automata=100,1000     random automata: figure 11 and table 4
    python toys.py moons --help                     a toy's flags; commas make a grid, --seeds=N runs seeds 1 to N

Each trained model leaves out/toys/<toy>/<run>/result.json as soon as it is measured, where <toy> is moons, regbench or
length (the nine tasks from brackets to mqar). The same command skips the runs that are there, so an interrupted command
goes on. The figures are PNG files in out/toys/; abilities.png shows all results there at once. Every model is trained
by train.fit.

More commands
    what each change to the moons' recipe buys, and the paper's own recipe (as far as it is known)
        python toys.py moons --heads=3 --seeds=5 --sharpen=0,1.2 --skip=0,100
        python toys.py moons --heads=3 --seeds=5 --lr=0.01
        python toys.py moons --heads=3 --seeds=5 --periods=published --T=800 --steps=500 --lr=0.01 --sharpen=0 --skip=0
    memories and transformers on random automata, figure 11 and table 4 at laptop size: 24 minutes on two cores
        python toys.py regbench --model=mosaic,deltanet,learned,ttt,rope --automata=100,1000 --seeds=2
    capacity as each model does best: the learning rate is chosen by the first seed
        python toys.py capacity,mqar --n_embd=32,64,128 --lr=0.001,0.003,0.006,0.012
    four tasks, every memory: 45 minutes on two cores
        python toys.py brackets,copy,repeat --seeds=3
        python toys.py recall --seeds=5
    the whole of figure 11, for a GPU
        python toys.py regbench --automata=100,500,1000,2500,5000,40000 --model=rope,learned,mosaic,deltanet,ttt \
            --n_layer=2,4,8 --n_embd=64,128,256 --batch_size=64 --steps=8000 --seeds=3

Glossary
    context      observations or tokens that the memory holds when a prediction is made
    distance     how many tokens back the thing is that an answer needs
                 brackets, copy: what it closes or copies, counted from where the answer will stand
                 repeat, recall, capacity, mqar: what it looks up, counted from where it is asked for
                 parity, s3, s5: the first token, counted from where it is asked for
    variant      the runs that differ in nothing but their seed
    TVD          total variation distance between two distributions, half their L1 distance
    IID, OOD     fresh strings of training automata; strings of automata that were never trained on
    rng          a generator of random numbers; whatever is drawn from one is a function of its seed alone

Reading order
    settings              the options of each toy
    reports               runs of one variant together, curves, figures
    moons                 the network, the orbits, the 25-step evaluation
    brackets … mqar       the generators, the table of tasks, accuracy by length, by distance and by bytes of state
    regbench              automata, instances, metrics, in-context n-grams, the published numbers
    the command line      from argv to configurations, and from these to results and reports

References: Memory Mosaics (Zhang et al. 2024, 2405.06394), RegBench (Akyürek et al. 2024, 2401.12973), recall and mqar
(Arora et al. 2023, 2312.04927), state tracking (Grazzi et al. 2024, 2411.12537; s5: Siems et al. 2025, 2502.10297), the
repository memory-architectures (brackets, copying, repeated elements).
"""
import itertools
import math
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial, reduce
from operator import getitem
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import analyze
from data import UserError, did_you_mean
from model import GPT, MEMORIES, Config, attend, option, state_bytes
from train import (FitConfig, changes, check_diverged, check_one_process, checked, count_params, fit, pick_device,
                   read_flags, run_all, run_name, save, save_json, say, sweep_points)

# ----------------------------------------------------------------------------------------------------------------------
# Settings. All configurations check themselves: a value or a combination that cannot be trained raises ValueError.

@dataclass
class Toy(FitConfig):
    """What all toys share, beside the settings of the training loop.

    `toy` is the folder of the results; `begins` names the settings whose bare values begin a run's name.
    """
    compile: str = option("false", "torch.compile; auto = on CUDA under Linux", "run", ("auto", "true", "false"))
    seeds: int = option(1, "how many seeds: 1, 2, … N", "run", low=1)
    jobs: int = option(0, "models trained side by side, one thread each; 0 = one a core, on a GPU one", "run", low=0)
    out_dir: str = option("out/toys", "where results and figures go", "run")
    toy = ""
    begins = ()

    @property
    def name(self) -> str:
        """The name of the run, such as recall-deltanet-lr=0.01-s1."""
        return run_name(self)

    @property
    def folder(self) -> Path:
        """Where the run leaves its result.json."""
        return Path(self.out_dir, self.toy, self.name)

    def usual(self):
        """The configuration whose settings go without saying in a run's name: defaults, except what begins the name."""
        return type(self)(**self.name_begins())

    def name_begins(self) -> dict:
        """The settings whose bare values begin a run's name."""
        return {name: getattr(self, name) for name in self.begins}

    @property
    def title(self) -> str:
        """What tables and figures call it. Moons, which has no `model`, has a title of its own."""
        return self.model

    def identity(self) -> dict:
        """What result.json repeats at its top."""
        return dict(toy=self.toy, name=self.name, seed=self.seed)


# What works best for the moons depends on the number of heads. With one head the length of a key depends on
# where all three moons stand, so that keys are mistaken for each other; such a network has to learn more slowly.
RECIPES = {
    1: dict(lr=0.015, sharpen=2.0, skip=128),
    3: dict(lr=0.03, sharpen=1.2, skip=100),
}
LOSS_CLIP = 0.5  # the largest mean squared error that one observation can cost, as in the paper


@dataclass
class Moons(Toy):
    """Three moons. The recipe departs from the paper's, which takes long and stays above an error of 0.05.

    The sequences are short, and their periods are whole numbers drawn at random. The learning rate is high (RECIPES):
    it brings the error below 0.05 on every seed. Keys grow during training, so that the kernel ends narrow. In the
    later part of the training observations whose memory is still almost empty cost nothing.
    """
    heads: int = option(3, "3 heads of 2 real dimensions, or 1 of 6", "toy", (1, 3))
    T: int = option(256, "observations in a training sequence", "toy", low=16)
    periods: str = option("random", "random: whole numbers; published: the paper's eight triples", "toy",
                          ("random", "published"))
    beta: float = option(50.0, "inverse temperature of the memories", "toy")
    sharpen: float = option(-1.0, "keys end e^sharpen times as long, so the kernel narrows; -1 = 1.2, one head 2",
                            "toy", low=-1)
    skip: int = option(-1, "predictions at a sequence's start that cost nothing, from 30% of the steps on; -1 = 100, "
                       "one head 128", "toy", low=-1)
    sequences: int = option(512, "validation sequences", "toy", low=1)
    optimizer: str = option("adamw", "adamw alone, because the matrices are complex and Muon has no such form",
                            "optimisation", ("adamw",))
    dtype: str = option("float32", "float32 alone, because complex products are not autocast", "optimisation",
                        ("float32",))
    lr: float = option(0.0, "peak learning rate; 0 = 0.03, one head 0.015", "optimisation", low=0)
    warmup: int = option(0, "steps of linear warm-up", "optimisation", low=0)
    warmdown: float = option(1.0, "the share of the steps that decays, linearly", "optimisation", low=0, high=1)
    weight_decay: float = option(0.0, "decoupled weight decay", "optimisation", low=0)
    toy = "moons"
    begins = ("heads",)

    def __post_init__(self):
        super().__post_init__()
        recipe = RECIPES[self.heads]
        if self.lr == 0:
            self.lr = recipe["lr"]
        if self.sharpen == -1:
            self.sharpen = recipe["sharpen"]
        if self.skip == -1:
            self.skip = recipe["skip"]
        if self.skip >= self.T - 2:
            raise ValueError(f"skip={self.skip} leaves no observation of T={self.T} to learn from; give less")

    @property
    def title(self) -> str:
        """What tables and figures call it."""
        return "3 heads" if self.heads == 3 else "1 head"


@dataclass
class Length(Toy):
    """A task of TASKS: a model is trained on short sequences and tested on longer ones. A 0 below is the task's own."""
    task: str = option("recall", "the task", "toy")
    model: str = option("floor", "floor (attention to a window), global (to all of the past), rmt-0 (rmt without "
                        "memory), a memory, deltanet-beta2 (β up to 2), deltanet-steps2 (β up to 2, two writes a "
                        "token) or deltanet-add (writes without erasing)", "toy")
    T: int = option(0, "training length; 0 = 64. It is at least 32, and tests go up to 8T. For capacity and mqar 0 = "
                    "256, it is 64 to 256, and tests go up to 2T", "toy", low=0)
    window: int = option(16, "tokens in the window of floor, persistent and knn, and in rmt's segment", "toy", low=1)
    n_layer: int = option(2, "blocks", "toy", low=1)
    n_embd: int = option(64, "channels", "toy", low=1)
    n_head: int = option(0, "heads; 0 = 2; s3 and s5: 4", "toy", low=0)
    pos: str = option("rope", "positions in attention: rope, alibi or none", "toy", ("rope", "alibi", "none"))
    token_shift: bool = option(False, "every block first adds to a token a learned mixture of itself and the three "
                               "before it", "toy")
    test_rows: int = option(64, "test sequences at each length", "toy", low=1)
    lr: float = option(6e-3, "peak learning rate, Muon's and AdamW's alike", "optimisation", low=0)
    steps: int = option(0, "updates of the weights; 0 = 400; parity, s3, s5, capacity and mqar: 1000", "optimisation",
                        low=0)
    batch_size: int = option(0, "sequences in a step; 0 = 32; parity, s3 and s5: 64", "optimisation", low=0)
    toy = "length"
    begins = ("task", "model")

    def __post_init__(self):
        super().__post_init__()
        check_known("task", self.task, TASKS)
        check_known("model", self.model, LENGTH_MODELS)
        self.T = self.T or TASKS[self.task].T
        self.steps = self.steps or TASKS[self.task].steps
        self.batch_size = self.batch_size or TASKS[self.task].batch_size
        self.n_head = self.n_head or TASKS[self.task].n_head
        low, high = TASKS[self.task].limits
        if not low <= self.T <= high:
            allowed = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"T={self.T} was given, {self.task} needs {allowed}")
        if LENGTH_MODELS[self.model].get("memory") == "rmt" and self.T % self.window:
            raise ValueError(f"window={self.window} does not divide T={self.T}, so rmt's segments do not fit; change "
                             "either")
        self.architecture()

    def architecture(self) -> Config:
        """The network to train."""
        # The Config's `window` is a pattern of layers, S or L. The toy's `window` is how many tokens an S sees.
        settings = dict(n_layer=self.n_layer, n_embd=self.n_embd, n_head=self.n_head, pos=self.pos, window="L",
                        max_seq_len=self.T, vocab_size=TASKS[self.task].vocabulary, short_window=self.window,
                        rmt_segment=self.window, token_shift=self.token_shift)
        settings.update(LENGTH_MODELS[self.model])
        return Config(**settings)

    def lengths(self) -> tuple[list[int], list[int]]:
        """The lengths of training sequences and of test sequences."""
        task = TASKS[self.task]
        trained = [int(self.T * share) for share in task.train_shares]
        tested = [int(self.T * share) for share in task.test_shares]
        return trained, tested

    def length_at(self, step: int) -> int:
        """The length of a step's training sequences. The lengths take turns; in a task that grows, first the shortest
        is alone, and the others join one after another."""
        trained, _ = self.lengths()
        growing_steps = TASKS[self.task].growing * self.steps
        joined = len(trained)
        if step < growing_steps:
            joined = 1 + int(step / growing_steps * len(trained))
        return trained[step % joined]


@dataclass
class RegBench(Toy):
    """Random automata: can a model learn a language that it has never seen, from a few hundred symbols of it?"""
    model: str = option("rope", "rope or learned (transformers with these positions), none (without), or a memory",
                        "toy")
    automata: int = option(1000, "training automata, one sequence each", "toy", low=1)
    T: int = option(512, "longest sequence; what is longer is cut", "toy", low=8)
    n_layer: int = option(2, "blocks", "toy", low=1)
    n_embd: int = option(64, "channels", "toy", low=1)
    n_head: int = option(4, "heads", "toy", low=1)
    test_automata: int = option(200, "sequences in each of the three test sets", "toy", low=1)
    toy = "regbench"
    begins = ("model", "automata")

    def __post_init__(self):
        super().__post_init__()
        check_known("model", self.model, REGBENCH_MODELS)
        self.architecture()

    def architecture(self) -> Config:
        """The network to train."""
        settings = dict(n_layer=self.n_layer, n_embd=self.n_embd, n_head=self.n_head, window="L", max_seq_len=self.T,
                        vocab_size=TOKENS)
        settings.update(REGBENCH_MODELS[self.model])
        return Config(**settings)


def check_known(name: str, value: str, known) -> None:
    """Raises ValueError for a value that is not among the known ones."""
    if value not in known:
        hint = did_you_mean(value, known)
        raise ValueError(f"{name}={value} was given, expected one of {', '.join(known)}{hint}")


# Names of models -> settings of their Config: attention to compare with, then every memory. The names of the length
# toys begin with conditions of analyze.py, so that a model has one name and one colour everywhere. In regbench "none"
# is a transformer without positions.
LENGTH_MODELS = {"floor": dict(window="S"), "global": dict(window="L"), "rmt-0": dict(memory="rmt", rmt_tokens=0)}
REGBENCH_MODELS = {"rope": dict(pos="rope"), "learned": dict(pos="learned"), "none": dict(pos="none")}
DELTANETS = {"deltanet-beta2": dict(memory="deltanet", delta_beta=2),
             "deltanet-steps2": dict(memory="deltanet", delta_beta=2, delta_steps=2),
             "deltanet-add": dict(memory="deltanet", delta_erase=False)}
for memory in MEMORIES:
    models = {memory: dict(memory=memory)}
    if memory == "deltanet":
        models |= DELTANETS
    if memory != "none":
        LENGTH_MODELS |= models
        REGBENCH_MODELS |= models
# persistent attends as `window` says, and would see everything otherwise; rmt's segments bound what it sees anyway
LENGTH_MODELS["persistent"] = dict(memory="persistent", window="S")


# ----------------------------------------------------------------------------------------------------------------------
# Reports: runs of one variant together, curves, figures

@dataclass
class Variant:
    """The runs that differ in nothing but their seed."""
    cfg: Toy          # the configuration of the first of them
    name: str         # what tables and figures call them: "deltanet", "3 heads, lr=0.01"
    runs: list[dict]  # their results


def config_of(kind: type, result: dict) -> Toy:
    """The configuration that a result file repeats."""
    known = {f.name for f in fields(kind)}
    return kind(**{name: value for name, value in result["config"].items() if name in known})


def grouped(kind: type, results: list[dict]) -> tuple[list[Variant], str]:
    """The variants, in the order given, and a text about the changes that all variants share.

    A shared change is not part of the variants' names, so that it is said only once.
    """
    configs = [config_of(kind, result) for result in results]
    changed = [changes(cfg) for cfg in configs]
    shared = [change for change in changed[0] if all(change in others for others in changed)]

    found = {}
    for cfg, all_changes, result in zip(configs, changed, results):
        own = [change for change in all_changes if change not in shared]
        key = (*cfg.name_begins().values(), *own)
        if key not in found:
            found[key] = Variant(cfg, ", ".join([cfg.title, *own]), [])
        found[key].runs.append(result)
    said = f" (all with {', '.join(shared)})" if shared else ""
    return list(found.values()), said


def average(runs: list[dict], *path: str) -> float:
    """The mean of a number that all of these hold, such as average(runs, "ood", "tvd")."""
    return mean(reduce(getitem, path, run) for run in runs)


def best_of(variants: list[Variant], key: Callable, score: Callable) -> dict:
    """key(variant) -> of the variants with this key the one with the highest score."""
    best = {}
    for variant in variants:
        before = best.get(key(variant))
        if before is None or score(variant) > score(before):
            best[key(variant)] = variant
    return best


def draw_with_range(ax, x: list, values: list, name: str, look: dict) -> None:
    """The mean over seeds, and their range as a band; values holds the seeds' numbers at each x."""
    low = [min(v) for v in values]
    high = [max(v) for v in values]
    ax.plot(x, [mean(v) for v in values], ms=5, lw=1.6, label=name, **look)
    ax.fill_between(x, low, high, color=look["color"], alpha=0.12, lw=0)
    ax.vlines(x, low, high, color=look["color"], lw=1)


def save_figure(figure, path: Path) -> None:
    """Writes the figure and says where."""
    save(path, analyze.picture(figure))
    say(f"drawn: {path}")


# ----------------------------------------------------------------------------------------------------------------------
# moons: three moons circle at constant speed. An observation is their three places on the unit circle, as complex
# numbers. The network predicts the next observation from what followed similar observations.

# The ratios of the validation periods, and the published training triples (of which the second has the same ratios).
VALIDATION = (1, 2, 3)
PUBLISHED = ((.5, 1, 2), (.5, 1, 1.5), (.5, 1, 3), (.5, 1.5, 3), (1, 1.5, 3), (.5, 1, 2.5), (1, 1.5, 2), (.5, 1.5, 2))
LCM = 6                  # after the least common multiple of the three periods the whole system repeats
LONG = 800               # observations in a validation sequence, which holds three repetitions of the whole system
UNIT = LONG / (3 * LCM)  # observations in a period of length 1
HORIZON = 25             # predictions that are scored after a context, each made from the one before


class MoonsNet(nn.Module):
    """One layer of associative memories (Memory Mosaics, figure 3) over x (B,T,3) complex.

        k_t = W_φ x_t                                       the key is the observation
        v_t = W_ψ x_{t+1}                                   the value is the observation that follows it
        y_t = Σ_{i<t} softmax_i(β Re⟨k_t, k_i⟩) v_i         a query gets the values of similar keys
        x̂_{t+1} = W_z y_t                                   the prediction

    The 3 complex numbers of k, v and y are one head of 6 real dimensions, or three heads of 2.
    """

    def __init__(self, cfg: Moons):
        super().__init__()
        self.cfg = cfg
        self.phi = nn.Parameter(torch.randn(3, 3, 2) * 6 ** -0.5)
        self.psi = nn.Parameter(torch.randn(3, 3, 2) * 6 ** -0.5)
        self.z = nn.Parameter(torch.randn(3, 3, 2) * 6 ** -0.5)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_φ, W_ψ, W_z (3,3) complex"""
        return torch.view_as_complex(self.phi), torch.view_as_complex(self.psi), torch.view_as_complex(self.z)

    def heads(self, x: Tensor) -> Tensor:
        """(B,T,3) complex -> (B,H,T,6/H) real"""
        real = torch.view_as_real(x).flatten(2)                      # (B,T,6)
        return real.unflatten(2, (self.cfg.heads, -1)).transpose(1, 2)

    def predict(self, y: Tensor) -> Tensor:
        """What the heads found, (B,H,T,6/H) real -> the predicted observations (B,T,3) complex"""
        real = y.transpose(1, 2).flatten(2)                          # (B,T,6)
        _, _, z = self.matrices()
        return torch.view_as_complex(real.unflatten(2, (3, 2)).contiguous()) @ z.T

    def forward(self, x: Tensor, sharpening: Tensor, skipped: Tensor) -> Tensor:
        """The loss of a batch: the squared error of x_2, x_3, …, clipped at LOSS_CLIP.

        sharpening (B,) and skipped (B,) repeat one number each: keys are e^sharpening times as long, and the first
        `skipped` predictions do not count.
        """
        phi, psi, _ = self.matrices()
        keys = self.heads(x @ phi.T) * sharpening[0].exp()           # k_t
        values = self.heads(x[:, 1:] @ psi.T)                        # v_t, which peeks at x_{t+1}

        # Query t sees the pairs i < t. Numbered from the second on, query t stands beside the pair t - 1, so that this
        # is plain causal attention. (Of the last observation there is neither a value nor a prediction to judge.)
        queries = keys[:, :, 1:-1]                                   # k_t, from the second on
        stored_keys = keys[:, :, :-2]                                # k_{t-1}
        stored_values = values[:, :, :-1]                            # v_{t-1}
        y = attend(queries, stored_keys, stored_values, scale=self.cfg.beta)
        wrong = torch.view_as_real(x[:, 2:] - self.predict(y))       # (B,T-2,3,2)
        cost = wrong.square().mean((2, 3)).clamp(max=LOSS_CLIP)      # (B,T-2)
        return cost[:, int(skipped[0]):].mean()

    @torch.no_grad()
    def rollout_error(self, x: Tensor, contexts: list[int]) -> Tensor:
        """How far the predicted future is from the true one, after each number of observations in `contexts`.

        It is the mean absolute deviation over sequences, HORIZON steps and 6 real coordinates. Predictions are fed back
        as inputs. The memory keeps the pairs that the observations make, one less than these; no prediction is stored.
        """
        phi, psi, _ = self.matrices()
        keys = self.heads(x @ phi.T)
        values = self.heads(x[:, 1:] @ psi.T)
        errors = []
        # 16 contexts at once: the mask gives each its own pairs.
        for seen in torch.tensor(contexts).split(16):
            pairs = int(seen.max()) - 1
            known = torch.arange(pairs) < seen[:, None] - 1          # (16,pairs)
            now = x[:, seen - 1]                                     # (B,16,3), the last observation of each context
            error = torch.zeros(len(seen))
            for step in range(HORIZON):
                query = self.heads(now @ phi.T)
                y = F.scaled_dot_product_attention(query, keys[:, :, :pairs], values[:, :, :pairs], attn_mask=known,
                                                   scale=self.cfg.beta)
                now = self.predict(y)
                wrong = torch.view_as_real(now - x[:, seen + step])  # (B,16,3,2)
                error = error + wrong.abs().mean((0, 2, 3)) / HORIZON
            errors.append(error)
        return torch.cat(errors)


def same_ratios(periods) -> bool:
    """Are these three whole periods in the ratios of the validation set, in any order?"""
    divisor = math.gcd(*periods)
    return tuple(sorted(p // divisor for p in periods)) == VALIDATION


@lru_cache
def short_systems() -> list[tuple]:
    """Triples of whole periods for one head. It can predict nothing before their lcm, so only systems whose lcm fits
    twice into the default T, 256, are drawn (whatever --T is)."""
    found = []
    for lcm in range(40, 127):
        divisors = [d for d in range(4, lcm) if lcm % d == 0]
        for periods in itertools.permutations(divisors, 3):
            if math.lcm(*periods) == lcm and not same_ratios(periods):
                found.append(periods)
    return found


def draw_periods(rng: np.random.Generator, cfg: Moons) -> np.ndarray:
    """Three periods to train on: published, or whole numbers that are never in the ratios of the validation set."""
    if cfg.periods == "published":
        return np.array(PUBLISHED[rng.integers(len(PUBLISHED))]) * cfg.T / (3 * LCM)
    if cfg.heads == 1:
        return np.array(short_systems()[rng.integers(len(short_systems()))])
    while True:
        periods = np.exp(rng.uniform(math.log(12), math.log(81), 3)).astype(int)
        all_differ = len(set(periods)) == 3
        if all_differ and not same_ratios(periods.tolist()):
            return periods


def orbits(rng: np.random.Generator, periods: np.ndarray, T: int) -> Tensor:
    """periods (B,3), random phases -> (B,T,3) complex64 observations x_t = e^{2πi (t/period + phase)}"""
    phase = rng.uniform(0, 1, periods.shape)
    turns = np.arange(T)[None, :, None] / periods[:, None] + phase[:, None]      # (B,T,3)
    return torch.from_numpy(np.exp(2j * math.pi * turns).astype(np.complex64))


def moons_batch(step: int, cfg: Moons) -> tuple[Tensor, Tensor, Tensor]:
    """Observations (B,T,3), and this step's sharpening and skipped predictions: (B,) each, the same in every row, since
    fit splits a batch by its rows."""
    rng = np.random.default_rng([cfg.seed, step])
    periods = np.stack([draw_periods(rng, cfg) for _ in range(cfg.batch_size)])
    x = orbits(rng, periods, cfg.T)

    # For 30% of the steps nothing is skipped. From then on the keys grow, until 80% of the steps are done.
    done = step / cfg.steps
    growth = min(max((done - 0.3) / 0.5, 0.0), 1.0)
    skipped = cfg.skip if done > 0.3 else 0
    return x, torch.full((len(x),), cfg.sharpen * growth), torch.full((len(x),), skipped)


def disentangled(phi: Tensor, psi: Tensor, z: Tensor) -> tuple[bool, float]:
    """Does each head own one moon? Returns the answer, and the smallest share that an owned moon has.

    A head's row of W_φ makes its keys, its row of W_ψ its values, and its column of W_z the output. In all three the
    same moon must have 95% of |W|², and no two heads may own the same one.
    """
    power = torch.stack([phi.abs() ** 2, psi.abs() ** 2, z.abs().T ** 2])        # (3 matrices,heads,moons)
    shares = power / power.sum(-1, keepdim=True)
    largest, moon = shares.max(-1)                                               # (3,heads): which moon is owned
    same_everywhere = bool((moon == moon[0]).all())
    all_differ = len(set(moon[0].tolist())) == 3
    smallest = largest.min().item()
    return same_everywhere and all_differ and smallest >= 0.95, smallest


def stairs_of(contexts: list[int], error: list[float], periods: list[float]) -> list[float]:
    """The mean error before the first period's end, from each period's end to the next, and after the last."""
    # The error falls within two observations of a period's end: these belong to neither step.
    return [mean(e for n, e in zip(contexts, error) if begin + 2 <= n <= end)
            for begin, end in itertools.pairwise([0, *periods, LONG])]


def moons_job(cfg: Moons) -> dict:
    """Trains one network and measures it by the paper's protocol.

        contexts, error        numbers of observations, and the error of the HORIZON predictions that follow them
        periods, stairs        the moons' periods and their lcm, and the mean error before, between and after these
        matrices               W_φ, W_ψ, W_z (3,3,2): real and imaginary parts
        disentangled           does each head own one moon, and (smallest_share) how much of it? See `disentangled`.
        converged              is the error below 0.05 once the network has seen what it needs?
    """
    net = MoonsNet(cfg)
    fit(net, lambda step: moons_batch(step, cfg), cfg)

    # The growth of the keys becomes a part of W_φ, so that from here on nothing has to know of it.
    net.cpu()
    with torch.no_grad():
        net.phi *= math.exp(cfg.sharpen)

    periods = [p * UNIT for p in (*VALIDATION, LCM)]    # the moons', and the whole system's
    x = orbits(np.random.default_rng(0), np.tile(periods[:3], (cfg.sequences, 1)), LONG)
    contexts = [*range(2, 300, 4), *range(300, LONG - HORIZON, 25)]
    error = net.rollout_error(x, contexts).tolist()
    stairs = stairs_of(contexts, error, periods)

    # Three heads should be accurate once they have seen the slowest moon, one head once all has been seen.
    accurate_from = 3 if cfg.heads == 3 else 4
    apart, smallest_share = disentangled(*net.matrices())
    return dict(contexts=contexts, error=error, periods=periods, stairs=stairs, smallest_share=smallest_share,
                disentangled=apart and cfg.heads == 3, converged=stairs[accurate_from] < 0.05,
                matrices=[torch.view_as_real(m).tolist() for m in net.matrices()])


def report_moons(results: list[dict], out: Path) -> list[list[str]]:
    """Prints the table and draws the figures -> rows for the last table: experiment, what the paper says, what was
    seen."""
    variants, shared = grouped(Moons, results)
    rows = []
    seen = []
    for variant in variants:
        runs = variant.runs
        stairs = [median(run["stairs"][i] for run in runs) for i in range(5)]
        converged = f"{sum(run['converged'] for run in runs)}/{len(runs)}"
        apart = f"{sum(run['disentangled'] for run in runs)}/{len(runs)}"
        if variant.cfg.heads == 3:
            said = "error drops as each moon's period ends, small after the slowest"
            first_three = " ".join(f"{s:.2f}" for s in stairs[:3])
            here = f"{first_three} then {stairs[3]:.3f}; disentangled {apart}"
        else:
            said = "accurate only after the least common multiple"
            here = f"{stairs[3]:.2f} before, {stairs[4]:.3f} after"
            apart = None
        seen.append([f"moons, {variant.name}", said, here])
        slowest = max(run["cpu_seconds"] for run in runs)
        rows.append([variant.name, *(f"{s:.3f}" for s in stairs), converged, apart, f"{slowest:.0f}"])

    say(f"\nThree moons{shared}: mean absolute error of {HORIZON} steps, median over seeds, by the observations in "
        "memory: before the end of the first, second and third period (P1, P2, P3), then before and after their least "
        "common multiple (lcm); most cpu s = CPU seconds of the slowest seed\n")
    say(analyze.table(["network", "< P1", "< P2", "< P3", "< lcm", "> lcm", "error < .05", "disentangled",
                       "most cpu s"], rows))
    plot_moons(variants, out)
    with_three_heads = [variant for variant in variants if variant.cfg.heads == 3]
    if with_three_heads:
        plot_matrices(with_three_heads[0], out)
    return seen


def plot_moons(variants: list[Variant], out: Path) -> None:
    """moons.png: every seed's error against the context, the first in bold."""
    figure, axes = analyze.panels(len(variants), 1, (9, 3.2 * len(variants)), sharex=True, sharey=True)
    colour = analyze.look("mosaic")["color"]  # the network is a small mosaic
    for ax, variant in zip(axes[:, 0], variants):
        first, *others = variant.runs
        for run in others:
            ax.plot(run["contexts"], run["error"], color=colour, lw=0.7, alpha=0.4)
        ax.plot(first["contexts"], first["error"], color=colour, lw=2)

        # Lines where each moon, and then the whole system, has been round once.
        for period in first["periods"]:
            is_lcm = period == first["periods"][-1]
            ax.axvline(period, color="black", linestyle="solid" if is_lcm else "dashed", lw=1.2)
            ax.text(period + 4, 0.75, f"{period:.0f}", transform=ax.get_xaxis_transform())
        ax.set(ylim=(0, None), xlim=(0, LONG - HORIZON), title=variant.name,
               ylabel=f"mean absolute deviation\nof the next {HORIZON} steps")
    axes[-1, 0].set_xlabel("observations in memory (dashed: each moon's period; solid: their least common multiple)")
    save_figure(figure, out / "moons.png")


def plot_matrices(variant: Variant, out: Path) -> None:
    """moons-matrices.png: the sizes of the weights of one network with three heads."""
    run = variant.runs[0]
    figure, axes = analyze.panels(1, 3, (8.5, 3.4))
    figure.suptitle(f"{variant.name}, seed {run['seed']}")
    titles = ("$W_φ$ keys", "$W_ψ$ values", "$W_z$ output")
    for ax, matrix, title in zip(axes[0], run["matrices"], titles):
        real, imaginary = np.moveaxis(np.array(matrix), -1, 0)
        size = np.hypot(real, imaginary)
        ax.imshow(size / size.max(), cmap="cividis", vmin=0, vmax=1, extent=(0.5, 3.5, 3.5, 0.5))
        ax.set(title=title, xlabel="moon", ylabel="head", xticks=(1, 2, 3), yticks=(1, 2, 3))
        ax.grid(False)
    axes[0, 2].set(xlabel="head", ylabel="moon")
    # All three have the colours of the first.
    figure.colorbar(axes[0, 0].images[0], ax=axes, label="|weight|, the largest = 1")
    save_figure(figure, out / "moons-matrices.png")


# ----------------------------------------------------------------------------------------------------------------------
# brackets, copy, repeat, recall; parity, s3, s5 (products); capacity, mqar (pairs). A task draws one sequence: x, y and
# distance, lists of length T. y is the answer to be given at a position, -1 where nothing is asked.

KINDS = 8  # of brackets; the blank is token 0, the openers are 1 to 8, the closers 9 to 16


def bracket_word(rng: random.Random, n: int, depth: int) -> list[int]:
    """n tokens: balanced brackets nested at most `depth` deep, and blanks. Every length that fits is as likely for a
    pair, so that far matches are frequent."""
    word = []
    while len(word) < n:
        left = n - len(word)
        if depth == 0 or left < 2:
            return word + [0] * left
        inside = rng.randint(0, left - 2)
        kind = rng.randint(1, KINDS)
        word += [kind, *bracket_word(rng, inside, depth - 1), kind + KINDS]
    return word


def brackets(rng: random.Random, T: int) -> tuple[list, list, list]:
    """Which closer comes next? Asked wherever one comes.

        x   (  [  .  .  ]  {  }  .  )         . = blank
        y            ]     }     )            distance of the last answer: 8, back to its opener
    """
    word = bracket_word(rng, T + 1, 4)
    y = [-1] * T
    distance = [0] * T
    openers = []  # where the brackets stand that are open now
    for t, token in enumerate(word):
        if 1 <= token <= KINDS:
            openers.append(t)
        elif token > KINDS:
            y[t - 1] = token
            distance[t - 1] = t - openers.pop()
    return word[:T], y, distance


def copy(rng: random.Random, T: int) -> tuple[list, list, list]:
    """Repeat the last string of 8 (16 symbols, 2-17) when | (1) comes, after a blank (0) gap of any length.

        x   c a b f . . . . . | c a b         (strings of 4 for the picture)
        y                     c a b f         distance 10
    """
    # The word is built from its end, so that the last gap may be anything up to the whole sequence.
    word = []
    y = []
    distance = []
    while T - len(word) >= 17:
        gap = rng.randint(0, T - len(word) - 17)
        string = [rng.randint(2, 17) for _ in range(8)]
        word = string + [0] * gap + [1] + string + word
        # The next symbol of the string is asked for at |, and at all of the repeated symbols but the last.
        y = [-1] * (8 + gap) + string + [-1] + y
        distance = [0] * (8 + gap) + [gap + 9] * 8 + [0] + distance

    # Blanks fill the front. One token more than T was made: the last one is only an answer.
    rest = T + 1 - len(word)
    x = [0] * rest + word
    y = [-1] * rest + y
    distance = [0] * rest + distance
    return x[:T], y[:T], distance[:T]


def repeat(rng: random.Random, T: int) -> tuple[list, list, list]:
    """Has this element (2-289) been here before? Half of them have, as long ago as you like (log-uniform); once all 288
    have been used, all of them.

        x   k  d  a  d  q  k
        y   0  0  0  1  0  1                  distance of the last answer: 5
    """
    unused = rng.sample(range(2, 290), 288)
    x = []
    y = []
    distance = []
    latest = {}  # where each element stood last
    for t in range(T):
        is_new = True
        if t > 0:
            back = int(t ** rng.random())
            is_new = len(unused) > 0 and rng.random() < 0.5
        element = unused.pop() if is_new else x[t - back]
        x.append(element)
        y.append(0 if is_new else 1)
        distance.append(0 if is_new else t - latest[element])
        latest[element] = t
    return x, y, distance


def recall(rng: random.Random, T: int) -> tuple[list, list, list]:
    """Write one of 8 values to one of 16 keys (one token, 24 + 8 key + value), or read a key (8 + key): what was last
    written to it (0-7)?

        x   a=7  b=3  a?   a=5  b?   a?       distance of the last answer: 2
        y             7         3    5
    """
    steps = []    # token, answer, distance
    written = {}  # key -> the value last written to it, and where that was
    for t in range(T):
        key = rng.randrange(16)
        if key in written and rng.random() < 0.5:
            value, then = written[key]
            steps.append((8 + key, value, t - then))
        else:
            value = rng.randrange(8)
            written[key] = value, t
            steps.append((24 + 8 * key + value, -1, 0))
    return tuple(map(list, zip(*steps)))


def product(rng: random.Random, T: int, n: int) -> tuple[list, list, list]:
    """Tokens are permutations of n things; the answer at every token is the product of all so far.

    A permutation's token is its place in alphabetical order. Of two things, 0 leaves them where they are and 1 swaps
    them, so that the product is the parity of the bits:

        x   0  1  1  0  1  1
        y   0  1  0  0  1  0                  distance of the last answer: 5, back to the first token
    """
    permutations = list(itertools.permutations(range(n)))
    number = {permutation: i for i, permutation in enumerate(permutations)}
    so_far = permutations[0]
    steps = []    # token, answer, distance
    for t in range(T):
        new = rng.choice(permutations)
        so_far = tuple(new[place] for place in so_far)      # what stood at `place` now stands at new[place]
        steps.append((number[new], number[so_far], t))
    return tuple(map(list, zip(*steps)))


KEYS = 128   # of capacity and mqar
VALUES = 8


def pairs(rng: random.Random, T: int, split: bool) -> tuple[list, list, list]:
    """T/4 pairs of a key and a value, with no key twice. In the second half of the sequence each key comes once more,
    in any order: what was its value (0-7)? Blanks (8) fill up.

        x   a  3  b  7  .  b  a  .            split (mqar): key (9-136) and value are two tokens, as in Arora et al.
        y                  7  3
        x   a=3  b=7  .  .  .  b  a  .        else (capacity): one token, 137 + 8 key + value
    """
    keys = rng.sample(range(KEYS), T // 4)
    x = []
    values = []
    for key in keys:
        value = rng.randrange(VALUES)
        values.append(value)
        x += [9 + key, value] if split else [9 + KEYS + VALUES * key + value]
    x += [8] * (T - len(x))
    y = [-1] * T
    distance = [0] * T
    places = rng.sample(range(T // 2, T), len(keys))
    for i, place in enumerate(places):
        x[place] = 9 + keys[i]
        y[place] = values[i]
        distance[place] = place - (2 * i if split else i)
    return x, y, distance


def far_text(runs: list[dict]) -> str | None:
    """The mean accuracy of far answers; None if there are none."""
    return None if runs[0]["far_accuracy"] is None else f"{average(runs, 'far_accuracy'):.3f}"


def held_text(runs: list[dict]) -> str:
    """The mean number of pairs that are held."""
    return f"{mean(analyze.pairs_held(run)[0] for run in runs):.0f}"


class Task(NamedTuple):
    """A task, how models are trained for it, and what is told of them."""
    draw: Callable            # (rng, T) -> x, y, distance
    vocabulary: int
    claim: str = "a memory keeps its accuracy, attention loses it sooner"    # of the papers
    T: int = 64
    limits: tuple = (32, math.inf)    # of T
    steps: int = 400
    batch_size: int = 32
    n_head: int = 2
    train_shares: tuple = (1,)        # the lengths of training sequences in units of T, which take turns
    growing: float = 0                # in this share of the steps, the first ones, these lengths join one by one
    test_shares: tuple = (1, 2, 4, 8)
    summary: Callable = far_text      # a variant's runs -> one number, the column of the table that `column` heads
    column: str = "far"
    meaning: str = "in the longest sequences, answers two windows back or more"


PAIRS = ("capacity", "mqar")
BY_PARITY = dict(steps=1000, batch_size=64, train_shares=(1 / 4, 1 / 2, 1))
BY_PRODUCT = dict(steps=1000, batch_size=64, n_head=4, train_shares=(1 / 8, 1 / 4, 1 / 2, 1), growing=0.5)
BY_PAIRS = dict(T=256, limits=(64, 2 * KEYS), steps=1000, train_shares=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 1),
                test_shares=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2), summary=held_text, column="held",
                meaning="how many pairs are answered 90% right (N pairs are asked in 4N tokens); of several learning "
                        "rates at one width the best on the first seed is shown")
TASKS = {
    "brackets": Task(brackets, 17),
    "copy": Task(copy, 18),
    "repeat": Task(repeat, 290),
    "recall": Task(recall, 152),
    "parity": Task(partial(product, n=2), 2, "attention and β < 1 guess (.5), β up to 2 holds it", **BY_PARITY),
    "s3": Task(partial(product, n=3), 6, "two writes a token hold it, one does not", **BY_PRODUCT),
    "s5": Task(partial(product, n=5), 120, "four writes a token hold it, fewer do not", **BY_PRODUCT),
    "capacity": Task(partial(pairs, split=False), 9 + KEYS + VALUES * KEYS, "more state, more pairs", **BY_PAIRS),
    "mqar": Task(partial(pairs, split=True), 9 + KEYS, "more state, more pairs", **BY_PAIRS),
}


def length_batch(task: str, rows: int, T: int, seed: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, distance (rows,T) int64, a function of the arguments alone. Seed 0 and number 0 are those of the test set;
    a training batch has the run's seed, and its number is at least 1."""
    rng = random.Random(repr((task, T, seed, number)))
    sequences = [TASKS[task].draw(rng, T) for _ in range(rows)]
    x, y, distance = zip(*sequences)
    return torch.tensor(x), torch.tensor(y), torch.tensor(distance)


def share_right(right: Tensor, asked: Tensor) -> float:
    """Of what is asked, how much is right; 0 where nothing is asked."""
    return (right & asked).sum().item() / max(1, asked.sum().item())


def trained_model(cfg: Length | RegBench, batch_fn: Callable) -> GPT:
    """A model of this configuration, trained and ready to be measured. batch_fn: step -> x, y."""
    model = GPT(cfg.architecture())
    fit(model, batch_fn, cfg)
    return model.eval()


def length_job(cfg: Length) -> dict:
    """Trains one model -> what `measure_length` measures, and `parameters`, how many it has."""
    def batch_fn(step):
        x, y, _ = length_batch(cfg.task, cfg.batch_size, cfg.length_at(step), cfg.seed, step + 1)
        return x, y

    model = trained_model(cfg, batch_fn)
    return dict(measure_length(model, cfg), parameters=count_params(model))


@torch.no_grad()
def measure_length(model: GPT, cfg: Length) -> dict:
    """How well a trained model answers.

        lengths, accuracy, state_bytes    at each length the share of right answers in the last cfg.T tokens (in all of
                                          a shorter sequence), and the bytes of the state
        by_distance                       at the longest, for each bin of distances: its ends, how many answers were
                                          asked for, their accuracy
        far_accuracy                      there, of answers two windows back or more; None if there are none
    """
    device = pick_device(cfg)
    _, lengths = cfg.lengths()
    accuracy = []
    states = []
    for length in lengths:
        x, y, distance = length_batch(cfg.task, cfg.test_rows, length, 0, 0)
        guesses = []
        for rows in x.split(32):
            logits, _ = model.stream(rows.to(device))
            guesses.append(logits.argmax(-1).cpu())
        right = torch.cat(guesses) == y
        asked = y >= 0
        at_the_end = torch.arange(length) >= length - cfg.T
        accuracy.append(share_right(right, asked & at_the_end))
        _, state = model.stream(x[:1].to(device))
        states.append(state_bytes(state))

    # The rest is measured on the longest sequences, which were the last ones. The first bin holds distances 1 to 15,
    # and then each bin doubles.
    by_distance = []
    low = 1
    high = 16
    while low < lengths[-1]:
        in_bin = asked & (distance >= low) & (distance < high)
        by_distance.append(dict(distance=[low, high - 1], asked=in_bin.sum().item(),
                                accuracy=share_right(right, in_bin)))
        low = high
        high = 2 * high
    far = asked & (distance >= 2 * cfg.window)
    far_accuracy = share_right(right, far) if far.any() else None
    return dict(lengths=lengths, accuracy=accuracy, state_bytes=states, by_distance=by_distance,
                far_accuracy=far_accuracy)


def report_length(results: list[dict], out: Path) -> list[list[str]]:
    """Prints a table and draws a figure for each task -> rows for the last table."""
    seen = []
    for task in TASKS:
        of_task = [result for result in results if result["config"]["task"] == task]
        if of_task:
            seen.append(report_task(task, of_task, out))
    return seen


def report_task(task: str, results: list[dict], out: Path) -> list[str]:
    """The table and the figure of one task -> its row for the last table."""
    about = TASKS[task]
    variants, shared = grouped(Length, results)
    names = ["at T" if share == 1 else f"at {share:g}T" for share in about.test_shares]
    if task in PAIRS:
        names = [f"{length // 4} pairs" for length in variants[0].cfg.lengths()[1]]
        # Of the variants of a model and width, such as learning rates, the best one on the first seed counts.
        best_by_width = best_of(variants, lambda v: (v.cfg.model, v.cfg.n_embd), lambda v: mean(v.runs[0]["accuracy"]))
        variants = list(best_by_width.values())
    lengths = sorted({variant.cfg.T for variant in variants})
    trained_at = ", ".join(map(str, lengths))
    rows = []
    here = []
    for variant in variants:
        runs = variant.runs
        accuracy = [f"{mean(seeds):.3f}" for seeds in zip(*(run["accuracy"] for run in runs))]
        summary = about.summary(runs)
        parameters = f"{runs[0]['parameters']:,}"
        states = runs[0]["state_bytes"]
        rows.append([variant.name, *accuracy, summary, len(runs), parameters, f"{states[0]:,}", f"{states[-1]:,}",
                     f"{average(runs, 'cpu_seconds'):.0f}"])
        here.append(f"{variant.name} {summary if task in PAIRS else accuracy[-1]}")

    say(f"\n{task}, trained at T = {trained_at}{shared}: accuracy in the last T tokens, mean over seeds; "
        f"{about.column} = {about.meaning}; state in bytes\n")
    say(analyze.table(["model", *names, about.column, "seeds", "parameters", f"state {names[0]}", f"state {names[-1]}",
                       "mean cpu s"], rows))
    plot_length(task, trained_at, variants, out)
    return [f"{task}, {about.column if task in PAIRS else names[-1]}", about.claim, "; ".join(here)]


def draw_by_distance(ax, variants: list[Variant], looks: list[dict]) -> None:
    """Accuracy against the distance of the answer, in the longest sequences."""
    for variant, look in zip(variants, looks):
        # A bin is drawn at its middle (on the logarithmic axis); one with few answers would be noise.
        middle = []
        by_distance = []
        for seeds in zip(*(run["by_distance"] for run in variant.runs)):
            if seeds[0]["asked"] >= 20:
                low, high = seeds[0]["distance"]
                middle.append(math.sqrt(low * high))
                by_distance.append([seed["accuracy"] for seed in seeds])
        draw_with_range(ax, middle, by_distance, variant.name, look)
    ax.set(xscale="log", xlabel="distance of the answer, tokens", ylim=(-0.02, 1.02), title="the longest sequences")
    ax.set_xticks([4, 16, 64, 256], [4, 16, 64, 256])
    ax.minorticks_off()


def draw_pairs_held(ax, variants: list[Variant]) -> None:
    """Pairs held at 90% accuracy against the bytes of the state: a curve for each model, a point for each width."""
    models = list(dict.fromkeys(variant.cfg.model for variant in variants))
    for model, look in zip(models, analyze.distinct_looks(models)):
        points = []
        for variant in [variant for variant in variants if variant.cfg.model == model]:
            held, states = zip(*map(analyze.pairs_held, variant.runs))
            points.append((mean(states), held))
        states, held = zip(*sorted(points))
        draw_with_range(ax, states, held, model, look)
    ax.set(xscale="log", yscale="log", xlabel="state in bytes", ylabel="pairs held at 90% accuracy",
           title="one point a width")


def plot_length(task: str, trained_at: str, variants: list[Variant], out: Path) -> None:
    """<task>.png: accuracy against the length of the sequence, and against the distance of the answer; or how many
    pairs are held by how much state."""
    figure, axes = analyze.panels(1, 2, (10, 4.2))
    left, right = axes[0]
    shown = variants
    if task in PAIRS:
        widths = sorted({variant.cfg.n_embd for variant in variants})
        shown = [variant for variant in variants if variant.cfg.n_embd == widths[len(widths) // 2]]     # the middle one
    looks = analyze.distinct_looks([variant.cfg.model for variant in shown])
    for variant, look in zip(shown, looks):
        by_length = list(zip(*(run["accuracy"] for run in variant.runs)))
        draw_with_range(left, variant.runs[0]["lengths"], by_length, variant.name, look)
    left.set(xscale="log", xlabel=f"tokens in the sequence (trained at {trained_at})", ylabel="accuracy",
             ylim=(-0.02, 1.02), title=f"{task}: last {trained_at} tokens")
    lengths = sorted({n for variant in variants for n in variant.runs[0]["lengths"]})
    left.set_xticks(lengths, lengths)
    left.minorticks_off()
    if task in PAIRS:
        draw_pairs_held(right, variants)
    else:
        draw_by_distance(right, variants, looks)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", title="mean and range\nof the seeds",
                  frameon=False)
    save_figure(figure, out / f"{task}.png")


# ----------------------------------------------------------------------------------------------------------------------
# regbench: every sequence comes from a random automaton of its own, and shows 10 to 19 strings of its language. Who has
# understood the language from the first strings can predict the next ones.

SYMBOLS = 18        # tokens 0 to 17
SEP = 18            # stands between two strings
PAD = 19            # fills a row up
TOKENS = 20
Automaton = tuple[dict[int, int], ...]  # for each state: symbol -> next state, all as likely; the start is state 0


def minimal(automaton: Automaton) -> Automaton:
    """The smallest automaton with the same distribution over strings, its states numbered by a breadth-first search in
    symbol order. Two automata are the same language exactly if their minimal forms are equal.

    This is Moore's algorithm. All states start in one class, and a class is split until its states go to the same
    classes by the same symbols. (The set of symbols fixes their probabilities.) Unreachable states are left out.
    """
    # After as many rounds as there are states, nothing is left to split. A class is named after its first state.
    classes = [0] * len(automaton)
    for _ in automaton:
        rows = [sorted((symbol, classes[target]) for symbol, target in edges.items()) for edges in automaton]
        classes = [rows.index(row) for row in rows]

    # The classes in the order in which they are reached. The list grows while the loop reads it.
    order = [0]
    for state in order:
        for _, target in sorted(automaton[state].items()):
            if classes[target] not in order:
                order.append(classes[target])

    smaller = []
    for state in order:
        edges = sorted(automaton[state].items())
        smaller.append({symbol: order.index(classes[target]) for symbol, target in edges})
    return tuple(smaller)


def draw_automaton(rng: random.Random) -> Automaton:
    """4-12 states, an alphabet of 4-18 symbols, 1-3 edges a state with distinct symbols to distinct other states; drawn
    again if fewer than 4 states are left when it is minimal."""
    while True:
        n = rng.randint(4, 12)
        alphabet = rng.sample(range(SYMBOLS), rng.randint(4, SYMBOLS))
        automaton = []
        for state in range(n):
            others = [other for other in range(n) if other != state]
            n_edges = rng.randint(1, 3)
            symbols = rng.sample(alphabet, n_edges)
            targets = rng.sample(others, n_edges)
            automaton.append(dict(zip(symbols, targets)))
        automaton = minimal(tuple(automaton))
        if len(automaton) >= 4:
            return automaton


def draw_automata(seed: int, counts: list[int]) -> list[list[Automaton]]:
    """Lists of automata, counts[i] of them in the i-th. No language is in two places."""
    rng = random.Random(seed)
    made = {}  # the text of an automaton, which is minimal -> the automaton
    while len(made) < sum(counts):
        automaton = draw_automaton(rng)
        made.setdefault(repr(automaton), automaton)
    rest = iter(made.values())
    return [list(itertools.islice(rest, count)) for count in counts]


def instance(rng: random.Random, automaton: Automaton, T: int) -> tuple[list[int], list[int]]:
    """10-19 strings of 1-49 symbols with separators between them, cut to T + 1 tokens -> tokens, and for each token the
    state that emitted it (-1 for a separator).

        tokens   3  7  3  SEP  3  7           states   0  1  2  -1  0  1
    """
    tokens = []
    states = []
    for _ in range(rng.randint(10, 19)):
        state = 0
        for _ in range(rng.randint(1, 49)):
            symbol = rng.choice(list(automaton[state]))
            tokens.append(symbol)
            states.append(state)
            state = automaton[state][symbol]
        tokens.append(SEP)
        states.append(-1)
    # No separator follows the last string.
    end = min(T + 1, len(tokens) - 1)
    return tokens[:end], states[:end]


class Instances:
    """One sequence from each automaton: x, y (N,T) int64, y = -1 where the next token is a separator or padding."""

    def __init__(self, automata: list[Automaton], seed: int, T: int):
        rng = random.Random(f"instances {seed}")
        rows = []
        states = []
        for automaton in automata:
            tokens, emitters = instance(rng, automaton, T)
            padding = T + 1 - len(tokens)
            rows.append(tokens + [PAD] * padding)
            states.append(emitters + [-1] * padding)
        self.automata = automata
        self.states = torch.tensor(states)[:, 1:]            # (N,T) who emits the next token
        rows = torch.tensor(rows)                            # (N,T+1)
        following = rows[:, 1:]
        self.x = rows[:, :-1].contiguous()
        self.y = following.masked_fill(following >= SYMBOLS, -1)

    def truth(self, i: int) -> Tensor:
        """(T,20): automaton i's distribution over the next token at each place of its sequence; zeros where y is -1"""
        table = torch.zeros(len(self.automata[i]) + 1, TOKENS)  # the last row is for state -1
        for state, edges in enumerate(self.automata[i]):
            table[state, list(edges)] = 1 / len(edges)
        return table[self.states[i]]


def symbol_scores(probs: Tensor, truth: Tensor, y: Tensor) -> dict:
    """One sequence: probs, truth (T,20), y (T,) -> count, accuracy, tvd, accuracy_last, tvd_last.

        count               positions whose next token is a symbol
        accuracy            at how many of them does the automaton allow the likeliest token in its present state?
        tvd                 ½ Σ_a |p(a) - q(a)|, summed over them: p is the automaton's distribution over the next
                            symbol, q the prediction over all 20 tokens (separators are never trained on, so they get
                            no weight)
        accuracy_last, …    the same at the last of them alone, which is what the papers say

    Means over all positions are what the published code computes and figure 11 shows. Sums are returned, so that every
    position of a test set weighs the same.
    """
    asked = y >= 0                                       # (T,)
    likeliest = probs.argmax(1, keepdim=True)
    right = truth.gather(1, likeliest)[:, 0] > 0
    tvd = (probs - truth).abs().sum(1) / 2
    last = asked.nonzero()[-1].item()
    return dict(count=asked.sum().item(), accuracy=right[asked].sum().item(), tvd=tvd[asked].sum().item(),
                accuracy_last=float(right[last]), tvd_last=tvd[last].item())


def total(scores: list[dict]) -> dict:
    """The scores of a test set: means over all positions (accuracy, tvd) or sequences (accuracy_last, tvd_last)."""
    n = sum(s["count"] for s in scores)
    return dict(accuracy=sum(s["accuracy"] for s in scores) / n, tvd=sum(s["tvd"] for s in scores) / n,
                accuracy_last=average(scores, "accuracy_last"), tvd_last=average(scores, "tvd_last"))


def ngram(x: Tensor, n: int) -> Tensor:
    """x (T,) -> (T,20): how often each symbol followed the last n - 1 tokens earlier in this sequence, as shares.

    Where none did, the last n - 2 tokens are looked up, and so on down to none, which counts how often each symbol came
    at all. With n = 3, after | 3 7 (| is the separator), these are: what followed 3 7; what followed 7; all symbols.
    No context reaches back over a separator: after | 3 the longest is | 3. Before any symbol was seen, and for n = 0,
    all symbols are as likely, and argmax takes the lowest.
    """
    uniform = np.arange(TOKENS) < SYMBOLS
    probs = np.zeros((len(x), TOKENS), dtype=np.float32)
    counts = {}                     # context -> how often each symbol followed it
    string = [SEP]                  # the present string, from its start on
    contexts = [(), (SEP,)][:n]     # the ends of the present string, from the shortest to n - 1 tokens
    for t, token in enumerate(x.tolist()):
        # Count the new symbol in every context that it follows. A separator starts a new string instead.
        if token == SEP:
            string = [SEP]
        else:
            for context in contexts:
                counts.setdefault(context, np.zeros(TOKENS))[token] += 1
            string.append(token)

        # Predict from the longest context that was seen before.
        longest = min(n, len(string) + 1)
        contexts = [tuple(string[len(string) - k:]) for k in range(longest)]
        probs[t] = uniform
        for context in contexts:
            if context in counts:
                probs[t] = counts[context]
    return torch.from_numpy(probs / probs.sum(1, keepdims=True))


@torch.no_grad()
def measure_automata(model: GPT, data: Instances, device) -> dict:
    """Accuracy and TVD of a model on a test set."""
    scores = []
    for first in range(0, len(data.x), 16):
        logits, _ = model.stream(data.x[first:first + 16].to(device))
        probs = logits.float().softmax(-1).cpu()
        for i, p in enumerate(probs, first):
            scores.append(symbol_scores(p, data.truth(i), data.y[i]))
    return total(scores)


def shuffled(cfg: RegBench) -> tuple[Tensor, ...]:
    """For each step the indices of its training automata: in an epoch every one has its turn once."""
    epochs = cfg.steps * cfg.batch_size // cfg.automata + 1
    seeds = [cfg.seed * 100_003 + epoch for epoch in range(epochs)]
    order = [torch.randperm(cfg.automata, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(order).split(cfg.batch_size)


def regbench_job(cfg: RegBench) -> dict:
    """Trains one model -> its scores (see `total`) on three test sets, and `parameters`, how many it has.

    ood is the test set proper: automata that were never trained on. valid, of yet other automata, chooses between
    variants. iid are fresh strings of training automata.
    """
    # One draw for all three, so that no language is in two of them. The test automata are drawn first: they are the
    # same for every number of training automata.
    # The numbers of the Instances are the seeds of their strings.
    n = cfg.test_automata
    ood, valid, train = draw_automata(0, [n, n, cfg.automata])
    known = [train[i % len(train)] for i in range(n)]
    tests = dict(ood=Instances(ood, 1, cfg.T), valid=Instances(valid, 2, cfg.T), iid=Instances(known, 4, cfg.T))

    data = Instances(train, 3, cfg.T)
    order = shuffled(cfg)
    model = trained_model(cfg, lambda step: (data.x[order[step]], data.y[order[step]]))
    measurements = {name: measure_automata(model, test, pick_device(cfg)) for name, test in tests.items()}
    return dict(measurements, parameters=count_params(model))


METRICS = ("accuracy", "tvd", "accuracy_last", "tvd_last")
# Training automata -> accuracy and TVD, read off figure 11 of Memory Mosaics (unseen automata, all positions)
FIGURE_11 = {"mosaic": {100: (.925, .57), 500: (.928, .25), 1000: (.934, .215), 2500: (.94, .185), 40000: (.96, .12)},
             "transformer": {100: (.52, .68), 500: (.54, .64), 1000: (.53, .63), 2500: (.925, .23), 40000: (.952, .14)}}
# Accuracy and TVD in table 4 of Memory Mosaics (100 automata, IID)
TABLE_4 = {"mosaic": (.959, .417), "transformer": (.856, .308), "Mamba": (.929, .268), "S4": (.846, .350),
           "RWKV": (.967, .183), "linear transformer": (.816, .348), "H3": (.794, .425), "GLA": (.870, .284),
           "Hyena": (.953, .244), "LSTM": (.849, .343), "RetNet": (.876, .296)}
# The transformers look like global attention, which they are; their positions have a line each.
TRANSFORMER_LINES = {"rope": "solid", "learned": "dashed", "none": "dashdot"}


def ngram_baselines(cfg: RegBench) -> dict[str, dict]:
    """The scores of in-context n-grams on the test automata."""
    # These are the test automata of regbench_job, and the same strings.
    [ood] = draw_automata(0, [cfg.test_automata])
    data = Instances(ood, 1, cfg.T)
    found = {}
    for n, name in enumerate(("uniform", "1-gram", "2-gram", "3-gram")):
        scores = [symbol_scores(ngram(x, n), data.truth(i), data.y[i]) for i, x in enumerate(data.x)]
        found[name] = total(scores)
    return found


def report_regbench(results: list[dict], out: Path) -> list[list[str]]:
    """Prints the table, draws the figure and keeps the baselines -> rows for the last table."""
    variants, shared = grouped(RegBench, results)
    best = best_of(variants, lambda v: (v.cfg.model, v.cfg.automata), lambda v: average(v.runs, "valid", "accuracy"))
    cfg = variants[0].cfg
    baselines = ngram_baselines(cfg)
    save_json(out / "regbench" / "baselines.json", dict(automata=cfg.test_automata, T=cfg.T, ood=baselines))

    rows = [[name, None, *(f"{scores[metric]:.3f}" for metric in METRICS), None, None, None, None]
            for name, scores in baselines.items()]
    seen = []
    for (model, automata), variant in best.items():
        runs = variant.runs
        name_in_paper = REGBENCH_MODELS[model].get("memory", "transformer")
        published = FIGURE_11.get(name_in_paper, {}).get(automata)
        said = f"{published[0]} / {published[1]}" if published else "-"
        ood = [f"{average(runs, 'ood', metric):.3f}" for metric in METRICS]
        iid = f"{average(runs, 'iid', 'accuracy'):.3f} / {average(runs, 'iid', 'tvd'):.3f}"
        rows.append([variant.name, automata, *ood, said, iid, f"{runs[0]['parameters']:,}", len(runs)])
        seen.append([f"regbench, {variant.name}, {automata} automata", f"accuracy / TVD on unseen automata: {said}",
                     f"{ood[0]} / {ood[1]}"])

    say(f"\nRegBench{shared}, unseen automata, mean over seeds (all = every symbol of a sequence, last = its last "
        "one; of several variants of a model the one that is best on the validation automata)\n")
    say(analyze.table(["model", "automata", "acc all", "TVD all", "acc last", "TVD last", "paper, all", "IID acc / TVD",
                       "parameters", "seeds"], rows))
    if any(automata == 100 for _, automata in best):
        table_4 = ", ".join(f"{name} {accuracy} / {tvd}" for name, (accuracy, tvd) in TABLE_4.items())
        say(f"Table 4 of the paper, IID acc / TVD at 100 automata: {table_4}")
    plot_regbench(best, baselines, out)
    return seen


def plot_regbench(best: dict[tuple[str, int], Variant], baselines: dict, out: Path) -> None:
    """regbench.png: accuracy and TVD against the number of training automata. Dotted curves are the paper's."""
    figure, axes = analyze.panels(1, 2, (10, 4.4))
    left, right = axes[0]
    for ax, metric, title in ((left, "accuracy", "accuracy"), (right, "tvd", "total variation distance")):
        for name, points in FIGURE_11.items():
            colour = analyze.look("global" if name == "transformer" else name)["color"]
            values = [point[METRICS.index(metric)] for point in points.values()]
            ax.plot(list(points), values, color=colour, linestyle="dotted", lw=1.6, label=f"paper: {name}")

        for name, scores in baselines.items():
            ax.axhline(scores[metric], color="black", lw=0.8, linestyle="dashed", alpha=0.6)
            ax.text(1.01, scores[metric], name, transform=ax.get_yaxis_transform(), fontsize=8, va="center")

        for model in dict.fromkeys(model for model, _ in best):
            look = analyze.look("global" if model in TRANSFORMER_LINES else model)
            look["linestyle"] = TRANSFORMER_LINES.get(model, "solid")
            counts = sorted(automata for other, automata in best if other == model)
            values = [[run["ood"][metric] for run in best[model, count].runs] for count in counts]
            draw_with_range(ax, counts, values, f"here: {model}", look)
        ax.set(xscale="log", xlabel="training automata (one sequence each)", ylabel=title, ylim=(0, 1.02),
               title="unseen automata")
        ax.set_xticks([100, 1000, 10000], ["100", "1,000", "10,000"])
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    save_figure(figure, out / "regbench.png")


# ----------------------------------------------------------------------------------------------------------------------
# The command line

class Experiment(NamedTuple):
    """What is done with the configurations of one kind."""
    kind: type
    job: Callable       # configuration -> measurements
    headline: Callable  # result -> its main numbers in a line
    report: Callable    # results, folder -> rows for the last table


EXPERIMENTS = [
    Experiment(Moons, moons_job, lambda r: "error {3:.3f} before the lcm, {4:.3f} after".format(*r["stairs"]),
               report_moons),
    Experiment(Length, length_job,
               lambda r: ", ".join(f"{a:.3f} at {length}" for a, length in zip(r["accuracy"], r["lengths"])),
               report_length),
    Experiment(RegBench, regbench_job,
               lambda r: "accuracy {accuracy:.3f}, TVD {tvd:.3f} on unseen automata".format(**r["ood"]),
               report_regbench),
]

# The toys that can be named: kind, and what is run of it when a flag is not given
COMMANDS = {"moons": (Moons, dict(heads="1,3"))}
for task in TASKS:
    COMMANDS[task] = (Length, dict(task=task, model=",".join(LENGTH_MODELS)))
COMMANDS["regbench"] = (RegBench, dict(model="rope,mosaic"))

# What `python toys.py` runs: toys, and the flags that keep them small
SHORT = {"moons": [], "recall": ["--model=floor,global,deltanet,mosaic"], "regbench": [],
         "parity": ["--model=deltanet,deltanet-beta2", "--steps=500"], "capacity": ["--model=global,deltanet"]}


def read_toy(name: str, argv: list[str]) -> list[Toy]:
    """The flags of one toy -> a configuration for each point of the grid and each seed."""
    kind, begin = COMMANDS[name]
    # What --help shows as the defaults. It need not be a configuration, since one default may be a list: "1,3".
    shown = SimpleNamespace(**{f.name: begin.get(f.name, f.default) for f in fields(kind)})
    # No flags: the toy's name and --seeds set two of these. Some toys have a varying number of targets a row, so that
    # rows may not be averaged in parts.
    set_here = ("task", "seed", "device_batch_size")
    given, _ = read_flags(kind, argv, usage=f"toys.py {name} [--key=value ...]",
                          description="Commas in a value make a grid.", shown=shown, fixed=set_here)
    # How runs are executed is the same for all of them.
    for flag, text in given.items():
        if kind.__dataclass_fields__[flag].metadata["group"] == "run" and "," in text:
            hint = "; --seeds=N runs the seeds 1 to N" if flag == "seeds" else ""
            raise UserError(f"--{flag}: expected one value{hint}")

    configs = []
    for settings in sweep_points(kind, begin | given):
        cfg = checked(kind, **settings)
        for seed in range(1, cfg.seeds + 1):
            configs.append(replace(cfg, seed=seed))
    return configs


def plan(argv: list[str]) -> list[Toy]:
    """The command line -> every model to train, each once."""
    chosen = SHORT
    if argv and not argv[0].startswith("-"):
        chosen = {name: [] for name in argv[0].split(",")}
        argv = argv[1:]
    configs = {}
    for name, flags in chosen.items():
        if name not in COMMANDS:
            raise UserError(f"{name}: expected a toy, one of {', '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}")
        toys = read_toy(name, flags + argv)
        if name in PAIRS and len({cfg.T for cfg in toys}) > 1:
            raise UserError(f"--T: {name} takes one length at a time, because its table has a column for each number "
                            "of pairs")
        if name == "regbench" and len({(cfg.T, cfg.test_automata) for cfg in toys}) > 1:
            raise UserError("--T and --test_automata: regbench takes one value at a time, because its n-grams are "
                            "measured once")
        for cfg in toys:
            configs[cfg.folder] = cfg
    return list(configs.values())


def worker_count(cfg: Toy) -> int:
    """How many models are trained at the same time."""
    if cfg.jobs > 0:
        return cfg.jobs
    if pick_device(cfg).type == "cuda":
        return 1
    return os.cpu_count() or 1


def train_and_report(argv: list[str]) -> None:
    """Trains all models, then reports. Raises UserError."""
    configs = plan(argv)
    out = Path(configs[0].out_dir)
    seen = []
    diverged = {}
    for experiment in EXPERIMENTS:
        chosen = [cfg for cfg in configs if type(cfg) is experiment.kind]
        if chosen:
            results, failed = run_all(chosen, experiment.job, experiment.headline, worker_count(chosen[0]))
            diverged |= failed
            if results:
                seen += experiment.report(results, out)
    abilities = analyze.read_abilities(out)
    if abilities:
        save_figure(analyze.ability_figure(abilities), out / "abilities.png")
    if seen:
        say("\nWhat was seen, beside what the papers say\n")
        say(analyze.table(["experiment", "what the papers say", "what was seen"], seen, left=3))
        say(f"every number: {out}/*/*/result.json")
    check_diverged(diverged, len(configs))


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0, 2 after bad input, 130 after Ctrl-C"""
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    try:
        check_one_process("toys.py")
        train_and_report(argv)
    except KeyboardInterrupt:
        say("\nstopped; the same command goes on from the models that are finished")
        return 130
    except (UserError, analyze.UserError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
