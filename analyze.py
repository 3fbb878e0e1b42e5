"""What a folder of result files says: seed-paired statistics, tables, figures and REPORT.md. Imports no torch.

    python analyze.py FOLDER [more folders] [--out=DIR] [--by=key,key]

Reading order
    names        what a condition is called, how it is drawn, how a table is printed; the other scripts use these too
    reading      result files -> RunRecord; a file that can't be read is named, skipped and counted
    cells        all runs of one condition, one per seed; a cell that mixes configurations is an error
    statistics   paired t test, exact sign-flip test, Holm's correction, closure, gain and deficit, Pareto frontier
    tables       the tables of REPORT.md
    figures      the pictures beside it
    report       REPORT.md, and the command line

Glossary
    run          one training run. It leaves one result file.
    condition    what a run tests: "local", "global", "rmt", "ttt@1+3". See `condition`.
    cell         all runs of one condition at one training length T, one for each seed.
    study        cells that may be compared: they have the same preset and the same data.
    floor        no memory. Attention sees a short window in every layer (the pattern S). No layer looks further back;
                 only from layer to layer does text pass on, a window (and the token shift's 3) at a time.
    local        no memory. Attention sees a short window in most layers (the pattern SSSL).
    global       no memory. Attention sees all of the past in every layer (the pattern L). It is the ceiling.
    windowed     the baseline that a memory has to improve on: floor, or local in a study without a floor.
    bpb          bits per byte of validation text. Less is better.
    mBPB         0.001 bpb, the unit of differences, gains and deficits. A difference is condition minus baseline, so
                 that a negative one is an improvement.
    D(p)         positional deficit: bpb of windowed minus bpb of global at position p. It is what the window costs
                 there.
    G(p)         gain of a memory: bpb of windowed minus bpb of the memory at position p.
    closure      gain/deficit, over all positions or some: the share of the deficit that the memory wins back.
    seed pair    two runs with the same seed. They see the same batches in the same order, so that much of the noise
                 cancels in their difference.

Exit status: 0 all files were read, 1 some were skipped (the report is written from the others), 2 bad input,
130 Ctrl-C.

References
    Student 1908, "The probable error of a mean": the t test.
    Fisher 1935, The Design of Experiments, chapter III: the sign-flip test, on Darwin's pairs of plants.
    Holm 1979, "A simple sequentially rejective multiple test procedure": the correction for many tests.
    Hesterberg 2015, arXiv 1411.5279: why percentiles of a bootstrap are too narrow for small samples.
    Pearson 1897, "On a form of spurious correlation": quantities that share a term correlate by that alone.
    Okabe and Ito 2008, "Color universal design": the colours.
"""
import argparse
import io
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from scipy import optimize, stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first, so that no display is needed)

PEER = "memory-bench"         # stands for the dataset, which that project's files don't name
MIN_SEEDS = 3                 # fewer pairs can't tell how far the differences scatter: no test, no interval
BOOTSTRAP = 10_000            # resamples behind the interval of a closure
NOT_ENOUGH = "not enough seeds"
COSTS = {
    "minutes": "training time (minutes)",
    "flops": "training compute (FLOPs)",
    "state_bytes": "state (bytes)",
}

# These say where and how a run was executed. They may differ inside a cell.
EXECUTION = {"seed", "name", "out_dir", "device", "device_batch_size", "compile", "sample_tokens", "seeds", "jobs"}
# A setting that begins with the name of one of these memories is read by that memory alone; see `owner`. One exception:
# mosaic2 reads mosaic_slots when mosaic2_mlp is off, so `relevant` counts mosaic's settings as mosaic2's too.
OWNERS = {"persistent", "rmt", "ttt", "knn", "mosaic", "mosaic2", "deltanet"}


class UserError(Exception):
    """Bad input by the user. main prints it as one line, "error: ...", and exits with status 2.

    data.py has a UserError of its own: this file can't take that one, because data.py imports torch.
    """


# ----------------------------------------------------------------------------------------------------------------------
# Names, looks, tables and pictures. train.py, eval.py and toys.py call these too.

WINDOWED = ("floor", "local")  # the baseline that a memory has to improve on, by preference
# The usual pattern of attention layers (S: short window, L: all of the past). Names leave it out.
USUAL_WINDOW = "SSSL"
# These memories replace a layer's attention or have their own window, so they don't follow the pattern.
NO_PATTERN = {"ttt", "deltanet", "knn", "mosaic", "mosaic2"}
# Okabe and Ito's colours, which colour-blind readers can tell apart, then a grey, a dark red, an indigo and a brown.
# Markers tell conditions apart in black and white.
LOOKS = {
    "floor": dict(color="#000000", marker="d"),
    "local": dict(color="#000000", marker="o"),
    "global": dict(color="#7f7f7f", marker="s"),
    "window": dict(color="#7f7f7f", marker="*"),
    "persistent": dict(color="#0072B2", marker="^"),
    "rmt": dict(color="#D55E00", marker="v"),
    "rmt-0": dict(color="#A50026", marker="<"),
    "ttt": dict(color="#009E73", marker="D"),
    "deltanet": dict(color="#CC79A7", marker="P"),
    "knn": dict(color="#E69F00", marker="X"),
    "mosaic": dict(color="#56B4E9", marker="p"),
    "mosaic2": dict(color="#332288", marker=">"),
}
OTHER_LOOK = dict(color="#994F00", marker="h")
# Curves of one colour are told apart by their lines, in this order.
LINES = ("solid", "dashed", "dashdot", "dotted")
# Differences: two of these colours, and white for none.
SAVED = matplotlib.colors.LinearSegmentedColormap.from_list("saved", ["#D55E00", "white", "#0072B2"])
# What the names mean, for the reader of a report.
CONDITIONS = {
    "floor": "no memory; attention sees a short window in every layer",
    "local": "no memory; attention sees a short window in most layers, and all of the past in the others",
    "global": "no memory; attention sees all of the past in every layer: the ceiling",
    "window": "no memory; the letters say, layer by layer, whether attention sees a short window (S) or all of the "
              "past (L)",
    "persistent": "attention that also sees learned key/value slots, the same ones in every sequence",
    "rmt": "reads in segments; memory tokens, read before each and written after it, carry the past on",
    "rmt-0": "the segments of rmt with 0 memory tokens: the baseline that shows what rmt's memory is worth",
    "ttt": "in place of attention a linear model per head, which is trained by gradient descent while it reads",
    "deltanet": "in place of attention a matrix per head, which is written and erased by the gated delta rule",
    "knn": "attention to a short window, and to the nearest keys in a store of what has left the window",
    "mosaic": "contextual associative memories in place of attention, persistent ones in place of the MLP",
    "mosaic2": "short- and long-term contextual memories in place of attention, with gated keys and an adaptive kernel",
}


