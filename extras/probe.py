"""What do the latents of a run hold, and does a move along a direction of them change the text?

    python -m extras.probe RUN --texts T --labels L --test-texts T2 --test-labels L2
    python -m extras.probe RUN                                      a run on `grammar`

Needs `pip install -r extras/requirements.txt`. RUN is a run folder; with --texts it may also be a
model folder or a hub name.

**Any labels.** T holds one text per line, L the label of each; T2 and L2 are the test part. For
instance, the captions that begin with "a man" or "a woman":

    for part in train test; do
        awk '/^a (wo)?man /' captions/$part.txt > $part.texts
        awk '/^a (wo)?man /{print $2}' captions/$part.txt > $part.labels
    done
    python -m extras.probe RUN --texts train.texts --labels train.labels \\
        --test-texts test.texts --test-labels test.labels

It prints three tables, and the first N test texts (--examples). ± is the standard error of a share
of the texts.

1. Reading. How often is the label of a test text read from mu, by a linear classifier, and from the
   text, by a bag of words (TF-IDF)? Both are logistic regressions on the training part. Chance is
   the label that is most frequent there. Where most texts have no spaces, characters take the place
   of words, here and below.
2. Editing. mu of the test texts of one label is moved by k times the difference of the two labels'
   mean mu over the training part, and decoded greedily. The judge is the classifier of the *text*,
   which has seen no latent. k = 0 is the reconstruction, with which an edit must be compared. Words
   kept: the share of the reconstruction's words that the edited text has too (split at spaces, each
   as often as it occurs in both). `another text` is that share for the reconstruction of the next
   text of the same label: an edit that keeps no more has kept nothing of its own text. All pairs of
   up to three labels are edited; of more labels, the two most frequent, or those of --pair A B.
3. Writing. Greedy texts from z of one Gaussian fitted to the posteriors of a label's training texts
   (`extras.latent sample --like`), and from N(0, I), judged as above; beside them test texts of the
   label, and texts from a sample of each one's own posterior: a Gaussian can hardly do better. The
   judge knows these labels alone, and gives one of them to whatever it reads.

**`grammar`**, whose factors are known. For each factor: is it read from mu, and does moving mu from
its most frequent value to the next one change it, and no other factor? What follows from factors
(the verb's form, his or her) is no factor. `when`, the number of a time among those of its tense,
means nothing across tenses. So `time`, the words themselves, stands for it: it moves to the next
most frequent time of the same tense, and where `tense` moves, `time` has to, and is not compared.
"""

import argparse
import functools
import itertools
import math
from collections import Counter
from typing import NamedTuple

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import data
import metrics
from data import InputError
from extras.latent import align, command, fit_gaussian, load_vae, without_spaces

MOST_EDITED = 3  # labels between which all edits are tried; of more, the two most frequent ones
GRAMMAR_TEXTS = 10_000  # of a split, at most
TIMES = {time: tense for tense, times in data.TENSES.items() for time in times}
NOUNS = {}  # who and number by the form of a noun
for who in data.MEN + data.WOMEN:
    NOUNS |= {who: (who, "one"), data.plural(who): (who, "many")}
FACTORS = tuple("time" if name == "when" else name for name in data.FACTORS)


# ---------------------------------------- classifiers


def linear_classifier():
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


class Judge:
    """A classifier of texts by a bag of words, or of characters if most have no spaces."""

    def __init__(self, texts, labels):
        if without_spaces(texts):  # and pairs of them
            self.unit, self.split = "characters", list
            bag = TfidfVectorizer(analyzer="char", ngram_range=(1, 2))
        else:  # word by word, punctuation too, without order
            self.unit, self.split = "words", str.split
            bag = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]")
        classifier = make_pipeline(bag, LogisticRegression(max_iter=1000))
        self.predict = classifier.fit(texts, labels).predict

    def kept(self, texts, edited):
        """The share of the words of texts that are in their edited versions too, %.

        Each counts as often as it occurs in both; sums are divided once.
        """
        bags = [Counter(self.split(text)) for text in texts]
        both = (a & Counter(self.split(b)) for a, b in zip(bags, edited, strict=True))
        return 100 * sum(bag.total() for bag in both) / max(1, sum(bag.total() for bag in bags))


def most_frequent(labels):
    """The different labels, the most frequent first."""
    return [label for label, _ in Counter(labels).most_common()]


def label_means(mu, labels):
    """{label: mean of its rows of mu (n, Z)}: (Z,) each."""
    return {name: mu[[label == name for label in labels]].mean(0) for name in set(labels)}


# ---------------------------------------- labelled texts


