"""Measures of a text VAE: rec, KL, -ELBO, NLL, PPL, MI, AU, and whether z is used.

    python metrics.py RUN [RUN ...]     measures runs on their test split

Likelihoods are in nats, summed over a sentence's tokens (</s> included) and averaged over
sentences. No number depends on the batch size.

Two posteriors are measured. q(z|x) is the encoder's, as trained: at a KL weight below 1 it is more
certain than p(z|x) and pays more KL than z carries. r(z|x) is q untempered, brought to weight 1
(`untemper`): what the generative model itself says about x. Both give upper bounds of -log p(x);
r usually gives the tighter ones.
"""

import argparse
import math
import numbers
from pathlib import Path

import numpy as np
import torch
from torch import distributed

import data
from data import InputError
from vae import T5VAE, check_no_parent, evaluating, kl_divergence

REC_SAMPLES = 4  # of q, for rec beside an NLL
IW_SAMPLES = {1: 0, 2: 20}  # default K, by phase: phase 1 trains no density to be measured
# The weights that `find_weight` tries. After a KL weight above 1 (`KLController`) q is too
# wide, and none of them makes it narrower: the bounds are less tight.
GRID = (1.0, 0.8, 0.64, 0.5, 0.35, 0.25, 0.15, 0.1, 0.06, 0.04, 0.02, 0.01, 0.005, 0.0)
MOST = 16_384  # tokens of a batch, padding included, if it has more than one text
HALF = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # --amp: of matrix products
# The columns of `measure` that are measures themselves, beside rec and kl.
COLUMNS = ("nll_iw", "nll_iw_half", "iw_ess", "rec_prior", "rec_other", "exact_match")
COLUMNS += ("rec_untempered", "kl_untempered")
SHOWN = ("rec", "kl", "neg_elbo", "nll", "kl_posterior", "ppl_word", "mi", "au")
SHOWN += ("swap_cost", "exact_match", "entropy")  # on the screen; the rest is in metrics.json
SHOWN_LM = ("rec", "ppl_token", "ppl_word", "entropy")


def autocast(device, amp):
    """The precision of matrix products: a key of HALF, of which "off" is float32."""
    return torch.autocast(device, HALF[amp], enabled=amp != "off")


