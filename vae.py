"""A pretrained T5, turned into a variational autoencoder by finetuning (Park & Lee 2021).

How a sentence passes through the model:

    ids --T5 encoder--> hidden states --pool--> h --W_mu, W_logvar--> (mu, logvar)       Eq. 3
    z = mu + exp(logvar / 2) * eps                                                       Eq. 4
    memory = z W_proj, the only key and value of each decoder layer's cross-attention    Eq. 5
    logits = T5 decoder(memory);  rec = -log p(x|z), summed over the sentence's tokens   Eq. 1

Symbols in comments and docstrings, with the field of `T5Config` where there is one:

    B  sentences in a batch            T  tokens of a sentence, </s> included
    D  width, `d_model`                L  decoder layers, `num_decoder_layers`
    A  attention heads, `num_heads`    S  size of a head, `d_kv`
    V  vocabulary, `vocab_size`        Z  latent dimension

All likelihoods are in nats. T5's layers are those of `transformers`.

Posterior collapse, and its cure. The ELBO is log p(x) - KL(q(z|x) to p(z|x)). A decoder that writes
word by word can model text without z. Early in training z is noise to it; ignoring z is then the
cheapest: q becomes N(0, I), the KL 0, and no gradient leads back. The remedies keep z worth reading
until the decoder reads it: a phase without KL in which the encoder learns to say something (phase
1), a KL weight that rises slowly or is controlled, a KL threshold below which less KL saves
nothing, an encoder that pools all tokens, and that must say what it did not see (token deletion,
of its input alone). The price: with a KL weight w < 1 the encoder is more certain than the
posterior (`metrics.untemper` undoes that).
"""

import contextlib
import inspect
import json
import re
import warnings
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

import data
from data import InputError, one_line

FAMILY = ("t5", "mt5", "umt5")  # supported `model_type`s; v1.1, flan, ByT5, UL2 are "t5" too
WEIGHTS = "model.safetensors"
POOLINGS = ("max", "mean", "last")
POOL_LAYERS = ("last", "all")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CARD = """---
{{ card_data }}
---

# A text VAE around a T5

Made with T5-VAE, the reference implementation of
[Park & Lee 2021](https://aclanthology.org/2021.insights-1.5/). In a clone of it, or with its folder
in `PYTHONPATH`:

```python
from vae import T5VAE

model = T5VAE.from_pretrained("this folder, or its name on the hub")
mu, logvar = model.encode_texts(["a text of the kind that it was trained on"])
print(model.decode_texts(mu))
```
"""
MOST_LOGITS = 2**30  # bytes: if the logits of a batch would take more, `rec` makes them in slices
SLICE = 2**28  # bytes of a slice, at most
# The key-value cache as an argument of T5: "cache" since transformers 5.24.
T5_ARGUMENTS = inspect.signature(transformers.T5ForConditionalGeneration.forward).parameters
CACHE = "cache" if "cache" in T5_ARGUMENTS else "past_key_values"
# What would take the place of z, or of the cache, in `generate`.
REPLACING = {"inputs", "input_ids", "inputs_embeds", "encoder_outputs", "decoder_input_ids"}
REPLACING |= {"decoder_inputs_embeds", "encoder_hidden_states"}
REPLACING |= {"past_key_values", "cache", "cache_implementation"}


def pool(hidden, attention_mask, pooling="max"):
    """One vector per sentence from the states of its real tokens (section 2.2.5).

    hidden: (B, T, D); attention_mask: (B, T), 1 on real tokens, at least one per row; pooling:
    "max", "mean", or "last", the last token's state. Returns: (B, D). Raises InputError for others.
    """
    if pooling not in POOLINGS:
        raise InputError(f"pooling is {pooling!r}; it must be one of {POOLINGS}")
    real = attention_mask.bool()[:, :, None]  # (B, T, 1)
    if pooling == "max":
        return hidden.masked_fill(~real, -torch.inf).amax(1)
    if pooling == "mean":
        return hidden.masked_fill(~real, 0).sum(1) / real.sum(1)
    places = torch.arange(hidden.shape[1], device=hidden.device)  # (T,)
    last = torch.where(real[:, :, 0], places, 0).amax(1)  # (B,) of the last real token
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class LatentCrossAttention(nn.Module):
    """Cross-attention with one key, which replaces a decoder block's `layer[1]`.

    A softmax over a single key is 1, whatever the query, so layer l adds W_o m[:, l] to every
    position. T5's query and key projections, and the layer norm before them, cannot matter.
    """

    def __init__(self, cross_attention, layer_index, family):
        super().__init__()
        self.layer_index = layer_index
        # T5's block also unpacks a position bias and attention weights, umT5's only the weights.
        # They are None here.
        self.unread = (None,) if family == "umt5" else (None, None)
        self.o, self.dropout = cross_attention.EncDecAttention.o, cross_attention.dropout

    def forward(self, hidden_states, key_value_states=None, encoder_hidden_states=None, **kwargs):
        # The memory has the first name in T5, the second in umT5.
        memory = encoder_hidden_states if key_value_states is None else key_value_states
        added = self.o(memory[:, self.layer_index, None])  # (B, L, A*S) -> (B, 1, A*S) -> (B, 1, D)
        return hidden_states + self.dropout(added.expand_as(hidden_states)), *self.unread


