"""Did it work? The measures of a text VAE: rec, KL, -ELBO, NLL, PPL, MI, AU, and what z is good for.

Estimators are functions of tensors; `evaluate` is the one place where a split becomes numbers, and
`python metrics.py RUN ...` prints those of runs. Likelihoods are in nats, summed over a sentence's tokens (</s>
included) and averaged over sentences. Noise is drawn per sentence, so no number depends on the batch size.
"""

import argparse
import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed

import data
from vae import T5VAE

HALF = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # --amp: precision of matrix products


def processes():
    """(rank, world): the number of this process and how many there are, (0, 1) without torchrun."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, in place."""
    if processes()[1] > 1:
        distributed.all_reduce(tensor)
    return tensor


def kl_divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each latent dimension: (..., Z) -> (..., Z), nats, >= 0."""
    return 0.5 * (mu**2 + logvar.exp() - logvar - 1)


def log_normal(z, mu, logvar):
    """log N(z; mu, exp(logvar)), summed over the dimensions: (..., Z) -> (...), nats."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp()).sum(-1)


def mutual_information(mu, logvar, z, chunk=256):
    """I(x; z) under q, with q(z) the mixture of the posteriors given: E[log q(z|x)] - E[log q(z)], a scalar, nats.

    Hoffman & Johnson 2016, estimated with one z per sentence as in He et al. 2019. It cannot exceed ln n, whatever
    the posteriors: never report it without n. Both terms are taken at the same z (He et al. take the first in closed
    form): their noise cancels, and the ceiling holds for the estimate itself, not only for its mean.

    mu, logvar, z: (n, Z), the posteriors of a whole split and a sample of each. Memory is O(chunk * n).
    """
    mu, logvar = mu.double(), logvar.double()
    # -2 log q(z_i|x_j) = sum over dimensions of (z_i - mu_j)^2 / var_j + logvar_j + ln 2 pi: two matrix products.
    precision = (-logvar).exp()  # (n, Z)
    factors = torch.cat([precision, -2 * mu * precision], 1).T  # (2Z, n)
    constant = (mu**2 * precision + logvar + math.log(2 * math.pi)).sum(1)  # (n,)
    log_q_z = 0.0
    for rows in z.double().split(chunk):
        distance = torch.addmm(constant, torch.cat([rows**2, rows], 1), factors)  # (chunk, n)
        log_q_z += torch.logsumexp(distance.mul_(-0.5), 1).sum()
    return log_normal(z.double(), mu, logvar).mean() - (log_q_z / len(mu) - math.log(len(mu)))


def active_units(mu, threshold=0.01):
    """How many dimensions of mu (n, Z) have an unbiased variance above `threshold` over a split (Burda et al. 2016)."""
    return int((mu.double().var(0) > threshold).sum()) if len(mu) > 1 and mu.numel() else 0


@torch.no_grad()
def sample_posterior(model, batch, num_samples, seed=0, posterior=None):
    """What K samples z ~ q(z|x) say about each sentence, from one run of the encoder and K of the decoder.

    The importance-weighted NLL is -log of the mean over K of p(x|z) p(z) / q(z|x) (Burda et al. 2016, eq. 8): an upper
    bound of -log p(x), which on average falls with K towards it. Noise depends on (seed, batch.index) alone.

    Args:
        num_samples: K, at least 1.
        posterior: (model, batch) -> (mu, logvar), (B, Z) each; the encoder's unless given.
    Returns: mu, logvar and the first z: (B, Z); rec, the mean over K, and the importance-weighted NLL: (B,), nats.
    """
    mu, logvar = posterior(model, batch) if posterior else model.encode(batch.ids, batch.mask)
    noise = data.latent_noise(mu.shape[1], seed, 0, batch.index, data.POSTERIOR)
    zero, recs, log_weights, first = torch.zeros_like(mu), [], [], None
    for _ in range(num_samples):
        z = model.reparameterize(mu, logvar, eps=next(noise).to(mu))
        first = z if first is None else first
        recs.append(model.rec(z, batch.labels).double())
        log_weights.append(log_normal(z, zero, zero) - log_normal(z, mu, logvar) - recs[-1])
    nll = math.log(num_samples) - torch.stack(log_weights).logsumexp(0)
    return mu, logvar, first, torch.stack(recs).mean(0), nll


def fill(columns, corpus, device, batch_size, measure):
    """Fill `columns`, {name: (n, ...) zeros on the CPU}, a row per sentence, with what `measure(batch)` returns.

    Processes share the batches. Values are copied from the device after the last batch, so no batch waits for a copy.
    """
    rank, world = processes()
    batches = itertools.islice(data.evaluation_batches(corpus, batch_size), rank, None, world)
    found = [(batch.index, measure(batch.to(device))) for batch in batches]
    for index, values in found:
        for name, column in columns.items():
            column[index] = values[name].to(column)
    for column in columns.values():  # zero where another process has the sentence
        sum_over_processes(column)


