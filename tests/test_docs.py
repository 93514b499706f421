"""What the documentation tells people to write is what the programs it is for understand."""

import re
from pathlib import Path

import pytest
import yaml

from farss.configfile import from_dict
from farss.maths.metrics import balance
from farss.prompts import ALPACA

DOCS = Path(__file__).parent.parent / "docs"

# Fields of axolotl's AxolotlInputConfig (src/axolotl/utils/schemas: model, peft, datasets, training, config; July 2026).
AXOLOTL = {
    *("base_model", "adapter", "lora_model_dir", "datasets", "sequence_len", "micro_batch_size"),
    *("gradient_accumulation_steps", "num_epochs", "learning_rate", "optimizer", "lr_scheduler", "bf16", "output_dir"),
}
# Fields of LLaMA-Factory's argument classes (src/llamafactory/hparams) and transformers' TrainingArguments.
LLAMA_FACTORY = {
    *("model_name_or_path", "adapter_name_or_path", "create_new_adapter", "stage", "do_train", "finetuning_type", "dataset"),
    *("template", "cutoff_len", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("learning_rate", "lr_scheduler_type", "bf16", "output_dir"),
}


def test_configurations_for_other_trainers_have_their_keys():
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "trainers.md").read_text(), re.DOTALL)
    ours, axolotl, factory = (yaml.safe_load(block) for block in blocks)
    assert from_dict(ours).data.template == f"{ALPACA}\n"
    assert axolotl.keys() <= AXOLOTL
    assert factory.keys() <= LLAMA_FACTORY
    assert axolotl["base_model"] == factory["model_name_or_path"] == "runs/start/prepared/base"
    assert axolotl["lora_model_dir"] == factory["adapter_name_or_path"] == "runs/start/prepared/adapter"


def test_what_python_code_imports_is_there():
    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md"]
    blocks = [block for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    assert len(blocks) >= 2
    for block in blocks:
        for line in re.findall(r"^(?:import|from) .*farss.*$", block, re.MULTILINE):
            exec(line, {})


def test_every_link_between_pages_leads_somewhere():
    root, checked = DOCS.parent, 0
    for page in (*root.glob("*.md"), *DOCS.glob("*.md")):
        for link in re.findall(r'\]\((?!https?:)([^)\s]+)\)|src="([^"]+)"', _prose(page)):
            file, _, anchor = "".join(link).partition("#")
            target = page.parent / file if file else page
            assert target.exists(), (page.name, link)
            assert not anchor or anchor in _anchors(target), (page.name, link)
            checked += 1
    assert checked > 100


def _prose(page):
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def _anchors(page):
    """As GitHub makes them of headings."""
    headings = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line).lower() for line in re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", line).replace(" ", "-") for line in headings}


def test_every_test_that_the_adapters_table_names_exists():
    page = (DOCS / "adapters.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) >= 14
    for file, test in named:
        assert f"def {test}(" in (DOCS.parent / file).read_text(), (file, test)


def test_every_balance_in_the_results_is_that_of_its_k_and_t():
    checked = 0
    pages = "\n".join(page.read_text() for page in DOCS.glob("results*.md"))
    for table in re.findall(r"(?:^\|.*\n)+", pages, re.MULTILINE):
        head, _, *rows = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.strip().split("\n"))
        if not {"K %", "T %", "KT %"} <= set(head):
            continue
        for row in rows:
            k, t, both = (row[head.index(name)].partition(" ")[0].strip("*") for name in ("K %", "T %", "KT %"))
            if both:
                assert float(both) == pytest.approx(100 * balance(float(k) / 100, float(t) / 100), abs=0.15), row  # of rounded numbers
                checked += 1
    assert checked > 70
