"""Images hold exactly what PEFT applies: adapters that PEFT made, against PEFT's own deltas."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters_store.checking import check_adapter
from adapters_store.layout import TARGET_PATHS
from kernels.layout import AdapterIndex, RankRows, TargetSpan, aligned
from kernels.reference import add_adapters

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT asks transformers for a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

ALL_TARGETS = list(TARGET_PATHS)
CASES = {
    "target list": {"target_modules": ["q_proj", "v_proj"]},
    "rank stabilised": {"target_modules": ALL_TARGETS, "use_rslora": True, "lora_alpha": 7},
    "all-linear": {"target_modules": "all-linear", "r": 3},
    "regular expression": {"target_modules": r".*layers\.[02]\.(self_attn\.o|mlp\.up)_proj"},
    "full names": {"target_modules": ["model.layers.1.mlp.gate_proj", "k_proj"]},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer of a pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "excluded modules": {"target_modules": ALL_TARGETS, "exclude_modules": ["down_proj"]},
    "excluded by expression": {
        "target_modules": ["q_proj"],
        "exclude_modules": r"model\.layers\.0\..*",
    },
    "rank and alpha patterns": {
        "target_modules": ALL_TARGETS,
        "rank_pattern": {"q_proj": 1, r"layers\.1\.mlp\.(up|gate)_proj": 6, "mlp.up_proj": 9},
        "alpha_pattern": {r"^model\.layers\.0\..*": 5, "o_proj": 32},
    },
    "rank stabilised patterns": {
        "target_modules": ["o_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"down_proj": 17},
        "alpha_pattern": {"down_proj": 3},
    },
}


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )
    return transformers.LlamaForCausalLM(config)


def save_adapter(base, directory, settings):
    """Let PEFT write an adapter with random weights."""
    lora = peft.LoraConfig(
        **{"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False, **settings}
    )
    model = peft.get_peft_model(base, lora)
    model.save_pretrained(directory)
    model.unload()


def peft_deltas(base, directory):
    """What PEFT would add to each weight when it reads the directory, computed by PEFT in fp32."""
    model = peft.PeftModel.from_pretrained(base, directory)
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in module.scaling
    }
    model.unload()
    return deltas


def image_deltas(path, layout):
    """Σ scaleᵢ bᵢ aᵢᵀ of each module with rows, read with safetensors' own reader."""
    with safe_open(path, "pt") as image:
        flat = image.get_tensor("pages").flatten().double()
        ptr, offset, scale = (image.get_tensor(n) for n in ("row_ptr", "row_offset", "row_scale"))
    assert ptr.dtype == torch.int32
    assert offset.dtype == torch.int64
    assert scale.dtype == torch.float32
    deltas = {}
    for place in range(layout.num_layers * len(layout.targets)):
        layer, t = divmod(place, len(layout.targets))
        target = layout.targets[t]
        for row in range(ptr[place], ptr[place + 1]):
            a = flat[offset[row] :][: target.in_features]
            b = flat[offset[row] + aligned(target.in_features) :][: target.out_features]
            name = f"model.layers.{layer}.{TARGET_PATHS[target.name]}"
            deltas[name] = deltas.get(name, 0) + scale[row].double() * torch.outer(b, a)
    return deltas


def assert_same_deltas(found, wanted, relative):
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(
            found[name], delta.double(), rtol=0, atol=relative * delta.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_image_equals_the_delta_that_peft_applies(base, layout, tmp_path, settings):
    save_adapter(base, tmp_path, settings)
    report = check_adapter(tmp_path, layout, max_rank=64, image_path=tmp_path / "image")
    assert report.problems == ()
    assert_same_deltas(image_deltas(tmp_path / "image", layout), peft_deltas(base, tmp_path), 1e-6)


@pytest.mark.parametrize("packed", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_image_equals_peft_for_every_pair_of_types(base, make_layout, tmp_path, saved, packed):
    save_adapter(base, tmp_path, CASES["rank and alpha patterns"])
    weights = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.to(saved) for name, tensor in load_file(weights).items()}, weights)
    layout = make_layout(packed)
    report = check_adapter(tmp_path, layout, max_rank=64, image_path=tmp_path / "image")
    assert report.problems == ()
    exact = packed == "float32" or saved == getattr(torch, packed)
    relative = 1e-6 if exact else {"bfloat16": 2**-7, "float16": 2**-9}[packed]
    assert_same_deltas(
        image_deltas(tmp_path / "image", layout), peft_deltas(base, tmp_path), relative
    )


@pytest.mark.parametrize("packed", ["bfloat16", "float16"])
def test_rows_are_rounded_as_torch_rounds(make_layout, make_adapter, tmp_path, packed):
    layout = make_layout(packed)
    adapter = make_adapter(layout, ("q_proj",), rank=2, seed=3)
    adapter.write(tmp_path)
    check_adapter(tmp_path, layout, max_rank=64, image_path=tmp_path / "image")
    with safe_open(tmp_path / "image", "pt") as image:
        flat = image.get_tensor("pages").flatten()
        offset = image.get_tensor("row_offset")
        assert image.metadata()["layout"] == layout.key
    a = torch.from_numpy(adapter.tensors[f"{adapter.key(0, 'q_proj')}.lora_A.weight"])
    assert torch.equal(flat[offset[1] :][: a.shape[1]], a[1].to(getattr(torch, packed)))


def test_the_kernels_reference_computes_the_delta_from_the_image(base, layout, tmp_path):
    save_adapter(base, tmp_path, CASES["rank stabilised patterns"])
    check_adapter(tmp_path, layout, max_rank=64, image_path=tmp_path / "image")
    image = load_file(tmp_path / "image")
    deltas = peft_deltas(base, tmp_path)
    rows = RankRows(*(image[n][None] for n in ("row_ptr", "row_offset", "row_scale")))
    index = AdapterIndex(
        token_slot=torch.tensor([-1, 0, 0], dtype=torch.int32),
        segment_start=torch.tensor([1, 3], dtype=torch.int32),
        segment_slot=torch.tensor([0], dtype=torch.int32),
        num_base=1,
        max_segment=2,
        max_span_rows=17,
    )
    for layer in range(layout.num_layers):
        for t, target in enumerate(layout.targets):
            x, out = torch.randn(3, target.in_features), torch.zeros(3, target.out_features)
            span = TargetSpan(layer * len(layout.targets) + t, (0, target.out_features))
            add_adapters(out, x, image["pages"], rows, index, span)
            delta = deltas.get(f"model.layers.{layer}.{TARGET_PATHS[target.name]}")
            wanted = torch.zeros_like(out) if delta is None else x @ delta.T
            assert not out[0].any()
            torch.testing.assert_close(out[1:], wanted[1:])
