"""A pretrained T5, turned into a variational autoencoder by finetuning (Park & Lee 2021).

The way of a sentence through the model:

    ids --T5 encoder--> hidden states --pool--> h --W_mu, W_logvar--> (mu, logvar)       Eq. 3
    z = mu + exp(logvar / 2) * eps                                                       Eq. 4
    memory = z W_proj, the sole key and value of every decoder layer's cross-attention   Eq. 5
    logits = T5 decoder(memory);  rec = -log p(x|z), summed over the sentence's tokens   Eq. 1

Symbols, in comments and docstrings:

    B  sentences in a batch         T  tokens of a sentence, </s> included
    D  width (`d_model`)            L  decoder layers (`num_decoder_layers`)
    A  attention heads (`num_heads`)  S  size of a head (`d_kv`)
    V  vocabulary                   Z  latent dimension

All likelihoods are in nats. As a program (`python vae.py --help`) it reconstructs, samples, interpolates, ...
"""

import argparse
import json
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

FAMILY = ("t5", "mt5")  # model types; v1.1, flan, ByT5 and UL2 are "t5" too
POOLINGS = ("max", "mean", "last")
POOL_LAYERS = ("last", "all")


def pool(hidden, attention_mask, pooling="max"):
    """One vector a sentence from the states of its real tokens; padding never counts (section 2.2.5).

    Args:
        hidden: (B, T, D) states.
        attention_mask: (B, T), 1 on real tokens, at least one in each row.
        pooling: "max" or "mean" over the tokens, or the state of the "last" one.
    Returns: (B, D)
    """
    real = attention_mask.bool()[:, :, None]  # (B, T, 1)
    if pooling == "max":
        return hidden.masked_fill(~real, -torch.inf).amax(1)
    if pooling == "mean":
        return hidden.masked_fill(~real, 0).sum(1) / real.sum(1)
    last = real.shape[1] - 1 - real[:, :, 0].int().flip(1).argmax(1)  # (B,)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class LatentCrossAttention(nn.Module):
    """Cross-attention with one key, which is T5's cross-attention without what cannot matter.

    A softmax over a single key is 1, so every query receives the value itself: layer l adds W_o m[:, l] to
    every position. Query and key projections and the layer norm before them drop out of the computation,
    and so they go. Takes the place of a decoder block's `layer[1]`, with the same call.

    Differs from T5: in training, T5 would also apply dropout to the attention weight, here the constant 1.
    """

    def __init__(self, cross_attention, layer):
        super().__init__()
        self.layer = layer
        self.o = cross_attention.EncDecAttention.o
        self.dropout = cross_attention.dropout

    def forward(self, hidden_states, key_value_states, **kwargs):
        added = self.o(key_value_states[:, self.layer, None])  # (B, 1, A*S) -> (B, 1, D)
        return hidden_states + self.dropout(added.expand_as(hidden_states)), None, None


# ---------------------------------------------------------------------------------------- the same, faster


def multiply(a, b):
    """a b^T of matrices (M, K) and (N, K), contiguous or the transpose of a contiguous one: (M, N).

    On a CPU in float32 oneDNN does it, which uses AVX-512 on every CPU that has it. What PyTorch calls by default,
    MKL, does so on Intel's alone: on AMD's it takes twice the time. The operator is private to torch, whose version
    requirements.txt pins.
    """
    if a.is_cpu and a.dtype == b.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


class _Product(torch.autograd.Function):
    """x W^T with `multiply`, forward and backward; no gradient is computed that nobody needs."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return multiply(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, weight), (needs_x, needs_weight) = ctx.saved_tensors, ctx.needs_input_grad
        grad = grad.contiguous()
        return multiply(grad, weight.T) if needs_x else None, multiply(grad.T, x.T) if needs_weight else None


class Linear(nn.Linear):
    """A linear layer without bias that multiplies with `multiply`; under autocast and on a GPU, torch's own."""

    def forward(self, x):
        if self.bias is not None or not x.is_cpu or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return _Product.apply(rows, self.weight).view(*x.shape[:-1], -1)


class _Drop(torch.autograd.Function):
    """x * kept * scale, which keeps no more for the backward pass than a byte an element."""

    @staticmethod
    def forward(ctx, x, kept, scale):
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return kept.to(x.dtype).mul_(scale).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.saved_tensors[0].to(grad.dtype).mul_(ctx.scale).mul_(grad), None, None


