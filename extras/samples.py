"""Are the texts of a run any good? Reconstructions, samples from the prior and interpolations,
beside test sentences.

    python -m extras.samples RUN [--lm RUN] [--count 1000] [--like texts.txt]

Needs `pip install -r extras/requirements.txt`. Prints one row for each kind of text, and some texts
of each:

    bleu         of greedy reconstructions from the posterior mean, against their sentences (corpus
                 BLEU, 0 to 100)
    distinct_1   share of the words that are different from each other, %; distinct_2: of the pairs
                 of words. Compare rows of the same count only: the more texts, the fewer new words
                 (where most texts have no spaces a word, of BLEU too, is a character)
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
from pathlib import Path

import sacrebleu
import torch

import data
import metrics
from extras.latent import align, command, fit_gaussian, interpolate, read_group, without_spaces

STEPS = 5  # of an interpolation, both ends included
HEADS = ["bleu", "distinct_1", "distinct_2", "words", "lm_nats"]


def distinct(texts, n, split=str.split):
    """The share of different ones among the n-grams of words of all texts, %."""
    grams = []
    for text in texts:
        words = split(text)
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 100 * len(set(grams)) / max(1, len(grams))


def lm_nats(lm, texts):
    """Mean of -log p per token, </s> included, of whole texts under a T5VAE without latent."""
    corpus = data.make_corpus(texts, lm.tokenizer, max_length=2**30, allow_empty=True)
    return metrics.evaluate(lm, corpus)["rec"] * len(corpus) / corpus.ids.size


def measure(texts, lm, split=str.split):
    """The measures of texts, but for BLEU; lm: a language model, or None; split: into words."""
    measured = {f"distinct_{n}": distinct(texts, n, split) for n in (1, 2)}
    measured["words"] = sum(len(split(text)) for text in texts) / len(texts)
    if lm:
        measured["lm_nats"] = lm_nats(lm, texts)
    return measured


def judge(model, lm, corpus, count, like=None):
    """({kind: measures}, {kind: texts}) of `count` texts of each kind.

    Interpolations are of a tenth as many pairs. like: texts whose Gaussian is a kind, too.
    """
    torch.manual_seed(0)
    count, longest = min(count, len(corpus)), int(corpus.lengths.max())
    rows = [corpus.row(i).tolist() for i in torch.randperm(len(corpus))[:count]]
    texts = {"test sentences": data.detokenize(rows, model.tokenizer)}
    most = max(256, longest)  # tokens that are read of a text
    mu, _ = model.encode_texts(texts["test sentences"], max_length=most)
    latents = {"reconstructions": mu, "prior, greedy": torch.randn(count, model.latent_dim)}
    latents["prior, sampled"] = latents["prior, greedy"]
    pairs = max(1, count // 10)
    paths = [interpolate(a, b, STEPS) for a, b in zip(mu[:pairs], mu[pairs:], strict=False)]
    for step, z in enumerate(torch.stack(paths, 1)):  # (pairs, Z)
        latents[f"interpolation {step / (STEPS - 1):.2f}"] = z
    if like:
        gaussian = fit_gaussian(*model.encode_texts(like, max_length=most))
        latents["like, greedy"] = gaussian.sample((count,)).float()
        latents["like, sampled"] = latents["like, greedy"]
    for kind, z in latents.items():
        torch.manual_seed(0)  # what a kind draws does not depend on the kinds before it
        sampled = kind.endswith("sampled")
        texts[kind] = model.decode_texts(z, do_sample=sampled, max_new_tokens=longest)
    if like:
        texts["like: the texts"] = like[:count]
    characters = without_spaces(texts["test sentences"])
    split = list if characters else str.split
    measured = {kind: measure(of_kind, lm, split) for kind, of_kind in texts.items()}
    of_reconstructions = bleu(texts["reconstructions"], texts["test sentences"], characters)
    measured["reconstructions"]["bleu"] = of_reconstructions
    return measured, texts


def bleu(texts, originals, characters=False):
    """Corpus BLEU, of words as they are, or of characters."""
    tokenize = "char" if characters else "none"
    settings = {"tokenize": tokenize, "force": True, "use_effective_order": True}  # of short texts
    return sacrebleu.corpus_bleu(texts, [originals], **settings).score


def format_lines(measured, texts):
    table = [["", "count", *HEADS]]
    for kind, row in measured.items():
        cells = [f"{row[head]:.2f}" if head in row else "-" for head in HEADS]
        table.append([kind, f"{len(texts[kind]):,}", *cells])
    yield align(table)
    if without_spaces(texts["test sentences"]):
        yield "Most texts have no spaces: BLEU, distinct and words count characters."
    for i in range(3):
        yield f"text            {texts['test sentences'][i]}"
        yield f"reconstructed   {texts['reconstructions'][i]}"
    for kind, of_kind in texts.items():
        if kind.startswith(("prior", "like,")):
            yield from (f"{kind:16}{text}" for text in of_kind[:3])
        elif kind.startswith("interpolation"):
            yield f"{kind.removeprefix('interpolation '):16}{of_kind[0]}"


def load_lm(run, config, named):
    """The language model to judge by, of the run's texts: `named`, else lm/ beside it, else None.

    Raises InputError if `named` is no such run. It may cut the texts elsewhere.
    """
    if metrics.language_model_nll(run, config, None, named) is None:
        return None
    _, lm, _ = metrics.load_run(named or Path(run).resolve().parent / "lm")
    return lm


def main(argv=None):
    parser = argparse.ArgumentParser(prog="samples.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("run", metavar="RUN", help="run folder of train.py")
    flag("--lm", metavar="RUN", help="language model of the same data (lm/ beside RUN, if any)")
    count = data.number(int, 3)
    flag("--count", type=count, default=1000, metavar="N", help="texts of each kind (1000)")
    flag("--like", metavar="FILE", help="texts, one per line: also write texts of their kind")
    flag("--dataset", help="where the texts are, if they have moved")
    args = parser.parse_args(argv)
    run = Path(args.run).resolve()
    with command("samples.py"):
        config, model, read = metrics.load_run(args.run, dataset=args.dataset)
        if model.latent_dim == 0:
            raise data.InputError(f"{args.run} is a language model; it must be the run of a VAE")
        lm, corpus = load_lm(args.run, config, args.lm), read("test")
        if len(corpus) < 3:
            raise data.InputError(f"{args.run} has {len(corpus)} test texts; there must be 3")
        like = read_group(args.like) if args.like else None
        measured, texts = judge(model, lm, corpus, args.count, like=like)
        some = {kind: of_kind[:20] for kind, of_kind in texts.items()}
        content = {"count": len(texts["reconstructions"]), "measures": measured, "texts": some}
        data.write_json(run.with_name(f"{run.name}-samples.json"), content)
        print(*format_lines(measured, texts), sep="\n")
        if not lm:
            print("lm_nats needs a language model: train.py --no-latent, then --lm RUN")


if __name__ == "__main__":
    main()
