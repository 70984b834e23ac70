"""Tests: pytest test_vae.py. No network, no GPU; invariances have a control that breaks them."""

import os

os.environ.setdefault("TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: the same tests on every machine

import copy
import json
import math
import multiprocessing
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from transformers import AutoModelForSeq2SeqLM, ByT5Tokenizer, MT5Config, T5Config
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

import data
import metrics
import train
import vae
from vae import POOLINGS, T5VAE, pool

ROOT = Path(__file__).resolve().parent
CORE = ("vae.py", "data.py", "metrics.py", "train.py")
SIZE = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
PAD, EOS = 0, 1
LINES, CHARACTERS = 1_915, 95_200  # of the four modules together
WIDTH, TEST_LINES = 100, 1_100


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
    """ids, mask: rows of 2 to `length` tokens that end in </s>; the last row is the longest."""
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(2, length, batch - 1), length]
    return data.pad([np.append(rng.integers(3, vocab, n - 1), EOS) for n in lengths], PAD)


# ---------------------------------------------------------------------------------------- model


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
    assert abs(z.std() - 2) < 0.05, z.std()  # logvar is the logarithm of a variance
    assert torch.equal(z, tiny_vae().reparameterize(mu, logvar, torch.Generator().manual_seed(0)))


def test_freeze_decoder():
    vae = tiny_vae().freeze_decoder()
    trainable = {name for name, p in vae.named_parameters() if p.requires_grad}
    assert {"w_mu.weight", "w_logvar.weight"} < trainable
    assert all(name.startswith(("t5.encoder.", "w_mu", "w_logvar")) for name in trainable)


CLI_TEXTS = ["the old king sells a boat", "a monk"]
CLI_TEXTS += ["the tired queens will paint a red lamp in the garden", "she hides"]
SMALL = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4}
GATED = {"feed_forward_proj": "gated-gelu"}
ODD = {"d_kv": 5, "num_heads": 3}  # A * S != D
SHAPES = {  # changes of the configuration, whether the LM head is its own
    "plain": ({}, False),
    "plain, own head": ({}, True),
    "gated, own head (v1.1)": (GATED | {"tie_word_embeddings": False}, True),
    "gated, no scale, one head": (GATED | {"tie_word_embeddings": False}, False),
    "A * S != D, 3 decoder layers": (ODD | {"num_decoder_layers": 3}, False),
    "bytes (ByT5)": (GATED | {"vocab_size": 384, "num_heads": 2, "num_decoder_layers": 1}, True),
    "mT5": (ODD | {"num_decoder_layers": 1}, True),
}


@pytest.fixture(scope="session")
def cli_tokenizer():
    return data.train_tokenizer([text for text in CLI_TEXTS for _ in range(3)], 80)


def save_t5(folder, kind, tokenizer):
    """A random T5 of one of the shapes, and its tokenizer, in a folder."""
    torch.manual_seed(0)
    (changes, own_head), cls = SHAPES[kind], MT5Config if kind == "mT5" else T5Config
    settings = {"vocab_size": len(tokenizer), "decoder_start_token_id": PAD}
    t5 = AutoModelForSeq2SeqLM.from_config(cls(**SMALL | settings | changes))
    if own_head:
        t5.lm_head.weight = torch.nn.Parameter(torch.randn_like(t5.lm_head.weight))
    # A random decoder repeats its token; one that listens less to it writes all sorts.
    with torch.no_grad():
        t5.shared.weight *= 0.1
        for name, weight in t5.decoder.named_parameters():
            if "SelfAttention" in name or "DenseReluDense" in name:
                weight *= 8**0.5
    t5.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session", params=SHAPES)
def checkpoint(request, tmp_path_factory, cli_tokenizer):
    """A folder with a random T5 of one of the shapes."""
    folder = tmp_path_factory.mktemp("t5")
    save_t5(folder, request.param, ByT5Tokenizer() if "ByT5" in request.param else cli_tokenizer)
    return folder


def from_t5(folder, latent_dim=5, **kwargs):
    """A VAE around it, in whose output z is loud."""
    torch.manual_seed(1)
    model = T5VAE.from_t5(folder, latent_dim, **kwargs)
    assert not model.training
    with torch.no_grad():
        model.w_proj.weight *= 5
    return model


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.fixture
def batch(checkpoint):
    model = from_t5(checkpoint)
    labels = torch.randint(3, 50, (4, 7))
    labels[:, -1], labels[1, 4:] = 1, torch.tensor([1, 0, 0])
    return model, torch.randn(4, 5), labels


