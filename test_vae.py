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
from torch.overrides import TorchFunctionMode
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
    with pytest.raises(data.InputError, match="pooling is 'sum'"):
        pool(hidden, mask, "sum")


def test_reparameterize():
    mu, logvar = torch.full((20000, 1), 3.0), torch.full((20000, 1), math.log(4.0))
    z = tiny_vae().reparameterize(mu, logvar, torch.Generator().manual_seed(0))
    assert abs(z.mean() - 3) < 0.05, z.mean()
    assert abs(z.std() - 2) < 0.05, z.std()  # logvar is the logarithm of a variance
    assert torch.equal(z, tiny_vae().reparameterize(mu, logvar, torch.Generator().manual_seed(0)))


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
    """{relative path: content} of all files in a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def batch(checkpoint):
    model = from_t5(checkpoint)
    labels = torch.randint(3, 50, (4, 7))
    labels[:, -1], labels[1, 4:] = 1, torch.tensor([1, 0, 0])
    return model, torch.randn(4, 5), labels


def literal(t5, memory, labels):
    """Logits with T5's own cross-attention: a cache that holds the one key, which is the value."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for layer in range(t5.config.num_decoder_layers):
        one_key = memory[:, layer].view(len(labels), t5.config.num_heads, 1, t5.config.d_kv)
        cache.cross_attention_cache.update(one_key, one_key, layer)
        cache.is_updated[layer] = True
    unread = BaseModelOutput(torch.randn(len(labels), 1, t5.config.d_model))
    start = t5.prepare_decoder_input_ids_from_labels(labels)
    return t5(encoder_outputs=unread, decoder_input_ids=start, **{vae.CACHE: cache}).logits


@torch.no_grad()
def test_one_key_of_t5s_own_cross_attention_gives_the_same_logits(checkpoint, batch):
    model, z, labels = batch
    t5 = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    own = literal(t5, model.memory(z), labels)
    torch.testing.assert_close(model.decode(z, labels), own, atol=1e-4, rtol=1e-4)
    other = literal(t5, model.memory(z.flip(0)), labels)
    assert not torch.allclose(own, other, atol=1e-2), "the control"
    nats = F.cross_entropy(own.mT, labels, ignore_index=PAD, reduction="none")
    torch.testing.assert_close(model.rec(z, labels), nats.sum(1), atol=1e-3, rtol=1e-4)


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
        assert model.tokenizer(CLI_TEXTS)["input_ids"] == again.tokenizer(CLI_TEXTS)["input_ids"]
        again.w_mu.weight[0, 0] += 1
    again.save_pretrained(tmp_path / "c")
    assert files(tmp_path / "c")["model.safetensors"] != a["model.safetensors"]


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory, cli_tokenizer):
    folder = tmp_path_factory.mktemp("t5")
    save_t5(folder, "gated, own head (v1.1)", cli_tokenizer)
    return folder


# ---------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def data_tokenizer():
    return data.train_tokenizer(data.read_texts("grammar", "valid"), 300)


@pytest.fixture(scope="module")
def grammar_corpus(data_tokenizer):
    return data.load_corpus("grammar", "valid", data_tokenizer)


def write(folder, name="train.txt", content=b"a king paints\na queen sings\n"):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(content)
    return str(folder)


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


@pytest.mark.parametrize("prob", [0.15, 0.40])
def test_deletion_rate_and_what_survives(prob):
    lengths = np.arange(1, 41).repeat(50)
    rng = np.random.default_rng(0)
    rows = [np.append(rng.integers(3, 1000, n - 1), EOS) for n in lengths]
    short = [data.delete_tokens(row, prob, rng) for row in rows]
    left = np.array([len(row) for row in short])
    may_go, gone = (lengths - 1)[lengths > 10].sum(), (lengths - left)[lengths > 10].sum()
    assert abs(gone / may_go - prob) < 4 * np.sqrt(prob * (1 - prob) / may_go)
    assert (left >= np.minimum(lengths, 2)).all(), "if all tokens go, one is taken back"
    for row, kept in zip(rows, short, strict=True):
        assert kept[-1] == EOS
        rest = iter(row.tolist())
        assert all(token in rest for token in kept.tolist())  # in order
    assert data.delete_tokens(rows[-1], 0.0, rng).tolist() == rows[-1].tolist()
    for wrong in 1.0, -0.1, math.nan:
        with pytest.raises(data.InputError, match=f"prob is {wrong}"):
            data.delete_tokens(rows[0], wrong, rng)


def test_noise_depends_on_seed_epoch_and_text_alone(grammar_corpus):
    index = np.arange(40)

    def noisy(index, epoch=0, seed=0):
        noise = {"denoise": 0.4, "latent_dim": 3, "seed": seed}
        batch = data.training_batch(grammar_corpus, epoch, index, **noise)
        rows = [row[m.bool()].tolist() for row, m in zip(batch.ids, batch.mask, strict=True)]
        return dict(zip(index.tolist(), zip(rows, batch.eps.tolist(), strict=True), strict=True))

    together, alone = noisy(index), {}
    for rank in range(4):  # four processes, other order, other batches
        share = index[::-1][rank::4]
        alone |= noisy(share[:3]) | noisy(share[3:])
    assert alone == together
    assert noisy(index, epoch=1) != together != noisy(index, seed=1)
    uses = {data.LATENT, data.POSTERIOR, data.UNTEMPERED, data.SEARCH, data.PRIOR, data.DELETION}
    order = np.random.default_rng([0, 0]).random()
    assert data.generator(0, 0, 0, 0).random() == order, "the control: 0 is no use"
    for use in uses:  # a use does not read what another has read, nor what orders the texts
        assert data.generator(0, 0, use, 0).random() != order
        eps = data.latent_noise(3, 0, 0, index, use, draws=2)
        others = [data.latent_noise(3, 0, 0, index, other) for other in uses if other != use]
        assert len(others) == 5
        assert all(not torch.equal(eps[:1], other) for other in others)
        assert torch.equal(eps[:1], data.latent_noise(3, 0, 0, index, use))


def test_stratified_noise_is_normal_and_spread_evenly():
    noise = data.stratified_noise(3, 0, 0, np.arange(400), data.UNTEMPERED, 20)
    assert noise.shape == (20, 400, 3)
    parts = (20 * torch.special.ndtr(noise)).floor().sort(0).values
    assert (parts == torch.arange(20)[:, None, None]).all(), "one draw in each part"
    first = noise[0].flatten()
    assert abs(first.mean()) < 0.1, "each for itself is N(0, 1)"
    assert abs(first.std() - 1) < 0.1
    alone = data.stratified_noise(3, 0, 0, np.array([7]), data.UNTEMPERED, 20)
    assert torch.equal(alone[:, 0], noise[:, 7])
    assert data.stratified_noise(0, 0, 0, np.arange(2), data.UNTEMPERED, 1).shape == (1, 2, 0)


