"""The Triton kernels: what they compute, in Triton's interpreter and on a GPU where there is one, and what the compilers
of four architectures make of them.

DUALLORA_ALL_TILES=1 compiles every option of every tile instead of the main ones (some minutes): for Triton 3.9, as older
ones spill elsewhere (docs/gpu.md).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from duallora.core.equation import Update

pytest.importorskip("triton", reason="the Triton kernels need the triton package: pip install triton (Linux)")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("TRITON_INTERPRET is set: nothing can be compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from duallora.ops import triton as kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
GROUPS = ["sizes_and_layouts options nan", "dora_and_residual dtypes large"]


def check(where: str, groups: str) -> None:
    """check_triton.py says how."""
    script = Path(__file__).with_name("check_triton.py")
    run = subprocess.run(
        [sys.executable, script, where, *groups.split()], capture_output=True, text=True, check=False, timeout=280
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


@pytest.mark.parametrize("groups", GROUPS)
def test_interpreted_kernels_compute_what_the_oracle_does(groups):
    """Signs of exact zeros, masks, clips, both layouts, DoRA and residual."""
    check("interpreter", groups)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("groups", [*GROUPS, "device"])
def test_kernels_on_a_device_compute_what_the_oracle_does(groups):
    """The same, and that a device adds no race, no wait and no rounding of its own."""
    check("cuda", groups)


class Driver:
    """What the launch code asks of a driver, answered for a device that is not there."""

    def __init__(self, architecture: str):
        self.architecture = architecture

    def get_current_target(self):
        return TARGETS[self.architecture]

    def get_current_device(self):
        return self.architecture  # the key of the compiled kernels

    def get_current_stream(self, _device):
        return 0


class NoSync(TorchDispatchMode):
    """Fails on any reading of a tensor's value by Python."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "the launch code waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def compiled(monkeypatch):
    """A function that runs both passes, or ``run``, up to the launch and returns [(name, compiled kernel)]."""
    active = driver._active
    found = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        found.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    monkeypatch.setattr(JITFunction, "run", compile_only)

    def launch(architecture, dtype, *, r1=16, r2=16, out=256, inn=512, conv=False, m=False, residual=False,
               base=None, scaling=0.5, minus_base=False, run=None, **options):  # fmt: skip
        monkeypatch.setattr(kernels, "_architecture", lambda _device: architecture)
        driver.set_active(Driver(architecture))
        shapes = (r1, inn), (out, r1), (r2, inn), (out, r2)
        factors, initial = ([torch.empty(shape) for shape in shapes] for _ in range(2))
        update = Update(*factors, scaling, initial=initial if residual else (), **options)
        shape = (inn, out) if conv else (out, inn)
        W, G = torch.empty(shape, dtype=base or dtype), torch.empty(shape, dtype=dtype)
        norm = torch.ones(out) if m else None
        given = {"fan_in_fan_out": conv, "dtype": dtype, "m": norm, "minus_base": minus_base}
        found.clear()
        with NoSync():
            if run is not None:
                run(W, update)
            else:
                kernels.build_weight(W, update, **given)
                kernels.weight_and_gradients(G, W, update, norm=norm, **given)
        return list({kernel.hash: (name, kernel) for name, kernel in found}.values())

    yield launch
    driver._active = active


def spills(kernel) -> dict[str, int]:
    """What does not fit into registers: local memory on NVIDIA, scratch on AMD."""
    if "cubin" in kernel.asm:
        code = kernel.asm["sass"]
        assert re.search(r"\bH(?:G)?MMA\b", code), "no disassembly to look at"
        return {"SASS": len(re.findall(r"\b(?:STL|LDL)\b", code))}
    keys = "vgpr_spill_count", "private_segment_fixed_size"
    return {key: int(re.search(rf"\.{key}:\s+(\d+)", kernel.asm["amdgcn"]).group(1)) for key in keys}


def assert_lean(name, kernel, dtype, spilled=0) -> None:
    assert sum(spills(kernel).values()) <= spilled, f"{name} spills: {spills(kernel)}"
    if "cubin" in kernel.asm:
        ptx = kernel.asm["ptx"]
        kinds = set(re.findall(r"(?:mma\.sync|wgmma\.mma_async)\S*\.(tf32|bf16)\.", ptx))
        # Anchored: "cp.async...shared.global" holds "red.global".
        atomics = re.findall(r"^\s*(?:@!?%p\d+\s+)?(?:atom|red)\.", ptx, re.M)
    else:
        code = kernel.asm["amdgcn"]
        kinds = {"bf16" if "bf16" in i else "f32" for i in re.findall(r"v_mfma_f32_\S+", code)}
        atomics = re.findall(r"_atomic_|\bds_(?:add|sub|min|max|and|or|inc|dec)_", code)
    assert kinds - {"bf16"}, f"{name}: P and Q use no float32 matrix instructions"
    if name == "_gradients":
        assert ("bf16" in kinds) == (dtype == BF16), f"{name}: the gradient products use {kinds}"
    assert not atomics, f"{name}: {atomics[:3]}"