class _DropOfReLU(torch.autograd.Function):
    """relu(x) * kept * scale, which keeps its result alone: where that is positive the gradient passes."""

    @staticmethod
    def forward(ctx, x, kept, scale):
        out = kept.to(x.dtype).mul_(scale).mul_(x).clamp_(min=0)
        ctx.save_for_backward(out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return (ctx.saved_tensors[0] > 0).to(grad.dtype).mul_(ctx.scale).mul_(grad), None, None


class Dropout(nn.Dropout):
    """Dropout from 16 random bits an element, where torch draws 64 on a CPU: a third of the time.

    The rate is p to within 2^-17, and kept elements are divided by exactly what is kept on average.
    """

    def draw(self, x):
        """What to keep of x, and its scale; None where torch's own dropout is as good."""
        drop = round(self.p * 2**16)  # of 2^16
        if not (self.training and x.is_cpu and 0 < drop < 2**16):
            return None
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        return bits[: x.numel()].view(x.shape) >= drop - 2**15, 2**16 / (2**16 - drop)

    def forward(self, x):
        drawn = self.draw(x)
        return _Drop.apply(x, *drawn) if drawn else super().forward(x)


class DropoutOfReLU(Dropout):
    """A ReLU and the dropout after it, in the widest place of T5, for half of the memory."""

    def forward(self, x):
        drawn = self.draw(x)
        return _DropOfReLU.apply(x, *drawn) if drawn else nn.Dropout.forward(self, x.relu())


class TokenNats(torch.autograd.Function):
    """-log softmax(h W^T)[label] of N tokens: (N,), nats. The (N, V) logits are never there, only CHUNK rows of them.

    Their gradient is computed right after them, in the forward pass. It is that of the sum over the tokens, which
    `backward` scales: exactly what is needed for h, whose rows belong to one token each, and for W where all tokens
    weigh the same, as in a mean over sentences. Otherwise the tokens of each weight are computed anew.

    Args: hidden (N, D); weight (V, D), of the LM head, whose gradient is only computed if it is trained; labels (N,).
    """

    CHUNK = 256  # 32 MiB of logits

    @staticmethod
    def run(hidden, weight, labels, needs_hidden, needs_weight):
        """(N,) nats, and the gradients of their sum: (N, D) and (V, D), or None where they are not needed."""
        nats, d_hidden, d_weight = [], [], torch.zeros_like(weight) if needs_weight else None
        for h, label in zip(hidden.split(TokenNats.CHUNK), labels.split(TokenNats.CHUNK), strict=True):
            h = h.to(weight.dtype)
            logits = multiply(h, weight).float()  # (C, V)
            nats.append(F.cross_entropy(logits, label, reduction="none"))
            if needs_hidden or needs_weight:
                d_logits = logits.softmax(1)
                d_logits[torch.arange(len(label), device=label.device), label] -= 1
                d_logits = d_logits.to(weight.dtype)
            if needs_hidden:
                d_hidden.append(multiply(d_logits, weight.T).float())
            if needs_weight:
                d_weight.addmm_(d_logits.T, h)  # in place: here another (V, D) would cost more than MKL does
        return torch.cat(nats), torch.cat(d_hidden) if needs_hidden else None, d_weight

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        nats, d_hidden, ctx.d_weight = TokenNats.run(hidden, weight, labels, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(hidden, weight, labels, d_hidden)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, labels, d_hidden = ctx.saved_tensors
        d_weight, ctx.d_weight = ctx.d_weight, None  # scaled in place, so it serves once
        if d_weight is not None and (grad == grad[0]).all():
            d_weight.mul_(grad[0])
        elif ctx.needs_input_grad[1]:
            groups = ((g, grad == g) for g in grad.unique())
            d_weight = sum(g * TokenNats.run(hidden[at], weight, labels[at], False, True)[2] for g, at in groups)
        return d_hidden * grad[:, None] if ctx.needs_input_grad[0] else None, d_weight, None


def quicken(module):
    """Give the linear layers and the dropout of a module, a T5 say, forms that are faster on a CPU, in place."""
    for part in module.modules():
        if faster := {nn.Linear: Linear, nn.Dropout: Dropout}.get(type(part)):
            part.__class__ = faster  # the same weights under the same names
        if isinstance(getattr(part, "act", None), nn.ReLU):  # a feed-forward layer
            part.act, part.dropout = DropoutOfReLU(part.dropout.p), nn.Identity()
    return module


def _with_latent_cross_attention(t5):
    """Replace the cross-attention of `t5`, a T5 encoder-decoder with pretrained or random weights, in place."""
    for layer, block in enumerate(t5.decoder.block):
        block.layer[1] = LatentCrossAttention(block.layer[1], layer)
    return quicken(t5)


class T5VAE(nn.Module, ModelHubMixin, tags=["t5", "vae"]):
    """q(z|x) and p(x|z) on the two halves of a T5.

    `T5VAE.from_t5("t5-small")` starts from a pretrained T5, `T5VAE.from_pretrained(dir)` from a saved VAE.

    Args:
        t5_config: the T5's configuration as a dictionary (`T5Config.to_dict()`); its weights are random here.
            "tie_word_embeddings" says whether the LM head is the token embedding (transformers 5 always says True).
        latent_dim: Z.
        pooling: "max", "mean" or "last".
        pool_layers: "last" pools the encoder's output, "all" the outputs of all its layers.
    """

    def __init__(self, t5_config: dict, latent_dim: int = 32, pooling: str = "max", pool_layers: str = "last"):
        super().__init__()
        if latent_dim < 0:
            raise ValueError(f"latent_dim is {latent_dim}; it must be 0 (a language model) or more")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}")
        if pool_layers not in POOL_LAYERS:
            raise ValueError(f"pool_layers is {pool_layers!r}; it must be one of {', '.join(POOL_LAYERS)}")
        if t5_config.get("model_type") not in FAMILY:
            raise ValueError(f"model_type is {t5_config.get('model_type')!r}; it must be one of {', '.join(FAMILY)}")
        self.pooling, self.pool_layers, self.tokenizer, self.folder = pooling, pool_layers, None, None
        config = AutoConfig.for_model(**t5_config)
        self.t5 = _with_latent_cross_attention(AutoModelForSeq2SeqLM.from_config(config))
        if not t5_config.get("tie_word_embeddings", True):  # a head of its own, which transformers 5 would tie
            self.t5.lm_head.weight = nn.Parameter(self.t5.lm_head.weight.detach().clone())
        self.w_mu = nn.Linear(config.d_model, latent_dim, bias=False)
        self.w_logvar = nn.Linear(config.d_model, latent_dim, bias=False)
        self.w_proj = nn.Linear(latent_dim, config.num_decoder_layers * config.num_heads * config.d_kv, bias=False)

    @classmethod
    def from_t5(cls, name_or_path, latent_dim=32, pooling="max", pool_layers="last"):
        """A VAE around a pretrained T5, from the hub or a directory, with its tokenizer.

        Everything pretrained is kept but what has nothing left to do (see `LatentCrossAttention`);
        W_mu, W_logvar and W_proj are new. Raises OSError where there is no such checkpoint, and ValueError
        where it is not a T5, a T5 v1.1 (flan, ByT5, UL2) or an mT5.
        """
        kind = AutoConfig.from_pretrained(name_or_path).model_type
        if kind not in FAMILY:
            raise ValueError(f"name_or_path is {name_or_path!r}, a {kind}; it must be one of {', '.join(FAMILY)}")
        t5 = AutoModelForSeq2SeqLM.from_pretrained(name_or_path, dtype=torch.float32)
        config = t5.config.to_dict() | {"tie_word_embeddings": t5.lm_head.weight is t5.shared.weight}
        del config["_name_or_path"]  # a path of this machine says nothing elsewhere
        vae = cls(config, latent_dim, pooling, pool_layers)
        t5.generation_config = vae.t5.generation_config  # a checkpoint may bring beams or penalties of its own
        vae.t5 = _with_latent_cross_attention(t5)
        vae.tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        return vae

    @property
    def latent_dim(self):
        return self.w_mu.out_features

    # ------------------------------------------------------------------------------ x -> z

    def encode(self, input_ids, attention_mask):
        """q(z|x) = N(mu, exp(logvar)), diagonal (Eq. 3; the paper's "log sigma" is the log variance).

        Args:
            input_ids, attention_mask: (B, T); padding is where the mask is 0.
        Returns: mu, logvar: (B, Z) each.
        """
        if self.latent_dim == 0:  # a language model has nothing to encode
            return (self.w_mu.weight.new_zeros(len(input_ids), 0),) * 2
        encoder = self.t5.encoder
        out = encoder(input_ids, attention_mask, output_hidden_states=self.pool_layers == "all")
        layers = [out.last_hidden_state]
        if self.pool_layers == "all":  # T5 normalizes the last layer alone; raw, inner states are hundreds in size
            layers += [encoder.final_layer_norm(h) for h in out.hidden_states[1:-1]]
        pooled = torch.stack([pool(h, attention_mask, self.pooling) for h in layers])  # (layers, B, D)
        h = pooled.amax(0) if self.pooling == "max" else pooled.mean(0)  # (B, D)
        return self.w_mu(h), self.w_logvar(h)

    def reparameterize(self, mu, logvar, generator=None, eps=None):
        """z = mu + sigma * eps (Eq. 4), (B, Z); eps is drawn from N(0, I) unless it is given."""
        if eps is None:
            eps = torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
        return mu + (logvar / 2).exp() * eps

    # ------------------------------------------------------------------------------ z -> x

    def memory(self, z):
        """(B, Z) -> (B, L, A*S): row l is what decoder layer l attends to (Eq. 5).

        A sentence's memory is made of its own z: `view` splits the last axis alone, no axis passes another.
        """
        return self.w_proj(z).view(len(z), self.t5.config.num_decoder_layers, -1)

    def _hidden(self, z, labels):
        """The decoder's output for `labels` shifted right, scaled for the LM head: (B, T, D)."""
        hidden = self.t5.decoder(
            self.t5.prepare_decoder_input_ids_from_labels(labels),
            encoder_hidden_states=self.memory(z),
            use_cache=False,
        ).last_hidden_state
        scaled = getattr(self.t5.config, "scale_decoder_outputs", False)  # T5 v1.1 and mT5 do not scale
        return hidden * hidden.shape[-1] ** -0.5 if scaled else hidden

    def decode(self, z, labels):
        """Teacher-forced logits of p(x|z): position t has seen z and labels[:, :t].

        Args:
            z: (B, Z).
            labels: (B, T) token ids that end in </s>, padded with T5's pad id.
        Returns: (B, T, V).
        """
        return self.t5.lm_head(self._hidden(z, labels))

    def rec(self, z, labels):
        """-log p(x|z) (Eq. 1): (B,), nats, positive, summed over a sentence's tokens, </s> included, padding not."""
        real = labels != self.t5.config.pad_token_id  # (B, T)
        weight, device = self.t5.lm_head.weight, labels.device.type
        if not torch.is_grad_enabled():  # which a Function is not told
            weight = weight.detach()
        if torch.is_autocast_enabled(device):  # which knows `lm_head`, but not what stands in for it
            weight = weight.to(torch.get_autocast_dtype(device))
        nats = TokenNats.apply(self._hidden(z, labels)[real], weight, labels[real])  # (N,), N real tokens in the batch
        return nats.new_zeros(labels.shape).masked_scatter(real, nats).sum(1)

    @torch.no_grad()
    def generate(self, z, max_new_tokens=256, **kwargs):
        """Token ids decoded from z (B, Z): (B, <= max_new_tokens + 1), the start token first, padded after </s>.

        Greedy unless `kwargs` say otherwise: they are those of T5's own `generate` (do_sample, temperature,
        top_k, top_p, num_beams, ...). Each sentence depends on its own z alone.
        """
        if kwargs.get("use_cache", True):  # one that grows: transformers' own has as many layers as the encoder
            kwargs["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        kwargs["encoder_outputs"] = BaseModelOutput(self.memory(z))
        return self.t5.generate(max_new_tokens=max_new_tokens, **kwargs)

    # ------------------------------------------------------------------------------ texts

    @torch.no_grad()
    def encode_texts(self, texts, batch_size=64, max_length=256):
        """q(z|x) of N texts: mu, logvar, (N, Z) each, on the CPU, in the order of the texts.

        Warns of texts longer than `max_length` tokens, </s> included, which are cut there, and of texts with
        characters that the vocabulary lacks.
        """
        texts, t = list(texts), self.tokenizer
        tokens = t(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        ids = [torch.tensor([*row[: max_length - 1], t.eos_token_id]) for row in tokens]
        long = sum(len(row) >= max_length for row in tokens)
        # A text may have the unknown token's own name, "<unk>", in it: PTB's do.
        unknown = sum(r.count(t.unk_token_id) > x.count(t.unk_token) for r, x in zip(tokens, texts, strict=True))
        for count, what in (long, f"longer than {max_length} tokens: cut"), (unknown, "with unknown characters"):
            if count:
                warnings.warn(f"{count} of {len(texts)} texts {what}", stacklevel=3)
        mu, logvar = (torch.zeros(len(texts), self.latent_dim) for _ in range(2))
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))  # little padding
        for at in _batches(len(texts), batch_size, "encode"):
            index = order[at : at + batch_size]
            batch = pad_sequence([ids[i] for i in index], batch_first=True, padding_value=self.t5.config.pad_token_id)
            mask = pad_sequence([torch.ones_like(ids[i]) for i in index], batch_first=True)  # (B, T)
            out = self.encode(batch.to(self.w_mu.weight.device), mask.to(self.w_mu.weight.device))
            mu[index], logvar[index] = (x.float().cpu() for x in out)
        return mu, logvar

    def decode_texts(self, z, batch_size=64, **kwargs):
        """The N texts that `generate(z, **kwargs)` writes for z (N, Z), a list of str. `<unk>` is kept."""
        t, texts = self.tokenizer, []
        hidden = set(t.all_special_ids) - {t.unk_token_id}
        for at in _batches(len(z), batch_size, "decode"):
            rows = self.generate(z[at : at + batch_size].to(self.w_mu.weight), **kwargs).tolist()
            rows = [[i for i in row if i not in hidden] for row in rows]
            # As the text was: no "it 's" made "it's", and a space before <unk>, which its token has swallowed.
            out = t.batch_decode(rows, clean_up_tokenization_spaces=False)
            texts += [re.sub(f" ?{t.unk_token}", f" {t.unk_token}", text).strip() for text in out]
        return texts

    # ------------------------------------------------------------------------------ phases and files

    def freeze_decoder(self):
        """Phase 1: only the encoder's blocks, W_mu and W_logvar stay trainable (sections 4 and 5.1).

        Frozen are the decoder, W_o, W_proj, the LM head, and the token embedding, which the encoder shares.
        """
        for module in (self.t5.decoder, self.t5.lm_head, self.t5.shared, self.w_proj):
            module.requires_grad_(False)
        return self

    def _save_pretrained(self, save_directory):  # config.json, the arguments of __init__, is ModelHubMixin's work
        # `named_parameters` names a tied weight once, always by the same name: equal models make equal files.
        safetensors.torch.save_file(dict(self.named_parameters()), Path(save_directory, "model.safetensors"))
        if self.tokenizer is not None:
            for key in ("is_local", "local_files_only", "additional_special_tokens"):  # where it was loaded from
                self.tokenizer.init_kwargs.pop(key, None)
            self.tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, name_or_path, **kwargs):
        """A saved VAE in eval mode, with its tokenizer: from its folder, a run folder of train.py, or the hub.

        `kwargs` are ModelHubMixin's (revision, token, ...). Raises FileNotFoundError where there is none, and
        ValueError, with the folder and what is wrong with it, where something else is.
        """
        folder = Path(name_or_path)
        if folder.is_dir():
            return super().from_pretrained(folder / "model" if (folder / "model").is_dir() else folder, **kwargs)
        try:
            return super().from_pretrained(name_or_path, **kwargs)
        except (OSError, HFValidationError) as error:
            reason = f"neither a folder here nor to be had from the hub ({str(error).splitlines()[0]})"
            raise FileNotFoundError(f"{name_or_path} is {reason}") from error

    @classmethod
    def _from_pretrained(cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **init):
        folder = Path(model_id)
        if not folder.is_dir():
            download = {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only}
            folder = Path(snapshot_download(model_id, revision=revision, token=token, **download))
        weights = folder / "model.safetensors"
        if "t5_config" not in init or not weights.is_file():
            lacks = "model.safetensors" if "t5_config" in init else "a config.json with t5_config"
            raise ValueError(f"{folder} holds no T5VAE: it lacks {lacks}")
        try:
            vae, saved = cls(**init), safetensors.torch.load_file(weights)
            if wrong := sorted(saved.keys() ^ dict(vae.named_parameters()).keys()):
                raise ValueError(f"{wrong[0]} is {'not expected' if wrong[0] in saved else 'missing'}")
            vae.load_state_dict(saved, strict=False)  # False: a tied weight is there under one of its names
        except (ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder}: model.safetensors is not what config.json describes: {error}") from error
        if (folder / "tokenizer_config.json").is_file():
            vae.tokenizer = AutoTokenizer.from_pretrained(folder)
        vae.folder = folder
        return vae.eval()

    def generate_model_card(self, run=None, **kwargs):
        """The README.md of a saved model, a `huggingface_hub.ModelCard`.

        With `run`, a folder with config.json and metrics.json, it says how the model was trained and what it
        measures on the test split. A model that was loaded has the run that it lies in, or the card that it came with.
        """
        own = self.folder.resolve() if self.folder else None
        if run is None and own and (own.parent / "config.json").is_file() and (own.parent / "metrics.json").is_file():
            run = own.parent
        if run is None and own and (own / "README.md").is_file():
            return ModelCard.load(own / "README.md")
        c, size = self.t5.config, sum(p.numel() for p in self.parameters())
        shape = (
            f"{c.model_type}, {c.num_layers} + {c.num_decoder_layers} layers, d_model {c.d_model}, {size:,} parameters"
        )
        text = MODEL_CARD.format(shape=shape, config=self._hub_mixin_config, data=self._hub_mixin_info.model_card_data)
        if run is not None:
            config, measures = (json.loads(Path(run, f"{name}.json").read_text()) for name in ("config", "metrics"))
            text += f"\nTrained by `{config.get('command')}`. On the test split (likelihoods in nats a sentence):\n"
            text += "\n| measure | value |\n| --- | ---: |\n"
            shown = (name for name, value in measures.items() if isinstance(value, int | float) and name[-3:] != "_se")
            text += "".join(f"| {name} | {round(measures[name], 3)} |\n" for name in shown)
        return ModelCard(text)


