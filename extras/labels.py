"""What `extras.probe` measures on labelled texts: can a label be read, changed and asked for?

The definitions are in its first lines.
"""

import functools
import itertools
import math
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import data
from data import InputError
from extras.latent import fit_gaussian

HELD_OUT = 5  # one text in so many is for the test, where no test texts are given
MOST_EDITED = 3  # labels between which all edits are tried; of more, the two most frequent ones


class Labelled(NamedTuple):
    texts: list  # n str
    labels: list  # n str
    mu: torch.Tensor | None = None  # (n, Z), with logvar the posteriors
    logvar: torch.Tensor | None = None

    def where(self, chosen):
        """The texts for which one of n booleans is true."""
        lists = [list(itertools.compress(column, chosen)) for column in self[:2]]
        return Labelled(*lists, *(x if x is None else x[chosen] for x in self[2:]))

    def of(self, label):
        return self.where([other == label for other in self.labels])


def read_column(path):
    """The stripped lines of a UTF-8 file, at least one, none of them empty; else InputError."""
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save it as UTF-8") from None
    lines = [line.strip() for line in text.split("\n")]
    if not any(lines):
        raise InputError(f"{path} is empty; it must have a line per text")
    if "" in lines:
        raise InputError(f"{path}, line {lines.index('') + 1}: empty; leave it out of both files")
    return lines


def read_labelled(texts_path, labels_path):
    texts, labels = read_column(texts_path), read_column(labels_path)
    if len(texts) != len(labels):
        counts = f"{texts_path} has {len(texts):,} lines, {labels_path} {len(labels):,}"
        raise InputError(f"{counts}; there must be one label per text")
    return Labelled(texts, labels)


def read_parts(texts, labels, test_texts=None, test_labels=None):
    """The training and the test part, `Labelled` each, of files. Raises InputError, OSError."""
    train = read_labelled(texts, labels)
    if test_texts:
        test = read_labelled(test_texts, test_labels)
    else:  # by the text alone: one that occurs twice is not in both
        held_out = [zlib.crc32(text.encode()) % HELD_OUT == 0 for text in train.texts]
        test, train = train.where(held_out), train.where([not out for out in held_out])
    check_labels(train.labels, test.labels)
    return train, test


def check_labels(train, test):
    """InputError where the labels of the two parts allow no classifier, or no edit."""
    if len(names := sorted(set(train))) < 2:
        only = "no text" if not names else f"only the label {names[0]!r}"
        raise InputError(f"the training part has {only}; it must have at least two labels")
    if strange := sorted(set(test) - set(names)):
        raise InputError(f"label {strange[0]!r} is in the test part alone; nothing can learn it")
    if missing := [name for name in edited_labels(train) if name not in test]:
        size = f"the test part has {len(test):,} texts"
        raise InputError(f"{size}, none with the label {missing[0]!r}; there must be one to edit")


def edited_labels(labels):
    """The labels between which texts are moved, the most frequent first."""
    names = [name for name, _ in Counter(labels).most_common()]
    return names if len(names) <= MOST_EDITED else names[:2]


def linear_classifier():
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def text_classifier():
    """A bag of words: word by word, punctuation too, without order."""
    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]")
    return make_pipeline(words, LogisticRegression(max_iter=1000))


def share(hits):
    """(% of booleans that are true, its standard error)."""
    p = sum(hits) / len(hits)
    return 100 * p, 100 * math.sqrt(p * (1 - p) / len(hits))


def words_kept(texts, edited):
    """The share of the words of texts that are in their edited versions too, %.

    Words are split at spaces. Each counts as often as it occurs in both; sums are divided once.
    """
    bags = [Counter(text.split()) for text in texts]
    both = sum((a & Counter(b.split())).total() for a, b in zip(bags, edited, strict=True))
    return 100 * both / max(1, sum(bag.total() for bag in bags))


def label_means(mu, labels):
    """{label: mean of its rows of mu (n, Z)}: (Z,) each."""
    return {name: mu[[label == name for label in labels]].mean(0) for name in set(labels)}


def read_table(judge, train, test):
    """One row per way to tell the label of a test text; judge: the trained text classifier."""
    most = Counter(train.labels).most_common(1)[0][0]
    from_mu = linear_classifier().fit(train.mu.numpy(), train.labels)
    guesses = {
        f"always {most!r}, the most frequent": [most] * len(test.labels),
        "from mu, linear": from_mu.predict(test.mu.numpy()),
        "from the text, bag of words": judge.predict(test.texts),
    }
    rows = []
    for way, guess in guesses.items():
        hits = [a == b for a, b in zip(guess, test.labels, strict=True)]
        rows.append({"the label": way, "texts": len(hits), "right %": share(hits)})
    return rows


