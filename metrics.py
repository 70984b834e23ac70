"""Measures of a text VAE: rec, KL, -ELBO, NLL, PPL, MI, AU, and whether z is used.

    python metrics.py RUN [RUN ...]     measures runs on their test split

Likelihoods are in nats, summed over a sentence's tokens (</s> included) and averaged over
sentences. No number depends on the batch size.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed
from tqdm import tqdm

import data
from data import InputError
from vae import T5VAE, kl_divergence

IW_SAMPLES = {1: 0, 2: 100}  # default K, by phase: phase 1 trains no density to be measured
HALF = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # --amp: of matrix products


def log_normal(z, mu, logvar):
    """log N(z; mu, exp(logvar)), summed over the dimensions: (..., Z) -> (...), nats."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp()).sum(-1)


def mutual_information(mu, logvar, z, chunk=256):
    """I(x; z) under q: E[log q(z|x)] - E[log q(z)], a scalar, nats (Hoffman & Johnson 2016).

    mu, logvar, z: (n, Z), the posteriors of a split and a sample of each; q(z) is their mixture.
    The estimate cannot exceed ln n: never report it without n. (He et al. 2019 take the first term
    in closed form; at the same z as the second, the ceiling holds for each estimate.)
    """
    mu, logvar, z = mu.double(), logvar.double(), z.double()
    # -2 log q(z_i|x_j) = sum over dimensions of (z_i - mu_j)^2 / var_j + logvar_j + ln 2 pi
    precision = (-logvar).exp()  # (n, Z)
    constant = (mu**2 * precision + logvar + math.log(2 * math.pi)).sum(1)  # (n,)
    total = 0.0
    for part in z.split(chunk):
        distance = part**2 @ precision.T - 2 * part @ (mu * precision).T + constant  # (chunk, n)
        total += torch.logsumexp(-0.5 * distance, 1).sum()
    log_q_z = total / len(mu) - math.log(len(mu))
    return log_normal(z, mu, logvar).mean() - log_q_z


def active_units(mu, threshold=0.01):
    """The number of dimensions of mu (n, Z) whose unbiased variance over the n sentences of a split
    is above `threshold` (Burda et al. 2016)."""
    return int((mu.double().var(0) > threshold).sum()) if len(mu) > 1 and mu.numel() else 0


@torch.no_grad()
def sample_posterior(model, batch, num_samples, seed=0):
    """What K samples z ~ q(z|x), functions of (seed, text), say about each sentence of a batch.

    Returns: mu, logvar, the first z: (B, Z); rec, the mean over K: (B,), nats; the importance-
    weighted NLL: (B,), nats: -log of the mean over K of p(x|z) p(z) / q(z|x) (Burda et al. 2016,
    eq. 8). In expectation it is above -log p(x), and falls towards it with K.
    """
    mu, logvar = model.encode(batch.ids, batch.mask)
    zero, zs, recs, log_weights = torch.zeros_like(mu), [], [], []
    for draw in range(num_samples):
        eps = data.latent_noise(mu.shape[1], seed, 0, batch.index, data.POSTERIOR, draw)
        z = model.reparameterize(mu, logvar, eps=eps.to(mu))
        zs.append(z)
        recs.append(model.rec(z, batch.labels).double())
        log_weights.append(log_normal(z, zero, zero) - log_normal(z, mu, logvar) - recs[-1])
    nll = math.log(num_samples) - torch.stack(log_weights).logsumexp(0)
    return mu, logvar, zs[0], torch.stack(recs).mean(0), nll


def other_latents(model, batch, mu, other, seed):
    """rec with the z of `other`, a batch of as many sentences, and the greedy text from mu (B, Z).

    Returns: {name: (B,)}: rec_other, nats; hits, tokens in their place; exact_match, 0 or 100.
    """
    mu_other, logvar_other = model.encode(other.ids, other.mask)
    eps = data.latent_noise(mu.shape[1], seed, 0, other.index, data.POSTERIOR)
    z_other = model.reparameterize(mu_other, logvar_other, eps=eps.to(mu))
    length = batch.labels.shape[1]
    ids = model.generate(mu, max_new_tokens=length)[:, 1:]  # without the start token
    ids = F.pad(ids, (0, length - ids.shape[1]))
    hits = ((ids == batch.labels) & batch.mask.bool()).sum(1)
    exact = 100.0 * (hits == batch.mask.sum(1))
    return {"rec_other": model.rec(z_other, batch.labels), "hits": hits, "exact_match": exact}


