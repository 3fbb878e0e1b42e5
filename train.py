"""Train a language model with any of the memories: settings, the one training loop, checkpoints, runs.

    python train.py                                                  the laptop preset, minutes on two cores
    python train.py --memory=deltanet --steps=200                    every field of RunConfig is a flag (--help)
    python train.py --memory=none,rmt,mosaic --seed=1,2              commas make a grid; finished runs are skipped
    torchrun --nproc_per_node=8 train.py --preset=d12                several GPUs, or several nodes with --nnodes

A run writes out/<run>/: log.jsonl (one line a step), ckpt.pt and the checkpoint before it, result.json (once all is
measured: it marks a finished run), and then loss.png. The same command continues an interrupted run, bit for bit on a
CPU: given the settings, the batch and the dropout of a step depend on (seed, step, rank) alone, and the log is cut back
to the checkpoint.

Glossary
    step               one update of the weights by batch_size rows (those of all ranks) of max_seq_len tokens
    rank, world        this process and the number of processes (torchrun sets RANK and WORLD_SIZE, and LOCAL_RANK,
                       the number of a process on its node)
    bpb                bits per byte: sum of nats / (ln 2 * sum of bytes), over the targets that stand for at least one.
                       That of a training step is approximate: it also counts the nats of the end-of-text tokens
    MFU                model FLOPs utilisation: the FLOPs that the model needs a second / the GPU's bf16 peak
    job                a function from a configuration to measurements: `train` here, three more in toys.py (not
                       toys.py's flag --jobs, which is the number of worker processes)

Reading order
    settings           FitConfig, RunConfig, the presets
    the loop           fit, and its parts: update, accumulate, the learning rate
    beneath the loop   optimizers, checkpoints, signals and progress, processes and devices
    measuring          bits per byte, memory, parameters, a sample, the loss curve
    flags and runs     the command line -> configurations -> run_all -> one result.json a run
    train, main        the job of this script, and its command line

References
    Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon; its scale: Liu et al. 2025, arXiv 2502.16982
    AdamW: Loshchilov & Hutter 2019, 1711.05101; warm-up, stable, warm-down: Hu et al. 2024, 2404.06395
"""
import argparse
import errno
import gc
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import signal
import sys
import time
import zipfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import mean, median, stdev

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
from data import UserError, did_you_mean, disk, replacing
from model import GPT, PRESETS, Config, check_options, option, state_bytes, unused_options

# ----------------------------------------------------------------------------------------------------------------------
# Settings. In this file cfg is a FitConfig or a RunConfig, and config is a model.Config; in checkpoints and result.json
# "config" holds the fields of cfg.

BETA1 = 0.9      # AdamW's decay of the mean gradient
MOMENTUM = 0.95  # Muon's, in Nesterov's form


@dataclass
class FitConfig:
    """What `fit` needs to know. Raises ValueError for a value that is not allowed."""
    seed: int = option(1, "of the initial weights, the order of the data and dropout", "optimisation", low=0,
                       high=2**32)
    steps: int = option(400, "updates of the weights", "optimisation", low=1)
    batch_size: int = option(16, "rows of a step, over all ranks", "optimisation", low=1)
    optimizer: str = option("muon", "muon: hidden matrices by Muon, the rest by AdamW; adamw: all by AdamW",
                            "optimisation", choices=("muon", "adamw"))
    lr: float = option(3e-3, "peak learning rate, Muon's and AdamW's alike", "optimisation", low=0)
    min_lr: float = option(0.0, "learning rate at the end", "optimisation", low=0)
    schedule: str = option("wsd", "wsd: warm up, hold, decay linearly; cosine: warm up, decay by a cosine",
                           "optimisation", choices=("wsd", "cosine"))
    warmup: int = option(20, "steps of linear warm-up", "optimisation", low=0)
    warmdown: float = option(0.4, "wsd: the share of the steps that decays", "optimisation", low=0, high=1)
    weight_decay: float = option(0.1, "decoupled decay of every parameter with two or more dimensions", "optimisation",
                                 low=0)
    beta2: float = option(0.95, "AdamW's decay of the mean squared gradient", "optimisation", low=0, high=0.99999)
    clip: float = option(1.0, "largest gradient norm; 0 = do not clip", "optimisation", low=0)
    dtype: str = option("auto", "of matrix products: float32 (TF32 on CUDA), or bfloat16 by autocast (auto on CUDA, "
                        "from Ampere on); weights are float32", "optimisation", choices=("auto", "float32", "bfloat16"))
    device_batch_size: int = option(0, "rows in one forward pass on one device; more are accumulated; 0 = all", "run",
                                    low=0)
    device: str = option("auto", "auto = cuda where there is one", "run", choices=("auto", "cpu", "cuda"))
    compile: str = option("auto", "torch.compile; auto = on CUDA under Linux", "run", choices=("auto", "true", "false"))

    def __post_init__(self):
        check_options(self)


@dataclass
class RunConfig(Config, FitConfig):
    """Everything about one run: the architecture (Config), the training (FitConfig), the data and the names. Raises
    ValueError for a value that is not allowed and for an architecture that cannot be built."""
    vocab_size: int = option(0, "tokens in the embedding; 0 = as many as the tokenizer has, from 1,024 on rounded "
                             "up to a multiple of 64", low=0)
    preset: str = option("laptop", "the settings that flags then change", "run", choices=tuple(PRESETS))
    dataset: str = option("python", "python, python-docs, fineweb-edu, tinystories, simplewiki, shakespeare, or a file "
                          "or folder", "data")
    tokenizer: str = option("byte", "byte, gpt2, bpe:N (N tokens, trained on the corpus), or "
                           "bpe:N@CORPUS (on another one)", "data")
    data_sha256: str = option("", "of the token stream; filled in, or given to insist on exactly this data", "data")
    eval_tokens: int = option(131072, "validation tokens in an evaluation; 0 = all", "data", low=0)
    eval_every: int = option(100, "steps between evaluations (always one at the end); 0 = only at the end", "run",
                             low=0)
    save_every: int = option(100, "steps between checkpoints (always one at the end); 0 = only at the end", "run",
                             low=0)
    sample_tokens: int = option(200, "length of the text generated at the end, below max_seq_len; 0 = none", "run",
                                low=0)
    out_dir: str = option("out", "where run folders go", "run")
    name: str = option("", "name of the run folder; made from the other settings if empty", "run")

    def __post_init__(self):
        check_options(self)
        self.architecture()

    def architecture(self) -> Config:
        """The architecture alone. Before the corpus is read any vocabulary will do to check the combination."""
        settings = {f.name: getattr(self, f.name) for f in fields(Config)}
        settings["vocab_size"] = self.vocab_size or 256
        return Config(**settings)

    @property
    def folder(self) -> Path:
        return Path(self.out_dir, self.name)

    def name_begins(self) -> dict:
        """The settings whose bare values begin a run's name."""
        return dict(preset=self.preset, memory=self.memory)

    def usual(self):
        """The configuration whose settings go without saying in a run's name."""
        return preset_config(self.preset)

    def identity(self) -> dict:
        """What result.json repeats at its top."""
        names = ("name", "memory", "window", "preset", "seed", "max_seq_len", "dataset", "tokenizer", "data_sha256")
        return {name: getattr(self, name) for name in names}


