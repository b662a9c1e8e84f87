"""Writes tiny GGUF models and what their import must give.

    pip install gguf==0.19.0 numpy torch==2.11.0 safetensors regex sentencepiece==0.2.3
    python make_gguf.py                   # writes NAME.gguf, NAME.safetensors and expected.json beside this file

NAME.safetensors holds the weights under their Hugging Face names as the gguf package decodes them, rounded to bfloat16.
expected.json holds, for each NAME, the values that config.json must have and token ids of texts: byte-level BPE by the
plain loop below over the published split patterns, SentencePiece by its own library.
"""

import io
import json
import pathlib

import numpy as np
import regex
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Q
from gguf import GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
TEXTS = [
    "the goose flies north", "Don't stop: it's 12345 miles, 67% done!", "a  b   c\n\nnew lines \n end ", "",
    "x=1+2; y = 345678 * (z-9)", "THE Flock'S LEADER rests.  ", " leading and trailing ", "1 22 333 4444",
    "the<|end|>goose", "wings!!! ... ??? --- $5.00",
]
CORPUS = (" ".join(TEXTS) + " the flock of geese flies in a formation; the leader tires and the next goose leads. ") * 3
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
DEFAULT = [
    r"[\p{P}\$\+<=>\^~\|]+", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)", r"\p{N}+",
    r"[0-9][0-9][0-9]",
]
SPLITS = {
    "smollm": [r"\p{N}", GPT2], "llama-bpe": [LLAMA3], "qwen2": [LLAMA3.replace("{1,3}", "")], None: DEFAULT,
}
SPECIAL = ["<|start|>", "<|end|>", "<|pad|>"]


class ByteBpe:
    """Byte-level BPE by the obvious loops: train on CORPUS, encode by lowest merge rank."""

    def __init__(self, pre, num_merges=30):
        self.pre, self.merges = pre, []
        words = [list(self.bytes(part)) for part in self.split(CORPUS)]
        for _ in range(num_merges):
            counts = {}
            for word in words:
                for pair in zip(word, word[1:]):
                    counts[pair] = counts.get(pair, 0) + 1
            best = max(counts, key=lambda pair: (counts[pair], pair))
            self.merges.append(best)
            words = [self.merge(word, best) for word in words]
        alphabet = [self.bytes(chr(code)) for code in [10, *range(32, 127)]]
        self.tokens = SPECIAL + alphabet + ["".join(pair) for pair in self.merges]
        if pre == "llama-bpe":
            self.tokens.append("Ġformation")  # reached only because whole splits that are tokens are not merged
        self.types = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(self.tokens) - 3)
        self.types[2] = TokenType.USER_DEFINED
        self.ids = {token: id for id, token in enumerate(self.tokens)}

    @staticmethod
    def bytes(text):
        """GPT-2's letters for bytes; of those used here only newline and space differ."""
        return text.replace("\n", "Ċ").replace(" ", "Ġ")

    def split(self, text):
        parts = [text]
        for pattern in SPLITS[self.pre]:
            parts = [piece for part in parts for piece in isolate(pattern, part)]
        return parts

    @staticmethod
    def merge(word, pair):
        merged, i = [], 0
        while i < len(word):
            if tuple(word[i:i + 2]) == pair:
                merged.append(word[i] + word[i + 1])
                i += 2
            else:
                merged.append(word[i])
                i += 1
        return merged

    def encode(self, text):
        ids = [self.ids["<|start|>"]] if self.pre == "llama-bpe" else []
        for i, part in enumerate(regex.split("(" + "|".join(map(regex.escape, SPECIAL)) + ")", text)):
            if i % 2:
                ids.append(self.ids[part])
                continue
            for piece in map(self.bytes, self.split(part)):
                if self.pre == "llama-bpe" and piece in self.ids:
                    ids.append(self.ids[piece])
                    continue
                word = list(piece)
                for pair in self.merges:
                    word = self.merge(word, pair)
                ids += [self.ids[token] for token in word]
        return ids

    def add_to(self, writer):
        writer.add_tokenizer_model("gpt2")
        if self.pre:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges([" ".join(pair) for pair in self.merges])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_pad_token_id(2)


def isolate(pattern, text):
    parts, end = [], 0
    for match in regex.finditer(pattern, text):
        parts += [text[end:match.start()], match.group()]
        end = match.end()
    return [part for part in [*parts, text[end:]] if part]


