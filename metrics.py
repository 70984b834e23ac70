"""Did it work? The measures of a text VAE: rec, KL, -ELBO, NLL, PPL, MI, AU, and what z is good for.

Estimators are functions of tensors; `evaluate` is the one place where a split becomes numbers. Likelihoods are in
nats, summed over a sentence's tokens (</s> included) and averaged over sentences; sums and counts are kept apart
and divided once. Everything random is drawn per sentence, so no number depends on the batch size.
"""

import argparse
import itertools
import json
import math
import signal
import statistics
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import distributed

import data


def processes():
    """(rank, world): the number of this process and how many there are, (0, 1) without torchrun."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def share(batches):
    """This process's part of the batches of an evaluation."""
    rank, world = processes()
    return itertools.islice(batches, rank, None, world)


def add_up(tensor):
    """The sum of a tensor over the processes, in place."""
    if processes()[1] > 1:
        distributed.all_reduce(tensor)
    return tensor


def kl_divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each latent dimension: (..., Z) -> (..., Z), nats, >= 0."""
    return 0.5 * (mu**2 + logvar.exp() - logvar - 1)


def log_normal(z, mu=None, logvar=None):
    """log N(z; mu, exp(logvar)), summed over the dimensions: (..., Z) -> (...), nats. N(0, I) by default."""
    mu = torch.zeros_like(z) if mu is None else mu
    logvar = torch.zeros_like(z) if logvar is None else logvar
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp()).sum(-1)


def mutual_information(mu, logvar, generator=None, z=None, chunk=256):
    """I(x; z) under q, with q(z) the mixture of the posteriors given: E[log q(z|x)] - E[log q(z)], a scalar, nats.

    Hoffman & Johnson 2016; as in He et al. 2019, with one z a sentence. It cannot exceed ln n, whatever the
    posteriors: never report it without n. Both terms are taken at the same z (He et al. take the first in closed
    form): their noise cancels, and the ceiling holds for the estimate, not only for its mean.

    Args:
        mu, logvar: (n, Z) of a whole split.
        z: (n, Z) samples of the posteriors; drawn with `generator` if not given.
        chunk: rows of the n x n densities held at a time: memory is O(chunk * n).
    """
    mu, logvar = mu.double(), logvar.double()
    if z is None:
        z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
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
    """How many dimensions of the posterior mean vary (with n - 1) by more than `threshold` over a split (n, Z)."""
    return int((mu.double().var(0) > threshold).sum()) if len(mu) > 1 and mu.numel() else 0


@torch.enable_grad()
def refine_posterior(model, batch, mu, logvar, steps, seed=0):
    """mu and logvar, (B, Z) each, after gradient descent on each sentence's own -ELBO, the decoder as it is.

    What this takes from the gap between -ELBO and NLL was the encoder's fault, what it leaves is that of a diagonal
    Gaussian (Cremer et al. 2018). `steps` of Adam with eps and -eps; the learning rate falls from 0.03 to 0.
    """
    mu, logvar = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    optimizer = torch.optim.Adam([mu, logvar])
    noise = data.latent_noise(mu.shape[1], seed, 0, batch.index, data.REFINEMENT)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        eps = next(noise).to(mu)
        recs = [model.rec(model.reparameterize(mu, logvar, eps=e), batch.labels) for e in (eps, -eps)]
        neg_elbo = sum(recs) / 2 + kl_divergence(mu, logvar).sum(1)  # (B,)
        mu.grad, logvar.grad = torch.autograd.grad(neg_elbo.sum(), (mu, logvar))
        optimizer.step()
    return mu.detach(), logvar.detach()


@torch.no_grad()
def sample_posterior(model, batch, num_samples, seed=0, refine=0):
    """What K samples z ~ q(z|x) say of each sentence, from one run of the encoder and K of the decoder.

    Memory does not depend on K. A sentence's noise depends on (seed, batch.index) alone. `refine` is the steps of
    `refine_posterior`; 0: q is the encoder's.
    Returns: mu, logvar and the first z: (B, Z); rec, the mean over K, and the importance-weighted NLL: (B,), nats.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    mu, logvar = model.encode(batch.ids, batch.mask)
    if refine and model.latent_dim:
        mu, logvar = refine_posterior(model, batch, mu, logvar, refine, seed)
    noise = data.latent_noise(mu.shape[1], seed, 0, batch.index, data.POSTERIOR)
    rec_sum = torch.zeros(len(mu), dtype=torch.float64, device=mu.device)
    log_sum = torch.full_like(rec_sum, -torch.inf)  # log of the sum of the weights p(x|z) p(z) / q(z|x)
    first = None
    for _ in range(num_samples):
        z = model.reparameterize(mu, logvar, eps=next(noise).to(mu))
        first = z if first is None else first
        rec = model.rec(z, batch.labels).double()
        rec_sum += rec
        log_sum = torch.logaddexp(log_sum, log_normal(z) - log_normal(z, mu, logvar) - rec)
    return mu, logvar, first, rec_sum / num_samples, math.log(num_samples) - log_sum


