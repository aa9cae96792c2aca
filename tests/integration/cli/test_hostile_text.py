"""Text of a hostile coordinator or device in the terminals of those who look at it."""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from qflare.v1 import admin_service_pb2, coordinator_service_pb2, security_pb2
from qflare_client.__main__ import main as client_main
from qflare_client.admin.__main__ import main as admin_main
from qflare_client.admin.__main__ import parser as admin_parser
from qflare_server.cli.main import main as server_main
from qflare_server.cli.terminal import table
from tests.support.proxy import ending_peer

EVIL = "a\x1b[2J\x1b]0;t\x07\r\x9b1m\u202eb\u2066\u200b\x00c\nqflare-admin: verified"
ID = "7d2c1f70-9c8e-4a55-b3f1-5a1a7cf3a001"
WRITES_FILES = ("completion", "profile set")
Deploy = Callable[..., Any]


def fill(message: Message, depth: int = 0) -> Message:
    """Put hostile text into every text of a message, and something into everything else."""
    for field in message.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if depth < 6:
                _fill_nested(message, field, depth)
        elif field.is_repeated:
            getattr(message, field.name).append(_value(field))
        elif field.name != "next_page_token":
            setattr(message, field.name, _value(field))
    return message


def _fill_nested(message: Message, field: Any, depth: int) -> None:
    nested = field.message_type
    assert nested is not None
    if nested.full_name in {"google.protobuf.Timestamp", "google.protobuf.Duration"}:
        getattr(message, field.name).seconds = 1
    elif nested.GetOptions().map_entry:
        value = nested.fields_by_name["value"]
        if value.type != FieldDescriptor.TYPE_MESSAGE:
            getattr(message, field.name)[EVIL] = _value(value)
    elif field.is_repeated:
        fill(getattr(message, field.name).add(), depth + 1)
    else:
        fill(getattr(message, field.name), depth + 1)


