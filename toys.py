r"""Three toys that show what the memories do: minutes on a laptop, with pictures.

    python toys.py                                  all three, small: what was seen beside what the papers say
    python toys.py moons --seeds=20                 three moons (Memory Mosaics, section 3): figures 4, 5 and 6
    python toys.py recall --model=local,deltanet    or brackets, copy, repeat: train short, test up to 8x longer
    python toys.py regbench --automata=100,1000     random automata: figure 11 and table 4
    python toys.py moons --help                     a toy's flags; commas make a grid, --seeds=N runs seeds 1 to N

Each trained model leaves one JSON file in out/toys/moons/, length/ or regbench/ as soon as it is done; the same command
skips what is there, so an interrupted one goes on. Figures are PNG files in out/toys/. All training is train.fit's.

More commands
    what each change to the moons' recipe buys, and the paper's own recipe (as far as it is known)
        python toys.py moons --heads=3 --seeds=5 --sharpen=0,1.2 --skip=0,100
        python toys.py moons --heads=3 --seeds=5 --lr=0.01
        python toys.py moons --heads=3 --seeds=5 --periods=published --T=800 --steps=500 --lr=0.01 --sharpen=0 --skip=0
    memories and transformers on random automata, figure 11 and table 4 at laptop size: 20 minutes
        python toys.py regbench --model=mosaic,deltanet,learned,ttt,rope --automata=100,1000 --seeds=2
    all four tasks, every memory, three seeds: half an hour
        python toys.py brackets,copy,repeat,recall --seeds=3
    the whole of figure 11, for a GPU
        python toys.py regbench --automata=100,500,1000,2500,5000,40000 --model=rope,learned,mosaic,deltanet,ttt \
            --n_layer=2,4,8 --n_embd=64,128,256 --batch_size=64 --steps=8000 --seeds=3

Glossary
    context      observations or tokens that the memory holds when a prediction is made
    distance     tokens from an answer's place back to what it closes, copies or looks up
    TVD          total variation distance between two distributions, half their L1 distance
    IID, OOD     fresh strings of training automata; automata never trained on

Reading order
    settings, jobs        options of each toy, their flags, training many models side by side, tables and figures
    moons                 the network, the orbits, the 25-step evaluation
    brackets … recall     the four generators, accuracy by length and by distance
    regbench              automata, instances, metrics, in-context n-grams, the published numbers

References: Memory Mosaics (Zhang et al. 2024, 2405.06394), RegBench (Akyürek et al. 2024, 2401.12973), the recall task
(Arora et al. 2023, 2312.04927), the repository memory-architectures (brackets, copying, repeated elements).
"""
import argparse
import difflib
import io
import itertools
import json
import math
import os
import platform
import random
import re
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, MEMORIES, Config, attend, state_bytes
from train import (Diverged, FitConfig, Parser, UserError, build, count_params, disk, fit, opt, parse_value,
                   pick_device, replacing, say, uses_bf16)

# ----------------------------------------------------------------------------------------------------------------------
# Settings

@dataclass
class Toy(FitConfig):
    """What all toys share, on top of the training's own settings. `toy` is the folder of the results, `identity` the
    fields that are always part of a result's name."""
    eval_every: int = opt(0, "not used by the toys", "hidden")
    save_every: int = opt(0, "not used by the toys", "hidden")
    compile: str = opt("false", "torch.compile: true or false", "run", ("true", "false"))
    seeds: int = opt(1, "how many seeds: 1, 2, … N", "run", low=1)
    jobs: int = opt(0, "models trained side by side, one thread each; 0 = one a core, on a GPU one", "run")
    out_dir: str = opt("out/toys", "where results and figures go", "run")
    batch_size: int = opt(16, "sequences in a step", low=1)


@dataclass
class Moons(Toy):
    """Changes to the paper's recipe, which takes long and stays too blurred for an error below 0.05: short sequences of
    whole-number periods drawn at random; a learning rate of 0.03, with which the error gets there on every seed; keys
    that grow, so that the kernel ends narrow; no loss where the memories are still near empty. One head needs slower
    learning: keys whose length depends on the configuration mistake one for another."""
    heads: int = opt(3, "3 heads of 2 real dimensions, or 1 of 6", "toy", (1, 3))
    T: int = opt(256, "observations in a training sequence", "toy", low=16)
    periods: str = opt("random", "random: whole numbers, log-uniform; published: the paper's eight triples", "toy",
                       ("random", "published"))
    beta: float = opt(50.0, "inverse temperature of the memories", "toy")
    sharpen: float = opt(-1.0, "g: keys grow by e^g, so the kernel narrows; -1 = 1.2, one head 2", "toy", low=-1)
    skip: int = opt(-1, "observations without loss after 30% of the steps; -1 = 100, one head 128", "toy", low=-1)
    loss_clip: float = opt(0.5, "largest mean squared error an observation can cost", "toy")
    sequences: int = opt(512, "validation sequences", "toy", low=1)
    optimizer: str = opt("adamw", "adamw", "hidden", ("adamw",))
    lr: float = opt(0.0, "peak learning rate; 0 = 0.03, one head 0.015")
    warmup: int = opt(0, "steps of linear warm-up")
    warmdown: float = opt(1.0, "the share of the steps that decays, linearly", high=1)
    weight_decay: float = opt(0.0, "decoupled weight decay")
    dtype: str = opt("float32", "always", "hidden", ("float32",))
    toy, identity = "moons", ("heads",)

    def __post_init__(self):
        lr, sharpen, skip = (0.015, 2.0, 128) if self.heads == 1 else (0.03, 1.2, 100)
        self.lr = self.lr or lr
        self.sharpen = sharpen if self.sharpen == -1 else self.sharpen
        self.skip = skip if self.skip == -1 else self.skip


@dataclass
class Length(Toy):
    task: str = opt("recall", "brackets, copy, repeat or recall", "hidden")
    model: str = opt("local", "local (attention over a window), global, rmt0 (rmt without memory) or a memory", "toy")
    T: int = opt(64, "training length; tests are 1, 2, 4 and 8 times as long", "toy", low=32)
    window: int = opt(16, "of local, persistent and knn; segment of rmt", "toy", low=1)
    n_layer: int = opt(2, "blocks", "toy", low=1)
    n_embd: int = opt(64, "channels", "toy", low=1)
    n_head: int = opt(2, "heads", "toy", low=1)
    pos: str = opt("rope", "positions in attention: rope, alibi or none", "toy", ("rope", "alibi", "none"))
    test_rows: int = opt(64, "test sequences at each length", "toy", low=1)
    lr: float = opt(6e-3, "peak learning rate, Muon's and AdamW's alike")
    batch_size: int = opt(32, "sequences in a step", low=1)
    toy, identity = "length", ("task", "model")


