"""Is it the encoder that limits a run? Each sentence's posterior is refined before anything is measured.

    python -m extras.refine RUN [--steps 50]

mu and logvar descend from the encoder's along the gradient of the sentence's own -ELBO, the decoder as it is. What this
takes from the gap between -ELBO and NLL was the encoder's part; what it leaves is that of a diagonal Gaussian
(Cremer et al. 2018). Writes metrics-refined.json into the run folder.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

import data
import metrics
from train import at_least

REFINEMENT = 5  # the use of its stream of random numbers, beside those in data.py


@torch.enable_grad()
def refine_posterior(model, batch, steps, seed=0):
    """The encoder's mu and logvar, (B, Z) each, after gradient descent on each sentence's own -ELBO.

    `steps` of Adam with eps and -eps; the learning rate falls from 0.03 to 0. A `posterior` of `metrics.evaluate`.
    """
    mu, logvar = (x.detach().clone().requires_grad_() for x in model.encode(batch.ids, batch.mask))
    optimizer = torch.optim.Adam([mu, logvar])
    noise = data.latent_noise(mu.shape[1], seed, 0, batch.index, REFINEMENT)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        eps = next(noise).to(mu)
        recs = [model.rec(model.reparameterize(mu, logvar, eps=e), batch.labels) for e in (eps, -eps)]
        neg_elbo = sum(recs) / 2 + metrics.kl_divergence(mu, logvar).sum(1)  # (B,)
        mu.grad, logvar.grad = torch.autograd.grad(neg_elbo.sum(), (mu, logvar))
        optimizer.step()
    return mu.detach(), logvar.detach()


def main(argv=None):
    parser = argparse.ArgumentParser(prog="refine.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="Run folder of train.py, of phase 2.")
    parser.add_argument("--steps", type=at_least(1), default=50, metavar="N", help="Steps of Adam per sentence (50).")
    parser.add_argument("--iw-samples", type=at_least(1), metavar="K", help="Importance samples per sentence (100).")
    args = parser.parse_args(argv)
    try:
        measured = metrics.evaluate_run(
            args.run, args.iw_samples, posterior=partial(refine_posterior, steps=args.steps)
        )
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"refine.py: cannot use {args.run}: {error}")
    measured["refine"] = args.steps
    Path(args.run, "metrics-refined.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(metrics.format_table({f"{args.run}, refined": measured}))


if __name__ == "__main__":
    main()