def log_normal(z, mu, logvar):
    """log N(z; mu, exp(logvar)), summed over the dimensions: (..., Z) -> (...), nats."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp()).sum(-1)


def untemper(mu, logvar, weight):
    """The posterior at KL weight 1 of an encoder that was trained at `weight`, w in [0, 1].

    For a given decoder, rec + w KL is least for q proportional to p(z) p(x|z)^(1/w): the likelihood
    counts 1/w times. So the posterior, proportional to p(z) p(x|z), is proportional to
    p(z)^(1-w) q(z)^w. For Gaussians that is a Gaussian; per dimension, with v = exp(logvar), its
    precision is (1 - w) + w / v, and

        d = w + (1 - w) v        mean = w mu / d        log variance = logvar - log d

    w = 1 changes nothing, w = 0 is the prior. It is the exact posterior if q is optimal at w and
    log p(x|z) is quadratic in z with a diagonal Hessian; else bounds that use it are less tight,
    and still bounds.

    mu, logvar: (..., Z). Returns: mu, logvar: (..., Z). Raises InputError if w is outside [0, 1].
    """
    if not isinstance(weight, numbers.Real) or not 0 <= weight <= 1:
        raise InputError(f"weight is {weight!r}; it must be a number, at least 0 and at most 1")
    w = torch.as_tensor(weight, dtype=logvar.dtype, device=logvar.device)
    # In logs, since exp(logvar) may overflow.
    log_d = torch.logaddexp(w.log(), torch.log1p(-w) + logvar)
    return mu * (w.log() - log_d).exp(), logvar - log_d


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


def sample_rec(model, batch, mu, logvar, seed, use=data.POSTERIOR, samples=1):
    """z, (B, Z), and the mean rec, (B,), nats, of samples of N(mu, exp(logvar)): z is the first."""
    noise = data.latent_noise(mu.shape[1], seed, 0, batch.index, use, samples).to(mu)
    zs = [model.reparameterize(mu, logvar, eps=eps) for eps in noise]
    recs = [model.rec(z, batch.labels).double() for z in zs]
    return zs[0], torch.stack(recs).mean(0)


def importance_weighted(model, batch, mu, logvar, samples, seed=0):
    """What K samples z_k of a proposal r = N(mu, exp(logvar)), (B, Z), say about p(x) and p(z|x).

    With the weights p(x|z_k) p(z_k) / r(z_k), functions of (seed, text): {name: (B,)},

        nll_iw         -log of their mean (Burda et al. 2016, eq. 8): in expectation above
                       -log p(x), nats; it tends to it with K
        nll_iw_half    the same of the first half of the samples: how far from settled?
                       (Only all samples together are spread evenly: K / 2 would do better.)
        rec_posterior  the mean of rec_k weighted by them: in the limit its mean under p(z|x)
        iw_ess         how many samples the weights amount to: 1 / the sum of their squared shares
        rec_untempered, kl_untempered    rec and KL of r itself
    """
    mu, logvar = mu.double(), logvar.double()
    zero, recs, log_weights = torch.zeros_like(mu), [], []
    noise = data.stratified_noise(mu.shape[1], seed, 0, batch.index, data.UNTEMPERED, samples)
    for eps in noise.to(mu):
        z = model.reparameterize(mu, logvar, eps=eps)
        recs.append(model.rec(z, batch.labels).double())
        log_weights.append(log_normal(z, zero, zero) - log_normal(z, mu, logvar) - recs[-1])
    recs, log_weights = torch.stack(recs), torch.stack(log_weights)  # (K, B)
    shares, half = log_weights.softmax(0), max(1, samples // 2)
    return {
        "nll_iw": math.log(samples) - log_weights.logsumexp(0),
        "nll_iw_half": math.log(half) - log_weights[:half].logsumexp(0),
        "rec_posterior": (shares * recs).sum(0),
        "iw_ess": 1 / (shares**2).sum(0),
        "rec_untempered": recs.mean(0),
        "kl_untempered": kl_divergence(mu, logvar).sum(1),
    }


def greedy(model, batch, mu):
    """The greedy text from mu (B, Z): hits, tokens in their place; exact_match, 0 or 100: (B,)."""
    mu = mu.nan_to_num()  # `generate` would refuse NaN; `gather` does, and names the text
    ids = model.generate(mu, max_new_tokens=batch.labels.shape[1])[:, 1:]  # without the start
    written = ids.shape[1]  # tokens of the longest text
    same = ids == batch.labels[:, :written]
    hits = (same & batch.mask[:, :written].bool()).sum(1)
    return {"hits": hits, "exact_match": 100.0 * (hits == batch.mask.sum(1))}


def other_texts(count, seed=0):
    """(count,) numbers: each text gets the z of its predecessor on one random cycle through all."""
    cycle = np.random.default_rng(seed).permutation(count)
    other = np.empty_like(cycle)
    other[cycle[1:]] = cycle[:-1]
    other[cycle[0]] = cycle[-1]
    return other


def measure(model, corpus, weight=1.0, iw_samples=0, thorough=False, seed=0, max_tokens=MOST):
    """What `evaluate` summarizes, a row per sentence, float64 on the CPU: {name: (n,)}, and mu,
    logvar, z: (n, Z)."""
    check_arguments(corpus, seed, max_tokens, weight, iw_samples)
    rec_samples = REC_SAMPLES if iw_samples else 1
    if model.latent_dim == 0:  # all samples are one
        iw_samples, rec_samples = min(iw_samples, 1), 1

    def measure_batch(batch):
        mu, logvar = model.encode(batch.ids, batch.mask)
        kl = kl_divergence(mu.double(), logvar.double()).sum(1)
        z, rec = sample_rec(model, batch, mu, logvar, seed, samples=rec_samples)
        values = {"mu": mu, "logvar": logvar, "z": z, "rec": rec, "kl": kl}
        if iw_samples:
            r = untemper(mu.double(), logvar.double(), weight)
            values |= importance_weighted(model, batch, *r, iw_samples, seed)
        if iw_samples or thorough:
            zero = torch.zeros_like(mu)
            values["rec_prior"] = sample_rec(model, batch, zero, zero, seed, data.PRIOR)[1]
        if thorough:
            values |= greedy(model, batch, mu)
        return values

    columns = per_text(measure_batch, model, corpus, max_tokens, "evaluating")
    if thorough and len(corpus) > 1:  # a single text has no other
        other_z = columns["z"][torch.from_numpy(other_texts(len(corpus), seed))]

        def measure_swapped(batch):
            z = other_z[torch.from_numpy(batch.index)].to(batch.labels.device)
            return {"rec_other": model.rec(z, batch.labels)}

        columns |= per_text(measure_swapped, model, corpus, max_tokens, "swapping")
    return columns


def per_text(measure_batch, model, corpus, max_tokens, what, texts=None):
    """{name: (n, ...)}, float64 on the CPU, from measure_batch(Batch): {name: (B, ...)}.

    Of the first `texts` texts of a corpus, n in all (None: of all). Processes share the batches.
    what: stands before the bar.
    """
    rank, world = data.processes()
    lengths = corpus.lengths[:texts]
    batches = data.evaluation_order(lengths, max_tokens)
    share, columns = batches[rank::world], {}
    dummy = len(share) == 0
    if dummy:
        share = batches[:1]  # so that this process has the same columns
    with evaluating(model):
        for index in data.progress(share, what):
            values = measure_batch(data.make_batch(corpus, index).to(model.device))
            rows = torch.from_numpy(index).to(model.device)
            for name, value in values.items():
                if name not in columns:
                    shape = len(lengths), *value.shape[1:]
                    columns[name] = torch.zeros(shape, dtype=torch.float64, device=model.device)
                if not dummy:
                    columns[name][rows] = value.double()
    return {name: gather(name, column.cpu()) for name, column in columns.items()}


def check_arguments(corpus, seed, max_tokens, weight=1.0, iw_samples=0):
    """InputError if corpus is no Corpus, such as a list of texts, or another argument is wrong."""
    if not isinstance(corpus, data.Corpus):
        has = f"corpus is a {type(corpus).__name__}"
        raise InputError(f"{has}; make it with data.make_corpus(texts, model.tokenizer)")
    if len(corpus) == 0:
        raise InputError("corpus is empty; it must have at least one text")
    data.check_at_least("seed", seed, 0)
    if seed >= 2**32:
        raise InputError(f"seed is {seed}; it must be less than 2^32")
    data.check_at_least("max_tokens", max_tokens, 1)
    data.check_at_least("iw_samples", iw_samples, 0)
    if not iw_samples and weight != 1:
        raise InputError(f"weight is {weight!r}, which has no effect without iw_samples")


def gather(name, column):
    """The sum of a column over processes; each has zeros in the others' places.

    Raises FloatingPointError if a number is not finite.
    """
    if data.processes()[1] > 1:
        distributed.all_reduce(column)
    if not column.isfinite().all():
        text = (~column.isfinite()).nonzero()[0, 0].item()
        raise FloatingPointError(
            f"{name} of text {text} of the split, counted from 0, is not finite"
        )
    return column


def evaluate(model, corpus, weight=1.0, iw_samples=0, thorough=False, seed=0, max_tokens=MOST):
    """The measures of a model on a split, without deletion or threshold: a flat dict for JSON.

    Args:
        model: a T5VAE. It stays in its mode; no global random state is read or advanced.
        weight: w of `untemper`; `find_weight` finds it on a validation split.
        iw_samples: K of the importance-weighted NLL, 0: without it.
        thorough: also rec with other latents, and the greedy reconstruction.
        max_tokens: padded tokens of a batch, at most, if more than one text.
    Returns: means over sentences, nats, with standard errors `<name>_se`; ratios; counts.
    Raises: FloatingPointError, with the measure and the text, if a number is not finite; InputError
        if an argument is out of its limits or has no effect.
    """
    columns = measure(model, corpus, weight, iw_samples, thorough, seed, max_tokens)
    return summarize(columns, corpus, weight, iw_samples)


def summarize(columns, corpus, weight, iw_samples):
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
    mu, logvar, z = columns["mu"], columns["logvar"], columns["z"]
    measured["mi"] = mutual_information(mu, logvar, z).item()
    measured |= {"mi_n": len(corpus), "au": active_units(mu), "latent_dim": mu.shape[1]}
    if iw_samples:
        measured["untempered_weight"] = float(weight)
    measured["iw_samples"] = iw_samples if mu.shape[1] else min(iw_samples, 1)
    measured |= {"sentences": len(corpus), "tokens": tokens, "words": words, "word": corpus.word}
    measured["unknown_share"] = corpus.unknown / len(corpus)
    measured["entropy"] = corpus.entropy
    for name, value in measured.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FloatingPointError(f"{name} of the split is {value}")
    return measured


def per_sentence(columns):
    """{name: (n,)}: the columns of `measure` whose means are measures, and what follows from them.

    swap_cost   rec with another text's z - rec: 0 if the decoder ignores z
    nll         the tighter of two upper bounds of -log p(x), see `smaller_bound`
    kl_posterior  nll - rec_posterior: in the limit KL(p(z|x) to p(z)), the nats that z carries in
                the generative model, whatever the encoder says
    gain        nll - rec: the nats of a text that the encoder's z explains, at most
    """
    rec, kl = columns["rec"], columns["kl"]
    found = {"rec": rec, "kl": kl, "neg_elbo": rec + kl}
    for name in COLUMNS:
        if name in columns:
            found[name] = columns[name]
    if "rec_other" in columns:
        found["swap_cost"] = columns["rec_other"] - rec
    if "nll_iw" in columns:
        found["neg_elbo_untempered"] = columns["rec_untempered"] + columns["kl_untempered"]
        found["nll"] = smaller_bound(columns)
        found["kl_posterior"] = found["nll"] - columns["rec_posterior"]
        found["gain"] = found["nll"] - rec
    return found


def means_and_errors(columns):
    """{name: mean over sentences, name_se: its standard error} of `per_sentence`, and a ratio:

    efficiency  gain / kl: of the KL that the encoder pays, at most this share explains the text
    """
    found, measured = per_sentence(columns), {}
    for name, values in found.items():
        measured[name], measured[name + "_se"] = values.mean().item(), standard_error(values)
    if "gain" in found:
        measured["efficiency"] = None
        if measured["kl"] > 0:  # the error of a ratio of means: the delta method
            ratio = measured["gain"] / measured["kl"]
            deviation = (found["gain"] - ratio * found["kl"]) / measured["kl"]
            measured |= {"efficiency": ratio, "efficiency_se": standard_error(deviation)}
    return measured


def smaller_bound(columns):
    """The tighter, on average, of two upper bounds of -log p(x): (n,), nats.

    rec with z from the prior (Jensen) is exact if z is ignored; the importance-weighted NLL if r is
    the true posterior. Not per sentence: the minimum of noisy numbers is biased.
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