def in_float16(tensor):
    """Whether autocast is on with float16."""
    device = tensor.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


class Float32Output(nn.Linear):
    """`wo` of a feed-forward layer, with its weight, in float32 where autocast has float16.

    T5s larger than t5-small are reported to exceed the largest float16, 65,504, in this place.
    """

    def __init__(self, wo):
        # On "meta" a weight takes no memory: it is replaced at once.
        super().__init__(wo.in_features, wo.out_features, bias=False, device="meta")
        self.weight = wo.weight

    def forward(self, x):
        if in_float16(x):
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x.float())
        return super().forward(x)


class Float32Activation(nn.Module):
    """The activation before `wo`, likewise: gelu cubes its input, a gate multiplies."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, x):
        return self.activation(x.float() if in_float16(x) else x)


class Float32Linear(nn.Linear):
    """W_mu or W_logvar, in float32 whatever the dtype of its weight (and outside autocast): what is
    exponentiated needs all bits. `quantize_dynamic`, which replaces each `nn.Linear`, leaves other
    types alone.
    """

    def forward(self, x):
        return F.linear(x.float(), self.weight.float())


def kl_divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) per latent dimension: (..., Z) -> (..., Z), nats, >= 0."""
    return 0.5 * (mu**2 + logvar.exp() - logvar - 1)


@contextlib.contextmanager
def evaluating(model):
    """Without dropout and gradients; then every module gets the mode that the model had."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def token_nats(logits, targets, pad_id):
    """(n, V), (n,) -> -log p of each token: (n,), nats, float32; 0 where the target is padding."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.float(), targets, ignore_index=pad_id, reduction="none")


