"""The `qflare-simulate` command: init, run, compare, replay, export.

Exit codes: 0 success, 1 failure (the message states the cause and the remedy), 2 wrong usage, 130 interrupted.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Final

import qflare
from qflare.command_line import (
    ArgumentParser,
    protect_process,
    report_failure,
    run_program,
    whole,
)
from qflare.terminal import say, show_uncaught
from qflare_server.config import ConfigError
from qflare_server.errors import QflareError
from qflare_server.keys.secret_files import KeyStoreError
from qflare_server.storage.schema import SchemaError
from qflare_simulation import tables
from qflare_simulation.config import SimulationConfig
from qflare_simulation.coordinator import open_coordinator
from qflare_simulation.counterfactuals import replay, table
from qflare_simulation.errors import SimulationError
from qflare_simulation.history import History, compare
from qflare_simulation.programs import find_evaluation, run_file
from qflare_simulation.terminal import Progress

PROGRAM: Final = "qflare-simulate"
DESCRIPTION: Final = (
    "Simulate federated training on one machine, through the coordinator's own code."
)
EPILOG: Final = """examples:
  qflare-simulate init digits
  qflare-simulate run digits/config.toml --plot curves.png --model final.safetensors
  qflare-simulate compare digits/config.toml robust.toml --plot both.png
"""
FAILURES: Final = (SimulationError, QflareError, ConfigError, KeyStoreError, SchemaError, OSError)
REMEDY: Final = "docs/simulation.md describes every setting"


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    root = ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=qflare.__version__)
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    _add_init(commands)
    _add_run(commands)
    _add_compare(commands)
    _add_replay(commands)
    _add_export(commands)
    return root


def _add_init(commands: Any) -> None:
    init = commands.add_parser("init", help="write an example: config.toml and train.py")
    init.add_argument("folder", type=Path, help="new or empty folder")
    init.set_defaults(run=_init)


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="simulate one configuration")
    run.add_argument("config", type=Path, help="settings, .toml or .json")
    _add_overrides(run)
    run.add_argument("--folder", type=Path, help="new folder to keep the coordinator's database in")
    run.add_argument("--plot", type=Path, metavar="FILE", help="curves as .png or .svg")
    run.add_argument("--model", type=Path, metavar="FILE", help="last version as .safetensors")
    run.add_argument("--export", type=Path, metavar="DIR", help="every table of the history")
    run.add_argument(
        "--format", choices=["csv", "parquet"], default="csv", help="of --export (csv)"
    )
    run.add_argument("--tensorboard", type=Path, metavar="DIR", help="folder for event files")
    run.add_argument("--mlflow", metavar="URI", help="tracking server or folder")
    run.add_argument("--experiment", default="qflare", help="MLflow experiment (qflare)")
    run.set_defaults(run=_run)


def _add_compare(commands: Any) -> None:
    several = commands.add_parser(
        "compare", help="simulate several configurations and draw one metric of all in one picture"
    )
    several.add_argument("configs", type=Path, nargs="+", metavar="config")
    _add_overrides(several)
    several.add_argument("--plot", type=Path, metavar="FILE", required=True, help=".png or .svg")
    several.add_argument("--metric", default="test_accuracy", help="metric to draw (test_accuracy)")
    several.set_defaults(run=_compare)


def _add_replay(commands: Any) -> None:
    again = commands.add_parser(
        "replay", help="what other settings would have made of the rounds of a training session"
    )
    _add_database(again)
    again.add_argument("--strategy", default="", help="another rule, with its default parameters")
    again.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="another setting, such as rounds.quorum=8; repeatable",
    )
    again.add_argument(
        "--config",
        type=Path,
        help="configuration of a simulation whose evaluation and data measure the versions",
    )
    again.set_defaults(run=_replay)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export", help="write the history of a training session as CSV or Parquet"
    )
    _add_database(export)
    export.add_argument("folder", type=Path, help="where the tables are written")
    export.add_argument("--format", choices=["csv", "parquet"], default="csv", help="(csv)")
    export.set_defaults(run=_export)


def _add_database(command: argparse.ArgumentParser) -> None:
    command.add_argument("session", help="id, beginning of an id, or name of a training session")
    command.add_argument("--data-dir", type=Path, help="folder of the coordinator or a simulation")
    command.add_argument("--database-url", help="sqlite:///FILE or postgresql://...")


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument("--devices", type=whole(1), help="number of virtual devices")
    command.add_argument("--seed", type=whole(0), help="seed of everything that is drawn")
    command.add_argument(
        "--workers", type=whole(-1, 1024), help="processes; 0: one a processor, -1: none"
    )


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    wanted = {name: getattr(options, name) for name in ("devices", "seed", "workers")}
    return {name: value for name, value in wanted.items() if value is not None}


def _init(options: argparse.Namespace) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    if any(options.folder.iterdir()):
        raise SimulationError(f"{options.folder} is not empty; name a new folder")
    with as_file(files("qflare_simulation") / "template") as template:
        for name in ("config.toml", "train.py"):
            shutil.copyfile(template / name, options.folder / name)
    say(f"next: {PROGRAM} run {options.folder / 'config.toml'}")


def _simulated(path: Path, options: argparse.Namespace, folder: Path | None = None) -> History:
    with Progress(path.stem) as progress:
        return run_file(path, folder=folder, notice=progress, **_overrides(options))


def _run(options: argparse.Namespace) -> None:
    done = _simulated(options.config, options, options.folder)
    for line in str(done).splitlines():
        say(line)
    if options.plot:
        done.plot(options.plot)
    if options.model:
        done.save_model(options.model)
    if options.export:
        done.export(options.export, options.format)
    if options.tensorboard:
        done.tensorboard(options.tensorboard)
    if options.mlflow:
        done.mlflow(options.mlflow, options.experiment)
    if options.folder:
        say(f"training session: {done.session_id}")


def _compare(options: argparse.Namespace) -> None:
    done = [_simulated(path, options) for path in options.configs]
    compare(done, options.plot, options.metric)
    for item in done:
        final = item.final().get(options.metric)
        say(f"{item.name}: {options.metric} {'none' if final is None else f'{final:.4f}'}")


def _replay(options: argparse.Namespace) -> None:
    evaluate, test = None, None
    if options.config:
        evaluate, test = find_evaluation(SimulationConfig.read(options.config))
    with open_coordinator(options.data_dir, options.database_url) as parts:
        session_id = parts.use_cases.training.find_id(options.session)
        rounds = replay(
            parts.context,
            session_id,
            strategy=options.strategy,
            settings=options.settings,
            evaluate=evaluate,
            test=test,
        )
    for line in table(rounds):
        say(line)


def _export(options: argparse.Namespace) -> None:
    with open_coordinator(options.data_dir, options.database_url) as parts:
        session_id = parts.use_cases.training.find_id(options.session)
        found = tables.read(parts.database, session_id)
    for path in tables.write(options.folder, found, options.format):
        say(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code.

    Args:
        argv: Arguments without the program name; None means those of the process, which is then protected.
    """
    if argv is None:
        protect_process()  # replay and export open a coordinator's data folder
    sys.excepthook = show_uncaught
    return run_program(partial(_run_command, argv), _reported, FAILURES)


def _run_command(argv: Sequence[str] | None) -> None:
    options = parser().parse_args(argv)
    options.run(options)


def _reported(error: Exception) -> int:
    report_failure(PROGRAM, str(error), REMEDY)
    return 1


if __name__ == "__main__":
    sys.exit(main())