def layers_with_memory(settings: dict, n_layer: int) -> set[int]:
    """The layers that memory_layers names: "all", "middle" or "1+3". ValueError if it is none of these. model.py has
    the same rule, and imports torch."""
    text = settings.get("memory_layers", "all")
    if text == "all":
        return set(range(n_layer))
    if text == "middle":
        return {n_layer // 2}
    if not re.fullmatch(r"\d+(\+\d+)*", text):
        raise ValueError(f"memory_layers is {text!r}, expected all, middle, or indexes such as 1+3")
    return {int(layer) for layer in text.split("+")}


def shortest_pattern(settings: dict) -> str:
    """One name for all window patterns that make the same attention layers: S, L or SSSL where one of these does, and
    else the shortest. Over three layers SSSL is S S S and is called S; likewise over four, if the fourth has a memory
    in place of attention."""
    window = settings.get("window", USUAL_WINDOW)
    n_layer = settings.get("n_layer")
    if not isinstance(n_layer, int):     # memory-bench's files don't name it
        n_layer = len(window)
    attending = set(range(n_layer))
    with_memory = layers_with_memory(settings, n_layer)
    if settings.get("memory") in NO_PATTERN:
        attending -= with_memory
    if not attending:
        return USUAL_WINDOW

    # a pattern is repeated over the layers
    letters = {layer: window[layer % len(window)] for layer in attending}
    candidates = []
    for length in range(1, n_layer + 1):
        candidate = ["S"] * length      # a place where no layer attends stays S
        for layer, letter in letters.items():
            candidate[layer % length] = letter
        candidates.append("".join(candidate))
    candidates.insert(1, USUAL_WINDOW)  # preferred to all but a single letter; the last candidate always fits
    for candidate in candidates:
        if all(candidate[layer % len(candidate)] == letter for layer, letter in letters.items()):
            return candidate


def attention_name(window: str) -> str:
    """The name of a run without a memory, from the pattern of its attention layers."""
    names = {"S": "floor", USUAL_WINDOW: "local", "L": "global"}
    return names.get(window, f"window {window}")


def sees_pattern(settings: dict) -> bool:
    """Does any layer of this run attend as the window pattern says? Layers without the memory always do."""
    return settings.get("memory") not in NO_PATTERN or settings.get("memory_layers", "all") != "all"


def condition(settings: dict) -> str:
    """The name of what a run tests, from its settings: memory, memory_layers, window, rmt_tokens.

        floor, local, global    no memory: S, SSSL, L               window SL    no memory, another pattern
        ttt@1+3                 the memory in layers 1 and 3 only    rmt-0        rmt without memory tokens

    A setting that is missing has its default. The pattern stands behind the name only if attention
    layers follow it.
    """
    memory = settings.get("memory", "none")
    layers = settings.get("memory_layers", "all")
    window = shortest_pattern(settings)

    if memory == "none":
        return attention_name(window)

    # rmt without memory tokens has no memory left: it is what rmt is judged against
    name = memory
    if memory == "rmt" and settings.get("rmt_tokens", 16) == 0:
        name = "rmt-0"
    if layers != "all":
        name += f"@{layers}"
    if window != USUAL_WINDOW and sees_pattern(settings):
        name += f" {window}"
    return name


def base_name(name: str) -> str:
    """The first part of a condition: "ttt@1+3 SL" -> "ttt", memory-bench's "rmt-m16-s512" -> "rmt"."""
    first_word = re.split("[ @]", name)[0]
    # "rmt-0" is a condition of its own; behind other names a dash begins memory-bench's settings
    return first_word if first_word in LOOKS else first_word.split("-")[0]


def look(name: str) -> dict:
    """Colour and marker of a condition, as matplotlib's plot takes them: the same in every figure."""
    return dict(LOOKS.get(base_name(name), OTHER_LOOK))


def distinct_looks(names: list[str]) -> list[dict]:
    """The look of each name, with a line style: up to four names with the same `base_name` have different ones."""
    drawn = Counter()
    looks = []
    for name in names:
        base = base_name(name)
        looks.append(dict(look(name), linestyle=LINES[drawn[base] % len(LINES)]))
        drawn[base] += 1
    return looks


def entry_text(entry) -> str:
    """How a table shows a value."""
    if entry is None:
        return "-"
    return f"{entry:.4f}" if isinstance(entry, float) else str(entry)


def table(head: list[str], rows: list[list], left: int = 1) -> str:
    """An aligned Markdown table. It reads well on a terminal too.

    The first `left` columns are aligned to the left, the others to the right. A float gets 4
    decimals, None becomes "-". Without rows there is no table: the text is empty.
    """
    if not rows:
        return ""
    # column by column, since a column's entries have one width
    columns = []
    for i, entries in enumerate(zip(head, *rows, strict=True)):
        texts = [entry_text(entry) for entry in entries]
        # a line of dashes below the title; Markdown takes a colon at its end for "aligned to the right"
        width = max(3, *map(len, texts))
        if i < left:
            texts.insert(1, "".ljust(width, "-"))
            columns.append([text.ljust(width) for text in texts])
        else:
            texts.insert(1, ":".rjust(width, "-"))
            columns.append([text.rjust(width) for text in texts])

    lines = ["| " + " | ".join(line) + " |\n" for line in zip(*columns)]
    return "".join(lines)


def panels(rows: int, cols: int, size: tuple, **more):
    """A figure of `size` (width, height) inches, and its axes (rows,cols). `more` goes to plt.subplots."""
    figure, axes = plt.subplots(rows, cols, figsize=size, squeeze=False, layout="constrained", **more)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def picture(figure) -> bytes:
    """The bytes of the figure's PNG. The figure is closed, so that matplotlib does not keep it."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    return png.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that stands under its name whole or not at all. (data.replacing also waits for the disk, but
    data.py imports torch.)"""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def lay_out(texts: list[str], columns: int) -> list[tuple[int, int, str, int]]:
    """Sets the texts of tokens as a terminal with so many columns does -> line, column, character and index of the
    token, for each character."""
    glyphs = []
    line = 0
    column = 0
    for token, text in enumerate(texts):
        for character in text.expandtabs(4):
            glyphs.append((line, column, character, token))
            column += 1
            if character == "\n" or column == columns:
                line += 1
                column = 0
    return glyphs


def figure_passages(passages: list[tuple[str, dict]], columns: int = 100):
    """Passages one below the other, each token coloured by the bits that the carried state saved there.

    A passage is a run's label and what `eval.py --task=carry` stores: texts and bits of the tokens, the window in
    tokens.
    """
    layouts = [lay_out(passage["texts"], columns) for _, passage in passages]
    lines = [glyphs[-1][0] + 1 for glyphs in layouts]
    height = 0.7 + sum(0.4 + 0.16 * n for n in lines)
    figure, axes = panels(len(passages), 1, (9.5, height), height_ratios=lines)

    # one scale for all leaves out the most extreme 2% of the tokens, and is at least a bit, so that noise stays pale
    savings = [np.array(passage["bits"], dtype=float) for _, passage in passages]
    top = max(1.0, np.nanquantile(np.abs(np.concatenate(savings)), 0.98))
    for ax, (label, passage), bits, glyphs, n in zip(axes[:, 0], passages, savings, layouts, lines):
        colours = np.full((n, columns), np.nan)
        for line, column, character, token in glyphs:
            colours[line, column] = bits[token]
            shown = character if character.isprintable() or character == "\n" else "\ufffd"
            if not shown.isspace():
                ax.text(column, line, shown, family="monospace", fontsize=9, ha="center", va="center_baseline")
        image = ax.imshow(colours, cmap=SAVED, vmin=-top, vmax=top, aspect="auto")
        ax.axis("off")
        title = f"{label}: {bits.mean():+.3f} bits a token saved by what is more than {passage['window']} tokens back"
        ax.set_title(title, fontsize=10, loc="left")
    figure.colorbar(image, ax=axes, label="saved by the carried state (bits a token)", extend="both", aspect=40)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Which memory can do what? One picture, from the result files of toys.py.

# Settings of a toy that say how much is learned from, and how it is tested.
TRAINED_ON = ("T", "steps", "batch_size", "test_rows", "automata", "test_automata")
STATE_BUDGET = 32 * 1024  # bytes, for the comparison of capacities
# Levels on the way from guessing (0) to perfect (1): name, where the level begins, colours of cell and text.
LEVELS = (
    ("solved", 0.9, "#0072B2", "white"),
    ("partly", 0.3, "#9CCBE6", "black"),
    ("not", -math.inf, "#EDEDED", "black"),
)


def pairs_held(result: dict) -> tuple[float, float]:
    """Of capacity and mqar: up to how many pairs are 90% of the answers right, and how many bytes has the state there?

    N pairs are asked for in 4N tokens. Between the numbers of pairs that were tested, accuracy is
    interpolated linearly; with 0 pairs it is 1.
    """
    tested = [length // 4 for length in result["lengths"]]
    held = tested[-1]
    for (N, accuracy), (more, lower) in itertools.pairwise(zip([0, *tested], [1, *result["accuracy"]])):
        if lower < 0.9:
            held = N + (more - N) * (accuracy - 0.9) / (accuracy - lower)
            break
    return held, float(np.interp(held, tested, result["state_bytes"]))


def pairs_in_budget(result: dict) -> float:
    """How many pairs are held by a state of at most STATE_BUDGET bytes."""
    held, _ = pairs_held(result)
    tested = [length // 4 for length in result["lengths"]]
    return min(held, float(np.interp(STATE_BUDGET, result["state_bytes"], tested, left=0)))


@dataclass
class Ability:
    """A column of the picture."""
    title: str
    measure: Callable  # result -> the number in the cell
    guessing: float    # what a guess gets
    perfect: float


# Accuracy is measured at the lengths T, 2T, 4T and 8T: accuracy[2] is that at 4T, accuracy[-1] that at 8T. The perfect
# number of capacity is the pairs of the longest training sequence. In regbench the symbol seen most often so far is
# right about half of the time.
ABILITIES = {
    "parity": Ability("parity\nat 4T", lambda result: result["accuracy"][2], 1 / 2, 1),
    "s3": Ability("permutations\nat 4T", lambda result: result["accuracy"][2], 1 / 6, 1),
    "capacity": Ability(f"pairs held\nin {STATE_BUDGET // 1024} KiB", pairs_in_budget, 0, 64),
    "recall": Ability("overwriting\nat 8T", lambda result: result["accuracy"][-1], 1 / 8, 1),
    "copy": Ability("copying\nat 8T", lambda result: result["accuracy"][-1], 1 / 16, 1),
    "brackets": Ability("brackets\nat 8T", lambda result: result["accuracy"][-1], 1 / 8, 1),
    "regbench": Ability("a new\nlanguage", lambda result: result["ood"]["accuracy"], 1 / 2, 1),
}


def read_abilities(folder: Path) -> dict[str, dict]:
    """memory -> ability -> its number, from all results of toys.py in this folder; memories in the order of LOOKS.

    A number is the mean over seeds. Where a memory was trained with several settings, such as learning
    rates or widths, those count that are best on the first seed. What is trained and tested on is the same
    for all memories: what most runs have (see TRAINED_ON), and for regbench 1000 automata. Its transformer
    with rotations is global attention.
    """
    seeds = {}    # memory, ability, what it was trained on, all settings -> the numbers of the seeds, in order
    common = {}   # ability -> how many runs were trained on what
    for path in sorted(folder.glob("*/*/result.json")):
        result = read_toy(path)
        if result is None:
            continue
        config = result["config"]
        ability = config.get("task", result["toy"])
        if ability not in ABILITIES or config.get("automata", 1000) != 1000:
            continue
        memory = "global" if config["model"] == "rope" else config["model"]
        trained_on = tuple(config.get(name) for name in TRAINED_ON)
        common.setdefault(ability, Counter())[trained_on] += 1
        settings = {name: value for name, value in config.items() if name not in EXECUTION}
        key = memory, ability, trained_on, json.dumps(settings, sort_keys=True)
        seeds.setdefault(key, []).append(ABILITIES[ability].measure(result))

    # Settings are chosen by their first seed (numbers[0]), so that one tried on that seed alone has no better chance
    # than one with all seeds. If two are equal there, the one with more seeds counts.
    best = {name: {} for name in sorted({key[0] for key in seeds}) if base_name(name) in LOOKS}
    for (memory, ability, trained_on, _), numbers in seeds.items():
        [(usual, _)] = common[ability].most_common(1)
        if memory in best and trained_on == usual:
            rival = best[memory].get(ability, numbers)
            best[memory][ability] = max(rival, numbers, key=lambda numbers: (numbers[0], len(numbers)))
    by_looks = sorted(best, key=lambda name: list(LOOKS).index(base_name(name)))
    return {name: {ability: float(np.mean(numbers)) for ability, numbers in best[name].items()} for name in by_looks}


def level(ability: str, number: float) -> tuple:
    """The entry of LEVELS for the number of an ability."""
    guessing = ABILITIES[ability].guessing
    way = (number - guessing) / (ABILITIES[ability].perfect - guessing)
    return next(entry for entry in LEVELS if way >= entry[1])


def ability_figure(numbers: dict[str, dict]):
    """Memories in rows, abilities in columns, as `read_abilities` returns them. What was not measured stays white."""
    figure, axes = panels(1, 1, (1.15 * len(ABILITIES) + 2.2, 0.42 * len(numbers) + 1.4))
    ax = axes[0, 0]
    for row, memory in enumerate(numbers):
        for column, ability in enumerate(ABILITIES):
            if ability in numbers[memory]:
                number = numbers[memory][ability]
                _, _, colour, ink = level(ability, number)
                ax.add_patch(plt.Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=colour, lw=0))
                text = f"{number:.0f}" if ability == "capacity" else f"{number:.2f}"
                ax.text(column, row, text, ha="center", va="center", color=ink)
    ax.set(xlim=(-0.5, len(ABILITIES) - 0.5), ylim=(len(numbers) - 0.5, -0.5))
    ax.set_xticks(range(len(ABILITIES)), [ability.title for ability in ABILITIES.values()])
    ax.set_yticks(range(len(numbers)), numbers)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    patches = []
    for name, begin, colour, _ in LEVELS:
        label = name if begin == -math.inf else f"{name}: {begin:.0%} or more"
        patches.append(plt.Rectangle((0, 0), 1, 1, color=colour, label=label))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False,
                  title="share of the way from guessing to perfect")
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Reading. A file that can't be used raises ValueError with the reason; read_all collects these.

@dataclass
class RunRecord:
    """One training run, as its result file tells of it."""
    path: str
    preset: str
    dataset: str
    memory: str               # "none", "deltanet", ...; memory-bench's own names keep their settings: "rmt-m16-s512"
    window: str
    follows_pattern: bool     # does any of its layers attend as `window` says?
    condition: str            # its name, see `condition`
    T: int                    # tokens in a training sequence
    seed: int
    bpb: float                # of the validation text
    curve: dict               # position -> bpb of that bucket of positions
    bucket_bytes: list        # bytes in each bucket; two curves of the same tokens have the same
    recombined: float | None  # bpb of all buckets together: it has to be `bpb` again
    costs: dict               # minutes, flops, state_bytes, ...; what was not recorded is absent
    log: list                 # the evaluations during training: {step, seconds, tokens, val_bpb}
    config: dict              # its settings, and what else has to agree inside a cell; see `relevant`


def finite(x) -> bool:
    """Is x a finite number? JSON written by Python may hold NaN; true and false are no numbers here."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def recombine(nats, n_bytes) -> float:
    """bpb of several buckets together: Σnats / (ln 2 · Σbytes). It is not the mean of the buckets' bpb."""
    return float(np.sum(nats) / (math.log(2) * np.sum(n_bytes)))


def our_curve(content: dict) -> tuple[dict, list, float]:
    """bpb by position as train.py writes it.

    A bucket without bytes holds special tokens only, and is left out.
    """
    curve = {}
    full_nats = []
    full_bytes = []
    for position, nats, n_bytes in zip(content["positions"], content["nats"], content["bytes"], strict=True):
        if n_bytes > 0:
            curve[int(position)] = recombine(nats, n_bytes)
            full_nats.append(nats)
            full_bytes.append(n_bytes)
    return curve, full_bytes, recombine(full_nats, full_bytes)


def peer_curve(content: dict) -> tuple[dict, list, float]:
    """bpb by position as memory-bench writes it: {"buckets": {"0-64": {"bpb": 1.30}, ...}}."""
    curve = {}
    for span, bucket in content["buckets"].items():
        start = int(span.split("-")[0])
        curve[start] = float(bucket["bpb"])
    # bytes are not recorded, so that the mean of the ratios is all that can be computed
    return curve, [], float(np.mean(list(curve.values())))


def read_curve(content: dict) -> tuple[dict, list, float]:
    """bpb by position in either schema -> {position: bpb}, bytes by bucket, bpb of all buckets."""
    try:
        curve, bucket_bytes, total = peer_curve(content) if "buckets" in content else our_curve(content)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"bpb_by_position is malformed ({type(e).__name__}: {e})") from e
    if not curve or not all(map(math.isfinite, curve.values())):
        raise ValueError("bpb_by_position is empty or holds a value that is not finite")
    return dict(sorted(curve.items())), bucket_bytes, total