@pytest.mark.parametrize(("micro_batch", "world"), [(1, 9), (2, 9), (5, 2), (100, 2)])
def test_micro_batches_divide_the_texts_of_a_step(grammar_corpus, micro_batch, world, monkeypatch):
    """Nine processes are two more than texts."""
    noise, index = {"denoise": 0.2, "latent_dim": 2, "seed": 0}, np.arange(7)
    (whole,) = data.training_batches(grammar_corpus, 0, index, 7, **noise)
    found = []
    for rank in range(world):
        monkeypatch.setattr(data, "processes", lambda rank=rank: (rank, world))
        for batch in data.training_batches(grammar_corpus, 0, index, micro_batch, **noise):
            assert len(batch.index) <= micro_batch
            assert batch.step_count == 7
            found += batch.index[: batch.count].tolist()
            for i, eps in zip(batch.index, batch.eps, strict=True):
                assert torch.equal(eps, whole.eps[i])
    assert sorted(found) == index.tolist()


def test_evaluation_takes_a_bounded_number_of_padded_tokens():
    lengths = np.random.default_rng(0).integers(2, 60, 500)
    batches = data.evaluation_order(lengths, 256)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    sizes = [len(batch) * lengths[batch].max() for batch in batches]
    assert max(sizes) <= 256
    assert np.mean(sizes) > 200, "and the batches are full"
    assert [len(batch) for batch in data.evaluation_order(lengths, 1)] == [1] * 500


def test_a_corpus_of_a_list(data_tokenizer):
    texts = ["the old king sells a boat", "a <unk> monk", "the king \u2603"] * 700
    corpus = data.make_corpus(texts, data_tokenizer, max_length=6)
    assert (len(corpus), corpus.unknown, corpus.truncated) == (2100, 700, 700)
    assert corpus.row(2099).tolist() == corpus.row(2).tolist()
    assert data.detokenize([corpus.row(1).tolist()], data_tokenizer) == ["a <unk> monk"]
    assert corpus.words[1] == 4  # the end is a word
    no_spaces = data.make_corpus(["\u6211\u559c\u6b22\u732b"] * 3, ByT5Tokenizer())
    assert (no_spaces.word, no_spaces.words.tolist()) == ("character", [5, 5, 5])
    refused = [([1], r"texts\[0\] is 1"), (["a", " "], r"texts\[1\] is empty"), ([], "is empty")]
    for wrong, said in [*refused, (["a", "b\ud83d"], r"texts\[1\] .*surrogate")]:
        with pytest.raises(data.InputError, match=said):
            data.make_corpus(wrong, data_tokenizer)


# ---------------------------------------------------------------------------------------- measures


def test_kl_is_that_of_torch_and_by_hand():
    mu = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    logvar = torch.linspace(-3, 2, 7).expand(5, 7)
    theirs = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(metrics.kl_divergence(mu, logvar), theirs)
    # (2^2 + 1 - 0 - 1) / 2 = 2
    assert metrics.kl_divergence(torch.tensor(2.0), torch.tensor(0.0)).item() == 2


def test_kl_weight():
    def weights(schedule, steps):
        return [train.kl_weight(step, schedule, 100) for step in steps]

    assert weights("linear", (0, 25, 100, 500)) == [0, 0.25, 1, 1]
    assert weights("constant", (0, 25)) == [1, 1]
    # Optimus' finetuning: 0 for half of the steps, up over a quarter, 1 for the last quarter.
    optimus = [train.kl_weight(s, "cyclical", 100, 1, 0.25, 0.5) for s in (0, 49, 50, 60, 75, 99)]
    assert optimus == pytest.approx([0, 0, 0, 0.4, 1, 1])
    # Four cycles of 25 steps: up over 12.5, at 1 for 12.5, and again from 0.
    found = weights("cyclical", (0, 5, 13, 24, 25, 30, 99, 100))
    assert found == pytest.approx([0, 0.4, 1, 1, 0, 0.4, 1, 1])


FIRST = 3  # a text of the linear-Gaussian world is one token, FIRST + i, and </s>


class LinearGaussian(torch.nn.Module):
    """z ~ N(0, I), x ~ N(W z, I); W has orthogonal columns, hence a diagonal posterior.

    If it is `correlated`, the columns are not orthogonal, and q is the best diagonal posterior. q
    is the optimum at the KL weight `trained_at`: its likelihood counts 1 / trained_at times.

    Text i stands for x[i], drawn from the model. q is moved by `shift` and widened by `widen`. The
    decoder reads the first `heard` dimensions of z. It knows the distribution of the others, so
    that its p(x) is the true one: rec is x's density given those that it reads.
    """

    def __init__(  # noqa: PLR0913
        self, n, latent_dim=4, scale=2.0, shift=0.0, widen=0.0, heard=None, trained_at=1.0,
        correlated=False,
    ):  # fmt: skip
        super().__init__()
        rng = torch.Generator().manual_seed(3)
        size = latent_dim + 2
        draw = partial(torch.randn, generator=rng, dtype=torch.float64)
        directions = torch.linalg.qr(draw(size, latent_dim)).Q
        self.w = directions * torch.linspace(scale / 2, scale, latent_dim, dtype=torch.float64)
        if correlated:
            self.w = self.w @ (torch.eye(latent_dim) + 0.2).double()
        self.shift, self.widen, self.trained_at = shift, widen, trained_at
        self.heard = latent_dim if heard is None else heard
        self.x = draw(n, latent_dim) @ self.w.T + draw(n, size)
        self.latent_dim, self.device = latent_dim, torch.device("cpu")

    @property
    def posterior(self):
        """mu (n, Z) and variance (Z,) of the exact p(z|x)."""
        variance = 1 / (1 + (self.w**2).sum(0))
        return self.x @ self.w * variance, variance

    def normal(self, mean, w):
        """N(mean, w w' + I), of x."""
        covariance = w @ w.T + torch.eye(len(w), dtype=torch.float64)
        return MultivariateNormal(mean, covariance, validate_args=False)

    def log_p(self):
        """(n,) log p(x) of all texts."""
        return self.normal(torch.zeros(len(self.w)).double(), self.w).log_prob(self.x)

    def mutual_information(self):
        return 0.5 * torch.log1p((self.w**2).sum(0)).sum().item()

    def encode(self, ids, mask):
        precision = torch.eye(self.latent_dim).double() + self.w.T @ self.w / self.trained_at
        mu = torch.linalg.solve(precision, self.w.T / self.trained_at @ self.x.T).T
        mu = mu[ids[:, 0] - FIRST] + self.shift
        return mu, (self.widen - precision.diagonal().log()).expand_as(mu)

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


