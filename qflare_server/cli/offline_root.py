"""`keys prepare`, `keys draft`, `keys sign`, `keys publish`: key rotation with the root keys on other machines.

`keys make-root` and `keys draft-root` replace the root keys themselves in the same way. Each root key signs on its own
machine; `keys publish` combines the signatures of a threshold. The files that are copied between the machines contain
no secrets: public keys, documents, and signed documents, all as JSON, so that a signer can read the document.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from qflare.command_line import whole
from qflare.crypto.signing import PublicKey, algorithm_named, algorithm_names
from qflare.terminal import say
from qflare.v1 import security_pb2
from qflare_server.config import ROOT_ALGORITHMS, ServerConfig
from qflare_server.context import utc_now
from qflare_server.keys.folder import KeyFolder, key_directory
from qflare_server.keys.root_files import RootFile, given
from qflare_server.keys.root_replacement import (
    draft_exchange,
    joined,
    make_root_key,
    publish_exchange,
)
from qflare_server.keys.rotation import draft_keyset, prepare_online, publish_keyset
from qflare_server.keys.secret_files import KeyStoreError, write_secret
from qflare_server.keys.setup import DEFAULT_ROOT
from qflare_server.keys.trust_documents import (
    KEYSET_LIFETIME,
    ROOT_LIFETIME,
    key_id_of,
    sign_document,
)
from qflare_server.serving.application import open_database

_DOCUMENT = "a keyset, or a root document"


def add(actions: Any) -> None:
    """Add this module's parsers to those of `keys`."""
    _add_keyset(actions)
    _add_root(actions)


def _add_keyset(actions: Any) -> None:
    prepare = actions.add_parser(
        "prepare", help="offline root, step 1: new keys in the key file; copy it to every replica"
    )
    prepare.add_argument(
        "--algorithm",
        dest="online_algorithm",
        help="algorithm of the signature keys (default: QFLARE_ONLINE_ALGORITHM, else the current one)",
    )
    prepare.set_defaults(run=run_prepare)
    draft = actions.add_parser("draft", help="offline root, step 2: write the keyset to be signed")
    draft.add_argument("--output", type=Path, required=True, help="new file for the keyset")
    draft.add_argument(
        "--days", type=whole(1, 3650), default=KEYSET_LIFETIME.days, help="life of the keyset"
    )
    draft.add_argument(
        "--without", action="append", default=[], metavar="KEY_ID", help="stop accepting this key"
    )
    draft.set_defaults(run=run_draft)
    sign = actions.add_parser(
        "sign", help=f"offline root, step 3: sign {_DOCUMENT}, on a machine with a root key"
    )
    what = sign.add_mutually_exclusive_group(required=True)
    what.add_argument("--keyset", type=Path, help="file that `keys draft` or `draft-root` wrote")
    what.add_argument("--root-document", type=Path, help="file that `keys draft-root` wrote")
    sign.add_argument("--root-dir", type=Path, help="folder of root.key; default: the key folder")
    add_places(sign)
    sign.add_argument("--output", type=Path, required=True, help="new file for the signed document")
    sign.set_defaults(run=run_sign)
    publish = actions.add_parser("publish", help="offline root, step 4: publish the signed keyset")
    publish.add_argument(
        "--signed",
        type=Path,
        action="append",
        required=True,
        help="signed keyset, once for each signer",
    )
    publish.add_argument(
        "--signed-root",
        type=Path,
        action="append",
        default=[],
        help="signed root document, once for each signer",
    )
    publish.set_defaults(run=run_publish)


def _add_root(actions: Any) -> None:
    make = actions.add_parser("make-root", help="generate a root key, on its holder's machine")
    make.add_argument("--root-key", type=Path, required=True, help="new file for the key")
    make.add_argument(
        "--root-passphrase-file", type=Path, help="its passphrase; else a random one beside it"
    )
    make.add_argument(
        "--algorithm", dest="root_algorithm", choices=ROOT_ALGORITHMS, help="default: ml-dsa-87"
    )
    make.add_argument("--output", type=Path, required=True, help="new file for the public half")
    make.set_defaults(run=run_make_root)
    draft = actions.add_parser(
        "draft-root", help="write the next root document and the keyset under it, to be signed"
    )
    draft.add_argument(
        "--key",
        type=Path,
        action="append",
        required=True,
        help="public half of a next root key, repeatable",
    )
    draft.add_argument(
        "--root-threshold", type=whole(1, 8), default=1, help="required root signatures"
    )
    draft.add_argument(
        "--days", type=whole(1, 3650), default=KEYSET_LIFETIME.days, help="life of the keyset"
    )
    draft.add_argument(
        "--root-days",
        type=whole(1, 36500),
        default=ROOT_LIFETIME.days,
        help="days until the root document expires",
    )
    draft.add_argument("--output", type=Path, required=True, help="new file for the root document")
    draft.add_argument("--keyset-output", type=Path, required=True, help="new file for the keyset")
    draft.set_defaults(run=run_draft_root)


def add_places(parser: Any) -> None:
    """Add the arguments for the locations of root keys."""
    parser.add_argument(
        "--root-key",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="file of a root key, repeatable; default: those in the key folder",
    )
    parser.add_argument(
        "--root-passphrase-file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="file with its passphrase, repeatable in the same order; default: beside it",
    )


