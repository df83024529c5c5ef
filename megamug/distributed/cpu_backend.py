"""Megatron-core on a machine without CUDA: gloo collectives, CPU tensors, the same Megatron code above.

Megatron-core takes a GPU for granted in few places: it asks CUDA for the current device, it names "cuda" in factories,
it keeps CUDA random states, it synchronises streams. `apply()` redirects exactly these to the CPU, once, and only where
torch sees no GPU; with a GPU this module changes nothing. Everything that computes (parallel linears, schedules,
optimizers, checkpoints) is Megatron's own code, unchanged.

`PATCHES` is the whole list: what is replaced, and why. `MEGATRON_SOURCES` names the Megatron functions that this and
the models rest on, and what is assumed of each. A test compares their sources with those of the versions that were
checked (`tests/distributed/megatron_sources.json`), so that a Megatron-core which rewrites one of them fails there
instead of computing something else.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable

import torch

from megamug.command_line import console

_applied = False


# ---------------------------------------------------------------------------------------------- replacements

def _current_device() -> torch.device:
    # Megatron passes the result on as `device=`. An int would mean cuda:0, so a torch.device is returned.
    return torch.device("cpu")


def _is_cuda(device: object) -> bool:
    return device is not None and str(device).startswith("cuda")


def _on_cpu(factory: Callable) -> Callable:
    """A tensor factory that reads a CUDA `device=` as the CPU."""

    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped


def _stay(self, *args, **kwargs):
    # `.cuda()` of a tensor or module: it is where it should be.
    return self


def _type_in_cuda_spelling(original: Callable) -> Callable:
    """`tensor.type()` without arguments: "torch.FloatTensor" becomes "torch.cuda.FloatTensor".

    The optimizers sort parameters by comparing this string with the CUDA spelling.
    """

    @functools.wraps(original)
    def wrapped(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            result = result.replace("torch.", "torch.cuda.", 1)
        return result

    return wrapped


def _get_rng_state(device="cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()  # already a copy


def _set_rng_state(new_state: torch.Tensor, device=-1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _nothing(*args, **kwargs) -> None:
    return None


class _NoStream:
    """A CUDA stream or event where work is synchronous anyway."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name: str) -> Callable:
        return _nothing


@contextlib.contextmanager
def _no_stream_context(stream=None):
    yield


def _megatrons_own(name: str) -> Callable:
    """Replaces a multi-tensor kernel of Transformer Engine or apex by Megatron's stand-in of that name."""
    return lambda _: functools.partial(getattr(importlib.import_module("megatron.core.utils"), name))


# ---------------------------------------------------------------------------------------------- the list

# (module, attribute path, how to make the replacement from the original, why)
PATCHES: list[tuple[str, str, Callable, str]] = [
    ("torch", "cuda.current_device", lambda _: _current_device, "used as a device= by every layer and buffer"),
    *[
        ("torch", name, _on_cpu, 'literal device="cuda" in optimizers, schedules and buffers')
        for name in (
            "zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "randint", "zeros_like",
            "empty_like",
        )
    ],
    ("torch", "Tensor.cuda", lambda _: _stay, "tensors are moved with .cuda()"),
    ("torch", "nn.Module.cuda", lambda _: _stay, "modules are moved with .cuda()"),
    ("torch", "Tensor.type", _type_in_cuda_spelling, "optimizers compare type() with the CUDA spelling"),
    ("torch", "cuda.synchronize", lambda _: _nothing, "around communication and timers"),
    ("torch", "cuda.current_stream", lambda _: _NoStream, "stream waits around communication"),
    ("torch", "cuda.default_stream", lambda _: _NoStream, "stream waits around communication"),
    ("torch", "cuda.Stream", lambda _: _NoStream, "side streams of overlapped communication"),
    ("torch", "cuda.Event", lambda _: _NoStream, "events of overlapped communication"),
    ("torch", "cuda.stream", lambda _: _no_stream_context, "side streams of overlapped communication"),
    ("torch", "cuda.get_rng_state", lambda _: _get_rng_state, "random states of the tensor-parallel tracker"),
    ("torch", "cuda.set_rng_state", lambda _: _set_rng_state, "random states of the tensor-parallel tracker"),
    ("torch", "cuda.manual_seed", lambda _: torch.manual_seed, "random states of the tensor-parallel tracker"),
    ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state", lambda _: _get_rng_state, "the same"),
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", lambda _: _set_rng_state, "the same"),
    *[
        (f"megatron.core.optimizer.{module}", name, _megatrons_own(f"local_{own}"),
         "where Transformer Engine or apex is installed, it is theirs, which takes CUDA tensors alone")
        for module, name, own in (
            ("clip_grads", "multi_tensor_applier", "multi_tensor_applier"),
            ("clip_grads", "l2_norm_impl", "multi_tensor_l2_norm"),
            ("clip_grads", "multi_tensor_scale_impl", "multi_tensor_scale"),
            ("optimizer", "multi_tensor_applier", "multi_tensor_applier"),
            ("optimizer", "multi_tensor_scale_impl", "multi_tensor_scale"),
        )
    ],
]

