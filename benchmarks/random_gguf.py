"""A Llama with random weights as a GGUF file: what llama.cpp runs against our --random_weights.

    python benchmarks/random_gguf.py --type BF16 --output tinyllama.gguf

Runs in the Python environment that has gguf and llama-cpp-python. Start at main.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

CONFIG = Path(__file__).parent / "configs" / "tinyllama-1.1b.json"


def main(args: argparse.Namespace) -> None:
    config = json.loads(args.config.read_text())
    temporary = args.output.with_name(args.output.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    describe(writer, config)
    kind = gguf.GGMLQuantizationType[args.type]
    noise = np.random.default_rng(0).standard_normal(2**20, dtype=np.float32) * 0.02
    for name, shape in shapes(config):
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        else:
            weight = gguf.quants.quantize(np.resize(noise, shape), kind)
            writer.add_tensor(name, weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.rename(args.output)


def describe(writer: gguf.GGUFWriter, config: dict) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")  # ids go in and come out


def shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """llama.cpp's name and the shape of each tensor."""
    dim, hidden, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    kv_dim = dim // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "token_embd.weight", (vocab, dim)
    yield "output_norm.weight", (dim,)
    yield "output.weight", (vocab, dim)
    for n in range(config["num_hidden_layers"]):
        for part, shape in (
            ("attn_norm", (dim,)),
            ("attn_q", (dim, dim)),
            ("attn_k", (kv_dim, dim)),
            ("attn_v", (kv_dim, dim)),
            ("attn_output", (dim, dim)),
            ("ffn_norm", (dim,)),
            ("ffn_gate", (hidden, dim)),
            ("ffn_up", (hidden, dim)),
            ("ffn_down", (dim, hidden)),
        ):
            yield f"blk.{n}.{part}.weight", shape


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--config", type=Path, default=CONFIG, help="a Hugging Face config.json of a Llama")
    add("--type", default="BF16", help="llama.cpp's: BF16, Q8_0, Q4_0 (default: BF16)")
    add("--output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
