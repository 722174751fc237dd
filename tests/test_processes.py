"""Several processes give what one gives: scores fact by fact, weights within 1e-5."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conftest import make_char_tokenizer, make_tiny_model
from forgetlearn.cli.main import main
from forgetlearn.config.schema import EvaluateSettings, StageSettings
from forgetlearn.errors import ConfigError
from forgetlearn.evaluation import damage, general_prompts
from forgetlearn.evaluation.scoring import score
from forgetlearn.facts import Fact, LocalityProbe
from forgetlearn.method import keeping
from forgetlearn.method.core import learn
from forgetlearn.method.kinds import Lesson, Lessons
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.language_model import wrap
from forgetlearn.runtime import processes
from forgetlearn.storage import disk
from forgetlearn.storage.records import OnPrompts, Row, load_rows, save_rows
from forgetlearn.training.finetune import facts_at_once
from forgetlearn.training.schedule import Kept
from forgetlearn.training.trainer import own_part
from written_by_hand import change_manifest, forget_stages

TOLERANCE = 1e-5
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
STAGE = StageSettings(epochs=2, batch_size=4, learning_rate=1e-3, lora={"learning_rate": 2e-3})
# Some facts are learned then, and some are not. With AdamW's usual epsilon, rounding would grow over so many steps.
LEARNED = StageSettings(
    until="learned",
    max_epochs=20,
    batch_size=4,
    learning_rate=3e-3,
    adam_epsilon=1e-5,
    lora={"learning_rate": 3e-3, "lora_alpha": 640},
)


@pytest.fixture
def two(monkeypatch):
    """As if this were process 1 of 2."""
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)


def some_facts(n):
    return [
        Fact(
            id=f"f{i}",
            subject=f"s{i}",
            prompt=f"The code of s{i} is",
            ground_truth=str(i),
            target_new=str(n - i) * (1 + i % 3),
            rephrase_prompts=(f"s{i} has code",),
            locality=(LocalityProbe(f"Sea {i} is", "wet"),),
        )
        for i in range(n)
    ]


def learn_and_score(how, folder):
    """Rows, damage and weights of a tiny model that learned seven facts: a step of four and one of three, twice."""
    lm = wrap(make_tiny_model(), make_char_tokenizer())
    settings = EvaluateSettings(batch_size=3, max_new_tokens=4)
    base = folder / f"base {how} of {processes.world_size()}"
    processes.on_main(base.mkdir)
    damage.measure(lm, settings, base)
    learn(lm, some_facts(7), STAGE, how)
    damaged = damage.measure(lm, settings, base, base)
    rows = score(lm, some_facts(7), phase="updated", settings=settings)
    return rows, damaged, {name: weight.detach().clone() for name, weight in lm.model.named_parameters()}


def learn_and_keep(how):
    """How far a tiny model came that learned seven facts while it kept what it said, and its weights."""
    lm = wrap(make_tiny_model(), make_char_tokenizer())
    prompts = dict.fromkeys(("Who?", "Why?", ("A", "B", "C?"), "How?", "Is it so?"), keeping.NEIGHBOUR)
    texts, tops = keeping.answered(lm, prompts, EvaluateSettings(batch_size=2))
    kept = Kept(tuple(keeping.encoded(lm.encoder, texts).values()), tuple(tops), 1.0)
    lessons = Lessons([[Lesson(prompt, fact.target_new) for prompt in fact.prompts] for fact in some_facts(7)], kept)
    log = learn(lm, some_facts(7), LEARNED, how, lessons=lessons)
    return (log.epochs, log.unlearned), {name: weight.detach().clone() for name, weight in lm.model.named_parameters()}


def as_process(place, port, folder):
    """Learn in one of two processes; process 0 keeps what was found, a failure is kept by its own process."""
    address = {"RANK": place, "LOCAL_RANK": place, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in address.items()})
    try:
        with processes.joined("cpu"):
            for how in ("all weights", "lora"):
                rows, damaged, weights = learn_and_score(how, folder)
                assert all(part == (rows, damaged) for part in processes.gather((rows, damaged)))
                save_rows(rows, folder / f"{how}.jsonl")
                damaged.save(folder / f"damage {how}.json")
                if processes.is_main():
                    save_file(weights, folder / f"{how}.safetensors")
                came, weights = learn_and_keep(how)
                assert processes.gather(came) == [came, came]
                if processes.is_main():
                    disk.write_json(folder / f"kept {how}.json", {"came": came})
                    save_file(weights, folder / f"kept {how}.safetensors")
    except BaseException:
        (folder / f"failure-{place}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def test_two_processes_learn_and_score_as_one_does(tmp_path, monkeypatch):
    prompts = ("Who?", ("Hi", "Hello", "What?"), "What is this?", "Why?", "x" * 300)
    monkeypatch.setattr(general_prompts, "measuring", lambda facts=(): prompts)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forked = multiprocessing.get_context("fork")
    started = [forked.Process(target=as_process, args=(place, port, tmp_path)) for place in (0, 1)]
    for process in started:
        process.start()
    alone = {how: learn_and_score(how, tmp_path) for how in ("all weights", "lora")}
    keeping_alone = {how: learn_and_keep(how) for how in alone}
    for process in started:
        process.join(100)
    assert not [file.read_text() for file in tmp_path.glob("failure-*")]
    assert [process.exitcode for process in started] == [0, 0]
    for how, (rows, damaged, weights) in alone.items():
        assert load_rows(Row, tmp_path / f"{how}.jsonl") == rows
        found = OnPrompts.load(tmp_path / f"damage {how}.json")
        assert (found.compared, found.tokens, found.kl) == (4, damaged.tokens, pytest.approx(damaged.kl, rel=1e-3))
        assert largest_difference(weights, load_file(tmp_path / f"{how}.safetensors")) < TOLERANCE
    for how, ((epochs, unlearned), weights) in keeping_alone.items():
        assert disk.read_json(tmp_path / f"kept {how}.json") == {"came": [epochs, list(unlearned)]}
        assert 0 < len(unlearned) < 7
        assert largest_difference(weights, load_file(tmp_path / f"kept {how}.safetensors")) < TOLERANCE


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_alone_everything_is_done_here():
    assert (processes.world_size(), processes.rank(), processes.is_main()) == (1, 0, True)
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.gather("x") == ["x"]
    assert processes.on_main(lambda: 5) == 5


def test_a_share_is_every_nth_and_as_many_in_each_process(two):
    assert processes.share([10, 11, 12, 13]) == [11, 13]
    assert processes.share([10, 11, 12]) == [11, 12]  # 12 is done twice
    assert processes.share([10]) == [10]
    assert processes.share([]) == []


def test_a_step_has_the_facts_of_one_process(two):
    def at_once(batch, micro=None, layout="packed"):
        return facts_at_once(StageSettings(batch_size=batch, micro_batch_size=micro), layout)

    assert at_once(8) == 8
    assert at_once(8, micro=2) == 4  # two in each process, and a step of two
    assert at_once(6, micro=3) == 6
    assert at_once(7, micro=1) == 1  # seven is no multiple of two: process 1 computes, and adds nothing
    assert at_once(8, layout="single") == 2


def test_a_process_without_a_fact_gets_a_text_without_answer(two):
    texts = [Encoded((1, 2, 3), 2), Encoded((4, 5), 1)]
    assert own_part(texts) == [texts[1]]
    (empty,) = own_part(texts[:1])
    assert (empty.ids, empty.answer_ids) == ((1, 2, 3), ())


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS = 4"),
    ],
)
def test_a_launch_that_would_do_all_work_several_times_is_refused(monkeypatch, capsys, environment, problem):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["update", "--model", "m", "--facts", "f", "--output", "o"]) == 2
    assert problem in capsys.readouterr().err


def test_commands_for_one_process_say_so_once(monkeypatch, capsys):
    for name, value in zip(processes.ADDRESS, ("0", "2", "0", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert main(["compare", "--output", "o"]) == 2
    assert "compare is for one process, and 2 were started" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(["compare", "--output", "o"]) == 2
    assert capsys.readouterr().err == ""


def test_each_process_needs_a_fact_and_a_gpu(two, monkeypatch):
    with pytest.raises(ConfigError, match="2 processes for 1 facts"):
        processes.check_enough_for(1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES = '3'"):
        processes._own_gpu(1)


def test_one_process_cannot_be_split_over(small_lab, tmp_path, capsys):
    arguments = ["update", "--model", str(small_lab), "--facts", str(small_lab / "facts.jsonl"), "--shard"]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 2
    assert "model.shard" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Whole processes under torchrun


def command_of(n, *arguments):
    """The words that start `forgetlearn` in n processes."""
    launcher = [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={n}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    return [sys.executable, *(launcher if n > 1 else []), "-m", "forgetlearn", *map(str, arguments)]


def forgetlearn(n, *arguments, code=0):
    """What `forgetlearn` prints on stderr, in n processes."""
    done = subprocess.run(command_of(n, *arguments), capture_output=True, text=True, env=ONE_THREAD, timeout=600)
    assert (done.returncode == 0) == (code == 0), done.stderr
    return done.stderr


def killed_after_a_checkpoint(points, n, *arguments):
    """`forgetlearn` in n processes, all of them killed as soon as there is a checkpoint in `points`."""
    with subprocess.Popen(command_of(n, *arguments), stderr=subprocess.PIPE, env=ONE_THREAD) as launched:
        end = time.monotonic() + 300
        while not list(points.glob("step-*")) and launched.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        workers = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        for number in (launched.pid, *map(int, workers)):
            os.kill(number, signal.SIGKILL)
        assert len(workers) == n, launched.stderr.read()
    assert list(points.glob("step-*")), "the stage was over before it could be killed"


@pytest.fixture(scope="module")
def update(small_lab, tmp_path_factory):
    """`update(n, method, *flags)`: the run folder of an update of the lab base; with one process it is made once."""
    made = {}

    def run(n, method, *flags):
        if (n, method, flags) not in made:
            out = tmp_path_factory.mktemp("run") / "out"
            epochs = [f"--set={stage}.epochs=10" for stage in ("forget", "learn")]
            common = ["--model", small_lab, "--facts", small_lab / "facts.jsonl", "--config", small_lab / "update.yaml"]
            forgetlearn(n, "update", *common, "--method", method, "--coef", "0.5", *epochs, *flags, "--output", out)
            made[n, method, flags] = out
        return made[n, method, flags]

    return run


def weights_of(run):
    product = run / ("merged" if (run / "merged").is_dir() else "model")
    return load_file(product / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("shard", [(), ("--shard",)], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("method", ["f-ft", "f-lora", "f-lora-ft"])
def test_an_update_by_two_processes_is_that_of_one(update, method, shard):
    flags = ("--set=save_merged=true",)
    one, two = update(1, method, *flags), update(2, method, *flags, *shard)
    difference = largest_difference(weights_of(one), weights_of(two))
    rows = disk.read_rows(one / "facts.jsonl")
    print(f"\n{method} {shard}: {len(rows)} rows, largest difference of a weight {difference:.1e}")
    assert disk.read_rows(two / "facts.jsonl") == rows
    assert len(rows) > 24 * 3 * 5
    assert difference < TOLERANCE
    assert not list((two / "stages").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("f-ft", ("--coef=auto",)),
        ("f-lora", ("--coef=auto",)),
        ("f-ft", ("--teach-old=2",)),
        ("f-ft", ("--old-from=model",)),
        ("ga", ("--coef=0.05",)),
        ("ft-c", ()),
        ("locft", ()),
        ("f-ft", ("--modules=head", "--set=forget.rows=facts", "--set=learn.rows=facts")),
    ],
    ids=["auto", "auto-full", "taught", "old-from-model", "ga", "ft-c", "locft", "rows"],
)
def test_the_rest_of_an_update_by_two_processes_is_that_of_one(update, method, flags):
    flags = ("--set=save_merged=true", *flags)
    one, two = update(1, method, *flags), update(2, method, *flags)
    difference = largest_difference(weights_of(one), weights_of(two))
    print(f"\n{method} {flags}: largest difference of a weight {difference:.1e}")
    assert disk.read_rows(two / "facts.jsonl") == disk.read_rows(one / "facts.jsonl")
    assert difference < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("method", ["f-ft", "f-lora"])
def test_killed_inside_a_stage_two_processes_go_on_to_the_same_bits(update, method, tmp_path):
    done = update(2, method, "--set=save_merged=true")
    words = disk.read_json(done / "manifest.json")["command"][1:]
    words[words.index(str(done))] = str(tmp_path / "run")
    for stage in ("forget", "learn"):
        points = tmp_path / f"run/stages/{stage}.points"
        killed_after_a_checkpoint(points, 2, *words, "--set=checkpoint_minutes=1e-9", "--resume")
        assert stage not in disk.read_json(tmp_path / "run/manifest.json")["stages"]
    told = forgetlearn(2, *words, "--resume")
    assert "learning: resuming at step" in told
    assert largest_difference(weights_of(done), weights_of(tmp_path / "run")) == 0
    assert disk.read_rows(tmp_path / "run/facts.jsonl") == disk.read_rows(done / "facts.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("shard", [(), ("--shard",)], ids=["ddp", "fsdp2"])
def test_an_update_goes_on_after_a_stage_with_as_many_processes(update, shard):
    done = update(2, "f-ft", *shard, "--set=keep_stages=true")
    before = weights_of(done)
    change_manifest(done, forget_stages("learn", "score_updated"))
    command = [*disk.read_json(done / "manifest.json")["command"][1:], "--resume"]
    fewer = forgetlearn(1, *command, code=2)
    assert ("there is only one" if shard else "inputs.processes = 2, now it is None") in fewer
    forgetlearn(2, *command)
    assert largest_difference(before, weights_of(done)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--shard",)], ids=["ddp", "fsdp2"])
def test_an_evaluation_by_two_processes_is_that_of_one(update, small_lab, tmp_path, flags):
    adapter = update(1, "f-lora", "--set=save_merged=true") / "adapter"
    common = ["evaluate", "--model", adapter, "--facts", small_lab / "facts.jsonl", "--reference", small_lab]
    forgetlearn(1, *common, "--output", tmp_path / "one")
    forgetlearn(2, *common, *flags, "--output", tmp_path / "two")
    rows = disk.read_rows(tmp_path / "one" / "facts.jsonl")
    assert rows
    assert disk.read_rows(tmp_path / "two" / "facts.jsonl") == rows


@pytest.mark.slow
def test_an_error_is_told_once(small_lab, tmp_path):
    facts = tmp_path / "facts.jsonl"
    first = (small_lab / "facts.jsonl").read_text().splitlines()[0]
    facts.write_text(first + "\n")
    common = ["update", "--model", small_lab, "--facts", facts]
    told = forgetlearn(2, *common, "--output", tmp_path / "run", code=2)
    assert told.count("ConfigError: 2 processes for 1 facts") == 1
    assert "[rank" not in told  # what stands before a line of a traceback in a process
    (tmp_path / "file").touch()
    told = forgetlearn(2, *common, "--output", tmp_path / "file", code=2)  # only process 0 looks
    assert told.count("RunError") == 1
