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

All likelihoods are in nats.
"""

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

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


def _with_latent_cross_attention(t5):
    """Replace the cross-attention of `t5`, a T5 encoder-decoder with pretrained or random weights, in place."""
    for layer, block in enumerate(t5.decoder.block):
        block.layer[1] = LatentCrossAttention(block.layer[1], layer)
    return t5


class T5VAE(nn.Module, ModelHubMixin):
    """q(z|x) and p(x|z) on the two halves of a T5.

    `T5VAE.from_t5("t5-small")` starts from a pretrained T5, `T5VAE.from_pretrained(dir)` from a saved VAE.

    Args:
        t5_config: the T5's configuration as a dictionary (`T5Config.to_dict()`); its weights are random here.
        latent_dim: Z.
        pooling: "max", "mean" or "last".
        pool_layers: "last" pools the encoder's output, "all" the outputs of all its layers.
    """

    def __init__(self, t5_config: dict, latent_dim: int = 32, pooling: str = "max", pool_layers: str = "all"):
        super().__init__()
        if latent_dim < 0:
            raise ValueError(f"latent_dim is {latent_dim}; it must be 0 (a language model) or more")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}")
        if pool_layers not in POOL_LAYERS:
            raise ValueError(f"pool_layers is {pool_layers!r}; it must be one of {', '.join(POOL_LAYERS)}")
        self.pooling, self.pool_layers, self.tokenizer = pooling, pool_layers, None
        config = AutoConfig.for_model(**t5_config)
        self.t5 = _with_latent_cross_attention(AutoModelForSeq2SeqLM.from_config(config))
        if not config.scale_decoder_outputs:  # T5 v1.1 and its kin: a head of its own, which transformers 5 would tie
            self.t5.lm_head.weight = nn.Parameter(self.t5.lm_head.weight.detach().clone())
        self.w_mu = nn.Linear(config.d_model, latent_dim, bias=False)
        self.w_logvar = nn.Linear(config.d_model, latent_dim, bias=False)
        self.w_proj = nn.Linear(latent_dim, config.num_decoder_layers * config.num_heads * config.d_kv, bias=False)

    @classmethod
    def from_t5(cls, name_or_path, latent_dim=32, pooling="max", pool_layers="all"):
        """A VAE around a pretrained T5, from the hub or a directory, with its tokenizer.

        Everything pretrained is kept but what has nothing left to do (see `LatentCrossAttention`);
        W_mu, W_logvar and W_proj are new. Raises OSError where there is no such checkpoint.
        """
        t5 = AutoModelForSeq2SeqLM.from_pretrained(name_or_path, dtype=torch.float32)
        if not hasattr(getattr(t5, "decoder", None), "block"):
            raise ValueError(f"name_or_path is {name_or_path!r}, a {t5.config.model_type}; it must be of the T5 family")
        vae = cls(t5.config.to_dict(), latent_dim, pooling, pool_layers)
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
        out = self.t5.encoder(input_ids, attention_mask, output_hidden_states=self.pool_layers == "all")
        if self.pool_layers == "all":
            layers = torch.stack([pool(h, attention_mask, self.pooling) for h in out.hidden_states[1:]])
            h = layers.amax(0) if self.pooling == "max" else layers.mean(0)  # (layers, B, D) -> (B, D)
        else:
            h = pool(out.last_hidden_state, attention_mask, self.pooling)
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
        return hidden * hidden.shape[-1] ** -0.5 if self.t5.config.scale_decoder_outputs else hidden

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
        logits = self.t5.lm_head(self._hidden(z, labels)[real])  # (N, V), N real tokens in the batch
        nats = F.cross_entropy(logits.float(), labels[real], reduction="none")  # (N,)
        return nats.new_zeros(labels.shape).masked_scatter(real, nats).sum(1)

    @torch.no_grad()
    def generate(self, z, max_new_tokens=256, **kwargs):
        """Token ids decoded from z (B, Z): (B, <= max_new_tokens + 1), the start token first, padded after </s>.

        Greedy unless `kwargs` say otherwise: they are those of T5's own `generate` (do_sample, temperature,
        top_k, top_p, num_beams, ...). Each sentence depends on its own z alone.
        """
        return self.t5.generate(
            encoder_outputs=BaseModelOutput(self.memory(z)), max_new_tokens=max_new_tokens, **kwargs
        )

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
            self.tokenizer.save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **init):
        if not Path(model_id).is_dir():
            model_id = snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        weights = Path(model_id, "model.safetensors")
        if "t5_config" not in init or not weights.exists():
            raise ValueError(
                f"{model_id} holds no T5VAE: it needs a config.json with t5_config and a model.safetensors"
            )
        vae = cls(**init)
        _, unexpected = vae.load_state_dict(saved := safetensors.torch.load_file(weights), strict=False)
        if unexpected or (missing := dict(vae.named_parameters()).keys() - saved):
            raise ValueError(f"{weights} is of another model: {sorted(unexpected or missing)[0]} does not belong")
        if Path(model_id, "tokenizer_config.json").exists():
            vae.tokenizer = AutoTokenizer.from_pretrained(model_id)
        return vae.eval()
