"""The settings of PEFT's LoRA that are not honoured: harmless ones, and those that are refused."""

from __future__ import annotations

HARMLESS = {
    "auto_mapping": "says which class PEFT would load",
    "ensure_weight_tying": "concerns embedding and head adapters only",
    "eva_config": "initialisation only; the trained weights are in the file",
    "corda_config": "initialisation only; without init_lora_weights=corda it has no effect",
    "lora_ga_config": "initialisation only; without init_lora_weights=lora_ga it has no effect",
    "inference_mode": "training only",
    "loftq_config": "initialisation only; without init_lora_weights=loftq it has no effect",
    "lora_dropout": "training only",
    "megatron_core": "module path; without megatron_config it has no effect",
    "peft_version": "the version that wrote the file",
    "qalora_group_size": "without use_qalora it has no effect",
    "revision": "revision of the base model; compare it with the one served",
    "runtime_config": "how PEFT places its computation",
}
"""Keys that never change what this server computes, with the reason."""

_TRAIN_WITHOUT = "train the adapter without it"

REFUSED_UNLESS_OFF = {
    "alora_invocation_tokens": (
        "activated LoRA applies the adapter to a part of the prompt only",
        "train a plain LoRA adapter",
    ),
    "arrow_config": ("Arrow routes between several adapters", "upload each adapter by itself"),
    "bias": (
        "trained bias terms are not served",
        "train with bias='none'",
    ),
    "fan_in_fan_out": (
        "transposed weights do not occur in the families served",
        "set it to false and save lora_A as [r, in_features]",
    ),
    "kasa_config": ("KaSA changes the base weights", _TRAIN_WITHOUT),
    "layer_replication": (
        "the adapter was trained on a base with repeated layers",
        "serve a base with these layers, or train on the base as it is",
    ),
    "lora_bias": ("a bias of lora_B is not served", "train with lora_bias=False"),
    "megatron_config": ("Megatron's parallel layers are not served", _TRAIN_WITHOUT),
    "modules_to_save": (
        "fully trained copies of modules are not served",
        "train LoRA on the attention and MLP projections only",
    ),
    "monteclora_config": ("MonteCLoRA samples its weights", _TRAIN_WITHOUT),
    "target_parameters": (
        "LoRA on bare parameters (mixture-of-experts weights) is not served",
        "target linear layers with target_modules",
    ),
    "trainable_token_indices": (
        "trained token embeddings are not served",
        "train without new or retrained tokens",
    ),
    "use_bdlora": ("block-diagonal LoRA stores its factors in another shape", _TRAIN_WITHOUT),
    "use_dora": (
        "DoRA needs a gain for each output that is not served",
        "train with use_dora=False",
    ),
    "use_qalora": ("QA-LoRA pools the inputs of lora_A", _TRAIN_WITHOUT),
    "velora_config": ("VeLoRA keeps further tensors beside lora_A and lora_B", _TRAIN_WITHOUT),
}
"""Keys that change the arithmetic in a way that is not served: (why, what to do)."""

PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights that leave the base weights as they are."""

BASE_ALTERING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of values of init_lora_weights that subtract from or quantise the base weights."""