def find_weight(model, corpus, texts=500, seed=0, max_tokens=MOST):
    """The weight w in GRID whose -ELBO, untempered by it, is least on a validation split.

    The KL weight of the last training step would be right only if the encoder were at its optimum.
    Takes the first `texts` texts, two samples each, and the same noise for every weight.
    """
    check_arguments(corpus, seed, max_tokens)
    data.check_at_least("texts", texts, 1)
    bounds = untempered_bounds(model, corpus, GRID, texts, seed, max_tokens)
    return min(bounds, key=bounds.get)


def untempered_bounds(model, corpus, weights, texts, seed, max_tokens):
    """{weight: -ELBO of the posterior that it untempers}: means over the first texts, nats."""

    def measure_batch(batch):
        mu, logvar = (x.double() for x in model.encode(batch.ids, batch.mask))
        bounds = []
        for weight in weights:
            r = untemper(mu, logvar, weight)
            _, rec = sample_rec(model, batch, *r, seed, data.SEARCH, samples=2)
            bounds.append(rec + kl_divergence(*r).sum(1))
        return {"the untempered -ELBO": torch.stack(bounds, 1)}  # (B, weights)

    (bounds,) = per_text(measure_batch, model, corpus, max_tokens, "untempering", texts).values()
    return dict(zip(weights, bounds.mean(0).tolist(), strict=True))


