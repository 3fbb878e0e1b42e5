"""Train a language model with any of the memories: settings, optimizer, the one training loop, checkpoints, sweeps.

    python train.py                                                  the laptop preset, minutes on two cores
    python train.py --memory=deltanet --steps=200                    every field of RunConfig is a flag (--help)
    python train.py --memory=none,rmt,mosaic --seed=1,2              commas make a grid; finished runs are skipped
    torchrun --nproc_per_node=8 train.py --preset=d12                several GPUs, or several nodes with --nnodes

A run writes out/<run>/: result.json (last, so it marks a finished run), log.jsonl (one line a step), ckpt.pt and the
one before it, loss.png. The same command continues an interrupted run, bit for bit on a CPU: the batch and the
dropout of a step are functions of (seed, step, rank) alone, and the log is cut back to the checkpoint.

Glossary
    step               one update of the weights by batch_size rows of max_seq_len tokens, summed over all ranks
    rank, world        this process and the number of processes (torchrun sets RANK, WORLD_SIZE, LOCAL_RANK on its node)
    bpb                bits per byte: sum of nats / (ln 2 * sum of bytes), over targets that stand for any bytes
    MFU                model FLOPs utilisation: FLOPs the model needs a second / the GPU's bf16 peak

Reading order
    FitConfig, RunConfig    every setting             parse_args     presets, flags and sweeps -> RunConfigs
    Muon, build_optimizer   who updates what          checkpoints    replacing, save, find, resume
    fit                     the loop (toys.py too)    evaluate_bpb   bits per byte, also by position
    train, main             one run; all of them

References
    Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon  its scale: Liu et al. 2025, arXiv 2502.16982
    AdamW: Loshchilov & Hutter 2019, 1711.05101                  warm-up, stable, warm-down: Hu et al. 2024, 2404.06395
"""
import argparse
import difflib
import errno
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import zipfile
from collections import defaultdict
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median, stdev

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
from data import UserError, disk, replacing
from model import GPT, PRESETS, Config, state_bytes

# ----------------------------------------------------------------------------------------------------------------------
# Settings

def opt(default, help: str, group: str = "optimisation", choices: tuple = (), low=0, high=math.inf):
    return field(default=default, metadata=dict(help=help, group=group, choices=choices, low=low, high=high))


@dataclass
class FitConfig:
    """What `fit` needs to know. The fields of the group "run" change how a run is executed, not what it computes."""
    seed: int = opt(1, "of the initial weights, the order of the data and dropout", high=2**32)
    steps: int = opt(400, "updates of the weights", low=1)
    optimizer: str = opt("muon", "muon: hidden matrices by Muon, the rest by AdamW; adamw: all by AdamW",
                         choices=("muon", "adamw"))
    lr: float = opt(3e-3, "peak learning rate, Muon's and AdamW's alike")
    min_lr: float = opt(0.0, "learning rate at the end")
    embed_lr: float = opt(1.0, "embeddings learn at lr times this")
    schedule: str = opt("wsd", "wsd: warm up, hold, decay linearly; cosine: warm up, decay by a cosine",
                        choices=("wsd", "cosine"))
    warmup: int = opt(20, "steps of linear warm-up")
    warmdown: float = opt(0.4, "wsd: the share of the steps that decays", high=1)
    weight_decay: float = opt(0.1, "decoupled decay of every parameter with two or more dimensions")
    beta1: float = opt(0.9, "AdamW's decay of the mean gradient", high=0.99999)
    beta2: float = opt(0.95, "AdamW's decay of the mean squared gradient", high=0.99999)
    momentum: float = opt(0.95, "Muon's (Nesterov)", high=0.99999)
    clip: float = opt(1.0, "largest gradient norm; 0 = do not clip")
    dtype: str = opt("auto", "of matrix products: float32 (TF32 on CUDA), or bfloat16 by autocast (auto on CUDA, from "
                     "Ampere on); weights are float32", choices=("auto", "float32", "bfloat16"))
    device_batch_size: int = opt(0, "rows in one forward pass on one device; more are accumulated; 0 = all", "run")
    eval_every: int = opt(100, "steps between evaluations (always one at the end); 0 = only at the end", "run")
    save_every: int = opt(100, "steps between checkpoints (always one at the end); 0 = only at the end", "run")
    device: str = opt("auto", "auto = cuda where there is one", "run", ("auto", "cpu", "cuda"))
    compile: str = opt("auto", "torch.compile; auto = on CUDA under Linux", "run", ("auto", "true", "false"))


