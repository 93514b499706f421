"""What a run reads: the tokenizer, the examples, the questions and the model's shape. Each once by a process, whatever it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from farss.artifacts import Layer
from farss.config import REFERENCE, Config, DataConfig, EvaluateConfig, ModelConfig, QuestionSet, method_of_label
from farss.data import Tokenized, check_readable_by, load_examples, same_words
from farss.errors import ConfigError
from farss.models import empty_model, layer_shapes, load_tokenizer
from farss.plan import method_of
from farss.recovery import recovery_rows
from farss.rows import as_text, asked_without, knowledge_texts, question_rows, text_rows
from farss.tasks.benchmarks import list_benchmarks
from farss.tasks.reference import check_reference

Result = TypeVar("Result")


class Loaded(dict[tuple[str, str], Any]):
    """What this process has read already. Sent to another process it is empty: a tokenizer of a model's own code cannot be sent."""

    def __reduce__(self) -> tuple[type[Loaded], tuple[()]]:
        return Loaded, ()


@dataclass
class Inputs:
    """Of one run, and of the comparison it belongs to."""

    config: Config
    common_config: Config
    """Of what the runs of a comparison share."""
    loaded: Loaded

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return self._once(load_tokenizer, self.config.model)

    @cached_property
    def architecture(self) -> Any:
        """The model without its weights: what can be known of it before it is loaded."""
        return self._once(empty_model, self.config.model)

    @cached_property
    def shapes(self) -> tuple[dict[str, Layer], int]:
        """Target layers and number of blocks."""
        return self._once(layer_shapes, self.config.model)

    @cached_property
    def examples(self) -> Tokenized:
        """The tokenised training examples."""
        return self._examples(self.config)

    @cached_property
    def common_examples(self) -> Tokenized:
        """The examples that the shared statistics are estimated on."""
        return self._examples(self.common_config)

    def _examples(self, config: Config) -> Tokenized:
        def read(model: ModelConfig, data: DataConfig, seed: int) -> Tokenized:
            return load_examples(data, self.tokenizer, seed)

        return self._once(read, config.model, config.data, config.seed if config.data.limit else 0)  # all are the same with every seed

    @property
    def knowledge(self) -> list[str]:
        """The user's knowledge text; empty where none is named."""
        source = self.common_config.calibration.knowledge
        return self._once(knowledge_texts, source) if source else []

    def warnings(self) -> list[str]:
        """What is known before anything is done, and would be missed at the end."""
        config, found = self.config, [self.examples.cut] if self.examples.cut else []
        asked = {"knowledge": "lost", "task": "learned"}
        for kind, what in asked.items():
            if not getattr(config.evaluate, kind):
                found.append(f"No {kind} questions are given (evaluate.{kind}): nothing will say what was {what}.")
        if config.plan.boundary is not None and not (method_of(config.plan).boundary or config.compare.methods):
            found.append(f"plan.boundary={config.plan.boundary} has no effect: {config.plan.method} treats all blocks alike.")
        if config.model.targets and config.plan.method == REFERENCE and not config.compare.methods:
            found.append(f"model.targets={config.model.targets} has no effect: {REFERENCE} trains every weight.")
        methods = {config.plan.method, *map(method_of_label, config.compare.methods)}
        if config.model.quantization != "none" and REFERENCE in methods:
            found.append(
                f"model.quantization={config.model.quantization} does not hold for {REFERENCE}, which trains and answers with unquantised "
                "weights: what its K says is relative to the quantised model."
            )
        if config.evaluate.task and not config.evaluate.full_scores and REFERENCE not in methods:
            found.append(
                "T and KT will be missing: they are relative to full fine-tuning, or to another run in its place. Name its scores in "
                "evaluate.full_scores, or compare with full."
            )
        return found + self.warnings_of_questions()

    def warnings_of_questions(self) -> list[str]:
        """What speaks against what is asked: those that were trained, or protected."""
        config, found = self.config, list[str]()
        protected = {same_words(text) for text in self.knowledge}
        for entry in config.evaluate.asked:
            if isinstance(entry, QuestionSet):
                found += self._warnings_of(entry, protected)
        texts = text_rows(config.evaluate.text) if config.evaluate.text and protected else []
        if count := sum(same_words(text) in protected for text in texts):
            of_all = f"of the {len(texts):,} texts in {config.evaluate.text}"
            found.append(f"{count:,} {of_all} are in calibration.knowledge too, which some methods protect.")
        return found

    def _warnings_of(self, entry: QuestionSet, protected: set[int]) -> list[str]:
        """What speaks against a question set: `protected` are the texts of `calibration.knowledge`."""
        questions = self._questions(entry)
        trained = sum(same_words(row["question"]) in self.examples.instructions for row in questions)
        known = sum(any(same_words(as_text(row["question"], answer)) in protected for answer in row["answers"]) for row in questions)
        lengths = [self._shortest(row["answers"], entry.max_tokens) for row in questions]
        long = sum(length > entry.max_tokens for length in lengths)
        of_all = f"of the {len(questions):,} questions in {entry.data}"
        found = [f"{trained:,} {of_all} are training examples too."] if trained else []
        if beside := self._once(asked_without, entry):
            found.append(f"{entry.data} has a column {beside!r} beside {entry.question!r}, which is not asked.")
        as_trained = entry.prompt == "train" or (entry.prompt is None and entry in self.config.evaluate.task)
        lines = sum(all("\n" in answer.strip() for answer in row["answers"]) for row in questions)
        if lines and not as_trained and entry.metric != "number":
            found.append(
                f"The right answers to {lines:,} {of_all} have several lines, and an answer ends with its first: ask {entry.name!r} "
                "with prompt: train."
            )
        if known:
            found.append(f"{known:,} {of_all} are in calibration.knowledge too, which some methods protect: they saw the answers.")
        if long:
            found.append(
                f"The right answers to {long:,} {of_all} have more than max_tokens={entry.max_tokens} tokens, and cannot be given in "
                f"full: give {entry.name!r} max_tokens: {max(lengths)}."
            )
        return found

    def _shortest(self, answers: list[str], enough: int) -> int:
        """Tokens of the shortest answer; 0 where it has fewer bytes, and so fewer tokens, than is enough."""
        if any(len(answer.encode()) < enough for answer in answers):
            return 0
        return min(len(ids) for ids in self.tokenizer(answers, add_special_tokens=False).input_ids)

    def check(self) -> None:
        """Read all of it, so that a bad file is found before hours of training."""
        _ = self.tokenizer, self.examples, self.knowledge
        config = self.config
        others = config.evaluate.text or config.evaluate.recovery or config.calibration.knowledge or config.calibration.padding == "count"
        check_readable_by(self.architecture, self.examples, config.data, bool(others))
        self.check_questions()
        self.check_as_trained()
        self.check_reference()
        if self.config.evaluate.recovery:
            self._once(self._check_recovery, self.common_config)

    def check_reference(self) -> None:
        """Refuse a reference of T that was asked other questions.

        Raises:
            FarssError: see `farss.tasks.check_reference`.
        """
        if self.common_config.evaluate.full_scores:
            self._once(self._check_reference, self.common_config)

    def check_as_trained(self) -> None:
        """Refuse to ask the task otherwise than the examples do, where a set is asked in their chat.

        Raises:
            ConfigError: see `check_system` and `check_thinking`.
        """
        if self.config.data.template != "chat":
            return
        ours = [entry for entry in self.config.evaluate.task if isinstance(entry, QuestionSet) or entry.startswith("farss_")]
        if any(isinstance(entry, str) or entry.prompt in (None, "train") for entry in ours):
            self.check_system()
            self.check_thinking()

    def check_thinking(self) -> None:
        """Refuse to ask with thoughts what was trained without, or the other way round, or to measure by answers without them.

        Raises:
            ConfigError: with the cure.
        """
        data, share = self.config.data, self.examples.thoughtless
        if data.thinking and self.config.evaluate.learned_by == "likelihood":
            raise ConfigError(
                "evaluate.learned_by=likelihood, but with data.thinking=true a model writes its thoughts first, and how likely the right "
                "answer is without them says nothing: set evaluate.learned_by=score"
            )
        if share is None or data.thinking == self.examples.thinks:
            return
        if data.thinking:
            raise ConfigError(f"data.thinking=true, but {share:.0%} of the answers in {data.train} begin without thoughts: set it to false")
        raise ConfigError(
            f"{1 - share:.0%} of the answers in {data.train} begin with thoughts, and the model would be asked after empty ones: set "
            "data.thinking=true, and give max_tokens room for them"
        )

    def check_system(self) -> None:
        """Refuse to ask the task without the system message that every example has, or with another one.

        Raises:
            ConfigError: with both.
        """
        data, system = self.config.data, self.examples.system
        if system is not None and data.system != "" and (data.system or "") != system:
            begins = f"begins with the system message {system[:60]!r}" if system else "begins without a system message"
            asked = f"with {data.system[:60]!r}" if data.system else "without it"
            same = "set data.system to the same text, or " if system else "set "
            raise ConfigError(
                f"every example of {data.train} {begins}, and questions of the task would be asked {asked}: {same}data.system: '' to ask "
                "without (on a command line: data.system=\"''\")"
            )

    def _questions(self, entry: QuestionSet) -> list[dict[str, Any]]:
        return self._once(question_rows, entry)

    def check_questions(self) -> None:
        """Read every question file and the general text, and see that the questions can be asked."""
        config = self.common_config
        self._once(self._read_questions, config.evaluate, config.data, config.seed)

    def _read_questions(self, evaluate: EvaluateConfig, data: DataConfig, seed: int) -> None:
        list_benchmarks(Config(evaluate=evaluate, data=data, seed=seed), {})
        if evaluate.text:
            text_rows(evaluate.text)

    def _check_reference(self, config: Config) -> None:
        check_reference(config, self.tokenizer)

    def _check_recovery(self, config: Config) -> None:
        recovery_rows(config, self.tokenizer)

    def _once(self, read: Callable[..., Result], *options: Any) -> Result:
        key = read.__qualname__, repr(options)
        if key not in self.loaded:
            self.loaded[key] = read(*options)
        known: Result = self.loaded[key]
        return known
