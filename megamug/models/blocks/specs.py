"""Tables of Megatron ModuleSpecs: `local` (plain torch) and `te` (Transformer Engine, FP8-able).

Both give the same parameters under the same checkpoint names: `local` maps its norms to the names under which
Transformer Engine keeps them, so a checkpoint does not know which of the two wrote it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import (
    CrossAttentionSubmodules,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules

from megamug.configuration.sections import Config
from megamug.errors import UserError
from megamug.models.blocks import layers, norms
from megamug.models.blocks.elementwise import SwiGLU
from megamug.models.blocks.norms import NormedResidual


@dataclass(frozen=True)
class Modules:
    """The modules that a layer is put together from."""

    norm: type
    head_norm: type  # of every query and key head; always with parameters
    attention: type
    column_linear: type
    row_linear: type
    norm_linear: type | None  # a column-parallel linear with the norm before it folded in


def modules(kind: str, plain_norm: bool = False) -> Modules:
    """`local` or `te`; with `plain_norm` the norms have no parameters, and so none is folded into a linear.

    Raises UserError where Transformer Engine is asked for and missing.
    """
    if kind == "local":
        return Modules(
            norm=norms.PlainNorm if plain_norm else layers.Norm,
            head_norm=layers.Norm,
            attention=layers.LocalAttention,
            column_linear=layers.LocalColumnParallelLinear,
            row_linear=layers.LocalRowParallelLinear,
            norm_linear=None,
        )
    assert kind == "te", kind
    try:
        from megatron.core.extensions import transformer_engine as te

        assert te.HAVE_TE
    except (ImportError, AssertionError) as error:
        raise UserError(
            "precision.layers=te needs Transformer Engine, which is not installed: pip install --no-build-isolation"
            " -e '.[te]' in the checkout of megamug, or set precision.layers=local"
        ) from error
    from megamug.models.attention.te import DocumentAttention

    return Modules(
        norm=norms.PlainNorm if plain_norm else te.TENorm,
        head_norm=te.TENorm,
        attention=DocumentAttention,
        column_linear=_adding_bias(te.TEColumnParallelLinear),
        row_linear=_adding_bias(te.TERowParallelLinear),
        norm_linear=None if plain_norm else _adding_bias(te.TELayerNormColumnParallelLinear),
    )


@cache
def _adding_bias(linear: type) -> type:
    """A linear of Transformer Engine that adds its bias in the product, as the `local` ones do: callers that ask for
    `skip_bias_add` would add it in a pass of its own, and sum its gradient in another."""

    class Adding(linear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "skip_bias_add": False})

    Adding.__name__ = Adding.__qualname__ = linear.__name__
    return Adding


def choose(config: Config) -> tuple[str, str]:
    """Resolves `precision.layers`: ("local" | "te", reason). What is faster was measured: docs/benchmarks/gpu.md."""
    requested, parallel = config.precision.layers, config.parallel
    if requested != "auto":
        return requested, f"precision.layers={requested}"
    if not torch.cuda.is_available():
        return "local", "no CUDA device"
    if config.precision.fp8 != "none":
        return "te", f"precision.fp8={config.precision.fp8} needs them"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return "local", "Transformer Engine is not installed"
    if parallel.tensor > 1:
        return "te", f"parallel.tensor={parallel.tensor}: layers that are split are not compiled"
    return "local", "without FP8 and tensor parallelism faster than Transformer Engine's"


# Norms of a layer, and their names in checkpoints: where Transformer Engine folds one into a linear, as it calls that.
NORM_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "self_attn_bda.norm.": "post_self_attn_layernorm.",
    "mlp_bda.norm.": "post_mlp_layernorm.",
    "self_attention.query_norm.": "self_attention.q_layernorm.",
    "self_attention.key_norm.": "self_attention.k_layernorm.",
}


def transformer_layer(
    kind: str,
    config: TransformerConfig,
    causal: bool,
    context_width: int | None = None,
    plain_norm: bool = False,
    per_head_norm: bool = False,
    res_post_norm: bool = False,
    padded: bool = False,
) -> ModuleSpec:
    """A pre-norm transformer layer: self-attention, cross-attention to a context if `context_width` is given, MLP.

    `per_head_norm`: the norms of queries and keys are `norms.HeadNorm`. `res_post_norm`: norms stand behind attention
    and MLP, before the residual sum. `padded`: self-attention gets a mask [b, 1, 1, s] of the keys that are padding.
    """
    assert not (causal and padded), "what is causal does not see the padding behind it"
    assert not (res_post_norm and context_width is not None), "cross-attention has its norm before it"
    m = modules(kind, plain_norm)
    first_linear = m.column_linear if m.norm_linear is None or res_post_norm else m.norm_linear
    norm_before = IdentityOp if res_post_norm or m.norm_linear is not None else m.norm
    add: Callable | ModuleSpec = get_bias_dropout_add
    if res_post_norm:
        add = ModuleSpec(module=NormedResidual, params={"norm": m.norm, "config": config})
    mask_type = AttnMaskType.causal if causal else AttnMaskType.padding if padded else AttnMaskType.no_mask
    head_norm = m.head_norm if config.qk_layernorm else None
    cross = {}
    if context_width is not None:
        cross = dict(
            pre_cross_attn_layernorm=m.norm,
            cross_attention=ModuleSpec(
                module=layers.LatentCrossAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=CrossAttentionSubmodules(
                    linear_q=m.column_linear,
                    linear_kv=layers.context_linear(m.column_linear, context_width),
                    core_attention=m.attention,
                    linear_proj=m.row_linear,
                ),
            ),
            cross_attn_bda=get_bias_dropout_add,
        )
    return ModuleSpec(
        module=layers.ResPostNormLayer if res_post_norm else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm_before,
            self_attention=ModuleSpec(
                module=layers.HeadNormSelfAttention if per_head_norm else layers.RotarySelfAttention,
                params={"attn_mask_type": mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=first_linear,
                    core_attention=m.attention,
                    linear_proj=m.row_linear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=add,
            pre_mlp_layernorm=norm_before,
            mlp=ModuleSpec(
                module=MLP,
                params={"ffn_hidden_size": config.ffn_hidden_size},
                submodules=feed_forward(config, first_linear, m.row_linear),
            ),
            mlp_bda=add,
            sharded_state_dict_keys_map=NORM_NAMES,
            **cross,
        ),
    )


def feed_forward(config: TransformerConfig, column_linear: type, row_linear: type) -> MLPSubmodules:
    """The modules of an MLP. Where the configuration leaves the activation to them it is `elementwise.SwiGLU`."""
    activation = SwiGLU if config.use_te_activation_func else None
    return MLPSubmodules(linear_fc1=column_linear, linear_fc2=row_linear, activation_func=activation)


# precision.fp8 -> Megatron's names. "hybrid": e4m3 forward, e5m2 for gradients.
FP8_RECIPES: dict[str, dict] = {
    "none": {},
    "delayed": {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"},
    "current": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8": "hybrid", "fp8_recipe": "blockwise"},
}


def execution(config: Config) -> dict[str, object]:
    """Megatron's switches for how layers are computed, from `precision` and `parallel`."""
    precision, parallel = config.precision, config.parallel
    switches = dict(FP8_RECIPES[precision.fp8], fp8_param=precision.fp8_parameters)
    if precision.first_layers_bf16 or precision.last_layers_bf16:
        switches |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": precision.first_layers_bf16,
            "num_layers_at_end_in_bf16": precision.last_layers_bf16,
        }
    if parallel.overlap_tensor:
        # Connections are made over NCCL, which is there; Transformer Engine would look for MPI first.
        switches |= {"tp_comm_overlap": True, "tp_comm_bootstrap_backend": "nccl"}
    return switches


