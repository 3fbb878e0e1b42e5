"""Data: from text to tokens to batches.

    corpus = load("python", "bpe:4096")
    x, y = corpus.batch(step=0, rows=8, seq_len=1024, seed=1)      # two int64 tensors (8, 1024)

`load` prepares a corpus once and keeps it on disk: it finds or downloads the text, makes the tokenizer, and writes
all tokens into flat files. After that a batch is only looked up. What it holds depends on the tokens, seq_len, the
seed and the number of the step, and on nothing else.

Corpora
    python          The .py files of the standard library and of the packages we need. This is the default. It is
                    found on the disk.
    python-docs     Python's language reference, the English text that help("with") shows. Every Python has it on
                    the disk. It is for measuring a model on text unlike its training text.
    fineweb-edu:N   N shards of 100 million GPT-2 tokens each, downloaded. Without N it is 14 shards, as many as
                    memory-bench's 1.32 billion tokens need.
    tinystories, simplewiki, shakespeare
                    These are downloaded when they are first used.
    PATH            A text file, or a folder of them. A line <|endoftext|> separates two documents. A .jsonl file
                    (also BabiStories' traindataset.txt and valdataset.txt) has one document a line: a string, or an
                    object with a string under "text" or "story". A .parquet file has one in each entry of its column
                    "text". A single .bin file is a shard of GPT-2 tokens. The names of the files tell the split if
                    each begins with train or val, or ends with train, val, valid or validation, and both splits
                    occur. Otherwise a hash of each document's key sends 5% of the documents to validation. If there
                    is only one document, its last 5% are for validation.

Tokenizers (all are tiktoken Encodings)
    gpt2            GPT-2's 50,257 tokens.
    byte            The 256 bytes and <|endoftext|>.
    bpe:N           N tokens, trained on the corpus. bpe:N@CORPUS are those of another corpus.
    A text may contain the characters <|endoftext|>. It never gets the token <|endoftext|> for them.

Glossary
    document        one file, story or article; in the token stream <|endoftext|> precedes it
    split           "train" or "val", what a document is used for
    key             the name of a file or a document in its corpus, the same on every machine
    piece           an <|endoftext|>, and behind it a document's text or a stretch of it; a row or less
    row             seq_len + 1 tokens: whole pieces without padding; x = row[:-1] and y = row[1:]
    length          of a text, in tokens, without <|endoftext|>
    size            of a piece: tokens, with its <|endoftext|>; of files and texts: bytes
    plan            which pieces make up which row; it depends on the tokens and seq_len only
    epoch           every row of the plan once, in an order that is drawn from (seed, epoch)

Reading order
    UserError, files      what a user did wrong; files that are written whole or not at all; the lock
    download              resumed, retried and checked
    documents             a file's documents, the Text of a corpus, its split
    corpora               from a dataset's name to its Text
    BPE, tokenizers       how bpe:N is trained; encode
    cache                 the tokens on disk
    rows                  how pieces are packed into rows
    Corpus, load          batches
    command line          python data.py --dataset=python --tokenizer=bpe:4096

References: byte-level BPE (Radford et al. 2019), best-fit packing (Ding et al. 2024, arXiv 2404.10830).
"""
import argparse
import base64
import contextlib
import difflib
import errno
import functools
import hashlib
import heapq
import http.client
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import ssl
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from bisect import bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:
    # Windows has no such lock: one process should prepare a corpus before several use it
    fcntl = None

CORPORA = ("python", "python-docs", "fineweb-edu", "tinystories", "simplewiki", "shakespeare")
PACKAGES = ("torch", "numpy", "tiktoken", "triton", "matplotlib", "scipy")

# where the downloaded corpora are
HUB = "https://huggingface.co/datasets/"
FINEWEB = "karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main/"
TINYSTORIES = "roneneldan/TinyStories/resolve/main/"
SIMPLEWIKI = "wikimedia/wikipedia/resolve/main/20231101.simple/"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# how often a download is tried, how long it waits before the second try, and when a silent server is given up
RETRIES = 6
RETRY_SECONDS = 1.0
TIMEOUT = 30

# a GPT-2 token shard begins with 256 int32; the first three are this number, the version 1, the number of tokens
SHARD_MAGIC = 20240520
SHARD_HEADER = 1024         # bytes: 256 int32
GPT2_EOS = 50256            # GPT-2's <|endoftext|>

FORMAT = 1                  # to be raised when the cache or the BPE training changes what it writes
BPE_SAMPLE = 24_000_000     # bytes of text that bpe:N is trained on

# A text with a longer run without white space, or of line ends, is encoded in slices of this many characters, since
# tiktoken takes quadratic time for a run.
LONGEST_RUN = 2048

# How the names of BabiStories' files end. Each line of them is a story.
BABI_STORIES = ("traindataset.txt", "valdataset.txt")

# BPE merges within words, and a word is one of these: letters after at most one mark or space; up to 3 digits; marks,
# with at most one space before and any line ends behind; white space up to a line end; white space up to the next word;
# other white space. Python's re (training) and tiktoken's Rust regex (encoding) read this pattern alike.
WORDS = r"(?:[^\w\r\n]|_)?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class UserError(Exception):
    """What the user has to know and can change, in one sentence. A script prints it as "error: ..." and exits with
    status 2."""


# ----------------------------------------------------------------------------------------------------------------------
# Files: written whole or not at all, prepared by one process at a time

