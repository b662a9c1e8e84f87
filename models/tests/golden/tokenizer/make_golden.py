"""Writes the golden files of the tokenizer tests: small tokenizers, and what transformers makes of texts and messages.

Needs `pip install transformers jinja2` (5.23.0 and 3.1.6 were used) and the folder `stories260k` of a checkpoint with
a SentencePiece-style tokenizer (karpathy's llama2.c, MIT; its tokenizer.json lies in stories/ and is kept if no folder is given):

    python make_golden.py [folder of stories260k]
"""
import json
import shutil
import sys
from datetime import datetime
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent
TIME = "2026-11-05T09:07:03"


class FixedTime(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.fromisoformat(TIME)


chat_template_utils.datetime = FixedTime

USER = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": " It is 4. "}
THANKS = {"role": "user", "content": "Merci, ça va 😀 <b>\"well\"</b>?\n"}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
THOUGHT = {"role": "assistant", "content": "<think>\n2 and 2\n</think>\n\n4"}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <two> numbers & \"more\"",
        "parameters": {"type": "object", "properties": {"a": {"type": "number", "default": 1.5}}, "required": ["a"]},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [1e-7, None, True, "é"]}}}],
}
RESULT = {"role": "tool", "content": "4"}

CONVERSATIONS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "dialogue": [SYSTEM, USER, ANSWER, THANKS],
    "answered": [USER, ANSWER],
    "thought": [USER, THOUGHT],
    "thought earlier": [USER, THOUGHT, THANKS],
    "wrong order": [USER, USER],
    "assistant first": [ANSWER],
    "tools": [USER, CALL, RESULT, ANSWER],
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEXTS = [
    "Once upon a time, there was a little girl.",
    "",
    " ",
    "  two  spaces and\ttabs \n\n newlines\n",
    "naïve café 😀👩‍👧 日本語 \u00a0 \u200b",
    "12345 + 67.89 = 12,412.89",
    "<|im_start|>user\nhi<|im_end|> </s><s> a</s>b",
    "I'll don't we've SHE'S",
    "e\u0301 \ufb01 \U0001d54f",
    "x" * 40,
]


def template_cases():
    for path in sorted((HERE / "templates").glob("*.jinja")):
        for name, messages in CONVERSATIONS.items():
            variants = [(True, {}), (False, {})]
            if name == "one":
                variants.append((True, {"enable_thinking": False}))
            if name == "tools":
                variants = [(True, {"tools": [TOOL]}), (False, {"tools": [TOOL], "tools_in_user_message": False})]
            for add_generation_prompt, more in variants:
                yield path, name, messages, add_generation_prompt, more


def render(source, messages, add_generation_prompt, more):
    try:
        rendered, _ = chat_template_utils.render_jinja_template(
            [messages], chat_template=source, add_generation_prompt=add_generation_prompt, **SPECIAL, **more
        )
        return {"expected": rendered[0]}
    except Exception as error:  # jinja's own TemplateError is what raise_exception gives
        return {"error": str(error), "raised": type(error).__name__ == "TemplateError"}


def write_templates():
    cases = []
    for path, name, messages, add_generation_prompt, more in template_cases():
        result = render(path.read_text(), messages, add_generation_prompt, more)
        if "error" in result and not result["raised"]:
            continue  # Python's own complaint; ours may differ in when and how
        cases.append({
            "template": path.name, "conversation": name, "add_generation_prompt": add_generation_prompt, "more": more, **result
        })
    dump("templates.json", {"time": TIME, "special_tokens": SPECIAL, "conversations": CONVERSATIONS, "cases": cases})


def dump(name, value):
    (HERE / name).write_text(json.dumps(value, ensure_ascii=False, indent=0) + "\n")


