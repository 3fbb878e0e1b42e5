"""What a folder of result files says: seed-paired statistics, tables, figures and REPORT.md. Imports no torch.

    python analyze.py results/ [more folders] [--out=DIR] [--by=key,key]

Reading order
    reading     result files -> Run; files that can't be read are named, skipped and counted
    cells       runs of one condition and many seeds; a cell that mixes configurations is an error
    statistics  paired t, exact sign-flip, Holm, closure, gain-deficit correlation, Pareto frontier, matched compute
    tables      what REPORT.md holds           figures     what stands beside it           main        the command line

Glossary
    run         one training run = one result file        cell      all runs of one condition, one per seed
    study       cells that may be compared: same preset, same data; comparisons stay within one context length T
    local       no memory, windowed attention (SSSL)      global    no memory, full attention (L)
    bpb         bits per byte; mBPB = 0.001 bpb, the unit of every difference (negative = better than the baseline)
    D(p)        positional deficit: local - global bpb at position p, what the window costs there
    G(p)        gain of a memory: local - memory bpb      closure   ΣG/ΣD, the share of the deficit it wins back
    seed pair   two runs with one seed see the same batches in the same order, so their difference has less noise

Exit status: 0 all read, 1 some files skipped (the report is written from the others), 2 bad input.

References
    Holm 1979, a simple sequentially rejective multiple test procedure; Fisher 1935, the design of experiments (the
    sign-flip test); Hesterberg 2015 (arXiv 1411.5279) on how the bootstrap undercovers at small n; Pearson 1897 on the
    spurious correlation of quantities that share a term. The palette is Okabe and Ito's.
"""
import argparse
import io
import itertools
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first, so that no display is needed)

PEER = "memory-bench"    # stands for the dataset, which that project's files don't name
MIN_SEEDS = 3            # with fewer pairs a standard deviation says nothing, so no number is printed
BOOTSTRAP = 10_000
NOT_ENOUGH = "not enough seeds"
COSTS = {"minutes": "training time (minutes)", "flops": "training compute (FLOPs)", "state_bytes": "state (bytes)"}
# where and how a run was executed, not what was trained: these may differ inside a cell
EXECUTION = {"seed", "name", "out_dir", "device", "device_batch_size", "compile", "sample_tokens"}
# settings that one memory alone reads, told by prefix or by name; elsewhere they mean nothing
OWNER = {"conv_width": "deltanet", "expand_v": "deltanet"}
OWNERS = {"persistent", "rmt", "ttt", "knn", "mosaic", "deltanet"}


CONDITIONS = {           # what their names mean, for the report
    "local": "no memory; attention, in most layers to a short window only",
    "global": "no memory; attention to all of the past in every layer",
    "persistent": "attention that also sees learned key/value slots, the same in every sequence",
    "rmt": "reads in segments; memory tokens, read before each and written after it, carry the past on",
    "rmt-0": "the segments of rmt with 0 memory tokens: the baseline that shows what rmt's memory is worth",
    "ttt": "in place of attention a linear model per head, trained by gradient descent while it reads",
    "deltanet": "in place of attention a matrix per head, written and erased by the gated delta rule",
    "knn": "attention to a short window and to the nearest keys in a store of what has left it",
    "mosaic": "contextual associative memories in place of attention, persistent ones in place of the MLP"}


class UserError(Exception):
    """Bad input: main prints the sentence after `error:` and exits 2."""


# ----------------------------------------------------------------------------------------------------------------------
# One name, one look, one table, one kind of picture for a condition. train.py, eval.py and toys.py call these too.

USUAL_WINDOW = "SSSL"    # this pattern of attention layers is left out of a condition's name
# these take the place of a layer's attention, or see a window of their own, so that the pattern does not reach them
NO_PATTERN = {"ttt", "deltanet", "knn", "mosaic"}
# Okabe and Ito's colours, which colour-blind readers can tell apart. The markers tell them apart in grey.
LOOKS = {
    "local": dict(color="#000000", marker="o"),
    "global": dict(color="#7f7f7f", marker="s"),
    "persistent": dict(color="#0072B2", marker="^"),
    "rmt": dict(color="#D55E00", marker="v"),
    "rmt-0": dict(color="#D55E00", marker="<"),
    "ttt": dict(color="#009E73", marker="D"),
    "deltanet": dict(color="#CC79A7", marker="P"),
    "knn": dict(color="#E69F00", marker="X"),
    "mosaic": dict(color="#56B4E9", marker="p"),
}
OTHER_LOOK = dict(color="#994F00", marker="h")


def attention_name(window: str) -> str:
    """The name of a run without a memory: it follows from which layers see all of the past (L) and which don't (S)."""
    if set(window) == {"L"}:
        return "global"
    return "local"


def sees_pattern(settings: dict) -> bool:
    """Does any layer of this run attend as the window pattern says?"""
    return settings.get("memory") not in NO_PATTERN or settings.get("memory_layers", "all") != "all"


def condition(settings: dict) -> str:
    """The name of what a run tests, from its settings: memory, memory_layers, window, rmt_tokens.

        local, global    no memory                             rmt-0        rmt without memory tokens
        ttt@1+3          the memory in layers 1 and 3 only     local SL     another window pattern than SSSL

    A setting that is missing has its default. The pattern stands behind the name only if attention layers follow it.
    """
    memory = settings.get("memory", "none")
    layers = settings.get("memory_layers", "all")
    window = settings.get("window", USUAL_WINDOW)

    if memory == "none":
        name = attention_name(window)
    elif memory == "rmt" and settings.get("rmt_tokens", 16) == 0:
        name = "rmt-0"
    else:
        name = memory

    if memory != "none" and layers != "all":
        name += f"@{layers}"
    if name != "global" and window != USUAL_WINDOW and sees_pattern(settings):
        name += f" {window}"
    return name


