"""Conversations as tokens: what a tokenizer's chat template makes of messages, and which of its text is an answer.

    messages ── template ──► text, spans of the answers ── cut at special tokens and at the spans ──► ids, is_target

A template is a Jinja program out of a tokenizer's folder. It runs in Jinja's sandbox, which gives it strings, numbers
and the messages, and is told neither time nor date: the same messages always give the same tokens. What it writes
between `{% generation %}` and `{% endgeneration %}` are answers. In a template without that, an answer is what it adds
to the conversation before, generation prompt included; this must be a prefix of the whole.

Special tokens are those that the template writes. Their names inside a message are text, as everywhere.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from bd3lm_scale.data.documents import record_object
from bd3lm_scale.data.records import BadRecordError, Options, Record
from bd3lm_scale.data.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
ANSWERS = "assistant"
# noncharacters, which stand in no text: around what a generation block writes, and in special names inside a message
_OPEN, _CLOSE, _GUARD = "\ufdd0", "\ufdd1", "\ufdd2"
_RESERVED = re.compile(f"[{_OPEN}-\ufdef]")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages as tokens.

    Attributes:
        ids: of the whole conversation.
        is_target: which of them belong to an answer, the token that ends it included.
        text: what the template wrote.
        ends_open: whether the last token is text of an answer, which nothing has ended.
    """

    ids: list[int]
    is_target: list[bool]
    text: str
    ends_open: bool


