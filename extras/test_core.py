"""Tests of the four modules that take longer than those of test_vae.py.

Checkpoints as the hub has them, at test size, and a local server that speaks its protocol; data
sets and downloads; training that is killed, interrupted, damaged, moved or mistaken; several
processes.
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import sentencepiece
import tokenizers
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationConfig

import data
import metrics
import train
import vae
from data import InputError
from test_vae import (
    KILL,
    NOISY,
    PAD,
    ROOT,
    SHORT,
    SHORT_LM,
    TINY,
    check_logs_agree,
    cli_tokenizer,
    command,
    cut,
    data_tokenizer,
    distance,
    end,
    files,
    home,
    literal,
    log_records,
    main,
    one_thread,
    plain,
    quiet,
    random_texts,
    same_run,
    send,
    start,
    t5_folder,
    tiny_config,
    tiny_vae,
    train_run,
    whole_run,
    write,
)
from vae import T5VAE, Float32Activation, Float32Output, kl_divergence

TEXTS = ["the old king sells a boat", "two monks paint <a> clock near the lake: 3 / 4 = 0.75!"]
TEXTS += ["a quick brown fox jumps over the lazy dog_s ear", "UNKNOWN Extra PAD <extra_id_10> </s>"]
MARKED = ["a </s> b", "a<pad>b </s>", "the <extra_id_0> king <extra_id_1>", "</s>", "<pad> <pad>"]
SHARD = "model-00002-of-00003.safetensors"
FFN = "encoder.block.1.layer.1.DenseReluDense.wi.weight"
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

BASE = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 256}
BASE |= {"model_type": "t5", "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
BASE |= {"relative_attention_num_buckets": 8, "n_positions": 512, "is_encoder_decoder": True}
SMALL = BASE | {"task_specific_params": {"summarization": {"num_beams": 4, "max_length": 200}}}
GATED = BASE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MT5 = GATED | {"model_type": "mt5", "tokenizer_class": "T5Tokenizer", "vocab_size": 512}
BYT5 = GATED | {"vocab_size": 384, "num_layers": 3, "num_decoder_layers": 1}
EFFICIENT = BASE | {"num_layers": 1, "num_decoder_layers": 3, "d_kv": 12, "num_heads": 3}
UMT5 = MT5 | {"model_type": "umt5", "scalable_attention": True, "is_gated_act": True}
ALL = ("spiece.model", "tokenizer.json", "tokenizer_config.json")
KINDS = {  # config.json, the file of the weights, the vocabulary, its files
    "t5-small": (SMALL, "stray", "t5", ALL),
    "t5-v1_1": (GATED, "bin", "t5", ALL[:1]),
    "flan": (GATED, "shards", "t5", ALL),
    "mt5": (MT5, "bin", "mt5", (ALL[0], ALL[2])),
    "byt5": (BYT5, "bin", "byt5", ALL[2:]),
    "t5-efficient": (EFFICIENT, "bin", "t5", ALL),
    "umt5": (UMT5, "bin", "umt5", ALL),
    "community": (BASE | {"tie_word_embeddings": False}, "safetensors", "t5", ALL[:1]),
}


# ------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """A folder that holds the files of each vocabulary, <kind>/<file>."""
    root = tmp_path_factory.mktemp("vocabularies")
    common = {"hard_vocab_limit": False, "minloglevel": 2, "pad_id": 0, "eos_id": 1}
    large = common | {"vocab_size": 330, "byte_fallback": True, "bos_id": -1, "unk_id": 2}
    kinds = {"t5": large | {"vocab_size": 90, "byte_fallback": False}}
    kinds["mt5"] = large | {"user_defined_symbols": [f"▁<extra_id_{i}>" for i in range(3)]}
    kinds["umt5"] = large | {"bos_id": 2, "unk_id": 3}
    for kind, settings in kinds.items():
        folder, listed = root / kind, {"tokenizer_class": "T5Tokenizer"}
        sentinels = [] if kind == "mt5" else [f"<extra_id_{i}>" for i in range(100)]
        listed |= {"extra_ids": len(sentinels), "additional_special_tokens": sentinels or None}
        listed |= {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        folder.mkdir()
        (folder / ALL[2]).write_text(json.dumps(listed))
        with open(folder / ALL[0], "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(TEXTS * 5), model_writer=file, **settings
            )
        tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["model"]["unk_id"] = settings["unk_id"]
        (folder / ALL[1]).write_text(json.dumps(content))
    of_bytes = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
    write(root / "byt5", ALL[2], json.dumps(of_bytes).encode())
    return root


def make_t5(config):
    """A T5 with random weights, its own head included."""
    torch.manual_seed(0)
    t5 = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**config)).eval()
    for name, weight in t5.named_parameters():
        if "relative" in name or "layer_norm" in name:
            nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    if config.get("tie_word_embeddings") is False:
        t5.lm_head.weight = nn.Parameter(torch.randn_like(t5.lm_head.weight) / 4)
        t5.config.tie_word_embeddings = False  # it means: no scale before the head
    return t5


def write_t5(folder, vocabularies, config, weights, vocabulary, names):
    """The folder of a checkpoint. Returns the T5 in it."""
    t5 = make_t5(config)
    t5.save_pretrained(folder, max_shard_size="100KB" if weights == "shards" else "1GB")
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    if weights == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(t5.state_dict(), folder / "pytorch_model.bin")
    if weights == "stray":
        unread = torch.randn(config["relative_attention_num_buckets"], config["num_heads"])
        break_weights(folder, lambda state: state.update({STRAY: unread}))
    for name in names:
        shutil.copy(vocabularies / vocabulary / name, folder)
    return t5


@pytest.fixture(scope="module")
def hub(tmp_path_factory, vocabularies):
    """hub(kind): the folder of a checkpoint and its T5, made once."""
    made, root = {}, tmp_path_factory.mktemp("hub")

    def make(kind):
        if kind not in made:
            made[kind] = root / kind, write_t5(root / kind, vocabularies, *KINDS[kind])
        return made[kind]

    return make


def saved_state(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def texts_of(corpus, tokenizer):
    rows = np.split(corpus.ids, corpus.offsets[1:-1])
    return [tokenizer.decode(row[:-1]) for row in rows]


def load(folder):
    torch.manual_seed(1)
    vae = T5VAE.from_t5(folder, latent_dim=5)
    nn.init.normal_(vae.w_proj.weight)
    return vae


def labels_of(vae, texts=TEXTS):
    return data.pad([[*row, 1] for row in data.tokenize(texts, vae.tokenizer)], 0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_kinds_of_the_hub(kind, hub, tmp_path):
    folder, t5 = hub(kind)
    vae = load(folder)
    theirs, (ids, mask), z = t5.state_dict(), labels_of(vae), torch.randn(len(TEXTS), 5)
    for name, weight in vae.t5.state_dict().items():
        name = name.replace("layer.1.o.", "layer.1.EncDecAttention.o.")
        assert torch.equal(weight, theirs.pop(name)), name
    for name in theirs:  # what one key makes useless, and no other weight, is lost
        assert re.search(r"^decoder.*\.layer\.1\.(layer_norm|EncDecAttention\.[qkv])\.", name), name
    logits = vae.decode(z, ids)
    torch.testing.assert_close(logits, literal(t5, vae.memory(z), ids), atol=1e-4, rtol=1e-4)
    assert (logits - literal(t5, vae.memory(z.flip(0)), ids)).abs().max() > 1e-2, "the control"
    hidden = t5.encoder(ids, mask).last_hidden_state.masked_fill(mask[:, :, None] == 0, -torch.inf)
    for attention in "eager", "sdpa":
        vae.t5.set_attn_implementation(attention)
        mu = vae.encode(ids, mask)[0]
        torch.testing.assert_close(mu, vae.w_mu(hidden.amax(1)), atol=1e-4, rtol=1e-4)
    unmasked = vae.encode(ids, torch.ones_like(mask))[0]
    assert (unmasked - mu).abs().max() > 1e-3, "the control"
    vae.save_pretrained(tmp_path)
    again = T5VAE.from_pretrained(tmp_path)
    assert torch.equal(again.decode(z, ids), vae.decode(z, ids))
    assert torch.equal(again.encode_texts(TEXTS)[0], vae.encode_texts(TEXTS)[0])
    assert again.decode_texts(mu, max_new_tokens=6) == vae.decode_texts(mu, max_new_tokens=6)


def break_weights(folder, change):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def break_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    data.write_json(folder / "config.json", config | changes)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_weights_are_float32_whatever_the_config_says(name, half, hub, tmp_path):
    """A T5 that was saved in half precision says so; its weights are read as they are."""
    folder, t5 = shutil.copytree(hub("t5-small")[0], tmp_path / "t5"), hub("t5-small")[1]
    break_config(folder, **{name: half})
    vae = load(folder)
    assert torch.equal(vae.t5.shared.weight, t5.shared.weight)
    assert {weight.dtype for weight in vae.parameters()} == {torch.float32}
    vae.save_pretrained(tmp_path / "vae")
    again = dict(T5VAE.from_pretrained(tmp_path / "vae").named_parameters())
    assert all(torch.equal(again[name], weight) for name, weight in vae.named_parameters())


@pytest.mark.parametrize(
    ("kind", "harm", "words"),
    [
        ("t5-small", lambda f: break_config(f, vocab_size=130), "130"),  # the tokenizer has more
        ("t5-small", lambda f: break_config(f, vocab_size=300), "shared.weight"),
        ("t5-small", lambda f: break_config(f, pad_token_id=3), "pad_token_id 3"),
        ("t5-small", lambda f: break_config(f, model_type="longt5"), "longt5 t5, mt5, umt5"),
        ("t5-small", lambda f: os.truncate(f / "model.safetensors", 20_000), ""),
        ("t5-v1_1", lambda f: os.truncate(f / "pytorch_model.bin", 20_000), ""),
        ("flan", lambda f: (f / SHARD).unlink(), SHARD),
        ("t5-small", lambda f: os.truncate(f / "config.json", 9), "config.json"),
        ("t5-small", lambda f: [(f / name).unlink() for name in ALL], "tokenizer"),
        ("t5-small", lambda f: break_weights(f, lambda weights: weights.pop(FFN)), FFN),
    ],
)
def test_broken_checkpoints_are_refused_by_name(kind, harm, words, hub, tmp_path):
    """By from_t5, and by train.py in one line before it writes anything."""
    folder = shutil.copytree(hub(kind)[0], tmp_path / "t5")
    harm(folder)
    with pytest.raises(InputError) as refused:
        load(folder)
    assert all(word in str(refused.value) for word in [str(folder), *words.split()])
    (tmp_path / "texts.txt").write_text("a king\n" * 3)
    flags = ["--dataset", tmp_path / "texts.txt", "--phase", 1, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--model", folder])
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def saved(hub, tmp_path):
    """The folder of a saved VAE."""
    load(hub("t5-small")[0]).save_pretrained(tmp_path / "old")
    return tmp_path / "old"


@pytest.mark.parametrize(
    ("harm", "lacks"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_text("version https://"), "model.safetensors"),
        (lambda f: break_weights(f, lambda w: w.pop("w_mu.weight")), "w_mu.weight"),
        (lambda f: break_weights(f, lambda w: w.update(w_logsd=torch.ones(1))), "w_logsd"),
        (lambda f: break_config(f, latent_dim=6), "w_logvar"),
        (lambda f: break_config(f, t5_config=BASE | {"model_type": "bart"}), "config"),
    ],
)
def test_folders_of_others_are_refused_by_name(saved, harm, lacks):
    T5VAE.from_pretrained(saved)
    harm(saved)
    with pytest.raises(InputError, match=f"^{saved} holds no T5VAE.*{re.escape(lacks)}"):
        T5VAE.from_pretrained(saved)


def test_runs_and_vaes_are_no_t5_and_their_parent_is_no_run(saved, whole_run, hub):
    with pytest.raises(InputError, match="is a T5; T5VAE.from_t5"):
        T5VAE.from_pretrained(hub("t5-small")[0])
    for folder in saved, whole_run, whole_run / "model":
        with pytest.raises(InputError, match=f"{folder} is no T5 .* a VAE: load it with T5VAE.fr"):
            T5VAE.from_t5(folder)
    for kind in T5VAE.from_t5, T5VAE.from_pretrained, metrics.load_run:
        with pytest.raises(InputError, match=f"holds runs; name one of them: {whole_run}$"):
            kind(whole_run.parent)
    shutil.copytree(whole_run, saved / "phase2")
    T5VAE.from_pretrained(saved)  # a model that holds its runs is a model
    shutil.rmtree(saved / "phase2" / "model")
    with pytest.raises(InputError, match="is a run without model/"):
        T5VAE.from_pretrained(saved / "phase2")


def test_the_hub_is_asked_for_possible_names_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot_download(repo_id, revision=None):
        asked.append((repo_id, revision))
        raise OSError("no network")

    monkeypatch.setattr(vae, "snapshot_download", snapshot_download)
    for name in "runs/poems/phase2", "~/t5", "/no/t5", "my poems", "C:\\poems", "../t5", "./t5":
        for kind in T5VAE.from_pretrained, T5VAE.from_t5:
            with pytest.raises(FileNotFoundError, match="no such run or folder$"):
                kind(name)
        for flag in "--model", "--init":
            with pytest.raises(SystemExit, match="no such run or folder"):
                train.main(["--dataset", "grammar", flag, name, "--phase", 1, "--out", tmp_path])
    assert asked == []
    assert "fetching" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"me/poems: no such run .* hub \(no network\)"):
        T5VAE.from_pretrained("me/poems", revision="v1")
    assert asked == [("me/poems", "v1")]
    for name in "me/poems", "/no/poems":
        with pytest.raises(TypeError, match="pooling"):
            T5VAE.from_pretrained(name, pooling="mean")
    assert len(asked) == 1, "before anything is fetched"


def test_generation_settings_of_the_checkpoint_do_not_stay(hub, tmp_path):
    folder = shutil.copytree(hub("t5-v1_1")[0], tmp_path / "t5")
    z, plain = torch.randn(4, 5), load(folder)
    settings = {"num_beams": 3, "repetition_penalty": 9.0, "eos_token_id": 1}
    settings = GenerationConfig(**settings, decoder_start_token_id=0)
    settings.save_pretrained(folder)
    assert torch.equal(load(folder).generate(z, 8), plain.generate(z, 8))
    before = plain.generate(z, 8)
    plain.t5.generation_config = settings
    assert not torch.equal(plain.generate(z, 8), before), "the control"


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


@pytest.mark.parametrize("own_head", [False, True])
@torch.no_grad()
def test_what_is_saved_is_the_model_as_it_is(own_head, tmp_path):
    model = T5VAE(tiny_config().to_dict() | {"tie_word_embeddings": not own_head}, 8).eval()
    nn.init.normal_(model.w_proj.weight)
    model.t5.resize_token_embeddings(70)
    model.pooling, model.pool_layers = "mean", "all"
    assert (model.t5.lm_head.weight is model.t5.shared.weight) != own_head
    nn.init.normal_(model.t5.lm_head.weight)
    model.save_pretrained(tmp_path)
    again = T5VAE.from_pretrained(tmp_path)
    ids, mask = random_texts(3, 9, vocab=70)
    assert torch.equal(again.encode(ids, mask)[0], model.encode(ids, mask)[0])
    assert torch.equal(again.decode(torch.ones(3, 8), ids), model.decode(torch.ones(3, 8), ids))
    half = T5VAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------ fp16


def overflowing(config):
    """A model whose activations reach 1e5 at each wo and, where it is gated, before it."""
    torch.manual_seed(0)
    tied = config.get("tie_word_embeddings", True)
    t5_config = AutoConfig.for_model(**config).to_dict() | {"tie_word_embeddings": tied}
    vae = T5VAE(t5_config, 5).eval()
    nn.init.normal_(vae.w_proj.weight)
    if not tied:
        nn.init.normal_(vae.t5.lm_head.weight, std=config["d_model"] ** -0.5)
    layers, seen = [m for m in vae.modules() if hasattr(m, "wo")], {}

    def note(wo, x, y):
        seen[wo] = x[0].abs().max(), y.abs().max()

    for layer in layers:
        layer.wo.register_forward_hook(note)
    ids, mask = data.pad([np.arange(3, 30), np.arange(40, 60)], 0)
    for _ in range(4):  # each wo changes what the next ones see
        with torch.no_grad():
            vae.rec(vae.encode(ids, mask)[0], ids)
        for layer in layers:
            before, after = seen[layer.wo]
            if hasattr(layer, "wi_0"):
                layer.wi_0.weight.data *= (1e5 / before) ** 0.5
                layer.wi_1.weight.data *= (1e5 / before) ** 0.5
            layer.wo.weight.data *= (before if hasattr(layer, "wi_0") else 1e5) / after
    assert 6.6e4 < max(map(max, seen.values())) < 1e6
    return vae, ids, mask


@pytest.mark.parametrize("config", [SMALL, GATED], ids=["plain", "gated"])
@torch.no_grad()
def test_fp16_reaches_as_far_as_a_pretrained_t5(config):
    vae, ids, mask = overflowing(config)
    z, names = vae.encode(ids, mask)[0], list(vae.state_dict())
    rec = vae.rec(z, ids)

    def half(dtype):
        with torch.autocast("cpu", dtype):
            return vae.rec(z, ids), *vae.encode(ids, mask)

    fp16, bf16 = half(torch.float16), half(torch.bfloat16)
    assert (fp16[0] - rec).abs().max() < 0.01
    assert torch.stack(fp16[1:]).isfinite().all()
    for module in vae.modules():  # as transformers makes it
        if isinstance(module, Float32Output):
            module.__class__ = nn.Linear
        if isinstance(getattr(module, "act", None), Float32Activation):
            module.act = module.act.activation
    assert list(vae.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(half(torch.bfloat16), bf16, strict=True))
    assert not half(torch.float16)[0].isfinite().all(), "the control"


def training(tmp_path, vae, *more):
    """A command that trains `vae` for 40 steps with fp16, and the folder of its run."""
    vae.tokenizer = data.train_tokenizer(TEXTS, 60)
    vae.save_pretrained(tmp_path / "vae")
    for split in data.SPLITS:
        (tmp_path / f"{split}.txt").write_text("\n".join(TEXTS * (20 if split == "train" else 1)))
    flags = ["--dataset", tmp_path, "--init", tmp_path / "vae", "--phase", 1, "--batch-size", 4]
    flags += ["--no-freeze-decoder", "--epochs", 2, "--log-every", 1, "--out", tmp_path]
    return [*flags, "--amp", "fp16", *more], tmp_path / "phase1"


def steps_of(run):
    return [record for record in log_records(run) if record["split"] == "train"]


def test_training_in_fp16(tmp_path):
    flags, run = training(tmp_path, overflowing(GATED)[0])
    assert train_run(main, *flags) == 0
    recs = [step["rec"] for step in steps_of(run)]
    assert len(recs) == 40
    assert np.mean(recs[20:]) < np.mean(recs[:20]), "an epoch and the one before it"
    assert sum("skipped_at_scale" in step for step in steps_of(run)) < 20, "few steps overflow"


def test_overflow_in_every_step_stops_with_advice_that_works(tmp_path):
    vae = T5VAE(AutoConfig.for_model(**SMALL).to_dict() | {"tie_word_embeddings": False}, 5)
    for name, weight in vae.named_parameters():
        weight.data *= 3e3 if "lm_head" in name else 1 if "norm" in name else 1e-2
    (flags, run), report = training(tmp_path, vae, "--save-every", 0), tmp_path / "report"
    assert train_run(main, *flags, report=report) == 1
    said = report.read_text().splitlines()
    assert [line[:9] for line in said if "--amp off" in line] == ["train.py:"]
    assert "Traceback" not in "".join(said)
    skipped = [(step["skipped_at_scale"], step["grad_norm"]) for step in steps_of(run)]
    assert skipped == [(2.0**i, None) for i in range(16, 0, -1)]
    flags[flags.index("fp16")] = "off"
    assert train_run(main, *flags, "--resume") == 0
    assert len(steps_of(run)) == 40


# ------------------------------------------------------------------------------- the Python API


def test_texts_in_and_out(hub):
    vae = load(hub("t5-small")[0])
    mu = vae.encode_texts(TEXTS)[0]
    for texts in iter(TEXTS), tuple(TEXTS), dict.fromkeys(TEXTS).keys(), np.array(TEXTS):
        assert torch.equal(vae.encode_texts(texts)[0], mu), "nothing is drawn"
    with pytest.raises(InputError, match=r"put it into a list: \['a king'\]"):
        vae.encode_texts("a king")
    with pytest.raises(InputError, match="texts is a set"):
        vae.encode_texts({"a", "b"})
    for texts in [None], ["a", 1], [b"a"], [["a"]], [float("nan")]:
        with pytest.raises(InputError, match="must be a str"):
            vae.encode_texts(texts)
    apart = vae.encode_texts(["a", "a </s>", "a <pad>", "a <extra_id_0>"])[0]
    assert torch.pdist(apart).min() > 1e-3
    assert [x.shape for x in vae.encode_texts([])] == [(0, 5)] * 2
    with pytest.warns(UserWarning, match="4 of 4 texts are cut at 2 tokens"):
        assert not torch.allclose(vae.encode_texts(TEXTS, max_length=2)[0], mu, atol=1e-3)
    for i, text in enumerate(TEXTS):  # the order stays, and a text does not feel its neighbors
        one = vae.encode_texts([text])[0][0]
        torch.testing.assert_close(vae.encode_texts(TEXTS, 3)[0][i], one, atol=1e-5, rtol=1e-4)
    written = vae.decode_texts(mu, max_new_tokens=5)
    for z in mu.numpy(), mu.double().numpy(), mu.tolist():
        assert vae.decode_texts(z, max_new_tokens=5) == written
    assert len(vae.decode_texts(mu, 3, num_return_sequences=2, do_sample=True, max_length=5)) == 8
    vae.tokenizer = None
    with pytest.raises(InputError, match="no tokenizer"):
        vae.encode_texts(["a king"])


def test_arguments_of_other_types_are_refused_by_name(hub, saved):
    vae = load(hub("t5-small")[0])
    corpus, config = data.make_corpus(TEXTS, vae.tokenizer), vae.t5.config.to_dict()
    z = torch.zeros(3)
    calls = [(T5VAE, (config, latent_dim), "latent_dim is") for latent_dim in (1.5, "a", None, -1)]
    calls += [(metrics.untemper, (z, z, w), "weight is") for w in ("1", None, z, torch.ones(()))]
    calls += [(data.make_corpus, (TEXTS, tokenizer), "tokenizer is") for tokenizer in (None, "t5")]
    nothing = data.make_corpus([], vae.tokenizer, allow_empty=True)
    for measure in metrics.evaluate, metrics.find_weight:
        calls.append((measure, (vae, TEXTS), r"corpus is a list; make it with data.make_c"))
        calls.append((measure, (vae, nothing), "corpus is empty"))
        for name, wrong in ("seed", -1), ("seed", 2**32), ("max_tokens", 0), ("max_tokens", None):
            calls.append((partial(measure, **{name: wrong}), (vae, corpus), f"{name} is {wrong}"))
    calls.append((metrics.evaluate, (vae, corpus, 1, -1), "iw_samples is -1"))
    calls.append((metrics.evaluate, (vae, corpus, 0.5), "weight is 0.5, which has no effect"))
    calls.append((metrics.find_weight, (vae, corpus, 0), "texts is 0"))
    for wrong in 0, -3:
        arguments = ("grammar", "train", vae.tokenizer)
        calls.append((partial(data.load_corpus, limit=wrong), arguments, f"limit is {wrong}"))
    for wrong in "bfloat16", int, "auto", torch.float8_e4m3fn:
        calls.append((T5VAE.from_pretrained, (saved, wrong), "dtype is .*torch.bfloat16"))
    for call, arguments, said in calls:
        with pytest.raises(InputError, match=f"^{said}[^\n]*$"):
            call(*arguments)
    with pytest.raises(InputError, match="texts is None; it must be an iterable of str"):
        data.make_corpus(None, vae.tokenizer)
    assert vae.encode_texts(TEXTS, np.int64(2))[0].shape == (len(TEXTS), 5)


def test_texts_that_no_vocabulary_has_are_told(hub):
    vae = load(hub("t5-small")[0])
    with pytest.warns(UserWarning, match="2 of 3 texts have characters outside the vocabulary"):
        apart = vae.encode_texts(["Привет", "Добрый день <unk>", "the <unk> king"])[0]
    assert len(apart) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vae.encode_texts(["the <unk> king", "<unk> <unk>"])


def test_encoding_and_decoding_evaluate_whatever_the_mode():
    model = tiny_vae(dropout_rate=0.5).train()
    model.tokenizer = data.train_tokenizer(TEXTS * 3, 60)
    (mu, _), again = model.encode_texts(TEXTS[:2]), model.encode_texts(TEXTS[:2])
    assert torch.equal(again[0], mu)
    three = [model.decode_texts(mu, max_new_tokens=8) for _ in range(3)]
    assert three[0] == three[1] == three[2]
    assert all(module.training for module in model.modules())
    with pytest.raises(InputError):
        model.encode_texts([3])
    assert model.training
    model.eval().encode_texts(TEXTS)
    assert not any(module.training for module in model.modules())


def test_texts_are_encoded_with_their_like(hub, monkeypatch):
    vae, encode, padding = load(hub("t5-small")[0]), T5VAE.encode, []

    def encoded(self, ids, mask):
        padding.append((mask == 0).sum().item())
        return encode(self, ids, mask)

    texts = ["a" + " king" * (i % 7) for i in range(230)]
    alone = torch.cat([vae.encode_texts([text])[0] for text in texts[:7]])
    monkeypatch.setattr(T5VAE, "encode", encoded)
    mu, _ = vae.encode_texts(iter(texts), batch_size=2, max_length=40)
    assert sum(padding) < 40, "of 230 texts in their order: about 300"
    torch.testing.assert_close(mu, alone[torch.arange(230) % 7], atol=1e-5, rtol=1e-4)
    empty, _ = vae.encode_texts(["", " ", "a king"])
    assert torch.equal(empty[0], empty[1])
    assert not torch.allclose(empty[0], empty[2], atol=1e-3)


REPLACING = ["inputs", "input_ids", "inputs_embeds", "encoder_outputs", "past_key_values"]
REPLACING += ["decoder_input_ids", "decoder_inputs_embeds", "encoder_hidden_states", "cache"]


def test_latents_that_are_no_numbers_are_refused_and_outputs_may_be_dicts(hub):
    vae, z, four = load(hub("t5-small")[0]), torch.zeros(3, 5), {"max_new_tokens": 4}
    for decode in vae.generate, vae.decode_texts:
        for value in math.nan, -math.inf, 1e300:  # the last one in float32
            with pytest.raises(InputError, match=r"z\[2\] has a number that is not finite"):
                decode(torch.tensor([[0.0] * 5] * 2 + [[value] * 5], dtype=torch.float64))
        for wrong in z[0], z[:, :3], z[None], z + 1j, torch.zeros(0, 3):
            with pytest.raises(InputError, match=r"it must be \(N, 5\)"):
                decode(wrong)
        for wrong in None, "z", [[1.0], [1.0, 2.0]], ["a"]:
            with pytest.raises(InputError, match="z is no tensor of numbers"):
                decode(wrong)
        for name in REPLACING:
            with pytest.raises(InputError, match=f"generate takes no {name}"):
                decode(z, **{name: torch.zeros(3, 1, 32)})
        assert len(decode(z.long(), **four)) == len(decode(z.tolist(), **four)) == 3
    assert vae.decode_texts(z[:0]) == []
    with pytest.raises(InputError, match="z has no row"):
        vae.generate(z[:0])
    more = {"return_dict_in_generate": True, "output_scores": True}
    assert vae.decode_texts(z, **four, **more) == vae.decode_texts(z, **four)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, hub):
    vae = load(hub("flan")[0])
    mu = vae.encode_texts(TEXTS)[0]
    vae = vae.half() if dtype == torch.float16 else vae.bfloat16()
    torch.testing.assert_close(vae.encode_texts(TEXTS)[0], mu, atol=0.15, rtol=0.1)
    assert len(vae.decode_texts(mu, max_new_tokens=5)) == len(TEXTS)
    assert vae.rec(mu, labels_of(vae)[0]).isfinite().all()


def test_generate_takes_what_transformers_documents(hub):
    vae, z = load(hub("t5-small")[0]), torch.randn(3, 5)
    for flags in {"max_length": 5}, {"max_new_tokens": 4}:
        assert vae.generate(z, **flags, eos_token_id=255).shape == (3, 5)
        assert vae.generate(z, generation_config=GenerationConfig(**flags)).shape == (3, 5)
        config = GenerationConfig(eos_token_id=255)
        assert vae.generate(z, generation_config=config, **flags).shape == (3, 5)
    assert vae.generate(z, generation_config=config).shape == vae.generate(z).shape == (3, 257)
    four = {"max_new_tokens": 4, "eos_token_id": 255}
    assert vae.generate(z, do_sample=True, num_return_sequences=2, **four).shape == (6, 5)
    greedy = vae.generate(z, **four)
    for flags in {"top_k": 1, "do_sample": True}, {"top_p": 1e-6, "do_sample": True}:
        assert torch.equal(vae.generate(z, **four, **flags), greedy)
    with pytest.raises(ValueError, match="max_tokens"):
        vae.generate(z, max_tokens=4)
    with pytest.raises(data.InputError, match="generate takes no cache_implementation"):
        vae.generate(z, cache_implementation="static")
    vae.t5.generation_config.max_new_tokens = 4
    assert vae.generate(z, eos_token_id=255).shape == (3, 5)
    assert vae.generate(z, max_new_tokens=3, eos_token_id=255).shape == (3, 4)


def test_the_cache_may_be_off_wherever_that_is_said():
    model = tiny_vae()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    z, off = torch.randn(9, 8), {"use_cache": False}
    greedy = model.generate(z, 20)
    of_config = {"generation_config": GenerationConfig(**off)}
    others = {"use_cache": 0}, {"use_cache": None}, of_config, of_config | {"use_cache": True}
    for flags in off, *others:
        assert torch.equal(model.generate(z, 20, **flags), greedy), flags
    own, of_memory = transformers.DynamicCache(), transformers.DynamicCache()
    cache = {vae.CACHE: transformers.EncoderDecoderCache(own, of_memory)}
    memory = vae.BaseModelOutput(model.memory(z))
    wrong = model.t5.generate(encoder_outputs=memory, max_new_tokens=20, **cache, **off)
    assert wrong.shape != greedy.shape or not torch.equal(wrong, greedy), "the control"
    model.t5.generation_config.use_cache = False  # that of a checkpoint
    for flags in {}, {"use_cache": True}:
        assert torch.equal(model.generate(z, 20, **flags), greedy), flags


def test_sampling_draws_from_the_whole_distribution(hub):
    vae = load(hub("t5-small")[0])
    vae.t5.lm_head.weight = nn.Parameter(1e-4 * torch.randn(256, 32))  # nearly flat
    one, configured = {"max_new_tokens": 1}, GenerationConfig(do_sample=True, max_new_tokens=1)
    for flags, most in [
        ({"do_sample": True} | one, 256),
        ({"do_sample": True, "generation_config": GenerationConfig(**one)}, 256),
        ({"generation_config": configured}, 256),
        ({"do_sample": True, "top_k": 50} | one, 50),
        ({"generation_config": GenerationConfig(do_sample=True, top_k=50, **one)}, 50),
    ]:
        assert most - 6 < len(vae.generate(torch.zeros(3000, 5), **flags)[:, 1].unique()) <= most
    for top_k, most in (None, 256), (50, 50):  # of the T5's own settings
        own = {"do_sample": True, "top_k": top_k, "decoder_start_token_id": 0}
        vae.t5.generation_config = GenerationConfig(**own)
        assert most - 6 < len(vae.generate(torch.zeros(3000, 5), **one)[:, 1].unique()) <= most


@pytest.mark.parametrize("kind", ["tiny", "t5-small", "mt5", "umt5", "byt5"])
def test_text_is_text(kind, hub, tmp_path):
    if kind == "tiny":
        tokenizer = data.train_tokenizer([*TEXTS, "</s> <pad> <extra_id_10>"] * 3, 90)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(hub(kind)[0])
    rows, unk = data.tokenize(MARKED, tokenizer), tokenizer.unk_token_id
    for row in rows:
        assert (set(tokenizer.all_special_ids) - {unk}).isdisjoint(row)
    assert data.detokenize(rows, tokenizer) == MARKED
    ptb = data.tokenize(["king <unk> a"], tokenizer)
    assert ptb[0].count(unk) == 1
    assert data.detokenize(ptb, tokenizer) == ["king <unk> a"]
    (tmp_path / "train.txt").write_text("\n".join(MARKED))
    corpus = data.load_corpus(str(tmp_path), "train", tokenizer)
    assert [corpus.row(i).tolist() for i in range(len(rows))] == [[*row, 1] for row in rows]


def test_the_unknown_token_is_no_regular_expression():
    tokenizer = transformers.ByT5Tokenizer(unk_token="<|unk|>")
    assert data.detokenize(data.tokenize(["a < b"], tokenizer), tokenizer) == ["a < b"]


KING = transformers.AddedToken("king", single_word=True)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("added", "texts", "counts"),
    [
        (["<CITY>", "[sep]", "qq7"], ["the <CITY> king", "[sep] </s> <CITY> qq7 <pad>"], [1, 3]),
        (["qq7", "qq77"], ["the qq77 king", "</s> qq77"], [1, 1]),  # one begins as the other
        ([KING], ["the kings paint the king", "</s> the kings paint the king"], [1, 1]),
    ],
)
def test_tokens_that_a_user_added_stay_one_token(added, texts, counts, special, hub):
    """Beside `</s>`, too, which is text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub("t5-small")[0])
    tokenizer.add_tokens(added, special_tokens=special)
    rows = data.tokenize(texts, tokenizer)
    ids = tokenizer.convert_tokens_to_ids([str(token) for token in added])
    assert [sum(token in ids for token in row) for row in rows] == counts
    assert set(data.own_tokens(tokenizer)).isdisjoint(sum(rows, []))
    assert data.detokenize(rows, tokenizer) == texts
    rows = [[tokenizer.eos_token_id, 0, *row, 1, 0, 0] for row in rows]
    assert data.detokenize(rows, tokenizer) == texts


