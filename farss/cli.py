"""The command line: words to calls."""

from __future__ import annotations

import codecs
import dataclasses
import errno
import io
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from farss.config import Config
from farss.configfile import commented, load, override
from farss.errors import FarssError, UsageError
from farss.progress import bars, console
from farss.shown import exactness, handed_over, show_boundary, show_notes, show_places, show_pruning, show_run

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
errors = Console(stderr=True)

INTERRUPTED = 130
UNREACHABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
TUNE = [0.25, 0.5, 1, 2]
"""`compare.tune` of `farss compare --tune`."""

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file; `farss config` prints one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE | FILE.yaml ...]", help="Options to override, and run files whose options go on top."),
]


class Told(logging.Handler):
    """Warnings on stderr, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        print(f"{record.name.partition('.')[0]}: {record.getMessage()}", file=sys.stderr)  # which the bars make room for; rich's do not


def main() -> None:
    """Entry point: user errors become one sentence and an exit code, everything else is our bug and shows itself."""
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING, handlers=[Told()])
    codecs.register_error("farss", _spelt)
    for stream in (sys.stdout, sys.stderr):  # redirected on Windows, they take no "■"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="farss")
    try:
        app(standalone_mode=True)
    except FarssError as error:
        errors.print(f"[bold red]farss:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:  # a place that may not be entered, or a name that no file system takes
        if error.errno not in UNREACHABLE or error.filename is None:
            raise
        told = f"{str(error.filename)[:300]} cannot be reached ({error.strerror}): check the path and its permissions"
        errors.print(f"[bold red]farss:[/] {escape(told)}", highlight=False, soft_wrap=True)
        sys.exit(UsageError.exit_code)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # which is what typer makes of a Ctrl-C
            errors.print("farss: stopped; the same command continues where it was")
        raise


SPELT = dict(zip("−–■░▒▓█", "--#.:+#", strict=True))
"""Characters for those that an encoding does not have."""


def _spelt(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(SPELT.get(character, "?") for character in error.object[error.start : error.end]), error.end


# --- commands --------------------------------------------------------------------------------------------------------


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.print(f"farss {version('farss')}", highlight=False)
        raise typer.Exit


@app.callback()
def farss(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Fine-tune a language model on your data without losing what it knew. Each command but `report` does what is missing before it."""


@app.command()
def config() -> None:
    """Print a commented run file with every option."""
    sys.stdout.write(commented())


@app.command()
def methods() -> None:
    """List the fine-tuning methods."""
    from farss.methods import METHODS

    table = Table("method", "what it trains", box=None, pad_edge=False)
    for method in METHODS.values():
        facts = f"{method.title}; needs {method.needs_text}; exports as {'plain LoRA' if method.plain_lora else 'a whole model'}"
        table.add_row(f"[bold]{method.name}", f"{method.changes}\n[dim]{escape(facts)}")
    console.print(table)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder of the demo's runs.")] = Path("demo")) -> None:
    """Fine-tune the embedded tiny model with FARSS, FARSS-plus, LoRA and full fine-tuning, and show what each learned and forgot."""
    from farss.world.demo import demo_config

    _run(demo_config(str(out)))


@app.command()
def run(config: ConfigFile, overrides: Overrides = None) -> None:
    """Do everything: survey, plan, train, export, evaluate, report."""
    _run(_read(config, overrides, shared=True))


@app.command()
def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas; default: compare.methods, or farss,lora,full.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, separated by commas; default: compare.seeds.")] = None,
    tune: Annotated[bool, typer.Option("--tune", help=f"Tune every method's learning rate: compare.tune={TUNE}.")] = False,
) -> None:
    """Run several methods on the same model and data, and put them into one table."""
    wanted = _read(config, overrides, shared=True)
    extra = [*_given("compare.methods", methods, many=True), *_given("compare.seeds", seeds, many=True)]
    extra += [f"compare.tune={TUNE}"] if tune and not wanted.compare.tune else []
    wanted = override(wanted, extra)
    if not wanted.compare.methods:
        wanted = override(wanted, ["compare.methods=[farss, lora, full]"])
    _run(wanted)


