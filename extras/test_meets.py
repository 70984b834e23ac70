"""What docs/meets.md says works with a T5VAE, works. Packages that are not installed are skipped.

Each test has a control: what must differ, or be refused.
"""

import copy
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn
from torch.export import Dim
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

import data
import vae
from test_vae import CLI_TEXTS, cli_tokenizer, one_thread, random_texts, tiny_vae
from vae import T5VAE, InputError

Z = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
IDS, MASK = random_texts(4, 9)
BATCH = data.Batch(IDS, MASK, IDS, np.arange(4), torch.randn(4, 8), 4, 4)
LABELS = [0, 1, 0, 1] * 3  # of TEXTS
TEXTS = CLI_TEXTS * 3


@pytest.fixture
def speaking(cli_tokenizer):
    """A T5VAE with a tokenizer."""
    model = tiny_vae(vocab_size=len(cli_tokenizer))
    model.tokenizer = cli_tokenizer
    return model


def small_vae(seed=0, **changes):
    """A T5VAE of one layer, quickly traced."""
    return tiny_vae(seed, num_layers=1, **changes)


def difference(a, b):
    return (a - b).abs().max().item()


def gradients(model):
    """rec (B,) and the gradients of the objective, {name: tensor}, with dropout of a fixed seed."""
    model.zero_grad()
    torch.manual_seed(0)
    rec, kl = model(BATCH)
    (rec.sum() + kl.sum()).backward()
    return rec.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


class Call(nn.Module):
    """A method of a model, as the module that exporters want."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *arguments):
        return getattr(self.model, self.name)(*arguments)


# --------------------------------------------------------------------------------------- training


class LowRank(nn.Module):
    """A layer and a trainable product of two thin matrices beside it, as LoRA adds one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Linear(layer.in_features, 2, bias=False)
        self.b = nn.Linear(2, layer.out_features, bias=False)

    @property
    def weight(self):  # as LoRA's layers have it
        return self.layer.weight

    def forward(self, x):
        return self.layer(x) + self.b(self.a(x))


@pytest.mark.parametrize("name", ["w_mu", "w_logvar", "w_proj"])
def test_adapter_on_our_own_layers_is_heard(name):
    model = tiny_vae()
    before = model(BATCH)[0].detach()
    setattr(model, name, LowRank(getattr(model, name)))
    rec = model(BATCH)[0]
    assert difference(rec, before) > 1e-3, "a layer whose weight alone is read hears no adapter"
    rec.sum().backward()
    assert getattr(model, name).a.weight.grad.abs().max() > 0


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    targets = ["q", "v", "wi", "wo", "o", "w_mu", "w_logvar", "w_proj"]
    model = tiny_vae()
    start = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=4))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        rec, kl = adapted(BATCH)
        (rec.sum() + kl.sum()).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    mu, rec = model.encode(IDS, MASK)[0], model.rec(Z, IDS)
    assert difference(rec, start.rec(Z, IDS)) > 1e-2
    assert difference(mu, start.encode(IDS, MASK)[0]) > 1e-3
    assert adapted.generate(Z, max_new_tokens=3).shape == (4, 4)
    # The adapter alone, beside the model that it was trained on.
    adapted.save_pretrained(tmp_path / "adapter")
    beside = peft.PeftModel.from_pretrained(start, tmp_path / "adapter").eval()
    assert difference(beside.rec(Z, IDS), rec) < 1e-4
    # Not merged, the weights have other names: what is written is no T5VAE.
    model.save_pretrained(tmp_path / "unmerged")
    with pytest.raises(InputError, match="holds no T5VAE"):
        T5VAE.from_pretrained(tmp_path / "unmerged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = T5VAE.from_pretrained(tmp_path / "merged")
    assert difference(again.rec(Z, IDS), rec) < 1e-4
    assert difference(again.encode(IDS, MASK)[0], mu) < 1e-4
    assert set(again.state_dict()) == set(tiny_vae().state_dict())


def test_gradient_checkpointing():
    model = tiny_vae(dropout_rate=0.1).train()
    runs = []
    for block in model.t5.encoder.block[0], model.t5.decoder.block[0]:
        block.layer[0].register_forward_hook(lambda *_: runs.append(1))
    rec, expected = gradients(model)
    assert len(runs) == 2
    model.t5.gradient_checkpointing_enable()
    again, found = gradients(model)
    assert len(runs) == 6, "each block runs again in the backward pass"
    torch.testing.assert_close(again, rec)
    torch.testing.assert_close(found, expected)


def test_deepcopy_and_pickle():
    model = tiny_vae()
    for other in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert torch.equal(other.rec(Z, IDS), model.rec(Z, IDS))
        assert other.t5.lm_head.weight is other.t5.shared.weight, "a tied weight stays one"
        with torch.no_grad():
            other.w_proj.weight += 1
        assert difference(other.rec(Z, IDS), model.rec(Z, IDS)) > 1e-2, "they share nothing"


def test_moving_average(tmp_path):
    model = tiny_vae()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)  # the first one copies
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    average.update_parameters(model)
    for name, parameter in average.module.state_dict().items():
        torch.testing.assert_close(parameter, start[name] + 0.1)
    average.module.save_pretrained(tmp_path)
    again = T5VAE.from_pretrained(tmp_path)
    assert torch.equal(again.rec(Z, IDS), average.module.rec(Z, IDS))
    assert difference(again.rec(Z, IDS), model.rec(Z, IDS)) > 1e-2