def importance_weighted_nll(model, batch, num_samples, seed=0):
    """-log p(x), bounded from above by K importance-weighted samples (Burda et al. 2016, eq. 8): (B,), nats.

    -log of the mean over K of p(x|z) p(z) / q(z|x). K = 1 is -ELBO with one sample; on average it falls with K towards
    the truth. One run of the encoder, K of the decoder; memory does not depend on K.
    """
    return sample_posterior(model, batch, num_samples, seed)[-1]


# ---------------------------------------------------------------------------------------- a split


@torch.no_grad()
def evaluate(model, corpus, batch_size=64, iw_samples=0, thorough=False, seed=0, entropy=None, refine=0):
    """The measures of a model on a split, without deletion and without threshold, as a flat dict for JSON.

    Args:
        model: a T5VAE. It is left in the mode it was in; no global random state is read or advanced.
        corpus: a `data.Corpus`.
        iw_samples: K of the importance-weighted NLL. 0: without it, from one encoder and one decoder pass;
            otherwise rec (and with it -ELBO) is the mean over the same K samples.
        thorough: also rec with other latents, and the greedy reconstruction.
        entropy: of the data's distribution, nats a sentence, where it is known.
        refine: steps of `refine_posterior`, so that no measure is limited by the encoder; 0: as it encodes.
    Returns: means over sentences, each with its standard error under `<name>_se`; ratios; and the counts they rest on.
    """
    training, device = model.training, model.w_mu.weight.device
    model.eval()
    n, latent_dim = len(corpus), model.latent_dim
    columns = {name: torch.zeros(n, dtype=torch.float64) for name in ("rec", "kl", "nll_iw")}  # a row a sentence
    mu_all, logvar_all, z_all = (torch.zeros(n, latent_dim) for _ in range(3))
    samples = max(1, iw_samples) if latent_dim else 1  # without a latent all samples are one
    for batch in share(data.evaluation_batches(corpus, batch_size)):
        mu, logvar, z, rec, nll_iw = sample_posterior(model, batch.to(device), samples, seed, refine)
        kl = kl_divergence(mu.double(), logvar.double()).sum(1)
        for column, values in zip(columns.values(), (rec, kl, nll_iw), strict=True):
            column[batch.index] = values.cpu()
        for whole, values in (mu_all, mu), (logvar_all, logvar), (z_all, z):
            whole[batch.index] = values.float().cpu()
    for rows in (*columns.values(), mu_all, logvar_all, z_all):  # zero where another process has the sentence
        add_up(rows)
    if not iw_samples:
        del columns["nll_iw"]
    if thorough:
        columns |= other_latents(model, corpus, batch_size, seed, mu_all, z_all)
    model.train(training)

    tokens, unk_tokens = int(corpus.offsets[-1]), int((corpus.ids == corpus.unk_id).sum())
    return summarize(columns, tokens, int(corpus.words.sum())) | {
        "mi": mutual_information(mu_all, logvar_all, z=z_all).item(),
        "mi_n": n,
        "au": active_units(mu_all),
        "latent_dim": latent_dim,
        "iw_samples": iw_samples,
        "refine": refine,
        "sentences": n,
        "tokens": tokens,
        "words": int(corpus.words.sum()),
        "unk_tokens": unk_tokens,
        "unk_share": unk_tokens / tokens,
        "entropy": entropy,
    }


