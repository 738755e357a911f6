"""What of PEFT's suite may fail with DualLoraConfig, and why; and which of its LoRA tests hold for any method.

Patterns are test ids without ``tests/``; ``*`` is any text. A listed test must fail: one that passes fails the run, and
so does a pattern that no test has.
"""

HUB = "fetches a file from the hub; the run is offline"
MHA = (
    "the target is torch.nn.MultiheadAttention as a whole, whose input weights are one parameter and no layer; it is refused "
    "by name (its out_proj is a layer and can be adapted)"
)
DORA_FLOAT32 = (
    "the lengths m of DoRA stay float32 whatever autocast_adapter_dtype says: in 16 bits they would not start at |W0|"
)
DEAD = (
    "the layer has one output and 2 or 5 inputs: as drawn from seed 0, ReLU(B A) is zero everywhere, so dW = 0 and the "
    "factors get no gradient. A property of the method; the layer warns of it"
)
CONVERSION = (
    "dW has full rank from the start, where the default is meant for trained weights and not for random ones of 0.02: of a "
    "layer this narrow the rank that the test converts to keeps less than it asks for"
)
BY_NAME = "asserts LoRA's class name, PEFT type or parameter count"
STATUS = "test_tuners_utils.py::TestModelAndLayerStatus::"
CUSTOM = "test_custom_models.py::TestPeftCustomModel::"

EXCEPTIONS = {
    "test_config.py::TestPeftConfig::test_from_pretrained[*": HUB,
    "test_config.py::TestPeftConfig::test_from_pretrained_cache_dir[*": HUB,
    "test_config.py::TestPeftConfig::test_save_pretrained_with_runtime_config[*": HUB,
    "test_custom_models.py::*-MHA-DualLoraConfig-*": MHA,
    "test_custom_models.py::TestMixedAdapterBatches::test_mixed_adapter_batches_mha_raises[*": MHA,
    CUSTOM + "test_adapter_dtype_autocast[*-False-dtype0-*DoRA*": DORA_FLOAT32,
    CUSTOM + "test_adapter_dtype_autocast[*-False-dtype1-*DoRA*": DORA_FLOAT32,
    CUSTOM + "test_merge_layers[Conv1d LoRA*": DEAD,
    CUSTOM + "test_safe_merge[Conv1d LoRA*": DEAD,
    CUSTOM + "test_save_load_roundtrip[Conv1d LoRA*": DEAD,
    CUSTOM + "test_only_params_are_updated[Conv1d LoRA*": DEAD,
    CUSTOM + "test_disable_adapters[Conv1d LoRA-*": DEAD,
    CUSTOM + "test_disable_adapters_with_merging[Conv1d LoRA-*": DEAD,
    CUSTOM + "test_disable_adapters[Embedding + transformers Conv1D 1 LoRA-*": DEAD,
    CUSTOM + "test_disable_adapters_with_merging[Embedding + transformers Conv1D 1 LoRA-*": DEAD,
    CUSTOM + "test_disable_adapters_with_merging[Embedding + transformers Conv1D 1 LoRA trainable_tokens-*": DEAD,
    "test_decoder_models.py::TestDecoderModels::test_lora_conversion[*kwargs0-*tiny-random-Gemma3*": CONVERSION,
    "test_decoder_models.py::TestDecoderModels::test_lora_conversion[*kwargs1-*tiny-dummy-qwen2*": CONVERSION,
    STATUS + "test_module_type_*": BY_NAME,
    STATUS + "test_adapter_model_type_*": BY_NAME,
    STATUS + "test_peft_types_*": BY_NAME,
    STATUS + "test_nb_params_*": BY_NAME,
}

# Tests that build a LoraConfig themselves but are about PEFT and any tuner.
GENERIC = [
    "test_mapping.py::TestGetPeftModel::*",
    "test_other.py::test_load_multiple_adapters_different_modules_to_save",
    "test_other.py::TestModulesToSave*",
    "test_tuners_utils.py::TestTargetedModuleNames::test_one_targeted_module_*",
    "test_tuners_utils.py::TestTargetedModuleNames::test_two_targeted_module_*",
    "test_tuners_utils.py::TestTargetedModuleNames::test_layers_to_transform_*",
    "test_tuners_utils.py::TestExcludedModuleNames::test_two_excluded_module_*",
    "test_tuners_utils.py::TestExcludedModuleNames::test_multiple_excluded_modules_list",
    "test_tuners_utils.py::TestExcludedModuleNames::test_*matched*",
    "test_tuners_utils.py::TestExcludedModuleNames::test_all_modules_excluded",
    "test_tuners_utils.py::TestModelAndLayerStatus::*_small",
    "test_tuners_utils.py::TestModelAndLayerStatus::*_large",
]
