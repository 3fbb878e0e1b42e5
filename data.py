"""data.py: text -> tokens -> batches.

    corpus = load("python", "bpe:4096")
    x, y = corpus.batch(step=0, rows=8, seq_len=1024, seed=1)      # two int64 tensors (8, 1024)

Corpora
    python          the default, no download: the .py files of the standard library and our dependencies
    fineweb-edu:N   N shards of 100M GPT-2 tokens (14 if N is left out, for memory-bench's 1.32B)
    tinystories, simplewiki, shakespeare      downloaded when first used
    PATH            a text file or a folder of them.  A line <|endoftext|> separates documents; .jsonl (and
                    BabiStories' *dataset.txt) has one a line: a string, or an object's "text" or "story".
                    Files that are all named train* or val* (or *train, *valid) are the split; else a hash
                    draws 5% of the documents for validation, and a lone document gives its last 5%.
Tokenizers (tiktoken Encodings; a text that says <|endoftext|> never gets that token)
    gpt2            GPT-2's 50257 tokens             byte    256 bytes and <|endoftext|>
    bpe:N           N tokens trained on the corpus; bpe:N@CORPUS: the tokenizer of another corpus

Glossary
    document        one file or story; <|endoftext|> leads it in the token stream
    piece           <|endoftext|> and then a run of one document's tokens, at most a row long
    row             seq_len + 1 tokens of whole pieces, no padding: x = row[:-1], y = row[1:]
    plan            which pieces make which row: a function of the tokens and seq_len alone
    epoch           every row of the plan once, in an order drawn from (seed, epoch)

Every row starts with <|endoftext|>.  A document longer than a row is cut into row-long pieces, each led by
its own <|endoftext|>: no text is thrown away, and "position in document" counts inside the piece.  The ends
of long documents and the short ones are packed best-fit: the largest piece that fits, while one fits.  Then
the largest of all is cut: its head fills the row, the rest goes back as a piece.  So only the ends of rows
are cuts, and an <|endoftext|> inside a row follows a true end.  Only a plan's last, unfilled row is dropped.

In reading order: files, download, documents, BPE training, tokenizers, cache, rows, Corpus, command line.
References: byte-level BPE, Radford et al. 2019; best-fit packing, Ding et al. 2024 (arXiv 2404.10830).
"""
import argparse, base64, contextlib, difflib, functools, hashlib, heapq, http.client, importlib.util
import itertools, json, operator, os, re, shutil, sys, sysconfig, time, urllib.error, urllib.request
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

try:
    import fcntl
except ImportError:      # Windows: no lock, so let one process prepare a corpus before several use it
    fcntl = None

CORPORA = ("python", "fineweb-edu", "tinystories", "simplewiki", "shakespeare")
PACKAGES = ("torch", "numpy", "tiktoken", "triton", "matplotlib", "scipy")
HUB = "https://huggingface.co/datasets/"
FINEWEB = "karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main/"
TINYSTORIES = "roneneldan/TinyStories/resolve/main/"
SIMPLEWIKI = "wikimedia/wikipedia/resolve/main/20231101.simple/"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
RETRIES, RETRY_SECONDS, TIMEOUT = 6, 1.0, 30
SHARD_MAGIC, SHARD_HEADER = 20240520, 1024     # header: 256 int32, of which magic, version 1, token count
FORMAT = 1               # to be raised when the cache or the BPE trainer changes what it writes
BPE_SAMPLE = 24_000_000  # bytes of text that bpe:N is trained on
LONGEST_RUN = 2048       # tiktoken is quadratic in unbroken runs; text with a longer one is encoded in slices
# BPE's words: letters led by at most one mark or space, 3 digits, marks, line ends, spaces.  Python's re
# (training) and tiktoken's Rust regex (encoding) read this pattern alike.
WORDS = r"(?:[^\w\r\n]|_)?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

class UserError(Exception):
    """Bad input by the user.  A script prints it as one line, "error: ...", and exits with status 2."""

# ------------------------------------------------------------------------------------------------------ files

def progress(label, total, quiet=False, begin=0):
    """Returns update(done), which shows bytes, speed, time left: in place on a terminal, else every 10 s."""
    started = shown = time.time()
    tty = sys.stderr.isatty()
    def update(done):
        nonlocal shown
        now, last = time.time(), done >= total
        if not quiet and (now - shown > (0.2 if tty else 10) or last and tty):
            shown, speed = now, max(done - begin, 1) / max(now - started, 1e-3)
            print(f"{label}: {done / 1e6:.1f} of {total / 1e6:.1f} MB, {speed / 1e6:.1f} MB/s, "
                  f"{max(total - done, 0) / speed:.0f} s left    ",
                  end="\r" if tty and not last else "\n", file=sys.stderr, flush=True)
    return update

