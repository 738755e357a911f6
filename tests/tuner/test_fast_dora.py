"""fast_dora against PEFT's own DoRA and against float64 loops: same output, gradients and files, in any life a model has."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings

import peft
import pytest
import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from duallora.errors import ConfigError
from duallora.ops import dora as ops
from duallora.tuner import fast_dora as tuner
from duallora.tuner.fast_dora import FastDoraVariant, fast_dora

PEFT = tuple(map(int, peft.__version__.split(".")[:2]))
BASES = {
    "linear": lambda: nn.Linear(63, 100),
    "without bias": lambda: nn.Linear(63, 100, bias=False),
    "conv1d": lambda: Conv1D(100, 63),
}


@pytest.fixture(autouse=True)
def _peft_says_it_corrects_fan_in_fan_out():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        yield


def trained(model: nn.Module, spread: float = 0.1) -> nn.Module:
    """Adapters as after training: no factor zero, magnitudes off the norms and a negative one among them."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * spread)
        if "magnitude" in name and parameter.ndim == 1:
            parameter.data[1] *= -1
    return model


def dora_model(base: nn.Module, targets: list[str], **options) -> peft.PeftModel:
    torch.manual_seed(3)
    config = peft.LoraConfig(**{"r": 5, "lora_alpha": 7, "use_dora": True, "target_modules": targets, **options})
    return trained(peft.get_peft_model(base, config))


def one_layer(kind: str, **options) -> peft.PeftModel:
    torch.manual_seed(2)
    base = BASES[kind]()
    nn.init.normal_(base.weight, std=0.1)
    if base.bias is not None:
        nn.init.normal_(base.bias)
    return dora_model(nn.Sequential(base), ["0"], **options)


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(PEFT's, ours) of one model."""
    return model, fast_dora(copy.deepcopy(model))


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]


def results(model: nn.Module, x: Tensor, dY: Tensor | None = None) -> dict[str, Tensor]:
    """y, dx and every gradient, from one seed for the dropout."""
    model.zero_grad()
    x = x.clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(11)
    y = model(x)
    y = getattr(y, "logits", y)
    y.backward(torch.randn_like(y) if dY is None else dY)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"y": y.detach()} | ({"dx": x.grad} if x.grad is not None else {})


