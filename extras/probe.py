"""What do the latents of a run hold, and does a move along a direction of them change the text?

    python -m extras.probe RUN --texts T --labels L [--test-texts T2 --test-labels L2]
    python -m extras.probe RUN                                      a run on `grammar`

Needs `pip install -r extras/requirements.txt`. RUN is a run folder; with --texts it may also be a
model folder or a hub name.

**Any labels.** T holds one text per line, L the label of each. Without T2 and L2 a hash of the text
decides whether it is in the test part, a fifth of the texts on average; all others are the training
part. Better are test texts that RUN has not seen either. For instance, the captions that begin with
"a man" or "a woman":

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
   the label that is most frequent there.
2. Editing. mu of the test texts of one label is moved by k times the difference of the two labels'
   mean mu over the training part, and decoded greedily. The judge is the classifier of the *text*,
   which has seen no latent. k = 0 is the reconstruction, with which an edit must be compared. Words
   kept: the share of the reconstruction's words that the edited text has too (split at spaces, each
   as often as it occurs in both). `another text` is that share for the reconstruction of the next
   text of the same label: an edit that keeps no more has kept nothing of its own text. All pairs of
   up to three labels are edited; of more labels, the two most frequent.
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
import itertools
import sys
import warnings
from collections import Counter

import torch
from transformers.utils import logging

import data
import metrics
from data import InputError
from extras.flags import at_least, seed
from extras.labels import format_rows, label_means, linear_classifier, probe_labels, read_parts
from extras.posteriors import posteriors
from vae import T5VAE

TIMES = {time: tense for tense, times in data.TENSES.items() for time in times}
FACTORS = tuple("time" if name == "when" else name for name in data.FACTORS)
HEADS = (  # of the table of grammar
    "factor",
    "probe %",
    "chance %",
    "moved: grammatical %",
    "new value %",
    "and no other change %",
    "changed most with it %",
)


def grammar_parse(text):
    """The factors of a sentence of the grammar; None where the text is not one. Undoes
    `grammar_sentence`."""
    padded, words = f" {text} ", set(text.split())

    def first(found):
        return next(iter(found), None)

    nouns = {
        (who, n): noun(who, n) for who in data.MEN + data.WOMEN for n in data.FACTORS["number"]
    }
    who = first(key for key, form in nouns.items() if form in words)
    times = [
        (tense, i, time) for tense, times in data.TENSES.items() for i, time in enumerate(times)
    ]
    when = first(t for t in times if padded.startswith(f" {t[2]} ") or padded.endswith(f" {t[2]} "))
    found = {
        name: first(v for v in data.FACTORS[name] if f" {v} " in padded)
        for name in ("what", "where", *data.OPTIONAL)
    }
    found["verb"] = first(verb for verb, forms in data.VERBS.items() if words & {verb, *forms})
    if not (who and when and found["verb"] and found["what"] and found["where"]):
        return None
    found["who"], found["number"] = who
    found["tense"], found["when"] = when[:2]
    found["order"] = "time first" if padded.startswith(f" {when[2]} ") else "time last"
    return (
        {name: found[name] for name in data.FACTORS}
        if data.grammar_sentence(found) == text
        else None
    )


def noun(who, number):
    """The form of a noun of the grammar."""
    return who if number == "one" else who + ("es" if who.endswith(("s", "ch")) else "s")


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
    old, *others = (value for value, _ in Counter(values).most_common())
    return old, next(v for v in others if factor != "time" or TIMES[v] == TIMES[old])


def judge_edit(factor, new, before, after):
    """What an edit of a factor to the value `new` did: measures in % of the sentences.

    before, after: what `in_words` returns for each sentence decoded, None where it is not
    grammatical. Returns: grammatical; changed: it has the new value, which it did not have before;
    alone: and every other factor as before; and the factor that changed most often with it, as
    text.
    """
    changes = [
        other_changes(factor, a, b) if a and b else None for a, b in zip(before, after, strict=True)
    ]
    changed = [
        b is not None and b[factor] == new and (a is None or a[factor] != new)
        for a, b in zip(before, after, strict=True)
    ]
    hits = {
        "grammatical": [b is not None for b in after],
        "changed": changed,
        "alone": [yes and others == [] for yes, others in zip(changed, changes, strict=True)],
    }
    found = {name: 100 * sum(column) / max(1, len(after)) for name, column in hits.items()}
    most = Counter(name for others in changes for name in others or ()).most_common(1)
    found["most"] = f"{most[0][0]} {100 * most[0][1] / len(after):.1f}" if most else "-"
    return found


def probe_grammar(model, corpora, batch_size=64, moved=200):
    """One row per factor: is it in mu, and does a move along it change that factor and nothing
    else?

    Args:
        corpora: {"train": ..., "test": ...} of `grammar`, whole or their first texts.
        moved: test sentences decoded for each factor.
    Returns: dicts of factor; accuracy and chance of `linear_probe`, %; and what `judge_edit` says
        of the sentences moved from `edit_of`'s first value to its second.
    """
    mu = {split: posteriors(model, corpus, batch_size)[0] for split, corpus in corpora.items()}
    true = {
        split: list(map(in_words, itertools.islice(data.grammar_factors(split), len(mu[split]))))
        for split in corpora
    }
    rows = []
    for factor in FACTORS:
        classes = {split: [factors[factor] for factors in true[split]] for split in corpora}
        accuracy, chance = linear_probe(mu["train"], classes["train"], mu["test"], classes["test"])
        old, new = edit_of(factor, classes["train"])
        means = label_means(mu["train"], classes["train"])
        start = mu["test"][[c == old for c in classes["test"]]][:moved]
        before, after = (
            [
                in_words(grammar_parse(text))
                for text in model.decode_texts(z, batch_size, max_new_tokens=40)
            ]
            for z in (start, start + means[new] - means[old])
        )
        read = {"factor": factor, "accuracy": accuracy, "chance": chance}
        rows.append(read | judge_edit(factor, new, before, after))
    return rows


def linear_probe(mu, classes, test_mu, test_classes):
    """Accuracy of a linear classifier (logistic regression) from mu to a class, and chance, both in
    % of the test rows.

    Args:
        mu, test_mu: (n, Z), (m, Z).
        classes, test_classes: n and m hashable values, of at least two kinds.
    Returns: accuracy; chance: that of always saying the most frequent class of `classes`.
    """
    names, test_names = list(map(str, classes)), list(map(str, test_classes))
    accuracy = linear_classifier().fit(mu.numpy(), names).score(test_mu.numpy(), test_names)
    most = Counter(names).most_common(1)[0][0]
    return 100 * accuracy, 100 * test_names.count(most) / len(test_names)


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="probe.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("run", metavar="RUN", help="run folder; with --texts also a model folder or a hub name")
    flag("--texts", metavar="FILE", help="texts, one per line (none: RUN is a run on grammar)")
    flag("--labels", metavar="FILE", help="their labels, one per line")
    flag("--test-texts", metavar="FILE", help="texts to judge by (a fifth of --texts)")
    flag("--test-labels", metavar="FILE", help="their labels")
    step = at_least(0, float)
    flag("--k", type=step, nargs="+", default=[1, 2], help="lengths of the move of a label (1 2)")
    flag("--count", type=at_least(1), default=200, metavar="N", help="texts per row (200)")
    flag("--examples", type=at_least(0), default=3, metavar="N", help="first N test texts (3)")
    flag("--seed", type=seed, default=0, help="of the texts that are written (0)")
    args = parser.parse_args(argv)
    for texts, labels in ("texts", "labels"), ("test_texts", "test_labels"):
        if (getattr(args, texts) is None) != (getattr(args, labels) is None):
            names = [f"--{name.replace('_', '-')}" for name in (texts, labels)]
            parser.error(f"{' and '.join(names)} belong together: give both or none")
    if args.test_texts and not args.texts:
        parser.error("--test-texts needs --texts: the texts to learn from")
    return args


def load(args):
    """The model of a command and, for a run on `grammar`, its corpora: {"train": ..., "test": ...}.

    Raises OSError, ValueError or KeyError where it is no VAE, or needs --texts and has none.
    """
    corpora = None
    if args.texts:
        model = T5VAE.from_pretrained(args.run)
    else:
        config, model, read = metrics.load_run(args.run)
        dataset = config["dataset"]
        if dataset != "grammar":
            raise InputError(f"its data set is {dataset}; without --texts it must be grammar")
        corpora = {split: read(split, limit=10_000) for split in ("train", "test")}
    if model.tokenizer is None:
        raise InputError("it has no tokenizer")
    if model.latent_dim == 0:
        raise InputError("a language model; it must be a VAE, whose latent can be probed")
    return model.eval(), corpora


def main(argv=None):
    args = parse_args(argv)
    data.replace_unprintable()
    logging.set_verbosity_error()
    try:
        files = args.texts, args.labels, args.test_texts, args.test_labels
        parts = read_parts(*files) if args.texts else None
    except (OSError, ValueError) as error:
        sys.exit(f"probe.py: {error}")
    try:
        model, corpora = load(args)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"probe.py: cannot use {args.run}: {error}")
    if not args.texts:
        print(format_rows(probe_grammar(model, corpora, moved=args.count), HEADS))
        return
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"probe.py: {message}", file=sys.stderr)
        torch.manual_seed(args.seed)
        for line in probe_labels(model, *parts, args.k, args.count, args.examples):
            print(line, flush=True)


if __name__ == "__main__":
    main()
