"""Weights and optimiser of a training under plain names, whole in whatever way they are divided among processes; and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mae_core.sharding import is_divided


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name; each may be a part of its own (`whole` gives all of it)."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def optimiser_of(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by `parameter/entry`; each may be a part of its own (`whole` gives all of it)."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {
        f"{names[id(weight)]}/{entry}": torch.as_tensor(value).detach()
        for weight in _trained(optimiser)
        for entry, value in optimiser.state.get(weight, {}).items()
    }


def names_by_number(model: nn.Module, optimiser: torch.optim.Optimizer) -> list[str]:
    """Names of the parameters in the order in which the optimiser numbers them."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    return [names[id(weight)] for weight in _trained(optimiser)]


def take_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model weights that `weights_of` named, all of each.

    Raises:
        RuntimeError: They are of another model.
    """
    own = model.state_dict()
    model.load_state_dict({name: _like(tensor, own.get(name)) for name, tensor in tensors.items()})


def take_optimiser(model: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser a state that `optimiser_of` named, all of each.

    Raises:
        ValueError: It is of other parameters.
    """
    numbers = {name: number for number, name in enumerate(names_by_number(model, optimiser))}
    own = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in numbers:
            raise ValueError(f"{key} is of a parameter that is not trained here")
        if value.ndim and value.shape != own[name].shape:
            raise ValueError(f"{key} has the shape {tuple(value.shape)} and the parameter {tuple(own[name].shape)}")
        # A copy: what is read from a file stays bound to it, and the file is deleted when its checkpoint is no longer kept.
        state.setdefault(numbers[name], {})[entry] = _like(value, own[name]) if value.ndim else value.clone()
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _trained(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimiser.param_groups for weight in group["params"]]


def _like(tensor: Tensor, own: Tensor | None) -> Tensor:
    """A copy of the part of a whole tensor that this process holds of another."""
    if own is None or not is_divided(own) or tensor.shape != own.shape:
        return tensor.clone()
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