def read_costs(content: dict) -> dict:
    """What a run cost, by name. Only what was recorded as a finite number is there."""
    names = ("total_params", "memory_params", "flops_per_token", "state_bytes", "tokens_per_second", "train_tokens")
    costs = {name: content.get(name) for name in names}
    costs["minutes"] = content.get("total_time_min")
    costs["flops"] = content.get("total_flops")
    costs["peak_mib"] = content.get("peak_vram_mib") or content.get("peak_rss_mib")
    costs = {name: value for name, value in costs.items() if finite(value)}

    # our files hold the FLOPs of a token, memory-bench's those of the whole training
    if "flops_per_token" in costs and "train_tokens" in costs:
        costs["flops"] = costs["flops_per_token"] * costs["train_tokens"]
    return costs


def is_toy(content) -> bool:
    """Is this the result of a toy?"""
    return isinstance(content, dict) and "toy" in content


def read_toy(path: Path) -> dict | None:
    """The result of a toy; None if the file holds something else. Raises UserError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}); delete its folder, and run the toy again") from None
    return content if is_toy(content) else None


def is_result(content) -> bool:
    """Is this the result of a training run, complete or not? A toy's result and other JSON files are not."""
    if not isinstance(content, dict) or is_toy(content):
        return False
    return not content.keys().isdisjoint({"memory", "mechanism", "val_bpb"})


def expect(name: str, value, kind: type) -> None:
    """Raises ValueError if the value of the file's entry `name` is not of this kind."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {value!r:.40}, expected {kind.__name__}")


def read_settings(content: dict) -> dict:
    """The settings that name a condition and a study, in either schema.

    What a result repeats at its top counts before its config. memory-bench has other names for some,
    and no config.
    """
    settings = (content.get("config") or {}) | content
    if "memory" not in content:
        settings["memory"] = content["mechanism"]
        settings.setdefault("preset", f"d{content.get('depth', '')}")
        settings.setdefault("dataset", PEER)
        settings.setdefault("window", content.get("window_pattern"))

    if settings["memory"] == "baseline":
        settings["memory"] = "none"
    settings["memory_layers"] = str(settings.get("memory_layers", "all"))
    settings["window"] = str(settings.get("window") or USUAL_WINDOW)
    settings["window"] = shortest_pattern(settings)
    return settings


def read_run(path: Path) -> RunRecord | None:
    """One file -> RunRecord; None if it is no result; ValueError if it is broken or partial."""
    # eval.py's file repeats the identity of a run whose result.json lies beside it, and would count it twice
    if path.name.startswith("eval_"):
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if not is_result(content):
        # a training run's result has this name; only memory-bench's files, and what is no result, have others
        if path.name == "result.json" and not is_toy(content):
            raise ValueError("holds none of memory, mechanism, val_bpb")
        return None

    # memory-bench has other names for memory and log; everything but the memory may be missing
    memory = content.get("memory", content.get("mechanism"))
    config = content.get("config") or {}
    T = content.get("max_seq_len", 2048 if "mechanism" in content else None)    # memory-bench leaves its usual 2048 out
    by_position = content.get("bpb_by_position") or {}
    log = content.get("log") or content.get("curve") or []

    # a file that was cut short or edited by hand is refused here, entry by entry
    if not finite(content.get("val_bpb")):
        given = content.get("val_bpb", "missing")
        raise ValueError(f"val_bpb is {given!r}, expected a finite number: did the run diverge?")
    expect("memory", memory, str)
    expect("seed", content.get("seed"), int)
    expect("max_seq_len", T, int)
    expect("config", config, dict)
    expect("bpb_by_position", by_position, dict)
    expect("log", log, list)

    settings = read_settings(content)
    # besides the config, these have to agree inside a cell: the data, and what was built and trained
    agree = "depth dataset data_sha256 train_tokens total_params memory_params flops_per_step".split()
    # the device may differ, see EXECUTION; it is read for the report, since the config may say no more than "auto"
    recorded = {key: content[key] for key in (*agree, "device") if key in content}
    # dtype=auto is bfloat16 on most GPUs and float32 on a CPU; a file that does not say it is float32
    recorded["precision"] = content.get("precision", "float32")

    curve, bucket_bytes, recombined = read_curve(by_position) if by_position else ({}, [], None)
    return RunRecord(
        path=str(path),
        preset=str(settings.get("preset") or ""),
        dataset=str(settings.get("dataset") or ""),
        memory=settings["memory"],
        window=settings["window"],
        follows_pattern=sees_pattern(settings),
        condition=condition(settings),
        T=T,
        seed=content["seed"],
        bpb=float(content["val_bpb"]),
        curve=curve,
        bucket_bytes=bucket_bytes,
        recombined=recombined,
        costs=read_costs(content),
        log=[entry for entry in log if isinstance(entry, dict) and finite(entry.get("val_bpb"))],
        # two patterns that make the same layers are one configuration
        config=config | recorded | ({"window": settings["window"]} if "window" in config else {}),
    )


def read_all(folders) -> tuple[list[RunRecord], list[str], list[str]]:
    """Every *.json below the folders -> runs, skipped files (with the reason), files that are no results."""
    runs = []
    skipped = []
    others = []
    seen = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the folders that hold the result files")
        for path in sorted(folder.rglob("*.json")):
            # two of the folders may hold the same file: it is one run
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                run = read_run(path)
            # what JSON or Unicode can't decode is a ValueError
            except (ValueError, OSError, RecursionError) as e:
                skipped.append(f"{path}: {e}")
                continue
            if run is None:
                others.append(str(path))
            else:
                runs.append(run)

    # without any run there is nothing to report, so the first reason is told
    if not runs:
        hint = ", expected <run>/result.json"
        if skipped:
            hint = f"; the first of {len(skipped)} skipped is {skipped[0]}"
        raise UserError(f"no readable result file below {', '.join(map(str, folders))}{hint}")
    return runs, skipped, others


# ----------------------------------------------------------------------------------------------------------------------
# Cells

@dataclass
class Cell:
    """All runs of one condition at one training length, one for each seed."""
    study: tuple              # (preset, dataset): only cells of one study are compared
    T: int
    label: str                # the condition, and the settings named by --by; unique within (study, T)
    first: RunRecord          # the first run that was read: what all of them share is read here
    runs: dict = field(default_factory=dict)  # seed -> RunRecord

    @property
    def base(self) -> str:
        """The condition without its layers, window and settings: "local", "rmt-0", "ttt"."""
        return base_name(self.label)

    def compared_within(self) -> tuple:
        """What two cells must have in common to be compared: study, T and training tokens."""
        return self.study, self.T, self.first.costs.get("train_tokens")

    def bpb(self) -> dict:
        """seed -> bpb"""
        return {seed: run.bpb for seed, run in self.runs.items()}

    def mean(self) -> float:
        """Mean bpb over the seeds."""
        return float(np.mean(list(self.bpb().values())))

    def costs(self, name: str) -> list:
        """This cost of every run that recorded it."""
        return [run.costs[name] for run in self.runs.values() if name in run.costs]


def all_runs(cells) -> list[RunRecord]:
    """The runs of all these cells."""
    return [run for c in cells for run in c.runs.values()]


def owner(key: str) -> str | None:
    """The memory that alone reads this setting; None for a setting that every run reads.

    model.unused_options has the same rule for this code's settings. This one is here because model.py imports torch,
    and also meets the settings of other versions and of memory-bench.
    """
    begin = key.split("_")[0]
    name = {"delta": "deltanet", "expand": "deltanet"}.get(begin, begin)
    return name if name in OWNERS else None


def relevant(key: str, run: RunRecord) -> bool:
    """Does this setting change what the run computes?"""
    if key in EXECUTION or key.endswith("_every"):
        return False
    if key == "window":
        return run.follows_pattern
    # rmt's settings count for memory-bench's "rmt-m16-s512" too, and mosaic's for mosaic2
    memory = owner(key)
    return memory is None or run.memory.startswith(memory)


def differing(a: RunRecord, b: RunRecord) -> dict:
    """key -> the two values, for every setting that matters to either run and isn't the same in both."""
    different = {}
    for key in sorted(a.config | b.config):
        of_a = a.config.get(key, "not recorded")
        of_b = b.config.get(key, "not recorded")
        if of_a != of_b and (relevant(key, a) or relevant(key, b)):
            different[key] = (of_a, of_b)
    return different


