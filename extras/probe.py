"""What do the latents of a run on `grammar` hold?

    python -m extras.probe RUN

For each factor of the grammar: can a linear classifier read it from mu, and does adding the
difference of two values' mean mu change that factor in the decoded sentence, and nothing else?
"""

import argparse
import itertools
import sys
from collections import Counter

import torch

import data
import metrics

HEADS = (
    "factor",
    "probe %",
    "chance %",
    "moved: grammatical %",
    "new value %",
    "and no other change %",
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


def linear_probe(mu, classes, test_mu, test_classes):
    """Accuracy of the least-squares linear classifier from mu to a class, and chance, both in % of
    the test rows.

    Args:
        mu, test_mu: (n, Z), (m, Z).
        classes, test_classes: n and m hashable values.
    Returns: accuracy; chance: that of always saying the most frequent class of `classes`.
    """
    names = sorted(set(classes), key=str)
    target = torch.tensor([names.index(c) for c in classes])
    ones, test_ones = (torch.ones(len(rows), 1, dtype=torch.float64) for rows in (mu, test_mu))
    one_hot = torch.nn.functional.one_hot(target, len(names)).double()
    weights = torch.linalg.lstsq(
        torch.cat([mu.double(), ones], 1), one_hot, driver="gelsd"
    ).solution  # (Z + 1, classes)
    guesses = (torch.cat([test_mu.double(), test_ones], 1) @ weights).argmax(1).tolist()
    most = names[int(target.bincount().argmax())]
    right = [
        (names[guess] == true, most == true)
        for guess, true in zip(guesses, test_classes, strict=True)
    ]
    return tuple(100 * sum(column) / len(right) for column in zip(*right, strict=True))


@torch.no_grad()
def posterior_means(model, corpus, batch_size=64):
    """mu of each text of a corpus: (n, Z)."""
    mu = torch.zeros(len(corpus), model.latent_dim)
    for index in data.evaluation_order(corpus.lengths, batch_size):
        batch = data.make_batch(corpus, index)
        mu[batch.index] = model.encode(*batch.to(model.device)[:2])[0].cpu()
    return mu


def probe_grammar(model, corpora, batch_size=64, moved=200):
    """One row per factor: is it in mu, and does a move along it change that factor and nothing
    else?

    Args:
        corpora: {"train": ..., "test": ...} of `grammar`, whole or their first texts.
        moved: test sentences decoded for each factor.
    Returns: dicts of factor; accuracy and chance of `linear_probe`, %; and of the sentences moved
        from its most frequent value to the next: those still grammatical, those that have the new
        value, and those that have it and every other factor as their reconstruction had it, all in
        %.
    """
    mu = {split: posterior_means(model, corpus, batch_size) for split, corpus in corpora.items()}
    true = {
        split: list(itertools.islice(data.grammar_factors(split), len(mu[split])))
        for split in corpora
    }
    rows = []
    for factor in data.FACTORS:
        classes = {split: [factors[factor] for factors in true[split]] for split in corpora}
        accuracy, chance = linear_probe(mu["train"], classes["train"], mu["test"], classes["test"])
        (old, _), (new, _) = Counter(classes["train"]).most_common(2)
        means = [
            mu["train"][[c == value for c in classes["train"]]].mean(0) for value in (old, new)
        ]
        start = mu["test"][[c == old for c in classes["test"]]][:moved]
        before, after = (
            list(map(grammar_parse, model.decode_texts(z, batch_size, max_new_tokens=40)))
            for z in (start, start + means[1] - means[0])
        )
        changed = [b is not None and b[factor] == new for b in after]
        alone = [
            yes and a is not None and a | {factor: new} == b
            for a, b, yes in zip(before, after, changed, strict=True)
        ]
        shares = [
            100 * sum(map(bool, column)) / max(1, len(start)) for column in (after, changed, alone)
        ]
        columns = ("factor", "accuracy", "chance", "grammatical", "changed", "alone")
        rows.append(dict(zip(columns, (factor, accuracy, chance, *shares), strict=True)))
    return rows


def format_rows(rows):
    """Rows of `probe_grammar` -> text."""
    cells = [
        HEADS,
        *([row["factor"], *(f"{value:.1f}" for value in list(row.values())[1:])] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells
    )


def main(argv=None):
    parser = argparse.ArgumentParser(prog="probe.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="Run folder of train.py on grammar.")
    args = parser.parse_args(argv)
    try:
        config, model, read = metrics.load_run(args.run)
        if config["dataset"] != "grammar":
            raise ValueError(
                f"its data set is {config['dataset']}; it must be grammar, whose factors are known"
            )
        corpora = {split: read(split, limit=10_000) for split in ("train", "test")}
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"probe.py: cannot use {args.run}: {error}")
    print(format_rows(probe_grammar(model.eval(), corpora)))


if __name__ == "__main__":
    main()