def other_latents(model, corpus, batch_size, seed, mu, z):
    """rec of each sentence given another's z and given the prior's, and its greedy reconstruction from the mean.

    Args:
        mu, z: (n, Z) posterior means and samples of the whole corpus.
    Returns: columns (n,): rec_other (with two sentences or more), rec_prior: nats; hits: tokens right in their
        place; exact: 1 where all are.
    """
    n, device = len(corpus), model.w_mu.weight.device
    # One cycle through all sentences in random order: everybody gets somebody else's z.
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    z_other = torch.empty_like(z)
    z_other[order] = z[order.roll(1)]
    columns = {name: torch.zeros(n, dtype=torch.float64) for name in ("rec_other", "rec_prior", "hits", "exact")}
    for batch in share(data.evaluation_batches(corpus, batch_size)):
        index, labels = batch.index, batch.labels.to(device)
        z_prior = next(data.latent_noise(z.shape[1], seed, 0, index, data.PRIOR))
        columns["rec_other"][index] = model.rec(z_other[index].to(device), labels).double().cpu()
        columns["rec_prior"][index] = model.rec(z_prior.to(device), labels).double().cpu()
        length, real = labels.shape[1], labels != corpus.pad_id
        ids = model.generate(mu[index].to(device), max_new_tokens=length)[:, 1:]  # the start token goes
        ids = torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=corpus.pad_id)
        hits = ((ids == labels) & real).sum(1)
        columns["hits"][index] = hits.double().cpu()
        columns["exact"][index] = (hits == real.sum(1)).double().cpu()
    for column in columns.values():
        add_up(column)
    if n == 1:
        del columns["rec_other"]
    return columns


def summarize(columns, tokens, words):
    """Columns of a value a sentence -> means, their standard errors, and the ratios, each divided once."""
    columns, result = dict(columns), {}
    columns["neg_elbo"] = columns["rec"] + columns["kl"]
    hits = columns.pop("hits", None)
    if "nll_iw" in columns:
        columns["gain"] = columns["nll_iw"] - columns["rec"]
    if "exact" in columns:
        columns["exact_match"] = 100 * columns.pop("exact")
    for name, values in columns.items():
        n = len(values)
        result[name] = values.mean().item()
        result[name + "_se"] = (values.std() / math.sqrt(n)).item() if n > 1 else None
    for bound, suffix in ("neg_elbo", ""), ("nll_iw", "_iw"):
        if bound in columns:
            total = columns[bound].sum().item()
            result["ppl_token" + suffix] = math.exp(min(700, total / tokens))  # e^709 is the largest float
            result["ppl_word" + suffix] = math.exp(min(700, total / words))
    if "gain" in columns:
        result["efficiency"] = result["gain"] / result["kl"] if result["kl"] > 0 else None
    if hits is not None:
        result["token_accuracy"] = 100 * hits.sum().item() / tokens
    return result


# ---------------------------------------------------------------------------------------- tables

BLOCKS = (  # heading: key of metrics.json
    {"rec": "rec", "KL": "kl", "-ELBO": "neg_elbo", "NLL (IW-K)": "nll_iw", "K": "iw_samples"}
    | {"entropy": "entropy", "sentences": "sentences"},
    {"PPL/token, -ELBO": "ppl_token", "PPL/token, NLL": "ppl_token_iw", "tokens": "tokens", "unk %": "unk_share"}
    | {"PPL/word, -ELBO": "ppl_word", "PPL/word, NLL": "ppl_word_iw", "words": "words"},
    {"gain": "gain", "efficiency": "efficiency", "rec, other z": "rec_other", "rec, prior z": "rec_prior", "MI": "mi"}
    | {"n": "mi_n", "AU": "au", "exact %": "exact_match", "token %": "token_accuracy"},
)


def number(value, digits=2):
    """A cell: counts whole, others with `digits`, huge ones as powers of ten, a missing one as a dash."""
    if value is None or isinstance(value, int):
        return "-" if value is None else f"{value:,}"
    return f"{value:z.{digits}f}" if abs(value) < 1e6 else f"{value:.1e}"


def cell(measured, key):
    """One number of `evaluate`'s dict, with its ± and, for AU, the dimensions that there are."""
    scale = 100 if key == "unk_share" else 1  # the one share that is not kept in %
    value, spread = measured.get(key), measured.get(key + "_se")
    if value is None:
        return "-"
    text = number(scale * value) + (f"±{number(scale * spread)}" if spread is not None else "")
    return f"{text}/{measured['latent_dim']}" if key == "au" else text


