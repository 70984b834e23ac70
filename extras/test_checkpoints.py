"""Checkpoints as the hub has them, at test size: what loads, what is refused, and how it computes.

Configurations, names of weights and files are those of the named checkpoints. No network: a local
server speaks the hub's protocol.
"""

import http.server
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    ByT5Tokenizer,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    T5Tokenizer,
)
from transformers.modeling_outputs import BaseModelOutput

import data
import train
from data import InputError
from vae import T5VAE, Float32Activation, Float32Output

ROOT = Path(__file__).resolve().parent.parent
REAL_TOKENIZER = ROOT.parent / "shared" / "t5-tokenizer"
TEXTS = ["the old king sells a boat", "two monks paint <a> clock near the lake: 3 / 4 = 0.75!"]
TEXTS += ["a quick brown fox jumps over the lazy dog_s ear", "UNKNOWN Extra PAD <extra_id_0> </s>"]
MARKED = ["a </s> b", "a<pad>b </s>", "the <extra_id_0> king <extra_id_1>", "</s>", "<pad> <pad>"]

SIZE = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 256}
BASE = SIZE | {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
BASE |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "n_positions": 512}
BASE |= {"is_encoder_decoder": True, "relative_attention_num_buckets": 8, "dropout_rate": 0.1}
BASE |= {"initializer_factor": 1.0, "layer_norm_epsilon": 1e-06, "output_past": True}
SMALL = BASE | {"task_specific_params": {"summarization": {"num_beams": 4, "max_length": 200}}}
GATED = BASE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MT5 = GATED | {"model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]}
MT5 |= {"tokenizer_class": "T5Tokenizer", "vocab_size": 512, "num_decoder_layers": 2}
BYT5 = GATED | {"vocab_size": 384, "num_layers": 3, "num_decoder_layers": 1, "d_ff": 56}
BYT5 |= {"tokenizer_class": "ByT5Tokenizer", "gradient_checkpointing": False}
EFFICIENT = BASE | {"num_layers": 1, "num_decoder_layers": 3, "d_kv": 12, "num_heads": 3}
UMT5 = MT5 | {"model_type": "umt5", "architectures": ["UMT5ForConditionalGeneration"]}
UMT5 |= {"scalable_attention": True, "dense_act_fn": "gelu_new", "is_gated_act": True}
KINDS = {  # config.json, the weights' file, the tokenizer's files
    "t5-small": (SMALL, "stray", "tokenizer.json spiece.model tokenizer_config.json"),
    "t5-small-old": (SMALL, "bin", "tokenizer.json spiece.model"),
    "t5-base": (SMALL | {"num_layers": 3}, "stray", "tokenizer.json spiece.model"),
    "t5-v1_1": (GATED, "bin", "spiece.model"),
    "flan": (GATED, "shards", "tokenizer.json spiece.model tokenizer_config.json"),
    "mt5": (MT5, "bin", "spiece.model tokenizer_config.json"),
    "mt5-alone": (MT5, "bin", "alone"),
    "byt5": (BYT5, "bin", "byt5"),
    "t5-efficient": (EFFICIENT, "bin", "spiece.model tokenizer.json tokenizer_config.json"),
    "umt5": (UMT5, "bin", "spiece.model tokenizer.json tokenizer_config.json"),
    "community": (BASE | {"tie_word_embeddings": False}, "safetensors", "spiece.model"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """{model_type: a folder with all files of its tokenizer}."""
    folders = {}
    for kind in "t5", "mt5", "mt5-alone", "umt5":
        folders[kind] = folder = tmp_path_factory.mktemp(kind)
        settings = {"vocab_size": 90, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        if kind != "t5":
            settings |= {"byte_fallback": True, "vocab_size": 330}
        if kind == "mt5":
            settings["user_defined_symbols"] = [f"▁<extra_id_{i}>" for i in range(3)]
        if kind == "umt5":
            settings |= {"bos_id": 2, "unk_id": 3}
        with open(folder / "spiece.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(TEXTS * 5),
                model_writer=file,
                hard_vocab_limit=False,
                minloglevel=2,
                **settings,
            )
        special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        special |= {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
        special["additional_special_tokens"] = None
        if kind in ("t5", "umt5"):
            sentinels = [f"<extra_id_{i}>" for i in range(100)]
            special |= {"extra_ids": 100, "additional_special_tokens": sentinels}
        (folder / "tokenizer_config.json").write_text(json.dumps(special))
        if kind == "mt5-alone":
            continue
        tokenizer = T5Tokenizer.from_pretrained(folder)
        content = json.loads(tokenizer._tokenizer.to_str())
        content["model"] |= {"unk_id": settings["unk_id"]}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folders


def make_t5(config, seed=0):
    """A T5 with weights of T5's sizes, its own head included."""
    torch.manual_seed(seed)
    t5 = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**config)).eval()
    for name, weight in t5.named_parameters():
        if "relative" in name or "layer_norm" in name:
            nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    if config.get("tie_word_embeddings") is False:
        t5.lm_head.weight = nn.Parameter(torch.randn_like(t5.lm_head.weight) / 4)
        t5.config.tie_word_embeddings = False  # what it means: no scale before the head
    return t5


def make_folder(folder, config, weights, files, pieces, t5=None):
    """The folder of a checkpoint. Returns the T5 in it."""
    folder.mkdir(parents=True, exist_ok=True)
    t5 = t5 or make_t5(config)
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: weight.detach().clone() for name, weight in t5.state_dict().items()}
    if weights in ("stray", "safetensors"):
        names = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
        names |= {"lm_head.weight"} if weights == "stray" else set()
        state = {name: weight for name, weight in state.items() if name not in names}
    if weights == "stray" or weights == "bin" and config["model_type"] == "t5":
        stray = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        state[stray] = torch.randn(config["relative_attention_num_buckets"], config["num_heads"])
    if weights == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif weights == "shards":
        places = {}
        for i in range(2):
            name = f"model-0000{i + 1}-of-00002.safetensors"
            part = {k: state[k] for k in list(state)[i::2]}
            safetensors.torch.save_file(part, folder / name, {"format": "pt"})
            places |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    if files == "byt5":
        settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125, "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    source = pieces["mt5-alone" if files == "alone" else config["model_type"].removeprefix("long")]
    for name in "spiece.model", "tokenizer.json", "tokenizer_config.json":
        if name in files or files == "alone" and name == "spiece.model":
            (folder / name).write_bytes((source / name).read_bytes())
    return t5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, pieces):
    """checkpoint(kind): its folder and its T5, made once."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("hub") / kind
            made[kind] = folder, make_folder(folder, *KINDS[kind], pieces)
        return made[kind]

    return make


def from_t5(folder, latent_dim=5, **arguments):
    torch.manual_seed(1)
    return T5VAE.from_t5(folder, latent_dim, **arguments)


def labels_of(model, texts=TEXTS):
    rows = [[*r, model.tokenizer.eos_token_id] for r in data.tokenize(texts, model.tokenizer)]
    return data.pad(rows, model.t5.config.pad_token_id)


# ------------------------------------------------------------------------------------- what loads


@torch.no_grad()
def literal(t5, memory, labels):
    """Logits with T5's own cross-attention: a cache that holds the one key, which is the value."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for layer in range(t5.config.num_decoder_layers):
        one_key = memory[:, layer].view(len(labels), t5.config.num_heads, 1, t5.config.d_kv)
        cache.cross_attention_cache.update(one_key, one_key, layer)
        cache.is_updated[layer] = True
    unread = BaseModelOutput(torch.randn(len(labels), 1, t5.config.d_model))
    start = t5.prepare_decoder_input_ids_from_labels(labels)
    return t5(encoder_outputs=unread, decoder_input_ids=start, past_key_values=cache).logits


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_kinds_of_the_hub(kind, checkpoint, tmp_path):
    folder, t5 = checkpoint(kind)
    vae = from_t5(folder)
    assert not vae.training
    ours, theirs = vae.t5.state_dict(), t5.state_dict()
    for name, weight in ours.items():
        name = name.replace("layer.1.o.", "layer.1.EncDecAttention.o.")
        assert torch.equal(weight, theirs.pop(name)), name
    assert all("layer.1" in name and "decoder" in name for name in theirs), "and no other is lost"
    ids, mask = labels_of(vae)
    vae.w_proj.weight.normal_()
    z = torch.randn(len(ids), 5)
    logits = vae.decode(z, ids)
    torch.testing.assert_close(logits, literal(t5, vae.memory(z), ids), atol=1e-4, rtol=1e-4)
    assert (logits - literal(t5, vae.memory(z.flip(0)), ids)).abs().max() > 1e-2, "the control"
    hidden = t5.encoder(ids, mask).last_hidden_state.masked_fill(mask[:, :, None] == 0, -torch.inf)
    mu, _ = vae.encode(ids, mask)
    torch.testing.assert_close(mu, vae.w_mu(hidden.amax(1)), atol=1e-4, rtol=1e-4)
    assert len(vae.generate(z, max_new_tokens=4)) == len(TEXTS)
    vae.save_pretrained(tmp_path / "vae")
    again = T5VAE.from_pretrained(tmp_path / "vae")
    assert torch.equal(again.decode(z, ids), logits)
    assert torch.equal(again.encode_texts(TEXTS)[0], vae.encode_texts(TEXTS)[0])
    flags = {"max_new_tokens": 6}
    assert again.decode_texts(mu, **flags) == vae.decode_texts(mu, **flags)


def damaged(folder, kind, pieces):
    """A folder whose parts do not fit each other, and words that say so."""
    config, weights, files = KINDS["flan" if kind == "no shard" else "t5-small"]
    config = dict(config)
    t5, words, model = make_t5(config), "", folder / "model.safetensors"
    changes = {
        "large tokenizer": ({"vocab_size": 130}, "159 130"),
        "pad id": ({"pad_token_id": 3}, "pad_token_id 3"),
        "eos id": ({"eos_token_id": 2}, "eos_token_id 2"),
        "no pad id": ({"pad_token_id": None}, "pad_token_id"),
        "no start": ({"decoder_start_token_id": None}, "decoder_start_token_id"),
        "other vocabulary": ({"vocab_size": 300}, "shared.weight"),
        "another T5": ({"model_type": "longt5"}, "longt5 t5, mt5, umt5"),
        "odd width": ({"d_model": "32"}, "d_model"),
        "odd activation": ({"feed_forward_proj": "gated-gated-gelu"}, "feed_forward_proj"),
    }
    if kind in changes:
        change, words = changes[kind]
        config = config | change
        t5 = make_t5(config) if kind == "large tokenizer" else t5
    make_folder(folder, config, weights, files, pieces, t5)
    if kind == "nameless":
        del config["model_type"]
        (folder / "config.json").write_text(json.dumps(config))
    if kind == "incomplete":
        state = safetensors.torch.load_file(model)
        del state["encoder.block.1.layer.1.DenseReluDense.wi.weight"]
        safetensors.torch.save_file(state, model, {"format": "pt"})
        words = "encoder.block.1.layer.1.DenseReluDense.wi.weight"
    elif kind == "half a file":
        model.write_bytes(model.read_bytes()[:20_000])
    elif kind == "half a bin":
        model.unlink()
        torch.save(t5.state_dict(), folder / "pytorch_model.bin")
        half = (folder / "pytorch_model.bin").read_bytes()[:20_000]
        (folder / "pytorch_model.bin").write_bytes(half)
    elif kind == "no shard":
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif kind == "no tokenizer":
        for path in [*folder.glob("tok*"), *folder.glob("spiece*")]:
            path.unlink()
        words = "tokenizer"
    elif kind == "foreign tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif kind == "no JSON":
        (folder / "config.json").write_text("{")
    return words.split() if words else []


DAMAGES = "large tokenizer;pad id;eos id;no pad id;no start;other vocabulary;another T5;nameless"
DAMAGES += ";odd width;odd activation;incomplete;half a file;half a bin;no shard;no tokenizer"
DAMAGES += ";foreign tokenizer;no JSON"


@pytest.mark.parametrize("kind", DAMAGES.split(";"))
def test_parts_that_do_not_fit(kind, tmp_path, pieces):
    words = damaged(tmp_path / "damaged", kind, pieces)
    files = {"no shard", "no JSON"}  # OSError, as where there is no file
    with pytest.raises((InputError, OSError) if kind in files else InputError) as refused:
        from_t5(tmp_path / "damaged")
    said = str(refused.value)
    for word in [str(tmp_path / "damaged"), *words]:
        assert word in said
    assert "\n" not in said or kind in files, said
    (tmp_path / "texts.txt").write_text("a king\n" * 3)
    flags = ["--dataset", tmp_path / "texts.txt", "--phase", 1, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--model", tmp_path / "damaged"])
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ fp16


def overflowing(config, latent_dim=5):
    """A model whose activations reach 1e5 at each wo; where it is gated, before it too."""
    torch.manual_seed(0)
    t5_config = AutoConfig.for_model(**config).to_dict()
    t5_config["tie_word_embeddings"] = config.get("tie_word_embeddings", True)
    vae = T5VAE(t5_config, latent_dim).eval()
    if not t5_config["tie_word_embeddings"]:
        vae.t5.lm_head.weight.data.normal_(std=config["d_model"] ** -0.5)  # as a tied one is scaled
    vae.w_proj.weight.data.normal_()
    seen = {}
    for name, module in vae.named_modules():
        if isinstance(module, Float32Output):
            module.register_forward_hook(
                lambda _, x, y, name=name: seen.update({name: (x[0].abs().max(), y.abs().max())})
            )
    gated = "gated" in config.get("feed_forward_proj", "")
    ids, mask = data.pad([np.arange(3, 30), np.arange(40, 60)], 0)
    for _ in range(4):  # each wo changes what the next ones see
        with torch.no_grad():
            vae.rec(vae.encode(ids, mask)[0], ids)
        for name, module in vae.named_modules():
            if name in seen and gated:
                layer = vae.get_submodule(name.removesuffix(".wo"))
                for wi in layer.wi_0, layer.wi_1:
                    wi.weight.data *= (1e5 / seen[name][0]) ** 0.5
                module.weight.data *= seen[name][0] / seen[name][1]
            elif name in seen:
                module.weight.data *= 1e5 / seen[name][1]
    with torch.no_grad():
        vae.rec(vae.encode(ids, mask)[0], ids)
    largest = max(float(max(both)) for both in seen.values())
    assert 6.6e4 < largest < 1e6
    return vae, ids, mask


def plain(vae):
    """The same model as transformers makes it, without float32 in wo."""
    for module in vae.modules():
        if isinstance(module, Float32Output):
            module.__class__ = nn.Linear
        if isinstance(getattr(module, "act", None), Float32Activation):
            module.act = module.act.activation
    return vae


@pytest.mark.parametrize("config", [SMALL, GATED], ids=["plain", "gated"])
@torch.no_grad()
def test_fp16_reaches_as_far_as_a_pretrained_t5(config):
    vae, ids, mask = overflowing(config)
    z, names = vae.encode(ids, mask)[0], list(vae.state_dict())
    rec = vae.rec(z, ids)

    def half(dtype):
        with torch.autocast("cpu", dtype):
            return vae.rec(z, ids), *vae.encode(ids, mask)

    fp16, mu, logvar = half(torch.float16)
    assert (fp16 - rec).abs().max() < 0.01
    assert mu.isfinite().all()
    assert logvar.isfinite().all()
    bf16 = half(torch.bfloat16)
    plain(vae)
    assert list(vae.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(half(torch.bfloat16), bf16, strict=True))
    assert not half(torch.float16)[0].isfinite().all(), "the control"
    expected = make_t5(config).state_dict()
    own = {n.removeprefix("t5.") for n in names if n.startswith("t5.") and "layer.1.o" not in n}
    assert own <= set(expected), "the names are T5's"


def one_of(rank, world, port, argv):
    """What torchrun does for a process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train.main(argv)


def run_all(world, argv):
    """The exit codes of the processes of a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=one_of, args=(i, world, port, argv)) for i in range(world)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


def training_flags(tmp_path, vae, *more):
    """A command that trains `vae` on eight texts."""
    vae.tokenizer = data.train_tokenizer(TEXTS, 60)
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "data").mkdir(exist_ok=True)
    for split in data.SPLITS:
        (tmp_path / "data" / f"{split}.txt").write_text("\n".join(TEXTS * 2))
    flags = ["--dataset", tmp_path / "data", "--init", tmp_path / "vae", "--phase", 1]
    flags += ["--no-freeze-decoder", "--batch-size", 4, "--log-every", 1, "--amp", "fp16"]
    return [str(flag) for flag in [*flags, "--out", tmp_path / "out", *more]]