def assert_same(ours: dict[str, Tensor], peft_s: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == peft_s.keys()
    for name, want in peft_s.items():
        off = (ours[name] - want).abs().max() / want.abs().max().clamp_min(1e-30)
        assert off <= tolerance, f"{name} is off by {off:.1e}"


# -- the theorem --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", BASES)
def test_output_and_gradients_are_peft_s(kind, dropout):
    """alpha != r, rank 5, in 63, out 100, a bias, three dimensions, negative and zero magnitudes."""
    model = one_layer(kind, lora_dropout=dropout).train()
    layers(model)[0].lora_magnitude_vector["default"].weight.data[2] = 0
    theirs, ours = pair(model)
    x = torch.randn(4, 7, 63)
    assert_same(results(ours, x), results(theirs, x))
    assert_same(results(ours.eval(), x[0]), results(theirs.eval(), x[0]))
    assert_same(results(ours, x[0, 0]), results(theirs, x[0, 0]))


def by_hand(
    x: list, W: list, b: list | None, A: list, B: list, m: list, s: float, dY: list
) -> tuple[list[list[float]], list, list, list, list]:
    """(y, dx, dA, dB, dm) by loops over single entries; the norm is a constant of the gradients (section 4.3)."""
    n, d, k, r = len(x), len(W), len(W[0]), len(A)
    V = [[W[i][j] + s * sum(B[i][q] * A[q][j] for q in range(r)) for j in range(k)] for i in range(d)]
    norm = [math.sqrt(sum(v * v for v in row)) for row in V]
    z = [[sum(x[t][j] * V[i][j] for j in range(k)) for i in range(d)] for t in range(n)]
    y = [[m[i] / norm[i] * z[t][i] + (b[i] if b else 0.0) for i in range(d)] for t in range(n)]
    g = [[dY[t][i] * m[i] / norm[i] for i in range(d)] for t in range(n)]
    dx = [[sum(g[t][i] * V[i][j] for i in range(d)) for j in range(k)] for t in range(n)]
    dV = [[sum(g[t][i] * x[t][j] for t in range(n)) for j in range(k)] for i in range(d)]
    dA = [[s * sum(B[i][q] * dV[i][j] for i in range(d)) for j in range(k)] for q in range(r)]
    dB = [[s * sum(dV[i][j] * A[q][j] for j in range(k)) for q in range(r)] for i in range(d)]
    dm = [sum(dY[t][i] * z[t][i] for t in range(n)) / norm[i] for i in range(d)]
    return y, dx, dA, dB, dm


@pytest.mark.parametrize("kind", BASES)
def test_output_and_gradients_by_hand(kind):
    """Independent of torch's autograd and of PEFT."""
    model = fast_dora(one_layer(kind)).double()
    (layer,) = layers(model)
    x, dY = torch.randn(3, 63).double(), torch.randn(3, 100).double()
    got = results(model, x, dY)
    base = layer.get_base_layer()
    W = base.weight.T if kind == "conv1d" else base.weight
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    m = layer.lora_magnitude_vector["default"].weight
    b = None if base.bias is None else base.bias.tolist()
    x, W, A, B, m, dY = (t.detach().tolist() for t in (x, W, A, B, m, dY))
    keys = ["y", "dx", *(f"base_model.model.0.lora_{part}.default.weight" for part in ("A", "B", "magnitude_vector"))]
    exact = {
        key: torch.tensor(v, dtype=torch.float64)
        for key, v in zip(keys, by_hand(x, W, b, A, B, m, 7 / 5, dY), strict=True)
    }
    assert_same({key: got[key] for key in keys}, exact, tolerance=1e-12)


def test_differentiated_twice():
    """Gradients of gradients, as PEFT's operators give them: in float64 against finite differences."""
    model = fast_dora(one_layer("without bias")).double()
    theirs = copy.deepcopy(model)
    layers(theirs)[0].lora_variant = {"default": DoraLinearVariant()}

    def penalized(some: nn.Module) -> list[Tensor]:
        x = torch.linspace(-1, 1, 126, dtype=torch.float64).view(2, 63).requires_grad_()
        parameters = [p for p in some.parameters() if p.requires_grad]
        first = torch.autograd.grad(some(x).square().sum(), [x, *parameters], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *parameters]))

    for ours, want in zip(penalized(model), penalized(theirs), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-9)


# -- row norms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, "linear"), (torch.bfloat16, "conv1d"), (torch.float64, "linear")]
)
def test_row_norms_from_the_identity(dtype, layout, monkeypatch):
    """Against float64, with 16-bit weights widened in several blocks whose last is smaller."""
    monkeypatch.setattr(ops, "_BLOCK_ELEMENTS", 63 * 9)
    torch.manual_seed(0)
    W, A, B = torch.randn(100, 63).to(dtype) / 8, torch.randn(5, 63) / 8, torch.randn(100, 5) / 3
    Wt = W.T if layout == "linear" else W.T.contiguous()
    want = (W.double() - 1.4 * B.double() @ A.double()).norm(dim=1)
    got = ops.row_norms(Wt, A, B, -1.4, ops.row_squares(Wt))
    torch.testing.assert_close(got.double(), want, rtol=4e-7, atol=0)


@pytest.mark.parametrize("left_over", [0.5, 1e-3])
def test_row_norms_where_the_update_cancels_the_base(left_over):
    """The identity loses digits there; such rows are computed plainly, as well as PEFT computes them."""
    torch.manual_seed(0)
    A = torch.linalg.qr(torch.randn(63, 5)).Q.T.contiguous()
    W = torch.randn(100, 5) @ A
    B = W @ A.T * (left_over - 1)
    B[7] = 0.1  # one that does not cancel
    want = (W.double() + B.double() @ A.double()).norm(dim=1)
    got = ops.row_norms(W.T, A, B, 1.0, ops.row_squares(W.T))
    torch.testing.assert_close(got.double(), want, rtol=2e-6 / left_over, atol=0)
    assert ((got - want) / want).abs().max() <= 2 * (((W + B @ A).norm(dim=1) - want) / want).abs().max() + 1e-6