def check_messages(value: Any, field: str = "messages", needs_answer: bool = True) -> list[dict[str, Any]]:
    """The messages of a conversation, perhaps with an answer. BadRecordError, naming the message, for what is none."""
    if value is None:
        raise BadRecordError("null", f"field {field!r} is null")
    if not isinstance(value, list):
        raise BadRecordError("no messages", f"field {field!r} is not a list of messages but {type(value).__name__}")
    if not value:
        raise BadRecordError("no messages", f"field {field!r} has no messages")
    for number, message in enumerate(value, start=1):
        _check_message(message, f"message {number}")
    if needs_answer and not any(message["role"] == ANSWERS for message in value):
        raise BadRecordError("no answer", f"no message has the role {ANSWERS!r}, so nothing in it could be learnt")
    return value


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise BadRecordError("bad message", f"{where} is not an object but {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        shown = json.dumps(role)[:40] if "role" in message else "none"
        raise BadRecordError("unknown role", f"{where}: its role is {shown}; use {', '.join(ROLES)}")
    where = f"{where} ({role})"
    calls_tools = role == ANSWERS and isinstance(message.get("tool_calls"), list) and bool(message["tool_calls"])
    if content is None and not calls_tools:
        kind = "null" if "content" in message else "none"
        raise BadRecordError("no content", f"{where}: its content is {kind}")
    if content is not None and not isinstance(content, str):
        raise BadRecordError("not text", f"{where}: its content is not text but {type(content).__name__}")
    if not calls_tools and not str(content).strip():
        raise BadRecordError("empty message", f"{where}: its content is empty")
    try:
        written = json.dumps(message, ensure_ascii=False)
        written.encode()
    except UnicodeEncodeError as problem:
        found = f"\\u{ord(problem.object[problem.start]):04x}"
        raise BadRecordError("half a character", f"{where} has {found}, half a character") from problem
    if reserved := _RESERVED.search(written):
        raise BadRecordError("noncharacter", f"{where} has U+{ord(reserved[0]):04X}, which is no character")


def encode_record(record: Record, options: Options, chat: "ChatFormat") -> Conversation:
    """The conversation in a record, a JSON object with a list of messages and perhaps `tools` (BadRecordError)."""
    if not record.is_json and record.problem is None:
        raise BadRecordError("not a JSON object", "conversations are JSON objects, one a line; this is text")
    entry = record_object(record, options)
    tools = entry.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise BadRecordError("bad tools", f"field 'tools' is not a list but {type(tools).__name__}")
    return chat.encode(check_messages(entry[options.field], options.field), tools)


class ChatFormat:
    """A tokenizer's chat template, ready to be used.

    Args:
        tokenizer: with a chat template (ValueError where it has none, or one that is not usable).

    Attributes:
        hash: SHA-256 of the template.
    """

    def __init__(self, tokenizer: Tokenizer):
        template = tokenizer.chat_template
        if template is None:
            raise ValueError(
                "the tokenizer has no chat template; give one with --chat-template FILE (Jinja, as in transformers)"
            )
        self.hash = hashlib.sha256(template.encode()).hexdigest()
        self._tokenizer = tokenizer
        self._names = {text: i for i, text in tokenizer.special_text.items() if i != tokenizer.mask_token_id and text}
        longest_first = sorted(self._names, key=len, reverse=True)
        self._name = re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})(?!{_GUARD})")
        self._roles = {
            f"{role}_token": tokenizer.special_text.get(getattr(tokenizer, f"{role}_token_id"))
            for role in ("bos", "eos", "pad")
        }
        environment = _environment()
        try:
            self._template = environment.from_string(template)
        except (jinja2.TemplateError, RecursionError) as problem:
            raise ValueError(f"the tokenizer's chat template is not usable ({_reason(problem)})") from problem
        self._marks_answers: bool = environment.marks_answers  # pyright: ignore[reportAttributeAccessIssue]

    def encode(self, messages: Sequence[Message], tools: list | None = None) -> Conversation:
        """A conversation with its answers as targets.

        Raises:
            BadRecordError: the template refuses the messages, or does not say where an answer stands.
        """
        messages = [self._guarded(message) for message in messages]
        text, spans = self._render(messages, tools)
        if not self._marks_answers:
            spans = self._find_answers(messages, tools, text)
        conversation = self._tokenized(text, spans)
        if not any(conversation.is_target):
            raise BadRecordError("no answer", "the chat template marks none of its text as an answer")
        return conversation

    def prompt(self, messages: Sequence[Message], tools: list | None = None) -> list[int]:
        """The ids that an answer to these messages follows. BadRecordError as for `encode`."""
        messages = [self._guarded(message) for message in messages]
        text, spans = self._render(messages, tools, prompt=True)
        if not self._marks_answers:
            try:
                spans = self._find_answers(messages, tools, text)  # cut where they were cut in training
            except BadRecordError:
                spans = []
        return self._tokenized(text, spans).ids

    def end_of_turn(self) -> int | None:
        """The special token that the template writes behind an answer; None: it writes none."""
        question = [{"role": "user", "content": "x"}]
        for messages in (question, [{"role": "system", "content": "x"}, *question]):
            try:
                found = self.encode([*messages, {"role": ANSWERS, "content": "x"}])
            except BadRecordError:
                continue  # some templates demand a system message, some refuse one
            last = max(place for place, is_target in enumerate(found.is_target) if is_target)
            return found.ids[last] if found.ids[last] in self._names.values() else None
        return None

    def _render(self, messages: list[Message], tools: list | None, prompt: bool = False) -> tuple[str, list]:
        """What the template writes, and [start, stop) of what it marks in it."""
        try:
            written = self._template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self._roles
            )
        except Exception as problem:  # a template is a program: it can fail in any way
            reason = f"the chat template does not take these messages ({_reason(problem)})"
            raise BadRecordError("refused by the template", reason) from problem
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        place = start = depth = 0
        for part in re.split(f"([{_OPEN}{_CLOSE}])", written):
            if part == _OPEN:
                start, depth = (place if depth == 0 else start), depth + 1
            elif part == _CLOSE:
                depth -= 1
                spans += [(start, place)] if depth == 0 else []
            else:
                parts.append(part)
                place += len(part)
        if depth:
            raise BadRecordError("refused by the template", "the chat template cuts a generation block in two")
        return "".join(parts), spans

    def _find_answers(self, messages: list[Message], tools: list | None, text: str) -> list[tuple[int, int]]:
        """Where the answers stand in a template's text that does not mark them."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != ANSWERS:
                continue
            where = f"message {number + 1} ({ANSWERS})"
            try:
                before = self._render(messages[:number], tools, prompt=True)[0]
                through = self._render(messages[: number + 1], tools)[0]
            except BadRecordError as problem:
                raise BadRecordError(problem.kind, f"{where}: {problem.reason}") from problem
            if not (text.startswith(through) and through.startswith(before)):
                raise BadRecordError(
                    "answer not found",
                    f"{where}: the chat template writes the conversation up to it otherwise than within the whole, so "
                    "where the answer stands is not known; give one that marks answers with {% generation %} "
                    "(--chat-template FILE)",
                )
            spans.append((len(before), self._without_tail(text, len(before), len(through))))
        return spans

    def _without_tail(self, text: str, start: int, stop: int) -> int:
        """The end of an answer: blanks behind the special token that ends it are no part of it."""
        ends = [found.end() for found in self._name.finditer(text, start, stop)]
        return ends[-1] if ends and not text[ends[-1] : stop].strip() else stop

    def _guarded(self, message: Message) -> Message:
        """The message, with the names of special tokens in it kept from being taken for such."""
        return {key: value if key == "role" else self._guard(value) for key, value in message.items()}

    def _guard(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._name.sub(lambda name: f"{name[0][0]}{_GUARD}{name[0][1:]}", value)
        if isinstance(value, list):
            return [self._guard(entry) for entry in value]
        if isinstance(value, dict):
            return {self._guard(key): self._guard(entry) for key, entry in value.items()}
        return value

    def _tokenized(self, text: str, spans: list[tuple[int, int]]) -> Conversation:
        pieces = list(self._pieces(text, spans))
        texts = [piece.replace(_GUARD, "") for piece, _, token in pieces if token is None]
        try:
            encoded = iter(self._tokenizer.encode_batch(texts))
        except ValueError as problem:
            raise BadRecordError("no tokens for it", str(problem)) from problem
        ids: list[int] = []
        is_target: list[bool] = []
        for _, in_answer, token in pieces:
            new = [token] if token is not None else next(encoded)
            ids += new
            is_target += [in_answer] * len(new)
        ends_open = bool(ids) and is_target[-1] and ids[-1] not in self._names.values()
        return Conversation(ids, is_target, text.replace(_GUARD, ""), ends_open)

    def _pieces(self, text: str, spans: list[tuple[int, int]]) -> Iterator[tuple[str, bool, int | None]]:
        """(text, whether it belongs to an answer, its id where it is a special token), in order."""
        found = [(match.start(), match.end(), self._names[match[0]]) for match in self._name.finditer(text)]
        borders = sorted(edge for span in spans for edge in span)
        place = 0
        for start, stop, token in [*found, (len(text), len(text), None)]:
            edges = [place, *(edge for edge in borders if place < edge < start), start]
            for low, high in itertools.pairwise(edges):
                part = self._stripped(text, low, high)
                if part:
                    yield part, _is_inside(low, spans), None
            if token is not None:
                yield text[start:stop], _is_inside(start, spans), token
            place = stop

    def _stripped(self, text: str, low: int, high: int) -> str:
        """text[low:high] without the blanks that a special token beside it takes with it."""
        part = text[low:high]
        for token, (takes_left, takes_right) in self._tokenizer.special_strips.items():
            name = self._tokenizer.special_text[token]
            part = part.lstrip() if takes_right and text.endswith(name, 0, low) else part
            part = part.rstrip() if takes_left and text.startswith(name, high) else part
        return part


@functools.lru_cache(maxsize=8)
def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """The tokenizer's chat format, made once."""
    return ChatFormat(tokenizer)


def _is_inside(place: int, spans: list[tuple[int, int]]) -> bool:
    return any(start <= place < stop for start, stop in spans)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: text that the assistant is to learn."""

    tags = {"generation"}  # noqa: RUF012  the library's own name and type

    def parse(self, parser) -> jinja2.nodes.Node:
        """Read the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.marks_answers = True  # pyright: ignore[reportAttributeAccessIssue]
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What templates may use: the same as in transformers, but for the date."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.extend(marks_answers=False)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: the library's own filter escapes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _reason(problem: BaseException) -> str:
    line = getattr(problem, "lineno", None)
    return f"{f'line {line}: ' if line else ''}{str(problem) or type(problem).__name__}"
