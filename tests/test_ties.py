"""Shared weights that a merge takes apart: saved and loaded again the model is the unmerged one, or nothing is merged.

Each of the modules that share a weight carries the adapter alone, and all do together. The oracle is the unmerged model's
output and the merged one's state dict, to the bit, with nothing that transformers would draw anew.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from duallora import DualLoraConfig
from duallora.errors import ConfigError
from duallora.nn import adapt, merge
from duallora.tuner import DualLoraLayer

LEAVES_APART = hasattr(
    transformers.PreTrainedModel, "get_expanded_tied_weights_keys"
)  # transformers 5: what a file holds apart
VOCABULARY = 37

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20,
}  # fmt: skip
BERT = {**SHAPE, "max_position_embeddings": 16}
LLAMA = {**SHAPE, "num_key_value_heads": 3, "tie_word_embeddings": True}
CLIP = {**{key: value for key, value in SHAPE.items() if key != "vocab_size"}, "image_size": 8, "patch_size": 4}
BART = {
    "vocab_size": VOCABULARY, "d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "max_position_embeddings": 16,
    "decoder_start_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 1, "num_heads": 3, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
PROPHETNET = {
    "vocab_size": VOCABULARY, "hidden_size": 12, "num_encoder_layers": 1, "num_decoder_layers": 1,
    "num_encoder_attention_heads": 3, "num_decoder_attention_heads": 3, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20,
    "ngram": 2, "max_position_embeddings": 24,
}  # fmt: skip


def bert_to_bert() -> transformers.EncoderDecoderModel:
    """Two models in one, each with a config of its own."""
    parts = [
        transformers.BertConfig(**BERT),
        transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True),
    ]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.decoder_start_token_id = config.pad_token_id = 0
    return transformers.EncoderDecoderModel(config)


def llava() -> transformers.LlavaForConditionalGeneration:
    """The text part has its own config, and the picture's must not matter."""
    text, vision = transformers.LlamaConfig(**LLAMA), transformers.CLIPVisionConfig(**CLIP)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=36, tie_word_embeddings=True)
    )


MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "albert": lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(**BERT, embedding_size=8)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
    "prophetnet": lambda: transformers.ProphetNetForConditionalGeneration(transformers.ProphetNetConfig(**PROPHETNET)),
    "umt5": lambda: transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**T5)),
    "bert-to-bert": bert_to_bert,
    "llava": llava,
}
# The flag that unties its weights scales its output as well: transformers 4 cannot save it with the weights apart.
SCALED_WHERE_TIED = ("umt5",)


def build(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(1))
    extra = {"decoder_input_ids": ids.flip(1)} if getattr(model.config, "is_encoder_decoder", False) else {}
    for parameter in model.parameters():
        # As a plain model's: matmul folds its input by this flag, and rounds by the alignment of a mapped file.
        parameter.requires_grad_(False)
        parameter.data = parameter.data.clone() if isinstance(model, transformers.PreTrainedModel) else parameter.data
    return model.eval()(input_ids=ids, **extra).logits


def tied_modules(model: nn.Module) -> list[list[str]]:
    """The modules that share a weight, of each shared one; a module that stands in two places once."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            names.setdefault(id(module.weight), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def choices(model: nn.Module) -> list[tuple[str, ...]]:
    """Each module of each tied set, and all of them."""
    return [choice for tied in tied_modules(model) for choice in ([(name,) for name in tied] + [tuple(tied)])]


def adapted(base: transformers.PreTrainedModel, targets: tuple[str, ...], **options: Any) -> peft.PeftModel:
    """Its gate is open and its dW as large as the weights."""
    torch.manual_seed(7)
    pattern = "|".join(map(re.escape, targets))
    config = {"r1": 3, "r2": 2, "warmup": "none", "init_std": 0.5, "target_modules": pattern, **options}
    return peft.get_peft_model(copy.deepcopy(base), DualLoraConfig(**config))


def check_reloads(merged: transformers.PreTrainedModel, want: Tensor, folder: Any) -> None:
    assert torch.equal(logits(merged), want)
    merged.save_pretrained(folder)
    again, found = type(merged).from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, saved = merged.state_dict(), again.state_dict()
    assert state.keys() == saved.keys()
    assert [name for name in state if not torch.equal(state[name], saved[name])] == []
    assert torch.equal(logits(again), want)


def flags(model: transformers.PreTrainedModel) -> set[bool]:
    """What tie_word_embeddings is in the configs of a model, of its parts, and of what those name."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    inner = [value for config in configs for value in vars(config).values() if hasattr(value, "to_diff_dict")]
    return {config.tie_word_embeddings for config in configs + inner if hasattr(config, "tie_word_embeddings")}


