"""Five chat templates in their public forms, and a small tokenizer that knows their marks: what units on instruction data render with.

No model hub is needed. The forms are those of ChatML, Llama 3, Gemma, Zephyr and Mistral models. The tokenizer is a byte-level BPE that is
trained here, in a moment, on the course's own passages. Each form comes twice: as models ship it, and with {% generation %} blocks around
what the assistant says.
"""

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from course.lab.text import prose_documents

_CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% if message['role'] == 'assistant' %}[[{{ message['content'] + '<|im_end|>' }}]]{{ '\\n' }}\
{% else %}{{ message['content'] + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_LLAMA3 = """{{ bos_token }}{% for message in messages %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\
{% if message['role'] == 'assistant' %}[[{{ message['content'] | trim + '<|eot_id|>' }}]]\
{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

_GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'assistant' %}{{ '<start_of_turn>model\\n' }}[[{{ message['content'] | trim + '<end_of_turn>\\n' }}]]\
{% else %}{{ '<start_of_turn>' + message['role'] + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

_ZEPHYR = """{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}\
{% if message['role'] == 'assistant' %}[[{{ message['content'] + eos_token }}]]{% else %}{{ message['content'] + eos_token }}{% endif %}\
{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

_MISTRAL = """{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}[[{{ ' ' + message['content'] + eos_token }}]]\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

_FORMS = {  # name -> template with [[ ]] around the assistant's words, the text that ends a turn, <bos>
    "ChatML": (_CHATML, "<|im_end|>", None),
    "Llama 3": (_LLAMA3, "<|eot_id|>", "<|begin_of_text|>"),
    "Gemma": (_GEMMA, "<end_of_turn>", "<bos>"),
    "Zephyr": (_ZEPHYR, "</s>", "<s>"),
    "Mistral": (_MISTRAL, "</s>", "<s>"),
}
FORMS = tuple(_FORMS)
_SPECIAL = (
    "<pad> <s> </s> <bos> <eos> <|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|> <|im_start|> <|im_end|> "
    "<start_of_turn> <end_of_turn>"
).split()  # Zephyr's and this Mistral form's marks are plain text, as in their models


def template(form: str, markers: bool = False) -> str:
    """A form's template, as models ship it or with {% generation %} blocks.

    Raises:
        ValueError: there is no such form.
    """
    text = _form(form)[0]
    start, end = ("{% generation %}", "{% endgeneration %}") if markers else ("", "")
    return text.replace("[[", start).replace("]]", end)


def chat_tokenizer(form: str = "ChatML", markers: bool = False, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """The small tokenizer, with a form's template and its end of turn as the end of text.

    Like Llama's and Gemma's it puts <bos> in front of a plain text, where the form has one.

    Args:
        pad_is_eos: as many recipes set it.

    Raises:
        ValueError: there is no such form.
    """
    _, end, bos = _form(form)
    core = Tokenizer.from_str(_trained())
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=end, pad_token=end if pad_is_eos else "<pad>")
    tokenizer.chat_template = template(form, markers)
    return tokenizer


def _form(form: str) -> tuple[str, str, str | None]:
    if form not in _FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    return _FORMS[form]


@functools.cache
def _trained() -> str:
    """The tokenizer as JSON: 1,024 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in _SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(prose_documents("passages").values(), trainer)
    return tokenizer.to_str()