@dataclass
class RunConfig(Config, FitConfig):
    """Everything about one run: the architecture (Config), the training (FitConfig), the data and the names."""
    vocab_size: int = opt(0, "tokens in the embedding; 0 = as many as the tokenizer has", "architecture")
    preset: str = opt("laptop", "the settings that flags then change", "run", tuple(PRESETS))
    dataset: str = opt("python", "python, fineweb-edu, tinystories, simplewiki, shakespeare, or a file or folder",
                       "data")
    tokenizer: str = opt("byte", "byte, gpt2, or bpe:N (N tokens, trained on the corpus)", "data")
    data_sha256: str = opt("", "of the token stream; filled in, or given to insist on exactly this data", "data")
    eval_tokens: int = opt(131072, "validation tokens in an evaluation; 0 = all", "data")
    batch_size: int = opt(16, "rows of max_seq_len tokens in a step, over all ranks", low=1)
    sample_tokens: int = opt(200, "length of the text generated at the end, max_seq_len at most; 0 = none", "run")
    out_dir: str = opt("out", "where run folders go", "run")
    name: str = opt("", "name of the run folder; made from the other settings if empty", "run")

    def __post_init__(self):
        model_config(self)
        for f in fields(self):
            value, known = getattr(self, f.name), f.metadata
            if f.name in Config.__dataclass_fields__:
                continue
            if known.get("choices") and value not in known["choices"]:
                raise UserError(f"--{f.name}={value}: expected one of {', '.join(known['choices'])}")
            low, high = known.get("low", -math.inf), known.get("high", math.inf)
            if not isinstance(value, str) and not (low <= value <= high and math.isfinite(value)):
                raise UserError(f"--{f.name}={value}: expected a finite number from {low} to {high}")


# Added to model.PRESETS, the architecture side. gpt2 is the recipe of Memory Mosaics, appendix (their table 3).
TRAINING = {
    "laptop": dict(lr=6e-3, batch_size=4, steps=1200, eval_every=300),
    "d12": dict(dataset="fineweb-edu", tokenizer="gpt2", vocab_size=0, batch_size=256, device_batch_size=32, steps=2520,
                warmup=100, eval_every=250, eval_tokens=10_485_760, save_every=500),
    "gpt2": dict(dataset="tinystories", tokenizer="gpt2", batch_size=512, device_batch_size=64, steps=80_000,
                 optimizer="adamw", lr=5e-3, min_lr=1e-4, schedule="cosine", warmup=2000, dropout=0.05,
                 eval_every=1000, eval_tokens=5_242_880, save_every=1000),
}


def build(kind, *args, **kwargs):
    """Config or GPT, what they refuse being the user's to change."""
    try:
        return kind(*args, **kwargs)
    except ValueError as e:
        raise UserError(str(e)) from None


def model_config(cfg: RunConfig) -> Config:
    """The architecture's part. Before the corpus is read any vocabulary will do to check the combination."""
    settings = {f.name: getattr(cfg, f.name) for f in fields(Config)}
    return build(Config, **settings | {"vocab_size": cfg.vocab_size or 256})


# ----------------------------------------------------------------------------------------------------------------------
# Command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message[0].lower() + message[1:] + " (--help lists the flags)")


def parse_args(argv: list[str]) -> list[RunConfig]:
    """Defaults < preset < flags. A comma in a value makes a sweep: one config for each point of the grid."""
    kinds = {f.name: f.type if isinstance(f.type, str) else f.type.__name__ for f in fields(RunConfig)}
    parser = Parser(prog="train.py", usage="train.py [--key=value ...]", allow_abbrev=False,
                    description=__doc__.split("\n\nA run")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {g: parser.add_argument_group(g) for g in ("architecture", "memory", "data", "optimisation", "run")}
    shown = preset_config(next((a[9:] for a in argv if a.startswith("--preset=") and a[9:] in PRESETS), "laptop"))
    for f in fields(RunConfig):
        group = groups[f.metadata["group"]]
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar=kinds[f.name].upper(),
                           help=f"{f.metadata['help']} (default: {getattr(shown, f.name)})".replace("%", "%%"))
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-").replace("-", "_"), kinds, 1, 0.5)
        raise UserError(f"unknown argument {unknown[0]}" + (f"; did you mean --{close[0]}=...?" if close else
                                                            "; --help lists the flags"))
    grid = {name: [parse_value(name, kinds[name], v) for v in text.split(",")] for name, text in vars(flags).items()}
    order = sorted(grid, key=lambda name: name == "seed")  # in the order given, seeds innermost
    points = itertools.product(*(grid[name] for name in order))
    configs = [name_run(preset_config(**dict(zip(order, point)))) for point in points]
    names = [c.name for c in configs]
    if len(set(names)) < len(names):
        raise UserError(f"--name={names[0]} is one folder but the sweep has {len(names)} runs; leave --name out")
    return configs


def parse_value(name: str, kind: str, text: str):
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        return {"int": int, "float": float, "str": str}[kind](text)
    except (ValueError, KeyError):
        expected = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kind]
        raise UserError(f"--{name}={text}: expected {expected}") from None