class Labelled(NamedTuple):
    texts: list  # n str
    labels: list  # n str
    mu: torch.Tensor  # (n, Z), with logvar the posteriors
    logvar: torch.Tensor

    def of(self, label):
        """The texts and the posteriors of a label."""
        chosen = [other == label for other in self.labels]
        return list(itertools.compress(self.texts, chosen)), self.mu[chosen], self.logvar[chosen]


def read_labelled(texts_path, labels_path):
    """The texts and the labels of two files. InputError unless they pair up, none empty."""
    texts, labels = list(data.read_lines(texts_path)), list(data.read_lines(labels_path))
    for path, lines in (texts_path, texts), (labels_path, labels):
        if "" in lines:
            line = f"{path}, line {lines.index('') + 1}"
            raise InputError(f"{line}: empty; leave it out of both files")
    if len(texts) != len(labels):
        counts = f"{texts_path} has {len(texts):,} lines, {labels_path} {len(labels):,}"
        raise InputError(f"{counts}; there must be one label per text")
    return texts, labels


def check_labels(train, test, pair=None):
    """InputError if the labels of the two parts allow no classifier, or no edit."""
    names = sorted(set(train))
    for name in pair or ():
        if name not in names:
            raise InputError(f"--pair names {name!r}, which is no label of --labels")
    if len(names) < 2:
        raise InputError(f"the labels of the training part are {names}; there must be at least two")
    if strange := sorted(set(test) - set(names)):
        raise InputError(f"label {strange[0]!r} is in the test part alone; nothing can learn it")
    if missing := [name for name in edited_labels(train, pair) if name not in test]:
        size = f"the test part has {len(test):,} texts"
        raise InputError(f"{size}, none with the label {missing[0]!r}; there must be one to edit")


def edited_labels(labels, pair=None):
    """The labels between which texts are moved: those of `pair`, else the most frequent first."""
    if pair:
        return list(pair)
    names = most_frequent(labels)
    return names[:2] if len(names) > MOST_EDITED else names


def share(hits):
    """(% of booleans that are true, its standard error)."""
    p = sum(hits) / len(hits)
    return 100 * p, 100 * math.sqrt(p * (1 - p) / len(hits))


def read_table(judge, train, test):
    """One row per way to tell the label of a test text; judge: the trained text classifier."""
    most = most_frequent(train.labels)[0]
    from_mu = linear_classifier().fit(train.mu.numpy(), train.labels)
    guesses = {
        f"always {most!r}, the most frequent": [most] * len(test.labels),
        "from mu, linear": from_mu.predict(test.mu.numpy()),
        f"from the text, bag of {judge.unit}": judge.predict(test.texts),
    }
    rows = []
    for way, guess in guesses.items():
        hits = [a == b for a, b in zip(guess, test.labels, strict=True)]
        rows.append({"the label": way, "texts": len(hits), "right %": share(hits)})
    return rows


def edit_table(decode, judge, parts, names, ks, count):
    """Moves the first `count` test texts of each label of `names` to each other one, k = 0 too.

    decode: z (n, Z) -> n texts; parts: train, test. Returns: rows; {number of a test text: [(what,
    text), ...]}.
    """
    train, test = parts
    means, rows, shown = label_means(train.mu, train.labels), [], {}
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
                if k:
                    shown[i].append((f"{new}, k = {k:g}", text))
        if len(plain) > 1:
            kept = judge.kept(plain, plain[1:] + plain[:1])
            row = dict.fromkeys(rows[-1], "-") | {"from": old, "to": "another text"}
            rows.append(row | {"texts": len(plain), f"{judge.unit} kept %": kept})
    return rows, shown


def edit_row(judge, edit, plain, edited):
    """What an edit (from, to, k) did to reconstructions, `plain`, n texts."""
    (old, new, k), said = edit, judge.predict(edited)
    row = {"from": old, "to": new, "k": f"{k:g}", "texts": len(edited)}
    row |= {"says from %": share(said == old), "says to %": share(said == new)}
    return row | {f"{judge.unit} kept %": judge.kept(plain, edited)}


def write_table(decode, judge, parts, names, count):
    """One row per kind of texts: of the test part, and decoded from `count` z of each kind.

    The kinds: a sample of the posterior of each of the first `count` test texts of a label; a
    Gaussian fitted to a label's training texts; N(0, I). Arguments: see `edit_table`.
    """
    train, test = parts
    kinds = {f"test texts, {name}": test.of(name)[0] for name in names}
    for name in names:
        mu, logvar = (x[:count] for x in test.of(name)[1:])
        kinds[f"posteriors, {name}"] = decode(mu + (logvar / 2).exp() * torch.randn(mu.shape))
    for name in names:
        fitted = fit_gaussian(*train.of(name)[1:])
        kinds[f"Gaussian, {name}"] = decode(fitted.sample((count,)).float())
    kinds["N(0, I)"] = decode(torch.randn(count, train.mu.shape[1]))
    rows = []
    for kind, texts in kinds.items():
        said = judge.predict(texts)
        row = {"texts of": kind, "texts": len(texts)}
        row |= {f"says {name} %": share(said == name) for name in names}
        rows.append(row | {"different texts %": 100 * len(set(texts)) / len(texts)})
    return rows