OPTIONS = [
    {},
    {"conv": True},
    {"r1": 8, "r2": 4},
    {"r1": 24, "r2": 5, "magnitude": "abs"},
    {"r1": 64, "r2": 16},
    {"m": True},
    {"residual": True},
    {"r1": 128, "r2": 128, "m": True, "conv": True},
    {"r1": 32, "r2": 32, "residual": True},
    {"m": True, "residual": True, "minus_base": True},
    {"out": 63, "inn": 100, "r1": 3, "r2": 5},
    {"out": 63, "inn": 100, "r1": 3, "r2": 5, "conv": True},
    {"magnitude": "abs", "conv": True},
    {"magnitude": "identity", "ste_clip": "update"},
    {"direction": "identity"},
    {"direction": "unit-tanh"},
    {"ste_clip": "unit-window"},
    # Several panels of columns a program: with one the loop over them is compiled away.
    {"out": 4096, "inn": 4096},
    {"out": 4096, "inn": 4096, "m": True},
]
TYPES = (BF16, FP16, FP32)
if os.environ.get("DUALLORA_ALL_TILES"):
    CASES = [(a, d, option) for a in TARGETS for d in TYPES for option in OPTIONS]
else:
    CASES = [
        *(("sm_90", d, {}) for d in TYPES),
        ("sm_80", FP16, {}),
        ("sm_80", FP32, {}),
        ("sm_80", BF16, {"r1": 64, "r2": 16}),
        ("sm_80", FP32, {"out": 63, "inn": 100, "r1": 3, "r2": 5}),
        ("sm_90", BF16, {"conv": True}),
        ("sm_90", BF16, {"m": True, "residual": True, "minus_base": True}),
        ("sm_90", BF16, {"out": 4096, "inn": 4096}),
        ("sm_90", FP16, {"r1": 24, "r2": 5, "magnitude": "abs"}),
        ("gfx90a", BF16, {"r1": 128, "r2": 128, "m": True, "conv": True}),
        ("gfx942", FP16, {}),
        ("gfx942", FP32, {"r1": 8, "r2": 4, "residual": True, "scaling": torch.tensor(0.5)}),
        # As autocast has it: more registers for W than the table's own case.
        ("sm_80", BF16, {"base": FP32}),
        ("sm_90", BF16, {"base": FP32}),
    ]
IDS = [f"{architecture}-{str(dtype).removeprefix('torch.')}-{i}" for i, (architecture, dtype, _) in enumerate(CASES)]


@pytest.mark.parametrize(("architecture", "dtype", "option"), CASES, ids=IDS)
def test_compiled_kernels_spill_nothing_and_use_matrix_instructions_and_no_atomics(
    compiled, architecture, dtype, option
):
    """And either layout is read sixteen bytes at a time: its stride of 1 reaches the compiler."""
    # The one known exception: the next tile without any took half as long again on an H100.
    known = (architecture, dtype, option) == ("sm_90", FP32, {"out": 4096, "inn": 4096, "m": True})
    for name, kernel in compiled(architecture, dtype, **option):
        assert_lean(name, kernel, dtype, 6 if known else 0)
        if (architecture, dtype) == ("sm_90", BF16) and option in ({}, {"conv": True}):
            assert re.search(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"]), name
            assert re.search(r"st\.global\S*\.v4\.b32", kernel.asm["ptx"]), name


EPILOGUE = Path(__file__).parents[2] / "benchmarks" / "epilogue.py"


def test_the_benchmark_whose_G_stays_in_registers_compiles_without_spilling(compiled):
    spec = importlib.util.spec_from_file_location("epilogue", EPILOGUE)
    epilogue = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(epilogue)
    dY, x = torch.empty(128, 256, dtype=BF16), torch.empty(128, 512, dtype=BF16)
    for size in epilogue.TILES[1:3]:  # those with most in the registers of a thread; the others differ in their depth
        found = compiled(
            "sm_90", BF16, run=lambda W, update, size=size: epilogue.weight_and_gradients(dY, x, W, update, size)
        )
        ((_, kernel),) = found
        assert spills(kernel) == {"SASS": 0}, size
        assert "wgmma.mma_async" in kernel.asm["ptx"]


def test_its_results_are_those_of_float64_in_the_interpreter():
    """Tiles that reach over every edge; the script itself compares, and ends where it is off."""
    run = subprocess.run(
        [sys.executable, EPILOGUE, "--width", "72", "--tokens", "50"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith("50 tokens: errors")


def test_what_the_kernels_do_not_compute_they_decline(monkeypatch):
    monkeypatch.setattr(kernels, "_architecture", lambda _device: "sm_90")
    update = Update(torch.ones(3, 10), torch.ones(6, 3), torch.ones(2, 10), torch.ones(6, 2), 0.5)
    assert all(kernels.supports(update, dtype) for dtype in TYPES)
    assert not kernels.supports(update, torch.float64)
    for change in (
        {"A": update.A.double()},
        {"magnitude": "sigmoid"},
        {"direction": "xnor"},
        {"direction": "dorefa"},
        {"C": None, "D": None, "direction": "fixed", "fixed_sign": torch.ones(6, 10)},
        {"A": torch.ones(129, 10), "B": torch.ones(6, 129)},
    ):
        assert not kernels.supports(update._replace(**change), FP32), change
    monkeypatch.undo()
    assert not kernels.supports(update, FP32), "these tensors are on the CPU"
