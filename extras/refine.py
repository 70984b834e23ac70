"""Is it the encoder that limits a run? Each sentence's posterior is refined before it is measured.

    python -m extras.refine RUN [--steps 50]

mu and logvar descend from the encoder's along the gradient of the sentence's own -ELBO, the decoder
as it is. What this takes from the gap between -ELBO and NLL was the encoder's part; what it leaves
is that of a diagonal Gaussian (Cremer et al. 2018). Writes RUN-refined.json beside RUN.
"""

import argparse
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

import data
import metrics
from extras.flags import at_least
from vae import kl_divergence

REFINEMENT = 10  # the use of its random numbers, beside those in data.py


@torch.enable_grad()
def refine_posterior(model, encode, input_ids, attention_mask, steps):
    """The mu and logvar of `encode`, (B, Z) each, after descent on each sentence's own -ELBO.

    `steps` of Adam with eps and -eps; the learning rate falls from 0.03 to 0. The texts are both
    input and target: evaluation deletes nothing. The noise depends on a text's ids alone.
    """
    mu, logvar = (x.detach().clone().requires_grad_() for x in encode(input_ids, attention_mask))
    optimizer = torch.optim.Adam([mu, logvar])
    rows = zip(input_ids.cpu().numpy(), attention_mask.sum(1).tolist(), strict=True)
    texts = np.array([zlib.crc32(ids[:length].tobytes()) for ids, length in rows])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        eps = data.latent_noise(mu.shape[1], 0, 0, texts, REFINEMENT, draw=step).to(mu)
        recs = [model.rec(model.reparameterize(mu, logvar, eps=e), input_ids) for e in (eps, -eps)]
        neg_elbo = sum(recs) / 2 + kl_divergence(mu, logvar).sum(1)  # (B,)
        mu.grad, logvar.grad = torch.autograd.grad(neg_elbo.sum(), (mu, logvar))
        optimizer.step()
    return mu.detach(), logvar.detach()


def refine(model, steps):
    """Replace a T5VAE's `encode`, in place, by one that refines what it returns."""
    encode = model.encode

    def refined(input_ids, attention_mask):
        return refine_posterior(model, encode, input_ids, attention_mask, steps)

    model.encode = refined
    return model


def main(argv=None):
    parser = argparse.ArgumentParser(prog="refine.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("run", metavar="RUN", help="run folder of train.py, of phase 2")
    flag("--steps", type=at_least(1), default=50, metavar="N", help="steps per sentence (50)")
    flag("--iw-samples", type=at_least(1), default=100, metavar="K", help="samples per sentence")
    args = parser.parse_args(argv)
    data.replace_unprintable()
    try:
        _, model, read = metrics.load_run(args.run)
        if model.latent_dim == 0:
            raise data.InputError("a language model has no posterior to refine")
        refine(model, args.steps)
        measured = metrics.evaluate(model, read("test"), 64, args.iw_samples, thorough=True)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"refine.py: cannot use {args.run}: {error}")
    measured["refine"] = args.steps
    run = Path(args.run).resolve()
    data.write_json(run.with_name(f"{run.name}-refined.json"), measured)
    print(metrics.format_table({f"{args.run}, refined": measured}))


if __name__ == "__main__":
    main()