class SlicedNats(torch.autograd.Function):
    """-log softmax(h W^T)[target] of n tokens, from the logits of `rows` of them at a time: (n,).

    What autograd would keep from the forward pass, all logits, is made again in the backward pass.

    states: h, (n, D); weight: W, (V, D), of the LM head; targets: (n,). Padding has 0 nats.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, pad_id, rows):
        w, nats, log_sums = weight.to(states.dtype), [], []
        for h, target in zip(states.split(rows), targets.split(rows), strict=True):
            logits = F.linear(h, w).float()  # (rows, V)
            log_sums.append(logits.logsumexp(1))
            nats.append(log_sums[-1] - logits.gather(1, target[:, None])[:, 0])
        ctx.save_for_backward(states, weight, targets, torch.cat(log_sums))
        ctx.pad_id, ctx.rows = pad_id, rows
        return torch.cat(nats).masked_fill(targets == pad_id, 0.0)

    @staticmethod
    def backward(ctx, grad):  # grad: (n,)
        if torch.is_grad_enabled():  # create_graph=True
            raise InputError("the loss in slices has no second derivative; raise vae.MOST_LOGITS")
        states, weight, targets, log_sums = ctx.saved_tensors
        grad = grad.masked_fill(targets == ctx.pad_id, 0.0)
        w, d_states, d_weight = weight.to(states.dtype), [], None
        if ctx.needs_input_grad[1]:  # the head is trained
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        parts = (t.split(ctx.rows) for t in (states, targets, log_sums, grad))
        for h, target, log_sum, g in zip(*parts, strict=True):
            # The gradient by the logits is g (softmax - 1 at the target), computed in place in p.
            p = F.linear(h, w).float().sub_(log_sum[:, None]).exp_()  # softmax
            p.mul_(g[:, None]).scatter_add_(1, target[:, None], -g[:, None])
            p = p.to(h.dtype)
            d_states.append(p @ w)
            if d_weight is None:
                continue
            if p.dtype == torch.float32:
                d_weight.addmm_(p.T, h)  # without a second (V, D)
            else:
                d_weight += p.T @ h
        return torch.cat(d_states), d_weight, None, None, None


class T5VAE(nn.Module, ModelHubMixin, tags=["t5", "vae"], model_card_template=CARD):
    """q(z|x) and p(x|z) on the two halves of a T5.

    `from_t5` starts from a pretrained T5, `from_pretrained` loads a saved VAE; both are in eval
    mode. `push_to_hub` is ModelHubMixin's.

    Args:
        t5_config: `T5Config.to_dict()`; the weights are random here. "tie_word_embeddings" says
            whether the LM head is the token embedding (transformers 5 always says True).
        latent_dim: Z; 0 makes a language model, the same decoder with nothing encoded.
        pooling: "max", "mean" or "last"; see `pool`.
        pool_layers: "last" pools the encoder's output; "all" the outputs of all its layers, and
            takes the maximum of these for "max", else their mean.
    Raises: InputError if one of the last three is none of these.
    """

    token_nats = staticmethod(token_nats)  # here, so that a faster one can take its place

    def __init__(self, t5_config: dict, latent_dim=32, pooling="max", pool_layers="last"):
        super().__init__()
        data.check_at_least("latent_dim", latent_dim, 0)
        if pooling not in POOLINGS:
            raise InputError(f"pooling is {pooling!r}; it must be one of {POOLINGS}")
        if pool_layers not in POOL_LAYERS:
            raise InputError(f"pool_layers is {pool_layers!r}; it must be one of {POOL_LAYERS}")
        self.latent_dim = int(latent_dim)  # JSON has no numbers of numpy
        self.pooling, self.pool_layers = pooling, pool_layers
        self.tokenizer = None
        config = AutoConfig.for_model(**t5_config)
        # Not in the half precision that a configuration may name, and in which it was saved.
        self.t5 = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
        # Dropout right before max pooling would bias the maximum upwards, so that mu in training
        # would not be mu in evaluation. (T5 uses this module after the embeddings, too.)
        self.t5.encoder.dropout = nn.Identity()
        for layer_index, block in enumerate(self.t5.decoder.block):
            original = block.layer[1]
            block.layer[1] = LatentCrossAttention(original, layer_index, config.model_type)
        for block in (*self.t5.encoder.block, *self.t5.decoder.block):
            feed_forward = block.layer[-1].DenseReluDense
            feed_forward.wo = Float32Output(feed_forward.wo)
            feed_forward.act = Float32Activation(feed_forward.act)
        if not t5_config.get("tie_word_embeddings", True):  # a head of its own
            self.t5.lm_head.weight = nn.Parameter(self.t5.lm_head.weight.detach().clone())
            self.t5.config.tie_word_embeddings = False  # umT5 would scale its input
        memory_dim = config.num_decoder_layers * config.num_heads * config.d_kv  # L*A*S
        with warnings.catch_warnings():  # a language model's have no elements: torch warns
            warnings.filterwarnings("ignore", "Initializing zero-element")
            self.w_mu = Float32Linear(config.d_model, latent_dim, bias=False)
            self.w_logvar = Float32Linear(config.d_model, latent_dim, bias=False)
            self.w_proj = nn.Linear(latent_dim, memory_dim, bias=False)

    @classmethod
    def from_t5(cls, name_or_path, latent_dim=32, pooling="max", pool_layers="last"):
        """A VAE around a pretrained T5, from the hub or a directory, with its tokenizer.

        Cross-attention's queries and keys cannot matter (see `LatentCrossAttention`), and W_proj
        takes the place of its values (Eq. 5); all other weights are kept. W_mu, W_logvar and W_proj
        are new. Raises FileNotFoundError if there is no such folder, nor can be on the hub, and
        InputError if it is not available, none of FAMILY, incomplete, or without its tokenizer.
        """
        check_place(name_or_path)
        if data.read_json(Path(name_or_path, "config.json")).keys() & {"data_sha256", "t5_config"}:
            advice = "load it with T5VAE.from_pretrained, or train it on with --init"
            raise InputError(f"{name_or_path} is no T5 to start from but a run or a VAE: {advice}")
        config = load(AutoConfig, name_or_path)
        if config.model_type not in FAMILY:
            kind = f"it is a {config.model_type}; it must be one of {', '.join(FAMILY)}"
            raise InputError(f"{name_or_path} is no T5 to start from: {kind}")
        tokenizer = load(AutoTokenizer, name_or_path)
        check_tokenizer(name_or_path, config, tokenizer)  # before the weights: they are large
        t5, info = load(
            AutoModelForSeq2SeqLM,
            name_or_path,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused here, by name
        )
        wrong = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        if wrong:  # transformers would leave them random
            count = f"{len(wrong)} weights are missing or of another shape"
            raise InputError(f"{name_or_path} is no T5 to start from: {count}, e.g. {min(wrong)}")
        t5_config = config.to_dict()
        t5_config["tie_word_embeddings"] = t5.lm_head.weight is t5.shared.weight
        vae = cls(t5_config, latent_dim, pooling, pool_layers)
        # Weights only: a checkpoint may bring beams or penalties of its own. All that the VAE's T5
        # has are there; cross-attention's queries, keys, values and norms are left.
        weights = {
            name.replace("layer.1.EncDecAttention.o", "layer.1.o"): weight
            for name, weight in t5.state_dict().items()
        }
        vae.t5.load_state_dict({name: weights[name] for name in vae.t5.state_dict()})
        vae.tokenizer = tokenizer
        return vae.eval()

    @property
    def device(self):
        return self.w_mu.weight.device

    def encode(self, input_ids, attention_mask):
        """q(z|x) = N(mu, exp(logvar)), diagonal (Eq. 3; its "log sigma" is the log variance).

        input_ids, attention_mask: (B, T). Returns: mu, logvar: (B, Z) each, always float32.
        """
        if self.latent_dim == 0:  # a language model has nothing to encode
            empty = torch.zeros(len(input_ids), 0, device=input_ids.device)
            return empty, empty
        # Additive: every attention implementation masks. Of four axes: given two, T5 would ask
        # whether the mask hides anything, and the CPU would wait for the answer.
        dtype = self.t5.shared.weight.dtype
        mask = (1 - attention_mask[:, None, None].to(dtype)) * torch.finfo(dtype).min
        every_layer = self.pool_layers == "all"
        out = self.t5.encoder(input_ids, mask, output_hidden_states=every_layer)
        layers = [out.last_hidden_state]
        if every_layer:  # T5 normalizes the last only; inner states reach hundreds
            layers += [self.t5.encoder.final_layer_norm(h) for h in out.hidden_states[1:-1]]
        # What is exponentiated needs all bits of float32.
        with torch.autocast(input_ids.device.type, enabled=False):
            pooled = [pool(h.float(), attention_mask, self.pooling) for h in layers]
            pooled = torch.stack(pooled)  # (layers, B, D)
            h = pooled.amax(0) if self.pooling == "max" else pooled.mean(0)  # (B, D)
            return self.w_mu(h), self.w_logvar(h)

    def reparameterize(self, mu, logvar, generator=None, eps=None):
        """z = mu + sigma * eps (Eq. 4), (B, Z); eps is drawn from N(0, I) unless it is given."""
        if eps is None:
            eps = torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
        return mu + (logvar / 2).exp() * eps

    def memory(self, z):
        """(B, Z) -> (B, L, A*S): row l is what decoder layer l attends to (Eq. 5)."""
        memory = self.w_proj(z.to(self.t5.shared.weight.dtype))  # (B, L*A*S)
        # Each sentence's memory comes from its own z: only the last axis is split, none mix.
        return memory.unflatten(-1, (self.t5.config.num_decoder_layers, -1))  # (B, L, A*S)

    def decode(self, z, labels):
        """Teacher-forced logits of p(x|z): position t has seen z and labels[:, :t].

        z: (B, Z); labels: (B, T) ids that end in </s>, then T5's pad id. Returns: (B, T, V).
        """
        shifted = self.t5.prepare_decoder_input_ids_from_labels(labels)  # (B, T)
        memory = BaseModelOutput(self.memory(z))
        return self.t5(encoder_outputs=memory, decoder_input_ids=shifted, use_cache=False).logits

    def rec(self, z, labels):
        """-log p(x|z) (Eq. 1): (B,), nats, positive, summed over a sentence's tokens.

        </s> counts, padding does not. Arguments: see `decode`.
        """
        return self.rec_of_tokens(z, labels).sum(1)

    def rec_of_tokens(self, z, labels):
        """The same, of each token: (B, T), 0 for padding.

        Where the logits of all tokens would take more than MOST_LOGITS, they are made a slice at a
        time, and again in the backward pass.
        """
        targets = labels.flatten()  # (B*T,)
        pad_id = self.t5.config.pad_token_id
        token_bytes = 4 * self.t5.config.vocab_size  # of its logits, in float32
        if targets.numel() * token_bytes <= MOST_LOGITS:
            logits = self.decode(z, labels).flatten(0, 1)  # (B*T, V)
            nats = self.token_nats(logits, targets, pad_id)
        else:
            rows = max(1, SLICE // token_bytes)
            nats = self._nats_in_slices(z, labels, targets, pad_id, rows)
        return nats.view(labels.shape)

    def _nats_in_slices(self, z, labels, targets, pad_id, rows):
        """-log p of each of `targets`: (B*T,), nats, from the logits of `rows` of them at a time.

        targets: `labels`, flat.
        """
        # T5's own forward, without its head: it returns what the head reads, scaled as it does.
        head, self.t5.lm_head = self.t5.lm_head, nn.Identity()
        try:
            states = self.decode(z, labels).flatten(0, 1)  # (B*T, D)
        finally:
            self.t5.lm_head = head
        if torch.is_grad_enabled() and isinstance(head, nn.Linear):
            device = states.device.type
            if torch.is_autocast_enabled(device):
                states = states.to(torch.get_autocast_dtype(device))
            return SlicedNats.apply(states, head.weight, targets, pad_id, rows)
        # Another head (int8, LoRA) is only called: in training autograd keeps all its logits.
        parts = zip(states.split(rows), targets.split(rows), strict=True)
        return torch.cat([self.token_nats(head(h), target, pad_id) for h, target in parts])

    def forward(self, batch):
        """The terms of the -ELBO of a `data.training_batch`: rec (B,), kl (B, Z), nats (Eq. 1)."""
        mu, logvar = self.encode(batch.ids, batch.mask)
        z = self.reparameterize(mu, logvar, eps=batch.eps)
        return self.rec(z, batch.labels), kl_divergence(mu, logvar)

    def freeze_decoder(self):
        """Phase 1: only the encoder, W_mu and W_logvar stay trainable (sections 4, 5.1).

        Frozen: decoder, W_o, W_proj, LM head, and the token embedding, which the encoder shares.
        """
        for module in (self.t5.decoder, self.t5.lm_head, self.t5.shared, self.w_proj):
            module.requires_grad_(False)
        return self

    @torch.no_grad()
    def generate(self, z, max_new_tokens=None, **kwargs):
        """Token ids decoded from z (B, Z): (B, <= tokens + 1): the start token, a text, padding.

        In the model's mode: dropout is on while it trains (`decode_texts` turns it off).
        Greedy, up to 256 tokens, unless told otherwise: the arguments are those of T5's own
        `generate` (max_length, do_sample, num_beams, ...). With do_sample=True top_k is off unless
        it is given: samples are of p(x|z) itself. Raises InputError for what would replace z, and
        for a z that has no row, another shape, or a number that is not finite.
        """
        z = self._check_z(z)
        if len(z) == 0:
            raise InputError("z has no row; it must have at least one")
        if replacing := REPLACING & kwargs.keys():
            raise InputError(f"generate takes no {min(replacing)}: it decodes z, in its own cache")
        config = kwargs.get("generation_config") or transformers.GenerationConfig()
        if not isinstance(config, transformers.GenerationConfig):
            raise InputError(f"generation_config is {config!r}; it must be a GenerationConfig")
        if max_new_tokens is not None:
            kwargs["max_new_tokens"] = max_new_tokens

        def setting(name):
            """What the arguments say, else the generation_config, else the T5's own, else None."""
            said = kwargs.get(name), getattr(config, name), getattr(self.t5.generation_config, name)
            return next((value for value in said if value is not None), None)

        if setting("max_new_tokens") is None and setting("max_length") is None:
            kwargs["max_new_tokens"] = 256
        # Off, unless it is given: transformers would draw from the 50 likeliest tokens alone.
        if setting("do_sample") and setting("top_k") is None:
            kwargs["top_k"] = 0
        # T5's own cache has as many layers as the encoder. If caches are off, none may be given:
        # it would still be read.
        use_cache = setting("use_cache") in (True, None)
        if "use_cache" in kwargs:
            kwargs["use_cache"] = use_cache  # which may be None, or 0
        if use_cache:
            own, of_memory = transformers.DynamicCache(), transformers.DynamicCache()
            kwargs[CACHE] = transformers.EncoderDecoderCache(own, of_memory)
        return self.t5.generate(encoder_outputs=BaseModelOutput(self.memory(z)), **kwargs)

    def encode_texts(self, texts, batch_size=64, max_length=256):
        """q(z|x) of N texts, an iterable of str: mu, logvar, (N, Z) each, on the CPU.

        Dropout is off, whatever the model's mode. batch_size is in units of max_length / 2 tokens,
        padding included: of short texts more are encoded at once. Warns of texts that are cut at
        `max_length` tokens or have characters outside the vocabulary. Raises InputError for other
        types.
        """
        data.check_at_least("batch_size", batch_size, 1)
        corpus = data.make_corpus(texts, self._get_tokenizer(), max_length, allow_empty=True)
        mu = torch.zeros(len(corpus), self.latent_dim)
        logvar = torch.zeros_like(mu)
        order = data.evaluation_order(corpus.lengths, batch_size * max_length // 2)
        with evaluating(self):
            for index in data.progress(order, "encoding"):
                batch = data.make_batch(corpus, index).to(self.device)
                posterior = self.encode(batch.ids, batch.mask)
                rows = torch.from_numpy(index)
                mu[rows], logvar[rows] = (tensor.cpu() for tensor in posterior)
        if corpus.truncated:
            said = f"{corpus.truncated} of {len(corpus)} texts are cut at {max_length} tokens"
            warnings.warn(said, stacklevel=2)
        if corpus.unknown:
            said = f"{corpus.unknown} of {len(corpus)} texts have characters outside the vocabulary"
            warnings.warn(f"{said}, which all look alike to the model", stacklevel=2)
        return mu, logvar

    def decode_texts(self, z, batch_size=64, **kwargs):
        """The texts that `generate(z, **kwargs)` writes for z (N, Z), a list of str, `<unk>` kept.

        Dropout is off, whatever the model's mode. Raises InputError if z has another shape, or a
        number that is not finite.
        """
        data.check_at_least("batch_size", batch_size, 1)
        z, tokenizer, texts = self._check_z(z), self._get_tokenizer(), []
        with evaluating(self):
            for start in data.progress(range(0, len(z), batch_size), "decoding"):
                ids = self.generate(z[start : start + batch_size], **kwargs)
                ids = getattr(ids, "sequences", ids)  # return_dict_in_generate=True
                texts += data.detokenize(ids.tolist(), tokenizer)
        return texts

    def _check_z(self, z):
        """z as a tensor (N, Z) like the weights. Raises InputError if it cannot be one."""
        try:
            z = torch.as_tensor(z, device=self.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"z is no tensor of numbers: {one_line(error)}") from None
        if z.dim() != 2 or z.shape[1] != self.latent_dim or z.is_complex():
            has = f"shape {tuple(z.shape)} and {z.dtype}"
            raise InputError(f"z has {has}; it must be (N, {self.latent_dim}), real numbers")
        z = z.to(self.w_mu.weight)
        wrong = (~z.isfinite()).any(1).nonzero()
        if len(wrong) > 0:
            raise InputError(f"z[{wrong[0].item()}] has a number that is not finite, in {z.dtype}")
        return z

    def _get_tokenizer(self):
        if self.tokenizer is None:
            raise InputError("the model has no tokenizer: set model.tokenizer")
        return self.tokenizer

    def save_pretrained(self, save_directory, **kwargs):
        """ModelHubMixin's: writes the folder that `from_pretrained` loads. InputError if it is a
        run, whose config.json would be lost and whose model/ would be loaded instead."""
        if is_run(save_directory) or Path(save_directory, "model").exists():
            raise InputError(f"{save_directory} is a run: save the model in a folder of its own")
        return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory):
        """What `save_pretrained` writes, but for the card: the model as it is now."""
        t5_config = self.t5.config.to_dict()
        t5_config.pop("_name_or_path", None)  # a path on this machine says nothing elsewhere
        t5_config["tie_word_embeddings"] = self.t5.lm_head.weight is self.t5.shared.weight
        config = {"pooling": self.pooling, "pool_layers": self.pool_layers}
        config |= {"latent_dim": self.latent_dim, "t5_config": t5_config}
        data.write_json(save_directory / "config.json", config)
        # `named_parameters` names a tied weight once, always by the same name.
        weights = safetensors.torch.save(dict(self.named_parameters()))
        data.write_atomically(save_directory / WEIGHTS, lambda file: file.write(weights))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, name_or_path, dtype=None, **download):
        """A saved VAE in eval mode, with its tokenizer: from its folder, a run folder, or the hub.

        dtype: of its weights (float32); download: arguments of `snapshot_download`, and a TypeError
        for others. Raises FileNotFoundError if there is no such folder or repository, and
        InputError if it holds something else.
        """
        inspect.signature(snapshot_download).bind(str(name_or_path), **download)
        if dtype not in (None, *DTYPES):
            raise InputError(f"dtype is {dtype!r}; it must be one of {DTYPES}")
        check_place(name_or_path)
        folder = Path(name_or_path)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(str(name_or_path), **download))
            except Exception as error:  # whatever a name or a network leads to
                where = f"no such run or folder, nor available from the hub ({one_line(error)})"
                raise FileNotFoundError(f"{name_or_path}: {where}") from error
        if (folder / "model").is_dir():  # a run folder
            folder = folder / "model"
        elif is_run(folder):
            raise InputError(f"{folder} is a run without model/: is it finished?")
        if data.read_json(folder / "config.json").get("model_type") in FAMILY:
            raise InputError(f"{folder} is a T5; T5VAE.from_t5, or --model, makes a VAE of it")
        try:
            vae = cls(**json.loads((folder / "config.json").read_text()))
            safetensors.torch.load_model(vae, folder / WEIGHTS)  # it knows of tied weights
            if (folder / "tokenizer_config.json").is_file():
                vae.tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # whatever missing, damaged or foreign files lead to
            holds = f"{folder} holds no T5VAE: config.json, {WEIGHTS} or tokenizer"
            raise InputError(f"{holds}: {one_line(error)}") from error
        if vae.tokenizer is not None:
            check_tokenizer(folder, vae.t5.config, vae.tokenizer)
        return vae.to(dtype or torch.float32).eval()


