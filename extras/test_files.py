"""Files: downloads, data sets of your own, saved models and the hub."""

# ruff: noqa: F811  # pytest hands fixtures over by name

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub import hub_mixin
from transformers import (
    BertConfig,
    GenerationConfig,
)

import data
from test_vae import (
    CLI_TEXTS,
    EOS,
    PAD,
    checkpoint,
    cli_tokenizer,
    data_tokenizer,
    files,
    from_t5,
    saved,
    t5_folder,
    texts_of,
    tiny_vae,
    write,
)  # noqa: F401
from vae import T5VAE


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
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs"),
            "model.safetensors",
        ),
        (lambda f: break_weights(f, lambda w: w.pop("w_mu.weight")), "w_mu.weight"),
        (lambda f: break_weights(f, lambda w: w.update(w_logsd=torch.ones(1))), "w_logsd"),
        (lambda f: break_config(f, lambda c: c.pop("t5_config")), "t5_config"),
        (
            lambda f: break_config(f, lambda c: c.update(latent_dim=6)),
            "size mismatch for w_logvar",
        ),
        (
            lambda f: break_config(f, lambda c: c["t5_config"].update(model_type="bart")),
            "config.json",
        ),
    ],
)
def test_folders_of_others_are_refused_by_name(saved, harm, lacks):
    T5VAE.from_pretrained(saved)
    harm(saved)
    with pytest.raises(ValueError, match=r"old.*" + lacks.replace(".", r"\.")) as caught:
        T5VAE.from_pretrained(saved)
    assert str(saved) in str(caught.value)


