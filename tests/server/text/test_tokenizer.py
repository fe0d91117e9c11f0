"""What the tokenizer promises."""

from __future__ import annotations

import copy

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from server.errors import InvalidRequest
from server.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "the cat"}


def test_encodes_a_prompt_as_transformers_does(tokenizer, byte_level_hf):
    assert tokenizer.encode("the cat Grüße") == byte_level_hf("the cat Grüße").input_ids


def test_encodes_a_conversation_as_the_chat_template_writes_it(tokenizer, byte_level_hf):
    expected = byte_level_hf.apply_chat_template(
        [USER], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.encode_chat([USER]) == expected
    assert tokenizer.render([USER]) == "<|start|>user\nthe cat<|end|>\n<|start|>assistant\n"


def test_a_template_that_refuses_the_messages_is_a_bad_request_with_its_words(tokenizer):
    with pytest.raises(InvalidRequest, match="begin with a user") as caught:
        tokenizer.encode_chat([{"role": "assistant", "content": "hello"}])
    assert caught.value.param == "messages"
    assert caught.value.code == "chat_template_error"


def test_a_model_without_chat_template_is_a_bad_request_that_names_the_other_route(
    byte_fallback_hf,
):
    with pytest.raises(InvalidRequest, match="/v1/completions") as caught:
        Tokenizer(byte_fallback_hf).encode_chat([USER])
    assert caught.value.code == "no_chat_template"


def test_the_models_end_tokens_replace_the_tokenizers_own(byte_level_hf):
    assert Tokenizer(byte_level_hf).eos_token_ids == (byte_level_hf.eos_token_id,)
    assert Tokenizer(byte_level_hf, [5, 6]).eos_token_ids == (5, 6)


@pytest.mark.parametrize("kind", ["byte_level_hf", "byte_fallback_hf"])
def test_bytes_of_every_token_are_what_it_adds_to_a_text(kind, request):
    hf = request.getfixturevalue(kind)
    tokenizer = Tokenizer(hf)
    before = hf.convert_tokens_to_ids("a")
    for token_id in range(len(hf)):
        whole = hf.decode([before, token_id], skip_special_tokens=True)
        assert "a" + tokenizer.token_bytes(token_id).decode(errors="replace") == whole


def test_unknown_token_ids_add_nothing(tokenizer):
    assert tokenizer.token_bytes(10**6) == b""


def test_token_texts_name_special_tokens_and_spell_parts_of_characters(tokenizer, byte_level_hf):
    assert tokenizer.token_text(byte_level_hf.eos_token_id) == "<|end|>"
    part = next(i for i in range(320) if tokenizer.token_bytes(i) == b"\xf0")
    assert tokenizer.token_text(part) == "bytes:\\xf0"


def test_a_tokenizer_of_an_unknown_kind_is_refused_by_name():
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_truncation_saved_with_a_tokenizer_does_not_cut_prompts(byte_level_hf):
    hf = copy.deepcopy(byte_level_hf)
    hf.backend_tokenizer.enable_truncation(2)
    assert len(Tokenizer(hf).encode("the cat sat on the mat")) > 2