def test_a_vocabulary_of_bytes_needs_no_unknown_token():
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    own = {"special_tokens": ["<pad>", "</s>"], "initial_alphabet": letters}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False, **own)
    bpe.train_from_iterator(TEXTS, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>"
    )
    assert data.detokenize(data.tokenize(MARKED, tokenizer), tokenizer) == MARKED
    assert data.make_corpus(MARKED, tokenizer).unknown == 0


def test_no_dropout_comes_right_before_pooling():
    vae = tiny_vae(dropout_rate=0.5).train()
    ids, mask = random_texts(3, 9)
    once, again = vae.encode(ids, mask)[0], vae.encode(ids, mask)[0]
    assert not torch.equal(once, again), "the control: dropout elsewhere"
    vae.t5.encoder.block.eval()
    assert torch.equal(vae.encode(ids, mask)[0], vae.encode(ids, mask)[0])


def test_what_is_exponentiated_is_float32_under_autocast():
    model = tiny_vae()
    ids, mask = random_texts(8, 12)
    eps = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    batch = data.Batch(ids, mask, ids, torch.arange(8), eps, 8, 8)
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch)
        mu, logvar = model.encode(ids, mask)
        logits = model.decode(mu, ids)
    assert logits.dtype == torch.bfloat16, "the control: autocast is on"
    assert {t.dtype for t in (mu, logvar, *half)} == {torch.float32}
    assert not torch.equal(mu, mu.bfloat16().float()), "mu is not a rounded number"
    for ours, value in zip(half, exact, strict=True):
        torch.testing.assert_close(ours, value, rtol=0.05, atol=0.2)


