"""What initialisation costs: ours beside PEFT's PiSSA (exact and approximate) and CorDA, whole processes.

    FARSS_DATA=../shared/data python benchmarks/initialisation.py

Every contestant loads the same LLaMA-shaped model (163M parameters, random bfloat16 weights) and, where it wants data, the
same GSM8K examples, in a process of its own; the median of several rounds is printed, with ratios to PEFT's exact PiSSA.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import environment, table, write_result  # beside this file

RANK = 128
CONTESTANTS = {
    "farss survey, exact": "survey-exact",
    "farss survey, fast": "survey-fast",
    "farss.prepare, exact": "prepare-exact",
    "PEFT PiSSA": "pissa",
    "PEFT PiSSA, niter 4": "pissa_niter_4",
    "PEFT CorDA": "corda",
}


# --- the model -------------------------------------------------------------------------------------------------------


def make_model(folder: Path, data: Path, blocks: int = 12, hidden: int = 1024, mlp: int = 2816, heads: int = 16) -> Path:
    """A LLaMA-shaped model with random weights, and a tokenizer of 4,096 pieces trained on the data."""
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from datasets import load_dataset
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = load_dataset("json", data_files=str(data), split="train")
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    pieces.train_from_iterator((f"{row['question']}\n{row['answer']}" for row in rows), trainer)
    PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def run_file(folder: Path, model: Path, data: Path, examples: int, svd: str) -> Path:
    """A run file for `farss survey`."""
    path = folder / f"{svd}.yaml"
    path.write_text(
        f"model: {{path: {model}}}\ndata: {{train: {data}, max_length: 512}}\n"
        f"calibration: {{examples: {examples}, batch_size: 8, svd: {svd}}}\nplan: {{rank: {RANK}}}\nout: {folder / 'run'}\n"
    )
    return path


# --- the contestants, each in its own process ------------------------------------------------------------------------


def contestant(name: str, run: Path) -> None:
    """Load the model and initialise it; what is printed last is what it found."""
    if name.startswith("survey"):
        from farss.cli import app

        app(["survey", str(run)], standalone_mode=False)
        return
    from farss.config import load

    config = load(run)
    if name.startswith("prepare"):
        import farss

        model, tokenizer = _loaded(config)
        farss.prepare(
            *(model, tokenizer, config.data.train),
            data=config.data,
            calibration=config.calibration,
            plan=config.plan,
            folder=Path(config.out) / "survey",
        )
        return
    from peft import LoraConfig, get_peft_model

    options = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "init_lora_weights": name}
    model, tokenizer = _loaded(config)
    if name == "corda":
        _corda(model, tokenizer, config, options)
    else:
        get_peft_model(model, LoraConfig(**options))


def _loaded(config):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype="auto")
    return model, AutoTokenizer.from_pretrained(config.model.path)


def _corda(model, tokenizer, config, options) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    from farss.data import calibration_batches, load_examples

    examples = load_examples(config.data, tokenizer, config.seed)
    batches = calibration_batches(examples.rows, config.calibration, tokenizer.pad_token_id, config.seed)

    def run_model() -> None:
        for batch in batches:
            with torch.no_grad():
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    lora = LoraConfig(**options, corda_config=CordaConfig(corda_method="ipm"))
    preprocess_corda(model, lora, run_model=run_model)
    get_peft_model(model, lora)


# --- measuring -------------------------------------------------------------------------------------------------------


def measured(command: list[str], log: Path) -> dict[str, float]:
    """Seconds, peak resident memory and peak anonymous memory (GiB) of a whole process."""
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
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def compare(model: Path, data: Path, examples: int, rounds: int, names: list[str], log: Path) -> dict[str, dict[str, float]]:
    """Medians of each contestant; a round runs them all, so that a change of the machine's mood meets everyone."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number, name in itertools.product(range(rounds), names):
        with tempfile.TemporaryDirectory() as folder:
            key = CONTESTANTS[name]
            run = run_file(Path(folder), model, data, examples, key.rsplit("-", 1)[-1] if "-" in key else "exact")
            result = measured([sys.executable, __file__, "--contestant", key, "--run", str(run)], log)
        found[name].append(result)
        print(f"round {number + 1}, {name}: {result['seconds']:.1f} s, {result['peak_gib']:.2f} GiB", flush=True)
    return {name: {key: statistics.median(one[key] for one in results) for key in results[0]} for name, results in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "farss-benchmarks")
    parser.add_argument("--only", help="contestants, separated by commas")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contestant(options.contestant, options.run)
        return
    data = Path(os.environ.get("FARSS_DATA", "../shared/data")) / "gsm8k" / "train.jsonl.gz"
    model = make_model(options.work / "model-163m", data)
    names = list(CONTESTANTS) if not options.only else [name for name in CONTESTANTS if CONTESTANTS[name] in options.only.split(",")]
    medians = compare(model, data, options.examples, options.rounds, names, options.work / "initialisation.log")
    base = medians.get("PEFT PiSSA")
    rows = [
        {
            "": name,
            "seconds": f"{one['seconds']:.1f}",
            "ratio": f"{one['seconds'] / base['seconds']:.2f}" if base else "",
            "peak memory (GiB)": f"{one['peak_gib']:.2f}",
            "ratio ": f"{one['peak_gib'] / base['peak_gib']:.2f}" if base else "",
            "of it anonymous (GiB)": f"{one['anonymous_gib']:.2f}",
        }
        for name, one in medians.items()
    ]
    print(table(rows))
    write_result("initialisation", {"rows": rows, "examples": options.examples, "rounds": options.rounds, **environment()})


if __name__ == "__main__":
    main()