def test_decode_is_t5s_own_forward_on_the_memory(batch):
    model, z, labels = batch
    start = model.t5.prepare_decoder_input_ids_from_labels(labels)
    with torch.no_grad():
        memory = BaseModelOutput(model.memory(z))
        own = model.t5(encoder_outputs=memory, decoder_input_ids=start).logits
        torch.testing.assert_close(model.decode(z, labels), own, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(model.decode(z + 1, labels), own, atol=1e-2)
        nats = F.cross_entropy(own.mT, labels, ignore_index=PAD, reduction="none")
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
    """Greedy decoding without a cache: (B, steps + 1), start token first, padded after `eos_id`."""
    ids = torch.zeros(len(z), 1, dtype=torch.long)
    over = torch.zeros(len(z), dtype=torch.bool)
    for _ in range(steps):
        labels = F.pad(ids[:, 1:], (0, 1), value=3)  # decode does not look at the last one
        chosen = model.decode(z, labels)[:, -1].argmax(1).masked_fill(over, 0)
        ids, over = torch.cat([ids, chosen[:, None]], 1), over | (chosen == eos_id)
    return ids


@torch.no_grad()
def test_generate_is_the_argmax_loop_in_a_batch_and_row_by_row(checkpoint):
    model = from_t5(checkpoint)
    z = torch.randn(12, 5)
    free = argmax_loop(model, z, 12, eos_id=-1)[:, 1:]
    # Random models do not write </s>. For it stands the token that ends the most rows, each at
    # another place.
    ends = {t: {r.index(t) for r in free.tolist() if t in r} for t in free.unique().tolist() if t}
    eos_id = max(ends, key=lambda t: len(ends[t]))
    expected = argmax_loop(model, z, 12, eos_id)
    assert len(ends[eos_id]) >= 3  # rows of different lengths
    assert len(expected.unique(dim=0)) > 3  # which z tells apart
    generate = partial(model.generate, max_new_tokens=12, eos_token_id=eos_id)
    ids = generate(z)
    assert torch.equal(ids, expected[:, : ids.shape[1]])
    assert not expected[:, ids.shape[1] :].any()
    assert torch.equal(ids, generate(z, use_cache=False))
    beams, alone = generate(z, num_beams=3), generate(z[2:3], num_beams=3)[0]
    assert torch.equal(alone, beams[2, : len(alone)])
    for row, alone in zip(expected, z[:, None], strict=True):
        ids = generate(alone)[0]
        assert torch.equal(ids, row[: len(ids)])
        assert not row[len(ids) :].any()


def test_round_trip_keeps_every_bit(batch, tmp_path, cli_tokenizer):
    model, z, labels = batch
    # As new: a tokenizer that was loaded notes that it was, and from where.
    of_bytes = isinstance(model.tokenizer, ByT5Tokenizer)
    model.tokenizer = ByT5Tokenizer() if of_bytes else copy.deepcopy(cli_tokenizer)
    model.save_pretrained(tmp_path / "a")
    again = T5VAE.from_pretrained(tmp_path / "a")
    assert not again.training
    again.save_pretrained(tmp_path / "b")
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    for name in "config.json", "model.safetensors":
        assert a[name] == b[name]
    assert {"tokenizer_config.json", "README.md"} < a.keys()
    assert b"_name_or_path" not in a["config.json"]
    assert str(tmp_path.parent).encode() not in b"".join(a.values())
    with torch.no_grad():
        assert torch.equal(model.decode(z, labels), again.decode(z, labels))
        posteriors = zip(*(m.encode(labels, labels != PAD) for m in (model, again)), strict=True)
        assert all(torch.equal(one, other) for one, other in posteriors)
        assert torch.equal(model.generate(z, 6), again.generate(z, 6))
        assert model.tokenizer(CLI_TEXTS)["input_ids"] == again.tokenizer(CLI_TEXTS)["input_ids"]
        tied = [m.t5.lm_head.weight is m.t5.shared.weight for m in (model, again)]
        assert tied[0] == tied[1]
        again.w_mu.weight[0, 0] += 1
    again.save_pretrained(tmp_path / "c")
    assert files(tmp_path / "c")["model.safetensors"] != a["model.safetensors"]


def test_every_pretrained_weight_is_kept(checkpoint):
    t5, model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint), from_t5(checkpoint)
    kept = dict(model.t5.named_parameters())
    for name, weight in t5.named_parameters():
        name = name.replace("EncDecAttention.o.", "o.")  # noqa: PLW2901
        dead = ".layer.1." in name and "decoder" in name and not name.endswith(".o.weight")
        assert dead if name not in kept else torch.equal(weight, kept[name]), name


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory, cli_tokenizer):
    folder = tmp_path_factory.mktemp("t5")
    save_t5(folder, "gated, own head (v1.1)", cli_tokenizer)
    t5 = AutoModelForSeq2SeqLM.from_pretrained(folder)
    with torch.no_grad():  # it writes words, not sentinels, which are not shown
        t5.lm_head.weight[cli_tokenizer.all_special_ids] = 0
    t5.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(t5_folder, tmp_path):
    from_t5(t5_folder).save_pretrained(tmp_path / "old")
    return tmp_path / "old"


# ---------------------------------------------------------------------------------------- data


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
    rng = np.random.default_rng(1)
    rows = [np.append(rng.integers(3, 1000, n - 1), EOS) for n in lengths]

    def noisy(index, seed=0, epoch=0, extra=0):
        ids, mask = data.pad([rows[i] for i in index], 0)
        ids, mask = (F.pad(t, (0, extra)) for t in (ids, mask))
        ids, mask = data.delete_tokens(ids, mask, 0.4, seed, epoch, torch.tensor(index))
        return {i: row[m.bool()].tolist() for i, row, m in zip(index, ids, mask, strict=True)}

    together = noisy(list(range(40)))
    alone = {}
    for rank in range(4):  # four processes, other order, other batches, more padding
        share = list(range(40))[::-1][rank::4]
        alone |= noisy(share[:3], extra=7) | noisy(share[3:])
    assert alone == together
    assert noisy(list(range(40)), epoch=1) != together != noisy(list(range(40)), seed=1)


# ---------------------------------------------------------------------------------------- measures


def test_kl_is_that_of_torch_and_by_hand():
    mu = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    logvar = torch.linspace(-3, 2, 7).expand(5, 7)
    theirs = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(metrics.kl_divergence(mu, logvar), theirs)
    assert metrics.kl_divergence is vae.kl_divergence
    # (2^2 + 1 - 0 - 1) / 2 = 2
    assert metrics.kl_divergence(torch.tensor(2.0), torch.tensor(0.0)).item() == 2