@contextlib.contextmanager
def disk(path: str | Path):
    """Turns an OSError while `path` is written into a UserError that names it.

    The disk may be full, or the folder may be read-only. An OSError that comes from an open file does not know the
    file's name.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        # numpy's error for an array of which only a part fitted has no number
        remedy = ""
        if error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "make room, or "
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "make it writable, or "
        raise UserError(f"cannot write {path}: {reason}; files already written are intact, so {remedy}choose another "
                        "folder, and give the same command again") from None


@contextlib.contextmanager
def replacing(path: str | Path, keep: str | Path | None = None):
    """Gives a binary file to write, which takes path's place once it is complete and on the disk.

    So a file stands under its name whole or not at all, whenever the process is killed. If `keep` is given, the file
    that stood there before gets this name.
    """
    path = Path(path)
    temporary = Path(f"{path}.tmp")
    with disk(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                # a rename may reach the disk before the contents do, unless we wait for them here
                file.flush()
                os.fsync(file.fileno())
            if keep and path.exists():
                path.replace(keep)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | Path):
    """Lets one process at a time through. The others say so and wait, and then use what the first one made."""
    with open(path, "a") as file:
        # the lock ends when the file is closed, also by the end of a killed process
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process is preparing the data (it holds {path}): waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def did_you_mean(word: str, known: Iterable[str], form: str = "{}") -> str:
    """Returns "; did you mean X?" with the known word that is most like `word`, or "" if none is alike."""
    # of all known words that are alike, the best one
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.65)
    if not close:
        return ""
    return f"; did you mean {form.format(close[0])}?"


def add_file(digest, path: Path, offset: int = 0) -> None:
    """Adds the bytes of a file, from `offset` on, to a hash."""
    with open(path, "rb") as file:
        file.seek(offset)
        while block := file.read(1 << 20):
            digest.update(block)


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    add_file(digest, path)
    return digest.hexdigest()


def cache_path(cache: Path, name: str, ending: str) -> Path:
    """The place in the cache for something made from the corpus `name`."""
    return cache / (re.sub(r"[^\w.-]+", "_", name) + ending)


class Progress:
    """Shows on stderr how far a long piece of work is: bytes, speed, time left.

    A terminal shows it in place, five times a second. A log file gets a line every 10 seconds.
    """

    def __init__(self, label: str, total: int, quiet: bool = False, begin: int = 0):
        self.label = label
        self.total = total      # bytes of work
        self.begin = begin      # bytes that were done before this began
        self.quiet = quiet
        self.started = time.time()
        self.shown = self.started
        self.terminal = sys.stderr.isatty()

    def update(self, done: int) -> None:
        """Tells it that so many bytes are done."""
        # is it time for another line?
        now = time.time()
        finished = 0 < self.total <= done   # a server may not tell the total
        if self.terminal:
            due = finished or now - self.shown > 0.2
        else:
            due = now - self.shown > 10
        if self.quiet or not due:
            return

        # the speed is that of this run, without the bytes that were there before
        self.shown = now
        speed = max(done - self.begin, 1) / max(now - self.started, 1e-3)
        left = max(self.total - done, 0) / speed
        line = (f"{self.label}: {done / 1e6:.1f} of {self.total / 1e6:.1f} MB, {speed / 1e6:.1f} MB/s, "
                f"{left:.0f} s left    ")
        # "\r" lets the next line overwrite this one
        in_place = self.terminal and not finished
        print(line, end="\r" if in_place else "\n", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Download

class Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the sha256 of the file that Hugging Face tells only in the redirect."""

    etag = None

    def redirect_request(self, request, file, code, message, headers, url):
        """urllib calls this for each redirect."""
        self.etag = headers.get("X-Linked-ETag") or self.etag
        return super().redirect_request(request, file, code, message, headers, url)


def fetch(url: str, part: Path, quiet: bool) -> str | None:
    """One attempt to complete the file `part` from where it ends. Returns the sha256 that the server tells, or None.

    Raises ConnectionError if the connection closes early, which urllib itself does not notice.
    """
    # ask for the bytes that are missing
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "nanomem"})
    if have:
        request.add_header("Range", f"bytes={have}-")

    # send the request, and wait for the first line of the answer
    redirect = Redirect()
    with urllib.request.build_opener(redirect).open(request, timeout=TIMEOUT) as answer:
        # only status 206 is a partial answer; with any other the server sends the whole file
        if answer.status != 206:
            have = 0
        total = have + int(answer.headers.get("Content-Length") or 0)

        # write what comes, and see that all of it is on the disk
        progress = Progress(url.split("/")[-1], total, quiet, begin=have)
        with open(part, "ab" if have else "wb") as file:
            while block := answer.read(1 << 18):
                file.write(block)
                have += len(block)
                progress.update(have)
            file.flush()
            os.fsync(file.fileno())
        if have < total:
            raise ConnectionError(f"the connection closed after {have} of {total} bytes")

        # small files have an ETag too, which is no sha256
        etag = answer.headers.get("X-Linked-ETag") or redirect.etag or ""
        etag = etag.strip('"')
        return etag if re.fullmatch("[0-9a-f]{64}", etag) else None


def download(url: str, path: str | Path, sha256: str | None = None, quiet: bool = False) -> Path:
    """Downloads url to path, where the file appears whole or not at all.

    The bytes are collected in path.part. If an attempt breaks off, the next one goes on where it ended, be it in this
    run or in a later one. The file must have the hash `sha256`, or else the hash that the server tells, if any.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")

    for attempt in range(RETRIES):
        # wait 0, 1, 3, 7, ... times RETRY_SECONDS
        time.sleep(RETRY_SECONDS * (2 ** attempt - 1))
        resumed = part.exists()
        try:
            told = fetch(url, part, quiet)
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code == 416:
                # the part is as long as the file, or longer: it is the file, or we start over
                if sha256 and file_sha256(part) == sha256:
                    part.replace(path)
                    return path
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code != 429:
                # it is our request that is wrong, and not that the server is too busy
                raise UserError(f"{url} cannot be downloaded: {reason}; put the file at {path} yourself") from error
            continue
        except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            continue

        # the file is complete; is it the right one?
        found = file_sha256(part)
        expected = sha256 or told
        if expected is None or expected == found:
            part.replace(path)
            return path

        # a resumed part may begin with an older version of the file, so it gets another try
        part.unlink()
        reason = f"sha256 {expected} expected, {found} found"
        if not resumed:
            raise UserError(f"{url} is not the file it should be: {reason}; try again later, or put the right file at "
                            f"{path} yourself")

    raise UserError(f"{url} cannot be downloaded ({reason}): run again to go on where it stopped, or "
                    f"put the file at {path} yourself")


# ----------------------------------------------------------------------------------------------------------------------
# Documents: what a file holds, and which split each document belongs to

class File(NamedTuple):
    """One file of a corpus."""
    key: str        # its name in the corpus, the same on every machine
    path: Path
    split: str      # "train", "val", or "" where a hash of each document's key decides


class Document(NamedTuple):
    """One document of a corpus."""
    key: str        # the file's key and the document's number in it
    split: str      # as in File
    text: str
    replaced: int   # bytes that were not UTF-8 and were replaced


class Survey(NamedTuple):
    """What one pass over all documents finds."""
    is_val: np.ndarray      # (documents,) bool
    size: int               # bytes of all documents
    train_size: int         # bytes of the training documents
    replaced_bytes: int
    replaced_documents: int


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a GPT-2 token shard, memory-mapped. Raises UserError for another or a truncated file."""
    # is it a shard?
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 3).tolist()
    if size < SHARD_HEADER or header[:2] != [SHARD_MAGIC, 1]:
        raise UserError(f"{path} is not a token shard: a header of {SHARD_HEADER} bytes is expected that begins with "
                        f"the numbers {SHARD_MAGIC} and 1, found are {size} bytes that begin with {header[:2]}")

    # is all of it there?
    count = header[2]
    if size != SHARD_HEADER + 2 * count:
        raise UserError(f"{path} is truncated or damaged: {count} tokens expected, "
                        f"{(size - SHARD_HEADER) // 2} found; replace it (a downloaded one is loaded again once it is "
                        "deleted)")
    return np.memmap(path, "<u2", "r", SHARD_HEADER)