@app.command()
def survey(config: ConfigFile, overrides: Overrides = None) -> None:
    """Collect what the method, or every method of a comparison, looks at before it is planned.

    For FARSS these are the Fisher statistics and the weights' decompositions. Under torchrun several processes share the work, for
    FARSS, FARSS-plus and FoRA; what else a comparison looks at is left to `farss compare` then.
    """
    from farss import processes
    from farss.compare import plans_of
    from farss.methods import SURVEY
    from farss.plan import method_of
    from farss.terminal import extremes_table, importance_table, survey_facts

    wanted = _read(config, overrides, shared=True)
    named = f"compare.methods={wanted.compare.methods}" if wanted.compare.methods else f"plan.method={wanted.plan.method}"
    plans = plans_of(wanted) or [wanted.plan]
    needs = [each for each in dict.fromkeys(method_of(plan).needs for plan in plans) if each]
    if not needs:
        raise UsageError(f"{named} looks at nothing before it is planned, so there is nothing to survey")
    if processes.started_as_several():
        needs = [each for each in needs if each.in_parts]
    if not needs:
        raise UsageError(f"{named} is surveyed in one process: start this command without torchrun")
    with processes.joined():
        first = processes.rank() == 0
        with _single(wanted, several=True, trains=False) as one:
            made = [one.surveys.of(each) for each in needs]
    if not first:
        return
    for each, found in zip(needs, made, strict=True):
        if each is SURVEY:
            console.print(importance_table(found))
            console.print(extremes_table(found))
        console.print(survey_facts(found), highlight=False)
    show_places({found.folder.name: found.folder for found in made})


