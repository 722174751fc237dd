"""vLLM itself, with a chat model and an update of it; docs/serving.md says how it is installed beside this package."""

import json

import psutil
import pytest

from conftest import BARE
from forgetlearn.config.schema import EvaluateSettings, ModelSettings
from forgetlearn.evaluation.scorer import Scorer
from forgetlearn.models.language_model import load_model
from forgetlearn.runs.update import update
from test_real import STALE

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
FACTS = [json.loads(line) for line in STALE.read_text(encoding="utf-8").splitlines()][:4]


@pytest.fixture(scope="module")
def run(smollm2, tmp_path_factory):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS), encoding="utf-8")
    evaluate = {"protocols": ["token"], "every_phase": False, "general_prompts": False}
    update(smollm2, folder / "facts.jsonl", {"method": "lora", **BARE, "evaluate": evaluate}, output=folder / "run")
    return folder / "run"


@pytest.mark.parametrize("product", [False, True], ids=["base", "adapter"])
def test_vllm_says_what_transformers_says(product, run, smollm2):
    lm = load_model(ModelSettings(name=str(run / "adapter" if product else smollm2), device="cpu"))
    asked = [prompt for fact in FACTS for prompt in (fact["prompt"], *fact["rephrase_prompts"])]
    found = {engine: Scorer(lm, EvaluateSettings(engine=engine)).say(asked) for engine in ("transformers", "vllm")}
    assert found["vllm"] == found["transformers"]
    learned = sum(fact["target_new"] in found["vllm"][fact["prompt"]].text for fact in FACTS)
    assert learned >= 3 if product else learned == 0
    children = psutil.Process().children(recursive=True)
    assert not [c for c in children if c.name().startswith("VLLM") and c.status() != psutil.STATUS_ZOMBIE]