def probe_labels(model, parts, args):
    """Lines: the tables of two parts, (texts, labels) each, and examples."""
    torch.manual_seed(0)
    parts = [Labelled(texts, labels, *model.encode_texts(texts)) for texts, labels in parts]
    train, test = parts
    judge, names = Judge(train.texts, train.labels), edited_labels(train.labels, args.pair)
    lengths = map(len, data.tokenize(train.texts + test.texts, model.tokenizer))
    decode = functools.partial(model.decode_texts, max_new_tokens=min(256, max(lengths) + 1))
    labels = len(set(train.labels))
    yield f"{len(train.texts):,} training texts, {len(test.texts):,} test texts, {labels} labels\n"
    if judge.unit == "characters":
        yield "most texts have no spaces: what judges and compares texts takes characters\n"
    known = set(train.texts)
    if both := sum(text in known for text in test.texts):
        yield f"{both:,} of the test texts are training texts too\n"
    yield format_rows(read_table(judge, train, test))
    if labels > MOST_EDITED and not args.pair:
        yield f"\nof {labels} labels the two most frequent are edited; --pair names others"
    rows, shown = edit_table(decode, judge, parts, names, args.k, args.count)
    yield f"\n{format_rows(rows)}"
    yield f"\n{format_rows(write_table(decode, judge, parts, names, args.count))}"
    for i in sorted(shown)[: args.examples]:
        yield ""
        width = max(len(what) for what, _ in shown[i])
        yield from (f"{what:{width}}  {text}" for what, text in shown[i])


def format_cell(value):
    if isinstance(value, tuple):  # with its standard error
        return f"{value[0]:.1f}±{value[1]:.1f}"
    if isinstance(value, float):
        return f"{value:.1f}"
    return value if isinstance(value, str) else f"{value:,}"


def format_rows(rows):
    """Dicts with the same keys -> a table as text."""
    return align([list(rows[0]), *([format_cell(value) for value in row.values()] for row in rows)])


# ---------------------------------------- grammar


def grammar_parse(text):
    """The factors of a sentence of the grammar, or None. Undoes `grammar_sentence`."""
    padded, words = f" {text} ", set(text.split())
    found = dict.fromkeys(data.FACTORS)
    for name in "what", "where", *data.OPTIONAL:
        for value in data.FACTORS[name]:
            if f" {value} " in padded:
                found[name] = value
    for verb, forms in data.VERBS.items():
        if words & {verb, *forms}:
            found["verb"] = verb
    for noun in words & NOUNS.keys():
        found["who"], found["number"] = NOUNS[noun]
    for time, tense in TIMES.items():
        if padded.startswith(f" {time} ") or padded.endswith(f" {time} "):
            found["tense"], found["when"] = tense, data.TENSES[tense].index(time)
            found["order"] = "time first" if padded.startswith(f" {time} ") else "time last"
    needed = set(data.FACTORS) - set(data.OPTIONAL)
    whole = all(found[name] is not None for name in needed)
    return found if whole and data.grammar_sentence(found) == text else None


def in_words(factors):
    """The factors of a sentence with its `time` in the place of `when`; None stays None."""
    if factors is None:
        return None
    factors = factors | {"time": data.TENSES[factors["tense"]][factors["when"]]}
    return {name: factors[name] for name in FACTORS}


def other_changes(factor, before, after):
    """The factors other than `factor` in which two sentences differ, a list of names.

    before, after: as `in_words` returns them, not None. `time` has to change with `tense`.
    """
    free = ("tense", "time") if factor == "tense" else (factor,)
    return [name for name in FACTORS if name not in free and before[name] != after[name]]


def edit_of(factor, values):
    """The values that an edit of a factor goes from and to: the two most frequent of a list.

    A time goes to one of the same tense: to leave it would be an edit of `tense`.
    """
    old, *others = most_frequent(values)
    return old, next(v for v in others if factor != "time" or TIMES[v] == TIMES[old])


def judge_edit(factor, new, before, after):
    """What an edit of a factor to the value `new` did: measures in % of the sentences.

    before, after: what `in_words` returns for each sentence decoded, None if it is not grammatical.
    Returns: grammatical; changed: it has the new value, which it did not have before; alone: and
    every other factor as before; and the factor that changed most often with it, as text.
    """
    grammatical = changed = alone = 0
    with_it = Counter()
    for a, b in zip(before, after, strict=True):
        others = other_changes(factor, a, b) if a and b else None
        with_it.update(others or ())
        has_new = b is not None and b[factor] == new and (a is None or a[factor] != new)
        grammatical += b is not None
        changed += has_new
        alone += has_new and others == []
    counts = {"grammatical": grammatical, "changed": changed, "alone": alone}
    found = {name: 100 * count / max(1, len(after)) for name, count in counts.items()}
    most = [f"{name} {100 * count / len(after):.1f}" for name, count in with_it.most_common(1)]
    return found | {"most": most[0] if most else "-"}