def test_kl_weight():
    def weights(schedule, steps):
        return [train.kl_weight(step, schedule, 100) for step in steps]

    assert weights("linear", (0, 25, 100, 500)) == [0, 0.25, 1, 1]
    assert weights("constant", (0, 25)) == [1, 1]
    # Four cycles of 25 steps: up over 12.5, at 1 for 12.5, and again from 0.
    found = weights("cyclical", (0, 5, 13, 24, 25, 30, 99, 100))
    assert found == pytest.approx([0, 0.4, 1, 1, 0, 0.4, 1, 1])


FIRST = 3  # a text of the linear-Gaussian world is one token, FIRST + i, and </s>


class LinearGaussian(torch.nn.Module):
    """z ~ N(0, I), x ~ N(W z, noise I); W has orthogonal columns, hence a diagonal posterior.

    Text i stands for x[i], drawn from the model. q is the exact posterior, moved by `shift` and
    widened by `widen`. A decoder that reads `heard` dimensions of z knows the distribution of the
    others, so that its p(x) is the true one: it is x's density given those alone.
    """

    def __init__(self, n, latent_dim=4, scale=2.0, noise=1.0, shift=0.0, widen=0.0, heard=None):
        super().__init__()
        rng = torch.Generator().manual_seed(3)
        size = latent_dim + 2
        draw = partial(torch.randn, generator=rng, dtype=torch.float64)
        directions = torch.linalg.qr(draw(size, latent_dim)).Q
        self.w = directions * torch.linspace(scale / 2, scale, latent_dim, dtype=torch.float64)
        self.noise, self.shift, self.widen = noise, shift, widen
        self.heard = latent_dim if heard is None else heard
        self.x = draw(n, latent_dim) @ self.w.T + noise**0.5 * draw(n, size)
        self.latent_dim, self.device = latent_dim, torch.device("cpu")

    @property
    def posterior(self):
        """mu (n, Z) and variance (Z,) of the exact p(z|x)."""
        variance = 1 / (1 + (self.w**2).sum(0) / self.noise)
        return self.x @ self.w / self.noise * variance, variance

    def normal(self, mean, w):
        """N(mean, w w' + noise I), of x."""
        covariance = w @ w.T + self.noise * torch.eye(len(w), dtype=torch.float64)
        return MultivariateNormal(mean, covariance, validate_args=False)

    def log_p(self):
        """(n,) log p(x) of all texts."""
        return self.normal(torch.zeros(len(self.w)).double(), self.w).log_prob(self.x)

    def mutual_information(self):
        return 0.5 * torch.log1p((self.w**2).sum(0) / self.noise).sum().item()

    def encode(self, ids, mask):
        mu, variance = self.posterior
        mu = mu[ids[:, 0] - FIRST] + self.shift
        return mu, (variance.log() + self.widen).expand_as(mu)

    def reparameterize(self, mu, logvar, eps):
        return mu + (logvar / 2).exp() * eps

    def rec(self, z, labels):
        read, unread = self.w[:, : self.heard], self.w[:, self.heard :]
        mean = z.double()[:, : self.heard] @ read.T
        return -self.normal(mean, unread).log_prob(self.x[labels[:, 0] - FIRST])

    def generate(self, z, max_new_tokens):
        return torch.full((len(z), 2), EOS)


def toy_corpus(n):
    ids = np.stack([np.arange(FIRST, FIRST + n), np.full(n, EOS)], 1).astype(np.int32).ravel()
    return data.Corpus(ids, np.arange(0, 2 * n + 1, 2), np.full(n, 2), 0, 0, 0, 2, "")


def whole(n):
    return data.make_batch(toy_corpus(n), np.arange(n))


def test_importance_weighting_is_exact_with_the_exact_posterior():
    model = LinearGaussian(50)
    for samples in 1, 7:
        nll = metrics.sample_posterior(model, whole(50), samples)[-1]
        torch.testing.assert_close(nll, -model.log_p(), rtol=1e-6, atol=1e-6)
    worse = LinearGaussian(50, widen=0.5)
    assert (metrics.sample_posterior(worse, whole(50), 7)[-1] + worse.log_p()).abs().max() > 0.01


def test_importance_weighted_nll_falls_from_the_bound_to_the_truth():
    n = 2000
    model = LinearGaussian(n, shift=0.2, widen=0.6)
    mu, variance = model.posterior
    q = Normal(mu + 0.2, (variance * math.exp(0.6)) ** 0.5)
    gap = kl_divergence(q, Normal(mu, variance**0.5)).sum(1).mean().item()
    excess = [
        (metrics.sample_posterior(model, whole(n), k)[-1] + model.log_p()).mean().item()
        for k in (1, 2, 8, 32, 128)
    ]
    assert excess == sorted(excess, reverse=True), excess
    assert excess[0] == pytest.approx(gap, abs=0.1)
    bound = metrics.evaluate(model, toy_corpus(n), 256)["neg_elbo"] + model.log_p().mean().item()
    assert bound == pytest.approx(gap, abs=0.1), "the -ELBO is above the truth by KL(q to p(z|x))"
    assert abs(excess[-1]) < 0.03 < gap / 10, (excess, gap)


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


