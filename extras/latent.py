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

RUN is a run folder, a model folder or a hub name. Decoding is greedy; --temperature, --top-k and
--top-p sample tokens, --num-beams searches, and --seed fixes all that is random. An empty line is
an empty text and keeps its place.
"""

import argparse
import io
import json
import os
import sys
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils import logging

from data import tokenize
from extras.flags import at_least, seed
from vae import T5VAE


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
    """The dimensions of z, most active first: those whose posterior mean varies most over texts:
    (Z,).

    The texts are n that the model itself writes from the prior, because a saved model comes without
    its data.
    """
    texts = model.decode_texts(torch.randn(n, model.latent_dim), max_new_tokens=64)
    return model.encode_texts(texts)[0].var(0).argsort(descending=True)


def read_lines(path):
    """The stripped lines of a UTF-8 file, "-" for standard input; bytes that are not UTF-8 become
    U+FFFD."""
    if path == "-":
        if sys.stdin is None:
            raise ValueError("there are no texts: standard input is closed")
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        return [line.strip() for line in sys.stdin]
    with open(path, encoding="utf-8", errors="replace") as lines:
        return [line.strip() for line in lines]


def read_group(path):
    """The lines of a file that are not empty, at least one."""
    if lines := [line for line in read_lines(path) if line]:
        return lines
    raise ValueError(f"{path} holds no text")


def read_texts(args):
    """The texts of a command: TEXT ... and --file, or standard input. An empty line is an empty
    text."""
    given = args.text or ([] if args.file else ["-"])
    texts = [line for text in given for line in (read_lines("-") if text == "-" else [text])]
    return texts + (read_lines(args.file) if args.file else [])


def encode(model, args, texts):
    # A command line that is not UTF-8 arrives with surrogates, which are no characters.
    texts = [
        text.strip().encode(errors="surrogateescape").decode(errors="replace") for text in texts
    ]
    t = model.tokenizer
    rows = tokenize(texts, t)
    unknown = sum(
        row.count(t.unk_token_id) > text.count(t.unk_token)
        for row, text in zip(rows, texts, strict=True)
    )
    if unknown:
        warnings.warn(
            f"{unknown} of {len(texts)} texts have characters outside the vocabulary", stacklevel=2
        )
    return model.encode_texts(texts, args.batch_size, args.max_length)


def decode(model, args, z):
    """Greedy decoding, or a search with beams, or sampling where an option of it is given."""
    kwargs = {"max_new_tokens": args.max_length, "num_beams": args.num_beams}
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    if any(value is not None for value in sampling.values()):
        given = {name: value for name, value in sampling.items() if value is not None}
        kwargs |= {"do_sample": True} | given
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
    return [
        {"output": output}
        for output in decode(model, args, interpolate(*mu, args.steps, args.spherical))
    ]


def run_arithmetic(model, args):
    source, target = (
        encode(model, args, read_group(path))[0].mean(0) for path in (args.source, args.target)
    )
    texts = read_texts(args)
    return pairs(
        texts, decode(model, args, encode(model, args, texts)[0] + args.k * (target - source))
    )


def run_neighbors(model, args):
    lines = read_group(args.lines)
    mu, _ = encode(model, args, [args.query, *lines])
    distance, index = (mu[1:] - mu[0]).norm(dim=1).sort(stable=True)
    nearest = list(zip(distance.tolist(), index.tolist(), strict=True))[: args.n]
    return [{"text": args.query, "distance": d, "output": lines[i]} for d, i in nearest]


def run_traverse(model, args):
    mu, _ = encode(model, args, [args.query])
    if wrong := [dim for dim in args.dim or [] if not 0 <= dim < model.latent_dim]:
        raise ValueError(f"--dim is {wrong[0]}; it must be in [0, {model.latent_dim})")
    dims = args.dim or active_dimensions(model)[:5].tolist()
    rows = [(dim, value) for dim in dims for value in torch.linspace(-3, 3, args.steps).tolist()]
    z = mu.repeat(len(rows), 1)
    for row, (dim, value) in zip(z, rows, strict=True):
        row[dim] = value
    outputs = decode(model, args, z)
    return [
        {"text": args.query, "dim": d, "value": v, "output": o}
        for (d, v), o in zip(rows, outputs, strict=True)
    ]


def run_encode(model, args):
    texts = read_lines(args.lines)
    mu, logvar = encode(model, args, texts)
    if args.out:
        with open(args.out, "wb") as file:
            np.savez(file, mu=mu.numpy(), logvar=logvar.numpy())
        return []
    args.json = True
    return [
        {"text": t, "mu": m, "logvar": v}
        for t, m, v in zip(texts, mu.tolist(), logvar.tolist(), strict=True)
    ]


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="latent.py",
        description="Use the latents of a T5-VAE. RUN: a run folder, a model folder or a hub name.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run, summary, texts=False, decodes=True):
        """A subcommand with the options that it shares; returns its `add_argument`."""
        name = run.__name__.removeprefix("run_")
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        flag = sub.add_argument
        flag("model", metavar="RUN")
        if texts:
            flag(
                "text",
                nargs="*",
                metavar="TEXT",
                help="A text; - or none: the lines of standard input.",
            )
            flag("--file", metavar="FILE", help="Texts, one per line.")
        flag("--json", action="store_true", help="Print one JSON object per line, with the input.")
        flag(
            "--batch-size", type=at_least(1), default=64, metavar="N", help="Texts at a time (64)."
        )
        flag(
            "--max-length",
            type=at_least(2),
            default=256,
            metavar="TOKENS",
            help="Longest text, </s> included (256).",
        )
        devices = ("cuda", "cpu")[not torch.cuda.is_available() :]
        flag("--device", choices=devices, default=devices[0], help="Where to compute.")
        if decodes:
            flag("--seed", type=seed, default=0, help="Seed of everything random (0).")
            flag(
                "--temperature",
                type=at_least(1e-3, float),
                metavar="T",
                help="Sample tokens, at temperature T.",
            )
            flag(
                "--top-k",
                type=at_least(1),
                metavar="K",
                help="Sample from the K most likely tokens.",
            )
            flag(
                "--top-p",
                type=at_least(1e-9, float, 1 + 1e-9),
                metavar="P",
                help="Sample from the top share P.",
            )
            flag(
                "--num-beams",
                type=at_least(1),
                default=1,
                metavar="N",
                help="Beams; 1 is greedy decoding (1).",
            )
        return flag

    flag = command(run_reconstruct, "Decode the posterior means of texts.", texts=True)
    flag(
        "--samples",
        type=at_least(1),
        metavar="N",
        help="Decode N samples of each posterior instead.",
    )
    flag = command(run_sample, "Decode samples of the prior, or of a Gaussian fitted to texts.")
    flag("-n", type=at_least(1), default=10, help="How many (10).")
    flag(
        "--like", metavar="FILE", help="Texts, one per line: fit the Gaussian to their posteriors."
    )
    flag = command(run_interpolate, "Decode latents between the posterior means of A and B.")
    flag("a", metavar="A")
    flag("b", metavar="B")
    flag(
        "--steps",
        type=at_least(2),
        default=7,
        metavar="N",
        help="Texts, the two ends included (7).",
    )
    flag("--spherical", action="store_true", help="Take an arc instead of a straight line.")
    flag = command(
        run_arithmetic, "Add the difference of two groups' mean latents to texts.", texts=True
    )
    flag(
        "--from",
        required=True,
        dest="source",
        metavar="FILE",
        help="Texts of the first group, one per line.",
    )
    flag("--to", required=True, dest="target", metavar="FILE", help="Texts of the second group.")
    step = at_least(-1e6, float, 1e6)
    flag("--k", type=step, default=1.0, help="Add the difference this many times (1).")
    flag = command(
        run_neighbors, "Print the lines of FILE nearest to TEXT, by posterior mean.", decodes=False
    )
    flag("lines", metavar="FILE", help="Texts, one per line; - is standard input.")
    flag("query", metavar="TEXT")
    flag("-n", type=at_least(1), default=10, help="How many (10).")
    flag = command(
        run_traverse, "Decode TEXT with one dimension of its posterior mean set from -3 to 3."
    )
    flag("query", metavar="TEXT")
    flag("--dim", type=int, nargs="+", metavar="I", help="Dimensions, from 0 (the 5 most active).")
    flag("--steps", type=at_least(2), default=7, metavar="N", help="Values (7).")
    flag = command(run_encode, "Write mu and logvar of the lines of FILE.", decodes=False)
    flag(
        "lines",
        nargs="?",
        default="-",
        metavar="FILE",
        help="Texts, one per line; - is standard input (-).",
    )
    flag("-o", dest="out", metavar="OUT.npz", help="Arrays mu and logvar (default: JSON lines).")
    if argv and argv[0] in commands.choices:  # intermixed: TEXT may stand after options too
        return commands.choices[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)


def show(row, as_json):
    """A row as a line: JSON, or what is new in it, separated by tabs."""
    if as_json:
        return json.dumps(row, ensure_ascii=False)
    cells = (
        f"{value:.3f}" if isinstance(value, float) else str(value)
        for key, value in row.items()
        if key != "text"
    )
    return "\t".join(
        cell.translate(dict.fromkeys(b"\t\n\r", " ")) for cell in cells
    )  # one line, whatever is in it


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    logging.set_verbosity_error()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as what it reads
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"latent.py: {message}", file=sys.stderr)
        try:
            model = T5VAE.from_pretrained(args.model).to(args.device)
            if model.tokenizer is None:
                raise ValueError(f"{args.model} holds a model without a tokenizer")
            if model.latent_dim == 0:
                raise ValueError(f"{args.model} is a language model; it must be a VAE")
            torch.manual_seed(getattr(args, "seed", 0))
            for row in args.run(model, args):
                print(show(row, args.json))
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, `head` say, has enough: end as by SIGPIPE
            # Nothing is left to flush at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except KeyboardInterrupt:
            sys.exit(130)
        except (OSError, ValueError) as error:
            sys.exit(f"latent.py: {error}")


if __name__ == "__main__":
    main()
