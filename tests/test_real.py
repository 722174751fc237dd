"""What only a model that people use can show. `make models` fetches it."""

from pathlib import Path

import pytest

import forgetlearn
from forgetlearn.runs.evaluate import ask
from forgetlearn.runs.update import update

pytestmark = pytest.mark.real
STALE = Path(forgetlearn.__file__).parent / "lab" / "stale_facts.jsonl"


def test_smoke_a_chat_model_answers_in_its_own_words(smollm2):
    question = "What is the capital of France?"
    assert "Paris" in ask([question], smollm2)[question]


def test_the_defaults_teach_a_chat_model_and_leave_the_rest(smollm2, tmp_path):
    result = update(smollm2, STALE, output=tmp_path / "run")
    scores, prompts = result.summary.phases["updated"], result.summary.general["updated"].prompts
    assert scores["reliability"]["contains"].mean == 100  # measured: 100 / 83.3, and 96.4 / 0.012
    assert scores["generality"]["contains"].mean >= 65
    assert prompts.agreement >= 92
    assert prompts.kl <= 0.04
    question = "What is the capital of France?"
    assert "Paris" in ask([question], result.product)[question]
