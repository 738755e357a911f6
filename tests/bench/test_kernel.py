"""A backend that is wrong is caught, named and not timed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from duallora import cli
from duallora.bench import kernel
from duallora.ops import recompute

CPU = torch.device("cpu")


def planted(**changed) -> SimpleNamespace:
    """The recompute backend with some of its functions changed."""
    names = ("supports", "build_weight", "weight_and_gradients")
    return SimpleNamespace(**{**{name: getattr(recompute, name) for name in names}, **changed})


def off_by_one_in_a_million(*arguments, **options):
    weight, norm = recompute.build_weight(*arguments, **options)
    return weight * (1 + 2e-6), norm


def sign_of_zero_up(W, update, **options):
    """Sign(0) = +1: differs in the two rows of D and B that are zero, and nowhere else."""
    flipped = update._replace(D=torch.where(update.D.abs().sum(1, keepdim=True) == 0, 1e-3, update.D))
    return recompute.build_weight(W, flipped, **options)


def tf32(W, update, **options):
    """Factors cut to TF32's 10 bits after the leading one."""
    A = (update.A.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return recompute.build_weight(W, update._replace(A=A), **options)


def swapped(*arguments, **options):
    weight, dA, dB, dC, dD, dm = recompute.weight_and_gradients(*arguments, **options)
    return [weight, dC, dB, dA, dD, dm]


def not_a_number(*arguments, **options):
    weight, *rest = recompute.weight_and_gradients(*arguments, **options)
    weight[0, 0] = float("nan")
    return [weight, *rest]


def no_clip(G, W, update, **options):
    return recompute.weight_and_gradients(G, W, update._replace(ste_clip="none"), **options)


def norm_with_a_gradient(G, W, update, *, m=None, norm=None, **options):
    return recompute.weight_and_gradients(G, W, update, m=m, norm=None if norm is None else norm * 1.001, **options)


def cell_of(backend, *, dtype="float32", dora=False, width=63):
    key = {"width": width, "rank": 5, "dtype": dtype, "dora": dora}
    return {"cell": key, **kernel.measure({"it": backend}, key, CPU, rounds=3, seconds=9)}


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", kernel.available(CPU)[0].values(), ids=lambda b: b.__name__[13:])
def test_right_backends_are_timed(backend, dtype, dora):
    cell = cell_of(backend, dtype=dtype, dora=dora)
    it = cell["backends"]["it"]
    assert kernel.red(cell) == {}
    assert set(it["errors"]) == {"weight", "dA", "dB", "dC", "dD", *(["dm"] if dora else [])}
    assert it["gradients"]["gflops"] == pytest.approx(12 * 5 * 63 * 63 / it["gradients"]["median_s"] / 1e9)
    assert it["build"]["ratio_to_memcpy"]["median"] > 0


@pytest.mark.parametrize(
    ("changed", "wrong", "options"),
    [
        ({"build_weight": off_by_one_in_a_million}, {"weight"}, {}),
        ({"build_weight": sign_of_zero_up}, {"weight"}, {}),
        ({"build_weight": tf32}, {"weight"}, {}),
        ({"weight_and_gradients": swapped}, {"dA", "dC"}, {"dtype": "bfloat16"}),
        ({"weight_and_gradients": not_a_number}, {"weight"}, {}),
        ({"weight_and_gradients": no_clip}, {"dC", "dD"}, {}),
        ({"weight_and_gradients": norm_with_a_gradient}, {"weight", "dA", "dB", "dC", "dD", "dm"}, {"dora": True}),
    ],
    ids=["weight", "sign-of-zero", "tf32", "swapped-bf16", "nan", "no-clip", "norm"],
)
def test_wrong_backends_are_named_and_not_timed(changed, wrong, options):
    cell = cell_of(planted(**changed), **options)
    assert set((kernel.red(cell) or {})["it"]) == wrong
    assert set(cell["backends"]["it"]) == {"errors"}
    assert cell["memcpy"]["median_s"] > 0


def test_products_of_the_problem_are_exact_in_float32():
    """Were they rounded, a sign could hang on the order of summation and a right backend would look wrong."""
    update = kernel.problem(300, 32, torch.float32, CPU, dora=False).update
    for left, right in ((update.B, update.A), (update.D, update.C)):
        assert torch.equal((left @ right).double(), left.double() @ right.double())
    assert ((update.D @ update.C) == 0).any()


def test_the_command_line_exits_4_keeps_the_errors_and_tries_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = {"recompute": recompute}
    bad = {**good, "cpu": planted(weight_and_gradients=swapped)}
    sizes = "--width 24 --rank 3 --dtype float32"
    line = f"bench kernel {sizes} --rounds 3 --device cpu -o k.json --json".split()
    monkeypatch.setattr(kernel, "available", lambda device: (bad, {}))
    assert cli.run(line) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["exit_code"] == 4
    assert "cpu at 24 r=3 float32: dA" in captured.err
    for cell in json.loads((tmp_path / "k.json").read_text())["cells"]:
        assert set(cell["backends"]["cpu"]) == {"errors"}
        assert "build" in cell["backends"]["recompute"]
    monkeypatch.setattr(kernel, "available", lambda device: (good, {"cpu": "no compiler"}))
    assert cli.run(line) == 0
    assert json.loads(capsys.readouterr().out)["measured"] == 2
    assert json.loads((tmp_path / "k.json").read_text())["absent"] == {"cpu": "no compiler"}
    assert cli.run(line) == 0
    assert json.loads(capsys.readouterr().out)["measured"] == 0


def test_a_missing_compiler_is_said_and_not_an_error(monkeypatch):
    def absent(name):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(kernel, "kernel", absent)
    found, why = kernel.available(CPU)
    assert list(found) == ["recompute"]
    assert why == {"cpu": "no C++ compiler was found"}