def preset_config(preset: str = "laptop", **flags) -> RunConfig:
    return RunConfig(**{"preset": preset, **PRESETS.get(preset, {}), **TRAINING.get(preset, {}), **flags})


def name_run(cfg: RunConfig) -> RunConfig:
    """laptop-deltanet-window=L-s1: the preset, the memory and whatever else makes the result another one."""
    if cfg.name:
        return cfg
    usual, parts = preset_config(cfg.preset), [cfg.preset, cfg.memory]
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if f.metadata.get("group") != "run" and f.name not in ("memory", "seed") and value != getattr(usual, f.name):
            parts.append(f"{f.name}={value:g}" if isinstance(value, float) else f"{f.name}={value}")
    name = re.sub(r"[^\w.+=-]", "_", "-".join(parts))
    if len(name) > 120:
        name = f"{name[:100]}-{hashlib.sha1(name.encode()).hexdigest()[:8]}"
    return replace(cfg, name=f"{name}-s{cfg.seed}")


# ----------------------------------------------------------------------------------------------------------------------
# Processes and devices

def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def say(text: str, end: str = "\n") -> None:
    if rank() == 0:
        print(text, end=end, flush=True)


def all_reduce(values: list[float] | Tensor, device) -> Tensor:
    """The sum over ranks, in float64 and on the CPU."""
    total = torch.as_tensor(values, dtype=torch.float64)
    if world() > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return total.cpu()


def pick_device(cfg) -> torch.device:
    """The device of this process: of several on a machine each has its own GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cfg.device == "cpu" or cfg.device == "auto" and not count:
        return torch.device("cpu")
    if local_rank() >= count:
        raise UserError(f"--device={cfg.device}: PyTorch sees {count} CUDA devices here, and this is process number "
                        f"{local_rank() + 1} to need one; start fewer, or use --device=cpu")
    torch.set_float32_matmul_precision("high")  # TF32
    return torch.device("cuda", local_rank())


def uses_bf16(cfg) -> bool:
    on_cuda = pick_device(cfg).type == "cuda"
    if cfg.dtype == "bfloat16" and not on_cuda:
        raise UserError("--dtype=bfloat16: only on CUDA, a CPU trains in float32; use --dtype=auto")
    if on_cuda and cfg.dtype == "auto":
        return torch.cuda.is_bf16_supported(including_emulation=False)  # emulated it is slower than float32
    return cfg.dtype == "bfloat16"


def autocast(cfg):
    return torch.autocast("cuda", torch.bfloat16) if uses_bf16(cfg) else nullcontext()


def compiles(cfg) -> bool:
    if cfg.compile == "auto":
        return sys.platform == "linux" and pick_device(cfg).type == "cuda"  # elsewhere is no triton to compile with
    return cfg.compile == "true"


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer

def orthogonalise(G: Tensor, steps: int = 5) -> Tensor:
    """(N,m,n) matrices -> about U Vᵀ of each G = U S Vᵀ: a quintic Newton-Schulz iteration on the singular values."""
    X = G.bfloat16() if G.is_cuda else G
    wide = X if X.size(-2) <= X.size(-1) else X.mT
    X = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X if G.size(-2) <= G.size(-1) else X.mT


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (adjust_lr_fn="match_rms_adamw"; the tests compare the two), but in float32 on a CPU, where its
    bfloat16 products are three times slower than float32, and with one batched product for all matrices of a shape."""

    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for (rows, columns), params in shapes.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads, m = [p.grad for p in params], group["momentum"]
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - m)
                update = orthogonalise(torch.stack(torch._foreach_lerp(grads, buffers, m))).to(params[0].dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, update.unbind(), alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns)))


def build_optimizer(model: nn.Module, cfg) -> list[torch.optim.Optimizer]:
    """Muon for the model's hidden matrices, AdamW for the rest; each group's learning rate is lr times its "scale"."""
    hidden = list(model.hidden_matrices()) if cfg.optimizer == "muon" else []
    muons, optimizers = set(hidden), []
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and p not in muons]
    if rest:
        others = [p for p in rest if p not in embeddings]
        groups = [
            dict(params=[p for p in rest if p in embeddings], weight_decay=cfg.weight_decay, scale=cfg.embed_lr),
            dict(params=[p for p in others if p.ndim >= 2], weight_decay=cfg.weight_decay, scale=1.0),
            dict(params=[p for p in others if p.ndim < 2], weight_decay=0.0, scale=1.0),
        ]
        fused = all(p.is_floating_point() for p in rest)  # the fused kernel has no complex numbers
        optimizers.append(torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=(cfg.beta1, cfg.beta2),
                                            fused=fused))
    if hidden:
        optimizers.append(Muon([dict(params=hidden, scale=1.0)], cfg.lr, cfg.momentum, cfg.weight_decay))
    return optimizers


