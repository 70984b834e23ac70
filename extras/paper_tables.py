"""The paper's tables 1 to 4 with what their digits imply.

python -m extras.paper_tables
"""

import argparse
import math

import data
from extras.latent import align

PAPER_ROWS = {  # name: what its PPL is per
    "Optimus (lambda 0.5)": "GPT-2 token",
    "GPT-2": "GPT-2 token",
    "Li et al. (lambda 3)": "word",
    "Max pool": "T5 token",
    "Max pool + Denoise": "T5 token",
    "Max pool + Denoise + KLT": "T5 token",
    "Max pool + Denoise + KLT + Deep": "T5 token",
}
# Tables 1 to 4 as printed: PPL, KL, "-ELBO", MI, AU. Two rows of PTB have a cell too few; by their
# size, MI is the one missing. Words per test sentence, one end mark included: counted for PTB; 96 +
# 1 for Yelp.
PAPER = {  # data set: number of the table, words per sentence, rows
    "yahoo": (1, 79.867, """23.11 17.45 301.21 8.85 32 | 22.00 - - - - | 59.24 7.44 328.73 6.41 32
        | 20.90 0.21 343.02 0.04 0 | 30.13 41.49 301.86 1.32 24 | 60.44 119.89 223.69 4.73 29
        | 54.40 155.50 140.57 5.43 28"""),
    "ptb": (2, 21.917, """26.69 15.72 96.82 7.64 32 | 24.23 - - - - | 96.75 3.85 101.56 3.19 32
        | 51.60 0.09 104.14 0 0 | 57.69 3.05 101.17 - 11 | 250.44 41.93 62.25 2.17 24
        | 705.73 84.28 4.95 - 13"""),
    "yelp": (3, 97.0, """22.79 15.09 344.10 9.13 32 | 23.40 - - - - | - - - - -
        | 21.65 0.25 404.54 0 0 | 39.09 77.85 327.17 1.06 26 | 86.71 182.24 223.34 5.46 27
        | 53.05 178.48 166.15 5.55 10"""),
    "snli": (4, 10.758, """16.67 16.35 38.50 8.89 32 | 20.24 - - - - | 21.23 5.86 33.87 5.25 32
        | 12.79 0.11 34.61 0.06 0 | 15.16 2.41 32.32 0.194 7 | 85.88 26.12 8.62 0.88 13
        | 2358.31 74.95 43.77 5.27 17"""),
}  # fmt: skip
PAPER_NOTE = """\
N: tokens (words, for Li et al.) per sentence, as PPL = exp(-ELBO / N) implies them. A data set has
one N. Taken at its word, the column "-ELBO" gives each row of the paper another; read as rec - KL,
it gives all rows the same, the true N (with </s>; ptb without). So the true -ELBO is "-ELBO" + 2
KL. SNLI's Deep row has lost a minus: no other sign gives its N. The baselines print a true -ELBO,
but their PPL is of an importance-weighted NLL: their N is a little high. rec of the 6-layer rows
does not move while KL goes from 0 to 182 nats: z costs them much and gives nothing. PPLs of
different units do not compare. Nats per sentence do, and so does PPL/word = exp(true -ELBO /
words). The paper cuts texts at 256 tokens. Its MI is a mean over batches of 256 at most: it cannot
exceed ln 256 = 5.55. After 3 of 50 annealing epochs the KL weight is 0.06, so KL was cheap: no
table says how much of it z carries in the model. lambda has two units: Li et al.'s 3 is 3 nats in
all, 0.094 per dimension; Optimus' 0.5 is per dimension, 16 nats in all; the paper's 3 is per
dimension, 96 nats in all."""


HEADS = ["PPL", "per", "KL", '"-ELBO"', "N", "MI", "AU", "true N", "rec", "true -ELBO", "PPL/word"]


def number(value, digits=2):
    """A cell: a dash for what nothing implies."""
    return "-" if value is None else f"{value:,.{digits}f}"


def reread(dataset):
    """The rows of the paper's table for a data set, a list of dicts, with what their digits imply.

    name, unit, and the printed ppl, kl, printed, mi, au (text); rec, n_printed, n, neg_elbo,
    ppl_word (None if nothing implies them).
    """
    _, words, text = PAPER[dataset]
    rows, true_n = [], None
    for (name, unit), line in zip(PAPER_ROWS.items(), text.split("|"), strict=True):
        row = dict(zip(("ppl", "kl", "printed", "mi", "au"), line.split(), strict=True))
        row |= {"name": name, "unit": unit}
        row |= dict.fromkeys(("rec", "n_printed", "n", "neg_elbo", "ppl_word"))
        if row["printed"] != "-":
            nats, kl, printed = math.log(float(row["ppl"])), float(row["kl"]), float(row["printed"])
            row["n_printed"] = printed / nats
            row["neg_elbo"] = printed
            if unit == "T5 token":
                if true_n is None:  # this row's KL is next to nothing: its N is the true one
                    true_n = (printed + 2 * kl) / nats
                signs = sorted((1, -1), key=lambda s: abs((s * printed + 2 * kl) / nats - true_n))
                row["neg_elbo"] = signs[0] * printed + 2 * kl
                row["n"] = row["neg_elbo"] / nats
            row["rec"] = row["neg_elbo"] - kl
            row["ppl_word"] = math.exp(row["neg_elbo"] / words)
        rows.append(row)
    return rows


def format_paper():
    """All of the paper's tables, and the note."""
    tables = []
    for dataset, (number_of_table, words, _) in PAPER.items():
        rows = [[dataset, *HEADS]]
        for r in reread(dataset):
            printed = [r[key] for key in ("name", "ppl", "unit", "kl", "printed")]
            derived = [number(r[key]) for key in ("n", "rec", "neg_elbo")]
            derived.append(number(r["ppl_word"], 1))
            rows.append([*printed, number(r["n_printed"]), r["mi"], r["au"], *derived])
        title = f"Table {number_of_table}, {dataset}: {words:g} words per sentence"
        tables.append(f"{title}\n{align(rows)}")
    return "\n\n".join([*tables, PAPER_NOTE])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="paper_tables.py", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    with data.command("paper_tables.py"):
        print(format_paper())


if __name__ == "__main__":
    main()
