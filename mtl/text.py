"""Text that may come from somebody else, such as the names in a run's folder, made safe to be shown."""

import logging
import re
import traceback

# Unicode's categories of what isn't seen but does something: control characters, which terminals obey, among them those
# of ANSI escape sequences; format characters, which change the order of letters or are of no width; separators of lines
# and paragraphs; and surrogates, which stand for bytes that are no text. tests/test_plain_text.py compares.
INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\ud800-\udfff\ufeff\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)


def plain(text: str, keep: str = "") -> str:
    r"""The text with each invisible character written out, such as \x1b for the one that begins a terminal's commands.

    Args:
        text: from anywhere.
        keep: the characters that are left as they are, such as line breaks.
    """
    return INVISIBLE.sub(lambda match: match[0] if match[0] in keep else _escape(ord(match[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def say(text: str) -> None:
    """Prints the text to the terminal at once."""
    print(plain(text, keep="\n"), flush=True)


def with_traceback(error: BaseException) -> str:
    """What Python prints of an exception that nobody catches."""
    return plain("".join(traceback.format_exception(error)), keep="\n\t")


class _Plain(logging.Filter):
    """Makes what is logged plain; it is shown by `cat`, too."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = plain(record.getMessage(), keep="\n\t"), None
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = with_traceback(record.exc_info[1]).rstrip("\n")
        return True


log = logging.getLogger("mtl")
if not any(isinstance(each, _Plain) for each in log.filters):  # when the module is loaded again
    log.addFilter(_Plain())