def test_safetensors(tmp_path):
    model, other = tiny_vae(), tiny_vae(1)
    assert difference(other.rec(Z, IDS), model.rec(Z, IDS)) > 1e-2
    safetensors.torch.save_model(model, tmp_path / "x.safetensors")
    safetensors.torch.load_model(other, tmp_path / "x.safetensors")
    assert torch.equal(other.rec(Z, IDS), model.rec(Z, IDS))
    model.save_pretrained(tmp_path)
    names = set(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert names == {name for name, _ in model.named_parameters()}
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.torch.save_file(model.state_dict(), tmp_path / "x.safetensors")


# ------------------------------------------------------------------------------ programs, formats


def test_compile():
    model = small_vae()
    compiled = torch.compile(model.encode, fullgraph=True, backend="eager")
    for batch, length in (4, 9), (5, 11):
        ids, mask = random_texts(batch, length)
        torch.testing.assert_close(compiled(ids, mask), model.encode(ids, mask))

    def broken(ids, mask):  # the control
        torch._dynamo.graph_break()
        return model.encode(ids, mask)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, fullgraph=True, backend="eager")(IDS, MASK)


FREE, LONG = Dim("B"), Dim("T", min=3)
AXES = {  # of the arguments of a method: which are free
    "memory": ({0: FREE},),
    "encode": ({0: FREE, 1: Dim("T")}, {0: FREE, 1: Dim("T")}),
    "rec": ({0: FREE}, {0: FREE, 1: LONG}),
    "decode": ({0: FREE}, {0: FREE, 1: LONG}),
}


def arguments(name, batch, length):
    """Arguments for the method `name`."""
    ids, mask = random_texts(batch, length)
    z = torch.randn(batch, 8)
    return {"memory": (z,), "encode": (ids, mask)}.get(name, (z, ids))


@pytest.mark.parametrize("name", ["memory", "encode", "rec"])
def test_export_with_free_batch_and_length(name):
    model, example = small_vae(), arguments(name, 4, 9)
    exported = torch.export.export(Call(model, name), example, dynamic_shapes=(AXES[name],))
    program = exported.module()
    for batch, length in (7, 13), (1, 9):
        other = arguments(name, batch, length)
        torch.testing.assert_close(program(*other), getattr(model, name)(*other))
    if name == "rec":  # the control: its length has a least one
        with pytest.raises(AssertionError, match=">= 3"):
            program(Z[:2], torch.tensor([[5, 1], [7, 1]]))


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, example = small_vae(), arguments(name, 4, 9)
    how = {"dynamic_shapes": (AXES[name],), "dynamo": True, "verbose": False}
    with torch.no_grad():  # else it fails, where T5 attends by sdpa
        exported = torch.onnx.export(Call(model, name), example, **how)
    exported.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for batch, length in (7, 13), (1, 9):
        other = arguments(name, batch, length)
        names = [given.name for given in session.get_inputs()]
        found = session.run(None, {n: a.numpy() for n, a in zip(names, other, strict=True)})
        expected = getattr(model, name)(*other)
        expected = expected if isinstance(expected, tuple) else (expected,)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, atol=1e-4, rtol=1e-4)
            assert b.std() > 1e-2


