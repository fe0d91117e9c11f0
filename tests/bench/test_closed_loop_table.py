"""The stated bars are judged from the figures of the cases that they name."""

from __future__ import annotations

import pytest

from bench.closed_loop_table import bars, table


def spread(value):
    return {"median": value, "p10": value, "p90": value}


def row(concurrency, case, kept, share=0.5):
    latencies = {
        f"{kind}_{p}_seconds": spread(0.05)
        for kind in ("first_token", "inter_token")
        for p in ("p50", "p99")
    }
    return {
        "concurrency": concurrency,
        "case": case,
        "retention": spread(kept),
        "retention_roof": 0.97,
        "share_of_roof": share,
        "output_tokens_per_second": spread(300.0),
        "total_tokens_per_second": spread(900.0),
        **latencies,
    }


def numbers(*rows, idle=1.0, ratio=2.0):
    return {
        "rows": list(rows),
        "idle_adapters": {"ratio": spread(idle)},
        "long_prompt": {"ratio": ratio},
    }


@pytest.mark.parametrize(
    ("case", "kept", "holds"),
    [
        ("8 x r16", 0.92, True),
        ("8 x r16", 0.91, False),
        ("32 x r16", 0.85, True),
        ("32 x r16", 0.84, False),
        ("64 mixed", 0.75, True),
        ("64 mixed", 0.74, False),
    ],
)
def test_retention_is_judged_at_32_clients(case, kept, holds):
    found = bars(numbers(row(32, case, kept), row(8, case, 0.1)))
    assert [(bar["bar"], bar["holds"]) for bar in found][:-2] == [
        (f"{case} at 32, retention", holds)
    ]


def test_the_base_is_judged_by_its_share_of_the_roof_at_8_and_32():
    found = bars(numbers(row(1, "base", 1, 0.1), row(8, "base", 1, 0.75), row(32, "base", 1, 0.7)))
    assert [(bar["bar"], bar["holds"]) for bar in found][:-2] == [
        ("base at 8, share of the roof", True),
        ("base at 32, share of the roof", False),
    ]


@pytest.mark.parametrize(
    ("idle", "ratio", "hold"), [(0.99, 2.5, [True] * 2), (0.98, 2.6, [False] * 2)]
)
def test_idle_adapters_and_the_long_prompt_are_always_judged(idle, ratio, hold):
    assert [bar["holds"] for bar in bars(numbers(idle=idle, ratio=ratio))] == hold


def test_the_table_has_a_line_for_each_case_and_each_bar():
    shown = numbers(row(32, "base", 1.0), row(32, "32 x r16", 0.8))
    lines = table(shown | {"bars": bars(shown)}).splitlines()
    assert len(lines) == 1 + 2 + 4
    assert "32 x r16" in lines[2]
    assert lines[4] == "32 x r16 at 32, retention: 0.800, at least 0.85: MISSED"
    assert lines[-1].endswith("2.000, at most 2.5: holds")
