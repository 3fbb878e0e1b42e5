"""Everything that is measured on a trained checkpoint.

    python eval.py out/<run> [more runs] [--task=bpb,position,...] [--key=value ...]

Every memory is measured alike: through `stream` (generate calls it for each token; attention also
asks layer.weights). Each task prints a table and writes out/<run>/eval_<task>.json. A picture of
several runs goes to the first one's folder.

Tasks
    bpb         bits per byte on the validation rows: the number that training ends with
    position    the same by position in the row, and by position in the document
    extend      bits per byte on rows of up to 16 times the training length. The spans of such a row
                hold different text, so compare one span across runs, never two spans of one run.
    ood         loss by position on another corpus (Memory Mosaics, figure 10)
    copy        bits per byte of what a look-up could have predicted: the last two tokens already
                occurred earlier in the same row, followed by this very target. Split by how far back
                that was.
    carry       what the carried state is worth: bits per byte when it is thrown away every 16, 32,
                ... tokens against never; and a picture of the tokens at which it helps
    niah        needle in a haystack: a 6-digit key is hidden at some depth in some length of
                validation text
    attention   what the last position attends to, per head, at 1x and 3x the training length (Memory
                Mosaics, figures 12, 13, 15). Of knn it is the attention to the window alone.
    generate    continuations of the beginnings of validation documents. A model of stories gets the
                24 prompts of Memory Mosaics' table 1, and --prompt is any other text.
    speed       prefill, ms a token, state bytes and peak memory against context length

Glossary
    row, document   a row is what the model reads as one sequence; it holds one document or several
                    (see data.py)
    target          the token after a position, which the model is to predict
    sums            nats, bytes and targets, summed by position: a tensor (3,positions), float64
    bucket          neighbouring positions taken together. Nats and bytes are summed before they are
                    divided, bpb = Σnats/(ln2·Σbytes), so that the buckets recombine to the total.
    span            the tokens of a long row between two neighbours of 0, L, 2L, 4L, ...; L is the training
                    length
    stretch         the tokens that one call of `stream` reads: as many as a row had in training. So
                    only the state grows with the length of a row.
    reached, limit  how far a row could be read, and what ended it: out of memory, or no more
                    learned positions
    band            targets grouped by a distance in tokens; the bands double. In `copy` it is the distance
                    to what a look-up finds (with a window of 16: 1 to 15, 16 to 31, 32 to 63, ...), in `carry`
                    to where the state was thrown away (0, 1, 2 to 3, 4 to 7, ...). Like buckets the bands
                    recombine to the total.
    margin          log p(key) - log p(wrong key) in nats

Reading order
    options, opening runs, limits, reading through the state, files and pictures, then the tasks in
    the order above, main

References
    needle in a haystack: Kamradt 2023, github.com/gkamradt/LLMTest_NeedleInAHaystack
    copy: "associative recall hits" of Arora et al. 2023, "Zoology", 2312.04927
    Memory Mosaics: Zhang et al. 2024, 2405.06394; its prompts: Eldan & Li 2023, 2305.07759
"""
import ctypes
import hashlib
import itertools
import json
import math
import re
import sys
import textwrap
import time
from collections import Counter, deque
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

from data import BABI_STORIES, UserError, did_you_mean, encode
from model import (GPT, MEMORIES, Attention, Block, ContextualMemory, GatedKey, ShortAndLongMemory, check_options,
                   option, state_bytes)
from train import (RunConfig, autocast, bits_per_byte, by_bucket, check_one_process, checked, device_name,
                   evaluate_bpb, fill_in, load_corpus, load_run, parse_value, peak_memory_mib, peak_mib,
                   pick_device, read_flags, reset_peak_memory, save, save_json)


# ----------------------------------------------------------------------------------------------------------------------
# Options. The group, an option's third argument, says which tasks read it.

@dataclass
class Options:
    """What is measured, and how. Raises ValueError for a value that is not allowed."""
    task: str = option("all", "which ones, with commas, or all", "every task")
    device: str = option("auto", "auto = cuda where there is one", "every task",
                         choices=("auto", "cpu", "cuda"))
    seed: int = option(1, "of keys, of sampling (at a temperature above 0) and of untrained weights",
                       "niah, generate, speed", low=0, high=2**63 - 1)
    tokens: int = option(0, "validation tokens; 0 = the eval_tokens of the run",
                         "bpb, position, ood, copy, carry", low=0)
    bucket: int = option(64, "positions taken together (ood: a quarter of it)",
                         "position, extend, ood", low=4)
    factor: int = option(16, "the longest rows, in training lengths", "extend", low=1)
    rows: int = option(8, "rows to read", "extend", low=1)
    lengths: str = option("", "tokens, with commas; by default 1/2, 1, 2 and 4 training lengths", "niah")
    depths: str = option("0,0.25,0.5,0.75,1", "of the needle, with commas: 0 at the start, "
                         "1 right before the question", "niah")
    pairs: int = option(8, "pairs of keys asked for at each length and depth", "niah",
                        low=2, high=20_000)
    needle: str = option("\nThe secret key is {key}.\n",
                         "the needle; up to {key} it is also the question", "niah")
    dataset: str = option("python-docs", "the other corpus, a name or a path", "ood")
    sequences: int = option(64, "rows to average (the paper: 5000)", "attention", low=1)
    prompt: tuple = option((), "a prompt of your own; may be given several times", "generate")
    new_tokens: int = option(60, "tokens to write", "generate", low=1)
    temperature: float = option(0.0, "0 takes the likeliest token", "generate", low=0)
    memory: str = option("", "untrained models of the run's shape to compare with: names with "
                         "commas, or all", "speed")
    context: int = option(65536, "the longest context in tokens", "speed", low=1)

    def __post_init__(self):
        check_options(self)
        # Every list is read once, so that a wrong one is refused before anything is measured.
        self.tasks()
        self.needle_depths()
        self.needle_lengths(training_length=1)
        self.other_memories()
        question, key, _ = self.needle.partition("{key}")
        if not question.strip() or not key:
            raise ValueError(f"needle={self.needle!r} was given, "
                             "expected text, then {key} where the key goes")

    def tasks(self) -> list[str]:
        """The names of the tasks to do."""
        if self.task == "all":
            return list(TASKS)
        return known_names("task", self.task, TASKS)

    def needle_depths(self) -> list[float]:
        """Shares of the text that stand before the needle."""
        return numbers("depths", self.depths, float, 0, 1)

    def needle_lengths(self, training_length: int) -> list[int]:
        """Lengths of the text in tokens, needle, question and answer included."""
        if self.lengths:
            return numbers("lengths", self.lengths, int, 1, 10**9)
        return [training_length // 2, training_length, 2 * training_length, 4 * training_length]

    def other_memories(self) -> list[str]:
        """The memories to compare with."""
        if self.memory == "":
            return []
        if self.memory == "all":
            return list(MEMORIES)
        return known_names("memory", self.memory, MEMORIES)


def known_names(name: str, text: str, known) -> list[str]:
    """A list with commas, such as bpb,niah. Raises ValueError for a name that is not among the
    known ones."""
    names = text.split(",")
    for given in names:
        if given not in known:
            hint = did_you_mean(given, known)
            expected = ", ".join(known)
            raise ValueError(f"{name}={text} was given, but {given!r} is none of {expected}{hint}")
    return names


def numbers(name: str, text: str, kind: type, low, high) -> list:
    """A list with commas, such as 0,0.5,1. Raises ValueError."""
    refusal = ValueError(f"{name}={text} was given, "
                         f"expected numbers from {low} to {high} with commas between them")
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise refusal from None
    if not all(low <= value <= high for value in values):
        raise refusal
    return values


def parse_args(argv: list[str]) -> tuple[list[str], Options]:
    """-> run folders, options"""
    usage = "eval.py out/<run> [more runs] [--task=bpb,niah,...] [--key=value ...]"
    description = __doc__.split("\n\nGlossary")[0]
    flags, runs = read_flags(Options, argv, usage, description, words="folders that train.py wrote")

    settings = {}
    for name, text in flags.items():
        # The flag of a tuple gives all its texts; every other value is parsed.
        settings[name] = tuple(text) if isinstance(text, list) else parse_value(Options, name, text)
    opts = checked(Options, **settings)
    if not runs:
        raise UserError("no run was given; give a folder that train.py wrote, such as out/laptop-none-s1")
    return runs, opts


# ----------------------------------------------------------------------------------------------------------------------
# Opening runs

class Run(NamedTuple):
    """A trained model, and what it was trained on."""
    folder: Path
    label: str         # short, for tables and pictures
    model: GPT
    cfg: RunConfig
    step: int = 0      # steps that it was trained

    def condition(self) -> str:
        """The name of what this run tests: it decides the colour."""
        import analyze
        return analyze.condition(vars(self.cfg))

    def rows_at_once(self, length: int) -> int:
        """How many rows of `length` tokens are read together: as many tokens as in training, so
        that they fit."""
        rows = min(self.cfg.device_batch_size or self.cfg.batch_size, self.cfg.batch_size)
        return max(1, rows * self.cfg.max_seq_len // length)

    def corpus(self):
        """The Corpus of the training. Raises UserError if its files have changed since."""
        corpus = load_corpus(self.cfg.dataset, self.cfg.tokenizer)
        fill_in(self.cfg, corpus)
        return corpus


def open_runs(paths: list[str], opts: Options) -> list[Run]:
    """The trained runs in these folders, on the device that is asked for. Raises UserError."""
    runs = []
    opened = set()
    for path in map(Path, paths):
        if not path.exists():
            siblings = path.parent.iterdir() if path.parent.is_dir() else []
            hint = did_you_mean(str(path), map(str, siblings)) or "; give a folder that train.py wrote"
            raise UserError(f"there is no {path}{hint}")
        # One run may match two patterns of a shell, or be given by several of its files: it is opened once.
        folder = path if path.is_dir() else path.parent
        if folder.resolve() in opened:
            continue
        opened.add(folder.resolve())
        model, cfg, checkpoint = load_run(folder)
        step = checkpoint["step"]
        if step < cfg.steps:
            print(f"note: {folder} is not finished: it is measured as it was after step {step:,} of {cfg.steps:,}",
                  file=sys.stderr)

        # What was trained in bfloat16 can be read on a CPU too, in float32.
        cfg = replace(cfg, device=opts.device, dtype="float32" if cfg.dtype == "float32" else "auto")
        runs.append(Run(folder, "", model.to(pick_device(cfg)), cfg, step))

    # Runs that only a folder tells apart are called by their folders.
    labels = [label_of(run, runs) for run in runs]
    if len(set(labels)) < len(labels):
        labels = [str(run.folder) for run in runs]
    return [run._replace(label=label) for run, label in zip(runs, labels)]


def label_of(run: Run, runs: list[Run]) -> str:
    """The condition, and the settings in which its runs differ: "rmt rmt_tokens=8", "knn s2"."""
    alike = [other.cfg for other in runs if other.condition() == run.condition()]

    # The condition comes first, then what its runs differ in, and the seed at last.
    parts = [run.condition()]
    for f in fields(run.cfg):
        decides = f.metadata["group"] != "run" and f.name not in ("seed", "data_sha256")
        if decides and values_differ(alike, f.name):
            parts.append(f"{f.name}={getattr(run.cfg, f.name)}")
    if values_differ(alike, "seed"):
        parts.append(f"s{run.cfg.seed}")
    return " ".join(parts)


def values_differ(configs: list[RunConfig], name: str) -> bool:
    """Does this setting have several values?"""
    return len({getattr(cfg, name) for cfg in configs}) > 1


# ----------------------------------------------------------------------------------------------------------------------
# Limits: what the machine or the model cannot do is a result. Any other failure is an error.

FAILURES = (MemoryError, RuntimeError, ValueError)  # what limit() is to judge
OUT_OF_MEMORY = "out of memory"


def limit(e: Exception) -> str:
    """What the machine or the model cannot do, in words. Any other failure is raised again."""
    allocator_says = re.search("out of memory|can't allocate memory|not enough memory", str(e))
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)):
        return OUT_OF_MEMORY
    if isinstance(e, RuntimeError) and allocator_says:
        return OUT_OF_MEMORY
    if isinstance(e, ValueError) and "learned positions" in str(e):
        return str(e)
    raise e


