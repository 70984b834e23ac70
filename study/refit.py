"""How good is the untempered posterior? The encoder of a run is trained on at KL weight 1.

    python -m study.refit RUN [--limit 800] [--out study/results/TEXT/ROW/SEED/refit.json]

The decoder stays as it is; the encoder, W_mu and W_logvar descend along the gradient of -ELBO, with
weight 1 and without threshold, deletion and dropout, until that of the validation texts rests. Then
q itself is the best posterior at weight 1 that this encoder can give. Prints three columns: q as
the run trained it, q untempered in closed form (`metrics.untemper`), and q refitted.

KL of the posterior should be the same in all three: it belongs to the decoder. Where it differs,
the number of samples is too small for the proposal (see `iw_ess`).
"""

import argparse
import copy
import itertools
from functools import partial
from pathlib import Path

import torch

import data
import metrics
import train

ROWS = ("rec", "kl", "neg_elbo", "nll", "kl_posterior", "iw_ess")
RATE = 1e-3  # of AdamW
CHECK_EVERY = 200  # steps
PATIENCE = 3  # checks without a better bound, after which it rests
SAMPLES = 20  # per test text


def bound(model, corpus):
    """-ELBO of the first 500 texts at weight 1, nats."""
    (found,) = metrics.untempered_bounds(model, corpus, (1.0,), 500, 0, metrics.MOST).values()
    return found


def refit(model, corpus, valid):
    """A copy of the model, whose encoder is trained on at weight 1; prints the bounds."""
    model = copy.deepcopy(model).eval().requires_grad_(True)  # eval: without dropout
    model.freeze_decoder()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, fused=True)
    best, best_state, worse = bound(model, valid), copy.deepcopy(model.state_dict()), 0
    print(f"step 0: -ELBO of validation texts {best:.2f}", flush=True)
    for step, batch in enumerate(batches(corpus, model.latent_dim), 1):
        rec, kl = model(batch.to(model.device))
        (rec + kl.sum(1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, train.MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step % CHECK_EVERY == 0:
            now = bound(model, valid)
            print(f"step {step}: -ELBO of validation texts {now:.2f}", flush=True)
            worse += 1
            if now < best - 0.01:
                best, best_state, worse = now, copy.deepcopy(model.state_dict()), 0
            if worse == PATIENCE:
                break
    model.load_state_dict(best_state)
    return model.requires_grad_(False)


def batches(corpus, latent_dim):
    """Yields batches of 32 texts, epoch after epoch."""
    noise = {"denoise": 0.0, "latent_dim": latent_dim, "seed": 0}
    for epoch in itertools.count():
        load = partial(data.training_batch, corpus, epoch, **noise)
        yield from data.prefetch(load, data.epoch_order(corpus.lengths, 32, 0, epoch))


def column(model, corpus, weight, suffix=""):
    """{name of ROWS: [value, error]} of the posterior that `weight` untempers.

    suffix: of the measures of r, not of q.
    """
    measured, found = metrics.evaluate(model, corpus, weight, SAMPLES), {}
    for name in ROWS:
        key = name + suffix if name in ("rec", "kl", "neg_elbo") else name
        found[name] = [measured[key], measured[key + "_se"]]
    return found


def main(argv=None):
    parser = argparse.ArgumentParser("refit.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("run", metavar="RUN", help="finished run folder of phase 2")
    flag("--limit", type=data.number(int, 2), help="measure the first N test texts only")
    flag("--dataset", help="where the texts are, if they have moved")
    flag("--out", metavar="FILE", type=Path, help="also write the columns there, as JSON")
    args = parser.parse_args(argv)
    with data.command("refit.py"):
        if args.out and args.out.is_dir():
            raise data.InputError(f"--out is {args.out}, a folder; it must be a file")
        if args.out:  # before hours are spent
            args.out.parent.mkdir(parents=True, exist_ok=True)
        config, model, read = metrics.load_run(args.run, dataset=args.dataset)
        if model.latent_dim == 0 or config["phase"] == 1:
            raise data.InputError(f"{args.run} is no phase 2 with a latent")
        corpus, valid = read("train", config["limit"]), read("valid")
        test = read("test", args.limit)
        if len(test) < 2:
            raise data.InputError(f"{args.run} has one test text; an error needs at least two")
        weight = metrics.find_weight(model, valid)
        refitted = refit(model, corpus, valid)
        columns = {
            "q": column(model, test, 1.0),
            "untempered": column(model, test, weight, "_untempered"),
            "refitted": column(refitted, test, 1.0),
        }
        weights = f"untempered by w = {weight:.3g}"
        weights += f", the refitted encoder by {metrics.find_weight(refitted, valid):.3g}"
        print(f"{len(test):,} test texts, K = {SAMPLES}; {weights}")
        print(" " * 14 + "".join(f"{name:>16}" for name in columns))
        for name in ROWS:
            pairs = [posterior[name] for posterior in columns.values()]
            cells = [f"{value:.2f}±{error:.2f}" for value, error in pairs]
            print(f"{name:14}" + "".join(f"{cell:>16}" for cell in cells))
        if args.out:
            content = {"texts": len(test), "iw_samples": SAMPLES, "weight": weight} | columns
            data.write_json(args.out, content)


if __name__ == "__main__":
    main()