@app.command()
def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Choose ranks and directions."""
    from farss.terminal import RankMap

    wanted = _read(config, overrides)
    with _single(wanted, trains=wanted.plan.boundary == "auto") as one:  # which is found by training
        made = one.plan()
    console.print(RankMap(made))
    for note in made.notes:
        console.print(note, highlight=False, markup=False)
    show_places({"plan": one.path / "plan.json"})


@app.command()
def boundary(config: ConfigFile, overrides: Overrides = None) -> None:
    """Find out by short probes how many blocks shall be shallow; `plan.boundary: auto` does it inside a run."""
    from farss.compare.entrants import settings_of
    from farss.plan import require_boundary

    wanted = _read(config, [*(overrides or []), "plan.boundary=auto"], shared=True)
    require_boundary(wanted.plan)
    if wanted.compare.methods and (own := settings_of(wanted, wanted.plan.method)):
        raise UsageError(
            f"compare.settings gives {wanted.plan.method!r} its own {', '.join(own)}, which this search would not have: set "
            f"plan.boundary=auto in {config} and use `farss compare`, which searches first"
        )
    with _single(wanted) as one:
        console.print(one.search_setting.sentence, highlight=False, soft_wrap=True)
        found = one.boundary()
        page = one.report()
    show_boundary(found)
    console.print(found.sentence, highlight=False, soft_wrap=True)
    show_places({"boundary": one.path / "boundary.json", "report": page})


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Fine-tune, after a survey and a plan where they are missing; a killed training continues from its newest checkpoint."""
    with _single(_read(config, overrides)) as one:
        one.warn()
        result = one.train()
    console.print(f"{result.steps} steps, loss {result.loss:.4f}, {result.seconds:.0f} s, peak memory {result.peak_memory_gib:.1f} GiB")
    if result.cut:
        console.print(result.cut, highlight=False, soft_wrap=True)
    zero = (one.folder.record("train") or {}).get("step_zero")
    if zero:
        found = ", ".join(f"{value:.1e} ({precision})" for precision, value in zero.items())
        console.print(
            f"before the first step, its logits differed from the base model's by at most {found}", highlight=False, soft_wrap=True
        )
    show_places({"training state": one.path / "checkpoints"})


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Ask the questions before and after, and compute K, T and KT; trains first where nothing is trained."""
    from farss.terminal import summary_table

    wanted = _read(config, overrides)
    if not wanted.evaluate.asks:
        raise UsageError(f"{config} asks nothing: name questions in evaluate.knowledge and evaluate.task, or a file in evaluate.text")
    with _single(wanted, within=False) as one:
        one.warn()
        summary = one.evaluate()
    console.print(summary_table(summary))
    show_notes(summary.notes)
    show_places({"scores": one.path / "scores.json", "answers": one.path / "scores"})


@app.command()
def export(
    config: ConfigFile,
    overrides: Overrides = None,
    to: Annotated[str | None, typer.Option(help="peft, gguf or merged; default: export.to.")] = None,
    rank: Annotated[int | None, typer.Option(help="Compress to this rank; default: export.rank.")] = None,
    energy: Annotated[float | None, typer.Option(help="Compress to this share of each change; default: export.energy.")] = None,
) -> None:
    """Write the portable adapter (or the merged model), checked on the untouched base; trains first where nothing is trained."""
    extra = [*_given("export.to", to), *_given("export.rank", rank), *_given("export.energy", energy)]
    with _single(_read(config, [*(overrides or []), *extra])) as one:
        one.warn()
        target = one.export()
    facts = one.folder.record("export") or {}
    if "rank" in facts:
        console.print(exactness(facts), soft_wrap=True)
    elif "logit_difference" in facts:
        console.print(
            f"its weights are rounded as the base's are: logits differ from the trained model's by at most "
            f"{facts['logit_difference']:.1e} (float32)",
            soft_wrap=True,
        )
    show_places({target.name: target})


@app.command()
def prepare(config: ConfigFile, overrides: Overrides = None) -> None:
    """Write a start for another trainer: a base without the start, and the adapter to train on it."""
    with _single(_read(config, overrides)) as one:
        target = one.prepared()
    show_places({"base to train on": target / "base", "adapter to train": target / "adapter", "then": target / "README.md"})


@app.command()
def convert(
    prepared: Annotated[Path, typer.Argument(help="What `farss prepare` wrote.")],
    trained: Annotated[Path, typer.Argument(help="The adapter as the other trainer wrote it.")],
    out: Annotated[Path, typer.Argument(help="New folder for the portable adapter.")],
    rank: Annotated[int | None, typer.Option(help="Compress to this rank.")] = None,
    energy: Annotated[float | None, typer.Option(help="Compress to this share of each change.")] = None,
) -> None:
    """Turn an adapter that was trained on a prepared base into a plain LoRA on the original base."""
    from farss.models import quiet
    from farss.prepared import convert as turn

    quiet()
    done = turn(prepared, trained, out, rank, energy)
    console.print(exactness(done.facts), soft_wrap=True)
    show_places({"adapter": out})


@app.command()
def prune(
    config: ConfigFile,
    overrides: Overrides = None,
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas; default: prune.methods.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of the blocks to delete; default: prune.ratio.")] = None,
) -> None:
    """Delete whole blocks (TRSP): an ordinary model folder that is smaller and faster, and a table of what that cost."""
    from farss.folder import alone, run_folder
    from farss.pruning import prune as made

    _refuse_several()
    extra = [*_given("prune.methods", methods, many=True), *_given("prune.ratio", ratio)]
    wanted = _read(config, [*(overrides or []), *extra], shared=True)
    with alone(run_folder(wanted)), bars() as tell:
        folder = made(wanted, tell)
    show_pruning(folder)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file, or the folder of a run or a comparison.")],
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Draw report.html and its figures again from what the folder holds; of a comparison that is not finished, with a table so far. Of a
    pruning the table is all there is."""
    import webbrowser

    from farss.folder import read_config, run_folder
    from farss.report import write_report

    if overrides and folder.is_dir():
        raise UsageError(f"{folder} is a folder, and a folder has no options to override: give its config.yaml instead")
    place = run_folder(read_config(folder, overrides or ())) if folder.is_file() else folder
    if (place / "pruning.json").is_file():
        show_pruning(place)
        return
    _update_table(place)
    page = write_report(place)
    show_run(place)
    show_places({"report": page, "figures": place / "figures"})
    if show and not webbrowser.open(page.resolve().as_uri()):
        console.print("no browser was found: open the page yourself", highlight=False)


