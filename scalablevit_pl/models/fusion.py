"""Linear layers and GELUs computed by oneDNN for inference on a CPU."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks
from torch.overrides import has_torch_function

from scalablevit_pl.models.blocks import InplaceGELU, Mlp


def fuse(network: nn.Module) -> None:
    """Let oneDNN compute the linear layers of a network, and the GELUs of our MLPs, in inference on a CPU.

    Weights, names, hooks and activations stay the same, so the network can still be saved, moved, changed and trained.
    Outputs differ by rounding. This works for the linear layers of any network, and fusing twice is harmless. Tools
    that look for `nn.Linear` by its exact type, such as `torch.ao.quantization.quantize_dynamic`, must run first.

    Args:
        network: Changed in place.
    """
    # Changing the class, as torch's parametrizations do, keeps references to the layer valid. Derived layers compute
    # something else and stay as they are.
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = FusedLinear
        elif type(module) is Mlp:
            module.__class__ = FusedMlp


class FusedLinear(nn.Linear):
    """Linear layer computed by oneDNN if `onednn_takes` the tokens, by torch otherwise. Created by `fuse`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform `(…, in_features)` to `(…, out_features)`."""
        if onednn_takes(tokens, self):
            return onednn_linear(tokens, self.weight, self.bias)
        return F.linear(tokens, self.weight, self.bias)


class FusedMlp(Mlp):
    """MLP that computes its first layer and the GELU in one call of oneDNN if the result is the same."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform `(…, C)` to `(…, C)`."""
        plain = type(self.fc1) is FusedLinear and type(self.act) is InplaceGELU
        if not plain or not onednn_takes(tokens, self.fc1) or has_hooks(self.fc1) or has_hooks(self.act):
            return super().forward(tokens)
        hidden = onednn_linear(tokens, self.fc1.weight, self.fc1.bias, "gelu")
        output: Tensor = self.drop(self.fc2(self.drop(hidden)))
        return output


def onednn_linear(tokens: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Compute a linear layer and an activation, `none` or the exact `gelu`, in one call."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, activation, [], "none")
    return output


def onednn_takes(tokens: Tensor, layer: nn.Linear) -> bool:
    """Return whether oneDNN can compute a linear layer: for inference on a CPU, with plain tensors of one dtype."""
    weight, bias = layer.weight, layer.bias
    parts = (tokens, weight) if bias is None else (tokens, weight, bias)
    return (
        not is_observed()
        and not has_torch_function(parts)  # also true in modes of torch functions
        and all(type(part) in (Tensor, nn.Parameter) for part in parts)
        and all(part.device.type == "cpu" and part.dtype == tokens.dtype for part in parts)
        and weight.layout == torch.strided
        and weight.dim() == 2
        and weight.numel() > 0
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))  # oneDNN ignores its strides
        and bool(torch.backends.mkldnn.enabled)
        and has_instructions(tokens.dtype)
    )


def is_observed() -> bool:
    """Return whether gradients, autocast, a compiler, a trace or a transform requires torch's own operators.

    The operator of oneDNN has no gradients, and modes such as the one that counts operations do not know it.
    """
    return bool(
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._functorch.peek_interpreter_stack()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Return whether oneDNN computes in this dtype on this CPU."""
    if dtype not in (torch.float32, torch.bfloat16) or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_hooks(module: nn.Module) -> bool:
    """Return whether something runs before, after or instead of a module's forward pass."""
    own = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(own or hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