def shard_documents(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the texts in a shard start, and how many tokens each has. The first may continue the shard before."""
    # a text lies between two <|endoftext|>, or between one and an end of the shard
    bounds = np.concatenate([[-1], np.flatnonzero(tokens == GPT2_EOS), [len(tokens)]])
    start = bounds[:-1] + 1
    length = np.diff(bounds) - 1
    return start[length > 0], length[length > 0]


def decode(raw: bytes) -> tuple[str, int]:
    """UTF-8 bytes -> text, and how many bytes were not UTF-8. Each of these is replaced by U+FFFD."""
    try:
        return raw.decode(), 0
    except UnicodeDecodeError:
        # surrogateescape turns each bad byte into one character of this range, so that they can be counted
        text, replaced = re.subn("[\udc80-\udcff]", "\ufffd", raw.decode("utf-8", "surrogateescape"))
        return text, replaced


# The readers: each yields (text, bytes replaced) for every document of a file.

def read_parquet(path: Path) -> Iterator[tuple[str, int]]:
    """Reads the column "text" of a parquet file."""
    # only simplewiki needs pyarrow, so it is imported only here
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path} is parquet and pyarrow is not there: pip install pyarrow") from error
    # what is no parquet is a ValueError of pyarrow's; a column that is missing is left out of the rows
    try:
        for rows in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            for text in rows.to_pydict()["text"]:
                if not isinstance(text, str | None):
                    raise ValueError(f"its text is {text!r}")
                yield text or "", 0
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} should be a parquet file with a column of strings named text ({error!r})") from None


def read_shard(path: Path) -> Iterator[tuple[str, int]]:
    """Reads a GPT-2 token shard as text, for another tokenizer."""
    tokens = open_shard(path)
    gpt2 = get_encoding("gpt2")
    for start, length in zip(*shard_documents(tokens)):
        yield decode(gpt2.decode_bytes(tokens[start:start + length].tolist()))


def read_json_lines(path: Path) -> Iterator[tuple[str, int]]:
    """Reads one document a line: a JSON string, or an object with a string under "text" or "story"."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            # a blank line counts as a document, and is left out later like every blank document
            line, replaced = decode(raw)
            if not line.strip():
                yield "", 0
                continue

            # what is no JSON is refused below, like JSON without a text
            try:
                text = json.loads(line)
            except (ValueError, RecursionError):
                text = None
            if isinstance(text, dict):
                text = text.get("text", text.get("story"))
            if not isinstance(text, str):
                raise UserError(f"line {number} of {path} should be a JSON string, or an object with a "
                                f'string under "text" or "story", and is {line[:40]!r}')

            # JSON can spell half of a surrogate pair, which is no text
            yield text.encode("utf-8", "replace").decode(), replaced


def read_plain(path: Path) -> Iterator[tuple[str, int]]:
    """Reads plain text, in which a line <|endoftext|> separates two documents."""
    # collect the lines of a document until it ends
    lines = []
    with open(path, "rb") as file:
        for line in file:
            if line.startswith(b"<|end") and line.strip() == b"<|endoftext|>":
                yield decode(b"".join(lines))
                lines = []
            else:
                lines.append(line)
    # behind the last separator
    yield decode(b"".join(lines))


def read_file(file: File) -> Iterator[tuple[str, int]]:
    """Reads a file by the ending of its name."""
    name = file.path.name
    if name.endswith(".parquet"):
        return read_parquet(file.path)
    if name.endswith(".bin"):
        return read_shard(file.path)
    if name.endswith((".jsonl", *BABI_STORIES)):
        return read_json_lines(file.path)
    return read_plain(file.path)


def read_topic(file: File) -> Iterator[tuple[str, int]]:
    """Reads one topic of Python's language reference; the file's key is the topic's name."""
    from pydoc_data.topics import topics
    yield topics[file.key], 0


def draw(key: str) -> float:
    """A number from 0 to 1 that looks random and depends on the key only."""
    # the names of files need not be UTF-8
    return int(hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:12], 16) / 16**12


