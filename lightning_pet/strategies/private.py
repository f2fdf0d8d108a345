"""Every private name of Lightning and torch in use, each behind one small function.

An upgrade that renames one of them breaks here, in a test that names it, and nowhere else.

========================================================  ==========================================================
name                                                      used for
========================================================  ==========================================================
``Trainer._run``                                          an adapted module whose Trainer was given no callback
``trainer.fit_loop.reset``,                               the two points of a run at which the loader's iterator is
``trainer.fit_loop.epoch_loop.on_run_start``              about to be made, and has just been made
``fit_loop.epoch_progress``, ``epoch_loop.batch_progress``  what had been done when a checkpoint was written
``_FitLoop._restarting``, ``_Loop.on_iteration_done``     telling the loops that nothing is left to be restarted
``_TrainingEpochLoop._skip_next_val``                     a checkpoint written at the end of a validation
``_FitLoop._load_combined_loader_states``,                stateful loaders that were set up before the checkpoint
``_FitLoop._combined_loader_states_to_load``              was read
``_FitLoop._combined_loader``                             the training loaders, without their collection
``CombinedLoader._mode``                                  finding loaders that start again within an epoch
``_DataLoaderIterDataFetcher``                            ``training_step(dataloader_iter)``
``_WrappingCheckpointIO``, ``._checkpoint_io``            reaching the file writer inside a wrapper
``AsyncCheckpointIO._executor``, ``._error``              removing an old file only after the new one is there
``LRScheduler._last_lr``, ``._schedulers``                extending schedulers by a parameter group
``WeightAveraging._average_model``,                       averages of what trains only
``StochasticWeightAveraging._average_model``
``Optimizer._step_supports_amp_scaling``                  clipping gradients that are still scaled
``ModelCheckpoint._link_checkpoint``                      a link to the last checkpoint that never dangles
``_MultiProcessingLauncher``, ``._already_fit``           warning about deltas that stay in other processes
``DDPStrategy._ddp_kwargs``                               layers that are dropped, or start to train within a run
``overrides.distributed._sync_module_states``             equal values in all processes where DDP wraps nothing
``._ddp_params_and_buffers_to_ignore``                    quantised weights that DDP cannot send
``PreTrainedModel._gradient_checkpointing_func``          reentrant checkpointing in transformers models
``_Loop._data_source``                                    a batch to look at the model with
``._log_hyperparams``                                     what Lightning logs of a module and its data, and when it logs
``_LoggerConnector.should_update_logs``
``LBFGS._params``, ``LBFGS._numel_cache``                 optimizers that use their first group only
``Node._sequence_nr``, ``_get_sequence_nr``,              reading the autograd graph, in ``probe/graph.py`` and
``Node._input_metadata``, ``Node._saved_groups``,         ``probe/graph.py``; guarded by ``tests/core/test_graph.py``
``Node._saved_weight``, ``torch._C._autograd``
``Module._parameters``, ``Module._modules``,              a module's own tensors under their own names;
``Module._buffers``, ``._non_persistent_buffers_set``     guarded by ``tests/methods``
``Module._forward_hooks``, ``._forward_pre_hooks``        a call that does more than its forward: ``insertion/rows.py``
``aten._unsafe_view``                                     outputs that own their memory, in ``layers/``
``torch._C._current_graph_task_id``,                      telling recomputation from forward, in ``layers/`` and
``._current_autograd_node``, ``threading._DummyThread``,  ``model/``; which forward it repeats, in which thread:
``._is_key_in_tls``, ``._get_obj_in_tls`` ("context")     ``model/call.py``, guarded by ``tests/core/test_calls.py``
``Module._replicate_for_data_parallel``                   copies that run in threads of their own
``forward_ad._current_level``,                            telling transforms of ``torch.func`` and forward mode, in
``torch._C._functorch``                                   ``layers/transforms.py``
``torch._C._is_any_autocast_enabled``                     one cheap question per layer and token, in ``layers/``;
                                                          guarded by ``tests/core/test_acting.py``
``Tensor._version``, ``Node._saved_approximate``          inputs that autograd keeps, in ``layers/low_rank_source.py``
``_top_saved_tensors_default_hooks``                      whether hooks see what is saved, there, and weights that are
                                                          made again, in ``insertion/remade.py``
``nn.modules.conv._ConvNd``                               the class of all convolutions, in ``targets/targets.py``
``CustomPolicy._lambda_fn``                                a wrap policy of FSDP1 that is extended, in ``fsdp.py``
``FullyShardedDataParallel._is_root``                      whether a unit of FSDP1 was used before
``FSDPModule._get_fsdp_state``, ``._is_root``              whether one of FSDP2 was
``._lazy_init_hp_params_optimizer_state``,                optimizer states of ZeRO-1 and ZeRO-2, parameter by parameter
``._hp_optimizer_states_linked``
``._hp_mapping``, ``._index_in_param_group``,             gradients that ZeRO is about to step with, in the process
``._get_fp32_grad_state_partition``, ``._z3_optimizer``   that holds them
``zero.partition_parameters.shutdown_init_context``,      building deltas inside of ``zero.Init``
``.restore_init_context``
``distributed_c10d._get_default_store``                   telling a process that comes alone to a common action
``lightning.fabric.utilities.types._PATH``                the annotation of Lightning's own writers
``LightningCLI._get``                                     an option inside a subcommand, in ``lightning_cli.py``
``torch.utils._python_dispatch``,                         masks on the meta device, in ``probe/trace.py``;
``aten._local_scalar_dense``, ``OpOverload._schema``      what a step writes, in ``operations/roots.py``
``torch._subclasses.fake_tensor``                         counting what a delta would hold, in ``callbacks/base.py``;
``torch.utils._pytree``                                   a step without values, in ``report/memory/rehearsal.py``
``torch._foreach_mul``, ``_foreach_add_``,                 work on many tensors in one call, in ``layers/`` and
``_foreach_sub_``, ``_foreach_abs_``, ``_foreach_copy_``  ``callbacks/``
``RNNBase._flat_weights``, ``._flat_weights_names``       weights of recurrent layers, in ``insertion/host.py``
========================================================  ==========================================================
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Any, Final

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import CombinedLoader
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel

LAST_LR: Final = "_last_lr"
"""Attribute in which a scheduler keeps one learning rate per parameter group."""


def replace_method(owner: object, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Let ``owner.name(...)`` call ``method(original, ...)``, on this instance only.

    Returns:
        A function that undoes the replacement.
    """
    original = getattr(owner, name)
    before = vars(owner).get(name)
    setattr(owner, name, partial(method, original))

    def undo() -> None:
        if before is None:
            vars(owner).pop(name, None)
        else:
            setattr(owner, name, before)

    return undo


