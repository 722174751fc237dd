"""Compare `forgetlearn subtract` with other ways to compute theta - coef * (tuned - theta) from folder to folder.

Makes a random Llama checkpoint (bfloat16, sharded), a tuned copy and a LoRA adapter under --scratch. Then runs every
way in turn, each in a fresh process, and measures wall and CPU seconds and peak resident memory. The last line is the
CPU seconds of loading both models with transformers, divided by those of forgetlearn. If the disk is slow, put
--scratch in memory.

    python bench/arithmetic.py --scratch /dev/shm/arithmetic [--mergekit VENV/bin/mergekit-yaml] [--layers 22]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COEF = 0.3
HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS, VOCABULARY = 2048, 5632, 32, 16, 32000
TILE = 1 << 22  # random numbers that are drawn; the weights repeat them


def names_and_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that LlamaForCausalLM stores, in its order."""
    keys = HIDDEN * KEY_HEADS // HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found |= {
            f"{at}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{at}.self_attn.k_proj.weight": (keys, HIDDEN),
            f"{at}.self_attn.v_proj.weight": (keys, HIDDEN),
            f"{at}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{at}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{at}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{at}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{at}.input_layernorm.weight": (HIDDEN,),
            f"{at}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make(scratch: Path, layers: int, shards: int) -> int:
    """Write the three folders, and return the number of parameters."""
    import numpy as np

    from forgetlearn.weights.rounding import Scratch, narrow, widen

    shapes = names_and_shapes(layers)
    total = sum(math.prod(shape) for shape in shapes.values())
    rng = np.random.default_rng(0)
    base = (0.02 * rng.standard_normal(TILE)).astype(np.float32)
    tuned = np.empty_like(base)
    raws = [np.empty(2 * TILE, np.uint8) for _ in range(2)]
    narrow(base, "BF16", raws[0], Scratch())
    widen(raws[0], "BF16", tuned)
    narrow(tuned + (1e-3 * rng.standard_normal(TILE)).astype(np.float32), "BF16", raws[1], Scratch())
    for name, raw in zip(("base", "tuned"), raws, strict=True):
        write_checkpoint(scratch / name, shapes, raw, shards, layers)
    write_adapter(scratch / "adapter", shapes, rng)
    return total


def write_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]], raw: Any, shards: int, layers: int) -> None:
    from forgetlearn.weights.checkpoint_folder import Entry, header_bytes

    folder.mkdir(parents=True)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total, seen, files = sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        files[name] = f"model-{min(shards, 1 + seen * shards // total):05}-of-{shards:05}.safetensors"
        seen += size
    for file in sorted(set(files.values())):
        inside = [name for name in shapes if files[name] == file]
        entries = [Entry(name, "BF16", shapes[name], file, 0, 2 * sizes[name]) for name in inside]
        with (folder / file).open("wb") as stream:
            stream.write(header_bytes(entries, {"format": "pt"}, dict.fromkeys(inside, "BF16")))
            for name in inside:
                for start in range(0, sizes[name], TILE):
                    stream.write(raw[: 2 * min(TILE, sizes[name] - start)])
    index = {"metadata": {"total_size": 2 * total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], rng: Any, rank: int = 8) -> None:
    """Write a LoRA adapter with r = 8 on all linear layers."""
    from forgetlearn.weights.checkpoint_folder import Entry, header_bytes

    folder.mkdir()
    tensors = {}
    for name, shape in shapes.items():
        if "_proj" in name:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = rng.standard_normal((rank, shape[1]), dtype="float32")
            tensors[f"{path}.lora_B.weight"] = 1e-3 * rng.standard_normal((shape[0], rank), dtype="float32")
    entries = [Entry(name, "F32", value.shape, "", 0, value.nbytes) for name, value in tensors.items()]
    with (folder / "adapter_model.safetensors").open("wb") as stream:
        stream.write(header_bytes(entries, {"format": "pt"}, dict.fromkeys(tensors, "F32")))
        for value in tensors.values():
            stream.write(value.tobytes())
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))


TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads({threads})
folders = [sys.argv[1] + "/base", sys.argv[1] + "/tuned"]
base, tuned = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in folders)
with torch.no_grad():
    for weight, other in zip(base.parameters(), tuned.parameters(), strict=True):
        start = weight.float()
        weight.copy_(start - {coef} * (other.float() - start))