def cell_label(run: RunRecord, by) -> str:
    """The run's condition, and those settings named by --by that matter to it: "ttt n_layer=4"."""
    words = [run.condition]
    for key in by:
        if key in run.config and relevant(key, run):
            words.append(f"{key}={run.config[key]}")
    return " ".join(words)


def refuse_mixture(cell: Cell, run: RunRecord) -> None:
    """Raises UserError if the run was configured otherwise than the runs of this cell."""
    different = differing(cell.first, run)
    if different:
        values = [f"{key} is {a!r} in the first, {b!r} in the second" for key, (a, b) in different.items()]
        raise UserError(f"the cell '{cell.label}, T={cell.T}' mixes configurations ({cell.first.path} and {run.path}): "
                        f"{'; '.join(values)}; separate the files, or make the keys part of it: "
                        f"--by={','.join(different)}")


def make_cells(runs: list[RunRecord], by=()) -> tuple[list[Cell], list[str]]:
    """Runs -> cells, and a line about every run that was left out because its seed was there already.

    Of several files of one seed the first that was read is kept, and never the better one: to choose
    by the score would bias it.
    """
    for key in by:
        if not any(key in run.config for run in runs):
            raise UserError(f"--by={key}: no run has such a setting; give names of settings such as n_layer or lr")

    # the first run of a cell stands for what all of its runs have to agree on
    cells = {}
    repeats = []
    for run in runs:
        study = (run.preset, run.dataset)
        label = cell_label(run, by)
        cell = cells.setdefault((study, run.T, label), Cell(study, run.T, label, first=run))
        refuse_mixture(cell, run)
        kept = cell.runs.setdefault(run.seed, run)
        if kept is not run:
            apart = abs(kept.bpb - run.bpb) * 1000
            repeats.append(f"seed {run.seed} of {label}, T={run.T}: {kept.path} is kept, {run.path} is left out "
                           f"(these two runs of one seed differ by {apart:.2f} mBPB)")

    # floor, local and global come first, then all others in the order of their names, each memory's together
    def place(cell: Cell) -> tuple:
        rank = {"floor": 0, "local": 1, "global": 2}.get(cell.base, 3)
        return cell.study, cell.T, rank, cell.base, cell.label

    return sorted(cells.values(), key=place), repeats


def baseline(cell: Cell, cells: list[Cell], *names: str) -> Cell | None:
    """The cell to compare with, of the same `compared_within`; its name is the first of `names` that is there.

    If several cells have that name, the one with the same window is taken, and then the one with the
    fewest other settings that differ.
    """
    def distance(other: Cell) -> tuple:
        other_window = other.first.window != cell.first.window
        return names.index(other.base), other_window, len(differing(other.first, cell.first))

    candidates = [c for c in cells if c.compared_within() == cell.compared_within() and c.base in names]
    return min(candidates, key=distance, default=None)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics. Seeds are the independent repetitions. Positions and tokens of one run are not.

def t_interval(x) -> tuple[float, float, float]:
    """Mean of x and its 95% interval (Student 1908): mean ± t(0.975; n-1) · s/√n, s = standard deviation."""
    x = np.asarray(x, float)
    mean = float(x.mean())
    # ddof=1: the sum of squares is divided by n-1, since the mean was estimated from the same values
    standard_error = x.std(ddof=1) / math.sqrt(len(x))
    half = float(stats.t.ppf(0.975, len(x) - 1) * standard_error)
    return mean, mean - half, mean + half


def sign_flip(diffs) -> float:
    """Exact two-sided p of a sum of paired differences (Fisher 1935, chapter III).

    If the memory did nothing, each seed's difference could as well have had the other sign. So all
    2^n choices of signs are equally likely, and p is the share of them whose sum is as far from 0 as
    the sum that was seen. The signs that were seen and their opposites always count, so that p is
    never below 2/2^n: 0.25 for three seeds, and below 0.05 only from six seeds on. Beyond 20
    differences signs are drawn, since 2^20 sums already take 8 MB.

    scipy.stats.permutation_test makes the same test. It is a thousand times slower at n = 20, and
    takes two sums that differ by rounding alone for different ones.
    """
    diffs = np.asarray(diffs, float)
    if len(diffs) <= 20:
        # each difference is added to, and subtracted from, every sum of those before it
        sums = np.zeros(1)
        for diff in diffs:
            sums = np.concatenate([sums + diff, sums - diff])
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (100_000, len(diffs)))
        # the signs that were seen are one of the draws, so that p is never 0
        sums = np.append(signs @ diffs, diffs.sum())
    # two sums that are equal may differ by rounding: they count as equal
    rounding = 1e-12 * np.abs(diffs).sum()
    return float(np.mean(np.abs(sums) >= abs(diffs.sum()) - rounding))


def holm(ps) -> list[float]:
    """Holm's adjusted p values (1979), in the order given. NaN, a test that wasn't made, doesn't count.

    The smallest of m values is multiplied by m, the next by m - 1, and so on. A value that would come
    out below a smaller one's is raised to it. The chance of any false discovery at all then stays
    below the level.
    """
    # the indexes of the tests that were made, the smallest p first
    made = [i for i, p in enumerate(ps) if not math.isnan(p)]
    made.sort(key=lambda i: ps[i])

    adjusted = [math.nan] * len(ps)
    highest = 0.0
    for rank, i in enumerate(made):
        corrected = min(1.0, (len(made) - rank) * ps[i])
        highest = max(highest, corrected)
        adjusted[i] = highest
    return adjusted


@dataclass
class Paired:
    """The differences a - b of the seeds that both have. Below MIN_SEEDS the statistics are NaN."""
    seeds: list
    diffs: list               # seed by seed
    mean: float = math.nan
    lo: float = math.nan      # the 95% interval by Student's t
    hi: float = math.nan
    p_t: float = math.nan     # of the paired t test
    p_flip: float = math.nan  # of the sign-flip test


def paired(a: dict, b: dict) -> Paired:
    """a - b over the seeds that both have. a, b: seed -> value."""
    seeds = sorted(a.keys() & b.keys())
    diffs = [a[seed] - b[seed] for seed in seeds]
    if len(seeds) < MIN_SEEDS:
        return Paired(seeds, diffs)

    # equal differences have no spread that t could divide by
    p_t = math.nan
    if np.ptp(diffs) > 1e-15:
        p_t = float(stats.ttest_1samp(diffs, 0.0).pvalue)
    mean, lo, hi = t_interval(diffs)
    return Paired(seeds, diffs, mean, lo, hi, p_t, p_flip=sign_flip(diffs))


def detectable(diffs) -> float:
    """The smallest true difference that these seeds could have shown with power 0.8 (in four of five repetitions).

    Of differences that scatter with standard deviation s around a true difference δ, the statistic of
    the paired t test follows the noncentral t distribution, shifted by δ√n/s. The shift is sought at
    which it passes the 5% limit, on either side, with probability 0.8.
    """
    n = len(diffs)
    limit = stats.t.ppf(0.975, n - 1)

    def excess_power(shift: float) -> float:
        power = stats.nct.sf(limit, n - 1, shift) + stats.nct.cdf(-limit, n - 1, shift)
        return power - 0.8

    # n = 3, the fewest seeds, needs 5.7; beyond 10 scipy's noncentral t is not reliable
    shift = optimize.brentq(excess_power, 0.0, 8.0)
    return float(shift * np.std(diffs, ddof=1) / math.sqrt(n))


def closure(G, D, resamples: int = BOOTSTRAP) -> tuple[float, float, float] | str:
    """ΣG/ΣD with a 95% interval, or the words that say why there is none.

    G, D (n,): for each seed the gain and the deficit.

    A ratio means nothing where its denominator may be 0. So it is "undefined" unless the 95% interval
    of D lies above 0, and all sums of D below. The interval of the ratio is built like Student's:

        ΣG/ΣD ± t(0.975; n-1) · √(n/(n-1)) · standard error

    The standard error comes from a bootstrap: n seeds are drawn with replacement, each with its G and
    its D, and the standard error is the spread of the ratios of many such draws. The root undoes the
    bias of a bootstrap of few values, whose variance is (n-1)/n of what it should be (Hesterberg 2015).
    The percentiles of these ratios would be the usual interval. But they never leave the range of the
    seeds' own ratios, and for n = 3 hold the truth in at most 75% of cases.
    """
    G = np.asarray(G, float)
    D = np.asarray(D, float)
    n = len(D)
    if n < MIN_SEEDS:
        return NOT_ENOUGH
    _, lowest_deficit, _ = t_interval(D)
    if lowest_deficit <= 0:
        return "undefined"

    # every row of `draws` is one resample: the indexes of the n seeds that it holds
    draws = np.random.default_rng(0).integers(0, n, (resamples, n))
    deficits = D[draws].sum(1)
    if deficits.min() <= 0:
        return "undefined"
    ratios = G[draws].sum(1) / deficits
    standard_error = math.sqrt(n / (n - 1)) * ratios.std()
    half = float(stats.t.ppf(0.975, n - 1) * standard_error)
    ratio = float(G.sum() / D.sum())
    return ratio, ratio - half, ratio + half


# Does a memory gain where the window costs? The next functions correlate two quantities over positions. Each is an
# array (n,P) of n seeds and P positions, in bpb:
#
#     G = windowed - memory      the gain: what the memory wins there
#     D = windowed - global      the deficit: what the window costs there
#
# Both hold the windowed runs, whose noise alone makes r about 0.5 (Pearson 1897). Hence two more answers beside r:
# `noise_correlations`, which r has to exceed, and `split_correlation`, where G and D have no noise in common.

