"""The record and its tables."""

from collections.abc import Iterator, Sequence

from bench.rivals.environments import ROOT, RivalError
from bench.rivals.rival import Launch
from bench.rivals.run import Measured, measure, record
from bench.rivals.table import markdown
from bench.rivals.workload import Case, Trace, Workload

WORKLOAD = Workload(num_prompt=4, num_output=2, waves=1)


class Scripted:
    """A rival whose tokens come at given intervals, or that fails."""

    settings = "its best"

    def __init__(self, name, seconds):
        self.name = self.title = name
        self._seconds = seconds

    def problem(self):
        return None

    def versions(self):
        return {self.name: "1.0"}

    def launches(self, cases: Sequence[Case]):
        return [Launch("", tuple(cases), 1, (f"{ROOT}/bin/{self.name}", "{port}"))]

    def measure(self, launch, workload) -> Iterator[tuple[Case, list[Trace]]]:
        if not self._seconds:
            raise RivalError(f"it did not start: see {ROOT}/log")
        for case in launch.cases:
            arrivals = (self._seconds, 2 * self._seconds)
            yield case, [Trace(0.0, arrivals, 2)] * case.concurrency


def measured_record(*rivals):
    cases, measured = [Case(1, 0), Case(2, 0), Case(2, 1)], Measured()
    for _ in range(2):
        for rival in rivals:
            for launch in rival.launches(cases):
                measure(rival, launch, WORKLOAD, measured)
    return record(list(rivals), cases, measured)


def test_rates_and_ratios_stand_by_requests_in_flight():
    text = markdown(measured_record(Scripted("manylora", 0.01), Scripted("slow", 0.02)))
    assert "| manylora | base only | 100 | 200 |" in text
    assert "| slow | base only | 50 | 100 |" in text
    assert "| slow | 1 |  | 100 |" in text
    assert "| slow | base only | 2.00 | 2.00 |" in text
    assert "| slow | 1 | 2 | 20 | 20 | 20 |" in text


def test_our_most_adapters_are_held_against_the_fewer_of_others():
    def row(rival, adapters, rate):
        figures = dict.fromkeys(("ttft_p50_ms", "inter_token_p50_ms", "inter_token_p99_ms"), 1)
        told = {key: {"median": number} for key, number in figures.items()}
        told["output_tokens_per_second"] = {"median": rate}
        return {"rival": rival, "variant": "", "adapters": adapters, "concurrency": 32, **told}

    rows = [row("manylora", 8, 90.0), row("manylora", 32, 80.0), row("slow", 8, 20.0)]
    titles = {name: {"title": name} for name in ("manylora", "slow")}
    text = markdown({"rows": rows, "rivals": titles, "failures": []})
    assert "| slow | 8 | 4.50 |" in text
    assert "| slow | 8 | 4.00 |" in text


def test_a_failure_is_told_and_the_others_go_on():
    numbers = measured_record(Scripted("broken", None), Scripted("slow", 0.02))
    assert numbers["failures"] == ["broken : it did not start: see log"] * 2
    assert {row["rival"] for row in numbers["rows"]} == {"slow"}
    assert "Failed: broken : it did not start: see log" in markdown(numbers)


def test_the_record_has_commands_and_versions_but_no_path_of_this_machine():
    numbers = measured_record(Scripted("slow", 0.02))
    assert numbers["rivals"]["slow"]["launches"][0]["command"] == ["bin/slow", "{port}"]
    assert numbers["rivals"]["slow"]["versions"] == {"slow": "1.0"}
    assert str(ROOT) not in repr(numbers)
