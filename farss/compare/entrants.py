"""Who takes part in a comparison: a method or a variant, a learning rate, a seed."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from farss.config import Config, PlanConfig, is_reference, method_of_label
from farss.configfile import from_dict, set_key
from farss.errors import ConfigError, nearest
from farss.files import fingerprint
from farss.folder import resolve
from farss.inputs import Loaded
from farss.jobs import Tell
from farss.methods import METHODS
from farss.options import READING_KEYS, matters, options_of
from farss.pipeline import Run
from farss.plan import method_of

Item = tuple[str, float | None, int, Config, Loaded]
"""An entrant, as another process is told of it."""
ASKED = ("model.path", "model.dtype", "model.quantization", "evaluate.", "data.template", "data.system", "data.thinking", "data.max_length")
"""Options that change the untouched model's answers."""


@dataclass
class Entrant:
    """One run of a comparison.

    A label is a method's name, or such a name with `@` and a word behind it for a variant, whose options are in
    `compare.settings`.
    """

    label: str
    factor: float | None
    """Of the learning rate; None: as it is configured."""
    seed: int
    config: Config
    """The comparison's."""
    loaded: Loaded = field(repr=False)
    tell: Tell

    def __post_init__(self) -> None:
        out, common = Path(self.config.out), configured(self.config, self.label)
        own, name = replace(common, seed=self.seed), f"{self.label}-seed{self.seed}"
        if self.factor is not None:
            own = replace(own, train=replace(own.train, learning_rate=own.train.learning_rate * self.factor))
            name = f"{self.label}-lr{own.train.learning_rate:g}-seed{self.seed}"
        needs = method_of(own.plan).needs
        keys = READING_KEYS[needs.of] if needs else ()
        looks = options_of(common, keys)
        same = looks == options_of(self.config, keys)
        shared = {"evaluate-base", "recover-base", "train recover-base"}
        shared |= {"own text", *([needs.name] if needs else [])} if same else set()

        def named(step: str, done: int, total: int, line: str) -> None:
            self.tell(step if step in shared else f"{name.rpartition('-')[0]} seed {self.seed}: {step}", done, total, line)

        self.run = Run(
            replace(own, out=str(out / name)),
            shared=out,
            shared_config=common,
            statistics_folder=None if same else out / f"statistics-{fingerprint(looks)[:8]}",
            label=self.label,
            beside=plans_of(self.config),
            tell=named,
            loaded=self.loaded,
        )

    @property
    def item(self) -> Item:
        """Of what another process makes the same entrant."""
        return self.label, self.factor, self.seed, self.config, self.loaded

    @property
    def method(self) -> str:
        """The method's name."""
        return self.run.config.plan.method


def configured(config: Config, label: str) -> Config:
    """The options of a label's runs, before their seed and a tuned learning rate: those of what they share."""
    values = asdict(config)
    for key, value in _options(config, label).items():
        set_key(values, key, value)
    if has_own_full(config):
        values["evaluate"]["full_scores"] = None
    if not METHODS[method_of_label(label)].plain_lora:  # the others' adapters are compressed
        values["export"] |= {"rank": None, "energy": None}
    return resolve(from_dict(values | {"compare": {}}))


def settings_of(config: Config, label: str) -> dict[str, Any]:
    """The options that differ for a label: a variant has those of its method, unless its own say otherwise."""
    settings = config.compare.settings
    return settings.get(method_of_label(label), {}) | settings.get(label, {})


def _options(config: Config, label: str) -> dict[str, Any]:
    """The same, with its method."""
    return {"plan.method": method_of_label(label)} | settings_of(config, label)


def has_own_full(config: Config) -> bool:
    """Whether full fine-tuning takes part: T is relative to it, whatever `evaluate.full_scores` names."""
    return any(is_reference(label) for label in config.compare.methods)


def plans_of(config: Config) -> list[PlanConfig]:
    """The plan of every method and variant."""
    return [_plan(config, label) for label in config.compare.methods]


def _plan(config: Config, label: str) -> PlanConfig:
    """Their plan alone, which is asked for often."""
    options = _options(config, label)
    return replace(config.plan, **{key.removeprefix("plan."): value for key, value in options.items() if key.startswith("plan.")})


def seeds(config: Config) -> list[int]:
    """The seeds of a comparison."""
    return config.compare.seeds or [config.seed]


def factors(config: Config) -> list[float | None]:
    """Of every method's learning rate, with the first seed; None: as it is configured."""
    return [*config.compare.tune] or [None]


def check_labels(config: Config) -> None:
    """Refuse a variant that would be the plain method under another name.

    Raises:
        ConfigError: a variant has no options, or options are given for a method that there is not, without their sections, or of
            what all share.
    """
    settings = config.compare.settings
    for label in config.compare.methods:
        if not re.fullmatch(r"[\w-]+(@[\w.+-]+)?", label):
            raise ConfigError(f"compare.methods names {label!r}: give a method, or a method, @ and a word of letters, digits and - . + _")
        if (method := method_of_label(label)) not in METHODS:
            raise ConfigError(f"compare.methods names {label!r}, which is no method: {nearest(method, METHODS)}")
        if "@" in label and not settings.get(label):
            variants = [known for known in settings if "@" in known and known != label]
            cure = nearest(label, variants) if variants else "add them"
            raise ConfigError(f"compare.methods names the variant {label!r}, and compare.settings has no options for it: {cure}")
    for label, options in settings.items():
        if method_of_label(str(label)) not in METHODS:
            raise ConfigError(f"compare.settings has options for {label!r}, which is no method: {nearest(str(label), METHODS)}")
        if not isinstance(options, dict) or any("." not in str(key) for key in set(options) - {"seed", "out"}):
            raise ConfigError(f"compare.settings.{label}={options!r}: write its options as train.learning_rate: 1e-4, with their sections")
        for key in options:
            if key in ("seed", "out") or key.startswith("compare."):
                raise ConfigError(f"compare.settings gives {label!r} its own {key}, which is the comparison's: see compare.seeds")
            if key == "plan.method":
                raise ConfigError(f"compare.settings gives {label!r} another method: name {options[key]!r} in compare.methods")
            if key.startswith(ASKED) and matters(key):
                raise ConfigError(
                    f"compare.settings gives {label!r} its own {key}, but all are compared with one untouched model, asked once"
                )
            if key == "train.precision" and config.evaluate.recovery:
                raise ConfigError(
                    f"compare.settings gives {label!r} its own {key}, but the steps of evaluate.recovery are the same for all: set "
                    "train.precision for all, or evaluate.recovery=0"
                )
    for label in settings:
        configured(config, label)