def lr_at(step: int, cfg) -> float:
    """Learning rate of the update number step + 1."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "cosine":
        done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
        return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    left = (cfg.steps - step) / max(1, round(cfg.warmdown * cfg.steps))
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * min(1.0, left)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(out: Path, cfg, step: int, seconds: float, model, optimizers, log) -> None:
    os.fsync(log.fileno())  # first the log: a checkpoint must never know more lines than the disk has
    state = dict(config=asdict(cfg), step=step, seconds=seconds, log_bytes=log.tell(), model=model.state_dict(),
                 optimizer=[o.state_dict() for o in optimizers])
    with replacing(out / "ckpt.pt", keep=out / "ckpt.prev.pt") as f:
        try:
            torch.save(state, f)
        except RuntimeError as e:  # how torch.save reports a write that failed half-way
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if "inline_container" in str(e) else e


def find_checkpoint(out: Path) -> dict | None:
    """The newest whole checkpoint: the zip's checksums find what was truncated or changed, torch.load does not."""
    paths = [path for path in (out / "ckpt.pt", out / "ckpt.prev.pt") if path.exists()]
    for path in paths:
        try:
            with zipfile.ZipFile(path) as whole:
                broken = whole.testzip()
        except (zipfile.BadZipFile, EOFError) as e:
            broken = e
        if broken is None:
            return torch.load(path, map_location="cpu", weights_only=True)
        say(f"{path} is damaged ({broken}), so it is not used")
    if paths:
        say(f"{out} has no whole checkpoint: the run starts over")
    return None


def check_same(old: dict, cfg, where: Path) -> None:
    """Refuses to continue a run with settings that would make it another one."""
    free = {f.name for f in fields(cfg) if f.metadata.get("group") == "run"}
    free |= {name for name in ("vocab_size", "data_sha256") if not getattr(cfg, name)}  # the corpus will fill them in
    differ = [f"{name} (there {old.get(name, 'missing')}, now {value})" for name, value in asdict(cfg).items()
              if name not in free and old.get(name, "missing") != value]
    if differ:
        raise UserError(f"{where} is of a run with another {', '.join(differ)}; choose another --name, or delete it")


def resume(out: Path, cfg, model, optimizers) -> tuple[int, float, list[dict]]:
    """Puts the newest checkpoint into model and optimizers, and cuts the log back to it. -> step, seconds, history"""
    with disk(out):
        out.mkdir(parents=True, exist_ok=True)
    found, log = find_checkpoint(out), out / "log.jsonl"
    text = log.read_bytes() if log.exists() else b""
    if found is not None:
        check_same(found["config"], cfg, out / "ckpt.pt")
        if len(text) < found["log_bytes"]:
            raise UserError(f"{log} is shorter than the checkpoint beside it knows; delete {out} to start over")
        model.load_state_dict(found["model"])
        for optimizer, state in zip(optimizers, found["optimizer"], strict=True):
            optimizer.load_state_dict(state)
        say(f"continuing {out} from step {found['step']}")
    step, seconds, keep = (found["step"], found["seconds"], found["log_bytes"]) if found else (0, 0.0, 0)
    if world() > 1 and all_reduce([step], pick_device(cfg)).item() != step * world():
        raise UserError(f"the ranks see different checkpoints in {out}; put out_dir on a disk that every node mounts")
    if rank() == 0 and len(text) != keep:
        with replacing(log) as f:
            f.write(text[:keep])
    return step, seconds, [json.loads(line) for line in text[:keep].splitlines()]


def load_run(path: str | Path) -> tuple[GPT, RunConfig, dict]:
    """out/<run> (or a checkpoint file in it) -> the trained model on the CPU, its config, the whole checkpoint."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    found = find_checkpoint(folder)
    if found is None:
        raise UserError(f"{path}: no checkpoint there; give a folder that train.py wrote, such as out/laptop-none-s1")
    try:
        cfg = RunConfig(**found["config"])
    except TypeError as e:
        raise UserError(f"{path} was written by another version of this code ({e})") from None
    model = build(GPT, model_config(cfg))
    model.load_state_dict(found["model"])
    return model.eval(), cfg, found


# ----------------------------------------------------------------------------------------------------------------------
# The loop

class Stopped(Exception):
    """SIGINT or SIGTERM came; the checkpoint is written."""


class Diverged(UserError):
    """The loss or the gradient is no longer a number."""


@contextmanager
def signals():
    """Collects SIGINT and SIGTERM in a list instead of dying in the middle of a step. A second one kills as usual."""
    caught, old = [], {}

    def note(number, frame):
        caught.append(number)
        signal.signal(number, old[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def accumulate(runner, batch: tuple, cfg, device) -> Tensor:
    """Forward and backward over this rank's rows, device_batch_size at a time -> mean loss. Ranks talk at the last."""
    rows = len(batch[0])
    micro = min(cfg.device_batch_size or rows, rows)
    if rows % micro:
        raise UserError(f"device_batch_size={micro} does not divide the {rows} rows of a rank; change one of them")
    batch = [t.to(device) for t in batch]  # all at once: a copy between two passes would wait for the first of them
    total = torch.zeros((), device=device)
    for i in range(0, rows, micro):
        quiet = isinstance(runner, DistributedDataParallel) and i + micro < rows
        with runner.no_sync() if quiet else nullcontext():
            with autocast(cfg):
                loss = runner(*(t[i:i + micro] for t in batch)) * (micro / rows)
            loss.backward()
        total += loss.detach()
    return total


