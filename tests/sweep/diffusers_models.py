# SPDX-License-Identifier: Apache-2.0
"""Model classes of diffusers: all public ones, built small."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.sweep.building import NotBuilt, first_that_runs, linear_layers
from tests.sweep.shrinking import Profile, shrink

VERSION = diffusers.__version__
PROFILES = [
    Profile(4, 8, layers=1),
    Profile(4, 4, layers=2),
    Profile(4, 2, layers=2),
    Profile(1, 8, layers=2),
    Profile(1, 4, layers=2),
    Profile(4, 1, layers=2),
]
FIXED: dict[str, Any] = {
    "norm_num_groups": 4,
    "num_groups": 4,
    "resnet_groups": 4,
    "sample_size": 16,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "layers_per_block": 1,
    "use_linear_projection": True,
}
WIDTHS = {
    "encoder_hidden_states": (
        *("cross_attention_dim", "joint_attention_dim", "caption_channels", "text_embed_dim"),
        *("text_dim", "cap_feat_dim", "caption_dim", "text_feat_dim", "encoder_hid_dim"),
        *("context_dim", "in_channels_text", "text_states_dim", "caption_projection_dim"),
        *("encoder_hidden_dim", "condition_dim", "txt_in_dim", "in_text_dim", "embedding_dim"),
        *("context_in_dim", "text_hidden_size", "hidden_size", "cond_token_dim"),
    ),
    "pooled_projections": ("pooled_projection_dim", "pooled_proj_dim", "in_text_dim2"),
    "image_embeds": ("image_embed_dim", "image_dim", "image_embeds_dim"),
    "proj_embedding": ("embedding_dim",),
    "global_hidden_states": ("global_states_input_dim", "global_cond_dim"),
}


def names() -> list[str]:
    """Return the names of all public model classes, sorted."""
    found = []
    for name in dir(diffusers):
        part = None if name.startswith("_") else _public(name)
        if isinstance(part, type) and issubclass(part, diffusers.ModelMixin):
            found.append(name)
    return sorted(set(found) - {"ModelMixin"})


def _public(name: str) -> Any:
    try:
        return getattr(diffusers, name)
    except Exception:  # of an optional dependency
        return None


def is_first(name: str) -> bool:
    """Return True: each class is of its own kind."""
    return True


def build(name: str) -> tuple[nn.Module, Callable[[nn.Module], Any], Any]:
    """Build a small model of a class; as `transformers_models.build`."""
    model_class = getattr(diffusers, name)
    parameters = inspect.signature(model_class.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def make(profile: Profile) -> nn.Module:
        small = shrink(defaults, profile, **FIXED)
        small = {key: small[key] for key in defaults}
        if isinstance(small.get("block_out_channels"), (list, tuple)):
            small["block_out_channels"] = tuple(32 for _ in small["block_out_channels"])
        made: nn.Module = model_class(**small)
        return made

    if any(
        p.default is p.empty
        and p.name != "self"
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        for p in parameters
    ):
        raise NotBuilt("configuration: it has no default sizes")
    model, run = first_that_runs(PROFILES, make, inputs)
    return model, run, linear_layers(model)


def inputs(model: nn.Module) -> Any:
    """Yield inputs to try, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    wanted = [
        name
        for name, p in parameters.items()
        if name not in ("return_dict", "self") and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    required = [name for name in wanted if parameters[name].default is inspect.Parameter.empty]
    likely = [name for name in wanted if name in required or name in LIKELY]
    for layout, more, steps in itertools.product(range(5), (likely, required), (0, 1)):
        yield {name: _make(name, model, layout, steps) for name in more}


LIKELY = (
    *("encoder_hidden_states", "timestep", "pooled_projections", "img_ids", "txt_ids", "guidance"),
    *("added_cond_kwargs", "class_labels", "encoder_attention_mask", "img_shapes"),
    *("encoder_hidden_states_mask", "image_embeds"),
)
FRAMES, SIDE, TEXT = 5, 16, 8


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _make(name: str, model: nn.Module, layout: int, steps: int) -> Any:
    config: Any = model.config
    channels = next((v for key in ("in_channels", "latent_channels", "in_dim", "num_channels")
                     if isinstance(v := config.get(key), int)), 4)  # fmt: skip
    side = SIDE if len(str(type(model).__name__).split("Autoencoder")) == 1 else 32
    picture = [
        (2, channels, side, side),
        (2, channels, FRAMES, side, side),
        (2, side, channels),
        (2, FRAMES, channels, side, side),
        (2, channels, 64),
    ][layout]
    tokens = side
    if name == "controlnet_cond" and config.get("conditioning_channels"):
        return _normal(2, config.conditioning_channels, 8 * side, 8 * side)
    if name in ("hidden_states", "sample", "x", "latents", "image_latents", "controlnet_cond"):
        return _normal(*picture)
    if name in ("timestep", "t", "timestep_r", "r_timestep", "timestep_ratio"):
        return torch.tensor([3, 7]) if steps == 0 else torch.tensor([0.3, 0.7])
    if name == "guidance":
        return torch.tensor([1.0, 2.0]) if config.get("guidance_embeds") else None
    if name == "fps":
        return torch.tensor([8, 8])
    if name in ("img_ids", "txt_ids"):
        return torch.zeros(tokens if name == "img_ids" else TEXT, 3)
    if name in ("encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask"):
        return torch.ones(2, TEXT, dtype=torch.bool if steps else torch.long)
    if name in ("original_size", "target_size", "crop_coords"):
        return torch.tensor([[64.0, 64.0]] * 2)
    if name == "class_labels":
        kinds = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
        return torch.tensor([0, 1]) if kinds else None
    if name == "added_cond_kwargs":
        return {"resolution": None, "aspect_ratio": None} if steps == 0 else {}
    if name == "img_shapes":
        return [[(1, 4, 4)]] * 2
    if name == "conditioning_scale":
        return 1.0
    if name == "input_ids":
        return torch.arange(2 * TEXT).reshape(2, TEXT) % 60
    widths = WIDTHS.get(name, WIDTHS["encoder_hidden_states"])
    width = next((v for key in widths if isinstance(v := config.get(key), int)), None)
    if width is None and name in ("pooled_projections", "image_embeds"):
        return None
    width = width or 32
    if name in ("pooled_projections", "proj_embedding"):
        return _normal(2, width)
    return _normal(2, TEXT, width)