@pytest.mark.parametrize("kl", [8, 16, 40])
def test_efficiency_is_what_the_decoder_reads(kl):
    """0 where it reads no dimension of z, 1 where it reads all, and in between it rises."""
    n, scale = 1000, 1.38 * math.exp(kl / 4)  # four dimensions of ln(w) nats each, about
    models = [LinearGaussian(n, scale=scale, heard=heard) for heard in range(5)]
    evaluate = partial(metrics.evaluate, batch_size=256, iw_samples=100, thorough=True)
    found = [evaluate(model, toy_corpus(n)) for model in models]
    assert found[0]["kl"] == pytest.approx(kl, rel=0.1)
    gains = [measured["efficiency"] for measured in found]
    assert gains[0] == pytest.approx(0, abs=1e-6), "no number of samples is too small"
    assert gains[-1] == pytest.approx(1, abs=0.03)
    assert gains == sorted(gains), gains
    assert found[0]["swap_cost"] == pytest.approx(0, abs=1e-6)
    # The known bias of importance weighting where z is ignored: it grows with the KL. nll has none.
    truth = -models[0].log_p().mean().item()
    assert found[0]["nll"] == pytest.approx(truth, abs=1e-6)
    assert found[0]["nll_iw"] - truth > {8: 0.2, 16: 2, 40: 15}[kl]
    assert found[-1]["nll"] == pytest.approx(truth, abs=1e-6)
    assert "z is ignored" in metrics.verdict(found[0])
    assert "z is used" in metrics.verdict(found[-1])


def test_standard_errors_are_those_of_resampled_sentences():
    n = 400
    columns = metrics.measure(LinearGaussian(n, widen=0.5), toy_corpus(n), 256, 5, thorough=True)
    measured = metrics.summarize(columns, toy_corpus(n), 5)
    rng, found = np.random.default_rng(0), []
    for _ in range(1000):
        index = torch.from_numpy(rng.integers(n, size=n))
        found.append(metrics.means_and_errors({k: v[index] for k, v in columns.items()}))
    for name in "rec", "gain", "efficiency":
        resampled = np.std([sample[name] for sample in found])
        assert measured[name + "_se"] == pytest.approx(resampled, rel=0.15), name


def test_what_is_not_finite_is_refused_by_name(tmp_path):
    model = LinearGaussian(20)
    model.x[6] = math.nan
    with pytest.raises(FloatingPointError, match="mu of text 7 of the split is not finite"):
        metrics.evaluate(model, toy_corpus(20), 8)
    rec = LinearGaussian.rec
    model = LinearGaussian(20)
    model.rec = lambda z, labels: rec(model, z, labels).masked_fill(labels[:, 0] == FIRST, math.inf)
    with pytest.raises(FloatingPointError, match="rec of text 1 of the split is not finite"):
        metrics.evaluate(model, toy_corpus(20), 8)
    with pytest.raises(ValueError, match="not JSON compliant"):
        data.write_json(tmp_path / "metrics.json", {"rec": math.nan})
    assert not list(tmp_path.iterdir())


def test_metrics_json_stays_where_a_number_is_not_finite(whole_run, tmp_path, monkeypatch):
    run, rec = shutil.copytree(whole_run, tmp_path / "run"), T5VAE.rec
    corpus = metrics.load_run(run)[-1]("test")
    first = corpus.ids[corpus.offsets[:-1]]
    bad, before = int(first.argmax()), files(run)
    hit = lambda labels: labels[:, 0] == int(first[bad])  # noqa: E731
    monkeypatch.setattr(T5VAE, "rec", lambda s, z, x: rec(s, z, x).masked_fill(hit(x), math.nan))
    with pytest.raises(SystemExit, match=f"rec of text {bad + 1} of the split is not finite"):
        metrics.main([str(run), "--iw-samples", "1"])
    assert files(run) == before


@pytest.mark.parametrize("n", [16, 1024])
def test_mutual_information_is_the_truth_or_its_ceiling(n):
    far = LinearGaussian(n, latent_dim=8, scale=60.0)  # 28 nats: every posterior stands alone
    near = LinearGaussian(n, latent_dim=2, scale=2.0)  # 1.2 nats: within reach of every n
    for model in far, near:
        mu, variance = model.posterior
        generator = torch.Generator().manual_seed(1)
        z = mu + variance.sqrt() * torch.randn(mu.shape, generator=generator, dtype=mu.dtype)
        mi = metrics.mutual_information(mu, variance.log().expand_as(mu), z).item()
        assert mi <= math.log(n) + 1e-9
        target = min(model.mutual_information(), math.log(n))
        assert mi == pytest.approx(target, abs=0.05 + 2 / math.sqrt(n)), (n, target)


def test_mutual_information_of_one_posterior_for_all_is_zero():
    mu = torch.zeros(300, 8)
    assert metrics.mutual_information(mu, mu, torch.randn(300, 8)).abs() < 1e-9


def test_mutual_information_by_chunks_is_the_same():
    generator = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(700, 5, generator=generator), torch.randn(700, 5, generator=generator)
    z = mu + (logvar / 2).exp() * torch.randn(700, 5, generator=generator)
    once = metrics.mutual_information(mu, logvar, z=z, chunk=700)
    for chunk in 1, 64, 10_000:
        torch.testing.assert_close(metrics.mutual_information(mu, logvar, z=z, chunk=chunk), once)
    # All densities at once, by torch's own hand.
    q = Normal(mu.double(), (logvar.double() / 2).exp())
    log_q = q.log_prob(z[:, None].double()).sum(2)
    direct = (log_q.diagonal() - log_q.logsumexp(1) + math.log(700)).mean()
    torch.testing.assert_close(once, direct)