def align(rows):
    """Rows of cells -> text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        row[0].ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def format_table(runs, spread="standard error of the mean over sentences"):
    """{name: metrics} -> text, in three blocks with a row a run; a column that no run fills is left out."""
    blocks = []
    for block in BLOCKS:
        heads = [head for head, key in block.items() if any(m.get(key) is not None for m in runs.values())]
        rows = [["run", *heads]]
        for name, measured in runs.items():
            label = name + " (LM)" * (measured.get("latent_dim") == 0)
            rows.append([label, *(cell(measured, block[head]) for head in heads)])
        blocks.append(align(rows))
    return "\n\n".join(blocks) + f"\n\nNats a sentence; ±: {spread}; unk: tokens outside the vocabulary."


# Settings that no weight and no record depends on, but for rounding: they may change when a run goes on.
INCIDENTAL = ("argv", "command", "versions", "processes", "device", "out", "data_dir", "overwrite", "resume")
INCIDENTAL += ("save_every", "grad_accum", "eval_batch_size", "iw_samples", "benchmark")
NOT_THE_RECIPE = (*INCIDENTAL, "seed", "start", "init")


def seed_groups(configs, results):
    """{name: metrics} of the runs that differ in nothing but the seed: means, with the sample standard deviation
    over seeds as their ±. Counts that are the same in all stay counts."""
    groups, summaries = defaultdict(dict), {}
    for run, config in configs.items():
        recipe = {key: value for key, value in config.items() if key not in NOT_THE_RECIPE}
        groups[json.dumps(recipe, sort_keys=True)].setdefault(config["seed"], run)  # a seed counts once
    for runs in filter(lambda runs: len(runs) > 1, groups.values()):
        group, mean = [results[run] for run in runs.values()], {}
        for key in (key for key in group[0] if not key.endswith("_se")):
            values = [measured.get(key) for measured in group]
            if None in values or (isinstance(values[0], int) and len(set(values)) == 1):
                mean[key] = values[0] if len(set(values)) == 1 else None
            else:
                mean |= {key: statistics.fmean(values), key + "_se": statistics.stdev(values)}
        summaries[f"{len(runs)} seeds ({', '.join(map(str, runs))}) of {next(iter(runs.values()))}"] = mean
    return summaries


# ---------------------------------------------------------------------------------------- the paper's tables

# Tables 1 to 4 as they are printed: PPL, KL, "-ELBO", MI, AU. Two rows of PTB have a cell too few; its place is by
# their size: MI is the one missing. Words a test sentence, one end mark included: counted for PTB; 96 + 1 for Yelp.
PAPER_ROWS = (  # name, what its PPL is per
    (("Optimus (lambda 0.5)", "GPT-2 token"), ("GPT-2", "GPT-2 token"), ("Li et al. (lambda 3)", "word"))
    + (("Max pool", "T5 token"), ("Max pool + Denoise", "T5 token"), ("Max pool + Denoise + KLT", "T5 token"))
    + (("Max pool + Denoise + KLT + Deep", "T5 token"),)
)
PAPER = {  # data set: number of the table, words a sentence, rows
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
N: tokens (words, for Li et al.) a sentence, as PPL = exp(-ELBO / N) implies them. A data set has one N. Taken at its
word, the column "-ELBO" gives each row of the paper another; read as rec - KL, it gives all rows the same, the true N
(with </s>; ptb without). So the true -ELBO is "-ELBO" + 2 KL. SNLI's Deep row has lost a minus: no other sign gives
its N. The baselines print a true -ELBO, but their PPL is of an importance-weighted NLL: their N is a little high.
rec of the 6-layer rows does not move while KL goes from 0 to 182 nats: z costs them much and gives nothing.
PPL of different units do not compare; nats a sentence do, and so does PPL/word = exp(true -ELBO / words a sentence).
The paper cuts texts at 256 tokens. Its MI is a mean over batches of 256 at most: it cannot exceed ln 256 = 5.55."""


