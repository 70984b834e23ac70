"""Text -> ids -> batches: data sets, tokenized corpora, token deletion, span corruption.

A data set is three files of one text a line (`train.txt`, `valid.txt`, `test.txt`), or `grammar`, which writes itself.
Everything random is drawn from (seed, epoch, index of the text), so that the same text gets the same noise
in the same epoch whatever the batch, the process or the number of restarts.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

SPLITS = ("train", "valid", "test")
DATASETS = ("ptb", "snli", "yahoo", "yelp", "grammar")

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
VERBS = {  # base form: (third person singular, past)
    "paint": ("paints", "painted"),
    "carry": ("carries", "carried"),
    "find": ("finds", "found"),
    "sell": ("sells", "sold"),
    "buy": ("buys", "bought"),
    "break": ("breaks", "broke"),
    "hide": ("hides", "hid"),
    "clean": ("cleans", "cleaned"),
    "steal": ("steals", "stole"),
    "draw": ("draws", "drew"),
    "repair": ("repairs", "repaired"),
    "lose": ("loses", "lost"),
}
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
    "where": (
        "near the river",
        "in the garden",
        "behind the church",
        "at the market",
        "under the bridge",
    )
    + ("in the forest", "on the roof", "by the lake", "in the kitchen", "outside the palace")
    + ("at the harbor", "across the street"),
    "companion": (
        "friend",
        "neighbor",
        "teacher",
        "cousin",
        "servant",
        "doctor",
        "lawyer",
        "student",
    ),
}
OPTIONAL = ("nature", "manner", "colour", "companion")
GRAMMAR_ENTROPY = sum(  # nats a sentence: ln k for a choice of k, and ln 2 + (ln k) / 2 for an optional one
    math.log(2) + math.log(len(values)) / 2 if name in OPTIONAL else math.log(len(values))
    for name, values in FACTORS.items()
)
GRAMMAR_SIZES = {"train": 20_000, "valid": 2_000, "test": 2_000}


def grammar_sentence(factors):
    """The sentence that the values of the factors (a dict, None for an absent one) determine."""
    f, plural = factors, factors["number"] == "many"
    noun = f["who"] + ("es" if f["who"].endswith(("s", "ch")) else "s") * plural
    third, past = VERBS[f["verb"]]
    verb = {"past": past, "present": f["verb"] if plural else third, "future": f["verb"]}[f["tense"]]
    time = TENSES[f["tense"]][f["when"]]
    owner = "their" if plural else "his" if f["who"] in MEN else "her"
    parts = [
        time if f["order"] == "time first" else None,
        "the",
        f["nature"],
        noun,
        "will" if f["tense"] == "future" else None,
        f["manner"],
        verb,
        "a",
        f["colour"],
        f["what"],
        f["where"],
        f["companion"] and f"with {owner} {f['companion']}",
        time if f["order"] == "time last" else None,
    ]
    return " ".join(part for part in parts if part)


def grammar_factors(split):
    """Yields the factors of each sentence of a split: the same ones every time."""
    rng = np.random.default_rng([2021, SPLITS.index(split)])
    for _ in range(GRAMMAR_SIZES[split]):
        yield {
            name: None if name in OPTIONAL and rng.random() < 0.5 else values[rng.integers(len(values))]
            for name, values in FACTORS.items()
        }


# ---------------------------------------------------------------------------------------- texts


def split_path(dataset, split, data_dir="data"):
    """The file of a split: `<data_dir>/<dataset>/<split>.txt`, or `<dataset>.<split>.txt` there, or in a directory
    of one's own. Raises FileNotFoundError that says where it was looked for."""
    folder = Path(data_dir, dataset) if dataset in DATASETS else Path(dataset)
    names = (f"{split}.txt", f"{dataset}.{split}.txt")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    if dataset in DATASETS:
        hint = f"put the file there, point --data-dir at the folder that holds {dataset}/, or use --dataset grammar"
    else:
        hint = f"--dataset is a directory with train.txt, valid.txt and test.txt, or one of {', '.join(DATASETS)}"
    raise FileNotFoundError(f"data set {dataset!r}: no {' or '.join(names)} in {folder.resolve()}; {hint}")


def read_texts(dataset, split, data_dir="data"):
    """Yields the stripped lines of a split, empty ones too."""
    if dataset == "grammar":
        yield from map(grammar_sentence, grammar_factors(split))
        return
    with open(split_path(dataset, split, data_dir), encoding="utf-8") as lines:
        yield from map(str.strip, lines)


def train_tokenizer(texts, vocab_size):
    """T5's kind of tokenizer (sentencepiece unigram, 100 sentinels) with a vocabulary of its own."""
    import io

    import sentencepiece
    from transformers import T5Tokenizer

    # The trainer takes for pieces only what stands in two different words. So it sees each word twice, bare and
    # with a mark: whole words can become pieces, and the mark's own pieces are dropped.
    mark, model = (
        "\u0298",
        io.BytesIO(),
    )  # a letter: sentencepiece would cut the word before a symbol
    texts = (text.replace("<unk>", " ") for text in texts)  # a special token, not letters to learn
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"{text} {text.replace(' ', mark + ' ')}" for text in texts),
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

    def __len__(self):
        return len(self.words)

    @cached_property
    def lengths(self):
        """(texts,) tokens of each text, </s> included."""
        return np.diff(self.offsets)


def tokenize(texts, tokenizer, max_length=256, limit=None):
    """A `Corpus` of the first `limit` texts, each at most `max_length` tokens, </s> included. Skips empty lines.

    Raises ValueError where there is no text at all.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; it must be at least 2: one token and </s>")
    ids, offsets, words, truncated, skipped, digest = [], [0], [], 0, 0, hashlib.sha256()
    kept = []
    for text in texts:
        digest.update(text.encode() + b"\n")
        if not text:
            skipped += 1
        elif limit is None or len(kept) < limit:
            kept.append(text)
    if not kept:
        raise ValueError("there is no text in this split: every line is empty")
    for text, tokens in zip(kept, tokenizer(kept, add_special_tokens=False, verbose=False)["input_ids"], strict=True):
        if len(tokens) > max_length - 1:
            tokens = tokens[: max_length - 1]
            text = tokenizer.decode(tokens)  # noqa: PLW2901
            truncated += 1
        ids += [*tokens, tokenizer.eos_token_id]
        offsets.append(len(ids))
        words.append(len(text.split()) + 1)
    return Corpus(
        np.array(ids, np.int32),
        np.array(offsets),
        np.array(words),
        truncated,
        skipped,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        digest.hexdigest(),
    )


# ---------------------------------------------------------------------------------------- noise

DELETION, SPANS, LATENT, POSTERIOR, PRIOR = range(5)  # what a stream of random numbers is for


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
    pairs = [
        corrupt_spans(
            corpus.ids[corpus.offsets[i] : corpus.offsets[i + 1] - 1],
            sentinels,
            eos_id,
            stream(seed, epoch, i, SPANS),
        )
        for i in index.tolist()
    ]
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
