"""What the benchmarks share: models, measured processes, and the tables in the documentation."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from farss.config import Config

WORK = Path(os.environ.get("FARSS_BENCHMARKS", Path(tempfile.gettempdir()) / "farss-benchmarks"))
"""Models and logs; large ones stay for the next time."""
DOCS = Path(__file__).parent.parent / "docs"


def data_file(name: str) -> Path:
    """A file of the data folder."""
    path = Path(os.environ.get("FARSS_DATA", "../shared/data")).absolute() / name
    if not path.is_file():
        sys.exit(f"there is no {path}: set FARSS_DATA to the folder with the data sets")
    return path


def run_config(arguments: list[str], title: str) -> tuple[str, Config]:
    """The name and the configuration that a benchmark is given: a run file (default: the embedded world), further files on top of it
    and key=value.

    Args:
        title: of the benchmark; it runs in a folder of this name in `WORK`.
    """
    from farss.configfile import load, override
    from farss.world.demo import demo_config

    file = next((each for each in arguments if "=" not in each), None)
    name, config = (Path(file).stem, load(file)) if file else ("world", demo_config(""))
    return name, override(config, [*(each for each in arguments if each != file), f"out={WORK / f'{title}-{name}'}"])


def percent(value: float, low: float, high: float) -> str:
    """A share and its interval."""
    return f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"


# --- models ----------------------------------------------------------------------------------------------------------


def make_model(
    folder: Path,
    data: Path,
    *,
    blocks: int = 12,
    hidden: int = 1024,
    mlp: int = 2816,
    heads: int = 16,
    kv_heads: int | None = None,
    vocabulary: int = 4096,
) -> Path:
    """A LLaMA-shaped model with random bfloat16 weights, written block by block, and a tokenizer trained on the data."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    folder.mkdir(parents=True, exist_ok=True)
    _train_tokenizer(folder, data, vocabulary)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        block = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault(f"block-{block[1]}" if block else "rest", []).append(name)
    index, generator = {}, torch.Generator().manual_seed(0)
    for shard, names in shards.items():
        tensors = {name: _random(shapes[name], generator) for name in names}
        save_file(tensors, folder / f"model-{shard}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(names, f"model-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


def _random(shape, generator):
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def _train_tokenizer(folder: Path, data: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from farss.rows import read_rows

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 4096),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    pieces.train_from_iterator((f"{row['question']}\n{row['answer']}" for row in read_rows(str(data))), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def run_file(folder: Path, model: Path, data: Path, *, examples: int, svd: str = "exact", rank: int = 128, batch_size: int = 8) -> Path:
    """A run file for `farss survey`."""
    path = folder / "run.yaml"
    path.write_text(
        f"model: {{path: {model}}}\ndata: {{train: {data}, max_length: 512}}\n"
        f"calibration: {{examples: {examples}, batch_size: {batch_size}, svd: {svd}}}\nplan: {{rank: {rank}}}\nout: {folder / 'run'}\n"
    )
    return path


# --- measuring -------------------------------------------------------------------------------------------------------


def measured(command: list[str], log: Path) -> dict[str, float]:
    """Seconds, peak resident memory and peak anonymous memory (GiB) of a whole process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with open(log, "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        anonymous = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            anonymous = max(anonymous, _anonymous_kib(process.pid))
            time.sleep(0.02)
    if status:
        sys.exit(f"{' '.join(command)} failed: see {log}")
    return {"seconds": time.monotonic() - begun, "peak_gib": usage.ru_maxrss / 2**20, "anonymous_gib": anonymous / 2**20}


def _anonymous_kib(pid: int) -> int:
    """Memory that is not backed by a file. Only Linux tells; 0 elsewhere."""
    with contextlib.suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) if found else 0
    return 0


def environment() -> str:
    """Date, machine, whether its products are in bfloat16 where that is asked for, and versions."""
    import torch

    from farss.precision import multiplies_in

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    products = "bfloat16 products" if multiplies_in(torch.bfloat16, device) else "float32 products"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    return f"{time.strftime('%Y-%m-%d')}, {_processor()}, {threads} threads, {products}, {versions}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.machine()


# --- the page --------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row[head] for head in heads) + " |" for row in rows)])


def write_section(name: str, text: str, page: str = "performance.md") -> None:
    """Print a result, and put it between its marks on a page of the documentation, or at its end."""
    print(text)
    opening, closing = f"<!-- {name}: written by its command -->", f"<!-- end of {name} -->"
    written = (DOCS / page).read_text()
    if opening not in written:
        written = f"{written.rstrip()}\n\n{opening}{closing}\n"
    before, _, rest = written.partition(opening)
    _, _, after = rest.partition(closing)
    (DOCS / page).write_text(f"{before}{opening}\n{text}\n{closing}{after}")