@contextlib.contextmanager
def locked(path):
    """Of several ranks one prepares; the others wait here, and then find it done."""
    with open(path, "a") as file:               # closing it releases the lock, and so does being killed
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

@contextlib.contextmanager
def disk(path):
    """Turns a failed write (a full disk, a folder that may not be written) into one line that names the file: an
    OSError that comes from an open file does not know its name."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; files already written are intact, so make room (or "
                        "choose another --out_dir) and give the same command again") from None

@contextlib.contextmanager
def replacing(path, keep=None):
    """A binary file to write, which takes path's place once it is complete and on the disk: it appears under its name
    whole, or not at all. keep: the new name of the file that stood there."""
    temporary = f"{path}.tmp"
    with disk(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep and os.path.exists(path):
                os.replace(path, keep)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)

def did_you_mean(word, known, form="{}"):
    """"; did you mean X?" with the known word that is most like this one, or nothing if none is alike."""
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {form.format(close[0])}?" if close else ""

def add_file(digest, path, offset=0):
    with open(path, "rb") as file:
        file.seek(offset)
        return hashlib.file_digest(file, lambda: digest).hexdigest()

def cached(cache, name, ending):
    return os.path.join(cache, re.sub(r"[^\w.-]+", "_", name) + ending)

# --------------------------------------------------------------------------------------------------- download

class Redirect(urllib.request.HTTPRedirectHandler):
    """Hugging Face tells a file's sha256 in the redirect's X-Linked-ETag, not in the final answer."""
    etag = None
    def redirect_request(self, request, file, code, message, headers, url):
        self.etag = headers.get("X-Linked-ETag") or self.etag
        return super().redirect_request(request, file, code, message, headers, url)

def fetch(url, part, quiet):
    """One attempt to complete the file `part` from where it ends.  Returns the server's sha256, or None."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request, redirect = urllib.request.Request(url, headers={"User-Agent": "nanomem"}), Redirect()
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.build_opener(redirect).open(request, timeout=TIMEOUT) as answer:
        have = have if answer.status == 206 else 0      # else it sends everything, whatever was asked for
        total = have + int(answer.headers.get("Content-Length") or 0)
        update = progress(os.path.basename(url), total, quiet, have)
        with open(part, "ab" if have else "wb") as file:
            while block := answer.read(1 << 18):
                file.write(block)
                have += len(block)
                update(have)
            file.flush()
            os.fsync(file.fileno())
        if have < total:
            raise ConnectionError(f"the connection closed after {have} of {total} bytes")
        etag = (answer.headers.get("X-Linked-ETag") or redirect.etag or "").strip('"')
        return etag if re.fullmatch("[0-9a-f]{64}", etag) else None

def download(url, path, sha256=None, quiet=False):
    """Fetches url to path by way of path.part: resumed, retried, checked; never half a file at path."""
    if os.path.exists(path):
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = path + ".part"
    for attempt in range(RETRIES):
        time.sleep(RETRY_SECONDS * (2 ** attempt - 1))
        resumed = os.path.exists(part)
        try:
            stated = fetch(url, part, quiet)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason, code = getattr(error, "reason", None) or error, getattr(error, "code", 500)
            if code == 416:                             # the part is as long as the file, or longer
                os.remove(part)
            elif code < 500 and code != 429:
                raise UserError(f"{url} cannot be downloaded: the server answers {code} {reason}") from error
            continue
        expected, found = sha256 or stated, add_file(hashlib.sha256(), part)
        if expected in (None, found):
            os.replace(part, path)
            return path
        os.remove(part)
        reason = f"sha256 {expected} expected, {found} found"
        if not resumed:                                 # a resumed one may start with an older file
            raise UserError(f"{url} is not the file it should be: {reason}")
    raise UserError(f"{url} cannot be downloaded ({reason}): run again to go on where it stopped, or "
                    f"put the file at {path} yourself")

# -------------------------------------------------------------------------------------------------- documents

