"""Small tokenizers with the components, chat templates and files of well-known models."""

import json
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 2024-01-02, isn't it?\n\nHello world, hello again!\n" * 3,
    "def f(x):\n\treturn x ** 2  # squares\r\n\n" * 3,
    "Naïve café, 日本語の文章。 Привет мир! user assistant system You are a helpful assistant named\n" * 3,
    "[INST] what is this? [/INST] it is that. <think> so </think>\n" * 3,
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_CHAT = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA32_CHAT = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}"
    "\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""  # noqa: E501 - as it is published


def _byte_level(pre_tokenizer, specials, normalizer=None, first=True, **model):
    """A byte-level BPE tokenizer whose special tokens come before all others or after them."""
    library = Tokenizer(models.BPE())
    library.normalizer, library.pre_tokenizer = normalizer, pre_tokenizer
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = [token.content for token in specials]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=names if first else [], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    described = json.loads(library.to_str())
    described["model"] |= model
    if first:
        described["added_tokens"] = []
    library = Tokenizer.from_str(json.dumps(described))
    for token in specials:
        (library.add_special_tokens if token.special else library.add_tokens)([token])
    return library


def _sentencepiece(metaspace):
    """A BPE tokenizer over characters with byte fallback, in which a space belongs to the following word."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    described = json.loads(library.to_str())
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(described["model"]["vocab"], key=described["model"]["vocab"].get)
    described["model"] |= {
        "vocab": {name: i for i, name in enumerate(dict.fromkeys([*names, "▁▁", "▁▁▁▁"]))},
        "merges": [*described["model"]["merges"], ["▁", "▁"], ["▁▁", "▁▁"]],
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
    }
    library = Tokenizer.from_str(json.dumps(described))
    if metaspace:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        library.pre_tokenizer = None
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    return _with_begin(library, "<s>")


def _with_begin(library, token):
    library.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, library.token_to_id(token))]
    )
    return library


def _special(*names):
    return [AddedToken(name, special=True, normalized=False) for name in names]


def _smollm2():
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library = _byte_level(split, _special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    return library, names | {"pad_token": "<|im_end|>"}, CHATML, None


def _split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _qwen3():
    tags = [AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>", "<tool_response>")]
    specials = [*_special("<|endoftext|>", "<|im_start|>", "<|im_end|>"), *tags]
    library = _byte_level(_split(LLAMA3.replace("{1,3}", "")), specials, normalizers.NFC(), first=False)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False, "bos_token": None}
    return library, names, QWEN3, ["<|im_end|>", "<|endoftext|>"]


def _llama3():
    specials = _special(
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"
    )
    library = _byte_level(_split(LLAMA3), specials, first=False, ignore_merges=True)
    begin = {"__type": "AddedToken", "content": "<|begin_of_text|>", "special": True, "normalized": False}
    names = {"bos_token": begin | {"lstrip": False, "rstrip": False, "single_word": False}, "eos_token": "<|eot_id|>"}
    return _with_begin(library, "<|begin_of_text|>"), names, LLAMA3_CHAT, ["<|end_of_text|>", "<|eot_id|>"]


def _llama32():
    return *_llama3()[:2], LLAMA32_CHAT, ["<|end_of_text|>", "<|eot_id|>"]


def _mistral():
    return _sentencepiece(False), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, MISTRAL, None


def _tinyllama():
    return _sentencepiece(True), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, ZEPHYR, None


def _phi3():
    """A tokenizer whose special tokens absorb the white space after them; the template makes some from roles."""
    library = _sentencepiece(False)
    roles = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    library.add_special_tokens([AddedToken(name, special=True, normalized=False, rstrip=True) for name in roles])
    names = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    return library, names, PHI3, ["<|endoftext|>", "<|end|>"]


MODELS = {
    "smollm2": _smollm2,
    "qwen3": _qwen3,
    "llama3": _llama3,
    "llama3.2": _llama32,
    "mistral": _mistral,
    "tinyllama": _tinyllama,
    "phi3": _phi3,
}


@lru_cache
def foreign_files(name):
    """The contents of the files of a model's tokenizer, by name."""
    library, names, template, ends = MODELS[name]()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    ids = [library.token_to_id(token) for token in ends or [names["eos_token"]]]
    files = {"tokenizer.json": library.to_str(), "tokenizer_config.json": json.dumps(config)}
    files |= {"generation_config.json": json.dumps({"eos_token_id": ids if ends else ids[0], "do_sample": True})}
    return files | {"chat_template.jinja": template}


def foreign_folder(folder: Path, name):
    """A new folder with the files of a model's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in foreign_files(name).items():
        (folder / file).write_text(content, encoding="utf-8")
    return folder