MODEL_CARD = """---
{data}
---

# T5-VAE

A T5 finetuned into a variational autoencoder of text (Park & Lee 2021, *Finetuning Pretrained Transformers into
Variational Autoencoders*): {shape}, {config[latent_dim]} latent dimensions, {config[pooling]} pooling.

```python
from vae import T5VAE

model = T5VAE.from_pretrained("this folder or repository")
mu, logvar = model.encode_texts(["A text."])
print(model.decode_texts(mu))
```
"""


def _batches(n, batch_size, what):
    """Where batches of n things begin, with a progress bar on stderr if there are several and it is a terminal."""
    return tqdm(range(0, n, batch_size), desc=what, leave=False, disable=None if n > batch_size else True)


# ---------------------------------------------------------------------------------------- the latent space


def interpolate(a, b, steps, spherical=False):
    """`steps` latents from a to b (Z,), both included, evenly spaced: (steps, Z).

    On a straight line, or `spherical`, at an even pace of the angle between a and b, in which the norm does not
    sink on the way (White 2016).
    """
    t = torch.linspace(0, 1, steps)[:, None]
    angle = torch.arccos(F.cosine_similarity(a, b, 0).clamp(-1, 1))
    if not spherical or angle.sin() < 1e-4:  # no arc between parallel latents
        return torch.lerp(a, b, t)
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def active_dimensions(model, n=256):
    """The dimensions of z, those first whose posterior mean varies most over texts: (Z,).

    The texts are n that the model itself writes from the prior, because a saved model comes without its data.
    """
    texts = model.decode_texts(torch.randn(n, model.latent_dim), max_new_tokens=64)
    return model.encode_texts(texts)[0].var(0).argsort(descending=True)