@dataclass
class RegBench(Toy):
    model: str = opt("rope", "rope or learned (transformers with these positions), none (without), or a memory", "toy")
    automata: int = opt(1000, "training automata, one sequence each", "toy", low=1)
    T: int = opt(512, "longest sequence; what is longer is cut", "toy", low=8)
    n_layer: int = opt(2, "blocks", "toy", low=1)
    n_embd: int = opt(64, "channels", "toy", low=1)
    n_head: int = opt(4, "heads", "toy", low=1)
    test_automata: int = opt(200, "sequences in each of the three test sets", "toy", low=1)
    toy, identity = "regbench", ("model", "automata")


def label(cfg: Toy) -> str:
    """mosaic-1000-n_layer=4-s1: the toy's identity, whatever differs from its defaults, the seed."""
    identity = {name: getattr(cfg, name) for name in cfg.identity}
    usual = settings(type(cfg)(**identity, seed=cfg.seed))
    changed = [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
               for name, value in settings(cfg).items() if value != usual[name]]
    return "-".join([*map(str, identity.values()), *changed, f"s{cfg.seed}"])


def settings(cfg: Toy) -> dict:
    """What makes a result another one: all settings but those that only say how it is run."""
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata["group"] != "run"}


def suggest(given: str, known, form: str = "{}") -> str:
    close = difflib.get_close_matches(given, known, 1, 0.5)
    return f"; did you mean {form.format(close[0])}?" if close else ""


def parse(kind: type, argv: list[str], defaults: dict) -> list[Toy]:
    """Flags of one toy -> one configuration for each point of the grid and each seed."""
    known = {f.name: f for f in fields(kind) if f.metadata["group"] != "hidden" and f.name != "seed"}
    parser = Parser(prog="toys.py", usage="toys.py TOY [--key=value ...]", allow_abbrev=False,
                    description="Commas in a value make a grid.")
    groups = {g: parser.add_argument_group(g) for g in ("toy", "optimisation", "run")}
    for name, f in known.items():
        usual = ",".join(map(str, defaults.get(name, [f.default])))
        text = f"{f.metadata['help']} (default: {usual})".replace("%", "%%")
        groups[f.metadata["group"]].add_argument(f"--{name}", default=argparse.SUPPRESS,
                                                 metavar=f.type.__name__.upper(), help=text)
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        close = suggest(unknown[0].split("=")[0].lstrip("-").replace("-", "_"), known, "--{}=...")
        raise UserError(f"unknown argument {unknown[0]}" + (close or "; --help lists the flags"))
    grid = dict(defaults)
    for name, text in vars(flags).items():
        grid[name] = [parse_value(name, known[name].type.__name__, value) for value in text.split(",")]
        if known[name].metadata["group"] == "run" and len(grid[name]) > 1:
            raise UserError(f"--{name}: expected one value" + "; --seeds=N runs the seeds 1 to N" * (name == "seeds"))
    points = [kind(**dict(zip(grid, point))) for point in itertools.product(*grid.values())]
    for cfg in points:
        check(cfg)
    return [replace(cfg, seed=seed) for cfg in points for seed in range(1, cfg.seeds + 1)]


def check(cfg: Toy) -> None:
    """Refuses what cannot be trained, before anything is."""
    for f in fields(cfg):
        value, known = getattr(cfg, f.name), f.metadata
        if known["choices"] and value not in known["choices"]:
            raise UserError(f"--{f.name}={value}: expected one of {', '.join(map(str, known['choices']))}")
        if isinstance(value, (int, float)) and not (math.isfinite(value) and known["low"] <= value <= known["high"]):
            raise UserError(f"--{f.name}={value}: expected a number from {known['low']} to {known['high']}")
    uses_bf16(cfg)                          # refuses a device that is not here, and a dtype it does not train in
    if not isinstance(cfg, Moons):
        count_params(architecture(cfg))     # refuses a network that cannot be built
    elif cfg.skip >= cfg.T - 2:
        raise UserError(f"--skip={cfg.skip}: leaves no observation of T={cfg.T} to learn from; give less")


# ----------------------------------------------------------------------------------------------------------------------
# Many models side by side

class Labelled(io.TextIOBase):
    """Several workers print to one terminal, so each line says whose it is."""
    def __init__(self, name: str, stream):
        self.name, self.stream = name, stream

    def write(self, text: str) -> int:
        for line in filter(str.strip, text.splitlines()):
            self.stream.write(f"  [{self.name}] {line}\n")
        self.stream.flush()
        return len(text)


def save(path: Path, data: bytes) -> None:
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as f:
        f.write(data)


def result_path(cfg: Toy) -> Path:
    return Path(cfg.out_dir, cfg.toy, label(cfg) + ".json")


def run_one(cfg: Toy) -> dict:
    """Trains and measures one model, and leaves its JSON file."""
    torch.manual_seed(cfg.seed)
    start, cpu_start = time.perf_counter(), time.process_time()
    with redirect_stdout(Labelled(label(cfg), sys.stdout)):
        result = JOBS[type(cfg)](cfg)
    cuda = pick_device(cfg).type == "cuda"
    device = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    result = dict(toy=cfg.toy, name=label(cfg), seed=cfg.seed, config=settings(cfg)) | result | dict(
        seconds=round(time.perf_counter() - start, 1), cpu_seconds=time.process_time() - cpu_start,
        device=f"{device}, {torch.get_num_threads()} threads",
        versions=dict(python=platform.python_version(), torch=torch.__version__))
    save(result_path(cfg), json.dumps(result, indent=1).encode())
    return result


def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback
    torch.set_num_threads(1)


def run_all(configs: list[Toy]) -> tuple[list[dict], list[str]]:
    """The results of all configurations, in order, and the names of those that diverged; finished ones are read, the
    others trained on all cores."""
    results, failed = [], []
    for cfg in configs:
        path = result_path(cfg)
        found = json.loads(path.read_text()) if path.is_file() else {}
        results.append(found if found.get("config") == settings(cfg) else None)
    todo = [i for i, found in enumerate(results) if found is None]
    if done := len(configs) - len(todo):
        say(f"{done} of {len(configs)} models are finished already (delete their JSON files to train them again)")
    cuda = pick_device(configs[0]).type == "cuda"
    workers = min(configs[0].jobs or (1 if cuda else os.cpu_count() or 1), max(len(todo), 1))
    start = time.perf_counter()
    # Spawned, not forked: a forked child inherits torch's threads in an unknown state.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
    try:
        futures = {pool.submit(run_one, configs[i]): i for i in todo}
        for done, future in enumerate(as_completed(futures), 1):
            i = futures[future]
            cfg, left = configs[i], (time.perf_counter() - start) / done * (len(todo) - done) / 60
            try:
                r = results[i] = future.result()
                said = f"{HEADLINES[type(cfg)](r)}  ({r['seconds']:.0f} s; "
            except Diverged as e:
                failed.append(label(cfg))
                said = f"{e}  ("
            say(f"{done}/{len(todo)}  {cfg.toy} {label(cfg)}: {said}about {left:.1f} minutes left)")
    except BrokenProcessPool:
        raise UserError("a worker was killed, perhaps for want of memory; finished models are kept, so give the same "
                        "command again with --jobs=1") from None
    except BaseException:           # Ctrl-C too: no worker may outlive the command; then it goes on its way
        for process in active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [r for r in results if r], failed