class Text:
    """The text of a corpus before it is tokenized: its files in the order of their keys, and how they are read."""

    def __init__(self, name: str, files: list[File], val_fraction: float = 0.05,
                 read: Callable[[File], Iterator[tuple[str, int]]] = read_file):
        self.name = name
        self.files = sorted(files)
        self.val_fraction = val_fraction
        self.read = read

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash that changes with the names, sizes and times of the files. It costs little, so every run checks it."""
        facts = []
        for key, path, split in self.files:
            stat = path.stat()
            facts.append((key, split, stat.st_size, stat.st_mtime_ns))
        return hashlib.sha256(repr((FORMAT, self.val_fraction, facts)).encode()).hexdigest()

    def found(self) -> Iterator[Document]:
        """Yields every document of the files that is not blank."""
        for file in self.files:
            try:
                for number, (text, replaced) in enumerate(self.read(file)):
                    if text.strip():
                        yield Document(f"{file.key}:{number}", file.split, text, replaced)
            except OSError as error:
                raise UserError(f"cannot read {file.path}: {error.strerror}; put it back, or name the corpus without "
                                "it") from error

    def documents(self) -> Iterator[Document]:
        """Yields every document. A lone one is cut in two, so that there is something to train and to validate on."""
        found = self.found()
        first_two = list(itertools.islice(found, 2))
        if len(first_two) != 1:
            yield from first_two
            yield from found
            return

        # cut at the end of a line, if the half before the cut has one
        (lone,) = first_two
        cut = int(len(lone.text) * (1 - self.val_fraction))
        line_end = lone.text.rfind("\n", cut // 2, cut)
        if line_end >= 0:
            cut = line_end + 1
        yield lone._replace(split="train", text=lone.text[:cut])
        yield lone._replace(split="val", text=lone.text[cut:], replaced=0)

    @functools.cached_property
    def survey(self) -> Survey:
        """Reads all documents once, to count them and to split them."""
        # one entry for each document
        draws = []
        splits = []
        sizes = []
        replaced = []
        for document in self.documents():
            draws.append(draw(document.key))
            splits.append(document.split)
            sizes.append(len(document.text.encode()))
            replaced.append(document.replaced)
        if not draws:
            raise UserError(f"the dataset {self.name} has no text: its {len(self.files)} files are blank")

        # a document whose file tells no split goes where its draw sends it
        draws = np.array(draws)
        splits = np.array(splits)
        is_val = np.where(splits == "", draws < self.val_fraction, splits == "val")

        # if the draws left a split without documents, the one that was nearest to it goes there
        if not is_val.any():
            is_val[draws.argmin()] = True
        if is_val.all():
            is_val[draws.argmax()] = False

        sizes = np.array(sizes)
        return Survey(is_val, size=int(sizes.sum()), train_size=int(sizes[~is_val].sum()),
                      replaced_bytes=sum(replaced), replaced_documents=int(np.count_nonzero(replaced)))


# ----------------------------------------------------------------------------------------------------------------------
# Corpora: from the name of a dataset to its Text

def walk(root: Path, label: str = "", skip: tuple[str, ...] = ()) -> Iterator[File]:
    """Yields the files in a folder and its folders, but none that is empty, hidden or a cache.

    label: put before each key. skip: names of folders that are left out.
    """
    for folder, folders, names in os.walk(root):
        # os.walk goes on into the folders that are left in this list
        folders[:] = [name for name in folders if name[0] != "." and name not in ("__pycache__", *skip)]
        for name in names:
            path = Path(folder, name)
            if name[0] != "." and path.is_file() and path.stat().st_size:
                yield File(label + path.relative_to(root).as_posix(), path, "")


def python_roots() -> list[tuple[str, Path]]:
    """(label, folder) of the standard library and of each of our packages that is installed."""
    roots = [("stdlib/", Path(sysconfig.get_path("stdlib")))]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)       # this does not import it
        if spec and spec.origin:
            roots.append((name + "/", Path(spec.origin).parent))
    return roots


def is_source(key: str) -> bool:
    """Whether a file belongs to the corpus `python`.

    Two files of the standard library do not: _sysconfigdata*.py describes the machine, and pydoc_data/topics.py is
    the corpus `python-docs`, on which a model of `python` is to be measured.
    """
    left_out = ("stdlib/_sysconfigdata", "stdlib/pydoc_data/topics.py")
    return key.endswith(".py") and not key.startswith(left_out)


def python_text() -> Text:
    """The corpus `python`: some thousand files of source code, of which 1% are for validation."""
    files = []
    for label, root in python_roots():
        for file in walk(root, label, skip=("site-packages",)):
            if is_source(file.key):
                files.append(file)
    return Text("python", files, val_fraction=0.01)


def python_docs_text() -> Text:
    """The corpus `python-docs`: the language reference behind help("with"), about 80 topics and 465 kB of English.

    Each topic is a document. Python keeps them as one dict, topic -> text, in the module pydoc_data.topics. The corpus
    is small and serves for measuring, so half of the topics are for validation. Training on it makes little sense:
    some topics repeat others across the split (the topic "compound" contains the topic "with").
    """
    # the module is 0.5 MB of text, so it is imported only here
    try:
        import pydoc_data.topics as module
    except ImportError as error:
        raise UserError("the dataset python-docs is the module pydoc_data.topics of Python's standard library, which "
                        "this Python lacks: install the whole standard library") from error

    # all topics are in one file, whose size and time tell its version
    path = Path(module.__file__)
    files = [File(topic, path, "") for topic in module.topics]
    return Text("python-docs", files, val_fraction=0.5, read=read_topic)


def is_text(path: Path) -> bool:
    """Whether a file of the user's folder can be read: it is parquet, or it does not begin like a binary file."""
    with open(path, "rb") as file:
        return path.suffix == ".parquet" or b"\0" not in file.read(8192)


def split_in_name(key: str) -> str:
    """The split that the name of a file tells: "train", "val", or "" if it tells none."""
    # train_1, val2, stories-train, storiesValid, ...
    stem = Path(key).stem.lower()
    found = re.search("^(train|val)|(train|val)(id|idation)?$", stem)
    if found is None:
        return ""
    return "val" if found[0].startswith("val") else "train"


def path_text(path: Path) -> Text:
    """The Text of the user's own file or folder."""
    # a file is a corpus of one file
    name = path.absolute().name
    if path.is_file():
        if path.stat().st_size == 0:
            raise UserError(f"the file {path} is empty: a dataset needs text")
        return Text(name, [File(name, path, "")])

    # of a folder we take what is text
    files = [file for file in walk(path) if is_text(file.path)]
    if not files:
        raise UserError(f"the folder {path} has no text in it: a file that is not empty is needed")

    # the names of the files are the split only if every name tells one, and both occur
    splits = [split_in_name(file.key) for file in files]
    if set(splits) == {"train", "val"}:
        files = [file._replace(split=split) for file, split in zip(files, splits)]
    return Text(name, files)


def find_text(dataset: str, cache: Path, quiet: bool = False) -> Text:
    """The Text of a dataset by its name, downloaded if need be. Raises UserError for a name that is not known."""
    name, _, count = dataset.partition(":")

    def get(url: str, sha256: str | None = None) -> Path:
        """Downloads a file of this dataset."""
        return download(url, cache / "downloads" / name / url.split("/")[-1], sha256, quiet)

    # on every disk
    if dataset == "python":
        return python_text()
    if dataset == "python-docs":
        return python_docs_text()

    # one validation shard, and N training shards
    if name == "fineweb-edu" and re.fullmatch("([1-9][0-9]{0,3})?", count):
        keys = ["val_000000.bin"]
        keys += [f"train_{i:06d}.bin" for i in range(1, int(count or 14) + 1)]
        files = []
        for key in keys:
            path = get(f"{HUB}{FINEWEB}edu_fineweb_{key}")
            files.append(File(key, path, split_in_name(key)))
        return Text(name, files)

    # the other downloads are one or two files
    if dataset == "tinystories":
        train = get(f"{HUB}{TINYSTORIES}TinyStoriesV2-GPT4-train.txt")
        val = get(f"{HUB}{TINYSTORIES}TinyStoriesV2-GPT4-valid.txt")
        return Text(name, [File("train", train, "train"), File("val", val, "val")])
    if dataset == "simplewiki":
        articles = get(f"{HUB}{SIMPLEWIKI}train-00000-of-00001.parquet")
        return Text(name, [File(name, articles, "")], val_fraction=0.01)
    if dataset == "shakespeare":
        return Text(name, [File(name, get(SHAKESPEARE, SHAKESPEARE_SHA256), "")])

    # the user's own text; an empty name would be this folder
    if dataset and Path(dataset).exists():
        return path_text(Path(dataset))

    raise UserError(f"there is no dataset {dataset!r}: a file, a folder or one of {', '.join(CORPORA)} "
                    f"(fineweb-edu:N for N shards) is expected{did_you_mean(dataset, CORPORA)}")


# ----------------------------------------------------------------------------------------------------------------------
# BPE training

def training_chunks(text: Text, chunk: int = 1 << 16) -> Iterator[str]:
    """Yields the training documents in chunks of `chunk` characters; the last one of a document may be shorter."""
    for document, is_val in zip(text.documents(), text.survey.is_val):
        if not is_val:
            for at in range(0, len(document.text), chunk):
                yield document.text[at:at + chunk]


