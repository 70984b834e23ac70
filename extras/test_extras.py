"""Tests of the scripts in this folder, each with what they are trained on here: 23 short texts."""

import copy
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from transformers.models.t5.modeling_t5 import T5LayerNorm

import data
import metrics
import train
from extras import benchmark, compare, fast_cpu, latent, paper_tables, pretrain, probe, samples
from test_vae import EOS, ROOT, TINY, one_thread, random_texts, shrink_tiny, tiny_vae
from vae import T5VAE

SHORT = ["--batch-size", 5, "--log-every", 3, "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def small_tiny():
    """`--model tiny` of these tests is smaller still."""
    before = train.TINY, train.TINY_VOCABULARY
    shrink_tiny()
    yield
    train.TINY, train.TINY_VOCABULARY = before


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A data set of 23 texts."""
    home = tmp_path_factory.mktemp("texts")
    texts = grammar_texts("train", 23)
    for split in data.SPLITS:
        (home / f"{split}.txt").write_text("\n".join(texts[: 23 if split == "train" else 7]) + "\n")
    return home


@pytest.fixture(scope="session")
def run(home):
    """A run of phase 2 on these texts, whose z is heard."""
    flags = [*TINY, *SHORT, "--epochs", 1, "--iw-samples", 2, "--latent-dim", 4]
    train.main(["--dataset", home, *flags, "--out", home / "run"])
    model = T5VAE.from_pretrained(home / "run" / "phase2")
    with torch.no_grad():
        model.w_proj.weight.normal_(std=3)
        model.t5.shared.weight *= 0.1
        model.t5.shared.weight[list(data.own_tokens(model.tokenizer))] = 0  # it writes words
    model.save_pretrained(home / "run" / "phase2" / "model")
    return str(home / "run" / "phase2")


@pytest.fixture(scope="session")
def language_model(home):
    flags = [*TINY, *SHORT, "--no-latent", "--epochs", 1, "--out", home / "words"]
    train.main(["--dataset", home, *flags])
    return str(home / "words" / "lm")


def grammar_texts(split, count):
    return list(itertools.islice(data.read_texts("grammar", split), count))


def read_json(*path):
    return json.loads(Path(*path).read_text())


def write_files(folder, **files):
    for name, lines in files.items():
        content = lines if isinstance(lines, bytes) else "\n".join(lines).encode()
        (folder / name).write_bytes(content)


# ---------------------------------------- latent


@pytest.fixture
def ask(run, capsys):
    """Lines that `latent COMMAND RUN ...` prints."""

    def lines(command, *args):
        latent.main([command, run, *map(str, args), "--max-length", "8"])
        return capsys.readouterr().out.splitlines()

    return lines


def test_reconstruct_reads_arguments_and_standard_input(ask, run, monkeypatch, capsys):
    texts = ["the old king", "", "a queen sells"]
    model = T5VAE.from_pretrained(run)
    expected = model.decode_texts(model.encode_texts(texts, max_length=8)[0], max_new_tokens=8)
    assert ask("reconstruct", *texts) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode())))
    assert ask("reconstruct") == expected
    drawn = [ask("reconstruct", texts[0], "--samples", 8, "--seed", seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    latent.main(["reconstruct", run, "a king", "\u4e2d"])
    warning = "latent.py: 1 of 2 texts have characters outside the vocabulary"
    assert capsys.readouterr().err.startswith(warning)


def test_interpolations_end_in_the_reconstructions():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    straight, arc = latent.interpolate(a, b, 3), latent.interpolate(a, b, 3, spherical=True)
    assert straight[1].tolist() == [0.5, 0.5]
    assert arc.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    for path in straight, arc:
        torch.testing.assert_close(path[[0, 2]], torch.stack([a, b]))
    torch.testing.assert_close(latent.interpolate(a, 2 * a, 3, spherical=True)[1], 1.5 * a)
    uneven = latent.interpolate(a, 4 * b, 3, spherical=True)
    torch.testing.assert_close(uneven[1], 2.5 * arc[1])  # half of the angle, the mean of the norms
    torch.testing.assert_close(uneven[[0, 2]], torch.stack([a, 4 * b]))


def test_arithmetic_neighbors_and_encoding(ask, run, tmp_path):
    model = T5VAE.from_pretrained(run)
    texts = ["the old king", "a queen sells", "the nuns hide a lamp"]
    mu = model.encode_texts(texts, max_length=8)[0]
    write_files(tmp_path, **{"from": texts[:1], "to": texts[1:2], "all": texts})
    moved = model.decode_texts(mu[2:] + 2 * (mu[1] - mu[0]), max_new_tokens=8)
    flags = ("--from", tmp_path / "from", "--to", tmp_path / "to", "--k", 2)
    assert ask("arithmetic", *flags, texts[2]) == moved
    near = ask("neighbors", tmp_path / "all", texts[1], "-n", 2)
    assert near[0] == f"0.000\t{texts[1]}"
    assert len(near) == 2
    ask("encode", tmp_path / "all", "-o", tmp_path / "z.npz")
    np.testing.assert_allclose(np.load(tmp_path / "z.npz")["mu"], mu, atol=1e-5)
    assert len(ask("sample", "-n", 3)) == 3
    assert len(ask("interpolate", *texts[:2], "--steps", 4)) == 4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["reconstruct", "no/such/run", "x"], "no/such/run: no such run or folder"),
        (["neighbors", "{run}", "no/file", "x"], "no/file"),
        (["sample", "{run}", "--like", os.devnull], "holds no text"),
        (["sample", "{lm}"], "is a language model; it must be a VAE"),
        (["map", "{run}", "--labels", "{run}/log.jsonl", "-o", "no.png"], "has 7 lines, "),
        (["map", "{run}/model", "--labels", "x", "-o", "no.png"], "no config.json of a run"),
        (
            ["encode", "{run}", "no/file", "-o", "no/such/z.npz"],
            "-o is no/such/z.npz, but there is",
        ),
        (["encode", "{run}", "{run}/samples.txt", "-o", "{run}/samples.txt"], "which is read"),
        (["map", "{run}", "--labels", "{run}/log.jsonl", "-o", "{run}/log.jsonl"], "which is read"),
    ],
)
def test_latent_refuses_in_one_line(args, words, run, language_model):
    with pytest.raises(SystemExit) as stop:
        latent.main([arg.format(run=run, lm=language_model) for arg in args])
    assert words in str(stop.value)
    assert "\n" not in str(stop.value)
    assert str(stop.value).startswith("latent.py: ")


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


def test_sample_like_a_file(ask, run, tmp_path):
    model = T5VAE.from_pretrained(run)
    text = "the old king"
    mu, logvar = model.encode_texts([text], max_length=8)
    write_files(tmp_path, like=[text])
    torch.manual_seed(3)
    z = latent.fit_gaussian(mu, logvar).sample((20,)).float()
    found = ask("sample", "-n", 20, "--like", tmp_path / "like", "--seed", 3)
    assert found == model.decode_texts(z, max_new_tokens=8)
    assert found != ask("sample", "-n", 20, "--seed", 3)


def test_a_map_of_labelled_texts(ask, run, home, tmp_path, monkeypatch):
    drawn, draw = [], latent.draw_map
    monkeypatch.setattr(latent, "draw_map", lambda *args: (drawn.append(args), draw(*args)))
    texts, out = list(data.read_texts(str(home), "test"))[:6], tmp_path / "map.png"
    write_files(tmp_path, labels=[*"xyxyxy", "", ""], six=list("xyxyxy"), texts=texts)
    assert ask("map", "--labels", tmp_path / "labels", "-o", out) == [f"wrote {out}: 6 texts"]
    assert matplotlib.image.imread(out).std() > 0
    place, labels, axes, _ = drawn[0]
    mu = T5VAE.from_pretrained(run).encode_texts(texts, max_length=8)[0].double()
    sizes = torch.linalg.svdvals(mu - mu.mean(0))
    np.testing.assert_allclose((place**2).sum(0), sizes[:2] ** 2, rtol=1e-6)
    assert axes[0] == f"component 1: {100 * sizes[0] ** 2 / (sizes**2).sum():.0f} % of the variance"
    assert list(labels) == list("xyxyxy")
    ask("map", "--labels", tmp_path / "six", "--texts", tmp_path / "texts", "--tsne", "-o", out)
    assert drawn[1][2][0].startswith("t-SNE 1")
    long = ["customer_service", "customer_service_complaint", "product_quality_complaint"]
    names = [*long, "__label__1", "$5", "$5"]  # as matplotlib's own, and as a formula
    write_files(tmp_path, names=names)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    ask("map", "--labels", tmp_path / "names", "--texts", tmp_path / "texts", "-o", out)
    said = {text.get_text().strip() for text in figures[0].axes[0].get_legend().get_texts()}
    assert said == {
        *("customer_service (1)", "customer_service_com ... (1)", "product_quality_comp ... (1)"),
        *("__label__1 (1)", r"\$5 (2)"),
    }
    config = Path(run, "config.json").read_text()
    moved = shutil.copytree(run, tmp_path / "moved")
    (moved / "config.json").write_text(re.sub(r'"test": "\w+"', '"test": "0"', config))
    with pytest.raises(SystemExit, match="the test texts of .* are not those of"):
        latent.main(["map", str(moved), "--labels", str(tmp_path / "labels"), "-o", str(out)])


def test_an_interpolation_as_a_strip(ask, tmp_path):
    out, ends = tmp_path / "strip.png", ("the old king", "a queen sells")
    texts = ask("interpolate", *ends, "--steps", 4)
    assert ask("strip", *ends, "--steps", 4, "-o", out) == texts
    few = matplotlib.image.imread(out)
    latent.draw_strip(["word " * 80, "", "a $ and a $", *texts], out)
    assert matplotlib.image.imread(out).shape[0] > few.shape[0]
    latent.draw_strip(["W" * 84, ""], out)
    assert matplotlib.image.imread(out).shape[1] > few.shape[1], "wide letters are not clipped"


# ---------------------------------------- compare, paper_tables


def test_differences_of_two_runs_are_paired(run, tmp_path, capsys):
    one, other = (shutil.copytree(run, tmp_path / name) for name in ("one", "other"))

    def shifted(shift, noise):
        values = dict(np.load(one / "sentences.npz"))
        values["rec"] = values["rec"] + shift + noise * np.random.default_rng(0).normal(size=7)
        np.savez(other / "sentences.npz", **values)
        return compare.compare(one, other)

    assert shifted(0, 0)["rec"] == (0, 0)
    mean, error = shifted(0.1, 0.001)["rec"]
    assert mean == pytest.approx(0.1, abs=0.002)
    assert mean > 2 * error, "far smaller than the spread between sentences, but found"
    compare.main([str(one), str(other)])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[3:]}
    assert (rows["rec"][-1], rows["kl"][-1]) == ("yes", "no")
    mean, error = shifted(0, 1.0)["rec"]
    assert abs(mean) < 3 * error
    values = dict(np.load(one / "sentences.npz"))
    for lost in "nll_iw", "rec_prior", "rec_posterior":  # as in phase 1
        del values[lost]
    np.savez(other / "sentences.npz", **values)
    measured = read_json(other, "metrics.json") | {"iw_samples": 0}
    (other / "metrics.json").write_text(json.dumps(measured))
    compare.main([str(one), str(other)])
    assert f"{'nll':20}{'-':>12}\n" in capsys.readouterr().out


def test_compare_pairs_what_metrics_json_has(run):
    """Of a run with itself shifted, every mean is that of metrics.json."""
    _, measured, named = compare.load(run)
    assert set(compare.MEASURES) <= set(named)
    for name, values in named.items():
        assert values.mean().item() == pytest.approx(measured[name], abs=1e-9), name


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("metrics.json", {"iw_samples": 7}, "iw_samples of metrics.json must be the same"),
        ("config.json", {"data_sha256": {"test": "of others"}}, "different texts"),
        ("metrics.json", None, "other is not finished"),
        ("config.json", None, "other has no config.json of a run"),
        ("metrics.json", {"words": 3}, "different texts"),
        ("sentences.npz", None, "python metrics.py"),
        ("sentences.npz", b"no arrays", "sentences.npz is damaged"),
    ],
)
def test_runs_that_cannot_be_compared(run, tmp_path, name, change, words):
    other = shutil.copytree(run, tmp_path / "other")
    compare.main([run, str(other)])  # the control
    if change is None:
        (other / name).unlink()
    elif isinstance(change, bytes):
        (other / name).write_bytes(change)
    else:
        data.write_json(other / name, read_json(other, name) | change)
    with pytest.raises(SystemExit, match=f"^compare.py: .*{words}"):
        compare.main([run, str(other)])


@pytest.mark.parametrize(
    ("dataset", "true_n", "neg_elbo"),
    [
        ("yahoo", 113.0, [343.4, 384.8, 463.5, 451.6]),
        ("ptb", 26.45, [104.3, 107.3, 146.1, 173.5]),
        ("yelp", 131.7, [405.0, 482.9, 587.8, 523.1]),
        ("snli", 13.66, [34.8, 37.1, 60.9, 106.1]),
    ],
)
def test_a_data_set_has_one_n_and_hence_the_true_bound(dataset, true_n, neg_elbo):
    rows = [row for row in paper_tables.reread(dataset) if row["unit"] == "T5 token"]
    assert [row["n"] for row in rows] == pytest.approx([true_n] * 4, rel=1e-3)
    assert [row["neg_elbo"] for row in rows] == pytest.approx(neg_elbo, abs=0.06)
    printed = [row["n_printed"] for row in rows]
    assert max(printed) > 1.5 * min(printed), "the control: as printed there is no such number"


def test_paper_tables_print_all(capsys):
    paper_tables.main([])
    assert capsys.readouterr().out.count("Optimus (lambda 0.5)") == 4


# ---------------------------------------- samples


def test_texts_are_judged_beside_test_sentences(run, language_model, tmp_path, capsys):
    assert samples.distinct(["a a b", "b c"], 1) == pytest.approx(100 * 3 / 5)
    assert samples.distinct(["a a b", "b c"], 2) == 100, "no pair crosses from one text to the next"
    samples.main([run, "--lm", language_model, "--count", "7"])
    assert "prior, sampled" in capsys.readouterr().out
    measured = read_json(f"{run}-samples.json")["measures"]
    judge = read_json(language_model, "metrics.json")
    nats = {kind: values["lm_nats"] for kind, values in measured.items()}
    assert nats["test sentences"] == pytest.approx(judge["rec"] * 7 / judge["tokens"], rel=1e-5)
    assert nats["test sentences"] != pytest.approx(nats["prior, sampled"], rel=1e-3)
    _, perfect, read = metrics.load_run(run)
    written = []
    perfect.encode_texts = lambda texts, **_: (torch.zeros(len(texts), 4), written.extend(texts))

    def bleu(places):  # of each text and the one so many places after it
        perfect.decode_texts = lambda z, **_: [written[(i + places) % 7] for i in range(len(z))]
        return samples.judge(perfect, None, read("test"), 7)[0]["reconstructions"]["bleu"]

    assert bleu(0) == pytest.approx(100)
    assert bleu(1) < 60, "the control"
    short = ["red boat", "old king"]
    assert samples.bleu(short, short) == pytest.approx(100), "copies of short texts, too"
    assert samples.bleu(short, short[::-1]) < 10
    other = shutil.copytree(language_model, tmp_path / "lm")
    config = read_json(other, "config.json")
    data.write_json(other / "config.json", config | {"data_sha256": {"test": "of others"}})
    for wrong, words in (
        ([language_model], "must be the run of a VAE"),
        ([run, "--lm", run], "--lm"),
        (
            [run, "--lm", str(other)],
            "--lm is .*; it must be another --no-latent run on these texts",
        ),
    ):
        with pytest.raises(SystemExit, match=f"^samples.py: .*{words}"):
            samples.main(wrong)


def test_samples_like_a_file_are_measured_beside_it(run, tmp_path, language_model, capsys):
    own = shutil.copytree(run, tmp_path / "own")
    texts = grammar_texts("train", 5)
    write_files(tmp_path, like=texts)
    flags = [str(own), "--lm", language_model, "--count", "4"]
    samples.main(flags)
    plain = read_json(f"{own}-samples.json")["measures"]
    assert "like" not in capsys.readouterr().out
    samples.main([*flags, "--like", str(tmp_path / "like")])
    measured = read_json(f"{own}-samples.json")["measures"]
    assert plain == {kind: measured[kind] for kind in plain}, "the other rows are as without it"
    assert set(measured) - set(plain) == {"like: the texts", "like, greedy", "like, sampled"}
    lm = T5VAE.from_pretrained(language_model)
    assert measured["like: the texts"]["lm_nats"] == pytest.approx(samples.lm_nats(lm, texts[:4]))
    assert "like, sampled " in capsys.readouterr().out


def test_texts_without_spaces_are_measured_by_characters():
    texts = ["\u6211\u559c\u6b22\u732b", "\u4ed6\u8ba8\u538c\u72d7", "\u732b\u5403\u9c7c\u4e86"]
    assert latent.without_spaces(texts)
    assert not latent.without_spaces(["the cat", "a dog", "\u732b"])
    assert samples.bleu(texts, texts, characters=True) == pytest.approx(100)
    changed = [text[:-1] + "x" for text in texts]
    assert samples.bleu(changed, texts, characters=True) > 30
    assert samples.bleu(changed, texts) == 0, "the control: what words would say"
    assert samples.distinct(texts, 1, list) == pytest.approx(100 * 11 / 12)
    rows = {"reconstructions": samples.measure(texts, None, list)}
    assert rows["reconstructions"]["words"] == 4
    said = "Most texts have no spaces"
    kinds = {"test sentences": texts, "reconstructions": texts}
    assert said in "\n".join(samples.format_lines(rows, kinds))
    kinds["test sentences"] = ["a cat", "a dog", "a bird"]
    assert said not in "\n".join(samples.format_lines(rows, kinds))


# ---------------------------------------- pretraining


def test_span_corruption_loses_nothing():
    sentinels, lost, total = list(range(1000, 1100)), 0, 0
    for n in (1, 2, 3, 7, 40, 255):
        tokens = np.arange(10, 10 + n)
        inputs, targets = pretrain.corrupt_spans(tokens, sentinels, EOS, np.random.default_rng(n))
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


def test_pretraining_says_which_texts_it_does_not_see_whole(home, tmp_path, capsys):
    texts = tmp_path / "texts"
    shutil.copytree(home, texts)
    with open(texts / "valid.txt", "a") as file:
        file.write("the king " * 300 + "\n" + "\u4e2d\n")
    flags = ["--dataset", str(texts), "--vocab-size", "60", "--steps", "0", "--d-model", "16"]
    pretrain.main([*flags, "--out", str(tmp_path / "t5")])
    said = capsys.readouterr().out
    assert re.search(r"train: .* 0 cut at 256, 0 with unknown characters", said)
    assert re.search(r"valid: 9 texts, .* 1 cut at 256, 1 with unknown characters", said)


def test_a_share_of_the_batches_is_language_modelling(home, run):
    """In these the encoder reads </s> alone, and the decoder writes the whole texts."""
    model = T5VAE.from_pretrained(run)
    corpus, index = data.load_corpus(str(home), "train", model.tokenizer), np.arange(8)
    task = {"sentinels": range(1000, 1100), "eos_id": EOS, "seed": 0}
    make = partial(pretrain.pretraining_batch, corpus, **task)
    whole = data.make_batch(corpus, index)
    lm = make(0, index, lm_share=1.0)
    assert lm.ids.tolist() == [[EOS]] * 8
    assert torch.equal(lm.labels, whole.labels)
    corrupted = make(0, index, lm_share=0.0)
    assert corrupted.ids.shape[1] > 1
    assert (corrupted.labels >= 1000).any(1).all()
    first, again = (
        [make(epoch, index, lm_share=0.5).ids.shape[1] == 1 for epoch in range(200)]
        for _ in range(2)
    )
    assert 70 < sum(first) < 130
    assert first == again


def test_pretraining_makes_a_t5_that_training_starts_from_and_resumes(home, tmp_path, capsys):
    shape = ["--d-model", "16", "--layers", "1", "--heads", "2", "--vocab-size", "40"]
    flags = ["--dataset", str(home), str(home / "train.txt"), *shape, "--lm-share", "0.5"]
    flags += ["--batch-size", "5", "--log-every", "3", "--steps", "12", "--out"]
    pretrain.main([*flags, str(tmp_path / "whole")])
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 12
    assert log[-1]["nats_per_target"] < log[0]["nats_per_target"]
    assert log[0]["query_growth"] == pytest.approx(1, abs=0.2)
    code = "import sys, os; from extras import pretrain\nstep, n = pretrain.train_step, 0\n"
    code += "def cut(*a):\n    global n; n += 1\n    return os._exit(9) if n == 8 else step(*a)\n"
    code += "pretrain.train_step = cut; pretrain.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *flags, str(tmp_path / "cut"), "--save-every", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # other threads round sums otherwise
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert ended.returncode == 9
    with pytest.raises(SystemExit, match="cut is not empty .*: --resume it"):
        pretrain.main([*flags, str(tmp_path / "cut")])
    for run in "cut", "whole":
        fewer = ["--dataset", str(home), *flags[3:], str(tmp_path / run), "--resume"]
        with pytest.raises(SystemExit, match="the texts, or the vocabulary, are not those that it"):
            pretrain.main(fewer)
    (tmp_path / "foreign").mkdir()
    write_files(tmp_path / "foreign", notes=["mine"])
    with pytest.raises(SystemExit, match="foreign holds notes, but no config.json of a run"):
        pretrain.main([*flags, str(tmp_path / "foreign"), "--resume"])
    pretrain.main([*flags, str(tmp_path / "cut"), "--resume"])
    for name in "log.jsonl", "model/model.safetensors":
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    model = ["--dataset", str(home), "--model", str(tmp_path / "whole" / "model"), "--phase", "1"]
    train.main([*model, *SHORT, "--epochs", "0", "--out", str(tmp_path / "vae")])
    zero = ["--tokenizer", model[3], "--steps", "0", "--out", str(tmp_path / "zero")]
    pretrain.main(["--dataset", str(home), *shape[:-2], *zero])
    start = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "zero" / "model")
    assert pretrain.query_growth(start) == pytest.approx(1, abs=0.2)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "whole" / "model" / "config.json", bare)
    with pytest.raises(SystemExit, match="bare cannot be used: its tokenizer is missing"):
        pretrain.main(["--dataset", "no/such", "--tokenizer", str(bare), "--out", str(bare / "t5")])
    for wrong in ["--kl-target", "3"], ["--lm-share", "1"], ["--tokenizer", "t"], ["--heads", "3"]:
        with pytest.raises(SystemExit):
            pretrain.main([*flags, str(tmp_path / "no"), *wrong])
    capsys.readouterr()
    finished = [*flags, str(tmp_path / "whole"), "--resume"]
    pretrain.main(finished)
    assert capsys.readouterr().out.endswith(f"\n{tmp_path / 'whole'} is finished\n")
    with pytest.raises(SystemExit, match="^pretrain.py: --resume needs .*: lr was 0.02, not 0.5"):
        pretrain.main([*finished, "--lr", "0.5"])
    with pytest.raises(SystemExit, match="^pretrain.py: .*there is no .*no.such"):
        pretrain.main(["--dataset", "no/such", "--out", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_a_pretraining_that_diverges_makes_no_t5(home, tmp_path):
    flags = ["--dataset", str(home), "--d-model", "16", "--layers", "1", "--vocab-size", "40"]
    flags += ["--steps", "3", "--lr", "1e30", "--out", str(tmp_path / "t5")]
    with pytest.raises(SystemExit, match="^pretrain.py: .* try a smaller --lr"):
        pretrain.main(flags)
    assert not (tmp_path / "t5" / "model").exists()


# ---------------------------------------- fast_cpu, benchmark


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}]
)
def test_quick_layers_compute_the_same(changes, frozen, amp):
    plain = tiny_vae(**changes).train()
    quick = fast_cpu.quicken(copy.deepcopy(plain))
    assert plain.state_dict().keys() == quick.state_dict().keys()
    ids, mask = random_texts(4, 9)
    found = []
    for model in plain, quick:
        if frozen:
            model.freeze_decoder()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            mu, logvar = model.encode(ids, mask)
            rec = model.rec(mu, ids)
        rec.mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"rec": rec, "mu": mu} | grads)
    assert found[0].keys() == found[1].keys()
    scale = 0.1 if amp else 1e-4
    for name, value in found[0].items():
        error = (found[1][name] - value).norm() / value.norm().clamp(min=1e-6)
        assert error < scale, f"{name}: {error}"
    with torch.no_grad():
        assert not torch.allclose(quick.rec(mu + 1, ids), found[1]["rec"], rtol=1e-3)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [fast_cpu.Dropout(0.1), fast_cpu.DropoutOfReLU(0.1)])
def test_quick_dropout_drops_p_keeps_the_mean_and_passes_the_gradient(layer, kind):
    x = torch.randn(400, 250).abs().to(kind).requires_grad_()
    out = layer.train()(x)
    assert (out == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert out.mean().item() == pytest.approx(x.mean().item(), rel=0.01)
    out.sum().backward()
    torch.testing.assert_close(x.grad * x, out)  # both are linear in what they keep
    assert torch.equal(layer.eval()(x), x)
    if isinstance(layer, fast_cpu.DropoutOfReLU):
        assert layer.train()(-x).abs().max() == 0


def test_the_quick_layer_norm_has_the_gradient_of_t5s():
    plain = T5LayerNorm(8)
    plain.weight.data.normal_()
    x, towards, found = torch.randn(3, 5, 8), torch.randn(3, 5, 8), []

    def quick(x):
        return fast_cpu.Normalize.apply(x, plain.weight, plain.variance_epsilon, torch.float32)

    for norm in plain, quick:
        x_, plain.weight.grad = x.clone().requires_grad_(), None
        out = norm(x_)
        (out * towards).sum().backward()
        found.append((out, x_.grad, plain.weight.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    straight = towards * plain.weight
    assert not torch.allclose(found[0][1], straight, atol=0.1), "the control: it is not linear"


def test_training_with_quick_layers_saves_a_model_of_the_core(home, tmp_path):
    flags = ["--dataset", home, *TINY, *SHORT, "--epochs", 1, "--phase", 1, "--out", tmp_path]
    fast_cpu.main(flags)
    command = read_json(tmp_path / "phase1", "config.json")["command"]
    assert command.startswith("python -m extras.fast_cpu --dataset ")
    mu, _ = T5VAE.from_pretrained(tmp_path / "phase1").encode_texts(["a king"])
    assert mu.isfinite().all()
    for amp in "off", "bf16":  # a language model, whose W_proj has no elements
        quick = [*flags[:-4], "--no-latent", "--amp", amp, "--out", tmp_path / amp]
        fast_cpu.main(quick)
        assert read_json(tmp_path / amp / "lm", "metrics.json")["latent_dim"] == 0
    with pytest.raises(SystemExit, match="--amp is fp16; extras.fast_cpu takes bf16 or off"):
        fast_cpu.main([*flags[:-1], tmp_path / "half", "--amp=fp16"])
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_activations_take_what_the_formula_says(amp, dropout, feed_forward):
    sizes = {"d_model": 48, "d_ff": 160, "num_heads": 3, "d_kv": 16}
    sizes |= {"num_layers": 5, "num_decoder_layers": 5, "feed_forward_proj": feed_forward}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # The tensor lives on, so that no other has its address.
        kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    def total(sentences, **changes):
        model = tiny_vae(vocab_size=20, dropout_rate=dropout, **sizes | changes).train()
        ids, mask = torch.randint(3, 20, (sentences, 40)), torch.ones(sentences, 40).long()
        index, eps = np.arange(sentences), torch.zeros(sentences, 8)
        batch = data.Batch(ids, mask, ids, index, eps=eps, count=sentences, step_count=sentences)
        kept.clear()
        half = torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16")
        with half, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(batch)
        return sum(size for size, _ in kept.values())

    def of_four_sentences(**changes):  # without the weights, which more sentences do not multiply
        return total(8, **changes) - total(4, **changes)

    config = tiny_vae(dropout_rate=dropout, **sizes).t5.config
    six_layers = of_four_sentences() - of_four_sentences(num_layers=2, num_decoder_layers=2)
    expected = benchmark.activation_bytes(config, 4, 40, amp) * 6 / 10
    assert six_layers == pytest.approx(expected, rel=0.03)


def test_the_benchmark_compares_and_writes_nothing(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", home, *TINY, "--batch-size", 5, "--max-length", 12]
    benchmark.main([*flags, "--repeats", 1])
    out = capsys.readouterr().out
    for words in "phase 1  core", "phase 2  quicken", "times transformers", "evaluation":
        assert words in out
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="benchmark.py: "):
        benchmark.main(["--dataset", "no/such", *TINY])
    for wrong, said in (
        ([*flags, "--dropout", 0.5], "--dropout is 0.5, which has no effect here"),
        ([*flags, "--phase", 2], "--phase is 2, which has no effect here"),
        ([*flags, "--no-freeze-decoder"], "--freeze-decoder is False, which has no effect here"),
        ([*flags, "--kl-target", 8], "--kl-target is 8.0, which has no effect here"),
        ([*flags, "--recipe", "best"], "--recipe is best, which has no effect here"),
        ([*flags, "--no-latent"], "--no-latent is True, which has no effect here"),
        (["--fits", "--no-such-flag"], "--overhead and --fits stand alone"),
        (["--overhead", "--repeats", 3], "--overhead and --fits stand alone"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(wrong)
        assert said in capsys.readouterr().err


def test_what_a_step_costs_beside_the_model():
    rows = dict(line.rsplit("  ", 1) for line in benchmark.overhead(repeats=5))
    found = {name.strip(): float(cells.split(" ")[0]) for name, cells in rows.items()}
    assert list(found)[0] == "a batch of 64 texts of 14 tokens"
    assert found["adamw-rms, 117 weights: step"] > found["adamw, 117 weights: step"]
    assert found["adamw-rms, 117 weights: step sizes"] > found["reading the loss"]


def test_the_table_of_what_fits_is_that_of_the_page():
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert "\n".join(benchmark.fits()) in page
    model = tiny_vae()
    most = benchmark.most_texts(model, 64, "off", 1e9)
    assert benchmark.step_bytes(model, most, 64) <= 1e9 < benchmark.step_bytes(model, most + 1, 64)
    assert benchmark.most_texts(model, 64, "off", 1e3) == 0
    # The memory stops growing with the logits where they are sliced.
    model = tiny_vae(vocab_size=1_000_000, d_model=4, d_ff=4, num_layers=1, num_heads=1, d_kv=4)
    few, more, many = (benchmark.step_bytes(model, n, 1) for n in (100, 200, 20_000))
    assert more - few > 0.9 * 3 * 4 * 1_000_000 * 100
    assert many < few


# ---------------------------------------- probe, of grammar


def test_grammar_is_read_as_it_was_written():
    for factors in itertools.islice(data.grammar_factors("test"), 500):
        text = data.grammar_sentence(factors)
        assert probe.grammar_parse(text) == factors
        assert probe.grammar_parse(text + " boat") is None
    assert probe.grammar_parse("yesterday the king paints a boat on the roof") is None, "the tense"


BEFORE = "yesterday the old king painted a red boat in the garden with his friend"


@pytest.mark.parametrize(
    ("factor", "after", "changes"),
    [
        # The tense cannot change without its time, whatever the number of it
        ("tense", "this week the old king paints a red boat in the garden with his friend", ""),
        ("tense", "today the old king paints a red boat on the roof with his friend", "where"),
        # The number of the time is the same, 0, but not the time
        ("who", "today the old queen paints a red boat in the garden", "tense time companion"),
        ("time", "last week the old king painted a red boat in the garden with his friend", ""),
        ("time", "today the old king paints a red boat in the garden with his friend", "tense"),
        # His or her follows from who
        ("who", "yesterday the old queen painted a red boat in the garden with her friend", ""),
        ("who", "yesterday the old queen painted a boat in the garden", "colour companion"),
    ],
)
def test_what_an_edit_of_grammar_changed_besides(factor, after, changes):
    changes = changes.split()
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
    found = probe.judge_edit("who", "king", [king], [king])
    assert (found["grammatical"], found["changed"], found["alone"]) == (100, 0, 0), "a deaf decoder"


def test_a_time_moves_within_its_tense():
    times = ["today"] * 5 + ["yesterday"] * 4 + ["soon"] * 3 + ["right now"] * 2 + ["last week"]
    assert probe.edit_of("time", times) == ("today", "right now")
    assert probe.edit_of("where", times) == ("today", "yesterday"), "the control"


def test_probe_finds_what_a_latent_holds(run):
    true = next(data.grammar_factors("test"))
    tenses = list(data.TENSES)

    class Oracle:  # mu is the tense, one-hot, and decoding writes it into one sentence
        def encode_texts(self, texts):
            found = [tenses.index(probe.grammar_parse(text)["tense"]) for text in texts]
            return torch.eye(3)[found], None

        def decode_texts(self, z, **_):
            return [data.grammar_sentence(true | {"tense": tenses[i]}) for i in z.argmax(1)]

    rows = {row["factor"]: row for row in probe.probe_grammar(Oracle(), limit=300)}
    tense = rows["tense"]
    assert (tense["accuracy"], tense["changed"], tense["alone"]) == (100, 100, 100)
    assert 20 < tense["chance"] < 50
    assert rows["verb"]["accuracy"] < 25
    with pytest.raises(SystemExit, match="without --texts it must be one"):
        probe.main([run])


# ---------------------------------------- probe, of labels


def test_words_kept_are_counted_as_often_as_they_occur():
    kept = probe.Judge(["a king", "a queen"], ["x", "y"]).kept
    assert kept(["a a b c"], ["a a b b"]) == 75
    assert kept(["a b c d"], ["a a a a"]) == 25
    assert kept(["a b", ""], ["b a", "c"]) == 100, "order does not matter"
    assert kept(["a", "b c d"], ["a", "e"]) == 25, "of all words, not a mean of means"
    assert kept([""], ["a"]) == 0
    assert kept(["abcd"], ["abxy"]) == 0
    assert probe.share([True, True, True, False]) == pytest.approx((75, 100 * 0.75**0.5 / 4))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"L": ["x", "y"]}, "T has 40 lines, .*L 2; there must be one label per text"),
        ({"L": ["x"] * 40}, r"labels of the training part are \['x'\]; there must be at least two"),
        ({"T": [], "L": []}, r"labels of the training part are \[\]"),
        ({"L": ["x", ""] + ["y"] * 38}, "L, line 2: empty"),
        ({"T": b"a\n\xff\n"}, "T, line 2, byte 1: not UTF-8"),
        ({"L2": ["x", "new"]}, "label 'new' is in the test part alone"),
        ({"L2": ["x", "x"]}, "the test part has 2 texts, none with the label 'y'"),
        ({"T2": ["one"]}, "T2 has 1 lines, .*L2 2;"),
    ],
)
def test_labelled_files_are_refused_in_one_line(tmp_path, files, words):
    good = {"T": [f"text {i}" for i in range(40)], "L": ["x", "y"] * 20}
    good |= {"T2": ["one", "two"], "L2": ["x", "y"]}
    write_files(tmp_path, **good)
    flags = [flag if flag.startswith("--") else str(tmp_path / flag) for flag in FILES]
    with pytest.raises(SystemExit, match="^probe.py: no/such/run: no such run or folder"):
        probe.main(["no/such/run", *flags])  # the control: the files are good
    write_files(tmp_path, **files)
    with pytest.raises(SystemExit, match=f"^probe.py: .*{words}") as stop:
        probe.main(["no/such/run", *flags])
    assert "\n" not in str(stop.value)


FILES = ["--texts", "T", "--labels", "L", "--test-texts", "T2", "--test-labels", "L2"]


def test_flags_that_belong_together(capsys):
    for flags, words in (
        (["--texts", "T", "--labels", "L"], "belong together: give all"),
        (["--pair", "x", "y"], "--pair is ['x', 'y'], which has no effect without --texts"),
        (["--k", "3"], "--k is [3.0], which has no effect without --texts"),
        (["--examples", "0"], "--examples is 0, which has no effect without --texts"),
        ([*FILES, "--pair", "x", "x"], "--pair names 'x' twice"),
        (["--k", "nan"], "argument --k: 'nan' must be at least 0"),
    ):
        with pytest.raises(SystemExit):
            probe.parse_args(["RUN", *flags])
        assert words in capsys.readouterr().err


THINGS = data.FACTORS["what"]


def labelled(n):
    """Texts whose z is known: the first number is the label, the second the thing."""
    names = ["good" if i % 3 else "bad" for i in range(n)]
    things = [i % len(THINGS) for i in range(n)]
    texts = [f"a {label} {THINGS[i]}" for label, i in zip(names, things, strict=True)]
    heard = [1.0 if label == "good" else -1.0 for label in names]
    mu = torch.tensor([heard, things]).T
    return probe.Labelled(texts, names, mu, torch.full((n, 2), -4.0))


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
    judge = probe.Judge(train_part.texts, train_part.labels)
    read = [row["right %"][0] for row in probe.read_table(judge, train_part, test)]
    assert read == pytest.approx([100 * 2 / 3, 100, 100])

    def said(decode, ks=(0.25, 1)):
        rows, shown = probe.edit_table(decode, judge, (train_part, test), ["good", "bad"], ks, 10)
        assert {row["texts"] for row in rows} == {10}
        return {(row["from"], row["to"], row["k"]): row for row in rows}, shown

    rows, shown = said(heard)
    for old, new in ("good", "bad"), ("bad", "good"):
        to = {k: rows[old, new, k]["says to %"][0] for k in ("0", "0.25", "1")}
        assert to == {"0": 0, "0.25": 0, "1": 100}
        kept = [rows[old, new, k]["words kept %"] for k in ("0", "1")]
        assert kept == pytest.approx([100, 200 / 3])
        assert rows[old, "another text", "-"]["words kept %"] == pytest.approx(200 / 3)
    moved = [("good, k = 0.25", "a bad boat"), ("good, k = 1", "a good boat")]
    assert shown[0] == [("bad", "a bad boat"), ("k = 0", "a bad boat"), *moved]
    rows, _ = said(deaf)
    assert rows["good", "bad", "1"]["says to %"][0] == 0
    assert rows["bad", "good", "0"]["says to %"][0] == 100, "what k = 0 is printed for"


def test_texts_written_like_a_label_have_it():
    torch.manual_seed(0)
    parts = labelled(480), labelled(96)
    judge, names = probe.Judge(parts[0].texts, parts[0].labels), ["good", "bad"]
    rows = {row["texts of"]: row for row in probe.write_table(heard, judge, parts, names, 200)}
    for name, other in ("good", "bad"), ("bad", "good"):
        assert rows[f"test texts, {name}"][f"says {name} %"][0] == 100
        assert rows[f"posteriors, {name}"][f"says {name} %"][0] == 100
        assert rows[f"Gaussian, {name}"][f"says {name} %"][0] > 95
        assert rows[f"Gaussian, {name}"][f"says {other} %"][0] < 5
        assert rows[f"Gaussian, {name}"]["different texts %"] > 5
    assert 35 < rows["N(0, I)"]["says good %"][0] < 65, "the control"
    rows = {row["texts of"]: row for row in probe.write_table(deaf, judge, parts, names, 200)}
    assert rows["Gaussian, bad"]["says bad %"][0] == 0


def test_of_many_labels_the_two_most_frequent_are_edited():
    names = ["c"] * 3 + ["a"] * 2 + ["d"] * 4 + ["b"]
    assert probe.edited_labels(names) == ["d", "c"]
    assert probe.edited_labels(names[:9]) == ["d", "c", "a"]
    assert probe.edited_labels(names, ["b", "a"]) == ["b", "a"]
    probe.check_labels(names, ["a", "b"], ["b", "a"])
    for pair, words in (
        (["a", "e"], "^--pair names 'e', which is no label of --labels"),
        (["a", "c"], "^the test part has 2 texts, none with the label 'c'"),
    ):
        with pytest.raises(data.InputError, match=words):
            probe.check_labels(names, ["a", "b"], pair)


def test_the_judge_of_texts_without_spaces_reads_characters():
    texts = [
        "\u6211\u559c\u6b22\u732b",
        "\u4ed6\u559c\u6b22\u72d7",
        "\u6211\u8ba8\u538c\u732b",
        "\u4ed6\u8ba8\u538c\u72d7",
    ] * 5
    names = ["good", "good", "bad", "bad"] * 5
    judge = probe.Judge(texts, names)
    assert judge.unit == "characters"
    unseen = "\u8c01\u559c\u6b22\u9c7c", "\u8c01\u8ba8\u538c\u9c7c"
    assert list(judge.predict(unseen)) == ["good", "bad"]
    assert judge.kept(texts[:1], texts[1:2]) == 50


def test_probe_prints_its_tables(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts, factors = (
        grammar_texts("train", 100),
        itertools.islice(data.grammar_factors("train"), 100),
    )
    names, tenses = zip(*((f["number"], f["tense"]) for f in factors), strict=True)
    write_files(tmp_path, T=texts[:80], L=names[:80], T2=texts[80:], L2=names[80:])
    outputs = []
    for _ in range(2):
        probe.main([run, *FILES, "--count", "3", "--k", "1.5", "--examples", "2"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    counts, read, edits, written, *examples = outputs[0].split("\n\n")
    assert counts == "80 training texts, 20 test texts, 2 labels"
    assert len(read.splitlines()) == 4
    assert len(edits.splitlines()) == 1 + 2 * (2 + 1)
    assert len(written.splitlines()) == 1 + 3 * 2 + 1
    assert [len(example.strip().splitlines()) for example in examples] == [3, 3]
    write_files(tmp_path, T2=texts, L2=tenses, T=texts, L=tenses)
    pair = ["--pair", "past", "future", "--count", "1", "--k", "1", "--examples", "0"]
    probe.main([run, *FILES, *pair])
    _, both, _, edits, _ = capsys.readouterr().out.split("\n\n")
    assert both == "100 of the test texts are training texts too"
    assert len(edits.splitlines()) == 1 + 2 * 2
    assert "present" not in edits
