"""A calibrated conversion is the LoRA whose outputs are nearest on the data, and says how near on other data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from export.conftest import shake
from peft import get_peft_model, set_peft_model_state_dict
from torch import nn
from torch.nn import functional as F

import duallora
from duallora import DualLoraConfig, cli
from duallora.errors import ConfigError, DataError, NonFiniteError
from duallora.export import calibration, convert
from duallora.store import adapters
from duallora.tuner import conversion, moments

SHAPES = [(5, 9), (9, 5), (7, 7), (8, 1), (1, 8)]


def covariance(n: int, seed: int = 0) -> torch.Tensor:
    """With a large outlier and fewer samples than sides, as activations have them."""
    x = torch.randn(n - n // 3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 0] *= 300
    return x.T @ x / len(x)


def regularized(C: torch.Tensor) -> torch.Tensor:
    C = torch.diag(C) if C.ndim == 1 else C
    return C + 1e-3 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def square_root(C: torch.Tensor) -> torch.Tensor:
    """The symmetric one, by the eigenvalues: another root than the Cholesky factor that is under test."""
    e, V = torch.linalg.eigh(C)
    return V @ torch.diag(e.clamp(min=0).sqrt()) @ V.T


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_no_product_of_the_rank_has_nearer_outputs(shape, rank, diagonal, monkeypatch):
    """Eckart and Young for dW C^(1/2): the best B A is P dW, P the projection on its leading left singular vectors."""
    monkeypatch.setattr(conversion, "ROWS", 4)  # several blocks
    M = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    C = covariance(shape[1]).diagonal().clone() if diagonal else covariance(shape[1])
    root = square_root(regularized(C))
    U, s, _ = torch.linalg.svd(M @ root)
    U = U[:, : min(rank, *shape)]
    A, B, e = conversion.low_rank(M, rank, conversion.root(moments.Moments(C, 7)))
    assert A.shape == (rank, shape[1])
    assert B.shape == (shape[0], rank)
    scale = float(M.norm())
    torch.testing.assert_close(B @ A, U @ U.T @ M, rtol=0, atol=1e-8 * scale)
    mean = C.mean() if diagonal else C.diagonal().mean()
    torch.testing.assert_close(e * mean, s.square()[: len(e)], rtol=1e-9, atol=1e-10 * float(s[0] ** 2))
    lost = float(((M - B @ A) @ root).square().sum())
    assert lost == pytest.approx(float(s[rank:].square().sum()), rel=1e-6, abs=1e-9 * float(s[0] ** 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_inputs_give_the_plain_conversion_and_full_rank_gives_dw(shape):
    M = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    n = shape[1]
    for C in (torch.eye(n, dtype=torch.float64) * 4, torch.full((n,), 4.0, dtype=torch.float64)):
        plain, calibrated = (conversion.low_rank(M, 2, S) for S in (None, conversion.root(moments.Moments(C, 3))))
        torch.testing.assert_close(plain[1] @ plain[0], calibrated[1] @ calibrated[0], rtol=0, atol=1e-12)
    full = conversion.low_rank(M, min(shape), conversion.root(moments.Moments(covariance(n), 3)))
    torch.testing.assert_close(full[1] @ full[0], M, rtol=0, atol=1e-10)


def test_a_layer_that_saw_nothing_keeps_weights():
    assert conversion.root(None) is None
    assert conversion.root(moments.Moments(torch.zeros(3, 3), 0)) is None
    assert conversion.root(moments.Moments(torch.zeros(3, 3), 5)) is None


class Odd(nn.Module):
    """Layers of every kind that converts, after one another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.narrow = nn.Conv1d(6, 4, 3, stride=2, padding=2)
        self.wide = nn.Conv2d(1, 5, (2, 3), padding="same")
        self.head = nn.Linear(5, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.narrow(self.embed(input_ids).transpose(1, 2))
        return self.head(self.wide(x[:, None]).flatten(2).transpose(1, 2))


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(11, (count, 3, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, 5:] = 0
    return [{"input_ids": one, "attention_mask": mask} for one in ids]


def test_second_moments_are_those_of_what_the_kernels_multiply():
    torch.manual_seed(0)
    model = Odd().train()
    found = moments.second_moments(model, dict(model.named_children()), batches())
    assert all(module.training for module in model.modules())
    shares = torch.zeros(11, dtype=torch.float64)
    for batch in batches():
        for token in batch["input_ids"][batch["attention_mask"].bool()]:
            shares[token] += 1
    torch.testing.assert_close(found["embed"].C, shares / shares.sum())
    assert found["embed"].tokens == 2 * (24 - 3)
    with torch.no_grad():
        embedded = [model.embed(batch["input_ids"]).transpose(1, 2) for batch in batches()]
        seen = torch.cat([F.unfold(x[:, :, None], (1, 3), padding=(0, 2), stride=(1, 2)) for x in embedded])
        image = torch.cat([model.narrow(x)[:, None] for x in embedded])
        patches = F.unfold(F.pad(image, (1, 1, 0, 1)), (2, 3))
        read = model.wide(image).flatten(2).transpose(1, 2).reshape(-1, 5)
    for name, x in {
        "narrow": seen.transpose(1, 2).reshape(-1, 18),
        "wide": patches.transpose(1, 2).reshape(-1, 6),
        "head": read,
    }.items():
        torch.testing.assert_close(found[name].C, x.double().T @ x.double() / len(x), rtol=1e-5, atol=1e-6)
        assert found[name].tokens == len(x)


def test_layers_in_bounded_groups_have_the_same_moments():
    torch.manual_seed(0)
    model = Odd()
    layers = dict(model.named_children())
    groups = list(moments.in_groups(layers, limit=8 * (18 * 18 + 6 * 6)))
    assert [list(group) for group in groups] == [["embed", "narrow"], ["wide", "head"]]
    whole = moments.second_moments(model, layers, batches())
    for group in groups:
        for name, found in moments.second_moments(model, group, batches()).items():
            torch.testing.assert_close(found.C, whole[name].C, rtol=0, atol=0)


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    config = DualLoraConfig(r1=3, r2=2, alpha=4, target_modules=["embed", "narrow", "wide", "head"], warmup_steps=6)
    return shake(get_peft_model(Odd(), config)).eval()


@pytest.mark.parametrize("rank", [2, 18])
def test_in_python_the_outputs_are_nearer_and_peft_loads_it(adapted, rank):
    given, far = batches(), []
    with torch.no_grad():
        wanted = [adapted(**batch) for batch in given]
    for data in (given, None):
        config, tensors = duallora.convert(adapted, data, rank)
        assert config.r == config.lora_alpha == rank
        torch.manual_seed(0)
        lora = get_peft_model(Odd(), config).eval()
        set_peft_model_state_dict(lora, tensors)
        with torch.no_grad():
            far.append(max(float((lora(**b) - y).norm() / y.norm()) for b, y in zip(given, wanted, strict=True)))
    assert far[0] < far[1] if rank == 2 else max(far) < 1e-5


def test_data_that_do_not_serve_are_refused_or_said(adapted):
    with pytest.raises(ConfigError, match=r"batch 2 .*does not fit the model: IndexError"):
        duallora.convert(adapted, [batches()[0], {"input_ids": torch.full((1, 8), 11)}], 2)
    with pytest.raises(ConfigError, match="no calibration batch"):
        duallora.convert(adapted, [], 2)
    with pytest.raises(ConfigError, match="rank=0"):
        duallora.convert(adapted, batches(), 0)
    with pytest.warns(UserWarning, match=r"read \d tokens .* fewer than the rank 3"):
        duallora.convert(adapted, [{"input_ids": torch.zeros(1, 1, dtype=torch.long)}], 3)
    with torch.no_grad():
        adapted.get_base_model().wide.get_base_layer().bias.fill_(math.inf)
    with pytest.raises(NonFiniteError, match=r"head reads NaN or infinite.*float32"):
        duallora.convert(adapted, batches(), 2)


def test_the_verb_calibrates_on_the_runs_own_rows_and_is_nearer_on_others(run_folder, tmp_path, capsys, console):
    def said(words: str) -> dict:
        assert cli.run(f"convert {run_folder} {words} --json".split()) == 0
        return json.loads(capsys.readouterr().out)

    calibrated, plain = said(f"-o {tmp_path}/lora --rank 3"), said(f"-o {tmp_path}/plain --rank 3 --no-calibrate")
    told, held = calibrated["calibration"], calibrated["held_out"]
    assert (told["split"], told["held_out_split"], told["shrinkage"]) == ("train", "validation", 1e-3)
    assert told["rows"] + told["held_out_rows"] == 26
    assert told["data"]["train"] == adapters.read_sidecar(run_folder / "adapter")["data"]["train"]
    assert adapters.read_sidecar(tmp_path / "lora")["conversion"]["calibration"] == told
    assert list(held) == ["adapter", "base", "conversion"]
    assert held["base"]["kl"] > held["conversion"]["kl"] > 0
    assert (plain["calibration"], plain["held_out"]) == (None, {})
    data = calibration.load(run_folder, *adapters.load_adapter(run_folder, "generate"), console)
    outputs = [data.outputs(*adapters.load_adapter(place, "generate")) for place in (run_folder, tmp_path / "plain")]
    assert held["conversion"]["kl"] < data.measure(outputs[1], outputs[0])["kl"] / 2
    bound = held["conversion"]["kl"] / 3
    found = said(f"-o {tmp_path}/auto --rank auto --kl {bound}")
    assert found["held_out"]["conversion"]["kl"] <= bound
    assert said(f"-o {tmp_path}/less --rank {found['rank'] - 1}")["held_out"]["conversion"]["kl"] > bound


def test_kl_and_loss_are_those_of_the_definition(run_folder, console):
    model, tokenizer = adapters.load_adapter(run_folder, "generate")
    data = calibration.load(run_folder, model, tokenizer, console, rows=8)
    ours = data.outputs(model, tokenizer)
    with model.disable_adapter():
        theirs = data.outputs(model, tokenizer)
    measured = data.measure(theirs, ours)
    kl, loss, tokens = 0.0, 0.0, 0
    for row in data.held_out:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            p = model(ids).logits[0].double().softmax(-1)
            with model.disable_adapter():
                q = model(ids).logits[0].double().softmax(-1)
        for at, label in enumerate(row["labels"][1:]):
            if label >= 0:
                kl += float((p[at] * (p[at] / q[at]).log()).sum())
                loss -= float(q[at][label].log())
                tokens += 1
    assert measured["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert measured["loss"] == pytest.approx(loss / tokens, rel=1e-5)


def test_a_classifier_keeps_its_head_and_its_rows_outputs(make_adapter, tmp_path):
    folder, rows = make_adapter("classify"), tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"some words {n},{n % 3}\n" for n in range(30)))
    options = {"rank": "auto", "calibrate": str(rows), "calibration_rows": 12}
    apart = convert.convert(folder, tmp_path / "apart", kl=1e-6, per_layer=True, **options)
    assert list(apart["held_out"]) == ["adapter", "conversion"]
    assert apart["held_out"]["conversion"]["kl"] <= 1e-6
    assert apart["calibration"]["held_out_rows"] == 18
    ranks = [layer["rank"] for layer in apart["layers"]]
    assert min(ranks) < max(ranks) == apart["rank"]
    with pytest.raises(ConfigError, match=r"largest tried.*Raise --kl"):
        convert.convert(folder, tmp_path / "near", kl=1e-30, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apart", "rows.csv"]


def test_what_cannot_be_looked_at_is_refused_and_nothing_is_left(native, tmp_path, console):
    texts = tmp_path / "labels.csv"
    texts.write_text("text,label\n" + "".join(f"words {n},{n % 2}\n" for n in range(9)))
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "completion": " b"}\n')
    for error, words, options in [
        (ConfigError, r"labels.csv holds classes.*was trained for text.*--no-calibrate", {"calibrate": str(texts)}),
        (DataError, "expected more than the 64", {"calibrate": str(few)}),
        (ConfigError, "rank=auto bounds the KL", {"rank": "auto"}),
        (ConfigError, "kl=nan", {"kl": math.nan}),
    ]:
        with pytest.raises(error, match=words):
            convert.convert(native, tmp_path / "lora", **{"rank": 2, "console": console, **options})
    convert.convert(native, tmp_path / "lora", rank=2, calibrate=True, console=console)
    assert "is in no run's folder" in console.file.getvalue()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.jsonl", "labels.csv", "lora"]


def test_the_page_has_the_figures_and_the_demo_reaches_the_target():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "serving.md").read_text()
    metrics = json.loads((root / "results" / "convert" / "calibrated.json").read_text())["metrics"]
    for name, figures in metrics.items():
        for rank, ours in figures["calibrated"].items():
            plain = figures["plain"][rank]
            cells = f"{plain['kl']:.4f} | {plain['loss']:.3f} | {ours['kl']:.4f} | {ours['loss']:.3f}"
            assert f"| {name} | {rank} | {cells} | {ours['kl'] / plain['kl']:.2f} |" in page
    assert metrics["demo"]["calibrated"]["16"]["kl"] <= metrics["demo"]["plain"]["16"]["kl"] / 4
    assert metrics["sst2"]["PEFT convert_to_lora"]["16"]["kl"] == pytest.approx(
        metrics["sst2"]["plain"]["16"]["kl"], rel=1e-4
    )
