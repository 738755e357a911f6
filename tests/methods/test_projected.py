"""GaLore, GaRare and Flora against their papers' loops in numpy, and what survives a checkpoint."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from duallora.errors import ConfigError
from duallora.methods import MethodSpec, apply
from duallora.methods.projected import Flora, ProjectedAdamW, _gaussian, targeted

STEPS = 5


def start(shape, seed: int = 0) -> tuple[nn.Parameter, list[torch.Tensor]]:
    """A parameter, and the gradients of its steps."""
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator)), list(torch.randn(STEPS, *shape, generator=generator))


def doubles(tensors) -> list[np.ndarray]:
    return [t.detach().double().numpy().copy() for t in tensors]


def drive(optimizer, parameter, all_gradients) -> list[np.ndarray]:
    """The steps; the projection each of them used."""
    used = []
    for gradient in all_gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        if "P" in optimizer.state[parameter]:
            used.append(optimizer.state[parameter]["P"].double().numpy())
    return used


def adam_by_hand(W, G, P, scale, lr, wd):
    """Algorithm 2 of the GaLore paper with decoupled decay, the projections given; tall matrices from the right."""
    m = v = 0.0
    for t, (g, p) in enumerate(zip(G, P, strict=True), start=1):
        R = g @ p if len(g) >= len(g[0]) else p.T @ g
        m, v = 0.9 * m + 0.1 * R, 0.999 * v + 0.001 * R * R
        N = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        W = W - lr * wd * W - lr * scale * (N @ p.T if len(g) >= len(g[0]) else p @ N)
    return W


@pytest.mark.parametrize("shape", [(9, 6), (5,)])
def test_unprojected_parameters_get_torchs_adamw(shape):
    ours, G = start(shape)
    theirs = nn.Parameter(ours.detach().clone())
    drive(ProjectedAdamW([ours], 0.01, weight_decay=0.1), ours, G)
    drive(torch.optim.AdamW([theirs], 0.01, weight_decay=0.1), theirs, G)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("projection", ["svd", "gaussian", "orthogonal"])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_galore_and_garare_are_their_algorithm(shape, projection):
    """P is new in steps 1, 3, 5 (gap 2), moments are kept: the leading singular vectors, of the smaller side, or random."""
    W, gradients = start(shape)
    (w, *G), tall = doubles([W, *gradients]), shape[0] >= shape[1]
    optimizer = ProjectedAdamW([W], 0.01, weight_decay=0.1, rank=3, gap=2, scale=0.25, projection=projection)
    P = drive(optimizer, W, gradients)
    assert np.array_equal(P[0], P[1])
    assert not np.allclose(P[1], P[2])
    for t, p in enumerate(P):
        U, _, Vt = np.linalg.svd(G[t - t % 2])
        if projection != "gaussian":
            other = (Vt[:3].T if tall else U[:, :3]) if projection == "svd" else p
            np.testing.assert_allclose(abs(other.T @ p), np.eye(3), atol=1e-5)  # up to their signs
    np.testing.assert_allclose(W.detach().numpy(), adam_by_hand(w, G, P, 0.25, 0.01, 0.1), atol=1e-6)
    assert optimizer.state[W]["exp_avg"].shape == ((shape[0], 3) if tall else (3, shape[1]))


def test_a_random_projection_is_the_identity_on_average():
    """E[P P^T] = I for P ~ N(0, 1/rank): the mean of 4,000 draws, whose entries spread by 1/sqrt(rank 4,000)."""
    mean = sum(P @ P.T for P in (_gaussian(7, k, 5, 3, torch.device("cpu")) for k in range(4000))) / 4000
    torch.testing.assert_close(mean, torch.eye(5), rtol=0, atol=5 * math.sqrt(2 / (3 * 4000)))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
@pytest.mark.parametrize("scaled", [True, False])
def test_flora_is_its_algorithm(shape, scaled):
    """Adafactor with momentum in r = 3 dimensions, carried to a new projection after every second step; decay at its rate."""
    W, gradients = start(shape)
    w, *G = doubles([W, *gradients])
    optimizer = Flora([W], 0.05, rank=3, kappa=2, scale_parameter=scaled, weight_decay=0.1, seed=9)
    drive(optimizer, W, gradients)
    seed, tall = optimizer.state[W]["seed"], shape[0] >= shape[1]
    P = doubles(_gaussian(seed, k, 6, 3, torch.device("cpu")) for k in range(4))
    M = np.zeros((shape[0], 3) if tall else (3, shape[1]))
    rows, columns = np.zeros(shape[0]), np.zeros(shape[1])
    for t, g in enumerate(G, start=1):
        beta2 = 1 - t**-0.8
        rows = beta2 * rows + (1 - beta2) * (g * g + 1e-30).mean(1)
        columns = beta2 * columns + (1 - beta2) * (g * g + 1e-30).mean(0)
        u = g / np.sqrt(rows[:, None] * columns[None, :] / rows.mean())
        p = P[(t - 1) // 2]
        whole = M @ p.T if tall else p @ M
        update = 0.1 * u + 0.9 * whole
        if t % 2 == 0:
            p = P[t // 2]
            M = whole @ p if tall else p.T @ whole
        M = 0.9 * M + 0.1 * (u @ p if tall else p.T @ u)
        update = update / max(1.0, math.sqrt((update**2).mean()))
        lr = 0.05 * (max(1e-3, math.sqrt((w**2).mean())) if scaled else 1.0)
        w = w - lr * 0.1 * w - lr * update
    np.testing.assert_allclose(W.detach().numpy(), w, atol=2e-6)
    assert optimizer.state[W]["exp_avg"].numel() == 3 * 9


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_compressed_accumulation_is_the_sum_seen_through_a_projection(shape):
    """Two backward passes a step: the step is that of (G1 + G2) P P^T (P P^T (G1 + G2) where wide), P new in each step."""
    ours, G = start(shape)
    plain, G = nn.Parameter(ours.detach().clone()), [g.double() for g in G]
    optimizer = Flora([ours], 0.05, rank=3, kappa=2, accumulation_rank=4, seed=9)
    reference = Flora([plain], 0.05, rank=3, kappa=2, seed=9)
    used = []
    for step in (0, 1):
        P = _gaussian(~optimizer.state[ours]["seed"], step, 6, 4, torch.device("cpu")).double()
        used.append(P)
        for g in G[2 * step : 2 * step + 2]:
            (ours * g.float()).sum().backward()
            assert ours.grad is None
            assert optimizer.state[ours]["packed"].numel() == 9 * 4
        total = G[2 * step] + G[2 * step + 1]
        plain.grad = (total @ P @ P.T if shape[0] >= shape[1] else P @ P.T @ total).float()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, plain, rtol=0, atol=2e-6)
    assert not torch.equal(*used)


@pytest.mark.parametrize("name", ["galore", "garare", "flora-optimizer"])
def test_a_resumed_run_is_the_same_to_the_bit(name, llama, batch):
    """In bfloat16, where torch would load the float32 states rounded; the checkpoint lies between two projections."""
    options = {"kappa": 4} if name == "flora-optimizer" else {"gap": 4}

    def build():
        adapted = apply(llama(torch.bfloat16), MethodSpec(name, r=3, options=options))
        return adapted.model, adapted.optimizer(1e-2, weight_decay=0.1)

    def go(model, optimizer, steps):
        for _ in range(steps):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = build()
    go(whole, optimizer, 6)
    first, optimizer = build()
    go(first, optimizer, 3)
    second, resumed = build()
    second.load_state_dict(first.state_dict())
    torch.manual_seed(99)
    resumed.load_state_dict(optimizer.state_dict())
    states = [v for s in resumed.state.values() for v in s.values() if torch.is_tensor(v) and v.is_floating_point()]
    assert {v.dtype for v in states} == {torch.float32}
    go(second, resumed, 3)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))
    assert not torch.equal(whole.model.layers[0].mlp.up_proj.weight, first.model.layers[0].mlp.up_proj.weight)


def test_what_is_projected_is_what_is_targeted(llama):
    """all-linear: every matrix of the trunk, neither the embedding nor the output layer, tied or not."""
    model = llama()
    names = {id(p): n for n, p in model.named_parameters()}
    all_linear = {names[id(p)] for p in targeted(model, "all-linear")}
    assert len(all_linear) == 2 * 7
    assert all(n.startswith("model.layers.") for n in all_linear)
    assert {names[id(p)] for p in targeted(model, ["q_proj"])} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)
    }
    assert [names[id(p)] for p in targeted(model, r".*\.1\.mlp\.up_proj")] == ["model.layers.1.mlp.up_proj.weight"]
    adapted = apply(model, MethodSpec("galore", r=3))
    optimizer = adapted.optimizer(1e-3)
    ranks = {names[id(p)]: g["rank"] for g in optimizer.param_groups for p in g["params"]}
    assert ranks == {n: 3 if n in all_linear else 0 for n in names.values()}


def test_optimizer_settings_are_checked():
    W = nn.Parameter(torch.zeros(2, 2))
    for optimizer, message, settings in (
        (ProjectedAdamW, "projection='qr': expected one of svd, gaussian, orthogonal", {"projection": "qr"}),
        (ProjectedAdamW, "gap=0: expected", {"gap": 0}),
        (ProjectedAdamW, r"scale=-1\.0: expected", {"scale": -1.0}),
        (Flora, "kappa=0: expected", {"kappa": 0}),
        (Flora, "accumulation_rank=0: expected", {"rank": 1, "accumulation_rank": 0}),
    ):
        with pytest.raises(ConfigError, match=message):
            optimizer([W], 0.1, **settings)
