# SPDX-License-Identifier: Apache-2.0
"""Small sizes for any configuration: all widths divided by one number, so that they still fit."""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class Profile(NamedTuple):
    """By how much sizes are divided, and where they are capped."""

    heads: int
    """Numbers of heads."""
    head_dim: int
    """Widths of one head; other widths are divided by the product of both."""
    layers: int = 2
    vocab: int = 512
    image: int = 256


PROFILES = [
    Profile(4, 8),
    Profile(4, 4),
    Profile(1, 8),
    Profile(1, 16),
    Profile(2, 8),
    Profile(1, 4),
    Profile(2, 4, layers=4),
    Profile(4, 8, layers=99),
    Profile(1, 8, layers=99),
    Profile(1, 1),
]

HEADS = re.compile(
    r"(^|_)(n_heads?|num_heads?|attention_heads|kv_heads|key_value_heads|key_heads|value_heads|"
    r"attn_heads|q_heads|heads)($|_per_layer$)"
)
HEAD_DIM = re.compile(
    r"head_dim|d_head|dim_head|^d_kv$|kv_channels|head_size$|rotary_dim|mrope_section|axes_dim|"
    r"pre_attn_scalar|qk_.*dim|v_head|linear_head"
)
WIDTH = re.compile(
    r"(hidden_sizes?|_dims?|^dims?|d_model|n_embd|widths?|_channels|^channels|d_ff|ffn_dim|dff|"
    r"intermediate_sizes?|mlp_size|embedding_size|embed_size|_rank|n_inner|d_inner|emb_size|"
    r"hidden_unit|units|num_filters|filters|hidden_size_.*|projection_size|feature_size|"
    r"mlp_hidden|conv_dim|dim_feedforward|embed_dims?|pooler_size|feat_dim|d_latents|d_embed|"
    r"inner_dim|fusion_size|neck_size|output_size|attention_size|lru_width|attn_hidden_size|"
    r"d_state|codebook_dim|d_proj|channel|mid_channels|planes|hidden_dimension|"
    r"bottleneck_size|query_dim|qk_channels|v_channels|num_pos_feats|coordinate_size|shape_size|"
    r"block_out_channels|layers_hidden|decoder_hidden|caption_channels)$"
)
NOT_WIDTH = re.compile(
    r"num_channels|^in_channels|^out_channels$|image_channels|audio_channels|input_channels|"
    r"conv_kernel_dim|conv_kernel|input_size|num_mel|act_dim|state_dim|output_dim$|latent_channels|"
    r"max_|drop|xvector_output|input_feat|kernel|mask_input_channels|frame|patch_dim|^in_dim|"
    r"axial_pos_shape|train_size|output_shape|norm_num"
)
LAYERS = re.compile(
    r"(^|_)(n_layers?|num_layers|layers|depth|num_blocks|n_layer|self_attends_per_block)$"
)
DEPTHS = re.compile(r"^(depths|num_blocks|layers_per_block|decoder_depths|encoder_depths)$")
EXPERTS = re.compile(
    r"^(num_experts|num_local_experts|moe_num_experts|n_routed_experts|num_routed_experts)$"
)
FIXED = {
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "expert_capacity": 64,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "apply_spec_augment": False,
    "first_k_dense_replace": 1,
    "max_window_layers": 1,
    "num_kv_shared_layers": 0,
    "use_pretrained_backbone": False,
    "entity_vocab_size": 512,
    "mamba_chunk_size": 8,
    "ngram_vocab_size_base": 500,
    "split_ngram_parts": 8,
    "encoder_hash_byte_group_vocab": 500,
    "num_conv_pos_embedding_groups": 2,
    "train_num_points": 100,
    "num_denoising": 0,
    "upsample_groups": 8,
}
STAGES = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
CAPS = {
    "max_position_embeddings": 4096,
    "num_queries": 20,
    "num_negatives": 4,
    "sliding_window": 6,
    "max_source_positions": 100,
    "num_prompts": 8,
    "index_topk": 4,
}


