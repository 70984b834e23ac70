"""Use the latent space of a trained T5-VAE from the shell.

    python -m extras.latent reconstruct RUN "a text" "another"      from the posterior mean
    python -m extras.latent reconstruct RUN "a text" --samples 5    from samples of the posterior
    python -m extras.latent reconstruct RUN < texts.txt             a line in, a line out
    python -m extras.latent sample RUN -n 64                        from the prior
    python -m extras.latent sample RUN -n 64 --like texts.txt       texts of the kind of these
    python -m extras.latent interpolate RUN "from here" "to there" [--steps 7] [--spherical]
    python -m extras.latent arithmetic RUN --from past.txt --to future.txt "a text" [--k 1.5]
    python -m extras.latent neighbors RUN texts.txt "a text" -n 10  nearest posterior means
    python -m extras.latent encode RUN texts.txt -o latents.npz     arrays mu and logvar
    python -m extras.latent map RUN --labels labels.txt -o map.png  the test texts by their mu
    python -m extras.latent strip RUN "from here" "to there" -o strip.png    an interpolation, drawn

RUN is a run folder, a model folder or a hub name. Decoding is greedy, or draws tokens at a
--temperature (other ways to decode are options of `T5VAE.decode_texts`); --seed fixes all that is
random. An empty line is an empty text and keeps its place, but not in --like, --from, --to and
neighbors, which skip it. `-` as a file is standard input.

`map` draws the posterior means in two dimensions, coloured by label: the two principal components,
or, with --tsne, scikit-learn's t-SNE. labels.txt has a line for each line of the texts, which are
RUN's test split, or --texts FILE; a pair without a text is left out. The eight most frequent labels
have a colour, all others are grey. Pictures need `pip install -r extras/requirements.txt`.
"""

import argparse
import contextlib
import io
import sys
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils import logging

import data
import metrics
from data import InputError, number
from vae import T5VAE

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#a6761d")
GREY = "#b0b0b0"  # of the labels that are not among the most frequent


@contextlib.contextmanager
def command(name):
    """`data.command` of a script that encodes texts: a warning is a line on stderr."""
    logging.set_verbosity_error()
    with warnings.catch_warnings(), data.command(name):
        warnings.showwarning = lambda message, *_: print(f"{name}: {message}", file=sys.stderr)
        yield


def without_spaces(texts):
    """Whether most texts have one word at most, as in languages that write none apart."""
    return sum(len(text.split()) <= 1 for text in texts) > len(texts) / 2


