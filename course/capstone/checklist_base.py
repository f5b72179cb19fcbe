"""Checks of an adapter against its base, its tokenizer, its template and the end of a turn."""

import json

import torch
from transformers import AutoTokenizer

from course.capstone import base as bases
from course.capstone.checklist_subject import Broken, Subject
from course.lab import models
from reference.instruct import render_ids


def base_fits(subject: Subject) -> str:
    dtype = subject.record["base"]["dtype"] if subject.record else "float32"
    try:
        subject.base, subject.base_tokenizer = models.load(subject.base_name, getattr(torch, dtype))
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise Broken(f"the base can't be loaded: {error}", "name the base that it was trained on") from None
    modules = dict(subject.base.named_modules())
    for key, shape in subject.shapes.items():
        name = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if ".lora_" not in key:
            continue
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise Broken(f"the base has no layer {name}", "the adapter is of another model")
        place = 1 if ".lora_A" in key else 0
        if shape[place] != weight.shape[place]:
            got = f"{name} is {tuple(weight.shape)} in the base, and the adapter's factor {shape}"
            raise Broken(f"{got}", "the adapter is of another model, or of another size of it")
    return f"every layer is there and of the right size ({subject.base.config.model_type})"


def base_hash(subject: Subject) -> str:
    wanted = subject.recorded("base")["sha256"]
    if (found := bases.weights_hash(subject.base)) != wanted:
        name = subject.recorded("base")["name"]
        words = f"the base's weights have SHA-256 {found[:12]}…, those that it was trained on, {name}, had {wanted[:12]}…"
        raise Broken(f"{words}: it fits, and is another model", f"serve it on {name} as it was, or train again")
    return f"SHA-256 {wanted[:12]}…, as trained on"


def tokenizer(subject: Subject) -> str:
    try:
        subject.tokenizer = AutoTokenizer.from_pretrained(subject.folder)
    except Exception as error:  # of many kinds, by what is missing
        raise Broken(f"the adapter has no tokenizer that can be read ({type(error).__name__})", "save it beside the adapter") from None
    own, others = subject.tokenizer.get_vocab(), subject.base_tokenizer.get_vocab()
    rows = subject.base.get_input_embeddings().weight.shape[0]
    if len(own) > rows or max(own.values()) >= rows:
        raise Broken(f"the tokenizer has {len(own)} tokens, the base {rows} rows", "save the extended base, or the tokenizer of this base")
    if moved := [token for token, number in others.items() if own.get(token) != number]:
        raise Broken(
            f"{len(moved)} tokens have another id than in the base's tokenizer, such as {moved[0]!r}", "put the run's tokenizer back"
        )
    if subject.record and bases.vocabulary_hash(subject.tokenizer) != subject.recorded("tokenizer")["sha256"]:
        raise Broken("the vocabulary is not the one of the training run", "put the run's tokenizer back")
    return f"{len(own)} tokens, ids as in the base"


def template(subject: Subject) -> str:
    if not subject.tokenizer.chat_template:
        raise Broken("the tokenizer has no chat template: the server will use one of its own", "save the template of the run with it")
    wanted = subject.recorded("rendered")
    for each in wanted:
        try:
            ids = render_ids(subject.tokenizer, each["messages"], True)
        except ValueError as error:
            raise Broken(f"the template does not render a conversation of the run: {error}", "put the template of the run back") from None
        if ids != each["ids"]:
            place = next(
                (i for i, pair in enumerate(zip(ids, each["ids"], strict=False)) if pair[0] != pair[1]), min(len(ids), len(each["ids"]))
            )
            got = subject.tokenizer.convert_ids_to_tokens(ids[place : place + 1]) or ["nothing"]
            words = f"a conversation of the run renders otherwise now: token {place + 1} is {got[0]!r}"
            raise Broken(f"{words}, and the prompt has {len(ids)} tokens for {len(each['ids'])}", "put the template of the run back")
    return f"{len(wanted)} conversations render to the same tokens"


def end(subject: Subject) -> str:
    wanted = bases.end_of_turn(subject.tokenizer)
    if subject.tokenizer.eos_token_id != wanted:
        words = f"the template ends a turn with id {wanted}, the tokenizer's end of text is {subject.tokenizer.eos_token_id}"
        raise Broken(f"{words}: generation would not stop", "set eos_token to the end of turn")
    file = subject.folder / "generation_config.json"
    if file.is_file():
        try:
            stops = json.loads(file.read_text()).get("eos_token_id")
        except (ValueError, AttributeError):
            raise Broken("generation_config.json is no JSON of settings", "copy it again, or export again") from None
        if wanted not in (stops if isinstance(stops, list) else [stops]):
            raise Broken(f"generation_config.json stops at {stops}, a turn ends with {wanted}", "set eos_token_id to the end of turn")
    return f"a turn ends with id {wanted}, and generation stops there"