class SentencePiece:
    def __init__(self):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([CORPUS] * 2), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True,
            character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        self.tokens = [self.processor.id_to_piece(id) for id in range(self.processor.get_piece_size())]

    def encode(self, text):
        return [1, *self.processor.encode(text)]

    def add_to(self, writer):
        p = self.processor
        kinds = [
            TokenType.UNKNOWN if p.is_unknown(id) else TokenType.CONTROL if p.is_control(id)
            else TokenType.BYTE if p.is_byte(id) else TokenType.NORMAL for id in range(len(self.tokens))
        ]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(self.tokens)
        writer.add_token_scores([p.get_score(id) for id in range(len(self.tokens))])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)


class Model:
    """One GGUF file; `add` takes weights in Hugging Face order and keeps what their blocks decode to."""

    def __init__(self, name, arch, tokenizer, hidden, heads, kv_heads, head_dim, inner, layers, seed, **keys):
        self.name, self.arch, self.tokenizer = name, arch, tokenizer
        self.rng, self.decoded = np.random.default_rng(seed), {}
        self.shape = (hidden, heads, kv_heads, head_dim, inner, layers)
        self.writer = writer = GGUFWriter(HERE / f"{name}.gguf", arch)
        writer.add_block_count(layers)
        writer.add_context_length(512)
        writer.add_embedding_length(hidden)
        writer.add_feed_forward_length(inner)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(keys.get("theta", 10000.0))
        writer.add_rope_dimension_count(head_dim)
        if head_dim != hidden // heads:
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
        if keys.get("window"):
            writer.add_sliding_window(keys["window"])
        writer.add_chat_template("{{ messages }}")
        tokenizer.add_to(writer)

    def add(self, gguf_name, hf_name, shape, kind, heads=None):
        if kind in K_BLOCKS:
            stored = self.random_blocks(shape, kind)
            decoded = dequantize(stored, kind)
        else:
            weights = self.rng.normal(0, 0.3, shape).astype(np.float32)
            stored = quantize(weights, kind)
            decoded = dequantize(stored, kind) if kind != Q.F32 else weights
        self.decoded[hf_name] = torch.from_numpy(decoded.astype(np.float32).reshape(shape)).bfloat16()
        if heads and self.arch == "llama":
            # As llama.cpp's converter: from (half, pair) to (pair, half) within each head.
            stored = stored.reshape(heads, 2, stored.shape[0] // heads // 2, *stored.shape[1:]).swapaxes(1, 2).reshape(stored.shape)
        self.writer.add_tensor(gguf_name, np.ascontiguousarray(stored), raw_dtype=kind)

    def random_blocks(self, shape, kind):
        """Random bytes are valid blocks once the f16 scales are small numbers."""
        size, scales = K_BLOCKS[kind]
        blocks = self.rng.integers(0, 256, (shape[0], shape[1] // 256, size), dtype=np.uint8)
        for offset in scales:
            scale = self.rng.uniform(1e-4, 1e-3, blocks.shape[:2]).astype(np.float16)
            blocks[:, :, offset:offset + 2] = scale.view(np.uint8).reshape(*blocks.shape[:2], 2)
        return blocks.reshape(shape[0], -1)

    def add_all(self, kinds, tied, qkv_bias=False, qk_norm=False):
        """`kinds`: block type of each matrix, cycled over layers."""
        hidden, heads, kv_heads, head_dim, inner, layers = self.shape
        vocab, q, kv = len(self.tokenizer.tokens), heads * head_dim, kv_heads * head_dim
        self.add("token_embd.weight", "model.embed_tokens.weight", (vocab, hidden), kinds["embed"])
        self.add("output_norm.weight", "model.norm.weight", (hidden,), Q.F32)
        if not tied:
            self.add("output.weight", "lm_head.weight", (vocab, hidden), kinds["embed"])
        for i in range(layers):
            for gguf_name, hf_name, shape, n in [
                ("attn_q", "self_attn.q_proj", (q, hidden), heads), ("attn_k", "self_attn.k_proj", (kv, hidden), kv_heads),
                ("attn_v", "self_attn.v_proj", (kv, hidden), None), ("attn_output", "self_attn.o_proj", (hidden, q), None),
                ("ffn_gate", "mlp.gate_proj", (inner, hidden), None), ("ffn_up", "mlp.up_proj", (inner, hidden), None),
                ("ffn_down", "mlp.down_proj", (hidden, inner), None),
            ]:
                kind = kinds[gguf_name][i % len(kinds[gguf_name])]
                self.add(f"blk.{i}.{gguf_name}.weight", f"model.layers.{i}.{hf_name}.weight", shape, kind, n)
                if qkv_bias and gguf_name in ("attn_q", "attn_k", "attn_v"):
                    self.add(f"blk.{i}.{gguf_name}.bias", f"model.layers.{i}.{hf_name}.bias", shape[:1], Q.F32, n)
            self.add(f"blk.{i}.attn_norm.weight", f"model.layers.{i}.input_layernorm.weight", (hidden,), Q.F32)
            self.add(f"blk.{i}.ffn_norm.weight", f"model.layers.{i}.post_attention_layernorm.weight", (hidden,), Q.F32)
            if qk_norm:
                for side in "qk":
                    self.add(f"blk.{i}.attn_{side}_norm.weight", f"model.layers.{i}.self_attn.{side}_norm.weight", (head_dim,), Q.F32)

    def finish(self, config):
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        save_file(self.decoded, HERE / f"{self.name}.safetensors", metadata={"format": "pt"})
        hidden, heads, kv_heads, head_dim, inner, layers = self.shape
        config = {
            "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
            "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": len(self.tokenizer.tokens),
            "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "rope_scaling": None, "torch_dtype": "bfloat16", **config,
        }
        return {"config": config, "encodings": [{"text": text, "token_ids": self.tokenizer.encode(text)} for text in TEXTS
                                                if isinstance(self.tokenizer, ByteBpe) or "<|" not in text]}


# Bytes of a block of 256 and the offsets of its f16 scales.
K_BLOCKS = {
    Q.Q2_K: (84, (80, 82)), Q.Q3_K: (110, (108,)), Q.Q4_K: (144, (0, 2)), Q.Q5_K: (176, (0, 2)), Q.Q6_K: (210, (208,)),
}
MATRICES = ("embed", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def legacy_blocks():
    model = Model("llama_legacy_blocks", "llama", ByteBpe("smollm"), 32, 2, 1, 16, 64, 2, seed=1, theta=100000.0)
    kinds = dict(embed=Q.Q8_0, attn_q=[Q.Q4_1, Q.Q8_0], attn_k=[Q.Q5_0, Q.Q4_0], attn_v=[Q.Q5_1], attn_output=[Q.Q4_0],
                 ffn_gate=[Q.F16, Q.Q5_1], ffn_up=[Q.BF16, Q.Q4_1], ffn_down=[Q.F32, Q.Q5_0])
    model.add_all(kinds, tied=True)
    return model.finish({"model_type": "llama", "rope_theta": 100000.0, "tie_word_embeddings": True})


def k_blocks():
    model = Model("qwen2_k_blocks", "qwen2", ByteBpe("qwen2"), 256, 2, 1, 8, 8, 1, seed=2, theta=1000000.0)
    kinds = dict(embed=Q.Q4_K, attn_q=[Q.Q2_K], attn_k=[Q.Q3_K], attn_v=[Q.Q5_K], attn_output=[Q.F16], ffn_gate=[Q.Q6_K],
                 ffn_up=[Q.Q4_K], ffn_down=[Q.F16])
    model.add_all(kinds, tied=True, qkv_bias=True)
    return model.finish({"model_type": "qwen2", "rope_theta": 1000000.0, "tie_word_embeddings": True})


def qwen3():
    model = Model("qwen3_half", "qwen3", ByteBpe(None), 32, 2, 1, 24, 48, 2, seed=3)
    model.add_all({name: [Q.F16, Q.BF16] for name in MATRICES} | {"embed": Q.F16}, tied=True, qk_norm=True)
    return model.finish({"model_type": "qwen3", "rope_theta": 10000.0, "tie_word_embeddings": True, "attention_bias": False})


def llama3():
    model = Model("llama3_rope", "llama", ByteBpe("llama-bpe"), 32, 2, 1, 16, 48, 1, seed=4, theta=500000.0)
    model.add_all({name: [Q.BF16] for name in MATRICES} | {"embed": Q.BF16}, tied=False)
    divisors = []
    for frequency in 1.0 / 500000.0 ** (np.arange(0, 16, 2) / 16):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / 8 + smooth))
    model.writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    return model.finish({"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": scaling, "tie_word_embeddings": False})


def sentence_piece():
    model = Model("mistral_sentencepiece", "llama", SentencePiece(), 32, 2, 1, 16, 48, 1, seed=5, window=128)
    model.add_all({name: [Q.F16] for name in MATRICES} | {"embed": Q.Q8_0}, tied=True)
    return model.finish({"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 128, "tie_word_embeddings": True})


def main():
    models = {"llama_legacy_blocks": legacy_blocks(), "qwen2_k_blocks": k_blocks(), "qwen3_half": qwen3(),
              "llama3_rope": llama3(), "mistral_sentencepiece": sentence_piece()}
    (HERE / "expected.json").write_text(json.dumps(models, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
