"""Messages come in whole and in order, batches go out, and a wait can be ended from anywhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import msgspec
import pytest
import zmq

from server.engine.mailbox import Mailbox
from server.engine.request import (
    AdapterImage,
    Cancel,
    Drop,
    Dropped,
    Finished,
    FromEngine,
    Load,
    Preload,
    ResidentAdapter,
    Sampling,
    Started,
    Submit,
    TokenEvent,
    TokenLogprobs,
)

IMAGE = AdapterImage(digest="d", path="/images/d")
TO_ENGINE = [
    Submit(
        request_id="a",
        prompt_token_ids=(1, 2, 2**31),
        sampling=Sampling(max_tokens=3, seed=2**63 - 1, stop_token_ids=(2,), num_logprobs=0),
        adapter=IMAGE,
    ),
    Cancel(request_id="a"),
    Preload(adapter=IMAGE),
    Drop(digest="d", abort=True),
]
FROM_ENGINE: list[FromEngine] = [
    Started(num_pages=1, page_bytes=2, num_slots=3, max_context=4),
    TokenEvent(
        request_id="a",
        token_ids=(5,),
        logprobs=(TokenLogprobs(-0.25, (5, 6), (-0.25, -1.5)),),
        adapter_digest="d",
    ),
    Finished(request_id="a", reason="error", error="no", error_code="internal_error"),
    Dropped(digest="d", freed_bytes=8),
    Load(
        num_running=1,
        num_waiting=2,
        num_free_pages=3,
        num_kv_pages=4,
        num_adapter_pages=5,
        num_steps=6,
        num_preemptions=7,
        num_adapter_loads=8,
        num_adapter_evictions=9,
        num_prompt_tokens=10,
        num_generated_tokens=11,
        adapters=(ResidentAdapter("d", "resident", 1, 0, 2),),
    ),
]


@pytest.fixture
def ends(tmp_path) -> Iterator[SimpleNamespace]:
    """A mailbox, and the API process' socket that it is connected to."""
    address = f"ipc://{tmp_path}/engine"
    api = zmq.Context.instance().socket(zmq.PAIR)
    api.setsockopt(zmq.LINGER, 0)
    api.setsockopt(zmq.RCVTIMEO, 10_000)
    api.setsockopt(zmq.SNDTIMEO, 10_000)
    api.bind(address)
    mailbox = Mailbox(address)
    yield SimpleNamespace(mailbox=mailbox, api=api)
    mailbox.close()
    api.close()


def tell(api, *messages) -> None:
    for message in messages:
        api.send(msgspec.msgpack.encode(message))


def received(mailbox, count: int) -> list:
    """`count` messages, however many waits they take."""
    messages = []
    for _ in range(20):
        messages += mailbox.receive(wait=True)
        if len(messages) >= count:
            return messages
    raise AssertionError(f"only {messages} came")


def test_every_message_to_the_engine_arrives_equal_and_in_order(ends):
    tell(ends.api, *TO_ENGINE)
    assert received(ends.mailbox, len(TO_ENGINE)) == TO_ENGINE


def test_every_message_from_the_engine_arrives_equal_in_one_batch(ends):
    ends.mailbox.send(FROM_ENGINE)
    assert msgspec.msgpack.decode(ends.api.recv(), type=list[FromEngine]) == FROM_ENGINE


def test_an_empty_batch_is_not_sent(ends):
    ends.mailbox.send([])
    ends.mailbox.send(FROM_ENGINE[:1])
    assert msgspec.msgpack.decode(ends.api.recv(), type=list[FromEngine]) == FROM_ENGINE[:1]


def test_without_waiting_nothing_is_nothing(ends):
    assert ends.mailbox.receive(wait=False) == []


def test_a_wait_ends_at_a_message_and_takes_all_that_have_come(ends):
    ends.mailbox.send(FROM_ENGINE[:1])
    ends.api.recv()  # connected now
    tell(ends.api, *[Cancel(request_id=str(n)) for n in range(500)])
    assert [m.request_id for m in received(ends.mailbox, 500)] == [str(n) for n in range(500)]


def test_a_wait_without_messages_ends_by_itself(ends, monkeypatch):
    monkeypatch.setattr("server.engine.mailbox.POLL_MILLISECONDS", 20)
    assert ends.mailbox.receive(wait=True) == []


def test_another_thread_ends_a_wait(ends, monkeypatch):
    monkeypatch.setattr("server.engine.mailbox.POLL_MILLISECONDS", 60_000)
    thread = threading.Thread(target=ends.mailbox.wake)
    thread.start()
    assert ends.mailbox.receive(wait=True) == []
    thread.join()


def test_wakes_never_block_and_end_one_wait_each_at_most(ends, monkeypatch):
    for _ in range(100_000):
        ends.mailbox.wake()
    waits = 0
    monkeypatch.setattr("server.engine.mailbox.POLL_MILLISECONDS", 5)
    while ends.mailbox._poller.poll(0):
        ends.mailbox.receive(wait=True)
        waits += 1
        assert waits < 100
    assert ends.mailbox.receive(wait=True) == []


def test_sending_never_blocks_when_nobody_listens(tmp_path):
    mailbox = Mailbox(f"ipc://{tmp_path}/nobody")
    mailbox._socket.setsockopt(zmq.LINGER, 0)
    mailbox._socket.setsockopt(zmq.SNDTIMEO, 1000)  # the test fails instead of hanging
    for _ in range(3000):
        mailbox.send(FROM_ENGINE)
    mailbox.close()
