"""Use the latent space of a trained T5-VAE from the shell.

    python -m extras.latent reconstruct RUN "a text" "another"      from the posterior mean
    python -m extras.latent reconstruct RUN "a text" --samples 5    from samples of the posterior
    python -m extras.latent reconstruct RUN < texts.txt             a line in, a line out
    python -m extras.latent sample RUN -n 64                        from the prior
    python -m extras.latent sample RUN -n 64 --like texts.txt       texts of the kind of these
    python -m extras.latent interpolate RUN "from here" "to there" [--steps 7] [--spherical]
    python -m extras.latent arithmetic RUN --from past.txt --to future.txt "a text" [--k 1.5]
    python -m extras.latent neighbors RUN texts.txt "a text" -n 10  nearest posterior means
    python -m extras.latent traverse RUN "a text" [--dim 3 7]       one dimension from -3 to 3
    python -m extras.latent encode RUN texts.txt -o latents.npz     arrays mu and logvar
    python -m extras.latent map RUN --labels labels.txt -o map.png  the test texts by their mu
    python -m extras.latent strip RUN "from here" "to there" -o strip.png    an interpolation, drawn

RUN is a run folder, a model folder or a hub name. Decoding is greedy; --temperature, --top-k and
--top-p sample tokens, --num-beams searches, and --seed fixes all that is random. An empty line is
an empty text and keeps its place.

`map` draws the posterior means in two dimensions, coloured by label: the two principal components,
or, with --tsne, scikit-learn's t-SNE. labels.txt has a line for each line of the texts, which are
RUN's test split, or --texts FILE; a pair without a text is left out. The eight most frequent labels
have a colour, all others are grey. Pictures need `pip install -r extras/requirements.txt`.
"""

