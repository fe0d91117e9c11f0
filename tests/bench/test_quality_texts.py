"""The texts are cut without losing tokens, and of conversations only the answers are predicted."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from adapters_store.shipped.behaviours import BEHAVIOURS
from bench.quality_texts import ROOT, answer_text, conversations, papers, prompt_ids
from bench.tiny_model import write_tiny_model

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def bytes_(tmp_path_factory):
    """A tokenizer whose tokens are the bytes, without a chat template."""
    return AutoTokenizer.from_pretrained(write_tiny_model(tmp_path_factory.mktemp("m") / "tiny"))


@pytest.fixture(scope="module")
def chat(bytes_, tmp_path_factory):
    """The same with a chat template."""
    directory = tmp_path_factory.mktemp("chat")
    bytes_.save_pretrained(directory)
    found = AutoTokenizer.from_pretrained(directory)
    found.chat_template = TEMPLATE
    return found


def test_papers_are_read_whole_and_window_by_window(bytes_):
    samples = papers(bytes_, window=100)
    assert all(2 <= len(sample.token_ids) <= 100 and sample.first == 1 for sample in samples)
    num_bytes = sum(
        len((ROOT / name).read_bytes()) for name in ("README.md", "ARCHITECTURE.md", "LICENSE")
    )
    num_bytes += sum(len(path.read_bytes()) for path in (ROOT / "docs").glob("*.md"))
    lost = num_bytes - sum(len(sample.token_ids) for sample in samples)
    assert 0 <= lost < 20  # a single byte at the end of a paper predicts nothing
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert bytes_.decode(samples[0].token_ids) == readme.encode()[:100].decode()


@pytest.mark.parametrize("name", [None, *BEHAVIOURS])
def test_every_conversation_predicts_its_answer_and_its_end(chat, name):
    samples = conversations(chat, name)
    assert len(samples) > 100
    for sample in samples:
        before = chat.decode(sample.token_ids[: sample.first])
        assert before.endswith("[assistant]")
        assert sample.token_ids[-1] == chat.eos_token_id
        assert len(sample.token_ids) - sample.first >= 2


def test_held_out_answers_are_among_an_adapters_conversations(chat):
    answers = {
        answer_text(chat, sample.token_ids[sample.first :])
        for sample in conversations(chat, "json")
    }
    assert '{"answer": "The capital of France is Paris."}' in answers


def test_prompts_have_the_templates_form_or_a_line_of_their_own(bytes_, chat):
    assert chat.decode(prompt_ids(chat, "Hi")) == "[user]Hi[assistant]"
    assert (
        chat.decode(prompt_ids(chat, "Hi", "Be brief.")) == "[system]Be brief.[user]Hi[assistant]"
    )
    assert bytes_.decode(prompt_ids(bytes_, "Hi")) == "Hi\n"


def test_an_answer_ends_at_its_end_token(bytes_):
    ids = prompt_ids(bytes_, "Yes.")
    assert answer_text(bytes_, ids) == "Yes.\n"
    assert answer_text(bytes_, [*ids, bytes_.eos_token_id, *ids]) == "Yes.\n"