# ---------------------------------------------------------------------------------------- command line


def read_lines(path):
    """The stripped lines of a UTF-8 file, "-" for standard input; bytes that are not UTF-8 become U+FFFD."""
    if path == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        return [line.strip() for line in sys.stdin]
    with open(path, encoding="utf-8", errors="replace") as lines:
        return [line.strip() for line in lines]


def read_group(path):
    """The lines of a file that are not empty, at least one."""
    if lines := [line for line in read_lines(path) if line]:
        return lines
    raise ValueError(f"{path} holds no text")


def read_texts(args):
    """The texts of a command: TEXT ... and --file, or standard input. An empty line is an empty text."""
    given = args.text or ([] if args.file else ["-"])
    texts = [line for text in given for line in (read_lines("-") if text == "-" else [text])]
    return texts + (read_lines(args.file) if args.file else [])


def encode(model, args, texts):
    # A command line that is not UTF-8 arrives with surrogates, which are no characters.
    texts = [text.strip().encode(errors="surrogateescape").decode(errors="replace") for text in texts]
    return model.encode_texts(texts, args.batch_size, args.max_length)


def decode(model, args, z):
    """Greedy decoding, or a search with beams, or sampling where an option of it is given."""
    kwargs = {"max_new_tokens": args.max_length, "num_beams": args.num_beams}
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    if any(value is not None for value in sampling.values()):
        # What is not given is off: transformers' own default keeps the 50 most likely tokens.
        default = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        kwargs |= {"do_sample": True} | default | {k: v for k, v in sampling.items() if v is not None}
    return model.decode_texts(z, args.batch_size, **kwargs)


