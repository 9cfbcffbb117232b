"""Talk with a trained model: messages in, answers out, written as its blocks are finished.

A line of the input is a message of the user's; or JSON: an object with `messages`, or a list of them, is a conversation
of its own, and an object with `role` and `content` the next message. An empty line is passed over, and a line that says
/new begins a new conversation. An answer ends with the token that the chat template writes behind answers, with EOS,
or after sampling.length tokens.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TextIO

from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.data.chat import ANSWERS, chat_format, check_messages
from bd3lm_scale.data.records import BadRecordError
from bd3lm_scale.data.tokenizer import Tokenizer
from bd3lm_scale.inference.batches import Sample, draw_samples

_INVITATION, _NEW = "> ", "/new"


class Assistant:
    """A model that answers.

    Args:
        config: of the run, with its sampling section.
        tokenizer: with a chat template (ValueError).
        open_network: the network with an empty context for so many rows.
        start: the token that precedes a conversation in training.
        device: of the network.
        system: what every new conversation begins with.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        open_network: Callable[[int], Any],
        start: int,
        device: Any = "cpu",
        system: str | None = None,
    ):
        self._config, self._tokenizer, self._open_network = config, tokenizer, open_network
        self._start, self._device = start, device
        self._format = chat_format(tokenizer)
        self._end_of_turn = self._format.end_of_turn()
        self._opening = [{"role": "system", "content": system}] if system is not None else []

    def talk(self, lines: TextIO, out: TextIO) -> Iterator[tuple[Sample, list[dict[str, Any]]]]:
        """Answer every line; each answer with the conversation up to it.

        Args:
            lines: where messages come from. At a terminal a message that cannot be answered is no end.
            out: where answers are written to while they are made.

        Raises:
            ValueError: naming the line that is no message.
        """
        at_terminal = lines.isatty()
        messages: list[dict[str, Any]] = list(self._opening)
        for number, line in enumerate(_lines(lines, out if at_terminal else None), start=1):
            try:
                if line.strip() == _NEW:
                    messages = list(self._opening)
                    continue
                asked = self._read(line, messages)
                sample = self.answer(asked, number - 1, out)
            except ValueError as problem:
                if not at_terminal:
                    raise ValueError(f"--chat, line {number}: {problem}") from problem
                out.write(f"{problem}\n")
                continue
            messages = [*asked, {"role": ANSWERS, "content": self._text(sample.tokens[sample.prompt_length :])}]
            yield sample, messages

    def answer(self, messages: list[dict[str, Any]], index: int, out: TextIO) -> Sample:
        """One answer, the `index`-th draw of the run, written to `out` block by block (BadRecordError)."""
        prompt = (self._start, *self._format.prompt(messages))
        sampling = replace(self._config.sampling, length=len(prompt) + self._config.sampling.length, stop_at_eos=True)
        if self._config.diffusion.objective == "sedd" and sampling.length > self._config.data.context_length:
            raise ValueError(
                f"the conversation and an answer of sampling.length take {sampling.length} tokens, but sedd has no way "
                f"beyond its context of {self._config.data.context_length}; use shorter ones"
            )
        writer = _Writer(self._text, out)
        (sample,) = draw_samples(
            self._open_network,
            replace(self._config, sampling=sampling),
            [prompt],
            [index],
            mask_token_id=self._tokenizer.mask_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
            device=self._device,
            end_of_turn=self._end_of_turn,
            on_text=writer.show,
        )
        writer.finish(sample.tokens[sample.prompt_length :])
        return sample

    def _read(self, line: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation that a line asks to go on with."""
        try:
            said = json.loads(line)
        except ValueError:
            said = line.rstrip("\r\n")
        if isinstance(said, dict) and "messages" in said:
            asked = said["messages"]
        elif isinstance(said, list):
            asked = said
        else:
            is_message = isinstance(said, dict) and "role" in said
            asked = [*messages, said if is_message else {"role": "user", "content": line.rstrip("\r\n")}]
        checked = check_messages(asked, needs_answer=False)
        if checked[-1]["role"] == ANSWERS:
            raise BadRecordError("nothing to answer", f"the last message is the {ANSWERS}'s own; end with another's")
        return checked

    def _text(self, tokens: tuple[int, ...]) -> str:
        return self._tokenizer.decode(tokens)


class _Writer:
    """Writes a growing text; what may still change, an unfinished character, is held back."""

    def __init__(self, decode: Callable[[tuple[int, ...]], str], out: TextIO):
        self._decode, self._out = decode, out
        self._shown = ""

    def show(self, tokens: tuple[int, ...]) -> None:
        """The text so far."""
        self._write(self._decode(tokens).rstrip("\ufffd"))

    def finish(self, tokens: tuple[int, ...]) -> None:
        """The whole text."""
        self._write(self._decode(tokens))
        self._out.write("\n")
        self._out.flush()

    def _write(self, text: str) -> None:
        if text.startswith(self._shown):
            self._out.write(text[len(self._shown) :])
            self._out.flush()
            self._shown = text


def _lines(lines: TextIO, prompt_on: TextIO | None) -> Iterator[str]:
    """The lines that are not empty; a person is shown that it is their turn."""
    while True:
        if prompt_on is not None:
            prompt_on.write(_INVITATION)
            prompt_on.flush()
        line = lines.readline()
        if not line:
            return
        if line.strip():
            yield line