# ----------------------------------------------------------------------------- hub and downloads


def test_a_hub_that_breaks_off_ends_in_one_line(hub, home, tmp_path, monkeypatch, capsys):
    """What is fetched is said at once, and the tokenizer is looked at before the weights."""
    fetched, kinds = [], (vae.AutoConfig, vae.AutoTokenizer)
    for kind, part in [(kind, kind.from_pretrained(hub("flan")[0])) for kind in kinds]:

        def give(name, part=part):
            fetched.append(part)
            return part

        monkeypatch.setattr(kind, "from_pretrained", give)

    def break_off(name, **settings):
        assert len(fetched) == 2
        raise ConnectionError("connection lost\nafter 20,000 bytes")

    monkeypatch.setattr(AutoModelForSeq2SeqLM, "from_pretrained", break_off)
    flags = ["--dataset", home, "--phase", 1, "--model", "me/my-t5", "--out", tmp_path / "out"]
    said = "me/my-t5 .*connection lost after 20,000 bytes[)]; without a network"
    with pytest.raises(SystemExit, match=said):
        train.main(flags)
    assert capsys.readouterr().out == "fetching me/my-t5 from the hub, unless it is in the cache\n"
    assert not (tmp_path / "out").exists()


SENT = b"a king paints\n" * 9000
CHECKSUMS = [hashlib.sha256(SENT), hashlib.sha1(b"blob %d\0" % len(SENT) + SENT)]


