"""Five chat templates in their public forms, and a small tokenizer that knows their marks: what units on instruction data render with.

No model hub is needed. The forms are those of ChatML, Llama 3, Gemma, Zephyr and Mistral models. The tokenizer is a BPE that is
trained here, in a moment, on the course's own passages: over bytes, or as Llama 2's, which cuts at no line end and puts a "▁" in front of a
text; Zephyr and Mistral have that one. Each form comes twice: as models ship it, and with {% generation %} blocks around
what the assistant says.
"""

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
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
    core = Tokenizer.from_str(_trained(form in ("Zephyr", "Mistral")))
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
def _trained(as_llama2: bool) -> str:
    """A tokenizer as JSON: 1,024 tokens, and as Llama 2's one more for each byte."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True) if as_llama2 else models.BPE())
    special = [AddedToken(token, special=True, normalized=False) for token in _SPECIAL]
    settings = {"vocab_size": 1024, "special_tokens": special, "show_progress": False}
    texts = [*prose_documents("passages").values(), *["user assistant system model Response Instruction"] * 20]
    if as_llama2:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        words = [f"▁{word}" for text in texts for word in text.split()]  # trained on words, or whole passages would be tokens
        tokenizer.train_from_iterator(words, trainers.BpeTrainer(**settings))
        whole = json.loads(tokenizer.to_str())
        vocabulary = whole["model"]["vocab"]
        for name in ("<unk>", *(f"<0x{byte:02X}>" for byte in range(256))):
            vocabulary.setdefault(name, len(vocabulary))
        return json.dumps(whole)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, **settings))
    return tokenizer.to_str()
