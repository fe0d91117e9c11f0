"""What the scheduler does for a Drop: it waits, holds back, frees, and answers once."""

from __future__ import annotations


def test_a_drop_waits_for_the_requests_that_were_live_then_and_holds_back_later_ones(
    simulate, image
):
    sim = simulate()
    sim.submit("before", max_tokens=4, adapter=image("a", 2))
    sim.step()
    sim.loader.finish()
    sim.step()
    sim.drop("a")
    sim.submit("after", max_tokens=2, adapter=image("a", 2))
    assert sim.step() == ["before"]
    assert sim.dropped == []
    sim.run()
    assert [(d.digest, d.freed_bytes) for d in sim.dropped] == [("a", 2 * sim.pool.page_bytes)]
    assert sim.tokens["after"] == sim.alone("after")
    assert sim.adapters.num_loads == 2


def test_a_drop_waits_for_waiting_requests_too(simulate, image):
    sim = simulate(max_num_seqs=1)
    sim.submit("running", max_tokens=6)
    sim.submit("waiting", adapter=image("a", 1))
    sim.step()
    sim.loader.finish()
    sim.step()
    sim.drop("a")
    assert sim.dropped == []
    sim.run()
    assert sim.adapters.num_loads == 1
    assert [d.freed_bytes for d in sim.dropped] == [sim.pool.page_bytes]


def test_an_aborting_drop_cancels_its_requests_and_frees_at_once(simulate, image):
    sim = simulate()
    sim.submit("running", adapter=image("a", 2))
    sim.step()
    sim.loader.finish()
    sim.step()
    sim.submit("waiting", adapter=image("a", 2))
    sim.drop("a", abort=True)
    assert {end.reason for end in sim.finished.values()} == {"cancelled"}
    assert sim.finished["running"].adapter_digest == "a"
    assert [d.freed_bytes for d in sim.dropped] == [2 * sim.pool.page_bytes]


def test_every_drop_is_answered_once_and_an_absent_adapter_frees_nothing(simulate, image):
    sim = simulate()
    sim.drop("absent")
    sim.submit("r", adapter=image("a", 1))
    sim.step()
    sim.drop("a")
    sim.drop("a", abort=True)
    assert len(sim.dropped) == 1, "pages of a load are its own until it has ended"
    sim.run()
    assert [d.freed_bytes for d in sim.dropped] == [0, 0, 0], "it never came to be resident"
    assert sim.pool.num_free == sim.pool.num_pages


def test_a_second_drop_waits_for_those_that_the_first_held_back(simulate, image):
    sim = simulate()
    sim.submit("before", max_tokens=8, adapter=image("a", 1))
    sim.step()
    sim.loader.finish()
    sim.step()
    sim.drop("a")
    sim.submit("after", max_tokens=2, adapter=image("a", 1))
    assert sim.step() == ["before"]
    sim.drop("a")
    assert sorted(sim.step()) == ["after", "before"]
    sim.run()
    assert [d.freed_bytes for d in sim.dropped] == [sim.pool.page_bytes, 0]
    assert sim.adapters.num_loads == 1