def log_of(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["split"] == "train"]


@pytest.mark.parametrize(("config", "world"), [(SMALL, 1), (GATED, 1), (GATED, 2)])
def test_a_hundred_steps_of_fp16(config, world, tmp_path):
    vae, _, _ = overflowing(config)
    flags = training_flags(tmp_path, vae, "--epochs", 50 if world == 1 else 10)
    if world == 1:
        train.main(flags)
    else:
        assert run_all(world, flags) == [0] * world
    records = log_of(tmp_path / "out" / "phase1")
    assert len(records) == (100 if world == 1 else 20)
    assert np.mean([r["rec"] for r in records[-4:]]) < np.mean([r["rec"] for r in records[:4]])
    assert all("scale" in r for r in records)


@pytest.mark.parametrize("world", [1, 2])
def test_overflow_in_every_step_stops_with_advice_that_works(world, tmp_path, capsys):
    config = AutoConfig.for_model(**SMALL).to_dict() | {"tie_word_embeddings": False}
    vae = T5VAE(config, 5)
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            weight *= 3e3 if "lm_head" in name else 1e-2 if "norm" not in name else 1
    flags = training_flags(tmp_path, vae, "--epochs", 20, "--save-every", 0)
    if world == 1:
        with pytest.raises(SystemExit) as stop:
            train.main(flags)
        assert "--amp off" in str(stop.value)
        assert "\n" not in str(stop.value)
    else:
        assert run_all(world, flags) == [1, 1]
    scales = [record["scale"] for record in log_of(tmp_path / "out" / "phase1")]
    assert len(scales) <= 20
    assert scales[0] > scales[-1]
    flags[flags.index("fp16")] = "off"
    if world == 1:
        train.main([*flags, "--resume"])
    else:
        assert run_all(world, [*flags, "--resume"]) == [0, 0]
    assert len(log_of(tmp_path / "out" / "phase1")) == 40