def leave_uninitialised(weight: torch.Tensor) -> None:
    """Megatron's init_method here: it marks a parallel weight as such and leaves the numbers to `models.init`."""


def transformer_config(
    *,
    layers: int,
    width: int,
    heads: int,
    ffn_width: int,
    norm_eps: float,
    dtype: torch.dtype,
    tensor: int,
    sequence: bool,
    recompute: bool,
    pipeline: int = 1,
    **more,
) -> TransformerConfig:
    """A TransformerConfig with what every stack here shares; `more` goes to Megatron as it is.

    `pipeline` is for the configuration that the schedules read: a stack has its own run of layers. Which of them FP8
    leaves out concerns the stacks alone (Megatron would hold their number against the layers of one stage).
    Parameters are not initialised by Megatron (see `megamug.models.init`); there is no dropout; GELU is the exact one;
    losses are scaled by us, so Megatron divides by nothing (`calculate_per_token_loss`).
    """
    cuda = torch.cuda.is_available()
    if pipeline > 1:
        more.pop("first_last_layers_bf16", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a default of its own that Megatron deprecates
        return TransformerConfig(
            num_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            ffn_hidden_size=ffn_width,
            layernorm_epsilon=norm_eps,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            pipeline_dtype=dtype,
            sequence_parallel=sequence,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            init_method=leave_uninitialised,
            output_layer_init_method=leave_uninitialised,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=cuda,
            calculate_per_token_loss=True,
            batch_p2p_comm=cuda,  # gloo mixes up the messages of a ring of two when they are batched
            recompute_granularity="full" if recompute else None,
            recompute_method="uniform" if recompute else None,
            recompute_num_layers=1 if recompute else None,
            **{"activation_func": F.gelu, **more},
        )
