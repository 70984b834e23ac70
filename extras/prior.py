"""Is N(0, I) where the posteriors are? Their KL to it, and to priors that are fitted to them.

    python -m extras.prior RUN

Needs `pip install -r extras/requirements.txt`. Prints the mean KL of the test split's posteriors to
each prior, nats per sentence, and what is saved against N(0, I), with standard errors over texts.

The KL to N(0, I) is in closed form: the run's `kl`. The others are fitted to one sample of the
posterior of each of the first 20,000 texts that the run was trained on: a Gaussian, and mixtures of
8 Gaussians (full covariances) and of 32 (diagonal). The KL to such a prior m is
kl + log N(z; 0, I) - log m(z), with one z of each test posterior, the same for all priors. What is
saved is negative where a prior does not fit, because there were too few texts for it.

Whatever the prior, the KL of these posteriors to it is at least their MI, that to the mixture of
them. With few texts that says little, because MI cannot exceed ln n.
"""

import argparse
import math
import sys

import torch
from sklearn.mixture import GaussianMixture

import data
import metrics
from data import InputError
from extras.posteriors import posteriors, sample
from vae import kl_divergence

LIMIT = 20_000  # training texts
MIXTURES = {  # name: number of Gaussians, covariances
    "one Gaussian": (1, "full"),
    "8 Gaussians, full": (8, "full"),
    "32 Gaussians, diagonal": (32, "diag"),
}


def compare_priors(train, test):
    """The KL of the test posteriors to each prior: rows of (name, (n,) nats, (n,) nats saved).

    train, test: (mu, logvar), (n, Z) each, float64.
    """
    z_train, z, zero = sample(*train, draw=1), sample(*test), torch.zeros_like(test[0])
    kl = kl_divergence(*test).sum(1)
    rows = [("N(0, I)", kl, torch.zeros_like(kl))]
    for name, (count, covariance) in MIXTURES.items():
        mixture = GaussianMixture(count, covariance_type=covariance, max_iter=500, random_state=0)
        log_m = torch.from_numpy(mixture.fit(z_train.numpy()).score_samples(z.numpy()))
        saved = log_m - metrics.log_normal(z, zero, zero)
        rows.append((name, kl - saved, saved))
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(prog="prior.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="run folder of train.py, of phase 2")
    args = parser.parse_args(argv)
    data.replace_unprintable()
    try:
        config, model, read = metrics.load_run(args.run)
        if model.latent_dim == 0:
            raise InputError("a language model; it must be a VAE, which has posteriors")
        corpora = [read("train", limit=min(LIMIT, config["limit"] or LIMIT)), read("test")]
        least = max(count for count, _ in MIXTURES.values())
        if len(corpora[0]) < least:
            raise InputError(f"{len(corpora[0])} training texts; there must be at least {least}")
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"prior.py: cannot use {args.run}: {error}")
    train, test = ([x.double() for x in posteriors(model, corpus)] for corpus in corpora)
    print(f"{len(corpora[0]):,} training texts, {len(corpora[1]):,} test texts, nats per sentence")
    print(f"{'prior':24}{'KL':>14}{'saved':>16}")
    for name, *columns in compare_priors(train, test):
        cells = [f"{x.mean():z.3f}±{x.std() / math.sqrt(len(x)):.3f}" for x in columns]
        print(f"{name:24}{cells[0]:>14}{cells[1] if name in MIXTURES else '-':>16}")
    mi, n = metrics.mutual_information(*test, sample(*test)), len(corpora[1])
    print(f"{'any prior, at least':24}{mi:8.3f} (MI; n {n:,}, at most ln n = {math.log(n):.3f})")


if __name__ == "__main__":
    main()
