"""Tests: pytest test_vae.py. No network, no GPU; every invariance comes with a control that must break it."""

import json
import math
import re
import shlex
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

import data
import metrics
import train
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


def test_commands_of_the_readme_exist():
    commands = re.findall(r"^(?:\$ )?python train\.py(.*?)(?:#.*)?$", Path("README.md").read_text(), re.M)
    assert len(commands) >= 4
    for command in commands:
        train.parse_args(shlex.split(command) if "--dataset" in command else shlex.split(train.DEMO + command))
