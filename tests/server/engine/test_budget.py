"""The budget of a step: prompts and decodes share it, and context has its price."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from server.engine.budget import LEAST_SHARE, Budget


@dataclass
class Item:
    start: int
    num_tokens: int


def test_a_long_prompt_shares_a_step_as_if_it_decoded_too():
    budget = Budget(512)
    assert budget.piece(num_decodes=0, num_long=1) == 512
    assert budget.piece(num_decodes=3, num_long=1) == 128
    assert budget.piece(num_decodes=3, num_long=2) == 64


def test_a_long_prompt_beside_many_decodes_gets_its_least_share():
    assert Budget(512).piece(num_decodes=100, num_long=1) == 512 // LEAST_SHARE
    assert Budget(2).piece(num_decodes=100, num_long=9) == 1


def test_a_prompt_that_one_step_holds_is_not_long():
    assert not Budget(512).is_long(512)
    assert Budget(512).is_long(513)


@given(
    context=st.integers(0, 100_000), budget=st.integers(1, 4096), attention=st.integers(1, 50_000)
)
def test_a_chunk_costs_no_more_than_what_it_was_given_for(context, budget, attention):
    counted = Budget(4096, attention)
    num_tokens = counted.affordable(context, budget)
    assert num_tokens >= 1
    if num_tokens > 1:
        assert counted.cost(Item(context, num_tokens)) <= budget


def test_a_token_behind_a_long_context_costs_more():
    counted = Budget(512, attention_context=1000)
    assert counted.affordable(0, 512) == 512
    assert counted.affordable(1000, 512) == 256
    assert counted.cost(Item(3000, 10)) == 40
    assert counted.cost(Item(3000, 1)) == 1  # a decode


def test_without_an_attention_context_all_tokens_cost_alike():
    assert Budget(512).affordable(100_000, 512) == 512
    assert Budget(512).cost(Item(100_000, 512)) == 512
