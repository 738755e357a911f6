"""Each method's output against its paper's equation, computed apart: numpy float64, loops where indices are the point."""

from __future__ import annotations

import functools
import math

import numpy as np
import peft
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from duallora import methods
from duallora.methods import MethodSpec, apply
from duallora.methods.mora import KINDS, MoRA
from duallora.methods.rule import Prompt, RuleConfig

GPT2 = GPT2Config(vocab_size=67, n_embd=36, n_layer=2, n_head=6, n_positions=32, resid_pdrop=0.0)
X = torch.randn(5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def put(tiny, name: str, **settings):
    """The method on one linear layer [7, 10] in float64, every parameter random, and its base weight and bias."""
    model = tiny()
    W, b = model.lin.weight.detach().numpy().copy(), model.lin.bias.detach().numpy().copy()
    adapted = apply(model, MethodSpec(name, target_modules=["lin"], task_type=None, **settings)).model.double().eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3 + (1 if "magnitude" in n else 0))
    return adapted, W, b


def value(model, part: str) -> np.ndarray:
    (found,) = [p for n, p in [*model.named_parameters(), *model.named_buffers()] if f".{part}." in f".{n}."]
    return found.detach().double().numpy()


def check(model, expected: np.ndarray) -> None:
    with torch.no_grad():
        np.testing.assert_allclose(model(X).numpy(), expected, rtol=0, atol=1e-6)


def check_merged(model, expected: np.ndarray) -> None:
    check(model, expected)
    check(model.merge_and_unload(), expected)


def lora(W, p):
    return W + 7 / 3 * p("lora_B") @ p("lora_A")


def dora(W, p):
    moved, m = lora(W, p), p("lora_magnitude_vector")
    return np.array([m[i] * moved[i] / math.sqrt(sum(w * w for w in moved[i])) for i in range(7)])


def hira(W, p):
    A, B = p("hira_A"), p("hira_B")
    return np.array([[W[i, j] * (1 + sum(B[i, k] * A[k, j] for k in range(3))) for j in range(10)] for i in range(7)])


def vera(W, p):
    A, B = p("vera_A")[:, :10], p("vera_B")[:7]
    return W + np.diag(p("vera_lambda_b")) @ B @ np.diag(p("vera_lambda_d")) @ A


