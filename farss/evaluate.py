"""Ask a model what it knows and what it learned, through lm-evaluation-harness on the live model (no merge)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from farss.artifacts import KINDS, OF_BASE, Scores, TaskScore, has_records, read_records
from farss.batches import choose
from farss.config import Config, DataConfig, QuestionSet
from farss.errors import FarssError, first_line
from farss.files import fingerprint, read_json, reading, write_json, write_text
from farss.memory import freed_memory_kept, memory_cure
from farss.models import base_fingerprint, weights_fingerprint
from farss.precision import dtype_name
from farss.prompts import ANSWER, answer_end, prompt_text, separator
from farss.rows import text_rows
from farss.tasks.benchmarks import Benchmark, grading, list_benchmarks
from farss.tasks.grading import METRICS, STEPS, without_thoughts
from farss.tasks.likelihood import text_loss
from farss.tasks.live import PromptProgress, asking, live_model, prompt_tokenizer, require_harness
from farss.tasks.names import task_manager
from farss.tasks.questions import asked_so, prompt_of, task_settings
from farss.tasks.records import Logged, QuestionRecord, main_metric, metric_label, records_of

BASE = "base"
"""What `meta.method` says of the untouched model, and where its answers lie."""


def evaluate(
    model: Any,
    tokenizer: Any,
    config: Config,
    folder: Path,
    method: str = "",
    on_progress: PromptProgress | None = None,
) -> Scores:
    """Ask everything in `config.evaluate`, write `scores.json` and one `scores/<name>.jsonl` a benchmark.

    Args:
        model: a `PreTrainedModel` or `PeftModel`, where it is. Its training mode is restored afterwards.
        folder: where the results go. A benchmark that was finished there with the same weights, configuration and
            `method` is not asked again, so a killed evaluation continues with the next one.
        method: what made the model; it is kept in the scores.
        on_progress: called with (benchmark, prompts done, prompts in all).

    Raises:
        ConfigError: an unknown task name, a task that runs generated code, a question set that cannot be asked.
        FarssError: questions are asked and lm_eval is not installed, or a task's data cannot be reached.
    """
    if config.evaluate.asked:
        require_harness()
    where = {"path": config.model.path, "dtype": dtype_name(model.dtype), **({"method": method} if method else {})}
    where |= {"quantization": config.model.quantization} if config.model.quantization != "none" else {}
    identity = {"weights": _identity(model), **where, "seed": config.seed, **_versions()}
    benchmarks = list_benchmarks(config, identity)
    asks = prompt_tokenizer(tokenizer)
    results = {each.name: _finished(folder / "scores", each) for each in benchmarks}
    for each in benchmarks:  # a chat template, which writes the prompts, may have changed
        if results[each.name] and not _asked_as_now(each, config, asks, folder / "scores"):
            results[each.name] = None
    waiting = [each for each in benchmarks if results[each.name] is None]
    manager = task_manager([each.name for each in waiting if each.drawn is None], config.evaluate.run_generated_code)
    memory = memory_cure(
        config.evaluate.batch_size, "prompts at a time", "evaluate.batch_size", last="choose a smaller fewshot or max_tokens"
    )
    with freed_memory_kept(model.device), memory, asking(model, config.evaluate.run_generated_code):
        tasks = {each.name: _load(each, asks, config, manager) for each in waiting}  # what cannot be reached is known before any is asked
        live = live_model(model, asks, config.evaluate.batch_size, on_progress) if waiting else None
        for each in waiting:
            results[each.name] = _ask_and_write(each, tasks.pop(each.name), live, config, folder / "scores")
        loss = _text_loss(model, asks, config, identity, folder / "scores", on_progress)
    base = {OF_BASE: base_fingerprint(model)} if hasattr(model, "peft_config") or method == BASE else {}
    scores = Scores(**_by_kind(benchmarks, results), text_loss=loss, meta=identity | base)
    scores.save(folder / "scores.json")
    return scores


def grade_again(config: Config, folder: Path) -> Scores | None:
    """The scores in a folder by the rules of today, without the model; None where something would have to be asked again."""
    known = Scores.load(folder / "scores.json")
    benchmarks = list_benchmarks(config, {key: value for key, value in known.meta.items() if key != OF_BASE})
    results = {each.name: _finished(folder / "scores", each) for each in benchmarks}
    if None in results.values():
        return None
    scores = replace(known, **_by_kind(benchmarks, results))
    scores.save(folder / "scores.json")
    return scores


def _by_kind(benchmarks: list[Benchmark], results: dict[str, TaskScore | None]) -> dict[str, Any]:
    return {kind: {each.name: results[each.name] for each in benchmarks if each.kind == kind} for kind in KINDS}


def _identity(model: Any) -> str:
    """Hash of the weights and of how strongly the adapters are applied."""
    scales = {name: [adapter.lora_alpha, adapter.alpha_pattern] for name, adapter in getattr(model, "peft_config", {}).items()}
    off = any(getattr(module, "disable_adapters", False) is True for module in model.modules())
    return fingerprint([weights_fingerprint(model), scales, off])


# --- asking ----------------------------------------------------------------------------------------------------------


def _ask_and_write(benchmark: Benchmark, tasks: dict[str, Any], live: Any, config: Config, folder: Path) -> TaskScore:
    """Ask one benchmark and write its records and its score; the score comes last and says that it is complete."""
    started = time.monotonic()
    chat = _writes_special_tokens(benchmark, config)
    thinks = chat and config.data.thinking
    live.start(benchmark.name, chat)
    logged = _run(benchmark, tasks, live, config)
    metrics = [main_metric(each) for each in logged]
    found = [records_of(each, metric, f"{each.name}/" if len(logged) > 1 else "") for each, metric in zip(logged, metrics, strict=True)]
    records = [record for each in found for record in each]
    if not thinks:  # a model that thinks first does not give the bare right answer
        # those of lm_eval's tasks may not fit, and HFLM cuts their prompts
        _add_gold(live.gold if benchmark.drawn else live.loglikelihood, zip(logged, found, strict=True))
    if benchmark.drawn is not None:
        for record in records:
            record["id"] = benchmark.drawn.asked[record["id"]]["id"]
    likelihoods = [each["gold_loglikelihood"] for each in records if each["gold_loglikelihood"] is not None]
    score = TaskScore(
        name=benchmark.name,
        metric=metric_label(logged[0], metrics[0]),
        score=sum(each["score"] for each in records) / len(records),
        questions=len(records),
        fewshot=logged[0].task.config.num_fewshot or 0,
        gold_loglikelihood=sum(likelihoods) / len(likelihoods) if likelihoods else None,
        seconds=round(time.monotonic() - started, 2),
        version=f"{logged[0].task.VERSION}, lm_eval {_versions()['lm_eval']}",
    )
    return _write(benchmark, folder, records, score)


def _write(benchmark: Benchmark, folder: Path, records: list[QuestionRecord], score: TaskScore) -> TaskScore:
    path = folder / f"{benchmark.name}.json"
    path.unlink(missing_ok=True)  # or that of other answers would stand beside these, if we were stopped in between
    write_text(path.with_name(f"{benchmark.name}.jsonl"), "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    how = {"max_tokens": benchmark.entry.max_tokens} if isinstance(benchmark.entry, QuestionSet) else {}
    write_json(path, {"key": benchmark.key, **how, **grading([benchmark.entry]), "score": asdict(score)})
    return score


def _writes_special_tokens(benchmark: Benchmark, config: Config) -> bool:
    """Whether the prompts come from a chat template, which writes the special tokens (BOS too) itself."""
    if isinstance(benchmark.entry, str):
        return config.data.template == "chat" and benchmark.name.startswith("farss_")
    return prompt_of(benchmark.entry, benchmark.kind, config.data, None).complete


def _run(benchmark: Benchmark, tasks: dict[str, Any], live: Any, config: Config) -> list[Logged]:
    """Put the questions of one benchmark to the model through lm_eval's evaluator."""
    from lm_eval.evaluator import evaluate as harness_evaluate

    for task in tasks.values():
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(config.seed)
    chosen = None
    if benchmark.drawn is None and config.evaluate.limit is not None:
        chosen = _draw_places({name: len(task.eval_docs) for name, task in tasks.items()}, config.evaluate.limit, config.seed)
        tasks = {name: tasks[name] for name in chosen}
    results = harness_evaluate(
        live,
        {"tasks": tasks},
        samples=chosen,
        bootstrap_iters=0,
        confirm_run_unsafe_code=config.evaluate.run_generated_code,
    )
    return [Logged(name, task, results["samples"][name]) for name, task in tasks.items()]