base.save_pretrained(sys.argv[2], max_shard_size="500MB")
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads({threads})
base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base", dtype="auto")
model = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter").merge_and_unload()
model.save_pretrained(sys.argv[2], max_shard_size="500MB")
"""
READ = """
import sys
buffer = bytearray(1 << 20)
for path in sys.argv[1:]:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
"""


@dataclass
class Side:
    """One way, and its time and memory in every round."""

    command: Callable[[Path, Path], list[list[str]]]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    inside: list[float] = field(default_factory=list)
    synced: list[float] = field(default_factory=list)

    def run(self, scratch: Path, log: Path) -> None:
        """Run one round, and delete the output."""
        out = scratch / "out"
        wall = cpu = 0.0
        for command in self.command(scratch, out):
            with log.open("wb") as stream:
                start = time.perf_counter()
                process = os.posix_spawn(
                    command[0],
                    command,
                    os.environ,
                    file_actions=[(os.POSIX_SPAWN_DUP2, stream.fileno(), 1), (os.POSIX_SPAWN_DUP2, stream.fileno(), 2)],
                )
                _, status, used = os.wait4(process, 0)
            wall += time.perf_counter() - start
            cpu += used.ru_utime + used.ru_stime
            self.peak_mb = max(self.peak_mb, used.ru_maxrss / 1024)
            said = log.read_text(errors="replace")
            if status:
                sys.exit(f"{' '.join(command)[:200]}\n{said[-2000:]}")
        self.wall.append(wall)
        self.cpu.append(cpu)
        if '"seconds_to_sync"' in said:
            told = json.loads(said.splitlines()[-1])
            self.inside.append(told["seconds"])
            self.synced.append(told["seconds_to_sync"])
        if out.exists():
            shutil.rmtree(out)


def sides(threads: int, mergekit: Path | None, scratch: Path) -> dict[str, Side]:
    python = sys.executable
    shards = lambda folder: sorted(str(path) for path in folder.glob("*.safetensors"))  # noqa: E731

    def own(*flags: str) -> Callable[[Path, Path], list[list[str]]]:
        def command(at: Path, out: Path) -> list[list[str]]:
            what = [flag.replace("@", str(at)) for flag in flags]
            start = [python, "-m", "forgetlearn", "subtract", "--base", f"{at}/base", "--output", str(out), "--json"]
            return [[*start, "--coef", str(COEF), *what]]

        return command

    def script(text: str) -> Callable[[Path, Path], list[list[str]]]:
        return lambda at, out: [[python, "-c", text.format(threads=threads, coef=COEF), str(at), str(out)]]

    found = {
        "floor: read tuned, cp base": Side(
            lambda at, out: [
                [python, "-S", "-c", READ, *shards(at / "tuned")],
                ["/bin/cp", "-r", str(at / "base"), str(out)],
            ]
        ),
        "forgetlearn subtract --tuned": Side(own("--tuned", "@/tuned")),
        "forgetlearn subtract --tuned --threads 1": Side(own("--tuned", "@/tuned", "--threads", "1")),
        "transformers: load both, subtract, save": Side(script(TRANSFORMERS)),
        "forgetlearn subtract --adapter": Side(own("--adapter", "@/adapter")),
        "peft: merge_and_unload, save": Side(script(PEFT)),
    }
    if mergekit:
        recipe = {"base_model": f"{scratch}/base", "merge_method": "task_arithmetic", "dtype": "bfloat16"}
        tuned = [{"model": f"{scratch}/tuned", "parameters": {"weight": -COEF}}]
        config = {**recipe, "models": tuned, "parameters": {"normalize": False}}
        (scratch / "mergekit.yaml").write_text(json.dumps(config))
        plain = [str(mergekit), f"{scratch}/mergekit.yaml"]
        found["mergekit task_arithmetic"] = Side(lambda _at, out: [[*plain, str(out)]])
        found["mergekit, asynchronous writes, 500 MB shards"] = Side(
            lambda _at, out: [[*plain, str(out), "--async-write", "--out-shard-size", "500M"]]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True, help="a folder that is made, and deleted at the end")
    parser.add_argument("--layers", type=int, default=22, help="22: 1.17 B parameters; 104: 5.0 B")
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", help="sides with this text in their name")
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of an environment that has it")
    args = parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    args.scratch.mkdir(parents=True)
    try:
        # In a process of its own: what is started from a large one would begin with its peak of memory.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            parameters = pool.apply(make, (args.scratch, args.layers, args.shards))
        found = sides(threads, args.mergekit, args.scratch)
        found = {name: side for name, side in found.items() if not args.only or args.only in name}
        for index in range(args.pairs):
            for name in list(found) if index % 2 == 0 else reversed(list(found)):
                found[name].run(args.scratch, args.scratch / "log")
                print(f"round {index + 1}: {name}: {found[name].wall[-1]:.2f} s", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(args.scratch)
    show(found, parameters, args.pairs)


def show(found: dict[str, Side], parameters: int, pairs: int) -> None:
    print(f"{parameters:,} parameters, bfloat16, {2 * parameters / 1e9:.2f} GB; {pairs} rounds, medians; coef {COEF}")
    print(f"{'':46}{'wall s':>8}{'CPU s':>8}{'inside s':>10}{'sync s':>8}{'peak MB':>9}")
    for name, side in found.items():
        told = [f"{statistics.median(times):.2f}" if times else "" for times in (side.inside, side.synced)]
        wall, cpu = statistics.median(side.wall), statistics.median(side.cpu)
        print(f"{name:46}{wall:8.2f}{cpu:8.2f}{told[0]:>10}{told[1]:>8}{side.peak_mb:9.0f}")
    own, lora = found.get("forgetlearn subtract --tuned"), found.get("forgetlearn subtract --adapter")
    floor = found.get("floor: read tuned, cp base")
    if own and floor:
        print(f"inside, without the sync, / floor: wall {ratio(own.inside, floor.wall)}")
    for name, side in found.items():
        mine = lora if name.startswith("peft") else own
        if mine and name.startswith(("transformers", "peft", "mergekit")):
            wall, cpu = ratio(side.wall, without_sync(mine)), ratio(side.cpu, mine.cpu)
            print(f"{name} / forgetlearn: wall without the sync {wall}, CPU {cpu}")
    both = found.get("transformers: load both, subtract, save")
    if own and both:
        print(f"ratio {ratio(both.cpu, own.cpu)}")


def without_sync(side: Side) -> list[float]:
    """Return wall seconds without the sync to disk, since the other sides leave writing to the system."""
    return [wall - sync for wall, sync in zip(side.wall, side.synced, strict=True)]


def ratio(slow: list[float], fast: list[float]) -> str:
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(each):.2f} (rounds {min(each):.2f} to {max(each):.2f})"


if __name__ == "__main__":
    main()
