"""Writes tiny random checkpoints and the log-probs Hugging Face transformers computes on them.

    pip install torch==2.11.0 transformers==5.23.0 safetensors
    python make_checkpoints.py            # writes checkpoints/<name>/ beside this file

Each folder has config.json, the weights and expected.json:

    sequences             [{"token_ids": [..], "logprobs": [null, ..]}]; logprobs[t] is the log-softmax over the
                          whole vocabulary of token t given tokens 0..t-1 (eager attention, float32, on CPU,
                          from the stored weights widened to float32)
    bf16_mean_abs_error   mean |logprob - float32 logprob| of transformers' own bfloat16 run (logits widened
                          to float32 before the log-softmax)
    scores                sequence classifiers only: the score at the last token of each sequence

Weights have a standard deviation of 0.3 and norms lie in [0.5, 1.5], so that a wrong bias, norm, rotation or mask
changes every number. Configurations come in the forms of transformers 4 (rope_theta, rope_scaling, torch_dtype) and
transformers 5 (rope_parameters, dtype), as real checkpoints do.
"""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

ROOT = pathlib.Path(__file__).parent / "checkpoints"
LENGTHS = (5, 12, 23, 40)
SHAPE = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=112, max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
)
LLAMA3_ROPE = dict(
    rope_theta=10000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


def rope(theta, **scaling):
    return {"rope_theta": theta, "rope_type": "default", **scaling}


# name -> (configuration, form of config.json, dtype of the file, options)
CHECKPOINTS = {
    "llama_tied_f32": (
        LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=rope(10000.0)), 4, torch.float32, {}),
    "llama2_untied_mha": (
        LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}, tie_word_embeddings=False, rope_parameters=rope(10000.0)),
        5, torch.float32, {}),
    "llama3_scaled_bf16": (
        LlamaConfig(**SHAPE, head_dim=16, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE), 4, torch.bfloat16, {}),
    "llama_linear_rope": (
        LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=rope(10000.0, rope_type="linear", factor=2.0)),
        4, torch.float32, {"legacy_rope_type_key": True}),
    "llama_biases": (
        LlamaConfig(**SHAPE, tie_word_embeddings=False, attention_bias=True, mlp_bias=True, rope_parameters=rope(500000.0)),
        5, torch.float32, {}),
    "mistral_sliding_window": (
        MistralConfig(**SHAPE, tie_word_embeddings=False, sliding_window=8, rope_parameters=rope(10000.0)),
        4, torch.float32, {}),
    # sliding_window stands in the file but use_sliding_window is false: every token sees the whole prefix.
    "qwen2_tied_f16": (
        Qwen2Config(**SHAPE, tie_word_embeddings=True, rope_parameters=rope(1000000.0), use_sliding_window=False),
        4, torch.float16, {"extra": {"sliding_window": 8, "max_window_layers": 2}}),
    "qwen3_head_dim": (
        Qwen3Config(**{**SHAPE, "rms_norm_eps": 1e-6}, head_dim=16, tie_word_embeddings=True, rope_parameters=rope(1000000.0)),
        5, torch.float32, {}),
    "llama3_sharded": (
        LlamaConfig(**{**SHAPE, "num_hidden_layers": 3}, head_dim=16, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
        5, torch.float32, {"shards": 3}),
    "llama_score": (
        LlamaConfig(**SHAPE, num_labels=1, pad_token_id=2, rope_parameters=rope(10000.0)), 4, torch.float32, {"score": True}),
    "qwen2_score": (
        Qwen2Config(**SHAPE, num_labels=1, pad_token_id=0, rope_parameters=rope(1000000.0)), 5, torch.bfloat16, {"score": True}),
}


def main():
    shutil.rmtree(ROOT, ignore_errors=True)
    for seed, (name, (config, form, dtype, options)) in enumerate(CHECKPOINTS.items()):
        folder = ROOT / name
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        model = random_model(config, options, generator)
        write_weights(folder, model, dtype, options.get("shards", 1))
        write_config(folder, model.config, form, dtype, options)
        write_expected(folder, options, sequences(config.vocab_size, generator))
        print(name, sum(p.numel() for p in model.parameters()), "parameters")


