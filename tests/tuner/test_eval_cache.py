"""Unmerged evaluation keeps W' from call to call, and no change of anything it is made of goes unseen."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import peft
import pytest
import torch
from torch import nn

import duallora
from duallora.ops import cache
from duallora.tuner.layer import Linear

IN, HIDDEN, OUT = 63, 100, 37


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(IN, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)


def adapted(**options):
    torch.manual_seed(0)
    options = {"r1": 3, "r2": 5, "target_modules": ["up", "down"], "init_weights": False, "init_std": 0.3} | options
    return peft.get_peft_model(Net(), duallora.DualLoraConfig(**options)).eval()


def layers(model) -> list[Linear]:
    return [m for m in model.modules() if isinstance(m, Linear)]


def run(model, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def fresh(model, x: torch.Tensor) -> torch.Tensor:
    """The output of a copy, which has kept nothing."""
    return run(copy.deepcopy(model), x)


@pytest.fixture(autouse=True)
def builds(monkeypatch) -> list[str]:
    """Names of the layers' adapters whose W' was built, in order."""
    built: list[str] = []
    inner = Linear._merged_weight

    def counted(self, W, adapters):
        built.append("+".join(adapters))
        return inner(self, W, adapters)

    monkeypatch.setattr(Linear, "_merged_weight", counted)
    return built


PROMPT, TOKEN = torch.randn(2, 7, IN), torch.randn(2, 1, IN)


def step(model):
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


def first(model) -> Linear:
    return layers(model)[0]


def replace_factor(model):
    first(model).duallora_B["default"] = nn.Parameter(torch.randn(HIDDEN, 3))


def load(model):
    model.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def set_data(name):
    def change(model):
        getattr(first(model), name)["default"].data = getattr(first(model), name)["default"].data.flip(0).contiguous()

    return change


def write_data(name):
    def change(model):
        getattr(first(model), name)["default"].data.mul_(-1.5)

    return change


def one_entry(model):
    first(model).duallora_A["default"].data[1, 7] += 3.0


def second_adapter(model):
    config = duallora.DualLoraConfig(r=4, target_modules=["up"], init_weights=False, init_std=0.5)
    model.add_adapter("other", config)
    model.set_adapter("other")


def both_adapters(model):
    second_adapter(model)
    model.base_model.set_adapter(["default", "other"])


def hook_on_base(model):
    first(model).base_layer.register_forward_hook(lambda module, args, y: y * 2)


def patched_base(model):
    base = first(model).base_layer
    base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias) * 3


def replaced_base(model):
    first(model).base_layer.weight = nn.Parameter(torch.randn(HIDDEN, IN), requires_grad=False)


def base_in_place(model):
    with torch.no_grad():
        first(model).base_layer.weight[0, 0] += 5.0


def base_data(model):
    first(model).base_layer.weight.data.add_(0.1)


def bias_data(model):
    first(model).base_layer.bias.data[3] += 1.0


def scaling(model):
    first(model).scaling["default"] *= 2


def config_value(model):
    first(model).duallora_config["default"].magnitude = "abs"


def merged(model):
    model.merge_adapter()


def merged_and_changed(model):
    model.merge_adapter()
    model.unmerge_adapter()
    one_entry(model)


CHANGES = {
    "optimizer step": step,
    "gate": lambda model: first(model).duallora_step["default"].fill_(1),
    "load_state_dict": load,
    "a factor replaced": replace_factor,
    **{f".data of {n} set": set_data(f"duallora_{n}") for n in "ABCD"},
    **{f".data of {n} written": write_data(f"duallora_{n}") for n in "ABCD"},
    "one entry by .data": one_entry,
    "another adapter": second_adapter,
    "two adapters": both_adapters,
    "scaling": scaling,
    "config": config_value,
    "hook on the base layer": hook_on_base,
    "base layer patched": patched_base,
    "base weight replaced": replaced_base,
    "base weight in place": base_in_place,
    "base weight by .data": base_data,
    "bias by .data": bias_data,
    "merged": merged,
    "unmerged": merged_and_changed,
    "deleted": lambda model: (second_adapter(model), model.delete_adapter("default")),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "double": lambda model: model.to(torch.float64).to(torch.float32),
}


@pytest.mark.parametrize("x", [PROMPT, TOKEN], ids=["prompt", "token"])
@pytest.mark.parametrize("form", ["auto", "added"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_change_is_seen(change, form, x):
    """After the change the output is that of a copy that has kept nothing; a token decodes in a checked session."""
    model = adapted(warmup_steps=3, forward=form)
    for _ in range(3):
        run(model, PROMPT)
        run(model, x)
    CHANGES[change](model)
    for _ in range(3):
        assert torch.equal(run(model, x), fresh(model, x))


def test_the_changes_above_change_the_output():
    """Else they would prove nothing; those that put things back are excepted."""
    for name, change in CHANGES.items():
        model = adapted(warmup_steps=3)
        before = run(model, PROMPT)
        change(model)
        same = torch.equal(before, run(model, PROMPT))
        assert same == (name in ("merged", "double")), name


def test_dora_lengths_and_residual_starts_are_watched():
    for options in ({"use_dora": True}, {"warmup": "residual", "init_weights": True, "init_seed": 1}):
        model = adapted(**options)
        step(model)
        run(model, TOKEN)
        held = (
            first(model).duallora_m["default"]
            if "use_dora" in options
            else first(model).duallora_initial["default"]["A"]
        )
        held.data[0] *= 3
        assert torch.equal(run(model, TOKEN), fresh(model, TOKEN))


def test_a_lone_entry_of_the_base_weight_is_seen_with_the_next_prompt():
    """Between two single tokens a sample of the frozen weight is compared; a prompt compares all of it."""
    model = adapted()
    run(model, PROMPT)
    first(model).base_layer.weight.data[5, 5] += 4.0
    assert torch.equal(run(model, PROMPT), fresh(model, PROMPT))


def test_the_check_of_a_whole_forward_ends_with_it():
    """A layer called by itself after the model's forward asks for itself."""
    model = adapted()
    for x in (PROMPT, TOKEN, TOKEN):
        run(model, x)
    layer, x = first(model), torch.randn(2, 1, IN)
    run(layer, x)
    one_entry(model)
    assert torch.equal(run(layer, x), fresh(layer, x))


