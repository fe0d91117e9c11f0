"""The requests are the same for every rival, and the figures are made of their times."""

import pytest

from bench.rivals.workload import MIN_REQUESTS, Case, Trace, Workload, figures

WORKLOAD = Workload(num_prompt=8, num_output=3, waves=2)


def test_the_same_prompts_are_asked_every_time_and_none_twice():
    case = Case(concurrency=8, num_adapters=0)
    prompts = WORKLOAD.prompts(case)
    assert prompts == WORKLOAD.prompts(case)
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts) == 16
    assert {len(prompt) for prompt in prompts} == {8}
    assert all(type(token) is int for prompt in prompts for token in prompt)


def test_requests_take_the_adapters_in_turn():
    assert WORKLOAD.adapters(Case(4, 3)) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert WORKLOAD.adapters(Case(2, 0)) == [None] * 4


def test_one_stream_alone_is_timed_over_several_requests():
    assert WORKLOAD.num_requests(Case(1, 0)) == MIN_REQUESTS


def test_figures_of_known_times():
    traces = [
        Trace(sent=10.0, arrivals=(10.1, 10.2, 10.4), num_tokens=3),
        Trace(sent=10.0, arrivals=(10.3, 10.4, 11.0), num_tokens=3),
    ]
    found = figures(traces, WORKLOAD)
    assert found["output_tokens_per_second"] == pytest.approx(6.0)
    assert found["ttft_p50_ms"] == pytest.approx(200.0)
    assert found["inter_token_p50_ms"] == pytest.approx(150.0)
    assert found["inter_token_p99_ms"] == pytest.approx(588.0)


def test_a_token_that_came_with_another_counts_for_the_rate():
    found = figures([Trace(sent=0.0, arrivals=(0.5, 1.0), num_tokens=3)], WORKLOAD)
    assert found["output_tokens_per_second"] == pytest.approx(3.0)


def test_an_answer_that_ended_early_has_no_figures():
    with pytest.raises(ValueError, match=r"answers of \[2\] tokens where 3 were asked for"):
        figures([Trace(0.0, (0.5, 1.0), 2)], WORKLOAD)