@torch.no_grad()
def measure(model, corpus, batch_size=64, iw_samples=0, thorough=False, amp="off", seed=0):
    """What `evaluate` summarizes, a row per sentence: {name: (n,)}, and mu, logvar, z: (n, Z)."""
    device, (rank, world) = model.device, data.processes()
    samples = max(1, iw_samples) if model.latent_dim else 1  # without a latent all are one
    # One random cycle through all sentences: each gets the z of another.
    cycle = np.random.default_rng(seed).permutation(len(corpus))
    other = np.empty_like(cycle)
    other[cycle] = np.roll(cycle, 1)
    batches, columns = data.evaluation_order(corpus.lengths, batch_size), {}
    interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file gets lines
    bar = {"leave": False, "disable": rank > 0, "delay": 5, "mininterval": interval}
    training = model.training
    model.eval()
    for index in tqdm(batches[rank::world] or batches[:1], "evaluating", **bar):
        batch = data.make_batch(corpus, index).to(device)
        with torch.autocast(device.type, HALF[amp], enabled=amp != "off"):
            mu, logvar, z, rec, nll_iw = sample_posterior(model, batch, samples, seed)
            kl = kl_divergence(mu.double(), logvar.double()).sum(1)
            values = {"mu": mu, "logvar": logvar, "z": z, "rec": rec, "kl": kl}
            if iw_samples:
                values["nll_iw"] = nll_iw
            if iw_samples or thorough:
                prior = data.latent_noise(mu.shape[1], seed, 0, batch.index, data.PRIOR)
                values["rec_prior"] = model.rec(prior.to(mu), batch.labels)
            if thorough:
                others = data.make_batch(corpus, other[index]).to(device)
                values |= other_latents(model, batch, mu, others, seed)
        place = batch.index.to(device, non_blocking=True)  # the CPU does not wait
        for name, value in values.items():
            if name not in columns:
                columns[name] = value.new_zeros(len(corpus), *value.shape[1:], dtype=torch.float64)
            if rank < len(batches):  # else the batch is another's: it is measured to keep step
                columns[name][place] = value.double()
    model.train(training)
    if len(corpus) == 1:  # no other
        columns.pop("rec_other", None)
    return {name: gather(name, column.cpu()) for name, column in columns.items()}


def gather(name, column):
    """The sum of a column over processes; each has zeros in the others' places. Refuses NaN."""
    if data.processes()[1] > 1:
        distributed.all_reduce(column)
    if not column.isfinite().all():
        text = (~column.isfinite()).nonzero()[0, 0] + 1
        raise FloatingPointError(f"{name} of text {text} of the split is not finite")
    return column


def evaluate(model, corpus, batch_size=64, iw_samples=0, thorough=False, amp="off", seed=0):
    """The measures of a model on a split, without deletion or threshold: a flat dict for JSON.

    Args:
        model: a T5VAE. It stays in its mode; no global random state is read or advanced.
        iw_samples: K of the importance-weighted NLL, 0: without it. rec is the mean over K samples.
        thorough: also rec with other latents, and the greedy reconstruction.
        amp: precision of matrix products, a key of HALF.
    Returns: means over sentences, nats, with standard errors `<name>_se`; ratios; counts.
    Raises: FloatingPointError, with the measure and the text, where a number is not finite.
    """
    columns = measure(model, corpus, batch_size, iw_samples, thorough, amp, seed)
    return summarize(columns, corpus, iw_samples)


def summarize(columns, corpus, iw_samples):
    """What `measure` found -> what `evaluate` returns."""
    tokens, words = corpus.ids.size, int(corpus.words.sum())
    measured = means_and_errors(columns)
    if "hits" in columns:
        measured["token_accuracy"] = 100 * columns["hits"].sum().item() / tokens
    neg_elbo = columns["rec"] + columns["kl"]
    for suffix, nats in ("", neg_elbo), ("_iw", columns.get("nll_iw")):
        if nats is not None:
            measured["ppl_token" + suffix] = perplexity(nats, tokens)
            measured["ppl_word" + suffix] = perplexity(nats, words)
    measured["mi"] = mutual_information(columns["mu"], columns["logvar"], columns["z"]).item()
    measured |= {"mi_n": len(corpus), "au": active_units(columns["mu"])}
    measured |= {"latent_dim": columns["mu"].shape[1], "iw_samples": iw_samples}
    measured |= {"sentences": len(corpus), "tokens": tokens, "words": words}
    measured["unk_share"] = float((corpus.ids == corpus.unk_id).mean())
    measured["entropy"] = corpus.entropy
    for name, value in measured.items():
        if value is not None and not math.isfinite(value):
            raise FloatingPointError(f"{name} of the split is {value}")
    return measured