def pairs(texts, outputs):
    return [{"text": text, "output": output} for text, output in zip(texts, outputs, strict=True)]


def run_reconstruct(model, args):
    texts = read_texts(args)
    z, logvar = encode(model, args, texts)
    if args.samples:
        texts = [text for text in texts for _ in range(args.samples)]
        z = model.reparameterize(*(x.repeat_interleave(args.samples, 0) for x in (z, logvar)))
    return pairs(texts, decode(model, args, z))


def run_sample(model, args):
    return [{"output": output} for output in decode(model, args, torch.randn(args.n, model.latent_dim))]


def run_interpolate(model, args):
    mu, _ = encode(model, args, [args.a, args.b])
    return [{"output": output} for output in decode(model, args, interpolate(*mu, args.steps, args.spherical))]


def run_arithmetic(model, args):
    source, target = (encode(model, args, read_group(path))[0].mean(0) for path in (args.source, args.target))
    texts = read_texts(args)
    return pairs(texts, decode(model, args, encode(model, args, texts)[0] + args.k * (target - source)))


def run_neighbors(model, args):
    lines = read_group(args.lines)
    mu, _ = encode(model, args, [args.query, *lines])
    distance, index = (mu[1:] - mu[0]).norm(dim=1).sort(stable=True)
    nearest = list(zip(distance.tolist(), index.tolist(), strict=True))[: args.n]
    return [{"text": args.query, "distance": d, "output": lines[i]} for d, i in nearest]


