"""A pretrained T5, turned into a variational autoencoder by finetuning (Park & Lee 2021).

How a sentence passes through the model:

    ids --T5 encoder--> hidden states --pool--> h --W_mu, W_logvar--> (mu, logvar)       Eq. 3
    z = mu + exp(logvar / 2) * eps                                                       Eq. 4
    memory = z W_proj, the sole key and value of every decoder layer's cross-attention   Eq. 5
    logits = T5 decoder(memory);  rec = -log p(x|z), summed over the sentence's tokens   Eq. 1

Symbols in comments and docstrings, with the field of `T5Config` where there is one:

    B  sentences in a batch            T  tokens of a sentence, </s> included
    D  width, `d_model`                L  decoder layers, `num_decoder_layers`
    A  attention heads, `num_heads`    S  size of a head, `d_kv`
    V  vocabulary, `vocab_size`        Z  latent dimension

All likelihoods are in nats. T5's layers are those of `transformers`; this file adds what makes them a VAE.
"""

import json
import warnings
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from data import detokenize

FAMILY = ("t5", "mt5")  # `model_type` of what can be the start; v1.1, flan, ByT5 and UL2 are "t5" too
POOLINGS = ("max", "mean", "last")
POOL_LAYERS = ("last", "all")
LOSS_SLICE = 2048  # target positions whose logits exist at one time: 2048 * 32,128 * 4 bytes = 263 MB for t5-small


def pool(hidden, attention_mask, pooling="max"):
    """One vector per sentence from the states of its real tokens; padding never counts (section 2.2.5).

    hidden: (B, T, D); attention_mask: (B, T), 1 on real tokens, at least one in each row; pooling: "max" or "mean" over
    the tokens, or the state of the "last" one. Returns: (B, D).
    """
    real = attention_mask.bool()[:, :, None]  # (B, T, 1)
    if pooling == "max":
        return hidden.masked_fill(~real, -torch.inf).amax(1)
    if pooling == "mean":
        return hidden.masked_fill(~real, 0).sum(1) / real.sum(1)
    last = real.shape[1] - 1 - real[:, :, 0].int().flip(1).argmax(1)  # (B,)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class LatentCrossAttention(nn.Module):
    """Cross-attention with one key: T5's cross-attention without the parts that cannot matter.

    A softmax over a single key is 1, whatever the query. So every query receives the value itself: layer l adds
    W_o m[:, l] to every position. The query and key projections, and the layer norm before them, drop out of the
    computation, and this module leaves them out. It replaces a decoder block's `layer[1]` and is called like it.
    """

    def __init__(self, cross_attention, layer):
        super().__init__()
        self.layer = layer
        self.o = cross_attention.EncDecAttention.o
        self.dropout = cross_attention.dropout

    def forward(self, hidden_states, key_value_states, **kwargs):
        added = self.o(key_value_states[:, self.layer, None])  # (B, L, A*S) -> (B, 1, A*S) -> (B, 1, D)
        return hidden_states + self.dropout(added.expand_as(hidden_states)), None, None


