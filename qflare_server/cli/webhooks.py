"""`webhooks test`: send a test message to the configured receivers."""

import argparse
import secrets
from typing import Any

from qflare.command_line import report_failure
from qflare.terminal import say
from qflare_server.config import ConfigError, ServerConfig
from qflare_server.context import utc_now
from qflare_server.use_cases.webhooks.messages import probe_message
from qflare_server.use_cases.webhooks.sender import DeliveryError, Sender, place_of

PROGRAM = "qflare-server webhooks test"


def add(commands: Any) -> None:
    """Add this module's parsers."""
    webhooks = commands.add_parser("webhooks", help="test the receivers of webhooks")
    actions = webhooks.add_subparsers(required=True, metavar="ACTION")
    test = actions.add_parser(
        "test",
        help="send a message of type webhook.test once to each of QFLARE_WEBHOOK_URLS",
        epilog="example: qflare-server webhooks test",
    )
    test.set_defaults(run=run_test)


def run_test(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Send a message to each receiver; exit code 1 if one does not accept it."""
    del arguments
    if not config.webhook_receivers:
        raise ConfigError("QFLARE_WEBHOOK_URLS is not set: there is no receiver to test")
    senders = [(url, Sender(config, url)) for url in config.webhook_receivers]
    failed = 0
    for url, sender in senders:
        message = probe_message(config.realm, secrets.token_hex(16), utc_now())
        try:
            sender.send(message, utc_now())
        except DeliveryError as error:
            failed += 1
            say(f"FAILED     {place_of(url)} {message.id}: {error}")
        else:
            say(f"delivered  {place_of(url)} {message.id}")
    if failed:
        remedy = "check the receiver, its certificate and the proxy on the way"
        report_failure(PROGRAM, f"{failed} receivers did not accept the message", remedy)
    return 1 if failed else 0