def corr(x, y) -> float:
    """Pearson's correlation r; NaN where one of the two is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def noise_correlations(G, D) -> list[float]:
    """What r(G, D) is where there is nothing but noise: one r for each choice of signs (at most 512).

    A seed's deviation from the mean over seeds is noise. The deviations are summed with signs, as in
    `sign_flip`, and the sums of G and of D are correlated. With equal signs the sum is 0, as deviations
    from a mean sum to 0, so that choice is left out. The opposite of all signs gives the same r, so the
    first sign is always +.
    """
    noise_G = G - G.mean(0)
    noise_D = D - D.mean(0)
    choices = itertools.product([1.0, -1.0], repeat=len(G) - 1)

    correlations = []
    for choice in itertools.islice(choices, 1, 513):
        signs = np.array([1.0, *choice])
        correlations.append(corr(signs @ noise_G, signs @ noise_D))
    return correlations


def split_correlation(G, D) -> float:
    """r of G, averaged over some seeds, and D, averaged over the others: the mean over at most 512 splits.

    The two share no run, so noise alone gives 0. A true correlation is understated, as each part
    averages fewer seeds.
    """
    n = len(G)
    correlations = []
    for size in {n // 2, n - n // 2}:
        for chosen in itertools.islice(itertools.combinations(range(n), size), 256):
            gain = G[list(chosen)].mean(0)
            deficit = np.delete(D, chosen, axis=0).mean(0)
            correlations.append(corr(gain, deficit))
    return float(np.mean(correlations))


def gain_deficit(windowed, memory, ceiling) -> tuple[float, list, float]:
    """r of G and D (means over the seeds), its values for noise alone, and r of split seeds.

    windowed, memory, ceiling: bpb by position of the windowed baseline, the memory and global, (n,P) each.
    """
    G = np.subtract(windowed, memory)
    D = np.subtract(windowed, ceiling)
    return corr(G.mean(0), D.mean(0)), noise_correlations(G, D), split_correlation(G, D)


def pareto(points) -> list[int]:
    """Indexes of the points (cost, bpb) that no other point beats: nowhere worse and somewhere better."""
    def beats(a, b) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and tuple(a) != tuple(b)

    return [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]


def log_curve(run: RunRecord, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """The evaluations during training, in order: what had been spent (`minutes` or `flops`), and bpb."""
    # the log counts tokens, which cost FLOPs, and seconds, which are 1/60 minute each
    counted = "tokens"
    cost_of_one = run.costs.get("flops_per_token", 0)
    if cost == "minutes":
        counted = "seconds"
        cost_of_one = 1 / 60

    points = [(entry[counted] * cost_of_one, entry["val_bpb"]) for entry in run.log if finite(entry.get(counted))]
    points = np.array(sorted(point for point in points if point[0] > 0)).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def at_budget(run: RunRecord, cost: str, budget: float) -> float:
    """bpb once `budget` was spent, linear in log(cost) between two evaluations; NaN outside of them."""
    spent, bpb = log_curve(run, cost)
    if len(spent) == 0:
        return math.nan
    # the margin is for rounding: the budget is one run's own last cost
    if budget < spent[0] * (1 - 1e-9) or budget > spent[-1] * (1 + 1e-9):
        return math.nan
    return float(np.interp(math.log(budget), np.log(spent), bpb))


# ----------------------------------------------------------------------------------------------------------------------
# Tables

def human(x, _=None) -> str:
    """1234567 -> "1.23M". The second argument is the tick's number, which matplotlib gives to a formatter."""
    # rounded first, so that 999999 becomes 1M and not 1e+03k
    x = float(f"{x:.3g}")
    thousands = 0
    while abs(x) >= 1000 and thousands < 7:
        x /= 1000
        thousands += 1
    return f"{x:.3g}{['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z'][thousands]}"


def interval(mean, lo, hi, scale=1000.0) -> str:
    """"mean [lo, hi]", times the scale: 1000 turns bpb into mBPB."""
    if math.isnan(mean):
        return NOT_ENOUGH
    return f"{mean * scale:+.2f} [{lo * scale:+.2f}, {hi * scale:+.2f}]"


def show_p(p, adjusted) -> str | None:
    """A p value, and Holm's correction of it in brackets."""
    return None if math.isnan(p) else f"{p:.3g} ({adjusted:.3g})"


def lengths_of(cells) -> list[int]:
    """The training lengths T of these cells."""
    return sorted({c.T for c in cells})


def mean_and_spread(cell: Cell, digits: int) -> str:
    """The mean bpb of a cell ± the standard deviation over its seeds, which needs two of them."""
    text = f"{cell.mean():.{digits}f}"
    if len(cell.runs) > 1:
        text += f" ± {np.std(list(cell.bpb().values()), ddof=1):.{digits}f}"
    return text


def score_table(cells) -> str:
    """The score of each condition beside what it costs.

    Costs are medians, so that one run on a slower machine doesn't move them. The range of the minutes
    tells of it.
    """
    names = ("total_params", "memory_params", "flops_per_token", "state_bytes", "tokens_per_second", "minutes",
             "peak_mib")
    head = ["T", "condition", "learning rate", "n", "bpb", "parameters", "more than memory=none", "FLOPs/token",
            "state bytes", "tokens/s", "minutes", "peak MiB"]
    rows = []
    for c in cells:
        costs = {name: human(np.median(c.costs(name))) if c.costs(name) else None for name in names}
        minutes = c.costs("minutes")
        if minutes and max(minutes) > 1.1 * min(minutes):
            costs["minutes"] += f" ({min(minutes):.3g}–{max(minutes):.3g})"
        # as text, since a table gives a float four decimals
        rate = str(c.first.config.get("lr", "-"))
        rows.append([c.T, c.label, rate, len(c.runs), mean_and_spread(c, digits=5), *costs.values()])
    return table(head, rows, left=2)


class Comparison(NamedTuple):
    """A cell, the baseline it is compared with, and their paired differences."""
    cell: Cell
    against: Cell
    pairs: Paired


def comparisons(cells) -> list[Comparison]:
    """Every condition against the windowed baseline and against global, and against what is closest to it:

    rmt against its segments without memory tokens, since to cut the text into segments costs
    something; a memory in some layers against full attention in the same layers.
    """
    found = []
    for c in cells:
        others = [baseline(c, cells, *WINDOWED), baseline(c, cells, "global"), in_its_place(c, cells)]
        if c.first.memory.startswith("rmt"):
            others.append(baseline(c, cells, "rmt-0"))
        # the windowed baseline gets no row: that of global compares the two
        if others[0] is c:
            continue
        # one cell may play two of these parts
        distinct = {id(against): against for against in others if against is not None and against is not c}
        for against in distinct.values():
            found.append(Comparison(c, against, paired(c.bpb(), against.bpb())))
    return found


def in_its_place(cell: Cell, cells: list[Cell]) -> Cell | None:
    """For a memory in some layers of a windowed model: the cell that has full attention in the same layers."""
    config = cell.first.config
    in_all = config.get("memory_layers", "all") == "all"
    if cell.first.memory == "none" or cell.first.window != "S" or in_all:
        return None
    chosen = layers_with_memory(config, config["n_layer"])
    letters = "".join("L" if layer in chosen else "S" for layer in range(config["n_layer"]))
    candidates = []
    for other in cells:
        # the pattern of the other, tiled over the layers
        tiled = (other.first.window * len(letters))[:len(letters)]
        comparable = other.compared_within() == cell.compared_within()
        if comparable and other.first.memory == "none" and tiled == letters:
            candidates.append(other)
    return min(candidates, key=lambda other: len(differing(other.first, cell.first)), default=None)


def other_differences(comparison: Comparison) -> list[str]:
    """The settings that differ besides memory and window, and besides what follows from these two.

    The learning rate is not among them: each condition may have one of its own, and the table of scores shows it.
    """
    own = {"memory", "memory_layers", "window", "lr", "total_params", "memory_params", "flops_per_step"}
    different = differing(comparison.cell.first, comparison.against.first)
    return [key for key in different if key not in own and not owner(key)]


def difference_table(cells) -> str:
    """Every paired difference with its two tests. All tests of one kind are one family for Holm's correction."""
    family = comparisons(cells)
    adjusted_t = holm([pairs.p_t for _, _, pairs in family])
    adjusted_flip = holm([pairs.p_flip for _, _, pairs in family])

    rows = []
    notes = {}
    for i, comparison in enumerate(family):
        cell, against, pairs = comparison
        # what could have been seen is worth telling where nothing was
        smallest = f"{1000 * detectable(pairs.diffs):.1f}" if pairs.lo <= 0 <= pairs.hi else None
        rows.append([cell.T, cell.label, against.label, len(pairs.seeds), interval(pairs.mean, pairs.lo, pairs.hi),
                     smallest, show_p(pairs.p_t, adjusted_t[i]), show_p(pairs.p_flip, adjusted_flip[i])])
        different = other_differences(comparison)
        if different:
            # a dict, since lines of several T may be the same
            notes[f"- {cell.label} and {against.label}: {', '.join(different)}\n"] = True

    head = ["T", "condition", "against", "n", "Δ mBPB [95% CI]", "could be seen",
            "t test p (Holm)", "sign-flip p (Holm)"]
    text = table(head, rows, left=3)
    if notes:
        text += "\nNot only memory and window differ here:\n\n" + "".join(notes)
    return text


class PositionCurves(NamedTuple):
    """bpb by position of a condition and its two baselines, (n,P) each: n seeds, P buckets of positions."""
    cell: Cell
    positions: list
    sizes: list               # bytes in each bucket; 1 where the files do not say
    windowed: np.ndarray
    memory: np.ndarray
    ceiling: np.ndarray


def measured_on(run: RunRecord) -> tuple[list, list]:
    """What the run's curve was measured on: the positions, and the bytes in each of their buckets."""
    return list(run.curve), run.bucket_bytes


def stacked_curves(cell: Cell, seeds: list) -> np.ndarray:
    """The curves of these seeds as one array (n,P)."""
    return np.array([list(cell.runs[seed].curve.values()) for seed in seeds])


def between_baselines(cells) -> Iterator[tuple[Cell, Cell, Cell, list]]:
    """Every condition that has both baselines and is neither: windowed, the condition, global, the seeds of all."""
    for c in cells:
        windowed = baseline(c, cells, *WINDOWED)
        ceiling = baseline(c, cells, "global")
        if windowed is None or ceiling is None or c is windowed or c is ceiling:
            continue
        shared = sorted(windowed.runs.keys() & c.runs.keys() & ceiling.runs.keys())
        if shared:
            yield windowed, c, ceiling, shared


def position_curves(cells) -> Iterator[PositionCurves]:
    """The curves of every condition between a windowed and a global baseline, for the seeds that all three have.

    Curves compare only if they were measured on the same tokens: a seed whose three curves were not is left out.
    """
    for windowed, c, ceiling, shared in between_baselines(cells):
        measured = [measured_on(windowed.runs[seed]) for seed in shared if windowed.runs[seed].curve]
        if not measured:
            continue

        # the first seed that has a curve says where all have to be measured
        first = measured[0]
        trio = (windowed, c, ceiling)
        seeds = [seed for seed in shared if all(measured_on(cell.runs[seed]) == first for cell in trio)]
        if seeds:
            positions, sizes = first
            curves = [stacked_curves(cell, seeds) for cell in trio]
            yield PositionCurves(c, positions, sizes or [1] * len(positions), *curves)