def probe_grammar(model, moved=200, limit=GRAMMAR_TEXTS):
    """One row per factor: is it in mu, and does a move along it change that factor alone?

    moved: test sentences decoded for each factor; limit: sentences of a split.
    Returns: dicts of factor; accuracy of a linear classifier from mu, and chance, that of always
    saying the most frequent value, %; and what `judge_edit` says of the sentences moved from
    `edit_of`'s first value to its second.
    """
    mu, true = {}, {}
    for split in "train", "test":
        factors = list(itertools.islice(data.grammar_factors(split), limit))
        mu[split], _ = model.encode_texts(list(map(data.grammar_sentence, factors)))
        true[split] = list(map(in_words, factors))

    def written(z):
        texts = model.decode_texts(z, max_new_tokens=40)
        return [in_words(grammar_parse(text)) for text in texts]

    rows = []
    for factor in FACTORS:
        classes = [factors[factor] for factors in true["train"]]
        test_classes = [factors[factor] for factors in true["test"]]
        names, test_names = list(map(str, classes)), list(map(str, test_classes))
        reads = linear_classifier().fit(mu["train"].numpy(), names)
        accuracy = 100 * reads.score(mu["test"].numpy(), test_names)
        chance = 100 * test_names.count(most_frequent(names)[0]) / len(test_names)
        old, new = edit_of(factor, classes)
        means = label_means(mu["train"], classes)
        start = mu["test"][[value == old for value in test_classes]][:moved]
        before, after = written(start), written(start + means[new] - means[old])
        row = {"factor": factor, "accuracy": accuracy, "chance": chance}
        rows.append(row | judge_edit(factor, new, before, after))
    return rows


def format_grammar(rows):
    """What `probe_grammar` found, as a table."""
    heads = {"factor": "factor", "accuracy": "probe %", "chance": "chance %"}
    heads |= {"grammatical": "moved: grammatical %", "changed": "new value %"}
    heads |= {"alone": "and no other change %", "most": "changed most with it %"}
    return format_rows([{heads[key]: value for key, value in row.items()} for row in rows])


# ---------------------------------------- the command line


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="probe.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("run", metavar="RUN", help="run folder; with --texts also a model folder or a hub name")
    flag("--texts", metavar="FILE", help="texts, one per line (none: RUN is a run on grammar)")
    flag("--labels", metavar="FILE", help="their labels, one per line")
    flag("--test-texts", metavar="FILE", help="texts to judge by")
    flag("--test-labels", metavar="FILE", help="their labels")
    flag("--pair", nargs=2, metavar=("A", "B"), help="the two labels to edit, of many")
    count, step = data.number(int, 1), data.number(float, 0)
    flag("--k", type=step, nargs="+", help="lengths of the move of a label (1 2)")
    flag("--count", type=count, default=200, metavar="N", help="texts per row (200)")
    some = data.number(int, 0)
    flag("--examples", type=some, metavar="N", help="first N test texts (3)")
    args = parser.parse_args(argv)
    given = [args.texts, args.labels, args.test_texts, args.test_labels]
    if None in given and any(given):
        parser.error("--texts, --labels, --test-texts and --test-labels belong together: give all")
    for name in "pair", "k", "examples":
        if args.texts is None and getattr(args, name) is not None:
            parser.error(f"--{name} is {getattr(args, name)}, which has no effect without --texts")
    args.k = [1, 2] if args.k is None else args.k
    args.examples = 3 if args.examples is None else args.examples
    if args.pair and args.pair[0] == args.pair[1]:
        parser.error(f"--pair names {args.pair[0]!r} twice; they must be two labels")
    return args


def main(argv=None):
    args = parse_args(argv)
    with command("probe.py"):
        if args.texts is None:
            dataset = metrics.read_config(args.run)["dataset"]
            if dataset != "grammar":
                said = f"{args.run} is no run on grammar, but on {dataset}"
                raise InputError(f"{said}; without --texts it must be one")
            print(format_grammar(probe_grammar(load_vae(args.run), args.count)))
            return
        train = read_labelled(args.texts, args.labels)
        test = read_labelled(args.test_texts, args.test_labels)
        check_labels(train[1], test[1], args.pair)
        for line in probe_labels(load_vae(args.run), (train, test), args):
            print(line, flush=True)


if __name__ == "__main__":
    main()