def means_and_errors(columns):
    """{name: mean over sentences, name_se: its standard error} of columns (n,), and the ratio."""
    rec, kl, measured = columns["rec"], columns["kl"], {}
    means = {"rec": rec, "kl": kl, "neg_elbo": rec + kl}
    for name in "nll_iw", "rec_prior", "rec_other", "exact_match":
        if name in columns:
            means[name] = columns[name]
    if "rec_other" in columns:
        means["swap_cost"] = columns["rec_other"] - rec
    if "nll_iw" in columns:
        means["nll"] = smaller_bound(columns)
        means["gain"] = means["nll"] - rec
    for name, values in means.items():
        measured[name], measured[name + "_se"] = values.mean().item(), standard_error(values)
    if "gain" in means:
        measured["efficiency"] = None
        if measured["kl"] > 0:  # the error of a ratio of means: the delta method
            ratio = measured["gain"] / measured["kl"]
            deviation = (means["gain"] - ratio * kl) / measured["kl"]
            measured |= {"efficiency": ratio, "efficiency_se": standard_error(deviation)}
    return measured


def smaller_bound(columns):
    """The tighter, on average, of two upper bounds of -log p(x): (n,), nats.

    rec with z from the prior (Jensen) is exact where z is ignored; the importance-weighted NLL
    where q is the true posterior. Not per sentence: the minimum of noisy numbers is biased.
    """
    if columns["nll_iw"].mean() <= columns["rec_prior"].mean():
        return columns["nll_iw"]
    return columns["rec_prior"]


def standard_error(values):
    """That of the mean of values (n,), None for a single value."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def perplexity(nats, count):
    """exp(total nats / count), at most e^700: floats end at e^709."""
    return math.exp(min(700, nats.sum().item() / count))


def cell(measured, key):
    """One number of `evaluate`'s dict, with its standard error or a mark that it has none."""
    value, error = measured.get(key), measured.get(key + "_se")
    if value is None or isinstance(value, int):
        return "-" if value is None else f"{value:,}"
    digits = f"{value:z.2f}" if abs(value) < 1e6 else f"{value:.1e}"
    if key == "entropy":  # it is known
        return digits
    return f"{digits}±?" if error is None else f"{digits}±{error:.2f}"


def format_table(runs):
    """{name: measures} -> text: a row per measure, called as in metrics.json, a column per run."""
    width = max(14, *map(len, runs))
    lines = [" " * 19 + "".join(f"  {run:>{width}}" for run in runs)]
    for key in dict.fromkeys(key for measured in runs.values() for key in measured):
        cells = [cell(measured, key) for measured in runs.values()]
        if not key.endswith("_se") and set(cells) != {"-"}:
            label = f"{key}, at most" if key in ("gain", "efficiency") else key
            lines.append(f"{label:19}" + "".join(f"  {text:>{width}}" for text in cells))
    return "\n".join([*lines, "Nats per sentence; ±: standard error over sentences, ±?: none."])


def verdict(measured, target=0.0, lm_nll=None):
    """One line: is z used, what does it cost against a language model, is the KL the `target`?

    z is used if another sentence's z costs more than noise explains (2 standard errors), and more
    than a tenth of the KL that is paid for z.
    """
    if measured["latent_dim"] == 0 or "swap_cost" not in measured:
        return f"rec {measured['rec']:.2f} nats per sentence"
    cost, error, kl = measured["swap_cost"], measured["swap_cost_se"] or 0.0, measured["kl"]
    swap = f"with another sentence's z, rec is {cost:.2f}±{error:.2f} nats higher"
    if cost <= max(0, 2 * error):
        said = f"z is ignored: {swap}; its KL of {kl:.2f} nats buys nothing"
    else:
        said = f"z is {'used' if cost > 0.1 * kl else 'hardly used'}: {swap}"
        said += f"; its KL is {kl:.2f} nats"
        if "gain" in measured:
            said += f", of which at most {measured['gain']:.2f} explain the text"
    if "nll" in measured:
        said += f"; NLL {measured['nll']:.2f}"
    if lm_nll is not None:
        said += f", the language model has {lm_nll:.2f}"
    if target:
        met = "met" if abs(kl / target - 1) <= 0.1 else "MISSED by more than 10 %"
        said += f"; KL target {target:g}: {met} ({kl:.2f})"
    return said