def _load(benchmark: Benchmark, tokenizer: Any, config: Config, manager: Any) -> dict[str, Any]:
    """The harness tasks of a benchmark: one, or the members of a group.

    Raises:
        FarssError: the data cannot be loaded, or a package that the task needs is missing.
    """
    if isinstance(benchmark.entry, QuestionSet) and benchmark.drawn is not None:
        from lm_eval.api.task import ConfigurableTask

        prompt = prompt_of(benchmark.entry, benchmark.kind, config.data, tokenizer)
        return {benchmark.name: ConfigurableTask(config=task_settings(benchmark.entry, benchmark.drawn, prompt))}
    try:
        tasks: dict[str, Any] = manager.load([benchmark.name])["tasks"]
    except ImportError as error:
        raise FarssError(f"lm_eval's task {benchmark.name!r} needs a package that is not installed: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:  # no network, a gated, missing or changed data set, a broken cache
        raise FarssError(
            f"the data of lm_eval's task {benchmark.name!r} cannot be loaded ({first_line(error)}): connect to "
            "the hub once, or ask the same questions from a file: {name: ..., data: questions.jsonl}"
        ) from error
    if benchmark.name.startswith("farss_"):
        for task in tasks.values():
            task.set_config("doc_to_text", _training_prompt(task.config.doc_to_text, config.data, tokenizer))
            if config.data.template == "chat":
                task.set_config("generation_kwargs", task.config.generation_kwargs | {"until": answer_end(tokenizer)})
    return tasks


def _asked_as_now(benchmark: Benchmark, config: Config, tokenizer: Any, folder: Path) -> bool:
    """Whether its stored questions were put as they would be now; lm_eval's own prompts do not change."""
    if isinstance(benchmark.entry, QuestionSet) and benchmark.drawn:
        prompt = prompt_of(benchmark.entry, benchmark.kind, config.data, tokenizer)
        return asked_so(benchmark.drawn, prompt, read_records(folder, benchmark.name))
    if not benchmark.name.startswith("farss_"):
        return True
    before, _, behind = _training_prompt("asked", config.data, tokenizer)({"asked": ANSWER}).partition(ANSWER)
    prompts = [record["prompt"] for record in read_records(folder, benchmark.name)]
    return all(prompt.startswith(before) and prompt.endswith(behind) for prompt in prompts)


def _training_prompt(column: str, data: DataConfig, tokenizer: Any) -> Callable[[dict[str, Any]], str]:
    steps = STEPS.lstrip() if data.template == "chat" or not separator(data.template) else STEPS

    def prompt(doc: dict[str, Any]) -> str:
        return prompt_text(data.template, doc[column], tokenizer, data.system, data.thinking) + steps

    return prompt


def _draw_places(sizes: dict[str, int], limit: int, seed: int) -> dict[str, list[int]]:
    """Draw `limit` questions from all tasks of a benchmark; sorted, because lm_eval numbers them in that order."""
    drawn: dict[str, list[int]] = {}
    for name, place in choose([(name, place) for name, size in sizes.items() for place in range(size)], limit, seed):
        drawn.setdefault(name, []).append(place)
    return drawn


def _add_gold(ask: Callable[[list[Any]], list[tuple[float, bool]]], asked: Iterable[tuple[Logged, list[QuestionRecord]]]) -> None:
    """Fill in the log-likelihood (nats) of the first accepted answer, on the prompt that was asked."""
    from lm_eval.api.instance import Instance

    unknown = [
        (record, logged.task.config.target_delimiter + record["gold"][0])
        for logged, records in asked
        for record in records
        if record["gold_loglikelihood"] is None and record["gold"] and record["gold"][0].strip()
    ]
    requests = [Instance("loglikelihood", {}, (record["prompt"], gold), place) for place, (record, gold) in enumerate(unknown)]
    for (record, _), (likelihood, _) in zip(unknown, ask(requests) if requests else [], strict=True):
        record["gold_loglikelihood"] = likelihood


# --- results that are there already ----------------------------------------------------------------------------------


def _finished(folder: Path, benchmark: Benchmark) -> TaskScore | None:
    """The score of a benchmark that was asked before under the same key."""
    path = folder / f"{benchmark.name}.json"
    if not path.is_file():
        return None
    with reading(path, "score of a benchmark"):
        key, score = (found := read_json(path))["key"], TaskScore(**found["score"])
    if key not in (benchmark.key, *benchmark.earlier) or not has_records(folder, score):
        return None
    return score if key == benchmark.key else _grade_again(benchmark, folder, score)


def _grade_again(benchmark: Benchmark, folder: Path, score: TaskScore) -> TaskScore:
    """Other rules need no other answers."""
    assert isinstance(benchmark.entry, QuestionSet)
    grade = METRICS[benchmark.entry.metric]
    records = read_records(folder, benchmark.name)
    for record in records:
        record["score"] = grade(without_thoughts(record["answer"]), record["gold"])
    return _write(benchmark, folder, records, replace(score, score=sum(each["score"] for each in records) / len(records)))


def _text_loss(
    model: Any, tokenizer: Any, config: Config, identity: dict[str, Any], folder: Path, on_progress: PromptProgress | None
) -> float | None:
    """Mean token loss on the general text, or what was computed before under the same key; None without a text."""
    if config.evaluate.text is None:
        return None
    texts = text_rows(config.evaluate.text)
    texts = choose(texts, config.evaluate.text_rows or len(texts), config.seed)
    key = fingerprint({"texts": texts, "length": config.data.max_length, "identity": identity})
    path = folder / ".text_loss.json"
    if path.is_file() and (found := read_json(path)).get("key") == key:
        return float(found["text_loss"])
    report = (lambda done, total: on_progress("text", done, total)) if on_progress else None
    loss = text_loss(model, tokenizer, texts, config.evaluate.batch_size, config.data.max_length, report)
    write_json(path, {"key": key, "text_loss": loss})
    return loss


def _versions() -> dict[str, str]:
    from importlib.metadata import version
    from importlib.util import find_spec

    return {name: version(name) for name in ("lm_eval", "transformers", "torch") if find_spec(name)}