def importance_weighted(model, n, samples, weight=1.0):
    batch = data.make_batch(toy_corpus(n), np.arange(n))
    r = metrics.untemper(*model.encode(batch.ids, batch.mask), weight)
    return metrics.importance_weighted(model, batch, *r, samples)


def test_importance_weighted_nll_falls_from_the_bound_to_the_truth():
    n = 2000
    model = LinearGaussian(n, shift=0.2, widen=0.6)
    mu, variance = model.posterior
    q = Normal(mu + 0.2, (variance * math.exp(0.6)) ** 0.5)
    gap = kl_divergence(q, Normal(mu, variance**0.5)).sum(1).mean().item()
    found = {k: importance_weighted(model, n, k) for k in (1, 2, 8, 32, 128)}
    excess = [(f["nll_iw"] + model.log_p()).mean().item() for f in found.values()]
    assert excess == sorted(excess, reverse=True), excess
    assert excess[0] == pytest.approx(gap, abs=0.1)
    half = found[32]["nll_iw_half"] - found[32]["nll_iw"]
    assert 0 < half.mean() < excess[0], "half of the samples bound less tightly"
    ess = [f["iw_ess"].mean().item() for f in found.values()]
    assert ess[0] == pytest.approx(1)
    assert ess == sorted(ess)
    bound = metrics.evaluate(model, toy_corpus(n))["neg_elbo"] + model.log_p().mean().item()
    assert bound == pytest.approx(gap, abs=0.1), "the -ELBO is above the truth by KL(q to p(z|x))"
    assert abs(excess[-1]) < 0.03 < gap / 10, (excess, gap)


@pytest.mark.parametrize("weight", [1.0, 0.8, 0.3, 0.06, 0.02])
def test_the_untempered_posterior_is_exact_where_q_is_the_optimum_at_its_weight(weight):
    """Orthogonal loadings: one sample tells log p(x), and KL that of the posterior."""
    n, model = 300, LinearGaussian(300, trained_at=weight)
    found = importance_weighted(model, n, 1, weight)
    torch.testing.assert_close(found["nll_iw"], -model.log_p(), rtol=1e-6, atol=1e-6)
    mu, variance = model.posterior
    kl = metrics.kl_divergence(mu, variance.log().expand_as(mu)).sum(1)
    torch.testing.assert_close(found["kl_untempered"], kl)
    measured = metrics.evaluate(model, toy_corpus(n), weight, iw_samples=20, thorough=True)
    error = 3 * measured["kl_posterior_se"]
    assert measured["kl_posterior"] == pytest.approx(kl.mean().item(), abs=error)
    wrong = importance_weighted(model, n, 20, weight / 2)
    assert (wrong["nll_iw"] + model.log_p()).mean() > -0.02, "a wrong weight bounds as well"
    assert (wrong["nll_iw"] + model.log_p()).abs().max() > 1e-3, "the control: it is not exact"
    found = metrics.find_weight(model, toy_corpus(n))
    assert found == pytest.approx(weight, rel=0.5), "what the grid finds"


def test_untempering_with_correlated_loadings_is_tighter_and_still_a_bound():
    n, model = 500, LinearGaussian(500, trained_at=0.1, correlated=True)
    truth = -model.log_p().mean().item()
    at_q, r = (metrics.evaluate(model, toy_corpus(n), w, 20) for w in (1.0, 0.1))
    assert truth < r["nll_iw"] < at_q["nll_iw"] - 0.5
    assert truth < r["neg_elbo_untempered"] < at_q["neg_elbo"] - 0.5
    assert r["neg_elbo"] == at_q["neg_elbo"], "q is q"


def test_untemper_at_its_limits():
    torch.manual_seed(0)
    mu, logvar = 5 * torch.randn(3, 4), 20 * torch.randn(3, 4)
    for ours, theirs in zip(metrics.untemper(mu, logvar, 1), (mu, logvar), strict=True):
        assert torch.equal(ours, theirs)
    for ours in metrics.untemper(mu, logvar, 0):
        assert not ours.any(), "the prior"
    # By hand: v = 1/4, w = 1/2: d = 5/8; 2 * (1/2) / (5/8) = 1.6; (1/4) / (5/8) = 0.4.
    mean, log_variance = metrics.untemper(torch.tensor(2.0), torch.tensor(0.25).log(), 0.5)
    assert (mean.item(), log_variance.exp().item()) == pytest.approx((1.6, 0.4))
    for wrong in -0.1, 1.1, math.nan:
        with pytest.raises(data.InputError, match=f"weight is {wrong}"):
            metrics.untemper(mu, logvar, wrong)


def test_the_weight_is_that_of_the_least_bound_of_the_grid():
    model, corpus = LinearGaussian(200, trained_at=0.2), toy_corpus(200)
    bounds = metrics.untempered_bounds(model, corpus, metrics.GRID, 200, 0, 512)
    found = metrics.find_weight(model, corpus, 200, max_tokens=512)
    assert all(bounds[found] <= bound for bound in bounds.values())
    assert found == metrics.find_weight(model, corpus, 200, max_tokens=2), "whatever the batches"
    ignored = LinearGaussian(200, heard=0, scale=30.0)
    assert metrics.find_weight(ignored, corpus) == 0, "z that is ignored has the prior"


def test_evaluate_finds_the_closed_forms_where_q_is_the_posterior():
    n = 3000
    model = LinearGaussian(n)
    result = metrics.evaluate(model, toy_corpus(n), iw_samples=4)
    truth = -model.log_p().mean().item()
    assert result["nll_iw"] == pytest.approx(truth, abs=1e-6)
    assert abs(result["neg_elbo"] - truth) < 4 * result["neg_elbo_se"]
    assert abs(result["gain"] - result["kl"]) < 4 * (result["gain_se"] + result["kl_se"])
    assert result["mi"] == pytest.approx(model.mutual_information(), abs=0.1)
    assert result["au"] == model.latent_dim


