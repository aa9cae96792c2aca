"""The `qflare-helper` command: init, serve, status, rotate, audit verify.

Exit codes: 0 success, 1 the command failed (the message states the reason), 2 wrong usage, 130 interrupted.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from google.protobuf import json_format

import qflare
from qflare.addresses import is_loopback
from qflare.command_line import (
    ArgumentParser,
    address,
    on_signals,
    protect_process,
    report_failure,
    run_program,
    whole,
)
from qflare.evidence.unmasking import open_helper
from qflare.files import new_file
from qflare.terminal import LogFormatter, say, show_uncaught
from qflare.v1 import helper_service_pb2, security_pb2
from qflare_client.errors import QflareClientError
from qflare_client.keystore.passphrase import secret_coding
from qflare_client.keystore.store import KeyStore, read_document
from qflare_helper.audit import verify_ledger
from qflare_helper.errors import HelperError, StoreError
from qflare_helper.identity import HelperIdentity, read_bootstrap
from qflare_helper.ledger import Ledger
from qflare_helper.policy import LEAST_COHORT, MOST_COHORT, read_policy, write_policy
from qflare_helper.server import HelperServer, read_metrics_tls, read_tls

PROGRAM: Final = "qflare-helper"
PASSPHRASE_FILE_VARIABLE: Final = "QFLARE_PASSPHRASE_FILE"  # noqa: S105  # a name
FAILURES: Final = (HelperError, QflareClientError, OSError)
REMEDY: Final = "docs/secure-aggregation.md, or qflare-helper --help"

_EXAMPLES = """\
examples:
  qflare-helper --home helper init --bootstrap bootstrap.json --address helper.example:50055 --output helper.json
  qflare-helper --home helper serve --listen 0.0.0.0:50055 --tls-certificate chain.pem --tls-key key.pem
  qflare-helper --home helper status
  qflare-helper --home helper rotate --output helper.json
  qflare-helper --home helper audit verify

The folder in --home holds the helper's keys, its policy.toml and its ledger. Never restore the ledger from a backup: a
coordinator that has seen later answers refuses the helper from then on.
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
    return run_program(partial(_run, arguments), _reported, FAILURES)


def _run(arguments: Sequence[str] | None) -> int:
    options = parser().parse_args(arguments)
    return int(options.run(options))


def _reported(error: Exception) -> int:
    report_failure(PROGRAM, str(error), REMEDY)
    return 1


def parser() -> ArgumentParser:
    """Return the argument parser."""
    made = ArgumentParser(
        prog=PROGRAM,
        description="Helper for secure aggregation: knows the seeds of masks, answers with sums of masks.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"%(prog)s {qflare.__version__}")
    made.add_argument("--home", type=Path, required=True, help="folder of the helper")
    made.add_argument(
        "--passphrase-file",
        type=Path,
        help=f"file with the passphrase of the keys; also {PASSPHRASE_FILE_VARIABLE}",
    )
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    _add_init(commands)
    _add_serve(commands)
    status = commands.add_parser("status", help="show the helper and its last answer")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=run_status)
    rotate = commands.add_parser("rotate", help="replace the KEM key; the earlier one is kept")
    rotate.add_argument("--output", type=Path, required=True, help="file for the new helper bundle")
    rotate.set_defaults(run=run_rotate)
    audit = commands.add_parser("audit", help="the ledger of answers")
    actions = audit.add_subparsers(required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="verify every answer of the ledger")
    verify.set_defaults(run=run_audit_verify)
    return made


def _add_init(commands: Any) -> None:
    init = commands.add_parser("init", help="generate the keys of a helper")
    init.add_argument(
        "--bootstrap",
        type=Path,
        required=True,
        help="bootstrap bundle of the deployment, with the ids of its root keys; its token is not used",
    )
    init.add_argument(
        "--address", type=address, required=True, help="address for coordinators, host:port"
    )
    init.add_argument(
        "--ca-file", type=Path, help="PEM authorities of the TLS certificate; default: the system's"
    )
    init.add_argument(
        "--min-cohort",
        type=whole(LEAST_COHORT, MOST_COHORT),
        default=3,
        help="fewest updates in a sum; default: 3",
    )
    init.add_argument(
        "--output", type=Path, required=True, help="file for the helper bundle, for coordinators"
    )
    init.set_defaults(run=run_init)


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser("serve", help="answer coordinators")
    serve.add_argument("--listen", default="127.0.0.1:50055", help="default: 127.0.0.1:50055")
    serve.add_argument("--tls-certificate", type=Path, help="PEM certificate chain")
    serve.add_argument("--tls-key", type=Path, help="PEM key of the certificate")
    serve.add_argument(
        "--tls-client-ca", type=Path, help="PEM authorities of client certificates, for mutual TLS"
    )
    serve.add_argument(
        "--max-vector-mib",
        type=whole(1, 2**20),
        default=8192,
        help="largest masked update in MiB; default: 8192",
    )
    serve.add_argument(
        "--max-calls", type=whole(1, 64), default=4, help="requests in progress; default: 4"
    )
    serve.add_argument(
        "--metrics-listen", help="address of Prometheus metrics over HTTP; default: none"
    )
    protection = serve.add_mutually_exclusive_group()
    protection.add_argument(
        "--metrics-insecure",
        action="store_true",
        help="serve metrics without TLS on an address that others can reach",
    )
    protection.add_argument(
        "--metrics-tls",
        action="store_true",
        help="serve metrics with TLS on a loopback address, too",
    )
    serve.add_argument(
        "--health-listen",
        help="address of the gRPC health service without TLS, for probes; default: none",
    )
    serve.set_defaults(run=run_serve)