def check_int8(int8, model):
    """Near, and not equal: what is equal was not quantized."""
    assert 0 < difference(int8.encode(IDS, MASK)[0], model.encode(IDS, MASK)[0]) < 0.2
    assert 0 < difference(int8.memory(Z), model.memory(Z)) < 0.3
    assert 0 < difference(int8.decode(Z, IDS), model.decode(Z, IDS)) < 0.3
    assert 0 < (int8.rec(Z, IDS) / model.rec(Z, IDS) - 1).abs().max() < 0.02
    assert int8.generate(Z, max_new_tokens=3).shape == (4, 4)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_int8(speaking):
    quantize = torch.ao.quantization.quantize_dynamic
    model = tiny_vae()
    int8 = quantize(model, {nn.Linear}, dtype=torch.qint8)
    assert int8.w_proj.weight().dtype == torch.qint8
    for layer in int8.w_mu, int8.t5.encoder.block[0].layer[-1].DenseReluDense.wo:
        assert layer.weight.dtype == torch.float32, "of types of their own: they stay"
    check_int8(int8, model)
    int8 = quantize(speaking, {nn.Linear}, dtype=torch.qint8)
    mu, _ = int8.encode_texts(TEXTS)
    assert 0 < difference(mu, speaking.encode_texts(TEXTS)[0]) < 0.2
    assert len(int8.decode_texts(mu, max_new_tokens=3)) == len(TEXTS)


@pytest.mark.filterwarnings("ignore")
def test_torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_vae()
    int8 = copy.deepcopy(model)
    quantization.quantize_(int8, quantization.Int8DynamicActivationInt8WeightConfig())
    check_int8(int8, model)


def test_derivatives_of_the_decoder():
    model, z, direction = small_vae(), Z[:1], torch.arange(8.0)[None]

    def logits(z):
        return model.decode(z, IDS[:1, :4])

    jacobian = torch.autograd.functional.jacobian(logits, z)  # (1, T, V, 1, Z)
    with pytest.raises(RuntimeError, match="scaled_dot_product"):  # the controls: as it is
        jvp(logits, (z,), (direction,))
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument"):
        jacrev(logits)(z)  # sdpa's position bias wants a gradient, too
    model.requires_grad_(False)
    torch.testing.assert_close(jacrev(logits)(z), jacobian)
    model.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):
        found = [jvp(logits, (z,), (direction,))[1]]
    model.t5.set_attn_implementation("eager")
    found.append(jvp(logits, (z,), (direction,))[1])
    for along in found:
        torch.testing.assert_close(along, (jacobian * direction).sum((3, 4)), atol=1e-4, rtol=1e-4)
        assert along.abs().max() > 0.1


def test_gradients_per_sentence():
    model = tiny_vae()

    def objective(parameters, ids, mask, eps):
        batch = data.Batch(ids[None], mask[None], ids[None], None, eps[None], 1, 1)
        rec, kl = functional_call(model, parameters, (batch,))
        return rec.sum() + kl.sum()

    parameters = dict(model.named_parameters())
    each = vmap(grad(objective), in_dims=(None, 0, 0, 0))(parameters, IDS, MASK, BATCH.eps)
    _, total = gradients(model)
    for name, gradient in each.items():
        torch.testing.assert_close(gradient.sum(0), total[name], atol=1e-3, rtol=1e-3)
    assert difference(each["w_mu.weight"][0], each["w_mu.weight"][1]) > 1e-2


# ------------------------------------------------------------------------------- tables, searches


class Series(list):
    """What a pandas Series has beside its texts: `keys`, as a table has."""

    def keys(self):
        return range(len(self))


class Frame(list):
    """What a pandas DataFrame has."""

    columns = ("text",)


