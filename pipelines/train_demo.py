"""Trains the demo model and its tokenizer from `documents("train")` and writes them to `kvcalib/demo/model/`.

    python pipelines/train_demo.py                       # the model in the repository
    python pipelines/train_demo.py --steps 20 --out /tmp/demo

The schedule counts steps, never seconds, so a slower machine trains the same way. The folder is written
beside its place and its files are renamed into it at the end: a reader never sees half a file.
"""

import argparse
import datetime
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from kvcalib.demo import MODEL_DIR, documents

BOS, PAD = "<|bos|>", "<|pad|>"
VOCABULARY = 2048
CONTEXT = 512


def main() -> None:
    """Read, train, save, measure, and write the page that tells all of it."""
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    began = time.time()
    texts = documents("train")
    characters = sum(map(len, texts))
    print(f"{len(texts)} documents, {characters} characters, {time.time() - began:.0f} s", flush=True)
    tokenizer = train_tokenizer(texts)
    encoded = [torch.tensor(each.ids) for each in tokenizer.encode_batch(texts)]
    available = sum(map(len, encoded))
    print(f"{available} tokens of {tokenizer.get_vocab_size()}, {time.time() - began:.0f} s", flush=True)

    model = LlamaForCausalLM(configuration())
    training_began = time.time()
    train(model, encoded, arguments)
    seconds = time.time() - training_began

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{arguments.out.name}.", dir=arguments.out.parent))
    try:
        save(model, tokenizer, temporary)
        heldout, scored = perplexity(temporary)
        print(f"held-out perplexity {heldout:.2f} over {scored} tokens", flush=True)
        seen = arguments.steps * arguments.batch * CONTEXT
        facts = {
            "documents": f"{len(texts)} documents, {characters:,} characters, {available:,} tokens",
            "recipe": (
                f"{arguments.steps} steps of {arguments.batch} x {CONTEXT} tokens: {seen:,} tokens, "
                f"{seen / available:.2f} passes; Muon at {arguments.lr} for matrices, AdamW at "
                f"{arguments.lr_adam} for embeddings and norms; warm-up over {arguments.warmup} steps, then "
                f"linear decay to zero; weights in float32, arithmetic in bfloat16 autocast; "
                f"seed {arguments.seed}"
            ),
            "time": f"{seconds / 60:.0f} minutes, {seen / seconds:.0f} tokens/s",
            "machine": f"{os.cpu_count()} cores {processor()}, CPU; torch {torch.__version__}, "
            f"transformers {transformers.__version__}, Python {platform.python_version()}",
            "date": datetime.date.today().isoformat(),
            "parameters": f"{model.num_parameters():,}",
            "heldout": f"{heldout:.2f}",
            "scored": f"{scored:,}",
        }
        (temporary / "README.md").write_text(README.format(**facts))
        arguments.out.mkdir(exist_ok=True)
        for path in sorted(temporary.iterdir()):
            path.chmod(0o644)  # safetensors writes for the owner alone
            path.replace(arguments.out / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {arguments.out}, {time.time() - began:.0f} s", flush=True)


def parse_arguments() -> argparse.Namespace:
    """The flags; the defaults are those of the model in the repository."""
    parser = argparse.ArgumentParser(description="Train the demo model and its tokenizer.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=50, help="steps of warm-up (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences at once (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon (default: %(default)s)")
    parser.add_argument("--lr-adam", type=float, default=0.01, help="of AdamW (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and of order (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="on busy cores 1 is best (default: 1)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="generate C++ for the model: faster, needs a C++ compiler (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.batch % arguments.micro_batch:
        parser.error(f"--batch is {arguments.batch}, expected a multiple of {arguments.micro_batch}")
    return arguments


def configuration() -> LlamaConfig:
    """The smallest Llama with grouped keys and values that still writes English: 3.5 million parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every text has tokens, and decoding gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def sequences(encoded: list[torch.Tensor], count: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches `[count, CONTEXT]` of the documents end to end, in a new order for each pass."""
    generator = torch.Generator().manual_seed(seed)
    need = count * CONTEXT
    stream = torch.empty(0, dtype=torch.long)
    while True:
        order = torch.randperm(len(encoded), generator=generator)
        stream = torch.cat([stream, *(encoded[place] for place in order.tolist())])
        # Rows of a batch come from places all over the pass, so that one long document does not fill a batch.
        steps = len(stream) // need
        used = stream[: steps * need].view(count, steps, CONTEXT)
        for step in range(steps):
            yield used[:, step]
        stream = stream[steps * need :]


def optimizers(model: LlamaForCausalLM, lr: float, lr_adam: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the embeddings and norms."""
    matrices = [each for name, each in model.named_parameters() if each.ndim == 2 and "embed" not in name]
    rest = [each for name, each in model.named_parameters() if each.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95, nesterov=True),
        torch.optim.AdamW(rest, lr=lr_adam, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, encoded: list[torch.Tensor], arguments: argparse.Namespace) -> None:
    """Train in place for `arguments.steps` steps and print how it goes."""
    model.train()
    forward = torch.compile(model.forward, dynamic=False) if arguments.compile else model.forward
    each_optimizer = optimizers(model, arguments.lr, arguments.lr_adam)
    highest = [optimizer.param_groups[0]["lr"] for optimizer in each_optimizer]
    parts = arguments.batch // arguments.micro_batch
    batches = sequences(encoded, arguments.batch, arguments.seed)
    began = time.time()
    smooth = math.log(VOCABULARY)
    for step in range(arguments.steps):
        decay = (arguments.steps - step) / (arguments.steps - arguments.warmup)
        scale = min((step + 1) / arguments.warmup, decay)
        loss_of_step = 0.0
        for part in next(batches).chunk(parts):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = forward(input_ids=part, labels=part, use_cache=False).loss / parts
            loss.backward()
            loss_of_step += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in zip(each_optimizer, highest, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smooth += (loss_of_step - smooth) * max(0.02, 1 / (step + 1))
        if step % 20 == 19 or step == arguments.steps - 1:
            tokens = (step + 1) * arguments.batch * CONTEXT
            seconds = time.time() - began
            print(
                f"step {step + 1} loss {smooth:.3f} {tokens / seconds:.0f} tokens/s {seconds:.0f} s",
                flush=True,
            )


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model, rounded to bfloat16, and the tokenizer as transformers loads them."""
    model.eval()
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.to(torch.bfloat16).save_pretrained(folder)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=PAD,
        model_max_length=model.config.max_position_embeddings,
    )
    wrapped.save_pretrained(folder)


@torch.inference_mode()
def perplexity(folder: Path) -> tuple[float, int]:
    """Of the saved model in float32 on the evaluate split: windows of CONTEXT tokens, first ones unscored."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stream = torch.cat([torch.tensor(tokenizer(text).input_ids) for text in documents("evaluate")])
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(8))
    return math.exp(total / len(windows)), windows.numel() - len(windows)


def processor() -> str:
    """The processor's name as Linux tells it, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


README = """# The demo model

A language model of {parameters} parameters, small enough to ship, so that every command of kvcalib can be
tried without a network. Its purpose is to compare quantizers of the KV cache with one another on a model
whose keys and values come from training. It writes poor English and knows nothing: quality is not claimed.

| | |
|---|---|
| made by | `python pipelines/train_demo.py` (all settings in that file) |
| architecture | Llama, 4 layers, hidden 256, 4 heads, 2 KV heads of 64, MLP 704, RoPE 1e4, tied embeddings |
| tokenizer | byte-level BPE, 2048 tokens; `<|bos|>` (0) before each document, also end; `<|pad|>` (1) |
| data | `kvcalib.demo.documents("train")`: {documents} |
| recipe | {recipe} |
| context in training | 512 tokens, documents end to end |
| saved as | bfloat16 |
| training time | {time} |
| machine | {machine} |
| date | {date} |
| held-out perplexity | **{heldout}** on `documents("evaluate")`: {scored} tokens, 512 at a time, float32 |

The data are docstrings of Python's standard library and of the installed packages, under their own licences;
none is copied here. Another set of packages gives other text, so training elsewhere gives another model and
another figure.

The default learning rates were guided by trials of half a million tokens, scored on the first 64 windows of
the evaluate split: the model was not trained on that text, but its settings have seen it.
"""


if __name__ == "__main__":
    main()