# The training side of model.PRESETS. gpt2 is the recipe of Memory Mosaics (appendix, table 3). In d12 the vocabulary is
# that of the shards' tokenizer (vocab_size=0) and not memory-bench's of 32768 tokens.
TRAINING = {
    "laptop": dict(lr=6e-3, batch_size=4, steps=1200, eval_every=300),
    "d12": dict(dataset="fineweb-edu", tokenizer="gpt2", vocab_size=0, batch_size=256, device_batch_size=32, steps=2520,
                warmup=100, eval_every=250, eval_tokens=10_485_760, save_every=500),
    "gpt2": dict(dataset="tinystories", tokenizer="gpt2", batch_size=512, device_batch_size=64, steps=80_000,
                 optimizer="adamw", lr=5e-3, min_lr=1e-4, schedule="cosine", warmup=2000, eval_every=1000,
                 eval_tokens=5_242_880, save_every=1000),
}


def checked(kind: type, **settings):
    """kind(**settings), with a ValueError turned into a UserError: the settings are the user's to change."""
    try:
        return kind(**settings)
    except ValueError as e:
        raise UserError(str(e)) from None


def preset_config(preset: str = "laptop", **flags) -> RunConfig:
    """Defaults < preset < flags."""
    settings = {"preset": preset}
    settings.update(PRESETS.get(preset, {}))
    settings.update(TRAINING.get(preset, {}))
    settings.update(flags)
    return checked(RunConfig, **settings)


# ----------------------------------------------------------------------------------------------------------------------
# The loop

class Stopped(Exception):
    """SIGINT or SIGTERM came, and the checkpoint is written. Arguments: the signal's number, a sentence."""


class Diverged(UserError):
    """The loss, the gradient or a weight is infinite or not a number."""


def fit(model: nn.Module, batch_fn, cfg, out: Path | None = None, evaluate=None, describe=None) -> list[dict]:
    """Trains model for cfg.steps steps; returns one record a step, which are the lines of log.jsonl.

    model(*batch) is a scalar loss. batch_fn(step) is this rank's batch, a tuple of tensors with the rows first, and
    depends on step alone. cfg is a FitConfig; with `out` or `evaluate` it is a RunConfig. With `out`, checkpoints and
    the log go to that folder and the run resumes from them. evaluate() returns numbers for the record; it is called
    every cfg.eval_every steps and at the end. describe(record, batch) returns more numbers for every record.

    Raises Diverged when loss, gradient or a weight is not finite. With `out` it raises Stopped after SIGINT or SIGTERM,
    also if the signal comes in the last step.
    """
    device = pick_device(cfg)
    model.to(device).train()
    optimizers = build_optimizer(model, cfg)
    step, seconds_before, history = resume(out, cfg, model, optimizers) if out else (0, 0.0, [])
    runner = wrap(model, cfg, device)

    # Only the first rank writes; the others write to nowhere.
    writes = out is not None and rank() == 0
    log_path = out / "log.jsonl" if writes else Path(os.devnull)
    progress = TrainingProgress(cfg.steps, step)
    start = time.perf_counter()
    saved = step
    following = batch_fn(step) if step < cfg.steps else None

    with signals(listen=out is not None) as caught, open(log_path, "ab", buffering=0) as log:
        while step < cfg.steps:
            # Update the weights. While a GPU is still busy with that, prepare the next batch.
            began = time.perf_counter()
            batch = following
            loss, norm = update(runner, optimizers, batch, step, cfg, device)
            following = batch_fn(step + 1) if step + 1 < cfg.steps else None

            # The ranks agree on the mean loss, and on whether one of them was told to stop.
            loss, stop = all_reduce([loss.item() / world(), bool(caught)], device).tolist()
            norm = norm.item()
            step += 1
            check_finite(step, loss, norm, out, saved)
            # The loss is that of the weights before the update. A checkpoint holds those after it, so they are checked
            # too.
            at_checkpoint = step == cfg.steps or (out and (stop or is_due(step, cfg.steps, cfg.save_every)))
            if at_checkpoint:
                check_weights(step, model, out, saved)

            # Record the step, and measure now and then.
            record = dict(step=step, loss=loss, lr=lr_at(step - 1, cfg), grad_norm=norm,
                          tokens=step * tokens_of(batch), step_seconds=time.perf_counter() - began)
            if describe:
                record.update(describe(record, batch))
            if evaluate and is_due(step, cfg.steps, cfg.eval_every):
                record.update(in_eval_mode(model, evaluate))
            record["seconds"] = seconds_before + time.perf_counter() - start
            history.append(record)
            with disk(log_path):
                log.write(json.dumps(record).encode() + b"\n")
            progress.show(history, tokens_of(batch))

            # Save now and then, and stop if told to.
            if out and at_checkpoint:
                if rank() == 0:
                    save_checkpoint(out, cfg, step, record["seconds"], model, optimizers, log)
                saved = step
            if step == cfg.steps:
                # No later step would notice a signal that came during the last evaluation or save.
                stop = all_reduce([bool(caught)], device).item()
            if stop:
                # where another rank caught it, its number is not known here
                number = signal.Signals(caught[0] if caught else signal.SIGTERM)
                raise Stopped(number, f"stopped by {number.name} after step {step}; the checkpoint is in {out}")
    return history


def check_finite(step: int, loss: float, norm: float, out: Path | None, saved: int) -> None:
    """Raises Diverged if loss or gradient norm is not finite; saved: the step of the last checkpoint in `out`."""
    if math.isfinite(loss + norm):
        return
    raise Diverged(f"step {step}: loss {loss}, gradient norm {norm}, so training stops; try a lower --lr"
                   f"{last_good(out, saved)}")


def check_weights(step: int, model: nn.Module, out: Path | None, saved: int) -> None:
    """Raises Diverged if a weight is not finite; out, saved: as for `check_finite`."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise Diverged(f"step {step}: a weight is not a finite number, so training stops; try a lower --lr"
                       f"{last_good(out, saved)}")


def last_good(out: Path | None, saved: int) -> str:
    """Which checkpoint a run that diverged has left; "" without one."""
    return f" (the last good checkpoint in {out} is of step {saved})" if saved else ""


def wrap(model: nn.Module, cfg, device: torch.device) -> nn.Module:
    """The model as `fit` calls it: compiled if cfg says so, and on several ranks made to average their gradients."""
    runner = torch.compile(model) if compiles(cfg) else model
    if world() == 1:
        return runner
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(runner, device_ids=devices)


def tokens_of(batch: tuple) -> int:
    """Tokens (rows x positions) of a step, over all ranks."""
    return batch[0].shape[:2].numel() * world()


def is_due(step: int, steps: int, every: int) -> bool:
    """Every so many steps, and at the last; 0 = at the last only."""
    return step == steps or (every > 0 and step % every == 0)


def in_eval_mode(model: nn.Module, function):
    """function(), called while the model does not drop anything out."""
    model.eval()
    try:
        return function()
    finally:
        model.train()


def update(runner, optimizers, batch: tuple, step: int, cfg, device) -> tuple[Tensor, Tensor]:
    """Step number `step` on this rank's batch -> loss, gradient norm (neither is waited for)."""
    # Dropout draws from (seed, step, rank), so that it does not depend on what ran before.
    torch.manual_seed(((cfg.seed * 1_000_003 + step) * 65_537 + rank()) % 2**63)
    loss = accumulate(runner, batch, cfg, device)

    # Clip the norm over all parameters together; where nothing is clipped it is still measured.
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)

    # The rate depends on the number of the step alone, so that a checkpoint need not hold it.
    for group in groups:
        group["lr"] = lr_at(step, cfg)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss, norm