def count_words(text: Text) -> Counter:
    """How often each word occurs in the training text, or in every k-th chunk of it if it is larger than BPE_SAMPLE."""
    # with every k-th chunk the sample comes from all parts of the text
    k = max(1, math.ceil(text.survey.train_size / BPE_SAMPLE))
    words = Counter()
    for chunk in itertools.islice(training_chunks(text), 0, None, k):
        words.update(re.findall(WORDS, chunk))
    return words


def pairs(word: str) -> list[str]:
    """The pairs of neighbours in a word: "abca" -> ["ab", "bc", "ca"]"""
    return [word[i:i + 2] for i in range(len(word) - 1)]


def count_pairs(spelling: list[str], times: list[int]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """How often each pair occurs in the words, where word i counts times[i] times; and the words that contain it."""
    count = defaultdict(int)
    where = defaultdict(list)
    for i, word in enumerate(spelling):
        for pair in pairs(word):
            count[pair] += times[i]
            where[pair].append(i)
    return count, where


def merge_pair(pair: str, new: str, spelling: list[str], times: list[int], count: dict, where: dict) -> set[str]:
    """Writes `new` for `pair` in every word, and corrects the counts. Returns the pairs that contain `new`."""
    made = set()
    for i in set(where.pop(pair)):
        old_word = spelling[i]
        new_word = old_word.replace(pair, new)
        if new_word == old_word:
            continue        # an earlier merge took the pair out of this word

        # the pairs of the old spelling are gone, those of the new one are there
        spelling[i] = new_word
        for old_pair in pairs(old_word):
            count[old_pair] -= times[i]
        for new_pair in pairs(new_word):
            count[new_pair] += times[i]
            if new in new_pair:
                where[new_pair].append(i)
                made.add(new_pair)
    return made


def most_frequent(heap: list[tuple[int, str]], count: dict[str, int]) -> str | None:
    """Takes the most frequent pair from the heap, or None if no pair is left.

    The heap's entries are (-count, pair), as heappop takes out the smallest.
    """
    while heap:
        negative, pair = heapq.heappop(heap)
        if -negative == count[pair]:
            return pair
        # this count is out of date: the pair has got rarer since, or it no longer occurs
        if count[pair]:
            heapq.heappush(heap, (-count[pair], pair))
    return None


def train_bpe(words: Counter, n_tokens: int) -> list[bytes]:
    """Byte-pair encoding: the tokens are the 256 bytes, and then, again and again, what the most frequent pair spells.

    A word is kept as a string in which chr(i) stands for token i, so that str.replace merges a pair. Of pairs that are
    equally frequent, the one with the smaller token ids comes first. To count all pairs anew after each merge would
    take hours. So the counts are kept up to date, and a heap tells the most frequent pair.
    """
    # 1. At first the tokens are the bytes, and each word is spelled in bytes. latin-1 makes chr(b) of the byte b.
    tokens = [bytes([i]) for i in range(256)]
    spelling = [word.encode().decode("latin-1") for word in words]
    times = list(words.values())

    # 2. Count every pair, and note in which words it occurs.
    count, where = count_pairs(spelling, times)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)

    while len(tokens) < n_tokens:
        # 3. Take the most frequent pair.
        pair = most_frequent(heap, count)
        if pair is None:
            raise UserError(f"the text is too small for a vocabulary of {n_tokens + 1}: it gives only "
                            f"{len(tokens) + 1} tokens; use --tokenizer=byte or a smaller bpe:N")

        # 4. What it spells is the next token.
        new = chr(len(tokens))
        first, second = pair
        tokens.append(tokens[ord(first)] + tokens[ord(second)])

        # 5. Merge the pair in every word, and put the pairs that this makes on the heap.
        for made in merge_pair(pair, new, spelling, times, count, where):
            heapq.heappush(heap, (-count[made], made))
    return tokens


def trained_tokens(n: int, text: Text, cache: Path, quiet: bool = False) -> list[bytes]:
    """The tokens of bpe:N without <|endoftext|>, from the cache or trained now. The file has tiktoken's format."""
    path = cache_path(cache, text.name, f"-{text.fingerprint[:16]}-bpe{n}.tiktoken")
    if path.exists():
        # each line is a token in base64, and its id; most damage shows in a line or in their number
        try:
            with open(path, "rb") as file:
                tokens = [base64.b64decode(line.split()[0]) for line in file]
        except (ValueError, IndexError):
            tokens = []
        if len(tokens) == n - 1:
            return tokens
        print(f"note: {path} is damaged and is made again", file=sys.stderr)

    began = time.time()
    tokens = train_bpe(count_words(text), n - 1)
    with replacing(path) as file:
        for i, token in enumerate(tokens):
            file.write(base64.b64encode(token) + b" %d\n" % i)
    if not quiet:
        print(f"trained bpe:{n} on {text.name} in {time.time() - began:.1f} s", file=sys.stderr)
    return tokens


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's tokenizer, which tiktoken downloads once."""
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise UserError("the gpt2 tokenizer cannot be downloaded: go online once, set TIKTOKEN_CACHE_DIR "
                        "to a folder that has it, or use --tokenizer=byte or bpe:4096") from error


def get_encoding(tokenizer: str, text: Text | None = None, cache: str | Path = "out/data",
                 quiet: bool = False) -> tiktoken.Encoding:
    """The tiktoken Encoding of "gpt2", "byte", "bpe:N" (trained on `text`) or "bpe:N@CORPUS".

    The last token of each is <|endoftext|>, encoding.eot_token.
    """
    if tokenizer == "gpt2":
        return gpt2_encoding()

    # bpe:N needs an N above the 256 bytes and <|endoftext|>, and a text to be trained on
    kind, _, other = tokenizer.partition("@")
    n = int(kind[4:]) if re.fullmatch("bpe:[0-9]{3,6}", kind) else 0
    if tokenizer == "byte":
        tokens = [bytes([i]) for i in range(256)]
        pattern = "(?s:.)"
    elif n > 257 and (text or other):
        if other:
            text = find_text(other, Path(cache), quiet)
        tokens = trained_tokens(n, text, Path(cache), quiet)
        pattern = WORDS
    else:
        raise UserError(f"there is no tokenizer {tokenizer!r}: gpt2, byte, bpe:N or bpe:N@CORPUS is "
                        "expected, with N from 258 to 999999")

    # tiktoken merges in the order of the ranks; <|endoftext|> gets the id behind all of them
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(tokenizer, pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(tokens)}, explicit_n_vocab=len(tokens) + 1)


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """The tokens of a text. Nothing in a text is special: the characters <|endoftext|> are encoded like others."""
    # bytes need no tiktoken; what the command line holds need not be UTF-8
    if encoding.name == "byte":
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)

    # tiktoken takes minutes for a very long run (no white space, or line ends only): then the whole text is cut
    # into slices
    longest = max(map(len, text.split()), default=0)
    slices = [text]
    if longest > LONGEST_RUN or "\n" * LONGEST_RUN in text:
        slices = [text[at:at + LONGEST_RUN] for at in range(0, len(text), LONGEST_RUN)]
    return np.concatenate([encoding.encode_to_numpy(part, disallowed_special=()) for part in slices])