def test_active_units_around_the_threshold_with_n_minus_1():
    # Values +a and -a: the variance is a^2 with n, 2 a^2 with n - 1.
    for a, active in (0.0708, 1), (0.0706, 0), (0.2, 1), (0.0, 0):
        assert metrics.active_units(torch.tensor([[a], [-a]])) == active, a
    three = torch.tensor([[5.0, 1, 0], [5, 2, 0.1], [5, 3, 0]])
    assert metrics.active_units(three, threshold=0.01) == 1
    assert metrics.active_units(torch.ones(1, 4)) == 0


RUN_TEXTS = ("the old king sold a boat", "a queen")
RUN_TEXTS += ("the happy witch hid a red drum by the lake", "monks \u4e2d lost it")


@pytest.fixture(scope="module")
def metrics_tokenizer():
    return data.train_tokenizer(data.read_texts("grammar", "valid"), 400)


@pytest.fixture(scope="module")
def corpus(metrics_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "train.txt").write_text("\n".join(RUN_TEXTS * 5), encoding="utf-8")
    return data.load_corpus(str(folder), "train", metrics_tokenizer)


def small_vae(metrics_tokenizer, latent_dim=4, seed=0):
    torch.manual_seed(seed)
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=len(metrics_tokenizer), decoder_start_token_id=0, **shape)
    model = T5VAE(config.to_dict(), latent_dim)
    model.tokenizer = metrics_tokenizer
    for parameter in model.w_proj.parameters():
        torch.nn.init.normal_(parameter)  # z is heard
    return model


def test_no_number_depends_on_the_batch_size(metrics_tokenizer, corpus):
    model = small_vae(metrics_tokenizer)
    one = metrics.evaluate(model, corpus, 1, iw_samples=3, thorough=True)
    many = metrics.evaluate(model, corpus, 64, iw_samples=3, thorough=True)
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


def test_numbers_follow_from_counts_and_sentences(metrics_tokenizer, corpus):
    model = small_vae(metrics_tokenizer)
    result = metrics.evaluate(model, corpus, iw_samples=2, thorough=True)
    order = data.evaluation_order(corpus.lengths, 3)
    batches = [data.make_batch(corpus, index) for index in order]
    nll = torch.cat([metrics.sample_posterior(model.eval(), b, 2)[-1] for b in batches])
    assert result["nll_iw"] == pytest.approx(nll.mean().item())
    assert result["nll_iw_se"] == pytest.approx((nll.std() / len(nll) ** 0.5).item())
    assert result["ppl_token_iw"] == pytest.approx(math.exp(nll.sum().item() / corpus.ids.size))
    nats = result["neg_elbo"] * len(corpus)
    assert result["ppl_word"] == pytest.approx(math.exp(nats / corpus.words.sum()))
    assert result["nll"] == pytest.approx(min(result["nll_iw"], result["rec_prior"]))
    assert result["gain"] == pytest.approx(result["nll"] - result["rec"])
    unknown = (corpus.ids == metrics_tokenizer.unk_token_id).sum()
    assert result["unk_share"] * result["tokens"] == pytest.approx(unknown)
    assert unknown > 0


def test_a_language_model_has_no_use_of_z(metrics_tokenizer, corpus):
    model = small_vae(metrics_tokenizer, latent_dim=0)
    result = metrics.evaluate(model, corpus, iw_samples=5, thorough=True)
    assert result["kl"] == result["gain"] == result["au"] == 0
    assert result["mi"] == pytest.approx(0, abs=1e-9)
    assert result["nll_iw"] == pytest.approx(result["rec"], rel=1e-9)
    assert result["rec_other"] == pytest.approx(result["rec"], rel=1e-9)
    assert "z is" not in metrics.verdict(result)


def said(**changes):
    """The verdict of a run that uses 8 nats, with changes."""
    measured = {"latent_dim": 4, "rec": 10.0, "kl": 8.2, "swap_cost": 20.0, "swap_cost_se": 0.1}
    measured |= {"gain": 7.9, "nll": 17.9} | changes
    return metrics.verdict(measured, target=8.0, lm_nll=18.1)


def test_the_verdict_does_not_contradict_itself():
    assert "z is used" in said()
    for words in "20.00\u00b10.10 nats higher", "18.10", "met (8.20)", "at most 7.90":
        assert words in said()
    assert "MISSED" in said(kl=9.0)
    useless = said(kl=40.0, swap_cost=0.02, swap_cost_se=0.02, gain=3.0)
    assert "z is ignored" in useless
    assert "buys nothing" in useless
    assert "explain" not in useless, "what swaps do not change explains nothing"
    small = said(kl=0.9, swap_cost=0.8, swap_cost_se=0.05, gain=0.7)
    assert "z is used" in small, "small is not unused"
    assert "hardly used" in said(kl=40.0, swap_cost=0.5, swap_cost_se=0.02, gain=0.4)
    warm_up = {"latent_dim": 4, "rec": 1.0, "kl": 150.0, "swap_cost": 90.0, "swap_cost_se": 0.1}
    assert "z is used" in metrics.verdict(warm_up)
    assert "explain" not in metrics.verdict(warm_up)


