"""Tests of the scripts in this folder."""

import copy
import io
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.t5.modeling_t5 import T5LayerNorm

import data
import metrics
import train
from extras import (
    benchmark,
    compare,
    describe,
    fast_cpu,
    latent,
    paper_tables,
    plots,
    pretrain,
    refine,
    samples,
    spans,
)
from test_vae import ROOT, TINY, random_texts, tiny_vae
from vae import T5VAE

SHORT = ["--batch-size", "5", "--log-every", "3", "--device", "cpu"]
EOS = 1


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A data set of 23 texts."""
    home = tmp_path_factory.mktemp("texts")
    texts = data.read_texts("grammar", "train")[:23]
    for split in data.SPLITS:
        (home / f"{split}.txt").write_text("\n".join(texts[: 23 if split == "train" else 7]) + "\n")
    return home


@pytest.fixture(scope="session")
def run(home):
    """A run of phase 2 on these texts, whose z is heard."""
    flags = [
        *TINY,
        *SHORT,
        "--epochs",
        "1",
        "--iw-samples",
        "2",
        "--latent-dim",
        "4",
        "--vocab-size",
        "60",
    ]
    train.main(["--dataset", str(home), *flags, "--out", str(home / "run")])
    model = T5VAE.from_pretrained(home / "run" / "phase2")
    with torch.no_grad():
        model.w_proj.weight.normal_(std=3)
        model.t5.shared.weight *= 0.1
    model.save_pretrained(home / "run" / "phase2" / "model")
    return str(home / "run" / "phase2")


def read_json(run, name):
    return json.loads(Path(run, name).read_text())


# ---------------------------------------- latent


@pytest.fixture
def ask(run, capsys):
    """Lines that `latent COMMAND RUN ...` prints."""

    def lines(command, *args):
        latent.main([command, run, *map(str, args), "--max-length", "8"])
        return capsys.readouterr().out.splitlines()

    return lines


def test_reconstruct_reads_arguments_files_and_standard_input(ask, run, tmp_path, monkeypatch):
    texts = ["the old king", "", "a queen sells"]
    model = T5VAE.from_pretrained(run)
    expected = model.decode_texts(model.encode_texts(texts, max_length=8)[0], max_new_tokens=8)
    assert ask("reconstruct", *texts) == expected
    (tmp_path / "texts").write_text("\n".join(texts) + "\n")
    assert ask("reconstruct", "--file", tmp_path / "texts") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode())))
    assert ask("reconstruct") == expected
    first = json.loads(ask("reconstruct", texts[0], "--json")[0])
    assert first == {"text": texts[0], "output": expected[0]}
    drawn = [ask("reconstruct", texts[0], "--samples", 8, "--seed", seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_interpolations_end_in_the_reconstructions():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    straight, arc = latent.interpolate(a, b, 3), latent.interpolate(a, b, 3, spherical=True)
    assert straight[1].tolist() == [0.5, 0.5]
    assert arc.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    for path in straight, arc:
        torch.testing.assert_close(path[[0, 2]], torch.stack([a, b]))
    torch.testing.assert_close(latent.interpolate(a, 2 * a, 3, spherical=True)[1], 1.5 * a)


def test_arithmetic_neighbors_traversal_and_encoding(ask, run, tmp_path):
    model = T5VAE.from_pretrained(run)
    texts = ["the old king", "a queen sells", "the nuns hide a lamp"]
    mu = model.encode_texts(texts, max_length=8)[0]
    for name, lines in ("from", texts[:1]), ("to", texts[1:2]), ("all", texts):
        (tmp_path / name).write_text("\n".join(lines))
    moved = model.decode_texts(mu[2:] + 2 * (mu[1] - mu[0]), max_new_tokens=8)
    flags = ("--from", tmp_path / "from", "--to", tmp_path / "to", "--k", 2)
    assert ask("arithmetic", *flags, texts[2]) == moved
    near = ask("neighbors", tmp_path / "all", texts[1], "-n", 2)
    assert near[0] == f"0.000\t{texts[1]}"
    assert len(near) == 2
    rows = [line.split("\t") for line in ask("traverse", texts[0], "--dim", 3, 1, "--steps", 2)]
    assert [row[:2] for row in rows] == [
        ["3", "-3.000"],
        ["3", "3.000"],
        ["1", "-3.000"],
        ["1", "3.000"],
    ]
    ask("encode", tmp_path / "all", "-o", tmp_path / "z.npz")
    np.testing.assert_allclose(np.load(tmp_path / "z.npz")["mu"], mu, atol=1e-5)
    assert len(ask("sample", "-n", 3)) == 3
    assert ask("reconstruct", "--file", os.devnull) == []
    assert len(ask("interpolate", *texts[:2], "--steps", 4)) == 4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["reconstruct", "no/run", "x"], "no/run is neither a folder here nor"),
        (["reconstruct", "{run}", "--file", "no/file"], "no/file"),
        (["traverse", "{run}", "x", "--dim", "4"], "--dim is 4; it must be in [0, 4)"),
    ],
)
def test_latent_refuses_in_one_line(args, words, run):
    with pytest.raises(SystemExit) as stop:
        latent.main([arg.format(run=run) for arg in args])
    assert words in str(stop.value)
    assert "\n" not in str(stop.value)
    assert str(stop.value).startswith("latent.py: ")


def test_unknown_characters_are_counted_on_stderr(ask, run, capsys):
    latent.main(["reconstruct", run, "a king", "\u4e2d"])
    assert "1 of 2 texts have characters outside the vocabulary" in capsys.readouterr().err


# ---------------------------------------- refine, describe


def test_refinement_lowers_the_bound_and_does_not_mix_sentences(run, capsys):
    _, model, read = metrics.load_run(run)
    corpus = read("test")
    bounds = []
    for steps in (1, 100):
        refined = refine.refine(copy.deepcopy(model), steps)
        bounds.append(metrics.evaluate(refined, corpus, 7, 20)["neg_elbo"])
    assert bounds[1] < bounds[0] - 0.1, bounds
    batch = data.make_batch(corpus, np.arange(len(corpus)))
    alone = data.make_batch(corpus, np.array([3]))
    refined = refine.refine(model, 5)
    whole, one = (refined.encode(b.ids, b.mask) for b in (batch, alone))
    for a, b in zip(whole, one, strict=True):
        torch.testing.assert_close(a[3:4], b, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(a[4:5], b, rtol=1e-3, atol=1e-4)
    refine.main([run, "--steps", "2", "--iw-samples", "2"])
    assert read_json(f"{run}-refined.json", "")["refine"] == 2
    assert read_json(run, "metrics.json").get("refine") is None
    assert "refined" in capsys.readouterr().out


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
    for lost in "nll_iw", "rec_prior":  # as in phase 1
        del values[lost]
    np.savez(other / "sentences.npz", **values)
    measured = read_json(other, "metrics.json") | {"iw_samples": 0}
    (other / "metrics.json").write_text(json.dumps(measured))
    compare.main([str(one), str(other)])
    assert "nll                  -\n" in capsys.readouterr().out
    shutil.copytree(run, other, dirs_exist_ok=True)
    for name, key, value in (
        ("metrics", "iw_samples", 7),
        ("config", "data_sha256", {"test": "of others"}),
    ):
        before = read_json(other, f"{name}.json")
        (other / f"{name}.json").write_text(json.dumps(before | {key: value}))
        with pytest.raises(SystemExit, match="compare.py: .*(must be the same|different texts)"):
            compare.main([str(one), str(other)])
        (other / f"{name}.json").write_text(json.dumps(before))
    for name, words in ("metrics", "is not finished"), ("config", "is no run"):
        before = (other / f"{name}.json").read_text()
        for damaged in "3", "[]", "{}", '{"data_sha256": 1, "max_length": 12}':
            (other / f"{name}.json").write_text(damaged)
            with pytest.raises(SystemExit, match=f"compare.py: {other} {words}"):
                compare.main([str(one), str(other)])
        (other / f"{name}.json").write_text(before)
    (other / "sentences.npz").unlink()
    with pytest.raises(SystemExit, match="python metrics.py"):
        compare.main([str(one), str(other)])


def test_description(home, capsys, tmp_path):
    tokenizer = data.train_tokenizer(data.read_texts(str(home), "train"), 60)
    lines = list(describe.describe(str(home), tokenizer))
    assert lines[1].split()[:3] == ["train", "23", "0"]
    assert "7 in train" in lines[2], "its texts are the first of the training texts"
    assert [line.split()[0] for line in lines[5:]] == ["0%"] * 3 + ["15%"] * 3 + ["40%"] * 3
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match=f"describe.py: {tmp_path} is damaged"):
        describe.main([str(home), "--tokenizer", str(tmp_path)])
    with pytest.raises(SystemExit, match="describe.py: .*no/such"):
        describe.main(["no/such"])


# ---------------------------------------- tables and pictures


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


def test_paper_tables_print_all_and_put_a_run_under_its_own(run, tmp_path, capsys):
    paper_tables.main([])
    assert capsys.readouterr().out.count("Optimus") == 4
    with pytest.raises(SystemExit, match="cannot use"):
        paper_tables.main([run])
    own = shutil.copytree(run, tmp_path / "own")
    config = json.loads((own / "config.json").read_text()) | {"dataset": "ptb"}
    (own / "config.json").write_text(json.dumps(config))
    paper_tables.main([str(own)])
    out = capsys.readouterr().out
    assert out.count("Optimus") == 1
    assert str(own) in out


def test_pictures_hold_every_point(run, tmp_path, capsys):
    warm_up = run.replace("phase2", "phase1")
    figure = plots.draw(plots.parse_args(["curves", "--out", "x.png", run, warm_up]))
    records = [
        r
        for r in map(json.loads, Path(run, "log.jsonl").read_text().splitlines())
        if r["split"] == "valid"
    ]
    lines = figure.axes[0].get_lines()
    assert len(lines) == 2
    assert lines[0].get_ydata() == pytest.approx([record["mi"] for record in records])
    plots.main(["curves", "--out", str(tmp_path / "c.png"), run, warm_up])
    assert matplotlib.image.imread(tmp_path / "c.png").std() > 0
    with pytest.raises(SystemExit, match="no/run"):
        plots.main(["curves", "--out", "x.png", "no/run"])


def test_texts_are_judged_beside_test_sentences(run, home, capsys):
    assert samples.distinct(["a a b", "b c"], 1) == pytest.approx(100 * 3 / 5)
    assert samples.distinct(["a a b", "b c"], 2) == 100, "no pair crosses from one text to the next"
    flags = [*TINY, *SHORT, "--no-latent", "--epochs", "1", "--out", str(home / "judge")]
    train.main(["--dataset", str(home), *flags])
    samples.main([run, "--lm", str(home / "judge" / "lm"), "--count", "7"])
    assert "prior, sampled" in capsys.readouterr().out
    measured, judge = (
        read_json(f"{run}-samples.json", "")["measures"],
        read_json(home / "judge" / "lm", "metrics.json"),
    )
    assert measured["test sentences"]["lm_nats"] == pytest.approx(
        judge["rec"] * 7 / judge["tokens"], rel=1e-5
    )
    assert measured["test sentences"]["lm_nats"] != pytest.approx(
        measured["prior, sampled"]["lm_nats"], rel=1e-3
    )
    texts = data.read_texts(str(home), "test")
    perfect = copy.deepcopy(T5VAE.from_pretrained(run))
    perfect.decode_texts = lambda z, **_: texts if len(z) == len(texts) else texts[: len(z)]
    perfect.encode_texts, corpus = (
        lambda ts: (torch.zeros(len(ts), 4), None),
        metrics.load_run(run)[2]("test"),
    )
    order = torch.Generator().manual_seed(0)
    texts = [texts[i] for i in torch.randperm(7, generator=order).tolist()]
    measured, _ = samples.judge(perfect, None, corpus, 7)
    assert measured["reconstructions"]["bleu"] == pytest.approx(100)
    texts = texts[1:] + texts[:1]
    assert samples.judge(perfect, None, corpus, 7)[0]["reconstructions"]["bleu"] < 60, "the control"
    for wrong in ([str(home / "judge" / "lm")], [run, "--lm", run]):
        with pytest.raises(SystemExit, match="samples.py: cannot use"):
            samples.main(wrong)


# ---------------------------------------- pretraining


def test_span_corruption_loses_nothing():
    sentinels, lost, total = list(range(1000, 1100)), 0, 0
    for n in (1, 2, 3, 7, 40, 255):
        tokens = np.arange(10, 10 + n)
        inputs, targets = spans.corrupt_spans(tokens, sentinels, EOS, np.random.default_rng(n))
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


def test_a_share_of_the_batches_is_language_modelling(home, run):
    """There the encoder reads </s> alone and the decoder writes the whole texts; the others are
    corrupted spans."""
    model = T5VAE.from_pretrained(run)
    corpus, index = data.load_corpus(str(home), "train", model.tokenizer), np.arange(8)
    make = partial(spans.pretraining_batch, corpus, sentinels=range(1000, 1100), eos_id=EOS, seed=0)
    whole = data.make_batch(corpus, index)
    lm = make(0, index, lm_share=1.0)
    assert lm.ids.tolist() == [[EOS]] * 8
    assert torch.equal(lm.labels, whole.labels)
    corrupted = make(0, index, lm_share=0.0)
    assert corrupted.ids.shape[1] > 1
    assert (corrupted.labels >= 1000).any(1).all()
    kinds = [make(epoch, index, lm_share=0.5).ids.shape[1] == 1 for epoch in range(200)]
    assert 70 < sum(kinds) < 130
    assert kinds == [make(epoch, index, lm_share=0.5).ids.shape[1] == 1 for epoch in range(200)], (
        "not reproducible"
    )


def test_pretraining_makes_a_t5_that_training_starts_from_and_resumes(home, tmp_path):
    shape = ["--d-model", "16", "--layers", "1", "--heads", "2", "--vocab-size", "40"]
    flags = ["--dataset", str(home), str(home / "train.txt"), *shape, "--lm-share", "0.5"]
    flags += ["--batch-size", "5", "--log-every", "3", "--steps", "12", "--out"]
    pretrain.main([*flags, str(tmp_path / "whole")])
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 12
    assert log[-1]["nats_per_target"] < log[0]["nats_per_target"]
    assert log[0]["query_growth"] == pytest.approx(1, abs=0.2)
    code = "import sys, os, train; from extras import pretrain\nseed, n = train.seed_dropout, 0\n"
    code += "def cut(*a):\n    global n; n += 1\n    return os._exit(9) if n == 8 else seed(*a)\n"
    code += "train.seed_dropout = cut; pretrain.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *flags, str(tmp_path / "cut"), "--save-every", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # other threads round sums otherwise
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert ended.returncode == 9
    with pytest.raises(SystemExit, match="holds a run: --resume it"):
        pretrain.main([*flags, str(tmp_path / "cut")])
    pretrain.main([*flags, str(tmp_path / "cut"), "--resume"])
    for name in "log.jsonl", "model/model.safetensors":
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    model = ["--dataset", str(home), "--model", str(tmp_path / "whole" / "model"), "--phase", "1"]
    train.main([*model, *SHORT, "--epochs", "0", "--out", str(tmp_path / "vae")])
    with pytest.raises(SystemExit, match="--layers is 5, but"):
        train.main([*model, "--layers", "5", "--out", str(tmp_path / "no")])
    zero = ["--tokenizer", model[3], "--steps", "0", "--out", str(tmp_path / "zero")]
    pretrain.main(["--dataset", str(home), *shape, *zero])
    start = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "zero" / "model")
    assert pretrain.query_growth(start) == pytest.approx(1, abs=0.2)
    for wrong in ["--kl-target", "3"], ["--lm-share", "1"], ["--dropout", "0.1"]:
        with pytest.raises(SystemExit):
            pretrain.main([*flags, str(tmp_path / "no"), *wrong])
    before = (tmp_path / "whole" / "metrics.json").read_bytes()
    with pytest.raises(SystemExit, match="no train.txt"):
        pretrain.main(["--dataset", "no/such", "--out", str(tmp_path / "whole"), "--overwrite"])
    assert (tmp_path / "whole" / "metrics.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(SystemExit, match="holds notes, which no run wrote"):
        pretrain.main([*flags, str(tmp_path / "mine"), "--overwrite"])
    assert not (tmp_path / "no").exists()


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


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_quick_language_model_trains(home, tmp_path, amp):
    flags = [
        "--dataset",
        str(home),
        *TINY,
        *SHORT,
        "--no-latent",
        "--epochs",
        "1",
        "--amp",
        amp,
    ]
    fast_cpu.main([*flags, "--out", str(tmp_path / "lm")])
    assert read_json(tmp_path / "lm" / "lm", "metrics.json")["latent_dim"] == 0


def test_quick_losses_weigh_tokens_of_their_own():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
    for share in torch.ones(6) / 6, torch.rand(6), torch.zeros(6):
        found = []
        for loss in (
            fast_cpu.TokenNats.apply,
            lambda h, w, y: F.cross_entropy(h @ w.T, y, reduction="none"),
        ):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            (loss(h, w, labels) * share).sum().backward()
            found.append((h.grad, w.grad))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_quick_dropout_drops_p_and_keeps_the_mean():
    x = torch.randn(400, 250).abs()
    for layer, plain in (fast_cpu.Dropout(0.1), x), (fast_cpu.DropoutOfReLU(0.1), x.relu()):
        out = layer.train()(x)
        assert (out == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
        assert out.mean().item() == pytest.approx(plain.mean().item(), rel=0.01)
        assert torch.equal(layer.eval()(x), plain)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_quick_dropout_passes_the_gradient_of_what_it_kept(kind):
    for layer in fast_cpu.Dropout(0.3).train(), fast_cpu.DropoutOfReLU(0.3).train():
        x = torch.randn(40, 25).to(kind).requires_grad_()
        out = layer(x)
        out.sum().backward()
        torch.testing.assert_close(x.grad * x, out)  # both are linear in what they keep
        assert 0 < (x.grad == 0).float().mean() < 1


def test_the_quick_layer_norm_has_the_gradient_of_t5s():
    plain = T5LayerNorm(8)
    plain.weight.data.normal_()
    x, towards, found = torch.randn(3, 5, 8), torch.randn(3, 5, 8), []
    for norm in (
        plain,
        lambda x: fast_cpu.Normalize.apply(x, plain.weight, plain.variance_epsilon, torch.float32),
    ):
        x_, plain.weight.grad = x.clone().requires_grad_(), None
        out = norm(x_)
        (out * towards).sum().backward()
        found.append((out, x_.grad, plain.weight.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(found[0][1], towards * plain.weight, atol=0.1), (
        "the control: the norm is not linear"
    )


def test_training_with_quick_layers_saves_a_model_of_the_core(home, tmp_path):
    flags = [
        "--dataset",
        str(home),
        *TINY,
        *SHORT,
        "--epochs",
        "1",
        "--phase",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    fast_cpu.main(flags)
    assert (
        T5VAE.from_pretrained(tmp_path / "run" / "phase1")
        .encode_texts(["a king"])[0]
        .isfinite()
        .all()
    )
    for fp16 in ["--amp", "fp16"], ["--amp=fp16"]:
        with pytest.raises(SystemExit, match="must be bf16 or off"):
            fast_cpu.main([*flags, *fp16])


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_take_what_the_formula_says(amp, dropout):
    sizes = {
        "d_model": 48,
        "d_ff": 160,
        "num_heads": 3,
        "d_kv": 16,
        "num_layers": 5,
        "num_decoder_layers": 5,
    }
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (
            storage.nbytes(),
            tensor,
        )  # the tensor lives on, so that no other has its address
        return tensor

    def total(sentences, **changes):
        model = tiny_vae(vocab_size=20, dropout_rate=dropout, **sizes | changes).train()
        ids, mask = (
            torch.randint(3, 20, (sentences, 40)),
            torch.ones(sentences, 40, dtype=torch.long),
        )
        batch = data.Batch(ids, mask, ids, torch.arange(sentences), torch.zeros(sentences, 8))
        kept.clear()
        half = torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16")
        with half, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(batch)
        return sum(size for size, _ in kept.values())

    def of_four_sentences(**changes):  # without the weights, which more sentences do not multiply
        return total(8, **changes) - total(4, **changes)

    config = tiny_vae(dropout_rate=dropout, **sizes).t5.config
    six_layers = of_four_sentences() - of_four_sentences(num_layers=2, num_decoder_layers=2)
    assert six_layers == pytest.approx(
        benchmark.activation_bytes(config, 4, 40, amp) * 6 / 10, rel=0.03
    )


def test_the_benchmark_compares_and_writes_nothing(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    benchmark.main(["--dataset", str(home), *TINY, *SHORT, "--repeats", "1"])
    out = capsys.readouterr().out
    for word in (
        "phase 1  core",
        "phase 2  quicken",
        "times transformers",
        "evaluation",
        "generation",
    ):
        assert word in out
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="benchmark.py: "):
        benchmark.main(["--dataset", "no/such", *TINY])