# ----------------------------------------------------------------------------------------------------------------------
# Cache: one folder for each pair of a text and a tokenizer
#
#     train.bin, val.bin      the token streams: <|endoftext|>, a document's tokens, <|endoftext|>, ...
#     train.npy, val.npy      (2, documents): where each document's text starts in the stream, and how long it is
#     meta.json               which files the streams are in, their dtype and sha256; it is written last

def tokenize(text: Text, encoding: tiktoken.Encoding, folder: Path, quiet: bool = False) -> dict:
    """Writes the tokens to train.bin and val.bin, and where the documents are to train.npy and val.npy. Returns the
    meta (prepare adds sha256 and sizes)."""
    survey = text.survey
    dtype = np.dtype("<u2" if encoding.n_vocab <= 65536 else "<u4")
    eos = np.array([encoding.eot_token], dtype)
    lengths = {"train": [], "val": []}
    done = 0
    progress = Progress(f"tokenizing {text.name}", survey.size, quiet)

    # the threads share the work: tiktoken lets go of Python's lock while it encodes
    documents = zip(text.documents(), survey.is_val)
    threads = ThreadPoolExecutor(min(os.cpu_count() or 1, 16))
    with replacing(folder / "train.bin") as train, replacing(folder / "val.bin") as val, threads:
        streams = {"train": train, "val": val}
        while batch := list(itertools.islice(documents, 128)):
            texts = [document.text for document, _ in batch]
            encoded = threads.map(functools.partial(encode, encoding), texts)
            # write each to the file of its split, in the order of the text
            for (document, is_val), tokens in zip(batch, encoded):
                split = "val" if is_val else "train"
                streams[split].write(np.concatenate([eos, tokens.astype(dtype)]).data)
                lengths[split].append(len(tokens))
                done += len(document.text.encode())
            progress.update(done)

    # where each document is, and of each split the files: path, offset in bytes, number of tokens
    files = {}
    for split in ("train", "val"):
        # a document takes one token more than its text: the <|endoftext|> before it
        length = np.array(lengths[split])
        start = np.cumsum(length + 1) - length
        with replacing(folder / f"{split}.npy") as output:
            np.save(output, np.stack([start, length]))
        files[split] = [[f"{split}.bin", 0, int((length + 1).sum())]]
    return dict(files=files, dtype=dtype.str, replaced=[survey.replaced_bytes, survey.replaced_documents])


def index_shards(text: Text, folder: Path) -> dict:
    """Leaves GPT-2 token shards where they are, and writes only where their documents are. Returns the meta."""
    files = {"train": [], "val": []}
    for split in files:
        # the stream of a split is its shards, one after the other
        documents = []
        base = 0
        for file in text.files:
            if file.split == split:
                tokens = open_shard(file.path)
                start, length = shard_documents(tokens)
                documents.append(np.stack([start + base, length]))
                base += len(tokens)
                # named from this folder, so that the whole cache can be moved
                path = Path("..", file.path.relative_to(folder.parent))
                files[split].append([path.as_posix(), SHARD_HEADER, len(tokens)])
        with replacing(folder / f"{split}.npy") as output:
            np.save(output, np.concatenate(documents, axis=1))
    return dict(files=files, dtype="<u2", replaced=[0, 0])


def read_meta(folder: Path) -> dict | None:
    """The meta.json of a folder in the cache, or None if a file that it names is not there in full."""
    # a missing or half-written file is no error here: the caller makes all of it again
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for name, size in meta["sizes"].items():
            if (folder / name).stat().st_size != size:
                return None
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return meta


def prepare(text: Text, encoding: tiktoken.Encoding, cache: Path, quiet: bool = False) -> tuple[Path, dict]:
    """The folder of a text's tokens and its meta. They are made now if they are not there, or not in full."""
    # the folder's name tells text and tokenizer apart from all others
    identity = hashlib.sha256((text.fingerprint + encoding._pat_str).encode())
    for i in range(encoding.eot_token):
        identity.update(encoding.decode_single_token_bytes(i) + b"\0")
    folder = cache_path(cache, text.name, "-" + identity.hexdigest()[:16])

    # it may be there from an earlier run
    meta = read_meta(folder)
    if meta:
        return folder, meta
    if folder.exists():
        print(f"note: {folder} is damaged and is made again", file=sys.stderr)
        shutil.rmtree(folder)

    # it is made under another name, and begins empty: a killed process may have left a part of it
    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    are_shards = all(file.split and file.path.suffix == ".bin" for file in text.files)
    if are_shards and encoding.name == "gpt2":
        meta = index_shards(text, part)
    else:
        meta = tokenize(text, encoding, part, quiet)

    # the sha256 of the training stream and then the validation stream names the data in every result
    digest = hashlib.sha256()
    names = ["train.npy", "val.npy"]
    for name, offset, _ in meta["files"]["train"] + meta["files"]["val"]:
        add_file(digest, part / name, offset)
        names.append(name)
    meta["sha256"] = digest.hexdigest()
    meta["sizes"] = {name: (part / name).stat().st_size for name in names}

    # the folder gets its name when everything is in it
    with replacing(part / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())
    part.replace(folder)
    return folder, meta


# ----------------------------------------------------------------------------------------------------------------------
# Rows: how documents are cut into pieces, and pieces are packed into rows

class Plan(NamedTuple):
    """Which pieces make up which row."""
    first: np.ndarray       # (rows + 1,) row i is made of the pieces first[i] to first[i + 1] - 1
    start: np.ndarray       # (pieces,) where a piece's text starts in the token stream
    size: np.ndarray        # (pieces,) a piece's tokens, its <|endoftext|> included


class Pieces:
    """The pieces that are still to be packed, by their size."""

    def __init__(self):
        self.by_size = defaultdict(list)    # size -> where the texts of the pieces of this size start
        self.sizes = []                     # the sizes of which there is a piece, ascending

    def add(self, start: int, size: int) -> None:
        """Adds a piece of `size` tokens whose text starts at `start`."""
        if not self.by_size[size]:
            insort(self.sizes, size)
        self.by_size[size].append(start)

    def take(self, gap: int) -> tuple[int, int]:
        """Takes out the largest piece of at most `gap` tokens, or if there is none, the largest of all."""
        fitting = bisect_right(self.sizes, gap)     # so many of the sizes fit
        i = fitting - 1 if fitting else len(self.sizes) - 1
        size = self.sizes[i]
        start = self.by_size[size].pop()
        if not self.by_size[size]:
            del self.sizes[i]
        return start, size