def reread(dataset):
    """The rows of the paper's table for a data set, with what their printed digits imply, as a list of dicts.

    name, unit, and the printed ppl, kl, printed, mi, au (text); rec, n_printed, n, neg_elbo, ppl_word (None where
    nothing implies them).
    """
    _, words, text = PAPER[dataset]
    rows, true_n = [], None
    for (name, unit), line in zip(PAPER_ROWS, text.split("|"), strict=True):
        row = dict(zip(("ppl", "kl", "printed", "mi", "au"), line.split(), strict=True), name=name, unit=unit)
        row |= dict.fromkeys(("rec", "n_printed", "n", "neg_elbo", "ppl_word"))
        if row["printed"] != "-":
            nats, kl, printed = math.log(float(row["ppl"])), float(row["kl"]), float(row["printed"])
            row["n_printed"] = printed / nats
            row["neg_elbo"] = printed
            if unit == "T5 token":
                # The first row's KL is next to nothing: it has the true N, however its column is read.
                true_n = true_n or (printed + 2 * kl) / nats
                sign = min((1, -1), key=lambda s: abs((s * printed + 2 * kl) / nats - true_n))
                row["neg_elbo"] = sign * printed + 2 * kl
                row["n"] = row["neg_elbo"] / nats
            row["rec"] = row["neg_elbo"] - kl
            row["ppl_word"] = math.exp(row["neg_elbo"] / words)
        rows.append(row)
    return rows


def format_paper(datasets, runs, configs):
    """The paper's tables of `datasets`, and under each the runs on that data set."""
    tables = []
    for dataset in datasets:
        number_of_table, words, _ = PAPER[dataset]
        heads = [dataset, "PPL", "per", "KL", '"-ELBO"', "N", "MI", "AU", "true N", "rec", "true -ELBO", "PPL/word"]
        rows = [heads]
        for r in reread(dataset):
            derived = [number(r[key]) for key in ("n", "rec", "neg_elbo")] + [number(r["ppl_word"], 1)]
            printed = [r[key] for key in ("name", "ppl", "unit", "kl", "printed")]
            rows.append([*printed, number(r["n_printed"]), r["mi"], r["au"], *derived])
        for run in (run for run in runs if configs[run]["dataset"] == dataset):
            m = runs[run]
            row = [run, number(m["ppl_token"]), "T5 token", cell(m, "kl"), "-", "-", number(m["mi"]), str(m["au"])]
            row += [number(m["tokens"] / m["sentences"]), cell(m, "rec"), cell(m, "neg_elbo")]
            rows.append([*row, number(m["ppl_word"], 1)])
        tables.append(f"Table {number_of_table}, {dataset}: {words:g} words a sentence\n{align(rows)}")
    return "\n\n".join([*tables, PAPER_NOTE])


# ---------------------------------------------------------------------------------------- figures

PANELS = {"MI, nats": "mi", "AU": "au", "KL, nats a sentence": "kl", "PPL/word, of -ELBO": "ppl_word"}
NOT_IN_LABELS = {*NOT_THE_RECIPE, "data_sha256", "pool", "phases"} - {"seed"}  # "pooling" says it all


def run_labels(configs):
    """{run: what sets it apart from the others}: the settings that differ, and the run where they do not tell."""
    keys = dict.fromkeys(key for config in configs.values() for key in config if key not in NOT_IN_LABELS)
    differ = [key for key in keys if len({json.dumps(config.get(key)) for config in configs.values()}) > 1]
    labels = {run: ", ".join(f"{k} {c[k]}" for k in differ if c.get(k) is not None) for run, c in configs.items()}
    seen = list(labels.values())
    return {
        run: label if label and seen.count(label) == 1 else ", ".join(filter(None, (label, run)))
        for run, label in labels.items()
    }


def draw(logs):
    """A matplotlib Figure of {label: validation records}: a panel a measure, a line a run, against steps."""
    from matplotlib.figure import Figure

    wide = max(map(len, logs)) > 50
    figure = Figure(figsize=(10, 7 + 0.25 * len(logs) / (1 if wide else 2)), layout="constrained")
    for axes, (title, key) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for i, (label, records) in enumerate(logs.items()):
            # Thinner ones on top: lines that coincide still show, one around the other.
            width = 1.5 + 4 * (len(logs) - 1 - i) / len(logs)
            steps, values = ([record[k] for record in records] for k in ("step", key))
            axes.plot(steps, values, marker="o", markersize=width + 1.5, linewidth=width, label=label)
        axes.set(title=title, xlabel="step", ylim=panel_range(key, logs.values()))
        axes.grid(alpha=0.3)
        if key == "ppl_word" and axes.get_ylim()[1] > 1000:
            axes.set(yscale="log", ylim=(1, None))
    text = ["\n".join(textwrap.wrap(label, 110)) for label in logs]
    figure.legend(axes.get_lines(), text, loc="outside lower center", ncols=1 if wide else 2)
    return figure


