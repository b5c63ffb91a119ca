"""Tokenizer files in the form that transformers reads, and the reverse conversion."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers, processors

from rmkv_cli.data.chat import ASSISTANT
from rmkv_cli.errors import UserError
from rmkv_cli.generation.sampling import sampling_defaults
from rmkv_cli.progress import stderr
from rmkv_cli.tokenizer import BARE, FILES, TEMPLATE, Special, Tokenizer
from rmkv_cli.tokenizer.foreign import GENERATION
from rmkv_cli.tokenizer.template import Message
from rmkv_cli.tokenizer.tokenizer import PROBE

THINKING = (Special.THINK, Special.END_THINK)
CONVERSATION = Message("user", "What is it? \n"), Message("assistant", " So be it."), Message("user", "And\n\nnow?")
COMPOSED = PROBE + " e\u0301 \u212b \ufb01"
"""Text that only a tokenizer without a normalizer decodes unchanged."""
MARK = "\ue000"
"""Private-use character that the chat template inserts after "<" in text that spells a special token."""


def write_tokenizer(directory: Path, tokenizer: Tokenizer, longest: int | None) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into a folder.

    A pretrained model's tokenizer is written unchanged. With rmkv's own, a text is encoded as a document: the
    end-of-document token, then its tokens. The normalizer removes the chat template's marks. The thinking tokens are
    not special here, so `skip_special_tokens` keeps thoughts and answers separate.

    Args:
        directory: the folder.
        tokenizer: the model's tokenizer.
        longest: maximum number of tokens that the model reads; None for any number.

    Raises:
        UserError: the tokenizer has a normalizer or a post-processor.
    """
    if tokenizer.foreign:
        tokenizer.save(directory)
        return
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    if library.normalizer is not None or library.post_processor is not None:
        raise UserError("its tokenizer.json has a normalizer or a post-processor; `rmkv tokenizer train` makes none")
    eod = str(Special.EOD)
    library.normalizer = normalizers.Replace(f"<{MARK}", "<")
    library.post_processor = processors.TemplateProcessing(
        single=f"{eod} $A", pair=f"{eod} $A $B", special_tokens=[(eod, tokenizer.eod)]
    )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eod,
        "eos_token": eod,
        "pad_token": str(Special.PAD),
        "unk_token": str(Special.UNK),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if longest is not None:
        config["model_max_length"] = longest
    described = json.loads(library.to_str())
    for token in described["added_tokens"]:
        token["special"] = token["content"] not in THINKING
    (directory / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    template = chat_template() if tokenizer.template is None else tokenizer.template.source
    (directory / TEMPLATE).write_text(template, encoding="utf-8")


def read_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer that `write_tokenizer` wrote; raise `UserError` as `Tokenizer.load` does."""
    written = Tokenizer.load(directory)
    if written.foreign:
        return written
    described = json.loads(written.to_json()) | {"normalizer": None, "post_processor": None}
    files = {FILES[0]: json.dumps(described)}
    if written.template is not None and written.template.source != chat_template():
        files[TEMPLATE] = written.template.source
    return Tokenizer.from_files(files)


def write_foreign_tokenizer(source: Path, out: Path) -> None:
    """Write the tokenizer of a pretrained model's folder unchanged into a model folder.

    Copies tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja, if the source has
    them. Writes a generation_config.json with the ids of the tokens that begin and end a text, and rmkv's sampling
    defaults. Prints notes on what users should know about the tokenizer.

    Raises:
        UserError: there is no tokenizer.json, or the tokenizer is not supported.
    """
    if not (source / FILES[0]).is_file():
        raise UserError(
            f"{source}: has no {FILES[0]}; in transformers, AutoTokenizer.from_pretrained({str(source)!r})"
            f".save_pretrained({str(source)!r}) makes one from the other files"
        )
    tokenizer = Tokenizer.load(source)
    tokenizer.save(out)
    generation = tokenizer.generation_ids() | sampling_defaults()
    (out / GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    for note in notes_on(tokenizer):
        stderr().print(f"note: {note}", style="yellow")


def notes_on(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield notes for users of a pretrained model's tokenizer."""
    if tokenizer.decode(tokenizer.encode(COMPOSED)) != COMPOSED:
        yield "this tokenizer normalizes texts or lacks some bytes, so decoding does not return every text exactly"
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())  # parses special tokens in text
    end = tokenizer.roles.eod
    pieces = ("What ", end, " is") if tokenizer.template is None else tokenizer.template.prompt(CONVERSATION)
    spelt = "".join(pieces)
    if tokenizer.encode_document((BARE, *pieces)) != library.encode(spelt, add_special_tokens=False).ids:
        yield "next to special tokens, rmkv tokenizes the text of conversations differently from transformers"
    if tokenizer.template is None:
        yield f"it has no chat template, so the model completes texts but takes no conversations; add a {TEMPLATE}"
    elif not tokenizer.template.by_turns:
        yield (
            "its chat template does not mark where an answer ends, so a chat has one turn, and training cannot "
            "supervise only the answers"
        )


def chat_template() -> str:
    """Return `rmkv_cli.data.chat.pieces_of` as a Jinja template over messages of a role, a content and tool calls."""
    mark = f"\\u{ord(MARK):04x}"
    marked = "".join(
        f" | replace('<{rest}', '<{mark}{rest}')" for rest in (mark, *(special[1:] for special in Special))
    )
    return f"""\
{{%- macro plain(text) -%}}{{{{ text{marked} }}}}{{%- endmacro -%}}
{{%- macro joined(parts) -%}}
{{%- for part in parts -%}}
{{%- if part.type != 'text' -%}}{{{{ raise_exception('only parts of type text are read') }}}}{{%- endif -%}}
{{{{- part.text -}}}}
{{%- endfor -%}}
{{%- endmacro -%}}
{{%- macro called(calls) -%}}
{{%- for call in calls -%}}
{{{{- '\\n' if not loop.first -}}}}
{{%- set arguments = call.function.arguments -%}}
{{{{- '<tool_call>\\n{{"name": ' + call.function.name | tojson + ', "arguments": ' -}}}}
{{{{- (arguments if arguments is string else arguments | tojson) + '}}\\n</tool_call>' -}}}}
{{%- endfor -%}}
{{%- endmacro -%}}
{{{{- '{Special.EOD}' -}}}}
{{%- set said = namespace(text='') -%}}
{{%- for message in messages -%}}
{{%- set content = message.content or '' if message.tool_calls else message.content -%}}
{{%- set content = content if content is string else joined(content) -%}}
{{%- if message.tool_calls -%}}
{{%- set content = content + ('\\n' if content else '') + called(message.tool_calls) -%}}
{{%- endif -%}}
{{%- if message.role | trim | lower in {sorted(ASSISTANT)} -%}}
{{%- set thought = content.lstrip().partition('{Special.END_THINK}') -%}}
{{%- if thought[1] and thought[0].startswith('{Special.THINK}') -%}}
{{{{- plain(said.text) + '{Special.THINK}' + plain(thought[0][{len(Special.THINK)}:]) + '{Special.END_THINK}' -}}}}
{{%- set said.text = thought[2] -%}}
{{%- else -%}}
{{%- set said.text = said.text + content -%}}
{{%- endif -%}}
{{%- elif content -%}}
{{{{- plain(said.text) + '{Special.START}' + plain(content) + '{Special.END}' -}}}}
{{%- set said.text = '' -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{- plain(said.text) -}}}}
"""
