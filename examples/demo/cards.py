"""The demo's task: describe a Python function as a three-line card.

The material is the standard library itself: the signature and docstring of its functions. The
question shows both; the answer is a card in a fixed format that the base model has never seen::

    name: textwrap.dedent
    takes: text
    does: Remove any common leading whitespace from every line in `text`.

Whole modules are held out, so a card that is right there cannot have been learned by heart.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import random
import re
from collections.abc import Iterator

TRAIN_MODULES = (
    "base64",
    "calendar",
    "codecs",
    "configparser",
    "contextlib",
    "dataclasses",
    "difflib",
    "dis",
    "email.message",
    "email.utils",
    "http.client",
    "http.cookiejar",
    "importlib.util",
    "inspect",
    "ipaddress",
    "locale",
    "logging",
    "logging.handlers",
    "mimetypes",
    "pathlib",
    "platform",
    "posixpath",
    "queue",
    "random",
    "selectors",
    "smtplib",
    "socketserver",
    "subprocess",
    "sysconfig",
    "tarfile",
    "threading",
    "timeit",
    "traceback",
    "typing",
    "urllib.request",
    "weakref",
    "xml.dom.minidom",
    "xml.etree.ElementTree",
)
HELDOUT_MODULES = (
    "cmd",
    "collections",
    "filecmp",
    "fnmatch",
    "ftplib",
    "shlex",
    "shutil",
    "statistics",
    "tempfile",
    "textwrap",
    "unittest.case",
    "urllib.parse",
    "warnings",
    "zipfile",
)
MOST_OF_A_MODULE = 24  # cards, so that no module dominates
QUESTION = "Describe this Python function.\n\n# in {owner}\ndef {call}:\n{docstring}"
CARD = "name: {name}\ntakes: {takes}\ndoes: {does}"
CARD_PATTERN = re.compile(r"name: (?P<name>\S+)\ntakes: (?P<takes>[^\n]+)\ndoes: (?P<does>[^\n]+)")
_STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
MAX_DOCSTRING = 160  # characters of the docstring that the question shows


@dataclasses.dataclass(frozen=True)
class Card:
    """One function of the standard library, and the card that describes it."""

    module: str
    name: str
    arguments: tuple[str, ...]
    call: str
    docstring: str

    @property
    def question(self) -> str:
        """What the user asks: the function's signature and docstring."""
        lines = f'"""{self.docstring}"""'.splitlines()
        body = "\n".join(f"    {line}" if line else "" for line in lines)
        owner = self.name.rpartition(".")[0]
        return QUESTION.format(owner=owner, call=self.call, docstring=body)

    @property
    def answer(self) -> str:
        """The card, in the one allowed form."""
        does = self.docstring.split("\n\n")[0].replace("\n", " ")
        return CARD.format(name=self.name, takes=", ".join(self.arguments) or "nothing", does=does)

    def messages(self) -> dict[str, object]:
        """The row of the training file: a chat of one question and one answer."""
        chat = [("user", self.question), ("assistant", self.answer)]
        return {"messages": [{"role": role, "content": content} for role, content in chat]}


def parse_card(text: str) -> dict[str, str] | None:
    """The fields of a generated answer, or None unless the whole answer is one card."""
    match = CARD_PATTERN.fullmatch(text.strip())
    return match.groupdict() if match else None


def collect_cards(modules: tuple[str, ...]) -> list[Card]:
    """The cards of documented functions and methods of some modules, in a fixed order."""
    found: dict[str, Card] = {}
    for module in modules:
        cards = list(_cards_of(module))
        random.Random(0).shuffle(cards)
        found.update((card.name, card) for card in cards[:MOST_OF_A_MODULE])
    return list(found.values())


def _cards_of(module_name: str) -> Iterator[Card]:
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # not built on this machine
        return
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or getattr(value, "__module__", None) != module_name:
            continue
        if inspect.isfunction(value):
            yield from _card(module_name, name, value)
        elif inspect.isclass(value):
            for method, function in sorted(vars(value).items()):
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield from _card(module_name, f"{name}.{method}", function)


def _card(module: str, name: str, function: object) -> Iterator[Card]:
    docstring = inspect.cleandoc(getattr(function, "__doc__", None) or "").strip()
    paragraph = docstring.split("\n\n")[0]
    summary = paragraph.replace("\n", " ")
    if not 20 <= len(summary) <= 110 or not summary.endswith(".") or "  " in summary:
        return
    if len(docstring) > MAX_DOCSTRING:
        docstring = docstring[:MAX_DOCSTRING].rsplit(" ", 1)[0].rstrip() + " ..."
    try:
        signature = inspect.signature(function)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    arguments = tuple(_STARS.get(p.kind, "") + p.name for p in plain if p.name != "self")
    short = name.rsplit(".", 1)[-1]
    call = f"{short}{signature.replace(parameters=plain, return_annotation=signature.empty)}"
    if len(call) <= 90 and len(arguments) <= 6 and " at 0x" not in call:
        yield Card(module, f"{module}.{name}", arguments, call, docstring)