def panel_range(key, logs):
    """The y-axis of a panel: from 0, or from 1 for PPL. KL and PPL of the first record count only if they leave
    the others legible: those of an untrained W_logvar can be a hundred times as large."""
    values = [record[key] for records in logs for record in (records[1:] or records)]
    limit = 3 * max(values) if key in ("kl", "ppl_word") else math.inf
    values += [records[0][key] for records in logs if records[0][key] <= limit]
    low, high = min(1 if key == "ppl_word" else 0, *values), max(values)
    return low - 0.03 * (high - low), high + 0.05 * (high - low) + 1e-3


# ---------------------------------------------------------------------------------------- what the latents mean


def linear_probe(mu, classes, test_mu, test_classes):
    """Accuracy of the least-squares linear classifier from mu to a class, and chance, both in % of the test rows.

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
    right = [(names[guess] == true, most == true) for guess, true in zip(guesses, test_classes, strict=True)]
    return tuple(100 * sum(column) / len(right) for column in zip(*right, strict=True))


@torch.no_grad()
def posterior_means(model, corpus, batch_size=64):
    """mu of each text of a corpus: (n, Z)."""
    mu = torch.zeros(len(corpus), model.latent_dim)
    for batch in data.evaluation_batches(corpus, batch_size):
        mu[batch.index] = model.encode(*batch.to(model.w_mu.weight.device)[:2])[0].cpu()
    return mu


def probe_grammar(model, corpora, batch_size=64, moved=200):
    """A row a factor: is it in mu, and does adding the difference of two values' mean mu change it and nothing else?

    Args:
        corpora: {"train": ..., "test": ...} of `grammar`, whole or their first texts.
        moved: test sentences decoded for each factor.
    Returns: dicts of factor; accuracy and chance of `linear_probe`, %; and of the sentences moved from its most
        frequent value to the next: those still grammatical, those that have the new value, and those that have it and
        every other factor as their reconstruction had it, all in %.
    """
    mu = {split: posterior_means(model, corpus, batch_size) for split, corpus in corpora.items()}
    true = {split: list(itertools.islice(data.grammar_factors(split), len(mu[split]))) for split in corpora}
    rows = []
    for factor in data.FACTORS:
        classes = {split: [factors[factor] for factors in true[split]] for split in corpora}
        accuracy, chance = linear_probe(mu["train"], classes["train"], mu["test"], classes["test"])
        (old, _), (new, _) = Counter(classes["train"]).most_common(2)
        means = [mu["train"][[c == value for c in classes["train"]]].mean(0) for value in (old, new)]
        start = mu["test"][[c == old for c in classes["test"]]][:moved]
        before, after = (
            list(map(data.grammar_parse, model.decode_texts(z, batch_size, max_new_tokens=40)))
            for z in (start, start + means[1] - means[0])
        )
        changed = [b is not None and b[factor] == new for b in after]
        alone = [
            yes and a is not None and a | {factor: new} == b for a, b, yes in zip(before, after, changed, strict=True)
        ]
        shares = [100 * sum(map(bool, column)) / max(1, len(start)) for column in (after, changed, alone)]
        columns = ("factor", "accuracy", "chance", "grammatical", "changed", "alone")
        rows.append(dict(zip(columns, (factor, accuracy, chance, *shares), strict=True)))
    return rows


# ---------------------------------------------------------------------------------------- command line


def open_run(run, config, args):
    """The model of a run folder, and (split, limit=None) -> `Corpus`, its data as it was trained on."""
    from vae import T5VAE

    model = T5VAE.from_pretrained(Path(run, "model")).to(args.device)
    shares = tuple(config.get("split", data.SHARES))

    def corpus(split, limit=None):
        rest = (model.tokenizer, config["data_dir"], config["max_length"], limit, shares)
        return data.load_corpus(config["dataset"], split, *rest)

    return model, corpus


def evaluate_run(run, config, args):
    """`evaluate` on the test split of a run folder; writes its metrics.json anew, or metrics-refined.json."""
    model, corpus = open_run(run, config, args)
    entropy = data.GRAMMAR_ENTROPY if config["dataset"] == "grammar" else None
    model.requires_grad_(False)  # else refinement would compute the LM head's gradient, too
    samples = args.iw_samples or 100
    result = evaluate(model, corpus("test"), args.batch_size, samples, True, entropy=entropy, refine=args.refine)
    path = Path(run, "metrics.json")
    if path.exists():  # what an evaluation cannot know
        result |= {k: v for k, v in json.loads(path.read_text()).items() if k == "train_seconds"}
    path = path.with_stem("metrics-refined") if args.refine else path
    path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def format_probe(run, config, args):
    """What `--probe` prints of a run: the factors of `grammar`, or the labels of a labelled data set."""
    model, corpus = open_run(run, config, args)
    corpora = {split: corpus(split, 10_000) for split in ("train", "test")}
    if config["dataset"] == "grammar":
        found = probe_grammar(model, corpora, args.batch_size)
        heads = ["factor", "probe %", "chance %", "moved: grammatical %", "new value %", "and no other change %"]
        return align([heads, *([row["factor"], *(f"{v:.1f}" for v in list(row.values())[1:])] for row in found)])
    if corpora["train"].labels is None:
        raise ValueError(f"{config['dataset']} has neither known factors nor labels to probe for")
    mu = {split: posterior_means(model, corpus, args.batch_size) for split, corpus in corpora.items()}
    labels = {split: corpus.labels.tolist() for split, corpus in corpora.items()}
    accuracy, chance = linear_probe(mu["train"], labels["train"], mu["test"], labels["test"])
    return align([["label", "probe %", "chance %"], ["", f"{accuracy:.1f}", f"{chance:.1f}"]])


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Evaluate runs on their test split and print one table.")
    flag = parser.add_argument
    flag("runs", nargs="*", metavar="RUN", help="run folder of train.py, phase 1 or 2")
    flag("--batch-size", type=int, default=64, metavar="N", help="sentences (64); no number depends on it")
    flag("--iw-samples", type=int, metavar="K", help="of the importance-weighted NLL (100)")
    text = "Adam steps on each sentence's mu and logvar first; writes metrics-refined.json (0)"
    flag("--refine", type=int, default=0, metavar="STEPS", help=text)
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag = parser.add_mutually_exclusive_group().add_argument
    text = "the paper's tables, re-read; RUNs go under theirs, from metrics.json but for --iw-samples or --refine"
    flag("--paper", action="store_true", help=text)
    flag("--probe", action="store_true", help="of each factor of grammar, or of the data set's labels; no evaluation")
    flag("--plot", metavar="PNG", help="draw MI, AU, KL and PPL on the validation split against steps; no evaluation")
    args = parser.parse_args(argv)
    if not args.runs and not args.paper:
        parser.error("name at least one RUN (only --paper goes without)")
    if args.batch_size < 1 or args.iw_samples is not None and args.iw_samples < 1:
        parser.error("--batch-size and --iw-samples must be at least 1")
    if args.refine < 0:
        parser.error(f"--refine is {args.refine}; it must be at least 0")
    return args


def main(argv=None):
    args = parse_args(argv)
    configs, results, logs = {}, {}, {}
    for run in args.runs:
        try:
            configs[run] = config = json.loads(Path(run, "config.json").read_text())
            if config["phase"] == 0:
                raise ValueError("a T5 of phase 0 is no VAE")
            if args.paper and config["dataset"] not in PAPER:
                raise ValueError(f"the paper has tables of {', '.join(PAPER)}, not of {config['dataset']}")
            stored = Path(run, "metrics.json")
            if args.probe:
                print(f"{run}\n{format_probe(run, config, args)}\n")
            elif args.plot:
                records = map(json.loads, Path(run, "log.jsonl").read_text().splitlines())
                logs[run] = [record for record in records if record["split"] == "valid"]
                if not logs[run]:
                    raise ValueError("its log.jsonl has no record of the validation split")
            elif args.paper and args.iw_samples is None and not args.refine and stored.exists():
                results[run] = json.loads(stored.read_text())
            else:
                results[run] = evaluate_run(run, config, args)
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"metrics.py: cannot use {run}: {error}")
    if args.plot:
        labels = run_labels(configs)
        try:
            draw({labels[run]: records for run, records in logs.items()}).savefig(args.plot, dpi=150)
        except (OSError, ValueError) as error:  # no such folder, no such format
            sys.exit(f"metrics.py: --plot {args.plot}: {error}")
        print(f"wrote {args.plot}")
    elif args.paper:
        used = {config["dataset"] for config in configs.values()} or PAPER
        print(format_paper([dataset for dataset in PAPER if dataset in used], results, configs))
    elif results:  # --probe has printed as it went
        print(format_table(results))
        if summaries := seed_groups(configs, results):
            print("\n" + format_table(summaries, "standard deviation over seeds"))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence
    main()