def recombination(cells) -> str:
    """A sentence: is bpb of all position buckets together the bpb of the run, as it has to be?"""
    def error(run: RunRecord) -> float:
        return abs(run.recombined - run.bpb)

    runs = [run for run in all_runs(cells) if run.curve]
    worst = max(runs, key=error, default=None)
    if worst is None or error(worst) <= 1e-6 * worst.bpb:
        return f"The position buckets of all {len(runs)} curves recombine to val_bpb.\n"

    text = (f"**The position buckets do not recombine to val_bpb**: {worst.path} gives {worst.recombined:.5f}, val_bpb "
            f"is {worst.bpb:.5f}. D and G then measure another quantity, or other tokens, than val_bpb.")
    if not worst.bucket_bytes:
        text += (" The files don't record a bucket's bytes either, so that curves measured on different tokens can't "
                 "be told apart.")
    return text + "\n"


class WonBack(NamedTuple):
    """What a condition wins back of what the window costs, over the seeds that it and both baselines have."""
    cell: Cell
    windowed: Cell
    ceiling: Cell
    gain: Paired              # windowed - condition, in bpb
    deficit: Paired           # windowed - global

    def closure_of_means(self) -> float:
        """The closure without its interval, which needs no number of seeds."""
        return float(np.mean(self.gain.diffs) / np.mean(self.deficit.diffs))


def won_back(cells) -> Iterator[WonBack]:
    """The gain of every condition between a windowed and a global baseline, wherever they share seeds."""
    for windowed, c, ceiling, shared in between_baselines(cells):
        of_windowed, of_memory, of_global = [{seed: cell.runs[seed].bpb for seed in shared}
                                             for cell in (windowed, c, ceiling)]
        yield WonBack(c, windowed, ceiling, paired(of_windowed, of_memory), paired(of_windowed, of_global))


def closure_text(G, D) -> str:
    """The closure and its interval as percentages, or why there is none."""
    share = closure(G, D)
    if isinstance(share, str):
        return share
    ratio, lo, hi = share
    # rounded to integers, which know no -0
    return f"{round(100 * ratio)}% [{round(100 * lo)}, {round(100 * hi)}]"


def won_back_table(cells) -> str:
    """Gain and closure of every condition: over all positions, and in bands that double."""
    curves = {id(found.cell): found for found in position_curves(cells)}
    rows = []
    for c, windowed, ceiling, gain, deficit in won_back(cells):
        gain_text = interval(gain.mean, gain.lo, gain.hi)
        row = [c.T, c.label, len(gain.seeds), gain_text, closure_text(gain.diffs, deficit.diffs)]
        # a band begins at 0, T/8, T/4 and T/2; a bucket belongs to the band that it begins in
        begins = [0, c.T / 8, c.T / 4, c.T / 2, c.T]
        for begin, end in itertools.pairwise(begins):
            text = None
            if id(c) in curves:
                _, positions, sizes, of_windowed, of_memory, of_global = curves[id(c)]
                weights = [size if begin <= position < end else 0 for position, size in zip(positions, sizes)]
                if any(weights):
                    # bits per byte of several buckets are their mean, weighted by bytes
                    G = np.average(of_windowed - of_memory, 1, weights)
                    D = np.average(of_windowed - of_global, 1, weights)
                    text = closure_text(G, D)
            row.append(text)
        rows.append(row)
    head = ["T", "condition", "n", "gain mBPB [95% CI]", "closure [95% CI]", "in 0–T/8", "in T/8–T/4", "in T/4–T/2",
            "in T/2–T"]
    return table(head, rows, left=2)


def length_table(cells) -> str:
    """Several training lengths side by side: scores, then the deficit, then closures. Nothing for one length."""
    lengths = lengths_of(cells)
    if len(lengths) < 2:
        return ""
    scores = {}        # condition -> {T: text}
    deficits = {}
    closures = {}
    for c in cells:
        scores.setdefault(c.label, {})[c.T] = mean_and_spread(c, digits=4)
    for c, windowed, ceiling, gain, deficit in won_back(cells):
        # the deficit belongs to the baselines, so here it is that of all their seeds, whichever of them c has
        name = f"deficit: {windowed.label} − {ceiling.label}, mBPB"
        of_all = paired(windowed.bpb(), ceiling.bpb())
        deficits.setdefault(name, {})[c.T] = interval(of_all.mean, of_all.lo, of_all.hi)
        closures.setdefault(f"closure of {c.label}", {})[c.T] = closure_text(gain.diffs, deficit.diffs)

    rows = []
    for name, by_length in (scores | deficits | closures).items():
        rows.append([name, *[by_length.get(T) for T in lengths]])
    return table(["", *[f"T = {T}" for T in lengths]], rows)


def several_budgets(cells) -> dict[tuple[int, str], list[WonBack]]:
    """(T, label without its budget) -> what it wins back after each number of training tokens, the fewest first, over
    the seeds that all these numbers have. What was trained for one number alone, or shares no seed, is left out."""
    found = {}
    for won in won_back(cells):
        if won.cell.costs("train_tokens"):
            words = won.cell.label.split(" ")
            label = " ".join(word for word in words if not word.startswith(("steps=", "train_tokens=")))
            found.setdefault((won.cell.T, label), {})[training_tokens(won)] = won

    # other seeds at one end than at the other would look like an effect of the budget
    several = {}
    for key, budgets in found.items():
        shared = set.intersection(*(set(won.gain.seeds) for won in budgets.values()))
        if len(budgets) > 1 and shared:
            several[key] = [over_seeds(budgets[tokens], shared) for tokens in sorted(budgets)]
    return several


def over_seeds(won: WonBack, seeds: set) -> WonBack:
    """What is won back, over some of the seeds."""
    parts = []
    for pairs in (won.gain, won.deficit):
        diffs = {seed: diff for seed, diff in zip(pairs.seeds, pairs.diffs) if seed in seeds}
        parts.append(paired(diffs, dict.fromkeys(diffs, 0.0)))     # they are differences already
    gain, deficit = parts
    return won._replace(gain=gain, deficit=deficit)


def training_tokens(won: WonBack) -> float:
    """How many tokens these runs were trained on."""
    return won.cell.first.costs["train_tokens"]


def budget_table(cells) -> str:
    """Closure against training tokens, with both baselines at the same number. Nothing for one budget."""
    rows = []
    for (T, condition), budgets in several_budgets(cells).items():
        for won in budgets:
            rows.append([T, condition, human(training_tokens(won)), len(won.gain.seeds),
                         f"{1000 * np.mean(won.deficit.diffs):.0f}", f"{1000 * np.mean(won.gain.diffs):.0f}",
                         f"{round(100 * won.closure_of_means())}%", closure_text(won.gain.diffs, won.deficit.diffs)])
    head = ["T", "condition", "training tokens", "n", "deficit mBPB", "gain mBPB", "closure of means",
            "closure [95% CI]"]
    return table(head, rows, left=2)


def position_table(cells) -> str:
    """Deficit, gain and their correlation over positions, for every condition."""
    rows = []
    for c, positions, sizes, windowed, memory, ceiling in position_curves(cells):
        n = len(windowed)
        if n < MIN_SEEDS:
            rows.append([c.T, c.label, n, NOT_ENOUGH, None, None, None, None])
            continue

        # means over positions, one for each seed
        D = np.average(windowed - ceiling, 1, sizes)
        G = np.average(windowed - memory, 1, sizes)
        r, noise, split = gain_deficit(windowed, memory, ceiling)
        rows.append([
            c.T, c.label, n,
            interval(*t_interval(D)),
            interval(*t_interval(G)),
            f"{r:.2f}",
            f"{np.mean(noise):.2f}, highest of {len(noise)}: {max(noise):.2f}",
            f"{split:.2f}",
        ])

    head = ["T", "condition", "n", "mean D mBPB [95% CI]", "mean G mBPB [95% CI]", "r(G, D)", "r of noise alone",
            "r, split seeds"]
    text = table(head, rows, left=2)
    if rows:
        text += "\n" + recombination(cells)
    return text


class Frontier(NamedTuple):
    """What conditions of one length cost and reach, and which of them are on the Pareto frontier."""
    T: int
    cost: str                 # a key of COSTS
    points: list              # (median cost, mean bpb) of each cell, in the order of the cost
    cells: list
    best: list                # indexes of those that no other beats


def frontiers(cells) -> Iterator[Frontier]:
    """The Pareto frontier of every length and cost, wherever at least two conditions recorded the cost."""
    def point(c: Cell, cost: str) -> tuple[float, float]:
        return float(np.median(c.costs(cost))), c.mean()

    # conditions of different lengths don't compare, so each length has a frontier of its own
    for T, cost in itertools.product(lengths_of(cells), COSTS):
        here = [c for c in cells if c.T == T and c.costs(cost)]
        here.sort(key=lambda c: point(c, cost))
        if len(here) > 1:
            points = [point(c, cost) for c in here]
            yield Frontier(T, cost, points, here, pareto(points))


def frontier_table(cells) -> str:
    """For each cost the conditions on the frontier."""
    rows = []
    for f in frontiers(cells):
        names = ", ".join(f.cells[i].label for i in f.best)
        rows.append([f.T, COSTS[f.cost], names, len(f.cells)])
    return table(["T", "cost", "not beaten by any other", "compared"], rows, left=3)


def matched_rows(cells, cost: str) -> list[list]:
    """The rows of `matched_table` for one cost and cells of one length."""
    logged = []
    last_costs = []
    for c in cells:
        spent = [log_curve(run, cost)[0] for run in c.runs.values()]
        if all(len(costs) > 0 for costs in spent):
            logged.append(c)
            last_costs += [costs[-1] for costs in spent]
    if len(logged) < 2:
        return []
    # what every run has reached is the smallest of the last costs
    budget = min(last_costs)

    # label -> {seed: bpb at the budget}
    there = {}
    for c in logged:
        values = {seed: at_budget(run, cost, budget) for seed, run in c.runs.items()}
        there[c.label] = {seed: bpb for seed, bpb in values.items() if not math.isnan(bpb)}
    # without evaluations during training nothing can be compared but what ended at this budget
    if sum(bool(values) for values in there.values()) < 2:
        return []

    # differences from the windowed baseline, or from global where that has no log
    cost_name = "FLOPs" if cost == "flops" else cost
    rows = []
    for c in logged:
        values = there[c.label]
        bpb_there = f"{np.mean(list(values.values())):.5f}" if values else "first evaluated later"
        row = [c.T, f"{human(budget)} {cost_name}", c.label, len(values), bpb_there, None, None]
        against = baseline(c, logged, *WINDOWED, "global")
        if against is not None and against is not c:
            pairs = paired(values, there[against.label])
            row[-2:] = [against.label, interval(pairs.mean, pairs.lo, pairs.hi)]
        rows.append(row)
    return rows


