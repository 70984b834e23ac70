"""The VAE on every shape of T5, its files, and the command line of the latent space. CPU, random models, no network."""

import copy
import io
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import hub_mixin
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    ByT5Tokenizer,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    MT5Config,
    T5Config,
    UMT5Config,
)
from transformers.modeling_outputs import BaseModelOutput

import data
import vae
from vae import T5VAE

TEXTS = ["the old king sells a boat", "a monk", "the tired queens will paint a red lamp in the garden", "she hides"]
SIZE = {"d_model": 24, "d_ff": 32, "num_layers": 2, "decoder_start_token_id": 0}
SHAPES = {  # configuration, an LM head of its own
    "plain": (T5Config(**SIZE, d_kv=6, num_heads=4), False),
    "plain, own head": (T5Config(**SIZE, d_kv=6, num_heads=4), True),
    "gated, own head (v1.1)": (
        T5Config(**SIZE, d_kv=6, num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        True,
    ),
    "gated, no scale, one head": (
        T5Config(**SIZE, d_kv=6, num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        False,
    ),
    "A * S != D, 3 decoder layers": (T5Config(**SIZE, d_kv=5, num_heads=3, num_decoder_layers=3), False),
    "bytes (ByT5)": (
        T5Config(**SIZE, vocab_size=384, d_kv=6, num_heads=2, num_decoder_layers=1, feed_forward_proj="gated-gelu"),
        True,
    ),
    "mT5": (MT5Config(**SIZE, d_kv=5, num_heads=3, num_decoder_layers=1), True),
}


@pytest.fixture(scope="session")
def tokenizer():
    return data.train_tokenizer([text for text in TEXTS for _ in range(3)], 80)


def save_t5(folder, config, own_head, tokenizer):
    torch.manual_seed(0)
    config.vocab_size = max(len(tokenizer), 384 if config.vocab_size == 384 else 0)
    t5 = AutoModelForSeq2SeqLM.from_config(config)
    if own_head:
        t5.lm_head.weight = torch.nn.Parameter(torch.randn_like(t5.lm_head.weight))
    with torch.no_grad():  # a random decoder repeats its token; one that listens less to it writes all sorts
        t5.shared.weight *= 0.1
        for name, weight in t5.decoder.named_parameters():
            if "SelfAttention" in name or "DenseReluDense" in name:
                weight *= 8**0.5
    t5.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session", params=SHAPES)
def checkpoint(request, tmp_path_factory, tokenizer):
    """A folder with a random T5 of one of the shapes."""
    folder = tmp_path_factory.mktemp("t5")
    save_t5(folder, *SHAPES[request.param], ByT5Tokenizer() if "bytes" in request.param else tokenizer)
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


def test_round_trip_keeps_every_bit(checkpoint, batch, tmp_path, tokenizer):
    model, z, labels = batch
    # As new, as from the hub: a tokenizer that was loaded notes that it was, and from where.
    model.tokenizer = ByT5Tokenizer() if isinstance(model.tokenizer, ByT5Tokenizer) else copy.deepcopy(tokenizer)
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
        assert model.tokenizer(TEXTS)["input_ids"] == again.tokenizer(TEXTS)["input_ids"]
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
    mu, logvar = model.encode_texts(TEXTS, batch_size=3)
    for i, text in enumerate(TEXTS):  # the order stays, and a text does not feel its neighbors
        torch.testing.assert_close(mu[i], model.encode_texts([text])[0][0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mu[0], mu[1], atol=1e-3)
    assert logvar.shape == mu.shape == (4, 5)
    outputs = model.decode_texts(mu, batch_size=3, max_new_tokens=6)
    assert [type(output) for output in outputs] == [str] * 4
    assert outputs[3:] == model.decode_texts(mu[3:], max_new_tokens=6)


# ---------------------------------------------------------------------------------------- files


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("t5")
    save_t5(folder, *SHAPES["gated, own head (v1.1)"], tokenizer)
    t5 = AutoModelForSeq2SeqLM.from_pretrained(folder)
    with torch.no_grad():  # it writes words, not sentinels, which are not shown
        t5.lm_head.weight[tokenizer.all_special_ids] = 0
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
def run(t5_folder, tmp_path_factory):
    """A run folder as train.py leaves it."""
    folder = tmp_path_factory.mktemp("run")
    from_t5(t5_folder).save_pretrained(folder / "model")
    config = {"dataset": "grammar", "phase": 2, "command": "python train.py --dataset grammar"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps({"rec": 12.3456, "rec_se": 0.1, "entropy": None, "au": 5}))
    return folder


def test_a_run_folder_is_a_model_too(run):
    for a, b in zip(
        T5VAE.from_pretrained(run).parameters(), T5VAE.from_pretrained(run / "model").parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_the_card_tells_the_run_and_travels(run, tmp_path, monkeypatch):
    T5VAE.from_pretrained(run).save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\ntags:")
    assert "`python train.py --dataset grammar`" in card
    assert "| rec | 12.346 |\n| au | 5 |\n" in card
    assert "5 latent dimensions, max pooling" in card
    assert "12.3" not in (run / "model" / "README.md").read_text()  # saved before it was measured
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
def cli(run, capsys, monkeypatch):
    """Runs a command on the run; returns the lines on stdout. What stderr says is in `cli.err`."""

    def call(command, *args, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        vae.main([command, str(run), "--max-length", "9", *map(str, args)])
        out, call.err = capsys.readouterr()
        return out.splitlines()

    return call


def refusal(cli, capsys, *args):
    with pytest.raises(SystemExit) as caught:
        cli(*args)
    return caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err


def greedy(run, z):
    return T5VAE.from_pretrained(run).decode_texts(z, max_new_tokens=9)


def test_reconstruct_reads_arguments_files_and_stdin(run, cli, tmp_path):
    (tmp_path / "texts").write_text("\n".join(TEXTS) + "\n")
    with warnings.catch_warnings(action="ignore"):
        expected = greedy(run, T5VAE.from_pretrained(run).encode_texts(TEXTS, max_length=9)[0])
    assert len(set(expected)) == 4
    lines = "\n".join(TEXTS).encode()
    assert cli("reconstruct", *TEXTS) == expected
    assert cli("reconstruct", "--file", tmp_path / "texts", "--batch-size", 1) == expected
    assert cli("reconstruct", stdin=lines) == expected
    assert cli("reconstruct", "-", stdin=lines.replace(b"\n", b"\r\n")) == expected
    assert cli("reconstruct", TEXTS[0], "-", stdin="\n".join(TEXTS[1:]).encode()) == expected
    rows = [json.loads(line) for line in cli("reconstruct", "--json", *TEXTS)]
    assert rows == [{"text": text, "output": output} for text, output in zip(TEXTS, expected, strict=True)]


def test_reconstruct_samples_the_posterior_by_seed(cli):
    first = cli("reconstruct", "--samples", 5, *TEXTS[:2], "--json")
    assert [json.loads(line)["text"] for line in first] == [TEXTS[0]] * 5 + [TEXTS[1]] * 5
    assert len(set(first)) > 2
    assert first == cli("reconstruct", "--samples", 5, *TEXTS[:2], "--json", "--seed", 0)
    assert first != cli("reconstruct", "--samples", 5, *TEXTS[:2], "--json", "--seed", 1)


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
    lines = cli("interpolate", *TEXTS[:2], "--steps", 6, *flags)
    ends = cli("reconstruct", *TEXTS[:2])
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


def test_arithmetic_adds_the_difference_of_the_means(run, cli, tmp_path):
    (tmp_path / "from").write_text(f"{TEXTS[0]}\n\n{TEXTS[1]}\n")
    (tmp_path / "to").write_text("she hides\n")
    groups = ["--from", tmp_path / "from", "--to", tmp_path / "to"]
    mu, _ = T5VAE.from_pretrained(run).encode_texts([*TEXTS[:2], "she hides", "a boat"])
    moved = mu[3] + 2 * (mu[2] - mu[:2].mean(0))
    assert cli("arithmetic", *groups, "--k", 2, "a boat") == greedy(run, moved[None])
    assert cli("arithmetic", *groups, "--k", 0, "a boat") == cli("reconstruct", "a boat") != greedy(run, moved[None])


def test_neighbors_come_nearest_first(run, cli, tmp_path):
    lines = [*TEXTS, "a boat", "", "the garden", "a monk sells"]
    (tmp_path / "lines").write_text("\n".join(lines))
    rows = [line.split("\t") for line in cli("neighbors", tmp_path / "lines", "a boat", "-n", 4)]
    texts = [line for line in lines if line]
    with warnings.catch_warnings(action="ignore"):
        mu, _ = T5VAE.from_pretrained(run).encode_texts(texts, max_length=9)
    distance = (mu - mu[4]).norm(dim=1)
    assert [text for _, text in rows] == [texts[i] for i in distance.argsort()[:4]]
    assert rows[0] == ["0.000", "a boat"]
    assert float(rows[1][0]) == pytest.approx(distance.sort().values[1].item(), abs=1e-3)
    assert len(cli("neighbors", "-", "a boat", stdin=b"a monk\nshe\n")) == 2


def test_traverse_moves_one_dimension(run, cli):
    mu, _ = T5VAE.from_pretrained(run).encode_texts(["a boat"])
    z = mu.repeat(3, 1)
    z[:, 4] = torch.tensor([-3.0, 0.0, 3.0])
    expected = [f"4\t{v}\t{text}" for v, text in zip(("-3.000", "0.000", "3.000"), greedy(run, z), strict=True)]
    assert cli("traverse", "a boat", "--dim", 4, "--steps", 3) == expected
    assert len({line.split("\t")[2] for line in expected}) > 1


def test_traverse_takes_the_most_active_dimensions(cli, monkeypatch):
    encode = T5VAE.encode
    scale = torch.tensor([1, 10, 0.001, 100, 0.1])
    monkeypatch.setattr(T5VAE, "encode", lambda self, *a: (encode(self, *a)[0] * scale, encode(self, *a)[1]))
    lines = cli("traverse", "a boat", "--steps", 2)
    assert [int(line.split("\t")[0]) for line in lines[::2]] == [3, 1, 0, 4, 2]


def test_encode_writes_arrays_or_json_lines(run, cli, tmp_path):
    texts = ["a monk", "", "the garden"]  # an empty line keeps its row
    mu, logvar = T5VAE.from_pretrained(run).encode_texts(texts)
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


def test_unknown_tokens_and_line_ends_in_outputs(run, cli, monkeypatch):
    model = T5VAE.from_pretrained(run)
    ids = [0, *model.tokenizer("a boat", add_special_tokens=False)["input_ids"], 2, 1, 0, 0]
    monkeypatch.setattr(T5VAE, "generate", lambda self, z, **kwargs: torch.tensor([ids]))
    assert model.decode_texts(torch.zeros(1, 5))[0].split() == ["a", "boat", "<unk>"]
    assert vae.show({"text": "x", "output": "a\nb\tc"}, False) == "a b c"
    assert json.loads(vae.show({"output": "a\nb\tc"}, True)) == {"output": "a\nb\tc"}


def test_refusals_are_one_line(run, cli, capsys, tmp_path):
    assert "nothing" in refusal(cli, capsys, "reconstruct", "--file", tmp_path / "nothing")
    (tmp_path / "empty").write_text("\n\n")
    assert "empty holds no text" in refusal(cli, capsys, "neighbors", tmp_path / "empty", "a boat")
    assert refusal(cli, capsys, "traverse", "a", "--dim", 5) == "vae.py: --dim is 5; it must be in [0, 5)"
    assert "--top-p: 2 is not in" in refusal(cli, capsys, "sample", "--top-p", 2)
    with pytest.raises(SystemExit, match=f"^vae.py: {tmp_path} holds no T5VAE"):
        vae.main(["sample", str(tmp_path)])


def test_a_closed_pipe_ends_quietly(run, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as caught:
            vae.main(["sample", str(run), "--max-length", "4"])
    assert caught.value.code == 141
    assert capsys.readouterr().err == ""