@pytest.mark.parametrize("kl", [8, 16, 40])
def test_efficiency_is_what_the_decoder_reads(kl):
    """0 where it reads no dimension of z, 1 where it reads all, and in between it rises."""
    n, scale = 1000, 1.38 * math.exp(kl / 4)  # four dimensions of ln(w) nats each, about
    models = [LinearGaussian(n, scale=scale, heard=heard) for heard in range(5)]
    evaluate = partial(metrics.evaluate, iw_samples=100, thorough=True)
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
    columns = metrics.measure(LinearGaussian(n, widen=0.5), toy_corpus(n), 1, 5, thorough=True)
    measured = metrics.summarize(columns, toy_corpus(n), 1, 5)
    rng, found = np.random.default_rng(0), []
    for _ in range(1000):
        index = torch.from_numpy(rng.integers(n, size=n))
        found.append(metrics.means_and_errors({k: v[index] for k, v in columns.items()}))
    for name in "rec", "gain", "efficiency", "kl_posterior":
        resampled = np.std([sample[name] for sample in found])
        assert measured[name + "_se"] == pytest.approx(resampled, rel=0.15), name


def test_what_is_not_finite_is_refused_by_name(tmp_path):
    model = LinearGaussian(20)
    model.x[6] = math.nan
    with pytest.raises(FloatingPointError, match="mu of text 6 of the split, counted from 0, is"):
        metrics.evaluate(model, toy_corpus(20))
    with pytest.raises(FloatingPointError, match="rec of text 1 of the split"):
        metrics.gather("rec", torch.tensor([0.0, math.inf]))
    with pytest.raises(ValueError, match="not JSON compliant"):
        data.write_json(tmp_path / "metrics.json", {"rec": math.nan})
    assert not list(tmp_path.iterdir())


def test_metrics_json_stays_where_a_number_is_not_finite(whole_run, tmp_path, monkeypatch):
    run, rec = shutil.copytree(whole_run, tmp_path / "run"), T5VAE.rec
    corpus, before = metrics.load_run(run)[-1]("test"), files(run)
    first = torch.from_numpy(corpus.ids[corpus.offsets[:-1]])
    bad = first.argmax().item()

    def broken_rec(self, z, labels):
        return rec(self, z, labels).masked_fill(labels[:, 0] == first[bad], math.inf)

    monkeypatch.setattr(T5VAE, "rec", broken_rec)
    with pytest.raises(SystemExit, match=f"of text {bad} of the split, counted from 0, is not fin"):
        metrics.main([str(run), "--iw-samples", "2", "--write"])
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


def test_mutual_information_by_chunks_is_the_same():
    generator = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(700, 5, generator=generator), torch.randn(700, 5, generator=generator)
    z = mu + (logvar / 2).exp() * torch.randn(700, 5, generator=generator)
    # All densities at once, by torch's own hand.
    q = Normal(mu.double(), (logvar.double() / 2).exp())
    log_q = q.log_prob(z[:, None].double()).sum(2)
    direct = (log_q.diagonal() - log_q.logsumexp(1) + math.log(700)).mean()
    for chunk in 1, 64, 700, 10_000:
        found = metrics.mutual_information(mu, logvar, z=z, chunk=chunk)
        torch.testing.assert_close(found, direct)
    one_for_all = torch.zeros(700, 5)
    assert metrics.mutual_information(one_for_all, one_for_all, z).abs() < 1e-9


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
def corpus(data_tokenizer):
    return data.make_corpus(RUN_TEXTS * 5, data_tokenizer)


def small_vae(data_tokenizer, latent_dim=4):
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(data_tokenizer), dropout_rate=0.1)
    model = T5VAE(config.to_dict(), latent_dim)
    model.tokenizer = data_tokenizer
    torch.nn.init.normal_(model.w_proj.weight)  # z is heard
    return model


def test_no_number_depends_on_the_batch_size(data_tokenizer, corpus):
    model = small_vae(data_tokenizer)
    evaluate = partial(metrics.evaluate, model, corpus, 0.5, iw_samples=3, thorough=True)
    one, many = evaluate(max_tokens=1), evaluate()
    assert one.keys() == many.keys()
    floats = {name: value for name, value in many.items() if isinstance(value, float)}
    assert {name: one[name] for name in floats} == pytest.approx(floats, rel=1e-4)
    other_noise = evaluate(seed=1)
    assert other_noise["rec"] != pytest.approx(many["rec"], rel=1e-4)


def test_no_batch_of_an_evaluation_is_larger_than_asked(data_tokenizer, monkeypatch):
    """Nor where another text's z is used, which is as likely that of a long text."""
    texts = [*["a king"] * 60, *["the tired queens will paint a red lamp in the garden " * 3] * 4]
    corpus, pad, sizes = data.make_corpus(texts, data_tokenizer), data.pad, []
    most = 2 * corpus.lengths.max()

    def watched(rows, pad_id):
        ids, mask = pad(rows, pad_id)
        sizes.append(ids.numel())
        return ids, mask

    monkeypatch.setattr(data, "pad", watched)
    model = small_vae(data_tokenizer)
    metrics.evaluate(model, corpus, iw_samples=2, thorough=True, max_tokens=most)
    metrics.find_weight(model, corpus, max_tokens=most)
    assert max(sizes) == most
    assert len(sizes) == 3 * len(data.evaluation_order(corpus.lengths, most))


def test_evaluation_repeats_and_leaves_random_state_and_mode_alone(data_tokenizer, corpus):
    model = small_vae(data_tokenizer).train()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = metrics.evaluate(model, corpus, iw_samples=2, thorough=True)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(5)
    assert metrics.evaluate(model, corpus, iw_samples=2, thorough=True) == first


def test_numbers_follow_from_counts_and_sentences(data_tokenizer, corpus):
    columns = metrics.measure(small_vae(data_tokenizer), corpus, 1.0, 2, thorough=True)
    result, nll = metrics.summarize(columns, corpus, 1.0, 2), columns["nll_iw"]
    assert result["nll_iw"] == pytest.approx(nll.mean().item())
    assert result["nll_iw_se"] == pytest.approx((nll.std() / len(nll) ** 0.5).item())
    assert result["ppl_token_iw"] == pytest.approx(math.exp(nll.sum().item() / corpus.ids.size))
    nats = result["neg_elbo"] * len(corpus)
    assert result["ppl_word"] == pytest.approx(math.exp(nats / corpus.words.sum()))
    assert result["nll"] == pytest.approx(min(result["nll_iw"], result["rec_prior"]))
    assert result["gain"] == pytest.approx(result["nll"] - result["rec"])
    inside = columns["rec_posterior"].mean().item()
    assert result["kl_posterior"] == pytest.approx(result["nll"] - inside)
    assert result["unknown_share"] == pytest.approx(1 / 4), "one text of four"