def base_name(name: str) -> str:
    """A condition without what follows its memory: "ttt@1+3 SL" -> "ttt", memory-bench's "rmt-m16-s512" -> "rmt"."""
    first_word = re.split("[ @]", name)[0]
    return first_word if first_word in LOOKS else first_word.split("-")[0]


def look(name: str) -> dict:
    """Colour and marker of a condition, as matplotlib's plot takes them: the same in every figure."""
    return dict(LOOKS.get(base_name(name), OTHER_LOOK))


def cell_text(cell) -> str:
    """How a table shows a value."""
    if cell is None:
        return "-"
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)


def table(head: list[str], rows: list[list], left: int = 1) -> str:
    """An aligned Markdown table. It reads well on a terminal too.

    The first `left` columns are aligned to the left, the others to the right. A float gets 4 decimals, None becomes
    "-". Without rows there is no table: the text is empty.
    """
    if not rows:
        return ""
    lines = [head] + [[cell_text(cell) for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def aligned(cells: list[str]) -> str:
        padded = []
        for i, (cell, width) in enumerate(zip(cells, widths)):
            padded.append(cell.ljust(width) if i < left else cell.rjust(width))
        return "| " + " | ".join(padded) + " |\n"

    # the colon at the end of its dashes is how Markdown knows a column that is aligned to the right
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return aligned(head) + aligned(rule) + "".join(aligned(line) for line in lines[1:])


def panels(rows: int, cols: int, size: tuple, **more):
    """A figure of `size` (width, height) inches and its rows × cols axes; `more` goes to matplotlib's subplots."""
    figure, axes = plt.subplots(rows, cols, figsize=size, squeeze=False, layout="constrained", **more)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def picture(figure) -> bytes:
    """The figure as a PNG. The figure is closed, so that matplotlib does not keep it."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    return png.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Reading. A file that can't be used raises ValueError with the reason; read_all collects these.

@dataclass
class Run:
    path: str
    preset: str
    dataset: str
    memory: str               # "none", "deltanet", ...; memory-bench's own names keep their suffix: "rmt-m16-s512"
    layers: str
    window: str
    T: int
    seed: int
    bpb: float
    curve: dict               # position -> bpb of that bucket
    tokens: list              # bytes in each bucket: equal for two curves measured on the same tokens
    recombined: float | None  # Σnats / (ln2 Σbytes) over the buckets: has to be bpb again
    costs: dict               # minutes, flops, state_bytes, ...; what is absent was not recorded
    log: list                 # {step, seconds, tokens, val_bpb}
    config: dict              # everything that has to agree inside a cell


def finite(x) -> bool:
    """JSON written by Python may hold NaN; true and false are no numbers."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def recombine(nats, nbytes) -> float:
    """bpb of several buckets together. The ratio of the sums, never the mean of the ratios."""
    return float(np.sum(nats) / (math.log(2) * np.sum(nbytes)))


def read_curve(d: dict) -> tuple[dict, list, float]:
    """bpb by position in either schema -> {position: bpb}, bytes, recombined total. Empty buckets are left out."""
    try:
        if "buckets" in d:                                            # memory-bench: {"0-64": {"bpb": 1.30}}
            curve = {int(k.split("-")[0]): float(v["bpb"]) for k, v in d["buckets"].items()}
            total, nbytes = float(np.mean(list(curve.values()))), []  # a mean of ratios is all that it records
        else:
            rows = [row for row in zip(d["positions"], d["nats"], d["bytes"], strict=True) if row[2] > 0]
            curve = {int(position): recombine(nats, nb) for position, nats, nb in rows}
            total, nbytes = recombine([r[1] for r in rows], [r[2] for r in rows]), [r[2] for r in rows]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"bpb_by_position is malformed ({type(e).__name__}: {e})") from e
    if not curve or not np.isfinite(list(curve.values())).all():
        raise ValueError("bpb_by_position is empty or holds a value that is not finite")
    return dict(sorted(curve.items())), nbytes, total


def read_run(path: Path) -> Run | None:
    """One file -> Run; None for a JSON file that is something else; ValueError for one that is broken or partial."""
    if path.name.startswith("eval_"):                                 # eval.py's: its run has a result.json besides
        return None
    d = json.loads(path.read_text(encoding="utf-8"))
    if not (isinstance(d, dict) and d.keys() & {"memory", "mechanism", "val_bpb"}):
        if path.name != "result.json":
            return None
        raise ValueError("holds none of memory, mechanism, val_bpb")
    memory, config, T = d.get("memory", d.get("mechanism")), d.get("config") or {}, d.get("max_seq_len", 2048)
    position, log = d.get("bpb_by_position") or {}, d.get("log") or d.get("curve") or []
    if not finite(d.get("val_bpb")):
        raise ValueError(f"val_bpb is {d.get('val_bpb', 'missing')!r}, expected a finite number: did the run diverge?")
    for name, value, kind in (("memory", memory, str), ("seed", d.get("seed"), int), ("max_seq_len", T, int),
                              ("config", config, dict), ("bpb_by_position", position, dict), ("log", log, list)):
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r:.40}, expected {kind.__name__}")
    if memory == "rmt" and config.get("rmt_tokens") == 0:
        memory = "rmt-0"                                              # RMT's fair baseline: its segments, no memory
    memory = "none" if memory == "baseline" else memory
    costs = {**d, "minutes": d.get("total_time_min"), "flops": d.get("total_flops"),
             "peak_mib": d.get("peak_vram_mib") or d.get("peak_rss_mib")}
    costs = {k: v for k, v in costs.items() if finite(v)}
    if {"flops_per_token", "train_tokens"} <= costs.keys():
        costs["flops"] = costs["flops_per_token"] * costs["train_tokens"]
    agree = "depth dataset data_sha256 train_tokens total_params memory_params flops_per_step device".split()
    peer = {"preset": f"d{d.get('depth', '')}", "dataset": PEER, "window": d.get("window_pattern")}
    whole = ({} if "memory" in d else peer) | config | d
    return Run(str(path), str(whole.get("preset") or ""), str(whole.get("dataset") or ""), memory,
               str(config.get("memory_layers", "all")) if memory != "none" else "all",
               str(whole.get("window") or "SSSL"), T, d["seed"], float(d["val_bpb"]),
               *(read_curve(position) if position else ({}, [], None)), costs,
               [e for e in log if isinstance(e, dict) and finite(e.get("val_bpb"))],
               config | {k: d[k] for k in agree if k in d})


