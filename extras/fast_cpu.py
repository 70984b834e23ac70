"""Train faster on a CPU: the same computation by other layers.

    python -m extras.fast_cpu <flags of train.py>

`quicken(model)` replaces, in place and under the same names of weights, linear layers (oneDNN's
products, which use AVX-512 on every CPU that has it; PyTorch's default, MKL, does so on Intel's
alone), dropout (16 random bits per element instead of 64), a ReLU with its dropout (one tensor kept
for the backward pass), layer norms (rounded once, under autocast), and the loss of float32 logits
(in their place). On a GPU, and where a form does not apply, torch's own is used. Not for float16,
whose layers in float32 it takes away.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.t5.modeling_t5 import T5LayerNorm

import train
import vae
from data import InputError
from vae import Float32Activation, Float32Output


def multiply(a, b):
    """a b^T of matrices (M, K) and (N, K), contiguous or the transpose of a contiguous one: (M, N).

    On a CPU in float32 oneDNN does it, which uses AVX-512 on every CPU that has it. What PyTorch
    calls by default, MKL, does so on Intel's alone: on AMD's it takes twice the time. The operator
    is private to torch, whose version requirements.txt pins.
    """
    float32 = a.dtype == b.dtype == torch.float32
    if a.is_cpu and a.numel() and float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


class Product(torch.autograd.Function):
    """x W^T with `multiply`, forward and backward; computes only the gradients that are needed."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return multiply(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, weight), (needs_x, needs_weight) = ctx.saved_tensors, ctx.needs_input_grad
        grad = grad.contiguous()
        d_x = multiply(grad, weight.T) if needs_x else None
        d_weight = multiply(grad.T, x.T) if needs_weight else None
        return d_x, d_weight


class Linear(nn.Linear):
    """A linear layer without bias, by `multiply`; under autocast and on a GPU it is torch's own."""

    def forward(self, x):
        if self.bias is not None or not x.is_cpu or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        rows = x.flatten(0, -2).contiguous()
        return Product.apply(rows, self.weight).view(*x.shape[:-1], -1)


class DropOfReLU(torch.autograd.Function):
    """relu(x) * kept * scale. Keeps only its result: the gradient passes where that is positive."""

    @staticmethod
    def forward(ctx, x, kept, scale):
        out = (x * kept).mul_(scale).clamp_(min=0)
        ctx.save_for_backward(out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        passed = torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0], 0)
        return passed.mul_(ctx.scale), None, None


class Dropout(nn.Dropout):
    """Dropout from 16 random bits per element, where torch draws 64 on a CPU: a third of the time.

    The rate is p to within 2^-17, and kept elements are divided by exactly what is kept on average.
    """

    def draw(self, x):
        """What to keep of x (1, else 0), and its scale; None if torch's own dropout is as good."""
        drop = round(self.p * 2**16)  # of 2^16
        if not (self.training and x.is_cpu and 0 < drop < 2**16):
            return None
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        bits = bits.view(torch.int16)
        # Compared into numbers of x's type at once: converting truth values takes twice the time of
        # the comparison.
        kept = torch.ge(bits[: x.numel()].view(x.shape), drop - 2**15, out=torch.empty_like(x))
        return kept, 2**16 / (2**16 - drop)

    def forward(self, x):
        drawn = self.draw(x)
        if drawn is None:
            return super().forward(x)
        kept, scale = drawn
        return (x * kept).mul_(scale)


class DropoutOfReLU(Dropout):
    """A ReLU and the dropout after it, in the widest place of T5, for half the memory."""

    def forward(self, x):
        drawn = self.draw(x)
        return DropOfReLU.apply(x, *drawn) if drawn else nn.Dropout.forward(self, x.relu())


class Normalize(torch.autograd.Function):
    """x / rms(x) * weight over the last axis, in float32, rounded to `dtype` once."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return torch.mul(unit, weight, out=torch.empty_like(x, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        unit, scale, weight = ctx.saved_tensors
        grad = grad.float()
        along = grad * unit
        d_weight = along.flatten(0, -2).sum(0)
        # What would only change the length of x is taken out.
        along = (along @ weight[:, None]).div_(-unit.shape[-1])
        return (grad * weight).addcmul_(unit, along).mul_(scale), d_weight, None, None


class LayerNorm(T5LayerNorm):
    """T5's layer norm. Under autocast it rounds once what all linear layers after it round."""

    def forward(self, x):
        if not (x.is_cpu and x.dtype == torch.float32 and torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        return Normalize.apply(
            x, self.weight, self.variance_epsilon, torch.get_autocast_dtype("cpu")
        )


class InPlaceNats(torch.autograd.Function):
    """-log softmax(logits)[target]: (n,). The (n, V) logits, in float32, are overwritten.

    They become softmax in the forward pass, and their own gradient in the backward pass; torch's
    cross_entropy makes two more tensors of their size.
    """

    @staticmethod
    def forward(ctx, logits, targets, pad_id):
        top, at_target = logits.amax(1, keepdim=True), logits.gather(1, targets[:, None])
        p = logits.detach().sub_(top).exp_()
        total = p.sum(1, keepdim=True)
        padding = targets[:, None] == pad_id
        # Not save_for_backward: it would ask whether what it saved has been overwritten.
        ctx.p, ctx.rest = p, (targets, total, padding)
        return (total.log() + top - at_target).masked_fill(padding, 0)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        p, (targets, total, padding) = ctx.p, ctx.rest
        ctx.p = None  # it serves once
        grad = grad[:, None].masked_fill(padding, 0)
        p.mul_(grad / total).scatter_add_(1, targets[:, None], -grad)
        return p, None, None


def token_nats(logits, targets, pad_id):
    """`vae.token_nats`, which it replaces, in place on a CPU."""
    if logits.is_cpu and logits.dtype == torch.float32 and torch.is_grad_enabled():
        return InPlaceNats.apply(logits, targets, pad_id)
    return vae.token_nats(logits, targets, pad_id)


FASTER = {nn.Linear: Linear, Float32Output: Linear, nn.Dropout: Dropout}


def quicken(module):
    """Make the layers of a T5VAE or a T5 faster on a CPU, in place; weights keep their names."""
    for part in module.modules():
        if faster := FASTER.get(type(part)):
            part.__class__ = faster  # the same weights under the same names
        # Of attention or a feed-forward layer.
        if isinstance(getattr(part, "layer_norm", None), T5LayerNorm):
            part.layer_norm.__class__ = LayerNorm
        if isinstance(getattr(part, "act", None), Float32Activation):  # of a T5VAE: for float16
            part.act = part.act.activation
        if isinstance(getattr(part, "act", None), nn.ReLU):  # a feed-forward layer
            part.act, part.dropout = DropoutOfReLU(part.dropout.p), nn.Identity()
    if isinstance(module, vae.T5VAE):
        module.token_nats = token_nats
    return module


def main(argv=None):
    load_start = train.load_start

    def quick_start(args):
        if args.amp == "fp16":
            raise InputError("--amp is fp16; extras.fast_cpu takes bf16 or off")
        args.command = args.command.replace("train.py", "-m extras.fast_cpu", 1)
        model, saved = load_start(args)
        return quicken(model), saved

    train.load_start = quick_start
    try:
        train.main(argv)
    finally:
        train.load_start = load_start


if __name__ == "__main__":
    main()
