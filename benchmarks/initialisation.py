"""What initialisation costs: ours beside PEFT's PiSSA (exact and approximate) and CorDA, whole processes.

    FARSS_DATA=path/to/data python benchmarks/initialisation.py

Every contestant loads the same LLaMA-shaped model (163M parameters, random bfloat16 weights) and, where it wants data, the
same GSM8K examples, in a process of its own; the median of several rounds is printed, with ratios to PEFT's exact PiSSA.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from pathlib import Path

from common import WORK, data_file, environment, make_model, measured, run_file, table, write_section

RANK = 128
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTESTANTS = {
    "farss survey, exact": "survey-exact",
    "farss survey, fast": "survey-fast",
    "farss.prepare, exact": "prepare-exact",
    "PEFT PiSSA": "pissa",
    "PEFT PiSSA, niter 4": "pissa_niter_4",
    "PEFT CorDA": "corda",
}


# --- the contestants, each in its own process ------------------------------------------------------------------------


def contestant(name: str, run: Path) -> None:
    """Load the model and initialise it; what is printed last is what it found."""
    if name.startswith("survey"):
        from farss.cli import app

        app(["survey", str(run)], standalone_mode=False)
        return
    from farss.configfile import load

    config = load(run)
    if name.startswith("prepare"):
        import farss

        model, tokenizer = _loaded(config)
        farss.prepare(
            *(model, tokenizer, config.data.train),
            targets=LAYERS,
            data=config.data,
            calibration=config.calibration,
            plan=config.plan,
            folder=Path(config.out) / "survey",
        )
        return
    from peft import LoraConfig, get_peft_model

    options = {"r": RANK, "lora_alpha": RANK, "target_modules": LAYERS, "init_lora_weights": name}
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

    from farss.batches import calibration_batches
    from farss.data import load_examples

    examples = load_examples(config.data, tokenizer, config.seed)
    batches = calibration_batches(examples.rows, config.calibration, tokenizer.pad_token_id, config.seed)

    def run_model() -> None:
        for batch in batches:  # PEFT's hook takes one example at a time
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                with torch.no_grad():
                    model(input_ids=ids[mask.bool()][None])

    lora = LoraConfig(**options, corda_config=CordaConfig(corda_method="ipm"))
    preprocess_corda(model, lora, run_model=run_model)
    get_peft_model(model, lora)


def compare(model: Path, data: Path, examples: int, rounds: int, names: list[str], log: Path) -> dict[str, dict[str, float]]:
    """Medians of each contestant; a round runs them all, so that a change of the machine's mood meets everyone."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number, name in itertools.product(range(rounds), names):
        with tempfile.TemporaryDirectory() as folder:
            key = CONTESTANTS[name]
            run = run_file(Path(folder), model, data, examples=examples, svd=key.rsplit("-", 1)[-1] if "-" in key else "exact", rank=RANK)
            result = measured([sys.executable, __file__, "--contestant", key, "--run", str(run)], log)
        found[name].append(result)
        print(f"round {number + 1}, {name}: {result['seconds']:.1f} s, {result['peak_gib']:.2f} GiB", flush=True)
    return {name: {key: statistics.median(one[key] for one in results) for key in results[0]} for name, results in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--only", help="contestants, separated by commas")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contestant(options.contestant, options.run)
        return
    data = data_file("gsm8k/train.jsonl.gz")
    model = make_model(WORK / "llama-163m", data)
    names = list(CONTESTANTS) if not options.only else [name for name in CONTESTANTS if CONTESTANTS[name] in options.only.split(",")]
    medians = compare(model, data, options.examples, options.rounds, names, WORK / "initialisation.log")
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
    write_section("initialisation", f"{table(rows)}\n\n({options.examples} examples, medians of {options.rounds}; {environment()})")


if __name__ == "__main__":
    main()