# ------------------------------------------------------------------------------------ Python API


class Series:
    """What pandas has: no sequence of str, but an iterable of them."""

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=object)


def test_texts_in_and_out(checkpoint):
    vae = from_t5(checkpoint("t5-small")[0])
    mu, logvar = vae.encode_texts(TEXTS)
    assert torch.equal(vae.encode_texts(TEXTS)[0], mu)
    assert not mu.requires_grad
    generator, keys = (text for text in TEXTS), dict.fromkeys(TEXTS).keys()
    for texts in generator, tuple(TEXTS), keys, Series(TEXTS), np.array(TEXTS):
        assert torch.equal(vae.encode_texts(texts)[0], mu)
    with pytest.raises(InputError, match=r"encode_texts\(\['a king'\]\)"):
        vae.encode_texts("a king")
    for texts in [None], ["a", 1], [b"a"], [["a"]], [float("nan")]:
        with pytest.raises(InputError, match="must be a str"):
            vae.encode_texts(texts)
    assert vae.encode_texts([])[0].shape == (0, 5)
    assert vae.encode_texts([""])[0].isfinite().all()
    written = vae.decode_texts(mu, max_new_tokens=5)
    assert all(isinstance(text, str) for text in written)
    assert vae.decode_texts(mu.numpy(), max_new_tokens=5) == written
    assert vae.decode_texts(mu.double().numpy(), max_new_tokens=5) == written
    assert vae.decode_texts(mu.tolist(), max_new_tokens=5) == written
    assert vae.decode_texts(mu[:0]) == []
    for z in mu[0], mu[:, :3], mu[None]:
        with pytest.raises(InputError, match=r"it must be \(N, 5\)"):
            vae.decode_texts(z)
    flags = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 5}
    assert len(vae.decode_texts(mu, batch_size=3, **flags)) == 8


