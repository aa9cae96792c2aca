"""Helpers shared by the command-line programs: error reports, argument types, and process hardening.

A failing command writes the cause after the program's name to standard error, and the remedy on its own line after
`try:`. Usage errors are reported in the same way and exit with code 2.
"""

import argparse
import ctypes
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final, NoReturn

from qflare.addresses import AddressError, require_address
from qflare.terminal import complain, discard_unwritten, flush_output, printable, say

WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130
ENDED_AT_ONCE: Final = 1
"""Exit code after a second signal."""
_STANDARD_ERROR: Final = 2
_PR_SET_DUMPABLE: Final = 4  # sys/prctl.h of Linux
_NEGATIVE_NUMBER: Final = re.compile(
    r"-(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?|inf|nan)\Z", re.IGNORECASE
)


class ArgumentParser(argparse.ArgumentParser):
    """Argument parser that reports usage errors as a cause and a remedy, in printable characters only.

    A negative number in any notation is a value, such as -1e5, which argparse takes for an option.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._negative_number_matcher = _NEGATIVE_NUMBER

    def _print_message(self, message: str, file: Any = None) -> None:
        try:
            say(message.removesuffix("\n"), stream=file)
        except OSError:  # argparse would hide it for standard output, too
            if file is not None and file.fileno() == _STANDARD_ERROR:
                return
            raise

    def error(self, message: str) -> NoReturn:
        """Print the usage, report the error and exit with code 2."""
        self.print_usage(sys.stderr)
        self.exit(WRONG_USAGE, failure_text(self.prog, message, f"{self.prog} --help"))


def run_program(
    command: Callable[[], int | None],
    report: Callable[[Exception], int],
    failures: tuple[type[Exception], ...] = (Exception,),
) -> int:
    """Run a command, write all of its output, and return the exit code.

    Output that cannot be written is a failure of the command. Nothing stays buffered: the interpreter would write it
    at its end, fail again, and exit with a code of its own.

    Args:
        command: Returns its exit code; None stands for 0.
        report: Reports a failure and returns its exit code.
        failures: What is reported; other exceptions are raised.
    """
    try:
        return _run_to_its_last_byte(command) or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return 0  # the reader has gone
    except failures as error:
        return report(error)
    finally:
        discard_unwritten()


def _run_to_its_last_byte(command: Callable[[], int | None]) -> int | None:
    try:
        code = command()
    except SystemExit:  # of --help and --version
        flush_output()
        raise
    flush_output()
    return code


def on_signals(numbers: Iterable[signal.Signals], first: Callable[[], None]) -> None:
    """Run `first` in a thread on the first of some signals; a second one ends the process at once.

    A handler runs in the main thread between any two instructions, also while that thread holds the lock of an event
    that it waits for: setting the event in the handler would wait for that lock for ever. And it does not run while the
    main thread waits, if another thread took the signal or if it came just before the wait began. So the interpreter
    writes the number of a signal to a pipe, which a thread reads, and the handler does nothing.
    In a forked child the signals have their default effect.
    """
    wanted, owner = frozenset(numbers), os.getpid()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def handle(number: int, _frame: object) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def await_signals() -> None:
        _await_byte(reading, wanted)
        first()
        _await_byte(reading, wanted)
        os._exit(ENDED_AT_ONCE)

    threading.Thread(target=await_signals, name="signals", daemon=True).start()
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    for number in wanted:
        signal.signal(number, handle)


def _await_byte(reading: int, wanted: Collection[int]) -> None:
    while os.read(reading, 1)[0] not in wanted:
        pass


def failure_text(program: str, cause: str, remedy: str) -> str:
    """Return the lines that report a failure: one for each line of the cause, one for the remedy."""
    causes = [printable(line.strip()) for line in cause.splitlines() if line.strip()] or ["failed"]
    lines = [f"{program}: {line}\n" for line in causes]
    return "".join([*lines, f"try: {printable(' '.join(remedy.split()))}\n"])


def report_failure(program: str, cause: str, remedy: str) -> None:
    """Write the lines that report a failure to standard error."""
    complain(failure_text(program, cause, remedy).removesuffix("\n"))


def key_id(text: str) -> str:
    """Read the id of a key, 64 hex digits in lower case, for argparse."""
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, want 64 hex digits")
    return text


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return an argument type for integers within inclusive bounds."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, want a whole number from {least} to {most}"
            )
        return int(text)

    return convert


def positive(text: str) -> float:
    """Read a finite number above zero, as an argument type."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a number above 0")
    return value


def address(text: str) -> str:
    """Return the address of a coordinator, as an argument type."""
    try:
        return require_address(text)
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("address: ")) from error


def seconds(least: float, most: float = 315_360_000.0) -> Callable[[str], float]:
    """Return an argument type for seconds within inclusive bounds; ten years at most."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, want seconds from {least:g} to {most:.0f}"
            )
        return value

    return convert


def protect_process() -> None:
    """Restrict new files to the user and disable core dumps, so that secrets do not leak to disk.

    Standard streams that the caller has closed are opened on the null device.
    """
    os.umask(0o077)
    disable_core_dumps()
    _occupy_standard_streams()


def _occupy_standard_streams() -> None:
    """Open closed standard streams: the next file would get the number of one, and output would be written into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STANDARD_ERROR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))


def describe_os_error(error: OSError) -> str:
    """Return what failed and on which file, in one line."""
    if error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, FileNotFoundError) and not _has_working_directory():
        return "the working directory no longer exists"
    return error.strerror or str(error) or type(error).__name__


def _has_working_directory() -> bool:
    try:
        os.getcwd()  # noqa: PTH109  # only whether there is one
    except FileNotFoundError:
        return False
    return True


def disable_core_dumps() -> None:
    """Disable core dumps of this process, so that keys in its memory do not leak to disk.

    Core dumps are prevented by the limit, and on Linux also by the process flag, which handlers named in `core_pattern`
    respect too. That flag also prevents debuggers of the same user from attaching.
    """
    import resource  # noqa: PLC0415  # POSIX only

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