import argparse
import hashlib
import io
import json
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
from data import InputError, number
from vae import T5VAE

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#a6761d")
GREY = "#b0b0b0"  # of the labels that are not among the most frequent


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

    On a straight line, or `spherical`, at an even pace of the angle between a and b, in which the
    norm does not shrink on the way (White 2016).
    """
    t = torch.linspace(0, 1, steps)[:, None]
    angle = torch.arccos(F.cosine_similarity(a, b, 0).clamp(-1, 1))
    if not spherical or angle.sin() < 1e-4:  # no arc between parallel latents
        return torch.lerp(a, b, t)
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


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


def active_dimensions(model, n=256):
    """(Z,) dimensions of z, by how much their posterior mean varies over texts, the most first.

    The model itself writes the n texts from the prior: a saved model comes without its data.
    """
    texts = model.decode_texts(torch.randn(n, model.latent_dim), max_new_tokens=64)
    return model.encode_texts(texts)[0].var(0).argsort(descending=True)


def read_lines(path):
    """The stripped lines of a UTF-8 file, empty ones too; "-" is standard input."""
    if path == "-" and sys.stdin is None:
        raise InputError("there are no texts: standard input is closed")
    return list(data.read_lines(path))


def read_group(path):
    """The lines of a file that are not empty, at least one."""
    if lines := [line for line in read_lines(path) if line]:
        return lines
    raise InputError(f"{path} holds no text")


def read_texts(args):
    """The texts of a command: TEXT ... and --file, or standard input. Empty lines are texts."""
    texts = []
    for text in args.text or ([] if args.file else ["-"]):
        texts += read_lines("-") if text == "-" else [text]
    return texts + (read_lines(args.file) if args.file else [])


def encode(model, args, texts):
    """mu and logvar of texts: (n, Z) each."""
    # A command line that is not UTF-8 arrives with surrogates, which are no characters.
    texts = [t.strip().encode(errors="surrogateescape").decode(errors="replace") for t in texts]
    return model.encode_texts(texts, args.batch_size, args.max_length)


def decode(model, args, z):
    """Greedy decoding, or a search with beams, or sampling if an option of it is given."""
    kwargs = {"max_new_tokens": args.max_length, "num_beams": args.num_beams}
    for name in "temperature", "top_k", "top_p":
        if getattr(args, name) is not None:
            kwargs |= {"do_sample": True, name: getattr(args, name)}
    return model.decode_texts(z, args.batch_size, **kwargs)


def pairs(texts, outputs):
    return [{"text": text, "output": output} for text, output in zip(texts, outputs, strict=True)]


def run_reconstruct(model, args):
    texts = read_texts(args)
    z, logvar = encode(model, args, texts)
    if args.samples:
        texts = [text for text in texts for _ in range(args.samples)]
        z = model.reparameterize(*(x.repeat_interleave(args.samples, 0) for x in (z, logvar)))
    return pairs(texts, decode(model, args, z))


def run_sample(model, args):
    if args.like:
        z = fit_gaussian(*encode(model, args, read_group(args.like))).sample((args.n,)).float()
    else:
        z = torch.randn(args.n, model.latent_dim)
    return [{"output": output} for output in decode(model, args, z)]


def run_interpolate(model, args):
    mu, _ = encode(model, args, [args.a, args.b])
    outputs = decode(model, args, interpolate(*mu, args.steps, args.spherical))
    return [{"output": output} for output in outputs]


def run_arithmetic(model, args):
    source, _ = encode(model, args, read_group(args.source))
    target, _ = encode(model, args, read_group(args.target))
    texts = read_texts(args)
    mu, _ = encode(model, args, texts)
    moved = mu + args.k * (target.mean(0) - source.mean(0))
    return pairs(texts, decode(model, args, moved))


def run_neighbors(model, args):
    lines = read_group(args.lines)
    mu, _ = encode(model, args, [args.query, *lines])
    distance, index = (mu[1:] - mu[0]).norm(dim=1).sort(stable=True)
    nearest = list(zip(distance.tolist(), index.tolist(), strict=True))[: args.n]
    return [{"text": args.query, "distance": d, "output": lines[i]} for d, i in nearest]


def run_traverse(model, args):
    mu, _ = encode(model, args, [args.query])
    if wrong := [dim for dim in args.dim or [] if not 0 <= dim < model.latent_dim]:
        raise InputError(f"--dim is {wrong[0]}; it must be in [0, {model.latent_dim})")
    rows, latents = [], []
    for dim in args.dim or active_dimensions(model)[:5].tolist():
        for value in torch.linspace(-3, 3, args.steps).tolist():
            rows.append({"text": args.query, "dim": dim, "value": value})
            latents.append(mu[0].clone())
            latents[-1][dim] = value
    outputs = decode(model, args, torch.stack(latents))
    return [row | {"output": output} for row, output in zip(rows, outputs, strict=True)]


def run_encode(model, args):
    texts = read_lines(args.lines)
    mu, logvar = encode(model, args, texts)
    if args.out:
        with open(args.out, "wb") as file:
            np.savez(file, mu=mu.numpy(), logvar=logvar.numpy())
        return []
    args.json = True
    rows = zip(texts, mu.tolist(), logvar.tolist(), strict=True)
    return [{"text": text, "mu": m, "logvar": v} for text, m, v in rows]


def labelled_texts(model, args):
    """(texts, labels) of `map`: where both lines say something. InputError unless they pair up."""
    texts, where = args.texts and read_lines(args.texts), args.texts
    if not texts:
        config = data.read_json(Path(args.model, "config.json"))
        if "data_sha256" not in config:
            raise InputError(f"{args.model} is no run folder, which knows its texts: give --texts")
        dataset = args.dataset or config["dataset"]
        texts = list(data.read_texts(dataset, "test", config["data_dir"]))
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        if digest != config["data_sha256"].get("test"):
            raise InputError(f"the test texts of {dataset} are not those of {args.model}")
        where = f"the test split of {dataset}"
    labels = read_lines(args.labels)
    if len(texts) != len(labels):
        counts = f"{where} has {len(texts):,} lines, {args.labels} {len(labels):,}"
        raise InputError(f"{counts}; there must be a label for each text")
    pairs = [(text, label) for text, label in zip(texts, labels, strict=True) if text and label]
    if len(pairs) < 3:
        raise InputError(f"{len(pairs)} texts with a label; there must be at least 3 to draw")
    return zip(*pairs, strict=True)


def principal_components(mu):
    """The first two of points (n, Z), (n, 2), and the share of the variance that each explains."""
    centred = mu - mu.mean(0)
    u, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    place = np.zeros((len(mu), 2))
    shown = min(2, len(sizes))
    place[:, :shown] = u[:, :shown] * sizes[:shown]
    shares = np.zeros(2)
    shares[:shown] = sizes[:shown] ** 2 / max(1e-12, (sizes**2).sum())
    return place, shares


def draw_map(place, labels, axes_names, path):
    """A PNG of points (n, 2), coloured by label."""
    pyplot = load_pyplot()
    ranked = Counter(labels).most_common()
    named = [label for label, _ in ranked[: len(COLOURS)]]
    figure, axes = pyplot.subplots(figsize=(8, 6), layout="constrained")
    colours = dict(zip(named, COLOURS, strict=False))
    of_points = [colours.get(label, GREY) for label in labels]
    # In one call, in a random order: no label lies on top of all others.
    order = np.random.default_rng(0).permutation(len(place))
    size = float(np.clip(20_000 / len(place), 8, 40))
    axes.scatter(*place[order].T, s=size, c=[of_points[i] for i in order], alpha=0.7, linewidths=0)
    counts = dict(ranked)
    short = {label: textwrap.shorten(label, 24, placeholder=" ...") for label in named}
    rows = [(colours[label], f"{short[label]} ({counts[label]:,})") for label in named]
    if rest := sum(count for _, count in ranked[len(COLOURS) :]):
        rows.append((GREY, f"{len(ranked) - len(named)} others ({rest:,})"))
    for colour, text in rows:
        axes.scatter([], [], s=45, c=colour, label=text.replace("$", r"\$"))
    axes.legend(title="label (texts)", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
    axes.set_title(f"posterior means of {len(place):,} texts")
    axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path)


def run_map(model, args):
    texts, labels = labelled_texts(model, args)
    mu = encode(model, args, texts)[0].double().numpy()
    if args.tsne:
        from sklearn.manifold import TSNE

        perplexity = min(30, (len(mu) - 1) / 3)
        place = TSNE(perplexity=perplexity, random_state=args.seed, init="pca").fit_transform(mu)
        axes_names = "t-SNE 1 (no unit)", "t-SNE 2 (no unit)"
    else:
        place, shares = principal_components(mu)
        axes_names = [
            f"component {i}: {100 * s:.0f} % of the variance" for i, s in enumerate(shares, 1)
        ]
    draw_map(place, labels, axes_names, args.out)
    return [{"output": f"wrote {args.out}: {len(mu):,} texts"}]


def draw_strip(texts, path):
    """A PNG: texts from top to bottom along a line, one at each place on it."""
    pyplot = load_pyplot()
    lines = [
        textwrap.wrap(text, 84, max_lines=3, placeholder=" ...") or ["(nothing)"] for text in texts
    ]
    heights = [0.22 * len(wrapped) + 0.22 for wrapped in lines]  # inches
    figure = pyplot.figure(figsize=(8, sum(heights) + 0.3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 8), ylim=(sum(heights) + 0.3, 0))
    axes.axis("off")
    ys = 0.15 + np.cumsum(heights) - np.array(heights) / 2
    axes.plot([0.8, 0.8], ys[[0, -1]], color=GREY, linewidth=2, zorder=1)
    for t, y, wrapped in zip(np.linspace(0, 1, len(texts)), ys, lines, strict=True):
        colour = tuple((1 - t) * np.array((0.0, 0.447, 0.698)) + t * np.array((0.835, 0.369, 0.0)))
        axes.scatter([0.8], [y], s=60, color=[colour], zorder=2)
        axes.text(0.6, y, f"{t:.2f}", ha="right", va="center", fontsize=9, color="#555555")
        text = "\n".join(wrapped).replace("$", r"\$")
        axes.text(1.05, y, text, va="center", fontsize=10, linespacing=1.3)
    save_picture(figure, path)


def run_strip(model, args):
    mu, _ = encode(model, args, [args.a, args.b])
    texts = decode(model, args, interpolate(*mu, args.steps))
    draw_strip(texts, args.out)
    return [{"output": text} for text in texts]


def load_pyplot():
    """matplotlib, told to draw into files."""
    try:
        import matplotlib
    except ImportError:
        advice = "pip install -r extras/requirements.txt"
        raise InputError(f"pictures need matplotlib: {advice}") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure, path):
    # "tight": a text that is wider than its place makes the picture wider.
    shape = {"bbox_inches": "tight", "pad_inches": 0.15}
    figure.savefig(path, dpi=150, format="png", facecolor="white", **shape)
    load_pyplot().close(figure)


def shared_flags():
    """Parsers of the flags that commands share: those of all, of reading and of decoding texts."""
    common, reading, decoding = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    flag, devices = common.add_argument, ("cuda", "cpu")[not torch.cuda.is_available() :]
    flag("model", metavar="RUN")
    flag("--json", action="store_true", help="print one JSON object per line, with the input")
    flag("--batch-size", type=number(int, 1), default=64, metavar="N", help="texts at a time (64)")
    longest = "longest text, tokens with </s> (256)"
    flag("--max-length", type=number(int, 2), default=256, metavar="TOKENS", help=longest)
    flag("--device", choices=devices, default=devices[0], help="where to compute")
    flag = reading.add_argument
    flag("text", nargs="*", metavar="TEXT", help="a text; - or none: the lines of standard input")
    flag("--file", metavar="FILE", help="texts, one per line")
    flag, share = decoding.add_argument, number(float, 1e-9, 1 + 1e-9)
    flag("--seed", type=number(int, 0, 2**32), default=0, help="of everything random (0)")
    temperature = number(float, 1e-3)
    flag("--temperature", type=temperature, metavar="T", help="sample tokens, at temperature T")
    flag("--top-k", type=number(int, 1), metavar="K", help="sample from the K most likely tokens")
    flag("--top-p", type=share, metavar="P", help="sample from the top share P")
    flag("--num-beams", type=number(int, 1), default=1, metavar="N", help="beams (1: greedy)")
    return common, reading, decoding


def parse_args(argv):
    parser = argparse.ArgumentParser("latent.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common, reading, decoding = shared_flags()

    def command(name, run, summary, *shared):
        """Add a command that calls `run`. Returns its `add_argument`."""
        parents = [common, *shared]
        sub = commands.add_parser(name, help=summary, description=summary, parents=parents)
        sub.set_defaults(run=run)
        return sub.add_argument

    about = "decode the posterior means of texts"
    flag = command("reconstruct", run_reconstruct, about, reading, decoding)
    flag("--samples", type=number(int, 1), metavar="N", help="decode N samples of each posterior")
    about = "decode samples of the prior, or of a Gaussian fitted to texts"
    flag = command("sample", run_sample, about, decoding)
    flag("-n", type=number(int, 1), default=10, help="how many (10)")
    flag("--like", metavar="FILE", help="texts, one per line, to whose posteriors to fit it")
    about = "decode latents between the posterior means of A and B"
    flag = command("interpolate", run_interpolate, about, decoding)
    flag("a", metavar="A")
    flag("b", metavar="B")
    flag("--steps", type=number(int, 2), default=7, metavar="N", help="texts, with both ends (7)")
    flag("--spherical", action="store_true", help="take an arc instead of a straight line")
    about = "add the difference of two groups' mean latents to texts"
    flag = command("arithmetic", run_arithmetic, about, reading, decoding)
    flag("--from", required=True, dest="source", metavar="FILE", help="texts of the first group")
    flag("--to", required=True, dest="target", metavar="FILE", help="texts of the second group")
    step = number(float, -1e6, 1e6)
    flag("--k", type=step, default=1.0, help="add the difference this many times (1)")
    about = "print the lines of FILE nearest to TEXT, by posterior mean"
    flag = command("neighbors", run_neighbors, about)
    flag("lines", metavar="FILE", help="texts, one per line; - is standard input")
    flag("query", metavar="TEXT")
    flag("-n", type=number(int, 1), default=10, help="how many (10)")
    about = "decode TEXT with one dimension of its posterior mean set from -3 to 3"
    flag = command("traverse", run_traverse, about, decoding)
    flag("query", metavar="TEXT")
    flag("--dim", type=int, nargs="+", metavar="I", help="dimensions, from 0 (the 5 most active)")
    flag("--steps", type=number(int, 2), default=7, metavar="N", help="values (7)")
    flag = command("encode", run_encode, "write mu and logvar of the lines of FILE")
    flag("lines", nargs="?", default="-", metavar="FILE", help="(-: standard input)")
    flag("-o", dest="out", metavar="OUT.npz", help="arrays mu and logvar (default: JSON lines)")
    picture_flags(command, decoding)
    if argv and argv[0] in commands.choices:  # intermixed: TEXT may stand after options too
        return commands.choices[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)


def picture_flags(command, decoding):
    """The commands that draw; command: see `parse_args`."""
    flag = command("map", run_map, "draw the posterior means of labelled texts in two dimensions")
    flag("--labels", required=True, metavar="FILE", help="a label for each text, one per line")
    flag("--texts", metavar="FILE", help="texts, one per line (the test split of RUN)")
    flag("--dataset", help="where the texts of RUN are, if they have moved")
    flag("--tsne", action="store_true", help="t-SNE instead of the two principal components")
    flag("--seed", type=number(int, 0, 2**32), default=0, help="of t-SNE (0)")
    flag("-o", dest="out", required=True, metavar="FILE.png", help="picture to write")
    flag = command("strip", run_strip, "draw an interpolation from A to B as a strip", decoding)
    flag("a", metavar="A")
    flag("b", metavar="B")
    flag("--steps", type=number(int, 2), default=7, metavar="N", help="texts, with both ends (7)")
    flag("-o", dest="out", required=True, metavar="FILE.png", help="picture to write")


def show(row, as_json):
    """A row as a line: JSON, or what is new in it, separated by tabs."""
    if as_json:
        return json.dumps(row, ensure_ascii=False)
    cells = []
    for key, value in row.items():
        if key != "text":
            cell = f"{value:.3f}" if isinstance(value, float) else str(value)
            cells.append(cell.translate(dict.fromkeys(b"\t\n\r", " ")))  # one line
    return "\t".join(cells)


def load_vae(folder):
    """The T5VAE of a folder or a hub name. InputError if it has no latent, or no tokenizer."""
    model = T5VAE.from_pretrained(folder)
    if model.tokenizer is None:
        raise InputError(f"{folder} holds a model without a tokenizer")
    if model.latent_dim == 0:
        raise InputError(f"{folder} is a language model; it must be a VAE")
    return model.eval()


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    logging.set_verbosity_error()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as what it reads
    with warnings.catch_warnings(), data.command("latent.py"):
        warnings.showwarning = lambda message, *_: print(f"latent.py: {message}", file=sys.stderr)
        model = load_vae(args.model).to(args.device)
        torch.manual_seed(getattr(args, "seed", 0))
        for row in args.run(model, args):
            print(show(row, args.json))
        sys.stdout.flush()  # a closed pipe is found here


if __name__ == "__main__":
    main()