def test_rows_of_zeros_stay_finite():
    """A base row of zeros starts with magnitude 0: PEFT divides 0 by 0 there, the other rows are as PEFT's."""
    torch.manual_seed(0)
    base = nn.Linear(63, 100, bias=False)
    base.weight.data[4] = 0
    theirs, ours = pair(peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(target_modules=["0"], use_dora=True)))
    x, dY = torch.randn(5, 63), torch.randn(5, 100)
    got, want = results(ours, x, dY), results(theirs, x, dY)
    assert all(value.isfinite().all() for value in got.values())
    rows = torch.arange(100) != 4
    torch.testing.assert_close(got["y"][:, rows], want["y"][:, rows])
    assert (got["y"][:, 4] == 0).all()


# -- memory -------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest new tensor, in elements; views of older memory are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        old = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.3), (torch.bfloat16, 0.0)])
def test_no_tensor_of_the_size_of_the_weight(dtype, dropout, monkeypatch):
    """Forward and backward, in the first step too; float32 factors over a bfloat16 base included."""
    monkeypatch.setattr(ops, "_BLOCK_ELEMENTS", 1 << 12)
    base = nn.Sequential(nn.Linear(200, 300).to(dtype))
    config = peft.LoraConfig(r=4, target_modules=["0"], use_dora=True, lora_dropout=dropout)
    theirs, ours = pair(trained(peft.get_peft_model(base, config)).train())
    largest = {}
    for name, model in (("peft", theirs), ("fast", ours)):
        with Largest() as mode:
            model(torch.randn(3, 200).to(dtype).requires_grad_()).float().sum().backward()
        largest[name] = mode.elements
    assert largest["fast"] <= 1 << 12 < 200 * 300 <= largest["peft"]


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd holds between forward and backward, parameters and x left out."""
    own = {p.untyped_storage().data_ptr() for p in [x, *model.parameters()]}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    size = sum(seen.values())
    y.sum().backward()
    return size


def test_one_output_is_kept_for_the_magnitude():
    """LoRA keeps x A^T; DoRA needs one [tokens, out] more for m; PEFT's keeps two."""
    theirs, ours = pair(one_layer("without bias"))
    x, output, few = torch.randn(512, 63), 512 * 100 * 4, 5 * 100 * 4
    assert kept(ours, x) <= 512 * 5 * 4 + output + few
    assert kept(theirs, x) >= 2 * output
    for parameter in layers(ours)[0].lora_magnitude_vector.parameters():
        parameter.requires_grad_(False)
    assert kept(ours, x) <= 512 * 5 * 4 + few


def test_products_are_lora_s_and_those_of_the_norm():
    """The largest product of the norm is A W0^T, r / tokens of the base layer's."""
    lora = peft.get_peft_model(nn.Sequential(BASES["without bias"]()), peft.LoraConfig(r=5, target_modules=["0"]))
    counts = []
    for model in (fast_dora(one_layer("without bias")), lora):
        model(torch.randn(4, 63))
        x = torch.randn(128, 63, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append(counter.get_total_flops())
    norm = 2 * 5 * (63 * 100 + 5 * 63 + 5 * 100)
    not_counted = 2 * 128 * 5 * (100 + 63)  # addmm_, in place: s u B^T and du A
    assert counts[0] + not_counted == counts[1] + norm


# -- |w|^2 is computed once and never stale -----------------------------------------------------------------------


def merge_and_unmerge(model):
    model.merge_adapter()
    layers(model)[0].get_base_layer().weight.data.mul_(1.25)  # a merged model is tuned further
    model.unmerge_adapter()


def assign_other_weights(model):
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()}, assign=True)


def add_olora(model):
    """PEFT writes W0 through ``.data`` here, which torch does not count."""
    model.add_adapter("other", peft.LoraConfig(r=5, target_modules=["0"], init_lora_weights="olora"))


@torch.no_grad()
def write_where_the_sample_is_blind(model):
    layers(model)[0].get_base_layer().weight[1, 1] = 2.0


@pytest.mark.parametrize(
    "change",
    [
        write_where_the_sample_is_blind,
        merge_and_unmerge,
        assign_other_weights,
        add_olora,
        lambda model: layers(model)[0].get_base_layer().weight.data.copy_(torch.ones(100, 63)),
        lambda model: setattr(layers(model)[0].get_base_layer().weight, "data", torch.ones(100, 63)),
        lambda model: setattr(layers(model)[0].get_base_layer(), "weight", nn.Parameter(torch.ones(100, 63))),
    ],
)
def test_kept_squares_never_go_stale(change):
    model = fast_dora(one_layer("linear"))
    x = torch.randn(4, 63)
    before = model(x)
    change(model)
    after = model(x)
    assert not torch.equal(before, after)
    fresh = copy.deepcopy(model)
    layers(fresh)[0].lora_variant = {"default": DoraLinearVariant()}
    torch.testing.assert_close(after, fresh(x), rtol=2e-6, atol=2e-6)


