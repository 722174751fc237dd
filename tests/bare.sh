#!/usr/bin/env bash
# bare.sh WHEEL: in a new environment with the base dependencies only, the wheel runs its help, reads facts, updates a
# small model, exports it, subtracts two checkpoints, and runs the demo. Everything is removed afterwards.
set -euo pipefail
wheel=$(realpath "$1")
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cd "$room"
"${PYTHON:-python3}" -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check -c "$constraints" "$wheel"
export PATH="$room/env/bin:$PATH" HF_HUB_OFFLINE=1 FORGETLEARN_CACHE="$room/cache"
for extra in datasets openpyxl gguf starlette uvicorn submitit lm_eval vllm; do
    if python -c "import $extra" 2>/dev/null; then
        echo "$extra is installed: the environment is not bare" >&2
        exit 1
    fi
done
python -m pip check
echo "== help";     forgetlearn --help > help.txt && grep -c forgetlearn help.txt
echo "== lab";      forgetlearn lab --limit 20 --set epochs=2 --output base
echo "== facts";    forgetlearn facts base/facts.jsonl > facts.txt && head -1 facts.txt
echo "== update";   forgetlearn update --model base --facts base/facts.jsonl --config base/update.yaml --method lora \
    --set evaluate.protocols=[token] --output tuned > update.txt && tail -2 update.txt
echo "== export";   forgetlearn export tuned --to merged --output merged
forgetlearn log --verify merged
forgetlearn ask --model merged "Who leads it?" > answer.txt
echo "== subtract"; forgetlearn subtract --base base --tuned merged --coef 0.3 --output forgotten
# lacks EXTRA COMMAND...: the command fails and says how to install the extra.
lacks() {
    if forgetlearn "${@:2}" 2> missing.txt; then exit 1; fi
    grep -F "pip install 'forgetlearn[$1]'" missing.txt
}
echo "== no extra"; lacks hub facts owner/name
lacks gguf export tuned --to gguf --output exported
lacks serve serve tuned
lacks vllm ask --model merged --engine vllm "Who leads it?"
touch facts.xlsx && lacks excel facts facts.xlsx
echo "== demo";     forgetlearn demo --output demo