@pytest.mark.parametrize("right", CHECKSUMS, ids=["sha256", "blob"])
def test_a_download_is_whole_and_checked_or_leaves_nothing(monkeypatch, tmp_path, right, capsys):
    served, url = tmp_path / "valid.txt", f"file://{tmp_path}/{{split}}.txt"

    def fetch():
        monkeypatch.setitem(data.SOURCES, "ptb", (url, *[right.hexdigest()] * 3))
        return data.split_path("ptb", "valid", tmp_path / "data")

    served.write_bytes(SENT)
    path = fetch()
    assert path.read_bytes() == SENT
    assert "docs/data.md" in capsys.readouterr().out
    served.unlink()
    assert fetch() == path, "what is there is not fetched again"
    path.unlink()
    for content, reason in (None, "No such file"), (SENT[:4000], "checksum"):
        if content:
            served.write_bytes(content)
        with pytest.raises(FileNotFoundError, match=reason) as error:
            fetch()
        assert "\n" not in str(error.value)
        assert "--data-dir" in str(error.value)
        assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_sources_are_pinned():
    for url, *checksums in data.SOURCES.values():
        assert re.search(r"/[0-9a-f]{40}/.*\{split\}", url), url
        assert {len(bytes.fromhex(checksum)) for checksum in checksums} <= {32, 20}
        assert len(checksums) == len(data.SPLITS)


# ------------------------------------------------------------------------------------------ data


def test_own_directory(data_tokenizer, tmp_path):
    own = write(tmp_path, content=b"a king\n\n  a queen \n\n")
    write(tmp_path, "ptb.valid.txt")
    corpus = data.load_corpus(own, "train", data_tokenizer)
    assert texts_of(corpus, data_tokenizer) == ["a king", "a queen"]
    assert (corpus.skipped, corpus.truncated, corpus.words.tolist()) == (2, 0, [3, 3])
    with pytest.raises(FileNotFoundError, match=r"no valid.txt in .*" + tmp_path.name):
        data.load_corpus(own, "valid", data_tokenizer)
    one = data.load_corpus(own, "train", data_tokenizer, limit=1)
    assert texts_of(one, data_tokenizer) == ["a king"]
    write(tmp_path / "ptb", "ptb.valid.txt")
    assert data.split_path("ptb", "valid", tmp_path).name == "ptb.valid.txt"
    write(tmp_path, "snli")
    with pytest.raises(InputError, match="snli is a file; it must be the folder"):
        data.split_path("snli", "test", tmp_path)
    for dataset in "grammar", own, "ptb":
        with pytest.raises(InputError, match="^split is 'dev'; .* train, valid, test$"):
            list(data.read_texts(dataset, "dev", tmp_path))


RETURN = r"has \\r in its middle"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"\n\r\n   \n", ": no text"),
        ("empty.txt", b"\xef\xbb\xbf", ": no text"),
        ("latin.txt", b"good\n\ncaf\xe9 bad\n", ", line 3, byte 4: not UTF-8"),
        ("utf16.txt", "text".encode("utf-16"), ", line 1, byte 1: not UTF-8"),
        ("utf16.txt", "a king\na queen\n".encode("utf-16-le"), ", line 1, byte 2: not UTF-8"),
        ("mark.txt", "\ufeffab".encode() + b"\xc3\n", ", line 1, byte 6: not UTF-8"),
        ("zero.txt", b"a king\nb\0c\n", ", line 2, byte 2: not UTF-8, or a zero byte"),
        ("mac.txt", b"a king\ra queen\r", f", line 1: {RETURN}"),
        ("mac.txt", b"a king\ra queen", f", line 1: {RETURN}"),
        ("mac.txt", b"\xef\xbb\xbfa king\r\ra queen\r", f", line 1: {RETURN}"),
        ("mac.txt", b"a king\n" + b"\r".join([b"a queen"] * 40) + b"\n", f", line 2: {RETURN}"),
        ("lines.txt", b'[\n  {"text": "a king"}\n]\n', " has JSON lines.*docs/own-text.md"),
        ("lines.txt", b'\n{"text": "a king", "stars": 4}\n', " has JSON lines.*docs/own-text.md"),
        ("texts.tsv", b"a king\t1\n", " is a table.*docs/own-text.md"),
        ("texts.ndjson", b'{"text": "a king"}\n', " is a table.*docs/own-text.md"),
        ("TEXTS.CSV", b"id,text\n1,a king\n", " is a table.*docs/own-text.md"),
    ],
)
def test_a_file_without_a_text_per_line_is_refused(name, content, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, name, content)
    with pytest.raises(SystemExit, match=f"^train.py: {name}{said}[^\n]*$"):
        train.main(["--dataset", name, "--model", "tiny", "--phase", "1"])
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing is written"


