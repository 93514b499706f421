"""Surveys of models that are larger than memory should have to be: LLaMA-2-7B's shape, two blocks of a 70B one, and what FARSS-plus
looks at in two blocks of an 8B one.

    FARSS_DATA=path/to/data python benchmarks/large.py 7b      # writes 13.5 GB, then an hour or so
    FARSS_DATA=path/to/data python benchmarks/large.py 70b     # two blocks and the embeddings, 4.5 GB
    FARSS_DATA=path/to/data python benchmarks/large.py 8b --method farss-plus     # two blocks and the embeddings, 1.4 GB

Killed, the same command goes on at the block it was in; times add up.
"""

from __future__ import annotations

import argparse
import json
import sys

from common import WORK, data_file, environment, make_model, measured, run_file, table, write_section

SHAPES = {
    "7b": {"blocks": 32, "hidden": 4096, "mlp": 11008, "heads": 32, "vocabulary": 32000},
    "8b": {"blocks": 2, "hidden": 4096, "mlp": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 32000},
    "70b": {"blocks": 2, "hidden": 8192, "mlp": 28672, "heads": 64, "kv_heads": 8, "vocabulary": 32000},
}
EXAMPLES = 64
METHODS = ["farss", "farss-plus"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--svd", choices=["exact", "fast"], default="exact")
    parser.add_argument("--method", choices=METHODS, default="farss")
    options = parser.parse_args()
    data, folder = data_file("gsm8k/train.jsonl.gz"), WORK / f"large-{options.shape}-{options.method}-{options.svd}"
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(WORK / f"llama-{options.shape}", data, **SHAPES[options.shape])
    run = run_file(folder, model, data, examples=EXAMPLES, svd=options.svd)
    told = [f"plan.method={options.method}", f"calibration.knowledge={data_file('wikitext2/valid.jsonl.gz')}"]
    found = measured([sys.executable, "-m", "farss", "survey", str(run), *told], folder / "survey.log")
    (file,) = (folder / "run").glob("*/survey.json")
    survey = json.loads(file.read_text())
    rows = [
        {"": "model on disk", "value": f"{sum(path.stat().st_size for path in model.glob('*.safetensors')) / 1e9:.1f} GB"},
        {"": "examples, tokens", "value": f"{survey['examples']}, {survey['tokens']:,}"},
        {"": "linear layers", "value": str(len(survey["layers"]))},
        {"": "time", "value": f"{survey['meta']['seconds'] / 60:.0f} min"},
        *({"": f"of it {part}", "value": f"{spent / 60:.1f} min"} for part, spent in survey["meta"].get("parts", {}).items()),
        {"": "peak anonymous memory", "value": f"{found['anonymous_gib']:.2f} GiB"},
        {"": "peak resident memory, with mapped files", "value": f"{found['peak_gib']:.1f} GiB"},
    ]
    write_section(f"large-{options.shape}", f"{table(rows)}\n\n({options.method}, svd: {options.svd}; {environment()})")


if __name__ == "__main__":
    main()