# Megatron functions that this project assumes something of, beyond their signatures: module -> function -> what.
MEGATRON_SOURCES: dict[str, dict[str, str]] = {
    "megatron.core.tensor_parallel.random": {
        "_get_cuda_rng_state": "returns a copy of the state; replaced by the CPU generator's",
        "_set_cuda_rng_state": "takes such a state; replaced by the CPU generator's",
        "CudaRNGStatesTracker.add": "reads and sets states through the four functions that are replaced",
        "CudaRNGStatesTracker.fork": "reads and sets states through the two functions that are replaced",
        "model_parallel_cuda_manual_seed": "seeds by torch.cuda.manual_seed and the tracker alone",
        "CheckpointFunction": "keeps random states through the functions that are replaced; recomputes as computed",
    },
    "megatron.core.tensor_parallel.layers": {
        "ColumnParallelLinear.forward": "with skip_bias_add=False adds the bias; returns (output, bias to add)",
        "RowParallelLinear.forward": "with skip_bias_add=False adds the bias after the reduction; returns no bias",
    },
    "megatron.core.transformer.transformer_block": {
        "TransformerBlock._build_layers": "builds exactly the layer_specs given; the final norm where post_process and "
        "post_layer_norm hold",
        "TransformerBlock.forward": "pre_process=True takes hidden_states from the call; hands context to every layer",
    },
    "megatron.core.optimizer.distrib_optimizer": {
        "DistributedOptimizer._build_model_and_main_param_groups": "sorts parameters by type() in CUDA's spelling; "
        "the groups of model parameters and of shards run in one order",
        "DistributedOptimizer._copy_main_params_to_model_params": "copies each shard into its place in the buffers",
    },
    "megatron.core.optimizer.optimizer": {
        "Float16OptimizerWithFloat16Params.__init__": "sorts parameters by type() in CUDA's spelling; the groups of "
        "model and main parameters run in one order; copies `shared`",
    },
    "megatron.core.distributed.distributed_data_parallel": {
        "DistributedDataParallel.__init__": "puts each parameter's hook on an autograd node that it keeps in grad_accs",
        "DistributedDataParallel._make_backward_post_hook": "adds grad to main_grad unless grad_added_to_main_grad",
        "DistributedDataParallel.zero_grad_buffer": "clears sums and grad_added_to_main_grad of params_with_grad",
    },
    "megatron.core.distributed.param_and_grad_buffer": {
        "_ParamAndGradBuffer.__init__": "a parameter marked shared_embedding has a bucket of its own under the "
        "distributed optimizer, so both copies of a tied weight are sharded alike",
    },
    "megatron.core.distributed.finalize_model_grads": {
        "finalize_model_grads": "reduces over data, sequence and embedding groups; divides only by a num_tokens given",
        "_allreduce_non_tensor_model_parallel_grads": "sums main_grad of parameters marked sequence_parallel",
        "_allreduce_word_embedding_grads": "does nothing where share_embeddings_and_output_weights is False: tied "
        "weights are summed by megamug.training.pipeline",
    },
    "megatron.core.pipeline_parallel.schedules": {
        "forward_step_calc_loss": "calls loss_func on the last stage only; calculate_per_token_loss: divides nothing",
        "forward_backward_no_pipelining": "backward of each micro-batch's loss, gradients added",
        "forward_backward_pipelining_without_interleaving": "adjust_tensor_shapes_fn gives each boundary its shape",
        "forward_backward_pipelining_with_interleaving": "one shape for all boundaries, [seq_length (divided by the "
        "tensor-parallel ranks under sequence parallelism), micro_batch_size, hidden_size]; reads the first chunk's "
        "configuration: virtual_pipeline_model_parallel_size, microbatch_group_size_per_vp_stage (default: the ranks), "
        "no_sync_func as a list; rank r runs the stages r, P + r, ...",
        "get_forward_backward_func": "interleaves where parallel_state has a virtual pipeline size",
        "backward_step": "passes over an output that needs no gradient (a stage whose parameters are frozen)",
    },
    "megatron.core.pipeline_parallel.p2p_communication": {
        "_p2p_ops": "without batching, messages of a ring of two cannot be mixed up: one group a direction",
    },
    "megatron.core.dist_checkpointing.serialization": {
        "save": "async_sharded_save=True returns the request and writes nothing; async_strategy (above 0.16) `mcore` "
        "is Megatron's own writer",
    },
    "megatron.core.dist_checkpointing.core": {
        "save_config": "writes metadata.json and communicates with nobody",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {
        "TorchDistSaveShardedStrategy.async_save": "plans on all ranks; finalize_fns gather the results and write "
        ".metadata",
    },
    "megatron.core.dist_checkpointing.strategies.filesystem_async": {
        "FileSystemWriterAsync.prepare_write_data": "uses the module's _results_queue where there is one; files are "
        "written by threads or processes of the caller",
        "FileSystemWriterAsync.get_save_function_and_args": "(function, preload, [rank, buckets, results queue]); the "
        "function is partial, the transforms its first argument",
        "FileSystemWriterAsync.write_preloaded_data": "writes one bucket and puts (its number, results or an "
        "exception) into the first queue, whatever happens; takes one item from the second",
        "FileSystemWriterAsync.finish": "writes .metadata, on rank 0 alone, and communicates with nobody",
        "FileSystemWriterAsync.retrieve_write_results": "raises what a writer could not write",
    },
}


def _attribute(module: str, path: str) -> tuple[object, str]:
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def keep_freed_memory() -> bool:
    """Lets this process keep the memory of freed tensors for the next ones. Returns whether the C library could.

    glibc hands large blocks back to the system at once, so every step would fault each page of its activations in anew.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: it does as it does
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def apply() -> bool:
    """Makes Megatron-core run on CPU tensors and gloo. Returns whether it did; a machine with CUDA is left alone."""
    global _applied
    if torch.cuda.is_available():
        return False
    if not _applied:
        console.import_megatron()
        with torch.device("cpu"):  # torch lists its factories when the first such block ends, and keeps that list: in
            torch.empty(0)  # a later one `torch.device("meta")` would know the replacements alone, and do nothing
        for module, path, replace, _ in PATCHES:
            with console.own():
                owner, name = _attribute(module, path)
            setattr(owner, name, replace(getattr(owner, name)))
        keep_freed_memory()
        _applied = True
    return True


def source_hashes() -> dict[str, str]:
    """SHA-256 (first 16 digits) of the source of every function in `MEGATRON_SOURCES`, as installed.

    Call it before `apply()`: a patched function has another source.
    """
    hashes = {}
    for module, names in MEGATRON_SOURCES.items():
        for path in names:
            owner, name = _attribute(module, path)
            source = inspect.getsource(inspect.unwrap(getattr(owner, name)))
            hashes[f"{module}.{path}"] = hashlib.sha256(source.encode()).hexdigest()[:16]
    return hashes