def around_runs(context: Callable[[Any, Any, Any], AbstractContextManager[None]]) -> None:
    """Let every Trainer run its verbs within ``context(trainer, module, checkpoint path)``; once per process."""
    original = Trainer._run
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def run(self: Any, model: Any, ckpt_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        with context(self, model, ckpt_path):
            return original(self, model, ckpt_path, *args, **kwargs)

    setattr(Trainer, "_run", run)  # noqa: B010  # a method that is assigned to is an error for mypy


def look_for_unused_parameters(strategy: Any) -> bool:
    """Let a DDP strategy look in every step for parameters without a gradient; return whether it did not before."""
    before = bool(strategy._ddp_kwargs.get("find_unused_parameters", False))
    strategy._ddp_kwargs["find_unused_parameters"] = True
    return not before


def expects_one_graph(strategy: Any) -> bool:
    """Whether a DDP strategy keeps from its first step which parameters have gradients."""
    return bool(strategy._ddp_kwargs.get("static_graph", False))


def share_from_first(module: Any) -> None:
    """Give every process the values that the first one has, as DDP does when it wraps a model."""
    _sync_module_states(module)


def keep_from_ddp(module: Any, names: Iterable[str]) -> None:
    """Let DDP neither send these parameters at its start nor look at them later."""
    module._ddp_params_and_buffers_to_ignore = list(names)


def buckets_hold_gradients(strategy: Any) -> bool:
    """Whether gradients live in the buckets that a DDP strategy sends."""
    return bool(strategy._ddp_kwargs.get("gradient_as_bucket_view", False))


def before_run(fit_loop: Any, method: Callable[..., Any]) -> Callable[[], None]:
    """Call ``method(original)`` in place of the reset that follows the making of the loader."""
    return replace_method(fit_loop, "reset", method)


def at_epoch_run(fit_loop: Any, method: Callable[..., Any]) -> Callable[[], None]:
    """Call ``method(original, fetcher)`` in place of the step that makes an epoch's iterator."""
    return replace_method(fit_loop.epoch_loop, "on_run_start", method)


def epoch_counts(trainer: Any) -> Any:
    """Return ``ready``, ``started``, ``processed``, ``completed`` of the epochs of this run."""
    return trainer.fit_loop.epoch_progress.current


def batch_counts(trainer: Any) -> Any:
    """Return ``ready``, ``started``, ``processed``, ``completed`` of the batches of this epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.current


def is_last_batch(trainer: Any) -> bool:
    """Whether the batch that was last taken ends the epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return bool(progress.is_last_batch or progress.current.ready >= trainer.num_training_batches)


def complete_batch(trainer: Any) -> None:
    """Count the last batch as complete."""
    trainer.fit_loop.epoch_loop.batch_progress.increment_completed()


def validation_is_over(trainer: Any) -> bool:
    """Whether every batch of the validation that is running has been processed."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    return bool(progress.is_last_batch and progress.current.completed == progress.current.ready > 0)


def creates_iterator(trainer: Any) -> bool:
    """Whether the epoch that begins makes an iterator; otherwise it uses the one made with the loader."""
    loop = trainer.fit_loop
    return bool(trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting)


def forget_restart(trainer: Any) -> None:
    """Let the fit loop begin with a new epoch, though it was loaded from a checkpoint."""
    trainer.fit_loop._restarting = False  # its property setter turns True again under max_steps
    trainer.fit_loop.epoch_loop.restarting = False


def end_restart(loop: Any) -> None:
    """Tell one loop that it has caught up with its checkpoint."""
    loop.on_iteration_done()


def end_batch(trainer: Any, fetcher: Any, validate: bool) -> None:
    """Do what follows the batch-end hooks: validation where it is due, schedulers, counters."""
    loop = trainer.fit_loop.epoch_loop
    loop._skip_next_val = not validate
    loop.on_advance_end(fetcher)


def load_waiting_loader_states(trainer: Any) -> bool:
    """Load the states of stateful loaders that Lightning has not loaded; return whether there were any."""
    loop = trainer.fit_loop
    if not loop._combined_loader_states_to_load:
        return False
    restarting, loop._restarting = loop._restarting, True  # Lightning loads them in the middle of an epoch only
    loop._load_combined_loader_states()
    loop._restarting = restarting
    return True


def training_loaders(trainer: Any) -> list[Any]:
    """Return the loaders of the training; none before they were requested."""
    loader = trainer.fit_loop._combined_loader
    return [] if loader is None else list(loader.flattened)


def gives_iterator(fetcher: object) -> bool:
    """Whether ``training_step`` takes the batches itself, from an iterator."""
    return isinstance(fetcher, _DataLoaderIterDataFetcher)


def restarts_short_loaders(loader: CombinedLoader) -> bool:
    """Whether a loader that is exhausted starts again while a longer one goes on."""
    return loader._mode == "max_size_cycle" and len(loader.flattened) > 1


def replace_link_checkpoint(callback: ModelCheckpoint, method: Callable[..., None]) -> None:
    """Let a callback link its last checkpoint by ``method(original, trainer, path, link)``; once."""
    if "_link_checkpoint" not in vars(callback):
        replace_method(callback, "_link_checkpoint", method)


def innermost_wrapper(io: CheckpointIO) -> _WrappingCheckpointIO | None:
    """Return the wrapper that holds the actual writer; ``None`` if ``io`` is not wrapped."""
    if not isinstance(io, _WrappingCheckpointIO):
        return None
    while isinstance(io._checkpoint_io, _WrappingCheckpointIO):
        io = io._checkpoint_io
    return io


def replace_wrapped(wrapper: _WrappingCheckpointIO, io: CheckpointIO) -> None:
    """Put another writer into a wrapper (its property accepts a first one only)."""
    wrapper._checkpoint_io = io


def wrappers(io: CheckpointIO | None) -> Iterator[_WrappingCheckpointIO]:
    """Iterate over nested wrappers, outermost first."""
    while isinstance(io, _WrappingCheckpointIO):
        yield io
        io = io._checkpoint_io


def async_queue(io: AsyncCheckpointIO) -> Executor | None:
    """Return the one-thread queue in which an asynchronous writer saves; ``None`` before the first save."""
    return io._executor


def async_failed(io: AsyncCheckpointIO) -> bool:
    """Whether a queued save has raised."""
    return io._error is not None


def nested_schedulers(scheduler: Any) -> Iterator[Any]:
    """Iterate over a scheduler and those that it is composed of (sequential, chained)."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from nested_schedulers(inner)


def uses_first_group_only(optimizer: Any) -> bool:
    """Whether an optimizer steps the parameters of its first group only, as LBFGS does."""
    params = getattr(optimizer, "_params", None)
    return params is not None and params is optimizer.param_groups[0]["params"]


def forget_joint_state(optimizer: Any) -> None:
    """Let an optimizer that keeps one state for all of its parameters together begin anew with those that it has."""
    if uses_first_group_only(optimizer):
        optimizer.state.clear()
        if hasattr(optimizer, "_numel_cache"):
            optimizer._numel_cache = None


def unscales_itself(optimizer: Any) -> bool:
    """Whether an optimizer takes scaled gradients and unscales them in its step, as fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def average_of(callback: Any) -> Any:
    """Return the copy of the LightningModule in which an averaging callback keeps its averages, if there is one."""
    average = callback._average_model
    return average.module if isinstance(average, AveragedModel) else average


def wrap_average(callback: Any, method: Callable[..., Any]) -> None:
    """Let an averaging callback's model call ``method(original, average, value, count)`` for every tensor."""
    average = callback._average_model
    if getattr(average, "avg_fn", None) is not None and "_pet_wrapped" not in vars(average):
        average.avg_fn = partial(method, average.avg_fn)
        vars(average)["_pet_wrapped"] = True


def has_run(module: Module) -> bool:
    """Whether a forward of this module ran since FSDP2 made it a unit, or of one around it."""
    state = getattr(module, "_get_fsdp_state", None)
    return state is not None and state()._is_root is not None


def starts_processes(launcher: object) -> bool:
    """Whether a launcher runs the Trainer in new processes that only hand the weights back."""
    return isinstance(launcher, _MultiProcessingLauncher)


def has_fitted(launcher: Any) -> bool:
    """Whether such a launcher has run a fit before."""
    return bool(launcher._already_fit)


def checkpoints_reentrantly(module: Any) -> bool:
    """Whether a transformers module runs its layers under reentrant checkpointing (torch's default)."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    keywords = getattr(function, "keywords", {})
    return bool(getattr(module, "gradient_checkpointing", False)) and bool(keywords.get("use_reentrant", True))


def module_policy(policy: Any) -> Callable[[Any, bool, int], bool] | None:
    """Return a wrap policy of FSDP1 as a function of the module, whether to go below it, and its size."""
    if isinstance(policy, CustomPolicy):
        function = policy._lambda_fn
        return lambda module, recurse, size: recurse or bool(function(module))
    return None if policy is None else lambda module, recurse, size: bool(policy(module, recurse, size))


def knows_outermost(unit: Any) -> bool:
    """Whether a unit of FSDP1 was used before, so that it knows whether it is the outermost one."""
    return getattr(unit, "_is_root", True) is not None


@contextmanager
def without_zero_init() -> Iterator[None]:
    """Within the block ``zero.Init`` of DeepSpeed, if the caller is inside of one, does nothing."""
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


def rendezvous_store() -> Any:
    """Return the key-value store through which the processes of this run found each other."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def unwrapped_name(name: str) -> str:
    """Return a parameter's name as FSDP1 writes it: without its own levels and those of checkpointing."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def link_partition_states(zero: Any) -> None:
    """Let the parameters of a ZeRO-1 or ZeRO-2 optimizer find their parts of its states."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def partition_gradient(parameter: Any) -> Any:
    """Return this process's part of the gradient that ZeRO is about to step with, itself; ``None`` if it has none."""
    if hasattr(parameter, "ds_id"):
        return parameter._z3_optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=False)[0]
    mapping = getattr(parameter, "_hp_mapping", None)
    return None if mapping is None else mapping.get_lp_grad_fragment(parameter._index_in_param_group)


def loader_of_run(trainer: Any) -> Any:
    """Make the loader (or loaders) of the run that is being set up, from wherever it comes; ``None`` without one."""
    loops = {"fit": "fit_loop", "validate": "validate_loop", "test": "test_loop", "predict": "predict_loop"}
    source = getattr(trainer, loops[trainer.state.fn])._data_source
    return source.dataloader() if source.is_defined() else None


def logged_hyperparameters(trainer: Any) -> dict[str, Any]:
    """Return the hyper-parameters of the module and the data that Lightning hands to the loggers of this run."""
    sources = [s for s in (trainer.lightning_module, trainer.datamodule) if s is not None and s._log_hyperparams]
    found = {name: value for source in sources for name, value in source.hparams_initial.items()}
    return {name: value for name, value in found.items() if name != "_class_path"}


def logs_this_step(trainer: Any) -> bool:
    """Whether what is logged in this training step reaches the loggers (``log_every_n_steps``)."""
    return bool(trainer._logger_connector.should_update_logs)


def written_by(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that an operation of torch writes into, as its schema says; lists of tensors one by one."""
    schema = operation._schema
    if not schema.is_mutable:
        return
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, list | tuple) else (value,)
