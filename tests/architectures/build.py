"""Every model class that transformers registers, made small from its config alone, and inputs for it.

A config keeps its own values but for sizes: widths, heads, layers, experts, vocabularies and pictures are made small by
their names, in every sub-config, and what a config derives from them it derives anew. Where such a model does not run, a
second attempt leaves all widths as they are and has few layers. Nothing is read from the network.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import getattribute_from_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

MAX_PARAMETERS = 40_000_000
VOCABULARY, FIRST_SPECIAL = 128, 90  # text ids are below FIRST_SPECIAL, ids with a meaning of their own from there on
ROWS, LENGTH = 2, 9

# The first of these that knows an architecture gives its main class; the other heads follow.
ORDER = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "CTC", "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION", "IMAGE_SEGMENTATION", "DEPTH_ESTIMATION",
    "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "ZERO_SHOT_OBJECT_DETECTION", "MASK_GENERATION", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "TIME_SERIES_PREDICTION",
)  # fmt: skip
LAST = ("", "PRETRAINING", "BACKBONE", "IMAGE", "TEXT_ENCODING", "MULTIMODAL_LM", "RETRIEVAL")

# Name of a size -> its small value; a config that has less keeps what it has. The first match counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*(num|n)_(feat_extract|conv_pos|channels|labels|mel|codevector|fft|negatives).*", 0),  # 0: as it is
    (r"(.*_)?(vocab|vocab_sizes?|vocabulary_size|codebook_size|num_embeddings|num_embeds)(_per_layer_input)?", VOCABULARY),
    (r"(num_|n_)?(.*_)?(key_value|kv)_heads", 2),
    (r"index_n_heads", 2),
    (r"(num_|n_)?(.*_)?(attention_|attn_)?(heads?|n_head)", 4),
    (r"rotary_dim", 8),
    (r"(.*_)?(head_dim|dim_head|d_kv|head_width|head_size|attention_head_size|d_head|qkv_channels_per_head)", 16),
    (r"(q|kv|o)_lora_rank|.*_rank", 16),
    (r"(num_|n_)?(.*_)?experts_per_tok(en)?|(moe_)?top_?k|moe_k|num_selected_experts", 2),
    (r"mm_tokens_per_image", 4),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"(num_|n_)?(.*_)?shared_experts", 1),
    (r"(num_|n_)?(.*_)?experts", 4),
    (r"first_k_dense_replace|moe_layer_start_index", 1),
    (r"(num_|n_)?(.*_)?(layers?|blocks|depth)", 2),
    (r"(.*_)?(intermediate_(size|dim)|ffn_(hidden_)?(dim|size)|d_ff|mlp_(hidden_)?dim|linear_units|n_inner)", 96),
    (r"(.*_)?(max_position_embeddings|n_positions|max_(source|target)_positions|max_seq_len|context_length)", 64),
    (r"(.*_)?(image|crop|img|input_image|pretrain_image)_size", 32),
    (r"sliding_window|attention_window|local_attention|.*_chunk_size|chunk_size", 8),
    (r"num_queries|num_query_tokens|.*num_latents|num_object_queries|max_queries", 10),
    (r"(num_)?(max_)?frames", 4),
    (
        r".*(hidden|embed|embeddings?|model|projection|proj|output|projector|decoder|encoder|features?|latent|text|vision|conv|"
        r"channels?|pooler|fpn|neck|fusion|bottleneck|adapter|backbone|codebook)(_output)?(_proj)?_(size|dims?|dimension|channels)",
        64,
    ),
    (r"d_model|n_embd|dim|width|.*_dim|.*_hidden_size|hidden_size_.*|d_embed|d_latents", 64),
)  # fmt: skip


def registered() -> dict[str, list[str]]:
    """Names of the model classes of each model type, its main class first; a class counts once."""
    pattern = re.compile(r"MODEL_(?:FOR_)?(.*?)_?MAPPING_NAMES")
    found = {pattern.fullmatch(name)[1]: name for name in dir(modeling_auto) if pattern.fullmatch(name)}  # type: ignore[index]
    middle = sorted(found.keys() - set(ORDER) - set(LAST))
    types: dict[str, list[str]] = {}  # class -> the model types that name it
    for task in (*ORDER, *middle, *LAST):
        for model_type, names in getattr(modeling_auto, found[task], {}).items():
            for name in names if isinstance(names, (tuple, list)) else (names,):
                if name is not None and model_type in CONFIG_MAPPING:
                    types.setdefault(name, []).append(model_type)
    classes: dict[str, list[str]] = {}
    for name, candidates in types.items():
        own = [t for t in candidates if name.lower().startswith(re.sub("[-_.]", "", t))]
        classes.setdefault(max(own, key=len, default=candidates[0]), []).append(name)
    return classes


def model_class(model_type: str, name: str) -> type[PreTrainedModel]:
    module = importlib.import_module(f"transformers.models.{model_type_to_module_name(model_type)}")
    return getattribute_from_module(module, name)


# -- configs -----------------------------------------------------------------------------------------------------------

# What the rules below do not know: sizes that have to fit each other, parts that a default config lacks.
GIVEN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {"is_decoder": True, "axial_pos_shape": [3, 3], "axial_pos_embds_dim": [32, 32]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "xmod": {"default_language": "en_XX"},
    "informer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "time_series_transformer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lw_detr_vit": {"num_windows": 4},
    "beit": {"out_indices": [1, 2, 3, 4], "num_hidden_layers": 4},
    "data2vec-vision": {"out_indices": [1, 2, 3, 4], "num_hidden_layers": 4},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12, "input_size": 32},
    "layoutlmv2": {"coordinate_size": 10, "shape_size": 12},
    "autoformer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "nemotron": {"num_key_value_heads": 2},
    "bamba": {"mamba_d_head": "auto", "mamba_n_heads": 8, "mamba_n_groups": 1},
    "granitemoehybrid": {"mamba_d_head": "auto", "mamba_n_heads": 8, "mamba_n_groups": 1},
    "falcon_h1": {"mamba_d_head": 16, "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_d_ssm": 128},
    "nemotron_h": {"mamba_head_dim": 16, "mamba_num_heads": 8, "n_groups": 1, "ssm_state_size": 16},
    "mimi": {"upsample_groups": 64},
    "sam2_hiera_det_model": {"hidden_size": 16},
    "longcat_flash": {"head_dim": 8, "qk_rope_head_dim": 8},
}  # fmt: skip
RESNET = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1],
    "out_indices": [1, 2, 3, 4],
}  # fmt: skip


def _small_int(name: str, value: int) -> int:
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return min(value, size) if size and value > 0 else value
    return value


def _small_list(name: str, values: list[int], layers: int) -> list[int]:
    """Stages of a pyramid: one block each, widths that grow as they did; indices of layers: those that are left."""
    if re.fullmatch(r"depths|.*_num_blocks|stage_num.*|.*blocks_per_stage|num_block_repeats|.*block_sizes", name):
        return [min(v, 1) for v in values]
    if re.fullmatch(r".*heads.*", name):
        return [min(v, 2) for v in values]
    if re.fullmatch(
        r"(.*hidden_sizes?|embed_dims?|.*_channels|channels|.*_dims?|.*dim_per_stage|.*channel_list)", name
    ):
        return [v if v <= 16 else max(16, v // 8 // 8 * 8) for v in values]
    if re.fullmatch(r"(image|crop)_size", name):
        return [min(v, 32) for v in values]
    if _INDICES.fullmatch(name) and max(values) > layers:
        return [i + (name == "out_indices") for i in range(min(len(values), layers))]
    return values


def accepted(config_class: type) -> set[str]:
    if dataclasses.is_dataclass(config_class):
        return {field.name for field in dataclasses.fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)


def small_values(config: PretrainedConfig, widths: bool = True) -> dict[str, Any]:
    """Keyword arguments that make a small config of the class of ``config``."""
    allowed, values = accepted(type(config)), {}
    special = iter(range(FIRST_SPECIAL, VOCABULARY - 1))
    kinds = _layer_types(config, allowed)
    indices = [v for n, v in vars(config).items() if _INDICES.fullmatch(n) and isinstance(v, (list, tuple))]
    layers = max([kinds.pop("", 2), *(min(6, len(v)) for v in indices)])
    for name, value in vars(config).items():
        if name not in allowed or isinstance(value, bool):
            continue
        if isinstance(value, PretrainedConfig):
            if value.model_type.startswith("timm"):
                values[name] = RESNET
            else:
                values[name] = {"model_type": value.model_type, **small_values(value, widths)}
        elif re.fullmatch(r".*token_(id|index|ids)", name) and isinstance(value, int):
            values[name] = value if value < 4 else next(special)
        elif isinstance(value, int):
            few = re.fullmatch(r".*(layers?|blocks|depth|experts|vocab_size|experts_per_tok(en)?)", name)
            values[name] = _small_int(name, value) if widths or few else value
            if re.fullmatch(r"num_hidden_layers|n_layer|num_layers|depth", name):
                values[name] = min(value, layers)
        elif isinstance(value, float) and re.search("drop|mask_(time|feature)_prob", name):
            values[name] = 0.0
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            stages = name == "out_indices" and ("depths" in vars(config) or "hidden_sizes" in vars(config))
            values[name] = _small_list(name, list(value), layers) if widths and not stages else list(value)
        elif value is None and name in ("vocab_size", "head_dim", "n_routed_experts"):
            values[name] = _small_int(name, 1 << 20)
        elif value is None and name == "pad_token_id":
            values[name] = 0
    values |= kinds
    _fit(config, values, allowed)
    return values | GIVEN.get(config.model_type, {})


def _fit(config: PretrainedConfig, values: dict[str, Any], allowed: set[str]) -> None:
    """Sizes that follow from each other."""
    heads, groups = (next((n for n in names if n in values), "") for names in (_HEADS, _GROUPS))
    if heads and groups and getattr(config, groups) == getattr(config, heads):
        values[groups] = values[heads]
    for prefix in ("mamba_", ""):  # heads x width of a head = inner width of a state-space layer
        heads = next((n for n in (f"{prefix}n_heads", f"{prefix}num_heads") if n in vars(config)), "")
        if heads and ("mamba_expand" in vars(config) or "expand" in vars(config)) and "state" in "".join(vars(config)):
            expand = values.get("mamba_expand", values.get("expand", 2))
            values[heads] = expand * values.get("hidden_size", 64) // 16
            values |= {n: 1 for n in ("n_groups", "mamba_n_groups") if n in vars(config)}
            values |= {n: expand * values.get("hidden_size", 64) for n in ("mamba_d_ssm",) if n in vars(config)}
            break
    modeling = sys.modules.get(type(config).__module__.replace("configuration_", "modeling_"))
    if "rope_parameters" in allowed and modeling is not None and "mrope_section" in inspect.getsource(modeling):
        given = getattr(config, "rope_parameters", None) or {}
        share = given.get("partial_rotary_factor") or 1.0
        half = int(values.get("head_dim", 16) * share) // 2
        values["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 10000.0, **given, "mrope_section": [half - 2 * (half // 4), half // 4, half // 4]
        }  # fmt: skip


_HEADS, _GROUPS = ("num_attention_heads", "n_head", "num_heads"), ("num_key_value_heads", "n_head_kv", "num_kv_heads")
_INDICES = re.compile(r".*(_indices|_indexes|_layers|_idxs|_layer_ids|feature_layer)")


def _layer_types(config: PretrainedConfig, allowed: set[str]) -> dict[str, Any]:
    """One layer of each kind, where a config names the kind of each; under "" their number."""
    kinds = {
        name: value
        for name, value in vars(config).items()
        if name in allowed and re.fullmatch(r".*(layer_types|layers_block_type)", name) and value
    }
    if not kinds:
        return {}
    rows = list(zip(*kinds.values(), strict=False))
    distinct = list(dict.fromkeys(rows))
    while len(distinct) < 2:
        distinct.append(rows[-1])
    values: dict[str, Any] = {name: [row[column] for row in distinct] for column, name in enumerate(kinds)}
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if name in allowed:
            values[name] = len(distinct)
            break
    return values | {"": len(distinct)}


def small_config(cls: type[PreTrainedModel], model_type: str, widths: bool = True) -> PretrainedConfig:
    """A small config for ``cls``: of the class it names, else of that of its model type."""
    config_class = cls.config_class or CONFIG_MAPPING[model_type]
    if not isinstance(config_class, type) or config_class is PretrainedConfig:
        config_class = CONFIG_MAPPING[model_type]
    model_class(model_type, cls.__name__)  # its module is looked into
    return config_class(**small_values(config_class(), widths))


# -- models ------------------------------------------------------------------------------------------------------------


def build(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A model of random weights, none of them all zero.

    Raises:
        ValueError: it is larger than MAX_PARAMETERS.
    """
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters, more than {MAX_PARAMETERS / 1e6:.0f}")
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.count_nonzero():
                parameter.normal_(std=0.02)
    return model