def test_six_verdicts(metrics_tokenizer, corpus):
    """A run that collapsed, one at 0.9 nats, at 40 useless nats, phase 1, no latent."""

    def verdict_of(iw_samples=20, **world):
        model, evaluate = LinearGaussian(500, **world), metrics.evaluate
        return metrics.verdict(evaluate(model, toy_corpus(500), 250, iw_samples, thorough=True))

    collapsed, small = verdict_of(scale=0.0), verdict_of(scale=1.0)
    useless, used, phase_1 = verdict_of(scale=30.0, heard=0), verdict_of(), verdict_of(0)
    for line in collapsed, useless:
        assert re.match("z is ignored: .*buys nothing", line)
        assert "explain" not in line
    assert float(re.search(r"its KL is ([\d.]+) nats", small)[1]) == pytest.approx(0.9, abs=0.1)
    for line in small, used, phase_1:
        assert line.startswith("z is used")
        assert ("explain" in line) == ("NLL" in line) == (line is not phase_1)
    without = metrics.evaluate(small_vae(metrics_tokenizer, 0), corpus, 5, 5, thorough=True)
    assert metrics.verdict(without) == f"rec {without['rec']:.2f} nats per sentence"


def test_the_table_prints_what_the_dict_holds(metrics_tokenizer, corpus):
    result = metrics.evaluate(small_vae(metrics_tokenizer), corpus, iw_samples=2, thorough=True)
    table = metrics.format_table({"name": result}).splitlines()[1:-1]
    lines = {line.split()[0].strip(","): line.split()[-1] for line in table}
    for key in "rec", "kl", "neg_elbo", "nll", "gain", "efficiency", "swap_cost":
        assert lines[key] == f"{result[key]:.2f}\u00b1{result[key + '_se']:.2f}", key
    for key in "tokens", "words", "sentences", "au", "mi_n", "iw_samples":
        assert lines[key] == f"{result[key]:,}", key
    assert lines["mi"].endswith("\u00b1?"), "a number without an error says so"
    assert "entropy" not in lines, "what no run has is left out"
    two = metrics.format_table({"a": result, "b": result | {"entropy": 21.0, "kl": 3e7}})
    assert "3.0e+07" in two
    assert "21.00" in two


# --------------------------------------------------------------------------------------- training

# Children start from one process that has imported everything once, late imports included.
FORK = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
T5 = "transformers.models.t5"
LATE = [f"{T5}.modeling_t5", f"{T5}.tokenization_t5", "transformers.generation.utils"]
FORK.set_forkserver_preload(["train", "test_vae", *LATE, "torch._dynamo", "sentencepiece"])

TINY = shlex.split("--model tiny --d-model 16 --layers 1 --heads 2 --vocab-size 40")
SHORT = shlex.split("--batch-size 5 --log-every 3 --max-length 12 --device cpu --denoise 0.2")
SHORT += shlex.split("--epochs 2 --iw-samples 2")


def main(*args, report=None):
    """train.main in a process of its own, and quiet; `report` gets its standard error."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = open(report or os.devnull, "w", buffering=1)  # noqa: SIM115
    T5VAE.decode_texts = lambda self, z, **_: [""] * len(z)  # takes longer than all the rest
    train.main([str(arg) for arg in args])


def start(target, *args, **kwargs):
    child = FORK.Process(target=target, args=args, kwargs=kwargs)
    child.start()
    return child


def end(child):
    child.join(600)  # a busy machine is slow: only what hangs takes as long
    child.kill()
    child.join()
    return child.exitcode


def train_run(target, *args, **kwargs):
    return end(start(target, *args, **kwargs))


def cut(calls, name, then, *args, **kwargs):
    """main, in which the call number `calls` of train.<name> does `then` first."""
    *path, name = name.split(".")
    module, count = getattr(train, path[0]) if path else train, 0
    original = getattr(module, name)

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


def weights(run):
    return load_file(Path(run, "model", "model.safetensors"))


def log_records(run):
    return [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]


def same_run(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_log(one, other):
    return Path(one, "log.jsonl").read_bytes() == Path(other, "log.jsonl").read_bytes()


def distance(one, other):
    """The largest relative difference of a weight tensor."""
    a, b = weights(one), weights(other)
    return max(((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-12)).item() for n in a)


def saved_state(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a data set of 23 texts, and VAEs made of it, without and with dropout."""
    home = tmp_path_factory.mktemp("train")
    texts = data.read_texts("grammar", "train")[:23]
    for split in data.SPLITS:
        (home / f"{split}.txt").write_text("\n".join(texts[: 23 if split == "train" else 7]))
    flags = ["--dataset", home, "--phase", 1, "--latent-dim", 3, *TINY, *SHORT, "--epochs", 0]
    assert train_run(main, *flags, "--out", home / "made") == 0
    (home / "made" / "phase1").rename(home / "vae")
    config = shutil.copytree(home / "vae", home / "dropout") / "model" / "config.json"
    content = json.loads(config.read_text())
    content["t5_config"]["dropout_rate"] = 0.1
    config.write_text(json.dumps(content))
    return home


@pytest.fixture(scope="session")
def command(home):
    """Phase 2 with dropout and a target, which most tests use."""
    return ["--dataset", home, "--phase", 2, "--init", home / "dropout", *SHORT, "--kl-target", 0.2]


@pytest.fixture(scope="session")
def quiet(home):
    """Phase 2 without dropout, whose noise depends on how a batch is divided among processes."""
    return ["--dataset", home, "--phase", 2, "--init", home / "vae", *SHORT, "--kl-target", 0.2]


@pytest.fixture(scope="session")
def whole_run(home, command):
    """A run that nothing happened to."""
    assert train_run(main, *command, "--out", home / "whole") == 0
    return home / "whole" / "phase2"


@pytest.fixture(scope="session")
def plain(home, quiet):
    """The same without dropout."""
    assert train_run(main, *quiet, "--out", home / "plain") == 0
    return home / "plain" / "phase2"