def matched_table(cells) -> str:
    """bpb at the largest budget that every run of a length has reached, and the paired difference there."""
    rows = []
    for T, cost in itertools.product(lengths_of(cells), ("flops", "minutes")):
        rows += matched_rows([c for c in cells if c.T == T], cost)
    return table(["T", "budget", "condition", "n", "bpb there", "against", "Δ mBPB [95% CI]"], rows, left=3)


# ----------------------------------------------------------------------------------------------------------------------
# Figures. Seeds are small points, means are lines or large markers.

def reach(values) -> float:
    """How far an axis goes so that one outlier doesn't flatten the rest: 5 times the median of |values|."""
    values = np.abs(np.asarray(values, float))
    largest = float(values.max())
    typical = float(np.median(values))
    return min(largest, 5 * typical) if typical > 0 else largest


def draw_difference(ax, y: float, cell: Cell, pairs: Paired, far: float, limits: tuple) -> None:
    """One row of figure_differences: mean, interval and seeds; an arrow if the mean lies beyond `far`.

    far, and limits, where the axis begins and ends, are in mBPB.
    """
    style = look(cell.label)
    mean = 1000 * float(np.mean(pairs.diffs))
    if abs(mean) > far:
        left, right = limits
        if mean > 0:
            ax.text(right, y, f"{mean:+.1f} →", color=style["color"], weight="bold", ha="right", va="center")
        else:
            ax.text(left, y, f"{mean:+.1f} ←", color=style["color"], weight="bold", ha="left", va="center")
        return

    # in mBPB: the seeds, then the interval as a bar and the mean as a tick on it
    diffs = 1000 * np.array(pairs.diffs)
    ax.plot(diffs, [y + 0.22] * len(diffs), **style, linestyle="none", ms=6, alpha=0.8, mew=0)
    if not math.isnan(pairs.mean):
        ax.plot([1000 * pairs.lo, 1000 * pairs.hi], [y - 0.08] * 2, color=style["color"], lw=2)
        ax.plot(mean, y - 0.08, "|", color=style["color"], ms=13, mew=3)


def figure_differences(cells):
    """Differences from the windowed baseline (or global), paired by seed, with a panel for each length."""
    # one baseline for each condition, so that the rows compare; rmt against rmt-0 besides
    shown = []
    for comparison in comparisons(cells):
        cell, against, pairs = comparison
        is_chosen = against is baseline(cell, cells, *WINDOWED, "global") or against.base == "rmt-0"
        if pairs.seeds and is_chosen:
            shown.append(comparison)
    if not shown:
        return None

    # all panels share the axis: it holds everything of the rows whose mean is not an outlier
    far = 1000 * reach([np.mean(pairs.diffs) for _, _, pairs in shown])
    drawn = [0.0]
    for _, _, pairs in shown:
        if abs(np.mean(pairs.diffs)) * 1000 <= far:
            drawn += [1000 * x for x in (*pairs.diffs, pairs.lo, pairs.hi)]
    limits = float(np.nanmin(drawn)), float(np.nanmax(drawn))

    # a panel is as high as it has rows
    rows_of = Counter(cell.T for cell, _, _ in shown)
    heights = [0.9 + 0.42 * rows_of[T] for T in sorted(rows_of)]
    figure, axes = panels(len(heights), 1, (8, 0.5 + sum(heights)), sharex=True, height_ratios=heights)
    for ax, T in zip(axes[:, 0], sorted(rows_of)):
        here = [comparison for comparison in shown if comparison.cell.T == T]
        usual = here[0].against.label
        names = []
        for y, (cell, against, pairs) in enumerate(here):
            draw_difference(ax, y, cell, pairs, far, limits)
            name = f"{cell.label}, n={len(pairs.seeds)}"
            if against.label != usual:
                name += f"\nagainst {against.label}"
            names.append(name)
        ax.axvline(0, color="black", lw=1)
        ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
        ax.set(title=f"T = {T}, against {usual}")
        ax.margins(x=0.03)
    axes[-1, 0].set_xlabel("bpb difference, paired by seed (mBPB; left is better)")
    return figure


def draw_seeds_and_mean(ax, x, curves, label: str, color: str, linestyle: str) -> None:
    """The seeds' curves (n,P) as points, and their mean as a line."""
    ax.plot(np.tile(x, len(curves)), curves.ravel(), ".", color=color, ms=4, alpha=0.4, mew=0)
    ax.plot(x, curves.mean(0), color=color, linestyle=linestyle, lw=1.6, label=label)


def draw_condition(ax, cell: Cell, x: float, y: float, hollow: set):
    """The large marker of a condition, hollow if its label is in `hollow`; returns what a legend shows for it."""
    style = look(cell.label)
    fill = "white" if cell.label in hollow else style["color"]
    [handle] = ax.plot(x, y, **style, linestyle="none", mfc=fill, ms=9, alpha=0.9)
    return handle


def figure_won_back(cells):
    """bpb against the size of the state, between the two baselines, with a panel for each pair of them."""
    found = [won for won in won_back(cells) if won.cell.costs("state_bytes")]
    if not found:
        return None
    hollow = further_variants(cells)
    baselines = {(won.cell.T, won.windowed.label): won.windowed for won in found}
    figure, axes = panels(1, len(baselines), (max(6, 4.6 * len(baselines)), 4.6))
    handles = {}
    for ax, (T, label) in zip(axes[0], sorted(baselines)):
        windowed = baselines[T, label]
        here = [won for won in found if won.windowed is windowed]
        for cell in (windowed, here[0].ceiling):
            ax.axhline(cell.mean(), color=look(cell.label)["color"], lw=1.2, zorder=0)
            ax.annotate(cell.label, (1, cell.mean()), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        for won in here:
            # the mean and its interval are those of the difference, paired by seed, below the baseline's line
            x = float(np.median(won.cell.costs("state_bytes")))
            y = windowed.mean() - float(np.mean(won.gain.diffs))
            handles[won.cell.label] = draw_condition(ax, won.cell, x, y, hollow)
            if not math.isnan(won.gain.mean):
                ax.plot([x, x], windowed.mean() - np.array([won.gain.lo, won.gain.hi]),
                        color=look(won.cell.label)["color"], lw=1.2)
        settings = label.split(" ")[1:]     # those of --by
        ax.set(title=" ".join([f"T = {T}", *settings]), xscale="log", xlabel=COSTS["state_bytes"])
        ax.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        ax.minorticks_off()
        ax.xaxis.set_major_formatter(human)
    axes[0, 0].set_ylabel("validation bpb (bits per byte)")
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def figure_budget(cells):
    """Closure against training tokens: the seeds as points, and the closure of their means as a line."""
    found = several_budgets(cells)
    if not found:
        return None
    lengths = sorted({T for T, _ in found})
    figure, axes = panels(1, len(lengths), (max(6, 4.6 * len(lengths)), 4.6))
    for ax, T in zip(axes[0], lengths):
        for level in (0, 1):
            ax.axhline(level, color="black", lw=0.8, linestyle="dashed", zorder=0)
        here = {condition: budgets for (other, condition), budgets in found.items() if other == T}
        for (condition, budgets), style in zip(here.items(), distinct_looks(list(here))):
            shares = []
            for won in budgets:
                of_seeds = np.divide(won.gain.diffs, won.deficit.diffs)
                ax.plot([training_tokens(won)] * len(of_seeds), of_seeds, ".", color=style["color"], ms=5, mew=0)
                shares.append(won.closure_of_means())
            ax.plot([training_tokens(won) for won in budgets], shares, **style, lw=1.6, label=condition)
        ax.set(title=f"T = {T}", xscale="log", xlabel="training tokens")
        ax.set_xticks(sorted({training_tokens(won) for budgets in here.values() for won in budgets}))
        ax.minorticks_off()
        ax.xaxis.set_major_formatter(human)
    axes[0, 0].set_ylabel("closure (0 = windowed, 1 = global)")
    handles = {}
    for ax in axes[0]:
        for handle, name in zip(*ax.get_legend_handles_labels()):
            handles[name] = handle
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def further_variants(cells) -> set:
    """The labels to draw hollow: a colour and marker stands solid for its first condition, hollow for others."""
    first = {}
    for c in cells:
        first.setdefault(tuple(look(c.label).values()), c.label)
    return {c.label for c in cells} - set(first.values())


def figure_position(cells):
    """D(p) and G(p) of every condition between a windowed and a global baseline."""
    found = list(position_curves(cells))
    if not found:
        return None
    cols = min(3, len(found))
    rows = math.ceil(len(found) / 3)
    figure, axes = panels(rows, cols, (max(5, 3.3 * cols), 2.6 * rows + 0.3))
    for ax in axes.flat[len(found):]:
        ax.set_visible(False)

    for ax, (c, positions, _, windowed, memory, ceiling) in zip(axes.flat, found):
        deficit = 1000 * (windowed - ceiling)
        gain = 1000 * (windowed - memory)
        # a bucket is drawn at its middle; the last one ends at T
        middles = np.add(positions, np.diff(positions, append=c.T) / 2)
        draw_seeds_and_mean(ax, middles, deficit, label="D", color="black", linestyle="dashed")
        draw_seeds_and_mean(ax, middles, gain, label="G", color=look(c.label)["color"], linestyle="solid")
        ax.axhline(0, color="black", lw=0.6)

        # the axis leaves out the most extreme 0.6% of the points; above there is room for the legend
        lo, hi = np.quantile([deficit, gain], [0.003, 0.997])
        lo = min(lo, 0)
        hi = max(hi, 0)
        ax.set(ylim=(lo - 0.05 * (hi - lo), hi + 0.2 * (hi - lo)))
        ax.set(title=f"{c.label}\nT = {c.T}, n = {len(windowed)}")
        ax.locator_params(nbins=5)

    axes[0, 0].legend(fontsize=9, loc="upper center", ncols=2, frameon=False)
    figure.supxlabel("position in the row (tokens)")
    figure.supylabel("dashed D = windowed − global\nsolid G = windowed − condition (mBPB)", fontsize=10, ma="center")
    return figure


def draw_frontier(ax, f: Frontier, hollow: set) -> dict:
    """One panel of figure_pareto; returns label -> what the legend shows for it."""
    # a condition far above the best one is named in the title, and the axis stops below it
    means = [bpb for _, bpb in f.points]
    low = min(means)
    above = [bpb - low for bpb in means if bpb > low]
    far = low + (reach(above) if above else 0.0)
    seen = []
    title = [f"T = {f.T}"]
    handles = {}
    for c, (x, y) in zip(f.cells, f.points):
        seeds = list(c.bpb().values())
        if y <= far:
            seen += seeds
        else:
            title.append(f"↑ {c.label} {y:.3f}")
        handles[c.label] = draw_condition(ax, c, x, y, hollow)
        ax.plot([x] * len(seeds), seeds, **look(c.label), linestyle="none", ms=4, alpha=0.5, mew=0)

    # the frontier goes down in steps: what a budget between two points buys is the cheaper point
    best = np.array([f.points[i] for i in f.best])
    ax.step(best[:, 0], best[:, 1], where="post", color="black", lw=1, zorder=0)

    # a cost that spans more than a factor of 10 has a logarithmic axis
    cheapest = f.points[0][0]
    dearest = f.points[-1][0]
    if cheapest > 0 and dearest > 10 * cheapest:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(human)

    # The evaluations during training are drawn last. They begin far above and far left, so the axis ignores them.
    limits = ax.get_xlim()
    if f.cost != "state_bytes":
        for run in all_runs(f.cells):
            spent, bpb = log_curve(run, f.cost)
            ax.plot(spent, bpb, color="gray", lw=0.6, alpha=0.5, zorder=0)
    pad = 0.08 * (max(seen) - min(seen)) or 1e-3  # where all are equal the axis needs some height too
    ax.set(xlim=limits, ylim=(min(seen) - pad, max(seen) + pad), xlabel=COSTS[f.cost])
    ax.set_title("\n".join(title), fontsize=10)
    return handles


def figure_pareto(cells):
    """bpb against what it costs. Black: the frontier of the means; grey: the evaluations on the way there."""
    found = list(frontiers(cells))
    if not found:
        return None

    hollow = further_variants(cells)
    lengths = sorted({f.T for f in found})
    recorded = {f.cost for f in found}
    costs = [cost for cost in COSTS if cost in recorded]
    figure, axes = panels(len(lengths), len(costs), (max(6, 3.3 * len(costs)), 2.8 * len(lengths) + 0.8))
    handles = {}
    for f in found:
        ax = axes[lengths.index(f.T), costs.index(f.cost)]
        handles |= draw_frontier(ax, f, hollow)

    figure.supylabel("validation bpb (bits per byte)")
    shown = {c.label: handles[c.label] for c in cells if c.label in handles}
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=3, fontsize=9)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# The report

