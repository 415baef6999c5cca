"""Scripts and trainers of public packages, as they are: under the runner and, the same, under DDP."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from works import works

pytestmark = [pytest.mark.campaign]

SCRIPTS = Path(__file__).parents[0] / "scripts"
RANKS, SHARD = 4, 2
WORDS = [f"w{index}" for index in range(60)]


def launch(folder: Path, runner: bool, *command: object) -> str:
    """Runs a command on four ranks with torchrun; returns what it printed."""
    ours = ["-m", "lightning_mics.run"] if runner else []
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    environment = {
        **os.environ,
        **{"MICS_SHARD_SIZE": str(SHARD), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        **{"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"},
    }
    folder.mkdir()
    done = subprocess.run(
        [*words, *ours, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


def losses_of(folder: Path) -> list[float]:
    """Returns the losses that a Trainer noted in its last checkpoint."""
    last = max(folder.glob("**/trainer_state.json"), key=lambda path: int(path.parent.name.rpartition("-")[2]))
    return [entry["loss"] for entry in json.loads(last.read_text())["log_history"] if "loss" in entry]


def difference(ours: list[float], theirs: list[float]) -> float:
    assert ours and len(ours) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a small causal model and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    set_seed(1)
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(tmp_path / "tiny")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=len(vocabulary), tie_word_embeddings=True, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def write_rows(folder: Path, make: Callable[[Callable[[], str]], dict[str, str]]) -> Path:
    folder.mkdir()
    generator = random.Random(4)

    def text() -> str:
        return " ".join(generator.choices(WORDS, k=9))

    (folder / "train.jsonl").write_text("\n".join(json.dumps(make(text)) for _ in range(64)))
    return folder


TRAINER = (
    *("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 3, "--max_steps", 3, "--save_steps", 3),
    *("--logging_steps", 1, "--report_to", "none", "--learning_rate", 0.01, "--use_cpu", "--bf16", "False"),
    *("--gradient_checkpointing", "False", "--dtype", "float32"),
)


@works("Scripts", "`trl.scripts.sft` and `trl.scripts.dpo` (campaign)")
@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_scripts_of_trl(tmp_path: Path, tiny: Path, script: str, record_property: Any) -> None:
    pytest.importorskip("trl")
    if script == "sft":
        rows = write_rows(tmp_path / "rows", lambda text: {"text": text()})
    else:
        rows = write_rows(tmp_path / "rows", lambda text: {"prompt": text(), "chosen": text(), "rejected": text()})
    own = ("--model_name_or_path", tiny, "--dataset_name", rows, "--output_dir", "out")
    outcomes = []
    for runner in (True, False):
        folder = tmp_path / f"runner-{runner}"
        launch(folder, runner, "-m", f"trl.scripts.{script}", *own, *TRAINER)
        outcomes.append(losses_of(folder / "out"))
    worst = difference(*outcomes)
    record_property("figures", f"losses differ from DDP by {worst:.1e}")
    assert worst <= 2e-5  # Adam enlarges rounding


@works("Scripts", "The trainer of sentence-transformers (campaign)")
def test_sentence_transformers(tmp_path: Path, tiny: Path, record_property: Any) -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    outcomes = []
    for runner in (True, False):
        folder = tmp_path / f"runner-{runner}"
        launch(folder, runner, SCRIPTS / "sentence_script.py", tiny)
        outcomes.append((losses_of(folder / "out"), json.loads((folder / "after.json").read_text())))
    worst = difference(outcomes[0][0], outcomes[1][0])
    weights = difference(outcomes[0][1], outcomes[1][1])
    record_property("figures", f"losses differ from DDP by {worst:.1e}, embeddings by {weights:.1e}")
    assert worst <= 2e-5 and weights <= 1e-4


@works("Scripts", "Training of a diffusers model with hooks that save (campaign)")
def test_diffusers(tmp_path: Path, record_property: Any) -> None:
    pytest.importorskip("diffusers")
    outcomes = []
    for runner in (True, False):
        folder = tmp_path / f"runner-{runner}"
        screen = launch(folder, runner, SCRIPTS / "diffusers_script.py")
        outcomes.append([float(word) for word in screen.partition("LOSSES ")[2].partition("\n")[0].split()])
    worst = difference(*outcomes)
    record_property("figures", f"losses differ from DDP by {worst:.1e}")
    assert worst <= 2e-5
