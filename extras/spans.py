"""The batches of `extras.pretrain`: corrupted spans, or whole texts."""

import numpy as np
import torch

import data

SPANS, LM = 11, 12  # what its random numbers are for, beside the uses in data.py


def corrupt_spans(tokens, sentinels, eos_id, rng, density=0.15, mean_span=3):
    """Replace spans of tokens by sentinels.

    Args:
        tokens: (T,) of one text, without </s>.
        sentinels: ids of <extra_id_0>, <extra_id_1>, ...
        rng: a numpy Generator.
    Returns: inputs, targets: 1-d arrays. Inputs have a sentinel for each span; targets have each
        sentinel and its span, then one more sentinel; both end in </s>.
    """
    lost = max(1, round(len(tokens) * density))
    spans = max(1, min(round(lost / mean_span), len(tokens) - lost, len(sentinels) - 1))
    # `lost` tokens are cut into `spans` pieces of at least one, the others into spans + 1 gaps.
    cuts = np.sort(rng.choice(lost - 1, spans - 1, replace=False)) + 1
    sizes = np.diff([0, *cuts, lost])
    stays = len(tokens) - lost
    bars = np.sort(rng.choice(stays + 1, spans, replace=False)) if stays > 0 else np.zeros(1, int)
    gaps = np.diff([0, *bars, stays])
    inputs, targets, at = [], [], 0
    for gap, size, sentinel in zip(gaps, sizes, sentinels, strict=False):
        inputs += [*tokens[at : at + gap], sentinel]
        targets += [sentinel, *tokens[at + gap : at + gap + size]]
        at += gap + size
    return np.array([*inputs, *tokens[at:], eos_id]), np.array([*targets, sentinels[spans], eos_id])


def pretraining_batch(corpus, epoch, index, *, sentinels, eos_id, seed, lm_share):
    """The texts `index`, corrupted with the noise of this epoch, a function of (seed, epoch, text).

    With probability `lm_share`, drawn for its first text, it is a batch of language modelling
    instead: the encoder reads </s> alone, and the decoder writes the whole texts.
    """
    if np.random.default_rng([seed, epoch, LM, index[0]]).random() < lm_share:
        pairs = [(np.array([eos_id]), corpus.row(i)) for i in index]
    else:
        pairs = []
        for i in index.tolist():
            rng = np.random.default_rng([seed, epoch, SPANS, i])
            pairs.append(corrupt_spans(corpus.row(i)[:-1], sentinels, eos_id, rng))
    ids, mask = data.pad([inputs for inputs, _ in pairs], corpus.pad_id)
    labels, _ = data.pad([targets for _, targets in pairs], corpus.pad_id)
    return data.Batch(ids, mask, labels, torch.as_tensor(index), torch.zeros(len(index), 0))
