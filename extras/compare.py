"""Is the difference of two runs more than noise? Paired differences over the same test sentences.

    python -m extras.compare A B

Prints B - A for the NLL and its two bounds, what z carries (kl_posterior), -ELBO of q and of the
untempered posterior, rec, KL and swap_cost, in nats per sentence, with the standard error of the
mean of the differences, and whether it is beyond two of them (see metrics.py for each). Both
runs are measured on the same texts, so most of what makes one sentence harder than another cancels:
the error is far smaller than that of the difference of two independent means.

nll is each run's tighter bound (see metrics.smaller_bound). If the two are not the same bound, look
at both: rec_prior favours a run that uses z little.

The values per sentence are those that train.py and metrics.py write to sentences.npz.
"""

import argparse
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

import data
import metrics

MEASURES = ("nll", "nll_iw", "rec_prior", "kl_posterior", "neg_elbo", "neg_elbo_untempered")
MEASURES += ("rec", "kl", "swap_cost")


def load(run):
    """(config.json, metrics.json, {name: (n,) nats}) of a run. Raises InputError."""
    config, measured = metrics.read_config(run), data.read_json(Path(run, "metrics.json"))
    if "iw_samples" not in measured:
        raise data.InputError(f"{run} is not finished: it has no metrics.json of a finished run")
    path = Path(run, "sentences.npz")
    if not path.is_file():
        raise data.InputError(f"{path} is missing: python metrics.py {run} --write writes it")
    try:
        with np.load(path) as values:
            columns = {name: torch.from_numpy(values[name]) for name in values.files}
        return config, measured, metrics.per_sentence(columns)
    except (EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile):
        raise data.InputError(f"{path} is damaged") from None


def compare(run_a, run_b):
    """{name: (mean of b - a, its standard error)} of the measures that two run folders have.

    Raises InputError if they cannot be compared.
    """
    (config_a, measured_a, a), (config_b, measured_b, b) = load(run_a), load(run_b)
    same_texts = config_a["data_sha256"]["test"] == config_b["data_sha256"]["test"]
    same_length = config_a["max_length"] == config_b["max_length"]
    same_words = measured_a["words"] == measured_b["words"]  # another tokenizer cuts elsewhere
    if not (same_texts and same_length and same_words and len(a["rec"]) == len(b["rec"])):
        raise data.InputError(f"{run_a} and {run_b} were measured on different texts")
    of_a, of_b = measured_a["iw_samples"], measured_b["iw_samples"]
    exact = 0 in (measured_a["latent_dim"], measured_b["latent_dim"])  # whatever K
    if "nll" in a and "nll" in b and of_a != of_b and not exact:  # without: the run of a phase 1
        what = f"{run_a} has {of_a}, {run_b} {of_b}"
        raise data.InputError(f"iw_samples of metrics.json must be the same: {what}")
    found = {}
    for name in MEASURES:
        if name in a and name in b:
            difference = b[name] - a[name]
            found[name] = difference.mean().item(), metrics.standard_error(difference)
    return found


def format_lines(found):
    yield f"{'':20}{'B - A':>12}{'s.e.':>8}  beyond two s.e.?"
    for name in MEASURES:
        if name not in found:
            yield f"{name:20}{'-':>12}"
            continue
        mean, error = found[name]
        if error is None:  # of a single text
            yield f"{name:20}{mean:>+12.3f}{'?':>8}  ?"
        else:
            beyond = "yes" if abs(mean) > 2 * error else "no"
            yield f"{name:20}{mean:>+12.3f}{error:>8.3f}  {beyond}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("a", metavar="A", help="finished run folder")
    parser.add_argument("b", metavar="B", help="another, measured on the same test texts")
    args = parser.parse_args(argv)
    with data.command("compare.py"):
        found = compare(args.a, args.b)
        print(f"A: {args.a}\nB: {args.b}", *format_lines(found), sep="\n")


if __name__ == "__main__":
    main()