def test_a_language_model_has_no_use_of_z(data_tokenizer, corpus):
    model = small_vae(data_tokenizer, latent_dim=0)
    result = metrics.evaluate(model, corpus, iw_samples=5, thorough=True)
    assert result["kl"] == result["gain"] == result["au"] == 0
    assert result["mi"] == pytest.approx(0, abs=1e-9)
    assert result["nll_iw"] == pytest.approx(result["rec"], rel=1e-9)
    assert result["rec_other"] == pytest.approx(result["rec"], rel=1e-9)
    assert metrics.verdict(result).startswith(f"rec {result['rec']:.2f} nats per sentence; WARNING")


def said(**changes):
    """The verdict of a run that uses 8 nats, with changes."""
    measured = {"latent_dim": 4, "rec": 10.0, "kl": 8.2, "swap_cost": 20.0, "swap_cost_se": 0.1}
    measured |= {"kl_posterior": 7.9, "nll": 17.9, "unknown_share": 0.0} | changes
    return metrics.verdict(measured, target=8.0, lm_nll=18.1)


def test_the_verdict_does_not_contradict_itself():
    assert said().startswith("z is used")
    for words in "20.00\u00b10.10 nats higher", "NLL 17.90", "18.10", "met (8.20)", "carries 7.90":
        assert words in said()
    assert "MISSED" in said(kl=9.0)
    useless = said(kl=40.0, swap_cost=0.02, swap_cost_se=0.02, kl_posterior=3.0)
    collapsed = said(kl=0.0, swap_cost=0.0, swap_cost_se=0.0)
    for line in useless, collapsed:
        assert re.match("z is ignored: .*buys nothing", line)
        assert "carries" not in line, "what swaps do not change carries nothing"
    small = said(kl=0.9, swap_cost=0.8, swap_cost_se=0.05, kl_posterior=0.7)
    assert "z is used" in small, "small is not unused"
    assert "hardly used" in said(kl=40.0, swap_cost=0.5, swap_cost_se=0.02)
    assert "WARNING" in said(unknown_share=1.0)
    assert "WARNING" not in said(unknown_share=0.01)
    phase_1 = metrics.evaluate(LinearGaussian(50), toy_corpus(50), thorough=True)
    assert "z is" not in metrics.verdict(phase_1), "phase 1 is not about what z costs"


def test_the_table_prints_what_the_dict_holds(data_tokenizer, corpus):
    result = metrics.evaluate(small_vae(data_tokenizer), corpus, iw_samples=2, thorough=True)
    table = metrics.format_table({"name": result}).splitlines()[1:-1]
    lines = {line.split()[0]: line.split()[-1] for line in table}
    for key in "rec", "kl", "neg_elbo", "nll", "kl_posterior", "swap_cost":
        assert lines[key] == f"{result[key]:.2f}\u00b1{result[key + '_se']:.2f}", key
    assert lines["au"] == f"{result['au']:,}"
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

TINY = ["--model", "tiny"]  # in these tests still smaller: see shrink_tiny
SHORT_LM = shlex.split("--batch-size 5 --log-every 3 --max-length 12 --device cpu --epochs 2")
SHORT = [*SHORT_LM, "--iw-samples", 2]
NOISY = [*SHORT, "--denoise", 0.2]


def shrink_tiny():
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    train.TINY, train.TINY_VOCABULARY = shape, 40


def main(*args, report=None):
    """train.main in a process of its own, and quiet; `report` gets its standard error."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = open(report or os.devnull, "w", buffering=1)  # noqa: SIM115
    shrink_tiny()
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


KILL = partial(send, signal.SIGKILL)


def weights(run):
    return load_file(Path(run, "model", "model.safetensors"))


def log_records(run):
    return [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]


def same_run(one, other):
    """Whether two runs have the same weights and the same log, bit for bit."""
    names = "model/model.safetensors", "log.jsonl"
    return all(Path(one, name).read_bytes() == Path(other, name).read_bytes() for name in names)


def check_logs_agree(one, other):
    """The numbers in two logs are the same but for the rounding of sums."""
    for a, b in zip(*map(log_records, (one, other)), strict=True):
        numbers = {name: value for name, value in a.items() if isinstance(value, int | float)}
        assert {name: b[name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-4)
        assert a.keys() == b.keys()


def distance(one, other):
    """The largest relative difference of a weight tensor."""
    a, b = weights(one), weights(other)
    return max(((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-12)).item() for n in a)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a data set of 23 texts, and VAEs made of it, without and with dropout."""
    home = tmp_path_factory.mktemp("train")
    texts = list(data.read_texts("grammar", "train"))[:23]
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
    return ["--dataset", home, "--phase", 2, "--init", home / "dropout", *NOISY, "--kl-target", 0.2]


@pytest.fixture(scope="session")
def quiet(home):
    """Phase 2 without dropout, whose noise depends on how a batch is divided among processes."""
    return ["--dataset", home, "--phase", 2, "--init", home / "vae", *NOISY, "--kl-target", 0.2]


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
    files = {"config.json", "log.jsonl", "metrics.json", "model", "samples.txt", "sentences.npz"}
    assert {path.name for path in whole_run.iterdir()} == files
    config = json.loads((whole_run / "config.json").read_text())
    assert (config["phase"], config["kl_target"], config["latent_dim"]) == (2, 0.2, 3)
    assert config["command"].startswith("python train.py --dataset")
    assert len(config["data_sha256"]["train"]) == 64
    card = (whole_run / "model" / "README.md").read_text()
    assert "T5VAE.from_pretrained" in card
    assert "kl_posterior" in card, "a finished run's card has its measures"
    assert "More Information Needed" not in card
    log = log_records(whole_run)
    assert [r["step"] for r in log if r["split"] == "train"] == [3, 6, 9, 10]
    assert [r["step"] for r in log if r["split"] == "valid"] == [0, 5, 10]
    assert not any("time" in key or "second" in key for r in log for key in r)
    result = json.loads((whole_run / "metrics.json").read_text())
    promised = "rec kl neg_elbo nll nll_iw iw_samples ppl_token ppl_word ppl_token_iw ppl_word_iw"
    promised += " mi mi_n au rec_other rec_prior swap_cost gain efficiency exact_match rec_se"
    promised += " token_accuracy sentences tokens words entropy unknown_share latent_dim gain_se"
    promised += " kl_weight untempered_weight rec_untempered kl_untempered neg_elbo_untempered"
    promised += " kl_posterior kl_posterior_se iw_ess nll_iw_half precision"
    assert set(promised.split()) <= set(result)
    warm_up = json.loads((home / "vae" / "metrics.json").read_text())
    assert "nll_iw" in warm_up, "phase 1 has it where --iw-samples is given"


def test_another_seed_is_another_run(tmp_path, command, whole_run):
    """The control of test_killed_anywhere, which repeats a run with the same seed."""
    assert train_run(main, *command, "--seed", 1, "--out", tmp_path) == 0
    assert distance(tmp_path / "phase2", whole_run) > 1e-3


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