@torch.no_grad()
def evaluate(model, corpus, batch_size=64, iw_samples=0, thorough=False, posterior=None, amp="off", seed=0):
    """The measures of a model on a split, without deletion and without threshold, as a flat dict for JSON.

    Args:
        model: a T5VAE. It is left in the mode it was in; no global random state is read or advanced.
        iw_samples: K of the importance-weighted NLL. 0: without it, from one encoder and one decoder pass;
            otherwise rec (and with it -ELBO) is the mean over the same K samples.
        thorough: also rec with other latents, and the greedy reconstruction.
        posterior: see `sample_posterior`.
        amp: precision of matrix products, a key of HALF.
    Returns: means over sentences, each with its standard error under `<name>_se`; ratios; and the counts they rest on.
    """
    training, device, n, latent_dim = model.training, model.device, len(corpus), model.latent_dim
    samples = max(1, iw_samples) if latent_dim else 1  # without a latent all samples are one
    names = ("rec", "kl", "nll_iw") if iw_samples else ("rec", "kl")
    columns = {name: torch.zeros(n, dtype=torch.float64) for name in names}
    latents = {name: torch.zeros(n, latent_dim) for name in ("mu", "logvar", "z")}

    def measure(batch):
        mu, logvar, z, rec, nll_iw = sample_posterior(model, batch, samples, seed, posterior)
        kl = kl_divergence(mu.double(), logvar.double()).sum(1)
        return {"mu": mu, "logvar": logvar, "z": z, "rec": rec, "kl": kl, "nll_iw": nll_iw}

    model.eval()
    with torch.autocast(device.type, HALF[amp], enabled=amp != "off"):
        fill(columns | latents, corpus, device, batch_size, measure)
        if thorough:
            columns |= other_latents(model, corpus, batch_size, seed, latents["mu"], latents["z"])
    model.train(training)
    return summarize(columns, int(corpus.offsets[-1]), int(corpus.words.sum())) | {
        "mi": mutual_information(**latents).item(),
        "mi_n": n,
        "au": active_units(latents["mu"]),
        "latent_dim": latent_dim,
        "iw_samples": iw_samples,
        "unk_share": float((corpus.ids == corpus.unk_id).mean()),
        "entropy": corpus.entropy,
    }


def other_latents(model, corpus, batch_size, seed, mu, z):
    """rec of each sentence given another's z and given the prior's, and its greedy reconstruction from the mean.

    mu, z: (n, Z) posterior means and samples of the corpus, on the CPU. Returns columns (n,): rec_other and rec_prior,
    nats; hits, tokens that are right in their place; exact_match, 100 where all are.
    """
    n = len(corpus)
    # One cycle through all sentences in random order: everybody gets somebody else's z.
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    z_other = torch.empty_like(z)
    z_other[order] = z[order.roll(1)]

    def measure(batch):
        labels, length = batch.labels, batch.labels.shape[1]
        z_prior = next(data.latent_noise(z.shape[1], seed, 0, batch.index, data.PRIOR))
        recs = [model.rec(given.to(labels.device), labels) for given in (z_other[batch.index], z_prior)]
        ids = model.generate(mu[batch.index].to(labels.device), max_new_tokens=length)[:, 1:]  # no start token
        ids = F.pad(ids, (0, length - ids.shape[1]), value=corpus.pad_id)
        real = labels != corpus.pad_id
        hits = ((ids == labels) & real).sum(1)
        return {"rec_other": recs[0], "rec_prior": recs[1], "hits": hits, "exact_match": 100 * (hits == real.sum(1))}

    columns = {name: torch.zeros(n, dtype=torch.float64) for name in ("rec_other", "rec_prior", "hits", "exact_match")}
    fill(columns, corpus, model.device, batch_size, measure)
    return columns


def summarize(columns, tokens, words):
    """Columns of one value per sentence -> means, their standard errors, and the ratios, each divided once."""
    columns = {"rec": 0, "kl": 0, "neg_elbo": columns["rec"] + columns["kl"]} | columns  # in this order
    hits, nll = columns.pop("hits", None), columns.get("nll_iw")
    if nll is not None:
        columns["gain"] = nll - columns["rec"]
    n, result = len(columns["rec"]), {}
    for name, values in columns.items():
        result[name] = values.mean().item()
        result[name + "_se"] = (values.std() / math.sqrt(n)).item() if n > 1 else None
    if nll is not None:
        result["efficiency"] = result["gain"] / result["kl"] if result["kl"] > 0 else None
    if hits is not None:
        result["token_accuracy"] = 100 * hits.sum().item() / tokens
    for bound, suffix in (columns["neg_elbo"], ""), (nll, "_iw"):
        for unit, count in ("token", tokens), ("word", words):
            if bound is not None:
                result[f"ppl_{unit}{suffix}"] = math.exp(min(700, bound.sum().item() / count))  # floats end at e^709
    return result | {"sentences": n, "tokens": tokens, "words": words}