def _value(field: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return EVIL
    if field.type == FieldDescriptor.TYPE_BYTES:
        return EVIL.encode()
    if field.type == FieldDescriptor.TYPE_BOOL:
        return True
    return (
        1.0
        if field.cpp_type in {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}
        else 1
    )


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: what a command prints does not depend on it."""
    return sqlite_url


class Hostile(grpc.GenericRpcHandler):
    """A coordinator that answers every call of an administrator with hostile text.

    Attributes:
        refuses: Answer with errors instead.
    """

    def __init__(self) -> None:
        self.refuses = False
        self._methods = {
            f"/{service.full_name}/{method.name}": method
            for service in admin_service_pb2.DESCRIPTOR.services_by_name.values()
            for method in service.methods
        }

    def service(self, details: Any) -> Any:
        method = self._methods[details.method]
        answer = fill(GetMessageClass(method.output_type)())

        def refuse(context: grpc.ServicerContext) -> None:
            if self.refuses:
                status = status_pb2.Status(code=5, message=EVIL)
                info = error_details_pb2.ErrorInfo(reason=EVIL, metadata={EVIL: EVIL})
                status.details.add().Pack(info)
                details = status.SerializeToString()
                context.set_trailing_metadata((("grpc-status-details-bin", details),))
                context.abort(grpc.StatusCode.NOT_FOUND, EVIL)

        def once(requests: Any, context: grpc.ServicerContext) -> bytes:
            list(requests)
            refuse(context)
            return answer.SerializeToString()

        def stream(_request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            refuse(context)
            yield answer.SerializeToString()

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.stream_unary_rpc_method_handler(once)


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    """Yield a hostile coordinator that the profile names."""
    handler = Hostile()
    server = grpc.server(ThreadPoolExecutor(4), handlers=[handler])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    token = tmp_path / "admin.token"
    token.touch(0o600)
    token.write_text("qfa1.token")
    monkeypatch.setenv("QFLARE_PROFILE", str(tmp_path / "profile"))
    monkeypatch.chdir(tmp_path)
    admin_main(["profile", "set", "--address", address, "--token-file", str(token)])
    yield handler
    server.stop(None).wait()


def examples(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    """Yield the example of every command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in dict.fromkeys(action.choices.values()):
                yield from examples(child)
                if child.epilog and "\n  qflare-admin " in child.epilog:
                    words = child.epilog.split("\n  qflare-admin ", 1)[1]
                    yield [ID if word == "ID" else word for word in shlex.split(words)]


EXAMPLES = [
    words for words in examples(admin_parser()) if not " ".join(words).startswith(WRITES_FILES)
]


def assert_printable(printed: Any) -> None:
    text = printed.out + printed.err
    assert all(line.isprintable() for line in text.split("\n")), text
    assert not any(line.startswith("qflare-admin: verified") for line in text.split("\n")), text


def test_there_are_commands() -> None:
    assert len(EXAMPLES) > 25


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("words", EXAMPLES, ids=" ".join)
def test_a_command_shows_nothing_that_a_terminal_obeys(
    hostile: Hostile, capsys: pytest.CaptureFixture[str], words: list[str], form: str
) -> None:
    if words[0] == "watch":
        words = [*words, "--for-s", "1"]
    if form == "json" and "--json" not in words and words[0] not in {"login", "logout"}:
        words = [*words, "--json"]
    for hostile.refuses in (False, True):
        capsys.readouterr()
        admin_main(words)
        assert_printable(capsys.readouterr())


def test_a_device_shows_nothing_that_a_terminal_obeys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle.json"
    bundle.write_text(json.dumps({"realm": EVIL, "address": f"127.0.0.1:1{EVIL}"}))

    for words in (
        ["enroll", str(bundle)],
        ["enroll", str(tmp_path / EVIL.replace("\x00", ""))],
        ["status", "--offline"],
        ["verify", str(bundle), "--root-key-id", EVIL],
    ):
        client_main([*words, "--home", str(tmp_path / "device")])
        assert_printable(capsys.readouterr())


def test_what_a_peer_says_at_its_end_is_not_shown_as_it_is() -> None:
    program = (
        "import sys; from qflare_client.rpc.transport import Transport\n"
        "from qflare.v1 import coordinator_service_pb2 as messages\n"
        "transport = Transport(sys.argv[1], timeout_s=1)\n"
        "try: transport.unary(transport.stub.GetTask, messages.GetTaskRequest())\n"
        "except Exception: print('ended')\n"
    )
    with ending_peer(EVIL.encode()) as address:
        done = subprocess.run(
            [sys.executable, "-c", program, address], capture_output=True, check=False
        )

    assert done.stdout == b"ended\n"
    assert b"\x1b" not in done.stderr


def test_a_login_under_a_hostile_name_leaves_no_such_name_in_the_log(deploy: Deploy) -> None:
    deployment = deploy()
    hello = security_pb2.SessionHello(device_id=EVIL, realm="qflare", protocol_version=1)

    with pytest.raises(grpc.RpcError):
        deployment.devices_stub.BeginAuthentication(
            coordinator_service_pb2.BeginAuthenticationRequest(hello=hello)
        )

    listed = deployment.admin.ListAuditEntries(
        admin_service_pb2.ListAuditEntriesRequest(),
        metadata=deployment.metadata,
    )
    assert listed.entries
    assert all(entry.subject.isprintable() for entry in listed.entries)
    assert not any("verified" in str(entry) for entry in listed.entries)


def test_the_coordinators_own_commands_show_nothing_that_a_terminal_obeys(
    deploy: Deploy, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment = deploy()
    row = {"name": EVIL, "state": EVIL, "accuracy": 0.5, EVIL: None}

    assert all(line.isprintable() for line in table([row]).split("\n"))
    server_main(["--data-dir", str(deployment.config.data_dir), "session", "start", EVIL])
    server_main(["--data-dir", str(deployment.config.data_dir), "model", "export", ID, EVIL[1:-9]])

    assert_printable(capsys.readouterr())