def randlora(W, p):
    """(alpha/r) sum_j B_j L_j A G_j with n = ceil(7 / 2) bases, A on the narrow side (out), so the sum is transposed.

    PEFT's layout pairs row (k, j) of A with the column of B that has the same place in its own order (j', k'): the bases
    are random, so this is the paper's sum with other draws.
    """
    A, B, L, G = (p(f"randlora_{x}") for x in ("A", "B", "lambda", "gamma"))
    assert (A.shape, B.shape, L.shape, G.shape) == ((2, 1, 7), (10, 4, 2), (2, 4), (4, 7))
    delta = np.zeros((10, 7))
    for k, j in np.ndindex(2, 4):
        place = k * 4 + j
        delta += L[k, j] * np.outer(B[:, place // 2, place % 2], A[k, 0] * G[j])
    return W + 7 / 2 * delta.T


def flora_core(W, p):
    assert p("G").shape == (2, 3)
    return W + 1.5 * p("A") @ p("G") @ p("B").T


@pytest.mark.parametrize(
    ("name", "settings", "weight"),
    [
        ("lora", {"r": 3, "alpha": 7.0}, lora),
        ("lora+", {"r": 3, "alpha": 7.0}, lora),
        ("dora", {"r": 3, "alpha": 7.0}, dora),
        ("hira", {"r": 3}, hira),
        ("vera", {"r": 3}, vera),
        ("randlora", {"r": 2, "alpha": 7.0}, randlora),
        ("flora-core", {"r": 2, "options": {"scale": 1.5, "r_in": 3}}, flora_core),
    ],
)
def test_the_weight_is_the_papers(tiny, name, settings, weight):
    if name == "hira" and not hasattr(peft, "HiraConfig"):
        pytest.skip("PEFT has HiRA from 0.20 on")
    model, W, b = put(tiny, name, **settings)
    check_merged(model, X.numpy() @ weight(W, functools.partial(value, model)).T + b)


def mora_by_hand(x, M, out: int, kind: str) -> list[float]:
    """One token, entry by entry, from the paper's equations and the authors' types 1 to 4 and 6."""
    size, width = len(M), len(x)
    n = -(-width // size)
    groups = [[x[(g * size + i) % width] for i in range(size)] for g in range(n)]  # filled up from the start of x

    def times(vector):
        return [sum(M[o][i] * vector[i] for i in range(size)) for o in range(size)]

    def runs(total):  # rhat runs of neighbors, the first ones one longer
        ends = [i * (total // size) + min(i, total % size) for i in range(size + 1)]
        return [range(ends[i], ends[i + 1]) for i in range(size)]

    if kind == "truncation":
        return (times([x[i] if i < width else 0.0 for i in range(size)]) + [0.0] * out)[:out]
    if kind in ("rotation", "decoupling"):
        done = []
        for g, group in enumerate(groups):
            turned = list(group)
            for i in range(size // 2 if kind == "rotation" else 0):
                angle = g * 10000 ** (-2 * i / size)
                u, v = group[i], group[i + size // 2]
                turned[i] = u * math.cos(angle) - v * math.sin(angle)
                turned[i + size // 2] = v * math.cos(angle) + u * math.sin(angle)
            done += times(turned)
        return [done[o % len(done)] for o in range(out)]
    if kind.startswith("sharing"):
        done = times([sum(group[i] for group in groups) for i in range(size)])
    else:
        done = times([sum(x[j] for j in run) for run in runs(width)])
    if kind.endswith("sharing"):
        return [done[o % size] for o in range(out)]
    return [done[i] for i, run in enumerate(runs(out)) for _ in run]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "r", [1, 2, 5, 9]
)  # rhat 4, 6 (5.8), 9 (9.2), 12 (12.4): fills up, exceeds, wider than x, and y
def test_mora(tiny, kind, r):
    model, W, b = put(tiny, "mora", r=r, options={"kind": kind})
    M = value(model, "M")
    assert len(M) == {1: 4, 2: 6, 5: 8 if kind == "rotation" else 9, 9: 12}[r]
    added = np.array([mora_by_hand(list(x), M, 7, kind) for x in X.numpy()])
    check_merged(model, X.numpy() @ W.T + b + added)


@pytest.mark.parametrize("kind", KINDS)
def test_mora_where_the_output_is_wider_than_all_groups(kind):
    rule = MoRA(RuleConfig(rule="mora", r=1, options={"kind": kind}, init_weights=False), 3, 40).double()
    x = torch.randn(3, dtype=torch.float64)
    expected = mora_by_hand(x.tolist(), rule.M.detach().numpy(), 40, kind)
    np.testing.assert_allclose(rule(x).detach().numpy(), expected, atol=1e-6)


def test_adapter_p(tiny):
    model, W, b = put(tiny, "adapter-p", r=3, options={"scale": 1.5})
    check(model, X.numpy() @ W.T + b + 1.5 * np.tanh(X.numpy() @ value(model, "D").T) @ value(model, "U").T)


def test_adapter_l(tiny):
    """Here after a linear layer instead of a block: it reads that layer's output."""
    model, W, b = put(tiny, "adapter-l", r=3)
    check(model, after_block(model, X.numpy() @ W.T + b))


def after_block(part, y: np.ndarray) -> np.ndarray:
    D, bias, U, c, gain, shift = (value(part, n) for n in ("D", "b", "U", "c", "gain", "shift"))
    mean, var = y.mean(-1, keepdims=True), y.var(-1, keepdims=True)
    normed = (y - mean) / np.sqrt(var + 1e-5) * gain + shift
    return y + np.maximum(normed @ D.T + bias, 0) @ U.T + c


@pytest.mark.parametrize("build", ["llama", "gpt2"])
def test_adapter_l_reads_and_writes_the_residual_stream(llama, build):
    """What leaves a block and enters the next is y + adapter(y), y the plain block's output with its residual added."""
    model = llama(torch.float64) if build == "llama" else GPT2LMHeadModel(GPT2).double().eval()
    adapted = apply(model, MethodSpec("adapter-l", r=3, options={"init_weights": False})).model.double()
    (name,) = {n.rpartition(".0.")[0] for n, _ in adapted.named_modules() if n.endswith(".0.base_layer")}
    blocks = adapted.get_submodule(name)
    seen: dict[str, np.ndarray] = {}
    blocks[0].base_layer.register_forward_hook(lambda m, a, out: seen.update(y=out.detach().numpy()))
    blocks[1].register_forward_pre_hook(lambda m, args: seen.update(next=args[0].detach().numpy()))
    adapted(input_ids=torch.randint(0, 67, (2, 9)))
    np.testing.assert_allclose(seen["next"], after_block(blocks[0], seen["y"]), atol=1e-12)
    assert abs(seen["next"] - seen["y"]).max() > 1e-3


def gram_schmidt(V: np.ndarray) -> np.ndarray:
    rows: list[np.ndarray] = []
    for v in V:
        for row in rows:
            v = v - (v @ row) * row
        rows.append(v / math.sqrt(v @ v))
    return np.array(rows)


def test_loreft(tiny):
    """h + R^T (W h + b - R h) on the layer's output at the first 1 and last 2 tokens of each prompt."""
    model, W0, b0 = put(tiny, "loreft", r=3, options={"first": 1, "last": 2})
    V, W, b = value(model, "V"), value(model, "W"), value(model, "b")
    R = gram_schmidt(V)
    np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
    x = torch.randn(5, 6, 10, dtype=torch.float64)
    layer = model.base_model.model.lin
    prompts = [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    layer.prompt.mask = torch.tensor(prompts, dtype=torch.bool)
    # Each end at most half of the prompt: of three tokens one each, of one none (pyreft's get_intervention_locations).
    edited = [[1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0]]
    y = x.numpy() @ W0.T + b0
    expected = y + (y @ W.T + b - y @ R.T) @ R * np.array(edited)[..., None]
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-12)


def test_the_prompt_is_what_is_attended_and_not_trained_on():
    prompt, none = Prompt(), None
    ids = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, 3, 3, 3], [-100, -100, -100, -100, 3]])
    prompt.see(none, (ids,), {})
    assert prompt.mask.all()
    prompt.see(none, (), {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])})
    assert prompt.mask.int().tolist() == mask.tolist()
    prompt.see(none, (), {"inputs_embeds": torch.zeros(2, 5, 3), "attention_mask": mask, "labels": labels})
    assert prompt.mask.int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]
    with pytest.raises(methods.ConfigError, match="labels of a row train on all of its tokens"):
        prompt.see(none, (), {"input_ids": ids, "labels": torch.ones(2, 5, dtype=torch.long)})


def test_generating_with_loreft_edits_the_prompt_alone(llama):
    """The logits while generating, one token at a time over a cache, are those of the whole text with its answer marked."""
    torch.manual_seed(0)
    model = apply(llama(), MethodSpec("loreft", r=3, options={"first": 2, "last": 2})).model.eval()
    ids = torch.randint(3, 67, (2, 6))
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, output_scores=True,
        return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    labels = out.sequences.clone()
    labels[:, :6] = -100
    with torch.no_grad():
        whole = model(input_ids=out.sequences, labels=labels).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(out.scores, 1), whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("K", [0, 2])
def test_delta_lora_is_the_papers_algorithm(tiny, K):
    """The paper's loop, W changed after every step t > K, against ours, which never touches W: same outputs, same factors."""
    spec = {"alpha": 7.0, "target_modules": ["lin"], "task_type": None, "options": {"lambda_": 0.5, "K": K}}
    model = apply(tiny(), MethodSpec("delta-lora", r=3, **spec)).model.double()
    W0, b0 = (p.detach().numpy().copy() for p in (model.base_model.model.lin.weight, model.base_model.model.lin.bias))
    rule = model.base_model.model.lin.duallora_rule_parts["default"]
    A, B, W = rule.A.detach().numpy().copy(), rule.B.detach().numpy().copy(), W0.copy()
    optimizer = torch.optim.SGD(methods.trained(model), lr=0.05)
    target = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    s, x, t = 7 / 3, X.numpy(), target.numpy()
    for step in range(5):
        y = model(X)
        np.testing.assert_allclose(y.detach().numpy(), x @ W.T + b0 + s * x @ A.T @ B.T, atol=1e-12)
        (y - target).square().sum().mul(0.5).backward()
        G = (x @ W.T + b0 + s * x @ A.T @ B.T - t).T @ x  # dL/dW'
        A_next, B_next = A - 0.05 * s * B.T @ G, B - 0.05 * s * G @ A.T
        optimizer.step()
        optimizer.zero_grad()
        if step > K:
            W = W + 0.5 * s * (B_next @ A_next - B @ A)
        A, B = A_next, B_next
        np.testing.assert_allclose(rule.A.detach().numpy(), A, atol=1e-12)
    assert abs(W - W0).max() > 1e-3
    check(model.merge_and_unload(), x @ (W + s * B @ A).T + b0)


def test_conv1d_merges_in_its_own_layout():
    torch.manual_seed(0)
    ids = torch.randint(0, 67, (2, 9))
    for name in ("mora", "flora-core", "delta-lora"):
        spec = MethodSpec(name, r=3, target_modules=["c_attn", "c_proj"], options={"init_weights": False})
        model = apply(GPT2LMHeadModel(GPT2), spec).model.eval()
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_prompt_tuning_is_the_base_model_on_longer_input(llama, batch):
    adapted = apply(llama(), MethodSpec("prompt", options={"num_virtual_tokens": 3})).model.eval()
    P = next(p for p in adapted.parameters() if p.requires_grad)
    base, ids = llama(), batch["input_ids"]
    with torch.no_grad():
        embedded = torch.cat([P.expand(2, 3, 36), base.get_input_embeddings()(ids)], 1)
        expected = base(inputs_embeds=embedded).logits
        found = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found[:, -11:], expected[:, -11:], rtol=0, atol=1e-6)