def grouped(results: list[dict]) -> tuple[dict[str, list[dict]], str]:
    """Results by setting, the seeds together, in the order given; what all settings change in the defaults is not in
    their names, but returned beside them."""
    parts = [re.split(r"-(?=\w+=)", r["name"].rsplit("-s", 1)[0]) for r in results]
    shared = [part for part in parts[0][1:] if all(part in others for others in parts)]
    groups: dict = {}
    for r, some in zip(results, parts):
        groups.setdefault(", ".join(part for part in some if part not in shared), []).append(r)
    return groups, f" (all with {', '.join(shared)})" * bool(shared)


def print_table(head: list[str], lines: list[list[str]], left: int = 1) -> None:
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    for line in [head, *lines]:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))]
        say("  " + "  ".join(cells).rstrip())


# Okabe and Ito's colours, told apart by colour-blind readers too; markers and dashes tell them apart in grey.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#8A8A8A", "#B8A800"]
MARKERS = "osD^vPX*h"


def figure(width: float, height: float):
    from matplotlib import rcParams  # here, because it takes half a second to import
    from matplotlib.figure import Figure
    rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.alpha": 0.25, "legend.frameon": False})
    return Figure(figsize=(width, height), layout="constrained")


def curve(ax, i: int, x, values, name: str) -> None:
    """The mean over seeds and their range, in style number i; values: the seeds' numbers at each x."""
    low, middle, high = ([of(v) for v in values] for of in (min, mean, max))
    dashes, colour = ("-", "--", ":")[(i + i // 9) % 3], COLOURS[i % 9]
    ax.plot(x, middle, color=colour, marker=MARKERS[i % 9], ms=5, lw=1.6, ls=dashes, label=name)
    ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    ax.vlines(x, low, high, color=colour, lw=1)


def save_figure(fig, path: Path) -> None:
    picture = io.BytesIO()
    fig.savefig(picture, dpi=110)
    save(path, picture.getvalue())
    say(f"drawn: {path}")


# ----------------------------------------------------------------------------------------------------------------------
# moons

VALIDATION = (1, 2, 3)  # the published ratios of periods: the nine triples of {.5, 1, …, 3.5} with the smallest lcm
PUBLISHED = ((.5, 1, 2), (.5, 1, 1.5), (.5, 1, 3), (.5, 1.5, 3), (1, 1.5, 3), (.5, 1, 2.5), (1, 1.5, 2), (.5, 1.5, 2))
LONG, LCM = 800, 6      # a validation sequence holds three full periods of the whole system: 800/18 observations a unit
UNIT = LONG / (3 * LCM)


class MoonsNet(nn.Module):
    """One layer of associative memories (their figure 3), x (B,T,3) complex: an observation is three unit numbers.

        k_t = W_φ x_t    v_t = W_ψ x_{t+1}    y_t = Σ_{i<t} softmax_i(β Re⟨k_t, k_i⟩) v_i    x̂_{t+1} = W_z y_t

    The 3 complex numbers of k, v and y are one head of 6 real dimensions, or three heads of 2. forward is a batch's
    loss: each observation's squared error clipped at loss_clip, from `first` on, with keys times e^g."""
    def __init__(self, cfg: Moons):
        super().__init__()
        self.cfg = cfg
        self.phi, self.psi, self.z = (nn.Parameter(torch.randn(3, 3, 2) * 6 ** -0.5) for _ in range(3))

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.view_as_complex(w) for w in (self.phi, self.psi, self.z))

    def heads(self, x: Tensor) -> Tensor:
        """(B,T,3) complex -> (B,H,T,6/H) real"""
        return torch.view_as_real(x).flatten(2).unflatten(2, (self.cfg.heads, -1)).transpose(1, 2)

    def combine(self, y: Tensor) -> Tensor:
        y = y.transpose(1, 2).flatten(2).unflatten(2, (3, 2)).contiguous()
        return torch.view_as_complex(y) @ self.matrices()[2].T

    def forward(self, x: Tensor, g: Tensor, first: Tensor) -> Tensor:
        phi, psi, _ = self.matrices()
        keys, values = self.heads(x @ phi.T) * g[0].exp(), self.heads(x[:, 1:] @ psi.T)
        # Query t = 1, 2, … over the pairs i < t: plain causal attention on shifted tensors (as in model.py).
        y = attend(keys[:, :, 1:-1], keys[:, :, :-2], values[:, :, :-1], scale=self.cfg.beta)
        wrong = torch.view_as_real(x[:, 2:] - self.combine(y)).square().mean((2, 3))          # (B,T-2) of x_2, x_3, …
        return wrong.clamp(max=self.cfg.loss_clip)[:, int(first[0]):].mean()

    @torch.no_grad()
    def rollout_error(self, x: Tensor, contexts: list[int], horizon: int = 25) -> Tensor:
        """Mean absolute deviation (over sequences, 25 steps, 6 real coordinates) between the true future and the
        autoregressive one, after each number n of observations in `contexts`. Predictions are fed back as inputs; the
        memory stays at the n - 1 pairs that n observations make."""
        phi, psi, _ = self.matrices()
        keys, values, errors = self.heads(x @ phi.T), self.heads(x[:, 1:] @ psi.T), []
        for n in torch.tensor(contexts).split(16):
            K, V = keys[:, :, :n.max() - 1], values[:, :, :n.max() - 1]
            mask = torch.arange(K.size(2)) < n[:, None] - 1                                     # (16,pairs)
            now, error = x[:, n - 1], 0.0
            for step in range(horizon):
                y = F.scaled_dot_product_attention(self.heads(now @ phi.T), K, V, attn_mask=mask, scale=self.cfg.beta)
                now = self.combine(y)
                error = error + torch.view_as_real(now - x[:, n + step]).abs().mean((0, 2, 3)) / horizon
            errors.append(error)
        return torch.cat(errors)


def same_ratios(p) -> bool:
    return tuple(sorted(v // math.gcd(*p) for v in p)) == VALIDATION


# One head can predict nothing before the lcm of the periods: these are the systems whose lcm fits twice into T = 256.
SHORT_SYSTEMS = [p for lcm in range(40, 127)
                 for p in itertools.permutations([d for d in range(4, lcm) if lcm % d == 0], 3)
                 if math.lcm(*p) == lcm and not same_ratios(p)]


def draw_periods(rng, cfg: Moons) -> np.ndarray:
    """Three periods to train on, never in the ratios of the validation set; whole numbers unless published."""
    if cfg.periods == "published":
        return np.array(PUBLISHED[rng.integers(len(PUBLISHED))]) * cfg.T / (3 * LCM)
    if cfg.heads == 1:
        return np.array(SHORT_SYSTEMS[rng.integers(len(SHORT_SYSTEMS))])
    while True:
        p = np.exp(rng.uniform(math.log(12), math.log(81), 3)).astype(int)
        if len(set(p)) == 3 and not same_ratios(p.tolist()):
            return p


def orbits(rng, periods: np.ndarray, T: int) -> Tensor:
    """periods (B,3), random phases -> (B,T,3) complex64"""
    phase = rng.uniform(0, 1, periods.shape)
    angle = 2 * math.pi * ((np.arange(T)[None, :, None] / periods[:, None]) + phase[:, None])
    return torch.from_numpy(np.exp(1j * angle).astype(np.complex64))


def moons_batch(step: int, cfg: Moons) -> tuple[Tensor, Tensor, Tensor]:
    """Observations, the sharpening g of this step and the first observation that counts: the same in every row, because
    fit splits a batch by its rows."""
    rng, done = np.random.default_rng([cfg.seed, step]), step / cfg.steps
    x = orbits(rng, np.stack([draw_periods(rng, cfg) for _ in range(cfg.batch_size)]), cfg.T)
    g = cfg.sharpen * min(max((done - 0.3) / 0.5, 0.0), 1.0)
    return x, torch.full((len(x),), g), torch.full((len(x),), cfg.skip if done > 0.3 else 0)


def disentangled(phi: Tensor, psi: Tensor, z: Tensor) -> tuple[bool, float]:
    """Does each head own one moon, the same one in its keys (a row of W_φ), its values (a row of W_ψ) and the output (a
    column of W_z), and no two heads the same? -> that at a share of 95% of |W|², and the smallest share."""
    power = torch.stack([phi.abs() ** 2, psi.abs() ** 2, z.abs().T ** 2])                       # (3,heads,moons)
    share, moon = (power / power.sum(-1, keepdim=True)).max(-1)
    consistent = bool((moon == moon[0]).all()) and len(set(moon[0].tolist())) == 3
    return consistent and share.min().item() >= 0.95, share.min().item()


def moons_job(cfg: Moons) -> dict:
    net, start = MoonsNet(cfg), time.process_time()
    history = fit(net, lambda step: moons_batch(step, cfg), cfg)
    train_seconds = time.process_time() - start
    net.cpu()
    with torch.no_grad():
        net.phi *= math.exp(cfg.sharpen)  # the narrow kernel, folded into the keys: β is the paper's again
    periods = [p * UNIT for p in (*VALIDATION, LCM)]    # the moons', and the whole system's
    x = orbits(np.random.default_rng(0), np.tile(periods[:3], (cfg.sequences, 1)), LONG)
    contexts = list(range(2, 300, 4)) + list(range(300, LONG - 25, 25))
    error = net.rollout_error(x, contexts).tolist()
    stairs = [mean(e for n, e in zip(contexts, error) if a + 2 <= n <= b)  # two observations past a period to the next
              for a, b in itertools.pairwise([0, *periods, LONG])]
    apart, share = disentangled(*net.matrices())
    return dict(contexts=contexts, error=error, periods=periods, stairs=stairs, smallest_share=share,
                disentangled=apart and cfg.heads == 3, converged=stairs[3 if cfg.heads == 3 else 4] < 0.05,
                matrices=[torch.view_as_real(m).tolist() for m in net.matrices()], final_loss=history[-1]["loss"],
                train_cpu_seconds=train_seconds)


def report_moons(results: list[dict], out: Path) -> list[list[str]]:
    groups, common = grouped(results)
    groups = {name[0] + (" heads" if name[0] == "3" else " head") + name[1:]: rs for name, rs in groups.items()}
    lines, seen = [], []
    for name, rs in groups.items():
        stairs = [median(r["stairs"][i] for r in rs) for i in range(5)]
        good, apart = (f"{sum(r[key] for r in rs)}/{len(rs)}" for key in ("converged", "disentangled"))
        if name[0] == "3":
            said = "error drops as each moon's period ends, small after the slowest"
            here = " ".join(f"{s:.2f}" for s in stairs[:3]) + f" then {stairs[3]:.3f}; disentangled {apart}"
        else:
            said = "accurate only after the least common multiple"
            here = f"{stairs[3]:.2f} before, {stairs[4]:.3f} after"
        lines.append([name, *(f"{s:.3f}" for s in stairs), good, apart if name[0] == "3" else "-",
                      f"{max(r['cpu_seconds'] for r in rs):.0f}"])
        seen.append([f"moons, {name}", said, here])
    say(f"\nThree moons{common}: mean absolute error of 25 steps, median over seeds, by the observations in memory")
    print_table(["network", "< P1", "< P2", "< P3", "< lcm", "> lcm", "error < .05", "disentangled", "cpu s"], lines)
    plot_moons(groups, out)
    return seen


def plot_moons(groups: dict[str, list[dict]], out: Path) -> None:
    """Every seed's error against the context, the first in bold; the matrices of the first network with three heads."""
    fig = figure(9, 3.2 * len(groups))
    axes = fig.subplots(len(groups), squeeze=False, sharex=True, sharey=True)[:, 0]
    for ax, (name, rs) in zip(axes, groups.items()):
        for i, r in enumerate(rs):
            ax.plot(r["contexts"], r["error"], color=COLOURS[5], lw=0.7 if i else 2, alpha=0.4 if i else 1)
        for p, colour, dashes in zip(rs[0]["periods"], [COLOURS[0]] * 3 + [COLOURS[4]], ["--"] * 3 + ["-"]):
            ax.axvline(p, color=colour, ls=dashes, lw=1.2)
            ax.text(p + 4, 0.75, f"{p:.0f}", transform=ax.get_xaxis_transform(), fontsize=10)
        ax.set(ylim=(0, None), xlim=(0, LONG - 25), title=name, ylabel="mean absolute deviation\nof the next 25 steps")
    ax.set_xlabel("observations in memory (dashed: each moon's period; solid: their least common multiple)")
    save_figure(fig, out / "moons.png")
    three = [(f"{name}, seed {rs[0]['seed']}", rs[0]["matrices"]) for name, rs in groups.items() if name[0] == "3"]
    if three:
        fig = figure(8.5, 3.4)
        fig.suptitle(three[0][0])
        axes = fig.subplots(1, 3)
        for ax, matrix, title in zip(axes, three[0][1], ("$W_φ$ keys", "$W_ψ$ values", "$W_z$ output")):
            size = np.hypot(*np.moveaxis(np.array(matrix), -1, 0))
            image = ax.imshow(size / size.max(), cmap="cividis", vmin=0, vmax=1, extent=(0.5, 3.5, 3.5, 0.5))
            ax.set(title=title, xlabel="moon", ylabel="head", xticks=(1, 2, 3), yticks=(1, 2, 3))
            ax.grid(False)
        axes[2].set(xlabel="head", ylabel="moon")
        fig.colorbar(image, ax=axes, label="|weight|, the largest = 1")
        save_figure(fig, out / "moons-matrices.png")


# ----------------------------------------------------------------------------------------------------------------------
# brackets, copy, repeat, recall: a generator returns one sequence's x, y, distance (T,); y = -1 where nothing is asked

def bracket_word(rng, n: int, depth: int) -> list[int]:
    """n tokens: balanced brackets of 8 kinds (openers 1-8, closers 9-16) nested at most `depth` deep, and blanks (0).
    Every length that fits is as likely for a pair, so that far matches are frequent."""
    word: list[int] = []
    while (left := n - len(word)) > 0:
        if depth == 0 or left < 2:
            return word + [0] * left
        inside, kind = rng.randint(0, left - 2), rng.randint(1, 8)
        word += [kind, *bracket_word(rng, inside, depth - 1), kind + 8]
    return word


def brackets(rng, T: int):
    """Which closer comes next? Asked wherever one comes.

        x   (  [  .  .  ]  {  }  .  )         . = blank
        y            ]     }     )            distance of the last answer: 8, back to its opener
    """
    word, stack = bracket_word(rng, T + 1, 4), []
    y, distance = [-1] * T, [0] * T
    for t, token in enumerate(word):
        if 1 <= token <= 8:
            stack.append(t)
        elif token:
            opener = stack.pop()
            y[t - 1], distance[t - 1] = token, t - opener
    return word[:T], y, distance


def copy(rng, T: int):
    """Repeat the last string of 8 (16 symbols, 2-17) when | (1) comes, after a blank (0) gap of any length.

        x   c a b f . . . . . | c a b         (strings of 4 for the picture)
        y                     c a b f         distance 10
    """
    word, y, distance = [], [], []  # built from the end, so that the last gap may be anything up to the whole sequence
    while T - len(word) >= 17:
        gap, string = rng.randint(0, T - len(word) - 17), [rng.randint(2, 17) for _ in range(8)]
        word = string + [0] * gap + [1] + string + word
        y = [-1] * (8 + gap) + string + [-1] + y
        distance = [0] * (8 + gap) + [gap + 9] * 8 + [0] + distance
    rest = T + 1 - len(word)
    return ([0] * rest + word)[:T], ([-1] * rest + y)[:T], ([0] * rest + distance)[:T]


def repeat(rng, T: int):
    """Has this element (2-289) been here before? Half of them have, as long ago as you like (log-uniform); once all 288
    have been used, all of them.

        x   k  d  a  d  q  k
        y   0  0  0  1  0  1                  distance of the last answer: 5
    """
    fresh, word, rows = rng.sample(range(2, 290), 288), [], []
    for t in range(T):
        back = int(t ** rng.random()) if t else 0
        new = t == 0 or bool(fresh) and rng.random() < 0.5
        word.append(fresh.pop() if new else word[t - back])
        rows.append((word[t], int(not new), 0 if new else word[-2::-1].index(word[t]) + 1))
    return zip(*rows)


def recall(rng, T: int):
    """Write one of 8 values to one of 16 keys (one token, 24 + 8 key + value), or read a key (8 + key): what was last
    written to it (0-7)?

        x   a=7  b=3  a?   a=5  b?   a?       distance of the last answer: 2
        y             7         3    5
    """
    written, rows = {}, []
    for t in range(T):
        key = rng.randrange(16)
        if key in written and rng.random() < 0.5:
            value, then = written[key]
            rows.append((8 + key, value, t - then))
        else:
            value = rng.randrange(8)
            written[key] = value, t
            rows.append((24 + 8 * key + value, -1, 0))
    return zip(*rows)


TASKS = {"brackets": (brackets, 17), "copy": (copy, 18), "repeat": (repeat, 290), "recall": (recall, 152)}  # vocabulary
# Names of models -> settings of their Config: attention to compare with, then every memory.
WITH_MEMORY = {m: dict(memory=m) for m in MEMORIES if m != "none"}
REGBENCH_MODELS = {pos: dict(pos=pos) for pos in ("rope", "learned", "none")} | WITH_MEMORY
LENGTH_MODELS = {"local": dict(window="S"), "global": {}, "rmt0": dict(memory="rmt", rmt_tokens=0)} | WITH_MEMORY
LENGTH_MODELS["persistent"] = dict(memory="persistent", window="S")


class LocalConfig(Config):
    """Here S is a short window in the last layer too: what lies outside it can be reached through the memory alone."""
    def window_of(self, layer):
        return self.local_window if self.window[layer % len(self.window)] == "S" else None


def architecture(cfg: Length | RegBench) -> Config:
    models = LENGTH_MODELS if isinstance(cfg, Length) else REGBENCH_MODELS
    if cfg.model not in models:
        raise UserError(f"--model={cfg.model}: expected one of {', '.join(models)}{suggest(cfg.model, models)}")
    shape = dict(n_layer=cfg.n_layer, n_embd=cfg.n_embd, n_head=cfg.n_head, max_seq_len=cfg.T, window="L")
    if isinstance(cfg, RegBench):
        return build(Config, **shape | dict(vocab_size=20) | models[cfg.model])
    if cfg.model.startswith("rmt") and cfg.T % cfg.window:
        raise UserError(f"--window={cfg.window}: T={cfg.T} is not a multiple of it, so rmt's segments do not fit")
    shape |= dict(vocab_size=TASKS[cfg.task][1], short_window=cfg.window, rmt_segment=cfg.window, pos=cfg.pos)
    return build(LocalConfig, **shape | models[cfg.model])


def length_batch(task: str, rows: int, T: int, *seed: int) -> tuple[Tensor, ...]:
    """x, y, distance (rows,T) int64, a function of the arguments alone."""
    rng = random.Random(repr((task, T, *seed)))
    made = [TASKS[task][0](rng, T) for _ in range(rows)]
    return tuple(torch.tensor(column) for column in zip(*made))


def share(right: Tensor, asked: Tensor) -> float:
    """Of what is asked, how much is right; 0 where nothing is asked."""
    return (right & asked).sum().item() / max(1, asked.sum().item())


def length_job(cfg: Length) -> dict:
    device, model, start = pick_device(cfg), GPT(architecture(cfg)), time.process_time()
    fit(model, lambda step: length_batch(cfg.task, cfg.batch_size, cfg.T, cfg.seed, step + 1)[:2], cfg)
    train_seconds = time.process_time() - start
    model.eval()
    lengths, accuracy, states, bins = [cfg.T * k for k in (1, 2, 4, 8)], [], [], [1, 16]
    for T in lengths:
        x, y, distance = length_batch(cfg.task, cfg.test_rows, T, 0, 0)
        with torch.no_grad():
            guess = torch.cat([model.stream(part.to(device))[0].argmax(-1).cpu() for part in x.split(32)])
            states.append(state_bytes(model.stream(x[:1].to(device))[1]))
        asked, right = y >= 0, guess == y
        accuracy.append(share(right, asked & (torch.arange(T) >= T - cfg.T)))
    while bins[-1] < lengths[-1]:
        bins.append(2 * bins[-1])
    by_distance = []                                            # these and far_accuracy: at the longest length
    for a, b in itertools.pairwise(bins):
        some = asked & (distance >= a) & (distance < b)
        by_distance.append(dict(distance=[a, b - 1], asked=some.sum().item(), accuracy=share(right, some)))
    far = asked & (distance >= 2 * cfg.window)
    return dict(lengths=lengths, accuracy=accuracy, by_distance=by_distance, state_bytes=states,
                far_accuracy=share(right, far) if far.any() else None,
                parameters=sum(p.numel() for p in model.parameters()), train_cpu_seconds=train_seconds)


def report_length(results: list[dict], out: Path) -> list[list[str]]:
    seen = []
    for task in dict.fromkeys(r["config"]["task"] for r in results):
        groups, common = grouped([r for r in results if r["config"]["task"] == task])
        groups = {name.removeprefix(task + "-"): rs for name, rs in groups.items()}
        trained = ", ".join(dict.fromkeys(str(r["config"]["T"]) for rs in groups.values() for r in rs))
        lines, here = [], []
        for name, rs in groups.items():
            accuracy = [f"{mean(a):.3f}" for a in zip(*(r["accuracy"] for r in rs))]
            far = "-" if rs[0]["far_accuracy"] is None else f"{mean(r['far_accuracy'] for r in rs):.3f}"
            sizes = (f"{n:,}" for n in (rs[0]["parameters"], rs[0]["state_bytes"][0], rs[0]["state_bytes"][-1]))
            lines.append([name, *accuracy, far, str(len(rs)), *sizes, f"{mean(r['cpu_seconds'] for r in rs):.0f}"])
            here.append(f"{name} {accuracy[-1]}")
        say(f"\n{task}, trained at T = {trained}{common}: accuracy in the last T tokens, mean over seeds; far = at 8T, "
            "answers two windows back or more")
        print_table(["model", "at T", "at 2T", "at 4T", "at 8T", "far", "seeds", "parameters", "state at T",
                     "state at 8T", "cpu s"], lines)
        plot_length(task, trained, groups, out)
        seen.append([f"{task}, at 8T", "a memory keeps its accuracy, attention loses it sooner", "; ".join(here)])
    return seen


def plot_length(task: str, trained: str, groups: dict[str, list[dict]], out: Path) -> None:
    fig = figure(10, 4.2)
    left, right = fig.subplots(1, 2, sharey=True)
    for i, (name, rs) in enumerate(groups.items()):
        curve(left, i, rs[0]["lengths"], list(zip(*(r["accuracy"] for r in rs))), name)
        bins = [bs for bs in zip(*(r["by_distance"] for r in rs)) if bs[0]["asked"] >= 20]     # fewer would be noise
        middle = [math.prod(bs[0]["distance"]) ** 0.5 for bs in bins]
        curve(right, i, middle, [[b["accuracy"] for b in bs] for bs in bins], name)
    left.set(xscale="log", xlabel=f"tokens in the sequence (trained at {trained})", ylabel="accuracy",
             ylim=(-0.02, 1.02), title=f"{task}: last {trained} tokens")
    right.set(xscale="log", xlabel="distance of the answer, tokens", title=f"{task}: the longest sequences")
    ticks = sorted({n for rs in groups.values() for n in rs[0]["lengths"]})
    for ax, ticks in ((left, ticks), (right, [4, 16, 64, 256])):
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
    fig.legend(*left.get_legend_handles_labels(), loc="outside right center", title="mean and range\nof the seeds")
    save_figure(fig, out / f"{task}.png")


# ----------------------------------------------------------------------------------------------------------------------
# regbench

SYMBOLS, SEP, PAD = 18, 18, 19
Automaton = tuple[dict[int, int], ...]  # for each state, symbol -> next state, all equally likely; the start is state 0


def minimal(automaton: Automaton) -> Automaton:
    """The smallest automaton with the same distribution over strings, its states numbered by a breadth-first search in
    symbol order: two automata are the same language exactly if their minimal forms are equal.

    Moore's algorithm: all states start in one class, and a class is split until its states go to the same classes by
    the same symbols (whose set fixes the uniform distribution). Unreachable states are left out."""
    classes = [0] * len(automaton)
    for _ in automaton:                                         # as many rounds as states split all there is to split
        rows = [sorted((a, classes[p]) for a, p in edges.items()) for edges in automaton]
        classes = [rows.index(row) for row in rows]             # a class is named after its first state
    order = [0]
    for q in order:                                             # grows while it is read
        for _, p in sorted(automaton[q].items()):
            if classes[p] not in order:
                order.append(classes[p])
    return tuple({a: order.index(classes[p]) for a, p in sorted(automaton[q].items())} for q in order)


def draw_automaton(rng) -> Automaton:
    """4-12 states, an alphabet of 4-18 symbols, 1-3 edges a state with distinct symbols to distinct other states; drawn
    again if fewer than 4 states are left when it is minimal."""
    while True:
        n, alphabet = rng.randint(4, 12), rng.sample(range(SYMBOLS), rng.randint(4, SYMBOLS))
        automaton = []
        for q in range(n):
            k = rng.randint(1, 3)
            automaton.append(dict(zip(rng.sample(alphabet, k), rng.sample([p for p in range(n) if p != q], k))))
        automaton = minimal(tuple(automaton))
        if len(automaton) >= 4:
            return automaton


def draw_automata(seed: int, counts: list[int]) -> list[list[Automaton]]:
    """Lists of that many automata; no language is in two places."""
    rng, made = random.Random(seed), {}
    while len(made) < sum(counts):
        automaton = draw_automaton(rng)
        made.setdefault(repr(automaton), automaton)
    rest = iter(made.values())
    return [list(itertools.islice(rest, n)) for n in counts]


def instance(rng, automaton: Automaton, T: int) -> tuple[list[int], list[int]]:
    """10-19 strings of 1-49 symbols with separators between them, cut to T + 1 tokens -> tokens, and for each the state
    that emitted it (-1 for a separator)."""
    emitted = []
    for _ in range(rng.randint(10, 19)):
        q = 0
        for _ in range(rng.randint(1, 49)):
            a = rng.choice(list(automaton[q]))
            emitted.append((a, q))
            q = automaton[q][a]
        emitted.append((SEP, -1))
    return tuple(map(list, zip(*emitted[:-1][:T + 1])))


class Instances:
    """One sequence from each automaton: x, y (N,T) int64, y = -1 where the next token is a separator or padding, and
    truth(i) (T,20), the automaton's next-symbol distribution."""
    def __init__(self, automata: list[Automaton], seed: int, T: int):
        rng = random.Random(f"instances {seed}")
        made = [instance(rng, a, T) for a in automata]
        rows = torch.tensor([tokens + [PAD] * (T + 1 - len(tokens)) for tokens, _ in made])
        self.automata, self.states = automata, torch.tensor([s + [-1] * (T + 1 - len(s)) for _, s in made])[:, 1:]
        self.x, self.y = rows[:, :-1].contiguous(), rows[:, 1:].masked_fill(rows[:, 1:] >= SYMBOLS, -1)

    def truth(self, i: int) -> Tensor:
        table = torch.zeros(len(self.automata[i]) + 1, 20)      # the last row is for state -1
        for q, edges in enumerate(self.automata[i]):
            table[q, list(edges)] = 1 / len(edges)
        return table[self.states[i]]


def score(probs: Tensor, truth: Tensor, y: Tensor) -> dict:
    """One sequence: probs, truth (T,20), y (T,).

        accuracy    is the likeliest next token one that the automaton allows in its present state?
        tvd         ½ Σ_a |p(a) - q(a)|, p the automaton's distribution over the next symbol, q the prediction over
                    all 20 tokens (separators are never trained on, so they get no weight)
        all         mean over all positions whose next token is a symbol: what the published code computes, and figure
                    11 shows; sums and the count are returned, so that every position of a test set weighs the same
        last        the same at the last symbol of the sequence alone: what the papers say
    """
    asked = y >= 0
    right = truth.gather(1, probs.argmax(1, keepdim=True))[:, 0] > 0
    tvd = (probs - truth).abs().sum(1) / 2
    last = asked.nonzero()[-1].item()
    return dict(count=asked.sum().item(), accuracy=right[asked].sum().item(), tvd=tvd[asked].sum().item(),
                accuracy_last=float(right[last]), tvd_last=tvd[last].item())


def total(scores: list[dict]) -> dict:
    n = sum(s["count"] for s in scores)
    return dict(accuracy=sum(s["accuracy"] for s in scores) / n, tvd=sum(s["tvd"] for s in scores) / n,
                accuracy_last=mean(s["accuracy_last"] for s in scores), tvd_last=mean(s["tvd_last"] for s in scores))


def ngram(x: Tensor, n: int) -> Tensor:
    """x (T,) -> (T,20): the frequencies of the symbols that followed the last n - 1 tokens earlier in this sequence;
    where none did, the last n - 2, and so on; uniform over the symbols before any was seen, and for n = 0. A context
    does not reach past a string's start, which counts as a token. Of equals the lowest symbol is chosen."""
    probs, counts, string, contexts = np.zeros((len(x), 20), dtype=np.float32), {}, [SEP], [(), (SEP,)][:n]
    for t, token in enumerate(x.tolist()):
        if token == SEP:
            string = [SEP]
        else:
            for context in contexts:
                counts.setdefault(context, np.zeros(20))[token] += 1
            string.append(token)
        contexts = [tuple(string[len(string) - k:]) for k in range(min(n, len(string) + 1))]
        found = next((counts[c] for c in reversed(contexts) if c in counts), None)
        probs[t] = np.arange(20) < SYMBOLS if found is None else found
    return torch.from_numpy(probs / probs.sum(1, keepdims=True))


@torch.no_grad()
def regbench_score(model: GPT, data: Instances, device) -> dict:
    scores = []
    for i in range(0, len(data.x), 16):
        probs = model.stream(data.x[i:i + 16].to(device))[0].float().softmax(-1).cpu()
        scores += [score(p, data.truth(i + j), data.y[i + j]) for j, p in enumerate(probs)]
    return total(scores)


def regbench_job(cfg: RegBench) -> dict:
    """ood is the test set; valid, of yet other automata, chooses between settings; iid are fresh strings of training
    automata. The test automata are drawn first: they are the same for every number of training automata."""
    n, device = cfg.test_automata, pick_device(cfg)
    ood, valid, train = draw_automata(0, [n, n, cfg.automata])
    tests = dict(ood=Instances(ood, 1, cfg.T), valid=Instances(valid, 2, cfg.T),
                 iid=Instances([train[i % len(train)] for i in range(n)], 4, cfg.T))
    data, model = Instances(train, 3, cfg.T), GPT(architecture(cfg))
    epochs = cfg.steps * cfg.batch_size // cfg.automata + 1
    order = torch.cat([torch.randperm(cfg.automata, generator=torch.Generator().manual_seed(cfg.seed * 100_003 + epoch))
                       for epoch in range(epochs)]).split(cfg.batch_size)
    fit(model, lambda step: (data.x[order[step]], data.y[order[step]]), cfg)
    model.eval()
    return dict({name: regbench_score(model, test, device) for name, test in tests.items()},
                parameters=sum(p.numel() for p in model.parameters()))


METRICS = ("accuracy", "tvd", "accuracy_last", "tvd_last")
# Read off figure 11 of Memory Mosaics (unseen automata, all positions), and its table 4 (100 automata, IID)
FIGURE_11 = {"mosaic": {100: (.925, .57), 500: (.928, .25), 1000: (.934, .215), 2500: (.94, .185), 40000: (.96, .12)},
             "transformer": {100: (.52, .68), 500: (.54, .64), 1000: (.53, .63), 2500: (.925, .23), 40000: (.952, .14)}}
TABLE_4 = {"mosaic": (.959, .417), "transformer": (.856, .308), "Mamba": (.929, .268), "S4": (.846, .350),
           "RWKV": (.967, .183), "linear transformer": (.816, .348), "H3": (.794, .425), "GLA": (.870, .284),
           "Hyena": (.953, .244), "LSTM": (.849, .343), "RetNet": (.876, .296)}


def report_regbench(results: list[dict], out: Path) -> list[list[str]]:
    """Of several settings of a model the best on the validation automata is shown, as in the papers."""
    def average(rs, part, metric):
        return mean(r[part][metric] for r in rs)
    best, config = {}, results[0]["config"]
    groups, common = grouped(results)
    for name, rs in groups.items():
        model, automata = rs[0]["config"]["model"], rs[0]["config"]["automata"]
        before = best.get((model, automata))
        if not before or average(rs, "valid", "accuracy") > average(before[1], "valid", "accuracy"):
            best[model, automata] = name.replace(f"-{automata}", "", 1), rs
    data = Instances(draw_automata(0, [config["test_automata"]])[0], 1, config["T"])
    base = {name: total([score(ngram(x, n), data.truth(i), data.y[i]) for i, x in enumerate(data.x)])
            for n, name in enumerate(("uniform", "1-gram", "2-gram", "3-gram"))}
    kept = dict(automata=config["test_automata"], T=config["T"], ood=base)
    save(out / "regbench" / "baselines.json", json.dumps(kept, indent=1).encode())
    lines, seen = [[name, "-", *(f"{r[k]:.3f}" for k in METRICS), *"----"] for name, r in base.items()], []
    for (model, automata), (name, rs) in best.items():
        paper = FIGURE_11.get(REGBENCH_MODELS[model].get("memory", "transformer"), {}).get(automata)
        said = f"{paper[0]} / {paper[1]}" if paper else "-"
        ood, iid = ([f"{average(rs, part, k):.3f}" for k in METRICS] for part in ("ood", "iid"))
        lines.append([name, str(automata), *ood, said, f"{iid[0]} / {iid[1]}", f"{rs[0]['parameters']:,}",
                      str(len(rs))])
        seen.append([f"regbench, {name}, {automata} automata", f"accuracy / TVD on unseen automata: {said}",
                     f"{ood[0]} / {ood[1]}"])
    say(f"\nRegBench{common}, unseen automata, mean over seeds (all = every symbol of a sequence, last = its last one)")
    print_table(["model", "automata", "acc all", "TVD all", "acc last", "TVD last", "paper, all", "IID acc / TVD",
                 "parameters", "seeds"], lines)
    if any(automata == 100 for _, automata in best):
        published = ", ".join(f"{name} {accuracy} / {tvd}" for name, (accuracy, tvd) in TABLE_4.items())
        say(f"\nTable 4 of the paper, IID acc / TVD at 100 automata: {published}")
    plot_regbench(best, base, out)
    return seen


def plot_regbench(best: dict, base: dict, out: Path) -> None:
    fig = figure(10, 4.4)
    axes = fig.subplots(1, 2)
    for i, (ax, key, title) in enumerate(zip(axes, METRICS, ("accuracy", "total variation distance"))):
        for (model, points), dashes in zip(FIGURE_11.items(), ("-", ":")):
            ax.plot(list(points), [p[i] for p in points.values()], color="#8A8A8A", ls=dashes, label=f"paper: {model}")
        for baseline, r in base.items():
            ax.axhline(r[key], color=COLOURS[0], lw=0.8, ls="--", alpha=0.6)
            ax.text(1.01, r[key], baseline, transform=ax.get_yaxis_transform(), fontsize=9, va="center")
        for j, model in enumerate(dict.fromkeys(model for model, _ in best)):
            points = {n: [r["ood"][key] for r in rs] for (m, n), (_, rs) in sorted(best.items()) if m == model}
            curve(ax, j + 1, list(points), list(points.values()), f"here: {model}")
        ax.set(xscale="log", xlabel="training automata (one sequence each)", ylabel=title, ylim=(0, 1.02),
               title="unseen automata")
        ax.set_xticks([100, 1000, 10000], ["100", "1,000", "10,000"])
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=10)
    save_figure(fig, out / "regbench.png")


# ----------------------------------------------------------------------------------------------------------------------
# The command line

JOBS = {Moons: moons_job, Length: length_job, RegBench: regbench_job}
REPORTS = {Moons: report_moons, Length: report_length, RegBench: report_regbench}
HEADLINES = {
    Moons: lambda r: f"error {r['stairs'][3]:.3f} before the lcm, {r['stairs'][4]:.3f} after",
    Length: lambda r: ", ".join(f"{a:.3f} at {n}" for n, a in zip(r["lengths"], r["accuracy"])),
    RegBench: lambda r: f"accuracy {r['ood']['accuracy']:.3f}, TVD {r['ood']['tvd']:.3f} on unseen automata"}
COMMANDS = {  # name -> kind, what is run when a flag is not given
    "moons": (Moons, dict(heads=[1, 3])),
    **{task: (Length, dict(task=[task], model=list(LENGTH_MODELS))) for task in TASKS},
    "regbench": (RegBench, dict(model=["rope", "mosaic"])),
}
SHORT = [("moons", []), ("recall", ["--model=local,global,deltanet,mosaic"]), ("regbench", [])]  # python toys.py


def plan(argv: list[str]) -> list[Toy]:
    """The command line -> every model to train, each once."""
    chosen = SHORT
    if argv and not argv[0].startswith("-"):
        chosen, argv = [(name, []) for name in argv[0].split(",")], argv[1:]
    for name, _ in chosen:
        if name not in COMMANDS:
            raise UserError(f"{name}: expected a toy, one of {', '.join(COMMANDS)}{suggest(name, COMMANDS)}")
    configs = [cfg for name, flags in chosen for cfg in parse(COMMANDS[name][0], flags + argv, COMMANDS[name][1])]
    return list({result_path(cfg): cfg for cfg in configs}.values())


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    try:
        configs, seen, diverged = plan(argv), [], []
        out = Path(configs[0].out_dir)
        for kind, report in REPORTS.items():
            if chosen := [cfg for cfg in configs if type(cfg) is kind]:
                results, failed = run_all(chosen)
                diverged += failed
                seen += report(results, out) if results else []
        if seen:
            say("\nWhat was seen, beside what the papers say")
            print_table(["experiment", "what the papers say", "what was seen"], seen, left=3)
            say(f"\nevery number: {out}/*/*.json")
        if diverged:
            raise UserError(f"{len(diverged)} of {len(configs)} models diverged: {', '.join(diverged)}; try a lower "
                            "--lr")
        return 0
    except KeyboardInterrupt:
        say("\nstopped; the same command goes on from the models that are finished")
        return 130
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