def test_weights_are_built_once_while_nothing_changes(builds):
    model = adapted()
    for x in (PROMPT, TOKEN, TOKEN, PROMPT, TOKEN):
        run(model, x)
    with torch.inference_mode():
        model(TOKEN)
    assert builds == ["default"] * 2
    step(model)
    run(model, TOKEN)
    assert builds == ["default"] * 4


def test_training_and_gradients_do_not_use_what_was_kept():
    model = adapted()
    before = cache.eval_cache_bytes()
    run(model, PROMPT)
    assert cache.eval_cache_bytes() == before + 4 * HIDDEN * (IN + OUT)
    assert model(PROMPT).grad_fn is not None  # eval mode, but the factors want their gradient
    model.train()
    assert cache.eval_cache_bytes() == before
    model(PROMPT).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_kept_weights_serve_a_gradient_for_the_input():
    """Built under inference_mode, used by autograd after: frozen factors, gradient for x alone."""
    model = adapted()
    with torch.inference_mode():
        want = model(PROMPT)
    for p in model.parameters():
        p.requires_grad_(False)
    x = PROMPT.clone().requires_grad_()
    y = model(x)
    assert torch.equal(y, want)
    (dx,) = torch.autograd.grad(y.sum(), [x])
    (reference,) = torch.autograd.grad(copy.deepcopy(model).merge_and_unload()(x).sum(), [x])
    assert torch.equal(dx, reference)


def test_autocast_and_other_dtypes_stay_right():
    model = adapted()
    run(model, PROMPT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(model, PROMPT), fresh(model, PROMPT))
    model.to(torch.bfloat16)
    run(model, PROMPT.bfloat16())
    assert torch.equal(run(model, TOKEN.bfloat16()), fresh(model, TOKEN.bfloat16()))


def test_memory_is_bounded_and_given_back():
    sizes = [HIDDEN * IN * 4, OUT * HIDDEN * 4]
    gc.collect()
    before = cache.eval_cache_bytes()
    try:
        duallora.set_eval_cache(before + sizes[0] + 100)
        model = adapted()
        for _ in range(2):
            for x in (PROMPT, TOKEN):
                assert torch.equal(run(model, x), fresh(model, x))
        assert cache.eval_cache_bytes() == before + sizes[0]
        duallora.set_eval_cache(before + sum(sizes))
        run(model, PROMPT)
        assert cache.eval_cache_bytes() == before + sum(sizes)
        run(model, TOKEN)
        duallora.set_eval_cache(0)
        assert torch.equal(run(model, TOKEN), fresh(model, TOKEN))
        assert cache.eval_cache_bytes() <= before
        duallora.set_eval_cache(before + sum(sizes))
        run(model, PROMPT)
        copied = copy.deepcopy(model)
        assert cache.eval_cache_bytes() == before + sum(sizes)
        model.merge_adapter()
        assert cache.eval_cache_bytes() == before
        run(copied, PROMPT)
        del copied, model
        gc.collect()
        assert cache.eval_cache_bytes() == before
    finally:
        duallora.set_eval_cache(cache.DEFAULT_LIMIT)
    with pytest.raises(ValueError, match="max_bytes=-1: expected a number of bytes >= 0"):
        duallora.set_eval_cache(-1)


