import torch

from forgetlearn.models.lora_layers import adapted_layers
from forgetlearn.weights.task_vector import TaskVector


@torch.no_grad()
def as_vector(model, name):
    """What an adapter adds, as dense float32 tensors under the names of the base model's own weights."""
    layers = ((path, layer) for path, layer in adapted_layers(model) if name in layer.lora_B)
    return TaskVector({f"{path}.weight": layer.get_delta_weight(name).float().cpu() for path, layer in layers})