def with_places(folder: KeyFolder, arguments: argparse.Namespace) -> KeyFolder:
    """Return a key folder with its root keys at the locations in the arguments."""
    files = given(arguments.root_key, arguments.root_passphrase_file)
    return replace(folder, root_files=files)


def run_prepare(config: ServerConfig, _arguments: argparse.Namespace) -> int:
    """Add the next keys to the key file."""
    folder = KeyFolder.from_config(config)
    named = config.online_algorithm
    for key_id in prepare_online(folder, algorithm=algorithm_named(named) if named else None):
        say(f"prepared {key_id}")
    say(f"copy {folder.online_file} to every replica before you publish")
    return 0


def run_draft(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Write the keyset with the prepared keys."""
    database = open_database(config)
    try:
        keyset = draft_keyset(
            KeyFolder.from_config(config),
            database,
            utc_now(),
            without=arguments.without,
            lifetime=timedelta(days=arguments.days),
        )
    finally:
        database.close()
    _write(arguments.output, keyset)
    _describe(keyset)
    return 0


def run_make_root(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Make a root key; needs neither database nor online keys."""
    file = RootFile(arguments.root_key, arguments.root_passphrase_file)
    algorithm = algorithm_named(config.root_algorithm or DEFAULT_ROOT)
    public = make_root_key(config.realm, algorithm, file)
    _write(arguments.output, public.to_proto())
    say(f"made root key {public.key_id} in {arguments.root_key}")
    return 0


def run_draft_root(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Write the next root document and the keyset under it."""
    keys = [_read_key(path) for path in arguments.key]
    database = open_database(config)
    try:
        document, keyset = draft_exchange(
            KeyFolder.from_config(config),
            database,
            keys,
            arguments.root_threshold,
            utc_now(),
            root_lifetime=timedelta(days=arguments.root_days),
            keyset_lifetime=timedelta(days=arguments.days),
        )
    finally:
        database.close()
    for path, message in ((arguments.output, document), (arguments.keyset_output, keyset)):
        _write(path, message)
        _describe(message)
    return 0


def run_sign(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Sign a document with the root keys on this machine; needs neither database nor online keys."""
    is_root = arguments.root_document is not None
    document: security_pb2.RootDocument | security_pb2.Keyset = (
        security_pb2.RootDocument() if is_root else security_pb2.Keyset()
    )
    _read(arguments.root_document or arguments.keyset, document)
    _describe(document)
    directory = arguments.root_dir or key_directory(config)
    root = with_places(KeyFolder(directory), arguments).read_root()
    if root.realm != document.realm:
        raise KeyStoreError(f"root keys are of realm {root.realm!r}, not {document.realm[:63]!r}")
    _write(arguments.output, sign_document(document, root.signing_keys()))
    say(f"wrote {arguments.output}")
    return 0


def run_publish(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Bring signed documents into force."""
    signed = _read_signed(arguments.signed)
    folder, database = KeyFolder.from_config(config), open_database(config)
    try:
        if arguments.signed_root:
            root = _read_signed(arguments.signed_root)
            trust = publish_exchange(folder, database, root, signed, utc_now())
            say(f"root document version {trust.root.version} is in force")
        else:
            trust = publish_keyset(folder, database, signed, utc_now())
    finally:
        database.close()
    say(f"keyset version {trust.keyset.version} is in force")
    return 0


def _describe(document: security_pb2.RootDocument | security_pb2.Keyset) -> None:
    """Describe a document for its signers."""
    expires = document.expire_time.ToDatetime()
    until = f"version {document.version} of realm {document.realm}, until {expires:%F %T} UTC"
    if isinstance(document, security_pb2.RootDocument):
        say(f"root document {until}, signed by {document.threshold} of:")
        for root in document.keys:
            say(f"  {_algorithm(root)} {root.key_id}")
        return
    say(f"keyset {until}")
    for key in document.keys:
        role = security_pb2.KeyRole.Name(key.role).removeprefix("KEY_ROLE_")
        algorithm = "x-wing" if key.HasField("kem_key") else _algorithm(key.signature_key)
        say(f"  {role} {algorithm} {key_id_of(key)}")


def _algorithm(key: security_pb2.PublicKey) -> str:
    (name,) = algorithm_names([PublicKey.from_proto(key).algorithm])
    return name


def _read_key(path: Path) -> PublicKey:
    message = security_pb2.PublicKey()
    _read(path, message)
    return PublicKey.from_proto(message)


def _read_signed(paths: Sequence[Path]) -> security_pb2.SignedEnvelope:
    envelopes = []
    for path in paths:
        envelope = security_pb2.SignedEnvelope()
        _read(path, envelope)
        envelopes.append(envelope)
    return joined(envelopes)


def _write(path: Path, message: Message) -> None:
    write_secret(path, json_format.MessageToJson(message).encode() + b"\n")


def _read(path: Path, message: Message) -> None:
    try:
        json_format.Parse(path.read_bytes(), message)
    except OSError as error:
        raise KeyStoreError(f"cannot read {path}: {error.strerror}") from error
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise KeyStoreError(f"{path} is not what `keys` writes") from error