def test_without_a_compiler_contents_are_compared_all_the_same(monkeypatch):
    monkeypatch.setattr(cache, "fastest", lambda device: None)
    model = adapted()
    run(model, PROMPT)
    one_entry(model)
    assert torch.equal(run(model, TOKEN), fresh(model, TOKEN))


def test_a_weight_viewed_otherwise_at_the_same_address_is_seen():
    torch.manual_seed(0)
    config = duallora.DualLoraConfig(r=2, target_modules=["up"], init_weights=False, init_std=0.5)
    model = peft.get_peft_model(Square(), config).eval()
    run(model, PROMPT)
    base = first(model).base_layer.weight
    base.data = base.data.T
    assert torch.equal(run(model, PROMPT), fresh(model, PROMPT))


def test_signs_redrawn_from_another_seed_are_seen():
    model = adapted(direction="fixed", init_seed=3)
    run(model, PROMPT)
    layer = first(model)
    layer.duallora_seed["default"] = torch.tensor(12345)
    layer.rebuild_from_seed("default")
    for x in (TOKEN, PROMPT):
        assert torch.equal(run(model, x), fresh(model, x))


def test_an_adapter_switched_off_inside_the_forward_is_off():
    model = adapted()
    for x in (PROMPT, TOKEN, TOKEN):
        run(model, x)
    base = model.base_model.model
    base.register_forward_pre_hook(lambda *_: model.base_model.disable_adapter_layers())
    got = run(model, TOKEN)
    assert torch.equal(got, run(model.get_base_model(), TOKEN))


def test_a_shallow_copy_shares_nothing_kept():
    model = adapted()
    run(model, PROMPT)
    assert copy.copy(first(model))._eval_cache.weight is None


def test_an_evaluated_model_is_freed_with_its_last_reference():
    """No cycle through what is watched: memory comes back without waiting for the garbage collector."""
    model = adapted()
    before = cache.eval_cache_bytes()
    run(model, PROMPT)
    run(model, TOKEN)
    kept = cache.eval_cache_bytes()
    layer = weakref.ref(first(model))
    gc.collect()
    gc.disable()
    try:
        del model
        freed = layer() is None
    finally:
        gc.enable()
    if not freed:  # PEFT's wrappers themselves may form cycles
        gc.collect()
    assert layer() is None
    assert cache.eval_cache_bytes() < kept or kept == before


def test_a_recording_hook_does_not_keep_the_model_alive():
    model = adapted()

    class Recorder:
        def __init__(self, model) -> None:
            self.model, self.seen = model, []

        def note(self, module, args, output) -> None:
            self.seen.append(output.shape)

    first(model).register_forward_hook(Recorder(model).note)
    run(model, PROMPT)
    run(model, TOKEN)
    alive = weakref.ref(first(model))
    del model
    gc.collect()
    assert alive() is None


def test_threads_may_evaluate_while_the_limit_moves():
    model, errors = adapted(), []
    want = run(model, PROMPT)

    def evaluate():
        try:
            for _ in range(60):
                assert torch.equal(run(model, PROMPT), want)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=evaluate) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            duallora.set_eval_cache(0)
            duallora.set_eval_cache(cache.DEFAULT_LIMIT)
    finally:
        for thread in threads:
            thread.join()
    assert not errors
    model.train()


def test_lengths_alone_get_their_gradient_in_evaluation():
    model = adapted(use_dora=True)
    for name, p in model.named_parameters():
        p.requires_grad_("duallora_m" in name)
    assert model(PROMPT).requires_grad


def test_another_default_device_changes_nothing():
    model = adapted(use_dora=True)
    want = run(model, PROMPT)
    model.train()
    model.eval()
    with torch.device("meta"):
        assert torch.equal(run(model, PROMPT), want)


def test_a_base_weight_that_is_a_buffer_is_not_kept():
    model = adapted()
    base = first(model).base_layer
    weight = base.weight.data.clone()
    del base.weight
    base.register_buffer("weight", weight)
    run(model, PROMPT)
    base.weight.mul_(2)
    assert torch.equal(run(model, PROMPT), fresh(model, PROMPT))


def test_injecting_twice_hooks_once():
    base = Net()
    for name in ("a", "b"):
        peft.inject_adapter_in_model(duallora.DualLoraConfig(r=2, target_modules=["up"]), base, adapter_name=name)
    assert len(base._forward_pre_hooks) == 1


def test_unloading_leaves_no_hook_behind():
    base = Net()
    model = peft.get_peft_model(base, duallora.DualLoraConfig(r=2, target_modules=["up"], init_weights=False))
    assert base._forward_pre_hooks
    plain = model.merge_and_unload()
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks


def test_compiled_evaluation_matches_eager():
    model = adapted()
    want = run(model, PROMPT)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(PROMPT), want)