@app.command()
def gemma(folder: Annotated[Path, typer.Argument(help="New folder for the model.")]) -> None:
    """Write Gemma 3 270M (from the packages of the extra `gemma`) as an ordinary model folder."""
    from farss.gemma import convert
    from farss.models import quiet

    quiet()
    show_places({"model": convert(folder)})


# --- shared ----------------------------------------------------------------------------------------------------------


def _update_table(folder: Path) -> None:
    """Write the table of a comparison that is not finished."""
    from farss.compare import write_so_far

    try:
        config = load(folder / "config.yaml")
    except FarssError:
        return  # what lies there can be shown without
    if config.compare.methods:
        write_so_far(dataclasses.replace(config, out=str(folder)))


def _given(key: str, value: Any, many: bool = False) -> list[str]:
    """An option of the command line as an override; nothing where it is not given.

    Args:
        many: the value is a list, separated by commas.
    """
    if isinstance(value, str) and not value.strip(" ,"):
        raise UsageError(f"--{key.rpartition('.')[2]} is empty: give it a value, or leave it out")
    return [] if value is None else [f"{key}=[{value}]" if many else f"{key}={value}"]


def _read(path: Path, overrides: Iterable[str] | None, shared: bool = False) -> Config:
    """The options of a command.

    Args:
        shared: what it does may be done for a comparison, before all of its runs.
    """
    from farss.compare import check_labels
    from farss.folder import read_config

    values = read_config(path, overrides or ())
    if values.compare.methods and not shared:
        raise UsageError(
            f"{path} compares methods, and this is a step of a single run: use `farss compare`, or add compare.methods=[] and another out"
        )
    check_labels(values)
    return values


@contextmanager
def _single(values: Config, several: bool = False, within: bool = True, trains: bool = True) -> Iterator[Any]:
    """A run of one step, with its progress bars.

    Args:
        several: the step may run in several processes.
        within: it may be done for one run of a comparison.
        trains: see `Run.claim`.
    """
    from farss.compare import plans_of, run_within
    from farss.folder import alone, run_folder
    from farss.pipeline import Run

    if not several:
        _refuse_several()
    with alone(run_folder(values)), bars() as tell, ExitStack() as stack:
        found = run_within(values, tell)
        if found and not within:
            raise _belongs(found)
        compared = found and dataclasses.replace(found, config=dataclasses.replace(found.config, export=found.common_config.export))
        if compared and compared.shared and not compared.complete:
            stack.enter_context(alone(compared.shared))  # the comparison may be at this very run
        one = found or Run(values, tell=tell, beside=plans_of(values))
        one.claim(trains)
        yield one


def _refuse_several() -> None:
    from farss import processes

    if processes.started_as_several():
        raise UsageError("only `farss survey` runs in several processes: start this command without torchrun")


def _belongs(run: Any) -> UsageError:
    """A comparison scores all of its runs by one full fine-tuning and one choice of questions, which a single run does not know."""
    from farss.folder import command

    return UsageError(
        f"{run.path} is a run of the comparison above it: `{command('compare', run.path.parent)}` goes on with it, "
        f"and `{command('export', run.path)}` hands it over in another form"
    )


def _run(config: Config) -> None:
    from farss.compare import run_within
    from farss.folder import alone, run_folder
    from farss.pipeline import Run

    _refuse_several()
    if config.compare.methods:
        _run_comparison(config)
        return
    with alone(run_folder(config)), bars() as tell:
        if within := run_within(config, tell):
            raise _belongs(within)
        one = Run(config, tell=tell)
        one.all()
    show_run(one.path)
    made = handed_over(one.path)
    show_places({made.name: made, "report": one.path / "report.html", "everything": one.path})


def _run_comparison(config: Config) -> None:
    from farss.compare import compare
    from farss.files import read_json
    from farss.folder import alone, run_folder

    with alone(run_folder(config)), bars() as tell:
        folder = compare(config, tell)
    show_run(folder)
    places = {"table": folder / "comparison.md", "report": folder / "report.html"}
    rows = read_json(folder / "comparison.json")["rows"] if config.compare.keep == "all" else []
    places |= {f"{row['method']} (seed {row['seed']})": handed_over(folder / row["folder"]) for row in rows}
    show_places(places)


if __name__ == "__main__":
    main()