def update(runner, optimizers, batch: tuple, step: int, cfg, device) -> tuple[Tensor, Tensor]:
    """Step number `step` on this rank's batch -> loss, gradient norm (neither is waited for)."""
    torch.manual_seed(((cfg.seed * 1_000_003 + step) * 65_537 + rank()) % 2**63)  # dropout must not depend on history
    loss = accumulate(runner, batch, cfg, device)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    norm = torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], cfg.clip or math.inf)
    for group in groups:
        group["lr"] = lr_at(step, cfg) * group["scale"]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss, norm


def fit(model: nn.Module, batch_fn, cfg, out: Path | None = None, evaluate=None, describe=None) -> list[dict]:
    """Trains model for cfg.steps steps; returns one record a step (what log.jsonl has).

    model(*batch) is a scalar loss; batch_fn(step) this rank's batch, a tuple of tensors with the rows first, and a
    function of step alone. cfg: a FitConfig or anything with its fields. With out, checkpoints and the log go there
    and the run resumes from them. evaluate() -> dict of numbers for the record, every eval_every steps and at the end.
    describe(record, batch) -> more numbers for every record.
    """
    device = pick_device(cfg)
    model.to(device).train()
    optimizers = build_optimizer(model, cfg)
    step, before, history = resume(out, cfg, model, optimizers) if out else (0, 0.0, [])
    runner = torch.compile(model) if compiles(cfg) else model
    if world() > 1:
        runner = DistributedDataParallel(runner, device_ids=[device.index] if device.type == "cuda" else None)
    log_path = out / "log.jsonl" if out and rank() == 0 else Path(os.devnull)
    start, progress, saved = time.perf_counter(), Progress(cfg.steps, step), step
    with signals() if out else nullcontext([]) as caught, open(log_path, "ab", buffering=0) as log:
        following = batch_fn(step) if step < cfg.steps else None
        while step < cfg.steps:
            began, batch = time.perf_counter(), following
            loss, norm = update(runner, optimizers, batch, step, cfg, device)
            following = batch_fn(step + 1) if step + 1 < cfg.steps else None  # a GPU is still busy with this step
            loss, stop = all_reduce([loss.item() / world(), bool(caught)], device).tolist()
            step, norm = step + 1, norm.item()
            if not math.isfinite(loss + norm):
                raise Diverged(f"step {step}: loss {loss}, gradient norm {norm}, so training stops; try a lower --lr"
                               + (f" (the last good checkpoint in {out} is of step {saved})" if saved else ""))
            tokens = batch[0].shape[:2].numel() * world()
            record = dict(step=step, loss=loss, lr=lr_at(step - 1, cfg), grad_norm=norm, tokens=step * tokens,
                          step_seconds=time.perf_counter() - began)
            record |= describe(record, batch) if describe else {}
            if evaluate and (step == cfg.steps or cfg.eval_every and step % cfg.eval_every == 0):
                model.eval()
                record |= evaluate()
                model.train()
            record["seconds"] = before + time.perf_counter() - start
            history.append(record)
            with disk(log_path):
                log.write(json.dumps(record).encode() + b"\n")
            progress.show(history, tokens)
            if out and (stop or step == cfg.steps or cfg.save_every and step % cfg.save_every == 0):
                if rank() == 0:
                    save_checkpoint(out, cfg, step, record["seconds"], model, optimizers, log)
                saved = step
            if stop and step < cfg.steps:
                number = signal.Signals(caught[0] if caught else signal.SIGTERM)
                raise Stopped(number, f"stopped by {number.name} after step {step}; the checkpoint is in {out}")
    return history