def pack(start: np.ndarray, size: np.ndarray, row: int) -> Plan:
    """Fills rows of exactly `row` tokens with pieces of 2 to row - 1 tokens, best-fit. start, size: as in Plan.

    A row takes the largest piece that fits into it, then the largest that fits into what is left of it, and so on. If
    none fits, the largest piece of all is cut: its head fills the row, and its rest becomes a piece with an
    <|endoftext|> of its own. So only the end of a row cuts a text. An <|endoftext|> inside a row follows a true end.

    An example with four pieces and rows of 10 tokens (. is <|endoftext|>, a letter is a token):

        .abcdef  .ghijk  .mnop  .xy           7, 6, 5 and 3 tokens

        row 0    .abcdef.xy    7 is the largest piece. It leaves 3 tokens, and the piece of 3 fits.
        row 1    .ghijk.mno    6 is the largest. It leaves 4, and 5 is too long: it is cut into .mno and .p
        row 2    .p            The pieces have run out. This row is not full, and it is dropped.
    """
    pieces = Pieces()
    for text_start, piece_size in zip(start.tolist(), size.tolist()):
        pieces.add(text_start, piece_size)

    first = [0]
    starts = []
    sizes = []
    while pieces.sizes:
        gap = row       # tokens that the row still needs
        while gap > 1 and pieces.sizes:
            at, taken = pieces.take(gap)
            if taken > gap:
                # Cut it. The head takes gap - 1 tokens of text, and the rest gets an <|endoftext|> of its own.
                pieces.add(at + gap - 1, taken - gap + 1)
                taken = gap
            starts.append(at)
            sizes.append(taken)
            gap -= taken

        # the pieces have run out: drop this row
        if gap > 1:
            break
        # one token is left: it becomes an <|endoftext|> without a text
        if gap == 1:
            starts.append(0)
            sizes.append(1)
        first.append(len(starts))

    # the pieces of the dropped row are not part of the plan
    kept = first[-1]
    return Plan(np.array(first, np.int64), np.array(starts[:kept], np.int64), np.array(sizes[:kept], np.int64))


def plan_rows(start: np.ndarray, length: np.ndarray, row: int) -> Plan:
    """The Plan for documents whose texts have `length` tokens from `start` on in the token stream.

    A document that is longer than a row is cut into pieces of a whole row, each with an <|endoftext|> of its own. So
    no text is thrown away, and a position in a document is counted within its piece. What is left of the long
    documents, and the short ones, are packed.
    """
    room = row - 1                  # text in a row beside its <|endoftext|>
    full = length // room           # (documents,) pieces of a whole row in each

    # The n-th whole-row piece of a document starts n * room behind the document's start.
    # For documents with full = [2, 0, 3]: before = [0, 2, 2], and n = [0, 1, 0, 1, 2].
    before = np.cumsum(full) - full
    n = np.arange(full.sum()) - np.repeat(before, full)
    whole_start = np.repeat(start, full) + n * room
    whole_size = np.full(len(whole_start), row)

    # what is left of each document, if anything, becomes a shorter piece with its <|endoftext|>
    rest = length % room
    rest_start = start + full * room
    packed = pack(rest_start[rest > 0], rest[rest > 0] + 1, row)

    # first the rows of one whole piece each, then the packed ones
    whole_first = np.arange(len(whole_start))
    return Plan(np.concatenate([whole_first, len(whole_start) + packed.first]),
                np.concatenate([whole_start, packed.start]),
                np.concatenate([whole_size, packed.size]))