def open_shard(path):
    """The tokens of a GPT-2 token shard, memory-mapped."""
    size = os.path.getsize(path)
    magic, version, count = np.fromfile(path, "<i4", 3).tolist() if size >= SHARD_HEADER else (0, 0, 0)
    if (magic, version) != (SHARD_MAGIC, 1):
        raise UserError(f"{path} is not a token shard: it should begin with the numbers {SHARD_MAGIC} and 1, "
                        f"and begins with {magic} and {version}")
    if size != SHARD_HEADER + 2 * count:
        raise UserError(f"{path} is truncated or damaged: {count} tokens expected, "
                        f"{(size - SHARD_HEADER) // 2} found; delete it and run again to download it again")
    return np.memmap(path, "<u2", "r", SHARD_HEADER)

def shard_documents(tokens):
    """Where the texts in a shard start and how long they are; the first may continue the shard before."""
    bounds = np.concatenate([[-1], np.flatnonzero(tokens == 50256), [len(tokens)]])
    start, length = bounds[:-1] + 1, np.diff(bounds) - 1
    return start[length > 0], length[length > 0]

def decode(raw):
    """UTF-8 text, and how many bytes were not UTF-8 and were replaced, each by U+FFFD."""
    try:
        return raw.decode(), 0
    except UnicodeDecodeError:          # surrogateescape makes a surrogate of each bad byte: easy to count
        return re.subn("[\udc80-\udcff]", "\ufffd", raw.decode("utf-8", "surrogateescape"))

def read_file(path):
    """Yields (text, replaced bytes) of each document in a file."""
    if path.endswith(".parquet"):
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise UserError(f"{path} is parquet and pyarrow is not there: pip install pyarrow") from error
        for rows in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from ((text or "", 0) for text in rows.column(0).to_pylist())
    elif path.endswith(".bin"):         # GPT-2 tokens, but for another tokenizer
        tokens, gpt2 = open_shard(path), get_encoding("gpt2")
        for start, length in zip(*shard_documents(tokens)):
            yield decode(gpt2.decode_bytes(tokens[start:start + length].tolist()))
    elif path.endswith((".jsonl", "traindataset.txt", "valdataset.txt")):
        for number, line in enumerate(open(path, "rb"), 1):
            line, replaced = decode(line)
            try:
                item = json.loads(line) if line.strip() else ""
            except ValueError:
                item = None
            text = item.get("text", item.get("story")) if isinstance(item, dict) else item
            if not isinstance(text, str):
                raise UserError(f"line {number} of {path} should be a JSON string, or an object with a "
                                f'string under "text" or "story", and is {line[:40]!r}')
            yield text.encode("utf-8", "replace").decode(), replaced    # JSON can spell half a surrogate pair
    else:
        lines = []
        for line in open(path, "rb"):
            if line.startswith(b"<|end") and line.strip() == b"<|endoftext|>":
                yield decode(b"".join(lines))
                lines = []
            else:
                lines.append(line)
        yield decode(b"".join(lines))

class Text:
    """The text of a corpus: an ordered list of files (key, path, split); split "" leaves it to a hash."""
    def __init__(self, name, files, val_fraction=0.05):
        self.name, self.files, self.val_fraction = name, sorted(files), val_fraction

    @functools.cached_property
    def fingerprint(self):
        """Changes with the files' names, sizes and times: cheap enough to look at in every run."""
        files = [(key, split, (stat := os.stat(path)).st_size, stat.st_mtime_ns) for key, path, split in self.files]
        return hashlib.sha256(repr((FORMAT, self.val_fraction, files)).encode()).hexdigest()

    def documents(self):
        """(key, split, text, replaced bytes) of each document that is not blank; a lone one is cut in two."""
        found = ((f"{key}:{i}", split, *document) for key, path, split in self.files
                 for i, document in enumerate(read_file(path)) if document[0].strip())
        head = list(itertools.islice(found, 2))
        if len(head) == 1:
            key, _, text, replaced = head[0]
            cut = int(len(text) * (1 - self.val_fraction))
            cut = text.rfind("\n", cut // 2, cut) + 1 or cut
            head = [(key, "train", text[:cut], replaced), (key, "val", text[cut:], 0)]
        return itertools.chain(head, found)

    @functools.cached_property
    def survey(self):
        """One pass over it: is_val of each document, bytes, training bytes, replaced (bytes, documents)."""
        draws, splits, sizes, replaced = [], [], [], []
        for key, split, text, bad in self.documents():
            draws.append(int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) / 16**12)
            splits.append(split)
            sizes.append(len(text.encode()))
            replaced += [bad] if bad else []
        if not draws:
            raise UserError(f"the dataset {self.name} has no text: its {len(self.files)} files are blank")
        draws, splits, sizes = np.array(draws), np.array(splits), np.array(sizes)
        is_val = np.where(splits == "", draws < self.val_fraction, splits == "val")
        is_val[draws.argmin()] |= not is_val.any()      # even of few documents one is for validation ...
        is_val[draws.argmax()] &= not is_val.all()      # ... and one for training
        return is_val, int(sizes.sum()), int(sizes[~is_val].sum()), (sum(replaced), len(replaced))