def cell(measured, key):
    """One number of `evaluate`'s dict, with its ±: counts whole, huge numbers as powers of ten, none as a dash."""
    value, error = measured.get(key), measured.get(key + "_se")
    if value is None or isinstance(value, int):
        return "-" if value is None else f"{value:,}"
    return (f"{value:z.2f}" if abs(value) < 1e6 else f"{value:.1e}") + ("" if error is None else f"±{error:.2f}")


def format_table(runs, spread="standard error of the mean over sentences"):
    """{name: measures} -> text: a row per measure, called as in metrics.json, and a column per run."""
    keys = dict.fromkeys(key for measured in runs.values() for key in measured if not key.endswith("_se"))
    rows = [["", *runs], *([key, *(cell(measured, key) for measured in runs.values())] for key in keys)]
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))  # widths
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
    return "\n".join([*lines, f"Likelihoods, KL and MI in nats, per sentence; ±: {spread}."])


def verdict(measured, target=0.0, lm_nll=None):
    """One line: is z used, what does that cost against a language model's NLL, and is the KL the `target`?"""
    if measured["latent_dim"] == 0 or "rec_other" not in measured:
        return f"rec {measured['rec']:.2f} nats per sentence"
    loss, nll = measured["rec_other"] - measured["rec"], measured.get("nll_iw")
    said = f"z is {'used' if loss > 1 else 'ignored'}: with another sentence's z, rec is {loss:.1f} nats higher"
    if nll is not None:
        said += f"; of {measured['kl']:.1f} nats of KL, {measured['gain']:.1f} explain the text"
        said += f"; NLL {nll:.2f}, the language model's {lm_nll:.2f}" if lm_nll else ""
        met = "met" if target and abs(measured["kl"] / target - 1) <= 0.1 else "MISSED by more than 10 %"
        said += f"; KL target {target:g}: {met} ({measured['kl']:.2f})" if target else ""
    return said


def load_run(run, device="cpu"):
    """(config, model, read) of a run folder; read(split) is a `Corpus` of its data. Raises OSError, ValueError."""
    config = json.loads(Path(run, "config.json").read_text())
    model = T5VAE.from_pretrained(run).to(device).requires_grad_(False)
    where = {"data_dir": config["data_dir"], "max_length": config["max_length"]}
    return config, model, partial(data.load_corpus, config["dataset"], tokenizer=model.tokenizer, **where)


def evaluate_run(run, iw_samples=None, device="cpu", **settings):
    """The measures of a run folder's model on its test split; iw_samples None: 100, for phase 1 none (see train.py)."""
    config, model, read = load_run(run, device)
    samples = iw_samples if iw_samples is not None else 100 * (config["phase"] == 2)
    return evaluate(model, read("test"), iw_samples=samples, thorough=True, **settings)


def at_least(low, kind=int, below=math.inf):
    """An argparse type: a number of `kind` in [low, below)."""

    def number(text):
        if low <= (value := kind(text)) < below:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {below})")

    return number


def main(argv=None):
    parser = argparse.ArgumentParser(description="Evaluate runs on their test split and print one table.")
    flag = parser.add_argument
    flag("runs", nargs="+", metavar="RUN", help="run folder of train.py")
    flag("--iw-samples", type=at_least(1), metavar="K", help="importance samples per sentence (100; phase 1: none)")
    devices = ("cuda", "cpu")[not torch.cuda.is_available() :]
    flag("--device", choices=devices, default=devices[0], help="where to compute (a GPU, if any)")
    flag("--amp", choices=HALF, default="off", help="precision of matrix products (off: float32)")
    flag("--lm", metavar="RUN", help="run of a language model to compare with (lm beside the run, if there is one)")
    args, results, verdicts = parser.parse_args(argv), {}, []
    for run in args.runs:
        try:
            results[run] = evaluate_run(run, args.iw_samples, args.device, amp=args.amp)
            Path(run, "metrics.json").write_text(json.dumps(results[run], indent=2) + "\n")
            lm = Path(args.lm or Path(run).parent / "lm", "metrics.json")
            nll = json.loads(lm.read_text())["rec"] if args.lm or lm.is_file() else None
            target = json.loads(Path(run, "config.json").read_text()).get("kl_target")
            verdicts.append(f"{run}: {verdict(results[run], target, nll)}")
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"metrics.py: cannot use {run}: {error}")
    print(format_table(results), *verdicts, sep="\n")


if __name__ == "__main__":
    main()