@functools.lru_cache(maxsize=2)
def epoch_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers of all rows in the order of an epoch. Two are kept, as a batch can lie in two epochs."""
    # numpy takes no negative seed, which a caller of `Corpus.batch` may give (the settings allow none)
    return np.random.default_rng([seed % 2**63, epoch]).permutation(n_rows)


# ----------------------------------------------------------------------------------------------------------------------
# Corpus: batches

class Corpus:
    """The tokens of a prepared corpus, and its rows. What a method returns depends on its arguments alone.

    name, tokenizer     as given to `load`
    encoding            the tiktoken Encoding
    sha256              of the training tokens and then the validation tokens
    vocab_size, eos     number of tokens, and the token <|endoftext|>
    token_bytes         (vocab_size,) int64, bytes of text that a token stands for: 0 for <|endoftext|>
    parts               split -> its token stream, as a list of memory-mapped arrays
    bases               split -> where in the stream each part begins, and the length of the stream
    documents           split -> (2, documents), start and length of each document's text in the stream
    """

    def __init__(self, name: str, tokenizer: str, encoding: tiktoken.Encoding, folder: Path, meta: dict):
        # what it is
        self.name = name
        self.tokenizer = tokenizer
        self.encoding = encoding
        self.sha256 = meta["sha256"]
        self.vocab_size = encoding.n_vocab
        self.eos = encoding.eot_token

        # the bytes that each token stands for
        sizes = [len(encoding.decode_single_token_bytes(i)) for i in range(self.vocab_size)]
        sizes[self.eos] = 0
        self.token_bytes = torch.tensor(sizes)

        # the files stay on the disk; only what a batch reads gets into the memory
        self.parts = {}
        self.bases = {}
        self.documents = {}
        self.plans = {}
        for split, files in meta["files"].items():
            parts = []
            for path, offset, count in files:
                parts.append(np.memmap(folder / path, meta["dtype"], "r", offset, (count,)))
            self.parts[split] = parts
            self.bases[split] = np.cumsum([0] + [len(part) for part in parts])
            self.documents[split] = np.load(folder / f"{split}.npy")

    def plan(self, split: str, seq_len: int) -> Plan:
        """The Plan of a split, made when it is first asked for. Raises UserError if there is not one row."""
        # a plan of a large corpus takes some seconds, so it is kept
        if (split, seq_len) not in self.plans:
            start, length = self.documents[split]
            plan = plan_rows(start, length, seq_len + 1)
            if len(plan.first) == 1:
                raise UserError(f"the {split} text of {self.name} is {self.bases[split][-1]} tokens, and a "
                                f"row takes {seq_len + 1} (max_seq_len + 1): use shorter rows or more text")
            self.plans[split, seq_len] = plan
        return self.plans[split, seq_len]

    def n_rows(self, split: str, seq_len: int) -> int:
        """The number of rows in an epoch."""
        return len(self.plan(split, seq_len).first) - 1

    def read(self, split: str, start: int, count: int) -> np.ndarray:
        """`count` tokens of a split's stream from `start` on. A document lies in one part, and so do these tokens."""
        bases = self.bases[split]
        part = np.searchsorted(bases, start, "right") - 1       # the last part that begins at start or before
        at = start - bases[part]
        return self.parts[split][part][at:at + count]

    def rows(self, split: str, seq_len: int, ids: Iterable[int]) -> tuple[Tensor, Tensor]:
        """The rows with these numbers, and each token's position in its piece: int64, both (len(ids), seq_len + 1)."""
        plan = self.plan(split, seq_len)
        tokens = np.full((len(ids), seq_len + 1), self.eos)
        position = np.zeros_like(tokens)
        for row, i in enumerate(ids):
            at = 0
            for piece in range(plan.first[i], plan.first[i + 1]):
                # the piece's <|endoftext|> is there already; its text comes behind it
                size = int(plan.size[piece])
                tokens[row, at + 1:at + size] = self.read(split, int(plan.start[piece]), size - 1)
                position[row, at:at + size] = np.arange(size)
                at += size
        return torch.from_numpy(tokens), torch.from_numpy(position)

    def batch(self, step: int, rows: int, seq_len: int, seed: int,
              rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Input x and target y of a training step, int64, (rows // world, seq_len) each.

        Step s takes the rows number s * rows to (s + 1) * rows - 1 of an endless list of epochs. Each of the `world`
        ranks gets an equal share of them.
        """
        if rows % world:
            raise UserError(f"batch_size={rows} rows cannot be shared by {world} ranks: use a multiple")

        # this rank's share of the step's rows, as numbers in the endless list
        share = rows // world
        begin = step * rows + rank * share

        # which rows of the plan they are
        ids = []
        n_rows = self.n_rows("train", seq_len)
        for i in range(begin, begin + share):
            epoch, place = divmod(i, n_rows)
            ids.append(epoch_order(n_rows, seed, epoch)[place])

        # the target of each token is the next one
        tokens, _ = self.rows("train", seq_len, ids)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def eval_batches(self, seq_len: int, rows: int, max_tokens: int | None = None,
                     split: str = "val") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields (x, y, doc_pos), int64, (rows, seq_len) each; the last batch may have fewer rows.

        They are the same for every model and seed. If there are more than max_tokens targets, it is a random sample.
        doc_pos is the target's place in its own piece: 0 for the piece's <|endoftext|>, 1 for its first token of text.
        """
        # always the same order, so that the first rows are a fair sample
        ids = np.random.default_rng(0).permutation(self.n_rows(split, seq_len))
        if max_tokens is not None:
            ids = ids[:max(1, max_tokens // seq_len)]
        for at in range(0, len(ids), rows):
            tokens, position = self.rows(split, seq_len, ids[at:at + rows])
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), position[:, 1:].contiguous()


def load(dataset: str, tokenizer: str, cache: str | Path = "out/data", quiet: bool = False) -> Corpus:
    """The Corpus of a dataset and a tokenizer; it is downloaded, tokenized and cached if that was not done before.

    Raises UserError if there is no such dataset or tokenizer, if a download fails, or if the disk does.
    """
    # of several processes the first prepares, while the others wait at the lock
    cache = Path(cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / "lock"):
            text = find_text(dataset, cache, quiet)
            encoding = get_encoding(tokenizer, text, cache, quiet)
            folder, meta = prepare(text, encoding, cache, quiet)
    except OSError as error:
        # a disk that is full, or a file that may not be read
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"the dataset {dataset!r} cannot be prepared in {cache}: "
                        f"{error.strerror or error}{where}") from error

    # a text in another encoding than UTF-8 is easily overlooked
    replaced_bytes, replaced_documents = meta["replaced"]
    if replaced_bytes and not quiet:
        print(f"note: {replaced_bytes} bytes in {replaced_documents} documents of {dataset} are not UTF-8, replaced",
              file=sys.stderr)
    return Corpus(dataset, tokenizer, encoding, folder, meta)


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def count_tokens(corpus: Corpus, split: str) -> np.ndarray:
    """(vocab_size,) how often each token occurs in a split."""
    counts = np.zeros(corpus.vocab_size, np.int64)
    chunk = 1 << 22     # tokens at a time, so that a large corpus does not fill the memory
    for part in corpus.parts[split]:
        for at in range(0, len(part), chunk):
            counts += np.bincount(part[at:at + chunk], minlength=corpus.vocab_size)
    return counts


def summary(corpus: Corpus) -> Iterator[str]:
    """Yields what a corpus holds, as lines of text."""
    yield f"{corpus.name} as {corpus.tokenizer}: vocabulary {corpus.vocab_size}, sha256 {corpus.sha256}"
    # how much text there is
    for split in corpus.parts:
        counts = count_tokens(corpus, split)
        n_tokens = counts.sum()
        n_bytes = int(counts @ corpus.token_bytes.numpy())
        _, length = corpus.documents[split]
        yield (f"{split}: {len(length):,} documents (median {int(np.median(length)):,} tokens), "
               f"{n_bytes:,} bytes, {n_tokens:,} tokens, {n_bytes / n_tokens:.3f} bytes a token")

    # and the beginning of one row
    seq_len = min(256, int(corpus.bases["val"][-1]) - 1)
    x, _, _ = next(corpus.eval_batches(seq_len, rows=1))
    yield f"a row: {corpus.encoding.decode(x[0].tolist())!r}"


class Parser(argparse.ArgumentParser):
    """Raises a UserError for a wrong command line, where argparse would print its usage and exit."""

    def error(self, message: str):
        """argparse calls this."""
        raise UserError(f"{message}; --help lists the flags")


def main(argv: list[str] | None = None) -> int:
    """Prepares a corpus and prints what it holds. Returns the exit status: 0, 2 after bad input, 130 after Ctrl-C."""
    parser = Parser(prog="data.py", allow_abbrev=False, description="Prepares a corpus and prints what it holds.")
    parser.add_argument("--dataset", default="python", help=f"{', '.join(CORPORA)}, or a path (default: python)")
    parser.add_argument("--tokenizer", default="byte", help="gpt2, byte, bpe:N or bpe:N@CORPUS (default: byte)")
    parser.add_argument("--cache", default="out/data",
                        help="folder for downloads and tokens (default: out/data, where train.py looks)")
    # a mistake in the flags or in the data ends in one line
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            close = did_you_mean(flag, [f"--{name}" for name in vars(args)])
            raise UserError(f"unknown argument {unknown[0]}" + (close or "; --help lists the flags"))
        for line in summary(load(args.dataset, args.tokenizer, args.cache)):
            print(line)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the files that are complete", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
