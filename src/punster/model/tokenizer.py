"""Text to ids and back, with the prompt format of a run.

The skeleton of a chat template is encoded with its special tokens, as `transformers` does it; what people wrote is
encoded with special tokens split, so that no text can inject one.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from punster.disk import cache_folder, flush, sha256_of
from punster.errors import UserError
from punster.model.load import BUILT_IN, resolve

if TYPE_CHECKING:
    from punster.model.transformer import Decoder

Messages = Sequence[dict[str, str]]
PLAIN_FORMAT = "{prompt}\n"
_SENTINEL = re.compile(r"%%punster-(\d+)%%")


class Tokenizer:
    """A tokenizer together with a prompt format.

    prompt_format: "auto" (the chat template if the tokenizer has one, else "{prompt}\\n"), "chat", or a text that
    contains "{prompt}".
    """

    def __init__(self, hf: Any, prompt_format: str = "auto"):
        self.hf = hf
        if prompt_format == "auto":
            prompt_format = "chat" if hf.chat_template else PLAIN_FORMAT
        if prompt_format == "chat" and not hf.chat_template:
            raise UserError("--prompt-format chat: this model's tokenizer has no chat template; use a text such as '{prompt}\\n'")
        if prompt_format != "chat" and prompt_format.count("{prompt}") != 1:
            raise UserError(f"--prompt-format {prompt_format!r}: must be auto, chat, or a text that contains {{prompt}} once")
        self.prompt_format = prompt_format
        self._default_system = ""
        self._user_ids = lru_cache(maxsize=1 << 17)(lambda prompt: self._prompt_ids([{"role": "user", "content": prompt}]))
        # A pun is in many pairs.
        self._text_ids = lru_cache(maxsize=1 << 17)(self._ids_of)
        eos = hf.eos_token_id
        if prompt_format == "chat":
            self._default_system, closing = self._inspect_template()
            ids = self._encode(closing, special=True)
            if ids and ids[0] in set(hf.all_special_ids) | set(hf.added_tokens_decoder):
                eos = ids[0]
        if eos is None:
            raise UserError("this tokenizer has no end-of-sequence token")
        self.eos_id: int = eos
        self._register_special()
        self._inspect_starts()

    @classmethod
    def load(cls, model: str, prompt_format: str = "auto") -> Tokenizer:
        """The tokenizer of a --model value."""
        where = resolve(model)
        if where.suffix != ".gguf":
            return cls(read_tokenizer(where), prompt_format)
        sha256 = BUILT_IN[model].sha256 if model in BUILT_IN else sha256_of(where)
        folder = converted_gguf(where, sha256)
        try:
            hf = read_tokenizer(folder)
        except UserError:  # damaged since it was converted: once more
            (folder / "complete").unlink(missing_ok=True)
            hf = read_tokenizer(converted_gguf(where, sha256))
        return cls(hf, prompt_format)

    def check_fits(self, model: Decoder) -> Tokenizer:
        """Refuse a model that has no embedding for some of this tokenizer's ids."""
        if (size := max(self.hf.get_vocab().values()) + 1) > model.config.vocab_size:
            raise UserError(
                f"the tokenizer of {model.name} has {size} tokens and the model {model.config.vocab_size}: they do not fit together"
            )
        return self

    def _register_special(self) -> None:
        """Make special what steers a dialogue: EOS, and added tokens of the template. Some fine-tunes add them as plain words,
        which any text could inject and every completion would show."""
        skeleton = f"{self.hf.chat_template or ''}{self.prompt_format}"
        if self.prompt_format == "chat":  # a template may put a token together from its parts
            skeleton += self._render([{"role": role, "content": ""} for role in ("user", "assistant", "user")], generation=True)
        plain = {i: token for i, token in self.hf.added_tokens_decoder.items() if not token.special}
        # Words and white space may be in a template as well: they are no control tokens.
        found = [t for i, t in plain.items() if i == self.eos_id or (re.search(r"[^\w\s]", t.content) and t.content in skeleton)]
        for token in found:
            token.special = True
        if found:
            self.hf.add_tokens(found, special_tokens=True)

    def _inspect_starts(self) -> None:
        """What the tokenizer puts in front of each text: a BOS, and SentencePiece's mark of a space, which pieces must not get."""
        hf, text = self.hf, self._encode("a", special=True)
        self._bos = ""  # what writes it in plain prompts, where the tokenizer adds one
        if self.prompt_format != "chat" and hf("a").input_ids[:1] == [hf.bos_token_id]:
            same = self._encode(hf.bos_token + "a", special=True) == [hf.bos_token_id, *text]
            self._bos = hf.bos_token if same else hf.bos_token + " "  # some mark the space only where there is one
        self._marks = text + self._encode("\n", special=True) != self._encode("a\n", special=True)
        self._special = (set(hf.all_special_ids) | set(hf.added_tokens_decoder)) - {hf.unk_token_id}
        eos = hf.convert_ids_to_tokens(self.eos_id)
        self._marks_behind_special = self._encode(eos + "a", special=True) == [self.eos_id, *text]
        self._prompt_end, self._lead = [], ""
        if self._marks:
            self._prompt_end = self.prompt_ids("a")[-1:]
            turns = [{"role": role, "content": ""} for role in ("user", "assistant")]
            if self.prompt_format == "chat":
                asked, answered = self._render(turns[:1], generation=True), self._render(turns, generation=False)
                lead = answered.partition("%%punster-1%%")[0].removeprefix(asked)
                self._lead = "" if lead.strip(" ") else lead

    # ---- encoding ---------------------------------------------------------------------------------------------
    def _encode(self, text: str, special: bool) -> list[int]:
        if not text:
            return []
        if re.search("[\ud800-\udfff]", text):  # what stands for bytes that are not UTF-8
            raise UserError(f"the text {text[:40]!r} is not valid UTF-8")
        ids: list[int] = self.hf(text, add_special_tokens=False, split_special_tokens=not special).input_ids
        return ids

    def _behind(self, before: Sequence[int], text: str, special: bool) -> list[int]:
        """Ids of a text that goes on behind these: as behind a line end, where the tokenizer would mark its start."""
        if text and self._marks and before and not (self._marks_behind_special and before[-1] in self._special):
            line, ids = self._encode("\n", False), self._encode("\n" + text, special)
            if ids[: len(line)] == line:
                return ids[len(line) :]
        return self._encode(text, special)

    def _ids_of(self, text: str, behind_prompt: bool) -> tuple[int, ...]:
        return tuple(self._behind(self._prompt_end, self._lead + text, False) if behind_prompt else self._encode(text, False))

    def _joined(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of a text in pieces, each with whether special tokens are parsed in it."""
        ids: list[int] = []
        gap = ""
        for piece, special in pieces:
            text = gap + piece
            gap = text[len(text.rstrip(" ")) :] if self._marks else ""  # a space is part of the word behind it
            ids += self._behind(ids, text.removesuffix(gap), special)
        return ids + self._behind(ids, gap, False)

    def text_ids(self, text: str) -> list[int]:
        """What a person or model wrote; never yields a special token."""
        return list(self._text_ids(text, False))

    def prompt_ids(self, prompt: str | Messages) -> list[int]:
        """A prompt (or chat messages) up to where the response starts."""
        return list(self._user_ids(prompt)) if isinstance(prompt, str) else self._prompt_ids(prompt)

    def _prompt_ids(self, messages: Messages) -> list[int]:
        # A role stands in the template's skeleton, where special tokens are parsed: only known words may.
        roles = ("system", "user", "assistant", "tool")
        if not messages or any(m.get("role") not in roles or not isinstance(m.get("content"), str) for m in messages):
            raise UserError("chat messages need a role (system, user, assistant or tool) and a text as content")
        if self.prompt_format != "chat":
            prompt = "\n".join(message["content"] for message in messages)
            before, _, after = self.prompt_format.partition("{prompt}")
            ids = self._joined(((before, True), (prompt, False), (after, True)))
            bos = self.hf.bos_token_id
            return [bos, *ids] if self._bos and ids[:1] != [bos] else ids
        skeleton = self._render(messages, generation=True)
        if messages[0]["role"] != "system" and self._default_system:
            skeleton = skeleton.replace(self._default_system, "", 1)
        pieces = enumerate(_SENTINEL.split(skeleton))
        return self._joined((messages[int(piece)]["content"], False) if number % 2 else (piece, True) for number, piece in pieces)

    def response_ids(self, text: str) -> list[int]:
        """A response with its end-of-sequence token."""
        return [*self._text_ids(text, self._marks and text != ""), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """For people and text rewards only: special tokens are dropped, outer white space stripped."""
        return str(self.hf.decode(list(ids), skip_special_tokens=True)).strip()

    def for_transformers(self) -> Any:
        """A copy for exports, whose chat template writes prompts as this tokenizer does: without the default system turn, or in the
        run's own prompt format."""
        hf = copy.deepcopy(self.hf)
        if self.prompt_format != "chat":
            before, after = self.prompt_format.split("{prompt}", 1)
            bos = "" if self.hf.bos_token and before.startswith(self.hf.bos_token) else self._bos
            before, after = (json.dumps(part, ensure_ascii=False) for part in (bos + before, after))
            hf.chat_template = f"{{{{ {before} ~ (messages | map(attribute='content') | join('\\n')) ~ {after} }}}}"
        elif self._default_system:
            template, default = hf.get_chat_template().removesuffix("\n"), json.dumps(self._default_system, ensure_ascii=False)
            shown = f"text | replace({default}, '', 1) if messages[0]['role'] != 'system' else text"
            hf.chat_template = f"{{% set text %}}{template}{{% endset %}}{{{{ {shown} }}}}"
        return hf

    # ---- the template -----------------------------------------------------------------------------------------
    def _render(self, messages: Messages, generation: bool) -> str:
        marked = [{"role": m["role"], "content": f"%%punster-{i}%%"} for i, m in enumerate(messages)]
        from jinja2.exceptions import TemplateError

        try:
            return str(self.hf.apply_chat_template(marked, tokenize=False, add_generation_prompt=generation))
        except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the model's chat template refuses a dialogue of {roles}: {error}") from None

    def _inspect_template(self) -> tuple[str, str]:
        """(system text that the template adds by default, what closes an assistant turn)."""
        roles = ("user", "assistant", "user")
        turns = [{"role": role, "content": ""} for role in roles]
        opening = self._render(turns[:1], generation=False).partition("%%punster-0%%")[0]
        closing = self._render(turns[:2], generation=False).partition("%%punster-1%%")[2]
        between = self._render(turns, generation=False).partition("%%punster-1%%")[2].partition("%%punster-2%%")[0]
        turn = between.removeprefix(closing)
        default = opening.removesuffix(turn) if turn and opening.endswith(turn) else ""
        bos = self.hf.bos_token or ""
        if bos and default.startswith(bos) and bos not in turn:
            default = default.removeprefix(bos)  # a genuine beginning-of-sequence token stays
        return default, closing


def read_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder; UserError where it has none that can be used."""
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a file that it cannot read is a bare one
        raise UserError(f"{folder}: no usable tokenizer ({(str(error).splitlines() or [type(error).__name__])[0]})") from None
    if not hf("a", add_special_tokens=False).input_ids:
        raise UserError(f"{folder}: no usable tokenizer (it has no tokens for a text; is tokenizer.json missing?)")
    return hf


def converted_gguf(file: Path, sha256: str) -> Path:
    """The tokenizer of a GGUF file as a folder; the conversion takes seconds, so it is kept in the cache."""
    from filelock import FileLock
    from transformers import AutoTokenizer

    folder = cache_folder() / "tokenizers" / sha256[:24]
    if (folder / "complete").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder.parent / f".{folder.name}.lock").acquire()
    except OSError as error:
        raise UserError(
            f"cannot write into the cache folder {folder.parent}: {error.strerror}. Set PUNSTER_CACHE to a writable folder."
        ) from None
    with held:
        if not (folder / "complete").exists():
            try:
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            except Exception as error:  # the converter raises a dozen kinds
                raise UserError(f"{file}: no usable tokenizer ({str(error) or type(error).__name__})") from None
            tokenizer.save_pretrained(folder)
            for written in folder.iterdir():
                flush(written)
            (folder / "complete").touch()
    return folder