def shrink(config: dict[str, Any], profile: Profile, **fixed: Any) -> dict[str, Any]:
    """Return a copy of a configuration with small sizes, of nested ones too."""
    return _shrink(config, profile, _small_ids(config, profile.vocab), FIXED | fixed)


def _shrink(config: dict, profile: Profile, ids: dict[int, int], fixed: dict) -> dict:
    layers = next((config[key] for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
                   if isinstance(config.get(key), int)), None)  # fmt: skip
    kinds = config.get("layer_types") or config.get("layers_block_type") or []
    wanted = min(max(profile.layers, len(set(map(str, kinds)))), layers or profile.layers)
    small = {}
    for key, value in config.items():
        if key in fixed:
            small[key] = fixed[key]
        elif key in STAGES and profile.layers < 99:
            continue
        elif key == "pad_token_id" and value is None:
            small[key] = 0
        elif key in ("id2label", "label2id"):
            small[key] = value
        elif key == "per_layer_config" and value:
            few = {k: v for k, v in value.items() if int(k) < wanted}
            small[key] = {k: _shrink(v, profile, ids, fixed) for k, v in few.items()}
        elif isinstance(value, dict):
            small[key] = _shrink(value, profile, ids, fixed)
        elif _is_layer_list(key, value, layers):
            small[key] = _some_of_each(value, kinds, wanted)
        else:
            small[key] = _small(key, value, profile, ids, wanted)
    return small


def _is_layer_list(key: str, value: Any, layers: int | None) -> bool:
    return isinstance(value, (list, tuple)) and layers is not None and len(value) == layers > 4


def _some_of_each(values: list, kinds: list, wanted: int) -> list:
    """As many values as there will be layers, so that each kind of layer is among them."""
    if len(kinds) != len(values):
        return list(values[:wanted])
    first = {str(kind): place for place, kind in reversed(list(enumerate(kinds)))}
    chosen = set(first.values())
    chosen |= set(
        [place for place in range(len(kinds)) if place not in chosen][: wanted - len(chosen)]
    )
    return [values[place] for place in sorted(chosen)]


def _small(key: str, value: Any, profile: Profile, ids: dict[int, int], layers: int) -> Any:
    if isinstance(value, (list, tuple)):
        if DEPTHS.search(key) and profile.layers < 99:
            return type(value)(1 if isinstance(one, int) else one for one in value)
        if _is_width(key) or HEADS.search(key):
            return type(value)(_small(key, one, profile, ids, layers) for one in value)
        if key == "image_size":
            return type(value)(min(one, profile.image) for one in value)
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if key.endswith("vocab_size") and value > 16:
        return min(value, profile.vocab)
    if value in ids and (key.endswith(("_id", "_index", "_ids", "_token")) and value > 0):
        return ids[value]
    if key == "num_feat_extract_layers":
        return value
    if key in CAPS:
        return min(value, CAPS[key])
    if EXPERTS.search(key):
        return min(value, 4)
    if HEADS.search(key):
        return max(1, value // profile.heads) if value % profile.heads == 0 or value < 4 else value
    if HEAD_DIM.search(key):
        return _divided(value, profile.head_dim)
    if LAYERS.search(key):
        return min(value, layers)
    if key in ("image_size", "img_size"):
        return min(value, profile.image)
    if _is_width(key):
        return _divided(value, profile.heads * profile.head_dim)
    return value


def _is_width(key: str) -> bool:
    return bool(HEAD_DIM.search(key) or (WIDTH.search(key) and not NOT_WIDTH.search(key)))


def _divided(value: Any, by: int) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value < 16:
        return value
    return value // by if value % by == 0 else max(2, value // by)


def _small_ids(config: dict[str, Any], vocab: int) -> dict[int, int]:
    """New numbers for special tokens beyond the small vocabulary: the same for the same token."""
    found: set[int] = set()

    def collect(part: dict) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                collect(value)
            elif (
                isinstance(key, str)
                and key.endswith(("_id", "_index"))
                and isinstance(value, int)
                and value >= vocab
            ):
                found.add(value)

    collect(config)
    return {value: vocab - 1 - place for place, value in enumerate(sorted(found))}
