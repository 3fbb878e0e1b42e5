"""Everything that is measured on a trained checkpoint, of every memory alike: the model is only ever asked by `stream`.

    python eval.py out/<run> [more runs] [--task=bpb,position,...] [--key=value ...]

Tasks (each prints a table and writes out/<run>/eval_<task>.json; a picture of several runs goes to the first one)
    bpb         bits per byte on the validation rows: the number that training ends with
    position    the same by position in the row and by position in the document
    extend      bits per byte on rows of up to 16 times the training length; spans hold different text, so that one
                span of several runs compares, and several spans of one run do not
    niah        needle in a haystack: a 6-digit key hidden at some depth in some length of validation text
    ood         loss by position on another corpus (Memory Mosaics, figure 10)
    attention   what the last position attends to, per head, at 1x and 3x the training length (its figures 12, 13, 15);
                of knn the attention to its window alone
    generate    continuations of the 24 prompts of its table 1, or of any --prompt
    speed       prefill, ms a token, state bytes and peak memory against context length

Glossary
    row, document   a row is what the model reads as one sequence; it holds one document or several (see data.py)
    bucket          neighbouring positions taken together. Nats and bytes are summed before they are divided, bpb =
                    Σnats/(ln2·Σbytes), so that the buckets recombine to the total
    piece           tokens read by one call of `stream`: only the state grows with the length of a row
    reached, limit  how far a row could be read, and what ended it: out of memory, or no more learned positions
    margin          log p(key) - log p(wrong key) in nats

Reading order: options, opening runs, reading through the state, files and tables, then a section a task, main.

References: needle in a haystack: Kamradt 2023, github.com/gkamradt/LLMTest_NeedleInAHaystack; Memory Mosaics: Zhang et
al. 2024, 2405.06394; prompts: Eldan & Li 2023, 2305.07759. The palette is Okabe and Ito's.
"""
import argparse
import ctypes
import difflib
import hashlib
import json
import math
import re
import sys
import textwrap
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import UserError, encode, replacing
from model import (EXP_SPEEDUP, GPT, MEMORIES, Attention, Block, ContextualMemory, extend,
                   option, rotary, state_bytes)
from train import (Parser, RunConfig, autocast, checked, evaluate_bpb, fill_in, load_corpus, load_run, parse_value,
                   peak_memory_mib, pick_device, reset_peak_memory)


# ----------------------------------------------------------------------------------------------------------------------
# Options

@dataclass
class Options:
    task: str = option("all", "which ones, with commas; all: ood only with a --dataset", "every task")
    device: str = option("auto", "auto = cuda where there is one", "every task", ("auto", "cpu", "cuda"))
    piece: int = option(0, "tokens read by one call of stream; 0 = the training length", "every task")
    seed: int = option(1, "of keys, sampling and untrained weights", "niah, generate, speed")
    tokens: int = option(0, "validation tokens; 0 = as many as in training", "bpb, position, ood")
    length: int = option(0, "tokens of a row; 0 = the training length", "position, ood")
    bucket: int = option(64, "positions taken together (ood: a quarter of it)", "position, extend, ood", low=4)
    factor: int = option(16, "the longest rows, in training lengths", "extend", low=1)
    rows: int = option(8, "rows to read", "extend", low=1)
    lengths: str = option("", "tokens, with commas; by default 1/2, 1, 2 and 4 training lengths", "niah")
    depths: str = option("0,0.25,0.5,0.75,1", "of the needle: 0 at the start, 1 right before the question", "niah")
    pairs: int = option(8, "pairs of keys asked for at each length and depth", "niah", low=2)
    needle: str = option("\nThe secret key is {key}.\n", "the needle; up to {key} it is also the question", "niah")
    dataset: str = option("", "the other corpus, a name or a path; simplewiki if empty", "ood")
    sequences: int = option(64, "rows to average (the paper: 5000)", "attention", low=1)
    prompt: tuple = option((), "a prompt of your own; may be given several times", "generate")
    new_tokens: int = option(60, "tokens to write", "generate", low=1)
    temperature: float = option(0.0, "0 takes the likeliest token", "generate")
    top_k: int = option(0, "sample from so many tokens; 0 = from all", "generate")
    memory: str = option("", "untrained models of the run's shape to compare with: names with commas, or all", "speed")
    context: int = option(65536, "the longest context in tokens", "speed", low=1)
    decode: int = option(32, "tokens read one by one at each length; the median counts", "speed", low=1)


def nearest(word: str, known, otherwise: str = "--help lists what there is") -> str:
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else f"; {otherwise}"


def parse_args(argv: list[str]) -> tuple[list[str], list[str], Options]:
    """-> run folders, task names, options"""
    parser = Parser(prog="eval.py", usage="eval.py out/<run> [more runs] [--task=bpb,niah,...] [--key=value ...]",
                    description=__doc__.split("\n\nGlossary")[0], allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders that train.py wrote")
    kinds = {f.name: f.type.__name__ for f in fields(Options)}
    for f in fields(Options):
        text = f"{f.metadata['group']}: {f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
        several = kinds[f.name] == "tuple"
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, action="append" if several else "store",
                            metavar="TEXT" if several else kinds[f.name].upper(), help=text)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}" + nearest(unknown[0].split("=")[0], [f"--{k}" for k in kinds]))
    given, opts = vars(given), Options()
    runs = given.pop("runs")
    for name, text in given.items():
        known = Options.__dataclass_fields__[name].metadata
        value = tuple(text) if kinds[name] == "tuple" else parse_value(Options, name, text)
        if known["choices"] and value not in known["choices"]:
            raise UserError(f"--{name}={value}: expected one of {', '.join(known['choices'])}")
        if isinstance(value, (int, float)) and not known["low"] <= value < math.inf:
            raise UserError(f"--{name}={value}: expected a finite number from {known['low']}")
        setattr(opts, name, value)
    tasks = [t for t in TASKS if t != "ood" or opts.dataset] if opts.task == "all" else opts.task.split(",")
    for name in tasks:
        if name not in TASKS:
            raise UserError(f"there is no task {name!r}, expected one of {', '.join(TASKS)}" + nearest(name, TASKS))
    if not runs:
        raise UserError("no run was given; give a folder that train.py wrote, such as out/laptop-none-s1")
    return runs, tasks, opts