def test_what_only_begins_or_ends_like_another_format_is_text(tmp_path):
    content = b'["Hello," she said.] It rained.\n{"quoted"} braces\n' + b"[" * 100_000
    assert len(list(data.read_texts(write(tmp_path, content=content), "train"))) == 3
    one_file, lines = tmp_path / "one.txt", [f"text {i}" for i in range(100)]
    one_file.write_text("\n".join(["a king", "[]", "{}", *lines]))  # the first text decides
    found = [text for split in data.SPLITS for text in data.read_texts(str(one_file), split)]
    assert sorted(found) == sorted(["a king", "[]", "{}", *lines])
    for content in b"a king", b"a king\r", b"a king\r\n", b"a\rking\n":
        assert len(list(data.read_texts(write(tmp_path, content=content), "train"))) == 1


def test_a_vocabulary_of_few_pieces_loads(tmp_path):
    vae = tiny_vae(vocab_size=200)
    vae.tokenizer = data.train_tokenizer(["yes", "no", "yes no"] * 20, 50)
    vae.save_pretrained(tmp_path)
    assert T5VAE.from_pretrained(tmp_path).encode_texts(["no"])[0].shape == (1, 8)


def test_a_full_disk_is_named_where_torch_hides_it(tmp_path):
    def write_checkpoint(file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(OSError, match="No space left on device"):
        data.write_atomically(tmp_path / "checkpoint.pt", write_checkpoint)


def test_marks_and_returns_of_other_systems_are_no_text(data_tokenizer, tmp_path):
    content = "\ufeffa king\r\r\na \ufeffqueen\r\r\n\r\r\nold\rking\u2028here\x0c\r\r\n".encode()
    texts = ["a king", "a \ufeffqueen", "", "old\rking\u2028here"]
    assert list(data.read_texts(write(tmp_path, content=content), "train")) == texts
    corpus = data.load_corpus(str(tmp_path), "train", data_tokenizer)
    assert (corpus.skipped, len(corpus)) == (1, 3)
    assert texts_of(corpus, data_tokenizer)[2] == "old king here"


def test_a_vocabulary_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 5"):
        data.train_tokenizer(["a king paints"], 5)
    with pytest.raises(ValueError, match="vocab_size is 100"):
        data.train_tokenizer([], 100)


def test_tiny_names_the_remedy_for_texts_of_too_many_letters(tmp_path):
    letters = [chr(0x4E00 + i) for i in range(5000)]
    texts = "\n".join("".join(letters[i : i + 10]) for i in range(0, 5000, 10))
    for split in data.SPLITS:
        (tmp_path / f"{split}.txt").write_text(texts, encoding="utf-8")
    said = "--model tiny: vocab_size is 4000.* 5,000 different letters.*README.md names"
    with pytest.raises(SystemExit, match=said):
        train.main(["--dataset", tmp_path, "--model", "tiny", "--out", tmp_path / "run"])


def test_unknown_letters_are_no_words_of_a_cut_text(data_tokenizer):
    """As of one that is not cut. A text that writes <unk> has it as a word."""
    for text in "the kïng the kïng", "the k<unk>", "the <unk> king the":
        whole = data.make_corpus([text], data_tokenizer)
        length = len(whole.row(0))
        longer = data.make_corpus([text + " the" * 9], data_tokenizer, length)
        assert longer.truncated == 1
        assert np.array_equal(longer.row(0), whole.row(0))
        expected = text if "ï" in text else data.detokenize([whole.row(0)], data_tokenizer)[0]
        assert longer.words.tolist() == [len(expected.split()) + 1]


def test_overlong_lines_are_cut_and_counted(data_tokenizer, tmp_path):
    long = b"the old king paints a red boat " * 5000
    own = write(tmp_path, content=b"a king paints\n" + long + b"\na queen\n")
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
    ends_unknown = ["the old king paints a red boat " * 3 + "\u0416"]
    cut, whole = (data.make_corpus(ends_unknown, data_tokenizer, length) for length in (16, 256))
    assert (cut.truncated, cut.unknown, whole.unknown) == (1, 0, 1), "what is read counts"
    written_behind = ["the \u0416 king" + " <unk>" * 20]  # hides no letter before the cut
    cut, whole = (data.make_corpus(written_behind, data_tokenizer, n) for n in (8, 256))
    assert (cut.truncated, cut.unknown, whole.unknown) == (1, 1, 1)


def test_one_file_is_split_by_its_texts(tmp_path):
    lines = [f"text {i % 3000}" for i in range(4000)]  # a quarter of them twice
    (tmp_path / "all.txt").write_text("\n".join(lines))
    one = str(tmp_path / "all.txt")
    parts = {split: list(data.read_texts(one, split)) for split in data.SPLITS}
    assert sorted(sum(parts.values(), [])) == sorted(lines)
    shares = [len(set(part)) / 3000 for part in parts.values()]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.02)
    assert not set(parts["train"]) & set(parts["test"])  # the same text twice is in the same split
    (tmp_path / "all.txt").write_text("\n".join(reversed(lines)))
    assert set(data.read_texts(one, "test")) == set(parts["test"])  # whatever the order
    for text in parts["test"]:
        spaced = text.replace(" ", "  "), text.replace(" ", "\t"), f" {text}", text + "\u00a0"
        assert {data.split_of(other) for other in spaced} == {"test"}
    (tmp_path / "all.txt").write_text("one text")
    with pytest.raises(ValueError, match="all.txt: no text for '(valid|test)'"):
        [list(data.read_texts(one, split)) for split in data.SPLITS]


def test_yelp_loses_its_labels_and_other_texts_keep_their_tabs(tmp_path):
    for name in ("yelp", "ptb"):
        write(tmp_path / name, "train.txt", b"4\tgood food\nno label\n5\t\n")
    assert list(data.read_texts("yelp", "train", tmp_path)) == ["good food", "no label", ""]
    assert list(data.read_texts("ptb", "train", tmp_path)) == ["4\tgood food", "no label", "5"]


LETTERS = ["\u0250", "\u0298", "".join(map(chr, range(0x250, 0x2B0)))]  # they could mark a word
LETTERS = [[f"an old king{x[-1]}", f"the king {' '.join(x)}", "the old king"] for x in LETTERS]
SYMBOLS = ["\u2585", "\u2581", "\0", "\t", "<unk>"]  # of the trainer
LIKE_TOKENS = ["<s> the red dog runs home . </s>", "a <pad> of qua", "if x<y or y>z"]
LONG = "the old king paints a red boat " * 300


@pytest.mark.parametrize(
    ("texts", "known"),
    [
        *[(texts, texts) for texts in [*LETTERS, LIKE_TOKENS]],
        *[([f"zebra {x} quartz{x}", "the old king"], ["zebra quartz"]) for x in SYMBOLS],
        ([f"{LONG}{i}" for i in range(9)], [f"{LONG}7"]),
    ],
)
def test_a_vocabulary_has_all_letters_and_words_of_its_texts(texts, known):
    tokenizer = data.train_tokenizer(texts * 5, 400)
    rows = data.tokenize(known, tokenizer)
    assert data.make_corpus(known, tokenizer, 10_000).unknown == 0
    assert data.detokenize(rows, tokenizer) == known
    if "the old king" in texts:
        assert tokenizer.tokenize("the old king") == ["\u2581the", "\u2581old", "\u2581king"]