@pytest.mark.parametrize("kind", ["t5-small", "flan", "mt5", "umt5"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind, dtype, checkpoint):
    vae = from_t5(checkpoint(kind)[0])
    mu, logvar = vae.encode_texts(TEXTS)
    vae = vae.half() if dtype == torch.float16 else vae.bfloat16()
    found = vae.encode_texts(TEXTS)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], mu, atol=0.15, rtol=0.1)
    assert len(vae.decode_texts(found[0], max_new_tokens=5)) == len(TEXTS)
    ids, mask = labels_of(vae)
    assert vae.rec(found[0], ids).isfinite().all()


def test_generate_takes_what_transformers_documents(checkpoint):
    vae = from_t5(checkpoint("t5-small")[0])
    z = torch.randn(3, 5)
    assert vae.generate(z).shape[1] <= 257
    assert vae.generate(z, max_length=5, eos_token_id=255).shape == (3, 5)
    assert vae.generate(z, 4, eos_token_id=255).shape == (3, 5)
    config = GenerationConfig(max_new_tokens=4, decoder_start_token_id=0, pad_token_id=0)
    assert vae.generate(z, generation_config=config).shape == (3, 5)
    assert vae.generate(z, generation_config=GenerationConfig(max_new_tokens=4)).shape == (3, 5)
    assert vae.generate(z, generation_config=GenerationConfig()).shape[1] <= 257
    several = {"num_return_sequences": 2, "max_new_tokens": 4, "eos_token_id": 255}
    sampled = vae.generate(z, do_sample=True, **several)
    beams = vae.generate(z, num_beams=3, **several)
    assert sampled.shape == beams.shape == (6, 5)
    assert not torch.equal(beams[0], beams[1])
    alone = [vae.generate(row[None], num_beams=3, **several) for row in z]
    assert torch.equal(beams, torch.cat(alone)), "each sentence depends on its own z alone"
    greedy = vae.generate(z, max_new_tokens=4)
    assert torch.equal(vae.generate(z, max_new_tokens=4, do_sample=True, top_k=1), greedy)
    assert torch.equal(vae.generate(z, max_new_tokens=4, do_sample=True, top_p=1e-6), greedy)
    assert torch.equal(vae.generate(z, max_new_tokens=4, use_cache=False), greedy)
    with pytest.raises(ValueError, match="max_tokens"):
        vae.generate(z, max_tokens=4)
    for name in "inputs", "input_ids", "encoder_outputs", "decoder_input_ids":
        with pytest.raises(InputError, match=name):
            vae.generate(z, **{name: torch.zeros(3, 1, dtype=torch.long)})
    for name in "inputs_embeds", "decoder_inputs_embeds":
        with pytest.raises(ValueError, match=name):
            vae.generate(z, **{name: torch.zeros(3, 1, 32)})