def run_traverse(model, args):
    mu, _ = encode(model, args, [args.query])
    if wrong := [dim for dim in args.dim or [] if not 0 <= dim < model.latent_dim]:
        raise ValueError(f"--dim is {wrong[0]}; it must be in [0, {model.latent_dim})")
    dims = args.dim or active_dimensions(model)[:5].tolist()
    rows = [(dim, value) for dim in dims for value in torch.linspace(-3, 3, args.steps).tolist()]
    z = mu.repeat(len(rows), 1)
    for row, (dim, value) in zip(z, rows, strict=True):
        row[dim] = value
    outputs = decode(model, args, z)
    return [{"text": args.query, "dim": d, "value": v, "output": o} for (d, v), o in zip(rows, outputs, strict=True)]


def run_encode(model, args):
    texts = read_lines(args.lines)
    mu, logvar = encode(model, args, texts)
    if args.out:
        with open(args.out, "wb") as file:
            np.savez(file, mu=mu.numpy(), logvar=logvar.numpy())
        return []
    args.json = True
    return [{"text": t, "mu": m, "logvar": v} for t, m, v in zip(texts, mu.tolist(), logvar.tolist(), strict=True)]


def at_least(low, kind=int, high=float("inf")):
    """An argparse type: a number of `kind` in [low, high]."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            allowed = f"below {low}" if high == float("inf") else f"not in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"{text} is {allowed}")
        return value

    number.__name__ = kind.__name__
    return number


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="vae.py",
        description="Use the latent space of a trained T5-VAE. RUN is a run folder, a model folder or a hub name.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(run, summary, texts=False, decodes=True):
        """A subcommand with the options that it shares; returns its `add_argument`."""
        name = run.__name__.removeprefix("run_")
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        flag = sub.add_argument
        flag("model", metavar="RUN")
        if texts:
            flag("text", nargs="*", metavar="TEXT", help="a text; - is the lines of standard input, as is none at all")
            flag("--file", metavar="FILE", help="texts, one a line")
        flag("--json", action="store_true", help="a JSON object a line, with the input")
        flag("--batch-size", type=at_least(1), default=64, metavar="N", help="texts at a time (64)")
        flag("--max-length", type=at_least(2), default=256, metavar="TOKENS", help="longest text, </s> included (256)")
        flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if decodes:
            flag("--seed", type=int, default=0, help="of everything random (0)")
            flag("--temperature", type=at_least(1e-3, float), metavar="T", help="sample tokens, at temperature T")
            flag("--top-k", type=at_least(1), metavar="K", help="sample from the K most likely tokens")
            flag("--top-p", type=at_least(1e-9, float, 1), metavar="P", help="sample from the most likely share P")
            flag("--num-beams", type=at_least(1), default=1, metavar="N", help="beam search; 1 is greedy decoding (1)")
        return flag

    flag = command(run_reconstruct, "Decode the posterior means of texts.", texts=True)
    flag("--samples", type=at_least(1), metavar="N", help="decode N samples of each posterior instead")
    flag = command(run_sample, "Decode samples of the prior.")
    flag("-n", type=at_least(1), default=10, help="how many (10)")
    flag = command(run_interpolate, "Decode latents on the way from the posterior mean of A to that of B.")
    flag("a", metavar="A")
    flag("b", metavar="B")
    flag("--steps", type=at_least(2), default=7, metavar="N", help="texts, the two ends included (7)")
    flag("--spherical", action="store_true", help="on an arc instead of a straight line")
    flag = command(run_arithmetic, "Add the difference of two groups' mean latents to texts.", texts=True)
    flag("--from", required=True, dest="source", metavar="FILE", help="texts of the first group, one a line")
    flag("--to", required=True, dest="target", metavar="FILE", help="texts of the second group")
    flag("--k", type=float, default=1.0, help="times the difference (1)")
    flag = command(run_neighbors, "Print the lines of FILE nearest to TEXT, by posterior mean.", decodes=False)
    flag("lines", metavar="FILE", help="texts, one a line; - is standard input")
    flag("query", metavar="TEXT")
    flag("-n", type=at_least(1), default=10, help="how many (10)")
    flag = command(run_traverse, "Decode TEXT with one dimension of its posterior mean set from -3 to 3.")
    flag("query", metavar="TEXT")
    flag("--dim", type=int, nargs="+", metavar="I", help="dimensions, from 0 (the 5 most active)")
    flag("--steps", type=at_least(2), default=7, metavar="N", help="values (7)")
    flag = command(run_encode, "Write mu and logvar of the lines of FILE.", decodes=False)
    flag("lines", nargs="?", default="-", metavar="FILE", help="texts, one a line; - is standard input (-)")
    flag("-o", dest="out", metavar="OUT.npz", help="arrays mu and logvar, a row a line (JSON lines to standard output)")
    if argv and argv[0] in commands.choices:  # intermixed: TEXT may stand after options too
        return commands.choices[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)


def show(row, as_json):
    """A row as a line: JSON, or what is new in it, separated by tabs."""
    if as_json:
        return json.dumps(row, ensure_ascii=False)
    cells = (f"{value:.3f}" if isinstance(value, float) else str(value) for key, value in row.items() if key != "text")
    return "\t".join(cell.translate(dict.fromkeys(b"\t\n\r", " ")) for cell in cells)  # one line, whatever is in it


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"vae.py: {message}", file=sys.stderr)
        try:
            model = T5VAE.from_pretrained(args.model).to(args.device)
            if model.tokenizer is None:
                raise ValueError(f"{args.model} holds a model without a tokenizer")
            torch.manual_seed(getattr(args, "seed", 0))
            for row in args.run(model, args):
                print(show(row, args.json))
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, `head` say, has enough: leave as a program that SIGPIPE ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
            sys.exit(141)
        except KeyboardInterrupt:
            sys.exit(130)
        except (OSError, ValueError) as error:
            sys.exit(f"vae.py: {error}")


if __name__ == "__main__":
    main()