def test_squares_are_computed_once(monkeypatch):
    """Over training steps; and each call of fast_dora forgets them."""
    calls = []
    monkeypatch.setattr(tuner, "row_squares", lambda Wt: calls.append(1) or ops.row_squares(Wt))
    model = fast_dora(one_layer("linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        model(torch.randn(4, 63)).square().mean().backward()
        optimizer.step()
    assert len(calls) == 1
    fast_dora(model)(torch.randn(4, 63))
    assert len(calls) == 2


# -- the life of a PEFT model -------------------------------------------------------------------------------------


def test_files_are_peft_s(llama, ids, tmp_path):
    """Keys, bytes and adapter_config.json; PEFT without us loads them, we take over what it loads."""
    theirs, ours = pair(dora_model(llama(), ["q_proj"]))
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "theirs" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["use_dora"] is True
    plain = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    want = theirs.eval()(ids).logits
    torch.testing.assert_close(plain(ids).logits, want)
    torch.testing.assert_close(fast_dora(plain)(ids).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("architecture", "safe"), [("llama", False), ("gpt2", True)])
def test_merging_is_peft_s_to_the_bit(request, ids, architecture, safe):
    base = request.getfixturevalue(architecture)
    if architecture == "gpt2" and PEFT < (0, 20):
        pytest.skip("unmerging DoRA of Conv1D fails in PEFT before 0.20")
    targets = "all-linear" if architecture == "llama" else ["c_attn", "c_proj"]
    theirs, ours = pair(dora_model(base(), targets).eval())
    unmerged = ours(ids).logits
    for model in (theirs, ours):
        model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(ours(ids).logits, unmerged, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    for model in (theirs, ours):
        model.unmerge_adapter()
    torch.testing.assert_close(ours(ids).logits, unmerged, rtol=1e-4, atol=1e-4)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, unmerged, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(63, 40, bias=False), nn.Linear(40, 40), nn.Linear(40, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_several_adapters_come_and_go():
    """Later adapters are ours too, on layers that had none before as well; plain LoRA beside DoRA; both active at once."""
    torch.manual_seed(0)
    theirs, ours = pair(dora_model(Net(), ["a", "b"]))
    x = torch.randn(5, 63)
    for model in (theirs, ours):
        torch.manual_seed(1)
        model.add_adapter("second", peft.LoraConfig(r=3, use_dora=True, target_modules=["b", "c"]))
        model.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["a", "b", "c"]))
        model.set_adapter("second")
        trained(model)
        model.set_adapter("plain")
        trained(model)
        model.set_adapter("default")
    ours_now = {name: type(v) for layer in layers(ours) for name, v in layer.lora_variant.items()}
    assert ours_now == {"default": FastDoraVariant, "second": FastDoraVariant}
    for active in (["default"], ["plain"], ["default", "second"], ["plain", "default"]):
        for model in (theirs, ours):
            model.base_model.set_adapter(active)
        assert_same(results(ours, x), results(theirs, x))
    for model in (theirs, ours):
        model.delete_adapter("default")
        model.base_model.set_adapter(["second"])
    assert_same(results(ours, x), results(theirs, x))


@pytest.mark.skipif(PEFT < (0, 20), reason="transformers asks for PEFT 0.20")
def test_transformers_own_adapter_calls(llama, ids):
    model = llama()
    model.add_adapter(peft.LoraConfig(r=5, use_dora=True, target_modules=["q_proj"]))
    theirs, ours = pair(trained(model))
    assert all(type(v) is FastDoraVariant for layer in layers(ours) for v in layer.lora_variant.values())
    assert_same(results(ours, ids), results(theirs, ids))


def test_copies_and_pickles(llama, ids):
    ours = fast_dora(dora_model(llama(), "all-linear")).eval()
    want = ours(ids).logits
    assert copy.copy(layers(ours)[0].lora_variant["default"])._squares is None  # a weak reference has one owner
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):  # noqa: S301 (our own bytes)
        assert torch.equal(other(ids).logits, want)
        other.add_adapter("later", peft.LoraConfig(use_dora=True, target_modules=["lm_head"]))
        assert all(type(v) is FastDoraVariant for layer in layers(other) for v in layer.lora_variant.values())


def without_gradient_of(part: str):
    return lambda model: [p.requires_grad_("lora" in n and part not in n) for n, p in model.named_parameters()]


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize(
    "change",
    [
        lambda model: layers(model)[0].get_base_layer().requires_grad_(True),
        *map(without_gradient_of, ("lora_A", "lora_B", "lora_magnitude_vector")),
    ],
)
def test_what_is_trained_gets_peft_s_gradients_and_the_rest_none(kind, change):
    """Of the base layer too: the norm stays a constant."""
    theirs, ours = pair(one_layer(kind))
    for model in (theirs, ours):
        change(model)
    x = torch.randn(4, 63)
    assert_same(results(ours, x), results(theirs, x))


# -- precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "case"),
    [("linear", "autocast"), ("without bias", "bf16 base"), ("conv1d", "all bf16"), ("linear", "fp16 base")],
)
def test_half_precision_is_as_close_to_the_truth_as_peft_s(kind, case):
    """Error against the float64 model at most that of PEFT's, plus a rounding."""
    exact = one_layer(kind)
    dtype = torch.float16 if case == "fp16 base" else torch.bfloat16
    if case == "all bf16":
        exact.to(dtype).float()
    elif case != "autocast":
        layers(exact)[0].get_base_layer().to(dtype).float()
    x, dY = torch.randn(64, 63).to(dtype).float(), torch.randn(64, 100).to(dtype).float()
    want = results(copy.deepcopy(exact).double(), x.double(), dY.double())
    theirs, ours = pair(exact)
    for model in (theirs, ours):
        if case == "all bf16":
            model.to(dtype)
        elif case != "autocast":
            layers(model)[0].get_base_layer().to(dtype)
    errors = []
    for model in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            got = results(model, x if case == "autocast" else x.to(dtype), dY.to(dtype))
        errors.append({name: (got[name] - want[name]).norm() / want[name].norm() for name in want})
    for name in want:
        assert errors[0][name] <= 1.2 * errors[1][name] + torch.finfo(dtype).eps / 8, (name, errors)


