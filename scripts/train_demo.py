"""Train the embedded demo models: one tokenizer, a Llama, its small draft, and an OPT.

    python scripts/train_demo.py --text stories.txt prose.txt --val held_out.txt \\
        --teacher tinystories-656k

Start at main. It writes checkpoints/demo, demo-opt and demo-draft in Hugging Face layout, each with
a training log. Documents in the texts are separated by <|endoftext|>; a teacher, another model's
checkpoint, generates more of them. The models are toys of a few megabytes, so that every command
and test of this project has a trained model to run.

Words: a stream is the ids of all documents, one after the other; a window is CONTEXT consecutive
ids of a stream and the id after them; held out is the text of --val, which is never trained on.

Shapes: B windows of a batch, T = CONTEXT tokens, V ids of the vocabulary, N ids of a stream.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import complete
from layers.kv_cache import grouped_attention
from load import load_model
from model import Transformer
from text.generation_config import GenerationConfig
from weights.hf import export_tensors, model_args

VOCAB, CONTEXT, BOS, EOS = 2048, 512, 0, 1
SHARED = {
    "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "bos_token_id": BOS,
    "eos_token_id": EOS, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA = SHARED | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
OPT = SHARED | {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "activation_function": "relu",
    "do_layer_norm_before": True, "enable_bias": True, "dropout": 0.0, "pad_token_id": EOS,
}  # fmt: skip
CONFIGS = {
    "demo": LLAMA | {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "demo-opt": OPT | {
        "hidden_size": 192, "word_embed_proj_dim": 192, "ffn_dim": 768, "num_hidden_layers": 4,
        "num_attention_heads": 12,
    },
    "demo-draft": LLAMA | {
        "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "opt-sparse": OPT | {
        "hidden_size": 384, "word_embed_proj_dim": 384, "ffn_dim": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 12,
    },
    "opt-sparse-41m": OPT | {
        "hidden_size": 640, "word_embed_proj_dim": 640, "ffn_dim": 2560, "num_hidden_layers": 8,
        "num_attention_heads": 10,
    },
}  # fmt: skip
DEMOS = "demo", "demo-opt", "demo-draft"  # the others are for benchmarks


class NoCache:
    """An AttentionCache (layers/kv_cache.py) that stores nothing: in training, the keys and values
    of a step are those of whole windows, which begin at position 0."""

    ring = None  # no cache with fewer slots than positions, see KVCache

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        """Returns the attention of q to k and v, as AttentionCache.attend does. pos: not used."""
        return grouped_attention(F.scaled_dot_product_attention, q, k, v, mask)


class MeasuredActivation:
    """An activation function that records two facts of its last result: `size`, the mean absolute
    value, with gradient, and `active`, the share of values that are not 0."""

    def __init__(self, activation: Callable[[Tensor], Tensor]):
        self.activation, self.size, self.active = activation, torch.zeros(()), 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the activations of x, in its shape."""
        y = self.activation(x)
        self.size, self.active = y.abs().mean(), (y.detach() != 0).float().mean().item()
        return y


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of VOCAB ids; <s> gets the id BOS, </s> the id EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_documents(paths: list[Path]) -> list[str]:
    """Returns the documents of all files, without the empty ones."""
    documents = [d.strip() for p in paths for d in p.read_text().split("<|endoftext|>")]
    return [d for d in documents if d]


def sample_documents(teacher: Path, characters: int, seed: int) -> list[str]:
    """Returns texts that the teacher generates from BOS to EOS, of at least `characters` characters
    together. Texts that do not end with EOS are dropped."""
    lm = load_model(teacher, device="cpu", dtype=torch.float32)
    config = GenerationConfig(max_new_tokens=400, temperature=0.8, top_k=0, seed=seed)
    start, rows = [[lm.tokenizer.bos_id]] * 256, range(256)
    documents: list[str] = []
    with tqdm(total=characters, unit="char", unit_scale=True, desc="teacher") as bar:
        while bar.n < characters:
            told = complete(lm, start, config, streams=rows)
            # A teacher may write its separator, <|endoftext|>, as plain text.
            texts = [c.text.split("<|")[0].strip() for c in told if c.finish_reason == "eos"]
            documents += texts
            rows = range(rows.stop, rows.stop + len(rows))  # other random streams
            bar.update(sum(map(len, texts)))
    return documents


