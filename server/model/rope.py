"""Rotary frequencies as transformers computes them, and the table of cos and sin."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose frequencies do not depend on the sequence's length."""


class RopeFrequencies(NamedTuple):
    """cos and sin at position p are scale · cos(p · inv_freq) and scale · sin(p · inv_freq)."""

    inv_freq: tuple[float, ...]  # [head_dim / 2], exact fp32 values
    scale: float = 1.0  # YaRN's attention factor


def rope_frequencies(config: PretrainedConfig, head_dim: int) -> RopeFrequencies:
    """The frequencies of a config; ValueError for a kind that is not in ROPE_TYPES."""
    parameters = config.rope_parameters or {}
    kind = parameters.get("rope_type")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type {kind!r} is not supported; supported are {list(ROPE_TYPES)}")
    partial = parameters.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor {partial} is not supported; supported is 1.0")
    import torch  # here: the API process knows configs, and does without torch

    if kind == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return RopeFrequencies(tuple((1.0 / parameters["rope_theta"] ** exponent).tolist()))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return RopeFrequencies(tuple(inv_freq.float().tolist()), float(scale))


def cos_sin_table(rope: RopeFrequencies, num_positions: int, device: torch.device) -> Tensor:
    """cos of the D/2 frequencies, then sin, of every position: [num_positions, D] fp32."""
    import torch

    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float)
    angles = torch.arange(num_positions, dtype=torch.float)[:, None] * inv_freq
    return torch.cat([angles.cos(), angles.sin()], dim=-1).mul_(rope.scale).to(device)
