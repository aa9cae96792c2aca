"""The `qflare-client` command: init, enroll, rotate, run, status, evidence, verify.

Exit codes: 0 success, 1 the command failed (the message states the reason), 2 wrong usage, 130 interrupted.
"""

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import threading
import tomllib
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import qflare
from qflare.command_line import (
    ArgumentParser,
    address,
    on_signals,
    protect_process,
    run_program,
    seconds,
    whole,
)
from qflare.crypto.signing import (
    ONLINE_ALGORITHMS,
    Algorithm,
    InvalidKeyError,
    algorithm_named,
    algorithm_names,
)
from qflare.files import private_opener
from qflare.terminal import LogFormatter, printable, say, show_uncaught
from qflare_client.access.enrollment import enroll, read_bundle
from qflare_client.analytics import Analytics
from qflare_client.client import Client
from qflare_client.errors import InvalidArgumentError
from qflare_client.failures import report
from qflare_client.keystore.identity import read_facts
from qflare_client.loop import RunSummary, run
from qflare_client.models.upload import Receipt
from qflare_client.project import create_project
from qflare_client.rpc.tls import Tls
from qflare_client.secure_aggregation import SecureAggregation
from qflare_client.terminal import ProgressBar
from qflare_client.trust.verification import verify_file

_PROGRAM = "qflare-client"
_HOME_VARIABLE = "QFLARE_HOME"
_PASSPHRASE_FILE_VARIABLE = "QFLARE_PASSPHRASE_FILE"  # noqa: S105  # a name

_NAMES = "|".join(algorithm_names(ONLINE_ALGORITHMS))

_EXAMPLES = """\
examples:
  qflare-client init first-project
  qflare-client enroll bundle.json --home device1 --device-type hospital_server
  qflare-client run mytraining:train --home device1 --training-session digits
  qflare-client status --home device1
  qflare-client evidence digits --home device1 --output evidence.json
  qflare-client verify evidence.json --root-key-id HEX --model final.safetensors

The folder in --home (or QFLARE_HOME) holds the device's private keys: keep it on this device. A passphrase
for them is read from the file in --passphrase-file (or QFLARE_PASSPHRASE_FILE).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: Command-line arguments without the program name; None means those of the process, which is then
            protected.
    """
    if arguments is None:
        protect_process()
    sys.excepthook = show_uncaught
    return run_program(partial(_run_command, arguments), _reported)


def _run_command(arguments: Sequence[str] | None) -> None:
    options = parser().parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(logging.BASIC_FORMAT))
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, handlers=[handler]
    )
    options.command(options)


