"""What only a model that people use can show. `make models` fetches it."""

import pytest

from forgetlearn.runs.evaluate import ask

pytestmark = pytest.mark.real


def test_smoke_a_chat_model_answers_in_its_own_words(smollm2):
    question = "What is the capital of France?"
    assert "Paris" in ask([question], smollm2)[question]