@pytest.mark.parametrize("how", ["flag", "config", "both"])
def test_sampling_draws_from_the_whole_distribution(how, checkpoint):
    vae = from_t5(checkpoint("t5-small")[0])
    vae.t5.lm_head.weight = nn.Parameter(1e-4 * torch.randn(256, 32))  # nearly flat
    z, flags = torch.zeros(3000, 5), {"max_new_tokens": 1}
    config = GenerationConfig(do_sample=True, max_new_tokens=1)
    if how == "config":
        ids = vae.generate(z, generation_config=config)
    elif how == "both":
        config = GenerationConfig(max_new_tokens=1)
        ids = vae.generate(z, do_sample=True, generation_config=config)
    else:
        ids = vae.generate(z, do_sample=True, **flags)
    assert len(ids[:, 1].unique()) > 250
    assert len(vae.generate(z, do_sample=True, top_k=50, **flags)[:, 1].unique()) <= 50
    few = GenerationConfig(do_sample=True, top_k=7, max_new_tokens=1)
    assert len(vae.generate(z, generation_config=few)[:, 1].unique()) <= 7


@pytest.mark.parametrize("kind", ["t5-small", "mt5", "umt5"])
@torch.no_grad()
def test_every_attention_masks_padding(kind, checkpoint):
    vae = from_t5(checkpoint(kind)[0])
    ids, mask = labels_of(vae, TEXTS[:1])
    padded = F.pad(ids, (0, 5)), F.pad(mask, (0, 5))
    both = [torch.cat([part, part.flip(1)]) for part in padded]
    both[1][1] = 1
    found = []
    for name in "eager", "sdpa":
        vae.t5.set_attn_implementation(name)
        alone, _ = vae.encode(ids, mask)
        torch.testing.assert_close(vae.encode(*padded)[0], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vae.encode(*both)[0][:1], alone, atol=1e-5, rtol=1e-5)
        unmasked, _ = vae.encode(padded[0], torch.ones_like(padded[1]))
        assert (unmasked - alone).abs().max() > 1e-3, "the control"
        found.append(alone)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("kind", ["shared", "tiny", "files", "spiece", "mt5", "umt5", "byt5"])