def load_run(run, device="cpu"):
    """(config, model, read) of a run folder; read(split, limit=None) is a `Corpus` of its data.

    Raises OSError or InputError where it is no run, or its texts have changed.
    """
    config = data.read_json(Path(run, "config.json"))
    if not isinstance(config.get("data_sha256"), dict) or "phase" not in config:
        raise InputError("it has no config.json of a run")
    model = T5VAE.from_pretrained(run).to(device).requires_grad_(False)

    def read(split, limit=None):
        dataset, where = config["dataset"], (config["data_dir"], config["max_length"], limit)
        corpus = data.load_corpus(dataset, split, model.tokenizer, *where)
        if corpus.sha256 != config["data_sha256"][split]:
            changed = f"the {split} texts of {dataset} have changed since it was trained"
            raise InputError(f"{changed}; it is measured on the same texts only")
        return corpus

    return config, model, read


def evaluate_run(run, iw_samples=None, device="cpu", amp="off"):
    """(measures, columns) of a run's model on its test split. iw_samples: 100; 0 for phase 1."""
    config, model, read = load_run(run, device)
    if iw_samples is None:
        iw_samples = IW_SAMPLES[config["phase"]]
    corpus = read("test")
    columns = measure(model, corpus, iw_samples=iw_samples, thorough=True, amp=amp)
    return summarize(columns, corpus, iw_samples), columns


def write_measures(run, measured, columns):
    """metrics.json, and sentences.npz: the values per sentence, for paired comparisons."""
    values = {name: column.numpy() for name, column in columns.items() if column.dim() == 1}
    npz = Path(run, "sentences.npz")
    data.write_atomically(npz, lambda file: np.savez_compressed(file, **values))
    data.write_json(Path(run, "metrics.json"), measured)


def language_model_nll(run, config, named=None):
    """NLL of a language model of the same test texts, cut alike, or None.

    named: its run, else it is lm/ beside `run`. Raises InputError where `named` is no such run.
    """
    folder = Path(named or Path(run).resolve().parent / "lm")
    measured = data.read_json(folder / "metrics.json")
    its = data.read_json(folder / "config.json")
    texts = [((c.get("data_sha256") or {}).get("test"), c.get("max_length")) for c in (its, config)]
    if texts[0] == texts[1] and measured.get("latent_dim") == 0:
        return measured["rec"]
    if named:
        raise InputError(f"--lm is {named}; it must be a finished --no-latent run on these texts")
    return None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Evaluate runs on their test split.")
    flag = parser.add_argument
    flag("runs", nargs="+", metavar="RUN", help="run folder of train.py")
    flag("--iw-samples", type=int, metavar="K", help="samples per sentence (100; phase 1: none)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flag("--device", choices=("cuda", "cpu"), default=device, help="where to compute")
    flag("--amp", choices=HALF, default="off", help="precision of matrix products (off: float32)")
    flag("--lm", metavar="RUN", help="language model to compare with (lm/ beside the run, if any)")
    args = parser.parse_args(argv)
    data.replace_unprintable()
    if args.iw_samples is not None and args.iw_samples < 1:
        parser.error(f"--iw-samples is {args.iw_samples}; it must be at least 1")
    if args.device == "cuda" and device == "cpu":
        parser.error("--device is cuda, but torch finds no GPU")
    results, said = {}, []
    for run in args.runs:
        try:
            config = data.read_json(f"{run}/config.json")
            lm_nll = language_model_nll(run, config, args.lm)
            results[run], columns = evaluate_run(run, args.iw_samples, args.device, args.amp)
            if Path(run, "metrics.json").exists():  # it marks a run as finished
                write_measures(run, results[run], columns)
            else:
                said.append(f"{run}: not written: the run is not finished")
        except (OSError, ValueError, FloatingPointError) as error:
            sys.exit(f"metrics.py: cannot use {run}: {error}")
        said.append(f"{run}: {verdict(results[run], config.get('kl_target'), lm_nll)}")
    print(format_table(results), *said, sep="\n")


if __name__ == "__main__":
    main()