def token_stream(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """Returns the ids of the documents, (N,): of each, BOS, its ids and EOS."""
    encoded = tokenizer.encode_batch(documents)
    return torch.tensor([i for e in encoded for i in (BOS, *e.ids, EOS)])


def loss(model: Transformer, windows: Tensor, device: str) -> Tensor:
    """Returns the mean cross-entropy of the next token, in nats. windows: (B, T + 1)."""
    tokens, targets = windows[:, :-1].to(device), windows[:, 1:].to(device)
    key_pos = torch.arange(CONTEXT, device=device)
    caches = [NoCache()] * model.args.n_layers
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = model(tokens, key_pos.expand_as(tokens), key_pos, caches)  # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: Transformer, stream: Tensor, device: str, count: int = 128) -> float:
    """Returns the mean loss of the first `count` windows of a stream, a multiple of 16. The stream
    must be as long as all of them."""
    windows = stream[: count * (CONTEXT + 1)].view(-1, CONTEXT + 1)  # (count, T + 1)
    batches = windows.split(16)
    return sum(loss(model, batch, device).item() for batch in batches) / len(batches)


def baselines(train: Tensor, val: Tensor) -> dict[str, float]:
    """Returns the held-out nats per token of a uniform and of a unigram model, which ignore the
    context: what the trained model must beat. train, val: streams."""
    counts = torch.bincount(train, minlength=VOCAB).float() + 1  # + 1: no probability is 0
    return {
        "uniform": math.log(VOCAB),
        "unigram": -(counts / counts.sum()).log()[val].mean().item(),
    }


def initialise(model: Transformer) -> None:
    """Draw normal weights, smaller ones in the two linear layers of a block whose outputs are added
    to the residual stream. Biases become 0; norms keep their weights of 1."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = name.endswith(("wo.weight", "w2.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * model.args.n_layers) if residual else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


def make_optimizer(
    model: Transformer, lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Returns AdamW, which decays matrices only, and a schedule of the learning rate: a warm-up
    over a fiftieth of the steps, then a cosine from lr to a twentieth of it."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    warmup = 1 + steps // 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,  # the factor of lr at step n, from 0
        lambda n: min((n + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * n / steps))),
    )
    return optimizer, schedule


def measure_activations(model: Transformer, replace: bool) -> list[MeasuredActivation]:
    """Returns a MeasuredActivation for each layer. replace: whether the model uses them in place of
    its own activations; else they record nothing."""
    measured = [MeasuredActivation(layer.feed_forward.activation) for layer in model.layers]
    if replace:
        for layer, activation in zip(model.layers, measured, strict=True):
            layer.feed_forward.activation = activation
    return measured


def train(name: str, train_stream: Tensor, val_stream: Tensor, args, log) -> Transformer:
    """Returns a trained model. name: a key of CONFIGS. args: as parse_args returns them. log:
    called with each line of the training log."""
    model = Transformer(model_args(CONFIGS[name])).to(args.device)
    initialise(model)
    optimizer, schedule = make_optimizer(model, args.lr, args.steps)
    measured = measure_activations(model, replace=bool(args.sparsity))
    generator = torch.Generator().manual_seed(args.seed)
    size, start = sum(p.numel() for p in model.parameters()), time.perf_counter()
    log(f"{name}: {size:,} parameters, {args.steps} steps of {args.batch} x {CONTEXT} tokens")
    for step in range(args.steps):
        offsets = torch.randint(len(train_stream) - CONTEXT, (args.batch,), generator=generator)
        batch = train_stream[offsets[:, None] + torch.arange(CONTEXT + 1)]  # (B, T + 1)
        value = loss(model, batch, args.device)
        sizes = sum(activation.size for activation in measured) / len(measured)
        # The weight of the activations' size grows with the steps, as in ProSparse (arXiv
        # 2402.13516), so that few neurons become active.
        penalty = args.sparsity * min(1, 2 * step / args.steps)
        optimizer.zero_grad()
        (value + penalty * sizes).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % args.log_every == 0 or step == args.steps - 1:
            held_out, seconds = evaluate(model, val_stream, args.device, 16), time.perf_counter()
            log(f"step {step:5} loss {value:.3f} held out {held_out:.3f} {seconds - start:6.0f} s")
            if args.sparsity:
                log("           active: " + " ".join(f"{m.active:.1%}" for m in measured))
    log(f"{name}: held out {evaluate(model, val_stream, args.device):.4f} nats per token")
    return model


def save(model: Transformer, name: str, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, config and tokenizer to the folder as Hugging Face's files. name: a key of
    CONFIGS."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = export_tensors(model.state_dict(), CONFIGS[name])
    tensors = {k: v.to("cpu", torch.bfloat16).contiguous() for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "add_bos_token": True, "model_max_length": CONTEXT,
    }  # fmt: skip
    for file, value in (("config.json", CONFIGS[name]), ("tokenizer_config.json", settings)):
        (folder / file).write_text(json.dumps(value, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="training texts")
    parser.add_argument("--teacher", type=Path, help="a checkpoint that tells more of such texts")
    parser.add_argument("--teacher_chars", type=int, default=4_500_000)
    parser.add_argument("--val", type=Path, required=True, help="text that training never sees")
    parser.add_argument("--out", type=Path, default=Path("checkpoints"))
    parser.add_argument("--models", nargs="+", default=DEMOS, choices=CONFIGS)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.0, help="weight of activations' size")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--log_every", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Train a tokenizer, then each of args.models, and save them below args.out."""
    torch.manual_seed(args.seed)
    documents = read_documents(args.text)
    if args.teacher:
        documents += sample_documents(args.teacher, args.teacher_chars, args.seed)
    tokenizer = train_tokenizer(documents)
    train_stream = token_stream(tokenizer, documents)
    val_stream = token_stream(tokenizer, read_documents([args.val]))
    for name in args.models:
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "training.log").open("w") as file:

            def log(line: str, file=file) -> None:  # file=file: that of this turn of the loop
                print(line, file=sys.stderr, flush=True)
                print(line, file=file, flush=True)

            log(f"seed {args.seed}, torch {torch.__version__}, {args.device}")
            log(f"{len(train_stream):,} training tokens, {len(val_stream):,} held out")
            for kind, nats in baselines(train_stream, val_stream).items():
                log(f"{kind} baseline: {nats:.4f} nats per token")
            save(train(name, train_stream, val_stream, args, log), name, tokenizer, folder)


if __name__ == "__main__":
    main(parse_args())