def test_text_is_text(kind, checkpoint, tmp_path):
    if kind == "shared":
        if not REAL_TOKENIZER.is_dir():
            pytest.skip(f"no {REAL_TOKENIZER}")
        tokenizer = T5Tokenizer.from_pretrained(REAL_TOKENIZER)
        assert tokenizer("a </s> b").input_ids.count(1) == 2, "the control"
    elif kind == "tiny":
        tokenizer = data.train_tokenizer([*TEXTS, "</s> <pad> <extra_id_10>"] * 3, 90)
    elif kind == "byt5":
        tokenizer = ByT5Tokenizer()
    else:
        names = {"files": "t5-small", "spiece": "t5-v1_1", "mt5": "mt5", "umt5": "umt5"}
        tokenizer = from_t5(checkpoint(names[kind])[0]).tokenizer
    rows = data.tokenize(MARKED, tokenizer)
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id, *tokenizer.all_special_ids}
    characters = tokenizer.unk_token_id in sum(rows, [])  # some that its vocabulary lacks
    assert special.isdisjoint(set(sum(rows, [])) - {tokenizer.unk_token_id})
    print(kind, characters, [tokenizer.convert_ids_to_tokens(r) for r in rows])
    assert characters is False, "the vocabulary has them all"
    unk = kind != "byt5" or True
    assert data.detokenize(rows, tokenizer) == MARKED
    assert data.tokenize(["x <unk> y"], tokenizer)[0].count(tokenizer.unk_token_id) == unk
    assert data.detokenize(data.tokenize(["a <unk> b"], tokenizer), tokenizer) == ["a <unk> b"]
    (tmp_path / "train.txt").write_text("\n".join(MARKED))
    corpus = data.load_corpus(str(tmp_path), "train", tokenizer)
    for i, row in enumerate(rows):
        assert corpus.row(i).tolist() == [*row, tokenizer.eos_token_id]
    cut = data.load_corpus(str(tmp_path), "train", tokenizer, max_length=4)
    assert set(cut.lengths.tolist()) <= {2, 3, 4}
    assert cut.ids.tolist().count(tokenizer.eos_token_id) == len(MARKED)