def random_model(config, options, generator):
    auto = AutoModelForSequenceClassification if options.get("score") else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def write_weights(folder, model, dtype, shards):
    tied = model.config.tie_word_embeddings
    tensors = {
        name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update({name: file for name in part})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    dump(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_config(folder, config, form, dtype, options):
    values = json.loads(config.to_json_string(use_diff=False))
    keep = [
        "architectures", "model_type", "attention_bias", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim",
        "hidden_act", "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings", "mlp_bias",
        "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "sliding_window",
        "tie_word_embeddings", "use_sliding_window", "vocab_size", "rope_parameters",
    ]
    values = {key: values[key] for key in keep if key in values}
    values["architectures"] = [architecture(config, options)]
    # Older files leave head_dim out where it is hidden_size / num_attention_heads.
    if values.get("head_dim") in (None, config.hidden_size // config.num_attention_heads):
        values.pop("head_dim", None)
    if options.get("score"):
        values["id2label"] = {"0": "LABEL_0"}
        values["label2id"] = {"LABEL_0": 0}
    dtype_name = str(dtype).removeprefix("torch.")
    if form == 5:
        values["dtype"] = dtype_name
        values["transformers_version"] = "5.23.0"
    else:
        rope_parameters = values.pop("rope_parameters")
        values["rope_theta"] = rope_parameters.pop("rope_theta")
        if rope_parameters["rope_type"] == "default":
            values["rope_scaling"] = None
        else:
            if options.get("legacy_rope_type_key"):
                rope_parameters["type"] = rope_parameters.pop("rope_type")
            values["rope_scaling"] = rope_parameters
        values["torch_dtype"] = dtype_name
        values["transformers_version"] = "4.46.0"
    values.update(options.get("extra", {}))
    dump(folder / "config.json", values)


def architecture(config, options):
    family = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config.model_type]
    return family + ("ForSequenceClassification" if options.get("score") else "ForCausalLM")


def sequences(vocab_size, generator):
    lists = [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]
    lists[1][-1] = 2  # ends with eos, which is also the pad token of one classifier
    return lists


def write_expected(folder, options, token_lists):
    auto = AutoModelForSequenceClassification if options.get("score") else AutoModelForCausalLM
    wide = load(auto, folder, torch.float32)
    if options.get("score"):
        scores = [wide(torch.tensor([tokens])).logits[0, 0].item() for tokens in token_lists]
        narrow = load(auto, folder, torch.bfloat16)
        errors = [abs(narrow(torch.tensor([t])).logits.float()[0, 0].item() - s) for t, s in zip(token_lists, scores)]
        expected = {
            "sequences": [{"token_ids": tokens} for tokens in token_lists], "scores": scores,
            "bf16_mean_abs_error": sum(errors) / len(errors),
        }
    else:
        exact = [logprobs(wide, tokens) for tokens in token_lists]
        rounded = [logprobs(load(auto, folder, torch.bfloat16), tokens) for tokens in token_lists]
        errors = [abs(a - b) for x, y in zip(exact, rounded) for a, b in zip(x, y)]
        expected = {
            "sequences": [{"token_ids": t, "logprobs": [None, *x]} for t, x in zip(token_lists, exact)],
            "bf16_mean_abs_error": sum(errors) / len(errors),
        }
    dump(folder / "expected.json", expected)


def load(auto, folder, dtype):
    model, report = auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    # Without a pad token transformers reads the score at the last token of the (single) row.
    model.config.pad_token_id = None
    return model.eval().requires_grad_(False)


def logprobs(model, tokens):
    logits = model(torch.tensor([tokens])).logits[0].float()
    table = torch.log_softmax(logits, dim=-1)
    return [table[t - 1, tokens[t]].item() for t in range(1, len(tokens))]


def dump(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