class Progress:
    """One line that is rewritten on a terminal; else a line every 10 s, and one for each evaluation."""

    def __init__(self, steps: int, first: int):
        self.steps, self.first, self.terminal = steps, first, sys.stdout.isatty()
        self.began = self.shown = time.perf_counter()

    def show(self, history: list[dict], tokens: int) -> None:
        now, record, recent = time.perf_counter(), history[-1], history[-20:]
        step, keep = record["step"], "val_bpb" in record or record["step"] == self.steps
        if not keep and now - self.shown < (0.2 if self.terminal else 10):
            return
        self.shown = now
        left = int((now - self.began) / (step - self.first) * (self.steps - step))
        smooth = {name: mean(r[name] for r in recent) for name in ("loss", "bpb", "mfu") if name in record}
        text = f"step {step}/{self.steps}  loss {smooth['loss']:.4f}"
        text += f"  bpb {smooth['bpb']:.4f}" if "bpb" in smooth else ""
        text += f"  val bpb {record['val_bpb']:.4f}" if "val_bpb" in record else ""
        text += f"  lr {record['lr']:.2e}  {tokens / median(r['step_seconds'] for r in recent):,.0f} tokens/s"
        text += f"  MFU {smooth['mfu']:.1%}" if "mfu" in smooth else ""
        text += f"  {left // 60}:{left % 60:02d} left"
        say("\r" + text.ljust(110) if self.terminal else text, end="\n" if keep or not self.terminal else "")


# ----------------------------------------------------------------------------------------------------------------------
# Measuring

@torch.no_grad()
def evaluate_bpb(model: GPT, corpus, cfg: RunConfig, bucket: int = 64) -> dict:
    """Bits per byte on the validation rows, in all and by position in the row. The total is the sum of the buckets."""
    device, T, share = pick_device(cfg), cfg.max_seq_len, cfg.batch_size // world()

    def score(x, y):
        logits = model.stream(x)[0]
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view(y.shape)

    # With the loss in it, float32 logits and the state need not be written to memory. The last batch can be smaller: it
    # gets a graph of its own, because one for all sizes would be slower for the rest of the run.
    score = torch.compile(score, dynamic=False) if compiles(cfg) else score
    length = corpus.token_bytes.to(device)
    sums = torch.zeros(3, T, dtype=torch.float64, device=device)  # nats, bytes and targets at each position
    batches = corpus.eval_batches(T, min(cfg.device_batch_size or share, share), cfg.eval_tokens or None)
    for x, y, _ in itertools.islice(batches, rank(), None, world()):
        x, y = x.to(device), y.to(device)
        with autocast(cfg):
            nats = score(x, y)
        size = length[y]  # (rows, T); a token without bytes (end of text) is predicted for free
        sums += torch.stack([nats.double() * (size > 0), size.double(), (size > 0).double()]).sum(1)
    sums = all_reduce(sums, device)
    sums = F.pad(sums, (0, -T % bucket)).view(3, -1, bucket).sum(-1).tolist()
    nats, size, targets = (sum(s) for s in sums)
    if not size:
        raise UserError(f"{corpus.name}: the validation part has no text to measure; give a larger corpus")
    by_position = dict(bucket=bucket, positions=list(range(0, T, bucket)), nats=sums[0], bytes=sums[1],
                       bpb=[n / (math.log(2) * b) if b else None for n, b in zip(*sums[:2])])
    return dict(val_bpb=nats / (math.log(2) * size), val_loss=nats / targets, bpb_by_position=by_position)


# Dense bf16 products, from the data sheets; the first name that is part of the GPU's counts.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L40": 181e12, "L4": 121e12, "4090": 165e12, "3090": 71e12}


def peak_flops(cfg) -> float:
    gpu = torch.cuda.get_device_name() if uses_bf16(cfg) else ""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), 0.0)