def read_all(folders) -> tuple[list[Run], list[str], list[str]]:
    """Every *.json below the folders -> runs, skipped (with the reason), other JSON files that are no results."""
    runs, skipped, others, seen = [], [], [], set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the folders that hold the result files")
        for path in sorted(folder.rglob("*.json")):
            if path.resolve() in seen:                                # the same file by two ways is one run
                continue
            seen.add(path.resolve())
            try:
                run = read_run(path)
                runs.append(run) if run else others.append(str(path))
            except (ValueError, OSError, RecursionError) as e:        # a JSON or Unicode error is a ValueError
                skipped.append(f"{path}: {e}")
    if not runs:
        first = f"; the first of {len(skipped)} skipped is {skipped[0]}" if skipped else ", expected <run>/result.json"
        raise UserError(f"no readable result file below {', '.join(map(str, folders))}{first}")
    return runs, skipped, others


# ----------------------------------------------------------------------------------------------------------------------
# Cells

@dataclass
class Cell:
    study: tuple              # (preset, dataset)
    T: int
    label: str                # unique within (study, T)
    runs: dict                # seed -> Run
    one: Run                  # the first of them: what they share is read here

    def bpb(self) -> dict:
        return {seed: run.bpb for seed, run in self.runs.items()}

    def mean(self) -> float:
        return float(np.mean(list(self.bpb().values())))

    def costs(self, name) -> list:
        return [r.costs[name] for r in self.runs.values() if name in r.costs]


def owner(key: str) -> str | None:
    """The memory that alone reads this setting, None for a setting that every run reads."""
    name = OWNER.get(key, key.split("_")[0])
    return name if name in OWNERS else None


def relevant(key: str, memory: str) -> bool:
    """Does this setting change what a run with this memory computes?"""
    mine = owner(key) is None or memory.startswith(owner(key))
    return mine and key not in EXECUTION and not key.endswith("_every")


def differing(a: Run, b: Run) -> dict:
    """key -> the two values, for every setting that matters to either run and isn't the same in both."""
    keys = sorted(k for k in a.config | b.config if relevant(k, a.memory) or relevant(k, b.memory))
    pairs = ((k, (a.config.get(k, "not recorded"), b.config.get(k, "not recorded"))) for k in keys)
    return {k: pair for k, pair in pairs if pair[0] != pair[1]}


def kind(cell: Cell) -> str:
    return re.split("[ @]", cell.label)[0]


def make_cells(runs, by=()) -> tuple[list[Cell], list[str]]:
    """Group runs by condition. A seed counts once: of several files the first read is kept (never the better one)."""
    cells, repeats = {}, []
    for key in (key for key in by if not any(key in run.config for run in runs)):
        raise UserError(f"--by={key}: no run has such a setting; give names of settings such as n_layer or lr")
    for run in runs:
        name = run.memory if run.memory != "none" else "global" if set(run.window) == {"L"} else "local"
        extra = "".join(f" {k}={run.config[k]}" for k in by if k in run.config and relevant(k, run.memory))
        label = f"{name}{'' if run.layers == 'all' else '@' + run.layers} ({run.window}){extra}"
        key = (run.preset, run.dataset), run.T, label
        cell = cells.setdefault(key, Cell(*key, {}, run))
        if diff := differing(cell.one, run):
            what = "; ".join(f"{k} is {a!r} in the first, {b!r} in the second" for k, (a, b) in diff.items())
            raise UserError(f"the cell '{label}, T={run.T}' mixes configurations ({cell.one.path} and {run.path}): "
                            f"{what}; separate the files, or make the keys part of it: --by={','.join(diff)}")
        if kept := cell.runs.get(run.seed):
            repeats.append(f"seed {run.seed} of {label}, T={run.T}: {kept.path} is kept, {run.path} is left out (these "
                           f"two runs of one seed differ by {abs(kept.bpb - run.bpb) * 1000:.2f} mBPB)")
        else:
            cell.runs[run.seed] = run
    first = {"local": 0, "global": 1}
    return sorted(cells.values(), key=lambda c: (c.study, c.T, first.get(kind(c), 2), c.label)), repeats


