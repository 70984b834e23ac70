"""Tests: pytest test_vae.py. No network, no GPU; every invariance comes with a control that must break it."""

import contextlib
import copy
import errno
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import sys
import tarfile
import threading
import warnings
import zipfile
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import hub_mixin
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    ByT5Tokenizer,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    MT5Config,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
)
from transformers.modeling_outputs import BaseModelOutput

import data
import metrics
import train
import vae
from vae import POOLINGS, T5VAE, pool

SIZE = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
PAD, EOS = 0, 1


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def tiny_config(**changes):
    return T5Config(**SIZE | {"decoder_start_token_id": PAD, "dropout_rate": 0.0} | changes)


def tiny_vae(seed=0, pooling="max", pool_layers="last", **changes):
    torch.manual_seed(seed)
    vae = T5VAE(tiny_config(**changes).to_dict(), 8, pooling, pool_layers).eval()
    torch.nn.init.normal_(vae.w_proj.weight, std=1.0)  # so that z is heard
    return vae


def random_texts(batch, length, seed=0, vocab=64):
    """ids, mask: rows of lengths from 2 to `length` that end in </s>; the last row is the longest."""
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(2, length, batch - 1), length]
    return data.pad([np.append(rng.integers(3, vocab, n - 1), EOS) for n in lengths], PAD)


def run(*flags):
    """train.main with the flags of a small, quick run."""
    train.main([str(f) for f in (*flags, "--log-every", 2, "--iw-samples", 2, "--batch-size", 16)])


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """A data set of one's own: three small files."""
    folder = tmp_path_factory.mktemp("own")
    for split, size in zip(data.SPLITS, (96, 24, 24), strict=True):
        texts = islice(data.read_texts("grammar", split), size)
        (folder / f"{split}.txt").write_text("\n".join(texts) + "\n")
    return folder


@pytest.fixture(scope="session")
def runs(corpus_dir, tmp_path_factory):
    """A folder with phase0, phase1 and phase2, made by one call."""
    out = tmp_path_factory.mktemp("runs")
    size = ("--d-model", 32, "--heads", 4, "--layers", 1, "--adam-eps", 1e-8)
    run("--dataset", corpus_dir, "--model", "tiny", "--phase", 0, 1, 2, "--epochs", 2, "--out", out, *size)
    return out


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(a, b, prefix=""):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a if name.startswith(prefix))


# ------------------------------------------------------------------------------ model


@pytest.mark.parametrize("changes", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}])
def test_without_memory_the_decoder_is_t5(changes):
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(tiny_config(**changes)).eval()
    labels, _ = random_texts(4, 9)
    z = torch.randn(4, 8)
    state = BaseModelOutput(torch.randn(4, 5, SIZE["d_model"]))
    with_cross = t5(encoder_outputs=state, labels=labels).logits
    for block in t5.decoder.block:
        torch.nn.init.zeros_(block.layer[1].EncDecAttention.o.weight)
    plain = t5(encoder_outputs=state, labels=labels).logits
    vae = T5VAE(t5.config.to_dict(), 8).eval()
    vae.load_state_dict(t5.state_dict(prefix="t5."), strict=False)
    assert not torch.allclose(plain, with_cross, atol=1e-3)
    torch.nn.init.zeros_(vae.w_proj.weight)
    torch.testing.assert_close(vae.decode(z, labels), plain, atol=1e-5, rtol=1e-5)


def test_one_key_of_attention_is_its_value():
    """The literal cross-attention over one key and value, query and all, adds what LatentCrossAttention adds."""
    torch.manual_seed(0)
    cross = T5ForConditionalGeneration(tiny_config()).decoder.block[1].layer[1].eval()
    vae = tiny_vae()
    ours = vae.t5.decoder.block[1].layer[1]
    ours.o = cross.EncDecAttention.o
    hidden, memory = torch.randn(3, 7, SIZE["d_model"]), vae.memory(torch.randn(3, 8))
    heads = memory[:, 1].view(3, 1, SIZE["num_heads"], SIZE["d_kv"]).transpose(1, 2)  # (B, A, 1, S): key and value
    query = cross.EncDecAttention.q(cross.layer_norm(hidden)).view(3, 7, SIZE["num_heads"], SIZE["d_kv"])
    attended = F.scaled_dot_product_attention(query.transpose(1, 2), heads, heads, scale=1.0)
    literal = hidden + cross.EncDecAttention.o(attended.transpose(1, 2).reshape(3, 7, -1))
    torch.testing.assert_close(ours(hidden, memory)[0], literal)
    assert (literal - hidden).abs().max() > 0.1


def test_one_sentence_one_latent():
    vae = tiny_vae()
    labels, _ = random_texts(4, 9)
    z = torch.randn(4, 8)
    logits = vae.decode(z, labels)
    moved = z.clone()
    moved[2] += 1
    change = (vae.decode(moved, labels) - logits).abs().amax((1, 2))
    assert change[2] > 1e-2, f"own latent must matter: {change}"
    assert change[[0, 1, 3]].max() == 0, f"another's must not: {change}"
    alone = vae.decode(z[:1], labels[:1])
    torch.testing.assert_close(alone, logits[:1], atol=1e-5, rtol=1e-5)
    jacobian = torch.autograd.functional.jacobian(vae.memory, z)  # (B, L, A*S, B, Z)
    own = torch.stack([jacobian[b, :, :, b] for b in range(4)])
    assert own.abs().min(dim=0).values.max() > 0
    assert torch.isclose(jacobian.abs().sum(), own.abs().sum())