def align(rows):
    """Rows of cells -> text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def interpolate(a, b, steps, spherical=False):
    """`steps` latents from a to b (Z,), both included, evenly spaced: (steps, Z).

    On a straight line, or `spherical`: the direction turns, and the norm changes, at an even pace
    (White 2016), so z does not come nearer to the origin on the way. Opposite latents have no arc:
    there, too, the line is straight.
    """
    t = torch.linspace(0, 1, steps)[:, None]
    angle = torch.arccos(F.cosine_similarity(a, b, 0).clamp(-1, 1))
    if not spherical or angle.sin() < 1e-4:  # no arc between parallel latents
        return torch.lerp(a, b, t)
    norm = torch.lerp(a.norm(), b.norm(), t)
    a, b = F.normalize(a, dim=0), F.normalize(b, dim=0)
    return norm * (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def fit_gaussian(mu, logvar):
    """The Gaussian of z for texts of the kind of n texts, from their posteriors (n, Z) each.

    Its mean and its variances are those of the mixture of the n posteriors: the mean of mu, and the
    variance of mu plus the mean of exp(logvar). Its covariances are those of mu times n / (n + Z):
    few texts say little about how dimensions go together. Of one text it is the posterior itself.
    Returns: torch's MultivariateNormal over (Z,), float64.
    """
    mu, (n, latent_dim) = mu.double(), mu.shape
    centered = mu - mu.mean(0)
    covariance = centered.T @ centered / n
    shrunk = covariance * n / (n + latent_dim)
    shrunk.diagonal().copy_(covariance.diagonal() + logvar.double().exp().mean(0))
    return torch.distributions.MultivariateNormal(mu.mean(0), shrunk)


def read_group(path):
    """The lines of a file that are not empty, at least one."""
    lines = [line for line in data.read_lines(path) if line]
    if not lines:
        raise InputError(f"{path} holds no text")
    return lines


def read_texts(args):
    """TEXT ..., or the lines of standard input."""
    if "-" in args.text:
        raise InputError("TEXT is -; without TEXT the lines of standard input are read")
    return args.text or data.read_lines("-")


def encode(model, args, texts):
    """mu and logvar of texts: (n, Z) each."""
    # A command line that is not UTF-8 arrives with surrogates, which are no characters.
    texts = [t.strip().encode(errors="surrogateescape").decode(errors="replace") for t in texts]
    return model.encode_texts(texts, max_length=args.max_length)


def decode(model, args, z):
    """A line for each z: greedy, or drawn if there is a temperature."""
    kwargs = {"max_new_tokens": args.max_length}
    if args.temperature is not None:
        kwargs |= {"do_sample": True, "temperature": args.temperature}
    texts = model.decode_texts(z, **kwargs)
    return [text.replace("\n", " ").replace("\r", " ") for text in texts]


def run_reconstruct(model, args):
    z, logvar = encode(model, args, read_texts(args))
    if args.samples:
        z = model.reparameterize(*(x.repeat_interleave(args.samples, 0) for x in (z, logvar)))
    return decode(model, args, z)


def run_sample(model, args):
    if args.like:
        z = fit_gaussian(*encode(model, args, read_group(args.like))).sample((args.n,)).float()
    else:
        z = torch.randn(args.n, model.latent_dim)
    return decode(model, args, z)


def run_interpolate(model, args):
    if args.spherical and model.latent_dim < 2:
        raise InputError("--spherical has no effect: z has one dimension, in which nothing turns")
    mu, _ = encode(model, args, [args.a, args.b])
    return decode(model, args, interpolate(*mu, args.steps, args.spherical))


def run_arithmetic(model, args):
    source, _ = encode(model, args, read_group(args.source))
    target, _ = encode(model, args, read_group(args.target))
    mu, _ = encode(model, args, read_texts(args))
    return decode(model, args, mu + args.k * (target.mean(0) - source.mean(0)))


def run_neighbors(model, args):
    lines = read_group(args.lines)
    mu, _ = encode(model, args, [args.query, *lines])
    distance, index = (mu[1:] - mu[0]).norm(dim=1).sort(stable=True)
    nearest = zip(distance[: args.n].tolist(), index.tolist(), strict=False)
    return [f"{d:.3f}\t{lines[i]}" for d, i in nearest]


def run_encode(model, args):
    mu, logvar = encode(model, args, data.read_lines(args.lines))
    with open(args.out, "wb") as file:
        np.savez(file, mu=mu.numpy(), logvar=logvar.numpy())
    return []


def labelled_texts(args):
    """(texts, labels) of `map`: where both lines say something. InputError unless they pair up."""
    if args.texts:
        texts, where = list(data.read_lines(args.texts)), args.texts
    else:
        config = metrics.read_config(args.model)
        try:
            texts = list(data.read_texts(config["dataset"], "test", config["data_dir"]))
        except FileNotFoundError as error:
            raise InputError(f"{error}; give --texts") from error
        if data.texts_sha256(texts) != config["data_sha256"]["test"]:
            said = f"the test texts of {config['dataset']} are not those of {args.model}"
            raise InputError(f"{said}; give --texts")
        where = f"the test split of {config['dataset']}"
    labels = list(data.read_lines(args.labels))
    if len(texts) != len(labels):
        counts = f"{where} has {len(texts):,} lines, {args.labels} {len(labels):,}"
        raise InputError(f"{counts}; there must be a label for each text")
    pairs = [(text, label) for text, label in zip(texts, labels, strict=True) if text and label]
    if len(pairs) < 3:
        raise InputError(f"{len(pairs)} texts with a label; there must be at least 3 to draw")
    return zip(*pairs, strict=True)


def run_map(model, args):
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if model.latent_dim < 2:
        raise InputError("z has one dimension; a map has two")
    texts, labels = labelled_texts(args)
    mu = encode(model, args, texts)[0].double().numpy()
    if args.tsne and len(np.unique(mu, axis=0)) < 3:
        raise InputError("--tsne needs at least three different texts")
    if args.tsne:
        place = TSNE(perplexity=min(30, (len(mu) - 1) / 3), random_state=0).fit_transform(mu)
        names = "t-SNE 1 (no unit)", "t-SNE 2 (no unit)"
    else:
        pca = PCA(2, svd_solver="full")  # the other one draws random numbers
        place = pca.fit_transform(mu)
        shares = enumerate(100 * pca.explained_variance_ratio_, 1)
        names = [f"component {i}: {share:.0f} % of the variance" for i, share in shares]
    draw_map(place, labels, names, args.out)
    return [f"wrote {args.out}: {len(mu):,} texts"]


def draw_map(place, labels, axes_names, path):
    """A PNG of points (n, 2), coloured by label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes, ranked = figure.subplots(), Counter(labels).most_common()
    colours = {label: colour for (label, _), colour in zip(ranked, COLOURS, strict=False)}
    # In one call, in a random order: no label lies on top of all others.
    order = np.random.default_rng(0).permutation(len(place))
    of_points = [colours.get(labels[i], GREY) for i in order]
    size = float(np.clip(20_000 / len(place), 8, 40))
    axes.scatter(*place[order].T, s=size, c=of_points, alpha=0.7, linewidths=0)
    for label, count in ranked[: len(COLOURS)]:
        name = label if len(label) <= 24 else label[:20] + " ..."
        name = " " + name.replace("$", r"\$")  # matplotlib hides what begins with _
        axes.scatter([], [], s=45, c=colours[label], label=f"{name} ({count:,})")
    if rest := ranked[len(COLOURS) :]:
        count = sum(count for _, count in rest)
        axes.scatter([], [], s=45, c=GREY, label=f"{len(rest)} others ({count:,})")
    axes.legend(title="label (texts)", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
    axes.set_title(f"posterior means of {len(place):,} texts")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")


def run_strip(model, args):
    texts = run_interpolate(model, args)
    draw_strip(texts, args.out)
    return texts


def draw_strip(texts, path):
    """A PNG: texts from top to bottom along a line, one at each place on it."""
    from matplotlib.figure import Figure

    lines = [
        textwrap.wrap(text, 84, max_lines=3, placeholder=" ...") or ["(nothing)"] for text in texts
    ]
    heights = np.array([0.22 * len(wrapped) + 0.22 for wrapped in lines])  # inches
    height = heights.sum() + 0.3
    figure = Figure(figsize=(8, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 8), ylim=(height, 0))
    axes.axis("off")
    places, ys = np.linspace(0, 1, len(texts)), 0.15 + heights.cumsum() - heights / 2
    axes.plot([0.8, 0.8], ys[[0, -1]], color=GREY, linewidth=2, zorder=1)
    axes.scatter(np.full(len(ys), 0.8), ys, s=60, c=places, cmap="coolwarm", zorder=2)
    for place, y, wrapped in zip(places, ys, lines, strict=True):
        axes.text(0.6, y, f"{place:.2f}", ha="right", va="center", fontsize=9, color="#555555")
        style = {"va": "center", "fontsize": 10, "linespacing": 1.3, "parse_math": False}
        axes.text(1.05, y, "\n".join(wrapped), **style)
    # "tight": a text that is wider than its place makes the picture wider.
    figure.savefig(path, dpi=150, format="png", bbox_inches="tight", pad_inches=0.15)


def parse_args(argv):
    parser = argparse.ArgumentParser("latent.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, run, summary):
        """Add a command that calls `run`. Returns its `add_argument`."""
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        flag = sub.add_argument
        flag("model", metavar="RUN")
        longest = "longest text, tokens with </s> (256)"
        flag("--max-length", type=number(int, 2), default=256, metavar="TOKENS", help=longest)
        return flag

    def add_decoding(name, run, summary):
        """The same for a command that writes texts."""
        flag = add(name, run, summary)
        flag("--seed", type=number(int, 0, 2**32), default=0, help="of all that is drawn (0)")
        flag("--temperature", type=number(float, 1e-3), metavar="T", help="draw tokens, at T")
        return flag

    given = {"nargs": "*", "metavar": "TEXT", "help": "none: the lines of standard input"}
    flag = add_decoding("reconstruct", run_reconstruct, "decode the posterior means of texts")
    flag("text", **given)
    flag("--samples", type=number(int, 1), metavar="N", help="decode N samples of each posterior")
    about = "decode samples of the prior, or of a Gaussian fitted to texts"
    flag = add_decoding("sample", run_sample, about)
    flag("-n", type=number(int, 1), default=10, help="how many (10)")
    flag("--like", metavar="FILE", help="texts, one per line, to whose posteriors to fit it")
    about = "add the difference of two groups' mean latents to texts"
    flag = add_decoding("arithmetic", run_arithmetic, about)
    flag("text", **given)
    flag("--from", required=True, dest="source", metavar="FILE", help="texts of the first group")
    flag("--to", required=True, dest="target", metavar="FILE", help="texts of the second group")
    step = number(float, -1e6, 1e6)
    flag("--k", type=step, default=1.0, help="add the difference this many times (1)")
    about = "decode latents between the posterior means of A and B"
    for name, run in ("interpolate", run_interpolate), ("strip", run_strip):
        flag = add_decoding(name, run, about)
        flag("a", metavar="A")
        flag("b", metavar="B")
        flag("--steps", type=number(int, 2), default=7, metavar="N", help="texts (7)")
        flag("--spherical", action="store_true", help="take an arc instead of a straight line")
    flag("-o", dest="out", required=True, metavar="FILE.png", help="picture of the strip to write")
    flag = add("neighbors", run_neighbors, "print the lines of FILE nearest to TEXT")
    flag("lines", metavar="FILE", help="texts, one per line")
    flag("query", metavar="TEXT")
    flag("-n", type=number(int, 1), default=10, help="how many (10)")
    flag = add("encode", run_encode, "write mu and logvar of the lines of FILE")
    flag("lines", metavar="FILE", help="texts, one per line")
    flag("-o", dest="out", required=True, metavar="OUT.npz", help="arrays mu and logvar")
    flag = add("map", run_map, "draw the posterior means of labelled texts in two dimensions")
    flag("--labels", required=True, metavar="FILE", help="a label for each text, one per line")
    flag("--texts", metavar="FILE", help="texts, one per line (the test split of RUN)")
    flag("--tsne", action="store_true", help="t-SNE instead of the two principal components")
    flag("-o", dest="out", required=True, metavar="FILE.png", help="picture to write")
    if argv and argv[0] in commands.choices:  # intermixed: TEXT may stand after options too
        return commands.choices[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)


def load_vae(folder):
    """The T5VAE of a folder or a hub name. InputError if it has no latent."""
    model = T5VAE.from_pretrained(folder)
    if model.latent_dim == 0:
        raise InputError(f"{folder} is a language model; it must be a VAE")
    return model


def check_out(args):
    """InputError if the file of -o has no folder, or is one that the command reads."""
    out = Path(args.out)
    if not out.parent.is_dir():
        raise InputError(f"-o is {args.out}, but there is no folder {out.parent}")
    for name in "lines", "labels", "texts":
        read = getattr(args, name, None)
        if read and Path(read).resolve() == out.resolve():
            raise InputError(f"-o is {args.out}, which is read: give another file")


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as what it reads
    with command("latent.py"):
        if hasattr(args, "out"):  # before all is encoded
            check_out(args)
        model = load_vae(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(getattr(args, "seed", 0))
        for line in args.run(model, args):
            print(line)


if __name__ == "__main__":
    main()
