"""Describe a data set: its sizes and lengths, what is cut or unknown, what occurs twice, and what
deletion leaves.

    python -m extras.describe ptb [--tokenizer t5-small] [--data-dir data] [--max-length 256]
    python -m extras.describe my-texts.txt
    python -m extras.describe grammar

A named data set is downloaded if it is not there. `grammar` is described with a vocabulary of its
own.
"""

import argparse
import sys

import numpy as np
import transformers

import data
from extras.flags import at_least

RESEARCH = "for research, not to be passed on"
TERMS = {
    "ptb": f"Penn Treebank, as Mikolov prepared it: LDC user agreement; {RESEARCH}",
    "snli": "SNLI (Bowman et al. 2015), the sample of 100,000 sentences: CC BY-SA 4.0",
    "yahoo": f"Yahoo Answers, the sample of Yang et al. 2017: no licence is known; {RESEARCH}",
    "yelp": f"Yelp reviews, the sample of Yang et al. 2017: Yelp dataset terms; {RESEARCH}",
}


def describe(dataset, tokenizer, data_dir="data", max_length=256):
    """Yields lines about a data set. Raises OSError, ValueError where it cannot be read."""
    heads = [
        "texts",
        "empty",
        "tokens-mean",
        "median",
        "max",
        "words-mean",
        "median",
        "max",
        "cut",
        "unknown",
        "twice",
    ]
    yield f"{'':8}" + "".join(f"{head:>12}" for head in heads) + "  in others"
    corpora = {
        s: data.load_corpus(dataset, s, tokenizer, data_dir, max_length) for s in data.SPLITS
    }
    texts = {s: set(filter(None, data.read_texts(dataset, s, data_dir))) for s in data.SPLITS}
    for split, corpus in corpora.items():
        cells = [f"{len(corpus):,}", f"{corpus.skipped:,}"]
        for counts in corpus.lengths, corpus.words - 1:  # without the end mark
            cells += [f"{counts.mean():.2f}", f"{np.median(counts):.0f}", f"{counts.max()}"]
        cells += [
            f"{corpus.truncated / len(corpus):.2%}",
            f"{(corpus.ids == corpus.unk_id).mean():.2%}",
        ]
        cells.append(f"{len(corpus) - len(texts[split]):,}")
        others = ", ".join(
            f"{len(texts[split] & texts[o]):,} in {o}" for o in data.SPLITS if o != split
        )
        yield f"{split:8}" + "".join(f"{cell:>12}" for cell in cells) + f"  {others}"
    yield "tokens: with </s>; cut: share of texts; unknown: share of tokens; twice: occurred before"
    batch = data.make_batch(corpora["train"], np.arange(min(3, len(corpora["train"]))))
    for prob in (0, 0.15, 0.40):
        ids, _ = data.delete_tokens(
            batch.ids, batch.mask, prob, 0, 0, batch.index, corpora["train"].pad_id
        )
        for text in tokenizer.batch_decode(ids):
            yield f"{prob:.0%} deleted:".ljust(14) + text.partition("</s>")[0]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="describe.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag(
        "dataset", metavar="NAME|DIR|FILE", help=f"One of {', '.join(data.DATASETS)}, or your own."
    )
    flag(
        "--data-dir",
        default="data",
        metavar="DIR",
        help="Where the folders of named data sets are (data).",
    )
    flag(
        "--tokenizer",
        metavar="NAME|DIR",
        help="Tokenizer of a T5 (t5-small; grammar: one of its own).",
    )
    flag(
        "--max-length",
        type=at_least(2),
        default=256,
        metavar="TOKENS",
        help="Texts are cut here (256).",
    )
    args = parser.parse_args(argv)
    data.replace_unprintable()
    transformers.utils.logging.set_verbosity_error()
    try:
        if args.dataset in TERMS:
            print(TERMS[args.dataset])
        texts = filter(None, data.read_texts(args.dataset, "train", args.data_dir))
        if args.dataset == "grammar" and not args.tokenizer:
            tokenizer = data.train_tokenizer(texts, 4000)
        else:
            args.tokenizer = args.tokenizer or "t5-small"
            tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
        print(*describe(args.dataset, tokenizer, args.data_dir, args.max_length), sep="\n")
    except KeyError as error:
        sys.exit(f"describe.py: {args.tokenizer} is damaged: its tokenizer has no {error}")
    except (OSError, ValueError) as error:
        sys.exit(f"describe.py: {data.one_line(error)}")


if __name__ == "__main__":
    main()