def walk(root, label, skip=()):
    """(key, path, "") of the files in a folder that are not empty, hidden or a cache."""
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f[0] != "." and f not in ("__pycache__", *skip)]
        for path in (os.path.join(folder, name) for name in names if name[0] != "."):
            if os.path.isfile(path) and os.path.getsize(path):
                yield (label + os.path.relpath(path, root)).replace(os.sep, "/"), path, ""

def python_roots():
    """(label, folder) of the standard library and the packages; find_spec does not import them."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    return [("stdlib/", sysconfig.get_path("stdlib"))] + [
        (name + "/", os.path.dirname(spec.origin)) for name, spec in specs.items() if spec and spec.origin]

def is_text(path):
    with open(path, "rb") as file:
        return path.endswith(".parquet") or b"\0" not in file.read(8192)

def path_text(path):
    """The Text of the user's own file or folder."""
    name = os.path.basename(os.path.abspath(path))
    if os.path.isfile(path):
        if not os.path.getsize(path):
            raise UserError(f"the file {path} is empty: a dataset needs text")
        return Text(name, [(name, path, "")])
    files = [file for file in walk(path, "") if is_text(file[1])]
    if not files:
        raise UserError(f"the folder {path} has no text in it: a file that is not empty is needed")
    stems = [os.path.splitext(os.path.basename(key))[0].lower() for key, *_ in files]
    named = [re.search("^(train|val)|(train|val)(id|idation)?$", stem) for stem in stems]
    if all(named) and len({match[0][:3] for match in named}) == 2:
        files = [(key, p, "val" if m[0][:3] == "val" else "train") for (key, p, _), m in zip(files, named)]
    return Text(name, files)

def find_text(dataset, cache, quiet=False):
    """The Text of a dataset by its name, downloaded if need be."""
    name, _, count = dataset.partition(":")
    folder = os.path.join(cache, "downloads", name)
    get = lambda url, sha256=None: download(url, os.path.join(folder, os.path.basename(url)), sha256, quiet)
    if dataset == "python":                     # _sysconfigdata describes the machine
        files = [file for label, root in python_roots() for file in walk(root, label, ("site-packages",))]
        return Text(name, [f for f in files if re.search(r"^(?!stdlib/_sysconfigdata).*\.py$", f[0])], 0.01)
    if name == "fineweb-edu" and re.fullmatch("([1-9][0-9]{0,3})?", count):
        files = ["val_000000.bin"] + [f"train_{i:06d}.bin" for i in range(1, int(count or 14) + 1)]
        return Text(name, [(f, get(f"{HUB}{FINEWEB}edu_fineweb_{f}"), f.split("_")[0]) for f in files])
    if dataset == "tinystories":
        return Text(name, [(split, get(f"{HUB}{TINYSTORIES}TinyStoriesV2-GPT4-{file}.txt"), split)
                           for split, file in (("train", "train"), ("val", "valid"))])
    if dataset == "simplewiki":
        return Text(name, [(name, get(HUB + SIMPLEWIKI + "train-00000-of-00001.parquet"), "")], 0.01)
    if dataset == "shakespeare":
        return Text(name, [(name, get(SHAKESPEARE, SHAKESPEARE_SHA256), "")])
    if os.path.exists(dataset):
        return path_text(dataset)
    near = difflib.get_close_matches(dataset, CORPORA, 1)
    raise UserError(f"there is no dataset {dataset!r}: a file, a folder or one of {', '.join(CORPORA)} "
                    "(fineweb-edu:N for N shards) is expected"
                    + (f"; did you mean {near[0]!r}?" if near else ""))

# ----------------------------------------------------------------------------------------------- BPE training

