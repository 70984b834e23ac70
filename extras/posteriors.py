"""The posteriors of all texts of a corpus, for the extras that need them all at once."""

import torch

import data


@torch.no_grad()
def posteriors(model, corpus, batch_size=64):
    """mu and logvar of each text of a corpus: (n, Z) each, on the CPU."""
    mu, logvar = torch.zeros(2, len(corpus), model.latent_dim)
    for index in data.evaluation_order(corpus.lengths, batch_size):
        batch = data.make_batch(corpus, index)
        of_batch = model.encode(*batch.to(model.device)[:2])
        mu[batch.index], logvar[batch.index] = (x.cpu() for x in of_batch)
    return mu, logvar


def sample(mu, logvar, draw=0):
    """One z of each posterior (n, Z): (n, Z), a function of the draw and the number of the text.

    Draw 0 is the z of `metrics.measure` with seed 0. Texts of two splits that have the same number
    have the same noise, unless their draws differ.
    """
    eps = data.latent_noise(mu.shape[1], 0, 0, torch.arange(len(mu)), data.POSTERIOR, draw)
    return mu + (logvar / 2).exp() * eps