def byte_level(pre_tokenizer, special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [text for text in TEXTS if "<" not in text] * 3 + ["the little girl and the time upon a system user assistant"] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def folder(name, tokenizer=None, **files):
    path = HERE / name
    path.mkdir(exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(str(path / "tokenizer.json"), pretty=False)
    for file, content in files.items():
        stem, kind = file.rsplit("_", 1)
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1)
        (path / f"{stem}.{kind}").write_text(text)


def token(content, special=True):
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": special}


def write_folders():
    template = {path.stem: path.read_text() for path in (HERE / "templates").glob("*.jinja")}
    # As SmolLM2: no post-processor, the template in a named list, eos of generation_config another than the tokenizer's.
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    folder(
        "chatml", byte_level(digits, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        tokenizer_config_json={
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": {"__type": "AddedToken", **token("<|im_end|>")},
            "pad_token": None, "unk_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "chat_template": [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": template["generation"]}],
        },
        special_tokens_map_json={"pad_token": token("<|im_end|>")},
        generation_config_json={"eos_token_id": [2, 0]}, config_json={"eos_token_id": 2, "bos_token_id": 0},
    )
    # As Llama 3: a regular expression before ByteLevel, BOS by the post-processor, chat_template.jinja against another in the config.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    llama = byte_level(split, ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"])
    llama.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(
            single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B", special_tokens=[("<|begin_of_text|>", 0)]
        ),
    ])
    llama.enable_truncation(max_length=4)
    llama.enable_padding(length=16)
    folder(
        "llama3", llama,
        tokenizer_config_json={
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
            "clean_up_tokenization_spaces": True, "chat_template": "{{ raise_exception('the wrong template') }}",
        },
        chat_template_jinja=template["llama3"], generation_config_json={"eos_token_id": [4, 1], "bos_token_id": 0},
    )
    # As Qwen: special tokens only in added_tokens_decoder, a pad token of its own, add_bos_token false, NFC.
    qwen = byte_level(split, ["<|endoftext|>"])
    size = qwen.get_vocab_size()
    from tokenizers import normalizers
    qwen.normalizer = normalizers.NFC()
    qwen.post_processor = processors.ByteLevel(trim_offsets=False)
    folder(
        "qwen", qwen,
        tokenizer_config_json={
            "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "added_tokens_decoder": {
                "0": token("<|endoftext|>"), str(size): token("<|im_start|>"), str(size + 1): token("<|im_end|>"),
                str(size + 2): token("<think>", False), str(size + 3): token("</think>", False),
            },
            "chat_template": template["qwen3"],
        },
        special_tokens_map_json={"pad_token": "<|im_start|>"}, config_json={"eos_token_id": size + 1, "pad_token_id": None},
    )
    # SentencePiece style with byte fallback; and the same with flags that tokenizer.json overrules, and a pad token it does not know.
    if len(sys.argv) > 1:
        source = Path(sys.argv[1])
        folder("stories", config_json={"eos_token_id": 2}, tokenizer_config_json=(source / "tokenizer_config.json").read_text())
        shutil.copyfile(source / "tokenizer.json", HERE / "stories" / "tokenizer.json")
        (HERE / "stories" / "LICENSE").write_text((source / "LICENSE.llama2c").read_text())
    folder(
        "stories_eos", Tokenizer.from_file(str(HERE / "stories" / "tokenizer.json")), chat_template_jinja=template["mistral"],
        tokenizer_config_json={
            "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_eos_token": True, "bos_token": "<s>", "eos_token": "</s>",
            "pad_token": "<pad>",
        },
    )


def token_cases(name):
    tokenizer = AutoTokenizer.from_pretrained(HERE / name)
    texts = [
        {"text": text, "ids": tokenizer(text)["input_ids"], "plain": tokenizer(text, add_special_tokens=False)["input_ids"]}
        for text in TEXTS
    ]
    size = len(tokenizer)
    sequences = [case["ids"] for case in texts] + [list(range(0, size, 7)), list(range(size - 1, 0, -5)), [size + 5, 3]]
    decoded = [
        {"ids": ids, "text": tokenizer.decode(ids), "skip_special": tokenizer.decode(ids, skip_special_tokens=True)}
        for ids in sequences
    ]
    chats = []
    for conversation in ["one", "dialogue", "answered", "thought"] if tokenizer.chat_template else []:
        messages = CONVERSATIONS[conversation]
        case = {"conversation": conversation}
        for key, add in [("ids", False), ("prompt_ids", True)]:
            case[key] = tokenizer.apply_chat_template(messages, add_generation_prompt=add, return_dict=False)
        if "generation %}" in tokenizer.get_chat_template():
            masked = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
            case["mask"] = [bool(bit) for bit in masked["assistant_masks"]]
        chats.append(case)
    return {
        "folder": name, "vocab_size": size, "bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id, "texts": texts, "decoded": decoded, "chats": chats,
    }


def main():
    write_templates()
    write_folders()
    dump("tokenizers.json", {"time": TIME, "cases": [token_cases(name) for name in ["chatml", "llama3", "qwen", "stories", "stories_eos"]]})


main()
