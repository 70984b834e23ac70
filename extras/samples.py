"""Are the texts of a run any good? Reconstructions, samples from the prior and interpolations,
beside test sentences.

    python -m extras.samples RUN [--lm RUN] [--count 1000] [--like texts.txt]

Needs `pip install -r extras/requirements.txt`. Prints one row for each kind of text, and some texts
of each:

    bleu         of greedy reconstructions from the posterior mean, against their sentences (corpus
                 BLEU, 0 to 100)
    distinct_1   share of the words that are different from each other, %; distinct_2: of the pairs
                 of words. Compare rows of the same count only: the more texts, the fewer new words
    words        per text, mean
    lm_nats      -log p per token of a language model's run, </s> included. Texts far below test
                 sentences are bland, those far above are not language

Prior: z from N(0, I), then the most likely words (greedy), or words drawn from p(x|z) (sampled: the
model's own distribution of texts). Interpolations: greedy texts on the straight line between the
posterior means of two test sentences, by their place on it; those in the middle should be as much
language as the ends. Like: z from the Gaussian of `extras.latent sample --like`, beside the first
texts of that file. Writes RUN-samples.json beside RUN.
"""

import argparse
import json
import sys
from pathlib import Path

import sacrebleu
import torch

import data
import metrics
from extras.flags import at_least
from extras.latent import fit_gaussian, interpolate, read_group

STEPS = 5  # of an interpolation, both ends included


def distinct(texts, n):
    """The share of different ones among the n-grams of words of all texts, %."""
    grams = [
        gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)), strict=False)
    ]
    return 100 * len(set(grams)) / max(1, len(grams))


@torch.no_grad()
def lm_nats(lm, texts, batch_size=64):
    """Mean of -log p per token, </s> included, of texts under a T5VAE without latent."""
    eos_id = lm.tokenizer.eos_token_id
    rows = [[*row, eos_id] for row in data.tokenize(texts, lm.tokenizer)]
    nats = 0.0
    for start in range(0, len(rows), batch_size):
        ids, _ = data.pad(rows[start : start + batch_size], lm.tokenizer.pad_token_id)
        nats += lm.rec(torch.zeros(len(ids), 0, device=lm.device), ids.to(lm.device)).sum().item()
    return nats / sum(map(len, rows))


def describe(texts, lm):
    words = sum(len(text.split()) for text in texts) / len(texts)
    return {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2), "words": words} | (
        {"lm_nats": lm_nats(lm, texts)} if lm else {}
    )


def judge(model, lm, corpus, count, seed=0, like=None):
    """({kind: measures}, {kind: texts}) of `count` texts of each kind; interpolations: a tenth as
    many pairs. like: texts whose Gaussian is a kind too."""
    torch.manual_seed(seed)
    count = min(count, len(corpus))
    order = torch.randperm(len(corpus))[:count].tolist()
    texts = {
        "test sentences": data.detokenize([corpus.row(i).tolist() for i in order], model.tokenizer)
    }
    longest = {"max_new_tokens": int(corpus.lengths.max())}
    mu, _ = model.encode_texts(texts["test sentences"])
    texts["reconstructions"] = model.decode_texts(mu, **longest)
    z = torch.randn(count, model.latent_dim)
    texts["prior, greedy"] = model.decode_texts(z, **longest)
    texts["prior, sampled"] = model.decode_texts(z, do_sample=True, **longest)
    half = max(1, count // 10)
    paths = torch.stack(
        [interpolate(a, b, STEPS) for a, b in zip(mu[:half], mu[half:], strict=False)], 1
    )
    for step, latents in enumerate(paths):  # (pairs, Z)
        texts[f"interpolation {step / (STEPS - 1):.2f}"] = model.decode_texts(latents, **longest)
    if like:
        z = fit_gaussian(*model.encode_texts(like)).sample((count,)).float()
        texts["like: the texts"] = like[:count]
        texts["like, greedy"] = model.decode_texts(z, **longest)
        texts["like, sampled"] = model.decode_texts(z, do_sample=True, **longest)
    measured = {kind: describe(of_kind, lm) for kind, of_kind in texts.items()}
    bleu = sacrebleu.corpus_bleu(
        texts["reconstructions"], [texts["test sentences"]], tokenize="none", force=True
    )
    measured["reconstructions"]["bleu"] = bleu.score
    return measured, texts


def format_lines(measured, texts):
    heads = ["bleu", "distinct_1", "distinct_2", "words", "lm_nats"]
    yield f"{'':20}{'count':>8}" + "".join(f"{head:>12}" for head in heads)
    for kind, row in measured.items():
        cells = [f"{row[head]:.2f}" if head in row else "-" for head in heads]
        yield f"{kind:20}{len(texts[kind]):8,}" + "".join(f"{cell:>12}" for cell in cells)
    for i in range(3):
        yield f"text            {texts['test sentences'][i]}"
        yield f"reconstructed   {texts['reconstructions'][i]}"
    for kind in (kind for kind in texts if kind.startswith(("prior", "like,"))):
        yield from (f"{kind:16}{text}" for text in texts[kind][:3])
    for kind in (kind for kind in texts if kind.startswith("interpolation")):
        yield f"{kind.removeprefix('interpolation '):16}{texts[kind][0]}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="samples.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("run", metavar="RUN", help="Run folder of train.py, of phase 2.")
    flag(
        "--lm",
        metavar="RUN",
        help="Run of a language model of the same data (lm beside the run, if there is one).",
    )
    flag("--count", type=at_least(3), default=1000, metavar="N", help="Texts of each kind (1000).")
    flag("--like", metavar="FILE", help="Texts, one per line: also write texts of their kind.")
    args = parser.parse_args(argv)
    data.replace_unprintable()
    beside = Path(args.run).resolve().parent / "lm"
    try:
        _, model, read = metrics.load_run(args.run)
        if model.latent_dim == 0:
            raise ValueError("a language model; it must be the run of a VAE")
        lm = (
            metrics.load_run(args.lm or beside)[1]
            if args.lm or (beside / "metrics.json").exists()
            else None
        )
        if lm and lm.latent_dim:
            raise ValueError(f"{args.lm or beside} is a VAE; --lm must be a run of --no-latent")
        if len(corpus := read("test")) < 3:
            raise ValueError(f"its test split has {len(corpus)} texts; it must have at least 3")
        like = read_group(args.like) if args.like else None
        measured, texts = judge(model, lm, corpus, args.count, like=like)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"samples.py: cannot use {args.run}: {error}")
    content = {
        "count": min(args.count, len(corpus)),
        "measures": measured,
        "texts": {kind: of[:20] for kind, of in texts.items()},
    }
    content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    run = Path(args.run).resolve()
    run.with_name(f"{run.name}-samples.json").write_text(content, encoding="utf-8")
    print(*format_lines(measured, texts), sep="\n")
    if not lm:
        print("lm_nats needs a language model: train.py --no-latent, then --lm RUN")


if __name__ == "__main__":
    main()
