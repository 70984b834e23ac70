"""Checkpoints as the hub has them, at test size: what loads, what is refused, how it computes.

Configurations, names of weights and files are those of the named checkpoints. There is no network:
a local server speaks the hub's protocol.
"""

import http.server
import json
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
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DynamicCache, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

import data
import train
from data import InputError
from extras.test_faults import run_all
from vae import T5VAE, Float32Activation, Float32Output

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "t5-tokenizer"
TEXTS = ["the old king sells a boat", "two monks paint <a> clock near the lake: 3 / 4 = 0.75!"]
TEXTS += ["a quick brown fox jumps over the lazy dog_s ear", "UNKNOWN Extra PAD <extra_id_10> </s>"]
MARKED = ["a </s> b", "a<pad>b </s>", "the <extra_id_0> king <extra_id_1>", "</s>", "<pad> <pad>"]
SENTINELS = [f"<extra_id_{i}>" for i in range(100)]
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
    "t5-small-old": (SMALL, "bin", "t5", ALL[:2]),
    "t5-base": (SMALL | {"num_layers": 3}, "stray", "t5", ALL[:2]),
    "t5-v1_1": (GATED, "bin", "t5", ALL[:1]),
    "flan": (GATED, "shards", "t5", ALL),
    "mt5": (MT5, "bin", "mt5", (ALL[0], ALL[2])),
    "mt5-alone": (MT5, "bin", "mt5-alone", ALL[:1]),
    "byt5": (BYT5, "bin", "byt5", ALL[2:]),
    "t5-efficient": (EFFICIENT, "bin", "t5", ALL),
    "umt5": (UMT5, "bin", "umt5", ALL),
    "community": (BASE | {"tie_word_embeddings": False}, "safetensors", "t5", ALL[:1]),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """A folder that holds the files of each vocabulary, <kind>/<file>."""
    root = tmp_path_factory.mktemp("vocabularies")
    common = {"hard_vocab_limit": False, "minloglevel": 2, "pad_id": 0, "eos_id": 1}
    large = common | {"vocab_size": 330, "byte_fallback": True, "bos_id": -1, "unk_id": 2}
    kinds = {"t5": large | {"vocab_size": 90, "byte_fallback": False}, "mt5-alone": large}
    kinds["mt5"] = large | {"user_defined_symbols": [f"▁<extra_id_{i}>" for i in range(3)]}
    kinds["umt5"] = large | {"bos_id": 2, "unk_id": 3}
    for kind, settings in {**kinds, "byt5": None}.items():
        folder, listed = root / kind, {"extra_ids": 0, "additional_special_tokens": None}
        folder.mkdir()
        if kind in ("t5", "umt5"):
            listed = {"extra_ids": 100, "additional_special_tokens": SENTINELS}
        listed |= {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        if kind == "byt5":
            listed = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
        (folder / ALL[2]).write_text(json.dumps({"tokenizer_class": "T5Tokenizer"} | listed))
        if kind == "byt5":
            continue
        with open(folder / ALL[0], "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(TEXTS * 5), model_writer=file, **settings
            )
        if kind != "mt5-alone":
            tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
            content = json.loads(tokenizer.backend_tokenizer.to_str())
            content["model"]["unk_id"] = settings["unk_id"]
            (folder / ALL[1]).write_text(json.dumps(content))
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


def write(folder, vocabularies, config, weights, vocabulary, files, t5=None):
    """The folder of a checkpoint. Returns the T5 in it."""
    folder.mkdir(parents=True, exist_ok=True)
    t5 = t5 or make_t5(config)
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: weight.detach().clone() for name, weight in t5.state_dict().items()}
    if weights in ("stray", "safetensors"):
        dropped = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
        dropped |= {"lm_head.weight"} if weights == "stray" else set()
        state = {name: weight for name, weight in state.items() if name not in dropped}
    if weights == "stray":
        state[STRAY] = torch.randn(config["relative_attention_num_buckets"], config["num_heads"])
    if weights == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif weights == "shards":
        places = {}
        for i in range(2):
            name, part = f"model-0000{i + 1}-of-00002.safetensors", dict(list(state.items())[i::2])
            safetensors.torch.save_file(part, folder / name, {"format": "pt"})
            places |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    for name in files:
        (folder / name).write_bytes((vocabularies / vocabulary / name).read_bytes())
    return t5


