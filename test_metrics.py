"""The measures against closed forms: a linear-Gaussian model whose log p(x), posterior and I(x; z) are known."""

import itertools
import json
import math
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
import transformers

import data
import metrics
import vae

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

TEXTS = ("the old king sold a boat", "a queen", "the happy witch hid a red drum by the lake", "monks \u4e2d lost it")


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(data.read_texts("grammar", "valid"), 400)


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return data.tokenize(TEXTS * 5, tokenizer)


def small_vae(tokenizer, latent_dim=4, seed=0):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = vae.T5VAE(config.to_dict(), latent_dim)
    model.tokenizer = tokenizer
    for parameter in model.w_proj.parameters():
        torch.nn.init.normal_(parameter)  # z is heard
    return model


def test_no_number_depends_on_the_batch_size(tokenizer, corpus):
    model = small_vae(tokenizer)
    one, many = (metrics.evaluate(model, corpus, size, iw_samples=3, thorough=True) for size in (1, 64))
    assert one.keys() == many.keys()
    for name, value in one.items():
        assert value is None or value == pytest.approx(many[name], rel=1e-4), name
    other_noise = metrics.evaluate(model, corpus, 64, iw_samples=3, thorough=True, seed=1)
    assert other_noise["rec"] != pytest.approx(many["rec"], rel=1e-4)


def test_evaluation_repeats_and_leaves_random_state_and_mode_alone(tokenizer, corpus):
    model = small_vae(tokenizer).train()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = metrics.evaluate(model, corpus, iw_samples=2, thorough=True)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(5)
    assert metrics.evaluate(model, corpus, iw_samples=2, thorough=True) == first


def test_one_pass_of_each_without_importance_weighting(tokenizer, corpus, monkeypatch):
    model, calls = small_vae(tokenizer), {"encode": 0, "rec": 0}
    for name in calls:
        method = getattr(model, name)

        def counted(*args, name=name, method=method):
            calls[name] += len(args[0])
            return method(*args)

        monkeypatch.setattr(model, name, counted)
    result = metrics.evaluate(model, corpus)
    assert calls == {"encode": len(corpus), "rec": len(corpus)}
    assert "nll_iw" not in result


def test_numbers_follow_from_counts_and_sentences(tokenizer, corpus):
    model = small_vae(tokenizer)
    result = metrics.evaluate(model, corpus, iw_samples=2, thorough=True)
    nll = torch.cat([metrics.importance_weighted_nll(model.eval(), b, 2) for b in data.evaluation_batches(corpus, 3)])
    assert result["nll_iw"] == pytest.approx(nll.mean().item())
    assert result["nll_iw_se"] == pytest.approx((nll.std() / len(nll) ** 0.5).item())
    assert result["ppl_token_iw"] == pytest.approx(math.exp(nll.sum().item() / corpus.ids.size))
    assert result["ppl_word"] == pytest.approx(math.exp(result["neg_elbo"] * len(corpus) / corpus.words.sum()))
    assert result["gain"] == pytest.approx(result["nll_iw"] - result["rec"])
    assert result["unk_tokens"] == (corpus.ids == tokenizer.unk_token_id).sum() > 0
    assert result["unk_share"] == pytest.approx(result["unk_tokens"] / result["tokens"])


def test_a_language_model_has_no_use_of_z(tokenizer, corpus):
    result = metrics.evaluate(small_vae(tokenizer, latent_dim=0), corpus, iw_samples=5, thorough=True)
    assert result["kl"] == result["gain"] == result["au"] == 0
    assert result["mi"] == pytest.approx(0, abs=1e-9)
    assert result["nll_iw"] == pytest.approx(result["rec"], rel=1e-9)
    assert result["rec_other"] == pytest.approx(result["rec"], rel=1e-9)
    table = metrics.format_table({"some/run": result, "another": result | {"latent_dim": 4}})
    assert "some/run (LM)" in table
    assert "another (LM)" not in table


# ---------------------------------------------------------------------------------------- tables and runs


def test_the_table_prints_what_the_dict_holds(tokenizer, corpus):
    result = metrics.evaluate(small_vae(tokenizer), corpus, iw_samples=2, thorough=True)
    table = metrics.format_table({"name": result})
    for key in "rec", "kl", "neg_elbo", "nll_iw", "gain", "rec_other", "rec_prior":
        assert f"{result[key]:.2f}±{result[key + '_se']:.2f}" in table, key
    for key in "ppl_token", "ppl_token_iw", "ppl_word", "ppl_word_iw":
        assert metrics.number(result[key]) in table.split(), key
    for key in "tokens", "words", "sentences":
        assert f"{result[key]:,}" in table.split(), key
    assert f"{100 * result['unk_share']:.2f}" in table.split()
    assert "±" in metrics.format_table({"name": metrics.evaluate(small_vae(tokenizer), corpus)})  # of training


def write_run(folder, model, name, **config):
    run = folder / name
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for split in data.SPLITS:
        (texts / f"{split}.txt").write_text("\n".join(TEXTS), encoding="utf-8")
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


def test_runs_of_several_seeds_are_summarised(tokenizer, tmp_path, capsys):
    seeds = [write_run(tmp_path, small_vae(tokenizer, seed=s), f"s{s}", seed=s, start=f"p{s}") for s in range(3)]
    other = write_run(tmp_path, small_vae(tokenizer, seed=9), "other", seed=1, lr=2)
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


def test_paper_prints_all_tables_and_puts_a_run_under_its_own(tokenizer, tmp_path, capsys):
    metrics.main(["--paper"])
    printed = capsys.readouterr().out
    for words in "Table 1, yahoo", "Table 2, ptb", "Table 3, yelp", "Table 4, snli", "GPT-2 token", "2358.31":
        assert words in printed, words
    run = write_run(tmp_path, small_vae(tokenizer), "mine", dataset="ptb")
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
        metrics.main([write_run(tmp_path, small_vae(tokenizer), "own"), "--paper", "--iw-samples", "1"])


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


def test_the_figure_holds_every_series(tokenizer, tmp_path, capsys):
    runs = [write_run(tmp_path, small_vae(tokenizer), f"s{s}", seed=s) for s in range(3)]
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