def test_a_run_folder_is_whole(whole_run, home):
    assert {path.name for path in whole_run.iterdir()} == {
        *train.RUN_FILES, "config.json", "model"
    } - {"checkpoint.pt"}  # fmt: skip
    config = json.loads((whole_run / "config.json").read_text())
    assert (config["phase"], config["kl_target"], config["latent_dim"]) == (2, 0.2, 3)
    assert config["command"].startswith("python train.py --dataset")
    assert len(config["data_sha256"]["train"]) == 64
    log = log_records(whole_run)
    assert [r["step"] for r in log if r["split"] == "train"] == [3, 6, 9, 10]
    assert [r["step"] for r in log if r["split"] == "valid"] == [0, 5, 10]
    assert not any("time" in key or "second" in key for r in log for key in r)
    result = json.loads((whole_run / "metrics.json").read_text())
    promised = "rec kl neg_elbo nll nll_iw iw_samples ppl_token ppl_word ppl_token_iw ppl_word_iw"
    promised += " mi mi_n au rec_other rec_prior swap_cost gain efficiency exact_match rec_se"
    promised += " token_accuracy sentences tokens words entropy unk_share latent_dim gain_se"
    assert set(promised.split()) <= set(result)
    warm_up = json.loads((home / "vae" / "metrics.json").read_text())
    assert "nll_iw" in warm_up, "phase 1 has it where --iw-samples is given"


def test_seeds(tmp_path, command, whole_run):
    assert train_run(main, *command, "--out", tmp_path / "same") == 0
    assert same_run(tmp_path / "same" / "phase2", whole_run)
    assert same_log(tmp_path / "same" / "phase2", whole_run)
    assert train_run(main, *command, "--seed", 1, "--out", tmp_path / "other") == 0
    assert not same_run(tmp_path / "other" / "phase2", whole_run)


def test_phase_1_moves_the_encoder_alone_and_phase_2_the_rest(tmp_path, home, plain):
    flags = ["--dataset", home, "--phase", 1, "--init", home / "vae", *SHORT]
    assert train_run(main, *flags, "--out", tmp_path / "frozen") == 0
    assert train_run(main, *flags, "--no-freeze-decoder", "--out", tmp_path / "free") == 0
    runs = (home / "vae", tmp_path / "frozen" / "phase1", tmp_path / "free" / "phase1", plain)
    before, frozen, free, two = map(weights, runs)
    for name, weight in before.items():
        moves = name.startswith(("t5.encoder.", "w_mu", "w_logvar"))
        assert torch.equal(frozen[name], weight) != moves, name
        assert not torch.equal(free[name], weight), name
        assert not torch.equal(two[name], weight), name
    assert {r.get("kl_weight", 0.0) for r in log_records(runs[1])} == {0.0}
    assert {r.get("kl_weight", 0.0) for r in log_records(plain)} != {0.0}


