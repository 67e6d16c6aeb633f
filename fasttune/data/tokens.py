"""Conversations → token ids and labels. Labels come from the structure of the conversation: the text is rendered turn
by turn, each character is marked as trained or not, and a token is trained when its first character is.

A tokenizer is a transformers fast tokenizer; this module imports neither torch nor transformers.
"""

from dataclasses import dataclass, field
from typing import Any

from fasttune.data import formats
from fasttune.data.formats import Message
from fasttune.data.sources import Row
from fasttune.errors import DataError

IGNORE = -100  # label of a token that is read, but not learned
MAX_UNTRAINABLE_SHARE = 0.05

# For base models that come without a template: role headings, the answer closed by EOS. BOS is added where the
# tokenizer adds one to plain text.
PLAIN_TEMPLATE = (
    "{{ bos_token if add_bos else '' }}"
    "{% for m in messages %}"
    "### {{ m['role'] | capitalize }}:\n{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


@dataclass
class Tokenized:
    """Rows ready to train on, and what happened to the rest.

    input_ids, labels: one list per row, equal lengths; labels are IGNORE where the token is not trained.
    """

    input_ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    truncated: int = 0
    too_long_dropped: int = 0
    unlabelled_dropped: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    def summary(self) -> str:
        """One line: rows, tokens, mean length and what was cut or dropped."""
        tokens = sum(map(len, self.input_ids))
        trained = sum(label != IGNORE for row in self.labels for label in row)
        parts = [f"{len(self):,} rows, {tokens:,} tokens ({tokens / len(self):.0f} a row), {trained:,} trained"]
        parts += [f"{self.truncated:,} truncated"] if self.truncated else []
        parts += [f"{self.too_long_dropped:,} too long, dropped"] if self.too_long_dropped else []
        parts += [f"{self.unlabelled_dropped:,} without a label, dropped"] if self.unlabelled_dropped else []
        return "; ".join(parts)


def ensure_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template the plain one (so that it is saved with the adapter). True if it did."""
    if tokenizer.chat_template:
        return False
    bos = tokenizer.bos_token_id
    add_bos = bos is not None and tokenizer("x").input_ids[:1] == [bos]
    tokenizer.chat_template = PLAIN_TEMPLATE.replace("bos_token if add_bos else ''", "bos_token" if add_bos else "''")
    return True


def render(messages: list[Message], tokenizer: Any, number: int) -> list[tuple[str, bool]]:
    """A conversation as (text, trained) segments: everything up to an assistant's answer, the answer, and so on.

    Raises DataError when the template does not render prefixes consistently (a later turn changes earlier text), since
    then no label could be trusted.
    """
    segments: list[tuple[str, bool]] = []
    done = ""
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"data: row {number}: the chat template does not render prefixes consistently (turn {index + 1} "
                "changes earlier text), so labels cannot be placed; use a template that only appends"
            )
        answer, rest = _close_turn(after[len(before) :], tokenizer.eos_token)
        segments += [(before[len(done) :], False), (answer, True), (rest, False)]
        done = after
    return [segment for segment in [*segments, (whole[len(done) :], False)] if segment[0]]


def _close_turn(answer: str, eos: str | None) -> tuple[str, str]:
    """Split off what the template writes after the end-of-turn token (usually a line break): it is not learned."""
    stripped = answer.rstrip()
    return (stripped, answer[len(stripped) :]) if eos and stripped.endswith(eos) else (answer, "")


def prompt_text(messages: list[Message], tokenizer: Any) -> str:
    """What the model is given before its last answer, ready to generate from."""
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return tokenizer.apply_chat_template(messages[:last], tokenize=False, add_generation_prompt=True)


def tokenize(
    rows: list[Row],
    tokenizer: Any,
    max_length: int,
    columns: dict[str, str] | None = None,
    train_on: str = "assistant",
    too_long: str = "truncate",
) -> Tokenized:
    """All rows as ids and labels; rows without a label are dropped and counted.

    Raises DataError when nothing is left, or when over MAX_UNTRAINABLE_SHARE of the rows have no label (one is shown).
    """
    texts, spans = [], []
    for number, row in enumerate(rows, 1):
        text, trained = _row_text(formats.rename(row, columns or {}), tokenizer, train_on, number)
        texts.append(text)
        spans.append(trained)
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)

    result = Tokenized()
    unlabelled = []
    for ids, offsets, trained, text in zip(encoded["input_ids"], encoded["offset_mapping"], spans, texts, strict=True):
        labels = _labels(ids, offsets, trained)
        if len(ids) > max_length:
            if too_long == "drop":
                result.too_long_dropped += 1
                continue
            ids, labels = ids[:max_length], labels[:max_length]
            result.truncated += 1
        if all(label == IGNORE for label in labels[1:]):  # the first token has nothing to be predicted from
            unlabelled.append(text)
            continue
        result.input_ids.append(ids)
        result.labels.append(labels)
    result.unlabelled_dropped = len(unlabelled)
    _check_left(result, unlabelled, len(rows), max_length)
    return result


def _row_text(row: Row, tokenizer: Any, train_on: str, number: int) -> tuple[str, list[tuple[int, int]]]:
    """Text of a row and its trained character spans [start, end)."""
    content = formats.conversation(row, number)
    if isinstance(content, str):
        bos = tokenizer.bos_token if tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id] else ""
        text = (bos or "") + content + (tokenizer.eos_token or "")
        return text, [(0, len(text))]
    text, trained = "", []
    for segment, learned in render(content, tokenizer, number):
        if learned or train_on == "all":
            trained.append((len(text), len(text) + len(segment)))
        text += segment
    return text, trained


def _labels(ids: list[int], offsets: list[tuple[int, int]], trained: list[tuple[int, int]]) -> list[int]:
    """A token is learned when its first character lies in a trained span."""
    labels, spans = [], iter(trained)
    start, end = next(spans, (0, 0))
    for token, (first, _) in zip(ids, offsets, strict=True):
        while first >= end and end:
            start, end = next(spans, (0, 0))
        labels.append(token if start <= first < end else IGNORE)
    return labels


def _check_left(result: Tokenized, unlabelled: list[str], rows: int, max_length: int) -> None:
    if len(unlabelled) > MAX_UNTRAINABLE_SHARE * rows:
        shown = unlabelled[0] if len(unlabelled[0]) < 160 else unlabelled[0][:160] + "…"
        raise DataError(
            f"data: {len(unlabelled):,} of {rows:,} rows have no trained token within model.max_length={max_length}; "
            f"raise it or drop long rows (data.too_long=drop). One of them: {shown!r}"
        )
    if not len(result):
        raise DataError(
            f"data: no row is left of {rows:,}; all are longer than model.max_length={max_length}: raise it"
        )
