"""Initial values: reproducible from one integer, of the stated width, one stream per layer."""

from __future__ import annotations

import pytest
import torch

from duallora.core.init import draw_factors, draw_signs, layer_seed, magnitude_std, positive_std


def test_shapes_widths_and_seeds():
    std = {"init_std": 0.02, "direction_init_std": 0.5}
    A, B, C, D = draw_factors(7, 400, 300, 5, 3, **std)
    assert [f.shape for f in (A, B, C, D)] == [(5, 300), (400, 5), (3, 300), (400, 3)]
    # The standard error of a standard deviation is std / sqrt(2 n): five of them.
    for factor, width in ((A, 0.02), (B, 0.02), (C, 0.5), (D, 0.5)):
        assert abs(float(factor.std()) / width - 1) < 5 / (2 * factor.numel()) ** 0.5
    assert all(map(torch.equal, (A, B, C, D), draw_factors(7, 400, 300, 5, 3, **std)))
    assert not torch.equal(A, draw_factors(8, 400, 300, 5, 3, **std)[0])


@pytest.mark.parametrize(("in_features", "r1"), [(100, 1), (384, 8), (4096, 16)])
def test_the_magnitudes_own_width_makes_the_same_noise_at_any_width_and_rank(in_features, r1):
    """Half the entries of B A are open, so ReLU(B A) has half its mean square: a tenth of x's rms in each output."""
    squares, noise = [], []
    x = torch.randn(in_features, generator=torch.Generator().manual_seed(1))
    for seed in range(40 if r1 == 1 else 5):  # whose mean square is off by a tenth
        A, B, C, D = draw_factors(seed, 300, in_features, r1, 3, init_std=None, direction_init_std=0.002)
        squares.append(torch.relu(B @ A).square().mean())
        noise.append((torch.relu(B @ A) * torch.sign(D @ C) @ x).square().mean() / x.square().mean())
    assert (torch.stack(squares).mean() * in_features).sqrt().item() == pytest.approx(0.1, rel=0.05)
    assert torch.stack(noise).mean().sqrt().item() == pytest.approx(0.1, rel=0.15)
    # As measured on MiniLM and SmolLM2 (results/studies/start-values-mini.json).
    assert [magnitude_std(384, 8), magnitude_std(576, 4)] == pytest.approx([0.05, 0.05], rel=0.1)


def test_fixed_signs_need_no_direction_group():
    assert len(draw_factors(7, 4, 3, 2, None, init_std=0.02, direction_init_std=0.02)) == 2
    signs = draw_signs(7, 200, 300)
    assert signs.dtype == torch.int8
    assert set(signs.unique().tolist()) == {-1, 1}
    assert abs(float(signs.float().mean())) < 5 / 60000**0.5
    assert torch.equal(signs, draw_signs(7, 200, 300))


def test_the_start_of_lora_is_pefts_under_signs_that_are_all_up():
    """In bfloat16 too. The columns of D that are 0 need rows of C that are not, or they would never get a gradient."""
    A, B, C, D = draw_factors(7, 400, 300, 5, 3, init_std=None, direction_init_std=0.02, init="lora")
    bound = 300**-0.5  # kaiming_uniform_(a=sqrt(5)), whose standard deviation is bound / sqrt(3)
    assert float(A.abs().max()) <= bound
    assert float(A.std()) == pytest.approx(bound / 3**0.5, rel=5 / (2 * A.numel()) ** 0.5)
    assert not B.any()
    for c, d in ((C, D), (C.bfloat16(), D.bfloat16())):
        torch.testing.assert_close(d.float() @ c.float(), torch.full((400, 300), 3 * 0.02**2), rtol=1e-2, atol=0)
    assert float(C[1:].std()) == pytest.approx(0.02, rel=5 / (2 * 600) ** 0.5)
    assert len(draw_factors(7, 4, 3, 2, 1, init_std=None, direction_init_std=0.02, init="lora")) == 4


def test_bf16_grid_survives_half_precision():
    """What residual warm-up needs: a round trip through bfloat16 changes no bit."""
    for factor in draw_factors(7, 40, 30, 5, 3, init_std=0.02, direction_init_std=0.02, on_bf16_grid=True):
        assert torch.equal(factor.bfloat16().float(), factor)


def test_layer_seeds_differ_by_name_and_follow_the_generator():
    assert layer_seed(1, "a.q_proj") == layer_seed(1, "a.q_proj")
    assert len({layer_seed(1, "a.q_proj"), layer_seed(1, "a.v_proj"), layer_seed(2, "a.q_proj")}) == 3
    torch.manual_seed(5)
    first = layer_seed(None, "x")
    torch.manual_seed(5)
    assert layer_seed(None, "x") == first
    assert layer_seed(None, "x") != first


@pytest.mark.parametrize(("out", "inn", "r1"), [(700, 384, 8), (901, 2048, 16), (1500, 100, 3)])
def test_positive_factors_start_with_the_same_sum_over_a_row_at_any_width_and_rank(out, inn, r1):
    generator = torch.Generator().manual_seed(inn)
    A, B = (torch.randn(shape, generator=generator).abs() * positive_std(inn, r1) for shape in ((r1, inn), (out, r1)))
    assert float((B @ A).sum(1).mean()) == pytest.approx(0.8, rel=0.1)
    assert positive_std(384, 8) == pytest.approx(0.02, rel=0.02)  # as measured