def test_a_t5_is_no_vae_and_others_are_no_t5(t5_folder, tmp_path):
    with pytest.raises(ValueError, match="holds no T5VAE"):
        T5VAE.from_pretrained(t5_folder)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is a bert; it must be one of t5, mt5, umt5"):
        T5VAE.from_t5(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no/such/run is neither a folder here"):
        T5VAE.from_pretrained("no/such/run")


def test_a_t5_that_lacks_weights_is_refused(t5_folder, tmp_path):
    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    from_t5(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    half = {name: w for name, w in weights.items() if not name.startswith("decoder")}
    safetensors.torch.save_file(half, tmp_path / "model.safetensors", {"format": "pt"})
    lacks = f"{len(weights) - len(half)} weights are missing or of another shape, e.g. decoder"
    with pytest.raises(ValueError, match="is no T5 to start from: " + lacks):
        from_t5(tmp_path)


def test_generation_settings_of_the_checkpoint_do_not_stay(t5_folder, tmp_path):
    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    settings = GenerationConfig(
        num_beams=3, repetition_penalty=9.0, decoder_start_token_id=0, eos_token_id=1
    )
    settings.save_pretrained(tmp_path)
    z = torch.randn(4, 5)
    loud = from_t5(t5_folder)
    plain = loud.generate(z, 8)
    assert torch.equal(from_t5(tmp_path).generate(z, 8), plain)
    loud.t5.generation_config = settings
    assert not torch.equal(loud.generate(z, 8), plain)


def test_a_run_folder_is_a_model_too_and_can_be_pushed(saved, tmp_path, monkeypatch):
    run, pushed = tmp_path / "run", {}
    shutil.copytree(saved, run / "model")
    for a, b in zip(
        T5VAE.from_pretrained(run).parameters(),
        T5VAE.from_pretrained(saved).parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **kwargs):
            pushed[repo_id] = files(folder_path)

    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    T5VAE.from_pretrained(run).push_to_hub("me/sentences")
    assert pushed["me/sentences"]["model.safetensors"] == files(saved)["model.safetensors"]
    assert {"config.json", "tokenizer_config.json", "README.md"} <= pushed["me/sentences"].keys()


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; a path in `server.cuts` is cut there."""

    def do_GET(self):
        body = self.server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cuts.get(self.path, len(body))])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.cuts = {}, {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


DIGESTS = {
    "sha256": lambda text: hashlib.sha256(text),
    "blob": lambda text: hashlib.sha1(b"blob %d\0" % len(text) + text),
}


@pytest.mark.parametrize("kind", DIGESTS)
def test_a_download_is_whole_and_checked_or_leaves_nothing(
    server, monkeypatch, tmp_path, kind, capsys
):
    text = b"a king paints\n" * 9000
    server.files["/ptb.valid.txt"] = text
    url, right = server.url + "/ptb.{split}.txt", DIGESTS[kind](text).hexdigest()
    monkeypatch.setitem(data.SOURCES, "ptb", (url, right, right, right))
    path = data.split_path("ptb", "valid", tmp_path)
    assert path.read_bytes() == text
    assert "docs/data.md" in capsys.readouterr().out
    server.files.clear()
    assert data.split_path("ptb", "valid", tmp_path) == path, "what is there is not fetched again"
    path.unlink()
    for served, cuts, checksum, reason in (
        ({}, {}, right, "404"),
        ({"/ptb.valid.txt": text}, {"/ptb.valid.txt": 4000}, right, "read"),
        ({"/ptb.valid.txt": text}, {}, right[:-2] + "zz", "checksum"),
    ):
        server.files, server.cuts = served, cuts
        monkeypatch.setitem(data.SOURCES, "ptb", (url, checksum, checksum, checksum))
        with pytest.raises(FileNotFoundError, match=reason) as error:
            data.split_path("ptb", "valid", tmp_path)
        assert "\n" not in str(error.value)
        assert "--data-dir" in str(error.value)
        assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_sources_are_pinned():
    for url, *checksums in data.SOURCES.values():
        assert re.search(r"/[0-9a-f]{40}/.*\{split\}", url), url
        assert {len(bytes.fromhex(checksum)) for checksum in checksums} <= {32, 20}
        assert len(checksums) == len(data.SPLITS)


def test_own_directory(data_tokenizer, tmp_path):
    own = write(tmp_path, content="\ufeffa king\r\n\r\n  a queen \r\n\n".encode())
    write(tmp_path, "ptb.valid.txt")
    assert list(data.read_texts(own, "train")) == ["a king", "", "a queen", ""]
    corpus = data.load_corpus(own, "train", data_tokenizer)
    assert texts_of(corpus, data_tokenizer) == ["a king", "a queen"]
    assert (corpus.skipped, corpus.truncated, corpus.words.tolist()) == (2, 0, [3, 3])
    with pytest.raises(FileNotFoundError, match=r"no valid.txt in .*" + tmp_path.name):
        data.load_corpus(own, "valid", data_tokenizer)
    (one,) = texts_of(data.load_corpus(own, "train", data_tokenizer, limit=1), data_tokenizer)
    assert one == "a king"
    write(tmp_path / "ptb", "ptb.valid.txt")
    assert data.split_path("ptb", "valid", tmp_path).name == "ptb.valid.txt"


@pytest.mark.parametrize("content", [b"", b"\n\r\n   \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused_by_name(data_tokenizer, tmp_path, content):
    own = write(tmp_path, "test.txt", content)
    with pytest.raises(ValueError, match="test.txt: no text"):
        data.load_corpus(own, "test", data_tokenizer)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"good\n\ncaf\xe9 bad\n", r"train.txt, line 3, byte 4"),
        ("text".encode("utf-16"), r"train.txt, line 1, byte 1"),
        ("\ufeffab".encode() + b"\xc3\n", r"train.txt, line 1, byte 6"),
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
    own = write(
        tmp_path,
        content=b"a king paints\n" + b"the old king paints a red boat " * 5000 + b"\na queen\n",
    )
    corpus = data.load_corpus(own, "train", data_tokenizer, max_length=16)
    assert corpus.truncated == 1
    assert corpus.lengths.max() == corpus.lengths[1] == 16
    assert corpus.ids[corpus.offsets[2] - 1] == data_tokenizer.eos_token_id
    assert corpus.words[1] == len(texts_of(corpus, data_tokenizer)[1].split()) + 1
    own = write(tmp_path, content=b"the <unk> king paints a <unk> boat " * 10)
    corpus = data.load_corpus(own, "train", data_tokenizer, max_length=40)
    kept = data.detokenize([corpus.row(0).tolist()], data_tokenizer)[0]
    assert kept.startswith("the <unk> king paints a <unk> boat the <unk>")
    assert corpus.words[0] == len(kept.split()) + 1
    own = write(tmp_path, content=b"the old king paints a red boat " * 5000)
    whole = data.load_corpus(own, "train", data_tokenizer, max_length=10**6)
    assert whole.truncated == 0
    assert whole.words[0] == 7 * 5000 + 1


def test_one_file_is_split_by_its_texts(tmp_path):
    lines = [f"text {i % 3000}" for i in range(4000)]  # a quarter of them twice
    (tmp_path / "all.txt").write_text("\n".join(lines))
    one = str(tmp_path / "all.txt")
    parts = {split: list(data.read_texts(one, split)) for split in data.SPLITS}
    assert sorted(sum(parts.values(), [])) == sorted(lines)
    assert [len(set(part)) / 3000 for part in parts.values()] == pytest.approx(
        [0.9, 0.05, 0.05], abs=0.02
    )
    assert not set(parts["train"]) & set(parts["test"])  # the same text twice is in the same split
    (tmp_path / "all.txt").write_text("\n".join(reversed(lines)))
    assert set(data.read_texts(one, "test")) == set(parts["test"])  # whatever the order
    (tmp_path / "all.txt").write_text("one text")
    with pytest.raises(ValueError, match="all.txt: no text for '(valid|test)'"):
        [list(data.read_texts(one, split)) for split in data.SPLITS]


def test_yelp_loses_its_labels_and_other_texts_keep_their_tabs(tmp_path):
    for name in ("yelp", "ptb"):
        write(tmp_path / name, "train.txt", b"4\tgood food\nno label\n")
    assert data.read_texts("yelp", "train", tmp_path) == ["good food", "no label"]
    assert data.read_texts("ptb", "train", tmp_path) == ["4\tgood food", "no label"]


def test_a_vocabulary_is_made_of_long_texts_too():
    texts = [f"{i} " + "the old king paints a red boat " * 300 for i in range(20)]
    tokenizer = data.train_tokenizer(texts, 60)
    assert tokenizer.unk_token_id not in tokenizer(texts[0])["input_ids"]


def test_words_become_pieces():
    tokenizer = data.train_tokenizer(data.read_texts("grammar", "train")[:5000], 4000)
    text = "the lonely queens will secretly repair a purple statue outside the palace soon"
    assert tokenizer.tokenize(text) == ["\u2581" + word for word in text.split()]
    assert tokenizer.pad_token_id == PAD
    assert tokenizer.eos_token_id == EOS


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
    assert [x.shape for x in model.encode_texts([])] == [(0, 5)] * 2
    with pytest.warns(UserWarning, match="4 of 4 texts are cut at 2 tokens"):
        cut, _ = model.encode_texts(CLI_TEXTS, max_length=2)
    assert not torch.allclose(cut[0], mu[0], atol=1e-3)


def test_what_encode_texts_and_decode_texts_take(t5_folder):
    model = from_t5(t5_folder)
    mu, _ = model.encode_texts(iter(CLI_TEXTS))
    assert torch.equal(mu, model.encode_texts(tuple(CLI_TEXTS))[0])
    assert torch.equal(mu, model.encode_texts(CLI_TEXTS)[0]), "nothing is drawn"
    with pytest.raises(data.InputError, match=r"texts is one str; .*\['a king'\]"):
        model.encode_texts("a king")
    with pytest.raises(data.InputError, match=r"texts\[1\] is 7; it must be a str"):
        model.encode_texts(["a king", 7])
    with pytest.raises(data.InputError, match=r"z has shape \(4,\); it must be \(N, 5\)"):
        model.decode_texts(torch.zeros(4))
    model.tokenizer = None
    with pytest.raises(data.InputError, match="no tokenizer"):
        model.encode_texts(["a king"])


def test_generate_takes_the_arguments_of_t5s_own(t5_folder):
    model, z = from_t5(t5_folder), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    greedy, never = model.generate(z, 9), {"eos_token_id": 5_000}
    assert model.generate(z, max_length=5, **never).shape == (3, 5)
    assert model.generate(z, 9, **never).shape == (3, 10)
    settings = GenerationConfig(max_length=7, decoder_start_token_id=PAD, pad_token_id=PAD)
    assert torch.equal(model.generate(z, generation_config=settings), greedy[:, :7])
    assert model.generate(z, 9, num_return_sequences=2, num_beams=2).shape[0] == 6
    for name in "inputs", "input_ids", "encoder_outputs", "decoder_input_ids":
        with pytest.raises(data.InputError, match=f"takes no {name}"):
            model.generate(z, **{name: z})


@torch.no_grad()
def test_samples_are_of_the_whole_distribution(t5_folder):
    """The first token, drawn 4,000 times; with transformers' top_k=50 the rest would be missing."""
    model, z = from_t5(t5_folder), torch.zeros(1, 5)
    torch.manual_seed(0)
    model.t5.lm_head.weight.normal_(std=0.1)  # so that no token is rare, and no two are alike
    p = model.decode(z, torch.tensor([[EOS]]))[0, 0].softmax(0)
    config = GenerationConfig(decoder_start_token_id=PAD)
    for settings in {"do_sample": True}, {"do_sample": True, "generation_config": config}:
        drawn = model.generate(z.expand(4000, 5), 1, **settings)[:, 1]
        share = drawn.bincount(minlength=len(p)) / 4000
        error = (p * (1 - p) / 4000).sqrt()
        assert ((share - p).abs() < 5 * error).all()
    top = model.generate(z.expand(4000, 5), 1, do_sample=True, top_k=50)[:, 1]
    assert len(top.unique()) <= 50 < len(drawn.unique()), "the control: what is asked for is done"


SPECIAL = ["a </s> king", "<pad>", "<extra_id_0> a king", "a</s></s>", "</s> <unk> <pad> king"]


@pytest.mark.parametrize("text", SPECIAL)
def test_text_is_text(text, tmp_path):
    """Special tokens in a line are characters, but <unk>, which PTB writes."""
    lines = ["< / > _ 0 pad extra id s unk", "a king queen"] * 20
    tokenizer = data.train_tokenizer(lines, 60)
    (row,) = data.tokenize([text], tokenizer)
    assert {i for i in row if i in tokenizer.all_special_ids} <= {tokenizer.unk_token_id}
    assert row.count(tokenizer.unk_token_id) == text.count("<unk>")
    assert data.detokenize([row], tokenizer) == [text]
    own = write(tmp_path, content=f"{text}\n".encode())
    corpus = data.load_corpus(own, "train", tokenizer)
    assert corpus.ids.tolist() == [*row, EOS]
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert set(plain) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}), "the control"


