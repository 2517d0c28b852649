import factories
import pytest

from gkdjax.data.chat_template import load_chat


@pytest.fixture(scope="session")
def chat(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    factories.tokenizer().save_pretrained(directory)
    return load_chat(directory)