def test_epochs_are_whole_random_and_waste_little():
    """With as many lengths as PTB has training texts, and their mean, 28."""
    lengths = np.random.default_rng(0).gamma(5.5, 5.1, 42_068).astype(int).clip(2, 133)
    world = 4
    first = data.epoch_order(lengths, 32, seed=0, epoch=0)
    shares = [index[rank::world] for index in first for rank in range(world) if len(index) > rank]
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(len(lengths)))
    waste = 1 - lengths.sum() / sum(len(share) * lengths[share].max() for share in shares)
    assert waste <= 0.05, f"{waste:.2%} of positions are padding"
    order = np.random.default_rng(0).permutation(len(lengths))
    parts = np.array_split(order, len(lengths) // 32)
    unsorted = 1 - lengths.sum() / sum(32 * lengths[part].max() for part in parts)
    assert unsorted > 0.2, "what the buckets spare"
    again = data.epoch_order(lengths, 32, seed=0, epoch=1)
    together = {tuple(sorted(batch)) for batch in first} & {tuple(sorted(batch)) for batch in again}
    assert len(together) < 0.01 * len(first)  # other company in the next epoch
    means = np.array([lengths[batch].mean() for batch in first])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1  # short and long batches come mixed
    repeat = data.epoch_order(lengths, 32, seed=0, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(first, repeat, strict=True))


def test_prefetch_keeps_the_order_works_ahead_and_passes_errors_on():
    ahead = threading.Event()
    results = data.prefetch(lambda i: (i == 2 and ahead.set()) or 10 // i, [5, 2, 1, 0])
    assert next(results) == 2
    assert ahead.wait(60), "the second item, while nobody asks for it"
    assert [next(results), next(results)] == [5, 10]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(data.prefetch(str, [])) == []


def test_a_training_batch_holds_the_noise_of_its_texts(data_tokenizer):
    corpus = data.load_corpus("grammar", "train", data_tokenizer, limit=9)
    settings = {"denoise": 0.4, "latent_dim": 3, "seed": 5}
    batch = data.training_batch(corpus, 2, np.array([8, 0, 4]), **settings)
    assert torch.equal(batch.eps, data.latent_noise(3, 5, 2, [8, 0, 4], data.LATENT)[0])
    for i, labels, ids in zip([8, 0, 4], batch.labels, batch.ids, strict=True):
        assert labels[labels != PAD].tolist() == corpus.row(i).tolist(), "the target stays whole"
        assert len(ids[ids != PAD]) < len(corpus.row(i))
    one = data.make_batch(corpus, np.array([8, 0, 4]))
    assert torch.equal(one.ids, one.labels)
    assert torch.equal(one.labels, batch.labels)


# ------------------------------------------------------------------------------- kills and damage


def test_flags_of_phase_2_do_not_change_phase_1(tmp_path, home):
    """Nor a language model: so either is resumed whatever the KL of phase 2 is to be."""
    flags = ["--dataset", home, *TINY, *SHORT, "--epochs", 0, "--out", tmp_path]
    kl = ["--kl-schedule", "cyclical", "--kl-threshold", 3, "--kl-cycles", 2, "--kl-rise", 0.1]
    train.main([*flags, *kl])
    for more in ["--phase", 1], kl:
        train.main([*flags, "--resume", *more])
    with pytest.raises(SystemExit, match="phase2: kl_anneal_epochs was 0.0, not 50.0"):
        train.main([*flags, "--resume"])


def test_a_reset_of_tiny_makes_the_vocabulary_of_phase_1(tmp_path, home):
    flags = ["--dataset", home, *TINY, *SHORT, "--epochs", 0, "--out", tmp_path]
    train.main([*flags, "--phase", 1, "--limit", 12])
    train.main([*flags, "--phase", 2, "--reset-decoder"])  # with all texts


def interrupt():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
    send(signal.SIGINT)


def test_ctrl_c_names_resume_in_one_line(tmp_path, command):
    report, flags = tmp_path / "report", [*command, "--out", tmp_path]
    assert train_run(cut, 7, "seed_dropout", interrupt, *flags, report=report) == 130
    assert report.read_text().count("\n") == 2  # one is for the terminal's ^C
    assert "--resume" in report.read_text()


def test_a_log_that_is_ahead_of_its_checkpoint_is_cut(tmp_path, command, whole_run):
    """No checkpoint until the epoch's end at step 5: a kill in step 5 leaves a record of step 3."""
    flags = [*command, "--out", tmp_path, "--resume"]
    for calls in 5, 9:
        assert train_run(cut, calls, "seed_dropout", KILL, *flags) == -signal.SIGKILL
    assert saved_state(tmp_path / "phase2")["step"] == 5
    assert train_run(main, *flags) == 0
    assert same_run(tmp_path / "phase2", whole_run)


def test_what_a_finished_run_says(tmp_path, command, whole_run, capsys):
    run = shutil.copytree(whole_run, tmp_path / "phase2")
    again, before = [*command, "--out", tmp_path, "--resume"], files(run)
    with pytest.raises(SystemExit, match="lr was 0.001, not 0.1"):
        train.main([*again, "--lr", 0.1])
    for name, value in ("limit", 3), ("max_length", 3):  # other tokens: the cause is named
        with pytest.raises(SystemExit, match=f"{name} was .*, not {value}"):
            train.main([*again, "--" + name.replace("_", "-"), value])
    capsys.readouterr()
    incidental = "--iw-samples", 5, "--micro-batch", 2, "--log-every", 7, "--amp", "bf16"
    train.main([*again, *incidental])  # nothing to do
    said = capsys.readouterr().out
    assert said.endswith(f"{run} is finished; python metrics.py {run} measures it again\n")
    assert files(run) == before
    (run / "metrics.json").rename(tmp_path / "metrics.json")
    with pytest.raises(SystemExit, match=f"{run} has a model/, but neither metrics.json nor"):
        train.main(again)
    (tmp_path / "metrics.json").rename(run / "metrics.json")
    assert files(run) == before
    (run / "model").rename(tmp_path / "elsewhere")
    (run / "checkpoint.pt").touch()
    with pytest.raises(SystemExit, match=f"{run} is finished, but its model/ is gone"):
        train.main(again)
    assert (run / "checkpoint.pt").exists(), "the last copy of the weights"


def test_a_model_is_not_saved_into_a_run(whole_run, tmp_path):
    """Neither in a finished one, nor in one that is under way."""
    model = T5VAE.from_pretrained(whole_run)
    finished = shutil.copytree(whole_run, tmp_path / "finished")
    (tmp_path / "begun").mkdir()
    shutil.copy(whole_run / "config.json", tmp_path / "begun")
    for run in finished, tmp_path / "begun":
        before = files(run)
        with pytest.raises(InputError, match=f"{run} is a run: save the model in a folder of its"):
            model.save_pretrained(run)
        assert files(run) == before
    model.save_pretrained(finished / "model")
    weights = Path("model", "model.safetensors")
    assert (finished / weights).read_bytes() == (whole_run / weights).read_bytes()


def test_a_t5_that_cannot_be_had_is_not_blamed(tmp_path):
    """A folder with foreign files is."""

    class Missing:
        @staticmethod
        def from_pretrained(name):
            raise OSError("no route")

    with pytest.raises(InputError, match="t5-small is no folder, nor available .*no route.*tiny"):
        vae.load(Missing, "t5-small")
    with pytest.raises(InputError, match="is no T5 to start from: no route"):
        vae.load(Missing, str(tmp_path))


def test_numbers_of_numpy_are_saved(tmp_path):
    T5VAE(tiny_config().to_dict(), np.int64(3)).save_pretrained(tmp_path)
    assert T5VAE.from_pretrained(tmp_path).latent_dim == 3
    with pytest.raises(InputError, match="latent_dim is True; it must be a whole number"):
        T5VAE(tiny_config().to_dict(), True)


def test_files_of_others_are_never_touched(tmp_path):
    write(tmp_path / "phase1" / "model", "model.safetensors", b"somebody's T5")
    flags = ["--dataset", "grammar", "--model", "tiny", "--phase", 1, "--out", tmp_path]
    for more, words in ([], r"not empty \(it holds model\)"), (["--resume"], "give another --out"):
        with pytest.raises(SystemExit, match=words):
            train.main([*flags, *more])
        assert files(tmp_path) == {"phase1/model/model.safetensors": b"somebody's T5"}


@pytest.fixture(scope="module")
def stopped(home, command):
    """A run that was killed after step 6."""
    flags = [*command, "--out", home / "stopped", "--save-every", 0]
    assert train_run(cut, 7, "seed_dropout", KILL, *flags) == -signal.SIGKILL
    return home / "stopped"


def test_damaged_and_foreign_checkpoints_are_refused_in_one_line(tmp_path, command, stopped):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    report, run = tmp_path / "report", shutil.copytree(stopped, tmp_path / "run") / "phase2"
    whole = (run / "checkpoint.pt").read_bytes()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    del state["log_bytes"]
    torch.save(state, tmp_path / "part")
    torch.save(Bomb(), tmp_path / "bomb")
    others = [(tmp_path / name).read_bytes() for name in ("part", "bomb")]
    for content in whole[: len(whole) // 2], *others:
        (run / "checkpoint.pt").write_bytes(content)
        assert train_run(main, *command, "--out", run.parent, "--resume", report=report) == 1
        assert "checkpoint.pt is damaged or of another version" in report.read_text()
        assert report.read_text().count("\n") == 1
    assert not (tmp_path / "exploded").exists()


def test_full_disk(tmp_path, command, whole_run):
    """The fifth checkpoint finds no room: the one before it stays."""
    resource = pytest.importorskip("resource")
    flags, report = [*command, "--out", tmp_path, "--save-every", 0], tmp_path / "report"
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert train_run(cut, 5, "torch.save", full, *flags, report=report) == 1
    assert saved_state(tmp_path / "phase2")["step"] == 4
    assert "Traceback" not in report.read_text()
    assert train_run(main, *flags, "--resume") == 0
    assert same_run(tmp_path / "phase2", whole_run)
    modes = {path.stat().st_mode for path in (tmp_path / "phase2").iterdir() if path.is_file()}
    assert len(modes) == 1, "whoever may read one file may read all"


def test_both_phases_resume(tmp_path, home):
    flags = ["--dataset", home, *TINY, *SHORT, "--save-every", 0]
    assert train_run(main, *flags, "--out", tmp_path / "whole") == 0
    out = [*flags, "--out", tmp_path / "run"]
    for calls in 4, 9:  # in phase 1, in phase 2
        assert train_run(cut, calls, "seed_dropout", KILL, *out, "--resume") == -signal.SIGKILL
    assert (tmp_path / "run" / "phase1" / "metrics.json").exists()
    assert train_run(main, *out, "--resume") == 0
    for phase in "phase1", "phase2":
        assert same_run(tmp_path / "run" / phase, tmp_path / "whole" / phase)
    assert train_run(main, *out) == 1, "a run is not replaced unasked"


# ------------------------------------------------------------------------------ places that move


def test_places_may_be_spelled_differently_or_move(tmp_path, home, command, stopped, whole_run):
    """A run that was killed goes on bit for bit where its texts and its start are elsewhere now."""
    for split in data.SPLITS:
        write(tmp_path / "texts", f"{split}.txt", (home / f"{split}.txt").read_bytes())
    shutil.copytree(home / "dropout", tmp_path / "start")
    shutil.copytree(stopped, tmp_path / "run")
    flags = command[2:]  # without --dataset
    flags[flags.index("--init") + 1] = f"{tmp_path}/./start/"
    flags += ["--dataset", f"{tmp_path}/texts/../texts/", "--out", f"{tmp_path}//run/", "--resume"]
    assert train_run(main, *flags) == 0
    assert same_run(tmp_path / "run" / "phase2", whole_run)
    write(tmp_path / "texts", "valid.txt", b"another text\n")
    with pytest.raises(SystemExit, match="texts/ are not those that it was trained on"):
        train.main(flags)
    break_weights(tmp_path / "start" / "model", lambda weights: weights["w_mu.weight"].add_(1))
    with pytest.raises(SystemExit, match="start/ no longer has the weights that it started from"):
        train.main([*flags, "--dataset", home])
    break_weights(tmp_path / "start" / "model", lambda weights: weights["w_mu.weight"].sub_(1))
    tokenizer = tmp_path / "start" / "model" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["vocab"][3:20] = content["model"]["vocab"][19:2:-1]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="the tokenizer of .*start/ makes other tokens"):
        train.main([*flags, "--dataset", home])
    config = json.loads((tmp_path / "run" / "phase2" / "config.json").read_text())
    del config["ids_sha256"]
    data.write_json(tmp_path / "run" / "phase2" / "config.json", config)
    with pytest.raises(SystemExit, match="has no ids_sha256, since another version made it"):
        train.main([*flags, "--dataset", home])


def test_a_t5_may_be_spelled_differently_or_move(tmp_path, home, t5_folder, monkeypatch):
    """It is known by its weights, in both phases."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(t5_folder, tmp_path / "small")
    flags = ["--dataset", home, *SHORT, "--epochs", 0, "--latent-dim", 3, "--out", "out"]
    assert train_run(main, *flags, "--model", "small") == 0
    before = files(tmp_path / "out")
    train.main([*flags, "--model", "./small/", "--resume"])
    (tmp_path / "small").rename(tmp_path / "renamed")
    train.main([*flags, "--model", "renamed", "--resume"])
    assert files(tmp_path / "out") == before
    break_weights(tmp_path / "renamed", lambda weights: weights["shared.weight"].add_(1))
    with pytest.raises(SystemExit, match="--model is renamed, but out/phase1 was made of"):
        train.main([*flags, "--model", "renamed", "--resume", "--phase", 2])
    on = [*flags[: flags.index("--out")], "--phase", 2, "--init", "out/phase2", "--out", "on"]
    with pytest.raises(SystemExit, match="made of .*small; if they are the same, leave --model"):
        train.main([*on, "--model", "renamed"])


def test_measuring_a_named_data_set_from_elsewhere(whole_run, home, tmp_path, monkeypatch):
    run = shutil.copytree(whole_run, tmp_path / "run")
    break_config(run, dataset="ptb")
    monkeypatch.setitem(data.SOURCES, "ptb", (f"file://{tmp_path}/{{split}}", *["00" * 32] * 3))
    monkeypatch.chdir(tmp_path)
    looked = re.escape(str(tmp_path / "data" / "ptb" / "test.txt"))
    with pytest.raises(SystemExit, match=f"{looked}.*--dataset says where the texts are now$"):
        metrics.main([str(run), "--iw-samples", "1"])
    for split in data.SPLITS:
        write(tmp_path / "moved" / "ptb", f"{split}.txt", (home / f"{split}.txt").read_bytes())
    metrics.main([str(run), "--iw-samples", "1", "--dataset", "moved/ptb"])
    (run / "model" / "tokenizer_config.json").unlink()
    with pytest.raises(SystemExit, match=f"{run}/model has no tokenizer"):
        metrics.main([str(run)])


# ------------------------------------------------------------------------------------ the screen


def through_pipe(*command, lines):
    """A command whose output is closed after some lines: (the lines, exit code, its errors)."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONUNBUFFERED", None)  # with it, an output is written when it is printed
    with subprocess.Popen(
        [sys.executable, *map(str, command)], env=variables, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        read = [child.stdout.readline() for _ in range(lines)]
        child.stdout.close()
        errors = child.stderr.read()
    return read, child.returncode, errors


def test_a_closed_pipe_ends_a_measurement_quietly_and_never_a_training(tmp_path, home, whole_run):
    _, code, errors = through_pipe(ROOT / "metrics.py", whole_run, "--iw-samples", 1, lines=0)
    assert (code, errors) == (141, "")
    flags = ["--dataset", home, "--phase", 2, "--init", home / "vae", *SHORT, "--out", tmp_path]
    read, code, errors = through_pipe(ROOT / "train.py", *flags, lines=1)
    assert read[0].startswith("train: 23 texts")
    assert (code, errors) == (0, "")
    assert (tmp_path / "phase2" / "metrics.json").exists()


def test_standard_input_is_read_once(monkeypatch):
    for stdin in None, io.TextIOWrapper(io.BytesIO(b"a king\n")):
        monkeypatch.setattr(sys, "stdin", stdin)
        if stdin:
            assert list(data.read_lines("-")) == ["a king"]
        with pytest.raises(InputError, match="standard input is closed, or was read already"):
            list(data.read_lines("-"))


def test_what_does_not_fit_into_memory_is_one_line():
    message = "CUDA out of memory.\nTried to allocate 2.00 GiB."
    with pytest.raises(SystemExit) as stop, data.command("train.py"):
        raise torch.OutOfMemoryError(message)
    said = f"train.py: {' '.join(message.split())}; docs/speed.md says what fits"
    assert stop.value.code == said
    with pytest.raises(SystemExit, match="allocate memory.*; docs/speed.md"), data.command("x"):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="the control"), data.command("x"):
        raise RuntimeError("the control")


def test_a_bar_on_a_closed_pipe_does_not_end_the_work(monkeypatch):
    bar, (reader, writer) = data.Bar, os.pipe()
    os.close(reader)
    monkeypatch.setattr(data, "Bar", lambda *a, **k: bar(*a, **k | {"delay": 0, "mininterval": 0}))
    with open(writer, "w", buffering=1) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with pytest.raises(BrokenPipeError):  # the control
            list(data.tqdm(range(3), file=stderr))
        assert list(data.progress(range(3), "counting")) == [0, 1, 2]


def test_training_on_letters_that_no_vocabulary_has_warns(hub, tmp_path, capsys):
    for split in data.SPLITS:
        texts = [f"Привет {i}" for i in range(4)] + ["a king"] * 4
        (tmp_path / f"{split}.txt").write_text("\n".join(texts), encoding="utf-8")
    flags = ["--dataset", tmp_path, *SHORT, "--epochs", 0, "--model", hub("t5-small")[0]]
    train.main([*flags, "--phase", 1, "--out", tmp_path])
    said = capsys.readouterr().out
    assert said.count("WARNING: 50 % of the texts have characters outside the vocabulary") == 4
    assert said.count("google/byt5-small") == 4, "after each split, and in the verdict"
    measured = json.loads((tmp_path / "phase1" / "metrics.json").read_text())
    assert measured["unknown_share"] == 0.5


# ---------------------------------------------------------------------------- a step and its pieces


def test_not_a_number_ends_the_run_before_it_reaches_the_weights(tmp_path, command, monkeypatch):
    recs, forward = [], T5VAE.forward

    def seventh_is_nan(self, batch):
        rec, kl = forward(self, batch)
        recs.append(rec)
        return (rec * math.nan if len(recs) == 7 else rec), kl

    monkeypatch.setattr(T5VAE, "forward", seventh_is_nan)
    said = r"^train.py: step 6: the loss is nan.* of texts \[.*; try a smaller --lr$"
    with pytest.raises(SystemExit, match=said):  # without --amp off, which it is
        train.main([*command, "--save-every", "0", "--out", tmp_path])
    state = saved_state(tmp_path / "phase2")
    assert state["step"] == 6
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_a_mistake_in_the_code_is_a_traceback(tmp_path, command, monkeypatch):
    """Somebody who changes vae.py sees where, also if it is a ValueError."""
    monkeypatch.setattr(T5VAE, "reparameterize", lambda *args, **kwargs: int("a mistake"))
    with pytest.raises(ValueError, match="invalid literal"):
        train.main([*command, "--out", tmp_path])


def test_the_controller_anneals_rests_and_leads_the_kl_to_its_target():
    def controller(integral, anneal_steps=100):
        made = train.KLController(8.0, anneal_steps)
        made.integral = integral
        return made

    def weight_after(controller, kl):
        controller.update(kl)
        return controller.weight

    far, near = controller(0.3), controller(0.3)
    assert weight_after(far, 80.0) == pytest.approx(0.31), "far above the target: linear annealing"
    assert weight_after(near, 8.0) == pytest.approx(0.1), "at the target the integral rests"
    assert (far.integral, near.integral) == (pytest.approx(0.31), pytest.approx(0.3))
    assert (weight_after(controller(0.0), 1.0), weight_after(controller(2.0), 80.0)) == (0, 2)
    half = controller(0.3)
    half.ratio = 0.5  # KL of held-out texts is half of that in training
    assert weight_after(half, 16.0) == pytest.approx(0.1)

    def lowest_kl(brake):  # of a KL that answers the weight late and steeply, as in training
        made, kl, low = controller(0.0, 400), 100.0, 100.0
        for _ in range(8000):
            weight = weight_after(made, kl)
            weight = weight if brake else made.integral
            kl += (min(100, 8 * (0.95 / max(weight, 0.01)) ** 10) - kl) / 50
            low = min(low, kl)
        assert (kl, weight) == pytest.approx((8, 0.95), rel=0.01)
        return low

    assert lowest_kl(brake=True) > 6
    assert lowest_kl(brake=False) < 4


@pytest.mark.parametrize("texts", [1, 2, 3, 49, 2999, 3000, 3001, 20_000])
def test_the_kl_in_training_is_that_of_all_texts_alike(texts):
    counts = Counter()

    def make_batches(epoch, index):
        counts.update(index.tolist())
        return []

    train.match_held_out_kl(tiny_vae(), range(texts), make_batches, train.KLController(8.0, 9), 1.0)
    assert len(counts) == counts.total() == min(3000, texts)
    assert (min(counts), max(counts)) == (0, texts - 1)


def test_the_controller_leads_the_kl_of_held_out_texts(tmp_path, command, monkeypatch):
    seen, update = [], train.KLController.update

    def watched(self, kl):
        update(self, kl)
        seen.append((kl, self.ratio, self.weight))

    monkeypatch.setattr(train.KLController, "update", watched)
    train.main([*command, "--log-every", "1", "--out", tmp_path])
    records = steps_of(tmp_path / "phase2")
    assert [r["kl"] for r in records] == [kl for kl, _, _ in seen]
    assert [r["kl_weight"] for r in records[1:]] == [weight for _, _, weight in seen[:-1]]
    assert len({ratio for _, ratio, _ in seen}) == 2, "one for each epoch"
    assert max(abs(ratio - 1) for _, ratio, _ in seen) > 0.01


def test_the_kl_threshold_is_the_least_that_a_dimension_costs(tmp_path, quiet):
    mu = torch.tensor([[0.4, 1.0, 2.0]], requires_grad=True)
    kl = kl_divergence(mu, torch.zeros(1, 3))  # 0.08, 0.5, 2
    loss = train.objective(torch.tensor([7.0]), kl, 0.5, 0.3)
    assert loss.item() == pytest.approx(7 + 0.5 * (0.3 + 0.5 + 2))
    loss.backward()
    assert mu.grad.tolist() == [[0, 0.5, 1]], "below the threshold nothing pushes"
    flags = [*quiet[:-2], "--kl-schedule", "constant", "--kl-threshold", 50]
    train.main([*flags, "--out", tmp_path])
    records = steps_of(tmp_path / "phase2")
    assert [r["loss"] for r in records] == pytest.approx([r["rec"] + 3 * 50 for r in records])


@pytest.mark.parametrize("rate", [0, 0.0, 0.1])  # an int, too, where JSON has one
def test_dropout_is_the_configurations_unless_it_is_given(rate):
    for given, expected in (None, rate), (0.3, 0.3):
        model = T5VAE(tiny_config(dropout_rate=rate).to_dict(), 4)
        train.prepare(model, argparse.Namespace(phase=2, device="cpu", dropout=given))
        modules = list(model.modules())
        found = {module.p for module in modules if isinstance(module, nn.Dropout)}
        of_attention = [getattr(module, "dropout", None) for module in modules]
        found |= {number for number in of_attention if isinstance(number, int | float)}
        assert found == {expected}


def test_half_precision_stays_close_and_resumes(tmp_path, quiet, plain):
    flags = [*quiet, "--amp", "fp16", "--save-every", 0]
    assert train_run(main, *flags, "--out", tmp_path) == 0
    assert 0 < distance(plain, tmp_path / "phase2") < 0.05
    flags += ["--out", tmp_path / "cut"]
    assert train_run(cut, 7, "seed_dropout", KILL, *flags) == -signal.SIGKILL
    assert train_run(main, *flags, "--resume") == 0, "with the state of the loss scaler"
    assert same_run(tmp_path / "cut" / "phase2", tmp_path / "phase2")


def test_a_step_line_tells_phase_epoch_rate_and_time_left(tmp_path, quiet, monkeypatch, capsys):
    """And --max-length reaches samples.txt: what is read is cut, what is written is as long."""
    asked, original = [], T5VAE.decode_texts

    def decode_texts(self, z, **settings):
        asked.append(settings["max_new_tokens"])
        return original(self, z, **settings)

    monkeypatch.setattr(T5VAE, "decode_texts", decode_texts)
    train.main([*quiet, "--max-length", "7", "--out", tmp_path])
    line = r"^phase 2, epoch (\d/2), step (\d+/10), train: loss .*; \d+\.\d steps/s, about \d+ min"
    told = capsys.readouterr().out
    steps = [("1/2", "3/10"), ("2/2", "6/10"), ("2/2", "9/10"), ("2/2", "10/10")]
    assert re.findall(line, told, re.M) == steps
    steps = [("1/2", "0/10"), ("1/2", "5/10"), ("2/2", "10/10")]
    assert re.findall(r"^phase 2, epoch (\d/2), step (\d+/10), valid: rec", told, re.M) == steps
    assert asked == [7, 7]
    tokenizer = T5VAE.from_pretrained(tmp_path / "phase2").tokenizer
    lines = (tmp_path / "phase2" / "samples.txt").read_text().splitlines()
    texts = [line.removeprefix("text").strip() for line in lines if line.startswith("text")]
    assert max(len(row) for row in data.tokenize(texts, tokenizer)) == 6


# ------------------------------------------------------------------------------- several processes


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


@pytest.mark.parametrize("phase", [1, 2])
def test_processes_give_the_same_result(tmp_path, home, phase):
    """With 23 texts the last batch has 3."""
    flags = ["--dataset", home, "--phase", phase, "--init", home / "vae", *NOISY]
    flags += ["--lr-schedule", "linear"]
    flags += ["--kl-target", 2] if phase == 2 else []
    more = ["--micro-batch", 1] if phase == 2 else []
    assert train_run(main, *flags, "--out", tmp_path / "one") == 0
    assert run_all(*[(main, *flags, *more, "--out", tmp_path / "more")] * 2) == [0, 0]
    one, more = (tmp_path / name / f"phase{phase}" for name in ("one", "more"))
    assert distance(one, more) < 1e-5
    assert distance(one, home / "vae") > 1e-3, "the control: they were trained"
    check_logs_agree(one, more)


def test_processes_resume_in_the_middle_of_an_epoch(tmp_path, quiet, plain):
    """Step 6 of 10, of which five are an epoch; with micro-batches of which the last is smaller."""
    flags = [*quiet, "--save-every", 0, "--micro-batch", 2]
    assert run_all(*[(main, *flags, "--out", tmp_path / "whole")] * 2) == [0, 0]
    killed = (cut, 7, "set_rates", KILL, *flags, "--out", tmp_path / "cut")
    assert run_all(killed, killed) == [-signal.SIGKILL] * 2
    assert saved_state(tmp_path / "cut" / "phase2")["step"] == 6
    assert run_all(*[(main, *flags, "--out", tmp_path / "cut", "--resume")] * 2) == [0, 0]
    assert same_run(tmp_path / "cut" / "phase2", tmp_path / "whole" / "phase2")
    assert distance(tmp_path / "whole" / "phase2", plain) < 1e-4


def test_language_model_in_two_processes(tmp_path, home):
    """Nothing that trains is left out of the loss: DistributedDataParallel would complain."""
    flags = ["--dataset", home, *TINY, *SHORT_LM, "--no-latent", "--out", tmp_path]
    assert run_all(*[(main, *flags)] * 2) == [0, 0]


def test_fewer_texts_than_processes(tmp_path, home):
    """Two texts in each split, three processes: one of them never has a sentence of its own."""
    for split in data.SPLITS:
        texts = (home / f"{split}.txt").read_text().splitlines()[:2]
        (tmp_path / f"{split}.txt").write_text("\n".join(texts))
    flags = ["--dataset", tmp_path, "--phase", 2, "--init", home / "vae", *SHORT, "--kl-target", 2]
    assert train_run(main, *flags, "--out", tmp_path / "one") == 0
    assert run_all(*[(main, *flags, "--out", tmp_path / "three")] * 3) == [0, 0, 0]
    one, three = (tmp_path / out / "phase2" for out in ("one", "three"))
    assert distance(one, three) < 1e-5
    assert distance(one, home / "vae") > 1e-4, "the control: they were trained"
    one, three = (json.loads((run / "metrics.json").read_text()) for run in (one, three))
    for name, value in one.items():
        near = pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value
        assert three[name] == near, name
    assert one["sentences"] == 2


def test_the_backend_reduces_on_the_gpu_and_on_the_cpu(monkeypatch):
    class Enough(Exception):
        pass

    def init(backend):
        raise Enough(backend)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(train.distributed, "init_process_group", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for bf16, amp in (True, "bf16"), (False, "fp16"):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, b=bf16: b)
        flags = ["--dataset", "grammar", "--device", "cuda"]
        assert train.settings(train.parse(flags)[0], 1).amp == amp
        with pytest.raises(Enough, match="^cpu:gloo,cuda:nccl$"):
            train.main(flags)
    with pytest.raises(Enough, match="^gloo$"):
        train.main(["--dataset", "grammar", "--device", "cpu"])


# ---------------------------------------------------------------------------------------- mistakes

MISTAKES = [
    ("train.py --phase 1", "--dataset is missing"),
    ("train.py --recipe paper", "--dataset is missing"),
    ("train.py --dataset no/folder --model no/such/t5 --phase 1", "no/such/t5: no such run or fol"),
    (
        "train.py --dataset no/such/folder --model tiny",
        "train.py: data set 'no/such/folder': there is",
    ),
    (
        "train.py --dataset {home}/vae --model tiny",
        "train.py: data set '{home}/vae': no train.txt in",
    ),
    ("train.py --dataset grammar --phase 2", "runs/grammar/phase1: no such run; run phase 1 first"),
    ("train.py --dataset {home} --phase 2 --init {vae} --latent-dim 5", "--latent-dim is 5, but"),
    ("train.py --dataset {home} --phase 2 --init {vae} --pool mean", "--pool is mean, but"),
    ("train.py --dataset {home} --phase 1 --model {vae}", "a VAE; start from it with --init"),
    ("train.py --dataset {home} --no-latent --init {vae}", "is a VAE: a language model cannot"),
    ("train.py --dataset {home} --init {home}/train.txt --phase 2", "{home}/train.txt"),
    ("train.py --dataset {home} --out {vae}/config.json --model tiny", "config.json"),
    ("metrics.py {run} --iw-samples 0", "argument --iw-samples"),
    ("metrics.py {run}/model", "has no config.json of a run"),
    ("metrics.py {run} --device cuda", "--device is cuda, but torch finds no GPU"),
]


@pytest.mark.usefixtures("stopped", "whole_run")
@pytest.mark.parametrize(("line", "words"), MISTAKES)
def test_mistakes_are_told_in_one_line(line, words, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = {"home": home, "vae": home / "vae", "run": home / "whole" / "phase2"}
    program, *flags = line.format(**places).split()
    monkeypatch.setattr("sys.argv", [program])
    before = files(home)
    with pytest.raises(SystemExit) as stop:
        {"train.py": train, "metrics.py": metrics}[program].main(flags)
    said = stop.value.code
    if not isinstance(said, str):  # argparse has printed it
        said = capsys.readouterr().err.splitlines()[-1]
    assert words.format(**places) in said
    assert said.startswith(f"{program}: ")
    assert "\n" not in said
    assert files(home) == before
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_what_one_run_has_told_is_printed_whatever_happens_to_the_next(whole_run, tmp_path, capsys):
    good, bad = (shutil.copytree(whole_run, tmp_path / name) for name in ("good", "bad"))
    (bad / "model" / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="bad/model holds no T5VAE"):
        metrics.main([str(good), str(bad), "--iw-samples", "3", "--write"])
    assert f"{good}: z is" in capsys.readouterr().out
    assert json.loads((good / "metrics.json").read_text())["iw_samples"] == 3
    with pytest.raises(SystemExit, match="which is better"):  # before the first is measured
        metrics.main([str(bad), str(good), "--iw-samples", "1", "--write"])


def test_a_single_text_has_no_other_and_a_cut_one_no_known_entropy(tmp_path, home):
    for split in data.SPLITS:
        texts = (home / f"{split}.txt").read_text().splitlines()
        (tmp_path / f"{split}.txt").write_text("\n".join(texts[: 1 if split == "test" else 9]))
    model = T5VAE.from_pretrained(home / "vae")
    for where, one in (tmp_path, True), (home, False):
        corpus = data.load_corpus(str(where), "test", model.tokenizer)
        measured = metrics.evaluate(model, corpus, iw_samples=2, thorough=True)
        assert ("swap_cost" in measured) == ("rec_other" in measured) == (not one)
        assert metrics.verdict(measured).startswith("rec " if one else "z is")
    short, whole = (
        data.load_corpus("grammar", "test", model.tokenizer, max_length=length, limit=9)
        for length in (4, 256)
    )
    assert (short.entropy, whole.entropy) == (None, data.GRAMMAR_ENTROPY)


def test_a_language_model_is_no_start_for_a_vae(tmp_path, home):
    T5VAE(tiny_config().to_dict(), 0).save_pretrained(tmp_path / "lm")
    with pytest.raises(SystemExit, match="is a language model: a VAE cannot start from it"):
        train.main(["--dataset", home, "--phase", 2, "--init", tmp_path / "lm", "--kl-target", 8])


def test_phase_2_of_other_texts_is_refused_unless_init_names_its_start(tmp_path, home, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parent in "a", "b", "c":
        for split in data.SPLITS:
            write(Path(parent, "x"), f"{split}.txt", (home / f"{split}.txt").read_bytes())
    write(Path("b", "x"), "test.txt", b"the old king\n")
    flags = [*SHORT, "--epochs", 0]
    assert train_run(main, "--dataset", "a/x", "--phase", 1, *TINY, *flags) == 0
    with pytest.raises(SystemExit, match="runs/x/phase1 was trained on other texts; to start"):
        train.main(["--dataset", "b/x", "--phase", 2, *flags])
    init = ["--init", "runs/x/phase1", "--out", "other"]
    assert train_run(main, "--dataset", "b/x", "--phase", 2, *init, *flags) == 0
    assert train_run(main, "--dataset", "c/x", "--phase", 2, *flags) == 0, "the same elsewhere"


def test_the_folder_of_a_run_has_the_name_of_its_texts(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args, _ = train.parse(["--dataset", "."])
    assert train.run_folder(args, 1) == Path("runs", tmp_path.name, "phase1")
