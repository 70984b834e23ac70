"""Did it work? The measures of a text VAE: rec, KL, -ELBO, NLL, PPL, MI, AU, and what z is good for.

Estimators are functions of tensors; `evaluate` is the one place where a split becomes numbers. Likelihoods are in
nats, summed over a sentence's tokens (</s> included) and averaged over sentences; sums and counts are kept apart
and divided once. Everything random is drawn per sentence, so no number depends on the batch size.
"""

import argparse
import itertools
import json
import math
import sys
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


def mutual_information(mu, logvar, generator=None, z=None, chunk=1024):
    """I(x; z) under q, with q(z) the mixture of the posteriors given: E[log q(z|x)] - E[log q(z)], a scalar, nats.

    Hoffman & Johnson 2016, estimated as by He et al. 2019: the first term in closed form, the second with one z
    a sentence. It cannot exceed ln n, whatever the posteriors: never report it without n.

    Args:
        mu, logvar: (n, Z) of a whole split.
        z: (n, Z) samples of the posteriors; drawn with `generator` if not given.
        chunk: rows of the n x n densities held at a time: memory is O(chunk * n).
    """
    mu, logvar = mu.double(), logvar.double()
    if z is None:
        z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
    neg_entropy = -0.5 * (math.log(2 * math.pi) + 1 + logvar).sum(1).mean()
    # -2 log q(z_i|x_j) = sum over dimensions of (z_i - mu_j)^2 / var_j + logvar_j + ln 2 pi: two matrix products.
    precision = (-logvar).exp()  # (n, Z)
    constant = (mu**2 * precision + logvar + math.log(2 * math.pi)).sum(1)  # (n,)
    log_q_z = 0.0
    for rows in z.double().split(chunk):
        distance = rows**2 @ precision.T - 2 * rows @ (mu * precision).T + constant  # (chunk, n)
        log_q_z += torch.logsumexp(-0.5 * distance, 1).sum()
    return neg_entropy - (log_q_z / len(mu) - math.log(len(mu)))


def active_units(mu, threshold=0.01):
    """How many dimensions of the posterior mean vary (with n - 1) by more than `threshold` over a split (n, Z)."""
    return int((mu.double().var(0) > threshold).sum()) if len(mu) > 1 else 0


def posterior_samples(model, mu, logvar, labels, noise, num_samples):
    """Yields, for each of `num_samples` draws z ~ q(z|x): z (B, Z), rec (B,) and log p(x, z) / q(z|x) (B,)."""
    for _, eps in zip(range(num_samples), noise, strict=False):
        z = model.reparameterize(mu, logvar, eps=eps.to(mu))
        rec = model.rec(z, labels)
        yield z, rec, log_normal(z) - log_normal(z, mu, logvar) - rec


@torch.no_grad()
def importance_weighted_nll(model, batch, num_samples, seed=0):
    """-log p(x), bounded from above by K importance-weighted samples (Burda et al. 2016, eq. 8): (B,), nats.

    -log of the mean over K of p(x|z) p(z) / q(z|x). K = 1 is -ELBO with one sample; on average it falls with K towards
    the truth. One run of the encoder, K of the decoder; memory does not depend on K.
    """
    mu, logvar = model.encode(batch.ids, batch.mask)
    noise = data.latent_noise(mu.shape[1], seed, 0, batch.index, data.POSTERIOR)
    total = torch.full((len(mu),), -torch.inf, device=mu.device)
    for _, _, log_weight in posterior_samples(model, mu, logvar, batch.labels, noise, num_samples):
        total = torch.logaddexp(total, log_weight)
    return math.log(num_samples) - total