def baseline(cell: Cell, cells, *names) -> Cell | None:
    """The first of `names` (local, global, rmt-0) that this study and T have; of several, the one most like `cell`."""
    fits = [c for c in cells if (c.study, c.T) == (cell.study, cell.T) and kind(c) in names]
    return min(fits, default=None, key=lambda c: (names.index(kind(c)), c.one.window != cell.one.window,
                                                  len(differing(c.one, cell.one))))


# ----------------------------------------------------------------------------------------------------------------------
# Statistics. Everything is over seeds; positions and tokens of one run are no independent repetitions.

def t_interval(x) -> tuple[float, float, float]:
    """Mean and 95% t interval."""
    x = np.asarray(x, float)
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def sign_flip(diffs) -> float:
    """Exact two-sided p: if the memory did nothing, each seed's difference could as well have had the other sign.

    All 2^n signs are tried, so p is never below 2/2^n: 0.25 for three seeds, below 0.05 only from six seeds on.
    """
    diffs, sums = np.asarray(diffs, float), np.zeros(1)
    if len(diffs) > 20:                                               # 2^20 sums are 8 MB; beyond, draw signs instead
        sums = np.random.default_rng(0).choice([-1.0, 1.0], (100_000, len(diffs))) @ diffs
        sums = np.append(sums, diffs.sum())                           # the observed signs are one of the draws
    else:
        for d in diffs:
            sums = np.concatenate([sums + d, sums - d])
    return float(np.mean(np.abs(sums) >= abs(diffs.sum()) - 1e-12 * np.abs(diffs).sum()))


def holm(ps) -> list[float]:
    """Holm's adjusted p values, in the order given. NaN = a test that could not be made: not in the family."""
    order, out, running = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p)), [math.nan] * len(ps), 0.0
    for rank, (p, i) in enumerate(order):
        running = out[i] = max(running, min(1.0, (len(order) - rank) * p))
    return out


@dataclass
class Paired:
    seeds: list
    diffs: list               # a - b, seed by seed
    mean: float = math.nan    # from here on NaN below MIN_SEEDS
    lo: float = math.nan
    hi: float = math.nan
    p_t: float = math.nan
    p_flip: float = math.nan


def paired(a: dict, b: dict) -> Paired:
    """a - b over the seeds that both have. a, b: seed -> value."""
    seeds = sorted(a.keys() & b.keys())
    diffs = [a[s] - b[s] for s in seeds]
    if len(seeds) < MIN_SEEDS:
        return Paired(seeds, diffs)
    # equal differences have no spread to divide by: t is not defined, the sign-flip test still is
    p_t = float(stats.ttest_1samp(diffs, 0.0).pvalue) if np.ptp(diffs) > 1e-15 else math.nan
    return Paired(seeds, diffs, *t_interval(diffs), p_t, sign_flip(diffs))


def closure(G, D) -> tuple[float, float, float] | str:
    """ΣG/ΣD with a 95% interval, or the words that say why there is none. G, D: one sum over positions per seed.

    A ratio means nothing where its denominator may be 0, so it is `undefined` unless ΣD's own interval lies above 0.
    Seeds are resampled in pairs (G, D). The percentiles of the resampled ratios would cover at most 75% for n = 3 (they
    never leave the seeds' range), so their standard error is taken instead: freed of its small-sample bias by
    sqrt(n/(n-1)), and multiplied by Student's t.
    """
    G, D, n = np.asarray(G, float), np.asarray(D, float), len(D)
    if n < MIN_SEEDS:
        return NOT_ENOUGH
    if t_interval(D)[1] <= 0:
        return "undefined"
    draw = np.random.default_rng(0).integers(0, n, (BOOTSTRAP, n))
    ratio, ratios = float(G.sum() / D.sum()), G[draw].sum(1) / D[draw].sum(1)
    half = float(stats.t.ppf(0.975, n - 1) * math.sqrt(n / (n - 1)) * ratios.std())
    return ratio, ratio - half, ratio + half


def corr(x, y) -> float:
    """Pearson's r; NaN where one of them is constant."""
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else math.nan