def measure_run(model, phase, read, iw_samples=None, max_tokens=MOST):
    """(measures, columns) of a trained model on its test split. read(split) is a `Corpus`.

    For a phase 2 with a latent the weight of `untemper` is searched on the first validation texts:
    an eighth as many as there are test texts, from 20 to 500. iw_samples: K; None: that of the
    phase.
    """
    iw_samples = IW_SAMPLES[phase] if iw_samples is None else iw_samples
    test, weight = read("test"), 1.0
    if phase == 2 and model.latent_dim > 0 and iw_samples:
        texts = min(500, max(20, len(test) // 8))
        weight = find_weight(model, read("valid"), texts, max_tokens=max_tokens)
    columns = measure(model, test, weight, iw_samples, thorough=True, max_tokens=max_tokens)
    return summarize(columns, test, weight, iw_samples), columns


def cell(measured, key):
    """One number of `evaluate`'s dict, with its standard error or a mark that it has none."""
    value, error = measured.get(key), measured.get(key + "_se")
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    digits = f"{value:z.2f}" if abs(value) < 1e6 else f"{value:.1e}"  # z: no "-0.00"
    if key == "entropy":  # it is known
        return digits
    return f"{digits}±?" if error is None else f"{digits}±{error:.2f}"


def format_table(runs):
    """{name: measures} -> text: a row per measure that matters, a column per run."""
    width = max(14, *map(len, runs))
    lines = [" " * 19 + "".join(f"  {run:>{width}}" for run in runs)]
    shown = SHOWN if any(measured["latent_dim"] for measured in runs.values()) else SHOWN_LM
    for key in shown:
        cells = [cell(measured, key) for measured in runs.values()]
        if set(cells) != {"-"}:
            lines.append(f"{key:19}" + "".join(f"  {text:>{width}}" for text in cells))
    end = "Nats per sentence; ±: standard error over sentences, ±?: none."
    if shown == SHOWN:
        end += " mi is at most ln of their number."
    if any(measured["word"] == "character" for measured in runs.values()):
        end += " A word of ppl_word is a character."
    return "\n".join([*lines, end])


def verdict(measured, target=0.0, lm_nll=None):
    """One line: is z used, what does it carry and cost, is the KL the `target`, are letters lost?

    z is used if another sentence's z costs more than noise explains (2 standard errors), and more
    than a tenth of the KL that is paid for z.
    """
    said, kl = f"rec {measured['rec']:.2f} nats per sentence", measured["kl"]
    if measured["latent_dim"] > 0:
        if "nll" not in measured:  # phase 1
            said += f"; KL {kl:.2f}, which phase 1 does not limit"
        elif "swap_cost" in measured:  # not of a single text
            said = f"{verdict_on_z(measured)}; NLL {measured['nll']:.2f}"
    if lm_nll is not None:
        said += f"; the language model's NLL is {lm_nll:.2f}"
    if target:
        met = "met" if abs(kl / target - 1) <= 0.1 else "MISSED by more than 10 %"
        said += f"; KL target {target:g}: {met} ({kl:.2f})"
    if measured["unknown_share"] > 0.1:
        said += f"; WARNING: {unknown_warning(measured['unknown_share'])}"
    return said


def verdict_on_z(measured):
    """Is z used, and what does it carry?"""
    cost, error, kl = measured["swap_cost"], measured["swap_cost_se"], measured["kl"]
    swap = f"with another sentence's z, rec is {cost:.2f}±{error:.2f} nats higher"
    if cost <= 2 * error:
        return f"z is ignored: {swap}; its KL of {kl:.2f} nats buys nothing"
    used = "used" if cost > 0.1 * kl else "hardly used"
    carried = f"in the model z carries {cell(measured, 'kl_posterior')}"
    return f"z is {used}: {swap}; its KL is {kl:.2f} nats, {carried}"


def unknown_warning(share):
    return (
        f"{100 * share:.0f} % of the texts have characters outside the vocabulary, which all look "
        "alike; take --model google/byt5-small, or --model tiny, which has those of its training "
        "texts"
    )


def read_config(run):
    """The config.json of a run folder. Raises InputError if it is no run."""
    check_no_parent(run)
    config = data.read_json(Path(run, "config.json"))
    needed = {"phase", "dataset", "data_dir", "max_length"}
    if not isinstance(config.get("data_sha256"), dict) or needed - config.keys():
        raise InputError(f"{run} has no config.json of a run")
    return config


def load_run(run, device="cpu", dataset=None):
    """(config, model, read) of a run folder; read(split, limit=None) is a `Corpus` of its data.

    dataset: where its texts are now, if they have moved. Raises OSError or InputError if it is no
    run, or if its texts are missing or have changed.
    """
    config = read_config(run)
    model = T5VAE.from_pretrained(run).to(device).requires_grad_(False)
    if model.tokenizer is None:
        raise InputError(f"{run}/model has no tokenizer")
    name, data_dir = config["dataset"], config["data_dir"]
    if dataset and name in data.SOURCES:  # some of them are read by rules of their own
        if Path(dataset).resolve().name != name or not Path(dataset).is_dir():
            raise InputError(f"--dataset is {dataset}; it must be a folder that is named {name}")
        data_dir = Path(dataset).resolve().parent
    elif dataset:
        name = dataset

    def read(split, limit=None):
        try:
            corpus = data.load_corpus(
                name, split, model.tokenizer, data_dir, config["max_length"], limit
            )
        except FileNotFoundError as error:
            raise InputError(f"{error}; --dataset says where the texts are now") from error
        if corpus.sha256 != config["data_sha256"][split]:
            changed = f"the {split} texts of {name} are not those that it was trained on"
            raise InputError(f"{changed}; it is measured on the same texts only")
        return corpus

    return config, model, read


def write_measures(run, measured, columns, said):
    """metrics.json, sentences.npz (values per sentence, for paired comparisons), and the card.

    said: the verdict, which stands below the measures in the model's README.md, its card.
    """
    heading, card = "\n## Measures on the test split\n\n", Path(run, "model", "README.md")
    text = ""
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="surrogateescape")
    text, _, old = text.partition(heading)
    _, next_heading, rest = old.partition("\n## ")  # what a user wrote below
    table = format_table({Path(run).resolve().name: measured})
    text = f"{text.rstrip()}\n{heading}```\n{table}\n```\n\n{said}\n{next_heading}{rest}"
    card.write_text(text, encoding="utf-8", errors="surrogateescape")
    values = {name: column.numpy() for name, column in columns.items() if column.dim() == 1}
    npz = Path(run, "sentences.npz")
    data.write_atomically(npz, lambda file: np.savez_compressed(file, **values))
    data.write_json(Path(run, "metrics.json"), measured)  # last: with it a run is finished


def check_better(run, before, config, args):
    """InputError if a run has no measures `before`, or they have more samples."""
    if not before:
        raise InputError(f"--write: {run} is not finished")
    samples = args.iw_samples or IW_SAMPLES[config["phase"]]
    if before.get("latent_dim") and samples < before.get("iw_samples", 0):
        has = f"{run} was measured with {before['iw_samples']}"
        raise InputError(f"--write with --iw-samples {samples}: {has}, which is better")


def language_model_nll(run, config, words, named=None):
    """NLL of a language model of the same texts, cut alike, or None; None, too, if it is the run.

    words: of the run's test texts as cut (another tokenizer cuts elsewhere), or None. named: the
    language model's run, else it is lm/ beside `run`. Raises InputError if it is no such run.
    """
    folder = Path(named or Path(run).resolve().parent / "lm")
    measured = data.read_json(folder / "metrics.json")
    its = data.read_json(folder / "config.json")
    same = all(its.get(name) == config.get(name) for name in ("data_sha256", "max_length", "limit"))
    same = same and words in (None, measured.get("words"))
    if same and measured.get("latent_dim") == 0:
        return None if folder.resolve() == Path(run).resolve() else measured["rec"]
    if named:
        raise InputError(f"--lm is {named}; it must be another --no-latent run on these texts")
    return None


def check_run(run, args):
    """The NLL of its language model, or None. InputError if a run cannot be measured as `main`'s
    args say."""
    config, before = read_config(run), data.read_json(Path(run, "metrics.json"))
    if args.write:
        check_better(run, before, config, args)
    return language_model_nll(run, config, before.get("words"), args.lm)


def measure_again(run, args):
    """(measures, verdict) of a run folder, which gets them with --write; args: those of `main`."""
    lm_nll = check_run(run, args)
    config, model, read = load_run(run, args.device, args.dataset)
    before = data.read_json(Path(run, "metrics.json"))
    with autocast(args.device, args.amp):
        measured, columns = measure_run(model, config["phase"], read, args.iw_samples)
    measured |= {"kl_weight": before.get("kl_weight"), "precision": args.amp}
    said = verdict(measured, config.get("kl_target"), lm_nll)
    if args.write:
        write_measures(run, measured, columns, said)
    return measured, said


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure runs on their test split.")
    flag = parser.add_argument
    flag("runs", nargs="+", metavar="RUN", help="run folder of train.py")
    samples = data.number(int, 1, 2**16)
    flag("--iw-samples", type=samples, metavar="K", help="samples per text (20; phase 1: none)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flag("--device", choices=("cuda", "cpu"), default=device, help="where to compute")
    flag("--amp", choices=HALF, default="off", help="precision of matrix products (off: float32)")
    flag("--dataset", help="where the texts are, if they have moved")
    flag("--lm", metavar="RUN", help="language model to compare with (lm/ beside the run, if any)")
    flag("--write", action="store_true", help="replace a run's metrics.json, unless by worse ones")
    args = parser.parse_args(argv)
    if args.device == "cuda" and device == "cpu":
        parser.error("--device is cuda, but torch finds no GPU")
    if args.write and args.amp != "off":
        parser.error(f"--write keeps measures in float32 alone; --amp is {args.amp}")
    results, said = {}, []
    with data.command("metrics.py"):
        if all(read_config(run).get("latent_dim") == 0 for run in args.runs):
            for flag, value in ("--iw-samples", args.iw_samples), ("--lm", args.lm):
                if value is not None:
                    raise InputError(f"{flag} is {value}, which has no effect on a language model")
        for run in args.runs:  # before hours are spent on the first
            check_run(run, args)
        try:
            for run in args.runs:
                results[run], its_verdict = measure_again(run, args)
                said.append(f"{run}: {its_verdict}")
        finally:  # what one run has told is printed, whatever happens to the next
            if results:
                table = format_table(results)
                if args.write:
                    table += " All measures are in metrics.json."
                print(table, *said, sep="\n", flush=True)


if __name__ == "__main__":
    main()