@pytest.mark.parametrize("pool_layers", ["last", "all"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_and_other_sentences_change_nothing(pooling, pool_layers):
    for seed in range(5):
        vae = tiny_vae(seed, pooling, pool_layers)
        ids, mask = random_texts(3, 9, seed)
        mu, logvar = vae.encode(ids, mask)
        padded = F.pad(ids, (0, 6)), F.pad(mask, (0, 6))
        for a, b in zip(vae.encode(*padded), (mu, logvar), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(vae.encode(ids[:1], mask[:1])[0], mu[:1], atol=1e-5, rtol=1e-4)
        broken, _ = vae.encode(padded[0], torch.ones_like(padded[1]))
        assert (broken - mu).abs().max() > 1e-3, "the control: padding that counts must be seen"


@pytest.mark.parametrize("pool_layers", ["last", "all"])
def test_a_large_residual_stream_does_not_reach_the_latents(pool_layers):
    """Pretrained T5s carry inner states of hundreds; unnormalized, exp(logvar) would be infinite."""
    vae = tiny_vae(pool_layers=pool_layers)
    with torch.no_grad():
        vae.t5.shared.weight.mul_(1000)
    ids, mask = random_texts(4, 9)
    inner = vae.t5.encoder(ids, mask, output_hidden_states=True).hidden_states[1]
    assert inner.abs().max() > 1000, "the control: the states are large"
    assert max(x.abs().max() for x in vae.encode(ids, mask)) < 20


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0, -5.0], [3.0, -7.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, "max").tolist() == [[3.0, -5.0]]
    assert pool(hidden, mask, "mean").tolist() == [[2.0, -6.0]]
    assert pool(hidden, mask, "last").tolist() == [[3.0, -7.0]]


def test_rec_is_the_sum_over_real_tokens():
    vae = tiny_vae()
    labels, mask = random_texts(4, 9)
    z = torch.randn(4, 8)
    log_p = vae.decode(z, labels).log_softmax(-1).gather(2, labels[:, :, None])[:, :, 0]
    rec = vae.rec(z, labels)
    torch.testing.assert_close(rec, -(log_p * mask).sum(1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(vae.rec(z, F.pad(labels, (0, 5))), rec, atol=1e-4, rtol=1e-5)
    other = labels.clone()
    other[1, 0] = 3 + (other[1, 0] - 2) % 61
    changed = (vae.rec(z, other) - rec).abs()
    assert changed[1] > 1e-3
    assert changed[[0, 2, 3]].max() < 1e-4


def test_reparameterize():
    mu, logvar = torch.full((20000, 1), 3.0), torch.full((20000, 1), math.log(4.0))
    z = tiny_vae().reparameterize(mu, logvar, torch.Generator().manual_seed(0))
    assert abs(z.mean() - 3) < 0.05, z.mean()
    assert abs(z.std() - 2) < 0.05, z.std()  # exp(logvar / 2): a standard deviation, of a log variance
    assert torch.equal(z, tiny_vae().reparameterize(mu, logvar, torch.Generator().manual_seed(0)))


def test_freeze_decoder():
    vae = tiny_vae().freeze_decoder()
    trainable = {name for name, p in vae.named_parameters() if p.requires_grad}
    assert {"w_mu.weight", "w_logvar.weight"} < trainable
    assert all(name.startswith(("t5.encoder.", "w_mu", "w_logvar")) for name in trainable)


def test_loss_halves_on_one_batch():
    vae = tiny_vae().train()
    ids, mask = random_texts(8, 9)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        mu, logvar = vae.encode(ids, mask)
        loss = (vae.rec(mu, ids) + 0.01 * metrics.kl_divergence(mu, logvar).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses[::10]


# ------------------------------------------------------------------------------ objective


def test_kl_against_torch():
    mu, logvar = torch.randn(5, 3), torch.randn(5, 3)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    oracle = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(metrics.kl_divergence(mu, logvar), oracle)
    # By hand: mu 1, variance e: (1 + e - 1 - 1) / 2 = (e - 1) / 2.
    by_hand = metrics.kl_divergence(torch.tensor(1.0), torch.tensor(1.0)).item()
    assert by_hand == pytest.approx((math.e - 1) / 2)


def test_kl_threshold_holds_each_dimension_of_each_sentence():
    class Fixed:  # an encoder whose KL are 0.08, 0.5 and 2 nats, whatever it reads
        mu = torch.tensor([[0.4, 1.0, 2.0]], requires_grad=True)

        def encode(self, ids, mask):
            return self.mu, torch.zeros_like(self.mu)

        def reparameterize(self, mu, logvar, eps):
            return mu

        def rec(self, z, labels):
            return torch.zeros(1)

    objective = train.ELBO.__new__(train.ELBO)
    torch.nn.Module.__init__(objective)
    objective.model, objective.threshold = Fixed(), 0.3
    terms = objective(data.Batch(*[torch.zeros(1, 1)] * 4), None, 0.5)
    assert terms["kl"].item() == pytest.approx(2.58)
    assert terms["loss"].item() == pytest.approx(0.5 * (0.3 + 0.5 + 2))
    terms["loss"].sum().backward()
    assert Fixed.mu.grad.tolist() == [[0.0, pytest.approx(0.5), pytest.approx(1.0)]]


def test_kl_weight():
    def weights(schedule, steps):
        return [train.kl_weight(step, schedule, 100) for step in steps]

    assert weights("linear", (0, 25, 100, 500)) == [0, 0.25, 1, 1]
    assert weights("constant", (0, 25)) == [1, 1]
    # Four cycles of 25 steps: up over 12.5, at 1 for 12.5, and again from 0.
    assert weights("cyclical", (0, 5, 13, 24, 25, 30, 99, 100)) == pytest.approx([0, 0.4, 1, 1, 0, 0.4, 1, 1])


def test_phase_1_moves_the_encoder_alone_and_phase_2_the_rest(runs, tmp_path, corpus_dir):
    before = T5VAE.from_pretrained(runs / "phase1" / "model")
    run("--dataset", corpus_dir, "--phase", 1, "--init", runs / "phase1", "--epochs", 1, "--out", tmp_path / "one")
    run("--dataset", corpus_dir, "--phase", 2, "--init", runs / "phase1", "--epochs", 1, "--out", tmp_path / "two")
    one, two = (T5VAE.from_pretrained(tmp_path / name / "model") for name in ("one", "two"))
    for frozen in ("t5.decoder", "t5.shared", "t5.lm_head", "w_proj"):
        assert same_weights(before, one, frozen), frozen
        assert not same_weights(before, two, frozen), frozen
    for moving in ("t5.encoder.block", "w_mu", "w_logvar"):
        assert not same_weights(before, one, moving), moving


# ------------------------------------------------------------------------------ measures


def test_mutual_information_of_known_posteriors():
    n = 256
    apart = torch.arange(n)[:, None] * 100.0 * torch.ones(1, 4)
    small = torch.full((n, 4), -2.0)
    generator = torch.Generator().manual_seed(0)
    assert metrics.mutual_information(apart, small, generator).item() == pytest.approx(math.log(n), abs=0.2)
    assert metrics.mutual_information(0 * apart, 0 * small, generator).item() == pytest.approx(0, abs=0.2)
    # The split as a whole counts: its MI is not that of its first 16 sentences.
    first = metrics.mutual_information(apart[:16], small[:16], generator).item()
    assert first == pytest.approx(math.log(16), abs=0.5)


def test_active_units():
    mu = torch.tensor([[0.0, 0.0, 1.0], [0.141, 0.142, 1.0]])  # variances 0.00994, 0.01008 (n - 1), 0
    assert metrics.active_units(mu) == 1
    assert metrics.active_units(mu, threshold=0.009) == 2


@pytest.fixture(scope="session")
def trained(runs):
    return T5VAE.from_pretrained(runs / "phase2" / "model")


def test_evaluation_is_the_same_in_any_batches_and_touches_nothing(trained, corpus_dir):
    corpus = data.tokenize(data.read_texts(corpus_dir, "test"), trained.tokenizer)
    trained.train()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, many = (metrics.evaluate(trained, corpus, size, 3, thorough=True) for size in (1, 7))
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    assert trained.training
    assert one.pop("entropy") is many.pop("entropy") is None
    for name, value in one.items():
        assert many[name] == pytest.approx(value, rel=1e-4), name
    assert metrics.evaluate(trained, corpus, 7, 3, thorough=True, seed=1)["rec"] != many["rec"]


def test_refinement_lowers_the_bound_sentence_by_sentence(trained, corpus_dir):
    corpus = data.tokenize(data.read_texts(corpus_dir, "test"), trained.tokenizer)
    (batch,) = data.evaluation_batches(corpus, len(corpus))
    gaps = []
    for steps in (0, 5, 200):
        result = metrics.evaluate(trained, corpus, 7, 50, refine=steps)
        gaps.append(result["neg_elbo"] - result["nll_iw"])
        assert result["refine"] == steps
    assert gaps[0] > gaps[1] > 1.5 * gaps[2] > 0
    assert all(p.grad is None and p.requires_grad for p in trained.parameters())
    with torch.no_grad():
        whole = metrics.refine_posterior(trained, batch, *trained.encode(batch.ids, batch.mask), 5)
        one = data.make_batch(corpus, batch.index[3:4].numpy())
        alone = metrics.refine_posterior(trained, one, *trained.encode(one.ids, one.mask), 5)
    for a, b in zip(whole, alone, strict=True):
        torch.testing.assert_close(a[3:4], b, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(a[4:5], b, rtol=1e-2, atol=1e-2)


def test_a_bound_does_not_beat_the_entropy(trained):
    texts = list(islice(data.read_texts("grammar", "test"), 64))
    corpus = data.tokenize(texts, trained.tokenizer)
    result = metrics.evaluate(trained, corpus, iw_samples=5, entropy=data.GRAMMAR_ENTROPY)
    for bound in ("neg_elbo", "nll_iw"):
        assert result[bound] > result["entropy"] - 3 * result[bound + "_se"], bound
    assert result["nll_iw"] <= result["neg_elbo"]
    assert result["neg_elbo"] == pytest.approx(result["rec"] + result["kl"])


def test_grammar_entropy_is_that_of_its_sentences():
    """Factor by factor, what 20,000 draws show; and no two derivations make the same sentence."""
    drawn = list(data.grammar_factors("train"))
    entropy = 0.0
    for factor in data.FACTORS:
        counts = np.array(list(Counter(f[factor] for f in drawn).values())) / len(drawn)
        entropy -= (counts * np.log(counts)).sum()
    assert entropy == pytest.approx(data.GRAMMAR_ENTROPY, abs=0.02)
    sentences = {data.grammar_sentence(f): tuple(f.values()) for f in drawn}
    assert len(sentences) == len({tuple(f.values()) for f in drawn})
    assert 15 < data.GRAMMAR_ENTROPY < 35


# ------------------------------------------------------------------------------ data


def test_deletion_keeps_order_end_and_one_token():
    ids, mask = random_texts(64, 20)
    index = torch.arange(64)
    noisy, left = data.delete_tokens(ids, mask, 0.4, 0, 0, index)
    for row, kept, n, m in zip(ids.tolist(), noisy.tolist(), mask.sum(1), left.sum(1), strict=True):
        row, kept = row[:n], kept[:m]
        remaining = iter(row)
        assert all(token in remaining for token in kept), "what is left stands in the order it stood"
        assert kept[-1] == EOS
        assert len(kept) >= 2
    assert (noisy[left == 0] == PAD).all()
    rate = 1 - (left.sum() - 64) / (mask.sum() - 64)
    assert rate == pytest.approx(0.4, abs=0.08)
    again, _ = data.delete_tokens(F.pad(ids[:7], (0, 9)), F.pad(mask[:7], (0, 9)), 0.4, 0, 0, index[:7])
    width = min(again.shape[1], noisy.shape[1])
    assert torch.equal(again[:, :width], noisy[:7, :width]), "neither batch nor padding matters"
    assert not torch.equal(data.delete_tokens(ids, mask, 0.4, 0, 1, index)[1].sum(1), left.sum(1)), "epochs differ"
    with pytest.raises(ValueError, match="prob is 1"):
        data.delete_tokens(ids, mask, 1, 0, 0, index)


def test_span_corruption_loses_nothing():
    sentinels = list(range(1000, 1100))
    lost = total = 0
    for n in (1, 2, 3, 7, 40, 255):
        tokens = np.arange(10, 10 + n)
        inputs, targets = data.corrupt_spans(tokens, sentinels, EOS, np.random.default_rng(n))
        assert inputs[-1] == targets[-1] == EOS
        inside = {}
        for token in targets[:-1]:
            if token >= 1000:
                inside[token] = []
            else:
                inside[list(inside)[-1]].append(token)
        whole = [t for token in inputs[:-1] for t in (inside[token] if token >= 1000 else [token])]
        assert whole == tokens.tolist()
        lost, total = lost + sum(map(len, inside.values())), total + n
    assert lost / total == pytest.approx(0.15, abs=0.03)


# ------------------------------------------------------------------------------ runs


def test_a_run_folder_is_whole(runs):
    for phase in (0, 1, 2):
        folder = runs / f"phase{phase}"
        config = json.loads((folder / "config.json").read_text())
        assert config["phase"] == phase
        assert config["versions"]["torch"]
        assert len(config["data_sha256"]["train"]) == 64
        log = records(folder)
        assert [r["step"] for r in log if r["split"] == "train"] == [2, 4, 6, 8, 10, 12]
        assert [r["step"] for r in log if r["split"] == "valid"] == [0, 6, 12]
    result = json.loads((runs / "phase2" / "metrics.json").read_text())
    promised = "rec kl neg_elbo nll_iw iw_samples ppl_token ppl_word mi mi_n au rec_other rec_prior gain"
    promised += " efficiency exact_match token_accuracy sentences tokens words entropy"
    assert set(promised.split()) <= set(result)
    assert result["ppl_word"] == pytest.approx(math.exp(result["neg_elbo"] * result["sentences"] / result["words"]))
    assert result["gain"] == pytest.approx(result["nll_iw"] - result["rec"])
    kl_weights = [r["kl_weight"] for r in records(runs / "phase1") if "kl_weight" in r]
    assert set(kl_weights) == {0.0}


def test_the_saved_model_gives_the_printed_numbers(runs, capsys):
    folder = runs / "phase2"
    before = json.loads((folder / "metrics.json").read_text())
    metrics.main([str(folder), "--iw-samples", "2", "--batch-size", "5"])
    after = json.loads((folder / "metrics.json").read_text())
    assert after.pop("entropy") is None
    for name, value in after.items():
        assert before[name] == pytest.approx(value, rel=1e-4), name
    assert f"{before['kl']:.2f}" in capsys.readouterr().out


def test_equal_seeds_equal_weights(runs, corpus_dir, tmp_path):
    common = ("--dataset", corpus_dir, "--phase", 2, "--init", runs / "phase1", "--epochs", 1)
    run(*common, "--out", tmp_path / "a")
    run(*common, "--out", tmp_path / "b")
    run(*common, "--out", tmp_path / "c", "--seed", 1)
    a, b, c = (T5VAE.from_pretrained(tmp_path / name / "model") for name in "abc")
    assert same_weights(a, b)
    assert not same_weights(a, c)
    assert (tmp_path / "a" / "log.jsonl").read_text() == (tmp_path / "b" / "log.jsonl").read_text()


def test_language_model(runs, corpus_dir, tmp_path):
    common = ("--dataset", corpus_dir, "--phase", 2, "--epochs", 1, "--no-latent")
    run(*common, "--init", runs / "phase0", "--out", tmp_path / "lm")
    result = json.loads((tmp_path / "lm" / "metrics.json").read_text())
    assert result["kl"] == result["au"] == 0
    assert result["rec"] == pytest.approx(result["nll_iw"])
    assert result["rec"] == pytest.approx(result["rec_other"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset", "nowhere"), "no train.txt in .*nowhere; --dataset is"),
        (("--dataset", "{own}", "--model", "no/such-t5"), "no/such-t5.* neither a directory .*--model tiny"),
        (("--dataset", "{own}", "--phase", 2, "--out", "x"), "phase 2 starts from phase 1.*--phase 1"),
        (("--dataset", "{own}", "--phase", 1, "--init", "{runs}/phase1", "--latent-dim", 5), "latent_dim is 5.*32"),
        (("--dataset", "{own}", "--phase", 2, "--init", "{runs}/phase1", "--out", "{runs}/phase2"), "--overwrite"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, message, runs, corpus_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the hub is not waited for
    with pytest.raises(SystemExit) as stop:
        run(*(str(f).format(own=corpus_dir, runs=runs) for f in flags))
    assert re.search(message, stop.value.code), stop.value.code
    assert "\n" not in stop.value.code


@pytest.mark.parametrize(
    "flags", ["--phase 0", "--epochs 1 2 3", "--denoise 1", "--batch-size 0", "--lr nan", "--pool sum"]
)
def test_bad_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--dataset", "grammar", *flags.split()])
    assert stop.value.code == 2
    assert flags.split()[0].strip("-") in capsys.readouterr().err


def test_recipes_are_defaults():
    ptb = ["--dataset", "ptb"]
    paper, best = (vars(train.parse_args([*ptb, "--recipe", name])) for name in ("paper", "best"))
    assert vars(train.parse_args(ptb)) | {"argv": paper["argv"]} == paper
    # Appendix B, and the values that section 5.2 recommends.
    assert (paper["epochs"], paper["lr"], paper["adam_eps"]) == ([5, 3], [1e-3, 1e-3], 1e-3)
    assert (paper["kl_schedule"], paper["kl_anneal_epochs"]) == ("linear", 50)
    assert (paper["denoise"], paper["kl_threshold"], paper["freeze_decoder"]) == (0.15, 0.5, True)
    assert {k for k in paper if paper[k] != best[k]} == {"argv", "recipe", *train.RECIPES["best"]}
    # A flag that is given wins, wherever it stands.
    for flags in ["--denoise", "0.3", "--epochs", "2"], ["--epochs", "2", "--recipe", "best", "--denoise", "0.3"]:
        given = train.parse_args([*ptb, "--recipe", "best", *flags])
        assert (given.denoise, given.epochs, given.batch_size) == (0.3, [2, 2], 64)
        assert given.kl_anneal_epochs == 2


def test_commands_of_the_readme_and_the_results_exist():
    text = Path("README.md").read_text() + Path("RESULTS.md").read_text()
    commands = re.findall(r"^(?:\$ )?python train\.py(.*?)(?:#.*)?$", text, re.M)
    assert len(commands) >= 4
    for command in commands:
        train.parse_args(shlex.split(command) if "--dataset" in command else shlex.split(train.DEMO + command))


# ======================================== every shape of T5, and the latent space from the shell

CLI_TEXTS = ["the old king sells a boat", "a monk", "the tired queens will paint a red lamp in the garden", "she hides"]
CHECKPOINT_SIZE = {"d_model": 24, "d_ff": 32, "num_layers": 2, "decoder_start_token_id": 0}
SHAPES = {  # configuration, an LM head of its own
    "plain": (T5Config(**CHECKPOINT_SIZE, d_kv=6, num_heads=4), False),
    "plain, own head": (T5Config(**CHECKPOINT_SIZE, d_kv=6, num_heads=4), True),
    "gated, own head (v1.1)": (
        T5Config(**CHECKPOINT_SIZE, d_kv=6, num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        True,
    ),
    "gated, no scale, one head": (
        T5Config(**CHECKPOINT_SIZE, d_kv=6, num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        False,
    ),
    "A * S != D, 3 decoder layers": (T5Config(**CHECKPOINT_SIZE, d_kv=5, num_heads=3, num_decoder_layers=3), False),
    "bytes (ByT5)": (
        T5Config(
            **CHECKPOINT_SIZE, vocab_size=384, d_kv=6, num_heads=2, num_decoder_layers=1, feed_forward_proj="gated-gelu"
        ),
        True,
    ),
    "mT5": (MT5Config(**CHECKPOINT_SIZE, d_kv=5, num_heads=3, num_decoder_layers=1), True),
}


@pytest.fixture(scope="session")
def cli_tokenizer():
    return data.train_tokenizer([text for text in CLI_TEXTS for _ in range(3)], 80)


def save_t5(folder, config, own_head, cli_tokenizer):
    torch.manual_seed(0)
    config.vocab_size = max(len(cli_tokenizer), 384 if config.vocab_size == 384 else 0)
    t5 = AutoModelForSeq2SeqLM.from_config(config)
    if own_head:
        t5.lm_head.weight = torch.nn.Parameter(torch.randn_like(t5.lm_head.weight))
    with torch.no_grad():  # a random decoder repeats its token; one that listens less to it writes all sorts
        t5.shared.weight *= 0.1
        for name, weight in t5.decoder.named_parameters():
            if "SelfAttention" in name or "DenseReluDense" in name:
                weight *= 8**0.5
    t5.save_pretrained(folder)
    cli_tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session", params=SHAPES)
def checkpoint(request, tmp_path_factory, cli_tokenizer):
    """A folder with a random T5 of one of the shapes."""
    folder = tmp_path_factory.mktemp("t5")
    save_t5(folder, *SHAPES[request.param], ByT5Tokenizer() if "bytes" in request.param else cli_tokenizer)
    return folder


def from_t5(folder, latent_dim=5, **kwargs):
    """A VAE around it, in whose output z is loud."""
    torch.manual_seed(1)
    model = T5VAE.from_t5(folder, latent_dim, **kwargs).eval()
    with torch.no_grad():
        model.w_proj.weight *= 5
    return model


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def batch(checkpoint):
    model = from_t5(checkpoint)
    labels = torch.randint(3, 50, (4, 7))
    labels[:, -1], labels[1, 4:] = 1, torch.tensor([1, 0, 0])
    return model, torch.randn(4, 5), labels


# ---------------------------------------------------------------------------------------- every shape


def test_decode_is_t5s_own_forward_on_the_memory(batch):
    model, z, labels = batch
    start = model.t5.prepare_decoder_input_ids_from_labels(labels)
    with torch.no_grad():
        own = model.t5(encoder_outputs=BaseModelOutput(model.memory(z)), decoder_input_ids=start).logits
        torch.testing.assert_close(model.decode(z, labels), own, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(model.decode(z + 1, labels), own, atol=1e-2)
        nats = torch.nn.functional.cross_entropy(own.mT, labels.masked_fill(labels == 0, -100), reduction="none")
        torch.testing.assert_close(model.rec(z, labels), nats.sum(1))


def test_one_key_of_t5s_own_cross_attention_gives_the_same_logits(checkpoint, batch):
    model, z, labels = batch
    t5 = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    start = t5.prepare_decoder_input_ids_from_labels(labels)

    def literal(z):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer in range(t5.config.num_decoder_layers):
            one_key = model.memory(z)[:, layer].view(len(z), t5.config.num_heads, 1, t5.config.d_kv)
            cache.cross_attention_cache.update(one_key, one_key, layer)
            cache.is_updated[layer] = True
        unread = BaseModelOutput(torch.randn(len(z), 1, t5.config.d_model))
        return t5(encoder_outputs=unread, decoder_input_ids=start, past_key_values=cache).logits

    with torch.no_grad():
        torch.testing.assert_close(model.decode(z, labels), literal(z), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(model.decode(z, labels), literal(z.flip(0)), atol=1e-2)


def argmax_loop(model, z, steps, eos_id):
    """Greedy decoding without a cache: (B, steps + 1), the start token first, padded after `eos_id`."""
    ids = torch.zeros(len(z), 1, dtype=torch.long)
    over = torch.zeros(len(z), dtype=torch.bool)
    for _ in range(steps):
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=3)  # decode does not look at the last one
        chosen = model.decode(z, labels)[:, -1].argmax(1).masked_fill(over, 0)
        ids, over = torch.cat([ids, chosen[:, None]], 1), over | (chosen == eos_id)
    return ids


@torch.no_grad()
def test_generate_is_the_argmax_loop_in_a_batch_and_row_by_row(checkpoint):
    model = from_t5(checkpoint)
    z = torch.randn(12, 5)
    free = argmax_loop(model, z, 12, eos_id=-1)[:, 1:]
    # Random models do not write </s>: the token that ends the most rows, at different places, stands in for it.
    ends = {t: {r.index(t) for r in free.tolist() if t in r} for t in free.unique().tolist() if t}
    eos_id = max(ends, key=lambda t: len(ends[t]))
    expected = argmax_loop(model, z, 12, eos_id)
    assert len(ends[eos_id]) >= 3  # rows of different lengths
    assert len(expected.unique(dim=0)) > 3  # which z tells apart
    ids = model.generate(z, max_new_tokens=12, eos_token_id=eos_id)
    assert torch.equal(ids, expected[:, : ids.shape[1]])
    assert not expected[:, ids.shape[1] :].any()
    assert torch.equal(ids, model.generate(z, max_new_tokens=12, eos_token_id=eos_id, use_cache=False))
    beams = model.generate(z, max_new_tokens=12, eos_token_id=eos_id, num_beams=3)
    alone = model.generate(z[2:3], max_new_tokens=12, eos_token_id=eos_id, num_beams=3)[0]
    assert torch.equal(alone, beams[2, : len(alone)])
    for row, alone in zip(expected, z[:, None], strict=True):
        ids = model.generate(alone, max_new_tokens=12, eos_token_id=eos_id)[0]
        assert torch.equal(ids, row[: len(ids)])
        assert not row[len(ids) :].any()


def test_round_trip_keeps_every_bit(checkpoint, batch, tmp_path, cli_tokenizer):
    model, z, labels = batch
    # As new, as from the hub: a tokenizer that was loaded notes that it was, and from where.
    model.tokenizer = ByT5Tokenizer() if isinstance(model.tokenizer, ByT5Tokenizer) else copy.deepcopy(cli_tokenizer)
    model.save_pretrained(tmp_path / "a")
    again = T5VAE.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert {"config.json", "model.safetensors", "tokenizer_config.json", "README.md"} <= files(tmp_path / "a").keys()
    assert b"_name_or_path" not in files(tmp_path / "a")["config.json"]
    assert str(tmp_path.parent).encode() not in b"".join(files(tmp_path / "a").values())
    with torch.no_grad():
        assert torch.equal(model.decode(z, labels), again.decode(z, labels))
        for a, b in zip(model.encode(labels, labels != 0), again.encode(labels, labels != 0), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(model.generate(z, 6), again.generate(z, 6))
        assert model.tokenizer(CLI_TEXTS)["input_ids"] == again.tokenizer(CLI_TEXTS)["input_ids"]
        assert (model.t5.lm_head.weight is model.t5.shared.weight) == (
            again.t5.lm_head.weight is again.t5.shared.weight
        )
        again.w_mu.weight[0, 0] += 1
    again.save_pretrained(tmp_path / "c")
    assert files(tmp_path / "c")["model.safetensors"] != files(tmp_path / "a")["model.safetensors"]


def test_every_pretrained_weight_is_kept(checkpoint):
    t5, model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint), from_t5(checkpoint)
    kept = dict(model.t5.named_parameters())
    for name, weight in t5.named_parameters():
        name = name.replace("EncDecAttention.o.", "o.")  # noqa: PLW2901
        dead = ".layer.1." in name and "decoder" in name and not name.endswith(".o.weight")
        assert dead if name not in kept else torch.equal(weight, kept[name]), name


def test_texts_of_every_tokenizer(checkpoint):
    model = from_t5(checkpoint)
    mu, logvar = model.encode_texts(CLI_TEXTS, batch_size=3)
    for i, text in enumerate(CLI_TEXTS):  # the order stays, and a text does not feel its neighbors
        torch.testing.assert_close(mu[i], model.encode_texts([text])[0][0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mu[0], mu[1], atol=1e-3)
    assert logvar.shape == mu.shape == (4, 5)
    outputs = model.decode_texts(mu, batch_size=3, max_new_tokens=6)
    assert [type(output) for output in outputs] == [str] * 4
    assert outputs[3:] == model.decode_texts(mu[3:], max_new_tokens=6)


# ---------------------------------------------------------------------------------------- files


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory, cli_tokenizer):
    folder = tmp_path_factory.mktemp("t5")
    save_t5(folder, *SHAPES["gated, own head (v1.1)"], cli_tokenizer)
    t5 = AutoModelForSeq2SeqLM.from_pretrained(folder)
    with torch.no_grad():  # it writes words, not sentinels, which are not shown
        t5.lm_head.weight[cli_tokenizer.all_special_ids] = 0
    t5.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(t5_folder, tmp_path):
    from_t5(t5_folder).save_pretrained(tmp_path / "old")
    return tmp_path / "old"


def break_weights(folder, change):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def break_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("harm", "lacks"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "model.safetensors"),
        (lambda f: break_weights(f, lambda w: w.pop("w_mu.weight")), "w_mu.weight is missing"),
        (lambda f: break_weights(f, lambda w: w.update(w_logsd=torch.ones(1))), "w_logsd is not expected"),
        (lambda f: break_config(f, lambda c: c.pop("t5_config")), "t5_config"),
        (lambda f: break_config(f, lambda c: c.update(latent_dim=6)), "size mismatch for w_mu.weight"),
        (lambda f: break_config(f, lambda c: c["t5_config"].update(model_type="bart")), "'bart'"),
    ],
)
def test_folders_of_others_are_refused_by_name(saved, harm, lacks):
    T5VAE.from_pretrained(saved)
    harm(saved)
    with pytest.raises(ValueError, match=r"(?s)old.*" + lacks.replace(".", r"\.")) as caught:
        T5VAE.from_pretrained(saved)
    assert str(saved) in str(caught.value)


def test_a_t5_is_no_vae_and_others_are_no_t5(t5_folder, tmp_path):
    with pytest.raises(ValueError, match="holds no T5VAE: it lacks a config.json with t5_config"):
        T5VAE.from_pretrained(t5_folder)
    for config in BertConfig(), UMT5Config():
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"a {config.model_type}; it must be one of t5, mt5"):
            T5VAE.from_t5(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no/such/run is neither a folder here"):
        T5VAE.from_pretrained("no/such/run")


def test_generation_settings_of_the_checkpoint_do_not_stay(t5_folder, tmp_path):
    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    settings = GenerationConfig(num_beams=3, repetition_penalty=9.0, decoder_start_token_id=0, eos_token_id=1)
    settings.save_pretrained(tmp_path)
    z = torch.randn(4, 5)
    loud = from_t5(t5_folder)
    plain = loud.generate(z, 8)
    assert torch.equal(from_t5(tmp_path).generate(z, 8), plain)
    loud.t5.generation_config = settings
    assert not torch.equal(loud.generate(z, 8), plain)


# ---------------------------------------------------------------------------------------- run folder, card, hub


@pytest.fixture(scope="session")
def run_cli(t5_folder, tmp_path_factory):
    """A run folder as train.py leaves it."""
    folder = tmp_path_factory.mktemp("run")
    from_t5(t5_folder).save_pretrained(folder / "model")
    config = {"dataset": "grammar", "phase": 2, "command": "python train.py --dataset grammar"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps({"rec": 12.3456, "rec_se": 0.1, "entropy": None, "au": 5}))
    return folder


def test_a_run_folder_is_a_model_too(run_cli):
    for a, b in zip(
        T5VAE.from_pretrained(run_cli).parameters(), T5VAE.from_pretrained(run_cli / "model").parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_the_card_tells_the_run_and_travels(run_cli, tmp_path, monkeypatch):
    T5VAE.from_pretrained(run_cli).save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\ntags:")
    assert "`python train.py --dataset grammar`" in card
    assert "| rec | 12.346 |\n| au | 5 |\n" in card
    assert "5 latent dimensions, max pooling" in card
    assert "12.3" not in (run_cli / "model" / "README.md").read_text()  # saved before it was measured
    pushed = {}

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **kwargs):
            pushed[repo_id] = files(folder_path)

    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    T5VAE.from_pretrained(tmp_path / "a").push_to_hub("me/sentences")
    assert pushed["me/sentences"] == files(tmp_path / "a")


# ---------------------------------------------------------------------------------------- command line


@pytest.fixture
def cli(run_cli, capsys, monkeypatch):
    """Runs a command on the run; returns the lines on stdout. What stderr says is in `cli.err`."""

    def call(command, *args, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        vae.main([command, str(run_cli), "--max-length", "9", *map(str, args)])
        out, call.err = capsys.readouterr()
        return out.splitlines()

    return call


def refusal(cli, capsys, *args):
    with pytest.raises(SystemExit) as caught:
        cli(*args)
    return caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err


def greedy(run_cli, z):
    return T5VAE.from_pretrained(run_cli).decode_texts(z, max_new_tokens=9)


def test_reconstruct_reads_arguments_files_and_stdin(run_cli, cli, tmp_path):
    (tmp_path / "texts").write_text("\n".join(CLI_TEXTS) + "\n")
    with warnings.catch_warnings(action="ignore"):
        expected = greedy(run_cli, T5VAE.from_pretrained(run_cli).encode_texts(CLI_TEXTS, max_length=9)[0])
    assert len(set(expected)) > 2  # else order would not show
    lines = "\n".join(CLI_TEXTS).encode()
    assert cli("reconstruct", *CLI_TEXTS) == expected
    assert cli("reconstruct", "--file", tmp_path / "texts", "--batch-size", 1) == expected
    assert cli("reconstruct", stdin=lines) == expected
    assert cli("reconstruct", "-", stdin=lines.replace(b"\n", b"\r\n")) == expected
    assert cli("reconstruct", CLI_TEXTS[0], "-", stdin="\n".join(CLI_TEXTS[1:]).encode()) == expected
    rows = [json.loads(line) for line in cli("reconstruct", "--json", *CLI_TEXTS)]
    assert rows == [{"text": text, "output": output} for text, output in zip(CLI_TEXTS, expected, strict=True)]


def test_reconstruct_samples_the_posterior_by_seed(cli):
    first = cli("reconstruct", "--samples", 5, *CLI_TEXTS[:2], "--json")
    assert [json.loads(line)["text"] for line in first] == [CLI_TEXTS[0]] * 5 + [CLI_TEXTS[1]] * 5
    assert len(set(first)) > 2
    assert first == cli("reconstruct", "--samples", 5, *CLI_TEXTS[:2], "--json", "--seed", 0)
    assert first != cli("reconstruct", "--samples", 5, *CLI_TEXTS[:2], "--json", "--seed", 1)


def test_64_samples_are_one_call(cli, monkeypatch):
    sizes, generate = [], T5VAE.generate
    monkeypatch.setattr(T5VAE, "generate", lambda self, z, **k: sizes.append(len(z)) or generate(self, z, **k))
    lines = cli("sample", "-n", 64)
    assert (sizes, len(lines)) == ([64], 64)
    assert len(set(lines)) > 10
    assert cli("sample", "-n", 64, "--batch-size", 40) == lines
    assert sizes[1:] == [40, 24]


@pytest.mark.parametrize("flags", [["--temperature", 2], ["--top-k", 5], ["--top-p", 0.9]])
def test_decoding_options_reach_generate(cli, monkeypatch, flags):
    plain, seen, generate = cli("sample"), {}, T5VAE.generate
    monkeypatch.setattr(T5VAE, "generate", lambda self, z, **k: seen.update(k) or generate(self, z, **k))
    noisy = cli("sample", *flags)
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert seen == off | {flags[0][2:].replace("-", "_"): flags[1]} | {
        "do_sample": True,
        "num_beams": 1,
        "max_new_tokens": 9,
    }
    assert noisy != plain  # the same latents, other tokens
    assert noisy == cli("sample", *flags)
    assert cli("sample", "--top-k", 1) == plain
    cli("sample", "--num-beams", 3)
    assert seen["num_beams"] == 3


@pytest.mark.parametrize("flags", [[], ["--spherical"]])
def test_an_interpolation_ends_in_the_reconstructions(cli, flags):
    lines = cli("interpolate", *CLI_TEXTS[:2], "--steps", 6, *flags)
    ends = cli("reconstruct", *CLI_TEXTS[:2])
    assert len(lines) == 6
    assert [lines[0], lines[-1]] == ends
    assert ends[0] != ends[1]


def test_interpolate_goes_straight_or_round():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    line, arc = vae.interpolate(a, b, 5), vae.interpolate(a, b, 5, spherical=True)
    for path in line, arc:
        assert torch.equal(path[0], a)
        torch.testing.assert_close(path[-1], b)
    torch.testing.assert_close(line[2], torch.tensor([1.5, 1.5]))
    torch.testing.assert_close(arc.norm(dim=1), torch.full((5,), 3.0))
    torch.testing.assert_close(torch.atan2(arc[:, 1], arc[:, 0]), torch.linspace(0, torch.pi / 2, 5))
    for other in a, 2 * a, -a:  # no angle to turn by
        torch.testing.assert_close(vae.interpolate(a, other, 3, True), vae.interpolate(a, other, 3))


def test_arithmetic_adds_the_difference_of_the_means(run_cli, cli, tmp_path):
    (tmp_path / "from").write_text(f"{CLI_TEXTS[0]}\n\n{CLI_TEXTS[1]}\n")
    (tmp_path / "to").write_text("she hides\n")
    groups = ["--from", tmp_path / "from", "--to", tmp_path / "to"]
    mu, _ = T5VAE.from_pretrained(run_cli).encode_texts([*CLI_TEXTS[:2], "she hides", "a boat"])
    moved = mu[3] + 2 * (mu[2] - mu[:2].mean(0))
    assert cli("arithmetic", *groups, "--k", 2, "a boat") == greedy(run_cli, moved[None])
    assert (
        cli("arithmetic", *groups, "--k", 0, "a boat") == cli("reconstruct", "a boat") != greedy(run_cli, moved[None])
    )


def test_neighbors_come_nearest_first(run_cli, cli, tmp_path):
    lines = [*CLI_TEXTS, "a boat", "", "the garden", "a monk sells"]
    (tmp_path / "lines").write_text("\n".join(lines))
    rows = [line.split("\t") for line in cli("neighbors", tmp_path / "lines", "a boat", "-n", 4)]
    texts = [line for line in lines if line]
    with warnings.catch_warnings(action="ignore"):
        mu, _ = T5VAE.from_pretrained(run_cli).encode_texts(texts, max_length=9)
    distance = (mu - mu[4]).norm(dim=1)
    assert [text for _, text in rows] == [texts[i] for i in distance.argsort()[:4]]
    assert rows[0] == ["0.000", "a boat"]
    assert float(rows[1][0]) == pytest.approx(distance.sort().values[1].item(), abs=1e-3)
    assert len(cli("neighbors", "-", "a boat", stdin=b"a monk\nshe\n")) == 2


def test_traverse_moves_one_dimension(run_cli, cli):
    mu, _ = T5VAE.from_pretrained(run_cli).encode_texts(["a boat"])
    z = mu.repeat(3, 1)
    z[:, 4] = torch.tensor([-3.0, 0.0, 3.0])
    expected = [f"4\t{v}\t{text}" for v, text in zip(("-3.000", "0.000", "3.000"), greedy(run_cli, z), strict=True)]
    assert cli("traverse", "a boat", "--dim", 4, "--steps", 3) == expected
    assert len({line.split("\t")[2] for line in expected}) > 1


def test_traverse_takes_the_most_active_dimensions(cli, monkeypatch):
    encode = T5VAE.encode
    scale = torch.tensor([1, 10, 0.001, 100, 0.1])
    monkeypatch.setattr(T5VAE, "encode", lambda self, *a: (encode(self, *a)[0] * scale, encode(self, *a)[1]))
    lines = cli("traverse", "a boat", "--steps", 2)
    assert [int(line.split("\t")[0]) for line in lines[::2]] == [3, 1, 0, 4, 2]


def test_encode_writes_arrays_or_json_lines(run_cli, cli, tmp_path):
    texts = ["a monk", "", "the garden"]  # an empty line keeps its row
    mu, logvar = T5VAE.from_pretrained(run_cli).encode_texts(texts)
    (tmp_path / "texts").write_text("\n".join(texts) + "\n")
    assert cli("encode", tmp_path / "texts", "-o", tmp_path / "out.npz") == []
    with np.load(tmp_path / "out.npz") as arrays:
        np.testing.assert_array_equal(arrays["mu"], mu)
        np.testing.assert_array_equal(arrays["logvar"], logvar)
    rows = [json.loads(line) for line in cli("encode", stdin=b"a monk\n\nthe garden\n")]
    assert [row["text"] for row in rows] == texts
    np.testing.assert_allclose([row["mu"] for row in rows], mu, rtol=1e-6)


def test_no_text_long_texts_and_unknown_characters(cli):
    assert cli("reconstruct", stdin=b"") == []
    assert cli.err == ""
    long = "the old king sells a boat " * 9
    assert len(cli("reconstruct", "a boat", long)) == 2
    assert cli.err == "vae.py: 1 of 2 texts longer than 9 tokens: cut\n"
    assert cli("reconstruct", long) == cli("reconstruct", long + long)
    assert len(cli("reconstruct", "a ☃ boat", "a <unk> boat", "\udcff boat")) == 3
    assert cli.err == "vae.py: 2 of 3 texts with unknown characters\n"
    assert len(cli("reconstruct", stdin=b"\xff\xfe boat\nboat")) == 2


def test_unknown_tokens_and_line_ends_in_outputs(run_cli, cli, monkeypatch):
    model = T5VAE.from_pretrained(run_cli)
    ids = [0, *model.tokenizer("a boat", add_special_tokens=False)["input_ids"], 2, 1, 0, 0]
    monkeypatch.setattr(T5VAE, "generate", lambda self, z, **kwargs: torch.tensor([ids]))
    assert model.decode_texts(torch.zeros(1, 5))[0].split() == ["a", "boat", "<unk>"]
    assert vae.show({"text": "x", "output": "a\nb\tc"}, False) == "a b c"
    assert json.loads(vae.show({"output": "a\nb\tc"}, True)) == {"output": "a\nb\tc"}


def test_refusals_are_one_line(run_cli, cli, capsys, tmp_path):
    assert "nothing" in refusal(cli, capsys, "reconstruct", "--file", tmp_path / "nothing")
    (tmp_path / "empty").write_text("\n\n")
    assert "empty holds no text" in refusal(cli, capsys, "neighbors", tmp_path / "empty", "a boat")
    assert refusal(cli, capsys, "traverse", "a", "--dim", 5) == "vae.py: --dim is 5; it must be in [0, 5)"
    assert "--top-p: 2 is not in" in refusal(cli, capsys, "sample", "--top-p", 2)
    with pytest.raises(SystemExit, match=f"^vae.py: {tmp_path} holds no T5VAE"):
        vae.main(["sample", str(tmp_path)])


def test_a_closed_pipe_ends_quietly(run_cli, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as caught:
            vae.main(["sample", str(run_cli), "--max-length", "4"])
    assert caught.value.code == 141
    assert capsys.readouterr().err == ""


# ======================================== data sets, corpora, noise, batches

# ---------------------------------------------------------------------------------------- fetching


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; a path in `server.cuts` is cut there, once; Range is honoured if `server.resumes`."""

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if self.server.resumes else 0
        self.server.log.append((self.path, start))
        body = self.server.files.get(self.path)
        if body is None or start >= max(1, len(body)):
            self.send_error(404 if body is None else 416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : self.server.cuts.pop(self.path, len(body))])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.cuts, server.resumes, server.log = {}, {}, True, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


SIZES = {"train": 9000, "valid": 20, "test": 30}
CORPUS_TEXTS = {s: "".join(f"{s} text number {i}\n" for i in range(n)).encode() for s, n in SIZES.items()}
SHA = {split: "sha256:" + hashlib.sha256(text).hexdigest() for split, text in CORPUS_TEXTS.items()}


def source(monkeypatch, urls, checksums=SHA):
    monkeypatch.setitem(data.SOURCES, "ptb", data.Source("some terms", urls, checksums))


def serve(server, folder, texts=CORPUS_TEXTS):
    server.files |= {f"/{folder}/{split}.txt": text for split, text in texts.items()}
    return f"{server.url}/{folder}/{{split}}.txt"


def fetched(tmp_path):
    """The splits that are there and right; nothing else may be there but the list of checksums."""
    files = {path.name: path.read_bytes() for path in (tmp_path / "ptb").iterdir()}
    files.pop("SHA256SUMS", None)
    assert all(files[name] == CORPUS_TEXTS[name[:-4]] for name in files)
    return {name[:-4] for name in files}


def archive(kind, members):
    box = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(box, "w") as file:
            for name, text in members.items():
                file.writestr(name, text)
    else:
        with tarfile.open(fileobj=box, mode="w:gz") as file:
            for name, text in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(text)
                file.addfile(member, io.BytesIO(text))
    return box.getvalue()


def test_fetch_takes_good_files_and_prints_the_terms(server, monkeypatch, tmp_path, capsys):
    blob = hashlib.sha1(b"blob %d\0" % len(CORPUS_TEXTS["test"]) + CORPUS_TEXTS["test"]).hexdigest()
    md5 = hashlib.md5(CORPUS_TEXTS["valid"]).hexdigest()
    source(monkeypatch, (serve(server, "a"),), SHA | {"test": f"blob:{blob}", "valid": f"md5:{md5}"})
    data.fetch("ptb", tmp_path)
    assert fetched(tmp_path) == set(data.SPLITS)
    assert "some terms" in capsys.readouterr().out
    asked = len(server.log)
    data.fetch("ptb", tmp_path)
    assert len(server.log) == asked == 3  # what is there is not fetched again


@pytest.mark.parametrize("kind", ["sha256", "md5", "blob"])
def test_fetch_refuses_a_wrong_checksum_and_leaves_nothing(server, monkeypatch, tmp_path, kind):
    right = {"valid": SHA["valid"], "test": SHA["test"]}
    source(monkeypatch, (serve(server, "a"),), right | {"train": f"{kind}:0123"})
    with pytest.raises(FileNotFoundError, match="wrong checksum for train.txt"):
        data.fetch("ptb", tmp_path)
    assert not (tmp_path / "ptb").exists() or fetched(tmp_path) == set()


def test_fetch_tries_the_next_mirror(server, monkeypatch, tmp_path, capsys):
    corrupt = serve(server, "b", CORPUS_TEXTS | {"valid": b"something else\n"})
    source(monkeypatch, (f"{server.url}/nowhere/{{split}}.txt", corrupt, serve(server, "a")))
    data.fetch("ptb", tmp_path)
    assert fetched(tmp_path) == set(data.SPLITS)
    assert "404" in capsys.readouterr().out
    assert ("/nowhere/train.txt", 0) in server.log
    assert ("/a/train.txt", 0) not in server.log  # the second mirror's was good


@pytest.mark.parametrize("resumes", [True, False])
def test_fetch_survives_a_cut_connection(server, monkeypatch, tmp_path, resumes):
    server.resumes, server.cuts = resumes, {"/a/train.txt": 100_000}
    source(monkeypatch, (serve(server, "a"),))
    data.fetch("ptb", tmp_path)
    assert fetched(tmp_path) == set(data.SPLITS)
    assert server.log[:2] == [("/a/train.txt", 0), ("/a/train.txt", 100_000 if resumes else 0)]


@pytest.mark.parametrize(
    "kept", [b"train text", b"not what it begins with", CORPUS_TEXTS["train"], CORPUS_TEXTS["train"] + b"more"]
)
def test_fetch_goes_on_from_an_earlier_run_or_starts_cleanly(server, monkeypatch, tmp_path, kept):
    source(monkeypatch, (serve(server, "a"),))
    (tmp_path / "ptb").mkdir()
    name = hashlib.md5(f"{server.url}/a/train.txt".encode()).hexdigest()[:8]
    (tmp_path / "ptb" / f".train.{name}.part").write_bytes(kept)
    data.fetch("ptb", tmp_path)
    assert fetched(tmp_path) == set(data.SPLITS)
    assert server.log[0] == ("/a/train.txt", len(kept))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_fetch_does_not_trust_names_in_an_archive(server, monkeypatch, tmp_path, kind):
    members = {f"./x/data/ptb.{split}.txt": text for split, text in CORPUS_TEXTS.items()}
    evil = {"../evil.txt": b"evil", "/tmp/../evil.txt": b"evil", "x/y/z/../../../../../train.txt": b"evil"}
    server.files["/a"] = archive(kind, evil | members)
    source(monkeypatch, (f"{server.url}/a",))
    data.fetch("ptb", tmp_path / "inner" / "data")
    assert fetched(tmp_path / "inner" / "data") == set(data.SPLITS)
    assert [path.name for path in tmp_path.rglob("*.txt") if path.parent.name != "ptb"] == []


@pytest.mark.parametrize(
    "damage", [lambda box: box[: len(box) // 2], lambda box: b"<html>", lambda box: gzip.compress(b"")]
)
def test_fetch_refuses_a_damaged_archive(server, monkeypatch, tmp_path, damage):
    server.files["/a"] = damage(archive("tar", {f"{split}.txt": text for split, text in CORPUS_TEXTS.items()}))
    source(monkeypatch, (f"{server.url}/a",))
    with pytest.raises(FileNotFoundError, match="/a: "):
        data.fetch("ptb", tmp_path)
    assert "test" not in fetched(tmp_path)
    source(monkeypatch, (f"{server.url}/a", serve(server, "b")))
    data.fetch("ptb", tmp_path)  # a second run gets all
    assert {"train", "valid", "test"} <= {path.stem for path in (tmp_path / "ptb").glob("*.txt")}


def test_fetch_records_an_unknown_checksum_and_holds_to_it(server, monkeypatch, tmp_path, capsys):
    source(monkeypatch, (serve(server, "a"),), {})
    data.fetch("ptb", tmp_path)
    assert SHA["train"] in capsys.readouterr().out
    (tmp_path / "ptb" / "train.txt").unlink()
    server.files["/a/train.txt"] = b"changed\n"
    with pytest.raises(FileNotFoundError, match="wrong checksum"):
        data.fetch("ptb", tmp_path)


def test_no_network_is_one_line_and_does_not_hang(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "TIMEOUT", 0.05)
    closed = "http://127.0.0.1:1"
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections and never answers
        silent = f"http://127.0.0.1:{mute.getsockname()[1]}"
        source(monkeypatch, (f"{closed}/{{split}}.txt", f"{silent}/archive.tgz"))
        with pytest.raises(SystemExit) as stop:
            data.main(["ptb", "--data-dir", str(tmp_path)])
    line = str(stop.value)
    assert "\n" not in line
    for part in ("train.txt", str(tmp_path / "ptb"), closed, silent, "timed out", "--data-dir", "--dataset grammar"):
        assert part in line
    assert not list(tmp_path.iterdir())


def test_sources_are_pinned():
    for name, source in data.SOURCES.items():
        assert name in data.DATASETS
        assert source.checksums == {} or set(source.checksums) == set(data.SPLITS)
        for value in source.checksums.values():
            kind, digest = value.split(":")
            assert len(bytes.fromhex(digest)) == {"sha256": 32, "md5": 16, "blob": 20}[kind]


# ---------------------------------------------------------------------------------------- corpora


@pytest.fixture(scope="module")
def data_tokenizer():
    return data.train_tokenizer(data.read_texts("grammar", "valid"), 300)


def write(folder, name="train.txt", content=b"a king paints\na queen sings\n"):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(content)
    return str(folder)


def texts_of(corpus, data_tokenizer):
    rows = np.split(corpus.ids, corpus.offsets[1:-1])
    return [data_tokenizer.decode(row[:-1]) for row in rows]


def test_own_directory(data_tokenizer, tmp_path):
    own = write(tmp_path, content="\ufeffa king\r\n\r\n  a queen \r\n\n".encode())
    write(tmp_path, "ptb.valid.txt")
    assert list(data.read_texts(own, "train")) == ["a king", "", "a queen", ""]
    corpus = data.load_corpus(own, "train", data_tokenizer)
    assert texts_of(corpus, data_tokenizer) == ["a king", "a queen"]
    assert (corpus.skipped, corpus.truncated, corpus.words.tolist(), corpus.labels) == (2, 0, [3, 3], None)
    with pytest.raises(FileNotFoundError, match=r"no valid.txt in .*" + tmp_path.name):
        data.load_corpus(own, "valid", data_tokenizer)
    write(tmp_path / "ptb", "ptb.valid.txt")
    assert data.split_path("ptb", "valid", tmp_path).name == "ptb.valid.txt"


@pytest.mark.parametrize("content", [b"", b"\n\r\n   \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused_by_name(data_tokenizer, tmp_path, content):
    own = write(tmp_path, "test.txt", content)
    with pytest.raises(ValueError, match="test.txt: no text"):
        data.load_corpus(own, "test", data_tokenizer)


def test_a_directory_where_a_file_should_be(tmp_path):
    (tmp_path / "train.txt").mkdir()
    with pytest.raises(IsADirectoryError, match="train.txt is a directory"):
        data.split_path(str(tmp_path), "train")
    (tmp_path / "ptb" / "ptb.train.txt").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"ptb.train.txt is a directory"):
        data.split_path("ptb", "train", tmp_path)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"good\n\ncaf\xe9 bad\n", r"train.txt, line 3, byte 4 \(0xe9\)"),
        ("text".encode("utf-16"), r"train.txt, line 1, byte 1 \(0xff\)"),
        ("\ufeffab".encode() + b"\xc3\n", r"train.txt, line 1, byte 6 \(0xc3\)"),
    ],
)
def test_what_is_not_utf8_is_refused_with_its_place(tmp_path, content, place):
    with pytest.raises(ValueError, match=place):
        list(data.read_texts(write(tmp_path, content=content), "train"))
    with pytest.raises(ValueError, match="^" + re.escape(str(tmp_path)) + ".*" + place):
        data.train_tokenizer(data.read_texts(str(tmp_path), "train"), 100)


def test_a_vocabulary_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 5"):
        data.train_tokenizer(["a king paints"], 5)
    with pytest.raises(ValueError, match="vocab_size is 100"):
        data.train_tokenizer([], 100)


def test_overlong_lines_are_cut_and_counted(data_tokenizer, tmp_path):
    own = write(tmp_path, content=b"a king paints\n" + b"the old king paints a red boat " * 5000 + b"\na queen\n")
    corpus = data.load_corpus(own, "train", data_tokenizer, max_length=16)
    assert corpus.truncated == 1
    assert corpus.lengths.max() == corpus.lengths[1] == 16
    assert corpus.ids[corpus.offsets[2] - 1] == data_tokenizer.eos_token_id
    assert corpus.words[1] == len(texts_of(corpus, data_tokenizer)[1].split()) + 1
    whole = data.load_corpus(own, "train", data_tokenizer, max_length=10**6)
    assert whole.truncated == 0
    assert whole.words[1] == 7 * 5000 + 1


def test_one_file_is_split_by_its_texts(tmp_path):
    lines = [f"text {i % 3000}" for i in range(4000)]  # a quarter of them twice
    (tmp_path / "all.txt").write_text("\n".join(lines))
    one = str(tmp_path / "all.txt")
    parts = {split: list(data.read_texts(one, split)) for split in data.SPLITS}
    assert sorted(sum(parts.values(), [])) == sorted(lines)
    assert [len(set(part)) / 3000 for part in parts.values()] == pytest.approx([0.9, 0.05, 0.05], abs=0.02)
    assert not set(parts["train"]) & set(parts["test"])  # the same text twice is in the same split
    (tmp_path / "all.txt").write_text("\n".join(reversed(lines)))
    assert set(data.read_texts(one, "test")) == set(parts["test"])  # whatever the order
    other = list(data.read_texts(one, "test", shares=(0.2, 0.3, 0.5)))
    assert len(other) / 4000 == pytest.approx(0.5, abs=0.05)
    (tmp_path / "all.txt").write_text("one text")
    with pytest.raises(ValueError, match="all.txt: no text for '(valid|test)'"):
        [list(data.read_texts(one, split)) for split in data.SPLITS]


def test_shares_are_checked():
    assert data.parse_shares("0.8,0.1,0.1") == (0.8, 0.1, 0.1)
    for wrong in ("0.9,0.1", "0.9,0.1,0.1", "1,0,0", "a,b,c", "1.2,-0.1,-0.1", "nan,0.5,0.5"):
        with pytest.raises(data.argparse.ArgumentTypeError, match="shares of train, valid and test"):
            data.parse_shares(wrong)


def test_labels_are_split_off_where_they_are_and_nowhere_else(data_tokenizer, tmp_path):
    content = b"4\ta king paints\n\n0\ta queen\tsings\n2\ta monk\n"
    write(tmp_path / "yelp", content=content)
    corpus = data.load_corpus("yelp", "train", data_tokenizer, tmp_path, limit=2)
    assert corpus.labels.tolist() == ["4", "0"]
    assert list(data.read_texts("yelp", "train", tmp_path)) == ["a king paints", "", "a queen\tsings", "a monk"]
    assert corpus.words.tolist() == [4, 4]  # the label is no word
    again = data.load_corpus("yelp", "train", data_tokenizer, tmp_path, limit=2)
    assert again.labels.tolist() == ["4", "0"]  # from the cache
    own = write(tmp_path / "own", content=content)
    assert list(data.read_texts(own, "train"))[0] == "4\ta king paints"
    assert data.load_corpus(own, "train", data_tokenizer).labels is None
    for first in (b"no label here", b"no\ttext\n4\ttext", b"\ta tab", b"a long \ttext"):
        write(tmp_path / "yahoo", content=b"\n" + first + b"\nbut\ttab\n")
        labels = {label for label, _ in data.read_lines("yahoo", "train", tmp_path)}
        assert labels == ({None, "no", "4", "but"} if first.startswith(b"no\t") else {None})
    write(tmp_path / "yelp", "test.txt", b"4\ta king\n3\t\n")
    assert list(data.read_lines("yelp", "test", tmp_path)) == [("4", "a king"), ("3", "")]
    write(tmp_path / "yelp", content=b"4\ta king\nno label\n")
    with pytest.raises(ValueError, match="train.txt, line 2: no label"):
        list(data.read_texts("yelp", "train", tmp_path))


# ---------------------------------------------------------------------------------------- tokens, cache


def same_corpus(a, b):
    arrays = all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("ids", "offsets", "words"))
    return arrays and all(getattr(a, k) == getattr(b, k) for k in ("truncated", "skipped", "pad_id", "checksum"))


def test_tokenize_reads_a_stream_and_in_pieces_as_in_one(data_tokenizer):
    texts = [*data.read_texts("grammar", "test"), "", "a king"] * 2
    corpus = data.tokenize(iter(texts), data_tokenizer, 12, limit=3500)
    kept = [text for text in texts if text][:3500]
    whole = data_tokenizer(kept, add_special_tokens=False)["input_ids"]
    assert corpus.ids.tolist() == [i for row in whole for i in [*row[:11], data_tokenizer.eos_token_id]]
    assert (len(corpus), corpus.skipped) == (3500, 2)
    assert corpus.truncated == sum(len(row) > 11 for row in whole) > 0
    assert (corpus.ids.dtype, corpus.offsets.dtype) == (np.int32, np.int64)
    assert corpus.checksum == hashlib.sha256("".join(text + "\n" for text in texts).encode()).hexdigest()
    with pytest.raises(ValueError, match="max_length is 1"):
        data.tokenize(texts, data_tokenizer, 1)


def test_tokenize_holds_a_thousand_texts_at_a_time(data_tokenizer):
    ahead = []
    wrapped = lambda texts, **k: (ahead.append(read[0]), data_tokenizer(texts, **k))[1]  # noqa: E731
    wrapped.eos_token_id, wrapped.pad_token_id, wrapped.unk_token_id = 1, 0, 2
    read = [0]

    def texts():
        for _ in range(3500):
            read[0] += 1
            yield "a king"

    data.tokenize(texts(), wrapped)
    assert ahead == [1000, 2000, 3000, 3500]


def test_cache_is_used_and_keyed_by_tokenizer_settings_and_content(data_tokenizer, tmp_path, monkeypatch):
    own = write(tmp_path)
    first = data.load_corpus(own, "train", data_tokenizer)
    calls, tokenize = [], data.tokenize
    monkeypatch.setattr(data, "tokenize", lambda *a: calls.append(1) or tokenize(*a))
    assert same_corpus(data.load_corpus(own, "train", data_tokenizer), first)
    assert not calls
    data.load_corpus(own, "train", data_tokenizer, max_length=3)
    data.load_corpus(own, "train", data_tokenizer, limit=1)
    other = data.train_tokenizer(data.read_texts("grammar", "valid"), 100)
    assert not same_corpus(data.load_corpus(own, "train", other), first)
    assert len(calls) == 3
    write(tmp_path, content=b"a king paints\na queen paints\n")
    changed = data.load_corpus(own, "train", data_tokenizer)
    assert len(calls) == 4
    assert not same_corpus(changed, first)
    assert same_corpus(data.load_corpus(own, "train", data_tokenizer), changed)
    assert len(calls) == 4
    assert len(list((tmp_path / ".cache").iterdir())) == 4  # the stale one was replaced


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_damaged_cache_is_rebuilt(data_tokenizer, tmp_path, monkeypatch):
    own = write(tmp_path)
    first = data.load_corpus(own, "train", data_tokenizer)
    (cache,) = (tmp_path / ".cache").iterdir()
    good = cache.read_bytes()
    damages = [good[:n] for n in (0, 10, 40, len(good) // 2, len(good) - 1)] + [good + b"x"]
    for place in range(0, len(good), max(1, len(good) // 60)):
        damages.append(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    for damaged in damages:
        cache.write_bytes(damaged)
        assert same_corpus(data.load_corpus(own, "train", data_tokenizer), first)
        assert cache.read_bytes()[:32] == good[:32]
    evil = io.BytesIO()
    np.savez(evil, rest=np.array([Evil(tmp_path / "opened")], dtype=object))
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: hashlib.sha256())
    cache.write_bytes(hashlib.sha256().digest() + evil.getvalue())  # a pickle is not opened even if all else fits
    assert same_corpus(data.load_corpus(own, "train", data_tokenizer), first)
    assert not (tmp_path / "opened").exists()


def test_where_no_cache_can_be_written_there_is_none(data_tokenizer, tmp_path):
    own = write(tmp_path)
    (tmp_path / ".cache").write_text("a file where the folder should be")
    assert len(data.load_corpus(own, "train", data_tokenizer)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache", "train.txt"]


def test_description(data_tokenizer, tmp_path, capsys):
    data_tokenizer.save_pretrained(tmp_path / "tokenizer")
    write(tmp_path / "yelp", content=b"1\ta king paints\n2\ta queen\n\n1\ta king paints\n")
    write(tmp_path / "yelp", "valid.txt", b"1\ta king paints\n")
    write(tmp_path / "yelp", "test.txt", b"1\tthe \xe2\x82\xac\n")
    data.main(["yelp", "--data-dir", str(tmp_path), "--tokenizer", str(tmp_path / "tokenizer")])
    lines = capsys.readouterr().out.splitlines()
    train, valid, test = (line.split() for line in lines[2:5])
    assert train[1:3] == ["3", "1"]
    assert train[6:9] == ["2.67", "3", "3"]  # words: mean, median, max
    assert train[11:] == ["1", "1", "in", "valid,", "0", "in", "test", "1:", "2,", "2:", "1"]
    assert valid[11:] == ["0", "1", "in", "train,", "0", "in", "test", "1:", "1"]
    assert float(test[10][:-1]) > 0 == float(train[10][:-1])  # unknown ids
    assert sum(line.startswith("40% deleted") for line in lines) == 3
    assert sum("is not the published file" in line for line in lines) == 3
    with pytest.raises(SystemExit, match="data.py: "):
        data.main([str(tmp_path / "nothing"), "--tokenizer", str(tmp_path / "tokenizer")])


# ---------------------------------------------------------------------------------------- noise, batches


@pytest.mark.parametrize("prob", [0.15, 0.40])
def test_deletion_rate_and_what_survives(prob):
    lengths = np.arange(1, 41).repeat(50)
    rng = np.random.default_rng(0)
    ids, mask = data.pad([np.append(rng.integers(3, 1000, n - 1), 1) for n in lengths], 0)
    index = torch.arange(len(ids))
    short, short_mask = data.delete_tokens(ids, mask, prob, 0, 0, index)
    left = short_mask.sum(1).numpy()
    may_go, gone = (lengths - 1)[lengths > 10].sum(), (lengths - left)[lengths > 10].sum()
    assert abs(gone / may_go - prob) < 4 * np.sqrt(prob * (1 - prob) / may_go)
    two = left[lengths == 3]  # of two tokens both may go, but then one is taken back
    assert abs((two == 3).mean() - (1 - prob) ** 2) < 0.3
    assert (left >= np.minimum(lengths, 2)).all()
    assert (short.gather(1, short_mask.sum(1, keepdim=True) - 1) == 1).all()  # </s>
    for row, kept, m in zip(ids.tolist(), short.tolist(), short_mask.tolist(), strict=True):
        rest = iter(row)
        assert all(token in rest for token in kept[: sum(m)])  # in order
        assert not any(kept[sum(m) :])
    always, _ = data.delete_tokens(ids, mask, 0.0, 0, 0, index)
    assert torch.equal(always, ids)


def test_noise_depends_on_seed_epoch_and_text_alone():
    lengths = np.random.default_rng(0).integers(2, 30, 40)
    rows = [np.append(np.random.default_rng(i).integers(3, 1000, n - 1), 1) for i, n in enumerate(lengths)]

    def noisy(index, seed=0, epoch=0, extra=0):
        ids, mask = data.pad([rows[i] for i in index], 0)
        ids, mask = (torch.nn.functional.pad(t, (0, extra)) for t in (ids, mask))
        ids, mask = data.delete_tokens(ids, mask, 0.4, seed, epoch, torch.tensor(index))
        return {i: row[m.bool()].tolist() for i, row, m in zip(index, ids, mask, strict=True)}

    together = noisy(list(range(40)))
    alone = {}
    for rank in range(4):  # four processes, other order, other batches, more padding
        share = list(range(40))[::-1][rank::4]
        alone |= noisy(share[:3], extra=7) | noisy(share[3:])
    assert alone == together
    assert noisy(list(range(40)), epoch=1) != together != noisy(list(range(40)), seed=1)


LENGTHS = {
    "ptb": np.random.default_rng(0)
    .gamma(5.5, 5.1, 42_068)
    .astype(int)
    .clip(2, 133),  # mean 28, as PTB's training texts
    "yahoo": (20 + np.random.default_rng(0).lognormal(4.3, 0.6, 100_000)).astype(int).clip(28, 256),  # mean 110
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("world", [1, 4])
def test_epochs_are_whole_random_and_waste_little(name, world):
    lengths = LENGTHS[name]
    first = data.epoch_order(lengths, 32, seed=0, epoch=0)
    shares = [index[rank::world] for index in first for rank in range(world) if len(index) > rank]
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(len(lengths)))
    waste = 1 - lengths.sum() / sum(len(share) * lengths[share].max() for share in shares)
    assert waste <= 0.05, f"{waste:.2%} of positions are padding"
    order = np.random.default_rng(0).permutation(len(lengths))
    unsorted = 1 - lengths.sum() / sum(32 * lengths[i].max() for i in np.array_split(order, len(lengths) // 32))
    assert unsorted > 0.2  # what the buckets spare
    again = data.epoch_order(lengths, 32, seed=0, epoch=1)
    together = {tuple(sorted(batch)) for batch in first} & {tuple(sorted(batch)) for batch in again}
    assert len(together) < 0.01 * len(first)  # other company in the next epoch
    means = np.array([lengths[batch].mean() for batch in first])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1  # short and long batches come mixed
    repeat = data.epoch_order(lengths, 32, seed=0, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(first, repeat, strict=True))


def test_evaluation_has_every_text_once(data_tokenizer):
    corpus = data.tokenize(list(data.read_texts("grammar", "test"))[:5], data_tokenizer)
    seen = [i for batch in data.evaluation_batches(corpus, 2) for i in batch.index.tolist()]
    assert sorted(seen) == list(range(5))


# ======================================== measures against closed forms, tables, figures

EOS, FIRST = 1, 3  # a text of the linear-Gaussian world is one token, FIRST + i, and </s>


class LinearGaussian(torch.nn.Module):
    """z ~ N(0, I), x ~ N(W z, noise I), with the columns of W orthogonal, so that the posterior is diagonal.

    Text i stands for x[i], drawn from the model. q is the exact posterior, moved by `shift` and widened by `widen`.
    """

    def __init__(self, n, latent_dim=4, scale=2.0, noise=1.0, shift=0.0, widen=0.0, deaf=False):
        super().__init__()
        rng = torch.Generator().manual_seed(3)
        size = latent_dim + 2
        directions = torch.linalg.qr(torch.randn(size, latent_dim, generator=rng, dtype=torch.float64)).Q
        self.w = directions * torch.linspace(scale / 2, scale, latent_dim, dtype=torch.float64)
        self.noise, self.shift, self.widen, self.deaf = noise, shift, widen, deaf
        z = torch.randn(n, latent_dim, generator=rng, dtype=torch.float64)
        self.x = z @ self.w.T + noise**0.5 * torch.randn(n, size, generator=rng, dtype=torch.float64)
        self.w_mu = torch.nn.Linear(1, latent_dim)  # where `evaluate` reads the device
        self.latent_dim = latent_dim

    @property
    def posterior(self):
        """mu (n, Z) and variance (Z,) of the exact p(z|x)."""
        variance = 1 / (1 + (self.w**2).sum(0) / self.noise)
        return self.x @ self.w / self.noise * variance, variance

    def log_p(self, w=None):
        """(n,) log p(x) of all texts: N(0, W W' + noise I)."""
        w = self.w if w is None else w
        covariance = w @ w.T + self.noise * torch.eye(len(w), dtype=torch.float64)
        return torch.distributions.MultivariateNormal(torch.zeros(len(w)).double(), covariance).log_prob(self.x)

    def mutual_information(self):
        return 0.5 * torch.log1p((self.w**2).sum(0) / self.noise).sum().item()

    def encode(self, ids, mask):
        mu, variance = self.posterior
        mu = mu[ids[:, 0] - FIRST] + self.shift
        return mu, (variance.log() + self.widen).expand_as(mu)

    def reparameterize(self, mu, logvar, eps):
        return mu + (logvar / 2).exp() * eps

    def rec(self, z, labels):
        x, mean = self.x[labels[:, 0] - FIRST], 0 if self.deaf else z.double() @ self.w.T
        return 0.5 * ((x - mean) ** 2 / self.noise + math.log(2 * math.pi * self.noise)).sum(1)

    def generate(self, z, max_new_tokens):
        return torch.full((len(z), 2), EOS)


def toy_corpus(n):
    ids = np.stack([np.arange(FIRST, FIRST + n), np.full(n, EOS)], 1).astype(np.int32).ravel()
    return data.Corpus(ids, np.arange(0, 2 * n + 1, 2), np.full(n, 2), 0, 0, 0, 2, "")


def whole(n):
    return data.make_batch(toy_corpus(n), np.arange(n))


# ---------------------------------------------------------------------------------------- closed forms


def test_kl_is_that_of_torch_and_by_hand():
    mu, logvar = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.linspace(-3, 2, 7).expand(5, 7)
    q, p = torch.distributions.Normal(mu, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(metrics.kl_divergence(mu, logvar), torch.distributions.kl_divergence(q, p))
    # (2^2 + 1 - 0 - 1) / 2 = 2
    assert metrics.kl_divergence(torch.tensor(2.0), torch.tensor(0.0)).item() == 2


def test_importance_weighting_is_exact_with_the_exact_posterior():
    model = LinearGaussian(50)
    for samples in 1, 7:
        nll = metrics.importance_weighted_nll(model, whole(50), samples)
        torch.testing.assert_close(nll, -model.log_p(), rtol=1e-6, atol=1e-6)
    worse = LinearGaussian(50, widen=0.5)
    assert (metrics.importance_weighted_nll(worse, whole(50), 7) + worse.log_p()).abs().max() > 0.01


def test_importance_weighted_nll_falls_from_the_bound_to_the_truth():
    n = 2000
    model = LinearGaussian(n, shift=0.2, widen=0.6)
    mu, variance = model.posterior
    q = torch.distributions.Normal(mu + 0.2, (variance * math.exp(0.6)) ** 0.5)
    gap = torch.distributions.kl_divergence(q, torch.distributions.Normal(mu, variance**0.5)).sum(1).mean().item()
    excess = [
        (metrics.importance_weighted_nll(model, whole(n), k) + model.log_p()).mean().item() for k in (1, 2, 8, 32, 128)
    ]
    assert excess == sorted(excess, reverse=True), excess
    assert excess[0] == pytest.approx(gap, abs=0.1)
    assert abs(excess[-1]) < 0.03 < gap / 10, (excess, gap)


def test_importance_weighted_nll_runs_the_encoder_once(monkeypatch):
    model, calls = LinearGaussian(5), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda *args: calls.append(1) or encode(*args))
    metrics.importance_weighted_nll(model, whole(5), 9)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="num_samples is 0"):
        metrics.importance_weighted_nll(model, whole(5), 0)


def test_evaluate_finds_the_closed_forms_where_q_is_the_posterior():
    n = 3000
    model = LinearGaussian(n)
    result = metrics.evaluate(model, toy_corpus(n), 256, iw_samples=4)
    truth = -model.log_p().mean().item()
    assert result["nll_iw"] == pytest.approx(truth, abs=1e-6)
    assert abs(result["neg_elbo"] - truth) < 4 * result["neg_elbo_se"]
    assert abs(result["gain"] - result["kl"]) < 4 * (result["gain_se"] + result["kl_se"])
    assert result["efficiency"] == pytest.approx(1, abs=0.03)
    assert result["mi"] == pytest.approx(model.mutual_information(), abs=0.1)
    assert result["au"] == model.latent_dim


def test_efficiency_is_zero_where_the_decoder_ignores_z():
    # Posteriors not much narrower than the prior: otherwise K = 500 would not do, and the bound hide the waste.
    model = LinearGaussian(500, latent_dim=2, scale=1.0, deaf=True)
    result = metrics.evaluate(model, toy_corpus(500), 256, iw_samples=500, thorough=True)
    assert result["kl"] > 0.4  # paid
    assert abs(result["efficiency"]) < 0.05, (result["efficiency"], result["kl"])
    assert result["rec_other"] == pytest.approx(result["rec"], rel=1e-9)
    assert result["rec_prior"] == pytest.approx(result["rec"], rel=1e-9)
    heard = metrics.evaluate(LinearGaussian(500), toy_corpus(500), 256, iw_samples=1, thorough=True)
    assert heard["rec_other"] > heard["rec"] + 1
    assert heard["rec_prior"] > heard["rec"] + 1


@pytest.mark.parametrize("n", [16, 256, 4096])
def test_mutual_information_is_the_truth_or_its_ceiling(n):
    far = LinearGaussian(n, latent_dim=8, scale=60.0)  # 28 nats: every posterior stands alone
    near = LinearGaussian(n, latent_dim=2, scale=2.0)  # 1.2 nats: within reach of every n
    for model in far, near:
        mu, variance = model.posterior
        mi = metrics.mutual_information(mu, variance.log().expand_as(mu), torch.Generator().manual_seed(1)).item()
        assert mi <= math.log(n) + 1e-9
        target = min(model.mutual_information(), math.log(n))
        assert mi == pytest.approx(target, abs=0.05 + 2 / math.sqrt(n)), (n, target)


def test_mutual_information_of_one_posterior_for_all_is_zero():
    mu = torch.zeros(300, 8)
    assert metrics.mutual_information(mu, mu, torch.Generator().manual_seed(0)).abs() < 1e-9


def test_mutual_information_by_chunks_is_the_same():
    generator = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(700, 5, generator=generator), torch.randn(700, 5, generator=generator)
    z = mu + (logvar / 2).exp() * torch.randn(700, 5, generator=generator)
    once = metrics.mutual_information(mu, logvar, z=z, chunk=700)
    for chunk in 1, 64, 10_000:
        torch.testing.assert_close(metrics.mutual_information(mu, logvar, z=z, chunk=chunk), once)
    # All densities at once, by torch's own hand.
    log_q = torch.distributions.Normal(mu.double(), (logvar.double() / 2).exp()).log_prob(z[:, None].double()).sum(2)
    direct = (log_q.diagonal() - log_q.logsumexp(1) + math.log(700)).mean()
    torch.testing.assert_close(once, direct)


def test_active_units_around_the_threshold_with_n_minus_1():
    # Values +a and -a: the variance is a^2 with n, 2 a^2 with n - 1.
    for a, active in (0.0708, 1), (0.0706, 0), (0.2, 1), (0.0, 0):
        assert metrics.active_units(torch.tensor([[a], [-a]])) == active, a
    assert metrics.active_units(torch.tensor([[5.0, 1, 0], [5, 2, 0.1], [5, 3, 0]]), threshold=0.01) == 1
    assert metrics.active_units(torch.ones(1, 4)) == 0


def test_the_entropy_of_grammar_is_what_its_own_probabilities_cost():
    nats = torch.tensor(
        [
            sum(
                math.log(2) * (name in data.OPTIONAL) + math.log(len(data.FACTORS[name])) * (value is not None)
                for name, value in factors.items()
            )
            for factors in data.grammar_factors("test")
        ]
    )
    columns = {"rec": nats, "kl": torch.zeros_like(nats)}
    oracle = metrics.summarize(columns, tokens=1000, words=1000)
    assert abs(oracle["rec"] - data.GRAMMAR_ENTROPY) < 4 * oracle["rec_se"] < 0.3


# ---------------------------------------------------------------------------------------- a small T5VAE

RUN_TEXTS = (
    "the old king sold a boat",
    "a queen",
    "the happy witch hid a red drum by the lake",
    "monks \u4e2d lost it",
)


@pytest.fixture(scope="module")
def metrics_tokenizer():
    return data.train_tokenizer(data.read_texts("grammar", "valid"), 400)


@pytest.fixture(scope="module")
def corpus(metrics_tokenizer):
    return data.tokenize(RUN_TEXTS * 5, metrics_tokenizer)


def small_vae(metrics_tokenizer, latent_dim=4, seed=0):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=len(metrics_tokenizer),
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    model = vae.T5VAE(config.to_dict(), latent_dim)
    model.tokenizer = metrics_tokenizer
    for parameter in model.w_proj.parameters():
        torch.nn.init.normal_(parameter)  # z is heard
    return model


def test_no_number_depends_on_the_batch_size(metrics_tokenizer, corpus):
    model = small_vae(metrics_tokenizer)
    one, many = (metrics.evaluate(model, corpus, size, iw_samples=3, thorough=True) for size in (1, 64))
    assert one.keys() == many.keys()
    for name, value in one.items():
        assert value is None or value == pytest.approx(many[name], rel=1e-4), name
    other_noise = metrics.evaluate(model, corpus, 64, iw_samples=3, thorough=True, seed=1)
    assert other_noise["rec"] != pytest.approx(many["rec"], rel=1e-4)


def test_evaluation_repeats_and_leaves_random_state_and_mode_alone(metrics_tokenizer, corpus):
    model = small_vae(metrics_tokenizer).train()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = metrics.evaluate(model, corpus, iw_samples=2, thorough=True)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(5)
    assert metrics.evaluate(model, corpus, iw_samples=2, thorough=True) == first


def test_one_pass_of_each_without_importance_weighting(metrics_tokenizer, corpus, monkeypatch):
    model, calls = small_vae(metrics_tokenizer), {"encode": 0, "rec": 0}
    for name in calls:
        method = getattr(model, name)

        def counted(*args, name=name, method=method):
            calls[name] += len(args[0])
            return method(*args)

        monkeypatch.setattr(model, name, counted)
    result = metrics.evaluate(model, corpus)
    assert calls == {"encode": len(corpus), "rec": len(corpus)}
    assert "nll_iw" not in result


def test_numbers_follow_from_counts_and_sentences(metrics_tokenizer, corpus):
    model = small_vae(metrics_tokenizer)
    result = metrics.evaluate(model, corpus, iw_samples=2, thorough=True)
    nll = torch.cat([metrics.importance_weighted_nll(model.eval(), b, 2) for b in data.evaluation_batches(corpus, 3)])
    assert result["nll_iw"] == pytest.approx(nll.mean().item())
    assert result["nll_iw_se"] == pytest.approx((nll.std() / len(nll) ** 0.5).item())
    assert result["ppl_token_iw"] == pytest.approx(math.exp(nll.sum().item() / corpus.ids.size))
    assert result["ppl_word"] == pytest.approx(math.exp(result["neg_elbo"] * len(corpus) / corpus.words.sum()))
    assert result["gain"] == pytest.approx(result["nll_iw"] - result["rec"])
    assert result["unk_tokens"] == (corpus.ids == metrics_tokenizer.unk_token_id).sum() > 0
    assert result["unk_share"] == pytest.approx(result["unk_tokens"] / result["tokens"])


def test_a_language_model_has_no_use_of_z(metrics_tokenizer, corpus):
    result = metrics.evaluate(small_vae(metrics_tokenizer, latent_dim=0), corpus, iw_samples=5, thorough=True)
    assert result["kl"] == result["gain"] == result["au"] == 0
    assert result["mi"] == pytest.approx(0, abs=1e-9)
    assert result["nll_iw"] == pytest.approx(result["rec"], rel=1e-9)
    assert result["rec_other"] == pytest.approx(result["rec"], rel=1e-9)
    table = metrics.format_table({"some/run": result, "another": result | {"latent_dim": 4}})
    assert "some/run (LM)" in table
    assert "another (LM)" not in table


# ---------------------------------------------------------------------------------------- tables and runs


def test_the_table_prints_what_the_dict_holds(metrics_tokenizer, corpus):
    result = metrics.evaluate(small_vae(metrics_tokenizer), corpus, iw_samples=2, thorough=True)
    table = metrics.format_table({"name": result})
    for key in "rec", "kl", "neg_elbo", "nll_iw", "gain", "rec_other", "rec_prior":
        assert f"{result[key]:.2f}±{result[key + '_se']:.2f}" in table, key
    for key in "ppl_token", "ppl_token_iw", "ppl_word", "ppl_word_iw":
        assert metrics.number(result[key]) in table.split(), key
    for key in "tokens", "words", "sentences":
        assert f"{result[key]:,}" in table.split(), key
    assert f"{100 * result['unk_share']:.2f}" in table.split()
    assert "±" in metrics.format_table({"name": metrics.evaluate(small_vae(metrics_tokenizer), corpus)})  # of training


def write_run(folder, model, name, **config):
    run = folder / name
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for split in data.SPLITS:
        (texts / f"{split}.txt").write_text("\n".join(RUN_TEXTS), encoding="utf-8")
    model.save_pretrained(run / "model")
    config = {"dataset": str(texts), "data_dir": "data", "max_length": 64, "phase": 2, "seed": 0} | config
    (run / "config.json").write_text(json.dumps(config | {"out": name}))
    with open(run / "log.jsonl", "w") as log:
        for step in 0, 10, 20:
            values = np.array([step / 10, 3 + step / 10, 9 - step / 4, 30 - step]) + config["seed"]
            record = {"step": step} | dict(zip(("mi", "au", "kl", "ppl_word"), values.tolist(), strict=True))
            log.write(json.dumps({"split": "train", "loss": 1.0} | {"step": step}) + "\n")
            log.write(json.dumps({"split": "valid"} | record) + "\n")
    return str(run)


def test_a_resumed_run_is_of_the_same_recipe():
    recipes = {"a": (0, 1.0, False), "b": (1, 1.0, True), "c": (2, 2.0, False)}  # seed, lr, resumed
    configs = {run: dict(zip(("seed", "lr", "resume"), recipe, strict=True)) for run, recipe in recipes.items()}
    summaries = metrics.seed_groups(configs, {"a": {"rec": 1.0}, "b": {"rec": 3.0}, "c": {"rec": 9.0}})
    (summary,) = summaries.values()  # c has another learning rate
    assert summary == {"rec": 2.0, "rec_se": pytest.approx(math.sqrt(2))}


def test_runs_of_several_seeds_are_summarised(metrics_tokenizer, tmp_path, capsys):
    seeds = [
        write_run(tmp_path, small_vae(metrics_tokenizer, seed=s), f"s{s}", seed=s, start=f"p{s}") for s in range(3)
    ]
    other = write_run(tmp_path, small_vae(metrics_tokenizer, seed=9), "other", seed=1, lr=2)
    metrics.main([*seeds, other, "--iw-samples", "2"])
    printed = capsys.readouterr().out
    numbers = [json.loads(Path(run, "metrics.json").read_text()) for run in seeds]
    rec = [m["rec"] for m in numbers]
    assert f"{np.mean(rec):.2f}±{np.std(rec, ddof=1):.2f}" in printed
    assert printed.count("3 seeds (0, 1, 2)") == 3  # one group, a row in each block
    assert "2 seeds" not in printed

    metrics.main([*seeds, other, "--iw-samples", "2"])
    assert capsys.readouterr().out == printed
    assert [json.loads(Path(run, "metrics.json").read_text()) for run in seeds] == numbers
    metrics.main([other, seeds[0], "--iw-samples", "2"])
    assert "2 seeds" not in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="cannot use .*nowhere"):
        metrics.main([str(tmp_path / "nowhere")])
    (tmp_path / "config.json").write_text('{"phase": 0}')
    with pytest.raises(SystemExit, match="phase 0"):
        metrics.main([str(tmp_path)])
    for argv in [], ["run", "--iw-samples", "0"], ["--plot", "x.png"], ["run", "--paper", "--plot", "x.png"]:
        with pytest.raises(SystemExit):
            metrics.main(argv)


# ---------------------------------------------------------------------------------------- the paper's tables


@pytest.mark.parametrize(
    ("dataset", "true_n", "neg_elbo"),
    [
        ("yahoo", 113.0, [343.4, 384.8, 463.5, 451.6]),
        ("ptb", 26.45, [104.3, 107.3, 146.1, 173.5]),
        ("yelp", 131.7, [405.0, 482.9, 587.8, 523.1]),
        ("snli", 13.66, [34.8, 37.1, 60.9, 106.1]),
    ],
)
def test_the_paper_has_one_n_a_data_set_and_hence_the_true_bound(dataset, true_n, neg_elbo):
    rows = metrics.reread(dataset)[3:]
    assert [row["n"] for row in rows] == pytest.approx([true_n] * 4, rel=1e-3)
    assert [row["neg_elbo"] for row in rows] == pytest.approx(neg_elbo, abs=0.06)
    assert max(row["n_printed"] for row in rows) > 1.5 * min(row["n_printed"] for row in rows)  # as the column has it
    words = metrics.PAPER[dataset][1]
    assert rows[0]["ppl_word"] == pytest.approx(math.exp(rows[0]["neg_elbo"] / words))
    assert metrics.reread(dataset)[0]["n"] is None  # Optimus counts other tokens


def test_paper_prints_all_tables_and_puts_a_run_under_its_own(metrics_tokenizer, tmp_path, capsys):
    metrics.main(["--paper"])
    printed = capsys.readouterr().out
    for words in "Table 1, yahoo", "Table 2, ptb", "Table 3, yelp", "Table 4, snli", "GPT-2 token", "2358.31":
        assert words in printed, words
    run = write_run(tmp_path, small_vae(metrics_tokenizer), "mine", dataset="ptb")
    measured = {"kl": 7.123, "kl_se": 0.1, "rec": 80.5, "neg_elbo": 87.623, "ppl_token": 24.24, "ppl_word": 54.3}
    measured |= {"mi": 5.0, "au": 3, "latent_dim": 4, "tokens": 200, "sentences": 10}
    Path(run, "metrics.json").write_text(json.dumps(measured))
    metrics.main([run, "--paper"])
    printed = capsys.readouterr().out
    assert "yahoo:" not in printed
    lines = printed.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(run))
    assert "+ Deep" in lines[at - 1]
    for cell in "24.24", "7.12±0.10", "20.00", "87.62", "54.3":
        assert cell in lines[at].split(), cell
    with pytest.raises(SystemExit, match="not of"):
        metrics.main([write_run(tmp_path, small_vae(metrics_tokenizer), "own"), "--paper", "--iw-samples", "1"])


# ---------------------------------------------------------------------------------------- figures


def test_labels_are_what_differs():
    base = {"dataset": "ptb", "lr": 0.1, "seed": 0, "out": "a", "start": "x"}
    configs = {"r/a": base, "r/b": base | {"lr": 0.2, "out": "b"}, "r/c": base | {"lr": 0.2, "seed": 1, "out": "c"}}
    assert metrics.run_labels(configs) == {
        "r/a": "lr 0.1, seed 0",
        "r/b": "lr 0.2, seed 0",
        "r/c": "lr 0.2, seed 1",
    }
    assert metrics.run_labels({"r/a": base, "r/b": base | {"start": "y"}}) == {"r/a": "r/a", "r/b": "r/b"}


def test_the_figure_holds_every_series(metrics_tokenizer, tmp_path, capsys):
    runs = [write_run(tmp_path, small_vae(metrics_tokenizer), f"s{s}", seed=s) for s in range(3)]
    logs = {
        f"seed {seed}": [r for r in map(json.loads, Path(run, "log.jsonl").read_text().splitlines()) if "mi" in r]
        for seed, run in enumerate(runs)
    }
    figure = metrics.draw(logs)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(logs)
    for axes, (title, key) in zip(figure.axes, metrics.PANELS.items(), strict=True):
        assert axes.get_title() == title
        for line, (label, records) in zip(axes.get_lines(), logs.items(), strict=True):
            assert line.get_label() == label
            assert line.get_xydata().tolist() == [[record["step"], record[key]] for record in records]

    path = tmp_path / "out.png"
    metrics.main(["--plot", str(path), *runs])
    assert str(path) in capsys.readouterr().out
    assert not Path(runs[0], "metrics.json").exists()  # drawing evaluates nothing
    pixels = matplotlib.image.imread(path)[::-1, :, :3]  # from the bottom, as axes count
    figure.draw_without_rendering()  # the layout is made here
    for axes in figure.axes:
        (left, bottom), (right, top) = axes.get_position().get_points() * pixels.shape[1::-1]
        panel = pixels[int(bottom) : int(top), int(left) : int(right)]
        for line in axes.get_lines():
            seen = (np.abs(panel - matplotlib.colors.to_rgb(line.get_color())).max(2) < 0.02).sum()
            assert seen > 200, (axes.get_title(), line.get_label(), seen)


# ---------------------------------------------------------------------------------------- probes


def test_linear_probe():
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(3, (600,), generator=generator)
    centers = torch.tensor([[0.0, 4.0], [4.0, 0.0], [-4.0, -4.0]])
    told = centers[classes] + 0.5 * torch.randn(600, 2, generator=generator)
    untold = torch.randn(600, 2, generator=generator)
    names = ["abc"[c] for c in classes]
    accuracy, chance = metrics.linear_probe(told[:400], names[:400], told[400:], names[400:])
    assert accuracy > 98
    assert 25 < chance < 42
    accuracy, _ = metrics.linear_probe(untold[:400], names[:400], untold[400:], names[400:])
    assert 20 < accuracy < 47, "where mu says nothing, the probe is at chance"


def test_grammar_is_read_as_it_was_written():
    for factors in itertools.islice(data.grammar_factors("test"), 300):
        text = data.grammar_sentence(factors)
        assert data.grammar_parse(text) == factors
        assert data.grammar_parse(text + " boat") is None
    assert data.grammar_parse("yesterday the king paints a boat on the roof") is None, "tense and time disagree"
    assert data.grammar_parse("") is None


# ======================================== training never loses work

# Children start from one process that has imported everything once, what the libraries put off until used, too.
FORK = multiprocessing.get_context("forkserver")
T5 = "transformers.models.t5"
LATE = (f"{T5}.modeling_t5", f"{T5}.tokenization_t5", "transformers.generation.utils", "torch._dynamo", "sentencepiece")
FORK.set_forkserver_preload(["train", "test_vae", *LATE])

TINY = shlex.split("--model tiny --d-model 16 --layers 1 --heads 2 --vocab-size 40 --latent-dim 3 --iw-samples 2")
SHORT = shlex.split("--epochs 2 --batch-size 5 --log-every 3 --max-length 12 --device cpu --denoise 0.2")


def main(*args, report=None):
    """train.main in a process of its own, and quiet; `report` gets its standard error."""
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(report or os.devnull, "w", buffering=1)  # noqa: SIM115
    train.show = lambda *_: []  # takes longer than all the rest
    train.main([str(arg) for arg in args])


def start(target, *args, **kwargs):
    child = FORK.Process(target=target, args=args, kwargs=kwargs)
    child.start()
    return child


def end(child):
    child.join(120)
    child.kill()  # what hangs
    child.join()
    return child.exitcode


def train_run(target, *args, **kwargs):
    return end(start(target, *args, **kwargs))


def weights(out):
    return load_file(Path(out, "model", "model.safetensors"))


def log_records(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def same_run(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_log(one, other):
    return Path(one, "log.jsonl").read_bytes() == Path(other, "log.jsonl").read_bytes()


def distance(one, other):
    """The largest relative difference of a weight tensor."""
    a, b = weights(one), weights(other)
    return max(((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-12)).item() for n in a)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a data set of 23 texts, and models made of it."""
    home = tmp_path_factory.mktemp("train")
    texts = [text for text, _ in zip(data.read_texts("grammar", "train"), range(23), strict=False)]
    for split in data.SPLITS:
        Path(home, f"{split}.txt").write_text("\n".join(texts[: 23 if split == "train" else 7]) + "\n")
    flags = ("--phase", 0, *TINY, *SHORT, "--out", home / "phase0")
    assert train_run(main, "--dataset", home, *flags) == 0
    # A VAE around it, not yet trained, and the same with dropout: quicker to load than a T5.
    flags = ("--phase", 2, "--init", home / "phase0", *TINY, *SHORT, "--epochs", 0, "--out", home / "vae")
    assert train_run(main, "--dataset", home, *flags) == 0
    config = shutil.copytree(home / "vae", home / "dropout") / "model" / "config.json"
    content = json.loads(config.read_text())
    content["t5_config"]["dropout_rate"] = 0.1
    config.write_text(json.dumps(content))
    return home


@pytest.fixture(scope="module")
def command(home):
    """Phase 2 with dropout, of which most tests are."""
    return ["--dataset", home, "--phase", 2, "--init", home / "dropout", *TINY, *SHORT]


@pytest.fixture(scope="module")
def quiet(home):
    """Phase 2 without dropout, whose noise is not the same for other parts of a batch."""
    return ["--dataset", home, "--phase", 2, "--init", home / "vae", *TINY, *SHORT]


@pytest.fixture(scope="module")
def whole_run(home, command):
    """A run that nothing happened to."""
    assert train_run(main, *command, "--out", home / "whole") == 0
    return home / "whole"


@pytest.fixture(scope="module")
def plain(home, quiet):
    """The same without dropout."""
    assert train_run(main, *quiet, "--out", home / "plain") == 0
    return home / "plain"


# ---------------------------------------------------------------------------------------- RESULTS.md

RESULTS = Path(__file__).with_name("RESULTS.md")
HEADS = {head: key for block in metrics.BLOCKS for head, key in block.items()}


def stored(row):
    """The folders results/<row>/<seed>, their configurations and their metrics: ({folder: dict}, {folder: dict})."""
    folders = sorted(RESULTS.with_name("results").glob(f"{row}/*/"))
    configs, measured = (
        {str(f): json.loads((f / f"{name}.json").read_text()) for f in folders} for name in ("config", "metrics")
    )
    return configs, measured


def summary(row):
    """What RESULTS.md prints of a row: the mean over its seeds, or its one run."""
    configs, measured = stored(row)
    return next(iter((metrics.seed_groups(configs, measured) if len(measured) > 1 else measured).values()))


def markdown_tables(text):
    """The tables of a Markdown text, as lists of {head: cell}."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        heads, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        yield [dict(zip(heads, row, strict=True)) for row in rows]


def wrong_cells(text):
    """The cells of the tables of runs that are not what results/ holds: [(run, head, cell, true)]."""
    wrong = []
    for row in (row for table in markdown_tables(text) for row in table if "run" in row):
        (configs, measured), run = stored(row["run"]), summary(row["run"])
        assert len(measured) == int(row["seeds"]), row
        for config in configs.values():
            assert f" {row['flags'].strip('`')} " in f" {config['command']} ", (row, config["command"])
        true = {head: metrics.cell(run, HEADS[head]) for head in row if head in HEADS}
        wrong += [(row["run"], head, row[head], cell) for head, cell in true.items() if row[head] != cell]
    return wrong


def test_results_are_what_the_runs_measured():
    text = RESULTS.read_text(encoding="utf-8")
    assert wrong_cells(text) == []
    cells = [cell for table in markdown_tables(text) for row in table if "run" in row for cell in row.values()]
    # All else that has two decimals, outside of `code`, is one of these numbers, or the entropy.
    measured = {number for cell in cells for number in re.findall(r"\d+\.\d\d", cell)}
    told = set(re.findall(r"\d+\.\d\d", re.sub(r"`.*?`", "", text)))
    assert told <= measured | {f"{data.GRAMMAR_ENTROPY:.2f}"}
    digit = re.compile(r"\| (\d+)\.\d\d±").search(text, text.index("| run |"))  # one digit wrong is found
    assert wrong_cells(text[: digit.start(1)] + str(int(digit[1]) + 1) + text[digit.end(1) :])


# ------------------------------------------------------------------------------------ resume and faults


def cut(calls, name, then, *args, **kwargs):
    """main, in which the call number `calls` of train.<name> does `then` instead."""
    module, name = (train, name) if "." not in name else (getattr(train, name.split(".")[0]), name.split(".")[1])
    original, count = getattr(module, name), 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            then()
        return original(*args, **kwargs)

    setattr(module, name, counted)
    main(*args, **kwargs)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("where", ["backward", "os.replace", "os.fsync", "metrics.evaluate", "write_json"])
def test_killed_anywhere(tmp_path, command, whole_run, where):
    """SIGKILL in a step, within the write of a checkpoint, in an evaluation, before the last file."""
    command = [*command, "--out", tmp_path / "run", "--save-every", 0, "--resume"]
    calls = 2 if where in ("metrics.evaluate", "write_json") else 7
    assert train_run(cut, calls, where, partial(send, signal.SIGKILL), *command) == -signal.SIGKILL
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert train_run(main, *command) == 0
    assert same_run(tmp_path / "run", whole_run)
    assert same_log(tmp_path / "run", whole_run)
    assert not train.checkpoints(tmp_path / "run")


def test_killed_at_random(tmp_path, command, whole_run):
    kills, rng = int(os.environ.get("KILLS", 4)), random.Random(int(os.environ.get("SEED", 0)))
    out, done, longest = tmp_path / "run", 0, 0.5
    while done < kills:
        child = start(main, *command, "--out", out, "--save-every", 0, "--resume")
        child.join(rng.uniform(0, longest))
        child.kill()
        child.join()
        if child.exitcode == 0:  # it was quicker: once more, from the beginning
            longest *= 0.8
            shutil.rmtree(out)
        else:
            done += 1
    assert train_run(main, *command, "--out", out, "--resume") == 0
    assert same_run(out, whole_run)
    assert same_log(out, whole_run)


@pytest.mark.parametrize(("number", "where"), [(signal.SIGTERM, "backward"), (signal.SIGINT, "metrics.evaluate")])
def test_signals_save_and_leave(tmp_path, command, whole_run, number, where):
    command, report = [*command, "--out", tmp_path / "run"], tmp_path / "report"
    calls = 7 if where == "backward" else 2  # in the middle of a step, or of the evaluation after the first epoch
    assert train_run(cut, calls, where, partial(send, number), *command, report=report) == 128 + number
    assert number.name in report.read_text()
    assert "--resume" in report.read_text()
    assert train.load_checkpoint(tmp_path / "run")[1]["step"] == (7 if where == "backward" else 5)
    assert train_run(main, *command) == 1  # an unfinished run is not overwritten unasked
    assert train_run(main, *command, "--resume") == 0
    assert same_run(tmp_path / "run", whole_run)
    assert same_log(tmp_path / "run", whole_run)


@pytest.fixture(scope="module")
def stopped(home, command):
    """A run that was stopped after step 7, with the checkpoints of steps 6 and 7."""
    out = home / "stopped"
    assert (
        train_run(cut, 7, "backward", partial(send, signal.SIGTERM), *command, "--save-every", 0, "--out", out) == 143
    )
    assert [path.name[:20] for path in train.checkpoints(out)] == ["checkpoint-000000006", "checkpoint-000000007"]
    return out


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def unfinish(path):
    path.rename(path.with_suffix(".partial"))


@pytest.mark.parametrize("damage", [flip, halve, unfinish])
def test_damaged_checkpoint(tmp_path, command, stopped, whole_run, damage, capsys):
    out = shutil.copytree(stopped, tmp_path / "run")
    damage(train.checkpoints(out)[-1])
    assert train.load_checkpoint(out)[1]["step"] == 6
    assert "damaged" in capsys.readouterr().err
    assert train_run(main, *command, "--out", out, "--resume") == 0
    assert same_run(out, whole_run)
    assert same_log(out, whole_run)


def test_no_code_in_checkpoints(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    train.save_checkpoint(tmp_path, {"step": 1, "model": Bomb()})
    with pytest.raises(Exception, match="[Ww]eights.only"):
        train.load_checkpoint(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_resume_needs_the_same_command(tmp_path, command, stopped):
    out, report = shutil.copytree(stopped, tmp_path / "run"), tmp_path / "report"
    before = sorted((path.name, path.read_bytes()) for path in out.iterdir())
    assert train_run(main, *command, "--lr", 0.1, "--out", out, "--resume", report=report) == 1
    assert "lr [0.001], not [0.1]" in report.read_text()
    assert sorted((path.name, path.read_bytes()) for path in out.iterdir()) == before


def test_full_disk(tmp_path, command, whole_run):
    """The fifth checkpoint finds no room."""
    command, report = [*command, "--out", tmp_path / "run"], tmp_path / "report"
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert train_run(cut, 5, "torch.save", full, *command, "--save-every", 0, report=report) == 1
    assert os.strerror(errno.EFBIG) in report.read_text()
    assert [path.suffix for path in train.checkpoints(tmp_path / "run")] == [".pt", ".pt"]
    assert train.load_checkpoint(tmp_path / "run")[1]["step"] == 4
    assert train_run(main, *command, "--resume") == 0
    assert same_run(tmp_path / "run", whole_run)


def not_a_number(step, *args):
    return float("nan") if step == 6 else 1.0


def with_weights(kl_weight, *args, report):
    train.kl_weight = kl_weight
    main(*args, report=report)


def test_not_a_number(tmp_path, command):
    report = tmp_path / "report"
    args = *command, "--save-every", 0, "--out", tmp_path / "run"
    assert train_run(with_weights, not_a_number, *args, report=report) == 1
    assert len(report.read_text().splitlines()) == 1
    assert "step 6" in report.read_text()
    assert "texts [" in report.read_text()
    saved = train.load_checkpoint(tmp_path / "run")[1]
    assert saved["step"] == 6
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


@pytest.mark.parametrize(("loss", "gradient"), [(1.0, 1.0), (np.nan, 1.0), (np.inf, 1.0), (1.0, np.inf), (1.0, np.nan)])
def test_only_finite_numbers_reach_the_weights(loss, gradient):
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.tensor([gradient])
    optimizer, scaler = torch.optim.AdamW([weight]), torch.amp.GradScaler("cpu", enabled=False)
    good = np.isfinite(loss * gradient)
    with contextlib.nullcontext() if good else pytest.raises(FloatingPointError, match="at step 3"):
        train.update(optimizer, scaler, 0.1, 1.0, loss, "step 3")
    assert bool(weight.item()) == good


def test_one_process_a_folder(tmp_path, command):
    out, report = tmp_path / "run", tmp_path / "report"
    out.mkdir()
    with open(out / "log.jsonl", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert train_run(main, *command, "--epochs", 0, "--out", out, "--overwrite", report=report) == 1
    assert "another process" in report.read_text()
    assert train_run(main, *command, "--epochs", 0, "--out", out) == 0


def test_resume_of_several_phases(tmp_path, home):
    """Finished phases stay, the stopped one goes on, and what came after a phase that begins anew is void."""
    command = ["--dataset", home, "--phase", 0, 1, 2, *TINY, *SHORT]
    assert train_run(main, *command, "--out", tmp_path / "whole") == 0
    (tmp_path / "whole" / "phase0").rename(tmp_path / "phase0")
    assert (
        train_run(main, *command, "--out", tmp_path / "whole") == 1
    )  # phase 2 is there: known before phase 0 is trained
    assert not (tmp_path / "whole" / "phase0").exists()
    (tmp_path / "phase0").rename(tmp_path / "whole" / "phase0")
    out = tmp_path / "run"
    assert train_run(cut, 12, "backward", partial(send, signal.SIGTERM), *command, "--out", out) == 143
    finished = (out / "phase0" / "metrics.json").stat()
    assert train_run(main, *command, "--out", out, "--resume") == 0
    assert (out / "phase0" / "metrics.json").stat() == finished
    for phase in "phase0", "phase1", "phase2":
        assert same_run(out / phase, tmp_path / "whole" / phase)
    assert train_run(cut, 12, "backward", partial(send, signal.SIGTERM), *command, "--out", out, "--overwrite") == 143
    assert [(out / phase / "metrics.json").exists() for phase in ("phase0", "phase1", "phase2")] == [True, False, False]


# ------------------------------------------------------------------------------------ several processes


def one_of(rank, world, port, job, *args, **kwargs):
    """What torchrun does for a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    job(*args, **kwargs)


def run_all(*jobs):
    """The exit codes of the processes of a group, each (function, arguments)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(one_of, rank, len(jobs), port, *job) for rank, job in enumerate(jobs)]
    return [end(child) for child in children]


@pytest.mark.parametrize(("phase", "batch_size"), [(0, 5), (1, 5), (2, 5), (2, 1)])
def test_processes_give_the_same_result(tmp_path, home, plain, phase, batch_size):
    """After 20 steps; with 23 texts the last batch has 3, with one text a step the others have nothing to do."""
    init = ["--init", home / "vae"] if phase else []
    command = ["--dataset", home, "--phase", phase, *init, *TINY, *SHORT]
    command += ["--epochs", 4, "--lr-schedule", "linear"] if batch_size == 5 else ["--epochs", 1, "--limit", 20]
    command += ["--batch-size", batch_size]
    assert train_run(main, *command, "--out", tmp_path / "one") == 0
    assert run_all(*[(main, *command, "--out", tmp_path / "two")] * 2) == [0, 0]
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-5
    for one, two in zip(log_records(tmp_path / "one"), log_records(tmp_path / "two"), strict=True):
        numbers = {name for name, value in one.items() if isinstance(value, int | float)}
        assert [two[name] for name in numbers] == pytest.approx([one[name] for name in numbers], rel=1e-3, abs=1e-4)
    if phase == 2:
        assert distance(plain, tmp_path / "two") > 1e-3  # of other epochs


def test_evaluation_split_among_processes(tmp_path, quiet):
    flags = ["--epochs", 0, "--eval-batch-size", 2]
    assert train_run(main, *quiet, *flags, "--out", tmp_path / "one") == 0
    assert run_all(*[(main, *quiet, *flags, "--out", tmp_path / "three")] * 3) == [0, 0, 0]
    one, three = (json.loads((tmp_path / out / "metrics.json").read_text()) for out in ("one", "three"))
    assert one | {"train_seconds": 0} == three | {"train_seconds": 0}
    assert one["rec"] != one["rec_prior"]


def test_language_model_in_two_processes(tmp_path, home, quiet):
    """Nothing that trains is left out of the loss: DistributedDataParallel would complain."""
    args = [*quiet, "--init", home / "phase0", "--no-latent", "--out", tmp_path / "run"]
    assert run_all(*[(main, *args)] * 2) == [0, 0]


def test_a_dead_process_ends_the_others(tmp_path, quiet, plain):
    args = [*quiet, "--save-every", 0, "--out", tmp_path / "run"]
    codes = run_all((main, *args), (cut, 7, "backward", partial(send, signal.SIGKILL), *args))
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)
    assert train.load_checkpoint(tmp_path / "run")[1]["step"] == 6
    assert run_all(*[(main, *args, "--resume")] * 2) == [0, 0]
    assert distance(tmp_path / "run", plain) < 1e-5


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path, quiet):
    args = [*quiet, "--out", tmp_path / "run"]
    codes = run_all((main, *args), (cut, 7, "backward", partial(send, signal.SIGTERM), *args))
    assert codes == [143, 143]
    assert train.load_checkpoint(tmp_path / "run")[1]["step"] == 7


@pytest.mark.parametrize("parts", [2, 7])
def test_grad_accum_equals_the_whole_batch(tmp_path, quiet, plain, parts):
    assert train_run(main, *quiet, "--grad-accum", parts, "--out", tmp_path / "parts") == 0
    assert distance(plain, tmp_path / "parts") < 1e-5
    assert not same_run(plain, tmp_path / "parts")  # so it was not the same computation


def test_grad_accum_in_processes(tmp_path, quiet, plain):
    assert run_all(*[(main, *quiet, "--grad-accum", 2, "--out", tmp_path / "parts")] * 2) == [0, 0]
    assert distance(plain, tmp_path / "parts") < 1e-5


# ------------------------------------------------------------------------------------ mixed precision


def test_bf16_stays_close(tmp_path, quiet, plain):
    assert train_run(main, *quiet, "--amp", "bf16", "--out", tmp_path / "bf16") == 0
    off, bf16 = (json.loads((out / "metrics.json").read_text()) for out in (plain, tmp_path / "bf16"))
    assert not same_run(plain, tmp_path / "bf16")
    assert bf16["rec"] == pytest.approx(off["rec"], rel=0.02)
    assert bf16["kl"] == pytest.approx(off["kl"], rel=0.1)


def test_terms_are_float32_under_autocast():
    config = {"model_type": "t5", "vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
    model = vae.T5VAE(config | {"num_layers": 1, "decoder_start_token_id": 0, "dropout_rate": 0.0}, 3)
    ids = torch.arange(2, 14).view(2, 6)
    batch = data.Batch(ids, torch.ones_like(ids), ids, torch.arange(2))
    objective = train.ELBO(model, 0.1)
    exact = objective(batch, torch.ones(2, 3), 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        terms = objective(batch, torch.ones(2, 3), 0.7)
        mu, logvar = model.encode(batch.ids, batch.mask)
    assert mu.dtype is torch.bfloat16  # autocast is on
    assert {terms[name].dtype for name in ("loss", "rec", "kl")} == {torch.float32}
    assert torch.equal(terms["kl"], metrics.kl_divergence(mu.float(), logvar.float()).sum(1))
    assert torch.allclose(terms["loss"], exact["loss"], rtol=0.02)


def with_scale(scale, *args):
    torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=scale)
    main(*args)


def test_a_skipped_step_changes_nothing(tmp_path, quiet):
    flags = ["--amp", "fp16", "--limit", 5]  # two steps
    assert train_run(main, *quiet, "--epochs", 0, "--out", tmp_path / "start") == 0
    assert train_run(with_scale, 2.0**127, *quiet, *flags, "--out", tmp_path / "skipped") == 0
    assert same_run(tmp_path / "start", tmp_path / "skipped")
    assert train_run(with_scale, 2.0**4, *quiet, *flags, "--out", tmp_path / "moved") == 0
    assert not same_run(tmp_path / "start", tmp_path / "moved")


# ------------------------------------------------------------------------------------ determinism and edges


def often(*args):
    original = metrics.evaluate
    metrics.evaluate = lambda *a, **k: [original(*a, **k) for _ in range(3)][0]
    main(*args)


def test_seeds(tmp_path, command, whole_run, plain):
    assert train_run(often, *command, "--out", tmp_path / "often") == 0
    assert same_run(tmp_path / "often", whole_run)  # evaluations take no random number from training,
    assert not same_run(plain, whole_run)  # which has dropout
    assert train_run(main, *command, "--seed", 1, "--out", tmp_path / "other") == 0
    assert not same_run(tmp_path / "other", whole_run)


@pytest.mark.parametrize(
    "flags",
    [
        "--batch-size 100",
        "--limit 1",
        "--limit 5 --batch-size 1",
        "--epochs 1 --latent-dim 1",
        "--epochs 1 --max-length 2",
        "--epochs 0",
        "--epochs 0 --no-latent",
    ],
)
def test_edges_that_run(tmp_path, home, quiet, flags):
    init = ["--init", home / "phase0"] if "latent" in flags else []
    assert train_run(main, *quiet, *init, *flags.split(), "--out", tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert np.isfinite(result["rec"])


def test_one_text_in_every_split(tmp_path, quiet):
    for split in data.SPLITS:
        (tmp_path / f"{split}.txt").write_text("the old king sells a red boat\n")
    assert train_run(main, *quiet, "--dataset", tmp_path, "--out", tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["sentences"] == 1
    assert result["rec_se"] is None


def test_edges_that_are_refused(tmp_path, home, quiet, whole_run):
    """Each with one line that says what is wrong, and without a run folder."""
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}')
    bare = shutil.copytree(whole_run / "model", tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    wide = shutil.copytree(whole_run / "model", tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"latent_dim": 4}))
    report, out = tmp_path / "report", tmp_path / "run"
    for flags, words in (
        (["--init", bert], "bert"),
        (["--init", bare], "without a tokenizer"),
        (["--init", wide, "--latent-dim", 4], "not what config.json describes"),
        (["--init", whole_run, "--latent-dim", 4], "latent_dim is 4"),
    ):
        assert train_run(main, *quiet, *flags, "--out", out, report=report) == 1, flags
        assert words in report.read_text(), flags
        assert "Traceback" not in report.read_text(), flags
        assert not out.exists(), flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--amp fp8", "invalid choice: 'fp8'"),
        ("--kl-schedule cosine", "invalid choice: 'cosine'"),
        ("--save-every -1", "-1 is below 0"),
        ("--grad-accum 0", "0 is below 1"),
        ("--resume --overwrite", "leave one of them out"),
        ("--rezume", "unrecognized arguments"),
    ],
)
def test_flags_that_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--dataset", "grammar", *flags.split()])
    assert words in capsys.readouterr().err


def test_read_only_folder(tmp_path, quiet):
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write into a read-only folder")
    report = tmp_path / "report"
    assert train_run(main, *quiet, "--out", tmp_path / "locked" / "run", report=report) == 1
    assert "Permission denied" in report.read_text()
    assert "Traceback" not in report.read_text()


# ======================================== the same, faster


def plain_again(model):
    """A copy of a model with torch's own linear layers and dropout."""
    model = copy.deepcopy(model)
    for part in model.modules():
        part.__class__ = {vae.Linear: torch.nn.Linear, vae.Dropout: torch.nn.Dropout}.get(type(part), type(part))
        if isinstance(getattr(part, "act", None), vae.DropoutOfReLU):
            part.act, part.dropout = torch.nn.ReLU(), torch.nn.Dropout(part.act.p)
    return model


def products(monkeypatch):
    """The shapes (M, K, N) that `multiply` is called with from now on."""
    shapes, multiply = [], vae.multiply
    monkeypatch.setattr(vae, "multiply", lambda a, b: shapes.append((*a.shape, len(b))) or multiply(a, b))
    return shapes


@pytest.mark.parametrize("kind", ["contiguous", "one layer's memory", "expanded gradient"])
def test_linear_is_torchs(kind):
    torch.manual_seed(0)
    layer = vae.Linear(24, 40, bias=False)
    x = torch.randn(5, 7, 24) if kind != "one layer's memory" else torch.randn(5, 3, 24)[:, 1, None]
    grad = torch.randn(40).expand(*x.shape[:-1], 40) if kind == "expanded gradient" else torch.randn(*x.shape[:-1], 40)
    results = []
    for forward in layer, partial(F.linear, weight=layer.weight):
        x.grad, layer.weight.grad = None, None
        out = forward(x.requires_grad_() if x.is_leaf else x)
        (d_x,) = torch.autograd.grad(out, x, grad, retain_graph=True) if x.requires_grad else (None,)
        results.append((out, d_x, *torch.autograd.grad(out, layer.weight, grad)))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(results[0][0], F.linear(x, layer.weight * 1.001), atol=1e-5, rtol=1e-5)


def test_no_product_is_computed_that_nobody_needs(monkeypatch):
    shapes = products(monkeypatch)
    layer, x = vae.Linear(24, 40, bias=False), torch.randn(6, 24, requires_grad=True)
    for x_trains, weight_trains, count in (1, 1, 3), (0, 1, 2), (1, 0, 2):
        shapes.clear()
        layer.requires_grad_(bool(weight_trains))
        layer(x if x_trains else x.detach()).sum().backward()
        assert len(shapes) == count


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("weights", ["equal", "of each token", "zero"])
def test_token_nats_are_those_of_whole_logits(weights, frozen, monkeypatch):
    monkeypatch.setattr(vae.TokenNats, "CHUNK", 4)
    shapes = products(monkeypatch)
    torch.manual_seed(0)
    hidden, head = torch.randn(11, 16, requires_grad=True), torch.randn(50, 16, requires_grad=not frozen)
    labels, trained = torch.randint(50, (11,)), [hidden] if frozen else [hidden, head]
    grad = {"equal": torch.full((11,), 0.3), "of each token": torch.arange(11) / 7, "zero": torch.zeros(11)}[weights]
    nats = vae.TokenNats.apply(hidden, head, labels)
    assert max(rows for rows, _, _ in shapes) == 4
    assert len(shapes) == 3 * 2  # chunks; logits and the gradient of hidden
    plain = F.cross_entropy(hidden @ head.T, labels, reduction="none")
    torch.testing.assert_close(nats, plain)
    want = torch.autograd.grad(plain, trained, grad)
    for _ in range(2):  # twice from the same graph
        for ours, torchs in zip(torch.autograd.grad(nats, trained, grad, retain_graph=True), want, strict=True):
            torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)
    other = F.cross_entropy(hidden @ head.T, labels.roll(1), reduction="none")
    assert not torch.allclose(nats, other)
    if weights != "zero":
        assert not torch.allclose(torch.autograd.grad(other, hidden, grad)[0], want[0], atol=1e-3)


def test_no_gradient_is_computed_in_an_evaluation(monkeypatch):
    asked, run = [], vae.TokenNats.run
    monkeypatch.setattr(vae.TokenNats, "run", lambda *args: asked.append(args[3:]) or run(*args))
    model, (ids, _) = tiny_vae(), random_texts(4, 9)
    for grad, needs in (True, (True, True)), (False, (False, False)):
        with torch.set_grad_enabled(grad):
            model.rec(torch.zeros(4, 8), ids)
        assert asked.pop() == needs


def test_dropout_drops_p_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1001, 999, requires_grad=True)
    for p in 0.1, 0.5:
        out = vae.Dropout(p)(x)
        kept = out > 0
        sigma = math.sqrt(p * (1 - p) / x.numel())
        assert abs((~kept).double().mean() - p) < 5 * sigma + 2**-17
        assert out.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-4)
        assert abs(out.double().mean() - 1) < 5 * sigma / (1 - p)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad, out.detach())
        again = vae.Dropout(p)(x) > 0  # independent of the first
        assert abs((kept & again).double().mean() - (1 - p) ** 2) < 5 * math.sqrt(0.25 / x.numel())
    for layer in vae.Dropout(0.1).eval(), vae.Dropout(0.0):
        assert torch.equal(layer(x), x)
    assert not vae.Dropout(1.0)(x).any()


def test_dropout_of_relu_is_relu_and_dropout_in_less_memory():
    x, grad, results, saved = torch.randn(50, 40, requires_grad=True), torch.randn(50, 40), [], []
    for layer in vae.DropoutOfReLU(0.3), lambda x: vae.Dropout(0.3)(x.relu()), lambda x: vae.Dropout(0.3)(-x.relu()):
        torch.manual_seed(0)
        saved.append(0)

        def count(tensor):
            saved[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out = layer(x)
        results.append(torch.stack([out, *torch.autograd.grad(out, x, grad)]))
    torch.testing.assert_close(results[0], results[1])
    assert not torch.allclose(results[0], results[2])
    assert saved[0] == x.nbytes < saved[1]
    for layer in vae.DropoutOfReLU(0.3).eval(), vae.DropoutOfReLU(0.0):
        assert torch.equal(layer(x), x.relu())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("changes", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}])
def test_loss_and_gradients_are_those_of_the_plain_computation(changes, frozen):
    model = tiny_vae(**changes)
    model = model.freeze_decoder() if frozen else model
    plain = plain_again(model)
    ids, mask = random_texts(4, 9)
    batch, eps = data.Batch(ids, mask, ids, torch.arange(4)), torch.randn(4, 8)
    terms = train.ELBO(model, 0.1)(batch, eps, 0.7)
    terms["loss"].mean().backward()
    mu, logvar = plain.encode(ids, mask)
    nats = F.cross_entropy(
        plain.decode(plain.reparameterize(mu, logvar, eps=eps), ids).transpose(1, 2), ids, reduction="none"
    )
    loss = (nats * mask).sum(1) + 0.7 * metrics.kl_divergence(mu, logvar).clamp(min=0.1).sum(1)
    loss.mean().backward()
    torch.testing.assert_close(terms["loss"], loss)
    ours, torchs = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, plain))
    assert ours.keys() == torchs.keys()
    assert any("lm_head" in name or "shared" in name for name in ours) != frozen
    for name, grad in ours.items():
        torch.testing.assert_close(grad, torchs[name], atol=1e-5 * (1 + torchs[name].abs().max().item()), rtol=1e-4)
    assert not torch.allclose(terms["loss"], loss + 1e-3 * loss.detach())


@pytest.mark.parametrize("phase", ["0", "1", "2", "2, no latent", "evaluation"])
def test_needed_flops_are_those_that_are_counted_without_padding(phase, monkeypatch):
    monkeypatch.setattr(vae, "multiply", lambda a, b: a @ b.T)  # which the counter knows
    torch.manual_seed(0)
    ids, latent_dim, trains = torch.randint(2, 64, (3, 10)), 0 if "latent" in phase else 8, phase != "evaluation"
    with warnings.catch_warnings(action="ignore"):  # W_mu of no latent
        model = T5VAE(tiny_config().to_dict(), latent_dim)
    objective = train.ELBO(model, 0.0)
    if phase == "0":
        model = T5ForConditionalGeneration(tiny_config())
        objective = train.SpanObjective(model)
    if phase == "1":
        model.freeze_decoder()
    batch = data.Batch(ids[:, :7], torch.ones(3, 7), ids, torch.arange(3))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trains):
        loss = objective(batch, torch.ones(3, latent_dim), 1.0)["loss"].sum()
        if trains:
            loss.backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if re.search(r"\.(addmm|mm)", str(op)))
    counted += 2 * 30 * 64 * 32 * (phase[0] == "2")  # the head's `addmm_`, which it does not know
    # Two layers a side. A query meets 7 keys, or those before it and its own: 55 in all, and 7 each in phase 0.
    scores = 3 * 2 * (7 * 7 * (latent_dim > 0) + 10 * 11 // 2 + 10 * 7 * (phase == "0"))
    attention = 2 * 2 * scores * SIZE["num_heads"] * SIZE["d_kv"] * (3 if trains else 1)
    read, written = torch.full((3,), 7), torch.full((3,), 10)
    assert train.flops_needed(model, read, written, trains) == counted + attention
    assert train.flops_needed(model, read, written + 1, trains) > counted + attention


def test_a_part_of_a_corpus(corpus):
    index = np.array([5, 0, 7])
    part = corpus.take(index)
    for mine, whole in zip(data.make_batch(part, range(3))[:3], data.make_batch(corpus, index)[:3], strict=True):
        assert torch.equal(mine, whole)
    assert part.words.tolist() == corpus.words[index].tolist()
    assert part.words.tolist() != corpus.words[:3].tolist()


@pytest.mark.parametrize("flags", ["--phase 0 1 2", "--phase 2 --no-latent --amp bf16"])
def test_the_benchmark_measures_all_and_writes_nothing(flags, corpus_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "0" in flags:  # once is enough
        monkeypatch.setattr(train, "matmul_rates", lambda args: [1e10, 2e10])
    size = "--d-model 32 --heads 2 --layers 1"
    run("--benchmark", "--dataset", corpus_dir, "--model", "tiny", *size.split(), *flags.split())
    out = capsys.readouterr().out
    for what, count in ("training", 3), ("evaluation", 3), ("generation", 2), ("peak memory", 3), ("plain", 3):
        found = re.findall(f"^{what}.*[1-9]|{what} .*[1-9]", out, re.M)
        assert len(found) == (count if "0" in flags else 1), (what, out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"), [("--model no/such-t5", "no/such-t5"), ("--init none", "'none' is neither")]
)
def test_a_benchmark_of_nothing_is_refused_in_one_line(flags, message, corpus_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match=message) as stop:
        run("--benchmark", "--dataset", corpus_dir, "--phase", 2, *flags.split())
    assert "\n" not in stop.value.code