@pytest.fixture(scope="module")
def hub(tmp_path_factory, vocabularies):
    """hub(kind): the folder of a checkpoint and its T5, made once."""
    made, root = {}, tmp_path_factory.mktemp("hub")

    def make(kind):
        if kind not in made:
            made[kind] = root / kind, write(root / kind, vocabularies, *KINDS[kind])
        return made[kind]

    return make


def load(folder):
    torch.manual_seed(1)
    vae = T5VAE.from_t5(folder, latent_dim=5)
    nn.init.normal_(vae.w_proj.weight)
    return vae


def labels_of(vae, texts=TEXTS):
    return data.pad([[*row, 1] for row in data.tokenize(texts, vae.tokenizer)], 0)


# ------------------------------------------------------------------------------------- what loads


def literal(t5, memory, labels):
    """Logits with T5's own cross-attention: a cache that holds the one key, which is the value."""
    cache = transformers.EncoderDecoderCache(DynamicCache(), DynamicCache())
    for layer in range(t5.config.num_decoder_layers):
        one_key = memory[:, layer].view(len(labels), t5.config.num_heads, 1, t5.config.d_kv)
        cache.cross_attention_cache.update(one_key, one_key, layer)
        cache.is_updated[layer] = True
    unread = BaseModelOutput(torch.randn(len(labels), 1, t5.config.d_model))
    start = t5.prepare_decoder_input_ids_from_labels(labels)
    return t5(encoder_outputs=unread, decoder_input_ids=start, past_key_values=cache).logits


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_kinds_of_the_hub(kind, hub, tmp_path):
    folder, t5 = hub(kind)
    vae = load(folder)
    theirs, (ids, mask), z = t5.state_dict(), labels_of(vae), torch.randn(len(TEXTS), 5)
    for name, weight in vae.t5.state_dict().items():
        name = name.replace("layer.1.o.", "layer.1.EncDecAttention.o.")
        assert torch.equal(weight, theirs.pop(name)), name
    assert all("layer.1" in name and "decoder" in name for name in theirs), "and no other is lost"
    logits = vae.decode(z, ids)
    torch.testing.assert_close(logits, literal(t5, vae.memory(z), ids), atol=1e-4, rtol=1e-4)
    assert (logits - literal(t5, vae.memory(z.flip(0)), ids)).abs().max() > 1e-2, "the control"
    hidden = t5.encoder(ids, mask).last_hidden_state.masked_fill(mask[:, :, None] == 0, -torch.inf)
    mu = vae.encode(ids, mask)[0]
    torch.testing.assert_close(mu, vae.w_mu(hidden.amax(1)), atol=1e-4, rtol=1e-4)
    vae.save_pretrained(tmp_path)
    again = T5VAE.from_pretrained(tmp_path)
    assert torch.equal(again.decode(z, ids), logits)
    assert torch.equal(again.encode_texts(TEXTS)[0], vae.encode_texts(TEXTS)[0])
    assert again.decode_texts(mu, max_new_tokens=6) == vae.decode_texts(mu, max_new_tokens=6)


CHANGES = {  # of config.json, and what the message must say
    "large tokenizer": ({"vocab_size": 130}, "130"),
    "pad id": ({"pad_token_id": 3}, "pad_token_id 3"),
    "eos id": ({"eos_token_id": 2}, "eos_token_id 2"),
    "no pad id": ({"pad_token_id": None}, "pad_token_id"),
    "no start": ({"decoder_start_token_id": None}, "decoder_start_token_id"),
    "other vocabulary": ({"vocab_size": 300}, "shared.weight"),  # core bug: no name of a weight
    "another T5": ({"model_type": "longt5"}, "longt5 umt5"),
    "nameless": ({"model_type": None}, "model_type"),
    "odd width": ({"d_model": "32"}, "d_model"),
    "odd activation": ({"feed_forward_proj": "a-b-c"}, "feed_forward_proj"),
}
DAMAGES = {  # what of a folder is missing or cut off, and what the message must say
    "half a file": ("model.safetensors", 20_000, ""),
    "half a bin": ("pytorch_model.bin", 20_000, ""),
    "no shard": ("model-00002-of-00002.safetensors", None, "model-00002-of-00002.safetensors"),
    "no JSON": ("config.json", 9, "config.json"),
    "odd tokenizer": ("tokenizer.json", 9, ""),
    "no tokenizer": ("", None, "tokenizer"),
    "incomplete": ("", None, FFN),
}