def gain_deficit(local, memory, full) -> tuple[float, list, float]:
    """Correlation over positions of G = local - memory and D = local - full, with the null it has to beat.

    All (n, P): seeds × positions. Noise in `local` enters G and D alike, so that r is about 0.5 where nothing is there
    but noise. Two answers to that:
      null   r of noise alone: each seed's deviation from its condition's mean, summed with every choice of signs
      split  G from some seeds and D from the others, averaged over all splits: they share no run, so noise gives 0 (and
             understates a true correlation, since each part averages fewer seeds)
    """
    G, D, n = np.subtract(local, memory), np.subtract(local, full), len(local)
    signs = itertools.islice(itertools.product([1.0, -1.0], repeat=n - 1), 1, 513)  # r doesn't see the overall sign
    null = [corr(np.array([1.0, *s]) @ (G - G.mean(0)), np.array([1.0, *s]) @ (D - D.mean(0))) for s in signs]
    halves = [A for size in {n // 2, n - n // 2} for A in itertools.islice(itertools.combinations(range(n), size), 256)]
    split = [corr(G[list(A)].mean(0), np.delete(D, A, axis=0).mean(0)) for A in halves]
    return corr(G.mean(0), D.mean(0)), null, float(np.mean(split))


def pareto(points) -> list[int]:
    """Indexes of the points (cost, bpb) that no other point beats: nowhere worse and somewhere better."""
    return [i for i, (x, y) in enumerate(points)
            if not any(u <= x and v <= y and (u < x or v < y) for u, v in points)]


def log_curve(run: Run, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """The logged validation curve: cost so far (`minutes` or `flops`), bpb."""
    key, unit = ("seconds", 1 / 60) if cost == "minutes" else ("tokens", run.costs.get("flops_per_token", 0))
    points = sorted((e[key] * unit, e["val_bpb"]) for e in run.log if finite(e.get(key)) and e[key] * unit > 0)
    return np.array([p[0] for p in points]), np.array([p[1] for p in points])


def at_budget(run: Run, cost: str, budget: float) -> float:
    """bpb once `budget` was spent, linear in log(cost) between logged points; NaN outside: nothing is extrapolated."""
    x, y = log_curve(run, cost)
    inside = len(x) and x[0] * (1 - 1e-9) <= budget <= x[-1] * (1 + 1e-9)
    return float(np.interp(math.log(budget), np.log(x), y)) if inside else math.nan


# ----------------------------------------------------------------------------------------------------------------------
# Tables

def human(x) -> str:
    """1234567 -> 1.23M."""
    x = float(f"{x:.3g}")                                             # first, so that 999999 is 1M and not 1e+03k
    k = min(int(math.log10(abs(x)) // 3), 7) if abs(x) >= 1000 else 0
    return f"{x / 1000 ** k:.3g}{['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z'][k]}"


def interval(mean, lo, hi, scale=1000.0) -> str:
    return NOT_ENOUGH if math.isnan(mean) else f"{mean * scale:+.2f} [{lo * scale:+.2f}, {hi * scale:+.2f}]"


def show_p(p, adjusted) -> str:
    return "–" if math.isnan(p) else f"{p:.3g} ({adjusted:.3g})"


def score_table(cells) -> str:
    """The score beside what it costs. Medians, so that one run on a slower machine doesn't move them; the range of the
    minutes tells of it."""
    rows = []
    names = "total_params memory_params flops_per_token state_bytes tokens_per_second minutes peak_mib".split()
    for c in cells:
        sd = f" ± {np.std(list(c.bpb().values()), ddof=1):.5f}" if len(c.runs) > 1 else ""
        costs = [human(np.median(c.costs(k))) if c.costs(k) else "–" for k in names]
        if (t := c.costs("minutes")) and max(t) > 1.1 * min(t):
            costs[5] += f" ({min(t):.3g}–{max(t):.3g})"
        rows.append([c.T, c.label, len(c.runs), f"{c.mean():.5f}{sd}", *costs])
    return table("T|condition|n|bpb|parameters|more than memory=none|FLOPs/token|state bytes|tokens/s|minutes|peak MiB".split("|"), rows, left=2)


def comparisons(cells) -> list:
    """(cell, baseline, Paired): every condition against local and against global, rmt also against its own segments."""
    pairs = [(c, baseline(c, cells, name)) for c in cells if kind(c) != "local" for name in ("local", "global", "rmt-0")
             if name != "rmt-0" or c.one.memory.startswith("rmt")]
    return [(c, b, paired(c.bpb(), b.bpb())) for c, b in pairs if b and b is not c]


def mechanism_table(cells) -> str:
    """One family of tests."""
    family = comparisons(cells)
    adjusted = zip(holm([p.p_t for *_, p in family]), holm([p.p_flip for *_, p in family]))
    rows = [[c.T, c.label, b.label, len(p.seeds), interval(p.mean, p.lo, p.hi), show_p(p.p_t, t), show_p(p.p_flip, f)]
            for (c, b, p), (t, f) in zip(family, adjusted)]
    own = {"memory", "memory_layers", "window", "total_params", "memory_params", "flops_per_step"}
    notes = [f"- {c.label} and {b.label}: {', '.join(extra)}\n" for c, b, _ in family
             if (extra := [k for k in differing(c.one, b.one) if k not in own and not owner(k)])]
    return (table("T|condition|against|n|Δ mBPB [95% CI]|t test p (Holm)|sign-flip p (Holm)".split("|"), rows, left=3)
            + ("\nNot only memory and window differ here:\n\n" if notes else "") + "".join(dict.fromkeys(notes)))


def position_curves(cells):
    """(memory cell, positions, local, memory, global) wherever all three are there; curves (n, P), seed by seed.

    Curves compare only when they were measured on the same tokens: same positions, same bytes in each.
    """
    for c in cells:
        three = baseline(c, cells, "local"), c, baseline(c, cells, "global")
        if c.one.memory == "none" or None in three:
            continue
        shared = [[x.runs[s] for x in three] for s in sorted(set.intersection(*(set(x.runs) for x in three)))]
        grid = next(((list(r.curve), r.tokens) for r, *_ in shared if r.curve), None)
        same = [row for row in shared if grid and all((list(r.curve), r.tokens) == grid for r in row)]
        if same:
            yield c, grid[0], *(np.array([list(row[k].curve.values()) for row in same]) for k in range(3))


def recombination(cells) -> str:
    runs = [r for c in cells for r in c.runs.values() if r.curve]
    worst = max(runs, key=lambda r: abs(r.recombined - r.bpb), default=None)
    if worst is None or abs(worst.recombined - worst.bpb) <= 1e-6 * worst.bpb:
        return f"The position buckets of all {len(runs)} curves recombine to val_bpb.\n"
    blind = "" if worst.tokens else (" The files don't record a bucket's bytes either, so that curves measured on "
                                     "different tokens can't be told apart.")
    return (f"**The position buckets do not recombine to val_bpb**: {worst.path} gives {worst.recombined:.5f}, val_bpb "
            f"is {worst.bpb:.5f}. D and G then measure another quantity, or other tokens, than val_bpb.{blind}\n")


def position_table(cells) -> str:
    rows = []
    for c, positions, local, memory, full in position_curves(cells):
        n, D, G = len(local), (local - full).sum(1), (local - memory).sum(1)
        if n < MIN_SEEDS:
            rows.append([c.T, c.label, n, NOT_ENOUGH, *["–"] * 5])
            continue
        share, (r, null, split) = closure(G, D), gain_deficit(local, memory, full)
        per = 1000 / len(positions)
        rows.append([c.T, c.label, n, interval(*t_interval(D), per), interval(*t_interval(G), per),
                     share if isinstance(share, str) else interval(*share, 1), f"{r:.2f}",
                     f"{np.mean(null):.2f}, highest of {len(null)}: {max(null):.2f}", f"{split:.2f}"])
    text = table("T|memory|n|mean D mBPB [95% CI]|mean G mBPB [95% CI]|closure ΣG/ΣD [95% CI]|r(G, D)|r of noise alone|r, split seeds".split("|"), rows, left=2)
    return text + ("\n" + recombination(cells) if rows else "")


def frontiers(cells):
    """(T, name of the cost, [(cost, bpb, cell)], indexes on the frontier) wherever two conditions recorded the cost."""
    for T, cost in itertools.product(sorted({c.T for c in cells}), COSTS):
        points = sorted(((float(np.median(c.costs(cost))), c.mean(), c) for c in cells if c.T == T and c.costs(cost)),
                        key=lambda p: p[:2])
        if len(points) > 1:
            yield T, cost, points, pareto([p[:2] for p in points])


def frontier_table(cells) -> str:
    rows = [[T, COSTS[cost], ", ".join(points[i][2].label for i in best), len(points)]
            for T, cost, points, best in frontiers(cells)]
    return table("T|cost|not beaten by any other|compared".split("|"), rows, left=3)


def matched_table(cells) -> str:
    """bpb at the largest budget that every run of a context length has reached, and the paired difference there."""
    rows = []
    for T, cost in itertools.product(sorted({c.T for c in cells}), ("flops", "minutes")):
        logged = [c for c in cells if c.T == T and all(len(log_curve(r, cost)[0]) for r in c.runs.values())]
        if len(logged) < 2:
            continue
        budget = min(log_curve(r, cost)[0][-1] for c in logged for r in c.runs.values())
        at = {c.label: {s: at_budget(r, cost, budget) for s, r in c.runs.items()} for c in logged}
        at = {label: {s: v for s, v in of.items() if not math.isnan(v)} for label, of in at.items()}
        for c in logged:
            there, b = at[c.label], baseline(c, logged, "local", "global")
            p = paired(there, at[b.label]) if b and b is not c else None
            rows.append([T, f"{human(budget)} {'FLOPs' if cost == 'flops' else cost}", c.label, len(there),
                         f"{np.mean(list(there.values())):.5f}" if there else "first evaluated later",
                         *([b.label, interval(p.mean, p.lo, p.hi)] if p else "––")])
    return table("T|budget|condition|n|bpb there|against|Δ mBPB [95% CI]".split("|"), rows, left=3)


# ----------------------------------------------------------------------------------------------------------------------
# Figures. Seeds are small points, means are lines or large markers; colour and marker both tell the condition.

def cut(values) -> float:
    """How far an axis reaches, so that one outlier doesn't flatten the rest; what lies beyond is told by an arrow."""
    values = np.abs(np.asarray(values, float))
    return float(min(values.max(), 5 * np.median(values) or values.max()))


def figure_differences(cells):
    """Difference from local, paired by seed: seeds, mean, 95% CI; one panel per context length."""
    rows = [(c, b, p) for c, b, p in comparisons(cells)
            if p.seeds and (b is baseline(c, cells, "local", "global") or kind(b) == "rmt-0")]
    if not rows:
        return None
    lengths = sorted({c.T for c, *_ in rows})
    heights = [0.9 + 0.42 * sum(c.T == T for c, *_ in rows) for T in lengths]
    fig, axes = panels(len(lengths), 1, (8, 0.5 + sum(heights)), sharex=True, height_ratios=heights)
    far = 1000 * cut([np.mean(p.diffs) for *_, p in rows])
    ends = [0.0, *(1000 * x for *_, p in rows if abs(np.mean(p.diffs)) * 1000 <= far for x in (*p.diffs, p.lo, p.hi))]
    left, right = np.nanmin(ends), np.nanmax(ends)
    for ax, T in zip(axes[:, 0], lengths):
        here = [r for r in rows if r[0].T == T]
        for y, (c, b, p) in enumerate(here):
            (colour, marker), mean = look(c.label).values(), 1000 * float(np.mean(p.diffs))
            if abs(mean) > far:
                x, arrow, ha = (right, "→", "right") if mean > 0 else (left, "←", "left")
                ax.text(x, y, f"{mean:+.1f} {arrow}", color=colour, weight="bold", ha=ha, va="center")
                continue
            ax.plot(1000 * np.array(p.diffs), [y + 0.22] * len(p.diffs), marker, color=colour, ms=6, alpha=0.8, mew=0)
            if not math.isnan(p.mean):
                ax.plot([1000 * p.lo, 1000 * p.hi], [y - 0.08] * 2, color=colour, lw=2)
                ax.plot(mean, y - 0.08, "|", color=colour, ms=13, mew=3)
        ax.axvline(0, color="black", lw=1)
        usual = f"against {here[0][1].label}"
        names = [f"{c.label}, n={len(p.seeds)}\nagainst {b.label}".removesuffix(f"\n{usual}") for c, b, p in here]
        ax.set(yticks=range(len(here)), yticklabels=names, ylim=(len(here) - 0.4, -0.6), title=f"T = {T}, {usual}")
        ax.margins(x=0.03)
    axes[-1, 0].set_xlabel("bpb difference, paired by seed (mBPB; left is better)")
    return fig


def figure_position(cells):
    """D(p) and G(p) of every memory that has a local and a global baseline."""
    found = list(position_curves(cells))
    if not found:
        return None
    cols, rows = min(3, len(found)), -(-len(found) // 3)
    fig, axes = panels(rows, cols, (max(5, 3.3 * cols), 2.6 * rows + 0.3))
    for ax in axes.flat[len(found):]:
        ax.set_visible(False)
    for ax, (c, positions, local, memory, full) in zip(axes.flat, found):
        middles = np.add(positions, np.diff(positions, append=c.T) / 2)
        for curve, name, colour, style in ((local - full, "D", "black", "--"), (local - memory, "G", look(c.label)["color"], "-")):
            ax.plot(np.tile(middles, len(curve)), 1000 * curve.ravel(), ".", color=colour, ms=4, alpha=0.4, mew=0)
            ax.plot(middles, 1000 * curve.mean(0), style, color=colour, lw=1.6, label=name)
        ax.axhline(0, color="black", lw=0.6)
        lo, hi = np.quantile(1000 * np.array([local - full, local - memory]), [0.003, 0.997])
        lo, hi = min(lo, 0), max(hi, 0)
        ax.set(title=f"{c.label}\nT = {c.T}, n = {len(local)}", ylim=(lo - 0.05 * (hi - lo), hi + 0.2 * (hi - lo)))
        ax.locator_params(nbins=5)
    axes[0, 0].legend(fontsize=9, loc="upper center", ncols=2, frameon=False)
    fig.supxlabel("position in the row (tokens)")
    fig.supylabel("dashed D = local − global\nsolid G = local − memory (mBPB)", fontsize=10, ma="center")
    return fig


def figure_pareto(cells):
    """bpb against what it costs; black: the frontier of the means; thin: the logged curve on the way there."""
    found = list(frontiers(cells))
    if not found:
        return None
    lengths, costs = sorted({f[0] for f in found}), [k for k in COSTS if any(f[1] == k for f in found)]
    fig, axes = panels(len(lengths), len(costs), (max(6, 3.3 * len(costs)), 2.8 * len(lengths) + 0.8))
    handles, solid = {}, {}
    for c in cells:
        solid.setdefault(tuple(look(c.label).values()), c.label)                         # a second variant of one memory is hollow
    for T, cost, points, best in found:
        ax, low = axes[lengths.index(T), costs.index(cost)], min(y for _, y, _ in points)
        far = low + cut([y - low for _, y, _ in points if y > low] or [0.0])
        seen = [v for _, y, c in points if y <= far for v in c.bpb().values()]
        beyond = [f"{c.label} {y:.3f}" for _, y, c in points if y > far]
        for x, y, c in points:
            colour, marker = look(c.label).values()
            fill = colour if solid[colour, marker] == c.label else "white"
            handles[c.label], = ax.plot(x, y, marker, color=colour, mfc=fill, ms=9, alpha=0.9)
            ax.plot([x] * len(c.runs), list(c.bpb().values()), marker, color=colour, ms=4, alpha=0.5, mew=0)
        ax.step(*zip(*(points[i][:2] for i in best)), where="post", color="black", lw=1, zorder=0)
        if points[0][0] > 0 and points[-1][0] > 10 * points[0][0]:
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda x, _: human(x))
        window, pad = ax.get_xlim(), 0.08 * (max(seen) - min(seen)) or 1e-3
        for run in (r for *_, c in points for r in c.runs.values() if cost != "state_bytes"):
            ax.plot(*log_curve(run, cost), color="gray", lw=0.6, alpha=0.5, zorder=0)
        ax.set(xlim=window, ylim=(min(seen) - pad, max(seen) + pad), xlabel=COSTS[cost])
        ax.set_title("\n↑ ".join([f"T = {T}", *beyond]), fontsize=10)
    fig.supylabel("validation bpb (bits per byte)")
    labels = [label for label in dict.fromkeys(c.label for c in cells) if label in handles]
    fig.legend([handles[x] for x in labels], labels, loc="outside lower center", ncols=3, fontsize=9)
    return fig


# ----------------------------------------------------------------------------------------------------------------------
# The report: for each section its title, what to know before reading it, its table, its figure

SECTIONS = (
    ("Scores and costs", score_table, None, """
bpb: bits per byte of validation text, less is better; mean ± standard deviation over n seeds (means over different
seeds don't compare). Costs are medians over seeds: FLOPs of training; state: what is kept of one sequence of T tokens;
tokens/s in a median training step; minutes of the whole training, with their range where it is wide; peak memory of the
GPU, else of the process."""),
    ("Differences, paired by seed", mechanism_table, figure_differences, f"""
Runs of one seed have read the same batches, so a difference is taken seed by seed: condition minus baseline, over the n
seeds both have. mBPB: 0.001 bits per byte; negative is better than the baseline. Below {MIN_SEEDS} seeds there is no
interval and no test. In brackets: Holm's correction, over all tests of this table, for each kind of test. With n pairs
the exact sign-flip p can't be below 2/2^n, so with fewer than 6 it can't be below 0.05."""),
    ("Position", position_table, figure_position, """
Does a memory help where the window hurts? In each bucket of positions, D = local − global is what the window costs
(negative: it helps) and G = local − memory what the memory gains (negative: it loses). Up to the window's length local
and global see the same text, so a D there comes from training, not from what is seen. Closure is the share ΣG/ΣD that
the memory wins back, undefined where D's own interval isn't above 0: there is nothing to win back. r correlates G and D
over positions. They share the local runs, so noise alone correlates: r means something only above all of the null *and*
above 0 with split seeds."""),
    ("Pareto frontier", frontier_table, figure_pareto, """
The conditions that no other beats by being nowhere worse and somewhere better. Of the means: a difference within its
interval above is no difference. In the figure large markers are means, small ones seeds, the black steps the frontier,
grey the logged evaluations on the way there."""),
    ("Matched compute", matched_table, None, """
bpb at the largest budget that every run has reached; between two logged evaluations it is taken as linear in the
logarithm of the cost. A run whose learning rate had not yet come down stands worse here than a run planned for that
budget would."""))
PEER_NOTE = """These files follow memory-bench's schema. Its persistent runs attend globally whatever window they name:
compare them with global. Its memories' matrices were trained by another optimizer (AdamW) than its baseline's (Muon).
"""
SETUP = "depth n_layer n_embd n_head short_window tokenizer steps batch_size train_tokens optimizer lr device".split()


def introduction(cells) -> str:
    """What was trained, and what the names of the conditions mean."""
    found = {k: dict.fromkeys(str(r.config[k]) for c in cells for r in c.runs.values() if k in r.config) for k in SETUP}
    text = ", ".join(f"{k} {' / '.join(values)}" for k, values in found.items() if values)
    names = dict.fromkeys(kind(c) if kind(c) in CONDITIONS else kind(c).split("-")[0] for c in cells)
    lines = "".join(f"- {name}: {CONDITIONS[name]}\n" for name in names if name in CONDITIONS)
    return (f"T is the training length in tokens. Trained with {text or 'unrecorded settings'}.\n\nIn brackets: which "
            "attention layers see a short window (S) and which all of the past (L); the last layer is always an L. A "
            "memory in place of attention has no such layers.\n\n"
            + lines)


def report(cells, repeats, skipped, others, out: Path) -> str:
    """Writes the figures into `out`; returns the text of REPORT.md."""
    parts = [f"# Results\n\n{sum(len(c.runs) for c in cells)} runs in {len(cells)} conditions; {len(skipped)} files "
             f"skipped, {len(repeats)} repeated seeds left out, {len(others)} other JSON files ignored.\n"]
    for title, lines in (("Skipped", skipped), ("Repeated seeds (the first file read is kept)", repeats)):
        parts += [f"{title}:\n\n" + "".join(f"- {x}\n" for x in lines)] if lines else []
    for k, study in enumerate(sorted({c.study for c in cells})):
        mine = [c for c in cells if c.study == study]
        parts += [f"## {' · '.join(filter(None, study)) or 'Runs'}\n", introduction(mine)]
        parts += [PEER_NOTE] if study[1] == PEER else []
        for title, tabulate, draw, lead in SECTIONS:
            if not (body := tabulate(mine)):
                continue
            parts.append(f"### {title}\n{lead}\n\n{body}")
            if draw and (fig := draw(mine)):
                name = f"{draw.__name__.removeprefix('figure_')}{k or ''}.png"
                (out / name).write_bytes(picture(fig))
                parts.append(f"![{title}]({name})\n")
    return "\n".join(parts)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def main(argv=None) -> int:
    parser = Parser(description=__doc__.split("\n")[0],
                    epilog="exit status: 0 all read, 1 some files skipped, 2 bad input")
    parser.add_argument("folders", nargs="+", help="folders with result files, searched to any depth for *.json")
    parser.add_argument("--out", default="out/report", help="where REPORT.md and the figures go (default out/report)")
    parser.add_argument("--by", default="", help="configuration keys that split conditions, e.g. --by=n_layer,lr")
    try:
        args = parser.parse_args(argv)
        out = Path(args.out)
        runs, skipped, others = read_all(args.folders)
        cells, repeats = make_cells(runs, args.by.split(",") if args.by else [])
        out.mkdir(parents=True, exist_ok=True)
        (out / "REPORT.md").write_text(report(cells, repeats, skipped, others, out), encoding="utf-8")
    except (UserError, OSError) as e:                                 # an OSError names the file it can't open or write
        print(f"error: {e}", file=sys.stderr)
        return 2
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    print(f"{len(runs)} runs, {len(cells)} conditions, {len(skipped)} files skipped -> {out / 'REPORT.md'}")
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