def numbers(name: str, text: str, kind: str, low, high) -> list:
    """A list with commas, such as 0,0.5,1"""
    try:
        values = [dict(int=int, float=float)[kind](part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--{name}={text}: expected numbers") from None
    if not all(low <= v <= high for v in values):
        raise UserError(f"--{name}={text}: expected numbers from {low} to {high}")
    return values


# ----------------------------------------------------------------------------------------------------------------------
# Opening runs

class Run(NamedTuple):
    folder: Path
    label: str         # short, for tables and pictures
    model: GPT
    cfg: RunConfig

    def rows_at_once(self) -> int:
        """As many as in training, so that they fit."""
        return min(self.cfg.device_batch_size or self.cfg.batch_size, self.cfg.batch_size)

    def corpus(self):
        corpus = load_corpus(self.cfg.dataset, self.cfg.tokenizer)
        fill_in(self.cfg, corpus)                               # raises if it is not the data of the training
        return corpus


def open_runs(paths: list[str], opts: Options) -> list[Run]:
    loaded = []
    for path in map(Path, dict.fromkeys(paths)):                # one run may match two patterns of a shell
        if not path.exists():
            known = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"there is no {path}" + nearest(str(path), known, "give a folder that train.py wrote"))
        model, cfg, _ = load_run(path)
        # what was trained in bfloat16 can be read on a CPU too
        cfg = replace(cfg, device=opts.device, dtype="float32" if cfg.dtype == "float32" else "auto")
        loaded.append((path if path.is_dir() else path.parent, model.to(pick_device(cfg)), cfg))
    labels = [label_of(cfg, [c for *_, c in loaded if c.memory == cfg.memory]) for *_, cfg in loaded]
    if len(set(labels)) < len(labels):
        labels = [folder.name for folder, *_ in loaded]
    return [Run(folder, label, model, cfg) for label, (folder, model, cfg) in zip(labels, loaded)]


def label_of(cfg: RunConfig, alike: list[RunConfig]) -> str:
    """The memory, and the settings in which its runs differ: "none SSSL", "rmt rmt_tokens=0", "knn s2"."""
    differ = [f.name for f in fields(cfg) if f.metadata.get("group") != "run" and f.name != "data_sha256"
              and len({getattr(c, f.name) for c in alike}) > 1]
    parts = [f"{name}=" * (name != "window") + str(getattr(cfg, name)) for name in differ if name != "seed"]
    return " ".join([cfg.memory, *parts] + [f"s{cfg.seed}"] * ("seed" in differ))


# ----------------------------------------------------------------------------------------------------------------------
# Reading through the state

FAILURES = (MemoryError, RuntimeError, ValueError)              # what limit() is to judge
OUT_OF_MEMORY = "out of memory"


def limit(e: Exception) -> str:
    """What the machine or the model can't do, in words; any other failure is an error and goes on."""
    allocator = re.search("out of memory|can't allocate memory|not enough memory", str(e))
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or isinstance(e, RuntimeError) and allocator:
        return OUT_OF_MEMORY
    if isinstance(e, ValueError) and "learned positions" in str(e):
        return str(e)
    raise e


@contextmanager
def memory_ceiling(device):
    """On a CPU Linux kills the process that takes too much memory; below this ceiling that is an exception instead."""
    status, info = Path("/proc/self/status"), Path("/proc/meminfo")
    if device.type == "cuda" or not (status.exists() and info.exists()):
        yield
        return
    import resource                                             # not on Windows
    used, free = (int(re.search(name + r":\s*(\d+)", path.read_text())[1]) * 1024
                  for name, path in (("VmData", status), ("MemAvailable", info)))
    old = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (min([used + free] + [x for x in old if x >= 0]), old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, old)


@torch.no_grad()
def read(run: Run, x: Tensor, piece: int = 0, state=None):
    """Streams x (rows,T) piece by piece -> where the piece begins, its logits in float32, the state after it."""
    device, piece = pick_device(run.cfg), piece or run.cfg.max_seq_len
    for a in range(0, x.size(1), piece):
        with autocast(run.cfg):
            logits, state = run.model.stream(x[:, a:a + piece].to(device), state)
        yield a, logits.float(), state


def by_halves(f, *rows: Tensor) -> Tensor:
    """f(*rows), on half of the rows at a time where all are too many: a limit is to be that of a single sequence."""
    try:
        return f(*rows)
    except FAILURES as e:
        if limit(e) != OUT_OF_MEMORY or len(rows[0]) == 1:
            raise
    return torch.cat([by_halves(f, *half) for half in zip(*(r.chunk(2) for r in rows))])


UNREAD = -1.0                                                   # nats are never negative


def row_nats(run: Run, x: Tensor, y: Tensor, piece: int, limits: list) -> Tensor:
    """Nats of each target, (rows,T); UNREAD from where the rows can't be read on, and why in limits."""
    nats = torch.full(y.shape, UNREAD, dtype=torch.float64)
    try:
        for a, logits, _ in read(run, x, piece):
            target = y[:, a:a + logits.size(1)].to(logits.device)
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            nats[:, a:a + logits.size(1)] = loss.view(target.shape).cpu()
    except FAILURES as e:
        if limit(e) == OUT_OF_MEMORY and len(x) > 1:
            raise
        limits.append(limit(e))
    return nats


def bpb(sums: Tensor) -> float | None:
    """sums (3,...) of nats, bytes and targets"""
    nats, size, _ = sums.reshape(3, -1).sum(1).tolist()
    return nats / (math.log(2) * size) if size else None


def buckets(sums: Tensor, width: int) -> dict:
    """Sums by position (3,T) -> by bucket, in the form of result.json"""
    parts = F.pad(sums, (0, -sums.size(1) % width)).view(3, -1, width)
    nats, size, targets = parts.sum(-1).tolist()
    return dict(bucket=width, positions=list(range(0, sums.size(1), width)), nats=nats, bytes=size, targets=targets,
                bpb=[bpb(part) for part in parts.unbind(1)], loss=[n / t if t else None for n, t in zip(nats, targets)])


def add_tokens(digest, x: Tensor, y: Tensor) -> None:
    digest.update(torch.cat([x, y[:, -1:]], 1).to(torch.int32).numpy().tobytes())


def has_rows(corpus, length: int) -> bool:
    try:
        return corpus.n_rows(length, "val") > 0
    except UserError:
        return False


def measure(run: Run, corpus, length: int, tokens: int, bucket: int, piece: int) -> tuple[dict, Tensor]:
    """Bits per byte on validation rows -> result, sums (2,3,length) by position in the row and in the document.

    A position is the number of tokens read after the first: of the row, or of the target's own document in that row.
    """
    sums, digest, limits = torch.zeros(2, 3, length, dtype=torch.float64), hashlib.sha256(), []
    rows, reached = max(1, run.rows_at_once() * run.cfg.max_seq_len // length), length
    for x, y, doc_pos in corpus.eval_batches(length, rows, tokens or None):
        add_tokens(digest, x, y)
        nats = by_halves(lambda x, y: row_nats(run, x, y, piece, limits), x, y)
        unread, size = nats == UNREAD, corpus.token_bytes[y]
        reached = min([reached, *unread.any(0).nonzero().flatten().tolist()])
        values = torch.stack([nats * (size > 0), size.double(), (size > 0).double()])   # end of text is not scored
        values[:, unread] = 0
        sums[0] += values.sum(1)
        sums[1].index_add_(1, (doc_pos - 1).clamp(min=0).flatten(), values.flatten(1))
    nats, _, targets = sums[0].sum(-1).tolist()
    result = dict(tokens_sha256=digest.hexdigest(), length=length, reached=reached, limit=limits[0] if limits else None,
                  val_bpb=bpb(sums[0]), val_loss=nats / targets if targets else None,
                  bpb_by_position=buckets(sums[0], bucket), bpb_by_document_position=buckets(sums[1], bucket))
    return result, sums


# ----------------------------------------------------------------------------------------------------------------------
# Files, tables, pictures

LOOKS = {"none": ("#000000", "o"), "global": ("#7f7f7f", "s"), "persistent": ("#0072B2", "^"), "rmt": ("#D55E00", "v"),
         "ttt": ("#009E73", "D"), "deltanet": ("#CC79A7", "P"), "knn": ("#E69F00", "X"), "mosaic": ("#56B4E9", "p")}


def plain(x):
    """What JSON can hold: tensors as lists, null for a number that is not finite."""
    return json.loads(json.dumps(x, default=Tensor.tolist), parse_constant=lambda name: None)


def save(run: Run, task: str, result: dict) -> None:
    names = "name memory window seed max_seq_len dataset tokenizer data_sha256".split()
    device = pick_device(run.cfg)
    device = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    content = {name: getattr(run.cfg, name) for name in names} | dict(task=task, device=device) | result
    with replacing(run.folder / f"eval_{task}.json") as f:
        f.write(json.dumps(plain(content), indent=1, allow_nan=False).encode())


def table(head: list, lines: list[list]) -> None:
    text = lambda c: "-" if c is None else f"{c:.4f}" if isinstance(c, float) else str(c)
    lines = [head] + [[text(c) for c in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *rest in lines:
        print("  ".join([first.ljust(widths[0])] + [c.rjust(w) for c, w in zip(rest, widths[1:])]))


def same_tokens(results: list[dict]) -> None:
    if len({r["tokens_sha256"] for r in results}) > 1:
        print("note: these runs were measured on different tokens (tokens_sha256), so their numbers don't compare")


def looks(runs) -> list[dict]:
    """Colour and marker by memory, dashes for several runs of one; hollow, so that coinciding curves are all seen."""
    seen, out = Counter(), []
    for cfg in (run.cfg for run in runs):
        name = "global" if cfg.memory == "none" and set(cfg.window) == {"L"} else cfg.memory
        colour, marker = LOOKS.get(name, ("#994F00", "h"))
        dashes = ("-", "--", ":", "-.")[seen[name] % 4]
        out.append(dict(color=colour, marker=marker, ls=dashes, lw=1.5, ms=7, mfc="none"))
        seen[name] += 1
    return out


def panels(rows: int, cols: int, size: tuple):
    import matplotlib                                           # here, because it takes half a second to import
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(rows, cols, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def picture(run: Run, task: str, figure) -> None:
    import matplotlib.pyplot as plt
    path = run.folder / f"eval_{task}.png"
    with replacing(path) as f:
        figure.savefig(f, format="png", dpi=110)
    plt.close(figure)
    print(f"-> {path}")


# ----------------------------------------------------------------------------------------------------------------------
# bpb, position, extend, ood

CURVES = {"row": "bpb_by_position", "document": "bpb_by_document_position"}


def position_table(runs, results, where: str) -> None:
    curves = [dict(zip(r[CURVES[where]]["positions"], r[CURVES[where]]["bpb"])) for r in results]
    lines = [[p] + [c.get(p) for c in curves] for p in sorted(set().union(*curves))]
    lines += [["all"] + [r["val_bpb"] for r in results]]
    table([f"position in the {where}"] + [run.label for run in runs], lines)


def position_picture(task, runs, results, most=32):
    """Both curves, in at most so many points. The longest documents are few: where they end is noise, and not drawn."""
    figure, axes = panels(1, 2, (9.5, 3.8))
    value, label = ("loss", "loss (nats a token)") if task == "ood" else ("bpb", "bits per byte")
    for ax, (where, key) in zip(axes[0], CURVES.items()):
        for run, r, look in zip(runs, results, looks(runs)):
            sums = torch.tensor([r[key][name] for name in ("nats", "bytes", "targets")], dtype=torch.float64)
            b, enough = buckets(sums, -(-sums.size(1) // most)), 0.001 * sums[1].sum()
            points = [((p + b["bucket"] / 2) * r[key]["bucket"], v)
                      for p, v, size in zip(b["positions"], b[value], b["bytes"]) if size > enough]
            ax.plot(*zip(*points), label=run.label, **look)
            if task == "extend":
                ax.axvline(run.cfg.max_seq_len, color="gray", lw=1, ls=":")
        ax.set(xlabel=f"position in the {where} (tokens)", ylabel=label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False,
                  title="dotted: training length" if task == "extend" else None)
    picture(runs[0], task, figure)


def task_bpb(runs, opts):
    """Whole rows, by the function that training uses; `position` gets the same number through the state."""
    results = []
    for run in runs:
        corpus, digest = run.corpus(), hashlib.sha256()
        cfg = replace(run.cfg, eval_tokens=opts.tokens or run.cfg.eval_tokens)
        for x, y, _ in corpus.eval_batches(cfg.max_seq_len, 64, cfg.eval_tokens or None):
            add_tokens(digest, x, y)
        results.append(dict(tokens_sha256=digest.hexdigest(), **evaluate_bpb(run.model, corpus, cfg)))
        save(run, "bpb", results[-1])
    lines = [[run.label, r["val_bpb"], r["val_loss"]] for run, r in zip(runs, results)]
    table(["run", "bits per byte", "nats a token"], lines)
    same_tokens(results)


def task_position(runs, opts):
    results = []
    for run in runs:
        length, tokens = opts.length or run.cfg.max_seq_len, opts.tokens or run.cfg.eval_tokens
        results.append(measure(run, run.corpus(), length, tokens, opts.bucket, opts.piece)[0])
        save(run, "position", results[-1])
    print("bits per byte")
    for where in CURVES:
        position_table(runs, results, where)
    same_tokens(results)
    position_picture("position", runs, results)


def task_extend(runs, opts):
    """One pass over the longest rows measures every shorter context too: the model is causal."""
    results, lines = [], []
    for run in runs:
        corpus, L, factor = run.corpus(), run.cfg.max_seq_len, opts.factor
        while factor > 1 and not has_rows(corpus, factor * L):
            factor -= 1
        if factor < opts.factor:
            print(f"note: {corpus.name} has validation text for rows of {factor}, not {opts.factor} training lengths")
        result, sums = measure(run, corpus, factor * L, opts.rows * factor * L, opts.bucket, opts.piece)
        ends = sorted({L * 2 ** i for i in range(factor.bit_length())} | {factor * L})
        spans = [dict(start=a, end=b, bpb=bpb(sums[0][:, a:b]) if b <= result["reached"] else None)
                 for a, b in zip([0, *ends], ends)]
        results.append(result | dict(spans=spans))
        save(run, "extend", results[-1])
        lines += [[run.label, f"{s['start']}-{s['end']}", f"{s['end'] // L}x", s["bpb"]] for s in spans]
        lines += [[run.label, f"from {result['reached']}", "limit", result["limit"]]] if result["limit"] else []
    table(["run", "tokens", "training length", "bits per byte"], lines)
    same_tokens(results)
    position_picture("extend", runs, results)


def task_ood(runs, opts):
    results, dataset = [], opts.dataset or "simplewiki"
    for run in runs:
        tokenizer = run.cfg.tokenizer
        if tokenizer.startswith("bpe") and "@" not in tokenizer:
            tokenizer += f"@{run.cfg.dataset}"                  # the tokens that the model has learned
        corpus = load_corpus(dataset, tokenizer)
        length, tokens = opts.length or run.cfg.max_seq_len, opts.tokens or run.cfg.eval_tokens
        result, _ = measure(run, corpus, length, tokens, opts.bucket // 4, opts.piece)
        results.append(result | dict(ood_dataset=dataset, ood_sha256=corpus.sha256))
        save(run, "ood", results[-1])
    print(f"bits per byte on {dataset}")
    position_table(runs, results, "row")
    same_tokens(results)
    position_picture("ood", runs, results)


# ----------------------------------------------------------------------------------------------------------------------
# niah: needle in a haystack

def draw_keys(encoding, needle: str, pairs: int, seed: int) -> tuple[list, list, Tensor]:
    """-> the tokens before and after the key, and 2·pairs keys (2·pairs,n) of equally many tokens"""
    before, _, after = needle.partition("{key}")
    space = " " if before.endswith(" ") else ""                 # a space belongs to the token that follows it
    draws = np.random.default_rng(seed).choice(900_000, 40 * pairs, replace=False) + 100_000
    keys = [encode(encoding, f"{space}{number}").tolist() for number in draws]
    n = Counter(map(len, keys)).most_common(1)[0][0]
    before, after = (encode(encoding, part).tolist() for part in (before.removesuffix(" "), after))
    return before, after, torch.tensor([k for k in keys if len(k) == n][:2 * pairs])


def hide(hay: Tensor, depth: float, before: list, after: list, key: Tensor) -> Tensor:
    """hay (T,) with the needle at `depth` and the question at its end; together with the answer it is T tokens long."""
    question = torch.tensor(before)
    needle = torch.cat([question, key, torch.tensor(after, dtype=torch.int64)])
    room = len(hay) - len(needle) - len(question) - len(key)
    at = 1 + round(depth * (room - 1))                          # the end-of-text token that leads a row stays first
    return torch.cat([hay[:at], needle, hay[at:room], question])


def ask(run: Run, piece: int, prompt: Tensor, key: Tensor, wrong: Tensor) -> Tensor:
    """-> (rows,3): log p of the key, of the wrong key, and whether the likeliest tokens spell the key"""
    for _, logits, state in read(run, prompt, piece):
        pass
    scores = []
    for answer in (key, wrong):                                 # both go on from one state, which nothing changes
        after = [l for _, l, _ in read(run, answer[:, :-1], piece, state)]
        logp = torch.cat([logits[:, -1:], *after], 1).log_softmax(-1)                   # (rows,n,vocab)
        target = answer.to(logp.device)
        scores.append(logp.gather(-1, target[..., None]).double().sum((1, 2)))
        if answer is key:
            exact = (logp.argmax(-1) == target).all(1).double()
    return torch.stack([*scores, exact], 1).cpu()


def niah_cell(run: Run, corpus, length: int, depth: float, opts: Options) -> dict:
    """Keys come in pairs: both are hidden in the same text, each is the other's wrong key, and their margins are
    averaged. So a model that remembers nothing has a margin of 0, whichever number it prefers."""
    before, after, keys = draw_keys(corpus.encoding, opts.needle, opts.pairs, opts.seed)
    if length < 2 * (len(before) + keys.size(1)) + len(after) + 1:
        return dict(length=length, depth=depth, limit="needle does not fit")
    if not has_rows(corpus, length):
        return dict(length=length, depth=depth, limit="too little validation text")
    wrong = keys.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    hay = torch.cat([x for x, *_ in corpus.eval_batches(length, opts.pairs, opts.pairs * length)])
    hay = hay[torch.arange(len(keys)) // 2 % len(hay)]          # where text is short, a row serves several pairs
    prompt = torch.stack([hide(row, depth, before, after, key) for row, key in zip(hay, keys)])
    batches = zip(*(t.split(run.rows_at_once()) for t in (prompt, keys, wrong)))
    try:
        scores = torch.cat([by_halves(lambda *rows: ask(run, opts.piece, *rows), *batch) for batch in batches])
    except FAILURES as e:
        return dict(length=length, depth=depth, limit=limit(e))
    margins = (scores[:, 0] - scores[:, 1]).view(-1, 2).mean(1)                         # (pairs,)
    return dict(length=length, depth=depth, exact=scores[:, 2].mean(), margin=margins.mean(), margins=margins,
                margin_error=margins.std() / len(margins) ** 0.5, log_p_key=scores[:, 0].mean())


def task_niah(runs, opts):
    depths = numbers("depths", opts.depths, "float", 0, 1)
    if "{key}" not in opts.needle or not opts.needle.partition("{key}")[0].strip():
        raise UserError(f"--needle={opts.needle!r}: expected text, then {{key}} where the key goes")
    results = []
    for run in runs:
        L, corpus = run.cfg.max_seq_len, run.corpus()
        lengths = numbers("lengths", opts.lengths, "int", 1, 10 ** 9) if opts.lengths else [L // 2, L, 2 * L, 4 * L]
        cells = [plain(niah_cell(run, corpus, length, depth, opts)) for length in lengths for depth in depths]
        results.append(dict(needle=opts.needle, keys_seed=opts.seed, lengths=lengths, depths=depths, cells=cells))
        save(run, "niah", results[-1])
        print(f"{run.label}: margin in nats ± standard error of {opts.pairs} pairs, exact match; trained at {L} tokens")
        text = [c["limit"][:20] if "limit" in c else "not finite" if c["margin"] is None else
                f"{c['margin']:+.2f} ±{c['margin_error']:.2f} {c['exact']:4.0%}" for c in cells]
        table(["tokens \\ depth"] + [f"{d:g}" for d in depths],
              [[n, *text[i * len(depths):(i + 1) * len(depths)]] for i, n in enumerate(lengths)])
    niah_picture(runs, results, opts.pairs)


def niah_picture(runs, results, pairs):
    cols, rows = min(3, len(runs)), -(-len(runs) // 3)
    height = (1 + 0.5 * max(len(r["lengths"]) for r in results)) * rows + 0.4
    figure, axes = panels(rows, cols, (1.2 + 3.6 * cols, height))
    margins = [np.array([c.get("margin") for c in r["cells"]], float) for r in results]             # None becomes nan
    top = np.nanmax(np.abs(np.concatenate(margins + [[1.0]])))    # at least a nat, so that noise stays pale
    for ax in axes.flat[len(runs):]:
        ax.set_visible(False)
    for ax, run, r, margin in zip(axes.flat, runs, results, margins):
        ns, ds = r["lengths"], r["depths"]
        image = ax.imshow(margin.reshape(len(ns), len(ds)), cmap="PuOr", vmin=-top, vmax=top, aspect="auto")
        for i, c in enumerate(r["cells"]):
            text = "limit" if "limit" in c else f"{round(margin[i], 1) + 0:+.1f}\n{c['exact']:.0%}"
            ax.text(i % len(ds), i // len(ds), text, ha="center", va="center", fontsize=8,
                    color="white" if abs(margin[i]) > 0.6 * top else "black")
        ax.set(xticks=range(len(ds)), xticklabels=[f"{d:g}" for d in ds], xlabel="depth (share of the text)",
               yticks=range(len(ns)), yticklabels=[f"{n:,}{'*' * (n == run.cfg.max_seq_len)}" for n in ns],
               title=run.label)
        ax.grid(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("length (tokens; * trained)")
    figure.colorbar(image, ax=axes, label="margin (nats)")
    figure.suptitle(f"margin in nats, exact match in %, over {pairs} pairs of keys", fontsize=10)
    picture(runs[0], "niah", figure)


# ----------------------------------------------------------------------------------------------------------------------
# attention: what the last position looks at (figures 12, 13 and 15)

def last_attended(layer, T: int, rmt: bool, x: Tensor, state, ve) -> tuple[Tensor, Tensor]:
    """Where the layer looks from position T-1, out of what it is given there: x (B,1,C) and all that it remembers.

    -> attention to what has no position, learned slots and rmt's read memory (B,H), and to each token (B,H,T); together
    they sum to one.
    """
    if isinstance(layer, ContextualMemory):
        k, _ = layer.key(x, state.k_bar)
        w = (k.double() @ state.k.double().mT).softmax(-1)[:, :, 0]     # (B,H,T-1) strict past; keys carry the scale
        return w.new_zeros(w.shape[:2]), F.pad(w, (0, 1))
    q, k, _ = layer.project(x, ve)
    state = getattr(state, "local", state)                      # of knn's two parts the window
    if layer.theta:
        q, k = (rotary(t, state.pos[None].to(t.device), layer.theta) for t in (q, k))
    k, _, n_free = layer.with_slots(extend(state.k, k), extend(state.v, k))
    k = k.repeat_interleave(layer.H // layer.Hkv, 1)
    score = q.double() @ k.double().mT * layer.D ** -0.5        # (B,H,1,keys), float64: autocast leaves that alone
    if layer.slopes is not None:
        j = torch.arange(k.size(2), device=k.device)
        score = score - layer.slopes[:, None, None] * torch.where(j < n_free, 0, k.size(2) - 1 - j)
    w = score.softmax(-1)[:, :, 0]
    m = n_free if rmt else n_free - layer.n_free                # other free keys are the sequence's first tokens
    positions = torch.arange(T - w.size(-1) + m, T)
    if len(positions) < T and not rmt:
        positions[:layer.n_free] = torch.arange(layer.n_free)
    tokens = w.new_zeros(*w.shape[:2], T)
    tokens[..., positions] = w[..., m:]
    return w[..., :m].sum(-1), tokens


def attention_at(run: Run, x: Tensor, piece: int) -> dict[int, tuple[Tensor, Tensor]]:
    """layer -> attention to memory (H,) and to tokens (H,T), summed over the rows of x (B,T). All but the last token
    are read, then that one alone, while a hook looks at what every attention layer is given."""
    out, state = {}, None
    for _, _, state in read(run, x[:, :-1], piece):
        pass

    def look(i, layer, given):
        out[i] = tuple(t.sum(0).cpu() for t in last_attended(layer, x.size(1), run.cfg.memory == "rmt", *given))

    hooks = [mixer.register_forward_pre_hook(partial(look, i)) for i, mixer in attention_layers(run)]
    try:
        list(read(run, x[:, -1:], piece, state))
    finally:
        for h in hooks:
            h.remove()
    return out


def attention_layers(run: Run) -> list:
    mixers = enumerate(block.mixer for block in run.model.modules() if isinstance(block, Block))
    return [(i, mixer) for i, mixer in mixers if isinstance(mixer, (Attention, ContextualMemory))]


RECENT = 16


def task_attention(runs, opts):
    for run in runs:
        corpus, L, found, limits = run.corpus(), run.cfg.max_seq_len, [], {}
        leaks = {i: torch.exp(-EXP_SPEEDUP * m.key.leak.detach().abs()).cpu() for i, m in attention_layers(run)
                 if hasattr(m, "key")}                          # λ
        for length in (L, 3 * L):
            total, n = {}, 0
            try:
                rows = max(1, run.rows_at_once() * L // length)
                for x, *_ in corpus.eval_batches(length, rows, opts.sequences * length):
                    for i, sums in attention_at(run, x, opts.piece).items():
                        total[i] = [a + b for a, b in zip(total.get(i, (0, 0)), sums)]
                    n += len(x)
                found += [dict(layer=i, length=length, sequences=n, leak=leaks.get(i), memory=memory / n,
                               profile=profile / n) for i, (memory, profile) in total.items()]
            except FAILURES as e:
                limits[length] = limit(e)
                print(f"{run.label} at {length} tokens: {limits[length]}")
        save(run, "attention", dict(layers=found, limits=limits))
        if not found:
            print(f"{run.label}: no layer of it attends" if not limits else f"{run.label}: nothing to show")
            continue
        print(f"{run.label}: share of the last position's attention, mean of heads and {found[0]['sequences']} rows")
        table(["layer", "tokens", "memory", "first token", f"last {RECENT} tokens", "leaky λ, least and most"],
              [[f["layer"], f["length"], f["memory"].mean().item(), f["profile"][:, 0].mean().item(),
                f["profile"][:, -RECENT:].sum(-1).mean().item(),
                None if f["leak"] is None else f"{f['leak'].min():.3f} {f['leak'].max():.3f}"] for f in found])
        attention_picture(run, found)


def attention_picture(run, found):
    """A row a layer (at most four of them), a column a length; for layers of the mosaic also λ and recent attention."""
    from matplotlib import colormaps
    layers, lengths = (sorted({f[name] for f in found}) for name in ("layer", "length"))
    layers = sorted({layers[round(i * (len(layers) - 1) / 3)] for i in range(4)})
    mosaic = any(f["leak"] is not None for f in found)
    rows, cols = len(layers), len(lengths) + mosaic
    figure, axes = panels(rows, cols, (1 + 3.8 * cols, 0.6 + 2.6 * rows))
    for f in (f for f in found if f["layer"] in layers):
        row, (heads, T), leaky = axes[layers.index(f["layer"])], f["profile"].shape, f["leak"] is not None
        ax, shade = row[lengths.index(f["length"])], f["leak"] if leaky else torch.arange(heads) / heads
        colours = [colormaps["viridis"](0.9 * s) for s in shade.tolist()]
        width = max(1, T // 96)                                 # neighbouring positions are averaged for the eye
        shown = f["profile"][:, T % width:].view(heads, -1, width).mean(-1)
        shown[shown == 0] = math.nan                            # out of the window: no point
        for h, memory in enumerate(f["memory"].tolist()):
            label = f"λ = {shade[h]:.2f}" if leaky else f"head {h}" + f", memory {memory:.0%}" * (memory > 0)
            middle = T % width + (torch.arange(shown.size(1)) + 0.5) * width
            ax.plot(middle, shown[h], lw=1.1, color=colours[h], label=label)
        ax.axhline(1 / T, color="black", lw=1, ls=":")
        ax.set(yscale="log", xlim=(0, T), ylim=(0.01 / T, 1), xlabel="position attended to (tokens)",
               ylabel="attention (share)",
               title=f"layer {f['layer']}, {T:,} tokens{' (trained)' * (T == run.cfg.max_seq_len)}")
        if f["length"] == lengths[0]:
            ax.legend(fontsize=7, frameon=False, ncols=4 if leaky else 2, loc="upper left")
            row[-1].set_visible(leaky or not mosaic)            # a hybrid's layers of attention have no λ
        if leaky and f["length"] == lengths[0]:
            row[-1].scatter(f["leak"], f["profile"][:, -RECENT:].sum(-1), c=colours, s=45)
            row[-1].set(xlabel="leaky coefficient λ of a head", ylabel=f"last {RECENT} tokens (share)",
                        xlim=(-0.02, 1.02), ylim=(0, 1))
    figure.suptitle(f"{run.label}: attention of the last position (dotted: all tokens alike)", fontsize=11)
    picture(run, "attention", figure)


# ----------------------------------------------------------------------------------------------------------------------
# generate

TABLE_1 = """Alice was so tired when she got back home so she went | Jack and Lily saw a rainbow after a rainy day.
They were amazed by the colors. Jack said, “Look, Lily. A rainbow has | Jack and Lily liked to watch the moon at
night. They noticed that the moon changed its shape every night. Sometimes the moon was big and round, and sometimes
it was | Jack wanted to read a book, so he went to | “Can cows fly?”, Alice asked her mother | “What do birds like
to eat?”, Tom asked his mother. | “What language do they speak in France?”, Tom asked his mother | If I throw a ball
up in the air, eventually it will | It was winter and cold outside so his mother told him, “You should | Lily likes
cats and dogs. She asked her mom for a dog and her mom said no, so instead she asked | Jack told Mary, ”If you give
me your banana, I’ll give you my apple”. Mary gave Jack her banana so | On weekends Jack went to visit his
grandmother whereas on weekdays he would go to school. Last weekend, when Jack was on his way to | Lily and Ben were
having an argument. Ben said that cake is much better than ice cream and Lily said that | Lily and Ben are having an
argument. They are trying to decide between the park and the swimming pool. Ben says, “I want to go to the park”.
Lily says | Jack’s mother was not home, and his father was at home. When Jack came home, he said hello to | Lily
doesn’t like swimming. When her father wants to take her to the swimming pool, she says | Both Ben and Lily wanted
cake. Father said that there was only one piece of cake left. They | Ben went to visit Lily in her house, but she
was not at home. Ben knocked on the door, | “Hi Jane, have you seen Alice? I can’t find her anywhere”, said Jack. |
Max had two dogs. One was white and the other was black. Max walked up the street and saw a kid with a dog. He told
the kid, “I see you have a brown dog. I also have | Anne had a piece of candy in her left pocket and a piece of
chocolate in her right pocket. Anne’s mom asked her, “Anne, what is that you have in your left pocket?” | Alice had
both an apple and a carrot in her bag. She took the apple out of the bag and gave it to Jack. She reached into the
bag again and took | Alice and Jack walked up the street and met a girl in a red dress. The girl said to them, “Hi,
I’m Jane. What are your names?” | Diva was hungry, and wanted to bake a cake, but she didn’t have any sugar at home,
so she decided to go ask around. She started walking and met a squirrel. She asked the squirrel, “Would you happen"""
PROMPTS = [" ".join(prompt.split()) for prompt in TABLE_1.split("|")]


def continuation(run: Run, corpus, prompt: str, opts: Options) -> str:
    """What the model writes after the prompt, up to an end of text or, where it has them, its last learned position."""
    device = pick_device(run.cfg)
    start = torch.tensor([[corpus.eos, *encode(corpus.encoding, prompt).tolist()]], device=device)
    generator = torch.Generator(device).manual_seed(opts.seed)  # one a prompt: its answer doesn't depend on the others
    n = opts.new_tokens
    if run.cfg.pos == "learned" and run.cfg.memory != "rmt":
        n = max(0, min(n, run.cfg.max_seq_len - start.size(1)))
    with autocast(run.cfg):
        tokens = run.model.generate(start, n, opts.temperature, opts.top_k or None, generator)
    tokens = tokens[0, start.size(1):].tolist()
    tokens = tokens[:tokens.index(corpus.eos)] if corpus.eos in tokens else tokens
    return corpus.encoding.decode([t for t in tokens if t < corpus.vocab_size], errors="replace")


def task_generate(runs, opts):
    prompts, width = opts.prompt or PROMPTS, max(len(run.label) for run in runs) + 4
    texts = [[continuation(run, run.corpus(), prompt, opts) for prompt in prompts] for run in runs]
    for prompt, *answers in zip(prompts, *texts):
        print("\n" + textwrap.fill(prompt, 110))
        for run, text in zip(runs, answers):
            print(textwrap.fill(text.strip() or "(nothing)", 110, initial_indent=f"  {run.label}:".ljust(width),
                                subsequent_indent=" " * width))
    settings = dict(new_tokens=opts.new_tokens, temperature=opts.temperature, top_k=opts.top_k, sampling_seed=opts.seed)
    for run, answers in zip(runs, texts):
        save(run, "generate", settings | dict(texts=[dict(prompt=p, text=t) for p, t in zip(prompts, answers)]))


# ----------------------------------------------------------------------------------------------------------------------
# speed

def clock(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def give_back(device) -> None:
    """Hands freed memory back to the system, so that the next model's peak is its own."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        trim and trim(0)


def speed_of(run: Run, opts: Options) -> dict:
    """One sequence of random tokens, read up to each length; from there a few tokens one by one, which are forgotten
    again: the state they started from is unchanged."""
    device, L, limited = pick_device(run.cfg), min(run.cfg.max_seq_len, opts.context), None
    tokens = torch.randint(run.cfg.vocab_size, (1, L), generator=torch.Generator().manual_seed(opts.seed)).to(device)
    points, state, seconds, n, piece = [], None, 0.0, 0, min(opts.piece or L, L)
    try:
        list(read(run, tokens[:, :piece], piece))               # the very first call also pays for setting up
        give_back(device)
        reset_peak_memory(device)
        for length in (L * 2 ** i for i in range((opts.context // L).bit_length())):
            while n < length:
                began, step = clock(device), min(piece, length - n)
                ((_, _, state),) = read(run, tokens[:, :step], step, state)
                seconds, n = seconds + clock(device) - began, n + step
            points.append(dict(context=n, prefill_tokens_per_second=n / seconds, state_bytes=state_bytes(state)))
            times, after = [], state
            for _ in range(opts.decode):
                began = clock(device)
                ((_, _, after),) = read(run, tokens[:, :1], 1, after)
                times.append(1000 * (clock(device) - began))
            points[-1] |= dict(ms_per_token=median(times), **peak_memory_mib(device))
    except FAILURES as e:
        limited = limit(e)
    return dict(points=points, limit=limited, reached=n)


def untrained(run: Run, memory: str, opts: Options) -> Run:
    """A model of the run's shape with another memory: what its weights are doesn't change how long it takes."""
    torch.manual_seed(opts.seed)
    cfg = checked(partial(replace, run.cfg), memory=memory, memory_layers="all")
    model = GPT(cfg.architecture())
    return Run(run.folder, f"{memory} (untrained)", model.eval().to(pick_device(cfg)), cfg)


def task_speed(runs, opts):
    wanted = list(MEMORIES) if opts.memory == "all" else opts.memory.split(",") if opts.memory else []
    for name in wanted:
        if name not in MEMORIES:
            raise UserError(f"--memory={name}: expected all or some of {', '.join(MEMORIES)}" + nearest(name, MEMORIES))
    shown, lines = [], []
    for run in runs:
        models = {}
        for name in [None, *(name for name in wanted if name != run.cfg.memory)]:
            subject = untrained(run, name, opts) if name else run
            result = models[subject.label] = speed_of(subject, opts)
            shown.append((subject._replace(model=None), result))
            for p in result["points"]:
                peak = p.get("peak_vram_mib") or p.get("peak_rss_mib") or math.nan
                lines.append([subject.label, f"{p['context']:,}", f"{p['prefill_tokens_per_second']:,.0f}",
                              p.get("ms_per_token"), f"{p['state_bytes']:,}", f"{peak:,.0f}"])
            if result["limit"]:
                lines.append([subject.label, f"from {result['reached']:,}", result["limit"], "", "", ""])
        save(run, "speed", dict(models=models))
    table(["model", "context", "prefill tokens/s", "ms a token", "state bytes", "peak MiB"], lines)
    speed_picture(shown, runs[0])


def short(number, _=None) -> str:
    return f"{number / 1e6:g}M" if number >= 1e6 else f"{number / 1e3:g}k" if number >= 1e3 else f"{number:g}"


def speed_picture(shown, first):
    from matplotlib.ticker import LogLocator
    figure, axes = panels(2, 2, (9.5, 7.2))
    memory = (("peak_vram_mib", "peak GPU memory (MiB)") if pick_device(first.cfg).type == "cuda" else
              ("peak_rss_mib", "peak memory of the process (MiB)"))
    quantities = (("prefill_tokens_per_second", "prefill (tokens a second)"), ("ms_per_token", "decoding (ms a token)"),
                  ("state_bytes", "state of one sequence (bytes)"), memory)
    ticks = sorted({p["context"] for _, r in shown for p in r["points"]})[::2]
    for ax, (name, label) in zip(axes.flat, quantities):
        ax.set(xscale="log", xlabel="context (tokens)", ylabel=label)
        for (subject, result), look in zip(shown, looks([s for s, _ in shown])):
            points = [(p["context"], p[name]) for p in result["points"] if name in p]
            ax.plot(*np.array(points).reshape(-1, 2).T, label=subject.label, **look)
            if points:
                ax.set_yscale("log", subs=[])                   # an axis without a point can't be logarithmic
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            if points and result["limit"]:
                ax.plot(*points[-1], "x", color=look["color"], ms=12, mew=2)
        ax.set_xticks(ticks, [f"{t / 1024:g}k" if t >= 1024 else str(t) for t in ticks])
        ax.xaxis.minorticks_off()
        ax.yaxis.set_major_formatter(short)
    title = "x: the model or the machine goes no further" if any(r["limit"] for _, r in shown) else None
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9,
                  frameon=False, title=title)
    picture(first, "speed", figure)


# ----------------------------------------------------------------------------------------------------------------------
# main

TASKS = dict(bpb=task_bpb, position=task_position, extend=task_extend, niah=task_niah, ood=task_ood,
             attention=task_attention, generate=task_generate, speed=task_speed)


def main(argv: list[str] | None = None) -> int:
    try:
        paths, tasks, opts = parse_args(sys.argv[1:] if argv is None else argv)
        runs = open_runs(paths, opts)
        with memory_ceiling(pick_device(runs[0].cfg)):
            for name in tasks:
                print(f"\n{name}", flush=True)
                TASKS[name](runs, opts)
                print(*(f"-> {run.folder / f'eval_{name}.json'}" for run in runs), sep="\n")
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
