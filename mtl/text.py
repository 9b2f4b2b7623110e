"""Makes text of unknown origin, such as names in a run's folder, safe to print."""

import logging
import re
import traceback

# Unicode's categories of invisible characters that have an effect: control characters, including those that begin ANSI
# escape sequences; format characters, which reorder text or have no width; separators of lines and paragraphs; and
# surrogates, which stand for undecodable bytes. tests/test_plain_text.py compares them with Python's database.
INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\ud800-\udfff\ufeff\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)


def plain(text: str, keep: str = "") -> str:
    r"""Escapes each invisible character, such as \x1b, which begins a terminal's escape sequences.

    Args:
        text: Any text.
        keep: Characters that are left unchanged, such as line breaks.
    """
    return INVISIBLE.sub(lambda match: match[0] if match[0] in keep else _escape(ord(match[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def echo(text: str) -> None:
    """Prints the text to the terminal without buffering."""
    print(plain(text, keep="\n"), flush=True)


def with_traceback(error: BaseException) -> str:
    """Returns the text that Python prints for an uncaught exception."""
    return plain("".join(traceback.format_exception(error)), keep="\n\t")


class _Plain(logging.Filter):
    """Escapes logged text, because log files may be printed on a terminal."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = plain(record.getMessage(), keep="\n\t"), None
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = with_traceback(record.exc_info[1]).rstrip("\n")
        return True


log = logging.getLogger("mtl")
if not any(isinstance(each, _Plain) for each in log.filters):  # when the module is reloaded
    log.addFilter(_Plain())