def test_a_column_is_texts_and_a_table_is_none(speaking):
    mu, _ = speaking.encode_texts(TEXTS)
    assert torch.equal(speaking.encode_texts(Series(TEXTS))[0], mu)
    for table in {"text": TEXTS}, Frame(TEXTS):
        with pytest.raises(InputError, match="is a table"):
            speaking.encode_texts(table)


def test_pandas(speaking):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": TEXTS, "label": LABELS})
    mu, _ = speaking.encode_texts(frame["text"])
    assert torch.equal(mu, speaking.encode_texts(TEXTS)[0])
    some = frame[frame["label"] == 1]
    torch.testing.assert_close(speaking.encode_texts(some["text"])[0], mu[some.index.tolist()])
    z = pandas.DataFrame(mu.numpy(), index=frame.index)
    assert len(speaking.decode_texts(z.to_numpy(copy=True), max_new_tokens=2)) == len(TEXTS)
    with pytest.raises(InputError, match="is a table"):
        speaking.encode_texts(frame)
    frame.loc[2, "text"] = None
    with pytest.raises(InputError, match=r"texts\[2\]"):
        speaking.encode_texts(frame["text"])


def test_datasets(speaking):
    datasets = pytest.importorskip("datasets")
    table, (mu, _) = datasets.Dataset.from_dict({"text": TEXTS}), speaking.encode_texts(TEXTS)
    assert torch.equal(speaking.encode_texts(table["text"])[0], mu)

    def encode(rows):
        return {"mu": speaking.encode_texts(rows["text"])[0].numpy()}

    mapped = table.map(encode, batched=True, batch_size=5)
    torch.testing.assert_close(torch.tensor(mapped["mu"][:]), mu)
    stream = table.to_iterable_dataset()
    assert torch.equal(speaking.encode_texts(row["text"] for row in stream)[0], mu)
    for whole in table, table[:2]:
        with pytest.raises(InputError):
            speaking.encode_texts(whole)


@pytest.mark.parametrize("name", ["faiss", "hnswlib"])
def test_searches(speaking, name):
    library = pytest.importorskip(name)
    mu, _ = speaking.encode_texts(CLI_TEXTS)
    if name == "faiss":
        index = library.IndexFlatL2(mu.shape[1])
        index.add(mu.numpy())
        _, found = index.search(mu.numpy(), 2)
    else:
        index = library.Index("l2", mu.shape[1])
        index.init_index(max_elements=len(mu))
        index.add_items(mu.numpy())
        found, _ = index.knn_query(mu.numpy(), 2)
    others = torch.cdist(mu, mu) + torch.eye(len(mu)) * 1e9
    assert found[:, 0].tolist() == [0, 1, 2, 3]
    assert found[:, 1].tolist() == others.argmin(1).tolist()


def test_scikit_learn(speaking):
    encode = FunctionTransformer(lambda texts: speaking.encode_texts(texts)[0].numpy())
    pipeline = make_pipeline(encode, LogisticRegression(C=100.0))
    assert cross_val_score(pipeline, TEXTS, LABELS, cv=2).tolist() == [1.0, 1.0]
    shuffled = [0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0]  # the control: labels that no text explains
    assert cross_val_score(pipeline, TEXTS, shuffled, cv=2).mean() < 0.9


# --------------------------------------------------------------------------------------- releases


@pytest.mark.filterwarnings("error")
def test_cache_has_the_name_that_this_transformers_knows():
    model = tiny_vae()
    found = model.generate(Z, max_new_tokens=5)
    assert torch.equal(found, model.generate(Z, max_new_tokens=5, use_cache=False))
    for name in "cache", "past_key_values":
        with pytest.raises(InputError, match=f"generate takes no {name}"):
            model.generate(Z, **{name: None})
    # The control: the other name is unknown, or deprecated.
    other = {"cache", "past_key_values"} - {vae.CACHE}
    memory = BaseModelOutput(model.memory(Z))
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises((ValueError, FutureWarning)):
        model.t5.generate(encoder_outputs=memory, max_new_tokens=2, **dict.fromkeys(other, cache))