def test_autocast_leaves_the_norms_alone(monkeypatch):
    """Through bfloat16 products they would be off by 1e-3, and every row of the output with them."""
    norms = []
    monkeypatch.setattr(tuner, "row_norms", lambda *args: norms.append(ops.row_norms(*args)) or norms[-1])
    model, x = fast_dora(one_layer("linear")), torch.randn(4, 63)
    model(x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert torch.equal(*norms)


def test_start_changes_nothing():
    """B = 0 and m = |W0|: in bfloat16 exactly nothing, as PEFT's norm is rounded like m."""
    torch.manual_seed(0)
    base = nn.Linear(63, 100, bias=False).bfloat16()
    config = peft.LoraConfig(r=5, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config, autocast_adapter_dtype=False)
    x = torch.randn(8, 63).bfloat16()
    assert torch.equal(fast_dora(model)(x), base(x))


# -- company ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reentrant", "dropout"), [(False, 0.1), (True, 0.0)])
def test_gradient_checkpointing(llama, ids, reentrant, dropout):
    theirs, ours = pair(dora_model(llama(), "all-linear", lora_dropout=dropout).train())
    want = results(theirs, ids)
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(results(ours, ids), want)


class WritesOverItsActivations(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.a, self.b, self.checkpointed = nn.Linear(63, 100, bias=False), nn.Linear(100, 7), checkpointed

    def inner(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).mul_(0.5).clamp_(-0.2, 0.2))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_may_write_over_the_output(checkpointed):
    """OLMo clamps its projections in place. We keep y for the gradient of m, and must see that it is gone."""
    model = dora_model(WritesOverItsActivations(checkpointed), ["a", "b"])
    model.add_adapter("second", peft.LoraConfig(r=3, use_dora=True, target_modules=["a"]))
    theirs, ours = pair(model)
    x = torch.randn(4, 63)
    for active in (["default"], ["default", "second"]):
        for model in (theirs, ours):
            model.base_model.set_adapter(active)
        assert_same(results(ours, x), results(theirs, x))


def test_hooks_are_called_and_a_kept_base_output_is_not_written_over():
    """A hook on the base layer may keep its output, as feature extractors do; one on a factor makes PEFT's own path."""
    model, seen, calls = one_layer("without bias"), [], []
    layers(model)[0].get_base_layer().register_forward_hook(lambda m, args, y: seen.append((y, y.clone())))
    theirs, ours = pair(model)
    x = torch.randn(4, 63)
    assert_same(results(ours, x), results(theirs, x))
    assert all(torch.equal(kept_y, then) for kept_y, then in seen)
    layers(ours)[0].lora_B["default"].register_forward_hook(lambda *_: calls.append(1))
    ours(x)
    assert calls


def test_inference_mode_and_no_grad():
    theirs, ours = pair(one_layer("linear").eval())
    x = torch.randn(4, 63)
    with torch.no_grad():
        found = [ours(x)]
    with torch.inference_mode():
        found += [ours(x), copy.deepcopy(ours)(x)]
    for y in (*found, ours(x)):
        torch.testing.assert_close(y, theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(peft_dora, "ENABLE_DORA_CACHING"), reason="since PEFT 0.19")
def test_dora_caching_is_peft_s_switch(monkeypatch):
    """On, evaluation computes the norms once; training forgets them; off, they follow the factors."""
    from peft.helpers import DoraCaching

    calls = []
    monkeypatch.setattr(tuner, "row_norms", lambda *args: calls.append(1) or ops.row_norms(*args))
    model = fast_dora(one_layer("linear")).eval()
    x = torch.randn(4, 63)
    with DoraCaching():
        want = model(x)
        assert torch.equal(model(x), want)
        assert len(calls) == 1
        model.train().eval()
        model(x)
        assert len(calls) == 2
    model(x)
    assert len(calls) == 3


@pytest.mark.parametrize(("kind", "backend"), [("linear", "eager"), ("conv1d", "aot_eager")])
def test_compiles_in_one_graph(kind, backend):
    """fullgraph, where PEFT's own DoRA breaks; "eager" draws the same dropout, "aot_eager" traces the backward too."""
    model = fast_dora(one_layer(kind, lora_dropout=0.2)).train(backend == "eager")
    x = torch.randn(5, 63)
    want = results(model, x)
    fast_dora(model)  # forgets what it kept
    got = results(torch.compile(model, backend=backend, fullgraph=True), x)
    assert layers(model)[0].lora_variant["default"]._squares is None
    assert_same({name.removeprefix("_orig_mod."): value for name, value in got.items()}, want)


def test_function_transforms():
    """torch.func sees plain operators: gradients per sample."""
    model = fast_dora(one_layer("without bias"))
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(3, 63)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(per_sample[name].sum(0), p.grad, rtol=1e-4, atol=1e-4)


# -- what is taken and what is left -------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.c, self.l = nn.Embedding(11, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.l(self.c(self.e(ids).transpose(1, 2)).transpose(1, 2))


def test_what_is_not_a_plain_linear_layer_stays_with_peft_and_is_counted():
    model, ids = dora_model(Mixed(), ["e", "c", "l"]), torch.arange(10).view(2, 5)
    want = results(copy.deepcopy(model), ids)
    with pytest.warns(UserWarning, match="left 2 of 3 DoRA layers to PEFT's own code: 1 x Conv1d, 1 x Embedding"):
        fast_dora(model)
    assert_same(results(model, ids), want)

    class Quantized(nn.Linear):
        pass

    model = dora_model(nn.Sequential(Quantized(63, 100), nn.Linear(100, 7), nn.Linear(7, 5)), ["0", "1", "2"])
    layers(model)[1].get_base_layer().to(torch.float8_e4m3fn)
    with pytest.warns(UserWarning, match="left 2 of 3 .* 1 x Linear, 1 x Quantized"):
        fast_dora(model)


def test_nothing_to_speed_up_is_an_error():
    plain = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["a"]))
    with pytest.raises(ConfigError, match="no DoRA layer in this PeftModel"):
        fast_dora(plain)
    with pytest.raises(ConfigError, match="not merged away"):
        fast_dora(fast_dora(one_layer("linear")).merge_and_unload())