def accumulate(runner, batch: tuple, cfg, device) -> Tensor:
    """Forward and backward over this rank's rows, device_batch_size at a time -> mean loss."""
    rows = len(batch[0])
    micro = rows_at_once(cfg, rows)

    # All rows are copied at once: a copy between two passes would wait for the first of them.
    batch = [t.to(device) for t in batch]
    total = torch.zeros((), device=device)
    for first in range(0, rows, micro):
        # The ranks exchange gradients in the last pass only.
        is_last = first + micro >= rows
        has_ranks = isinstance(runner, DistributedDataParallel)
        with runner.no_sync() if has_ranks and not is_last else nullcontext():
            with autocast(cfg):
                part = [t[first:first + micro] for t in batch]
                loss = runner(*part) * (micro / rows)
            loss.backward()
        total += loss.detach()
    return total


def rows_at_once(cfg, rows: int) -> int:
    """How many of a rank's rows are in one forward pass. Raises UserError if that does not divide them."""
    micro = min(cfg.device_batch_size or rows, rows)
    if rows % micro:
        raise UserError(f"--device_batch_size={micro} does not divide the {rows} rows of a rank; change one of them")
    return micro


def lr_at(step: int, cfg) -> float:
    """Learning rate of step number `step`, counted from 0."""
    if cfg.schedule == "cosine":
        done = max(0, step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
        share = 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = cfg.steps - step
        share = min(1.0, left / max(1, round(cfg.warmdown * cfg.steps)))
    # In a short run the warm-up may overlap the decay.
    warm = min(1.0, (step + 1) / max(1, cfg.warmup))
    return warm * (cfg.min_lr + (cfg.lr - cfg.min_lr) * share)


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers

def orthogonalise(G: Tensor, steps: int = 5) -> Tensor:
    """(N,m,n) matrices -> about U Vᵀ of each G = U S Vᵀ: a quintic Newton-Schulz iteration on the singular values."""
    X = G.bfloat16() if G.is_cuda else G
    # The iteration multiplies X Xᵀ, which is smaller if X is wide.
    is_tall = X.size(-2) > X.size(-1)
    if is_tall:
        X = X.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    # The coefficients are Jordan's (2024): they bring the singular values near 1 in few steps.
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if is_tall else X


class Muon(torch.optim.Optimizer):
    """The update of torch.optim.Muon with adjust_lr_fn="match_rms_adamw", made faster; a test compares the two.

    All matrices of one shape are orthogonalised together, in batched products. On a CPU these are in float32, which
    is three times as fast there as the bfloat16 of torch.optim.Muon.
    """

    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for params in same_shape.values():
                self.update_same_shape(params, group["lr"], group["momentum"], group["weight_decay"])

    def update_same_shape(self, params: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        """The update of matrices of one shape."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        buffers = [self.state[p]["momentum_buffer"] for p in params]

        # The mean gradient, and Nesterov's look one step ahead of it.
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, buffers, momentum)

        # Orthogonal matrices, scaled so that an entry moves about as far as under AdamW (Liu et al. 2025, eq. 4).
        direction = orthogonalise(torch.stack(ahead)).to(params[0].dtype)
        size = 0.2 * math.sqrt(max(params[0].shape))
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, direction.unbind(), alpha=-lr * size)


def build_optimizer(model: nn.Module, cfg) -> list[torch.optim.Optimizer]:
    """Muon for the model's hidden matrices (of every memory alike), AdamW for the rest. Vectors and scalars do not
    decay."""
    hidden = list(model.hidden_matrices()) if cfg.optimizer == "muon" else []
    for_muon = set(hidden)
    rest = [p for p in model.parameters() if p.requires_grad and p not in for_muon]

    # One optimizer for each kind; a model may have parameters of one kind alone.
    optimizers = []
    if rest:
        groups = [dict(params=[p for p in rest if p.ndim >= 2], weight_decay=cfg.weight_decay),
                  dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0)]
        groups = [group for group in groups if group["params"]]
        optimizers.append(torch.optim.AdamW(groups, lr=cfg.lr, betas=(BETA1, cfg.beta2), fused=True))
    if hidden:
        optimizers.append(Muon(hidden, cfg.lr, MOMENTUM, cfg.weight_decay))
    return optimizers


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(out: Path, cfg, step: int, seconds: float, model, optimizers, log) -> None:
    """Writes out/ckpt.pt with all that a resumed run needs; the one before it becomes ckpt.prev.pt."""
    # First the log goes to the disk: a checkpoint must never know more lines than the disk has.
    os.fsync(log.fileno())
    state = dict(config=asdict(cfg), step=step, seconds=seconds, log_bytes=log.tell(), model=model.state_dict(),
                 optimizer=[optimizer.state_dict() for optimizer in optimizers])
    with replacing(out / "ckpt.pt", keep=out / "ckpt.prev.pt") as f:
        try:
            torch.save(state, f)
        except RuntimeError as e:
            # This is how torch.save reports a write that failed half-way.
            if "inline_container" in str(e):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from e
            raise


def find_checkpoint(out: Path) -> tuple[dict | None, list[Path]]:
    """The newest whole checkpoint, or None, and the damaged files that were met on the way to it."""
    damaged = []
    for path in (out / "ckpt.pt", out / "ckpt.prev.pt"):
        if not path.exists():
            continue
        # The zip's checksums find what was truncated or changed; torch.load does not.
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as e:
            broken = e
        if broken is None:
            try:
                found = torch.load(path, map_location="cpu", weights_only=True)
                if isinstance(found, dict) and {"config", "step", "model", "optimizer"} <= found.keys():
                    return found, damaged
                broken = "it is no checkpoint of train.py"
            except (RuntimeError, pickle.UnpicklingError) as e:
                broken = str(e).splitlines()[0]
        say(f"{path} is damaged ({broken}), so it is not used")
        damaged.append(path)
    return None, damaged


def check_same_settings(old: dict, cfg) -> None:
    """Raises UserError if the settings are not those of the run that is in cfg.folder."""
    # How a run is executed may change. What the corpus fills in may not be known yet.
    may_differ = {f.name for f in fields(cfg) if f.metadata["group"] == "run"}
    may_differ |= {name for name in ("vocab_size", "data_sha256") if not getattr(cfg, name, None)}
    differ = []
    for name, value in asdict(cfg).items():
        before = old.get(name, "missing")
        if name not in may_differ and before != value:
            differ.append(f"{name} (there {before}, now {value})")
    if differ:
        raise UserError(f"{cfg.folder} holds a run with another {', '.join(differ)}; choose another --out_dir, or "
                        "delete that folder")


def resume(out: Path, cfg, model, optimizers) -> tuple[int, float, list[dict]]:
    """Puts the newest checkpoint into model and optimizers, and cuts the log back to it -> step, seconds, history."""
    with disk(out):
        out.mkdir(parents=True, exist_ok=True)
    found, damaged = find_checkpoint(out)
    if damaged and found is None:
        say(f"{out} has no whole checkpoint: the run starts over")
    log = out / "log.jsonl"
    text = log.read_bytes() if log.exists() else b""

    # The model, the optimizers and the position in the data and in the log, all of one step.
    step = 0
    seconds = 0.0
    keep = 0  # bytes of the log
    if found is not None:
        check_same_settings(found["config"], cfg)
        step = found["step"]
        seconds = found["seconds"]
        keep = found["log_bytes"]
        if len(text) < keep:
            raise UserError(f"{log} has {len(text)} bytes, and the checkpoint beside it was written after {keep}; "
                            f"delete {out} to start over")
        model.load_state_dict(found["model"])
        for optimizer, state in zip(optimizers, found["optimizer"], strict=True):
            optimizer.load_state_dict(state)
        say(f"continuing {out} from step {step}")

    # On several nodes the folder may not be the same disk.
    if world() > 1 and all_reduce([step], pick_device(cfg)).item() != step * world():
        raise UserError(f"the ranks see different checkpoints in {out}; put out_dir on a disk that every node mounts")
    # A damaged file gets another name, or the next save would put it in the place of the good one.
    if rank() == 0:
        for path in damaged:
            path.replace(f"{path}.damaged")
    # What was logged after the checkpoint will be computed again.
    if rank() == 0 and len(text) != keep:
        with replacing(log) as f:
            f.write(text[:keep])
    try:
        history = [json.loads(line) for line in text[:keep].splitlines()]
    except ValueError as e:
        raise UserError(f"{log} is damaged ({e}); delete {out} to start over") from None
    return step, seconds, history


def load_run(path: str | Path) -> tuple[GPT, RunConfig, dict]:
    """out/<run> (or any file in it) -> the trained model on the CPU, its config, the whole checkpoint."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    found, _ = find_checkpoint(folder)
    if found is None:
        raise UserError(f"{path}: no checkpoint there; give a folder that train.py wrote, such as out/laptop-none-s1")
    try:
        cfg = checked(RunConfig, **found["config"])
    except TypeError as e:
        raise UserError(f"{path} was written by another version of this code ({e}); train it again") from None
    model = GPT(cfg.architecture())
    model.load_state_dict(found["model"])
    return model.eval(), cfg, found


# ----------------------------------------------------------------------------------------------------------------------
# Signals and progress

@contextmanager
def signals(listen: bool):
    """Collects SIGINT and SIGTERM in a list instead of dying in the middle of a step. A second one kills as usual."""
    caught = []
    old = {}

    def note(number, frame):
        caught.append(number)
        signal.signal(number, old[number])

    if listen:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class TrainingProgress:
    """One line that is rewritten on a terminal; else a line every 10 s, and one for each evaluation."""

    def __init__(self, steps: int, first: int):
        self.steps = steps
        self.first = first  # steps that were done before this began
        self.terminal = sys.stdout.isatty()
        self.began = time.perf_counter()
        self.shown = self.began

    def show(self, history: list[dict], tokens: int) -> None:
        """history: the records so far. tokens: of a step."""
        record = history[-1]
        step = record["step"]
        now = time.perf_counter()
        stays = "val_bpb" in record or step == self.steps    # on the terminal
        pause = 0.2 if self.terminal else 10
        if not stays and now - self.shown < pause:
            return
        self.shown = now

        # Losses and speeds of the last 20 steps together, so that one noisy step does not mislead.
        recent = history[-20:]
        speed = tokens / median(r["step_seconds"] for r in recent)
        parts = [f"step {step}/{self.steps}", f"loss {mean(r['loss'] for r in recent):.4f}"]
        if "bpb" in record:
            parts.append(f"bpb {mean(r['bpb'] for r in recent):.4f}")
        if "val_bpb" in record:
            parts.append(f"val bpb {record['val_bpb']:.4f}")
        parts.append(f"lr {record['lr']:.2e}")
        parts.append(f"{speed:,.0f} tokens/s")
        if "mfu" in record:
            parts.append(f"MFU {mean(r['mfu'] for r in recent):.1%}")
        left = int((now - self.began) / (step - self.first) * (self.steps - step))
        parts.append(f"{left // 60}:{left % 60:02d} left")

        text = "  ".join(parts)
        if not self.terminal:
            say(text)
        elif stays:
            say("\r" + text.ljust(110))
        else:
            say("\r" + text.ljust(110), end="")


# ----------------------------------------------------------------------------------------------------------------------
# Processes and devices

def rank() -> int:
    """The number of this process among all, on all nodes."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """The number of this process on its node."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world() -> int:
    """The number of processes on all nodes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def say(text: str, end: str = "\n") -> None:
    """Prints, on the first rank only."""
    if rank() == 0:
        print(text, end=end, flush=True)


def check_one_process(script: str) -> None:
    """Raises UserError if torchrun has started several processes for a script that is one."""
    if world() > 1:
        raise UserError(f"{script} runs in one process, but WORLD_SIZE is {world()}; start it with python, or unset "
                        "WORLD_SIZE")


@contextmanager
def alone_in(folder: Path):
    """Keeps every other command out of a run's folder. Raises UserError if one is there. Only the first rank asks.
    (`data.locked` waits instead, where a corpus is prepared.)"""
    if data.fcntl is None or rank() > 0:
        yield
        return
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        # the lock ends when the file is closed, also by the end of a killed process
        try:
            data.fcntl.flock(file, data.fcntl.LOCK_EX | data.fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work in {folder}; wait for it, or choose another "
                            "--out_dir") from None
        yield


def all_reduce(values: list[float] | Tensor, device) -> Tensor:
    """The sum over ranks, in float64 and on the CPU."""
    total = torch.as_tensor(values, dtype=torch.float64)
    if world() > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return total.cpu()


def pick_device(cfg) -> torch.device:
    """The device of this process; each of several on a machine has its own GPU. Raises UserError if it has none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cfg.device == "cpu" or (cfg.device == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank() >= count:
        if count == 0:
            raise UserError("--device=cuda: PyTorch finds no CUDA device here; use --device=cpu")
        raise UserError(f"--device={cfg.device}: PyTorch sees {count} CUDA devices here, and this is process number "
                        f"{local_rank() + 1} to need one; start fewer, or use --device=cpu")
    torch.set_float32_matmul_precision("high")  # float32 products in TF32
    return torch.device("cuda", local_rank())


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def check_device(cfg) -> torch.device:
    """pick_device(cfg). Raises UserError if there is no such device, or if it cannot compute in cfg.dtype."""
    device = pick_device(cfg)
    if cfg.dtype == "bfloat16" and device.type == "cpu":
        raise UserError("--dtype=bfloat16: only on CUDA, a CPU trains in float32; use --dtype=auto")
    return device


def check_rows(cfg) -> None:
    """Raises UserError if the rows of a step cannot be shared out among ranks and passes."""
    if cfg.batch_size % world():
        raise UserError(f"--batch_size={cfg.batch_size}: not a multiple of the {world()} ranks; change one of them")
    rows_at_once(cfg, cfg.batch_size // world())


def uses_bf16(cfg) -> bool:
    """Are matrix products in bfloat16? Raises what check_device raises."""
    device = check_device(cfg)
    if cfg.dtype == "auto" and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)  # emulated it is slower than float32
    return cfg.dtype == "bfloat16"


def autocast(cfg):
    """The context in which a model runs."""
    return torch.autocast("cuda", torch.bfloat16) if uses_bf16(cfg) else nullcontext()


def compiles(cfg) -> bool:
    """Is the model compiled? Outside Linux there is no triton to compile with."""
    if cfg.compile == "auto":
        return sys.platform == "linux" and pick_device(cfg).type == "cuda"
    return cfg.compile == "true"


# ----------------------------------------------------------------------------------------------------------------------
# Measuring

@torch.no_grad()
def evaluate_bpb(model: GPT, corpus, cfg: RunConfig, bucket: int = 64) -> dict:
    """Bits per byte on the validation rows, in all and by position in the row.

    The total is Σ nats / (ln 2 · Σ bytes) over all targets, never a mean of ratios, and so is each bucket of `bucket`
    positions. A target without bytes (end of text) is not scored. Returns val_bpb, val_loss (nats a target) and
    bpb_by_position.
    """
    device = pick_device(cfg)
    T = cfg.max_seq_len
    # As many rows at once as in a forward pass of the training, so that the memory suffices.
    rows = cfg.batch_size // world()
    rows = min(cfg.device_batch_size or rows, rows)

    def nats_of(x, y):
        logits = model.stream(x)[0]
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view(y.shape)

    # Compiled together with the loss, the model need not write its float32 logits or its state to memory. The last
    # batch can be smaller: it gets a graph of its own, because one for all sizes would be slower for the rest of the
    # run.
    if compiles(cfg):
        nats_of = torch.compile(nats_of, dynamic=False)

    # Each rank reads every world-th batch; then the sums are added up.
    token_bytes = corpus.token_bytes.to(device)
    sums = torch.zeros(3, T, dtype=torch.float64, device=device)  # nats, bytes and targets at each position
    batches = corpus.eval_batches(T, rows, cfg.eval_tokens or None)
    for x, y, _ in itertools.islice(batches, rank(), None, world()):
        x = x.to(device)
        y = y.to(device)
        with autocast(cfg):
            nats = nats_of(x, y)
        size = token_bytes[y]                                     # (rows, T) bytes
        scored = size > 0
        values = torch.stack([nats.double() * scored, size.double(), scored.double()])
        sums += values.sum(1)
    sums = all_reduce(sums, device)

    # Neighbouring positions together, then everything together.
    by_position = by_bucket(sums, bucket)
    nats = sum(by_position["nats"])
    size = sum(by_position["bytes"])
    if not size:
        raise UserError(f"{corpus.name}: the validation part has no text to measure; give a larger corpus")
    val_loss = nats / sum(by_position["targets"])
    return dict(val_bpb=bits_per_byte(nats, size), val_loss=val_loss, bpb_by_position=by_position)


def by_bucket(sums: Tensor, bucket: int) -> dict:
    """Nats, bytes and targets, summed by position (3,T) -> the same by bucket of `bucket` neighbouring positions, each
    with its bits per byte and its loss in nats a target."""
    T = sums.size(1)
    nats, size, targets = F.pad(sums, (0, -T % bucket)).view(3, -1, bucket).sum(-1).tolist()
    bpb = [bits_per_byte(n, b) for n, b in zip(nats, size)]
    loss = [n / t if t else None for n, t in zip(nats, targets)]
    return dict(bucket=bucket, positions=list(range(0, T, bucket)), nats=nats, bytes=size, targets=targets, bpb=bpb,
                loss=loss)


def bits_per_byte(nats: float, size: float) -> float | None:
    """nats / (ln 2 · bytes); None where there are no bytes."""
    return nats / (math.log(2) * size) if size else None


# Dense bf16 products in FLOP/s, from the data sheets; the first entry whose name is part of the GPU's name applies.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L40": 181e12, "L4": 121e12, "4090": 165e12, "3090": 71e12}


def peak_flops(cfg) -> float:
    """The peak of this process's GPU in FLOP/s; 0 where it is not known."""
    if uses_bf16(cfg):
        for name, flops in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name():
                return flops
    return 0.0


def reset_peak_memory(device) -> None:
    """Resets the peak, so that each run of a sweep has its own (on a CPU only under Linux, where writing 5 to
    clear_refs does it)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device) -> dict:
    """The most memory that the GPU (peak_vram_mib; 0 on a CPU) and the process (peak_rss_mib) have used, in MiB."""
    rss = 0.0
    status = Path("/proc/self/status")
    if status.exists():
        rss = int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024
    elif sys.platform == "darwin":
        import resource  # not on Windows
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    vram = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    return dict(peak_vram_mib=round(vram, 1), peak_rss_mib=round(rss, 1))


def peak_mib(result: dict) -> float | None:
    """The GPU's peak if a result has one, else the process's."""
    return result.get("peak_vram_mib") or result.get("peak_rss_mib")


def count_params(model: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def sample_text(model: GPT, corpus, cfg: RunConfig, device) -> str:
    """A continuation of nothing, the same each time."""
    generator = torch.Generator(device).manual_seed(cfg.seed)
    start = torch.tensor([[corpus.eos]], device=device)
    n = min(cfg.sample_tokens, cfg.max_seq_len - 1)
    with autocast(cfg):
        tokens = model.generate(start, n, temperature=0.8, top_k=50, generator=generator)[0, 1:].tolist()
    # End-of-text is the tokenizer's last token; behind it the model's vocabulary may be padded. Neither has a text.
    with_text = [t for t in tokens if t < corpus.eos]
    return corpus.encoding.decode(with_text, errors="replace")


def tokens_per_second(cfg: RunConfig, history: list[dict]) -> float:
    """In a median step: without compilation, evaluation and checkpoints."""
    return cfg.batch_size * cfg.max_seq_len / median(r["step_seconds"] for r in history)


@torch.no_grad()
def measure_costs(model: GPT, corpus, cfg: RunConfig, history: list[dict]) -> dict:
    """What a trained model costs: parameters, FLOPs, state, time, memory; and its sample and its curve of losses."""
    device = pick_device(cfg)
    config = model.config
    total = count_params(model)
    with torch.device("meta"):      # nothing is allocated
        without = count_params(GPT(replace(config, memory="none", memory_layers="all")))
    with autocast(cfg):
        _, filled = model.stream(torch.zeros(1, cfg.max_seq_len, dtype=torch.long, device=device))
    keys = ("step", "seconds", "tokens", "val_bpb")
    curve = [{key: r[key] for key in keys} for r in history if "val_bpb" in r]
    peaks = peak_memory_mib(device)  # before the sample, which is no part of the costs
    sample = sample_text(model, corpus, cfg, device) if cfg.sample_tokens else ""
    return dict(train_tokens=cfg.steps * cfg.batch_size * cfg.max_seq_len, total_params=total,
                memory_params=total - without, flops_per_token=model.flops_per_token(cfg.max_seq_len),
                state_bytes=state_bytes(filled), total_time_min=history[-1]["seconds"] / 60,
                tokens_per_second=tokens_per_second(cfg, history), **peaks, sample=sample, curve=curve)


def plot_losses(history: list[dict], path: Path) -> None:
    """loss.png: bits per byte in training (the mean of 20 steps) and in validation, against the step."""
    import analyze
    steps = [r["step"] for r in history]
    losses = [r["bpb"] for r in history]
    # Each step together with the 19 before it, or with as many as there are.
    smooth = [mean(losses[max(i - 19, 0):i + 1]) for i in range(len(losses))]
    measured = [r for r in history if "val_bpb" in r]

    figure, axes = analyze.panels(1, 1, (7, 4.5))
    ax = axes[0, 0]
    ax.plot(steps, smooth, lw=1, label="training (mean of 20 steps)")
    ax.plot([r["step"] for r in measured], [r["val_bpb"] for r in measured], "o-", ms=4, label="validation")
    ax.set(xlabel="step (updates)", ylabel="bits per byte", title=path.parent.name)
    ax.legend()
    with replacing(path) as f:
        f.write(analyze.picture(figure))


# ----------------------------------------------------------------------------------------------------------------------
# Flags: the command line -> settings

GROUPS = ("toy", "architecture", "memory", "data", "optimisation", "run")  # the order of --help


def read_flags(kind: type, argv: list[str], usage: str, description: str, shown=None, fixed: tuple = (),
               words: str = "") -> tuple[dict, list[str]]:
    """Reads a command line. Returns a dict, name -> text, of the flags that were given, and a list of the other words.

    Every field of the dataclass `kind` is a flag --name=value, except those in `fixed`. The flag of a field that is a
    tuple may be repeated, and the dict has a list of its texts. shown: a configuration whose values --help gives as
    the defaults. words: what --help says of the other words; "" allows none. Raises UserError.
    """
    known = {f.name: f for f in fields(kind) if f.name not in fixed}
    parser = data.Parser(usage=usage, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    if words:
        parser.add_argument("words", nargs="*", help=words)

    # --help lists the flags under the headings of their groups.
    found = dict.fromkeys(f.metadata["group"] for f in known.values())
    ordered = [g for g in GROUPS if g in found] + [g for g in found if g not in GROUPS]
    groups = {name: parser.add_argument_group(name) for name in ordered}
    for name, f in known.items():
        default = f.default if shown is None else getattr(shown, name)
        text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
        action = "append" if f.type is tuple else "store"
        metavar = "TEXT" if f.type is tuple else f.type.__name__.upper()
        group = groups[f.metadata["group"]]
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, action=action, metavar=metavar, help=text)

    # An unknown flag is more often a slip than a wish.
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        command = usage.split(" [")[0]
        hint = did_you_mean(word, known, "--{}=...") or f"; python {command} --help lists its flags"
        raise UserError(f"unknown argument {unknown[0]}{hint}")
    flags = vars(given)
    return flags, flags.pop("words", [])


def parse_value(kind: type, name: str, text: str):
    """The text of a flag -> its value, of the type that this field of the dataclass has. Raises UserError."""
    wanted = kind.__dataclass_fields__[name].type
    try:
        if wanted is bool:
            return {"true": True, "false": False}[text.lower()]
        return wanted(text)
    except (ValueError, KeyError):
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[wanted]
        raise UserError(f"--{name}={text}: expected {expected}") from None


def sweep_points(kind: type, flags: dict[str, str]) -> list[dict]:
    """Commas in a value make a sweep (so that no value can hold a comma): the settings of every point of the grid, in
    the order given, seeds innermost."""
    names = sorted(flags, key=lambda name: name == "seed")
    values = [[parse_value(kind, name, text) for text in flags[name].split(",")] for name in names]
    return [dict(zip(names, point)) for point in itertools.product(*values)]


# ----------------------------------------------------------------------------------------------------------------------
# Runs: configurations -> one result.json each. A configuration knows its seed, its folder and its identity() (what
# result.json repeats at its top). For the name of its folder it knows how that begins, name_begins(), and which
# settings go without saying, usual().

def changes(cfg) -> list[str]:
    """The settings in which a run differs from usual(), such as ["lr=0.01"], without the seed and what its name begins
    with."""
    usual = cfg.usual()
    begins = cfg.name_begins()
    found = []
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        says_nothing = f.metadata["group"] == "run" or f.name in begins or f.name == "seed"
        if not says_nothing and value != getattr(usual, f.name):
            found.append(f"{f.name}={value:g}" if isinstance(value, float) else f"{f.name}={value}")
    return found


def run_name(cfg) -> str:
    """laptop-deltanet-window=L-s1: what the name begins with, the changes, the seed."""
    begins = [str(value) for value in cfg.name_begins().values()]
    name = "-".join([*begins, *changes(cfg)])
    name = re.sub(r"[^\w.+=-]", "_", name)
    if len(name) > 120:
        name = f"{name[:100]}-{hashlib.sha1(name.encode()).hexdigest()[:8]}"
    return f"{name}-s{cfg.seed}"


def read_result(path: Path) -> dict:
    """The result.json of a finished run. Raises UserError if it is damaged."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        result["config"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is damaged ({e!r}); delete it, and the run is finished anew") from None
    return result


def run_all(configs: list, job, headline, workers: int = 1, show=None) -> tuple[list[dict], dict]:
    """Runs job(cfg) for every configuration. Returns the results in the order given, and of the runs that diverged a
    dict from name to Diverged.

    job(cfg) returns measurements; headline(result) says the main one in a line, and show(cfg, result) tells more of a
    run that has just been saved. A run whose result.json is there is read instead of run. One that diverges does not
    stop the others. With several workers that many run side by side, one thread each, every one in a process of its
    own.
    """
    # A run counts as finished when its result.json is there: it is written when everything has been measured.
    results = {}
    todo = []
    for cfg in configs:
        path = cfg.folder / "result.json"
        if path.is_file():
            results[cfg.folder] = read_result(path)
            check_same_settings(results[cfg.folder]["config"], cfg)
        else:
            check_device(cfg)  # before anything is run
            check_rows(cfg)
            todo.append(cfg)
    # On several nodes the folder may not be the same disk.
    if world() > 1 and all_reduce([len(todo)], pick_device(configs[0])).item() != len(todo) * world():
        raise UserError(f"the ranks see different results in {configs[0].folder.parent}; put out_dir on a disk that "
                        "every node mounts")
    if results:
        say(f"{len(results)} of {len(configs)} runs are finished already and skipped (delete their folders to run them "
            "again)")

    # Run the others, one after the other or side by side. Each says what came out and how long the rest will take.
    diverged = {}
    start = time.perf_counter()
    outcomes = in_workers(todo, job, workers) if workers > 1 else one_by_one(todo, job)
    for done, (cfg, outcome) in enumerate(outcomes, 1):
        if isinstance(outcome, Diverged):
            diverged[cfg.name] = outcome
            text = str(outcome)
        else:
            results[cfg.folder] = outcome
            text = headline(outcome)
            if show:
                show(cfg, outcome)
        minutes_a_run = (time.perf_counter() - start) / 60 / done
        left = minutes_a_run * (len(todo) - done)
        if len(todo) > 1:
            say(f"{done}/{len(todo)}  {cfg.name}: {text}  (about {left:.1f} minutes left)")
    return [results[cfg.folder] for cfg in configs if cfg.folder in results], diverged


def check_diverged(diverged: dict, total: int) -> None:
    """Raises UserError if runs diverged. To be called last, after the results of the others were shown."""
    if diverged and total == 1:
        raise next(iter(diverged.values()))
    if diverged:
        raise UserError(f"{len(diverged)} of {total} runs diverged: {', '.join(diverged)}; try a lower --lr")


def one_by_one(configs: list, job):
    """Yields (cfg, its result or Diverged)."""
    for cfg in configs:
        try:
            yield cfg, run_one(cfg, job)
        except Diverged as e:
            # The traceback would keep the model and the optimizer in memory until the sweep ends.
            yield cfg, e.with_traceback(None)


def in_workers(configs: list, job, workers: int):
    """The same from several processes, in the order in which they finish."""
    # What `kill` sends is to end in the same way as Ctrl-C: no worker may outlive the command.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Spawned, not forked: a forked child inherits torch's threads in an unknown state.
    pool = ProcessPoolExecutor(min(workers, max(1, len(configs))), get_context("spawn"), start_worker)
    try:
        futures = {pool.submit(run_labelled, cfg, job): cfg for cfg in configs}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except Diverged as e:
                yield futures[future], e
    except BrokenProcessPool:
        raise UserError("a worker was killed, perhaps for want of memory; finished runs are kept, so give the same "
                        "command again with --jobs=1") from None
    except BaseException:
        # Also Ctrl-C, an error of the caller, or its leaving off (GeneratorExit): the workers end first, then it
        # goes on.
        for process in active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


def start_worker() -> None:
    """One thread, and Ctrl-C ends a worker without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)


class Labelled(io.TextIOBase):
    """Several workers print to one terminal, so each line says whose it is."""

    def __init__(self, name: str, stream):
        self.name = name
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes each line that is not blank with the label before it."""
        for line in text.splitlines():
            if line.strip():
                self.stream.write(f"  [{self.name}] {line}\n")
        self.stream.flush()
        return len(text)


def run_labelled(cfg, job) -> dict:
    """run_one in a worker."""
    with redirect_stdout(Labelled(cfg.name, sys.stdout)):
        return run_one(cfg, job)


def run_one(cfg, job) -> dict:
    """One run: seeds, job(cfg), one save -> what result.json holds."""
    device = pick_device(cfg)
    gc.collect()  # or the last run's model, which reference cycles keep, would still take memory
    if compiles(cfg):
        torch.compiler.reset()  # or the last run's graphs would fill the cache
    reset_peak_memory(device)
    torch.manual_seed(cfg.seed)

    with alone_in(cfg.folder):
        return run_and_record(cfg, job, device)


def run_and_record(cfg, job, device) -> dict:
    """job(cfg), and what result.json says besides -> what result.json holds."""
    start = time.perf_counter()
    cpu_start = time.process_time()
    measurements = job(cfg)

    # Identity, config, machine, measurements. Measurements may replace what stands before them: a job
    # fills in the settings that only the data could tell.
    result = cfg.identity()
    result["config"] = asdict(cfg)
    result["device"] = f"{world()} x {device_name(device)}"
    result["versions"] = versions()
    # of this process alone: what a run took before it was interrupted is in the measurements
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["cpu_seconds"] = round(time.process_time() - cpu_start, 1)
    result.update(measurements)
    if rank() == 0:
        save_json(cfg.folder / "result.json", result)
    return result


def versions() -> dict:
    """Of Python and the packages that decide numbers and speed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "tiktoken"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def save_json(path: Path, content: dict) -> None:
    """One key a line, and each value on its line: a file that can be read and compared."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    save(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def save(path: Path, content: bytes) -> None:
    """The file whole, or not at all; its folder is made."""
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as f:
        f.write(content)


# ----------------------------------------------------------------------------------------------------------------------
# train: the job of this script

@lru_cache(maxsize=2)
def load_corpus(dataset: str, tokenizer: str):
    """The Corpus; a sweep loads it once. Of a node's processes the first prepares the data and shows how far it is, and
    the others wait."""
    first = local_rank() == 0
    if not first:
        dist.barrier()
    try:
        return data.load(dataset, tokenizer, quiet=not first)
    finally:
        if first and world() > 1:
            dist.barrier()


def fill_in(cfg: RunConfig, corpus) -> RunConfig:
    """cfg with the vocabulary size and sha256 of the corpus. Raises UserError if the corpus is not the one that the
    settings name, or has more tokens than they allow."""
    n = corpus.vocab_size
    if cfg.vocab_size and cfg.vocab_size < n:
        raise UserError(f"--vocab_size={cfg.vocab_size}: the tokenizer {cfg.tokenizer} has {n} tokens; give at least "
                        f"{n}, or 0")
    if cfg.data_sha256 and cfg.data_sha256 != corpus.sha256:
        raise UserError(f"{corpus.name}: sha256 is {corpus.sha256}, expected {cfg.data_sha256}; the corpus has "
                        "changed, so restore its files or train again")
    # A GPU multiplies much faster if the vocabulary is a multiple of 64. A small one is fast enough without padding.
    padded = n
    if n >= 1024:
        padded = math.ceil(n / 64) * 64
    return replace(cfg, vocab_size=cfg.vocab_size or padded, data_sha256=corpus.sha256)


def train(cfg: RunConfig) -> dict:
    """Trains and measures one model; a job for run_all."""
    # The corpus decides the vocabulary, and so the model.
    device = pick_device(cfg)
    corpus = load_corpus(cfg.dataset, cfg.tokenizer)
    cfg = fill_in(cfg, corpus)
    model = GPT(cfg.architecture()).to(device)
    tokens = cfg.batch_size * cfg.max_seq_len
    flops = model.flops_per_token(cfg.max_seq_len)
    peak = peak_flops(cfg) * world()
    say(f"{cfg.folder}: {count_params(model):,} parameters, {cfg.steps} steps of {tokens:,} tokens, "
        f"{world()} x {device.type}")

    def batch_fn(step):
        return corpus.batch(step, cfg.batch_size, cfg.max_seq_len, cfg.seed, rank(), world())

    # The last evaluation is the run's result.
    final = {}

    def evaluate():
        final.update(evaluate_bpb(model, corpus, cfg))
        return dict(val_bpb=final["val_bpb"], val_loss=final["val_loss"])

    def describe(record, batch):
        # The bits per byte of this batch are approximate: the loss also counts the targets without bytes, and the bytes
        # are those of this rank alone. mfu says how busy the GPU was.
        _, y = batch
        size = corpus.token_bytes[y].sum().item()
        more = dict(bpb=bits_per_byte(record["loss"] * y.numel(), max(1, size)))
        if peak:
            more["mfu"] = tokens * flops / record["step_seconds"] / peak
        return more

    # Train, then measure what has come out.
    history = fit(model, batch_fn, cfg, cfg.folder, evaluate, describe)
    model.eval()
    if not final:
        evaluate()  # the run was resumed from its very last checkpoint
    precision = "bfloat16" if uses_bf16(cfg) else "float32"
    measurements = dict(config=asdict(cfg), data_sha256=cfg.data_sha256, precision=precision)
    measurements.update(final)
    measurements.update(measure_costs(model, corpus, cfg, history))
    return measurements


def headline(result: dict) -> str:
    """The main number of a run."""
    return f"{result['val_bpb']:.4f} bits per byte"


def show_run(cfg: RunConfig, m: dict) -> None:
    """What a newcomer wants to know of a finished run: loss.png, and the main numbers of its result m."""
    if rank() > 0:
        return
    log = (cfg.folder / "log.jsonl").read_text()
    plot_losses([json.loads(line) for line in log.splitlines()], cfg.folder / "loss.png")
    total_flops = m["flops_per_token"] * m["train_tokens"]
    where = " of GPU memory" if m["peak_vram_mib"] else ""
    print()
    print(f"  validation        {m['val_bpb']:.4f} bits per byte ({m['val_loss']:.4f} nats a token)")
    print(f"  parameters        {m['total_params']:,} ({m['memory_params']:+,} against memory=none)")
    print(f"  training FLOPs    {m['flops_per_token']:,.0f} a token, {total_flops:.3g} in all")
    print(f"  state             {m['state_bytes']:,} bytes after {cfg.max_seq_len} tokens of one sequence")
    print(f"  speed             {m['tokens_per_second']:,.0f} tokens/s in a median step; {m['total_time_min']:.1f} "
          "minutes in all")
    print(f"  peak memory       {peak_mib(m):,.0f} MiB{where}")
    print(f"  files             {cfg.folder}/result.json, log.jsonl, loss.png, ckpt.pt")
    print()
    if m["sample"]:
        print(f"A sample:\n{m['sample']}\n", flush=True)


def swept_settings(configs: list[RunConfig]) -> list[str]:
    """The settings that differ in a sweep and have a column of their own in its table."""
    # Seeds are averaged over; the others are in the condition's name.
    without_column = ("seed", "name", "memory", "window", "memory_layers")
    names = [f.name for f in fields(RunConfig) if f.name not in without_column]
    return [name for name in names if len({getattr(cfg, name) for cfg in configs}) > 1]


def sweep_table(results: list[dict], swept: list[str]) -> str:
    """One line for each configuration, its seeds together; swept: the settings that tell them apart."""
    import analyze

    def average(runs, name):
        return mean(r[name] for r in runs)

    # Runs that finished before the corpus changed have read another text, and get a line of their own.
    texts = defaultdict(set)
    for r in results:
        texts[r["config"]["dataset"], r["config"]["tokenizer"]].add(r["data_sha256"])
    if any(len(hashes) > 1 for hashes in texts.values()):
        swept = [*swept, "data_sha256"]

    cells = defaultdict(list)
    for r in results:
        others = [str(r["config"][name]) for name in swept]
        cells[analyze.condition(r["config"]), *others].append(r)
    head = ["condition", *swept, "val bpb", "std", "seeds", "parameters", "FLOPs/token", "state bytes", "tokens/s",
            "minutes", "MiB"]
    rows = []
    for key, runs in sorted(cells.items(), key=lambda cell: average(cell[1], "val_bpb")):
        spread = stdev(r["val_bpb"] for r in runs) if len(runs) > 1 else None
        memory = mean(peak_mib(r) for r in runs)
        rows.append([*key, average(runs, "val_bpb"), spread, len(runs), f"{runs[0]['total_params']:,}",
                     f"{runs[0]['flops_per_token']:.3g}", f"{runs[0]['state_bytes']:,}",
                     f"{average(runs, 'tokens_per_second'):,.0f}", f"{average(runs, 'total_time_min'):.1f}",
                     f"{memory:,.0f}"])
    return analyze.table(head, rows, left=1 + len(swept))


def parse_args(argv: list[str]) -> list[RunConfig]:
    """The command line -> every run, named. Defaults < preset < flags; commas make a grid."""
    # --help shows the defaults of the preset that is asked for, as --preset=d12 or as --preset d12.
    words = " ".join(argv).replace("--preset ", "--preset=").split()
    asked = [word.removeprefix("--preset=") for word in words if word.startswith("--preset=")]
    shown = preset_config(asked[0] if asked and asked[0] in PRESETS else "laptop")
    flags, _ = read_flags(RunConfig, argv, usage="train.py [--key=value ...]",
                          description=__doc__.split("\n\nA run")[0], shown=shown)
    # Every point of the grid is a configuration, and gets its name.
    configs = [preset_config(**settings) for settings in sweep_points(RunConfig, flags)]
    configs = [replace(cfg, name=cfg.name or run_name(cfg)) for cfg in configs]
    names = {cfg.name for cfg in configs}
    longest = max(names, key=len)
    if len(longest.encode()) > 200:
        raise UserError(f"--name: {len(longest.encode())} bytes were given, at most 200 make the name of a folder; "
                        "shorten it")
    if len(names) < len(configs):
        raise UserError(f"the sweep has {len(configs)} runs but only {len(names)} names, such as {configs[0].name}; "
                        "leave --name out, give each value once, and sweep no setting of the group run")
    return configs


def note_unused(configs: list[RunConfig]) -> None:
    """Names the given flags that no run of the sweep reads, and goes on."""
    unused = set(unused_options(configs[0]))
    for cfg in configs:
        unused &= set(unused_options(cfg))
    if all(cfg.schedule == "cosine" for cfg in configs):
        unused.add("warmdown")
    for name in sorted(unused):
        if any(getattr(cfg, name) != getattr(cfg.usual(), name) for cfg in configs):
            say(f"note: --{name} changes nothing, because nothing here reads it")


def start_processes(cfg: RunConfig) -> None:
    """Joins the processes that torchrun started."""
    if "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE is {world()}, but no MASTER_ADDR says where the other processes are; start "
                        "train.py with torchrun, or unset WORLD_SIZE")
    # Hours, because in a barrier the ranks wait for the one that downloads and tokenises the data.
    timeout = timedelta(hours=4)
    device = pick_device(cfg)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0, 2 after bad input, 128 + the signal's number after SIGINT or SIGTERM"""
    argv = sys.argv[1:] if argv is None else argv
    status = 0
    try:
        configs = parse_args(argv)
        note_unused(configs)
        if world() > 1:
            start_processes(configs[0])
        results, diverged = run_all(configs, train, headline, show=show_run)
        if len(configs) > 1 and results:
            say(sweep_table(results, swept_settings(configs)))
        check_diverged(diverged, len(configs))
    except Stopped as e:
        number, text = e.args
        launcher = "torchrun ..." if world() > 1 else "python"
        say(f"\n{text}\nthe same command goes on from there: {launcher} train.py {shlex.join(argv)}")
        status = 128 + number
    except KeyboardInterrupt:
        # It came while the corpus was made or the result was measured, and fit was not listening.
        say("\ninterrupted; the same command goes on from what was saved")
        return 128 + signal.SIGINT
    except UserError as e:
        # Usually all ranks fail alike. Then rank 0 prints, and torchrun ends the others while they sleep. A rank that
        # wakes up has an error of its own, and prints it.
        if rank() > 0:
            time.sleep(10)
        print(f"error: {e}", file=sys.stderr)
        return 2
    # Not after an error: other ranks may still wait in a collective, and NCCL would wait here for them.
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
