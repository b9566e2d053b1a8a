"""Flags of all programs: every error in one line, one rule for numbers.

    p = Parser(description=__doc__, prog="python -m data.check")
    p.add_argument("--limit", type=count)
"""
import argparse
import sys
from collections.abc import Callable

from ..common import BadInput, check_words, escaped, number
from ..ranges import band_numbers


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, behind a look for words that no flag can have."""

    def error(self, message):
        self.exit(2, f"error: {escaped(message)}\n")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's."""
        self.check_line(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def check_line(self, words: list[str]) -> None:
        """An error for words that can be none of a command line."""
        try:
            check_words(words, self._option_string_actions)
        except BadInput as e:
            self.error(str(e))


def exit_code(work: Callable, *args) -> int:
    """What work() returns, 0 for nothing; behind a line on stderr 2 for a BadInput, 130 for Ctrl-C."""
    try:
        return work(*args) or 0
    except (BadInput, OSError) as e:
        print(f"error: {escaped(str(e))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def count(text: str) -> int:
    """An argparse type: a whole number from 1."""
    return from_lowest(text, 1)


def whole(text: str) -> int:
    """An argparse type: a whole number from 0."""
    return from_lowest(text, 0)


def from_lowest(text: str, lowest: int) -> int:
    """A whole number from the lowest one to 2^31."""
    try:
        value = number(text, int)
    except ValueError:
        value = -1
    if not lowest <= value <= 2**31:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {lowest}")
    return value


def bands(text: str) -> list[int]:
    """An argparse type: '4,1,2' -> [4, 1, 2]."""
    try:
        return band_numbers(text)
    except BadInput as e:
        raise argparse.ArgumentTypeError(str(e)) from None