# -- inputs ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Small:
    """A model in evaluation mode and inputs that it accepts."""

    model: PreTrainedModel
    inputs: dict[str, Any]
    widths: bool  # whether its widths were made small, or are the config's own


def small(model_type: str, name: str) -> Small:
    """A small model of this class.

    Raises:
        ValueError: it cannot be built, or does not run; the message says why.
    """
    errors = []
    for widths in (True, False, True):  # sizes follow from modules that the first attempt imports
        stage = "class"
        try:
            cls = model_class(model_type, name)
            stage = "config"
            config = small_config(cls, model_type, widths)
            stage = "model"
            model = build(cls, config).eval().requires_grad_(False)
            stage = "forward"
            given = inputs(model)
            return Small(model, given, widths)
        except Exception as error:
            errors.append(f"{stage}: {reason(error)}")
    raise ValueError("; ".join(dict.fromkeys(errors)))


def reason(error: BaseException) -> str:
    """An error on one line: its class and what it says first of all, or a validator's cause."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    return f"{type(error).__name__}: {lines[-1] if lines[0].endswith(':') else lines[0]}"[:200]


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Training mode, but for batch norms, which would change with each forward."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    try:
        yield
    finally:
        model.eval()


def inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments with which ``model`` runs: its parameters are known by their names, their layouts tried in turn.

    Raises:
        ValueError: none was found, with the first error.
    """
    parameters = inspect.signature(model.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    first = None
    for layout in layouts(model):
        wanted = {*required, *_TEXT, model.main_input_name, *layout["also"]}
        if layout["picture"] == "patches":
            wanted |= {"grid_thw", "image_grid_thw"}
        wanted &= set(parameters)
        for _ in range(5):
            given = {n: made for n in sorted(wanted) if (made := make(model, n, layout)) is not None}
            if "use_cache" in parameters:
                given["use_cache"] = False
            try:
                with torch.no_grad():
                    found = floats(model(**given))
                if not found:
                    raise ValueError("no floating-point output")
                if not all(bool(t.isfinite().all()) for t in found):
                    raise ValueError("an output is not finite")
                with torch.no_grad(), training(model):  # some want more to train than to answer
                    model(**given)
                return given
            except Exception as error:
                first = first or error
                counts = re.search(r"tokens: (\d+),? .*?features:? (\d+)", str(error))
                count = int(counts[2]) if counts else 0
                named = {n for n in re.findall(r"\w+", str(error)) if n in parameters} - wanted
                if counts and layout["image_tokens"] == 0:
                    layout["image_tokens"] = -(-count // ROWS)
                elif counts and layout["image_tokens"] == -(-count // ROWS):  # numbers were counted, not vectors
                    layout["image_tokens"] = max(1, count // ROWS // (setting(model.config, "hidden_size") or 1))
                elif named:
                    wanted |= named
                else:
                    break
    assert first is not None
    raise first


_TEXT = ("input_ids", "decoder_input_ids")
_PICTURES = ("pixel_values", "pixel_values_videos", "input_values", "input_features")


def layouts(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """The ways in which pictures and sound may be laid out, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    has = [n for n in _PICTURES if n in parameters]
    also = [()] if not has else [tuple(has[:1]), ()] if "input_ids" in parameters else [tuple(has[:1])]
    pictures = ["plain", "frames", "patches"] if "pixel" in "".join(has) else [""]
    if "grid_thw" in parameters or "image_grid_thw" in parameters:
        pictures = ["patches", "plain"]
    heard = {"input_values", "input_features"} & {*has}
    sounds = ["bins last", "bins first", "one channel", "long"] if heard else [""]
    sizes = ["default", 80, 128, 160, 320] if "input_features" in has else ["default"]
    for extra, picture, bins, sound in itertools.product(also, pictures, sizes, sounds):
        yield {"also": extra, "picture": picture, "bins": bins, "sound": sound, "image_tokens": 0}


def setting(config: PretrainedConfig, *names: str) -> Any:
    """The first of these that the config, or a config within it, has a value for."""
    return next((v for name in names for c in configs(config) if (v := getattr(c, name, None)) is not None), None)


def make(model: PreTrainedModel, name: str, layout: dict[str, Any]) -> Any:
    """The argument ``name``; None where the name is not known."""
    g = torch.Generator().manual_seed(1)
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = min(getattr(text, "vocab_size", None) or VOCABULARY, FIRST_SPECIAL)
    length = LENGTH + layout["image_tokens"]
    channels = setting(config, "num_channels", "in_channels", "in_chans") or 3
    channels = channels if isinstance(channels, int) else 3
    size = setting(config, "image_size") or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    frames = setting(config, "num_frames", "frames_per_clip") or 4
    patch = setting(config, "patch_size") or 16
    patch = patch if isinstance(patch, int) else patch[0]
    depth = setting(config, "temporal_patch_size") or 1
    if re.fullmatch(r"(qformer_|classes_|text_|task_)?input_ids|task_inputs", name) or name == "decoder_input_ids":
        ids = torch.randint(4, vocabulary, (ROWS, length - 2 * name.startswith("decoder")), generator=g)
        if name == "input_ids" and type(model).__name__.startswith("Musicgen"):
            return torch.randint(4, vocabulary, (ROWS * config.num_codebooks, length), generator=g)
        token = setting(config, "image_token_id", "image_token_index", "media_placeholder_token_id")
        if layout["image_tokens"] and token is not None and name == "input_ids":
            ids[:, 1 : 1 + layout["image_tokens"]] = token
        return ids
    if name == "attention_mask" or name.endswith("text_attention_mask"):
        return torch.ones(ROWS, length, dtype=torch.long)
    if name in ("pixel_values", "pixel_values_videos"):
        if layout["picture"] == "patches":
            return torch.randn(ROWS * 16, channels * depth * patch * patch, generator=g)
        shape = (ROWS, frames) if layout["picture"] == "frames" or name.endswith("videos") else (ROWS,)
        return torch.randn(*shape, channels, height, width, generator=g)
    if name == "hidden_states" and layout["picture"] == "patches":
        return torch.randn(ROWS * 16, channels * depth * patch * patch, generator=g)
    if name in ("grid_thw", "image_grid_thw"):
        return torch.tensor([[1, 4, 4]] * ROWS)
    if name == "pixel_attention_mask":
        return torch.ones(ROWS, height, width, dtype=torch.long)
    if name in ("input_values", "input_features", "padding_mask", "input_features_mask"):
        names = ("num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "input_dim")
        bins = (setting(config, *names) or 80) if layout["bins"] == "default" else layout["bins"]
        positions = setting(config, "max_source_positions", "max_position_embeddings")
        if name == "input_features":
            if layout["sound"] == "bins first":
                return torch.randn(ROWS, bins, 2 * (positions or 32), generator=g)
            return torch.randn(ROWS, 64, bins, generator=g)
        if name == "input_features_mask":
            return torch.ones(ROWS, 64, dtype=torch.long)
        if layout["sound"] == "bins first":
            return torch.randn(ROWS, setting(config, "max_length") or 64, bins, generator=g)
        samples = 4000 if layout["sound"] != "long" else 16000
        sound = torch.randn(ROWS, samples, generator=g)
        return sound[:, None] if layout["sound"] == "one channel" else sound
    if name == "bbox":
        corners = torch.randint(0, 20, (ROWS, length, 2), generator=g)
        return torch.cat([corners, corners + 10], -1)
    if name == "past_values":
        steps = setting(config, "context_length") or 32
        lags = max(setting(config, "lags_sequence") or [0])
        series = setting(config, "num_input_channels")
        shape = (ROWS, steps + lags) if series is None else (ROWS, steps, series)
        return torch.rand(shape, generator=g)
    if name in ("past_time_features", "past_observed_mask"):
        steps = (setting(config, "context_length") or 32) + max(setting(config, "lags_sequence") or [0])
        if name.endswith("mask"):
            return torch.ones(ROWS, steps)
        return torch.rand(ROWS, steps, setting(config, "num_time_features") or 1, generator=g)
    if name == "visual_feats":
        return torch.randn(ROWS, 5, setting(config, "visual_feat_dim") or 64, generator=g)
    if name == "visual_pos":
        return torch.rand(ROWS, 5, setting(config, "visual_pos_dim") or 4, generator=g)
    if name == "flattened_patches":
        return torch.rand(ROWS, 6, 2 + (setting(config, "patch_embed_hidden_size") or 768), generator=g)
    if name == "query_embeds":
        return torch.randn(ROWS, 4, config.hidden_size, generator=g)
    return None


def configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from configs(value)


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, in order; caches are left out."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        kept = [value for name, value in output.items() if "past" not in name and "cache" not in name]
        return [t for value in kept for t in floats(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in floats(value)]
    return []