class T5VAE(nn.Module, ModelHubMixin, tags=["t5", "vae"], paper_url="https://aclanthology.org/2021.insights-1.5/"):
    """q(z|x) and p(x|z) on the two halves of a T5.

    `T5VAE.from_t5("t5-small")` starts from a pretrained T5, `T5VAE.from_pretrained(folder)` loads a saved VAE.
    `save_pretrained` and `push_to_hub` (from ModelHubMixin) write config.json, model.safetensors and the tokenizer.

    Args:
        t5_config: the T5's configuration as a dictionary (`T5Config.to_dict()`); its weights are random here.
            "tie_word_embeddings" says whether the LM head is the token embedding (transformers 5 always says True).
        latent_dim: Z; 0 makes a language model, the same decoder with nothing encoded.
        pooling: "max", "mean" or "last"; see `pool`.
        pool_layers: "last" pools the encoder's output, "all" the outputs of all its layers. Else ValueError.
    """

    def __init__(self, t5_config: dict, latent_dim: int = 32, pooling: str = "max", pool_layers: str = "last"):
        super().__init__()
        if latent_dim < 0:
            raise ValueError(f"latent_dim is {latent_dim}; it must be 0 (a language model) or more")
        for name, value, allowed in ("pooling", pooling, POOLINGS), ("pool_layers", pool_layers, POOL_LAYERS):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        self.latent_dim, self.pooling, self.pool_layers, self.tokenizer = latent_dim, pooling, pool_layers, None
        config = AutoConfig.for_model(**t5_config)
        self.t5 = AutoModelForSeq2SeqLM.from_config(config)
        # The maximum of states of which some are dropped and the others scaled up is larger than theirs: with dropout
        # right before pooling, mu in training is not mu in evaluation. (T5 uses this module on the embeddings too.)
        self.t5.encoder.dropout = nn.Identity()
        for layer, block in enumerate(self.t5.decoder.block):
            block.layer[1] = LatentCrossAttention(block.layer[1], layer)
        if not t5_config.get("tie_word_embeddings", True):  # a head of its own, which transformers 5 would tie
            self.t5.lm_head.weight = nn.Parameter(self.t5.lm_head.weight.detach().clone())
        with warnings.catch_warnings():  # a language model's have no elements, which torch warns of
            warnings.filterwarnings("ignore", "Initializing zero-element")
            self.w_mu = nn.Linear(config.d_model, latent_dim, bias=False)
            self.w_logvar = nn.Linear(config.d_model, latent_dim, bias=False)
            self.w_proj = nn.Linear(latent_dim, config.num_decoder_layers * config.num_heads * config.d_kv, bias=False)

    @classmethod
    def from_t5(cls, name_or_path, latent_dim=32, pooling="max", pool_layers="last"):
        """A VAE around a pretrained T5, from the hub or a directory, with its tokenizer.

        All pretrained weights are kept except those that have nothing left to do (see `LatentCrossAttention`);
        W_mu, W_logvar and W_proj are new. Raises OSError where there is no such checkpoint, and ValueError
        where it is not a whole T5, T5 v1.1 (flan, ByT5, UL2) or mT5.
        """
        model_type = AutoConfig.from_pretrained(name_or_path).model_type
        if model_type not in FAMILY:
            raise ValueError(f"name_or_path is {name_or_path!r}, a {model_type}; it must be one of {', '.join(FAMILY)}")
        t5, info = AutoModelForSeq2SeqLM.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):  # transformers would leave them random
            raise ValueError(f"{name_or_path} is no whole T5: it lacks {len(missing)} weights, as {missing[0]}")
        config = t5.config.to_dict() | {"tie_word_embeddings": t5.lm_head.weight is t5.shared.weight}
        del config["_name_or_path"]  # a path on this machine says nothing elsewhere
        vae = cls(config, latent_dim, pooling, pool_layers)
        # Weights only: a checkpoint may bring beams or penalties of its own. Strict: nothing may be lost on the way.
        weights = {name.replace("layer.1.EncDecAttention.o", "layer.1.o"): w for name, w in t5.state_dict().items()}
        vae.t5.load_state_dict({name: weights[name] for name in vae.t5.state_dict()})
        vae.tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        return vae

    @property
    def device(self):
        return self.w_mu.weight.device

    def encode(self, input_ids, attention_mask):
        """q(z|x) = N(mu, exp(logvar)), diagonal (Eq. 3; the paper's "log sigma" is the log variance).

        input_ids, attention_mask: (B, T). Returns: mu, logvar: (B, Z) each, float32 under autocast too.
        """
        if self.latent_dim == 0:  # a language model has nothing to encode
            return (self.w_mu.weight.new_zeros(len(input_ids), 0),) * 2
        encoder, mask = self.t5.encoder, attention_mask.bool()[:, None, None]  # (B, 1, 1, T)
        # Four axes: of a mask with two, T5 would ask whether it hides anything, and the CPU would wait for the answer.
        out = encoder(input_ids, mask, output_hidden_states=self.pool_layers == "all")
        layers = [out.last_hidden_state]
        if self.pool_layers == "all":  # T5 normalizes the last layer only; raw inner states reach hundreds
            layers += [encoder.final_layer_norm(h) for h in out.hidden_states[1:-1]]
        with torch.autocast(input_ids.device.type, enabled=False):  # what is exponentiated needs all of float32's bits
            pooled = torch.stack([pool(h.float(), attention_mask, self.pooling) for h in layers])  # (layers, B, D)
            h = pooled.amax(0) if self.pooling == "max" else pooled.mean(0)  # (B, D)
            return self.w_mu(h), self.w_logvar(h)

    def reparameterize(self, mu, logvar, generator=None, eps=None):
        """z = mu + sigma * eps (Eq. 4), (B, Z); eps is drawn from N(0, I) unless it is given."""
        if eps is None:
            eps = torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
        return mu + (logvar / 2).exp() * eps

    def memory(self, z):
        """(B, Z) -> (B, L, A*S): row l is what decoder layer l attends to (Eq. 5).

        Each sentence's memory comes from its own z: `view` splits the last axis alone, so no two axes mix.
        """
        return self.w_proj(z).view(len(z), self.t5.config.num_decoder_layers, -1)

    def _hidden(self, z, labels):
        """The decoder's output for `labels` shifted right, scaled for the LM head: (B, T, D)."""
        shifted = self.t5.prepare_decoder_input_ids_from_labels(labels)
        hidden = self.t5.decoder(shifted, encoder_hidden_states=self.memory(z), use_cache=False).last_hidden_state
        scaled = getattr(self.t5.config, "scale_decoder_outputs", False)  # T5 v1.1 and mT5 do not scale
        return hidden * hidden.shape[-1] ** -0.5 if scaled else hidden

    def decode(self, z, labels):
        """Teacher-forced logits of p(x|z): position t has seen z and labels[:, :t].

        z: (B, Z); labels: (B, T) token ids that end in </s>, padded with T5's pad id. Returns: (B, T, V).
        """
        return self.t5.lm_head(self._hidden(z, labels))

    def _token_nats(self, hidden, labels):
        """-log p of each label, 0 on padding: hidden (n, D), labels (n,) -> (n,), nats."""
        logits = self.t5.lm_head(hidden)  # (n, V)
        with torch.autocast(logits.device.type, enabled=False):
            return F.cross_entropy(logits.float(), labels, ignore_index=self.t5.config.pad_token_id, reduction="none")

    def rec(self, z, labels):
        """-log p(x|z) (Eq. 1): (B,), nats, positive, summed over a sentence's tokens, </s> included, padding not.

        The logits are the largest tensor of a step. Beyond LOSS_SLICE positions they are computed slice by slice,
        and again in the backward pass, so that they never exist all at once.
        """
        hidden, flat = self._hidden(z, labels).flatten(0, 1), labels.flatten()  # (B*T, D), (B*T,)
        if len(flat) <= LOSS_SLICE:
            nats = self._token_nats(hidden, flat)
        else:
            slices = zip(hidden.split(LOSS_SLICE), flat.split(LOSS_SLICE), strict=True)
            nats = torch.cat([checkpoint(self._token_nats, *part, use_reentrant=False) for part in slices])
        return nats.view(labels.shape).sum(1)

    @torch.no_grad()
    def generate(self, z, max_new_tokens=256, **kwargs):
        """Token ids decoded from z (B, Z): (B, <= max_new_tokens + 1), the start token first, padded after </s>.

        Greedy unless `kwargs` say otherwise: they are those of T5's own `generate` (do_sample, temperature,
        top_k, top_p, num_beams, ...). Each sentence depends on its own z alone.
        """
        if kwargs.get("use_cache", True):  # T5's default cache has as many layers as the encoder; this one grows
            kwargs["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        kwargs["encoder_outputs"] = BaseModelOutput(self.memory(z))
        return self.t5.generate(max_new_tokens=max_new_tokens, **kwargs)

    @torch.no_grad()
    def encode_texts(self, texts, batch_size=64, max_length=256):
        """q(z|x) of N texts: mu, logvar, (N, Z) each, on the CPU. Warns of those that are cut at `max_length`."""
        tokenizer, posteriors = self.tokenizer, [(torch.zeros(0, self.latent_dim),) * 2]
        rows = tokenizer(list(texts), verbose=False)["input_ids"] if len(texts) else []  # with </s>
        if too_long := sum(len(row) > max_length for row in rows):
            warnings.warn(f"{too_long} of {len(rows)} texts are cut at {max_length} tokens", stacklevel=3)
        rows = [row if len(row) <= max_length else [*row[: max_length - 1], tokenizer.eos_token_id] for row in rows]
        for start in range(0, len(rows), batch_size):
            batch = tokenizer.pad({"input_ids": rows[start : start + batch_size]}, return_tensors="pt").to(self.device)
            posteriors.append([x.cpu() for x in self.encode(batch["input_ids"], batch["attention_mask"])])
        return tuple(torch.cat(parts) for parts in zip(*posteriors, strict=True))

    def decode_texts(self, z, batch_size=64, **kwargs):
        """The N texts that `generate(z, **kwargs)` writes for z (N, Z), a list of str. `<unk>` is kept."""
        texts = []
        for part in z.split(batch_size) if len(z) else ():
            texts += detokenize(self.generate(part.to(self.w_mu.weight), **kwargs).tolist(), self.tokenizer)
        return texts

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
            self.tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, name_or_path, **download):
        """A saved VAE in eval mode, with its tokenizer: from its folder, a run folder of train.py, or the hub.

        `download` are the arguments of `snapshot_download` (revision, token, ...). Raises FileNotFoundError where
        there is none, and ValueError, with the folder and what is wrong with it, where it holds something else.
        """
        folder = Path(name_or_path)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(str(name_or_path), **download))
            except (OSError, HFValidationError) as error:
                reason = f"neither a folder here nor available from the hub ({str(error).splitlines()[0]})"
                raise FileNotFoundError(f"{name_or_path} is {reason}") from error
        folder = folder / "model" if (folder / "model").is_dir() else folder
        try:
            vae = cls(**json.loads((folder / "config.json").read_text()))
            saved = safetensors.torch.load_file(folder / "model.safetensors")
            if wrong := saved.keys() ^ dict(vae.named_parameters()).keys():
                raise ValueError(f"missing or not expected: {', '.join(sorted(wrong))}")
            vae.load_state_dict(saved, strict=False)  # a tied weight is there under one of its names
        except Exception as error:  # whatever files of another kind, or damaged ones, lead to
            raise ValueError(f"{folder} holds no T5VAE: its config.json or model.safetensors: {error}") from error
        if (folder / "tokenizer_config.json").is_file():
            vae.tokenizer = AutoTokenizer.from_pretrained(folder)
        return vae.eval()