def _reported(error: Exception) -> int:
    report(_PROGRAM, error)
    return 1


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    root = ArgumentParser(
        prog=_PROGRAM,
        description="Enroll and run a QFLARE device.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=qflare.__version__)
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    _add_init(commands)
    _add_enroll(commands)
    _add_rotate(commands)
    _add_run(commands)
    _add_status(commands)
    _add_evidence(commands)
    _add_verify(commands)
    return root


def _add_init(commands: Any) -> None:
    text = "Write a device program, a session configuration and a first model into a new folder."
    parser = commands.add_parser(
        "init",
        help="create a new project",
        description=text,
        epilog="example:\n  qflare-client init first-project",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_init, verbose=False)
    parser.add_argument("project", type=Path, metavar="PROJECT", help="new or empty folder")


def _add_command(
    commands: Any, name: str, command: Callable[[argparse.Namespace], None], text: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  qflare-client {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    home = Path(os.environ.get(_HOME_VARIABLE, "qflare-device"))
    parser.add_argument("--home", type=Path, default=home, help="key store (%(default)s)")
    parser.add_argument("--verbose", action="store_true", help="log progress")
    return parser


def _add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", type=address, help="coordinator, host:port; default: that of the bundle"
    )
    parser.add_argument(
        "--ca-file", type=Path, help="PEM certificate authorities of the coordinator"
    )
    parser.add_argument("--certificate-file", type=Path, help="PEM certificate of this device")
    parser.add_argument("--key-file", type=Path, help="PEM key of the certificate")
    parser.add_argument("--insecure", action="store_true", help="use plaintext with any address")
    parser.add_argument("--passphrase-file", type=Path, help="file with the key store's passphrase")


def _add_enroll(commands: Any) -> None:
    parser = _add_command(
        commands,
        "enroll",
        _enroll,
        "Enroll this device with the bootstrap bundle of an administrator.",
        "bundle.json --home device1 --capability ram_mib=4096",
    )
    parser.add_argument("bundle", type=Path, help="bootstrap bundle (JSON)")
    parser.add_argument("--device-type", default="", help="kind of device, such as phone")
    parser.add_argument(
        "--capability",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        type=_capability,
        help="number used for device selection; repeatable",
    )
    parser.add_argument("--algorithm", type=_algorithm, metavar=_NAMES, help="of the signature key")
    parser.add_argument(
        "--server-algorithm",
        action="append",
        type=_algorithm,
        metavar="NAME",
        help="accept only this algorithm of the coordinator's keys; repeatable",
    )
    _add_connection(parser)


def _add_rotate(commands: Any) -> None:
    parser = _add_command(
        commands,
        "rotate",
        _rotate,
        "Replace this device's keys, optionally with another algorithm.",
        "--home device1 --algorithm ml-dsa-65-ed25519",
    )
    parser.add_argument(
        "--algorithm",
        type=_algorithm,
        metavar=_NAMES,
        help="of the new key; default: the current one",
    )
    _add_connection(parser)


def _add_run(commands: Any) -> None:
    parser = _add_command(
        commands,
        "run",
        _run,
        "Take part in training until the training session ends.",
        "mytraining:train --home device1 --evaluate mytraining:evaluate",
    )
    trainer = parser.add_mutually_exclusive_group(required=True)
    trainer.add_argument(
        "train", type=_function, nargs="?", metavar="MODULE:FUNCTION", help="trains"
    )
    trainer.add_argument(
        "--flower-app", type=Path, metavar="FOLDER", help="Flower app whose ClientApp trains"
    )
    parser.add_argument("--evaluate", type=_function, metavar="MODULE:FUNCTION", help="measures")
    for name, text in (("run", "the app's own configuration"), ("node", "this device")):
        parser.add_argument(
            f"--{name}-config",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            type=_toml_pair,
            help=f"of a Flower app: value of {text}, in TOML; repeatable",
        )
    parser.add_argument(
        "--no-evaluation", action="store_true", help="of a Flower app: evaluate no version"
    )
    parser.add_argument(
        "--training-session",
        metavar="SESSION",
        help="training session: id, beginning of an id, or name; default: any",
    )
    parser.add_argument(
        "--patience",
        type=seconds(0),
        default=900.0,
        metavar="SECONDS",
        help="longest tolerated outage",
    )
    parser.add_argument(
        "--on-failure",
        choices=("stop", "continue"),
        default="stop",
        help="whether a failed training or evaluation ends the command (%(default)s)",
    )
    parser.add_argument(
        "--analytics",
        action="append",
        default=[],
        metavar="COLUMN=MODULE:FUNCTION",
        type=_column,
        help="returns the values of a column for federated analytics; repeatable",
    )
    parser.add_argument(
        "--analytics-policy",
        type=Path,
        metavar="FILE",
        help="which queries this device answers (TOML, see docs/analytics.md)",
    )
    parser.add_argument(
        "--secure-aggregation-policy",
        type=Path,
        metavar="FILE",
        help="what secure aggregation a task must require (TOML, see docs/secure-aggregation.md); others are refused",
    )
    _add_connection(parser)


def _add_status(commands: Any) -> None:
    parser = _add_command(
        commands,
        "status",
        _status,
        "Show the device and its state at the coordinator.",
        "--home device1",
    )
    parser.add_argument("--offline", action="store_true", help="show local facts only")
    _add_connection(parser)


def _add_evidence(commands: Any) -> None:
    parser = _add_command(
        commands,
        "evidence",
        _evidence,
        "Export evidence with which an auditor can verify a training session's versions offline.",
        "ID --home device1 --output evidence.json",
    )
    parser.add_argument(
        "training_session", metavar="SESSION", help="id, beginning of an id, or name"
    )
    parser.add_argument("--output", type=Path, default=Path("evidence.json"), help="output file")
    _add_connection(parser)


def _add_verify(commands: Any) -> None:
    parser = _add_command(
        commands,
        "verify",
        _verify,
        "Verify a bundle or an evidence file offline, trusting only the root key ids.",
        "evidence.json --bundle bundle.json --model final.safetensors",
    )
    parser.add_argument("evidence", type=Path, help="verification bundle or evidence file")
    parser.add_argument("--bundle", type=Path, help="bootstrap bundle that names the root keys")
    parser.add_argument(
        "--root-key-id", action="append", default=[], metavar="HEX", help="repeatable"
    )
    parser.add_argument(
        "--threshold", type=whole(1, 8), default=1, help="required number of root signatures"
    )
    parser.add_argument(
        "--model", type=Path, help=".safetensors file to compare with the last version"
    )
    parser.add_argument(
        "--at",
        type=_moment,
        metavar="TIME",
        help="time at which the keys must be valid, ISO 8601 with time zone; default: now",
    )


def _enroll(options: argparse.Namespace) -> None:
    facts = enroll(
        read_bundle(options.bundle),
        home=options.home,
        address=options.address,
        device_type=options.device_type,
        capabilities=dict(options.capability),
        passphrase=_passphrase(options),
        tls=_tls(options),
        insecure=options.insecure,
        algorithm=options.algorithm,
        server_algorithms=options.server_algorithm or ONLINE_ALGORITHMS,
    )
    named = f"{printable(facts.device_name)} ({facts.device_id})"
    say(f"enrolled as {named if facts.device_name else facts.device_id} in realm {facts.realm}")


def _rotate(options: argparse.Namespace) -> None:
    with _client(options) as client:
        count = client.rotate_keys(options.algorithm)
    algorithm = read_facts(options.home)["signature_algorithm"]
    say(f"rotated to keys number {count}, {algorithm}")


def _run(options: argparse.Namespace) -> None:
    train, evaluate = _trainers(options)
    if bool(options.analytics) != (options.analytics_policy is not None):
        raise InvalidArgumentError("--analytics and --analytics-policy are given together")
    policies: dict[str, Any] = {}
    if options.analytics_policy is not None:
        policies["analytics"] = Analytics.from_file(options.analytics_policy)
    if options.secure_aggregation_policy is not None:
        policies["secure_aggregation"] = SecureAggregation.from_file(
            options.secure_aggregation_policy
        )
    stop = threading.Event()
    on_signals((signal.SIGTERM,), stop.set)
    named = options.training_session
    with _client(options, **policies) as client:
        summary = run(
            client,
            train,
            evaluate=evaluate,
            training_session_id=named and client.find_session(named),
            stop=stop,
            patience_s=options.patience,
            on_receipt=_say_receipt,
            on_failure=options.on_failure,
            analytics=dict(options.analytics),
        )
    say(_summary(summary))


def _trainers(
    options: argparse.Namespace,
) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """Return the functions that train and evaluate."""
    if options.flower_app is None:
        if options.run_config or options.node_config or options.no_evaluation:
            raise InvalidArgumentError(
                "--run-config, --node-config and --no-evaluation are of --flower-app"
            )
        return options.train, options.evaluate
    from qflare_client.flower import flower_device  # noqa: PLC0415 - an extra

    device = flower_device(
        options.flower_app,
        home=options.home,
        passphrase=_passphrase(options),
        run_config=dict(options.run_config),
        node_config=dict(options.node_config),
    )
    for sentence in device.ignored:
        say(f"not carried over: {sentence}")
    own = device.evaluate if device.evaluates and not options.no_evaluation else None
    return device.train, options.evaluate or own


def _say_receipt(receipt: Receipt) -> None:
    """Print the line of a round."""
    sequence = receipt.acceptance_sequence
    say(f"round {receipt.round_number}: update accepted, number {sequence} of the round")


def _summary(summary: RunSummary) -> str:
    failed = f"{summary.failure_count} failures, " if summary.failure_count else ""
    answered = summary.answer_count or summary.refused_query_count
    if answered:
        failed += (
            f"{summary.answer_count} queries answered, {summary.refused_query_count} refused, "
        )
    return (
        f"{summary.update_count} updates accepted, {summary.late_count} too late, "
        f"{summary.evaluation_count} evaluations, {failed}last version {summary.last_version}"
    )


def _status(options: argparse.Namespace) -> None:
    facts = read_facts(options.home)
    for hidden in ("receipt", "certificate_authorities"):
        facts.pop(hidden, None)
    if not options.offline:
        with _client(options) as client:
            heartbeat = client.heartbeat()
        facts |= {
            "device_name": heartbeat.device_name,
            "device_state": heartbeat.device_state,
            "server_time": heartbeat.server_time.isoformat(),
        }
    say(json.dumps(facts, indent=2, sort_keys=True))


def _evidence(options: argparse.Namespace) -> None:
    with _client(options) as client:
        evidence = client.evidence(client.find_session(options.training_session))
    with open(options.output, "w", opener=private_opener) as file:  # Path.open has no opener
        file.write(evidence.to_json())
    say(f"{options.output}: {len(evidence.statements)} versions")


def _init(options: argparse.Namespace) -> None:
    for path in create_project(options.project):
        say(f"wrote {path}")
    say(f"read {options.project / 'README.md'} for the next steps")


def _verify(options: argparse.Namespace) -> None:
    key_ids, threshold = options.root_key_id, options.threshold
    if options.bundle is not None:
        bundle = read_bundle(options.bundle)
        key_ids, threshold = list(bundle.root_key_ids), bundle.threshold
    shown = verify_file(
        options.evidence,
        root_key_ids=key_ids,
        threshold=threshold,
        reference_time=options.at or datetime.now(UTC),
        model=options.model,
    )
    for sentence in shown:
        say(f"verified: {sentence}")


def _client(options: argparse.Namespace, **policies: Any) -> Client:
    """Return a client.

    Args:
        options: Of the command.
        policies: The device's policies, as of `Client`.
    """
    return Client(
        home=options.home,
        address=options.address,
        passphrase=_passphrase(options),
        tls=_tls(options),
        insecure=options.insecure,
        progress=ProgressBar(),
        **policies,
    )


def _tls(options: argparse.Namespace) -> Tls | None:
    files = (options.ca_file, options.certificate_file, options.key_file)
    return Tls.from_files(*files) if any(files) else None


def _passphrase(options: argparse.Namespace) -> str | None:
    path = options.passphrase_file or os.environ.get(_PASSPHRASE_FILE_VARIABLE)
    return Path(path).read_text().rstrip("\n") if path else None


def _capability(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    return name, float(number)


def _toml_pair(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        want = 'KEY=VALUE with a value of TOML, such as 3, 0.1, true or "text"'
        raise argparse.ArgumentTypeError(f"{text}: want {want}") from error


def _algorithm(text: str) -> Algorithm:
    try:
        algorithm = algorithm_named(text)
    except InvalidKeyError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if algorithm not in ONLINE_ALGORITHMS:
        raise argparse.ArgumentTypeError(
            f"{text}: not for device keys: signing is too slow; want {_NAMES}"
        )
    return algorithm


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text}: want a time with its zone, such as {text}+00:00")
    return moment


def _function(text: str) -> Callable[..., Any]:
    """Import a function given as module:function; the working directory is on the module path."""
    module_name, _, function_name = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # user code may raise anything
        raise argparse.ArgumentTypeError(f"{text}: {_where(error)}") from error
    if not callable(function):
        raise argparse.ArgumentTypeError(f"{text} is not a function")
    return function


def _column(text: str) -> tuple[str, Callable[..., Any]]:
    """Import the function of a column given as column=module:function."""
    column, equals, function = text.partition("=")
    if not (column and equals):
        raise argparse.ArgumentTypeError(f"{text}: want COLUMN=MODULE:FUNCTION")
    return column, _function(function)


def _where(error: Exception) -> str:
    """Return an import error in one line, with file and line number."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = (
        ""
        if isinstance(error, ImportError | AttributeError | ValueError)
        else f" in {frame.filename}, line {frame.lineno}"
    )
    return f"{type(error).__name__}: {error}{place}"


if __name__ == "__main__":
    sys.exit(main())