def run_init(options: argparse.Namespace) -> int:
    """Generate keys, policy and ledger, and write the bundle for coordinators."""
    authorities = "" if options.ca_file is None else options.ca_file.read_text("utf-8")
    pinned = read_bootstrap(options.bootstrap)
    if not (pinned.realm and 1 <= pinned.threshold <= len(pinned.root_key_ids)):
        raise StoreError(f"{options.bootstrap} pins no root keys")
    with _store(options) as store:
        if read_document(options.home, "helper.json"):
            raise StoreError(f"{options.home} holds a helper already")
        identity = HelperIdentity.generate(pinned, options.address, authorities)
        write_policy(options.home, options.min_cohort)
        Ledger(options.home)
        identity.save(store)
    _write_bundle(options.output, identity.bundle)
    say(f"helper {identity.helper_id}")
    say(f"bundle for coordinators: {options.output}")
    return 0


def run_serve(options: argparse.Namespace) -> int:
    """Serve until a signal."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    metrics = options.metrics_listen
    files = (options.tls_certificate, options.tls_key, options.tls_client_ca)
    tls = read_tls(*files)
    metrics_tls = read_metrics_tls(*files) if _metrics_have_tls(options) else None
    with _store(options) as store:
        server = HelperServer(
            store,
            options.listen,
            tls,
            max_vector_bytes=options.max_vector_mib * 2**20,
            max_calls=options.max_calls,
            metrics_listen=metrics,
            metrics_tls=metrics_tls,
            health_listen=options.health_listen,
        )
        stop = threading.Event()
        on_signals((signal.SIGTERM, signal.SIGINT), stop.set)
        server.start()
        say(f"helper {server.identity.helper_id}")
        if metrics is not None:
            say(f"metrics on port {server.metrics_port}")
        if options.health_listen is not None:
            say(f"health on port {server.health_port}")
        say(f"serving on {options.listen.rpartition(':')[0]}:{server.port}", flush=True)
        stop.wait()
        server.stop()
    return 0


def _metrics_have_tls(options: argparse.Namespace) -> bool:
    """Return whether metrics are served over HTTPS: on every address but loopback, unless told otherwise."""
    if options.metrics_listen is None or options.metrics_insecure:
        return False
    return bool(options.metrics_tls) or not is_loopback(options.metrics_listen)


def run_status(options: argparse.Namespace) -> int:
    """Show the helper; it may be serving."""
    bundle, pinned = _public(options.home)
    helper = open_helper(bundle.document, pinned.realm)
    policy, ledger = read_policy(options.home), Ledger(options.home)
    facts = {
        "helper_id": helper.helper_id,
        "realm": pinned.realm,
        "address": bundle.address,
        "kem_key_id": helper.kem_key.key_id,
        "document_number": helper.sequence_number,
        "min_cohort": policy.min_cohort,
        "training_sessions": sorted(policy.training_sessions),
        "roster_size": len(policy.roster),
        "noise_multiplier": policy.noise_multiplier,
        "answers": ledger.counter(),
    }
    if options.json:
        say(json.dumps(facts, indent=1))
        return 0
    for name, value in facts.items():
        shown = (", ".join(value) or "all") if isinstance(value, list) else value
        say(f"{name.replace('_', ' '):<18}{shown}")
    return 0


def run_rotate(options: argparse.Namespace) -> int:
    """Replace the KEM key; the helper must not be serving."""
    with _store(options) as store:
        identity = HelperIdentity.load(store).rotated()
        identity.save(store)
    _write_bundle(options.output, identity.bundle)
    say(f"bundle for coordinators: {options.output}")
    return 0


def run_audit_verify(options: argparse.Namespace) -> int:
    """Verify the ledger; it may be in use."""
    bundle, pinned = _public(options.home)
    helper = open_helper(bundle.document, pinned.realm)
    report = verify_ledger(Ledger(options.home), helper.key)
    for problem in report.problems:
        say(problem)
    say(f"{report.answer_count} answers with {report.update_count} updates verified")
    if report.latest_digest:
        say(f"latest answer {report.latest_digest}")
    return 1 if report.problems else 0


def _store(options: argparse.Namespace) -> KeyStore:
    path = options.passphrase_file or os.environ.get(PASSPHRASE_FILE_VARIABLE)
    passphrase = Path(path).read_text("utf-8").rstrip("\n") if path else None
    return KeyStore(options.home, secret_coding(passphrase))


def _public(
    home: Path,
) -> tuple[helper_service_pb2.HelperBundle, security_pb2.BootstrapBundle]:
    """Return the public facts of a helper without locking its key store."""
    facts = read_document(home, "helper.json")
    bundle, pinned = helper_service_pb2.HelperBundle(), security_pb2.BootstrapBundle()
    try:
        json_format.ParseDict(facts["bundle"], bundle)
        json_format.ParseDict(facts["pinned"], pinned)
    except (KeyError, json_format.ParseError) as error:
        raise StoreError(f"{home} holds no helper: run qflare-helper init") from error
    return bundle, pinned


def _write_bundle(path: Path, bundle: helper_service_pb2.HelperBundle) -> None:
    with new_file(path) as file:
        file.write(json_format.MessageToJson(bundle).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