def test_marked_texts_through_the_model(checkpoint):
    vae = from_t5(checkpoint("t5-small")[0])
    mu, _ = vae.encode_texts(["a king </s> b", "a king", "a king <pad>", "a king <extra_id_0>"])
    assert torch.pdist(mu).min() > 1e-3, "no mark is dropped"


# ------------------------------------------------------------------------------------------- hub


class Hub(http.server.ThreadingHTTPServer):
    """A server of one repository: `folder`. It can be slow, and break off within the weights."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Repository)
        self.folder, self.mode, self.asked = folder, "well", []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Repository(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(content), 20_000):
            if self.server.mode == "slow":
                time.sleep(0.1)
            if self.server.mode == "broken" and "model" in self.path and start >= 40_000:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.wfile.write(content[start : start + 20_000])

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        commit, path = "c" * 40, self.path.split("?")[0]
        names = sorted(p.name for p in self.server.folder.iterdir())
        if path.startswith("/api/models/me/my-t5"):
            info = {"id": "me/my-t5", "modelId": "me/my-t5", "sha": commit, "tags": []}
            info |= {"siblings": [{"rfilename": name} for name in names]}
            if "/tree/" in path:
                info = [{"type": "file", "path": n, "size": 1, "oid": n} for n in names]
            return self.answer(200, json.dumps(info).encode(), [("Content-Type", "application/json")])
        name = path.rsplit("/", 1)[-1]
        if not path.startswith("/me/my-t5/resolve/") or name not in names:
            missing = "EntryNotFound" if path.startswith("/me/my-t5/") else "RepoNotFound"
            return self.answer(404, b"", [("X-Error-Code", missing), ("X-Repo-Commit", commit)])
        content = (self.server.folder / name).read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{name}-1"', "Accept-Ranges": "bytes"}
        status, first = 200, self.headers.get("Range", "").removeprefix("bytes=").split("-")[0]
        if first:
            status, total = 206, len(content)
            content = content[int(first) :]
            headers["Content-Range"] = f"bytes {first}-{total - 1}/{total}"
        self.answer(status, content, headers.items())

    do_HEAD = do_GET


def test_a_hub_that_is_slow_or_breaks_off(checkpoint, tmp_path):
    hub = Hub(checkpoint("flan")[0])
    (tmp_path / "texts.txt").write_text("\n".join(f"{text} {i}" for i in range(20) for text in TEXTS))
    command = [sys.executable, ROOT / "train.py", "--dataset", tmp_path / "texts.txt"]
    command += ["--model", "me/my-t5", "--phase", 1, "--limit", 4, "--epochs", 1]

    def run(mode, cache, out):
        hub.mode, hub.asked = mode, []
        environment = os.environ | {"HF_HOME": str(tmp_path / cache), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        words = [str(word) for word in [*command, "--out", tmp_path / out]]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=90)

    broken = run("broken", "a", "a")
    assert broken.returncode == 1
    assert "Traceback" not in broken.stderr
    told = [line for line in broken.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(told) == 1, broken.stderr
    assert "me/my-t5" in told[0]
    assert not list((tmp_path / "a").rglob("*.json*")) or not (tmp_path / "a" / "phase1").exists()
    paths = [path for command, path in hub.asked if command == "GET"]
    weights = [i for i, path in enumerate(paths) if path.endswith(".safetensors")]
    tokenizer = [i for i, path in enumerate(paths) if path.endswith("tokenizer.json")]
    print(told, hub.asked)
    assert tokenizer[0] < weights[0], "the tokenizer comes before the weights"
    mended = run("well", "a", "a")
    assert mended.returncode == 0, mended.stderr
    slow = run("slow", "b", "b")
    assert slow.returncode == 0, slow.stderr
    files = [tmp_path / out / "phase1" / "model" / "model.safetensors" for out in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    hub.shutdown()