@pytest.mark.parametrize("fault", [*CHANGES, *DAMAGES])
def test_parts_that_do_not_fit(fault, tmp_path, vocabularies):
    folder, kinds = tmp_path / "t5", {"no shard": "flan", "half a bin": "t5-small-old"}
    config, *rest = KINDS[kinds.get(fault, "t5-small")]
    change, words = CHANGES.get(fault, ({}, ""))
    t5 = make_t5(config | change if fault == "large tokenizer" else config)
    config = {k: v for k, v in (config | change).items() if k != "model_type" or v}
    write(folder, vocabularies, config, *rest, t5)
    if fault == "incomplete":
        state = safetensors.torch.load_file(folder / "model.safetensors")
        del state[FFN]
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    if fault in DAMAGES:
        name, size, words = DAMAGES[fault]
        names = ALL if fault == "no tokenizer" else [name] * bool(name)
        for path in [folder / name for name in names]:
            content = path.read_bytes()[:size]
            path.unlink() if size is None else path.write_bytes(content)
    missing = fault in ("no shard", "no JSON")
    with pytest.raises((OSError, InputError) if missing else InputError) as refused:
        load(folder)
    assert all(word in str(refused.value) for word in [str(folder), *words.split()])
    assert missing or "\n" not in str(refused.value)
    (tmp_path / "texts.txt").write_text("a king\n" * 3)
    flags = ["--dataset", tmp_path / "texts.txt", "--phase", 1, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--model", folder])
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ fp16


def overflowing(config):
    """A model whose activations reach 1e5 at each wo and, where it is gated, before it."""
    torch.manual_seed(0)
    tied = {"tie_word_embeddings": config.get("tie_word_embeddings", True)}
    vae = T5VAE(AutoConfig.for_model(**config).to_dict() | tied, 5).eval()
    nn.init.normal_(vae.w_proj.weight)
    if not tied["tie_word_embeddings"]:
        nn.init.normal_(vae.t5.lm_head.weight, std=config["d_model"] ** -0.5)
    layers, seen = [m for m in vae.modules() if hasattr(m, "wo")], {}
    for layer in layers:
        layer.wo.register_forward_hook(
            lambda wo, x, y: seen.update({wo: (x[0].abs().max(), y.abs().max())})
        )
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


def into(errors, argv):
    """train.main in a process of its own, whose standard error goes to `errors`, a file."""
    torch.set_num_threads(1)
    sys.stderr = open(errors, "a", buffering=1)  # noqa: SIM115
    train.main(argv)


def training(tmp_path, vae, *more):
    """A command that trains `vae` on eight texts with fp16, and a function that reads its log."""
    vae.tokenizer = data.train_tokenizer(TEXTS, 60)
    vae.save_pretrained(tmp_path / "vae")
    for split in data.SPLITS:
        (tmp_path / f"{split}.txt").write_text("\n".join(TEXTS * (20 if split == "train" else 1)))
    flags = ["--dataset", tmp_path, "--init", tmp_path / "vae", "--phase", 1, "--batch-size", 4]
    flags += ["--no-freeze-decoder", "--log-every", 1, "--amp", "fp16", "--out", tmp_path / "out"]

    def steps():
        lines = (tmp_path / "out" / "phase1" / "log.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["split"] == "train"]

    return [str(flag) for flag in [*flags, *more]], steps


@pytest.mark.parametrize(
    ("config", "world", "epochs"), [(GATED, 2, 5), (SMALL, 1, 5), (GATED, 1, 5)]
)
def test_training_in_fp16(config, world, epochs, tmp_path):
    flags, steps = training(tmp_path, overflowing(config)[0], "--epochs", epochs)
    assert run_all(*[(into, tmp_path / "errors", flags)] * world) == [0] * world
    recs = [step["rec"] for step in steps()]
    assert len(recs) == 20 * epochs
    assert np.mean(recs[-4:]) < np.mean(recs[:4])
    assert sum(step["grad_norm"] == 0 for step in steps()) < 20, "few steps overflow"


@pytest.mark.parametrize("world", [2, 1])
@torch.no_grad()
def test_overflow_in_every_step_stops_with_advice_that_works(world, tmp_path):
    vae = T5VAE(AutoConfig.for_model(**SMALL).to_dict() | {"tie_word_embeddings": False}, 5)
    for name, weight in vae.named_parameters():
        weight *= 3e3 if "lm_head" in name else 1 if "norm" in name else 1e-2
    with torch.enable_grad():
        flags, steps = training(tmp_path, vae, "--epochs", 2, "--save-every", 0)
        assert run_all(*[(into, tmp_path / "errors", flags)] * world) == [1] * world
        said = (tmp_path / "errors").read_text().splitlines()
        assert [line[:9] for line in said if "--amp off" in line] == ["train.py:"] * world
        assert "Traceback" not in "".join(said)
        scales = [step["scale"] for step in steps()]
        assert len(scales) <= 20
        assert scales[0] > scales[-1]
        flags[flags.index("fp16")] = "off"
        assert run_all(*[(into, tmp_path / "errors", [*flags, "--resume"])] * world) == [0] * world
        assert len(steps()) == 40


# ------------------------------------------------------------------------------- the Python API


def test_texts_in_and_out(hub):
    vae = load(hub("t5-small")[0])
    mu = vae.encode_texts(TEXTS)[0]
    values = type("Series", (), {"__iter__": lambda _: iter(TEXTS)})()  # as pandas has: no sequence
    for texts in (
        TEXTS,
        iter(TEXTS),
        tuple(TEXTS),
        dict.fromkeys(TEXTS).keys(),
        np.array(TEXTS),
        values,
    ):
        assert torch.equal(vae.encode_texts(texts)[0], mu)
    with pytest.raises(InputError, match=r"encode_texts\(\['a king'\]\)"):
        vae.encode_texts("a king")
    for texts in [None], ["a", 1], [b"a"], [["a"]], [float("nan")]:
        with pytest.raises(InputError, match="must be a str"):
            vae.encode_texts(texts)
    assert (
        torch.pdist(vae.encode_texts(["a", "a </s>", "a <pad>", "a <extra_id_0>"])[0]).min() > 1e-3
    )
    written = vae.decode_texts(mu, max_new_tokens=5)
    for z in mu.numpy(), mu.double().numpy(), mu.tolist():
        assert vae.decode_texts(z, max_new_tokens=5) == written
    for z in mu[0], mu[:, :3], mu[None]:
        with pytest.raises(InputError, match=r"it must be \(N, 5\)"):
            vae.decode_texts(z)
    assert len(vae.decode_texts(mu, 3, num_return_sequences=2, do_sample=True, max_length=5)) == 8


@pytest.mark.parametrize("kind", ["t5-small", "flan", "umt5"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind, dtype, hub):
    vae = load(hub(kind)[0])
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
    four = {"max_new_tokens": 4, "eos_token_id": 255}
    assert vae.generate(z, do_sample=True, num_return_sequences=2, **four).shape == (6, 5)
    beams = vae.generate(z, num_beams=3, num_return_sequences=2, **four)
    alone = [vae.generate(row[None], num_beams=3, num_return_sequences=2, **four) for row in z]
    assert torch.equal(beams, torch.cat(alone)), "each sentence depends on its own z alone"
    greedy = vae.generate(z, **four)
    for flags in (
        {"top_k": 1, "do_sample": True},
        {"top_p": 1e-6, "do_sample": True},
        {"use_cache": False},
    ):
        assert torch.equal(vae.generate(z, **four, **flags), greedy)
    with pytest.raises(ValueError, match="max_tokens"):
        vae.generate(z, max_tokens=4)


REPLACING = ["inputs", "input_ids", "encoder_outputs", "decoder_input_ids"]
REPLACING += ["inputs_embeds", "decoder_inputs_embeds", "past_key_values"]


@pytest.mark.parametrize("name", REPLACING)
def test_what_would_replace_z_is_refused(name, hub):
    with pytest.raises(InputError, match=f"generate takes no {name}"):
        load(hub("t5-small")[0]).generate(torch.randn(3, 5), **{name: torch.zeros(3, 1, 32)})


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


@pytest.mark.parametrize("kind", ["t5-small", "mt5", "umt5"])
@torch.no_grad()
def test_every_attention_masks_padding(kind, hub):
    vae = load(hub(kind)[0])
    ids, mask = labels_of(vae, TEXTS[:1])
    alone = vae.encode(ids, mask)[0]
    for name in "eager", "sdpa":
        vae.t5.set_attn_implementation(name)
        for padding in 0, 5:
            padded = F.pad(ids, (0, padding)), F.pad(mask, (0, padding))
            torch.testing.assert_close(vae.encode(*padded)[0], alone, atol=1e-5, rtol=1e-5)
        unmasked = vae.encode(padded[0], torch.ones_like(padded[1]))[0]
        assert (unmasked - alone).abs().max() > 1e-3, "the control"


# ------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("kind", ["shared", "tiny", "t5-small", "t5-v1_1", "mt5", "umt5", "byt5"])
def test_text_is_text(kind, hub, tmp_path):
    if kind == "shared" and not REAL.is_dir():
        pytest.skip(f"no {REAL}")
    if kind == "tiny":
        tokenizer = data.train_tokenizer([*TEXTS, "</s> <pad> <extra_id_10>"] * 3, 90)
    else:
        folder = REAL if kind == "shared" else hub(kind)[0]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows, unk = data.tokenize(MARKED, tokenizer), tokenizer.unk_token_id
    for row in rows:
        assert (set(tokenizer.all_special_ids) - {unk}).isdisjoint(row)
    if kind != "shared":  # whose vocabulary has no "<"
        assert data.detokenize(rows, tokenizer) == MARKED
    ptb = data.tokenize(["king <unk> a"], tokenizer)
    assert ptb[0].count(unk) == 1
    assert data.detokenize(ptb, tokenizer) == ["king <unk> a"]  # byt5 core bug: "king <unk>a"
    (tmp_path / "train.txt").write_text("\n".join(MARKED))
    corpus = data.load_corpus(str(tmp_path), "train", tokenizer)
    assert [corpus.row(i).tolist() for i in range(len(rows))] == [[*row, 1] for row in rows]


def test_the_unknown_token_is_no_regular_expression():
    tokenizer = transformers.ByT5Tokenizer(unk_token="<|unk|>")
    assert data.detokenize(data.tokenize(["a < b"], tokenizer), tokenizer) == ["a < b"]


# ------------------------------------------------------------------------------------------- hub


class Repository(http.server.BaseHTTPRequestHandler):
    """me/my-t5, the files of `server.folder`. It can be slow, and break off within the weights."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        for start in range(0, len(content) if self.command == "GET" else 0, 20_000):
            time.sleep(0.05 if self.server.mode == "slow" else 0)
            if self.server.mode == "broken" and "safetensors" in self.path and start >= 20_000:
                return self.connection.shutdown(socket.SHUT_RDWR)
            self.wfile.write(content[start : start + 20_000])

    def do_GET(self):
        path, commit = self.path.split("?")[0], "c" * 40
        file = self.server.folder / path.rsplit("/", 1)[-1]
        names = [path.name for path in self.server.folder.iterdir()]
        self.server.asked += [file.name] * (self.command == "GET")
        if path.startswith("/api/models/me/my-t5"):
            info = {"id": "me/my-t5", "sha": commit, "siblings": [{"rfilename": n} for n in names]}
            if "/tree/" in path:
                info = [{"type": "file", "path": name, "size": 1, "oid": name} for name in names]
            return self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        if not path.startswith("/me/my-t5/resolve/") or file.name not in names:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content, first = file.read_bytes(), self.headers.get("Range", "bytes=0-")[6:].split("-")[0]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.name}"', "Accept-Ranges": "bytes"}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.answer(206 if "Range" in self.headers else 200, content[int(first) :], headers)

    do_HEAD = do_GET


def test_a_hub_that_is_slow_or_breaks_off(hub, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Repository)
    server.folder = hub("flan")[0]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    texts = [f"{text} {i}" for i in range(20) for text in TEXTS]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    command = [
        sys.executable,
        ROOT / "train.py",
        "--dataset",
        tmp_path / "texts.txt",
        "--phase",
        "1",
    ]
    command += ["--model", "me/my-t5", "--limit", "4", "--epochs", "1", "--out", tmp_path / "out"]
    address = f"http://127.0.0.1:{server.server_port}"
    variables = os.environ | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
    variables |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    for mode in "broken", "slow":
        server.mode, server.asked = mode, []
        run = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert "Traceback" not in run.stderr
        assert run.returncode == (mode == "broken"), run.stderr
        if mode == "broken":
            told = [line for line in run.stderr.splitlines() if line.startswith("train.py: ")]
            assert len(told) == 1, run.stderr
            assert "me/my-t5" in told[0]
            assert not (tmp_path / "out").exists()
            weights = [i for i, name in enumerate(server.asked) if name.endswith(".safetensors")]
            assert server.asked.index("spiece.model") < weights[0]
    server.shutdown()
