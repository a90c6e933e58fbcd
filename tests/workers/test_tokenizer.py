"""Prompts and messages become the token IDs of the model's own tokenizer."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from openlora.bench.pipeline_model import write_tokenizer
from openlora.errors import InvalidRequest, SetupError
from openlora.protocol.jobs import Message
from tests.workers.running import a_job
from workers.tokenizer import PromptTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return PromptTokenizer(str(write_tokenizer(tmp_path_factory.mktemp("model"))))


def test_a_prompt_is_taken_as_it_is(tokenizer):
    token_ids = tokenizer.encode(a_job(prompt="héllo"))
    assert tokenizer.backend.decode(token_ids) == "héllo"


def test_what_the_library_cannot_read_is_an_error_of_the_request(tokenizer):
    unknown = Tokenizer(BPE({"a": 0}, [], unk_token="<nowhere>"))
    panics = Tokenizer(BPE({"a": 0}, []))
    panics.post_processor = TemplateProcessing(single="$B", pair="$A $B", special_tokens=[])
    for backend in (unknown, panics):
        with pytest.raises(InvalidRequest, match="the tokenizer cannot read the text"):
            tokenizer.with_backend(backend).encode(a_job(prompt="ab"))


def test_messages_are_rendered_with_the_answer_open(tokenizer):
    job = a_job(prompt=None, messages=(Message("system", "be brief"), Message("user", "hi")))
    text = tokenizer.backend.decode(tokenizer.encode(job))
    assert text == "<system>be brief<user>hi<assistant>"


def test_without_a_chat_template_messages_are_an_error(tmp_path):
    tokenizer = PromptTokenizer(str(write_tokenizer(tmp_path, chat=False)))
    with pytest.raises(InvalidRequest, match="no chat template; send prompt"):
        tokenizer.encode(a_job(prompt=None, messages=(Message("user", "hi"),)))
    assert tokenizer.encode(a_job(prompt="hi"))


def test_a_directory_without_a_tokenizer_is_one_clear_error(tmp_path):
    with pytest.raises(SetupError, match="no usable tokenizer in"):
        PromptTokenizer(str(tmp_path))


def test_the_io_process_imports_no_torch(tmp_path):
    code = (
        "import sys, workers.lifecycle; from workers.tokenizer import PromptTokenizer;"
        f"PromptTokenizer({str(write_tokenizer(tmp_path))!r});"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