@torch.no_grad()
def evaluate(model, corpus, batch_size=64, iw_samples=0, thorough=False, seed=0, entropy=None):
    """The measures of a model on a split, without deletion and without threshold, as a flat dict for JSON.

    Args:
        model: a T5VAE. It is left in the mode it was in; no global random state is read or advanced.
        corpus: a `data.Corpus`.
        iw_samples: K of the importance-weighted NLL. 0: without it, from one encoder and one decoder pass;
            otherwise rec (and with it -ELBO) is the mean over the same K samples.
        thorough: also rec with other latents, and the greedy reconstruction.
        entropy: of the data's distribution, nats a sentence, where it is known.
    """
    training, device = model.training, model.w_mu.weight.device
    model.eval()
    n, latent_dim = len(corpus), model.latent_dim
    names = ("rec", "kl", "nll_iw", "rec_other", "rec_prior", "hits", "exact")
    table = {name: torch.zeros(n, dtype=torch.float64) for name in names}  # a column a measure, a row a sentence
    mu_all, logvar_all, z_all = (torch.zeros(n, latent_dim) for _ in range(3))

    def put(name, index, values):
        table[name][index.cpu()] = values.double().cpu()

    for batch in share(data.evaluation_batches(corpus, batch_size)):
        batch = batch.to(device)
        mu, logvar = model.encode(batch.ids, batch.mask)
        noise = data.latent_noise(latent_dim, seed, 0, batch.index, data.POSTERIOR)
        samples, rec_sum = max(1, iw_samples), 0.0
        log_sum = torch.full((len(mu),), -torch.inf, device=device)
        for k, (z, rec, log_weight) in enumerate(posterior_samples(model, mu, logvar, batch.labels, noise, samples)):
            if k == 0:
                z_all[batch.index.cpu()] = z.float().cpu()
            rec_sum, log_sum = rec_sum + rec.double(), torch.logaddexp(log_sum, log_weight)
        put("rec", batch.index, rec_sum / samples)
        put("kl", batch.index, kl_divergence(mu, logvar).sum(1))
        put("nll_iw", batch.index, math.log(samples) - log_sum)
        mu_all[batch.index.cpu()], logvar_all[batch.index.cpu()] = (
            mu.float().cpu(),
            logvar.float().cpu(),
        )

    for rows in (mu_all, logvar_all, z_all):  # zero where another process has the sentence
        add_up(rows)
    if thorough:
        # One cycle through all sentences in random order: everybody gets somebody else's z.
        order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
        z_other = torch.empty_like(z_all)
        z_other[order] = z_all[order.roll(1)]
        for batch in share(data.evaluation_batches(corpus, batch_size)):
            z_prior = next(data.latent_noise(latent_dim, seed, 0, batch.index, data.PRIOR)).to(device)
            other, mean = z_other[batch.index].to(device), mu_all[batch.index].to(device)
            batch = batch.to(device)
            put("rec_other", batch.index, model.rec(other, batch.labels))
            put("rec_prior", batch.index, model.rec(z_prior, batch.labels))
            length = batch.labels.shape[1]
            ids = model.generate(mean, max_new_tokens=length)[:, 1:]  # the start token goes
            ids = torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=corpus.pad_id)
            right = (ids == batch.labels) & (batch.labels != corpus.pad_id)
            put("hits", batch.index, right.sum(1))
            put("exact", batch.index, right.sum(1) == (batch.labels != corpus.pad_id).sum(1))
    for column in table.values():
        add_up(column)
    model.train(training)

    tokens, words = int(corpus.offsets[-1]), int(corpus.words.sum())
    table["neg_elbo"] = table["rec"] + table["kl"]
    table["gain"] = table["nll_iw"] - table["rec"]
    means = ["rec", "kl", "neg_elbo"]
    means += ["nll_iw", "gain"] * (iw_samples > 0) + ["rec_other", "rec_prior"] * thorough
    result = {}
    for name in means:
        result[name] = table[name].mean().item()
        result[name + "_se"] = (table[name].std() / math.sqrt(n)).item() if n > 1 else None
    for bound, suffix in ("neg_elbo", ""), ("nll_iw", "_iw"):
        if bound in means:
            result["ppl_token" + suffix] = math.exp(min(700, result[bound] * n / tokens))
            result["ppl_word" + suffix] = math.exp(min(700, result[bound] * n / words))
    if iw_samples:
        result["efficiency"] = result["gain"] / result["kl"] if result["kl"] > 0 else None
    if thorough:
        result["exact_match"] = 100 * table["exact"].mean().item()
        result["token_accuracy"] = 100 * table["hits"].sum().item() / tokens
    return result | {
        "mi": mutual_information(mu_all, logvar_all, z=z_all).item(),
        "mi_n": n,
        "au": active_units(mu_all),
        "latent_dim": latent_dim,
        "iw_samples": iw_samples,
        "sentences": n,
        "tokens": tokens,
        "words": words,
        "unk_share": float((corpus.ids == corpus.unk_id).mean()),
        "entropy": entropy,
    }


# ---------------------------------------------------------------------------------------- tables

COLUMNS = {  # heading: key of metrics.json, digits
    "rec": ("rec", 2),
    "KL": ("kl", 2),
    "-ELBO": ("neg_elbo", 2),
    "NLL": ("nll_iw", 2),
    "K": ("iw_samples", 0),
    "entropy": ("entropy", 2),
    "PPL/token": ("ppl_token", 2),
    "PPL/word": ("ppl_word", 2),
    "MI": ("mi", 2),
    "n": ("mi_n", 0),
    "AU": ("au", 0),
    "gain": ("gain", 2),
    "eff.": ("efficiency", 2),
    "rec other z": ("rec_other", 2),
    "rec prior z": ("rec_prior", 2),
    "exact %": ("exact_match", 1),
    "token %": ("token_accuracy", 1),
}


def format_table(runs):
    """{name: metrics} -> text, a row a run; a column that no run fills is left out."""
    keys = [h for h, (key, _) in COLUMNS.items() if any(m.get(key) is not None for m in runs.values())]
    rows = [["run", *keys]]
    for name, m in runs.items():
        cells = [(m.get(COLUMNS[h][0]), COLUMNS[h][1]) for h in keys]
        rows.append([name] + ["-" if v is None else f"{v:.{digits}f}" for v, digits in cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def main(argv=None):
    from vae import T5VAE

    parser = argparse.ArgumentParser(description="Evaluate runs on their test split and print one table.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of train.py, phase 1 or 2")
    parser.add_argument("--batch-size", type=int, default=64, help="sentences (64); no number depends on it")
    parser.add_argument("--iw-samples", type=int, default=100, help="K of the importance-weighted NLL (100)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    results = {}
    for run in args.runs:
        try:
            config = json.loads(Path(run, "config.json").read_text())
            model = T5VAE.from_pretrained(Path(run, "model")).to(args.device)
            texts = data.read_texts(config["dataset"], "test", config["data_dir"])
            corpus = data.tokenize(texts, model.tokenizer, config["max_length"])
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"metrics.py: {run} is no finished run of phase 1 or 2: {error}")
        entropy = data.GRAMMAR_ENTROPY if config["dataset"] == "grammar" else None
        results[run] = evaluate(model, corpus, args.batch_size, args.iw_samples, True, entropy=entropy)
        Path(run, "metrics.json").write_text(json.dumps(results[run], indent=2) + "\n")
    print(format_table(results))


if __name__ == "__main__":
    main()
