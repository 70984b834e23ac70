"""Tests of what z is good for: reading, editing and writing labelled texts; other priors."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import data
import metrics
import train
from extras import labels, latent, prior, probe, samples
from extras.posteriors import sample
from extras.test_extras import SHORT, home, one_thread, read_json, run
from test_vae import TINY
from vae import T5VAE

# ---------------------------------------- grammar


def test_linear_probe():
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(600, 3, generator=generator)
    classes = [int(x) for x in (mu[:, 0] > 0)]
    accuracy, chance = probe.linear_probe(mu[:400], classes[:400], mu[400:], classes[400:])
    assert accuracy > 95
    assert 40 < chance < 60
    deaf, _ = probe.linear_probe(mu[:400, 1:], classes[:400], mu[400:, 1:], classes[400:])
    assert deaf < 65


def test_grammar_is_read_as_it_was_written():
    for factors in itertools.islice(data.grammar_factors("test"), 500):
        text = data.grammar_sentence(factors)
        assert probe.grammar_parse(text) == factors
        assert probe.grammar_parse(text + " boat") is None
    assert probe.grammar_parse("yesterday the king paints a boat on the roof") is None, (
        "tense and time disagree"
    )


BEFORE = "yesterday the old king painted a red boat in the garden with his friend"


@pytest.mark.parametrize(
    ("factor", "after", "changes"),
    [
        # The tense cannot change without its time, whatever the number of it
        ("tense", "this week the old king paints a red boat in the garden with his friend", []),
        ("tense", "today the old king paints a red boat on the roof with his friend", ["where"]),
        ("tense", "today the old king finds a red boat in the garden with his friend", ["verb"]),
        # The number of the time is the same, 0, but not the time
        (
            "who",
            "today the old queen paints a red boat in the garden",
            ["tense", "time", "companion"],
        ),
        ("time", "last week the old king painted a red boat in the garden with his friend", []),
        ("time", "today the old king paints a red boat in the garden with his friend", ["tense"]),
        # His or her follows from who
        ("who", "yesterday the old queen painted a red boat in the garden with her friend", []),
        (
            "number",
            "yesterday the old kings painted a red boat on the roof with their friend",
            ["where"],
        ),
        ("who", "yesterday the old queen painted a boat in the garden", ["colour", "companion"]),
    ],
)
def test_what_an_edit_of_grammar_changed_besides(factor, after, changes):
    sentences = [probe.in_words(probe.grammar_parse(text)) for text in (BEFORE, after)]
    assert probe.other_changes(factor, *sentences) == changes
    found = probe.judge_edit(factor, sentences[1][factor], sentences[:1], sentences[1:])
    assert (found["changed"], found["alone"]) == (100, 100 * (changes == []))
    assert found["most"] == (f"{changes[0]} 100.0" if changes else "-")


def test_ungrammatical_edits_count_for_nothing():
    assert probe.grammar_parse(BEFORE.replace("king", "queen")) is None, "with his friend"
    king = probe.in_words(probe.grammar_parse(BEFORE))
    queen = king | {"who": "queen"}
    found = probe.judge_edit("who", "queen", [king, None, king, king], [queen, queen, None, queen])
    assert (found["grammatical"], found["changed"], found["alone"]) == (75, 75, 50)


def test_a_decoder_that_does_not_hear_z_edits_nothing():
    king = probe.in_words(probe.grammar_parse(BEFORE))
    found = probe.judge_edit("who", "king", [king], [king])
    assert (found["grammatical"], found["changed"], found["alone"]) == (100, 0, 0)


def test_a_time_moves_within_its_tense():
    times = ["today"] * 5 + ["yesterday"] * 4 + ["soon"] * 3 + ["right now"] * 2 + ["last week"]
    assert probe.edit_of("time", times) == ("today", "right now")
    assert probe.edit_of("where", times) == ("today", "yesterday"), "the control"


def test_probe_finds_what_a_latent_holds(run, monkeypatch):
    texts = {split: data.read_texts("grammar", split)[:300] for split in ("train", "test")}
    true = {split: list(itertools.islice(data.grammar_factors(split), 300)) for split in texts}

    class Oracle:  # mu is the tense, one-hot, and decoding writes it into one sentence
        latent_dim, device = 3, torch.device("cpu")

        def encode(self, ids, mask):
            return torch.eye(3)[ids[:, 0]], torch.zeros(len(ids), 3)

        def decode_texts(self, z, *args, **kwargs):
            changed = [true["test"][0] | {"tense": list(data.TENSES)[i]} for i in z.argmax(1)]
            return [data.grammar_sentence(factors) for factors in changed]

    def corpus(split):
        ids = np.array([[list(data.TENSES).index(f["tense"]), 1] for f in true[split]], np.int32)
        return data.Corpus(ids.ravel(), np.arange(0, 601, 2), np.full(300, 2), 0, 0, 99, 98, "")

    rows = {
        row["factor"]: row for row in probe.probe_grammar(Oracle(), {s: corpus(s) for s in texts})
    }
    assert (rows["tense"]["accuracy"], rows["tense"]["changed"], rows["tense"]["alone"]) == (
        100,
        100,
        100,
    )
    assert rows["verb"]["accuracy"] < 25
    with pytest.raises(SystemExit, match="must be grammar"):
        probe.main([run])


# ---------------------------------------- labels


def test_words_kept_are_counted_as_often_as_they_occur():
    assert labels.words_kept(["a a b c"], ["a a b b"]) == 75
    assert labels.words_kept(["a b c d"], ["a a a a"]) == 25
    assert labels.words_kept(["a b", ""], ["b a", "c"]) == 100, "order does not matter"
    assert labels.words_kept(["a", "b c d"], ["a", "e"]) == 25, "of all words, not a mean of means"
    assert labels.words_kept([""], ["a"]) == 0
    assert labels.share([True, True, True, False]) == pytest.approx((75, 100 * 0.75**0.5 / 4))


def write_files(folder, **files):
    for name, lines in files.items():
        (folder / name).write_bytes(
            lines if isinstance(lines, bytes) else "\n".join(lines).encode()
        )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"L": ["x", "y"]}, "T has 40 lines, .*L 2; there must be one label per text"),
        ({"L": ["x"] * 40}, "only the label 'x'; it must have at least two labels"),
        ({"T": [], "L": []}, "T is empty"),
        ({"L": ["x", ""] + ["y"] * 38}, "L, line 2: empty"),
        ({"T": b"a\n\xff\n"}, "T, line 2: not UTF-8"),
        ({"L2": ["x", "new"]}, "label 'new' is in the test part alone"),
        ({"L2": ["x", "x"]}, "the test part has 2 texts, none with the label 'y'"),
        ({"T2": ["one"]}, "T2 has 1 lines, .*L2 2;"),
    ],
)
def test_labelled_files_are_refused_in_one_line(tmp_path, files, words):
    good = {"T": [f"text {i}" for i in range(40)], "L": ["x", "y"] * 20}
    good |= {"T2": ["one", "two"], "L2": ["x", "y"]}
    write_files(tmp_path, **good)
    flags = ["--texts", "T", "--labels", "L", "--test-texts", "T2", "--test-labels", "L2"]
    flags = [flag if flag.startswith("--") else str(tmp_path / flag) for flag in flags]
    with pytest.raises(SystemExit, match="cannot use no/run: no/run is neither a folder") as stop:
        probe.main(["no/run", *flags])  # the control: the files are good
    write_files(tmp_path, **files)
    with pytest.raises(SystemExit, match=f"^probe.py: .*{words}") as stop:
        probe.main(["no/run", *flags])
    assert "\n" not in str(stop.value)


def test_flags_that_belong_together(capsys):
    for flags, words in (
        (["--texts", "T"], "--texts and --labels belong together"),
        (["--texts", "T", "--labels", "L", "--test-labels", "L"], "--test-texts and --test-labels"),
        (["--test-texts", "T", "--test-labels", "L"], "--test-texts needs --texts"),
        (["--k", "nan"], "argument --k: nan is not in"),
        (["--seed", str(2**70)], f"argument --seed: {2**70} is not in"),
    ):
        with pytest.raises(SystemExit):
            probe.parse_args(["RUN", *flags])
        assert words in capsys.readouterr().err


def test_the_held_out_part_depends_on_the_texts_alone(tmp_path):
    texts = [f"text {i % 500}" for i in range(1000)]  # each twice
    names = ["x" if i % 3 else "y" for i in range(500)] * 2
    write_files(tmp_path, T=texts, L=names)
    train_part, test = labels.read_parts(tmp_path / "T", tmp_path / "L")
    assert len(train_part.texts) + len(test.texts) == 1000
    assert 150 < len(test.texts) < 250
    assert not set(train_part.texts) & set(test.texts)
    pairs = set(zip(texts, names, strict=True))
    assert set(zip(*train_part[:2], strict=True)) | set(zip(*test[:2], strict=True)) == pairs
    write_files(tmp_path, T=texts[::-1], L=names[::-1])
    assert labels.read_parts(tmp_path / "T", tmp_path / "L")[1].texts == test.texts[::-1]


THINGS = data.FACTORS["what"]


def labelled(n):
    """Texts whose z is known: the first number is the label, the second the thing."""
    names = ["good" if i % 3 else "bad" for i in range(n)]
    things = [i % len(THINGS) for i in range(n)]
    texts = [f"a {label} {THINGS[i]}" for label, i in zip(names, things, strict=True)]
    mu = torch.tensor(
        [[1.0 if a == "good" else -1.0, i] for a, i in zip(names, things, strict=True)]
    )
    return labels.Labelled(texts, names, mu, torch.full((n, 2), -4.0))


def heard(z):
    """The decoder of these texts."""
    things = z[:, 1].round().clamp(0, len(THINGS) - 1).int().tolist()
    names = ["good" if x > 0 else "bad" for x in z[:, 0]]
    return [f"a {label} {THINGS[i]}" for label, i in zip(names, things, strict=True)]


def deaf(z):
    """A decoder that hears the thing alone."""
    return heard(torch.stack([torch.ones(len(z)), z[:, 1]], 1))


def test_an_edit_is_judged_by_the_text_beside_the_reconstruction():
    train_part, test = labelled(480), labelled(96)
    judge = labels.text_classifier().fit(train_part.texts, train_part.labels)
    read = {
        row["the label"]: row["right %"][0] for row in labels.read_table(judge, train_part, test)
    }
    assert list(read.values()) == pytest.approx([100 * 2 / 3, 100, 100])

    def said(decode, ks=(0.25, 1)):
        rows, shown = labels.edit_table(decode, judge, train_part, test, ks, 10)
        assert {row["texts"] for row in rows} == {10}
        return {(row["from"], row["to"], row["k"]): row for row in rows}, shown

    rows, shown = said(heard)
    for old, new in ("good", "bad"), ("bad", "good"):
        to = {k: rows[old, new, k]["says to %"][0] for k in ("0", "0.25", "1")}
        assert to == {"0": 0, "0.25": 0, "1": 100}
        kept = [rows[old, new, k]["words kept %"] for k in ("0", "1")]
        assert kept == pytest.approx([100, 200 / 3])
        assert rows[old, "another text", "-"]["words kept %"] == pytest.approx(200 / 3)
    assert shown[0] == [
        ("bad", "a bad boat"),
        ("k = 0", "a bad boat"),
        ("good, k = 0.25", "a bad boat"),
        ("good, k = 1", "a good boat"),
    ]
    rows, _ = said(deaf)
    assert rows["good", "bad", "1"]["says to %"][0] == 0
    assert rows["bad", "good", "0"]["says to %"][0] == 100, "what k = 0 is printed for"


def test_texts_written_like_a_label_have_it():
    torch.manual_seed(0)
    parts = labelled(480), labelled(96)
    judge = labels.text_classifier().fit(parts[0].texts, parts[0].labels)
    rows = {row["texts of"]: row for row in labels.write_table(heard, judge, *parts, 200)}
    for name, other in ("good", "bad"), ("bad", "good"):
        assert rows[f"test texts, {name}"][f"says {name} %"][0] == 100
        assert rows[f"posteriors, {name}"][f"says {name} %"][0] == 100
        assert rows[f"Gaussian, {name}"][f"says {name} %"][0] > 95
        assert rows[f"Gaussian, {name}"][f"says {other} %"][0] < 5
        assert rows[f"Gaussian, {name}"]["different texts %"] > 5
    assert 35 < rows["N(0, I)"]["says good %"][0] < 65, "the control"
    rows = {row["texts of"]: row for row in labels.write_table(deaf, judge, *parts, 200)}
    assert rows["Gaussian, bad"]["says bad %"][0] == 0


def test_of_many_labels_the_two_most_frequent_are_edited():
    names = ["c"] * 3 + ["a"] * 2 + ["d"] * 4 + ["b"]
    assert labels.edited_labels(names) == ["d", "c"]
    assert labels.edited_labels(names[:9]) == ["d", "c", "a"]


@pytest.fixture(scope="session")
def language_model(home):
    train.main(
        ["--dataset", str(home), *TINY, *SHORT, "--no-latent", "--epochs", "1"]
        + ["--vocab-size", "60", "--out", str(home / "words")]
    )
    return str(home / "words" / "lm")


@pytest.fixture
def files(tmp_path):
    texts = data.read_texts("grammar", "train")[:60]
    names = ["many" if f["number"] == "many" else "one" for f in data.grammar_factors("train")][:60]
    write_files(tmp_path, texts=texts, labels=names)
    return ["--texts", str(tmp_path / "texts"), "--labels", str(tmp_path / "labels")]


def test_probe_prints_its_tables_and_refuses_a_language_model(run, files, language_model, capsys):
    outputs = []
    for _ in range(2):
        probe.main([run, *files, "--count", "3", "--k", "1.5", "--examples", "2"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    read, edits, written, *examples = outputs[0].split("\n\n")[1:]
    assert len(read.splitlines()) == 4
    assert len(edits.splitlines()) == 1 + 2 * (2 + 1)
    assert len(written.splitlines()) == 1 + 3 * 2 + 1
    assert [len(example.strip().splitlines()) for example in examples] == [3, 3]
    same = ["--test-texts", files[1], "--test-labels", files[3]]
    probe.main([run, *files, *same, "--count", "1", "--k", "1"])
    assert "60 of the test texts are training texts too" in capsys.readouterr().out
    assert "too" not in outputs[0].partition("the label")[0]
    with pytest.raises(SystemExit, match="cannot use .*lm: a language model; it must be a VAE"):
        probe.main([language_model, *files])
    with pytest.raises(SystemExit, match=f"cannot use {files[1]}: .* is neither a folder"):
        probe.main([files[1], *files])


# ---------------------------------------- a Gaussian for texts, other priors


def test_the_gaussian_of_texts_has_the_moments_of_their_mixture():
    torch.manual_seed(0)
    mu = torch.randn(400, 3) @ torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.5]]) + 4
    logvar = torch.randn(400, 3)
    fitted = latent.fit_gaussian(mu, logvar)
    z = (mu + (logvar / 2).exp() * torch.randn(2000, 400, 3)).reshape(-1, 3)
    torch.testing.assert_close(fitted.mean.float(), z.mean(0), atol=0.02, rtol=0)
    covariance = fitted.covariance_matrix.float()
    torch.testing.assert_close(covariance, z.T.cov(), atol=0.05, rtol=0.02)
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() > 1, "the control"
    one = latent.fit_gaussian(mu[:1], logvar[:1])
    torch.testing.assert_close(one.mean, mu[0].double())
    torch.testing.assert_close(one.covariance_matrix, torch.diag(logvar[0].double().exp()))
    few = latent.fit_gaussian(mu[:6], logvar[:6]).covariance_matrix
    plain = mu[:6].double().T.cov(correction=0)
    torch.testing.assert_close(few[0, 1], plain[0, 1] * 6 / 9)
    torch.testing.assert_close(few[0, 0], plain[0, 0] + logvar[:6, 0].double().exp().mean())


def test_sample_like_a_file(run, language_model, tmp_path, capsys):
    def lines(*flags):
        latent.main(["sample", run, "-n", "20", "--max-length", "8", *flags])
        return capsys.readouterr().out.splitlines()

    model = T5VAE.from_pretrained(run)
    text = "the old king"
    mu, logvar = model.encode_texts([text], max_length=8)
    write_files(tmp_path, like=[text], empty=[""])
    torch.manual_seed(3)
    z = latent.fit_gaussian(mu, logvar).sample((20,)).float()
    found = lines("--like", str(tmp_path / "like"), "--seed", "3")
    assert found == model.decode_texts(z, max_new_tokens=8)
    assert found != lines("--seed", "3")
    for name, words in ("empty", "holds no text"), ("none", "No such file"):
        with pytest.raises(SystemExit, match=f"^latent.py: .*{words}"):
            lines("--like", str(tmp_path / name))
    with pytest.raises(SystemExit, match=r"^latent.py: .* is a language model; it must be a VAE"):
        latent.main(["sample", language_model])


def test_samples_like_a_file_are_measured_beside_it(run, tmp_path, language_model, capsys):
    own = shutil.copytree(run, tmp_path / "own")
    texts = data.read_texts("grammar", "train")[:5]
    write_files(tmp_path, like=texts)
    flags = [str(own), "--lm", language_model, "--count", "4"]
    samples.main(flags)
    plain = read_json(f"{own}-samples.json", "")["measures"]
    assert "like" not in capsys.readouterr().out
    samples.main([*flags, "--like", str(tmp_path / "like")])
    measured = read_json(f"{own}-samples.json", "")["measures"]
    assert plain == {kind: measured[kind] for kind in plain}, "the other rows are as without it"
    assert set(measured) - set(plain) == {"like: the texts", "like, greedy", "like, sampled"}
    lm = T5VAE.from_pretrained(language_model)
    assert measured["like: the texts"]["lm_nats"] == pytest.approx(samples.lm_nats(lm, texts[:4]))
    assert "like, sampled " in capsys.readouterr().out


def clusters(n, seed):
    """Posteriors around four points far apart: (mu, logvar), (n, 2) each."""
    at = torch.tensor([[4.0, 4.0], [4.0, -4.0], [-4.0, 4.0], [-4.0, -4.0]])[torch.arange(n) % 4]
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return (at + 0.1 * noise).double(), torch.full((n, 2), -4.0, dtype=torch.float64)


def test_a_mixture_is_a_better_prior_where_the_posteriors_are_one():
    train_part, test = clusters(2000, 0), clusters(400, 1)
    rows = {name: (kl, saved) for name, kl, saved in prior.compare_priors(train_part, test)}
    kl = {name: kl.mean().item() for name, (kl, _) in rows.items()}
    closed = metrics.kl_divergence(*test).sum(1)
    torch.testing.assert_close(rows["N(0, I)"][0], closed)
    gaussian = latent.fit_gaussian(*train_part)
    exact = kl_divergence(MultivariateNormal(test[0], torch.diag_embed(test[1].exp())), gaussian)
    saved = rows["one Gaussian"][1]
    error = metrics.standard_error(saved - (closed - exact))
    assert kl["one Gaussian"] == pytest.approx(exact.mean().item(), abs=max(0.02, 4 * error))
    mi = metrics.mutual_information(*test, sample(*test)).item()
    assert mi < kl["8 Gaussians, full"] < mi + 0.5 < kl["one Gaussian"] - 1 < kl["N(0, I)"] - 2


def test_nothing_is_saved_where_the_posteriors_are_n01():
    def posteriors(n, seed):
        generator = torch.Generator().manual_seed(seed)
        mu = 0.6 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
        return mu, torch.full((n, 4), 0.64, dtype=torch.float64).log()

    rows = prior.compare_priors(posteriors(4000, 0), posteriors(4000, 1))
    for _, _, saved in rows[1:]:
        assert abs(saved.mean()) < 0.06, "a mixture of 32 fits a little noise"
        assert saved.mean() < 3 * metrics.standard_error(saved)
    # Collapsed posteriors: all that there is to fit is noise, which is other noise in other texts.
    collapsed = torch.zeros(2, 300, 16, dtype=torch.float64)
    rows = {name: saved for name, _, saved in prior.compare_priors(collapsed, collapsed)}
    assert rows["one Gaussian"].mean() < -3 * metrics.standard_error(rows["one Gaussian"])
    assert rows["8 Gaussians, full"].mean() < -1


def test_the_kl_to_n01_is_that_of_the_run(run, language_model, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="cannot use .*: 23 training texts; .* at least 32"):
        prior.main([run])
    with pytest.raises(SystemExit, match="a language model; it must be a VAE"):
        prior.main([language_model])
    monkeypatch.setattr(prior, "MIXTURES", {"one Gaussian": (1, "full")})
    prior.main([run])
    lines = capsys.readouterr().out.splitlines()
    kl = metrics.evaluate(T5VAE.from_pretrained(run), metrics.load_run(run)[2]("test"))["kl"]
    assert float(lines[2].split()[2].split("±")[0]) == pytest.approx(kl, abs=6e-4)
    assert len(lines) == 5