def reset_peak_memory(device) -> None:
    """A sweep's runs share the process; each is to have its own peak (on a CPU only Linux can do that)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device) -> dict:
    rss, status = 0.0, Path("/proc/self/status")
    if status.exists():
        rss = int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024
    elif sys.platform == "darwin":
        import resource  # not on Windows
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    vram = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    return dict(peak_vram_mib=round(vram, 1), peak_rss_mib=round(rss, 1))


def count_params(config: Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(GPT, config).parameters())


@torch.no_grad()
def sample_text(model: GPT, corpus, cfg: RunConfig, device) -> str:
    """A continuation of nothing, the same each time."""
    generator = torch.Generator(device).manual_seed(cfg.seed)
    start = torch.tensor([[corpus.eos]], device=device)
    n = min(cfg.sample_tokens, cfg.max_seq_len - 1)
    with autocast(cfg):
        tokens = model.generate(start, n, temperature=0.8, top_k=50, generator=generator)[0, 1:].tolist()
    real = len(corpus.token_bytes)  # the vocabulary may be padded beyond it
    return corpus.encoding.decode([t for t in tokens if t < real and corpus.token_bytes[t]], errors="replace")


@torch.no_grad()
def measure(model: GPT, corpus, cfg: RunConfig, history: list[dict], final: dict) -> dict:
    """result.json: what was trained, how good it is, and what it costs."""
    device = pick_device(cfg)
    total = count_params(model.config)
    with autocast(cfg):
        filled = model.stream(torch.zeros(1, cfg.max_seq_len, dtype=torch.long, device=device))[1]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "tiktoken"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    same = ("name", "memory", "window", "preset", "seed", "max_seq_len", "dataset", "tokenizer", "data_sha256")
    tokens = cfg.batch_size * cfg.max_seq_len
    return {key: getattr(cfg, key) for key in same} | final | dict(
        config=asdict(cfg), train_tokens=cfg.steps * tokens, total_params=total,
        memory_params=total - count_params(replace(model.config, memory="none", memory_layers="all")),
        flops_per_token=model.flops_per_token(cfg.max_seq_len), state_bytes=state_bytes(filled),
        total_time_min=history[-1]["seconds"] / 60,
        # of a median step, so without compilation, evaluation and checkpoints
        tokens_per_second=tokens / median(r["step_seconds"] for r in history), **peak_memory_mib(device),
        device=f"{world()} x {name}{threads}", versions=versions,
        sample=sample_text(model, corpus, cfg, device) if cfg.sample_tokens else "",
        curve=[{k: r[k] for k in ("step", "seconds", "tokens", "val_bpb")} for r in history if "val_bpb" in r])


def plot_losses(history: list[dict], path: Path) -> None:
    import matplotlib  # here, because it takes half a second to import
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    smooth = [sum(r["bpb"] for r in history[max(n - 20, 0):n]) / min(n, 20) for n in range(1, len(history) + 1)]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot([r["step"] for r in history], smooth, lw=1, label="training (mean of 20 steps)")
    points = [(r["step"], r["val_bpb"]) for r in history if "val_bpb" in r]
    axes.plot(*zip(*points), "o-", ms=4, label="validation")
    axes.set(xlabel="step (updates)", ylabel="bits per byte", title=path.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as f:
        figure.savefig(f, format="png", dpi=120)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Runs

@lru_cache(maxsize=2)
def load_corpus(dataset: str, tokenizer: str):
    """Read once in a sweep. Of a node's processes the first prepares it and shows how far it is; the others wait."""
    first = local_rank() == 0
    if not first:
        dist.barrier()
    try:
        return data.load(dataset, tokenizer, quiet=not first)
    finally:
        if first and world() > 1:
            dist.barrier()


