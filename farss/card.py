"""The README of what is handed over: what it is, what it learned and forgot, and how to make it again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from farss.files import read_json, write_text
from farss.models import local_folder
from farss.prompts import prompt_text

ASK = """```python
{imports}

tokenizer = AutoTokenizer.from_pretrained({base})
model = AutoModelForCausalLM.from_pretrained({base}, dtype="{dtype}", device_map="auto"{bits}){adapter}
{inputs}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={room})[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""

FOUR_BITS = 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")'
"""As `model.quantization=nf4` loads a base."""


def write_card(folder: Path, summary: dict[str, Any] | None = None, command: str = "") -> None:
    """Write `README.md` into an exported adapter or a merged model, from its `farss.json`.

    Args:
        summary: of an evaluation (`summary.json`); None: not measured yet.
        command: that makes it again.
    """
    facts = read_json(folder / "farss.json")
    base, method = facts.get("base") or "its base model", facts["method"]
    adapter = (folder / "adapter_config.json").is_file()
    # a hub takes names of models, and no folders of ours
    known = {"base_model": base} if facts.get("base") and not Path(base).exists() else {}
    front = {**known, "library_name": "peft" if adapter else "transformers", "tags": [*dict.fromkeys(("farss", method))]}
    licence = base_licence(base)
    front |= {"license": licence} if licence else {}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    of = f"{method} {'adapter for' if adapter else 'fine-tune of'} {base}"
    lines += [f"# {base} without some of its blocks ({method})" if facts.get("deleted") else f"# {of}", ""]
    lines += [*(_adapter_lines(facts) if adapter else _model_lines(facts)), ""]
    shallow = f", the first {facts['boundary']} of them shallow" if facts.get("boundary") else ""
    if facts.get("parameters"):
        ranks = f" in layers of rank {' to '.join(map(str, dict.fromkeys(facts['planned_ranks'])))}" if facts.get("planned_ranks") else ""
        lines.append(f"- trained as: {method}, {facts['parameters']:,} parameters{ranks}, {facts['blocks']} blocks{shallow}")
    precision = facts.get("quantization") or facts.get("base_dtype")
    lines += [f"- base's precision: {precision}"] if precision else []
    lines += [f"- made by: `{command}`"] if command else []
    lines.append(f"- licence: that of the base model ({licence or 'see its card'})")
    lines += ["", *_asking(facts, base, folder, adapter)] if facts.get("template") else []
    lines += ["", *_measured(summary)] if summary else []
    write_text(folder / "README.md", "\n".join(lines) + "\n")


def _asking(facts: dict[str, Any], base: str, folder: Path, adapter: bool) -> list[str]:
    """How to ask it: as it was trained."""
    template, name = facts["template"], facts.get("folder") or folder.name  # while it is written the folder has another name
    if template == "chat":
        opening = [{"role": "system", "content": facts["system"]}] if facts.get("system") else []
        behind = f" + {facts['border']!r}" if facts.get("border") else ""
        day = f", date_string={facts['day']!r}" if facts.get("day") else ""  # as Llama 3's template is told it
        inputs = (
            f"messages = {[*opening, {'role': 'user', 'content': '...'}]!r}\n"
            f"prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False{day}){behind}\n"
            'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)'
        )
    else:
        prompt = prompt_text(template, "Your question here.")
        inputs = f'prompt = {prompt!r}\ninputs = tokenizer(prompt, return_tensors="pt").to(model.device)'
    four = facts.get("quantization") == "nf4"
    imports = ["from peft import PeftModel"] if adapter else []
    imports.append(f"from transformers import AutoModelForCausalLM, AutoTokenizer{', BitsAndBytesConfig' if four else ''}")
    # the adapter fits the base as it was loaded; float32 holds whatever the files hold
    loaded = facts.get("base_dtype", "float32") if adapter else "float32"
    code = ASK.format(
        dtype="auto" if loaded == "float32" else loaded,
        imports="\n".join(imports),
        bits=f", quantization_config={FOUR_BITS}" if four else "",
        base=repr(base if adapter else name),
        adapter=f"\nmodel = PeftModel.from_pretrained(model, {name!r})" if adapter else "",
        inputs=inputs,
        room=2000 if facts.get("thinking") else 200,
    )
    dated = f" (its chat template writes the date, which in the training was always {facts['day']})" if facts.get("day") else ""
    return ["## Asking it", "", f"In the prompt of its training{dated}:", "", code]


def _adapter_lines(facts: dict[str, Any]) -> list[str]:
    lost = f"; compressed, at most {facts['lost']:.2%} of a layer's change is lost" if facts.get("lost") else ""
    return [
        f"A plain LoRA (rank {facts['rank']}, alpha {facts['rank']}) for the untouched base model. Load it with "
        "`farss.load_adapter(base, folder)`, which refuses another base, with `PeftModel.from_pretrained(base, folder)`, or serve it "
        "with vLLM or llama.cpp.",
        "",
        f"Checked: its logits on the base differ from the trained model's by at most {facts['logit_difference']:.1e} (float32){lost}.",
    ]


def _model_lines(facts: dict[str, Any]) -> list[str]:
    if gone := facts.get("deleted"):
        return [f"A smaller model: of its base's {facts['blocks']} blocks these are deleted: {', '.join(map(str, gone))}."]
    lines = ["A whole model: the change that was trained is merged into its weights."]
    if facts.get("logit_difference") is not None:
        lines[0] += (
            f" They are rounded as the base's are, so its logits differ from the trained model's by up to "
            f"{facts['logit_difference']:.1e} (float32)."
        )
    return lines


def _measured(summary: dict[str, Any]) -> list[str]:
    """A table of what was asked before and after."""
    lines = ["| Benchmark | kind | questions | before | after |", "|---|---|---:|---:|---:|"]
    for row in summary.get("benchmarks") or []:
        before, after = (f"{row[key]:.1%}" if row.get(key) is not None else "" for key in ("before", "after"))
        lines.append(f"| {row['name']} | {row['kind']} | {row['questions']} | {before} | {after} |")
    lines.append("")
    for name in ("K", "T", "KT"):
        if summary.get(name):
            estimate = summary[name]
            by = ", by likelihood" if name != "K" and summary.get("learned_by") == "likelihood" else ""
            by += f", relative to {summary['reference']}" if name == "T" and summary.get("reference") else ""
            lines.append(f"- {name}{by}: {estimate['value']:.1%} (95 % interval {estimate['low']:.1%} to {estimate['high']:.1%})")
    if summary.get("forgetting") is not None:
        lines.append(f"- loss on general text: {summary['forgetting']:+.3f} nats a token")
    return lines


def base_licence(base: str) -> str | None:
    """The licence that the card of a base model names."""
    card = local_folder(base) / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"\s*---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        facts = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    named = facts.get("license") if isinstance(facts, dict) else None
    return ", ".join(map(str, named)) if isinstance(named, list) else str(named) if named else None