def edit_table(decode, judge, train, test, ks, count):
    """Moves the first `count` test texts of each edited label to each other one, k = 0 included.

    decode: z (n, Z) -> n texts. Returns: rows; {number of a test text: [(what, text), ...]}.
    """
    means, names = label_means(train.mu, train.labels), edited_labels(train.labels)
    rows, shown = [], {}
    for old in names:
        index = [i for i, label in enumerate(test.labels) if label == old][:count]
        plain = decode(test.mu[index])
        for i, text in zip(index, plain, strict=True):
            shown[i] = [(old, test.texts[i]), ("k = 0", text)]
        for new, k in itertools.product(names, sorted({0, *ks})):
            if new == old:
                continue
            edited = decode(test.mu[index] + k * (means[new] - means[old])) if k else plain
            rows.append(edit_row(judge, (old, new, k), plain, edited))
            for i, text in zip(index, edited, strict=True):
                shown[i] += [(f"{new}, k = {k:g}", text)] if k else []
        if len(plain) > 1:
            kept = words_kept(plain, plain[1:] + plain[:1])
            row = dict.fromkeys(rows[-1], "-") | {"from": old, "to": "another text"}
            rows.append(row | {"texts": len(plain), "words kept %": kept})
    return rows, shown


def edit_row(judge, edit, plain, edited):
    """What an edit (from, to, k) did to reconstructions, `plain`, n texts."""
    (old, new, k), said = edit, judge.predict(edited)
    row = {"from": old, "to": new, "k": f"{k:g}", "texts": len(edited)}
    row |= {"says from %": share(said == old), "says to %": share(said == new)}
    return row | {"words kept %": words_kept(plain, edited)}


def write_table(decode, judge, train, test, count):
    """One row per kind of texts: of the test part, and decoded from `count` z of each kind.

    The kinds: a sample of the posterior of each of the first `count` test texts of a label; a
    Gaussian fitted to a label's training texts; N(0, I).
    """
    names = edited_labels(train.labels)
    kinds = {f"test texts, {name}": test.of(name).texts for name in names}
    for name in names:
        mu, logvar = (x[:count] for x in test.of(name)[2:])
        kinds[f"posteriors, {name}"] = decode(mu + (logvar / 2).exp() * torch.randn(mu.shape))
    for name in names:
        fitted = fit_gaussian(*train.of(name)[2:])
        kinds[f"Gaussian, {name}"] = decode(fitted.sample((count,)).float())
    kinds["N(0, I)"] = decode(torch.randn(count, train.mu.shape[1]))
    rows = []
    for kind, texts in kinds.items():
        said = judge.predict(texts)
        row = {"texts of": kind, "texts": len(texts)}
        row |= {f"says {name} %": share(said == name) for name in names}
        rows.append(row | {"different texts %": 100 * len(set(texts)) / len(texts)})
    return rows


def probe_labels(model, train, test, ks, count, examples):
    """Lines: the tables of two `Labelled` parts, and examples. Draws from torch's generator."""
    train, test = (part._replace(**encoded(model, part.texts)) for part in (train, test))
    judge = text_classifier().fit(train.texts, train.labels)
    lengths = map(len, data.tokenize(train.texts + test.texts, model.tokenizer))
    decode = functools.partial(model.decode_texts, max_new_tokens=min(256, max(lengths) + 1))
    labels = len(set(train.labels))
    yield f"{len(train.texts):,} training texts, {len(test.texts):,} test texts, {labels} labels\n"
    if both := sum(map(set(train.texts).__contains__, test.texts)):
        yield f"{both:,} of the test texts are training texts too\n"
    yield format_rows(read_table(judge, train, test))
    if labels > MOST_EDITED:
        yield f"\nof {labels} labels the two most frequent are edited"
    rows, shown = edit_table(decode, judge, train, test, ks, count)
    yield f"\n{format_rows(rows)}"
    yield f"\n{format_rows(write_table(decode, judge, train, test, count))}"
    for i in sorted(shown)[:examples]:
        yield ""
        width = max(len(what) for what, _ in shown[i])
        yield from (f"{what:{width}}  {text}" for what, text in shown[i])


def encoded(model, texts):
    return dict(zip(("mu", "logvar"), model.encode_texts(texts), strict=True))


def format_cell(value):
    if isinstance(value, tuple):  # with its standard error
        return f"{value[0]:.1f}±{value[1]:.1f}"
    if isinstance(value, float):
        return f"{value:.1f}"
    return value if isinstance(value, str) else f"{value:,}"


def format_rows(rows, heads=None):
    """Dicts with the same keys -> text; heads: those of the columns, the keys unless given."""
    cells = [heads or list(rows[0]), *([format_cell(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells
    )