class Section(NamedTuple):
    """A section of REPORT.md. It is left out if its table is empty."""
    title: str
    lead: str                 # what to know before reading the table
    table: Callable           # cells -> text
    figure: Callable | None   # cells -> matplotlib's figure, or None
    file: str                 # the figure's file, without .png


SCORES = """
bpb: bits per byte of validation text, less is better. Shown is the mean ± the standard deviation over
n seeds; means over different seeds don't compare. Costs are medians over seeds. FLOPs are those of
training. The state is what is kept of one sequence of T tokens. tokens/s is the speed of a median
training step. The minutes are those of the whole training, with their range where it is wide. The
peak memory is the GPU's, or that of the process if there was no GPU.
"""
DIFFERENCES = f"""
Runs of one seed have read the same batches. So a difference is taken seed by seed, condition minus
baseline, over the n seeds that both have. It is in mBPB (0.001 bits per byte); a negative one is better
than the baseline. The learning rates may differ (see above). Below {MIN_SEEDS} seeds there is no interval
and no test. In brackets stands Holm's correction, over all tests of this table, for each kind of test.
Where the interval holds 0, "could be seen" is the smallest true difference that so many seeds,
scattering like these, would have shown in four of five repetitions (power 0.8). With n pairs the exact
sign-flip p can't be below 2/2^n, so with fewer than 6 it can't be below 0.05.
"""
POSITION = """
Does a memory help where the window hurts? In each bucket of positions, D = windowed − global is what the
window costs (if negative, it helps), and G = windowed − condition is what the condition gains (if
negative, it loses). Windowed is floor, or local where there is no floor. Up to the window's length
windowed and global see the same text, so a D there comes from training, not from what is seen. r
correlates G and D over positions. They share the windowed runs, so noise alone correlates them: r means
something only if it is above all values of the noise *and* above 0 with split seeds.
"""
WON_BACK = """
Windowed attention (floor, or local where there is no floor) is what a memory has to improve on, and
global attention is the ceiling. The gain is windowed − condition; closure is the share
(windowed − condition)/(windowed − global) of what the window costs. It is undefined where that cost's own
interval isn't above 0, since there is nothing to win back. Beside the closure over all positions it
stands for four bands of positions, from the first eighth of a row to its second half; these rest on the
seeds whose curves were measured on the same tokens.
"""
LENGTHS = """
Mean bpb ± standard deviation over seeds at each training length, what the window costs there, and the
share of it that each condition wins back.
"""
BUDGETS = """
Does the gap close with more training? Each number of training tokens has its own baselines. All numbers of a
condition rest on the seeds that all of them have; without a common seed it is left out. The closure of means
needs no interval, so that it is there for one or two seeds too. (Runs of several budgets need --by=steps.)
"""
FRONTIER = """
These are the conditions that no other beats, by being nowhere worse and somewhere better. Means are
compared here: a difference that lies within its interval above is no difference. In the figure large
markers are means, small ones are seeds, the black steps are the frontier, and grey lines are the
evaluations on the way there.
"""
MATCHED = """
This is bpb at the largest budget that every run has reached. Between two evaluations it is taken as
linear in the logarithm of the cost. A run whose learning rate had not yet come down stands worse here
than a run that was planned for this budget would.
"""
SECTIONS = (
    Section("Scores and costs", SCORES, score_table, None, ""),
    Section("Differences, paired by seed", DIFFERENCES, difference_table, figure_differences, "differences"),
    Section("What each memory wins back", WON_BACK, won_back_table, figure_won_back, "won_back"),
    Section("Training lengths", LENGTHS, length_table, None, ""),
    Section("Training budgets", BUDGETS, budget_table, figure_budget, "budget"),
    Section("Position", POSITION, position_table, figure_position, "position"),
    Section("Pareto frontier", FRONTIER, frontier_table, figure_pareto, "pareto"),
    Section("Matched compute", MATCHED, matched_table, None, ""),
)
PEER_NOTE = """These files follow memory-bench's schema. Its persistent runs attend globally, whatever window they name:
compare them with global. The matrices of its memories were trained by another optimizer (AdamW) than
those of its baseline (Muon).
"""
SETUP = "depth n_layer n_embd n_head short_window tokenizer steps batch_size train_tokens optimizer device".split()


def setup_text(cells) -> str:
    """How these cells were trained: every setting of SETUP, with all the values it has in them."""
    parts = []
    for key in SETUP:
        # a dict, since it keeps the order in which the values come
        values = dict.fromkeys(str(run.config[key]) for run in all_runs(cells) if key in run.config)
        if values:
            parts.append(f"{key} {' / '.join(values)}")
    return ", ".join(parts) or "unrecorded settings"


def introduction(cells) -> str:
    """What was trained, and what the names of the conditions mean."""
    meanings = ""
    for name in dict.fromkeys(c.base for c in cells):
        if name in CONDITIONS:
            meanings += f"- {name}: {CONDITIONS[name]}\n"
    return (f"T is the training length in tokens. Trained with {setup_text(cells)}.\n\n"
            "Some attention layers see a short window (S), the others all of the past (L). The pattern is "
            f"{USUAL_WINDOW}, repeated over the layers, unless a name ends with another one; that of floor is S, that "
            "of global L. A memory in place of attention has no such layers. A name with @ has the memory in these "
            "layers only, counted from 0.\n\n" + meanings)


def listing(title: str, lines: list[str]) -> str:
    """A title and its list; nothing for an empty list."""
    if not lines:
        return ""
    return f"{title}:\n\n" + "".join(f"- {line}\n" for line in lines) + "\n"


def report_study(cells, out: Path, number: int) -> str:
    """The sections of one study. Its figures are written into `out`; `number` keeps studies' figures apart."""
    preset_and_data = [name for name in cells[0].study if name]
    parts = [f"## {' · '.join(preset_and_data) or 'Runs'}\n", introduction(cells)]
    if PEER in cells[0].study:
        parts.append(PEER_NOTE)

    for section in SECTIONS:
        body = section.table(cells)
        if not body:
            continue
        parts.append(f"### {section.title}\n{section.lead}\n{body}")
        figure = section.figure(cells) if section.figure else None
        if figure is not None:
            name = f"{section.file}{number or ''}.png"
            write_whole(out / name, picture(figure))
            parts.append(f"![{section.title}]({name})\n")
    return "\n".join(parts)


def report(cells, repeats, skipped, others, out: Path) -> str:
    """Writes the figures into `out`; returns the text of REPORT.md."""
    n_runs = sum(len(c.runs) for c in cells)
    text = (f"# Results\n\n{n_runs} runs in {len(cells)} cells (a condition at a length); "
            f"{len(skipped)} files skipped, {len(repeats)} repeated seeds left out, "
            f"{len(others)} other JSON files ignored.\n\n")
    text += listing("Skipped", skipped)
    text += listing("Repeated seeds (the first file read is kept)", repeats)

    # studies have different data or presets, so nothing is compared across them
    studies = []
    for number, study in enumerate(sorted({c.study for c in cells})):
        mine = [c for c in cells if c.study == study]
        studies.append(report_study(mine, out, number))
    return text + "\n".join(studies)


class Parser(argparse.ArgumentParser):
    """argparse, whose errors become a UserError like every other bad input."""
    def error(self, message):
        raise UserError(f"{message}; see --help")


def main(argv=None) -> int:
    """Reads the folders, writes REPORT.md and its figures; returns the exit status."""
    parser = Parser(description=__doc__.split("\n")[0],
                    epilog="exit status: 0 all read, 1 some files skipped, 2 bad input")
    parser.add_argument("folders", nargs="+", help="folders with result files, searched to any depth for *.json")
    parser.add_argument("--out", default="out/report", help="where REPORT.md and the figures go (default out/report)")
    parser.add_argument("--by", default="", help="configuration keys that split conditions, e.g. --by=n_layer,lr")
    try:
        args = parser.parse_args(argv)
        by = args.by.split(",") if args.by else []
        runs, skipped, others = read_all(args.folders)
        cells, repeats = make_cells(runs, by)

        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        text = report(cells, repeats, skipped, others, out)
        write_whole(out / "REPORT.md", text.encode())
    except KeyboardInterrupt:
        print("\ninterrupted; the report is not complete", file=sys.stderr)
        return 130
    except (UserError, OSError) as e:  # an OSError names the file that can't be opened or written
        print(f"error: {e}", file=sys.stderr)
        return 2

    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    n_runs = sum(len(c.runs) for c in cells)
    print(f"{n_runs} runs, {len(cells)} cells, {len(repeats)} repeated seeds left out, {len(skipped)} files "
          f"skipped -> {out / 'REPORT.md'}")
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