def proc_bytes(path: Path, name: str) -> int:
    """A line such as "VmData: 1234 kB" of a file below /proc, in bytes."""
    return int(re.search(name + r":\s*(\d+)", path.read_text())[1]) * 1024


@contextmanager
def memory_ceiling(device):
    """On a CPU: limits this process's memory, so that taking too much raises an exception. Without the
    limit Linux would kill the process."""
    status = Path("/proc/self/status")
    machine = Path("/proc/meminfo")
    if device.type == "cuda" or not (status.exists() and machine.exists()):
        yield
        return

    # The ceiling is what the process uses and what is free; one that stands already may be lower.
    import resource  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    ceiling = proc_bytes(status, "VmData") + proc_bytes(machine, "MemAvailable")
    for old in (soft, hard):
        if old != resource.RLIM_INFINITY:
            ceiling = min(ceiling, old)
    resource.setrlimit(resource.RLIMIT_DATA, (ceiling, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def by_halves(function, *tensors: Tensor) -> Tensor:
    """function(*tensors), a row of the result for each row of the tensors. If the memory is too
    small for all rows, each half is computed by itself, so that a limit is always that of a single
    sequence."""
    rows = len(tensors[0])
    try:
        return function(*tensors)
    except FAILURES as e:
        if limit(e) != OUT_OF_MEMORY or rows == 1:
            raise

    half = (rows + 1) // 2
    first = by_halves(function, *[t[:half] for t in tensors])
    second = by_halves(function, *[t[half:] for t in tensors])
    return torch.cat([first, second])


# ----------------------------------------------------------------------------------------------------------------------
# Reading through the state

@torch.no_grad()
def read(run: Run, x: Tensor, state=None):
    """Streams the tokens x (rows,T) after what `state` remembers, stretch by stretch. Yields where
    a stretch begins, its logits (rows,stretch,V) in float32, and the state after it."""
    device = pick_device(run.cfg)
    stretch = run.cfg.max_seq_len
    for start in range(0, x.size(1), stretch):
        with autocast(run.cfg):
            logits, state = run.model.stream(x[:, start:start + stretch].to(device), state)
        yield start, logits.float(), state


def read_to_end(run: Run, x: Tensor, state=None):
    """Streams the tokens x (rows,T) -> the last stretch's logits (None if T is 0), the state after
    it."""
    last = deque(read(run, x, state), maxlen=1)  # the logits of the stretches before it are not kept
    if not last:
        return None, state
    _, logits, state = last.pop()
    return logits, state


UNREAD = -1.0  # in place of nats, which are never negative


def row_nats(run: Run, limits: list[str], x: Tensor, y: Tensor) -> Tensor:
    """Nats of each target y (rows,T), float64 on the CPU. From where the rows cannot be read on, the
    nats are UNREAD and the reason is appended to `limits`. But where memory runs out with several
    rows, the error is raised: fewer rows may fit."""
    nats = torch.full(y.shape, UNREAD, dtype=torch.float64)
    try:
        for start, logits, _ in read(run, x):
            end = start + logits.size(1)
            target = y[:, start:end].to(logits.device)
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            nats[:, start:end] = loss.view(target.shape).cpu()
    except FAILURES as e:
        reason = limit(e)
        if reason == OUT_OF_MEMORY and len(x) > 1:
            raise
        limits.append(reason)
    return nats


def bpb_of(sums: Tensor) -> float | None:
    """Bits per byte of all positions in sums (3,...)."""
    nats, size, _ = sums.reshape(3, -1).sum(1).tolist()
    return bits_per_byte(nats, size)


def add_tokens(digest, x: Tensor, y: Tensor) -> None:
    """Adds the tokens of rows x and their targets y to a hash: runs with the same hash were
    measured on the same text."""
    tokens = torch.cat([x, y[:, -1:]], 1)
    digest.update(tokens.to(torch.int32).numpy().tobytes())


def has_rows(corpus, length: int) -> bool:
    """Is there validation text for a row of so many tokens?"""
    try:
        corpus.n_rows("val", length)
        return True
    except UserError:
        return False


def measure(run: Run, corpus, length: int, tokens: int, bucket: int) -> tuple[dict, Tensor]:
    """Bits per byte on validation rows of `length` tokens, `tokens` in all (0 = all there are) ->
    result, sums (3,length) by position in the row.

    Position 0 is the target with one token before it, position 1 the one with two, and so on:
    counted in the row, or in the target's own piece (a document; of a document longer than a row,
    its part in this row).
    """
    by_row = torch.zeros(3, length, dtype=torch.float64)
    by_document = torch.zeros(3, length, dtype=torch.float64)
    digest = hashlib.sha256()
    limits = []
    reached = length
    for x, y, doc_pos in corpus.eval_batches(length, run.rows_at_once(length), tokens or None):
        add_tokens(digest, x, y)
        nats = by_halves(partial(row_nats, run, limits), x, y)
        unread = nats == UNREAD
        reached = min(reached, int((~unread).all(0).sum()))

        # A target counts if it was read and stands for bytes: an end of text does not.
        size = corpus.token_bytes[y].double()
        values = torch.stack([nats, size, torch.ones_like(nats)])                       # (3,rows,length)
        values[:, unread | (size == 0)] = 0
        by_row += values.sum(1)
        document_positions = (doc_pos - 1).clamp(min=0)
        by_document.index_add_(1, document_positions.flatten(), values.flatten(1))

    nats, _, targets = by_row.sum(1).tolist()
    result = dict(tokens_sha256=digest.hexdigest(), length=length, reached=reached,
                  limit=limits[0] if limits else None,
                  val_bpb=bpb_of(by_row),
                  val_loss=nats / targets if targets else None,
                  bpb_by_position=by_bucket(by_row, bucket),
                  bpb_by_document_position=by_bucket(by_document, bucket))
    return result, by_row


# ----------------------------------------------------------------------------------------------------------------------
# Files, tables, pictures

def null(name: str) -> None:
    """What JSON gets for NaN, Infinity and -Infinity."""
    return None


def plain(x):
    """What JSON can hold: tensors as lists, null for a number that is not finite."""
    return json.loads(json.dumps(x, default=Tensor.tolist), parse_constant=null)


def save_result(run: Run, task: str, result: dict) -> None:
    """Writes out/<run>/eval_<task>.json: which run this is, then what was measured."""
    content = dict(run.cfg.identity(), step=run.step, task=task, device=device_name(pick_device(run.cfg)))
    content.update(result)
    save_json(run.folder / f"eval_{task}.json", plain(content))


def save_picture(run: Run, task: str, figure) -> None:
    """Writes out/<run>/eval_<task>.png."""
    import analyze
    path = run.folder / f"eval_{task}.png"
    save(path, analyze.picture(figure))
    print(f"-> {path}")


def print_table(head: list[str], rows: list[list]) -> None:
    """Prints an aligned table."""
    import analyze
    print(analyze.table(head, rows), end="")


def tell_limit(label: str, result: dict) -> None:
    """Tells what kept a model from reading on, if anything did."""
    if result["limit"]:
        print(f"{label}: read up to {result['reached']:,} tokens, then: {result['limit']}")


def note_other_tokens(results: list[dict]) -> None:
    """Tells if the runs were not measured on the same tokens."""
    if len({r["tokens_sha256"] for r in results}) > 1:
        print("note: these runs were measured on different tokens (tokens_sha256), "
              "so their numbers don't compare")


def looks(runs: list[Run]) -> list[dict]:
    """How each run's curve is drawn: colour and marker by memory, a line style for each run of one. Markers
    are hollow, so that curves that coincide are all seen."""
    import analyze
    hollow = dict(linewidth=1.5, markersize=7, markerfacecolor="none")
    return [look | hollow for look in analyze.distinct_looks([run.condition() for run in runs])]


def legend_below(figure, ax, title: str | None = None) -> None:
    """One legend for all panels, below them."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False,
                  title=title)


# ----------------------------------------------------------------------------------------------------------------------
# bpb, position, extend, ood

CURVES = {"row": "bpb_by_position", "document": "bpb_by_document_position"}


def print_columns(head: list[str], columns: list[dict], totals: list) -> None:
    """Prints a table. columns: one dict a column, from a line's name to its number; totals: the
    last line. Where a column lacks a line (a run with shorter rows has no later positions), no
    number is shown."""
    names = dict.fromkeys(itertools.chain(*columns))
    rows = [[name, *(column.get(name) for column in columns)] for name in names]
    print_table(head, [*rows, ["all", *totals]])


def print_by_position(runs: list[Run], results: list[dict], where: str) -> None:
    """Bits per byte of every bucket, a column a run. where: "row" or "document"."""
    columns = []
    for r in results:
        curve = r[CURVES[where]]
        columns.append(dict(zip(curve["positions"], curve["bpb"])))
    head = [f"position in the {where}", *(run.label for run in runs)]
    print_columns(head, columns, [r["val_bpb"] for r in results])


def curve_points(curve: dict, quantity: str, most: int = 32) -> tuple[list, list]:
    """At most `most` points of a curve -> positions (the middle of a bucket, in tokens), values of
    the quantity.

    Few documents are long. Where a point has less than 0.1% of the bytes it is noise, and is left
    out.
    """
    # Neighbouring buckets are added up until there are at most `most` points.
    sums = torch.tensor([curve["nats"], curve["bytes"], curve["targets"]], dtype=torch.float64)
    enough = 0.001 * sums[1].sum().item()
    together = math.ceil(sums.size(1) / most)
    width = together * curve["bucket"]

    positions = []
    values = []
    for i, bucket_sums in enumerate(sums.split(together, dim=1)):
        nats, size, targets = bucket_sums.sum(1).tolist()
        if size > enough:
            positions.append((i + 0.5) * width)
            values.append(nats / targets if quantity == "loss" else bits_per_byte(nats, size))
    return positions, values


def draw_by_position(task: str, runs: list[Run], results: list[dict]) -> None:
    """Two panels: by position in the row and in the document."""
    import analyze
    figure, axes = analyze.panels(1, 2, (9.5, 3.8))
    quantity = "loss" if task == "ood" else "bpb"
    unit = "loss (nats a token)" if task == "ood" else "bits per byte"
    for ax, (where, key) in zip(axes[0], CURVES.items()):
        for run, r, style in zip(runs, results, looks(runs)):
            positions, values = curve_points(r[key], quantity)
            ax.plot(positions, values, label=run.label, **style)
            if task == "extend":
                ax.axvline(run.cfg.max_seq_len, color="gray", lw=1, ls=":")
        ax.set(xlabel=f"position in the {where} (tokens)", ylabel=unit)
    title = "dotted: training length" if task == "extend" else None
    legend_below(figure, axes[0, 0], title)
    save_picture(runs[0], task, figure)


def bpb_that_fits(run: Run, corpus, cfg: RunConfig) -> dict:
    """`evaluate_bpb`, with fewer rows at once where the memory is too small."""
    rows = run.rows_at_once(cfg.max_seq_len)
    while True:
        try:
            return evaluate_bpb(run.model, corpus, replace(cfg, batch_size=rows, device_batch_size=0))
        except FAILURES as e:
            if limit(e) != OUT_OF_MEMORY or rows == 1:
                raise
        rows = rows // 2


def task_bpb(runs: list[Run], opts: Options) -> None:
    """Whole rows, by the function that training uses. `position` sums the same losses in its own
    way: its total must agree."""
    results = []
    for run in runs:
        corpus = run.corpus()
        cfg = replace(run.cfg, eval_tokens=opts.tokens or run.cfg.eval_tokens)

        # The hash says which tokens were measured.
        digest = hashlib.sha256()
        for x, y, _ in corpus.eval_batches(cfg.max_seq_len, 64, cfg.eval_tokens or None):
            add_tokens(digest, x, y)

        result = dict(tokens_sha256=digest.hexdigest(), **bpb_that_fits(run, corpus, cfg))
        save_result(run, "bpb", result)
        results.append(result)
    rows = [[run.label, r["val_bpb"], r["val_loss"]] for run, r in zip(runs, results)]
    print_table(["run", "bits per byte", "nats a token"], rows)
    note_other_tokens(results)


def task_position(runs: list[Run], opts: Options) -> None:
    """Bits per byte by position, on rows of the training length."""
    results = []
    for run in runs:
        tokens = opts.tokens or run.cfg.eval_tokens
        result, _ = measure(run, run.corpus(), run.cfg.max_seq_len, tokens, opts.bucket)
        save_result(run, "position", result)
        results.append(result)
    print("bits per byte")
    for where in CURVES:
        print_by_position(runs, results, where)
    note_other_tokens(results)
    draw_by_position("position", runs, results)


def doubling(first: int, end: int) -> list[int]:
    """first, 2·first, 4·first, ... as far as they are below end"""
    doublings = math.ceil(math.log2(end / first)) if first < end else 0
    return [first * 2**i for i in range(doublings)]


def span_ends(L: int, factor: int) -> list[int]:
    """Where the spans of a row of factor training lengths end: L, 2L, 4L, ... and factor·L."""
    return [*doubling(L, factor * L), factor * L]


def task_extend(runs: list[Run], opts: Options) -> None:
    """Bits per byte beyond the training length. One pass over the longest rows measures every
    shorter context too, because the model is causal."""
    results = []
    rows = []
    for run in runs:
        corpus = run.corpus()
        L = run.cfg.max_seq_len
        factor = opts.factor
        while factor > 1 and not has_rows(corpus, factor * L):
            factor -= 1
        if factor < opts.factor:
            print(f"note: {corpus.name} has validation text for rows of {factor}, "
                  f"not {opts.factor} training lengths")
        result, sums = measure(run, corpus, factor * L, opts.rows * factor * L, opts.bucket)

        # A span that was not read to its end has no number.
        spans = []
        ends = span_ends(L, factor)
        for start, end in zip([0, *ends], ends):
            bpb = bpb_of(sums[:, start:end]) if end <= result["reached"] else None
            spans.append(dict(start=start, end=end, bpb=bpb))
            rows.append([run.label, f"{start}-{end}", f"{end // L}x", bpb])
        tell_limit(run.label, result)
        result["spans"] = spans
        save_result(run, "extend", result)
        results.append(result)
    print_table(["run", "tokens", "training length", "bits per byte"], rows)
    print("The spans hold different text: compare one span across runs, never two spans of one run.")
    note_other_tokens(results)
    draw_by_position("extend", runs, results)


def task_ood(runs: list[Run], opts: Options) -> None:
    """Loss by position on a corpus that the model has not seen ("out of distribution"), in the
    model's own tokens."""
    results = []
    for run in runs:
        # A tokenizer that was trained on the run's corpus is asked for by that corpus's name, if the
        # corpus, and so the tokenizer, is still the one of the training.
        tokenizer = run.cfg.tokenizer
        if tokenizer.startswith("bpe") and "@" not in tokenizer:
            run.corpus()
            tokenizer += f"@{run.cfg.dataset}"

        corpus = load_corpus(opts.dataset, tokenizer)
        tokens = opts.tokens or run.cfg.eval_tokens
        result, _ = measure(run, corpus, run.cfg.max_seq_len, tokens, opts.bucket // 4)
        result.update(ood_dataset=opts.dataset, ood_sha256=corpus.sha256)
        save_result(run, "ood", result)
        results.append(result)
    print(f"bits per byte on {opts.dataset}")
    print_by_position(runs, results, "row")
    note_other_tokens(results)
    draw_by_position("ood", runs, results)


# ----------------------------------------------------------------------------------------------------------------------
# copy, carry: what a look-up could have predicted, and what the carried state is worth

def validation_rows(run: Run, corpus, tokens: int) -> tuple[Tensor, Tensor, str]:
    """All rows that `position` measures -> x, y (rows,T), the hash of their tokens"""
    T = run.cfg.max_seq_len
    batches = corpus.eval_batches(T, run.rows_at_once(T), tokens or None)
    x, y, _ = map(torch.cat, zip(*batches))                                             # (rows,T)
    digest = hashlib.sha256()
    add_tokens(digest, x, y)
    return x, y, digest.hexdigest()


def nats_in_parts(run: Run, n: int, x: Tensor, y: Tensor) -> Tensor:
    """Nats of each target y (rows,T) if the state is thrown away after every n tokens: each part of
    n tokens is read as a row of its own. Raises UserError where a part cannot be read."""
    parts = []
    for tokens in (x, y):
        padded = F.pad(tokens, (0, -tokens.size(1) % n))  # what stands at the end changes nothing before it
        parts.append(padded.reshape(-1, n).split(run.rows_at_once(n)))

    limits = []
    nats = [by_halves(partial(row_nats, run, limits), *batch) for batch in zip(*parts)]
    if limits:
        raise UserError(f"{run.label}: a row of {n} tokens cannot be read ({limits[0]}); leave out this task")
    return torch.cat(nats).view(len(x), -1)[:, :x.size(1)]


def band_names(starts: list[int], end: int) -> list[str]:
    """Names of the bands that begin at `starts`, the last of which stops before `end`: "0", "1",
    "2-3", ..."""
    names = []
    for start, stop in zip(starts, [*starts[1:], end]):
        names.append(str(start) if stop == start + 1 else f"{start}-{stop - 1}")
    return names


def by_band(names: list[str], bands: Tensor, nats: Tensor, size: Tensor) -> dict:
    """Bits per byte in all and by band, from the nats, bytes and band of every target (rows,T); a
    band is an index of names."""
    scored = size > 0  # an end of text has no bytes and does not count
    sums = torch.zeros(3, len(names), dtype=torch.float64)
    sums.index_add_(1, bands[scored], torch.stack([nats, size.double(), torch.ones_like(nats)])[:, scored])

    found = []
    for name, (n, b, targets) in zip(names, sums.T.tolist()):
        found.append(dict(band=name, nats=n, bytes=b, targets=targets, bpb=bits_per_byte(n, b)))
    total = bits_per_byte(sum(band["nats"] for band in found), sum(band["bytes"] for band in found))
    return dict(bpb=total, bands=found)


def print_bands(head: list[str], results: list[dict]) -> None:
    """The bits per byte that by_band gave, a column a result"""
    columns = [{band["band"]: band["bpb"] for band in r["bands"]} for r in results]
    print_columns(head, columns, [r["bpb"] for r in results])


def copy_distances(row: list[int]) -> list[int]:
    """How far back a look-up finds each target row[t+1]: a distance in tokens for every t.

    The last two tokens and the target, row[t-1:t+2], occurred earlier in the same row, as
    row[j-1:j+2]. The distance to the latest such place is t - j. It is 0 if there is none.
    """
    latest = {}
    distances = [0]  # before the first target stands a single token
    for t, three in enumerate(zip(row, row[1:], row[2:]), start=1):
        distances.append(t - latest.get(three, t))
        latest[three] = t
    return distances


def measure_copy(run: Run, corpus, tokens: int) -> dict:
    """Bits per byte by the distance to what could be copied. The first band lies inside the window
    W of an S layer; the last one, "other", holds the targets that could not be copied. Bands hold
    different text, so compare one band across runs, never two bands of one run."""
    T = run.cfg.max_seq_len
    W = min(run.cfg.local_window, T)
    x, y, sha256 = validation_rows(run, corpus, tokens)

    # The bands begin at the distances 1, W, 2W, 4W, ...
    starts = sorted({1, *doubling(W, T)})
    distances = [copy_distances(row) for row in torch.cat([x, y[:, -1:]], 1).tolist()]
    bands = torch.bucketize(torch.tensor(distances), torch.tensor(starts), right=True) - 1
    bands[bands == -1] = len(starts)  # the distance is 0

    names = [*band_names(starts, T), "other"]
    measured = by_band(names, bands, nats_in_parts(run, T, x, y), corpus.token_bytes[y])
    return dict(tokens_sha256=sha256, length=T, window=W) | measured


def task_copy(runs: list[Run], opts: Options) -> None:
    """Bits per byte of what could be copied from inside the window and from farther back, and of
    all other targets."""
    results = []
    for run in runs:
        result = measure_copy(run, run.corpus(), opts.tokens or run.cfg.eval_tokens)
        save_result(run, "copy", result)
        results.append(result)
        copied = [band["bytes"] for band in result["bands"][:-1]]
        other = result["bands"][-1]["bytes"]
        print(f"{run.label}: {sum(copied) / (sum(copied) + other):.0%} of the bytes could be copied", flush=True)
    print("bits per byte")
    print_bands(["tokens back", *(run.label for run in runs)], results)
    note_other_tokens(results)


PASSAGE = 256  # tokens in the picture


def measure_carry(run: Run, corpus, tokens: int) -> dict:
    """What it costs to throw the state away every 16, 32, ... tokens. The nats and bits per byte that are
    stored of such a cut are differences: the loss with the cut minus the loss without. Its bands tell how
    many tokens were read since the cut; the first band holds the beginnings of rows, before any cut."""
    T = run.cfg.max_seq_len
    x, y, sha256 = validation_rows(run, corpus, tokens)
    size = corpus.token_bytes[y]
    uncut = nats_in_parts(run, T, x, y)
    cuts = []
    position = torch.arange(T).expand(x.shape)
    for n in doubling(16, T):
        # The bands begin at 0, 1, 2, 4, ... tokens after a cut.
        starts = [0, *doubling(1, n)]
        bands = torch.bucketize(position % n, torch.tensor(starts), right=True)
        bands[position < n] = 0

        names = ["no cut yet", *band_names(starts, n)]
        cut = by_band(names, bands, nats_in_parts(run, n, x, y) - uncut, size)
        cuts.append(dict(every=n) | cut)
        print(f"{run.label}: to throw its state away every {n} tokens costs {cut['bpb']:.4f} bits per byte", flush=True)

    whole = by_band(["no cut yet"], torch.zeros_like(y), uncut, size)
    return dict(tokens_sha256=sha256, length=T, bpb=whole["bpb"], cuts=cuts)


def carried_bits(run: Run, corpus) -> dict | None:
    """The bits that the state from before the window saves at each token of a passage: the loss
    after reading the last W tokens alone, minus the loss after reading the row from its start. None
    if the window is as long as a row."""
    T = run.cfg.max_seq_len
    W = run.cfg.local_window
    n = min(PASSAGE, T - W)
    if n <= 0:
        return None

    # The passage ends the row with the fewest ends of text, so that its past belongs to it.
    x, y, _ = next(corpus.eval_batches(T, 16, 16 * T))
    row = (x == corpus.eos).sum(1).argmin()
    x = x[row]
    y = y[row]
    full = nats_in_parts(run, T, x[None], y[None])[0, -n:]

    # A row for each target: the W tokens before it. Only its last loss counts.
    cut = nats_in_parts(run, W, x.unfold(0, W, 1)[-n:], y.unfold(0, W, 1)[-n:])[:, -1]

    tokens = y[-n:].tolist()
    texts = [corpus.encoding.decode_single_token_bytes(token).decode(errors="replace") for token in tokens]
    return dict(window=W, tokens=tokens, texts=texts, bits=(cut - full) / math.log(2))


def task_carry(runs: list[Run], opts: Options) -> None:
    """The rows of `position` with a state that is thrown away, and where in a text that costs."""
    import analyze
    results = []
    passages = []
    for run in runs:
        corpus = run.corpus()
        result = measure_carry(run, corpus, opts.tokens or run.cfg.eval_tokens)
        result["passage"] = carried_bits(run, corpus)
        save_result(run, "carry", result)
        results.append(result)
        if result["passage"]:
            passages.append((run.label, plain(result["passage"])))

        # the longest parts come first, because they have all bands
        cuts = result["cuts"][::-1]
        print_bands(["tokens since the cut", *(f"every {cut['every']}" for cut in cuts)], cuts)
    note_other_tokens(results)
    if passages:
        save_picture(runs[0], "carry", analyze.figure_passages(passages))


# ----------------------------------------------------------------------------------------------------------------------
# niah: needle in a haystack

def random_keys(encoding, needle: str, pairs: int, seed: int) -> tuple[list, list, Tensor]:
    """-> the tokens before and after the key, and keys (2·pairs,n) of equally many tokens"""
    before, _, after = needle.partition("{key}")
    space = " " if before.endswith(" ") else ""  # a space belongs to the token that follows it
    before = before.removesuffix(" ")

    # Six digits take a varying number of tokens; keys of the most common number are kept.
    draws = np.random.default_rng(seed).choice(900_000, 40 * pairs, replace=False) + 100_000
    keys = [encode(encoding, f"{space}{number}").tolist() for number in draws]
    n = Counter(map(len, keys)).most_common(1)[0][0]
    keys = [key for key in keys if len(key) == n]
    before = encode(encoding, before).tolist()
    after = encode(encoding, after).tolist()
    return before, after, torch.tensor(keys[:2 * pairs])


def hide(hay: Tensor, depth: float, before: list, after: list, key: Tensor) -> Tensor:
    """hay (T,) with the needle at `depth` and the question at its end; together with the answer it
    is T tokens long."""
    # text - needle - text - question; the answer takes the room that is left
    question = torch.tensor(before)
    needle = torch.cat([question, key, torch.tensor(after, dtype=torch.int64)])
    room = len(hay) - len(needle) - len(question) - len(key)
    place = 1 + round(depth * (room - 1))  # the end-of-text token that leads a row stays first
    return torch.cat([hay[:place], needle, hay[place:room], question])


def score(run: Run, logits: Tensor, state, answer: Tensor) -> tuple[Tensor, Tensor]:
    """How well `answer` (rows,n) continues a text; logits (rows,1,V) and state are the model's after the text's
    last token -> log p of the answer (rows,) in nats, whether the likeliest tokens spell it (rows,)
    as 0 or 1; float64."""
    after = [more for _, more, _ in read(run, answer[:, :-1], state)]
    log_p = torch.cat([logits, *after], 1).log_softmax(-1)                              # (rows,n,V)
    target = answer.to(log_p.device)
    log_p_answer = log_p.gather(-1, target[..., None]).double().sum((1, 2))
    spelled = (log_p.argmax(-1) == target).all(1).double()
    return log_p_answer, spelled


def ask(run: Run, prompt: Tensor, key: Tensor, wrong: Tensor) -> Tensor:
    """-> (rows,3): log p of the key, of the wrong key, and whether the likeliest tokens spell the
    key"""
    logits, state = read_to_end(run, prompt)
    # Both answers go on from one state, which nothing changes.
    log_p_key, spelled = score(run, logits[:, -1:], state, key)
    log_p_wrong, _ = score(run, logits[:, -1:], state, wrong)
    return torch.stack([log_p_key, log_p_wrong, spelled], 1).cpu()


def niah_cell(run: Run, corpus, length: int, depth: float, opts: Options) -> dict:
    """One length and one depth. Keys come in pairs: both are hidden in the same text, each is the
    other's wrong key, and their margins are averaged. So a model that remembers nothing has a
    margin of 0, whichever number it prefers."""
    before, after, keys = random_keys(corpus.encoding, opts.needle, opts.pairs, opts.seed)
    cell = dict(length=length, depth=depth)
    if length < 2 * (len(before) + keys.size(1)) + len(after) + 1:
        return dict(cell, limit="needle does not fit")
    if not has_rows(corpus, length):
        return dict(cell, limit="too little validation text")

    # A row of text for each pair; where text is short, a row serves several pairs.
    hay = torch.cat([x for x, *_ in corpus.eval_batches(length, opts.pairs, opts.pairs * length)])
    pair = torch.arange(len(keys)) // 2
    prompts = [hide(row, depth, before, after, key) for row, key in zip(hay[pair % len(hay)], keys)]

    # The two keys of a pair are neighbouring rows; swapped, each is where the other was.
    wrong = keys.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)                            # (2·pairs,n)

    # As many rows at once as in training; a limit in any of them is the cell's.
    scores = []
    n = run.rows_at_once(run.cfg.max_seq_len)
    try:
        for batch in zip(torch.stack(prompts).split(n), keys.split(n), wrong.split(n)):
            scores.append(by_halves(partial(ask, run), *batch))
    except FAILURES as e:
        return dict(cell, limit=limit(e))

    # A pair's margin is the mean of its two keys' margins.
    log_p_key, log_p_wrong, spelled = torch.cat(scores).unbind(1)
    margins = (log_p_key - log_p_wrong).view(-1, 2).mean(1)                             # (pairs,)
    return dict(cell, exact=spelled.mean(), margin=margins.mean(), margins=margins,
                margin_error=margins.std() / len(margins) ** 0.5, log_p_key=log_p_key.mean())


def cell_text(cell: dict) -> str:
    """How the table shows a cell."""
    if "limit" in cell:
        return cell["limit"]
    if cell["margin"] is None:
        return "not finite"
    return f"{cell['margin']:+.2f} ±{cell['margin_error']:.2f} {cell['exact']:4.0%}"


def task_niah(runs: list[Run], opts: Options) -> None:
    """Margin and exact match at every length and depth."""
    depths = opts.needle_depths()
    results = []
    for run in runs:
        L = run.cfg.max_seq_len
        corpus = run.corpus()
        lengths = opts.needle_lengths(L)

        cells = []
        rows = []
        for length in lengths:
            line = [plain(niah_cell(run, corpus, length, depth, opts)) for depth in depths]
            cells.extend(line)
            rows.append([length, *map(cell_text, line)])
        result = dict(needle=opts.needle, keys_seed=opts.seed, lengths=lengths, depths=depths,
                      cells=cells)
        save_result(run, "niah", result)
        results.append(result)
        print(f"{run.label}: margin in nats ± standard error of {opts.pairs} pairs, exact match; "
              f"trained at {L} tokens")
        print_table(["tokens \\ depth", *(f"{depth:g}" for depth in depths)], rows)
    draw_niah(runs, results, opts.pairs)


def draw_niah(runs: list[Run], results: list[dict], pairs: int) -> None:
    """A map of lengths and depths for each run: the colour is the margin."""
    import analyze
    cols = min(3, len(runs))
    rows = math.ceil(len(runs) / 3)
    most_lengths = max(len(r["lengths"]) for r in results)
    width = 1.2 + 3.6 * cols
    height = (1 + 0.5 * most_lengths) * rows + 0.4
    figure, axes = analyze.panels(rows, cols, (width, height))
    for ax in axes.flat[len(runs):]:
        ax.set_visible(False)

    # One scale for all: at least a nat, so that noise stays pale. A cell without a margin is nan.
    margins = [cell_margins(r) for r in results]
    top = np.nanmax(np.abs(np.concatenate([*margins, [1.0]])))
    for i, (run, r) in enumerate(zip(runs, results)):
        image = draw_cells(axes.flat[i], run, r, margins[i], top)
    for ax in axes[:, 0]:
        ax.set_ylabel("length (tokens; * trained)")
    figure.colorbar(image, ax=axes, label="margin (nats)")
    figure.suptitle(f"margin in nats, exact match in %, over {pairs} pairs of keys", fontsize=10)
    save_picture(runs[0], "niah", figure)


def cell_margins(result: dict) -> np.ndarray:
    """The margin of every cell, nan where there is none."""
    return np.array([cell.get("margin") for cell in result["cells"]], dtype=float)


def draw_cells(ax, run: Run, result: dict, margin: np.ndarray, top: float):
    """One run's map, the margin and the exact match written into each cell -> the image, for the
    colour bar."""
    lengths = result["lengths"]
    depths = result["depths"]
    grid = margin.reshape(len(lengths), len(depths))
    image = ax.imshow(grid, cmap="PuOr", vmin=-top, vmax=top, aspect="auto")

    # the numbers, white where the colour is dark
    for i, cell in enumerate(result["cells"]):
        text = "limit"
        if "limit" not in cell:
            text = f"{round(margin[i], 1) + 0:+.1f}\n{cell['exact']:.0%}"  # + 0: no minus before a zero
        row, column = divmod(i, len(depths))
        colour = "white" if abs(margin[i]) > 0.6 * top else "black"
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)

    names = [f"{n:,}*" if n == run.cfg.max_seq_len else f"{n:,}" for n in lengths]
    ax.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    ax.set_yticks(range(len(lengths)), names)
    ax.set(xlabel="depth (share of the text)", title=run.label)
    ax.grid(False)
    return image


# ----------------------------------------------------------------------------------------------------------------------
# attention: what the last position looks at (Memory Mosaics, figures 12, 13, 15)

RECENT = 16  # tokens that count as recent


def attention_layers(run: Run) -> dict[str, torch.nn.Module]:
    """Everything that attends. Its name is the layer's index; where mosaic2 has two memories, "1, short-term" and
    "1, long-term"."""
    found = {}
    mixers = [module.mixer for module in run.model.modules() if isinstance(module, Block)]
    for i, mixer in enumerate(mixers):
        if isinstance(mixer, (Attention, ContextualMemory)):
            found[str(i)] = mixer
        elif isinstance(mixer, ShortAndLongMemory) and len(mixer.memories) == 1:    # mosaic2_long=False
            found[str(i)] = mixer.memories[0]
        elif isinstance(mixer, ShortAndLongMemory):
            for memory in mixer.memories:
                found[f"{i}, {'short' if memory.window else 'long'}-term"] = memory
    return found


def attention_at(run: Run, x: Tensor) -> dict[str, Tensor]:
    """layer -> (H,1+T), summed over the rows x (B,T): how much the last position attends to slots
    and memory tokens (column 0) and to token t (column 1+t). The last token is read alone, while
    hooks see each attention layer's input."""
    T = x.size(1)
    out = {}

    def look(layer, mixer, given):
        memory, tokens = mixer.weights(*given)
        tokens = F.pad(tokens[:, :, -1], (T - tokens.size(-1), 0))  # tokens out of the window get 0
        out[layer] = torch.cat([memory[:, :, -1:], tokens], -1).sum(0).cpu()

    # The hooks are there for the last token only.
    _, state = read_to_end(run, x[:, :-1])
    hooks = [mixer.register_forward_pre_hook(partial(look, layer))
             for layer, mixer in attention_layers(run).items()]
    try:
        read_to_end(run, x[:, -1:], state)
    finally:
        for hook in hooks:
            hook.remove()
    return out


def attention_profiles(run: Run, corpus, length: int, sequences: int) -> list[dict]:
    """Every attention layer's shares per head, the mean of rows of `length` tokens; and λ where it
    is a mosaic's layer, unless λ depends on the token."""
    # sums over rows, batch by batch
    total = {}
    n = 0
    for x, *_ in corpus.eval_batches(length, run.rows_at_once(length), sequences * length):
        for layer, shares in attention_at(run, x).items():
            total[layer] = total.get(layer, 0) + shares
        n += len(x)

    found = []
    mixers = attention_layers(run)
    for layer, shares in total.items():
        decay = None
        mixer = mixers[layer]
        if isinstance(mixer, ContextualMemory) and not isinstance(mixer.key, GatedKey):
            decay = mixer.key.decay().detach().cpu()        # λ (H,)
        found.append(dict(layer=layer, length=length, sequences=n, decay=decay,
                          memory=shares[:, 0] / n, profile=shares[:, 1:] / n))
    return found


def attention_row(layer: dict) -> list:
    """A layer's line in the table: means over its heads."""
    decays = None
    if layer["decay"] is not None:
        decays = f"{layer['decay'].min():.3f} {layer['decay'].max():.3f}"
    profile = layer["profile"].mean(0)
    return [layer["layer"], layer["length"], layer["memory"].mean().item(), profile[0].item(),
            profile[-RECENT:].sum().item(), decays]


def task_attention(runs: list[Run], opts: Options) -> None:
    """Shares of the last position's attention at the training length and at three times that."""
    for run in runs:
        if not attention_layers(run):
            save_result(run, "attention", dict(layers=[], limits={}))
            print(f"{run.label}: no layer of it attends")
            continue
        corpus = run.corpus()
        L = run.cfg.max_seq_len
        found = []
        limits = {}
        for length in (L, 3 * L):
            if not has_rows(corpus, length):
                limits[length] = "too little validation text"
                print(f"{run.label} at {length} tokens: {limits[length]}")
                continue
            try:
                found += attention_profiles(run, corpus, length, opts.sequences)
            except FAILURES as e:
                limits[length] = limit(e)
                print(f"{run.label} at {length} tokens: {limits[length]}")
        save_result(run, "attention", dict(layers=found, limits=limits))

        if not found:
            print(f"{run.label}: nothing to show")
        else:
            n = found[0]["sequences"]
            print(f"{run.label}: share of the last position's attention, mean of heads and {n} rows")
            head = ["layer", "tokens", "memory", "first token", f"last {RECENT} tokens",
                    "decay λ, least and most"]
            print_table(head, [attention_row(layer) for layer in found])
            draw_attention(run, found)


def draw_attention(run: Run, found: list[dict]) -> None:
    """A row a layer (at most four of them), a column a length; for layers of the mosaic also λ and
    recent attention."""
    import analyze
    # Four layers spread over the depth
    names = list(dict.fromkeys(layer["layer"] for layer in found))
    shown = list(dict.fromkeys(names[round(i * (len(names) - 1) / 3)] for i in range(4)))
    lengths = sorted({layer["length"] for layer in found})
    mosaic = any(layer["decay"] is not None for layer in found)
    rows = len(shown)
    cols = len(lengths)
    if mosaic:
        cols += 1
    figure, axes = analyze.panels(rows, cols, (1 + 3.8 * cols, 0.6 + 2.6 * rows))

    for layer in found:
        if layer["layer"] not in shown:
            continue
        row = axes[shown.index(layer["layer"])]
        column = lengths.index(layer["length"])
        trained = layer["length"] == run.cfg.max_seq_len
        colours = draw_profile(row[column], layer, trained)
        if column == 0:
            columns = 2 if layer["decay"] is None else 4
            row[0].legend(fontsize=7, frameon=False, ncols=columns, loc="upper left")
        if column == 0 and layer["decay"] is not None:
            draw_recent(row[-1], layer, colours)
        if mosaic and layer["decay"] is None:
            row[-1].set_visible(False)  # a hybrid's layers of attention have no λ
    figure.suptitle(f"{run.label}: attention of the last position (dotted: all tokens alike)",
                    fontsize=11)
    save_picture(run, "attention", figure)


def draw_profile(ax, layer: dict, trained: bool) -> list:
    """Attention against the position attended to, a curve a head -> the heads' colours."""
    from matplotlib import colormaps
    heads, T = layer["profile"].shape
    has_decay = layer["decay"] is not None
    shades = layer["decay"] if has_decay else torch.arange(heads) / heads
    colours = [colormaps["viridis"](0.9 * shade) for shade in shades.tolist()]

    # Neighbouring positions are averaged for the eye. What is out of the window gets no point.
    width = max(1, T // 96)
    shown = layer["profile"][:, T % width:].view(heads, -1, width).mean(-1)
    shown[shown == 0] = math.nan
    middle = T % width + (torch.arange(shown.size(1)) + 0.5) * width
    for head in range(heads):
        memory = layer["memory"][head].item()
        label = f"λ = {shades[head]:.2f}" if has_decay else f"head {head}"
        if memory > 0:
            label += f", memory {memory:.0%}"
        ax.plot(middle, shown[head], lw=1.1, color=colours[head], label=label)

    # the level of a head that looks at all tokens alike
    ax.axhline(1 / T, color="black", lw=1, ls=":")
    title = f"layer {layer['layer']}, {T:,} tokens"
    if trained:
        title += " (trained)"
    ax.set(yscale="log", xlim=(0, T), ylim=(0.01 / T, 1), xlabel="position attended to (tokens)",
           ylabel="attention (share)", title=title)
    return colours


def draw_recent(ax, layer: dict, colours: list) -> None:
    """What share of a head's attention is recent, against its decay λ, the leaky coefficient of
    Memory Mosaics (figure 15)."""
    recent = layer["profile"][:, -RECENT:].sum(-1)
    ax.scatter(layer["decay"], recent, c=colours, s=45)
    ax.set(xlabel="decay λ of a head", ylabel=f"last {RECENT} tokens (share)",
           xlim=(-0.02, 1.02), ylim=(0, 1))


# ----------------------------------------------------------------------------------------------------------------------
# generate

# The 24 prompts of Memory Mosaics' table 1, separated by | and wrapped
TABLE_1 = """Alice was so tired when she got back home so she went | Jack and Lily saw a rainbow
after a rainy day. They were amazed by the colors. Jack said, “Look, Lily. A rainbow has | Jack and
Lily liked to watch the moon at night. They noticed that the moon changed its shape every night.
Sometimes the moon was big and round, and sometimes it was | Jack wanted to read a book, so he went
to | “Can cows fly?”, Alice asked her mother | “What do birds like to eat?”, Tom asked his mother. |
“What language do they speak in France?”, Tom asked his mother | If I throw a ball up in the air,
eventually it will | It was winter and cold outside so his mother told him, “You should | Lily likes
cats and dogs. She asked her mom for a dog and her mom said no, so instead she asked | Jack told
Mary, ”If you give me your banana, I’ll give you my apple”. Mary gave Jack her banana so | On
weekends Jack went to visit his grandmother whereas on weekdays he would go to school. Last weekend,
when Jack was on his way to | Lily and Ben were having an argument. Ben said that cake is much
better than ice cream and Lily said that | Lily and Ben are having an argument. They are trying to
decide between the park and the swimming pool. Ben says, “I want to go to the park”. Lily says |
Jack’s mother was not home, and his father was at home. When Jack came home, he said hello to | Lily
doesn’t like swimming. When her father wants to take her to the swimming pool, she says | Both Ben
and Lily wanted cake. Father said that there was only one piece of cake left. They | Ben went to
visit Lily in her house, but she was not at home. Ben knocked on the door, | “Hi Jane, have you seen
Alice? I can’t find her anywhere”, said Jack. | Max had two dogs. One was white and the other was
black. Max walked up the street and saw a kid with a dog. He told the kid, “I see you have a brown
dog. I also have | Anne had a piece of candy in her left pocket and a piece of chocolate in her
right pocket. Anne’s mom asked her, “Anne, what is that you have in your left pocket?” | Alice had
both an apple and a carrot in her bag. She took the apple out of the bag and gave it to Jack. She
reached into the bag again and took | Alice and Jack walked up the street and met a girl in a red
dress. The girl said to them, “Hi, I’m Jane. What are your names?” | Diva was hungry, and wanted to
bake a cake, but she didn’t have any sugar at home, so she decided to go ask around. She started
walking and met a squirrel. She asked the squirrel, “Would you happen"""
PROMPTS = [" ".join(prompt.split()) for prompt in TABLE_1.split("|")]


def tells_stories(dataset: str) -> bool:
    """Is it a corpus of children's stories: TinyStories, or a file or folder of BabiStories (its
    traindataset.txt or valdataset.txt)?"""
    path = Path(dataset)
    files = path.iterdir() if path.is_dir() else [path]
    named_so = re.search(r"(\b|_|tiny|babi)stories", dataset.lower())      # and not histories
    return bool(named_so) or any(file.name.endswith(BABI_STORIES) for file in files)


def document_beginnings(corpus, documents: int = 8, tokens: int = 120, lines: int = 3) -> list[str]:
    """The first lines of the first validation documents: of each at most so many tokens and lines,
    and no more than half of it, so that there is something to continue."""
    texts = []
    for start, length in corpus.documents["val"].T.tolist():
        beginning = corpus.read("val", start, min(tokens, length // 2))
        text = corpus.encoding.decode(beginning.tolist(), errors="ignore")  # a character may be cut

        text = "\n".join(text.strip().splitlines()[:lines])
        if text and text not in texts:
            texts.append(text)
        if len(texts) == documents:
            break
    return texts


def prompts_for(run: Run, opts: Options) -> list[str]:
    """What this run is to continue: text like that which it was trained on."""
    if opts.prompt:
        return list(opts.prompt)
    if tells_stories(run.cfg.dataset):
        return PROMPTS
    return document_beginnings(run.corpus())


def continuation(run: Run, corpus, prompt: str, opts: Options) -> str:
    """What the model writes after the prompt, up to an end of text or, where it has them, its last
    learned position."""
    device = pick_device(run.cfg)
    start = torch.tensor([[corpus.eos, *encode(corpus.encoding, prompt).tolist()]], device=device)
    n = opts.new_tokens
    if getattr(run.model.body, "wpe", None) is not None:    # rmt's positions begin anew in each segment
        n = max(0, min(n, run.cfg.max_seq_len - start.size(1)))

    # A generator for each prompt, so that its answer does not depend on the other prompts.
    generator = torch.Generator(device).manual_seed(opts.seed)
    with autocast(run.cfg):
        tokens = run.model.generate(start, n, opts.temperature, generator=generator)

    # What was written, without what has no text
    tokens = tokens[0, start.size(1):].tolist()
    if corpus.eos in tokens:
        tokens = tokens[:tokens.index(corpus.eos)]
    # the model's vocabulary may be padded beyond the tokenizer's
    known = [t for t in tokens if t < corpus.vocab_size]
    return corpus.encoding.decode(known, errors="replace")


def task_generate(runs: list[Run], opts: Options) -> None:
    """Continuations, those of several runs below each other."""
    # prompt -> text, for each run
    answers = []
    for run in runs:
        corpus = run.corpus()
        texts = {prompt: continuation(run, corpus, prompt, opts) for prompt in prompts_for(run, opts)}
        answers.append(texts)
        settings = dict(new_tokens=opts.new_tokens, temperature=opts.temperature,
                        sampling_seed=opts.seed)
        listed = [dict(prompt=prompt, text=text) for prompt, text in texts.items()]
        save_result(run, "generate", dict(settings, texts=listed))

    # Runs of other corpora may have other prompts.
    width = max(len(run.label) for run in runs) + 4
    prompts = dict.fromkeys(prompt for texts in answers for prompt in texts)
    for prompt in prompts:
        print()
        for line in prompt.splitlines():
            print(textwrap.fill(line, 110))
        for run, texts in zip(runs, answers):
            if prompt in texts:
                text = texts[prompt].strip() or "(nothing)"
                label = f"  {run.label}:".ljust(width)
                print(textwrap.fill(text, 110, initial_indent=label, subsequent_indent=" " * width))


# ----------------------------------------------------------------------------------------------------------------------
# speed

DECODED = 32  # tokens read one by one at each length; their median time counts


def clock(device) -> float:
    """Seconds, after what the GPU still had to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free_memory(device) -> None:
    """Hands freed memory back to the system, so that the next model's peak is its own."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other C libraries do not
        if trim is not None:
            trim(0)


def median_ms(run: Run, token: Tensor, state) -> float:
    """Median time in ms to read one token (1,1), of several that are read one by one after
    `state`."""
    device = pick_device(run.cfg)
    times = []
    for _ in range(DECODED):
        began = clock(device)
        _, state = read_to_end(run, token, state)
        times.append(1000 * (clock(device) - began))
    return median(times)


def speed_of(run: Run, opts: Options) -> dict:
    """Reads one sequence of random tokens up to L (the training length), 2L, 4L, ... From each
    length some tokens are read one by one; the long state is unchanged by that, so reading goes on
    from it."""
    # one row of L tokens, which is read again and again
    device = pick_device(run.cfg)
    L = min(run.cfg.max_seq_len, opts.context)
    generator = torch.Generator().manual_seed(opts.seed)
    tokens = torch.randint(run.cfg.vocab_size, (1, L), generator=generator).to(device)

    points = []
    reason = None
    context = 0
    seconds = 0.0
    state = None
    try:
        read_to_end(run, tokens)  # the very first call also pays for setting up
        free_memory(device)
        reset_peak_memory(device)
        for doublings in range((opts.context // L).bit_length()):  # every L·2^doublings up to opts.context
            # read on to the next length; only reading is timed
            while context < L * 2**doublings:
                began = clock(device)
                _, state = read_to_end(run, tokens, state)
                seconds += clock(device) - began
                context += L

            # What was read counts, even where there is no memory left for decoding.
            point = dict(context=context, prefill_tokens_per_second=context / seconds,
                         state_bytes=state_bytes(state))
            try:
                point["ms_per_token"] = median_ms(run, tokens[:, :1], state)
                point.update(peak_memory_mib(device))
            finally:
                points.append(point)
    except FAILURES as e:
        reason = limit(e)
    return dict(points=points, limit=reason, reached=context)


def with_memory(run: Run, memory: str) -> RunConfig:
    """The run's configuration with another memory. Raises UserError if there is no such model."""
    return checked(RunConfig, **dict(vars(run.cfg), memory=memory, memory_layers="all"))


def untrained(run: Run, memory: str, opts: Options) -> Run:
    """A model of the run's shape with another memory: what its weights are does not change how long
    it takes."""
    cfg = with_memory(run, memory)
    torch.manual_seed(opts.seed)
    model = GPT(cfg.architecture()).eval().to(pick_device(cfg))
    other = run._replace(model=model, cfg=cfg)
    return other._replace(label=f"{other.condition()} (untrained)")


def task_speed(runs: list[Run], opts: Options) -> None:
    """What a context costs, in time and memory."""
    # What cannot be built is refused before anything is measured.
    for run, memory in itertools.product(runs, opts.other_memories()):
        with_memory(run, memory)
    measured = []
    rows = []
    for run in runs:
        models = {}
        for memory in [None, *opts.other_memories()]:  # None: the run itself
            if memory == run.cfg.memory and run.cfg.memory_layers == "all":
                continue
            subject = run if memory is None else untrained(run, memory, opts)
            result = speed_of(subject, opts)
            models[subject.label] = result
            measured.append((subject._replace(model=None), result))  # its weights may be freed
            rows += speed_rows(subject.label, result)
            tell_limit(subject.label, result)
        save_result(run, "speed", dict(models=models))
    print_table(["model", "context", "prefill tokens/s", "ms a token", "state bytes", "peak MiB"], rows)
    draw_speed(measured, runs[0])


def speed_rows(label: str, result: dict) -> list[list]:
    """A model's lines in the table."""
    rows = []
    for point in result["points"]:
        peak = peak_mib(point)
        rows.append([label, f"{point['context']:,}", f"{point['prefill_tokens_per_second']:,.0f}",
                     point.get("ms_per_token"), f"{point['state_bytes']:,}",
                     f"{peak:,.0f}" if peak else None])
    return rows


def draw_speed(measured: list[tuple[Run, dict]], first: Run) -> None:
    """Four panels against the context: prefill, decoding, state, peak memory."""
    import analyze
    quantities = {"prefill_tokens_per_second": "prefill (tokens a second)",
                  "ms_per_token": "decoding (ms a token)",
                  "state_bytes": "state of one sequence (bytes)"}
    if pick_device(first.cfg).type == "cuda":
        quantities["peak_vram_mib"] = "peak GPU memory (MiB)"
    else:
        quantities["peak_rss_mib"] = "peak memory of the process (MiB)"

    # a tick at every second context
    contexts = set()
    for _, result in measured:
        contexts.update(point["context"] for point in result["points"])
    ticks = sorted(contexts)[::2]
    names = [f"{context:,}" for context in ticks]

    figure, axes = analyze.panels(2, 2, (9.5, 7.2))
    for ax, (name, label) in zip(axes.flat, quantities.items()):
        ax.set(xscale="log", xlabel="context (tokens)", ylabel=label)
        draw_quantity(ax, name, measured)
        ax.set_xticks(ticks, names)
        ax.xaxis.minorticks_off()
        ax.yaxis.set_major_formatter(analyze.human)
    limited = any(result["limit"] for _, result in measured)
    title = "x: the model or the machine goes no further" if limited else None
    legend_below(figure, axes[0, 0], title)
    save_picture(first, "speed", figure)


def draw_quantity(ax, name: str, measured: list[tuple[Run, dict]]) -> None:
    """One measured quantity of every model; a cross marks the last point of a model that goes no
    further."""
    from matplotlib.ticker import LogLocator
    styles = looks([run for run, _ in measured])
    for (run, result), style in zip(measured, styles):
        points = [point for point in result["points"] if name in point]
        contexts = [point["context"] for point in points]
        values = [point[name] for point in points]
        ax.plot(contexts, values, label=run.label, **style)
        if points:  # an axis without a point cannot be logarithmic
            ax.set_yscale("log", subs=[])
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        if points and result["limit"]:
            ax.plot(contexts[-1], values[-1], "x", color=style["color"], ms=12, mew=2)


# ----------------------------------------------------------------------------------------------------------------------
# main

TASKS = {
    "bpb": task_bpb,
    "position": task_position,
    "extend": task_extend,
    "ood": task_ood,
    "copy": task_copy,
    "carry": task_carry,
    "niah": task_niah,
    "attention": task_attention,
    "generate": task_generate,
    "speed": task_speed,
}


def note_unused(opts: Options) -> None:
    """Names the given options that none of the chosen tasks reads, and goes on."""
    for f in fields(Options):
        readers = f.metadata["group"]
        is_read = readers == "every task" or set(readers.split(", ")) & set(opts.tasks())
        if not is_read and getattr(opts, f.name) != f.default:
            print(f"note: --{f.name} changes nothing, because only these tasks read it: {readers}")


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0, 2 after bad input, 130 after Ctrl-C"""
    try:
        paths, opts = parse_args(sys.argv[1:] if argv is None else argv)
        check_one_process("eval.py")
        note_unused(opts)
        runs = open_runs(paths, opts)
        with memory_ceiling(pick_device(runs[0].cfg)):
            for name in opts.tasks():
                print(f"\n{name}", flush=True)
                TASKS[name](runs, opts)
                for run in runs:
                    print(f"-> {run.folder / f'eval_{name}.json'}")
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; the tasks that were told with -> are saved", file=sys.stderr)
        return 130
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
