"""Layers that inference on a CPU computes as one."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

from scalablevit_pl.models.blocks import InplaceGELU, Mlp


class FusedLinear(nn.Linear):
    """Linear layer that oneDNN computes where `onednn_takes` its tokens, and torch elsewhere; made by `fuse`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform `(…, in_features)` to `(…, out_features)`."""
        if onednn_takes(tokens, self):
            return onednn_linear(tokens, self.weight, self.bias)
        return F.linear(tokens, self.weight, self.bias)


class FusedMlp(Mlp):
    """MLP whose first layer and GELU are one call of oneDNN, where that is the same; made by `fuse`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform `(…, C)` to `(…, C)`."""
        plain = type(self.fc1) is FusedLinear and type(self.act) is InplaceGELU
        if not plain or not onednn_takes(tokens, self.fc1) or has_hooks(self.fc1) or has_hooks(self.act):
            return super().forward(tokens)
        hidden = onednn_linear(tokens, self.fc1.weight, self.fc1.bias, "gelu")
        output: Tensor = self.drop(self.fc2(self.drop(hidden)))
        return output


def onednn_linear(tokens: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Compute a linear layer, and `gelu` (the exact one) behind it or `none`, in one call."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, activation, [], "none")
    return output


def onednn_takes(tokens: Tensor, layer: nn.Linear) -> bool:
    """Tell whether oneDNN may compute a linear layer: in inference on a CPU, of plain tensors in a type that it knows.

    Its operator has no gradients, and compilers, traces, transforms of functions and modes of torch's, such as those
    that count operations, do not know it: where one of them looks, torch's own operators serve.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._functorch.peek_interpreter_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
        or type(tokens) is not Tensor
    ):
        return False
    weight, bias = layer.weight, layer.bias
    return (
        weight.dim() == 2
        and weight.numel() > 0
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))  # it ignores strides
        and all(_is_plain(part, tokens.dtype) for part in (tokens, weight, bias) if part is not None)
        and type(weight) is nn.Parameter
        and (bias is None or type(bias) is nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
        and _has_instructions(tokens.dtype)
    )


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.layout == torch.strided


@cache
def _has_instructions(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16) or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_hooks(module: nn.Module) -> bool:
    """Tell whether something is called before, after or in the place of a module's forward pass."""
    own = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(own or hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def fuse(network: nn.Module) -> None:
    """Have oneDNN compute a network's linear layers in inference on a CPU, and the GELUs of our MLPs with them.

    Everything stays where it is, weights, names, hooks and activations, so that the network can be saved, moved,
    changed and trained as before; outputs differ by rounding. Linear layers of any network are taken, and fusing again
    does nothing. Tools that look for `nn.Linear` by its exact type, such as `torch.ao.quantization.quantize_dynamic`,
    have to come first.

    Args:
        network: Is changed in place.
    """
    # Another class for what is there, as by torch's parametrizations, keeps what others hold of it. A derived layer
    # computes something else and is left alone.
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = FusedLinear
        elif type(module) is Mlp:
            module.__class__ = FusedMlp
