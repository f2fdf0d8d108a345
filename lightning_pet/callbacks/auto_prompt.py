"""AutoPrompt (Shin et al. 2020): a search for trigger tokens that is guided by gradients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_pet.arguments import one_of, whole
from lightning_pet.callbacks.base import PETCallback
from lightning_pet.errors import ArgumentError, DeadSiteError, UnsupportedStrategyError
from lightning_pet.insertion.method import Insertion
from lightning_pet.insertion.prompt_places import Where, prompt_insertions, prompt_targets
from lightning_pet.layers.prompt import TriggerRows, best_tokens, first_order_scores
from lightning_pet.model.naming import module_at
from lightning_pet.model.structure import Structure, Target
from lightning_pet.model.tokens import control_ids, load_tokenizer, sampled_ids, special_ids, text_ids
from lightning_pet.operations.roots import silenced
from lightning_pet.strategies.strategy import adapter_for
from lightning_pet.training.controller import Controller


class AutoPromptCallback(PETCallback):
    r"""AutoPrompt: real tokens before the input, found by search instead of trained.

    The score of a trigger is the loss of your ``training_step``, so it works on any module. An iteration takes
    two windows of batches. In the first, the gradient of the loss with respect to the trigger's embeddings
    is summed, and the tokens with the largest :math:`-w_{in}^\top \nabla` for one random position are the
    candidates. In the second, every candidate is evaluated in full, without dropout, and the best replaces the
    present token if it lowers the loss of these batches. Nothing trains, and no optimizer is needed; a head that
    is new (``modules_to_save``) trains as usual. Under DDP gradients and losses are means over all processes,
    which therefore decide alike. Source: Shin et al. 2020.

    Args:
        length: tokens of the trigger.
        candidates: tokens tried in each iteration; the paper uses 10 to 100.
        accumulation: batches in each of the two windows.
        init_text: words to start from, repeated or cut to ``length``; ``None``: the tokenizer's mask token,
            else random common tokens.
        tokenizer: name or folder of the model's tokenizer, to show the trigger as text; ``"bytes"``: UTF-8 bytes.
        exclude: token ids that are never tried; ``None``: special tokens, and with a tokenizer all that are
            no text.
        where: part of an encoder-decoder whose input gets the trigger.
        seed: decides the positions.
        **kwargs: arguments of :class:`~lightning_pet.callbacks.base.PETCallback`.

    Raises:
        ArgumentError: if a number is out of range, or an option lacks its tokenizer.
        UnsupportedStrategyError: in ``fit``, if the strategy shards the model over processes, or the module optimizes
            manually, so that its ``training_step`` returns no loss.

    Example:
        >>> from lightning_pet import AutoPromptCallback
        >>> AutoPromptCallback(candidates=0)
        Traceback (most recent call last):
        lightning_pet.errors.ArgumentError: candidates=0: must be at least 1, e.g. 10.
    """

    method: ClassVar[str] = "auto_prompt"
    mirrors = False
    may_change: ClassVar[frozenset[str]] = PETCallback.may_change | {
        "candidates",
        "accumulation",
        "init_text",
        "tokenizer",
        "exclude",
    }

    def __init__(
        self,
        length: int = 3,
        candidates: int = 10,
        accumulation: int = 10,
        init_text: str | None = None,
        tokenizer: str | None = None,
        exclude: list[int] | None = None,
        where: Where = "encoder",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for label, value in (("length", length), ("candidates", candidates), ("accumulation", accumulation)):
            whole(label, value, wanted=f"must be at least 1, e.g. {3 if label == 'length' else 10}.")
        one_of("where", where, Literal["encoder", "decoder"], "use 'encoder' or 'decoder'; the search has one trigger.")
        if init_text is not None and tokenizer is None:
            raise ArgumentError("init_text needs a tokenizer: pass tokenizer='…', the model's name or folder.")
        self.length = length
        self.candidates = candidates
        self.accumulation = accumulation
        self.init_text = init_text
        self.tokenizer = tokenizer
        self.exclude = exclude
        self.where: Where = where
        self.seed = seed
        self._start: list[int] | None = None
        self._search = _Search()
        self._evaluation = ExitStack()  # around a step whose gradient is used
        self._words: Any = None

    # --- what a method answers ------------------------------------------------------------------

    def resolve(self, root: nn.Module, structure: Structure) -> tuple[Target, ...]:
        """Find where the model takes its ids, and the trigger to start from."""
        targets = prompt_targets(root, structure, self.where)
        table = module_at(root, targets[1].module)
        self._start = self._first_trigger(cast(nn.Embedding, table).num_embeddings, getattr(root, "config", None))
        return targets

    def _first_trigger(self, vocabulary: int, config: Any) -> list[int]:
        words: Any = load_tokenizer(self.tokenizer, "init_text") if self.tokenizer is not None else None
        if self.init_text is not None:
            ids = text_ids(words, self.init_text)
        elif getattr(words, "mask_token_id", None) is not None:
            ids = [words.mask_token_id]
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                ids = [row[0] for row in sampled_ids(self.length, vocabulary, special_ids(config))]
        if max(ids) >= vocabulary:
            raise ArgumentError(
                f"tokenizer={self.tokenizer!r} makes id {max(ids)}, but the model has {vocabulary} rows: it is another "
                "model's tokenizer."
            )
        return [ids[index % len(ids)] for index in range(self.length)]

    def insertions(self, root: nn.Module, targets: Sequence[Target]) -> list[Insertion]:
        """Build the trigger and all that puts it into place."""
        return prompt_insertions(root, targets, lambda target: self.build(root, target))

    def build(self, root: nn.Module, target: Target) -> TriggerRows:
        """Build the trigger for a token table."""
        table = cast(nn.Embedding, module_at(root, target.module))
        return TriggerRows(self._start or self.length, table.num_embeddings, table.weight.device)

    @property
    def not_for_tasks(self) -> str | None:
        """A search compares losses of whole batches."""
        return "it searches words by the loss of whole batches. Search them in a run for each task."

    # --- the search -----------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Insert the trigger."""
        if stage == "fit" and adapter_for(trainer).shards:
            raise UnsupportedStrategyError(
                f"AutoPromptCallback compares all rows of the token table and runs training_step outside of the "
                f"engine's own forward, which {type(trainer.strategy).__name__} does not allow for. Use one device, or "
                "strategy='ddp'."
            )
        if stage == "fit":
            _refuse_manual(pl_module)
        super().setup(trainer, pl_module, stage)
        if self._words is None and self.tokenizer is not None:
            self._words = load_tokenizer(self.tokenizer, "the trigger's text")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look again: the module's own ``setup`` may have chosen manual optimization."""
        _refuse_manual(pl_module)
        super().on_fit_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the training step; where its gradient is to be used, in evaluation mode, as the losses later are."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        rows, _ = self._rows(trainer)
        rows.watching = True
        if not self._search.tried:
            self._evaluation.enter_context(_evaluating(pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add one batch to the window; at its end, choose candidates or decide."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._evaluation.close()
        rows, table = self._rows(trainer)
        gradient, search = rows.take_gradient(), self._search
        rows.watching = False
        if gradient is None:
            raise DeadSiteError(
                "the trigger received no gradient: training_step did not run the model, or ran it without gradients."
            )
        if not search.tried:
            search.add_gradient(trainer.strategy.reduce(gradient, reduce_op="mean"))
            if search.batches == self.accumulation:
                search.propose(rows.ids, table, self.candidates, self._excluded(trainer, len(table)), self.seed)
            return
        losses = [self._loss(trainer, pl_module, rows, trigger, batch, batch_idx) for trigger in search.triggers()]
        search.add_losses(trainer.strategy.reduce(torch.stack(losses), reduce_op="mean").cpu())
        if search.batches == self.accumulation:
            chosen, loss = search.decide()
            pl_module.log(f"trigger/{self.name}", loss, prog_bar=True, batch_size=1)
            if chosen != rows.ids.tolist():
                rows.ids.copy_(torch.tensor(chosen))
                rank_zero_info(f"trigger {self.name}: {self._shown(chosen)} (loss {loss:.4f})")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave training mode as it was before the step that failed."""
        self._evaluation.close()
        super().on_exception(trainer, pl_module, exception)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in the middle of no step."""
        return super().__getstate__() | {"_evaluation": ExitStack()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was found."""
        super().on_train_end(trainer, pl_module)
        rank_zero_info(f"trigger {self.name}: {self._shown(self._rows(trainer)[0].ids.tolist())}")

    def _excluded(self, trainer: pl.Trainer, vocabulary: int) -> list[int]:
        special = special_ids(getattr(Controller.get(trainer).adapted.root, "config", None))
        special += [] if self._words is None else control_ids(self._words, vocabulary)
        return [token for token in (special if self.exclude is None else self.exclude) if token < vocabulary]

    def _rows(self, trainer: pl.Trainer) -> tuple[TriggerRows, Tensor]:
        """The trigger and the weight of its token table."""
        root = Controller.get(trainer).adapted.root
        target, rows = next(found for found in self.deltas(root) if found[0].role == "prompt.rows")
        return cast(TriggerRows, rows), cast(nn.Embedding, module_at(root, target.module)).weight.detach()

    def _loss(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        rows: TriggerRows,
        trigger: Sequence[int],
        batch: Any,
        batch_idx: int,
    ) -> Tensor:
        """Loss of a training step with this trigger, without dropout, gradients or logs."""
        before = rows.ids.clone()
        rows.ids.copy_(torch.tensor(trigger))
        try:
            with torch.no_grad(), _evaluating(module), silenced(module), trainer.precision_plugin.train_step_context():
                returned = module.training_step(batch, batch_idx)
        finally:
            rows.ids.copy_(before)
        loss = returned["loss"] if isinstance(returned, Mapping) else returned
        return cast(Tensor, loss).detach().float()

    def _shown(self, ids: Sequence[int]) -> str:
        return f"{ids}" if self._words is None else f"{self._words.decode(ids)!r} {list(ids)}"

    # --- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The search between two batches; the trigger itself is in the delta."""
        return self._search.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the search of a checkpoint."""
        self._search = _Search(**state_dict)


class _Search:
    """One iteration in progress: first a sum of gradients, then the losses of the triggers that are tried."""

    def __init__(
        self,
        iteration: int = 0,
        batches: int = 0,
        present: Sequence[int] = (),
        position: int = 0,
        tried: Sequence[int] = (),
        gradient: Tensor | None = None,
        losses: Tensor | None = None,
    ) -> None:
        self.iteration, self.batches, self.position = iteration, batches, position
        self.present, self.tried = list(present), list(tried)
        self.gradient, self.losses = gradient, losses

    def state(self) -> dict[str, Any]:
        """All of it, as plain data."""
        return dict(vars(self))

    def add_gradient(self, gradient: Tensor) -> None:
        """One more batch of the first window."""
        self.gradient = gradient if self.gradient is None else self.gradient.to(gradient.device) + gradient
        self.batches += 1

    def propose(self, present: Tensor, table: Tensor, count: int, excluded: Sequence[int], seed: int) -> None:
        """Choose a position and the tokens to try there."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + self.iteration)
        self.position = int(torch.randint(len(present), (), generator=generator))
        self.present = present.tolist()
        scores = first_order_scores(table, cast(Tensor, self.gradient)[self.position])
        self.tried = best_tokens(scores, count, excluded)
        self.batches, self.gradient = 0, None

    def triggers(self) -> Iterator[list[int]]:
        """The present trigger, then one for each token."""
        for token in (self.present[self.position], *self.tried):
            yield [*self.present[: self.position], token, *self.present[self.position + 1 :]]

    def add_losses(self, losses: Tensor) -> None:
        """One more batch of the second window."""
        self.losses = losses if self.losses is None else self.losses + losses
        self.batches += 1

    def decide(self) -> tuple[list[int], float]:
        """The best trigger (the present one if no other is better) and its mean loss; starts the next iteration."""
        losses = cast(Tensor, self.losses)
        best = int(losses.argmin())  # the first of equals: the present one
        chosen, loss = list(self.triggers())[best], float(losses[best]) / self.batches
        self.__init__(self.iteration + 1)  # type: ignore[misc]
        return chosen, loss


def _refuse_manual(module: pl.LightningModule) -> None:
    if not module.automatic_optimization:
        raise UnsupportedStrategyError(
            f"{type(module).__name__} optimizes manually (automatic_optimization=False), so there is no one loss "
            "by which AutoPromptCallback could judge a trigger. Search in a module whose training_step returns the "
            "loss, and load the delta here; or use PromptTuningCallback, which trains in either."
        )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