def test_unknown_tokens_are_written_as_they_were_read(t5_folder):
    model = from_t5(t5_folder)
    text = "the <unk> sells <unk>"
    rows = model.tokenizer([text], return_tensors="pt")["input_ids"]
    model.generate = lambda z, **_: F.pad(rows, (1, 3), value=0)
    assert model.decode_texts(torch.zeros(1, 5)) == [text]


LENGTHS = {
    "ptb": np.random.default_rng(0)
    .gamma(5.5, 5.1, 42_068)
    .astype(int)
    .clip(2, 133),  # mean 28, as PTB's training texts
    "yahoo": (20 + np.random.default_rng(0).lognormal(4.3, 0.6, 100_000))
    .astype(int)
    .clip(28, 256),  # mean 110
}


@pytest.mark.parametrize("name", LENGTHS)
def test_epochs_are_whole_random_and_waste_little(name):
    lengths, world = LENGTHS[name], 4
    first = data.epoch_order(lengths, 32, seed=0, epoch=0)
    shares = [index[rank::world] for index in first for rank in range(world) if len(index) > rank]
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(len(lengths)))
    waste = 1 - lengths.sum() / sum(len(share) * lengths[share].max() for share in shares)
    assert waste <= 0.05, f"{waste:.2%} of positions are padding"
    order = np.random.default_rng(0).permutation(len(lengths))
    unsorted = 1 - lengths.sum() / sum(
        32 * lengths[i].max() for i in np.array_split(order, len(lengths) // 32)
    )
    assert unsorted > 0.2  # what the buckets spare
    again = data.epoch_order(lengths, 32, seed=0, epoch=1)
    together = {tuple(sorted(batch)) for batch in first} & {tuple(sorted(batch)) for batch in again}
    assert len(together) < 0.01 * len(first)  # other company in the next epoch
    means = np.array([lengths[batch].mean() for batch in first])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1  # short and long batches come mixed
    repeat = data.epoch_order(lengths, 32, seed=0, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(first, repeat, strict=True))


def test_evaluation_has_every_text_once(data_tokenizer):
    corpus = data.load_corpus("grammar", "train", data_tokenizer, limit=5)
    order = data.evaluation_order(corpus.lengths, 2)
    assert sorted(np.concatenate(order).tolist()) == list(range(5))
    lengths = corpus.lengths[np.concatenate(order)]
    assert (np.diff(lengths) >= 0).all(), "shortest first"


def test_prefetch_keeps_the_order_works_ahead_and_passes_errors_on():
    ahead = threading.Event()
    results = data.prefetch(lambda i: (i == 2 and ahead.set()) or 10 // i, [5, 2, 1, 0])
    assert next(results) == 2
    assert ahead.wait(60), "the second item, while nobody asks for it"
    assert [next(results), next(results)] == [5, 10]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(data.prefetch(str, [])) == []


def test_latent_noise_is_normal_and_depends_on_seed_epoch_and_text_alone():
    index = np.arange(5000)
    eps = data.latent_noise(8, 0, 0, index)
    assert (eps.dtype, eps.shape) == (torch.float32, (5000, 8))
    for moment, expected in (1, 0), (2, 1), (3, 0), (4, 3):
        assert (eps**moment).mean().item() == pytest.approx(expected, abs=0.15), moment
    others = [data.latent_noise(8, 1, 0, index), data.latent_noise(8, 0, 1, index)]
    others += [data.latent_noise(8, 0, 0, index, draw=1), data.latent_noise(8, 0, 0, index + 5000)]
    others += [data.latent_noise(8, 0, 0, index, data.POSTERIOR), eps.roll(1, 0), eps.roll(1, 1)]
    for other in others:
        assert abs((eps * other).mean().item()) < 5 / 40_000**0.5, "no two uses share numbers"
    some = torch.tensor([7, 4999, 0])
    assert torch.equal(data.latent_noise(8, 0, 0, some), eps[some])
    assert not torch.equal(data.latent_noise(8, 0, 0, some.flip(0)), eps[some])


def test_a_training_batch_holds_the_noise_of_its_texts(data_tokenizer):
    corpus = data.load_corpus("grammar", "train", data_tokenizer, limit=9)
    settings = {"denoise": 0.4, "latent_dim": 3, "seed": 5}
    batch = data.training_batch(corpus, 2, np.array([8, 0, 4]), **settings)
    assert torch.equal(batch.eps, data.latent_noise(3, 5, 2, [8, 0, 4]))
    for i, labels, ids in zip([8, 0, 4], batch.labels, batch.ids, strict=True):
        assert labels[labels != PAD].tolist() == corpus.row(i).tolist(), "the target stays whole"
        assert len(ids[ids != PAD]) < len(corpus.row(i))
    with pytest.raises(ValueError, match=r"prob is 1.0; .* must be in \[0, 1\)"):
        data.training_batch(corpus, 2, np.arange(2), **settings | {"denoise": 1.0})
    one = data.make_batch(corpus, np.array([8, 0, 4]))
    assert torch.equal(one.ids, one.labels)
    assert torch.equal(one.labels, batch.labels)


# A model that the first edition saved has these names: it still loads.
SAVED = """t5.decoder.block.0.layer.0.SelfAttention.k t5.decoder.block.0.layer.0.SelfAttention.o
t5.decoder.block.0.layer.0.SelfAttention.q t5.decoder.block.0.layer.0.SelfAttention.v
t5.decoder.block.0.layer.0.SelfAttention.relative_attention_bias
t5.decoder.block.0.layer.0.layer_norm t5.decoder.block.0.layer.1.o
t5.decoder.block.0.layer.2.DenseReluDense.wi t5.decoder.block.0.layer.2.DenseReluDense.wo
t5.decoder.block.0.layer.2.layer_norm t5.decoder.final_layer_norm
t5.encoder.block.0.layer.0.SelfAttention.k t5.encoder.block.0.layer.0.SelfAttention.o
t5.encoder.block.0.layer.0.SelfAttention.q t5.encoder.block.0.layer.0.SelfAttention.v
t5.encoder.block.0.layer.0.SelfAttention.relative_attention_bias
t5.encoder.block.0.layer.0.layer_norm t5.encoder.block.0.layer.1.DenseReluDense.wi
t5.encoder.block.0.layer.1.DenseReluDense.wo t5.encoder.block.0.layer.1.layer_norm
t5.encoder.final_layer_norm t5.shared w_logvar w_mu w_proj"""


def test_the_names_in_a_saved_model_stay(tmp_path):
    tiny_vae(num_layers=1).save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert set(saved) == {f"{name}.weight" for name in SAVED.split()}
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config) == {"latent_dim", "pool_layers", "pooling", "t5_config"}
    promised = {"d_ff", "d_kv", "d_model", "decoder_start_token_id", "feed_forward_proj"}
    promised |= {"model_type", "num_heads", "num_layers", "tie_word_embeddings", "vocab_size"}
    assert promised < set(config["t5_config"])