def check_refused(model: nn.Module, merging: Any, want: Tensor) -> None:
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(
        ConfigError, match=r"share one weight in \w+\. Merged they would not.*Nothing was merged\. Keep"
    ):
        merging()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p and torch.equal(p, value) for name, (p, value) in before.items())
    assert torch.equal(logits(model), want)


pytestmark = pytest.mark.filterwarnings(
    "ignore:.* shared one weight", "ignore:Setting `save_embedding", "ignore:Model has `tie_word"
)


@pytest.mark.parametrize("name", MODELS)
def test_any_part_of_a_tied_set_reloads_as_the_adapter_computed(name, tmp_path):
    base = build(name)
    for number, targets in enumerate(choices(base)):
        model = adapted(base, targets)
        want = logits(model)
        if name in SCALED_WHERE_TIED and not LEAVES_APART:
            check_refused(model, model.merge_and_unload, want)
        else:
            check_reloads(model.merge_and_unload(), want, tmp_path / str(number))
    assert number
    assert not torch.equal(want, logits(base))


@pytest.mark.parametrize("name", MODELS)
def test_without_peft_too(name, tmp_path):
    base = build(name)
    for number, targets in enumerate(choices(base)):
        if not all(type(base.get_submodule(target)) is nn.Linear for target in targets):
            continue
        torch.manual_seed(7)
        model = adapt(copy.deepcopy(base), targets, r1=3, r2=2, warmup_steps=0, init_std=0.5)
        want = logits(model)
        assert not torch.equal(want, logits(base))
        if name in SCALED_WHERE_TIED and not LEAVES_APART:
            check_refused(model, lambda model=model: merge(model), want)
        else:
            check_reloads(merge(model), want, tmp_path / str(number))
            # transformers 5 would leave them apart by itself; earlier releases and other programs go by the flag.
            assert flags(model) == {name in SCALED_WHERE_TIED}


@pytest.mark.parametrize("name", ["bart", "bert", "umt5"])
def test_beside_a_module_that_is_trained_in_full(name, tmp_path):
    """Its copy in modules_to_save was never tied, neither its weight nor, in BERT, its bias."""
    base = build(name)
    first, *_, last = tied_modules(base)[0]
    for number, (target, saved) in enumerate(((first, last), (last, first))):
        model = adapted(base, (target,), modules_to_save=[saved])
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.data.add_(0.1)
        want = logits(model)
        if not LEAVES_APART and (name == "umt5" or ("bert" in name and saved == last)):  # whose bias 4 always ties
            check_refused(model, model.merge_and_unload, want)
        else:
            merged = model.merge_and_unload()
            check_reloads(merged, want, tmp_path / str(number))
            assert flags(merged) == {name in SCALED_WHERE_TIED}


def test_a_config_that_ties_whatever_is_saved_is_asked_as_it_will_be_read(tmp_path):
    class Insists(transformers.LlamaConfig):
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
            return super().from_dict({**config_dict, "tie_word_embeddings": True}, **options)

    class Model(transformers.LlamaForCausalLM):
        config_class = Insists

    torch.manual_seed(0)
    model = adapted(Model(Insists(**LLAMA)).eval().requires_grad_(False), ("lm_head",))
    want = logits(model)
    if not LEAVES_APART:
        check_refused(model, model.merge_and_unload, want)
        return
    with pytest.warns(UserWarning, match="all are saved, and transformers 5 does not tie them though its config still"):
        merged = model.merge_and_unload()
    check_reloads(merged, want, tmp_path)


def test_a_base_that_was_untied_by_hand_is_saved_untied(tmp_path):
    """Its config still says that they are one weight, which transformers 4 would make of them."""
    base = build("bart")
    base.lm_head.weight = nn.Parameter(base.lm_head.weight + 0.1, requires_grad=False)
    model = adapted(base, (next(n for n, _ in base.named_modules() if n.endswith("q_proj")),))
    want = logits(model)
    merged = model.merge_and_unload()
    check_reloads(merged, want, tmp_path)
    assert flags(merged) == {False}