def count_words(text, chunk=1 << 16):
    """How often each word occurs in every k-th chunk of the training text: a sample of all of it."""
    is_val, _, train_bytes, _ = text.survey
    chunks = (doc[at:at + chunk] for (*_, doc, _), val in zip(text.documents(), is_val) if not val
              for at in range(0, len(doc), chunk))
    words = Counter()
    for sample in itertools.islice(chunks, 0, None, -(-train_bytes // BPE_SAMPLE)):
        words.update(re.findall(WORDS, sample))
    return words

def train_bpe(words, n_tokens):
    """Byte-pair encoding: the 256 bytes, then what the most frequent pair spells, until there are n_tokens.

    A word is a string of chr(token id), so that to merge a pair is str.replace.  Ties go to the smaller ids.
    `where` lists the words that hold a pair (and some that did); counts in the heap may be out of date, and
    are checked when they come up.
    """
    tokens = [bytes([i]) for i in range(256)]
    spelling = [(word.encode().decode("latin-1"), n) for word, n in words.items()]
    pairs = lambda word: map(operator.add, word, word[1:])
    count, where = defaultdict(int), defaultdict(list)
    for i, (word, n) in enumerate(spelling):
        for pair in pairs(word):
            count[pair] += n
            where[pair].append(i)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while len(tokens) < n_tokens:
        if not heap:
            raise UserError(f"the text is too small for a vocabulary of {n_tokens + 1}: it gives only "
                            f"{len(tokens) + 1} tokens; use --tokenizer=byte or a smaller bpe:N")
        n, pair = heapq.heappop(heap)
        if count[pair] != -n:
            if count[pair]:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        new = chr(len(tokens))
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        changed = set()
        for i in set(where.pop(pair)):
            old, n = spelling[i]
            word = old.replace(pair, new)
            if word == old:
                continue
            for p in pairs(old):
                count[p] -= n
            for p in pairs(word):
                count[p] += n
                if new in p:
                    where[p].append(i)
                    changed.add(p)
            spelling[i] = word, n
        for p in changed:
            heapq.heappush(heap, (-count[p], p))
    return tokens

def trained_tokens(size, text, cache, quiet=False):
    """The tokens of bpe:SIZE, from the cache or trained now; on disk in tiktoken's own format."""
    path = cached(cache, text.name, f"-{text.fingerprint[:16]}-bpe{size}.tiktoken")
    if os.path.exists(path):
        with open(path, "rb") as file:
            tokens = [base64.b64decode(line.split()[0]) for line in file]
        if len(tokens) == size - 1:
            return tokens
        print(f"note: {path} is damaged and is made again")
    began = time.time()
    tokens = train_bpe(count_words(text), size - 1)
    with replacing(path) as file:
        file.writelines(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    if not quiet:
        print(f"trained bpe:{size} on {text.name} in {time.time() - began:.1f} s", file=sys.stderr)
    return tokens

# ------------------------------------------------------------------------------------------------- tokenizers

def get_encoding(tokenizer, text=None, cache="out/data", quiet=False):
    """The tiktoken Encoding of "gpt2", "byte", "bpe:N" (trained on `text`) or "bpe:N@CORPUS"."""
    kind, _, other = tokenizer.partition("@")
    if tokenizer == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise UserError("the gpt2 tokenizer cannot be downloaded: go online once, set TIKTOKEN_CACHE_DIR "
                            "to a folder that has it, or use --tokenizer=byte or bpe:4096") from error
    if tokenizer == "byte":
        tokens, pattern = [bytes([i]) for i in range(256)], "(?s:.)"
    elif re.fullmatch("bpe:[0-9]{3,6}", kind) and int(kind[4:]) > 257 and (text or other):
        text = find_text(other, cache, quiet) if other else text
        tokens, pattern = trained_tokens(int(kind[4:]), text, cache, quiet), WORDS
    else:
        raise UserError(f"there is no tokenizer {tokenizer!r}: gpt2, byte, bpe:N or bpe:N@CORPUS is "
                        "expected, with N from 258 to 999999")
    return tiktoken.Encoding(
        tokenizer, pat_str=pattern, mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={"<|endoftext|>": len(tokens)}, explicit_n_vocab=len(tokens) + 1)

def encode(encoding, text):
    """text -> numpy tokens; nothing in a text is special."""
    if encoding.n_vocab == 257:                 # bytes need no tiktoken
        return np.frombuffer(text.encode(), np.uint8)
    tokens = functools.partial(encoding.encode_to_numpy, disallowed_special=())
    if max(map(len, text.split()), default=0) <= LONGEST_RUN and "\n" * LONGEST_RUN not in text:
        return tokens(text)
    return np.concatenate([tokens(text[at:at + LONGEST_RUN]) for at in range(0, len(text), LONGEST_RUN)])

# ------------------------------------------------------------------------------------------------------ cache

def tokenize(text, encoding, folder, quiet=False):
    """Writes train.bin and val.bin: flat tokens, <|endoftext|> before each document.  Returns the meta."""
    is_val, total, _, replaced = text.survey
    dtype, done = np.dtype("<u2" if encoding.n_vocab <= 65536 else "<u4"), 0
    update = progress(f"tokenizing {text.name}", total, quiet)
    eos, lengths = np.array([encoding.eot_token], dtype), ([], [])
    texts = ((doc, int(val)) for (*_, doc, _), val in zip(text.documents(), is_val))
    with replacing(os.path.join(folder, "train.bin")) as train, replacing(os.path.join(folder, "val.bin")) as val, \
            ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:   # tiktoken lets go of Python's lock
        while batch := list(itertools.islice(texts, 128)):
            docs, where = zip(*batch)
            for doc, i, tokens in zip(docs, where, pool.map(functools.partial(encode, encoding), docs)):
                (train, val)[i].write(np.concatenate([eos, tokens.astype(dtype)]).data)
                lengths[i].append(len(tokens))
                done += len(doc.encode())
            update(done)
    files = {}
    for split, length in zip(("train", "val"), map(np.array, lengths)):
        files[split] = [[split + ".bin", 0, int(length.sum() + len(length))]]
        with replacing(os.path.join(folder, split + ".npy")) as file:
            np.save(file, [np.cumsum(length + 1) - length, length])
    return dict(files=files, dtype=dtype.str, replaced=replaced)

def index_shards(text, folder):
    """GPT-2 shards for gpt2 stay where they are; only where their documents are is written."""
    files = {"train": [], "val": []}
    for split, found in files.items():
        documents, base = [], 0
        for path in (path for _, path, kind in text.files if kind == split):
            tokens = open_shard(path)
            documents.append(np.array(shard_documents(tokens)) + [[base], [0]])
            base += len(tokens)
            found.append([os.path.relpath(path, folder), SHARD_HEADER, len(tokens)])
        with replacing(os.path.join(folder, split + ".npy")) as file:
            np.save(file, np.concatenate(documents, axis=1))
    return dict(files=files, dtype="<u2", replaced=(0, 0))

def read_meta(folder):
    """The cache's meta.json, or None if not all that it names is there in full."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
            meta = json.load(file)
        same = all(os.path.getsize(os.path.join(folder, f)) == size for f, size in meta["sizes"].items())
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return meta if same else None

def prepare(text, encoding, cache, quiet=False):
    """The cache folder of a text's tokens, and its meta; made now if it is not there, or not in full."""
    identity = hashlib.sha256((text.fingerprint + encoding._pat_str).encode())
    for i in range(encoding.eot_token):
        identity.update(encoding.decode_single_token_bytes(i) + b"\0")
    folder = cached(cache, text.name, "-" + identity.hexdigest()[:16])
    if meta := read_meta(folder):
        return folder, meta
    if os.path.exists(folder):
        print(f"note: {folder} is damaged and is made again")
        shutil.rmtree(folder)
    part = folder + ".part"
    shutil.rmtree(part, ignore_errors=True)     # what a killed process left
    os.makedirs(part)
    shards = encoding.name == "gpt2" and all(split and path.endswith(".bin") for _, path, split in text.files)
    meta = index_shards(text, part) if shards else tokenize(text, encoding, part, quiet)
    digest, names = hashlib.sha256(), ["train.npy", "val.npy"]
    for name, offset, _ in meta["files"]["train"] + meta["files"]["val"]:
        add_file(digest, os.path.join(part, name), offset)
        names.append(name)
    meta.update(sha256=digest.hexdigest(), sizes={n: os.path.getsize(os.path.join(part, n)) for n in names})
    with replacing(os.path.join(part, "meta.json")) as file:
        file.write(json.dumps(meta, indent=1).encode())
    os.replace(part, folder)
    return folder, meta

# ------------------------------------------------------------------------------------------------------- rows

class Plan(NamedTuple):
    first: np.ndarray    # (rows + 1,) row i is made of the pieces first[i] ... first[i + 1] - 1
    start: np.ndarray    # (pieces,) where a piece's text starts in the token stream
    length: np.ndarray   # (pieces,) its tokens, <|endoftext|> included

def pack(start, length, row):
    """Best-fit: fills rows of exactly `row` tokens with pieces of 2 ... row - 1 tokens (how: at the top)."""
    stacks = defaultdict(list)                  # length -> the pieces of that length
    for s, n in zip(start.tolist(), length.tolist()):
        stacks[n].append(s)
    present = sum(1 << n for n in stacks)       # bit n: there is a piece of length n
    first, starts, lengths = [0], [], []
    while True:
        gap = row
        while gap > 1 and present:
            n = (present & ((2 << gap) - 1) or present).bit_length() - 1    # the largest that fits, or of all
            s = stacks[n].pop()
            if not stacks[n]:
                present ^= 1 << n
            if n > gap:                         # cut it; the rest gets an <|endoftext|> of its own
                stacks[n - gap + 1].append(s + gap - 1)
                present |= 1 << (n - gap + 1)
                n = gap
            starts.append(s), lengths.append(n)
            gap -= n
        if gap > 1:                             # no pieces are left: drop this row
            return Plan(*(np.array(a, np.int64) for a in (first, starts[:first[-1]], lengths[:first[-1]])))
        if gap == 1:                            # room for an <|endoftext|> and no text
            starts.append(0), lengths.append(1)
        first.append(len(starts))

def plan_rows(start, length, row):
    """The Plan of documents whose texts are at start, length in the token stream."""
    room = row - 1                              # beside the <|endoftext|>
    full = length // room                       # row-long pieces of each document
    nth = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    long = np.repeat(start, full) + nth * room
    rest = length - full * room
    packed = pack((start + full * room)[rest > 0], rest[rest > 0] + 1, row)
    return Plan(np.concatenate([np.arange(len(long)), len(long) + packed.first]),
                np.concatenate([long, packed.start]),
                np.concatenate([np.full(len(long), row), packed.length]))

# ----------------------------------------------------------------------------------------------------- Corpus

class Corpus:
    """The tokens of a prepared corpus, and its rows.  It keeps nothing but caches: its methods are pure."""
    def __init__(self, name, tokenizer, encoding, folder, meta):
        self.name, self.tokenizer, self.encoding, self.sha256 = name, tokenizer, encoding, meta["sha256"]
        self.vocab_size, self.eos = encoding.n_vocab, encoding.eot_token
        self.token_bytes = torch.tensor([0 if i == self.eos else len(encoding.decode_single_token_bytes(i))
                                         for i in range(encoding.n_vocab)])
        self.parts = {split: [np.memmap(os.path.join(folder, path), meta["dtype"], "r", offset, (count,))
                              for path, offset, count in files] for split, files in meta["files"].items()}
        self.bases = {split: np.cumsum([0] + [len(p) for p in parts]) for split, parts in self.parts.items()}
        self.documents = {split: np.load(os.path.join(folder, split + ".npy")) for split in self.parts}
        self.plans, self.orders = {}, {}

    def plan(self, split, seq_len):
        if (split, seq_len) not in self.plans:
            plan = plan_rows(*self.documents[split], seq_len + 1)
            if len(plan.first) == 1:
                raise UserError(f"the {split} text of {self.name} is {self.bases[split][-1]} tokens, and a "
                                f"row takes {seq_len + 1} (max_seq_len + 1): use shorter rows or more text")
            self.plans[split, seq_len] = plan
        return self.plans[split, seq_len]

    def n_rows(self, seq_len, split="train"):
        """Rows of an epoch."""
        return len(self.plan(split, seq_len).first) - 1

    def order(self, n, seed, epoch):
        """An epoch's rows in their order.  Two are kept, as a batch can lie in two epochs."""
        if (n, seed, epoch) not in self.orders:
            self.orders = dict(list(self.orders.items())[-1:])
            self.orders[n, seed, epoch] = np.random.default_rng([seed % 2**63, epoch]).permutation(n)
        return self.orders[n, seed, epoch]

    def rows(self, split, seq_len, ids):
        """Rows of the plan and each token's position in its piece: int64, both (len(ids), seq_len + 1)."""
        plan, parts, bases = self.plan(split, seq_len), self.parts[split], self.bases[split]
        out = np.full((len(ids), seq_len + 1), self.eos)
        position = np.zeros_like(out)
        for row, place, i in zip(out, position, ids):
            at, pieces = 0, slice(plan.first[i], plan.first[i + 1])
            for start, n in zip(plan.start[pieces].tolist(), plan.length[pieces].tolist()):
                k = int(np.searchsorted(bases, start, "right")) - 1 if len(parts) > 1 else 0
                row[at + 1:at + n] = parts[k][start - bases[k]:start - bases[k] + n - 1]
                place[at:at + n] = np.arange(n)
                at += n
        return torch.from_numpy(out), torch.from_numpy(position)

    def batch(self, step, rows, seq_len, seed, rank=0, world=1):
        """x, y of a training step, (rows // world, seq_len) each: this rank's share of the step's rows."""
        if rows % world:
            raise UserError(f"batch_size={rows} rows cannot be shared by {world} ranks: use a multiple")
        n, share = self.n_rows(seq_len), rows // world
        begin = step * rows + rank * share
        ids = [self.order(n, seed, i // n)[i % n] for i in range(begin, begin + share)]
        out, _ = self.rows("train", seq_len, ids)
        return out[:, :-1].contiguous(), out[:, 1:].contiguous()

    def eval_batches(self, seq_len, rows, max_tokens=None, split="val"):
        """Yields (x, y, doc_pos), the same for every model and seed; the last batch can have fewer rows.

        doc_pos: how many tokens of the target's own piece precede it, <|endoftext|> counted; 0 if it is one.
        """
        ids = np.random.default_rng(0).permutation(self.n_rows(seq_len, split))  # a fair sample
        ids = ids if max_tokens is None else ids[:max(1, max_tokens // seq_len)]
        for at in range(0, len(ids), rows):
            out, position = self.rows(split, seq_len, ids[at:at + rows])
            yield out[:, :-1].contiguous(), out[:, 1:].contiguous(), position[:, 1:].contiguous()

def load(dataset, tokenizer, cache="out/data", quiet=False):
    """The Corpus of a dataset and a tokenizer: downloaded, tokenized and cached if that is not done yet."""
    try:
        os.makedirs(cache, exist_ok=True)
        with locked(os.path.join(cache, "lock")):
            text = find_text(dataset, cache, quiet)
            encoding = get_encoding(tokenizer, text, cache, quiet)
            folder, meta = prepare(text, encoding, cache, quiet)
    except OSError as error:                    # a full disk, no permission
        raise UserError(f"the dataset {dataset!r} cannot be prepared in {cache}: {error.strerror or error}"
                        + (f" ({error.filename})" if error.filename else "")) from error
    if meta["replaced"][0] and not quiet:
        n_bytes, n_documents = meta["replaced"]
        print(f"note: {n_bytes} bytes in {n_documents} documents of {dataset} are not UTF-8, replaced")
    return Corpus(dataset, tokenizer, encoding, folder, meta)

# ----------------------------------------------------------------------------------------------- command line

def summary(corpus):
    """What a corpus holds, as lines of text."""
    yield f"{corpus.name} as {corpus.tokenizer}: vocabulary {corpus.vocab_size}, sha256 {corpus.sha256}"
    for split, parts in corpus.parts.items():
        counts = sum(np.bincount(part[at:at + (1 << 22)], minlength=corpus.vocab_size)
                     for part in parts for at in range(0, len(part), 1 << 22))
        size, length = int(counts @ corpus.token_bytes.numpy()), corpus.documents[split][1]
        yield (f"{split}: {len(length):,} documents (median {int(np.median(length)):,} tokens), "
               f"{size:,} bytes, {counts.sum():,} tokens, {size / counts.sum():.3f} bytes a token")
    x, *_ = next(corpus.eval_batches(min(256, int(corpus.bases["val"][-1]) - 1), 1))
    yield f"a row: {corpus.encoding.decode(x[0].tolist())!r}"

def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Prepares a corpus and prints it.")
    parser.add_argument("--dataset", default="python", help=", ".join(CORPORA) + ", or a path (python)")
    parser.add_argument("--tokenizer", default="byte", help="gpt2, byte, bpe:N or bpe:N@CORPUS (byte)")
    parser.add_argument("--cache", default="out/data", help="folder for downloads and tokens (out/data)")
    args = parser.parse_args(argv)
    try:
        print(*summary(load(args.dataset, args.tokenizer, args.cache)), sep="\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