def test_saved_runs_are_measured_again(whole_run, home, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(whole_run, tmp_path / "run")
    before = files(run)
    metrics.main([str(run), "--iw-samples", "1"])
    assert "z is" in capsys.readouterr().out.splitlines()[-1]
    assert files(run) == before, "it prints, and writes only if told to"
    monkeypatch.chdir(tmp_path)  # from elsewhere; the texts have moved, too
    moved = shutil.copytree(home, tmp_path / "moved", ignore=lambda *_: ["vae", "whole", "plain"])
    metrics.main([str(run), "--iw-samples", "2", "--write", "--dataset", str(moved)])
    after, old = json.loads((run / "metrics.json").read_text()), json.loads(before["metrics.json"])
    floats = {name: value for name, value in old.items() if isinstance(value, float)}
    assert {name: after[name] for name in floats} == pytest.approx(floats, rel=1e-4)
    values = {k: torch.from_numpy(v) for k, v in np.load(run / "sentences.npz").items()}
    again = metrics.means_and_errors(values)
    assert {"nll", "gain", "efficiency_se", "kl_posterior", "exact_match"} < again.keys()
    assert again == pytest.approx({name: after[name] for name in again}, rel=1e-9)
    with pytest.raises(SystemExit, match="--write with .* was measured with"):
        metrics.main([str(run), "--write", "--iw-samples", "1"])
    with pytest.raises(SystemExit):
        metrics.main([str(run), "--write", "--iw-samples", "2", "--amp", "bf16"])
    assert "--write keeps measures in float32 alone; --amp is bf16" in capsys.readouterr().err
    metrics.main([str(run), "--write", "--iw-samples", "3"])
    assert json.loads((run / "metrics.json").read_text())["iw_samples"] == 3
    nll = re.findall(r"^nll +(\S+)$", capsys.readouterr().out, re.M)[-1]
    cards = [(r / "model" / "README.md").read_text() for r in (whole_run, run)]
    (its_text, its_measures), (same_text, new_measures) = (c.split("\n## Measures") for c in cards)
    assert its_text == same_text
    assert (nll in its_measures, nll in new_measures) == (False, True)
    card, notes = run / "model" / "README.md", "\n## My notes\n\nkeep me\n"
    with open(card, "a") as file:
        file.write(notes)
    metrics.main([str(run), "--write", "--iw-samples", "3"])
    assert card.read_text() == cards[1] + notes
    (run / "metrics.json").unlink()
    with pytest.raises(SystemExit, match="--write: .*not finished"):
        metrics.main([str(run), "--write", "--iw-samples", "3"])
    (moved / "test.txt").write_text("other")
    with pytest.raises(SystemExit, match="are not those that it was trained on"):
        metrics.main([str(run), "--dataset", str(moved)])


def test_the_language_model_beside_a_run(whole_run, tmp_path, capsys):
    run, lm = shutil.copytree(whole_run, tmp_path / "run"), tmp_path / "lm"
    config = json.loads((run / "config.json").read_text())
    words = json.loads((run / "metrics.json").read_text())["words"]
    other = {"max_length": 13}, {"data_sha256": {"test": "other"}}, {"data_sha256": None}
    other += ({"limit": 5}, {"words": words - 1})  # the last: cut by another tokenizer
    for latent_dim, change in [(0, {}), (3, {}), *[(0, change) for change in other]]:
        lm.mkdir(exist_ok=True)
        data.write_json(lm / "config.json", config | change)
        measured = {"rec": 12.34, "latent_dim": latent_dim, "words": words} | change
        data.write_json(lm / "metrics.json", measured)
        metrics.main([str(run), "--iw-samples", "1"])
        shown = "12.34" in capsys.readouterr().out
        assert shown == (latent_dim == 0 and not change)
        if not shown:
            with pytest.raises(SystemExit, match="--lm is"):
                metrics.main([str(run), "--lm", str(lm)])


# A call of a function of train.py: in a step, within the write of a checkpoint, in an evaluation,
# in the last one, before the model is saved, before and between the two files of measures, before
# there is a config.json.
CALLS = {"seed_dropout": 7, "os.replace": 7, "os.fsync": 7, "metrics.evaluate": 2}
CALLS |= {"T5VAE.save_pretrained": 1, "metrics.measure": 4, "write_samples": 1}
CALLS = [*CALLS.items(), ("metrics.write_measures", 1), ("os.replace", 1), ("os.replace", 13)]


@pytest.mark.parametrize(("where", "calls"), CALLS)
def test_killed_anywhere(tmp_path, command, whole_run, where, calls):
    flags = [*command, "--save-every", 0, "--resume", "--out", tmp_path]
    assert train_run(cut, calls, where, KILL, *flags) == -signal.SIGKILL
    assert not (tmp_path / "phase2" / "metrics.json").exists()
    trained = (tmp_path / "phase2" / "model").exists() or where == "T5VAE.save_pretrained"
    # Where training had ended, a kill costs the evaluation alone: no step is taken again.
    assert train_run(cut, 1 if trained else 0, "seed_dropout", KILL, *flags) == 0
    assert same_run(tmp_path / "phase2", whole_run)
    assert files(tmp_path / "phase2").keys() == files(whole_run).keys()
    assert files(tmp_path / "phase2")["metrics.json"] == files(whole_run)["metrics.json"]


def test_tiny_makes_phase_2_alone_and_language_models(tmp_path, home, capsys):
    flags = ["--dataset", home, *TINY, *SHORT_LM, "--epochs", 1, "--out", tmp_path]
    assert train_run(main, *flags, "--iw-samples", 2, "--phase", 2, "--init", "tiny") == 0
    assert train_run(main, *flags, "--no-latent") == 0
    result = json.loads((tmp_path / "lm" / "metrics.json").read_text())
    assert (result["latent_dim"], result["kl"]) == (0, 0)
    metrics.main([*map(str, (tmp_path / "phase2", tmp_path / "lm", "--lm", tmp_path / "lm"))])
    said = capsys.readouterr().out.splitlines()[-2:]
    assert ["language model's NLL" in line for line in said] == [True, False], (
        "it is among the runs"
    )
    for flag in ["--iw-samples", "3"], ["--lm", str(tmp_path / "lm")]:
        with pytest.raises(SystemExit, match=f"{flag[0]} is {flag[1]}, which has no effect"):
            metrics.main([str(tmp_path / "lm"), *flag])
    lines = (tmp_path / "phase2" / "samples.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["text", "reconstructed"] * 3 + ["sampled"] * 3


def test_a_reset_decoder_is_that_of_the_t5_again(tmp_path, home, t5_folder):
    flags = ["--dataset", home, "--phase", 1, "--model", t5_folder, *SHORT, "--latent-dim", 3]
    two = ["--dataset", home, *SHORT, "--phase", 2, "--reset-decoder", "--epochs", 0]
    for freeze in True, False:
        out = tmp_path / str(freeze)
        how = "--freeze-decoder" if freeze else "--no-freeze-decoder"
        for seed, command in (5, [*flags, how]), (6, two):
            assert train_run(main, *command, "--out", out, "--seed", seed) == 0
        torch.manual_seed(5)
        fresh = dict(T5VAE.from_t5(t5_folder, 3).named_parameters())
        before, after = weights(out / "phase1"), weights(out / "phase2")
        for name, weight in after.items():
            encodes = name.startswith(("t5.encoder.", "t5.shared.", "w_mu", "w_logvar"))
            assert torch.equal(weight, before[name] if encodes else fresh[name]), name
            assert torch.equal(weight, before[name]) == (encodes or freeze), "else it has moved"


def test_a_reset_needs_phase_1_and_its_t5(tmp_path, home, t5_folder):
    """A flag that has no effect is refused, and so is a T5 of another shape."""
    other = tmp_path / "other"  # a VAE that does not name its T5
    from_t5(t5_folder).save_pretrained(other)
    out = tmp_path / "out"
    args = ["--dataset", home, *SHORT, "--phase", 2, "--reset-decoder", "--out", out, "--init"]
    changed = shutil.copytree(t5_folder, tmp_path / "changed")
    begin = ["--dataset", home, *SHORT, "--phase", 1, "--epochs", 0, "--model", changed]
    train.main([*begin, "--out", tmp_path / "run"])
    t5 = AutoModelForSeq2SeqLM.from_pretrained(changed)
    t5.lm_head.weight.data += 1
    t5.save_pretrained(changed)
    for more, said in (
        ([tmp_path / "run" / "phase1"], f"{changed} no longer has the weights that "),
        ([t5_folder], f"{t5_folder} is a T5: --model, --reset-decoder have no effect with it"),
        (["tiny", "--model", t5_folder], "tiny is a T5: --model"),
        ([other, "--model", "tiny"], f"--model tiny is not the T5 of {other}"),
    ):
        with pytest.raises(SystemExit, match=said):
            train.main([*args, *more])
    assert not out.exists()


def test_micro_batches_train_the_same_model(tmp_path, quiet, plain):
    assert train_run(main, *quiet, "--micro-batch", 2, "--out", tmp_path) == 0
    assert distance(tmp_path / "phase2", plain) < 1e-4
    check_logs_agree(tmp_path / "phase2", plain)


class RowsOfLogits(TorchFunctionMode):
    """Notes how many rows of `width` numbers each call of torch returns."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] == self.width:
            self.rows.append(out.numel() // self.width)
        return out


def rec_and_gradients(model, z, labels, scale):
    """rec (B,), and the gradients of a sum of it in which each text counts differently."""
    model.zero_grad()
    z.grad = None
    rec = model.rec(z, labels)
    (rec * scale * torch.linspace(0.2, 1, len(rec))).sum().backward()
    gradients = [p.grad for p in (z, *model.parameters())]
    return [rec.detach(), *(grad.clone() for grad in gradients if grad is not None)]


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
def test_logits_in_slices_give_the_same_gradients(checkpoint, half, monkeypatch):
    model, labels = from_t5(checkpoint), torch.randint(3, 50, (5, 7))
    labels[:, -1], labels[2, 3:] = 1, torch.tensor([1, 0, 0, 0])
    z, vocabulary = torch.randn(5, 5, requires_grad=True), model.t5.config.vocab_size
    scale = 65_536 / 32 if half == torch.float16 else 1.0  # a GradScaler's, 32 texts
    with torch.autocast("cpu", half, enabled=half is not None):
        with RowsOfLogits(vocabulary) as noted:
            whole = rec_and_gradients(model, z, labels, scale)
        assert max(noted.rows) == 35, "below that size nothing changes"
        monkeypatch.setattr(vae, "MOST_LOGITS", 100)
        monkeypatch.setattr(vae, "SLICE", 4 * vocabulary * 10)
        with RowsOfLogits(vocabulary) as noted:
            sliced = rec_and_gradients(model, z, labels, scale)
        assert max(noted.rows) == 10
        for ours, theirs in zip(sliced, whole, strict=True):
            finite = theirs.isfinite()  # at this scale some exceed the largest float16
            error = (ours - theirs)[finite].norm() / theirs[finite].norm()
            assert error < (1e-5 if half is None else 0.02)
        with torch.no_grad(), RowsOfLogits(vocabulary) as noted:
            torch.testing.assert_close(model.rec(z, labels), whole[0], atol=0.02, rtol=1e-2)
        assert max(noted.rows) == 10
        with pytest.raises(data.InputError, match="no second derivative; raise vae.MOST_LOGITS"):
            torch.autograd.grad(model.rec(z, labels).sum(), z, create_graph=True)
        # A head that is no nn.Linear, as LoRA's, is called, not read.
        norm = torch.nn.LayerNorm(model.t5.config.d_model, elementwise_affine=False)
        model.t5.lm_head = torch.nn.Sequential(norm, model.t5.lm_head)
        other = model.rec(z, labels).detach()
        monkeypatch.undo()
        torch.testing.assert_close(other, model.rec(z, labels).detach(), atol=0.02, rtol=1e-2)
        assert (other - whole[0]).abs().max() > 0.1


def test_a_frozen_head_is_sliced_without_a_gradient(checkpoint, monkeypatch):
    monkeypatch.setattr(vae, "MOST_LOGITS", 100)
    model, labels = from_t5(checkpoint).freeze_decoder(), torch.randint(3, 50, (5, 7))
    z = torch.randn(5, 5, requires_grad=True)
    model.rec(z, labels).sum().backward()
    assert z.grad.any()
    assert all(p.grad is None for p in model.t5.decoder.parameters())
    assert model.t5.lm_head.weight.grad is None


def test_adamw_rms_steps_are_relative_to_each_weight():
    """200 steps against AdamW of weights that are divided by their size, by hand."""
    torch.manual_seed(0)
    args = settings("--dataset grammar --model tiny --recipe best --phase 1")[0]
    weights = torch.nn.ParameterList([torch.randn(4, 3), 0.01 * torch.randn(5), torch.zeros(2)])
    by_hand = [w.detach().clone().double() for w in weights]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in by_hand]
    optimizer = train.make_optimizer(weights, args)
    for step in range(200):
        progress = step / 200
        train.set_rates(optimizer, args, progress)
        for i, w in enumerate(weights):
            w.grad = torch.randn(w.shape)
            mean, square = moments[i]
            mean.mul_(0.9).add_(0.1 * w.grad)
            square.mul_(0.999).add_(0.001 * w.grad.double() ** 2)
            rate = 2e-2 * (1 - progress) * max(1e-3, (by_hand[i] ** 2).mean().sqrt().item())
            by_hand[i] *= 1 - rate * 0.01
            size = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            by_hand[i] -= rate * mean / (1 - 0.9 ** (step + 1)) / size
        optimizer.step()
    for ours, theirs in zip(weights, by_hand, strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------- command line


def settings(text):
    """The settings of all phases that a command runs."""
    args, phases = train.parse(shlex.split(text))
    return [train.settings(args, phase) for phase in phases]


def test_recipes_are_defaults_and_given_flags_win():
    one, two = settings("--dataset grammar")
    assert (one.phase, one.epochs, two.phase, two.epochs) == (1, 5, 2, 3)
    assert (two.kl_target, two.kl_threshold, two.kl_anneal_epochs) == (0, 0.5, 50)
    assert (one.denoise, one.freeze_decoder, two.optimizer) == (0.15, True, "adamw")
    assert (one.dropout, two.dropout) == (None, None), "that of the model"
    one, two = settings("--dataset grammar --recipe best")
    assert (one.epochs, one.dropout, one.freeze_decoder, two.epochs) == (4, 0, False, 10)
    assert (one.kl_target, two.kl_target, two.kl_threshold, two.batch_size) == (0, 8, 0, 32)
    one, two = settings("--dataset grammar --recipe best --epochs 7 --out here")
    assert (one.epochs, two.epochs) == (7, 7), "a flag holds for both phases"
    (two,) = settings("--dataset grammar --phase 2 --epochs 7")
    assert (two.phase, two.epochs) == (2, 7)
    for model, rate in ("tiny", 2e-2), ("a/b", 5e-3):
        assert settings(f"--dataset grammar --recipe best --model {model}")[0].lr == rate
    for flags in "--init tiny --phase 2", "--init tiny --no-latent":
        (args,) = settings(f"--dataset grammar --recipe best {flags}")
        assert (args.model, args.lr) == ("tiny", 2e-2)
    one, two = settings("--dataset grammar --init a-vae --reset-decoder")
    assert (one.reset_decoder, two.reset_decoder) == (None, True)


def test_what_sets_a_target_and_what_switches_it_off():
    for flags in "--kl-threshold 0.1", "--kl-schedule constant", "--kl-target 0", "--no-latent":
        assert settings(f"--dataset grammar --recipe best {flags}")[-1].kl_target == 0, flags
    (two,) = settings("--dataset grammar --kl-target 6 --phase 2")
    assert (two.kl_target, two.kl_threshold, two.kl_anneal_epochs) == (6, 0, pytest.approx(0.9))
    assert settings("--dataset grammar --kl-schedule cyclical")[1].kl_anneal_epochs == 3
    assert settings("--dataset grammar --kl-schedule cyclical --kl-rise 1")[1].kl_rise == 1


REFUSED = """--no-latent --kl-target 8, --no-latent --denoise 0.4, --no-latent --pool mean,
    --no-latent --iw-samples 50, --no-latent --latent-dim 8, --no-latent --phase 1,
    --no-latent --reset-decoder, --no-latent --freeze-decoder, --no-latent --no-freeze-decoder,
    --phase 1 --kl-target 8, --phase 1 --kl-schedule linear, --phase 1 --reset-decoder,
    --phase 2 --freeze-decoder, --phase 2 --no-freeze-decoder, --kl-cycles 3,
    --kl-zero 0.5 --kl-schedule linear, --kl-schedule constant --kl-anneal-epochs 3,
    --kl-target 8 --kl-threshold 0.5, --kl-target 8 --kl-schedule linear,
    --kl-zero 0.6 --kl-rise 0.5, --device cuda, --dataset caf\udce9,
    --phase 0, --dropout 1, --dropout=-0.5, --epochs 1.5, --epochs=-1, --lr inf, --lr nan,
    --lr=-1e-3, --batch-size 0, --denoise 1, --denoise=-0.1, --micro-batch 0, --max-length 1,
    --limit 0, --limit x, --latent-dim 0, --latent-dim 100000000000, --latent-dim 1e11,
    --iw-samples 65536, --iw-samples 0, --log-every 0, --seed -1, --seed 1.5,
    --seed 9223372036854775808, --save-every nan, --kl-target=-1, --kl-threshold inf, --kl-zero 1,
    --kl-schedule sine, --kl-anneal-epochs nan, --pool sum, --recipe worst, --amp fp8,
    --optimizer sgd, --data-dir texts"""


@pytest.mark.parametrize("flags", [flags.strip() for flags in REFUSED.split(",")])
def test_flags_that_contradict_or_do_nothing_or_are_out_of_limits_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        train.parse(["--dataset", "grammar", *flags.split()])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("train.py: error: ")
    for name in re.findall("--[a-z-]+", flags.replace("--no-freeze", "--freeze")):
        assert name in said


def test_the_demonstration_is_the_bare_command(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "run_phase", lambda args, corpora: seen.append(args))
    train.main(["--seed", "3", "--out", "no/where"])
    found = [(a.phase, a.dataset, a.model, a.seed) for a in seen]
    assert found == [(1, "grammar", "tiny", 3), (2, "grammar", "tiny", 3)]
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


def test_public_names_stay():
    promised = {
        T5VAE: "from_t5 from_pretrained save_pretrained push_to_hub encode reparameterize memory "
        "decode rec generate encode_texts decode_texts freeze_decoder",
        vae: "pool kl_divergence",
        data: "delete_tokens load_corpus make_corpus make_batch tokenize detokenize",
        data.Corpus: "row",
        metrics: "mutual_information active_units evaluate measure load_run kl_divergence main "
        "untemper",
        train: "main",
    }
    for owner, names in promised.items():
        assert [name for name in names.split() if not callable(getattr(owner, name, None))] == []


def test_the_core_works_alone(tmp_path, home):
    for name in CORE:
        assert not re.search("extras|study", (ROOT / name).read_text()), name
        shutil.copy(ROOT / name, tmp_path)
    flags = ["--dataset", home, "--model", "tiny", "--limit", 4, "--batch-size", 4, "--epochs", 1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "train.py", *map(str, flags), "--iw-samples", "1"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs" / home.name / "phase2" / "metrics.json").exists()