def is_run(folder):
    """Whether a folder is a run of train.py, finished or not."""
    return "data_sha256" in data.read_json(Path(folder, "config.json"))


def check_place(name_or_path):
    """FileNotFoundError if a name is neither a folder nor one that the hub may have; InputError if
    it is the parent of runs."""
    check_no_parent(name_or_path)
    of_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name_or_path))
    if not Path(name_or_path).is_dir() and not of_hub:
        raise FileNotFoundError(f"{name_or_path}: no such run or folder")


def check_no_parent(folder):
    """InputError if a folder is no run and no model, but holds runs."""
    if Path(folder, "config.json").is_file():
        return
    runs = [Path(folder, name) for name in ("phase2", "phase1", "lm")]
    found = [str(run) for run in runs if (run / "config.json").is_file()]
    if found:
        raise InputError(f"{folder} holds runs; name one of them: {', '.join(found)}")


def load(kind, name_or_path, **settings):
    """kind.from_pretrained(...), or an InputError with the library's own message in one line."""
    try:
        return kind.from_pretrained(name_or_path, **settings)
    except Exception as error:  # whatever foreign or damaged files, or a network, lead to
        if isinstance(error, OSError) and not Path(name_or_path).is_dir():
            said = f"{name_or_path} is no folder, nor available from the hub ({one_line(error)})"
            said += "; without a network give a folder, or --model tiny"
        else:
            said = f"{name_or_path} is no T5 to start from: {one_line(error)}"
        raise InputError(said) from error


def check_tokenizer(name_or_path, config, tokenizer):
    """InputError if a tokenizer is missing, or is not that of a T5Config, or if the config does not
    name the token that a decoder starts with."""
    said = f"{name_or_path} cannot be used: its tokenizer"
    if len(tokenizer) < len(tokenizer.all_special_ids) + 2:  # transformers invents an empty one
        raise InputError(f"{said} is missing, or has no vocabulary")
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"{said} has {len(tokenizer)} tokens, vocab_size {config.vocab_size}")
    for name in "pad_token_id", "eos_token_id":
        ours, theirs = getattr(config, name), getattr(tokenizer, name)
        if ours is None or ours != theirs:
            raise InputError(f"{said} says {name} {theirs}, config.json {ours}")
    if config.decoder_start_token_id is None:
        raise InputError(f"{name_or_path} has no decoder_start_token_id in its config.json")