def test_a_tie_that_no_config_switches_off_is_refused_before_anything_is_merged():
    class Stubborn(transformers.LlamaForCausalLM):
        def tie_weights(self, *_: Any, **__: Any) -> None:
            self.lm_head.weight = self.model.embed_tokens.weight

    torch.manual_seed(0)
    base = Stubborn(transformers.LlamaConfig(**LLAMA)).eval().requires_grad_(False)
    model = adapted(base, ("lm_head", "model.layers.0.self_attn.q_proj"))
    check_refused(model, model.merge_and_unload, logits(model))
    plain = adapt(copy.deepcopy(base), ["lm_head", "q_proj"], r=3, warmup_steps=0, init_std=0.5)
    check_refused(plain, lambda: merge(plain), logits(plain))
    untouched = adapted(base, ("model.layers.0.self_attn.q_proj",))
    want = logits(untouched)
    assert torch.equal(logits(untouched.merge_and_unload()), want)


def test_what_cannot_be_found_out_is_refused():
    class NeedsMore(transformers.LlamaForCausalLM):
        def __init__(self, config: transformers.LlamaConfig, more: bool) -> None:
            super().__init__(config)

    model = adapted(NeedsMore(transformers.LlamaConfig(**LLAMA), True).eval().requires_grad_(False), ("lm_head",))
    with pytest.raises(ConfigError, match=r"model\.embed_tokens and lm_head share .*NeedsMore.*no empty model.*'more'"):
        model.merge_and_unload()
    assert isinstance(model.base_model.model.lm_head, DualLoraLayer)


@pytest.mark.skipif(not LEAVES_APART, reason="transformers 4 refuses the first merge")
def test_a_model_that_scales_by_the_flag_keeps_it(tmp_path):
    """UMT5 reads tie_word_embeddings in its forward; PEFT would switch it off, also at the next merge."""
    model = adapted(build("umt5"), ("lm_head",))
    with pytest.warns(UserWarning, match=r"lm_head shared one weight.*all are saved.*earlier releases"):
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = transformers.UMT5ForConditionalGeneration.from_pretrained(tmp_path)
    model = adapted(again, ("decoder.block.0.layer.0.SelfAttention.q",))
    want = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings
    check_reloads(merged, want, tmp_path / "again")


def test_a_merged_model_that_is_tied_or_resized_again_stays_as_it_is():
    """Every config says so, those of the parts as well."""
    for name in ("bart", "llava", "bert-to-bert"):
        base = build(name)
        merged = adapted(base, choices(base)[-1]).merge_and_unload()
        want = logits(merged)
        merged.tie_weights()
        assert torch.equal(logits(merged), want)


def test_a_module_that_stands_in_two_places_is_adapted_in_both():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    base = nn.Sequential(layer, nn.Tanh(), layer).requires_grad_(False)
    x = torch.randn(3, 6)
    model = adapted(base, ("0",))
    want = model(x)
    by_hand = adapted(nn.Sequential(copy.deepcopy(layer)), ("0",))
    assert torch.equal(want, by_hand(torch.tanh(by_hand(x))))
    clone = copy.deepcopy(model)
    merged = model.merge_and_unload()
    assert type(merged[2]) is nn.Linear
    assert merged[0] is merged[2]
    assert torch.equal(merged(x), want)
    assert torch.equal(clone.unload()(x), base(x))


def test_plain_modules_come_apart_with_a_word_of_warning():
    """No config says what a class of one's own ties."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    net[2].weight = net[0].weight
    adapt(net, ["2"], r=2, warmup_steps=0, init_std=0.5)
    x = torch.randn(3, 6)
    want = net(x)
    with pytest.warns(
        UserWarning, match="0 and 2 shared one weight.*state dict only into a model that does not tie"
    ) as caught:
        merged = merge(net)
    assert caught[0].filename == __file__
    assert torch.equal(merged(x), want)
    assert merged[0].weight is not merged[2].weight


def test_a_head_of_several_layers_in_modules_to_save_can_be_merged():
    """RoBERTa's classifier has no weight of its own, which PEFT's generic unloading asks for."""
    torch.manual_seed(0)
    base = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BERT)).eval()
    model = adapted(base, ("roberta.encoder.layer.0.attention.self.query",), modules_to_save=["classifier"])
    want = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), want)