def test_a_prefix_is_seen_by_every_query():
    """One layer, one head, by hand: softmax over [P_k; K], values [P_v; V], no mask between them (P-tuning v2 on BERT)."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=1, num_labels=2,
        max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    spec = MethodSpec("p-tuning-v2", task_type="SEQ_CLS", options={"num_virtual_tokens": 2})
    adapted = apply(BertForSequenceClassification(config), spec).model.eval().double()
    attention = adapted.get_base_model().bert.encoder.layer[0].attention.self
    seen = {}
    attention.register_forward_hook(lambda m, args, out: seen.update(h=args[0], y=out[0]))
    with torch.no_grad():
        adapted(input_ids=torch.tensor([[3, 5, 7]]), attention_mask=torch.ones(1, 3, dtype=torch.long))
        P = next(p for n, p in adapted.named_parameters() if "prompt_encoder" in n)
        P = P.reshape(2, 2, 4)  # [tokens, k or v, d]
        h = seen["h"][0]
        q, k, v = attention.query(h), attention.key(h), attention.value(h)
        keys, values = torch.cat([P[:, 0], k]), torch.cat([P[:, 1], v])
        expected = (q @ keys.T / 2).softmax(-1) @ values  # sqrt(4) = 2
    torch.testing.assert_close(seen["y"][0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_takes_the_leading_components_or_those_that_matter_least(llama, batch, mode):
    """By hand: W C = U S V^T over the calibration tokens; the start is the part of W in r of its components, ipm unless set."""
    pytest.importorskip("attr", reason="PEFT's CorDA needs attrs")
    base = llama()
    layer = base.model.layers[0].self_attn.q_proj
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()[0].double()))
    for row, start in ((0, 0), (1, 3)):  # as PEFT sees them: one text at a time, no padding
        base(batch["input_ids"][row : row + 1, start:])
    handle.remove()
    C = sum((x / x.max().abs()).T @ (x / x.max().abs()) for x in seen) / 2
    C = C + 0.01 * C.diagonal().mean() * torch.eye(36)
    W = layer.weight.detach().double()
    U, S, Vh = torch.linalg.svd(W @ C)
    chosen = slice(-4, None) if mode == "kpm" else slice(4)
    part = U[:, chosen] @ torch.diag(S[chosen]) @ Vh[chosen] @ torch.linalg.inv(C)
    spec = MethodSpec("corda", r=4, target_modules=["q_proj"], options={} if mode == "ipm" else {"corda_method": mode})
    adapted = apply(base, spec, batches=[batch]).model
    delta = adapted.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default").detach().double()
    torch.testing.assert_close(delta, part, rtol=0, atol=1e-4)