def fill_in(cfg: RunConfig, corpus) -> RunConfig:
    """The settings that come from the corpus."""
    n = corpus.vocab_size
    if cfg.vocab_size and cfg.vocab_size < n:
        raise UserError(f"--vocab_size={cfg.vocab_size}: the tokenizer {cfg.tokenizer} has {n} tokens; give as many")
    if cfg.data_sha256 and cfg.data_sha256 != corpus.sha256:
        raise UserError(f"{corpus.name}: sha256 is {corpus.sha256}, expected {cfg.data_sha256}; it is other data")
    padded = n if n < 1024 else -(-n // 64) * 64  # GPUs multiply multiples of 64 much faster
    return replace(cfg, vocab_size=cfg.vocab_size or padded, data_sha256=corpus.sha256)


def train(cfg: RunConfig) -> dict:
    """One run, from the configuration to result.json."""
    if cfg.batch_size % world():
        raise UserError(f"--batch_size={cfg.batch_size}: not a multiple of the {world()} ranks; change one of them")
    device, out = pick_device(cfg), Path(cfg.out_dir, cfg.name)
    corpus = load_corpus(cfg.dataset, cfg.tokenizer)
    cfg = fill_in(cfg, corpus)
    torch.manual_seed(cfg.seed)
    gc.collect()  # or a sweep's last model, which reference cycles keep, would still take memory
    if compiles(cfg):
        torch.compiler.reset()  # or its compiled graphs would fill the cache
    model = build(GPT, model_config(cfg)).to(device)
    reset_peak_memory(device)
    say(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {cfg.steps} steps of "
        f"{cfg.batch_size * cfg.max_seq_len:,} tokens, {world()} x {device.type}")
    final, flops, peak = {}, model.flops_per_token(cfg.max_seq_len), peak_flops(cfg) * world()

    def batch_fn(step):
        return corpus.batch(step, cfg.batch_size, cfg.max_seq_len, cfg.seed, rank(), world())

    def evaluate():
        final.update(evaluate_bpb(model, corpus, cfg))
        return {"val_bpb": final["val_bpb"], "val_loss": final["val_loss"]}

    def describe(record, batch):
        y = batch[1]
        more = dict(bpb=record["loss"] * y.numel() / (math.log(2) * max(1, corpus.token_bytes[y].sum().item())))
        if peak:
            more["mfu"] = cfg.batch_size * cfg.max_seq_len * flops / record["step_seconds"] / peak
        return more

    history = fit(model, batch_fn, cfg, out, evaluate, describe)
    model.eval()
    if not final:  # resumed from the very last checkpoint
        evaluate()
    result = measure(model, corpus, cfg, history, final)
    if rank() == 0:
        plot_losses(history, out / "loss.png")
        with replacing(out / "result.json") as f:
            f.write(json.dumps(result, indent=1).encode())
        print_summary(result, out)
    return result


def print_summary(r: dict, out: Path) -> None:
    memory = f"{r['peak_vram_mib']:,.0f} MiB of GPU memory" if r["peak_vram_mib"] else f"{r['peak_rss_mib']:,.0f} MiB"
    print(f"""
  validation        {r['val_bpb']:.4f} bits per byte ({r['val_loss']:.4f} nats a token)
  parameters        {r['total_params']:,}, of them {r['memory_params']:+,} against memory=none
  training FLOPs    {r['flops_per_token']:,.0f} a token, {r['flops_per_token'] * r['train_tokens']:.3g} in all
  state             {r['state_bytes']:,} bytes after {r['max_seq_len']} tokens of one sequence
  speed             {r['tokens_per_second']:,.0f} tokens/s in a median step; {r['total_time_min']:.1f} minutes in all
  peak memory       {memory}
  files             {out}/result.json, log.jsonl, loss.png, ckpt.pt
""" + (f"\nA sample:\n{r['sample']}\n" if r["sample"] else ""), flush=True)


def print_table(results: list[dict], swept: list[str]) -> None:
    """One line for each configuration, its seeds together."""
    def average(rs, name):
        return mean(r[name] for r in rs)

    cells = defaultdict(list)
    for r in results:
        cells[tuple(str(r["config"][name]) for name in swept)].append(r)
    head = swept + ["val bpb", "std", "seeds", "parameters", "FLOPs/token", "state bytes", "tokens/s", "minutes", "MiB"]
    lines = []
    for key, rs in sorted(cells.items(), key=lambda cell: average(cell[1], "val_bpb")):
        std = f"{stdev(r['val_bpb'] for r in rs):.4f}" if len(rs) > 1 else "-"
        lines.append([*key, f"{average(rs, 'val_bpb'):.4f}", std, str(len(rs)), f"{rs[0]['total_params']:,}",
                      f"{rs[0]['flops_per_token']:.3g}", f"{rs[0]['state_bytes']:,}",
                      f"{average(rs, 'tokens_per_second'):,.0f}", f"{average(rs, 'total_time_min'):.1f}",
                      f"{average(rs, 'peak_vram_mib') or average(rs, 'peak_rss_mib'):,.0f}"])
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    for line in [head, *lines]:
        say("  ".join(c.ljust(w) if i < len(swept) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))))


def run_all(configs: list[RunConfig]) -> None:
    """One run, or a sweep: finished runs are skipped, a diverged one doesn't stop the others."""
    results, failed = [], []
    for cfg in configs:
        count_params(model_config(cfg))  # what cannot be built is refused before anything is trained
    for cfg in configs:
        out = Path(cfg.out_dir, cfg.name)
        if (out / "result.json").is_file():
            results.append(json.loads((out / "result.json").read_text()))
            check_same(results[-1]["config"], cfg, out / "result.json")
            say(f"{out}: finished, skipped (delete the folder to train it again)")
            continue
        try:
            results.append(train(cfg))
        except Diverged as e:
            if len(configs) == 1:
                raise
            say(f"{out}: {e}")
            failed.append(cfg.name)
    if len(configs) > 1 and results:
        swept = [f.name for f in fields(RunConfig) if f.name not in ("seed", "name", "memory", "window")
                 and len({getattr(c, f.name) for c in configs}) > 1]
        print_table(results, ["memory", "window", *swept])
    if failed:
        raise UserError(f"{len(failed)} of {len(configs)} runs diverged: {', '.join(failed)}")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        configs = parse_args(argv)
        if world() > 1:
            device = pick_device(configs[0])
            backend, bound_to = ("nccl", device) if device.type == "cuda" else ("gloo", None)
            if bound_to:
                torch.cuda.set_device(bound_to)
            # hours, because the ranks wait here for those that download and tokenise the data
            dist.init_process_group(backend, device_id=bound_to, timeout=timedelta(hours=4))
        run_all(configs)
        status = 0
    except Stopped as e:
        launcher = "torchrun ..." if world() > 1 else "python"
        say(f"\n{e.args[1]}\nthe same command goes on from there: {launcher} train.py {shlex.join(argv)}")
        status = 128 + e.args[0]
    except UserError as e:
        if rank() > 0:  # rank 0 mostly says the same, and torchrun then ends this process; if not, it is its own error
            time.sleep(10)
        print(f"error: {e}", file=sys.stderr)
        return 2
    if dist.is_initialized():  # not after an error: ranks without one wait in a collective, and NCCL here for them
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