def test_saved_runs_are_measured_again(whole_run, home, tmp_path, capsys):
    run = shutil.copytree(whole_run, tmp_path / "run")
    before = (run / "metrics.json").read_bytes()
    metrics.main([str(run), "--iw-samples", "2"])
    out, after = capsys.readouterr().out, json.loads((run / "metrics.json").read_text())
    for name, value in json.loads(before).items():
        assert value is None or after[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert "z is" in out.splitlines()[-1]
    values = {k: torch.from_numpy(v) for k, v in np.load(run / "sentences.npz").items()}
    again = metrics.means_and_errors(values)
    assert {"nll", "gain", "efficiency_se", "swap_cost", "exact_match"} < again.keys()
    assert again == pytest.approx({name: after[name] for name in again}, rel=1e-9)
    lm = tmp_path / "lm"
    config = json.loads((run / "config.json").read_text())
    other = {"max_length": 13}, {"data_sha256": {"test": "other"}}, {"data_sha256": None}
    for latent_dim, change in [(0, {}), (3, {}), *[(0, change) for change in other]]:
        lm.mkdir(exist_ok=True)
        data.write_json(lm / "config.json", config | change)
        data.write_json(lm / "metrics.json", {"rec": 12.34, "latent_dim": latent_dim})
        metrics.main([str(run), "--iw-samples", "1"])
        shown = "12.34" in capsys.readouterr().out
        assert shown == (latent_dim == 0 and not change)
        if not shown:
            with pytest.raises(SystemExit, match="--lm is"):
                metrics.main([str(run), "--lm", str(lm)])
    (run / "metrics.json").unlink()
    metrics.main([str(run), "--iw-samples", "1"])
    assert not (run / "metrics.json").exists(), "measuring does not finish a run"
    with pytest.raises(SystemExit, match="metrics.py: cannot use no/run"):
        metrics.main(["no/run"])


# A call of a function of train.py: in a step, within the write of a checkpoint, in an evaluation,
# in the last one, before the model is saved, before and between the two files of measures.
CALLS = {"seed_dropout": 7, "os.replace": 7, "os.fsync": 7, "metrics.evaluate": 2}
CALLS |= {"T5VAE.save_pretrained": 1, "metrics.measure": 4, "write_samples": 1}
CALLS = [*CALLS.items(), ("metrics.write_measures", 1), ("os.replace", 13)]


@pytest.mark.parametrize(("where", "calls"), CALLS)
def test_killed_anywhere(tmp_path, command, whole_run, where, calls):
    flags, kill = [*command, "--save-every", 0, "--resume"], partial(send, signal.SIGKILL)
    flags += ["--out", tmp_path]
    assert train_run(cut, calls, where, kill, *flags) == -signal.SIGKILL
    assert not (tmp_path / "phase2" / "metrics.json").exists()
    trained = (tmp_path / "phase2" / "model").exists() or where == "T5VAE.save_pretrained"
    # Where training had ended, a kill costs the evaluation alone: no step is taken again.
    assert train_run(cut, 1 if trained else 0, "seed_dropout", kill, *flags) == 0
    assert same_run(tmp_path / "phase2", whole_run)
    assert same_log(tmp_path / "phase2", whole_run)
    assert files(tmp_path / "phase2").keys() == files(whole_run).keys()
    assert files(tmp_path / "phase2")["metrics.json"] == files(whole_run)["metrics.json"]


def test_tiny_makes_phase_2_alone_and_language_models(tmp_path, home):
    flags = ["--dataset", home, *TINY, *SHORT, "--epochs", 1, "--out", tmp_path]
    assert train_run(main, *flags, "--phase", 2, "--init", "tiny") == 0
    assert train_run(main, *flags, "--no-latent") == 0
    result = json.loads((tmp_path / "lm" / "metrics.json").read_text())
    assert (result["latent_dim"], result["kl"]) == (0, 0)
    lines = (tmp_path / "phase2" / "samples.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["text", "reconstructed"] * 3 + ["sampled"] * 3


# ---------------------------------------------------------------------------------- command line


def settings(flags):
    return train.parse_args(shlex.split(flags))


def test_recipes_are_defaults_and_given_flags_win():
    one, two = settings("--dataset grammar")
    assert (one.phase, one.epochs, two.phase, two.epochs) == (1, 5, 2, 3)
    assert (two.kl_target, two.kl_threshold, two.kl_anneal_epochs) == (0, 0.5, 50)
    assert (one.denoise, one.freeze_decoder, two.optimizer) == (0.15, True, "adamw")
    one, two = settings("--dataset grammar --recipe best")
    assert (one.epochs, one.dropout, one.freeze_decoder, two.epochs) == (4, 0, False, 10)
    assert (one.kl_target, two.kl_target, two.kl_threshold, two.batch_size) == (0, 8, 0, 32)
    one, two = settings("--dataset grammar --recipe best --epochs 7 --out here")
    assert (one.epochs, two.epochs) == (7, 7), "a flag holds for both phases"
    (two,) = settings("--dataset grammar --phase 2 --epochs 7")
    assert (two.phase, two.epochs) == (2, 7)


def test_what_sets_a_target_and_what_switches_it_off():
    for flags in "--kl-threshold 0.1", "--kl-schedule constant", "--kl-target 0", "--no-latent":
        assert settings(f"--dataset grammar --recipe best {flags}")[-1].kl_target == 0, flags
    (two,) = settings("--dataset grammar --kl-target 6 --phase 2")
    assert (two.kl_target, two.kl_threshold, two.kl_anneal_epochs) == (6, 0, pytest.approx(0.9))
    assert settings("--dataset grammar --kl-schedule cyclical")[1].kl_anneal_epochs == 3


def test_the_demonstration_is_the_bare_command(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "run_phase", lambda args, later: seen.append(args))
    train.main(["--seed", "3", "--out", "no/where"])
    assert [(a.phase, a.dataset, a.model, a.seed) for a in seen] == [
        (phase, "grammar", "tiny", 3) for phase in (1, 2)
    ]
    work = sum(a.epochs for a in seen) * 20_000
    assert work <= 0.7 * 3130 * 64, "of the first edition's"
    with pytest.raises(SystemExit):
        train.main(["--amp", "bf16"])


def test_readme_commands_parse():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(path.read_text() for path in pages)
    commands = re.findall(
        r"^(?: {4}|)(?:.*&& |[A-Z_]+=.* )?(?:torchrun \S+ |python )train\.py(.*)$", text, re.M
    )
    assert len(commands) > 5
    for flags in commands:
        argv = shlex.split(flags, comments=True)
        if argv and "--help" not in argv:
            settings(shlex.join(argv if "--dataset" in argv else [*argv, "--dataset", "grammar"]))
    scripts = {path.stem for path in (ROOT / "extras").glob("*.py")}
    assert set(re.findall(r"python -m extras\.(\w+)", text)) <= scripts or not scripts


def test_the_core_names_no_extra_and_keeps_its_size():
    sources = {name: (ROOT / name).read_text() for name in CORE}
    assert not [name for name, text in sources.items() if re.search("extras", text)]
    assert sum(text.count("\n") for text in sources.values()) <= LINES
    assert sum(map(len, sources.values())) <= CHARACTERS
    sources["test_vae.py"] = (ROOT / "test_vae.py").read_text()
    assert sources["test_vae.py"].count("\n") <= TEST_LINES
    wide = {name: max(map(len, text.splitlines())) for name, text in sources.items()}
    assert max(wide.values()) <= WIDTH, wide


def test_public_names_stay():
    names = "from_t5 from_pretrained save_pretrained push_to_hub encode reparameterize memory"
    names = {T5VAE: names + " decode rec generate encode_texts decode_texts freeze_decoder"}
    names |= {vae: "pool kl_divergence", data: "delete_tokens load_corpus", train: "main"}
    names |= {metrics: "mutual_information active_units evaluate kl_divergence main"}
    for owner, theirs in names.items():
        assert [name for name in theirs.split() if not callable(getattr(owner, name, None))] == []


def test_the_core_works_alone(tmp_path, home):
    for name in CORE:
        shutil.copy(ROOT / name, tmp_path)
    flags = ["--dataset", home, *TINY, "--limit", 4, "--batch-size", 4, "--epochs", 1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "train.py", *map(str, flags), "--iw-samples", "1"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs" / home.name / "phase2" / "metrics.json").exists()
